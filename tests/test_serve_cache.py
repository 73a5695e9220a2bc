"""The cache: what it knows, what it never learns, and that a Redis that is gone costs next to nothing."""

import asyncio
import hashlib
import os
import signal
import time

import numpy as np
import pytest

from bench import servers
from serve import cache as cache_module
from serve.cache import keys_of, open_cache

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
ENERGY = np.arange(5, dtype=np.float32) / 3


@pytest.fixture(scope="module")
def redis():
    if why_not := servers.redis_why_not():
        pytest.skip(why_not)
    with servers.redis() as both:
        yield both


@pytest.fixture(params=["memory", "redis"])
def url(request):
    return "memory://" if request.param == "memory" else request.getfixturevalue("redis")[1]


def run(url, use, entries=1000):
    """use(cache), a coroutine, in an event loop of its own."""
    async def main():
        cache = open_cache(url, entries)
        try:
            return await use(cache)
        finally:
            await cache.close()

    return asyncio.run(main())


def test_keys_are_the_hash_of_model_and_event_bytes():
    assert keys_of("digest", X) == [hashlib.sha256(b"digest" + row.astype("<f4").tobytes()).digest() for row in X]
    assert keys_of("digest", X[:, ::-1]) == keys_of("digest", np.ascontiguousarray(X[:, ::-1]))
    assert keys_of("digest", X[:0]) == []


def test_it_knows_what_it_was_told_of_that_model_bit_for_bit(url):
    async def use(cache):
        await cache.store("a", X[:4], ENERGY[:4])
        known, other = await cache.lookup("a", X), await cache.lookup("b", X)
        assert known.dtype == np.float32
        np.testing.assert_array_equal(known, [*ENERGY[:4], np.nan])
        assert np.isnan(other).all()
        assert (await cache.lookup("a", X[:0])).shape == (0,)
        np.testing.assert_array_equal(await cache.lookup("a", X[[3, 0, 3]]), ENERGY[[3, 0, 3]])
        assert cache.why_not() is None

    run(url, use)


def test_an_energy_that_is_none_is_never_kept(url):
    async def use(cache):
        await cache.store("c", X, np.array([np.nan, np.inf, -np.inf, 1, np.nan], np.float32))
        await cache.store("c", X[:2], np.full(2, np.nan, np.float32))
        np.testing.assert_array_equal(await cache.lookup("c", X), [np.nan, np.nan, np.nan, 1, np.nan])

    run(url, use)


def test_memory_keeps_what_was_used_last():
    async def use(cache):
        for i in range(3):
            await cache.store("a", X[i : i + 1], ENERGY[i : i + 1])
        await cache.lookup("a", X[:1])
        await cache.store("a", X[3:4], ENERGY[3:4])
        np.testing.assert_array_equal(await cache.lookup("a", X), [ENERGY[0], np.nan, ENERGY[2], ENERGY[3], np.nan])

    run("memory://", use, entries=3)


@pytest.mark.parametrize("damaged", [b"", b"abc", b"12345", np.float32(np.nan).tobytes(), np.float32(np.inf).tobytes()])
def test_a_damaged_entry_is_unknown(redis, damaged):
    from redis import Redis

    with Redis.from_url(redis[1]) as client:
        client.set(keys_of("d", X)[0], damaged)
        assert not client.config_get("save")["save"]

    async def use(cache):
        assert np.isnan(await cache.lookup("d", X[:1])).all()

    run(redis[1], use)


def test_entries_end_after_a_day(redis):
    from redis import Redis

    run(redis[1], lambda cache: cache.store("e", X, ENERGY))
    with Redis.from_url(redis[1]) as client:
        assert 86_000 < client.ttl(keys_of("e", X)[0]) <= 86_400


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_redis_that_is_gone_costs_one_wait_and_comes_back(redis, monkeypatch, how):
    server, url = redis
    monkeypatch.setattr(cache_module, "PAUSE_S", 1.0)

    async def use(cache):
        await cache.store("f", X, ENERGY)
        assert not np.isnan(await cache.lookup("f", X)).any()
        server.kill() if how == "killed" else os.killpg(server.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        for _ in range(100):
            assert np.isnan(await cache.lookup("f", X)).all()
            await cache.store("f", X, ENERGY)
        assert time.monotonic() - started < 0.9  # two hundred trips of LIMIT_S would take two seconds
        assert cache.why_not().startswith("Redis cannot be reached")
        server.start() if how == "killed" else os.killpg(server.process.pid, signal.SIGCONT)
        await asyncio.sleep(1.1)
        await cache.store("f", X, ENERGY)
        np.testing.assert_array_equal(await cache.lookup("f", X), ENERGY)
        assert cache.why_not() is None

    run(url, use)


def test_other_addresses_are_refused_without_repeating_them():
    assert open_cache(None, 1) is None
    for url in ("http://user:secret@host", "memory", "", "memory://x"):
        with pytest.raises(ValueError, match="cache_url: expected memory://, redis://") as error:
            open_cache(url, 1)
        assert "secret" not in str(error.value)
