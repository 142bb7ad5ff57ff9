"""The benchmarks of a source checkout: `python -m perl bench`.

On a CPU it is `pytest benchmarks`, with preset h200 `python -m benchmarks.gpu`: the same code, the
same tables, the same JSON.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from perl.config import BenchConfig, UsageError

STEPS = {"reward": ("reward_step",), "policy": ("policy_step", "rollout")}  # kernels: the others


def bench(config: BenchConfig) -> None:
    """Runs them in a process of their own; their tables go to stdout.

    Raises:
        UsageError: there is no checkout, or a result was wrong.
    """
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    if not folder.is_dir():
        raise UsageError(
            "bench runs the benchmarks of a source checkout, and this package was "
            "installed without; clone the repository and run it there"
        )
    line = command(config, folder)
    code = subprocess.run([sys.executable, "-m", *line], cwd=folder.parent).returncode
    if code:
        raise UsageError(f"`python -m {' '.join(line)}` ended with exit code {code}; see above")


def command(config: BenchConfig, folder: Path) -> list[str]:
    """What does the work, after `python -m`."""
    rooms = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    steps = {room for of_one in STEPS.values() for room in of_one}
    wanted = {"all": rooms, "kernels": [room for room in rooms if room not in steps]} | STEPS
    rooms = [room for room in rooms if room in wanted[config.what]]
    options = ["--against", config.against] if config.against is not None else []
    options += ["--results", str(Path(config.results).resolve())] if config.results else []
    if config.preset == "h200":
        skipped = ["--skip-build", "--skip-tests", "--skip-study"]
        return ["benchmarks.gpu", *skipped, "--rooms", *rooms, *options]
    files = [f"{folder.name}/bench_{room}.py" for room in rooms]
    options += ["--threads", str(config.threads)] if config.threads else []
    options += ["-k", config.select] if config.select else []
    return ["pytest", *files, "-q", "--preset", config.preset, *options]
