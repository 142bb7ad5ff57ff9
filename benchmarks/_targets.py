"""Where every bar stands on every kind of machine, and the paper's Table 1 beside ours.

Made from rows alone: a bar is judged anew by today's `_bars.BARS`. On a machine the rows of preset
full speak; those of quick, which are smaller than what the bars are set for, only where there are
no others, and say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks._bars import BARS, Bar, in_words, standing
from benchmarks._results import Results, Row, kind_of, multiplies_bf16

Table = list[list[str]]  # the first row is the header
NOT_MEASURED = "not measured"
PRESETS = ("full", "h200", "quick")  # the first of a kind of machine that has a bar's rows speaks
GPU = "H200"  # the machine that the GPU's bars are set for

# arXiv 2403.10704, Table 1: LoRA relative to full tuning, by data set.
PAPER = {
    "data": ("Harmless", "SHP", "TL;DR", "BOLT", "UI automation", "VQA"),
    "reward model, peak memory": ("43.1 %", "48 %", "50 %", "–", "56 %", "74 %"),
    "reward model, training speed": ("1.6×", "1.5×", "1.7×", "–", "1.9×", "1.15×"),
    "RL, peak memory": ("80 %", "75 %", "75 %", "80 %", "74 %", "74 %"),
    "RL, training speed": ("1.3×", "1.15×", "1.15×", "1.05×", "1.20×", "1.24×"),
}
STEPS = {"reward model": "reward_step", "RL": "policy_step"}
# What models are to learn, as `perl study` words it, and how much.
LEARNING = {
    "Embedded world, pairs: accuracy, rank 16, tiny": "≥ 0.95",
    "Embedded world: oracle, 0 to 1, rank 16 over full": "≥ 0.9",
    "Coffee dialogs, true or shuffled answer: accuracy, rank 16, 5 layers": "≥ 0.88",
    "Coffee dialogs, true or shuffled answer: full less rank 16, 5 layers": "≤ 0.02",
    "Taskmaster Coffee, thumbs up or down: AUC, rank 16, 5 layers": "≥ 0.72",
    "Taskmaster Coffee, thumbs up or down: full less rank 16, 5 layers": "≤ 0.02",
}
# What compilers say of the GPU kernels, for which no GPU is needed: it stands as its test passes.
COMPILED = [
    ["check", "on", "bar", "verdict", "test that fails otherwise"],
    *(
        [check, on, bar, "met", f"tests/{test}"]
        for check, on, bar, test in (
            ("Triton kernels at their pinned configurations compile",
             "sm_80, sm_90, sm_100, gfx942", "all",
             "test_triton_compile.py::test_compiles_and_fits"),
            ("registers that Triton kernels spill", "sm_90", "0",
             "test_triton_compile.py::test_no_spills_on_sm_90"),
            ("matrix kernels of 16 bits use wgmma", "sm_90", "all",
             "test_triton_compile.py::test_matrix_kernels_use_wgmma"),
            (".cu files compile, where nvcc is, and spill no register", "sm_80, sm_90a, sm_100",
             "all", "test_cuda_compile.py::test_compiles_without_spills"),
        )
    ),
]  # fmt: skip


def kinds(results: Sequence[Results], on: str) -> dict[str, list[Results]]:
    """By the kind of machine, those "cpu" or "gpu" results whose rows bars may speak of."""
    found: dict[str, list[Results]] = {}
    for one in results:
        if one.preset in PRESETS and ("gpu" in one.machine) == (on == "gpu"):
            found.setdefault(kind_of(one.machine), []).append(one)
    return dict(sorted(found.items()))


def targets(results: Sequence[Results], on: str) -> Table:
    """A line per bar of "cpu" or "gpu", a column per kind of machine."""
    machines = kinds(results, on) or {GPU if on == "gpu" else "CPU": []}
    table = [["room: check", "type", "bar", "aim", "over", *machines]]
    for bar in BARS:
        for dtype in [bar.dtype] if bar.dtype else ["bf16", "fp32"]:
            if bar.on == on:
                cells = [_cell(bar, dtype, found) for found in machines.values()]
                table.append([f"{bar.room}: {bar.check}", dtype, *_wanted(bar), *cells])
    return table


def counts(table: Table) -> dict[str, dict[str, int]]:
    """By the machine or study, how many bars are met, missed and not measured."""
    verdicts = ("met", "missed", NOT_MEASURED)
    first = table[0].index("over" if "over" in table[0] else "bar") + 1
    columns = {
        name: [line[i] for line in table[1:]] for i, name in enumerate(table[0]) if i >= first
    }
    return {
        name: {verdict: sum(verdict in cell for cell in cells) for verdict in verdicts}
        for name, cells in columns.items()
    }


def learning(studies: Sequence[Path]) -> Table:
    """A line per bar of `perl study`, a column per folder of one; those of LEARNING first."""
    bars: dict[str, str] = dict(LEARNING)
    found: dict[str, dict[str, str]] = {}
    for folder in studies:
        cells = found[folder.name] = {}
        for name, wanted, value, verdict in study_tables(folder).get("Bars", [])[1:]:
            bars.setdefault(name, wanted)
            cells[name] = f"{value} {verdict}"
    table = [["study: check", "bar", *(found or {"perl study": {}})]]
    for name, wanted in bars.items():
        cells = [cells.get(name, NOT_MEASURED) for cells in found.values()] or [NOT_MEASURED]
        table.append([name, wanted, *cells])
    return table


def study_tables(folder: Path) -> dict[str, Table]:
    """The tables of a study's table.md, by title."""
    tables: dict[str, Table] = {}
    path, title = folder / "table.md", ""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if line.startswith("**"):
            title = line.strip("*")
        elif line.startswith("|") and not line.startswith("| ---"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            tables.setdefault(title, []).append(cells)
    return tables


def papers_table(results: Sequence[Results]) -> Table:
    """The paper's Table 1, with a column for each kind of machine and type that ours is of."""
    ours: dict[str, dict[str, str]] = {}
    for on in ("gpu", "cpu"):
        for machine, found in kinds(results, on).items():
            for model, room in STEPS.items():
                for row in _steps(found, room):
                    cells = ours.setdefault(f"ours, {machine}, {row.dtype}", {})
                    cells[f"{model}, peak memory"] = _memory(row)
                    cells[f"{model}, training speed"] = _speed(row)
    table = [["LoRA relative to full tuning", *PAPER["data"], *(ours or {"ours": {}})]]
    for line, paper in list(PAPER.items())[1:]:
        found = [cells.get(line, NOT_MEASURED) for cells in ours.values()] or [NOT_MEASURED]
        table.append([line, *paper, *found])
    return table


def _memory(row: Row) -> str:
    known = row.memory.get("full") and row.memory.get("ours")
    return f"{100 * row.memory['ours'] / row.memory['full']:.0f} %" if known else NOT_MEASURED


def _speed(row: Row) -> str:
    full = row.contestants.get("full")
    return f"{1 / full['ratio']:.2f}×" if full else NOT_MEASURED


def _steps(found: Sequence[Results], room: str) -> list[Row]:
    """A room's whole steps, at the size that is told of."""
    rows = [row for one in found if one.preset != "quick" for row in one.rows]
    return [row for row in rows if (row.room, row.check) == (room, "step")]


def _wanted(bar: Bar) -> tuple[str, str, str]:
    where = "".join(f", {letter}{size}" for letter, size in bar.where.items())
    over = "geometric mean" if bar.over == "geomean" else "each shape"
    aim = "" if bar.stretch is None else figure(bar, bar.stretch)
    return in_words(bar.what, bar.sense, figure(bar, bar.must)), aim, over + where


def figure(bar: Bar, value: float) -> str:
    """A value of the bar's in the bar's unit."""
    return f"{value / 2**20:.1f} MiB" if bar.what == "memory" else f"{value:.3g}"


def _cell(bar: Bar, dtype: str, found: Sequence[Results]) -> str:
    found = [one for one in found if dtype != "bf16" or _counts_bf16(one)]
    for preset in PRESETS:
        rows = [r for one in found if one.preset == preset for r in one.rows if r.dtype == dtype]
        entry = standing(bar, rows)
        if entry and entry["value"] is not None:
            note = f" ({preset})" if preset == "quick" else ""
            return f"{figure(bar, entry['value'])} {entry['met']}{note}"
    return NOT_MEASURED


def _counts_bf16(one: Results) -> bool:
    """Beside a fallback that crawls everything is fast."""
    return "gpu" in one.machine or multiplies_bf16(one.machine["instruction_sets"])
