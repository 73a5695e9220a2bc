"""More requests than can be answered: some get 429, which is counted, and the others their answer."""

from __future__ import annotations

import asyncio
import json
import re

import numpy as np
import pytest
from test_serve_load import DEMO, energies_of, one

from bench.serving import Connection, Process, score_request, serving
from ebm.events import load_events
from serve.model import Served


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return load_events("toy:1200").x


@pytest.fixture(scope="module")
def truth(x) -> np.ndarray:
    return Served(DEMO).energies(x)


@pytest.mark.parametrize("settings", [{"queue_ms": 0.5}, {"queue_ms": 0.01}])
def test_over_capacity_requests_get_429_that_is_counted_and_the_others_their_answer(x, truth, settings):
    body, statuses = score_request(x[:150], binary=True), []

    async def client(process: Process) -> None:
        connection = await Connection.open(process.port)
        for _ in range(50):
            reply = await connection.ask(body)
            statuses.append(reply.status)
            if reply.status == 200:
                np.testing.assert_array_equal(energies_of(reply), truth[:150])
            else:
                assert (reply.status, reply.header("retry-after")) == (429, "1")
                assert "detail" in json.loads(reply.body)
                assert reply.header("x-content-type-options") == "nosniff"

    async def clients(process: Process) -> None:
        await asyncio.gather(*(client(process) for _ in range(24)))

    with serving(DEMO, threads=1, **settings) as process:
        asyncio.run(clients(process))
        assert statuses.count(200) > 0
        assert 0 < statuses.count(429) == process.metric("fused_ebm_rejected_total")
        assert len(statuses) == 24 * 50
        assert asyncio.run(one(process, body)).status == 200


def test_one_request_of_any_size_is_admitted_when_nothing_waits(x, truth):
    with serving(DEMO, threads=1, queue_ms=0.01) as process:
        np.testing.assert_array_equal(energies_of(asyncio.run(one(process, score_request(x, binary=True)))), truth)


def test_a_refused_request_is_known_by_its_head_and_its_connection_goes_on(x, truth):
    """While a large request, whose body does not come, makes the others wait."""
    large, body = score_request(np.tile(x, (2, 1)), binary=False), score_request(x, binary=True)
    head, live = body.index(b"\r\n\r\n") + 4, b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    elsewhere = (b"POST http://localhost/api/v1/score", b"POST /api/v1/score?x=1", b"POST /%61pi/v1/score")
    closing = body.replace(b"Host:", b"Connection: close\r\nHost:", 1)

    async def refused(process: Process) -> int:
        connection, (reader, writer) = await Connection.open(process.port), await _streams(process)
        assert (await connection.ask(body[:head])).status == 429
        connection.send(body[head : head + 1000])
        await asyncio.sleep(0.05)
        assert (await connection.ask(body[head + 1000 :] + live)).status == 200
        for start in elsewhere:
            assert (await connection.ask(body.replace(b"POST /api/v1/score", start))).status == 429
        connection.send(body[:head])  # its reply, which nobody waits for
        connection.close()
        writer.write(2 * body + live + closing)
        assert re.findall(rb"HTTP/1.1 (...) ", await asyncio.wait_for(reader.read(), 5)) == [b"429", b"429", b"200",
                                                                                             b"429"]
        writer.close()
        return 1 + len(elsewhere) + 1 + 3

    async def all_of_them(process: Process) -> int:
        slow = await Connection.open(process.port)
        slow.send(large[:-1])
        await asyncio.sleep(0.2)
        count = await refused(process)
        assert process.metric("fused_ebm_queue_seconds") > 0.003
        np.testing.assert_array_equal(energies_of(await slow.ask(large[-1:])), np.tile(truth, 2))
        slow.close()
        np.testing.assert_array_equal(energies_of(await one(process, body)), truth)
        return count

    with serving(DEMO, threads=1, deadline_s=20) as process:
        assert asyncio.run(all_of_them(process)) == process.metric('fused_ebm_rejected_total{reason="queue"}')
        assert process.metric("fused_ebm_queue_seconds") == pytest.approx(0, abs=1e-9)


async def _streams(process: Process) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", process.port)
