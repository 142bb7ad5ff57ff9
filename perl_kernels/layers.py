"""LoRALinear: one frozen linear module and its named adapters, computed by `pk.lora_linear`.

    y = base_layer(x) + scale * lora_B(lora_A(dropout(x)))     with scale = alpha / R

becomes one op that saves x and s = dropout(x) lora_A^T for backward, nothing else; where the rows
of a batch have adapters of their own, it is `pk.multi_lora_linear`. Parameters have PEFT's names:
`lora_A.<adapter>` (R, D) and `lora_B.<adapter>` (O, R), beside `base_layer`.

LoRAEmbedding and LoRAParameter are the same for what is no linear module: a table of vectors, and a
weight that its module reads by itself, as experts stacked in three dimensions are. Unfused.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ._arguments import FLOATS, shape_of
from .lora_linear import lora_linear
from .lora_mlp import LoRAProjection
from .multi_lora_linear import multi_lora_linear

__all__ = ["LoRAEmbedding", "LoRALayer", "LoRALinear", "LoRAParameter"]


@dataclass(frozen=True)
class Adapter:
    """The numbers of one adapter at one layer; its tensors are the layer's parameters."""

    r: int
    alpha: float
    dropout: float
    use_rslora: bool
    bias: str = "none"  # with modules_to_save: what it trains of the model's own parameters
    modules_to_save: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """alpha / R, or alpha / sqrt(R): Kalajdzievski, arXiv 2312.03732, rank-stabilised LoRA."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True)
class Rows:
    """Which adapter of a layer each entry of a batch goes through."""

    names: tuple[str, ...]
    numbers: Tensor  # (B,) int64: an index into names, or -1 for the base alone


class LoRALayer(nn.Module):
    """A frozen module and its named low-rank adapters: their parameters, which acts, merging.

    One adapter is active at a time, or inside `adapters_per_row` one for each row of the batch.
    When it is not there, or the layer is disabled or merged, the layer is its base layer and
    nothing more. How it computes otherwise is its kind's `forward`.
    """

    weight_path = "weight"  # from base_layer
    parameter_name: str | None = None  # of a parameter that its module reads by itself

    def __init__(self, base_layer: nn.Module, dimensions: tuple[int, int, int]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.stacked, self.out_features, self.in_features = dimensions
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.adapters: dict[str, Adapter] = {}
        self.active_adapter: str | None = None
        self.disabled = False
        self.rows: Rows | None = None  # inside adapters_per_row: goes before active_adapter
        self.merged: str | None = None  # the adapter whose delta is inside the weight
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, without any adapter that is not merged."""
        return self.base_layer.weight

    @property
    def acting(self) -> Adapter | None:
        """The active adapter, where it changes what the layer computes."""
        off = self.disabled or self.merged is not None or self.rows is not None
        return None if off else self.adapters.get(self.active_adapter)

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

        Hu et al., arXiv 2106.09685, with the uniform bounds of nn.Linear as PEFT has them; of an
        embedding A is zero and B normal. The first adapter becomes the active one; a later one
        waits, frozen, for `set_adapter`.

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
        weight = self.weight
        options = {"dtype": adapter_dtype(weight.dtype, dtype), "device": weight.device}
        a = torch.empty(r * self.stacked, self.in_features, **options)
        b = torch.empty(self.out_features, r * self.stacked, **options)
        self._initialise(a, b)
        active = self.active_adapter is None or self.active_adapter == name
        self.lora_A[name] = nn.Parameter(a, requires_grad=active)
        self.lora_B[name] = nn.Parameter(b, requires_grad=active)
        self.adapters[name] = Adapter(r, alpha, dropout, use_rslora)
        if self.active_adapter is None:
            self.active_adapter = name

    def _initialise(self, a: Tensor, b: Tensor) -> None:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)

    def set_adapter(self, name: str, *, freeze_others: bool = True) -> None:
        """Make `name` active; where the layer has no such adapter it is its base layer."""
        self.active_adapter = name
        for key in self.adapters:
            if key == name or freeze_others:
                self.lora_A[key].requires_grad_(key == name)
                self.lora_B[key].requires_grad_(key == name)

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
        weight = self.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        weight.copy_(weight.to(wide) + sign * self.delta(name, wide))

    def delta(self, name: str, dtype: torch.dtype) -> Tensor:
        """scale * B A, computed in that type, in the weight's shape."""
        a, b = self.factors(name, dtype)
        delta = self.adapters[name].scale * (b @ a)
        return (delta.mT if self.transposed else delta).reshape(self.weight.shape)

    def factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (E, R, D) and B (E, O, R) of the E weights that lie in one parameter; E is mostly 1."""
        a, b = self.lora_A[name].to(dtype), self.lora_B[name].to(dtype)
        b = b.view(self.out_features, -1, self.stacked).permute(2, 0, 1)
        return a.view(self.stacked, -1, self.in_features), b

    @torch.no_grad()
    def set_factors(self, name: str, a: Tensor, b: Tensor) -> None:
        """Give an adapter other values, in the shapes of `factors`."""
        self.lora_A[name].copy_(a.reshape(-1, self.in_features))
        self.lora_B[name].copy_(b.permute(1, 2, 0).reshape(self.out_features, -1))

    def extra_repr(self) -> str:
        described = (f"{name}: r={adapter.r}" for name, adapter in self.adapters.items())
        return f"{self.in_features}, {self.out_features}, adapters=({', '.join(described)})"


class LoRALinear(LoRALayer):
    """A frozen nn.Linear or transformers Conv1D with low-rank adapters on top.

    A base that has to be called, because it has hooks or a forward of its own, is called, and the
    adapter is added in plain torch.

    Args:
        base_layer: the module to wrap, in any floating type; its parameters are frozen here.

    Raises:
        ValueError: base_layer is of another kind, or quantised.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        kind = type(base_layer).__name__
        if not is_linear(base_layer):
            raise ValueError(f"base_layer is a {kind}; LoRALinear adapts nn.Linear and Conv1D")
        check_weight(kind, base_layer.weight)
        super().__init__(base_layer, dimensions_of(base_layer))
        base_layer.requires_grad_(False)
        self.transposed = not isinstance(base_layer, nn.Linear)  # Conv1D keeps weight as (D, O)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., O)
        name, base = self.active_adapter, self.base_layer
        if self.rows is not None and not self.disabled:
            return self._forward_per_row(x, self.rows)
        found = self.as_projection(x.dtype)
        if found is not None:
            (weight, a, b, bias, scale), dropout_p = found
            return lora_linear(x, weight, a, b, bias=bias, scale=scale, dropout_p=dropout_p)
        y = base(x)
        return y if self.acting is None else (y + self._term(name, x)).to(y.dtype)

    def as_projection(self, dtype: torch.dtype) -> tuple[LoRAProjection, float] | None:
        """All that the layer does to an x of that dtype, and its dropout; None where it is more."""
        name, base, adapter = self.active_adapter, self.base_layer, self.acting
        if adapter is None or why_unfused(base):
            return None
        weight = base.weight.t() if self.transposed else base.weight
        dropout_p = adapter.dropout if self.training else 0.0
        a, b = self.lora_A[name], self.lora_B[name]
        return LoRAProjection(weight, a, b, base.bias, adapter.scale), dropout_p

    def _term(self, name: str, x: Tensor) -> Tensor:
        """scale * B A dropout(x) in plain torch, in the adapter's type."""
        a, b, adapter = self.lora_A[name], self.lora_B[name], self.adapters[name]
        s = F.linear(F.dropout(x.to(a.dtype), adapter.dropout, self.training), a)
        return adapter.scale * F.linear(s, b)

    def _forward_per_row(self, x: Tensor, rows: Rows) -> Tensor:  # (B, ..., D) -> (B, ..., O)
        base, adapters = self.base_layer, [self.adapters[name] for name in rows.names]
        if x.ndim < 2 or len(x) != len(rows.numbers):
            raise ValueError(
                f"x has shape {shape_of(x)} and adapters_per_row {len(rows.numbers)} names; wanted "
                "x (B, ..., D) with one name for each of the B"
            )
        if not adapters:
            return base(x)
        if why_unfused(base):
            y = base(x)
            for i, name in enumerate(rows.names):
                mine = (rows.numbers == i).nonzero()[:, 0]
                y = y.index_add(0, mine, self._term(name, x[mine]).to(y.dtype))
            return y
        dropouts = {adapter.dropout if self.training else 0.0 for adapter in adapters}
        if len(dropouts) > 1:
            raise ValueError(
                f"adapters {', '.join(rows.names)} differ in dropout, and the rows of a batch "
                "share one mask; give them the same dropout, or use eval mode"
            )
        return multi_lora_linear(
            x,
            base.weight.t() if self.transposed else base.weight,
            [self.lora_A[name] for name in rows.names],
            [self.lora_B[name] for name in rows.names],
            rows.numbers,
            bias=base.bias,
            scale=[adapter.scale for adapter in adapters],
            dropout_p=dropouts.pop(),
        )


