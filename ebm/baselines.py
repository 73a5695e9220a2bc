"""What an energy-based model has to beat: the size of the event, what it lacks, neighbours, forests, autoencoders.

A baseline is fitted on preprocessed background u (n, D) and then scores events, high for unusual ones. `baselines`
gives all of them, for the same events and the same split.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import huber_loss, mse_loss

from ebm.events import Schema
from ebm.networks import Autoencoder

_HT = ("ht", "PRI_jet_all_pt")
_NEIGHBOUR_EVENTS = 20_000  # that the neighbours are looked for among: the search costs as many distances per event
_AUTOENCODER_EVENTS = 2_000_000  # passes through an autoencoder, where 100 epochs are more
_LOSSES = {"mse": mse_loss, "huber": huber_loss}


class Baseline(Protocol):
    """An anomaly detector of a few lines."""

    name: str

    def fit(self, u: np.ndarray) -> Baseline:
        """Learn from background u (n, D), missing values imputed."""

    def score(self, u: np.ndarray, missing: np.ndarray) -> np.ndarray:
        """Anomaly score (n,) of events u (n, D), of which `missing` (n, D) values were imputed."""


class Norm:
    """|u|: the distance from the background's mean in units of its spread."""

    name = "|x|"

    def fit(self, u: np.ndarray) -> Norm:
        return self

    def score(self, u: np.ndarray, missing: np.ndarray) -> np.ndarray:
        return np.linalg.norm(u, axis=1)


class MissingCount:
    """How many values are missing: what padding alone can tell."""

    name = "n_missing"

    def fit(self, u: np.ndarray) -> MissingCount:
        return self

    def score(self, u: np.ndarray, missing: np.ndarray) -> np.ndarray:
        return missing.sum(axis=1).astype(np.float64)


class ObjectCount:
    """How many values are there: n_missing the other way round."""

    name = "n_objects"

    def fit(self, u: np.ndarray) -> ObjectCount:
        return self

    def score(self, u: np.ndarray, missing: np.ndarray) -> np.ndarray:
        return (~missing).sum(axis=1).astype(np.float64)


class Feature:
    """One feature: the preprocessing is monotone, so u ranks events as the feature itself does."""

    def __init__(self, name: str, column: int):
        self.name, self.column = name, column

    def fit(self, u: np.ndarray) -> Feature:
        return self

    def score(self, u: np.ndarray, missing: np.ndarray) -> np.ndarray:
        return u[:, self.column].astype(np.float64)


class Mahalanobis:
    """Distance from the background's mean in units of its covariance, which may be singular."""

    name = "Mahalanobis"

    def fit(self, u: np.ndarray) -> Mahalanobis:
        from sklearn.covariance import EmpiricalCovariance

        self.covariance = EmpiricalCovariance().fit(u.astype(np.float64))
        return self

    def score(self, u: np.ndarray, missing: np.ndarray) -> np.ndarray:
        return np.sqrt(self.covariance.mahalanobis(u.astype(np.float64)))


class Neighbours:
    """Mean distance to the k nearest of (at most 20,000) background events (Angiulli and Pizzuti 2002)."""

    def __init__(self, k: int = 5, seed: int = 0):
        self.name, self.k, self.seed = f"KNN (k={k})", k, seed

    def fit(self, u: np.ndarray) -> Neighbours:
        from sklearn.neighbors import NearestNeighbors

        u = _subsample(u, self.seed)
        self.neighbours = NearestNeighbors(n_neighbors=min(self.k, len(u))).fit(u)
        return self

    def score(self, u: np.ndarray, missing: np.ndarray) -> np.ndarray:
        return self.neighbours.kneighbors(u)[0].mean(axis=1)


class LocalOutlierFactor:
    """scikit-learn's local outlier factor with 20 neighbours among at most 20,000 events (Breunig et al. 2000)."""

    name = "LOF"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def fit(self, u: np.ndarray) -> LocalOutlierFactor:
        from sklearn.neighbors import LocalOutlierFactor as Factor

        u = _subsample(u, self.seed)
        if len(u) < 2:
            raise ValueError(f"the local outlier factor needs at least 2 background events, given {len(u)}")
        self.factor = Factor(n_neighbors=min(20, len(u) - 1), novelty=True).fit(u)
        return self

    def score(self, u: np.ndarray, missing: np.ndarray) -> np.ndarray:
        return -self.factor.score_samples(u)


