"""The opt-in tuner: which way to y and to dx of lora_linear is the fastest on this GPU."""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._library import missing
from ._tuned import PRODUCTS, Finding, gpu_name, key_of, parse, pinned_name, read, use_tuned, using

__all__ = ["tune_lora_linear"]

# Another route than the library's has to be faster by this much, more than a median wavers.
MARGIN = 0.02
DROPOUT_P = 0.1
# What two right answers may differ by, relatively; of float32, what tf32 rounds off.
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-3}
MOST_DECODED = 256  # tokens up to which the decode kernel is tried

# Changes to the pinned tile of a route that are tried too.
VARIANTS: dict[str, list[dict[str, int]]] = {
    "fused": [
        {"BLOCK_N": 128, "BLOCK_C": 256, "num_warps": 8, "num_stages": 4},
        {"BLOCK_N": 256, "BLOCK_C": 128, "num_warps": 8, "num_stages": 3},
        {"BLOCK_N": 128, "BLOCK_C": 128, "num_warps": 8, "num_stages": 4},
        # two programs to a multiprocessor: one writes its tile while the other multiplies
        {"BLOCK_N": 128, "BLOCK_C": 128, "num_warps": 4, "num_stages": 3, "PROGRAMS": 2},
    ],
    "decode": [{"BLOCK_O": 16}, {"BLOCK_O": 64}, {"BLOCK_D": 256, "num_stages": 3}],
}


def tune_lora_linear(
    shapes: Sequence[tuple[int, int, int, int]],
    file: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 0.2,
) -> dict[str, dict[str, Any]]:
    """Time the routes of lora_linear on the current GPU; keep the fastest, and use them at once.

        pk.tune_lora_linear([(8192, 2048, 2048, 16), (8192, 2048, 5632, 16)], "h200.json")

    Three products are timed at each shape: y, dx, and dx with dropout. Every route, in each of a
    few tiles, has to agree with the library's within the rounding of `dtype` before its time
    counts; one that asks for more shared memory than there is drops out.

    Args:
        shapes: (N, D, O, R) of the projections: tokens, input and output features, rank. What is
            found holds for every N and R with the same next power of two.
        file: findings are written here. What the file holds of other shapes and of other GPUs
            stays. A later process takes them by `use_tuned` or PERL_KERNELS_TUNED.
        dtype: bfloat16, float16 or float32 of x and the weight.
        seconds: about how long each candidate is timed.

    Returns:
        What was found, by "product dtype N D O R": route, tile, microseconds of every candidate.

    Raises:
        ValueError: a shape is not four positive whole numbers, or the file is no findings file.
        TypeError: the dtype is another.
        RuntimeError: Triton cannot run here.
    """
    for shape in shapes:
        if len(shape) != 4 or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"shapes has {shape}; wanted (N, D, O, R), positive whole numbers")
    if dtype not in ROUNDING:
        raise TypeError(f"dtype is {dtype}; wanted bfloat16, float16 or float32")
    if missing["triton"]:
        raise RuntimeError(f"nothing to tune: {missing['triton']}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    kept = read(file) if Path(file).exists() else {}
    parse(kept, str(file))
    found = {}
    gpu = gpu_name(device)
    for shape in shapes:
        x, run_of = _products(*shape, dtype, device)
        for product, run in run_of.items():
            key = key_of(product, dtype, *shape)
            found[key] = _fastest(key, _candidates(product, x), run, seconds, gpu)
    kept.setdefault(gpu, {}).update(found)
    Path(file).write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    use_tuned(file)
    return found


def _products(
    n: int, d: int, o: int, r: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, dict[str, Callable[[], Tensor]]]:
    """x, and one call for each product, on random inputs."""
    from .lora_linear import triton as kernels

    def normal(rows: int, columns: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(rows, columns, device=device)).to(dtype)

    x, dy, s = normal(n, d), normal(n, o), normal(n, r)
    weight, a, b = [normal(o, d, d**-0.5)], [normal(r, d, d**-0.5)], [normal(o, r, r**-0.5)]
    seed = torch.zeros((), dtype=torch.int64, device=device)

    def dx(p: float) -> Tensor:
        return kernels.backward([dy], x, weight, a, b, [1.0], p, seed, s, True, False)[0]

    return x, {
        "y": lambda: kernels.forward(x, weight, [], a, b, [1.0], 0.0, None)[0][0],
        "dx": lambda: dx(0.0),
        "dx_dropout": lambda: dx(DROPOUT_P),
    }


def _candidates(product: str, like: Tensor) -> Iterator[Finding]:
    """The library; then the other routes, in their pinned tile and in variants of it."""
    from ._triton import pinned

    yield Finding("library")
    for route in PRODUCTS[product][1:]:
        if route == "decode" and like.shape[0] > MOST_DECODED:
            continue
        tiles = [pinned(pinned_name(route, product), like)]
        tiles += [{**tiles[0], **change} for change in VARIANTS[route]]
        yield from (Finding(route, tile) for i, tile in enumerate(tiles) if tile not in tiles[:i])


def _fastest(
    key: str, candidates: Iterator[Finding], run: Callable[[], Tensor], seconds: float, gpu: str
) -> dict[str, Any]:
    """The entry of a findings file."""
    from triton.runtime.errors import OutOfResources

    times: list[tuple[float, Finding]] = []
    wanted = None
    for candidate in candidates:
        with using(gpu, {key: candidate}):
            try:
                found = run()
            except OutOfResources:
                continue
            wanted = found.float() if wanted is None else wanted
            difference = ((found.float() - wanted).norm() / wanted.norm()).item()
            if not difference <= ROUNDING[found.dtype]:
                warnings.warn(
                    f"{key}: {_label(candidate)} differs from the library by {difference:.2g} and "
                    "is left out; please report it",
                    stacklevel=3,
                )
                continue
            times.append((seconds_of(run, seconds), candidate))
    library, (least, best) = times[0], min(times, key=lambda entry: entry[0])
    if least > (1.0 - MARGIN) * library[0]:
        best = library[1]
    microseconds = {_label(candidate): round(1e6 * taken, 2) for taken, candidate in times}
    return {"route": best.route, "tile": best.tile or {}, "microseconds": microseconds}


def _label(candidate: Finding) -> str:
    """e.g. "fused N128 C256 K64 warps8 stages3" """
    tile = candidate.tile or {}
    sizes = [k.removeprefix("BLOCK_").removeprefix("num_") + str(v) for k, v in tile.items()]
    return " ".join([candidate.route, *sizes])


def seconds_of(run: Callable[[], Tensor], seconds: float) -> float:
    """The median of calls that find the cache full of something else."""
    if not torch.cuda.is_available():  # the interpreter
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(100)]

    def rounds(count: int) -> list[float]:
        for start, end in events[:count]:
            flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in events[:count]]

    one = statistics.median(rounds(3))
    return statistics.median(rounds(max(5, min(len(events), int(seconds / one)))))
