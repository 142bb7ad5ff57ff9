"""What the three benchmarks of the head share: inputs, contestants, and results at sampled rows."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

import perl_kernels as pk
from benchmarks._measure import Case, normal, shapes_for
from perl_kernels import _library
from perl_kernels.head import op

SHAPES = {
    "quick": [(256, 512, 32000), (100, 768, 50257)],
    "full": [(1024, 512, 32000), (1024, 1024, 128000), (512, 2048, 128000), (300, 768, 50257)],
    "small": [(32, 128, 8000)],
    "tiny": [(21, 16, 307)],
    "h200": [(8192, 4096, 131072), (8192, 4096, 151936)],
}
TRL_CHUNK = 32768  # columns, TRL's own choice


def head_cases(room: str, checks: tuple[str, ...], preset: str) -> list[Case]:
    dtypes = ("bf16", "fp32") if preset in ("quick", "full") else ("bf16",)
    device = "cuda" if preset == "h200" else "cpu"
    return [
        Case(room, check, dict(zip("NHV", shape, strict=True)), dtype, device)
        for dtype in dtypes
        for check in checks
        for shape in shapes_for(preset, dtype, SHAPES)
    ]


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden (N, H), ref_hidden (N, H), weight (V, H), target (N,), per-row coefficient (N,)."""
    n, h, v = (case.shape[letter] for letter in "NHV")
    torch.manual_seed(0)
    hidden = normal(case, n, h)
    ref_hidden = (hidden + normal(case, n, h, std=0.2)).to(hidden.dtype)
    weight = normal(case, v, h, std=2 * h**-0.5)  # logits with a spread of 2 nats
    target = torch.randint(0, v, (n,), device=case.device)
    coefficient = torch.randn(n, device=case.device)
    return hidden.requires_grad_(), ref_hidden, weight, target, coefficient


def eager_log_prob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log p of the targets as people write it: the whole [N, V], in float32."""
    logits = (hidden @ weight.T).float()
    return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)


def eager_kl(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, target: Tensor):
    """(kl, log p) as people write it."""
    log_p = torch.log_softmax((hidden @ weight.T).float(), 1)
    with torch.no_grad():
        log_q = torch.log_softmax((ref_hidden @ weight.T).float(), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1), log_p.gather(1, target[:, None])[:, 0]


def by_blocks(case: Case, ours: Callable, missing: dict[str, str]) -> dict[str, Callable]:
    """Ours by the head's other route on a GPU, its rows by Triton and by CUDA C++, where one
    campaign shall tell which stays."""
    if case.device != "cuda":
        return {}
    if _library.missing["cuda"]:
        missing["blocks, cuda"] = _library.missing["cuda"]

    def by(backend):
        def run(*arguments):
            route, op.ROUTE = op.ROUTE, "blocks"
            try:
                with pk.use_backend(backend):
                    return ours(*arguments)
            finally:
                op.ROUTE = route

        return run

    found = {"blocks": by("triton"), "blocks, cuda": by("cuda")}
    return {name: run for name, run in found.items() if name not in missing}


def moved(log_prob: Callable, hidden: Tensor, target: Tensor) -> float:
    """Share of rows whose log p has other bits in a batch of fewer. log_prob(hidden, target)"""
    whole = log_prob(hidden, target)
    few = [slice(0, 1), slice(1, 131), slice(131, len(target))]
    parts = torch.cat([log_prob(hidden[rows], target[rows]) for rows in few])
    return (parts != whole).double().mean().item()


def trl_log_prob():
    """TRL's chunked log p and entropy of (hidden, weight, target); None and why if not here."""
    if find_spec("trl") is None:
        return None, {"trl": "trl is not installed"}
    if find_spec("trl.kernels") is None:
        return None, {"trl": "this trl has no chunked log p"}
    from trl.kernels import ChunkedLogProbFunction

    def log_prob(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        found = ChunkedLogProbFunction.apply(
            hidden, weight, None, target, 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
        )
        return found[0], found[1]

    return log_prob, {}
