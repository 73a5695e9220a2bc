"""The Scorer of the fused Triton kernel, and whether this machine can run it."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import triton

from kernels.packing import pack
from kernels.scorer import Array, Scorer
from kernels.tiles import TILES, choose
from kernels.triton_kernel import INPUT_PRECISION, STORED, compile_for, constants, fused, options, padded

if TYPE_CHECKING:
    from ebm.bundle import Bundle

__all__ = ["TritonScorer", "compile_for", "why_not"]


def why_not() -> str | None:
    """None where a GPU of compute capability 8.0 or newer can be used, else the reason."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver on this machine (libcuda.so.1 cannot be opened)"
    import torch

    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU: a build without CUDA, a driver too old for it, or no device visible"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return (f"{torch.cuda.get_device_name()} is sm_{major}{minor}: Triton emits no tensor-core code before sm_80; "
                "export the model to TensorRT or TorchScript instead")
    return None


class TritonScorer(Scorer):
    """One fused kernel on an NVIDIA GPU, or, under TRITON_INTERPRET=1, in Triton's interpreter on the CPU.

    CUDA tensors on `device` are taken and given back there; anything else is copied to the GPU and back.
    """

    name = "triton"

    def __init__(self, bundle: Bundle, *, precision: str = "fp32", device: str | None = None, **checks):
        import torch

        super().__init__(bundle, **checks)
        if precision not in INPUT_PRECISION:
            raise ValueError(f"precision is {precision!r}, expected {', '.join(map(repr, INPUT_PRECISION))}")
        self.precision = precision
        if not isinstance(fused, triton.JITFunction):  # the interpreter
            self.device, self._cc, self._n_sm = "cpu", max(TILES), 1
        else:
            index = torch.device(device or "cuda").index
            self.device = f"cuda:{torch.cuda.current_device() if index is None else index}"
            properties = torch.cuda.get_device_properties(self.device)
            self._cc, self._n_sm = 10 * properties.major + properties.minor, properties.multi_processor_count
        self._weights = _weights(bundle, self.preprocess, self.device, precision)

    def energy(self, x: Array, k: Array = None, *, out: Array = None) -> Array:
        """As Scorer.energy; CUDA tensors stay on the GPU."""
        if not _on_gpu(x):
            return super().energy(x, k, out=out)
        return self._resident(x, k, (out,))[0]

    def energy_and_score(self, x: Array, k: Array = None, *, out: tuple = (None, None)) -> tuple[Array, Array]:
        """As Scorer.energy_and_score; CUDA tensors stay on the GPU."""
        if not _on_gpu(x):
            return super().energy_and_score(x, k, out=out)
        return self._resident(x, k, out)

    def energies(self, x: Array, *, out: Array = None) -> Array:
        """As Scorer.energies; CUDA tensors stay on the GPU."""
        if not _on_gpu(x):
            return super().energies(x, out=out)
        return self._resident(x, 0, (out,), self.n_levels)[0]

    def _energy(self, x, k, energy):
        self._from_host(x, k, energy)

    def _energy_and_score(self, x, k, energy, score):
        self._from_host(x, k, energy, score)

    def _energies(self, x, energies):
        self._from_host(x, 0, energies)

    def _from_host(self, x, k, *results):
        import torch

        x, k = (torch.from_numpy(a if a.flags.writeable else a.copy()).to(self.device) if isinstance(a, np.ndarray)
                else a for a in (x, k))
        on_device = [torch.empty(r.shape, device=self.device) for r in results]
        self._launch(x, k, *on_device)
        for result, tensor in zip(results, on_device):
            torch.from_numpy(result).copy_(tensor)

    def _resident(self, x, k, out, *levels):
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
        shapes = ((len(x), *levels), tuple(x.shape))
        results = [_result_on_gpu(o, shape, x.device) for o, shape in zip(out, shapes)]
        if len(x):
            self._launch(x, k, *results)
            if self.on_nonfinite == "raise" and not bool(torch.isfinite(results[0]).all()):
                self._check_finite(x.cpu().numpy(), results[0].cpu().numpy())
        return tuple(results)

    def _valid_on_gpu(self, k, n) -> bool:
        """Whether levels k on the GPU are sound; what is wrong with them the base class says."""
        import torch

        if k.shape != (n,) or n == 0 or k.dtype in (torch.bool, torch.uint16, torch.uint32, torch.uint64):
            return False
        if k.dtype.is_floating_point or k.dtype.is_complex:
            return False
        least, most = (int(v) for v in k.aminmax())
        return least >= 0 and most < self.n_levels

    def _launch(self, x, k, energy, score=None):
        """Tensors on `device`: x (n, D); k an int or int32 (n,); energy (n,) or, from level k on, (n, levels)."""
        import torch

        n, a = len(x), self.bundle.architecture
        tile = choose(self._cc, n, self._n_sm, self.precision)
        programs = min(-(-n // tile.block_m), tile.programs_per_sm * self._n_sm)
        fixed = constants(a.input_dim, a.hidden_dim, a.n_layers, score is not None, self.precision, tile)
        buffers = 3 + a.n_layers if score is not None else 3
        size = programs * tile.block_m * max(fixed["D_PAD"], fixed["H"])
        scratch = torch.empty(size * buffers, device=self.device, dtype=self._weights[0].dtype)
        wide = torch.empty(size * 2, device=self.device) if self.precision in STORED else None
        level, k = (k, None) if isinstance(k, int) else (0, k)
        b_out = float(self.bundle.tensors["b_out"][0])
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            fused[(programs,)](x, k, energy, score, *self._weights, scratch, wide, b_out, n, level, energy.numel() // n,
                               **fixed, **options(tile))


def _weights(bundle: Bundle, preprocess: bool, device: str, precision: str = "fp32") -> list:
    """up_in to pre of `fused`, padded with zeros: a padded hidden unit or feature changes nothing."""
    import torch

    p = pack(bundle, preprocess)
    h, d = (padded(width) for width in p.w_in.shape)
    q = p.preprocessing
    w_in, w = _pad(p.w_in, (h, d)), _pad(p.w, (len(p.w), h, h))
    pre = _pad(np.stack([q.marker, q.impute, q.scale, q.mean, q.inv_std, q.transform]), (6, d))
    pre[2, len(q.scale):] = 1
    w_in_t, w_t = w_in.T, w.transpose(0, 2, 1)
    up_in, down_in, up, down = (w_in_t, w_in, w_t, w) if precision == "fp32" else (w_in, w_in_t, w, w_t)  # K_FIRST

    def tensor(a: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(a)).to(device, dtype)

    stored = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    return [tensor(up_in, stored), tensor(down_in, stored), tensor(_pad(p.b_in, (len(p.b_in), h))), tensor(up, stored),
            tensor(down, stored), tensor(_pad(p.b, (len(p.b), h))), tensor(_pad(p.w_out, (h,))), tensor(pre)]


def _pad(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.pad(np.asarray(a, np.float32), [(0, more - less) for less, more in zip(a.shape, shape)])


def _on_gpu(x: Array) -> bool:
    return type(x).__module__.partition(".")[0] == "torch" and x.is_cuda


def _result_on_gpu(out: Array, shape: tuple[int, ...], device) -> Array:
    import torch

    if out is None:
        return torch.empty(shape, device=device)
    if not _on_gpu(out) or out.shape != shape or out.dtype != torch.float32 or out.device != device \
            or not out.is_contiguous():
        raise ValueError(f"out must be a contiguous torch.float32{list(shape)} on {device}")
    return out
