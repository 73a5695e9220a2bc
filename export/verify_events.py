"""The events of a proof, with their float64 answers: random, real, adversarial, and close to the threshold."""

from __future__ import annotations

from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

from ebm.bundle import Bundle
from ebm.preprocess import IDENTITY
from export.manifest import golden_events
from kernels import load_scorer
from kernels.tolerances import CHECK_EVENTS

NEAR = "near the threshold"
NEAR_THRESHOLD = (1e-4, 1e-3, 1e-2)  # distances to the threshold, in standard deviations of the energy
_LARGEST = 1e38


class Answer(NamedTuple):
    """Events x (n, D) float32, and their float64 energy (n,) and score (n, D)."""

    x: np.ndarray
    energy: np.ndarray
    score: np.ndarray


class Truth:
    """What the float64 reference says of a model at one noise level.

    `preprocess=False`: for Scorers that take preprocessed events. `real` (n, D) are raw events, or None, and
    `why_no_real` the reason.
    """

    def __init__(self, bundle: Bundle, level: int, preprocess: bool, real: np.ndarray | None, why_no_real: str | None):
        self.bundle, self.level, self.preprocess, self.why_no_real = bundle, level, preprocess, why_no_real
        t = bundle.threshold
        self.threshold = t.energy if t and t.level == level else None
        self.reference = load_scorer(bundle, "reference", preprocess=preprocess, on_nonfinite="propagate")
        self.ordinary = {"random": golden_events(bundle, preprocess, CHECK_EVENTS)}
        if real is not None:
            self.ordinary["real"] = real if preprocess else \
                bundle.preprocessing(real.astype(np.float64)).astype(np.float32)
        self.answer = cache(self._answer)

    def _answer(self, name: str) -> Answer:
        if name == NEAR:
            return self.of(self.near_threshold)
        return self.of(self.ordinary[name] if name in self.ordinary else self.adversarial[name])

    def of(self, x: np.ndarray, k: int | np.ndarray | None = None) -> Answer:
        """The answer to events (n, D), at the level of this truth unless another is given."""
        return Answer(x, *self.reference.energy_and_score(x, self.level if k is None else k))

    @cached_property
    def spread(self) -> tuple[float, float]:
        """Standard deviation of the energy and RMS of the score over the random events: what ordinary is."""
        a = self.answer("random")
        return float(a.energy.std()), float(np.sqrt(np.mean(a.score**2)))

    @cached_property
    def centre(self) -> float:
        """Mean energy of the random events."""
        return float(self.answer("random").energy.mean())

    def width(self, x: np.ndarray) -> np.ndarray:
        """dx/du (n, D): how far one standard deviation is at x; 0 for a constant feature."""
        slope = self.bundle.preprocessing.derivative(x.astype(np.float64)) if self.preprocess else np.ones(x.shape)
        return np.divide(1, slope, out=np.zeros_like(slope), where=slope != 0)

    @cached_property
    def complete(self) -> np.ndarray:
        """The random events (n, D) with every missing value replaced by its imputation."""
        x, p = self.ordinary["random"], self.bundle.preprocessing
        return np.where(p.missing(x), p.impute, x) if self.preprocess else x

    @cached_property
    def adversarial(self) -> dict[str, np.ndarray]:
        """Kind -> events (n, D) that are finite or lack only what may be missing."""
        p, d, base = self.bundle.preprocessing, self.bundle.schema.n_features, self.complete[:16]
        wide = (p.transform != IDENTITY) if self.preprocess else np.zeros(d, bool)
        mean, std = (p.mean, np.divide(1, p.inv_std, out=np.ones(d, np.float32), where=p.inv_std > 0)) \
            if self.preprocess else (0, 1)

        def all_equal(*values: float) -> np.ndarray:
            return np.repeat(np.float32(values)[:, None], d, axis=1)

        def huge(of_wide: float | np.ndarray, of_others: float) -> np.ndarray:
            return np.where(wide, of_wide, mean + of_others * std).astype(np.float32)

        far = np.stack([sign * huge(a, u) for sign in (1, -1) for a, u in
                        ((1e4, 10), (1e18, 20), (1e25, 30), (_LARGEST * np.minimum(p.scale, 1), 30))])
        one_far = np.repeat(base[:1], d, axis=0)
        np.fill_diagonal(one_far, far[2])
        sets = {
            "zeros": all_equal(0.0, -0.0), "tiny": all_equal(1e-20, -1e-20, 1e-30, -1e-30),
            "denormal": all_equal(1e-40, -1e-40, 1e-45), "huge": far, "one huge": one_far,
            "one-hot": np.concatenate([np.eye(d, dtype=np.float32), np.diag(base[0])]),
            "repeated": np.concatenate([np.repeat(base[:1], 64, axis=0), all_equal(1.0, -1.0)]),
        }
        may_miss = np.flatnonzero(~np.isnan(p.impute)) if self.preprocess else []
        if len(may_miss):
            missing = np.repeat(base[:1], 2 * len(may_miss) + 2, axis=0)
            for value, rows in ((np.nan, missing[::2]), (p.marker, missing[1::2])):
                value = np.broadcast_to(value, d)
                for row, j in zip(rows, may_miss):
                    row[j] = value[j]
                rows[-1, may_miss] = value[may_miss]
            sets["missing"] = missing
        return sets

    @cached_property
    def damaged(self) -> np.ndarray:
        """Events (n, D) with Inf, -Inf, or NaN where no value may miss, in one feature each."""
        d = self.bundle.schema.n_features
        needed = np.isnan(self.bundle.preprocessing.impute) if self.preprocess else np.ones(d, bool)
        x = np.repeat(self.complete[:d], 3, axis=0).reshape(d, 3, d)
        x[np.arange(d), :, np.arange(d)] = np.inf, -np.inf, np.nan
        return np.concatenate([x[:, 0], x[:, 1], x[needed, 2]])

    @cached_property
    def near_threshold(self) -> np.ndarray | None:
        """Events (n, D) a little above and below the threshold; None where it is not of this level or out of reach.

        Each lies between an event below and an event above, where bisection found it.
        """
        if self.threshold is None:
            return None
        distance = np.outer(NEAR_THRESHOLD, (1, -1)).ravel() * self.spread[0]
        centre, low, high = self.complete.mean(0), None, None
        for stretch in (0.5, 1, 2, 4, 8, 16, 32):
            x = centre + np.float32(stretch) * (self.complete[:256] - centre)
            energy = self.of(x).energy
            below, above = x[energy < self.threshold + distance.min()], x[energy > self.threshold + distance.max()]
            low, high = (below if low is None and len(below) else low), (above if high is None and len(above) else high)
        if low is None or high is None:
            return None
        n = 8 * len(distance)
        low, high, target = np.resize(low, (n, x.shape[1])), np.resize(high, (n, x.shape[1])), \
            self.threshold + np.tile(distance, 8)
        for _ in range(40):
            middle = (low / 2 + high / 2).astype(np.float32)
            above = (self.reference.energy(middle, self.level) > target)[:, None]
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return low
