"""The study of reward models, LoRA of several ranks beside full tuning: `python -m perl study`.

    python -m perl study reward --out FOLDER               preset cpu: an hour on two cores
    python -m perl study reward --out FOLDER --resume      goes on after a kill

Tables 1 and 2 of arXiv 2403.10704, for reward models, on rows and machines of one's own:

    bases     Llamas of three sizes for the embedded world and for real rows, tuned by SFT in full
    sweeps    the learning rates of LoRA and of full tuning, each at one size of each task
    cells     task x size x (rank or full) x seed: accuracy or AUC on the held-out rows
    cost      task x (size at rank 16 and full; every rank at one size), one run at a time: step
              time and peak memory; the same at every rank of random Llamas too large to train here

Each is a `perl` command in a process of its own. FOLDER/study.json is written anew after every one
and is all that is told from; a model is thrown away once its figures are there. The checkpoint and
the learning rate are chosen on the rows that are told of, for LoRA and full tuning alike.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from perl import cafe
from perl.commands import run_all, training, write_json
from perl.config import RewardConfig, StudyConfig, UsageError, make, write_toml
from perl.files import is_taken
from perl.report import Bars, Drawing, Spread, markdown_table, phase_cost, write_figure
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


@dataclass(frozen=True)
class Task:
    """Rows to learn from. Paths are below the study's folder, or else below the data folder."""

    name: str
    title: str
    family: Family
    data: str
    validation: str
    metric: str  # accuracy or auc
    bar: float  # that rank 16 is to reach at the family's chosen size
    recipe: dict[str, Any]  # flags of every cell
    sweep: dict[str, str]  # tuning -> learning rates to choose from
    seeds: tuple[int, ...]  # of each size
    seconds: tuple[float, ...]  # a cell's at each size, for the progress bar

    def seeds_of(self, size: str) -> int:
        return self.seeds[self.family.sizes.index(size)]


@dataclass(frozen=True)
class Shape:
    """A random Llama (a size of `cafe.SHAPES`) whose time and memory alone are told."""

    size: str
    vocabulary: int
    tokens: int
    pairs: int
    dtype: str
    steps: int
    seconds: float
    bars: tuple[float, float] | None = None  # step time and peak memory over full tuning's


@dataclass(frozen=True)
class Preset:
    tasks: tuple[Task, ...] = ()
    shapes: tuple[Shape, ...] = ()
    ranks: tuple[int, ...] = (1, 4, 8, 16, 32)
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
)  # fmt: skip
CAFE_PAIRS = Task(
    "cafe-pairs", "Embedded world, pairs", CAFE,
    "cafe/pairs.jsonl", "cafe/heldout_pairs.jsonl", "accuracy", 0.95,
    dict(steps=500, batch_size=32, validate_every=100, lr_schedule="cosine"),
    {"lora": "2e-3,4e-3,8e-3", "full": "1e-3,2e-3"},
    (1, 3, 1), (38.0, 58.0, 90.0),
)  # fmt: skip
COFFEE_PAIRS = Task(
    "coffee-pairs", "Coffee dialogs, true or shuffled answer", COFFEE,
    "data/derived_pairwise/coffee_true_vs_shuffled.train.jsonl",
    "data/derived_pairwise/coffee_true_vs_shuffled.validation.jsonl", "accuracy", 0.88,
    dict(steps=120, batch_size=16, validate_every=40, lr_schedule="cosine", **CUT),
    {"lora": "1e-3,2e-3", "full": "5e-4,1e-3"},
    (1, 1, 2), (60.0, 80.0, 115.0),
)  # fmt: skip
COFFEE_THUMBS = Task(
    "coffee-thumbs", "Taskmaster Coffee, thumbs up or down", COFFEE,
    "data/pointwise/taskmaster_coffee.train.jsonl",
    "data/pointwise/taskmaster_coffee.validation.jsonl", "auc", 0.72,
    # with a rate that falls to 0 it stays under-trained, or over-fits at a higher one
    dict(
        steps=90, batch_size=32, validate_every=15, balance_labels=True,
        **CUT | {"max_tokens": 192},
    ),
    {"lora": "5e-4,1e-3", "full": "2e-4,5e-4"},
    (1, 1, 2), (38.0, 53.0, 76.0),
)  # fmt: skip


