"""Where events come from and scores go to: directories and buckets that the settings name, and nothing else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ebm.command import whole_file
from ebm.events import DataError
from serve.batch import move

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from serve.settings import Settings

WORK = ".jobs"  # under results_root: one directory for each job that runs


@dataclass(frozen=True)
class Source:
    """A file of events: where it is, what was written behind its question mark, and a stamp of its content."""

    filesystem: FileSystem
    path: str
    options: str
    stamp: str


class Storage:
    """Local directories, or S3 through pyarrow.fs. Messages repeat nothing of what the caller gave.

    Links are followed where they lead to a file under the root, and refused where they lead out of it. Who may write
    under the root could still put a link in the place of a file while it is opened: give the root to those you trust.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def find(self, events_file: str) -> Source:
        """The file that "s3://bucket/key" or a path, absolute or under the data root, names; options as in
        "nano.root?era=UL2018" may follow. DataError where it may not be read, is no file, or is too large."""
        name, _, options = events_file.partition("?")
        if len(events_file) > 1024 or not events_file.isprintable():
            raise DataError("events_file: expected a path or an s3:// address of at most 1024 printable characters")
        filesystem, path = self._bucket(name) if name.startswith("s3://") else self._local(name)
        try:
            info = filesystem.get_file_info(path)
        except OSError:
            raise DataError("events_file: the storage does not answer, or refuses it") from None
        if not info.is_file:
            raise DataError("events_file: there is no such file")
        if info.size > self._settings.max_file_bytes:
            raise DataError(f"events_file: {info.size} bytes, expected at most {self._settings.max_file_bytes}")
        return Source(filesystem, path, options, f"{info.size}:{info.mtime_ns}")

    def fetch(self, source: Source, work: Path) -> str:
        """What `ebm.events.iterate` takes: the file itself, or a copy in `work` of one that is not on this machine.

        DataError where an HDF5 file would have others read.
        """
        path = Path(source.path)
        if source.filesystem.type_name != "local":
            path = work / f"events{''.join(Path(source.path).suffixes[-2:])}"
            if not path.exists():
                with source.filesystem.open_input_stream(source.path) as f, whole_file(path) as copy:
                    while block := f.read(1 << 22):
                        copy.write(block)
        if path.suffix.lower() in (".h5", ".hdf5"):
            _refuse_other_files(path)
        return f"{path}?{source.options}" if source.options else str(path)

    def work(self, job_id: str) -> Path:
        """The directory of a job that runs."""
        return self._settings.results_root.resolve() / WORK / job_id

    def unfinished(self) -> list[str]:
        """The jobs that have a directory."""
        folder = self.work("")
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def results_file(self, job_id: str) -> str:
        if self._settings.s3_results:
            return f"{self._settings.s3_results.rstrip('/')}/{job_id}.parquet"
        return str(self._settings.results_root / f"{job_id}.parquet")

    def publish(self, file: Path, job_id: str) -> str:
        """Give finished scores their place, whole or not at all, and their name.

        A bucket shows an object when all of it is there. What a crash leaves of an upload is in no listing: a lifecycle
        rule of the bucket (AbortIncompleteMultipartUpload) removes it.
        """
        name = self.results_file(job_id)
        if not self._settings.s3_results:
            move(file, self._settings.results_root.resolve() / f"{job_id}.parquet")
            return name
        with open(file, "rb") as f, self._s3.open_output_stream(name.removeprefix("s3://")) as upload:
            while block := f.read(1 << 23):
                upload.write(block)
        return name

    def discard(self, job_id: str) -> None:
        """Remove the result of a job that was cancelled, if it has one."""
        if self._settings.s3_results:
            if self._s3.get_file_info(path := self.results_file(job_id).removeprefix("s3://")).is_file:
                self._s3.delete_file(path)
        else:
            (self._settings.results_root / f"{job_id}.parquet").unlink(missing_ok=True)

    def _local(self, name: str) -> tuple[FileSystem, str]:
        from pyarrow.fs import LocalFileSystem

        if self._settings.data_root is None:
            raise DataError("events_file: this service reads no local files (data_root is not set)")
        root = self._settings.data_root.resolve()
        try:
            path = (root / name).resolve()
        except (OSError, RuntimeError):  # too long, or links in a circle
            raise DataError("events_file: there is no such file") from None
        if not path.is_relative_to(root):
            raise DataError("events_file: it is not under the data root")
        return LocalFileSystem(), str(path)

    def _bucket(self, name: str) -> tuple[FileSystem, str]:
        bucket, _, key = name.removeprefix("s3://").partition("/")
        if bucket not in self._settings.s3_read_buckets:
            raise DataError("events_file: this service does not read from that bucket")
        if any(part in ("", ".", "..") for part in key.split("/")):
            raise DataError("events_file: expected s3://bucket/key")
        return self._s3, f"{bucket}/{key}"

    @cached_property
    def _s3(self) -> FileSystem:
        from pyarrow.fs import S3FileSystem

        options: dict = {"connect_timeout": 5, "request_timeout": 60}
        if self._settings.s3_region:
            options["region"] = self._settings.s3_region
        if self._settings.s3_endpoint:
            endpoint = urlsplit(self._settings.s3_endpoint)
            options |= {"scheme": endpoint.scheme, "endpoint_override": endpoint.netloc}
        return S3FileSystem(**options)


def _refuse_other_files(path: Path) -> None:
    """An HDF5 file may have links to others, and data sets whose values are those of any file."""
    import h5py

    def link(name: str, target: object) -> str | None:  # what is not None ends the visit
        return name if isinstance(target, h5py.ExternalLink) else None

    def item(name: str, content: object) -> str | None:
        return name if isinstance(content, h5py.Dataset) and (content.external or content.is_virtual) else None

    try:
        with h5py.File(path, "r") as f:
            elsewhere = f.visititems_links(link) or f.visititems(item)
    except OSError:
        return  # no HDF5 file: the reader says so, in its own words
    if elsewhere:
        raise DataError(f"{path.name}, {elsewhere}: expected data in the file itself, given those of another file")
