"""The GPU kernels of lora_linear, in Triton.

    shrink    s  = drop(x) a^T, all projections stacked               reads x once
    decode    y  = scale * s b^T + bias + x weight^T, and s           few tokens: one kernel
    fused     y  likewise, from s; dx = drop'(ds a) + dy weight       many tokens: one kernel
    ds_db     ds = scale * dy b ; db = scale * dy^T s                 reads dy once
    da        da = ds^T drop(x)                                       reads x once
    dx        dx = drop'(ds a), onto which the library adds dy weight

`ROUTES` pins which way a size takes to y and to dx; what the tuner found on this GPU goes before it
(`pk.tune_lora_linear`, `pk.use_tuned`).

    library   The thin product is written first, and the vendor's product starts its sums from it in
              place: y is written once and read once more than a frozen layer's, and rounded twice.
    fused     The sums of one kernel start from the thin product and go on over the wide one: y is
              written and rounded once. At the ceilings of an H200, 4.2 TB/s and 750 TFLOP/s, the 4
              bytes of 16 bits that it saves are worth 357 / K of the product over K features: its
              main loop has to reach 1 / (1 + 357 / K) of the library's rate, 92 % at K = 4096 and
              74 % at 1024. No GPU has measured yet where it does, so it is pinned nowhere and runs
              only where the tuner has found it faster.
    decode    With few tokens the time is that of reading the weight. Each program makes s for
              itself on the way, from x and a in the cache: one launch makes all of y.

A weight with its adapter beside it, [[weight, scale b], [a, 0]], would make y and dx plain products
of the library. But [x, s] and [dy, ds] would have to lie in one row each: a copy of x or dy saves
nothing where D = O, and the copy of x would have to be kept. It is left out.

Sums over many tiles are kept as float32 parts and added in a fixed order: no atomics, the same bits
every time. The dropout mask is computed again wherever it is needed (see `_dropout`); the seed is
read on the device, so nothing waits for the GPU.
csrc/cuda/lora_linear.cuh has shrink and ds_db too, for the backend "cuda".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._library import backend_of
from .._triton import (
    Tile,
    add_product,
    at,
    dot,
    dropout_arguments,
    has_descriptors,
    keep,
    multiprocessors,
    of_architecture,
    on_device_of,
    pinned,
    precision,
    rank_block,
)
from .._tuned import Finding, finding

# (product, bytes an element) -> architecture -> (most tokens, route), in rising order; the library
# takes what none of them does. float32 without tensor cores turns to it sooner.
ROUTES: dict[tuple[str, int], dict[str, list[tuple[int, str]]]] = {
    ("y", 2): {"any": [(64, "decode")]},
    ("y", 4): {"any": [(16, "decode")]},
    ("dx", 2): {"any": []},
    ("dx", 4): {"any": []},
    ("dx_dropout", 2): {"any": []},
    ("dx_dropout", 4): {"any": []},
}

# The decode kernel makes s up to this rank; above, a would be more bytes than a program's weight.
DECODE_RANK = 32

# Up to these ranks the thin kernels move fewer bytes than the library's products. ds_db reads dy
# once instead of twice, but its parts are 8 R (1 / BLOCK_O + 1 / SPLIT_N) bytes for each element of
# dy; shrink and da read x again for every further block of ranks. They have to, with dropout.
SHRINK_RANK, DA_RANK, DS_DB_RANK = 128, 64, 32

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
def _lora_linear_decode_kernel(
    x_ptr,  # (N, D)
    weight_ptr,  # (O, D), any strides
    bias_ptr,  # (O,) or None
    a_ptr,  # (R, D) with R <= BLOCK_R: s is made and written; or None: s is read
    s_ptr,  # (N, R)
    b_ptr,  # (O, R)
    y_ptr,  # (N, O)
    seed_ptr,  # () int64, or None without dropout
    threshold, kept_scale, scale,
    N, D, O, R,  # noqa: E741
    stride_xn, stride_xd, stride_wo, stride_wd, stride_ar, stride_ad, stride_sn,
    stride_bo, stride_br,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s = drop(x) a^T ; y = x weight^T + bias + scale * s b^T

    The tiles are y^T and s^T: a handful of tokens is the short side of the tensor core's product.
    """
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_outs = rows[:, None] < N, outs[:, None] < O
    acc = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
    if a_ptr is not None:
        ranks = tl.arange(0, BLOCK_R)
        in_ranks = ranks[:, None] < R
        made = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        inside = columns[None, :] < D
        x_ptrs = at(x_ptr, rows, columns, stride_xn, stride_xd)
        weight_ptrs = at(weight_ptr, outs, columns, stride_wo, stride_wd)
        x = tl.load(x_ptrs, mask=in_rows & inside, other=0.0)
        weight = tl.load(weight_ptrs, mask=in_outs & inside, other=0.0)
        acc = dot(weight, x.T, acc, PRECISION)
        if a_ptr is not None:
            a_ptrs = at(a_ptr, ranks, columns, stride_ar, stride_ad)
            a = tl.load(a_ptrs, mask=in_ranks & inside, other=0.0)
            if seed_ptr is not None:
                x = tl.where(keep(seed, rows, first, threshold, BLOCK_D), x, 0.0)
            made = dot(a, x.T, made, PRECISION)
    part = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
    for first in range(0, R, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        inside = ranks[None, :] < R
        s_ptrs = at(s_ptr, rows, ranks, stride_sn, 1)
        if a_ptr is not None:
            s = (made * kept_scale).T.to(s_ptr.dtype.element_ty)
            tl.store(s_ptrs, s, mask=in_rows & inside & (tl.program_id(0) == 0))
        else:
            s = tl.load(s_ptrs, mask=in_rows & inside, other=0.0)
        b_ptrs = at(b_ptr, outs, ranks, stride_bo, stride_br)
        b = tl.load(b_ptrs, mask=in_outs & inside, other=0.0)
        part = dot(b, s.T, part, PRECISION)
    acc += scale * part
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + outs, mask=outs < O, other=0.0).to(tl.float32)[:, None]
    tl.store(at(y_ptr, rows, outs, O, 1), acc.T, mask=in_rows & (outs[None, :] < O))


