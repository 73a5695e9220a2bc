"""One look for every picture: ticks inside, units on the axes, colours that colour-blind readers tell apart.

Figures are made without pyplot, so that nothing of the caller's is changed and none needs to be closed.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ebm.command import whole_file
from ebm.events import DataError
from ebm.preprocess import IDENTITY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Petroff, arXiv:2107.02270: the six colours that CMS recommends; the grey is a background's.
BLUE, ORANGE, RED, PURPLE, GREY, VIOLET = "#5790fc", "#f89c20", "#e42536", "#964a8b", "#9c9ca1", "#7a21dd"
NORMAL, ANOMALOUS = BLUE, RED
DIVERGING = "RdBu_r"  # for signed values: red above zero

_RC = {
    "figure.dpi": 110, "savefig.dpi": 150, "figure.constrained_layout.use": True, "pdf.fonttype": 42,
    "font.size": 11, "axes.labelsize": 12, "legend.fontsize": 10.5, "legend.frameon": False, "axes.linewidth": 0.9,
    "axes.formatter.limits": (-3, 4), "axes.formatter.use_mathtext": True,
    "xtick.direction": "in", "ytick.direction": "in", "xtick.top": True, "ytick.right": True,
    "xtick.minor.visible": True, "ytick.minor.visible": True, "xtick.major.pad": 6,
    "lines.linewidth": 1.6, "errorbar.capsize": 0,
}
_TAIL = 0.002
_MOST_INTEGERS = 40


@contextmanager
def styled():
    """matplotlib's settings for the pictures of this project while they are drawn or written."""
    try:
        import hist  # noqa: F401
        import matplotlib as mpl
        import mplhep  # noqa: F401
    except ImportError as e:
        raise RuntimeError(f"pictures need matplotlib, mplhep and hist ({e}): pip install 'fused-ebm[plots]'") from None
    with mpl.rc_context(_RC):
        yield


@dataclass(frozen=True)
class Pictures:
    """Figures by name, the numbers behind them, and in `notes` one sentence for everything that could not be shown."""

    figures: dict[str, Figure] = field(default_factory=dict)
    numbers: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def save(self, out: Path) -> list[Path]:
        """Every figure as PNG and PDF in directory `out`, each file whole or not at all: the files."""
        check_directory(out)
        return [save(self.figures[name], out / f"{name}.{kind}") for name in progress(self.figures, "writing pictures")
                for kind in ("png", "pdf")]


def save(figure: Figure, path: Path) -> Path:
    """Write one figure in the format of the name's ending; the same figure gives the same bytes."""
    dated = "CreationDate" if path.suffix == ".pdf" else "Software"
    with styled(), whole_file(path) as f:
        figure.savefig(f, format=path.suffix[1:], metadata={dated: None})
        figure.set_layout_engine("none")  # the layout is found now; finding it takes longer than drawing
    return path


def check_directory(out: Path) -> None:
    """Make the directory; call it before long work.

    Raises DataError where it cannot be written, RuntimeError where pictures cannot be drawn here at all.
    """
    with styled():
        pass
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as e:
        raise DataError(f"{out} cannot be written: {e.strerror}") from None


