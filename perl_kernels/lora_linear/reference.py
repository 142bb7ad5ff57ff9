"""The definition of lora_linear in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._dropout import drop


def lora_linear(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (O, D)
    a: Tensor,  # (R, D)
    b: Tensor,  # (O, R)
    *,
    bias: Tensor | None = None,  # (O,)
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # () int64
) -> Tensor:  # (N, O)
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(drop(x, dropout_p, seed), a), b)
