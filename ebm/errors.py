"""Where the energy errs, and what it saw in the events it ranks highest."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ebm.attribution import (
    FEWEST,
    HEADLINE,
    draw_faithfulness,
    draw_group_pulls,
    draw_pulls,
    energies,
    energy_spread,
    faithfulness,
    group,
    group_pulls,
    preprocessed,
    pulls,
)
from ebm.bundle import Bundle
from ebm.efficiency import cut_at_rejection
from ebm.event_picture import UNSEEN, draw_event, objects
from ebm.events import DataError, Events, Schema, split
from ebm.explore import checked_labels
from ebm.folds import trained_on
from ebm.preprocess import Preprocessing
from ebm.style import (
    ANOMALOUS,
    NORMAL,
    Feature,
    Pictures,
    Series,
    figure,
    number,
    pages,
    progress,
    styled,
    written,
)

REJECTION = 0.99
_PANELS = 12  # of the features that differ most
_FEWEST = 5  # events, and values of a feature, on either side of a comparison
_CHECKED = (30, 300)  # events in the check of the pulls: the highest 5%, within these bounds
_VISIBLE = 50  # false positives that can be looked at
_NORMAL = 2000  # background events that pulls and their check compare with,
_CLASSES = {None: "", 0: "background", 1: "signal"}


def errors(bundle: Bundle, events: Events, scorer: Any, *, rejection: float = REJECTION, seed: int = 0) -> Pictures:
    """`error_analysis` of a Scorer: on the test folds where the model was trained on these data, else on all events."""
    seen = trained_on(bundle, events)
    kept = events[split(events).test] if seen else events
    if len(kept) == 0:
        raise DataError(f"{events.source or 'the data'}: no event{' in the test folds' if seen else ''} "
                        f"({len(events)} events in all)")
    return error_analysis(scorer, kept.x, kept.label, scorer.energy(kept.x), bundle.sigmas, event_id=kept.event_id,
                          process=kept.process, rejection=rejection, seed=seed)


def error_analysis(model: Any, X_test: np.ndarray, y_test: np.ndarray | None, scores: np.ndarray,
                   sigmas: Sequence[float], *, feature_names: Sequence[str] | None = None,
                   event_id: Sequence[str] | None = None, process: np.ndarray | None = None,
                   rejection: float = REJECTION, n_top: int = 10, seed: int = 0) -> Pictures:
    """False positives, false negatives, and why the highest-scoring events score so high.

    `model` is a Scorer, with raw events X_test (n, D), or a network, with preprocessed ones; `scores` (n,) are high
    for anomalous events, y_test (n,) marks signal by 1, background by 0, or is None. False positives are the background
    events above the cut that keeps a share 1 - `rejection` of them, and at least 50, or half of fewer than 100; false
    negatives the signal events at or below it. The model's own threshold keeps too few of a sample for histograms; it
    is the cut where there is no background to choose one.

    Figures: `false_positives` and `false_negatives`, histograms of the features that differ most from the bulk;
    `candidates`, the pulls of the `n_top` highest scores by object, whatever their label; `candidate_1`, ..., each
    one's pulls by feature and object, and the event along the beam where its schema names objects and the events are
    raw; `faithfulness`. `numbers` has what they show, `notes` what could not be said. The pulls are those of
    `attribution.pulls`; what is usual is that in background, or in all events without labels.
    Raises DataError on arrays that do not fit together and on scores that are NaN.
    """
    if not 0 <= rejection < 1:
        raise ValueError(f"rejection is {rejection}, expected at least 0 and less than 1")
    if n_top < 1:
        raise ValueError(f"n_top is {n_top}, expected at least 1")
    scorer = hasattr(model, "attribution")
    x, y, scores = _checked(X_test, y_test, scores, model.n_features if scorer else model.input_dim)
    for what, given in (("event_id", event_id), ("process", process)):
        if given is not None and len(given) != len(x):
            raise DataError(f"{what} has {len(given)} entries, expected one for each of {len(x)} events")
    raw, threshold = scorer and model.preprocess, getattr(model, "threshold", None)
    if raw:
        x = np.where(model.bundle.preprocessing.missing(x), np.float32(np.nan), x)
    names, units = _columns(model if scorer else None, x.shape[1], feature_names, raw)
    result = Pictures(numbers={"n_events": len(x), "sigma": sigmas[model.default_level] if len(sigmas) else None})
    if threshold is not None:
        result.numbers["above_the_models_threshold"] = int(np.count_nonzero(scores > threshold))
    u, usual = preprocessed(model, x), "these events" if y is None else "background"
    with styled():
        if y is None:
            result.notes.append("no labels: false positives and false negatives cannot be told")
        else:
            _mistakes(result, _histogrammed(x, names, units), x, np.linalg.norm(u, axis=1), y, scores, rejection,
                      threshold, process)
        normal = x if y is None else x[y == 0]
        normal = normal[np.random.default_rng(seed).permutation(len(normal))[:_NORMAL]]
        top = np.argsort(-scores, kind="stable")
        titles = [{"event": str(event_id[i]) if event_id is not None else str(i), "score": float(scores[i]),
                   "label": None if y is None else int(y[i]), "process": None if process is None else str(process[i])}
                  for i in top[:n_top]]
        if len(normal) < FEWEST:
            result.notes.append(f"fewer than {FEWEST} {'background ' if y is not None else ''}events ({len(normal)}): "
                                "what is usual is not known, so the highest scores have no pulls")
            result.numbers["candidates"] = [entry | {"features": [], "groups": {}} for entry in titles]
            return result
        best = top[:n_top]
        _candidates(result, x[best], u[best], pulls(model, x[best], sigmas, normal), titles, names, units, raw, usual)
        if not energy_spread(energies(model, normal, sigmas)):
            result.notes.append(f"the energies of {usual} have no spread, so the pulls cannot be checked")
            return result
        highest = x[top[: int(np.clip(len(x) // 20, *_CHECKED))]]
        of = "all" if y is None else "background"
        result.numbers["faithfulness"] = check = faithfulness(model, highest, sigmas, normal, seed) | {"of": of}
        result.figures["faithfulness"] = fig = figure(7, 5)
        draw_faithfulness(fig.subplots(), check, of)
    return result


def visible_rejection(n: int, rejection: float = REJECTION, fewest: int = _VISIBLE) -> float:
    """`rejection`, or less where fewer than `fewest` of n background events would pass; half pass at most."""
    return min(rejection, max(0.5, 1 - fewest / max(n, 1)))


def summary(numbers: dict) -> list[str]:
    """The figures of `error_analysis` in sentences."""
    lines, chosen = [], numbers.get("rejection") is not None
    above = numbers.get("above_the_models_threshold")
    for kind, text in (("false_positives", "background events are"), ("false_negatives", "signal events are not")):
        n = numbers.get(kind, {"n": 0})
        if not n["n"]:
            continue
        line = f"{n['n']:,} of {n['of']:,} {text} above the {'cut' if chosen else 'threshold'} {numbers['cut']:.4g}"
        if kind == "false_positives":
            line += f", which {numbers['rejection']:.4g} of background does not pass" + (
                "" if above is None else
                f" (above the model's own threshold: {above:,} of all {numbers['n_events']:,} events)")
        if "features" in n:
            of = "background" if chosen else "the signal above it"
            line += f"; half of them lie farther from the mean of background than {n['norm_quantile']:.0%} of {of}"
            if leading := [f"{f['feature']} ({f['ks']:.2f})" for f in n["features"][:3] if f["ks"] >= 0]:
                line += f"; most unlike {of} in (KS) {', '.join(leading)}"
        if n["processes"]:
            line += "; " + ", ".join(f"{share:.0%} {name}" for name, share in n["processes"].items())
        lines.append(line)
    if check := numbers.get("faithfulness"):
        i = check["removed"].index(HEADLINE) if HEADLINE in check["removed"] else -1
        d, (top, random) = check["top_minus_random"][i], (check["drop"][k][i] for k in ("largest pulls", "random"))
        lines.append(f"removing the {check['removed'][i]} features with the largest pulls {_moves(top)} the energy of "
                     f"the {check['n_events']:,} highest-scoring events by {abs(top):.2f} times the spread of "
                     f"{check['of']} energies, above whose mean they lie by {check['excess']:.2f} spreads; removing "
                     f"random ones {_moves(random)} it by {abs(random):.2f}; difference {d['mean']:.2f} "
                     f"[{d['interval'][0]:.2f}, {d['interval'][1]:.2f}], larger in {d['better']:.0%} of events")
    return lines


def _moves(drop: float) -> str:
    return "raises" if drop < 0 else "lowers"


def _checked(x: np.ndarray, y: np.ndarray | None, scores: np.ndarray, d: int) -> tuple:
    x, scores = np.asarray(x), np.asarray(scores, np.float64)
    if x.ndim != 2 or len(x) == 0 or x.shape[1] != d or scores.shape != (len(x),):
        raise DataError(f"expected events (n, {d}) with n > 0 and scores (n,), given {x.shape} and {scores.shape}")
    if np.isnan(scores).any():
        raise DataError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN")
    return x.astype(np.float32, copy=False), checked_labels(y, len(x)), scores


def _columns(scorer: Any, d: int, names: Sequence[str] | None, raw: bool) -> tuple[list[str], list[str]]:
    """Names and units of the columns: a network is given features in units of the background's spread."""
    schema = scorer.bundle.schema if scorer else None
    names = list(names or (schema.features if schema else (f"x{j}" for j in range(d))))
    if len(names) != d:
        raise DataError(f"{len(names)} feature names given for {d} features")
    return names, list(schema.units) if raw else ["background spread"] * d


