"""Commands that train nothing: evaluate, generate and data."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from perl import cafe, judge, policies
from perl.config import DataConfig, EvaluateConfig, GenerateConfig, UsageError, refuse_unused
from perl.data import (
    Encoded,
    Rows,
    columns_of,
    encode_examples,
    encode_labelled,
    encode_pairs,
    plain_text,
    read_rows,
    row_kind,
)
from perl.ensemble import (
    WINDOW,
    base_of_reward_model,
    check_finite,
    load_reward_models,
    score_rewards,
)
from perl.files import GrowingRows, empty_folder, new_file, settings, write_rows
from perl.progress import progress
from perl.report import text_table
from perl.reward import figures_of_scores, sequences
from perl.reward_sources import open_text_source
from perl.training import language_figures, length_limit, open_backbone

# ---------------------------------------------------------------------------------------------
# evaluate


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Figures of a model on rows.

    With a reward model, pairs and labelled rows are scored as they are (accuracy; AUC and balanced
    accuracy). With any source of rewards or a judge, policies answer other rows' prompts and the
    answers are scored. With none, text, completions and messages give loss and perplexity.
    """
    out = new_file(config.out) if config.out else None
    rows = read_rows(config.data, config.format).first(config.rows)
    kind = row_kind(rows)
    config = dataclasses.replace(config, model=_base(config))
    asked = config.reward_function or config.reward_url or config.judge_model or config.policy
    if config.reward_model and kind in ("pairwise", "pointwise") and not asked:
        _refuse_sampling(config, kind)
        figures = _score_rows(config, rows, kind)
    elif config.reward_model or config.reward_function or config.reward_url or config.judge_model:
        figures = _score_policies(config, rows)
    elif kind in ("text", "completion", "messages"):
        _refuse_sampling(config, kind)
        figures = _score_text(config, rows, kind)
    else:
        raise UsageError(
            f"{config.data} holds {kind} rows; evaluating them wants --reward-model "
            "FOLDER; or, for their prompts, --reward-function FILE.py:NAME, --reward-url URL or "
            "--judge-model"
        )
    figures = {"data": config.data, "rows": len(rows)} | figures
    if out:
        write_rows(out, [figures])
    return figures


def _base(config: EvaluateConfig) -> str:
    model = config.model or policies.base_of_policies(config.policy or [])
    if model is None and config.reward_model is None:
        raise UsageError("no --policy says which base it is of; give that as --model")
    return model or base_of_reward_model(config.reward_model[0])


def _refuse_sampling(config: EvaluateConfig, kind: str) -> None:
    what_for = f"answers to prompts, and the {kind} rows of {config.data} are scored as they are"
    refuse_unused(config, ["max_new_tokens", "stop", "temperature"], what_for)


def _score_rows(config: EvaluateConfig, rows: Rows, kind: str) -> dict[str, Any]:
    backbone = open_backbone(config)
    judges = load_reward_models(backbone, config.reward_model)
    encode = encode_pairs if kind == "pairwise" else encode_labelled
    examples = encode(rows, backbone.tokenizer, length_limit(config, backbone))
    policies.say_notes(config, examples)
    rewards = score_rewards(
        backbone, judges, sequences(examples), config.batch_size, config.ensemble
    )
    check_finite(rewards, examples.places)
    return figures_of_scores(rewards.reward, examples) | rewards.figures()


def _score_text(config: EvaluateConfig, rows: Rows, kind: str) -> dict[str, Any]:
    names = config.policy or [policies.BASE]
    if len(names) > 1 or Path(names[0]).is_file():
        raise UsageError(f"{config.data} holds {kind} rows, which want one --policy, a model's")
    backbone = open_backbone(config)
    examples = encode_examples(rows, kind, backbone.tokenizer, length_limit(config, backbone))
    policies.say_notes(config, examples)
    (policy,) = policies.open_policies(config, backbone, names, Encoded())
    return language_figures(backbone, policy.role, examples, config.batch_size)


