"""Tables from the JSON of benchmarks/results.

    python -m benchmarks.report [NAME ...]          markdown of these results, or of all
    python -m benchmarks.report --readme README.md  rewrite the blocks of a file
    python -m benchmarks.report --figure FILE.svg   draw the ratios of these results, or of all
    python -m benchmarks.report --check README.md   exit code 1 where a block and its JSON disagree

A block is what stands between `<!-- results:NAME -->`, or `<!-- results:NAME bars -->` for the bars
alone, and `<!-- /results -->`. NAME is a file of benchmarks/results without `.json`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks._bars import geomeans
from benchmarks._results import CLOCKS, FOLDER, PHASES, Results, Row, multiplies_bf16

BLOCK = re.compile(
    r"(?P<open><!-- results:(?P<name>[\w.-]+)(?P<bars> bars)? -->\n)(?P<body>.*?)"
    r"(?P<close><!-- /results -->)",
    re.DOTALL,
)
Table = list[list[str]]  # the first row is the header


# ------------------------------------------------------------------------------------------------
# Figures as text
# ------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def mebibytes(value: int) -> str:
    return f"{value / 2**20:.{0 if value >= 100 * 2**20 else 1}f}"


def shape_of(row: Row) -> str:
    return " ".join(f"{letter}{size}" for letter, size in row.shape.items())


def per_second(value: float, unit: str) -> str:
    return f"{value / 1e12:.3g} T{unit}" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}"


def rate(row: Row) -> str:
    for measure, unit in (("flop_per_s", "FLOP/s"), ("byte_per_s", "B/s")):
        if measure in row.measures:
            return per_second(row.measures[measure], unit)
    if "tokens_per_s" in row.measures:
        return f"{row.measures['tokens_per_s']:,.0f} tokens/s"
    return ""


def phases(row: Row) -> str:
    """How the step of each contestant that tells it is split."""
    found = []
    for name in ("ours", *row.contestants):
        keys = [phase if name == "ours" else f"{phase}, {name}" for phase in PHASES]
        if all(key in row.measures for key in keys):
            found.append(f"{name} {' + '.join(seconds(row.measures[key]) for key in keys)}")
    return "; ".join(found)


def limit(bar: dict, value: float | None) -> str:
    if value is None:
        return ""
    if bar["what"] == "memory":
        return f"{mebibytes(value)} MiB"
    return f"{value:.3g}"


def bar_text(bar: dict) -> str:
    return f"{bar['what']} {'≤' if bar['sense'] == '<=' else '≥'} {limit(bar, bar['must'])}"


def errors_of(row: Row) -> str:
    if not row.errors:
        return "not measured"
    first = row.errors[0]
    unit = " nats" if first["unit"].startswith("nats") else ""
    return f"{first['ours']:.1e}, {first['plain']:.1e}{unit}"


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def rows_table(rows: Sequence[Row]) -> Table:
    """One line per case. `vs NAME` is the time of ours over theirs: below 1, ours is faster."""
    names = list(dict.fromkeys(n for row in rows for n in [*row.contestants, *row.missing]))
    heavy = ["ours", *dict.fromkeys(n for row in rows for n in row.memory if n != "ours")]
    header = ["type", "shape", "ours", "spread", "rate", *(f"vs {name}" for name in names)]
    header += [" + ".join(phase.removesuffix("_s") for phase in PHASES)]
    header += [f"MiB: {', '.join(heavy)}", "error: ours, plain", "bar", "met"]
    table = [header]
    for row in rows:
        ratios = [
            f"{row.contestants[n]['ratio']:.2f}" if n in row.contestants else "–" for n in names
        ]
        weights = [mebibytes(row.memory[n]) if n in row.memory else "–" for n in heavy]
        table.append(
            [
                row.dtype,
                shape_of(row),
                seconds(row.median_s),
                f"{row.spread:.0%}",
                rate(row),
                *ratios,
                phases(row),
                ", ".join(weights) if row.memory else "not measured",
                errors_of(row),
                "; ".join(bar_text(bar) for bar in row.bars) or "–",
                "; ".join(bar["met"] for bar in row.bars) or "–",
            ]
        )
    return table


def bars_table(rows: Sequence[Row]) -> Table:
    """One line per bar: the geometric means, then the worst shape of each bar that holds at all."""
    table = [["check", "type", "bar", "over", "measured", "aim", "met"]]
    found = [(bar["room"], bar["check"], bar["dtype"], _where(bar), bar) for bar in geomeans(rows)]
    worst: dict[tuple, tuple] = {}
    for row in rows:
        for bar in row.bars:
            key = (row.room, row.check, row.dtype, bar["what"], bar["must"])
            old = worst.get(key)
            if old is None or _worse(bar, old[-1]):
                worst[key] = (*key[:3], f"worst, {shape_of(row)}", bar)
    for room, check, dtype, over, bar in [*found, *worst.values()]:
        table.append(
            [
                f"{room}: {check}", dtype, bar_text(bar), over,
                limit(bar, bar["value"]) or "not measured", limit(bar, bar["stretch"]), bar["met"],
            ]
        )  # fmt: skip
    return table


def _where(bar: dict) -> str:
    fixed = "".join(f", {letter}{size}" for letter, size in bar["where"].items())
    return f"geometric mean of {bar['shapes']}{fixed}"


def _worse(bar: dict, other: dict) -> bool:
    if bar["value"] is None or other["value"] is None:
        return bar["value"] is None and other["value"] is not None
    return (bar["value"] > other["value"]) == (bar["sense"] == "<=")


def heading(results: Results) -> list[str]:
    """Where the figures are from, and what to make of them."""
    machine = results.machine
    where = (
        f"{machine['gpu']['name']}, {machine['gpu']['architecture']}, CUDA {machine['gpu']['cuda']}"
        if "gpu" in machine
        else f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; torch uses {machine['torch_uses']}, "
        f"our kernels {machine['kernels_use']}"
    )
    lines = [
        f"{where} · torch {results.versions['torch']} · {results.date[:10]} · `{results.command}`"
    ]
    if results.preset in ("quick", "tiny"):
        lines.append(
            f"Preset {results.preset}: the bars are set for the larger shapes of --preset full."
        )
    on_cpu = [row for row in results.rows if row.device == "cpu"]
    if on_cpu and "amx_bf16" not in machine["instruction_sets"]:
        widest = machine["torch_uses"]
        lines.append(f"The bf16 bars are set for machines with AMX; this one has {widest}.")
    if on_cpu and not multiplies_bf16(machine["instruction_sets"]):
        lines.append("bf16 rows are small: without AVX-512 or AMX torch's bf16 products crawl.")
    if any(row.backend == "reference" for row in results.rows):
        lines.append("Ours ran on plain torch: no kernels are compiled here.")
    lines.append(
        "vs NAME is the time of ours over theirs in the same rounds: below 1, ours is faster."
    )
    absent = {f"{n}: {why}" for row in results.rows for n, why in row.missing.items()}
    if "ceilings" in machine:
        lines += setting(results)
    if results.left_out:
        lines.append(f"Not measured, the time was over: {', '.join(results.left_out)}.")
    lines += [f"FAILED {case}: {why}" for case, why in results.failures.items()]
    lines += sorted(f"Not measured, {text}." for text in absent)
    return lines


def setting(results: Results) -> list[str]:
    """Of a run on a GPU: the measured ceilings, clocks and versions."""
    ceilings = [f"{n} {per_second(value, unit)}" for n, unit, value in results.machine["ceilings"]]
    lines = [f"Ceilings measured in this run: {', '.join(ceilings)}."]
    gpu = results.machine.get("gpu", {})
    for when, found in (("before", gpu), ("after", gpu.get("after", {}))):
        clocks = [f"{name} {found[name]}" for name in CLOCKS if name in found]
        if clocks:
            lines.append(f"The GPU {when}: {', '.join(clocks)}.")
    return [*lines, f"Versions: {', '.join(f'{n} {v}' for n, v in results.versions.items())}."]


def tables(rows: Sequence[Row], brief: bool = False) -> list[tuple[str, Table]]:
    """One table per room and check, then the bars; each with its title.

    brief: of the bars at single shapes, which stand in the rows too, only what is not met.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.room, row.check), []).append(row)
    found = [
        (f"{room}: {check} (MiB: {group[0].memory_kind})", rows_table(group))
        for (room, check), group in groups.items()
    ]
    return [*found, *bars_of(rows, brief)]


