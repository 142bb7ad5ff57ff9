"""Named LoRA adapters on a whole model, in place: apply, switch, disable, merge.

    pk.apply_lora(model, pk.LoRAConfig(r=16, alpha=32))      # freezes the base
    with pk.disable_adapters(model): ...                     # the base model, same weights
    with pk.adapters_per_row(model, ["default", None]): ...  # each row of a batch its own
    pk.apply_lora(model, config, "value"); pk.set_adapter(model, "value")

One walker finds the modules by their kind, never by the model's name, and each of them becomes a
`LoRALinear`, an embedding a `LoRAEmbedding`, the module of a parameter a `LoRAParameter`. All state
lives in those layers, so deepcopy, state_dict and `.to()` work unchanged. Files are in peft.py.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks import lean_blocks, plain_blocks
from .layers import (
    Adapter,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    LoRAParameter,
    Rows,
    adapter_dtype,
    check_adapter,
    check_weight,
    is_linear,
)

__all__ = [
    "LoRAConfig",
    "adapter_names",
    "adapter_parameters",
    "adapters_per_row",
    "apply_lora",
    "average_adapters",
    "checkpoint_contexts",
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
            ("q_proj", "lm_head", "embed_tokens"); or one regular expression over full names.
        dropout: probability in [0, 1) of dropping an element of x on the adapter's way.
        rank_pattern, alpha_pattern: another r or alpha for the modules whose name ends in a match
            of the key, a regular expression; the first matching key counts.
        dtype: of the adapter's weights. None: float32 over a 16-bit base, else the base's type.
        exclude_modules: names or one regular expression, of targets to leave alone.
        layers_to_transform: numbers of the layers to adapt, of a list of target_modules; None: all.
        layers_pattern: name or names of the lists that these numbers count in ("layers", "h");
            None: any, the first number in a module's name.
        target_parameters: names, full ones or their last parts ("experts.gate_up_proj"), of
            parameters of two or three dimensions that no linear module holds. They take no dropout.
        bias: "lora_only" or "all": the biases of adapted modules, or of all, are trained too.
        modules_to_save: ends of names of modules that are trained in full.

    With bias or modules_to_save the model's own parameters change. Such an adapter is the only one
    of its model, and cannot be disabled.

    Raises:
        ValueError: a value is out of range.
    """

    r: int = 16
    alpha: float = 32
    target_modules: str | Sequence[str] | None = ALL_LINEAR
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] = ()
    target_parameters: Sequence[str] = ()
    bias: str = "none"
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_adapter(self.r, self.alpha, self.dropout)
        for r in self.rank_pattern.values():
            check_adapter(r, self.alpha, self.dropout)
        for alpha in self.alpha_pattern.values():
            check_adapter(self.r, alpha, self.dropout)
        targets = self.target_modules or self.target_parameters
        if not targets or not all(targets):
            raise ValueError(
                f"target_modules is {self.target_modules!r}; wanted {ALL_LINEAR!r}, a list of "
                "module names or a regular expression"
            )
        for name in ("target_parameters", "modules_to_save"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name} is {value!r}; wanted a list of names")
        if self.bias not in ("none", "lora_only", "all"):
            raise ValueError(f"bias is {self.bias!r}; wanted 'none', 'lora_only' or 'all'")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform is {self.layers_to_transform!r} and target_modules is "
                f"{self.target_modules!r}; wanted a list of target_modules beside it"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern is {self.layers_pattern!r} without layers_to_transform"
            )
        whole = [p for p in (self.target_modules, self.exclude_modules) if isinstance(p, str)]
        layers = _as_list(self.layers_pattern)
        for pattern in (*whole, *layers, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None

    def rank_of(self, target: str) -> int:
        return self.rank_pattern.get(_first_match(self.rank_pattern, target), self.r)

    def alpha_of(self, target: str) -> float:
        return self.alpha_pattern.get(_first_match(self.alpha_pattern, target), self.alpha)

    def adapter_of(self, target: str) -> Adapter:
        return Adapter(
            self.rank_of(target),
            self.alpha_of(target),
            self.dropout,
            self.use_rslora,
            self.bias,
            tuple(self.modules_to_save),
        )

    def leaves_alone(self, module_name: str) -> bool:
        """Whether a module that target_modules matches is not to be adapted after all."""
        if _named(self.exclude_modules, module_name) or any(
            re.match(rf"(^|.*\.){name}($|\..*)", module_name) for name in self.modules_to_save
        ):
            return True
        if self.layers_to_transform is None or module_name in self.target_modules:
            return False
        lists = _as_list(self.layers_pattern) if self.layers_pattern else [r"[^.]*"]
        numbers = (re.match(rf"(?:.*?\.)??{name}\.(\d+)\.", module_name) for name in lists)
        number = next((int(match[1]) for match in numbers if match), None)
        return number not in _as_list(self.layers_to_transform)


def _as_list(value: object) -> list:
    """A sequence as a list; one value, a name for example, as a list of it."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _named(wanted: str | Sequence[str], name: str) -> bool:
    """Whether a full name is among `wanted`: by its last parts, or by one regular expression."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == key or name.endswith(f".{key}") for key in wanted)


def _first_match(patterns: Mapping[str, object], module_name: str) -> str | None:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module_name)), None)


