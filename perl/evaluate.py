"""The commands that train nothing: evaluate, generate, merge, data and bench."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perl import cafe
from perl.backbone import Backbone
from perl.config import (
    BenchConfig,
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    MergeConfig,
    UsageError,
)
from perl.data import (
    KINDS,
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
from perl.reward import load_reward_function, reward_figures, score_all
from perl.rollout import Rollout
from perl.rollout import generate as sample
from perl.run import role_folder
from perl.training import by_length, language_figures, length_limit, open_backbone

# ---------------------------------------------------------------------------------------------
# evaluate


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Figures of a model on rows.

    With a reward model, pairs and labelled rows are scored as they are (accuracy; AUC and balanced
    accuracy). With a reward model or function, the model answers other rows' prompts and the
    answers are scored. With neither, text, completions and messages give loss and perplexity.
    """
    out = _new_file(config.out) if config.out else None
    rows = _first(read_rows(config.data, config.format), config.rows)
    kind = row_kind(rows)
    backbone, role = _policy(config)
    if config.reward_function or config.reward_model and kind not in ("pairwise", "pointwise"):
        figures = _score_answers(config, backbone, role, rows, kind)
    elif config.reward_model:
        backbone.load_role("reward", config.reward_model, scalar=True)
        encode = encode_pairs if kind == "pairwise" else encode_labelled
        examples = encode(rows, backbone.tokenizer, length_limit(config, backbone))
        figures = reward_figures(backbone, "reward", examples, config.batch_size)
    elif kind in ("text", "completion", "messages"):
        examples = encode_examples(rows, kind, backbone.tokenizer, length_limit(config, backbone))
        figures = language_figures(backbone, role, examples, config.batch_size)
    else:
        raise UsageError(
            f"{config.data} holds {kind} rows; evaluating them wants --reward-model "
            "FOLDER, or --reward-function FILE.py:NAME for their prompts"
        )
    figures = {"data": config.data, "rows": len(rows)} | figures
    if out:
        _write_rows(out, [figures])
    return figures


def _score_answers(
    config: EvaluateConfig, backbone: Backbone, role: str | None, rows: Rows, kind: str
) -> dict[str, Any]:
    if "prompt" not in KINDS[kind]:
        raise UsageError(
            f"{config.data} holds {kind} rows, which have no prompts to answer; give "
            "rows with a prompt column"
        )
    if config.reward_function and config.reward_model:
        raise UsageError("give --reward-model or --reward-function, not both")
    function = load_reward_function(config.reward_function) if config.reward_function else None
    if config.reward_model:
        backbone.load_role("reward", config.reward_model, scalar=True)
    prompts, rows, answers = _answers(config, backbone, role, rows)
    if function:
        texts = backbone.tokenizer.batch_decode(answers, skip_special_tokens=True)
        rewards = function([row["prompt"] for row in rows], texts)
    else:
        both = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        rewards = score_all(backbone, "reward", both, config.batch_size).tolist()
    eos = backbone.tokenizer.eos_token_id
    return {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "length": statistics.fmean(map(len, answers)),
        "ended": statistics.fmean(answer[-1] == eos for answer in answers),
    }


# ---------------------------------------------------------------------------------------------
# generate


def generate(config: GenerateConfig) -> None:
    """Prints one prompt with its answer, or {prompt, completion} JSON lines for a data file."""
    out = _new_file(config.out) if config.out else None
    rows = Rows([{"prompt": config.prompt}], ["--prompt"])
    if config.data:
        rows = _first(read_rows(config.data), config.rows)
        if "prompt" not in KINDS[row_kind(rows)]:
            raise UsageError(f"{config.data} has no prompt column; generate wants {{prompt}} rows")
    backbone, role = _policy(config)
    _, rows, answers = _answers(config, backbone, role, rows)
    texts = backbone.tokenizer.batch_decode(answers, skip_special_tokens=True)
    answered = [
        {"prompt": row["prompt"], "completion": text} for row, text in zip(rows, texts, strict=True)
    ]
    if out:
        _write_rows(out, answered)
    elif config.data:
        for row in answered:
            print(json.dumps(row, ensure_ascii=False))
    else:
        print(config.prompt + texts[0])


