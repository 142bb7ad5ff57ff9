"""What a REINFORCE step asks of the backbone: the KL to the anchor, and both losses' gradients.

    answers ─ ask_anchor ─► Anchor ─ estimate_kl ─► KL_t ─ reward_returns ─► Z_t ─ learn ─► .grad
                              └──────────── the KL in the loss ────────────────────┘

`rollout` holds a process's answers, (B, T) with their prompts; everything runs by micro-batches of
its rows. No [tokens × vocabulary] matrix is made: the LM head is a weight in `pk.policy_loss` and
its kin. `perl/train_policy.py` says which of the ways here is for what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import perl_kernels as pk
from perl import distributed, reinforce
from perl.backbone import Backbone, Head
from perl.config import ReinforceConfig
from perl.rollout import Rollout
from perl.training import micro_batches

SAMPLED = {"k1": reinforce.k1, "k3": reinforce.k3}  # estimators of the KL from the drawn token


class Anchor(NamedTuple):
    """What the reference says of a step's answers: as much as the estimator of the KL needs."""

    log_prob: Tensor | None = None  # (B, T) float32, for k1 and k3
    hidden: Callable[[slice], Tensor] | None = None  # rows -> (rows, T, H), for the exact KL


@torch.no_grad()
def anchor_log_prob(
    config: ReinforceConfig, backbone: Backbone, rollout: Rollout
) -> Tensor:  # (B, T) float32
    """log π_anchor of the answers' tokens; 0 past an answer's end."""
    head, ids = backbone.head(), rollout.completion_ids.where(rollout.completion_mask, -100)
    log_prob = [
        pk.linear_log_prob(
            answer_states(backbone, None, rollout, rows),
            head.weight,
            ids[rows],
            temperature=config.temperature,
            **head.options,
        )
        for rows in micro_batches(config.micro_batch_size, len(ids))
    ]
    return torch.cat(log_prob)


def ask_anchor(config: ReinforceConfig, backbone: Backbone, rollout: Rollout) -> Anchor:
    if config.kl_estimator != "exact":
        return Anchor(log_prob=anchor_log_prob(config, backbone, rollout))

    @torch.no_grad()
    def hidden(rows: slice) -> Tensor:
        return answer_states(backbone, None, rollout, rows)

    if config.kl_in == "loss" and not config.several_updates:
        return Anchor(hidden=hidden)  # `learn` asks once for each row, and holds none
    rows_of = micro_batches(config.micro_batch_size, len(rollout.sequences))
    return Anchor(hidden=torch.cat([hidden(rows) for rows in rows_of]).__getitem__)


@torch.no_grad()
def estimate_kl(
    config: ReinforceConfig, backbone: Backbone, rollout: Rollout, anchor: Anchor
) -> Tensor:  # (B, T) float32
    """KL(π ‖ π_anchor) of the answers' tokens by `--kl-estimator`; 0 past an answer's end."""
    if config.kl_estimator != "exact":
        return SAMPLED[config.kl_estimator](rollout.log_prob, anchor.log_prob)
    head, ids = backbone.head("policy"), rollout.completion_ids.where(rollout.completion_mask, -100)
    kl = [
        pk.linear_kl(
            answer_states(backbone, "policy", rollout, rows),
            anchor.hidden(rows),
            head.weight,
            ids[rows],
            temperature=config.temperature,
            **head.options,
        ).kl
        for rows in micro_batches(config.micro_batch_size, len(ids))
    ]
    return torch.cat(kl)


def reward_returns(
    config: ReinforceConfig, scores: Tensor, kl: Tensor, rollout: Rollout, beta: float
) -> Tensor:  # (B, T)
    """Z_t: (1 − β) r, less β times the KL still to come where KL is part of the reward."""
    mask = rollout.completion_mask
    scores = reinforce.penalized(
        scores,
        mask,
        rollout.ended,
        length_penalty=config.length_penalty,
        no_end_penalty=config.no_end_penalty,
    )
    if config.kl_per == "sequence":
        kl = reinforce.at_last_token(kl, mask)
    rewards = reinforce.token_rewards(
        scores,
        kl,
        mask,
        reward_coef=1.0 if config.kl_convention == "trl" else 1.0 - beta,
        kl_coef=beta if config.kl_in == "reward" else 0.0,
    )
    return reinforce.returns(rewards, mask)


