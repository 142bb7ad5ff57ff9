"""AdamW with a learning-rate schedule and clipping, whose state is a dict of named tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perl import distributed
from perl.config import UsageError


class Optimizer:
    """One role's optimizer: `clip`, look at the norm, `step`.

    The learning rate rises linearly over `warmup_steps` updates; then it stays at `lr`
    ("constant") or falls to 0 after update `steps`, on a line ("linear") or half a cosine
    ("cosine").
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        lr: float,
        steps: int = 0,
        schedule: str = "constant",
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ):
        self.parameters = dict(parameters)
        self.lr, self.steps, self.schedule = lr, steps, schedule
        self.warmup_steps, self.max_grad_norm = warmup_steps, max_grad_norm
        # one call of AdamW's kernel takes sharded tensors or others, not both
        sharded = [p for p in self.parameters.values() if distributed.is_sharded(p)]
        others = [p for p in self.parameters.values() if not distributed.is_sharded(p)]
        groups = [{"params": group} for group in (others, sharded) if group]
        self.adamw = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)

    def clip(self) -> float:
        """Scales gradients down to `max_grad_norm` and returns their norm before that.

        Of several processes they are summed first, so the norm is that of the whole batch.
        """
        distributed.sum_gradients(self.parameters.values())
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = distributed.norm(gradients)
        for group in self.adamw.param_groups:
            nn.utils.clip_grads_with_norm_(group["params"], self.max_grad_norm, norm)
        return norm.item()

    def step(self, step: int) -> None:
        """Update number `step` (from 1); gradients are None afterwards."""
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate(step)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def learning_rate(self, step: int) -> float:
        """Of update number `step` (from 1)."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        # the last update is not wasted at a learning rate of 0
        left = (self.steps + 1 - step) / (self.steps + 1 - self.warmup_steps)
        return self.lr * (left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name, ready for safetensors (on rank 0)."""
        return {
            f"{name}/{key}": distributed.whole_on_first(value)
            for name, parameter in self.parameters.items()
            for key, value in self.adamw.state[parameter].items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` gave. UsageError where names or shapes are another model's."""
        states: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition("/")
            states.setdefault(parameter, {})[key] = tensor
        for name, parameter in self.parameters.items():
            moments = states.get(name, {})
            if any(m.dim() and m.shape != parameter.shape for m in moments.values()) or not moments:
                raise UsageError(
                    f"the checkpoint's optimizer state does not fit {name}; it "
                    "belongs to another model or rank"
                )
            self.adamw.state[parameter] = {
                key: distributed.as_part_of(tensor, parameter) for key, tensor in moments.items()
            }
