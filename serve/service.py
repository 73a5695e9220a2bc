"""The state of one running service: the model, the batcher, the parts, and whether it is stopping."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np

from serve.admission import Queue
from serve.batching import Batcher
from serve.cache import open_cache
from serve.errors import Busy, Refused
from serve.metrics import Metrics
from serve.model import Served
from serve.settings import Settings

log = logging.getLogger("fused_ebm.serve")

SCORE_EDGES = (-200, -100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100, 200)
LOOKED_AT_S = 1.0  # how old the state of a part may be


class Service:
    """Scores and explains with the current model, and replaces it."""

    def __init__(self, settings: Settings):
        """Load and warm up the model. Raises what `Served` and `open_cache` raise."""
        self.settings = settings
        self.cache = open_cache(settings.cache_url, settings.cache_entries)
        self.draining = False
        self.started = time.time()
        self.why_not: dict[str, Callable[[], str | None]] = {"cache": self.cache.why_not} if self.cache else {}
        self._parts: tuple[float, dict[str, str]] = (0.0, {})
        self._swap = asyncio.Lock()
        self.served = self._load()
        self.metrics = Metrics(self._score_edges())
        self.metrics.model.labels(self.served.version).set(1)
        self.queue = Queue(settings.queue_ms / 1e3, len(self.served.features))
        self.metrics.wait.set_function(lambda: self.queue.seconds)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The batcher lives inside."""
        self.batcher = Batcher(lambda: self.served, wait=self.settings.wait_ms / 1e3,
                               max_events=self.settings.max_events, observe=self._observe)
        self.metrics.depth.set_function(lambda: self.batcher.events)
        try:
            yield
        finally:
            self.batcher.close()
            if self.cache:
                await self.cache.close()

    def _observe(self, events: int, seconds: float) -> None:
        self.metrics.batch.observe(events)
        self.queue.learn(events, seconds)

    async def score(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, Served]:
        """Events (n, D) -> energies (n,), flags (n,), and the model that gave both. Refused (422) on a bad event."""
        energies, served = await self._energies(x)
        if not np.isfinite(energies.sum(dtype=np.float64)):
            raise self.not_finite(served.why_not_finite(x))
        flags = energies > served.threshold
        self.metrics.scored(energies, flags)
        return energies, flags, served

    async def _energies(self, x: np.ndarray) -> tuple[np.ndarray, Served]:
        if len(x) == 0:
            return np.empty(0, np.float32), self.served
        if self.cache is None:
            return await self.batcher.energies(x)
        looked_up = self.served
        energies = await self.cache.lookup(looked_up.version, x)
        unknown = np.isnan(energies)
        self.metrics.cached(len(x), int(np.count_nonzero(unknown)))
        if not unknown.any():
            return energies, looked_up
        found, served = await self.batcher.energies(x[unknown])
        if served is not looked_up:  # replaced in between: one answer has one version
            return await self.batcher.energies(x)
        energies[unknown] = found
        await self.cache.store(served.version, x[unknown], found)
        return energies, served

    def not_finite(self, why: str) -> Refused:
        """The refusal of an event that cannot be scored, counted."""
        self.metrics.nonfinite.inc()
        return Refused(422, why)

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Ends what is inside at the deadline. Raises Busy."""
        try:
            async with asyncio.timeout(self.settings.deadline_s):
                yield
        except TimeoutError:
            raise Busy("deadline", f"no answer within {self.settings.deadline_s:g} s: try again later") from None

    async def parts(self) -> dict[str, str]:
        """"ok" or the reason why not, for each part that is configured; looked at once a second."""
        looked_at, parts = self._parts
        if time.monotonic() > looked_at + LOOKED_AT_S:
            self._parts = (time.monotonic(), parts or dict.fromkeys(self.why_not, "ok"))  # others need not wait for it
            parts = {name: await asyncio.to_thread(why_not) or "ok" for name, why_not in self.why_not.items()}
            self._parts = (time.monotonic(), parts)
        return parts

    async def reload(self) -> None:
        """Replace the model by what its path holds now; where that fails the old one stays, and the log says why."""
        async with self._swap:
            try:
                new = await asyncio.to_thread(self._load)
                if new.features != self.served.features:
                    raise ValueError("the new model has other features: start a service of its own for it")
            except (ValueError, RuntimeError, OSError) as e:
                self.metrics.swaps.labels("failed").inc()
                log.error("the model was not replaced: %s", e)
                return
            old, self.served = self.served, new
            self.metrics.scores.start(self._score_edges())
            self.metrics.model.labels(old.version).set(0)
            self.metrics.model.labels(new.version).set(1)
            self.metrics.swaps.labels("done").inc()
            log.info("model %s replaced by %s", old.version[:12], new.version[:12])

    def _score_edges(self) -> Sequence[float]:
        """Those of the settings, else the quantiles of the model's background, else what suits many models."""
        if self.settings.score_edges:
            return self.settings.score_edges
        if quantiles := self.served.bundle.quantiles:
            return sorted({energy for _, energy in quantiles})
        log.warning("the model has no quantiles of its background ('python -m ebm calibrate' adds them): the bins of "
                    "the score distribution are general ones")
        return SCORE_EDGES

    def _load(self) -> Served:
        s = self.settings
        return Served(s.model, s.backend, s.threads, largest=s.max_events)
