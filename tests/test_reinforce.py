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


def test_estimators_of_the_kl_by_hand():
    log_prob, ref_log_prob = torch.tensor([0.5, 0.2]).log(), torch.tensor([0.25, 0.4]).log()
    ln2 = math.log(2.0)
    # ratios of the anchor: 1/2 and 2
    torch.testing.assert_close(reinforce.k1(log_prob, ref_log_prob), torch.tensor([ln2, -ln2]))
    wanted = torch.tensor([0.5 - 1 + ln2, 2 - 1 - ln2])
    torch.testing.assert_close(reinforce.k3(log_prob, ref_log_prob), wanted)


def test_the_kl_of_a_sequence_is_at_its_last_token():
    kl = torch.tensor([[0.5, -0.25, 1.0], [2.0, NAN, NAN]])
    assert reinforce.at_last_token(kl, MASK).tolist() == [[0.0, 0.0, 1.25], [2.0, 0.0, 0.0]]


def test_penalties_by_hand():
    scores, ended = torch.tensor([2.0, -1.0]), torch.tensor([True, False])
    found = reinforce.penalized(scores, MASK, ended, length_penalty=0.25, no_end_penalty=4.0)
    assert found.tolist() == [2.0 - 0.75, -1.0 - 0.25 - 4.0]


def test_the_other_answers_by_hand():
    # two prompts, three answers each: prompt 0 got 1, 5, 3 and prompt 1 got 10, 40, 70
    totals = torch.tensor([1.0, 10.0, 5.0, 40.0, 3.0, 70.0])
    assert reinforce.leave_one_out(totals, 3).tolist() == [4.0, 55.0, 2.0, 40.0, 3.0, 25.0]


def test_what_the_ratios_say_by_hand():
    ratio = torch.tensor([[1.5, 1.5, 0.5], [0.5, 0.5, 9.0]])
    sampled = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, NAN]])
    advantage = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 0.0, 1.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    facts = reinforce.ratio_figures(sampled + ratio.log(), sampled, advantage, mask, 0.2)
    # held: a gain above 1.2, a loss below 0.8; two are still to be made good, one has no gradient
    assert facts["clip_fraction"] == pytest.approx(2 / 5)
    wanted = (2 * (0.5 - math.log(1.5)) + 3 * (-0.5 - math.log(0.5))) / 5
    assert facts["approx_kl"] == pytest.approx(wanted, rel=1e-5)
    assert reinforce.ratio_figures(sampled, sampled, advantage, mask, 0.2) == {
        "clip_fraction": 0.0, "approx_kl": 0.0,
    }  # fmt: skip


def test_an_adaptive_beta_by_hand():
    adapted = reinforce.adapted
    assert adapted(0.1, 5.5, 5.0, 10) == pytest.approx(0.1 * (1 + 0.1 / 10))
    assert adapted(0.1, 50.0, 5.0, 10) == pytest.approx(0.1 * 1.02)  # held to 0.2
    assert adapted(0.1, -3.0, 5.0, 20) == pytest.approx(0.1 * 0.99)
    assert adapted(0.1, 5.0, 5.0, 10) == 0.1
    assert adapted(0.999, 50.0, 5.0, 1) == 1.0


def test_figures_of_a_step_are_means_over_the_updates_that_have_them():
    updates = [{"loss": 1.0, "mean_abs_dlogp": 0.5}, {"loss": 4.0}]
    assert reinforce.over_updates(updates) == {"loss": 2.5, "mean_abs_dlogp": 0.5}


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