# ------------------------------------------------------------------------------------------------
# The walker
# ------------------------------------------------------------------------------------------------


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every submodule once, with its full name; of what is in a LoRALayer only LoRALayers."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if name and (module not in inside or isinstance(module, LoRALayer)):
            yield name, module
        if isinstance(module, LoRALayer):
            inside.update(module.modules())


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that any layer of the model has, in the order in which they came."""
    layers = (module for _, module in _walk(model) if isinstance(module, LoRALayer))
    return list(dict.fromkeys(name for layer in layers for name in layer.adapters))


def lora_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, LoRALayer]:
    """The adapted modules by name; those that have `adapter_name` where one is given.

    Raises:
        ValueError: there are none; names the adapters that the model has.
    """
    layers = {name: module for name, module in _walk(model) if isinstance(module, LoRALayer)}
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


class Target(NamedTuple):
    """What an adapter goes on: a module, or one parameter of a module that reads it by itself."""

    module: nn.Module  # or the LoRALayer that it already is
    parameter_name: str | None = None

    @property
    def weight(self) -> Tensor:
        if self.parameter_name is None or isinstance(self.module, LoRALayer):
            return self.module.weight
        return self.module.get_parameter(self.parameter_name)


def target_name(name: str, parameter_name: str | None) -> str:
    """What patterns and target_parameters match: without a LoRALayer's own part of the name."""
    if parameter_name is None:
        return name
    return f"{_without_wrappers(name)}.{parameter_name}"


def _without_wrappers(name: str) -> str:
    return re.sub(r"(\.base_layer)+$", "", name)


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, Target]:
    """What `config` adapts, by the full names that its LoRALayers have or will have.

    Raises:
        ValueError: a target matches nothing, or something that cannot carry an adapter.
    """
    modules = dict(_walk(model))
    linear = [n for n, m in modules.items() if isinstance(m, LoRALinear) or is_linear(m)]
    for name, module in modules.items():
        if hasattr(module, "lora_A") and not isinstance(module, LoRALayer):
            raise ValueError(f"{name} already carries LoRA weights of PEFT; use accelerate_peft")
    wanted = config.target_modules or []
    if wanted == ALL_LINEAR:
        heads = _heads(model)
        found = {None: [name for name in linear if modules[name] not in heads]}
    elif isinstance(wanted, str):
        found = {wanted: [name for name in modules if _named(wanted, name)]}
    else:
        found = {target: [name for name in modules if _named([target], name)] for target in wanted}
    for target, names in found.items():
        if not names:
            available = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
            raise ValueError(
                f"target_modules has {target or ALL_LINEAR!r}, which matches no module of "
                f"{type(model).__name__}; its linear modules are: {available}"
            )
    chosen = {name for names in found.values() for name in names if not config.leaves_alone(name)}
    targets = {name: Target(module) for name, module in modules.items() if name in chosen}
    for name, (module, _) in targets.items():
        if not isinstance(module, (LoRALinear, LoRAEmbedding)):
            if not (is_linear(module) or isinstance(module, nn.Embedding)):
                raise ValueError(
                    f"{name} is a {type(module).__name__}; LoRA here adapts nn.Linear, Conv1D and "
                    "nn.Embedding, and parameters of other modules by target_parameters"
                )
            check_weight(name, module.weight)
    targets |= _find_parameters(modules, config)
    if not targets:
        raise ValueError(
            "exclude_modules, layers_to_transform and modules_to_save leave nothing to adapt"
        )
    for patterns in (config.rank_pattern, config.alpha_pattern):
        for key in patterns:
            names = (target_name(name, target.parameter_name) for name, target in targets.items())
            if not any(_first_match({key: None}, name) for name in names):
                raise ValueError(f"pattern {key!r} matches none of the target modules")
    return targets


