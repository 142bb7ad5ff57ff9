"""Functions that a user names on the command line: FILE.py:NAME.

They may raise, or hang: a call is interrupted where it stands after a time, and what went wrong is
said with the line of the file that it stood on.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perl.config import UsageError


class SourceFailed(UsageError):
    """A source of rewards or verdicts gave none; the message says which, for what, and why."""


def load_function(option: str, target: str, arguments: str, timeout: float) -> Callable[..., Any]:
    """The function NAME of FILE.py, given "FILE.py:NAME"; called with what it is asked about first.

    option: the flag that names it, "--reward-function"; arguments: what it is called with. Both
    stand in the UsageError for a target, file or function that is not there.
    timeout: seconds for one call, after which it is interrupted where it stands. That is a signal
    to the main thread: a function that is called from another one is not limited, and one that
    waits inside compiled code is interrupted when that returns to Python.
    A call raises SourceFailed for an exception and a time-out.
    """
    path, _, name = target.rpartition(":")
    if not path or not name.isidentifier():
        raise UsageError(f"{option} is {target!r}; want FILE.py:NAME")
    if not Path(path).is_file():
        raise UsageError(f"{option}: {path} does not exist; want FILE.py:NAME")
    whole = str(Path(path).resolve())  # a name that no other module has
    spec = importlib.util.spec_from_file_location(whole, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{option}: {path} is no Python file; want FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    sys.modules[whole] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(
            f"{option}: {path} fails to import: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{option}: {path} has no function {name}; define {name}({arguments})")
    who = f"{option.removeprefix('--').replace('-', ' ')} {target}"

    def call(prompts: Sequence[Any], *texts: Sequence[str]) -> Any:
        what = about(prompts, *texts)
        try:
            with time_limit(timeout):
                returned = function(prompts, *texts)
                # a generator does its work here too
                return list(returned) if isinstance(returned, Iterator) else returned
        except TimeUp as error:
            raise SourceFailed(
                f"{who} took longer than {timeout:g} s{_line(error, whole)} for {what}; make it "
                f"quicker, or raise {option.replace('function', 'timeout')}"
            ) from error
        except Exception as error:
            raise SourceFailed(
                f"{who} raised {type(error).__name__}: {error}{_line(error, whole)} for {what}; "
                "make it return for any answer"
            ) from error

    return call


class TimeUp(BaseException):
    """Not an Exception, which a function may catch and go on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeUp inside the block after that long; without effect outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, where a bare `except` eats it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def about(prompts: Sequence[Any], *texts: Sequence[str]) -> str:
    """What a source was asked about, of answers to prompts, for a message."""
    answers = " and ".join(short(of_each[0]) for of_each in texts)
    return f"{len(prompts)} prompts (the first {short(prompts[0])}, answered {answers})"


def short(value: Any) -> str:
    """On one line, and not too much of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def _line(error: BaseException, path: str) -> str:
    """Where in the user's file an exception comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if str(Path(frame.filename).resolve()) == path]
    return f" on line {lines[-1]}" if lines else ""
