"""LoRALinear: one frozen linear module and its named adapters, computed by `pk.lora_linear`.

    y = base_layer(x) + scale * lora_B(lora_A(dropout(x)))     with scale = alpha / R

becomes one op that saves x and s = dropout(x) lora_A^T for backward, nothing else. Parameters have
PEFT's names: `lora_A.<adapter>` (R, D) and `lora_B.<adapter>` (O, R), beside `base_layer`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._arguments import FLOATS
from .lora_linear import lora_linear

__all__ = ["LoRALinear"]


@dataclass(frozen=True)
class Adapter:
    """The numbers of one adapter at one layer; its tensors are the layer's parameters."""

    r: int
    alpha: float
    dropout: float
    use_rslora: bool

    @property
    def scale(self) -> float:
        """alpha / R, or alpha / sqrt(R): Kalajdzievski, arXiv 2312.03732, rank-stabilised LoRA."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoRALinear(nn.Module):
    """A frozen nn.Linear or transformers Conv1D with low-rank adapters on top.

    One adapter is active at a time. When it is not there, or the layer is disabled or merged, the
    layer is its base layer and nothing more. A base that has to be called, because it has hooks or
    a forward of its own, is called, and the adapter is added in plain torch.

    Args:
        base_layer: the module to wrap, in any floating type; its parameters are frozen here.

    Raises:
        ValueError: base_layer is of another kind, or quantised.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        check_base(type(base_layer).__name__, base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.adapters: dict[str, Adapter] = {}
        self.active_adapter: str | None = None
        self.disabled = False
        self.merged: str | None = None  # the adapter whose delta is inside base_layer.weight
        self.transposed = not isinstance(base_layer, nn.Linear)  # Conv1D keeps weight as (D, O)
        self.out_features, self.in_features = features_of(base_layer)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, without any adapter that is not merged."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def add_adapter(
        self,
        name: str,
        r: int = 16,
        alpha: float = 32.0,
        *,
        dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add an adapter that changes nothing yet: A is Kaiming uniform, B is zero.

        Hu et al., arXiv 2106.09685, with the uniform bounds of nn.Linear as PEFT has them. The
        first adapter becomes the active one; a later one waits, frozen, for `set_adapter`.

        Args:
            dtype: of A and B. None: float32 over a bfloat16 or float16 base, else the base's.

        Raises:
            ValueError: the name is taken or unusable, or a number is out of range.
        """
        check_adapter(r, alpha, dropout)
        if name in self.adapters:
            raise ValueError(f"adapter {name!r} is already here; choose another name")
        if not name or "." in name or hasattr(self.lora_A, name):
            raise ValueError(f"adapter name is {name!r}; wanted a plain name without a dot")
        weight = self.base_layer.weight
        options = {"dtype": adapter_dtype(weight.dtype, dtype), "device": weight.device}
        a = torch.empty(r, self.in_features, **options)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        active = self.active_adapter is None or self.active_adapter == name
        self.lora_A[name] = nn.Parameter(a, requires_grad=active)
        self.lora_B[name] = nn.Parameter(
            torch.zeros(self.out_features, r, **options), requires_grad=active
        )
        self.adapters[name] = Adapter(r, alpha, dropout, use_rslora)
        if self.active_adapter is None:
            self.active_adapter = name

    def set_adapter(self, name: str, *, freeze_others: bool = True) -> None:
        """Make `name` active; where the layer has no such adapter it is its base layer."""
        self.active_adapter = name
        for key in self.adapters:
            if key == name or freeze_others:
                self.lora_A[key].requires_grad_(key == name)
                self.lora_B[key].requires_grad_(key == name)

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., O)
        name, base = self.active_adapter, self.base_layer
        adapter = self.adapters.get(name)
        if adapter is None or self.disabled or self.merged is not None:
            return base(x)
        a, b = self.lora_A[name], self.lora_B[name]
        dropout_p = adapter.dropout if self.training else 0.0
        if why_unfused(base):
            y = base(x)
            s = F.linear(F.dropout(x.to(a.dtype), dropout_p), a)
            return (y + adapter.scale * F.linear(s, b)).to(y.dtype)
        return lora_linear(
            x,
            base.weight.t() if self.transposed else base.weight,
            a,
            b,
            bias=base.bias,
            scale=adapter.scale,
            dropout_p=dropout_p,
        )

    def merge(self, name: str) -> None:
        """weight += scale * B A, in place, computed in float32 (float64 for a float64 base)."""
        self._add_delta(name, 1.0)
        self.merged = name

    def unmerge(self) -> None:
        """Take the merged delta out again: exact up to the rounding of the two additions."""
        self._add_delta(self.merged, -1.0)
        self.merged = None

    @torch.no_grad()
    def _add_delta(self, name: str, sign: float) -> None:
        weight = self.base_layer.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        delta = self.lora_B[name].to(wide) @ self.lora_A[name].to(wide)
        delta *= sign * self.adapters[name].scale
        weight.copy_(weight.to(wide) + (delta.t() if self.transposed else delta))

    def extra_repr(self) -> str:
        described = (f"{name}: r={adapter.r}" for name, adapter in self.adapters.items())
        return f"{self.in_features}, {self.out_features}, adapters=({', '.join(described)})"


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear, transformers' Conv1D and their subclasses.

    The projection inside nn.MultiheadAttention does not count: its weight is read there without a
    call to the module.
    """
    return isinstance(module, _linear_kinds()) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )


def _linear_kinds() -> tuple[type[nn.Module], ...]:
    transformers = sys.modules.get("transformers.pytorch_utils")  # unloaded: no Conv1D exists yet
    return (nn.Linear,) if transformers is None else (nn.Linear, transformers.Conv1D)


def why_unfused(base: nn.Module) -> str:
    """Why a linear module has to be called; "" where its weight and bias say all that it does."""
    forward = type(base).forward
    if forward is not nn.Linear.forward and all(
        forward is not kind.forward for kind in _linear_kinds()
    ):
        return f"{type(base).__name__} has a forward of its own"
    if "forward" in vars(base):
        return "its forward was replaced"
    if has_hooks(base):
        return "it has hooks"
    if hasattr(type(base.weight), "__tensor_flatten__"):
        return f"its weight is a {type(base.weight).__name__}"
    return ""


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def features_of(module: nn.Module) -> tuple[int, int]:
    """(O, D) of a linear module or a LoRALinear."""
    if isinstance(module, LoRALinear):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def check_base(name: str, module: nn.Module) -> None:
    """Refuse, by name, a module that cannot carry an adapter."""
    kind = type(module).__name__
    if not is_linear(module):
        raise ValueError(f"{name} is a {kind}; LoRA here adapts nn.Linear and Conv1D")
    if module.weight.dtype not in FLOATS:
        raise ValueError(
            f"{name} is a {kind} with a {module.weight.dtype} weight; quantised bases are not "
            "supported, load the model in bfloat16 or float32"
        )


def check_adapter(r: int, alpha: float, dropout: float) -> None:
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"r is {r!r}; wanted a rank of at least 1")
    if not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}; wanted a positive number")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout!r}; wanted a probability in [0, 1)")


def adapter_dtype(base: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The type of an adapter over a base of that type; `pk.lora_linear` takes x's or float32."""
    allowed = [base] if base in (torch.float32, torch.float64) else [torch.float32, base]
    if wanted is not None and wanted not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"adapter dtype is {wanted}; wanted {names} over a {base} base")
    return wanted or allowed[0]
