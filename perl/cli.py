"""The command line: one subcommand per config dataclass, one flag per field.

Exit codes: 0 done · 2 bad input (one line on stderr, nothing written) · 3 stopped on a loss that
is not finite, or a policy that diverges · 4 stopped by a source of rewards or verdicts that failed,
or by a full disk, with what was done kept · 130 stopped by Ctrl-C, likewise. torch and transformers
are imported only after the arguments are parsed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import os
import sys
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from perl import config as cfg
from perl.config import UsageError
from perl.disk import disk_trouble

# command -> (config, function that does the work, one line of help)
COMMANDS = {
    "demo": (cfg.DemoConfig, "perl.demo:run", "the whole path on the embedded world"),
    "sft": (cfg.SftConfig, "perl.train_sft:train", "supervised fine-tuning"),
    "reward": (cfg.RewardConfig, "perl.train_reward:train", "train a reward model"),
    "reinforce": (cfg.ReinforceConfig, "perl.train_policy:train", "train a policy by REINFORCE"),
    "evaluate": (cfg.EvaluateConfig, "perl.evaluate:evaluate", "held-out figures of a model"),
    "compare": (cfg.CompareConfig, "perl.compare:compare", "which of two policies answers better"),
    "generate": (cfg.GenerateConfig, "perl.evaluate:generate", "answers for prompts"),
    "score": (cfg.ScoreConfig, "perl.score:score", "a reward model's scores of a file's answers"),
    "export": (cfg.ExportConfig, "perl.export:export", "a trained model for transformers or PEFT"),
    "average": (cfg.AverageConfig, "perl.export:average", "one model from several runs' weights"),
    "data": (cfg.DataConfig, "perl.evaluate:describe", "what a data file holds"),
    "study": (cfg.StudyConfig, "perl.studies:run", "LoRA ranks beside full tuning, in tables"),
    "plan": (cfg.PlanConfig, "perl.plan:run", "memory and time of a training before it runs"),
    "bench": (cfg.BenchConfig, "perl.bench:bench", "run the benchmarks of a checkout"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Flags that are not given stay out of the namespace."""
    parser = _Parser(
        prog="python -m perl",
        description="RLHF with LoRA: SFT, reward model, "
        "REINFORCE. `COMMAND --help` lists a command's flags. The "
        "result of a command is one JSON object on stdout; progress goes to stderr.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (cls, _, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=cls.__doc__)
        command.add_argument(
            "--config",
            metavar="FILE.toml",
            default=argparse.SUPPRESS,
            help="values for any of these flags; flags win over the file",
        )
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            _add_flag(command, field, hints[field.name])
        if issubclass(cls, cfg.TrainConfig):
            command.add_argument(
                "--sweep",
                nargs="+",
                metavar="FLAG=VALUE,VALUE",
                default=argparse.SUPPRESS,
                help="a run for every combination of these values (lr=1e-4,3e-4 lora_rank=4,16), "
                "one after another in folders of --out; which was best on --validation",
            )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a table's bars, where the terminal has none
        sys.stdout.reconfigure(errors="backslashreplace")
    config = None
    try:
        flags = vars(build_parser().parse_args(argv))
        name = flags.pop("command")
        cls, target, _ = COMMANDS[name]
        several = "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
        if several and ("sweep" in flags or not issubclass(cls, cfg.TrainConfig)):
            what = "--sweep" if "sweep" in flags else name
            raise UsageError(f"torchrun is for one training; run {what} by `python -m perl {name}`")
        if "sweep" in flags:
            from perl import sweep

            print(json.dumps(sweep.run(name, cls, flags)))
            return 0
        config = cfg.load(cls, flags, config_file=flags.pop("config", None))
        module, function = target.split(":")
        result = getattr(importlib.import_module(module), function)(config)
        if os.environ.get("RANK", "0") == "0":
            if isinstance(result, dict):
                print(json.dumps(result))
            _report(config)
    except UsageError as error:
        if _speaks():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except cfg.Stopped as stop:
        if _speaks():
            _report(config)
            print(f"stopped: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        if _speaks():
            print("stopped: Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        trouble = disk_trouble(error)
        if _speaks():
            if trouble is None:
                raise
            print(f"error: {trouble}", file=sys.stderr)
        return 1 if trouble is None else 2
    return 0


def _speaks() -> bool:
    """Whether this process says why it stops: alone, or the first of torchrun's to fail."""
    if "LOCAL_RANK" not in os.environ:
        return True
    from perl import distributed

    return distributed.first_to_fail()


def _report(config: cfg.Config | None) -> None:
    """report.html of a training, also of one that was stopped; quiet for what is none."""
    if isinstance(config, cfg.TrainConfig):
        from perl.report import try_run_report

        try_run_report(config.out)


def _add_flag(command: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    kind, _, choices = cfg.kind_of(hint)
    text = field.metadata["help"].replace("%", "%%")
    notes = [f"in {field.metadata['unit']}"] if field.metadata["unit"] else []
    if field.default_factory is not dataclasses.MISSING:
        notes.append("default " + " ".join(field.default_factory()))
    elif field.default is dataclasses.MISSING:
        notes.append("required")
    elif field.default is not None:
        notes.append(f"default {str(field.default).lower() if kind is bool else field.default}")
    text += f" ({', '.join(notes)})" if notes else ""
    if field.metadata["positional"]:
        many = {"nargs": "+"} if kind == list[str] else {}
        if field.default is not dataclasses.MISSING:
            many = {"nargs": "?", "default": argparse.SUPPRESS}
        command.add_argument(field.name, metavar=field.name.upper(), help=text, **many)
        return
    settings: dict[str, Any] = dict(dest=field.name, default=argparse.SUPPRESS, help=text)
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        metavar = field.metadata["metavar"] if item is str else _METAVARS[item]
        settings.update(nargs="+", type=item, metavar=metavar)
    else:
        settings["type"] = kind
        settings["metavar"] = "|".join(choices) if choices else _METAVARS[kind]
    command.add_argument(cfg.flag(field.name), **settings)


_METAVARS = {str: "TEXT", int: "N", float: "X"}