class LoRAEmbedding(LoRALayer):
    """A frozen nn.Embedding (V, O) with low-rank adapters on top: A (R, V), B (O, R).

    The rows of A^T are looked up by the base layer's own forward, so that a subclass that scales
    its vectors or counts its rows from elsewhere does so for the adapter too. There is no dropout:
    indices have no elements to drop.
    """

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__(base_layer, dimensions_of(base_layer))
        self.transposed = True
        base_layer.requires_grad_(False)

    def _initialise(self, a: Tensor, b: Tensor) -> None:
        nn.init.zeros_(a)
        nn.init.normal_(b)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        name, base = self.active_adapter, self.base_layer
        adapter = self.acting
        if adapter is None:
            return base(*args, **kwargs)
        y = base(*args, **kwargs)
        s = functional_call(base, {"weight": self.lora_A[name].t()}, args, kwargs)
        return (y + adapter.scale * F.linear(s, self.lora_B[name])).to(y.dtype)


class LoRAParameter(LoRALayer):
    """A frozen module that reads a parameter by itself, with low-rank adapters on that parameter.

    The module runs with W + scale * B A in the parameter's place. W is (O, D), or E such weights
    stacked, (E, O, D) or (E, D, O) where the module says `is_transposed`, as the experts of a
    mixture are. Then A is (R E, D), expert by expert, and B (O, R E), rank by rank: PEFT's layout.
    A module with several such parameters is wrapped once for each, one wrapper inside the other.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        owner, path = base_layer, parameter_name
        while isinstance(owner, LoRAParameter):
            owner, path = owner.base_layer, f"base_layer.{path}"
        super().__init__(base_layer, dimensions_of(owner, parameter_name))
        self.parameter_name, self.weight_path = parameter_name, path
        self.transposed = is_transposed(owner, parameter_name)
        self.weight.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.get_parameter(self.weight_path)

    def forward(self, *args: object, **kwargs: object) -> object:
        name, base = self.active_adapter, self.base_layer
        if self.acting is None:
            return base(*args, **kwargs)
        weight = self.weight
        weight = weight + self.delta(name, self.lora_A[name].dtype).to(weight.dtype)
        return functional_call(base, {self.weight_path: weight}, args, kwargs)


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
    if is_wrapper(base.weight):
        return f"its weight is a {type(base.weight).__name__}"
    return ""


def is_wrapper(tensor: Tensor) -> bool:
    """Whether it is of a wrapper subclass, a DTensor for example, which kernels cannot read."""
    return hasattr(type(tensor), "__tensor_flatten__")


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def dimensions_of(module: nn.Module, parameter_name: str | None = None) -> tuple[int, int, int]:
    """(E, O, D): the E weights of O x D in a linear module, an embedding or one parameter."""
    if isinstance(module, LoRALayer):
        return module.stacked, module.out_features, module.in_features
    if parameter_name is None:
        rows, columns = module.weight.shape
        return (1, rows, columns) if isinstance(module, nn.Linear) else (1, columns, rows)
    *stack, rows, columns = module.get_parameter(parameter_name).shape
    if is_transposed(module, parameter_name):
        rows, columns = columns, rows
    return math.prod(stack), rows, columns


def is_transposed(module: nn.Module, parameter_name: str) -> bool:
    """Whether stacked weights are (E, D, O), which transformers' experts say of themselves."""
    stacked = module.get_parameter(parameter_name).ndim == 3
    return stacked and getattr(module, "is_transposed", False)


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse, by name, a weight that cannot carry an adapter."""
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"{name} has a {weight.dtype} weight; quantised bases are not supported, load the "
            "model in bfloat16 or float32"
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
