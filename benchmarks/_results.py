"""Rows of results, the machine they were taken on, and the JSON file that keeps both.

    {"name", "preset", "command", "date", "machine": {...}, "versions": {...},
     "rows": [Row, ...], "failures": {case: why}, "left_out": [case, ...], "timelines": [...]}

A file is rewritten after every row, so a run may be stopped at any time.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from perl.disk import write_whole
from perl_kernels import _library

FOLDER = Path(__file__).parent / "results"
PACKAGES = (
    "perl-kernels", "torch", "triton", "transformers", "peft", "trl", "liger-kernel", "unsloth",
    "cut-cross-entropy", "numpy",
)  # fmt: skip
PHASES = ("rollout_s", "score_s", "learn_s")  # measures of a step that has them, by contestant
CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
# Of what a CPU may have, what decides which matrix kernels run on it.
INSTRUCTION_SETS = (
    "avx2", "fma", "avx512f", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "bf16",
)  # fmt: skip


@dataclass
class Row:
    """One measured case."""

    room: str
    check: str
    shape: dict[str, int]
    dtype: str
    device: str
    backend: str  # that ran ours
    median_s: float  # of ours
    spread: float  # interquartile range of ours over its median
    rounds: int
    contestants: dict[str, dict[str, float]]  # name -> median_s, ratio (ours / theirs), low, high
    missing: dict[str, str]  # contestant -> why it was not measured
    memory: dict[str, int]  # bytes by contestant, "ours" among them; empty where not measured
    memory_kind: str  # "beyond inputs and outputs" or "peak of the process"
    errors: list[dict[str, Any]]  # of, unit, ours, plain
    measures: dict[str, float]  # further figures by name
    bars: list[dict[str, Any]]  # what, sense, must, stretch, over, value, met


@dataclass
class Results:
    """A run's rows with where and how they came to be."""

    name: str
    preset: str
    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # case -> what was wrong with it
    left_out: list[str] = field(default_factory=list)  # cases that the time did not reach
    timelines: list[dict[str, Any]] = field(default_factory=list)  # benchmarks/timeline.py's

    @classmethod
    def begin(cls, name: str, preset: str, device: str = "cpu") -> Results:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(name, preset, command(), date, machine(device), versions())

    @classmethod
    def resume(cls, name: str, preset: str, folder: Path, device: str = "cpu") -> Results:
        """What the folder has of this machine and these versions; a beginning where it has none."""
        results = cls.begin(name, preset, device)
        path = folder / f"{results.stem}.json"
        if path.is_file():
            old = cls.load(path)
            threads = [one.machine["threads"] for one in (old, results)]
            if old.versions == results.versions and threads[0] == threads[1]:
                return old
        return results

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises ValueError for JSON that is not of this form; names the file."""
        try:
            found = json.loads(path.read_text())
            rows = [Row(**row) for row in found.pop("rows")]
            return cls(**found, rows=rows)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a file of benchmark results: {error}") from None

    @property
    def stem(self) -> str:
        return f"{self.name}-{slug(self.machine)}"

    def add(self, row: Row, folders: Sequence[Path]) -> None:
        self.rows.append(row)
        self.write(folders)

    def write(self, folders: Sequence[Path]) -> list[Path]:
        """Into every folder as `<name>-<machine>.json`; a reader never sees half a file."""
        paths = []
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / f"{self.stem}.json")
            write_whole(paths[-1], json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
        return paths


ROW_FIELDS = tuple(f.name for f in fields(Row))


def backend_name(device: str, dtype: torch.dtype) -> str:
    """Which implementation runs an op there: "reference", "cpu", "triton" or "cuda"."""
    return _library.backend_of(torch.empty(0, device=device, dtype=dtype))


# ------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a reader has to know about the machine; nothing that identifies it."""
    found = {
        "cpu": _cpu_model(),
        "instruction_sets": instruction_sets(),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "kernels_use": _library.cpu_capability() or "nothing compiled",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    if device != "cpu":
        gpu = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": gpu.name,
            "architecture": f"sm_{gpu.major}{gpu.minor}",
            "memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
            **clocks(),
        }
    return found


def clocks() -> dict[str, str]:
    """Driver, clocks, power and temperature of the GPU now; empty without nvidia-smi."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(CLOCKS, (s.strip() for s in answer.splitlines()[0].split(",")), strict=False))


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "in place" if package == "perl-kernels" else "not installed"
    return found


def instruction_sets() -> list[str]:
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags.update(line.split(":", 1)[1].split())
                break
    except OSError:
        pass
    return [name for name in INSTRUCTION_SETS if name in flags]


def multiplies_bf16(present: Sequence[str]) -> bool:
    """Whether a CPU has bfloat16 products. Elsewhere torch's take minutes at full sizes."""
    return not {"avx512f", "bf16"}.isdisjoint(present)


def slug(machine: dict[str, Any]) -> str:
    """A short name of the machine for a file: GPU, or CPU with its widest instruction set."""
    if "gpu" in machine:
        words = machine["gpu"]["name"]
    else:
        words = f"{machine['cpu']} {_widest(machine)} {machine['cores']}cores"
    words = re.sub(r"\(.*?\)|\bCPU\b|\bProcessor\b|@.*?GHz", " ", words)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _widest(machine: dict[str, Any]) -> str:
    present = machine["instruction_sets"]
    return next((s for s in ("amx_bf16", "avx512f", "avx2") if s in present), "")


def kind_of(machine: dict[str, Any]) -> str:
    """The same for a reader; machines of one slug have one kind."""
    if "gpu" in machine:
        return machine["gpu"]["name"]
    maker = next((m for m in ("AMD", "Intel") if m in machine["cpu"]), machine["cpu"])
    return f"{maker}, {_widest(machine).replace('avx512f', 'avx512')}, {machine['cores']} cores"


def command() -> str:
    """The command that started this process, with paths inside the repository made relative."""
    program, *arguments = sys.argv
    if program.endswith(("pytest", "pytest/__main__.py")):
        program = "pytest"
    elif program.endswith("__main__.py") or program == "-m":
        program = "python -m " + Path(program).parent.name
    else:
        program = "python -m benchmarks." + Path(program).stem
    root = str(Path(__file__).parents[1]) + os.sep
    return shlex.join([*program.split(), *(a.removeprefix(root) for a in arguments)])


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
