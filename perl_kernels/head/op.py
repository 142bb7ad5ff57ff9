"""The head in the dispatcher: schema, fake, backends, autograd.

`head_stats` is a sweep over the vocabulary that writes a few numbers a row; `head_grad` a second
one that turns per-row incoming gradients into dhidden, and dweight when asked; `head_log_prob` both
at once for a frozen head of which only log p has a gradient, since d log p / d hidden needs only a
factor per row afterwards; `policy_loss` the loss and its gradient in one forward. softcap 0 means
none.
"""

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
    "head_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor? target, Tensor? ref_hidden,"
    " float temperature, float softcap, int ignore_index) -> (Tensor log_prob, Tensor peak,"
    " Tensor log_sum, Tensor entropy, Tensor ref_log_prob, Tensor gap, Tensor kl)"
)
define(
    "head_grad(Tensor hidden, Tensor weight, Tensor? bias, Tensor? target, Tensor? ref_hidden,"
    " Tensor peak, Tensor log_sum, Tensor entropy, Tensor gap,"
    " Tensor? d_log_prob, Tensor? d_entropy, Tensor? d_kl,"
    " float temperature, float softcap, int ignore_index,"
    " bool need_dhidden, bool need_dweight, bool need_dbias)"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
define(
    "head_log_prob(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? d_log_prob,"
    " float temperature, float softcap, int ignore_index)"
    " -> (Tensor log_prob, Tensor peak, Tensor log_sum, Tensor entropy, Tensor dhidden)"
)
define(
    "policy_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor advantage,"
    " Tensor? ref_hidden, float kl_coef, float temperature, float softcap, int ignore_index,"
    " bool mean, bool need_dhidden, bool need_dweight, bool need_dbias)"
    " -> (Tensor loss, Tensor log_prob, Tensor kl, Tensor entropy,"
    " Tensor dhidden, Tensor dweight, Tensor dbias)"
)
define_twins("head_stats", "cpu")
define_twins("head_grad", "cpu")
define_twins("head_log_prob", "cpu")


# ------------------------------------------------------------------------------------------------
# Fakes
# ------------------------------------------------------------------------------------------------


def _fake_stats(hidden, weight, bias, target, ref_hidden, temperature, softcap, ignore_index):
    return tuple(empty_stats(hidden, hidden.shape[0], target is not None, ref_hidden is not None))


def _empty_grads(hidden, weight, bias, need_dhidden, need_dweight, need_dbias):
    return (
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        weight.new_empty(weight.shape if need_dweight else (0,)),
        hidden.new_empty(
            weight.shape[:1] if need_dbias else (0,), dtype=statistics_dtype(hidden.dtype)
        ),
    )


def _fake_grad(hidden, weight, bias, *rest):
    return _empty_grads(hidden, weight, bias, *rest[-3:])


def _fake_log_prob(hidden, weight, bias, target, *rest):
    stats = empty_stats(hidden, hidden.shape[0], True, False)
    return (*stats[:4], hidden.new_empty(hidden.shape))


def _fake_policy_loss(hidden, weight, bias, target, advantage, ref_hidden, *rest):
    stats = empty_stats(hidden, hidden.shape[0], True, ref_hidden is not None)
    grads = _empty_grads(hidden, weight, bias, *rest[-3:])
    return (stats.peak.new_empty(()), stats.log_prob, stats.kl, stats.entropy, *grads)


# ------------------------------------------------------------------------------------------------
# Backends
# ------------------------------------------------------------------------------------------------

# Tiles of the plain torch sweep: at most 16 MiB of float32 logits at a time.
_TILE_ROWS, _TILE_COLUMNS = 1024, 4096


def _stats(hidden, weight, bias, target, ref_hidden, temperature, softcap, ignore_index):
    check_targets(target, weight.shape[0], ignore_index)
    arguments = (hidden, weight, bias, target, ref_hidden, temperature, softcap, ignore_index)
    backend = backend_of(hidden)
    if backend == "cpu":
        return torch.ops.perl_kernels.head_stats_cpu(*arguments)
    if backend in ("triton", "cuda"):
        from . import triton as kernels

        return kernels.stats(*arguments)
    return _stats_torch(*arguments)


def _grad(*arguments):
    backend = backend_of(arguments[0])
    if backend == "cpu":
        return torch.ops.perl_kernels.head_grad_cpu(*arguments)
    if backend in ("triton", "cuda"):
        from . import triton as kernels

        return kernels.grad(*arguments)
    return _grad_torch(*arguments)


def _log_prob(hidden, weight, bias, target, d_log_prob, temperature, softcap, ignore_index):
    """d_log_prob None: 1 for every row."""
    options = (temperature, softcap, ignore_index)
    check_targets(target, weight.shape[0], ignore_index)
    if backend_of(hidden) == "cpu":
        return torch.ops.perl_kernels.head_log_prob_cpu(
            hidden, weight, bias, target, d_log_prob, *options
        )
    stats = Stats(*_stats(hidden, weight, bias, target, None, *options))
    if d_log_prob is None:
        d_log_prob = torch.ones_like(stats.log_prob)
    dhidden, _, _ = _grad(
        hidden, weight, bias, target, None, stats.peak, stats.log_sum, stats.entropy, stats.gap,
        d_log_prob, None, None, *options, True, False, False,
    )  # fmt: skip
    return (*stats[:4], dhidden)


def _tiles(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def _raw_logits(hidden, weight, bias, columns):
    dtype = statistics_dtype(hidden.dtype)
    raw = hidden.to(dtype) @ weight[columns].to(dtype).T
    if bias is not None:
        raw += bias[columns].to(dtype)
    return raw


def _logits(hidden, weight, bias, columns, temperature, softcap):
    return transform(_raw_logits(hidden, weight, bias, columns), temperature, softcap)


def _stats_torch(hidden, weight, bias, target, ref_hidden, temperature, softcap, ignore_index):
    out = empty_stats(hidden, hidden.shape[0], target is not None, ref_hidden is not None)
    for rows in _tiles(hidden.shape[0], _TILE_ROWS):
        h = hidden[rows]
        hq = None if ref_hidden is None else ref_hidden[rows]
        t = None if target is None else target[rows]
        state = RowState(h.shape[0], out.peak)
        for columns in _tiles(weight.shape[0], _TILE_COLUMNS):
            z = _logits(h, weight, bias, columns, temperature, softcap)
            zq = None if hq is None else _logits(hq, weight, bias, columns, temperature, softcap)
            state.fold(z, zq, t, columns.start)
        state.write(out, rows, None if t is None else t != ignore_index)
    return tuple(out)


def _grad_torch(
    hidden, weight, bias, target, ref_hidden, peak, log_sum, entropy, gap,
    d_log_prob, d_entropy, d_kl, temperature, softcap, ignore_index,
    need_dhidden, need_dweight, need_dbias,
):  # fmt: skip
    dtype = statistics_dtype(hidden.dtype)
    dhidden = hidden.new_zeros(hidden.shape if need_dhidden else (0,), dtype=dtype)
    dweight = weight.new_zeros(weight.shape if need_dweight else (0,), dtype=dtype)
    dbias = weight.new_zeros(weight.shape[:1] if need_dbias else (0,), dtype=dtype)
    counted = None if target is None else target != ignore_index
    incoming = [
        None if d is None else d if counted is None else d.where(counted, 0.0)
        for d in (d_log_prob, d_entropy, d_kl)
    ]
    for rows in _tiles(hidden.shape[0], _TILE_ROWS):
        h = hidden[rows]
        t = None if target is None else target[rows]
        row_stats = (peak[rows], log_sum[rows], entropy[rows], gap[rows])
        d_rows = [None if d is None else d[rows] for d in incoming]
        for columns in _tiles(weight.shape[0], _TILE_COLUMNS):
            raw = _raw_logits(h, weight, bias, columns)
            z, zq = transform(raw, temperature, softcap), None
            if d_kl is not None:
                zq = _logits(ref_hidden[rows], weight, bias, columns, temperature, softcap)
            dz = logits_gradient(z, zq, t, columns.start, *row_stats, *d_rows)
            dz *= transform_slope(raw, temperature, softcap)
            if need_dhidden:
                dhidden[rows] += dz @ weight[columns].to(dtype)
            if need_dweight:
                dweight[columns] += dz.T @ h.to(dtype)
            if need_dbias:
                dbias[columns] += dz.sum(0)
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype), dbias


def _policy_loss(
    hidden, weight, bias, target, advantage, ref_hidden, kl_coef, temperature, softcap,
    ignore_index, mean, need_dhidden, need_dweight, need_dbias,
):  # fmt: skip
    shared = (hidden, weight, bias, target, ref_hidden)
    options = (temperature, softcap, ignore_index)
    share = (target != ignore_index).to(statistics_dtype(hidden.dtype))
    if mean:
        share = share / share.sum().clamp(min=1)
    d_log_prob = -share * advantage
    grads = _empty_grads(hidden, weight, bias, False, False, False)
    if ref_hidden is None and need_dhidden and not (need_dweight or need_dbias):
        log_prob, _, _, entropy, dhidden = torch.ops.perl_kernels.head_log_prob(
            hidden, weight, bias, target, d_log_prob, *options
        )
        loss = (d_log_prob * log_prob).sum()
        return (loss, log_prob, log_prob.new_empty(0), entropy, dhidden, *grads[1:])
    stats = Stats(*torch.ops.perl_kernels.head_stats(*shared, *options))
    d_kl = kl_coef * share if ref_hidden is not None else None
    loss = (d_log_prob * stats.log_prob).sum()
    if d_kl is not None:
        loss = loss + (d_kl * stats.kl).sum()
    if need_dhidden or need_dweight or need_dbias:
        grads = torch.ops.perl_kernels.head_grad(
            *shared, stats.peak, stats.log_sum, stats.entropy, stats.gap,
            d_log_prob, None, d_kl, *options, need_dhidden, need_dweight, need_dbias,
        )  # fmt: skip
    return (loss, stats.log_prob, stats.kl, stats.entropy, *grads)


# ------------------------------------------------------------------------------------------------
# Autograd
# ------------------------------------------------------------------------------------------------


def _stats_setup(ctx, inputs, output):
    hidden, weight, bias, target, ref_hidden, *ctx.options = inputs
    stats = Stats(*output)
    ctx.mark_non_differentiable(stats.peak, stats.log_sum, stats.ref_log_prob, stats.gap)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden, weight, bias, target, ref_hidden,
        stats.peak, stats.log_sum, stats.entropy, stats.gap,
    )  # fmt: skip


