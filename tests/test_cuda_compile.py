"""Every .cu file compiles for Ampere, Hopper and Blackwell, without a spilled register, and what is
meant for the tensor cores goes there.

`python tests/test_cuda_compile.py [80 90a 100]` prints what ptxas reports of every kernel.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

SOURCES = sorted((Path(__file__).parents[1] / "csrc/cuda").glob("*.cu"))
TARGETS = ["80", "90a", "100"]
NVCC = shutil.which("nvcc")
NO_PRODUCT = (
    "logits_",
    "sum_parts_",
    "head_rows_",
)  # kernels that have nothing for the tensor cores
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<target>sm_\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one kernel; shared memory is what it has besides a launch's own."""

    name: str
    target: str
    registers: int
    spills: int  # bytes stored and loaded
    shared: int  # bytes


def compiled(source: Path, targets: list[str], folder: Path) -> list[Kernel]:
    """Compile for these targets; every kernel's report. Raises RuntimeError with the output."""
    command = [NVCC, "-std=c++20", "-O3", "-c", str(source), "-o", str(folder / "kernel.o")]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets] + ["--threads", "2"]
    command += [f"-I{path}" for path in include_paths()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"torch {torch.__version__}: {done.stderr[-3000:]}")
    found = []
    for entry in ENTRY.finditer(done.stderr):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        found.append(
            Kernel(
                entry["name"], entry["target"], int(entry["registers"]),
                int(entry["stores"]) + int(entry["loads"]), int(shared[1]) if shared else 0,
            )
        )  # fmt: skip
    return found


def check(source: Path, targets: list[str], folder: Path) -> None:
    found = compiled(source, targets, folder)
    declared = len(re.findall(r"__global__", "".join(p.read_text() for p in with_headers(source))))
    for target in targets:
        mine = [kernel for kernel in found if kernel.target == f"sm_{target}"]
        assert len(mine) >= declared > 0, f"sm_{target}: {[kernel.name for kernel in mine]}"
    assert not [kernel for kernel in found if kernel.spills]


def disassembler() -> str | None:
    """cuobjdump, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    of_triton = Path(triton.origin).parent / "backends/nvidia/bin" if triton else ""
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=of_triton)


def check_instructions(program: str, binary: Path) -> None:
    """Products by the tensor cores, 16-byte copies that do not wait, nothing in local memory."""
    done = subprocess.run([program, "-sass", str(binary)], capture_output=True, text=True)
    for function in done.stdout.split("Function : ")[1:]:
        name = function.split()[0]
        assert not re.search(r"\b(LDL|STL)\b", function), name
        if not any(word in name for word in NO_PRODUCT):
            assert "HMMA.16816.F32" in function, name
            assert re.search(r"LDGSTS\.E\S*\.128", function), name
            assert "LDSM.16.M88.4" in function, name
    assert done.returncode == 0 and "Function : " in done.stdout, done.stderr


def with_headers(source: Path) -> list[Path]:
    """A .cu file and, where it has one, the .cuh of the same name."""
    return [path for path in (source, source.with_suffix(".cuh")) if path.exists()]


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_compiles_without_spills(source, tmp_path):
    check(source, ["90a"], tmp_path)
    program = disassembler()
    if program:
        check_instructions(program, tmp_path / "kernel.o")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_compiles_without_spills_elsewhere(source, tmp_path):
    check(source, [t for t in TARGETS if t != "90a"], tmp_path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        for path in SOURCES:
            for kernel in compiled(path, sys.argv[1:] or TARGETS, Path(made)):
                print(
                    f"{path.name:<16} {kernel.target:<8} {kernel.registers:>3} registers  "
                    f"{kernel.spills} B spilled  {kernel.shared} B shared  {kernel.name}"
                )
