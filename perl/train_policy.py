"""REINFORCE with a value baseline and a KL anchor: `python -m perl reinforce`.

    J(θ) = E_{y∼π_θ}[(1 − β) r(y|x) − β KL(π_θ ‖ π_anchor)]        (arXiv 2403.10704, 2309.00267)

Every step: sample answers (rollout), reward them and measure the KL to the anchor (score), then a
gradient step for the value and one for the policy, or several (learn). Policy, value, reward and
anchor are roles of one backbone: adapters, and adapters off. With `--tuning full` the same lines
run with four models in place of one. The arithmetic is in `reinforce.py`, what of it runs a model
in `policy_step.py`.

Choices that the paper leaves open, and the other ways there are, each with its reason:
- KL enters as a reward of each token, −β (log π − log π_anchor), `--kl-in reward --kl-estimator
  k1`: its gradient is unbiased for the sequence KL, future tokens included, at the price of a pass
  of the anchor. It is the KL of the policies that are sampled, temperature included, and log π in
  it is what sampling computed. `exact` there is unbiased too and has less noise: the return
  credits a token with the exact KL of the states after it, and the KL of its own state, whose
  gradient a reward lacks, is in the loss as well; a pass of the policy more. `k3` there is biased
  (`reinforce.k3`), and is had for comparison with others.
- `--kl-in loss` puts β KL into the loss alone, by default exact: least noise, but blind to how a
  token changes the states that follow. `k3` there is GRPO's, with the gradient of the KL the other
  way round. `k1` there is refused: its gradient is 0 on average. `exact` wants one head that policy
  and anchor share, so not `--tuning full`.
- `--kl-per token`: a token is told the KL that follows it, and not what was before, which is noise
  to it. `sequence` puts the sum at the last token, as RLOO does.
- β is constant: the paper's objective. `--kl-target` adapts it to a KL per answer.
- The baseline is a value model, the paper's: it knows the state. `leave_one_out` needs none, and
  several `--answers-per-prompt`, whose prompts' difficulty it takes out (RLOO with `--kl-per
  sequence`). `batch_mean` holds each answer's own return: a bias of one in the batch's tokens.
- Advantages are not whitened: the baseline centres them, and the clipped AdamW step has a scale of
  its own. `--whiten-advantages` does it.
- One update per step: the data are on-policy, and no ratio is needed. With `--epochs-per-batch` and
  `--minibatches` the ratio to the policy of sampling is learnt, clipped as in PPO (epsilon 0.2,
  PPO's own). Its denominator is what sampling computed: tokens were drawn from just that, so where
  sampling and learning differ by more than rounding the ratio takes the difference into account,
  and no pass is spent on a second log π. Advantages are fixed before the first update.
- How far sampling and learning differ is logged before the first update of each step
  (`mean_abs_dlogp`, `max_abs_dlogp`). With one update, `--importance-cap` weighs each token by the
  ratio of the two, truncated, where it is more than rounding (low precision, LoRA dropout). It is
  off by default: another pass over the head, for a ratio that is 1 up to rounding otherwise.
- No entropy bonus: the KL holds the policy near an anchor that has entropy. `--entropy-coef` adds
  it, exact over the vocabulary, by sweeps over the head's tiles like all else.
- No penalties of length or of a missing end, and no stop strings: what a good answer is, the reward
  says. Penalties are of the score itself, before β; `reward` in the metrics is without them.
- Losses are means over the answer tokens of an update, so a step does not grow with the answers.
- alpha / R is 2 at the default rank, and the learning rate 10 × that of full tuning (1e-4, 1e-5).
  Its schedule counts steps, whatever the updates in each.
- The value head starts at zero, so the first baseline is 0 and not noise.
- The result is the last policy, not the best by reward: the reward is what a policy overfits.

Left out: GAE (γ = λ = 1 is the plain return) and discounting (only the last token is rewarded),
clipping of the value loss (it did not help: arXiv 2006.05990), division by a group's
spread as in GRPO (it favours prompts whose answers hardly differ), dropout of the base (the policy
that learns is the one that was sampled).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from perl import distributed, reinforce
from perl.backbone import Backbone
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
from perl.policy_step import (
    anchor_log_prob,
    ask_anchor,
    estimate_kl,
    learn,
    reward_returns,
)
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
    adaptive = config.kl_target is not None
    beta = checkpoint.state["beta"] if checkpoint and adaptive else config.beta

    # ---- loop
    with run, PeakMemory(backbone.device) as peak, stopping(run):
        say_notes(run, encoded, validation)
        if run.step == 0:
            write_samples(run, 0, config, backbone, prompts, score)
            if held_out:
                run.log(0, **evaluate(config, backbone, held_out, score))
        for step in run.steps(config.steps, "reinforce"):
            clock, go_back = Clock(backbone.device), bookmark(batches)
            batch, state = episodes(config, next(batches)), {"beta": beta, **guards.state()}
            keep = partial(save, run, step - 1, backbone, optimizers, batches, **state)

            with clock.phase("rollout"):
                rollout = sample(config, backbone, batch, derived_seed(config.seed, step))
            with clock.phase("score"):
                with keeping(run, step - 1, go_back, keep):
                    rewards = score(rollout, distributed.share(batch))
                anchor = ask_anchor(config, backbone, rollout)
                kl = torch.zeros_like(rollout.log_prob)
                if config.kl_in == "reward":
                    kl = estimate_kl(config, backbone, rollout, anchor)
                returns = reward_returns(config, rewards.reward, kl, rollout, beta)
            with clock.phase("learn"):
                updates = []
                for facts in learn(config, backbone, rollout, returns, anchor, beta):
                    norms = {f"{role}_grad_norm": o.clip() for role, o in optimizers.items()}
                    run.check_finite(step, loss=facts["loss"], **norms)
                    for optimizer in optimizers.values():
                        optimizer.step(step)
                    updates.append(facts | norms)

            metrics = {
                **whole_batch(rewards, len(batch)).figures(),
                "kl": distributed.mean(kl.sum(1).mean().item()),  # nats per answer
                **reinforce.over_updates(updates),  # with the "kl" that is in the loss
                "length": distributed.mean(rollout.completion_mask.sum(1).float().mean().item()),
                "ended": distributed.mean(rollout.ended.float().mean().item()),
                "tokens_per_s": distributed.total(rollout.attention_mask.sum().item())
                / clock.total,
                **clock.seconds(),
                **peak_memory(peak),
            }
            if adaptive:
                metrics["beta"] = beta
                beta = reinforce.adapted(beta, metrics["kl"], config.kl_target, config.kl_horizon)
            last = step == config.steps
            if last:
                metrics["role_bytes"] = backbone.role_bytes()
            validated = held_out and (step % config.validate_every == 0 or last)
            if validated:
                metrics |= evaluate(config, backbone, held_out, score)
            if step % config.log_every == 0 or validated or last:
                run.log(step, **metrics)
            guards.watch(run, step, **{k: metrics[k] for k in ("kl", "reward", "reward_std")})
            if step % config.samples_every == 0 or last:
                write_samples(run, step, config, backbone, prompts, score)
            if run.checkpoint_due(step):
                save(run, step, backbone, optimizers, batches, beta=beta, **guards.state())
        newest = run.latest_checkpoint()
        result = run.publish("policy", newest)
    return {"policy": str(result), "step": newest.step} | run.metrics_at(newest.step)


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


def episodes(config: ReinforceConfig, prompts: list[Prompt]) -> list[Prompt]:
    """Prompts in the order in which they are answered: all of them, then all of them again.

    A batch comes sorted by length, and minibatches are parts of this order one after another: so
    that each has short prompts and long ones, they are dealt out first.
    """
    dealt = [p for part in range(config.minibatches) for p in prompts[part :: config.minibatches]]
    return dealt * config.answers_per_prompt


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
        stop=config.stop or (),
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
        sampled_kl = reinforce.k1(rollout.log_prob, anchor_log_prob(config, backbone, rollout))
        kl += distributed.gathered(sampled_kl.sum(1).tolist(), len(batch))
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
