"""What the sweep of the batch worker removes: never what a job needs, whenever that begins or ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from serve_case import jobs_at, left, model

from serve.batch import alone
from serve.storage import Storage
from serve.worker import GOING_ON, _sweep


class World:
    """Jobs with a directory of parts and a published file each; dbos is played by a dictionary of their states.

    `after_listing` and `after_asking` happen right after the sweep has read the directories and a job's state.
    """

    def __init__(self, tmp_path):
        self.jobs = jobs_at(tmp_path, f"sqlite:///{tmp_path / 'jobs.sqlite'}")
        self.database, self.state = self.jobs.database, {}
        self.after_listing: Callable[[], object] = lambda: None
        self.after_asking: Callable[[str], object] = lambda job_id: None
        self.database.create_tables()

    def add(self, job_id: str, state: str, is_complete: bool = False) -> None:
        self.state[job_id] = state
        with self.database.engine.begin() as c:
            self.database.add_job(c, job_id, self.database.add_model(c, model()), "events.parquet", "")
        self.files(job_id)
        if is_complete:
            self.complete(job_id)

    def files(self, job_id: str) -> None:
        folder = self.jobs.storage.work(job_id)
        folder.mkdir(parents=True)
        for path in (folder / "part-000000.parquet", self.jobs.settings.results_root / f"{job_id}.parquet"):
            path.write_bytes(b"energies")

    def complete(self, job_id: str) -> None:
        self.database.add_scored_file(job_id, f"{job_id}.parquet", model().digest, 1, 0)

    def sweep(self) -> list[str]:
        """What is left of all files."""
        def unfinished() -> list[str]:
            found = Storage.unfinished(storage)
            self.after_listing()
            return found

        def list_workflows(workflow_ids: list[str], status: list[str]) -> list[str]:
            assert status == GOING_ON
            found = [job_id for job_id in workflow_ids if self.state[job_id] in status]
            self.after_asking(workflow_ids[0])
            return found

        storage = Storage(self.jobs.settings)
        storage.unfinished = unfinished
        _sweep(SimpleNamespace(list_workflows=list_workflows), self.database, storage)
        return left(self.jobs)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def all_of(*job_ids: str) -> list[str]:
    return sorted(name for j in job_ids for name in (f".jobs/{j}", f".jobs/{j}/part-000000.parquet", f"{j}.parquet"))


@pytest.mark.parametrize("state", ["CANCELLED", "ERROR", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"])
def test_what_is_left_of_a_job_that_is_over_goes_and_nothing_else(world, state):
    world.add("over", state)
    world.add("running", "PENDING")
    world.add("waiting", "ENQUEUED")
    world.add("complete", "SUCCESS", is_complete=True)
    world.add("late", "CANCELLED", is_complete=True)  # cancelled when its result was there
    world.files("of-another-service")
    kept = [*all_of("running", "waiting", "of-another-service"), "complete.parquet", "late.parquet"]
    assert world.sweep() == sorted(kept)
    assert world.sweep() == sorted(kept)


def test_a_job_that_starts_after_the_directories_were_read_keeps_its_files(world):
    world.add("first", "ENQUEUED")
    world.add("second", "CANCELLED")

    def start() -> None:
        world.state["first"] = "PENDING"
        world.add("third", "PENDING")

    world.after_listing = start
    assert world.sweep() == all_of("first", "third")


def test_a_cancelled_job_that_still_writes_keeps_its_files_until_it_ends(world):
    world.add("job", "CANCELLED")
    with contextlib.ExitStack() as running:
        world.after_asking = lambda job_id: running.enter_context(alone(world.jobs.storage.work(job_id)))
        assert world.sweep() == all_of("job")
    world.after_asking = lambda job_id: None
    assert world.sweep() == []


def test_a_job_that_becomes_complete_after_its_state_was_read_keeps_its_result(world):
    world.add("job", "CANCELLED")
    world.after_asking = world.complete
    assert world.sweep() == ["job.parquet"]


def test_where_a_result_cannot_be_removed_the_others_are_and_it_is_later(world, monkeypatch):
    world.add("first", "CANCELLED")
    world.add("second", "CANCELLED")
    discard = Storage.discard

    def unreachable(storage: Storage, job_id: str) -> None:
        if job_id == "first":
            raise OSError("the bucket does not answer")
        discard(storage, job_id)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "discard", unreachable)
        assert world.sweep() == all_of("first")
    assert world.sweep() == []


def test_a_job_that_cleans_up_by_itself_meanwhile_is_no_failure(world):
    world.add("job", "CANCELLED")

    def end(job_id: str) -> None:
        (world.jobs.storage.work(job_id) / "part-000000.parquet").unlink()
        world.jobs.storage.work(job_id).rmdir()
        world.jobs.storage.discard(job_id)

    world.after_asking = end
    assert world.sweep() == []
