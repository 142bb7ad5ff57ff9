"""The physical limit beside every row: what no method avoids, at the machine's own rates.

A row's limit is the larger of its FLOPs over the rate of the library's matrix product and its
bytes over that of a large copy, both measured in the same run (`_measure.ceilings`). The share of
the limit that a row reaches is that time over its own; over 100 %, it read from a cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks._bars import PROJECTIONS, TRAIN
from benchmarks._results import Row

Ceilings = Sequence[Sequence]  # (name, unit, value); a product's name begins with its dtype
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes


def flops(row: Row) -> float | None:
    """That no method can avoid."""
    rate = row.measures.get("flop_per_s")
    return None if rate is None else rate * row.median_s


def least_bytes(row: Row) -> float | None:
    """Every input read and every output written once, forward and backward; adapters are small and
    not counted. None for what is more than one op."""
    if "byte_per_s" in row.measures:
        return row.measures["byte_per_s"] * row.median_s
    n, d, o, h, v, f = (row.shape.get(letter, 0) for letter in "NDOHVF")
    o *= 3 if row.check == PROJECTIONS else 1
    elements = {
        "lora_linear": n * d + d * o + n * o,
        "multi_lora_linear": n * d + d * o + n * o,
        "lora_mlp": 2 * n * d + 3 * d * f,
        "linear_log_prob": n * h + h * v,
        "policy_loss": n * h + h * v,
        "linear_kl": 2 * n * h + h * v,
    }.get(row.room)
    passes = 2 if TRAIN in row.check else 1
    return None if elements is None else float(passes * elements * WIDTH[row.dtype])


def rates(ceilings: Ceilings) -> dict[str, float]:
    """The ceilings by "copy" and by dtype."""
    return {name.split()[0]: value for name, _, value in ceilings}


def share_of_limit(row: Row, ceilings: Ceilings) -> float | None:
    """None where neither FLOPs nor bytes are known, or no ceiling for them."""
    reached = rates(ceilings)
    needs = ((flops(row), row.dtype), (least_bytes(row), "copy"))
    seconds = [need / reached[of] for need, of in needs if need and of in reached]
    return max(seconds) / row.median_s if seconds else None
