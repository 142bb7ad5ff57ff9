"""Benchmarks: `pytest benchmarks` on this machine's CPU, `python -m benchmarks.gpu` on a GPU.

    bench_*.py    one room each: its cases and its contestants
    _measure.py   how anything is timed, weighed and checked
    _bars.py      what is to be reached
    _results.py   rows, the machine, and the JSON that keeps both
    report.py     tables from that JSON
    gpu.py        the campaign on a GPU

A time is only taken after the same call has passed the law of tests/_compare.py.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the law of correctness has one home
