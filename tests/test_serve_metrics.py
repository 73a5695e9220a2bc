"""What Prometheus reads, and the rule that it alerts by."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from urllib.request import urlopen

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.machine import ROOT
from bench.serving import Connection, score_request, serving
from ebm.events import load_events
from serve.metrics import LATENCY_EDGES, Metrics, ScoreDistribution
from serve.model import Served

DEMO = ROOT / "models" / "demo"
RULES = ROOT / "deploy" / "prometheus"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None,
                                    reason="promtool is not there: apt-get install prometheus")


@pytest.fixture(scope="module")
def events() -> np.ndarray:
    x = load_events("toy:300").x
    x[:5] *= 50
    return x


@pytest.fixture(scope="module")
def text(events) -> str:
    """What a service that was asked for the events, and for something wrong, exposes."""
    async def ask(port: int) -> None:
        connection = await Connection.open(port)
        for body in (score_request(events, binary=True), score_request(events[:1], binary=False),
                     score_request(events[:1] * np.float32(np.inf), binary=True)):
            await connection.ask(body)
        connection.close()

    with serving(DEMO, threads=1, score_edges=[-40.0, -30.0, -20.5, 0.0]) as process:
        asyncio.run(ask(process.port))
        return urlopen(f"{process.url}/metrics").read().decode()


def samples(text: str) -> dict[tuple[str, frozenset], float]:
    return {(s.name, frozenset(s.labels.items())): s.value
            for family in text_string_to_metric_families(text) for s in family.samples}


def test_counts_are_those_of_what_was_asked(text, events):
    found = samples(text)

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset(labels.items())]

    served = Served(DEMO)
    energies = np.append(served.energies(events), served.energies(events[:1]))
    assert value("fused_ebm_events_total") == len(energies)
    assert value("fused_ebm_flagged_total") == (energies > served.threshold).sum() > 0
    assert value("fused_ebm_requests_total", path="/api/v1/score", status="200") == 2
    assert value("fused_ebm_requests_total", path="/api/v1/score", status="422") == 1
    assert value("fused_ebm_nonfinite_total") == 1
    assert value("fused_ebm_batch_events_count") == 3
    assert value("fused_ebm_queue_events") == 0
    assert value("fused_ebm_model", version=served.version) == 1
    for edge in ("-40", "-30", "-20.5", "0"):
        assert value("fused_ebm_score_bucket", le=edge) == (energies <= float(edge)).sum()
    assert value("fused_ebm_score_bucket", le="+Inf") == len(energies)
    for reason in ("queue", "deadline", "jobs"):
        assert value("fused_ebm_rejected_total", reason=reason) == 0
    edges = [dict(labels)["le"] for (name, labels) in found if name == "fused_ebm_request_seconds_bucket"
             and dict(labels)["path"] == "/api/v1/score"]
    assert sorted(float(e) for e in edges) == [*LATENCY_EDGES, float("inf")]
    assert 0.01 in LATENCY_EDGES


def test_an_edge_belongs_to_the_bin_below_it():
    distribution = ScoreDistribution([0.0, 1.0])
    distribution.observe(np.array([-1, 0, 0.5, 1, 2], np.float32))
    (family,) = distribution.collect()
    assert [(s.labels["le"], s.value) for s in family.samples if s.name.endswith("bucket")] == [
        ("0", 2), ("1", 4), ("+Inf", 5)]


def test_a_quantile_is_the_edge_of_its_bucket():
    metrics = Metrics([0.0])
    assert metrics.seconds_within("x", 0.5) is None
    for _ in range(99):
        metrics.answered("x", 200, 0.0008)
    metrics.answered("x", 200, 0.004)
    metrics.answered("y", 200, 0.09)
    assert metrics.seconds_within("x", 0.5) == metrics.seconds_within("x", 0.99) == 0.001
    metrics.answered("x", 200, 0.3)
    assert metrics.seconds_within("x", 0.985) == 0.005
    assert metrics.seconds_within("x", 1.0) == float("inf")


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_metrics(text):
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@needs_promtool
def test_the_alert_rule_fires_above_10_ms_and_not_below():
    for command in (["check", "rules", "fused-ebm.rules.yml"], ["test", "rules", "fused-ebm.test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=RULES, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_unit_test_of_the_rule_can_fail(tmp_path):
    shutil.copytree(RULES, tmp_path, dirs_exist_ok=True)
    rules = tmp_path / "fused-ebm.rules.yml"
    rules.write_text(rules.read_text().replace("> 0.010", "> 0.030"))
    done = subprocess.run(["promtool", "test", "rules", "fused-ebm.test.yml"], cwd=tmp_path, capture_output=True,
                          timeout=60)
    assert done.returncode != 0


def test_the_metric_of_the_rule_is_one_that_the_service_has(text):
    rules = (RULES / "fused-ebm.rules.yml").read_text()
    assert 'fused_ebm_request_seconds_bucket{path="/api/v1/score"}' in rules
    assert any(name == "fused_ebm_request_seconds_bucket" for name, _ in samples(text))
