"""A report's numbers as a reader takes them in: formats, and the sentences of the summary."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ebm.attribution import HEADLINE

_UNKNOWN, _MINUS, _TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def fixed(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """0.8731, with a dash for what is not known."""
    return _UNKNOWN if _unknown(value) else f"{value:{'+' if sign else ''},.{digits}f}".replace("-", _MINUS)


def short(value: float | None, digits: int = 2) -> str:
    """The digits that count, and powers of ten for what is small or large: 0.012, 7.5 × 10⁻⁵."""
    if _unknown(value):
        return _UNKNOWN
    rounded = float(f"{value:.{digits}g}")
    if rounded == 0 or 1e-3 <= abs(rounded) < 1e6:
        return (f"{rounded:.{digits}g}" if abs(rounded) < 10**digits else f"{value:,.0f}").replace("-", _MINUS)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = f"10{str(int(exponent)).translate(_RAISED)}"
    return power if value == float(f"1e{exponent}") else f"{mantissa} {_TIMES} {power}".replace("-", _MINUS)


def between(interval: Sequence[float | None], digits: int = 4, sign: bool = False) -> str:
    """[0.8612, 0.8850]"""
    return _UNKNOWN if _unknown(interval[0]) else f"[{', '.join(fixed(v, digits, sign) for v in interval)}]"


def between_short(interval: Sequence[float | None], digits: int = 2) -> str:
    """[2.5 × 10⁻⁵, 0.0012]"""
    return _UNKNOWN if _unknown(interval[0]) else f"[{', '.join(short(v, digits) for v in interval)}]"


def hertz(value: float) -> str:
    """1,000 Hz, 2.99 kHz"""
    scale, unit = next(((s, u) for s, u in ((1e6, "MHz"), (1e3, "kHz")) if value >= s), (1, "Hz"))
    return f"{short(value / scale, 3)} {unit}"


def largest(pulls: dict[str, float], number: int) -> list[tuple[str, float]]:
    """The names with the largest pulls, whatever their sign."""
    return sorted(pulls.items(), key=lambda item: -abs(item[1]))[:number]


def plural(n: int, noun: str) -> str:
    """1 event, 2,000 events"""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def typed(source: str) -> str:
    """The name of a sample as a command takes it: toy:20000 for toy:20000+400."""
    return re.sub(r"^(toy:\d+)\+\d+$", r"\1", Path(source).name)


def explained(names: Iterable[str]) -> str:
    """What the names of detectors and of figures mean, a clause for each that begins like one of them."""
    names = list(names)
    return "; ".join(f"{start}: {what}" for start, what in _MEANINGS.items() if any(n.startswith(start) for n in names))


_MEANINGS = {
    "|x|": "the distance from the mean of background, each feature in units of its spread",
    "n_missing": "how many values are missing", "n_objects": "how many are there, the same the other way round",
    "HT": "the scalar sum of transverse momenta",
    "Mahalanobis": "that distance with the correlations of background",
    "isolation forest": "how few random splits set an event apart",
    "KNN": "the mean distance to the k nearest background events",
    "LOF": "the local outlier factor, how much sparser events are around it than around its neighbours",
    "autoencoder": "the error of reconstruction from so many latent numbers",
    "AUROC within a multiplicity": "signal against background of the same number of jets, so that their number tells "
                                   "nothing",
    "SIC": "significance improvement, by how much a cut raises S/√B",
    "AMS": "the approximate median significance of the HiggsML challenge",
    "KS": "Kolmogorov-Smirnov distance, 0 for the same distribution and 1 for none in common",
}
FILTERS = {f.__name__: f for f in (fixed, short, between, between_short, hertz, largest, explained)}


def summary(numbers: dict) -> list[str]:
    """What to take away, in sentences that follow from the numbers alone."""
    lines = [*_of_threshold(numbers), *_of_flags(numbers)]
    if numbers["evaluation"]:
        lines += _of_detectors(numbers["evaluation"])
    return [*lines, *_of_sculpting(numbers["sculpting"]), *_of_pulls(numbers)]


def _of_threshold(numbers: dict) -> list[str]:
    t = numbers["threshold"]
    if t is None:
        return ["The model has no threshold: it ranks events and flags none. 'python -m ebm calibrate' gives it one."]
    events = f"{t['n_background']:,} calibration events"
    if t["guaranteed"]:
        line = (f"The flag is guaranteed, at {t['confidence']:.0%} confidence, to be raised for at most "
                f"{short(t['rate'])} of background like that of the calibration; the bound reached with {events} is "
                f"{short(t['upper_bound'])}.")
    else:
        kind = "an estimate" if t["n_eff"] is not None else f"guaranteed at {t['confidence']:.0%} confidence"
        line = (f"The flag was to be raised for at most {short(t['rate'])} of background, and {events} cannot "
                f"guarantee that: what they give is at most {short(t['upper_bound'])}, {kind}.")
    first = t["trigger"][0]
    return [line, f"Of {hertz(first['input_rate'])} of such background it would keep {hertz(first['expected'])} on "
                  f"average, at most {hertz(first['at_most'])}."]


def _of_flags(numbers: dict) -> list[str]:
    t, lines = numbers["threshold"], []
    for name, flagged in (numbers["flagged"] or {}).items():
        n = plural(flagged["n"], "event" if name == "events" else f"{name} event")
        line = (f"It flags {round(flagged['rate'] * flagged['n']):,} of {n} here: {short(flagged['rate'])} (95% "
                f"interval {between_short(flagged['interval'])})")
        if name != "signal" and flagged["interval"][0] > t["upper_bound"]:
            line += (". That is more than the bound: these events are not like the calibration background"
                     + (", or signal is among them" if name == "events" else ""))
        lines.append(line + ".")
    return lines


def _of_detectors(evaluation: dict) -> list[str]:
    detectors, minus = evaluation["detectors"], evaluation["energy_minus"]
    if not minus:
        return []
    energy = detectors["energy"]
    best = max(minus, key=lambda name: detectors[name]["auroc"])
    low, high = minus[best]["interval"]
    verdict = ("separates signal better than" if low > 0 else "separates signal worse than" if high < 0 else
               "cannot be told apart from")
    number = len(minus) - ({"n_missing", "n_objects"} <= set(minus))  # one variable, either way round
    lines = [f"By AUROC the energy {verdict} {best}, the best of {number} simple detectors on these events: "
             f"{fixed(energy['auroc'])} {between(energy['auroc_interval'])} against {fixed(detectors[best]['auroc'])}, "
             f"a paired difference of {fixed(minus[best]['auroc'], sign=True)} "
             f"{between(minus[best]['interval'], sign=True)}."]
    key, rejection = "signal_efficiency_at_tightest", energy["tightest_rejection"]
    best = max(minus, key=lambda name: detectors[name][key])
    intervals = {name: between(detectors[name][f"{key}_interval_with_cut"]) for name in ("energy", best)}
    limit = "" if rejection == energy["rejection"] else ", the tightest that this sample resolves"
    lines.append(f"At a background rejection of {100 * rejection:.4g}%{limit}, the energy keeps {fixed(energy[key])} "
                 f"of the signal {intervals['energy']}, and {best}, the best of the others there, "
                 f"{fixed(detectors[best][key])} {intervals[best]}.")
    if weighted := {name: d["auroc"] for name, d in evaluation["weighted"].items()}:
        best = max(minus, key=weighted.get)
        lines.append(f"With the events' weights the AUROC of the energy is {fixed(weighted['energy'])}, and that of "
                     f"{best}, the best of the others then, {fixed(weighted[best])}.")
    return lines


def _of_sculpting(shaped: dict) -> list[str]:
    cuts = [c for c in shaped.get("cuts", []) if not _unknown(c["p_value"])]
    if not cuts:
        return []
    least = min(cuts, key=lambda c: c["p_value"])
    p = min(1.0, len(cuts) * least["p_value"])  # Bonferroni: several cuts are looked at
    if p < 0.05:
        return [f"A cut on the energy shapes {shaped['feature']} of background: where {short(least['share'])} of it "
                f"pass, the Jensen-Shannon distance is {fixed(least['distance'], 3)}, by chance below "
                f"{fixed(least['limit'], 3)} in 95% of cases (p = {short(p)} with {len(cuts)} cuts looked at). A bump "
                "hunt there has to model that."]
    return [f"No sign that cuts on the energy shape {shaped['feature']} of background (p = {short(p)} with {len(cuts)} "
            "cuts looked at), as far as this sample can tell."]


def _of_pulls(numbers: dict) -> list[str]:
    if (check := numbers["errors"].get("faithfulness")) is None:
        return []
    line = numbers["errors_in_words"][-1]
    i = check["removed"].index(HEADLINE) if HEADLINE in check["removed"] else -1
    low, high = check["top_minus_random"][i]["interval"]
    verdict = ""
    if check["drop"]["largest pulls"][i] <= 0:
        verdict = " The pulls below do not explain these energies: without those features they are no lower."
    elif not low > 0:
        verdict = " The pulls below do not explain these energies: random features matter as much" + (
            " or more." if high < 0 else ".")
    return [f"{line[0].upper()}{line[1:]}.{verdict}"]


def _unknown(value: float | None) -> bool:
    return value is None or math.isnan(value)
