"""REINFORCE with a value baseline and a KL anchor: `python -m perl reinforce`.

    J(θ) = E_{y∼π_θ}[(1 − β) r(y|x) − β KL(π_θ ‖ π_anchor)]        (arXiv 2403.10704, 2309.00267)

Every step: sample answers (rollout), reward them and measure the anchor's log-probabilities
(score), one gradient step for the value and one for the policy (learn). Policy, value, reward and
anchor are roles of one backbone: adapters, and adapters off. With `--tuning full` the same lines
run with four models in place of one.

Choices that the paper leaves open, each with its reason:
- KL enters as a reward of each token, −β (log π − log π_anchor), `--kl-in reward`: its gradient is
  unbiased for the sequence KL, future tokens included. `--kl-in loss` puts β times the exact KL
  over the vocabulary into the loss: less noise, but blind to how a token changes the states that
  follow. Both are the KL of the policies that are sampled, temperature included.
- log π in that reward is what sampling computed: the learning pass would give the same number up to
  rounding, and how far the two differ is logged (`mean_abs_dlogp`, `max_abs_dlogp`). Where that is
  more than rounding (low precision, LoRA dropout) `--importance-cap` weighs each token by the ratio
  of the two, truncated. It is off by default: another pass over the head, for a ratio that is 1 up
  to rounding otherwise.
- Losses are means over the answer tokens of the batch, so a step does not grow with the answers.
- alpha / R is 2 at the default rank, and the learning rate 10 × that of full tuning (1e-4, 1e-5).
- Advantages are not whitened by default: the baseline centres them, and the clipped AdamW step
  has a scale of its own. `--whiten-advantages` does it.
- The value head starts at zero, so the first baseline is 0 and not noise.
- The result is the last policy, not the best by reward: the reward is what a policy overfits.

Left out: clipping and several epochs per batch (PPO; the data are on-policy here, so the ratio is
1), GAE (γ = λ = 1 is the plain return), discounting (only the last token is rewarded), an adaptive
β, an entropy bonus, dropout of the base (the policy that learns is the one that was sampled).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import perl_kernels as pk
from perl import distributed, reinforce
from perl.backbone import Backbone, Head
from perl.config import ReinforceConfig
from perl.data import (
    Batches,
    Encoded,
    encode_prompts,
    file_and_weight,
    load_files,
    prompt_room,
    read_rows,
    want_kind,
)
from perl.ensemble import Rewards, joined
from perl.guards import Guards
from perl.memory import PeakMemory
from perl.reward_sources import (
    Prompt,
    Scorer,
    keeping,
    make_scorer,
    open_text_source,
    stopping,
)
from perl.rollout import Rollout, draw, generate
from perl.run import Run, derived_seed
from perl.training import (
    add_role,
    begin,
    bookmark,
    lora_config,
    make_optimizer,
    micro_batches,
    open_backbone,
    peak_memory,
    save,
    say_notes,
    shard,
)

SAMPLES = 4  # prompts answered into samples.jsonl, the same ones every time


def train(config: ReinforceConfig) -> dict[str, Any]:
    """Trains a policy into `config.out`/policy and returns the figures of the last step."""
    # ---- load: everything that can be refused is refused before the run folder exists
    run = Run.create(config.out, config)
    source = open_text_source(config, partial(first_prompt, config))
    backbone = open_backbone(config, tuning=config.tuning, lora=lora_config(config), reference=True)
    load = partial(load_prompts, config, backbone)
    encoded, validation = load_files(config.data, config.validation, load)
    prompts, held_out = with_text(encoded), with_text(validation or Encoded())
    score = make_scorer(config, backbone, source)
    checkpoint = run.latest_checkpoint() if config.resume else None
    add_role(backbone, "policy", checkpoint)
    if config.baseline == "value":
        add_role(backbone, "value", checkpoint, scalar=True)
        if checkpoint is None:
            nn.init.zeros_(dict(backbone.trainable("value"))["score.weight"])
    shard(config, backbone)
    optimizers = {"policy": make_optimizer(config, backbone, "policy", config.lr)}
    if config.baseline == "value":
        optimizers["value"] = make_optimizer(config, backbone, "value", config.value_lr)
    batches = Batches(prompts, config.prompts_per_step, config.seed, encoded.mixture)
    begin(config, checkpoint, optimizers, batches)
    guards = Guards(config, checkpoint and checkpoint.state.get("guards"))

    # ---- loop
    with run, PeakMemory(backbone.device) as peak, stopping(run):
        say_notes(run, encoded, validation)
        if run.step == 0:
            write_samples(run, 0, config, backbone, prompts, score)
            if held_out:
                run.log(0, **evaluate(config, backbone, held_out, score))
        for step in run.steps(config.steps, "reinforce"):
            clock, go_back = Clock(backbone.device), bookmark(batches)
            batch = next(batches)
            keep = partial(save, run, step - 1, backbone, optimizers, batches, **guards.state())

            with clock.phase("rollout"):
                rollout = sample(config, backbone, batch, derived_seed(config.seed, step))
            with clock.phase("score"):
                with keeping(run, step - 1, go_back, keep):
                    rewards = score(rollout, distributed.share(batch))
                kl = torch.zeros_like(rollout.log_prob)
                if config.kl_in == "reward":
                    kl = sampled_kl(config, backbone, rollout)
                returns = reward_returns(config, rewards.reward, kl, rollout)
            with clock.phase("learn"):
                facts = learn(config, backbone, rollout, returns)
                norms = {f"{role}_grad_norm": o.clip() for role, o in optimizers.items()}
                run.check_finite(step, loss=facts["loss"], **norms)
                for optimizer in optimizers.values():
                    optimizer.step(step)

            metrics = {
                **whole_batch(rewards, len(batch)).figures(),
                "kl": distributed.mean(kl.sum(1).mean().item()),  # nats per answer, sampled
                **facts,  # with the exact "kl" where it is in the loss
                **norms,
                "length": distributed.mean(rollout.completion_mask.sum(1).float().mean().item()),
                "tokens_per_s": distributed.total(rollout.attention_mask.sum().item())
                / clock.total,
                **clock.seconds(),
                **peak_memory(peak),
            }
            last = step == config.steps
            validated = held_out and (step % config.validate_every == 0 or last)
            if validated:
                metrics |= evaluate(config, backbone, held_out, score)
            if step % config.log_every == 0 or validated or last:
                run.log(step, **metrics)
            guards.watch(run, step, **{k: metrics[k] for k in ("kl", "reward", "reward_std")})
            if step % config.samples_every == 0 or last:
                write_samples(run, step, config, backbone, prompts, score)
            if run.checkpoint_due(step):
                save(run, step, backbone, optimizers, batches, **guards.state())
        last = run.latest_checkpoint()
        result = run.publish("policy", last)
    return {"policy": str(result), "step": last.step} | run.metrics_at(last.step)


# ------------------------------------------------------------------------------------- loading


def first_prompt(config: ReinforceConfig) -> Any:
    """As text or messages, without a tokenizer."""
    rows = read_rows(file_and_weight(config.data[0])[0], config.format)
    want_kind(rows, ["prompt"], "reinforce")
    return rows[0]["prompt"]


def load_prompts(config: ReinforceConfig, backbone: Backbone, path: str) -> Encoded:
    """Prompts that leave room for `max_new_tokens` in the context."""
    context = backbone.config.max_position_embeddings
    room = prompt_room(config.max_tokens, config.max_new_tokens, context)
    rows = read_rows(path, config.format)
    want_kind(rows, ["prompt"], "reinforce")
    return encode_prompts(
        rows,
        backbone.tokenizer,
        room,
        truncate_prompts=config.truncate_prompts,
        drop_long=config.drop_long,
    )


def with_text(encoded: Encoded) -> list[Prompt]:
    return [Prompt(row["prompt"], ids) for row, ids in zip(encoded.rows, encoded, strict=True)]


# ------------------------------------------------------------------------------------- rollout


def sample(
    config: ReinforceConfig,
    backbone: Backbone,
    prompts: list[Prompt],
    seed: int,
) -> Rollout:
    """Answers of the policy to this process's share of the prompts; the seed decides the draws."""
    generator = torch.Generator(backbone.device).manual_seed(seed)
    draws = draw(len(prompts), config.max_new_tokens, backbone.device, generator)
    return generate(
        backbone,
        "policy",
        [prompt.ids for prompt in distributed.share(prompts)],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        draws=draws[distributed.share(range(len(prompts)))],
    )


