"""Named LoRA adapters on a whole model, in place: apply, switch, disable, merge.

    pk.apply_lora(model, pk.LoRAConfig(r=16, alpha=32))      # freezes the base
    with pk.disable_adapters(model): ...                     # the base model, same weights
    with pk.adapters_per_row(model, ["default", None]): ...  # each row of a batch its own
    pk.apply_lora(model, config, "value"); pk.set_adapter(model, "value")

One walker finds the modules by their kind, never by the model's name, and each of them becomes a
`LoRALinear`. All state lives in those layers, so deepcopy, state_dict and `.to()` work unchanged.
Files are in peft.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from .layers import LoRALinear, Rows, adapter_dtype, check_adapter, check_base, is_linear

__all__ = [
    "LoRAConfig",
    "adapter_names",
    "adapter_parameters",
    "adapters_per_row",
    "apply_lora",
    "disable_adapters",
    "merge_lora",
    "set_adapter",
    "unload_lora",
    "unmerge_lora",
]

ALL_LINEAR = "all-linear"
BASE = "__base__"  # PEFT's name, in adapter_names, of rows without an adapter
CLASSIFIER_HEADS = ("score", "classifier")  # transformers' names; trained in full, never adapted


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter looks like. Matching rules are PEFT's.

    Args:
        r: rank R.
        alpha: scale is alpha / r, or alpha / sqrt(r) with use_rslora.
        target_modules: "all-linear", every linear module except the output embedding and a
            classification head; or a list of module names, full ones or their last parts
            ("q_proj", "lm_head"); or one regular expression over full names.
        dropout: probability in [0, 1) of dropping an element of x on the adapter's way.
        rank_pattern, alpha_pattern: another r or alpha for the modules whose name ends in a match
            of the key, a regular expression; the first matching key counts.
        dtype: of the adapter's weights. None: float32 over a 16-bit base, else the base's type.

    Raises:
        ValueError: a value is out of range.
    """

    r: int = 16
    alpha: float = 32
    target_modules: str | Sequence[str] = ALL_LINEAR
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_adapter(self.r, self.alpha, self.dropout)
        for r in self.rank_pattern.values():
            check_adapter(r, self.alpha, self.dropout)
        for alpha in self.alpha_pattern.values():
            check_adapter(self.r, alpha, self.dropout)
        if not self.target_modules or not all(self.target_modules):
            raise ValueError(
                f"target_modules is {self.target_modules!r}; wanted {ALL_LINEAR!r}, a list of "
                "module names or a regular expression"
            )
        whole = self.target_modules if isinstance(self.target_modules, str) else ""
        for pattern in (whole, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None

    def rank_of(self, module_name: str) -> int:
        return self.rank_pattern.get(_first_match(self.rank_pattern, module_name), self.r)

    def alpha_of(self, module_name: str) -> float:
        return self.alpha_pattern.get(_first_match(self.alpha_pattern, module_name), self.alpha)


def _first_match(patterns: Mapping[str, object], module_name: str) -> str | None:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module_name)), None)


# ------------------------------------------------------------------------------------------------
# The walker
# ------------------------------------------------------------------------------------------------


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every submodule once, with its full name; what is inside a LoRALinear is not seen."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if name and module not in inside:
            yield name, module
        if isinstance(module, LoRALinear):
            inside.update(module.modules())


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that any layer of the model has, in the order in which they came."""
    layers = (module for _, module in _walk(model) if isinstance(module, LoRALinear))
    return list(dict.fromkeys(name for layer in layers for name in layer.adapters))


def lora_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, LoRALinear]:
    """The adapted modules by name; those that have `adapter_name` where one is given.

    Raises:
        ValueError: there are none; names the adapters that the model has.
    """
    layers = {name: module for name, module in _walk(model) if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers; call apply_lora or load_adapter first"
        )
    if adapter_name is None:
        return layers
    with_adapter = {name: layer for name, layer in layers.items() if adapter_name in layer.adapters}
    if not with_adapter:
        names = ", ".join(adapter_names(model))
        raise ValueError(f"there is no adapter {adapter_name!r}; the model has: {names}")
    return with_adapter


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that `config` adapts, by full name: linear ones or LoRALinear.

    Raises:
        ValueError: a target matches nothing or something that is not linear.
    """
    modules = dict(_walk(model))
    linear = [n for n, m in modules.items() if isinstance(m, LoRALinear) or is_linear(m)]
    for name, module in modules.items():
        if hasattr(module, "lora_A") and not isinstance(module, LoRALinear):
            raise ValueError(f"{name} already carries LoRA weights of PEFT; use accelerate_peft")
    wanted = config.target_modules
    if wanted == ALL_LINEAR:
        heads = _heads(model)
        found = {None: [name for name in linear if modules[name] not in heads]}
    elif isinstance(wanted, str):
        found = {wanted: [name for name in modules if re.fullmatch(wanted, name)]}
    else:
        found = {
            target: [name for name in modules if name == target or name.endswith(f".{target}")]
            for target in wanted
        }
    for target, names in found.items():
        if not names:
            available = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
            raise ValueError(
                f"target_modules has {target or ALL_LINEAR!r}, which matches no module of "
                f"{type(model).__name__}; its linear modules are: {available}"
            )
    chosen = {name for names in found.values() for name in names}
    targets = {name: module for name, module in modules.items() if name in chosen}
    for name, module in targets.items():
        if not isinstance(module, LoRALinear):
            check_base(name, module)
    for patterns in (config.rank_pattern, config.alpha_pattern):
        for key in patterns:
            if not any(_first_match({key: None}, name) for name in targets):
                raise ValueError(f"pattern {key!r} matches none of the target modules")
    return targets


