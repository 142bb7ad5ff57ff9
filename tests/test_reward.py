"""Losses and metrics of reward models against their definitions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from perl.data import Labelled, Pair
from perl.reward import (
    bradley_terry_loss,
    calibration,
    figures_of_scores,
    histogram,
    pairwise_figures,
    pointwise_figures,
    pointwise_loss,
)


def test_bradley_terry_by_hand_and_far_out():
    chosen = torch.tensor([1.0, 0.0, -200.0, 200.0])
    rejected = torch.tensor([0.0, 0.0, 200.0, -200.0])
    expected = [math.log(1 + math.exp(-1)), math.log(2), 400.0, 0.0]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(expected)


def test_bradley_terry_with_margin_smoothing_and_centring_by_hand():
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    margin = torch.tensor([0.5, 0.0])  # differences 1 and -4, sums 2.5 and 2

    def wrong(d: float) -> float:  # -log sigmoid(d)
        return math.log(1 + math.exp(-d))

    got = bradley_terry_loss(chosen, rejected, margin).tolist()
    assert got == pytest.approx([wrong(1), wrong(-4)])
    got = bradley_terry_loss(chosen, rejected, margin, label_smoothing=0.2).tolist()
    assert got == pytest.approx([0.8 * wrong(d) + 0.2 * wrong(-d) for d in (1, -4)])
    got = bradley_terry_loss(chosen, rejected, margin, center=0.1).tolist()
    assert got == pytest.approx([wrong(1) + 0.1 * 6.25, wrong(-4) + 0.1 * 4])


def test_pointwise_smoothing_is_the_loss_of_labels_that_may_be_wrong():
    scores, labels = torch.tensor([2.0, 2.0, -1.0]), torch.tensor([1.0, 0.0, 0.25])
    weights = (3.0, 0.5)
    got = pointwise_loss(scores, labels, weights, label_smoothing=0.1)
    right, wrong = (pointwise_loss(scores, p, weights) for p in (labels, 1 - labels))
    torch.testing.assert_close(got, 0.9 * right + 0.1 * wrong)


def test_pointwise_is_cross_entropy_of_the_sigmoid():
    scores, labels = torch.tensor([2.0, 2.0, -90.0, 0.3]), torch.tensor([1.0, 0.0, 1.0, 0.25])
    s = 1 / (1 + math.exp(-0.3))
    expected = [
        math.log(1 + math.exp(-2)),
        math.log(1 + math.exp(2)),
        90.0,
        -0.25 * math.log(s) - 0.75 * math.log(1 - s),
    ]
    assert pointwise_loss(scores, labels).tolist() == pytest.approx(expected)
    weighted = pointwise_loss(scores, labels, (3.0, 0.5)).tolist()
    assert weighted[:3] == pytest.approx([0.5 * expected[0], 3 * expected[1], 0.5 * expected[2]])


def test_losses_have_the_gradients_of_their_formulas():
    a, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.rand(5, dtype=torch.float64)
    pairwise = partial(bradley_terry_loss, margin=labels, label_smoothing=0.2, center=0.3)
    assert torch.autograd.gradcheck(pairwise, (a, b))
    pointwise = partial(pointwise_loss, labels=labels, weights=(0.3, 2.0), label_smoothing=0.2)
    assert torch.autograd.gradcheck(pointwise, (a,))


def test_figures_of_pairs_by_hand():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 3.0, 3.0, -1.0])
    got = pairwise_figures(chosen, rejected)
    gaps = [1.0, -1.0, 0.0, 1.0]
    assert got["loss"] == pytest.approx(sum(math.log(1 + math.exp(-g)) for g in gaps) / 4)
    assert got["accuracy"] == 2.5 / 4  # a tie counts one half
    # over 0, 3, 3, -1: 1 and 2 beat two each, 3 beats two and ties with two, 0 beats one, ties one
    assert got["auc"] == (2 + 2 + (2 + 1) + (1 + 0.5)) / 16
    assert (got["gap"], got["gap_std"]) == (0.25, pytest.approx(math.sqrt(0.6875)))
    sure = 1 / (1 + math.exp(-1))  # three times, right twice; once 0.5, half right
    assert got["reliability"]["said"] == pytest.approx([0.5, sure])
    assert got["reliability"]["found"] == pytest.approx([0.5, 2 / 3])
    assert got["reliability"]["count"] == [1, 3]
    assert got["ece"] == pytest.approx(0.75 * (sure - 2 / 3))
    assert sum(got["histogram"]["good"]) == sum(got["histogram"]["bad"]) == 4


def test_figures_of_labels_against_brute_force():
    torch.manual_seed(3)
    scores = torch.randn(301).mul(4).round().div(4)  # many ties
    labels = (torch.rand(301) < 0.2).float()
    got = pointwise_figures(scores, labels)
    good, bad = scores[labels == 1].double(), scores[labels == 0].double()
    wins = (good[:, None] > bad).double() + 0.5 * (good[:, None] == bad).double()
    assert got["auc"] == pytest.approx(wins.mean().item(), abs=1e-12)
    recalls = ((good > 0).double().mean() + (bad <= 0).double().mean()) / 2
    assert got["balanced_accuracy"] == pytest.approx(recalls.item())
    assert got["accuracy"] == pytest.approx(((scores > 0) == (labels == 1)).double().mean().item())
    gaps = good[:, None] - bad
    assert got["gap"] == pytest.approx(gaps.mean().item())
    assert got["gap_std"] == pytest.approx(gaps.std(correction=0).item())
    assert got["loss"] == pytest.approx(pointwise_loss(scores, labels).mean().item())
    cross = -labels * scores.sigmoid().log() - (1 - labels) * (-scores).sigmoid().log()
    assert got["loss"] == pytest.approx(cross.mean().item(), rel=1e-5)


def test_figures_without_both_labels_are_nan():
    got = pointwise_figures(torch.tensor([1.0, -1.0]), torch.ones(2))
    assert got["accuracy"] == 0.5
    assert all(math.isnan(got[name]) for name in ("auc", "balanced_accuracy", "gap", "gap_std"))


def test_figures_go_by_the_kind_of_examples():
    scores = torch.tensor([1.0, 2.0, 0.5, 3.0])
    pairs = [Pair([1], [2]), Pair([3], [4])]
    assert figures_of_scores(scores, pairs) == pairwise_figures(scores[:2], scores[2:])
    labels = [0.0, 1.0, 1.0, 0.0]
    rows = [Labelled([1], label) for label in labels]
    assert figures_of_scores(scores, rows) == pointwise_figures(scores, torch.tensor(labels))


def test_calibration_by_hand():
    said = torch.tensor([0.05, 0.05, 0.62, 0.68, 0.85, 0.95, 1.0])
    found = torch.tensor([0.0, 1.0, 1.0, 0.25, 1.0, 1.0, 1.0])  # soft labels are outcomes too
    got = calibration(said.double(), found.double())
    assert got["reliability"]["said"] == pytest.approx([0.05, 0.65, 0.85, 0.975])
    assert got["reliability"]["found"] == pytest.approx([0.5, 0.625, 1.0, 1.0])
    assert got["reliability"]["count"] == [2, 2, 1, 2]
    assert got["ece"] == pytest.approx((2 * 0.45 + 2 * 0.025 + 0.15 + 2 * 0.025) / 7)


def test_histograms_share_their_edges():
    got = histogram(torch.tensor([0.0, 0.9, 2.0]), torch.tensor([1.1, 2.0]), bins=2)
    assert got == {"edges": [0.0, 1.0, 2.0], "good": [2.0, 1.0], "bad": [0.0, 2.0]}
    alike = histogram(torch.ones(3), torch.ones(1), bins=2)
    assert alike["edges"] == [0.5, 1.0, 1.5] and sum(alike["good"]) == 3
