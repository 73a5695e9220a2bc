"""Requests that arrive together share one kernel call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from serve.model import Served

INLINE = 64  # events that are scored on the event loop: less time (0.1 ms) than a thread takes to answer


class _Waiting(NamedTuple):
    x: np.ndarray
    answer: asyncio.Future


class Batcher:
    """Gathers the events of concurrent requests; a thread scores the larger batches.

    The first request of a batch waits `wait` seconds for others, or what the loop's timer makes of it: uvloop's
    counts whole milliseconds, so that below half of one a batch is what arrives in one turn of the loop. The model is
    looked up once for each kernel call, so that all events of a request are of one version. A batch with more than
    `max_events` events waits no longer. `observe` is told the events and the seconds of each kernel call.
    """

    def __init__(self, current: Callable[[], Served], *, wait: float, max_events: int,
                 observe: Callable[[int, float], None]):
        self._current, self._wait, self._max_events, self._observe = current, wait, max_events, observe
        self.events = 0  # whose energies are waited for
        self._batch: list[_Waiting] = []
        self._size = 0
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "scoring")

    async def energies(self, x: np.ndarray) -> tuple[np.ndarray, Served]:
        """Energies (n,) of events (n, D), not finite where an event cannot be scored, and the model they are of."""
        waiting = _Waiting(x, self._loop.create_future())
        self._batch.append(waiting)
        self._size += len(x)
        if len(self._batch) == 1:
            self._timer = self._loop.call_later(self._wait, self._score)
        elif self._size > self._max_events:
            self._timer.cancel()
            self._score()
        self.events += len(x)
        try:
            return await waiting.answer
        finally:
            self.events -= len(x)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _score(self) -> None:
        batch, self._batch, size, self._size = self._batch, [], self._size, 0
        served = self._current()
        if size > INLINE:
            self._thread.submit(_scored, served, batch).add_done_callback(
                lambda done: self._loop.call_soon_threadsafe(self._answer, batch, size, served, *done.result()))
        else:
            self._answer(batch, size, served, *_scored(served, batch))

    def _answer(self, batch: list[_Waiting], size: int, served: Served, energies: np.ndarray | Exception,
                seconds: float) -> None:
        self._observe(size, seconds)
        start = 0
        for x, answer in batch:
            if answer.done():  # the request missed its deadline, or its client has gone
                pass
            elif isinstance(energies, Exception):
                answer.set_exception(energies)
            else:
                answer.set_result((energies[start : start + len(x)], served))
            start += len(x)


def _scored(served: Served, batch: list[_Waiting]) -> tuple[np.ndarray | Exception, float]:
    """Energies, or what is raised again in each of the requests; and the seconds that it took."""
    start = time.perf_counter()
    try:
        energies = served.energies(batch[0].x if len(batch) == 1 else np.concatenate([x for x, _ in batch]))
    except Exception as e:
        energies = e
    return energies, time.perf_counter() - start
