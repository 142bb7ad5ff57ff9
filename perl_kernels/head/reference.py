"""The definitions of the head's three faces in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None = None,  # (V,)
    a: Tensor | None = None,  # (R, H)
    b: Tensor | None = None,  # (V, R)
    scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # (N, V)
    logits = F.linear(hidden, weight, bias)
    if a is not None:
        logits = logits + scale * F.linear(F.linear(hidden, a.to(hidden.dtype)), b.to(hidden.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, dim=-1)


def linear_log_prob(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:  # log_prob (N,), entropy (N,)
    log_p = log_probs(hidden, weight, bias, a, b, scale, temperature, softcap)
    counted = target != ignore_index
    log_prob = log_p.gather(1, target.where(counted, 0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_prob.where(counted, 0.0), entropy.where(counted, 0.0)


def linear_kl(
    hidden: Tensor,  # (N, H)
    ref_hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    *,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # (N,) KL(p || q), with q of the frozen head alone
    log_p = log_probs(hidden, weight, bias, a, b, scale, temperature, softcap)
    log_q = log_probs(ref_hidden, weight, bias, temperature=temperature, softcap=softcap)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def policy_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (N,)
    advantage: Tensor,  # (N,)
    *,
    ref_hidden: Tensor | None = None,
    kl_coef: float = 0.0,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:  # ()
    counted = target != ignore_index
    log_prob, _ = linear_log_prob(
        hidden, weight, target, bias=bias, a=a, b=b, scale=scale, temperature=temperature,
        softcap=softcap, ignore_index=ignore_index,
    )  # fmt: skip
    loss = -advantage * log_prob
    if ref_hidden is not None:
        kl = linear_kl(
            hidden, ref_hidden, weight, bias=bias, a=a, b=b, scale=scale, temperature=temperature,
            softcap=softcap,
        )  # fmt: skip
        loss = loss + kl_coef * kl
    total = loss.where(counted, 0.0).sum()
    return total / counted.sum().clamp(min=1) if reduction == "mean" else total