def _stats_backward(ctx, d_log_prob, _peak, _log_sum, d_entropy, _ref_log_prob, _gap, d_kl):
    has_target, has_ref = ctx.saved_tensors[3] is not None, ctx.saved_tensors[4] is not None
    need = ctx.needs_input_grad[:3]
    grads = torch.ops.perl_kernels.head_grad(
        *ctx.saved_tensors,
        d_log_prob if has_target else None,
        d_entropy,
        d_kl if has_ref else None,
        *ctx.options,
        *need,
    )
    inputs = (ctx.saved_tensors[0], ctx.saved_tensors[1], ctx.saved_tensors[2])
    wanted = [
        g.to(t.dtype) if needed else None for g, t, needed in zip(grads, inputs, need, strict=True)
    ]
    return (*wanted, None, None, None, None, None)


def _log_prob_setup(ctx, inputs, output):
    hidden, weight, bias, target, _, *ctx.options = inputs
    _, peak, log_sum, entropy, dhidden = output
    ctx.mark_non_differentiable(peak, log_sum, dhidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, peak, log_sum, entropy, dhidden)


def _log_prob_backward(ctx, d_log_prob, _peak, _log_sum, d_entropy, _dhidden):
    *inputs, target, peak, log_sum, entropy, unit = ctx.saved_tensors
    nothing = (None,) * 7
    if d_entropy is not None:
        dhidden, _, _ = torch.ops.perl_kernels.head_grad(
            *inputs, target, None, peak, log_sum, entropy, peak.new_empty(0),
            d_log_prob, d_entropy, None, *ctx.options, True, False, False,
        )  # fmt: skip
        return (dhidden, *nothing)
    if d_log_prob is None:
        return (None, *nothing)
    return ((unit * d_log_prob[:, None]).to(unit.dtype), *nothing)


def _policy_setup(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    _, log_prob, kl, entropy, *grads = output
    ctx.mark_non_differentiable(log_prob, kl, entropy, *grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)


def _policy_backward(ctx, d_loss, *_):
    nothing = (None,) * len(ctx.needs_input_grad)
    if d_loss is None:
        return nothing
    grads = [
        (g * d_loss.to(g.dtype)).to(ctx.dtype) if needed else None
        for g, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    ]
    return (*grads, *nothing[3:])


implement("head_stats", _stats, _fake_stats, _stats_setup, _stats_backward)
implement("head_grad", _grad, _fake_grad)
implement("head_log_prob", _log_prob, _fake_log_prob, _log_prob_setup, _log_prob_backward)
implement("policy_loss", _policy_loss, _fake_policy_loss, _policy_setup, _policy_backward)
