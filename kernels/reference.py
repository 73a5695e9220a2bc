"""The truth: every kind of model in PyTorch, in float64 unless asked otherwise."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebm.bundle import Bundle
from ebm.networks import from_bundle
from ebm.preprocess import ASINH, LOG1P, Preprocessing
from kernels.scorer import Scorer


class PreprocessingGraph(nn.Module):
    """Raw x (n, D) -> u and du/dx, both (n, D)."""

    def __init__(self, preprocessing: Preprocessing):
        super().__init__()
        for name, array in preprocessing_constants(preprocessing).items():
            self.register_buffer(name, torch.from_numpy(array.copy()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return preprocess(torch, x, **self._buffers)


def preprocessing_constants(p: Preprocessing) -> dict[str, np.ndarray]:
    """The arrays that `preprocess` takes. A transform that no feature uses is left out, and so is its work."""
    constants = {name: getattr(p, name) for name in ("marker", "impute", "mean", "inv_std")}
    if (p.transform == LOG1P).any():
        constants["log1p"] = p.transform == LOG1P
    if (p.transform == ASINH).any():
        constants |= {"asinh": p.transform == ASINH, "scale": p.scale}
    return constants


def preprocess(xp: ModuleType, x: Any, marker: Any, impute: Any, mean: Any, inv_std: Any, log1p: Any = None,
               asinh: Any = None, scale: Any = None) -> tuple[Any, Any]:
    """`ebm.preprocess` as plain operations, u and du/dx of x; `xp` is torch or jax.numpy.

    The slope is written out: automatic differentiation of sign(x) log1p(|x|) gives 0 at x = 0, where it is 1.
    The square root stands for a hypot, which ONNX and OpenVINO do not know.
    """
    missing = xp.isnan(x) | (x == marker)
    x = xp.where(missing, impute, x)
    t, slope = x, xp.where(missing, xp.zeros_like(x), inv_std)
    if log1p is not None:
        size = xp.abs(x)
        t = xp.where(log1p, xp.sign(x) * xp.log1p(size), t)
        slope = xp.where(log1p, slope / (1 + size), slope)
    if asinh is not None:
        ratio = x / scale
        t = xp.where(asinh, xp.asinh(ratio), t)
        slope = xp.where(asinh, slope / (scale * xp.sqrt(1 + ratio * ratio)), slope)
    return (t - mean) * inv_std, slope


class ScoreGraph(nn.Module):
    """Raw events (n, D) and noise levels (n,) -> energy (n,) and score (n, D), as plain operations.

    `preprocessing=None` takes events that are preprocessed already.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing | None):
        super().__init__()
        self.network = network
        self.preprocessing = PreprocessingGraph(preprocessing) if preprocessing else None

    def forward(self, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.preprocessing is None:
            return self.network.energy_and_score(x, k)
        u, slope = self.preprocessing(x)
        energy, score = self.network.energy_and_score(u, k)
        return energy, score * slope

    @classmethod
    def of(cls, bundle: Bundle, preprocess: bool = True) -> ScoreGraph:
        """The graph of a bundle, in float32, without gradients of the weights."""
        graph = cls(from_bundle(bundle), bundle.preprocessing if preprocess else None)
        return graph.eval().requires_grad_(False)


class ReferenceScorer(Scorer):
    """What every other Scorer is compared with. `precision` is "fp64" or "fp32"."""

    name = "reference"

    def __init__(self, bundle: Bundle, *, precision: str = "fp64", **options):
        if precision not in ("fp64", "fp32"):
            raise ValueError(f"precision is {precision!r}, expected 'fp64' or 'fp32'")
        self.precision = precision
        self.dtype = np.float64 if precision == "fp64" else np.float32
        super().__init__(bundle, **options)
        self.graph = ScoreGraph.of(bundle, self.preprocess).to(getattr(torch, self.dtype.__name__))

    def _energy(self, x, k, energy):
        u = torch.from_numpy(x)
        if self.preprocess:
            u, _ = self.graph.preprocessing(u)
        network, k = self.graph.network, _level_tensor(k, len(x))
        # Only an energy network has an energy that is cheaper than energy and score.
        energy[:] = network(u, k) if network.kind == "energy" else network.energy_and_score(u, k)[0]

    def _energy_and_score(self, x, k, energy, score):
        energy[:], score[:] = self.graph(torch.from_numpy(x), _level_tensor(k, len(x)))

    def _energies(self, x, energies):
        for k in range(self.n_levels):
            self._energy(x, k, energies[:, k])


def _level_tensor(k: int | np.ndarray, n: int) -> Tensor:
    return torch.full((n,), k) if isinstance(k, int) else torch.from_numpy(k).long()
