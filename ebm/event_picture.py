"""An event as seen along the beam: its objects, as long as they are hard, and the missing transverse momentum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ebm.style import DIVERGING, label

if TYPE_CHECKING:
    from matplotlib.projections.polar import PolarAxes

JET, NARROW, UNSEEN = "jet", "lepton or photon", "MET"
_HALF_WIDTH = {JET: 0.14, NARROW: 0.03}  # rad
_RINGS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
# HiggsML: prefix of the features, name of the object, what it is.
_HIGGSML = (("PRI_tau", "tau", JET), ("PRI_lep", "lepton", NARROW), ("PRI_jet_leading", "leading jet", JET),
            ("PRI_jet_subleading", "subleading jet", JET))
_SHORT = {"tau": r"$\tau$", "lepton": r"$\ell$", "leading jet": "j1", "subleading jet": "j2"}


class Object(NamedTuple):
    """One object of an event: its name is that of its group of features; pT in GeV, phi in rad."""

    name: str
    kind: str
    pt: float
    eta: float
    phi: float


def objects(x: np.ndarray, features: Sequence[str]) -> list[Object]:
    """The objects of one raw event x (D,), missing transverse momentum last; none where the schema names none.

    `hep64-v1` does not say what an object is: within |eta| < 2.5 one lighter than 0.2 GeV, as far as float32 resolves
    its mass, is a lepton or photon, every other one a jet.
    """
    at = {name: float(value) for name, value in zip(features, x)}
    found = []
    for i in range(10):
        e, px, py, pz = (at.get(f"obj{i}_{c}", np.nan) for c in ("E", "px", "py", "pz"))
        pt = np.hypot(px, py)
        if not pt > 0:
            continue
        eta = np.arcsinh(pz / pt)
        light = e**2 - pt**2 - pz**2 < 0.2**2 + 1e-6 * e**2 and abs(eta) < 2.5
        found.append(Object(f"obj{i}", NARROW if light else JET, pt, eta, np.arctan2(py, px)))
    for prefix, name, kind in _HIGGSML:
        pt, eta, phi = (at.get(f"{prefix}_{c}", np.nan) for c in ("pt", "eta", "phi"))
        if pt > 0:
            found.append(Object(name, kind, pt, eta, phi))
    met, met_phi = (at["MET"], 0.0) if "MET" in at else (at.get("PRI_met", np.nan), at.get("PRI_met_phi", np.nan))
    if met > 0 and np.isfinite(met_phi):
        found.append(Object("MET", UNSEEN, met, np.nan, met_phi))
    return found


def draw_event(ax: PolarAxes, event: Sequence[Object], pulls: dict[str, float] | None = None,
               largest: float | None = None) -> None:
    """Draw the objects on polar axes; radii grow as sqrt(pT), so that soft objects can be seen beside hard ones.

    `pulls` by object name colours them, red where softer would be more ordinary, on a scale up to `largest`.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    pulls = pulls or {}
    largest = largest or max(map(abs, pulls.values()), default=0.0) or 1.0
    hardest = max(o.pt for o in event)
    for o in event:
        radius = np.sqrt(o.pt)
        colour = colormaps[DIVERGING](0.5 + 0.5 * np.clip(pulls.get(o.name, 0.0) / largest, -1, 1))
        if o.kind == UNSEEN:
            ax.annotate("", (o.phi, radius), (0, 0), zorder=4,
                        arrowprops={"arrowstyle": "-|>", "linestyle": "--", "linewidth": 2, "color": "black"})
        else:
            ax.bar(o.phi, radius, 2 * _HALF_WIDTH[o.kind], color=colour, edgecolor="black", linewidth=0.9, zorder=3)
    _name(ax, event)
    rings = [r for r in _RINGS if r < 0.8 * hardest][-2:]
    ax.set_rticks(np.sqrt(rings), [""] * len(rings))
    for r in rings:  # labels of ticks would lie below the objects
        ax.text(_emptiest(event), np.sqrt(r), f"{r} GeV", ha="center", va="center", fontsize=10, color="0.35", zorder=5,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "linewidth": 0})
    ax.set_rlim(0, 1.22 * np.sqrt(hardest))
    ax.set_thetagrids((0, 90, 180, 270), ["φ = 0", "π/2", "±π", "-π/2"])
    ax.tick_params(axis="x", pad=12)
    ax.grid(color="0.85", linewidth=0.7)
    ax.minorticks_off()
    ax.spines["polar"].set_color("0.6")
    kinds = {o.kind for o in event}
    handles = [Patch(facecolor="white", edgecolor="black", label="jet (broad)")] * (JET in kinds)
    handles += [Line2D([], [], color="black", linewidth=3, label="lepton or photon")] * (NARROW in kinds)
    handles += [Line2D([], [], color="black", linestyle="--", linewidth=2, label="MET")] * (UNSEEN in kinds)
    colours = "\nred: softer would be more ordinary, blue: harder" if pulls else ""
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=10, columnspacing=1,
              title=label("azimuth", "rad") + ", radius ∝ √pT" + colours, title_fontsize=10)


def _name(ax: PolarAxes, event: Sequence[Object]) -> None:
    """Short names just beyond the tips, moved aside as little as keeps them apart."""
    placed: list[tuple[complex, str]] = []
    step = 0.11 * np.sqrt(max(o.pt for o in event))
    moves = sorted((out + 1j * aside for out in np.arange(-3, 2.5, 0.5) for aside in np.arange(-3, 3.5, 0.5)), key=abs)
    for o in sorted(event, key=lambda o: -o.pt):
        direction = np.exp(1j * o.phi)
        spots = [(np.sqrt(o.pt) + (0.8 + move) * step) * direction for move in moves]
        free = (spot for spot in spots
                if all(_apart(spot - other, UNSEEN in (o.kind, kind)) > 1.1 * step for other, kind in placed))
        at = next(free, spots[0])
        placed.append((at, o.kind))
        box = {"boxstyle": "round,pad=0.08", "facecolor": "white", "alpha": 0.75, "linewidth": 0}
        ax.text(np.angle(at), abs(at), _SHORT.get(o.name, o.name.removeprefix("obj")), ha="center",
                va="center", fontsize=10, fontweight="bold", zorder=5, bbox=box)


def _apart(distance: complex, wide: bool) -> float:
    """The distance of two names, of which "MET" is a wide one."""
    return abs(complex(distance.real * (0.55 if wide else 1), distance.imag))


def _emptiest(event: Sequence[Object]) -> float:
    """phi in the middle of the widest gap between objects: where the ring labels hide nothing."""
    phi = np.sort([o.phi % (2 * np.pi) for o in event])
    gaps = np.diff([*phi, phi[0] + 2 * np.pi])
    widest = int(np.argmax(gaps))
    return float(phi[widest] + gaps[widest] / 2)
