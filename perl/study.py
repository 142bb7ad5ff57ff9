"""What the studies share: tasks, models, jobs, and the record of what is done.

    bases     Llamas for the embedded world and for real rows, tuned by SFT in full
    sweeps    the learning rates of LoRA and of full tuning, each at one size of each task
    cells     task x size x (rank or full) x seed: what is learned, told on held-out rows
    cost      task x size x (rank or full), one run at a time: step time and peak memory; the same
              of random Llamas too large to train here

Each is a `perl` command in a process of its own. FOLDER/study.json is written anew after every one
and is all that is told from; a model is thrown away once its figures are there.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from perl import cafe
from perl.commands import run_all, training, write_json
from perl.config import (
    RewardConfig,
    StudyConfig,
    UsageError,
    make,
    refuse_unused,
    write_toml,
)
from perl.drawings import Bars, Drawing, write_figure
from perl.files import is_taken
from perl.report import markdown_table, phase_cost
from perl.run import Interrupted
from perl.sweep import figures

Row = dict[str, str]


# ---------------------------------------------------------------------------- what is studied


@dataclass(frozen=True)
class Family:
    """Models of several sizes, smallest first, and the SFT commands that each goes through."""

    name: str
    sizes: tuple[str, ...]
    chosen: str  # the size at which learning rates are searched and bars are set
    warm_up: tuple[dict[str, Any], ...]
    real: bool = False  # made of a real model, which the data folder holds


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to learn from. Paths that start with data/ are of the data folder, others of the study.

    A study adds what its trainer learns for.
    """

    name: str
    title: str
    family: Family
    data: str
    validation: str
    recipe: dict[str, Any]  # flags of every cell
    sweep: dict[str, str]  # tuning -> learning rates to choose from
    seeds: tuple[int, ...]  # of each size
    seconds: tuple[float, ...]  # a cell's at each size, for the progress bar

    def seeds_of(self, size: str) -> int:
        return self.seeds[self.family.sizes.index(size)]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A random Llama (a size of `cafe.SHAPES`) whose time and memory alone are told."""

    size: str
    vocabulary: int
    tokens: int  # of a sequence
    dtype: str
    steps: int
    seconds: float
    bars: tuple[float, float] | None = None  # step time and peak memory over full tuning's


@dataclass(frozen=True, kw_only=True)
class Preset:
    tasks: tuple[Any, ...] = ()
    shapes: tuple[Any, ...] = ()
    ranks: tuple[int, ...]
    cost_steps: int = 6  # of a cell of the tasks

    @property
    def arms(self) -> tuple[str, ...]:
        return ("full", *(f"rank {rank}" for rank in reversed(self.ranks)))

    @property
    def swept_arms(self) -> dict[str, str]:
        """tuning -> the arm at which its learning rate is searched."""
        return {"full": "full", "lora": f"rank {16 if 16 in self.ranks else max(self.ranks)}"}


CAFE = Family(
    "cafe",
    ("mini", "tiny", "small"),
    "tiny",
    (
        dict(data="cafe/general.jsonl", steps=360, batch_size=48, lr=4e-3),
        dict(data="cafe/sft.jsonl", steps=120, batch_size=16, lr=1e-3),
    ),
)
CUT = dict(max_tokens=256, truncate_prompts=True, drop_long=True)
COFFEE = Family(
    "coffee",
    ("2 layers", "3 layers", "5 layers"),  # of stories260k, which has 5
    "5 layers",
    (
        dict(
            data="data/sft/taskmaster_coffee_steps.train.jsonl",
            steps=200, batch_size=16, lr=2e-3, **CUT,
        ),
    ),
    real=True,
)  # fmt: skip
FEW = dict(general=500, demonstrations=100, pairs=300, prompts=1)  # rows enough to tell the time


def in_few_steps(task: Any, sizes: int, **few: Any) -> Any:
    """The task in a few steps, at its largest sizes; few: flags of every cell."""
    warm_up = tuple(sft | dict(steps=2, batch_size=2) for sft in task.family.warm_up)
    return replace(
        task,
        family=replace(task.family, sizes=task.family.sizes[-sizes:], warm_up=warm_up),
        recipe=task.recipe | few,
        sweep=dict.fromkeys(task.sweep, "1e-3"),
        seeds=(1,) * sizes,
    )


# ------------------------------------------------------------------------------- the commands


@dataclass(frozen=True)
class Job:
    """A command; `name` is its folder below the study's."""

    name: str
    command: str
    flags: dict[str, Any]
    seconds: float
    lr_of: str = ""  # the sweep that tells its learning rate
    keeps: str = ""  # the folder of its model, where later jobs start from it


