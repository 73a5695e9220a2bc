"""The commands of `python -m ebm`, and what they share: options, reading events, opening a model, writing figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ebm.bundle import Bundle
from ebm.command import check_file, plain, whole_file
from ebm.events import Events, check_schema, load_events

if TYPE_CHECKING:
    from ebm.style import Pictures
    from kernels.scorer import Scorer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Energy-based anomaly detection for collider events: rare events get a high energy, and the score "
    "-dE/dx says which of their features are unusual.\n\n"
    "**python -m ebm train** toy --out runs/toy\n\n"
    "**python -m ebm score** runs/toy toy:1000 --out scores.parquet --explain\n\n"
    "**python -m ebm evaluate** runs/toy toy",
)

Data = Annotated[str, typer.Argument(
    help="Events: **toy**, **toy:N** with N background events, or files: ROOT, CSV, Parquet, HDF5 or NumPy, with "
    "options behind a question mark where needed, as in **'nano/\\*.root?era=UL2018'** or "
    "**'my.csv?label=target&missing=-999'** (era, features, label, missing, tree, weight).")]
Model = Annotated[Path, typer.Argument(help="Directory that 'train' wrote.")]
Pictured = Annotated[Path, typer.Option("--out", help="Directory for the pictures, each as PNG and PDF.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")]
BackendName = Annotated[str, typer.Option(
    "--backend", help="auto, or a name that 'python -m kernels' lists; auto takes the fastest that runs here.")]


def load(data: str) -> Events:
    """`load_events`, with a sign of life on a terminal: the toy takes seconds to generate."""
    from rich.console import Console

    with Console(stderr=True).status(f"reading {data}"):
        return load_events(data)


def open_model(model: Path, data: str, backend: str) -> tuple[Bundle, Events, Scorer]:
    """The model, the events, which must have its features, and the Scorer, whose choice is printed."""
    bundle, scorer = open_scorer(model, backend)
    events = load(data)
    check_schema(bundle.schema, events.schema, model, data)
    return bundle, events, scorer


def open_scorer(model: Path, backend: str) -> tuple[Bundle, Scorer]:
    """The model and its Scorer, whose choice is printed."""
    from kernels import load_scorer

    bundle = Bundle.load(model)
    scorer = load_scorer(bundle, backend)
    print(f"backend: {scorer.name} on {scorer.device} ({scorer.chosen_because})")
    return bundle, scorer


def check_pictures(out: Path, json_file: Path | None) -> None:
    from ebm.style import check_directory

    if json_file is not None:
        check_file(json_file)
    check_directory(out)


def deliver(pictures: Pictures, out: Path, json_file: Path | None) -> None:
    """Write pictures and numbers, and print what could not be shown."""
    files = pictures.save(out)
    if json_file is not None:
        write_json(json_file, pictures.numbers | {"notes": pictures.notes})
    print(f"{out}: {len(files)} files", *(f"note: {note}" for note in pictures.notes), sep="\n")


def write_json(path: Path, content: dict) -> None:
    """The file with these figures, null for NaN, whole or not at all."""
    with whole_file(path) as f:
        f.write((json.dumps(plain(content), indent=1, allow_nan=False) + "\n").encode())
