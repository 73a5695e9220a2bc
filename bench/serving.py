"""The service in a process of its own, and a client that costs little: for measuring it, and for its tests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

import numpy as np

from bench.machine import ROOT

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Process:
    """A service that is ready; `log` is the file of its log."""

    popen: subprocess.Popen
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def lines(self) -> list[dict]:
        """What was logged until now."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def metric(self, name: str) -> float:
        """A metric with its labels, or the sum over all labels; 0 where it is not there."""
        text = urlopen(f"{self.url}/metrics", timeout=10).read().decode()
        return sum(float(v) for v in re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.M))

    def ready(self) -> str:
        """"ready" or "degraded"."""
        return json.load(urlopen(f"{self.url}/health/ready", timeout=10))["status"]

    def rss_mb(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def serving(model: Path | str, **settings: object) -> Iterator[Process]:
    """`python -m serve` on a free port until the block ends. RuntimeError where it is not ready within a minute."""
    with TemporaryDirectory() as folder:
        log = Path(folder, "log")
        environ = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_EBM_") or k == "FUSED_EBM_ISA"}
        for name, value in settings.items():
            environ[f"FUSED_EBM_{name.upper()}"] = json.dumps(value) if isinstance(value, list | tuple) else str(value)
        with open(log, "wb") as f:
            popen = subprocess.Popen([sys.executable, "-m", "serve", str(model), "--port", "0"], stderr=f, cwd=ROOT,
                                     stdin=subprocess.DEVNULL, env=environ)
        try:
            yield Process(popen, _port(popen, log), log)
        finally:
            if popen.poll() is None:
                popen.send_signal(signal.SIGTERM)
                popen.send_signal(signal.SIGINT)  # the second one: at once
            try:
                popen.wait(20)
            finally:
                popen.kill()


def _port(popen: subprocess.Popen, log: Path) -> int:
    end = time.monotonic() + 60
    while time.monotonic() < end and popen.poll() is None:
        if found := re.search(r"running on https?://[^\s\"]*:(\d+)", log.read_text()):
            return int(found[1])
        time.sleep(0.02)
    raise RuntimeError(f"the service did not start: {log.read_text()[-2000:]}")


def request(path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """The bytes of a POST."""
    headers = f"Host: {HOST}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return f"POST {path} HTTP/1.1\r\n{headers}\r\n".encode() + body


def score_request(x: np.ndarray, binary: bool) -> bytes:
    """A request to score events (n, D)."""
    if binary:
        return request("/api/v1/score", x.astype("<f4").tobytes(), "application/octet-stream")
    events = [[None if np.isnan(v) else float(v) for v in row] for row in x.astype(np.float64)]
    return request("/api/v1/score", json.dumps({"events": events}, allow_nan=False).encode())


@dataclass(frozen=True)
class Reply:
    status: int
    head: bytes
    body: bytes

    def header(self, name: str) -> str | None:
        """One of its headers."""
        found = re.search(rb"(?i)\r\n" + name.encode() + rb": *([^\r]*)\r\n", self.head)
        return found[1].decode() if found else None


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one request at a time; `ask` raises ConnectionError where it is closed."""

    def __init__(self) -> None:
        self._buffer, self._answer = bytearray(), None

    @classmethod
    async def open(cls, port: int) -> Connection:
        return (await asyncio.get_running_loop().create_connection(cls, HOST, port))[1]

    @property
    def is_open(self) -> bool:
        return not self._transport.is_closing()

    async def ask(self, request: bytes) -> Reply:
        """Send a request, wait for the reply."""
        if not self.is_open:
            raise ConnectionError("closed before the request")
        self._answer = asyncio.get_running_loop().create_future()
        self.send(request)
        return await self._answer

    def send(self, part: bytes) -> None:
        """Send a part of a request, and wait for nothing."""
        self._transport.write(part)

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed before the reply"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, body = self._buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        head += b"\r\n"
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)\r\n", head)
        if len(body) >= int(length[1]):
            self._buffer = bytearray()
            if b"\r\nconnection: close\r\n" in head:
                self._transport.close()
            if not self._answer.done():  # nobody waits any more
                self._answer.set_result(Reply(int(head[9:12]), bytes(head), bytes(body)))
