"""The HTTP interface: routes, and what OpenAPI says of them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, JSONResponse

from serve import openapi, parsing
from serve.admission import EXPLAIN, SCORE
from serve.errors import Refused
from serve.guard import Guard, refusal
from serve.service import Service
from serve.status import page

log = logging.getLogger("fused_ebm.serve")


def create_app(service: Service) -> Guard:
    """The ASGI application of a service."""
    settings, n = service.settings, len(service.served.features)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPIOffline(title="fused-ebm", version=version("fused-ebm"), redoc_url=None, redirect_slashes=False,
                         lifespan=lifespan, description=openapi.ABOUT)

    async def score(request: Request) -> Response:
        """Energies of events, and whether each is above the threshold. As application/octet-stream: little-endian
        float32, event after event, NaN for a missing value; the answer is n float32 energies, then n bytes 0 or 1."""
        headers = dict(request.scope["headers"])
        kind = parsing.content_type(headers, parsing.JSON, parsing.BINARY)
        is_binary = kind == parsing.BINARY
        async with service.in_time():
            parse = parsing.events_from_binary if is_binary else parsing.events_from_json
            x = parse(await request.body(), n, settings.max_events)
            energies, flags, served = await service.score(x)
        if is_binary:
            answer = energies.astype("<f4", copy=False).tobytes() + flags.tobytes()
        else:
            answer = msgspec.json.encode({"scores": energies.tolist(), "flags": flags.tolist()})
        return Response(answer, media_type=kind, headers={"x-model-version": served.version})

    async def explain(request: Request) -> Response:
        """Energy of one event, its change dE/du per unit of background spread of each feature (positive: raising the
        feature makes the event more anomalous; 0 for a missing value), and its norm over each object's components."""
        parsing.content_type(dict(request.scope["headers"]), parsing.JSON)
        async with service.in_time():
            x = parsing.event_from_json(await request.body(), n)
        served = service.served
        try:
            energy, by_feature, by_object = served.explain(x)
        except ValueError as e:
            raise service.not_finite(str(e)) from None
        return JSONResponse({"score": energy, "feature_attribution": by_feature, "object_attribution": by_object},
                            headers={"x-model-version": served.version})

    async def model() -> Response:
        """What is served."""
        return JSONResponse(service.served.describe())

    async def live() -> Response:
        """200 as long as the process answers."""
        return JSONResponse({"status": "live"})

    async def ready() -> Response:
        """200 with "ready", or "degraded" where a part is down that /score does without; 503 while stopping."""
        if service.draining:
            return JSONResponse({"status": "stopping", "parts": {}}, 503)
        parts = await service.parts()
        state = "ready" if all(p == "ok" for p in parts.values()) else "degraded"
        return JSONResponse({"status": state, "parts": parts})

    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def status() -> Response:
        return HTMLResponse(page(service))

    @app.exception_handler(Refused)
    async def refused(_: Request, e: Refused) -> Response:
        return refusal(e, service.metrics)

    schemas = openapi.of(n)
    app.post(SCORE, **schemas["score"])(score)
    app.post(EXPLAIN, **schemas["explain"])(explain)
    app.get("/api/v1/model", **schemas["model"])(model)
    app.get("/health/live", **schemas["live"])(live)
    app.get("/health/ready", **schemas["ready"])(ready)
    app.get("/metrics", **schemas["metrics"])(metrics)
    app.get("/", include_in_schema=False)(status)
    if settings.data_root or settings.s3_read_buckets:
        _add_jobs(app, service)
    return Guard(_shortcut(score, app), service, {*app.openapi()["paths"], "/"})


def _shortcut(score: Callable, app: Callable) -> Callable:
    """SCORE without FastAPI's layers, which take as long as all else that is done for a single event."""

    async def first(scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "http" and scope["path"] == SCORE and scope["method"] == "POST":
            await (await score(Request(scope, receive)))(scope, receive, send)
        else:
            await app(scope, receive, send)

    return first


def _add_jobs(app: FastAPI, service: Service) -> None:
    try:
        from serve.database import Database
        from serve.jobs import router
    except ImportError as e:
        log.error("no batch jobs: %s is not installed", e.name)
        return
    service.why_not["database"] = Database(service.settings.database_url).why_not
    app.include_router(router(service.settings, lambda: service.served.bundle, service.in_time))
