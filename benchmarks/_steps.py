"""Training steps of contestants that live in a process each and take turns, step by step.

The parent times them; a contestant tells figures of its own, its peak memory among them. For that
its process imports what it needs and no more; where memory is not told, all are forked from one
that has imported what any of them needs.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks._bars import judge
from benchmarks._measure import (
    OURS,
    Case,
    Stopwatch,
    fresh_processes,
    plain_stopwatch,
    summarise,
    time_on_cpu,
)
from benchmarks._results import Row, backend_name

# serve(turns, name, case) tells that it is ready, then does a step whenever a turn is its own;
# importable by name, as another process calls it
Serve = Callable[["Turns", str, Case], None]


def measure_turns(
    serve: Serve,
    case: Case,
    contestants: list[str],  # ours among them
    missing: dict[str, str],
    tokens: int,  # of a step
    seconds: float,
    stopwatch: Stopwatch | None,
    errors_of: Callable[[dict[str, Any]], dict[str, Any]],
) -> Row:
    """A row of all contestants' steps.

    errors_of: from what each has told when it was ready to the row's errors; it raises
    AssertionError where ours is wrong, before any time is taken.
    A contestant's figures but its "peak" become measures, as "FIGURE" or "FIGURE, CONTESTANT".
    """
    processes = {name: _Remote(serve, name, case) for name in contestants}
    try:
        told = {name: process.receive() for name, process in processes.items()}
        errors = errors_of(told)
        run = {name: process.step for name, process in processes.items()}
        times = time_on_cpu(run, seconds, stopwatch or plain_stopwatch)
        figures = {name: process.ask("figures") for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.close()
    median, spread, others = summarise(times)
    measures = {"tokens_per_s": tokens / median} | {
        key if name == OURS else f"{key}, {name}": value
        for name, found in figures.items()
        for key, value in found.items()
        if key != "peak"
    }
    row = Row(
        room=case.room, check=case.check, shape=case.shape, dtype=case.dtype, device=case.device,
        backend=backend_name(case.device, case.torch_dtype),
        median_s=median, spread=spread, rounds=len(times[OURS]),
        contestants=others, missing=missing,
        memory={name: found["peak"] for name, found in figures.items()} if case.weighed else {},
        memory_kind="peak of the process", errors=[errors], measures=measures, bars=[],
    )  # fmt: skip
    row.bars = judge(row)
    return row


class Turns:
    """A contestant's end of the connection."""

    def __init__(self, connection: Any):
        self.connection = connection

    def ready(self, told: Any = None) -> None:
        """Once, before the first turn."""
        self.connection.send(told)

    def wait(self, figures: Callable[[], dict[str, float]]) -> bool:
        """Answer questions until a step is wanted; False when nobody asks any more."""
        try:
            while self.connection.recv() != "step":
                self.connection.send(figures())
        except EOFError:
            return False
        return True

    def done(self) -> None:
        self.connection.send(time.perf_counter())


class _Remote:
    """A contestant in its own process, that does a step when told to."""

    def __init__(self, serve: Serve, name: str, case: Case):
        context = multiprocessing.get_context("spawn") if case.weighed else fresh_processes()
        self.connection, there = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(serve, there, name, case, torch.get_num_threads()), daemon=True
        )
        self.process.start()
        there.close()

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(
                f"a process of a training step ended with exit code {self.process.exitcode}; "
                "its traceback is above"
            ) from None

    def ask(self, question: str) -> Any:
        self.connection.send(question)
        return self.receive()

    def step(self) -> tuple[()]:
        self.ask("step")
        return ()

    def close(self) -> None:
        self.connection.close()  # ends the process, which waits for questions
        self.process.join(10)
        self.process.kill()


def _serve(serve: Serve, connection: Any, name: str, case: Case, threads: int) -> None:
    torch.set_num_threads(threads)
    serve(Turns(connection), name, case)
