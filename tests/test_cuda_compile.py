"""Every .cu file compiles for Ampere, Hopper and Blackwell, without a spilled register."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

SOURCES = sorted((Path(__file__).parents[1] / "csrc/cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_compiles_without_spills(source, tmp_path):
    targets = ["80", "90a", "100"]
    command = [NVCC, "-std=c++20", "-O3", "-c", str(source), "-o", str(tmp_path / "kernel.o")]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets] + ["--threads", "2"]
    command += [f"-I{path}" for path in include_paths()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = set(re.findall(r"for '(sm_\w+)'", done.stderr))
    assert compiled == {f"sm_{t}" for t in targets}, f"torch {torch.__version__}: {compiled}"
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    assert spills and not any(spills), done.stderr[-3000:]
