"""`pytest benchmarks`: what the rooms' bench_*.py share, and the table at the end.

Every case of a room is a test; it fails when a result is wrong, not when a bar is missed. Rows go
to benchmarks/results/ as they come, and into pytest-benchmark's own JSON (--benchmark-json).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ALSO, PRESETS, _limits, _results, peers_of, report
from benchmarks._measure import ceilings, peer_of, plain_stopwatch
from perl.config import BENCH_PEERS

OPEN = pytest.StashKey[dict]()
CEILINGS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of this library")
    group.addoption(
        "--preset", choices=PRESETS, default="quick", type=lambda name: ALSO.get(name, name),
        help="quick or cpu-small: smaller shapes, 20 minutes on two cores; full or cpu: the shapes "
        "that the bars are set for; tiny: seconds, to try the harness (default: %(default)s)",
    )  # fmt: skip
    group.addoption(
        "--against", type=peers_of, default=BENCH_PEERS, metavar="NAME,NAME",
        help=f"peers to compare with, of {','.join(BENCH_PEERS)} (default: all); ours, full "
        "tuning, plain torch and the machine's limits are always there",
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
        options = metafunc.config.option
        found = metafunc.module.cases(options.preset)
        against = [replace(case, against=options.against) for case in found]
        none = pytest.mark.skip(f"no case of preset {options.preset} is of this device")
        metafunc.parametrize("case", against or [pytest.param("none", marks=none)], ids=str)


@pytest.fixture
def record(benchmark: Any, case: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """record(function, *arguments): keep the Row that function(*arguments, ...) returns."""
    options, stash = request.config.option, request.config.stash
    opened = stash[OPEN]

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
            if CEILINGS not in stash:
                stash[CEILINGS] = ceilings("cpu", tiny=options.preset == "tiny")
            opened[row.room].machine["ceilings"] = stash[CEILINGS]
        opened[row.room].add(row, [options.results])
        benchmark.extra_info.update(
            {name: getattr(row, name) for name in _results.ROW_FIELDS},
            flops=_limits.flops(row),
            bytes=_limits.least_bytes(row),
            share_of_limit=_limits.share_of_limit(row, stash[CEILINGS]),
        )

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    opened = list(config.stash[OPEN].values())
    rows = [row for results in opened for row in results.rows]
    skipped = terminalreporter.stats.get("skipped", ())
    if opened:
        terminalreporter.section("benchmarks")
        terminalreporter.write_line(report.as_text(opened))
    if left := not_measured(rows, config.option.against, skipped):
        terminalreporter.section("not measured")
        terminalreporter.write_line("\n".join(left))
    if opened:
        terminalreporter.section("kept in")
        for results in opened:
            terminalreporter.write_line(f"{config.option.results / results.stem}.json")


def not_measured(
    rows: Sequence[_results.Row], against: Sequence[str], skipped: Sequence[pytest.TestReport]
) -> list[str]:
    """Cases that were skipped, and peers that were asked for and stand in no row; each with why."""
    left = [f"{one.nodeid}: {one.longrepr[2]}" for one in skipped]
    if rows:
        met = {peer_of(name) for row in rows for name in (*row.contestants, *row.missing)}
        absent = [peer for peer in against if peer not in met]
        left += [f"{peer}: nothing here compares with it on this device" for peer in absent]
    return left