def progress(items: Iterable, description: str) -> Iterable:
    """`items` with a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    return track(list(items), description, console=Console(stderr=True), disable=not sys.stderr.isatty())


def label(name: str, unit: str = "") -> str:
    """An axis label: "MET [GeV]"; a number without a unit has its name alone."""
    return f"{name} [{written(unit)}]" if unit else name


def written(unit: str) -> str:
    """A unit as it is printed: exponents raised."""
    return re.sub(r"\^([-\d/]+)", r"$^{\1}$", unit)


def figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


class Series(NamedTuple):
    """One class of events in a histogram: `look` is "fill", "step" or "errorbar" (points with Poisson errors)."""

    name: str
    x: np.ndarray
    colour: str
    look: str = "step"


class Feature(NamedTuple):
    """One column, and how `Preprocessing` transforms it, which says where a logarithmic axis is needed."""

    column: int
    name: str
    unit: str = ""
    transform: int = 0


def edges(values: Sequence[np.ndarray], logarithmic: bool = False) -> tuple[np.ndarray, bool]:
    """Bin edges over what 99.6% of each sample covers, and whether they are logarithmic: asked for, and possible.

    Whole numbers get a bin each; else the smallest of the samples sets the number of bins (Rice's rule, 2 n^(1/3)).
    """
    values = [v for v in values if len(v)]
    if not values:
        return np.array([0.0, 1.0]), False
    low, high = (f(np.quantile(v, q) for v in values) for f, q in ((min, _TAIL), (max, 1 - _TAIL)))
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # no spread: one bin in the middle of the panel
        return low + max(abs(low), 1.0) * np.array([-0.15, -0.05, 0.05, 0.15]), False
    if high - low <= _MOST_INTEGERS and all((v == np.round(v)).all() for v in values):
        return np.arange(np.floor(low), np.ceil(high) + 2) - 0.5, False
    n = int(np.clip(round(2 * min(map(len, values)) ** (1 / 3)), 15, 40))
    if logarithmic and low > 0 and 5 < high / low < 1e5:
        return np.geomspace(low, high, n + 1), True
    return np.linspace(low, high, n + 1), False


def histogram(ax: Axes, feature: Feature, series: Sequence[Series]) -> None:
    """The share of events of each series per bin; what lies beyond the axis is counted in the bins at its ends.

    `x` of a series is (n, D) with NaN where missing; the share that is missing is written above the panel, in the
    colours of the series.
    """
    import mplhep
    from hist import Hist, axis
    from matplotlib.ticker import MaxNLocator, NullFormatter

    values = [s.x[:, feature.column].astype(np.float64) for s in series]
    present = [v[~np.isnan(v)] for v in values]
    bins, log_x = edges(present, feature.transform != IDENTITY and feature.unit != "rad")  # angles are bounded
    for s, v, n in zip(series, present, map(len, values)):
        h = Hist(axis.Variable(bins)).fill(np.clip(v, bins[0], np.nextafter(bins[-1], -np.inf)))
        share, error = h.values() / max(n, 1), np.sqrt(h.values()) / max(n, 1)
        if s.look == "errorbar":
            share[share == 0] = np.nan  # no point where there is no event
        options = {"fill": {"alpha": 0.35, "linewidth": 0}, "step": {},
                   "errorbar": {"yerr": error, "markersize": 5, "elinewidth": 1}}[s.look]
        mplhep.histplot(share, bins, ax=ax, histtype=s.look, color=s.colour, label=s.name, **options)
    missing = [1 - len(v) / max(len(all_), 1) for v, all_ in zip(present, values)]
    for i, (s, share) in enumerate(zip(series, missing)):
        if any(missing):
            text = ("missing " if i == 0 else "") + _percent(share)
            ax.annotate(text, (0.42 + 0.19 * i, 1.02), xycoords="axes fraction", color=s.colour, fontsize=8.5,
                        ha="right")
    if log_x:
        _log_axis(ax, bins)
    elif feature.transform != IDENTITY and len(bins) > 4:
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
    if ax.get_yscale() == "linear":
        ax.set_ylim(bottom=0)
    if (bins % 1 == 0.5).all():  # a bin for each whole number
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        ax.xaxis.minorticks_off()
    if not any(map(len, present)):
        ax.text(0.5, 0.5, "missing in every event", transform=ax.transAxes, ha="center", va="center")
        ax.set_xticks([])
    elif np.ptp(np.concatenate(present)) == 0:
        ax.text(0.5, 0.95, "one value in every event", transform=ax.transAxes, ha="center", va="top", fontsize=9)
        ax.set_ylim(top=1.2)
    ax.set_xlim(bins[0], bins[-1])
    ax.set_xlabel(label(feature.name, feature.unit))


def _log_axis(ax: Axes, bins: np.ndarray) -> None:
    """Logarithmic x; where it spans less than two decades 30, or 20 and 50, are written too, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    if bins[-1] < 100 * bins[0]:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if bins[-1] < 30 * bins[0] else (1, 3)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def pages(features: Sequence[Feature], series: Sequence[Series], title: str, rows: int = 4,
          columns: int = 4) -> list[Figure]:
    """Histograms of all features, at most `rows` x `columns` panels to a figure, with one legend above them."""
    figures, columns = [], min(columns, math.ceil(math.sqrt(len(features))))
    n_pages = -(-len(features) // (rows * columns))
    for page in range(n_pages):
        part = features[page * rows * columns : (page + 1) * rows * columns]
        used = -(-len(part) // columns)
        fig = figure(max(3.4 * columns, 6.5), 2.5 * used + 0.9)  # the legend needs its width
        panels = fig.subplots(used, columns, squeeze=False).ravel()
        for ax, feature in zip(panels, part):
            histogram(ax, feature, series)
        for ax in panels[len(part) :]:
            ax.remove()
        number = f" ({page + 1} of {n_pages})" if n_pages > 1 else ""
        fig.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(series),
                   title=f"{title}{number}; the end bins hold what lies beyond", title_fontsize=12)
        fig.supylabel("share of events per bin", fontsize=12)
        figures.append(fig)
    return figures


def number(value: float) -> str:
    """Three digits that count, and no exponent below a million: 0.0123, 45.6, 1,190."""
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.3g}"


def _percent(share: float) -> str:
    if 0 < share < 1e-4:
        return "<0.01%"
    return f"{share:.0%}" if 0.01 <= share <= 0.99 or share in (0, 1) else f"{share:.2%}"
