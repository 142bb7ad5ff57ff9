"""lora_mlp beside the frozen block that it wraps, PEFT's layers, and full tuning of the block.

ours          pk.lora_mlp, which keeps gate and up for backward
ours, input   the same with save="input": gate and up are computed again in backward
frozen        three F.linear and the activation, with dx in backward: a block that is not trained
plain         the definition in plain torch, autograd's backward
lora_linear   the same from pk.lora_linear and plain torch between
peft          three layers that PEFT makes, adapters in the type of the base (its fastest form)
unsloth       Unsloth's autograd function of a gated block, which has no dropout; on a GPU
full          the same block trained in full: dW too
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

import perl_kernels as pk
from benchmarks._bars import DROPOUT, FORWARD, TRAIN
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
from perl_kernels.lora_mlp import reference

ROOM = "lora_mlp"
PEERS = ("peft",)
NAMES = ("gate", "up", "down")
SHAPES = {  # (N, D, F)
    "quick": [(512, 768, 2048), (1024, 512, 1376)],
    # the blocks of language models of 0.1 to 1 billion parameters
    "full": [(512, 2048, 5632), (2048, 768, 2048), (1024, 512, 1376)],
    "small": [(128, 256, 688)],
}


def cases(preset: str) -> list[Case]:
    if preset == "h200":
        return [
            _case(check, 8192, *shape, 16, "bf16", device="cuda")
            for shape in ((4096, 14336), (2048, 5632))
            for check in (TRAIN, DROPOUT)
        ]
    return list(_tiny() if preset == "tiny" else _cpu(preset))


def _case(check: str, n: int, d: int, f: int, r: int, dtype: str, **more) -> Case:
    dropout_p = 0.1 if "dropout" in check else 0.0
    shape = {"N": n, "D": d, "F": f, "R": r}
    return Case(ROOM, check, shape, dtype, dropout_p=dropout_p, **more)


def _cpu(preset: str) -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        for check in (FORWARD, TRAIN, DROPOUT):
            for rank in (16, 64) if preset == "full" else (16,):
                for shape in shapes_for(preset, dtype, SHAPES):
                    yield _case(check, *shape, rank, dtype)


def _tiny() -> Iterator[Case]:
    for check in (FORWARD, TRAIN, DROPOUT):
        yield _case(check, 33, 48, 40, 4, "fp32")
    yield _case(TRAIN, 33, 48, 40, 4, "bf16")


def test_lora_mlp(case, record):
    record(measure, contest, case)


# ------------------------------------------------------------------------------------------------


def contest(case: Case) -> Contest:
    n, d, f, r = (case.shape[letter] for letter in "NDFR")
    torch.manual_seed(0)
    x = normal(case, n, d).requires_grad_()
    shapes = {"gate": (f, d), "up": (f, d), "down": (d, f)}
    blocks = [
        pk.LoRAProjection(
            normal(case, outs, ins, std=ins**-0.5),
            normal(case, r, ins, std=ins**-0.5).requires_grad_(),
            normal(case, outs, r, std=0.1).requires_grad_(),
            scale=SCALE,
        )
        for outs, ins in shapes.values()
    ]
    dy = [normal(case, n, d)]
    p, trains = case.dropout_p, TRAIN in case.check

    def ours(save: str = "gate_up", p: float = p) -> Tensor:
        return pk.lora_mlp(x, *blocks, save=save, dropout_p=p)

    def of(layers) -> Tensor:
        gate, up, down = layers
        return down(F.silu(gate(x)) * up(x))

    def frozen() -> Tensor:
        return of([lambda t, w=b.weight: F.linear(t, w) for b in blocks])

    def plain() -> Tensor:
        def layer(t: Tensor, b: pk.LoRAProjection) -> Tensor:
            adapted = F.linear(F.linear(F.dropout(t, p), b.a), b.b)
            return F.linear(t, b.weight) + SCALE * adapted

        return of([lambda t, b=b: layer(t, b) for b in blocks])

    def lora_linear() -> Tensor:
        pairs = ([getattr(b, name) for b in blocks[:2]] for name in ("weight", "a", "b"))
        gate, up = pk.lora_linear(x, *pairs, scale=SCALE, dropout_p=p)
        h, down = F.silu(gate) * up, blocks[2]
        return pk.lora_linear(h, down.weight, down.a, down.b, scale=SCALE, dropout_p=p)

    trained = [b.weight.detach().requires_grad_() for b in blocks]

    def full() -> Tensor:
        return of([lambda t, w=w: F.linear(t, w) for w in trained])

    def call(forward, leaves):
        return with_gradients(forward, leaves, dy) if trains else without_gradients(forward)

    parameters = [t for b in blocks for t in (b.weight, b.a, b.b)]
    adapters = [x, *(t for b in blocks for t in (b.a, b.b))]
    run, missing = {"ours": call(ours, adapters)}, {}
    if trains:
        run["ours, input"] = call(lambda: ours("input"), adapters)
    run["frozen"] = call(frozen, [x])
    if p:
        run["ours without dropout"] = call(lambda: ours(p=0.0), adapters)
    run["plain"] = call(plain, adapters)
    run["lora_linear"] = call(lora_linear, adapters)
    kept = {"ours": ours, "input": lambda: ours("input"), "frozen": frozen}
    if find_spec("peft") is None:
        missing["peft"] = "peft is not installed"
    else:
        layers = [peft_layer(b.weight, b.a, b.b, SCALE, p) for b in blocks]
        theirs = [t for layer in layers for t in layer.parameters()]
        leaves = [x, *(t for t in theirs if t.requires_grad)]
        run["peft"] = call(lambda: of(layers), leaves)
        parameters += theirs
        kept["peft"] = lambda: of(layers)
    if not p:
        unsloth = gpu_peer(case, "unsloth.kernels.fast_lora", "LoRA_MLP", missing)
        forth = gpu_peer(case, "unsloth.kernels.swiglu", "swiglu_fg_kernel", missing)
        back = gpu_peer(case, "unsloth.kernels.swiglu", "swiglu_DWf_DW_dfg_kernel", missing)
        if unsloth and forth and back:
            flat = [t for b in blocks for t in (b.weight, None, b.a, b.b, SCALE)]
            run["unsloth"] = call(
                lambda: unsloth.apply(x[None], *flat, forth, back, False)[0], adapters
            )
    if trains:
        run["full"] = call(full, [x, *trained])

    def measures() -> dict[str, float]:
        found = {name: saved_bytes(one, parameters) / n for name, one in kept.items()}
        return {
            **{f"saved_bytes_per_token, {name}": value for name, value in found.items()},
            "saved_over_frozen": found["ours"] / found["frozen"],
        }

    def compare() -> list[Compared]:
        given = (x, blocks, dy, p if trains else 0.0, trains)
        doubled = (_twice(x), [_twice_all(b) for b in blocks], [_twice(dy[0])], *given[3:])
        found, exact, torchs = _ours(*given), _definition(*doubled), _definition(*given)
        return [Compared(name, found[name], torchs[name], exact[name]) for name in exact]

    adapter = (3 if trains else 1) * 3 * 2 * n * r * (d + f)
    return Contest(
        run=run,
        compare=compare,
        flops=(2 if trains else 1) * 3 * 2 * n * d * f + adapter,
        missing=missing,
        measures=measures if trains else dict,
    )


def _twice(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def _twice_all(b: pk.LoRAProjection) -> pk.LoRAProjection:
    return b._replace(weight=_twice(b.weight), a=_twice(b.a), b=_twice(b.b))


# Ours, and the definition, with the same dropout masks.


def _ours(x, blocks, dy, dropout_p, trains) -> dict[str, Tensor]:
    def forward() -> Tensor:
        torch.manual_seed(1)
        return pk.lora_mlp(x, *blocks, dropout_p=dropout_p)

    return _named(forward, x, blocks, dy, trains)


def _definition(x, blocks, dy, dropout_p, trains) -> dict[str, Tensor]:
    torch.manual_seed(1)
    seeds = {f"seed_{of}": new_seed(x.device) if dropout_p else None for of in "xh"}
    return _named(
        lambda: reference.lora_mlp(x, *blocks, dropout_p=dropout_p, **seeds), x, blocks, dy, trains
    )


def _named(forward, x, blocks, dy, trains) -> dict[str, Tensor]:
    if not trains:
        return {"y": without_gradients(forward)()[0]}
    leaves = {"dx": x}
    for name, b in zip(NAMES, blocks, strict=True):
        leaves |= {f"da_{name}": b.a, f"db_{name}": b.b}
    found = with_gradients(forward, list(leaves.values()), dy)()
    return dict(zip(["y", *leaves], found, strict=True))
