"""The campaign on a GPU machine, in one command and inside a time budget.

    python -m benchmarks.gpu --minutes 9          build in place, GPU tests, benchmarks, table
    python -m benchmarks.gpu --dry-run            the same on the CPU at tiny shapes, nothing built

Needs torch, triton, nvcc and pytest; compares with peft, trl, liger_kernel, unsloth and
cut_cross_entropy where they can be imported, and with compiled plain torch. Downloads nothing and
installs nothing. Most valuable first: stop it at any time, the JSON is complete up to the last row.
Results go to benchmarks/results and, where $OUT is set, there too with the logs.

Exit code 0: everything that ran was right (bars may be missed); 1: the build, a test or a result
was wrong.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import ROOT, peers_of
from perl.config import BENCH_PEERS

if TYPE_CHECKING:
    from benchmarks._measure import Case
    from benchmarks._results import Results, Row

# (room, check, letters of the shape): what comes first; what no entry names comes after them.
ORDER: list[tuple[str, str, dict[str, int]]] = [
    ("lora_linear", "forward + backward", {"O": 4096, "R": 16}),
    ("linear_log_prob", "forward", {"V": 131072}),
    ("policy_loss", "forward + backward", {"V": 131072}),
    ("policy_loss", "forward + backward, exact KL", {"V": 131072}),
    ("lora_linear", "forward + backward, dropout 0.1", {"O": 4096}),
    ("lora_linear", "forward + backward", {"O": 14336, "R": 16}),
    ("lora_linear", "forward + backward", {}),
    ("lora_linear", "forward", {}),
    ("log_prob", "forward", {}),
    ("log_prob", "forward + backward", {}),
    ("linear_log_prob", "forward + backward", {"V": 131072}),
    ("lora_mlp", "forward + backward", {}),
    ("lora_mlp", "forward + backward, dropout 0.1", {}),
    ("log_prob", "kl, forward + backward", {}),
    ("linear_kl", "forward + backward", {"V": 131072}),
    ("head_rows", "with gradient", {}),
    ("head_rows", "with gradient, exact KL", {}),
    ("lora_linear_parts", "shrink", {"N": 8192, "R": 16}),
    ("lora_linear_parts", "ds and db", {"O": 4096, "R": 16}),
    ("lora_linear_parts", "shrink, dropout 0.1", {}),
    ("lora_linear_parts", "ds and db", {}),
    ("lora_linear_parts", "shrink", {}),
    ("lora_linear", "forward + backward, compiled", {}),
    ("multi_lora_linear", "forward + backward", {}),
    ("reward_step", "step", {}),
    ("policy_step", "step", {}),
    ("rollout", "answers of one length", {}),
    ("linear_log_prob", "forward + backward, compiled", {}),
    ("log_prob", "forward + backward, compiled", {}),
]
ROOMS = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))
SECONDS = {"h200": 1.0, "tiny": 0.01}  # of timing per case
# seconds, by room: with less, no case
LEFT = {"reward_step": 100.0, "policy_step": 200.0, "rollout": 150.0, "study": 60.0,
        "timeline": 60.0, "": 15.0}  # fmt: skip
STUDY = 0.4  # of the time that the benchmarks may take is kept for the studies


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Build, test and benchmark on a GPU machine."
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="in all (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny; builds nothing")
    parser.add_argument("--skip-build", action="store_true", help="use what is built")
    parser.add_argument("--skip-tests", action="store_true", help="go to the benchmarks at once")
    parser.add_argument(
        "--skip-study", action="store_true", help="of models with 1.1 B weights, and timelines"
    )
    parser.add_argument(
        "--rooms", nargs="+", choices=ROOMS, default=ROOMS, metavar="ROOM",
        help="bench_ROOM.py alone (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--against", type=peers_of, default=BENCH_PEERS, metavar="NAME,NAME",
        help="peers to compare with (default: all)",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, help="folder (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    if options.results is None:
        options.results = ROOT / "benchmarks/results"
        if options.dry_run:
            options.results = Path(tempfile.mkdtemp(prefix="benchmarks-dry-run-"))
    out = os.environ.get("OUT")
    folders = [options.results, *([Path(out)] if out else [])]
    failed = False
    if options.dry_run:
        print("dry run: nothing is built, tiny shapes on the CPU, no figure means anything")
    elif not options.skip_build:
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        failed |= not run("build", build, folders, 0.35 * (deadline - time.monotonic()))
    if not options.skip_tests:
        tests = "tests/test_gpu.py" if options.dry_run else "tests"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "--tb=short", tests]
        failed |= not run("tests", command, folders, 0.45 * (deadline - time.monotonic()))
    preset = "tiny" if options.dry_run else "h200"
    reserved = 0 if options.skip_study else STUDY * (deadline - time.monotonic())
    found = cases(preset, options.rooms, options.against)
    results = benchmark(preset, found, deadline - reserved, folders)
    for share, task in () if options.skip_study else ((0.5, "reward"), (1.0, "policy")):
        if share * (left := deadline - time.monotonic()) > LEFT["study"]:
            failed |= not study(task, preset, folders, share * left)
    left = deadline - time.monotonic()
    if left > LEFT["timeline"] and not options.skip_study:
        failed |= not timeline(preset, folders, left)
    return int(failed or bool(results.failures))


def run(stage: str, command: list[str], folders: list[Path], seconds: float) -> bool:
    """One command with the repository importable; True when it succeeded in time."""
    print(f"\n== {stage}: {' '.join(command[1:])} (at most {seconds:.0f} s)", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, code = process.communicate(timeout=seconds)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
        output, code = process.communicate()[0], None
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    for folder in folders[1:]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stage}.log").write_text(output)
    print("\n".join(output.splitlines()[-25:]))
    how = "out of time" if code is None else f"exit code {code}"
    print(f"== {stage}: {how} after {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


def study(task: str, preset: str, folders: list[Path], seconds: float) -> bool:
    """`perl study`: LoRA ranks beside full tuning; its tables go beside the results."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "study"
        command = ["perl", "study", task, "--preset", preset, "--out", str(out)]
        into = f"study-{task}-{preset}"
        return kept(f"study-{task}", command, out, STUDY_FILES, folders, seconds, into)


