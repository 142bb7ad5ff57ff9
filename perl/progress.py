"""The progress bar of all commands."""

from __future__ import annotations

import sys

from tqdm import tqdm

from perl import distributed


def progress(total: int, what: str, unit: str, done: int = 0) -> tqdm:
    """A bar on stderr; quiet where stderr is not a terminal, and on other ranks than the first."""
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        file=sys.stderr,
        disable=None if distributed.is_first() else True,
        dynamic_ncols=True,
        leave=None,  # a bar inside another goes when it is full
    )
