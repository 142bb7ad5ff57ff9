"""A frozen linear layer plus its low-rank adapter, in one op.

Replaces, for one projection or for n projections that read the same x,

    y = F.linear(x, weight, bias) + scale * F.linear(F.linear(dropout(x), a), b)

The math, with x (N, D), weight (O, D), a (R, D), b (O, R), x' = dropout(x):

    s  = x' a^T                       one product for all projections: their a's are stacked
    y  = x weight^T + bias + scale * s b^T
    ds = scale * dy b                 one pass over dy, which also gives
    db = scale * dy^T s
    da = ds^T x'
    dx = dy weight + dropout'(ds a)

Saved for backward: x and s, nothing else. s is (N, sum of R), so with r16 on q, k and v of a
2048-wide model in bfloat16 that is 2.05 bytes per element of x. No mask and no dropped copy of x
is kept: the mask is a function of (seed, row, column) and is computed again in backward. There is
no dweight: the base is frozen, and that is where the savings come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import autocast, check_float, check_projection, check_range
from .._dropout import new_seed
from .._library import lora_linear_in_cpp
from . import op as _op  # noqa: F401 - registers the op

__all__ = ["lora_linear"]


def lora_linear(
    x: Tensor,  # (..., D)
    weight: Tensor | Sequence[Tensor],  # (O, D), frozen
    a: Tensor | Sequence[Tensor],  # (R, D)
    b: Tensor | Sequence[Tensor],  # (O, R)
    *,
    bias: Tensor | Sequence[Tensor | None] | None = None,  # (O,)
    scale: float | Sequence[float] = 1.0,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, ...]:
    """x weight^T + bias + scale * dropout(x) a^T b^T.

    Args:
        x: (..., D), float32, bfloat16, float16, or float64 (which runs on the reference).
        weight: (O, D) in x's dtype, frozen; any strides, so a transposed Conv1D weight is fine.
        a, b: (R, D) and (O, R), in x's dtype or float32. Gradients come in their own dtype.
        bias: (O,) or None. Gets a gradient when it requires one.
        scale: alpha / R, or alpha / sqrt(R) for rsLoRA.
        dropout_p: probability in [0, 1) of dropping an element of x on the adapter's way only.
            The seed comes from torch's generator, so torch.manual_seed repeats a run and
            activation checkpointing draws the same mask again.

    weight, a, b, bias and scale may each be a sequence of n: n projections that share x (q, k, v;
    gate, up), computed in one call with x read once for all adapters. They share one dropout mask.

    Returns:
        (..., O) in x's dtype, contiguous; for sequences a tuple of n such tensors.

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong, or weight requires grad.
    """
    if dropout_p == 0.0 and not torch.compiler.is_compiling():
        y = lora_linear_in_cpp(x, weight, a, b, bias, scale)
        if y is not None:
            return y
    if isinstance(weight, Tensor):
        return _lora_linear(x, [weight], [a], [b], [bias], [scale], dropout_p)[0]
    n = len(weight)
    biases = [None] * n if bias is None else list(bias)
    scales = [scale] * n if isinstance(scale, (int, float)) else list(scale)
    for name, values in (("a", a), ("b", b), ("bias", biases), ("scale", scales)):
        if isinstance(values, Tensor) or len(values) != n:
            given = "one tensor" if isinstance(values, Tensor) else f"{len(values)} entries"
            raise ValueError(f"{name} has {given}; wanted {n}, one for each weight")
    return _lora_linear(x, list(weight), list(a), list(b), biases, scales, dropout_p)


def _lora_linear(
    x: Tensor,
    weight: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    bias: list[Tensor | None],
    scale: list[float],
    dropout_p: float,
) -> tuple[Tensor, ...]:
    x, *weight = _checked(x, weight, a, b, bias, dropout_p)
    if bias.count(None) == len(bias):
        bias = []
    elif any(t is None or t.dtype != x.dtype for t in bias):
        bias = [
            w.new_zeros(w.shape[0]) if t is None else t.to(x.dtype)
            for t, w in zip(bias, weight, strict=True)
        ]
    seed = new_seed(x.device) if dropout_p > 0.0 else None
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y, _ = torch.ops.perl_kernels.lora_linear(
        flat, weight, bias, a, b, [float(k) for k in scale], dropout_p, seed
    )
    return tuple(y) if flat is x else tuple(t.view(*x.shape[:-1], t.shape[-1]) for t in y)


def _checked(x, weight, a, b, bias, dropout_p) -> tuple[Tensor, ...]:
    """x and the weights, cast under autocast, or an error that says what is wrong."""
    check_float("x", x)
    if x.ndim < 1:
        raise ValueError("x is a scalar; wanted (..., D)")
    x, *weight = autocast(x, *weight)
    check_range("dropout_p", dropout_p, 0.0, 1.0, "a probability in [0, 1)")
    for i in range(len(weight)):
        at = f"[{i}]" if len(weight) > 1 else ""
        check_projection(x, weight[i], a[i], b[i], bias[i], suffix=at)
    return x, *weight
