"""Everything that is known of a model and how it does on a sample, on one page that needs nothing beside it."""

from __future__ import annotations

import base64
import struct
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from os import cpu_count
from pathlib import Path
from platform import machine, system
from typing import Any

import numpy as np

from ebm.bundle import Bundle
from ebm.command import commit, plain, processor, versions, whole_file
from ebm.efficiency import cut_at_rejection
from ebm.errors import error_analysis, visible_rejection
from ebm.errors import summary as errors_in_words
from ebm.evaluate import evaluate, mass_sculpting, rate
from ebm.events import DataError, Events, split
from ebm.folds import trained_on
from ebm.model_card import model_card
from ebm.plots import plot_sculpting
from ebm.report_pictures import efficiencies, plot_efficiencies, plot_energies, plot_training
from ebm.report_words import FILTERS, plural, short, summary, typed
from ebm.sculpting import resonance
from ebm.style import Pictures, check_directory
from ebm.threshold import CROSSINGS, trigger_rate

PAGE = "report.html"
_VISIBLE = 100  # background events above a cut: ten for each bin of a variable
_VARIABLES = (("ht", "PRI_jet_all_pt"), ("MET", "PRI_met"), ("n_jets", "PRI_jet_num"))
_INPUT_RATES = {"every bunch crossing": CROSSINGS, "what a hardware trigger keeps": 1e5, "what is recorded": 1e3}
_PACKAGES = ("fused-ebm", "numpy", "scipy", "scikit-learn", "torch", "matplotlib", "mplhep", "hist")


@dataclass(frozen=True)
class Report:
    """The page, the numbers on it as plain Python (None for NaN), and the files that were written."""

    page: str
    numbers: dict
    files: list[Path]


def report(bundle: Bundle, events: Events, scorer: Any, out: Path, *, model: str = "model",
           resamples: int = 1000) -> Report:
    """Write `report.html` and its pictures, each as PNG and PDF, into directory `out`.

    `scorer` gives energies and attributions of `bundle`, as a `kernels.Scorer` does; `model` is its name on the page.
    Where the model was trained or calibrated on some of these events only their test folds count, else all events.
    What the events cannot say, without labels or with one class, is left out, and `notes` says so.
    Raises DataError where no event counts or the directory cannot be written, RuntimeError where pictures cannot be
    drawn here.
    """
    check_directory(out)
    seen = trained_on(bundle, events)
    kept = events[split(events).test] if seen else events
    if len(kept) == 0:
        raise DataError(f"{events.source or 'the data'}: no event{' in the test folds' if seen else ''} "
                        f"({plural(len(events), 'event')} in all)")
    energy = np.asarray(scorer.energy(kept.x), np.float64)
    classes = _classes(kept)
    n = {name: int(rows.sum()) for name, rows in classes.items()}
    own, notes = Pictures(), []
    evaluation = None
    if len(classes) == 2:
        try:
            evaluation = evaluate(bundle, events, lambda _: energy, resamples=resamples, pictures=out)
        except ValueError as e:  # what it cannot do is no reason to leave out all else
            notes.append(f"no comparison with simple detectors: {e}")
    else:
        notes.append("no labels: neither efficiencies nor a comparison with simple detectors" if kept.label is None else
                     f"{' and '.join(classes)} only: nothing to tell apart, so no comparison with simple detectors")
    t = bundle.threshold
    numbers = {
        "model": model, "data": typed(events.source) or "the data", "data_digest": events.digest,
        "events": "test folds" if seen else "all", "n": n | {"events": len(kept)},
        "threshold": t and asdict(t) | {"expected_rate": t.expected_rate, "trigger": [
            {"of": name, "input_rate": hz, **dict(zip(("expected", "at_most"), trigger_rate(t, hz)))}
            for name, hz in _INPUT_RATES.items()]},
        "class_thresholds": bundle.class_thresholds and asdict(bundle.class_thresholds),
        "flagged": t and {name: rate(energy[rows] > t.energy) for name, rows in classes.items()},
        "evaluation": evaluation,
        "efficiency": _efficiency(bundle, kept, energy, classes, own),
        "sculpting": evaluation["sculpting"] if evaluation else _shaped(bundle, kept, energy, own),
        "training": _training(bundle, own),
    }
    sigma = bundle.sigmas[bundle.default_level] if bundle.sigmas else None
    own.figures["energies"] = plot_energies(energy, classes, t and t.energy, sigma)
    rejection = visible_rejection(n.get("background", 0), fewest=_VISIBLE)
    analysed = error_analysis(scorer, kept.x, kept.label, energy, bundle.sigmas, event_id=kept.event_id,
                              process=kept.process, rejection=rejection)
    numbers |= {"errors": analysed.numbers, "errors_in_words": errors_in_words(analysed.numbers),
                "card": model_card(bundle), "provenance": _provenance(bundle, events, scorer),
                "notes": notes + own.notes + analysed.notes}
    numbers["summary"] = summary(numbers)
    files = Pictures(own.figures | analysed.figures).save(out)
    files += [out / name for name in (evaluation or {}).get("pictures", [])]
    numbers = plain(numbers)
    page = render(numbers, {path.stem: path.read_bytes() for path in files if path.suffix == ".png"})
    with whole_file(out / PAGE) as f:
        f.write(page.encode())
    return Report(page, numbers, [out / PAGE, *files])


