"""The rows of the head's route "blocks" on a GPU by themselves, bound by their traffic.

A block of float32 logits becomes a row's statistics and, in place, its gradient in 16 bits.

ours    Triton's kernel on a GPU, plain torch elsewhere
cuda    the kernel of csrc/cuda; one of the two goes when a GPU has measured both
copy    one read and one write of the logits
"""

from __future__ import annotations

import torch
from torch import Tensor

import perl_kernels as pk
from benchmarks._measure import Case, Compared, Contest, Run, measure, some_rows, without_gradients
from perl_kernels import _library
from perl_kernels.log_prob import reference

ROOM = "head_rows"
STATS, GRADIENT, WITH_KL = "statistics", "with gradient", "with gradient, exact KL"
KL_COEF = 0.1


def cases(preset: str) -> list[Case]:
    if preset == "h200":  # as many rows as a block has
        sizes, dtype, device = {STATS: 384, GRADIENT: 384, WITH_KL: 192}, "bf16", "cuda"
        v = 131072
    elif preset == "tiny":
        sizes, dtype, device, v = {STATS: 7, GRADIENT: 7, WITH_KL: 5}, "fp32", "cpu", 307
    else:
        return []  # the CPU's kernels have no such part
    return [Case(ROOM, check, {"N": n, "V": v}, dtype, device) for check, n in sizes.items()]


def test_head_rows(case, record):
    record(measure, contest, case)


def contest(case: Case) -> Contest:
    torch.manual_seed(0)
    n, v = case.shape.values()
    sides = 2 if case.check == WITH_KL else 1
    logits = 2 * torch.randn(sides * n, v, device=case.device)
    target = torch.randint(0, v, (n,), device=case.device)
    d_log_prob = torch.randn(n, device=case.device)
    d_kl = torch.full_like(d_log_prob, KL_COEF) if sides == 2 else None
    trains, missing = case.check != STATS, {}

    def plain(dtype: torch.dtype, rows: Tensor) -> list[Tensor]:
        z = logits[rows].to(dtype).requires_grad_()
        log_prob, _ = reference.log_prob(z, target[rows])
        loss = (d_log_prob[rows] * log_prob).sum()
        if sides == 2:
            loss = loss + KL_COEF * reference.kl(z, logits[n + rows].to(dtype)).sum()
        return [log_prob.detach(), *(torch.autograd.grad(loss, z) if trains else ())]

    def by(backend: str) -> Run:
        from perl_kernels._softmax import empty_stats
        from perl_kernels.head import triton as kernels

        stats = empty_stats(logits, n, True, sides == 2)
        asked = [column if column.numel() else None for column in stats]
        dz = logits.view(case.torch_dtype)[: n if trains else 0, :v]

        def run() -> tuple[Tensor, ...]:
            with pk.use_backend(backend):
                kernels._write_rows(
                    logits, None, target, *asked, d_log_prob, d_kl, dz, n, sides, 1.0, 0.0, -100
                )
            return (stats.log_prob, dz) if trains else (stats.log_prob,)

        return run

    if case.device == "cpu":
        run = {"ours": lambda: plain(torch.float32, torch.arange(n))}
    else:
        run = {"ours": by("triton"), "cuda": by("cuda")}
        if _library.missing["cuda"]:
            del run["cuda"]
            missing["cuda"] = _library.missing["cuda"]
    other, kept = torch.empty_like(logits), logits.clone()
    run["copy"] = without_gradients(lambda: other.copy_(logits))

    def compare() -> list[Compared]:
        rows, found = some_rows(n, case.device), []
        torchs, exact = plain(torch.float32, rows), plain(torch.float64, rows)
        for which in ("ours", "cuda"):
            if which not in run:
                continue
            results = [t[rows] for t in run[which]()]
            logits.copy_(kept)
            for name, one, p, e in zip(("log_prob", "dz"), results, torchs, exact, strict=False):
                rounded = p.to(one.dtype)
                found.append(Compared(f"{name} of {which}", one, rounded, e, name == "log_prob"))
        return found

    written = torch.finfo(case.torch_dtype).bits // 8 if trains else 0
    return Contest(
        run=run,
        compare=compare,
        bytes=(4 * sides * (1 + trains) + written) * n * v,
        copied_bytes=2 * 4 * logits.numel(),
        missing=missing,
    )
