"""The GPU kernels of the head, in Triton. Two routes, chosen by ROUTE in op.py:

    tiles   one sweep over the head's weight: tiles of logits live in registers, float32, and are
            folded into each row's state; with a reference, each weight tile serves both rows. A
            gradient is a second sweep: the same tiles again, written as dz for a bounded block of
            the vocabulary, which the library's matrix products turn into dhidden (and dweight, da,
            db) with float32 sums.
    blocks  a bounded block of rows, the policy's and below them the reference's, times the whole
            weight by the library, in float32. A kernel folds the logits of a row into its
            statistics and then, knowing them, writes dz over them; library products of dz follow.

In products of (N, H) and (V, H), with the gradient: log p takes 3 by tiles and 2 by blocks, with KL
5 and 3 (4 where the two get their coefficients later), and training an adapter adds none. "tiles"
is the route until a GPU has measured both; it also has what trains the head itself, and gradients
that come after the sweep.

An adapter adds K more features to a logit's product: s b^T with s = scale * hidden a^T, both in
hidden's type and in 16 bits as sums of two terms, K = 2 R or 3 R.

By tiles the vocabulary is cut into splits that depend on its size alone, and a second kernel
combines their states in order: a row's bits do not depend on the other rows of its batch. By blocks
they may: the library chooses its kernel by the number of rows. The largest temporaries are one
block of dz or logits and one float32 block of dhidden, whatever N and V are; a trained head adds
its own gradient in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import backend_of
from .._softmax import empty_stats
from .._triton import (
    LOWEST,
    add_product,
    at,
    dot,
    fold,
    load_z,
    logits_gradient,
    on_device_of,
    pick,
    pinned,
    precision,
    product,
    row_stats,
    transform,
    transform_slope,
    write_stats,
)

# grad works on blocks of this many rows, and of as many columns as keep dz within these bytes.
BLOCK_ROWS = 4096
BLOCK_BYTES = 128 * 2**20
# The route "blocks": as many whole rows of logits as stay within these bytes, and at least so many,
# or the products would wait for the weight.
LOGITS_BYTES = 224 * 2**20
LOGITS_ROWS = 128


@triton.jit
def _add_products(
    raw, raw_q,  # (BLOCK_N, BLOCK_V) float32
    left_ptr,  # (N, K)
    ref_ptr,  # (N, K) or None
    right_ptr,  # (V, K)
    rows, columns,  # of this tile
    N, K, V,
    stride_ln, stride_lk, stride_qn, stride_qk, stride_rv, stride_rk,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """raw + left right^T and raw_q + ref right^T; each tile of right is read once for both."""
    in_rows = rows[:, None] < N
    for first in range(0, K, BLOCK_K):
        features = first + tl.arange(0, BLOCK_K)
        inside = features[None, :] < K
        right_ptrs = at(right_ptr, columns, features, stride_rv, stride_rk)
        right = tl.load(right_ptrs, mask=(columns[:, None] < V) & inside, other=0.0)
        left_ptrs = at(left_ptr, rows, features, stride_ln, stride_lk)
        left = tl.load(left_ptrs, mask=in_rows & inside, other=0.0)
        raw = dot(left, right.T, raw, PRECISION)
        if ref_ptr is not None:
            ref_ptrs = at(ref_ptr, rows, features, stride_qn, stride_qk)
            ref = tl.load(ref_ptrs, mask=in_rows & inside, other=0.0)
            raw_q = dot(ref, right.T, raw_q, PRECISION)
    return raw, raw_q


@triton.jit
def _logits_tile(
    hidden_ptr,  # (N, H)
    ref_ptr,  # (N, H) or None
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) or None
    s_ptr, b_ptr,  # (N, K) and (V, K), or None: an adapter adds s b^T to the policy's logits
    rows, columns,  # of this tile
    N, H, V, K,
    stride_hn, stride_hh, stride_qn, stride_qh, stride_wv, stride_wh,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The logits of rows x columns before softcap and temperature, of the policy and of the
    reference (BLOCK_N, BLOCK_V) float32; without a reference the second say nothing."""
    raw = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    raw_q = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    raw, raw_q = _add_products(
        raw, raw_q, hidden_ptr, ref_ptr, weight_ptr, rows, columns, N, H, V,
        stride_hn, stride_hh, stride_qn, stride_qh, stride_wv, stride_wh, PRECISION, BLOCK_H,
    )  # fmt: skip
    if s_ptr is not None:
        raw, _ = _add_products(
            raw, raw, s_ptr, None, b_ptr, rows, columns, N, K, V, K, 1, K, 1, K, 1,
            PRECISION, BLOCK_H,
        )  # fmt: skip
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        raw += bias
        if ref_ptr is not None:
            raw_q += bias
    return raw, raw_q


