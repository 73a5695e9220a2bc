"""What a Scorer is asked, and how far its answers are from float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from export.verify_events import NEAR, Answer, Truth
from kernels import Scorer
from kernels.scorer import Array
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score, tolerance_of_model

BATCHES = (1, 2, 3, 7, 64, 257, 4096)
AT_LEAST, TOGETHER = 64, 257  # events that an error is taken over, and in a batch
# Where an event has the same bits: at any place in a batch, or also in a batch of any size.
ANY_PLACE, ANY_BATCH = ("native", "numba"), ("numba",)


class NotRun(Exception):
    """Why a check or a Scorer was not run; not an error."""


@dataclass(frozen=True)
class Case:
    """A Scorer, what is true, and, for an artefact, its manifest."""

    scorer: Scorer
    truth: Truth
    document: dict | None

    @property
    def tolerance(self) -> float:
        return tolerance_of_model(self.scorer.precision, self.scorer.bundle.reports)

    def gives(self, output: str) -> bool:
        """Whether it has this output; an artefact may have been exported with few."""
        if self.document is None:
            return output != "score" or self.scorer.gives_score
        return output in self.document["options"]["outputs"]

    def __call__(self, x: np.ndarray, k: Array = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Energy and score, written over NaN; no score where the Scorer has none."""
        energy = np.full(len(x), np.nan, self.scorer.dtype)
        if not self.gives("score"):
            return self.scorer.energy(x, k, out=energy), None
        return self.scorer.energy_and_score(x, k, out=(energy, np.full(x.shape, np.nan, self.scorer.dtype)))


def compare(case: Case, truth: Answer, energy: np.ndarray | None, score: np.ndarray | None, *,
            spread: tuple[float | None, float | None], far: bool = False) -> dict:
    """The errors of kernels/tolerances.py, and the event with the largest.

    `spread` of energy and score is what they are relative to; None: that of these events. With `far`, the error of
    an event that lies further out than the spread is relative to how far out it is.
    """
    e_spread = truth.energy.std() if spread[0] is None else spread[0]
    s_size = np.sqrt(np.mean(truth.score**2, axis=1))
    s_spread = np.sqrt(np.mean(s_size**2)) if spread[1] is None else spread[1]
    e_scale = np.maximum(1, np.abs(truth.energy - case.truth.centre) / e_spread) if far else np.ones(len(s_size))
    s_scale = np.maximum(1, s_size / s_spread) if far else e_scale
    of_event, errors = np.zeros(len(s_size)), {}
    with np.errstate(invalid="ignore", over="ignore"):
        if energy is not None:
            errors["error_energy"] = relative_rms_energy(energy / e_scale, truth.energy / e_scale, e_spread)
            of_event = np.abs(energy - truth.energy) / e_scale / (e_spread or 1)
        if score is not None:
            s_scale = s_scale[:, None]
            errors["error_score"] = relative_rms_score(score / s_scale, truth.score / s_scale, s_spread)
            of_event = np.maximum(
                of_event, np.sqrt(np.mean(((score - truth.score) / s_scale) ** 2, axis=1)) / (s_spread or 1))
    worst = int(np.argmax(np.where(np.isnan(of_event), np.inf, of_event)))
    return {"events": len(s_size), **errors, "worst": {
        "event": worst, "error": float(of_event[worst]), "true_energy": float(truth.energy[worst]),
        "energy": None if energy is None else float(energy[worst])}}


def random(case: Case) -> Iterator[dict]:
    """Errors and ranks on random events."""
    yield _ordinary(case, "random")


def real(case: Case) -> Iterator[dict]:
    """Errors and ranks on real events."""
    if case.truth.why_no_real:
        raise NotRun(case.truth.why_no_real)
    yield _ordinary(case, "real")


def _ordinary(case: Case, name: str) -> dict:
    a = case.truth.answer(name)
    energy, score = case(a.x)
    enough = len(a.x) >= AT_LEAST and a.energy.std() > 0
    rank = float(spearmanr(energy, a.energy).statistic) if enough else None
    return {"of": name, "spearman": rank, **compare(
        case, a, energy, score, spread=(None, None) if enough else case.truth.spread, far=not enough)}


