"""A published directory is whole or not there, and never replaces another."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ebm.bundle import Bundle
from ebm.events import DataError
from export.publish import publish

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.path.dirname(__file__)])}
CONTENT = {"export.json": b"{}", "model.onnx": b"\x00" * 5000, "source/model.json": b"[1]"}
BOUNDARIES = ("open", "write", "mkdir", "chmod", "fsync", "rename")


def fill(new: Path) -> None:
    """Write CONTENT by the calls of `os` alone, so that every one of them can be made to fail."""
    for name, content in CONTENT.items():
        path = new / name
        if path.parent != new:
            os.mkdir(path.parent)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(handle, content)
        os.close(handle)


def found(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def fail_at(step: int, patch, failure) -> list[str]:
    """Let the call number `step` (from 0) to any of BOUNDARIES fail; gives the calls that were made."""
    calls = []

    def counted(name, function):
        def wrapped(*args, **kwargs):
            calls.append(name)
            if len(calls) == step + 1:
                failure()
            return function(*args, **kwargs)
        return wrapped

    for name in BOUNDARIES:
        patch(os, name, counted(name, getattr(os, name)))
    return calls


def disk_full():
    raise OSError(28, "No space left on device")


def test_whole_and_readable(tmp_path):
    path = tmp_path / "new" / "parents" / "out"
    before = os.umask(0o027)
    try:
        with publish(path) as new:
            assert new.parent == path.parent
            assert not path.exists()
            fill(new)
    finally:
        os.umask(before)
    assert found(path) == CONTENT
    assert os.listdir(path.parent) == ["out"]
    modes = {oct(p.stat().st_mode & 0o777) for p in path.rglob("*") if p.is_file()}
    assert modes == {"0o640"}
    assert {p.stat().st_mode & 0o777 for p in (path, path / "source")} == {0o750}


def test_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Every file and directory is flushed before the rename, the parents after it."""
    calls, flushed = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda h: (calls.append(os.readlink(f"/proc/self/fd/{h}")), flushed(h)))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append("rename"), rename(a, b)))
    with publish(tmp_path / "p" / "out") as new:
        fill(new)
    at = calls.index("rename")
    assert set(calls[:at]) == {str(new / name) for name in (*CONTENT, "source")} | {str(new)}
    assert calls[at + 1:] == [str(tmp_path / "p"), str(tmp_path)]


def test_an_error_at_any_step_leaves_nothing(tmp_path):
    """Or the whole, where only the flush of the new name failed."""
    def save(path, step):
        path.parents[1].mkdir()
        with pytest.MonkeyPatch.context() as m:
            calls = fail_at(step, m.setattr, disk_full)
            with publish(path) as new:
                fill(new)
        return calls

    calls = save(tmp_path / "all" / "a" / "out", step=1000)
    assert set(calls) == set(BOUNDARIES)
    for step in range(len(calls)):
        path = tmp_path / str(step) / "a" / "out"
        with pytest.raises((OSError, DataError), match="No space left"):
            save(path, step)
        if step <= calls.index("rename"):
            assert os.listdir(path.parents[1]) == []
        else:
            assert found(path) == CONTENT


CRASH = """
import os, sys
from pathlib import Path
from test_publish import fail_at, fill, publish
base, step = Path(sys.argv[1]), 0
while True:
    pid = os.fork()
    if pid == 0:
        fail_at(step, setattr, lambda: os._exit(9))
        with publish(base / str(step) / "out") as new:
            fill(new)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        break
    step += 1
"""


def test_a_crash_at_any_step_leaves_nothing_or_the_whole(tmp_path):
    subprocess.run([sys.executable, "-c", CRASH, tmp_path], env=ENVIRONMENT, check=True, timeout=60)
    steps = len(os.listdir(tmp_path))
    there = [(tmp_path / str(step) / "out").exists() for step in range(steps)]
    assert steps > 20
    assert there == sorted(there)
    assert 0 < sum(there) < steps
    for step in range(steps):
        path = tmp_path / str(step) / "out"
        if path.exists():
            assert found(path) == CONTENT
        with publish(tmp_path / str(step) / "next") as new:  # what a crash left is in nobody's way
            fill(new)


EXPORTER = """
import itertools, os, sys
from ebm.bundle import Bundle
from export.publish import publish
model = Bundle.random(3, 4, 1)
for i in itertools.count(int(sys.argv[2])):
    with publish(os.path.join(sys.argv[1], str(i))) as new:
        for name in ("source", "copy"):
            model.save(new / name)
"""


def test_killed_ten_times(tmp_path):
    """A process that publishes models in a loop is killed (SIGKILL) at ten random moments."""
    rng = random.Random(0)
    for kill in range(10):
        process = subprocess.Popen([sys.executable, "-c", EXPORTER, tmp_path, str(1000 * kill)], env=ENVIRONMENT)
        until = time.monotonic() + 60
        while not (tmp_path / str(1000 * kill)).exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.001)
        time.sleep(0.05 * rng.random())
        process.kill()
        assert process.wait() == -signal.SIGKILL
    published = [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    assert len(published) >= 10
    for path in published:
        assert Bundle.load(path / "source").digest == Bundle.load(path / "copy").digest


@pytest.mark.parametrize("there", ["directory", "empty", "file", "link", "dangling"])
def test_what_exists_is_refused_at_once(tmp_path, there):
    path = tmp_path / "out"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.onnx").write_text("years of work")
    {"directory": lambda: (tmp_path / "other").rename(path), "empty": path.mkdir,
     "file": lambda: path.write_text("data"), "link": lambda: path.symlink_to("other"),
     "dangling": lambda: path.symlink_to("nothing")}[there]()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"out exists: exports are never overwritten, name a new directory"), \
            publish(path):
        pytest.fail("the block ran")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("data")
    for name in ("file/out", "file/a/out"):
        with pytest.raises(DataError, match=r"out cannot be written: .*: Not a directory"), publish(tmp_path / name):
            pytest.fail("the block ran")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_block(tmp_path, interruption):
    def save():
        with publish(tmp_path / "a" / "out") as new:
            fill(new)
            raise interruption

    with pytest.raises(interruption):
        save()
    assert os.listdir(tmp_path) == []


def test_of_two_at_once_one_wins(tmp_path):
    """Eight threads publish the same versions; the losers are told, and no version is mixed."""
    refused, barrier = [], threading.Barrier(8)

    def work(number: int) -> None:
        for version in range(5):
            barrier.wait()
            try:
                with publish(tmp_path / str(version)) as new:
                    for name in CONTENT:
                        (new / name).parent.mkdir(exist_ok=True)
                        (new / name).write_text(str(number))
                    barrier.wait()  # all have begun
            except DataError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(refused) == 7 * 5
    assert all("exists: exports are never" in r or "by another process meanwhile" in r for r in refused)
    assert sorted(os.listdir(tmp_path)) == list("01234")
    for version in tmp_path.iterdir():
        assert len(set(found(version).values())) == 1


def test_the_next_version_of_a_repository(tmp_path):
    for version in ("1", "2"):
        with publish(tmp_path / "triton" / "demo" / version) as new:
            (new / "model.pt").write_text(version)
    assert {p.name: (p / "model.pt").read_text() for p in (tmp_path / "triton" / "demo").iterdir()} == \
        {"1": "1", "2": "2"}
