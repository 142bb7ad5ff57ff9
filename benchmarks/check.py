"""`make bench-check`: today's ratios beside the committed ones of the same kind of machine.

    python -m benchmarks.check                     every room with committed figures of preset quick
    python -m benchmarks.check --rooms lora_mlp    these alone

Ratios of times within a round are compared, and of a whole step's peak memory; never a time with a
time of another day. A loss is more than 10 % beyond the spread: the lower quartile of the new ratio
lies more than 10 % above the upper one of the committed. It has to show in two runs.

Exit code 0: nothing is lost, or nothing is committed for this kind of machine; 1: what is told.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks._results import FOLDER, Results, Row, machine, slug
from benchmarks.report import every_result, shape_of

PRESET = "quick"
MARGIN = 1.10


def losses(committed: Sequence[Row], measured: Sequence[Row]) -> dict[str, str]:
    """What of `committed` has become worse, by the name of the figure: both figures, as text."""
    found = {}
    new_rows = {_name(row): row for row in measured}
    for old in committed:
        new = new_rows.get(_name(old))
        if new is None:
            continue
        for rival in [n for n in old.contestants if n in new.contestants and "ours" not in n]:
            was, now = old.contestants[rival], new.contestants[rival]
            if now["low"] > MARGIN * was["high"]:
                found[f"{_name(old)}, time over {rival}"] = (
                    f"{now['ratio']:.2f} ({now['low']:.2f} to {now['high']:.2f}), "
                    f"was {was['ratio']:.2f} ({was['low']:.2f} to {was['high']:.2f})"
                )
        if old.memory_kind == "peak of the process":
            for rival in [n for n in old.memory if n in new.memory and "ours" not in n]:
                was, now = (row.memory["ours"] / row.memory[rival] for row in (old, new))
                if now > MARGIN * was:
                    found[f"{_name(old)}, memory over {rival}"] = f"{now:.2f}, was {was:.2f}"
    return found


def _name(row: Row) -> str:
    return f"{row.room}: {row.check}, {row.dtype} {shape_of(row)}"


def measure(room: str, threads: int) -> list[Row]:
    """The room's rows now.

    Raises:
        RuntimeError: a result was wrong, or the run failed otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{room}.py", "-q"]
        command += ["--preset", PRESET, "--threads", str(threads), "--results", folder]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stdout[-4000:]}")
        return [row for one in every_result(Path(folder)) for row in one.rows]


def compare(committed: Results) -> dict[str, str]:
    """losses() of one file of results that two runs show."""
    room, threads = committed.rows[0].room, committed.machine["threads"]
    lost = losses(committed.rows, measure(room, threads))
    if lost:
        again = losses(committed.rows, measure(room, threads))
        lost = {name: told for name, told in lost.items() if name in again}
    return lost


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check",
        description="Compare ratios with the committed ones of this kind of machine.",
    )
    parser.add_argument("--rooms", nargs="+", metavar="ROOM", help="these alone (default: all)")
    parser.add_argument(
        "--results", type=Path, default=FOLDER, help="the committed ones (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    kind = slug(machine())
    files = [
        one
        for one in every_result(options.results)
        if one.preset == PRESET and slug(one.machine) == kind and one.rows
        and one.rows[0].room in (options.rooms or [one.rows[0].room])
    ]  # fmt: skip
    if not files:
        print(f"nothing is committed for {kind} at preset {PRESET}, so there is nothing to lose")
        return 0
    lost: dict[str, str] = {}
    for committed in files:
        print(f"{committed.stem}: {len(committed.rows)} rows", flush=True)
        lost |= compare(committed)
    for name, told in lost.items():
        print(f"LOST {name}: {told}")
    print(f"{len(lost)} losses of more than {MARGIN - 1:.0%} beyond the spread")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
