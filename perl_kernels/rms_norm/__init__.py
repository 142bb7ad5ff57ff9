"""RMSNorm with a frozen weight, that keeps its input as it came and nothing else.

Replaces, as Llama's models write it and as Gemma's do,

    wide = x.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = weight * n.to(x.dtype)                                  casting_mode="llama"
    y = (n * (offset + weight.float())).to(x.dtype)             casting_mode="gemma"

Zhang and Sennrich, arXiv 1910.07467. The math, with w = offset + weight:

    r = 1 / sqrt(mean(x^2) + eps) ; y = w x r
    dn = w dy ; dx = r (dn - x r^2 mean(dn x))

Saved for backward is x: 2 D bytes a token in bfloat16, where autograd keeps a float32 copy of it.
r is computed again, from a row that is read anyway. There is no dweight: the norm is frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import check_alike, check_constant, check_float, check_range, check_shape
from .._library import reaches_kernel
from . import op as _op  # noqa: F401 - registers the op

__all__ = ["rms_norm"]

CASTING_MODES = ("llama", "gemma")


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,), frozen
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> Tensor:  # (..., D)
    """x / sqrt(mean(x^2) + eps) * (offset + weight), each row of D by itself.

    Args:
        x: (..., D), float32, bfloat16, float16, or float64 (which runs on the reference).
        weight: (D,) in x's dtype, frozen.
        eps: added to the mean square; at least 0.
        offset: 1.0 where the weight is stored as its difference from 1 (Gemma).
        casting_mode: when a 16-bit x is rounded: "llama", before the weight is multiplied in, and
            after; "gemma", once, after. The sums and the root are float32 in both.

    Returns:
        (..., D) in x's dtype, contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name or range is wrong, or weight requires
            grad.
    """
    check_float("x", x)
    check_float("weight", weight)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError("x has no elements to normalise; wanted (..., D)")
    check_shape("weight", weight, tuple(x.shape[-1:]), "(D,)")
    check_alike("weight", weight, "x", x)
    check_constant("weight", weight, "a fused norm is frozen")
    check_range("eps", eps, 0.0, float("inf"), "a number of at least 0")
    if casting_mode not in CASTING_MODES:
        raise ValueError(
            f"casting_mode is {casting_mode!r}; wanted one of {', '.join(CASTING_MODES)}"
        )
    flat = x.reshape(-1, x.shape[-1])
    op = torch.ops.perl_kernels.rms_norm
    if reaches_kernel(x):
        op = torch.ops.perl_kernels.rms_norm_cpu
    return op(flat, weight.detach(), eps, offset, casting_mode == "llama").view(x.shape)