def _heads(model: nn.Module) -> list[nn.Module]:
    """The modules that "all-linear" leaves alone: the output embedding, else a classifier."""
    if not hasattr(model, "get_output_embeddings"):
        return []
    output = model.get_output_embeddings()
    if output is not None:
        return [output]
    return [getattr(model, name) for name in CLASSIFIER_HEADS if hasattr(model, name)]


# ------------------------------------------------------------------------------------------------
# Apply, switch, disable
# ------------------------------------------------------------------------------------------------


def apply_lora(model: nn.Module, config: LoRAConfig, adapter_name: str = "default") -> nn.Module:
    """Put an adapter on `model`, in place; outputs stay the same until it is trained.

    The first call freezes every parameter of the model and makes its adapter the active one. A
    call with another adapter_name adds an adapter, frozen until `set_adapter`; it may have other
    targets and another rank. With tied embeddings an adapter on "lm_head" changes the output
    logits only: the shared matrix stays as it is.

    Returns:
        The same model.

    Raises:
        ValueError: the adapter is already there, or a target does not fit; nothing is changed.
    """
    targets = find_targets(model, config)
    layers = [module for _, module in _walk(model) if isinstance(module, LoRALinear)]
    if adapter_name in adapter_names(model):
        raise ValueError(
            f"the model already has an adapter {adapter_name!r}; choose another adapter_name"
        )
    for module in targets.values():
        adapter_dtype(module.weight.dtype, config.dtype)
    if not layers:
        model.requires_grad_(False)
    active = layers[0].active_adapter if layers else adapter_name
    for name, module in targets.items():
        if isinstance(module, LoRALinear):
            layer = module
        else:
            layer = LoRALinear(module)
            layer.active_adapter = active
            _replace(model, name, layer)
        layer.add_adapter(
            adapter_name,
            config.rank_of(name),
            config.alpha_of(name),
            dropout=config.dropout,
            use_rslora=config.use_rslora,
            dtype=config.dtype,
        )
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's own parameters: "<module>.lora_A" (R, D) and "<module>.lora_B" (O, R)."""
    parameters = {}
    for name, layer in lora_layers(model, adapter_name).items():
        parameters[f"{name}.lora_A"] = layer.lora_A[adapter_name]
        parameters[f"{name}.lora_B"] = layer.lora_B[adapter_name]
    return parameters


