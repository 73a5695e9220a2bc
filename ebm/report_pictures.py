"""Pictures of a report: the energies of each class, the efficiency of a cut on them, and how the training went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ebm.efficiency import clopper_pearson
from ebm.style import ANOMALOUS, BLUE, GREY, ORANGE, PURPLE, RED, VIOLET, figure, label, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 10  # of a variable, with as many events in each
_MOST_COUNTS = 15  # values of a multiplicity that get a bin each
_TAIL = 0.001
_ENDS = (0.01, 0.98)  # of the axis of a variable


def plot_energies(energy: np.ndarray, classes: dict[str, np.ndarray], cut: float | None, sigma: float | None) -> Figure:
    """The energies (n,) of each class, given by its rows (n,) bool, with the threshold; where there are two, below
    them the ratio of the second to the first."""
    import mplhep
    from hist import Hist, axis
    from hist.intervals import poisson_interval, ratio_uncertainty

    parts = {name: energy[rows] for name, rows in classes.items()}
    low, high = (f(np.quantile(e, q) for e in parts.values()) for f, q in ((min, _TAIL), (max, 1 - _TAIL)))
    high = max([high, next(iter(parts.values())).max(), *([] if cut is None else [cut])])
    margin = 0.02 * (high - low) or 0.5
    bins = np.linspace(low - margin, high + margin, 61)
    with styled():
        fig = figure(8.2, 5.6 if len(parts) == 2 else 4.4)
        axes = fig.subplots(len(parts), sharex=True, squeeze=False, height_ratios=(3, 1.2)[: len(parts)])[:, 0]
        counts, shares = [], []
        for name, e in parts.items():
            n = Hist(axis.Variable(bins)).fill(np.clip(e, bins[0], np.nextafter(bins[-1], -np.inf))).values()
            counts.append(n)
            shares.append(np.where(n > 0, n / len(e), np.nan))  # a logarithmic axis has no place for zero
            as_drawn = {"ax": axes[0], "label": f"{name} ({len(e):,})"}
            if name != "signal":
                mplhep.histplot(shares[-1], bins, histtype="fill", alpha=0.6, color=GREY, **as_drawn)
                continue
            mplhep.histplot(shares[-1], bins, histtype="errorbar", markersize=0, color=ANOMALOUS, xerr=True,
                            yerr=np.abs(poisson_interval(n) - n) / len(e), **as_drawn)
            axes[0].stairs(shares[-1], bins, baseline=None, color=ANOMALOUS)
        for ax, top in zip(axes, (0.88, 1)) if cut is not None else ():  # the legend is above it
            ax.axvline(cut, 0, top, color="black", linestyle="--", linewidth=1.2, label=f"threshold {cut:.5g}")
        axes[0].set_yscale("log")
        axes[0].set_ylim(0.5 * min(map(np.nanmin, shares)), 20 * max(map(np.nanmax, shares)))
        axes[0].set_ylabel("share of events per bin")
        axes[0].legend(ncols=len(parts) + (cut is not None), loc="upper center")
        if len(parts) == 2:
            both = (counts[0] > 0) & (counts[1] > 0)
            of, to = (n[both] for n in counts)
            scale = len(parts["background"]) / len(parts["signal"])
            middle = (bins[1:] + bins[:-1])[both] / 2
            axes[1].errorbar(middle, scale * to / of, scale * ratio_uncertainty(to, of, "poisson-ratio"), fmt="o",
                             markersize=3.5, color=ANOMALOUS)
            axes[1].axhline(1, color="black", linewidth=0.8)
            axes[1].set_yscale("log")
            axes[1].set_ylabel(" /\n".join(reversed(parts)))
        axes[-1].set_xlim(bins[0], bins[-1])
        axes[-1].set_xlabel("energy" + (rf" at noise level $\sigma$ = {sigma:.3g}" if sigma else "") + " (no unit)")
        return fig


def efficiencies(x: np.ndarray, passed: np.ndarray, classes: dict[str, np.ndarray]) -> dict:
    """The share that passes in bins of a variable x (n,), NaN where missing, for each class of rows (n,) bool.

    `edges` (b + 1,) of bins with as many events in each, or one bin for each value of a multiplicity; what lies beyond
    is counted in the bins at the ends. For each class b entries `rate`, `interval` (95% Clopper-Pearson) and `n`; NaN
    where n = 0. Empty where the variable has fewer than two values.
    """
    x = x.astype(np.float64)
    known = x[~np.isnan(x)]
    values = np.unique(known)
    if len(values) < 2:
        return {}
    low, high = np.quantile(known, _ENDS)
    if high - low < _MOST_COUNTS and (values == np.rint(values)).all():
        bins = np.arange(np.floor(low), np.ceil(high) + 2) - 0.5
    else:
        bins = np.unique([low, *np.quantile(known, np.linspace(0, 1, _BINS + 1)[1:-1]), high])
    if len(bins) < 3:
        bins = np.array([values[0], (values[0] + values[-1]) / 2, values[-1]])
    of = np.digitize(x, bins[1:-1])
    result: dict = {"edges": bins.tolist()}
    for name, rows in classes.items():
        result[name] = entries = []
        for i in range(len(bins) - 1):
            inside = passed[rows & (of == i) & ~np.isnan(x)]
            k, n = int(inside.sum()), len(inside)
            entries.append({"n": n, "rate": k / n if n else float("nan"),
                            "interval": clopper_pearson(k, n) if n else (float("nan"),) * 2})
    return result


def plot_efficiencies(shown: dict[str, dict], units: dict[str, str], cut: str) -> Figure:
    """What `efficiencies` found of one or more features, a column each, and a row for each class."""
    names = [name for name in next(iter(shown.values())) if name != "edges"]
    with styled():
        fig = figure(max(4.1 * len(shown), 5.5), 2.7 * len(names) + 0.7)
        panels = fig.subplots(len(names), len(shown), sharex="col", squeeze=False)
        for row, name in zip(panels, reversed(names)):
            for ax, found in zip(row, shown.values()):
                _points(ax, np.array(found["edges"]), found[name], ANOMALOUS if name == "signal" else BLUE)
            row[0].set_ylabel(f"share of {name}")
        for ax, feature in zip(panels[-1], shown):
            ax.set_xlabel(label(feature, units[feature]))
        fig.suptitle(cut, fontsize=12)
        return fig


def plot_training(history: Sequence[dict], per_level: Sequence[float], sigmas: Sequence[float]) -> Figure:
    """Loss and held-out loss of each member against the step, and the held-out loss at every noise level."""
    with styled():
        fig = figure(8.2, 3.9)
        left, right = fig.subplots(1, 2, width_ratios=(1.25, 1)) if per_level else (fig.subplots(), None)
        for i, member in enumerate(history):
            curves = {name: values for name, values in member.items() if name != "steps" and values}
            for (name, values), colour in zip(curves.items(), (BLUE, ORANGE, PURPLE, VIOLET)):
                look = (RED, "s--") if name == "held_out" else (colour, "o-")
                left.plot(member["steps"], values, look[1], color=look[0], markersize=4, alpha=1 if i == 0 else 0.5,
                          label=None if i else _TERMS.get(name, name))
        left.set_xlabel("training step")
        left.set_ylabel("loss per event (no unit)")
        left.legend(title=f"{len(history)} networks" if len(history) > 1 else None)
        if right is not None:
            right.plot(sigmas, per_level, "s--", color=RED, markersize=4)
            right.set_xscale("log")
            right.set_xlabel(r"noise level $\sigma$ [background spread]")
            right.set_ylabel("held-out loss per event (no unit)")
            right.set_ylim(bottom=0)
        return fig


_TERMS = {"dsm": "score matching", "multi_scale": "multi-scale", "l2": "regularisation", "held_out": "held out"}


def _points(ax: Axes, bins: np.ndarray, entries: Sequence[dict], colour: str) -> None:
    middle, half = (bins[1:] + bins[:-1]) / 2, np.diff(bins) / 2
    rate = np.array([e["rate"] for e in entries])
    low, high = np.array([e["interval"] for e in entries]).T
    ax.errorbar(middle, rate, (rate - low, high - rate), half, fmt="o", markersize=4, color=colour)
    most = np.nanmax(high, initial=1e-12)
    ax.set_ylim(-0.04 * most, 1.12 * most)
    ax.set_xlim(bins[0], bins[-1])
