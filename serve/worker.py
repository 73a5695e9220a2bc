"""The process that runs batch jobs, beside the service, whose requests want neither its memory nor Python's lock.

dbos keeps the queue. Every part of a job is a step: there a cancelled job ends. A job whose process died goes on when a
worker of the same name (host and port of the service) starts. Where the database goes away the worker ends, and the
service starts another. The service writes its settings to `python -m serve.worker` and keeps that input open: the
worker ends with it. It can be killed at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer
from dbos import error as dbos_error

from ebm.events import DataError
from serve import logs
from serve.batch import SCORES, alone, count, score_parts, scorer_for
from serve.database import Database
from serve.settings import Settings
from serve.storage import Storage

QUEUE, WORKFLOW = "score", "score_file"
FORMAT = "1"  # of a job: workers of one format go on with each other's jobs
GOING_ON = ["ENQUEUED", "PENDING"]
POLL_S, SWEEP_S = 0.5, 5.0
TRY_AGAIN = {"retries_allowed": True, "max_attempts": 6, "should_retry": lambda error: isinstance(error, OSError)}

log = logging.getLogger("fused_ebm.serve")


def client_of(database: Database) -> DBOSClient:
    """The queue, seen from outside; where the database cannot be reached its methods raise, and do not wait."""
    return DBOSClient(system_database_engine=database.engine, serializer=DBOSPortableJSONSerializer(), lazy=True,
                      retry_connection_errors=False)


def name_of(settings: Settings) -> str:
    """The name under which dbos knows a worker: one that starts goes on with the jobs of the last that had it."""
    return f"{socket.gethostname()}:{settings.port}"


def work(settings: Settings) -> None:
    """Take jobs from the queue, in threads, for ever."""
    database, storage = Database(settings.database_url), Storage(settings)
    database.create_tables()

    @DBOS.workflow(name=WORKFLOW)
    def score_file(job_id: str, chunk: int) -> None:
        folder = storage.work(job_id)
        with alone(folder):
            try:
                job = _or_end(database.job, job_id)
                if job.results_file is None:
                    _score(job, chunk, settings, database, storage)
                shutil.rmtree(folder)
            except (Exception, dbos_error.DBOSWorkflowCancelledError) as e:
                if not isinstance(e, DataError | dbos_error.DBOSWorkflowCancelledError):
                    log.exception("job %s failed", job_id)
                _remove(job_id, database, storage)
                raise

    DBOS(config={
        "name": "fused-ebm", "system_database_engine": database.engine, "serializer": DBOSPortableJSONSerializer(),
        "application_version": FORMAT, "executor_id": name_of(settings), "log_level": "WARNING",
    })  # fmt: skip
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=settings.max_jobs, polling_interval_sec=POLL_S)
    client = client_of(database)
    while True:
        _sweep(client, database, storage)
        time.sleep(SWEEP_S)


def _sweep(client: DBOSClient, database: Database, storage: Storage) -> None:
    """Remove what is left of jobs that are over: cancelled while no worker ran, or while dbos ended their last step."""
    for job_id in storage.unfinished():
        if _or_end(database.job, job_id) is None:  # another service's
            continue
        going_on = _or_end(lambda job_id=job_id: client.list_workflows(workflow_ids=[job_id], status=GOING_ON))
        if not going_on:
            # One that still writes ends by itself; what cannot be removed now can be later.
            with contextlib.suppress(RuntimeError, OSError), alone(storage.work(job_id)):
                _remove(job_id, database, storage)


def _score(job: sa.Row, chunk: int, s: Settings, database: Database, storage: Storage) -> None:
    job_id, folder = job.job_id, storage.work(job.job_id)
    model = _or_end(database.model_of, job_id)
    found = storage.find(job.events_file)
    if found.stamp != job.stamp:
        raise DataError(f"{job.events_file}: the file changed after the job was submitted")
    source = storage.fetch(found, folder)  # no step of dbos: the next worker may have another disk
    try:
        total = count(source)

        def remember(events: int) -> None:
            DBOS.run_step({"name": "part"}, _or_end, database.progress, job_id, events, total)

        summary = score_parts(source, folder, scorer_for(model, s.backend, s.threads), chunk, remember)
    except DataError as e:  # in the words of the caller, who knows no other name of the file
        raise DataError(str(e).replace(source.partition("?")[0], job.events_file.partition("?")[0])) from None

    def publish() -> None:
        name = storage.publish(folder / SCORES, job_id)
        _or_end(database.add_scored_file, job_id, name, model.digest, summary.events, summary.flagged)

    DBOS.run_step({"name": "publish", **TRY_AGAIN}, publish)


def _remove(job_id: str, database: Database, storage: Storage) -> None:
    """Remove what a job that nobody will go on with has left."""
    if _or_end(database.job, job_id).results_file is None:
        storage.discard(job_id)
    shutil.rmtree(storage.work(job_id), ignore_errors=True)


def _or_end(f: Callable, *args: object) -> object:
    """f(*args); where the database is gone, an end of the process that loses nothing rather than a failed job."""
    try:
        return f(*args)
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as e:
        log.error("the worker ends: the database cannot be used (%s)", type(e).__name__)
        os._exit(1)


def main() -> None:
    settings = Settings.model_validate_json(sys.stdin.buffer.readline())
    logs.start(settings.log_level)
    with contextlib.suppress(OSError):
        os.nice(10)  # requests come first

    def end_with_the_service() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would be in the way of an orderly end
            pass
        os._exit(0)

    threading.Thread(target=end_with_the_service, daemon=True).start()
    address = hashlib.sha256(f"{name_of(settings)} {settings.database_url}".encode()).hexdigest()
    with socket.socket(socket.AF_UNIX) as held:  # an abstract address, which goes with the process
        try:
            held.bind(f"\0fused-ebm {address}")
        except OSError:
            sys.exit(f"another worker of {name_of(settings)} runs")  # whose jobs this one would take
        work(settings)


if __name__ == "__main__":
    main()