@triton.jit
def _lora_linear_fused_kernel(
    left,  # (N, K): x, or dy. These three are tensor descriptors, or pointers
    right,  # (C, K), or (K, C) where TRANSPOSED: weight
    out,  # (N, C): y, or dx
    thin_left_ptr,  # (N, R): s, or ds
    thin_right_ptr,  # (C, R): b, or a^T
    bias_ptr,  # (C,) or None
    seed_ptr,  # () int64, or None without dropout of the thin product
    threshold, scale,  # scale: of the thin product, 1 / (1 - p) included
    N, C, K, R,
    stride_ln, stride_lk, stride_rc, stride_rk, stride_tn, stride_tc, stride_tr,
    DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """out = drop(scale * thin_left thin_right^T) + bias + left right^T, in one float32 accumulator

    Persistent: a program takes every num_programs-th tile.
    """
    n_blocks, c_blocks = tl.cdiv(N, BLOCK_N), tl.cdiv(C, BLOCK_C)
    for tile in range(tl.program_id(0), n_blocks * c_blocks, tl.num_programs(0)):
        n_block, c_block = tl.swizzle2d(
            tile // c_blocks, tile % c_blocks, n_blocks, c_blocks, GROUP
        )
        first_row, first_column = n_block * BLOCK_N, c_block * BLOCK_C
        rows = first_row + tl.arange(0, BLOCK_N)
        columns = first_column + tl.arange(0, BLOCK_C)
        in_rows, in_columns = rows[:, None] < N, columns[None, :] < C
        acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for first in range(0, R, BLOCK_R):
            ranks = first + tl.arange(0, BLOCK_R)
            left_ptrs = at(thin_left_ptr, rows, ranks, stride_tn, 1)
            right_ptrs = at(thin_right_ptr, ranks, columns, stride_tr, stride_tc)
            thin_left = tl.load(left_ptrs, mask=in_rows & (ranks[None, :] < R), other=0.0)
            thin_right = tl.load(right_ptrs, mask=(ranks[:, None] < R) & in_columns, other=0.0)
            acc = dot(thin_left, thin_right, acc, PRECISION)
        acc *= scale
        if seed_ptr is not None:
            kept = keep(tl.load(seed_ptr), rows, first_column, threshold, BLOCK_C)
            acc = tl.where(kept, acc, 0.0)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=columns < C, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        for first in range(0, K, BLOCK_K):
            if DESCRIPTORS:
                wide_left = left.load([first_row, first])
                if TRANSPOSED:
                    wide_right = right.load([first, first_column])
                else:
                    wide_right = right.load([first_column, first]).T
            else:
                features = first + tl.arange(0, BLOCK_K)
                left_ptrs = at(left, rows, features, stride_ln, stride_lk)
                right_ptrs = at(right, features, columns, stride_rk, stride_rc)
                wide_left = tl.load(left_ptrs, mask=in_rows & (features[None, :] < K), other=0.0)
                wide_right = tl.load(
                    right_ptrs, mask=(features[:, None] < K) & in_columns, other=0.0
                )
            acc = dot(wide_left, wide_right, acc, PRECISION)
        if DESCRIPTORS:
            # in halves, which leaves shared memory for another stage of the loop
            halves = acc.reshape((BLOCK_N, 2, BLOCK_C // 2)).permute((0, 2, 1)).split()
            out.store([first_row, first_column], halves[0].to(out.dtype))
            out.store([first_row, first_column + BLOCK_C // 2], halves[1].to(out.dtype))
        else:
            tl.store(at(out, rows, columns, C, 1), acc, mask=in_rows & in_columns)


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
    ranks = tl.arange(0, BLOCK_R)
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
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split, first_column = tl.program_id(1), tl.program_id(2) * BLOCK_D
    columns = first_column + tl.arange(0, BLOCK_D)
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
    ranks = [t.shape[0] for t in a]
    with on_device_of(x):
        routes = [_route("y", x, *t.shape) for t in b]
        makes_s = max(ranks) <= DECODE_RANK and {r.route for r in routes} == {"decode"}
        if makes_s:
            s = x.new_empty(x.shape[0], sum(ranks))
        else:
            s = _shrink(x, _stack(a, x.dtype), dropout_p, seed)
        y = []
        for i, (s_i, (route, tile)) in enumerate(zip(s.split(ranks, 1), routes, strict=True)):
            bias_i, b_i = bias[i] if bias else None, b[i].to(x.dtype)
            if route == "decode":
                a_i = a[i].to(x.dtype) if makes_s else None
                made = _decode(x, weight[i], bias_i, a_i, s_i, b_i, scale[i], dropout_p, seed, tile)
            elif route == "fused":
                made = _fused(x, weight[i], s_i, b_i, scale[i], tile, bias=bias_i)
            else:
                made = _by_library(x, weight[i], bias_i, s_i, b_i, scale[i])
            y.append(made)
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
        product = "dx" if dropout_p == 0.0 else "dx_dropout"
        a_all, (route, tile) = _stack(a, x.dtype), _route(product, x, *b[0].shape)
        if route == "fused":
            dx = _fused(dy[0], weight[0].T, ds, a_all.T, 1.0, tile, p=dropout_p, seed=seed)
        else:
            dx = _dx(ds, a_all, dropout_p, seed).addmm_(dy[0], weight[0])
        for i in range(1, len(dy)):
            dx.addmm_(dy[i], weight[i])  # dx += dy weight
    return dx, da, db


def _route(product: str, x: Tensor, outs: int, rank: int) -> Finding:
    """Which way to a product of one projection, and its tile where one was found."""
    rows, features = x.shape
    if min(rows, features, outs) == 0:
        return Finding("library")
    found = finding(product, x, outs, rank)
    if found is None:
        pins = of_architecture(ROUTES[product, x.element_size()], x)
        found = Finding(next((route for most, route in pins if rows <= most), "library"))
    return found


# ------------------------------------------------------------------------------------------------
# Launches
# ------------------------------------------------------------------------------------------------


def _stack(a: list[Tensor], dtype: torch.dtype) -> Tensor:
    """(sum of R, D) contiguous, in the dtype of the products."""
    return (a[0] if len(a) == 1 else torch.cat(a)).to(dtype).contiguous()


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
    if p == 0.0 and rank > SHRINK_RANK:
        return x @ a.T
    s = x.new_empty(rows, rank)
    if rows == 0:
        return s
    tile = pinned("lora_linear_shrink", x)
    block_r = rank_block(rank, SHRINK_RANK)
    blocks = (triton.cdiv(rows, tile["BLOCK_N"]), triton.cdiv(rank, block_r))
    # few tokens: split the columns too, so that some 128 programs read x and a together; the
    # arithmetic of a mask keeps four times as many busy
    programs = 128 if p == 0.0 else 512
    steps = triton.cdiv(features, tile["BLOCK_D"])
    splits = max(1, min(steps // 2, programs // (blocks[0] * blocks[1])))
    split_d = triton.cdiv(steps, splits) * tile["BLOCK_D"]
    splits = triton.cdiv(features, split_d)
    parts = s if splits == 1 else x.new_empty((splits, rows, rank), dtype=torch.float32)
    _lora_linear_shrink_kernel[(*blocks, splits)](
        x, a, parts, *dropout_arguments(p, seed), rows, features, rank, split_d, *x.stride(),
        PRECISION=precision(x), BLOCK_R=block_r, **tile,
    )  # fmt: skip
    if splits > 1:
        _sum(parts, s)
    return s


def _decode(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, s: Tensor, b: Tensor,
    scale: float, p: float, seed: Tensor | None, tile: Tile | None,
) -> Tensor:  # fmt: skip
    """y of few tokens, from s; given a, s too."""
    (rows, features), (outs, rank) = x.shape, b.shape
    y = x.new_empty(rows, outs)
    tile = tile or pinned("lora_linear_decode", x)
    block_n = min(64, max(16, triton.next_power_of_2(rows)))
    dropout = dropout_arguments(p if a is not None else 0.0, seed)
    _lora_linear_decode_kernel[(triton.cdiv(outs, tile["BLOCK_O"]), triton.cdiv(rows, block_n))](
        x, weight, bias, a, s, b, y, *dropout, scale,
        rows, features, outs, rank, *x.stride(), *weight.stride(),
        *((0, 0) if a is None else a.stride()), s.stride(0), *b.stride(),
        PRECISION=precision(x), BLOCK_N=block_n, BLOCK_R=rank_block(rank, 64), **tile,
    )  # fmt: skip
    return y


def _fused(
    left: Tensor,  # (N, K)
    right: Tensor,  # (C, K), any strides
    thin_left: Tensor,  # (N, R)
    thin_right: Tensor,  # (C, R), any strides
    scale: float,
    tile: Tile | None,
    *,
    bias: Tensor | None = None,  # (C,)
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:  # (N, C)
    """drop(scale * thin_left thin_right^T) + bias + left right^T"""
    (rows, features), (columns, rank) = left.shape, thin_right.shape
    out = left.new_empty(rows, columns)
    kernel = "lora_linear_fused" if p == 0.0 else "lora_linear_fused_dropout"
    tile = dict(tile or pinned(kernel, left))
    block_n, block_c, block_k = (tile[f"BLOCK_{letter}"] for letter in "NCK")
    programs = tile.pop("PROGRAMS") * multiprocessors(left)
    programs = min(programs, triton.cdiv(rows, block_n) * triton.cdiv(columns, block_c))
    transposed = right.stride(1) != 1
    stored = right.T if transposed else right
    operands = (left, right, out)
    described = has_descriptors(left) and all(map(_describable, (left, stored, out)))
    if described:
        right_block = [block_k, block_c] if transposed else [block_c, block_k]
        blocks = ([block_n, block_k], right_block, [block_n, block_c // 2])
        operands = map(TensorDescriptor.from_tensor, (left, stored, out), blocks)
    seed, threshold, kept_scale = dropout_arguments(p, seed)
    _lora_linear_fused_kernel[(programs,)](
        *operands, thin_left, thin_right, bias, seed, threshold, scale * kept_scale,
        rows, columns, features, rank, *left.stride(), *right.stride(), thin_left.stride(0),
        *thin_right.stride(), DESCRIPTORS=described, TRANSPOSED=transposed,
        PRECISION=precision(left), BLOCK_R=rank_block(rank, 32), **tile,
    )  # fmt: skip
    return out


def _describable(tensor: Tensor) -> bool:
    """Whether the copy engine can read it: rows whole, apart, and beginning at 16 bytes."""
    step, size = tensor.stride(0), tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and step * size % 16 == 0
    return aligned and tensor.stride(1) == 1 and step >= tensor.shape[1]


def _by_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float
) -> Tensor:
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
    if rank > DS_DB_RANK:
        ds.addmm_(dy, b, beta=0, alpha=scale)
        if db is not None:
            exact = db if db.dtype == torch.float32 else db.new_empty(db.shape, dtype=torch.float32)
            add_product(exact.zero_(), dy.T, s)
            torch.mul(exact, scale, out=db)
        return
    tile = pinned("lora_linear_bwd_ds_db", dy)
    splits = max(1, triton.cdiv(rows, tile["SPLIT_N"]))
    o_blocks = triton.cdiv(outs, tile["BLOCK_O"])
    ds_parts = dy.new_empty((o_blocks, rows, rank), dtype=torch.float32)
    db_parts = None
    if db is not None:
        db_parts = dy.new_empty((splits, outs, rank), dtype=torch.float32)
    _lora_linear_bwd_ds_db_kernel[(splits, o_blocks)](
        dy, b, s, ds_parts, db_parts, scale, rows, outs, rank,
        *dy.stride(), *b.stride(), s.stride(0),
        PRECISION=precision(dy), BLOCK_R=rank_block(rank, DS_DB_RANK), **tile,
    )  # fmt: skip
    _sum(ds_parts, ds)
    if db is not None:
        _sum(db_parts, db)


def _da(ds: Tensor, x: Tensor, p: float, seed: Tensor | None, da: list[Tensor]) -> None:
    """da = ds^T drop(x), written into one tensor per projection"""
    (rows, features), rank = x.shape, ds.shape[1]
    if p == 0.0 and rank > DA_RANK:
        parts = x.new_zeros((1, rank, features), dtype=torch.float32)
        add_product(parts[0], ds.T, x)
    else:
        tile = pinned("lora_linear_bwd_da", x)
        block_r = rank_block(rank, DA_RANK)
        splits = max(1, triton.cdiv(rows, tile["SPLIT_N"]))
        parts = x.new_empty((splits, rank, features), dtype=torch.float32)
        # ranks first, so that what is read again is in the cache
        grid = (triton.cdiv(rank, block_r), splits, triton.cdiv(features, tile["BLOCK_D"]))
        _lora_linear_bwd_da_kernel[grid](
            ds, x, parts, *dropout_arguments(p, seed), rows, features, rank, *x.stride(),
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
        ds, a, dx, *dropout_arguments(p, seed), rows, features, rank,
        PRECISION=precision(ds), BLOCK_R=rank_block(rank, 64), **tile,
    )  # fmt: skip
    return dx
