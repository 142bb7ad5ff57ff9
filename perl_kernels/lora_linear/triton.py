"""The GPU kernels of lora_linear, in Triton.

    shrink    s  = drop(x) a^T, all projections stacked               reads x once
    fwd       y  = scale * s b^T + bias + x weight^T                  few tokens: one kernel
    ds_db     ds = scale * dy b ; db = scale * dy^T s                 reads dy once
    da        da = ds^T drop(x)                                       reads x once
    dx        dx = drop'(ds a), onto which the library adds dy weight

The thin products are these kernels; the wide ones (x weight^T, dy weight) go to the vendor's
library with the LoRA term as the starting value of its accumulator, so y is rounded no more than
twice and never read by a pass of its own. Sums over many tiles are kept as float32 parts and added
in a fixed order: no atomics, the same bits every time. The dropout mask is computed again wherever
it is needed (see `_dropout`); the seed is read on the device, so nothing waits for the GPU.
csrc/cuda/lora_linear.cuh has shrink and ds_db too, for the backend "cuda".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dropout import threshold_of
from .._library import backend_of
from .._triton import at, dot, keep, on_device_of, pinned, precision

# Up to this many tokens y is one fused kernel, bound by reading the weight; above, the library's
# matrix product is the better main loop. float32 without tensor cores turns around sooner.
FUSED_TOKENS = {2: 64, 4: 16}


# ------------------------------------------------------------------------------------------------
# Forward
# ------------------------------------------------------------------------------------------------


@triton.jit
def _lora_linear_shrink_kernel(
    x_ptr,  # (N, D)
    a_ptr,  # (R, D)
    s_ptr,  # (SPLITS, N, R), or (N, R) with one split
    seed_ptr,  # () int64, or None without dropout
    threshold, kept_scale,
    N, D, R, split_d,
    stride_xn, stride_xd,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s = drop(x) a^T over the columns of one split"""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for first in range(split * split_d, min(split * split_d + split_d, D), BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        inside = columns[None, :] < D
        x = tl.load(
            at(x_ptr, rows, columns, stride_xn, stride_xd),
            mask=(rows[:, None] < N) & inside, other=0.0,
        )  # fmt: skip
        if seed_ptr is not None:
            x = tl.where(keep(seed, rows, first, threshold, BLOCK_D), x, 0.0)
        a = tl.load(at(a_ptr, ranks, columns, D, 1), mask=(ranks[:, None] < R) & inside, other=0.0)
        acc = dot(x, a.T, acc, PRECISION)
    acc *= kept_scale
    s_ptrs = at(s_ptr + split.to(tl.int64) * N * R, rows, ranks, R, 1)
    tl.store(s_ptrs, acc, mask=(rows[:, None] < N) & (ranks[None, :] < R))


@triton.jit
def _lora_linear_fwd_kernel(
    x_ptr,  # (N, D)
    weight_ptr,  # (O, D), any strides
    bias_ptr,  # (O,) or None
    s_ptr,  # (N, R)
    b_ptr,  # (O, R)
    y_ptr,  # (N, O)
    scale,
    N, D, O, R,  # noqa: E741
    stride_xn, stride_xd, stride_wo, stride_wd, stride_sn, stride_bo, stride_br,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = scale * s b^T + bias + x weight^T, the whole sum in one float32 accumulator.

    The tile is y^T: output features are the tall side of the tensor core's product, so that a
    handful of tokens still fills it.
    """
    pid, n_blocks, o_blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(O, BLOCK_O)
    n_block, o_block = tl.swizzle2d(pid // o_blocks, pid % o_blocks, n_blocks, o_blocks, GROUP)
    rows = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    outs = o_block * BLOCK_O + tl.arange(0, BLOCK_O)
    in_rows, in_outs = rows[:, None] < N, outs[:, None] < O
    acc = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
    for first in range(0, R, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        inside = ranks[None, :] < R
        s = tl.load(at(s_ptr, rows, ranks, stride_sn, 1), mask=in_rows & inside, other=0.0)
        b_ptrs = at(b_ptr, outs, ranks, stride_bo, stride_br)
        b = tl.load(b_ptrs, mask=in_outs & inside, other=0.0)
        acc = dot(b, s.T, acc, PRECISION)
    acc *= scale
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + outs, mask=outs < O, other=0.0).to(tl.float32)[:, None]
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        inside = columns[None, :] < D
        x_ptrs = at(x_ptr, rows, columns, stride_xn, stride_xd)
        weight_ptrs = at(weight_ptr, outs, columns, stride_wo, stride_wd)
        x = tl.load(x_ptrs, mask=in_rows & inside, other=0.0)
        weight = tl.load(weight_ptrs, mask=in_outs & inside, other=0.0)
        acc = dot(weight, x.T, acc, PRECISION)
    tl.store(at(y_ptr, rows, outs, O, 1), acc.T, mask=in_rows & (outs[None, :] < O))


# ------------------------------------------------------------------------------------------------
# Backward
# ------------------------------------------------------------------------------------------------


@triton.jit
def _lora_linear_bwd_ds_db_kernel(
    dy_ptr,  # (N, O)
    b_ptr,  # (O, R)
    s_ptr,  # (N, R)
    ds_ptr,  # (O blocks, N, R) float32
    db_ptr,  # (N splits, O, R) float32, or None when only ds is wanted
    scale,
    N, O, R,  # noqa: E741
    stride_dyn, stride_dyo, stride_bo, stride_br, stride_sn,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr, SPLIT_N: tl.constexpr,
):  # fmt: skip
    """ds = scale * dy b ; db = scale * dy^T s, for one block of outputs and one split of rows"""
    split, o_block = tl.program_id(0), tl.program_id(1)
    outs = o_block * BLOCK_O + tl.arange(0, BLOCK_O)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_ranks = ranks[None, :] < R
    in_b = (outs[:, None] < O) & in_ranks
    b = tl.load(at(b_ptr, outs, ranks, stride_bo, stride_br), mask=in_b, other=0.0)
    db = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for first in range(split * SPLIT_N, min(split * SPLIT_N + SPLIT_N, N), BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        in_rows = rows[:, None] < N
        dy_ptrs = at(dy_ptr, rows, outs, stride_dyn, stride_dyo)
        dy = tl.load(dy_ptrs, mask=in_rows & (outs[None, :] < O), other=0.0)
        ds = dot(dy, b, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), PRECISION)
        ds_ptrs = at(ds_ptr + o_block.to(tl.int64) * N * R, rows, ranks, R, 1)
        tl.store(ds_ptrs, scale * ds, mask=in_rows & in_ranks)
        if db_ptr is not None:
            s = tl.load(at(s_ptr, rows, ranks, stride_sn, 1), mask=in_rows & in_ranks, other=0.0)
            db = dot(dy.T, s, db, PRECISION)
    if db_ptr is not None:
        db_ptrs = at(db_ptr + split.to(tl.int64) * O * R, outs, ranks, R, 1)
        tl.store(db_ptrs, scale * db, mask=in_b)


@triton.jit
def _lora_linear_bwd_da_kernel(
    ds_ptr,  # (N, R)
    x_ptr,  # (N, D)
    da_ptr,  # (N splits, R, D) float32
    seed_ptr,  # () int64, or None without dropout
    threshold, kept_scale,
    N, D, R,
    stride_xn, stride_xd,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, SPLIT_N: tl.constexpr,
):  # fmt: skip
    """da = ds^T drop(x), for one block of columns and one split of rows; the tile is da^T"""
    split, first_column = tl.program_id(0), tl.program_id(1) * BLOCK_D
    columns = first_column + tl.arange(0, BLOCK_D)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for first in range(split * SPLIT_N, min(split * SPLIT_N + SPLIT_N, N), BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        in_rows = rows[:, None] < N
        x_ptrs = at(x_ptr, rows, columns, stride_xn, stride_xd)
        x = tl.load(x_ptrs, mask=in_rows & (columns[None, :] < D), other=0.0)
        if seed_ptr is not None:
            x = tl.where(keep(seed, rows, first_column, threshold, BLOCK_D), x, 0.0)
        ds = tl.load(at(ds_ptr, rows, ranks, R, 1), mask=in_rows & (ranks[None, :] < R), other=0.0)
        acc = dot(x.T, ds, acc, PRECISION)
    acc *= kept_scale
    da_ptrs = at(da_ptr + split.to(tl.int64) * R * D, ranks, columns, D, 1)
    tl.store(da_ptrs, acc.T, mask=(ranks[:, None] < R) & (columns[None, :] < D))


@triton.jit
def _lora_linear_bwd_dx_kernel(
    ds_ptr,  # (N, R)
    a_ptr,  # (R, D)
    dx_ptr,  # (N, D)
    seed_ptr,  # () int64
    threshold, kept_scale,
    N, D, R,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dx = drop'(ds a)"""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_column = tl.program_id(1) * BLOCK_D
    columns = first_column + tl.arange(0, BLOCK_D)
    in_rows, in_columns = rows[:, None] < N, columns[None, :] < D
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, R, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        ds = tl.load(at(ds_ptr, rows, ranks, R, 1), mask=in_rows & (ranks[None, :] < R), other=0.0)
        a = tl.load(
            at(a_ptr, ranks, columns, D, 1), mask=(ranks[:, None] < R) & in_columns, other=0.0
        )
        acc = dot(ds, a, acc, PRECISION)
    kept = keep(tl.load(seed_ptr), rows, first_column, threshold, BLOCK_D)
    dx = tl.where(kept, acc * kept_scale, 0.0)
    tl.store(at(dx_ptr, rows, columns, D, 1), dx, mask=in_rows & in_columns)


@triton.jit
def _lora_linear_sum_kernel(
    parts_ptr,  # (PARTS, elements) float32
    out_ptr,  # (elements / columns, columns), rows stride_out apart
    parts, elements, columns,
    stride_part, stride_out,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = sum of the parts, in their order"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        acc += tl.load(parts_ptr + i, mask=i < elements, other=0.0)
        parts_ptr += stride_part
    tl.store(out_ptr + (i // columns) * stride_out + i % columns, acc, mask=i < elements)


# ------------------------------------------------------------------------------------------------
# The two entry points: arguments and results as in op.py
# ------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,  # (N, D)
    weight: list[Tensor],  # (O, D) each
    bias: list[Tensor],  # (O,) each, or empty
    a: list[Tensor],  # (R, D) each
    b: list[Tensor],  # (O, R) each
    scale: list[float],
    dropout_p: float,
    seed: Tensor | None,  # () int64
) -> tuple[list[Tensor], Tensor]:  # y (N, O) each, s (N, sum of R)
    with on_device_of(x):
        s = _shrink(x, _stack(a, x.dtype), dropout_p, seed)
        y = []
        for i, s_i in enumerate(s.split([t.shape[0] for t in a], dim=1)):
            expand = _fused if x.shape[0] <= FUSED_TOKENS[x.element_size()] else _by_library
            y.append(expand(x, weight[i], bias[i] if bias else None, s_i, b[i], scale[i]))
    return y, s


def backward(
    dy: list[Tensor],  # (N, O) each
    x: Tensor,  # (N, D)
    weight: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scale: list[float],
    dropout_p: float,
    seed: Tensor | None,
    s: Tensor,  # (N, sum of R)
    need_dx: bool,
    need_dab: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # dx (N, D), da, db
    ranks = [t.shape[0] for t in a]
    ds = x.new_empty(s.shape)
    da = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in a if need_dab]
    db = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in b if need_dab]
    with on_device_of(x):
        for i, (s_i, ds_i) in enumerate(zip(s.split(ranks, 1), ds.split(ranks, 1), strict=True)):
            _ds_db(dy[i], b[i], s_i, scale[i], ds_i, db[i] if need_dab else None)
        if need_dab:
            _da(ds, x, dropout_p, seed, da)
        if not need_dx:
            return x.new_empty(0), da, db
        dx = _dx(ds, _stack(a, x.dtype), dropout_p, seed)
        for i in range(len(dy)):
            dx.addmm_(dy[i], weight[i])  # dx += dy weight
    return dx, da, db


# ------------------------------------------------------------------------------------------------
# Launches
# ------------------------------------------------------------------------------------------------


def _stack(a: list[Tensor], dtype: torch.dtype) -> Tensor:
    """(sum of R, D) contiguous, in the dtype of the products."""
    return (a[0] if len(a) == 1 else torch.cat(a)).to(dtype).contiguous()


def _rank_block(rank: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(rank)))


def _dropout_arguments(p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """seed, threshold and 1 / (1 - p), as `keep` wants them."""
    return (seed, threshold_of(p), 1.0 / (1.0 - p)) if p > 0.0 else (None, 0, 1.0)


def _sum(parts: Tensor, out: Tensor) -> None:
    """out = parts.sum(0), cast once. parts: (PARTS, rows, columns), slices of it contiguous."""
    if out.numel() == 0:
        return
    block = 1024
    _lora_linear_sum_kernel[(triton.cdiv(out.numel(), block),)](
        parts, out, parts.shape[0], out.numel(), out.shape[1], parts.stride(0), out.stride(0),
        BLOCK=block, num_warps=4,
    )  # fmt: skip


def _in_cuda(like: Tensor) -> bool:
    """Whether csrc/cuda runs shrink and ds_db: 16-bit tensors, and the backend "cuda" asked for.

    "auto" stays with Triton until a GPU has measured the two in bench_lora_linear_parts.py; then
    one of them goes.
    """
    return backend_of(like) == "cuda" and like.element_size() == 2


def _shrink(x: Tensor, a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """s (N, R) = drop(x) a^T"""
    (rows, features), rank = x.shape, a.shape[0]
    if _in_cuda(x):
        return torch.ops.perl_kernels.lora_linear_shrink_cuda(x, a, p, seed)
    s = x.new_empty(rows, rank)
    if rows == 0:
        return s
    tile = pinned("lora_linear_shrink", x)
    block_r = _rank_block(rank, 128)
    blocks = (triton.cdiv(rows, tile["BLOCK_N"]), triton.cdiv(rank, block_r))
    # few tokens: split the columns too, so that some 128 programs read x and a together
    steps = triton.cdiv(features, tile["BLOCK_D"])
    splits = max(1, min(steps // 2, 128 // (blocks[0] * blocks[1])))
    split_d = triton.cdiv(steps, splits) * tile["BLOCK_D"]
    splits = triton.cdiv(features, split_d)
    parts = s if splits == 1 else x.new_empty((splits, rows, rank), dtype=torch.float32)
    _lora_linear_shrink_kernel[(*blocks, splits)](
        x, a, parts, *_dropout_arguments(p, seed), rows, features, rank, split_d, *x.stride(),
        PRECISION=precision(x), BLOCK_R=block_r, **tile,
    )  # fmt: skip
    if splits > 1:
        _sum(parts, s)
    return s


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float
) -> Tensor:
    (rows, features), (outs, rank) = x.shape, b.shape
    y = x.new_empty(rows, outs)
    if y.numel() == 0:
        return y
    if rows <= 64:
        tile = pinned("lora_linear_fwd_decode", x)
        tile["BLOCK_N"] = max(16, triton.next_power_of_2(rows))
    else:
        tile = pinned("lora_linear_fwd", x)
    b = b.to(x.dtype)
    programs = triton.cdiv(rows, tile["BLOCK_N"]) * triton.cdiv(outs, tile["BLOCK_O"])
    _lora_linear_fwd_kernel[(programs,)](
        x, weight, bias, s, b, y, scale, rows, features, outs, rank,
        *x.stride(), *weight.stride(), s.stride(0), *b.stride(),
        PRECISION=precision(x), BLOCK_R=_rank_block(rank, 64), **tile,
    )  # fmt: skip
    return y


def _by_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float
) -> Tensor:
    b = b.to(x.dtype)
    if bias is not None:
        y = torch.addmm(bias, s, b.T, alpha=scale)
    else:
        y = x.new_empty(x.shape[0], b.shape[0]).addmm_(s, b.T, beta=0, alpha=scale)
    return y.addmm_(x, weight.T)


def _ds_db(dy: Tensor, b: Tensor, s: Tensor, scale: float, ds: Tensor, db: Tensor | None) -> None:
    """ds = scale * dy b ; db = scale * dy^T s"""
    (rows, outs), rank = dy.shape, b.shape[1]
    b = b.to(dy.dtype)
    if _in_cuda(dy):
        torch.ops.perl_kernels.lora_linear_ds_db_cuda(dy, b, s, scale, ds, db)
        return
    tile = pinned("lora_linear_bwd_ds_db", dy)
    block_r = _rank_block(rank, 64)
    splits = max(1, triton.cdiv(rows, tile["SPLIT_N"]))
    o_blocks = triton.cdiv(outs, tile["BLOCK_O"])
    ds_parts = dy.new_empty((o_blocks, rows, rank), dtype=torch.float32)
    db_parts = None
    if db is not None:
        db_parts = dy.new_empty((splits, outs, rank), dtype=torch.float32)
    _lora_linear_bwd_ds_db_kernel[(splits, o_blocks, triton.cdiv(rank, block_r))](
        dy, b, s, ds_parts, db_parts, scale, rows, outs, rank,
        *dy.stride(), *b.stride(), s.stride(0),
        PRECISION=precision(dy), BLOCK_R=block_r, **tile,
    )  # fmt: skip
    _sum(ds_parts, ds)
    if db is not None:
        _sum(db_parts, db)


def _da(ds: Tensor, x: Tensor, p: float, seed: Tensor | None, da: list[Tensor]) -> None:
    """da = ds^T drop(x), written into one tensor per projection"""
    (rows, features), rank = x.shape, ds.shape[1]
    tile = pinned("lora_linear_bwd_da", x)
    block_r = _rank_block(rank, 64)
    splits = max(1, triton.cdiv(rows, tile["SPLIT_N"]))
    parts = x.new_empty((splits, rank, features), dtype=torch.float32)
    grid = (splits, triton.cdiv(features, tile["BLOCK_D"]), triton.cdiv(rank, block_r))
    _lora_linear_bwd_da_kernel[grid](
        ds, x, parts, *_dropout_arguments(p, seed), rows, features, rank, *x.stride(),
        PRECISION=precision(x), BLOCK_R=block_r, **tile,
    )  # fmt: skip
    for part, out in zip(parts.split([t.shape[0] for t in da], dim=1), da, strict=True):
        _sum(part, out)


def _dx(ds: Tensor, a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """dx = drop'(ds a), to which the base's part is added"""
    if p == 0.0 or ds.shape[0] == 0:
        return ds @ a
    (rows, rank), features = ds.shape, a.shape[1]
    dx = ds.new_empty(rows, features)
    tile = pinned("lora_linear_bwd_dx", ds)
    grid = (triton.cdiv(rows, tile["BLOCK_N"]), triton.cdiv(features, tile["BLOCK_D"]))
    _lora_linear_bwd_dx_kernel[grid](
        ds, a, dx, *_dropout_arguments(p, seed), rows, features, rank,
        PRECISION=precision(ds), BLOCK_R=_rank_block(rank, 64), **tile,
    )  # fmt: skip
    return dx
