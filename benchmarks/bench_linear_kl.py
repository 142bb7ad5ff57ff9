"""linear_kl (exact KL, log p and entropy from two hidden states) beside the product and eager.

ours    pk.linear_kl
blocks  the same by the head's other route, on a GPU; its rows by Triton
blocks, cuda  its rows by CUDA C++
mm      hidden @ weight.T alone, once and forward only
eager   two products, two log_softmax over [N, V] in float32; autograd's backward
"""

from __future__ import annotations

import torch
from torch import Tensor

import perl_kernels as pk
from benchmarks._bars import FORWARD, TRAIN
from benchmarks._head import by_blocks, eager_kl, head_cases, inputs
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

ROOM = "linear_kl"


def cases(preset: str) -> list[Case]:
    return head_cases(ROOM, (FORWARD, TRAIN), preset)


def test_linear_kl(case, record):
    record(measure, contest, case)


def contest(case: Case) -> Contest:
    hidden, ref_hidden, weight, target, coefficient = inputs(case)
    trains = case.check == TRAIN

    def call(forward):
        if not trains:
            return without_gradients(forward)
        return with_gradients(forward, [hidden], [coefficient, coefficient])

    def ours() -> tuple[Tensor, Tensor]:
        found = pk.linear_kl(hidden, ref_hidden, weight, target)
        return found.kl, found.log_prob

    run = {
        "ours": call(ours),
        "mm": without_gradients(lambda: hidden @ weight.T),
        "eager": call(lambda: eager_kl(hidden, ref_hidden, weight, target)),
    }
    missing = {}
    run |= by_blocks(case, run["ours"], missing)

    def compare() -> list[Compared]:
        rows = some_rows(len(target), case.device)

        def plain(dtype: torch.dtype) -> dict[str, Tensor]:
            tensors = at_rows(rows, dtype, hidden, ref_hidden, target, coefficient)
            return _results(_plain, weight.to(dtype), *tensors, trains)

        found = _results(_ours, weight, hidden, ref_hidden, target, coefficient, trains)
        torchs, exact = plain(hidden.dtype), plain(torch.float64)
        # the terms of a KL are log-ratios, and it is about half their mean square
        log_ratio = (2 * exact["kl"].mean().item()) ** 0.5
        scales = {"kl": log_ratio}
        return [
            Compared(
                name, found[name][rows], torchs[name], exact[name], name == "log_prob",
                scales.get(name),
            )
            for name in exact
        ]  # fmt: skip

    n, h, v = case.shape.values()
    return Contest(run, compare, (3 if trains else 2) * 2.0 * n * h * v, missing=missing)


def _ours(hidden, ref_hidden, weight, target) -> tuple[Tensor, Tensor]:
    found = pk.linear_kl(hidden, ref_hidden, weight, target)
    return found.kl, found.log_prob


def _plain(hidden, ref_hidden, weight, target) -> tuple[Tensor, Tensor]:
    log_prob, _ = reference.linear_log_prob(hidden, weight, target)
    return reference.linear_kl(hidden, ref_hidden, weight), log_prob


def _results(function, weight, hidden, ref_hidden, target, coefficient, trains):
    hidden = hidden.detach().requires_grad_(trains)
    kl, log_prob = function(hidden, ref_hidden, weight, target)
    found = {"log_prob": log_prob.detach(), "kl": kl.detach()}
    if trains:
        incoming = coefficient.to(kl.dtype)
        found["dhidden"] = torch.autograd.grad((kl, log_prob), hidden, (incoming, incoming))[0]
    return found
