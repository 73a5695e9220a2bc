"""What a reduced precision costs in physics: its energies beside those of float64, on real events."""

from __future__ import annotations

import os

import numpy as np

from ebm import metrics
from ebm.bundle import Bundle
from ebm.command import plain
from ebm.evaluate import trained_on
from ebm.events import DataError, Events, split
from kernels.registry import BACKENDS, REDUCED, load_scorer
from kernels.scorer import Scorer
from kernels.tolerances import relative_rms_energy, relative_rms_score

_PART = 8192  # events that float64 takes at once, which bounds its memory
_NAN = float("nan")


def physics_report(bundle: Bundle, events: Events, precision: str) -> dict:
    """Native energies in a reduced precision beside float64 and native fp32: plain numbers, None where unknown.

    Energies are of the default level, on the events that count: the test folds where the model was trained on these
    data, else all. `figures` has AUROC, flags, ranks and errors of every precision, `change` the reduced one minus
    float64, the AUROC with its 95% paired bootstrap interval. Flags are raised at the bundle's threshold, which was
    calibrated in fp32: a reduced precision uses it as it is, and that is what the report tests. Without labels AUROC
    and rates are None. Raises RuntimeError where the precision cannot run here.
    """
    scorer = _native(bundle, precision)
    name, seen = events.source or "the data", trained_on(bundle, events)
    scope = "test folds" if seen else "all"
    kept = events[split(events).test] if seen else events
    if len(kept) == 0:
        raise DataError(f"{name}: 0 events {'in the test folds' if seen else ''}".rstrip() + ", expected some")
    with_score = precision != "int8"
    fp32 = np.asarray(_native(bundle, "fp32").energy(kept.x), np.float64)  # names an event that is not finite
    reduced = scorer.energy_and_score(kept.x) if with_score else (scorer.energy(kept.x), None)
    truth = _truth(bundle, kept.x, with_score)

    threshold = bundle.threshold and bundle.threshold.energy
    label = kept.label if kept.label is not None else np.full(len(kept), -1)
    numbers = {c: int(np.count_nonzero(label == c)) for c in (0, 1)}
    energies = {"fp64": truth[0], "fp32": fp32, precision: np.asarray(reduced[0], np.float64)}
    figures = {p: _figures(energy, truth[0], label, threshold) for p, energy in energies.items()}
    changed = ("auroc", "signal_efficiency", "background_flag_rate")
    interval = metrics.paired_bootstrap(label, energies[precision], truth[0])[1:] if all(numbers.values()) else None
    return plain({
        "precision": precision, "backend": "native", "instruction_set": scorer.isa, "model_digest": bundle.digest,
        "data": os.path.basename(name), "data_digest": events.digest, "events": scope, "n": len(kept),
        "n_signal": None if kept.label is None else numbers[1],
        "n_background": None if kept.label is None else numbers[0],
        "threshold": threshold, "figures": figures,
        "change": {f: figures[precision][f] - figures["fp64"][f] for f in changed} | {"auroc_interval": interval},
        "rms_score": relative_rms_score(reduced[1], truth[1]) if with_score else None,
    })


def why_not(bundle: Bundle, precision: str) -> str | None:
    """The reason why a reduced precision of this model cannot run here, or None."""
    if precision not in REDUCED:
        raise ValueError(f"precision is {precision!r}, expected {' or '.join(map(repr, REDUCED))}")
    try:
        _native(bundle, precision)
    except RuntimeError as e:
        return str(e)
    return None


def _native(bundle: Bundle, precision: str) -> Scorer:
    """The Scorer whose physics is reported; it needs no report, as `load_scorer` would."""
    if reason := BACKENDS["native"].why_not_for(bundle.architecture.kind):
        raise RuntimeError(f"backend 'native' cannot run: {reason}")
    return BACKENDS["native"].load()(bundle, precision=precision)


def _truth(bundle: Bundle, x: np.ndarray, with_score: bool) -> tuple[np.ndarray, np.ndarray | None]:
    reference = load_scorer(bundle, "reference")
    parts = [x[i:i + _PART] for i in range(0, len(x), _PART)]
    if not with_score:
        return np.concatenate([reference.energy(part) for part in parts]), None
    energies, scores = zip(*(reference.energy_and_score(part) for part in parts))
    return np.concatenate(energies), np.concatenate(scores)


def _figures(energy: np.ndarray, truth: np.ndarray, label: np.ndarray, threshold: float | None) -> dict:
    """What energies (n,) say of events with labels 1 (signal), 0 (background) or -1 (unknown), NaN where nothing."""
    signal, background = label == 1, label == 0
    result = {
        "auroc": metrics.auroc(label, energy) if signal.any() and background.any() else _NAN,
        "spearman": _spearman(energy, truth), "rms_energy": relative_rms_energy(energy, truth),
    }
    if threshold is None:
        of_flags = ("signal_efficiency", "background_flag_rate", "n_flagged", "n_flags_different", "flag_agreement")
        return result | dict.fromkeys(of_flags, _NAN)
    flag, different = energy > threshold, (energy > threshold) != (truth > threshold)
    return result | {
        "signal_efficiency": flag[signal].mean() if signal.any() else _NAN,
        "background_flag_rate": flag[background].mean() if background.any() else _NAN,
        "n_flagged": int(flag.sum()), "n_flags_different": int(different.sum()), "flag_agreement": 1 - different.mean(),
    }


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else _NAN
