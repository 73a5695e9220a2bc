"""The interface, over real sockets: what each route answers, and that its numbers are those of the Scorer."""

from __future__ import annotations

import re

import httpx
import numpy as np
import pytest

from bench.machine import ROOT
from bench.serving import serving
from ebm.events import load_events
from serve.model import Served

DEMO = ROOT / "models" / "demo"


@pytest.fixture(scope="module")
def scorer():
    return Served(DEMO).scorer


@pytest.fixture(scope="module")
def events():
    x = load_events("toy:400").x
    x[0] *= 50  # far out: flagged
    assert np.isnan(x).any()
    return x


@pytest.fixture(scope="module")
def client():
    with serving(DEMO, threads=1) as process, httpx.Client(base_url=process.url, timeout=10) as client:
        yield client


def as_json(x: np.ndarray) -> list:
    return [[None if np.isnan(v) else float(v) for v in row] for row in x]


def test_json_and_binary_give_the_energies_of_the_scorer_bit_for_bit(client, scorer, events):
    energy = scorer.energy(events)
    flag = energy > scorer.threshold
    assert flag.any()
    assert not flag.all()
    answer = client.post("/api/v1/score", json={"events": as_json(events)})
    assert answer.status_code == 200
    assert answer.json().keys() == {"scores", "flags"}
    np.testing.assert_array_equal(np.float32(answer.json()["scores"]), energy)
    assert answer.json()["flags"] == flag.tolist()
    answer = client.post("/api/v1/score", content=events.astype("<f4").tobytes(),
                         headers={"Content-Type": "application/octet-stream"})
    n = len(events)
    np.testing.assert_array_equal(np.frombuffer(answer.content[: 4 * n], "<f4"), energy)
    assert np.frombuffer(answer.content[4 * n :], np.uint8).tolist() == flag.tolist()
    assert answer.headers["x-model-version"] == scorer.bundle.digest


def test_an_event_has_the_same_score_alone_and_in_any_request(client, scorer, events):
    alone = [client.post("/api/v1/score", json={"events": as_json(events[i : i + 1])}).json()["scores"][0]
             for i in range(20)]
    np.testing.assert_array_equal(np.float32(alone), scorer.energy(events)[:20])


@pytest.mark.parametrize("content_type", ["application/json", "application/octet-stream"])
def test_no_events_give_empty_lists(client, content_type):
    body = b"" if "octet" in content_type else b' {"events": [ ]} '
    answer = client.post("/api/v1/score", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == 200
    assert answer.content in (b"", b'{"scores":[],"flags":[]}')


def test_explain_names_the_signed_slope_of_each_feature_and_the_norm_of_each_object(client, scorer, events):
    x = events[1:2]
    answer = client.post("/api/v1/explain", json={"event": as_json(x)[0]}).json()
    slope = scorer.attribution(x)[0].astype(float)
    assert answer["score"] == scorer.energy(x)[0]
    assert answer["feature_attribution"] == dict(zip(scorer.features, slope.tolist(), strict=True))
    assert (slope < 0).any()
    assert (slope > 0).any()
    assert {"MET", "jet1_mass"} <= answer["feature_attribution"].keys()
    of_obj0 = [slope[j] for j, name in enumerate(scorer.features) if name.startswith("obj0_")]
    assert len(of_obj0) == 4
    assert answer["object_attribution"]["obj0"] == pytest.approx(np.linalg.norm(of_obj0))
    assert "MET" not in answer["object_attribution"]


def test_model_says_what_is_served(client, scorer):
    answer = client.get("/api/v1/model").json()
    assert answer["model"] == "demo"
    assert answer["version"] == scorer.bundle.digest
    assert answer["feature_names"] == list(scorer.features)
    assert (answer["n_features"], answer["threshold"], answer["rate"]) == (64, scorer.threshold, 1e-4)


def test_health(client):
    assert client.get("/health/live").json() == {"status": "live"}
    answer = client.get("/health/ready")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready", "parts": {}})


def test_openapi_names_every_route_and_the_number_of_features(client):
    schema = client.get("/openapi.json").json()
    assert schema["paths"].keys() == {"/api/v1/score", "/api/v1/explain", "/api/v1/model", "/health/live",
                                      "/health/ready", "/metrics"}
    content = schema["paths"]["/api/v1/score"]["post"]["requestBody"]["content"]
    assert content.keys() == {"application/json", "application/octet-stream"}
    event = content["application/json"]["schema"]["properties"]["events"]["items"]
    assert (event["minItems"], event["maxItems"]) == (64, 64)


def test_docs_and_status_page_need_no_other_host(client):
    docs = client.get("/docs")
    wanted = re.findall(r'(?:src|href)="([^"]+)"', docs.text)
    assert wanted
    for address in wanted:
        assert address.startswith("/")
        assert client.get(address).status_code == 200
    page = client.get("/").text
    assert "demo" in page
    assert "flag rate" in page
    assert "<script" not in page
    for word in ("threshold", "latency", client.get("/api/v1/model").json()["version"]):
        assert word in page


def test_every_answer_has_security_headers_and_a_request_id(client):
    for path in ("/", "/health/live", "/nothing/here", "/api/v1/model", "/docs"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src" in headers["content-security-policy"]
        assert "server" not in headers
        assert len(headers["x-request-id"]) == 16
    assert client.get("/", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert client.get("/", headers={"X-Request-Id": "a b\tc"}).headers["x-request-id"] != "a b\tc"


def test_a_model_of_other_features(tmp_path):
    from dataclasses import replace

    from ebm.bundle import Bundle, Threshold

    bundle = replace(Bundle.random(3, 64), threshold=Threshold(0.5, 1e-4, 0.95, 1, 40_000, 1e-4, True, 5))
    bundle.save(tmp_path / "small")
    x = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    with serving(tmp_path / "small", threads=1) as process:
        answer = httpx.post(f"{process.url}/api/v1/score", json={"events": as_json(x)}).json()
        np.testing.assert_array_equal(np.float32(answer["scores"]), Served(tmp_path / "small").scorer.energy(x))
