"""`python -m bench.throughput`: events per second against batch and threads, checked against float64 first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.contenders import check_names
from bench.measure import Plan
from bench.options import MOST_EVENTS, TOY, number, run, split
from bench.peers import DEFAULT_PEERS, ENERGY, ENERGY_AND_SCORE
from bench.report import COLOURS, MARKERS, about, rate, task_name

BATCHES = tuple(4**i for i in range(11))
_PEERS_TO = 65536  # events: some peers keep every activation of the batch in memory
OURS = ("native", "numba")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

EPILOG = """
**Examples**

`python -m bench.throughput` our CPU backends, 1 to 1,048,576 events per call, every number of threads: 3 minutes

`python -m bench.throughput --backend native --batch 4096,65536 --plot scaling.png` a part of it, with a plot

`python -m bench.throughput --peers` the peers beside them, to 65,536 events, on one and on all threads: 8 minutes

`python -m bench.throughput --energy --json out.json` energies alone; keep the result

The rate is batch over the median time of a call, NumPy to NumPy. Exit codes as those of bench.latency.
"""


@app.command(epilog=EPILOG)
def main(
    backend: Annotated[list[str] | None, typer.Option(
        help=f"What to measure, repeated or separated by commas. Default: {', '.join(OURS)}.")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="The peers of bench.latency, too.")] = False,
    batch: Annotated[list[str] | None, typer.Option(help="Events per call. Default: powers of 4.")] = None,
    threads: Annotated[list[str] | None, typer.Option(help="Threads. Default: 1 to all.")] = None,
    energy: Annotated[bool, typer.Option("--energy", help="Energies alone, without scores.")] = False,
    model: Annotated[Path | None, typer.Option(help="Model directory. Default: as bench.latency.")] = None,
    data: Annotated[str, typer.Option(help="Events: a file, or toy:N.")] = TOY,
    json: Annotated[str | None, typer.Option(help="Write the report to this file; - for standard output.")] = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="Write a plot, e.g. throughput.png.")] = None,
) -> None:
    """Measure how many events per second each backend scores, by events per call and threads, and how it scales."""
    run(lambda: make_plan(backend, batch, threads, peers, energy), model, data, json, plot_to, print_report, plot)


def make_plan(backend: list[str] | None, batch: list[str] | None, threads: list[str] | None, peers: bool,
              energy: bool) -> Plan:
    """The plan of these options; ValueError says which one cannot be used."""
    cores = len(os.sched_getaffinity(0))
    scorers = tuple(dict.fromkeys(split(backend) or OURS)) + (DEFAULT_PEERS if peers else ())
    check_names(scorers)
    batches = [number("--batch", b, MOST_EVENTS) for b in split(batch) or ()]
    batches = batches or [b for b in BATCHES if not peers or b <= _PEERS_TO]
    counts = [cores if t == "all" else number("--threads", t, cores) for t in split(threads) or ()]
    counts = counts or ([1, cores] if peers else _counts(cores))
    # The largest calls take seconds each: one of them is sample enough, it averages over a million events.
    return Plan(tuple(dict.fromkeys(scorers)), tuple(sorted(set(batches))), tuple(sorted(set(counts))),
                (ENERGY if energy else ENERGY_AND_SCORE,), seconds=0.3, limit_s=420.0 if peers else 150.0, least=1,
                products=False)


def _counts(cores: int) -> list[int]:
    if cores <= 8:
        return list(range(1, cores + 1))
    return [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < cores] + [cores]


def efficiency(rows: list[dict], row: dict) -> float | None:
    """The rate over that of as many times one thread; None where one of them was not measured."""
    one = _find(rows, row["scorer"], row["batch"], 1)
    if one is None or not one["events_per_s"] or not row["events_per_s"]:
        return None
    return row["events_per_s"] / one["events_per_s"] / row["threads"]


def table(rows: list[dict]) -> Table:
    """Scorer and batch x threads: events/s, and the share of perfect scaling."""
    counts = sorted({r["threads"] for r in rows})
    t = Table(title=f"Events per second: {task_name(rows[0]['task'])}, NumPy to NumPy", title_style="bold",
              box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    t.add_column("scorer", no_wrap=True)
    for name in ("batch", *(f"{n} thr" for n in counts)):
        t.add_column(name, justify="right", no_wrap=True)
    for name in dict.fromkeys(r["scorer"] for r in rows):
        batches = sorted({r["batch"] for r in rows if r["scorer"] == name})
        for batch in batches:
            cells = [_cell(rows, _find(rows, name, batch, n)) for n in counts]
            t.add_row(name if batch == batches[0] else "", f"{batch:,}", *cells, end_section=batch == batches[-1])
    return t


def print_report(report: dict, rows: list[dict], console: Console) -> None:
    """The table and what belongs to it."""
    if not console.is_terminal:  # a log: do not fold the table into 80 columns
        console.width = 140
    console.print(table(rows))
    for line in about(report, rows):
        console.print(Text(line))
    console.print(Text("events/s: batch / median time of a call. In brackets: scaling, events/s over threads x "
                       "events/s of one thread.", style="dim"))


def plot(rows: list[dict], path: Path) -> None:
    """Rate against batch, one panel per Scorer and one line per number of threads; and the scaling at the largest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in rows if r["timing"] == "call" and r["events_per_s"]]
    names = list(dict.fromkeys(r["scorer"] for r in rows))
    counts, batches = sorted({r["threads"] for r in rows}), sorted({r["batch"] for r in rows})
    columns = min(len(names) + 1, 3)
    fig, axes = plt.subplots(-(-(len(names) + 1) // columns), columns, squeeze=False, layout="constrained",
                             figsize=(4.6 * columns, 4.2 * -(-(len(names) + 1) // columns)))
    panels = list(axes.flat)
    for ax, name in zip(panels, names):
        for i, n in enumerate(counts):
            line = [(b, r["events_per_s"]) for b in batches if (r := _find(rows, name, b, n))]
            ax.loglog(*zip(*line) if line else ([], []), color=COLOURS[i % len(COLOURS)],
                      marker=MARKERS[i % len(MARKERS)], ms=5, label=f"{n} thread{'s' if n > 1 else ''}")
        if ax is not panels[0]:
            ax.sharey(panels[0])
        ax.set(title=name, xlabel="events per call", ylabel="events per second")
        ax.grid(alpha=0.3)
    panels[0].legend(frameon=False, loc="lower right")
    ax = panels[len(names)]
    ax.plot(counts, counts, color="#888888", ls=":", label="perfect")
    for i, name in enumerate(names):
        line = [(n, n * e) for n in counts if (r := _find(rows, name, batches[-1], n)) and (e := efficiency(rows, r))]
        ax.plot(*zip(*line) if line else ([], []), color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                label=name)
    ax.set(title=f"scaling at {batches[-1]:,} events", xlabel="threads", ylabel="times the rate of one thread",
           xticks=counts)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    for ax in panels[len(names) + 1:]:
        ax.remove()
    fig.suptitle("Throughput, NumPy to NumPy")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _find(rows: list[dict], name: str, batch: int, threads: int) -> dict | None:
    return next((r for r in rows if r["timing"] == "call" and (r["scorer"], r["batch"], r["threads"])
                 == (name, batch, threads)), None)


def _cell(rows: list[dict], row: dict | None) -> str | Text:
    if row is None:
        return "-"
    if row["problem"]:
        return Text("WRONG" if row["problem"].startswith("wrong") else "FAILED", style="bold red")
    share = efficiency(rows, row) if row["threads"] > 1 else None
    return rate(row["events_per_s"]) + ("" if share is None else f" ({100 * share:3.0f}%)")


if __name__ == "__main__":
    app(prog_name="python -m bench.throughput")
