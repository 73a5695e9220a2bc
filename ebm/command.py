"""What all commands share: errors in one sentence, files written whole or not at all, numbers for JSON, the commit."""

from __future__ import annotations

import functools
import math
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ebm.events import DataError


def one_sentence(command: Callable) -> Callable:
    """What the user can put right ends as one sentence on stderr and exit code 2, without a traceback."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            try:
                return command(*args, **kwargs)
            except OSError as e:
                where = f"{e.filename}: " if e.filename else ""
                message = f"{where}{e.strerror or e}"
            except (ValueError, RuntimeError) as e:
                message = str(e)
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)

    return wrapped


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name when it is complete, or not at all."""
    path = path.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp gives a file to its owner alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def check_file(path: Path) -> None:
    """DataError where the file could not be written; called before long work."""
    parent = path.resolve().parent
    if path.is_dir():
        raise DataError(f"{path} cannot be written: it is a directory")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as e:
        raise DataError(f"{path} cannot be written: {parent}: {e.strerror}") from None


def check_device(device: str) -> None:
    """DataError where there is no such device to train on."""
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or (index and not index.isdecimal())):
        raise DataError(f"--device {device!r}: expected cpu, cuda or cuda:N")
    if kind == "cuda":
        import torch

        if int(index or 0) >= torch.cuda.device_count():
            raise DataError(f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs")


def plain(value: object) -> object:
    """Plain Python for JSON, with null for NaN."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of Python and of packages; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def commit() -> str | None:
    """Short hash of this source tree, "-dirty" where its files differ; None outside git."""
    root = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