class IsolationForest:
    """scikit-learn's isolation forest (Liu, Ting and Zhou 2008)."""

    name = "isolation forest"

    def __init__(self, trees: int = 200, seed: int = 0):
        from sklearn.ensemble import IsolationForest as Forest

        self.forest = Forest(n_estimators=trees, random_state=seed)

    def fit(self, u: np.ndarray) -> IsolationForest:
        self.forest.fit(u)
        return self

    def score(self, u: np.ndarray, missing: np.ndarray) -> np.ndarray:
        return -self.forest.score_samples(u)


class AutoencoderError:
    """Mean squared reconstruction error of `build_autoencoder`, trained for 100 epochs (of many events, fewer).

    `loss` is what training minimises, one of `train_autoencoder`.
    """

    def __init__(self, latent: int = 8, seed: int = 0, loss: str = "mse"):
        self.name, self.latent, self.seed, self.loss = f"autoencoder (latent {latent})", latent, seed, loss

    def fit(self, u: np.ndarray) -> AutoencoderError:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = build_autoencoder(u.shape[1], self.latent)
        epochs = max(1, min(100, _AUTOENCODER_EVENTS // len(u)))
        self.model, _ = train_autoencoder(model, u, n_epochs=epochs, seed=self.seed, loss=self.loss)
        return self

    def score(self, u: np.ndarray, missing: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model.energy_and_score(torch.as_tensor(u, dtype=torch.float32))[0].double().numpy()


def baselines(schema: Schema, seed: int = 0) -> list[Baseline]:
    """Every baseline for events of this schema, not yet fitted; HT where there is such a feature."""
    ht = [Feature("HT", schema.features.index(name)) for name in _HT if name in schema.features]
    return [Norm(), MissingCount(), ObjectCount(), *ht, Mahalanobis(), IsolationForest(seed=seed),
            Neighbours(seed=seed), LocalOutlierFactor(seed), AutoencoderError(8, seed), AutoencoderError(3, seed)]


def _subsample(u: np.ndarray, seed: int) -> np.ndarray:
    if len(u) <= _NEIGHBOUR_EVENTS:
        return u
    return u[np.random.default_rng(seed).choice(len(u), _NEIGHBOUR_EVENTS, replace=False)]


def build_autoencoder(input_dim: int = 64, latent_dim: int = 8) -> Autoencoder:
    """D-128-64-latent-64-128-D; its energy is the mean squared reconstruction error."""
    return Autoencoder(input_dim, latent_dim)


def train_autoencoder(model: Autoencoder, X_train: np.ndarray | torch.Tensor, n_epochs: int = 100, lr: float = 1e-3,
                      batch_size: int = 256, seed: int = 0, loss: str = "mse") -> tuple[Autoencoder, list[float]]:
    """Minimise the mean squared error on preprocessed events (n, D) with Adam: the model and its loss per epoch.

    `loss` "huber" takes the Huber loss instead, linear beyond one background spread, so that tails weigh less.
    Raises ValueError on events that cannot be trained on, RuntimeError where the loss diverges.
    """
    if loss not in _LOSSES:
        raise ValueError(f"loss is {loss!r}, expected {' or '.join(map(repr, _LOSSES))}")
    x = torch.as_tensor(X_train, dtype=torch.float32)
    if x.ndim != 2 or len(x) == 0 or x.shape[1] != model.input_dim:
        raise ValueError(f"expected events of shape (n, {model.input_dim}) with n > 0, given {tuple(x.shape)}")
    if n_epochs < 1 or batch_size < 1:
        raise ValueError(f"expected at least one epoch and one event per batch, given {n_epochs} and {batch_size}")
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).any(1).sum())
        raise ValueError(f"{bad} of {len(x)} events have a feature that is not finite")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(1, n_epochs + 1):
        total = torch.zeros((), dtype=torch.float64)
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            value = _LOSSES[loss](model(x[rows]), x[rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.detach() * len(rows)
        losses.append(float(total) / len(x))
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"the loss is {losses[-1]} in epoch {epoch}: the training diverged; lower the learning "
                               f"rate (now {lr})")
    return model, losses
