"""The definition of rms_norm in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (D,)
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> Tensor:  # (N, D)
    wide_type = torch.promote_types(x.dtype, torch.float32)
    wide, w = x.to(wide_type), weight.to(wide_type) + offset
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        return w.to(x.dtype) * n.to(x.dtype)
    return (n * w).to(x.dtype)
