"""Losses and metrics of reward models against their definitions; reward functions' checks."""

from __future__ import annotations

import math

import pytest
import torch

from perl.config import UsageError
from perl.reward import (
    bradley_terry_loss,
    classification_metrics,
    load_reward_function,
    pairwise_accuracy,
    pointwise_loss,
)


def test_bradley_terry_by_hand_and_far_out():
    chosen = torch.tensor([1.0, 0.0, -200.0, 200.0])
    rejected = torch.tensor([0.0, 0.0, 200.0, -200.0])
    expected = [math.log(1 + math.exp(-1)), math.log(2), 400.0, 0.0]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(expected)


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
    assert torch.autograd.gradcheck(bradley_terry_loss, (a, b))
    assert torch.autograd.gradcheck(lambda x: pointwise_loss(x, labels, (0.3, 2.0)), (a,))


def test_pairwise_accuracy_counts_ties_half():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 3.0, 3.0, -1.0])
    assert pairwise_accuracy(chosen, rejected) == 2.5 / 4


def test_auc_and_balanced_accuracy_against_brute_force():
    torch.manual_seed(3)
    scores = torch.randn(301).mul(4).round().div(4)  # many ties
    labels = (torch.rand(301) < 0.2).float()
    got = classification_metrics(scores, labels)
    good, bad = scores[labels == 1], scores[labels == 0]
    wins = (good[:, None] > bad).double() + 0.5 * (good[:, None] == bad).double()
    assert got["auc"] == pytest.approx(wins.mean().item(), abs=1e-12)
    recalls = ((good > 0).double().mean() + (bad <= 0).double().mean()) / 2
    assert got["balanced_accuracy"] == pytest.approx(recalls.item())
    assert got["accuracy"] == pytest.approx(((scores > 0) == (labels == 1)).double().mean().item())


def test_metrics_without_both_labels_are_nan():
    got = classification_metrics(torch.tensor([1.0, -1.0]), torch.ones(2))
    assert got["accuracy"] == 0.5
    assert math.isnan(got["auc"]) and math.isnan(got["balanced_accuracy"])


def write(tmp_path, body: str) -> str:
    (tmp_path / "f.py").write_text(body)
    return f"{tmp_path / 'f.py'}:score"


def test_a_reward_function_is_loaded_and_called(tmp_path):
    function = load_reward_function(
        write(
            tmp_path,
            "def score(prompts, completions):\n"
            "    return [len(p) + 10 * len(c) for p, c in zip(prompts, completions)]\n",
        )
    )
    assert function(["a", "bb"], ["x", ""]) == [11.0, 2.0]


@pytest.mark.parametrize(
    "target, words",
    [
        ("score", "want FILE.py:NAME"),
        ("absent.py:score", "absent.py does not exist"),
        ("f.py:", "want FILE.py:NAME"),
    ],
)
def test_targets_that_name_no_function(target, words):
    with pytest.raises(UsageError, match=words):
        load_reward_function(target)


@pytest.mark.parametrize(
    "body, words",
    [
        ("def scored(): pass", "has no function score"),
        ("def score(:", "fails to import: SyntaxError"),
        ("import nowhere_to_be_found", "fails to import: ModuleNotFoundError"),
    ],
)
def test_files_that_do_not_hold_it(tmp_path, body, words):
    with pytest.raises(UsageError, match=words):
        load_reward_function(write(tmp_path, body))


@pytest.mark.parametrize(
    "value, words",
    [
        ("[1.0]", "1 rewards for 2 completions"),
        ("[1.0, float('nan')]", "nan for completion 'y'"),
        ("None", "no list of numbers"),
        ("['high', 1]", "no list of numbers"),
    ],
)
def test_wrong_return_values_are_refused(tmp_path, value, words):
    function = load_reward_function(write(tmp_path, f"def score(p, c): return {value}"))
    with pytest.raises(UsageError, match=words):
        function(["a", "b"], ["x", "y"])
