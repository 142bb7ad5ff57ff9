"""The arithmetic of one REINFORCE step, as pure functions on (B, T) tensors of answer tokens.

    J(θ) = E_{y∼π_θ}[(1 − β) r(y|x) − β KL(π_θ ‖ π_anchor)]

    r    = score − length and no-end penalties                             penalized
    r_t  = (1 − β) r at the last token  −  β KL_t                          token_rewards; k1, k3
    Z_t  = Σ_{s ≥ t} r_s                γ = 1                              returns
    A_t  = stopgrad(Z_t − V_ψ(s_t))     or another baseline                advantages; leave_one_out
    loss = −Σ_t A_t log π(a_t|s_t)      pk.policy_loss; A_t times a weight  importance_weights
           or clipped ratios for it     pk.policy_loss; what they say       ratio_figures
    loss = Σ_t (Z_t − V_ψ(s_t))²                                           value_loss
    β    ← β (1 + e / horizon)          e: how far the KL is off a target  adapted

`mask` (B, T) is True at answer tokens, the end-of-sequence token included; what stands elsewhere
in the inputs is not read, and the outputs are 0 there. Means over a batch are over all of it, where
several processes have rows of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perl import distributed


def last_token(mask: Tensor) -> Tensor:  # (B, T) -> (B, T) bool
    """True at the last token of each answer, and nowhere in an empty one."""
    mask = mask.bool()
    after = torch.nn.functional.pad(mask[:, 1:], (0, 1), value=False)
    return mask & ~after


def k1(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """log π − log π_anchor: unbiased for KL(π ‖ π_anchor) at tokens drawn from π; any sign.

    As a reward its gradient is unbiased too. As a loss it has none on average: E_π[∇ log π] = 0.
    """
    return log_prob - ref_log_prob


def k3(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """π_anchor / π − 1 − log(π_anchor / π): unbiased as k1 is, and never negative.

    Differentiated as a loss it is on average ∇ KL(π_anchor ‖ π), the KL the other way round: the
    same minimum, and to second order the same way there (Schulman, "Approximating KL Divergence",
    2020; GRPO, arXiv 2402.03300). As a reward it lacks its own derivative: a token is told
    ∇ KL(π ‖ π_anchor) − ∇ KL(π_anchor ‖ π) of its own state, little near the anchor.
    """
    log_ratio = ref_log_prob - log_prob
    return log_ratio.expm1() - log_ratio


def at_last_token(x: Tensor, mask: Tensor) -> Tensor:  # (B, T) -> (B, T)
    """The sum over each answer's tokens, at its last token; 0 at the others."""
    total = x.masked_fill(~mask.bool(), 0.0).sum(1, keepdim=True)
    return total * last_token(mask)


def penalized(
    scores: Tensor,  # (B,)
    mask: Tensor,  # (B, T)
    ended: Tensor,  # (B,) bool
    *,
    length_penalty: float,
    no_end_penalty: float,
) -> Tensor:  # (B,)
    """Scores less `length_penalty` for each token, and `no_end_penalty` where no end came."""
    return scores - length_penalty * mask.sum(1) - no_end_penalty * ~ended


def token_rewards(
    scores: Tensor,  # (B,)
    kl: Tensor,  # (B, T) per-token KL estimates
    mask: Tensor,  # (B, T)
    *,
    reward_coef: float,
    kl_coef: float,
) -> Tensor:  # (B, T)
    """−kl_coef · kl at every token, and reward_coef · score more at the last one.

    The coefficients are (1 − β, β) in the paper's convention and (1, β) in TRL's.
    """
    rewards = reward_coef * scores[:, None] * last_token(mask) - kl_coef * kl
    return rewards.masked_fill(~mask.bool(), 0.0)


def returns(rewards: Tensor, mask: Tensor) -> Tensor:  # (B, T)
    """Z_t = Σ_{s ≥ t} r_s, undiscounted: what is still to come from token t on."""
    rewards = rewards.masked_fill(~mask.bool(), 0.0)
    return rewards.flip(1).cumsum(1).flip(1).masked_fill(~mask.bool(), 0.0)


