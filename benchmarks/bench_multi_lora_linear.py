"""multi_lora_linear beside the loop over adapters that it replaces, and the layers it is made from.

ours         pk.multi_lora_linear
frozen       F.linear, and its dx in backward: what a layer costs that is not trained at all
lora_linear  pk.lora_linear with one adapter for all rows: what rows of many can hope for
loop         F.linear, then for each adapter its rows by index, as PEFT does for adapter_names;
             autograd's backward
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import perl_kernels as pk
from benchmarks._bars import DROPOUT, FORWARD, TRAIN
from benchmarks._lora import SCALE, saved_bytes
from benchmarks._measure import (
    Case,
    Compared,
    Contest,
    measure,
    normal,
    shapes_for,
    with_gradients,
    without_gradients,
)
from perl_kernels._dropout import new_seed
from perl_kernels.multi_lora_linear import reference

ROOM = "multi_lora_linear"
SEQUENCES = 32  # of a batch, each with an adapter of its own choice or with none
SHAPES = {  # (N, D, O)
    "quick": [(1024, 512, 512), (512, 1024, 1024)],
    "full": [(512, 2048, 2048), (1024, 512, 512), (2048, 1024, 4096), (4096, 768, 2048)],
    "small": [(128, 256, 256)],
}


def cases(preset: str) -> list[Case]:
    if preset == "h200":
        return list(_h200())
    return list(_tiny() if preset == "tiny" else _cpu(preset))


def _case(check: str, n: int, d: int, o: int, r: int, g: int, dtype: str, **more) -> Case:
    dropout_p = 0.1 if "dropout" in check else 0.0
    shape = {"N": n, "D": d, "O": o, "R": r, "G": g}
    return Case(ROOM, check, shape, dtype, dropout_p=dropout_p, **more)


def _cpu(preset: str) -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        for check in (FORWARD, TRAIN, DROPOUT):
            for count in (4, 16) if preset == "full" else (4,):
                for shape in shapes_for(preset, dtype, SHAPES):
                    yield _case(check, *shape, 16, count, dtype)


def _tiny() -> Iterator[Case]:
    for check in (FORWARD, TRAIN, DROPOUT):
        yield _case(check, 64, 48, 40, 4, 3, "fp32")
    yield _case(TRAIN, 64, 48, 40, 4, 3, "bf16")


def _h200() -> Iterator[Case]:
    for check in (TRAIN, DROPOUT):
        for count in (4, 32):
            yield _case(check, 8192, 4096, 4096, 16, count, "bf16", device="cuda")
    yield _case(FORWARD, 32, 4096, 4096, 16, 32, "bf16", device="cuda", graphed=True)


def test_multi_lora_linear(case, record):
    record(measure, contest, case)


# ------------------------------------------------------------------------------------------------


def contest(case: Case) -> Contest:
    n, d, o, r, count = (case.shape[letter] for letter in "NDORG")
    torch.manual_seed(0)
    x = normal(case, n, d).requires_grad_()
    weight = normal(case, o, d, std=d**-0.5)
    a = [normal(case, r, d, std=d**-0.5).requires_grad_() for _ in range(count)]
    b = [normal(case, o, r, std=0.1).requires_grad_() for _ in range(count)]
    sequences = torch.randint(-1, count, (min(n, SEQUENCES),), device=case.device)
    adapter = sequences.repeat_interleave(n // len(sequences), output_size=n)
    rows_of = [(adapter == g).nonzero().squeeze(1) for g in range(count)]
    dy = [normal(case, n, o)]
    trains = TRAIN in case.check

    def ours() -> Tensor:
        return pk.multi_lora_linear(x, weight, a, b, adapter, scale=SCALE, dropout_p=case.dropout_p)

    def lora_linear() -> Tensor:
        return pk.lora_linear(x, weight, a[0], b[0], scale=SCALE, dropout_p=case.dropout_p)

    def frozen() -> Tensor:
        return F.linear(x, weight)

    def loop() -> Tensor:
        y = F.linear(x, weight)
        for g, rows in enumerate(rows_of):
            dropped = F.dropout(x[rows], case.dropout_p)
            y[rows] += SCALE * F.linear(F.linear(dropped, a[g]), b[g])
        return y

    def call(forward, leaves):
        return with_gradients(forward, leaves, dy) if trains else without_gradients(forward)

    run = {
        "ours": call(ours, [x, *a, *b]),
        "frozen": call(frozen, [x]),
        "lora_linear": call(lora_linear, [x, a[0], b[0]]),
        "loop": call(loop, [x, *a, *b]),
    }

    def compare() -> list[Compared]:
        given = (x, weight, a, b, adapter, dy, case.dropout_p if trains else 0.0, trains)
        doubled = (_twice(x), _twice(weight), *(list(map(_twice, t)) for t in (a, b)), adapter)
        exact = _definition(*doubled, [_twice(dy[0])], *given[6:])
        found, torchs = _ours(*given), _definition(*given)
        return [Compared(name, found[name], torchs[name], exact[name]) for name in exact]

    adapted = int((adapter >= 0).sum())
    flops = (2 if trains else 1) * 2 * n * d * o + (3 if trains else 1) * 2 * adapted * r * (d + o)
    return Contest(
        run=run,
        compare=compare,
        flops=flops,
        measures=lambda: (
            {"saved_bytes_per_element": saved_bytes(ours, [weight, *a, *b]) / x.numel()}
            if trains
            else {}
        ),
    )


def _twice(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


# Ours, and the definition, with the same dropout mask.


def _ours(x, weight, a, b, adapter, dy, dropout_p, trains) -> dict[str, Tensor]:
    def forward() -> Tensor:
        torch.manual_seed(1)
        return pk.multi_lora_linear(x, weight, a, b, adapter, scale=SCALE, dropout_p=dropout_p)

    return _named(forward, x, a, b, dy, trains)


def _definition(x, weight, a, b, adapter, dy, dropout_p, trains) -> dict[str, Tensor]:
    torch.manual_seed(1)
    seed = new_seed(x.device) if dropout_p else None

    def forward() -> Tensor:
        return reference.multi_lora_linear(
            x, weight, a, b, adapter, scale=[SCALE] * len(a), dropout_p=dropout_p, seed=seed
        )

    return _named(forward, x, a, b, dy, trains)


def _named(forward, x, a, b, dy, trains) -> dict[str, Tensor]:
    if not trains:
        return {"y": without_gradients(forward)()[0]}
    names = ["y", "dx", *(f"d{letter}{g}" for letter in "ab" for g in range(len(a)))]
    return dict(zip(names, with_gradients(forward, [x, *a, *b], dy)(), strict=True))