def _find_parameters(modules: dict[str, nn.Module], config: LoRAConfig) -> dict[str, Target]:
    """The targets that are parameters; of one module the first is the innermost wrapper."""
    targets, matched = {}, set()
    for name, module in modules.items():
        if name.endswith(".base_layer"):  # is inside a wrapper that was met before
            continue
        wrappers = {}
        while isinstance(module, LoRAParameter):
            wrappers[module.parameter_name] = (name, module)
            name, module = f"{name}.base_layer", module.base_layer
        outer, wanted = _without_wrappers(name), []
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = f"{outer}.{parameter_name}"
            keys = {key for key in config.target_parameters if _named([key], full)}
            if not keys:
                continue
            matched |= keys
            wanted.append(parameter_name)
            if is_linear(module) or isinstance(module, (LoRALayer, nn.Embedding)):
                raise ValueError(f"target_parameters has {full}; name {outer} in target_modules")
            if parameter.ndim not in (2, 3):
                raise ValueError(f"{full} has {parameter.ndim} dimensions; wanted 2 or 3")
            check_weight(full, parameter)
            if wrappers and parameter_name not in wrappers:
                raise ValueError(
                    f"{full} has no adapter and {', '.join(wrappers)} beside it has; adapters on "
                    "the parameters of one module have to be on the same ones"
                )
        if wrappers:
            targets |= {n: Target(m, p) for p, (n, m) in wrappers.items() if p in wanted}
        else:
            for i, parameter_name in enumerate(wanted):
                nested = ".base_layer" * (len(wanted) - 1 - i)
                targets[f"{outer}{nested}"] = Target(module, parameter_name)
    for key in config.target_parameters:
        if key not in matched:
            raise ValueError(f"target_parameters has {key!r}, which matches no parameter")
    if targets and config.dropout:
        raise ValueError(f"dropout is {config.dropout}; adapters on parameters have none")
    return targets


