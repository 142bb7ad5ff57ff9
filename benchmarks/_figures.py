"""The figures that are made of benchmark results, as SVG files that follow light and dark, or PNG.

Each is a `Picture`: plain numbers and how they are drawn. Its file carries a digest of the numbers,
so that a test can tell when it is out of date whatever matplotlib drew it.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from benchmarks import _timelines, growth
from benchmarks._bars import DROPOUT, ONE_LENGTH, TRAIN
from benchmarks._limits import flops, least_bytes, rates
from benchmarks._results import PHASES, Results, Row, kind_of, multiplies_bf16
from benchmarks._targets import kinds
from perl.drawings import is_marked, numbers_mark

# light -> dark; the ink, the faint lines, then what is drawn
COLOURS = {
    "#1b2026": "#e6edf3", "#8b949e": "#768390", "#1f6feb": "#6cb0ff", "#d9480f": "#ff9657",
    "#1a7f37": "#5fd068", "#8250df": "#c9a2ff", "#9a6700": "#e3b341", "#cf222e": "#ff8f88",
}  # fmt: skip
GIGA = 1e9
INK, FAINT, OURS, THEIRS, *MORE = COLOURS
STYLE = {
    "font.size": 9, "text.color": INK, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": FAINT, "grid.alpha": 0.3, "xtick.color": FAINT, "xtick.labelcolor": INK,
    "ytick.color": FAINT, "ytick.labelcolor": INK, "legend.frameon": False,
    "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "benchmarks",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A figure before it is drawn."""

    name: str  # of its file, without .svg
    title: str
    note: str  # what it shows of what, in a sentence or two
    data: Any  # what is drawn: text, numbers, lists and dicts of them
    draw: Callable[[Any, Any], None]  # (data, matplotlib's Figure)
    size: tuple[float, float]  # inches

    def drawn(self, form: str, **options: Any) -> bytes:
        """Needs matplotlib, as all that draws does."""
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(STYLE):
            figure, file = Figure(figsize=self.size, layout="constrained"), io.BytesIO()
            self.draw(self.data, figure)
            figure.savefig(file, format=form, **options)
        return file.getvalue()

    def svg(self) -> str:
        text = self.drawn("svg", transparent=True, metadata={"Date": None}).decode()
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
        numbers = {light: f"--c{i}" for i, light in enumerate(COLOURS)}
        for light, variable in numbers.items():
            text = text.replace(light, f"var({variable})")
        light, dark = (
            "".join(f"{numbers[one]}:{(one, COLOURS[one])[scheme]};" for one in COLOURS)
            for scheme in (0, 1)
        )
        style = (
            f"{numbers_mark(json.dumps(self.data))}<style>:root{{{light}}}"
            f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
        )
        start = text.index(">", text.index("<svg")) + 1
        return f"{text[:start]}{style}{text[start:]}"

    def write(self, folder: Path, form: str = "svg") -> Path:
        """As an SVG or PNG file, the latter on white."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.{form}"
        path.write_bytes(self.svg().encode() if form == "svg" else self.drawn(form, dpi=200))
        return path

    def is_drawn_in(self, folder: Path) -> bool:
        """Whether its file there is of the same numbers."""
        return is_marked(folder / f"{self.name}.svg", json.dumps(self.data))


def pictures(results: Sequence[Results]) -> list[Picture]:
    """All that these results have numbers for; the first is what a reader is to see first."""
    found = [overview(results)]
    for on in ("gpu", "cpu"):
        for machine, of_kind in kinds(results, on).items():
            found += [*peers(machine, of_kind), roofline(machine, of_kind)]
    found += [scaling(one) for one in results if one.name == growth.NAME]
    found += [timelines(one) for one in results if one.timelines]
    for on in ("gpu", "cpu"):
        found += [phases(machine, of_kind) for machine, of_kind in kinds(results, on).items()]
    return [picture for picture in found if picture]


def file_name(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


# ------------------------------------------------------------------------------------------------
# Ours over theirs
# ------------------------------------------------------------------------------------------------

# (room, check, contestant, what a reader calls it): the claim of this library, most telling first.
HEADLINES = (
    ("policy_step", "step", "full", "RL step, against full tuning"),
    ("policy_step", "step", "trl", "RL step, against TRL's RLOO with PEFT"),
    ("rollout", ONE_LENGTH, "peft", "sampling, against generate with PEFT"),
    ("reward_step", "step", "full", "reward-model step, against full tuning"),
    ("reward_step", "step", "peft", "reward-model step, against PEFT"),
    ("reward_step", "step in TRL's RewardTrainer", "trl", "in TRL's trainer, one line changed"),
    ("lora_linear", TRAIN, "peft", "LoRA layer, against PEFT"),
    ("lora_linear", DROPOUT, "peft", "LoRA layer with dropout, against PEFT"),
    ("lora_mlp", DROPOUT, "peft", "gated MLP with dropout, against PEFT"),
    ("linear_log_prob", TRAIN, "eager", "log-probabilities, against eager torch"),
    ("policy_loss", TRAIN, "eager", "policy loss, against eager torch"),
    ("policy_loss", TRAIN, "trl", "policy loss, against TRL's chunked log p"),
)  # fmt: skip


def overview(results: Sequence[Results]) -> Picture | None:
    """The headlines on the kind of machine that has most of them at full size."""
    found = _headlines(results)
    if not found:
        return None
    (machine, dtype), lines = max(found.items(), key=lambda item: len(item[1]))
    return _ratios(
        "overview",
        "Ours over theirs",
        f"{machine}, {dtype}. Bars left of the line: ours is faster, or smaller. Memory of a step "
        "is the peak of its process, of an op what it takes beyond inputs and outputs. A whisker "
        "spans the shapes, the bar is their geometric mean; –: not measured.",
        list(lines.values()),
    )


def headlines(results: Sequence[Results]) -> list[list[str]]:
    """Time and peak memory of ours over theirs, a line per headline, a column per kind of machine
    and type, and the command that measures them."""
    found = _headlines(results)
    machines = [f"{machine}, {dtype}" for machine, dtype in found]
    table = [["ours over theirs: time, memory", *machines, "command, on a CPU"]]
    for room, _, _, label in HEADLINES:
        cells = [_told(lines.get(label)) for lines in found.values()]
        command = f"`pytest benchmarks/bench_{room}.py --preset full`"
        table.append([label, *(cells or ["not measured"]), command])
    return table


def _told(line: dict[str, Any] | None) -> str:
    means = [line[key][0] for key in ("time", "memory") if line[key]] if line else []
    return ", ".join(f"{mean:.2f}" for mean in means) or "not measured"


def _headlines(results: Sequence[Results]) -> dict[tuple[str, str], dict[str, dict]]:
    """By (machine, type): a line of each headline that is measured there, by its label."""
    found = {}
    for on in ("gpu", "cpu"):
        for machine, of_kind in kinds(results, on).items():
            for dtype in ("bf16", "fp32"):
                rows = full_rows(of_kind, dtype)
                lines = {
                    label: _ratio_line(
                        label, [r for r in rows if (r.room, r.check) == (room, check)], name
                    )
                    for room, check, name, label in HEADLINES
                }
                found[machine, dtype] = {label: line for label, line in lines.items() if line}
    return {of: lines for of, lines in found.items() if lines}


def peers(machine: str, of_kind: Sequence[Results]) -> Iterator[Picture]:
    """Every contestant of every room and check, a figure for each type."""
    for dtype in ("bf16", "fp32"):
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in full_rows(of_kind, dtype):
            groups.setdefault((row.room, row.check), []).append(row)
        lines = [
            _ratio_line(f"{room}: {check}, against {name}", rows, name)
            for (room, check), rows in groups.items()
            for name in dict.fromkeys(name for row in rows for name in row.contestants)
            if not name.startswith("ours")
        ]
        lines = [line for line in lines if line]
        if lines:
            yield _ratios(
                file_name("peers", machine, dtype),
                f"Every contestant: {machine}, {dtype}",
                "Time and memory of ours over theirs: the bar is the geometric mean over the "
                "shapes of preset full, a whisker spans them. Bars are cut at 2; –: not measured.",
                lines,
            )


def full_rows(of_kind: Sequence[Results], dtype: str) -> list[Row]:
    """At the sizes that the bars are set for, where the machine multiplies the type."""
    return [
        row
        for one in of_kind
        if one.preset != "quick"
        and (
            dtype != "bf16"
            or "gpu" in one.machine
            or multiplies_bf16(one.machine["instruction_sets"])
        )
        for row in one.rows
        if row.dtype == dtype
    ]


def _ratio_line(label: str, rows: Sequence[Row], name: str) -> dict[str, Any] | None:
    """Time and memory of ours over theirs as [mean, least, most] over the rows."""
    times = [row.contestants[name]["ratio"] for row in rows if name in row.contestants]
    weights = [
        row.memory["ours"] / row.memory[name]
        for row in rows
        if row.memory.get(name) and row.memory.get("ours")
    ]
    if not times:
        return None
    return {"label": label, "time": _span(times), "memory": _span(weights) if weights else None}


def _span(values: Sequence[float]) -> list[float]:
    mean = math.exp(sum(map(math.log, values)) / len(values))
    return [round(value, 4) for value in (mean, min(values), max(values))]


def _ratios(name: str, title: str, note: str, lines: list[dict]) -> Picture:
    return Picture(name, title, note, lines, _draw_ratios, (9.5, 1.1 + 0.28 * len(lines)))


def _draw_ratios(lines: list[dict], figure: Any) -> None:
    """Bars side by side: time, and memory; 1 is theirs. What is longer than the axes is cut."""
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("time", "memory"), strict=True):
        longest = max((line[key][0] for line in lines if line[key]), default=1.0)
        edge = min(2.0, max(1.15, 1.1 * longest))
        axes.axvline(1.0, color=INK, linewidth=1)
        for y, line in enumerate(lines):
            told, colour = "–", FAINT
            if line[key]:
                mean, low, high = line[key]
                axes.barh(y, min(mean, edge), 0.62, color=OURS if mean <= 1 else THEIRS)
                if high > 1.02 * low and low < edge:
                    axes.plot([low, min(high, edge)], [y, y], color=INK, linewidth=0.9)
                told, colour = f"{mean:.{2 if mean < 10 else 0}f}", INK if mean <= 1 else THEIRS
            axes.annotate(
                told, (1, y), (28, 0), va="center", ha="right", fontweight="bold", color=colour,
                xycoords=("axes fraction", "data"), textcoords="offset points",
            )  # fmt: skip
        axes.set_xlim(0, edge)
        axes.set_title("Time" if key == "time" else "Peak memory")
        axes.set_xlabel("ours over theirs")
        axes.set_yticks(range(len(lines)), [line["label"] for line in lines])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    axes.set_ylim(len(lines) - 0.4, -0.6)


# ------------------------------------------------------------------------------------------------
# Roofline
# ------------------------------------------------------------------------------------------------


def roofline(machine: str, of_kind: Sequence[Results]) -> Picture | None:
    """Rates of our kernels over FLOPs per byte, under what the machine reaches; None where no run
    on this kind of machine has measured that."""
    ceilings = [rates(one.machine["ceilings"]) for one in of_kind if "ceilings" in one.machine]
    if not ceilings:
        return None
    reached = {name: max(one.get(name, 0) for one in ceilings) for name in ceilings[0]}
    rows = [row for dtype in ("bf16", "fp32") for row in full_rows(of_kind, dtype)]
    points: dict[str, list[list[float]]] = {}
    for row in rows or [row for one in of_kind for row in one.rows]:
        work, moved = flops(row), least_bytes(row)
        if work and moved and row.dtype in reached:
            point = [work / moved, work / row.median_s]
            points.setdefault(f"{row.room}, {row.dtype}", []).append(point)
    return points and Picture(
        file_name("roofline", machine),
        f"Roofline: {machine}",
        "A dot is a shape: FLOPs that no method avoids, over bytes that every method moves, "
        "against the rate reached. The lines are a large copy and torch's matrix product, the best "
        "of any run; a dot above the slope read what lay in a cache.",
        {"ceilings": reached, "points": points},
        _draw_roofline,
        (7.5, 4.6),
    )


def _draw_roofline(data: dict, figure: Any) -> None:
    axes, points = figure.subplots(), data["points"]
    copy = data["ceilings"]["copy"]
    peaks = {dtype: peak for dtype, peak in data["ceilings"].items() if dtype != "copy"}
    work = [x for line in points.values() for x, _ in line] + [p / copy for p in peaks.values()]
    left, right = min(work) / 2, max(work) * 2
    for (dtype, peak), style in zip(peaks.items(), ("-", "--"), strict=False):
        ridge, label = peak / copy, f"{dtype} product: {peak / GIGA:,.0f} GFLOP/s"
        roof = [left * copy / GIGA, peak / GIGA, peak / GIGA]
        axes.plot([left, ridge, right], roof, style, color=INK, label=label)
    for (label, line), colour, marker in zip(
        points.items(), [OURS, THEIRS, *MORE] * 4, "osD^vPX*" * 3, strict=False
    ):
        work, rate = zip(*line, strict=True)
        reached = [value / GIGA for value in rate]
        axes.plot(work, reached, marker, color=colour, label=label, markersize=5, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set(xlabel="FLOPs per byte", ylabel="GFLOP/s")
    _plain(axes.xaxis)
    _plain(axes.yaxis, (1.0, 2.0, 5.0))
    axes.grid(which="major")
    figure.legend(loc="outside right upper", title=f"the slope is a copy: {copy / GIGA:,.0f} GB/s")


# ------------------------------------------------------------------------------------------------
# Growth
# ------------------------------------------------------------------------------------------------


def scaling(results: Results) -> Picture | None:
    """Time and memory over one size at a time."""
    found = growth.curves(results)
    machine = kind_of(results.machine)
    return found and Picture(
        file_name(growth.NAME, machine),
        f"How cost grows: {machine}",
        "Both axes are logarithmic; a number is the fitted exponent with its standard error, 1 "
        "where cost is proportional to the size, 0 where it does not grow.",
        found,
        _draw_scaling,
        (9.5, 2.4 * len(found)),
    )


def _draw_scaling(found: list[dict], figure: Any) -> None:
    grid = figure.subplots(len(found), 2, squeeze=False)
    units = {"time": ("s", 1.0), "memory": ("MiB", 2**20)}
    for curve, row in zip(found, grid, strict=True):
        for (cost, (unit, size)), axes in zip(units.items(), row, strict=True):
            for (name, line), colour in zip(
                curve[cost].items(), (OURS, THEIRS, *MORE), strict=False
            ):
                values = [value / size for value in line["values"]]
                label = f"{name}: {line['slope']:.2f} ± {line['error']:.2f}"
                axes.plot(line["sizes"], values, "o-", color=colour, label=label, markersize=4)
            axes.set(xscale="log", yscale="log", ylabel=unit, title=f"{cost} over {curve['title']}")
            sizes = sorted({n for line in curve[cost].values() for n in line["sizes"]})
            told = [f"{n / 1e6:.3g} M" if n >= 1e6 else f"{n:,.0f}" for n in sizes]
            axes.set_xticks(sizes, told, fontsize=8)
            axes.minorticks_off()
            _plain(axes.yaxis, (1.0, 2.0, 5.0))
            axes.grid(which="major")
            if curve[cost]:
                axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _plain(axis: Any, subs: tuple[float, ...] = (1.0,)) -> None:
    """Numbers as they are on a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda x, place: f"{x:,.0f}" if x >= 1000 else f"{x:.3g}")
    axis.set_minor_formatter(NullFormatter())


