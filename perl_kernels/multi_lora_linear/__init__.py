"""A frozen linear layer whose rows each go through a low-rank adapter of their own, in one op.

Replaces, for G adapters in one batch,

    y = F.linear(x, weight, bias)
    for g in range(G):
        rows = (adapter == g).nonzero().squeeze(1)
        y[rows] += scale[g] * F.linear(F.linear(dropout(x[rows]), a[g]), b[g])

The math, with x (N, D), weight (O, D), a_g (R_g, D), b_g (O, R_g), x' = dropout(x), X_g the rows of
x that name adapter g, and the same letter for those rows of any other matrix:

    S_g  = X'_g a_g^T
    y    = x weight^T + bias               one product for all rows, in their own order
    Y_g += scale_g * S_g b_g^T
    dS_g = scale_g * dY_g b_g
    db_g = scale_g * dY_g^T S_g
    da_g = dS_g^T X'_g
    dx   = dy weight
    dX_g += dropout'(dS_g a_g)

No row is multiplied by an adapter that it does not name: the order of the rows by adapter is found
first and each adapter takes its stretch of it, so the thin products cost 6 N R (D + O) operations
however many adapters there are. Sums over rows run in that order, without atomics: the same bits
every time.

Saved for backward: x, s and the N numbers in `adapter`. s is (N, the largest R), rows in the order
of their adapters. The dropout mask is a function of (seed, row, column) with the row's place in x,
so it does not depend on which adapters the rows name, and it is computed again in backward.

The names shrink and expand for the two thin products, and the segments of rows, are those of
Chen et al., "Punica: multi-tenant LoRA serving", arXiv 2310.18547; there is no backward there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import autocast, check_float, check_projection, check_range, shape_of
from .._dropout import new_seed
from . import op as _op  # noqa: F401 - registers the op

__all__ = ["multi_lora_linear"]


def multi_lora_linear(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (O, D), frozen
    a: Sequence[Tensor],  # (R_g, D) each
    b: Sequence[Tensor],  # (O, R_g) each
    adapter: Tensor,  # (...,) or (B,), int64
    *,
    bias: Tensor | None = None,  # (O,)
    scale: float | Sequence[float] = 1.0,
    dropout_p: float = 0.0,
) -> Tensor:  # (..., O)
    """x weight^T + bias, and for each row scale_g * dropout(x) a_g^T b_g^T of the g it names.

    Args:
        x: (..., D), float32, bfloat16, float16, or float64 (which runs on the reference).
        weight: (O, D) in x's dtype, frozen; any strides.
        a, b: G adapters, (R_g, D) and (O, R_g), each with a rank of its own, in x's dtype or
            float32. Gradients come in their own dtype; an adapter that no row names gets zeros.
        adapter: one number for each row of x, shape x.shape[:-1]; or (B,) for an x (B, ..., D), one
            for each entry of its first dimension. 0 .. G - 1, or -1 for the base alone.
        bias: (O,) or None. Gets a gradient when it requires one.
        scale: alpha / R, or alpha / sqrt(R) for rsLoRA; one for all adapters or one for each.
        dropout_p: probability in [0, 1) of dropping an element of x on the adapters' way only; one
            mask for all. The seed comes from torch's generator, so torch.manual_seed repeats a run
            and activation checkpointing draws the same mask again.

    Returns:
        (..., O) in x's dtype, contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong, or weight requires grad.
            On the CPU also a number in `adapter` below -1 or from G on; on a GPU, where looking
            would make the host wait, such a row is one of the base alone.
    """
    check_float("x", x)
    if x.ndim < 1:
        raise ValueError("x is a scalar; wanted (..., D)")
    check_float("weight", weight)
    x, weight = autocast(x, weight)
    check_range("dropout_p", dropout_p, 0.0, 1.0, "a probability in [0, 1)")
    for name, values in (("a", a), ("b", b)):
        if isinstance(values, Tensor):
            raise TypeError(
                f"{name} is one tensor; wanted a sequence of them, one for each adapter"
            )
    scale = [scale] * len(a) if isinstance(scale, (int, float)) else list(scale)
    for name, values in (("b", b), ("scale", scale)):
        if len(values) != len(a):
            raise ValueError(f"{name} has {len(values)} entries; wanted {len(a)}, as a has")
    if not a:
        raise ValueError("a is empty; wanted at least one adapter")
    for g in range(len(a)):
        check_projection(x, weight, a[g], b[g], bias, suffix=f"[{g}]" if len(a) > 1 else "")
    seed = new_seed(x.device) if dropout_p > 0.0 else None
    y, _ = torch.ops.perl_kernels.multi_lora_linear(
        x.reshape(-1, x.shape[-1]), weight, None if bias is None else bias.to(x.dtype),
        list(a), list(b), [float(k) for k in scale], _one_for_each_row(adapter, x), dropout_p, seed,
    )  # fmt: skip
    return y.view(*x.shape[:-1], y.shape[-1])


def _one_for_each_row(adapter: Tensor, x: Tensor) -> Tensor:  # (N,)
    if not isinstance(adapter, Tensor):
        raise TypeError(f"adapter is a {type(adapter).__name__}; wanted an int64 tensor")
    if adapter.dtype != torch.int64:
        raise TypeError(f"adapter is {adapter.dtype}; wanted int64")
    if adapter.device != x.device:
        raise ValueError(
            f"adapter is on {adapter.device} and x on {x.device}; move them to one device"
        )
    rows = x.shape[:-1]
    if adapter.shape == rows:
        return adapter.reshape(-1)
    if adapter.ndim == 1 and adapter.shape == rows[:1]:
        return adapter.reshape(-1, *[1] * (len(rows) - 1)).expand(rows).reshape(-1)
    wanted = f"{shape_of(x[..., 0])}"
    if len(rows) > 1:
        wanted += f" or ({rows[0]},)"
    raise ValueError(f"adapter has shape {shape_of(adapter)}; wanted {wanted}, one for each row")
