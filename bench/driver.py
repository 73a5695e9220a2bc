"""Run a plan: one worker process per number of threads, progress for people, and the report as a dict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench.machine import (
    ROOT,
    best,
    cpu_ticks,
    flop_per_event,
    limits,
    machine,
    n_weights,
    steal_fraction,
    versions,
)
from bench.measure import Plan, Row
from bench.peers import ENERGY_AND_SCORE
from ebm.bundle import Architecture, Bundle
from ebm.command import commit

BUDGET_US = {"cuda": 5_000, "cpu": 50_000}
RESULT_FIELDS = (
    "scorer", "peer", "device", "threads", "task", "batch", "p50_us", "p90_us", "p99_us", "p999_us", "events_per_s",
    "rel_rms_energy", "rel_rms_score", "passed", "within_budget", "share_of_limit", "limit", "first_call_s",
    "precision", "timing")  # timing: "call" NumPy to NumPy, "kernel" inside C++
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_HEARTBEAT_S = 30
BUSY = "spinning on every core"


def benchmark(bundle: Bundle, x: np.ndarray, plan: Plan, model: dict, console: Console) -> tuple[dict, list[dict]]:
    """Run the plan on events x (n, D). Gives the report, and its results with `slowest_us` and `problem` as well.

    `model` describes model and events in the report. RuntimeError where a worker fails.
    """
    start, ticks = time.perf_counter(), cpu_ticks()
    about = machine() | {"date": datetime.now(UTC).isoformat(timespec="seconds"),
                         "load": BUSY if plan.spin_on else "idle"}
    found = limits(about["cores"])
    rows, not_run = [], {}
    products: dict[str, dict[str, float]] = {"sgemm_us": {}, "sgemm_openblas_us": {}}
    with tempfile.TemporaryDirectory(prefix="fused-ebm-bench-") as folder, _Display(console) as display:
        bundle.save(Path(folder) / "model")
        np.save(Path(folder) / "events.npy", x)
        for i, threads in enumerate(plan.threads):
            left = plan.limit_s - (time.perf_counter() - start)
            job = {"plan": asdict(plan), "threads": threads, "processors": _processors(threads),
                   "model": f"{folder}/model", "events": f"{folder}/events.npy",
                   "share_s": left / (len(plan.threads) - i)}
            result = _run_worker(job, Path(folder), display)
            rows += [Row(**row) for row in result["rows"]]
            not_run |= result["not_run"]
            for name, times in products.items():
                times |= result[name]
    found = best(found, limits(about["cores"]))
    results = [_result(row, bundle.architecture, found) for row in rows]
    about |= {"steal": steal_fraction(ticks, cpu_ticks()), "run_s": round(time.perf_counter() - start, 1),
              "not_run": not_run}
    return {
        "machine": about, "versions": versions(), "commit": commit(), "limits": found | products, "model": model,
        "results": [{name: r[name] for name in RESULT_FIELDS} for r in results],
    }, results


def _result(row: Row, a: Architecture, found: dict[str, float | None]) -> dict:
    """The row with what follows from its times."""
    r = asdict(row) | {"events_per_s": None, "limit": None, "share_of_limit": None}
    waited = row.p99_us if row.p99_us is not None else row.slowest_us
    budget = BUDGET_US[row.device.partition(":")[0]]
    r["within_budget"] = bool(row.passed and waited is not None and waited / row.batch < budget)
    if row.device == "cpu":
        one, score = row.threads == 1, row.task == ENERGY_AND_SCORE
        # A single event reads every weight once per direction and computes next to nothing.
        r["limit"] = "read_gbps_600k" if row.batch == 1 else row.peak + ("_1t" if one else "_all")
        work = n_weights(a) * 4 * (1 + score) if row.batch == 1 else flop_per_event(a, score) * row.batch
        if row.p50_us and found[r["limit"]]:
            r["share_of_limit"] = work / (row.p50_us * 1e3) / found[r["limit"]]
    if row.p50_us:
        r["events_per_s"] = row.batch * 1e6 / row.p50_us
    return r


def _processors(threads: int) -> list[int]:
    """The last ones: the first processor serves most interrupts."""
    return sorted(os.sched_getaffinity(0))[-threads:]


def _run_worker(job: dict, folder: Path, display: _Display) -> dict:
    n = str(job["threads"])
    environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, n)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment["OPENBLAS_THREAD_TIMEOUT"] = "20"  # 2^20 clocks; else its idle threads spin for 2^26, in others' turns
    environment.pop("TRITON_INTERPRET", None)  # the interpreter's times mean nothing
    log = folder / f"worker-{n}.log"
    with open(log, "w") as err, subprocess.Popen(
            [sys.executable, "-m", "bench.worker"], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=err) as process:
        try:
            json.dump(job, process.stdin)
            process.stdin.close()
            for line in process.stdout:
                message = json.loads(line)
                if "error" in message:
                    raise RuntimeError(message["error"])
                if "result" in message:
                    return message["result"]
                display.show(f"{n} thread{'s' if n != '1' else ''}", *message["progress"])
            process.wait()
        finally:
            process.kill()
    last = next((s.strip() for s in reversed(log.read_text().splitlines()) if s.strip()), "nothing on standard error")
    raise RuntimeError(f"the measuring process ended with status {process.returncode} at: {display.text} ({last})")


class _Display:
    """A bar on a terminal; elsewhere a line per contender, and a sign of life where one takes long."""

    def __init__(self, console: Console):
        self.console, self.text, self.contender = console, "starting", ""
        self.start = time.perf_counter()
        # Drawn rarely: drawing takes processor time from what is measured.
        self.bar = Progress(SpinnerColumn(), BarColumn(20), TextColumn("{task.description}"), TimeElapsedColumn(),
                            console=console, transient=True, refresh_per_second=2) if console.is_terminal else None
        self.over = threading.Event()

    def __enter__(self) -> _Display:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("starting", total=1.0)
        else:
            self.thread = threading.Thread(target=self._heartbeat, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.bar:
            self.bar.stop()

    def show(self, threads: str, contender: str, what: str, fraction: float) -> None:
        """Say what is going on."""
        self.text = f"{threads}: {contender}, {what}"
        if self.bar:
            self.bar.update(self.task, description=self.text, completed=fraction)
        elif contender != self.contender:
            self._print(self.text)
        self.contender = contender

    def _heartbeat(self) -> None:
        last = ""
        while not self.over.wait(_HEARTBEAT_S):
            if self.text == last:
                self._print(f"still {self.text}")
            last = self.text

    def _print(self, text: str) -> None:
        self.console.print(f"[{time.perf_counter() - self.start:5.0f} s] {text}", highlight=False, markup=False)