def _histogrammed(x: np.ndarray, names: Sequence[str], units: Sequence[str]) -> list[Feature]:
    schema = Schema("analysed", tuple(names), tuple(units), optional=(True,) * len(names))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a constant feature is drawn as one
        transform = Preprocessing.fit(x, schema).transform
    return [Feature(j, *column) for j, column in enumerate(zip(names, units, transform))]


def _mistakes(result: Pictures, features: list[Feature], x: np.ndarray, norm: np.ndarray, y: np.ndarray,
              scores: np.ndarray, rejection: float, threshold: float | None, process: np.ndarray | None) -> None:
    """False positives and negatives into `result`: a picture of the features that tell most, and numbers."""
    background, signal = y == 0, y == 1
    chosen, few = background.sum() >= 2, f"{background.sum()} of {len(y)} events are background, too few for a cut"
    if chosen:
        rejection = visible_rejection(int(background.sum()), rejection)
        cut = cut_at_rejection(scores[background], rejection)
    elif threshold is not None:
        cut = threshold
        result.notes.append(f"{few}: the model's threshold is taken, and no false positives are shown")
    else:
        result.notes.append(f"{few}, so neither false positives nor false negatives are shown")
        return
    if not signal.any():
        result.notes.append(f"none of {len(y):,} events is signal, so there are no false negatives")
    high = scores > cut
    against, name_against = (background, "background") if chosen else (signal & high, "signal above the cut")
    result.numbers.update(rejection=rejection if chosen else None, cut=cut)
    bulk = [Series("background", x[background], NORMAL, "fill")] * bool(chosen)
    kinds = {}
    if chosen:
        kinds["false_positives"] = background & high, background, [*bulk, Series("signal", x[signal], ANOMALOUS)]
    if signal.any():
        above = Series("signal above the cut", x[signal & high], ANOMALOUS)
        kinds["false_negatives"] = signal & ~high, signal, [*bulk, above]
    for kind, (rows, of, others) in progress(kinds.items(), "looking at mistakes"):
        name, n = kind.replace("_", " "), int(rows.sum())
        shares = {} if process is None else dict(zip(*_shares(process[rows])))
        result.numbers[kind] = {"n": n, "of": int(of.sum()), "processes": shares}
        if min(n, against.sum()) < _FEWEST:
            result.notes.append(f"{name} at the cut {cut:.4g}: {n}, to compare with {against.sum()} of {name_against}; "
                                f"a comparison needs {_FEWEST} of both" if n else f"no {name} at the cut {cut:.4g}")
            continue
        differs = {f: _ks(x[rows, f.column], x[against, f.column]) for f in features}
        leading = sorted(features, key=lambda f: -np.nan_to_num(differs[f], nan=-1.0))
        quantiles = np.searchsorted(np.sort(norm[against]), norm[rows]) / against.sum()
        result.numbers[kind] |= {"norm_quantile": float(np.median(quantiles)),
                                 "features": [{"feature": f.name, "ks": differs[f]} for f in leading]}
        points = Series(f"{name} ({n:,} of {of.sum():,})", x[rows], "black", "errorbar")
        title = f"{name[0].upper()}{name[1:]}: the features in which they differ most from {name_against}"
        series = [s for s in (*others, points) if len(s.x)]
        result.figures[kind] = pages(leading[:_PANELS], series, title, rows=3)[0]


