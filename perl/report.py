"""Figures and report.html: of one run folder, or of several ways of tuning beside each other.

    write_run_report("runs/sft")                  # metrics, samples and config of one run
    write_comparison(
        "runs/demo",
        "LoRA beside full tuning",
        arms={
            "LoRA": Arm({"SFT": Phase("runs/demo/lora-sft"), "REINFORCE": Phase(...)}),
            "full": Arm({"SFT": Phase("runs/demo/full-sft"), "REINFORCE": Phase(...)}),
        },
        table=[{"": "trainable parameters", "LoRA": 33_000, "full": 640_000}],
    )

The page is one file without scripts or links: drawings are inline SVG whose colours are CSS
variables, so they follow the reader's light or dark scheme. The same drawings lie beside it as PNG.
Without matplotlib the page has its tables and samples, and says how to get the figures.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy

from perl.config import UsageError, tomllib
from perl.drawings import (
    Bars,
    Histogram,
    Panel,
    Reliability,
    colours,
    inline,
    is_number,
    short,
    shown,
)


@dataclass(frozen=True)
class Phase:
    """One training run of an arm. A cost that is not given is `phase_cost` of the run."""

    run: str | Path
    step_ms: float | None = None
    peak_mb: float | None = None


@dataclass(frozen=True)
class Arm:
    """One way of tuning: its runs by the name of their phase, in the order of work."""

    phases: Mapping[str, Phase]


@dataclass(frozen=True)
class Answer:
    """What a policy answered; `note` stands beside its label, such as "oracle 0.93"."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """Answers to one prompt, side by side under their labels ("before", "after")."""

    prompt: Any  # text, or a list of {role, content} messages
    answers: Mapping[str, Answer]
    note: str = ""  # stands between the prompt and its answers


def write_run_report(run_folder: str | Path) -> Path:
    """Writes report.html and its figures into the folder of an sft, reward or reinforce run.

    Raises:
        UsageError: the folder holds no metrics.jsonl.
    """
    folder = Path(run_folder)
    rows, config = _metrics(folder), _config(folder)
    kind = _kind(config)
    curves = _curves(rows, kind)
    panels = [
        Panel(c.title, c.unit, {label: _line(rows, key, c.scale) for key, label in c.keys.items()})
        for c in curves
    ]
    title = f"{kind}: {folder.resolve().name}"
    return _write(
        folder / "report.html",
        title,
        [_summary(rows, config)],
        [
            ("Learning curves", inline(folder / "curves.png", panels)),
            ("Figures", _table(_figures(rows, curves))),
            ("Memory of each role", _table(_role_memory(rows))),
            ("Held-out answers", inline(folder / "held_out.png", _held_out(rows, config))),
            ("Samples", _samples(run_samples(folder))),
            ("Configuration", _configuration(config)),
        ],
    )


def try_run_report(run_folder: str | Path) -> None:
    """`write_run_report` for the end of a run: a failure is a line on stderr, the run stays."""
    try:
        print(f"report: {write_run_report(run_folder)}", file=sys.stderr)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        print(f"no report of {run_folder}, the run itself is whole: {reason}", file=sys.stderr)


def write_comparison(
    folder: str | Path,
    title: str,
    arms: Mapping[str, Arm],
    table: Sequence[Mapping[str, Any]],
    *,
    notes: Sequence[str] = (),
    panels: Sequence[Panel] = (),
    samples: Sequence[Sample] | None = None,
) -> Path:
    """Writes report.html, curves.png and costs.png into `folder`: arms beside each other.

    Args:
        arms: label -> its runs. Curves come from their metrics, a drawing per phase and figure.
        table: rows; the keys of the first are the heads, and its first column names the rows.
        notes: paragraphs of plain text under the title.
        panels: drawings to put before those of the runs, such as the oracle's score over steps;
            with the labels of `arms`, in their order, they get the same colours.
        samples: by default the first and the last answers in samples.jsonl of the arms' runs.

    Raises:
        UsageError: a run folder holds no metrics.jsonl.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if samples is None:
        samples = _samples_of_arms(arms)
    return _write(
        folder / "report.html",
        title,
        notes,
        [
            ("Figures", _table(table)),
            ("Time and memory", inline(folder / "costs.png", _cost_bars(arms))),
            ("Learning curves", inline(folder / "curves.png", [*panels, *_arm_panels(arms)])),
            ("Samples", _samples(samples)),
        ],
    )


