"""Shared fixtures. Every torch.empty in a test is full of NaN, so an unwritten element fails."""

from __future__ import annotations

import os
from pathlib import Path

# Tensors here are tiny: a second thread waits more than it works, in subprocesses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import perl_kernels as pk
from perl_kernels import _library

# Files of minutes, so that no process begins with one when the others are done.
LONGEST = ["test_benchmarks", "test_triton", "test_triton_compile", "test_cpu_kernels"]
SHARED = Path(os.environ.get("PERL_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty (and at::empty in C++) gives NaN; seeds are set; threads and backend restored."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Each implementation that runs on this machine."""
    if _library.missing.get(request.param):
        pytest.skip(f"backend {request.param}: {_library.missing[request.param]}")
    with pk.use_backend(request.param):
        yield request.param


def _shared(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is not there; set PERL_SHARED to the folder with data/ and models/")
    return path


@pytest.fixture
def shared_data():
    """The folder of real preference data."""
    return _shared("data")


@pytest.fixture
def stories260k():
    """The folder of a real pretrained Llama of 0.26 M parameters."""
    return _shared("models/stories260k")
