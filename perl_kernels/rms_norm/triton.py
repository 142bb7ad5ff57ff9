"""The GPU kernels of rms_norm, in Triton: one program a row, each element read and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._triton import on_device_of


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,  # (N, D)
    weight_ptr,  # (D,)
    y_ptr,  # (N, D), contiguous
    eps, offset, D,
    stride_xn, stride_xd,
    ROUNDS_FIRST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    inside = columns < D
    x = tl.load(x_ptr + row * stride_xn + columns.to(tl.int64) * stride_xd, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + offset
    wide = x.to(tl.float32)
    y = wide * (1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / D + eps))
    if ROUNDS_FIRST:
        y = y.to(x.dtype).to(tl.float32)
    tl.store(y_ptr + row * D + columns, y * weight, mask=inside)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, x_ptr,  # (N, D)
    weight_ptr,  # (D,)
    dx_ptr,  # (N, D), contiguous
    eps, offset, D,
    stride_dyn, stride_dyd, stride_xn, stride_xd,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dn = w dy ; dx = r (dn - x r^2 mean(dn x))"""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    inside, wide = columns < D, columns.to(tl.int64)
    x = tl.load(x_ptr + row * stride_xn + wide * stride_xd, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dyn + wide * stride_dyd, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + offset
    dn = dy.to(tl.float32) * weight
    r = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / D + eps)
    n = x * r
    dx = r * (dn - n * (tl.sum(dn * n, 0) / D))
    tl.store(dx_ptr + row * D + columns, dx, mask=inside)


def _launch(features: int) -> dict[str, int]:
    block = triton.next_power_of_2(features)
    return {"BLOCK_D": block, "num_warps": min(16, max(1, block // 512))}


def forward(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor:
    rows, features = x.shape
    y = x.new_empty(rows, features)
    if rows > 0:
        with on_device_of(x):
            _rms_norm_fwd_kernel[(rows,)](
                x, weight.contiguous(), y, eps, offset, features, *x.stride(),
                ROUNDS_FIRST=rounds_first, **_launch(features),
            )  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    rows, features = x.shape
    dx = x.new_empty(rows, features)
    if rows > 0:
        with on_device_of(x):
            _rms_norm_bwd_kernel[(rows,)](
                dy, x, weight.contiguous(), dx, eps, offset, features, *dy.stride(), *x.stride(),
                **_launch(features),
            )  # fmt: skip
    return dx
