"""Batch jobs for the tests: files of events, what comes of them when nothing goes wrong, and workers to kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import uproot

from ebm.bundle import Bundle
from ebm.events import load_events
from ebm.toy import toy
from serve.batch import SCORES, score_parts, scorer_for
from serve.errors import Refused
from serve.jobs import Jobs
from serve.settings import Settings

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "demo"
FORMATS = ("events.parquet", "events.h5", "events.root")
CHUNK = 200  # 30 parts in a file


@cache
def model() -> Bundle:
    return Bundle.load(MODEL)


@cache
def columns(n: int = 6000) -> dict[str, np.ndarray]:
    events = toy(n_background=n, n_signal=1, seed=3)
    return {name: events.x[:n, j] for j, name in enumerate(events.schema.features)} | {
        "event": np.random.default_rng(0).permutation(n) + 10**12}


def write(path: Path, **changed: np.ndarray) -> Path:
    """The events in the format that the name says."""
    c = columns() | changed
    if path.suffix == ".parquet":
        pq.write_table(pa.table(c), path)
    elif path.suffix == ".root":
        with uproot.recreate(path) as f:
            f.mktree("events", c)
    else:
        with h5py.File(path, "w") as f:
            for name, values in c.items():
                f[name] = values
    return path


def uninterrupted(path: Path, work: Path, chunk: int) -> bytes:
    """The result of a file in one go, after a look at it: every event once, in order, with its energy and flag."""
    work.mkdir(exist_ok=True)
    scorer = scorer_for(model())
    summary = score_parts(str(path), work, scorer, chunk)
    events, table = load_events(str(path)), pq.read_table(work / SCORES)
    energy = scorer.energy(events.x)
    assert table["event_id"].to_pylist() == events.event_id.tolist()
    np.testing.assert_array_equal(table["energy"].to_numpy(), energy)
    np.testing.assert_array_equal(table["flag"].to_numpy(), energy > scorer.threshold)
    assert table.schema.metadata[b"model_digest"].decode() == model().digest
    assert summary.events == len(events)
    return (work / SCORES).read_bytes()


def with_met(value: float, *rows: int) -> dict[str, np.ndarray]:
    """The column MET, which has no imputation, with a value that no event has."""
    met = columns()["MET"].copy()
    met[list(rows)] = value
    return {"MET": met}


def jobs_at(tmp_path: Path, url: str, **changed: object) -> Jobs:
    """Jobs with roots of their own, before any worker."""
    for name in ("data", "results"):
        (tmp_path / name).mkdir(exist_ok=True)
    return Jobs(Settings(**{
        "model": MODEL, "database_url": url, "data_root": tmp_path / "data", "results_root": tmp_path / "results",
        "chunk_events": CHUNK, "max_jobs": 3, "backend": "native"} | changed))


@contextmanager
def running(jobs: Jobs) -> Iterator[subprocess.Popen]:
    """A worker, started as the service starts it and killed at the end."""
    with subprocess.Popen([sys.executable, "-m", "serve.worker"], stdin=subprocess.PIPE, cwd=ROOT) as worker:
        try:
            worker.stdin.write(jobs.settings.model_dump_json().encode() + b"\n")
            worker.stdin.flush()
            yield worker
        finally:
            worker.kill()


def submit(jobs: Jobs, name: str) -> str:
    """Once the worker has made the tables."""
    return until(lambda: _unless_503(lambda: jobs.submit(name, model())))


def finished(jobs: Jobs, job_id: str) -> dict:
    return until(lambda: (s := jobs.status(job_id))["status"] != "processing" and s)


def until(f: Callable) -> object:
    """What f() gives once that is true."""
    deadline = time.monotonic() + 60
    while not (result := f()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


def _unless_503(f: Callable) -> object:
    try:
        return f()
    except Refused as e:
        if e.status != 503:
            raise


def left(jobs: Jobs) -> list[str]:
    """Everything under the results root."""
    root = jobs.settings.results_root
    return sorted(os.path.relpath(os.path.join(folder, name), root) for folder, folders, files in os.walk(root)
                  for name in [*folders, *files] if name != ".jobs")
