"""Cuts at a background rejection, and efficiencies with the uncertainty of the efficiency and of the cut."""

from __future__ import annotations

import numpy as np

REJECTION = 0.9999
REJECTIONS = (0.99, 0.999, REJECTION)
_NAN = float("nan")


class Sample:
    """Scores of one class, sorted from the top, and their weights: what lies above a cut."""

    def __init__(self, scores: np.ndarray, weights: np.ndarray):
        order = np.argsort(-scores, kind="stable")
        self.scores, self.weights = scores[order], weights[order]
        self.above = np.concatenate([[0.0], np.cumsum(self.weights)])
        self.total = float(self.above[-1])
        self.n_eff = effective(weights)

    def number(self, cut: float | np.ndarray, side: str = "right") -> np.ndarray:
        """How many events have a score > cut; with side "left", >= cut."""
        return len(self.scores) - np.searchsorted(self.scores[::-1], cut, side)

    def share(self, cut: float | np.ndarray, side: str = "right") -> np.ndarray:
        """Share of the weight with a score > cut; with side "left", >= cut."""
        return self.above[self.number(cut, side)] / self.total

    def cut(self, share: float) -> float:
        """The lowest cut that keeps at most this share of the weight above it, and so does every higher one."""
        within = np.maximum.accumulate(self.above) <= share * self.total + 1e-9 * abs(self.weights).max()
        kept = int(np.count_nonzero(within)) - 1
        return float(self.scores[kept]) if kept < len(self.scores) else -np.inf


def effective(weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2: as many unweighted events have the same relative uncertainty."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def checked(y: np.ndarray, scores: np.ndarray,
            weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and weights (n,), 1 where there are none, as arrays.

    Raises ValueError unless all have that shape, both labels 0 and 1 are there, no score is NaN, and the weights are
    finite with a positive sum in each class.
    """
    y, scores = np.asarray(y), np.asarray(scores)
    if y.ndim != 1 or y.shape != scores.shape:
        raise ValueError(f"expected labels and scores of one shape (n,), given {y.shape} and {scores.shape}")
    if not set(np.unique(y)) == {0, 1}:
        raise ValueError(f"labels must be 0 (background) and 1 (signal), both present, given {np.unique(y)[:5]}")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN")
    if weights is None:
        return y, scores, np.ones(len(y))
    weights = np.asarray(weights, np.float64)
    if weights.shape != y.shape:
        raise ValueError(f"expected one weight for each of {len(y)} scores, given shape {weights.shape}")
    if not np.isfinite(weights).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(weights))} of {len(y)} weights are not finite")
    for name, sum_w in (("background", weights[y == 0].sum()), ("signal", weights[y == 1].sum())):
        if not sum_w > 0:
            raise ValueError(f"the weights of the {name} sum to {sum_w:g}, expected a positive sum")
    return y, scores, weights


def clopper_pearson(k: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Exact central interval of a binomial proportion with k successes of n; for effective numbers an estimate."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = 0.0 if k <= 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k >= n else float(beta.ppf(1 - tail, k + 1, n - k))
    return low, high


def cut_at_rejection(background: np.ndarray, rejection: float = REJECTION) -> float:
    """The lowest cut c such that `score > c` keeps at most the fraction 1 - rejection of the background.

    NaN where the sample is too small to resolve it: it takes 1 / (1 - rejection) events.
    """
    background = np.asarray(background)
    sample = Sample(background, np.ones(len(background)))
    return sample.cut(1 - rejection) if _resolves(sample, rejection) else _NAN


def signal_efficiency(signal: Sample, background: Sample, rejection: float, confidence: float = 0.95) -> dict:
    """The signal efficiency at a background rejection; NaN where the background cannot resolve it.

    `interval`           Clopper-Pearson: signal is a sample
    `interval_of_cut`    background is one too: between the cuts that may have the rejection, of whose ranks the
                         binomial law tells (the order-statistic interval of a quantile, whatever the distribution)
    `interval_with_cut`  both, each at (1 + confidence) / 2, so that together they hold with `confidence`
    With weights the numbers of events are effective ones, and the intervals estimates.
    """
    from scipy.stats import binom

    pair = (_NAN, _NAN)
    result = {"rejection": rejection, "cut": _NAN, "efficiency": _NAN, "n_background": 0, "interval": pair,
              "interval_of_cut": pair, "interval_with_cut": pair}
    if not _resolves(background, rejection):
        return result
    share, n = 1 - rejection, background.n_eff

    def at(cut: float, level: float) -> tuple[float, tuple[float, float]]:
        efficiency = float(np.clip(signal.share(cut), 0, 1))
        return efficiency, clopper_pearson(efficiency * signal.n_eff, signal.n_eff, level)

    def ends(level: float) -> tuple[float, float]:
        """The highest and the lowest cut that may have the rejection."""
        few, many = binom.ppf([(1 - level) / 2, (1 + level) / 2], round(n), share)
        return background.cut((few - 1) / n) if few >= 1 else np.inf, background.cut(many / n)

    cut, both = background.cut(share), (1 + confidence) / 2
    efficiency, interval = at(cut, confidence)
    high, low = ends(confidence)
    high_both, low_both = ends(both)
    return result | {
        "cut": cut, "efficiency": efficiency, "n_background": int(background.number(cut)), "interval": interval,
        "interval_of_cut": (at(high, both)[0], at(low, both)[0]),
        "interval_with_cut": (at(high_both, both)[1][0], at(low_both, both)[1][1]),
    }


def _resolves(background: Sample, rejection: float) -> bool:
    return background.n_eff * (1 - rejection) >= 1 - 1e-9
