"""What a cut gains for a search: significance improvement, and the AMS of the HiggsML challenge."""

from __future__ import annotations

import numpy as np

from ebm.efficiency import Sample, checked

LEAST = 10  # background events that must pass: fewer are a fluctuation
B_REG = 10.0
# Signal and background events of HiggsML at full luminosity, which the weights of each of its samples sum to
# (Adam-Bourdarios et al., JMLR W&CP 42, 19, 2015).
HIGGSML_YIELDS = (691.99, 410_999.85)


def sic_curve(y: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None,
              least: int = LEAST) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Background efficiency, signal efficiency and significance improvement e_S / sqrt(e_B), each (m,).

    One for every cut between background events that at least `least` of them pass; none where there are not so many.
    """
    y, scores, w = checked(y, scores, weights)
    signal, background = (Sample(scores[y == c], w[y == c]) for c in (1, 0))
    cuts = _cuts(background, least)
    e_b, e_s = background.share(cuts), signal.share(cuts)
    e_b, e_s = e_b[e_b > 0], e_s[e_b > 0]  # negative weights can leave nothing
    return e_b, e_s, e_s / np.sqrt(e_b)


def sic_max(y: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None, least: int = LEAST) -> dict:
    """The highest improvement and where it is, NaN where fewer than `least` background events are there.

    It is chosen on the events that it is measured on, and so is high, by up to the 16% that 10 background events leave.
    """
    e_b, e_s, sic = sic_curve(y, scores, weights, least)
    if len(sic) == 0:
        return dict.fromkeys(("max", "background_efficiency", "signal_efficiency"), float("nan"))
    i = sic.argmax()
    return {"max": float(sic[i]), "background_efficiency": float(e_b[i]), "signal_efficiency": float(e_s[i])}


def ams(s: np.ndarray | float, b: np.ndarray | float, b_reg: float = B_REG) -> np.ndarray | float:
    """Approximate median significance of s signal and b background events (Cowan et al. 2011, regularised).

    sqrt(2 ((s + b + b_reg) ln(1 + s / (b + b_reg)) - s)); raises ValueError where s or b + b_reg is not positive.
    """
    s, b = np.asarray(s, np.float64), np.asarray(b, np.float64) + b_reg
    if not ((s >= 0).all() and (b > 0).all()):
        raise ValueError(f"AMS needs s >= 0 and b + b_reg > 0, given least {s.min():g} and {b.min():g}")
    return np.sqrt(2 * np.maximum((s + b) * np.log1p(s / b) - s, 0))[()]


def ams_of(y: np.ndarray, scores: np.ndarray, weights: np.ndarray, yields: tuple[float, float] = HIGGSML_YIELDS,
           cut: float | None = None, least: int = LEAST) -> dict:
    """The highest AMS over all cuts that at least `least` background events pass, and the AMS at `cut`.

    The weights of a part of the sample are scaled up to `yields`, the signal and background events at full luminosity.
    """
    y, scores, w = checked(y, scores, weights)
    signal, background = (Sample(scores[y == c], w[y == c]) for c in (1, 0))

    def at(cuts: np.ndarray) -> np.ndarray:
        s, b = signal.share(cuts) * yields[0], background.share(cuts) * yields[1]
        return ams(np.maximum(s, 0), np.maximum(b, 0))

    cuts = _cuts(background, least)
    nan = float("nan")
    result = {"max": nan, "background_efficiency": nan, "at_cut": nan if cut is None else float(at(cut))}
    if len(cuts):
        significance = at(cuts)
        best = cuts[significance.argmax()]
        result |= {"max": float(significance.max()), "background_efficiency": float(background.share(best))}
    return result


def _cuts(background: Sample, least: int) -> np.ndarray:
    cuts = np.append(np.unique(background.scores)[::-1], -np.inf)
    return cuts[background.number(cuts) >= least]