class Study(ABC):
    """The plan of a preset, what of it is done, and what is told from that."""

    presets: ClassVar[Mapping[str, Preset]]
    trainer: ClassVar[str]  # the command of sweeps, cells and costs

    def __init__(self, config: StudyConfig, record: dict[str, Any] | None = None):
        """record: what study.json has, to tell of that alone, wherever the data and models are."""
        self.config, self.out = config, Path(config.out).resolve()
        if config.preset not in self.presets:
            raise UsageError(
                f"perl study {config.task} has no --preset {config.preset}; it has "
                f"{', '.join(self.presets)}"
            )
        self.preset = self.presets[config.preset]
        if record is not None:
            self.record = record
            return
        if not self.preset.tasks:
            what_for = f"presets that tell of quality, and {config.preset} does of cost alone"
            refuse_unused(config, ["data_folder", "at_once", "cost"], what_for)
        self.data_folder = _data_folder(config)
        if is_taken(self.out) and not config.resume:
            raise UsageError(
                f"--out {self.out} exists and is not empty; give another folder, or --resume "
                "to go on with the study in it"
            )
        real = [task for task in self.preset.tasks if task.family.real]
        if real and self.data_folder is None:
            print(
                "no real preferences: there is no $PERL_SHARED and no shared/ beside the checkout, "
                "so the study is of the embedded world alone",
                file=sys.stderr,
            )
            others = tuple(task for task in self.preset.tasks if task not in real)
            self.preset = replace(self.preset, tasks=others)
        self.record: dict[str, Any] = {"preset": config.preset, "parameters": {}, "jobs": {}}
        if (self.out / "study.json").is_file():
            self.record = json.loads((self.out / "study.json").read_text(encoding="utf-8"))
        self.record["machine"] = _machine(config.device)

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        """Name -> figures of what is done."""
        return self.record["jobs"]

    def run(self) -> None:
        """Does what is not done yet, prints the tables; study.json, table.md and figure.svg."""
        try:
            self.perform()
        except KeyboardInterrupt:
            later, out = "" if self.config.cost else " --no-cost", shlex.quote(str(self.out))
            raise Interrupted(
                f"go on with: python -m perl study {self.config.task} --out {out} --resume{later}"
            ) from None
        print(self.text())
        if drawings := self.drawings():
            try:
                write_figure(self.out / "figure.svg", drawings)
            except UsageError as error:  # the tables are there, and an hour's work
                print(f"no figure.svg: {error}, then --resume draws it", file=sys.stderr)

    def perform(self) -> None:
        """Runs every job that is not done, the order being that of the module's description."""
        self.out.mkdir(parents=True, exist_ok=True)
        # with --no-cost too: a later --resume is to measure it
        write_toml(replace(self.config, cost=True), self.out / "config.toml")
        self.make_models()
        stages = [(list(stage), self.config.at_once, 1) for stage in self.learning()]
        if self.config.cost:
            stages.append((list(self.costs()), 1, self.config.threads))
        todo = [job for jobs, _, _ in stages for job in jobs]
        with tqdm(
            total=sum(job.seconds for job in todo),
            initial=sum(job.seconds for job in todo if job.name in self.jobs),
            desc="study",
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}",
            file=sys.stderr,
            dynamic_ncols=True,
        ) as bar:
            for jobs, at_once, threads in stages:
                waiting = {job.name: job for job in jobs if job.name not in self.jobs}

                def done(name: str, waiting: dict[str, Job] = waiting) -> None:
                    self.jobs[name] = self.figures(waiting[name])
                    self.save()
                    self.throw_away(waiting[name])
                    bar.set_postfix_str(name, refresh=False)
                    bar.update(waiting[name].seconds)

                lines = {name: self.line(job, threads) for name, job in waiting.items()}
                run_all(lines, self.out / "logs", at_once=at_once, done=done)

    def line(self, job: Job, threads: int) -> list[str]:
        flags = job.flags | {"threads": threads, "device": self.config.device}
        if job.lr_of:
            flags["lr"] = self.jobs[job.lr_of]["lr"]
        return training(job.command, out=self.out / job.name, **flags)

    def figures(self, job: Job) -> dict[str, Any]:
        """What a finished job has to tell; a sweep of its best run, and of every one."""
        where = self.out / job.name
        if "sweep" in job.flags:
            runs = json.loads((where / "sweep.json").read_text(encoding="utf-8"))["runs"]
            finite = [run for run in runs.values() if "score" in run]
            return max(finite, key=lambda run: self.score(job, run)) | {"runs": runs}
        if job.command == "reward" and "validation" in job.flags:
            return figures(make(RewardConfig, job.flags | {"out": str(where)}))
        return phase_cost(where)

    def score(self, job: Job, run: dict[str, Any]) -> float:
        """What a sweep chooses the learning rate by."""
        return run["score"]

    def throw_away(self, job: Job) -> None:
        """Models and checkpoints that nothing will start from; metrics and configurations stay."""
        for name in {"checkpoints", "reward", "policy"} - {job.keeps}:
            for path in list((self.out / job.name).rglob(name)):
                shutil.rmtree(path)

    def save(self) -> None:
        write_json(self.out / "study.json", self.record)
        (self.out / "table.md").write_text(self.text(), encoding="utf-8")

    # ------------------------------------------------------------------------------- the plan

    @property
    def families(self) -> list[Family]:
        return list({task.family.name: task.family for task in self.preset.tasks}.values())

    @abstractmethod
    def learning(self) -> Iterator[Iterator[Job]]:
        """Stages of jobs whose quality is told; those of a stage do not wait for each other."""

    @abstractmethod
    def costs(self) -> Iterator[Job]:
        """Jobs whose time and memory are told."""

    def warm_ups(self) -> Iterator[Iterator[Job]]:
        rounds = max((len(family.warm_up) for family in self.families), default=0)
        for number in range(rounds):
            yield (
                self.warm_up(family, size, number)
                for family in self.families
                if number < len(family.warm_up)
                for size in family.sizes
            )

    def warm_up(self, family: Family, size: str, number: int) -> Job:
        sft = family.warm_up[number]
        flags = dict(
            model=self.base(family, size, number), tuning="full", lr_schedule="cosine",
            checkpoint_every=10**6, **sft | {"data": self.path(sft["data"])},
        )  # fmt: skip
        return Job(folder("bases", family.name, size, number), "sft", flags, 30.0, keeps="policy")

    def sweeps(self) -> Iterator[Job]:
        for task in self.preset.tasks:
            for tuning in self.preset.swept_arms:
                yield self.sweep(task, tuning)

    def sweep(self, task: Task, tuning: str) -> Job:
        flags = self.flags(task, task.family.chosen, self.preset.swept_arms[tuning])
        flags["sweep"] = f"lr={task.sweep[tuning]}"
        runs = task.sweep[tuning].count(",") + 1
        seconds = runs * task.seconds[task.family.sizes.index(task.family.chosen)]
        return Job(folder("sweeps", task.name, tuning), self.trainer, flags, seconds)

    def cells(self) -> Iterator[Iterator[Job]]:
        """All of one seed before the next: a study that is stopped has whole tables."""
        for seed in range(max((n for task in self.preset.tasks for n in task.seeds), default=0)):
            yield (
                self.cell(task, size, arm, seed)
                for task in self.preset.tasks
                for size in task.family.sizes
                if seed < task.seeds_of(size)
                for arm in self.preset.arms
                if self.cell_name(task, size, arm, seed).startswith("cells")
            )

    def cell(self, task: Task, size: str, arm: str, seed: int) -> Job:
        tuning = "full" if arm == "full" else "lora"
        return Job(
            self.cell_name(task, size, arm, seed),
            self.trainer,
            self.flags(task, size, arm) | {"seed": seed},
            task.seconds[task.family.sizes.index(size)],
            lr_of=folder("sweeps", task.name, tuning),
        )

    def cell_name(self, task: Task, size: str, arm: str, seed: int) -> str:
        """The job that tells of a cell."""
        return folder("cells", task.name, size, arm, f"seed {seed}")

    def task_costs(self) -> Iterator[Job]:
        """A few steps of cells: every arm at the chosen size, the swept ones at the others."""
        for task in self.preset.tasks:
            for size in task.family.sizes:
                for arm in self.preset.arms:
                    if size != task.family.chosen and arm not in self.preset.swept_arms.values():
                        continue
                    flags = self.flags(task, size, arm) | {"steps": self.preset.cost_steps}
                    del flags["validation"]
                    yield Job(folder("cost", task.name, size, arm), self.trainer, flags, 8.0)

    def flags(self, task: Task, size: str, arm: str) -> dict[str, Any]:
        return dict(
            model=self.base(task.family, size, len(task.family.warm_up)),
            data=self.path(task.data), validation=self.path(task.validation),
            checkpoint_every=10**6, **task.recipe, **arm_flags(arm),
        )  # fmt: skip

    def base(self, family: Family, size: str, number: int) -> str:
        """The model of a family after `number` of its SFT commands."""
        if number == 0:
            return str(self.out / folder("models", family.name, size))
        return str(self.out / folder("bases", family.name, size, number - 1))

    def path(self, name: str) -> str:
        return str((self.data_folder if name.startswith("data/") else self.out) / name)

    def make_models(self) -> None:
        """The embedded world and the models of all sizes, where they are not there yet."""
        import torch
        from transformers import AutoTokenizer

        parameters = self.record["parameters"]
        wanted = {folder(family.name, size) for family in self.families for size in family.sizes}
        if wanted | {shape.size for shape in self.preset.shapes} <= parameters.keys():
            return
        world = cafe.build_world(**({} if self.families else FEW))
        cafe.write_world(self.out / "cafe", world)
        tokenizer = AutoTokenizer.from_pretrained(self.out / "cafe/init")

        def keep(name: str, model: Any, tokenizer: Any) -> None:
            model.save_pretrained(self.out / "models" / name)
            tokenizer.save_pretrained(self.out / "models" / name)
            parameters[name] = model.num_parameters()

        for family in self.families:
            for size in family.sizes:
                name = folder(family.name, size)
                if name not in parameters and family.real:
                    keep(name, *_stories(self.data_folder, size))
                elif name not in parameters:
                    keep(name, cafe.build_model(len(tokenizer), size), tokenizer)
        for shape in self.preset.shapes:
            if shape.size not in parameters:
                _write_long_pairs(self.pairs_of(shape), world, shape.tokens)
                model = cafe.build_model(
                    shape.vocabulary, shape.size, max_position_embeddings=shape.tokens
                )
                keep(shape.size, model.to(getattr(torch, shape.dtype)), tokenizer)
        self.save()

    def pairs_of(self, shape: Shape) -> Path:
        """Pairs that are longer than the shape's sequences."""
        return self.out / f"cafe/pairs-{shape.size}.jsonl"

    # ---------------------------------------------------------------------------- what is told

    def text(self) -> str:
        """The tables of what is done so far, in Markdown."""
        machine = " · ".join(self.record["machine"].values())
        parts = [f"`perl study {self.config.task} --preset {self.config.preset}` · {machine}"]
        for title, rows in self.tables():
            if rows:
                parts += [f"**{title}**", markdown_table(rows)]
        return "\n\n".join(parts) + "\n"

    @abstractmethod
    def tables(self) -> Iterator[tuple[str, list[Row]]]:
        """Titles and rows of what is done so far."""

    @abstractmethod
    def drawings(self) -> list[Drawing]:
        """The panels of figure.svg; none where there is nothing to draw yet."""

    def cost_rows(self, columns: dict[str, str]) -> list[Row]:
        """A row for each arm; `columns` is the folder under cost/ -> its head."""
        rows = []
        for arm in self.preset.arms:
            row = {"": arm}
            for name, head in columns.items():
                step = peak = "–"
                if ratio := self.over_full(name, arm):
                    cost = self.jobs[folder("cost", name, arm)]
                    step = f"{cost['step_ms']:.3g} ms ({ratio['step_ms']:.2f})"
                    peak = f"{cost['peak_mb']:,.0f} MB ({ratio['peak_mb']:.2f})"
                row |= {f"{head}: step": step, f"{head}: peak": peak}
            rows.append(row)
        return rows if any(set(row.values()) - {row[""], "–"} for row in rows) else []

    def over_full(self, name: str, arm: str) -> dict[str, float]:
        """Step time and peak memory over full tuning's; empty where one is not measured."""
        ours, full = (self.jobs.get(folder("cost", name, which)) for which in (arm, "full"))
        return {key: ours[key] / full[key] for key in full} if ours and full else {}

    def cost_bars(self) -> Iterator[Row]:
        """What the shapes are to show, with what was found."""
        for shape in self.preset.shapes:
            ratio = self.over_full(shape.size, self.preset.swept_arms["lora"])
            if shape.bars and ratio:
                time, memory = shape.bars
                yield bar(f"{shape.size}: step time over full", ratio["step_ms"], "<=", time)
                yield bar(f"{shape.size}: peak memory over full", ratio["peak_mb"], "<=", memory)

    def cost_drawings(self) -> Iterator[Drawing]:
        folders = {folder(task.name, task.family.chosen): task.name for task in self.preset.tasks}
        folders |= {shape.size: shape.size for shape in self.preset.shapes}
        for key, title in (("step_ms", "Step time"), ("peak_mb", "Peak memory")):
            values = {
                name: {
                    arm: ratio[key]
                    for arm in reversed(self.preset.arms[1:])
                    if (ratio := self.over_full(where, arm))
                }
                for where, name in folders.items()
            }
            values = {name: groups for name, groups in values.items() if groups}
            if values:
                yield Bars(title, "over full tuning's", values)

    def by_rank(self, found: Mapping[str, list[float]]) -> dict[str, list[float]]:
        """The figures of each arm that has some, smallest rank first."""
        arms = {arm.removeprefix("rank "): found[arm] for arm in reversed(self.preset.arms)}
        return {arm: values for arm, values in arms.items() if values}

    def head(self, model: str) -> str:
        return f"{self.record['parameters'][model] / 1e6:.3g} M"


