"""Requests that arrive together share one kernel call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from serve.errors import Busy
from serve.model import Served

INLINE = 64  # events that are scored on the event loop: less time (0.1 ms) than a thread takes to answer


class _Waiting(NamedTuple):
    x: np.ndarray
    answer: asyncio.Future


class Batcher:
    """Gathers the events of concurrent requests; a thread scores the larger batches.

    The first request of a batch waits `wait` seconds for others, or what the loop's timer makes of it: uvloop's
    counts whole milliseconds, so that below half of one a batch is what arrives in one turn of the loop. The model is
    looked up once for each kernel call, so that all events of a request are of one version. At most `max_events` events
    are in the service at a time, or one request; beyond that `admitted` raises Busy.
    """

    def __init__(self, current: Callable[[], Served], *, wait: float, max_events: int, observe: Callable[[int], None]):
        self._current, self._wait, self._max_events, self._observe = current, wait, max_events, observe
        self.events = 0
        self._batch: list[_Waiting] = []
        self._size = 0
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "scoring")

    @contextmanager
    def admitted(self, events: int) -> Iterator[None]:
        """A place for a request of so many events. Raises Busy where there is none."""
        if self.events and self.events + events > self._max_events:
            raise Busy("events", "too many events wait: try again later")
        self.events += events
        try:
            yield
        finally:
            self.events -= events

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
        return await waiting.answer

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _score(self) -> None:
        batch, self._batch, size, self._size = self._batch, [], self._size, 0
        served = self._current()
        self._observe(size)
        if size > INLINE:
            self._thread.submit(_scored, served, batch).add_done_callback(
                lambda done: self._loop.call_soon_threadsafe(_answer, batch, served, done.result()))
        else:
            _answer(batch, served, _scored(served, batch))


def _scored(served: Served, batch: list[_Waiting]) -> np.ndarray | Exception:
    try:
        return served.energies(batch[0].x if len(batch) == 1 else np.concatenate([x for x, _ in batch]))
    except Exception as e:  # raised again in each of the requests
        return e


def _answer(batch: list[_Waiting], served: Served, energies: np.ndarray | Exception) -> None:
    start = 0
    for x, answer in batch:
        if answer.done():  # the request missed its deadline, or its client has gone
            pass
        elif isinstance(energies, Exception):
            answer.set_exception(energies)
        else:
            answer.set_result((energies[start : start + len(x)], served))
        start += len(x)
