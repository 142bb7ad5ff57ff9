"""log_prob and kl in the dispatcher: schema, fake, backends, autograd. softcap 0 means none."""

from __future__ import annotations

import torch

from .._library import backend_of, define, define_twins, implement
from .._softmax import (
    RowState,
    Stats,
    check_targets,
    empty_stats,
    logits_gradient,
    statistics_dtype,
    transform,
    transform_slope,
)

# ------------------------------------------------------------------------------------------------
# Schema
# ------------------------------------------------------------------------------------------------

define(
    "logits_stats(Tensor logits, Tensor? target, Tensor? ref_logits,"
    " float temperature, float softcap, int ignore_index) -> (Tensor log_prob, Tensor peak,"
    " Tensor log_sum, Tensor entropy, Tensor ref_log_prob, Tensor gap, Tensor kl)"
)
define(
    "logits_grad(Tensor logits, Tensor? target, Tensor? ref_logits,"
    " Tensor peak, Tensor log_sum, Tensor entropy, Tensor gap,"
    " Tensor? d_log_prob, Tensor? d_entropy, Tensor? d_kl,"
    " float temperature, float softcap, int ignore_index) -> Tensor dlogits"
)
define_twins("logits_stats", "cpu", "cuda")
define_twins("logits_grad", "cpu", "cuda")


# ------------------------------------------------------------------------------------------------
# Fakes
# ------------------------------------------------------------------------------------------------


def _fake_stats(logits, target, ref_logits, temperature, softcap, ignore_index):
    return tuple(empty_stats(logits, logits.shape[0], target is not None, ref_logits is not None))


def _fake_grad(logits, *rest):
    return logits.new_empty(logits.shape)


# ------------------------------------------------------------------------------------------------
# Backends
# ------------------------------------------------------------------------------------------------

_TILE_ROWS, _TILE_COLUMNS = 1024, 4096
_OVER_BYTES = 16 * 2**20  # of gradient beside the logits before it takes their place: in cache


def _stats(logits, target, ref_logits, temperature, softcap, ignore_index):
    check_targets(target, logits.shape[1], ignore_index)
    arguments = (logits, target, ref_logits, temperature, softcap, ignore_index)
    backend = backend_of(logits)
    if backend == "cpu":
        return torch.ops.perl_kernels.logits_stats_cpu(*arguments)
    if backend == "cuda":
        return torch.ops.perl_kernels.logits_stats_cuda(*arguments)
    if backend == "triton":
        from . import triton as kernels

        return kernels.stats(*arguments)
    return _stats_torch(*arguments)


def _grad(*arguments):
    backend = backend_of(arguments[0])
    if backend == "cpu":
        return torch.ops.perl_kernels.logits_grad_cpu(*arguments)
    if backend == "cuda":
        return torch.ops.perl_kernels.logits_grad_cuda(*arguments)
    if backend == "triton":
        from . import triton as kernels

        return kernels.grad(*arguments)
    return _grad_torch(*arguments)


def _stats_torch(logits, target, ref_logits, temperature, softcap, ignore_index):
    out = empty_stats(logits, logits.shape[0], target is not None, ref_logits is not None)
    dtype = out.peak.dtype
    for i in range(0, logits.shape[0], _TILE_ROWS):
        rows = slice(i, i + _TILE_ROWS)
        t = None if target is None else target[rows]
        state = RowState(logits[rows].shape[0], out.peak)
        for j in range(0, logits.shape[1], _TILE_COLUMNS):
            tile = (rows, slice(j, j + _TILE_COLUMNS))
            z = transform(logits[tile].to(dtype), temperature, softcap)
            zq = None
            if ref_logits is not None:
                zq = transform(ref_logits[tile].to(dtype), temperature, softcap)
            state.fold(z, zq, t, j)
        state.write(out, rows, None if t is None else t != ignore_index)
    return tuple(out)


def _grad_torch(
    logits, target, ref_logits, peak, log_sum, entropy, gap,
    d_log_prob, d_entropy, d_kl, temperature, softcap, ignore_index,
):  # fmt: skip
    dtype = statistics_dtype(logits.dtype)
    dlogits = logits.new_empty(logits.shape)
    counted = None if target is None else target != ignore_index
    incoming = [
        None if d is None else d if counted is None else d.where(counted, 0.0)
        for d in (d_log_prob, d_entropy, d_kl)
    ]
    for i in range(0, logits.shape[0], _TILE_ROWS):
        rows = slice(i, i + _TILE_ROWS)
        t = None if target is None else target[rows]
        row_stats = (peak[rows], log_sum[rows], entropy[rows], gap[rows])
        d_rows = [None if d is None else d[rows] for d in incoming]
        for j in range(0, logits.shape[1], _TILE_COLUMNS):
            tile = (rows, slice(j, j + _TILE_COLUMNS))
            z = transform(logits[tile].to(dtype), temperature, softcap)
            zq = None
            if d_kl is not None:
                zq = transform(ref_logits[tile].to(dtype), temperature, softcap)
            dz = logits_gradient(z, zq, t, j, *row_stats, *d_rows)
            slope = transform_slope(logits[tile].to(dtype), temperature, softcap)
            dlogits[tile] = dz * slope
    return dlogits


# ------------------------------------------------------------------------------------------------
# Autograd
# ------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    logits, target, ref_logits, *ctx.options = inputs
    stats = Stats(*output)
    ctx.mark_non_differentiable(stats.peak, stats.log_sum, stats.ref_log_prob, stats.gap)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        logits, target, ref_logits, stats.peak, stats.log_sum, stats.entropy, stats.gap
    )


def _backward(ctx, d_log_prob, _peak, _log_sum, d_entropy, _ref_log_prob, _gap, d_kl):
    has_target, has_ref = ctx.saved_tensors[1] is not None, ctx.saved_tensors[2] is not None
    dlogits = torch.ops.perl_kernels.logits_grad(
        *ctx.saved_tensors,
        d_log_prob if has_target else None,
        d_entropy,
        d_kl if has_ref else None,
        *ctx.options,
    )
    return (dlogits, None, None, None, None, None)


class OverLogits(torch.autograd.Function):
    """logits_stats with its gradient written over the logits, a block of rows at a time.

    Their version counts the write: whoever else saved them for a backward that is still to come is
    told so by autograd, as is a second backward through here.
    """

    @staticmethod
    def forward(*inputs):
        return torch.ops.perl_kernels.logits_stats(*inputs)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_log_prob, _peak, _log_sum, d_entropy, _ref_log_prob, _gap, d_kl):
        logits, target, *known = ctx.saved_tensors
        d_log_prob = None if target is None else d_log_prob
        d_kl = None if known[0] is None else d_kl
        per_row = (target, *known, d_log_prob, d_entropy, d_kl)
        logits = logits.detach()
        height = max(1, _OVER_BYTES // (logits.shape[1] * logits.element_size()))
        for i in range(0, logits.shape[0], height):
            rows = slice(i, i + height)
            parts = [t[rows] if t is not None and t.numel() else t for t in per_row]
            logits[rows] = torch.ops.perl_kernels.logits_grad(logits[rows], *parts, *ctx.options)
        return (logits, None, None, None, None, None)


implement("logits_stats", _stats, _fake_stats, _setup_context, _backward)
implement("logits_grad", _grad, _fake_grad)
