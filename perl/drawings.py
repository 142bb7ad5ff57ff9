"""Drawings: lines, bars, histograms and dots, as SVG that is light or dark as its page, and PNG.

    page = inline(folder / "curves.png", [Panel("Loss", "nats", {"training": (steps, values)})])
    write_figure(folder / "figure.svg", [Bars(...), Spread(...)])

Colours in the SVG are CSS variables, `colours()` of the page or the figure's own. Without
matplotlib a page says how to get the figures, and a figure of its own is refused.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy

from perl.config import UsageError


@dataclass(frozen=True)
class Panel:
    """A drawing of lines over steps, label -> (steps, values). An empty line keeps its colour."""

    title: str
    unit: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class Paths:
    """A drawing of paths from one point that come close to each other, label -> (x, y) in order.

    Each has small axes of its own, all of one scale, where the others are faint; a ring is its end.
    The axes are of what comes after the common start, which the title tells.
    """

    title: str
    unit: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    over: str  # what x is, with its unit


@dataclass(frozen=True)
class Bars:
    """A drawing of bars in groups, label -> {group: value}."""

    title: str
    unit: str
    values: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Histogram:
    """A drawing of how many values lie between `edges`, label -> one count less than edges."""

    title: str
    unit: str
    edges: Sequence[float]
    counts: Mapping[str, Sequence[float]]
    axis: str = "score"


@dataclass(frozen=True)
class Reliability:
    """A drawing of the share that came true over the probability that was said, a dot per bin.

    On the diagonal the two are the same. The area of a dot is its share of the cases.
    """

    title: str
    unit: str
    said: Sequence[float]
    found: Sequence[float]
    count: Sequence[int]


@dataclass(frozen=True)
class Spread:
    """A drawing of repeated measurements, label -> {group: values}: dots, a dash at their mean."""

    title: str
    unit: str
    values: Mapping[str, Mapping[str, Sequence[float]]]


Drawing = Panel | Paths | Bars | Histogram | Reliability | Spread


_INK, _FAINT = "#1b2026", "#8b949e"
_COLOURS = ("#1f6feb", "#d9480f", "#1a7f37", "#8250df", "#9a6700", "#cf222e")
_DARK = {
    _INK: "#e6edf3",
    _FAINT: "#768390",
    **dict(
        zip(
            _COLOURS,
            ("#6cb0ff", "#ff9657", "#5fd068", "#c9a2ff", "#e3b341", "#ff8f88"),
            strict=True,
        )
    ),
}
_SIZE = (4.4, 3.0)  # inches of one drawing
_READABLE = 5  # points of a font
_STYLE = {
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "grid.color": _FAINT,
    "grid.alpha": 0.3,
    "xtick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.color": _FAINT,
    "ytick.labelcolor": _INK,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.08,
    "legend.frameon": False,
    "text.parse_math": False,
}


def inline(png: Path, drawings: Sequence[Drawing]) -> str:
    """The drawings as inline SVG, side by side where there is room; all of them in `png` too."""
    drawings = [d for d in drawings if any(map(len, _points(d)))]
    if not drawings:
        return ""
    try:
        import matplotlib
        import matplotlib.image
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "<p>The figures need matplotlib: <code>pip install matplotlib</code></p>"
    pictures, tiles = [], []
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": png.name}):
        for number, drawing in enumerate(drawings):
            figure, svg = Figure(figsize=_SIZE, dpi=144, layout="constrained"), io.StringIO()
            canvas = FigureCanvasAgg(figure)
            _draw(drawing, figure)
            canvas.draw()
            tiles.append(numpy.array(canvas.buffer_rgba()))
            figure.set_layout_engine("none")  # the layout stays as it was found
            figure.savefig(svg, format="svg", transparent=True)
            name = f"{drawing.title} ({drawing.unit})" if drawing.unit else drawing.title
            pictures.append(_inline(svg.getvalue(), f"{png.stem}{number}-", name))
    columns = len(tiles) if len(tiles) < 3 else 2 if len(tiles) == 4 else 3
    tiles += [numpy.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [numpy.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    matplotlib.image.imsave(png, numpy.vstack(rows))
    thin = any(isinstance(d, Panel) and max(map(len, _points(d))) >= 2 * _PARTS for d in drawings)
    note = "<p>Thin: single steps. Thick: their moving mean.</p>" if thin else ""
    return f'{note}<div class="drawings">{"".join(pictures)}</div>'


def write_figure(path: Path, drawings: Sequence[Drawing], columns: int = 3) -> None:
    """Writes the drawings as one SVG file, light or dark as the page that shows it.

    Raises:
        UsageError: matplotlib is not there.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("the figure needs matplotlib: pip install matplotlib") from None
    rows = math.ceil(len(drawings) / columns)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": path.name}):
        size = (_SIZE[0] * min(columns, len(drawings)), _SIZE[1] * rows)
        whole, svg = Figure(figsize=size, layout="constrained"), io.StringIO()
        places = whole.subfigures(rows, min(columns, len(drawings)), squeeze=False).flat
        for drawing, place in zip(drawings, places, strict=False):
            _draw(drawing, place)
        whole.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    for colour in _DARK:
        text = text.replace(colour, f"var({_variable(colour)})")
    light, dark = colours()
    style = (
        f"<style>:root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )
    head = text.index(">", text.index("<svg")) + 1
    text = f"{text[:head]}{numbers_mark(repr(list(drawings)))}{style}</style>{text[head:]}"
    path.write_text(text, encoding="utf-8")


def is_drawn(path: Path, drawings: Sequence[Drawing]) -> bool:
    """Whether `write_figure` has written these drawings there."""
    return is_marked(path, repr(list(drawings)))


def is_marked(path: Path, numbers: str) -> bool:
    """Whether there is an SVG file of just these numbers, as text."""
    return path.is_file() and numbers_mark(numbers) in path.read_text(encoding="utf-8")


def numbers_mark(numbers: str) -> str:
    """A digest of what is drawn, not of the drawing, which differs by matplotlib."""
    return f"<desc>numbers {hashlib.sha256(numbers.encode()).hexdigest()[:16]}</desc>"


def colours() -> tuple[str, str]:
    """The CSS variables of both schemes, light and dark."""
    light = "".join(f"{_variable(colour)}:{colour};" for colour in _DARK)
    return light, "".join(f"{_variable(colour)}:{other};" for colour, other in _DARK.items())


def _points(drawing: Drawing) -> list[Any]:
    if isinstance(drawing, Bars | Spread):
        return list(drawing.values.values())
    if isinstance(drawing, Histogram):
        return list(drawing.counts.values())
    if isinstance(drawing, Reliability):
        return [drawing.said]
    return [steps for steps, _ in drawing.lines.values()]


def _draw(drawing: Drawing, figure: Any) -> None:
    """Draws into a matplotlib Figure."""
    if isinstance(drawing, Paths):
        _draw_paths(drawing, figure)
        return
    axes = figure.subplots()
    axes.set_title(drawing.title, loc="left")
    axes.set_ylabel(drawing.unit)
    axes.tick_params(length=3)
    draw = {
        Panel: _draw_lines,
        Bars: _draw_bars,
        Histogram: _draw_histogram,
        Reliability: _draw_reliability,
        Spread: _draw_spread,
    }[type(drawing)]
    labels = draw(drawing, axes)
    if labels > 1:
        longest = max(map(len, axes.get_legend_handles_labels()[1]))
        columns = min(labels, 4, max(1, 48 // (longest + 4)))  # as many as are no wider than axes
        figure.legend(loc="outside lower center", ncols=columns, handlelength=1.2)


def _draw_lines(panel: Panel, axes: Any) -> int:
    """Thin single steps under a thick moving mean, where there are many; returns the labels."""
    drawn = 0
    for colour, (label, (steps, values)) in zip(cycle(_COLOURS), panel.lines.items(), strict=False):
        if not len(steps):
            continue
        drawn += 1
        window = len(values) // _PARTS
        if window > 1:
            stride = math.ceil(len(values) / 800)  # a finer line than the screen's is only weight
            axes.plot(steps[::stride], values[::stride], color=colour, alpha=0.3, linewidth=0.8)
            values = _moving_mean(values, window)
            axes.plot(steps[::stride], values[::stride], color=colour, label=label, linewidth=1.8)
        else:
            axes.plot(steps, values, ".-", color=colour, label=label, linewidth=1.5, markersize=5)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.unit in _FROM_ZERO:
        highest = max(max(values, default=0.0) for _, values in panel.lines.values())
        axes.set_ylim(0, 1.1 * highest or 1.0)
    return drawn


def _draw_paths(paths: Paths, figure: Any) -> None:
    """Small axes, three in a row."""
    x, y = ([v for line in paths.lines.values() for v in line[i][1:] or line[i]] for i in (0, 1))
    at, start = (axis[0] for axis in next(iter(paths.lines.values())))
    title = f"{paths.title}, all from {short(start, 3)} at {round(at, 1) + 0.0:g}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=10, fontweight="bold")
    figure.supxlabel(paths.over, fontsize=9)
    figure.supylabel(paths.unit, fontsize=9)
    columns = min(3, len(paths.lines))
    rows = math.ceil(len(paths.lines) / columns)
    every = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, colour, (label, line) in zip(
        every, cycle(_COLOURS), paths.lines.items(), strict=False
    ):
        for others in paths.lines.values():
            axes.plot(*others, color=_FAINT, linewidth=0.6, alpha=0.6)
        axes.plot(*line, ".-", color=colour, linewidth=1.2, markersize=4)
        axes.plot(line[0][-1:], line[1][-1:], "o", color=colour, markersize=7, fillstyle="none")
        axes.set_title(label, loc="left", fontsize=8, fontweight="normal", color=colour)
        axes.tick_params(length=3, labelsize=7)
        axes.set(xlim=_around(x), ylim=_around(y))
    for axes in every[len(paths.lines) :]:
        axes.set_axis_off()
    for axes in every[len(paths.lines) - columns : len(paths.lines)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits of axes with room beside the values."""
    room = 0.12 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room


_PARTS = 20  # the moving mean is over this share of a line
_FROM_ZERO = {"ms", "MB", "tokens", "tokens / s"}


def _moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over `window` values around each one; fewer at both ends."""
    ones = numpy.ones(window)
    total = numpy.convolve(values, ones, "same")
    return (total / numpy.convolve(numpy.ones(len(values)), ones, "same")).tolist()


def _side_by_side(
    drawing: Bars | Spread, axes: Any
) -> Iterator[tuple[str, str, list[float], Sequence[Any]]]:
    """(colour, label, places, values) of each label: places stand beside others' of their group."""
    groups = list(dict.fromkeys(group for values in drawing.values.values() for group in values))
    width = _width(drawing)
    for i, (colour, (label, values)) in enumerate(
        zip(cycle(_COLOURS), drawing.values.items(), strict=False)
    ):
        places = [groups.index(group) - 0.4 + (i + 0.5) * width for group in values]
        yield colour, label, places, list(values.values())
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)


def _width(drawing: Bars | Spread) -> float:
    """Of what a label has of a group, whose labels share 0.8."""
    return 0.8 / len(drawing.values)


def _draw_bars(bars: Bars, axes: Any) -> int:
    """Bars of a group side by side, with their values where there is room to read them; returns the
    number of labels."""
    groups = set().union(*bars.values.values())
    size = min(8.5, 60 / (len(groups) * len(bars.values)))
    for colour, label, places, values in _side_by_side(bars, axes):
        boxes = axes.bar(places, values, 0.92 * _width(bars), label=label, color=colour)
        if size >= _READABLE:
            axes.bar_label(boxes, [short(v, 3) for v in values], padding=2, fontsize=size)
    return len(bars.values)


def _draw_histogram(histogram: Histogram, axes: Any) -> int:
    """Counts over each other, half transparent; returns the number of labels."""
    for colour, (label, counts) in zip(cycle(_COLOURS), histogram.counts.items(), strict=False):
        axes.stairs(counts, histogram.edges, fill=True, color=colour, alpha=0.35)
        axes.stairs(counts, histogram.edges, color=colour, linewidth=1.5, label=label)
    axes.set_xlabel(histogram.axis)
    return len(histogram.counts)


def _draw_reliability(reliability: Reliability, axes: Any) -> int:
    """Dots beside the diagonal; they are labelled by the axes alone."""
    axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=1)
    axes.plot(reliability.said, reliability.found, color=_COLOURS[0], linewidth=1.5)
    area = [400 * count / sum(reliability.count) for count in reliability.count]
    axes.scatter(reliability.said, reliability.found, area, color=_COLOURS[0], alpha=0.6)
    axes.set_xlabel("probability that the scores say")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return 1


def _draw_spread(spread: Spread, axes: Any) -> int:
    """The labels of a group side by side; returns their number."""
    half = 0.4 * _width(spread)
    for colour, label, places, values in _side_by_side(spread, axes):
        means = [statistics.fmean(repeated) for repeated in values]
        axes.hlines(
            means, [x - half for x in places], [x + half for x in places],
            colors=colour, linewidth=1.8, label=label,
        )  # fmt: skip
        dots = [(x, y) for x, repeated in zip(places, values, strict=True) for y in repeated]
        axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=3, alpha=0.5)
    return len(spread.values)


def _inline(svg: str, prefix: str, name: str) -> str:
    """matplotlib's SVG as an element of the page: own ids, and CSS variables for its colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    for colour in _DARK:
        svg = svg.replace(colour, f"var({_variable(colour)})")
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    opening = f'<svg role="img" aria-label="{shown(name)}" {box}>'
    return re.sub(r"<svg\b[^>]*>", lambda _: opening, svg, count=1).strip()


def _variable(colour: str) -> str:
    return f"--c{list(_DARK).index(colour)}"


# ---------------------------------------------------------------------------------------------
# Text


def short(value: Any, digits: int = 4) -> str:
    """A value as text: numbers with `digits` significant digits, thousands apart."""
    if not is_number(value) or not math.isfinite(value):
        return "–" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(text: str) -> str:
    """Text for the page: markup escaped, control characters visible."""
    return escape(text.translate(_CONTROLS))


_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
