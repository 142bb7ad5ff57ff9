"""The arithmetic of the RL step: by hand, and against the gradient of the objective itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import perl_kernels as pk
from perl import reinforce

# Two answers: three tokens, and one token with two of padding that must not be read.
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
NAN = math.nan


def test_last_token_is_the_end_of_each_answer():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    assert reinforce.last_token(mask).int().tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_rewards_and_returns_by_hand():
    scores = torch.tensor([2.0, -1.0])
    kl = torch.tensor([[0.1, -0.2, 0.4], [1.0, NAN, NAN]])
    rewards = reinforce.token_rewards(scores, kl, MASK, reward_coef=0.9, kl_coef=0.1)
    # row 0: -0.01, +0.02, 1.8 - 0.04; row 1: -0.9 - 0.1
    wanted = torch.tensor([[-0.01, 0.02, 1.76], [-1.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, wanted)
    wanted = torch.tensor([[1.77, 1.78, 1.76], [-1.0, 0.0, 0.0]])
    torch.testing.assert_close(reinforce.returns(rewards, MASK), wanted)


def test_advantages_by_hand_and_whitened():
    returns = torch.tensor([[3.0, 2.0, 1.0], [6.0, NAN, NAN]])
    values = torch.tensor([[1.0, 1.0, 1.0], [3.0, NAN, NAN]], requires_grad=True)
    advantage = reinforce.advantages(returns, values, MASK)
    assert advantage.tolist() == [[2.0, 1.0, 0.0], [3.0, 0.0, 0.0]]
    assert not advantage.requires_grad
    # 2, 1, 0, 3: mean 1.5, variance (0.25 + 0.25 + 2.25 + 2.25) / 4 = 1.25
    s = math.sqrt(1.25)
    wanted = torch.tensor([[0.5 / s, -0.5 / s, -1.5 / s], [1.5 / s, 0.0, 0.0]])
    whitened = reinforce.advantages(returns, values, MASK, whiten=True)
    torch.testing.assert_close(whitened, wanted)
    assert reinforce.advantages(returns, 0.5, MASK)[0].tolist() == [2.5, 1.5, 0.5]
    same = reinforce.advantages(torch.ones(2, 3), 0.0, MASK, whiten=True)
    assert same.isfinite().all() and same.abs().max() == 0  # no spread: nothing to scale


def test_importance_weights_and_mismatch_by_hand():
    log_prob = torch.tensor(
        [[math.log(0.5), math.log(0.2), math.log(0.9)], [math.log(0.3), NAN, 1.0]]
    )
    sampled = torch.tensor(
        [[math.log(0.25), math.log(0.4), math.log(0.1)], [math.log(0.3), 0.0, NAN]]
    )
    log_prob.requires_grad_()
    weights = reinforce.importance_weights(log_prob, sampled, MASK, cap=3.0)
    # 0.5 / 0.25, 0.2 / 0.4, 0.9 / 0.1 = 9 cut to 3; 1
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5, 3.0], [1.0, 0.0, 0.0]]))
    assert not weights.requires_grad
    facts = reinforce.mismatch(log_prob, sampled, MASK)
    # ln 2, ln 2, ln 9, 0
    assert facts["max_abs_dlogp"] == pytest.approx(math.log(9.0), rel=1e-6)
    assert facts["mean_abs_dlogp"] == pytest.approx(math.log(36.0) / 4, rel=1e-6)


@pytest.mark.parametrize("cap, biased", [(100.0, False), (1.0, True)])
def test_importance_weights_take_the_bias_of_sampling_from_another_policy(cap, biased):
    """One token of four: the expected gradient, drawn from a policy that is not the one learnt."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
    sampled = torch.tensor([0.9, 0.4, -0.3, 0.0], dtype=torch.float64).log_softmax(-1)
    advantage = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    log_prob = logits.log_softmax(-1)
    (wanted,) = torch.autograd.grad((log_prob.exp() * advantage).sum(), logits, retain_graph=True)
    column, mask = (log_prob[:, None], sampled[:, None]), torch.ones(4, 1, dtype=torch.bool)
    weights = reinforce.importance_weights(*column, mask, cap)[:, 0]
    (found,) = torch.autograd.grad((sampled.exp() * weights * advantage * log_prob).sum(), logits)
    assert torch.allclose(found, wanted, atol=1e-12) != biased


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, 9.0]], requires_grad=True)
    returns = torch.tensor([[2.0, 2.0, 1.0], [1.0, 5.0, NAN]])
    loss = reinforce.value_loss(values, returns, MASK)
    assert loss.item() == 1 + 0 + 4 + 9
    loss.backward()
    # 2 (V - Z), and nothing at padding
    assert values.grad.tolist() == [[-2.0, 0.0, 4.0], [6.0, 0.0, 0.0]]


