"""export.json, beside every artefact: what it was made of, what its files must be, and 64 events with their answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ebm.bundle import Bundle
from ebm.command import commit, plain, versions
from ebm.events import DataError
from export.score_graph import Options
from kernels import Scorer
from kernels.registry import ARTEFACTS, load_scorer
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score

NAME, SOURCE = "export.json", "source"
FORMAT, FORMAT_VERSION = "fused-ebm export", 1
GOLDEN_EVENTS = 64
_MODEL_FILES = ("model.json", "model.safetensors")
_PACKAGES = ("fused-ebm", "numpy", "torch", "onnx", "onnxscript", "onnxruntime", "tensorrt")


def write(directory: Path, bundle: Bundle, options: Options, files: dict[str, dict], command: str) -> None:
    """Write source/ and export.json into `directory`, which holds the artefacts already.

    `files` has one entry per target: `file`, relative to `directory`, and what else the target tells; `also` may list
    more files. Digests and sizes are added, and the errors on the golden events of every artefact that runs here.
    `command` is the command line, or the call, that made the export. Raises RuntimeError where an artefact does not
    agree with float64: none leaves without that proof.
    """
    bundle.save(directory / SOURCE)
    x = golden_events(bundle, options.preprocess)
    reference = load_scorer(bundle, "reference", preprocess=options.preprocess)
    energy, score = reference.energy_and_score(x, options.level)
    d = bundle.schema.n_features
    shapes = {"energy": ["float32", ["batch"]], "score": ["float32", ["batch", d]], "flag": ["bool", ["batch"]],
              "energies": ["float32", ["batch", bundle.n_levels]]}
    document = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "command": command, "commit": commit(),
        "versions": versions(_PACKAGES), "options": asdict(options),
        "model": {"digest": bundle.digest, "kind": bundle.architecture.kind,
                  "files": {name: digest(directory / SOURCE / name) for name in _MODEL_FILES}},
        "inputs": {"events": ["float32", ["batch", d]]},
        "outputs": {name: shapes[name] for name in options.outputs},
        "features": bundle.schema.features, "units": bundle.schema.units,
        "threshold": bundle.threshold and asdict(bundle.threshold),
        "files": {target: entry | _described(directory, entry) for target, entry in files.items()},
        "golden": {"events": x.tolist(), "energy": energy.tolist(), "score": score.tolist()},
    }
    _save(directory / NAME, document)
    for entry in document["files"].values():
        entry["errors"] = _errors(directory / entry["file"], reference, x, energy, score)
    _save(directory / NAME, document)


def read(directory: Path) -> dict:
    """The manifest of an export; DataError where there is none, or one that this version cannot read."""
    path = directory / NAME
    try:
        document = json.loads(path.read_bytes())
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}); 'python -m export build' writes it beside every "
                        "artefact") from None
    except ValueError as e:
        raise DataError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{path}: not the manifest of a {FORMAT}")
    if document.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path}: format version {document.get('format_version')!r}, this version reads "
                        f"{FORMAT_VERSION}")
    if missing := [key for key in ("options", "model", "files", "golden") if key not in document]:
        raise DataError(f"{path}: entry {missing[0]!r} is missing")
    try:
        listed = {"model": (set(document["model"]["files"]), set(_MODEL_FILES))}
        for target, entry in document["files"].items():
            listed[target] = set(entry["sha256"]), {entry["file"], *entry.get("also", ())}
    except (AttributeError, KeyError, TypeError) as e:
        raise DataError(f"{path}: entry 'model' or 'files' is damaged ({type(e).__name__}: {e})") from None
    for name, (given, expected) in listed.items():
        if given != expected:
            raise DataError(f"{path}: the digests of {name!r} are of {', '.join(sorted(given)) or 'no file'}, expected "
                            f"{', '.join(sorted(expected))}")
    return document


def golden_events(bundle: Bundle, preprocess: bool = True, n: int = GOLDEN_EVENTS) -> np.ndarray:
    """(n, D) float32, always the same: background-like events, a tenth of the optional features missing."""
    p, rng = bundle.preprocessing, np.random.default_rng(0)
    u = rng.normal(size=(n, p.n_features)).clip(-3, 3)
    if not preprocess:
        return u.astype(np.float32)
    missing = (rng.random(u.shape) < 0.1) & ~np.isnan(p.impute)
    return np.where(missing, p.marker, p.inverse(u)).astype(np.float32)


def locate(artefact: Path) -> tuple[dict, str, dict]:
    """The manifest beside an artefact, and the target and entry of its file in it.

    DataError where there is no such file, no manifest, or an artefact that the manifest does not know.
    """
    if not artefact.is_file():
        raise DataError(f"{artefact}: no such file")
    document = read(artefact.parent)
    for target, entry in document["files"].items():
        if entry["file"] == artefact.name:
            return document, target, entry
    raise DataError(f"{artefact}: {artefact.parent / NAME} does not know this file, it lists "
                    + ", ".join(entry["file"] for entry in document["files"].values()))


def digests(document: dict, *entries: dict) -> dict[str, str]:
    """File -> SHA-256 of the source bundle and of these entries of a manifest."""
    files = {f"{SOURCE}/{name}": sha256 for name, sha256 in document["model"]["files"].items()}
    for entry in entries:
        files |= entry["sha256"]
    return files


def options(document: dict, bundle: Bundle) -> Options:
    """The options of an export; DataError where they do not fit its model."""
    try:
        return Options.of(bundle, **document["options"])
    except (TypeError, ValueError) as e:
        raise DataError(f"{NAME}: damaged options ({e})") from None


def check_files(directory: Path, digests: dict[str, str]) -> None:
    """DataError naming the first file whose SHA-256 is not the given one."""
    for name, expected in digests.items():
        try:
            given = digest(directory / name)
        except OSError as e:
            raise DataError(f"{directory / name}: cannot be read ({e.strerror})") from None
        if given != expected:
            raise DataError(f"{directory / name}: damaged, or from another export (SHA-256 {given[:12]}, "
                            f"{NAME} says {expected[:12]})")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _described(directory: Path, entry: dict) -> dict:
    names = [entry["file"], *entry.get("also", ())]
    return {"sha256": {name: digest(directory / name) for name in names},
            "bytes": sum((directory / name).stat().st_size for name in names)}


def _errors(artefact: Path, reference: Scorer, x: np.ndarray, energy: np.ndarray, score: np.ndarray) -> dict | None:
    """Errors on the golden events, as kernels/tolerances.py defines them, and the worst event; None: not a Scorer."""
    if artefact.suffix not in ARTEFACTS:
        return None
    scorer = load_scorer(artefact)
    its_energy, its_score = scorer.energy_and_score(x) if scorer.gives_score else (scorer.energy(x), None)
    errors = {"energy": relative_rms_energy(its_energy, energy)}
    if its_score is not None:
        errors["score"] = relative_rms_score(its_score, score)
    if "energies" in scorer.options.outputs:
        errors["energies"] = max(map(relative_rms_energy, scorer.energies(x).T, reference.energies(x).T))
    tolerance = TOLERANCES[scorer.precision]
    if not all(error <= tolerance for error in errors.values()):
        measured = " and ".join(f"{error:.1e} in the {name}" for name, error in errors.items())
        raise RuntimeError(f"{artefact.name} does not agree with float64: on {len(x)} events its relative error is "
                           f"{measured}, the tolerance of {scorer.precision} is {tolerance:.0e}")
    if "flag" in scorer.options.outputs:
        above = energy - scorer.threshold
        clear = np.abs(above) > 2 * tolerance * energy.std()
        if differ := np.count_nonzero(clear & (scorer.flag(x) != (above > 0))):
            raise RuntimeError(f"{artefact.name} does not agree with float64: {differ} of {len(x)} flags differ")
    return {**errors, "worst_event": int(np.argmax(np.abs(its_energy - energy))), "precision": scorer.precision,
            "tolerance": tolerance, "device": scorer.device}


def _save(path: Path, document: dict) -> None:
    """One line for every entry: the golden events are long."""
    lines = (f" {json.dumps(key)}: {json.dumps(plain(value), allow_nan=False)}" for key, value in document.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