def bars_of(rows: Sequence[Row], brief: bool = False) -> list[tuple[str, Table]]:
    """The table of bars with the count as its title; none where no bar speaks of these rows."""
    header, *lines = bars_table(rows)
    met = [line[-1] for line in lines]
    counts = [sum(m.startswith(word) for m in met) for word in ("met", "missed", "not")]
    title = "bars: {} met, {} missed, {} not measured".format(*counts)
    if brief:
        lines = [n for n in lines if not n[-1].startswith("met") or not n[3].startswith("worst")]
    return [(title, [header, *lines])] if met else []


def as_text(results: Sequence[Results]) -> str:
    """For a terminal; results of one run."""
    rows = [row for one in results for row in one.rows]
    blocks = [f"{title}\n{_aligned(table)}" for title, table in tables(rows, brief=True)]
    lines = dict.fromkeys(line for one in results for line in heading(one))
    return "\n\n".join(["\n".join(lines), *blocks])


def as_markdown(results: Results, bars_only: bool = False) -> str:
    chosen = bars_of(results.rows) if bars_only else tables(results.rows)
    blocks = [f"**{title}**\n\n{_piped(table)}" for title, table in chosen]
    return "\n\n".join([*heading(results), *blocks]) + "\n"


def _aligned(table: Table) -> str:
    used = _columns(table)
    widths = {i: max(len(line[i]) for line in table) for i in used}
    return "\n".join("  ".join(line[i].ljust(widths[i]) for i in used).rstrip() for line in table)


