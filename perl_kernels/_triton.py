"""What the rooms' Triton kernels share: pinned tiles, dropout, and the softmax row state.

Kernels are launched at tiles pinned by kernel, element size and architecture, so that a start is
fast and a run repeats. All sums are float32 and no kernel uses atomics: results are deterministic.
Letters are those of the library (N, D, O, R, V, H); the formulas are those of `_softmax`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dropout import threshold_of
from ._library import triton_interpreted

# ------------------------------------------------------------------------------------------------
# Pinned tiles: (kernel, bytes per element) -> architecture -> constants and launch options.
# "any" holds for every architecture without its own entry, and fits the 99 KiB of shared memory
# that the smallest of the sm_8x and sm_12x cards have.
# ------------------------------------------------------------------------------------------------

Tile = dict[str, int]
T = TypeVar("T")


def _tile(warps: int, stages: int, **constants: int) -> Tile:
    return {**constants, "num_warps": warps, "num_stages": stages}


PINNED: dict[tuple[str, int], dict[str, Tile]] = {
    ("lora_linear_shrink", 2): {"any": _tile(4, 4, BLOCK_N=64, BLOCK_D=64)},
    ("lora_linear_shrink", 4): {"any": _tile(4, 3, BLOCK_N=32, BLOCK_D=32)},
    ("lora_linear_decode", 2): {
        "any": _tile(4, 4, BLOCK_O=32, BLOCK_D=128),
        "sm_90": _tile(4, 6, BLOCK_O=32, BLOCK_D=128),
        "sm_100": _tile(4, 6, BLOCK_O=32, BLOCK_D=128),
    },
    ("lora_linear_decode", 4): {"any": _tile(4, 3, BLOCK_O=32, BLOCK_D=32)},
    ("lora_linear_fused", 2): {
        "any": _tile(8, 3, BLOCK_N=128, BLOCK_C=128, BLOCK_K=64, GROUP=8, PROGRAMS=1),
        "sm_90": _tile(8, 3, BLOCK_N=128, BLOCK_C=256, BLOCK_K=64, GROUP=8, PROGRAMS=1),
        "sm_100": _tile(8, 3, BLOCK_N=128, BLOCK_C=256, BLOCK_K=64, GROUP=8, PROGRAMS=1),
    },
    ("lora_linear_fused", 4): {
        "any": _tile(8, 3, BLOCK_N=64, BLOCK_C=64, BLOCK_K=16, GROUP=8, PROGRAMS=2)
    },
    ("lora_linear_fused_dropout", 2): {
        "any": _tile(8, 3, BLOCK_N=128, BLOCK_C=128, BLOCK_K=64, GROUP=8, PROGRAMS=1)
    },
    ("lora_linear_fused_dropout", 4): {
        "any": _tile(8, 3, BLOCK_N=64, BLOCK_C=64, BLOCK_K=16, GROUP=8, PROGRAMS=2)
    },
    ("lora_linear_bwd_ds_db", 2): {"any": _tile(8, 3, BLOCK_N=64, BLOCK_O=128, SPLIT_N=512)},
    ("lora_linear_bwd_ds_db", 4): {"any": _tile(4, 2, BLOCK_N=32, BLOCK_O=32, SPLIT_N=512)},
    ("lora_linear_bwd_da", 2): {"any": _tile(4, 3, BLOCK_N=64, BLOCK_D=128, SPLIT_N=1024)},
    ("lora_linear_bwd_da", 4): {"any": _tile(4, 2, BLOCK_N=32, BLOCK_D=32, SPLIT_N=1024)},
    ("lora_linear_bwd_dx", 2): {"any": _tile(4, 2, BLOCK_N=64, BLOCK_D=128)},
    ("lora_linear_bwd_dx", 4): {"any": _tile(4, 2, BLOCK_N=32, BLOCK_D=64)},
    ("lora_mlp_fwd", 2): {"any": _tile(4, 1, BLOCK=2048)},
    ("lora_mlp_fwd", 4): {"any": _tile(4, 1, BLOCK=1024)},
    ("lora_mlp_bwd", 2): {"any": _tile(4, 1, BLOCK=2048)},
    ("lora_mlp_bwd", 4): {"any": _tile(4, 1, BLOCK=1024)},
    ("multi_lora_linear_shrink", 2): {"any": _tile(4, 4, BLOCK_N=64, BLOCK_D=64)},
    ("multi_lora_linear_shrink", 4): {"any": _tile(4, 3, BLOCK_N=32, BLOCK_D=32)},
    ("multi_lora_linear_expand", 2): {"any": _tile(4, 2, BLOCK_N=64, BLOCK_D=128)},
    ("multi_lora_linear_expand", 4): {"any": _tile(4, 2, BLOCK_N=32, BLOCK_D=64)},
    ("multi_lora_linear_reduce", 2): {"any": _tile(4, 3, BLOCK_N=64, BLOCK_D=128, SPLIT_N=1024)},
    ("multi_lora_linear_reduce", 4): {"any": _tile(4, 2, BLOCK_N=32, BLOCK_D=32, SPLIT_N=1024)},
    ("head_stats", 2): {
        "any": _tile(8, 3, BLOCK_N=128, BLOCK_V=128, BLOCK_H=64, GROUP=16, SPLITS=32)
    },
    ("head_stats", 4): {
        "any": _tile(8, 3, BLOCK_N=64, BLOCK_V=64, BLOCK_H=16, GROUP=16, SPLITS=32)
    },
    ("head_stats_ref", 2): {
        "any": _tile(8, 3, BLOCK_N=64, BLOCK_V=128, BLOCK_H=64, GROUP=16, SPLITS=32)
    },
    ("head_stats_ref", 4): {
        "any": _tile(4, 3, BLOCK_N=32, BLOCK_V=64, BLOCK_H=16, GROUP=16, SPLITS=32)
    },
    ("head_dz", 2): {"any": _tile(8, 3, BLOCK_N=128, BLOCK_V=128, BLOCK_H=64, GROUP=16)},
    ("head_dz", 4): {"any": _tile(8, 3, BLOCK_N=64, BLOCK_V=64, BLOCK_H=16, GROUP=16)},
    ("head_dz_ref", 2): {"any": _tile(8, 3, BLOCK_N=64, BLOCK_V=128, BLOCK_H=64, GROUP=16)},
    ("head_dz_ref", 4): {"any": _tile(4, 3, BLOCK_N=32, BLOCK_V=64, BLOCK_H=16, GROUP=16)},
    ("head_rows", 2): {"any": _tile(8, 1, BLOCK_V=4096)},
    ("head_rows", 4): {"any": _tile(8, 1, BLOCK_V=4096)},
    ("logits_stats", 2): {"any": _tile(8, 2, BLOCK_V=4096)},
    ("logits_stats", 4): {"any": _tile(8, 2, BLOCK_V=2048)},
    ("logits_grad", 2): {"any": _tile(4, 2, BLOCK_V=2048)},
    ("logits_grad", 4): {"any": _tile(4, 2, BLOCK_V=1024)},
}

# Small enough that the odd sizes of the tests cross the borders of tiles, splits and groups.
_INTERPRETER = {
    "BLOCK_N": 16, "BLOCK_O": 32, "BLOCK_D": 32, "BLOCK_C": 32, "BLOCK_K": 32, "BLOCK_V": 256,
    "BLOCK_H": 32, "GROUP": 2, "SPLITS": 2, "SPLIT_N": 32,
}  # fmt: skip


def architecture(tensor: Tensor) -> str:
    """The key of the pinned tables: "interpreter", "gfx942", "sm_80", "sm_90" or "sm_100"."""
    if not tensor.is_cuda:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(tensor.device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def of_architecture(entry: dict[str, T], like: Tensor) -> T:
    """What a pinned table says for like's device."""
    return entry.get(architecture(like), entry["any"])


