"""`optimize_for_inference`, as the case study names it."""

from __future__ import annotations

import pytest
import torch
from export_case import small

from ebm.networks import Autoencoder, EnergyNetwork, ScoreNetwork
from export.optimize import optimize_for_inference
from export.score_graph import ExportGraph
from kernels.tolerances import TOLERANCES

TOLERANCE = TOLERANCES["fp32"]


@pytest.mark.parametrize("network", [EnergyNetwork, ScoreNetwork, Autoencoder], ids=lambda n: n.__name__)
def test_optimize_for_inference(network):
    torch.manual_seed(0)
    network = network()
    report = optimize_for_inference(network)["cpu"]
    assert report["agrees"]
    assert 0 < report["error_energy"] < TOLERANCE
    assert 0 < report["error_score"] < TOLERANCE
    assert report["first_20_calls_ms"] > report["p50_ms"] > 0
    assert report["within_budget"] == (report["p99_ms"] < 50)
    u = torch.randn(9, 64)
    with torch.no_grad():
        expected = network.energy_and_score(u)
        for given, wanted in zip(report["module"](u), expected, strict=True):
            torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_optimize_for_inference_reports_no_speed_of_what_is_wrong(monkeypatch):
    right = ExportGraph.forward
    monkeypatch.setattr(ExportGraph, "forward", lambda self, x: tuple(2 * r for r in right(self, x)))
    report = optimize_for_inference(small(), 6)["cpu"]
    assert not report["agrees"]
    assert report["error_energy"] > 1
    assert [report[name] for name in ("first_call_ms", "p50_ms", "p99_ms", "within_budget")] == [None] * 4


def test_optimize_for_inference_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="input_dim is 64, the model takes 6 features"):
        optimize_for_inference(small())
    with pytest.raises(ValueError, match="model is Linear, expected an EnergyNetwork"):
        optimize_for_inference(torch.nn.Linear(64, 1))