def set_adapter(model: nn.Module, adapter_name: str, *, freeze_others: bool = True) -> None:
    """Make one adapter the active one, and trainable; the others stop requiring grad.

    With freeze_others=False the others keep requires_grad as it is. Choose that to run several
    adapters forward before one backward: autograd drops the gradient of a parameter that no longer
    requires one when backward reaches it. Under activation checkpointing the forward pass is run
    again with the adapter that is active then, so call backward before switching.

    Raises:
        ValueError: no layer has this adapter, or an adapter is merged.
    """
    lora_layers(model, adapter_name)
    _check_not_merged(model)
    for layer in lora_layers(model).values():
        layer.set_adapter(adapter_name, freeze_others=freeze_others)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its frozen base. Nests; the state before comes back on any exit.

    Raises:
        ValueError: an adapter is merged into the base weights.
    """
    _check_not_merged(model)
    layers = lora_layers(model).values()
    before = [layer.disabled for layer in layers]
    for layer in layers:
        layer.disabled = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer.disabled = disabled


@contextmanager
def adapters_per_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside, row i of a batch goes through the adapter names[i], the base once for all rows.

    Every batch inside has as many rows as there are names. The active adapter has no say; a layer
    that a row's adapter does not reach is its base layer for that row, and inside
    `disable_adapters` for all rows.

    Gradients reach each adapter whose parameters require grad, all in one backward:

        for name in ("policy", "value"):
            pk.set_adapter(model, name, freeze_others=False)
        with pk.adapters_per_row(model, ["policy", "policy", "value", None]):
            model(input_ids).logits ...

    Under activation checkpointing call backward inside, where the forward pass is run again.

    Args:
        names: of adapters; None, or "__base__" as PEFT writes it, for the base alone.

    Raises:
        ValueError: no layer has such an adapter, there are no names, an adapter is merged, or this
            model is inside `adapters_per_row` already. From a layer: the batch has another number
            of rows, or the adapters of one batch that is trained differ in dropout.
    """
    if isinstance(names, str):
        raise TypeError(f"names is {names!r}; wanted a sequence, one name for each row")
    names = [None if name == BASE else name for name in names]
    if not names:
        raise ValueError("names is empty; wanted one for each row of the batch")
    for name in dict.fromkeys(names):
        if name is not None:
            lora_layers(model, name)
    _check_not_merged(model)
    layers = lora_layers(model).values()
    if any(layer.rows is not None for layer in layers):
        raise ValueError("the model is inside adapters_per_row already, which does not nest")

    @functools.cache
    def rows(here: tuple[str, ...], device: torch.device) -> Rows:
        numbers = [here.index(name) if name in here else -1 for name in names]
        return Rows(here, torch.tensor(numbers, device=device))

    for layer in layers:
        here = tuple(name for name in layer.adapters if name in names)
        layer.rows = rows(here, layer.weight.device)
    try:
        yield
    finally:
        for layer in layers:
            layer.rows = None


# ------------------------------------------------------------------------------------------------
# Merge, unmerge, unload
# ------------------------------------------------------------------------------------------------


def merge_lora(model: nn.Module, adapter_name: str | None = None) -> None:
    """Add the adapter (None: the active one) into the base weights, in place; it becomes active.

    The sum is made in float32 and rounded to the weight's own type. While merged, every layer is
    its base layer, at the base model's speed, and the adapter is not trained.

    Raises:
        ValueError: one is merged already, adapters are disabled or rows have their own, a weight is
            tied to another module, or the adapter is not finite; nothing is changed.
    """
    _check_not_merged(model)
    if adapter_name is None:
        adapter_name = next(iter(lora_layers(model).values())).active_adapter
    layers = lora_layers(model, adapter_name)
    names_of_weight: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of_weight.setdefault(parameter, []).append(name)
    for name, layer in layers.items():
        if layer.disabled:
            raise ValueError("adapters are disabled; merge outside of disable_adapters")
        if layer.rows is not None:
            raise ValueError("rows have adapters of their own; merge outside of adapters_per_row")
        others = [n for n in names_of_weight[layer.weight] if n != f"{name}.base_layer.weight"]
        if others:
            raise ValueError(
                f"{name}.weight is tied to {others[0]}, which merging would change too; untie it "
                f"first: model.{name}.base_layer.weight = torch.nn.Parameter("
                f"model.{name}.weight.detach().clone(), requires_grad=False) and "
                "model.config.tie_word_embeddings = False"
            )
        for factor in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
            if not torch.isfinite(factor).all():
                raise ValueError(
                    f"adapter {adapter_name!r} has NaN or infinity in {name}; it cannot be merged"
                )
    set_adapter(model, adapter_name, freeze_others=False)
    for layer in layers.values():
        layer.merge(adapter_name)


def unmerge_lora(model: nn.Module) -> None:
    """Subtract the merged adapter from the base weights again.

    No copy of the weights was kept, so they come back up to the rounding of one addition and one
    subtraction in their own type: within a few units in the last place of the larger of weight and
    merged weight.

    Raises:
        ValueError: nothing is merged.
    """
    merged = [layer for layer in lora_layers(model).values() if layer.merged is not None]
    if not merged:
        raise ValueError("no adapter is merged; call merge_lora first")
    for layer in merged:
        layer.unmerge()


def unload_lora(model: nn.Module) -> nn.Module:
    """Put the base layers back where they were and drop all adapters; merged weights stay merged.

    After `merge_lora` this leaves a plain model that its own `save_pretrained` writes.
    """
    for name, layer in lora_layers(model).items():
        _replace(model, name, layer.base_layer)
    return model


def _check_not_merged(model: nn.Module) -> None:
    merged = {layer.merged for layer in lora_layers(model).values()} - {None}
    if merged:
        raise ValueError(f"adapter {merged.pop()!r} is merged; call unmerge_lora(model) first")
