"""`pytest benchmarks`: what the rooms' bench_*.py share, and the table at the end.

Every case of a room is a test; it fails when a result is wrong, not when a bar is missed. Rows go
to benchmarks/results/ as they come, and into pytest-benchmark's own JSON (--benchmark-json).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _results, report
from benchmarks._measure import plain_stopwatch

PRESETS = {"quick": 0.7, "full": 5.0, "tiny": 0.01}  # seconds of timing per case
OPEN = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of this library")
    group.addoption(
        "--preset", choices=sorted(PRESETS), default="quick",
        help="quick: smaller shapes, a few minutes; full: the shapes that the bars are set for; "
        "tiny: seconds, to try the harness (default: %(default)s)",
    )  # fmt: skip
    group.addoption(
        "--results", type=Path, default=_results.FOLDER, metavar="FOLDER",
        help="where the JSON goes (default: benchmarks/results)",
    )  # fmt: skip
    group.addoption(
        "--threads", type=int, default=0, help="of torch; 0 leaves torch's choice (default: 0)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OPEN] = {}
    config.option.benchmark_quiet = True  # its table has absolute times only; ours is below
    if config.option.threads:
        torch.set_num_threads(config.option.threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        found = metafunc.module.cases(metafunc.config.option.preset)
        metafunc.parametrize("case", found, ids=str)


@pytest.fixture
def record(benchmark: Any, case: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """record(function, *arguments): keep the Row that function(*arguments, ...) returns."""
    options, opened = request.config.option, request.config.stash[OPEN]

    def pedantic(target: Callable, before_each_round: Callable, rounds: int) -> list[float]:
        benchmark.pedantic(target, setup=before_each_round, rounds=rounds)
        return benchmark.stats.stats.data

    def record(function: Callable, *arguments: Any) -> None:
        benchmark.group = f"{case.room}: {case.check}"
        row = function(
            *arguments,
            seconds=PRESETS[options.preset],
            stopwatch=pedantic if benchmark.enabled else plain_stopwatch,
        )
        if row.room not in opened:
            name = row.room if options.preset == "full" else f"{row.room}-{options.preset}"
            opened[row.room] = _results.Results.begin(name, options.preset)
        opened[row.room].add(row, [options.results])
        benchmark.extra_info.update({name: getattr(row, name) for name in _results.ROW_FIELDS})

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    opened = list(config.stash[OPEN].values())
    if opened:
        terminalreporter.section("benchmarks")
        terminalreporter.write_line(report.as_text(opened))
        terminalreporter.section("kept in")
        for results in opened:
            terminalreporter.write_line(f"{config.option.results / results.stem}.json")
