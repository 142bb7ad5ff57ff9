"""The definitions of log_prob and kl in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def log_probs(logits: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, dim=-1)


def log_prob(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:  # log_prob (N,), entropy (N,)
    log_p = log_probs(logits, temperature, softcap)
    counted = target != ignore_index
    picked = log_p.gather(1, target.where(counted, 0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return picked.where(counted, 0.0), entropy.where(counted, 0.0)


def kl(
    logits: Tensor,  # (N, V)
    ref_logits: Tensor,  # (N, V)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # (N,)
    log_p = log_probs(logits, temperature, softcap)
    return (log_p.exp() * (log_p - log_probs(ref_logits, temperature, softcap))).sum(-1)
