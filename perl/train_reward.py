"""Reward model: `python -m perl reward`, on pairs or on thumbs up and down, by the data's columns.

    score r(x, y) = w · hidden state of the last token, on the frozen backbone with its adapter
    pairwise      loss = −log σ(r(x, y_w) − r(x, y_l) − margin),  mean over pairs
    pointwise     loss = binary cross-entropy of σ(r(x, y)),      mean over rows

Both answers of a pair go through the model in one pass. Validation measures whether good and bad
are told apart, by how much, and whether σ is the probability that it claims to be
(`perl.reward`); the checkpoint that is best by --best-metric becomes the result.

Left out: packing several rows into one sequence. Rows of like length share a batch instead; the
share of padding that is left, logged as "padding", is 0.02 to 0.03 for the labelled rows of
Taskmaster Coffee and 0.12 for pairs, whose two answers differ in length. Packed rows would want a
block-diagonal attention mask in every family of models: too much for so little.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
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
    file_and_weight,
    load_files,
    note_empty,
    padding,
    read_rows,
    want_kind,
    without_equal_pairs,
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
    load = partial(load_examples, config, backbone)
    examples, held_out = load_files(config.data, config.validation, load)
    check_options(config, examples)
    if held_out:
        check_held_out(config, examples, held_out)
    weights = label_weights(config, examples)
    checkpoint = run.latest_checkpoint() if config.resume else None
    add_role(backbone, "reward", checkpoint, scalar=True)
    if config.checkpoint_activations:
        backbone.checkpoint_activations("reward")
    shard(config, backbone)
    optimizer = make_optimizer(config, backbone, "reward", config.lr)
    batches = Batches(examples, config.batch_size, config.seed, examples.mixture)
    begin(config, checkpoint, {"reward": optimizer}, batches)

    # ---- loop
    with run, PeakMemory(backbone.device) as peak:
        say_notes(run, examples, held_out)
        for step in run.steps(config.steps, "reward"):
            timer, batch = Timer(backbone.device), next(batches)
            mine = distributed.share(batch)

            loss = right = padded = 0.0
            for rows in micro_batches(config.micro_batch_size, len(mine)):
                losses, correct = batch_loss(config, backbone, mine[rows], weights)
                part = losses.sum() / len(batch)
                part.backward()
                loss, right = loss + part.item(), right + correct.sum().item()
                padded += padding(sequences(mine[rows]))
            loss, right, padded = map(distributed.total, (loss, right, padded))
            grad_norm = optimizer.clip()
            run.check_finite(step, loss=loss, grad_norm=grad_norm)
            optimizer.step(step)

            step_s, tokens = timer.seconds(), sum(map(len, sequences(batch)))
            metrics = {
                "loss": loss,
                "accuracy": right / len(batch),
                "grad_norm": grad_norm,
                "tokens": tokens,
                "padding": padded / (tokens + padded),
                "tokens_per_s": tokens / step_s,
                "step_s": step_s,
                **peak_memory(peak),
            }
            last, score = step == config.steps, None
            if held_out and (step % config.validate_every == 0 or last):
                figures = reward_figures(backbone, "reward", held_out, rows_per_pass(config))
                metrics |= {f"validation_{name}": value for name, value in figures.items()}
                score = merit(config, figures)
            if step % config.log_every == 0 or score is not None or last:
                run.log(step, **metrics)
            if run.checkpoint_due(step) or run.is_best(score):
                save(run, step, backbone, {"reward": optimizer}, batches, score)
            if score is not None and out_of_patience(run, config, step):
                break
        best = run.best_checkpoint()
        result = run.publish("reward", best)
    figures = {k: v for k, v in run.metrics_at(best.step).items() if not isinstance(v, dict)}
    return {"reward": str(result), "step": best.step} | figures


def load_examples(config: RewardConfig, backbone: Backbone, path: str) -> Encoded:
    rows = read_rows(path, config.format)
    kind = want_kind(rows, ["pairwise", "pointwise"], "reward")
    if kind == "pairwise":
        rows, encode, answers = without_equal_pairs(rows), encode_pairs, ["chosen", "rejected"]
    else:
        encode, answers = encode_labelled, ["completion"]
    note_empty(rows, answers)
    return encode(rows, backbone.tokenizer, length_limit(config, backbone))


def check_options(config: RewardConfig, examples: Encoded) -> None:
    """Refuses training rows that teach nothing and options that the rows have no use for."""
    files = f"--data {' '.join(config.data)}"
    if len({type(example) for example in examples}) > 1:
        raise UsageError(f"{files}: pairs and labels cannot be mixed; give files of one kind")
    pairs = isinstance(examples[0], Pair)
    if not pairs and len({example.label for example in examples}) == 1:
        raise UsageError(
            f"all labels of {files} are {examples[0].label:g}, so there is nothing to learn; "
            "give rows with both"
        )
    if pairs and config.balance_labels:
        raise UsageError(
            "--balance-labels is for {prompt, completion, label} rows; pairs have no labels to "
            "balance; leave it out"
        )
    if not pairs and config.center_rewards:
        raise UsageError(
            "--center-rewards is for {prompt, chosen, rejected} rows; labels settle where scores "
            "have their zero; leave it out"
        )


def check_held_out(config: RewardConfig, examples: Encoded, held_out: Encoded) -> None:
    """Refuses held-out rows that tell nothing; counts prompts that were trained on.

    Settles --best-metric auto, so that the run folder says which it was.
    """
    if type(held_out[0]) is not type(examples[0]):
        raise UsageError(
            f"--data {' '.join(config.data)} and --validation {config.validation} hold "
            "different kinds of rows; give pairs in both, or labels in both"
        )
    trained_on = {Path(file_and_weight(word)[0]).resolve() for word in config.data}
    if Path(config.validation).resolve() in trained_on:
        raise UsageError(
            f"--validation {config.validation} is a training file too, so nothing in it is held "
            "out; give rows that --data has not"
        )
    pairs = isinstance(held_out[0], Pair)
    if not pairs and len({row.label > 0.5 for row in held_out}) == 1:
        raise UsageError(
            f"all labels of --validation {config.validation} are alike, so nothing "
            "can be told from it; give rows with both"
        )
    if pairs and config.best_metric == "balanced_accuracy":
        raise UsageError("--best-metric is balanced_accuracy, but pairs have accuracy, auc or loss")
    if config.best_metric == "auto":
        config.best_metric = "accuracy" if pairs else "auc"
    trained = {json.dumps(row["prompt"]) for row in examples.rows}
    shared = sum(json.dumps(row["prompt"]) in trained for row in held_out.rows)
    if shared:
        held_out.notes.append(
            f"{config.validation}: {shared} of {len(held_out)} prompts are in the training data "
            "too, so held-out figures may be too good"
        )


def label_weights(config: RewardConfig, examples: Encoded) -> tuple[float, float]:
    """(bad, good) weights: 1, or such that both labels weigh equally over the data."""
    if not config.balance_labels:
        return 1.0, 1.0
    good = sum(example.label for example in examples) / len(examples)
    return 0.5 / (1 - good), 0.5 / good


def batch_loss(
    config: RewardConfig,
    backbone: Backbone,
    batch: list[Pair] | list[Labelled],
    weights: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Loss of each row (B,), and whether the score is on the right side (B,)."""
    scores = score_batch(backbone, "reward", sequences(batch))
    smoothing = config.label_smoothing
    if isinstance(batch[0], Pair):
        chosen, rejected = scores.view(2, -1)
        margin = torch.tensor([pair.margin for pair in batch], device=scores.device)
        losses = bradley_terry_loss(
            chosen, rejected, margin, label_smoothing=smoothing, center=config.center_rewards
        )
        return losses, chosen > rejected
    labels = torch.tensor([row.label for row in batch], device=scores.device)
    losses = pointwise_loss(scores, labels, weights, label_smoothing=smoothing)
    return losses, (scores > 0) == (labels > 0.5)


def merit(config: RewardConfig, figures: dict[str, Any]) -> float:
    """--best-metric of a validation, turned so that more is better."""
    value = figures[config.best_metric]
    return -value if config.best_metric == "loss" else value


def out_of_patience(run: Run, config: RewardConfig, step: int) -> bool:
    """Whether --early-stop validations have passed since the best one."""
    best = run.best_checkpoint().step
    if not config.early_stop or step - best < config.early_stop * config.validate_every:
        return False
    run.say(f"stopped early at step {step}: {config.best_metric} was best at step {best}")
    return True
