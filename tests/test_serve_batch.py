"""A file scored in parts: any format, the same bytes after an end at any place, and no energy that is not one."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serve_case import FORMATS, MODEL, ROOT, columns, model, uninterrupted, with_met, write

from ebm.events import DataError
from serve.batch import SCORES, alone, app, count, score_parts, scorer_for

DRIVER = """
import os, sys
import pyarrow.compute, pyarrow.parquet, rich.progress
import ebm.readers.arrays, ebm.readers.root, kernels.native_cpu, kernels.registry
from pathlib import Path
from serve.batch import main

def run(kill_at):
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    calls = 0
    def dying(f):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), 9)
            return f(*args, **kwargs)
        return call
    for name in ("fsync", "replace", "unlink", "rmdir", "chmod", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    try:
        main(events, Path(model), Path(out), "native", 300)
    finally:
        os._exit(0)

events, model, out = sys.argv[1:]
point, status = 0, 9
while status == 9:
    point += 1
    if os.path.exists(out):
        os.unlink(out)
    status = run(point)
    assert run(0) == 0
    print(point, open(out, "rb").read().hex(), *os.listdir(os.path.dirname(out)))
assert status == 0
"""


def message(source, work, **options):
    work.mkdir(exist_ok=True)
    with pytest.raises(DataError) as error:
        score_parts(str(source), work, scorer_for(model()), **options)
    assert not (work / SCORES).exists()
    return str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_every_event_once_in_order_whatever_the_format_and_the_chunk(tmp_path, name):
    path = write(tmp_path / name)
    assert count(str(path)) == 6000
    small, large = (pq.read_table(pa.BufferReader(uninterrupted(path, tmp_path / str(n), n))) for n in (999, 10_000))
    assert small == large


def test_killed_before_every_call_that_changes_the_disk(tmp_path):
    path, out = tmp_path / "events.parquet", tmp_path / "results" / "scores.parquet"
    pq.write_table(pa.table(columns()).slice(0, 500), path)
    out.parent.mkdir()
    expected = uninterrupted(path, tmp_path / "work", 300).hex()
    done = subprocess.run([sys.executable, "-c", DRIVER, path, MODEL, out], capture_output=True, text=True, cwd=ROOT,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    points = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(points) > 15
    for _point, content, *left in points:
        assert content == expected
        assert left == ["scores.parquet"]


def test_a_second_run_scores_only_what_is_missing(tmp_path):
    path, work, scorer = write(tmp_path / "events.parquet"), tmp_path / "work", scorer_for(model())
    expected = uninterrupted(path, work, 1000)
    (work / "part-000003.parquet").unlink()
    before = {p.name: p.stat().st_mtime_ns for p in work.glob("part*")}
    seen = []
    score_parts(str(path), work, scorer, 1000, seen.append)
    assert seen == [1000, 2000, 3000, 4000, 5000, 6000]
    assert {p.name for p in work.glob("part*") if before.get(p.name) != p.stat().st_mtime_ns} == {"part-000003.parquet"}
    assert (work / SCORES).read_bytes() == expected


def test_parts_of_another_model_threshold_file_or_chunk_are_not_kept(tmp_path):
    path, work = write(tmp_path / "events.parquet"), tmp_path / "work"
    uninterrupted(path, work, 1000)
    write(path, **with_met(17, *range(6000)))
    uninterrupted(path, work, 1000)
    uninterrupted(path, work, 1500)
    scorer = scorer_for(replace(model(), default_level=0, threshold=None))
    score_parts(str(path), work, scorer, 1500)
    table = pq.read_table(work / SCORES)
    assert table["flag"].null_count == 6000
    assert table.schema.metadata[b"model_digest"].decode() == scorer.bundle.digest != model().digest


def test_an_event_without_an_energy_is_named_and_nothing_is_written(tmp_path):
    path, work = write(tmp_path / "events.parquet", **with_met(np.nan, 4321, 5000)), tmp_path / "work"
    said = f"entry 4321: feature {model().schema.features.index('MET')} (MET) is nan, expected a number: this feature"
    assert f"{path}, {said}" in message(path, work, chunk=4000).replace(" (and 1 more)", "")
    assert f"{path}, {said}" in message(path, work, chunk=100)
    write(path, **with_met(np.inf, 77))
    assert message(path, work) == f"{path}, entry 77, column MET: expected a finite number (within float32), given inf"


def test_a_file_that_changes_meanwhile_ends_the_run(tmp_path):
    path = write(tmp_path / "events.parquet")

    def change(events):
        if events == 3000:
            path.touch()

    assert "the file changed while it was read" in message(path, tmp_path / "work", chunk=1000, after_part=change)


def test_one_run_at_a_time(tmp_path):
    with alone(tmp_path / "work"), pytest.raises(RuntimeError, match="another process"), alone(tmp_path / "work"):
        pass
    with alone(tmp_path / "work"):
        pass


@pytest.mark.parametrize(("file", "out", "expected"), [
    ("events.parquet", "scores.csv", "expected a name that ends in .parquet"),
    ("events.parquet", "events.parquet", "it is the file of events"),
    ("missing.parquet", "scores.parquet", "cannot be read"),
    ("events.parquet", "folder.parquet", "it is a directory"),
])
def test_what_the_command_refuses(tmp_path, capsys, file, out, expected):
    write(tmp_path / "events.parquet")
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(SystemExit) as end:
        app([str(tmp_path / file), "--model", str(MODEL), "--out", str(tmp_path / out)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error

