"""Random numbers that belong to an event: event i draws the same ones whichever events are generated with it."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import gammaincinv, ndtri


class Draws:
    """Numbers for the n events from `start` on, of the stream of a seed and a process.

    Every call has its own sequence of the counter-based Philox generator (Salmon et al., SC 2011), in which each event
    owns the same number of places: its numbers depend on the seed, the process, the call and its own index alone.
    Shapes start with n.
    """

    def __init__(self, seed: int, process: int, start: int, n: int) -> None:
        self.key, self.start, self.n = (seed, process), start, n
        self.calls = 0

    def random(self, shape: int | tuple[int, ...]) -> np.ndarray:
        """Uniform on (0, 1)."""
        shape = (shape,) if isinstance(shape, int) else shape
        taken = math.prod(shape[1:])
        places = -(-taken // 4) * 4  # Philox gives four at a time
        counter = [self.start * places // 4, 0, self.calls, 0]
        self.calls += 1
        u = np.random.Generator(np.random.Philox(key=self.key, counter=counter)).random((self.n, places))
        return np.maximum(u[:, :taken].reshape(shape), 2.0**-54)

    def uniform(self, low: np.ndarray | float, high: np.ndarray | float, shape: int | tuple[int, ...]) -> np.ndarray:
        return low + (high - low) * self.random(shape)

    def normal(self, mean: float, sigma: float, shape: int | tuple[int, ...]) -> np.ndarray:
        return mean + sigma * ndtri(self.random(shape))

    def cauchy(self, shape: int | tuple[int, ...]) -> np.ndarray:
        return np.tan(np.pi * (self.random(shape) - 0.5))

    def gamma(self, a: float, scale: float, shape: int | tuple[int, ...]) -> np.ndarray:
        return scale * gammaincinv(a, self.random(shape))

    def poisson(self, mean: np.ndarray, most: int) -> np.ndarray:
        """(n,) counts of these means (n,), cut at `most`."""
        u, term, count = self.random(self.n), np.exp(-mean), np.zeros(self.n, int)
        cumulative = term.copy()
        for i in range(1, most + 1):
            count += u > cumulative
            term *= mean / i
            cumulative += term
        return count

    def isotropic(self, shape: tuple[int, ...]) -> np.ndarray:
        """Unit vectors, on a new last axis."""
        cos, phi = self.uniform(-1, 1, shape), self.uniform(-np.pi, np.pi, shape)
        sin = np.sqrt(1 - cos**2)
        return np.stack([sin * np.cos(phi), sin * np.sin(phi), cos], axis=-1)
