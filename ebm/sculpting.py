"""Does a cut on the score shape a mass? A peak that the cut carves into background is no discovery."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ebm.efficiency import Sample
from ebm.events import Schema

SHARES = (0.1, 0.01, 0.001)
RESONANCES = ("m_jj", "mjj", "DER_mass_MMC", "DER_mass_vis")
FEWEST = 10  # events that pass: fewer have no shape


def resonance(schema: Schema, name: str | None = None) -> str | None:
    """The feature that is looked at: `name`, else the first invariant mass known, None where there is none.

    Raises ValueError where `name` is no feature.
    """
    if name is not None and name not in schema.features:
        raise ValueError(f"{name!r} is no feature of {schema.name}, expected one of {', '.join(schema.features)}")
    return name or next((f for f in RESONANCES if f in schema.features), None)


def sculpting(variable: np.ndarray, scores: np.ndarray, shares: Sequence[float] = SHARES, cut: float | None = None,
              bins: int = 40, draws: int = 1000, seed: int = 0) -> list[dict]:
    """How far a variable (n,) of background that passes the cut differs from that of background that does not.

    For the cuts that keep each of `shares` of the background, and for `cut` itself: Jensen-Shannon `distance` (base 2:
    0 for the same shape, 1 for none in common) between the two in `bins` bins with equally many background events, as
    ATL-PHYS-PUB-2018-014 does. A few events never have the shape of many, so beside it: the `median` and the 95%
    quantile `limit` of random choices of as many events, and the `p_value` of the distance among them. NaN where fewer
    than 10 events pass or fail. Events in which the variable is NaN are left out, and no weights are used.

    Raises ValueError on arrays of different shape, a NaN score, or a variable with fewer than two values.
    """
    variable, scores = np.asarray(variable, np.float64), np.asarray(scores)
    if variable.ndim != 1 or variable.shape != scores.shape:
        raise ValueError(f"expected a variable and scores of one shape (n,), given {variable.shape} and {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN")
    known = ~np.isnan(variable)
    variable, scores = variable[known], scores[known]
    edges = np.unique(np.quantile(variable, np.linspace(0, 1, bins + 1))) if len(variable) else []
    if len(edges) < 2:
        raise ValueError(f"the variable has fewer than two values in {len(variable)} events: it has no shape")
    bin_of = np.searchsorted(edges[1:-1], variable, "right")
    everything = np.bincount(bin_of, minlength=len(edges) - 1)
    sample = Sample(scores, np.ones(len(scores)))
    rng = np.random.default_rng(seed)
    result = []
    for at in [*(sample.cut(share) for share in shares), *([] if cut is None else [cut])]:
        passing = np.bincount(bin_of[scores > at], minlength=len(everything))
        n = int(passing.sum())
        entry = {"cut": float(at), "share": n / len(scores), "n": n} | dict.fromkeys(
            ("distance", "median", "limit", "p_value"), float("nan"))
        if min(n, len(scores) - n) >= FEWEST:
            distance = jensen_shannon(passing, everything - passing)
            chance = rng.multivariate_hypergeometric(everything, n, draws, method="marginals")
            by_chance = jensen_shannon(chance, everything - chance)
            entry |= {"distance": float(distance), "median": float(np.median(by_chance)),
                      "limit": float(np.quantile(by_chance, 0.95)),
                      "p_value": float((1 + np.count_nonzero(by_chance >= distance)) / (1 + draws))}
        result.append(entry)
    return result


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon distance (...,) of histograms (..., bins), base 2: 0 to 1."""
    from scipy.spatial.distance import jensenshannon

    return np.nan_to_num(jensenshannon(p, q, base=2, axis=-1))  # rounding can take the root of -1e-17
