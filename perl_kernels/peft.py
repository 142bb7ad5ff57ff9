"""PEFT's adapter files, in and out, and PEFT's own layers on our op.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. Ours loads in the peft package
(`PeftModel.from_pretrained(model, folder)`) and PEFT's loads here, with equal outputs. Nothing is
unpickled. What a folder asks for and plain LoRA does not have (DoRA, a changed base, ...) is
refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapters import (
    CLASSIFIER_HEADS,
    LoRAConfig,
    Target,
    adapter_names,
    apply_lora,
    find_targets,
    lora_layers,
    target_name,
    trained_beside,
)
from .blocks import lean_blocks
from .layers import (
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    dimensions_of,
    has_hooks,
    is_linear,
    why_unfused,
)
from .lora_linear import lora_linear
from .lora_mlp import LoRAProjection
from .multi_lora_linear import multi_lora_linear

__all__ = ["accelerate_peft", "load_adapter", "save_adapter"]

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASKS = (
    "CAUSAL_LM",
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
    None,
)


# ------------------------------------------------------------------------------------------------
# Save
# ------------------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    task_type: str | None = "CAUSAL_LM",
    modules_to_save: dict[str, Tensor] | None = None,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write one adapter as a PEFT folder; files of an earlier save there are replaced.

    Each file is written beside its place and moved there when complete, the configuration last.

    Args:
        task_type: PEFT's name of what the adapter is for. A reward adapter trained on a causal LM
            with its own scalar head is saved for AutoModelForSequenceClassification(num_labels=1):

                save_adapter(model, folder, "reward", task_type="SEQ_CLS",
                             modules_to_save={"score.weight": head.weight})       # (1, H)

            and load_adapter gives the same dictionary back.
        modules_to_save: tensors of a classification head, trained in full, by their name in the
            model that will load them: "score.weight" or "classifier.weight", and ".bias".
        base_model_name_or_path: written for readers. None: where transformers loaded it from.

    Raises:
        ValueError: no such adapter, an unknown task type or head, or an adapter on the output
            embedding in a folder for SEQ_CLS, whose model has none.
    """
    layers = lora_layers(model, adapter_name)
    modules_to_save = modules_to_save or {}
    if task_type not in _TASKS:
        raise ValueError(f"task_type is {task_type!r}; wanted one of {_TASKS}")
    for key in modules_to_save:
        _check_head(key)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, layer in layers.items():
        if task_type == "SEQ_CLS" and layer is output:
            raise ValueError(
                f"{name} has adapter {adapter_name!r}, and a SEQ_CLS model has no output "
                "embedding; leave it out of target_modules"
            )
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None)
    adapters = {
        target_name(name, layer.parameter_name): layer.adapters[adapter_name]
        for name, layer in layers.items()
    }
    modules = [name for name, layer in layers.items() if layer.parameter_name is None]
    r = _most_common(adapter.r for adapter in adapters.values())
    alpha = _most_common(adapter.alpha for adapter in adapters.values())
    first = next(iter(adapters.values()))
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "target_modules": _short_names(model, modules),
        "target_parameters": sorted(adapters.keys() - set(modules)) or None,
        "rank_pattern": {_exactly(n): a.r for n, a in adapters.items() if a.r != r},
        "alpha_pattern": {_exactly(n): a.alpha for n, a in adapters.items() if a.alpha != alpha},
        "fan_in_fan_out": all(
            isinstance(layer, LoRALinear) and layer.transposed for layer in layers.values()
        ),
        "bias": first.bias,
        "init_lora_weights": True,
        "modules_to_save": sorted(
            {key.rpartition(".")[0] for key in modules_to_save}.union(first.modules_to_save)
        )
        or None,
    }
    tensors = trained_beside(model, first.bias, first.modules_to_save) | modules_to_save
    for name, layer in layers.items():
        for key, factors in zip(_keys_of(name, layer), (layer.lora_A, layer.lora_B), strict=True):
            tensors[key] = factors[adapter_name]
    tensors = {_PREFIX + key: tensor for key, tensor in tensors.items()}
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TENSOR_FILE, lambda path: save_file(tensors, path, {"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True)
    _write(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def _keys_of(name: str, module: nn.Module) -> tuple[str, str]:
    """The keys of A and B in a file, for a module or the LoRALayer on it."""
    if isinstance(module, (nn.Embedding, LoRAEmbedding)):
        return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def _most_common(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _exactly(name: str) -> str:
    """A pattern that matches this module only: PEFT puts `(.*\\.)?(` before and `)$` behind it."""
    return "^" + re.escape(name)


def _short_names(model: nn.Module, names: list[str]) -> list[str]:
    """["q_proj", "v_proj"] where these last parts match exactly `names`, else the full names."""
    short = {name.rpartition(".")[2] for name in names}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if matched == set(names) else names)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# Load
# ------------------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    lean: bool = True,
) -> dict[str, Tensor]:
    """Put the adapter of a PEFT folder on `model`, under any name.

    Where the model has no adapter of that name it gets one as `apply_lora` would make it, with the
    folder's configuration: active if it is the model's first, else waiting for `set_adapter`.
    Where it has one, its tensors are replaced; modules, ranks and scales must agree, and dropout
    and dtype stay as they are in the model.

    Args:
        lean: as in `apply_lora`, where the adapter is new.

    Returns:
        What the folder has trained beside the adapter, on the CPU: {"score.weight": (1, H)} for a
        reward adapter, {} for most. Where the model has these parameters it gets the values and
        trains them too; only a classification head may be missing there.

    Raises:
        FileNotFoundError: the folder has no adapter in safetensors.
        ValueError: the folder asks for something that is not supported, or does not fit the model;
            nothing is changed.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    try:
        config = _without_missing_heads(model, config)
        targets = find_targets(model, config)
        _check_shapes(model, targets, config, tensors)
        exists = adapter_name in adapter_names(model)
        if exists:
            _check_same(lora_layers(model, adapter_name), adapter_name, targets, config)
        beside = _split_trained(model, targets, config, tensors)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None

    if not exists:
        apply_lora(model, config, adapter_name, lean=lean)
    with torch.no_grad():
        for name, layer in lora_layers(model, adapter_name).items():
            a, b = _keys_of(name, layer)
            layer.lora_A[adapter_name].copy_(tensors[a])
            layer.lora_B[adapter_name].copy_(tensors[b])
        parameters = _by_plain_name(model)
        for key in beside.keys() & parameters.keys():
            parameters[key].copy_(beside[key])
    return beside


# Keys of adapter_config.json that are read here, and those that change nothing when an adapter is
# used. Every other key must have a value that means "off".
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "rank_pattern",
    "alpha_pattern", "init_lora_weights", "modules_to_save", "exclude_modules",
    "layers_to_transform", "layers_pattern", "target_parameters", "bias",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_OFF = (None, False, "none", [], {})
_INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


def _read_config(folder: Path) -> LoRAConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}; wanted a PEFT adapter folder")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if given.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {given.get('peft_type')!r}; wanted 'LORA'")
    init = given.get("init_lora_weights", True)
    if init not in _INITS_THAT_KEEP_THE_BASE:
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights; convert the "
            "adapter to plain LoRA with peft first"
        )
    for key, value in given.items():
        if key not in _READ and key not in _WITHOUT_EFFECT and value not in _OFF:
            raise ValueError(
                f"{path}: {key} is {value!r}, which is not supported; wanted a plain LoRA adapter"
            )
    try:
        return LoRAConfig(
            r=given["r"],
            alpha=given["lora_alpha"],
            target_modules=given["target_modules"],
            dropout=given.get("lora_dropout", 0.0),
            use_rslora=given.get("use_rslora", False),
            rank_pattern=given.get("rank_pattern") or {},
            alpha_pattern=given.get("alpha_pattern") or {},
            exclude_modules=given.get("exclude_modules") or (),
            layers_to_transform=given.get("layers_to_transform"),
            layers_pattern=given.get("layers_pattern") or (),
            target_parameters=given.get("target_parameters") or (),
            bias=given.get("bias", "none"),
            modules_to_save=given.get("modules_to_save") or (),
        )
    except KeyError as error:
        raise ValueError(f"{path} has no key {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSOR_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {TENSOR_FILE}; save the adapter as safetensors, pickles are not read"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    # with bias="all" PEFT writes the biases of modules_to_save three times, once by the plain name
    return {
        key.removeprefix(_PREFIX): tensor
        for key, tensor in tensors.items()
        if ".modules_to_save." not in key and ".original_module." not in key
    }


def _check_head(key: str) -> None:
    module = key.rpartition(".")[0]
    if module not in CLASSIFIER_HEADS:
        raise ValueError(
            f"modules_to_save has {module or key!r}; wanted parameters of a classification head, "
            f"{' or '.join(CLASSIFIER_HEADS)}"
        )


def _without_missing_heads(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """PEFT lists the usual names of heads; those that the model does not have are no modules."""
    names = [name for name, _ in model.named_modules()]
    there = [
        key
        for key in config.modules_to_save
        if key not in CLASSIFIER_HEADS or any(name.endswith(key) for name in names)
    ]
    return dataclasses.replace(config, modules_to_save=there)


def _check_shapes(
    model: nn.Module,
    targets: dict[str, Target],
    config: LoRAConfig,
    tensors: dict[str, Tensor],
) -> None:
    """Every target has both tensors, in the shapes that its base and its rank ask for."""
    for name, (module, parameter_name) in targets.items():
        stacked, out_features, in_features = dimensions_of(module, parameter_name)
        r = stacked * config.rank_of(target_name(name, parameter_name))
        shapes = (r, in_features), (out_features, r)
        for key, wanted in zip(_keys_of(name, module), shapes, strict=True):
            tensor, factor = tensors.get(key), key.removesuffix(".weight")
            if tensor is None:
                raise ValueError(f"{factor} is missing; the adapter is of another model")
            if tuple(tensor.shape) != wanted:
                raise ValueError(
                    f"{factor} has shape {tuple(tensor.shape)}, this {type(model).__name__} "
                    f"wants {wanted}; the adapter is of another model"
                )


def _check_same(
    layers: dict[str, LoRALayer],
    adapter_name: str,
    targets: dict[str, Target],
    config: LoRAConfig,
) -> None:
    """The adapter that the model has is the folder's in everything but its values."""
    if different := layers.keys() ^ targets.keys():
        raise ValueError(
            f"{sorted(different)[0]} has adapter {adapter_name!r} only in the "
            f"{'folder' if different & targets.keys() else 'model'}; choose another adapter_name"
        )
    for name, layer in layers.items():
        here = layer.adapters[adapter_name]
        there = config.adapter_of(target_name(name, layer.parameter_name))
        if layer.merged == adapter_name:
            raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_lora(model) first")
        if (here.r, here.scale) != (there.r, there.scale):
            raise ValueError(
                f"{name} has adapter {adapter_name!r} with r={here.r} and scale={here.scale}, the "
                f"folder r={there.r} and scale={there.scale}; choose another adapter_name"
            )
        if (here.bias, here.modules_to_save) != (there.bias, there.modules_to_save):
            raise ValueError(
                f"{name} has adapter {adapter_name!r} with bias={here.bias!r} and modules_to_save="
                f"{list(here.modules_to_save)}, the folder bias={there.bias!r} and modules_to_save="
                f"{list(there.modules_to_save)}"
            )


def _by_plain_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters, by the names that they have without adapters."""
    return {
        _plain(name): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _plain(key: str) -> str:
    return key.replace(".base_layer.", ".")


def _split_trained(
    model: nn.Module,
    targets: dict[str, Target],
    config: LoRAConfig,
    tensors: dict[str, Tensor],
) -> dict[str, Tensor]:
    """What the folder has trained beside the adapter; the rest must be equal to the model's own.

    PEFT writes the base weight of an adapted lm_head, and of resized embeddings, into the file.
    """
    trained = {}
    parameters = _by_plain_name(model)
    of_targets = {key for name, (module, _) in targets.items() for key in _keys_of(name, module)}
    biases = {
        "none": set(),
        "lora_only": {f"{name}.bias" for name in targets},
        "all": {name for name in parameters if name.endswith(".bias")},
    }[config.bias]
    wanted = biases & parameters.keys()
    wanted |= trained_beside(model, "none", config.modules_to_save).keys()
    for key, tensor in tensors.items():
        if key in of_targets:
            continue
        key = _plain(key)
        is_head = key.rpartition(".")[0] in CLASSIFIER_HEADS
        here = parameters.get(key)
        if here is None and not is_head:
            raise ValueError(f"{key} is unexpected; the adapter is of another model")
        if here is not None and here.shape != tensor.shape:
            raise ValueError(
                f"{key} has shape {tuple(tensor.shape)}, this {type(model).__name__} wants "
                f"{tuple(here.shape)}; give the model the size that it had in training"
            )
        if is_head or key in wanted:
            trained[key] = tensor
        elif not torch.equal(tensor.to(here), here):
            raise ValueError(
                f"{key} differs from the model's own and is not named as trained beside the adapter"
            )
    if missing := wanted - trained.keys():
        raise ValueError(f"{sorted(missing)[0]} is missing; the adapter is of another model")
    return trained


# ------------------------------------------------------------------------------------------------
# PEFT's own layers, on our op
# ------------------------------------------------------------------------------------------------


def accelerate_peft(peft_model: nn.Module, *, lean: bool = True) -> nn.Module:
    """Let the LoRA layers that the peft package put on a model compute through `lora_linear`.

    In place. Parameters, state_dict keys, saving, set_adapter, disable_adapter and merging are
    PEFT's and unchanged: a layer looks at its active adapters in every call. With `adapter_names`
    in a call of the model, as PEFT takes them in eval mode, every row goes through its own adapter
    by `multi_lora_linear`, in backward too. What is not plain LoRA on nn.Linear or Conv1D (DoRA and
    other variants, a bias in lora_B, several active adapters with dropout, quantised bases,
    embeddings, expert weights, modules with hooks) is computed by PEFT itself; `pk.explain` lists
    it with the reason. Call it again after adding an adapter with new target modules; of a TRL
    trainer that wraps the model itself (`peft_config`), on `trainer.model`.

    Args:
        lean: as in `apply_lora`. With dropout, gate and up of a lean MLP share one mask.

    Returns:
        The same model.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model has no LoRA layer of PEFT's that this can serve.
    """
    fused_linear = _fused_linear_class()
    plain_linear = fused_linear.__bases__[1]
    for module in peft_model.modules():
        if type(module) is plain_linear and is_linear(module.base_layer):
            module.__class__ = fused_linear
    if not any(isinstance(module, fused_linear) for module in peft_model.modules()):
        raise ValueError(
            f"{type(peft_model).__name__} has no LoRA layer of peft on nn.Linear or Conv1D; wrap "
            "it with peft.get_peft_model first, or use apply_lora"
        )
    if lean:
        lean_blocks(peft_model)
    return peft_model


@functools.cache
def _fused_linear_class() -> type:
    try:
        from peft.tuners.lora.layer import Linear
    except ImportError:
        raise ImportError("accelerate_peft needs the peft package: pip install peft") from None
    return type("FusedLinear", (_FusedForward, Linear), {"__module__": __name__})


class _FusedForward:
    """The forward of peft's lora.Linear, where it is plain LoRA with one adapter; else PEFT's."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y = None
        if not args and not kwargs:
            y = self._forward_alike(x)
        elif not args and kwargs.keys() == {"adapter_names"}:
            y = self._forward_per_row(x, kwargs["adapter_names"])
        return super().forward(x, *args, **kwargs) if y is None else y

    def _forward_alike(self, x: Tensor) -> Tensor | None:
        found = self.as_projection(x.dtype)
        if found is None:
            return None
        (weight, a, b, bias, scale), dropout_p = found
        return lora_linear(x, weight, a, b, bias=bias, scale=scale, dropout_p=dropout_p)

    def as_projection(self, dtype: torch.dtype) -> tuple[LoRAProjection, float] | None:
        """As `LoRALinear.as_projection`."""
        if why_peft(self, dtype):
            return None
        names = active_in_peft(self)
        scale = self.scaling[names[0]]
        a, b = (factors[names[0]].weight for factors in (self.lora_A, self.lora_B))
        if len(names) > 1:  # side by side they are one adapter, of the sum of their ranks
            a = torch.cat([self.lora_A[name].weight for name in names])
            shares = {name: self.scaling[name] / scale for name in names}
            b = torch.cat([k * self.lora_B[name].weight for name, k in shares.items()], dim=1)
        projection = LoRAProjection(self._weight, a, b, self.base_layer.bias, scale)
        return projection, self.dropout_of(names[0])

    def _forward_per_row(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor | None:
        names = [name for name in dict.fromkeys(adapter_names) if name in self.lora_A]
        dropouts = {self.dropout_of(name) for name in names}
        if len(x) != len(adapter_names) or len(dropouts) != 1 or why_peft(self, x.dtype, names):
            return None
        numbers = [names.index(name) if name in names else -1 for name in adapter_names]
        return multi_lora_linear(
            x,
            self._weight,
            [self.lora_A[name].weight for name in names],
            [self.lora_B[name].weight for name in names],
            torch.tensor(numbers, device=x.device),
            bias=self.base_layer.bias,
            scale=[self.scaling[name] for name in names],
            dropout_p=dropouts.pop(),
        )

    @property
    def _weight(self) -> Tensor:  # (O, D)
        weight = self.base_layer.weight
        return weight if isinstance(self.base_layer, nn.Linear) else weight.t()

    def dropout_of(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


def active_in_peft(layer: nn.Module) -> list[str]:
    """The adapters that a LoRA layer of peft's has and that are active in it."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def why_peft(layer: nn.Module, dtype: torch.dtype, names: Sequence[str] | None = None) -> str:
    """Why PEFT's own code computes this layer for an x of that dtype; "" where an op of ours does.

    The layer is one of PEFT's; accelerate_peft was called or not.

    Args:
        names: of its adapters, those that rows of a batch name; None: the active ones.
    """
    if not isinstance(layer, _FusedForward):
        kind = type(layer)
        if kind is _fused_linear_class().__bases__[1] and is_linear(layer.base_layer):
            return f"{kind.__name__} was added after accelerate_peft, or that was not called"
        return f"{kind.__name__} is computed by PEFT alone"
    if layer.disable_adapters or layer.merged:
        return "adapters are merged" if layer.merged else "adapters are disabled"
    if names is None:
        names = active_in_peft(layer)
        if not names:
            return "it has no active adapter"
        if len(names) > 1 and any(layer.dropout_of(name) for name in names):
            return f"{len(names)} active adapters, each with a dropout mask of its own"
    if layer.base_layer.weight.requires_grad:
        return "its base weight is trained"
    for name in names:
        a, b = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_variant:
            return f"{type(layer.lora_variant[name]).__name__} is not plain LoRA"
        if b.bias is not None:
            return "lora_B has a bias"
        if a.weight.dtype != dtype and (a.weight.dtype != torch.float32 or dtype == torch.float64):
            return f"its adapter is {a.weight.dtype} and x is {dtype}"
        if has_hooks(a) or has_hooks(b):
            return "its adapter has hooks"
    return why_unfused(layer.base_layer)
