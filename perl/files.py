"""Results on disk: never over what is there, and whole or absent.

    path = new_file(out)                       refused where something has the name
    write_rows(path, rows)                     JSON lines, at once
    with new_folder(out) as temporary: ...     a folder that gets its name when it is complete
    with GrowingRows(out, settings) as file:   JSON lines that take long; a kill loses none of them

Run folders, which grow in many files, are perl/run.py's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from perl.config import Config, Unfinished, UsageError
from perl.disk import disk_trouble, write_whole
from perl.run import Interrupted


def new_file(path: str | Path) -> Path:
    """The path; UsageError where it exists."""
    path = Path(path)
    if path.exists():
        raise UsageError(f"--out {path} exists; give a name that does not")
    return path


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """One JSON line for each row; folders above are made."""
    _make(path.parent)
    write_whole(path, "".join(map(_line, rows)))


def empty_folder(path: str | Path) -> Path:
    """The path; UsageError where it is a file, or a folder with anything in it."""
    path = Path(path)
    if is_taken(path):
        raise UsageError(f"--out {path} exists and is not empty; give another folder")
    return path


def is_taken(path: Path) -> bool:
    """Whether a new folder of this name would hide what is there: a file, or anything in it."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def settings(
    config: Config, files: Iterable[str | Path], without: Sequence[str] = ()
) -> dict[str, Any]:
    """What the rows of a command depend on, for `GrowingRows`: its flags and the files as now.

    without: flags, beside --out and where it runs, that change no row. A file's size and time of
    change settle that it is the one that it was.
    """
    values = dataclasses.asdict(config)
    for name in ("out", "device", "threads", *without):
        del values[name]
    found = {str(path): os.stat(path) for path in files}
    return values | {path: [stat.st_size, stat.st_mtime_ns] for path, stat in found.items()}


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end, or is gone after an error."""
    path = empty_folder(path).resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    _make(temporary)
    try:
        yield temporary
        os.replace(temporary, path)  # over an empty folder too
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class GrowingRows:
    """JSON lines in OUT.part/ that become OUT when the last is there.

    settings: JSON values that the rows depend on. What an earlier, killed command with the same
    settings left is kept: `count` is the number of rows there, to go on from. Other settings are
    refused by name, but for `mendable` ones: that they changed is said. Nothing is written before
    the `with`. Where rows are kept, Ctrl-C that leaves it becomes Interrupted, and a UsageError or
    a disk's refusal becomes Unfinished; both say so.
    """

    def __init__(
        self, out: str | Path, settings: dict[str, Any], mendable: Collection[str] = ()
    ) -> None:
        self.out, self._mendable = new_file(out), mendable
        self.folder = self.out.with_name(self.out.name + ".part")
        self._settings, self._rows = self.folder / "settings.json", self.folder / "rows.jsonl"
        self._given: str = json.dumps(settings, indent=2) + "\n"
        self._file: BinaryIO | None = None
        self._whole = self.count = 0  # bytes, lines
        if self._settings.is_file():
            self._check(json.loads(self._settings.read_text(encoding="utf-8")))
            if self._rows.is_file():
                raw = self._rows.read_bytes()
                self._whole, self.count = raw.rfind(b"\n") + 1, raw.count(b"\n")

    def _check(self, before: dict[str, Any]) -> None:
        given = json.loads(self._given)
        for name in before.keys() | given.keys():
            if before.get(name) == given.get(name):
                continue
            if name in self._mendable:
                said = f"{name} changed after rows were written to {self.folder}: they stay"
                print(said, file=sys.stderr)
            else:
                raise UsageError(
                    f"{self.folder} was begun with {name} {before.get(name)}, not "
                    f"{given.get(name)}; remove it to start anew, or give another --out"
                )

    def __enter__(self) -> GrowingRows:
        _make(self.folder)
        write_whole(self._settings, self._given)
        self._file = open(self._rows, "ab")
        self._file.truncate(self._whole)  # without the line that a kill tore
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        with suppress(OSError):  # `append` flushes: only rows that found no room are left
            self._file.close()
        if not self.count:
            shutil.rmtree(self.folder)
            return
        kept = f"{self.count} rows are in {self.folder}; the same command goes on with them"
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(kept) from None
        if isinstance(error, UsageError):
            raise Unfinished(f"{error}; {kept}") from error
        if trouble := disk_trouble(error):
            raise Unfinished(f"{trouble}; mend that: {kept}") from error

    def append(self, rows: Sequence[dict]) -> None:
        self._file.write("".join(map(_line, rows)).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.count += len(rows)

    def read(self) -> list[dict]:
        """All rows so far."""
        lines = self._rows.read_text(encoding="utf-8").splitlines() if self.count else []
        return [json.loads(line) for line in lines]

    def finish(self) -> None:
        """All rows are there: the file gets its name."""
        os.replace(self._rows, self.out)
        shutil.rmtree(self.folder)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder} of --out: {error.strerror}") from None


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
