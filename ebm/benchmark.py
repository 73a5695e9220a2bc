"""Every detector on every data set of a folder: which there are, how they are split, and one data set with one seed."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ebm import higgsml, lhco, metrics
from ebm.baselines import MissingCount, Neighbours, ObjectCount, baselines
from ebm.command import versions
from ebm.detector import EBMDetector
from ebm.events import DataError, Schema, load_events, split
from ebm.networks import from_bundle
from ebm.scores import COMBINATIONS, compute_anomaly_scores
from ebm.train import fit_background

_HIGGSML = ("atlas-higgs-challenge-2014-v2*.parquet", "atlas-higgs-challenge-2014-v2*.csv*", "training*.csv*")
_LHCO = ("lhco_SR_train.parquet", "lhco_SR_val.parquet")
_LHCO_WITH_MJJ, _LHCO_LOG = "LHCO-with-mjj", "LHCO-log-tau21"
_LEAST_TAU21 = 0.01  # of some ten jets in 120,000 it is smaller, mostly 0
_NOT_TRAINING = ("contamination", "method", "level", "random_state")
_SOURCES = ("baselines", "benchmark", "detector", "dsm", "events", "higgsml", "lhco", "metrics", "networks",
            "preprocess", "scores", "settings", "train")
_PACKAGES = ("numpy", "torch", "scikit-learn")


class Sample(NamedTuple):
    """Normal events to train on, (n, D) float32, and events to test, (m, D), with y (m,), 1 for anomalies."""

    schema: Schema
    train: np.ndarray
    test: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class DataSet:
    """A data set of `group` HiggsML, LHCO or ADBench. HiggsML and LHCO are split alike with every seed."""

    name: str
    group: str
    files: tuple[Path, ...]
    digest: str = ""
    size: int = 0  # values to train on

    def sample(self, seed: int) -> Sample:
        """The split with a seed; DataError where a file cannot be read, or a part of the split would be empty."""
        sample = {"HiggsML": self._higgsml, "LHCO": self._lhco, "ADBench": self._adbench}[self.group](seed)
        anomalies = int(sample.y.sum())
        if len(sample.train) < 2 or not 0 < anomalies < len(sample.y):
            raise DataError(f"{len(sample.train)} normal events to train on, {len(sample.y) - anomalies} normal events "
                            f"and {anomalies} anomalies to test, expected at least 2, 1 and 1")
        return sample

    def _higgsml(self, seed: int) -> Sample:
        events = load_events(self.files[0])
        if events.label is None or events.schema != higgsml.SCHEMA:
            raise DataError(f"{self.files[0]}: expected the columns of HiggsML with labels")
        folds = split(events)
        return Sample(events.schema, events[folds.train].background().x, events.x[folds.test],
                      events.label[folds.test])

    def _lhco(self, seed: int) -> Sample:
        names = lhco.SIGNAL_REGION.features
        train, test = (load_events(f, features=names if self.name == _LHCO_WITH_MJJ else names[1:])
                       for f in self.files)
        if train.label is None or test.label is None:
            raise DataError(f"{self.files[0]}, {self.files[1]}: no labels")
        sample = Sample(train.schema, train.background().x, test.x, test.label)
        if self.name == _LHCO_LOG:
            for x in (sample.train, sample.test):
                x[:, -2:] = np.log(np.maximum(x[:, -2:], _LEAST_TAU21))
        return sample

    def _adbench(self, seed: int) -> Sample:
        events = load_events(self.files[0])
        if events.label is None:
            raise DataError(f"{self.files[0]}: no labels, expected the arrays X and y")
        schema = replace(events.schema, optional=(True,) * events.schema.n_features)  # NaN anywhere, as EBMDetector
        normal = np.random.default_rng(seed).permutation(np.flatnonzero(events.label == 0))
        train, rest = np.split(normal, [len(normal) // 2])
        test = np.concatenate([rest, np.flatnonzero(events.label == 1)])
        return Sample(schema, events.x[train], events.x[test], events.label[test])


class FarthestNeighbour(Neighbours):
    """Distance to the k-th of the neighbours alone (Ramaswamy, Rastogi and Shim 2000), as published tables have it."""

    def __init__(self, k: int = 5, seed: int = 0):
        super().__init__(k, seed)
        self.name = f"KNN (k={k}, farthest)"

    def score(self, u: np.ndarray, missing: np.ndarray) -> np.ndarray:
        return self.neighbours.kneighbors(u)[0][:, -1]


def find(folder: Path) -> tuple[list[DataSet], dict[str, str]]:
    """The data sets in a folder and below it, and the reason for each that is left out or is not there.

    Raises DataError where there is none at all.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a directory with data sets")
    candidates, left_out = [], {}
    higgs = next((found for pattern in _HIGGSML if (found := sorted(folder.rglob(pattern)))), [])
    olympics = [found for name in _LHCO for found in sorted(folder.rglob(name))[:1]]
    if higgs:
        candidates.append(DataSet("HiggsML", "HiggsML", (higgs[0],)))
    else:
        left_out["HiggsML"] = f"not in the folder: no file {', '.join(_HIGGSML)}"
    if len(olympics) == len(_LHCO):
        candidates += [DataSet(name, "LHCO", tuple(olympics)) for name in ("LHCO", _LHCO_LOG, _LHCO_WITH_MJJ)]
    else:
        left_out["LHCO"] = f"not in the folder: expected the files {' and '.join(_LHCO)}"
    tables = sorted(folder.rglob("*.npz"), key=lambda path: (_table_name(path).lower(), path))
    candidates += [DataSet(_table_name(path), "ADBench", (path,)) for path in tables]
    if not tables:
        left_out["ADBench"] = "not in the folder: no file *.npz"

    found: dict[str, DataSet] = {}
    for data in candidates:
        reason = None
        if data.name in found:
            reason = f"{data.files[0].relative_to(folder)}: there is another table of this name"
        else:
            try:
                size = data.sample(0).train.size
                digest = hashlib.sha256(b"".join(path.read_bytes() for path in data.files)).hexdigest()[:16]
                found[data.name] = replace(data, digest=digest, size=size)
            except DataError as e:
                reason = str(e)
        if reason:
            left_out[data.name] = reason.replace(f"{data.files[0].parent}/", "")
    if not found:
        raise DataError(f"{folder}: no data set to compare detectors on. " +
                        ". ".join(f"{name}: {reason}" for name, reason in left_out.items()))
    return list(found.values()), left_out


