"""What `python -m ebm benchmark` writes for people: its figures in Markdown, published ones beside them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ebm.events import DataError

_PUBLISHED_FILE = "dte_readme_auroc_semi.csv"
_PUBLISHED = {"IForest": "isolation forest", "LOF": "LOF", "KNN": "KNN", "DDPM": "DDPM", "DTE-NP": "DTE-NP",
              "DTE-IG": "DTE-IG", "DTE-C": "DTE-C"}
_KNN, _NAMED = "KNN (k=5)", ("KNN (k=5)", "LOF", "isolation forest")
_ABOUT = {
    "HiggsML": "ATLAS Higgs boson challenge, all 30 features: folds 0-5 of the event numbers train, 8-9 test.",
    "LHCO": "LHC Olympics 2020 R&D, signal region, without mjj: the background of one file trains, another one is "
            "tested.",
    "LHCO-log-tau21": "The same with the logarithm of tau21, at least 0.01, of both jets: a physics choice that turns "
                      "two-prong jets, which are rare and have low values, into a tail.",
    "LHCO-with-mjj": "The same as LHCO with mjj, in which the background falls and the signal is a peak.",
}
_WARNING = ("**Other splits, other preprocessing, often another number of rows: published values show where a table is "
            "hard; their difference from ours is no comparison of detectors.**")
_STUDIES = {
    "HiggsML": "The README of the study “Particle Physics-Inspired Anomaly Detection” gives about 58 for an "
               "autoencoder and about 63 for one with a tight bottleneck, on the file of the Kaggle challenge.",
    "LHCO": "Papers on this signal region (CATHODE, arXiv:2109.00546, and others) give the significance improvement of "
            "classifiers against side bands; no AUROC of a detector trained on background alone stands here.",
}


def published(folder: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """AUROC x 100 of Livernoche et al., trained on normal rows, of the tables with these names; {} without the file.

    Raises DataError where the file `dte_readme_auroc_semi.csv` below the folder is not that table.
    """
    path = next(iter(sorted(folder.rglob(_PUBLISHED_FILE))), None)
    if path is None:
        return {}
    with open(path, newline="") as f:
        rows = {row.get("Dataset", "").lower(): row for row in csv.DictReader(f)}
    result = {}
    for name in names:
        if row := rows.get(name.lower()):
            values = {d: re.match(r"\**(\d+\.?\d*)", row.get(d) or "") for d in _PUBLISHED}
            if absent := [d for d, value in values.items() if value is None]:
                raise DataError(f"{path}, row {row['Dataset']}: expected a number for {', '.join(absent)}")
            result[name] = {d: float(value.group(1)) for d, value in values.items()}
    return result


def summary(result: dict) -> list[str]:
    """A line for each kind of data, from the numbers alone."""
    datasets, seeds = _complete(result), _seeds(result)
    lines = []
    if tables := _of(datasets, "ADBench"):
        detectors = _common(tables.values())
        means = {d: np.mean([_mean(pieces, d) for pieces in tables.values()]) for d in detectors}
        best = max(detectors[1:], key=means.get)
        shown = dict.fromkeys(("energy", best, *(d for d in _NAMED if d in means)))
        wins = sum(_mean(pieces, "energy") > _mean(pieces, _KNN) for pieces in tables.values())
        lines.append(f"**ADBench, {len(tables)} tables, {seeds}:** " + ", ".join(
            f"{d} {means[d]:.1f}" for d in shown) + f"; the energy is better than {_KNN} on {wins} of {len(tables)}.")
    for name, pieces in datasets.items():
        if pieces[0]["group"] != "ADBench":
            best = max(_common([pieces])[1:], key=lambda d: _mean(pieces, d))
            low, high = _interval(pieces, best)
            verdict = "above" if low > 0 else "below" if high < 0 else "not told apart"
            lines.append(f"**{name}, {seeds}:** energy {_mean(pieces, 'energy'):.1f}, best of the others {best} "
                         f"{_mean(pieces, best):.1f}: {verdict}, {_minus(pieces, best)}.")
    return lines or ["No data set is complete."]


def markdown(result: dict) -> str:
    """The whole page, of the data sets of which every seed is there."""
    datasets = _complete(result)
    parts = ["# Every detector on every data set", "AUROC x 100, of one default for all data sets.",
             "\n".join(f"- {line}" for line in summary(result)), *_how(result, datasets)]
    for name, pieces in datasets.items():
        if pieces[0]["group"] != "ADBench":
            parts += [f"## {name}", f"{_ABOUT[name]} {_sizes(pieces[0])}.", _physics(pieces)]
    if tables := _of(datasets, "ADBench"):
        parts += ["## ADBench", "Half of the normal rows train; the other half and all anomalies are tested. Mean over "
                  "the tables, ± its standard deviation over seeds.", _over_tables(tables), "### Table by table",
                  "Place: of the energy among these detectors. Bold: the energy, where it is the best.",
                  _by_table(tables)]
    parts += _published(result, datasets)
    reasons = result["left_out"] | _incomplete(result, datasets)
    constant = {name: pieces[0]["constant"] for name, pieces in datasets.items() if pieces[0]["constant"]}
    if reasons or constant:
        parts += ["## Left out", "\n".join(
            [f"- {name}: {reason}" for name, reason in reasons.items()] +
            [f"- {name}: constant in training, so without influence: {', '.join(c)}" for name, c in constant.items()])]
    return "\n\n".join(parts) + "\n"


def _how(result: dict, datasets: dict[str, list[dict]]) -> list[str]:
    recipe, every = result["recipe"], [p for pieces in datasets.values() for p in pieces]
    if not every:
        return []
    settings = ", ".join(f"{name} {value}" for name, value in recipe["settings"].items()
                         if value is not None and name not in ("contamination", "random_state", "steps"))
    steps, levels = ({p[k] for p in every} for k in ("steps", "level"))
    level = "" if None in levels else f", level {_range(levels)}"
    runs = [p["run"] for p in every]
    machines, commits = (", ".join(dict.fromkeys(texts)) for texts in (
        (f"{r['cpu']} ({r['workers']} at a time on {r['cores']} cores)" for r in runs),
        (r["commit"] or "unknown" for r in runs)))
    dates = sorted({r["date"][:10] for r in runs})
    versions = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
    return [f"The energy is that of `EBMDetector()`: {settings}; {_range(steps)} steps{level}. All "
            "detectors are fitted on the same normal events with the same preprocessing, and see no label. KNN and LOF "
            "look for neighbours among at most 20,000 of them. "
            "± is the standard deviation over seeds: on ADBench of split and training, on HiggsML and LHCO of the "
            "training alone, where the interval of a difference is the paired 95% bootstrap of the test events, its "
            "ends averaged over seeds.",
            f"{machines}; each piece on one thread, so that the seconds are of one core. "
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {commits}, {versions}."]


def _physics(pieces: list[dict]) -> str:
    detectors, within = _by_mean([pieces]), "within" in pieces[0]
    rows = []
    for d in detectors:
        cells = [d, _cell([100 * p["auroc"][d] for p in pieces], d == "energy" == max(
            detectors, key=lambda other: _mean(pieces, other))), "" if d == "energy" else _minus(pieces, d)]
        if within:
            cells.append(_cell([100 * p["within"][d] for p in pieces if p["within"][d] is not None]))
        rows.append([*cells, *_seconds(pieces, d)])
    return _table(["detector", "AUROC", "energy minus it, paired 95%", *(["within a number of jets"] if within else []),
                   "fit, s", "score, s"], rows)


def _over_tables(tables: dict[str, list[dict]]) -> str:
    every = list(tables.values())
    detectors = _by_mean(every)
    means = {d: [np.mean([100 * of_seed[d] for of_seed in seed]) for seed in zip(
        *([p["auroc"] for p in pieces] for pieces in every))] for d in detectors}
    rows = []
    for d in detectors:
        wins = sum(_mean(pieces, "energy") > _mean(pieces, d) for pieces in every)
        flat = [p for pieces in every for p in pieces]
        rows.append([d, _cell(means[d], d == "energy" == max(detectors, key=lambda other: np.mean(means[other]))),
                     "" if d == "energy" else f"{wins} of {len(tables)}", *_seconds(flat, d)])
    return _table(["detector", "mean AUROC", "energy better on", "fit, s", "score, s"], rows)


def _by_table(tables: dict[str, list[dict]]) -> str:
    detectors = _by_mean(list(tables.values()))
    rows = []
    for name, pieces in tables.items():
        place = 1 + sum(_mean(pieces, d) > _mean(pieces, "energy") for d in detectors)
        p = pieces[0]
        rows.append([name, f"{place} of {len(detectors)}", f"{p['n_features']}", f"{p['n_train']:,}",
                     f"{p['n_anomalies']:,}", *(_cell([100 * p["auroc"][d] for p in pieces],
                                                      d == "energy" and place == 1) for d in detectors)])
    return _table(["table", "place", "D", "train", "anomalies", *detectors], rows)


def _published(result: dict, datasets: dict[str, list[dict]]) -> list[str]:
    tables = {name: pieces for name, pieces in _of(datasets, "ADBench").items() if name in result["published"]}
    studies = [text for group, text in _STUDIES.items() if _of(datasets, group)]
    if not tables and not studies:
        return []
    parts = ["## Published values", _WARNING, *studies]
    if tables:
        ours = ("energy", *(d for d in _NAMED if d in _common(tables.values())))
        rows = [[name, *(_mean(pieces, d) for d in ours), *result["published"][name].values()]
                for name, pieces in tables.items()]
        rows.append([f"mean of {len(rows)}", *np.mean([row[1:] for row in rows], axis=0)])
        parts += ["ADBench: Livernoche, Jain, Hezaveh and Ravanbakhsh, “On Diffusion Modeling for Anomaly Detection” "
                  "(ICLR 2024), trained on normal rows, mean of 5 seeds.",
                  _table(["table", *(f"{d}, ours" for d in ours), *(f"{d}, published" for d in _PUBLISHED.values())],
                         [[name, *(f"{v:.1f}" for v in values)] for name, *values in rows])]
    return parts


def _complete(result: dict) -> dict[str, list[dict]]:
    """The pieces of seeds 0, 1, ... of each data set that has them all."""
    found: dict[str, list[dict]] = {}
    for p in result["pieces"]:
        if p["seed"] < result["seeds"] and "error" not in p:
            found.setdefault(p["data"], []).append(p)
    return {name: pieces for name, pieces in found.items() if len(pieces) == result["seeds"]}


def _incomplete(result: dict, datasets: dict[str, list[dict]]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for p in result["pieces"]:
        if p["data"] not in datasets:
            reasons[p["data"]] = reasons.get(p["data"]) or (
                f"seed {p['seed']} failed: {p['error']}" if "error" in p else "")
    return {name: reason or "not every seed is there yet" for name, reason in reasons.items()}


def _of(datasets: dict[str, list[dict]], group: str) -> dict[str, list[dict]]:
    return {name: pieces for name, pieces in datasets.items() if pieces[0]["group"] == group}


def _common(every: Iterable[list[dict]]) -> list[str]:
    """The detectors that all of these pieces have, the energy first."""
    pieces = [p for own in every for p in own]
    return [d for d in pieces[0]["auroc"] if all(d in p["auroc"] for p in pieces)]


def _by_mean(every: list[list[dict]]) -> list[str]:
    first, *others = _common(every)
    return [first, *sorted(others, key=lambda d: -np.mean([_mean(pieces, d) for pieces in every]))]


def _mean(pieces: list[dict], detector: str) -> float:
    return 100 * float(np.mean([p["auroc"][detector] for p in pieces]))


def _interval(pieces: list[dict], detector: str) -> tuple[float, float]:
    low, high = 100 * np.mean([p["energy_minus"][detector] for p in pieces], axis=0)
    return float(low), float(high)


def _minus(pieces: list[dict], detector: str) -> str:
    low, high = _interval(pieces, detector)
    return f"{_mean(pieces, 'energy') - _mean(pieces, detector):+.1f} [{low:+.1f}, {high:+.1f}]"


def _seconds(pieces: list[dict], detector: str) -> list[str]:
    return ["< 0.1" if s < 0.1 else f"{s:.1f}" if s < 10 else f"{s:.0f}"
            for s in np.mean([p["seconds"][detector] for p in pieces], axis=0)]


def _sizes(p: dict) -> str:
    return (f"{p['n_features']} features; {p['n_train']:,} normal events train, {p['n_test'] - p['n_anomalies']:,} and "
            f"{p['n_anomalies']:,} anomalies test")


def _seeds(result: dict) -> str:
    return f"{result['seeds']} seed{'s' if result['seeds'] > 1 else ''}"


def _range(values: Iterable[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _cell(values: Sequence[float], bold: bool = False) -> str:
    if not len(values):
        return "-"
    text = f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")
    return f"**{text}**" if bold else text


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