def pinned(kernel: str, like: Tensor) -> Tile:
    """A fresh copy of the tile of `kernel` for tensors of like's dtype and device."""
    name, tile = architecture(like), of_architecture(PINNED[kernel, like.element_size()], like)
    if name == "interpreter":
        return {k: _INTERPRETER.get(k, v) for k, v in tile.items()}
    tile = dict(tile)
    if name == "gfx942":
        tile["num_stages"] = min(tile["num_stages"], 2)  # 64 KiB of shared memory
    return tile


def has_descriptors(like: Tensor) -> bool:
    """Whether a copy engine reads tiles by tensor descriptors: Hopper's or later, or the
    interpreter. Elsewhere Triton makes plain loads of them that it does not pipeline."""
    return architecture(like) in ("sm_90", "sm_100", "interpreter")


def multiprocessors(like: Tensor) -> int:
    """Of like's GPU. The interpreter has three, so that tests give a program several tiles."""
    if not like.is_cuda:
        return 3
    return torch.cuda.get_device_properties(like.device).multi_processor_count


def precision(like: Tensor) -> str:
    """How `dot` multiplies: "float32" (interpreter), "tf32" when torch allows it, or "ieee"."""
    if triton_interpreted():
        return "float32"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def rank_block(rank: int, most: int) -> int:
    """The BLOCK_R of a kernel whose tile holds up to `most` ranks."""
    return min(most, max(16, triton.next_power_of_2(rank)))


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right by the vendor's library. out: float32; products are summed in float32."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    elif left.is_cuda and not torch.version.hip:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right by the vendor's library. out: float32; products are summed in float32."""
    if left.dtype == torch.float32:
        out.addmm_(left, right)
    elif left.is_cuda and not torch.version.hip:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(left.float(), right.float())


# ------------------------------------------------------------------------------------------------
# Products and pointers
# ------------------------------------------------------------------------------------------------


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr):
    """acc + left @ right. The interpreter's product of bfloat16 is wrong: there, cast first."""
    if PRECISION == "float32":
        return acc + tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def at(ptr, rows, columns, stride_row, stride_column):
    """Pointers to the tile rows x columns; offsets are 64-bit, so tensors may exceed 2^31."""
    row_offsets = rows.to(tl.int64)[:, None] * stride_row
    return ptr + row_offsets + columns.to(tl.int64)[None, :] * stride_column


