"""Many requests at once: shared kernel calls, each with its own answer, and swaps and stops that lose nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest

from bench.machine import ROOT
from bench.serving import Connection, Process, Reply, request, score_request, serving
from ebm.bundle import Bundle
from ebm.events import load_events
from serve.model import Served

DEMO = ROOT / "models" / "demo"


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return load_events("toy:1200").x


@pytest.fixture(scope="module")
def truth(x) -> np.ndarray:
    return Served(DEMO).energies(x)


def energies_of(reply: Reply) -> np.ndarray:
    if reply.header("content-type") == "application/json":
        return np.array(json.loads(reply.body)["scores"], np.float32)
    return np.frombuffer(reply.body[: len(reply.body) // 5 * 4], "<f4")


def test_requests_at_once_share_kernel_calls_and_each_gets_its_own_answer(x, truth):
    sizes = (1, 2, 7, 1, 64, 1, 300, 3)

    async def client(process: Process, start: int) -> int:
        connection, asked = await Connection.open(process.port), 0
        for turn, n in zip(range(40), cycle(sizes)):
            i = (start + 31 * turn) % (len(x) - n)
            reply = await connection.ask(score_request(x[i : i + n], binary=turn % 2 == 0))
            assert reply.status == 200
            np.testing.assert_array_equal(energies_of(reply), truth[i : i + n])
            asked += n
        connection.close()
        return asked

    async def clients(process: Process) -> int:
        return sum(await asyncio.gather(*(client(process, 37 * i) for i in range(32))))

    with serving(DEMO, threads=1, queue_ms=1000) as process:
        asked = asyncio.run(clients(process))
        calls, events = (process.metric(f"fused_ebm_batch_events_{m}") for m in ("count", "sum"))
        assert events == asked == process.metric("fused_ebm_events_total")
        assert calls < 0.9 * 32 * 40
        assert process.metric('fused_ebm_score_bucket{le="+Inf"}') == asked
        assert process.metric("fused_ebm_queue_events") == 0


async def one(process: Process, body: bytes) -> Reply:
    connection = await Connection.open(process.port)
    reply = await connection.ask(body)
    connection.close()
    return reply


@pytest.fixture
def two_models(tmp_path) -> list[Bundle]:
    """The demo model and one like it, of other weights."""
    a = Bundle.load(DEMO)
    return [a, replace(a, tensors=a.tensors | {"b_out": a.tensors["b_out"] + 1, "b_in": a.tensors["b_in"] + 0.01})]


@pytest.mark.parametrize("seconds", [60, pytest.param(600, marks=pytest.mark.full)])
def test_swaps_under_load_drop_nothing_mix_nothing_and_leave_nothing(x, two_models, tmp_path, seconds):
    path, swaps = tmp_path / "model", 20
    expected = {}
    for bundle in two_models:
        bundle.save(path)
        expected[bundle.digest] = Served(path)
    expected = {digest: (served.energies(x), served.threshold) for digest, served in expected.items()}
    seen, end = dict.fromkeys(expected, 0), time.monotonic() + seconds

    async def client(process: Process, start: int, n: int, binary: bool) -> None:
        connection, i = await Connection.open(process.port), start
        while time.monotonic() < end:
            i = (i + 17) % (len(x) - n)
            reply = await connection.ask(score_request(x[i : i + n], binary))
            assert reply.status == 200
            version = reply.header("x-model-version")
            np.testing.assert_array_equal(energies_of(reply), expected[version][0][i : i + n])
            seen[version] += 1
            await asyncio.sleep(0.005)

    async def explainer(process: Process) -> None:
        connection = await Connection.open(process.port)
        event = [None if np.isnan(v) else float(v) for v in x[0].astype(float)]
        body = request("/api/v1/explain", json.dumps({"event": event}).encode())
        while time.monotonic() < end:
            reply = await connection.ask(body)
            assert reply.status == 200
            assert json.loads(reply.body)["score"] == expected[reply.header("x-model-version")][0][0]
            await asyncio.sleep(0.05)

    async def swapper(process: Process) -> None:
        for i in range(swaps):
            await asyncio.sleep(seconds / (swaps + 1))
            await asyncio.to_thread(two_models[i % 2].save, path)
            process.popen.send_signal(signal.SIGHUP)
            await asyncio.to_thread(_reach, process, 'fused_ebm_model_swaps_total{result="done"}', i + 1)

    async def all_of_them(process: Process) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(swapper(process))
            group.create_task(explainer(process))
            for i, n in enumerate((1, 1, 1, 5, 60, 400)):
                group.create_task(client(process, 100 * i, n, binary=i % 2 == 1))

    with serving(path, threads=1) as process:
        asyncio.run(_warm(process, score_request(x[:400], binary=False), 100))
        before = process.rss_mb()
        asyncio.run(all_of_them(process))
        assert process.metric("fused_ebm_model_swaps_total") == swaps
        assert process.metric("fused_ebm_rejected_total") == 0
        assert process.rss_mb() - before < 40
    assert min(seen.values()) > 0.2 * sum(seen.values())


def _reach(process: Process, metric: str, value: float) -> None:
    end = time.monotonic() + 20
    while process.metric(metric) < value:
        assert time.monotonic() < end
        time.sleep(0.05)


async def _warm(process: Process, body: bytes, n: int) -> None:
    connection = await Connection.open(process.port)
    for _ in range(n):
        await connection.ask(body)
    connection.close()


def test_a_model_that_is_damaged_or_has_other_features_replaces_nothing(x, truth, two_models, tmp_path):
    path = tmp_path / "model"
    two_models[0].save(path)
    with serving(path, threads=1) as process:
        def swap(failed: int) -> None:
            process.popen.send_signal(signal.SIGHUP)
            _reach(process, 'fused_ebm_model_swaps_total{result="failed"}', failed)
            np.testing.assert_array_equal(
                energies_of(asyncio.run(one(process, score_request(x[:9], binary=False)))), truth[:9])

        (path / "model.safetensors").write_bytes(b"damaged")
        swap(failed=1)
        schema = two_models[0].schema
        replace(two_models[0], schema=replace(schema, features=schema.features[::-1])).save(path)
        swap(failed=2)
        messages = [line["message"] for line in process.lines() if line["level"] == "error"]
        assert len(messages) == 2
        assert "model.safetensors" in messages[0]
        assert "other features" in messages[1]


def test_sigterm_answers_what_came_and_ends_with_0(x, truth):
    body, replies = score_request(x[:20], binary=True), []

    async def client(process: Process) -> None:
        connection = await Connection.open(process.port)
        while connection.is_open:
            reply = await connection.ask(body)  # ConnectionError where a reply is lost
            np.testing.assert_array_equal(energies_of(reply), truth[:20])
            replies.append(reply)

    async def slow(process: Process) -> Reply:
        connection = await Connection.open(process.port)
        connection.send(body[:-1000])
        await asyncio.sleep(1.5)
        return await connection.ask(body[-1000:])

    async def stop(process: Process) -> int:
        await asyncio.sleep(1)
        process.popen.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        ready = await one(process, b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ready.header("connection") == "close"
        return ready.status

    async def all_of_them(process: Process) -> tuple[int, Reply]:
        done = await asyncio.gather(stop(process), slow(process), *(client(process) for _ in range(8)))
        return done[0], done[1]

    with serving(DEMO, threads=1, deadline_s=3, queue_ms=1000) as process:
        ready, late = asyncio.run(all_of_them(process))
        assert process.popen.wait(10) == 0
        assert ready == 503
        assert len(replies) > 100
        np.testing.assert_array_equal(energies_of(late), truth[:20])
        assert [line for line in process.lines() if line["level"] == "error"] == []


def test_the_cache_gives_the_same_answers_and_counts(x, truth):
    async def twice(process: Process) -> None:
        for n in (50, 100, 100):
            reply = await one(process, score_request(x[:n], binary=True))
            np.testing.assert_array_equal(energies_of(reply), truth[:n])

    bad = x[:2].copy()
    bad[1, 40] = np.inf
    with serving(DEMO, threads=1, cache_url="memory://") as process:
        asyncio.run(twice(process))
        assert process.metric('fused_ebm_cache_total{result="miss"}') == 100
        assert process.metric('fused_ebm_cache_total{result="hit"}') == 150
        for _ in range(2):
            reply = asyncio.run(one(process, score_request(bad, binary=True)))
            assert (reply.status, b"feature 40 (MET) is inf" in reply.body) == (422, True)
            assert b"event 1" in reply.body


def test_without_its_redis_the_service_answers_and_says_that_it_is_degraded(x, truth):
    pytest.importorskip("redis")
    with serving(DEMO, threads=1, cache_url="redis://127.0.0.1:1/0") as process:
        for _ in range(3):
            reply = asyncio.run(one(process, score_request(x[:9], binary=True)))
            np.testing.assert_array_equal(energies_of(reply), truth[:9])
        ready = asyncio.run(one(process, b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        assert ready.status == 200
        assert json.loads(ready.body)["status"] == "degraded"
        assert "Redis" in json.loads(ready.body)["parts"]["cache"]