def test_masked_mean():
    x = torch.tensor([[1.0, 2.0, 3.0], [6.0, NAN, NAN]])
    assert reinforce.masked_mean(x, MASK) == 3.0
    assert reinforce.masked_mean(x, torch.zeros_like(MASK)) == 0.0


def test_one_policy_step_by_hand():
    """h = 1, W = (ln 3, 0): p = (3/4, 1/4). Token 0, reward 2, beta 0.25, anchor p = (1/2, 1/2).

    k1 = ln(3/4) - ln(1/2) = ln 1.5;  Z = 0.75 * 2 - 0.25 ln 1.5;  V = 0.5
    d log p / dh = W[0] - E[W] = ln 3 / 4, so dloss/dh = -(Z - V) ln 3 / 4
    """
    hidden = torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64)
    mask, token = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    log_prob = pk.linear_log_prob(hidden.detach(), weight, token)
    ref_log_prob = torch.full_like(log_prob, math.log(0.5))
    rewards = reinforce.token_rewards(
        torch.tensor([2.0], dtype=torch.float64), reinforce.k1(log_prob, ref_log_prob), mask,
        reward_coef=0.75, kl_coef=0.25,
    )  # fmt: skip
    returns = reinforce.returns(rewards, mask)
    advantage = reinforce.advantages(returns, 0.5, mask)
    out = pk.policy_loss(hidden, weight, token, advantage)
    out.loss.backward()
    wanted = 1.5 - 0.25 * math.log(1.5) - 0.5
    assert advantage.item() == pytest.approx(wanted, abs=1e-12)
    assert out.loss.item() == pytest.approx(-wanted * math.log(0.75), abs=1e-12)
    assert hidden.grad.item() == pytest.approx(-wanted * math.log(3.0) / 4, abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_expected_gradient_is_that_of_the_objective(beta):
    """All answers of a tabular policy over 3 tokens, token 0 ending it, at most 3 tokens long.

    J = Σ_y π(y) [(1 − β) r(y) − β log(π(y) / π_anchor(y))] is differentiated by autograd; the
    estimator's gradient is averaged over all answers with their probabilities. The baseline
    depends on the state, which must not matter.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prefixes = [p for n in range(3) for p in itertools.product((1, 2), repeat=n)]
    state_of = {prefix: i for i, prefix in enumerate(prefixes)}
    logits, anchor = random(7, 3).requires_grad_(), random(7, 3).log_softmax(-1)
    baseline = random(7)
    answers = [(*p, 0) for p in prefixes] + list(itertools.product((1, 2), repeat=3))
    scores = random(len(answers))
    mask = torch.tensor([[t < len(y) for t in range(3)] for y in answers])
    states = torch.tensor([[state_of.get(y[:t], 0) for t in range(3)] for y in answers])
    tokens = torch.tensor([[*y, *[0] * (3 - len(y))] for y in answers])

    log_prob = logits.log_softmax(-1)[states, tokens].masked_fill(~mask, 0.0)
    ref_log_prob = anchor[states, tokens].masked_fill(~mask, 0.0)
    probability = log_prob.sum(1).exp()
    assert probability.sum().item() == pytest.approx(1.0)
    objective = (1 - beta) * scores - beta * (log_prob - ref_log_prob).sum(1)
    (wanted,) = torch.autograd.grad((probability * objective).sum(), logits, retain_graph=True)

    kl = reinforce.k1(log_prob, ref_log_prob).detach()
    rewards = reinforce.token_rewards(scores, kl, mask, reward_coef=1 - beta, kl_coef=beta)
    advantage = reinforce.advantages(reinforce.returns(rewards, mask), baseline[states], mask)
    loss = (probability.detach() * (-advantage * log_prob).sum(1)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(-gradient, wanted)
