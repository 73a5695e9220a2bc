"""What an energy-based model has to beat: the size of the event, what it lacks, an isolation forest, an autoencoder.

A baseline is fitted on preprocessed background u (n, D) and then scores events, high for unusual ones.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from ebm.networks import Autoencoder


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


def build_autoencoder(input_dim: int = 64, latent_dim: int = 8) -> Autoencoder:
    """D-128-64-latent-64-128-D; its energy is the mean squared reconstruction error."""
    return Autoencoder(input_dim, latent_dim)


def train_autoencoder(model: Autoencoder, X_train: np.ndarray | torch.Tensor, n_epochs: int = 100, lr: float = 1e-3,
                      batch_size: int = 256, seed: int = 0) -> tuple[Autoencoder, list[float]]:
    """Minimise the mean squared error on preprocessed events (n, D) with Adam: the model and its loss per epoch."""
    x = torch.as_tensor(X_train, dtype=torch.float32)
    if x.ndim != 2 or len(x) == 0 or x.shape[1] != model.input_dim:
        raise ValueError(f"expected events of shape (n, {model.input_dim}) with n > 0, given {tuple(x.shape)}")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(n_epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            loss = (model(x[rows]) - x[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / len(x))
    return model, losses
