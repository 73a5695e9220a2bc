"""uvicorn's HTTP/1.1 protocol with the limits that it lacks, and refusals under load that cost little."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.security import HEADERS
from serve.service import Service

MAX_HEAD = 64 * 2**10

_BODY = b'{"detail":"too many requests wait: try again later"}'
BUSY = b"".join([
    b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: 1\r\n",
    *(b"%s: %s\r\n" % header for header in HEADERS), b"content-length: %d\r\n\r\n" % len(_BODY), _BODY,
])  # fmt: skip


class _Refused:
    """Stands for a request that was refused: its body is thrown away."""

    response_complete = True
    message_event = asyncio.Event()


class _Whole:
    """A transport that sends a head together with the body that follows at once.

    A client that is woken by the head alone may be given the processor before the body is sent, which on a busy machine
    made up half of the 99th percentile.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport, self._loop, self._head = transport, loop, b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if not self._head and data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100 "):
            self._head = data
            self._loop.call_soon(self._send)
        else:
            self._transport.write(self._head + data)
            self._head = b""

    def close(self) -> None:
        self._send()
        self._transport.close()

    def _send(self) -> None:
        if self._head:  # there is no body, or it takes its time
            self.write(b"")


class Protocol(HttpToolsProtocol):
    """Limits the connections, and the size and the time of all that precedes a body.

    Where as many requests are being answered as `queue_requests` says, one more gets 429 from here, before anything is
    made of it, so that those admitted are answered in time whatever the load.
    """

    def __init__(self, service: Service, **options):
        super().__init__(**options)
        self.service, self.limits = service, service.settings
        self._head: int | None = 0  # bytes since the last body; None within one
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_head()
        if len(self.connections) > self.limits.max_connections:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            self._head += len(data)
        super().data_received(data)
        if self._head is not None and self._head > MAX_HEAD:
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._head = None
        self._patience.cancel()
        in_order = self.cycle is None or self.cycle.response_complete
        if not in_order or len(self.tasks) < self.limits.queue_requests or not self.url.startswith(b"/api/"):
            super().on_headers_complete()
            return
        self.service.metrics.refuse("requests")
        self.cycle = _Refused
        self.transport.write(BUSY)
        self._expect_head()
        if self.expect_100_continue or not self.parser.should_keep_alive():
            self.transport.close()

    def _start_asgi_task(self, cycle, app) -> None:
        cycle.transport = _Whole(self.transport, self.loop)
        super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        self._head = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        another = bool(self.pipeline)
        super().on_response_complete()
        if not another:
            self._expect_head()

    def _expect_head(self) -> None:
        """What remains of a refused body, and the head of the next request, may take `keep_alive_s`."""
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self.loop.call_later(self.limits.keep_alive_s, self.transport.close)
