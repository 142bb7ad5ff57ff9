"""Reward models: losses, held-out figures, and scoring of answers.

    pairwise   loss = −log σ(d),  d = r(x, y_w) − r(x, y_l) − margin       Bradley-Terry
    pointwise  loss = −p log σ(r) − (1 − p) log(1 − σ(r))                  thumbs up or down

arXiv 2403.10704 prints σ(1 − r) for the negative term of the second; the standard 1 − σ(r) is
what is implemented.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perl import distributed
from perl.backbone import Backbone
from perl.data import Encoded, Labelled, Pair, pad
from perl.run import NonFiniteLoss
from perl.training import by_length

# ---------------------------------------------------------------------------------------------
# Losses


def bradley_terry_loss(
    chosen: Tensor,  # (B,)
    rejected: Tensor,  # (B,)
    margin: Tensor | float = 0.0,  # (B,)
    *,
    label_smoothing: float = 0.0,
    center: float = 0.0,
) -> Tensor:  # (B,)
    """−log σ(d) of each pair of scores, d = chosen − rejected − margin.

    margin: by how much the chosen answer is to score higher (arXiv 2307.09288, equation 2).
    label_smoothing: the probability ε that a preference is the wrong way round; the loss becomes
    −(1 − ε) log σ(d) − ε log σ(−d) (arXiv 2401.06080).
    center: weight of (chosen + rejected)², which settles where scores have their zero, as a
    difference alone does not (arXiv 2312.09244; TRL's center_rewards_coefficient).
    """
    difference = chosen - rejected - margin
    loss = label_smoothing * difference - F.logsigmoid(difference)  # log σ(−d) = log σ(d) − d
    return loss + center * (chosen + rejected).square() if center else loss


def pointwise_loss(
    scores: Tensor,  # (B,)
    labels: Tensor,  # (B,) in [0, 1]
    weights: tuple[float, float] = (1.0, 1.0),
    *,
    label_smoothing: float = 0.0,
) -> Tensor:  # (B,)
    """Binary cross-entropy of σ(score); `weights` multiply the terms of bad and good answers.

    label_smoothing: the probability ε that a label is wrong; p becomes (1 − ε) p + ε (1 − p).
    """
    bad, good = weights
    labels = labels + label_smoothing * (1 - 2 * labels)
    return -(good * labels * F.logsigmoid(scores) + bad * (1 - labels) * F.logsigmoid(-scores))


# ---------------------------------------------------------------------------------------------
# Figures of scores


def pairwise_figures(chosen: Tensor, rejected: Tensor) -> dict[str, Any]:  # (N,), (N,)
    """Figures of the scores of N pairs, from the probability σ(gap) of the right order.

    loss: mean −log σ(gap), gap = chosen − rejected, whatever the loss in training added to it.
    accuracy: share of pairs whose chosen answer scores higher; a tie counts one half.
    auc: chance that a chosen answer scores above a rejected one of any pair; ties one half.
    gap, gap_std: mean and standard deviation of the gap.
    ece, reliability: of the order that the scores say, held with confidence σ(|gap|).
    histogram: of the scores of chosen and of rejected answers.
    """
    gaps = (chosen - rejected).double()
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    return {
        "loss": bradley_terry_loss(chosen, rejected).mean().item(),
        "accuracy": right.mean().item(),
        "auc": area_under_curve(chosen, rejected),
        "gap": gaps.mean().item(),
        "gap_std": gaps.std(correction=0).item(),
        **calibration(gaps.abs().sigmoid(), right),
        "histogram": histogram(chosen, rejected),
    }


def pointwise_figures(scores: Tensor, labels: Tensor) -> dict[str, Any]:  # (N,), (N,)
    """Figures of N scores against labels in [0, 1], good above 0.5, from the probability σ(score).

    loss: mean cross-entropy, both labels weighing alike.
    accuracy, balanced_accuracy: with the threshold at score 0; balanced is the mean of the
    accuracies on good and on bad answers.
    auc: chance that a good answer scores above a bad one; ties one half.
    gap, gap_std: mean and standard deviation of the difference of a good and a bad score.
    ece, reliability: of σ(score) as the probability of a good answer.
    histogram: of the scores of good and of bad answers.
    Without both kinds of label balanced_accuracy, auc, gap and gap_std are NaN.
    """
    is_good = labels > 0.5
    right = ((scores > 0) == is_good).double()
    good, bad = scores[is_good].double(), scores[~is_good].double()
    recalls = right[is_good].mean(), right[~is_good].mean()
    spread = sum((part - part.mean()).square().mean() for part in (good, bad))
    return {
        "loss": pointwise_loss(scores, labels).mean().item(),
        "accuracy": right.mean().item(),
        "balanced_accuracy": sum(recalls).item() / 2,
        "auc": area_under_curve(good, bad),
        "gap": (good.mean() - bad.mean()).item(),
        "gap_std": spread.sqrt().item(),
        **calibration(scores.double().sigmoid(), labels.double()),
        "histogram": histogram(good, bad),
    }


def area_under_curve(good: Tensor, bad: Tensor) -> float:  # (P,), (Q,)
    """The chance that one of `good` is above one of `bad`, ties one half; NaN without both."""
    if not len(good) or not len(bad):
        return math.nan
    ranked = bad.sort().values
    below = torch.searchsorted(ranked, good, right=False).double()
    not_above = torch.searchsorted(ranked, good, right=True).double()
    return ((below + not_above) / 2).mean().item() / len(bad)


def calibration(probabilities: Tensor, outcomes: Tensor, bins: int = 10) -> dict[str, Any]:
    """Whether what is said with probability p is true in a share p of cases; both (N,).

    reliability: of each of `bins` equal parts of [0, 1] that holds any, the mean probability
    "said", the mean outcome "found", and the "count".
    ece: expected calibration error, the mean of |said − found| over cases (arXiv 1706.04599).
    """
    number = (probabilities * bins).long().clamp_(0, bins - 1)
    counts = number.bincount(minlength=bins)
    held = counts > 0
    said, found = (
        number.bincount(values, bins)[held] / counts[held] for values in (probabilities, outcomes)
    )
    ece = ((said - found).abs() * counts[held]).sum().item() / len(probabilities)
    reliability = {"said": said, "found": found, "count": counts[held]}
    return {"ece": ece, "reliability": {key: v.tolist() for key, v in reliability.items()}}


def histogram(good: Tensor, bad: Tensor, bins: int = 24) -> dict[str, list[float]]:
    """Counts of both between common "edges", `bins` + 1 of them."""
    scores = torch.cat([good, bad]).double()
    low, high = scores.min().item(), scores.max().item()
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = {
        name: torch.histc(part.double(), bins, low, high).tolist()
        for name, part in (("good", good), ("bad", bad))
    }
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return {"edges": edges.tolist(), **counts}


# ---------------------------------------------------------------------------------------------
# Scorers


def score_batch(
    backbone: Backbone, role: str, sequences: Sequence[list[int]]
) -> Tensor:  # (B,) float32
    """A reward role's score of each token sequence, prompt and answer together, in one pass."""
    input_ids, mask = pad(sequences, backbone.tokenizer_of(role).pad_token_id)
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


def not_finite(scores: Tensor, places: Sequence[str]) -> str:  # (N,)
    """Which score is the first that is not finite, and what it is; "" where all are.

    places: of the rows that were scored, once, or twice where pairs were (`Encoded.places`).
    """
    for i in (~scores.isfinite()).nonzero().flatten()[:1].tolist():
        return f"{places[i % len(places)]}: the score is {scores[i]}"
    return ""


def reward_figures(
    backbone: Backbone, role: str, examples: Encoded, batch_size: int
) -> dict[str, Any]:
    """`figures_of_scores` of a reward role's scores.

    Raises NonFiniteLoss, naming the row, where a score is not finite.
    """
    scores = score_all(backbone, role, sequences(examples), batch_size)
    if wrong := not_finite(scores, examples.places):
        raise NonFiniteLoss(f"{wrong}; start again with a lower --lr, or --dtype float32")
    return figures_of_scores(scores, examples)


def figures_of_scores(
    scores: Tensor,  # (N,), in the order of `sequences(examples)`
    examples: Sequence[Pair] | Sequence[Labelled],
) -> dict[str, Any]:
    """`pairwise_figures` of pairs, `pointwise_figures` of labelled rows."""
    if isinstance(examples[0], Pair):
        return pairwise_figures(*scores.view(2, -1))
    return pointwise_figures(scores, torch.tensor([row.label for row in examples]))
