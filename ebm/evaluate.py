"""The energy beside simple detectors on labelled events: separation, flag rates, and where they come from."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from ebm import metrics
from ebm.baselines import IsolationForest, MissingCount, Norm
from ebm.bundle import Bundle
from ebm.events import DataError, Events, fold, split

FOREST = IsolationForest.name
_HT = ("ht", "PRI_jet_all_pt")
_MULTIPLICITY = ("n_jets", "PRI_jet_num")
_MOST_JETS = 6


def evaluate(bundle: Bundle, events: Events, energies: Callable[[np.ndarray], np.ndarray], *, resamples: int = 1000,
             seed: int = 0) -> dict:
    """A dictionary of plain numbers, NaN where the sample cannot say.

    `energies(x)` gives the energies (n,) of raw events (n, D) at the default level. Where the model was trained
    on these data only their test folds count, else every event. Events are counted, not weighted.
    Raises DataError without labels, or where signal or background is absent from the events that count.
    """
    name = events.source or "the data"
    if events.label is None:
        raise DataError(f"{name}: no labels, so nothing to evaluate against; 'score' needs none")
    seen = trained_on(bundle, events)
    tested = split(events)[2] if seen else np.ones(len(events), bool)
    kept = events[tested]
    numbers = {c: int(np.count_nonzero(kept.label == c)) for c in (0, 1)}
    if 0 in numbers.values():
        raise DataError(f"{name}: {numbers[1]} signal and {numbers[0]} background events "
                        f"{'in the test folds' if seen else ''}, expected some of both".replace("  ", " "))
    scores = {"energy": np.asarray(energies(kept.x), np.float64)} | _baselines(bundle, events, tested, seen)
    names, y = list(scores), kept.label
    samples = metrics.bootstrap_auroc(y, list(scores.values()), resamples, seed)
    table = {d: metrics.evaluate_anomaly_detection(y, scores[d]) | {"auroc_interval": metrics.interval(samples[:, i])}
             for i, d in enumerate(names)}
    difference = samples[:, names.index("energy")] - samples[:, names.index(FOREST)]
    return {
        "data": os.path.basename(name), "data_digest": events.digest, "model_digest": bundle.digest,
        "events": "test folds" if seen else "all", "n_signal": numbers[1], "n_background": numbers[0],
        "detectors": table,
        "energy_minus_isolation_forest": {
            "auroc": table["energy"]["auroc"] - table[FOREST]["auroc"],
            "interval": metrics.interval(difference), "resamples": resamples},
        "flag": _flags(bundle, kept, scores["energy"]),
        "processes": _processes(bundle, kept, scores["energy"]),
        "multiplicity": _multiplicity(bundle, kept, scores),
    }


def trained_on(bundle: Bundle, events: Events) -> bool:
    """Whether these data may hold events that the model was trained on.

    Toy samples of other sizes share events with the one trained on, under the same ids and so the same folds.
    """
    p = bundle.provenance
    toy = str(p.get("source", "")).startswith("toy") and events.source.startswith("toy")
    return toy or (bool(events.digest) and p.get("data_digest") == events.digest)


def rate(passed: np.ndarray) -> dict:
    """Share of true values with its 95% Clopper-Pearson interval."""
    k, n = int(np.count_nonzero(passed)), len(passed)
    return {"rate": k / n, "interval": metrics.clopper_pearson(k, n), "n": n}


def _baselines(bundle: Bundle, events: Events, tested: np.ndarray, seen: bool) -> dict[str, np.ndarray]:
    p = bundle.preprocessing
    u, missing = p(events.x), p.missing(events.x)
    scores = {b.name: b.score(u[tested], missing[tested]) for b in (Norm(), MissingCount())}
    for j in (events.schema.features.index(f) for f in _HT if f in events.schema.features):
        # The preprocessing is monotone, so u ranks events as the feature itself does.
        scores["HT"] = u[tested, j] * (1 if p.inv_std[j] else 0)
    background = events.label == 0
    if seen:
        fitted_on_tested_on = [(split(events)[0], tested)]
    else:  # every event is tested, so each half is scored by the forest of the other one
        half = fold(events) < 5
        fitted_on_tested_on = [(half, ~half), (~half, half)]
    forest = np.zeros(len(events))
    for fitted, scored in fitted_on_tested_on:
        if not (fitted & background).any():
            raise DataError(f"{events.source}: too few background events to train an isolation forest on")
        if scored.any():
            forest[scored] = IsolationForest().fit(u[fitted & background]).score(u[scored], missing[scored])
    return scores | {FOREST: forest[tested]}


def _flags(bundle: Bundle, events: Events, energy: np.ndarray) -> dict | None:
    t = bundle.threshold
    if t is None:
        return None
    flag = energy > t.energy
    return {"target": t.rate, "guaranteed": t.guaranteed, "upper_bound": t.upper_bound, "confidence": t.confidence,
            "background": rate(flag[events.label == 0]), "signal": rate(flag[events.label == 1])}


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
    return {"feature": column, "strata": strata}
