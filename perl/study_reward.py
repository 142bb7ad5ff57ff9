"""The study of reward models, LoRA of several ranks beside full tuning: `perl study reward`.

    python -m perl study reward --out FOLDER               preset cpu: an hour on two cores
    python -m perl study reward --out FOLDER --resume      goes on after a kill
    python -m perl study reward --out FOLDER --preset bars --no-cost     the learning bars: rank 16
                                        beside full tuning at one size, trained longer, three seeds

Tables 1 and 2 of arXiv 2403.10704, for reward models, on rows and machines of one's own: accuracy
or AUC of every size, rank and seed, and what each costs. The checkpoint and the learning rate are
chosen on the rows that are told of, for LoRA and full tuning alike. `perl.study` has the stages.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from perl.drawings import Drawing, Spread
from perl.study import (
    CAFE,
    COFFEE,
    CUT,
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
class RewardTask(Task):
    """What reward models learn, and by which held-out figure they are told apart."""

    metric: str  # accuracy or auc
    bar: float  # that rank 16 is to reach at the family's chosen size


@dataclass(frozen=True, kw_only=True)
class RewardShape(Shape):
    """A random Llama whose steps are on pairs."""

    pairs: int


CAFE_PAIRS = RewardTask(
    name="cafe-pairs",
    title="Embedded world, pairs",
    family=CAFE,
    data="cafe/pairs.jsonl",
    validation="cafe/heldout_pairs.jsonl",
    metric="accuracy",
    bar=0.95,
    recipe=dict(steps=500, batch_size=32, validate_every=100, lr_schedule="cosine"),
    sweep={"lora": "2e-3,4e-3,8e-3", "full": "1e-3,2e-3"},
    seeds=(1, 3, 1),
    seconds=(38.0, 58.0, 90.0),
)
COFFEE_PAIRS = RewardTask(
    name="coffee-pairs",
    title="Coffee dialogs, true or shuffled answer",
    family=COFFEE,
    data="data/derived_pairwise/coffee_true_vs_shuffled.train.jsonl",
    validation="data/derived_pairwise/coffee_true_vs_shuffled.validation.jsonl",
    metric="accuracy",
    bar=0.88,
    recipe=dict(steps=120, batch_size=16, validate_every=40, lr_schedule="cosine", **CUT),
    sweep={"lora": "1e-3,2e-3", "full": "5e-4,1e-3"},
    seeds=(1, 1, 2),
    seconds=(60.0, 80.0, 115.0),
)
COFFEE_THUMBS = RewardTask(
    name="coffee-thumbs",
    title="Taskmaster Coffee, thumbs up or down",
    family=COFFEE,
    data="data/pointwise/taskmaster_coffee.train.jsonl",
    validation="data/pointwise/taskmaster_coffee.validation.jsonl",
    metric="auc",
    bar=0.72,
    # with a rate that falls to 0 it stays under-trained, or over-fits at a higher one
    recipe=dict(
        steps=90, batch_size=32, validate_every=15, balance_labels=True, **CUT | {"max_tokens": 192}
    ),
    sweep={"lora": "5e-4,1e-3", "full": "2e-4,5e-4"},
    seeds=(1, 1, 2),
    seconds=(38.0, 53.0, 76.0),
)


def _for_bars(task: RewardTask, lora: str, full: str, seconds: float, **recipe: Any) -> RewardTask:
    """The task at its chosen size alone, three seeds, with the rates given."""
    return replace(
        task,
        family=replace(task.family, sizes=(task.family.chosen,)),
        recipe=task.recipe | recipe,
        sweep={"lora": lora, "full": full},
        seeds=(3,),
        seconds=(seconds,),
    )


TASKS = (CAFE_PAIRS, COFFEE_PAIRS, COFFEE_THUMBS)
RANKS = (1, 4, 8, 16, 32)
LARGE = RewardShape(
    size="81M", vocabulary=32000, tokens=256, pairs=8, dtype="float32", steps=3, seconds=50.0
)
HUGE = RewardShape(
    size="1.1B", vocabulary=32000, tokens=512, pairs=8, dtype="bfloat16", steps=12, seconds=45.0,
    bars=(1 / 1.6, 0.35),
)  # fmt: skip
TINY = RewardShape(
    size="mini", vocabulary=1024, tokens=64, pairs=2, dtype="float32", steps=2, seconds=5.0
)
FEW_STEPS = dict(steps=2, batch_size=2)
PRESETS = {
    "cpu": Preset(tasks=TASKS, shapes=(LARGE,), ranks=RANKS),
    "bars": Preset(
        tasks=(
            _for_bars(CAFE_PAIRS, "2e-3", "1e-3", 85.0, steps=800),
            _for_bars(COFFEE_PAIRS, "2e-3", "5e-4,1e-3", 220.0, steps=240),
            _for_bars(COFFEE_THUMBS, "1e-3", "5e-4", 76.0),
        ),
        ranks=(16,),
    ),
    "h200": Preset(shapes=(HUGE,), ranks=RANKS),
    "quick": Preset(
        tasks=tuple(in_few_steps(task, 2, **FEW_STEPS) for task in TASKS),
        shapes=(TINY,),
        ranks=(4,),
        cost_steps=2,
    ),
    "tiny": Preset(shapes=(TINY,), ranks=(4,)),
}


class RewardStudy(Study):
    """Quality and cost of reward models."""

    presets = PRESETS
    trainer = "reward"

    # ------------------------------------------------------------------------------- the plan

    def learning(self) -> Iterator[Iterator[Job]]:
        yield from self.warm_ups()
        yield self.sweeps()
        yield from self.cells()

    def cell_name(self, task: Task, size: str, arm: str, seed: int) -> str:
        """The job that tells of a cell: its own, or a sweep whose best run is that very command."""
        for tuning, swept in self.preset.swept_arms.items():
            if (size, arm, seed) == (task.family.chosen, swept, 0):
                return folder("sweeps", task.name, tuning)
        return super().cell_name(task, size, arm, seed)

    def costs(self) -> Iterator[Job]:
        for shape in self.preset.shapes:
            for arm in self.preset.arms:
                yield Job(
                    folder("cost", shape.size, arm),
                    "reward",
                    dict(
                        model=str(self.out / "models" / shape.size),
                        data=str(self.pairs_of(shape)),
                        dtype=shape.dtype, steps=shape.steps, batch_size=shape.pairs,
                        max_tokens=shape.tokens, truncate_prompts=True, drop_long=True,
                        **arm_flags(arm),
                    ),
                    shape.seconds,
                )  # fmt: skip
        yield from self.task_costs()

    # ---------------------------------------------------------------------------- what is told

    def tables(self) -> Iterator[tuple[str, list[Row]]]:
        for task in self.preset.tasks:
            heads = {size: self.head(folder(task.family.name, size)) for size in task.family.sizes}
            rows = []
            for arm in self.preset.arms:
                found = {size: self.quality(task, size, arm) for size in heads}
                rows.append({"": arm} | {heads[size]: spread(found[size]) for size in heads})
            yield f"{task.title}: held-out {_NAMES[task.metric]}, mean ± deviation of seeds", rows
            columns = {folder(task.name, size): head for size, head in heads.items()}
            yield f"{task.title}: cost, and over full tuning's", self.cost_rows(columns)
        columns = {
            shape.size: f"{self.head(shape.size)}, {2 * shape.pairs} rows of {shape.tokens}"
            for shape in self.preset.shapes
        }
        yield "Random Llamas: cost, and over full tuning's", self.cost_rows(columns)
        yield "Bars", list(self.bars())

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
            yield bar(f"{task.title}: {name}, {lora}, {chosen}", value, ">=", task.bar)
            yield bar(f"{task.title}: full less {lora}, {chosen}", gaps[chosen], "<=", 0.02)
            worst = max(gaps, key=gaps.get)
            yield bar(f"{task.title}: the same, worst size, {worst}", gaps[worst], "<=", 0.02)
        yield from self.cost_bars()

    def drawings(self) -> list[Drawing]:
        found: list[Drawing] = []
        for task in self.preset.tasks:
            values = {
                self.head(folder(task.family.name, size)): self.by_rank(
                    {arm: self.quality(task, size, arm) for arm in self.preset.arms}
                )
                for size in task.family.sizes
            }
            values = {head: groups for head, groups in values.items() if groups}
            if values:
                found.append(Spread(task.title, f"{_NAMES[task.metric]}, by rank", values))
        return [*found, *self.cost_drawings()]

    def quality(self, task: RewardTask, size: str, arm: str) -> list[float]:
        """The held-out figure of each seed that is done."""
        names = [self.cell_name(task, size, arm, seed) for seed in range(task.seeds_of(size))]
        return [self.jobs[n][f"validation_{task.metric}"] for n in names if n in self.jobs]


_NAMES = {"accuracy": "accuracy", "auc": "AUC"}
