"""Energies of events that were scored before, by SHA-256 of model and event: in this process, or in Redis.

Off by default: `python -m serve.cache MODEL [redis://...]` measures why. On one core of a Xeon the native kernel takes
8 us for an event and 87 us for 64; a lookup in this process takes 1.8 and 52 us, most of it for the keys, one in Redis
on the same machine 140 and 430 us. So memory:// pays where single events come again and again (it also spares them the
wait for a batch), and Redis only where the model is slower than the network: one ten times larger, or a backend such as
"reference".
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import numpy as np

LIMIT_S, MORE_S = 0.010, 50e-6  # for one trip to Redis, and more for each event: what takes longer is of no use
PAUSE_S = 5.0  # without Redis after it failed, so that few requests wait for it
KEEP_S = 86_400  # in Redis, whose own limit of memory (maxmemory-policy allkeys-lru) may forget earlier

log = logging.getLogger("fused_ebm.serve")


class Cache(Protocol):
    """One event loop uses it. A cache that is out of reach knows nothing, and costs LIMIT_S every PAUSE_S."""

    async def lookup(self, version: str, x: np.ndarray) -> np.ndarray:
        """Energies (n,) float32 of events (n, D) float32, NaN where unknown. `version` is the model's digest."""

    async def store(self, version: str, x: np.ndarray, energies: np.ndarray) -> None:
        """Remember finite energies (n,) of events (n, D)."""

    def why_not(self) -> str | None:
        """The reason why it was of no use when last asked, or None."""

    async def close(self) -> None: ...


def open_cache(url: str | None, entries: int) -> Cache | None:
    """None for None; memory:// keeps the `entries` that were used last; redis://host:port/number, rediss:// or unix://.

    Nothing is connected before it is used. Raises ValueError on any other address.
    """
    if url is None:
        return None
    if url == "memory://":
        return MemoryCache(entries)
    if url.startswith(("redis://", "rediss://", "unix://")):
        return RedisCache(url)
    raise ValueError("cache_url: expected memory://, redis://, rediss:// or unix://")  # an address may hold a password


def keys_of(version: str, x: np.ndarray) -> list[bytes]:
    """SHA-256 of the model's digest and each event's bytes (little-endian float32)."""
    model = hashlib.sha256(version.encode())
    events, width, keys = np.ascontiguousarray(x, "<f4").tobytes(), 4 * x.shape[1], []
    for start in range(0, len(events), width):
        key = model.copy()
        key.update(events[start : start + width])
        keys.append(key.digest())
    return keys


class MemoryCache:
    """The entries that were used last, in this process."""

    def __init__(self, entries: int) -> None:
        self._entries, self._energies = entries, OrderedDict()

    async def lookup(self, version: str, x: np.ndarray) -> np.ndarray:
        known, found = self._energies, []
        for key in keys_of(version, x):
            energy = known.get(key)
            if energy is not None:
                known.move_to_end(key)
            found.append(np.nan if energy is None else energy)
        return np.array(found, np.float32)

    async def store(self, version: str, x: np.ndarray, energies: np.ndarray) -> None:
        finite = np.isfinite(energies)
        self._energies.update(zip(keys_of(version, x[finite]), energies[finite].tolist(), strict=True))
        while len(self._energies) > self._entries:
            self._energies.popitem(last=False)

    def why_not(self) -> None:
        return None

    async def close(self) -> None:
        self._energies.clear()


class RedisCache:
    """Energies as 4 bytes, shared by all services with this Redis."""

    def __init__(self, url: str) -> None:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        self._redis = Redis.from_url(url, retry=Retry(NoBackoff(), 0), max_connections=64)
        self._not_before, self._why_not = 0.0, None

    async def lookup(self, version: str, x: np.ndarray) -> np.ndarray:
        energies = np.full(len(x), np.nan, np.float32)
        if len(x):
            for i, value in enumerate(await self._ask(len(x), self._redis.mget, keys_of(version, x)) or ()):
                if value is not None and len(value) == 4:
                    energies[i] = np.frombuffer(value, "<f4")[0]
        return np.where(np.isfinite(energies), energies, np.float32(np.nan))

    async def store(self, version: str, x: np.ndarray, energies: np.ndarray) -> None:
        finite = np.isfinite(energies)
        if not finite.any():
            return
        many = self._redis.pipeline(transaction=False)
        for key, energy in zip(keys_of(version, x[finite]), energies[finite].astype("<f4"), strict=True):
            many.set(key, energy.tobytes(), ex=KEEP_S)
        await self._ask(len(x), many.execute)

    def why_not(self) -> str | None:
        return self._why_not

    async def close(self) -> None:
        await self._redis.aclose()

    async def _ask(self, events: int, ask: Callable, *args: list[bytes]) -> list | None:
        """What Redis answers, or None: it failed, or did so a moment ago."""
        from redis import RedisError

        if time.monotonic() < self._not_before:
            return None
        try:
            async with asyncio.timeout(LIMIT_S + events * MORE_S):
                answer = await ask(*args)
        except (RedisError, OSError) as e:  # TimeoutError is an OSError
            self._not_before = time.monotonic() + PAUSE_S
            self._why_not = f"Redis cannot be reached ({type(e).__name__})"
            log.warning("the cache is left out for %g s: %s", PAUSE_S, self._why_not)
            return None
        self._why_not = None
        return answer


def main(model: str, *urls: str) -> None:
    """Print what a batch costs: scored, and looked up where it is known."""
    from kernels import load_scorer

    scorer = load_scorer(model)
    rng = np.random.default_rng(0)

    async def measure() -> None:
        print(f"microseconds a batch (median of 200)\n{'events':>8}  {scorer.name:>12}", *(f"{u:>28}" for u in urls))
        for n in (1, 8, 64, 1000):
            x = rng.uniform(1, 50, (n, scorer.n_features)).astype(np.float32)
            row = [await _microseconds(lambda x=x: _as_coroutine(scorer.energy, x))]
            for url in urls:
                cache = open_cache(url, 100_000)
                await cache.store("", x, scorer.energy(x))
                if np.isnan(await cache.lookup("", x)).any():
                    raise RuntimeError(f"{url} does not answer in time")
                row.append(await _microseconds(lambda cache=cache, x=x: cache.lookup("", x)))
                await cache.close()
            print(f"{n:8}  {row[0]:12.1f}", *(f"{t:28.1f}" for t in row[1:]))

    asyncio.run(measure())


async def _as_coroutine(f, x: np.ndarray) -> np.ndarray:
    return f(x)


async def _microseconds(call, repeats: int = 200) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        await call()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e6


if __name__ == "__main__":
    import sys

    main(sys.argv[1], "memory://", *sys.argv[2:])
