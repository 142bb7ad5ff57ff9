"""rms_norm beside what the models run, and torch's own: bound by reading and writing x.

ours    pk.rms_norm, the weight frozen
copy    one read and one write of x
eager   the definition in plain torch, as transformers' modules have it
torch   F.rms_norm
liger_kernel  Liger's, which makes the weight's gradient too; on a GPU
unsloth       Unsloth's, which writes dx over dy; on a GPU
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import perl_kernels as pk
from benchmarks._bars import FORWARD, TRAIN
from benchmarks._measure import (
    Case,
    Compared,
    Contest,
    gpu_peer,
    measure,
    normal,
    with_gradients,
    without_gradients,
)
from perl_kernels.rms_norm import reference

ROOM = "rms_norm"
PEERS = ()
SHAPES = {
    "quick": [(4096, 768), (1024, 2048)],
    "full": [(4096, 768), (4096, 2048), (1024, 4096)],
    "tiny": [(9, 48)],
    "h200": [(8192, 4096)],
}


def cases(preset: str) -> list[Case]:
    dtypes = ("bf16",) if preset == "h200" else ("bf16", "fp32")
    return [
        Case(ROOM, check, {"N": n, "D": d}, dtype, "cuda" if preset == "h200" else "cpu")
        for dtype in dtypes
        for check in (FORWARD, TRAIN)
        for n, d in SHAPES[preset]
    ]


def test_rms_norm(case, record):
    record(measure, contest, case)


def contest(case: Case) -> Contest:
    n, d = case.shape["N"], case.shape["D"]
    torch.manual_seed(0)
    x, dy = normal(case, n, d).requires_grad_(), normal(case, n, d)
    weight, other = normal(case, d), torch.empty_like(x)
    functions = {
        "ours": lambda: pk.rms_norm(x, weight),
        "eager": lambda: reference.rms_norm(x, weight),
        "torch": lambda: F.rms_norm(x, (d,), weight, 1e-6),
    }
    missing: dict[str, str] = {}
    liger = gpu_peer(case, "liger_kernel.transformers.functional", "liger_rms_norm", missing)
    if liger:
        functions["liger_kernel"] = lambda: liger(x, weight, 1e-6, 0.0, "llama", False)
    unsloth = gpu_peer(case, "unsloth.kernels.rms_layernorm", "Fast_RMS_Layernorm", missing)
    if unsloth:
        functions["unsloth"] = lambda: unsloth.apply(x, weight, 1e-6, False)
    if case.check == FORWARD:
        run = {name: without_gradients(f) for name, f in functions.items()}
    else:
        own = dict.fromkeys(functions, dy) | {"unsloth": dy.clone()}
        run = {name: with_gradients(f, [x], [own[name]]) for name, f in functions.items()}
    run["copy"] = without_gradients(lambda: other.copy_(x))

    def compare() -> list[Compared]:
        def results(function, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            x, weight, dy = (t.detach() for t in tensors)
            x.requires_grad_()
            y = function(x, weight)
            return y.detach(), torch.autograd.grad(y, x, dy)[0]

        given = (x, weight, dy)
        found = results(pk.rms_norm, *given)
        plain = results(reference.rms_norm, *given)
        exact = results(reference.rms_norm, *(t.double() for t in given))
        return [
            Compared(name, *values)
            for name, *values in zip(("y", "dx"), found, plain, exact, strict=True)
        ]

    one = x.numel() * x.element_size()
    passes = {FORWARD: 2, TRAIN: 5}[case.check]  # x and y; then x and dy in, dx out
    return Contest(run, compare, bytes=passes * one, copied_bytes=2 * one, missing=missing)
