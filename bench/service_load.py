"""Requests to a service from processes of their own, at a given rate or as fast as it answers."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from bench.serving import Connection


@dataclass(frozen=True)
class Load:
    """What came of a load: seconds (n,) from sending to the reply, and status (n,), in order of the replies.

    `missed` requests were due when no connection was free, and were not sent.
    """

    seconds: np.ndarray
    status: np.ndarray
    took: float
    missed: int = 0

    def ms(self, q: float, status: int = 200) -> float | None:
        """A quantile of the times of one status; None where it has too few."""
        seconds = self.seconds[self.status == status]
        return float(np.quantile(seconds, q)) * 1e3 if len(seconds) * (1 - q) >= 1 else None

    def count(self, status: int) -> int:
        return int((self.status == status).sum())


def run(port: int, body: bytes, seconds: float, connections: int, rate: float | None = None,
        processes: int = 1, started: Callable[[], None] = lambda: None) -> Load:
    """Send a request again and again, from processes that share the connections and the rate (per second).

    With a rate requests are sent when they are due, whatever has been answered; without, each connection sends its
    next one when it has its answer. `started` is called when the first is about to be sent. ConnectionError where a
    reply is lost.
    """
    share = max(1, connections // processes)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(time.sleep, [0.2] * processes))  # all are there before the first one starts
        started()
        futures = [pool.submit(_run, port, body, seconds, share, rate and rate / processes) for _ in range(processes)]
        loads = [f.result() for f in futures]
    return Load(np.concatenate([load.seconds for load in loads]), np.concatenate([load.status for load in loads]),
                max(load.took for load in loads), sum(load.missed for load in loads))


def _run(port: int, body: bytes, seconds: float, connections: int, rate: float | None) -> Load:
    import uvloop

    return uvloop.run(_send(port, body, seconds, connections, rate))


async def _send(port: int, body: bytes, seconds: float, connections: int, rate: float | None) -> Load:
    free = deque([await Connection.open(port) for _ in range(connections)])
    times, status = [], []

    async def ask(connection: Connection) -> None:
        start = time.perf_counter()
        reply = await connection.ask(body)
        times.append(time.perf_counter() - start)
        status.append(reply.status)

    start = time.perf_counter()
    if rate is None:
        await _closed(free, ask, start + seconds)
        missed = 0
    else:
        missed = await _open(free, ask, start, rate, round(rate * seconds))
    took = time.perf_counter() - start
    for connection in free:
        connection.close()
    return Load(np.array(times), np.array(status), took, missed)


async def _closed(free: deque, ask: Callable, end: float) -> None:
    async def client(connection: Connection) -> None:
        while time.perf_counter() < end:
            await ask(connection)

    await asyncio.gather(*map(client, free))


async def _open(free: deque, ask: Callable, start: float, rate: float, n: int) -> int:
    async def one(connection: Connection) -> None:
        await ask(connection)
        free.append(connection)

    missed = 0
    async with asyncio.TaskGroup() as group:
        for i in range(n):
            if (early := start + i / rate - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            elif i % 16 == 0:
                await asyncio.sleep(0)  # late: the replies come first
            if free:
                group.create_task(one(free.popleft()))
            else:
                missed += 1
    return missed
