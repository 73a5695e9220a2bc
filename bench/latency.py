"""`python -m bench.latency`: the latency of every Scorer beside its peers, checked against float64 first."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from bench.driver import benchmark
from bench.machine import ROOT
from bench.measure import TASKS, Plan, scorer_names
from bench.peers import DEFAULT_PEERS, ENERGY_AND_SCORE, PEERS
from bench.report import plot, print_report, to_json, write_json
from ebm.bundle import Bundle
from ebm.events import DataError, load_events
from ebm.preprocess import Preprocessing

DEMO = ROOT / "models" / "demo"
TOY = "toy:20000"
_MOST_EVENTS = 1 << 20
_SLOW_PEERS = tuple(name for name in PEERS if name not in DEFAULT_PEERS)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

EPILOG = """
**Examples**

`python -m bench.latency` everything here, in under 4 minutes

`python -m bench.latency --quick` batches 1 and 64, one thread, in under a minute

`python -m bench.latency --backend native,onnxruntime --batch 1,8,64 --threads 1` one against one

`python -m bench.latency --model runs/higgs --data training.csv.gz` your model on your events

`python -m bench.latency --json out.json --plot out.png` keep the result; `--json -` prints it

Timings of Scorers that fail the check against float64 are not taken. Exit code 0; 1 if a backend of ours gave
wrong numbers; 2 if the input cannot be used.
"""


@app.command(epilog=EPILOG)
def main(
    backend: Annotated[list[str] | None, typer.Option(
        help=f"What to measure, repeated or separated by commas: {', '.join(scorer_names())}. Default: every "
             f"backend that runs natively on this device, and every peer but {', '.join(_SLOW_PEERS)}."
    )] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Events per call, e.g. 1,64,4096.")] = None,
    threads: Annotated[list[str] | None, typer.Option(help="Threads for every contender alike, e.g. 1,all.")] = None,
    model: Annotated[Path | None, typer.Option(
        help="Model directory. Default: models/demo, or random weights (64/256/2) where there is none.")] = None,
    data: Annotated[str, typer.Option(help="Events: a file, or toy:N.")] = TOY,
    quick: Annotated[bool, typer.Option("--quick", help="Batches 1 and 64, one thread: under a minute.")] = False,
    full: Annotated[bool, typer.Option(
        "--full", help="All batches to 65536, energy alone too, torch.compile also tuned: up to 30 minutes.")] = False,
    json: Annotated[str | None, typer.Option(help="Write the report to this file; - for standard output.")] = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="Write a log-log plot, e.g. latency.png.")] = None,
) -> None:
    """Measure how long a caller waits for energies and scores: every backend beside its peers, in one run.

    Each contender takes raw NumPy events and gives NumPy results. It is compared with float64 on 4096 events
    first, and only then timed, in turns with the others and with the same threads.
    """
    try:
        plan = make_plan(backend, batch, threads, quick, full)
        for path in (Path(json) if json and json != "-" else None, plot_to):
            _check_writable(path)
        if plot_to and plot_to.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise ValueError(f"--plot {plot_to}: expected a file that ends in .png, .pdf or .svg")
        bundle, x, about = load(model, data)
        console = Console(stderr=json == "-")
        console.print(f"model: {about['source']}; events: {about['events']}", highlight=False, markup=False,
                      soft_wrap=True)
        report, rows = benchmark(bundle, x, plan, about, Console(stderr=True))
        print_report(report, rows, console)
        if json == "-":
            sys.stdout.write(to_json(report))
        elif json:
            write_json(report, Path(json))
        if plot_to:
            plot(rows, plot_to)
    except (ValueError, RuntimeError, OSError) as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(2) from None
    if wrong := sorted({r["scorer"] for r in rows if not r["peer"] and not r["passed"]}):
        typer.echo(f"error: {', '.join(wrong)} did not agree with float64", err=True)
        raise typer.Exit(1)


def make_plan(backend: list[str] | None, batch: list[str] | None, threads: list[str] | None, quick: bool,
              full: bool) -> Plan:
    """The plan of these options; ValueError says which one cannot be used."""
    if quick and full:
        raise ValueError("--quick and --full exclude each other")
    cores = len(os.sched_getaffinity(0))
    scorers = _split(backend)
    for name in scorers or ():
        if name not in scorer_names():
            raise ValueError(f"--backend {name!r}: expected one of {', '.join(scorer_names())}")
    batches = [_number("--batch", b, _MOST_EVENTS) for b in _split(batch) or ()]
    counts = [cores if t == "all" else _number("--threads", t, cores) for t in _split(threads) or ()]
    if quick:
        batches, counts, pace = batches or [1, 64], counts or [1], {"seconds": 1.0, "limit_s": 45.0}
    elif full:
        batches, counts = batches or [1, 8, 64, 512, 4096, 65536], counts or [1, cores]
        pace = {"seconds": 2.0, "limit_s": 1500.0, "tasks": TASKS,
                "extra_peers": _SLOW_PEERS}
    else:
        batches, counts, pace = batches or [1, 64, 4096], counts or [1, cores], {"seconds": 1.5, "limit_s": 200.0}
    pace.setdefault("tasks", (ENERGY_AND_SCORE,))
    return Plan(tuple(dict.fromkeys(scorers)) if scorers else None, tuple(sorted(set(batches))),
                tuple(sorted(set(counts))), **pace)


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


def _split(values: list[str] | None) -> list[str] | None:
    return [part.strip() for value in values for part in value.split(",")] if values else None


def _number(option: str, text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        or_all = " or all" if option == "--threads" else ""
        raise ValueError(f"{option} {text!r}: expected a whole number from 1 to {most}{or_all}")
    return int(text)


def _check_writable(path: Path | None) -> None:
    """Complain before minutes of measuring, not after."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a directory, expected the name of a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: cannot be written, {path.parent} is not a directory that takes files")


if __name__ == "__main__":
    app(prog_name="python -m bench.latency")
