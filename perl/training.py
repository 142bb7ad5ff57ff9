"""What the trainers share: opening a backbone with its roles, checkpoints, the language loss."""

from __future__ import annotations

import math
import re
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import perl_kernels as pk
from perl import distributed
from perl.backbone import Backbone
from perl.config import ModelConfig, ReinforceConfig, TrainConfig, UsageError
from perl.data import Batches, Encoded, Example, Limit, pad, token_limit
from perl.memory import PeakMemory
from perl.optimizer import Optimizer
from perl.run import (
    Checkpoint,
    Run,
    capture_rng,
    derived_seed,
    restore_rng,
    seed_everything,
)


def open_backbone(config: ModelConfig, **keywords: Any) -> Backbone:
    """Joins other processes, sets threads and seeds, loads the model; keywords: `Backbone.load`.

    Large CPU tensors come from a pool from here on, in the whole process.
    """
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"--device is {config.device} but torch {torch.__version__} sees no GPU; "
            "give cpu, or install a CUDA build of torch"
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise UsageError(f"--device is {config.device!r}; want auto, cpu, cuda or cuda:N")
    device = distributed.start(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    pk.use_cpu_pool()
    seed_everything(config.seed)
    if isinstance(config, TrainConfig) and config.shard:
        if not distributed.started():
            raise UsageError(
                "--shard spreads the model over several processes, and this is one; start with "
                "torchrun --nproc-per-node N -m perl ..., or leave it out"
            )
        device = "cpu"  # a part of it goes where it runs, in `shard`
    backbone = Backbone.load(config.model, dtype=config.dtype, device=device, **keywords)
    distributed.check_same("--model", backbone.identity["weights"])
    return backbone


def shard(config: TrainConfig, backbone: Backbone) -> None:
    """With `--shard`, spreads the weights over the processes; the roles are all there by now."""
    if config.shard:
        backbone.shard(distributed.start(config.device))


def lora_config(config: TrainConfig) -> pk.LoRAConfig:
    targets = config.lora_targets
    return pk.LoRAConfig(
        r=config.lora_rank,
        alpha=config.lora_alpha,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
    )


def length_limit(config: Any, backbone: Backbone) -> Limit:
    """How long sequences may be, and what happens to longer ones."""
    longest = token_limit(config.max_tokens, backbone.config.max_position_embeddings)
    return Limit(longest, config.truncate_prompts, config.drop_long)


def add_role(
    backbone: Backbone, role: str, checkpoint: Checkpoint | None, scalar: bool = False
) -> None:
    """A trainable role: a checkpoint's, or a new one."""
    if checkpoint is None:
        backbone.add_role(role, scalar=scalar)
    else:
        backbone.load_role(role, checkpoint.folder / role, trainable=True)


def make_optimizer(config: TrainConfig, backbone: Backbone, role: str, lr: float) -> Optimizer:
    return Optimizer(
        backbone.trainable(role),
        lr=lr,
        steps=config.steps,
        schedule=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def begin(
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    optimizers: dict[str, Optimizer],
    batches: Batches,
) -> None:
    """What is left to do before the first step: checks of several processes, then their state.

    All of a checkpoint is put back but the roles, which `add_role` loads. It may come from another
    number of processes: batches and weights go on as they would have, and dropout is drawn anew.
    """
    check_processes(config, batches)
    step, states = 0, []
    if checkpoint is not None:
        for role, optimizer in optimizers.items():
            optimizer.load_state(checkpoint.tensors(f"{role}_optimizer"))
        batches.load_state_dict(checkpoint.state["batches"])
        step, states = checkpoint.step, checkpoint.state["rng"]
    if len(states) == distributed.size():
        restore_rng(states[distributed.rank()])
    elif step > 0 or distributed.rank() > 0:
        seed_everything(derived_seed(config.seed, step, distributed.rank()))


def check_processes(config: TrainConfig, batches: Batches) -> None:
    """UsageError where processes have other data, or batches do not divide among them."""
    size, rows, flag, parts = distributed.size(), batches.batch_size, "--batch-size", 1
    if isinstance(config, ReinforceConfig):
        rows, parts = rows * config.answers_per_prompt, config.minibatches
        flag = "--prompts-per-step" + " x --answers-per-prompt" * (config.answers_per_prompt > 1)
    if rows % (size * parts):
        each = f" for each of {parts} --minibatches" if parts > 1 else ""
        raise UsageError(
            f"a batch has {rows} rows ({flag}, or all of --data) and there are {size} processes"
            f"{each}; give a multiple of {size * parts}, or fewer of these"
        )
    if size > 1:
        lengths = [len(example) for example in batches.examples]
        some = batches.examples[:: max(1, len(lengths) // 64)]
        distributed.check_same("--data", zlib.crc32(repr((lengths, some)).encode()))


def bookmark(batches: Batches) -> Callable[[], None]:
    """Marks where the data and this process's random numbers are; a call of it goes back there."""
    state, rng = batches.state_dict(), capture_rng()

    def go_back() -> None:
        batches.load_state_dict(state)
        restore_rng(rng)

    return go_back


def save(
    run: Run,
    step: int,
    backbone: Backbone,
    optimizers: dict[str, Optimizer],
    batches: Batches,
    score: float | None = None,
    **state: Any,
) -> None:
    """A checkpoint: roles as folders that PEFT or transformers load, and what resuming needs.

    state: JSON values more that the trainer goes on with.
    """
    run.save_checkpoint(
        step,
        {f"{role}_optimizer": optimizer.state() for role, optimizer in optimizers.items()},
        {"batches": batches.state_dict(), "rng": distributed.each(capture_rng())} | state,
        score=score,
        roles=lambda folder: [backbone.save_role(role, folder / role) for role in optimizers],
    )


def micro_batches(size: int, stop: int, start: int = 0) -> list[slice]:
    """Slices of `size` rows (0: all at once) that cover the rows from `start` up to `stop`."""
    size = size or stop - start
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def rows_per_pass(config: TrainConfig) -> int:
    """Rows in one forward pass: what fits in training fits in validation."""
    return config.micro_batch_size or config.batch_size


def by_length(examples: Sequence[Any], batch_size: int) -> list[list[int]]:
    """Indices of examples in batches of like length, shortest first: for evaluation."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def learned_log_prob(
    backbone: Backbone, role: str | None, examples: Sequence[Example], temperature: float = 1.0
) -> Tensor:  # (N,) float32
    """log π of every learned token of the examples; only their hidden states meet the LM head."""
    input_ids, mask = pad([e.ids for e in examples], backbone.tokenizer.pad_token_id)
    targets, _ = pad([e.targets for e in examples], False)
    input_ids, mask, targets = (t.to(backbone.device) for t in (input_ids, mask, targets))
    learned = targets[:, 1:].bool()
    hidden = backbone.hidden(role, input_ids[:, :-1], mask[:, :-1])
    head = backbone.head(role)
    return pk.linear_log_prob(
        hidden[learned],
        head.weight,
        input_ids[:, 1:][learned],
        temperature=temperature,
        **head.options,
    )


@torch.no_grad()
def language_figures(
    backbone: Backbone, role: str | None, examples: Sequence[Example], batch_size: int
) -> dict[str, float]:
    """Mean loss and perplexity per learned token."""
    batches = by_length(examples, batch_size)
    found = []
    for rows in distributed.share(batches):
        values = learned_log_prob(backbone, role, [examples[i] for i in rows])
        found.append((-values.sum().item(), len(values)))
    total, count = map(sum, zip(*distributed.gathered(found, len(batches)), strict=True))
    return {"loss": total / count, "perplexity": math.exp(min(total / count, 700.0))}


def say_notes(run: Run, *data: Encoded | None) -> None:
    """What was given for nothing; what was cut, left out or found in the data, a line each."""
    if unused := run.config.unused():
        run.say(f"of no use here: {', '.join(unused)}")
    for note in (note for encoded in data if encoded for note in encoded.notes):
        run.say(note)


def peak_memory(peak: PeakMemory) -> dict[str, Any]:
    """The largest peak of a process, and where there are several, that of each by rank."""
    peaks = distributed.each(peak.read())
    by_rank = {"peak_memory_bytes_by_rank": peaks} if len(peaks) > 1 else {}
    return {"peak_memory_bytes": max(peaks)} | by_rank


class Timer:
    """Seconds since it was made, the device's queued work included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start = time.perf_counter()

    def seconds(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.start
