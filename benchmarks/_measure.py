"""One way to time, to weigh and to check, for every room, on the CPU and on a GPU.

Time     Contestants take turns in one process: every round runs each of them once. A ratio is the
         median over the rounds of ours / theirs within a round, so drift of the machine cancels.
         On a GPU: CUDA events, L2 flushed before each call, the host running ahead of the device.
Memory   The peak beyond what was there before the call, less the tensors that the call returns:
         what is left is neither input nor output. On the CPU in a fresh process per contestant,
         by the resident set; on a GPU by the allocator.
Error    Against float64 on the same inputs, beside the error of plain torch in the same dtype. The
         law of tests/_compare.py has to hold before any time is taken.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import random
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from _compare import check_law, errors
from torch import Tensor

from benchmarks._bars import judge
from benchmarks._results import Row, backend_name, instruction_sets, multiplies_bf16
from perl.memory import PeakMemory

OURS = "ours"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What --against chooses from, by how the names of its contestants begin; "compile": all that
# torch.compile has compiled. Ours, full tuning, plain torch and the limits are always there.
PEERS = {
    "peft": "peft", "trl": "trl", "liger": "liger_kernel", "unsloth": "unsloth",
    "cce": "cut_cross_entropy", "compile": "",
}  # fmt: skip
Run = Callable[[], Sequence[Tensor]]
# stopwatch(target, before_each_round, rounds) -> seconds of each call of target
Stopwatch = Callable[[Callable, Callable, int], list[float]]


def peer_of(contestant: str) -> str | None:
    """The key of PEERS that a contestant belongs to; None for one that is always there."""
    if "compiled" in contestant:
        return "compile"
    starts = (name for name, start in PEERS.items() if start and contestant.startswith(start))
    return next(starts, None)


@dataclass(frozen=True)
class Case:
    """One line of a table: what is measured, at which shape."""

    room: str
    check: str
    shape: dict[str, int]  # by the letters of the library
    dtype: str  # a key of DTYPES
    device: str = "cpu"
    dropout_p: float = 0.0
    graphed: bool = False  # replayed from a CUDA graph, where launches would be most of the time
    weighed: bool = True  # its memory is measured too
    against: tuple[str, ...] = tuple(PEERS)  # a choice of them

    def __str__(self) -> str:
        shape = " ".join(f"{letter}{size}" for letter, size in self.shape.items())
        return f"{self.check}, {self.dtype}, {shape}"

    def meets(self, contestant: str) -> bool:
        """Whether it is one of the peers that were chosen, or always there."""
        return peer_of(contestant) in (None, *self.against)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def tiny(self) -> Case:
        """The same at a size that loads every library and allocates next to nothing."""
        return replace(self, shape={letter: min(n, 32) for letter, n in self.shape.items()})


@dataclass(frozen=True)
class Compared:
    """One result three times over, for the law. `nats`: its error is told as a largest difference
    in nats, not relative to its size."""

    name: str
    ours: Tensor
    plain: Tensor
    exact: Tensor
    nats: bool = False
    scale: float | None = None  # of the terms that were added up, where the result is smaller


@dataclass
class Contest:
    """A case made concrete: the inputs exist, and every contestant is a call."""

    run: dict[str, Run]  # "ours" first; each returns its outputs, and gradients where it makes them
    compare: Callable[[], list[Compared]]  # the result to headline first
    flops: float = 0.0  # that no method can avoid
    bytes: float = 0.0  # likewise, for work that memory bounds
    copied_bytes: float = 0.0  # that the contestant "copy" reads and writes
    missing: dict[str, str] = field(default_factory=dict)  # contestant -> why it is not here
    measures: Callable[[], dict[str, float]] = dict  # further figures, by name


ContestOf = Callable[[Case], Contest]


def measure(
    contest_of: ContestOf,  # importable by name: another process calls it too
    case: Case,
    seconds: float,
    stopwatch: Stopwatch | None = None,
    weigh: bool = True,
    deadline: float | None = None,
) -> Row:
    """Check, time and weigh one case.

    Args:
        seconds: about how long all contestants together are timed.
        stopwatch: who times our own calls on the CPU; None: this module.
        weigh: also measure memory.
        deadline: of time.monotonic(), after which memory is left unmeasured.

    Raises:
        AssertionError: ours breaks the law; nothing has been timed.
    """
    contest = contest_of(case)
    found = verify(contest.compare(), case)
    run = {name: one for name, one in contest.run.items() if case.meets(name)}
    missing = {name: why for name, why in contest.missing.items() if case.meets(name)}
    if case.device != "cpu":
        run = _that_run(run, missing)
        if case.graphed:
            run = _graph_all(run, missing)
    if case.device == "cpu":
        times = time_on_cpu(run, seconds, stopwatch or plain_stopwatch)
    else:
        times = time_on_gpu(run, seconds, case.device)
    median, spread, contestants = summarise(times)
    measures = contest.measures()
    if contest.flops:
        measures["flop_per_s"] = contest.flops / median
    if contest.bytes:
        measures["byte_per_s"] = contest.bytes / median
    if "copy" in contestants:
        share = contest.bytes / contest.copied_bytes / contestants["copy"]["ratio"]
        measures["share_of_copy_bandwidth"] = share
        if "cuda" in contestants:
            measures["share_of_copy_bandwidth, cuda"] = share * contestants["cuda"]["ratio"]
    without = contestants.get("ours without dropout")
    if without and "frozen" in contestants:
        added = contestants["frozen"]["ratio"] * (1 - 1 / without["ratio"])
        measures["dropout_points"] = 100 * added
    memory = {}
    if weigh and case.weighed:
        names = list(run)
        del contest, run
        for name in names:
            if deadline is None or time.monotonic() < deadline:
                memory[name] = extra_bytes(contest_of, case, name)
    row = Row(
        room=case.room, check=case.check, shape=case.shape, dtype=case.dtype, device=case.device,
        backend=backend_name(case.device, case.torch_dtype),
        median_s=median, spread=spread, rounds=len(times[OURS]),
        contestants=contestants, missing=missing,
        memory=memory, memory_kind="beyond inputs and outputs",
        errors=found, measures=measures, bars=[],
    )  # fmt: skip
    row.bars = judge(row)
    return row


# ------------------------------------------------------------------------------------------------
# Error
# ------------------------------------------------------------------------------------------------


def verify(compared: list[Compared], case: Case) -> list[dict[str, Any]]:
    """Assert the law for every result; their errors, ours beside plain torch's."""
    found = []
    for c in compared:
        check_law(f"{case} {c.name}", c.ours, c.plain, c.exact, case.torch_dtype, c.scale)
        scale, which = (1.0, 1) if c.nats else (c.scale, 0)
        found.append(
            {
                "of": c.name,
                "unit": "nats, largest" if c.nats else "relative RMS",
                "ours": errors(c.ours, c.exact, scale)[which],
                "plain": errors(c.plain, c.exact, scale)[which],
            }
        )
    return found


