"""A GPU that is not there: `tests/native/fake_cuda.cpp` in place of NVIDIA's driver.

What launches runs in a process of its own (`Child`), so that no other test finds a driver on this machine.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import struct
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from pathlib import Path
from typing import ClassVar

import numpy as np
from c_library import ROOT, run
from cuda_library import Compiled, parameter_sizes, small_model

from kernels.cubin import Kind
from kernels.tiles import tiles_for


class FakeGpu:
    """The stand-in driver in this process, and its launches, which `execute` carries out."""

    failing: ClassVar[list] = []

    def __init__(self, compiled: Compiled, execute: Callable[[dict], None], cc: int = 90, multiprocessors: int = 3):
        self.c = ctypes.CDLL("libcuda.so.1")
        self.c.fake_rest.argtypes, self.c.fake_rest.restype = (ctypes.c_ulonglong,), ctypes.c_size_t
        self.c.fake_calls.restype = c_char_p
        self.set(fake_devices=1, fake_cc=cc, fake_multiprocessors=multiprocessors, fake_capturing=0)
        self.fail(b"")
        self.compiled, self.execute, self.launches = compiled, execute, []
        types = c_int, c_void_p, POINTER(c_uint), c_int, c_void_p, POINTER(c_void_p)
        self._callback = ctypes.CFUNCTYPE(*types)(self._on)
        c_void_p.in_dll(self.c, "fake_on_launch").value = ctypes.cast(self._callback, c_void_p).value

    def set(self, **values: int) -> None:
        for name, value in values.items():
            c_int.in_dll(self.c, name).value = value

    def fail(self, function: bytes) -> None:
        self.failing.append(ctypes.create_string_buffer(function))  # kept alive
        c_void_p.in_dll(self.c, "fake_failing").value = ctypes.addressof(self.failing[-1])

    def live(self) -> int:
        return c_int.in_dll(self.c, "fake_live").value

    def calls(self) -> str:
        return self.c.fake_calls().decode()

    def tensor(self, pointer: int, dtype: str = "float32"):
        """What lies from a pointer to the end of its allocation."""
        import torch

        size = self.c.fake_rest(pointer) // 4 * 4
        assert size > 0, f"{pointer:#x} is no memory of the GPU"
        return torch.frombuffer((ctypes.c_char * size).from_address(pointer), dtype=getattr(torch, dtype))

    @contextmanager
    def _context(self) -> Iterator[None]:
        context = c_void_p()
        self.c.cuDevicePrimaryCtxRetain(byref(context), 40)
        self.c.cuCtxPushCurrent_v2(context)
        yield
        self.c.cuCtxPopCurrent_v2(byref(context))
        self.c.cuDevicePrimaryCtxRelease_v2(40)

    def allocate(self, a: np.ndarray) -> int:
        """A copy in the GPU's memory."""
        pointer = ctypes.c_ulonglong()
        with self._context():
            assert self.c.cuMemAlloc_v2(byref(pointer), ctypes.c_size_t(a.nbytes)) == 0
        ctypes.memmove(pointer.value, a.ctypes.data, a.nbytes)
        return pointer.value

    def free(self, *pointers: int) -> None:
        with self._context():
            assert not any(self.c.cuMemFree_v2(ctypes.c_ulonglong(p)) for p in pointers)

    def _on(self, image, launch, dynamic_shared, stream, parameters) -> int:
        try:
            kernel = next(k for k in self.compiled.kernels
                          if ctypes.string_at(image, len(k["cubin"])) == k["cubin"])
            sizes = parameter_sizes(kernel["cubin"])
            values = [int.from_bytes(ctypes.string_at(parameters[i], size), "little") for i, size in enumerate(sizes)]
            self.launches.append({
                "grid": tuple(launch[0:3]), "block": tuple(launch[3:6]), "shared": launch[6], "stream": stream,
                "dynamic_shared": dynamic_shared, "sizes": sizes, "values": values,
                "kernel": {k: v for k, v in kernel.items() if k != "cubin"}})
            self.execute(self.launches[-1])
            return 0
        except BaseException:
            traceback.print_exc()
            return 700


def in_interpreter(gpu_of: Callable[[], FakeGpu], precision: str, types: dict[str, str | None]):
    """Carries a launch out in Triton's interpreter, with what its parameters are and point to."""
    from kernels.triton_kernel import constants, fused, options

    def execute(launch: dict) -> None:
        k, a, sizes, values = launch["kernel"], small_model().architecture, launch["sizes"], launch["values"]
        tile = next(t for t in tiles_for(k["cc"], precision) if t.block_m == k["block_m"])
        fixed = constants(a.input_dim, a.hidden_dim, a.n_layers, bool(k["with_score"]), precision, tile)
        names = [n for n in fused.arg_names if types.get(n) is not None]
        absent = [n for n in fused.arg_names if n not in fixed and n not in names]
        appended = len(sizes) - len(names)  # Triton's own scratch memory, of which this kernel needs none
        assert sizes == [4 if types[n] in ("int", "float") else 8 for n in names] + [8] * appended
        assert values[len(names):] == [0] * appended
        given = dict(zip(names, values))
        for name, value in list(given.items()):
            if name == "flag" and value == 0:  # NULL, which the interpreter knows as None
                del given[name]
                absent.append(name)
            elif types[name] == "float":
                given[name] = struct.unpack("<f", struct.pack("<I", value))[0]
            elif types[name] != "int":
                given[name] = gpu_of().tensor(value, types[name])
        fused[launch["grid"]](**given, **dict.fromkeys(absent), **fixed, **options(tile))

    return execute


def simple(gpu_of: Callable[[], FakeGpu]):
    """A launch that gives x[:, 0] for the energy, 2 x for the score, and 1 for every flag."""

    def execute(launch: dict) -> None:
        v = {kind: value for (kind, _), value in zip(launch["kernel"]["parameters"], launch["values"])}
        n, d, gpu = v[Kind.EVENTS], small_model().architecture.input_dim, gpu_of()
        x = gpu.tensor(v[Kind.X])[:n * d]
        gpu.tensor(v[Kind.ENERGY])[:n] = x[::d]
        if Kind.SCORE in v:
            gpu.tensor(v[Kind.SCORE])[:n * d] = 2 * x
        if v[Kind.FLAG]:
            gpu.tensor(v[Kind.FLAG], "uint8")[:n] = 1

    return execute


def build(directory: Path) -> Path:
    """The directory with the stand-in."""
    run("g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1",
        ROOT / "tests" / "native" / "fake_cuda.cpp", "-o", directory / "libcuda.so.1")
    return directory


class Child:
    """A new process that finds the stand-in driver."""

    def __init__(self, stand_in: Path):
        self.stand_in = stand_in

    def __enter__(self) -> Child:
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        before = os.environ.get("LD_LIBRARY_PATH")
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(self.stand_in), before]))
        try:
            self.pool.submit(int).result()  # starts it
        finally:
            os.environ.pop("LD_LIBRARY_PATH")
            if before is not None:
                os.environ["LD_LIBRARY_PATH"] = before
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown()

    def run(self, function: Callable, *arguments):
        """function(*arguments) there; what it raises is raised here."""
        return self.pool.submit(function, *arguments).result()
