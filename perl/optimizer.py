"""AdamW with linear warmup and clipping, whose state is a dict of named tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perl.config import UsageError


class Optimizer:
    """One role's optimizer: `clip`, look at the norm, `step`.

    The learning rate rises linearly over `warmup_steps` updates and stays at `lr`.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        lr: float,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ):
        self.parameters = dict(parameters)
        self.lr, self.warmup_steps, self.max_grad_norm = lr, warmup_steps, max_grad_norm
        self.adamw = torch.optim.AdamW(self.parameters.values(), lr=lr, weight_decay=weight_decay)

    def clip(self) -> float:
        """Scales gradients down to `max_grad_norm` and returns their norm before that."""
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        return norm.item()

    def step(self, step: int) -> None:
        """Update number `step` (from 1); gradients are None afterwards."""
        for group in self.adamw.param_groups:
            group["lr"] = self.lr * min(1.0, step / max(1, self.warmup_steps))
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name, ready for safetensors."""
        return {
            f"{name}/{key}": value
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
            # The step count stays on the CPU, where AdamW keeps it.
            self.adamw.state[parameter] = {
                key: tensor if tensor.dim() == 0 else tensor.to(parameter.device)
                for key, tensor in moments.items()
            }