class Tabular:
    """All answers of a tabular policy over 3 tokens, token 0 ending it, at most 3 tokens long."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        prefixes = [p for n in range(3) for p in itertools.product((1, 2), repeat=n)]
        state_of = {prefix: i for i, prefix in enumerate(prefixes)}
        answers = [(*p, 0) for p in prefixes] + list(itertools.product((1, 2), repeat=3))
        self.logits, self.anchor = random(7, 3).requires_grad_(), random(7, 3).log_softmax(-1)
        self.baseline, self.scores = random(7), random(len(answers))
        self.mask = torch.tensor([[t < len(y) for t in range(3)] for y in answers])
        self.states = torch.tensor([[state_of.get(y[:t], 0) for t in range(3)] for y in answers])
        tokens = torch.tensor([[*y, *[0] * (3 - len(y))] for y in answers])
        self.log_p = self.logits.log_softmax(-1)
        self.log_prob = self.log_p[self.states, tokens].masked_fill(~self.mask, 0.0)
        self.ref_log_prob = self.anchor[self.states, tokens].masked_fill(~self.mask, 0.0)
        self.probability = self.log_prob.sum(1).exp()
        # of each answer's states, over the vocabulary
        kl = (self.log_p.exp() * (self.log_p - self.anchor)).sum(-1)
        self.exact_kl = kl[self.states].masked_fill(~self.mask, 0.0)

    def gradient(self, x):
        return torch.autograd.grad(x, self.logits, retain_graph=True)[0]

    def objective(self, beta):
        """J = Σ_y π(y) [(1 − β) r(y) − β log(π(y) / π_anchor(y))]"""
        log_ratio = (self.log_prob - self.ref_log_prob).sum(1)
        return (self.probability * ((1 - beta) * self.scores - beta * log_ratio)).sum()

    def returns(self, kl, beta, per="token"):
        if per == "sequence":
            kl = reinforce.at_last_token(kl, self.mask)
        rewards = reinforce.token_rewards(
            self.scores, kl.detach(), self.mask, reward_coef=1 - beta, kl_coef=beta
        )
        return reinforce.returns(rewards, self.mask)

    def expected(self, of_answers):
        """The mean over all answers, with their probabilities as constants."""
        return (self.probability.detach() * of_answers).sum()


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "exact"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_expected_gradient_is_that_of_the_objective(beta, estimator, per):
    """J is differentiated by autograd; the estimator's gradient is averaged over all answers with
    their probabilities. The baseline depends on the state, which must not matter. With the exact KL
    each state's own has its gradient in the loss.
    """
    t = Tabular()
    assert t.probability.sum().item() == pytest.approx(1.0)
    kl = reinforce.k1(t.log_prob, t.ref_log_prob) if estimator == "k1" else t.exact_kl
    advantage = reinforce.advantages(t.returns(kl, beta, per), t.baseline[t.states], t.mask)
    in_loss = beta * t.exact_kl if estimator == "exact" else 0.0
    loss = t.expected((-advantage * t.log_prob + in_loss).sum(1))
    torch.testing.assert_close(-t.gradient(loss), t.gradient(t.objective(beta)))


def test_leaving_one_out_keeps_the_expected_gradient():
    """Two answers to one prompt, drawn apart: all pairs of them."""
    t = Tabular()
    returns = t.returns(reinforce.k1(t.log_prob, t.ref_log_prob), 0.3)
    gradient = torch.zeros_like(t.logits)
    for pair in itertools.product(range(len(returns)), repeat=2):
        rows = list(pair)
        baseline = reinforce.leave_one_out(returns[rows, 0], 2)[:, None]
        advantage = reinforce.advantages(returns[rows], baseline, t.mask[rows])
        loss = (-advantage * t.log_prob[rows]).sum(1).mean()
        gradient -= t.probability[rows].prod().detach() * t.gradient(loss)
    torch.testing.assert_close(gradient, t.gradient(t.objective(0.3)))


def test_what_is_said_of_the_other_estimators():
    """k1 in the loss has no gradient, k3 there that of the KL the other way round; k3 as a reward
    misses that of its own state by just this."""
    t = Tabular()
    zero = torch.zeros_like(t.logits)
    k1 = reinforce.k1(t.log_prob, t.ref_log_prob).masked_fill(~t.mask, 0.0)
    k3 = reinforce.k3(t.log_prob, t.ref_log_prob).masked_fill(~t.mask, 0.0)
    assert t.expected(k1.sum(1)).item() == pytest.approx(t.expected(k3.sum(1)).item())
    torch.testing.assert_close(t.gradient(t.expected(k1.sum(1))), zero, rtol=0, atol=1e-12)
    reverse = (t.anchor.exp() * (t.anchor - t.log_p)).sum(-1)[t.states].masked_fill(~t.mask, 0.0)
    of_reverse = t.gradient(t.expected(reverse.sum(1)))
    torch.testing.assert_close(t.gradient(t.expected(k3.sum(1))), of_reverse)
    advantage = reinforce.advantages(t.returns(k3, 1.0), 0.0, t.mask)
    as_reward = t.gradient(t.expected((advantage * t.log_prob).sum(1)))
    torch.testing.assert_close(as_reward, t.gradient(t.objective(1.0)) + of_reverse)
    assert of_reverse.norm() > 0.1


def test_one_clipped_step_by_hand():
    """h = 1, W = (ln 3, 0): p = (3/4, 1/4). Token 0, drawn where it had 1/2 and where it had 2/3.

    Ratios 3/2 and 9/8. With epsilon 0.2 a gain of the first is held at 1.2 and sends nothing; the
    second sends -A ratio d log p / dh = -A 9/8 ln 3 / 4.
    """
    hidden = torch.ones(1, 2, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64)
    token = torch.zeros(1, 2, dtype=torch.int64)
    advantage = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    sampled = torch.tensor([[1 / 2, 2 / 3]], dtype=torch.float64).log()
    out = pk.policy_loss(hidden, weight, token, advantage, old_log_prob=sampled, epsilon=0.2)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-(2.0 * 1.2 + 3.0 * 9 / 8) / 2, abs=1e-12)
    wanted = [0.0, -3.0 * 9 / 8 * math.log(3.0) / 4 / 2]
    assert hidden.grad.flatten().tolist() == pytest.approx(wanted, abs=1e-12)
    mask = torch.ones(1, 2, dtype=torch.bool)
    facts = reinforce.ratio_figures(out.log_prob, sampled, advantage, mask, 0.2)
    assert facts["clip_fraction"] == 0.5
