"""What every request passes, whatever it asks for: id, key, size, headers, logs and counts."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from serve.admission import QUEUED
from serve.errors import Busy, Refused
from serve.metrics import Metrics
from serve.security import DOCS_POLICY, HEADERS, POLICY, check_key
from serve.service import Service
from serve.settings import Settings

log = logging.getLogger("fused_ebm.serve")

OPEN = ("/health/live", "/health/ready")  # without a key
_REQUEST_ID = re.compile(rb"[\w.-]{1,64}")


def refusal(reason: Refused, metrics: Metrics) -> JSONResponse:
    """The answer to a refused request; 429 is counted."""
    if isinstance(reason, Busy):
        metrics.refuse(reason.reason)
    return JSONResponse({"detail": str(reason)}, reason.status, reason.headers)


def check(settings: Settings, headers: dict[bytes, bytes], is_open: bool = False) -> None:
    """Raises Refused (401, 411, 413, 415, 421) where the head of a request says that it will not be answered."""
    if not is_open:
        check_key(headers, settings.api_keys)
    if b"transfer-encoding" in headers:
        raise Refused(411, "send Content-Length, not Transfer-Encoding")
    if int(headers.get(b"content-length", 0)) > settings.max_body_bytes:
        raise Refused(413, f"the body may have {settings.max_body_bytes} bytes at most")
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise Refused(415, "the body may not be compressed")


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Callable, service: Service, paths: set[str]):
        """`paths` are those that logs and metrics name; a path with parameters is named by its route."""
        self.app, self.service, self.metrics, self.paths = app, service, service.metrics, paths

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, error = time.perf_counter(), 0, None
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8).encode()
        is_docs = scope["path"].startswith(("/docs", "/static-offline-docs"))
        extra = [*HEADERS, DOCS_POLICY if is_docs else POLICY, (b"x-request-id", request_id)]
        if self.service.draining:
            extra.append((b"connection", b"close"))

        async def answer(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._leave(scope)  # a client that does not read makes nobody wait
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            try:
                check(self.service.settings, headers, is_open=scope["path"] in OPEN)
                if scope["path"] in QUEUED and scope["method"] == "POST" and not scope.get("takes"):
                    scope["takes"] = self.service.queue.enter(headers)
                    if scope["takes"] is None:
                        raise Busy("queue", "too many requests wait: try again later")
                await self.app(scope, receive, answer)
            except Refused as e:
                await refusal(e, self.metrics)(scope, receive, answer)
        except ClientDisconnect:
            status = 499  # for the log: nobody reads it
        except Exception as e:
            error = e
            if not status:
                failed = Refused(500, "the service failed: its log says why, under the id of this request")
                await refusal(failed, self.metrics)(scope, receive, answer)
        finally:
            self._leave(scope)
            self._record(scope, status, time.perf_counter() - started, request_id, error)

    def _leave(self, scope: dict[str, Any]) -> None:
        if takes := scope.pop("takes", None):
            self.service.queue.leave(takes)

    def _record(self, scope: dict[str, Any], status: int, seconds: float, request_id: bytes,
                error: Exception | None) -> None:
        route = scope.get("route")
        path = getattr(route, "path", scope["path"])
        path = path if path in self.paths else "other"
        self.metrics.answered(path, status, seconds)
        level = logging.ERROR if error else logging.DEBUG if status < 400 or status == 429 else logging.INFO
        if log.isEnabledFor(level):
            client = scope.get("client")
            log.log(level, "request", exc_info=error, extra={"request": {
                "id": request_id.decode(), "client": client[0] if client else None, "method": scope["method"],
                "path": path, "status": status, "ms": round(seconds * 1e3, 3)}})
