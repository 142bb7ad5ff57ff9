"""What the trainers share: opening a backbone with its roles, checkpoints, the language loss."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import perl_kernels as pk
from perl.backbone import Backbone
from perl.config import ModelConfig, TrainConfig, UsageError
from perl.data import Batches, Encoded, Example, Limit, pad, token_limit
from perl.optimizer import Optimizer
from perl.run import Checkpoint, Run, capture_rng, restore_rng, seed_everything


def open_backbone(config: ModelConfig, **keywords: Any) -> Backbone:
    """Sets threads and seeds, and loads the model; keywords go to `Backbone.load`."""
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"--device is {config.device} but torch {torch.__version__} sees no GPU; "
            "give cpu, or install a CUDA build of torch"
        )
    try:
        torch.device("cpu" if config.device == "auto" else config.device)
    except RuntimeError:
        raise UsageError(f"--device is {config.device!r}; want auto, cpu, cuda or cuda:N") from None
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed)
    return Backbone.load(config.model, dtype=config.dtype, device=config.device, **keywords)


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


def restore(checkpoint: Checkpoint, optimizers: dict[str, Optimizer], batches: Batches) -> None:
    """Puts back everything of a checkpoint but the roles, which `add_role` loads."""
    for role, optimizer in optimizers.items():
        optimizer.load_state(checkpoint.tensors(f"{role}_optimizer"))
    state = checkpoint.state
    batches.load_state_dict(state["batches"])
    restore_rng(state["rng"])


def save(
    run: Run,
    step: int,
    backbone: Backbone,
    optimizers: dict[str, Optimizer],
    batches: Batches,
    score: float | None = None,
) -> None:
    """A checkpoint: roles as folders that PEFT or transformers load, and what resuming needs."""
    run.save_checkpoint(
        step,
        {f"{role}_optimizer": optimizer.state() for role, optimizer in optimizers.items()},
        {"batches": batches.state_dict(), "rng": capture_rng()},
        score=score,
        roles=lambda folder: [backbone.save_role(role, folder / role) for role in optimizers],
    )


def micro_batches(size: int, rows: int) -> list[slice]:
    """Slices of `size` rows (0: all at once) that cover `rows`."""
    size = size or rows
    return [slice(start, start + size) for start in range(0, rows, size)]


def rows_per_pass(config: TrainConfig) -> int:
    """Rows in one forward pass: what fits in training fits in validation."""
    return config.micro_batch_size or config.batch_size


def by_length(examples: Sequence[Any], batch_size: int) -> list[list[int]]:
    """Indices of examples in batches of like length, shortest first: for evaluation."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def learned_log_prob(
    backbone: Backbone, role: str | None, examples: Sequence[Example]
) -> Tensor:  # (N,) float32
    """log π of every learned token of the examples; only their hidden states meet the LM head."""
    input_ids, mask = pad([e.ids for e in examples], backbone.tokenizer.pad_token_id)
    targets, _ = pad([e.targets for e in examples], False)
    input_ids, mask, targets = (t.to(backbone.device) for t in (input_ids, mask, targets))
    learned = targets[:, 1:].bool()
    hidden = backbone.hidden(role, input_ids[:, :-1], mask[:, :-1])
    head = backbone.head(role)
    return pk.linear_log_prob(
        hidden[learned], head.weight, input_ids[:, 1:][learned], **head.options
    )


@torch.no_grad()
def language_figures(
    backbone: Backbone, role: str | None, examples: Sequence[Example], batch_size: int
) -> dict[str, float]:
    """Mean loss and perplexity per learned token."""
    total, count = 0.0, 0
    for rows in by_length(examples, batch_size):
        values = learned_log_prob(backbone, role, [examples[i] for i in rows])
        total, count = total - values.sum().item(), count + len(values)
    return {"loss": total / count, "perplexity": math.exp(min(total / count, 700.0))}


def say_notes(run: Run, *data: Encoded | None) -> None:
    """What was cut, left out or found in the data, a line each."""
    for note in (note for encoded in data if encoded for note in encoded.notes):
        run.say(note)


class Timer:
    """Seconds since it was made, the device's queued work included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start = time.perf_counter()

    def seconds(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.start
