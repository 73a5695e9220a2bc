"""The figures of the HiggsML study: AUROCs with their intervals, ROC curves, scores, and the derived features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ebm.efficiency import Sample
from ebm.events import Events
from ebm.preprocess import LOG1P
from ebm.study import AUTOENCODERS, COUNT, DETECTORS, ENERGY, PUBLISHED, PUBLISHED_RANGE, VARIANTS, jets_of
from ebm.style import (
    ANOMALOUS,
    BLUE,
    GREY,
    NORMAL,
    ORANGE,
    PURPLE,
    RED,
    Feature,
    Series,
    figure,
    histogram,
    pages,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOOKS = {"before": {"color": BLUE, "marker": "o"}, "after": {"color": ORANGE, "marker": "s"}}
_NAMES = {"before": "HiggsML features", "after": "with derived features"}
_OFFSET = 0.16  # of a row
_FEWEST = 10  # background events above a cut that a ROC curve is drawn for


def draw(y: np.ndarray, scores: dict[tuple[str, str, int], np.ndarray], events: Events,
         numbers: dict) -> dict[str, Figure]:
    """Figures by name, of the `numbers` and `scores` of `ebm.study` for labels y (n,) of events with all features."""
    best = max(AUTOENCODERS, key=lambda d: numbers["detectors"][d]["before"]["auroc"])
    with styled():
        n = events.schema.n_features - len(numbers["derived"])
        features = [Feature(n + j, name) for j, name in enumerate(numbers["derived"])]
        derived = pages(features, _classes(y, events.x), "Derived features, test events", rows=5)[0]
        return {"auroc": _auroc(numbers), "strata": _strata(numbers), "roc": _roc(y, scores, best),
                "scores": _scores(y, scores, numbers, best), "derived_features": derived}


def _rows(ax: Axes, of: dict, entries: Sequence[dict[str, dict]], line: float) -> None:
    """One row for each detector: mean, interval and seeds of each variant; and a line where nothing is found."""
    from matplotlib.ticker import MaxNLocator

    for i, entry in enumerate(entries):
        for k, (v, e) in enumerate(entry.items()):
            at = i + _OFFSET * (2 * k - len(entry) + 1)
            low, high = e["interval"]
            ax.hlines(at, low, high, color=of[v]["color"], linewidth=1.6)
            ax.plot(e["auroc"], at, markersize=6, linestyle="", **of[v], label=_NAMES.get(v) if i == 0 else None)
            ax.plot(e["per_seed"], [at] * len(e["per_seed"]), "|", markersize=9, color=of[v]["color"])
    ax.plot([], [], "k|", markersize=9, label="each seed; lines: 95% intervals")
    ax.axvline(line, color="black", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(entries)), DETECTORS)
    ax.set_ylim(len(entries) - 0.5, -0.5)
    ax.tick_params(axis="y", which="both", left=False, right=False)
    ax.yaxis.minorticks_off()
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    for i in range(1, len(entries)):
        ax.axhline(i - 0.5, color="0.9", linewidth=0.8, zorder=0)


def _auroc(numbers: dict) -> Figure:
    d = [numbers["detectors"][name] for name in DETECTORS]
    fig = figure(12, 4.9)
    left, middle, right = fig.subplots(1, 3, sharey=True, width_ratios=(1.5, 1, 1))
    left.axvspan(*PUBLISHED_RANGE, color=GREY, alpha=0.2, linewidth=0, label="published, “typical”")
    _rows(left, _LOOKS, [{v: e[v] for v in VARIANTS} for e in d], 0.5)
    left.plot(list(PUBLISHED.values()), [DETECTORS.index(name) for name in PUBLISHED], "D", color="black", markersize=6,
              label="published")
    _rows(middle, _LOOKS, [{v: e[v]["within"] for v in VARIANTS} for e in d], 0.5)
    _rows(right, {"gain": {"color": "black", "marker": "o"}}, [{"gain": e["after_minus_before"]} for e in d], 0)
    for ax, text in zip((left, middle, right), ("AUROC", "AUROC at equal number of jets", "change of AUROC")):
        ax.set_xlabel(text)
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=5, columnspacing=1.4)
    return fig


def _strata(numbers: dict) -> Figure:
    fig = figure(12, 4.9)
    panels = np.atleast_1d(fig.subplots(1, len(numbers["strata"]), sharey=True, sharex=True))
    for i, (ax, stratum) in enumerate(zip(panels, numbers["strata"])):
        own = [{v: numbers["detectors"][name][v]["strata"][i] for v in VARIANTS} for name in DETECTORS]
        _rows(ax, _LOOKS, own, 0.5)
        ax.set_title(f"{jets_of(stratum)}\n{stratum['n_signal']:,} signal, {stratum['n_background']:,} background",
                     fontsize=11)
    fig.supxlabel("AUROC", fontsize=12)
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def _roc(y: np.ndarray, scores: dict[tuple[str, str, int], np.ndarray], best: str) -> Figure:
    """1 / background efficiency against signal efficiency, of the first seed, where ten background events are left."""
    fig = figure(7.4, 5.6)
    ax = fig.subplots()
    chance = np.geomspace(0.005, 1, 100)
    ax.plot(chance, 1 / chance, color="black", linestyle=":", linewidth=1.2, label="chance")
    looks = {ENERGY: RED, "isolation forest": BLUE, best: PURPLE, COUNT: GREY}
    for name, colour in looks.items():
        for v, style in zip(VARIANTS if name != COUNT else VARIANTS[:1], ("-", "--")):
            signal, background = (Sample(scores[v, name, 0][y == c], np.ones(np.sum(y == c))) for c in (1, 0))
            cuts = np.unique(background.scores)[::-1]
            e_s, e_b = signal.share(cuts, "left"), background.share(cuts, "left")
            shown = background.number(cuts, "left") >= _FEWEST
            ax.plot(e_s[shown], 1 / e_b[shown], color=colour, linestyle=style,
                    label=f"{name}, {_NAMES[v]}" if name != COUNT else name)
    ax.set_yscale("log")
    ax.set_xlim(0, 1)
    ax.set_ylim(1, 1.1 * max(np.sum(y == 0) / _FEWEST, 2))
    ax.set_xlabel(r"signal efficiency $\epsilon_S$")
    ax.set_ylabel(r"background rejection $1/\epsilon_B$")
    ax.legend(loc="upper right")
    return fig


def _scores(y: np.ndarray, scores: dict[tuple[str, str, int], np.ndarray], numbers: dict, best: str) -> Figure:
    fig = figure(11, 4.6)
    for ax, name, axis, transform in zip(fig.subplots(1, 2), (best, ENERGY),
                                         ("mean squared reconstruction error [background variance]", "energy"),
                                         (LOG1P, 0)):
        v = max(VARIANTS, key=lambda v: numbers["detectors"][name][v]["auroc"])
        histogram(ax, Feature(0, axis, transform=transform), _classes(y, scores[v, name, 0][:, None]))
        ax.set_ylim(top=1.3 * ax.get_ylim()[1])  # room for the legend
        ax.set_ylabel("share of events per bin")
        own = numbers["detectors"][name][v]["per_seed"][0]
        name = name.replace(")", " in training)")  # the loss
        ax.legend(loc="upper right", alignment="left", title=f"{name}, AUROC {own:.3f}\n{_NAMES[v]}")
    return fig


def _classes(y: np.ndarray, x: np.ndarray) -> list[Series]:
    return [Series("background", x[y == 0], NORMAL, "fill"), Series("signal", x[y == 1], ANOMALOUS)]
