"""The report for people (table, plot) and for other tools (JSON)."""

from __future__ import annotations

import json
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from bench.peers import ENERGY_AND_SCORE
from ebm.command import whole_file
from kernels.registry import REDUCED

_GROUP = ("task", "threads", "batch")
# Okabe and Ito, then two of Tol: told apart by colour-blind readers; markers tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888", "#882255",
            "#332288")
MARKERS = "osD^vP*X<>"


def marker(i: int) -> str:
    """Of the i-th line: none has the colour and the marker of another."""
    return MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]


def best_peer(rows: list[dict], row: dict) -> dict | None:
    """The fastest correct peer at the same task, threads and batch."""
    same = [r for r in rows if r["peer"] and r["p50_us"] and all(r[k] == row[k] for k in _GROUP)]
    return min(same, key=lambda r: r["p50_us"], default=None)


def label(r: dict) -> str:
    """The Scorer's name, with a mark where it was measured inside C++."""
    return r["scorer"] if r["timing"] == "call" else f"{r['scorer']} (C++)"


def table(rows: list[dict]) -> Table:
    """Scorer x batch: times, rate, errors, share of the machine's limit, verdict; the fastest first."""
    tasks = {r["task"] for r in rows}
    t = Table(title=f"Latency of a call: {' / '.join(task_name(k) for k in sorted(tasks))}, NumPy to NumPy, "
                    "preprocessing included",
              title_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False,
              collapse_padding=True)
    for name in ("task", "thr", "batch", "scorer", "p50", "p90", "p99", "p99.9", "events/s", "err E", "err s",
                 "limit", "vs peer", "first", "budget")[len(tasks) < 2:]:
        t.add_column(name, justify="left" if name in ("task", "scorer", "budget") else "right", no_wrap=True)
    key = {k: i for i, k in enumerate(dict.fromkeys(tuple(r[k] for k in _GROUP) for r in rows))}
    rows = sorted(rows, key=lambda r: (key[tuple(r[k] for k in _GROUP)], r["p50_us"] is None, r["p50_us"] or 0))
    for i, r in enumerate(rows):
        group = [str(r[k]) if i == 0 or any(rows[i - 1][g] != r[g] for g in _GROUP) else "" for k in _GROUP]
        group = [task_name(group[0]), *group[1:]] if len(tasks) > 1 else group[1:]
        peer = best_peer(rows, r) if r["timing"] == "call" else None
        ratio = f"{peer['p50_us'] / r['p50_us']:.2f}x" if peer and r["p50_us"] else "-"
        share = "-" if r["share_of_limit"] is None else f"{100 * r['share_of_limit']:.0f}% {_limit(r['limit'])}"
        t.add_row(*group, label(r), *(_time(r[q]) for q in ("p50_us", "p90_us", "p99_us", "p999_us")),
                  rate(r["events_per_s"]), _error(r["rel_rms_energy"]), _error(r["rel_rms_score"]), share, ratio,
                  "-" if r["first_call_s"] is None else f"{r['first_call_s']:.2f}", _verdict(r),
                  style=None if r["peer"] else "bold",
                  end_section=i + 1 < len(rows) and any(rows[i + 1][g] != r[g] for g in _GROUP))
    return t


def about(report: dict, rows: list[dict]) -> list[str]:
    """Lines on the machine, its limits, and what is wrong or did not run."""
    m, lim = report["machine"], report["limits"]
    load = "" if m["load"] == "idle" else f"; other processes {m['load']}"
    lines = [f"{m['cpu']}, {m['cores']} cores, {m['os']}; steal {_percent(m['steal'])}; {m['run_s']:.0f} s; "
             f"commit {report['commit']}{load}"]
    if lim["fma_gflops_1t"]:
        tiles, every = lim["tile_gflops_1t"], lim["tile_gflops_all"]
        lines.append(f"limits: FMA {lim['fma_gflops_1t']:.0f} GFLOP/s on one core, {lim['fma_gflops_all']:.0f} on all"
                     f"{f', tiles of AMX {tiles:.0f} and {every:.0f}' if tiles else ''}; "
                     f"reading 600 KB {lim['read_gbps_600k']:.0f} GB/s, 64 MB {lim['read_gbps_64m']:.0f} GB/s")
    else:
        lines.append("limits: not measured, the C++ library is not built")
    for name, library in (("sgemm_us", "MKL"), ("sgemm_openblas_us", "OpenBLAS")):
        if times := ", ".join(f"{key} {_time(us)}" for key, us in lim[name].items()):
            lines.append(f"matrix products alone, {library} (batch x threads): {times}")
    for r in rows:
        if r["problem"]:
            lines.append(f"{r['scorer']}, batch {r['batch']}, {r['threads']} thr, {r['task']}: {r['problem']}")
    return lines + [f"not run: {name}: {reason}" for name, reason in m["not_run"].items()]


def summary(report: dict, rows: list[dict]) -> Group:
    """About the run, what Python costs, and the ratios that matter."""
    lines = about(report, rows) + _python(rows) + _ratios(rows)
    notes = ["err: RMS error against float64 (E / std E; score / its RMS). limit: share of r (read bandwidth), f "
             "(FMA peak) or t (peak of the tiles of AMX). first: seconds to build and make the first call.",
             "vs peer: p50 of the fastest correct peer / p50. budget: p99 of a call (the slowest where p99 is -) at "
             "batch 1, per event beyond: < 50 ms CPU, < 5 ms GPU. -: too few samples, or not measured. "
             "(C++): timed inside the library, without Python and without new arrays."]
    return Group(*(Text(line) for line in lines), *(Text(note, style="dim") for note in notes))