def _score_policies(config: EvaluateConfig, rows: Rows) -> dict[str, Any]:
    """Of each policy's answers: reward, yes rate, KL, length and share that ended, as known."""
    policies.want_prompts(config, rows)
    template = judge.read_template(config.judge_template, judge.QUESTION, judge.SINGLE)
    source = open_text_source(config, lambda: rows[0]["prompt"])
    backbone = open_backbone(config)
    prompts = policies.encode(config, backbone, rows)
    names = config.policy or [policies.BASE]
    opened = policies.open_policies(config, backbone, names, prompts)
    rewards = policies.open_rewards(config, backbone, source)
    reader = None
    if config.judge_model:
        reader = judge.open_reader(config, backbone, template, ["yes", "no"])
        judge.check_room(reader, judge.SINGLE, prompts, config.max_new_tokens)
    table = []
    for policy in opened:
        answers = policies.answers_of(config, backbone, policy, prompts)
        figures = rewards(prompts, answers).figures() if rewards else {}
        if reader:
            asked = [
                {"prompt": row["prompt"], "completion": answer.text}
                for row, answer in zip(prompts.rows, answers, strict=True)
            ]
            figures |= judge.yes_figures(reader.read(asked, prompts.places))
        kl = policies.kl_to_base(config, backbone, policy, prompts, answers)
        if kl is not None:
            figures["kl"] = statistics.fmean(kl)
        figures["length"] = statistics.fmean(len(answer.ids) for answer in answers)
        if policy.given is None:
            figures["ended"] = statistics.fmean(answer.ended for answer in answers)
        table.append({"policy": policy.name} | figures)
    if len(table) == 1:
        return table[0]
    print(text_table(_shown(table)), file=sys.stderr)
    return {"policies": table}


def _shown(table: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The figures as text, a column for each that any row has."""
    columns = list(dict.fromkeys(name for row in table for name in row))
    return [{name: _text(row.get(name)) for name in columns} for row in table]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------
# generate


def generate(config: GenerateConfig) -> None:
    """Prints one prompt with its answer, or {prompt, completion} JSON lines for a data file.

    To --out they are written a window of rows at a time, and a killed command goes on there.
    """
    rows = Rows([{"prompt": config.prompt}], ["--prompt"])
    if config.data:
        rows = read_rows(config.data).first(config.rows)
    policies.want_prompts(config, rows)
    names = [config.policy or policies.BASE]
    file = None
    if config.out:
        file = GrowingRows(config.out, settings(config, policies.files_of(config, names)))
    backbone = open_backbone(config)
    prompts = policies.encode(config, backbone, rows)
    (policy,) = policies.open_policies(config, backbone, names, prompts)

    def answered(done: int) -> Iterator[list[dict[str, Any]]]:
        """Windows of the rows behind the first `done`."""
        window = WINDOW * config.batch_size
        for start in range(done, len(prompts), window):
            part = prompts.part(slice(start, start + window))
            answers = policies.answers_of(config, backbone, policy, part, start)
            yield [
                {"prompt": row["prompt"], "completion": answer.text}
                for row, answer in zip(part.rows, answers, strict=True)
            ]

    if file:
        with file, progress(len(prompts), "generate", "prompt", done=file.count) as bar:
            for window in answered(file.count):
                file.append(window)
                bar.update(len(window))
        file.finish()
    elif config.data:
        for row in itertools.chain.from_iterable(answered(0)):
            print(json.dumps(row, ensure_ascii=False), flush=True)
    else:
        ((row,),) = answered(0)
        print(config.prompt + row["completion"])


# ---------------------------------------------------------------------------------------------
# data


def describe(config: DataConfig) -> None:
    """Prints what a data file holds, or writes the embedded world's files."""
    if config.path == "cafe":
        _write_cafe(config)
        return
    out = new_file(config.out) if config.out else None
    unit, length = _ruler(config.model)
    rows = read_rows(config.path, config.format)
    kind = row_kind(rows)
    columns = columns_of(rows, kind)
    print(f"{config.path}: {len(rows)} {kind} rows {{{', '.join(columns)}}}")
    for note in rows.notes:
        print(note)
    extra = sorted(set().union(*rows) - set(columns))
    if extra:
        print("other columns, ignored: " + ", ".join(extra))
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
