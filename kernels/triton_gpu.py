"""The Scorer of the fused Triton kernel, and whether this machine can run it."""

from __future__ import annotations

import ctypes
import math
import subprocess
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
from triton.runtime import driver

from kernels.launch import INTERPRETED, LAUNCHERS, Loaded, chip, launch, load, load_hopper, too_old
from kernels.scorer import Array, Scorer, _as
from kernels.staging import Cuda, Interpreter, Staging
from kernels.triton_kernel import INPUT_PRECISION, compile_for

if TYPE_CHECKING:
    from ebm.bundle import Bundle
    from kernels.tiles import Tile

__all__ = ["TritonScorer", "compile_for", "why_not"]


def why_not() -> str | None:
    """None where a GPU of compute capability 8.0 or newer can be used, else the reason.

    Triton launches through a module of its own in C, which it compiles at its first use and keeps in its cache; here it
    is asked for it.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver on this machine (libcuda.so.1 cannot be opened)"
    import torch

    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU: a build without CUDA, a driver too old for it, or no device visible"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return too_old(torch.cuda.get_device_name(), major, minor)
    try:
        driver.active.utils  # noqa: B018
    except (AssertionError, ImportError, OSError, RuntimeError, subprocess.SubprocessError) as e:
        said = str(e).partition("\n")[0][:120]
        return ("Triton cannot compile what launches its kernels, for which it needs Python.h and a C compiler (gcc, "
                f"clang or what CC names): {said}")
    return None


class TritonScorer(Scorer):
    """One fused kernel on an NVIDIA GPU, or, under TRITON_INTERPRET=1, in Triton's interpreter on the CPU.

    CUDA tensors on `device` are taken and given back there, in turn on the current stream; anything else goes to the
    GPU and back (`staging.py`). `graphs=False` captures no CUDA graphs for small batches that come from the host.
    `kernel` is "triton" or "hopper" where the choice is not the tile table's. Any number of threads may call.
    """

    name = "triton"
    tile: Tile | None = None  # in place of the table's

    def __init__(self, bundle: Bundle, *, precision: str = "fp32", device: str | None = None, graphs: bool = True,
                 kernel: str | None = None, **checks):
        import torch

        super().__init__(bundle, **checks)
        if precision not in INPUT_PRECISION:
            raise ValueError(f"precision is {precision!r}, expected {', '.join(map(repr, INPUT_PRECISION))}")
        if kernel not in (None, *LAUNCHERS):
            raise ValueError(f"kernel is {kernel!r}, expected {' or '.join(map(repr, LAUNCHERS))}")
        self.precision = precision
        if INTERPRETED:
            self.device = "cpu"
        else:
            index = torch.device(device or "cuda").index
            self.device = f"cuda:{torch.cuda.current_device() if index is None else index}"
        where = torch.device(self.device)
        weights, (cc, n_sm) = load(bundle, self.preprocess, where, precision), chip(where)
        self._loaded = Loaded(weights, precision, float(bundle.tensors["b_out"][0]), self.threshold or 0.0, cc, n_sm,
                              None if kernel == "triton" else load_hopper(bundle, weights, precision, cc, bool(kernel)))
        if kernel == "hopper":
            from kernels.hopper import TILE

            self.tile = TILE
        self._staging = Staging(self._launch, Interpreter() if INTERPRETED else Cuda(where), graphs)

    def energy(self, x: Array, k: Array = None, *, out: Array = None) -> Array:
        """As Scorer.energy; CUDA tensors stay on the GPU."""
        if not _on_gpu(x):
            return super().energy(x, k, out=out)
        return self._resident(x, k, energy=out)[0]

    def energy_and_score(self, x: Array, k: Array = None, *, out: tuple = (None, None)) -> tuple[Array, Array]:
        """As Scorer.energy_and_score; CUDA tensors stay on the GPU."""
        if not _on_gpu(x):
            return super().energy_and_score(x, k, out=out)
        return self._resident(x, k, energy=out[0], score=out[1])

    def energies(self, x: Array, *, out: Array = None) -> Array:
        """As Scorer.energies; CUDA tensors stay on the GPU."""
        if not _on_gpu(x):
            return super().energies(x, out=out)
        return self._resident(x, 0, self.n_levels, energy=out)[0]

    def flag(self, x: Array) -> Array:
        """As Scorer.flag, compared in the kernel; CUDA tensors stay on the GPU."""
        if self.threshold is None:
            return super().flag(x)
        if _on_gpu(x):
            return self._resident(x, None, energy=None, flag=None)[1]
        events, k, like = self._prepare(x, None)
        energy, flag = np.empty(len(events), np.float32), np.empty(len(events), bool)
        if len(events):
            self._staging(events, k, energy=energy, flag=flag.view(np.uint8))
            self._check_finite(events, energy)
        return flag if like is None else _as(flag, like, None)

    def _energy(self, x, k, energy):
        self._staging(x, k, energy=energy)

    def _energy_and_score(self, x, k, energy, score):
        self._staging(x, k, energy=energy, score=score)

    def _energies(self, x, energies):
        self._staging(x, 0, energy=energies)

    def _resident(self, x, k, *levels, **out):
        """CUDA tensors in and out; only the checks of `k` and of the energy wait for the GPU."""
        import torch

        if x.device != torch.device(self.device):
            raise ValueError(f"events are on {x.device}, this scorer is on {self.device}")
        if x.dtype.is_complex or x.dtype == torch.bool:
            raise ValueError(f"events are {x.dtype}, expected real numbers (float32 is the fast way in)")
        if x.ndim != 2 or x.shape[1] != self.n_features:
            raise ValueError(f"expected events of shape (n, {self.n_features}), given {tuple(x.shape)}")
        x = x.detach().to(torch.float32).contiguous()
        if not (_on_gpu(k) and k.ndim == 1 and self._valid_on_gpu(k, len(x))):
            k = self._levels(k, len(x))
        if not isinstance(k, int):
            k = torch.as_tensor(k, dtype=torch.int32, device=self.device).contiguous()
        shapes = {"energy": (len(x), *levels), "score": tuple(x.shape), "flag": (len(x),)}
        results = {name: _result_on_gpu(given, shapes[name], x.device, torch.bool if name == "flag" else torch.float32)
                   for name, given in out.items()}
        if len(x):
            self._launch(x, k, **results)
            energy = results["energy"]
            if self.on_nonfinite == "raise" and not math.isfinite(float(energy.sum(dtype=torch.float64))):
                self._check_finite(x.cpu().numpy(), energy.cpu().numpy())
        return tuple(results.values())

    def _valid_on_gpu(self, k, n) -> bool:
        """Whether levels k on the GPU are sound; what is wrong with them the base class says."""
        import torch

        if k.shape != (n,) or n == 0 or k.dtype in (torch.bool, torch.uint16, torch.uint32, torch.uint64):
            return False
        if k.dtype.is_floating_point or k.dtype.is_complex:
            return False
        least, most = (int(v) for v in k.aminmax())
        return least >= 0 and most < self.n_levels

    def _launch(self, x, k, energy, score=None, flag=None):
        """As `launch`, on the current stream of the tensors' device; `flag` may be of bool."""
        import torch

        flag = flag if flag is None else flag.view(torch.uint8)
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            launch(self._loaded, x, k, energy, score, flag, tile=self.tile)


def _on_gpu(x: Array) -> bool:
    return type(x).__module__.partition(".")[0] == "torch" and x.is_cuda


def _result_on_gpu(out: Array, shape: tuple[int, ...], device, dtype) -> Array:
    import torch

    if out is None:
        return torch.empty(shape, device=device, dtype=dtype)
    if not _on_gpu(out) or out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(f"out must be a contiguous {dtype}{list(shape)} on {device}")
    return out