def trained_beside(
    model: nn.Module, bias: str, modules_to_save: Sequence[str]
) -> dict[str, nn.Parameter]:
    """The model's own parameters that an adapter trains: biases, and those of whole modules.

    Raises:
        ValueError: a module is not there, or shares a parameter with another.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = {name for name in parameters if ".lora_A." not in name and ".lora_B." not in name}
    found = set()
    for key in modules_to_save:
        names = {n for n, _ in model.named_modules() if n.endswith(key)}
        inside = {n for n in own if any(n.startswith(f"{module}.") for module in names)}
        if not inside:
            raise ValueError(
                f"modules_to_save has {key!r}, which matches no module of {type(model).__name__}"
            )
        found |= inside
    for name in found:
        for other in own - {name}:
            if parameters[other] is parameters[name]:
                raise ValueError(
                    f"modules_to_save has {name}, which is tied to {other}; untie them first"
                )
    ending = {"none": (), "lora_only": (".base_layer.bias",), "all": (".bias",)}[bias]
    found |= {name for name in own if ending and name.endswith(ending)}
    return {name: parameters[name] for name in parameters if name in found}


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


def apply_lora(
    model: nn.Module, config: LoRAConfig, adapter_name: str = "default", *, lean: bool = True
) -> nn.Module:
    """Put an adapter on `model`, in place; outputs stay the same until it is trained.

    The first call freezes every parameter of the model and makes its adapter the active one. A
    call with another adapter_name adds an adapter, frozen until `set_adapter`; it may have other
    targets and another rank. With tied embeddings an adapter on "lm_head" changes the output
    logits only: the shared matrix stays as it is.

    Args:
        lean: also let the model's gated MLPs and RMSNorms keep less for backward (`lean_blocks`),
            where the results are proven to be the same.

    Returns:
        The same model.

    Raises:
        ValueError: the adapter is already there, or a target does not fit; nothing is changed.
    """
    targets = find_targets(model, config)
    layers = [module for _, module in _walk(model) if isinstance(module, LoRALayer)]
    if adapter_name in adapter_names(model):
        raise ValueError(
            f"the model already has an adapter {adapter_name!r}; choose another adapter_name"
        )
    _check_alone(model, config)
    for target in targets.values():
        adapter_dtype(target.weight.dtype, config.dtype)
    if not layers:
        model.requires_grad_(False)
    active = layers[0].active_adapter if layers else adapter_name
    for name, (module, parameter_name) in targets.items():
        layer = module
        if not isinstance(module, LoRALayer):
            layer = _wrapped(model, name, parameter_name)
            layer.active_adapter = active
        adapter = config.adapter_of(target_name(name, parameter_name))
        layer.add_adapter(
            adapter_name,
            adapter.r,
            adapter.alpha,
            dropout=adapter.dropout,
            use_rslora=adapter.use_rslora,
            dtype=config.dtype,
        )
        layer.adapters[adapter_name] = adapter
    for parameter in trained_beside(model, config.bias, config.modules_to_save).values():
        parameter.requires_grad_(True)
    if lean:
        lean_blocks(model)
    return model


def _wrapped(model: nn.Module, name: str, parameter_name: str | None) -> LoRALayer:
    """A LoRALayer in the place of the module; for a parameter, around the layers of others."""
    path = name if parameter_name is None else _without_wrappers(name)
    module = model.get_submodule(path)
    if parameter_name is not None:
        layer = LoRAParameter(module, parameter_name)
    elif isinstance(module, nn.Embedding):
        layer = LoRAEmbedding(module)
    else:
        layer = LoRALinear(module)
    _replace(model, path, layer)
    return layer


def _check_alone(model: nn.Module, config: LoRAConfig) -> None:
    """An adapter that trains the model's own parameters is the only one."""
    trained_beside(model, config.bias, config.modules_to_save)
    layers = [module for _, module in _walk(model) if isinstance(module, LoRALayer)]
    others = [adapter for layer in layers for adapter in layer.adapters.values()]
    for adapter in (config, *others):
        if others and (adapter.bias != "none" or adapter.modules_to_save):
            raise ValueError(
                f"an adapter has bias={adapter.bias!r} and modules_to_save="
                f"{list(adapter.modules_to_save)}, which train the model's own parameters; it has "
                "to be the model's only adapter"
            )


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
    again with the adapter that is active then: call backward before switching, or give the
    checkpoints `checkpoint_contexts(model)`.

    Raises:
        ValueError: no layer has this adapter, or an adapter is merged.
    """
    lora_layers(model, adapter_name)
    _check_not_merged(model)
    for layer in lora_layers(model).values():
        layer.set_adapter(adapter_name, freeze_others=freeze_others)


def checkpoint_contexts(model: nn.Module) -> Callable[[], tuple[AbstractContextManager, ...]]:
    """A `context_fn` for activation checkpointing that outlives a switch of adapters.

        model.gradient_checkpointing_enable(
            {"use_reentrant": False, "context_fn": pk.checkpoint_contexts(model)}
        )

    A checkpoint runs its part of the model again in backward. With these contexts it does so with
    the adapters that acted in its forward pass, whatever was switched or disabled since; several
    adapters can go forward before one backward (with `set_adapter(..., freeze_others=False)`).
    Make it after the last adapter was added. Checkpoints with use_reentrant=True take no context.

    Raises:
        ValueError: the model has no LoRA layers.
    """
    layers = list(lora_layers(model).values())
    return lambda: (nullcontext(), _ActingAsNow(layers))


class _ActingAsNow:
    """A context, entered any number of times, in which layers act as when it was made."""

    def __init__(self, layers: list[LoRALayer]) -> None:
        self._layers = layers
        self._inside = self._state()

    def _state(self) -> list[tuple[str | None, bool, Rows | None]]:
        return [(layer.active_adapter, layer.disabled, layer.rows) for layer in self._layers]

    def _restore(self, state: list[tuple[str | None, bool, Rows | None]]) -> None:
        for layer, acting in zip(self._layers, state, strict=True):
            layer.active_adapter, layer.disabled, layer.rows = acting

    def __enter__(self) -> None:
        self._outside = self._state()
        self._restore(self._inside)

    def __exit__(self, *exc_info: object) -> None:
        self._restore(self._outside)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its frozen base. Nests; the state before comes back on any exit.

    Raises:
        ValueError: an adapter is merged into the base weights, or has trained some of them.
    """
    _check_not_merged(model)
    layers = lora_layers(model).values()
    for layer in layers:
        for name, adapter in layer.adapters.items():
            if adapter.bias != "none" or adapter.modules_to_save:
                raise ValueError(
                    f"adapter {name!r} trained the model's own parameters (bias="
                    f"{adapter.bias!r}, modules_to_save={list(adapter.modules_to_save)}), so the "
                    "base model is not there any more; load it beside"
                )
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

    Under activation checkpointing call backward inside, where the forward pass is run again, or
    give the checkpoints `checkpoint_contexts`.

    Args:
        names: of adapters; None, or "__base__" as PEFT writes it, for the base alone.

    Raises:
        ValueError: no layer has such an adapter, one is on an embedding or on experts, there are
            no names, an adapter is merged, or this model is inside `adapters_per_row` already.
            From a layer: the batch has another number of rows, or the adapters of one batch that is
            trained differ in dropout.
    """
    if isinstance(names, str):
        raise TypeError(f"names is {names!r}; wanted a sequence, one name for each row")
    names = [None if name == BASE else name for name in names]
    if not names:
        raise ValueError("names is empty; wanted one for each row of the batch")
    for name in dict.fromkeys(names):
        for path, layer in lora_layers(model, name).items() if name is not None else ():
            if not isinstance(layer, LoRALinear):
                raise ValueError(
                    f"adapter {name!r} is on {path}, which is no linear module; rows can have "
                    "adapters of their own on linear modules alone"
                )
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
        own = f"{name}.base_layer.{layer.weight_path}"
        others = [other for other in names_of_weight[layer.weight] if other != own]
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
    """Put base layers and blocks back as they were and drop all adapters; merged weights stay.

    After `merge_lora` this leaves a plain model that its own `save_pretrained` writes.
    """
    for name, layer in reversed(lora_layers(model).items()):  # the inner of two wrappers first
        _replace(model, name, layer.base_layer)
    plain_blocks(model)
    return model


def _check_not_merged(model: nn.Module) -> None:
    merged = {layer.merged for layer in lora_layers(model).values()} - {None}
    if merged:
        raise ValueError(f"adapter {merged.pop()!r} is merged; call unmerge_lora(model) first")


# ------------------------------------------------------------------------------------------------
# Combine
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def average_adapters(
    model: nn.Module,
    adapter_names: Sequence[str],
    weights: Sequence[float] | None = None,
    new_name: str = "average",
    *,
    r: int | None = None,
) -> None:
    """Add an adapter whose change of every weight is the weighted sum of the others' changes.

        scale B A = sum_i w_i scale_i B_i A_i       A = [A_1; A_2; ...]   B = [w_1 scale_1 B_1, ...]

    Laying the factors side by side gives that sum exactly, with the sum of the ranks (PEFT's
    add_weighted_adapter calls it "cat"); averaging A and B apart would give products of one
    adapter's A with another's B. With `r` the sum is cut to its best approximation of that rank in
    the Frobenius norm (PEFT's "svd"), made from the factors without the (O, D) product.

    Averages of reward models fine-tuned apart, WARM (Rame et al., arXiv 2401.12187), and of
    policies, are made so. The new adapter waits, frozen, for `set_adapter`; it has no dropout.

    Args:
        adapter_names: two or more that the model has; a module without one counts as unchanged.
        weights: one for each name, any finite number. None: equal ones that sum to 1.
        r: rank of the result; None: the sum of the ranks, which is exact.

    Raises:
        ValueError: an adapter is not there or new_name is, weights do not fit, or one is merged.
    """
    names = list(adapter_names)
    weights = [1 / len(names)] * len(names) if weights is None else list(weights)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"adapter_names is {names}; wanted two different ones or more")
    if len(weights) != len(names) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights is {weights}; wanted a finite number for each of {names}")
    if r is not None:
        check_adapter(r, 1.0, 0.0)
    layers = {key: layer for name in names for key, layer in lora_layers(model, name).items()}
    _check_not_merged(model)
    if any(new_name in layer.adapters for layer in lora_layers(model).values()):
        raise ValueError(f"the model already has an adapter {new_name!r}; choose another new_name")
    for layer in layers.values():
        wide = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
        here = {n: w for n, w in zip(names, weights, strict=True) if n in layer.adapters}
        factors = {name: layer.factors(name, wide) for name in here}
        a = torch.cat([factors[n][0] for n in here], dim=-2)
        b = torch.cat([here[n] * layer.adapters[n].scale * factors[n][1] for n in here], dim=-1)
        if r is not None and r < a.shape[-2]:
            a, b = _cut(a, b, r)
        rank, dtype = a.shape[-2], layer.lora_A[next(iter(here))].dtype
        layer.add_adapter(new_name, rank, rank, dtype=dtype)  # alpha = r: its scale is 1
        layer.set_factors(new_name, a, b)


def _cut(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best factors of rank r of B A: its singular values are those of the two triangles'."""
    q_a, t_a = torch.linalg.qr(a.mT)
    q_b, t_b = torch.linalg.qr(b)
    u, s, v = torch.linalg.svd(t_b @ t_a.mT)
    root = s[..., :r].sqrt()
    return (q_a @ (v.mT[..., :r] * root[..., None, :])).mT, q_b @ (u[..., :r] * root[..., None, :])
