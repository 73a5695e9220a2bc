"""One process' share of a benchmark: build every contender, check it against float64, then time those that pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from bench import peers
from bench.contenders import Contender, build, sentence
from bench.load import spinning
from bench.machine import sgemm_contenders
from bench.peers import ENERGY, ENERGY_AND_SCORE
from bench.timer import Timing, interleave
from ebm.bundle import Bundle
from kernels import BACKENDS, load_scorer
from kernels.tolerances import CHECK_EVENTS, relative_rms_energy, relative_rms_score, tolerance_of_model

CALL, KERNEL = "call", "kernel"
_INSIDE, _OUT = " (C++)", " out="  # marks of what is timed besides the call
_MOST_CHECKED = 65_536  # events of one call: of a larger one as many, spread over it
_INSIDE_TO = 64  # events: beyond, Python is lost in the noise of the call
_LEAST_S = 0.3  # of samples, where the limit of the whole run leaves less
_POOLS_SLEEP_S = 0.02  # idle OpenMP threads spin for some 15 ms


@dataclass(frozen=True)
class Plan:
    """What to measure. `scorers` None: every backend that runs natively here and every default peer."""

    scorers: tuple[str, ...] | None
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    tasks: tuple[str, ...] = (ENERGY_AND_SCORE,)
    extra: tuple[str, ...] = ()  # contenders besides those
    seconds: float = 1.5  # of samples per contender, task, batch and thread count
    limit_s: float = 200.0  # of the whole run: samples are cut short to keep it
    check_events: int = CHECK_EVENTS
    least: int = 5  # samples, however long they take
    products: bool = True  # time matrix products alone, too
    preallocated: bool = False  # time the C++ backend with out=, too
    spin_on: tuple[int, ...] = ()  # processors that are kept busy while anything is timed


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
    peak: str = "fma_gflops"  # the rate of the machine that bounds it
    first_call_s: float | None = None
    rel_rms_energy: float | None = None
    rel_rms_score: float | None = None
    passed: bool = False
    p50_us: float | None = None
    p90_us: float | None = None
    p99_us: float | None = None
    p999_us: float | None = None
    slowest_us: float | None = None
    timing: str = CALL  # KERNEL: measured inside C++
    out_p50_us: float | None = None
    problem: str | None = None


@dataclass
class Measured:
    """What one process found: rows, why some contenders did not run, and matrix products (us per "batch x threads")."""

    rows: list[Row] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    sgemm_us: dict[str, float] = field(default_factory=dict)
    sgemm_openblas_us: dict[str, float] = field(default_factory=dict)


def measure(bundle: Bundle, x: np.ndarray, plan: Plan, threads: int, notify: Callable[[str, str, float], None],
            share_s: float) -> dict:
    """Measure with `threads` threads in this process, within about `share_s` seconds; `Measured` as a dict.

    `notify(contender, what, fraction)` is told what goes on. A named scorer that cannot run raises
    RuntimeError.
    """
    start = time.perf_counter()
    result = Measured()
    names = plan.scorers or (*BACKENDS, *peers.DEFAULT_PEERS, *plan.extra)
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
        contender = build(name, bundle, threads, result.not_run, named=plan.scorers is not None)
        for task, batch in cells if contender else ():
            done += 1
            if not contender.can(task):
                continue
            notify(name, f"first call and agreement, batch {batch}", done / steps)
            row, call = _check(contender, task, batch, threads, events, truth, bundle.reports)
            result.rows.append(row)
            rows[task, batch, name] = row
            if row.passed:
                ready[task, batch] |= {name: call} | _variants(contender, task, batch, threads, plan)
            if name + _INSIDE in ready[task, batch]:
                result.rows.append(replace(row, timing=KERNEL, first_call_s=None))
                rows[task, batch, name + _INSIDE] = result.rows[-1]
        done += 0 if contender else len(cells)

    products = sgemm_contenders(bundle.architecture) if plan.products else {}
    left = share_s - (time.perf_counter() - start)
    n_calls = sum(len(calls) for calls in ready.values()) + len(products) * len(plan.batches)
    seconds = min(plan.seconds, max(left / max(n_calls, 1) / 1.2, _LEAST_S))
    for task, batch in cells:
        notify(f"batch {batch}", f"timing {len(ready[task, batch])} contenders in turns", done / steps)
        calls = dict(ready[task, batch])
        if task == plan.tasks[-1]:
            calls |= {name: product(batch) for name, product in products.items()}
        inputs = [events[i:i + batch] for i in range(0, len(events) - batch + 1, batch)][:64]
        with spinning(plan.spin_on):
            timings = interleave(calls, inputs, seconds, least=plan.least, tells_time=_INSIDE,
                                 pause_s=_POOLS_SLEEP_S if threads > 1 else 0.0)
        for name, timing in timings.items():
            if name in products:
                getattr(result, name)[f"{batch}x{threads}"] = timing.quantiles_us()["p50_us"]
            elif name.endswith(_OUT):
                rows[task, batch, name.removesuffix(_OUT)].out_p50_us = timing.quantiles_us()["p50_us"]
            else:
                _fill(rows[task, batch, name], timing)
        done += 3
    return asdict(result)


def _variants(contender: Contender, task: str, batch: int, threads: int, plan: Plan) -> dict[str, Callable]:
    """The C++ backend without Python, and, where the plan says so, with preallocated results."""
    inside = contender.inside(task, threads) if batch <= _INSIDE_TO else None
    if inside is None:
        return {}
    out = {contender.name + _OUT: contender.preallocated(task, batch)} if plan.preallocated else {}
    return {contender.name + _INSIDE: inside} | out


def _check(contender: Contender, task: str, batch: int, threads: int, events: np.ndarray,
           truth: Sequence[np.ndarray], reports: dict[str, dict]) -> tuple[Row, Callable[[np.ndarray], Any] | None]:
    """First call, then the agreement on the fixed events in calls of this batch size, which also warms up."""
    c = contender
    row = Row(c.name, c.peer, c.device, threads, task, batch, c.precision, c.peak)
    n_check = len(truth[0])
    spread = np.linspace(0, batch - 1, _MOST_CHECKED).astype(int) if batch > _MOST_CHECKED else slice(None)
    try:
        first = _rows(events, 0, batch, n_check)
        start = time.perf_counter()
        call = c.function(task, batch)
        result = call(first)
        row.first_call_s = c.load_s + time.perf_counter() - start
        outputs = [_outputs(result, task, spread)]
        outputs += [_outputs(call(_rows(events, i, batch, n_check)), task) for i in range(batch, n_check, batch)]
    except Exception as e:
        row.problem = sentence(e)
        return row, None
    which = np.arange(len(outputs) * batch)[spread] % n_check
    found = [np.concatenate(parts) for parts in zip(*outputs)]
    expected = [t[which] for t in truth]
    for one, right in zip(found, expected):
        if one.shape != right.shape:
            row.problem = f"gives shape {one.shape}, expected {right.shape}"
            return row, None
    row.rel_rms_energy = relative_rms_energy(found[0], expected[0])
    errors = [row.rel_rms_energy]
    if task == ENERGY_AND_SCORE:
        row.rel_rms_score = relative_rms_score(found[1], expected[1])
        errors.append(row.rel_rms_score)
    tolerance = tolerance_of_model(c.precision, reports)
    row.passed = all(error <= tolerance for error in errors)  # NaN is no agreement
    if not row.passed:
        row.problem = f"wrong: further from float64 than {tolerance:g}"
        return row, None
    return row, call


def _rows(events: np.ndarray, first: int, batch: int, n_check: int) -> np.ndarray:
    """`batch` check events from `first` on; behind the last one they start again."""
    if first + batch <= n_check:
        return events[first:first + batch]
    return events[np.arange(first, first + batch) % n_check]


def _outputs(result: Any, task: str, which: Any = slice(None)) -> tuple[np.ndarray, ...]:
    # Copies: a contender may write its next results into the same memory.
    return tuple(np.array(np.asarray(r)[which]) for r in ((result,) if task == ENERGY else result))


def _fill(row: Row, timing: Timing) -> None:
    for name, value in timing.quantiles_us().items():
        setattr(row, name, value)
    row.slowest_us = timing.slowest_us
