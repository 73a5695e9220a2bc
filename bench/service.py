"""`python -m bench.service`: the figures of the scoring service, with the load from other processes."""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench import servers
from bench.machine import ROOT, cpu_ticks, machine, steal_fraction, versions
from bench.service_load import Load, run
from bench.serving import Process, score_request, serving
from ebm.bundle import Bundle
from ebm.command import commit, one_sentence, whole_file
from ebm.events import load_events
from serve.model import Served
from serve.service import LOOKED_AT_S

RATE = 200  # requests a second of the latency figures, one event each
OVERLOAD = 5
SWAPS = 20
NOWHERE = "redis://127.0.0.1:1/0"  # nobody listens there


def latency(model: Path, x: np.ndarray, seconds: float, **settings: object) -> dict:
    """One event a request, at a steady rate, and where the time goes."""
    with serving(model, **settings) as process:
        run(process.port, score_request(x[:1], binary=False), 1, 8, RATE)
        before = _server_seconds(process)
        load = run(process.port, score_request(x[:1], binary=False), seconds, 8, RATE)
        after = _server_seconds(process)
    _only(load, 200)
    kernel = Served(model)
    times = [_seconds(lambda: kernel.energies(x[:1])) for _ in range(2000)]
    service = (after[0] - before[0]) / (after[1] - before[1])
    total = float(load.seconds.mean())
    return {"requests_per_s": len(load.seconds) / load.took, **_quantiles(load), "split_us": {
        "kernel": statistics.median(times) * 1e6, "rest_of_the_service": (service - statistics.median(times)) * 1e6,
        "http_sockets_and_client": (total - service) * 1e6}}


def throughput(model: Path, x: np.ndarray, seconds: float, binary: bool) -> dict:
    """1000 events a request, four connections, whatever each of them waits."""
    with serving(model, queue_ms=1000) as process:
        run(process.port, score_request(x[:1000], binary), 0.5, 4)
        load = run(process.port, score_request(x[:1000], binary), seconds, 4, processes=2)
    _only(load, 200)
    return {"events_per_s": 1000 * len(load.seconds) / load.took, **_quantiles(load)}


def overload(model: Path, x: np.ndarray, seconds: float, connections: int, **settings: object) -> dict:
    """Five times the requests that the service can answer; the times are those of the requests that it admitted."""
    body = score_request(x, binary=True)
    with serving(model, queue_ms=1000) as process:  # nothing is refused
        run(process.port, body, 0.5, 4)
        capacity = run(process.port, body, seconds / 2, 4, processes=2)
    _only(capacity, 200)
    rate = len(capacity.seconds) / capacity.took
    with serving(model, **settings) as process:
        load = run(process.port, body, seconds, connections, OVERLOAD * rate, processes=2)
        rejected = process.metric("fused_ebm_rejected_total")
    n = len(load.seconds)
    return {"events_a_request": len(x), "connections": connections, "capacity_requests_per_s": rate,
            "offered_over_capacity": n / load.took / rate, "not_sent": load.missed,
            "answered_over_capacity": load.count(200) / load.took / rate, **_quantiles(load),
            "refused_p99_ms": load.ms(0.99, 429), "errors_5xx": int((load.status >= 500).sum()),
            "refused": load.count(429), "refused_and_counted": int(rejected), "other": n - load.count(200)
            - load.count(429)}  # fmt: skip


def swaps(model: Path, x: np.ndarray, seconds: float) -> dict:
    """A model swap every twentieth of the time, at the rate of the latency figures."""
    bundle = Bundle.load(model)
    other = replace(bundle, tensors=bundle.tensors | {"b_out": bundle.tensors["b_out"] + 1})
    with TemporaryDirectory() as folder:
        path = Path(folder, "model")
        bundle.save(path)
        with serving(path) as process:
            def swap() -> None:
                for i in range(SWAPS):
                    time.sleep(seconds / (SWAPS + 1))
                    (other, bundle)[i % 2].save(path)
                    process.popen.send_signal(signal.SIGHUP)

            run(process.port, score_request(x[:1], binary=False), 1, 8, RATE)
            swapper = threading.Thread(target=swap)
            swapper.start()
            load = run(process.port, score_request(x[:1], binary=False), seconds, 8, RATE)
            swapper.join()
            done = process.metric('fused_ebm_model_swaps_total{result="done"}')
    _only(load, 200)
    return {"swaps": int(done), **_quantiles(load), "not_sent": load.missed}


