"""The arithmetic of one REINFORCE step, as pure functions on (B, T) tensors of answer tokens.

    J(θ) = E_{y∼π_θ}[(1 − β) r(y|x) − β KL(π_θ ‖ π_anchor)]

    r_t  = (1 − β) r at the last token  −  β (log π − log π_anchor)_t      token_rewards
    Z_t  = Σ_{s ≥ t} r_s                γ = 1                              returns
    A_t  = stopgrad(Z_t − V_ψ(s_t))                                        advantages
    loss = −Σ_t A_t log π(a_t|s_t)      pk.policy_loss; A_t times a weight  importance_weights
    loss = Σ_t (Z_t − V_ψ(s_t))²                                           value_loss

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
    """log π − log π_anchor: unbiased for KL(π ‖ π_anchor) at tokens drawn from π; any sign."""
    return log_prob - ref_log_prob


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


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Σ (Z_t − V_t)² over answer tokens; a scalar, differentiable in `values`."""
    return (returns - values).masked_fill(~mask.bool(), 0.0).square().sum()


def masked_mean(x: Tensor, mask: Tensor) -> float:
    """Mean over the batch's True entries; 0 when there are none."""
    mask = mask.bool()
    count = distributed.total(mask.sum().item())
    return distributed.total(x.masked_fill(~mask, 0.0).sum().item()) / max(1, count)
