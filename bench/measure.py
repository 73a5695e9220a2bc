"""One process' share of a benchmark: build every contender, check it against float64, then time those that pass."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bench import peers
from bench.machine import sgemm_contenders
from bench.peers import ENERGY, ENERGY_AND_SCORE
from bench.timer import Timing, interleave
from ebm.bundle import Bundle
from kernels import BACKENDS, load_scorer
from kernels.tolerances import CHECK_EVENTS, TOLERANCES, relative_rms_energy, relative_rms_score

TASKS = (ENERGY, ENERGY_AND_SCORE)
_TAKE_THREADS = ("native", "numba")
_LEAST_S = 0.3  # of samples, where the limit of the whole run leaves less
_POOLS_SLEEP_S = 0.02  # idle OpenMP threads spin for some 15 ms


@dataclass(frozen=True)
class Plan:
    """What to measure. `scorers` None: every backend that runs natively here and every default peer."""

    scorers: tuple[str, ...] | None
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    tasks: tuple[str, ...] = (ENERGY_AND_SCORE,)
    extra_peers: tuple[str, ...] = ()
    seconds: float = 1.5  # of samples per contender, task, batch and thread count
    limit_s: float = 200.0  # of the whole run: samples are cut short to keep it
    check_events: int = CHECK_EVENTS


@dataclass
class Row:
    """One line of the report: fields of the JSON, and what only people are shown."""

    scorer: str
    peer: bool
    device: str
    threads: int
    task: str
    batch: int
    precision: str
    first_call_s: float | None = None
    rel_rms_energy: float | None = None
    rel_rms_score: float | None = None
    passed: bool = False
    p50_us: float | None = None
    p90_us: float | None = None
    p99_us: float | None = None
    p999_us: float | None = None
    slowest_us: float | None = None
    problem: str | None = None


@dataclass
class Contender:
    """A backend or a peer that could be built. `function(task, batch)` gives the callable that is timed."""

    name: str
    peer: bool
    device: str
    precision: str
    function: Callable[[str, int], Callable[[np.ndarray], Any]]
    load_s: float


@dataclass
class Measured:
    """What one process found: rows, why some contenders did not run, and matrix products (us per "batch x threads")."""

    rows: list[Row] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    sgemm_us: dict[str, float] = field(default_factory=dict)
    sgemm_openblas_us: dict[str, float] = field(default_factory=dict)


def scorer_names() -> list[str]:
    """Everything that --backend can name: plain backends, backend-precision, and peers."""
    ours = [name if i == 0 else f"{name}-{precision}"
            for name, b in BACKENDS.items() for i, precision in enumerate(b.dtypes)]
    return [*ours, *peers.PEERS]


def measure(bundle: Bundle, x: np.ndarray, plan: Plan, threads: int, notify: Callable[[str, str, float], None],
            share_s: float) -> dict:
    """Measure with `threads` threads in this process, within about `share_s` seconds; `Measured` as a dict.

    `notify(contender, what, fraction)` is told what goes on. A named scorer that cannot run raises
    RuntimeError.
    """
    start = time.perf_counter()
    result = Measured()
    names = plan.scorers or (*BACKENDS, *peers.DEFAULT_PEERS, *plan.extra_peers)
    cells = [(task, batch) for task in plan.tasks for batch in plan.batches]
    steps, done = len(names) * len(cells) + 3 * len(cells), 0

    notify("truth", "float64", 0.0)
    events = np.resize(x, (max(len(x), plan.check_events, *plan.batches), x.shape[1]))
    n_check = plan.check_events
    truth = load_scorer(bundle, "reference").energy_and_score(events[:n_check])

    ready: dict[tuple[str, int], dict[str, Callable]] = {cell: {} for cell in cells}
    rows: dict[tuple[str, int, str], Row] = {}
    for name in names:
        notify(name, "loading", done / steps)
        contender = _build(name, bundle, threads, result.not_run, named=plan.scorers is not None)
        for task, batch in cells if contender else ():
            notify(name, f"first call and agreement, batch {batch}", done / steps)
            row, call = _check(contender, task, batch, threads, events, truth)
            result.rows.append(row)
            rows[task, batch, name] = row
            if row.passed:
                ready[task, batch][name] = call
            done += 1
        done += 0 if contender else len(cells)

    products = sgemm_contenders(bundle.architecture)
    left = share_s - (time.perf_counter() - start)
    n_calls = sum(len(calls) for calls in ready.values()) + len(products) * len(plan.batches)
    seconds = min(plan.seconds, max(left / max(n_calls, 1) / 1.2, _LEAST_S))
    for task, batch in cells:
        notify(f"batch {batch}", f"timing {len(ready[task, batch])} contenders in turns", done / steps)
        calls = dict(ready[task, batch])
        if task == plan.tasks[-1]:
            calls |= {name: product(batch) for name, product in products.items()}
        inputs = [events[i:i + batch] for i in range(0, len(events) - batch + 1, batch)][:64]
        timings = interleave(calls, inputs, seconds, pause_s=_POOLS_SLEEP_S if threads > 1 else 0.0)
        for name, timing in timings.items():
            if name in products:
                getattr(result, name)[f"{batch}x{threads}"] = timing.quantiles_us()["p50_us"]
            else:
                _fill(rows[task, batch, name], timing)
        done += 3
    return asdict(result)


def _build(name: str, bundle: Bundle, threads: int, not_run: dict[str, str], named: bool) -> Contender | None:
    """The contender, or None and the reason in `not_run`; a contender that the caller named raises instead."""
    try:
        return _build_peer(name, bundle, threads) if name in peers.PEERS else _build_own(name, bundle, threads)
    except Exception as e:  # a runtime that breaks is a result, not the end of the run
        if named:
            raise RuntimeError(f"{name} cannot run: {_sentence(e)}") from e
        not_run[name] = _sentence(e)
        return None


def _build_peer(name: str, bundle: Bundle, threads: int) -> Contender:
    cls = peers.PEERS[name]
    if why_not := cls.why_not():
        raise RuntimeError(why_not)
    for module in cls.modules:
        importlib.import_module(module)
    start = time.perf_counter()
    peer = cls(bundle, threads)
    return Contender(name, True, peer.device, peer.precision, peer.function, time.perf_counter() - start)


def _build_own(name: str, bundle: Bundle, threads: int) -> Contender:
    backend, _, precision = name.partition("-")
    if why_not := BACKENDS[backend].why_not_for(bundle.architecture.kind):
        raise RuntimeError(why_not)
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("it would run in the interpreter (TRITON_INTERPRET=1), whose times mean nothing")
    BACKENDS[backend].load()
    options: dict[str, Any] = {"threads": threads} if backend in _TAKE_THREADS else {}
    if precision:
        options["precision"] = precision
    start = time.perf_counter()
    scorer = load_scorer(bundle, backend, **options)
    return Contender(name, False, scorer.device, scorer.precision, lambda task, batch: getattr(scorer, task),
                     time.perf_counter() - start)


def _check(contender: Contender, task: str, batch: int, threads: int, events: np.ndarray,
           truth: Sequence[np.ndarray]) -> tuple[Row, Callable[[np.ndarray], Any] | None]:
    """First call, then the agreement on the fixed events in calls of this batch size, which also warms up."""
    c = contender
    row = Row(c.name, c.peer, c.device, threads, task, batch, c.precision)
    n_check = len(truth[0])
    try:
        start = time.perf_counter()
        call = c.function(task, batch)
        call(events[:batch])
        row.first_call_s = c.load_s + time.perf_counter() - start
        outputs = [_outputs(call(_rows(events, i, batch, n_check)), task) for i in range(0, n_check, batch)]
    except Exception as e:
        row.problem = _sentence(e)
        return row, None
    n = len(outputs) * batch
    found = [np.concatenate(parts) for parts in zip(*outputs)]
    expected = [np.resize(t, (n, *t.shape[1:])) for t in truth]
    for one, right in zip(found, expected):
        if one.shape != right.shape:
            row.problem = f"gives shape {one.shape}, expected {right.shape}"
            return row, None
    row.rel_rms_energy = relative_rms_energy(found[0], expected[0])
    errors = [row.rel_rms_energy]
    if task == ENERGY_AND_SCORE:
        row.rel_rms_score = relative_rms_score(found[1], expected[1])
        errors.append(row.rel_rms_score)
    row.passed = all(error <= TOLERANCES[c.precision] for error in errors)  # NaN is no agreement
    if not row.passed:
        row.problem = f"wrong: further from float64 than {TOLERANCES[c.precision]:g}"
        return row, None
    return row, call


def _rows(events: np.ndarray, first: int, batch: int, n_check: int) -> np.ndarray:
    """`batch` check events from `first` on; behind the last one they start again."""
    if first + batch <= n_check:
        return events[first:first + batch]
    return events[np.arange(first, first + batch) % n_check]


def _outputs(result: Any, task: str) -> tuple[np.ndarray, ...]:
    # Copies: a contender may write its next results into the same memory.
    return tuple(np.array(r) for r in ((result,) if task == ENERGY else result))


def _fill(row: Row, timing: Timing) -> None:
    for name, value in timing.quantiles_us().items():
        setattr(row, name, value)
    row.slowest_us = timing.slowest_us


def _sentence(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    # Long reports say what happened first and why last.
    text = lines[0] if len(lines) == 1 else f"{lines[0][:200]} ... {lines[-1]}"
    return text if len(text) <= 400 else text[:397] + "..."
