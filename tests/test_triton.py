"""The Triton kernels' numbers, in Triton's interpreter: no GPU is needed.

The interpreter is chosen when triton is first imported, so the tests proper are in
interpreter_triton.py and run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_every_kernel_in_the_interpreter():
    # the interpreters of older releases fail on numpy 2.4's stricter scalars
    pytest.importorskip("triton", minversion="3.7")
    tests = Path(__file__).with_name("interpreter_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]
