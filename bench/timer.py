"""The one benchmark loop: all contenders take turns, so that a drift of the machine hits them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Fewer samples than this do not resolve the quantile.
QUANTILES = {"p50_us": (0.5, 1), "p90_us": (0.9, 10), "p99_us": (0.99, 100), "p999_us": (0.999, 1000)}

_TURN_S = 0.05
_SETTLE_CALLS = 3
_MOST_SAMPLES = 20_000
_MOST_PER_TURN = _MOST_SAMPLES // 10


@dataclass
class Timing:
    """The samples of one contender, in nanoseconds per call."""

    samples_ns: list[int] = field(default_factory=list)

    def quantiles_us(self) -> dict[str, float | None]:
        """p50, p90, p99 and p99.9; None where there are too few samples."""
        n = len(self.samples_ns)
        return {name: float(np.quantile(self.samples_ns, q)) / 1e3 if n >= least else None
                for name, (q, least) in QUANTILES.items()}

    @property
    def slowest_us(self) -> float | None:
        return max(self.samples_ns) / 1e3 if self.samples_ns else None


def interleave(calls: dict[str, Callable[[Any], Any]], inputs: list[Any], seconds: float, *, least: int = 5,
               pause_s: float = 0.0, tells_time: str | None = None) -> dict[str, Timing]:
    """Time every call on the inputs in rotation, for about `seconds` each and at least `least` samples.

    In each round every contender has one turn of some 50 ms; the first calls of a turn are not counted: they
    pay for what the others left in the caches. `pause_s` before a turn lets thread pools of the one before go
    to sleep: some spin for milliseconds after their last task. A contender whose name ends in `tells_time`
    has its own clock: its call gives the seconds of each repetition.
    """
    timings = {name: Timing() for name in calls}
    used = dict.fromkeys(calls, 0.0)
    with _no_garbage_collection():
        while waiting := [name for name in calls if _unfinished(timings[name], used[name], seconds, least)]:
            for name in waiting:
                time.sleep(pause_s)
                start = time.perf_counter()
                turn = _told_turn if tells_time and name.endswith(tells_time) else _turn
                turn(calls[name], inputs, timings[name].samples_ns, min(_TURN_S, seconds), min(least, 3))
                used[name] += time.perf_counter() - start
    return timings


def _unfinished(timing: Timing, used_s: float, seconds: float, least: int) -> bool:
    n = len(timing.samples_ns)
    return n < _MOST_SAMPLES and (n < least or used_s < seconds)


def _turn(call: Callable[[Any], Any], inputs: list[Any], samples: list[int], turn_s: float, few: int) -> None:
    clock = time.perf_counter_ns
    start = clock()
    for i in range(_SETTLE_CALLS):
        call(inputs[i % len(inputs)])
        if clock() - start > turn_s * 1e9:  # a slow one: a single call has settled it
            break
    end, i = clock() + int(turn_s * 1e9), len(samples)
    for _ in range(_MOST_PER_TURN):
        x = inputs[i % len(inputs)]
        before = clock()
        call(x)
        after = clock()
        samples.append(after - before)
        i += 1
        # A slow contender makes a few calls per turn, or settling would take half of its time.
        if after >= end and (after - before < turn_s * 1e9 or i % few == 0):
            return


def _told_turn(call: Callable[[Any], list[float]], inputs: list[Any], samples: list[int], turn_s: float,
               _: int) -> None:
    call(inputs[0])
    end = time.perf_counter() + turn_s
    for i in range(_MOST_PER_TURN):
        told = call(inputs[i % len(inputs)])
        samples += [round(seconds * 1e9) for seconds in told]
        if len(told) * (i + 1) >= _MOST_PER_TURN or time.perf_counter() >= end:
            return


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