def piece(data: DataSet, seed: int, settings: dict) -> dict:
    """All detectors on one data set with one seed, on one thread.

    `auroc` and `seconds` (fit, score) of each detector; where every seed has the same split, `energy_minus` with the
    paired bootstrap interval of each other one, and `within` the AUROC among events of the same number of jets.
    `settings` are parameters of `EBMDetector` in place of its defaults.
    """
    sample = data.sample(seed)
    chosen = EBMDetector(**settings).get_params()
    method, level = chosen["method"], chosen["level"]
    training = {k: v for k, v in chosen.items() if k not in _NOT_TRAINING}
    scores, seconds = {}, {}
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant features are in the result
        start = time.perf_counter()
        bundle, _ = fit_background(sample.train, sample.schema, seed=seed, progress=False, **training)
        fitted = time.perf_counter()
        p = bundle.preprocessing
        scores["energy"] = compute_anomaly_scores(from_bundle(bundle).double(), p(sample.test.astype(np.float64)),
                                                  bundle.sigmas, method, level)
        seconds["energy"] = fitted - start, time.perf_counter() - fitted
        u, test, missing = p(sample.train), p(sample.test), p.missing(sample.test)
        for baseline in [*baselines(sample.schema, seed), FarthestNeighbour(seed=seed)]:
            if isinstance(baseline, MissingCount | ObjectCount) and not missing.any():
                continue
            start = time.perf_counter()
            baseline.fit(u)
            fitted = time.perf_counter()
            scores[baseline.name] = baseline.score(test, missing)
            seconds[baseline.name] = fitted - start, time.perf_counter() - fitted
    y, names = sample.y, sample.schema.features
    result = {
        "n_features": len(names), "n_train": len(sample.train), "n_test": len(y), "n_anomalies": int(y.sum()),
        "constant": [name for name, scale in zip(names, p.inv_std) if scale == 0],
        "steps": bundle.provenance["steps"],
        "level": bundle.default_level if level is None and method not in COMBINATIONS else level,
        "auroc": {name: round(metrics.auroc(y, s), 6) for name, s in scores.items()},
        "seconds": {name: [round(t, 3) for t in times] for name, times in seconds.items()},
    }
    if data.group != "ADBench":
        resampled = metrics.bootstrap_auroc(y, list(scores.values()))
        result["energy_minus"] = {name: [round(t, 6) for t in metrics.interval(resampled[:, 0] - resampled[:, i])]
                                  for i, name in enumerate(scores) if i}
    if "PRI_jet_num" in names:
        jets = sample.test[:, names.index("PRI_jet_num")]
        result["within"] = {name: round(metrics.stratified_auroc(y, s, jets), 6) for name, s in scores.items()}
    return result


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block PyTorch and scikit-learn have one thread: faster for small networks, and the number of cores
    changes no bit."""
    import torch
    from threadpoolctl import threadpool_limits  # of scikit-learn

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def recipe(settings: dict) -> dict:
    """What a piece is computed with: the settings, a digest of the source without its comments, the versions."""
    source = hashlib.sha256()
    for name in _SOURCES:
        tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                body[0] = ast.Pass()  # a docstring
        source.update(ast.dump(tree).encode())
    return {"settings": EBMDetector(**settings).get_params(), "source": source.hexdigest()[:16],
            "versions": versions(_PACKAGES)}


def key(data: DataSet, seed: int, recipe: dict) -> str:
    """Two pieces with one key are one and the same."""
    return hashlib.sha256(json.dumps([data.name, data.digest, seed, recipe]).encode()).hexdigest()[:16]


def _table_name(path: Path) -> str:
    return re.sub(r"^\d+_", "", path.stem)  # ADBench: 2_annthyroid
