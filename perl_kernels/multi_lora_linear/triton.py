"""The GPU kernels of multi_lora_linear, in Triton.

    segments   rows sorted by adapter, and where each adapter's stretch of them starts
    shrink     s  = drop(x) a_g^T          ds = dy (scale_g b_g)       reads x, or dy, once
    expand     y  = s (scale_g b_g)^T + bias       dx = drop'(ds a_g)
    reduce     da = ds^T drop(x)           db = dy^T s                 reads x, or dy, once
    sum        of the parts that reduce makes

The adapters' part is written first, for rows without one as the bias or 0, and the vendor's library
starts its product of all rows (x weight^T, dy weight) from it: the base costs what it costs alone,
and nothing is scattered into its result.

A tile has rows of one adapter only. Which rows, each program finds from the segments, so nothing
waits for the GPU: of N rows and G adapters there are at most cdiv(N, BLOCK_N) + G tiles, and that
many programs are launched. The a_g, and the b_g^T, are stacked to (G, R, features), smaller ranks
padded with zeros to the largest: a table of offsets would have to come from the host in every call,
and products this thin wait for x and y, not for the zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    at,
    dot,
    dropout_arguments,
    keep,
    on_device_of,
    pinned,
    precision,
    rank_block,
)

# ------------------------------------------------------------------------------------------------
# Segments
# ------------------------------------------------------------------------------------------------


@triton.jit
def _multi_lora_linear_segments_kernel(
    adapter_ptr,  # (N,) int64
    order_ptr,  # (N,) int32
    start_ptr,  # (G + 2,) int32
    N, G,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """order: the rows of adapter 0 as they come, then those of 1, ...; last those of none, which
    count as adapter G. Program g places its own rows behind those of smaller numbers."""
    g = tl.program_id(0)
    smaller = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, N, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        number = tl.load(adapter_ptr + rows, mask=rows < N, other=G)
        number = tl.where((number < 0) | (number > G), G, number)
        smaller += (number < g).to(tl.int32)
    place = tl.sum(smaller, 0)
    tl.store(start_ptr + g, place)
    if g == G:
        tl.store(start_ptr + G + 1, N)
    for first in range(0, N, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        number = tl.load(adapter_ptr + rows, mask=rows < N, other=G)
        number = tl.where((number < 0) | (number > G), G, number)
        mine = ((number == g) & (rows < N)).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(mine, 0) - 1, rows, mask=mine > 0)
        place += tl.sum(mine, 0)


@triton.jit
def _tiles_of(start_ptr, G, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """Of each group of rows (the adapters', then none's): its tiles, and where it ends."""
    groups = tl.arange(0, GROUPS)
    begin = tl.load(start_ptr + groups, mask=groups <= G, other=0)
    end = tl.load(start_ptr + groups + 1, mask=groups <= G, other=0)
    return groups, tl.cdiv(end - begin, BLOCK_N), begin, end


@triton.jit
def _tile_at(start_ptr, tile, G, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """Its adapter, its first place in the order, and the end of its adapter's places. Where there
    are fewer tiles than that the adapter is none and the end 0."""
    groups, tiles, begin, end = _tiles_of(start_ptr, G, BLOCK_N, GROUPS)
    after = tl.cumsum(tiles, 0)
    g = tl.sum((after <= tile).to(tl.int32), 0)
    first = begin + (tile - after + tiles) * BLOCK_N
    first, end = tl.where(groups == g, first, 0), tl.where(groups == g, end, 0)
    return g, tl.sum(first, 0), tl.sum(end, 0)


# ------------------------------------------------------------------------------------------------
# Products. D stands for the features of the wide matrix, R for the largest rank; places count rows
# in the order of their adapters.
# ------------------------------------------------------------------------------------------------


@triton.jit
def _multi_lora_linear_shrink_kernel(
    x_ptr,  # (N, D)
    a_ptr,  # (G, R, D)
    s_ptr,  # (places, R)
    order_ptr,  # (N,)
    start_ptr,  # (G + 2,)
    seed_ptr,  # () int64, or None without dropout
    threshold, kept_scale,
    D, R, G,
    stride_xn, stride_xd,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """s = drop(x) a_g^T, and 0 for rows without an adapter"""
    g, first_place, end = _tile_at(start_ptr, tl.program_id(0), G, BLOCK_N, GROUPS)
    places = first_place + tl.arange(0, BLOCK_N)
    inside = places < end
    rows = tl.load(order_ptr + places, mask=inside, other=0)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    a_ptr += g.to(tl.int64) * R * D
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for first in range(0, tl.where(g < G, D, 0), BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        in_columns = columns[None, :] < D
        x_ptrs = at(x_ptr, rows, columns, stride_xn, stride_xd)
        x = tl.load(x_ptrs, mask=inside[:, None] & in_columns, other=0.0)
        if seed_ptr is not None:
            x = tl.where(keep(seed, rows, first, threshold, BLOCK_D), x, 0.0)
        in_a = (ranks[:, None] < R) & in_columns
        a = tl.load(at(a_ptr, ranks, columns, D, 1), mask=in_a, other=0.0)
        acc = dot(x, a.T, acc, PRECISION)
    s_ptrs = at(s_ptr, places, ranks, R, 1)
    tl.store(s_ptrs, acc * kept_scale, mask=inside[:, None] & (ranks[None, :] < R))


@triton.jit
def _multi_lora_linear_expand_kernel(
    s_ptr,  # (places, R)
    a_ptr,  # (G, R, D)
    bias_ptr,  # (D,) or None
    x_ptr,  # (N, D)
    order_ptr,  # (N,)
    start_ptr,  # (G + 2,)
    seed_ptr,  # () int64, or None without dropout
    threshold, kept_scale,
    D, R, G,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """x = drop'(s a_g) + bias, and the bias or 0 for rows without an adapter"""
    g, first_place, end = _tile_at(start_ptr, tl.program_id(0), G, BLOCK_N, GROUPS)
    places = first_place + tl.arange(0, BLOCK_N)
    inside = places < end
    rows = tl.load(order_ptr + places, mask=inside, other=0)
    first_column = tl.program_id(1) * BLOCK_D
    columns = first_column + tl.arange(0, BLOCK_D)
    in_columns = columns[None, :] < D
    a_ptr += g.to(tl.int64) * R * D
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, tl.where(g < G, R, 0), BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        in_s = inside[:, None] & (ranks[None, :] < R)
        s = tl.load(at(s_ptr, places, ranks, R, 1), mask=in_s, other=0.0)
        in_a = (ranks[:, None] < R) & in_columns
        a = tl.load(at(a_ptr, ranks, columns, D, 1), mask=in_a, other=0.0)
        acc = dot(s, a, acc, PRECISION)
    if seed_ptr is not None:
        kept = keep(tl.load(seed_ptr), rows, first_column, threshold, BLOCK_D)
        acc = tl.where(kept, acc * kept_scale, 0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    tl.store(at(x_ptr, rows, columns, D, 1), acc, mask=inside[:, None] & in_columns)


@triton.jit
def _multi_lora_linear_reduce_kernel(
    s_ptr,  # (places, R)
    x_ptr,  # (N, D)
    parts_ptr,  # (chunks, R, D) float32
    order_ptr,  # (N,)
    start_ptr,  # (G + 2,)
    seed_ptr,  # () int64, or None without dropout
    threshold, kept_scale,
    D, R, G,
    stride_xn, stride_xd,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, SPLIT_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """s^T drop(x), for one block of columns and one chunk of an adapter's rows; the tile is its
    transpose"""
    chunk, first_column = tl.program_id(0), tl.program_id(1) * BLOCK_D
    g, first_place, end = _tile_at(start_ptr, chunk, G, SPLIT_N, GROUPS)
    end = tl.where(g < G, min(first_place + SPLIT_N, end), 0)
    columns = first_column + tl.arange(0, BLOCK_D)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for first in range(first_place, end, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        inside = places < end
        rows = tl.load(order_ptr + places, mask=inside, other=0)
        x_ptrs = at(x_ptr, rows, columns, stride_xn, stride_xd)
        x = tl.load(x_ptrs, mask=inside[:, None] & (columns[None, :] < D), other=0.0)
        if seed_ptr is not None:
            x = tl.where(keep(seed, rows, first_column, threshold, BLOCK_D), x, 0.0)
        in_s = inside[:, None] & (ranks[None, :] < R)
        s = tl.load(at(s_ptr, places, ranks, R, 1), mask=in_s, other=0.0)
        acc = dot(x.T, s, acc, PRECISION)
    acc *= kept_scale
    in_parts = (ranks[:, None] < R) & (columns[None, :] < D) & (end > 0)
    parts_ptr += chunk.to(tl.int64) * R * D
    tl.store(at(parts_ptr, ranks, columns, D, 1), acc.T, mask=in_parts)


@triton.jit(do_not_specialize=["g"])
def _multi_lora_linear_sum_kernel(
    parts_ptr,  # (chunks, R, D) float32
    start_ptr,  # (G + 2,)
    out_ptr,  # (elements / D, D)
    scale,
    g, elements, D, R, G,
    stride_outr, stride_outd,
    BLOCK: tl.constexpr, SPLIT_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """out = scale * sum of adapter g's parts, in their order"""
    groups, chunks, _, _ = _tiles_of(start_ptr, G, SPLIT_N, GROUPS)
    before = tl.sum(tl.where(groups < g, chunks, 0), 0)
    after = before + tl.sum(tl.where(groups == g, chunks, 0), 0)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    parts_ptr += before.to(tl.int64) * R * D + i
    for _ in range(before, after):
        acc += tl.load(parts_ptr, mask=i < elements, other=0.0)
        parts_ptr += R * D
    tl.store(out_ptr + i // D * stride_outr + i % D * stride_outd, scale * acc, mask=i < elements)


# ------------------------------------------------------------------------------------------------
# The two entry points: arguments and results as in op.py
# ------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (O, D)
    bias: Tensor | None,  # (O,)
    a: list[Tensor],  # (R_g, D) each
    b: list[Tensor],  # (O, R_g) each
    scale: list[float],
    adapter: Tensor,  # (N,) int64
    dropout_p: float,
    seed: Tensor | None,  # () int64
) -> tuple[Tensor, Tensor]:  # y (N, O), s (N, R)
    with on_device_of(x):
        segments = _segments(adapter, len(a))
        s = _shrink(x, _stacked(a, x.dtype), segments, dropout_p, seed)
        y = _expand(s, _scaled(b, scale, x.dtype), bias, segments, 0.0, None)
        return y.addmm_(x, weight.T), s


def backward(
    dy: Tensor,  # (N, O)
    x: Tensor,  # (N, D)
    weight: Tensor,  # (O, D)
    a: list[Tensor],
    b: list[Tensor],
    scale: list[float],
    adapter: Tensor,  # (N,) int64
    dropout_p: float,
    seed: Tensor | None,
    s: Tensor,  # (N, R)
    need_dx: bool,
    need_dab: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # dx (N, D), da, db
    da = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in a if need_dab]
    db = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in b if need_dab]
    dx = x.new_empty(0)
    with on_device_of(x):
        segments = _segments(adapter, len(a))
        ds = _shrink(dy, _scaled(b, scale, x.dtype), segments, 0.0, None)
        if need_dab:
            _reduce(ds, x, segments, dropout_p, seed, da, [1.0] * len(a))
            _reduce(s, dy, segments, 0.0, None, [t.T for t in db], scale)
        if need_dx:
            dx = _expand(ds, _stacked(a, x.dtype), None, segments, dropout_p, seed)
            dx.addmm_(dy, weight)  # dx += dy weight
    return dx, da, db


# ------------------------------------------------------------------------------------------------
# Launches
# ------------------------------------------------------------------------------------------------

Segments = tuple[Tensor, Tensor]  # order (N,), start (G + 2,)


def _segments(adapter: Tensor, count: int) -> Segments:
    order = adapter.new_empty(adapter.shape[0], dtype=torch.int32)
    start = adapter.new_empty(count + 2, dtype=torch.int32)
    _multi_lora_linear_segments_kernel[(count + 1,)](
        adapter, order, start, adapter.shape[0], count, BLOCK=1024, num_warps=4
    )
    return order, start


def _stacked(factors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """(G, R, features) contiguous, in the dtype of the products. factors: (R_g, features)."""
    rank = max(t.shape[0] for t in factors)
    padded = (torch.nn.functional.pad(t, (0, 0, 0, rank - t.shape[0])) for t in factors)
    return torch.stack([t.to(dtype) for t in padded])


def _scaled(b: list[Tensor], scale: list[float], dtype: torch.dtype) -> Tensor:
    """scale_g b_g^T, stacked. Exact in any dtype where the scale is a power of 2."""
    return _stacked([t.T for t in torch._foreach_mul(b, scale)], dtype)


def _groups(count: int) -> int:
    return triton.next_power_of_2(count + 1)


def _shrink(
    x: Tensor, a: Tensor, segments: Segments, p: float, seed: Tensor | None
) -> Tensor:  # (N, R)
    """drop(x) a_g^T, rows by adapter. a: (G, R, D)"""
    (rows, features), (count, rank, _) = x.shape, a.shape
    s = x.new_empty(rows, rank)
    if rows == 0:
        return s
    tile = pinned("multi_lora_linear_shrink", x)
    block_r = rank_block(rank, 128)
    grid = (triton.cdiv(rows, tile["BLOCK_N"]) + count, triton.cdiv(rank, block_r))
    _multi_lora_linear_shrink_kernel[grid](
        x, a, s, *segments, *dropout_arguments(p, seed), features, rank, count, *x.stride(),
        PRECISION=precision(x), BLOCK_R=block_r, GROUPS=_groups(count), **tile,
    )  # fmt: skip
    return s


def _expand(
    s: Tensor, a: Tensor, bias: Tensor | None, segments: Segments, p: float, seed: Tensor | None
) -> Tensor:  # (N, D)
    """drop'(s a_g) + bias, rows as they come. s: rows by adapter; a: (G, R, D)"""
    rows, (count, rank, features) = s.shape[0], a.shape
    x = s.new_empty(rows, features)
    if x.numel() == 0:
        return x
    tile = pinned("multi_lora_linear_expand", s)
    grid = (triton.cdiv(rows, tile["BLOCK_N"]) + count, triton.cdiv(features, tile["BLOCK_D"]))
    _multi_lora_linear_expand_kernel[grid](
        s, a, bias, x, *segments, *dropout_arguments(p, seed), features, rank, count,
        PRECISION=precision(s), BLOCK_R=rank_block(rank, 64), GROUPS=_groups(count), **tile,
    )  # fmt: skip
    return x


def _reduce(
    s: Tensor, x: Tensor, segments: Segments, p: float, seed: Tensor | None, out: list[Tensor],
    scale: list[float],
) -> None:  # fmt: skip
    """out_g (R_g, D) = scale_g * s^T drop(x) over the rows of adapter g"""
    (rows, features), rank, count = x.shape, s.shape[1], len(out)
    tile = pinned("multi_lora_linear_reduce", x)
    block_r = rank_block(rank, 64)
    chunks = triton.cdiv(rows, tile["SPLIT_N"]) + count
    parts = x.new_empty((chunks, rank, features), dtype=torch.float32)
    grid = (chunks, triton.cdiv(features, tile["BLOCK_D"]), triton.cdiv(rank, block_r))
    _multi_lora_linear_reduce_kernel[grid](
        s, x, parts, *segments, *dropout_arguments(p, seed), features, rank, count, *x.stride(),
        PRECISION=precision(x), BLOCK_R=block_r, GROUPS=_groups(count), **tile,
    )  # fmt: skip
    block = 1024
    for g, to in enumerate(out):
        _multi_lora_linear_sum_kernel[(triton.cdiv(to.numel(), block),)](
            parts, segments[1], to, scale[g], g, to.numel(), features, rank, count, *to.stride(),
            BLOCK=block, SPLIT_N=tile["SPLIT_N"], GROUPS=_groups(count), num_warps=4,
        )  # fmt: skip
