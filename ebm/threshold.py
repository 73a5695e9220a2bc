"""The threshold as an order statistic of background energies, with a guarantee on the true rate.

With t the r-th largest of n background energies and flag = energy > t, the true background rate is at most
Beta(r, n + 1 - r) distributed, whatever the distribution of the energies (Wilks 1941).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ebm.events import DataError, Events

CROSSINGS = 40e6  # Hz: bunch crossings of the LHC


@dataclass(frozen=True)
class Threshold:
    """flag = energy > `energy`, strictly, at noise level `level`.

    `energy` is the `rank`-th largest of `n_background` background energies. The true background rate is at
    most `upper_bound` with the given confidence; `guaranteed` says whether that is within `rate`. Of weighted
    events the bound is an estimate, never guaranteed: they count as `rank_eff` of `n_eff` unweighted ones.
    """

    energy: float
    rate: float
    confidence: float
    rank: int
    n_background: int
    upper_bound: float
    guaranteed: bool
    level: int
    rank_eff: float | None = None
    n_eff: float | None = None

    @property
    def expected_rate(self) -> float:
        """Mean of the Beta law: the background rate to expect, where `upper_bound` is the one to plan for."""
        return self.rank / (self.n_background + 1) if self.n_eff is None else self.rank_eff / (self.n_eff + 1)


@dataclass(frozen=True)
class ClassThresholds:
    """A threshold for each class of events: class c has lowest[c] <= `feature` < lowest[c + 1], the ends are open.

    Every class has the guarantee of its own threshold; all C hold at once with confidence 1 - C (1 - confidence).
    """

    feature: str
    lowest: tuple[float, ...]
    thresholds: tuple[Threshold, ...]

    def __post_init__(self) -> None:
        if not len(self.lowest) == len(self.thresholds) > 0 or (np.diff(self.lowest) <= 0).any():
            raise DataError(f"class thresholds: expected one threshold for each of some ascending values of "
                            f"{self.feature}, given {len(self.thresholds)} for {list(self.lowest)}")

    def classes(self, events: Events) -> np.ndarray:
        """The class (n,) of each event; DataError where the feature is missing."""
        return _class_of(events.x[:, events.schema.features.index(self.feature)], self.lowest, self.feature)

    def flag(self, events: Events, energy: np.ndarray) -> np.ndarray:
        """(n,) bool: `energy` (n,) above the threshold of each event's class, strictly."""
        return energy > np.array([t.energy for t in self.thresholds], np.float32)[self.classes(events)]


def events_needed(rate: float = 1e-4, confidence: float = 0.95) -> int:
    """The fewest background events that can guarantee the rate: 1 - (1 - rate)^n >= confidence."""
    _check(rate, confidence)
    n = math.ceil(math.log1p(-confidence) / math.log1p(-rate))
    # The quotient can fall on either side of a whole number.
    while _confidence(rate, n - 1) >= confidence:
        n -= 1
    while _confidence(rate, n) < confidence:
        n += 1
    return n


def largest_rank(n: int, rate: float = 1e-4, confidence: float = 0.95) -> int:
    """The largest r with P(Beta(r, n + 1 - r) <= rate) >= confidence; 0 where n is too small for any."""
    from scipy.stats import beta

    _check(rate, confidence)
    if n < events_needed(rate, confidence):
        return 0
    low, high = 1, n + 1  # the probability falls with r; it suffices at low, not at high
    while high - low > 1:
        r = (low + high) // 2
        if beta.cdf(rate, r, n + 1 - r) >= confidence:
            low = r
        else:
            high = r
    return low


def calibrate(energies: np.ndarray, rate: float = 1e-4, confidence: float = 0.95,
              weights: np.ndarray | None = None, *, level: int = 0) -> Threshold:
    """The threshold for background `energies` (n,) at noise level `level`; flag = energy > threshold, strictly.

    It is stored as a float32 value, rounded up, so that float32 and float64 energies give the same flags.
    Among equal energies fewer are flagged than the rank says, never more. With too few events for the
    guarantee it is the largest energy, `guaranteed` is False and a warning says how many are needed.

    The guarantee asks for events that count alike. With `weights` (n,) that differ there is none, and the bound is an
    estimate: of a tail with sum of weights W and of squares V, events count V / W each, as long as that is no less
    than for all events (Bohm and Zech, NIM A 748, 1, 2014; exact for equal weights). In simulations it holds where
    weights do not rise with the energy, and where they do falls short (0.88 for a weight e^(0.3 E) of energies that
    fall as e^-E): the heavy events of the tail have then not been seen. Negative weights keep their sign in W, which
    counts as rising throughout, since the rate does.

    Raises DataError on no events, an energy or a weight that is not finite, or weights without a positive sum.
    """
    from scipy.stats import beta

    energies = np.asarray(energies)
    if energies.ndim != 1 or len(energies) == 0:
        raise DataError(f"a threshold needs background energies of shape (n,) with n > 0, given {energies.shape}")
    if not np.isfinite(energies).all():
        raise DataError(f"{np.count_nonzero(~np.isfinite(energies))} of {len(energies)} background energies "
                        "are not finite")
    n = len(energies)
    if weights is not None and np.ptp(weights := _checked_weights(weights, n)) > 0:
        return _calibrate_weighted(energies, weights, rate, confidence, level)
    rank = largest_rank(n, rate, confidence)
    guaranteed = rank > 0
    rank = max(rank, 1)
    upper_bound = float(beta.ppf(confidence, rank, n + 1 - rank))
    if not guaranteed:
        warnings.warn(f"{n} background events cannot guarantee a rate of {rate:g} at {confidence:.0%} confidence: "
                      f"{events_needed(rate, confidence)} are needed; the threshold is their largest energy, which "
                      f"guarantees {upper_bound:.2g}", stacklevel=2)
    energy = np.partition(energies, n - rank)[n - rank]
    return Threshold(_round_up(energy), rate, confidence, rank, n, upper_bound, guaranteed, level)


