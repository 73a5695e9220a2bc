"""The threshold as an order statistic of background energies, with a guarantee on the true rate.

With t the r-th largest of n background energies and flag = energy > t, the true background rate is at most
Beta(r, n + 1 - r) distributed, whatever the distribution of the energies (Wilks 1941).
"""

from __future__ import annotations

import math
import warnings

import numpy as np

from ebm.bundle import Threshold
from ebm.events import DataError


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


def calibrate(energies: np.ndarray, rate: float = 1e-4, confidence: float = 0.95, level: int = 0) -> Threshold:
    """The threshold for background `energies` (n,) at noise level `level`; flag = energy > threshold, strictly.

    It is stored as a float32 value, rounded up, so that float32 and float64 energies give the same flags.
    Among equal energies fewer are flagged than the rank says, never more. With too few events for the
    guarantee it is the largest energy, `guaranteed` is False and a warning says how many are needed.
    Raises DataError on no events or an energy that is not finite.
    """
    from scipy.stats import beta

    energies = np.asarray(energies)
    if energies.ndim != 1 or len(energies) == 0:
        raise DataError(f"a threshold needs background energies of shape (n,) with n > 0, given {energies.shape}")
    if not np.isfinite(energies).all():
        raise DataError(f"{np.count_nonzero(~np.isfinite(energies))} of {len(energies)} background energies "
                        "are not finite")
    n = len(energies)
    rank = largest_rank(n, rate, confidence)
    guaranteed = rank > 0
    rank = max(rank, 1)
    upper_bound = float(beta.ppf(confidence, rank, n + 1 - rank))
    if not guaranteed:
        warnings.warn(f"{n} background events cannot guarantee a rate of {rate:g} at {confidence:.0%} confidence: "
                      f"{events_needed(rate, confidence)} are needed; the threshold is their largest energy, which "
                      f"guarantees {upper_bound:.2g}", stacklevel=2)
    energy = np.partition(energies, n - rank)[n - rank]
    stored = np.float32(energy)
    if stored < energy:
        stored = np.nextafter(stored, np.float32(np.inf))
    return Threshold(float(stored), rate, confidence, rank, n, upper_bound, guaranteed, level)


def _confidence(rate: float, n: int) -> float:
    return -math.expm1(n * math.log1p(-rate))


def _check(rate: float, confidence: float) -> None:
    if not 0 < rate < 1 or not 0 < confidence < 1:
        raise ValueError(f"rate and confidence must lie between 0 and 1, given {rate} and {confidence}")
