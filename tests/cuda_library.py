"""libfused_ebm_cuda.so, built and installed once as a C++ user does, and a small model that the command compiled."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_void_p
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from c_library import PATH, ROOT, run
from scorers import events, model

from ebm.bundle import Bundle, Threshold
from kernels import load_scorer
from kernels.cubin import HEADER, KERNEL, MODEL, PARAMETER

OK, BAD_ARGUMENT, CANNOT_READ, BAD_FILE, NEWER_FILE, NOT_FINITE, FAILED, NO_DEVICE, NO_KERNEL = range(9)


class Library:
    """The C functions; `check` raises RuntimeError with the library's sentence."""

    def __init__(self, path: Path):
        self.c = c = ctypes.CDLL(str(path))
        for name in ("version", "last_error", "feature", "digest", "precision"):
            getattr(c, f"fused_ebm_cuda_{name}").restype = c_char_p
        c.fused_ebm_cuda_threshold.restype = ctypes.c_float
        arrays = (c_void_p, c_void_p, c_int64, c_int, c_void_p, c_void_p, c_void_p)
        for name, types in {
            "open": (c_char_p, c_int, POINTER(c_void_p)), "close": (c_void_p,), "n_features": (c_void_p,),
            "n_levels": (c_void_p,), "default_level": (c_void_p,), "threshold": (c_void_p,), "digest": (c_void_p,),
            "precision": (c_void_p,), "architecture": (c_void_p,), "feature": (c_void_p, c_int), "score": arrays,
            "score_device": (*arrays, c_void_p),
        }.items():
            getattr(c, f"fused_ebm_cuda_{name}").argtypes = types

    def __getattr__(self, name: str):
        return getattr(self.c, f"fused_ebm_cuda_{name}")

    def error(self) -> str:
        return self.last_error().decode()

    def try_open(self, path: Path, device: int = 0) -> tuple[int, c_void_p]:
        handle = c_void_p(1)
        code = self.open(os.fsencode(path), device, byref(handle))
        assert (code == OK) == (handle.value is not None)
        return code, handle

    @contextmanager
    def opened(self, path: Path) -> Iterator[c_void_p]:
        code, handle = self.try_open(path)
        assert code == OK, self.error()
        yield handle
        self.close(handle)


class Compiled:
    """What kernels/cubin.py wrote, read again."""

    def __init__(self, path: Path):
        self.content = path.read_bytes()
        h = HEADER.unpack_from(self.content)
        n_kernels, self.weights, table = h[7], (h[10], h[11]), h[15]
        self.kernels = []
        for i in range(n_kernels):
            r = KERNEL.unpack_from(self.content, table + i * KERNEL.size)
            names = ("cc", "exact", "with_score", "block_m", "threads", "shared", "programs_per_sm", "n_parameters")
            kernel = dict(zip(names, r))
            kernel["parameters"] = [PARAMETER.unpack_from(self.content, r[8] + j * PARAMETER.size) for j in range(r[7])]
            kernel["cubin"] = self.content[r[9]:r[9] + r[10]]
            self.kernels.append(kernel)


def parameter_sizes(cubin: bytes, name: str = "fused") -> list[int]:
    """Bytes of each parameter, in order, as the code itself says (EIATTR_KPARAM_INFO of its section .nv.info)."""
    start, size, count, names_at = (*struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<3H", cubin, 58))
    sections = [struct.unpack_from("<II4Q", cubin, start + i * size) for i in range(count)]
    strings = sections[names_at][4]
    found = {}
    for s in sections:
        at, end = s[4], s[4] + s[5]
        title = cubin[strings + s[0]:].partition(b"\0")[0].decode()
        while title == f".nv.info.{name}" and at < end:
            form, attribute, length = struct.unpack_from("<BBH", cubin, at)
            if (form, attribute) == (4, 0x17):
                _, ordinal, _, flags = struct.unpack_from("<IHHI", cubin, at + 4)
                found[ordinal] = flags >> 18
            at += 4 + (length if form == 4 else 0)
    return [found[i] for i in range(len(found))]


def score(c: Library, handle, x: np.ndarray, *, with_score: bool = True, with_flag: bool = False, level: int = 3):
    """The code, and energies, scores and flags."""
    shapes = ((len(x),), np.float32), (x.shape if with_score else None, np.float32), \
        ((len(x),) if with_flag else None, np.uint8)
    out = [None if shape is None else np.full(shape, 7, dtype) for shape, dtype in shapes]
    return c.score(handle, x.ctypes.data, len(x), level, *(None if a is None else a.ctypes.data for a in out)), *out


@cache
def small_model() -> Bundle:
    """Five features, with a threshold in the middle of its energies."""
    bare = model(5, 16, 1)
    middle = float(np.median(load_scorer(bare, "reference").energy(events(500, 5))))
    return replace(bare, threshold=Threshold(middle, 0.5, 0.95, 1, 1, 1.0, False, bare.default_level))


@cache
def _compiled(directory: Path, precision: str) -> Path:
    saved, out = directory / "model", directory / precision
    if not saved.exists():
        directory.mkdir(exist_ok=True)
        small_model().save(saved)
    printed = run(sys.executable, "-m", "kernels", "cubin", saved, out, "--arch", "90,80", "--precision", precision)
    assert f"{out / MODEL}: {(out / MODEL).stat().st_size:,} bytes" in printed.stdout
    return out


def compiled(tmp_path_factory: pytest.TempPathFactory, precision: str = "fp32") -> Path:
    """The directory that the command wrote, under TRITON_INTERPRET=1 like all tests; the model is beside it."""
    return _compiled(tmp_path_factory.getbasetemp() / "compiled", precision)


@cache
def _install(directory: Path) -> Path:
    build, prefix = directory / "build", directory / "prefix"
    run("cmake", "-S", ROOT, "-B", build, "-DFUSED_EBM_CUDA=ON", "-DCMAKE_INSTALL_LIBDIR=lib",
        "-DCMAKE_CXX_FLAGS=-Werror")
    run("cmake", "--build", build)
    run("cmake", "--install", build, "--prefix", prefix)
    return prefix


def install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix that `cmake --install` filled."""
    if shutil.which("cmake", path=PATH) is None or shutil.which("g++", path=PATH) is None:
        pytest.skip("cmake and g++ build the library, and one of them was not found")
    return _install(tmp_path_factory.getbasetemp() / "cuda_library")
