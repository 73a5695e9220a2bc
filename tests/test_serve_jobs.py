"""Batch jobs on SQLite and PostgreSQL: whatever is killed, they end as they would without; cancel, and errors."""

import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from serve_case import CHUNK, FORMATS, finished, jobs_at, left, model, running, submit, uninterrupted, until, with_met
from serve_case import write as write_events

from bench import servers
from serve.database import scored_files
from serve.errors import Refused


@pytest.fixture(params=["sqlite", "postgresql"])
def jobs(request, tmp_path):
    """Jobs over a new database, before any worker."""
    if request.param == "sqlite":
        return jobs_at(tmp_path, f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    return jobs_at(tmp_path, servers.new_database(request.getfixturevalue("postgresql")[1]))


@pytest.fixture
def on_sqlite(tmp_path):
    return jobs_at(tmp_path, f"sqlite:///{tmp_path / 'jobs.sqlite'}")


def survive(jobs, tmp_path, kills):
    """Jobs of every format while their worker is killed; each result must be what it is without."""
    rng = random.Random(kills)
    expected = {}
    for name in FORMATS:
        path = write_events(jobs.settings.data_root / name)
        expected[name] = uninterrupted(path, tmp_path / f"work-{name}", CHUNK)
    names, killed, interrupted = {}, 0, 0
    while killed < kills:
        with running(jobs) as worker:
            while len([j for j in names if jobs.status(j)["status"] == "processing"]) < 3:
                name = rng.choice(FORMATS)
                names[submit(jobs, name)] = name
            before, far = len(left(jobs)), rng.randint(0, 20)  # files that come, and go when a job is done
            until(lambda before=before, far=far: abs(len(left(jobs)) - before) >= far)
            time.sleep(rng.random() * 0.02)
            interrupted += any(".jobs/" in name for name in left(jobs))
            worker.kill()
        killed += 1
    assert interrupted >= kills / 2
    with running(jobs):
        for job_id, name in names.items():
            assert finished(jobs, job_id) == {
                "job_id": job_id, "status": "complete", "progress": 1.0, "events": 6000, "error": None,
                "results_file": str(jobs.settings.results_root / f"{job_id}.parquet")}
            assert Path(jobs.settings.results_root, f"{job_id}.parquet").read_bytes() == expected[name]
        until(lambda: left(jobs) == sorted(f"{job_id}.parquet" for job_id in names))
    with jobs.database.engine.connect() as c:
        rows = c.execute(sa.select(scored_files)).all()
    assert {(r.job_id, r.events, r.model_digest) for r in rows} == {(j, 6000, model().digest) for j in names}
    assert len(rows) == len(names)


def test_jobs_whose_worker_is_killed(jobs, tmp_path):
    survive(jobs, tmp_path, kills=3)


@pytest.mark.full
def test_jobs_whose_worker_is_killed_fifty_times(jobs, tmp_path):
    survive(jobs, tmp_path, kills=50)


def test_a_cancelled_job_ends_and_leaves_nothing(on_sqlite):
    jobs = on_sqlite
    write_events(jobs.settings.data_root / "events.parquet")
    with running(jobs):
        slow = replace_chunk(jobs, 10)
        job_id = submit(slow, "events.parquet")
        until(lambda: slow.status(job_id)["events"] > 0)
        status = slow.cancel(job_id)
        assert (status["status"], status["results_file"]) == ("cancelled", None)
        assert 0 < status["events"] < 6000
        until(lambda: left(jobs) == [])
        done = submit(jobs, "events.parquet")
        finished(jobs, done)
        assert jobs.cancel(done)["status"] == "complete"  # too late
        until(lambda: left(jobs) == [f"{done}.parquet"])
    with running(jobs):
        waiting = submit(jobs, "events.parquet")
        other = submit(slow, "events.parquet")
        until(lambda: any(other in name for name in left(jobs)))
    assert jobs.cancel(other)["status"] == "cancelled"  # while no worker runs
    with running(jobs):
        finished(jobs, waiting)
        until(lambda: left(jobs) == sorted([f"{done}.parquet", f"{waiting}.parquet"]))
    assert jobs.status(other)["status"] == jobs.status(job_id)["status"] == "cancelled"


def test_failed_jobs_say_why_in_the_words_of_the_caller_and_leave_nothing(on_sqlite):
    jobs, data = on_sqlite, on_sqlite.settings.data_root
    write_events(data / "nan.parquet", **with_met(np.nan, 1234))
    write_events(data / "inf.h5", **with_met(np.inf, 77))
    (data / "other.csv").write_text("a,b\n1,2\n")
    (data / "damaged.root").write_bytes(b"root" + bytes(100))
    write_events(data / "late.parquet")
    with running(jobs):
        ids = {name: submit(jobs, name) for name in ("nan.parquet", "inf.h5", "other.csv", "damaged.root")}
        errors = {name: finished(jobs, job_id)["error"] for name, job_id in ids.items()}
        until(lambda: left(jobs) == [])
    assert errors["nan.parquet"].startswith("nan.parquet, entry 1234: feature")
    assert "(MET) is nan, expected a number" in errors["nan.parquet"]
    assert errors["inf.h5"] == "inf.h5, entry 77, column MET: expected a finite number (within float32), given inf"
    assert "the model is a model of hep64-v1 events (64 features" in errors["other.csv"]
    assert errors["damaged.root"].startswith("damaged.root: ")
    assert not any(str(data) in error for error in errors.values())

    job_id = submit(jobs, "late.parquet")
    os.utime(data / "late.parquet", (1, 1))
    with running(jobs):
        assert finished(jobs, job_id)["error"] == "late.parquet: the file changed after the job was submitted"
    assert {jobs.status(j)["status"] for j in ids.values()} == {"failed"}
    assert {jobs.status(j)["results_file"] for j in ids.values()} == {None}


def test_what_went_wrong_in_the_service_itself_is_for_its_log_alone(on_sqlite, capfd):
    jobs = on_sqlite
    write_events(jobs.settings.data_root / "events.parquet")
    with running(jobs):
        until(lambda: jobs.settings.results_root.exists())
        job_id = submit(jobs_at(jobs.settings.data_root.parent, jobs.settings.database_url, chunk_events=10),
                        "events.parquet")
        until(lambda: jobs.status(job_id)["events"] > 0)
        folder = jobs.storage.work(job_id)
        while folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
        status = finished(jobs, job_id)
    assert (status["status"], status["error"]) == ("failed", "the service failed: its log says why")
    assert str(folder) in capfd.readouterr().err


def test_a_job_keeps_the_model_that_it_was_submitted_with(on_sqlite):
    jobs = on_sqlite
    path = write_events(jobs.settings.data_root / "events.parquet")
    other = replace(model(), default_level=0, threshold=replace(model().threshold, energy=1.0, level=0))
    with running(jobs):
        first = submit(jobs, path.name)
        second = jobs.submit(path.name, other)
        tables = [pq.read_table(finished(jobs, job_id)["results_file"]) for job_id in (first, second)]
    assert [t.schema.metadata[b"model_digest"].decode() for t in tables] == [model().digest, other.digest]
    assert [t.schema.metadata[b"threshold"] for t in tables][1] == b"1.0"
    assert not np.array_equal(tables[0]["energy"], tables[1]["energy"])


def test_jobs_wait_for_a_database_that_is_gone(tmp_path, postgresql):
    server, url = postgresql
    jobs = jobs_at(tmp_path, servers.new_database(url))
    path = write_events(jobs.settings.data_root / "events.parquet")
    expected = uninterrupted(path, tmp_path / "work", 40)
    slow = replace_chunk(jobs, 40)
    with running(slow) as worker:
        job_id = submit(slow, path.name)
        until(lambda: jobs.status(job_id)["events"] > 0)
        server.kill()
        assert jobs.database.why_not() == "the database cannot be reached (OperationalError)"
        with pytest.raises(Refused, match="try again later") as refused:
            jobs.status(job_id)
        assert refused.value.status == 503
        time.sleep(0.5)
        server.start()  # the worker waits in dbos, or has ended, as it does where a statement of ours met the end
        until(lambda: worker.poll() is not None or jobs.status(job_id)["status"] != "processing")
    with running(slow):
        assert Path(finished(jobs, job_id)["results_file"]).read_bytes() == expected


def test_as_many_jobs_wait_as_may_wait(on_sqlite):
    jobs = on_sqlite
    write_events(jobs.settings.data_root / "events.parquet")
    with running(jobs):
        finished(jobs, submit(jobs, "events.parquet"))
    few = jobs_at(jobs.settings.data_root.parent, jobs.settings.database_url, max_waiting_jobs=2)
    few.submit("events.parquet", model())
    few.submit("events.parquet", model())
    with pytest.raises(Refused, match="too many jobs wait") as refused:
        few.submit("events.parquet", model())
    assert refused.value.status == 429


def replace_chunk(jobs, chunk):
    return jobs_at(jobs.settings.data_root.parent, jobs.settings.database_url, chunk_events=chunk)


def test_a_second_worker_of_the_same_name_leaves_the_jobs_alone(on_sqlite):
    jobs = replace_chunk(on_sqlite, 30)
    write_events(jobs.settings.data_root / "events.parquet")
    with running(jobs) as first:
        job_id = submit(jobs, "events.parquet")
        until(lambda: jobs.status(job_id)["events"] > 0)
        with running(jobs) as second:
            assert second.wait(30) == 1
            assert jobs.status(job_id)["status"] == "processing"
        assert finished(jobs, job_id)["status"] == "complete"
        assert first.poll() is None
