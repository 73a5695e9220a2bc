"""Events and an energy whose pulls are known: independent Gaussians."""

import numpy as np
import torch
from torch import nn

SIGMAS = (0.5,)


class Gaussian(nn.Module):
    """The energy of independent unit Gaussians seen through noise; `turn` permutes its score to a false one."""

    kind, n_sigmas, default_level = "energy", 1, 0

    def __init__(self, input_dim, turn=0):
        super().__init__()
        self.input_dim, self.turn = input_dim, turn
        self.variance = nn.Parameter(torch.tensor(1 + SIGMAS[0] ** 2, dtype=torch.float64))

    def forward(self, x, sigma_idx=None):
        return x.square().sum(1) / (2 * self.variance)

    def energy_and_score(self, x, sigma_idx=None):
        return self(x), torch.roll(-x / self.variance, self.turn, dims=1)


def sample(n=400, d=24, outliers=40, seed=0):
    """Unit Gaussians; the last events are anomalous in three features."""
    u = np.random.default_rng(seed).normal(size=(n, d))
    u[-outliers:, :3] += 2.5
    return u, np.repeat([0, 1], [n - outliers, outliers])


def rms(values):
    return np.sqrt(np.mean(values**2, axis=0))
