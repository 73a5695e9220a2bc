"""Why an event is anomalous: its score as signed pulls, per feature and per object, and whether to believe them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ebm.metrics import interval
from ebm.style import BLUE, GREY, PURPLE, RED, progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REMOVED = (1, 2, 4, 8, 16)  # numbers of features taken away in the check
HEADLINE = 4  # the one that is quoted
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


def pulls(model: Any, x: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """(n, D): by how many background spreads each feature lies above where the model expects it, given the others.

    That is sigma^2 dE/du = u - E[clean u | u] at the model's default noise level, after Tweedie (Efron, J. Am. Stat.
    Assoc. 106, 1602, 2011); for an autoencoder, whose energy is a mean of squares, D / 2 dE/du. Positive: a smaller
    value would be more ordinary. x (n, D) are raw events for a Scorer, which gives 0 for a missing or constant feature,
    and preprocessed ones for a network, which cannot tell imputed values from others and pulls at them too.
    Raises ValueError where `sigmas` are not the model's in number.
    """
    scorer = hasattr(model, "attribution")
    levels = model.n_levels if scorer else model.n_sigmas
    if (model.bundle.architecture.kind if scorer else model.kind) == "autoencoder":
        scale = x.shape[1] / 2
    elif len(sigmas) != levels:
        raise ValueError(f"{len(sigmas)} noise levels given, the model has {levels}")
    else:
        scale = sigmas[model.default_level] ** 2
    if scorer:
        return scale * np.asarray(model.attribution(x), np.float64)
    import torch

    parameter = next(model.parameters())
    with torch.no_grad():
        _, score = model.energy_and_score(torch.as_tensor(x, dtype=parameter.dtype, device=parameter.device))
    return -scale * score.cpu().numpy().astype(np.float64)


def group(features: Sequence[str]) -> dict[str, list[int]]:
    """Columns by object, in the order in which the objects appear; a feature of none is a group of its own."""
    groups: dict[str, list[int]] = {}
    for j, feature in enumerate(features):
        matches = ((name, re.fullmatch(pattern, feature)) for name, pattern in _GROUPS)
        name = next((name.format(*m.groups()) for name, m in matches if m), feature)
        groups.setdefault(name, []).append(j)
    return groups


def group_pulls(pull: np.ndarray, x: np.ndarray, groups: dict[str, list[int]]) -> np.ndarray:
    """(n, G): the length of the pulls (n, D) of a group, positive where less of it would make the event more ordinary.

    "Less" is smaller in magnitude, whatever the sign of a value of x (n, D): a softer object, fewer jets, a lower mass.
    """
    outward = pull * np.where(x < 0, -1, 1)
    return np.stack([np.linalg.norm(pull[:, members], axis=1) * np.where(outward[:, members].sum(axis=1) < 0, -1, 1)
                     for members in groups.values()], axis=1)


def faithfulness(model: Any, x: np.ndarray, sigmas: Sequence[float], normal: np.ndarray, seed: int = 0) -> dict:
    """Whether the features with the largest pulls are those that raise the energy of events x (n, D).

    Features are removed, that is replaced by what the event's other features imply: their linear regression on them
    over the events `normal` (m, D), after preprocessing. (A fixed value, as the median, would make events that cannot
    be, such as sums of momenta that are not the momenta's sum, and an energy is high for those; Frye et al.,
    arXiv:2006.01272.) Removed are those with the largest pulls, those that lie farthest out, and random ones (of 10
    draws the mean), always among the features an event has. `drop` has the mean fall of the energy in units of its
    spread over `normal`, for each number in `removed`; `top_minus_random` the difference between largest pulls and
    random, with its 95% interval over resampled events (NaN for a single one), and `better` the share of events in
    which it is positive.
    """
    from sklearn.covariance import LedoitWolf

    rng = np.random.default_rng(seed)
    pull, before = np.abs(pulls(model, x, sigmas)), energies(model, x, sigmas)
    spread, there = float(energies(model, normal, sigmas).std()), ~np.isnan(normal).all(axis=0)
    if not spread > 0:
        raise ValueError(f"the energies of {len(normal)} normal event(s) have no spread to compare with")
    u, raw = preprocessed(model, x), hasattr(model, "attribution") and model.preprocess
    usable, distance = (pull != 0) & there, np.abs(u)
    background = LedoitWolf().fit(preprocessed(model, normal))  # shrunk: fewer events than features are enough

    def drop(rank: np.ndarray, m: int) -> np.ndarray:
        order = np.argsort(-np.where(usable, rank, -np.inf), axis=1)
        taken = np.zeros(x.shape, bool)
        np.put_along_axis(taken, order[:, :m], True, axis=1)
        taken &= usable
        implied = _implied(u, taken, background.location_, background.precision_)
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
    return {"n_events": len(x), "energy_spread": spread, "removed": removed, "drop": drops,
            "top_minus_random": differences}


def _implied(u: np.ndarray, taken: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """u (n, D) with the features `taken` (n, D) at their mean given the others, for a Gaussian of this precision."""
    implied = u.copy()
    for event, gone in zip(implied, taken):
        known = precision[np.ix_(gone, ~gone)] @ (event[~gone] - mean[~gone])
        event[gone] = mean[gone] - np.linalg.lstsq(precision[np.ix_(gone, gone)], known)[0]
    return implied


def draw_faithfulness(ax: Axes, result: dict) -> None:
    """The mean fall of the energy against the number of features removed."""
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
    ax.set_ylabel("mean fall of the energy [spread over background]")
    ax.legend(title=f"the {result['n_events']} highest-scoring events")


def draw_pulls(ax: Axes, pull: Sequence[float], names: Sequence[str], usual: Sequence[float], bars: int = 14) -> None:
    """The largest pulls as bars, the largest on top, over what is usual in normal events (RMS, grey)."""
    shown = [j for j in np.argsort(-np.abs(pull))[:bars] if pull[j] != 0]
    y = np.arange(len(shown))
    width = np.array([usual[j] for j in shown])
    ax.barh(y, 2 * width, left=-width, height=0.85, color="0.87", label="normal events, RMS")
    values = np.array([pull[j] for j in shown])
    ax.barh(y, values, height=0.5, color=np.where(values > 0, RED, BLUE).tolist())
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(y, [names[j] for j in shown])
    ax.tick_params(axis="y", which="both", length=0)
    ax.set_ylim(max(len(shown), 8) - 0.4, -0.6)
    reach = 1.1 * max(np.abs(values).max(initial=0), width.max(initial=0), 1e-9)
    ax.set_xlim(-reach, reach)
    ax.set_xlabel("pull [background spread]")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=9, borderaxespad=0.2)
