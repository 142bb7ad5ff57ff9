"""lora_linear in the dispatcher: schema, fake, backends, autograd.

Every list has one entry per projection; all of them read the same x. `bias` may be empty instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dropout import drop, keep_mask
from .._library import backend_of, define, define_twins, implement

# ------------------------------------------------------------------------------------------------
# Schema. s (N, sum of R) is dropout(x) a^T of all projections side by side.
# ------------------------------------------------------------------------------------------------

define(
    "lora_linear(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] a, Tensor[] b, float[] scale,"
    " float dropout_p, Tensor? seed) -> (Tensor[] y, Tensor s)"
)
define(
    "lora_linear_backward(Tensor[] dy, Tensor x, Tensor[] weight, Tensor[] a, Tensor[] b,"
    " float[] scale, float dropout_p, Tensor? seed, Tensor s, bool need_dx, bool need_dab)"
    " -> (Tensor dx, Tensor[] da, Tensor[] db)"
)
define_twins("lora_linear", "cpu")
define_twins("lora_linear_backward", "cpu")
# The two thin products of csrc/cuda; triton.py chooses between them and its own.
define("lora_linear_shrink_cuda(Tensor x, Tensor a, float dropout_p, Tensor? seed) -> Tensor s")
define(
    "lora_linear_ds_db_cuda(Tensor dy, Tensor b, Tensor s, float scale, Tensor(a!) ds,"
    " Tensor(b!)? db) -> ()"
)


# ------------------------------------------------------------------------------------------------
# Fakes
# ------------------------------------------------------------------------------------------------


def _fake_forward(x, weight, bias, a, b, scale, dropout_p, seed):
    rows = x.shape[0]
    y = [x.new_empty(rows, w.shape[0]) for w in weight]
    return y, x.new_empty(rows, sum(t.shape[0] for t in a))


def _fake_backward(dy, x, weight, a, b, scale, dropout_p, seed, s, need_dx, need_dab):
    dx = x.new_empty(x.shape if need_dx else (0,))
    if not need_dab:
        return dx, [], []
    return dx, [t.new_empty(t.shape) for t in a], [t.new_empty(t.shape) for t in b]


# ------------------------------------------------------------------------------------------------
# Backends
# ------------------------------------------------------------------------------------------------


def _forward(x, weight, bias, a, b, scale, dropout_p, seed):
    backend = backend_of(x)
    if backend == "cpu":
        return torch.ops.perl_kernels.lora_linear_cpu(x, weight, bias, a, b, scale, dropout_p, seed)
    if backend in ("triton", "cuda"):
        from . import triton as kernels

        return kernels.forward(x, weight, bias, a, b, scale, dropout_p, seed)
    return _forward_torch(x, weight, bias, a, b, scale, dropout_p, seed)


def _backward(dy, x, weight, a, b, scale, dropout_p, seed, s, need_dx, need_dab):
    arguments = (dy, x, weight, a, b, scale, dropout_p, seed, s, need_dx, need_dab)
    backend = backend_of(x)
    if backend == "cpu":
        return torch.ops.perl_kernels.lora_linear_backward_cpu(*arguments)
    if backend in ("triton", "cuda"):
        from . import triton as kernels

        return kernels.backward(*arguments)
    return _backward_torch(*arguments)


def _forward_torch(x, weight, bias, a, b, scale, dropout_p, seed):
    s = drop(x, dropout_p, seed) @ torch.cat(a).to(x.dtype).T
    y = []
    for i, s_i in enumerate(s.split([t.shape[0] for t in a], dim=1)):
        base = torch.nn.functional.linear(x, weight[i], bias[i] if bias else None)
        y.append(base.addmm_(s_i, b[i].to(x.dtype).T, alpha=scale[i]))
    return y, s


def _scaled_mm(scale: float, one: Tensor, other: Tensor) -> Tensor:
    """scale * one @ other, rounded once."""
    return torch.addmm(one.new_zeros(()), one, other, beta=0, alpha=scale)


def _backward_torch(dy, x, weight, a, b, scale, dropout_p, seed, s, need_dx, need_dab):
    ds = [_scaled_mm(scale[i], dy[i], b[i].to(x.dtype)) for i in range(len(dy))]
    da, db = [], []
    if need_dab:
        dropped = drop(x, dropout_p, seed)
        s_parts = s.split([t.shape[0] for t in a], dim=1)
        for i in range(len(dy)):
            da.append((ds[i].T @ dropped).to(a[i].dtype))
            db.append(_scaled_mm(scale[i], dy[i].T, s_parts[i]).to(b[i].dtype))
    if not need_dx:
        return x.new_empty(0), da, db
    dx = torch.cat(ds, dim=1) @ torch.cat(a).to(x.dtype)
    if dropout_p > 0.0:
        dx = dx * keep_mask(seed, *x.shape, dropout_p) * (1.0 / (1.0 - dropout_p))
    for i in range(len(dy)):
        dx = dx.addmm_(dy[i], weight[i])
    return dx, da, db


# ------------------------------------------------------------------------------------------------
# Autograd
# ------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, weight, bias, a, b, scale, dropout_p, seed = inputs
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.n, ctx.has_bias = len(weight), bool(bias)
    ctx.scale, ctx.dropout_p = scale, dropout_p
    ctx.save_for_backward(x, s, seed, *weight, *a, *b)


def _autograd_backward(ctx, dy, _ds):
    x, s, seed, *rest = ctx.saved_tensors
    n = ctx.n
    weight, a, b = rest[:n], rest[n : 2 * n], rest[2 * n :]
    need_x, _, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
    dx, da, db = torch.ops.perl_kernels.lora_linear_backward(
        dy, x, weight, a, b, ctx.scale, ctx.dropout_p, seed, s, need_x, any(need_a) or any(need_b)
    )
    nothing = [None] * n
    dbias = [g.sum(0) if need else None for g, need in zip(dy, need_bias, strict=False)]
    return (
        dx if need_x else None,
        nothing,
        dbias if ctx.has_bias else [],
        da or nothing,
        db or nothing,
        None,
        None,
        None,
    )


implement(
    "lora_linear", _forward, _fake_forward, _setup_context, _autograd_backward,
    dispatched_in_cpp=True,
)  # fmt: skip
implement("lora_linear_backward", _backward, _fake_backward, dispatched_in_cpp=True)
