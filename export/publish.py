"""A directory that appears under its name when it is complete, or not at all, and never replaces another."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ebm.events import DataError


@contextmanager
def publish(directory: str | Path, beside: str | Path | None = None) -> Iterator[Path]:
    """A new, empty directory to write into, which becomes `directory` when the block ends without an error.

    It lies in `beside` (default: the parent of `directory`), on the same file system, under a name that begins with a
    dot. Everything in it is on disk before it gets its name. After an error nothing is left (the whole, where only the
    flush of the new name failed); a crash may leave the directory with the dot. Missing parents are made.
    Raises DataError, at once, where `directory` exists or cannot be written, and at the end where another process
    published it meanwhile.
    """
    path = Path(os.path.abspath(directory))
    if os.path.lexists(path):
        raise DataError(f"{path} exists: exports are never overwritten, name a new directory")
    made = [p for p in path.parents if not p.exists()]
    new = Path(os.path.abspath(beside or path.parent)) / f".{path.name}.{secrets.token_hex(4)}"
    try:
        try:
            new.mkdir(parents=True)
        except OSError as e:
            raise DataError(f"{path} cannot be written: {e.filename}: {e.strerror}") from None
        yield new
        _settle(new)
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
        try:
            os.rename(new, path)  # of two directories, the system replaces only an empty one
        except OSError:
            if os.path.lexists(path):
                raise DataError(f"{path} was made by another process meanwhile, and is left as it is") from None
            raise
        for p in (path, *made):
            _fsync(p.parent)
    finally:  # once it is published, there is nothing here to remove
        shutil.rmtree(new, ignore_errors=True)
        with contextlib.suppress(OSError):
            for p in made:
                p.rmdir()


def _settle(new: Path) -> None:
    """Readable as a new file and directory would be, whatever library wrote them, and on disk."""
    mode = new.stat().st_mode & 0o777
    for folder, _, files in os.walk(new, topdown=False):
        for path, its_mode in (*((os.path.join(folder, name), mode & 0o666) for name in files), (folder, mode)):
            os.chmod(path, its_mode)
            _fsync(path)


def _fsync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
