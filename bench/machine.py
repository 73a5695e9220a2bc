"""The machine, the versions and the commit of a run, and the limits that the machine itself sets."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ebm import command
from ebm.bundle import Architecture

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("fused-ebm", "numpy", "torch", "numba", "triton", "onnx", "onnxscript", "onnxruntime", "openvino", "jax",
             "jaxlib")


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, caches, system."""
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.M)
    return {
        "cpu": command.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1) if memory else None,
        "caches": _caches(),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def cpu_ticks() -> tuple[int, int] | None:
    """(stolen, all) ticks of all processors since the start; None where the system does not tell."""
    fields = re.match(r"cpu\s+([\d ]+)", _read("/proc/stat"))
    ticks = [int(t) for t in fields.group(1).split()[:8]] if fields else []
    return (ticks[7], sum(ticks)) if len(ticks) == 8 else None


def steal_fraction(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """The share of processor time that the hypervisor gave to others between two `cpu_ticks`."""
    if before is None or after is None or after[1] == before[1]:
        return None
    return round((after[0] - before[0]) / (after[1] - before[1]), 5)


def versions() -> dict[str, str | None]:
    """Versions of what takes part; None: not installed."""
    return command.versions(_PACKAGES)


def limits(cores: int) -> dict[str, float | None]:
    """Multiply-add peaks and read bandwidth of one core, and the peaks of all; None without the C++ library.

    `tile_gflops`: float32 accuracy from three 8-bit digits on the tiles of AMX; None without them.
    """
    names = ("fma_gflops_1t", "fma_gflops_all", "tile_gflops_1t", "tile_gflops_all", "read_gbps_600k", "read_gbps_64m")
    try:
        from kernels._native import fma_gflops, read_gbps, tile_gflops
    except ImportError:
        return dict.fromkeys(names)
    found = (fma_gflops(1), fma_gflops(cores), tile_gflops(1), tile_gflops(cores), read_gbps(600_000, 0.1),
             read_gbps(64_000_000, 0.2))
    return dict(zip(names, found))


def best(a: dict[str, float | None], b: dict[str, float | None]) -> dict[str, float | None]:
    """The higher of two measurements of every limit: another load can only lower them."""
    return {name: max((v for v in (a[name], b[name]) if v is not None), default=None) for name in a}


def sgemm_contenders(a: Architecture) -> dict[str, Callable[[int], Callable[[Any], None]]]:
    """The matrix products of energy and score alone, through MKL (torch) and OpenBLAS (NumPy).

    One per layer and direction: what any implementation that calls a BLAS has to spend at least.
    """
    widths = [(a.input_dim, a.hidden_dim)] + [(a.hidden_dim, a.hidden_dim)] * a.n_layers
    shapes = widths + [(h, d) for d, h in reversed(widths)]

    def operands(batch: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(0)
        return [tuple(rng.standard_normal(s, np.float32) for s in ((batch, k), (k, n), (batch, n))) for k, n in shapes]

    def mkl(batch: int) -> Callable[[Any], None]:
        import torch

        triples = [tuple(map(torch.from_numpy, t)) for t in operands(batch)]

        def products(_: Any) -> None:
            for left, right, out in triples:
                torch.mm(left, right, out=out)

        return products

    def openblas(batch: int) -> Callable[[Any], None]:
        triples = operands(batch)

        def products(_: Any) -> None:
            for left, right, out in triples:
                np.matmul(left, right, out=out)

        return products

    return {"sgemm_us": mkl, "sgemm_openblas_us": openblas}


def n_weights(a: Architecture) -> int:
    """Weights of the matrix products and the output row."""
    return a.input_dim * a.hidden_dim + a.n_layers * a.hidden_dim**2 + a.hidden_dim


def flop_per_event(a: Architecture, score: bool) -> int:
    """Floating-point operations of the products; a multiply-add counts 2."""
    return 2 * n_weights(a) + (2 * (n_weights(a) - a.hidden_dim) if score else 0)


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(index / name).strip() for name in ("level", "type", "size"))
        if size:
            found[f"L{level}{ {'Data': 'd', 'Instruction': 'i'}.get(kind, '') }"] = size
    return found


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
