"""rms_norm in the dispatcher: schema, fake, backends, autograd."""

from __future__ import annotations

import torch

from .._library import backend_of, define, define_twins, implement
from . import reference

# ------------------------------------------------------------------------------------------------
# Schema
# ------------------------------------------------------------------------------------------------

define("rms_norm(Tensor x, Tensor weight, float eps, float offset, bool rounds_first) -> Tensor")
define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps, float offset) -> Tensor dx"
)
define_twins("rms_norm", "cpu")
define_twins("rms_norm_backward", "cpu")


# ------------------------------------------------------------------------------------------------
# Fakes
# ------------------------------------------------------------------------------------------------


def _fake_forward(x, *rest):
    return x.new_empty(x.shape)


def _fake_backward(dy, x, *rest):
    return x.new_empty(x.shape)


# ------------------------------------------------------------------------------------------------
# Backends
# ------------------------------------------------------------------------------------------------


def _forward(x, weight, eps, offset, rounds_first):
    backend = backend_of(x)
    if backend == "cpu":
        return torch.ops.perl_kernels.rms_norm_cpu(x, weight, eps, offset, rounds_first)
    if backend in ("triton", "cuda"):
        from . import triton as kernels

        return kernels.forward(x, weight, eps, offset, rounds_first)
    mode = "llama" if rounds_first else "gemma"
    return reference.rms_norm(x, weight, eps=eps, offset=offset, casting_mode=mode)


def _backward(dy, x, weight, eps, offset):
    backend = backend_of(x)
    if backend == "cpu":
        return torch.ops.perl_kernels.rms_norm_backward_cpu(dy, x, weight, eps, offset)
    if backend in ("triton", "cuda"):
        from . import triton as kernels

        return kernels.backward(dy, x, weight, eps, offset)
    return _backward_torch(dy, x, weight, eps, offset)


def _backward_torch(dy, x, weight, eps, offset):
    wide_type = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(wide_type)
    dn = dy.to(wide_type) * (weight.to(wide_type) + offset)
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    n = wide * r
    return (r * (dn - n * (dn * n).mean(-1, keepdim=True))).to(x.dtype)


# ------------------------------------------------------------------------------------------------
# Autograd
# ------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, weight, ctx.eps, ctx.offset, _ = inputs
    ctx.save_for_backward(x, weight)


def _autograd_backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dx = torch.ops.perl_kernels.rms_norm_backward(dy, x, weight, ctx.eps, ctx.offset)
    return dx, None, None, None, None


implement("rms_norm", _forward, _fake_forward, _setup_context, _autograd_backward)
implement("rms_norm_backward", _backward, _fake_backward)