# ------------------------------------------------------------------------------------------------
# Time
# ------------------------------------------------------------------------------------------------


def rounds_for(one_round: float, seconds: float) -> int:
    least = 5 if one_round < 5.0 else 3
    return max(least, min(201, int(seconds / max(one_round, 1e-9))))


def plain_stopwatch(target: Callable, before_each_round: Callable, rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        before_each_round()
        start = time.perf_counter()
        result = target()
        times.append(time.perf_counter() - start)
        del result
    return times


def time_on_cpu(
    run: dict[str, Run], seconds: float, stopwatch: Stopwatch = plain_stopwatch
) -> dict[str, list[float]]:
    """Seconds of every call, by contestant; the i-th of each belong to one round."""
    for one in run.values():
        one()  # libraries load and choose their kernels
    start = time.perf_counter()
    for one in run.values():
        one()
    rounds = rounds_for(time.perf_counter() - start, seconds)
    others = [name for name in run if name != OURS]
    times: dict[str, list[float]] = {name: [] for name in run}
    order = random.Random(0)

    def run_the_others() -> None:
        order.shuffle(others)
        for name in others:
            times[name] += plain_stopwatch(run[name], lambda: None, 1)

    times[OURS] = stopwatch(run[OURS], run_the_others, rounds)
    return times


def time_on_gpu(run: dict[str, Run], seconds: float, device: str) -> dict[str, list[float]]:
    """As time_on_cpu. All rounds are queued before the host waits once, so launches are hidden."""
    flush = torch.empty(2**28, dtype=torch.int8, device=device)  # several times the L2
    order, names = random.Random(0), list(run)
    events: dict[str, list[tuple]] = {name: [] for name in run}

    def one_round() -> None:
        order.shuffle(names)
        for name in names:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run[name]()
            end.record()
            events[name].append((start, end))

    for _ in range(3):
        one_round()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    one_round()
    torch.cuda.synchronize(device)
    rounds = rounds_for(time.perf_counter() - start, seconds)
    for name in events:
        events[name].clear()
    for _ in range(rounds):
        one_round()
    torch.cuda.synchronize(device)
    return {name: [1e-3 * a.elapsed_time(b) for a, b in found] for name, found in events.items()}


def summarise(times: dict[str, list[float]]) -> tuple[float, float, dict[str, dict[str, float]]]:
    """Median of ours, its interquartile range over it, and by contestant its median and the ratio
    ours / theirs: below 1 ours is faster. `low` and `high` are the ratio's quartiles."""
    ours = times[OURS]
    median = statistics.median(ours)
    low, _, high = statistics.quantiles(ours, n=4, method="inclusive")
    contestants = {}
    for name, theirs in times.items():
        if name == OURS:
            continue
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        contestants[name] = {
            "median_s": statistics.median(theirs),
            "ratio": quartiles[1],
            "low": quartiles[0],
            "high": quartiles[2],
        }
    return median, (high - low) / median, contestants


def ceilings(device: str, tiny: bool = False) -> list[tuple[str, str, float]]:
    """(name, unit, value): this device's rates at a large copy and at torch's matrix products."""
    on_cpu = device == "cpu"
    copied, n = (2**20, 256) if tiny else (2**28, 2048) if on_cpu else (2**32, 8192)
    dtypes = ["fp32"] if on_cpu else []
    if not on_cpu or multiplies_bf16(instruction_sets()):
        dtypes.append("bf16")

    def median(one: Run) -> float:
        run = {OURS: one}
        times = time_on_cpu(run, 0.01) if on_cpu else time_on_gpu(run, 0.5, device)
        return statistics.median(times[OURS])

    def copy() -> float:
        source = torch.ones(copied, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        return 2 * copied / median(lambda: (target.copy_(source),))

    def product(dtype: str) -> float:
        square = torch.randn(n, n, device=device).to(DTYPES[dtype])
        return 2 * n**3 / median(lambda: (square @ square,))

    products = [(f"{dtype} product of {n}²", "FLOP/s", product(dtype)) for dtype in dtypes]
    return [("copy", "B/s", copy()), *products]


def _that_run(run: dict[str, Run], missing: dict[str, str]) -> dict[str, Run]:
    """The contestants that run on this GPU; the others are missing, with the reason."""
    fitting = {}
    for name, one in run.items():
        try:
            one()
            fitting[name] = one
        except Exception as error:  # a peer's own, or that it needs more memory than there is
            if name == OURS:
                raise
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            missing[name] = "out of memory" if out_of_memory else f"fails: {first_line(error)}"
    torch.cuda.empty_cache()
    return fitting


def _graph_all(run: dict[str, Run], missing: dict[str, str]) -> dict[str, Run]:
    """Every contestant as the replay of its CUDA graph; who cannot be captured is missing."""
    graphs = {}
    for name, one in run.items():
        try:
            graphs[name] = _graph(one)
        except RuntimeError as error:
            if name == OURS:
                raise
            missing[name] = f"not capturable in a CUDA graph: {first_line(error)}"
    return graphs


def _graph(one: Run) -> Run:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            one()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = one()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return outputs

    return replay


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


def extra_bytes(contest_of: ContestOf, case: Case, name: str) -> int:
    """Peak memory of one contestant's call beyond its inputs and what it returns, in bytes."""
    if case.device == "cpu":
        return in_fresh_process(_extra_bytes, contest_of, case, name, torch.get_num_threads())
    return _extra_bytes(contest_of, case, name)


def _extra_bytes(contest_of: ContestOf, case: Case, name: str, threads: int = 0) -> int:
    if threads:
        torch.set_num_threads(threads)
        _free_at_once()
    for _ in range(2):
        contest_of(case.tiny()).run[name]()
    contest = contest_of(case)
    gc.collect()
    if case.device != "cpu":
        contest.run[name]()  # the library's workspaces are made once and stay
        torch.cuda.synchronize()
    with PeakMemory(case.device) as peak:
        outputs = contest.run[name]()
    returned = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in outputs}
    return max(0, peak.extra_bytes - sum(returned.values()))


def _free_at_once() -> None:
    """Let glibc give every freed tensor back, so that what is freed leaves the resident set."""
    trim_threshold, mmap_threshold = -1, -3  # numbers of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library: freed memory may count as in use before the call
        return
    mallopt(trim_threshold, 65536)
    mallopt(mmap_threshold, 65536)


def give_back_freed() -> None:
    """Take what was freed before the work begins out of the resident set, where glibc keeps it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in other C libraries
    if trim is not None:
        trim(0)


@functools.cache
def fresh_processes() -> multiprocessing.context.BaseContext:
    """Processes forked from a server that has imported everything and computed nothing.

    Everything is the rooms that are loaded here, and the `PEERS` that each of them names.
    """
    context = multiprocessing.get_context("forkserver")
    rooms = {n: m for n, m in sys.modules.items() if n.startswith("benchmarks.bench_")}
    peers = {peer for room in rooms.values() for peer in getattr(room, "PEERS", ())}
    context.set_forkserver_preload(["benchmarks._measure", *rooms, *peers])
    return context


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """function(*arguments) in a new process; its exception is raised here, as text."""
    here, there = fresh_processes().Pipe()
    process = fresh_processes().Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        failed, answer = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a benchmark process ended with exit code {process.exitcode}; out of memory?"
        ) from None
    process.join()
    if failed:
        raise RuntimeError(f"in a fresh process:\n{answer}")
    return answer


def _answer(connection: Any, function: Callable, arguments: tuple) -> None:
    warnings.simplefilter("ignore")  # the parent has given them
    try:
        connection.send((False, function(*arguments)))
    except BaseException:  # the parent says what it was
        connection.send((True, traceback.format_exc()))


# ------------------------------------------------------------------------------------------------
# What the rooms share
# ------------------------------------------------------------------------------------------------


def gpu_peer(case: Case, module: str, name: str, missing: dict[str, str]) -> Any:
    """`name` of a peer's module that runs on a GPU alone; None, and `missing` says why, without."""
    package = module.split(".")[0]
    if case.device == "cpu":
        missing[package] = "runs on a GPU alone"
        return None
    if find_spec(package) is None:
        missing[package] = "not importable"
        return None
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # peers look at the GPU, at drivers and at each other on import
        missing[package] = f"not importable: {first_line(error)}"
        return None


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def shapes_for(preset: str, dtype: str, table: dict[str, Any]) -> Any:
    """table[preset]; table["small"] for bf16 on a CPU that has no bf16 products."""
    on_cpu = preset in ("quick", "full")
    return table[
        "small"
        if on_cpu and dtype == "bf16" and not multiplies_bf16(instruction_sets())
        else preset
    ]


def with_gradients(
    forward: Callable[[], Tensor | tuple[Tensor, ...]],
    leaves: Sequence[Tensor],
    incoming: Sequence[Tensor],
) -> Run:
    """A call that returns forward's outputs and the gradients of `leaves`."""

    def run() -> tuple[Tensor, ...]:
        found = forward()
        outputs = found if isinstance(found, tuple) else (found,)
        gradients = torch.autograd.grad(outputs, leaves, incoming)
        return (*(t.detach() for t in outputs), *gradients)

    return run


def without_gradients(forward: Callable[[], Tensor | tuple[Tensor, ...]]) -> Run:
    """A call that returns forward's outputs."""

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = forward()
        return found if isinstance(found, tuple) else (found,)

    return run


def first(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    """log p of what may be the pair (log p, entropy)."""
    return found[0] if isinstance(found, tuple) else found


def some_rows(rows: int, device: str) -> Tensor:
    """At most 64 rows, the first and the last among them, where a row needs no other row."""
    return torch.linspace(0, rows - 1, min(rows, 64), device=device).long()


def at_rows(rows: Tensor, dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Those rows of each tensor without their history, the floating ones in dtype."""
    return [t.detach()[rows].to(dtype) if t.is_floating_point() else t[rows] for t in tensors]


def normal(case: Case, *shape: int, std: float = 1.0) -> Tensor:
    """Random values in the case's dtype, on its device."""
    return (std * torch.randn(*shape, device=case.device)).to(case.torch_dtype)
