"""A model card (Mitchell et al., FAT* 2019): what a model is for, what it was made of, and at what cost."""

from __future__ import annotations

import re
import shlex

from ebm.bundle import Bundle
from ebm.report_words import plural, short, typed

_FIVE_SIGMA = 2.87e-7  # one-sided
_SETTINGS = ("steps", "batch_size", "learning_rate", "warmup", "ema", "dsm", "multi_scale", "level_weights", "l2",
             "patience")


def model_card(bundle: Bundle) -> dict[str, list[str]]:
    """Heading -> sentences. What the model's provenance does not say is called not recorded or not measured."""
    p = bundle.provenance
    return {
        "Intended use": [
            "A filter for collision events: it ranks them by how unlikely they are under the background that it was "
            "trained on, so that people and slower analyses look at few of them first. It is not the final arbiter of "
            "anything: whether an event is new physics, known physics or a detector fault is for physicists to find "
            "out.",
            "It orders events and flags them above a threshold. Its energy is no probability, and the energies of two "
            "models, or of two noise levels, are not on one scale.",
        ],
        "A flag is not a discovery": [
            "Background is flagged too, by construction: see the threshold above. A claim needs a background estimate "
            "with its uncertainties, on events that took no part in choosing the model or the cut, and the customary "
            f"five standard deviations: a one-sided p-value of {short(_FIVE_SIGMA)}.",
            "That p-value is global: the look-elsewhere effect counts every region, cut, model and feature that was "
            "looked at. A cut that sculpts a mass makes bumps of background.",
        ],
        "Training data and their biases": [*_training_data(bundle), (
            "The model knows the background of its training sample and nothing else. Known processes that are rare or "
            "missing there, wrong cross sections, pile-up, detector conditions and flaws of the simulation look "
            "anomalous to it; signal that is in the training data looks ordinary. Calibrate again, on background as it "
            "is now, whenever conditions or simulation change.")],
        "How to train it again": _recipe(bundle),
        "Cost of the training": _cost(p),
        "Dual use": [
            "It finds unusual rows of numbers, whatever they mean, and would do so in records of people. It is meant "
            "for data of physics experiments. It must not be used for surveillance, for profiling, or for decisions "
            "about persons: being unusual is no evidence of anything, and none of its guarantees was made for that.",
        ],
    }


def _training_data(bundle: Bundle) -> list[str]:
    p, t = bundle.provenance, bundle.threshold
    n = p.get("background_events", {})
    source = typed(str(p.get("source") or ""))
    if not source:
        return ["Not recorded."]
    lines = [f"Background of {source} (digest {p.get('data_digest') or 'not recorded'}): {n.get('train', 0):,} events "
             f"for training, {n.get('calibrate', 0):,} for the threshold, {n.get('test', 0):,} kept for tests, told "
             "apart by a hash of the event's number. Labels chose the background; no label and no weight was learned "
             "from."]
    if c := p.get("calibration"):
        lines.append(f"The threshold was calibrated anew on {c.get('background_events', 0):,} background events of "
                     f"{typed(str(c.get('source')))} (digest {c.get('data_digest') or 'not recorded'}).")
    if source.startswith("toy"):
        lines.append("These are toy events, made by a few formulas: no generator of matrix elements, no full detector. "
                     "Figures on them compare methods; they say nothing about an experiment.")
    if t is not None and not t.guaranteed:
        lines.append(f"The {t.n_background:,} calibration events are too few, or weighted, to guarantee a background "
                     f"rate of {short(t.rate)}.")
    return lines


def _recipe(bundle: Bundle) -> list[str]:
    p = bundle.provenance
    if not p.get("command"):
        return ["The command was not recorded."]
    seed, members = p.get("seed", 0), p.get("members", 1)
    seeds = f"seed {seed}" if members == 1 else f"{members} networks with seeds {seed} to {seed + members - 1}"
    threads = plural(p["threads"], "thread") if p.get("threads") else "an unknown number of threads"
    return [f"$ {p['command']}", *_calibrated_anew(bundle),
            f"With {seeds}, commit {p.get('commit') or 'not recorded'}, {_versions(p.get('versions', {}))}, "
            f"{threads} on {p.get('device', '?')}: the same of all of these gives the same weights. "
            "Settings: " + ", ".join(f"{k} = {p[k]}" for k in _SETTINGS if p.get(k) is not None) + "."]


def _calibrated_anew(bundle: Bundle) -> list[str]:
    p, t, by = bundle.provenance, bundle.threshold, bundle.class_thresholds
    out, source = re.search(r"--out[= ](\S+)", p["command"]), p.get("calibration", {}).get("source")
    if not (out and source and t):
        return []
    options = ["--rate", t.rate, "--confidence", t.confidence, *(["--by", by.feature] if by else ()),
               *(["--weighted"] if t.n_eff is not None else ())]
    return ["$ " + shlex.join(["python", "-m", "ebm", "calibrate", out[1], typed(source),
                               *map(str, options)])]


def _versions(versions: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "versions not recorded"


def _cost(p: dict) -> list[str]:
    seconds, threads, device = p.get("training_seconds"), p.get("threads"), p.get("device", "cpu")
    if seconds is None:
        return ["Time: not measured.", "Electrical energy: not measured."]
    time = f"{seconds:,.4g} s of wall clock" + ("" if device == "cpu" else f" on {device}")
    if p.get("cpu_seconds") is not None:
        time += f", {short(p['cpu_seconds'] / 3600)} CPU hours"
    elif device == "cpu" and threads:
        time += f" on {plural(threads, 'thread')}: at most {seconds * threads / 3600:.2g} core-hours"
    return [f"Time: {time}, for this training alone; trials before it were not counted.",
            "Electrical energy: not measured. Weigh it, and that of the trials, against what the search may find."]
