"""Files are read from the configured root and buckets, and from nowhere else; results appear whole."""

import os
from pathlib import Path

import boto3
import h5py
import numpy as np
import pytest
from serve_case import CHUNK, finished, jobs_at, left, running, submit, uninterrupted, until
from serve_case import write as write_events

from bench import servers
from ebm.events import DataError
from serve.storage import Storage


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "data" / "in").mkdir(parents=True)
    (tmp_path / "data" / "x.parquet").write_bytes(b"here")
    (tmp_path / "data" / "in" / "y.parquet").write_bytes(b"here")
    (tmp_path / "secret.parquet").write_bytes(b"secret")
    return jobs_at(tmp_path, f"sqlite:///{tmp_path}/x.sqlite", s3_read_buckets=("events",), max_file_bytes=100).settings


@pytest.fixture(scope="module")
def s3():
    if why_not := servers.s3_why_not():
        pytest.skip(why_not)
    with pytest.MonkeyPatch.context() as patch, servers.s3() as (server, url):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        for bucket in ("events", "results", "others"):
            client.create_bucket(Bucket=bucket)
        client.put_object(Bucket="others", Key="x.parquet", Body=b"secret")
        yield server, url, client


def refusal(settings, name):
    with pytest.raises(DataError) as error:
        Storage(settings).find(name)
    assert str(settings.data_root) not in str(error.value)
    return str(error.value)


def test_files_under_the_root_are_found_by_any_of_their_names(settings):
    root = settings.data_root
    (root / "link.parquet").symlink_to("in/y.parquet")
    for name, path in (("x.parquet", "x.parquet"), ("in/../x.parquet", "x.parquet"), ("link.parquet", "in/y.parquet"),
                       (str(root / "x.parquet"), "x.parquet")):
        found = Storage(settings).find(name + "?era=2022&tree=a")
        assert (found.path, found.options) == (str(root / path), "era=2022&tree=a")
    assert Storage(settings).fetch(found, root) == f"{root}/x.parquet?era=2022&tree=a"


def test_nothing_outside_the_root_is_found(settings, tmp_path):
    root = settings.data_root
    (root / "file.parquet").symlink_to("../secret.parquet")
    (root / "folder").symlink_to("..")
    (root / "round.parquet").symlink_to("round.parquet")
    os.mkfifo(root / "fifo.parquet")
    outside = ("../secret.parquet", "in/../../secret.parquet", str(tmp_path / "secret.parquet"), "/etc/passwd",
               "file.parquet", "folder/secret.parquet", "../data2/x.parquet", "..")
    for name in outside:
        assert refusal(settings, name) == "events_file: it is not under the data root"
    for name in ("missing.parquet", "in", "", ".", "round.parquet", "fifo.parquet", "file://x.parquet", "~/x", "toy",
                 "x.parquet/y", "%2e%2e/secret.parquet"):
        assert refusal(settings, name) == "events_file: there is no such file"
    for name in ("x.parquet\0", "x\n.parquet", "\ud800", "x.parquet?tree=\0", "x" * 5000):
        assert "printable" in refusal(settings, name)
    (root / "large.parquet").write_bytes(bytes(101))
    assert refusal(settings, "large.parquet") == "events_file: 101 bytes, expected at most 100"
    no_root = settings.model_copy(update={"data_root": None})
    assert "reads no local files" in refusal_without_root(no_root, "x.parquet")


def test_only_the_configured_buckets_are_read(settings, s3):
    at = settings.model_copy(update={"s3_endpoint": s3[1], "s3_region": "us-east-1"})
    s3[2].put_object(Bucket="events", Key="in/x.parquet", Body=b"here")
    assert Storage(at).find("s3://events/in/x.parquet").path == "events/in/x.parquet"
    for name in ("s3://others/x.parquet", "s3://events.others/x", "s3:///x", "s3://", "s3://EVENTS/in/x.parquet"):
        assert refusal(at, name) == "events_file: this service does not read from that bucket"
    for name in ("s3://events", "s3://events/", "s3://events/../others/x.parquet", "s3://events//in/x.parquet",
                 "s3://events/./in/x.parquet", "s3://events/in/"):
        assert refusal(at, name) == "events_file: expected s3://bucket/key"
    for name in ("s3://events/in", "s3://events/missing.parquet"):
        assert refusal(at, name) == "events_file: there is no such file"
    s3[2].put_object(Bucket="events", Key="large.parquet", Body=bytes(101))
    assert "101 bytes" in refusal(at, "s3://events/large.parquet")


def test_a_job_from_bucket_to_bucket(tmp_path, s3):
    _, url, client = s3
    jobs = jobs_at(tmp_path, f"sqlite:///{tmp_path / 'x.sqlite'}", s3_endpoint=url, s3_region="us-east-1",
                   s3_read_buckets=("events",), s3_results="s3://results/scored")
    path = write_events(tmp_path / "events.root")
    expected = uninterrupted(path, tmp_path / "work", CHUNK)
    client.upload_file(str(path), "events", "run/events.root")
    with running(jobs):
        job_id = submit(jobs, "s3://events/run/events.root")
        status = finished(jobs, job_id)
        assert status["results_file"] == f"s3://results/scored/{job_id}.parquet"
        until(lambda: left(jobs) == [])
        (listed,) = client.list_objects_v2(Bucket="results")["Contents"]
        assert listed["Key"] == f"scored/{job_id}.parquet"
        assert client.get_object(Bucket="results", Key=listed["Key"])["Body"].read() == expected
        Storage(jobs.settings).discard(job_id)
        Storage(jobs.settings).discard(job_id)
    assert [o["Key"] for o in client.list_objects_v2(Bucket="results")["Contents"]] == ["scored/"]  # pyarrow's folder


def test_a_store_that_does_not_answer_is_said_and_not_waited_for(settings):
    at = settings.model_copy(update={"s3_endpoint": f"http://127.0.0.1:{servers.free_port()}", "s3_region": "x"})
    assert refusal(at, "s3://events/x.parquet") == "events_file: the storage does not answer, or refuses it"


def external_link(f, secret):
    f["link"] = h5py.ExternalLink(secret, "/x")


def external_data(f, secret):
    f.create_dataset("x", (3,), "i1", external=[(secret, 0, 3)])


def virtual_data(f, secret):
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(secret, "x", (3,))
    f.create_group("in").create_virtual_dataset("x", layout)


@pytest.mark.parametrize("write", [external_link, external_data, virtual_data])
def test_an_hdf5_file_that_would_read_others_is_refused(settings, tmp_path, write):
    with h5py.File(tmp_path / "secret.h5", "w") as f:
        f["x"] = np.arange(3.0)
    path = settings.data_root / "x.h5"
    with h5py.File(path, "w") as f:
        f["y"] = np.arange(3.0)
        write(f, str(tmp_path / "secret.h5"))
    large = settings.model_copy(update={"max_file_bytes": 10**6})
    with pytest.raises(DataError, match="expected data in the file itself"):
        Storage(large).fetch(Storage(large).find("x.h5"), Path(tmp_path))


def refusal_without_root(settings, name):
    with pytest.raises(DataError) as error:
        Storage(settings).find(name)
    return str(error.value)

