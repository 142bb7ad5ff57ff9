"""Every Triton kernel compiles ahead of time, with no GPU, at every pinned tile.

The launches are recorded from the real entry points, so the types and specialisations compiled
here are those a GPU would see. Every tile fits the shared memory of its architecture; on sm_90 no
kernel spills a register, and the matrix kernels of 16-bit inputs use wgmma. The default run takes
every launch on sm_90 and one of each kernel on the others; `-m slow` takes every launch there too.
`python tests/test_triton_compile.py [ARCHITECTURE ...]` prints the table.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402 - behind importorskip

from perl_kernels._tuned import Finding  # noqa: E402 - behind importorskip

ROOMS = ("lora_linear", "lora_mlp", "multi_lora_linear", "rms_norm", "head", "log_prob")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# bytes a block may have; for sm_80 what the smallest 8.x cards have
SHARED_MEMORY = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32"
}  # fmt: skip
NO_PRODUCT = {
    "_lora_linear_sum_kernel",
    "_lora_mlp_fwd_kernel",
    "_lora_mlp_bwd_kernel",
    "_multi_lora_linear_segments_kernel",
    "_multi_lora_linear_sum_kernel",
    "_rms_norm_fwd_kernel",
    "_rms_norm_bwd_kernel",
    "_head_combine_kernel",
    "_head_rows_kernel",
    "_logits_stats_kernel",
    "_logits_grad_kernel",
}
# bound by reading the weight: more programs of 32 outputs read it sooner than wgmma's 64 would
NO_WGMMA = NO_PRODUCT | {"_lora_linear_decode_kernel"}


@dataclass(frozen=True)
class Launch:
    """One kernel with the types, constants and options of one recorded call."""

    architecture: str
    room: str
    kernel: str
    dtype: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]  # arguments divisible by 16
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        blocks = [f"{k[6:]}{v}" for k, v in self.constants if k.startswith("BLOCK_")]
        flags = [k for k, v in self.signature if k in ("seed_ptr", "ref_ptr") and v != "constexpr"]
        with_ref = "".join("+" + f.removesuffix("_ptr") for f in flags)
        tf32 = " tf32" if ("PRECISION", "tf32") in self.constants else ""
        kernel = self.kernel[1:-7] + with_ref
        return f"{self.architecture} {kernel} {self.dtype}{tf32} {' '.join(blocks)}"


# ------------------------------------------------------------------------------------------------
# Record
# ------------------------------------------------------------------------------------------------


def _describe(architecture: str, room: str, kernel, dtype: str, args, kwargs) -> Launch:
    options = tuple((k, kwargs.pop(k)) for k in ("num_warps", "num_stages") if k in kwargs)
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, aligned = {}, {}, []
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        special = not parameter.do_not_specialize
        one = special and isinstance(value, int) and value == 1
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned += [i] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            aligned += [i] if special and value % 16 == 0 else []
    return Launch(
        architecture, room, kernel.__name__, dtype, tuple(signature.items()),
        tuple(constants.items()), tuple(aligned), options,
    )  # fmt: skip


class _Recorder:
    """Stands in for a kernel: notes the launch and runs nothing."""

    def __init__(self, describe, kernel) -> None:
        self.describe, self.kernel = describe, kernel

    def __getitem__(self, grid):
        assert all(0 < n < (2**31, 2**16, 2**16)[i] for i, n in enumerate(grid)), grid
        return lambda *args, **kwargs: self.describe(self.kernel, args, kwargs)


def record(architecture: str, dtype: torch.dtype, every: bool = True) -> list[Launch]:
    """The launches of every entry point: at `every` pinned tile and branch, or one of each."""
    shared = importlib.import_module("perl_kernels._triton")
    launches: dict[Launch, None] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "architecture", lambda tensor: architecture)
        modules = {room: importlib.import_module(f"perl_kernels.{room}.triton") for room in ROOMS}
        for room, module in modules.items():

            def describe(kernel, args, kwargs, room=room):
                launch = _describe(architecture, room, kernel, TYPES[dtype], args, kwargs)
                launches[launch] = None

            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    patch.setattr(module, name, _Recorder(describe, kernel))
        lora = modules["lora_linear"]
        multi = modules["multi_lora_linear"]
        head, log_prob = modules["head"], modules["log_prob"]
        _call_lora_linear(lora, dtype, rows=512, rank=16, dropout_p=0.1)
        _call_lora_linear(lora, dtype, rows=16, rank=16, dropout_p=0.0)
        _call_multi_lora_linear(multi, dtype, rows=512, ranks=(16, 16), dropout_p=0.1)
        _call_head(head, dtype, 128, 512, with_ref=False, softcap=0.0)
        _call_head(head, dtype, 128, 512, with_ref=True, softcap=30.0, rank=16)
        _call_log_prob(log_prob, dtype, with_ref=True)
        _call_rms_norm(modules["rms_norm"], dtype, 4096)
        _call_lora_mlp(modules["lora_mlp"], dtype, "silu")
        if every:
            _call_rms_norm(modules["rms_norm"], dtype, 16384)
            _call_multi_lora_linear(multi, dtype, rows=512, ranks=(256, 8), dropout_p=0.1)
            _call_lora_mlp(modules["lora_mlp"], dtype, "gelu_tanh")
            _call_lora_linear(lora, dtype, rows=512, rank=16, dropout_p=0.0)
            _call_lora_linear(lora, dtype, rows=512, rank=256, dropout_p=0.1)
            _call_lora_linear(lora, dtype, rows=64, rank=64, dropout_p=0.0)
            _call_head(head, dtype, 128, 512, with_ref=False, softcap=30.0)
            _call_head(head, dtype, 128, 512, with_ref=True, softcap=0.0)
            _call_head(head, dtype, 128, 512, with_ref=False, softcap=0.0, rank=16)
            _call_log_prob(log_prob, dtype, with_ref=False)
            # sizes of 1 become constants of the kernel
            _call_lora_linear(lora, dtype, rows=1, rank=1, dropout_p=0.1)
            _call_multi_lora_linear(multi, dtype, rows=1, ranks=(1,), dropout_p=0.1)
            _call_head(head, dtype, 1, 2, with_ref=True, softcap=0.0)
            if dtype == torch.float32:
                patch.setattr(lora, "precision", lambda tensor: "tf32")
                patch.setattr(multi, "precision", lambda tensor: "tf32")
                patch.setattr(head, "precision", lambda tensor: "tf32")
                _call_lora_linear(lora, dtype, rows=512, rank=16, dropout_p=0.1)
                _call_lora_linear(lora, dtype, rows=16, rank=16, dropout_p=0.0)
                _call_multi_lora_linear(multi, dtype, rows=512, ranks=(16, 16), dropout_p=0.1)
                _call_head(head, dtype, 128, 512, with_ref=False, softcap=0.0)
                _call_head(head, dtype, 128, 512, with_ref=True, softcap=30.0)
            # more than DECODE_RANK
            _call_lora_linear(lora, dtype, rows=16, rank=64, dropout_p=0.0)
        patch.setattr(lora, "finding", lambda *_: Finding("fused"))
        _call_lora_linear(lora, dtype, rows=512, rank=64, dropout_p=0.1)
        if every and dtype == torch.bfloat16:
            _call_lora_linear(lora, dtype, rows=512, rank=16, dropout_p=0.0)
            _call_lora_linear(lora, dtype, rows=1, rank=1, dropout_p=0.0)
            # rows that are no whole 16 bytes
            patch.setattr(lora, "_describable", lambda tensor: False)
            _call_lora_linear(lora, dtype, rows=512, rank=16, dropout_p=0.0)
    return list(launches)


def _call_lora_linear(module, dtype, rows: int, rank: int, dropout_p: float) -> None:
    x, dy = torch.zeros(rows, 256, dtype=dtype), torch.zeros(rows, 512, dtype=dtype)
    weight, bias = torch.zeros(512, 256, dtype=dtype), torch.zeros(512, dtype=dtype)
    a, b = torch.zeros(rank, 256, dtype=dtype), torch.zeros(512, rank, dtype=dtype)
    seed = torch.zeros((), dtype=torch.int64)
    _, s = module.forward(x, [weight], [bias], [a], [b], [2.0], dropout_p, seed)
    module.backward([dy], x, [weight], [a], [b], [2.0], dropout_p, seed, s, True, True)


def _call_multi_lora_linear(module, dtype, rows: int, ranks: tuple, dropout_p: float) -> None:
    x, dy = torch.zeros(rows, 256, dtype=dtype), torch.zeros(rows, 512, dtype=dtype)
    weight, bias = torch.zeros(512, 256, dtype=dtype), torch.zeros(512, dtype=dtype)
    a = [torch.zeros(r, 256, dtype=dtype) for r in ranks]
    b = [torch.zeros(512, r, dtype=dtype) for r in ranks]
    rest = (a, b, [2.0] * len(a), torch.zeros(rows, dtype=torch.int64), dropout_p,
            torch.zeros((), dtype=torch.int64))  # fmt: skip
    _, s = module.forward(x, weight, bias, *rest)
    module.backward(dy, x, weight, *rest, s, True, True)


def _call_lora_mlp(module, dtype, activation: str) -> None:
    gate = torch.zeros(64, 512, dtype=dtype)
    module.gated(gate, gate, activation)
    module.gated_backward(gate, gate, gate, activation)


def _call_head(
    module, dtype, rows: int, vocabulary: int, with_ref: bool, softcap: float, rank: int = 0
) -> None:
    hidden, weight = torch.zeros(rows, 64, dtype=dtype), torch.zeros(vocabulary, 64, dtype=dtype)
    bias, target = torch.zeros(vocabulary, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    a, b = (torch.zeros(rank, 64), torch.zeros(vocabulary, rank)) if rank else (None, None)
    ref = hidden if with_ref else None
    row = torch.zeros(rows)
    inputs, options = (hidden, weight, bias, a, b, target, ref), (1.0, 0.7, softcap, -100)
    module.stats(*inputs, *options)
    incoming = (row, row, row if with_ref else None)
    need = (True, False, False, rank > 0)
    module.grad(*inputs, row, row, row, row, *incoming, *options, *need)
    module.units(*inputs, None, None, *options)
    module.units(*inputs, row, row if with_ref else None, *options)


def _call_rms_norm(module, dtype, features: int) -> None:
    x, weight = torch.zeros(2, features, dtype=dtype), torch.zeros(features, dtype=dtype)
    module.forward(x, weight, 1e-6, 0.0, True)
    module.backward(x, x, weight, 1e-6, 0.0)


def _call_log_prob(module, dtype, with_ref: bool, rows: int = 16, columns: int = 512) -> None:
    logits, target = torch.zeros(rows, columns, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    ref = logits if with_ref else None
    row = torch.zeros(rows)
    module.stats(logits, target, ref, 0.7, 0.0, -100)
    d_kl = row if with_ref else None
    module.grad(logits, target, ref, row, row, row, row, row, row, d_kl, 0.7, 0.0, -100)


# ------------------------------------------------------------------------------------------------
# Compile, in processes of their own
# ------------------------------------------------------------------------------------------------


def _use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def compile_one(launch: Launch) -> dict[str, int]:
    """registers, spills (bytes), shared memory (bytes) and wgmma (instructions) of one launch."""
    import triton
    from triton.backends.compiler import GPUTarget

    module = importlib.import_module(f"perl_kernels.{launch.room}.triton")
    source = triton.compiler.ASTSource(
        getattr(module, launch.kernel),
        dict(launch.signature),
        dict(launch.constants),
        {(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    target = GPUTarget(*TARGETS[launch.architecture])
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        return {"registers": registers, "spills": spills, "shared": compiled.metadata.shared}
    registers, spills = _resources(compiled.asm["cubin"])
    return {
        "registers": registers,
        "spills": spills,
        "shared": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack or local memory: spills."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return int(found[1]), int(found[2]) + int(found[3])


def compile_all(launches: list[Launch], cache: str) -> dict[Launch, dict[str, int] | Exception]:
    results: dict[Launch, dict[str, int] | Exception] = {}
    workers = min(8, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _use_cache, (cache,)) as pool:
        futures = {launch: pool.submit(compile_one, launch) for launch in launches}
        for launch, future in futures.items():
            results[launch] = future.exception() or future.result()
    return results


# ------------------------------------------------------------------------------------------------
# Tests
# ------------------------------------------------------------------------------------------------

OTHERS = [name for name in TARGETS if name != "sm_90"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[Launch, dict[str, int] | Exception]:
    jobs = [*record("sm_90", torch.bfloat16), *record("sm_90", torch.float32)]
    jobs += [launch for name in OTHERS for launch in record(name, torch.bfloat16, every=False)]
    return compile_all(jobs, str(tmp_path_factory.mktemp("triton")))


def _check_compiled(results: dict[Launch, dict[str, int] | Exception], architecture: str) -> None:
    mine = {k: v for k, v in results.items() if k.architecture == architecture}
    failed = {str(k): v for k, v in mine.items() if isinstance(v, Exception)}
    assert mine and not failed, failed
    limit = SHARED_MEMORY[architecture]
    too_large = {str(k): v["shared"] for k, v in mine.items() if v["shared"] > limit}
    assert not too_large, f"more than {limit} bytes of shared memory: {too_large}"


def test_every_kernel_is_recorded():
    launched = {launch.kernel for launch in record("sm_90", torch.bfloat16)}
    modules = [importlib.import_module(f"perl_kernels.{room}.triton") for room in ROOMS]
    assert launched == {name for m in modules for name in vars(m) if name.endswith("_kernel")}


def test_grids_and_launches_at_extreme_sizes(monkeypatch):
    """Rows past 16 bits and the largest vocabulary, at the tiles of a GPU: no grid is too large."""
    shared = importlib.import_module("perl_kernels._triton")
    monkeypatch.setattr(shared, "architecture", lambda tensor: "sm_90")
    launched = set()
    for room in ("head", "log_prob"):
        module = importlib.import_module(f"perl_kernels.{room}.triton")
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                recorder = _Recorder(lambda kernel, *_: launched.add(kernel.__name__), kernel)
                monkeypatch.setattr(module, name, recorder)
        for rows, vocabulary in ((65537, 17), (3, 262144)):
            if room == "head":
                _call_head(module, torch.float32, rows, vocabulary, with_ref=False, softcap=0.0)
                _call_head(module, torch.float32, rows, vocabulary, with_ref=True, softcap=0.0)
            else:
                _call_log_prob(module, torch.float32, True, rows, vocabulary)
    assert {name.split("_")[1] for name in launched} == {"head", "logits"}


@pytest.mark.parametrize("architecture", TARGETS)
def test_compiles_and_fits(compiled, architecture):
    _check_compiled(compiled, architecture)


def test_no_spills_on_sm_90(compiled):
    mine = {k: v for k, v in compiled.items() if k.architecture == "sm_90"}
    assert not {str(k): v for k, v in mine.items() if v["spills"]}


def test_matrix_kernels_use_wgmma(compiled):
    products = {
        str(k): v
        for k, v in compiled.items()
        if k.architecture == "sm_90" and k.dtype == "bf16" and k.kernel not in NO_WGMMA
    }
    assert products and not {k: v for k, v in products.items() if v["wgmma"] == 0}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", OTHERS)
def test_every_launch_compiles_and_fits(architecture, dtype, tmp_path):
    _check_compiled(compile_all(record(architecture, dtype), str(tmp_path)), architecture)


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(TARGETS)
    jobs = [x for t in wanted for d in (torch.bfloat16, torch.float32) for x in record(t, d)]
    with tempfile.TemporaryDirectory() as folder:
        for launch, result in compile_all(jobs, folder).items():
            print(launch, dict(launch.options)["num_warps"], result, flush=True)
