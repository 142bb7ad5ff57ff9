"""linear_log_prob (log p and entropy from hidden states) beside the bare product and eager torch.

ours    pk.linear_log_prob, entropy too; on a GPU by tiles: a row's bits do not depend on its batch
blocks  the same by the head's other route, on a GPU; its rows by Triton
blocks, cuda       its rows by CUDA C++
mm      hidden @ weight.T alone, forward only: writing the logits and nothing more
eager   mm, float, logsumexp, gather; autograd's backward
trl     TRL's chunked log p and entropy
liger_kernel       Liger's fused linear cross entropy, a sum over the rows; on a GPU
cut_cross_entropy  Apple's, log p of each row; on a GPU
linear_cross_entropy  torch's own, by chunks; a sum over the rows

The measure "moved" is the share of rows whose log p has other bits in a smaller batch; none of ours
has, and ours over blocks is the price of that.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import perl_kernels as pk
from benchmarks._bars import FORWARD, TRAIN
from benchmarks._head import (
    by_blocks,
    eager_log_prob,
    head_cases,
    inputs,
    moved,
    trl_log_prob,
)
from benchmarks._measure import (
    OURS,
    Case,
    Compared,
    Contest,
    at_rows,
    first,
    gpu_peer,
    measure,
    some_rows,
    with_gradients,
    without_gradients,
)
from perl_kernels.head import reference

ROOM = "linear_log_prob"
COMPILED = f"{TRAIN}, compiled"
PEERS = ("trl.trainer.utils",)


def cases(preset: str) -> list[Case]:
    found = head_cases(ROOM, (FORWARD, TRAIN), preset)
    if preset == "h200":  # not weighed: it would compile again
        found.append(replace(found[-1], check=COMPILED, shape=found[0].shape, weighed=False))
    return found


def test_linear_log_prob(case, record):
    record(measure, contest, case)


def contest(case: Case) -> Contest:
    hidden, _, weight, target, coefficient = inputs(case)
    trains = TRAIN in case.check

    def call(forward):
        # the gradient of log p with a coefficient a row, as a loss on top would send it
        picked = with_gradients(lambda: first(forward()), [hidden], [coefficient])
        return picked if trains else without_gradients(forward)

    run = {
        "ours": call(lambda: _ours(hidden, weight, target)),
        "mm": without_gradients(lambda: hidden @ weight.T),
    }
    missing = {}
    run |= by_blocks(case, run["ours"], missing)
    if case.check == COMPILED:
        compiled = torch.compile(eager_log_prob)
        run["eager compiled"] = call(lambda: compiled(hidden, weight, target))
    else:
        run["eager"] = call(lambda: eager_log_prob(hidden, weight, target))
        trl, why = trl_log_prob()
        missing |= why
        if trl:
            run["trl"] = call(lambda: trl(hidden, weight, target))
        _add_torchs_own(run, missing, trains, hidden, weight, target)
        _add_gpu_peers(run, missing, case, call, hidden, weight, target)

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

    def measures() -> dict[str, float]:
        if trains:
            return {}

        def log_prob(hidden: Tensor, target: Tensor) -> Tensor:
            return pk.linear_log_prob(hidden, weight, target)

        with torch.no_grad():
            found = {OURS: log_prob} | by_blocks(case, log_prob, {})
            return {f"moved, {name}": moved(one, hidden, target) for name, one in found.items()}

    n, h, v = case.shape.values()
    flops = (2 if trains else 1) * 2.0 * n * h * v
    return Contest(run, compare, flops, missing=missing, measures=measures)


def _add_torchs_own(run, missing, trains, hidden, weight, target) -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        missing["linear_cross_entropy"] = "not in this torch"
        return
    options = torch.nn.LinearCrossEntropyOptions()

    def summed() -> Tensor:
        return F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options)

    run["linear_cross_entropy"] = (
        with_gradients(summed, [hidden], [None]) if trains else without_gradients(summed)
    )


def _add_gpu_peers(run, missing, case, call, hidden, weight, target) -> None:
    """Add the peers that run on a GPU alone."""
    cut = gpu_peer(case, "cut_cross_entropy", "linear_cross_entropy", missing)
    if cut:
        run["cut_cross_entropy"] = call(
            lambda: -cut(hidden, weight, target, reduction="none").float()
        )
    functional = "liger_kernel.transformers.functional"
    liger = gpu_peer(case, functional, "liger_fused_linear_cross_entropy", missing)
    if liger:

        def summed() -> Tensor:
            # it makes gradients in forward, for whatever requires them
            h = hidden if torch.is_grad_enabled() else hidden.detach()
            return liger(h, weight, target, reduction="sum")

        trains = case.check != FORWARD
        run["liger_kernel"] = (
            with_gradients(summed, [hidden], [None]) if trains else without_gradients(summed)
        )


def _ours(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return pk.linear_log_prob(hidden, weight, target, return_entropy=True)


def _results(function, hidden, weight, target, coefficient, trains) -> dict[str, Tensor]:
    hidden = hidden.detach().requires_grad_(trains)
    log_prob, entropy = function(hidden, weight, target)
    found = {"log_prob": log_prob.detach(), "entropy": entropy.detach()}
    if trains:
        found["dhidden"] = torch.autograd.grad(log_prob, hidden, coefficient.to(log_prob.dtype))[0]
    return found
