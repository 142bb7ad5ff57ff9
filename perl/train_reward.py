"""Reward model: `python -m perl reward`, on pairs or on thumbs up and down, by the data's columns.

    score r(x, y) = w · hidden state of the last token, on the frozen backbone with its adapter
    pairwise      loss = −log σ(r(x, y_w) − r(x, y_l)),           mean over pairs
    pointwise     loss = binary cross-entropy of σ(r(x, y)),      mean over rows

Both answers of a pair go through the model in one pass. Validation reports accuracy (pairwise) or
AUC and balanced accuracy (pointwise: labels are seldom balanced); the checkpoint that is best on it
becomes the result.

Left out: a margin or a term that centres the scores, ensembles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perl import distributed
from perl.backbone import Backbone
from perl.config import RewardConfig, UsageError
from perl.data import (
    Batches,
    Encoded,
    Labelled,
    Pair,
    encode_labelled,
    encode_pairs,
    read_rows,
    want_kind,
)
from perl.memory import PeakMemory
from perl.reward import (
    bradley_terry_loss,
    pointwise_loss,
    reward_figures,
    score_batch,
    sequences,
)
from perl.run import Run
from perl.training import (
    Timer,
    add_role,
    begin,
    length_limit,
    lora_config,
    make_optimizer,
    micro_batches,
    open_backbone,
    peak_memory,
    rows_per_pass,
    save,
    say_notes,
    shard,
)


def train(config: RewardConfig) -> dict[str, Any]:
    """Trains a reward model into `config.out`/reward and returns the figures of the run."""
    # ---- load: everything that can be refused is refused before the run folder exists
    run = Run.create(config.out, config)
    backbone = open_backbone(config, tuning=config.tuning, lora=lora_config(config))
    examples = load_examples(config, config.data, backbone)
    held_out = load_examples(config, config.validation, backbone) if config.validation else None
    if held_out:
        check_held_out(config, examples, held_out)
    weights = label_weights(config, examples)
    checkpoint = run.latest_checkpoint() if config.resume else None
    add_role(backbone, "reward", checkpoint, scalar=True)
    shard(config, backbone)
    optimizer = make_optimizer(config, backbone, "reward", config.lr)
    batches = Batches(examples, config.batch_size, config.seed)
    begin(config, checkpoint, {"reward": optimizer}, batches)

    # ---- loop
    with run, PeakMemory(backbone.device) as peak:
        say_notes(run, config.data, examples)
        for step in run.steps(config.steps, "reward"):
            timer, batch = Timer(backbone.device), next(batches)
            mine = distributed.share(batch)

            loss = right = 0.0
            for rows in micro_batches(config.micro_batch_size, len(mine)):
                losses, correct = batch_loss(backbone, mine[rows], weights)
                part = losses.sum() / len(batch)
                part.backward()
                loss, right = loss + part.item(), right + correct.sum().item()
            loss, right = distributed.total(loss), distributed.total(right)
            grad_norm = optimizer.clip()
            run.check_finite(step, loss=loss, grad_norm=grad_norm)
            optimizer.step(step)

            step_s, tokens = timer.seconds(), sum(map(len, sequences(batch)))
            metrics = {
                "loss": loss,
                "accuracy": right / len(batch),
                "grad_norm": grad_norm,
                "tokens": tokens,
                "tokens_per_s": tokens / step_s,
                "step_s": step_s,
                **peak_memory(peak),
            }
            last, score = step == config.steps, None
            if held_out and (step % config.validate_every == 0 or last):
                figures = reward_figures(backbone, "reward", held_out, rows_per_pass(config))
                metrics |= {f"validation_{name}": value for name, value in figures.items()}
                score = figures.get("auc", figures["accuracy"])
            if step % config.log_every == 0 or score is not None or last:
                run.log(step, **metrics)
            if run.checkpoint_due(step) or run.is_best(score):
                save(run, step, backbone, {"reward": optimizer}, batches, score)
        best = run.best_checkpoint()
        result = run.publish("reward", best)
    return {"reward": str(result), "step": best.step} | run.metrics_at(best.step)


def load_examples(config: RewardConfig, path: str, backbone: Backbone) -> Encoded:
    rows = read_rows(path, config.format)
    kind = want_kind(rows, ["pairwise", "pointwise"], "reward")
    encode = encode_pairs if kind == "pairwise" else encode_labelled
    return encode(rows, backbone.tokenizer, length_limit(config, backbone))


def check_held_out(config: RewardConfig, examples: Encoded, held_out: Encoded) -> None:
    if type(held_out[0]) is not type(examples[0]):
        raise UsageError(
            f"--data {config.data} and --validation {config.validation} hold "
            "different kinds of rows; give pairs in both, or labels in both"
        )
    if isinstance(held_out[0], Labelled) and len({row.label > 0.5 for row in held_out}) == 1:
        raise UsageError(
            f"all labels of --validation {config.validation} are alike, so nothing "
            "can be told from it; give rows with both"
        )


def label_weights(config: RewardConfig, examples: list[Pair] | list[Labelled]) -> tuple:
    """(bad, good) weights: 1, or such that both labels weigh equally over the data."""
    if not config.balance_labels:
        return 1.0, 1.0
    if isinstance(examples[0], Pair):
        raise UsageError(
            "--balance-labels is for {prompt, completion, label} rows; pairs have no "
            "labels to balance; leave it out"
        )
    good = sum(example.label for example in examples) / len(examples)
    if not 0 < good < 1:
        raise UsageError(f"--balance-labels wants both labels; all rows of {config.data} have one")
    return 0.5 / (1 - good), 0.5 / good


def batch_loss(
    backbone: Backbone, batch: list[Pair] | list[Labelled], weights: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Loss of each row (B,), and whether the score is on the right side (B,)."""
    scores = score_batch(backbone, "reward", sequences(batch))
    if isinstance(batch[0], Pair):
        chosen, rejected = scores.view(2, -1)
        return bradley_terry_loss(chosen, rejected), chosen > rejected
    labels = torch.tensor([row.label for row in batch], device=scores.device)
    return pointwise_loss(scores, labels, weights), (scores > 0) == (labels > 0.5)
