"""The head in the dispatcher: schema, fake, backends, autograd.

`head_stats` is a sweep over the vocabulary that writes a few numbers a row; `head_grad` a second
one that turns per-row incoming gradients into dhidden, and the head's own when asked; `head_units`
both at once for a frozen head, where d log p / d hidden and d KL / d hidden need only a factor per
row afterwards; `policy_loss` the loss and its gradient in one forward. softcap 0 means none; a and
b None mean no adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import backend_of, compiled_for, define, define_twins, implement
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

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? a, Tensor? b"
_OPTIONS = "float scale, float temperature, float softcap, int ignore_index"
_STATS = (
    "Tensor log_prob, Tensor peak, Tensor log_sum, Tensor entropy, Tensor ref_log_prob, Tensor gap,"
    " Tensor kl"
)
_NEED = "bool need_dhidden, bool need_dweight, bool need_dbias, bool need_dab"
_GRADS = "Tensor dhidden, Tensor dweight, Tensor dbias, Tensor da, Tensor db"
define(f"head_stats({_HEAD}, Tensor? target, Tensor? ref_hidden, {_OPTIONS}) -> ({_STATS})")
define(
    f"head_grad({_HEAD}, Tensor? target, Tensor? ref_hidden,"
    " Tensor peak, Tensor log_sum, Tensor entropy, Tensor gap,"
    f" Tensor? d_log_prob, Tensor? d_entropy, Tensor? d_kl, {_OPTIONS}, {_NEED}) -> ({_GRADS})"
)
define(
    f"head_units({_HEAD}, Tensor? target, Tensor? ref_hidden, Tensor? d_log_prob, Tensor? d_kl,"
    f" {_OPTIONS}) -> ({_STATS}, Tensor dlog_prob, Tensor dkl)"
)
define(
    f"policy_loss({_HEAD}, Tensor target, Tensor advantage, Tensor? old_log_prob,"
    " Tensor? ref_hidden, float kl_coef, float lowest_ratio, float highest_ratio, str level,"
    f" str reduction, int sequence_length, {_OPTIONS}, {_NEED})"
    f" -> (Tensor loss, Tensor log_prob, Tensor kl, Tensor entropy, {_GRADS})"
)
define("head_logits(Tensor hidden, Tensor weight) -> Tensor")
define(
    "head_weighted_units(Tensor dlog_prob, Tensor dkl, Tensor? d_log_prob, Tensor? d_kl) -> Tensor"
)
define(
    "head_rows_cuda(Tensor(a!) logits, Tensor? bias, Tensor? target, Tensor(b!)? log_prob,"
    " Tensor(c!) peak, Tensor(d!) log_sum, Tensor(e!) entropy, Tensor(f!)? ref_log_prob,"
    " Tensor(g!)? gap, Tensor(h!)? kl, Tensor? d_log_prob, Tensor? d_kl, Tensor(a!) dz,"
    " float temperature, float softcap, int ignore_index) -> ()"
)
define_twins("head_stats", "cpu")
define_twins("head_grad", "cpu")
define_twins("head_units", "cpu")
define_twins("head_logits", "cpu")


# ------------------------------------------------------------------------------------------------
# Fakes
# ------------------------------------------------------------------------------------------------


def _fake_stats(hidden, weight, bias, a, b, target, ref_hidden, *rest):
    return tuple(empty_stats(hidden, hidden.shape[0], target is not None, ref_hidden is not None))


def _empty_grads(hidden, weight, bias, a, b, need_dhidden, need_dweight, need_dbias, need_dab):
    def like(tensor, wanted, **options):
        tensor = hidden if tensor is None else tensor
        return tensor.new_empty(tensor.shape if wanted else (0,), **options)

    return (
        like(hidden, need_dhidden),
        like(weight, need_dweight),
        like(bias, need_dbias, dtype=statistics_dtype(hidden.dtype)),
        like(a, need_dab),
        like(b, need_dab),
    )


def _fake_grad(hidden, weight, bias, a, b, *rest):
    return _empty_grads(hidden, weight, bias, a, b, *rest[-4:])


def _fake_units(hidden, weight, bias, a, b, target, ref_hidden, d_log_prob, *rest):
    has_target, has_ref, weighted = (
        target is not None,
        ref_hidden is not None,
        d_log_prob is not None,
    )
    dlog_prob = hidden.new_empty(hidden.shape if has_target or weighted else (0,))
    dkl = hidden.new_empty(hidden.shape if has_ref and not weighted else (0,))
    return (*empty_stats(hidden, hidden.shape[0], has_target, has_ref), dlog_prob, dkl)


def _fake_logits(hidden, weight):
    dtype = statistics_dtype(hidden.dtype)
    return hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=dtype)


def _fake_weighted_units(dlog_prob, dkl, d_log_prob, d_kl):
    return torch.empty_like(dkl if d_log_prob is None else dlog_prob)


def _fake_policy_loss(
    hidden, weight, bias, a, b, target, advantage, old_log_prob, ref_hidden, *rest
):
    stats = empty_stats(hidden, hidden.shape[0], True, ref_hidden is not None)
    grads = _empty_grads(hidden, weight, bias, a, b, *rest[-4:])
    return (stats.peak.new_empty(()), stats.log_prob, stats.kl, stats.entropy, *grads)


# ------------------------------------------------------------------------------------------------
# Backends
# ------------------------------------------------------------------------------------------------

ROUTE = "tiles"  # or "blocks": the way of a GPU, see triton.py


def one_sweep(hidden: Tensor) -> bool:
    """Whether gradients over a frozen weight come with the statistics, or from a second sweep;
    torch.compile can trace the question."""
    return compiled_for(hidden) or _by_blocks(hidden)


def _by_blocks(hidden):
    return ROUTE == "blocks" and backend_of(hidden) in ("triton", "cuda")


# Tiles of the plain torch sweep: at most 16 MiB of float32 logits at a time.
_TILE_ROWS, _TILE_COLUMNS = 1024, 4096


def _logits(hidden, weight):
    """hidden weight^T, never rounded to 16 bits, and without a float32 copy of the weight."""
    wide = statistics_dtype(hidden.dtype)
    if backend_of(hidden) == "cpu":
        return torch.ops.perl_kernels.head_logits_cpu(hidden, weight)
    if hidden.dtype == wide:
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=wide)
    hidden, tiles = hidden.to(wide), weight.split(_TILE_COLUMNS)
    return torch.cat([hidden @ tile.to(wide).T for tile in tiles], dim=1)


def _stats(
    hidden, weight, bias, a, b, target, ref_hidden, scale, temperature, softcap, ignore_index
):
    check_targets(target, weight.shape[0], ignore_index)
    arguments = (hidden, weight, bias, a, b, target, ref_hidden)
    arguments += (scale, temperature, softcap, ignore_index)
    backend = backend_of(hidden)
    if backend == "cpu":
        return torch.ops.perl_kernels.head_stats_cpu(*arguments)
    if backend in ("triton", "cuda"):
        from . import triton as kernels

        blocks = ROUTE == "blocks"
        return kernels.by_blocks(*arguments)[0] if blocks else kernels.stats(*arguments)
    return _stats_torch(*arguments)


def _grad(*arguments):
    backend = backend_of(arguments[0])
    if backend == "cpu":
        return torch.ops.perl_kernels.head_grad_cpu(*arguments)
    if backend in ("triton", "cuda"):
        from . import triton as kernels

        return kernels.grad(*arguments)
    return _grad_torch(*arguments)


def _units(hidden, weight, bias, a, b, target, ref_hidden, d_log_prob, d_kl, *options):
    """With d_log_prob, dlog_prob is the sum of both gradients, weighted by d_log_prob and d_kl."""
    inputs = (hidden, weight, bias, a, b, target, ref_hidden)
    check_targets(target, weight.shape[0], options[-1])
    if backend_of(hidden) == "cpu":
        return torch.ops.perl_kernels.head_units_cpu(*inputs, d_log_prob, d_kl, *options)
    if _by_blocks(hidden):
        from . import triton as kernels

        return kernels.units(*inputs, d_log_prob, d_kl, *options)
    stats = Stats(*_stats(*inputs, *options))

    def gradient(d_log_prob, d_kl):
        if d_log_prob is None and d_kl is None:
            return hidden.new_empty(0)
        return _grad(
            *inputs, stats.peak, stats.log_sum, stats.entropy, stats.gap, d_log_prob, None, d_kl,
            *options, True, False, False, False,
        )[0]  # fmt: skip

    if d_log_prob is not None:
        return (*stats, gradient(d_log_prob, d_kl), hidden.new_empty(0))
    one = torch.ones_like(stats.peak)
    dlog_prob = gradient(None if target is None else one, None)
    return (*stats, dlog_prob, gradient(None, None if ref_hidden is None else one))


def _weighted_units(dlog_prob, dkl, d_log_prob, d_kl):
    """dhidden (N, H) = d_log_prob dlog_prob + d_kl dkl, float32 for a block of rows at a time."""
    parts = [(d, unit) for d, unit in ((d_log_prob, dlog_prob), (d_kl, dkl)) if d is not None]
    dhidden = torch.empty_like(parts[0][1])
    for rows in _tiles(dhidden.shape[0], _TILE_ROWS):
        dhidden[rows] = sum(d[rows, None] * unit[rows] for d, unit in parts)
    return dhidden


def _tiles(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def _adapter_rows(hidden, a, scale):
    """s (rows, R) = scale * hidden a^T"""
    dtype = statistics_dtype(hidden.dtype)
    return None if a is None else scale * (hidden.to(dtype) @ a.to(dtype).T)


def _raw_logits(hidden, weight, bias, columns, s=None, b=None):
    dtype = statistics_dtype(hidden.dtype)
    raw = hidden.to(dtype) @ weight[columns].to(dtype).T
    if s is not None:
        raw += s @ b[columns].to(dtype).T
    if bias is not None:
        raw += bias[columns].to(dtype)
    return raw


def _stats_torch(
    hidden, weight, bias, a, b, target, ref_hidden, scale, temperature, softcap, ignore_index
):
    out = empty_stats(hidden, hidden.shape[0], target is not None, ref_hidden is not None)
    for rows in _tiles(hidden.shape[0], _TILE_ROWS):
        h = hidden[rows]
        s = _adapter_rows(h, a, scale)
        t = None if target is None else target[rows]
        state = RowState(h.shape[0], out.peak)
        for columns in _tiles(weight.shape[0], _TILE_COLUMNS):
            z = transform(_raw_logits(h, weight, bias, columns, s, b), temperature, softcap)
            zq = None
            if ref_hidden is not None:
                zq = _raw_logits(ref_hidden[rows], weight, bias, columns)
                zq = transform(zq, temperature, softcap)
            state.fold(z, zq, t, columns.start)
        state.write(out, rows, None if t is None else t != ignore_index)
    return tuple(out)


def _grad_torch(
    hidden, weight, bias, a, b, target, ref_hidden, peak, log_sum, entropy, gap,
    d_log_prob, d_entropy, d_kl, scale, temperature, softcap, ignore_index, *need,
):  # fmt: skip
    need_dhidden, need_dweight, need_dbias, need_dab = need
    dtype = statistics_dtype(hidden.dtype)
    empty = _empty_grads(hidden, weight, bias, a, b, *need)
    dhidden, dweight, dbias, da, db = (torch.zeros_like(t, dtype=dtype) for t in empty)
    counted = None if target is None else target != ignore_index
    incoming = [
        None if d is None else d if counted is None else d.where(counted, 0.0)
        for d in (d_log_prob, d_entropy, d_kl)
    ]
    for rows in _tiles(hidden.shape[0], _TILE_ROWS):
        h = hidden[rows]
        s = _adapter_rows(h, a, scale)
        ds = None if a is None else torch.zeros_like(s)
        t = None if target is None else target[rows]
        row_stats = (peak[rows], log_sum[rows], entropy[rows], gap[rows])
        d_rows = [None if d is None else d[rows] for d in incoming]
        for columns in _tiles(weight.shape[0], _TILE_COLUMNS):
            raw = _raw_logits(h, weight, bias, columns, s, b)
            z, zq = transform(raw, temperature, softcap), None
            if d_kl is not None:
                zq = _raw_logits(ref_hidden[rows], weight, bias, columns)
                zq = transform(zq, temperature, softcap)
            dz = logits_gradient(z, zq, t, columns.start, *row_stats, *d_rows)
            dz *= transform_slope(raw, temperature, softcap)
            if need_dhidden:
                dhidden[rows] += dz @ weight[columns].to(dtype)
            if need_dweight:
                dweight[columns] += dz.T @ h.to(dtype)
            if need_dbias:
                dbias[columns] += dz.sum(0)
            if a is not None:
                ds += dz @ b[columns].to(dtype)
            if need_dab:
                db[columns] += dz.T @ s
        if need_dhidden and a is not None:
            dhidden[rows] += scale * (ds @ a.to(dtype))
        if need_dab:
            da += scale * (ds.T @ h.to(dtype))
    grads = (dhidden, dweight, dbias, da, db)
    return tuple(g.to(like.dtype) for g, like in zip(grads, empty, strict=True))


def _policy_loss(
    hidden, weight, bias, a, b, target, advantage, old_log_prob, ref_hidden, kl_coef,
    lowest_ratio, highest_ratio, level, reduction, sequence_length,
    scale, temperature, softcap, ignore_index, *need,
):  # fmt: skip
    head, options = (hidden, weight, bias, a, b), (scale, temperature, softcap, ignore_index)
    inputs, ops = (*head, target, ref_hidden), torch.ops.perl_kernels
    counted = (target != ignore_index).view(-1, sequence_length)
    share = _share(counted.to(statistics_dtype(hidden.dtype)), reduction)
    gain = (share * advantage.view_as(share)).where(counted, 0.0)  # of a log-probability or ratio
    d_kl = None if ref_hidden is None else (kl_coef * share).view(-1)
    if old_log_prob is None:
        d_log_prob = -gain.view(-1)
        stats, grads = _known(inputs, d_log_prob, d_kl, options, need)
        loss = (d_log_prob * stats.log_prob).sum()
    else:
        units = need == _HIDDEN_ALONE and one_sweep(hidden)
        if units:
            *stats, dlog_prob, dkl = ops.head_units(*inputs, None, None, *options)
        else:
            stats = ops.head_stats(*inputs, *options)
        stats = Stats(*stats)
        log_ratio = (stats.log_prob - old_log_prob).view_as(gain).where(counted, 0.0)
        loss, d_log_prob = _surrogate(log_ratio, gain, counted, lowest_ratio, highest_ratio, level)
        if units:
            dhidden = ops.head_weighted_units(dlog_prob, dkl, d_log_prob, d_kl)
            grads = (dhidden, *_empty_grads(*head, *need)[1:])
        else:
            grads = _later(inputs, stats, d_log_prob, d_kl, options, need)
    if d_kl is not None:
        loss = loss + (d_kl * stats.kl).sum()
    return (loss, stats.log_prob, stats.kl, stats.entropy, *grads)


_HIDDEN_ALONE = (True, False, False, False)


def _known(inputs, d_log_prob, d_kl, options, need):
    """Stats, and gradients of coefficients that are known before them."""
    need_dhidden, need_dweight, need_dbias, need_dab = need
    ops, empty = torch.ops.perl_kernels, _empty_grads(*inputs[:5], *need)
    if need == _HIDDEN_ALONE:
        *stats, dhidden, _ = ops.head_units(*inputs, d_log_prob, d_kl, *options)
        return Stats(*stats), (dhidden, *empty[1:])
    if need_dab and not (need_dweight or need_dbias) and _by_blocks(inputs[0]):
        from . import triton as kernels

        stats, (dhidden,), da, db = kernels.by_blocks(
            *inputs, *options, d_log_prob, d_kl, need_dhidden, need_dab
        )
        return Stats(*stats), (dhidden, *empty[1:3], da, db)
    stats = Stats(*ops.head_stats(*inputs, *options))
    return stats, _later(inputs, stats, d_log_prob, d_kl, options, need)


def _later(inputs, stats, d_log_prob, d_kl, options, need):
    """Gradients from a second sweep."""
    if not any(need):
        return _empty_grads(*inputs[:5], *need)
    return torch.ops.perl_kernels.head_grad(
        *inputs, stats.peak, stats.log_sum, stats.entropy, stats.gap,
        d_log_prob, None, d_kl, *options, *need,
    )  # fmt: skip


def _share(counted, reduction):
    """How much each token (B, T) says in the loss. counted: 1 where it counts, else 0."""
    if reduction == "sum":
        return counted
    if reduction == "mean":
        return counted / counted.sum().clamp(min=1)
    return counted / (counted.sum(1, keepdim=True).clamp(min=1) * max(counted.shape[0], 1))


def _surrogate(log_ratio, gain, counted, lowest, highest, level):
    """sum of -min(ratio gain, clip(ratio) gain) over tokens (B, T), and its d_log_prob (N,).

    A ratio that covers a sequence is moved by each of its log-probabilities, so each one gets what
    all of its tokens send.
    """
    tokens = 1 if level == "sequence_sum" else counted.sum(1, keepdim=True).clamp(min=1)
    if level != "token":
        log_ratio = log_ratio.sum(1, keepdim=True) / tokens
    ratio = log_ratio.exp()
    # a ratio may overflow where there is nothing to gain
    free, held = ((r * gain).where(gain != 0, 0.0) for r in (ratio, ratio.clamp(lowest, highest)))
    sent = free.where(free <= held, 0.0)
    if level != "token":
        sent = (sent.sum(1, keepdim=True) / tokens).where(counted, 0.0)
    return -torch.minimum(free, held).sum(), -sent.view(-1)


# ------------------------------------------------------------------------------------------------
# Autograd
# ------------------------------------------------------------------------------------------------


def _stats_setup(ctx, inputs, output):
    *tensors, scale, temperature, softcap, ignore_index = inputs
    ctx.options = (scale, temperature, softcap, ignore_index)
    stats = Stats(*output)
    ctx.mark_non_differentiable(stats.peak, stats.log_sum, stats.ref_log_prob, stats.gap)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, stats.peak, stats.log_sum, stats.entropy, stats.gap)


def _stats_backward(ctx, d_log_prob, _peak, _log_sum, d_entropy, _ref_log_prob, _gap, d_kl):
    *head, target, ref_hidden = ctx.saved_tensors[:7]
    *need, need_da, need_db = ctx.needs_input_grad[:5]
    grads = torch.ops.perl_kernels.head_grad(
        *ctx.saved_tensors,
        None if target is None else d_log_prob,
        d_entropy,
        None if ref_hidden is None else d_kl,
        *ctx.options,
        *need,
        need_da or need_db,
    )
    return _wanted(ctx, grads, [None if t is None else t.dtype for t in head])


def _wanted(ctx, grads, dtypes):
    """The gradients of hidden, weight, bias, a and b that autograd asks for; None for the rest."""
    need = ctx.needs_input_grad
    wanted = [
        g.to(dtype) if needed else None
        for g, dtype, needed in zip(grads, dtypes, need[:5], strict=True)
    ]
    return (*wanted, *[None] * (len(need) - 5))


def _units_setup(ctx, inputs, output):
    *tensors, d_log_prob, _, scale, temperature, softcap, ignore_index = inputs
    ctx.options = (scale, temperature, softcap, ignore_index)
    ctx.weighted = d_log_prob is not None
    *stats, dlog_prob, dkl = output
    stats = Stats(*stats)
    ctx.mark_non_differentiable(
        stats.peak, stats.log_sum, stats.ref_log_prob, stats.gap, dlog_prob, dkl
    )
    ctx.set_materialize_grads(False)
    saved = (stats.peak, stats.log_sum, stats.entropy, stats.gap, dlog_prob, dkl)
    ctx.save_for_backward(*tensors, *saved)


def _units_backward(ctx, d_log_prob, _peak, _log_sum, d_entropy, _ref_log_prob, _gap, d_kl, *_):
    *saved, dlog_prob, dkl = ctx.saved_tensors
    d_log_prob = None if saved[5] is None else d_log_prob
    d_kl = None if saved[6] is None else d_kl
    if d_entropy is not None or ctx.weighted:
        dhidden, *_ = torch.ops.perl_kernels.head_grad(
            *saved, d_log_prob, d_entropy, d_kl, *ctx.options, True, False, False, False
        )
    elif d_log_prob is None and d_kl is None:
        dhidden = None
    else:
        dhidden = torch.ops.perl_kernels.head_weighted_units(dlog_prob, dkl, d_log_prob, d_kl)
    return (dhidden, *[None] * (len(ctx.needs_input_grad) - 1))


def _policy_setup(ctx, inputs, output):
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:5]]
    _, log_prob, kl, entropy, *grads = output
    ctx.mark_non_differentiable(log_prob, kl, entropy, *grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)


def _policy_backward(ctx, d_loss, *_):
    if d_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    return _wanted(ctx, [g * d_loss.to(g.dtype) for g in ctx.saved_tensors], ctx.dtypes)


implement("head_stats", _stats, _fake_stats, _stats_setup, _stats_backward)
implement("head_grad", _grad, _fake_grad)
implement("head_logits", _logits, _fake_logits)
implement("head_weighted_units", _weighted_units, _fake_weighted_units)
implement("head_units", _units, _fake_units, _units_setup, _units_backward)
implement("policy_loss", _policy_loss, _fake_policy_loss, _policy_setup, _policy_backward)
