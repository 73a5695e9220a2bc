"""`EBMDetector`: the energy-based model as an outlier detector of scikit-learn."""

from __future__ import annotations

import numpy as np
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from ebm.events import Schema
from ebm.networks import from_bundle
from ebm.scores import check_method, compute_anomaly_scores
from ebm.settings import Settings
from ebm.train import fit_background


class EBMDetector(OutlierMixin, BaseEstimator):
    """Learns what normal events look like from X (n, D) alone, D from 1 to 256; NaN is a missing value.

    `score_samples` is minus the anomaly score of `ebm.scores` by `method` and `level`, `decision_function` the same
    above 0 for normal events, and `predict` gives 1 for these and -1 for outliers: of the events fitted, the share
    `contamination`. That is scikit-learn's convention and no guarantee; for a rate of unseen background with one, hand
    `-detector.score_samples(X_other)` to `ebm.threshold.calibrate`. The other parameters are those of
    `ebm.train.fit_background` and `ebm.settings.Settings`; the same random_state gives the same scores.

    After `fit`: `bundle_`, the model, which `bundle_.save(path)` writes for `kernels.load_scorer`; `offset_`, what
    decision_function subtracts; `history_`, the losses of each member.
    """

    def __init__(self, *, contamination: float = 0.01, method: str = "energy", level: int | None = None,
                 hidden_dim: int = 256, n_layers: int = 2, n_sigmas: int = 10, members: int = 1,
                 steps: int | None = Settings.steps, batch_size: int = Settings.batch_size,
                 lr: float = Settings.lr, multi_scale: float = Settings.multi_scale, l2: float = Settings.l2,
                 patience: int | None = Settings.patience, random_state: int | np.random.RandomState | None = 0):
        self.contamination = contamination
        self.method = method
        self.level = level
        self.hidden_dim = hidden_dim
        self.n_layers = n_layers
        self.n_sigmas = n_sigmas
        self.members = members
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.multi_scale = multi_scale
        self.l2 = l2
        self.patience = patience
        self.random_state = random_state

    def fit(self, X, y=None) -> EBMDetector:
        """Train on X (n, D), n of at least 2; y is not used. Raises ValueError on what cannot be trained on."""
        X = validate_data(self, X, dtype=np.float32, ensure_all_finite="allow-nan", ensure_min_samples=2)
        if not 0 < self.contamination <= 0.5:
            raise ValueError(f"contamination is {self.contamination!r}, expected a share above 0 and up to 0.5")
        check_method(self.method, self.level, self.n_sigmas)
        names = tuple(getattr(self, "feature_names_in_", (f"x{j}" for j in range(X.shape[1]))))
        schema = Schema("array", names, ("",) * len(names), optional=(True,) * len(names))
        options = {name: getattr(self, name) for name in ("hidden_dim", "n_layers", "n_sigmas", "members", "steps",
                                                          "batch_size", "lr", "multi_scale", "l2", "patience")}
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31 - 1)
        self.bundle_, self.history_ = fit_background(X, schema, seed=int(seed), progress=False, **options)
        self.offset_ = float(np.percentile(self._scores(X), 100 * self.contamination))
        return self

    def score_samples(self, X) -> np.ndarray:
        """Minus the anomaly score (n,) float64: low for unusual events."""
        check_is_fitted(self)
        return self._scores(validate_data(self, X, dtype=np.float32, ensure_all_finite="allow-nan", reset=False))

    def decision_function(self, X) -> np.ndarray:
        """`score_samples` minus `offset_` (n,): negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X) -> np.ndarray:
        """(n,) int: -1 for outliers, 1 for the others."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _scores(self, X: np.ndarray) -> np.ndarray:
        # In double precision, so that an event's score does not depend on the events beside it.
        network = from_bundle(self.bundle_).double()
        u = self.bundle_.preprocessing(X.astype(np.float64))
        return -compute_anomaly_scores(network, u, self.bundle_.sigmas, self.method, self.level)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags
