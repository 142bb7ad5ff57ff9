"""Reward models and reward functions: losses, held-out metrics, and scoring of answers.

    pairwise   loss = −log σ(r(x, y_w) − r(x, y_l))                        Bradley-Terry
    pointwise  loss = −p log σ(r) − (1 − p) log(1 − σ(r))                  thumbs up or down

arXiv 2403.10704 prints σ(1 − r) for the negative term of the second; the standard 1 − σ(r) is
what is implemented.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perl import distributed
from perl.backbone import Backbone
from perl.config import UsageError
from perl.data import Labelled, Pair, pad
from perl.training import by_length

# ---------------------------------------------------------------------------------------------
# Losses and metrics


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:  # (B,), (B,) -> (B,)
    """−log σ(chosen − rejected) of each pair of scores."""
    return -F.logsigmoid(chosen - rejected)


def pointwise_loss(
    scores: Tensor,  # (B,)
    labels: Tensor,  # (B,) in [0, 1]
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:  # (B,)
    """Binary cross-entropy of σ(score); `weights` multiply the terms of bad and good answers."""
    bad, good = weights
    return -(good * labels * F.logsigmoid(scores) + bad * (1 - labels) * F.logsigmoid(-scores))


def pairwise_accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """The share of pairs whose chosen answer scores higher; a tie counts one half."""
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()


def classification_metrics(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """accuracy, balanced_accuracy and auc of scores (N,) against labels (N,), good above 0.5.

    The decision threshold is score 0, that is σ = 1/2. auc is the chance that a good answer
    scores above a bad one, ties one half. Without both kinds of label the last two are NaN.
    """
    good = labels > 0.5
    right = (scores > 0) == good
    positive, negative = scores[good].double(), scores[~good].double()
    metrics = {"accuracy": right.double().mean().item()}
    if not len(positive) or not len(negative):
        return metrics | {"balanced_accuracy": math.nan, "auc": math.nan}
    balanced = (right[good].double().mean() + right[~good].double().mean()).item() / 2
    ranked = negative.sort().values
    below = torch.searchsorted(ranked, positive, right=False).double()
    not_above = torch.searchsorted(ranked, positive, right=True).double()
    auc = ((below + not_above) / 2).mean().item() / len(negative)
    return metrics | {"balanced_accuracy": balanced, "auc": auc}


# ---------------------------------------------------------------------------------------------
# Scorers


def score_batch(
    backbone: Backbone, role: str, sequences: Sequence[list[int]]
) -> Tensor:  # (B,) float32
    """A reward role's score of each token sequence, prompt and answer together, in one pass."""
    input_ids, mask = pad(sequences, backbone.tokenizer.pad_token_id)
    return backbone.score(role, input_ids.to(backbone.device), mask.to(backbone.device))


@torch.no_grad()
def score_all(
    backbone: Backbone, role: str, sequences: Sequence[list[int]], batch_size: int
) -> Tensor:  # (N,) float32 on the CPU
    """`score_batch` of any number of sequences, in batches of like length, without gradients."""
    scores = torch.zeros(len(sequences))
    batches = by_length(sequences, batch_size)
    found = [
        score_batch(backbone, role, [sequences[i] for i in rows]).cpu()
        for rows in distributed.share(batches)
    ]
    for rows, values in zip(batches, distributed.gathered(found, len(batches)), strict=True):
        scores[rows] = values
    return scores


def sequences(batch: Sequence[Pair] | Sequence[Labelled]) -> list[list[int]]:
    """Token ids to score: of pairs, all chosen answers and then all rejected ones."""
    if isinstance(batch[0], Pair):
        return [pair.chosen for pair in batch] + [pair.rejected for pair in batch]
    return [row.ids for row in batch]


def reward_figures(
    backbone: Backbone,
    role: str,
    examples: Sequence[Pair] | Sequence[Labelled],
    batch_size: int,
) -> dict[str, float]:
    """Loss with accuracy (pairs), or with accuracy, balanced_accuracy and auc (labels)."""
    scores = score_all(backbone, role, sequences(examples), batch_size)
    if isinstance(examples[0], Pair):
        chosen, rejected = scores.view(2, -1)
        loss = bradley_terry_loss(chosen, rejected).mean().item()
        return {"loss": loss, "accuracy": pairwise_accuracy(chosen, rejected)}
    labels = torch.tensor([row.label for row in examples])
    loss = pointwise_loss(scores, labels).mean().item()
    return {"loss": loss} | classification_metrics(scores, labels)


RewardFunction = Callable[[Sequence[Any], Sequence[str]], list[float]]


def load_reward_function(target: str) -> RewardFunction:
    """The function NAME of FILE.py, given "FILE.py:NAME"; called NAME(prompts, completions).

    What it returns is checked at every call: one finite number for each completion. Raises
    UsageError for a target, file or function that is not there, and for a wrong return value.
    """
    path, _, name = target.rpartition(":")
    if not path or not name.isidentifier():
        raise UsageError(f"--reward-function is {target!r}; want FILE.py:NAME")
    if not Path(path).is_file():
        raise UsageError(f"--reward-function: {path} does not exist; want FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--reward-function: {path} is no Python file; want FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(
            f"--reward-function: {path} fails to import: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(
            f"--reward-function: {path} has no function {name}; define {name}(prompts, completions)"
        )

    def checked(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        try:
            returned = function(prompts, completions)
        except Exception as error:
            raise UsageError(
                f"reward function {target} raised {type(error).__name__}: {error}; "
                "make it score any completion"
            ) from error
        try:
            values = [float(value) for value in returned]
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"reward function {target} returned no list of numbers: {error}; "
                "return one float for each completion"
            ) from error
        if len(values) != len(completions):
            raise UsageError(
                f"reward function {target} returned {len(values)} rewards for "
                f"{len(completions)} completions; return one for each"
            )
        wrong = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if wrong is not None:
            raise UsageError(
                f"reward function {target} returned {values[wrong]} for completion "
                f"{completions[wrong][:60]!r}; return finite numbers"
            )
        return values

    return checked
