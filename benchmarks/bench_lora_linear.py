"""lora_linear beside the frozen layer that it wraps, PEFT's layer, and full tuning of the layer.

ours     pk.lora_linear
ours, X  on a GPU, the same by a route that is not pinned at this size, for X see ROUTES in
         perl_kernels/lora_linear/triton.py; "fused 2" has two programs to a multiprocessor
frozen   F.linear, and its dx in backward: what a layer costs that is not trained at all
plain    the definition in plain torch, autograd's backward
addmm    the library's products with in-place accumulation, the kernels switched off
peft     the layer that PEFT makes, adapters in the type of the base (its fastest form)
unsloth  Unsloth's autograd function of one projection, which has no dropout; on a GPU
full     the same layer trained in full: dW too
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import perl_kernels as pk
from benchmarks._bars import DROPOUT, FORWARD, ONE_TOKEN, PROJECTIONS, TRAIN
from benchmarks._lora import SCALE, peft_layer, saved_bytes
from benchmarks._measure import (
    Case,
    Compared,
    Contest,
    gpu_peer,
    measure,
    normal,
    shapes_for,
    with_gradients,
    without_gradients,
)
from perl_kernels._dropout import new_seed
from perl_kernels._tuned import Finding, gpu_name, key_of, pinned_name, using
from perl_kernels.lora_linear import reference
from perl_kernels.tune import VARIANTS

ROOM = "lora_linear"
PEERS = ("peft",)
T = TypeVar("T")
COMPILED = f"{TRAIN}, compiled"
SHAPES = {  # (N, D, O)
    "quick": [(512, 1024, 1024), (1024, 512, 512)],
    # the projections inside language models of 0.1 to 7 billion parameters
    "full": [
        (512, 2048, 2048),
        (1024, 512, 512),
        (2048, 1024, 4096),
        (4096, 768, 2048),
        (256, 2048, 8192),
    ],
    "small": [(128, 256, 256)],
}


def cases(preset: str) -> list[Case]:
    if preset == "h200":
        return list(_h200())
    return list(_tiny() if preset == "tiny" else _cpu(preset))


def _case(check: str, n: int, d: int, o: int, r: int, dtype: str, **more) -> Case:
    dropout_p = 0.1 if "dropout" in check else 0.0
    shape = {"N": n, "D": d, "O": o, "R": r}
    return Case(ROOM, check, shape, dtype, dropout_p=dropout_p, **more)


def _cpu(preset: str) -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        shapes = shapes_for(preset, dtype, SHAPES)
        for check in (FORWARD, TRAIN, DROPOUT):
            for rank in (16, 64) if preset == "full" else (16,):
                for shape in shapes:
                    yield _case(check, *shape, rank, dtype)
        for n, d, o in shapes[:2]:
            yield _case(PROJECTIONS, n, d, o, 16, dtype)
            yield _case(ONE_TOKEN, 1, d, o, 16, dtype)


def _tiny() -> Iterator[Case]:
    for check in (FORWARD, TRAIN, DROPOUT, PROJECTIONS):
        yield _case(check, 33, 48, 40, 4, "fp32")
    yield _case(TRAIN, 33, 48, 40, 4, "bf16")


def _h200() -> Iterator[Case]:
    def on_gpu(check: str, *shape: int, **more) -> Case:
        return _case(check, *shape, "bf16", device="cuda", **more)

    for outs in (4096, 14336):
        for rank in (16, 64, 256):
            yield on_gpu(TRAIN, 8192, 4096, outs, rank)
        yield on_gpu(DROPOUT, 8192, 4096, outs, 16)
    # few features, where a kernel of our own needs the least of the library's rate
    for size in (2048, 1024):
        yield on_gpu(TRAIN, 8192, size, size, 16)
        yield on_gpu(DROPOUT, 8192, size, size, 16)
    for tokens in (1, 16, 64):
        yield on_gpu(FORWARD, tokens, 4096, 4096, 16, graphed=True)
    yield on_gpu(PROJECTIONS, 8192, 4096, 4096, 16)
    yield on_gpu(COMPILED, 8192, 4096, 4096, 16, weighed=False)  # it would compile again


def test_lora_linear(case, record):
    record(measure, contest, case)


# ------------------------------------------------------------------------------------------------


def contest(case: Case) -> Contest:
    n, d, o, r = (case.shape[letter] for letter in "NDOR")
    count = 3 if "q, k, v" in case.check else 1
    torch.manual_seed(0)
    x = normal(case, n, d).requires_grad_()
    weight = [normal(case, o, d, std=d**-0.5) for _ in range(count)]
    a = [normal(case, r, d, std=d**-0.5).requires_grad_() for _ in range(count)]
    b = [normal(case, o, r, std=0.1).requires_grad_() for _ in range(count)]
    dy = [normal(case, n, o) for _ in range(count)]
    trains = TRAIN in case.check

    def ours(p: float = case.dropout_p) -> tuple[Tensor, ...]:
        if count == 1:
            return pk.lora_linear(x, weight[0], a[0], b[0], scale=SCALE, dropout_p=p)
        return pk.lora_linear(x, weight, a, b, scale=SCALE, dropout_p=p)

    def each(layer) -> tuple[Tensor, ...]:
        return tuple(layer(x, w, a_i, b_i) for w, a_i, b_i in zip(weight, a, b, strict=True))

    def one_call_each() -> tuple[Tensor, ...]:
        return each(
            lambda *t: pk.lora_linear(*t, scale=SCALE, dropout_p=case.dropout_p),
        )

    def frozen() -> tuple[Tensor, ...]:
        return each(lambda x, w, _a, _b: F.linear(x, w))

    def plain() -> tuple[Tensor, ...]:
        def layer(x, w, a_i, b_i):
            return F.linear(x, w) + SCALE * F.linear(
                F.linear(F.dropout(x, case.dropout_p), a_i), b_i
            )

        return each(layer)

    trained = [w.detach().requires_grad_() for w in weight]

    def full() -> tuple[Tensor, ...]:
        return tuple(F.linear(x, w) for w in trained)

    def call(forward, leaves):
        return with_gradients(forward, leaves, dy) if trains else without_gradients(forward)

    def without_kernels():
        with pk.use_backend("reference"):
            return run["ours"]()

    adapters = [x, *a, *b]
    run, missing = {"ours": call(ours, adapters), "frozen": call(frozen, [x])}, {}
    routes = _other_routes(x, o, r) if case.device != "cpu" and case.check != COMPILED else {}
    for name, findings in routes.items():
        run[f"ours, {name}"] = _by(findings, x, run["ours"])
    if case.dropout_p and count == 1:
        run["ours without dropout"] = call(lambda: ours(0.0), adapters)
    if count > 1:
        run["three calls"] = call(one_call_each, adapters)
    run["plain"] = call(plain, adapters)
    run["addmm"] = without_kernels
    if find_spec("peft") is None:
        missing["peft"] = "peft is not installed"
    else:
        layers = [peft_layer(*t, SCALE, case.dropout_p) for t in zip(weight, a, b, strict=True)]
        leaves = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
        run["peft"] = call(lambda: tuple(layer(x) for layer in layers), leaves)
    if not case.dropout_p:
        unsloth = gpu_peer(case, "unsloth.kernels.fast_lora", "LoRA_W", missing)
        if unsloth:

            def one_projection(x, w, a_i, b_i) -> Tensor:
                return unsloth.apply(x[None], w, None, a_i, b_i, SCALE)[0]

            run["unsloth"] = call(lambda: each(one_projection), adapters)
    if trains and count == 1:
        run["full"] = call(full, [x, *trained])
    if case.check == COMPILED:
        del run["plain"], run["full"]
        run["plain compiled"] = call(torch.compile(plain), adapters)
        if "peft" in run:
            compiled = torch.compile(layers[0])
            run["peft compiled"] = call(lambda: (compiled(x),), leaves)

    def compare() -> list[Compared]:
        given = (x, weight, a, b, dy, case.dropout_p if trains else 0.0, trains)
        found, exact, torchs = _ours(*given), _definition(*_doubled(*given)), _definition(*given)
        by_route = {"": found}
        for name, findings in routes.items():
            by_route[f", {name}"] = _by(findings, x, lambda: _ours(*given))()
        return [
            Compared(name + route, ours[name], torchs[name], exact[name])
            for route, ours in by_route.items()
            for name in exact
        ]

    factor = 2 if trains else 1
    flops = factor * count * (2 * n * d * o) + (3 if trains else 1) * count * 2 * n * r * (d + o)
    return Contest(
        run=run,
        compare=compare,
        flops=flops,
        missing=missing,
        measures=lambda: (
            {"saved_bytes_per_element": saved_bytes(ours, [*weight, *a, *b]) / x.numel()}
            if trains
            else {}
        ),
    )


def _other_routes(x: Tensor, outs: int, rank: int) -> dict[str, dict[str, Finding]]:
    """By name, what makes lora_linear take a route that is not pinned for x (N, D)."""

    def findings(route: str, **change: int) -> dict[str, Finding]:
        from perl_kernels._triton import pinned

        found = {}
        for product in ("y", "dx", "dx_dropout"):
            fused = {**pinned(pinned_name("fused", product), x), **change}
            tile = fused if route == "fused" else None
            found[key_of(product, x.dtype, *x.shape, outs, rank)] = Finding(route, tile)
        return found

    if len(x) <= 64:
        return {"library": findings("library")}
    return {"fused": findings("fused"), "fused 2": findings("fused", **VARIANTS["fused"][-1])}


def _by(findings: dict[str, Finding], x: Tensor, run: Callable[[], T]) -> Callable[[], T]:
    """run by these routes, on x's GPU"""

    def chosen() -> T:
        with using(gpu_name(x.device), findings):
            return run()

    return chosen


