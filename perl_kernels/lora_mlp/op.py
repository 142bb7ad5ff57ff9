"""lora_mlp in the dispatcher: schema, fake, backends, autograd.

Lists hold gate, up and down, in this order; `bias` may be empty instead. The CPU has kernels for
the whole block. Elsewhere the projections are the op `lora_linear`, whatever runs it, and what
stands between them is a Triton kernel each way, or plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import backend_of, define, define_twins, implement
from .reference import activate

# ------------------------------------------------------------------------------------------------
# Schema. s (N, R_gate + R_up) and s_down (N, R_down) are what the adapters' a make of dropout(x)
# and of dropout(h); gate_up is [gate, up], each (N, F), or empty where they are not kept.
# ------------------------------------------------------------------------------------------------

define(
    "lora_mlp(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] a, Tensor[] b, float[] scale,"
    " str activation, float dropout_p, Tensor? seed_x, Tensor? seed_h, bool keep_gate_up)"
    " -> (Tensor y, Tensor s, Tensor s_down, Tensor[] gate_up)"
)
define(
    "lora_mlp_backward(Tensor dy, Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] a, Tensor[] b,"
    " float[] scale, str activation, float dropout_p, Tensor? seed_x, Tensor? seed_h, Tensor s,"
    " Tensor s_down, Tensor[] gate_up, bool need_dx, bool need_dab, bool need_dbias)"
    " -> (Tensor dx, Tensor[] da, Tensor[] db, Tensor[] dbias)"
)
define_twins("lora_mlp", "cpu")
define_twins("lora_mlp_backward", "cpu")


# ------------------------------------------------------------------------------------------------
# Fakes
# ------------------------------------------------------------------------------------------------


def _fake_forward(
    x, weight, bias, a, b, scale, activation, dropout_p, seed_x, seed_h, keep_gate_up
):
    rows = x.shape[0]
    return (
        x.new_empty(rows, weight[2].shape[0]),
        x.new_empty(rows, a[0].shape[0] + a[1].shape[0]),
        x.new_empty(rows, a[2].shape[0]),
        [x.new_empty(rows, w.shape[0]) for w in weight[:2]] if keep_gate_up else [],
    )


def _fake_backward(
    dy, x, weight, bias, a, b, scale, activation, dropout_p, seed_x, seed_h, s, s_down, gate_up,
    need_dx, need_dab, need_dbias,
):  # fmt: skip
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        [t.new_empty(t.shape) for t in a] if need_dab else [],
        [t.new_empty(t.shape) for t in b] if need_dab else [],
        [x.new_empty(w.shape[0]) for w in weight] if need_dbias else [],
    )


# ------------------------------------------------------------------------------------------------
# Backends
# ------------------------------------------------------------------------------------------------


def _forward(x, weight, bias, a, b, scale, activation, dropout_p, seed_x, seed_h, keep_gate_up):
    if backend_of(x) == "cpu":
        return torch.ops.perl_kernels.lora_mlp_cpu(
            x, weight, bias, a, b, scale, activation, dropout_p, seed_x, seed_h, keep_gate_up
        )
    (gate, up), s = torch.ops.perl_kernels.lora_linear(
        x, weight[:2], bias[:2], a[:2], b[:2], scale[:2], dropout_p, seed_x
    )
    h = _gated(gate, up, activation)
    (y,), s_down = torch.ops.perl_kernels.lora_linear(
        h, weight[2:], bias[2:], a[2:], b[2:], scale[2:], dropout_p, seed_h
    )
    return y, s, s_down, [gate, up] if keep_gate_up else []


def _backward(
    dy, x, weight, bias, a, b, scale, activation, dropout_p, seed_x, seed_h, s, s_down, gate_up,
    need_dx, need_dab, need_dbias,
):  # fmt: skip
    if backend_of(x) == "cpu":
        return torch.ops.perl_kernels.lora_mlp_backward_cpu(
            dy, x, weight, bias, a, b, scale, activation, dropout_p, seed_x, seed_h, s, s_down,
            gate_up, need_dx, need_dab, need_dbias,
        )  # fmt: skip
    gate, up = (
        gate_up
        or torch.ops.perl_kernels.lora_linear(
            x, weight[:2], bias[:2], a[:2], b[:2], scale[:2], dropout_p, seed_x
        )[0]
    )
    h = _gated(gate, up, activation)
    dh, da_down, db_down = torch.ops.perl_kernels.lora_linear_backward(
        [dy], h, weight[2:], a[2:], b[2:], scale[2:], dropout_p, seed_h, s_down, True, need_dab
    )
    dgate, dup = _gated_backward(dh, gate, up, activation)
    dx, da, db = torch.ops.perl_kernels.lora_linear_backward(
        [dgate, dup], x, weight[:2], a[:2], b[:2], scale[:2], dropout_p, seed_x, s, need_dx,
        need_dab,
    )  # fmt: skip
    dbias = [g.sum(0) for g in (dgate, dup, dy)] if need_dbias else []
    return dx, [*da, *da_down], [*db, *db_down], dbias


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """h = act(gate) * up"""
    if backend_of(gate) in ("triton", "cuda"):
        from . import triton as kernels

        return kernels.gated(gate, up, activation)
    return activate(gate, activation).mul_(up)


def _gated_backward(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate and dup; dh is used up."""
    if backend_of(gate) in ("triton", "cuda"):
        from . import triton as kernels

        return kernels.gated_backward(dh, gate, up, activation)
    dup = activate(gate, activation).mul_(dh)
    d_act = dh.mul_(up)
    if activation == "silu":
        return torch.ops.aten.silu_backward(d_act, gate), dup
    return torch.ops.aten.gelu_backward(d_act, gate, approximate="tanh"), dup


# ------------------------------------------------------------------------------------------------
# Autograd
# ------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, weight, bias, a, b, scale, activation, dropout_p, seed_x, seed_h, _ = inputs
    _, s, s_down, gate_up = output
    ctx.mark_non_differentiable(s, s_down, *gate_up)
    ctx.set_materialize_grads(False)  # or gate and up would get gradients full of zeros
    ctx.options = scale, activation, dropout_p
    ctx.has_bias, ctx.kept = bool(bias), len(gate_up)
    ctx.save_for_backward(x, s, s_down, seed_x, seed_h, *gate_up, *weight, *a, *b, *bias)


def _autograd_backward(ctx, dy, *_):
    nothing = [None] * 3
    dx, da, db, dbias = None, nothing, nothing, nothing
    if dy is not None:
        x, s, s_down, seed_x, seed_h, *rest = ctx.saved_tensors
        gate_up, rest = rest[: ctx.kept], rest[ctx.kept :]
        weight, a, b, bias = rest[:3], rest[3:6], rest[6:9], rest[9:]
        need_x, _, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
        need_dbias = ctx.has_bias and any(need_bias)
        dx, da, db, dbias = torch.ops.perl_kernels.lora_mlp_backward(
            dy, x, weight, bias, a, b, *ctx.options, seed_x, seed_h, s, s_down, gate_up,
            need_x, any(need_a) or any(need_b), need_dbias,
        )  # fmt: skip
        dx = dx if need_x else None
    return (
        dx,
        nothing,
        (dbias or nothing) if ctx.has_bias else [],
        da or nothing,
        db or nothing,
        *[None] * 6,
    )


implement("lora_mlp", _forward, _fake_forward, _setup_context, _autograd_backward)
implement("lora_mlp_backward", _backward, _fake_backward)
