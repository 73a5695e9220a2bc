"""What is remembered, in SQLite and PostgreSQL."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import sqlalchemy as sa
from serve_case import model

from bench import servers
from serve.database import Database, jobs, models


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'database.sqlite'}"
    return servers.new_database(request.getfixturevalue("postgresql")[1])


@pytest.fixture
def database(url):
    database = Database(url)
    database.create_tables()
    return database


def add(database, job_id="a" * 32, bundle=None):
    with database.engine.begin() as c:
        database.add_job(c, job_id, database.add_model(c, bundle or model()), "s3://bucket/x.root?era=2022", "12:34")


def test_a_model_comes_back_as_it_was(database):
    other = replace(model(), threshold=replace(model().threshold, energy=1.5))
    add(database)
    add(database, "b" * 32, other)
    add(database, "c" * 32)
    for job_id, given in (("a" * 32, model()), ("b" * 32, other), ("c" * 32, model())):
        back = database.model_of(job_id)
        assert (back.digest, back.threshold, back.provenance) == (given.digest, given.threshold, given.provenance)
        for name, tensor in given.tensors.items():
            np.testing.assert_array_equal(back.tensors[name], tensor)
    with database.engine.connect() as c:  # once each, though their digest, which leaves the threshold out, is the same
        assert c.execute(sa.select(sa.func.count()).select_from(models)).scalar() == 2


def test_a_job_and_its_scored_file(database):
    assert database.job("nothing") is None
    add(database)
    job = database.job("a" * 32)
    assert (job.events_file, job.stamp, job.events, job.events_in_file, job.results_file) == (
        "s3://bucket/x.root?era=2022", "12:34", 0, None, None)
    database.progress("a" * 32, 2**40, 2**41)
    for _ in range(2):  # again after a crash
        database.add_scored_file("a" * 32, "results/a.parquet", model().digest, 2**41, None)
    job = database.job("a" * 32)
    assert (job.events, job.events_in_file, job.results_file) == (2**40, 2**41, "results/a.parquet")
    assert abs(job.created.replace(tzinfo=None).timestamp() - time.time()) < 86_400


def test_a_job_needs_its_model_and_a_failed_transaction_leaves_nothing(database):
    with pytest.raises(sa.exc.IntegrityError), database.engine.begin() as c:
        database.add_job(c, "a" * 32, "no such model", "x", "")
    with pytest.raises(sa.exc.IntegrityError), database.engine.begin() as c:
        database.add_job(c, "a" * 32, database.add_model(c, model()), "x", None)
    with database.engine.connect() as c:
        assert [c.execute(sa.select(t)).all() for t in (jobs, models)] == [[], []]


def test_processes_that_start_at_once_share_the_tables(url):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Database(url).create_tables(), range(4)))
    add(Database(url))
    assert Database(url).job("a" * 32).events == 0


def test_a_database_that_is_gone_says_so_at_once_and_comes_back(postgresql):
    server, url = postgresql
    database = Database(url)
    assert database.why_not() is None
    server.kill()
    started = time.monotonic()
    assert database.why_not() == "the database cannot be reached (OperationalError)"
    assert time.monotonic() - started < 2.5
    server.start()
    assert database.why_not() is None
    assert "cannot be reached" in Database("sqlite:////nowhere/at/all.sqlite").why_not()


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite://", "sqlite:///:memory:", "mysql://user:secret@host/name"])
def test_other_addresses_are_refused_without_repeating_them(url):
    with pytest.raises(ValueError, match=r"^database_url: expected sqlite:///FILE or postgresql://USER@HOST/NAME$"):
        Database(url)
