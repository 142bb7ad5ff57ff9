"""The GPU kernels of log_prob and kl, in Triton.

    stats   one program a row, one pass over its columns with the state in registers
    grad    one program a tile, every logit read once and every dlogit written once

Both are bound by that traffic; any strides are read in place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._softmax import empty_stats
from .._triton import at, load_z, logits_gradient, on_device_of, pinned, row_stats, transform_slope


@triton.jit
def _logits_stats_kernel(
    logits_ptr,  # (N, V)
    ref_ptr,  # (N, V) or None
    target_ptr,  # (N,) or None
    log_prob_ptr, peak_ptr, log_sum_ptr, entropy_ptr,  # (N,) float32
    ref_log_prob_ptr, gap_ptr, kl_ptr,  # (N,) float32
    V, ignore_index,
    stride_zn, stride_zv, stride_qn, stride_qv,
    inverse_temperature, softcap,
    HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The statistics of one row"""
    row = tl.program_id(0) + tl.arange(0, 1)
    row_stats(
        logits_ptr, ref_ptr, None, target_ptr,
        log_prob_ptr, peak_ptr, log_sum_ptr, entropy_ptr, ref_log_prob_ptr, gap_ptr, kl_ptr,
        row, row, V, ignore_index, stride_zn, stride_zv, stride_qn, stride_qv,
        inverse_temperature, softcap, HAS_SOFTCAP, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _logits_grad_kernel(
    logits_ptr,  # (N, V)
    ref_ptr,  # (N, V), or None without d_kl
    target_ptr,  # (N,) or None
    peak_ptr, log_sum_ptr, entropy_ptr, gap_ptr,  # (N,) float32
    d_log_prob_ptr, d_entropy_ptr, d_kl_ptr,  # (N,) float32 or None
    dlogits_ptr,  # (N, V)
    V, ignore_index,
    stride_zn, stride_zv, stride_qn, stride_qv,
    inverse_temperature, softcap,
    HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """d loss / d logits of one tile of one row"""
    row = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    raw, z = load_z(
        logits_ptr, None, row, columns, V, stride_zn, stride_zv,
        inverse_temperature, softcap, HAS_SOFTCAP,
    )  # fmt: skip
    zq = z
    if ref_ptr is not None:
        _, zq = load_z(
            ref_ptr, None, row, columns, V, stride_qn, stride_qv,
            inverse_temperature, softcap, HAS_SOFTCAP,
        )  # fmt: skip
    dz = logits_gradient(
        z, zq, row, row >= 0, columns, target_ptr, peak_ptr, log_sum_ptr, entropy_ptr, gap_ptr,
        d_log_prob_ptr, d_entropy_ptr, d_kl_ptr, ignore_index,
    )  # fmt: skip
    dz *= transform_slope(raw, inverse_temperature, softcap, HAS_SOFTCAP)
    tl.store(at(dlogits_ptr, row, columns, V, 1), dz, mask=columns[None, :] < V)


# ------------------------------------------------------------------------------------------------
# The two entry points: arguments and results as in op.py
# ------------------------------------------------------------------------------------------------


def stats(
    logits: Tensor,  # (N, V)
    target: Tensor | None,  # (N,)
    ref_logits: Tensor | None,  # (N, V)
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, ...]:  # the fields of Stats
    rows, vocabulary = logits.shape
    out = empty_stats(logits, rows, target is not None, ref_logits is not None)
    if rows == 0:
        return tuple(out)
    with on_device_of(logits):
        _logits_stats_kernel[(rows,)](
            logits, ref_logits, target, *out, vocabulary, ignore_index,
            *_strides(logits, ref_logits), 1.0 / temperature, softcap,
            HAS_SOFTCAP=softcap > 0.0, **pinned("logits_stats", logits),
        )  # fmt: skip
    return tuple(out)


def grad(
    logits: Tensor,  # (N, V)
    target: Tensor | None,  # (N,)
    ref_logits: Tensor | None,  # (N, V)
    peak: Tensor,  # (N,) float32, as all below
    log_sum: Tensor,
    entropy: Tensor,
    gap: Tensor,
    d_log_prob: Tensor | None,
    d_entropy: Tensor | None,
    d_kl: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> Tensor:  # dlogits (N, V)
    rows, vocabulary = logits.shape
    dlogits = logits.new_empty(rows, vocabulary)
    if rows == 0:
        return dlogits
    incoming = [None if d is None else d.contiguous() for d in (d_log_prob, d_entropy, d_kl)]
    ref = None if d_kl is None else ref_logits
    tile = pinned("logits_grad", logits)
    with on_device_of(logits):
        _logits_grad_kernel[(rows, triton.cdiv(vocabulary, tile["BLOCK_V"]))](
            logits, ref, target, peak, log_sum, entropy, gap, *incoming, dlogits,
            vocabulary, ignore_index, *_strides(logits, ref), 1.0 / temperature, softcap,
            HAS_SOFTCAP=softcap > 0.0, **tile,
        )  # fmt: skip
    return dlogits


def _strides(logits: Tensor, ref: Tensor | None) -> tuple[int, ...]:
    return (*logits.stride(), *(logits if ref is None else ref).stride())
