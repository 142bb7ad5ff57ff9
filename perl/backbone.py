"""One backbone, many roles: policy, value and reward as adapters, the reference as no adapter.

    role      --tuning lora                   --tuning full
    policy    adapter "policy"                a copy of the model, every weight trained
    value     adapter "value" + scalar head   a copy of the decoder + scalar head
    reward    adapter "reward" + scalar head  a model of its own + scalar head
    None      the reference: adapters off     the reference: the untouched original

Under LoRA all four live on ONE set of frozen weights; under full tuning each owns its weights.
The methods are the same, so a trainer is written once.

Three rules keep roles apart:
- A pass says which role it is; nothing that a caller can see stays active between calls.
- Which adapter is active and which parameters train are separate questions. The parameters of a
  trainable role require gradients from the day it is added, whatever role ran last, so a backward
  pass that comes after another role's forward loses nothing.
- The base's own dropout is off always, so the policy that learns is the policy that was sampled.
  LoRA's dropout is on exactly when gradients are: under `torch.no_grad()` a pass is an evaluation.

The LM head is handed out as a weight (`head`) and never applied to whole sequences here: hidden
states and that weight are what `pk.policy_loss` and its kin take, so no [tokens × vocabulary]
matrix exists.

Left out: several roles in one pass, rows repeated for each (`pk.adapters_per_row`). For three roles
of a model of 81 million parameters on a CPU it takes 0.64 to 0.68 of the time of three passes at 16
to 64 tokens a role, and as long at 256, while a step scores thousands; and thrice its memory.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import perl_kernels as pk
from perl import distributed
from perl.config import UsageError
from perl.run import role_folder

BASE_FILE = "base.json"  # beside every saved adapter: which base it belongs to


class Head(NamedTuple):
    """The LM head as `perl_kernels` takes it: `pk.linear_log_prob(h, weight, ids, **options)`.

    z = softcap · tanh((h weightᵀ + scale · (h aᵀ) bᵀ + bias) / softcap).
    """

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None
    a: Tensor | None = None  # (R, H), the role's adapter on the head where it has one
    b: Tensor | None = None  # (V, R)
    scale: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if name != "weight"}


@dataclasses.dataclass
class _Role:
    """Where a role's hidden states come from, and the scalar head that reads them."""

    model: nn.Module
    adapter: str | None  # None: the model's own weights
    score: nn.Linear | None  # float32, (1, H)
    trainable: bool
    tokenizer: Any = None  # its own; None: the backbone's


