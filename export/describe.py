"""What an export is, for people: one description for each export.json."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ebm.events import DataError
from export import manifest


def describe(path: Path) -> list[dict]:
    """The manifests at `path`, an artefact, an export or a directory above exports, without their golden events.

    Added are `directory` and `damaged`, one sentence for every file that is not what it was. DataError where there is
    no export.
    """
    path = Path(path)
    if path.is_file() and path.name != manifest.NAME:
        document, target, entry = manifest.locate(path)
        return [_described(path.parent, document | {"files": {target: entry}})]
    directory = path.parent if path.name == manifest.NAME else path
    found = (p.parent for p in sorted(directory.rglob(manifest.NAME)))
    exports = [d for d in found if not any(part.startswith(".") for part in d.relative_to(directory).parts)]
    if not exports:
        hint = ": it is a model, 'python -m export build' exports it" if (path / "model.json").is_file() else ""
        raise DataError(f"{path} holds no {manifest.NAME}{hint}")
    return [_described(d, manifest.read(d)) for d in exports]


def _described(directory: Path, document: dict) -> dict:
    damaged = []
    for name, sha256 in manifest.digests(document, *document["files"].values()).items():
        try:
            manifest.check_files(directory, {name: sha256})
        except DataError as e:
            damaged.append(str(e))
    return {"directory": str(directory), **{k: v for k, v in document.items() if k != "golden"}, "damaged": damaged}


def print_exports(exports: list[dict]) -> None:
    """Two tables for each: what it computes, and its files."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 120
    for e in exports:
        o, t, features = e["options"], e["threshold"], e["features"]
        about = Table(title=e["directory"], show_header=False, title_justify="left")
        about.add_row("model", f"{e['model']['kind']}, digest {e['model']['digest'][:12]}")
        about.add_row("noise level", str(o["level"]))
        about.add_row("input", f"events {_tensor(e['inputs']['events'])}, "
                      + ("raw" if o["preprocess"] else "preprocessed") + f": {', '.join(features[:4])}"
                      + (f" ... {features[-1]}" if len(features) > 4 else ""))
        for name, tensor in e["outputs"].items():
            about.add_row("output", f"{name} {_tensor(tensor)}")
        about.add_row("threshold", "none" if t is None else f"{t['energy']:.6g} at noise level {t['level']}; "
                      f"background rate at most {t['upper_bound']:.2g} at {t['confidence']:.0%} confidence")
        about.add_row("made by", f"{e['command']} (commit {e['commit'] or 'unknown'})")
        console.print(about)
        files = Table("file", "target", "bytes", "error of energy", "of score", "limit", "")
        for target, entry in e["files"].items():
            errors = entry["errors"] or {}
            files.add_row(entry["file"], target, f"{entry['bytes']:,}", *(
                "" if errors.get(key) is None else f"{errors[key]:.1e}" for key in ("energy", "score", "tolerance")),
                ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in entry.items() if key not in _SHOWN))
        console.print(files)
        for sentence in e["damaged"]:
            console.print(f"DAMAGED {sentence}", style="bold red")


_SHOWN = ("file", "also", "sha256", "bytes", "errors", "profiles", "commands")


def _tensor(tensor: list) -> str:
    dtype, shape = tensor
    return f"({', '.join(map(str, shape))}) {dtype}"
