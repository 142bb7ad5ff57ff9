"""Tables, figures and a page from the JSON of benchmarks/results.

    python -m benchmarks.report [NAME ...]          markdown of these results, or of all
    python -m benchmarks.report --write             figures, report.html, blocks of papers
    python -m benchmarks.report --png FOLDER        figures as PNG, for what shows no SVG
    python -m benchmarks.report --readme FILE       rewrite the blocks of a file
    python -m benchmarks.report --check FILE        exit code 1 where a block and its JSON disagree

A block is what stands between `<!-- results:NAME -->`, or `<!-- results:NAME bars -->` for the bars
alone, and `<!-- /results -->`. NAME is a file of benchmarks/results without `.json`, or one of
`MADE`: headlines, targets-cpu, targets-gpu, targets-compiled, targets-learning, table-1, growth,
timeline, figures, studies, files.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import ROOT, _targets, _timelines, growth
from benchmarks._bars import geomeans, in_words
from benchmarks._figures import headlines, phases_of, pictures
from benchmarks._limits import Ceilings, share_of_limit
from benchmarks._results import CLOCKS, FOLDER, PHASES, Results, Row, kind_of, multiplies_bf16
from benchmarks._targets import Table
from perl.drawings import Drawing, is_drawn, write_figure
from perl.studies import told_by

BLOCK = re.compile(
    r"(?P<open><!-- results:(?P<name>[\w.-]+)(?P<bars> bars)? -->\n)(?P<body>.*?)"
    r"(?P<close><!-- /results -->)",
    re.DOTALL,
)
PAPERS = [ROOT / "README.md", FOLDER / "README.md"]


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


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def phases(row: Row) -> str:
    """How the step of each contestant that tells it is split."""
    found = phases_of(row).items()
    return "; ".join(f"{name} {' + '.join(map(seconds, times))}" for name, times in found)


def limit(bar: dict, value: float | None) -> str:
    if value is None:
        return ""
    if bar["what"] == "memory":
        return f"{mebibytes(value)} MiB"
    return f"{value:.3g}"


def bar_text(bar: dict) -> str:
    return in_words(bar["what"], bar["sense"], limit(bar, bar["must"]))


def errors_of(row: Row) -> str:
    if not row.errors:
        return "not measured"
    first = row.errors[0]
    unit = " nats" if first["unit"].startswith("nats") else ""
    return f"{first['ours']:.1e}, {first['plain']:.1e}{unit}"


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def rows_table(rows: Sequence[Row], ceilings: Ceilings = ()) -> Table:
    """One line per case. `vs NAME` is the time of ours over theirs: below 1, ours is faster."""
    names = list(dict.fromkeys(n for row in rows for n in [*row.contestants, *row.missing]))
    heavy = ["ours", *dict.fromkeys(n for row in rows for n in row.memory if n != "ours")]
    header = ["type", "shape", "ours", "spread", "rate", "of limit", *(f"vs {n}" for n in names)]
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
                percent(share_of_limit(row, ceilings)),
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
    if results.rows:
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


def ceilings_of(results: Sequence[Results]) -> Ceilings:
    """Of the first that measured them; results of one kind of machine."""
    return next((one.machine["ceilings"] for one in results if "ceilings" in one.machine), ())


def setting(results: Results) -> list[str]:
    """The measured ceilings, a GPU's clocks, and versions."""
    ceilings = [f"{n} {per_second(value, unit)}" for n, unit, value in results.machine["ceilings"]]
    lines = [f"Ceilings measured in this run: {', '.join(ceilings)}."]
    gpu = results.machine.get("gpu", {})
    for when, found in (("before", gpu), ("after", gpu.get("after", {}))):
        clocks = [f"{name} {found[name]}" for name in CLOCKS if name in found]
        if clocks:
            lines.append(f"The GPU {when}: {', '.join(clocks)}.")
    return [*lines, f"Versions: {', '.join(f'{n} {v}' for n, v in results.versions.items())}."]


