"""uvicorn's HTTP/1.1 protocol with the limits that it lacks, and refusals under load that cost little."""

from __future__ import annotations

import asyncio
import contextlib
import math

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.admission import QUEUED
from serve.errors import Refused
from serve.guard import check
from serve.security import HEADERS
from serve.service import Service

MAX_HEAD = 64 * 2**10

_QUEUED = {path.encode() for path in QUEUED}
_BUFFER = memoryview(bytearray(2**18))
_START = _BUFFER[: 2**12]
_BODY = b'{"detail":"too many requests wait: try again later"}'
BUSY = b"".join([
    b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: 1\r\n",
    *(b"%s: %s\r\n" % header for header in HEADERS), b"content-length: %d\r\n\r\n" % len(_BODY), _BODY,
])  # fmt: skip


class _Refused:
    """Stands for a request that was refused."""

    response_complete = True
    message_event = asyncio.Event()

    def __init__(self, keep_alive: bool):
        self.keep_alive = keep_alive


class _Whole:
    """A transport that sends a head together with the body that follows at once.

    A client that is woken by the head alone may be given the processor before the body is sent, which on a busy machine
    made up half of the 99th percentile.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport, self._loop, self._head = transport, loop, b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self.is_closing():  # uvicorn tells only the last of pipelined requests
            return
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

    A request that would wait too long behind others gets 429 from here, on the strength of its head alone, and its body
    is thrown away as it comes: so those admitted are answered in time whatever the load.
    """

    def __init__(self, service: Service, **options):
        super().__init__(**options)
        self.service, self.limits = service, service.settings
        self.head: int | None = 0  # bytes since the last body; None within one
        self._refused = 0  # bytes of a refused body that are to come
        self._until = math.inf  # when what is expected of the client must have come

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_head()
        self._watch()
        if len(self.connections) > self.limits.max_connections:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._watcher.cancel()
        super().connection_lost(exc)

    def data_received(self, data: memoryview) -> None:
        if self._refused:
            part = min(self._refused, len(data))
            self._refused -= part
            data = data[part:]
            if self._refused == 0:
                self.parser = httptools.HttpRequestParser(self)  # the other one waits for what was thrown away
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.on_message_complete()
        if not data:
            return
        if self.head is not None:
            self.head += len(data)
        super().data_received(data)
        if self.head is not None and self.head > MAX_HEAD:
            self.transport.close()

    def on_headers_complete(self) -> None:
        self.head, self._until = None, math.inf
        is_next = self.cycle is None or self.cycle.response_complete
        if not is_next or self.url not in _QUEUED or self.parser.get_method() != b"POST":
            super().on_headers_complete()  # and the guard asks the queue
        elif self.service.queue.is_full:
            self._refuse()
        else:
            super().on_headers_complete()
            with contextlib.suppress(Refused):  # the guard says so
                check(self.limits, headers := dict(self.headers))
                self.scope["takes"] = self.service.queue.enter(headers)

    def _refuse(self) -> None:
        self.service.metrics.refuse("queue")
        self.transport.write(BUSY)
        self.cycle = _Refused(self.parser.should_keep_alive())
        self._refused = int(dict(self.headers).get(b"content-length", 0))
        self._expect_head()
        if self.expect_100_continue:  # the body may come, or not
            self.transport.close()

    def _start_asgi_task(self, cycle, app) -> None:
        cycle.transport = _Whole(self.transport, self.loop)
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            self._refused = max(0, self._refused - len(body))
        else:  # all of it at once: the guard has seen how much it is
            self.cycle.body += body
            self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        self.head = 0
        if self.cycle.response_complete and not self.cycle.keep_alive:
            self.transport.close()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        another = bool(self.pipeline)
        super().on_response_complete()
        if not another:
            self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_head()  # not before the client has read what was sent

    def _expect_head(self) -> None:
        """What remains of an answer or of a refused body, and the head of the next request, may take `keep_alive_s`."""
        self._until = self.loop.time() + self.limits.keep_alive_s

    def _watch(self) -> None:
        """One timer for all requests of a connection."""
        if (left := self._until - self.loop.time()) <= 0:
            self.transport.abort()
        else:
            self._watcher = self.loop.call_later(min(left, self.limits.keep_alive_s), self._watch)


class Connection(asyncio.BufferedProtocol):
    """Reads for a `Protocol`: of a head little at a time, so that it is known what becomes of a body before that is
    read, and of a body much, into the same place, which stays in the processor's cache."""

    def __init__(self, service: Service, **options):
        self._http = http = Protocol(service, **options)
        self.connection_made, self.connection_lost = http.connection_made, http.connection_lost
        self.eof_received = http.eof_received
        self.pause_writing, self.resume_writing = http.pause_writing, http.resume_writing

    def get_buffer(self, sizehint: int) -> memoryview:
        return _BUFFER if self._http.head is None else _START

    def buffer_updated(self, nbytes: int) -> None:
        self._http.data_received(_BUFFER[:nbytes])
