"""What the tuner found on GPUs: which way to a product, and in which tiles, is the fastest.

A findings file is JSON and the user's own. By GPU, product, type and size:

    {"NVIDIA H200": {"y bfloat16 N8192 D2048 O2048 R16": {
        "route": "fused", "tile": {"BLOCK_N": 128, ...}, "microseconds": {"library": 101.5, ...}}}}

N and R are rounded up to a power of two. A size that a file does not name takes the pinned route.
`perl_kernels.tune` writes such files; PERL_KERNELS_TUNED names the one to begin with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The ways to a product, each with what its tile says; "library" has none.
TILES: dict[str, set[str]] = {
    "library": set(),
    "fused": {
        "BLOCK_N", "BLOCK_C", "BLOCK_K", "GROUP", "PROGRAMS", "num_warps", "num_stages"
    },
    "decode": {"BLOCK_O", "BLOCK_D", "num_warps", "num_stages"},
}  # fmt: skip
PRODUCTS = {
    "y": ("library", "fused", "decode"),
    "dx": ("library", "fused"),
    "dx_dropout": ("library", "fused"),
}


class Finding(NamedTuple):
    route: str  # a key of TILES
    tile: dict[str, int] | None = None  # None: the pinned one


Findings = dict[str, dict[str, Finding]]  # by GPU, then by `key_of`
_findings: Findings = {}
_file = ""


def use_tuned(file: str | Path | None) -> None:
    """Take routes and tiles from a findings file of `tune_lora_linear`; None: the pinned ones.

    Takes effect at once, for all threads. Findings of other GPUs than the one that runs are there
    but never asked for.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no findings file; says where.
    """
    global _findings, _file
    found = {} if file is None else parse(read(file), str(file))
    _findings, _file = found, "" if file is None else str(file)


def read(file: str | Path) -> Any:
    """The JSON in a findings file."""
    try:
        return json.loads(Path(file).read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None


def parse(content: Any, name: str) -> Findings:
    """What a findings file holds, or an error that says where it is wrong."""

    def entries(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{name}{where} is a {type(value).__name__}; wanted an object")
        return value.items()

    return {
        gpu: {key: _finding_of(key, dict(entries(v, f": {gpu}, {key}")), f"{name}: {gpu}, {key}")
              for key, v in entries(by_key, f": {gpu}")}
        for gpu, by_key in entries(content, "")
    }  # fmt: skip


def _finding_of(key: str, entry: dict[str, Any], where: str) -> Finding:
    routes = PRODUCTS.get(key.split(" ")[0])
    if routes is None:
        raise ValueError(f"{where}: wanted a key that begins with {', '.join(PRODUCTS)}")
    route, tile = entry.get("route"), entry.get("tile") or {}
    if route not in routes:
        raise ValueError(f"{where}: route is {route!r}; wanted one of {', '.join(routes)}")
    if not isinstance(tile, dict) or tile.keys() != TILES[route]:
        wanted = ", ".join(sorted(TILES[route])) or "nothing"
        raise ValueError(f"{where}: tile is {tile}; wanted {wanted}")
    if not all(type(size) is int and size > 0 for size in tile.values()):
        raise ValueError(f"{where}: tile is {tile}; wanted positive whole numbers")
    return Finding(route, tile or None)


def key_of(product: str, dtype: torch.dtype, n: int, d: int, o: int, r: int) -> str:
    """The class of sizes that share a finding: N and R rounded up to a power of two."""
    n, r = (1 << max(0, size - 1).bit_length() for size in (n, r))
    return f"{product} {str(dtype).removeprefix('torch.')} N{n} D{d} O{o} R{r}"


def finding(product: str, x: Tensor, outs: int, rank: int) -> Finding | None:
    """What was found for x (N, D) through a weight of `outs` rows, on x's GPU."""
    if not _findings:
        return None
    key = key_of(product, x.dtype, *x.shape, outs, rank)
    return _findings.get(gpu_name(x.device), {}).get(key)


def pinned_name(route: str, product: str) -> str:
    """The entry of the pinned tiles for a route to a product."""
    return f"lora_linear_{route}" + ("_dropout" if product == "dx_dropout" else "")


@cache
def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@contextmanager
def using(gpu: str, findings: dict[str, Finding]) -> Iterator[None]:
    """These findings and no others, on GPUs of this name."""
    global _findings
    before, _findings = _findings, {gpu: findings}
    try:
        yield
    finally:
        _findings = before


def config_line() -> str:
    """For `show_config`."""
    if not _file:
        return "pinned routes and tiles; `pk.use_tuned` or PERL_KERNELS_TUNED loads others"
    return f"{_file}, of " + ", ".join(f"{gpu} ({len(of)})" for gpu, of in _findings.items())


if os.environ.get("PERL_KERNELS_TUNED"):
    use_tuned(os.environ["PERL_KERNELS_TUNED"])
