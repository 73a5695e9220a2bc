"""libfused_ebm.so, built and installed once as a C++ user does, and called through ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("kernels._native", reason="the C++ library was not built")
ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
BAD_ARGUMENT, CANNOT_READ, BAD_FILE, NEWER_FILE, NOT_FINITE, FAILED = range(1, 7)


def run(*command: object) -> subprocess.CompletedProcess:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, env={**os.environ, "PATH": PATH})
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@cache
def _install(directory: Path) -> Path:
    for tool in ("cmake", "g++"):
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"{tool} was not found, which builds the C library")
    build, prefix = directory / "build", directory / "prefix"
    run("cmake", "-S", ROOT, "-B", build, "-DFUSED_EBM_PYTHON=OFF", "-DCMAKE_INSTALL_LIBDIR=lib")
    run("cmake", "--build", build, "--parallel", "1")
    run("cmake", "--install", build, "--prefix", prefix)
    return prefix


def install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix that `cmake --install` filled: one for all tests of a session."""
    return _install(tmp_path_factory.getbasetemp() / "c_library")


class Library:
    """libfused_ebm.so through ctypes."""

    def __init__(self, path: Path):
        self.c = c = ctypes.CDLL(str(path))
        for name in ("version", "last_error", "feature", "isa", "digest"):
            getattr(c, f"fused_ebm_{name}").restype = ctypes.c_char_p
        c.fused_ebm_threshold.restype = ctypes.c_float
        pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        for name, types in {
            "open": (ctypes.c_char_p, ctypes.POINTER(pointer)), "close": (pointer,), "n_features": (pointer,),
            "n_levels": (pointer,), "default_level": (pointer,), "threshold": (pointer,), "isa": (pointer,),
            "digest": (pointer,), "feature": (pointer, integer), "set_deterministic": (pointer, integer),
            "score": (pointer, pointer, size, integer, pointer, pointer, pointer, integer),
            "score_levels": (pointer, pointer, size, pointer, pointer, pointer, integer),
            "energies": (pointer, pointer, size, pointer, integer),
        }.items():
            getattr(c, f"fused_ebm_{name}").argtypes = types

    def __getattr__(self, name: str):
        return getattr(self.c, f"fused_ebm_{name}")

    def error(self) -> str:
        return self.last_error().decode()

    def try_open(self, path: Path) -> tuple[int, ctypes.c_void_p]:
        handle = ctypes.c_void_p(1)
        code = self.open(os.fsencode(path), ctypes.byref(handle))
        return code, handle

    def try_bytes(self, content: bytes, path: Path) -> int:
        """The code of opening a file of these bytes; an error gives no model and names the file."""
        path.write_bytes(content)
        code, handle = self.try_open(path)
        if code == 0:
            self.close(handle)
        else:
            assert handle.value is None
            assert str(path) in self.error()
        return code


def load(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The installed library."""
    return Library(install(tmp_path_factory) / "lib" / "libfused_ebm.so")
