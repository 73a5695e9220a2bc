"""How a batch is launched on a GPU. Which kernel, in which tile, is one decision, read from the tile table."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import triton

from kernels.packing import pack
from kernels.tiles import TILES, Tile, choose, tiles_for
from kernels.triton_kernel import STORED, constants, fused, options, padded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ebm.bundle import Bundle

INTERPRETED = not isinstance(fused, triton.JITFunction)
WEIGHTS = ("up_in", "down_in", "b_in", "up", "down", "b", "w_out", "pre")  # of `fused`, in this order
# Kernel of a tile -> the function that launches it, with the arguments of `launch_fused`.
LAUNCHERS = {"triton": "kernels.launch:launch_fused", "hopper": "kernels.hopper:launch"}


@dataclass(frozen=True)
class Loaded:
    """A model where its kernel runs: `weights` are the tensors WEIGHTS; `b_out` and `threshold` are float32.

    `hopper` is what the kernel "hopper" reads instead, where it takes the model and the table names it.
    """

    weights: Sequence[Tensor]
    precision: str
    b_out: float
    threshold: float
    cc: int
    n_sm: int
    hopper: Sequence[Tensor] | None = None

    @property
    def layers(self) -> int:
        """Residual layers."""
        return self.weights[WEIGHTS.index("up")].shape[0]

    @property
    def kernels(self) -> tuple[str, ...]:
        """Those that take this model."""
        return ("triton",) if self.hopper is None else ("triton", "hopper")


@cache
def chip(device: torch.device) -> tuple[int, int]:
    """Compute capability, as 90, and number of multiprocessors; RuntimeError where no kernel runs on it."""
    import torch

    if INTERPRETED:
        return max(TILES), 1
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        raise RuntimeError(too_old(properties.name, properties.major, properties.minor))
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def too_old(name: str, major: int, minor: int) -> str:
    """Why a GPU runs none of the kernels, and what does on it."""
    return (f"{name} is sm_{major}{minor}: Triton emits no tensor-core code before sm_80; export the model to TensorRT "
            "or TorchScript instead")


def launch(m: Loaded, x: Tensor, k: int | Tensor, energy: Tensor, score: Tensor | None = None,
           flag: Tensor | None = None, *, tile: Tile | None = None, wrap: Callable[[Any], Any] | None = None) -> None:
    """Enqueue x (n, D) -> energy (n,), score (n, D), flag (n,) uint8: energy > threshold; n > 0, all on one device.

    `k` is an int or int32 (n,). An energy of shape (n, levels) begins at level k, without a score or a flag. All are
    contiguous; the tile is the table's unless given. `wrap` is torch.library.wrap_triton where PyTorch is to see the
    launch instead of carrying it out.
    """
    n = x.shape[0] if isinstance(x.shape[0], int) else 1 << 31  # a size that is not known yet is taken for a large one
    tile = tile or choose(m.cc, n, m.n_sm, m.precision, m.kernels)
    module, name = LAUNCHERS[tile.kernel].split(":")
    getattr(importlib.import_module(module), name)(m, tile, x, k, energy, score, flag, wrap)


def launch_fused(m: Loaded, tile: Tile, x: Tensor, k: int | Tensor, energy: Tensor, score: Tensor | None,
                 flag: Tensor | None, wrap: Callable[[Any], Any] | None) -> None:
    """`triton_kernel.fused` with its scratch memory."""
    import torch

    (n, features), layers, hidden = x.shape, m.layers, m.weights[WEIGHTS.index("w_out")].shape[0]
    programs = tile.programs_per_sm * m.n_sm
    if isinstance(n, int):
        programs = min(-(-n // tile.block_m), programs)
    fixed = constants(features, hidden, layers, score is not None, m.precision, tile)
    size = programs * tile.block_m * max(fixed["D_PAD"], fixed["H"])
    scratch = torch.empty(size * (3 + layers if score is not None else 3), device=x.device, dtype=m.weights[0].dtype)
    wide = torch.empty(size * 2, device=x.device) if m.precision in STORED else None
    level, k = (k, None) if isinstance(k, int) else (0, k)
    levels = energy.shape[1] if energy.ndim == 2 else 1
    arguments = (x, k, energy, score, flag, *m.weights, scratch, wide, m.b_out, m.threshold, n, level, levels)
    if wrap is None:
        fused[(programs,)](*arguments, **fixed, **options(tile))
    else:  # PyTorch's compiler knows no limit on registers
        wrap(fused)[(programs,)](*arguments, **fixed, num_warps=tile.num_warps, num_stages=tile.num_stages)


def load(bundle: Bundle, preprocess: bool, device: str | torch.device, precision: str = "fp32") -> list[Tensor]:
    """WEIGHTS on a device, padded with zeros: a padded hidden unit or feature changes nothing."""
    import torch

    p = pack(bundle, preprocess)
    h, d = (padded(width) for width in p.w_in.shape)
    q = p.preprocessing
    w_in, w = _pad(p.w_in, (h, d)), _pad(p.w, (len(p.w), h, h))
    pre = _pad(np.stack([q.marker, q.impute, q.scale, q.mean, q.inv_std, q.transform]), (6, d))
    pre[2, len(q.scale):] = 1
    w_in_t, w_t = w_in.T, w.transpose(0, 2, 1)
    up_in, down_in, up, down = (w_in_t, w_in, w_t, w) if precision == "fp32" else (w_in, w_in_t, w, w_t)  # K_FIRST

    def tensor(a: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a)).to(device, dtype)

    stored = stored_dtype(precision)
    return [tensor(up_in, stored), tensor(down_in, stored), tensor(_pad(p.b_in, (len(p.b_in), h))), tensor(up, stored),
            tensor(down, stored), tensor(_pad(p.b, (len(p.b), h))), tensor(_pad(p.w_out, (h,))), tensor(pre)]


def load_hopper(bundle: Bundle, weights: Sequence[Tensor], precision: str, cc: int,
                wanted: bool = False) -> Sequence[Tensor] | None:
    """`Loaded.hopper` from the WEIGHTS, where the table names this kernel; ValueError where it is wanted and cannot."""
    if not wanted and not tiles_for(cc, precision, ("hopper",)):
        return None
    from kernels import hopper

    a = bundle.architecture
    reason = hopper.why_not(a.input_dim, a.hidden_dim, a.n_layers, precision, cc)
    if reason and wanted:
        raise ValueError(f"kernel 'hopper' cannot run: {reason}")
    return None if reason else hopper.pack(weights)


def stored_dtype(precision: str) -> torch.dtype:
    """Of the weights that enter a product."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def _pad(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.pad(np.asarray(a, np.float32), [(0, more - less) for less, more in zip(a.shape, shape)])
