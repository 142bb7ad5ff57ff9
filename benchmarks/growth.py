"""How cost grows: time and memory of ours and of others, over one size at a time.

    python -m benchmarks.growth                    every sweep, about a minute each on two cores
    python -m benchmarks.growth --sweeps rank      one of them; what is measured is kept

Every point is a row of a room's own benchmark, its result checked before it is timed. A run that
was stopped goes on where it was, on the same machine with the same versions. What a sweep tells is
its exponent: the slope of log cost over log size, by least squares, with its standard error. Memory
is the row's: the peak of a step's process, with its libraries, or what an op takes beyond inputs
and outputs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._bars import TRAIN
from benchmarks._measure import OURS, Case, ceilings, measure
from benchmarks._results import FOLDER, Results, Row
from benchmarks.gpu import module_of
from perl.progress import progress

NAME = "growth"
STEP = {"B": 4, "T": 64, "H": 256, "L": 4, "F": 704, "A": 4, "V": 8000, "R": 16}
HEAD = {"N": 256, "H": 512, "V": 16000}
LAYER = {"N": 512, "D": 1024, "O": 1024, "R": 16}
SECONDS = 0.5  # of timing per point


@dataclass(frozen=True)
class Sweep:
    """Rows of a room whose shapes differ in one size."""

    title: str
    room: str
    check: str
    others: tuple[str, ...]  # whom ours is shown beside
    shapes: tuple[dict[str, int], ...]
    x: str  # the letter that grows, or a measure of the row
    dtype: str = "fp32"

    def cases(self) -> list[Case]:
        return [
            Case(self.room, self.check, shape, self.dtype, against=("peft",))
            for shape in self.shapes
        ]

    def size(self, row: Row) -> float:
        return row.shape.get(self.x) or row.measures[self.x]


def _over(letter: str, sizes: Sequence[int], shape: dict[str, int]) -> tuple[dict[str, int], ...]:
    return tuple(shape | {letter: size} for size in sizes)


_TUNED = ("full", "peft")
SWEEPS = (
    Sweep(
        "sequence length", "reward_step", "step", _TUNED,
        _over("T", (32, 64, 128, 256), STEP), "T",
    ),
    Sweep("batch", "reward_step", "step", _TUNED, _over("B", (2, 4, 8, 16), STEP), "B"),
    Sweep(
        "hidden size", "reward_step", "step", _TUNED,
        tuple(STEP | {"H": h, "F": 11 * h // 4, "A": h // 64} for h in (128, 256, 512, 768)), "H",
    ),
    Sweep(
        "model size, by layers", "reward_step", "step", _TUNED,
        _over("L", (2, 4, 8, 16), STEP), "parameters",
    ),
    Sweep(
        "vocabulary", "linear_log_prob", TRAIN, ("eager",),
        _over("V", (4000, 8000, 16000, 32000, 64000), HEAD), "V",
    ),
    Sweep(
        "rank", "lora_linear", TRAIN, ("full", "peft"),
        _over("R", (4, 16, 64, 256), LAYER), "R",
    ),
)  # fmt: skip


def exponent(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(slope, its standard error) of log value over log size, by least squares.

    Raises:
        ValueError: fewer than three points, or one that is not above 0.
    """
    if len(sizes) < 3 or min(*sizes, *values) <= 0:
        raise ValueError(f"an exponent wants three points above 0, was given {values} at {sizes}")
    x, y = ([math.log(value) for value in found] for found in (sizes, values))
    slope, intercept = statistics.linear_regression(x, y)
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    return slope, math.sqrt(left / (len(x) - 2) / spread)


def curves(results: Results) -> list[dict[str, Any]]:
    """Of each sweep that has three points: its title, and for "time" (s) and "memory" (bytes) the
    sizes, values and exponent of each contestant."""
    found = []
    for sweep in SWEEPS:
        wanted = {_key(case) for case in sweep.cases()}
        rows = sorted((r for r in results.rows if _key(r) in wanted), key=sweep.size)
        if len(rows) < 3:
            continue
        lines: dict[str, dict] = {"time": {}, "memory": {}}
        for name in (OURS, *sweep.others):
            costs = {"time": [_time(row, name) for row in rows],
                     "memory": [row.memory.get(name) for row in rows]}  # fmt: skip
            for cost, values in costs.items():
                points = [(sweep.size(r), v) for r, v in zip(rows, values, strict=True) if v]
                if len(points) >= 3:
                    sizes, values = map(list, zip(*points, strict=True))
                    slope, error = exponent(sizes, values)
                    line = {"sizes": sizes, "values": values, "slope": slope, "error": error}
                    lines[cost][name] = line
        found.append({"title": sweep.title, "room": sweep.room, **lines})
    return found


def _time(row: Row, name: str) -> float | None:
    return row.median_s if name == OURS else row.contestants.get(name, {}).get("median_s")


def _key(of: Case | Row) -> tuple:
    return of.room, of.check, of.dtype, *of.shape.items()


def table(results: Results) -> list[list[str]]:
    """A line per sweep and contestant: the exponents of time and of memory."""
    exponents = ["exponent of time", "of memory"]
    lines = [["what grows", "of", "from", "to", "contestant", *exponents]]
    for curve in curves(results):
        for name, time in curve["time"].items():
            cells = [_told(time), _told(curve["memory"].get(name))]
            ends = [f"{size:,.0f}" for size in (time["sizes"][0], time["sizes"][-1])]
            lines.append([curve["title"], curve["room"], *ends, name, *cells])
    return lines


def _told(line: dict | None) -> str:
    return f"{line['slope']:.2f} ± {line['error']:.2f}" if line else "not measured"


def point(case: Case) -> Row:
    room = module_of(case.room)
    if hasattr(room, "measure_step"):
        row = room.measure_step(case, SECONDS)
    else:
        row = measure(room.contest, case, SECONDS)
    row.bars = []  # set for other sizes
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    titles = [sweep.title for sweep in SWEEPS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description="How time and memory grow with each size."
    )
    parser.add_argument(
        "--sweeps", nargs="+", choices=titles, default=titles, metavar="NAME",
        help=f"of: {'; '.join(titles)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--results", type=Path, default=FOLDER, help="folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    results = begun(options.results)
    done = {_key(row) for row in results.rows}
    cases = [c for sweep in SWEEPS if sweep.title in options.sweeps for c in sweep.cases()]
    missing = {_key(case): case for case in cases if _key(case) not in done}  # sweeps share points
    with progress(len(cases), NAME, "point", len(cases) - len(missing)) as bar:
        for case in missing.values():
            results.add(point(case), [options.results])
            bar.update()
    for line in table(results):
        print("  ".join(cell.ljust(22) for cell in line).rstrip())
    print(f"kept in {options.results / results.stem}.json")
    return 0


def begun(folder: Path) -> Results:
    """The rows that the folder has of this machine and these versions; none of others."""
    results = Results.resume(NAME, NAME, folder)
    if not results.rows:
        results.machine["ceilings"] = ceilings("cpu")
    return results


if __name__ == "__main__":
    sys.exit(main())
