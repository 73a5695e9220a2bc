"""The one noun: a Scorer takes raw events and gives energies and scores.

This class does what every backend shares: it checks and converts the arguments, finds what is not finite,
and gives back the kind of array that came in. A backend implements the three methods at the end.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ebm.bundle import Bundle

Array = Any  # numpy.ndarray, or torch.Tensor where a torch.Tensor came in


class Scorer:
    """Energies and scores of raw events x (n, D), in the units of the model's schema.

    NumPy in, NumPy out; torch in, torch out on the same device (without an autograd graph). C-contiguous
    float32 is taken as it is, other layouts and real dtypes are converted. The noise level k is None (the
    model's default), an int, or (n,) ints. Results go into `out` where it is given: C-contiguous arrays
    of the shapes and dtype of the result.

    Raises ValueError on a wrong width, rank, dtype or noise level, and, unless `on_nonfinite` is
    "propagate", on an event with Inf or with NaN in a feature that has no imputation.
    """

    name: str
    device: str = "cpu"
    precision: str = "fp32"
    gives_score: bool = True
    dtype: type[np.floating] = np.float32

    def __init__(self, bundle: Bundle, *, preprocess: bool = True, on_nonfinite: str = "raise"):
        if on_nonfinite not in ("raise", "propagate"):
            raise ValueError(f"on_nonfinite is {on_nonfinite!r}, expected 'raise' or 'propagate'")
        self.bundle = bundle
        self._dtype = np.dtype(self.dtype)  # one object per dtype: compared by identity, in a tenth of the time
        self.preprocess = preprocess
        self.on_nonfinite = on_nonfinite
        self.features = bundle.schema.features
        self.n_features = bundle.schema.n_features
        self.n_levels = bundle.n_levels
        self.default_level = bundle.default_level
        self.threshold = bundle.threshold.energy if bundle.threshold else None
        self.chosen_because = "named by the caller"

    def __repr__(self) -> str:
        return f"<{self.name} scorer ({self.precision}) on {self.device}: {self.chosen_because}>"

    def energy(self, x: Array, k: Array = None, *, out: Array = None) -> Array:
        """Energy (n,) of events (n, D): the anomaly score, high for unusual events."""
        events, k, like = self._prepare(x, k)
        energy = self._result(out, (len(events),), "out")
        if len(events) and not self._energy(events, k, energy):
            self._check_finite(events, energy)
        return energy if like is None else _as(energy, like, out)

    def energy_and_score(self, x: Array, k: Array = None, *, out: tuple = (None, None)) -> tuple[Array, Array]:
        """Energy (n,) and score -dE/dx (n, D), which points towards more normal events."""
        events, k, like = self._prepare(x, k)
        energy = self._result(out[0], (len(events),), "out[0]")
        score = self._result(out[1], events.shape, "out[1]")
        if len(events) and not self._energy_and_score(events, k, energy, score):
            self._check_finite(events, energy)
        return (energy, score) if like is None else (_as(energy, like, out[0]), _as(score, like, out[1]))

    def energies(self, x: Array, *, out: Array = None) -> Array:
        """Energy (n, L) at every noise level. Levels carry free constants: standardise before comparing."""
        events, _, like = self._prepare(x, None)
        energies = self._result(out, (len(events), self.n_levels), "out")
        if len(events) and not self._energies(events, energies):
            self._check_finite(events, energies)
        return energies if like is None else _as(energies, like, out)

    def attribution(self, x: Array, k: Array = None) -> Array:
        """dE/du (n, D): change of energy per unit of background spread of each feature.

        Positive: raising the feature makes the event more anomalous. 0 for an imputed or constant feature.
        """
        _, score = self.energy_and_score(x, k)
        if not self.preprocess:
            return -score
        events = _to_numpy(x, np.float64)
        slope = self.bundle.preprocessing.derivative(events)
        known = slope != 0
        dE_du = np.where(known, -_to_numpy(score, np.float64) / np.where(known, slope, 1), 0.0)
        return _as(dE_du.astype(self.dtype), x, None) if _is_torch(x) else dE_du.astype(self.dtype)

    def flag(self, x: Array) -> Array:
        """(n,) bool: energy at the default level above the calibrated threshold, strictly."""
        if self.threshold is None:
            raise ValueError("this model has no threshold: calibrate it first")
        return self.energy(x) > self.threshold

    def _prepare(self, x: Array, k: Array) -> tuple[np.ndarray, int | np.ndarray, Array]:
        like = None
        if type(x) is not np.ndarray or x.dtype is not self._dtype or not x.flags.c_contiguous:
            like = x if _is_torch(x) else None
            x = _to_numpy(x, self.dtype)
        if x.ndim != 2 or x.shape[1] != self.n_features:
            raise ValueError(f"expected events of shape (n, {self.n_features}), given {x.shape}")
        return x, self._levels(k, len(x)), like

    def _levels(self, k: Array, n: int) -> int | np.ndarray:
        if k is None:
            return self.default_level
        a = np.asarray(k.cpu() if _is_torch(k) else k)
        if a.dtype.kind not in "iu":
            raise ValueError(f"noise level k is {a.dtype}, expected whole numbers from 0 to {self.n_levels - 1}")
        if a.ndim and a.shape != (n,):
            raise ValueError(f"noise levels k have shape {a.shape}, expected one number or shape ({n},)")
        if a.size and (a.min() < 0 or a.max() >= self.n_levels):
            bad = a.min() if a.min() < 0 else a.max()
            raise ValueError(f"noise level k = {bad} is out of range, expected 0 to {self.n_levels - 1}")
        return np.ascontiguousarray(a, np.int32) if a.ndim else int(a)

    def _result(self, out: Array, shape: tuple[int, ...], name: str) -> np.ndarray:
        if out is None:
            return np.empty(shape, self.dtype)
        a = out if type(out) is np.ndarray or not _is_torch(out) else out.numpy()
        if not isinstance(a, np.ndarray) or a.shape != shape or a.dtype is not self._dtype or not a.flags.carray:
            given = f"{a.dtype}{list(a.shape)}" if isinstance(a, np.ndarray) else type(a).__name__
            raise ValueError(f"{name} must be a writable, C-contiguous {np.dtype(self.dtype)}{list(shape)}, "
                             f"given {given}")
        return a

    def _check_finite(self, x: np.ndarray, energy: np.ndarray) -> None:
        """Every backend carries NaN and Inf of the input through to the energy, so one sum finds them."""
        if self.on_nonfinite == "propagate" or math.isfinite(np.add.reduce(energy, axis=None, dtype=np.float64)):
            return
        bad = np.flatnonzero(~np.isfinite(energy.reshape(len(x), -1)).all(1))
        if len(bad) == 0:
            return
        row = x[bad[0]].astype(np.float64)
        if self.preprocess:
            p = self.bundle.preprocessing
            row = np.where(p.missing(row[None])[0], p.impute, row)
        wrong = np.flatnonzero(~np.isfinite(row))
        where = f"event {bad[0]}" + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else "")
        if len(wrong) == 0:
            raise ValueError(f"{where}: finite features give an energy beyond {np.dtype(self.dtype)}")
        value = x[bad[0], wrong[0]]
        expected = "a finite number" if math.isinf(value) else "a number: this feature has no imputation"
        raise ValueError(f"{where}: feature {wrong[0]} ({self.features[wrong[0]]}) is {value}, expected {expected}")

    # What a backend implements: x is C-contiguous self.dtype of shape (n, D), n > 0; k is an int or int32 (n,);
    # results are written into the last arguments. True: it has seen that all energies are finite.

    def _energy(self, x: np.ndarray, k: int | np.ndarray, energy: np.ndarray) -> bool | None:
        raise NotImplementedError

    def _energy_and_score(self, x: np.ndarray, k: int | np.ndarray, energy: np.ndarray,
                          score: np.ndarray) -> bool | None:
        raise NotImplementedError

    def _energies(self, x: np.ndarray, energies: np.ndarray) -> bool | None:
        raise NotImplementedError


def _is_torch(x: Array) -> bool:
    return type(x).__module__.partition(".")[0] == "torch"


def _to_numpy(x: Array, dtype: type[np.floating]) -> np.ndarray:
    if _is_torch(x):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x
        x = x.numpy()
    try:
        a = np.asarray(x)
    except ValueError as e:  # rows of unequal length
        raise ValueError(f"expected events as one array of shape (n, D): {e}") from None
    if a.dtype.kind not in "fiu":
        raise ValueError(f"events are {a.dtype}, expected real numbers (float32 is the fast way in)")
    with np.errstate(over="ignore"):  # too large for float32 becomes Inf, which is then refused by name
        return np.ascontiguousarray(a, dtype)


def _as(result: np.ndarray, like: Array, out: Array) -> Array:
    """A tensor on the device of `like`, or `out`, which the result was written into."""
    if out is not None:
        return out
    import torch

    return torch.from_numpy(result).to(like.device)
