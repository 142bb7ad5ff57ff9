"""Functions that a user names on the command line: FILE.py:NAME."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perl.config import UsageError


def load_function(option: str, target: str, arguments: str) -> Callable[..., Any]:
    """The function NAME of FILE.py, given "FILE.py:NAME".

    option: the flag that names it; arguments: what it is called with. Both stand in the UsageError
    for a target, file or function that is not there.
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
        del sys.modules[whole]
        raise UsageError(
            f"{option}: {path} fails to import: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{option}: {path} has no function {name}; define {name}({arguments})")
    return function
