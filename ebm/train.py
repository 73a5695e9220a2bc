"""From events to a model: preprocessing, network, threshold and provenance, fitted on background only."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ebm.bundle import MAX_WIDTHS, Architecture, Bundle
from ebm.checkpoint import History
from ebm.command import commit
from ebm.dsm import HELD_OUT_EVENTS, EnergyAndScore, Sample, geometric_sigmas, train
from ebm.events import DataError, Events, Schema, split
from ebm.folds import check_apart, fingerprint, quantiles
from ebm.networks import EnergyNetwork, ensemble
from ebm.preprocess import FEW_VALUES, VALUES_LOOKED_AT, Preprocessing
from ebm.scores import standardise_levels
from ebm.settings import Settings
from ebm.threshold import calibrate

RATE, CONFIDENCE = 1e-4, 0.95
_FEWEST_VALUES = 3  # of a feature that counts: two are a yes or no


@dataclass(frozen=True)
class Trained:
    """A model, its first member's history and the numbers of background events that train, calibrate and test."""

    bundle: Bundle
    history: History
    events: dict[str, int]


def fit(events: Events, energies: Callable[[Bundle, np.ndarray], np.ndarray], *, command: str = "",
        **options: object) -> Trained:
    """Train an energy network on the background of the training folds, calibrate its threshold and keep quantiles.

    `energies(bundle, x)` gives the energies (n,) of raw events (n, D) at the default level: hand in the
    backend that will score later, so that the threshold is one of its own energies. Labels select the
    background; nothing else of them, and no weight, is used. `options` are those of `fit_background`. The calibration
    folds take no part in the training: their loss is recorded, but early stopping holds out training events.
    Raises DataError where a fold has no background.
    """
    folds = dict(zip(("train", "calibrate", "test"), split(events), strict=True))
    background = {name: events[rows].background() for name, rows in folds.items()}
    for name in ("train", "calibrate"):
        if len(background[name]) == 0:
            raise DataError(f"{events.source or 'the data'}: no background event in the {name} folds "
                            f"({len(events)} events in all)")
    check_apart(**background)
    bundle, histories = fit_background(background["train"].x, events.schema, watched=background["calibrate"].x,
                                       **options)
    numbers = {name: len(b) for name, b in background.items()}
    provenance = bundle.provenance | {
        "command": command, "source": os.path.basename(events.source), "data_digest": events.digest,
        "background_events": numbers, "commit": commit(),
        "fingerprint": fingerprint(events[folds["train"] | folds["calibrate"]].background()),
    }
    energy = np.asarray(energies(bundle, background["calibrate"].x))
    threshold = calibrate(energy, RATE, CONFIDENCE, level=bundle.default_level)
    bundle = replace(bundle, provenance=provenance, threshold=threshold, quantiles=quantiles(energy))
    return Trained(bundle, histories[0], numbers)


def fit_background(
    x: np.ndarray, schema: Schema, *, watched: np.ndarray | None = None, hidden_dim: int = 256, n_layers: int = 2,
    n_sigmas: int = 10, members: int = 1, device: str = "cpu", checkpoint: Path | None = None, resume: bool = False,
    energy_and_score_of: Callable[[EnergyNetwork], EnergyAndScore] | None = None, progress: bool | None = None,
    **settings: object,
) -> tuple[Bundle, list[History]]:
    """Preprocessing and energy network of raw background x (n, D), without a threshold, and each member's history.

    `watched` (m, D) are held-out events whose loss is recorded. With `patience` a tenth of x, at most 4,096 events, is
    held out in their place, and decides when to stop. `members` > 1 trains as many networks, with the seeds after
    `seed`, into one (`networks.ensemble`). `checkpoint` is a directory; `resume` goes on with what is in it.
    `energy_and_score_of(network)` gives the function that is trained through, None: the network's own. `device` is
    PyTorch's name of where to train; `settings` are the fields of `Settings`. Raises DataError where there is nothing
    to learn from, ValueError on options out of range.
    """
    s = Settings(**settings)
    if members < 1 or members * hidden_dim > MAX_WIDTHS["hidden_dim"]:
        raise ValueError(f"{members} members of width {hidden_dim} given, expected at least one and a width of at most "
                         f"{MAX_WIDTHS['hidden_dim']} together")
    preprocessing = Preprocessing.fit(x, schema)
    if not preprocessing.inv_std.any():
        raise DataError(f"every feature is constant in the {len(x)} background events: there is nothing to learn")
    architecture = Architecture("energy", schema.n_features, members * hidden_dim, n_layers, n_sigmas)
    sigmas = geometric_sigmas(n_sigmas)
    counts = counting(x, preprocessing)
    sample = tensors(preprocessing, x, schema, counts)
    held_out = None if watched is None else tensors(preprocessing, watched, schema, counts)
    background = sample.u
    if s.patience:
        held = min(HELD_OUT_EVENTS, len(x) // 10)
        if held == 0:
            raise DataError(f"early stopping holds out a tenth of the training events, of {len(x)} none can be spared")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(s.seed))
        held_out, sample = sample.rows(order[:held]), sample.rows(order[held:])
    sample, held_out = sample.to(device), held_out and held_out.to(device)

    networks, histories = [], []
    for i in range(members):
        own = replace(s, seed=s.seed + i)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own.seed)
            network = EnergyNetwork(schema.n_features, hidden_dim, n_sigmas, n_layers).to(device)
        histories.append(train(
            network, sample.u, sigmas, mask=sample.mask, width=sample.width, validation=held_out, resume=resume,
            energy_and_score=energy_and_score_of and energy_and_score_of(network), progress=progress,
            checkpoint=checkpoint and Path(checkpoint) / f"member-{i}.safetensors", **asdict(own)))
        networks.append(network)
    network = (ensemble(networks) if members > 1 else network).cpu()
    standardise_levels(network, background)
    level_mean, level_std = (tuple(t.tolist()) for t in (network.level_mean, network.level_std))
    weights = {name: t.detach().numpy().copy() for name, t in network.tensors().items()}
    counted = [name for name, c in zip(schema.features, counts) if c]
    return Bundle(architecture, weights, sigmas, network.default_level, schema, preprocessing, level_mean=level_mean,
                  level_std=level_std, provenance=_provenance(s, histories, counted, device, len(sample.u))), histories