def write_verdicts(
    path: Path, names: Sequence[str], figures: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> Path:
    """Writes the page of a comparison of two policies, and its drawings beside it as PNG.

    names: of the first and the second. figures, rows: what `perl compare` found, as it gives them.
    """
    low, high = figures["win_rate_interval"]
    verdicts = [
        {"": "first wins", "prompts": figures["wins"]},
        {"": "ties", "prompts": figures["ties"]},
        {"": "second wins", "prompts": figures["losses"]},
        {"": "win rate of the first, ties one half", "prompts": figures["win_rate"]},
        {"": "95 % interval", "prompts": f"{short(low, 3)} to {short(high, 3)}"},
        {"": "split verdicts, share", "prompts": figures["split"]},
        {"": "for the answer shown first, share", "prompts": figures["shown_first"]},
    ]
    if "judge_mass" in figures:
        mass = figures["judge_mass"]
        verdicts.append({"": "probability of the judge on its two words", "prompts": mass})
    return _write(
        path,
        f"{names[0]} against {names[1]}",
        [f"{figures['prompts']:,} prompts · judge {figures['judge']} · a win needs both orders"],
        [
            ("Verdicts", _table(verdicts)),
            ("Policies", _table(_policies(figures))),
            ("Distributions", inline(path.with_suffix(".png"), _opinions(names, rows))),
            ("Answers", _samples([_sample_of_verdict(names, row) for row in rows[:SHOWN]])),
        ],
    )


SHOWN = 200  # answers on a page; the rows have them all


def phase_cost(run_folder: str | Path) -> dict[str, float]:
    """{"step_ms": median step time in ms, "peak_mb": peak memory in MB of 10^6 bytes} of a run.

    What the run did not log is left out. Raises UsageError where there is no metrics.jsonl.
    """
    rows = _metrics(Path(run_folder))
    _, times = _line(rows, "step_s", 1e3)
    _, peaks = _line(rows, "peak_memory_bytes", 1e-6)
    cost = {"step_ms": statistics.median(times)} if times else {}
    return cost | ({"peak_mb": max(peaks)} if peaks else {})


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Aligned columns, all but the first to the right; the keys of the first row are the heads."""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    first = next(iter(widths))
    return "\n".join(
        "  ".join(
            row[key].ljust(width) if key == first else row[key].rjust(width)
            for key, width in widths.items()
        )
        for row in [{key: key for key in widths}, *rows]
    )


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The same in Markdown."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    lines = [rows[0].keys(), rule, *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run_samples(run_folder: str | Path) -> list[Sample]:
    """The first and the last answers to each sampled prompt; empty where a run samples nothing."""
    by_step: dict[int, Rows] = {}
    for row in _jsonl(Path(run_folder) / "samples.jsonl"):
        by_step.setdefault(row["step"], []).append(row)
    ends = [by_step[step] for step in sorted({min(by_step), max(by_step)})] if by_step else []
    return [
        Sample(
            same[0]["prompt"],
            {
                f"step {row['step']:,}": Answer(row["completion"], f"reward {short(row['reward'])}")
                for row in same
            },
        )
        for same in zip(*ends, strict=False)
    ]


# ---------------------------------------------------------------------------------------------
# What a run folder says

Rows = list[dict[str, Any]]
Line = tuple[list[float], list[float]]  # steps, values


def _jsonl(path: Path) -> Rows:
    """The lines of a JSONL file up to one that a kill has torn; none where there is no file."""
    rows: Rows = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _metrics(folder: Path) -> Rows:
    if not (folder / "metrics.jsonl").is_file():
        raise UsageError(f"{folder} holds no metrics.jsonl; give the folder of a training run")
    return _jsonl(folder / "metrics.jsonl")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _kind(config: dict[str, Any]) -> str:
    """The kind of run, by an option that only its command has."""
    if "prompts_per_step" in config:
        return "REINFORCE"
    if "balance_labels" in config:
        return "Reward model"
    return "SFT" if config else "Run"


def _summary(rows: Rows, config: dict[str, Any]) -> str:
    """One line under the title: how far the run came, and on what."""
    parts = [f"{rows[-1]['step']:,} of {config.get('steps', '?')} steps" if rows else "no steps"]
    if config.get("tuning") == "lora":
        parts.append(f"LoRA of rank {config['lora_rank']}")
    elif config:
        parts.append("full tuning")
    files = config.get("data", [])
    parts += [f"model {config['model']}"] if "model" in config else []
    parts += [f"data {' '.join(files) if isinstance(files, list) else files}"] if files else []
    return " · ".join(parts)


def _configuration(config: dict[str, Any]) -> str:
    table = _table([{"key": key, "value": str(value)} for key, value in config.items()])
    return table and f"<details><summary>{len(config)} values</summary>{table}</details>"


def _line(rows: Rows, key: str, scale: float = 1.0) -> Line:
    """Steps and scaled values of a metric; what is absent, null or no number is passed over."""
    points = [
        (row["step"], value * scale)
        for row in rows
        if is_number(value := row.get(key)) and math.isfinite(value)
    ]
    return [step for step, _ in points], [value for _, value in points]


@dataclass(frozen=True)
class _Curve:
    """The metrics that share a drawing, key -> label; `scale` brings their values to `unit`."""

    title: str
    unit: str
    keys: Mapping[str, str]
    scale: float = 1.0


_REWARD = _Curve("Reward", "score", {"reward": "training", "validation_reward": "held out"})
_KL = _Curve("KL to the anchor", "nats per answer", {"kl": "training", "validation_kl": "held out"})
_LOSS = _Curve("Loss", "nats", {"loss": "training", "validation_loss": "held out"})
_ACCURACY = _Curve(
    "Accuracy", "share right", {"accuracy": "training", "validation_accuracy": "held out"}
)
_AUC = _Curve(
    "Good and bad told apart, held out",
    "share",
    {"validation_auc": "AUC", "validation_balanced_accuracy": "balanced accuracy"},
)
_GAP = _Curve(
    "Good less bad scores, held out",
    "score",
    {"validation_gap": "mean", "validation_gap_std": "standard deviation"},
)
_ENTROPY = _Curve("Entropy", "nats per token", {"entropy": "training"})
_CURVES = (
    _REWARD,
    _Curve(
        "Spread of the reward",
        "score",
        {"reward_std": "between answers", "disagreement": "between reward models"},
    ),
    _KL,
    _LOSS,
    _Curve("Perplexity", "", {"validation_perplexity": "held out"}),
    _ACCURACY,
    _AUC,
    _GAP,
    _Curve("Calibration error, held out", "probability", {"validation_ece": "expected"}),
    _ENTROPY,
    _Curve("Answer length", "tokens", {"length": "training"}),
    _Curve("Value loss", "squared error", {"value_loss": "training"}),
    _Curve(
        "Gradient norm before clipping",
        "norm",
        {"grad_norm": "all", "policy_grad_norm": "policy", "value_grad_norm": "value"},
    ),
    _Curve(
        "Step time",
        "ms",
        {"step_s": "whole step", "rollout_s": "rollout", "score_s": "score", "learn_s": "learn"},
        1e3,
    ),
    _Curve("Padding", "share of the tokens computed", {"padding": "training"}),
    _Curve("Throughput", "tokens / s", {"tokens_per_s": "training"}),
    _Curve("Peak memory", "MB", {"peak_memory_bytes": "so far"}, 1e-6),
    _Curve(
        "Log-probability, sampled against learned",
        "nats",
        {"max_abs_dlogp": "largest gap", "mean_abs_dlogp": "mean gap"},
    ),
)
_COUNTS = {"step", "tokens", "learned_tokens"}  # the size of a batch is no figure of the training


def _curves(rows: Rows, kind: str) -> list[_Curve]:
    """The curves that the rows have values for; metrics unknown here come last, under their key."""
    if kind == "REINFORCE":  # its loss is −advantage · log p, which is no likelihood
        renamed = replace(_LOSS, title="Policy loss", unit="advantage × nats")
        curves = [renamed if curve is _LOSS else curve for curve in _CURVES]
    else:
        curves = list(_CURVES)
    known = {key for curve in curves for key in curve.keys} | _COUNTS
    others = dict.fromkeys(key for row in rows for key in row if key not in known)
    curves += [_Curve(key, "", {key: "training"}) for key in others]
    present = {
        curve.title: {key: label for key, label in curve.keys.items() if _line(rows, key)[0]}
        for curve in curves
    }
    return [replace(c, keys=present[c.title]) for c in curves if present[c.title]]


def _held_out(rows: Rows, config: dict[str, Any]) -> list[Reliability | Histogram]:
    """Of the validation that made the published checkpoint: the best, and the first of equals."""
    metric = config.get("best_metric")
    sign = -1 if metric == "loss" else 1
    validated = [row for row in rows if is_number(row.get(f"validation_{metric}"))]
    if not validated:
        return []
    best = max(validated, key=lambda row: sign * row[f"validation_{metric}"])
    counts = dict(best["validation_histogram"])
    return [
        Reliability(
            f"Reliability at step {best['step']:,}",
            "share that came true",
            **best["validation_reliability"],
        ),
        Histogram(f"Scores at step {best['step']:,}", "answers", counts.pop("edges"), counts),
    ]


def _figures(rows: Rows, curves: Sequence[_Curve]) -> list[dict[str, Any]]:
    """A row per metric: its first and last value, and the mean of the last tenth of its values."""
    table = []
    for curve in curves:
        for key, label in curve.keys.items():
            _, values = _line(rows, key, curve.scale)
            table.append({
                "": f"{curve.title}, {label}" if len(curve.keys) > 1 else curve.title,
                "unit": curve.unit,
                "first": values[0],
                "last": values[-1],
                "mean of the last tenth": statistics.fmean(values[-max(1, len(values) // 10) :]),
            })  # fmt: skip
    return table


def _role_memory(rows: Rows) -> list[dict[str, Any]]:
    """A row per role: what it alone holds, where the last step told it."""
    held = rows[-1].get("role_bytes", {}) if rows else {}
    kinds = ("weights", "gradients", "optimizer")
    return [
        {"role": role} | {f"{kind}, MB": parts.get(kind, 0) / 1e6 for kind in kinds}
        for role, parts in held.items()
    ]


# ---------------------------------------------------------------------------------------------
# What several arms say


def _arm_panels(arms: Mapping[str, Arm]) -> list[Panel]:
    """The arms' lines over each other, a panel for every figure of every phase."""
    panels = []
    for phase in dict.fromkeys(name for arm in arms.values() for name in arm.phases):
        rows = {
            label: _metrics(Path(arm.phases[phase].run)) if phase in arm.phases else []
            for label, arm in arms.items()
        }
        is_policy = any("reward" in row for logged in rows.values() for row in logged)
        first = (_REWARD, _KL, _ENTROPY) if is_policy else (_LOSS, _ACCURACY, _AUC)
        for curve in first:
            for key, what in curve.keys.items():
                lines = {label: _line(logged, key, curve.scale) for label, logged in rows.items()}
                if any(steps for steps, _ in lines.values()):
                    panels.append(Panel(f"{phase} · {curve.title}, {what}", curve.unit, lines))
    return panels


def _cost_bars(arms: Mapping[str, Arm]) -> list[Bars]:
    times: dict[str, dict[str, float]] = {label: {} for label in arms}
    peaks: dict[str, dict[str, float]] = {label: {} for label in arms}
    for label, arm in arms.items():
        for name, phase in arm.phases.items():
            given = {"step_ms": phase.step_ms, "peak_mb": phase.peak_mb}
            cost = phase_cost(phase.run) | {k: v for k, v in given.items() if v is not None}
            if "step_ms" in cost:
                times[label][name] = cost["step_ms"]
            if "peak_mb" in cost:
                peaks[label][name] = cost["peak_mb"]
    return [Bars("Step time", "ms, median", times), Bars("Peak memory", "MB", peaks)]


def _samples_of_arms(arms: Mapping[str, Arm]) -> list[Sample]:
    """The samples of all runs, those of one prompt together, under the names of their arms."""
    merged: dict[str, Sample] = {}
    for label, arm in arms.items():
        for phase in arm.phases.values():
            for sample in run_samples(phase.run):
                answers = {f"{label}, {step}": a for step, a in sample.answers.items()}
                key = json.dumps(sample.prompt)
                before = merged[key].answers if key in merged else {}
                merged[key] = Sample(sample.prompt, {**before, **answers})
    return list(merged.values())


# ---------------------------------------------------------------------------------------------
# What a comparison of two policies says


def _policies(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    first, second = figures["first"], figures["second"]
    units = {
        "reward": "reward, mean",
        "kl": "KL to the base, nats per answer",
        "length": "length, tokens",
        "ended": "ended, share",
    }
    return [
        {"": label, "first": first.get(key), "second": second.get(key)}
        for key, label in units.items()
        if key in first or key in second
    ]


def _opinions(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Histogram]:
    """What the judge thought in each order, and the rewards, where there are any."""
    orders = [[row["preference"][i] for row in rows] for i in (0, 1)]
    labels = ("shown first", "shown second") if orders[0] != orders[1] else ("in any order",)
    drawings = [
        _histogram("Judge", f"preference for the first ({names[0]})", labels, orders[: len(labels)])
    ]
    if "reward" in rows[0]["first"]:
        rewards = ([row[side]["reward"] for row in rows] for side in ("first", "second"))
        labels = (f"first: {names[0]}", f"second: {names[1]}")
        drawings.append(_histogram("Rewards", "reward", labels, rewards))
    return drawings


def _histogram(
    title: str, axis: str, labels: Sequence[str], values: Iterable[Sequence[float]]
) -> Histogram:
    values = list(values)
    edges = numpy.histogram_bin_edges([v for some in values for v in some], 24)
    counts = [numpy.histogram(some, edges)[0].tolist() for some in values]
    return Histogram(title, "prompts", edges, dict(zip(labels, counts, strict=True)), axis)


def _sample_of_verdict(names: Sequence[str], row: Mapping[str, Any]) -> Sample:
    answers = {}
    for side, name in zip(("first", "second"), names, strict=True):
        answer = row[side]
        facts = [f"{answer['tokens']} tokens" + ("" if answer.get("ended", True) else ", cut")]
        facts += [f"{key} {short(answer[key], 3)}" for key in ("reward", "kl") if key in answer]
        answers[f"{side}: {name}"] = Answer(answer["completion"].strip(), " · ".join(facts))
    said = {"first": "The first wins.", "second": "The second wins.", "tie": "A tie."}
    shown, turned = (f"{preference:+.3g}" for preference in row["preference"])
    orders = f"Preference for the first: {shown} shown first, {turned} shown second."
    return Sample(row["prompt"], answers, f"{said[row['verdict']]} {orders}")


# ---------------------------------------------------------------------------------------------
# The page


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of dicts: heads are the keys of the first, numbers stand on the right."""
    if not rows:
        return ""
    heads = list(rows[0])
    head = "".join(
        f'<th scope="col"{_NUMBER if is_number(rows[0][name]) else ""}>{shown(name)}</th>'
        for name in heads
    )
    body = "".join(
        "<tr>"
        + f'<th scope="row">{shown(short(row.get(heads[0])))}</th>'
        + "".join(_cell(row.get(name)) for name in heads[1:])
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _cell(value: Any) -> str:
    return f"<td{_NUMBER if value is None or is_number(value) else ''}>{shown(short(value))}</td>"


_NUMBER = ' class="number"'


def _samples(samples: Sequence[Sample]) -> str:
    return "".join(
        f'<article><pre class="prompt">{shown(_prompt(sample.prompt))}</pre>'
        + (f"<p>{shown(sample.note)}</p>" if sample.note else "")
        + '<div class="answers">'
        + "".join(
            f"<div><h3>{shown(label)} <small>{shown(answer.note)}</small></h3>"
            f"<pre>{shown(answer.text)}</pre></div>"
            for label, answer in sample.answers.items()
        )
        + "</div></article>"
        for sample in samples
    )


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _write(
    path: Path, title: str, notes: Sequence[str], sections: Sequence[tuple[str, str]]
) -> Path:
    """The page; sections without contents are left out."""
    parts = [f"<h1>{shown(title)}</h1>"]
    parts += [f"<p>{shown(note)}</p>" for note in notes]
    parts += [f"<section><h2>{head}</h2>{body}</section>" for head, body in sections if body]
    light, dark = colours()
    page = _PAGE.format(title=shown(title), light=light, dark=dark, css=_CSS, body="\n".join(parts))
    path.write_text(page, encoding="utf-8")
    return path


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ {light} --page: #ffffff; --card: #f6f8fa; --rule: #d8dee4; }}
@media (prefers-color-scheme: dark) {{
  :root {{ {dark} --page: #12161c; --card: #1b212a; --rule: #333c47; }}
}}
{css}
</style>
</head>
<body>
{body}
</body>
</html>
"""

_CSS = """body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page);
  color: var(--c0); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.75rem; }
h3 { font-size: 0.9rem; margin: 0 0 0.25rem; }
summary { cursor: pointer; margin-bottom: 0.5rem; }
small { font-weight: normal; margin-left: 0.5em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; overflow-wrap: normal; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; text-align: left; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
tbody th { font-weight: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.drawings { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
svg { width: 100%; max-width: 34rem; height: auto; }
article { background: var(--card); border-radius: 6px; padding: 0.75rem 1rem; margin: 0 0 1rem; }
.answers { display: grid; gap: 0.75rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); }
pre { margin: 0; white-space: pre-wrap; font: 0.85rem/1.45 ui-monospace, monospace; }
.prompt { margin-bottom: 0.75rem; padding-bottom: 0.75rem; border-bottom: 1px solid var(--rule); }
"""
