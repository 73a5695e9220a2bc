"""Pictures of an evaluation: ROC and significance improvement of the detectors, and what a cut does to a mass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ebm.efficiency import Sample
from ebm.sculpting import FEWEST
from ebm.significance import LEAST, sic_curve
from ebm.style import BLUE, GREY, ORANGE, PURPLE, RED, VIOLET, figure, label, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 2000  # of a curve: more cannot be seen


def plot_roc(y: np.ndarray, scores: dict[str, np.ndarray], weights: np.ndarray | None = None) -> Figure:
    """Background rejection 1 / e_B against the signal efficiency, a curve for each named score (n,), the first one
    thick; shaded where fewer than 10 events of an unweighted background pass.

    Raises ValueError as `sic_curve` does.
    """
    with styled():
        fig = figure(8.2, 4.6)
        ax = fig.subplots()
        for i, (name, s) in enumerate(scores.items()):
            e_b, e_s, _ = sic_curve(y, s, weights, least=1)
            shown = _shown(len(e_b))
            ax.plot(e_s[shown], 1 / e_b[shown], label=name, **_look(i))
        chance = np.geomspace(1e-6, 1, 200)
        ax.plot(chance, 1 / chance, color="black", linewidth=0.8, linestyle=":")
        n = np.count_nonzero(np.asarray(y) == 0)
        ax.axhspan(n / LEAST, 2 * n, color="0.92", zorder=0)
        ax.text(0.99, 1.6 * n, f"fewer than {LEAST} background events pass", ha="right", va="top", fontsize=9)
        ax.set_yscale("log")
        ax.set_xlim(0, 1)
        ax.set_ylim(1, 2 * n)
        ax.set_xlabel(r"signal efficiency $\epsilon_S$")
        ax.set_ylabel(r"background rejection $1 / \epsilon_B$")
        fig.legend(loc="outside right upper")
        return fig


def plot_sic(y: np.ndarray, scores: dict[str, np.ndarray], weights: np.ndarray | None = None) -> Figure:
    """Significance improvement e_S / sqrt(e_B) against the background efficiency, a curve for each named score (n,),
    the first one thick.

    Raises ValueError as `sic_curve` does.
    """
    with styled():
        fig = figure(8.2, 4.6)
        ax = fig.subplots()
        for i, (name, s) in enumerate(scores.items()):
            e_b, _, sic = sic_curve(y, s, weights)
            shown = _shown(len(sic))
            ax.plot(e_b[shown], sic[shown], label=name, **_look(i))
        ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
        ax.set_xscale("log")
        ax.set_xlabel("background efficiency")
        ax.set_ylabel(r"significance improvement $\epsilon_S / \sqrt{\epsilon_B}$")
        fig.legend(loc="outside right upper")
        return fig


def plot_sculpting(variable: np.ndarray, scores: np.ndarray, cuts: Sequence[float], name: str,
                   unit: str = "", bins: int = 25) -> Figure:
    """The variable (n,) of all background and of what passes each cut, as shares, and below the ratio of the two.

    Fewer than 10 events that pass are not shown; the bins at the ends hold what lies beyond. Points of different cuts
    stand side by side in a bin; error bars are 68% Poisson intervals (Garwood).
    Raises ValueError where the variable is NaN throughout.
    """
    known = ~np.isnan(variable)
    variable, scores = variable[known], scores[known]
    if len(variable) == 0:
        raise ValueError(f"{name} is missing in every event")
    low, high = np.quantile(variable, [0.001, 0.999])
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    inside = np.clip(variable, edges[0], edges[-1])
    sample, width, middle = Sample(scores, np.ones(len(scores))), edges[1] - edges[0], (edges[1:] + edges[:-1]) / 2
    of_all = np.histogram(inside, edges)[0] / len(inside)
    with styled():
        from hist.intervals import poisson_interval

        fig = figure(7, 6)
        top, bottom = fig.subplots(2, sharex=True, height_ratios=(3, 1.3))
        top.stairs(of_all / width, edges, fill=True, color=GREY, alpha=0.5, label="all background")
        for i, (cut, colour) in enumerate(zip(cuts, (BLUE, ORANGE, RED, PURPLE, VIOLET))):
            passing = np.histogram(inside[scores > cut], edges)[0]
            n, some = passing.sum(), passing > 0
            if n < FEWEST:
                continue
            x = middle[some] + 0.15 * (i - (len(cuts) - 1) / 2) * width
            share, error = passing[some] / n, abs(poisson_interval(passing[some]) - passing[some]) / n
            look = {"fmt": "o", "markersize": 3.5, "color": colour}
            top.errorbar(x, share / width, error / width, **look,
                         label=f"most anomalous {100 * sample.share(cut):.3g}% ({n:,} events)")
            bottom.errorbar(x, share / of_all[some], error / of_all[some], **look)
        bottom.axhline(1, color="black", linewidth=0.8)
        bottom.set_xlim(edges[0], edges[-1])
        for ax in (top, bottom):
            ax.set_yscale("log")
        bottom.set_xlabel(label(name, unit))
        bottom.set_ylabel("ratio to all")
        top.set_ylabel(f"share of events per {unit or 'unit'}")
        fig.legend(loc="outside upper center", ncols=2, title="the end bins hold what lies beyond")
        return fig


def _shown(n: int) -> np.ndarray:
    """Which of a curve's n points are drawn: all of the first ones, where few events pass."""
    shown = np.unique(np.geomspace(1, max(n, 1), _POINTS).astype(int)) - 1
    return shown[shown < n]


def _look(i: int) -> dict:
    return {"color": (RED, BLUE, ORANGE, PURPLE, GREY, VIOLET)[i % 6], "linestyle": ("-", "--")[i // 6 % 2],
            "linewidth": 1.2 if i else 2.4}
