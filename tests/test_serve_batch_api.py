"""Batch jobs over real sockets, with the worker that the service starts, and starts again."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import httpx
import pytest
from serve_case import CHUNK, MODEL, model, uninterrupted, until
from serve_case import write as write_events

from bench import servers
from bench.serving import Connection, request, serving
from serve.jobs import PATH


@pytest.fixture
def roots(tmp_path):
    for name in ("data", "results"):
        (tmp_path / name).mkdir()
    return {"data_root": tmp_path / "data", "results_root": tmp_path / "results", "chunk_events": CHUNK, "threads": 1}


@contextlib.contextmanager
def service(roots, **settings):
    database = {"database_url": f"sqlite:///{roots['data_root'].parent / 'jobs.sqlite'}"}
    with serving(MODEL, **roots | database | settings) as process, \
            httpx.Client(base_url=process.url, timeout=20) as client:
        yield process, client


def submit(client, name):
    """Once the worker has made the tables."""
    return until(lambda: (a := client.post(PATH, json={"events_file": name})).status_code != 503 and a)


def finished(client, job_id):
    return until(lambda: (a := client.get(f"{PATH}/{job_id}").json())["status"] != "processing" and a)


def worker_of(process):
    """The id of the worker's process, or None."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.popen.pid and b"serve.worker" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    return None


def test_a_job_outlives_its_worker_and_the_service(roots, tmp_path):
    path = write_events(roots["data_root"] / "events.parquet")
    expected = uninterrupted(path, tmp_path / "work", 100)
    roots["chunk_events"] = 100
    with service(roots) as (process, client):
        answer = submit(client, "events.parquet")
        assert answer.status_code == 202
        job_id = answer.json()["job_id"]
        assert answer.json() == {"job_id": job_id, "status": "processing"}
        until(lambda: client.get(f"{PATH}/{job_id}").json()["events"] > 0)
        os.kill(first := worker_of(process), signal.SIGKILL)
        second = until(lambda: (pid := worker_of(process)) != first and pid)
        process.popen.kill()
    until(lambda: not Path(f"/proc/{second}").exists())  # nobody is there who would start it again
    with service(roots) as (process, client):
        until(lambda: client.get(f"{PATH}/{job_id}").status_code == 200)
        status = finished(client, job_id)
        result = Path(status.pop("results_file"))
        assert status == {"job_id": job_id, "status": "complete", "progress": 1.0, "events": 6000, "error": None}
        assert result == roots["results_root"] / f"{job_id}.parquet"
        assert result.read_bytes() == expected
        assert client.delete(f"{PATH}/{job_id}").json()["status"] == "complete"
        third = worker_of(process)
    assert not Path(f"/proc/{third}").exists()


def test_a_cancelled_job_is_cancelled(roots):
    write_events(roots["data_root"] / "events.parquet")
    with service(roots, chunk_events=10) as (_, client):
        job_id = submit(client, "events.parquet").json()["job_id"]
        answer = client.delete(f"{PATH}/{job_id}").json()
        assert (answer["status"], answer["results_file"]) == ("cancelled", None)
        assert client.get(f"{PATH}/{job_id}").json()["status"] == "cancelled"


def test_what_is_refused(roots):
    write_events(roots["data_root"] / "events.parquet")
    secret = "s3cr3t"
    with service(roots) as (_, client):
        submit(client, "events.parquet")
        for body, status in (
            ('{"events_file": "missing.parquet"}', 422), ('{"events_file": "../jobs.sqlite"}', 422),
            ('{"events_file": "s3://bucket/events.parquet"}', 422), ('{"events_file": ""}', 422),
            ('{"events_file": "\\ud800"}', 422), ('{"events_file": "a\\u0000b"}', 422), ('{"events_file": 17}', 422),
            ('{"events_file": NaN}', 422), (f'{{"events_file": ["{secret}"]}}', 422), ("{}", 422), ("", 422),
            (f'{{"events_file": "events.parquet", "{secret}": 1}}', 422), ("[" * 100_000, 422), (b"\xff", 422),
        ):
            answer = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == status, (body, answer.text)
            assert secret not in answer.text
        assert client.post(PATH, content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
        for name in ("nothing", "%00", "..%2f..", "x" * 1000):
            assert client.get(f"{PATH}/{name}").status_code == 404
            assert client.delete(f"{PATH}/{name}").status_code == 404


def test_a_body_that_does_not_come_is_given_up_at_the_deadline(roots):
    async def ask(process) -> int:
        connection = await Connection.open(process.port)
        return (await asyncio.wait_for(connection.ask(request(PATH, b"x" * 1000)[:-500]), 5)).status

    with service(roots, deadline_s=0.3) as (process, _):
        assert asyncio.run(ask(process)) == 429


def test_without_its_database_the_service_is_degraded_and_scores(roots):
    if why_not := servers.postgresql_why_not():
        pytest.skip(why_not)
    event = b"\0" * 4 * model().schema.n_features
    with servers.postgresql() as (server, url), service(roots, database_url=url) as (_, client):
        until(lambda: client.get(f"{PATH}/nothing").status_code == 404)
        assert client.get("/health/ready").json()["status"] == "ready"
        server.kill()
        assert client.post(PATH, json={"events_file": "x.parquet"}).status_code == 422
        assert client.get(f"{PATH}/nothing").status_code == 503
        ready = until(lambda: (a := client.get("/health/ready")).json()["status"] != "ready" and a)
        assert ready.status_code == 200
        assert "database" in ready.text
        answer = client.post("/api/v1/score", content=event, headers={"Content-Type": "application/octet-stream"})
        assert answer.status_code == 200
        server.start()
        until(lambda: client.get("/health/ready").json()["status"] == "ready")
        until(lambda: client.get(f"{PATH}/nothing").status_code == 404)
