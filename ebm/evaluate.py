"""The energy beside simple detectors on labelled events: separation, flag rates, and where they come from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebm import metrics
from ebm.baselines import baselines
from ebm.bundle import Bundle
from ebm.efficiency import clopper_pearson, cut_at_rejection
from ebm.events import DataError, Events, fold, split
from ebm.folds import trained_on
from ebm.sculpting import resonance, sculpting
from ebm.significance import HIGGSML_YIELDS, ams_of
from ebm.style import progress
from ebm.threshold import CROSSINGS, trigger_rate

if TYPE_CHECKING:
    from ebm.style import Pictures

_MULTIPLICITY = ("n_jets", "PRI_jet_num")
_MOST_JETS = 6


def evaluate(bundle: Bundle, events: Events, energies: Callable[[np.ndarray], np.ndarray], *, resamples: int = 1000,
             seed: int = 0, input_rate: float = CROSSINGS, prescale: int = 1, mass: str | None = None,
             pictures: Path | None = None) -> dict:
    """A dictionary of plain numbers, NaN where the sample cannot say.

    `energies(x)` gives the energies (n,) of raw events (n, D) at the default level. Where the model was trained or
    calibrated on some of these events only their test folds count, else every event. Events are counted; where they
    have weights, `weighted` has the weighted figures, and for HiggsML the AMS. `mass` names the resonance that the
    flag may shape, None: the first known one. `input_rate` (Hz) and `prescale` turn the flag's rate into Hz. Pictures
    of the ROC, the significance improvement and that mass are written into the directory `pictures`.
    Raises DataError without labels, or where signal or background is absent from the events that count.
    """
    name = events.source or "the data"
    if events.label is None:
        raise DataError(f"{name}: no labels, so nothing to evaluate against; 'score' needs none")
    mass = resonance(events.schema, mass)
    seen = trained_on(bundle, events)
    tested = split(events)[2] if seen else np.ones(len(events), bool)
    kept = events[tested]
    numbers = {c: int(np.count_nonzero(kept.label == c)) for c in (0, 1)}
    if 0 in numbers.values():
        raise DataError(f"{name}: {numbers[1]} signal and {numbers[0]} background events"
                        f"{' in the test folds' if seen else ''}, expected some of both")
    scores = {"energy": np.asarray(energies(kept.x), np.float64)} | _baselines(bundle, events, tested, seen)
    names, y = list(scores), kept.label
    samples = metrics.bootstrap_auroc(y, list(scores.values()), resamples, seed)
    table = {d: metrics.evaluate_anomaly_detection(y, scores[d]) | {"auroc_interval": metrics.interval(samples[:, i])}
             for i, d in enumerate(names)}
    result = {
        "data": os.path.basename(name), "data_digest": events.digest, "model_digest": bundle.digest,
        "events": "test folds" if seen else "all", "n_signal": numbers[1], "n_background": numbers[0],
        "detectors": table,
        "energy_minus": {d: {"auroc": table["energy"]["auroc"] - table[d]["auroc"], "resamples": resamples,
                             "interval": metrics.interval(samples[:, 0] - samples[:, i])}
                         for i, d in enumerate(names) if i},
        "weighted": _weighted(bundle, kept, scores),
        "flag": _flags(bundle, kept, scores["energy"], input_rate, prescale),
        "processes": _processes(bundle, kept, scores["energy"]),
        "signals": _signals(kept, scores, table["energy"]["tightest_rejection"]),
        "multiplicity": _multiplicity(bundle, kept, scores),
        "sculpting": mass_sculpting(bundle, kept, scores["energy"], mass),
    }
    if pictures is not None:
        result["pictures"] = [path.name for path in _pictures(kept, scores, result["sculpting"]).save(pictures)]
    return result


def rate(passed: np.ndarray) -> dict:
    """Share of true values with its 95% Clopper-Pearson interval."""
    k, n = int(np.count_nonzero(passed)), len(passed)
    return {"rate": k / n, "interval": clopper_pearson(k, n), "n": n}


def _baselines(bundle: Bundle, events: Events, tested: np.ndarray, seen: bool) -> dict[str, np.ndarray]:
    p = bundle.preprocessing
    u, missing, background = p(events.x), p.missing(events.x), events.label == 0
    if seen:
        fitted_on_tested_on = [(split(events)[0], tested)]
    else:  # every event is tested, so each half is scored by what was fitted on the other one
        half = fold(events) < 5
        fitted_on_tested_on = [(half, ~half), (~half, half)]
    scores = {b.name: np.zeros(len(events)) for b in baselines(events.schema)}
    for fitted, scored in fitted_on_tested_on:
        if not (fitted & background).any():
            raise DataError(f"{events.source}: too few background events to fit the simple detectors on")
        for b in progress(baselines(events.schema), "fitting simple detectors") if scored.any() else ():
            scores[b.name][scored] = b.fit(u[fitted & background]).score(u[scored], missing[scored])
    return {name: s[tested] for name, s in scores.items()}


def _weighted(bundle: Bundle, events: Events, scores: dict[str, np.ndarray]) -> dict[str, dict]:
    if events.weight is None:
        return {}
    cut = bundle.threshold and bundle.threshold.energy
    result = {}
    for name, s in scores.items():
        try:
            result[name] = metrics.evaluate_anomaly_detection(events.label, s, weights=events.weight)
        except ValueError as e:
            raise DataError(f"{events.source}: {e}") from None
        if events.schema.name == "higgsml":
            result[name]["ams"] = ams_of(events.label, s, events.weight, HIGGSML_YIELDS,
                                         cut if name == "energy" else None)
    return result


def _flags(bundle: Bundle, events: Events, energy: np.ndarray, input_rate: float, prescale: int) -> dict | None:
    t, by = bundle.threshold, bundle.class_thresholds
    if t is None:
        return None
    background, flag = events.label == 0, energy > t.energy
    expected, at_most = trigger_rate(t, input_rate, prescale)
    result = {"target": t.rate, "guaranteed": t.guaranteed, "upper_bound": t.upper_bound, "confidence": t.confidence,
              "background": rate(flag[background]), "signal": rate(flag[~background]), "by": None,
              "trigger": {"input_rate": input_rate, "prescale": prescale, "expected": expected, "at_most": at_most}}
    if by:
        number, flag = by.classes(events), by.flag(events, energy)
        result["by"] = {
            "feature": by.feature, "background": rate(flag[background]), "signal": rate(flag[~background]),
            "classes": [{"lowest": low, "threshold": own.energy, "guaranteed": own.guaranteed,
                         **{kind: rate(flag[rows & (number == c)]) if (rows & (number == c)).any() else None
                            for kind, rows in (("background", background), ("signal", ~background))}}
                        for c, (low, own) in enumerate(zip(by.lowest, by.thresholds))]}
    return result


def mass_sculpting(bundle: Bundle, events: Events, energy: np.ndarray, mass: str | None) -> dict:
    """`sculpting` of the feature `mass` by cuts on energy (n,) of background among `events`; {} without such a mass."""
    rows = events.label == 0
    variable = None if mass is None else events.x[rows, events.schema.features.index(mass)].astype(np.float64)
    if variable is None or len(np.unique(variable[~np.isnan(variable)])) < 2:
        return {}
    cut = bundle.threshold and bundle.threshold.energy
    return {"feature": mass, "cuts": sculpting(variable, energy[rows], cut=cut)}


def _pictures(events: Events, scores: dict[str, np.ndarray], shaped: dict) -> Pictures:
    from ebm.plots import plot_roc, plot_sculpting, plot_sic
    from ebm.style import Pictures

    figures = {"roc": plot_roc(events.label, scores), "sic": plot_sic(events.label, scores)}
    if shaped:
        rows, j = events.label == 0, events.schema.features.index(shaped["feature"])
        figures[f"sculpting_{shaped['feature']}"] = plot_sculpting(
            events.x[rows, j], scores["energy"][rows], [c["cut"] for c in shaped["cuts"]], shaped["feature"],
            events.schema.units[j])
    return Pictures(figures)


def _processes(bundle: Bundle, events: Events, energy: np.ndarray) -> dict[str, dict]:
    if events.process is None:
        return {}
    result, background = {}, energy[events.label == 0]
    for name in np.unique(events.process):
        rows = events.process == name
        own, signal = energy[rows], bool(events.label[rows].any())
        entry = {"n": len(own), "signal": signal, "flagged": bundle.threshold and rate(own > bundle.threshold.energy)}
        if signal:
            y = np.repeat([1, 0], [len(own), len(background)])
            entry["auroc"] = metrics.auroc(y, np.concatenate([own, background]))
        result[str(name)] = entry
    return result


def _signals(events: Events, scores: dict[str, np.ndarray], rejection: float) -> dict:
    """Efficiency for each kind of signal at one rejection, and the geometric mean: does a detector find them all?"""
    kinds = [] if events.process is None else [str(k) for k in np.unique(events.process[events.label == 1])]
    if len(kinds) < 2:
        return {}
    result = {"rejection": rejection, "detectors": {}}
    for name, s in scores.items():
        cut = cut_at_rejection(s[events.label == 0], rejection)
        found = {kind: float(np.mean(s[events.process == kind] > cut)) for kind in kinds}
        result["detectors"][name] = found | {"geometric_mean": float(np.prod(list(found.values())) ** (1 / len(kinds)))}
    return result


def _multiplicity(bundle: Bundle, events: Events, scores: dict[str, np.ndarray]) -> dict:
    """AUROC and flag rate at each number of jets: an energy may be a multiplicity meter."""
    column = next((f for f in _MULTIPLICITY if f in events.schema.features), None)
    if column is None:
        return {}
    jets = np.nan_to_num(events.x[:, events.schema.features.index(column)]).clip(0, _MOST_JETS)
    strata = []
    for value in np.unique(jets):
        rows = jets == value
        y = events.label[rows]
        both = 0 < y.sum() < len(y)
        strata.append({
            "jets": int(value), "or_more": value == _MOST_JETS, "n_background": int((y == 0).sum()),
            "n_signal": int((y == 1).sum()),
            "auroc": {d: metrics.auroc(y, s[rows]) if both else float("nan") for d, s in scores.items()},
            "background_flagged": rate(scores["energy"][rows][y == 0] > bundle.threshold.energy)
            if bundle.threshold and (y == 0).any() else None,
        })
    return {"feature": column, "strata": strata,
            "auroc_within": {d: metrics.stratified_auroc(events.label, s, jets) for d, s in scores.items()}}
