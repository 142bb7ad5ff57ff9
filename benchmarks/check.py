"""`make bench-check`: today's ratios beside the committed ones of the same kind of machine.

    python -m benchmarks.check                     every room with committed figures of preset quick
    python -m benchmarks.check --rooms lora_mlp    these alone
    python -m benchmarks.check --preset full       those of the shapes that bars are set for

Ratios of times within a round are compared, and of a whole step's peak memory; never a time with a
time of another day. A loss is more than 10 % beyond the spread: the lower quartile of the new ratio
lies more than 10 % above the upper one of the committed. It has to show in two runs.

Exit code 0: nothing is lost, or nothing is committed for this kind of machine; 1: what is told, or
none of the committed ratios has come again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT
from benchmarks._results import FOLDER, Results, Row, machine, slug
from benchmarks.report import every_result, shape_of

PRESETS = ("quick", "full")
MARGIN = 1.10


class Ratio(NamedTuple):
    """Ours over a rival's, and its quartiles; memory has none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        spread = "" if self.low == self.high else f" ({self.low:.2f} to {self.high:.2f})"
        return f"{self.value:.2f}{spread}"


def ratios(row: Row) -> dict[str, Ratio]:
    """All of a row that are compared, by what they are."""
    found = {
        f"time over {rival}": Ratio(told["ratio"], told["low"], told["high"])
        for rival, told in row.contestants.items()
    }
    if row.memory_kind == "peak of the process":
        found |= {
            f"memory over {rival}": Ratio(*(3 * [row.memory["ours"] / size]))
            for rival, size in row.memory.items()
        }
    return {what: ratio for what, ratio in found.items() if "ours" not in what}


def pairs(committed: Sequence[Row], measured: Sequence[Row]) -> Iterator[tuple[str, Ratio, Ratio]]:
    """(what, its committed ratio, its new one) of all that both have."""
    new = {_name(row): ratios(row) for row in measured}
    for row in committed:
        now = new.get(_name(row), {})
        for what, was in ratios(row).items():
            if what in now:
                yield f"{_name(row)}, {what}", was, now[what]


def losses(found: Iterable[tuple[str, Ratio, Ratio]]) -> dict[str, str]:
    """What has become worse, by its name: both figures, as text."""
    return {name: f"{now}, was {was}" for name, was, now in found if now.low > MARGIN * was.high}


def _name(row: Row) -> str:
    return f"{row.room}: {row.check}, {row.dtype} {shape_of(row)}"


def measure(room: str, preset: str, threads: int) -> list[Row]:
    """The room's rows now.

    Raises:
        RuntimeError: a result was wrong, or the run failed otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{room}.py", "-q"]
        command += ["--preset", preset, "--threads", str(threads), "--results", folder]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stdout[-4000:]}")
        return [row for one in every_result(Path(folder)) for row in one.rows]


def compare(committed: Results) -> tuple[int, dict[str, str]]:
    """How many ratios of one file of results have come again, and losses() that two runs show."""
    room, threads = committed.rows[0].room, committed.machine["threads"]

    def again() -> list[tuple[str, Ratio, Ratio]]:
        return list(pairs(committed.rows, measure(room, committed.preset, threads)))

    found = again()
    lost = losses(found)
    if lost:
        both = losses(again())
        lost = {name: told for name, told in lost.items() if name in both}
    return len(found), lost


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check",
        description="Compare ratios with the committed ones of this kind of machine.",
    )
    parser.add_argument("--rooms", nargs="+", metavar="ROOM", help="these alone (default: all)")
    parser.add_argument(
        "--results", type=Path, default=FOLDER, help="the committed ones (default: %(default)s)"
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default=PRESETS[0], help="of which (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    kind = slug(machine())
    of_kind = [one for one in every_result(options.results) if slug(one.machine) == kind]
    of_kind = [one for one in of_kind if one.rows and one.preset in PRESETS]
    files = [
        one
        for one in of_kind
        if one.preset == options.preset
        and one.rows[0].room in (options.rooms or [one.rows[0].room])
    ]
    if not files:
        there = [f"{one.rows[0].room} at --preset {one.preset}" for one in of_kind]
        print(f"nothing to compare: of what was asked for nothing is committed for {kind}; "
              f"there is {', '.join(there) or 'nothing at all'}")  # fmt: skip
        return 0
    count, lost = 0, {}
    for committed in files:
        compared, worse = compare(committed)
        print(f"{committed.stem}: {len(committed.rows)} rows, {compared} ratios", flush=True)
        count, lost = count + compared, lost | worse
    for name, told in lost.items():
        print(f"LOST {name}: {told}")
    print(f"{len(lost)} losses of more than {MARGIN - 1:.0%} beyond the spread in {count} ratios")
    if not count:
        print("no committed ratio has come again, so this has shown nothing")
    return 1 if lost or not count else 0


if __name__ == "__main__":
    sys.exit(main())