def folder(*parts: str | int) -> str:
    return "/".join(map(str, parts)).replace(" ", "-")


def arm_flags(arm: str) -> dict[str, Any]:
    if arm == "full":
        return {"tuning": "full"}
    return {"tuning": "lora", "lora_rank": int(arm.removeprefix("rank "))}


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and deviation, as text."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "–"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def bar(what: str, value: float, sense: str, wanted: float) -> Row:
    met = value >= wanted if sense == ">=" else value <= wanted
    sign = {">=": "≥", "<=": "≤"}[sense]
    return {
        "": what,
        "wanted": f"{sign} {wanted}",
        "found": f"{value:.3f}",
        "met": "met" if met else "missed",
    }


def _data_folder(config: StudyConfig) -> Path | None:
    """The folder of real rows and models; None where none is named and none is at hand."""
    named = config.data_folder or os.environ.get("PERL_SHARED")
    shared = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if all((shared / name).is_dir() for name in ("data", "models")):
        return shared.resolve()
    if config.data_folder:
        raise UsageError(
            f"--data-folder {config.data_folder} has no data/ and models/; give one that has"
        )
    return None


def _machine(device: str) -> dict[str, str]:
    import torch

    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = named[0] if named else cpu
    found = {"processor": f"{cpu}, {os.cpu_count()} cores"}
    if device != "cpu" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"torch": f"torch {torch.__version__}"}


def _stories(data_folder: Path, size: str) -> tuple[Any, Any]:
    """stories260k with fewer layers, evenly taken, or with each several times; its tokenizer."""
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = data_folder / "models/stories260k"
    model = AutoModelForCausalLM.from_pretrained(source)
    layers, count = model.model.layers, int(size.partition(" ")[0])
    taken = [copy.deepcopy(layers[i * len(layers) // count]) for i in range(count)]
    model.model.layers, model.config.num_hidden_layers = nn.ModuleList(taken), count
    return model, AutoTokenizer.from_pretrained(source)


def _write_long_pairs(path: Path, world: cafe.World, tokens: int) -> None:
    """Pairs whose prompts are longer than `tokens` tokens, of as many dialogs as that takes."""
    texts = itertools.cycle(row["prompt"] + row["chosen"] + "\n" for row in world.pairs)
    with path.open("w", encoding="utf-8") as file:
        for pair in world.pairs[:256]:
            said = ""
            while len(said) < 8 * tokens:  # characters, of which a token has fewer
                said += next(texts)
            file.write(json.dumps(pair | {"prompt": said + pair["prompt"]}) + "\n")