# --------------------------------------------------------------------------------------- score


def whole_batch(rewards: Rewards, count: int) -> Rewards:
    """The rewards of all `count` answers of a batch, from those of each process's share."""
    columns = (
        None if column is None else torch.tensor(distributed.gathered(column.tolist(), count))
        for column in rewards
    )
    return Rewards(*columns)


@torch.no_grad()
def sampled_kl(
    config: ReinforceConfig, backbone: Backbone, rollout: Rollout
) -> Tensor:  # (B, T) float32
    """log π − log π_anchor of the answers' tokens; 0 past an answer's end."""
    head, ids = backbone.head(), rollout.completion_ids.where(rollout.completion_mask, -100)
    ref_log_prob = [
        pk.linear_log_prob(
            answer_states(backbone, None, rollout, rows),
            head.weight,
            ids[rows],
            temperature=config.temperature,
            **head.options,
        )
        for rows in micro_batches(config.micro_batch_size, len(ids))
    ]
    return reinforce.k1(rollout.log_prob, torch.cat(ref_log_prob))


def reward_returns(
    config: ReinforceConfig, scores: Tensor, kl: Tensor, rollout: Rollout
) -> Tensor:  # (B, T)
    """Z_t: (1 − β) r, less β times the KL still to come where KL is part of the reward."""
    rewards = reinforce.token_rewards(
        scores,
        kl,
        rollout.completion_mask,
        reward_coef=1.0 if config.kl_convention == "trl" else 1.0 - config.beta,
        kl_coef=config.beta if config.kl_in == "reward" else 0.0,
    )
    return reinforce.returns(rewards, rollout.completion_mask)