# ------------------------------------------------------------------------------------------------
# Phases of a step
# ------------------------------------------------------------------------------------------------

NAMES = dict(zip(PHASES, ("sampling", "scoring and anchor", "learning"), strict=True))


def phases_of(row: Row) -> dict[str, list[float]]:
    """Seconds of each of PHASES, by the contestant that tells all of them."""
    found = {}
    for name in ("ours", *row.contestants):
        keys = [phase if name == "ours" else f"{phase}, {name}" for phase in PHASES]
        if all(key in row.measures for key in keys):
            found[name] = [row.measures[key] for key in keys]
    return found


def phases(machine: str, of_kind: Sequence[Results]) -> Picture | None:
    """Where a step of REINFORCE spends its time, ours and whoever else tells."""
    lines = {
        f"{row.dtype}: {name}": times
        for one in of_kind
        if one.preset != "quick"
        for row in one.rows
        for name, times in phases_of(row).items()
    }
    return lines and Picture(
        file_name("phases", machine),
        f"A step of REINFORCE by its phases: {machine}",
        "Medians, at the sizes of preset full.",
        lines,
        _draw_phases,
        (9.5, 1.2 + 0.4 * len(lines)),
    )


def _draw_phases(lines: dict[str, list[float]], figure: Any) -> None:
    axes = figure.subplots()
    left = [0.0] * len(lines)
    for i, (label, colour) in enumerate(zip(NAMES.values(), (OURS, THEIRS, *MORE), strict=False)):
        values = [found[i] for found in lines.values()]
        axes.barh(range(len(lines)), values, 0.6, left, color=colour, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(lines)), list(lines))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel("s")
    figure.legend(loc="outside upper center", ncols=len(PHASES))


