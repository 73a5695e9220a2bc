"""`python -m bench.latency`: the latency of every Scorer beside its peers, checked against float64 first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from bench.contenders import TASKS, check_names, scorer_names
from bench.measure import Plan
from bench.options import MOST_EVENTS, TOY, number, run, split
from bench.peers import DEFAULT_PEERS, ENERGY_AND_SCORE, PEERS
from bench.report import plot, print_report
from kernels.registry import REDUCED

_OTHER_WAYS = ("native@avx512", *(f"native-{precision}" for precision in REDUCED))
_SLOW_PEERS = tuple(name for name in PEERS if name not in DEFAULT_PEERS)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

EPILOG = """
**Examples**

`python -m bench.latency` everything here, in under 4 minutes

`python -m bench.latency --quick` batches 1 and 64, one thread, in under a minute

`python -m bench.latency --backend native,onnxruntime --batch 1,8,64 --threads 1` one against one

`python -m bench.latency --busy --batch 64` the tails beside a process that spins on every core

`python -m bench.latency --model runs/higgs --data training.csv.gz` your model on your events

`python -m bench.latency --json out.json --plot out.png` keep the result; `--json -` prints it

Timings of Scorers that fail the check against float64 are not taken. Exit code 0; 1 if a backend of ours gave
wrong numbers; 2 if the input cannot be used.
"""


@app.command(epilog=EPILOG)
def main(
    backend: Annotated[list[str] | None, typer.Option(
        help=f"What to measure, repeated or separated by commas: {', '.join(scorer_names())}, or an "
             "exported file of the model, such as out/model.onnx. Default: every "
             f"backend that runs natively on this device, and every peer but {', '.join(_SLOW_PEERS)}."
    )] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Events per call, e.g. 1,64,4096.")] = None,
    threads: Annotated[list[str] | None, typer.Option(help="Threads for every contender alike, e.g. 1,all.")] = None,
    model: Annotated[Path | None, typer.Option(
        help="Model directory. Default: models/demo, or random weights (64/256/2) where there is none.")] = None,
    data: Annotated[str, typer.Option(help="Events: a file, or toy:N.")] = TOY,
    quick: Annotated[bool, typer.Option("--quick", help="Batches 1 and 64, one thread: under a minute.")] = False,
    full: Annotated[bool, typer.Option(
        "--full", help="All batches to 65536, energy alone too, torch.compile also tuned, native also in AVX-512 alone "
                       "and in reduced precision: up to 30 minutes.")] = False,
    busy: Annotated[bool, typer.Option(
        "--busy", help="While timing, another process spins on every core: compare the p99.")] = False,
    json: Annotated[str | None, typer.Option(help="Write the report to this file; - for standard output.")] = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="Write a log-log plot, e.g. latency.png.")] = None,
) -> None:
    """Measure how long a caller waits for energies and scores: every backend beside its peers, in one run.

    Each contender takes raw NumPy events and gives NumPy results. It is compared with float64 on 4096 events
    first, and only then timed, in turns with the others and with the same threads.
    """
    run(lambda: make_plan(backend, batch, threads, quick, full, busy), model, data, json, plot_to, print_report, plot)


def make_plan(backend: list[str] | None, batch: list[str] | None, threads: list[str] | None, quick: bool,
              full: bool, busy: bool = False) -> Plan:
    """The plan of these options; ValueError says which one cannot be used."""
    if quick and full:
        raise ValueError("--quick and --full exclude each other")
    cores = len(os.sched_getaffinity(0))
    scorers = split(backend)
    check_names(scorers or ())
    batches = [number("--batch", b, MOST_EVENTS) for b in split(batch) or ()]
    counts = [cores if t == "all" else number("--threads", t, cores) for t in split(threads) or ()]
    if quick:
        batches, counts, pace = batches or [1, 64], counts or [1], {"seconds": 1.0, "limit_s": 45.0}
    elif full:
        batches, counts = batches or [1, 8, 64, 512, 4096, 65536], counts or [1, cores]
        pace = {"seconds": 2.0, "limit_s": 1000.0, "tasks": TASKS,
                "extra": (*_SLOW_PEERS, *_OTHER_WAYS), "preallocated": True}
    else:
        batches, counts, pace = batches or [1, 64, 4096], counts or [1, cores], {"seconds": 1.5, "limit_s": 200.0}
    pace.setdefault("tasks", (ENERGY_AND_SCORE,))
    if busy:
        pace["spin_on"] = tuple(sorted(os.sched_getaffinity(0)))
    return Plan(tuple(dict.fromkeys(scorers)) if scorers else None, tuple(sorted(set(batches))),
                tuple(sorted(set(counts))), **pace)


if __name__ == "__main__":
    app(prog_name="python -m bench.latency")
