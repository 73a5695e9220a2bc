"""Batch jobs over HTTP: a file of events is scored by a worker beside the service, which outlives its own crashes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager

import msgspec
from fastapi import APIRouter, Request
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from ebm.bundle import Bundle
from ebm.events import DataError
from serve.database import Database
from serve.errors import Busy, Refused
from serve.parsing import JSON, content_type
from serve.settings import Settings
from serve.storage import Storage
from serve.worker import FORMAT, QUEUE, WORKFLOW, client_of

PATH = "/api/v1/score/batch"
STATUS = {"ENQUEUED": "processing", "PENDING": "processing", "SUCCESS": "complete", "CANCELLED": "cancelled"}
BACK_AFTER_S = 1.0  # before a worker that ended is started again

log = logging.getLogger("fused_ebm.serve")


class BatchRequest(msgspec.Struct, forbid_unknown_fields=True):
    events_file: str


class Jobs:
    """Submit, look at and cancel jobs. Methods block; they raise Refused (404, 422, 429, and 503 without database)."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.database, self.storage = settings, Database(settings.database_url), Storage(settings)
        self.client = client_of(self.database)

    def submit(self, events_file: str, model: Bundle) -> str:
        """Put a file into the queue, to be scored with this model whatever the service changes to; the job's id."""
        try:
            source = self.storage.find(events_file)
        except DataError as e:
            raise Refused(422, str(e)) from None
        job_id, limit = uuid.uuid4().hex, self.settings.max_waiting_jobs
        with _database_or_503():
            waiting = self.client.list_queued_workflows(queue_name=QUEUE, status="ENQUEUED", limit=limit,
                                                        load_input=False)
            if len(waiting) >= limit:
                raise Busy("jobs", "too many jobs wait: try again later")
            with self.database.engine.begin() as c:  # the job and its place in the queue, or neither
                self.database.add_job(c, job_id, self.database.add_model(c, model), events_file, source.stamp)
                self.client.enqueue_in_transaction(
                    c, {"workflow_name": WORKFLOW, "queue_name": QUEUE, "workflow_id": job_id, "app_version": FORMAT},
                    job_id, self.settings.chunk_events)
        return job_id

    def status(self, job_id: str) -> dict[str, object]:
        """status, progress (a fraction, null where the file does not say how many events it has), events (scored and
        on disk), results_file once complete, error once failed."""
        with _database_or_503():
            job = self.database.job(job_id)
            if job is None:
                raise Refused(404, "there is no such job")
            (flow,) = self.client.list_workflows(workflow_ids=[job_id], load_input=False)
        status = "complete" if job.results_file else STATUS.get(flow.status, "failed")
        progress = 1.0 if job.results_file else job.events and job.events_in_file and job.events / job.events_in_file
        return {"job_id": job_id, "status": status, "progress": progress, "events": job.events,
                "results_file": job.results_file, "error": _sentence(flow) if status == "failed" else None}

    def cancel(self, job_id: str) -> dict[str, object]:
        """End a job after the part that it is at; one that is over stays what it is. Its status."""
        if self.status(job_id)["status"] == "processing":
            with _database_or_503():
                self.client.cancel_workflow(job_id)
        return self.status(job_id)


def router(settings: Settings, model: Callable[[], Bundle],
           in_time: Callable[[], AbstractAsyncContextManager]) -> APIRouter:
    """POST PATH, GET and DELETE PATH/{job_id}, and the worker, which runs as long as the service does.

    `model` gives the model that is served when a job is submitted, which it will be scored with; `in_time` ends what
    is inside at the deadline.
    """
    jobs = Jobs(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_app: object) -> AsyncIterator[None]:
        task = asyncio.create_task(_keep_a_worker(settings))
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    routes = APIRouter(lifespan=lifespan, tags=["batch"])
    schema = {"type": "object", "required": ["events_file"], "additionalProperties": False,
              "properties": {"events_file": {"type": "string", "examples": ["s3://bucket/events.parquet"]}}}

    @routes.post(PATH, status_code=202, openapi_extra={"requestBody": {"required": True, "content": {
        JSON: {"schema": schema}}}})
    async def submit(request: Request) -> dict:
        """Score a file: Parquet, ROOT, HDF5, CSV or NumPy; options as in nano.root?era=UL2018 may follow its name."""
        content_type(dict(request.scope["headers"]), JSON)
        try:
            async with in_time():
                body = await request.body()
            events_file = msgspec.json.decode(body, type=BatchRequest).events_file
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise Refused(422, 'expected {"events_file": "..."} and nothing else') from None
        job_id = await run_in_threadpool(jobs.submit, events_file, model())
        return {"job_id": job_id, "status": "processing"}

    @routes.get(PATH + "/{job_id}")
    async def status(job_id: str) -> dict:
        """status is "processing", "complete", "failed" or "cancelled"."""
        return await run_in_threadpool(jobs.status, job_id)

    @routes.delete(PATH + "/{job_id}")
    async def cancel(job_id: str) -> dict:
        """Cancel a job; the answer is that of GET."""
        return await run_in_threadpool(jobs.cancel, job_id)

    return routes


async def _keep_a_worker(settings: Settings) -> None:
    """Start the worker, and another whenever it ends. A session of its own: Ctrl-C is for the service."""
    while True:
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "serve.worker", stdin=asyncio.subprocess.PIPE, start_new_session=True)
        try:
            worker.stdin.write(settings.model_dump_json().encode() + b"\n")
            log.error("the batch worker ended (%s) and is started again", await worker.wait())
        finally:
            if worker.returncode is None:
                worker.kill()
                await worker.wait()
        await asyncio.sleep(BACK_AFTER_S)


@contextlib.contextmanager
def _database_or_503() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as e:
        log.warning("batch jobs: the database cannot be used (%s)", type(e).__name__)
        raise Refused(503, "the database of the batch jobs cannot be reached: try again later") from None


def _sentence(flow) -> str:
    if flow.status == "MAX_RECOVERY_ATTEMPTS_EXCEEDED":
        return "the worker ended again and again while it ran this job"
    if getattr(flow.error, "name", None) == DataError.__name__:
        return str(flow.error)
    return "the service failed: its log says why"  # in words that are not for callers: addresses, paths
