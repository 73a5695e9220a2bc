"""The HiggsML study: do features derived from physics help detectors that have seen background alone?

After "Particle Physics-Inspired Anomaly Detection" (github.com/Bawilla/particle-physics-anomaly-detection), with its
preprocessing, features and autoencoders, and with what it leaves out: held-out events, intervals, seeds, other
detectors, and the question whether a score is more than the number of jets.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ebm import metrics
from ebm.baselines import AutoencoderError, IsolationForest, ObjectCount
from ebm.benchmark import one_thread
from ebm.bundle import Bundle
from ebm.events import DataError, Events, split
from ebm.higgsml_features import engineered
from ebm.preprocess import TRANSFORMS, Preprocessing
from ebm.style import Pictures, progress
from ebm.train import fit_background

if TYPE_CHECKING:
    from ebm.baselines import Baseline

VARIANTS = ("before", "after")  # the derived features
ENERGY, COUNT = "energy", "n_missing (reversed)"  # signal lacks fewer values than background
_JETS = "PRI_jet_num"

BASELINES: dict[str, Callable[[int], Baseline]] = {
    "autoencoder 8 (MSE)": lambda seed: AutoencoderError(8, seed),
    "autoencoder 8 (Huber)": lambda seed: AutoencoderError(8, seed, "huber"),
    "autoencoder 2 (MSE)": lambda seed: AutoencoderError(2, seed),
    "autoencoder 2 (Huber)": lambda seed: AutoencoderError(2, seed, "huber"),
    "isolation forest": lambda seed: IsolationForest(seed=seed),
    COUNT: lambda seed: ObjectCount(),
}
AUTOENCODERS = tuple(BASELINES)[:4]
DETECTORS = (*AUTOENCODERS, ENERGY, *tuple(BASELINES)[4:])

# AUROCs of that study's README, which gives neither intervals nor seeds, by the detector here that is nearest.
PUBLISHED = {"autoencoder 8 (MSE)": 0.58, "autoencoder 2 (Huber)": 0.63}  # "baseline", "tight bottleneck"
PUBLISHED_RANGE = (0.60, 0.70)  # "typical for this task"


def higgsml_study(events: Events, energies: Callable[[Bundle, np.ndarray], np.ndarray], *, seeds: int = 3,
                  resamples: int = 1000, **training: object) -> Pictures:
    """Every detector on the features of HiggsML (before) and on these with the derived ones (after), as figures and
    numbers.

    Everything is fitted on the background of the training folds: medians for missing values, logarithms, scales and
    detectors; signal and the test folds, on which AUROCs are taken, enter no fit. `energies` and `training` are those
    of `ebm.train.fit` and `fit_background`. AUROCs are means over seeds 0, ..., `seeds` - 1; their intervals, 95%,
    are those of the test sample (`resamples` bootstrap resamples of the events), and the spread over seeds stands
    beside them. Events are counted, not weighted. Raises DataError on other events, without labels, and where a class
    that is needed is absent; ValueError on numbers below 1.
    """
    if seeds < 1 or resamples < 1:
        raise ValueError(f"{seeds} seeds and {resamples} resamples given, expected at least 1")
    larger = engineered(events)
    optional = (True,) * events.schema.n_features  # any value may be missing, and is then the background's median
    variants = dict(zip(VARIANTS, (replace(events, schema=replace(events.schema, optional=optional)), larger)))
    train, test = _folds(events)
    fits = [(v, d, s) for v in VARIANTS for d in DETECTORS for s in range(seeds)]
    scores, preprocessing = {}, {v: Preprocessing.fit(e.x[train], e.schema) for v, e in variants.items()}
    with one_thread():
        for v, d, s in progress(fits, "fitting detectors"):
            x, p = variants[v].x, preprocessing[v]
            if d == ENERGY:
                bundle, _ = fit_background(x[train], variants[v].schema, seed=s, progress=False, **training)
                scores[v, d, s] = np.asarray(energies(bundle, x[test]), np.float64)
            else:
                scores[v, d, s] = BASELINES[d](s).fit(p(x[train])).score(p(x[test]), p.missing(x[test]))
    schemas = [variants[v].schema for v in VARIANTS]
    compressed = {name: TRANSFORMS[t] for name, t in zip(schemas[1].features, preprocessing["after"].transform) if t}
    y, jets = events.label[test], events.x[test, events.schema.features.index(_JETS)]
    numbers = {
        "data": os.path.basename(events.source), "data_digest": events.digest, "n_events": len(events),
        "n_train_background": int(train.sum()), "n_signal": int(y.sum()), "n_background": int((1 - y).sum()),
        "prevalence": float(y.mean()), "seeds": seeds, "resamples": resamples,
        "features": [s.n_features for s in schemas], "derived": schemas[1].features[schemas[0].n_features:],
        "compressed": compressed, "published": PUBLISHED, "published_range": PUBLISHED_RANGE,
    } | figures_of_merit(y, jets, scores, seeds, resamples)
    from ebm.study_plots import draw

    return Pictures(draw(y, scores, variants["after"][test], numbers), numbers)


def _folds(events: Events) -> tuple[np.ndarray, np.ndarray]:
    """Masks (n,) of the training folds' background and of the test folds."""
    name = events.source or "the data"
    if events.label is None:
        raise DataError(f"{name}: no labels, which the study needs to keep signal out of the training and to tell how "
                        "well it is found")
    folds, background = split(events), events.label == 0
    for kind, rows in (("background event in the training folds", folds.train & background),
                       ("background event in the test folds", folds.test & background),
                       ("signal event in the test folds", folds.test & ~background)):
        if not rows.any():
            raise DataError(f"{name}: no {kind} ({np.count_nonzero(background):,} background and "
                            f"{np.count_nonzero(~background):,} signal events in all), expected some")
    return folds.train & background, folds.test