def render(numbers: dict, pictures: dict[str, bytes]) -> str:
    """The page of these plain numbers and PNG pictures; every text in them is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FILTERS
    template = environment.from_string(Path(__file__).with_name(PAGE).read_text())
    return template.render(**numbers, pictures={name: _embedded(png) for name, png in pictures.items()})


def _embedded(png: bytes) -> dict:
    """The picture as a URL, and its width in CSS pixels (its own are 150 to the inch)."""
    width, height = struct.unpack(">II", png[16:24])
    return {"src": f"data:image/png;base64,{base64.b64encode(png).decode()}", "width": round(width * 96 / 150),
            "height": round(height * 96 / 150)}


def _classes(events: Events) -> dict[str, np.ndarray]:
    if events.label is None:
        return {"events": np.ones(len(events), bool)}
    rows = {name: events.label == c for c, name in enumerate(("background", "signal"))}
    return {name: r for name, r in rows.items() if r.any()}


def _efficiency(bundle: Bundle, events: Events, energy: np.ndarray, classes: dict[str, np.ndarray],
                result: Pictures) -> dict | None:
    """Who is flagged, or passes a looser cut where too few background events are, by what every analysis looks at."""
    name, rows = next(iter(classes.items()))
    of, t = energy[rows], bundle.threshold
    n = plural(len(of), "event" if name == "events" else f"{name} event")
    if len(of) < 2:
        result.notes.append(f"{n}: no efficiency against a variable")
        return None
    flagged = t and np.count_nonzero(of > t.energy)
    is_flag = t is not None and (name == "signal" or flagged >= _VISIBLE)
    cut = t.energy if is_flag else cut_at_rejection(of, visible_rejection(len(of), fewest=_VISIBLE))
    passed = energy > cut
    features, units = events.schema.features, dict(zip(events.schema.features, events.schema.units))
    known = np.where(bundle.preprocessing.missing(events.x), np.nan, events.x)
    shown = {f: efficiencies(known[:, features.index(f)], passed, classes)
             for names in _VARIABLES for f in names if f in features}
    for f in [f for f, found in shown.items() if not found]:
        result.notes.append(f"{f} has fewer than two values, so no efficiency against it")
        del shown[f]
    if not any(f in features for names in _VARIABLES for f in names):
        result.notes.append("no HT, MET or multiplicity among the features: no efficiency against them")
    if not shown:
        return None
    share = float(passed[rows].mean())
    what = "the threshold" if is_flag else f"the cut that keeps {short(100 * share)}% of the {name}"
    why = "" if is_flag else ("The model has no threshold." if t is None else
                              f"The flag is not shown: of {n} it is raised for {flagged:,}, too few for ten bins.")
    result.figures["efficiency"] = plot_efficiencies(shown, units, f"Above {what}")
    return {"cut": cut, "share": share, "is_flag": is_flag, "what": what, "why": why, "of": shown}


def _shaped(bundle: Bundle, events: Events, energy: np.ndarray, result: Pictures) -> dict:
    """What `evaluate` says of a mass, where there is background and no evaluation."""
    shaped = {} if events.label is None else mass_sculpting(bundle, events, energy, resonance(events.schema))
    if shaped:
        feature, rows = shaped["feature"], events.label == 0
        j = events.schema.features.index(feature)
        result.figures[f"sculpting_{feature}"] = plot_sculpting(
            events.x[rows, j], energy[rows], [c["cut"] for c in shaped["cuts"]], feature, events.schema.units[j])
    return shaped


def _training(bundle: Bundle, result: Pictures) -> dict | None:
    p = bundle.provenance
    history, per_level = p.get("history") or [], p.get("held_out_loss_per_level") or []
    if not history:
        result.notes.append("the model does not say how its training went: no training curves")
        return None
    result.figures["training"] = plot_training(history, per_level, bundle.sigmas)
    return {"history": history, "per_level": per_level, "sigmas": bundle.sigmas}


def _provenance(bundle: Bundle, events: Events, scorer: Any) -> dict[str, object]:
    a = bundle.architecture
    s = bundle.sigmas
    levels = f", {len(s)} noise levels from {s[0]:.3g} to {s[-1]:.3g}" if s else ""
    return {
        "model digest (SHA-256)": bundle.digest,
        "network": f"{a.kind}, {a.input_dim} features, {a.n_layers} layers of {a.hidden_dim}{levels}, default level "
                   f"{bundle.default_level}",
        "schema": bundle.schema.name, "data digest": events.digest or "none",
        "backend": f"{scorer.name} on {scorer.device}", "model's commit": bundle.provenance.get("commit"),
        "report's commit": commit(), "report's versions": ", ".join(f"{k} {v}" for k, v in versions(_PACKAGES).items()),
        "machine": f"{processor()}, {cpu_count()} logical cores, {system()} {machine()}",
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