def _quick(task: Task) -> Task:
    """The task in a few steps, at two sizes."""
    few = dict(steps=2, batch_size=2)
    warm_up = tuple(sft | few for sft in task.family.warm_up)
    return replace(
        task,
        family=replace(task.family, sizes=task.family.sizes[-2:], warm_up=warm_up),
        recipe=task.recipe | few,
        sweep=dict.fromkeys(task.sweep, "1e-3"),
        seeds=(1, 1),
    )


FEW = dict(general=500, demonstrations=100, pairs=300, prompts=1)  # rows enough to tell the time
TASKS = (CAFE_PAIRS, COFFEE_PAIRS, COFFEE_THUMBS)
TINY = Shape("mini", 1024, 64, 2, "float32", 2, 5.0)
PRESETS = {
    "cpu": Preset(TASKS, (Shape("81M", 32000, 256, 8, "float32", 3, 50.0),)),
    "h200": Preset(
        shapes=(Shape("1.1B", 32000, 512, 8, "bfloat16", 12, 45.0, bars=(1 / 1.6, 0.35)),)
    ),
    "quick": Preset(tuple(map(_quick, TASKS)), (TINY,), ranks=(4,), cost_steps=2),
    "tiny": Preset(shapes=(TINY,), ranks=(4,)),
}


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


def run(config: StudyConfig) -> None:
    """Does what is not done yet, prints the tables and writes study.json, table.md, figure.svg."""
    study = Study(config)
    try:
        study.perform()
    except KeyboardInterrupt:
        raise Interrupted(
            f"go on with: python -m perl study {config.task} --out {config.out} --resume"
        ) from None
    print(study.text())
    if drawings := study.drawings():
        write_figure(study.out / "figure.svg", drawings)