def figures_of_merit(y: np.ndarray, jets: np.ndarray, scores: dict[tuple[str, str, int], np.ndarray], seeds: int,
                     resamples: int) -> dict:
    """The numbers of `scores`, (n,) by variant, detector and seed, for labels y (n,) and numbers of jets (n,)."""
    shape = (len(VARIANTS), len(DETECTORS), seeds)

    def aurocs(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(2, detectors, seeds), and resamples of the mean over seeds (resamples, 2, detectors)."""
        own = [scores[v, d, s][rows] for v in VARIANTS for d in DETECTORS for s in range(seeds)]
        samples = metrics.bootstrap_auroc(y[rows], own, resamples)
        return np.reshape([metrics.auroc(y[rows], s) for s in own], shape), samples.reshape(-1, *shape).mean(-1)

    overall, strata = aurocs(np.ones(len(y), bool)), []
    for value in np.unique(jets):
        rows = jets == value
        n = {"n_signal": int(y[rows].sum()), "n_background": int((1 - y[rows]).sum())}
        if all(n.values()):
            strata.append(({"jets": int(value), **n}, aurocs(rows)))
    if not strata:
        raise DataError(f"{_JETS}: expected test events of both classes with the same number of jets, found none")
    share = np.array([stratum["n_signal"] for stratum, _ in strata], float)
    share /= share.sum()
    within = [np.tensordot(share, [own[i] for _, own in strata], 1) for i in (0, 1)]

    def entry(points: np.ndarray, samples: np.ndarray) -> dict:
        spread = float(points.std(ddof=1)) if seeds > 1 else float("nan")
        return {"auroc": float(points.mean()), "interval": metrics.interval(samples), "per_seed": points.tolist(),
                "spread": spread}

    def difference(a: tuple, b: tuple) -> dict:
        """Of two (variant, detector): AUROC of a minus that of b, paired by event and by seed."""
        i, j = ((VARIANTS.index(v), DETECTORS.index(d)) for v, d in (a, b))
        found = entry(overall[0][i] - overall[0][j], overall[1][:, *i] - overall[1][:, *j])
        for sign, verdict in ((1, "better"), (-1, "worse")):
            if min(sign * v for v in (*found["interval"], *found["per_seed"])) > 0:
                return found | {"verdict": verdict}
        return found | {"verdict": "not resolved"}

    detectors = {}
    for j, d in enumerate(DETECTORS):
        detectors[d] = {
            v: entry(overall[0][i, j], overall[1][:, i, j])
            | {"auprc": float(np.mean([metrics.auprc(y, scores[v, d, s]) for s in range(seeds)])),
               "within": entry(within[0][i, j], within[1][:, i, j]),
               "strata": [entry(points[i, j], samples[:, i, j]) for _, (points, samples) in strata]}
            for i, v in enumerate(VARIANTS)
        } | {"after_minus_before": difference(("after", d), ("before", d))}
    learned = [(v, d) for d in DETECTORS if d != COUNT for v in VARIANTS]
    best = max(learned, key=lambda key: detectors[key[1]][key[0]]["auroc"])
    tight, huber = "2 latent dimensions instead of 8, {}", "Huber loss instead of MSE, {} latent dimensions"
    choices = {tight.format(loss): (f"autoencoder 2 ({loss})", f"autoencoder 8 ({loss})") for loss in ("MSE", "Huber")}
    choices |= {huber.format(k): (f"autoencoder {k} (Huber)", f"autoencoder {k} (MSE)") for k in (8, 2)}
    return {
        "detectors": detectors, "strata": [stratum for stratum, _ in strata], "best": best,
        "best_minus_count": difference(best, ("before", COUNT)),
        "choices": {name: difference(("before", a), ("before", b)) for name, (a, b) in choices.items()},
    }


def jets_of(stratum: dict) -> str:
    """The number of jets in words: the data count no further than 3."""
    n = stratum["jets"]
    return f"{n} jet{'s' * (n != 1)}{' or more' * (n >= 3)}"


def page(numbers: dict, figures: Sequence[str] = ()) -> str:
    """The study in Markdown: tables, what they say, and the figures of these names (files beside it)."""
    before, after = numbers["features"]
    d = numbers["detectors"]
    data = (
        f"{numbers['data']}, {numbers['n_events']:,} events: trained on {numbers['n_train_background']:,} background "
        f"events, measured on {numbers['n_signal']:,} signal and {numbers['n_background']:,} background events of the "
        f"test folds, which no fit has seen. Before: the {before} features of HiggsML; after: {after}, with the "
        f"{after - before} derived ones. Missing values are the background's median; the {len(numbers['compressed'])} "
        "features with long tails are compressed by asinh, which is logarithmic far out.")
    how = (
        "Autoencoder 8, the baseline, has 8 latent dimensions; autoencoder 2, the tight one, has 2. MSE and Huber are "
        "their losses in training; the score is the mean squared error of both. "
        + (f"Means over {numbers['seeds']} seeds, ±: spread over them" if numbers["seeds"] > 1 else "One seed")
        + "; brackets: 95% intervals of the test sample; better or worse: the interval and every seed lie on one side "
        "of zero. Events are counted, not weighted.")
    auroc = [[name, _with(e["before"]), _with(e["after"]), _with(e["after_minus_before"], "+.3f"),
              e["after_minus_before"]["verdict"]] for name, e in d.items()]
    strata = [[name, f"{e['before']['auprc']:.3f} → {e['after']['auprc']:.3f}",
               *(f"{b['auroc']:.3f} → {a['auroc']:.3f}" for b, a in
                 zip((e["before"]["within"], *e["before"]["strata"]), (e["after"]["within"], *e["after"]["strata"])))]
              for name, e in d.items()]
    found, typical = [e["before"]["auroc"] for e in d.values()], PUBLISHED_RANGE
    published = [[name, f"{PUBLISHED[name]:.2f}", _with(d[name]["before"]), _with(d[name]["after"])]
                 for name in PUBLISHED]
    return "\n\n".join([
        "# HiggsML: do features derived from physics help?", data, how,
        _table(["AUROC", "before", "after", "after - before, paired", "derived features"], auroc),
        _table(["before → after", f"AUPRC (chance {numbers['prevalence']:.3f})", "AUROC at equal number of jets",
                *map(jets_of, numbers["strata"])], strata),
        "## What helps", "\n".join(f"- {line}" for line in findings(numbers)),
        "## Beside the published figures",
        _table(["AUROC", "published", "here, before", "here, after"], published),
        "Published: README of [Particle Physics-Inspired Anomaly Detection](https://github.com/Bawilla/"
        "particle-physics-anomaly-detection), on the 250,000 events of the Kaggle file, without intervals; the file "
        f"here has {numbers['n_events']:,}. It calls {typical[0]:.2f} to {typical[1]:.2f} typical (here, before: "
        f"{min(found):.2f} to {max(found):.2f}) and sees no significant gain from derived features. Its notebook takes "
        "the AUROC of the tight bottleneck on all events, those trained on among them, with derived features of its "
        "own.",
        *(f"![{name}]({name}.png)" for name in figures)]) + "\n"


def findings(numbers: dict) -> list[str]:
    """What the numbers say, in sentences."""
    d = numbers["detectors"]
    by = {verdict: [name for name in DETECTORS if name != COUNT and d[name]["after_minus_before"]["verdict"] == verdict]
          for verdict in ("better", "worse", "not resolved")}
    lines = ["Derived features: " + "; ".join(f"{verdict} for {', '.join(names)}" for verdict, names in by.items()
                                              if names) + "."]
    lines += [f"{name}: {e['verdict']}, {_with(e, '+.3f')}." for name, e in numbers["choices"].items()]
    v, name = numbers["best"]
    best, count = d[name][v], numbers["best_minus_count"]
    lines.append(f"The highest AUROC is that of {name} ({v}), {_with(best)}; chosen with labels, so a little too high. "
                 f"Minus {COUNT}, which sees nothing but which values are there, and has its sign from labels: "
                 f"{_with(count, '+.3f')}, {count['verdict']}.")
    lines.append(f"At equal number of jets it is {_with(best['within'])}; the difference is what their number tells.")
    return lines


def _with(e: dict, form: str = ".3f") -> str:
    spread = "" if math.isnan(e["spread"]) else f" ± {e['spread']:.3f}"
    return f"{e['auroc']:{form}} [{e['interval'][0]:{form}}, {e['interval'][1]:{form}}]{spread}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
