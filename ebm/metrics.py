"""How well an anomaly score separates signal from background, with the uncertainty of each figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ebm.efficiency import REJECTION, REJECTIONS, Sample, checked, signal_efficiency
from ebm.significance import sic_max

_BOOTSTRAP_CELLS = 4_000_000  # event counts held at once


def auroc(y: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Probability that a signal event (y = 1) scores above a background event; ties count half."""
    y, scores, w = checked(y, scores, weights)
    background, signal = Sample(scores[y == 0], w[y == 0]), scores[y == 1]
    not_below = (background.share(signal, "right") + background.share(signal, "left")) / 2
    return float(1 - w[y == 1] @ not_below / w[y == 1].sum())


def auprc(y: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Average precision. It depends on the share of signal in the sample, which is what chance gives."""
    from sklearn.metrics import average_precision_score

    y, scores, w = checked(y, scores, weights)
    ranks = np.unique(scores, return_inverse=True)[1]  # the same figure, of infinite scores too
    return float(average_precision_score(y, ranks, sample_weight=w))


def stratified_auroc(y: np.ndarray, scores: np.ndarray, strata: np.ndarray,
                     weights: np.ndarray | None = None) -> float:
    """Probability that a signal event scores above a background event of its own stratum; strata are (n,) values.

    The mean of the strata's AUROCs over their signal, the covariate-adjusted AUC (Janes and Pepe, Biometrika 96, 371,
    2009). Strata without signal or without background do not count; NaN where none is left.
    """
    y, scores, w = checked(y, scores, weights)
    strata = np.asarray(strata)
    if strata.shape != y.shape:
        raise ValueError(f"expected one stratum for each of {len(y)} scores, given shape {strata.shape}")
    total, of = 0.0, 0.0
    for value in np.unique(strata):
        rows = strata == value
        own, own_y = w[rows], y[rows]
        sums = [own[own_y == c].sum() for c in (0, 1)]
        if min(sums) > 0:
            total += sums[1] * auroc(own_y, scores[rows], own)
            of += sums[1]
    return float(total / of) if of else float("nan")


def evaluate_anomaly_detection(y_true: np.ndarray, scores: np.ndarray, rejection: float = REJECTION,
                               weights: np.ndarray | None = None) -> dict:
    """How well `scores` (n,), high for anomalies, tell signal (`y_true` (n,) is 1) from background (0).

    `auroc`, and `auprc` beside the `prevalence` of signal, which is what chance gives.
    `signal_efficiency` at the background rejection, 99.99%, with `signal_efficiency_interval`, 95% Clopper-Pearson,
    and `signal_efficiency_interval_with_cut`, which holds for the uncertain cut too. They are NaN where there are
    fewer than 1 / (1 - rejection) background events; `tightest_rejection` is then what the sample resolves (one
    background event kept), and the `..._at_tightest` entries belong to it.
    `working_points` at 99, 99.9 and 99.99% rejection: the dictionaries of `ebm.efficiency.signal_efficiency`.
    `sic`: the highest significance improvement e_S / sqrt(e_B) where at least 10 background events pass.
    With `weights` (n,) everything is weighted, negative ones with their sign, and numbers of events are effective.

    Raises ValueError unless both classes are present and every score is a number.
    """
    y, scores, w = checked(y_true, scores, weights)
    signal, background = (Sample(scores[y == c], w[y == c]) for c in (1, 0))
    tightest = min(rejection, 1 - 1 / background.n_eff)
    result = {
        "auroc": auroc(y, scores, w), "auprc": auprc(y, scores, w), "prevalence": signal.total / w.sum(),
        "n_signal": len(signal.scores), "n_background": len(background.scores), "n_signal_effective": signal.n_eff,
        "n_background_effective": background.n_eff, "rejection": rejection, "tightest_rejection": tightest,
        "sic": sic_max(y, scores, w),
        "working_points": [signal_efficiency(signal, background, r) for r in REJECTIONS],
    }
    for suffix, at in (("", rejection), ("_at_tightest", tightest)):
        point = signal_efficiency(signal, background, at)
        result |= {f"signal_efficiency{suffix}": point["efficiency"],
                   f"signal_efficiency{suffix}_interval": point["interval"],
                   f"signal_efficiency{suffix}_interval_with_cut": point["interval_with_cut"]}
    return result


def bootstrap_auroc(y: np.ndarray, scores: Sequence[np.ndarray], n: int = 1000, seed: int = 0,
                    weights: np.ndarray | None = None) -> np.ndarray:
    """(n, m) AUROCs of m scores on the same n resamples, each class resampled with its own size."""
    y, _, w = checked(y, scores[0], weights)
    w_signal, w_background = w[y == 1], w[y == 0]
    prepared = []
    for s in (checked(y, s)[1] for s in scores):
        background, signal = s[y == 0], s[y == 1]
        order = np.argsort(background)
        ranks = [np.searchsorted(background[order], signal, side) for side in ("left", "right")]
        prepared.append((order, *ranks))
    rng = np.random.default_rng(seed)
    chunk = max(1, _BOOTSTRAP_CELLS // len(y))
    result = np.empty((n, len(scores)))
    for start in range(0, n, chunk):
        rows = min(chunk, n - start)
        # How often each event was drawn, instead of the resamples themselves: nothing is sorted again.
        of_signal, of_background = (_counts(rng, rows, len(own)) * own for own in (w_signal, w_background))
        pairs = 2 * of_signal.sum(1) * of_background.sum(1)
        for i, (order, low, high) in enumerate(prepared):
            below = np.zeros((rows, len(w_background) + 1))
            np.cumsum(of_background[:, order], axis=1, out=below[:, 1:])
            result[start:start + rows, i] = (of_signal * (below[:, low] + below[:, high])).sum(1) / pairs
    return result


def paired_bootstrap(y: np.ndarray, a: np.ndarray, b: np.ndarray, n: int = 1000, seed: int = 0,
                     confidence: float = 0.95, weights: np.ndarray | None = None) -> tuple[float, float, float]:
    """AUROC of score a minus AUROC of score b: the difference and its interval on common resamples."""
    both = bootstrap_auroc(y, [a, b], n, seed, weights)
    low, high = interval(both[:, 0] - both[:, 1], confidence)
    return auroc(y, a, weights) - auroc(y, b, weights), low, high


def interval(samples: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Central percentile interval."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def _counts(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    draws = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(draws.ravel(), minlength=rows * n).reshape(rows, n)
