"""Where the energy errs, and what it saw in the events it ranks highest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ebm.attribution import (
    HEADLINE,
    draw_faithfulness,
    draw_pulls,
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
    DIVERGING,
    NORMAL,
    Feature,
    Pictures,
    Series,
    figure,
    label,
    number,
    pages,
    progress,
    styled,
    written,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REJECTION = 0.99
_PANELS = 12  # of the features that differ most
_FEWEST = 5  # values of either class for a comparison of a feature
_CHECKED = (30, 300)  # events in the check of the pulls: the highest 5%, within these bounds
_NORMAL = 2000  # normal events that it compares with


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
    for anomalous events, y_test (n,) marks anomalies by 1, or is None. False positives are the normal events above the
    cut that keeps a share 1 - `rejection` of them, false negatives the anomalous ones at or below it.

    Figures: `false_positives` and `false_negatives`, histograms of the features that differ most from the bulk;
    `candidates`, the pulls of the `n_top` highest scores by object, whatever their label; `candidate_1`, ..., each
    one's pulls by feature and object, and the event along the beam where its schema names objects and the events are
    raw; `faithfulness`. `numbers` has what they show, `notes` what could not be said. The pulls are those of
    `attribution.pulls`. Raises DataError on arrays that do not fit together and on scores that are NaN.
    """
    if not 0 <= rejection < 1:
        raise ValueError(f"rejection is {rejection}, expected at least 0 and less than 1")
    scorer = hasattr(model, "attribution")
    x, y, scores = _checked(X_test, y_test, scores, model.n_features if scorer else model.input_dim)
    raw = scorer and model.preprocess
    if raw:
        x = np.where(model.bundle.preprocessing.missing(x), np.float32(np.nan), x)
    names, units = _columns(model if scorer else None, x.shape[1], feature_names, raw)
    result = Pictures(numbers={"n_events": len(x), "sigma": sigmas[model.default_level] if len(sigmas) else None})
    if getattr(model, "threshold", None) is not None:
        result.numbers["above_the_models_threshold"] = int(np.count_nonzero(scores > model.threshold))
    with styled():
        if y is None:
            result.notes.append("no labels: false positives and false negatives cannot be told, only the highest "
                                "scores and their pulls")
        else:
            norm = np.linalg.norm(preprocessed(model, x), axis=1)
            _mistakes(result, _histogrammed(x, names, units), x, norm, y, scores, rejection, process)
        normal = x if y is None else x[y == 0]
        normal = normal[np.random.default_rng(seed).permutation(len(normal))[:_NORMAL]]
        top = np.argsort(-scores, kind="stable")
        titles = [{"event": str(event_id[i]) if event_id is not None else str(i), "score": float(scores[i]),
                   "label": None if y is None else int(y[i]), "process": None if process is None else str(process[i])}
                  for i in top[:n_top]]
        _candidates(result, x[top[:n_top]], normal, titles, names, units, raw, lambda part: pulls(model, part, sigmas))
        if len(normal) < 2:
            result.notes.append(f"{len(normal)} normal event(s), so nothing to compare the check of the pulls with")
        else:
            highest = x[top[: int(np.clip(len(x) // 20, *_CHECKED))]]
            result.numbers["faithfulness"] = check = faithfulness(model, highest, sigmas, normal, seed)
            result.figures["faithfulness"] = fig = figure(7, 5)
            draw_faithfulness(fig.subplots(), check)
    return result


def summary(numbers: dict) -> list[str]:
    """The figures of `error_analysis` in sentences."""
    lines = []
    for kind, text in (("false_positives", "normal events above the cut"),
                       ("false_negatives", "anomalous events not above the cut")):
        n = numbers.get(kind, {"n": 0})
        if n["n"]:
            lines.append(f"{n['n']:,} of {n['of']:,} {text} {numbers['cut']:.4g}: half of them lie farther out (|u|) "
                         f"than {n['norm_quantile']:.0%} of normal events")
            if leading := [f"{f['feature']} ({f['ks']:.2f})" for f in n["features"][:3] if f["ks"] >= 0]:
                lines[-1] += f"; most unlike normal events in (KS) {', '.join(leading)}"
            if n["processes"]:
                lines[-1] += "; " + ", ".join(f"{share:.0%} {name}" for name, share in n["processes"].items())
    if check := numbers.get("faithfulness"):
        i = check["removed"].index(HEADLINE) if HEADLINE in check["removed"] else -1
        d, (top, random) = check["top_minus_random"][i], (check["drop"][k][i] for k in ("largest pulls", "random"))
        lines.append(f"removing the {check['removed'][i]} features with the largest pulls {_moves(top)} the energy of "
                     f"the {check['n_events']:,} highest-scoring events by {abs(top):.2f} background spreads, removing "
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
              scores: np.ndarray, rejection: float, process: np.ndarray | None) -> None:
    """False positives and negatives into `result`: a picture of the features that tell most, and numbers."""
    normal, anomalous = y == 0, y == 1
    if normal.sum() < 2:
        result.notes.append(f"{normal.sum()} of {len(y)} events are normal, too few for a cut, so neither false "
                            "positives nor false negatives are shown")
        return
    if not anomalous.any():
        result.notes.append(f"none of {len(y)} events is anomalous, so there are no false negatives")
    cut = cut_at_rejection(scores[normal], min(rejection, 1 - 1 / normal.sum()))
    high = scores > cut
    result.numbers.update(rejection=rejection, cut=cut)
    bulk, found = Series("normal", x[normal], NORMAL, "fill"), Series("anomalous", x[anomalous], ANOMALOUS)
    kinds = {"false_positives": (normal & high, normal, [bulk, *([found] if anomalous.any() else [])])}
    if anomalous.any():
        above = Series("anomalous above the cut", x[anomalous & high], ANOMALOUS)
        kinds["false_negatives"] = (anomalous & ~high, anomalous, [bulk, above] if len(above.x) else [bulk])
    for kind, (rows, of, others) in progress(kinds.items(), "looking at mistakes"):
        name = kind.replace("_", " ")
        if not rows.any():
            result.notes.append(f"no {name} at the cut {cut:.4g}")
            result.numbers[kind] = {"n": 0, "of": int(of.sum())}
            continue
        differs = {f: _ks(x[rows, f.column], x[normal, f.column]) for f in features}
        leading = sorted(features, key=lambda f: -np.nan_to_num(differs[f], nan=-1.0))
        quantiles = np.searchsorted(np.sort(norm[normal]), norm[rows]) / normal.sum()
        shares = {} if process is None else dict(zip(*_shares(process[rows])))
        result.numbers[kind] = {"n": int(rows.sum()), "of": int(of.sum()), "norm_quantile": float(np.median(quantiles)),
                                "processes": shares,
                                "features": [{"feature": f.name, "ks": differs[f]} for f in leading]}
        points = Series(f"{name} ({rows.sum():,} of {of.sum():,})", x[rows], "black", "errorbar")
        title = f"{name[0].upper()}{name[1:]}: the features in which they differ most from normal events"
        result.figures[kind] = pages(leading[:_PANELS], [*others, points], title, rows=3)[0]


def _ks(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of two samples without their missing values; NaN where either is too small."""
    from scipy.stats import ks_2samp

    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    return float(ks_2samp(a, b, method="asymp").statistic) if min(len(a), len(b)) >= _FEWEST else float("nan")


def _shares(process: np.ndarray) -> tuple[list[str], list[float]]:
    names, n = np.unique(process, return_counts=True)
    order = np.argsort(-n)
    return names[order].tolist(), (n[order] / n.sum()).tolist()


def _candidates(result: Pictures, x: np.ndarray, normal: np.ndarray, entries: list[dict], names: list[str],
                units: list[str], raw: bool, pulls_of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Pulls of the highest scores into `result`: one picture for each event, and one of all of them by object."""
    groups = group(names)
    pull, usual = pulls_of(x), pulls_of(normal) if len(normal) else np.zeros_like(x)
    of_groups = group_pulls(pull, x, groups)
    rms = np.sqrt(np.mean(usual**2, axis=0))
    rms_of_groups = [float(np.linalg.norm(rms[members])) for members in groups.values()]
    largest = np.abs(of_groups).max() or 1.0
    for i, entry in enumerate(progress(entries, "drawing candidates")):
        event = objects(x[i], names) if raw else []
        known = {o.name: o.name + f" ({o.kind})" * o.name.startswith("obj") + f": {o.pt:.0f} GeV"
                 + f", η {o.eta:+.1f}" * (o.kind != UNSEEN) for o in event}
        with_values = [f"{n} = {number(v)} {written(u) if raw else ''}".rstrip() for n, v, u in zip(names, x[i], units)]
        fig = figure(16.5 if event else 11, 5.6)
        axes = fig.add_gridspec(1, 3 if event else 2, width_ratios=(1, 1, 1.6)[: 3 if event else 2])
        draw_pulls(fig.add_subplot(axes[0]), pull[i], with_values, rms)
        draw_pulls(fig.add_subplot(axes[1]), of_groups[i], [known.get(g, g) for g in groups], rms_of_groups)
        if event:
            draw_event(fig.add_subplot(axes[2], projection="polar"), event, dict(zip(groups, of_groups[i])), largest)
        fig.suptitle(_title(i + 1, entry), fontsize=13)
        result.figures[f"candidate_{i + 1}"] = fig
        entry["features"] = [{"feature": names[j], "value": float(x[i, j]), "unit": units[j],
                              "pull": float(pull[i, j])} for j in np.argsort(-np.abs(pull[i]))]
        entry["groups"] = {g: float(p) for g, p in zip(groups, of_groups[i])}
    result.numbers["candidates"] = entries
    result.figures["candidates"] = _overview(of_groups, list(groups), entries, largest)


def _title(rank: int, entry: dict) -> str:
    truth = {None: "", 0: ", labelled normal", 1: ", labelled anomalous"}[entry["label"]]
    return f"Rank {rank}: event {entry['event']}, score {entry['score']:.4g}{truth}" + (
        f" ({entry['process']})" if entry["process"] else "")


def _overview(pull_of: np.ndarray, groups: list[str], entries: list[dict], largest: float) -> Figure:
    fig = figure(2.8 + 0.62 * len(groups), max(4.2, 1.9 + 0.42 * len(entries)))
    ax = fig.subplots()
    image = ax.imshow(pull_of, cmap=DIVERGING, vmin=-largest, vmax=largest, aspect="auto")
    for (i, j), pull in np.ndenumerate(pull_of):
        if pull:
            ax.text(j, i, f"{pull:+.2f}", ha="center", va="center", fontsize=8,
                    color="white" if abs(pull) > 0.65 * largest else "black")
    ax.set_xticks(range(len(groups)), groups, rotation=45, ha="right")
    truth = {None: "", 0: "normal", 1: "anomalous"}
    ax.set_yticks(range(len(entries)), [f"{i + 1}: {e['process'] or truth[e['label']] or e['event']}"
                                        for i, e in enumerate(entries)])
    ax.tick_params(which="both", top=False, right=False, direction="out")
    ax.minorticks_off()
    ax.set_ylabel("rank by score")
    fig.colorbar(image, ax=ax, label=label("pull of the object", "background spread"))
    return fig