class Study:
    """The plan of a preset, what of it is done, and what is told from that."""

    def __init__(self, config: StudyConfig):
        self.config, self.out = config, Path(config.out).resolve()
        self.preset, self.data_folder = PRESETS[config.preset], _data_folder(config.data_folder)
        if is_taken(self.out) and not config.resume:
            raise UsageError(
                f"--out {self.out} exists and is not empty; give another folder, or --resume "
                "to go on with the study in it"
            )
        real = [task for task in self.preset.tasks if task.family.name == COFFEE.name]
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

    def perform(self) -> None:
        """Runs every job that is not done, the order being that of the module's description."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_toml(self.config, self.out / "config.toml")
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
        """What a finished job has to tell."""
        folder = self.out / job.name
        if "sweep" in job.flags:
            runs = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["runs"]
            best = max((r for r in runs.values() if "score" in r), key=lambda run: run["score"])
            return best | {"runs": runs}
        if "validation" in job.flags:
            return figures(make(RewardConfig, job.flags | {"out": str(folder)}))
        return phase_cost(folder)

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

    def learning(self) -> Iterator[Iterator[Job]]:
        """Stages of jobs whose quality is told; those of a stage do not wait for each other."""
        rounds = max((len(family.warm_up) for family in self.families), default=0)
        for number in range(rounds):
            yield (
                self.warm_up(family, size, number)
                for family in self.families
                if number < len(family.warm_up)
                for size in family.sizes
            )
        yield (
            self.sweep(task, tuning)
            for task in self.preset.tasks
            for tuning in self.preset.swept_arms
        )
        # all of one seed before the next: a study that is stopped has whole tables
        for seed in range(max((n for task in self.preset.tasks for n in task.seeds), default=0)):
            yield (
                self.cell(task, size, arm, seed)
                for task in self.preset.tasks
                for size in task.family.sizes
                if seed < task.seeds_of(size)
                for arm in self.preset.arms
                if self.cell_name(task, size, arm, seed).startswith("cells")
            )

    def costs(self) -> Iterator[Job]:
        for shape in self.preset.shapes:
            for arm in self.preset.arms:
                yield Job(
                    _folder("cost", shape.size, arm),
                    "reward",
                    dict(
                        model=str(self.out / "models" / shape.size),
                        data=str(self.out / f"cafe/pairs-{shape.size}.jsonl"),
                        dtype=shape.dtype, steps=shape.steps, batch_size=shape.pairs,
                        max_tokens=shape.tokens, truncate_prompts=True, drop_long=True,
                        **_arm_flags(arm),
                    ),
                    shape.seconds,
                )  # fmt: skip
        for task in self.preset.tasks:
            for size in task.family.sizes:
                for arm in self.preset.arms:
                    if size != task.family.chosen and arm not in self.preset.swept_arms.values():
                        continue
                    flags = self.flags(task, size, arm) | {"steps": self.preset.cost_steps}
                    del flags["validation"]
                    yield Job(_folder("cost", task.name, size, arm), "reward", flags, 8.0)

    def warm_up(self, family: Family, size: str, number: int) -> Job:
        sft = family.warm_up[number]
        flags = dict(
            model=self.base(family, size, number), tuning="full", lr_schedule="cosine",
            checkpoint_every=10**6, **sft | {"data": self.path(sft["data"])},
        )  # fmt: skip
        return Job(_folder("bases", family.name, size, number), "sft", flags, 30.0, keeps="policy")

    def sweep(self, task: Task, tuning: str) -> Job:
        flags = self.flags(task, task.family.chosen, self.preset.swept_arms[tuning])
        flags["sweep"] = f"lr={task.sweep[tuning]}"
        runs = task.sweep[tuning].count(",") + 1
        seconds = runs * task.seconds[task.family.sizes.index(task.family.chosen)]
        return Job(_folder("sweeps", task.name, tuning), "reward", flags, seconds)

    def cell(self, task: Task, size: str, arm: str, seed: int) -> Job:
        tuning = "full" if arm == "full" else "lora"
        return Job(
            self.cell_name(task, size, arm, seed),
            "reward",
            self.flags(task, size, arm) | {"seed": seed},
            task.seconds[task.family.sizes.index(size)],
            lr_of=_folder("sweeps", task.name, tuning),
        )

    def cell_name(self, task: Task, size: str, arm: str, seed: int) -> str:
        """The job that tells of a cell: its own, or a sweep whose best run is that very command."""
        for tuning, swept in self.preset.swept_arms.items():
            if (size, arm, seed) == (task.family.chosen, swept, 0):
                return _folder("sweeps", task.name, tuning)
        return _folder("cells", task.name, size, arm, f"seed {seed}")

    def flags(self, task: Task, size: str, arm: str) -> dict[str, Any]:
        return dict(
            model=self.base(task.family, size, len(task.family.warm_up)),
            data=self.path(task.data), validation=self.path(task.validation),
            checkpoint_every=10**6, **task.recipe, **_arm_flags(arm),
        )  # fmt: skip

    def base(self, family: Family, size: str, number: int) -> str:
        """The model of a family after `number` of its SFT commands."""
        if number == 0:
            return str(self.out / _folder("models", family.name, size))
        return str(self.out / _folder("bases", family.name, size, number - 1))

    def path(self, name: str) -> str:
        return str((self.out if name.startswith("cafe/") else self.data_folder) / name)

    def make_models(self) -> None:
        """The embedded world and the models of all sizes, where they are not there yet."""
        import torch
        from transformers import AutoTokenizer

        parameters = self.record["parameters"]
        wanted = {_folder(family.name, size) for family in self.families for size in family.sizes}
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
                name = _folder(family.name, size)
                if name not in parameters and family.name == COFFEE.name:
                    keep(name, *_stories(self.data_folder, size))
                elif name not in parameters:
                    keep(name, cafe.build_model(len(tokenizer), size), tokenizer)
        for shape in self.preset.shapes:
            if shape.size not in parameters:
                _write_long_pairs(self.out / f"cafe/pairs-{shape.size}.jsonl", world, shape.tokens)
                model = cafe.build_model(
                    shape.vocabulary, shape.size, max_position_embeddings=shape.tokens
                )
                keep(shape.size, model.to(getattr(torch, shape.dtype)), tokenizer)
        self.save()

    # ---------------------------------------------------------------------------- what is told

    def text(self) -> str:
        """The tables of what is done so far, in Markdown."""
        machine = " · ".join(self.record["machine"].values())
        parts = [f"`perl study {self.config.task} --preset {self.config.preset}` · {machine}"]
        for title, rows in self.tables():
            if rows:
                parts += [f"**{title}**", markdown_table(rows)]
        return "\n\n".join(parts) + "\n"

    def tables(self) -> Iterator[tuple[str, list[Row]]]:
        for task in self.preset.tasks:
            heads = {size: self.head(_folder(task.family.name, size)) for size in task.family.sizes}
            rows = []
            for arm in self.preset.arms:
                found = {size: self.quality(task, size, arm) for size in heads}
                rows.append({"": arm} | {heads[size]: _spread(found[size]) for size in heads})
            yield f"{task.title}: held-out {_NAMES[task.metric]}, mean ± deviation of seeds", rows
            columns = {_folder(task.name, size): head for size, head in heads.items()}
            yield f"{task.title}: cost, and over full tuning's", self.cost_rows(columns)
        columns = {
            shape.size: f"{self.head(shape.size)}, {2 * shape.pairs} rows of {shape.tokens}"
            for shape in self.preset.shapes
        }
        yield "Random Llamas: cost, and over full tuning's", self.cost_rows(columns)
        yield "Bars", list(self.bars())

    def cost_rows(self, columns: dict[str, str]) -> list[Row]:
        """A row for each arm; `columns` is the folder under cost/ -> its head."""
        rows = []
        for arm in self.preset.arms:
            row = {"": arm}
            for folder, head in columns.items():
                step = peak = "–"
                if ratio := self.over_full(folder, arm):
                    cost = self.jobs[_folder("cost", folder, arm)]
                    step = f"{cost['step_ms']:.3g} ms ({ratio['step_ms']:.2f})"
                    peak = f"{cost['peak_mb']:,.0f} MB ({ratio['peak_mb']:.2f})"
                row |= {f"{head}: step": step, f"{head}: peak": peak}
            rows.append(row)
        return rows if any(set(row.values()) - {row[""], "–"} for row in rows) else []

    def over_full(self, folder: str, arm: str) -> dict[str, float]:
        """Step time and peak memory over full tuning's; empty where one is not measured."""
        ours, full = (self.jobs.get(_folder("cost", folder, which)) for which in (arm, "full"))
        return {key: ours[key] / full[key] for key in full} if ours and full else {}

    def bars(self) -> Iterator[Row]:
        """What the study is to show, with what it found."""
        for task in self.preset.tasks:
            lora, chosen = self.preset.swept_arms["lora"], task.family.chosen
            gaps = {}
            for size in task.family.sizes:
                found, full = (self.quality(task, size, arm) for arm in (lora, "full"))
                if found and full:
                    gaps[size] = statistics.fmean(full) - statistics.fmean(found)
            if chosen not in gaps:
                continue
            name = _NAMES[task.metric]
            value = statistics.fmean(self.quality(task, chosen, lora))
            yield _bar(f"{task.title}: {name}, {lora}, {chosen}", value, ">=", task.bar)
            yield _bar(f"{task.title}: full less {lora}, {chosen}", gaps[chosen], "<=", 0.02)
            worst = max(gaps, key=gaps.get)
            yield _bar(f"{task.title}: the same, worst size, {worst}", gaps[worst], "<=", 0.02)
        for shape in self.preset.shapes:
            ratio = self.over_full(shape.size, self.preset.swept_arms["lora"])
            if shape.bars and ratio:
                time, memory = shape.bars
                yield _bar(f"{shape.size}: step time over full", ratio["step_ms"], "<=", time)
                yield _bar(f"{shape.size}: peak memory over full", ratio["peak_mb"], "<=", memory)

    def drawings(self) -> list[Drawing]:
        found: list[Drawing] = []
        for task in self.preset.tasks:
            values = {
                self.head(_folder(task.family.name, size)): {
                    arm.removeprefix("rank "): repeated
                    for arm in reversed(self.preset.arms)
                    if (repeated := self.quality(task, size, arm))
                }
                for size in task.family.sizes
            }
            values = {head: groups for head, groups in values.items() if groups}
            if values:
                found.append(Spread(task.title, f"{_NAMES[task.metric]}, by rank", values))
        folders = {_folder(task.name, task.family.chosen): task.name for task in self.preset.tasks}
        folders |= {shape.size: shape.size for shape in self.preset.shapes}
        for key, title in (("step_ms", "Step time"), ("peak_mb", "Peak memory")):
            values = {
                name: {
                    arm: ratio[key]
                    for arm in reversed(self.preset.arms[1:])
                    if (ratio := self.over_full(folder, arm))
                }
                for folder, name in folders.items()
            }
            values = {name: groups for name, groups in values.items() if groups}
            if values:
                found.append(Bars(title, "over full tuning's", values))
        return found

    def quality(self, task: Task, size: str, arm: str) -> list[float]:
        """The held-out figure of each seed that is done."""
        names = [self.cell_name(task, size, arm, seed) for seed in range(task.seeds_of(size))]
        return [self.jobs[n][f"validation_{task.metric}"] for n in names if n in self.jobs]

    def head(self, model: str) -> str:
        return f"{self.record['parameters'][model] / 1e6:.3g} M"


