"""The model that is being served: one Scorer, warmed up; replaced as a whole."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np

from ebm.events import DataError
from kernels import load_scorer

_OBJECT = re.compile(r"(.+)_(?:E|px|py|pz|pt|eta|phi|mass|btag)")


class Served:
    """A Scorer and what the service says of it; `version` is the digest of the model, `threshold` an energy."""

    def __init__(self, path: Path, backend: str = "auto", threads: int | None = None, largest: int = 1024):
        """Load and warm up, for batches of up to `largest` events.

        Raises DataError where the model is damaged, has no threshold or gives no scores, RuntimeError where the
        backend cannot run, TypeError where it has no threads to set.
        """
        scorer = load_scorer(path, backend, **({} if threads is None else {"threads": threads}))
        if scorer.threshold is None:
            raise DataError(f"{path} has no threshold, so nothing can be flagged: train it on more background events")
        if not scorer.gives_score:
            raise DataError(f"{path} gives energies only, so nothing can be explained: export it with its score")
        if hasattr(scorer, "deterministic"):  # the same bits whichever events share a kernel call, or come from a cache
            scorer.deterministic = True
        self.path, self.scorer, self.bundle = path, scorer, scorer.bundle
        self.version, self.threshold, self.features = self.bundle.digest, scorer.threshold, scorer.features
        self._scorer = copy.copy(scorer)
        self._scorer.on_nonfinite = "propagate"
        events = np.repeat(self._typical_event(), largest, axis=0)
        for n in (1, 2, 8, 64, 512, largest):
            self.energies(events[:n])
        self.explain(events[:1])

    def energies(self, x: np.ndarray) -> np.ndarray:
        """(n, D) float32 -> (n,) float32, not finite for an event that cannot be scored."""
        return self._scorer.energy(x)

    def why_not_finite(self, x: np.ndarray) -> str:
        """What is wrong with events (n, D) that have an energy which is not finite: the first row and its feature."""
        try:
            self.scorer.energy(x)
        except ValueError as e:
            return str(e)
        raise RuntimeError("an event had no finite energy, and now has one")

    def explain(self, x: np.ndarray) -> tuple[float, dict[str, float], dict[str, float]]:
        """One event (1, D) -> energy, dE/du by feature, and its norm over the components of each object.

        dE/du is the change of energy per unit of background spread: positive where raising the feature makes the
        event more anomalous, 0 for a missing one. ValueError where the event cannot be scored.
        """
        slope = self.scorer.attribution(x)[0].astype(np.float64)
        squares: dict[str, float] = {}
        for name, value in zip(self.features, slope, strict=True):
            if match := _OBJECT.fullmatch(name):
                squares[match[1]] = squares.get(match[1], 0.0) + value**2
        by_object = {name: float(np.sqrt(value)) for name, value in squares.items()}
        return float(self.scorer.energy(x)[0]), dict(zip(self.features, slope.tolist(), strict=True)), by_object

    def describe(self) -> dict[str, object]:
        """What GET /api/v1/model answers."""
        threshold = self.bundle.threshold
        return {"model": self.path.name, "version": self.version, "n_features": len(self.features),
                "feature_names": list(self.features), "threshold": self.threshold, "rate": threshold.rate,
                "backend": self.scorer.name, "device": self.scorer.device, "precision": self.scorer.precision}

    def _typical_event(self) -> np.ndarray:
        p = self.bundle.preprocessing
        return np.where(np.isfinite(p.impute), p.impute, 0).astype(np.float32)[None]
