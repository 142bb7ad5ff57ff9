"""The study of policies, LoRA of several ranks beside full tuning: `perl study policy`.

    python -m perl study policy --out FOLDER               preset cpu: an hour on two cores
    python -m perl study policy --out FOLDER --resume      goes on after a kill

Table 3 of arXiv 2403.10704, and the step times and peak memories of its Table 1, by REINFORCE on
three tasks: the embedded world with a reward model, judged by the oracle that no policy sees;
dialogs in a coffee shop with a reward model of them; and short stories by a real pretrained model,
with a reward of a few lines of Python (`perl.stories`). Between the bases and the sweeps of
`perl.study` come

    stories   what the pretrained model tells, and how its stories are cut to demonstrations
    rewards   a reward model of each task that wants one, by LoRA: every arm learns from the same

and after the cells of a seed `judged`, the oracle's opinion of them. A task's arms start from one
SFT model and differ in what they train alone. The learning rate is the one whose policy has the
highest (1 − β) reward − β KL on the held-out prompts, and the last policy is told of.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perl import cafe, stories
from perl.commands import words
from perl.drawings import Drawing, Paths, Spread
from perl.files import write_rows
from perl.report import phase_cost
from perl.study import (
    CAFE,
    COFFEE,
    CUT,
    Family,
    Job,
    Preset,
    Row,
    Shape,
    Study,
    Task,
    arm_flags,
    bar,
    folder,
    in_few_steps,
    spread,
)


@dataclass(frozen=True, kw_only=True)
class PolicyTask(Task):
    """What policies learn from, and what they are to reach at rank 16.

    `reward` is the flags of a reward model's run, or FILE.py:NAME of a reward function.
    """

    reward: dict[str, Any] | str
    told: str  # what the reward of held-out prompts is called: the judge's where there is one
    judge: str = ""  # FILE.py:NAME of a function that no policy learns from
    at_least: float | None = None
    over_full: float | None = None  # as a share of what full tuning reaches
    gain: float | None = None  # over the SFT model, in standard deviations of its answers
    kl_at_most: float | None = None  # nats per answer


@dataclass(frozen=True, kw_only=True)
class PolicyShape(Shape):
    """A random Llama that answers prompts, `tokens` long with their answers."""

    prompts: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class PolicyPreset(Preset):
    told: int = 800  # stories of the pretrained model


def _function(module: Any) -> str:
    return f"{Path(module.__file__).resolve()}:reward"


STORIES = Family(
    "stories",
    ("5 layers",),
    "5 layers",
    (dict(data="stories/demonstrations.jsonl", steps=60, batch_size=32, lr=2e-3),),
    real=True,
)
RUN = dict(lr_schedule="linear", samples_every=10**6)
CAFE_ANSWERS = PolicyTask(
    name="cafe",
    title="Embedded world",
    family=replace(CAFE, sizes=("tiny",)),
    data="cafe/prompts.jsonl",
    validation="cafe/heldout_prompts.jsonl",
    reward=dict(
        data="cafe/pairs.jsonl", validation="cafe/heldout_pairs.jsonl", steps=800, batch_size=32,
        validate_every=100, lr=2e-3, lr_schedule="cosine",
    ),
    told="oracle, 0 to 1",
    judge=_function(cafe),
    over_full=0.9,
    recipe=dict(
        steps=250, prompts_per_step=32, max_new_tokens=40, beta=0.4, validate_every=50, **RUN
    ),
    sweep={"lora": "7e-4,1.5e-3", "full": "3e-4,6e-4"},
    seeds=(3,),
    seconds=(100.0,),
)  # fmt: skip
COFFEE_ANSWERS = PolicyTask(
    name="coffee",
    title="Coffee dialogs",
    family=replace(COFFEE, sizes=("5 layers",)),
    data="data/rl_prompts/taskmaster_coffee.train.jsonl",
    validation="data/rl_prompts/taskmaster_coffee.validation.jsonl",
    reward=dict(
        data="data/derived_pairwise/coffee_true_vs_shuffled.train.jsonl",
        validation="data/derived_pairwise/coffee_true_vs_shuffled.validation.jsonl",
        steps=120, batch_size=16, validate_every=40, lr=2e-3, lr_schedule="cosine", **CUT,
    ),
    told="reward model's score",
    gain=0.5,
    kl_at_most=20.0,
    recipe=dict(
        steps=80, prompts_per_step=16, max_new_tokens=40, beta=0.1, validate_every=40, **RUN, **CUT
    ),
    sweep={"lora": "1e-3,2e-3", "full": "2e-4,5e-4"},
    seeds=(1,),
    seconds=(120.0,),
)  # fmt: skip
STORY_ANSWERS = PolicyTask(
    name="stories",
    title="Stories of a given animal",
    family=STORIES,
    data="stories/prompts.jsonl",
    validation="stories/heldout_prompts.jsonl",
    reward=_function(stories),
    told="success rate",
    at_least=0.9,
    recipe=dict(
        steps=140, prompts_per_step=32, max_new_tokens=64, beta=0.05, validate_every=35, **RUN
    ),
    sweep={"lora": "1e-3,2e-3", "full": "3e-4,1e-3"},
    seeds=(2,),
    seconds=(150.0,),
)

TASKS = (CAFE_ANSWERS, COFFEE_ANSWERS, STORY_ANSWERS)
RANKS = (1, 4, 8, 16)
LARGE = PolicyShape(
    size="81M", vocabulary=32000, tokens=128, new_tokens=64, prompts=16, dtype="float32", steps=2,
    seconds=60.0,
)  # fmt: skip
HUGE = PolicyShape(
    size="1.1B", vocabulary=32000, tokens=512, new_tokens=256, prompts=16, dtype="bfloat16",
    steps=6, seconds=60.0, bars=(1 / 1.5, 0.25),
)  # fmt: skip
TINY = PolicyShape(
    size="mini", vocabulary=1024, tokens=64, new_tokens=8, prompts=2, dtype="float32", steps=2,
    seconds=5.0,
)  # fmt: skip


def _quick(task: PolicyTask) -> PolicyTask:
    task = in_few_steps(task, 1, steps=2, prompts_per_step=2, max_new_tokens=8)
    if isinstance(task.reward, str):
        return task
    return replace(task, reward=task.reward | dict(steps=2, batch_size=2))


PRESETS = {
    "cpu": PolicyPreset(tasks=TASKS, shapes=(LARGE,), ranks=RANKS),
    "h200": PolicyPreset(shapes=(HUGE,), ranks=RANKS),
    "quick": PolicyPreset(
        tasks=tuple(map(_quick, TASKS)), shapes=(TINY,), ranks=(4,), cost_steps=2, told=32
    ),
    "tiny": PolicyPreset(shapes=(TINY,), ranks=(4,)),
}


class PolicyStudy(Study):
    """Quality and cost of policies."""

    presets = PRESETS
    trainer = "reinforce"

    def line(self, job: Job, threads: int) -> list[str]:
        if job.command not in _ANSWERS:
            return super().line(job, threads)
        out = self.out / job.name / _ANSWERS[job.command]
        out.unlink(missing_ok=True)  # of a kill before its figures were kept
        flags = job.flags | {"threads": threads, "device": self.config.device}
        return words(job.command, out=out, **flags)

    def figures(self, job: Job) -> dict[str, Any]:
        where = self.out / job.name
        if job.command == "generate":
            return self.cut_stories(where / _ANSWERS["generate"])
        if job.command == "evaluate":
            (row,) = _rows(where / _ANSWERS["evaluate"])
            return {name: value for name, value in row.items() if not isinstance(value, str)}
        if job.command != "reinforce" or "sweep" in job.flags or "validation" not in job.flags:
            return super().figures(job)
        metrics = _rows(where / "metrics.jsonl")
        lengths = [row["length"] for row in metrics if "length" in row]
        held_out = [row for row in metrics if "validation_reward" in row]
        return {
            "reward_before": held_out[0]["validation_reward"],
            "reward_std_before": held_out[0]["validation_reward_std"],
            "reward": held_out[-1]["validation_reward"],
            "kl": held_out[-1]["validation_kl"],
            "kl_before": held_out[0]["validation_kl"],
            "length_before": lengths[0],
            "length": statistics.fmean(lengths[-10:]),
            "frontier": [[row["validation_kl"], row["validation_reward"]] for row in held_out],
        } | phase_cost(where)

    def score(self, job: Job, run: dict[str, Any]) -> float:
        """The objective on the held-out prompts: the reward alone would choose what outwits it."""
        beta = job.flags["beta"]
        return (1 - beta) * run["validation_reward"] - beta * run["validation_kl"]

    def throw_away(self, job: Job) -> None:
        super().throw_away(job)
        if job.name.startswith("judged/"):  # the judged policy has served
            super().throw_away(replace(job, name=job.name.replace("judged/", "cells/", 1)))

    # ------------------------------------------------------------------------------- the plan

    def make_models(self) -> None:
        super().make_models()
        for shape in self.preset.shapes:
            prompts = [{"prompt": row["prompt"]} for row in _rows(self.pairs_of(shape))]
            write_rows(self.prompts_of(shape), prompts)
        if self.tells_stories:
            for name, texts in zip(("prompts", "heldout_prompts"), stories.prompts(), strict=True):
                write_rows(self.out / f"stories/{name}.jsonl", [{"prompt": text} for text in texts])

    @property
    def tells_stories(self) -> bool:
        return STORIES.name in {family.name for family in self.families}

    def prompts_of(self, shape: PolicyShape) -> Path:
        return self.out / f"cafe/prompts-{shape.size}.jsonl"

    def learning(self) -> Iterator[Iterator[Job]]:
        if self.tells_stories:
            yield iter([self.tell_stories()])
        yield from self.warm_ups()
        yield (self.reward(task) for task in self.preset.tasks if isinstance(task.reward, dict))
        yield self.sweeps()
        judged = [task for task in self.preset.tasks if task.judge]
        yield (self.judged(task, "SFT") for task in judged)
        for seed, cells in enumerate(self.cells()):
            yield cells
            yield (
                self.judged(task, arm, seed)
                for task in judged
                if seed < task.seeds_of(task.family.chosen)
                for arm in self.preset.arms
            )

    def tell_stories(self) -> Job:
        """What the pretrained model tells; its demonstrations are these stories, cut."""
        flags = dict(
            model=self.base(STORIES, STORIES.chosen, 0), data=self.path("stories/prompts.jsonl"),
            rows=self.preset.told, batch_size=64, max_new_tokens=64,
        )  # fmt: skip
        return Job("stories", "generate", flags, 20.0)

    def reward(self, task: PolicyTask) -> Job:
        flags = task.reward | {key: self.path(task.reward[key]) for key in ("data", "validation")}
        flags |= dict(model=self.start(task), checkpoint_every=10**6)
        return Job(folder("rewards", task.name), "reward", flags, 60.0, keeps="reward")

    def cell(self, task: PolicyTask, size: str, arm: str, seed: int) -> Job:
        job = super().cell(task, size, arm, seed)
        return replace(job, keeps="policy") if task.judge else job

    def judged(self, task: PolicyTask, arm: str, seed: int = 0) -> Job:
        cell = self.cell_name(task, task.family.chosen, arm, seed)
        flags = dict(
            model=self.start(task) if arm == "SFT" else str(self.out / cell),
            data=self.path(task.validation), reward_function=task.judge, batch_size=64,
            max_new_tokens=task.recipe["max_new_tokens"],
        )  # fmt: skip
        return Job(_judged(cell), "evaluate", flags, 10.0)

    def start(self, task: PolicyTask) -> str:
        """The SFT model that every arm of the task starts from."""
        return self.base(task.family, task.family.chosen, len(task.family.warm_up))

    def flags(self, task: PolicyTask, size: str, arm: str) -> dict[str, Any]:
        flags = super().flags(task, size, arm)
        if isinstance(task.reward, str):
            return flags | {"reward_function": task.reward}
        return flags | {"reward_model": str(self.out / folder("rewards", task.name))}

    def costs(self) -> Iterator[Job]:
        for shape in self.preset.shapes:
            reward = folder("rewards", shape.size)
            both = dict(
                model=str(self.out / "models" / shape.size), dtype=shape.dtype,
                max_tokens=shape.tokens, truncate_prompts=True, checkpoint_every=10**6,
            )  # fmt: skip
            pairs = dict(data=str(self.pairs_of(shape)), drop_long=True, steps=1, batch_size=2)
            yield Job(reward, "reward", both | pairs, shape.seconds / 2, keeps="reward")
            for arm in self.preset.arms:
                flags = dict(
                    data=str(self.prompts_of(shape)), reward_model=str(self.out / reward),
                    steps=shape.steps, prompts_per_step=shape.prompts,
                    max_new_tokens=shape.new_tokens, samples_every=10**6, **arm_flags(arm),
                )  # fmt: skip
                name = folder("cost", shape.size, arm)
                yield Job(name, "reinforce", both | flags, shape.seconds)
        yield from self.task_costs()

    def cut_stories(self, where: Path) -> dict[str, Any]:
        """Writes the demonstrations, and says how many there are and how many have success."""
        told = [row | {"completion": stories.cut(row["completion"])} for row in _rows(where)]
        rows = [row for row in told if row["completion"]]
        write_rows(self.out / "stories/demonstrations.jsonl", rows)
        texts = ([row[key] for row in rows] for key in ("prompt", "completion"))
        return {"demonstrations": len(rows), "success": statistics.fmean(stories.reward(*texts))}

    # ---------------------------------------------------------------------------- what is told

    def tables(self) -> Iterator[tuple[str, list[Row]]]:
        for task in self.preset.tasks:
            yield f"{task.title}: held-out prompts, mean ± deviation of seeds", self.rows(task)
            columns = {folder(task.name, task.family.chosen): task.title}
            yield f"{task.title}: cost, and over full tuning's", self.cost_rows(columns)
        columns = {
            shape.size: f"{self.head(shape.size)}, {shape.prompts} prompts of "
            f"{shape.tokens - shape.new_tokens} and {shape.new_tokens} new"
            for shape in self.preset.shapes
        }
        yield "Random Llamas: cost, and over full tuning's", self.cost_rows(columns)
        yield "Bars", list(self.bars())

    def rows(self, task: PolicyTask) -> list[Row]:
        """The SFT model and each arm: what they reach, and what the policy paid for it."""
        rows = []
        for arm in ("SFT", *self.preset.arms):
            row = {"": arm, task.told: spread(self.quality(task, arm))}
            if task.judge:
                row["reward model's score"] = spread(self.found(task, arm, "reward"))
            row["KL, nats"] = spread(self.found(task, arm, "kl"), 1)
            row["tokens"] = spread(self.found(task, arm, "length"), 1)
            rows.append(row)
        return rows if any(self.quality(task, arm) for arm in self.preset.arms) else []

    def quality(self, task: PolicyTask, arm: str) -> list[float]:
        """What is told of the arm: the judge's opinion, or else the reward, of each seed."""
        if not task.judge:
            return self.found(task, arm, "reward")
        seeds = range(1 if arm == "SFT" else task.seeds_of(task.family.chosen))
        names = [self.judged(task, arm, seed).name for seed in seeds]
        return [self.jobs[name]["reward"] for name in names if name in self.jobs]

    def found(self, task: PolicyTask, arm: str, key: str) -> list[Any]:
        """A figure of each cell of the arm; the SFT model's is where the first arm begins."""
        if arm == "SFT":
            arm, key = self.preset.arms[0], f"{key}_before"
        size = task.family.chosen
        names = [self.cell_name(task, size, arm, seed) for seed in range(task.seeds_of(size))]
        return [self.jobs[name][key] for name in names if name in self.jobs]

    def bars(self) -> Iterator[Row]:
        """What the study is to show, with what it found."""
        for task in self.preset.tasks:
            lora = self.preset.swept_arms["lora"]
            arms = (lora, "full", "SFT")
            if not all(self.quality(task, arm) for arm in arms):
                continue
            ours, full, before = (statistics.fmean(self.quality(task, arm)) for arm in arms)
            name = f"{task.title}: {task.told}, {lora}"
            if task.at_least is not None:
                yield bar(name, ours, ">=", task.at_least)
            if task.over_full is not None and full > 0:  # of nothing there is no share
                yield bar(f"{name} over full", ours / full, ">=", task.over_full)
            if task.gain is not None:
                deviation = statistics.fmean(self.found(task, "SFT", "reward_std"))
                if deviation > 0:
                    gain = (ours - before) / deviation
                    yield bar(f"{name} less SFT, in its deviations", gain, ">=", task.gain)
            if task.kl_at_most is not None:
                kl = statistics.fmean(self.found(task, lora, "kl"))
                yield bar(f"{task.title}: KL in nats, {lora}", kl, "<=", task.kl_at_most)
        yield from self.cost_bars()

    def drawings(self) -> list[Drawing]:
        found: list[Drawing] = []
        for task in self.preset.tasks:
            arms = {arm: self.quality(task, arm) for arm in self.preset.arms}
            if values := self.by_rank(arms):
                found.append(Spread(task.title, f"{task.told}, by rank", {task.title: values}))
            lines = {
                arm: _mean_line(frontiers)
                for arm in self.preset.arms
                if (frontiers := self.found(task, arm, "frontier"))
            }
            if lines:
                found.append(Paths(task.title, "reward", lines, over="KL, nats per answer"))
        return [*found, *self.cost_drawings()]


_ANSWERS = {"evaluate": "figures.jsonl", "generate": "told.jsonl"}  # what they write


def _judged(cell: str) -> str:
    return cell.replace("cells/", "judged/", 1)


def _mean_line(frontiers: list[list[list[float]]]) -> tuple[list[float], list[float]]:
    """(KL, reward) at each validation, means of the seeds."""
    times = zip(*frontiers, strict=True)
    points = [[statistics.fmean(seeds) for seeds in zip(*time, strict=True)] for time in times]
    return [kl for kl, _ in points], [reward for _, reward in points]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
