"""The truth: every kind of model in PyTorch, in float64 unless asked otherwise."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from ebm.bundle import Bundle
from ebm.networks import from_bundle
from ebm.preprocess import ASINH, LOG1P, Preprocessing
from kernels.scorer import Scorer


class PreprocessingGraph(nn.Module):
    """`ebm.preprocess` as torch operations: raw x (n, D) -> u and du/dx, both (n, D)."""

    def __init__(self, preprocessing: Preprocessing):
        super().__init__()
        for name in ("marker", "impute", "scale", "mean", "inv_std"):
            self.register_buffer(name, torch.from_numpy(getattr(preprocessing, name).copy()))
        self.register_buffer("log1p", torch.from_numpy(preprocessing.transform == LOG1P))
        self.register_buffer("asinh", torch.from_numpy(preprocessing.transform == ASINH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        missing = torch.isnan(x) | (x == self.marker)
        x = torch.where(missing, self.impute, x)
        size, ratio = x.abs(), x / self.scale
        t = torch.where(self.log1p, x.sign() * size.log1p(), torch.where(self.asinh, ratio.asinh(), x))
        slope = torch.where(self.asinh, torch.hypot(x, self.scale).reciprocal(), torch.ones_like(x))
        slope = torch.where(self.log1p, (1 + size).reciprocal(), slope)
        slope = torch.where(missing, torch.zeros_like(x), slope * self.inv_std)
        return (t - self.mean) * self.inv_std, slope


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
        super().__init__(bundle, **options)
        if precision not in ("fp64", "fp32"):
            raise ValueError(f"precision is {precision!r}, expected 'fp64' or 'fp32'")
        self.precision = precision
        self.dtype = np.float64 if precision == "fp64" else np.float32
        graph = ScoreGraph.of(bundle, self.preprocess)
        self.graph = copy.deepcopy(graph).to(torch.float64 if precision == "fp64" else torch.float32)

    def _energy(self, x, k, energy):
        u = torch.from_numpy(x)
        if self.preprocess:
            u, _ = self.graph.preprocessing(u)
        network = self.graph.network
        # Only an energy network has an energy that is cheaper than energy and score.
        only_energy = network if self.bundle.architecture.kind == "energy" else None
        k = _level_tensor(k, len(x))
        energy[:] = only_energy(u, k) if only_energy else network.energy_and_score(u, k)[0]

    def _energy_and_score(self, x, k, energy, score):
        energy[:], score[:] = self.graph(torch.from_numpy(x), _level_tensor(k, len(x)))

    def _energies(self, x, energies):
        for k in range(self.n_levels):
            self._energy(x, k, energies[:, k])


def _level_tensor(k: int | np.ndarray, n: int) -> Tensor:
    return torch.full((n,), k) if isinstance(k, int) else torch.from_numpy(k).long()
