"""Files that are whole or as before, and what a disk refuses."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

_REFUSALS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENOTDIR")
    if hasattr(errno, name)
}


def write_whole(path: Path, text: str) -> None:
    """Makes or replaces a file; a reader, a kill or a full disk never leaves half of it there."""
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def disk_trouble(error: BaseException | None) -> str | None:
    """What a disk refused, for one line: room, the right to write; None for any other error.

    Rust's libraries (safetensors, tokenizers) tell the number in their text alone.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number not in _REFUSALS:
        return None
    name = getattr(error, "filename", None)
    return f"the disk refuses {name or 'what is written'}: {os.strerror(number)}"