def adversarial(case: Case) -> Iterator[dict]:
    """Each kind of hard but finite events, and missing values."""
    for name in case.truth.adversarial:
        a = case.truth.answer(name)
        yield {"of": name, **compare(case, a, *case(a.x), spread=case.truth.spread, far=True)}


def not_finite(case: Case) -> Iterator[dict]:
    """Inf, and NaN where a value may not miss, in each feature: refused; or, if asked so, not finite for that event
    alone."""
    damaged, clean = case.truth.damaged, case.truth.of(case.truth.complete[:len(case.truth.damaged)])
    x = np.stack([damaged, clean.x], axis=1).reshape(-1, damaged.shape[1])
    asked, case.scorer.on_nonfinite = case.scorer.on_nonfinite, "propagate"
    try:
        energy, score = case(x)
    finally:
        case.scorer.on_nonfinite = asked
    figures = compare(case, clean, energy[1::2], None if score is None else score[1::2], spread=case.truth.spread)
    if plausible := int(np.isfinite(energy[::2]).sum()):
        figures["problem"] = f"a finite energy for {plausible} of {len(damaged)} events that are not finite"
    else:
        try:
            case.scorer.energy(damaged)
            figures["problem"] = "events that are not finite are not refused"
        except ValueError:
            pass
    yield figures | {"of": "NaN and Inf"}


def batches(case: Case) -> Iterator[dict]:
    """The same events in batches of every size; and the energy alone, which may take another way."""
    a = case.truth.answer("random")
    for n in BATCHES:
        parts = range(0, max(n, AT_LEAST - AT_LEAST % n), n)  # a single event is no RMS
        x = a.x[:parts[-1] + n]
        energy, score = _joined(case(x[i:i + n]) for i in parts)
        (alone,) = _joined((case.scorer.energy(x[i:i + n], out=np.full(n, np.nan, case.scorer.dtype)),) for i in parts)
        truth = Answer(*(v[:len(x)] for v in a))
        figures = compare(case, truth, energy, score, spread=case.truth.spread)
        error = compare(case, truth, alone, None, spread=case.truth.spread)["error_energy"]
        yield {"of": f"n = {n}", **figures, "error_energy": float(np.maximum(figures["error_energy"], error))}


def _joined(parts: Iterable[tuple]) -> list[np.ndarray | None]:
    """Batches of results, one after another."""
    return [None if results[0] is None else np.concatenate(results) for results in zip(*parts)]


def alone(case: Case) -> Iterator[dict]:
    """The same event by itself, and at another place in a batch."""
    x = case.truth.ordinary["random"][:TOGETHER]
    energy, score = case(x)
    moved = case(np.roll(x, 1, axis=0))
    ways = {"alone": _joined(case(x[i:i + 1]) for i in range(AT_LEAST)),
            "at another place": [None if v is None else np.roll(v, -1, axis=0) for v in moved]}
    in_any_batch = case.scorer.name in ANY_BATCH or getattr(case.scorer, "deterministic", False)
    for way, promised in (("alone", in_any_batch), ("at another place", case.scorer.name in ANY_PLACE)):
        e, s = ways[way]
        n = len(e)
        here = Answer(x[:n], energy[:n].astype(np.float64), np.zeros((n, 1)) if score is None else
                      score[:n].astype(np.float64))
        same = np.array_equal(e, energy[:n]) and (s is None or np.array_equal(s, score[:n]))
        yield {"of": way, **compare(case, here, e, s, spread=case.truth.spread), "same_bits": same,
               "bits_promised": promised}


