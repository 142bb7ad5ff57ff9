"""Commands that train nothing: evaluate, generate and data."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections import Counter
from typing import Any

import torch

from perl import cafe
from perl.backbone import Backbone
from perl.config import DataConfig, EvaluateConfig, GenerateConfig, UsageError
from perl.data import (
    KINDS,
    Encoded,
    Rows,
    columns_of,
    encode_examples,
    encode_labelled,
    encode_pairs,
    encode_prompts,
    plain_text,
    prompt_room,
    read_rows,
    row_kind,
)
from perl.ensemble import (
    Rewards,
    base_of_reward_model,
    check_finite,
    combine,
    load_reward_models,
    score_rewards,
)
from perl.files import empty_folder, new_file, write_rows
from perl.progress import progress
from perl.reward import figures_of_scores, sequences
from perl.reward_sources import TextSource, open_text_source, reencode
from perl.rollout import generate as sample
from perl.training import language_figures, length_limit, open_backbone

# ---------------------------------------------------------------------------------------------
# evaluate


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Figures of a model on rows.

    With a reward model, pairs and labelled rows are scored as they are (accuracy; AUC and balanced
    accuracy). With any source of rewards, the model answers other rows' prompts and the answers are
    scored. With none, text, completions and messages give loss and perplexity.
    """
    out = new_file(config.out) if config.out else None
    rows = read_rows(config.data, config.format).first(config.rows)
    kind = row_kind(rows)
    if config.model is None:
        base = base_of_reward_model(config.reward_model[0])
        config = dataclasses.replace(config, model=base)
    source = None
    if config.reward_function or config.reward_url:
        _want_prompts(config, kind)
        source = open_text_source(config, lambda: rows[0]["prompt"])
    backbone, role = _policy(config)
    answering = kind not in ("pairwise", "pointwise")
    judges = load_reward_models(backbone, config.reward_model or [], own_tokenizer=answering)
    if source or judges and answering:
        figures = _score_answers(config, backbone, role, source, judges, rows, kind)
    elif judges:
        encode = encode_pairs if kind == "pairwise" else encode_labelled
        examples = encode(rows, backbone.tokenizer, length_limit(config, backbone))
        _say_notes(config, examples)
        rewards = score_rewards(
            backbone, judges, sequences(examples), config.batch_size, config.ensemble
        )
        check_finite(rewards, examples.places)
        figures = figures_of_scores(rewards.reward, examples) | rewards.figures()
    elif kind in ("text", "completion", "messages"):
        examples = encode_examples(rows, kind, backbone.tokenizer, length_limit(config, backbone))
        _say_notes(config, examples)
        figures = language_figures(backbone, role, examples, config.batch_size)
    else:
        raise UsageError(
            f"{config.data} holds {kind} rows; evaluating them wants --reward-model "
            "FOLDER; or --reward-function FILE.py:NAME or --reward-url URL, for their prompts"
        )
    figures = {"data": config.data, "rows": len(rows)} | figures
    if out:
        write_rows(out, [figures])
    return figures


def _score_answers(
    config: EvaluateConfig,
    backbone: Backbone,
    role: str | None,
    source: TextSource | None,
    judges: list[str],
    rows: Rows,
    kind: str,
) -> dict[str, Any]:
    _want_prompts(config, kind)
    prompts, answers = _answers(config, backbone, role, rows)
    texts = backbone.tokenizer.batch_decode(answers, skip_special_tokens=True)
    asked = [row["prompt"] for row in prompts.rows]
    if source:
        rewards = Rewards(torch.tensor(_in_batches(source, asked, texts, config.batch_size)))
    else:
        both = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        scores = []
        for judge in judges:
            read = both
            if backbone.tokenizer_of(judge) is not backbone.tokenizer:
                read = reencode(backbone, judge, asked, texts, config.truncate_prompts)
            scores.append(score_rewards(backbone, [judge], read, config.batch_size).reward)
        rewards = combine(torch.stack(scores), config.ensemble)
        check_finite(rewards, prompts.places)
    eos = backbone.tokenizer.eos_token_id
    return rewards.figures() | {
        "length": statistics.fmean(map(len, answers)),
        "ended": statistics.fmean(answer[-1] == eos for answer in answers),
    }


def _want_prompts(config: EvaluateConfig, kind: str) -> None:
    if "prompt" not in KINDS[kind]:
        raise UsageError(
            f"{config.data} holds {kind} rows, which have no prompts to answer; give "
            "rows with a prompt column"
        )


def _in_batches(source: TextSource, prompts: list[Any], texts: list[str], size: int) -> list[float]:
    rewards: list[float] = []
    with progress(len(texts), "score", "answer") as bar:
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            rewards += source(prompts[start : start + size], part)
            bar.update(len(part))
    return rewards


# ---------------------------------------------------------------------------------------------
# generate


