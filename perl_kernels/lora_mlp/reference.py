"""The definition of lora_mlp in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .._dropout import drop


class LoRAProjection(NamedTuple):
    """One projection of the block: a frozen weight and its adapter; without a and b, none."""

    weight: Tensor  # (O, D), frozen
    a: Tensor | None = None  # (R, D)
    b: Tensor | None = None  # (O, R)
    bias: Tensor | None = None  # (O,)
    scale: float = 1.0


def lora_mlp(
    x: Tensor,  # (N, D)
    gate: LoRAProjection,  # (F, D)
    up: LoRAProjection,  # (F, D)
    down: LoRAProjection,  # (O, F)
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    seed_x: Tensor | None = None,  # () int64
    seed_h: Tensor | None = None,  # () int64
) -> Tensor:  # (N, O)
    dropped_x = drop(x, dropout_p, seed_x)
    h = activate(_project(x, dropped_x, gate), activation) * _project(x, dropped_x, up)
    return _project(h, drop(h, dropout_p, seed_h), down)


def activate(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def _project(x: Tensor, dropped: Tensor, p: LoRAProjection) -> Tensor:
    y = F.linear(x, p.weight, p.bias)
    if p.a is None:
        return y
    return y + p.scale * F.linear(F.linear(dropped, p.a), p.b)