def counting(x: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(D,) bool: the features that count (jets, b-tags): whole numbers alone, 3 to 32 different ones.

    Looks at the first 20,000 of background events x (n, D). Fewer are a yes or no, more as good as continuous.
    """
    x = np.where(preprocessing.missing(x), np.nan, x)[:VALUES_LOOKED_AT]
    values = (np.unique(column[~np.isnan(column)]) for column in x.T)
    return np.array([_FEWEST_VALUES <= len(v) <= FEW_VALUES and bool((v == np.rint(v)).all()) for v in values])


def tensors(preprocessing: Preprocessing, x: np.ndarray, schema: Schema, counts: np.ndarray | None = None) -> Sample:
    """Raw events (n, D) -> preprocessed events, the features that noise and loss apply to, and the width of counts.

    The padding of absent objects is left out, and so are constant features. Where instead the format marks single
    values as missing (HiggsML), the imputed value is noised like any other: that ties the energies of events with and
    without it together, which masking leaves free. A step of 1 in a feature of `counts` (D,) is as wide in u as the
    transform's slope says. Raises DataError on a value that is missing, but was not in the events that were fitted.
    """
    x = np.ascontiguousarray(x, np.float32)
    u, missing = preprocessing(x), preprocessing.missing(x)
    if not np.isfinite(u).all():
        i, j = np.argwhere(~np.isfinite(u))[0]
        raise DataError(f"held-out event {i}: feature {schema.features[j]!r} is {x[i, j]}, in training it never was")
    padding = missing if schema.missing_marker is None else np.zeros(x.shape, bool)
    mask = torch.from_numpy(~padding & (preprocessing.inv_std != 0))
    if counts is None or not counts.any():
        return Sample(torch.from_numpy(u), mask)
    return Sample(torch.from_numpy(u), mask, torch.from_numpy(preprocessing.derivative(x) * counts.astype(np.float32)))


def train_score_model(model: nn.Module, X_train: np.ndarray | torch.Tensor, sigmas: Sequence[float],
                      n_epochs: int = 500, lr: float = 1e-3, batch_size: int = 512) -> tuple[nn.Module, list[float]]:
    """Train an EnergyNetwork or ScoreNetwork on preprocessed events (n, D): the model and its loss per epoch.

    The noise levels are those of the model, descending. Raises ValueError where there is nothing to train on.
    """
    u = torch.as_tensor(X_train, dtype=torch.float32)
    per_epoch = max(1, len(u) // batch_size)
    history = train(model, u, sigmas, steps=n_epochs * per_epoch, lr=lr, batch_size=batch_size,
                    record_every=per_epoch)
    standardise_levels(model, u)
    return model, history.train_loss


def _provenance(s: Settings, histories: list[History], counted: list[str], device: str, n: int) -> dict:
    settings = asdict(s)
    first = histories[0]
    held_out = float(np.mean(first.held_out_per_level)) if first.held_out_per_level else None
    return {
        "seed": settings.pop("seed"), "steps": s.steps_for(n), "batch_size": settings.pop("batch_size"),
        "learning_rate": settings.pop("lr"), **{k: v for k, v in settings.items() if k != "steps"},
        "members": len(histories), "threads": torch.get_num_threads(), "device": device,
        "dequantised": counted, "train_loss": first.train_loss[-1], "held_out_loss": held_out,
        "held_out_loss_per_level": first.held_out_per_level,
        "history": [{"steps": h.steps, **{k: _rounded(v) for k, v in h.terms.items()},
                     "held_out": _rounded(h.held_out_loss)} for h in histories],
        "training_seconds": round(sum(h.seconds for h in histories), 1),
        "cpu_seconds": round(sum(h.cpu_seconds for h in histories), 1), "versions": versions(),
    }


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{v:.6g}") for v in values]


def versions() -> dict[str, str]:
    """Versions that a training run depends on."""
    return {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
