"""A first look at events: every feature, their correlations, and how far anomalous events lie from normal ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from ebm.events import DataError, Events, Schema, split
from ebm.metrics import auroc
from ebm.preprocess import Preprocessing
from ebm.style import (
    ANOMALOUS,
    DIVERGING,
    GREY,
    NORMAL,
    Feature,
    Pictures,
    Series,
    figure,
    histogram,
    pages,
    progress,
    styled,
)

_POINTS = 4000  # events of one class in the scatter plot
_DISTANT = 1500  # events of one class whose distances are taken: two million pairs
_FEWEST = 10  # events below which a correlation is not shown


def explore(events: Events, *, seed: int = 0) -> Pictures:
    """`explore_data` of a file: background of the training folds, all events of the test folds.

    Raises DataError where either is empty.
    """
    folds = split(events)
    x = {"training": events[folds.train].background().x, "test": events[folds.test].x}
    for name, part in x.items():
        if len(part) == 0:
            raise DataError(f"{events.source or 'the data'}: no {'background ' * (name == 'training')}event in the "
                            f"{name} folds ({len(events)} events in all)")
    schema, label = events.schema, None if events.label is None else events.label[folds.test]
    marker = schema.missing_marker
    train, test = (part if marker is None else np.where(part == np.float32(marker), np.nan, part)
                   for part in x.values())
    return explore_data(train, test, label, schema.features, units=schema.units, seed=seed)


def explore_data(X_train: np.ndarray, X_test: np.ndarray, y_test: np.ndarray | None,
                 feature_names: Sequence[str] | None = None, *, units: Sequence[str] | None = None,
                 seed: int = 0) -> Pictures:
    """Pictures of background X_train (n, D) and of the events X_test (m, D), in which y_test (m,) marks anomalies by 1.

    NaN is a missing value. Without labels, or with one class, the pictures show what there is, and `notes` says what
    they lack. Figures: `features_1`, ... (histograms), `pca`, `correlation`, `distances`; their numbers are in
    `numbers`. PCA, correlations and distances are those of the preprocessed features: tails compressed, missing values
    imputed, in units of the training background's spread. Events are counted, not weighted. Raises DataError on
    arrays that do not fit together, on fewer than two training events, and where no feature has a spread.
    """
    train, test, y = _checked(X_train, X_test, y_test)
    d = train.shape[1]
    names = tuple(feature_names) if feature_names is not None else tuple(f"x{j}" for j in range(d))
    units = tuple(units) if units is not None else ("",) * d
    for what, given in (("feature names", names), ("units", units)):
        if len(given) != d:
            raise DataError(f"{len(given)} {what} given for {d} features")
    schema = Schema("explored", names, units, optional=(True,) * d)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # constant features are named in the notes
        preprocessing = Preprocessing.fit(train, schema)
    varied = preprocessing.inv_std != 0
    if not varied.any():
        raise DataError(f"none of the {d} features has a spread in the {len(train)} training events")
    if len(infinite := np.flatnonzero(np.isinf(test).any(axis=0))):
        raise DataError(f"feature {names[infinite[0]]!r} is infinite in the test events, expected numbers")
    notes = []
    if not varied.all():
        notes.append("no spread in the training background, so left out of PCA, correlations and distances: "
                     + ", ".join(np.array(names)[~varied]))
    groups = {"test": test} if y is None else {"normal": test[y == 0], "anomalous": test[y == 1]}
    if y is None:
        notes.append("no labels: test events are shown as one class, beside the training background")
    for name in [name for name, x in groups.items() if len(x) == 0]:
        notes.append(f"no {name} event among the {len(test)} test events, so nothing of theirs is shown")
        del groups[name]

    series = [Series("training background", train, GREY, "fill")]
    series += [Series(f"{name}, test" if name != "test" else "test", x, _colour(name)) for name, x in groups.items()]
    features = [Feature(j, *column) for j, column in enumerate(zip(names, schema.units, preprocessing.transform))]
    samples = {"training": train, **groups}
    u = {name: preprocessing(x)[:, varied] for name, x in samples.items()}
    known = {name: ~np.isnan(x[:, varied]) for name, x in samples.items()}
    rng = np.random.default_rng(seed)
    steps = {"pca": lambda: _pca(u, np.array(names)[varied], rng),
             "correlation": lambda: _correlations(u, known, np.array(names)[varied]),
             "distances": lambda: _distances(u, rng)}
    numbers = {"n_training": len(train), **{f"n_{name}": len(x) for name, x in groups.items()},
               "features": _per_feature(features, samples)}
    with styled():
        figures = {f"features_{i + 1}": page for i, page in enumerate(pages(features, series, "Features"))}
        for name in progress(steps, "exploring"):
            picture, numbers[name], lacking = steps[name]()
            figures |= {name: picture} if picture else {}
            notes += [lacking] if lacking else []
    return Pictures(figures, numbers, notes)


def _checked(train: np.ndarray, test: np.ndarray, y: np.ndarray | None) -> tuple:
    train, test = np.asarray(train, np.float64), np.asarray(test, np.float64)
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
        raise DataError(f"expected X_train (n, D) and X_test (m, D), given {train.shape} and {test.shape}")
    if len(train) < 2:
        raise DataError(f"expected at least 2 training background events, to see a spread, given {len(train)}")
    return train, test, checked_labels(y, len(test))


def checked_labels(y: np.ndarray | None, n: int) -> np.ndarray | None:
    """Labels (n,) of 0 and 1, or None; DataError on others."""
    y = None if y is None else np.asarray(y)
    if y is not None and (y.shape != (n,) or not np.isin(y, (0, 1)).all()):
        raise DataError(f"expected y_test of shape ({n},) with 0 (normal) and 1 (anomalous), given shape {y.shape} "
                        f"with {np.unique(y)[:5]}")
    return y


def _colour(name: str) -> str:
    return ANOMALOUS if name == "anomalous" else NORMAL


def _per_feature(features: Sequence[Feature], samples: dict[str, np.ndarray]) -> list[dict]:
    """What of every sample is missing, its quartiles, and how far apart normal and anomalous events are (KS)."""
    from scipy.stats import ks_2samp

    result = []
    for f in features:
        entry: dict = {"feature": f.name, "unit": f.unit}
        present = {name: x[~np.isnan(x[:, f.column]), f.column] for name, x in samples.items()}
        for name, values in present.items():
            quartiles = np.quantile(values, (0.25, 0.5, 0.75)).tolist() if len(values) else [float("nan")] * 3
            entry[name] = {"missing": 1 - len(values) / len(samples[name]), "quartiles": quartiles}
        pair = [present.get(name, []) for name in ("normal", "anomalous")]
        entry["ks"] = float(ks_2samp(*pair).statistic) if all(map(len, pair)) else float("nan")
        result.append(entry)
    return result


def _pca(u: dict[str, np.ndarray], names: np.ndarray, rng: np.random.Generator) -> tuple:
    """Principal components of the training background; the other samples in their plane."""
    from sklearn.decomposition import PCA

    if len(names) < 2:
        return None, None, f"only {names[0]} has a spread, so there is no second principal component"
    pca = PCA(n_components=2, svd_solver="full").fit(u["training"])
    share, leading = pca.explained_variance_ratio_, np.argsort(-np.abs(pca.components_), axis=1)[:, :3]
    shown = {n: pca.transform(x[rng.permutation(len(x))[:_POINTS]]) for n, x in u.items()
             if n != "training" or len(u) == 1}
    fig = figure(7.5, 7)
    grid = fig.add_gridspec(2, 2, width_ratios=(5, 1), height_ratios=(1, 5))
    ax = fig.add_subplot(grid[1, 0])
    top, right = fig.add_subplot(grid[0, 0], sharex=ax), fig.add_subplot(grid[1, 1], sharey=ax)
    everything = np.concatenate(list(shown.values()))
    low, high = np.quantile(everything, (0.001, 0.999), axis=0)
    margin = 0.06 * (high - low) + 1e-6
    low, high = low - margin, high + margin
    for name, z in shown.items():
        marker, alpha = ("^", 0.6) if name == "anomalous" else ("o", 0.35)
        ax.scatter(*z.T, color=_colour(name), marker=marker, s=np.clip(8000 / len(z), 6, 40), alpha=alpha, linewidths=0,
                   rasterized=True, label=name)
        for side, axis, orientation in ((top, 0, "vertical"), (right, 1, "horizontal")):
            side.hist(z[:, axis], bins=np.linspace(low[axis], high[axis], 41), density=True, histtype="step",
                      color=_colour(name), orientation=orientation)
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(low[1], high[1])
    for setter, i in ((ax.set_xlabel, 0), (ax.set_ylabel, 1)):
        setter(f"principal component {i + 1} [background spread], {share[i]:.0%} of the variance\n"
               f"mostly {', '.join(names[leading[i]])}")
    for side in (top, right):
        side.tick_params(labelbottom=False, labelleft=False)
        side.set_axis_off()
    for handle in ax.legend(loc="best").legend_handles:
        handle.set(alpha=1, sizes=[50])
    components = [{"variance": float(share[i]), "leading": names[leading[i]].tolist()} for i in range(2)]
    return fig, {"components": components}, None


def correlations(u: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Pearson correlations (D, D) of columns u (n, D), each over the events in which both values are known.

    NaN where there are fewer than ten of those, or no spread among them.
    """
    w = known.astype(np.float64)
    z = np.where(known, u - (u * w).sum(0) / np.maximum(w.sum(0), 1), 0.0)
    n = w.T @ w
    mean, square = z.T @ w / np.maximum(n, 1), z.T**2 @ w / np.maximum(n, 1)  # of row i over events with i and j
    covariance = z.T @ z / np.maximum(n, 1) - mean * mean.T
    variance = square - mean**2
    scale = np.sqrt(np.maximum(variance * variance.T, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((n >= _FEWEST) & (scale > 1e-9), np.clip(covariance / scale, -1, 1), np.nan)


def _correlations(u: dict[str, np.ndarray], known: dict[str, np.ndarray], names: np.ndarray) -> tuple:
    """One square: normal events below the diagonal, anomalous ones above it, where both are there."""
    below = next(name for name in ("normal", "test", "training") if name in u)
    c = correlations(u[below], known[below])
    title, numbers = f"{below} events", {"features": names.tolist(), below: c.tolist()}
    if "anomalous" in u:
        upper = correlations(u["anomalous"], known["anomalous"])
        numbers["anomalous"] = upper.tolist()
        c = np.where(np.triu(np.ones_like(c), 1) > 0, upper, c)
        title = f"below the diagonal: {below} events; above: anomalous events"
    d = len(names)
    size = max(5.5, 0.19 * d + 2.6)
    fig = figure(size + 1.2, size)
    ax = fig.subplots()
    ax.set_facecolor("0.8")
    image = ax.imshow(c, cmap=DIVERGING, vmin=-1, vmax=1)
    ax.set_xticks(range(d), names, rotation=90, fontsize=8)
    ax.set_yticks(range(d), names, fontsize=8)
    ax.tick_params(which="both", top=False, right=False, direction="out")
    ax.minorticks_off()
    ax.axline((0, 0), slope=1, color="black", linewidth=0.6)
    ax.set_title(f"{title} (grey: not known)", fontsize=12)
    fig.colorbar(image, ax=ax, shrink=0.8, label="Pearson correlation of preprocessed features")
    return fig, numbers, None


def _distances(u: dict[str, np.ndarray], rng: np.random.Generator) -> tuple:
    """Euclidean distances between pairs: no event is paired with itself, and every pair has one normal event."""
    from scipy.spatial.distance import cdist

    base = next((name for name in ("normal", "test") if name in u), "training")
    first, second = np.array_split(u[base][rng.permutation(len(u[base]))[: 2 * _DISTANT]], 2)
    if len(second) == 0:
        return None, None, f"one {base} event, so there is no distance between two"
    pairs = {f"{base} - {base}": cdist(first, second).ravel()}
    if "anomalous" in u:
        other = u["anomalous"][rng.permutation(len(u["anomalous"]))[:_DISTANT]]
        pairs[f"{base} - anomalous"] = cdist(first, other).ravel()
    series = [Series(f"{name} ({len(distance):,} pairs)", distance[:, None], *look) for (name, distance), look in
              zip(pairs.items(), ((NORMAL, "fill"), (ANOMALOUS, "step")))]
    fig = figure(7, 5)
    ax = fig.subplots()
    histogram(ax, Feature(0, "distance between two events", "background spread"), series)
    ax.set_ylabel("share of pairs per bin")
    ax.set_ylim(top=1.2 * ax.get_ylim()[1])  # room for the legend
    ax.legend(loc="upper right")
    numbers: dict = {"median": {name: float(np.median(distance)) for name, distance in pairs.items()}}
    if len(pairs) == 2:
        near, far = pairs.values()
        y = np.repeat([0, 1], [len(near), len(far)])
        numbers["anomalous_is_farther"] = farther = auroc(y, np.concatenate([near, far]))
        ax.set_title(f"the pair with an anomalous event is farther apart in {farther:.1%} of comparisons", fontsize=11)
    return fig, numbers, None