# -----------------------------------------------------------------------------------------------
# Learn


def learn(
    config: ReinforceConfig,
    backbone: Backbone,
    rollout: Rollout,
    returns: Tensor,  # (B, T)
    anchor: Anchor,
    beta: float,
) -> Iterator[dict[str, float]]:
    """For each update of a step leaves the gradients of both losses in `.grad`, and yields facts.

    The caller updates before it asks for the next. The value goes first: its predictions before
    the first update are the policy's baseline.
    """
    rows, mask = len(returns), rollout.completion_mask
    parts = micro_batches(rows // config.minibatches, rows) * config.epochs_per_batch
    several, by_value = config.several_updates, config.baseline == "value"
    baseline: Tensor | float = 0.0
    if by_value and several:
        baseline = predict_values(config, backbone, rollout)
    elif config.baseline == "batch_mean":
        baseline = reinforce.masked_mean(returns, mask)
    elif config.baseline == "leave_one_out":
        baseline = other_answers(config, returns)
    for update, part in enumerate(parts):
        facts: dict[str, float] = {}
        if by_value:
            predictions, facts["value_loss"] = learn_value(config, backbone, rollout, returns, part)
            if not several:  # the pass that learns has predicted too
                baseline = predictions
        advantage = reinforce.advantages(returns, baseline, mask, whiten=config.whiten_advantages)
        log_prob, of_policy = learn_policy(config, backbone, rollout, advantage, anchor, beta, part)
        facts |= of_policy
        sampled = rollout.log_prob[part]
        if update == 0:  # later ones differ by what was learnt
            facts |= reinforce.mismatch(log_prob, sampled, mask[part])
        if several:
            facts |= reinforce.ratio_figures(
                log_prob, sampled, advantage[part], mask[part], config.clip_epsilon
            )
        yield facts


@torch.no_grad()
def predict_values(
    config: ReinforceConfig, backbone: Backbone, rollout: Rollout
) -> Tensor:  # (B, T)
    rows_of = micro_batches(config.micro_batch_size, len(rollout.sequences))
    return torch.cat([answer_values(backbone, rollout, rows) for rows in rows_of])


def other_answers(config: ReinforceConfig, returns: Tensor) -> Tensor:  # (B, T) -> (B, 1)
    """The mean return of the other answers to the same prompt, whichever process has them."""
    totals = distributed.gathered(returns[:, 0].tolist(), len(returns) * distributed.size())
    means = reinforce.leave_one_out(torch.tensor(totals), config.answers_per_prompt)
    return torch.stack(distributed.share(means)).to(returns)[:, None]


def learn_value(
    config: ReinforceConfig, backbone: Backbone, rollout: Rollout, returns: Tensor, part: slice
) -> tuple[Tensor, float]:  # predictions (rows, T) and the loss
    """Gradients of the value loss over a part of the answers.

    Losses here and of the policy are sums over rows divided by the part's tokens, so they are the
    same however rows are split.
    """
    mask, predictions, total = rollout.completion_mask, [], 0.0
    tokens = distributed.total(mask[part].sum().item())
    for rows in micro_batches(config.micro_batch_size, part.stop, part.start):
        values = answer_values(backbone, rollout, rows)
        loss = reinforce.value_loss(values, returns[rows], mask[rows]) / tokens
        loss.backward()
        predictions.append(values.detach())
        total += loss.item()
    return torch.cat(predictions), distributed.total(total)


def learn_policy(
    config: ReinforceConfig,
    backbone: Backbone,
    rollout: Rollout,
    advantage: Tensor,  # (B, T)
    anchor: Anchor,
    beta: float,
    part: slice,
) -> tuple[Tensor, dict[str, float]]:  # log π (rows, T) and facts
    """Gradients of the policy loss over a part of the answers."""
    ids, mask = rollout.completion_ids, rollout.completion_mask
    tokens = distributed.total(mask[part].sum().item())
    head = backbone.head("policy")
    exact, in_loss = anchor.hidden is not None, config.kl_in == "loss"
    log_prob, entropy, kl, total = [], [], [], 0.0
    for rows in micro_batches(config.micro_batch_size, part.stop, part.start):
        ref_hidden = anchor.hidden(rows) if exact else None
        hidden, weighed = answer_states(backbone, "policy", rollout, rows), advantage[rows]
        if config.importance_cap is not None:
            weighed = weighed * importance_weights(config, head, hidden.detach(), rollout, rows)
        out = pk.policy_loss(
            hidden,
            head.weight,
            ids[rows],
            weighed,
            old_log_prob=rollout.log_prob[rows] if config.several_updates else None,
            epsilon=config.clip_epsilon,
            ref_hidden=ref_hidden,
            kl_coef=beta if exact else 0.0,
            mask=mask[rows],
            temperature=config.temperature,
            reduction="sum",
            **head.options,
        )
        terms = further_terms(config, head, hidden, rollout, anchor, beta, rows)
        loss = sum(terms, out.loss) / tokens
        loss.backward()
        total += loss.item()
        log_prob.append(out.log_prob)
        entropy.append(out.entropy)
        if in_loss:
            per_token = out.kl if exact else reinforce.k3(out.log_prob, anchor.log_prob[rows])
            kl.append(per_token.sum(1))
    facts = {"kl": distributed.mean(torch.cat(kl).mean().item())} if in_loss else {}
    return torch.cat(log_prob), facts | {
        "loss": distributed.total(total),
        "entropy": reinforce.masked_mean(torch.cat(entropy), mask[part]),
    }


def further_terms(
    config: ReinforceConfig,
    head: Head,
    hidden: Tensor,  # (rows, T, H)
    rollout: Rollout,
    anchor: Anchor,
    beta: float,
    rows: slice,
) -> list[Tensor]:  # scalars
    """Of the policy's loss what needs a gradient that `pk.policy_loss` has not: entropy and k3."""
    by_k3 = config.kl_in == "loss" and config.kl_estimator == "k3"
    if not (config.entropy_coef or by_k3):
        return []
    ids = rollout.completion_ids.where(rollout.completion_mask, -100)[rows]
    log_prob, entropy = pk.linear_log_prob(
        hidden,
        head.weight,
        ids,
        temperature=config.temperature,
        return_entropy=True,
        **head.options,
    )
    terms = []
    if config.entropy_coef:
        terms.append(-config.entropy_coef * entropy.sum())
    if by_k3:
        terms.append(beta * reinforce.k3(log_prob, anchor.log_prob[rows]).sum())
    return terms


@torch.no_grad()
def importance_weights(
    config: ReinforceConfig,
    head: Head,
    hidden: Tensor,  # (rows, T, H)
    rollout: Rollout,
    rows: slice,
) -> Tensor:  # (rows, T)
    """The answers' tokens weighed by how likely the policy that learns finds them."""
    ids, mask = rollout.completion_ids[rows], rollout.completion_mask[rows]
    log_prob = pk.linear_log_prob(
        hidden, head.weight, ids, temperature=config.temperature, **head.options
    )
    cap = config.importance_cap
    return reinforce.importance_weights(log_prob, rollout.log_prob[rows], mask, cap)


def answer_states(
    backbone: Backbone, role: str | None, rollout: Rollout, rows: slice
) -> Tensor:  # (B, T, H)
    """The hidden states that predict the answers' tokens: one position before each."""
    return backbone.hidden(role, *inputs(rollout, rows))[:, rollout.prompt_len - 1 :]


def answer_values(backbone: Backbone, rollout: Rollout, rows: slice) -> Tensor:  # (B, T)
    """V of the states that the answers' tokens were drawn in."""
    return backbone.values("value", *inputs(rollout, rows))[:, rollout.prompt_len - 1 :]


def inputs(rollout: Rollout, rows: slice) -> tuple[Tensor, Tensor]:
    """Ids and mask of a forward pass; the last token predicts nothing."""
    return rollout.sequences[rows, :-1], rollout.attention_mask[rows, :-1]