def killed(model: Path, x: np.ndarray, seconds: float, name: str) -> dict:
    """What single events wait for while Redis has the cache or PostgreSQL the database, and once that server is killed
    in the middle of the load; or why that cannot be measured here."""
    if why_not := getattr(servers, f"{name}_why_not")():
        return {"skipped": why_not}
    body = score_request(x[:1], binary=False)
    with TemporaryDirectory() as folder, getattr(servers, name)() as (server, url):
        uses = {"cache_url": url} if name == "redis" else {
            "database_url": url, "data_root": folder, "results_root": folder}
        with serving(model, **uses) as process:
            run(process.port, body, 2, 8, RATE)  # until the worker of the batch jobs, if there is one, has started
            ready = process.ready()
            before = run(process.port, body, seconds, 8, RATE)
            timer = threading.Timer(seconds / 2, server.kill)
            after = run(process.port, body, seconds, 8, RATE, started=timer.start)
            timer.join()
            time.sleep(LOOKED_AT_S)
            process.ready()  # which looks, and
            states = [ready, process.ready()]
    _only(before, 200)
    _only(after, 200)
    return {"ready_before_and_after": " ".join(states), "before": _quantiles(before), "killed": _quantiles(after),
            "added_p99_ms": after.ms(0.99) - before.ms(0.99)}


def _server_seconds(process: Process) -> tuple[float, float]:
    name, label = "fused_ebm_request_seconds", '{path="/api/v1/score"}'
    return process.metric(f"{name}_sum{label}"), process.metric(f"{name}_count{label}")


def _only(load: Load, status: int) -> None:
    if (load.status != status).any():
        raise RuntimeError(f"{np.count_nonzero(load.status != status)} of {len(load.status)} replies are not {status}")


def _quantiles(load: Load) -> dict:
    slowest = load.seconds[load.status == 200].max(initial=0)
    return {f"p{q}_ms": load.ms(q / 100) for q in (50, 99)} | {"max_ms": float(slowest) * 1e3}


def _seconds(f: Callable) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example: python -m bench.service --seconds 30 --out service.json")
@one_sentence
def main(
    model: Annotated[Path, typer.Option(help="Model to serve.")] = ROOT / "models" / "demo",
    seconds: Annotated[float, typer.Option(min=2, help="Of each measurement.")] = 10,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Start the service, load it from other processes, and print what a client waits for and how much it gets."""
    console = Console(stderr=True)
    x = load_events("toy:2000").x
    figures: dict[str, dict] = {}
    ticks, load_average = cpu_ticks(), os.getloadavg()[0]
    for name, measure in {
        "latency": lambda: latency(model, x, seconds),
        "latency, Redis cannot be reached": lambda: latency(model, x, seconds, cache_url=NOWHERE),
        "binary": lambda: throughput(model, x, seconds, binary=True),
        "JSON": lambda: throughput(model, x, seconds, binary=False),
        "overload, 1000 events": lambda: overload(model, x[:1000], seconds, 64),
        "overload, 100 events": lambda: overload(model, x[:100], seconds, 64),
        "overload, 1 event": lambda: overload(model, x[:1], seconds, 160),
        "swaps": lambda: swaps(model, x, seconds),
        "Redis killed": lambda: killed(model, x, seconds, "redis"),
        "PostgreSQL killed": lambda: killed(model, x, seconds, "postgresql"),
    }.items():
        with console.status(name):
            figures[name] = measure()
    table = Table("figure", "", "", title="fused-ebm service")
    for name, values in figures.items():
        for key, value in _flat(values).items():
            table.add_row(name, key, f"{value:,.4g}" if isinstance(value, float) else str(value))
            name = ""
        table.add_section()
    Console().print(table)
    if out is not None:
        report = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "machine": machine(),
                  "versions": versions(), "load_average_before": load_average,
                  "steal_fraction": steal_fraction(ticks, cpu_ticks()), "seconds": seconds, "figures": figures}
        with whole_file(out) as f:
            f.write(json.dumps(report, indent=1, allow_nan=False).encode() + b"\n")


def _flat(values: dict) -> dict:
    return {f"{key}, {k}" if isinstance(v, dict) else key: w for key, v in values.items()
            for k, w in (v.items() if isinstance(v, dict) else [("", v)])}


if __name__ == "__main__":
    app(prog_name="python -m bench.service")
