"""What is to be reached, as ratios taken in one process on the same inputs.

`must` is the bar and `stretch` the aim. A bar over "each" holds at every shape; one over "geomean"
at the geometric mean over the shapes of a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks._results import Row

MIB = 2**20
FORWARD, TRAIN = "forward", "forward + backward"
DROPOUT = f"{TRAIN}, dropout 0.1"
PROJECTIONS = f"q, k, v together, {DROPOUT}"
ONE_TOKEN = "one token, forward"
POLICY_KL = f"{TRAIN}, exact KL"
ONE_LENGTH, ENDING = "answers of one length", "answers that end"


@dataclass(frozen=True)
class Bar:
    """One number to reach.

    `what` is "ours/NAME" or "NAME/ours" (times; the second reads "so many times faster"),
    "memory" (bytes of ours), "memory ours/NAME", "error" (of the first result), or a measure's
    name. `sense` is "<=" or ">=".
    """

    on: str  # "cpu" or "gpu"
    room: str
    check: str
    dtype: str
    what: str
    sense: str
    must: float
    stretch: float | None = None
    over: str = "each"
    where: dict[str, int] = field(default_factory=dict)  # letters of the shape that must agree


# What a bar speaks of, where that is the name of a measure, for a reader.
WORDS = {
    "dropout_points": "points that dropout adds",
    "saved_bytes_per_element": "bytes saved per element of x",
    "saved_over_frozen": "bytes saved, ours/frozen",
    "share_of_copy_bandwidth": "share of a copy's bandwidth",
    "moved, ours": "share of rows whose log p depends on the batch",
}


def in_words(what: str, sense: str, limit: str) -> str:
    """A bar for a reader."""
    return f"{WORDS.get(what, what)} {'≤' if sense == '<=' else '≥'} {limit}"


def value_of(row: Row, what: str) -> float | None:
    """The row's figure that a bar speaks of; None where it was not measured."""
    if what == "error":
        return row.errors[0]["ours"] if row.errors else None
    if what == "memory":
        return row.memory.get("ours")
    if what.startswith("memory ours/"):
        theirs = row.memory.get(what.removeprefix("memory ours/"))
        return row.memory["ours"] / theirs if theirs and "ours" in row.memory else None
    if what.startswith("ours/"):
        return row.contestants.get(what.removeprefix("ours/"), {}).get("ratio")
    if what.endswith("/ours"):
        ratio = row.contestants.get(what.removesuffix("/ours"), {}).get("ratio")
        return None if ratio is None else 1 / ratio
    return row.measures.get(what)


def verdict(value: float | None, sense: str, must: float, stretch: float | None) -> str:
    """ "met" (with "stretch" where that is reached too), "missed" or "not measured"."""
    if value is None:
        return "not measured"

    def reached(limit: float) -> bool:
        return value <= limit if sense == "<=" else value >= limit

    if stretch is not None and reached(stretch):
        return "met, stretch"
    return "met" if reached(must) else "missed"


def judge(row: Row) -> list[dict[str, Any]]:
    """The bars that hold at each shape, with this row's values."""
    return [_entry(bar, value_of(row, bar.what)) for bar in _bars_of(row) if bar.over == "each"]


