"""Peak memory and step time of a training, from the model's config alone: `python -m perl plan`.

    config.json ─► model without data ─► the trainers' own functions, one update ─► ledger

No weight is read and no number computed. The model is made of tensors that have a shape, a type and
no data (torch's FakeTensorMode); roles and optimizers are made as the trainers make them, and the
trainers' functions run on it: rollout, scores, forward, backward, clipping, AdamW. `Ledger` sees
every operation, and follows each storage from the one that made it to the moment when nothing holds
it any more. The peak of what is held is the prediction. So what autograd keeps, temporaries, and
whatever a change in a trainer brings with it are counted, and no formula or constant is fitted.

Memory is the promise, for batches with rows as long as --max-tokens and padding in others; slow
tests hold it to within 10 % of what processes take. Time is an estimate: an operation takes as long
as its arithmetic at the device's peak, or its bytes at the device's bandwidth, whichever is longer
(Williams et al. 2009, the roofline), over the share of it that steps reach. That share, `REACHED`,
is fitted to steps on a CPU, and holds for peaks that are measured as `probe` does; slow tests hold
such times to the factor `MARGIN`. By other peaks the times are those of a step at its best.

Left out, as the ledger does not see it: what kernels hold inside an operation (a few MiB a thread),
messages between processes, fragmentation, of CUDA's allocator and of the C library's heap, where
CPU tensors under 256 KiB are (`pk.use_cpu_pool`). Validation is left out too.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForCausalLM

import perl_kernels as pk
from perl.backbone import Backbone, base_of, is_adapter
from perl.config import (
    PlanConfig,
    ReinforceConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
    UsageError,
)
from perl.data import Example, Pair, prompt_room, token_limit
from perl.memory import PeakMemory
from perl.optimizer import Optimizer
from perl.policy_step import ask_anchor, estimate_kl, learn, reward_returns
from perl.rollout import Rollout, generate
from perl.run import role_folder
from perl.train_reward import batch_loss
from perl.training import (
    Timer,
    learned_log_prob,
    lora_config,
    make_optimizer,
    micro_batches,
)

KINDS = ("weights", "gradients", "optimizer", "activations", "KV cache", "scratch")
MIB = 2**20


# ---------------------------------------------------------------------------------------------
# The ledger


class Ledger(TorchDispatchMode):
    """Bytes held in memory, by kind, from operation to operation; and the work of each.

    granted: bytes that the allocator takes for a storage of so many. A storage is "scratch" until
    `tag` says what it is for.
    """

    def __init__(self, granted: Callable[[int], int]) -> None:
        super().__init__()
        self.granted = granted
        # of each storage: bytes, kind, and how many operations were before it
        self.held: dict[int, tuple[int, str, int]] = {}
        self.now, self.peak = Counter(), Counter()
        self.phase, self.peak_phase, self.peak_at, self.times = "", "", 0, 1.0
        # of each operation: its phase, how often it comes, FLOPs, bytes read and written
        self.work: list[tuple[str, float, int, int]] = []
        self.roles: dict[str, dict[str, int]] = {}  # `Backbone.role_bytes`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:  # a number that only data can tell
            return False if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _everything(index)])
        out = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(out)
        before = {t.untyped_storage()._cdata for t in given}
        fresh = [t for t in made if t.untyped_storage()._cdata not in before]
        for tensor in fresh:
            self.tag(tensor, "scratch")
        if fresh or func._schema.is_mutable:
            moved = sum(t.numel() * t.element_size() for t in (*given, *fresh))
            self.work.append((self.phase, self.times, flops(func, args, kwargs, out), moved))
        return out

    def tag(self, tensor: Tensor, kind: str, parts: int = 1) -> Tensor:
        """Says what a storage is for; what is more than scratch already stays that.

        parts: processes that it is spread over.
        """
        storage = tensor.untyped_storage()
        key, size = storage._cdata, self.granted(storage.nbytes() // parts)
        if key not in self.held:
            weakref.finalize(storage, self._freed, key).atexit = False
            made = len(self.work)
        elif self.held[key][1] == "scratch" != kind:
            before, _, made = self.held[key]
            self.now["scratch"] -= before
            if made <= self.peak_at:  # it was there, and is called by its name in the peak too
                self.peak["scratch"] -= before
                self.peak[kind] += before
        else:
            return tensor
        self.held[key] = size, kind, made
        self.now[kind] += size
        if self.now.total() > self.peak.total():
            self.peak, self.peak_phase, self.peak_at = self.now.copy(), self.phase, len(self.work)
        return tensor

    def _freed(self, key: int) -> None:
        size, kind, _ = self.held.pop(key)
        self.now[kind] -= size


def _everything(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A mask as so many indices as it could choose."""
    if index is None or index.dtype != torch.bool:
        return (index,)
    every = torch.zeros(index.numel(), dtype=torch.int64, device=index.device)
    return (every,) * index.dim()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Floating-point operations of a matrix product or of what is made of them; else 0."""
    if func.namespace == "perl_kernels":
        formula = _FLOPS.get(func._opname)
        return 0 if formula is None else formula(*args)
    formula = flop_registry.get(func.overloadpacket) or _ATTENTION.get(func.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _size(*lists: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensors in lists for tensor in tensors)


def _head_flops(products: Callable[..., int]) -> Callable[..., int]:
    """Of the head's ops: `products` of (N, H) and (H, V), given what follows hidden, weight."""

    def formula(hidden: Tensor, weight: Tensor, *rest: Any) -> int:
        return 2 * len(hidden) * weight.numel() * products(*rest)

    return formula