def calibrate_by(feature: str, values: np.ndarray, energies: np.ndarray, rate: float = 1e-4, confidence: float = 0.95,
                 level: int = 0, *, weights: np.ndarray | None = None) -> ClassThresholds:
    """A threshold for each value of a multiplicity, given as `values` (n,) beside background `energies` (n,).

    Neighbouring values are joined until a class has the events that the guarantee needs; what is left above joins
    the last class. Raises as `calibrate` does, and DataError where a value is missing.
    """
    values, energies = np.asarray(values, np.float64), np.asarray(energies)
    if values.shape != energies.shape or values.ndim != 1 or len(values) == 0:
        raise DataError(f"expected one value of {feature} per energy (n,), n > 0, given shapes {values.shape} and "
                        f"{energies.shape}")
    distinct, counts = np.unique(values, return_counts=True)
    needed, left, joined, lowest = events_needed(rate, confidence), len(values), 0, []
    for value, count in zip(distinct.tolist(), counts.tolist()):
        if not lowest or (joined >= needed and left >= needed):
            lowest.append(value)
            joined = 0
        joined += count
        left -= count
    number = _class_of(values, lowest, feature)
    parts = [number == c for c in range(len(lowest))]
    return ClassThresholds(feature, tuple(lowest), tuple(
        calibrate(energies[rows], rate, confidence, None if weights is None else weights[rows], level=level)
        for rows in parts))


def trigger_rate(threshold: Threshold, input_rate: float = CROSSINGS, prescale: int = 1) -> tuple[float, float]:
    """Background flags in Hz that are kept of `input_rate` Hz, one in `prescale`: to expect, and at most with the
    threshold's confidence."""
    if not (input_rate > 0 and math.isfinite(input_rate)) or prescale < 1 or prescale != int(prescale):
        raise ValueError(f"expected an input rate above 0 Hz and a prescale of 1, 2, ..., given {input_rate} and "
                         f"{prescale}")
    return threshold.expected_rate * input_rate / prescale, threshold.upper_bound * input_rate / prescale


def prescale_for(threshold: Threshold, budget: float, input_rate: float = CROSSINGS) -> int:
    """The smallest prescale that keeps background flags within `budget` Hz, with the threshold's confidence."""
    if not budget > 0:
        raise ValueError(f"the budget is {budget} Hz, expected more than 0")
    return max(1, math.ceil(trigger_rate(threshold, input_rate)[1] / budget))


def _calibrate_weighted(energies: np.ndarray, weights: np.ndarray, rate: float, confidence: float,
                        level: int) -> Threshold:
    from scipy.stats import beta

    _check(rate, confidence)
    # From the top, among equal energies the heavy ones first: no order of the input matters. Zero says nothing.
    order = np.lexsort((-weights, -energies))
    order = order[weights[order] != 0]
    w = weights[order]
    tail = np.maximum.accumulate(np.cumsum(w))
    # A short tail may lack its heavy events: its mean weight counts for no less than that of all events.
    scale = np.maximum(np.cumsum(w**2) / np.maximum(tail, np.finfo(float).tiny), (w**2).sum() / w.sum())
    rank_eff, n_eff = tail / scale, w.sum() / scale
    known = tail > 0
    suffices = beta.cdf(rate, rank_eff, n_eff + 1 - rank_eff) >= confidence
    prefix = np.logical_and.accumulate(suffices | ~known)
    chosen = np.flatnonzero(prefix & known)
    i = chosen[-1] if len(chosen) else 0
    bound = float(beta.ppf(confidence, rank_eff[i], n_eff[i] + 1 - rank_eff[i])) if known[i] else math.nan
    upper_bound = 1.0 if math.isnan(bound) else bound
    effect = f"{len(energies)} weighted background events, which count as {n_eff[i]:.0f} where the threshold is,"
    warnings.warn(f"{effect} guarantee no rate: the bound {upper_bound:.2g} is an estimate" if len(chosen) else
                  f"{effect} cannot show a rate of {rate:g} at {confidence:.0%} confidence: "
                  f"{events_needed(rate, confidence)} are needed; the threshold is their largest energy, with an "
                  f"estimated bound of {upper_bound:.2g}", stacklevel=3)
    return Threshold(_round_up(energies[order[i]]), rate, confidence, int(i) + 1, len(energies), upper_bound, False,
                     level, float(rank_eff[i]), float(n_eff[i]))


def _class_of(values: np.ndarray, lowest: Sequence[float], feature: str) -> np.ndarray:
    if missing := np.count_nonzero(np.isnan(values)):
        raise DataError(f"{feature} is missing in {missing} of {len(values)} events: they belong to no class")
    return np.searchsorted(lowest[1:], values, "right")


def _checked_weights(weights: np.ndarray, n: int) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    if weights.shape != (n,):
        raise DataError(f"expected one weight for each of {n} background energies, given shape {weights.shape}")
    if not np.isfinite(weights).all() or not weights.sum() > 0:
        raise DataError(f"the weights of {n} background events sum to {weights.sum():g}, expected finite weights with "
                        "a positive sum")
    return weights


def _round_up(energy: np.floating) -> float:
    stored = np.float32(energy)
    return float(np.nextafter(stored, np.float32(np.inf)) if stored < energy else stored)


def _confidence(rate: float, n: int) -> float:
    return -math.expm1(n * math.log1p(-rate))


def _check(rate: float, confidence: float) -> None:
    if not 0 < rate < 1 or not 0 < confidence < 1:
        raise ValueError(f"rate and confidence must lie between 0 and 1, given {rate} and {confidence}")