# ------------------------------------------------------------------------------------------------
# Dropout: the numbers of _dropout.keep_mask
# ------------------------------------------------------------------------------------------------


@triton.jit
def keep(seed, rows, first_column, threshold, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) bool: which elements of rows x (first_column + 0..BLOCK_D) are kept.

    One Philox call makes eight neighbouring columns, so first_column is a multiple of 8.
    """
    groups = first_column // 8 + tl.arange(0, BLOCK_D // 8)[None, :]
    zero = groups * 0
    w0, w1, w2, w3 = tl.philox(seed, groups, rows[:, None], zero, zero, n_rounds=7)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    numbers = tl.interleave(words & 0xFFFF, words >> 16)
    return numbers >= tl.cast(threshold, tl.uint32)


def dropout_arguments(p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """seed, threshold and 1 / (1 - p), as `keep` wants them."""
    return (seed, threshold_of(p), 1.0 / (1.0 - p)) if p > 0.0 else (None, 0, 1.0)


# ------------------------------------------------------------------------------------------------
# The logits z, and the row state m, ell, u, t and mq, lq, d, tq of _softmax
# ------------------------------------------------------------------------------------------------

# A state that has seen no columns; finite, so that differences of two maxima stay finite.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def tanh(x):
    """Within 1.4 units in the last place of float32: for small x, where 1 - e^-2x cancels, by a
    polynomial, and near 1 by one rounding of what is left of 1."""
    y = x * x
    p = ((-0.00571703331 * y + 0.0206505761) * y - 0.0537434944) * y + 0.133314912
    small = x + x * y * (p * y - 0.333332839)
    e = tl.exp(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(y < 0.390625, small, tl.where(x < 0, -large, large))


@triton.jit
def transform(raw, inverse_temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    """z = softcap tanh(raw / softcap) / temperature"""
    if HAS_SOFTCAP:
        raw = softcap * tanh(raw / softcap)
    return raw * inverse_temperature


@triton.jit
def transform_slope(raw, inverse_temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    """dz / draw, of the tanh itself: divided out of z again, it would have lost the digits that
    1 - tanh^2 lives in deep in the cap."""
    if HAS_SOFTCAP:
        t = tanh(raw / softcap)
        return (1.0 - t * t) * inverse_temperature
    else:
        return inverse_temperature


@triton.jit
def fold(
    z, zq,  # (rows, columns), -inf in columns beyond the vocabulary
    m, ell, u,  # (rows,)
    mq, lq, d,  # (rows,), as zq not read without a reference
    HAS_REF: tl.constexpr,
):  # fmt: skip
    """The state with one more tile of columns."""
    m_new = tl.maximum(m, tl.max(z, 1))
    up = m - m_new
    shrink = tl.exp(up)
    centred = z - m_new[:, None]
    e = tl.exp(centred)
    # where e is 0 the logit has no say, -inf included
    u = (u + ell * up) * shrink + tl.sum(e * tl.where(e > 0, centred, 0.0), 1)
    if HAS_REF:
        mq_new = tl.maximum(mq, tl.max(zq, 1))
        lq = lq * tl.exp(mq - mq_new) + tl.sum(tl.exp(zq - mq_new[:, None]), 1)
        mq = mq_new
        d = d * shrink + tl.sum(tl.where(e > 0, e * (z - zq), 0.0), 1)
    ell = ell * shrink + tl.sum(e, 1)
    return m_new, ell, u, mq, lq, d


@triton.jit
def pick(z, columns, target, t):
    """t, or z[target] where the target is one of these columns."""
    hit = columns[None, :] == target[:, None]
    return t + tl.sum(tl.where(hit, z, 0.0), 1)


@triton.jit
def write_stats(
    log_prob_ptr, peak_ptr, log_sum_ptr, entropy_ptr,  # (N,) float32
    ref_log_prob_ptr, gap_ptr, kl_ptr,  # (N,) float32
    rows, in_rows, counted,  # (rows,)
    m, ell, u, t, mq, lq, d, tq,  # (rows,)
    HAS_TARGET: tl.constexpr, HAS_REF: tl.constexpr,
):  # fmt: skip
    """Finish the state and write the Stats of these rows; rows that are not counted become 0."""
    log_l = tl.log(ell)
    tl.store(peak_ptr + rows, tl.where(counted, m, 0.0), mask=in_rows)
    tl.store(log_sum_ptr + rows, tl.where(counted, log_l, 0.0), mask=in_rows)
    tl.store(entropy_ptr + rows, tl.where(counted, log_l - u / ell, 0.0), mask=in_rows)
    if HAS_TARGET:
        tl.store(log_prob_ptr + rows, tl.where(counted, t - m - log_l, 0.0), mask=in_rows)
    if HAS_REF:
        log_lq, gap = tl.log(lq), d / ell
        kl = gap - (m - mq) - (log_l - log_lq)
        tl.store(gap_ptr + rows, tl.where(counted, gap, 0.0), mask=in_rows)
        tl.store(kl_ptr + rows, tl.where(counted, kl, 0.0), mask=in_rows)
        if HAS_TARGET:
            ref_log_prob = tl.where(counted, tq - mq - log_lq, 0.0)
            tl.store(ref_log_prob_ptr + rows, ref_log_prob, mask=in_rows)


@triton.jit
def load_z(
    logits_ptr,  # (N, V)
    bias_ptr,  # (V,) or None
    row, columns, V, stride_n, stride_v, inverse_temperature, softcap, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The logits of one row before softcap and temperature, and z, (1, columns) float32; beyond V
    z is -inf"""
    inside = columns[None, :] < V
    raw = tl.load(at(logits_ptr, row, columns, stride_n, stride_v), mask=inside, other=0.0)
    raw = raw.to(tl.float32)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    z = transform(raw, inverse_temperature, softcap, HAS_SOFTCAP)
    return raw, tl.where(inside, z, float("-inf"))