# Arguments as in the schemas of perl_kernels' op.py files.
_FLOPS: dict[str, Callable[..., int]] = {
    "lora_linear": lambda x, w, bias, a, b, *_: 2 * len(x) * _size(w, a, b),
    "lora_linear_backward": lambda dy, x, w, a, b, scale, p, seed, s, need_dx, *_: (
        2 * len(x) * (need_dx * _size(w) + 2 * _size(a, b))
    ),
    "lora_mlp": lambda x, w, bias, a, b, *_: 2 * len(x) * _size(w, a, b),
    "lora_mlp_backward": lambda dy, x, w, bias, a, b, *rest: (
        2 * len(x) * (_size(w, a, b) + _size(a, b) + (0 if rest[7] else _size(w[:2])))
    ),
    "head_stats": _head_flops(lambda bias, a, b, target, ref, *_: 1 + (ref is not None)),
    "head_units": _head_flops(lambda bias, a, b, target, ref, *_: 2 + (ref is not None)),
    "head_grad": _head_flops(
        lambda bias, a, b, target, ref, *r: 1 + (ref is not None) + sum(r[-4:-2])
    ),
    "policy_loss": _head_flops(
        lambda bias, a, b, target, advantage, old, ref, *r: (
            1 + (ref is not None) + r[-4] + (2 * r[-3])
        )
    ),
}


def _attention_flops(products: int) -> Callable[..., int]:
    """`products` of (T, head size) and (head size, S) for each head, none left out as masked."""

    def formula(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
        return 2 * products * query.numel() * key.shape[-2]

    return formula


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops(2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, *given, **keywords: _attention_flops(5)(*given, **keywords)
    ),
}


# ---------------------------------------------------------------------------------------------
# A model without data


def model_config(path: str) -> Any:
    """The transformers config of what --model names: a folder, config.json, a run, a hub name."""
    folder = role_folder(path, "policy") if Path(path).is_dir() else Path(path)
    if is_adapter(folder):
        return model_config(base_of(folder))
    file = folder if folder.exists() else _kept_by_the_hub(path)
    try:
        return AutoConfig.from_pretrained(str(file), local_files_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"no model config in {path}: {reason}") from error


def _kept_by_the_hub(name: str) -> str:
    """The config.json that the hub's client has here; transformers would ask the network."""
    with suppress(ValueError):  # a path is no name
        file = try_to_load_from_cache(name, "config.json")
        if isinstance(file, str):
            return file
    raise UsageError(
        f"no model config in {name}: there is no such folder or file, and a plan fetches nothing; "
        f"if it is a hub name, `hf download {name} config.json` does"
    )