@triton.jit
def _logits(raw, columns, V, inverse_temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    """z of raw (rows, columns), -inf beyond V"""
    z = transform(raw, inverse_temperature, softcap, HAS_SOFTCAP)
    return tl.where(columns[None, :] < V, z, float("-inf"))


@triton.jit
def _head_stats_kernel(
    hidden_ptr,  # (N, H)
    ref_ptr,  # (N, H) or None
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) or None
    s_ptr, b_ptr,  # (N, K) and (V, K), or None
    target_ptr,  # (N,) or None
    state_ptr,  # (8 or 4, SPLITS, N) float32: m, l, u, t, and with a reference mq, lq, d, tq
    N, H, V, K, splits, split_v,
    stride_hn, stride_hh, stride_qn, stride_qh, stride_wv, stride_wh,
    inverse_temperature, softcap,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The state of one block of rows over one split of the vocabulary"""
    pid, n_blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    n_block, split = tl.swizzle2d(pid // splits, pid % splits, n_blocks, splits, GROUP)
    rows = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    if target_ptr is not None:
        target = tl.load(target_ptr + rows, mask=in_rows, other=-1)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    ell, u, t = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    mq, lq, d, tq = m, tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    for first in range(split * split_v, min(split * split_v + split_v, V), BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        raw, raw_q = _logits_tile(
            hidden_ptr, ref_ptr, weight_ptr, bias_ptr, s_ptr, b_ptr, rows, columns, N, H, V, K,
            stride_hn, stride_hh, stride_qn, stride_qh, stride_wv, stride_wh,
            PRECISION, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        z = _logits(raw, columns, V, inverse_temperature, softcap, HAS_SOFTCAP)
        zq = z
        if ref_ptr is not None:
            zq = _logits(raw_q, columns, V, inverse_temperature, softcap, HAS_SOFTCAP)
        m, ell, u, mq, lq, d = fold(z, zq, m, ell, u, mq, lq, d, ref_ptr is not None)
        if target_ptr is not None:
            t = pick(z, columns, target, t)
            if ref_ptr is not None:
                tq = pick(zq, columns, target, tq)
    field = tl.cast(splits, tl.int64) * N
    out_ptrs = state_ptr + split.to(tl.int64) * N + rows
    tl.store(out_ptrs, m, mask=in_rows)
    tl.store(out_ptrs + field, ell, mask=in_rows)
    tl.store(out_ptrs + 2 * field, u, mask=in_rows)
    tl.store(out_ptrs + 3 * field, t, mask=in_rows)
    if ref_ptr is not None:
        tl.store(out_ptrs + 4 * field, mq, mask=in_rows)
        tl.store(out_ptrs + 5 * field, lq, mask=in_rows)
        tl.store(out_ptrs + 6 * field, d, mask=in_rows)
        tl.store(out_ptrs + 7 * field, tq, mask=in_rows)


@triton.jit
def _head_combine_kernel(
    state_ptr,  # (8 or 4, SPLITS, N) float32
    target_ptr,  # (N,) or None
    log_prob_ptr, peak_ptr, log_sum_ptr, entropy_ptr,  # (N,) float32
    ref_log_prob_ptr, gap_ptr, kl_ptr,  # (N,) float32
    N, splits, ignore_index,
    HAS_REF: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The states of all splits, in order, as the row's statistics"""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    field = tl.cast(splits, tl.int64) * N
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    ell, u, t = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    mq, lq, d, tq = m, tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    part_ptrs = state_ptr + rows
    for _ in range(splits):
        m_part = tl.load(part_ptrs, mask=in_rows, other=0.0)
        l_part = tl.load(part_ptrs + field, mask=in_rows, other=1.0)
        u_part = tl.load(part_ptrs + 2 * field, mask=in_rows, other=0.0)
        t += tl.load(part_ptrs + 3 * field, mask=in_rows, other=0.0)
        m_new = tl.maximum(m, m_part)
        up, up_part = m - m_new, m_part - m_new
        shrink, shrink_part = tl.exp(up), tl.exp(up_part)
        u = (u + ell * up) * shrink + (u_part + l_part * up_part) * shrink_part
        if HAS_REF:
            mq_part = tl.load(part_ptrs + 4 * field, mask=in_rows, other=0.0)
            lq_part = tl.load(part_ptrs + 5 * field, mask=in_rows, other=1.0)
            d_part = tl.load(part_ptrs + 6 * field, mask=in_rows, other=0.0)
            tq += tl.load(part_ptrs + 7 * field, mask=in_rows, other=0.0)
            mq_new = tl.maximum(mq, mq_part)
            lq = lq * tl.exp(mq - mq_new) + lq_part * tl.exp(mq_part - mq_new)
            mq = mq_new
            d = d * shrink + d_part * shrink_part
        ell = ell * shrink + l_part * shrink_part
        m = m_new
        part_ptrs += N
    counted = in_rows
    if target_ptr is not None:
        counted = tl.load(target_ptr + rows, mask=in_rows, other=ignore_index) != ignore_index
    write_stats(
        log_prob_ptr, peak_ptr, log_sum_ptr, entropy_ptr, ref_log_prob_ptr, gap_ptr, kl_ptr,
        rows, in_rows, counted, m, ell, u, t, mq, lq, d, tq, target_ptr is not None, HAS_REF,
    )  # fmt: skip


@triton.jit
def _head_dz_kernel(
    hidden_ptr,  # (N, H)
    ref_ptr,  # (N, H), or None without d_kl
    weight_ptr,  # (V, H): a block of the vocabulary that starts at first_column
    bias_ptr,  # (V,) or None
    s_ptr, b_ptr,  # (N, K) and (V, K), or None
    target_ptr,  # (N,) or None
    peak_ptr, log_sum_ptr, entropy_ptr, gap_ptr,  # (N,) float32
    d_log_prob_ptr, d_entropy_ptr, d_kl_ptr,  # (N,) float32 or None
    dz_ptr,  # (N, V), rows stride_dz apart
    N, H, V, K, first_column, ignore_index, stride_dz,
    stride_hn, stride_hh, stride_qn, stride_qh, stride_wv, stride_wh,
    inverse_temperature, softcap,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """d loss / d logits of one tile, the logits before softcap and temperature"""
    pid, n_blocks, v_blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    n_block, v_block = tl.swizzle2d(pid // v_blocks, pid % v_blocks, n_blocks, v_blocks, GROUP)
    rows = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = v_block * BLOCK_V + tl.arange(0, BLOCK_V)
    raw, raw_q = _logits_tile(
        hidden_ptr, ref_ptr, weight_ptr, bias_ptr, s_ptr, b_ptr, rows, columns, N, H, V, K,
        stride_hn, stride_hh, stride_qn, stride_qh, stride_wv, stride_wh,
        PRECISION, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    z = _logits(raw, columns, V, inverse_temperature, softcap, HAS_SOFTCAP)
    zq = z
    if ref_ptr is not None:
        zq = _logits(raw_q, columns, V, inverse_temperature, softcap, HAS_SOFTCAP)
    dz = logits_gradient(
        z, zq, rows, rows < N, first_column + columns, target_ptr,
        peak_ptr, log_sum_ptr, entropy_ptr, gap_ptr,
        d_log_prob_ptr, d_entropy_ptr, d_kl_ptr, ignore_index,
    )  # fmt: skip
    dz *= transform_slope(raw, inverse_temperature, softcap, HAS_SOFTCAP)
    dz_ptrs = at(dz_ptr, rows, columns, stride_dz, 1)
    tl.store(dz_ptrs, dz, mask=(rows[:, None] < N) & (columns[None, :] < V))


# ------------------------------------------------------------------------------------------------
# The route "blocks": whole rows of logits that the library made
# ------------------------------------------------------------------------------------------------


@triton.jit
def _head_rows_kernel(
    raw_ptr,  # (N, V) float32, rows stride_raw apart; below them the reference's N, if any
    bias_ptr,  # (V,) or None
    target_ptr,  # (N,) or None
    log_prob_ptr, peak_ptr, log_sum_ptr, entropy_ptr,  # (N,) float32
    ref_log_prob_ptr, gap_ptr, kl_ptr,  # (N,) float32
    d_log_prob_ptr, d_kl_ptr,  # (N,) float32 or None
    dz_ptr,  # (N, V), rows stride_dz apart, over the logits; or None
    N, V, stride_raw, stride_dz, ignore_index,
    inverse_temperature, softcap,
    HAS_REF: tl.constexpr, APART: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The statistics of one row, then its dz; that of the KL APART, over the reference's logits.

    dz is at most as wide as the logits: a tile lies where its own logits or earlier ones did.
    """
    row = tl.program_id(0) + tl.arange(0, 1)
    ref_row = row + N if HAS_REF else row
    log_prob_d_kl_ptr = None if APART else d_kl_ptr
    row_stats(
        raw_ptr, raw_ptr if HAS_REF else None, bias_ptr, target_ptr,
        log_prob_ptr, peak_ptr, log_sum_ptr, entropy_ptr, ref_log_prob_ptr, gap_ptr, kl_ptr,
        row, ref_row, V, ignore_index, stride_raw, 1, stride_raw, 1,
        inverse_temperature, softcap, HAS_SOFTCAP, BLOCK_V,
    )  # fmt: skip
    if dz_ptr is not None:
        for first in range(0, V, BLOCK_V):
            columns = first + tl.arange(0, BLOCK_V)
            raw, z = load_z(
                raw_ptr, bias_ptr, row, columns, V, stride_raw, 1,
                inverse_temperature, softcap, HAS_SOFTCAP,
            )  # fmt: skip
            zq = z
            if d_kl_ptr is not None:
                _, zq = load_z(
                    raw_ptr, bias_ptr, ref_row, columns, V, stride_raw, 1,
                    inverse_temperature, softcap, HAS_SOFTCAP,
                )  # fmt: skip
            slope = transform_slope(raw, inverse_temperature, softcap, HAS_SOFTCAP)
            inside = columns[None, :] < V
            dz = logits_gradient(
                z, zq, row, row >= 0, columns, target_ptr, peak_ptr, log_sum_ptr, entropy_ptr,
                gap_ptr, d_log_prob_ptr, None, log_prob_d_kl_ptr, ignore_index,
            )  # fmt: skip
            if APART:
                dz_kl = logits_gradient(
                    z, zq, row, row >= 0, columns, target_ptr, peak_ptr, log_sum_ptr, entropy_ptr,
                    gap_ptr, None, None, d_kl_ptr, ignore_index,
                )  # fmt: skip
            tl.debug_barrier()  # all have read what is now written over
            tl.store(at(dz_ptr, row, columns, stride_dz, 1), dz * slope, mask=inside)
            if APART:
                tl.store(at(dz_ptr, ref_row, columns, stride_dz, 1), dz_kl * slope, mask=inside)


# ------------------------------------------------------------------------------------------------
# An adapter on the head: s b^T beside hidden weight^T
# ------------------------------------------------------------------------------------------------


class _Adapter:
    """s (N, R) = scale * hidden a^T, and both sides of s b^T for the kernels."""

    def __init__(self, hidden: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        self.s = hidden.new_zeros(hidden.shape[0], a.shape[0], dtype=torch.float32)
        for term in _terms(a, hidden.dtype):
            add_product(self.s, hidden, term.T)
        self.s *= scale
        left, right = _terms(self.s, hidden.dtype), _terms(b, hidden.dtype)
        self.b = right[0]  # (V, R) in hidden's dtype
        pairs = [(p, q) for i, p in enumerate(left) for j, q in enumerate(right) if i + j < 2]
        self.left = torch.cat([p for p, _ in pairs], 1)  # (N, K)
        self.right = torch.cat([q for _, q in pairs], 1)  # (V, K)

    def sides(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, int]:
        return self.left[rows], self.right[columns], self.left.shape[1]


_NO_SIDES = (None, None, 0)


def _terms(tensor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The tensor as one of dtype, or as the sum of two where one would round it: products of 16-bit
    terms then keep 16 bits of a float32 factor."""
    first = tensor.to(dtype)
    return [first] if tensor.dtype == dtype else [first, (tensor - first).to(dtype)]


# ------------------------------------------------------------------------------------------------
# The entry points: arguments and results as in op.py
# ------------------------------------------------------------------------------------------------


def stats(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    a: Tensor | None,  # (R, H)
    b: Tensor | None,  # (V, R)
    target: Tensor | None,  # (N,)
    ref_hidden: Tensor | None,  # (N, H)
    scale: float,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, ...]:  # the fields of Stats
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    has_ref = ref_hidden is not None
    out = empty_stats(hidden, rows, target is not None, has_ref)
    if rows == 0:
        return tuple(out)
    tile = pinned("head_stats_ref" if has_ref else "head_stats", hidden)
    blocks = triton.cdiv(vocabulary, tile["BLOCK_V"])
    split_v = triton.cdiv(blocks, tile.pop("SPLITS")) * tile["BLOCK_V"]
    splits = triton.cdiv(vocabulary, split_v)
    state = out.peak.new_empty(8 if has_ref else 4, splits, rows)
    adapter = None if a is None else _Adapter(hidden, a, b, scale)
    s, b, inner = _NO_SIDES if adapter is None else adapter.sides(slice(None), slice(None))
    with on_device_of(hidden):
        _head_stats_kernel[(triton.cdiv(rows, tile["BLOCK_N"]) * splits,)](
            hidden, ref_hidden, weight, bias, s, b, target, state,
            rows, hidden.shape[1], vocabulary, inner, splits, split_v,
            *_strides(hidden, ref_hidden, weight), 1.0 / temperature, softcap,
            HAS_SOFTCAP=softcap > 0.0, PRECISION=precision(hidden), **tile,
        )  # fmt: skip
        _head_combine_kernel[(triton.cdiv(rows, 128),)](
            state, target, *out, rows, splits, ignore_index,
            HAS_REF=has_ref, BLOCK_N=128, num_warps=4,
        )  # fmt: skip
    return tuple(out)


def units(
    hidden, weight, bias, a, b, target, ref_hidden, d_log_prob, d_kl, *options
) -> tuple[Tensor, ...]:  # the fields of Stats; dlog_prob, dkl (N, H)
    """By blocks; with d_log_prob, dlog_prob is the sum of both gradients times their weights."""
    apart = d_log_prob is None
    if apart:
        ones = hidden.new_ones(hidden.shape[0], dtype=torch.float32)
        d_log_prob = None if target is None else ones
        d_kl = None if ref_hidden is None else ones
    inputs = (hidden, weight, bias, a, b, target, ref_hidden)
    out, dhidden, *_ = by_blocks(*inputs, *options, d_log_prob, d_kl, apart=apart)
    none = hidden.new_empty(0)
    dlog_prob = none if d_log_prob is None else dhidden[0]
    return (*out, dlog_prob, dhidden[-1] if apart and d_kl is not None else none)


def by_blocks(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    a: Tensor | None,  # (R, H)
    b: Tensor | None,  # (V, R)
    target: Tensor | None,  # (N,)
    ref_hidden: Tensor | None,  # (N, H)
    scale: float,
    temperature: float,
    softcap: float,
    ignore_index: int,
    d_log_prob: Tensor | None = None,  # (N,) float32
    d_kl: Tensor | None = None,  # (N,) float32
    need_dhidden: bool = True,
    need_dab: bool = False,
    apart: bool = False,
) -> tuple[tuple[Tensor, ...], list[Tensor], Tensor, Tensor]:
    """One sweep: the fields of Stats, dhidden [(N, H)] and da, db.

    Without d_log_prob and d_kl there are no gradients. `apart`: those of the two are not added but
    two elements of dhidden; not with need_dab.
    """
    total, (vocabulary, features) = hidden.shape[0], weight.shape
    out = empty_stats(hidden, total, target is not None, ref_hidden is not None)
    given = (d_log_prob is not None) + (d_kl is not None)
    dhidden = [
        hidden.new_empty(hidden.shape if need_dhidden else (0,))
        for _ in range(given if apart else min(given, 1))
    ]
    da, db = (out.peak.new_zeros(t.shape if need_dab else (0,)) for t in (a, b))
    adapter = None if a is None else _Adapter(hidden, a, b, scale)
    sides = 1 if ref_hidden is None else 2
    width = 64 * triton.cdiv(vocabulary, 64)  # rows start aligned, whatever the vocabulary
    height = max(1, LOGITS_BYTES // (4 * width * LOGITS_ROWS)) * LOGITS_ROWS // sides
    logits = out.peak.new_empty(sides * min(height, total), width)
    for i in range(0, total, height):
        rows = slice(i, min(i + height, total))
        h, count = hidden[rows], rows.stop - i
        raw = logits[: sides * count, :vocabulary]
        product(raw, h if ref_hidden is None else torch.cat([h, ref_hidden[rows]]), weight.T)
        if adapter is not None:
            left, right, _ = adapter.sides(rows, slice(None))
            add_product(raw[:count], left, right.T)
        dz = logits.view(hidden.dtype)[: len(dhidden) * count, :vocabulary]
        _write_rows(
            raw, bias, *(_part(t, rows) for t in (target, *out, d_log_prob, d_kl)), dz,
            count, sides, temperature, softcap, ignore_index,
        )  # fmt: skip
        if not dhidden:
            continue
        ds = None
        if adapter is not None:
            ds = out.peak.new_empty(len(dz), a.shape[0])
            product(ds, dz, adapter.b)
            ds *= scale
        if need_dab:
            add_product(db, dz.T, adapter.s[rows].to(dz.dtype))
            add_product(da, ds.T.to(h.dtype), h)
        if need_dhidden:
            sums = out.peak.new_empty(len(dz), features)
            product(sums, dz, weight)
            if ds is not None:
                sums.addmm_(ds, a.float())
            for one, of_rows in zip(dhidden, sums.split(count), strict=True):
                one[rows] = of_rows
    if need_dab:
        da, db = da.to(a.dtype), db.to(b.dtype)
    return tuple(out), dhidden, da, db


def _write_rows(
    raw, bias, target, log_prob, peak, log_sum, entropy, ref_log_prob, gap, kl, d_log_prob, d_kl,
    dz, rows, sides, temperature, softcap, ignore_index,
):  # fmt: skip
    """The statistics of whole rows of logits, and over them dz: one, two APART, or none."""
    if _in_cuda(dz):
        torch.ops.perl_kernels.head_rows_cuda(
            raw, bias, target, log_prob, peak, log_sum, entropy, ref_log_prob, gap, kl,
            d_log_prob, d_kl, dz, temperature, softcap, ignore_index,
        )  # fmt: skip
        return
    with on_device_of(raw):
        _head_rows_kernel[(rows,)](
            raw, bias, target, log_prob, peak, log_sum, entropy, ref_log_prob, gap, kl,
            d_log_prob, d_kl, dz if len(dz) else None,
            rows, raw.shape[1], raw.stride(0), dz.stride(0), ignore_index,
            1.0 / temperature, softcap,
            HAS_REF=sides == 2, APART=len(dz) > rows, HAS_SOFTCAP=softcap > 0.0,
            **pinned("head_rows", dz),
        )  # fmt: skip


def _in_cuda(like: Tensor) -> bool:
    """Whether csrc/cuda runs the rows of the route "blocks": where the backend "cuda" is asked for.

    "auto" stays with Triton until a GPU has measured both in bench_head_rows.py; then one goes.
    """
    return backend_of(like) == "cuda"


def _part(column: Tensor | None, rows: slice) -> Tensor | None:
    """These rows; None where there is nothing."""
    return column[rows] if column is not None and column.numel() else None


def grad(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    a: Tensor | None,  # (R, H)
    b: Tensor | None,  # (V, R)
    target: Tensor | None,  # (N,)
    ref_hidden: Tensor | None,  # (N, H)
    peak: Tensor,  # (N,) float32, as all below
    log_sum: Tensor,
    entropy: Tensor,
    gap: Tensor,
    d_log_prob: Tensor | None,
    d_entropy: Tensor | None,
    d_kl: Tensor | None,
    scale: float,
    temperature: float,
    softcap: float,
    ignore_index: int,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    need_dab: bool,
) -> tuple[Tensor, ...]:  # dhidden (N, H), dweight (V, H), dbias (V,) float32, da, db
    total, vocabulary = hidden.shape[0], weight.shape[0]
    known = (peak, log_sum, entropy, gap)
    incoming = [None if d is None else d.contiguous() for d in (d_log_prob, d_entropy, d_kl)]
    dhidden = hidden.new_zeros(hidden.shape if need_dhidden else (0,))
    dbias = peak.new_zeros(weight.shape[:1] if need_dbias else (0,))
    dtypes = [hidden.dtype if t is None else t.dtype for t in (weight, a, b)]
    dweight, da, db = (
        peak.new_zeros(t.shape if wanted else (0,))
        for t, wanted in ((weight, need_dweight), (a, need_dab), (b, need_dab))
    )
    if total > 0 and any(d is not None for d in incoming):
        adapter = None if a is None else _Adapter(hidden, a, b, scale)
        rows = min(total, BLOCK_ROWS)
        # whole multiples of 256 columns: rows of dz start aligned, whatever the vocabulary
        most = max(1, BLOCK_BYTES // (rows * hidden.element_size() * 256))
        width = 256 * min(most, triton.cdiv(vocabulary, 256))
        buffer = hidden.new_empty(rows, width)
        for i in range(0, total, rows):
            of_rows = slice(i, min(i + rows, total))
            h = hidden[of_rows]
            sums = peak.new_zeros(h.shape) if need_dhidden else None
            ds = None if adapter is None else torch.zeros_like(adapter.s[of_rows])
            for first in range(0, vocabulary, width):
                block = slice(first, min(first + width, vocabulary))
                dz = buffer[: of_rows.stop - i, : block.stop - first]
                _write_dz(
                    dz, hidden, weight, bias, adapter, target, ref_hidden, known, incoming,
                    temperature, softcap, ignore_index, of_rows, block,
                )  # fmt: skip
                if need_dhidden:
                    add_product(sums, dz, weight[block])
                if need_dweight:
                    add_product(dweight[block], dz.T, h)
                if need_dbias:
                    dbias[block] += dz.sum(0, dtype=torch.float32)
                if adapter is not None:
                    add_product(ds, dz, adapter.b[block])
                if need_dab:
                    add_product(db[block], dz.T, adapter.s[of_rows].to(dz.dtype))
            if adapter is not None:
                ds *= scale
            if need_dab:
                add_product(da, ds.T.to(h.dtype), h)
            if need_dhidden:
                if adapter is not None:
                    sums.addmm_(ds, a.float())
                dhidden[of_rows] = sums
    dweight, da, db = (t.to(d) for t, d in zip((dweight, da, db), dtypes, strict=True))
    return dhidden, dweight, dbias, da, db


def _write_dz(
    dz, hidden, weight, bias, adapter, target, ref_hidden, known, incoming,
    temperature, softcap, ignore_index, rows, columns,
):  # fmt: skip
    """dz (rows, columns) of the [N, V] gradient, in hidden's dtype"""
    d_kl = incoming[2]
    ref = None if d_kl is None else ref_hidden[rows]
    hidden, weight = hidden[rows], weight[columns]
    bias = None if bias is None else bias[columns]
    s, b, inner = _NO_SIDES if adapter is None else adapter.sides(rows, columns)
    tile = pinned("head_dz" if ref is None else "head_dz_ref", hidden)
    programs = triton.cdiv(dz.shape[0], tile["BLOCK_N"]) * triton.cdiv(dz.shape[1], tile["BLOCK_V"])
    with on_device_of(hidden):
        _head_dz_kernel[(programs,)](
            hidden, ref, weight, bias, s, b,
            *(_part(column, rows) for column in (target, *known, *incoming)), dz,
            dz.shape[0], hidden.shape[1], dz.shape[1], inner,
            columns.start, ignore_index, dz.stride(0),
            *_strides(hidden, ref, weight), 1.0 / temperature, softcap,
            HAS_SOFTCAP=softcap > 0.0, PRECISION=precision(hidden), **tile,
        )  # fmt: skip


def _strides(hidden: Tensor, ref: Tensor | None, weight: Tensor) -> tuple[int, ...]:
    return (*hidden.stride(), *(hidden if ref is None else ref).stride(), *weight.stride())