def geomeans(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The bars over the geometric mean, each with room, check, dtype and how many shapes."""
    found = []
    for bar in BARS:
        if bar.over != "geomean":
            continue
        entry = standing(bar, rows)
        if entry is None:
            continue
        known = [r for r in rows if bar in _bars_of(r) and value_of(r, bar.what) is not None]
        place = {"room": bar.room, "check": bar.check, "dtype": bar.dtype, "where": bar.where}
        found.append({**place, "shapes": len(known), **entry})
    return found


def standing(bar: Bar, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The bar over those of the rows that it speaks of: their geometric mean, or the worst of them.
    None where it speaks of none."""
    values = [value_of(row, bar.what) for row in rows if bar in _bars_of(row)]
    known = [value for value in values if value is not None]
    if not values:
        return None
    if not known:
        return _entry(bar, None)
    if bar.over == "geomean":
        return _entry(bar, math.exp(sum(map(math.log, known)) / len(known)))
    return _entry(bar, max(known) if bar.sense == "<=" else min(known))


def _bars_of(row: Row) -> list[Bar]:
    kind = "cpu" if row.device == "cpu" else "gpu"
    return [
        bar
        for bar in BARS
        if (bar.on, bar.room, bar.check) == (kind, row.room, row.check)
        and bar.dtype in (row.dtype, "")
        and all(row.shape.get(letter) == size for letter, size in bar.where.items())
    ]


def _entry(bar: Bar, value: float | None) -> dict[str, Any]:
    return {
        "what": bar.what, "sense": bar.sense, "must": bar.must, "stretch": bar.stretch,
        "over": bar.over, "value": value, "met": verdict(value, bar.sense, bar.must, bar.stretch),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------
# CPU. dtype "" is any.
# ------------------------------------------------------------------------------------------------


def _cpu(room: str, check: str, dtype: str, what: str, sense: str, must: float, *rest: Any, **more):
    return Bar("cpu", room, check, dtype, what, sense, must, *rest, **more)


def _gpu(room: str, check: str, what: str, sense: str, must: float, *rest: Any, **more):
    return Bar("gpu", room, check, "bf16", what, sense, must, *rest, **more)


_R16 = {"R": 16}
BARS: list[Bar] = [
    _cpu("lora_linear", FORWARD, "bf16", "ours/frozen", "<=", 1.08, 1.00, "geomean", _R16),
    _cpu("lora_linear", FORWARD, "bf16", "ours/frozen", "<=", 1.25, 1.10, "each", _R16),
    _cpu("lora_linear", TRAIN, "bf16", "ours/frozen", "<=", 1.15, 1.05, "geomean", _R16),
    _cpu("lora_linear", TRAIN, "bf16", "ours/frozen", "<=", 1.30, 1.15, "each", _R16),
    _cpu("lora_linear", TRAIN, "fp32", "ours/frozen", "<=", 1.10, 1.05, "geomean", _R16),
    _cpu("lora_linear", TRAIN, "fp32", "ours/frozen", "<=", 1.20, 1.05, "each", _R16),
    _cpu("lora_linear", TRAIN, "bf16", "peft/ours", ">=", 1.8, 2.1, "geomean", _R16),
    _cpu("lora_linear", TRAIN, "fp32", "peft/ours", ">=", 1.2, 1.3, "geomean", _R16),
    _cpu("lora_linear", TRAIN, "", "peft/ours", ">=", 1.0),
    _cpu("lora_linear", DROPOUT, "bf16", "peft/ours", ">=", 3.0, 3.5, "geomean", _R16),
    _cpu("lora_linear", DROPOUT, "fp32", "peft/ours", ">=", 1.5, 1.7, "geomean", _R16),
    _cpu("lora_linear", DROPOUT, "", "peft/ours", ">=", 1.0),
    _cpu("lora_linear", TRAIN, "bf16", "ours/full", "<=", 0.55, 0.50, "geomean", _R16),
    _cpu("lora_linear", TRAIN, "fp32", "ours/full", "<=", 0.72, 0.68, "geomean", _R16),
    _cpu("lora_linear", DROPOUT, "", "dropout_points", "<=", 6.0, 3.0),
    _cpu("lora_linear", PROJECTIONS, "", "three calls/ours", ">=", 1.1, 1.2),
    _cpu("lora_linear", PROJECTIONS, "bf16", "saved_bytes_per_element", "<=", 2.1, 2.1),
    _cpu("lora_linear", ONE_TOKEN, "", "ours/frozen", "<=", 1.3),
    # A block of three layers has the layer's bars, and keeps no more than autograd of a frozen one.
    _cpu("lora_mlp", FORWARD, "bf16", "ours/frozen", "<=", 1.08, 1.00, "geomean", _R16),
    _cpu("lora_mlp", TRAIN, "bf16", "ours/frozen", "<=", 1.15, 1.05, "geomean", _R16),
    _cpu("lora_mlp", TRAIN, "fp32", "ours/frozen", "<=", 1.10, 1.05, "geomean", _R16),
    _cpu("lora_mlp", TRAIN, "bf16", "peft/ours", ">=", 1.8, 2.1, "geomean", _R16),
    _cpu("lora_mlp", TRAIN, "fp32", "peft/ours", ">=", 1.2, 1.3, "geomean", _R16),
    _cpu("lora_mlp", TRAIN, "", "peft/ours", ">=", 1.0),
    _cpu("lora_mlp", DROPOUT, "bf16", "peft/ours", ">=", 3.0, 3.5, "geomean", _R16),
    _cpu("lora_mlp", DROPOUT, "fp32", "peft/ours", ">=", 1.5, 1.7, "geomean", _R16),
    _cpu("lora_mlp", TRAIN, "bf16", "ours/full", "<=", 0.55, 0.50, "geomean", _R16),
    _cpu("lora_mlp", TRAIN, "fp32", "ours/full", "<=", 0.72, 0.68, "geomean", _R16),
    _cpu("lora_mlp", DROPOUT, "", "dropout_points", "<=", 6.0, 3.0),
    _cpu("lora_mlp", TRAIN, "", "saved_over_frozen", "<=", 1.0),
    _cpu("linear_log_prob", FORWARD, "bf16", "ours/mm", "<=", 0.80, 0.60, "geomean"),
    _cpu("linear_log_prob", FORWARD, "bf16", "ours/mm", "<=", 0.95, 0.60),
    _cpu("linear_log_prob", FORWARD, "fp32", "ours/mm", "<=", 1.15, 1.05),
    _cpu("linear_log_prob", TRAIN, "bf16", "ours/mm", "<=", 1.7, 1.3),
    _cpu("linear_log_prob", TRAIN, "fp32", "ours/mm", "<=", 2.3, 2.1),
    _cpu("linear_log_prob", TRAIN, "", "eager/ours", ">=", 3.0, 5.0),
    _cpu("linear_kl", TRAIN, "bf16", "ours/mm", "<=", 3.0, 2.4),
    _cpu("policy_loss", TRAIN, "bf16", "ours/mm", "<=", 1.7, 1.3),
    _cpu("policy_loss", TRAIN, "fp32", "ours/mm", "<=", 2.3, 2.1),
    _cpu("policy_loss", TRAIN, "", "eager/ours", ">=", 3.0, 5.0),
    _cpu("policy_loss", POLICY_KL, "bf16", "ours/mm", "<=", 3.0, 2.4),
    *(
        _cpu(room, check, "", what, "<=", must, stretch)
        for room, check in (
            ("linear_log_prob", FORWARD), ("linear_log_prob", TRAIN), ("linear_kl", FORWARD),
            ("linear_kl", TRAIN), ("policy_loss", TRAIN), ("policy_loss", POLICY_KL),
        )
        for what, must, stretch in (("memory", 32 * MIB, 16 * MIB), ("error", 1e-5, 5e-6))
    ),
    _cpu("reward_step", "step", "bf16", "ours/full", "<=", 0.60, 0.50),
    _cpu("reward_step", "step", "fp32", "ours/full", "<=", 0.72, 0.66),
    _cpu("reward_step", "step", "", "memory ours/full", "<=", 0.50, 0.35),
    _cpu("reward_step", "step", "bf16", "ours/peft", "<=", 0.45, 0.38),
    _cpu("reward_step", "step", "bf16", "memory ours/peft", "<=", 0.42, 0.33),
    *(
        _cpu("reward_step", f"step in TRL's RewardTrainer{how}", dtype, what, "<=", must, stretch)
        for how, dtype, what, must, stretch in (
            ("", "bf16", "ours/trl", 0.45, 0.38), ("", "bf16", "memory ours/trl", 0.42, 0.33),
            ("", "fp32", "ours/trl", 1.0, 1.0), ("", "fp32", "memory ours/trl", 1.0, 1.0),
            (", checkpointing", "", "ours/trl", 1.0, 1.0),
            (", checkpointing", "", "memory ours/trl", 1.0, 1.0),
        )
    ),
    *(
        _cpu("policy_step", "step", "", f"{what}/{theirs}", "<=", must, stretch)
        for theirs in ("full", "eager")
        for what, must, stretch in (("ours", 0.70, 0.55), ("memory ours", 0.35, 0.25))
    ),
    _cpu("rollout", ONE_LENGTH, "", "transformers/ours", ">=", 1.5),
    _cpu("rollout", ENDING, "", "transformers/ours", ">=", 1.5),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------
# GPU
# ------------------------------------------------------------------------------------------------

_SQUARE, _WIDE = {"D": 4096, "O": 4096}, {"D": 4096, "O": 14336}
BARS += [
    *(
        _gpu("lora_linear", TRAIN, "ours/frozen", "<=", must, stretch, where={**shape, "R": rank})
        for shape, rank, must, stretch in (
            (_SQUARE, 16, 1.12, 1.09), (_SQUARE, 64, 1.14, 1.11), (_SQUARE, 256, 1.27, 1.22),
            (_WIDE, 16, 1.08, 1.06), (_WIDE, 64, 1.09, 1.07), (_WIDE, 256, 1.18, 1.14),
        )
    ),
    _gpu("lora_linear", DROPOUT, "dropout_points", "<=", 3.0, 1.5),
    _gpu("lora_linear", TRAIN, "peft/ours", ">=", 1.20, 1.24, where={**_SQUARE, "R": 16}),
    _gpu("lora_linear", DROPOUT, "peft/ours", ">=", 1.28, 1.33, where={**_SQUARE, "R": 16}),
    _gpu("lora_linear", f"{TRAIN}, compiled", "peft compiled/ours", ">=", 1.10, 1.15),
    _gpu("lora_linear", TRAIN, "ours/full", "<=", 0.75, 0.72),
    _gpu("lora_linear", TRAIN, "ours/addmm", "<=", 1.0),
    _gpu("lora_linear", DROPOUT, "ours/addmm", "<=", 1.0),
    _gpu("lora_linear", PROJECTIONS, "ours/addmm", "<=", 1.0),
    _gpu("lora_linear", FORWARD, "ours/frozen", "<=", 1.3, 1.15),
    _gpu("lora_linear", FORWARD, "ours/addmm", "<=", 1.0),
    _gpu("linear_log_prob", FORWARD, "ours/mm", "<=", 1.20, 1.08),
    _gpu("linear_log_prob", FORWARD, "moved, ours", "<=", 0.0),
    _gpu("linear_log_prob", TRAIN, "trl/ours", ">=", 1.3, 1.5),
    _gpu("policy_loss", TRAIN, "ours/mm", "<=", 2.4, 2.2),
    _gpu("policy_loss", POLICY_KL, "ours/mm", "<=", 3.7, 3.3),
    *(
        _gpu(room, check, what, "<=", must, stretch)
        for room, check in (
            ("linear_log_prob", FORWARD), ("linear_log_prob", TRAIN), ("linear_kl", TRAIN),
            ("policy_loss", TRAIN), ("policy_loss", POLICY_KL),
        )
        for what, must, stretch in (("memory", 256 * MIB, 128 * MIB), ("error", 2e-3, 2e-4))
    ),
    *(
        _gpu("log_prob", check, "share_of_copy_bandwidth", ">=", 0.85, 0.93)
        for check in (FORWARD, TRAIN, f"kl, {TRAIN}")
    ),
    _gpu("reward_step", "step", "full/ours", ">=", 1.6),
    _gpu("reward_step", "step", "memory ours/full", "<=", 0.35),
    _gpu("policy_step", "step", "full/ours", ">=", 1.5),
    _gpu("policy_step", "step", "memory ours/full", "<=", 0.25),
    _gpu("rollout", ONE_LENGTH, "transformers/ours", ">=", 2.0),
    _gpu("rollout", ENDING, "transformers/ours", ">=", 2.0),
]  # fmt: skip