# ------------------------------------------------------------------------------------------------
# Memory over a step
# ------------------------------------------------------------------------------------------------

ROLES = dict(
    zip(("policy", "value", "reward", _timelines.ANCHOR), (OURS, THEIRS, *MORE), strict=False)
)
SHADES = {"weights": 0.9, "optimizer": 0.6, "activations": 0.3}  # of a role's colour
GRADIENTS = MORE[-1]


def timelines(results: Results) -> Picture:
    """What is in use over a step, full tuning beside LoRA."""
    steps = len({one["step"] for one in results.timelines})
    return Picture(
        file_name(results.name, kind_of(results.machine)),
        f"Memory over a step: {kind_of(results.machine)}",
        "The colour of weights and optimizer state says whose they are, that of activations, with "
        "KV cache, scratch and the gradients that are just coming, who runs. Under LoRA all share "
        "one frozen base, which is the anchor. Seconds are those of the step that was watched.",
        results.timelines,
        _draw_timelines,
        (9.5, 0.6 + 3.0 * steps),
    )


def _draw_timelines(found: list[dict], figure: Any) -> None:
    from matplotlib.patches import Patch

    steps = list(dict.fromkeys(one["step"] for one in found))
    grid = figure.subplots(len(steps), 2, sharey="row", squeeze=False)
    for one in found:
        _draw_timeline(one, grid[steps.index(one["step"])][_timelines.TUNINGS.index(one["tuning"])])
    for row in grid:
        row[0].set(ylabel="MiB in use", ylim=(0, 1.25 * row[0].get_ylim()[1]))  # room for phases
        row[0].yaxis.set_major_formatter("{x:,.0f}")
    for axes in grid[-1]:
        axes.set_xlabel("s")
    shown = [role for role in ROLES if any(role in one["held"] for one in found)]
    colours = {role: (ROLES[role], 1.0) for role in shown}
    colours |= {kind: (INK, shade) for kind, shade in SHADES.items()}
    colours |= {"gradients": (GRADIENTS, 1.0), "libraries": (FAINT, SHADES["activations"])}
    handles = [Patch(color=c, alpha=a, lw=0, label=name) for name, (c, a) in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)