class Backbone:
    """A causal LM, its tokenizer, and the roles that share it. Made by `Backbone.load`.

    tokenizer: has an end-of-sequence and a padding token. config: the model's.
    tuning: "lora" or "full". identity: what `base.json` records of the base.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        tuning: str = "lora",
        lora: pk.LoRAConfig | None = None,
        reference: bool = False,
        name: str = "model",
    ) -> None:
        if tuning not in ("lora", "full"):
            raise UsageError(f"tuning is {tuning!r}: give lora or full")
        planned = next(model.parameters()).is_meta  # no data to check, nor to tell the base by
        if not planned:
            _check_tokenizer(tokenizer, model, name)
        if any(isinstance(module, pk.LoRALayer) for module in model.modules()):
            raise UsageError(f"{name} carries adapters already: merge them into a plain model")
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.name, self.tuning, self.lora = name, tuning, lora or pk.LoRAConfig()
        self._reference = reference or tuning == "lora"
        self._roles: dict[str, _Role] = {}
        self._layers: dict[nn.Module, list[pk.LoRALayer]] = {}  # of each model in use
        self.device = next(model.parameters()).device
        self.sharded = False
        model.eval().requires_grad_(False)
        if tuning == "lora":
            pk.lean_blocks(model)  # before any role: the reference's bits are the same after one
        if not planned:
            self.identity = _identity(model, name)
            _check_head(self)

    @classmethod
    def load(
        cls,
        model_path: str | Path | None = None,
        *,
        tuning: str = "lora",
        lora: pk.LoRAConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        model: nn.Module | None = None,
        tokenizer: Any = None,
        reference: bool = False,
    ) -> Backbone:
        """A backbone from `model_path`, or from a `model` and `tokenizer` at hand.

        model_path: a transformers folder or hub name; an adapter folder, or the run folder that
        trained one, stands for its base with the adapter merged in. Only a hub name is looked up
        on the network. A `model` at hand is taken over: frozen, and adapted in place.
        dtype: of the base; None or "auto" keeps the stored one.
        device: "auto" is a GPU where there is one.
        reference: under full tuning, True keeps an untouched copy for role None. False trains the
        loaded model itself: one role, no second copy (SFT, reward models). LoRA has one anyway.
        Raises UsageError for a missing folder, a model without a plain LM head, a tokenizer
        without an end-of-sequence token.
        """
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if model is None:
            model, source = _load_causal_lm(model_path, dtype)
            tokenizer = tokenizer or _from_pretrained(AutoTokenizer, source)
        elif tokenizer is None:
            raise ValueError("a model at hand wants its tokenizer too")
        model = model.to(device=device, dtype=dtype)
        name = _full_name(model_path) if model_path is not None else "the model given"
        return cls(model, tokenizer, tuning=tuning, lora=lora, reference=reference, name=name)

    # ------------------------------------------------------------------------------------ roles

    def add_role(self, name: str, scalar: bool = False) -> None:
        """Adds a trainable role that starts as the base: a new adapter (B = 0), or a copy.

        scalar: with a float32 head (1, H) that turns hidden states into scores or values, drawn
        as transformers draws `score`, N(0, initializer_range). It has no LM head: targets that name
        one are for the roles beside it, and refused where there are none.
        """
        self._check_new(name)
        if self.tuning == "lora":
            lora = self.lora
            if scalar and any(role.score is None for role in self._roles.values()):
                lora = _without_head(lora, self.model)
            _apply(self.model, lora, name, scalar)
            role = _Role(self.model, name, self._new_score() if scalar else None, trainable=True)
        else:
            model = copy.deepcopy(self.model) if self._reference else self.model
            if scalar:
                model = _with_score(model, self._new_score(), self.tokenizer)
            if not self._reference:
                self.model = model  # which frees the LM head that a scalar role has no use for
            role = _Role(model, None, model.score if scalar else None, trainable=True)
        self._add(name, role)

    def load_role(
        self,
        name: str,
        folder: str | Path,
        trainable: bool = False,
        scalar: bool = False,
        own_tokenizer: bool = False,
    ) -> None:
        """Adds a role from a folder that `save_role`, PEFT or transformers wrote, or a run folder.

        An adapter folder becomes an adapter of this base (under full tuning: of a copy of it); its
        `score` makes the role scalar. A transformers folder becomes a model of its own, a sequence
        classifier with one label if its config says so, else a causal LM.
        scalar: insist on a scalar head. own_tokenizer: a model with another tokenizer is welcome,
        since its passes are given the ids of that, `tokenizer_of`.
        Raises UsageError when the adapter belongs to another base, the tokenizer differs, or the
        scalar head is not there.
        """
        self._check_new(name)
        folder = role_folder(folder, name)
        if is_adapter(folder):
            role = self._load_adapter_role(name, folder, trainable)
        elif (folder / "config.json").is_file():
            role = self._load_model_role(folder, trainable, own_tokenizer)
            if trainable and self.tuning == "full" and not self._reference:
                self.model.to("meta")  # the model of the role takes its place
        else:
            raise UsageError(
                f"{folder} holds neither an adapter nor a model: give the folder of a run, or one "
                "that PEFT or transformers wrote"
            )
        if scalar and role.score is None:
            raise UsageError(
                f"{folder} has no score head, so it is no reward model: give a folder that "
                "`perl reward` wrote"
            )
        self._add(name, role)

    def save_role(self, name: str, folder: str | Path) -> None:
        """Writes a role for others to load.

        LoRA: a PEFT adapter folder, with `base.json` to tell its base by; a scalar role is a
        SEQ_CLS adapter with its head as the module `score`, so PEFT loads it on
        `AutoModelForSequenceClassification(num_labels=1)`.
        Full tuning: a plain transformers folder with the tokenizer.
        Of several processes all call this, and the first one writes.
        """
        role, folder, state = self._roles[name], Path(folder), None
        if role.adapter is None and self.sharded:
            state = role.model.state_dict()
            state = {key: distributed.whole_on_first(value) for key, value in state.items()}
        if not distributed.is_first():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if role.adapter is None:
            role.model.save_pretrained(folder, state_dict=state)
            self.tokenizer.save_pretrained(folder)
            return
        score = {} if role.score is None else {"score.weight": role.score.weight}
        pk.save_adapter(
            role.model,
            folder,
            role.adapter,
            task_type="SEQ_CLS" if score else "CAUSAL_LM",
            modules_to_save=score,
            base_model_name_or_path=self.name,
        )
        (folder / BASE_FILE).write_text(json.dumps(self.identity, indent=2) + "\n")

    def average_roles(
        self, name: str, roles: Sequence[str], weights: Sequence[float], r: int | None = None
    ) -> None:
        """Adds a role whose adapter and scalar head are the weighted sums of those of `roles`.

        The roles are adapters of this base, all with a scalar head or all without. r: see
        `pk.average_adapters`.
        """
        self._check_new(name)
        pk.average_adapters(self.model, list(roles), weights, name, r=r)
        heads = [self._roles[role].score for role in roles]
        score = None if heads[0] is None else self._new_score()
        if score is not None:
            parts = [w * head.weight for w, head in zip(weights, heads, strict=True)]
            score.weight.data = torch.stack(parts).sum(0).detach()
        self._add(name, _Role(self.model, name, score, trainable=False))

    def merged(self, name: str) -> nn.Module:
        """An adapter's role as a plain transformers model; a scalar one as a classifier.

        The base's weights become the model's, so this is the last that is asked of a backbone.
        """
        role = self._roles[name]
        _untie_adapted_head(self.model)
        pk.merge_lora(self.model, role.adapter)
        model = pk.unload_lora(self.model)
        return model if role.score is None else _with_score(model, role.score, self.tokenizer)

    def trainable(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """The named parameters that this role's optimizer updates; the names outlive the run."""
        role = self._roles[name]
        return list(_parameters(role)) if role.trainable else []

    def is_scalar(self, name: str) -> bool:
        """Whether the role has a scalar head: a reward or value model, which answers nothing."""
        return self._roles[name].score is not None

    def role_bytes(self) -> dict[str, dict[str, int]]:
        """What each role alone holds in this process: {role: {"weights": bytes, ...}}.

        Trainable roles also have "gradients", from a backward pass to the update, and "optimizer",
        the two moments that AdamW keeps from the first update on. "reference" is the untouched
        model, which under LoRA is the base that all share.
        """
        found, own = {}, set()
        for name, role in self._roles.items():
            parameters = {p for _, p in _parameters(role)}
            own |= parameters
            trained = _bytes(parameters) if role.trainable else 0
            if role.model is not self.model:
                parameters |= set(role.model.parameters())
            found[name] = {"weights": _bytes(parameters)}
            if role.trainable:
                found[name] |= {"gradients": trained, "optimizer": 2 * trained}
        rest = set(self.model.parameters()) - own
        return found | ({"reference": {"weights": _bytes(rest)}} if rest else {})

    def models(self) -> list[nn.Module]:
        """The models and scalar heads of all roles, each once."""
        parts = [self.model]
        for role in self._roles.values():
            parts += [role.model] if role.score is None else [role.model, role.score]
        return list(dict.fromkeys(parts))

    def checkpoint_activations(self, name: str) -> None:
        """From now on the role's passes keep the inputs of decoder layers only.

        Each layer runs again in backward, which has to come before any other pass. Passes without
        gradients are as they were. Raises UsageError for a family without such layers.
        """
        model = self._roles[name].model
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise UsageError(
                f"{self.name} ({model.config.model_type}) has no decoder layers that can be run "
                "again: leave --checkpoint-activations out"
            )
        for layer in layers:
            layer.forward = functools.partial(_checkpointed, layer.forward)

    def tokenizer_of(self, role: str) -> Any:
        """The tokenizer that a role's passes want their ids from."""
        return self._roles[role].tokenizer or self.tokenizer

    def context(self, role: str) -> int:
        """The longest sequence of a role, in tokens."""
        return self._roles[role].model.config.max_position_embeddings

    # ----------------------------------------------------------------------------------- passes

    def hidden(
        self,
        role: str | None,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T), or (B, past + T) with a cache; nonzero = real token
        cache: Any = None,  # a transformers Cache, filled in place
    ) -> Tensor:  # (B, T, H)
        """Last hidden states under a role; None is the reference. Left or right padding alike."""
        model, adapter = self._activate(role)
        context = getattr(model.config, "max_position_embeddings", None)
        if cache is None and context is not None and attention_mask.shape[1] > context:
            raise UsageError(
                f"a sequence of {attention_mask.shape[1]} tokens does not fit the {context} of the "
                f"{role or 'reference'} model's context: give fewer with --max-tokens"
            )
        kwargs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": cache is not None}
        if cache is not None:
            kwargs["past_key_values"] = cache
        if _takes_positions(type(model.base_model)):
            positions = attention_mask.long().cumsum(-1).sub_(1).clamp_(min=0)
            kwargs["position_ids"] = positions[:, -input_ids.shape[1] :]
        if adapter is None and self._layers.get(model):
            with pk.disable_adapters(model):
                return model.base_model(input_ids, **kwargs).last_hidden_state
        return model.base_model(input_ids, **kwargs).last_hidden_state

    def head(self, role: str | None = None) -> Head:
        """The LM head that belongs to a role's hidden states.

        Under LoRA it is the base's, frozen and the same for all, with the role's own adapter where
        the targets name the head. Under full tuning each role has its own, which trains with the
        rest.
        """
        model = self.model if role is None else self._roles[role].model
        output = model.get_output_embeddings()
        head = Head(output.weight, getattr(output, "bias", None), _softcap(model.config))
        name = None if role is None else self._roles[role].adapter
        adapter = _head_adapter(model, name)
        if adapter is None:
            return head
        return head._replace(a=output.lora_A[name], b=output.lora_B[name], scale=adapter.scale)

    def values(self, role: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # (B, T)
        """The scalar head at every position, float32. What stands at padding means nothing."""
        return self._score(role, self.hidden(role, input_ids, attention_mask))

    def score(self, role: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # (B,)
        """The scalar head at the last real token of each row, float32."""
        hidden = self.hidden(role, input_ids, attention_mask)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (positions * (attention_mask != 0)).argmax(-1)
        return self._score(role, hidden[torch.arange(len(last), device=last.device), last])

    # ---------------------------------------------------------------------------------- sharding

    def shard(self, device: torch.device | str) -> None:
        """Spreads the models over the processes (`perl.distributed.shard`), on that device.

        When all roles are there, and before optimizers take their parameters. Adapters, LM heads
        and scalar heads stay whole.
        """
        self.device, self.sharded = torch.device(device), True
        roles = list(self._roles.values())
        models = [role.model for role in roles] + [self.model] * self._reference
        for model in dict.fromkeys(models):
            output = model.get_output_embeddings()
            keep = [] if output is None else list(output.parameters())  # the embedding's, if tied
            for role in roles:
                if role.model is model and role.adapter is not None:
                    keep += [parameter for _, parameter in _parameters(role)]
            distributed.shard(model, self.device, keep)
        for role in roles:
            if role.score is not None:
                role.score.to(self.device)

    def any_process(self, flag: Any) -> bool:
        """Whether it is true; sharded, on any process: all have to make the same passes."""
        return distributed.total(bool(flag)) > 0 if self.sharded else bool(flag)

    # ---------------------------------------------------------------------------------- private

    def _score(self, name: str, hidden: Tensor) -> Tensor:
        score = self._roles[name].score
        if score is None:
            raise ValueError(f"role {name!r} has no scalar head: add_role(..., scalar=True)")
        return score(hidden.float()).squeeze(-1)

    def _activate(self, name: str | None) -> tuple[nn.Module, str | None]:
        """Makes the next pass of the role's model run as that role."""
        if name is None:
            if not self._reference and self._roles:
                raise ValueError("no reference was kept: load(reference=True)")
            return self.model, None
        role = self._roles[name]
        if role.adapter is not None:
            layers = self._layers[role.model]
            if layers[0].active_adapter != role.adapter:
                pk.set_adapter(role.model, role.adapter, freeze_others=False)
                _set_requires_grad(role)
            if layers[0].training != torch.is_grad_enabled():
                for layer in layers:
                    layer.training = torch.is_grad_enabled()
        return role.model, role.adapter

    def _check_new(self, name: str) -> None:
        if name in self._roles:
            raise ValueError(f"role {name!r} is there already")
        if self._roles and not self._reference:
            raise ValueError("one role is all there is without load(reference=True)")

    def _add(self, name: str, role: _Role) -> None:
        adapter = _head_adapter(role.model, role.adapter)
        if role.trainable and adapter is not None and adapter.dropout > 0.0:
            raise UsageError(
                f"the adapter of the LM head has dropout {adapter.dropout}, which the trainer's "
                "losses have not: give --lora-dropout 0, or leave the head out of the targets"
            )
        role.model.eval()
        self._roles[name] = role
        self._layers[role.model] = [m for m in role.model.modules() if isinstance(m, pk.LoRALayer)]
        _set_requires_grad(role)

    def _new_score(self) -> nn.Linear:
        score = nn.Linear(_hidden_size(self.config), 1, bias=False, device=self.device)
        nn.init.normal_(score.weight, std=getattr(self.config, "initializer_range", 0.02))
        return score

    def _load_adapter_role(self, name: str, folder: Path, trainable: bool) -> _Role:
        _check_base(folder, self.identity)
        model = self.model if self.tuning == "lora" else copy.deepcopy(self.model)
        weight = _load_adapter(model, folder, name, self.name).get("score.weight")
        score = None
        if weight is not None:
            if weight.shape != (1, _hidden_size(self.config)):
                raise UsageError(
                    f"the score head in {folder} is {tuple(weight.shape)}, wanted "
                    f"(1, {_hidden_size(self.config)}): it scores another model's hidden states"
                )
            score = self._new_score()
            score.weight.data.copy_(weight)
        return _Role(model, name, score, trainable)

    def _load_model_role(self, folder: Path, trainable: bool, own_tokenizer: bool) -> _Role:
        tokenizer = _other_tokenizer(self.tokenizer, folder)
        if tokenizer is not None and not own_tokenizer:
            raise UsageError(
                f"{folder} has another tokenizer than the policy: its model would read other "
                "words; give a model with the policy's tokenizer"
            )
        dtype = next(self.model.parameters()).dtype
        architectures = _from_pretrained(AutoConfig, str(folder)).architectures or []
        scalar = any(name.endswith("ForSequenceClassification") for name in architectures)
        kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        model = _from_pretrained(kind, folder, dtype).to(self.device)
        if tokenizer is not None:
            _check_tokenizer(tokenizer, model, str(folder))
        if not scalar:
            return _Role(model, None, None, trainable)
        if not isinstance(getattr(model, "score", None), nn.Linear) or len(model.score.weight) != 1:
            raise UsageError(f"{folder} is a classifier without a one-label `score` head")
        model.score = model.score.float()
        return _Role(model, None, model.score, trainable, tokenizer)


# --------------------------------------------------------------------------------------- helpers


def _checkpointed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _parameters(role: _Role) -> Iterator[tuple[str, nn.Parameter]]:
    """A role's own parameters. Tied weights appear once."""
    if role.adapter is None:
        yield from role.model.named_parameters()
        return
    yield from pk.adapter_parameters(role.model, role.adapter).items()
    if role.score is not None:
        yield "score.weight", role.score.weight


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Of sharded ones, the part that is here."""
    return sum(p.to_local().nbytes if distributed.is_sharded(p) else p.nbytes for p in parameters)


def _set_requires_grad(role: _Role) -> None:
    for _, parameter in _parameters(role):
        parameter.requires_grad_(role.trainable)


def _apply(model: nn.Module, lora: pk.LoRAConfig, name: str, scalar: bool) -> None:
    try:
        pk.apply_lora(model, lora, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    if scalar and _head_adapter(model, name) is not None:
        raise UsageError(
            "target_modules names the LM head, and a scalar role has none: leave it out"
        )


def _head_adapter(model: nn.Module, name: str | None) -> Any:
    """The adapter of that name on the LM head: its rank, scale and dropout; None without one."""
    output = model.get_output_embeddings() if name is not None else None
    return output.adapters.get(name) if isinstance(output, pk.LoRALinear) else None


def _without_head(lora: pk.LoRAConfig, model: nn.Module) -> pk.LoRAConfig:
    """The same adapter on everything but the LM head."""
    output, targets = model.get_output_embeddings(), lora.target_modules
    head = next(name for name, module in model.named_modules() if module is output)
    if isinstance(targets, str):
        # "all-linear" leaves the head out; a regular expression may match it
        kept = targets if targets == "all-linear" else f"(?!{re.escape(head)}$)(?:{targets})"
    else:
        kept = [t for t in targets if head != t and not head.endswith(f".{t}")]
    if not kept:
        raise UsageError("target_modules names the LM head alone, and a scalar role has none")
    return dataclasses.replace(lora, target_modules=kept)


def _untie_adapted_head(model: nn.Module) -> None:
    """So that merging an adapter of the LM head leaves the input embedding alone."""
    output = model.get_output_embeddings()
    tied = output.weight is model.get_input_embeddings().weight
    if tied and isinstance(output, pk.LoRALinear):
        output.base_layer.weight = nn.Parameter(output.weight.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _with_score(model: nn.Module, score: nn.Linear, tokenizer: Any) -> nn.Module:
    """A one-label sequence classifier around the decoder of a causal LM; its LM head is dropped."""
    config = copy.deepcopy(model.config)
    config.num_labels, pad = 1, tokenizer.pad_token_id
    # None: transformers then refuses batches, where it would score the token before the end
    config.get_text_config().pad_token_id = None if pad == tokenizer.eos_token_id else pad
    with torch.device("meta"):  # only the shell: the weights are the causal LM's
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    classifier.score = score
    return classifier


@functools.cache
def _takes_positions(decoder: type[nn.Module]) -> bool:
    """False for families that count positions from the attention mask themselves."""
    return "position_ids" in inspect.signature(decoder.forward).parameters


def _softcap(config: Any) -> float | None:
    return getattr(config, "final_logit_softcapping", None)


def _hidden_size(config: Any) -> int:
    return config.get_text_config().hidden_size


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _full_name(path: str | Path) -> str:
    """Absolute for a folder, so that `base.json` finds it from anywhere; a hub name as it is."""
    folder = Path(path)
    return str(folder.resolve()) if folder.is_dir() else str(path)


def _model_source(path: str | Path) -> str:
    """A local folder that holds a model, or a hub name; UsageError for anything else."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(f"{path} has no config.json: give a transformers model folder")
    looks_like_a_path = folder.is_absolute() or str(path).startswith(".") or folder.is_file()
    if not folder.is_dir() and (looks_like_a_path or len(folder.parts) > 2):
        raise UsageError(f"no model folder {path}: give a transformers folder or a hub name")
    return str(folder)


def _load_causal_lm(path: str | Path, dtype: torch.dtype | None) -> tuple[nn.Module, str]:
    """The model of a folder or hub name, and where its tokenizer is.

    An adapter is merged into its base, and the result is a plain model again.
    """
    folder = role_folder(path, "policy") if Path(path).is_dir() else Path(path)
    if not is_adapter(folder):
        source = _model_source(folder if folder.is_dir() else path)
        return _from_pretrained(AutoModelForCausalLM, source, dtype), source
    base = base_of(folder)
    model, source = _load_causal_lm(base, dtype)
    _check_base(folder, _identity(model, base))
    if _load_adapter(model, folder, "merged", base):
        raise UsageError(f"{path} is a reward or value model, not a language model")
    _untie_adapted_head(model)
    pk.merge_lora(model, "merged")
    return pk.unload_lora(model), source


def _load_adapter(model: nn.Module, folder: Path, name: str, base: str) -> dict[str, Tensor]:
    try:
        return pk.load_adapter(model, folder, name)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UsageError(f"adapter {folder} does not fit {base}: {_first_line(error)}") from error


def _from_pretrained(kind: Any, source: str, dtype: torch.dtype | None = None) -> Any:
    """`from_pretrained` that stays off the network for a folder and fails in one line.

    Weights that the files lack are an error: a randomly drawn layer is never a model. Weights leave
    the mapped file for aligned memory of their own: the file may change, and results of matrix
    products depend on alignment in the last bit.
    """
    transformers.utils.logging.disable_progress_bar()
    local = Path(source).is_dir()
    kwargs: dict[str, Any] = {"local_files_only": local}
    where = source if local else f"{source} (no folder here, so taken for a name on the hub)"
    if kind in (AutoTokenizer, AutoConfig):
        what = "tokenizer" if kind is AutoTokenizer else "model config"
        try:
            return kind.from_pretrained(source, **kwargs)
        except Exception as error:
            raise UsageError(f"no {what} in {where}: {_first_line(error)}") from error
    if kind is AutoModelForSequenceClassification:
        kwargs["num_labels"] = 1
    try:
        model, info = kind.from_pretrained(
            source, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **kwargs
        )
    except Exception as error:
        raise UsageError(f"cannot load model {where}: {_first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UsageError(f"the weights in {source} lack {missing[0]} ({len(missing)} in all)")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _first_line(error: BaseException) -> str:
    """The whole where the first line only announces the others."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0].rstrip()
    return " ".join(text.split()) if first.endswith(":") else first


def _check_tokenizer(tokenizer: Any, model: nn.Module, name: str) -> None:
    """Needs an end-of-sequence token, and a padding token beside it where there is any to take.

    Padding is only filler here: every pass carries its own mask. But transformers' classifiers
    score the last token that is not padding, which is to be the end of the sequence.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"the tokenizer of {name} has no end-of-sequence token: set eos_token in its "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        others = [tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens]
        others = [token for token in others if token not in (None, tokenizer.eos_token)]
        tokenizer.pad_token = others[0] if others else tokenizer.eos_token
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise UsageError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens and the model {vocabulary} rows: "
            "give the tokenizer that the model was trained with"
        )


def _other_tokenizer(tokenizer: Any, folder: Path) -> Any:
    """The folder's tokenizer; None where its tokens are those of `tokenizer`."""
    other = _from_pretrained(AutoTokenizer, str(folder))
    return None if other.get_vocab() == tokenizer.get_vocab() else other


@torch.no_grad()
def _check_head(backbone: Backbone) -> None:
    """Refuses families whose logits are more than hidden · head: a scale, a shift, a projection."""
    output = backbone.model.get_output_embeddings()
    if output is None:
        raise UsageError(f"{backbone.name} has no LM head: give a causal language model")
    ids = torch.arange(4, device=backbone.device).unsqueeze(0) % output.weight.shape[0]
    mask = torch.ones_like(ids)
    want = backbone.model(ids, attention_mask=mask, use_cache=False).logits.float()
    head = backbone.head()
    got = F.linear(backbone.hidden(None, ids, mask), head.weight, head.bias).float()
    if head.softcap is not None:
        got = head.softcap * torch.tanh(got / head.softcap)
    error = (got - want).abs().max().item()
    if not error <= 0.02 * max(1.0, want.abs().max().item()):
        raise UsageError(
            f"{backbone.name} ({backbone.config.model_type}) computes its logits by more than its "
            f"hidden states times its head (off by {error:.3g}): this family is not supported"
        )


def _identity(model: nn.Module, name: str) -> dict[str, Any]:
    """What tells one base from another: its shape, and a hash over samples of every weight.

    Samples are rounded to bfloat16 first, so the same base in float32 and bfloat16 is one base.
    """
    digest, count = hashlib.sha256(), 0
    for key, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        stride = max(1, math.ceil(flat.numel() / 64))
        samples = flat[::stride].to(torch.bfloat16).view(torch.int16).cpu().numpy()
        digest.update(f"{key}{tuple(parameter.shape)}".encode() + samples.tobytes())
        count += parameter.numel()
    text = model.config.get_text_config()
    return {
        "model": name,
        "model_type": model.config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        "parameters": count,
        "weights": digest.hexdigest()[:16],
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}; save the adapter again") from error


def base_of(folder: Path) -> str:
    """The model that an adapter folder names as its base."""
    if (folder / BASE_FILE).is_file():
        base = _read_json(folder / BASE_FILE)["model"]
    else:
        base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{folder} is an adapter that names no base: give its base as the model")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UsageError(
            f"{folder} was trained on {base}, which is no folder any more: give its base as the "
            "model"
        )
    return base


def _check_base(folder: Path, identity: dict[str, Any]) -> None:
    """UsageError when `base.json` in the adapter's folder names another base than this one."""
    path = folder / BASE_FILE
    if not path.is_file():  # PEFT wrote it: shapes are checked on loading, the weights cannot be
        return
    theirs = _read_json(path)
    differ = [key for key in identity if key != "model" and theirs.get(key) != identity[key]]
    if differ:
        pairs = ", ".join(f"{key} {theirs.get(key)} not {identity[key]}" for key in differ)
        raise UsageError(
            f"adapter {folder} belongs to another base ({pairs}): give --model the base it was "
            f"trained on, then called {theirs.get('model')}, in the --dtype of that run"
        )
