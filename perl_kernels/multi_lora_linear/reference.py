"""The definition of multi_lora_linear in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dropout import drop


def multi_lora_linear(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (O, D)
    a: Sequence[Tensor],  # (R_g, D) each
    b: Sequence[Tensor],  # (O, R_g) each
    adapter: Tensor,  # (N,) int64, -1: none
    *,
    scale: Sequence[float],
    bias: Tensor | None = None,  # (O,)
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # () int64
) -> Tensor:  # (N, O)
    y, dropped = F.linear(x, weight, bias), drop(x, dropout_p, seed)
    for g in range(len(a)):
        part = scale[g] * F.linear(F.linear(dropped, a[g]), b[g])
        y = torch.where((adapter == g)[:, None], y + part, y)
    return y
