"""The progress bar of commands that have no run folder."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress(total: int, what: str, unit: str, done: int = 0) -> tqdm:
    """A bar on stderr; quiet where stderr is not a terminal."""
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        file=sys.stderr,
        disable=None,
        dynamic_ncols=True,
    )