@triton.jit
def row_stats(
    logits_ptr, ref_ptr,  # (rows, V); the second may be None
    bias_ptr,  # (V,) or None
    target_ptr,  # (N,) or None
    log_prob_ptr, peak_ptr, log_sum_ptr, entropy_ptr,  # (N,) float32
    ref_log_prob_ptr, gap_ptr, kl_ptr,  # (N,) float32
    row, ref_row, V, ignore_index, stride_zn, stride_zv, stride_qn, stride_qv,
    inverse_temperature, softcap, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the Stats of one row of logits, and of the reference's row beside it."""
    if target_ptr is not None:
        target = tl.load(target_ptr + row)
        counted = target != ignore_index
    else:
        counted = row >= 0
    m = tl.full((1,), LOWEST, tl.float32)
    ell, u, t = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    mq, lq, d, tq = m, tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    for first in range(0, V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        _, z = load_z(
            logits_ptr, bias_ptr, row, columns, V, stride_zn, stride_zv,
            inverse_temperature, softcap, HAS_SOFTCAP,
        )  # fmt: skip
        zq = z
        if ref_ptr is not None:
            _, zq = load_z(
                ref_ptr, bias_ptr, ref_row, columns, V, stride_qn, stride_qv,
                inverse_temperature, softcap, HAS_SOFTCAP,
            )  # fmt: skip
        m, ell, u, mq, lq, d = fold(z, zq, m, ell, u, mq, lq, d, ref_ptr is not None)
        if target_ptr is not None:
            t = pick(z, columns, target, t)
            if ref_ptr is not None:
                tq = pick(zq, columns, target, tq)
    write_stats(
        log_prob_ptr, peak_ptr, log_sum_ptr, entropy_ptr, ref_log_prob_ptr, gap_ptr, kl_ptr,
        row, row >= 0, counted, m, ell, u, t, mq, lq, d, tq,
        target_ptr is not None, ref_ptr is not None,
    )  # fmt: skip


@triton.jit
def logits_gradient(
    z, zq,  # (rows, columns); zq is read only with d_kl
    rows, in_rows, columns,  # columns: their numbers in the vocabulary
    target_ptr,  # (N,) or None
    peak_ptr, log_sum_ptr, entropy_ptr, gap_ptr,  # (N,) float32
    d_log_prob_ptr, d_entropy_ptr, d_kl_ptr,  # (N,) float32 or None: incoming gradients
    ignore_index,
):  # fmt: skip
    """d loss / dz = d_log_prob ([j = target] - p) - d_entropy p (log p + entropy)
    + d_kl p (z - zq - gap), and 0 in rows that are ignored."""
    counted = in_rows
    if target_ptr is not None:
        target = tl.load(target_ptr + rows, mask=in_rows, other=-1)
        counted = in_rows & (target != ignore_index)
    peak = tl.load(peak_ptr + rows, mask=counted, other=0.0)[:, None]
    log_p = z - peak - tl.load(log_sum_ptr + rows, mask=counted, other=0.0)[:, None]
    p = tl.where(counted[:, None], tl.exp(log_p), 0.0)
    log_p = tl.where(p > 0, log_p, 0.0)
    slope = tl.zeros_like(p)
    if d_log_prob_ptr is not None:
        d_log_prob = tl.load(d_log_prob_ptr + rows, mask=counted, other=0.0)[:, None]
        slope -= d_log_prob
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + rows, mask=counted, other=0.0)[:, None]
        entropy = tl.load(entropy_ptr + rows, mask=counted, other=0.0)[:, None]
        slope -= d_entropy * (log_p + entropy)
    if d_kl_ptr is not None:
        d_kl = tl.load(d_kl_ptr + rows, mask=counted, other=0.0)[:, None]
        gap = tl.load(gap_ptr + rows, mask=counted, other=0.0)[:, None]
        slope += d_kl * tl.where(p > 0, z - zq - gap, 0.0)
    dz = p * slope
    if d_log_prob_ptr is not None:
        dz += tl.where(columns[None, :] == target[:, None], d_log_prob, 0.0)
    return dz
