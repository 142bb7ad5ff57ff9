"""Which code computes each adapted module of a model, and why.

    print(pk.explain(model))

One row for every module that carries LoRA, ours (`apply_lora`, `load_adapter`) or the peft
package's (`accelerate_peft` was called or not), and one for every lean block. The answer comes from
the same questions that the layers ask in every call, for an x of the weight's own type and no
autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from ._library import backend_of, missing
from .blocks import LeanBlock, LeanGatedMLP
from .layers import LoRALayer, LoRALinear, why_unfused
from .peft import active_in_peft, why_peft

__all__ = ["BlockRoute", "Explanation", "ModuleRoute", "explain"]


class ModuleRoute(NamedTuple):
    """One adapted module.

    module: its name in the model. base: the class that carries the adapter. shape: of the weight.
    adapters: all that it has, with their ranks. active: those that act now. route: "lora_linear",
    the fused op; "lora_mlp", that of a whole lean block (`lean_blocks` says when); "plain LoRA",
    the base module and the adapter one after the other; "PEFT", the peft package's own code;
    "base", where no adapter acts. why: the backend of a fused module, else the reason why it is
    not fused.
    """

    module: str
    base: str
    shape: tuple[int, ...]
    adapters: dict[str, int]
    active: tuple[str, ...]
    route: str
    why: str


class BlockRoute(NamedTuple):
    """One lean block (`lean_blocks`).

    block: its name in the model. base: its own class. route: "lora_mlp" or "rms_norm", or "own
    code". why: what the op computes and keeps, or the reason why it does not run.
    """

    block: str
    base: str
    route: str
    why: str


class Explanation(Sequence[ModuleRoute]):
    """The rows of `pk.explain`, in the model's order, and `blocks`; prints as two tables."""

    def __init__(self, rows: Sequence[ModuleRoute], blocks: Sequence[BlockRoute]) -> None:
        self._rows, self.blocks = tuple(rows), tuple(blocks)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]

    def __repr__(self) -> str:
        table = [ModuleRoute._fields]
        for row in self:
            adapters = ", ".join(
                f"{name} r={r}{'*' if name in row.active else ''}"
                for name, r in row.adapters.items()
            )
            shape = " x ".join(map(str, row.shape))
            table.append((row.module, row.base, shape, adapters, row.route, row.why))
        table[0] = tuple(field for field in ModuleRoute._fields if field != "active")
        if not self.blocks:
            return _aligned(table)
        return f"{_aligned(table)}\n\n{_aligned([BlockRoute._fields, *self.blocks])}"


def _aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def explain(model: nn.Module) -> Explanation:
    """A table of every adapted module of `model`: its adapters, its route, and why.

        for row in pk.explain(model):
            if row.route != "lora_linear": print(row.module, row.why)

    Returns:
        A sequence of `ModuleRoute` named tuples that prints as a table; `*` marks active adapters.
        Its `blocks` are the `BlockRoute` of every lean block.

    Raises:
        ValueError: the model has no LoRA layers.
    """
    rows = list(_rows(model))
    if not rows:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers; call apply_lora, load_adapter or "
            "peft.get_peft_model first"
        )
    return Explanation(rows, list(_blocks(model)))


def _rows(model: nn.Module) -> Iterator[ModuleRoute]:
    in_lean_blocks = set()
    for name, module in model.named_modules():
        if isinstance(module, LeanGatedMLP) and _is_one_op(module):
            in_lean_blocks.update(getattr(module, child) for child in module.lean_structure[:3])
        if isinstance(module, LoRALayer):
            row = _ours(name, module)
        elif hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            row = _pefts(name, module)
        else:
            continue
        yield row._replace(route="lora_mlp") if module in in_lean_blocks else row


def _is_one_op(block: LeanGatedMLP) -> bool:
    return (
        block.lean_projections(getattr(block, block.lean_structure.gate).weight.dtype) is not None
    )


def _blocks(model: nn.Module) -> Iterator[BlockRoute]:
    for name, block in model.named_modules():
        if not isinstance(block, LeanBlock):
            continue
        if isinstance(block, LeanGatedMLP):
            route = "lora_mlp" if _is_one_op(block) else "own code"
            keeps = "input, gate and up" if block.lean_save == "gate_up" else "input"
            why = f"{block.lean_structure.activation}, keeps {keeps}"
            if route == "own code":
                why = "its layers do not go through one op: see their rows"
        else:
            why = block.why_not_lean(block.weight.dtype)
            route, why = ("own code", why) if why else ("rms_norm", "keeps its input as it came")
        yield BlockRoute(name, block.lean_of.__name__, route, why)


def _base(layer: nn.Module) -> nn.Module:
    while isinstance(layer, LoRALayer):
        layer = layer.base_layer
    return layer


def _ours(name: str, layer: LoRALayer) -> ModuleRoute:
    base = _base(layer)
    active = (layer.active_adapter,) if layer.active_adapter in layer.adapters else ()
    if layer.merged is not None:
        route, why = "base", f"adapter {layer.merged!r} is merged"
    elif layer.disabled:
        route, why = "base", "adapters are disabled"
    elif not active:
        route, why = "base", f"it has no adapter {layer.active_adapter!r}"
    elif not isinstance(layer, LoRALinear):
        route, why = (
            "plain LoRA",
            f"{layer.weight_path} of {type(base).__name__} is no linear module",
        )
    elif why := why_unfused(base):
        route = "plain LoRA"
    else:
        route, why = "lora_linear", _backend(layer)
    ranks = {name: adapter.r for name, adapter in layer.adapters.items()}
    return ModuleRoute(
        name, type(base).__name__, tuple(layer.weight.shape), ranks, active, route, why
    )


def _pefts(name: str, layer: nn.Module) -> ModuleRoute:
    base = layer.get_base_layer()
    weight = getattr(base, getattr(layer, "parameter_name", "weight"))
    why = why_peft(layer, weight.dtype)
    return ModuleRoute(
        name,
        type(base).__name__,
        tuple(weight.shape),
        dict(layer.r),
        tuple(active_in_peft(layer)),
        "PEFT" if why else "lora_linear",
        why or _backend(base),
    )


def _backend(module: nn.Module) -> str:
    """Who runs the fused op on this module's weight."""
    backend = backend_of(module.weight)
    if backend != "reference":
        return f"{backend} kernels"
    lacking = missing.get({"cpu": "cpu", "cuda": "triton"}.get(module.weight.device.type))
    return f"plain torch: {lacking or 'chosen by use_backend, or for this type'}"
