"""Who is let in, and what the settings may say."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import httpx
import pytest

from bench.machine import ROOT
from bench.serving import serving
from ebm.events import DataError
from serve.security import new_key
from serve.settings import Settings, is_loopback, load_settings

DEMO = ROOT / "models" / "demo"


@pytest.fixture(scope="module")
def keys() -> list[str]:
    return [new_key()[0] for _ in range(2)]


@pytest.fixture(scope="module")
def client(keys):
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    with serving(DEMO, threads=1, api_keys=digests, log_level="debug", max_connections=20) as process, \
            httpx.Client(base_url=process.url, timeout=10) as client:
        client.process = process
        yield client


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + b64encode(f"anyone:{password}".encode()).decode()}


def test_a_key_is_made_with_its_digest():
    key, digest = new_key()
    assert hashlib.sha256(key.encode()).hexdigest() == digest
    assert len(key) >= 43
    assert new_key()[0] != key
    printed = subprocess.run([sys.executable, "-m", "serve", "--new-key"], cwd=ROOT, capture_output=True, text=True,
                             timeout=60, check=True).stdout
    key, digest = printed.split()[3], printed.split('"')[1]
    assert hashlib.sha256(key.encode()).hexdigest() == digest


def test_each_key_opens_and_nothing_else_does(client, keys):
    for key in keys:
        for headers in ({"Authorization": f"Bearer {key}"}, {"Authorization": f"bearer  {key}"}, basic(key)):
            assert client.get("/api/v1/model", headers=headers).status_code == 200
    digest = hashlib.sha256(keys[0].encode()).hexdigest()
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer x"}, {"Authorization": keys[0]},
                    {"Authorization": f"Bearer {digest}"}, {"Authorization": f"Bearer {keys[0]}x"}, basic("x"),
                    {"Authorization": "Basic !!!"}, {"Authorization": "Digest " + keys[0]}, {"X-Api-Key": keys[0]}):
        answer = client.get("/api/v1/model", headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")


def test_everything_but_health_needs_a_key(client, keys):
    paths = ["/", "/docs", "/openapi.json", "/metrics", "/api/v1/model", "/nothing", "/static-offline-docs/favicon.png"]
    assert [client.get(path).status_code for path in paths] == [401] * len(paths)
    assert client.post("/api/v1/score", json={"events": []}).status_code == 401
    assert client.post("/api/v1/explain", json={"event": []}).status_code == 401
    assert client.get("/health/live").status_code == client.get("/health/ready").status_code == 200
    known = {"Authorization": f"Bearer {keys[1]}"}
    assert client.post("/api/v1/score", json={"events": []}, headers=known).status_code == 200
    assert "fused_ebm_requests_total" in client.get("/metrics", headers=known).text


def test_logs_have_the_id_of_each_request_and_neither_keys_nor_paths_of_others(client, keys):
    client.get("/api/v1/model", headers={"Authorization": f"Bearer {keys[0]}", "X-Request-Id": "my.id-1"})
    client.get("/a/secret/place", headers=basic(keys[1]))
    client.get("/health/live")
    lines = {line.get("id"): line for line in client.process.lines()}
    line = lines["my.id-1"]
    assert (line["method"], line["path"], line["status"], line["level"]) == ("GET", "/api/v1/model", 200, "debug")
    assert line["ms"] > 0
    assert line["time"].endswith("Z")
    text = client.process.log.read_text()
    assert not any(word in text for word in ("secret", *keys, b64encode(f"anyone:{keys[1]}".encode()).decode()))


def test_a_host_with_keys_may_have_any_name(client):
    assert client.get("/health/live", headers={"Host": "scores.example"}).status_code == 200
    assert client.get("/api/v1/model", headers={"Host": "scores.example"}).status_code == 401


def test_connections_beyond_the_limit_are_closed_and_the_others_go_on(client):
    many = [httpx.Client(base_url=client.base_url, timeout=5) for _ in range(30)]

    def answers(c: httpx.Client) -> bool:
        try:
            return c.get("/health/live").status_code == 200
        except httpx.TransportError:
            return False

    assert 10 <= sum(answers(c) for c in many) <= 20
    for c in many:
        c.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "scores.example", ""])
def test_without_keys_only_the_loopback_interface_is_served(host):
    with pytest.raises(DataError, match="api_keys"):
        load_settings(None, {}, model=DEMO, host=host)
    assert load_settings(None, {"FUSED_EBM_API_KEYS": f'["{"0" * 64}"]'}, model=DEMO, host=host).host == host


def test_loopback_addresses():
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "localhost"]))
    assert not any(map(is_loopback, ["10.0.0.1", "::", "127.0.0.1.example", "localhost.example", "", "2130706433"]))


def test_given_goes_before_environment_before_file_before_default(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nwait_ms = 0.5\nthreads = 2\ns3_read_buckets = ["events"]\n')
    settings = load_settings(file, {"FUSED_EBM_WAIT_MS": "0.1", "FUSED_EBM_PORT": "2", "FUSED_EBM_DATA": "/x"},
                             model=DEMO, port=3, host=None)
    assert (settings.port, settings.wait_ms, settings.threads) == (3, 0.1, 2)
    assert (settings.s3_read_buckets, settings.host) == (("events",), "127.0.0.1")
    settings = load_settings(None, {"FUSED_EBM_MODEL": str(DEMO), "FUSED_EBM_S3_READ_BUCKETS": '["abc", "abd"]'})
    assert (settings.model, settings.s3_read_buckets) == (DEMO, ("abc", "abd"))


@pytest.mark.parametrize(("text", "named"), [
    ("prot = 1", "prot"), ("port = 70000", "port"), ('port = "x"', "port"), ("wait_ms = nan", "wait_ms"),
    ("wait_ms = -1", "wait_ms"), ("deadline_s = inf", "deadline_s"), ("max_events = 0", "max_events"),
    ('api_keys = ["hunter2"]', "api_keys"), ('s3_read_buckets = ["../x"]', "s3_read_buckets"),
    ('s3_results = "file:///x"', "s3_results"), ("score_edges = [2, 1]", "score_edges"), ("port = ", "TOML"),
    ('log_level = "loud"', "log_level"),
])  # fmt: skip
def test_a_wrong_setting_is_named_and_not_repeated(tmp_path, text, named):
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(DataError, match=named) as e:
        load_settings(file, {}, model=DEMO)
    assert "serve.toml" in str(e.value)
    assert "hunter2" not in str(e.value)


def test_what_cannot_start_says_why_in_one_sentence(tmp_path):
    (tmp_path / "slow.toml").write_text('backend = "reference"\nthreads = 2')
    for options, words in (([str(tmp_path / "nothing")], "nothing"), (["models/demo", "--host", "0.0.0.0"], "api_keys"),
                           (["models/demo", "--config", str(tmp_path / "no.toml")], "no.toml"), ([], "model"),
                           (["models/demo", "--config", str(tmp_path / "slow.toml")], "threads = 2")):
        done = subprocess.run([sys.executable, "-m", "serve", *options], cwd=ROOT, capture_output=True, text=True,
                              timeout=60)
        assert done.returncode == 2
        errors = [line for line in done.stderr.splitlines() if not line.startswith("{")]
        assert len(errors) == 1
        assert errors[0].startswith("error: ")
        assert words in errors[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_an_address_that_is_taken_is_named_before_the_model_is_loaded(host, tmp_path):
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        refused_address(host, taken.getsockname()[1], tmp_path / "nothing", "Address already in use")


def test_an_address_of_another_machine_or_of_none_is_named(tmp_path):
    key = tmp_path / "key.toml"
    key.write_text(f'api_keys = ["{"0" * 64}"]')
    for host, why in (("192.0.2.1", "Cannot assign requested address"), ("no.such.host.invalid", "")):
        refused_address(host, 8000, tmp_path / "nothing", why, "--config", str(key))


def refused_address(host: str, port: int, model: Path, why: str, *options: str) -> None:
    """The model is not there either, but that is not what is heard of."""
    done = subprocess.run([sys.executable, "-m", "serve", str(model), "--host", host, "--port", str(port), *options],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: host {host}, port {port}: {why}")
    assert done.stderr.count("\n") == 1


def test_the_defaults_need_no_other_server():
    settings = Settings(model=Path("m"))
    assert settings.database_url.startswith("sqlite:")
    assert (settings.cache_url, settings.s3_endpoint, settings.data_root) == (None, None, None)
