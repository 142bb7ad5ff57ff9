"""linear_log_prob (log p and entropy from hidden states) beside the bare product and eager torch.

ours    pk.linear_log_prob, entropy too
blocks  the same by the head's other route, on a GPU
mm      hidden @ weight.T alone, forward only: writing the logits and nothing more
eager   mm, float, logsumexp, gather; autograd's backward
trl     TRL's chunked log p and entropy
"""

from __future__ import annotations

import torch
from torch import Tensor

import perl_kernels as pk
from benchmarks._bars import FORWARD, TRAIN
from benchmarks._head import by_blocks, eager_log_prob, head_cases, inputs, trl_log_prob
from benchmarks._measure import (
    Case,
    Compared,
    Contest,
    at_rows,
    first,
    measure,
    some_rows,
    with_gradients,
    without_gradients,
)
from perl_kernels.head import reference

ROOM = "linear_log_prob"
PEERS = ("trl.trainer.utils",)


def cases(preset: str) -> list[Case]:
    return head_cases(ROOM, (FORWARD, TRAIN), preset)


def test_linear_log_prob(case, record):
    record(measure, contest, case)


def contest(case: Case) -> Contest:
    hidden, _, weight, target, coefficient = inputs(case)
    trains = case.check == TRAIN

    def call(forward):
        # the gradient of log p with a coefficient a row, as a loss on top would send it
        picked = with_gradients(lambda: first(forward()), [hidden], [coefficient])
        return picked if trains else without_gradients(forward)

    run = {
        "ours": call(lambda: _ours(hidden, weight, target)),
        "mm": without_gradients(lambda: hidden @ weight.T),
        "eager": call(lambda: eager_log_prob(hidden, weight, target)),
    }
    run |= by_blocks(case, run["ours"])
    trl, missing = trl_log_prob()
    if trl:
        run["trl"] = call(lambda: trl(hidden, weight, target))

    def compare() -> list[Compared]:
        rows = some_rows(len(target), case.device)

        def plain(dtype: torch.dtype) -> dict[str, Tensor]:
            h, t, c = at_rows(rows, dtype, hidden, target, coefficient)
            return _results(reference.linear_log_prob, h, weight.to(dtype), t, c, trains)

        found = _results(_ours, hidden, weight, target, coefficient, trains)
        torchs, exact = plain(hidden.dtype), plain(torch.float64)
        return [
            Compared(name, found[name][rows], torchs[name], exact[name], name == "log_prob")
            for name in exact
        ]

    n, h, v = case.shape.values()
    return Contest(run, compare, (2 if trains else 1) * 2.0 * n * h * v, missing=missing)


def _ours(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return pk.linear_log_prob(hidden, weight, target, return_entropy=True)


def _results(function, hidden, weight, target, coefficient, trains) -> dict[str, Tensor]:
    hidden = hidden.detach().requires_grad_(trains)
    log_prob, entropy = function(hidden, weight, target)
    found = {"log_prob": log_prob.detach(), "entropy": entropy.detach()}
    if trains:
        found["dhidden"] = torch.autograd.grad(log_prob, hidden, coefficient.to(log_prob.dtype))[0]
    return found
