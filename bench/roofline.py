"""`python -m bench.roofline RESULT.json`: what was reached, beside what the machine could do at most.

The model is simple, and the same for every contender: each direction (forward, and backward for the score)
reads all weights once per tile of 32 events, so a single event reads them twice; an event and its results
are read and written once; and the slope of every activation is written once and read once for the score.
Operational intensity is FLOP over those bytes. From 32 events on it does not change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.machine import flop_per_event, n_weights
from bench.options import check_outputs
from bench.peers import ENERGY_AND_SCORE
from bench.report import COLOURS, label, marker, task_name
from ebm.bundle import Architecture

TILE = 32  # events that share one reading of the weights
_STEP = 0.22  # between batches of the same intensity, in powers of 2: side by side rather than on one another

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    result: Annotated[Path, typer.Argument(help="A JSON report of bench.latency or bench.throughput.")],
    plot_to: Annotated[Path | None, typer.Option("--plot", help="Write the plot here, e.g. roofline.png.")] = None,
    task: Annotated[str, typer.Option(help="energy or energy_and_score.")] = ENERGY_AND_SCORE,
) -> None:
    """Show how near each Scorer came to the machine's limits: GFLOP/s against FLOP per byte."""
    try:
        check_outputs(None, plot_to)
        report = read(result)
        found = points(report, task)
        if not found:
            raise ValueError(f"{result}: no times of {task} on a CPU")
        console = Console()
        if not console.is_terminal:
            console.width = 140
        console.print(table(found, report["limits"]))
        if plot_to:
            plot(found, report, task, plot_to)
    except (ValueError, OSError) as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(2) from None