def _folder(*parts: str | int) -> str:
    return "/".join(map(str, parts)).replace(" ", "-")


_NAMES = {"accuracy": "accuracy", "auc": "AUC"}


def _arm_flags(arm: str) -> dict[str, Any]:
    if arm == "full":
        return {"tuning": "full"}
    return {"tuning": "lora", "lora_rank": int(arm.removeprefix("rank "))}


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "–"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def _bar(what: str, value: float, sense: str, wanted: float) -> Row:
    met = value >= wanted if sense == ">=" else value <= wanted
    sign = {">=": "≥", "<=": "≤"}[sense]
    return {
        "": what,
        "wanted": f"{sign} {wanted}",
        "found": f"{value:.3f}",
        "met": "met" if met else "missed",
    }


def _data_folder(given: str | None) -> Path | None:
    """The folder of real rows and models; None where none is named and none is at hand."""
    named = given or os.environ.get("PERL_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if all((folder / name).is_dir() for name in ("data", "models")):
        return folder.resolve()
    if given:
        raise UsageError(f"--data-folder {given} has no data/ and models/; give one that has")
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

    folder = data_folder / "models/stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers, count = model.model.layers, int(size.partition(" ")[0])
    taken = [copy.deepcopy(layers[i * len(layers) // count]) for i in range(count)]
    model.model.layers, model.config.num_hidden_layers = nn.ModuleList(taken), count
    return model, AutoTokenizer.from_pretrained(folder)


def _write_long_pairs(path: Path, world: cafe.World, tokens: int) -> None:
    """Pairs whose prompts are longer than `tokens` tokens, of as many dialogs as that takes."""
    texts = itertools.cycle(row["prompt"] + row["chosen"] + "\n" for row in world.pairs)
    with path.open("w", encoding="utf-8") as file:
        for pair in world.pairs[:256]:
            said = ""
            while len(said) < 8 * tokens:  # characters, of which a token has fewer
                said += next(texts)
            file.write(json.dumps(pair | {"prompt": said + pair["prompt"]}) + "\n")
