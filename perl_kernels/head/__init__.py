"""What a language-model head says about its rows, without ever writing the [N, V] logits.

Replaces, with z = softcap * tanh((hidden weight^T + bias) / softcap) / temperature, where an
adapter on the head adds scale * (hidden a^T) b^T to hidden weight^T,

    linear_log_prob   log_softmax(z.float(), -1).gather(-1, target), and the entropy of softmax(z)
    linear_kl         kl_div between softmax(z) and the softmax of a reference's hidden states
    policy_loss       mean(-advantage * log_prob + kl_coef * kl), with its gradient; or the clipped
                      ratios of PPO, GRPO and RLOO in place of log_prob

One sweep over tiles of the vocabulary keeps a few float32 numbers a row (see `_softmax`): logits
tiles are never rounded to bfloat16 before the log-sum-exp. The gradient, for incoming per-row
gradients of log_prob, entropy and kl, is

    dz_j    = d_log_prob ([j = target] - p_j) - d_entropy p_j (log p_j + entropy)
              + d_kl p_j ((z - z_ref)_j - E_p[z - z_ref])
    dhidden = dz weight        dweight = dz^T hidden (only when weight requires grad)

and with an adapter, whose logits are [hidden | s] [weight | b]^T with s = scale * hidden a^T,

    ds = dz b        dhidden = dz weight + scale * ds a
    db = dz^T s      da = scale * ds^T hidden

No [V, H] sum of weight and adapter exists either. The reference's logits z_ref are made without the
adapter, by the frozen head alone: a reference policy is the base model with its adapters off.

Over a head in which nothing trains the forward sweep makes d log p / d hidden, and linear_kl (by
the compiled CPU kernels, and by blocks on a GPU) d KL / d hidden too, from

    E_p[weight]    and    E_p[(z - z_ref) weight]

Each is saved, the size of hidden, and backward is a factor per row. With a trained head or adapter,
for KL elsewhere, and for a gradient through the entropy, saved are hidden and four numbers a row
(the largest logit, log of the sum, entropy, and with a reference E_p[z - z_ref]), and the sweep is
repeated in backward. policy_loss knows its coefficients before the loss, makes the gradients in the
forward call and saves only those. db needs p itself, once the sums are known, for every class: so
training an adapter costs policy_loss a second sweep too, but by blocks, which hold whole rows.

In products of (N, H) and (V, H), forward and backward together: log p 2, or 3 where head or adapter
train (4 where the weight does); with KL 4 by the compiled kernels over what is frozen, else 5. By
blocks policy_loss takes 2, and 3 with KL, unless the weight trains or a ratio has to come first.

Rows whose target is ignore_index give 0 everywhere and no gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._arguments import (
    autocast,
    check_adapter,
    check_alike,
    check_constant,
    check_float,
    check_range,
    check_shape,
)
from .._softmax import statistics_dtype, transform
from . import op as _op

__all__ = [
    "LinearKL",
    "PolicyLoss",
    "linear_kl",
    "linear_log_prob",
    "linear_logits",
    "policy_loss",
]


class LinearKL(NamedTuple):
    """What linear_kl returns, each (...,) float32."""

    kl: Tensor
    log_prob: Tensor | None  # None without target
    ref_log_prob: Tensor | None  # None without target; has no gradient
    entropy: Tensor


class PolicyLoss(NamedTuple):
    """What policy_loss returns: the scalar to call backward on, and per-token facts to log."""

    loss: Tensor  # () float32
    log_prob: Tensor  # (...,) float32, no gradient
    kl: Tensor | None  # (...,) float32, no gradient; None without ref_hidden
    entropy: Tensor  # (...,) float32, no gradient


def linear_log_prob(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (...,)
    *,
    bias: Tensor | None = None,  # (V,)
    a: Tensor | None = None,  # (R, H)
    b: Tensor | None = None,  # (V, R)
    scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[target] of each row, in nats.

    Args:
        hidden: (..., H) float32, bfloat16, float16, or float64 (which runs on the reference).
        weight: (V, H) in hidden's dtype. Its gradient is computed only when it requires one.
        target: (...,) int64 classes in [0, V), or ignore_index. Checked on CPU; on a GPU a class
            out of range is undefined, since checking would wait for the device.
        bias: (V,). temperature: > 0, the inverse of a model's logit scale. softcap: > 0 or None, as
            in Gemma 2's final logits.
        a, b: (R, H) and (V, R), an lm_head adapter in hidden's dtype or float32, over a frozen
            weight; gradients come in their own dtype. scale: alpha / R, or alpha / sqrt(R).
        return_entropy: also return the entropy of softmax(z), in nats.

    Returns:
        (...,) float32 (float64 for float64), or the pair (log_prob, entropy). Against float64 on
        the same inputs, float32, bfloat16 or float16, each is within

            2^-20 max(1, |hidden| max_j |weight_j| + max_j |bias_j|) / min(1, temperature)

        nats, with the 2-norms of rows; not where torch multiplies float32 as TF32.

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; weight requires grad beside
            an adapter.
    """
    hidden, weight, bias, _, flat_target, lead = _flatten(
        hidden, weight, bias, None, target, a, b, scale, temperature, softcap
    )
    inputs = (hidden, weight, bias, a, b, flat_target, None)
    log_prob, _, _, entropy, *_ = _stats(inputs, scale, temperature, softcap or 0.0, ignore_index)
    if return_entropy:
        return log_prob.view(lead), entropy.view(lead)
    return log_prob.view(lead)