def _piped(table: Table) -> str:
    used = _columns(table)
    lines = ["| " + " | ".join(line[i] for i in used) + " |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(used), *lines[1:]])


def _columns(table: Table) -> list[int]:
    """The columns that say something."""
    return [i for i in range(len(table[0])) if any(line[i] for line in table[1:])]


# ------------------------------------------------------------------------------------------------
# The figure
# ------------------------------------------------------------------------------------------------


def draw(results: Sequence[Results], path: Path) -> None:
    """One line per case, one mark per contestant: the time of ours over theirs, to an SVG.

    float32 only where the machine has no fast bfloat16, as anything beats torch's fallback there.
    Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = []
    for one in results:
        slow = "gpu" not in one.machine and not multiplies_bf16(one.machine["instruction_sets"])
        for row in one.rows:
            if row.contestants and not (slow and row.dtype == "bf16"):
                lines.append((f"{row.room}: {row.check}\n{row.dtype} {shape_of(row)}", row))
    names = list(dict.fromkeys(n for _, row in lines for n in row.contestants))
    with matplotlib.rc_context({"svg.hashsalt": "perl-kernels", "font.size": 8}):
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.36 * len(lines)), layout="constrained")
        axes.axvline(1.0, color="grey", linewidth=1)
        for i, name in enumerate(names):
            found = [
                (row.contestants[name]["ratio"], y)
                for y, (_, row) in enumerate(lines)
                if name in row.contestants
            ]
            marker = "os^Dvp*XP"[i % 9]
            axes.plot(*zip(*found, strict=True), marker, markersize=5, label=name)
        axes.set_yticks(range(len(lines)), [label for label, _ in lines])
        axes.invert_yaxis()
        axes.set_xscale("log")
        ticks = (0.1, 0.2, 0.5, 1, 2, 5)
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("time of ours over theirs (left of 1: ours is faster)")
        figure.suptitle(heading(results[0])[0].split(" · ")[0], fontsize=8)
        figure.legend(loc="outside lower center", ncols=5)
        figure.savefig(path, metadata={"Date": None}, transparent=False)
        pyplot.close(figure)


# ------------------------------------------------------------------------------------------------
# Blocks in a file
# ------------------------------------------------------------------------------------------------


def rewritten(text: str, folder: Path = FOLDER) -> str:
    """`text` with every block filled from its JSON.

    Raises:
        ValueError: a block names results that are not there, or is not closed.
    """

    def fill(block: re.Match[str]) -> str:
        path = folder / f"{block['name']}.json"
        if not path.exists():
            names = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none"
            raise ValueError(
                f"there are no results {block['name']!r} in {folder}; there are: {names}"
            )
        body = as_markdown(Results.load(path), bars_only=bool(block["bars"]))
        return f"{block['open']}\n{body}\n{block['close']}"

    opened = len(re.findall(r"<!-- results:", text))
    if opened != len(BLOCK.findall(text)):
        raise ValueError(
            f"{opened} blocks open with <!-- results:NAME --> and {len(BLOCK.findall(text))} are "
            "whole; each needs its own <!-- /results -->"
        )
    return BLOCK.sub(fill, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Tables of benchmark results, as markdown.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="files without .json; all if none")
    parser.add_argument(
        "--results", type=Path, default=FOLDER, help="folder (default: %(default)s)"
    )
    parser.add_argument("--readme", type=Path, metavar="FILE", help="rewrite the blocks of FILE")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare the blocks of FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the ratios to an SVG")
    options = parser.parse_args(arguments)
    try:
        if options.readme or options.check:
            path = options.readme or options.check
            text = path.read_text()
            new = rewritten(text, options.results)
            if options.readme:
                path.write_text(new)
            elif new != text:
                print(f"{path} disagrees with {options.results}; run: python -m benchmarks.report "
                      f"--readme {path}", file=sys.stderr)  # fmt: skip
                return 1
            return 0
        names = options.names or sorted(p.stem for p in options.results.glob("*.json"))
        if options.figure:
            draw([Results.load(options.results / f"{name}.json") for name in names], options.figure)
            return 0
        for name in names:
            print(f"## {name}\n\n{as_markdown(Results.load(options.results / f'{name}.json'))}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
