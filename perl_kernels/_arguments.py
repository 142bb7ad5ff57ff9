"""Checks that every public function makes before a kernel runs, and the autocast cast.

Each error names the argument, what was given and what is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape_of(tensor: Tensor) -> str:
    return "(" + ", ".join(str(n) for n in tensor.shape) + ("," if tensor.ndim == 1 else "") + ")"


def check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; wanted a torch.Tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} is {tensor.dtype}; wanted float32, bfloat16, float16 or float64 (reference)"
        )


def check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...], letters: str) -> None:
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} has shape {shape_of(tensor)}; wanted {letters} = {wanted}")


def check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same device and dtype."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} and {other_name} on {other.device}; "
            "move them to one device"
        )
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} is {tensor.dtype} and {other_name} {other.dtype}; cast one of them"
        )


def check_range(name: str, value: float, low: float, high: float, wanted: str) -> None:
    """low <= value < high; NaN fails."""
    if not low <= value < high:
        raise ValueError(f"{name} is {value}; wanted {wanted}")


def check_constant(name: str, tensor: Tensor | None, why: str) -> None:
    """Refuse a gradient that the op does not have, rather than drop it in silence."""
    if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name} requires grad, and {why}; pass {name}.detach()")


def check_adapter(
    a: Tensor,  # (R, inputs)
    b: Tensor,  # (outputs, R)
    weight: Tensor,  # (outputs, inputs)
    name: str,
    x: Tensor,
    letters: str,
    *,
    prefix: str = "",
    suffix: str = "",
) -> None:
    """The two factors of an adapter on weight, in the dtype of its input x, called `name`, or in
    float32. letters: of outputs and inputs; `prefix` and `suffix` go around a and b in errors."""
    pair = ((prefix + "a" + suffix, a), (prefix + "b" + suffix, b))
    for called, tensor in pair:
        check_float(called, tensor)
        if tensor.ndim != 2:
            raise ValueError(f"{called} has {tensor.ndim} dimensions; wanted 2")
    rank, (outputs, inputs) = a.shape[0], weight.shape
    if rank < 1:
        raise ValueError(f"{pair[0][0]} has rank 0; wanted (R, {letters[1]}) with R >= 1")
    check_shape(pair[0][0], a, (rank, inputs), f"(R, {letters[1]})")
    check_shape(pair[1][0], b, (outputs, rank), f"({letters[0]}, R)")
    for called, tensor in pair:
        if tensor.dtype != torch.float32 or x.dtype == torch.float64:
            check_alike(called, tensor, name, x)
        elif tensor.device != x.device:
            raise ValueError(f"{called} is on {tensor.device} and {name} on {x.device}")


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under torch.autocast, the tensors in its dtype, as torch's own matrix products take them."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None else None for t in tensors)


def check_projection(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (O, D)
    a: Tensor,  # (R, D)
    b: Tensor,  # (O, R)
    bias: Tensor | None,  # (O,)
    *,
    prefix: str = "",
    suffix: str = "",
    projects: tuple[str, int] | None = None,
) -> None:
    """A frozen linear layer with an adapter, on x's device and in its dtype.

    `prefix` and `suffix` go around the names in errors; `projects` is the name and the features of
    what it reads where that is not x.
    """

    called = prefix + "weight" + suffix
    check_float(called, weight)
    if weight.ndim != 2:
        raise ValueError(f"{called} has {weight.ndim} dimensions; wanted 2")
    out_features, in_features = weight.shape
    read, features = projects or ("x", x.shape[-1])
    if features != in_features:
        raise ValueError(
            f"{read} has {features} features; wanted {in_features}, as {called} (O, D) has"
        )
    check_alike(called, weight, "x", x)
    check_constant(called, weight, "the base of a LoRA layer is frozen")
    check_adapter(a, b, weight, "x", x, "OD", prefix=prefix, suffix=suffix)
    if bias is not None:
        check_float(prefix + "bias" + suffix, bias)
        check_shape(prefix + "bias" + suffix, bias, (out_features,), "(O,)")
