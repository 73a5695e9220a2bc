"""From events to a model: preprocessing, network, threshold and provenance, fitted on background only."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ebm.bundle import Architecture, Bundle
from ebm.command import commit
from ebm.dsm import EnergyAndScore, History, geometric_sigmas, train
from ebm.events import DataError, Events, Schema, split
from ebm.networks import EnergyNetwork
from ebm.preprocess import Preprocessing
from ebm.threshold import calibrate

RATE, CONFIDENCE = 1e-4, 0.95


@dataclass(frozen=True)
class Trained:
    """A model, its loss history and the numbers of background events that train, calibrate and test."""

    bundle: Bundle
    history: History
    events: dict[str, int]


def fit(events: Events, energies: Callable[[Bundle, np.ndarray], np.ndarray], *, steps: int = 1000,
        hidden_dim: int = 256, n_layers: int = 2, n_sigmas: int = 10, batch_size: int = 512, lr: float = 1e-3,
        ema: float = 0.999, seed: int = 0, command: str = "", progress: bool | None = None, device: str = "cpu",
        energy_and_score_of: Callable[[EnergyNetwork], EnergyAndScore] | None = None) -> Trained:
    """Train an energy network on the background of the training folds and calibrate its threshold.

    `energies(bundle, x)` gives the energies (n,) of raw events (n, D) at the default level: hand in the
    backend that will score later, so that the threshold is one of its own energies. Labels select the
    background; nothing else of them, and no weight, is used. `energy_and_score_of(network)` gives the function that
    is trained through, None: the network's own. `device` is PyTorch's name of where to train. Raises DataError where
    a fold has no background.

    The default of `steps` is short on purpose: on the calibration folds of HiggsML and of the toy 4,000 steps
    lower the loss and rank no better, for HiggsML worse.
    """
    folds = dict(zip(("train", "calibrate", "test"), split(events), strict=True))
    background = {name: events[rows].background() for name, rows in folds.items()}
    for name in ("train", "calibrate"):
        if len(background[name]) == 0:
            raise DataError(f"{events.source or 'the data'}: no background event in the {name} folds "
                            f"({len(events)} events in all)")
    preprocessing = Preprocessing.fit(background["train"].x, events.schema)
    architecture = Architecture("energy", events.schema.n_features, hidden_dim, n_layers, n_sigmas)
    sigmas = geometric_sigmas(n_sigmas)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = EnergyNetwork(architecture.input_dim, hidden_dim, n_sigmas, n_layers).to(device)
    (u, mask), validation = (tuple(t.to(device) for t in tensors(preprocessing, background[name].x, events.schema))
                             for name in ("train", "calibrate"))
    history = train(network, u, sigmas, mask=mask, steps=steps, batch_size=batch_size, lr=lr, ema=ema, seed=seed,
                    energy_and_score=energy_and_score_of and energy_and_score_of(network), validation=validation,
                    progress=progress)
    weights = {name: t.detach().cpu().numpy().copy() for name, t in network.tensors().items()}
    numbers = {name: len(b) for name, b in background.items()}
    provenance = {
        "command": command, "seed": seed, "steps": steps, "batch_size": batch_size, "learning_rate": lr, "ema": ema,
        "threads": torch.get_num_threads(), "device": device, "source": os.path.basename(events.source),
        "data_digest": events.digest, "background_events": numbers, "train_loss": history.train_loss[-1],
        "held_out_loss": history.held_out_loss[-1], "held_out_loss_per_level": history.held_out_per_level,
        "training_seconds": round(history.seconds, 1), "versions": versions(), "commit": commit(),
    }
    bundle = Bundle(architecture, weights, sigmas, network.default_level, events.schema, preprocessing,
                    provenance=provenance)
    threshold = calibrate(energies(bundle, background["calibrate"].x), RATE, CONFIDENCE, bundle.default_level)
    return Trained(Bundle(**{**vars(bundle), "threshold": threshold}), history, numbers)


def tensors(preprocessing: Preprocessing, x: np.ndarray, schema: Schema) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw events (n, D) -> preprocessed events u and the mask of features that noise and loss apply to.

    The padding of absent objects is left out, and so are constant features. Where instead the format marks single
    values as missing (HiggsML), the imputed value is noised like any other: that ties the energies of events with and
    without it together, which masking leaves free.
    """
    x = np.ascontiguousarray(x, np.float32)
    padding = preprocessing.missing(x) if schema.missing_marker is None else np.zeros(x.shape, bool)
    return torch.from_numpy(preprocessing(x)), torch.from_numpy(~padding & (preprocessing.inv_std != 0))


def versions() -> dict[str, str]:
    """Versions that a training run depends on."""
    return {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