def read(path: Path) -> dict[str, Any]:
    """The report in that file; ValueError where it is none, or has no measured limits."""
    try:
        report = json.loads(path.read_text())
        roofs = [report["limits"][name] for name in ("fma_gflops_1t", "fma_gflops_all", "read_gbps_600k",
                                                     "read_gbps_64m")]
        report["model"]["hidden_dim"], report["machine"]["cpu"], [r["timing"] for r in report["results"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: not a report of bench.latency or bench.throughput") from None
    if None in roofs:
        raise ValueError(f"{path}: the limits of the machine were not measured, the C++ library was not built")
    return report


def intensity(a: Architecture, batch: int, score: bool, weight_bytes: int = 4) -> float:
    """FLOP per byte of the model above."""
    directions = 1 + score
    weights = weight_bytes * directions * n_weights(a) * max(1, batch / TILE)
    events = batch * (a.input_dim * directions + 1)
    activations = batch * 2 * (a.n_layers + 1) * a.hidden_dim * score
    return batch * flop_per_event(a, score) / (weights + 4 * (events + activations))


def points(report: dict, task: str) -> list[dict]:
    """The rows of that task that were timed on a CPU, with `flop_per_byte` and `gflops`."""
    sizes = ("kind", "input_dim", "hidden_dim", "n_layers", "n_sigmas")
    a, score = Architecture(**{name: report["model"][name] for name in sizes}), task == ENERGY_AND_SCORE
    return [r | {"flop_per_byte": intensity(a, r["batch"], score, {"int16": 2, "int8": 1}.get(r["precision"], 4)),
                 "gflops": r["batch"] * flop_per_event(a, score) / r["p50_us"] / 1e3}
            for r in report["results"] if r["task"] == task and r["device"] == "cpu" and r["p50_us"]]


def roof(point: dict, limits: dict) -> float:
    """The most GFLOP/s at that point: all weights within reach of the core (600 KB), on as many cores as threads."""
    cores = 1 if point["batch"] == 1 else point["threads"]  # a single event is not worth a second one
    rate = "tile_gflops" if point["limit"].startswith("tile") else "fma_gflops"
    peak = limits[rate + "_1t"] if cores == 1 else min(cores * limits[rate + "_1t"], limits[rate + "_all"])
    return min(peak, cores * point["flop_per_byte"] * limits["read_gbps_600k"])


def table(found: list[dict], limits: dict) -> Table:
    """The points in numbers."""
    t = Table(title="Achieved, and the share of what the roof allows there", title_style="bold", box=SIMPLE_HEAD,
              show_edge=False, pad_edge=False)
    for name in ("thr", "batch", "scorer", "FLOP/byte", "GFLOP/s", "of the roof"):
        t.add_column(name, justify="left" if name == "scorer" else "right")
    for p in sorted(found, key=lambda p: (p["threads"], p["batch"], -p["gflops"])):
        t.add_row(str(p["threads"]), f"{p['batch']:,}", label(p), f"{p['flop_per_byte']:.2f}", f"{p['gflops']:.3g}",
                  f"{100 * p['gflops'] / roof(p, limits):.0f}%")
    return t


def plot(found: list[dict], report: dict, task: str, path: Path) -> None:
    """One panel for the fewest threads and one for the most; a point per Scorer and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts = sorted({p["threads"] for p in found})
    counts = list(dict.fromkeys((counts[0], counts[-1])))
    scorers = sorted({(p["peer"], p["scorer"], p["timing"]) for p in found})
    in_float32 = {p["batch"]: min(q["flop_per_byte"] for q in found if q["batch"] == p["batch"]) for p in found}
    x_of = _side_by_side(in_float32)
    least, most = min(x_of.values()) / 1.6, max(x_of.values()) * 2.2
    fig, axes = plt.subplots(1, len(counts), figsize=(6.2 * len(counts) + 1.8, 5.6), sharey=True, squeeze=False,
                             layout="constrained")
    for ax, n in zip(axes[0], counts):
        for i, key in enumerate(scorers):
            mine = sorted((p for p in found if p["threads"] == n and (p["peer"], p["scorer"], p["timing"]) == key),
                          key=lambda p: p["batch"])
            ours, inside = not key[0], key[2] != "call"
            x = [x_of[p["batch"]] * p["flop_per_byte"] / in_float32[p["batch"]] for p in mine]
            ax.plot(x, [p["gflops"] for p in mine], ls="-" if ours else "--",
                    lw=1 if ours else 0.6, alpha=0.95, color=COLOURS[i % len(COLOURS)],
                    marker=marker(i), ms=8 if ours else 6, label=label(mine[0]) if mine else "",
                    mfc="none" if inside else None, mew=1.6 if inside else 0.8, zorder=4 if ours else 3)
        _draw_roofs(ax, report["limits"], n, least, most)
        ax.set(xscale="log", yscale="log", xlim=(least, most), title=f"{n} thread{'s' if n > 1 else ''}")
        ax.set_xlabel("operational intensity (FLOP per byte)")
        ax.grid(alpha=0.25)
        _name_batches(ax, x_of)
    axes[0][0].set_ylabel(f"achieved GFLOP/s, {task_name(task)}")
    handles = {name: h for ax in axes[0] for h, name in zip(*ax.get_legend_handles_labels()) if name}
    fig.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    fig.suptitle(f"{report['model']['source']} on {report['machine']['cpu']}; open markers: timed inside C++. Batches "
                 f"of {TILE} and more\nhave the same intensity, and stand side by side to be told apart; int16 reads "
                 "half the bytes.", fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _side_by_side(by_batch: dict[int, float]) -> dict[int, float]:
    """Where each batch stands: at its intensity, and from the second tile on a little further right each."""
    large = [b for b in sorted(by_batch) if b >= TILE]
    return {b: oi * 2 ** (_STEP * large.index(b) if b in large else 0) for b, oi in sorted(by_batch.items())}


def _draw_roofs(ax: Any, limits: dict, threads: int, least: float, most: float) -> None:
    one, every = limits["fma_gflops_1t"], limits["fma_gflops_all"]
    tiles = limits.get("tile_gflops_1t" if threads == 1 else "tile_gflops_all")
    grey = {"color": "#444444", "zorder": 1}
    for rate, name, style in ((limits["read_gbps_600k"], "600 KB", "-"), (limits["read_gbps_64m"], "64 MB", "--")):
        ends = (least, min(most, (tiles or (one if threads == 1 else every)) / rate))
        ax.plot(ends, [x * rate for x in ends], lw=1.3, ls=style, label=f"reading {name}, 1 thread: {rate:.0f} GB/s",
                **grey)
    for peak, name, style in ((one, "1 thread", (0, (6, 2, 1, 2))), (every, "all threads", (0, (1, 1.5)))):
        ax.axhline(peak, lw=1.8, ls=style, label=f"FMA, {name}: {peak:.0f} GFLOP/s", **grey)
    if tiles:
        name = "1 thread" if threads == 1 else "all threads"
        ax.axhline(tiles, lw=1.8, ls=(0, (6, 2)), label=f"tiles of AMX, {name}: {tiles:.0f} GFLOP/s", **grey)


def _name_batches(ax: Any, x_of: dict[int, float]) -> None:
    top = ax.secondary_xaxis("top")
    top.set_xscale("log")
    top.set_xticks(list(x_of.values()), [f"{b:,}" for b in x_of], rotation=90, fontsize=8)
    top.minorticks_off()
    top.set_xlabel("events per call", fontsize=9)
    for x in x_of.values():
        ax.axvline(x, color="#999999", lw=0.4, zorder=0)


if __name__ == "__main__":
    app(prog_name="python -m bench.roofline")