def _answers(
    config: EvaluateConfig | GenerateConfig, backbone: Backbone, role: str | None, rows: Rows
) -> tuple[list[list[int]], list[dict], list[list[int]]]:
    """Prompt tokens, their rows, and the answers' tokens with the end-of-sequence token."""
    longest = getattr(config, "max_tokens", 0)
    room = prompt_room(longest, config.max_new_tokens, backbone.config.max_position_embeddings)
    prompts = encode_prompts(
        rows,
        backbone.tokenizer,
        room,
        truncate_prompts=config.truncate_prompts,
        drop_long=getattr(config, "drop_long", False),
    )
    answers: list[list[int]] = [[] for _ in prompts]
    for group in by_length(prompts, config.batch_size):
        rollout = sample(
            backbone,
            role,
            [prompts[i] for i in group],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=getattr(config, "top_k", 0),
            top_p=getattr(config, "top_p", 1.0),
        )
        for i, answer in zip(group, _real_tokens(rollout), strict=True):
            answers[i] = answer
    return prompts, prompts.rows, answers


def _real_tokens(rollout: Rollout) -> list[list[int]]:
    return [
        ids[mask].tolist()
        for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    ]


def _policy(config: EvaluateConfig | GenerateConfig) -> tuple[Backbone, str | None]:
    """The model, and the role that answers: --adapter, or the model itself."""
    backbone = open_backbone(config)
    if config.adapter is None:
        return backbone, None
    backbone.load_role("policy", config.adapter)
    return backbone, "policy"


def _first(rows: Rows, count: int) -> Rows:
    return Rows(rows[:count], rows.places[:count], rows.notes) if count else rows


# ---------------------------------------------------------------------------------------------
# merge


def merge(config: MergeConfig) -> dict[str, Any]:
    """Writes the base of an adapter (or of an SFT or policy run) with the adapter added to it."""
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists and is not empty; give another folder")
    if not Path(config.model).is_dir():
        raise UsageError(f"--model {config.model} is no folder; give an adapter or run folder")
    if not (role_folder(config.model, "policy") / "adapter_config.json").is_file():
        raise UsageError(f"--model {config.model} holds no adapter, so there is nothing to merge")
    backbone = open_backbone(config)
    backbone.model.save_pretrained(out)
    backbone.tokenizer.save_pretrained(out)
    return {"model": str(out), "dtype": config.dtype}


# ---------------------------------------------------------------------------------------------
# data


def describe(config: DataConfig) -> None:
    """Prints what a data file holds, or writes the embedded world's files."""
    if config.path == "cafe":
        _write_cafe(config)
        return
    out = _new_file(config.out) if config.out else None
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
        _write_rows(out, rows)


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
    folder = Path(config.out) if config.out is not None else None
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise UsageError(f"--out {folder} exists and is not empty; give another folder")
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


def _new_file(path: str | Path) -> Path:
    path = Path(path)
    if path.exists():
        raise UsageError(f"--out {path} exists; give a name that does not")
    return path


def _write_rows(path: Path, rows: Sequence[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# bench


def bench(config: BenchConfig) -> None:
    """Runs pytest on the checkout's benchmarks; its tables go to stdout."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not folder.is_dir():
        raise UsageError(
            "bench runs the benchmarks of a source checkout, and this package was "
            "installed without; clone the repository and run it there"
        )
    command = [sys.executable, "-m", "pytest", str(folder), "-q", "-s"]
    command += ["-k", config.select] if config.select else []
    code = subprocess.run(command, cwd=folder.parent).returncode
    if code:
        raise UsageError(f"the benchmarks ended with pytest's exit code {code}; see above")
