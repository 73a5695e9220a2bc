"""The Scorers under test, and events and models that are hard on them."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import pytest

from ebm.bundle import Bundle
from ebm.preprocess import Preprocessing
from kernels import BACKENDS, Scorer, load_scorer
from kernels.tolerances import CHECK_EVENTS, relative_rms_score

MARKER = -999.0


def _instruction_sets() -> list[str]:
    """Those of this processor, best first; the system may still refuse the tiles of AMX."""
    with open("/proc/cpuinfo") as f:
        flags = f.read()
    needs = {"amx": "amx_int8", "vnni": "avx512_vnni", "avx512": "avx512vl", "avx2": "avx2", "generic": ""}
    return [isa for isa, flag in needs.items() if flag in flags]


INSTRUCTION_SETS = _instruction_sets()

# name -> (backend, options, environment). Native runs once for each instruction set of this processor.
SCORERS = {
    **{f"native-{isa}": ("native", {}, {"FUSED_EBM_ISA": isa}) for isa in INSTRUCTION_SETS},
    "native-deterministic": ("native", {"deterministic": True}, {}),
    "numba": ("numba", {}, {}),
    "triton": ("triton", {}, {}),
    "reference-fp32": ("reference", {"precision": "fp32"}, {}),
}
every_scorer = pytest.mark.parametrize("name", SCORERS)


@contextmanager
def _environment(values: dict[str, str]):
    before = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for k, v in before.items():
            os.environ.pop(k) if v is None else os.environ.update({k: v})


def make(name: str, bundle: Bundle, **options) -> Scorer:
    """The Scorer `name` on a bundle; skips, with the reason, where its backend cannot run here."""
    backend, own, environment = SCORERS[name]
    if why_not := BACKENDS[backend].why_not():
        pytest.skip(why_not)
    with _environment(environment):
        return load_scorer(bundle, backend, **own, **options)


def preprocessing(n_features: int, seed: int = 0) -> Preprocessing:
    """All transforms, imputation and a constant feature, on features that `events` makes."""
    rng = np.random.default_rng(seed)
    transform = np.arange(n_features) % 3
    inv_std = rng.uniform(0.5, 2, n_features)
    if n_features > 4:
        inv_std[4] = 0  # a constant feature
    impute = np.where(np.arange(n_features) % 2, rng.normal(size=n_features), np.nan)
    return Preprocessing(
        marker=np.where(np.isnan(impute), np.nan, MARKER), impute=impute, transform=transform,
        scale=rng.uniform(0.5, 2, n_features), mean=rng.normal(size=n_features) / 2, inv_std=inv_std,
    )


@lru_cache
def model(features: int, hidden: int, layers: int) -> Bundle:
    """Random weights with the preprocessing above."""
    return Bundle.random(features, hidden, layers, seed=features, preprocessing=preprocessing(features))


def events(n: int, n_features: int, seed: int = 0) -> np.ndarray:
    """Raw events (n, D): heavy tails where a transform tames them, a tenth missing where that is allowed."""
    rng = np.random.default_rng((seed, n_features))
    x = rng.normal(size=(n, n_features)).astype(np.float32)
    wide = np.arange(n_features) % 3 > 0
    x[:, wide] *= np.exp(rng.normal(size=(n, wide.sum())))
    optional = np.arange(n_features) % 2 == 1
    missing = (rng.random(x.shape) < 0.1) & optional
    x[missing] = np.where(rng.random(missing.sum()) < 0.5, np.nan, MARKER)
    return x


@lru_cache
def spreads(features: int, hidden: int, layers: int) -> tuple[float, float]:
    """Standard deviation of the true energy and RMS of the true score over the fixed events."""
    reference = load_scorer(model(features, hidden, layers), "reference")
    energy, score = reference.energy_and_score(events(CHECK_EVENTS, features, seed=1))
    return float(np.std(energy)), float(np.sqrt(np.mean(score**2)))


def amplification(bundle: Bundle, x: np.ndarray) -> float:
    """By how much more than the 5e-7 of random weights this model amplifies rounding, measured by PyTorch's float32.

    `TOLERANCES` are of random weights: trained ones that are steeper lose as much more in every precision.
    """
    truth, found = (load_scorer(bundle, "reference", precision=p).energy_and_score(x)[1] for p in ("fp64", "fp32"))
    return max(1.0, relative_rms_score(found, truth) / 5e-7)
