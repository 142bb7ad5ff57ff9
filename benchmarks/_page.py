"""report.html: every bar, the paper's table, the figures and every row, in one file.

No script and nothing from elsewhere: the figures are images inside the page, which follow the
reader's light or dark scheme as the page does.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

from benchmarks import _targets, _timelines, growth, report
from benchmarks._figures import Picture
from benchmarks._results import Results, kind_of
from benchmarks._targets import Table, counts


def page(results: Sequence[Results], pictures: Sequence[Picture], studies: Sequence[Path]) -> str:
    """The page as text.

    studies: folders of `perl study`, each with its table.md and figure.svg.
    """
    first, *others = pictures or [None]
    sections = [
        ("", _picture(first) if first else ""),
        ("Every bar", "".join(_bars(results, studies))),
        ("Table 1 of arXiv 2403.10704, and ours", table(_targets.papers_table(results))),
        (
            "How cost grows",
            _by_machine([r for r in results if r.name == growth.NAME], growth.table),
        ),
        (
            "Memory over a step: the peaks, in MiB",
            _by_machine([r for r in results if r.timelines], _timelines.table),
        ),
        ("Figures", "".join(map(_picture, others))),
        *((f"Study: {folder.name}", _study(folder)) for folder in studies),
        ("Not measured", _absent(pictures, studies)),
        ("Every row", "".join(map(_rows, results))),
    ]
    body = "".join(
        f"<section>{f'<h2>{escape(head)}</h2>' if head else ''}{text}</section>"
        for head, text in sections
        if text
    )
    return _PAGE.replace("BODY", body)


def table(lines: Table) -> str:
    """The columns that say something; what is missed and what is not measured can be told apart."""
    used = report.columns(lines)
    head = "".join(f"<th>{escape(lines[0][i])}</th>" for i in used)
    body = "".join(f"<tr>{''.join(_cell(line[i]) for i in used)}</tr>" for line in lines[1:])
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    verdicts = {"missed": "missed", "not measured": "none", "met": "met"}
    said = (kind for word, kind in verdicts.items() if re.search(rf"\b{word}\b", text))
    kind = next(said, "")
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def _bars(results: Sequence[Results], studies: Sequence[Path]) -> Iterator[str]:
    for name, lines in (
        ("CPU", _targets.targets(results, "cpu")),
        ("GPU", _targets.targets(results, "gpu")),
        ("Learning", _targets.learning(studies)),
    ):
        yield f"<h3>{name}</h3><ul>"
        for machine, found in counts(lines).items():
            told = ", ".join(f"{count} {verdict}" for verdict, count in found.items())
            yield f"<li>{escape(machine)}: {told}</li>"
        yield f"</ul><details open><summary>{len(lines) - 1} bars</summary>{table(lines)}</details>"
    yield f"<h3>Compilers of the GPU kernels</h3>{table(_targets.COMPILED)}"


def _by_machine(results: Sequence[Results], tell: Callable[[Results], Table]) -> str:
    return "".join(f"<h3>{escape(kind_of(r.machine))}</h3>{table(tell(r))}" for r in results)


def _picture(picture: Picture) -> str:
    return (
        f"<figure><figcaption><b>{escape(picture.title)}.</b> {escape(picture.note)}</figcaption>"
        f"{_image(picture.svg(), picture.title)}</figure>"
    )


def _image(svg: str, name: str) -> str:
    text = base64.b64encode(svg.encode()).decode()
    source = f"data:image/svg+xml;base64,{text}"
    return f'<div class="wide"><img alt="{escape(name)}" src="{source}"></div>'


def _study(folder: Path) -> str:
    figure = folder / "figure.svg"
    drawn = _image(figure.read_text(encoding="utf-8"), folder.name) if figure.is_file() else ""
    tables = (
        f"<h3>{escape(title)}</h3>{table(lines)}"
        for title, lines in _targets.study_tables(folder).items()
    )
    return f"<figure>{drawn}</figure><details><summary>tables</summary>{''.join(tables)}</details>"


# What a page may show -> how its name begins, and what measures it.
_KNOWN = {
    "Roofline": ("roofline", "python -m perl bench kernels --preset cpu"),
    "How cost grows": ("growth", "python -m benchmarks.growth"),
    "Memory over a step": ("timeline", "python -m benchmarks.timeline"),
    "A step of REINFORCE by its phases": ("phases", "python -m perl bench policy --preset cpu"),
    "Accuracy against rank": ("study-reward", "python -m perl study reward"),
    "Reward against KL": ("study-policy", "python -m perl study policy"),
}


def _absent(pictures: Sequence[Picture], studies: Sequence[Path]) -> str:
    names = [picture.name for picture in pictures]
    names += ["study-policy" if "policy" in path.name else "study-reward" for path in studies]
    lines = [
        f"<li>{what}: <code>{command}</code></li>"
        for what, (start, command) in _KNOWN.items()
        if not any(name.startswith(start) for name in names)
    ]
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _rows(results: Results) -> str:
    told = "".join(f"<p>{escape(line)}</p>" for line in report.heading(results))
    found = report.tables(results.rows, report.ceilings_of([results]))
    tables = "".join(f"<h4>{escape(title)}</h4>{table(lines)}" for title, lines in found)
    return f"<details><summary>{escape(results.stem)}</summary>{told}{tables}</details>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>perl-kernels: benchmarks</title>
<style>
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b2026; --rule: #d8dee4;
  --met: #1a7f37; --missed: #cf222e; --none: #6e7781; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --ink: #e6edf3; --rule: #333c47;
    --met: #5fd068; --missed: #ff8f88; --none: #8b949e; }
}
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
summary { cursor: pointer; margin: 0.3rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; overflow-wrap: normal; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums; }
th { vertical-align: bottom; } td { min-width: 4.2rem; } td:first-child { min-width: 10rem; }
td:is(.met, .missed, .none) { min-width: 6.5rem; }
.met { color: var(--met); } .missed { color: var(--missed); } .none { color: var(--none); }
figure { margin: 1.5rem 0; } figcaption { max-width: 60rem; margin-bottom: 0.5rem; }
img { max-width: 100%; min-width: 48rem; height: auto; }
</style>
</head>
<body>
<h1>perl-kernels: benchmarks</h1>
<p>Made from the JSON of benchmarks/results by <code>python -m benchmarks.report --write</code>.
Ratios are interleaved medians in one process, times of ours over theirs; memory is that of a fresh
process; errors are against float64. The command that measured a row stands above it, under “Every
row”. A bar on ours/NAME is on the time of ours over NAME's, one on NAME/ours says how many times as
fast ours is, and the aim is what was hoped for beyond the bar.</p>
BODY
</body>
</html>
"""
