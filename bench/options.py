"""What the commands of bench share: their models and events, and the reading of their options."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import typer
from rich.console import Console

from bench.driver import benchmark
from bench.machine import ROOT
from bench.measure import Plan
from bench.report import to_json, write_json
from ebm.bundle import Bundle
from ebm.events import DataError, load_events
from ebm.preprocess import Preprocessing

DEMO = ROOT / "models" / "demo"
TOY = "toy:20000"
MOST_EVENTS = 1 << 20


def run(plan: Callable[[], Plan], model: Path | None, data: str, json: str | None, plot_to: Path | None,
        print_report: Callable[[dict, list[dict], Console], None], plot: Callable[[list[dict], Path], None]) -> None:
    """Measure, print, keep: a benchmark command. Exits with 2 on input that cannot be used, 1 on wrong numbers."""
    try:
        planned = plan()
        check_outputs(json, plot_to)
        bundle, x, about = load(model, data)
        console = Console(stderr=json == "-")
        console.print(f"model: {about['source']}; events: {about['events']}", highlight=False, markup=False,
                      soft_wrap=True)
        report, rows = benchmark(bundle, x, planned, about, Console(stderr=True))
        print_report(report, rows, console)
        keep(report, json)
        if plot_to:
            plot(rows, plot_to)
    except (ValueError, RuntimeError, OSError) as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(2) from None
    fail_if_wrong(rows)


def load(model: Path | None, data: str) -> tuple[Bundle, np.ndarray, dict]:
    """The model, its events, and how the report describes them. DataError where they do not fit together."""
    if model is None and DEMO.is_dir():
        model = DEMO
    bundle = Bundle.load(model) if model else None
    if bundle and bundle.architecture.kind != "energy":
        raise DataError(f"{model}: the benchmark times energy models, this one is of kind {bundle.architecture.kind!r}")
    events = load_events(data)
    if len(events) == 0:
        raise DataError(f"{data}: no events")
    if bundle is None:
        # Fitted to the events, or raw momenta would drive random weights to absurd energies.
        bundle = Bundle.random(events.schema.n_features, 256, 2,
                               preprocessing=Preprocessing.fit(events.background().x, events.schema))
    elif bundle.schema.n_features != events.schema.n_features:
        hint = "" if data != TOY else ": name your own with --data"
        raise DataError(f"{model} takes {bundle.schema.n_features} features ({bundle.schema.name}), {data} has "
                        f"{events.schema.n_features} ({events.schema.name}){hint}")
    a = bundle.architecture
    sizes = f"{a.input_dim}/{a.hidden_dim}/{a.n_layers}"
    name = model.relative_to(ROOT) if model and model.is_relative_to(ROOT) else model
    about = {"source": f"{name} ({sizes})" if model else f"random weights ({sizes}), there is no {DEMO.name} model",
             "digest": bundle.digest, "kind": a.kind, "input_dim": a.input_dim, "hidden_dim": a.hidden_dim,
             "n_layers": a.n_layers, "n_sigmas": a.n_sigmas, "level": bundle.default_level,
             "events": f"{data} ({len(events)})"}
    return bundle, events.x, about


def split(values: list[str] | None) -> list[str] | None:
    """The parts of an option that is repeated or separated by commas."""
    return [part.strip() for value in values for part in value.split(",")] if values else None


def number(option: str, text: str, most: int) -> int:
    """The whole number of an option; ValueError says what was expected."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        or_all = " or all" if option == "--threads" else ""
        raise ValueError(f"{option} {text!r}: expected a whole number from 1 to {most}{or_all}")
    return int(text)


def check_writable(path: Path | None) -> None:
    """Complain before minutes of measuring, not after."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a directory, expected the name of a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: cannot be written, {path.parent} is not a directory that takes files")


def check_outputs(json: str | None, plot: Path | None) -> None:
    """ValueError where the files of --json and --plot cannot be written."""
    for path in (Path(json) if json and json != "-" else None, plot):
        check_writable(path)
    if plot and plot.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot {plot}: expected a file that ends in .png, .pdf or .svg")


def keep(report: dict, json: str | None) -> None:
    """Write the report where --json says."""
    if json == "-":
        sys.stdout.write(to_json(report))
    elif json:
        write_json(report, Path(json))


def fail_if_wrong(rows: list[dict]) -> None:
    """Exit code 1 where a backend of ours gave wrong numbers."""
    if wrong := sorted({r["scorer"] for r in rows if not r["peer"] and not r["passed"]}):
        typer.echo(f"error: {', '.join(wrong)} did not agree with float64", err=True)
        raise typer.Exit(1)
