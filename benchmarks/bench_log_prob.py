"""log_prob and kl from logits that already exist: bound by reading them.

ours    pk.log_prob with entropy, or pk.kl
copy    one read and one write of [N, V]
eager   log_softmax in float32, gather, entropy (or the sum of p times log-ratios)
trl     TRL's selective_log_softmax, log p alone
liger_kernel  Liger's cross entropy, a sum over the rows, on logits of its own, which it overwrites
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

import perl_kernels as pk
from benchmarks._bars import FORWARD, TRAIN
from benchmarks._measure import (
    Case,
    Compared,
    Contest,
    at_rows,
    first,
    gpu_peer,
    measure,
    normal,
    some_rows,
    with_gradients,
    without_gradients,
)
from perl_kernels.log_prob import reference

ROOM = "log_prob"
COMPILED = f"{TRAIN}, compiled"
PEERS = ("trl.trainer.utils",)
KL = f"kl, {TRAIN}"


SHAPES = {
    "quick": [(256, 32000), (100, 50257)],
    "full": [(1024, 32000), (300, 50257), (512, 128000)],
    "tiny": [(9, 503)],
    "h200": [(8192, 131072)],
}


def cases(preset: str) -> list[Case]:
    device = "cuda" if preset == "h200" else "cpu"
    dtypes = ("bf16", "fp32") if preset in ("quick", "full") else ("bf16",)
    found = [
        Case(ROOM, check, dict(zip("NV", shape, strict=True)), dtype, device)
        for dtype in dtypes
        for check in (FORWARD, TRAIN, KL)
        for shape in SHAPES[preset]
    ]
    if preset == "h200":  # not weighed: it would compile again
        found.append(replace(found[0], check=COMPILED, weighed=False))
    return found


def test_log_prob(case, record):
    record(measure, contest, case)


def contest(case: Case) -> Contest:
    n, v = case.shape["N"], case.shape["V"]
    torch.manual_seed(0)
    logits = normal(case, n, v, std=2.0)
    ref_logits = (logits + normal(case, n, v, std=0.3)).to(logits.dtype)
    other = torch.empty_like(logits)
    logits.requires_grad_()
    target = torch.randint(0, v, (n,), device=case.device)
    coefficient = torch.randn(n, device=case.device)
    missing = {}

    def call(forward):
        if case.check == FORWARD:
            return without_gradients(forward)
        return with_gradients(lambda: first(forward()), [logits], [coefficient])

    copy = without_gradients(lambda: other.copy_(logits))
    if case.check == KL:
        run = {
            "ours": call(lambda: pk.kl(logits, ref_logits)),
            "copy": copy,
            "eager": call(lambda: reference.kl(logits, ref_logits)),
        }
    else:
        run = {
            "ours": call(lambda: _ours(logits, target)),
            "copy": copy,
        }
        if case.check == COMPILED:
            compiled = torch.compile(reference.log_prob)
            run["eager compiled"] = call(lambda: compiled(logits, target))
        else:
            run["eager"] = call(lambda: reference.log_prob(logits, target))
            _add_peers(run, missing, case, call, logits, target)

    def compare() -> list[Compared]:
        rows = some_rows(n, case.device)
        everything = (logits, ref_logits, target, coefficient)

        def plain(dtype: torch.dtype) -> dict[str, Tensor]:
            definition = reference.kl if case.check == KL else reference.log_prob
            return _results(definition, *at_rows(rows, dtype, *everything), case.check)

        found = _results(pk.kl if case.check == KL else _ours, *everything, case.check)
        torchs, exact = plain(logits.dtype), plain(torch.float64)
        scales = {}
        if case.check == KL:  # its terms are log-ratios, and it is about half their mean square
            scales["kl"] = (2 * exact["kl"].mean().item()) ** 0.5
        return [
            Compared(
                name, found[name][rows], torchs[name], exact[name], name == "log_prob",
                scales.get(name),
            )
            for name in exact
        ]  # fmt: skip

    one = logits.numel() * logits.element_size()
    passes = {FORWARD: 1, TRAIN: 3, COMPILED: 3, KL: 5}[case.check]  # over [N, V], at the least
    return Contest(run, compare, bytes=passes * one, copied_bytes=2 * one, missing=missing)


def _add_peers(run, missing, case, call, logits, target) -> None:
    if find_spec("trl") is None:
        missing["trl"] = "trl is not installed"
    else:
        from trl.trainer.utils import selective_log_softmax

        run["trl"] = call(lambda: selective_log_softmax(logits, target))
    functional = "liger_kernel.transformers.functional"
    liger = gpu_peer(case, functional, "liger_cross_entropy", missing)
    if not liger:
        return
    own = logits.detach().clone().requires_grad_(case.check != FORWARD)

    def summed() -> Tensor:
        return liger(own, target, reduction="sum")

    whole = with_gradients(summed, [own], [None])
    run["liger_kernel"] = whole if own.requires_grad else without_gradients(summed)


def _ours(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return pk.log_prob(logits, target, return_entropy=True)


def _results(function, logits, ref_logits, target, coefficient, check) -> dict[str, Tensor]:
    z = logits.detach().requires_grad_(check != FORWARD)
    if check == KL:
        found = {"kl": function(z, ref_logits)}
    else:
        found = dict(zip(("log_prob", "entropy"), function(z, target), strict=True))
    if check != FORWARD:
        outcome = next(iter(found.values()))
        found["dlogits"] = torch.autograd.grad(outcome, z, coefficient.to(outcome.dtype))[0]
    return {name: t.detach() for name, t in found.items()}