def levels(case: Case) -> Iterator[dict]:
    """All noise levels: in one pass, and mixed in one batch."""
    x, n_levels = case.truth.ordinary["random"][:256], case.scorer.n_levels
    if not case.gives("energies"):
        raise NotRun("one noise level was exported: --outputs energies exports all")
    energies = case.scorer.energies(x, out=np.full((len(x), n_levels), np.nan, case.scorer.dtype))
    for k in range(n_levels):
        answer = case.truth.of(x, k)
        yield {"of": f"k = {k}", **compare(case, answer, energies[:, k], None, spread=(None, None))}
    if case.document is None:
        k = np.arange(len(x)) % n_levels
        yield {"of": "mixed", **compare(case, case.truth.of(x, k), *case(x, k), spread=(None, None))}


def gradient(case: Case) -> Iterator[dict]:
    """The score is the gradient of this Scorer's own energy: central differences along random directions.

    The step is the cube root of the tolerance, in standard deviations, which balances rounding and curvature. The
    limit is four times what halving the step changes in float64, and what the tolerance of E makes of rounding.
    Medians: with ReLU, a few events lie across a kink.
    """
    if case.scorer.bundle.architecture.kind == "score":
        raise NotRun("the energy of this kind is |s|, of which s is not the gradient")
    if not case.gives("score"):
        raise NotRun("there is no score to check")
    x = case.truth.complete[:TOGETHER]
    towards = np.random.default_rng(1).normal(size=x.shape) * case.truth.width(x) / np.sqrt(x.shape[1])

    def difference(energy: Callable[[np.ndarray], np.ndarray], step: float) -> tuple[np.ndarray, np.ndarray]:
        """E(x + step) - E(x - step), per step, and the way between the two as rounded."""
        ahead, behind = ((x + way * towards).astype(case.scorer.dtype) for way in (step, -step))
        return (energy(ahead).astype(np.float64) - energy(behind)) / step, (ahead.astype(np.float64) - behind) / step

    step = case.tolerance ** (1 / 3)
    true, true_of_half = (difference(lambda v: case.truth.of(v).energy, s)[0] for s in (step, step / 2))
    own, way = difference(lambda v: case(v)[0], step)
    size = np.sqrt(np.mean(true**2))
    rounding = 2 * case.tolerance * case.truth.spread[0] / step
    limit = (4 * np.median(np.abs(true - true_of_half)) + rounding) / size
    error = np.median(np.abs(own + (case(x)[1] * way).sum(1))) / size
    yield {"events": len(x), "error_score": float(error), "tolerance": float(limit)}


def flags(case: Case) -> Iterator[dict]:
    """Flags of ordinary events, and of events made to lie close to the threshold."""
    if case.truth.threshold is None:
        raise NotRun("the model has no threshold for this noise level")
    if not case.gives("flag"):
        raise NotRun("the flag was not exported")
    for name in (*case.truth.ordinary, *([] if case.truth.near_threshold is None else [NEAR])):
        a = case.truth.answer(name)
        above = a.energy - case.truth.threshold
        unclear = np.abs(above) < 2 * case.tolerance * case.truth.spread[0]
        differ = (case.scorer.flag(a.x) != (above > 0)) & ~unclear
        yield {"of": name, "events": len(a.x), "flags_differ": int(differ.sum()), "flags_unclear": int(unclear.sum())}


def golden(case: Case) -> Iterator[dict]:
    """The events and answers that lie in export.json: of the artefact, and of float64 today."""
    stored = case.document["golden"]
    x, energy, score = np.array(stored["events"], np.float32), *(np.array(stored[k], float) for k in (
        "energy", "score"))
    answer = Answer(x, energy, score)
    yield {"of": "artefact", **compare(case, answer, *case(x), spread=(None, None))}
    yield {"of": "float64", **compare(case, answer, *case.truth.of(x)[1:], spread=(None, None)),
           "tolerance": TOLERANCES["fp64"]}


CHECKS: dict[str, Callable[[Case], Iterator[dict]]] = {
    "random": random, "real": real, "adversarial": adversarial, "not finite": not_finite, "batches": batches,
    "alone": alone, "levels": levels, "gradient": gradient, "flags": flags, "golden": golden,
}
