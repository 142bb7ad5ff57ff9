"""The definitions of the head's faces in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_logits(
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
    return logits / temperature


def log_probs(*arguments: Tensor | float | None, **options: float | None) -> Tensor:  # (N, V)
    return torch.log_softmax(linear_logits(*arguments, **options), dim=-1)


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
    hidden: Tensor,  # (..., T, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (..., T)
    advantage: Tensor,  # (..., T)
    *,
    old_log_prob: Tensor | None = None,  # (..., T)
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    importance_sampling_level: str = "token",
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
    tokens = counted.sum(-1, keepdim=True).clamp(min=1)
    rows, adapter = hidden.reshape(-1, hidden.shape[-1]), {"a": a, "b": b, "scale": scale}
    options = {"bias": bias, **adapter, "temperature": temperature, "softcap": softcap}
    log_prob, _ = linear_log_prob(
        rows, weight, target.reshape(-1), ignore_index=ignore_index, **options
    )
    log_prob = log_prob.view(target.shape)
    if old_log_prob is None:
        loss = -advantage * log_prob
    else:
        log_ratio = (log_prob - old_log_prob).where(counted, 0.0)
        if importance_sampling_level == "sequence":
            log_ratio = log_ratio.sum(-1, keepdim=True) / tokens
        elif importance_sampling_level == "sequence_sum":
            log_ratio = log_ratio.sum(-1, keepdim=True)
        ratio = clipped = torch.exp(log_ratio)
        if epsilon is not None:
            high = epsilon if epsilon_high is None else epsilon_high
            clipped = ratio.clamp(1.0 - epsilon, 1.0 + high)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if ref_hidden is not None:
        kl = linear_kl(rows, ref_hidden.reshape(rows.shape), weight, **options)
        loss = loss + kl_coef * kl.view(target.shape)
    loss = loss.where(counted, 0.0)
    if reduction == "grpo":
        return (loss.sum(-1, keepdim=True) / tokens).mean()
    return loss.sum() / counted.sum().clamp(min=1) if reduction == "mean" else loss.sum()
