"""The gated MLP block of a language model with adapters on all three projections, in one op.

Replaces

    def layer(x, weight, a, b, bias, scale):
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(dropout(x), a), b)

    y = layer(F.silu(layer(x, *gate)) * layer(x, *up), *down)

The math, with x (N, D), gate and up (N, F), y (N, O), x' = dropout(x), h' = dropout(h):

    s  = x' [a_gate | a_up]^T              both adapters at once
    gate = x weight_gate^T + bias + scale * s_gate b_gate^T ; up likewise
    h  = act(gate) * up
    s_down = h' a_down^T
    y  = h weight_down^T + bias + scale * s_down b_down^T

    ds_down = scale * dy b_down ; da_down = ds_down^T h' ; db_down = scale * dy^T s_down
    dh = dy weight_down + dropout'(ds_down a_down)
    dup = dh * act(gate) ; dgate = dh * up * act'(gate)
    ds = [scale * dgate b_gate | scale * dup b_up] ; da = ds^T x' ; db = scale * d{gate, up}^T s
    dx = dgate weight_gate + dup weight_up + dropout'(ds a)

Saved for backward is x, which exists anyway, s and s_down, which are as thin as the ranks, and

    save="gate_up"  gate and up: 2 F elements a token
    save="input"    nothing more: gate and up are computed again from x and s, which is a third more
                    work than forward and backward without it

so (D + R_gate + R_up + R_down + 2 F) elements a token, or the same without 2 F. With r16 in a block
of 2048 x 5632 in bfloat16 that is 26 720 or 4 192 bytes; autograd keeps 4 F and more of a block of
LoRA layers, and 3 F of a frozen one. act(gate), h, dropped copies and masks are never kept. The
CPU kernels never hold one for more than a group of rows; on a GPU the activation's way there and
back is one kernel each, and h is made again in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import autocast, check_float, check_projection, check_range
from .._dropout import new_seed
from .._library import lora_mlp_in_cpp, reaches_kernel
from . import op as _op  # noqa: F401 - registers the op
from .reference import LoRAProjection

__all__ = ["LoRAProjection", "lora_mlp"]

ACTIVATIONS = ("silu", "gelu_tanh")
SAVE = ("gate_up", "input")


def lora_mlp(
    x: Tensor,  # (..., D)
    gate: LoRAProjection,  # (F, D)
    up: LoRAProjection,  # (F, D)
    down: LoRAProjection,  # (O, F)
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    save: str = "gate_up",
) -> Tensor:  # (..., O)
    """down(act(gate(x)) * up(x)), each projection a frozen linear layer with an adapter.

    Args:
        x: (..., D), float32, bfloat16, float16, or float64 (which runs on the reference).
        gate, up, down: `LoRAProjection(weight, a, b, bias, scale)`, or a tuple like it. weight in
            x's dtype, frozen, any strides; a (R, D) and b (O, R) in x's dtype or float32, each with
            a rank of its own, or both None: no adapter; bias (O,) or None, gets a gradient when it
            requires one; scale is alpha / R.
        activation: "silu" (Llama, Qwen, Mistral) or "gelu_tanh" (Gemma).
        dropout_p: probability in [0, 1) of dropping an element of an adapter's input: one mask for
            x, one for h. Seeds come from torch's generator, so torch.manual_seed repeats a run and
            activation checkpointing draws the same masks again.
        save: what backward finds beside x and the adapters' thin s: "gate_up" keeps gate and up,
            2 F elements a token; "input" keeps nothing more and computes them again.

    Returns:
        (..., O) in x's dtype, contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype, device, name or range is wrong, or a weight requires
            grad.
    """
    check_float("x", x)
    if x.ndim < 1:
        raise ValueError("x is a scalar; wanted (..., D)")
    for name, value, known in (("activation", activation, ACTIVATIONS), ("save", save, SAVE)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(known)}")
    check_range("dropout_p", dropout_p, 0.0, 1.0, "a probability in [0, 1)")
    if dropout_p == 0.0 and reaches_kernel(x):
        y = lora_mlp_in_cpp(x, gate, up, down, activation)
        if y is not None:
            return y
    named = {name: LoRAProjection(*p) for name, p in (("gate", gate), ("up", up), ("down", down))}
    for name, p in named.items():
        check_float(f"{name}.weight", p.weight)
    x, *weight = autocast(x, *(p.weight for p in named.values()))
    projections = [
        _complete(name, p, w) for (name, p), w in zip(named.items(), weight, strict=True)
    ]
    features = weight[0].shape[0]
    for name, p in zip(named, projections, strict=True):
        reads = ("act(gate) * up", features) if name == "down" else None
        check_projection(x, p.weight, p.a, p.b, p.bias, prefix=f"{name}.", projects=reads)
    if weight[1].shape != weight[0].shape:
        raise ValueError(
            f"up.weight has {weight[1].shape[0]} rows and gate.weight {features}; they are "
            "multiplied element by element"
        )
    bias = [p.bias for p in projections]
    if any(t is not None for t in bias):
        bias = [
            w.new_zeros(w.shape[0]) if t is None else t.to(x.dtype)
            for t, w in zip(bias, weight, strict=True)
        ]
    else:
        bias = []
    seeds = [new_seed(x.device) if dropout_p > 0.0 else None for _ in "xh"]
    a, b = [p.a for p in projections], [p.b for p in projections]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *a, *b, *bias))
    y, *_ = torch.ops.perl_kernels.lora_mlp(
        x.reshape(-1, x.shape[-1]), weight, bias, a, b, [float(p.scale) for p in projections],
        activation, dropout_p, *seeds, learns and save == "gate_up",
    )  # fmt: skip
    return y.view(*x.shape[:-1], y.shape[-1])


def _complete(name: str, p: LoRAProjection, weight: Tensor) -> LoRAProjection:
    """The projection with this weight, and with an adapter: for none, a zero one of rank 1."""
    if (p.a is None) != (p.b is None):
        missing, there = ("a", "b") if p.a is None else ("b", "a")
        raise ValueError(f"{name}.{missing} is None and {name}.{there} is not; wanted both or none")
    if p.a is None and weight.ndim == 2:
        p = p._replace(a=weight.new_zeros(1, weight.shape[1]), b=weight.new_zeros(len(weight), 1))
    return p._replace(weight=weight)