def tables(
    rows: Sequence[Row], ceilings: Ceilings = (), brief: bool = False
) -> list[tuple[str, Table]]:
    """One table per room and check, then the bars; each with its title.

    brief: of the bars at single shapes, which stand in the rows too, only what is not met.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.room, row.check), []).append(row)
    found = [
        (f"{room}: {check} (MiB: {group[0].memory_kind})", rows_table(group, ceilings))
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
    found = tables(rows, ceilings_of(results), brief=True)
    blocks = [f"{title}\n{_aligned(table)}" for title, table in found]
    lines = dict.fromkeys(line for one in results for line in heading(one))
    return "\n\n".join(["\n".join(lines), *blocks])


def as_markdown(results: Results, bars_only: bool = False) -> str:
    chosen = bars_of(results.rows) if bars_only else tables(results.rows, ceilings_of([results]))
    blocks = [f"**{title}**\n\n{_piped(table)}" for title, table in chosen]
    return "\n\n".join([*heading(results), *blocks]) + "\n"


def _aligned(table: Table) -> str:
    used = columns(table)
    widths = {i: max(len(line[i]) for line in table) for i in used}
    return "\n".join("  ".join(line[i].ljust(widths[i]) for i in used).rstrip() for line in table)


def _piped(table: Table) -> str:
    used = columns(table)
    lines = ["| " + " | ".join(line[i] for i in used) + " |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(used), *lines[1:]])


def columns(table: Table) -> list[int]:
    """The columns that say something."""
    return [i for i in range(len(table[0])) if any(line[i] for line in table[1:])]


# ------------------------------------------------------------------------------------------------
# Blocks in a file
# ------------------------------------------------------------------------------------------------


def rewritten(text: str, folder: Path = FOLDER) -> str:
    """`text` with every block filled from the JSON of `folder`.

    Raises:
        ValueError: a block names results that are not there, or is not closed.
    """

    def fill(block: re.Match[str]) -> str:
        name, path = block["name"], folder / f"{block['name']}.json"
        if name in MADE:
            body = MADE[name](every_result(folder), studies_of(folder))
        elif path.exists():
            body = as_markdown(Results.load(path), bars_only=bool(block["bars"]))
        else:
            names = ", ".join([*MADE, *sorted(p.stem for p in folder.glob("*.json"))])
            raise ValueError(f"there are no results {name!r} in {folder}; there are: {names}")
        return f"{block['open']}\n{body}\n{block['close']}"

    opened = len(re.findall(r"<!-- results:", text))
    if opened != len(BLOCK.findall(text)):
        raise ValueError(
            f"{opened} blocks open with <!-- results:NAME --> and {len(BLOCK.findall(text))} are "
            "whole; each needs its own <!-- /results -->"
        )
    return BLOCK.sub(fill, text)


def every_result(folder: Path) -> list[Results]:
    return [Results.load(path) for path in sorted(folder.glob("*.json"))]


def studies_of(folder: Path) -> list[Path]:
    """Folders of `perl study`."""
    return sorted(path.parent for path in folder.glob("study-*/study.json"))


def _bars(table: Table) -> str:
    told = [
        f"- {name}: {', '.join(f'{count} {verdict}' for verdict, count in found.items())}"
        for name, found in _targets.counts(table).items()
    ]
    return "\n".join([*told, "", _piped(table)]) + "\n"


def _figures(results: Sequence[Results], studies: Sequence[Path]) -> str:
    shown = (f"![{p.title}]({p.name}.svg)\n\n{p.title}. {p.note}" for p in pictures(results))
    return "\n\n".join(shown) + "\n"


def _by_machine(results: Sequence[Results], tell: Callable[[Results], Table], command: str) -> str:
    told = [f"{kind_of(one.machine)}\n\n{_piped(tell(one))}\n" for one in results]
    return "\n".join(told) or f"Not measured: `{command}`\n"


def _growth(results: Sequence[Results], studies: Sequence[Path]) -> str:
    found = [one for one in results if one.name == growth.NAME]
    return _by_machine(found, growth.table, "python -m benchmarks.growth")


def _memory(results: Sequence[Results], studies: Sequence[Path]) -> str:
    found = [one for one in results if one.timelines]
    return _by_machine(found, _timelines.table, "python -m benchmarks.timeline")


def _studies(results: Sequence[Results], studies: Sequence[Path]) -> str:
    shown = (
        f"[{study.name}]({study.name}/table.md)\n\n![{study.name}]({study.name}/figure.svg)\n"
        for study in studies
    )
    return "\n".join(shown) or "Not measured: `python -m perl study reward|policy`\n"


def _files(results: Sequence[Results], studies: Sequence[Path]) -> str:
    return "\n".join(f"### {one.stem}\n\n{as_markdown(one)}" for one in results)


# Blocks that are made of all results and studies: every bar on every machine, figures, ...
MADE: dict[str, Callable[[Sequence[Results], Sequence[Path]], str]] = {
    "headlines": lambda results, studies: _piped(headlines(results)) + "\n",
    "targets-cpu": lambda results, studies: _bars(_targets.targets(results, "cpu")),
    "targets-gpu": lambda results, studies: _bars(_targets.targets(results, "gpu")),
    "targets-compiled": lambda results, studies: _piped(_targets.COMPILED) + "\n",
    "targets-learning": lambda results, studies: _bars(_targets.learning(studies)),
    "table-1": lambda results, studies: _piped(_targets.papers_table(results)) + "\n",
    "growth": _growth, "timeline": _memory, "figures": _figures, "studies": _studies,
    "files": _files,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def write(folder: Path, papers: Sequence[Path]) -> list[Path]:
    """Everything that is made of the JSON of a folder: figures, report.html, blocks of `papers`."""
    from benchmarks import _page  # which shows the tables of this file

    results = every_result(folder)
    found = pictures(results)
    written = [picture.write(folder) for picture in found]
    for figure, drawings in _figures_of_studies(folder).items():
        write_figure(figure, drawings)
        written.append(figure)
    written.append(folder / "report.html")
    written[-1].write_text(_page.page(results, found, studies_of(folder)), encoding="utf-8")
    for paper in papers:
        paper.write_text(rewritten(paper.read_text(), folder))
    return [*written, *papers]


def stale(folder: Path, papers: Sequence[Path]) -> list[Path]:
    """Which figures of a folder and which papers disagree with its JSON, or are not there."""
    old = [p for p in papers if rewritten(text := p.read_text(), folder) != text]
    drawn = (p for p in pictures(every_result(folder)) if not p.is_drawn_in(folder))
    old += (folder / f"{picture.name}.svg" for picture in drawn)
    shown = _figures_of_studies(folder).items()
    return [*old, *(figure for figure, drawings in shown if not is_drawn(figure, drawings))]


def _figures_of_studies(folder: Path) -> dict[Path, list[Drawing]]:
    """Where the figure of each study is that has one, and what is drawn there."""
    found = {one / "figure.svg": told_by(one).drawings() for one in studies_of(folder)}
    return {figure: drawings for figure, drawings in found.items() if drawings}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Tables, figures and a page of benchmark results.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="files without .json; all if none")
    parser.add_argument(
        "--results", type=Path, default=FOLDER, help="folder (default: %(default)s)"
    )
    does = parser.add_mutually_exclusive_group()
    does.add_argument(
        "--write", action="store_true",
        help="figures and report.html into the folder; the blocks of README.md and of its own",
    )  # fmt: skip
    does.add_argument("--png", type=Path, metavar="FOLDER", help="figures as PNG into FOLDER")
    does.add_argument("--readme", type=Path, metavar="FILE", help="rewrite the blocks of FILE")
    does.add_argument("--check", type=Path, metavar="FILE", help="compare the blocks of FILE")
    options = parser.parse_args(arguments)
    folder, papers = options.results, [p for p in (options.readme, options.check) if p]
    if options.write and folder.resolve() == FOLDER:
        papers = PAPERS
    try:
        if options.write:
            for path in write(folder, papers):
                print(path)
        elif options.png:
            for picture in pictures(every_result(folder)):
                print(picture.write(options.png, "png"))
        elif options.readme:
            options.readme.write_text(rewritten(options.readme.read_text(), folder))
        elif options.check:
            if rewritten(text := options.check.read_text(), folder) != text:
                print(f"{options.check} disagrees with {folder}; run: python -m benchmarks.report "
                      "--write", file=sys.stderr)  # fmt: skip
                return 1
        else:
            for name in options.names or sorted(p.stem for p in folder.glob("*.json")):
                print(f"## {name}\n\n{as_markdown(Results.load(folder / f'{name}.json'))}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