# Ours, and the definition, with the same dropout mask.


def _ours(x, weight, a, b, dy, dropout_p, trains) -> dict[str, Tensor]:
    def forward() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return pk.lora_linear(x, weight, a, b, scale=SCALE, dropout_p=dropout_p)

    return _named(forward, x, a, b, dy, trains)


def _definition(x, weight, a, b, dy, dropout_p, trains) -> dict[str, Tensor]:
    torch.manual_seed(1)
    seed = new_seed(x.device) if dropout_p else None

    def forward() -> tuple[Tensor, ...]:
        return tuple(
            reference.lora_linear(x, *t, scale=SCALE, dropout_p=dropout_p, seed=seed)
            for t in zip(weight, a, b, strict=True)
        )

    return _named(forward, x, a, b, dy, trains)


def _named(forward, x, a, b, dy, trains) -> dict[str, Tensor]:
    names = [f"y{i}" for i in range(len(a))]
    if not trains:
        return dict(zip(names, without_gradients(forward)(), strict=True))
    names += ["dx", *(f"d{letter}{i}" for letter in "ab" for i in range(len(a)))]
    return dict(zip(names, with_gradients(forward, [x, *a, *b], dy)(), strict=True))


def _doubled(x, weight, a, b, dy, *rest):
    def twice(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad)

    lists = ([twice(t) for t in tensors] for tensors in (weight, a, b, dy))
    return (twice(x), *lists, *rest)
