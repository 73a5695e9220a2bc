"""How well an anomaly score separates signal from background, with the uncertainty of each figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn

REJECTION = 0.9999
_BOOTSTRAP_CELLS = 4_000_000  # event counts held at once


def auroc(y: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a signal event (y = 1) scores above a background event; ties count half."""
    y, scores = _checked(y, scores)
    background = np.sort(scores[y == 0])
    low, high = (np.searchsorted(background, scores[y == 1], side) for side in ("left", "right"))
    return float((low.mean() + high.mean()) / 2 / len(background))


def auprc(y: np.ndarray, scores: np.ndarray) -> float:
    """Average precision. It depends on the share of signal in the sample."""
    from sklearn.metrics import average_precision_score

    y, scores = _checked(y, scores)
    return float(average_precision_score(y, scores))


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact central interval of a binomial proportion with k successes of n."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    return low, high


def cut_at_rejection(background: np.ndarray, rejection: float = REJECTION) -> float:
    """The lowest cut c such that `score > c` keeps at most the fraction 1 - rejection of the background.

    NaN where the sample is too small to resolve it: it takes 1 / (1 - rejection) events.
    """
    n = len(background)
    kept = int(np.floor(n * (1 - rejection) + 1e-9))
    if kept < 1:
        return float("nan")
    return float(np.partition(background, n - 1 - kept)[n - 1 - kept]) if kept < n else -np.inf


def evaluate_anomaly_detection(y_true: np.ndarray, scores: np.ndarray, rejection: float = REJECTION) -> dict:
    """AUROC, AUPRC and the signal efficiency at a background rejection, high scores being anomalous.

    `signal_efficiency` and its 95% Clopper-Pearson `signal_efficiency_interval` are NaN where there are fewer
    than 1 / (1 - rejection) background events; `tightest_rejection` is then what the sample resolves (one
    background event kept), and the `..._at_tightest` entries belong to it. The interval counts signal events
    alone: the cut moves with the background sample too. Events are counted, not weighted.
    Raises ValueError unless both classes are present and every score is a number.
    """
    y, scores = _checked(y_true, scores)
    background, signal = scores[y == 0], scores[y == 1]
    resolved = min(rejection, 1 - 1 / len(background))
    nan = float("nan")
    result = {
        "auroc": auroc(y, scores), "auprc": auprc(y, scores), "n_signal": len(signal),
        "n_background": len(background), "rejection": rejection, "signal_efficiency": nan,
        "signal_efficiency_interval": (nan, nan), "tightest_rejection": resolved,
    }
    passed = int(np.count_nonzero(signal > cut_at_rejection(background, resolved)))
    efficiency, interval = passed / len(signal), clopper_pearson(passed, len(signal))
    result |= {"signal_efficiency_at_tightest": efficiency, "signal_efficiency_at_tightest_interval": interval}
    if resolved == rejection:
        result |= {"signal_efficiency": efficiency, "signal_efficiency_interval": interval}
    return result


def bootstrap_auroc(y: np.ndarray, scores: Sequence[np.ndarray], n: int = 1000, seed: int = 0) -> np.ndarray:
    """(n, m) AUROCs of m scores on the same n resamples, each class resampled with its own size."""
    y = np.asarray(y)
    checked = [_checked(y, s)[1] for s in scores]
    n_signal, n_background = np.count_nonzero(y == 1), np.count_nonzero(y == 0)
    prepared = []
    for s in checked:
        background, signal = s[y == 0], s[y == 1]
        order = np.argsort(background)
        ranks = [np.searchsorted(background[order], signal, side) for side in ("left", "right")]
        prepared.append((order, *ranks))
    rng = np.random.default_rng(seed)
    chunk = max(1, _BOOTSTRAP_CELLS // len(y))
    result = np.empty((n, len(checked)))
    for start in range(0, n, chunk):
        rows = min(chunk, n - start)
        # How often each event was drawn, instead of the resamples themselves: nothing is sorted again.
        of_signal, of_background = (_counts(rng, rows, size) for size in (n_signal, n_background))
        for i, (order, low, high) in enumerate(prepared):
            below = np.zeros((rows, n_background + 1), np.int64)
            np.cumsum(of_background[:, order], axis=1, out=below[:, 1:])
            wins = (of_signal * (below[:, low] + below[:, high])).sum(1)
            result[start:start + rows, i] = wins / (2 * n_signal * n_background)
    return result


def paired_bootstrap(y: np.ndarray, a: np.ndarray, b: np.ndarray, n: int = 1000, seed: int = 0,
                     confidence: float = 0.95) -> tuple[float, float, float]:
    """AUROC of score a minus AUROC of score b: the difference and its interval on common resamples."""
    both = bootstrap_auroc(y, [a, b], n, seed)
    low, high = interval(both[:, 0] - both[:, 1], confidence)
    return auroc(y, a) - auroc(y, b), low, high


def interval(samples: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Central percentile interval."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def compute_anomaly_scores(model: nn.Module, X: np.ndarray, sigmas: Sequence[float],
                           method: str = "energy") -> np.ndarray:
    """Anomaly scores (n,) of preprocessed events X (n, D), high for unusual ones.

    "energy": the energy at the model's default level. "score_norm": |s(u, k)| at the lowest noise level, the last
    of `sigmas`; it is offered because it is asked for: with an energy network it is near chance.
    """
    import torch

    if method not in ("energy", "score_norm"):
        raise ValueError(f"method is {method!r}, expected 'energy' or 'score_norm'")
    parameter = next(model.parameters())
    x = torch.as_tensor(np.asarray(X), dtype=parameter.dtype, device=parameter.device)
    lowest = len(sigmas) - 1

    def score(part: torch.Tensor) -> torch.Tensor:
        if method == "energy":
            return model.energy_and_score(part)[0]
        return model.energy_and_score(part, torch.full((len(part),), lowest, device=x.device))[1].norm(dim=1)

    with torch.no_grad():
        return torch.cat([score(part) for part in x.split(8192)]).cpu().numpy()


def _counts(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    draws = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(draws.ravel(), minlength=rows * n).reshape(rows, n)


def _checked(y: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, scores = np.asarray(y), np.asarray(scores)
    if y.ndim != 1 or y.shape != scores.shape:
        raise ValueError(f"expected labels and scores of one shape (n,), given {y.shape} and {scores.shape}")
    if not set(np.unique(y)) == {0, 1}:
        raise ValueError(f"labels must be 0 (background) and 1 (signal), both present, given {np.unique(y)[:5]}")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN")
    return y, scores