def _draw_timeline(one: dict, axes: Any) -> None:
    mib, seconds, marks = 2**20, one["seconds"], one["marks"]
    axes.fill_between(
        [0, seconds], one["libraries"] / mib, color=FAINT, alpha=SHADES["activations"]
    )
    bottom = one["libraries"] / mib
    for role, held in one["held"].items():
        for kind, count in held.items():
            top = bottom + count / mib
            axes.fill_between(
                [0, seconds], bottom, top, color=ROLES[role], alpha=SHADES[kind], lw=0
            )
            bottom = top
    middle = [(part + 0.5) * seconds / len(one["bytes"]) for part in range(len(one["bytes"]))]
    middle[0], middle[-1], used = 0.0, seconds, [count / mib for count in one["bytes"]]
    ends = [*(mark["at"] for mark in marks[1:]), seconds]
    for mark, end in zip(marks, ends, strict=True):
        over = bottom + mark["gradients"] / mib
        axes.fill_between([mark["at"], end], bottom, over, color=GRADIENTS, lw=0)
        times = [mark["at"], *(at for at in middle if mark["at"] < at < end), end]
        top = [max(over, level) for level in numpy.interp(times, middle, used)]
        axes.fill_between(
            times, over, top, color=ROLES[mark["role"]], alpha=SHADES["activations"], lw=0
        )
    axes.plot(middle, used, color=INK, lw=0.8)
    starts = [i for i, mark in enumerate(marks) if not i or mark["phase"] != marks[i - 1]["phase"]]
    for i, following in itertools.zip_longest(starts, starts[1:]):
        at, end = marks[i]["at"], marks[following]["at"] if following else seconds
        narrow = end - at < 0.12 * seconds
        axes.axvline(at, color=FAINT, lw=0.8)
        axes.annotate(
            marks[i]["phase"], (at, 1), (3 if following or not narrow else -3, -2), va="top",
            ha="left" if following or not narrow else "right", rotation=90 if narrow else 0,
            xycoords=("data", "axes fraction"), textcoords="offset points",
        )  # fmt: skip
    how = "full tuning" if one["tuning"] == "full" else f"LoRA, rank {one['shape']['R']}"
    axes.set(xlim=(0, seconds))
    axes.set_title(f"{one['step']}, {how}: {max(used):,.0f} MiB at most")
