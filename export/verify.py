"""The proof: every artefact and every backend that runs here, against float64."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ebm import hep64
from ebm.bundle import Bundle
from ebm.command import commit, plain
from ebm.events import DataError, check_schema, load_events
from export import manifest
from export.scorers import CannotRun
from export.verify_checks import CHECKS, Case, NotRun
from export.verify_events import Truth
from kernels import BACKENDS, Scorer, load_scorer
from kernels.registry import REDUCED
from kernels.tolerances import CHECK_EVENTS, TOLERANCES

TOY = f"toy:{round(CHECK_EVENTS / 1.02)}"
LIBRARIES = ("numpy", "torch", "numba", "triton", "onnxruntime", "tensorrt")
PASS, FAIL, NOT_RUN = "PASS", "FAIL", "NOT RUN"
ALL = tuple(CHECKS)
OF_KERNELS = tuple(name for name in CHECKS if name != "golden")  # which are in export.json
# What a row tells; None where it has no such figure.
ROW = ("scorer", "file", "precision", "device", "check", "of", "status", "reason", "events", "error_energy",
       "error_score", "needed", "tolerance", "worst", "spearman", "flags_differ", "flags_unclear", "same_bits",
       "bits_promised", "seconds")


@dataclass(frozen=True)
class Report:
    """What was checked: one row per Scorer and check, with the entries of ROW, and what it was checked on."""

    about: dict
    rows: list[dict]

    @property
    def ok(self) -> bool:
        """Something ran, and nothing failed."""
        statuses = {row["status"] for row in self.rows}
        return PASS in statuses and FAIL not in statuses

    def to_json(self) -> str:
        """The whole report; null for what is not a number."""
        return json.dumps(plain({"ok": self.ok, **self.about, "rows": self.rows}), indent=1, allow_nan=False) + "\n"


@dataclass(frozen=True)
class _Contender:
    """A Scorer to check; `load` raises where it is damaged (DataError) or cannot run here (NotRun)."""

    name: str
    precision: str | None
    load: Callable[[], Scorer]
    level: int
    document: dict | None = None  # the manifest
    file: str | None = None
    checks: tuple[str, ...] = ALL


def verify(target: str | Path | Bundle, *, data: str | Path | None = None,
           backends: Sequence[str] | None = None) -> Report:
    """Check every artefact under an export directory, and every backend on its model, against float64.

    `target` is an export (with export.json), a directory of exports (a Triton repository too), a model directory or
    a Bundle. `data` are real events, as in `load_events`; by default toy events, for models of their features.
    `backends` are names of `kernels.BACKENDS`, by default all. What cannot run here is NOT RUN, with the reason; any
    other trouble is a FAIL. Raises DataError where there is nothing to verify or the data are of another schema,
    ValueError for an unknown backend.
    """
    start = time.perf_counter()
    if unknown := set(backends or ()) - BACKENDS.keys():
        raise ValueError(f"no backend is called {', '.join(sorted(unknown))}, expected some of {', '.join(BACKENDS)}")
    bundle, contenders = _contenders(target, BACKENDS if backends is None else backends)
    real, why_not = _real_events(bundle, target, data)
    truths: dict[tuple, Truth] = {}

    def truth(scorer: Scorer, level: int) -> Truth:
        key = (scorer.bundle.digest, scorer.bundle.threshold, level, scorer.preprocess)
        if key not in truths:
            events = real, why_not
            if scorer.bundle.schema.features != bundle.schema.features:
                events = None, f"the real events are of {bundle.schema.name}, this model is of another schema"
            truths[key] = Truth(scorer.bundle, level, scorer.preprocess, *events)
        return truths[key]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # they would spin, which on a busy machine takes ten times as long
    try:
        rows = [row for contender in contenders for row in _rows(contender, truth)]
    finally:
        torch.set_num_threads(threads)
    threshold = bundle.threshold
    about = {"target": "Bundle" if isinstance(target, Bundle) else str(target), "model_digest": bundle.digest,
             "kind": bundle.architecture.kind, "schema": bundle.schema.name, "features": bundle.schema.n_features,
             "threshold": threshold and threshold.energy, "data": None if real is None else str(data or TOY),
             "tolerances": TOLERANCES, "commit": commit(), "versions": {
                 name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules},
             "seconds": time.perf_counter() - start}
    return Report(about, rows)


def _contenders(target: str | Path | Bundle, backends: Sequence[str]) -> tuple[Bundle, list[_Contender]]:
    if isinstance(target, Bundle):
        return target, list(_kernels(target, backends))
    target = Path(target)
    if (target / "model.json").is_file():
        bundle = Bundle.load(target)
        return bundle, list(_kernels(bundle, backends))
    exports = [p.parent for p in sorted(target.rglob(manifest.NAME)) if not any(
        part.startswith(".") for part in p.relative_to(target).parts)]
    if not exports:
        raise DataError(f"{target}: nothing to verify; expected a model directory, or one of exports, with "
                        f"{manifest.NAME}")
    bundle = Bundle.load(exports[0] / manifest.SOURCE)
    artefacts = [c for d in exports for c in _artefacts(target, d)]
    if not any(c.file.endswith(".engine") for c in artefacts):
        artefacts.append(_Contender("TensorRT", None, _no_engine, bundle.default_level))
    return bundle, [*_kernels(bundle, backends), *artefacts]


def _kernels(bundle: Bundle, backends: Sequence[str]) -> Iterator[_Contender]:
    for name in backends:
        for precision in BACKENDS[name].dtypes:
            make = partial(_Contender, precision=precision, level=bundle.default_level)
            load = partial(_backend, bundle, name, precision)
            # The truth is checked only for being its own gradient.
            checks = ("gradient",) if precision == "fp64" else OF_KERNELS
            yield make(name, load=load, checks=checks)
            if (name, precision) == ("native", "fp32"):
                yield make("native deterministic", load=partial(load, deterministic=True), checks=checks)


def _backend(bundle: Bundle, name: str, precision: str, **options: bool) -> Scorer:
    if why_not := BACKENDS[name].why_not_for(bundle.architecture.kind):
        raise NotRun(why_not)
    try:
        scorer = load_scorer(bundle, name, precision=precision, **options)
    except (ValueError, RuntimeError) as e:
        if precision in REDUCED:  # no physics report, or not on this processor
            raise NotRun(str(e)) from None
        raise
    if name == "triton" and scorer.device == "cpu":
        raise NotRun("it would run in the interpreter (TRITON_INTERPRET=1), which its own tests do")
    return scorer


def _artefacts(target: Path, directory: Path) -> Iterator[_Contender]:
    document = manifest.read(directory)
    for entry in document["files"].values():
        path = directory / entry["file"]
        if path.parent != directory and (path.parent / manifest.NAME).is_file():
            continue  # it has a manifest of its own
        make = partial(_Contender, precision=None, level=document["options"]["level"], document=document,
                       file=str(path))
        name, load = str(path.relative_to(target)), partial(_artefact, path, entry)
        yield make(name, load=load)
        if path.suffix == ".pt" and torch.cuda.is_available():
            yield make(f"{name} on the GPU", load=partial(load, device="cuda:0"))


def _artefact(path: Path, entry: dict, **options: str | int) -> Scorer:
    from kernels.registry import ARTEFACTS

    if path.suffix not in ARTEFACTS:
        manifest.check_files(path.parent, entry["sha256"])
        raise NotRun(f"only a server runs a {path.suffix} file; its SHA-256 is right")
    if path.suffix in (".pt", ".pt2"):
        options["threads"] = 1  # like the truth; its threads are those of torch
    try:
        return load_scorer(path, **options)
    except CannotRun as e:
        raise NotRun(str(e)) from None


def _no_engine() -> Scorer:
    from export.to_tensorrt import why_not

    raise NotRun(f"no engine was built, so it is unproven: {why_not() or '--to tensorrt builds one here'}")


def _real_events(bundle: Bundle, target: str | Path | Bundle, data: str | Path | None) -> tuple:
    """Events (n, D), n at most CHECK_EVENTS, or None and the reason."""
    if data is None and bundle.schema.features != hep64.SCHEMA.features:
        return None, "no real events: give a file of the model's schema as data"
    name = TOY if data is None else data
    events = load_events(name)
    if data is not None:  # the toy has no b-tagger, which a model's schema names
        check_schema(bundle.schema, events.schema, "the model" if isinstance(target, Bundle) else target, name)
    step = max(1, len(events) // CHECK_EVENTS)
    x = events.x[::step][:CHECK_EVENTS]
    try:
        load_scorer(bundle, "reference").energy(x)
    except ValueError as e:
        raise DataError(f"{name}{f', every {step} events' if step > 1 else ''}: {e}") from None
    return x, None


def _rows(contender: _Contender, truth_of: Callable[[Scorer, int], Truth]) -> Iterator[dict]:
    blank = dict.fromkeys(ROW) | {"scorer": contender.name, "file": contender.file, "precision": contender.precision}
    start = time.perf_counter()
    try:
        scorer = contender.load()
        case = Case(scorer, truth_of(scorer, contender.level), contender.document)
        if not case.gives("energy"):
            raise NotRun("its energy was not exported, which all else is judged by")
    except NotRun as e:
        yield blank | {"check": "load", "status": NOT_RUN, "reason": str(e)}
        return
    except Exception as e:  # whatever is wrong with it, the others are still checked
        yield blank | {"check": "load", "status": FAIL, "reason": _sentence(e)}
        return
    blank |= {"precision": scorer.precision, "device": scorer.device}
    yield blank | {"check": "load", "status": PASS, "seconds": time.perf_counter() - start}
    for name in contender.checks:
        start = time.perf_counter()
        row = blank | {"check": name}
        try:
            for figures in CHECKS[name](case):
                yield row | _judged(figures, case.tolerance) | {"seconds": time.perf_counter() - start}
                start = time.perf_counter()
        except NotRun as e:
            yield row | {"status": NOT_RUN, "reason": str(e)}
        except Exception as e:
            yield row | {"status": FAIL, "reason": _sentence(e)}


def _judged(figures: dict, tolerance: float) -> dict:
    """Figures with their tolerance, the least that would have passed, and the status with its reason."""
    figures = {"tolerance": tolerance, **figures}
    problems = [figures.pop("problem")] if "problem" in figures else []
    errors = {what: figures[key] for what, key in (("E", "error_energy"), ("dE/dx", "error_score"))
              if figures.get(key) is not None}
    problems += [f"error of {what} {error:.1e}, tolerance {figures['tolerance']:.0e}" for what, error in errors.items()
                 if not error <= figures["tolerance"]]
    if figures.get("flags_differ"):
        problems.append(f"{figures['flags_differ']} flags differ")
    if figures.get("spearman") is not None and not figures["spearman"] >= 1 - figures["tolerance"]:
        problems.append(f"Spearman {figures['spearman']:.6f}")
    if figures.get("bits_promised") and not figures["same_bits"]:
        problems.append("not the same bits")
    needed = float(np.max(list(errors.values()))) if errors else None
    return figures | {"needed": needed, "status": FAIL if problems else PASS, "reason": "; ".join(problems) or None}


def _sentence(e: Exception) -> str:
    text = " ".join(str(e).split())
    return text if isinstance(e, DataError) else f"{type(e).__name__}: {text}"