def leave_one_out(totals: Tensor, answers: int) -> Tensor:  # (B,) -> (B,)
    """The mean of the other answers to the same prompt (RLOO, arXiv 2402.14740).

    totals: of each answer; those to prompt p of P are p, P + p, 2 P + p, ... `answers` of them.
    """
    groups = totals.view(answers, -1)
    return ((groups.sum(0) - groups) / (answers - 1)).flatten()


def advantages(
    returns: Tensor,  # (B, T)
    baseline: Tensor | float,  # (B, T) or a number
    mask: Tensor,
    whiten: bool = False,
) -> Tensor:  # (B, T), no gradient
    """Z_t − baseline; `whiten` brings them to mean 0 and variance 1 over the batch's tokens."""
    advantage = (returns - baseline).detach().masked_fill(~mask.bool(), 0.0)
    if not whiten:
        return advantage
    mean = masked_mean(advantage, mask)
    scale = masked_mean((advantage - mean).square(), mask) ** 0.5 + 1e-8
    return ((advantage - mean) / scale).masked_fill(~mask.bool(), 0.0)


def importance_weights(
    log_prob: Tensor,  # (B, T) of the policy that learns
    sampled_log_prob: Tensor,  # (B, T) what sampling computed
    mask: Tensor,
    cap: float,
) -> Tensor:  # (B, T), no gradient
    """min(π / π_sampled, cap) at each token: importance sampling with truncated weights.

    Sampling and learning round differently, so tokens come from a policy that is not quite π. The
    weight takes the bias out of the gradient, and the cap its variance, where the two are far
    apart (Ionides, "Truncated Importance Sampling", 2008; TRL's vllm_importance_sampling_cap).
    """
    log_ratio = (log_prob - sampled_log_prob).detach().masked_fill(~mask.bool(), 0.0)
    return log_ratio.exp().clamp(max=cap).masked_fill(~mask.bool(), 0.0)


def mismatch(log_prob: Tensor, sampled_log_prob: Tensor, mask: Tensor) -> dict[str, float]:
    """Mean and largest |Δ log π| between learning and sampling over the answers' tokens."""
    gap = (log_prob - sampled_log_prob).abs().masked_fill(~mask.bool(), 0.0)
    largest = max(distributed.each(gap.max().item()))
    return {"mean_abs_dlogp": masked_mean(gap, mask), "max_abs_dlogp": largest}


def ratio_figures(
    log_prob: Tensor,  # (B, T) of the policy that learns
    sampled_log_prob: Tensor,  # (B, T) what sampling computed
    advantage: Tensor,  # (B, T)
    mask: Tensor,
    epsilon: float,
) -> dict[str, float]:
    """How far the ratios π / π_sampled went.

    clip_fraction: of the tokens, those that the clip leaves without a gradient. approx_kl: of
    π_sampled to π in nats a token, by k3 with the roles exchanged.
    """
    ratio = (log_prob - sampled_log_prob).exp()
    held = torch.where(advantage > 0, ratio > 1 + epsilon, (ratio < 1 - epsilon) & (advantage < 0))
    return {
        "clip_fraction": masked_mean(held.to(ratio.dtype), mask),
        "approx_kl": masked_mean(k3(sampled_log_prob, log_prob), mask),
    }


def adapted(beta: float, kl: float, target: float, horizon: int) -> float:
    """The next step's β, at most 1: larger where the KL is above its target, else smaller.

    β (1 + e / horizon) with e = KL / target − 1, held to ±0.2 (Ziegler et al., arXiv 1909.08593,
    section 2.2, whose K_β of 0.1 is a horizon of 10 steps).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return min(1.0, beta * (1 + error / horizon))


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Σ (Z_t − V_t)² over answer tokens; a scalar, differentiable in `values`."""
    return (returns - values).masked_fill(~mask.bool(), 0.0).square().sum()


def over_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the updates that have it."""
    found: dict[str, list[float]] = {}
    for name, value in (item for figures in updates for item in figures.items()):
        found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def masked_mean(x: Tensor, mask: Tensor) -> float:
    """Mean over the batch's True entries; 0 when there are none."""
    mask = mask.bool()
    count = distributed.total(mask.sum().item())
    return distributed.total(x.masked_fill(~mask, 0.0).sum().item()) / max(1, count)