def timeline(preset: str, folders: list[Path], seconds: float) -> bool:
    """Memory over a training step."""
    with tempfile.TemporaryDirectory() as scratch:
        command = ["benchmarks.timeline", "--preset", preset, "--results", scratch]
        return kept("timeline", command, Path(scratch), ["*.json"], folders, seconds)


def kept(
    stage: str,
    module: list[str],
    out: Path,
    files: Sequence[str],
    folders: list[Path],
    seconds: float,
    into: str = "",
) -> bool:
    """`python -m` of a module that fills the folder `out`, whose files go `into` a part of each of
    `folders`.

    False where it failed. Out of time, what it has done is kept.
    """
    start = time.monotonic()
    good = run(stage, [sys.executable, "-m", *module], folders, seconds)
    for path in itertools.chain.from_iterable(map(out.glob, files)):
        for place in (folder / into for folder in folders):
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    return good or time.monotonic() - start > seconds


STUDY_FILES = ("study.json", "table.md", "figure.svg")


# ------------------------------------------------------------------------------------------------
# What follows imports the package, so it comes after the build.
# ------------------------------------------------------------------------------------------------


def benchmark(preset: str, found: list[Case], deadline: float, folders: list[Path]) -> Results:
    import torch

    from benchmarks import report
    from benchmarks._measure import ceilings
    from benchmarks._results import Results, clocks

    device = "cpu" if preset == "tiny" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU here; try --dry-run")
    results = Results.begin("gpu" if device == "cuda" else "gpu-dry-run", preset, device)
    results.machine["ceilings"] = ceilings(device, tiny=preset == "tiny")
    results.write(folders)
    print("\n" + "\n".join(report.setting(results)), flush=True)
    try:
        for case in in_order(found):
            left = deadline - time.monotonic()
            if left < LEFT.get(case.room, LEFT[""]):
                results.left_out.append(f"{case.room} {case}")
                continue
            one_case(case, results, SECONDS[preset], deadline, folders)
    except KeyboardInterrupt:
        print("\nstopped; what was measured is kept")
    if device == "cuda":
        results.machine["gpu"]["after"] = clocks()
    paths = results.write(folders)
    print("\n" + report.as_text([results]))
    print("\nkept in " + ", ".join(map(str, paths)))
    return results


def one_case(
    case: Case, results: Results, seconds: float, deadline: float, folders: list[Path]
) -> None:
    """Measure one case and print its line; whatever goes wrong is kept and the next one begins."""
    import torch

    from benchmarks._measure import first_line, measure

    room = module_of(case.room)
    try:
        if hasattr(room, "measure_step"):
            row = room.measure_step(case, seconds)
        else:
            row = measure(room.contest, case, seconds, deadline=deadline)
    except Exception as error:
        why = first_line(error)
        results.failures[f"{case.room} {case}"] = why
        results.write(folders)
        print(f"FAILED {case.room} {case}: {why}", flush=True)
    else:
        results.add(row, folders)
        print(line(row), flush=True)
    if case.device != "cpu":
        torch.cuda.empty_cache()


def line(row: Row) -> str:
    """One row as it comes: shape · time · rate · memory · ratios · bars."""
    from benchmarks import report

    parts = [f"{row.room}: {row.check}", row.dtype, report.shape_of(row)]
    parts += [report.seconds(row.median_s), report.rate(row)]
    for name, share in row.measures.items():
        if name.startswith("share_of_copy_bandwidth"):
            parts.append(f"{share:.0%} of copy{name.removeprefix('share_of_copy_bandwidth')}")
    parts += [f"{share:.1%} {name}" for name, share in row.measures.items() if "moved" in name]
    if "ours" in row.memory:
        parts.append(f"{report.mebibytes(row.memory['ours'])} MiB")
    parts += [f"{found['ratio']:.2f} × {name}" for name, found in row.contestants.items()]
    parts += [f"{report.bar_text(bar)} {bar['met']}" for bar in row.bars]
    return " · ".join(part for part in parts if part)


def module_of(room: str) -> Any:
    from importlib import import_module

    return import_module(f"benchmarks.bench_{room}")


def cases(
    preset: str, rooms: Sequence[str] = ROOMS, against: tuple[str, ...] = BENCH_PEERS
) -> list[Case]:
    found = (case for room in rooms for case in module_of(room).cases(preset))
    return [replace(case, against=against) for case in found]


def in_order(found: list[Case]) -> list[Case]:
    """Most valuable first."""

    def rank(case: Case) -> int:
        for i, (room, check, letters) in enumerate(ORDER):
            if (room, check) == (case.room, case.check) and letters.items() <= case.shape.items():
                return i
        return len(ORDER)

    return sorted(found, key=rank)


if __name__ == "__main__":
    sys.exit(main())
