"""policy_loss (the REINFORCE loss with its gradient made in forward) beside the product and eager.

ours    pk.policy_loss; with exact KL: to the reference's hidden states, kl_coef 0.1
blocks  the same by the head's other route, on a GPU; its rows by Triton
blocks, cuda  its rows by CUDA C++
mm      hidden @ weight.T alone, once and forward only
eager   the same loss from [N, V] log-probabilities in float32; autograd's backward
trl     the loss on top of TRL's chunked log p (it has no exact KL)
"""

from __future__ import annotations

import torch
from torch import Tensor

import perl_kernels as pk
from benchmarks._bars import POLICY_KL, TRAIN
from benchmarks._head import by_blocks, eager_kl, eager_log_prob, head_cases, inputs, trl_log_prob
from benchmarks._measure import (
    Case,
    Compared,
    Contest,
    at_rows,
    measure,
    some_rows,
    with_gradients,
    without_gradients,
)
from perl_kernels.head import reference

ROOM = "policy_loss"
PEERS = ("trl.trainer.utils",)
KL_COEF = 0.1


def cases(preset: str) -> list[Case]:
    return head_cases(ROOM, (TRAIN, POLICY_KL), preset)


def test_policy_loss(case, record):
    record(measure, contest, case)


def contest(case: Case) -> Contest:
    hidden, ref_hidden, weight, target, advantage = inputs(case)
    exact_kl = case.check == POLICY_KL
    missing = {}

    def call(forward):
        return with_gradients(forward, [hidden], [torch.ones((), device=case.device)])

    def ours() -> Tensor:
        return _ours(hidden, ref_hidden, weight, target, advantage, exact_kl, "mean")[0]

    def eager() -> Tensor:
        if not exact_kl:
            return (-advantage * eager_log_prob(hidden, weight, target)).mean()
        kl, log_prob = eager_kl(hidden, ref_hidden, weight, target)
        return (-advantage * log_prob + KL_COEF * kl).mean()

    run = {
        "ours": call(ours),
        "mm": without_gradients(lambda: hidden @ weight.T),
        "eager": call(eager),
    }
    run |= by_blocks(case, run["ours"], missing)
    if not exact_kl:
        trl, why = trl_log_prob()
        missing |= why
        if trl:
            run["trl"] = call(lambda: (-advantage * trl(hidden, weight, target)[0]).mean())

    def compare() -> list[Compared]:
        rows = some_rows(len(target), case.device)

        def plain(dtype: torch.dtype) -> dict[str, Tensor]:
            tensors = at_rows(rows, dtype, hidden, ref_hidden, target, advantage)
            return _results(_plain, weight.to(dtype), *tensors, exact_kl)

        found = _results(_ours, weight, hidden, ref_hidden, target, advantage, exact_kl)
        torchs, exact = plain(hidden.dtype), plain(torch.float64)
        return [
            Compared(name, found[name][rows], torchs[name], exact[name], name == "log_prob")
            for name in exact
        ]

    n, h, v = case.shape.values()
    return Contest(run, compare, (3 if exact_kl else 2) * 2.0 * n * h * v, missing=missing)


def _ours(hidden, ref_hidden, weight, target, advantage, exact_kl, reduction="sum"):
    found = pk.policy_loss(
        hidden, weight, target, advantage, ref_hidden=ref_hidden if exact_kl else None,
        kl_coef=KL_COEF if exact_kl else 0.0, reduction=reduction,
    )  # fmt: skip
    return found.loss, found.log_prob


def _plain(hidden, ref_hidden, weight, target, advantage, exact_kl):
    loss = reference.policy_loss(
        hidden, weight, target, advantage, ref_hidden=ref_hidden if exact_kl else None,
        kl_coef=KL_COEF if exact_kl else 0.0, reduction="sum",
    )  # fmt: skip
    with torch.no_grad():
        return loss, reference.linear_log_prob(hidden, weight, target)[0]


def _results(function, weight, hidden, ref_hidden, target, advantage, exact_kl):
    """Of the summed loss: the gradient of a row then needs no other row."""
    hidden = hidden.detach().requires_grad_()
    loss, log_prob = function(hidden, ref_hidden, weight, target, advantage, exact_kl)
    return {"log_prob": log_prob.detach(), "dhidden": torch.autograd.grad(loss, hidden)[0]}
