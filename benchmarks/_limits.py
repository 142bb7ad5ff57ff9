"""The physical limit beside every row: what no method avoids, at the machine's own rates.

A row's limit is the larger of its FLOPs over the rate of the library's matrix product and its
bytes over that of a large copy, both measured in the same run (`_measure.ceilings`). The share of
the limit that a row reaches is that time over its own; over 100 %, it read from a cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks._bars import ONE_LENGTH, PROJECTIONS, TRAIN
from benchmarks._results import Row

Ceilings = Sequence[Sequence]  # (name, unit, value); a product's name begins with its dtype
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes


# Of a training step: how often all tokens go through the products of the decoder, forward or to dx,
# how often through as many products as causal attention has in a forward pass, and answers' tokens
# through the head.
PASSES = {
    "reward_step": (2, 3, 0),
    # sampling, reward and anchor, forward; value and policy, forward and backward
    "policy_step": (7, 9, 4),
}


def flops(row: Row) -> float | None:
    """That no method can avoid; adapters are small and not counted in a whole model's."""
    rate = row.measures.get("flop_per_s")
    if rate is not None:
        return rate * row.median_s
    s = row.shape
    if row.room in PASSES:
        products, attention, head = PASSES[row.room]
        new = s["T"] if "P" in s else 0  # tokens of an answer
        length = s.get("P", 0) + s["T"]
        tokens, drawn, squares = s["B"] * length, s["B"] * new, s["B"] * length**2
    elif row.room == "rollout":
        products = attention = head = 1
        drawn = row.measures["tokens"]
        prompts = s["B"] if row.check == ONE_LENGTH else 4 * s["B"]
        tokens, squares = prompts * s["P"] + drawn, prompts * s["P"] ** 2
    else:
        return None
    return (
        2.0 * products * tokens * _decoder(s)
        + 2.0 * attention * squares * s["H"] * s["L"]
        + 2.0 * head * drawn * s["H"] * s["V"]
    )


def _decoder(s: dict[str, int]) -> int:
    """Elements of a Llama's weights, embeddings and head left out."""
    return s["L"] * (4 * s["H"] ** 2 + 3 * s["H"] * s["F"])


def least_bytes(row: Row) -> float | None:
    """Every input read and every output written once, forward and backward, and all weights for
    each token that B rows draw; adapters are small and not counted. None for a training step."""
    if "byte_per_s" in row.measures:
        return row.measures["byte_per_s"] * row.median_s
    if row.room == "rollout":
        weights = _decoder(row.shape) + row.shape["H"] * row.shape["V"]
        return float(weights * WIDTH[row.dtype] * row.measures["tokens"] / row.shape["B"])
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