# --------------------------------------------------------------------------------------- learn


def learn(
    config: ReinforceConfig, backbone: Backbone, rollout: Rollout, returns: Tensor
) -> dict[str, float]:
    """Leaves the gradients of both losses in `.grad`, and returns facts about them.

    The value goes first: its predictions before the update are the policy's baseline. Losses are
    sums over rows divided by the batch's tokens, so they are the same however rows are split.
    """
    ids, mask = rollout.completion_ids, rollout.completion_mask
    tokens = distributed.total(mask.sum().item())
    rows_of = micro_batches(config.micro_batch_size, len(ids))
    facts: dict[str, float] = {}

    baseline: Tensor | float = 0.0
    if config.baseline == "value":
        predictions, total = [], 0.0
        for rows in rows_of:
            values = backbone.values("value", *inputs(rollout, rows))[:, rollout.prompt_len - 1 :]
            loss = reinforce.value_loss(values, returns[rows], mask[rows]) / tokens
            loss.backward()
            predictions.append(values.detach())
            total += loss.item()
        baseline, facts["value_loss"] = torch.cat(predictions), distributed.total(total)
    elif config.baseline == "batch_mean":
        baseline = reinforce.masked_mean(returns, mask)
    advantage = reinforce.advantages(returns, baseline, mask, whiten=config.whiten_advantages)

    head, in_loss = backbone.head("policy"), config.kl_in == "loss"
    log_prob, entropy, kl, total = [], [], [], 0.0
    for rows in rows_of:
        with torch.no_grad():
            ref_hidden = answer_states(backbone, None, rollout, rows) if in_loss else None
        hidden, weighed = answer_states(backbone, "policy", rollout, rows), advantage[rows]
        if config.importance_cap is not None:
            weighed = weighed * importance_weights(config, head, hidden.detach(), rollout, rows)
        out = pk.policy_loss(
            hidden,
            head.weight,
            ids[rows],
            weighed,
            ref_hidden=ref_hidden,
            kl_coef=config.beta if in_loss else 0.0,
            mask=mask[rows],
            temperature=config.temperature,
            reduction="sum",
            **head.options,
        )
        (out.loss / tokens).backward()
        total += (out.loss / tokens).item()
        log_prob.append(out.log_prob)
        entropy.append(out.entropy)
        if in_loss:
            kl.append(out.kl.sum(1))
    if in_loss:
        facts["kl"] = distributed.mean(torch.cat(kl).mean().item())
    return facts | {
        "loss": distributed.total(total),
        "entropy": reinforce.masked_mean(torch.cat(entropy), mask),
        **reinforce.mismatch(torch.cat(log_prob), rollout.log_prob, mask),
    }


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


def inputs(rollout: Rollout, rows: slice) -> tuple[Tensor, Tensor]:
    """Ids and mask of a forward pass; the last token predicts nothing."""
    return rollout.sequences[rows, :-1], rollout.attention_mask[rows, :-1]


# --------------------------------------------------------------------------------------- watch


def evaluate(
    config: ReinforceConfig, backbone: Backbone, prompts: list[Prompt], score: Scorer
) -> dict[str, float]:
    """Mean reward and KL of answers to held-out prompts, drawn with the same seed every time."""
    rewards, kl = [], []
    for start in range(0, len(prompts), config.prompts_per_step):
        batch = prompts[start : start + config.prompts_per_step]
        rollout = sample(config, backbone, batch, derived_seed(config.seed, 0, start))
        rewards.append(whole_batch(score(rollout, distributed.share(batch)), len(batch)))
        of_answers = sampled_kl(config, backbone, rollout).sum(1).tolist()
        kl += distributed.gathered(of_answers, len(batch))
    figures = joined(rewards).figures() | {"kl": sum(kl) / len(kl)}
    return {f"validation_{name}": value for name, value in figures.items()}


def write_samples(
    run: Run,
    step: int,
    config: ReinforceConfig,
    backbone: Backbone,
    prompts: list[Prompt],
    score: Scorer,
) -> None:
    """The same prompts with the same draws at every step, so that answers can be compared."""
    batch = prompts[:SAMPLES]
    rollout = sample(config, backbone, batch, derived_seed(config.seed, 0))
    rewards = score(rollout, distributed.share(batch)).reward.tolist()
    mine = list(zip(rollout.texts(backbone.tokenizer), rewards, strict=True))
    answers = distributed.gathered(mine, len(batch))
    for prompt, (answer, reward) in zip(batch, answers, strict=True):
        row = {"prompt": prompt.text, "completion": answer, "reward": reward}
        run.append("samples.jsonl", {"step": step} | row)


class Clock:
    """Wall time of a step's phases, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.phases = device, {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.phases[name] = time.perf_counter() - start

    @property
    def total(self) -> float:
        return sum(self.phases.values())

    def seconds(self) -> dict[str, float]:
        phases = {f"{name}_s": seconds for name, seconds in self.phases.items()}
        return phases | {"step_s": self.total}