def _python(rows: list[dict]) -> list[str]:
    """What the way through Python costs: median of a call less that inside C++."""
    lines = []
    key = (*_GROUP, "scorer")
    for inside in (r for r in rows if r["timing"] == "kernel" and r["p50_us"]):
        call = next(r for r in rows if r["timing"] == "call" and all(r[k] == inside[k] for k in key))
        around, kept = call["p50_us"] - inside["p50_us"], call["out_p50_us"]
        out = f" ({_time(kept - inside['p50_us'])} with out=)" if kept else ""
        lines.append(f"Python around {inside['scorer']}, {task_name(inside['task'])}, batch {inside['batch']}, threads "
                     f"{inside['threads']}: {_time(around)}{out}, of {_time(call['p50_us'])}")
    return lines


def _ratios(rows: list[dict]) -> list[str]:
    lines = []
    for key in dict.fromkeys(tuple(r[k] for k in _GROUP) for r in rows):
        ours = [r for r in _calls(rows) if not r["peer"] and r["p50_us"] and r["precision"] not in REDUCED
                and tuple(r[k] for k in _GROUP) == key]
        first = min(ours, key=lambda r: r["p50_us"], default=None)
        peer = best_peer(rows, first) if first else None
        if peer:
            task, threads, batch = key
            us, peer_us = first["p50_us"], peer["p50_us"]
            lines.append(f"{task_name(task)}, batch {batch}, threads {threads}: {first['scorer']} {_time(us)}, "
                         f"{peer_us / us:.2f}x the speed of {peer['scorer']} {_time(peer_us)}")
    return lines


def print_report(report: dict, rows: list[dict], console: Console) -> None:
    """The table and what belongs to it."""
    if not console.is_terminal:  # a log: do not fold the table into 80 columns
        console.width = 140
    console.print(table(rows), summary(report, rows))


def write_json(report: dict, path: Path) -> None:
    """Write the report, whole or not at all."""
    with whole_file(path) as f:
        f.write(to_json(report).encode())


def to_json(report: dict) -> str:
    """The report as text; NaN, which is not JSON, becomes null."""
    return json.dumps(_finite(report), indent=1, allow_nan=False) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Latency against batch, log-log, one panel per number of threads; ours are the thick lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = {r["task"] for r in rows}
    shown = ENERGY_AND_SCORE if ENERGY_AND_SCORE in tasks else next(iter(tasks), "")
    rows = [r for r in _calls(rows) if r["p50_us"] and r["task"] == shown and r["precision"] not in REDUCED]
    threads = sorted({r["threads"] for r in rows}) or [1]
    scorers = sorted({(r["peer"], r["scorer"]) for r in rows})
    fig, axes = plt.subplots(1, len(threads), figsize=(5.5 * len(threads) + 2, 5), sharey=True, squeeze=False,
                             layout="constrained")
    for ax, n in zip(axes[0], threads):
        for i, (peer, name) in enumerate(scorers):
            line = sorted((r["batch"], r["p50_us"]) for r in rows if r["scorer"] == name and r["threads"] == n)
            ax.loglog(*zip(*line) if line else ([], []), marker=marker(i), label=name,
                      color=COLOURS[i % len(COLOURS)], lw=1.2 if peer else 3, ls="--" if peer else "-",
                      ms=5 if peer else 7)
        batches = sorted({r["batch"] for r in rows})
        ax.set_xticks(batches, [str(b) for b in batches])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.set(xlabel="events per call", title=f"{n} thread{'s' if n > 1 else ''}")
    axes[0][0].set_ylabel("median latency of a call (µs)")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    what = ENERGY_AND_SCORE if ENERGY_AND_SCORE in tasks else "energy"
    fig.suptitle(f"Latency of {task_name(what)}, NumPy to NumPy (solid: fused-ebm, dashed: peers)")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def task_name(task: str) -> str:
    """The task for people."""
    return "energy + score" if task == ENERGY_AND_SCORE else task


def _time(us: float | None) -> str:
    if us is None:
        return "-"
    value, unit = (us, "us") if us < 999.5 else (us / 1e3, "ms") if us < 999.5e3 else (us / 1e6, "s")
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def _calls(rows: list[dict]) -> list[dict]:
    return [r for r in rows if r["timing"] == "call"]


def rate(per_s: float | None) -> str:
    """Events per second for people."""
    if per_s is None:
        return "-"
    return f"{per_s / 1e6:.2f} M" if per_s >= 1e6 else f"{per_s / 1e3:.1f} k"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _percent(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{100 * fraction:.1f}%"


def _limit(name: str) -> str:
    return name[0]


def _verdict(r: dict) -> Text:
    if r["problem"]:
        return Text("WRONG" if r["problem"].startswith("wrong") else "FAILED", style="bold red")
    if r["timing"] != "call":
        return Text("-")
    return Text("PASS", style="green") if r["within_budget"] else Text("FAIL", style="bold red")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
