"""multi_lora_linear in the dispatcher: schema, fake, backends, autograd.

`a`, `b` and `scale` have one entry per adapter; `adapter` (N,) says which one each row of x takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._dropout import drop, keep_mask
from .._library import backend_of, define, define_twins, implement

# ------------------------------------------------------------------------------------------------
# Schema. s (N, largest R) is what the adapters' a make of dropout(x): first the rows of adapter 0
# in the order in which x has them, then those of adapter 1, and so on; what is left over is 0.
# ------------------------------------------------------------------------------------------------

define(
    "multi_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b,"
    " float[] scale, Tensor adapter, float dropout_p, Tensor? seed) -> (Tensor y, Tensor s)"
)
define(
    "multi_lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor[] a, Tensor[] b,"
    " float[] scale, Tensor adapter, float dropout_p, Tensor? seed, Tensor s, bool need_dx,"
    " bool need_dab) -> (Tensor dx, Tensor[] da, Tensor[] db)"
)
define_twins("multi_lora_linear", "cpu")
define_twins("multi_lora_linear_backward", "cpu")


# ------------------------------------------------------------------------------------------------
# Fakes
# ------------------------------------------------------------------------------------------------


def _largest_rank(a: list[Tensor]) -> int:
    return max(t.shape[0] for t in a)


def _fake_forward(x, weight, bias, a, b, scale, adapter, dropout_p, seed):
    rows = x.shape[0]
    return x.new_empty(rows, weight.shape[0]), x.new_empty(rows, _largest_rank(a))


def _fake_backward(
    dy, x, weight, a, b, scale, adapter, dropout_p, seed, s, need_dx, need_dab
):  # fmt: skip
    dx = x.new_empty(x.shape if need_dx else (0,))
    if not need_dab:
        return dx, [], []
    return dx, [t.new_empty(t.shape) for t in a], [t.new_empty(t.shape) for t in b]


# ------------------------------------------------------------------------------------------------
# Backends
# ------------------------------------------------------------------------------------------------


def _forward(*arguments):
    backend = backend_of(arguments[0])
    if backend == "cpu":
        return torch.ops.perl_kernels.multi_lora_linear_cpu(*arguments)
    if backend in ("triton", "cuda"):
        from . import triton as kernels

        return kernels.forward(*arguments)
    return _forward_torch(*arguments)


def _backward(*arguments):
    backend = backend_of(arguments[0])
    if backend == "cpu":
        return torch.ops.perl_kernels.multi_lora_linear_backward_cpu(*arguments)
    if backend in ("triton", "cuda"):
        from . import triton as kernels

        return kernels.backward(*arguments)
    return _backward_torch(*arguments)


def _segments(adapter: Tensor, count: int) -> Iterator[tuple[int, Tensor, slice]]:
    """Of each adapter: its number, its rows, and where they lie when sorted by adapter."""
    if adapter.numel() and adapter.device.type == "cpu":
        for worst in (adapter.min().item(), adapter.max().item()):
            if not -1 <= worst < count:
                raise ValueError(
                    f"adapter has {worst}; wanted -1, or the number of one of {count} adapters"
                )
    first = 0
    for g in range(count):
        rows = (adapter == g).nonzero().squeeze(1)
        yield g, rows, slice(first, first + len(rows))
        first += len(rows)


def _forward_torch(x, weight, bias, a, b, scale, adapter, dropout_p, seed):
    y = torch.nn.functional.linear(x, weight, bias)
    s, dropped = x.new_zeros(x.shape[0], _largest_rank(a)), drop(x, dropout_p, seed)
    for g, rows, place in _segments(adapter, len(a)):
        s_g = dropped[rows] @ a[g].to(x.dtype).T
        s[place, : a[g].shape[0]] = s_g
        y[rows] = y[rows].addmm_(s_g, b[g].to(x.dtype).T, alpha=scale[g])
    return y, s


def _scaled_mm(scale: float, one: Tensor, other: Tensor) -> Tensor:
    """scale * one @ other, rounded once."""
    return torch.addmm(one.new_zeros(()), one, other, beta=0, alpha=scale)


def _backward_torch(
    dy, x, weight, a, b, scale, adapter, dropout_p, seed, s, need_dx, need_dab
):  # fmt: skip
    dx = dy @ weight if need_dx else x.new_empty(0)
    dropped = drop(x, dropout_p, seed) if need_dab else None
    kept = keep_mask(seed, *x.shape, dropout_p) if dropout_p > 0.0 and need_dx else None
    da, db = [], []
    for g, rows, place in _segments(adapter, len(a)):
        dy_g = dy[rows]
        ds = _scaled_mm(scale[g], dy_g, b[g].to(x.dtype))
        if need_dab:
            da.append((ds.T @ dropped[rows]).to(a[g].dtype))
            s_g = s[place, : a[g].shape[0]]
            db.append(_scaled_mm(scale[g], dy_g.T, s_g).to(b[g].dtype))
        if kept is not None:
            dx[rows] += (ds @ a[g].to(x.dtype)) * kept[rows] * (1.0 / (1.0 - dropout_p))
        elif need_dx:
            dx[rows] = dx[rows].addmm_(ds, a[g].to(x.dtype))
    return dx, da, db


# ------------------------------------------------------------------------------------------------
# Autograd
# ------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, weight, _, a, b, scale, adapter, dropout_p, seed = inputs
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.n, ctx.scale, ctx.dropout_p = len(a), scale, dropout_p
    ctx.save_for_backward(x, weight, adapter, seed, s, *a, *b)


def _autograd_backward(ctx, dy, _ds):
    x, weight, adapter, seed, s, *rest = ctx.saved_tensors
    a, b = rest[: ctx.n], rest[ctx.n :]
    need_x, _, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
    dx, da, db = torch.ops.perl_kernels.multi_lora_linear_backward(
        dy, x, weight, a, b, ctx.scale, adapter, ctx.dropout_p, seed, s,
        need_x, any(need_a) or any(need_b),
    )  # fmt: skip
    nothing = [None] * ctx.n
    return (
        dx if need_x else None,
        None,
        dy.sum(0) if need_bias else None,
        da or nothing,
        db or nothing,
        *[None] * 4,
    )


implement("multi_lora_linear", _forward, _fake_forward, _setup_context, _autograd_backward)
implement("multi_lora_linear_backward", _backward, _fake_backward)
