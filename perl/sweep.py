"""A sweep: a training command over values of its flags, and which values were best.

    python -m perl reward ... --sweep lr=1e-4,3e-4,1e-3 lora_rank=4,16 --out FOLDER

    FOLDER/lr=0.0001,lora_rank=4/    the run folder of each combination
    FOLDER/sweep.json                the command, its flags, and the figures of the runs so far

The runs are the command without --sweep, one process after another. A run's score is what its
trainer keeps the best checkpoint by (--best-metric of a reward model, minus the loss of SFT), and
the mean reward of a policy, all on the held-out rows. A run that stops because its loss is not
finite has no score, and the sweep goes on. With --resume finished runs stay as they are, and values
may be added.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

from perl import config as cfg
from perl.commands import start, training, write_json
from perl.config import TrainConfig, UsageError
from perl.files import is_taken
from perl.report import phase_cost, text_table
from perl.run import Interrupted, NonFiniteLoss, Run


def run(command: str, cls: type, flags: dict[str, Any]) -> dict[str, Any]:
    """Runs every combination that is not done yet, prints the table, and returns the figures.

    Args:
        command: sft, reward or reinforce; `cls` is its config.
        flags: those given, `sweep` among them.

    Raises:
        UsageError: for values that the command would refuse, before anything runs; a run failed.
    """
    axes, resume = flags.pop("sweep"), flags.pop("resume", False)
    if config_file := flags.pop("config", None):
        flags = cfg.read_toml(config_file, cls) | flags
    if not flags.get("out"):
        raise UsageError("--sweep wants --out, the folder of its runs")
    out = Path(flags.pop("out"))
    points = combinations(cls, axes)
    configs = {
        name: cfg.make(cls, flags | values | {"out": str(out / name)})
        for name, values in points.items()
    }
    if any(config.validation is None for config in configs.values()):
        raise UsageError("--sweep tells the best by held-out rows; give --validation FILE")
    sweep = _begin(out, resume, {"command": command, "flags": flags})

    for number, (name, values) in enumerate(points.items(), 1):
        if name not in sweep["runs"]:
            print(f"run {number} of {len(points)}: {name}", file=sys.stderr)
            finished = _train(training(command, out=out / name, **flags | values), name)
            sweep["runs"][name] = values | (figures(configs[name]) if finished else {})
            write_json(out / "sweep.json", sweep)
    print(text_table([_row(name, sweep["runs"][name]) for name in points]), file=sys.stderr)
    scored = {name: sweep["runs"][name] for name in points if "score" in sweep["runs"][name]}
    if not scored:
        raise UsageError("no run of the sweep reached a finite loss; give lower learning rates")
    best = max(scored, key=lambda name: scored[name]["score"])
    print(f"best: {best}, score {scored[best]['score']:.4f}", file=sys.stderr)
    return {"best": str(out / best), **scored[best], "runs": sweep["runs"]}


def combinations(cls: type, axes: list[str]) -> dict[str, dict[str, Any]]:
    """Folder name -> values, for `NAME=VALUE,VALUE` axes, the last one fastest."""
    hints, choices = typing.get_type_hints(cls), []
    for axis in axes:
        name, equals, texts = axis.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in hints or name in ("out", "resume"):
            raise UsageError(
                f"--sweep is {axis!r}; want FLAG=VALUE,VALUE such as lr=1e-4,3e-4 or lora_rank=4,16"
            )
        choices.append([(name, _value(hints[name], name, text)) for text in texts.split(",")])
    points = [dict(point) for point in itertools.product(*choices)]
    named = {_name(point): point for point in points}
    if len(named) < len(points) or any(len(point) < len(axes) for point in points):
        raise UsageError(f"--sweep {' '.join(axes)} names a flag or a value twice")
    return named


def figures(config: TrainConfig) -> dict[str, Any]:
    """Score, step and held-out figures of a finished run's result; its cost in ms and MB."""
    run = Run(Path(config.out), config)
    best = run.best_checkpoint()
    held_out = {k: v for k, v in run.metrics_at(best.step).items() if k.startswith("validation_")}
    score = best.state["score"]
    if score is None:
        score = held_out["validation_reward"]
    return {"score": score, "step": best.step} | held_out | phase_cost(run.folder)


def _begin(out: Path, resume: bool, sweep: dict[str, Any]) -> dict[str, Any]:
    """The sweep's record: a new one, or that of the folder with its finished runs."""
    path = out / "sweep.json"
    if not resume:
        if is_taken(out):
            go_on = " or --resume to go on with it" if path.is_file() else ""
            raise UsageError(f"--out {out} exists and is not empty; give another folder{go_on}")
        out.mkdir(parents=True, exist_ok=True)
        sweep["runs"] = {}
        write_json(path, sweep)
        return sweep
    if not path.is_file():
        raise UsageError(f"--out {out} holds no sweep.json; leave --resume out to start a sweep")
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(before["flags"].keys() | sweep["flags"].keys()):
        old, new = before["flags"].get(name), sweep["flags"].get(name)
        if old != new:
            raise UsageError(
                f"{cfg.flag(name)} is {new!r} but the sweep was started with {old!r}; give it so"
            )
    return before


def _train(line: list[str], name: str) -> bool:
    """Whether the run came to its end; False where its loss was not finite."""
    process = start(line, stdout=subprocess.DEVNULL)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal has told the run too: it finishes a step and keeps it
        process.wait()
        code = Interrupted.exit_code
    if code == Interrupted.exit_code:
        raise Interrupted("the sweep goes on with the same command and --resume")
    if code not in (0, NonFiniteLoss.exit_code):
        raise UsageError(f"the run {name} ended with exit code {code}; what it said is above")
    return code == 0


def _row(name: str, figures: dict[str, Any]) -> dict[str, str]:
    shown = {"run": name, "score": "–", "step": "–", "step, ms": "–", "peak, MB": "–"}
    if "score" in figures:
        shown |= {"score": f"{figures['score']:.4f}", "step": str(figures["step"])}
        shown |= {"step, ms": f"{figures['step_ms']:.0f}", "peak, MB": f"{figures['peak_mb']:.0f}"}
    return shown


def _name(values: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items()).replace("/", "_")


def _value(hint: Any, name: str, text: str) -> Any:
    """A flag's value from its text. Ranges and choices are the config's to check."""
    kind, _, _ = cfg.kind_of(hint)
    if typing.get_origin(kind) is list:
        raise UsageError(f"--sweep takes one value at a time, and {cfg.flag(name)} is a list")
    try:
        return {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise UsageError(f"--sweep: {text!r} is no value of {cfg.flag(name)}") from None
