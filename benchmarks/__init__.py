"""Benchmarks: `pytest benchmarks` on this machine's CPU, `python -m benchmarks.gpu` on a GPU.

    bench_*.py    one room each: its cases and its contestants
    _measure.py   how anything is timed, weighed and checked
    _bars.py      what is to be reached
    _limits.py    what no method avoids: the share of the machine's rates that a row reaches
    _results.py   rows, the machine, and the JSON that keeps both
    _targets.py   every bar on every kind of machine, and the paper's table
    _timelines.py what a step's memory is made of
    _figures.py   drawings
    _page.py      report.html
    report.py     tables, figures and the page from that JSON
    check.py      whether today's ratios are worse than the committed ones
    growth.py     how time and memory grow with each size
    timeline.py   memory over a training step, by phase and role
    gpu.py        the campaign on a GPU

A time is only taken after the same call has passed the law of tests/_compare.py.
"""

import argparse
import sys
from pathlib import Path

from perl.config import BENCH_PEERS

ROOT = Path(__file__).parents[1]
PRESETS = {"quick": 0.7, "full": 5.0, "tiny": 0.01}  # of a CPU -> seconds of timing per case
ALSO = {"cpu-small": "quick", "cpu": "full"}  # what else a preset is called
sys.path.insert(0, str(ROOT / "tests"))  # the law of correctness has one home


def peers_of(text: str) -> tuple[str, ...]:
    """The peers in "NAME,NAME", for argparse; "none" is none of them."""
    names = () if text == "none" else tuple(text.split(","))
    for name in names:
        if name not in BENCH_PEERS:
            known = ",".join(BENCH_PEERS)
            raise argparse.ArgumentTypeError(f"{name!r} is no peer; choose from {known}")
    return names
