"""Why an event is anomalous: its score as signed pulls, per feature and per object, and whether to believe them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ebm.metrics import interval
from ebm.style import BLUE, DIVERGING, GREY, PURPLE, RED, label, progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REMOVED = (1, 2, 4, 8, 16)  # numbers of features taken away in the check
HEADLINE = 4  # the one that is quoted
FEWEST = 10  # events that tell what is usual
_DRAWS, _RESAMPLES = 10, 1000

# What belongs together, by the names of hep64-v1 and of HiggsML; other features stand for themselves.
_GROUPS = (
    ("obj{}", r"obj(\d+)_(E|px|py|pz)"),
    ("MET", r"MET|met_over_sqrt_ht|dphi_min|PRI_met(_phi|_sumet)?|DER_met_phi_centrality"),
    ("scalar sums", r"ht|mht|meff|mvis|DER_sum_pt|PRI_jet_all_pt|DER_pt_tot|DER_pt_h"),
    ("event shape", r"sphericity|aplanarity|sphericity_t|c_lin|thrust_t|centrality"),
    ("multiplicity", r"n_(jets|btag|lep)|PRI_jet_num"),
    ("dijet", r"jet1_mass|m_jj|deta_jj|dphi_jj|DER_(deltaeta|mass|prodeta)_jet_jet|DER_lep_eta_centrality"),
    ("b-tags", r"jet\d+_btag"),
    ("tau", r"PRI_tau_.*"),
    ("lepton", r"PRI_lep_.*"),
    ("leading jet", r"PRI_jet_leading_.*"),
    ("subleading jet", r"PRI_jet_subleading_.*"),
    ("tau and lepton", r"DER_(mass_MMC|mass_transverse_met_lep|mass_vis|deltar_tau_lep|pt_ratio_lep_tau)"),
)


def energies(model: Any, x: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """Energies (n,) of x (n, D): raw events for a Scorer, preprocessed ones for a network."""
    if hasattr(model, "attribution"):
        return np.asarray(model.energy(x), np.float64)
    from ebm.scores import compute_anomaly_scores

    return compute_anomaly_scores(model, x, sigmas).astype(np.float64)


def preprocessed(model: Any, x: np.ndarray) -> np.ndarray:
    """u (n, D) of what the model is given, float64."""
    x = np.asarray(x, np.float64)
    return model.bundle.preprocessing(x) if hasattr(model, "attribution") and model.preprocess else x


def pulls(model: Any, x: np.ndarray, sigmas: Sequence[float], normal: np.ndarray) -> np.ndarray:
    """(n, D): how strongly each feature raises the energy of x (n, D), in units of what is usual for it in background.

    dE/du at every noise level over its RMS in the background events `normal` (m, D), averaged over the levels (high
    noise sees what lies far out, low noise what breaks a correlation), and again over its RMS: 1 is ordinary, 3 three
    times what is usual for that feature. Positive: a smaller value would be more ordinary. Only events that have a
    feature count in its RMS; one that fewer than 10 have is measured by that of all features. An autoencoder and an
    export have one level; a Gaussian's pull at one level is the feature's distance from what the others imply. Events
    are raw for a Scorer, whose pull at a missing or constant feature is 0, and preprocessed for a network, which cannot
    tell imputed values from others.
    Raises ValueError where `sigmas` are not the model's in number.
    """
    scorer = hasattr(model, "attribution")
    levels = model.n_levels if scorer else model.n_sigmas
    autoencoder = (model.bundle.architecture.kind if scorer else model.kind) == "autoencoder"
    if not autoencoder and len(sigmas) != levels:
        raise ValueError(f"{len(sigmas)} noise levels given, the model has {levels}")
    pull, of_normal = np.zeros(x.shape), np.zeros(normal.shape)
    for k in [None] if autoencoder or hasattr(model, "options") else range(levels):
        gradient = _gradient(model, normal, k)
        usual = _usual(gradient)
        pull += _gradient(model, x, k) / usual
        of_normal += gradient / usual
    return pull / _usual(of_normal)


def _gradient(model: Any, x: np.ndarray, k: int | None) -> np.ndarray:
    """dE/du (n, D) at noise level k, float64."""
    if hasattr(model, "attribution"):
        return np.asarray(model.attribution(x, k), np.float64)
    import torch

    parameter = next(model.parameters())
    level = () if k is None else (torch.full((len(x),), k, device=parameter.device),)
    with torch.no_grad():
        _, score = model.energy_and_score(torch.as_tensor(x, dtype=parameter.dtype, device=parameter.device), *level)
    return -score.cpu().numpy().astype(np.float64)


def _usual(values: np.ndarray) -> np.ndarray:
    """(D,): RMS of what is not 0 in values (m, D), over all features for one that fewer than FEWEST events have.

    Infinite where that is 0, so that what is divided by it becomes 0.
    """
    squares, n = (values**2).sum(axis=0), np.count_nonzero(values, axis=0)
    mean = np.where(n >= FEWEST, squares / np.maximum(n, 1), squares.sum() / max(n.sum(), 1))
    return np.where(mean > 0, np.sqrt(mean), np.inf)


def group(features: Sequence[str]) -> dict[str, list[int]]:
    """Columns by object, in the order in which the objects appear; a feature of none is a group of its own."""
    groups: dict[str, list[int]] = {}
    for j, feature in enumerate(features):
        matches = ((name, re.fullmatch(pattern, feature)) for name, pattern in _GROUPS)
        name = next((name.format(*m.groups()) for name, m in matches if m), feature)
        groups.setdefault(name, []).append(j)
    return groups


def group_pulls(pull: np.ndarray, x: np.ndarray, features: Sequence[str]) -> np.ndarray:
    """(n, G) for the groups of `features`: RMS of a group's pulls (n, D) over those that are not 0, so 1 is ordinary.

    Positive where less of the group would make the event more ordinary. "Less" is smaller in magnitude, whatever the
    sign of a value of x (n, D): a softer object, fewer jets, a lower mass. An object's eta and phi do not count there.
    """
    outward, columns = pull * np.where(x < 0, -1, 1), []
    for members in group(features).values():
        present = np.maximum(np.count_nonzero(pull[:, members], axis=1), 1)
        sizes = [j for j in members if not features[j].endswith(("_eta", "_phi"))] or members
        columns.append(np.linalg.norm(pull[:, members], axis=1) / np.sqrt(present)
                       * np.where(outward[:, sizes].sum(axis=1) < 0, -1, 1))
    return np.stack(columns, axis=1)


def energy_spread(energy: np.ndarray) -> float:
    """Standard deviation of energies (n,); 0 where it is no more than rounding."""
    spread = float(energy.std())
    return spread if spread > 1e-6 * max(1.0, float(np.abs(energy).max())) else 0.0


def faithfulness(model: Any, x: np.ndarray, sigmas: Sequence[float], normal: np.ndarray, seed: int = 0) -> dict:
    """Whether the features with the largest pulls are those that raise the energy of events x (n, D).

    Features are removed, that is replaced by what the event's other features imply: their linear regression on them
    over the events `normal` (m, D), after preprocessing and within the range that they have there. (A fixed value, as
    the median, would make events that cannot be, such as sums of momenta that are not the momenta's sum, and an energy
    is high for those; Frye et al., arXiv:2006.01272.) Removed are those with the largest pulls, those that lie farthest
    out, and random ones (of 10 draws the mean), always among the features an event has. `drop` has the mean fall of the
    energy in units of its spread over `normal`, for each number in `removed`, and `excess` by how much the energy
    exceeds its mean over `normal`; `top_minus_random` the difference between largest pulls and random, with its 95%
    interval over resampled events (NaN for a single one), and `better` the share of events in which it is positive.
    Raises ValueError where the energies of `normal` have no spread.
    """
    from sklearn.covariance import LedoitWolf

    rng = np.random.default_rng(seed)
    pull, before = np.abs(pulls(model, x, sigmas, normal)), energies(model, x, sigmas)
    usual, there = energies(model, normal, sigmas), ~np.isnan(normal).all(axis=0)
    if not (spread := energy_spread(usual)):
        raise ValueError(f"the energies of {len(normal)} normal events have no spread to compare with")
    u, raw = preprocessed(model, x), hasattr(model, "attribution") and model.preprocess
    usable, distance = (pull != 0) & there, np.abs(u)
    of_normal = preprocessed(model, normal)
    low, high = of_normal.min(axis=0), of_normal.max(axis=0)
    background = LedoitWolf().fit(of_normal)  # shrunk: fewer events than features are enough

    def drop(rank: np.ndarray, m: int) -> np.ndarray:
        order = np.argsort(-np.where(usable, rank, -np.inf), axis=1)
        taken = np.zeros(x.shape, bool)
        np.put_along_axis(taken, order[:, :m], True, axis=1)
        taken &= usable
        implied = _implied(u, taken, background.location_, background.precision_).clip(low, high)
        implied = np.where(taken, model.bundle.preprocessing.inverse(implied) if raw else implied, x)
        return (before - energies(model, implied.astype(x.dtype), sigmas)) / spread

    removed = [m for m in REMOVED if m < usable.sum(axis=1).max()] or [1]
    drops: dict[str, list[float]] = {"largest pulls": [], "farthest out": [], "random": []}
    differences = []
    for m in progress(removed, "checking the pulls"):
        random = np.mean([drop(rng.random(x.shape), m) for _ in range(_DRAWS)], axis=0)
        per_event = (drop(pull, m), drop(distance, m), random)
        for name, values in zip(drops, per_event):
            drops[name].append(float(values.mean()))
        difference = per_event[0] - random
        resampled = difference[rng.integers(len(x), size=(_RESAMPLES, len(x)))].mean(axis=1)
        differences.append({"mean": float(difference.mean()), "better": float((difference > 0).mean()),
                            "interval": interval(resampled) if len(x) > 1 else (float("nan"),) * 2})
    return {"n_events": len(x), "energy_spread": spread, "excess": float((before.mean() - usual.mean()) / spread),
            "removed": removed, "drop": drops, "top_minus_random": differences}


def _implied(u: np.ndarray, taken: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """u (n, D) with the features `taken` (n, D) at their mean given the others, for a Gaussian of this precision."""
    implied = u.copy()
    for event, gone in zip(implied, taken):
        known = precision[np.ix_(gone, ~gone)] @ (event[~gone] - mean[~gone])
        event[gone] = mean[gone] - np.linalg.lstsq(precision[np.ix_(gone, gone)], known)[0]
    return implied


def draw_faithfulness(ax: Axes, result: dict, of: str = "background") -> None:
    """The mean fall of the energy against the number of features removed; its unit is the spread of energies `of`."""
    looks = {"largest pulls": (RED, "o-"), "farthest out": (PURPLE, "s--"), "random": (GREY, "^:")}
    for name, (colour, style) in looks.items():
        ax.plot(result["removed"], result["drop"][name], style, color=colour, label=name)
    random = np.array(result["drop"]["random"])
    low, high = np.array([d["interval"] for d in result["top_minus_random"]]).T
    ax.fill_between(result["removed"], random + low, random + high, color=RED, alpha=0.2, linewidth=0,
                    label="95% interval against random")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(result["removed"], map(str, result["removed"]))
    ax.set_xlabel("features replaced by what the others imply")
    ax.set_ylabel(f"mean fall of the energy\n[spread of {of} energies]")
    ax.legend(title=f"the {result['n_events']} highest-scoring events")


def draw_pulls(ax: Axes, pull: Sequence[float], names: Sequence[str], of: str = "background", bars: int = 10) -> None:
    """The largest pulls as bars, the largest on top, over what is usual in the events that are called `of` (grey)."""
    shown = [j for j in np.argsort(-np.abs(pull))[:bars] if pull[j] != 0]
    y, values = np.arange(len(shown)), np.array([pull[j] for j in shown])
    ax.axvspan(-1, 1, color="0.9", label=f"usual in {of}")
    ax.barh(y, values, height=0.6, color=np.where(values > 0, RED, BLUE).tolist(), zorder=2)
    ax.axvline(0, color="black", linewidth=0.8, zorder=3)
    ax.set_yticks(y, [names[j] for j in shown], fontsize=10, linespacing=0.95)
    ax.tick_params(axis="y", which="both", length=0)
    ax.set_ylim(bars - 0.4, -0.6)
    reach = 1.1 * np.abs(values).max(initial=1.4)
    ax.set_xlim(-reach, reach)
    ax.locator_params(axis="x", nbins=4)
    ax.set_xlabel(f"pull [RMS in {of}]")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def draw_group_pulls(ax: Axes, pull: np.ndarray, groups: Sequence[str], events: Sequence[str], largest: float,
                     of: str = "background") -> None:
    """Pulls (n, G) of several events, highest score first, as colours on a scale up to `largest` and as numbers."""
    image = ax.imshow(pull, cmap=DIVERGING, vmin=-largest, vmax=largest, aspect="auto")
    for (i, j), value in np.ndenumerate(pull):
        if value:
            ax.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=10,
                    color="white" if abs(value) > 0.65 * largest else "black")
    ax.set_xticks(range(len(groups)), groups, rotation=45, ha="right")
    ax.set_yticks(range(len(events)), events)
    ax.tick_params(which="both", top=False, right=False, direction="out")
    ax.minorticks_off()
    ax.set_ylabel("rank by score")
    ax.figure.colorbar(image, ax=ax, label=label("pull", f"RMS in {of}"))
