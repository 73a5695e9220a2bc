"""What should not happen, happening: a kernel that fails or is late, a bug in a route, a log that nobody reads."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time

import numpy as np
import pytest

from bench.machine import ROOT
from serve import logs
from serve.admission import EVENT_S, SCORE, Queue
from serve.batching import INLINE, Batcher
from serve.guard import Guard
from serve.service import Service
from serve.settings import Settings

SMALL, LARGE = np.zeros((1, 3), np.float32), np.ones((INLINE + 1, 3), np.float32)


class Fake:
    """A model whose energies are its version; `trouble` is done first."""

    def __init__(self, version: int, trouble=lambda: None):
        self.version, self.trouble = version, trouble

    def energies(self, x: np.ndarray) -> np.ndarray:
        self.trouble()
        return np.full(len(x), self.version, np.float32)


def with_batcher(current, test, **options) -> object:
    async def run() -> object:
        sizes: list[int] = []
        batcher = Batcher(current, **{"wait": 0, "max_events": 1000, "observe": lambda n, _: sizes.append(n)} | options)
        try:
            return await test(batcher, sizes)
        finally:
            batcher.close()

    return asyncio.run(run())


@pytest.mark.parametrize("x", [SMALL, LARGE])
def test_a_failed_kernel_call_fails_its_own_requests_alone(x):
    def fail() -> None:
        raise RuntimeError("out of memory")

    models = [Fake(1, fail), Fake(2)]

    async def test(batcher: Batcher, _sizes: list[int]) -> None:
        failed = await asyncio.gather(*(batcher.energies(x) for _ in range(3)), return_exceptions=True)
        assert [str(e) for e in failed] == ["out of memory"] * 3
        assert (await batcher.energies(x))[0].tolist() == [2] * len(x)

    with_batcher(lambda: models.pop(0), test)


def test_an_answer_that_comes_too_late_is_dropped_and_the_others_are_given():
    async def test(batcher: Batcher, sizes: list[int]) -> None:
        async def impatient() -> None:
            async with asyncio.timeout(0.01):
                await batcher.energies(LARGE)

        late, (energies, _) = await asyncio.gather(impatient(), batcher.energies(LARGE), return_exceptions=True)
        assert isinstance(late, TimeoutError)
        assert energies.tolist() == [1] * len(LARGE)
        assert sizes == [2 * len(LARGE)]

    with_batcher(lambda: Fake(1, lambda: time.sleep(0.1)), test)


def test_all_events_of_a_request_are_of_the_model_that_it_names():
    models = iter(Fake(version) for version in range(10**6))

    async def test(batcher: Batcher, _sizes: list[int]) -> None:
        answers = await asyncio.gather(*(batcher.energies(x) for _ in range(50) for x in (SMALL, LARGE)))
        assert all((energies == served.version).all() for energies, served in answers)

    with_batcher(lambda: next(models), test, max_events=200)


def test_a_full_batch_does_not_wait():
    async def test(batcher: Batcher, sizes: list[int]) -> None:
        start = time.perf_counter()
        await asyncio.gather(*(batcher.energies(LARGE) for _ in range(3)))
        assert time.perf_counter() - start < 5
        assert sizes == [3 * len(LARGE)]

    with_batcher(lambda: Fake(1), test, wait=60, max_events=3 * len(LARGE) - 1)


def headers(size: int, kind: str = "application/octet-stream") -> dict[bytes, bytes]:
    return {b"content-length": str(size).encode(), b"content-type": kind.encode()}


def test_a_request_enters_where_the_others_take_no_longer_than_the_limit():
    queue = Queue(limit=0.001, n_features=64)
    within = [queue.enter(headers(256)) for _ in range(20)]
    entered = [seconds for seconds in within if seconds]
    assert within == entered + [None] * (20 - len(entered))
    assert sum(entered[:-1]) <= 0.001 < sum(entered)
    for seconds in entered:
        queue.leave(seconds)
    assert queue.seconds == pytest.approx(0, abs=1e-12)
    assert queue.enter(headers(4 * 2**20, "application/json")) > 0.02  # of any size, if nothing waits
    assert queue.enter({}) is None


def test_the_predicted_wait_follows_the_kernel():
    queue = Queue(limit=1, n_features=64)
    first = queue.enter(headers(256_000))
    for _ in range(1000):
        queue.learn(2000, 2000 * 50e-6)
    assert queue.enter(headers(256_000)) - first == pytest.approx(1000 * (50e-6 - EVENT_S), rel=1e-3)


@pytest.mark.parametrize("broken", [False, True])
def test_places_are_given_back_whatever_happens(broken):
    service, sent = Service(Settings(model=ROOT / "models" / "demo", threads=1)), []

    async def app(scope, receive, send) -> None:
        assert service.queue.seconds > 0
        if broken:
            raise ZeroDivisionError

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": SCORE, "headers": [(b"content-length", b"9")]}
    asyncio.run(Guard(app, service, set())(scope, None, send))
    assert service.queue.seconds == 0


def test_a_bug_is_answered_with_500_that_says_nothing_and_logged_under_its_id(caplog):
    async def bug(scope, receive, send) -> None:
        raise KeyError("the customer's number 54321987")

    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    service = Service(Settings(model=ROOT / "models" / "demo", threads=1))
    scope = {"type": "http", "method": "GET", "path": "/x", "headers": [(b"x-request-id", b"id-7")], "client": None}
    with caplog.at_level(logging.INFO):
        asyncio.run(Guard(bug, service, set())(scope, None, send))
    start, body = sent
    assert start["status"] == 500
    assert (b"x-request-id", b"id-7") in start["headers"]
    assert "54321987" not in json.loads(body["body"])["detail"]
    (record,) = (r for r in caplog.records if r.message == "request")
    assert (record.levelname, record.request["id"], record.request["path"]) == ("ERROR", "id-7", "other")
    line = json.loads(logs.JsonFormatter().format(record))
    assert "KeyError" in line["exception"]
    assert line["status"] == 500


def test_a_log_that_nobody_reads_holds_up_nothing(monkeypatch):
    reading, writing = os.pipe()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with open(writing, "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        listener = logs.start("info")
        try:
            start = time.perf_counter()
            for _ in range(20_000):
                logging.getLogger("fused_ebm.serve").info("x" * 100)
            assert time.perf_counter() - start < 20
            assert listener.queue.qsize() <= 10_000
        finally:
            root.handlers[:], root.level = handlers, level
            os.set_blocking(reading, False)
            while listener._thread and listener._thread.is_alive() and listener.queue.qsize():
                try:
                    os.read(reading, 2**20)
                except BlockingIOError:
                    time.sleep(0.001)
            listener.stop()
    os.close(reading)