def linear_kl(
    hidden: Tensor,  # (..., H)
    ref_hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    target: Tensor | None = None,  # (...,)
    *,
    bias: Tensor | None = None,  # (V,)
    a: Tensor | None = None,  # (R, H)
    b: Tensor | None = None,  # (V, R)
    scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> LinearKL:
    """Exact KL(softmax(z) || softmax(z_ref)) of each row over the whole vocabulary, in nats.

    Both share the frozen head: z from hidden, with the adapter a, b if there is one, and z_ref from
    ref_hidden without it. Gradients go to hidden, a and b only. Arguments as in linear_log_prob;
    without target every row counts and log_prob is None.

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; ref_hidden, weight or bias
            requires grad (a head that both sides share has no one-sided gradient).
    """
    check_constant("ref_hidden", ref_hidden, "the reference is a constant here")
    check_constant("weight", weight, "linear_kl has no gradient for what both sides share")
    check_constant("bias", bias, "linear_kl has no gradient for what both sides share")
    hidden, weight, bias, ref_hidden, flat_target, lead = _flatten(
        hidden, weight, bias, ref_hidden, target, a, b, scale, temperature, softcap
    )
    inputs = (hidden, weight, bias, a, b, flat_target, ref_hidden)
    log_prob, _, _, entropy, ref_log_prob, _, kl, *_ = _stats(
        inputs, scale, temperature, softcap or 0.0, ignore_index
    )
    return LinearKL(
        kl=kl.view(lead),
        log_prob=None if target is None else log_prob.view(lead),
        ref_log_prob=None if target is None else ref_log_prob.view(lead),
        entropy=entropy.view(lead),
    )


def policy_loss(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (...,)
    advantage: Tensor,  # (...,)
    *,
    old_log_prob: Tensor | None = None,  # (...,)
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    importance_sampling_level: str = "token",
    ref_hidden: Tensor | None = None,  # (..., H)
    kl_coef: float = 0.0,
    mask: Tensor | None = None,  # (...,)
    bias: Tensor | None = None,  # (V,)
    a: Tensor | None = None,  # (R, H)
    b: Tensor | None = None,  # (V, R)
    scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> PolicyLoss:
    """The policy-gradient loss of sampled tokens, of the frozen reference's exact KL too:

        reduce(-advantage * log_prob                                 + kl_coef * kl)   REINFORCE
        reduce(-min(ratio * advantage, clip(ratio) * advantage)      + kl_coef * kl)   old_log_prob

    with ratio = exp(log_prob - old_log_prob) and clip to [1 - epsilon, 1 + epsilon_high]. What a
    log-probability's coefficient needs is known before the loss, so every gradient is made in this
    call; backward only multiplies it by the incoming scalar. kl is over the whole vocabulary.

    Args:
        hidden, weight, target, bias, a, b, scale, temperature, softcap, ignore_index: as in
            linear_log_prob. The last dimension of target is a sequence.
        advantage: (...,) a constant: return minus baseline, or a group's (GRPO, RLOO).
        old_log_prob: (...,) of the policy that sampled, a constant; without it REINFORCE, which is
            also the gradient of the others' first step (the ratio is 1 there).
        epsilon, epsilon_high: >= 0, how far a ratio pays below and above 1; epsilon_high is epsilon
            unless given. Without epsilon no ratio is clipped.
        importance_sampling_level: what has a ratio. "token" (PPO, GRPO); "sequence": the mean of a
            sequence's log-ratios (GSPO); "sequence_sum": their sum (RLOO).
        ref_hidden: (..., H) the reference policy's hidden states, a constant; needed for kl_coef.
            They go through the head without the adapter a, b.
        mask: (...,) bool or integer, nonzero where a token counts; the others give 0 everywhere.
        reduction: "mean" over the tokens that count, "sum", or "grpo": the mean over each
            sequence's tokens, then over sequences.

    TRL calls a reduction loss_type: its "bnpo" is "mean", its "grpo" is "grpo", and its "dr_grpo"
    and "dapo" are "sum" over their constants. RLOO is "sequence_sum" with "grpo".

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; advantage, old_log_prob or
            ref_hidden requires grad; kl_coef without ref_hidden; ref_hidden with a trainable
            weight; epsilon or a level of sequences without old_log_prob.

    Sources: Williams, "Simple statistical gradient-following algorithms", 1992; with the KL term
    as in PE-RLHF (arXiv 2403.10704). Clipped ratios: PPO (1707.06347), equation 7; GRPO
    (2402.03300), equation 3; RLOO (2402.14740); GSPO (2507.18071); epsilon_high: DAPO (2503.14476).
    """
    for name, given, wanted in (
        ("reduction", reduction, ("mean", "sum", "grpo")),
        ("importance_sampling_level", importance_sampling_level, _LEVELS),
    ):
        if given not in wanted:
            raise ValueError(f"{name} is {given!r}; wanted {', '.join(map(repr, wanted))}")
    lowest, highest = _clip(old_log_prob, epsilon, epsilon_high, importance_sampling_level)
    if kl_coef != 0.0 and ref_hidden is None:
        raise ValueError(f"kl_coef is {kl_coef} and there is no ref_hidden to measure the KL from")
    check_constant("old_log_prob", old_log_prob, "policy_loss takes it as a constant")
    check_constant("advantage", advantage, "policy_loss takes it as a constant")
    if ref_hidden is not None:
        check_constant("ref_hidden", ref_hidden, "the reference is a constant here")
        check_constant("weight", weight, "policy_loss has no gradient for what both sides share")
        check_constant("bias", bias, "policy_loss has no gradient for what both sides share")
    check_shape("advantage", advantage, tuple(target.shape), "target's shape")
    if old_log_prob is not None:
        check_float("old_log_prob", old_log_prob)
        check_shape("old_log_prob", old_log_prob, tuple(target.shape), "target's shape")
    if mask is not None:
        check_shape("mask", mask, tuple(target.shape), "target's shape")
        if mask.is_floating_point():
            raise TypeError(f"mask is {mask.dtype}; wanted bool or integer (weigh the advantage)")
        target = target.where(mask.bool(), ignore_index)
    hidden, weight, bias, ref_hidden, flat_target, lead = _flatten(
        hidden, weight, bias, ref_hidden, target, a, b, scale, temperature, softcap
    )
    needs = [
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        for tensors in ([hidden], [weight], [bias], [a, b])
    ]
    advantage, old_log_prob = (
        t if t is None else t.reshape(-1).to(statistics_dtype(hidden.dtype))
        for t in (advantage, old_log_prob)
    )
    loss, log_prob, kl, entropy, *_ = torch.ops.perl_kernels.policy_loss(
        hidden, weight, bias, a, b, flat_target, advantage, old_log_prob, ref_hidden,
        float(kl_coef), lowest, highest, importance_sampling_level, reduction,
        max(lead[-1], 1) if lead else 1, scale, temperature, softcap or 0.0, ignore_index, *needs,
    )  # fmt: skip
    return PolicyLoss(
        loss=loss,
        log_prob=log_prob.view(lead),
        kl=None if ref_hidden is None else kl.view(lead),
        entropy=entropy.view(lead),
    )


def linear_logits(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    *,
    bias: Tensor | None = None,  # (V,)
    a: Tensor | None = None,  # (R, H)
    b: Tensor | None = None,  # (V, R)
    scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # (..., V)
    """z itself, for as few rows as may have all their logits: the newest tokens of a decode step.

    The arguments are those of `linear_log_prob`. Products are summed and kept in float32, and a
    16-bit weight is read as it lies. There is no gradient.

    Returns:
        (..., V) float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; a tensor requires grad
            while gradients are on.
    """
    named = {"hidden": hidden, "weight": weight, "bias": bias, "a": a, "b": b}
    for name, tensor in named.items():
        check_constant(name, tensor, "linear_logits has no gradient")
    hidden, weight, bias, _, _, lead = _flatten(
        hidden, weight, bias, None, None, a, b, scale, temperature, softcap
    )
    z = torch.ops.perl_kernels.head_logits(hidden, weight)
    if a is not None:
        s = hidden.to(z.dtype) @ a.to(z.dtype).T
        z.addmm_(s, b.to(z.dtype).T, alpha=scale)
    if bias is not None:
        z += bias
    return transform(z, temperature, softcap or 0.0).view(*lead, -1)


_LEVELS = ("token", "sequence", "sequence_sum")


def _clip(
    old_log_prob: Tensor | None, epsilon: float | None, epsilon_high: float | None, level: str
) -> tuple[float, float]:
    """Between which ratios a gain grows; refuses what would say nothing."""
    for name, given in (("epsilon", epsilon), ("epsilon_high", epsilon_high)):
        if given is not None:
            check_range(name, given, 0.0, float("inf"), ">= 0")
            if old_log_prob is None:
                raise ValueError(f"{name} is {given} and there is no old_log_prob to have a ratio")
    if old_log_prob is None and level != "token":
        raise ValueError(
            f"importance_sampling_level is {level!r} and there is no old_log_prob to have a ratio"
        )
    if epsilon is None:
        if epsilon_high is not None:
            raise ValueError(f"epsilon_high is {epsilon_high} without epsilon; give both")
        return -math.inf, math.inf
    return 1.0 - epsilon, 1.0 + (epsilon if epsilon_high is None else epsilon_high)


def _stats(inputs: tuple[Tensor | None, ...], *options: float) -> tuple[Tensor, ...]:
    """The statistics of a row, by the op whose backward costs least."""
    hidden, *of_head = inputs[:5]
    learns = torch.is_grad_enabled() and hidden.requires_grad
    trained = any(t is not None and t.requires_grad for t in of_head)
    if learns and not trained and (inputs[6] is None or _op.one_sweep(hidden)):
        return torch.ops.perl_kernels.head_units(*inputs, None, None, *options)
    return torch.ops.perl_kernels.head_stats(*inputs, *options)


def _flatten(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    target: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, torch.Size]:
    """Check what the three faces share, and flatten rows to (N, H)."""
    check_float("hidden", hidden)
    check_float("weight", weight)
    hidden, weight, bias, ref_hidden = autocast(hidden, weight, bias, ref_hidden)
    if weight.ndim != 2:
        raise ValueError(f"weight has {weight.ndim} dimensions; wanted (V, H)")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has {hidden.shape[-1] if hidden.ndim else 0} features; "
            f"wanted {weight.shape[1]}, as weight (V, H) has"
        )
    check_alike("weight", weight, "hidden", hidden)
    if weight.shape[0] == 0:
        raise ValueError("weight has 0 rows; wanted a vocabulary of at least 1")
    lead = hidden.shape[:-1]
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "(V,)")
        check_alike("bias", bias, "hidden", hidden)
        bias = bias.contiguous()
    _check_adapter(hidden, weight, a, b, scale)
    if ref_hidden is not None:
        check_shape("ref_hidden", ref_hidden, tuple(hidden.shape), "hidden's shape")
        check_alike("ref_hidden", ref_hidden, "hidden", hidden)
        ref_hidden = ref_hidden.reshape(-1, hidden.shape[-1])
    if target is not None:
        if target.dtype != torch.int64:
            raise TypeError(f"target is {target.dtype}; wanted torch.int64")
        check_shape("target", target, tuple(lead), "hidden's leading shape")
        target = target.reshape(-1).contiguous()
    check_range("temperature", temperature, torch.finfo(torch.float32).tiny, float("inf"), "> 0")
    if softcap is not None:
        check_range("softcap", softcap, torch.finfo(torch.float32).tiny, float("inf"), "> 0")
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias, ref_hidden, target, lead


def _check_adapter(
    hidden: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float
) -> None:
    if (a is None) != (b is None):
        given, missing = ("b", "a") if a is None else ("a", "b")
        raise ValueError(f"{given} is given without {missing}; an lm_head adapter wants both")
    if a is not None:
        check_constant("weight", weight, "the base of an adapter is frozen")
        check_adapter(a, b, weight, "hidden", hidden, "VH")
    elif scale != 1.0:
        raise ValueError(f"scale is {scale} and there is no adapter a, b to multiply")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; wanted a finite number")