def _ks(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of two samples without their missing values; NaN where either is too small."""
    from scipy.stats import ks_2samp

    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    return float(ks_2samp(a, b, method="asymp").statistic) if min(len(a), len(b)) >= _FEWEST else float("nan")


def _shares(process: np.ndarray) -> tuple[list[str], list[float]]:
    names, n = np.unique(process, return_counts=True)
    order = np.argsort(-n)
    return names[order].tolist(), (n[order] / n.sum()).tolist()


def _candidates(result: Pictures, x: np.ndarray, u: np.ndarray, pull: np.ndarray, entries: list[dict],
                names: list[str], units: list[str], raw: bool, usual: str) -> None:
    """Pulls of the highest scores into `result`: one picture for each event, and one of all of them by object."""
    groups, of_groups = list(group(names)), group_pulls(pull, x, names)
    u = np.where(np.isnan(x), np.nan, u)
    largest = np.abs(of_groups).max() or 1.0
    for i, entry in enumerate(progress(entries, "drawing candidates")):
        event = objects(x[i], names) if raw else []
        known = {o.name: o.name + f" ({o.kind})" * o.name.startswith("obj") + f"\n{o.pt:.0f} GeV"
                 + f", η {o.eta:+.1f}" * (o.kind != UNSEEN) for o in event}
        values = [f"{n}\n{number(v)} {written(unit)}".rstrip() + f" ({there:+.1f})" if raw else f"{n} = {number(v)}"
                  for n, v, unit, there in zip(names, x[i], units, u[i])]
        fig = figure(12 if event else 9, 5.4)
        axes = fig.add_gridspec(1, 3 if event else 2, width_ratios=(1, 1, 1.8)[: 3 if event else 2])
        draw_pulls(by_feature := fig.add_subplot(axes[0]), pull[i], values, usual)
        draw_pulls(fig.add_subplot(axes[1]), of_groups[i], [known.get(g, g) for g in groups], usual)
        if event:
            draw_event(fig.add_subplot(axes[2], projection="polar"), event, dict(zip(groups, of_groups[i])), largest)
        ordinary = "" if np.abs(pull[i]).max() > 1 else "; no feature pulls more than usual"
        fig.suptitle(_title(i + 1, entry) + ordinary, fontsize=13)
        if raw:
            by_feature.set_xlabel(by_feature.get_xlabel() + "\nin brackets: the preprocessed value")
        result.figures[f"candidate_{i + 1}"] = fig
        entry["features"] = [{"feature": names[j], "value": float(x[i, j]), "unit": units[j], "u": float(u[i, j]),
                              "pull": float(pull[i, j])} for j in np.argsort(-np.abs(pull[i]))]
        entry["groups"] = {g: float(p) for g, p in zip(groups, of_groups[i])}
    result.numbers["candidates"] = entries
    ranks = [f"{i + 1}: {e['process'] or _CLASSES[e['label']] or e['event']}" for i, e in enumerate(entries)]
    result.figures["candidates"] = fig = figure(2.8 + 0.62 * len(groups), max(4.2, 1.9 + 0.42 * len(entries)))
    draw_group_pulls(fig.subplots(), of_groups, groups, ranks, largest, usual)


def _title(rank: int, entry: dict) -> str:
    parts = f"event {entry['event']}", f"score {entry['score']:.4g}", _CLASSES[entry["label"]]
    return f"Rank {rank}: {', '.join(filter(None, parts))}" + (f" ({entry['process']})" if entry["process"] else "")
