"""Commands that a command starts: `python -m perl ...`, each in a process of its own.

The demo, a sweep and the study are made of the commands that a user would type. A process each,
because peak memory cannot be compared inside one, and a run that dies takes no other with it.
"""

from __future__ import annotations

import ctypes
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from perl.config import UsageError, flag
from perl.disk import write_whole


def words(command: str, **flags: Any) -> list[str]:
    """`command --flag value ...`: True is --flag, False --no-flag, None is left out."""
    line = [command]
    for name, value in flags.items():
        if isinstance(value, bool):
            line.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, list | tuple):
            line += [flag(name), *map(str, value)]
        elif value is not None:
            line += [flag(name), str(value)]
    return line


def training(command: str, *, out: Path, **flags: Any) -> list[str]:
    """The words that start a training or a sweep, or go on with what a kill has left in `out`."""
    if (out / "sweep.json").is_file():
        return words(command, out=out, resume=True, **flags)
    if any((out / "checkpoints").glob("step-*")):
        return words(command, out=out, resume=True)
    shutil.rmtree(out, ignore_errors=True)  # it was killed before its first checkpoint
    return words(command, out=out, **flags)


def start(line: list[str], **streams: Any) -> subprocess.Popen:
    """A process of `python -m perl LINE`, which does not outlive this one."""
    command = [sys.executable, "-m", "perl", *line]
    on_linux = {"preexec_fn": _die_with_parent} if sys.platform == "linux" else {}
    return subprocess.Popen(command, **streams, **on_linux)


def run_all(
    lines: Mapping[str, list[str]],
    logs: Path,
    *,
    at_once: int,
    done: Callable[[str], None] = lambda name: None,
) -> None:
    """Runs commands in the order of `lines`, `at_once` at a time.

    logs: folder of NAME.log, what each of them says.
    done: called with the name of each command that succeeded.
    Raises UsageError with the last line of the first command that fails; the others are stopped.
    """
    waiting, running = dict(lines), {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = next(iter(waiting))
                running[name] = _logged(waiting.pop(name), logs / f"{name}.log")
            time.sleep(0.05)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(name).returncode:
                    log = logs / f"{name}.log"
                    last = log.read_text(encoding="utf-8").splitlines()[-1]
                    raise UsageError(f"{name} failed: {last} (all it said is in {log})")
                done(name)
    except KeyboardInterrupt:  # the terminal has told them too: they finish a step and keep it
        for process in running.values():
            process.wait()
        raise
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file; a reader, or a kill, never finds half of it."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _logged(line: list[str], log: Path) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        print(f"$ python -m perl {shlex.join(line)}", file=file, flush=True)
        return start(line, stdout=file, stderr=file)


def _die_with_parent() -> None:
    set_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