def generate(config: GenerateConfig) -> None:
    """Prints one prompt with its answer, or {prompt, completion} JSON lines for a data file."""
    out = new_file(config.out) if config.out else None
    rows = Rows([{"prompt": config.prompt}], ["--prompt"])
    if config.data:
        rows = read_rows(config.data).first(config.rows)
        if "prompt" not in KINDS[row_kind(rows)]:
            raise UsageError(f"{config.data} has no prompt column; generate wants {{prompt}} rows")
    backbone, role = _policy(config)
    prompts, answers = _answers(config, backbone, role, rows)
    texts = backbone.tokenizer.batch_decode(answers, skip_special_tokens=True)
    answered = [
        {"prompt": row["prompt"], "completion": text}
        for row, text in zip(prompts.rows, texts, strict=True)
    ]
    if out:
        write_rows(out, answered)
    elif config.data:
        for row in answered:
            print(json.dumps(row, ensure_ascii=False))
    else:
        print(config.prompt + texts[0])


def _answers(
    config: EvaluateConfig | GenerateConfig, backbone: Backbone, role: str | None, rows: Rows
) -> tuple[Encoded, list[list[int]]]:
    """Prompts, and the answers' tokens with the end-of-sequence token."""
    longest = getattr(config, "max_tokens", 0)
    room = prompt_room(longest, config.max_new_tokens, backbone.config.max_position_embeddings)
    prompts = encode_prompts(
        rows,
        backbone.tokenizer,
        room,
        truncate_prompts=config.truncate_prompts,
        drop_long=getattr(config, "drop_long", False),
    )
    _say_notes(config, prompts)
    with progress(len(prompts), "generate", "answer") as bar:
        rollout = sample(
            backbone,
            role,
            list(prompts),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=getattr(config, "top_k", 0),
            top_p=getattr(config, "top_p", 1.0),
            batch_size=config.batch_size,
            ended=bar.update,
        )
    return prompts, rollout.answers()


def _say_notes(config: EvaluateConfig | GenerateConfig, encoded: Encoded) -> None:
    for note in encoded.notes:
        print(f"{config.data or '--prompt'}: {note}", file=sys.stderr)


def _policy(config: EvaluateConfig | GenerateConfig) -> tuple[Backbone, str | None]:
    """The model, and the role that answers: --adapter, or the model itself."""
    backbone = open_backbone(config)
    if config.adapter is None:
        return backbone, None
    backbone.load_role("policy", config.adapter)
    return backbone, "policy"


# ---------------------------------------------------------------------------------------------
# data


def describe(config: DataConfig) -> None:
    """Prints what a data file holds, or writes the embedded world's files."""
    if config.path == "cafe":
        _write_cafe(config)
        return
    out = new_file(config.out) if config.out else None
    rows = read_rows(config.path, config.format)
    kind = row_kind(rows)
    columns = columns_of(rows, kind)
    print(f"{config.path}: {len(rows)} {kind} rows {{{', '.join(columns)}}}")
    for note in rows.notes:
        print(note)
    extra = sorted(set().union(*rows) - set(columns))
    if extra:
        print("other columns, ignored: " + ", ".join(extra))
    unit, length = _ruler(config.model)
    for column in columns:
        if column in ("label", "margin"):
            counts = Counter(float(row[column]) for row in rows)
            shares = (
                f"{value:g}: {n} ({n / len(rows):.1%})" for value, n in sorted(counts.items())[:10]
            )
            print(f"{column:<12} " + ", ".join(shares))
        else:
            lengths = sorted(length(row[column]) for row in rows)
            print(
                f"{column:<12} {unit}: shortest {lengths[0]}, median "
                f"{lengths[len(lengths) // 2]}, 95 % {lengths[int(0.95 * (len(lengths) - 1))]}, "
                f"longest {lengths[-1]}"
            )
    for row in rows[: config.rows]:
        print(json.dumps({column: row[column] for column in columns}, ensure_ascii=False))
    if out:
        write_rows(out, rows)


def _ruler(model: str | None) -> tuple[str, Any]:
    """(unit, function) that measures a text or a list of messages."""
    if model is None:
        return "characters", lambda value: len(plain_text(value))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UsageError(f"no tokenizer in --model {model}: {str(error).splitlines()[0]}") from None
    return "tokens", lambda value: len(tokenizer(plain_text(value))["input_ids"])


def _write_cafe(config: DataConfig) -> None:
    folder = empty_folder(config.out) if config.out is not None else None
    world = cafe.build_world(config.seed)
    tables = {field.name: getattr(world, field.name) for field in dataclasses.fields(world)}
    if folder is None:
        for name, rows in tables.items():
            print(f"{name}: {len(rows)} {row_kind(rows)} rows")
            for row in rows[: config.rows]:
                print(json.dumps(row, ensure_ascii=False))
        return
    cafe.write_world(folder, world, config.seed)
    for name, rows in tables.items():
        print(f"{folder / name}.jsonl: {len(rows)} {row_kind(rows)} rows")
    print(f"{folder / 'init'}: a small Llama with random weights, and its tokenizer")