class _Enough(Exception):
    """A prefill and one more token tell what a whole rollout takes."""


class Blueprint(Backbone):
    """A backbone without data, whose rollouts stop after two passes; they count as all."""

    ledger: Ledger
    answer_tokens: int
    passes: int = 0  # of the rollout

    def hidden(
        self, role: str | None, input_ids: Tensor, attention_mask: Tensor, cache: Any = None
    ) -> Tensor:
        if cache is None:
            return super().hidden(role, input_ids, attention_mask)
        if self.passes == 2:
            raise _Enough
        self.ledger.times = 1 if self.passes == 0 else self.answer_tokens - 1
        hidden = super().hidden(role, input_ids, attention_mask, cache)
        for layer in cache.layers:
            for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if states is not None:
                    self.ledger.tag(states, "KV cache")
        self.passes += 1
        return hidden


def blueprint(config: TrainConfig, shape: Any, roles: dict[str, bool]) -> Blueprint:
    """The backbone of a trainer, on the meta device. roles: name -> whether it is scalar."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.dtype))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{config.model} is no causal language model: {reason}") from error
    backbone = Blueprint(
        model,
        SimpleNamespace(eos_token_id=0, pad_token_id=1),
        tuning=config.tuning,
        lora=lora_config(config),
        reference=isinstance(config, ReinforceConfig),
        name=config.model,
    )
    for role, scalar in roles.items():
        backbone.add_role(role, scalar=scalar)
    return backbone


def give_storage(models: Iterable[nn.Module]) -> None:
    """Puts CPU tensors of the FakeTensorMode that is on in the place of those on the meta device.

    Modules that share one go on sharing it.
    """
    given: dict[Tensor, Tensor] = {}
    for module in (module for model in models for module in model.modules()):
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor not in given:
                    given[tensor] = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        given[tensor] = nn.Parameter(given[tensor], tensor.requires_grad)
                store[name] = given.get(tensor)


# ---------------------------------------------------------------------------------------------
# One update of each trainer


@dataclass
class Update:
    """What the functions below run on. rows: of one process and update."""

    config: Any
    backbone: Blueprint
    judges: list[str]  # roles that score answers
    optimizers: dict[str, Optimizer]
    ledger: Ledger
    rows: int

    @property
    def length(self) -> int:
        """Tokens of every row."""
        context = self.backbone.config.max_position_embeddings
        return token_limit(self.config.max_tokens, context)

    def begin(self, phase: str) -> int:
        """Starts a phase that goes over micro-batches: how many rows to take.

        Of many micro-batches two are enough, as the second meets what the first one leaves; the
        work counts for all.
        """
        rows = min(self.rows, 2 * (self.config.micro_batch_size or self.rows))
        self.ledger.phase, self.ledger.times = phase, self.rows / rows
        return rows

    def step(self) -> None:
        self.ledger.times = 1.0
        for optimizer in self.optimizers.values():
            optimizer.clip()
        for optimizer in self.optimizers.values():
            optimizer.step(1)


def sft(update: Update) -> None:
    rows, ids = update.begin("learn"), [5] * update.length
    batch = [Example(ids, [False] + [True] * (len(ids) - 1))] * rows
    for part in micro_batches(update.config.micro_batch_size, rows):
        (-learned_log_prob(update.backbone, "policy", batch[part]).sum() / rows).backward()
    update.step()


def reward(update: Update) -> None:
    rows, ids = update.begin("learn"), [5] * update.length
    batch = [Pair(ids, ids)] * rows
    for part in micro_batches(update.config.micro_batch_size, rows):
        losses, _ = batch_loss(update.config, update.backbone, batch[part], (1.0, 1.0))
        (losses.sum() / rows).backward()
    update.step()


def reinforce(update: Update) -> None:
    config, backbone, length = update.config, update.backbone, update.length
    tokens = config.max_new_tokens
    room = prompt_room(config.max_tokens, tokens, length)
    update.begin("rollout")
    with suppress(_Enough):
        generate(
            backbone,
            "policy",
            [[5] * room] * update.rows,
            max_new_tokens=tokens,
            temperature=config.temperature,
            draws=torch.empty(update.rows, tokens, dtype=torch.float64),
        )
    rows = update.begin("score")
    ids = torch.ones(rows, length, dtype=torch.int64)
    answers = ids[:, room:]
    rollout = Rollout(
        sequences=ids,
        attention_mask=ids.clone(),
        prompt_len=room,
        completion_ids=answers,
        completion_mask=answers.bool(),
        log_prob=torch.zeros(rows, tokens),
        ended=ids[:, 0].bool(),
    )
    with torch.no_grad():
        for part in micro_batches(config.micro_batch_size, rows):
            for role in update.judges:
                backbone.score(role, ids[part], rollout.attention_mask[part])
    anchor, kl = ask_anchor(config, backbone, rollout), rollout.log_prob
    if config.kl_in == "reward":
        kl = estimate_kl(config, backbone, rollout, anchor)
    returns = reward_returns(config, torch.zeros(rows), kl, rollout, config.beta)
    update.begin("learn")
    for _ in learn(config, backbone, rollout, returns, anchor, config.beta):
        update.step()


JOBS = {
    "sft": (SftConfig, sft),
    "reward": (RewardConfig, reward),
    "reinforce": (ReinforceConfig, reinforce),
}


def count(config: PlanConfig, job: str, tuning: str) -> Ledger:
    """The ledger of one update of a job on one device."""
    kind, one_update = JOBS[job]
    trainer = _trainer_config(config, kind, tuning)
    learners, judges = {"reward": True} if job == "reward" else {"policy": False}, []
    if job == "reinforce":
        judges = [f"reward_{i}" for i in range(config.reward_models)]
        learners |= {"value": True} if config.baseline == "value" else {}
    backbone = blueprint(
        trainer, model_config(config.model), learners | dict.fromkeys(judges, True)
    )
    if job == "reward" and config.checkpoint_activations:
        backbone.checkpoint_activations("reward")
    rows = config.batch_size
    if job == "reinforce":
        rows = config.prompts_per_step * config.answers_per_prompt
    ledger = Ledger(GRANTED[config.device])
    kept = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: ledger.tag(tensor, "activations"), lambda tensor: tensor
    )
    with FakeTensorMode():
        give_storage(backbone.models())
        backbone.device, backbone.ledger = torch.device("cpu"), ledger
        backbone.answer_tokens = config.max_new_tokens
        optimizers = {
            role: make_optimizer(trainer, backbone, role, trainer.lr) for role in learners
        }
        for optimizer in optimizers.values():  # their states come with a first update
            for parameter in optimizer.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step(1)
        update = Update(trainer, backbone, judges, optimizers, ledger, -(-rows // config.devices))
        try:
            ledger.roles = backbone.role_bytes()
            with ledger, kept:
                name_parts(update, config.devices if config.shard else 1)
                one_update(update)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UsageError(
                f"{config.model} ({backbone.config.model_type}) decides by the data what it "
                f"computes ({error}), which no plan can know"
            ) from None
    return ledger


def name_parts(update: Update, parts: int) -> None:
    """Tells the ledger what is held from update to update; of decoders one part of so many.

    A sharded model gathers a block while it computes the one before, and leaves the gradients of a
    block to the others while it computes the next; `perl.distributed.shard`.
    """
    ledger, models = update.ledger, update.backbone.models()
    spread = {tensor for model in models for tensor in _spread(model)} if parts > 1 else set()
    for tensor in (t for model in models for t in (*model.parameters(), *model.buffers())):
        ledger.tag(tensor, "weights", parts if tensor in spread else 1)
    for optimizer in update.optimizers.values():
        for parameter, state in optimizer.adamw.state.items():
            share = parts if parameter in spread else 1
            for moment in state.values():
                ledger.tag(moment, "optimizer", share)
            parameter.register_post_accumulate_grad_hook(_namer(ledger, share))
    if parts > 1:
        ledger.now["scratch"] += max(_gathered(model, spread) for model in models)


def _spread(model: nn.Module) -> set[Tensor]:
    """The weights that `Backbone.shard` spreads: all of the decoder but head and adapters."""
    if not isinstance(model, transformers.PreTrainedModel):
        return set()  # a scalar head
    output = model.get_output_embeddings()
    kept = set() if output is None else set(output.parameters())
    return {p for name, p in model.base_model.named_parameters() if "lora_" not in name} - kept


def _gathered(model: nn.Module, spread: set[Tensor]) -> int:
    """Bytes of whole weights and gradients that a process holds at once beside its parts."""

    def size(module: nn.Module) -> int:
        parts = spread & set(module.parameters())
        return sum(p.numel() * p.element_size() * (1 + p.requires_grad) for p in parts)

    names = getattr(model, "_no_split_modules", None) or ()
    blocks = [size(module) for module in model.modules() if type(module).__name__ in names]
    return 2 * max(blocks, default=0) + size(model) - sum(blocks)


def _namer(ledger: Ledger, parts: int) -> Callable[[Tensor], None]:
    def name(parameter: Tensor) -> None:
        ledger.tag(parameter.grad, "gradients", parts)

    return name


def _trainer_config(config: PlanConfig, kind: type, tuning: str) -> Any:
    """What the trainer would be given; what a plan does not ask for is as by default."""
    names = {f.name for f in dataclasses.fields(kind)} & set(vars(config)) - {"device", "shard"}
    values = {name: getattr(config, name) for name in names}
    if kind is ReinforceConfig:
        values["reward_function"] = "-"
    return kind(**values, data=["-"], out="-", tuning=tuning)


def pooled(size: int) -> int:
    """What csrc/cpu/pool.cpp takes for a tensor; smaller ones are the C library's."""
    if size < MIB // 4:
        return size
    unit = MIB // 16 if size < 4 * MIB else 2 * MIB
    return -(-size // unit) * unit


GRANTED: dict[str, Callable[[int], int]] = {
    "cpu": pooled,
    "cuda": lambda size: -(-size // 512) * 512,  # a block of torch's caching allocator
}


# ---------------------------------------------------------------------------------------------
# What the command tells


class Peaks(NamedTuple):
    """What a device can do, and what is made of it."""

    flops: float  # per second
    bandwidth: float  # bytes per second
    source: str
    efficiency: float  # the share that a step is taken to reach
    note: str  # what times by it are worth


# Steps of sft, reward and reinforce, LoRA and full, with 27 million parameters on two cores of an
# Intel Xeon (AVX-512, float32): the share of `probe`'s peaks that they reached, and how far above
# or below a time by that share theirs may lie.
REACHED, MARGIN = 0.85, 1.4

# Products of dense bfloat16 matrices, and memory, by NVIDIA's data sheet of each GPU: of the SXM
# module where there are several forms, and half of what is given there "with sparsity".
MACHINES = {
    "h200": (989e12, 4.8e12),
    "h100": (989e12, 3.35e12),
    "a100": (312e12, 2.039e12),  # 80 GB
    "l40s": (362e12, 864e9),
    "l4": (121e12, 300e9),
}


def run(config: PlanConfig) -> dict[str, Any] | None:
    """Prints tables of memory and time; with --json returns the figures, in bytes and seconds, of
    each job and tuning, and under "peaks" what times are made of."""
    if config.machine is not None and config.dtype == "float32":
        raise UsageError(
            f"--machine {config.machine} has peaks for 16 bits; give --dtype bfloat16, or "
            "--device-flops and --device-bandwidth for float32"
        )
    transformers.utils.logging.set_verbosity_error()
    own = process_bytes() if config.device == "cpu" else 0
    jobs = list(JOBS) if config.job == "all" else [config.job]
    # full tuning has no exact KL: its heads are not shared (`ReinforceConfig`)
    skipped = ("reinforce", "full") if config.kl_in == "loss" else None
    plans = [plan for plan in itertools.product(jobs, ("full", "lora")) if plan != skipped]
    ledgers = {plan: count(config, *plan) for plan in plans}
    peaks = peaks_of(config)  # behind what may refuse
    figures: dict[str, Any] = {job: {} for job in jobs}
    for (job, tuning), ledger in ledgers.items():
        figures[job][tuning] = figures_of(config, job, tuning, ledger, own, peaks)
    if config.json:
        return figures | {"peaks": peaks and peaks._asdict()}
    for job in jobs:
        print(table(config, job, figures[job]))
    if peaks is None:
        print(
            "times: none, as torch sees no GPU here to measure; give --machine, or --device-flops "
            "and --device-bandwidth"
        )
    else:
        print(f"times: {peaks.source}, {peaks.efficiency:.0%} of them reached; {peaks.note}")
    return None


def figures_of(
    config: PlanConfig, job: str, tuning: str, ledger: Ledger, own: int, peaks: Peaks | None
) -> dict[str, Any]:
    """Bytes by kind at the peak, where it is, and what --memory and the device's peaks allow.

    "roles" is what each role alone has, whole models also under --shard (`Backbone.role_bytes`).
    """
    memory = {kind: ledger.peak[kind] for kind in KINDS} | {"process": own}
    figures = {
        "memory": memory,
        "peak": sum(memory.values()),
        "peak_phase": ledger.peak_phase,
        "roles": ledger.roles,
    }
    if peaks is not None:
        figures["seconds"] = seconds(ledger.work, peaks)
    if config.memory is not None:
        flag = "prompts_per_step" if job == "reinforce" else "batch_size"

        def peak(rows: int) -> int:
            changes = {flag: rows * config.devices, "micro_batch_size": 0}
            return own + count(dataclasses.replace(config, **changes), job, tuning).peak.total()

        figures["largest_batch"] = config.devices * largest(peak, int(config.memory * 2**30))
    return figures


def seconds(work: list[tuple[str, float, int, int]], peaks: Peaks) -> dict[str, float]:
    """Of each phase: the longer of arithmetic and memory traffic, operation by operation."""
    total: Counter[str] = Counter()
    for phase, times, products, moved in work:
        longer = max(products / peaks.flops, moved / peaks.bandwidth)
        total[phase] += times * longer / peaks.efficiency
    return dict(total)


def largest(peak: Callable[[int], int], limit: int) -> int:
    """The most rows whose peak is within the limit; peaks grow with rows, nearly on a line."""
    known = {rows: peak(rows) for rows in (1, 2)}
    while True:
        fits = max((rows for rows, size in known.items() if size <= limit), default=0)
        above = min((rows for rows, size in known.items() if size > limit), default=None)
        if above == fits + 1:
            return fits
        low, high = sorted(known)[-2:] if above is None else (fits, above)
        slope = max((known[high] - known[low]) / (high - low), 1.0)
        guess = low + int((limit - known[low]) / slope)
        rows = min(max(guess, fits + 1), 8 * high if above is None else above - 1)
        known[rows] = peak(rows)


def process_bytes() -> int:
    """What a training process takes beside its tensors, measured here: a step of a tiny model."""
    size = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_hidden_layers=1)
    shape = transformers.LlamaConfig(**size, num_key_value_heads=2, vocab_size=64)
    with PeakMemory() as peak:
        model = pk.apply_lora(AutoModelForCausalLM.from_config(shape), pk.LoRAConfig(r=2))
        parameters = [p for p in model.parameters() if p.requires_grad]
        model(torch.ones(2, 32, dtype=torch.int64)).logits.sum().backward()
        torch.optim.AdamW(parameters, fused=True).step()
    return peak.bytes


def peaks_of(config: PlanConfig) -> Peaks | None:
    """What the device can do by the flags, or measured; None where it is not here to measure."""
    share, note = 1.0, "what a step takes at best; give --efficiency for an estimate"
    if config.machine is not None:
        rates = MACHINES[config.machine]
        source = f"peaks of the {config.machine.upper()}'s data sheet"
    elif config.device_flops is not None:
        rates, source = (config.device_flops, config.device_bandwidth), "peaks as given"
    elif config.device == "cuda" and not torch.cuda.is_available():
        return None
    else:
        rates = probe(config)
        told = f"{rates[0] / 1e12:.3g} TFLOP/s and {rates[1] / 1e9:.3g} GB/s"
        source = f"peaks measured here, {told}"
        if config.device == "cpu":
            source += f" by {torch.get_num_threads()} threads"
            share = REACHED
            note = f"a step may well take {1 / MARGIN:.1f} to {MARGIN:.1f} times as long"
    if config.efficiency is not None:
        share, note = config.efficiency, "an estimate"
    if config.devices > 1:
        note += ", and messages between devices are not counted"
    return Peaks(*rates, source, share, note)


def probe(config: PlanConfig) -> tuple[float, float]:
    """FLOP/s of products of large matrices, bytes/s of copies of 256 MiB; medians of a second."""
    device = torch.device(config.device)
    one = torch.randn(2048, 2048, device=device).to(getattr(torch, config.dtype))
    many, copy = (torch.zeros(64 * MIB, device=device) for _ in range(2))

    def seconds_of(work: Callable[[], object]) -> float:
        """The median of those that a second has room for, behind one that warms up."""
        times, begin = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begin < 1.0:
            timer = Timer(device)
            work()
            times.append(timer.seconds())
        return statistics.median(times[1:])

    flops_per_s = 2 * 2048**3 / seconds_of(lambda: one @ one)
    return flops_per_s, 2 * 256 * MIB / seconds_of(lambda: copy.copy_(many))


def table(config: PlanConfig, job: str, figures: dict[str, Any]) -> str:
    """Memory of full tuning and of LoRA side by side, with a bar for each row."""
    flag, what = {
        "sft": ("batch_size", "rows"),
        "reward": ("batch_size", "pairs"),
        "reinforce": ("prompts_per_step", "prompts with answers"),
    }[job]
    tokens = config.max_tokens or "context's"
    most = max(plan["peak"] for plan in figures.values())
    scale, unit, digits = (2**30, "GiB", 1) if most >= 10 * 2**30 else (MIB, "MiB", 0)
    lines = [f"{job}: {getattr(config, flag)} {what}, {tokens} tokens each, {config.dtype}"]
    if config.devices > 1:
        lines[0] += f"; of each of {config.devices} devices"

    def row(name: str, value: Callable[[dict], str], bar: Callable[[dict], int] = lambda _: 0):
        cells = [
            f"{value(plan):>12} {BAR * round(WIDTH * bar(plan) / most):{WIDTH}}"
            for plan in figures.values()
        ]
        lines.append(f"  {name:<16}" + " ".join(cells).rstrip())

    def memory(name: str, size: Callable[[dict], int]):
        row(name, lambda plan: f"{size(plan) / scale:.{digits}f} {unit}", size)

    names = iter(figures)
    row("", lambda _: {"full": "full", "lora": f"LoRA {config.lora_rank}"}[next(names)])
    for kind in (*KINDS, "process"):
        if any(plan["memory"][kind] for plan in figures.values()):
            memory(kind, lambda plan, kind=kind: plan["memory"][kind])
    memory("peak", lambda plan: plan["peak"])
    if job == "reinforce":
        row("in phase", lambda plan: plan["peak_phase"])
    if config.memory is not None:
        row("largest batch", lambda plan: str(plan["largest_batch"]))
    lines.append("  what each role has: weights, gradients, optimizer")
    for role in dict.fromkeys(role for plan in figures.values() for role in plan["roles"]):
        memory(f"  {role}", lambda plan, role=role: sum(plan["roles"].get(role, {}).values()))
    phases = dict.fromkeys(phase for p in figures.values() for phase in p.get("seconds", ()))
    for phase in phases:
        row(f"{phase}, s", lambda plan, phase=phase: f"{plan['seconds'][phase]:.3g}")
    if phases:
        row("step, s", lambda plan: f"{sum(plan['seconds'].values()):.3g}")
    return "\n".join(lines) + "\n"


BAR, WIDTH = "█", 16
