"""The bins of the score distribution: quantiles of the background that the model was calibrated on."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from urllib.request import urlopen

import numpy as np
import pytest

from bench.machine import ROOT
from bench.serving import serving
from ebm.bundle import Bundle
from ebm.events import DataError, load_events, split
from ebm.folds import SHARES, quantiles, recalibrate
from ebm.train import fit
from kernels import load_scorer
from serve.metrics import ScoreDistribution
from serve.service import SCORE_EDGES, Service
from serve.settings import Settings

DEMO = ROOT / "models" / "demo"
PAIRS = ((0.1, -3.5), (0.5, -1.0), (0.9, -1.0), (0.99, 2.25))


def test_a_share_of_the_energies_is_at_most_its_quantile():
    energies = np.random.default_rng(0).permutation(20_000).astype(np.float32)
    pairs = quantiles(energies)
    assert [q for q, _ in pairs] == list(SHARES)
    assert [np.mean(energies <= e) for _, e in pairs] == pytest.approx(SHARES, abs=1e-12)


def test_shares_that_too_few_events_resolve_are_left_out():
    assert quantiles(np.zeros(1)) == ()
    assert [q for q, _ in quantiles(np.arange(20.0))] == [q for q in SHARES if 0.05 <= q <= 0.95]


def test_weights_count_negative_ones_too():
    energies = np.arange(1000.0)
    assert quantiles(energies, np.full(1000, 0.1)) == quantiles(energies)
    assert dict(quantiles(energies, np.where(energies < 100, 9.0, 1.0)))[0.5] == 99
    pairs = quantiles(energies, np.where(energies % 3 == 0, -1.0, 1.0))
    assert [e for _, e in pairs] == sorted(e for _, e in pairs)


def test_training_and_calibration_keep_those_of_the_backend_that_scores(tmp_path):
    events = load_events("toy:3000")
    with pytest.warns(UserWarning, match="cannot guarantee"):
        bundle = fit(events, lambda b, x: load_scorer(b).energy(x), hidden_dim=8, n_layers=1, n_sigmas=3,
                     steps=20).bundle
    with pytest.warns(UserWarning, match="cannot guarantee"):
        again = recalibrate(bundle, events, lambda x: load_scorer(bundle).energy(x) + 1)
    x = events[split(events).calibrate].background().x
    assert bundle.quantiles == quantiles(load_scorer(bundle).energy(x))
    assert again.quantiles == quantiles(load_scorer(bundle).energy(x) + 1)
    assert again.digest == bundle.digest  # no energy depends on them
    again.save(tmp_path / "model")
    assert Bundle.load(tmp_path / "model").quantiles == again.quantiles


def test_a_model_of_an_earlier_version_has_none(tmp_path):
    replace(Bundle.load(DEMO), quantiles=PAIRS).save(tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    description = json.loads(path.read_text())
    assert description.pop("quantiles") == [list(pair) for pair in PAIRS]
    path.write_text(json.dumps(description))
    assert Bundle.load(tmp_path / "model").quantiles == ()


@pytest.mark.parametrize("bad", [
    ((0.5, np.nan),), ((0.5, 1.0), (0.9, 0.5)), ((0.5, 1.0), (0.5, 2.0)), ((0.0, 1.0),), ((1.0, 1.0),),
    ((np.nan, 1.0),),
])  # fmt: skip
def test_quantiles_that_are_none_are_refused(bad):
    with pytest.raises(DataError, match="quantiles must be pairs"):
        replace(Bundle.random(3, 4), quantiles=bad)


@pytest.mark.parametrize("bad", [[[0.5]], [[0.5, 1, 2]], ["ab"], 7, [None]])
def test_a_damaged_file_is_named(tmp_path, bad):
    Bundle.load(DEMO).save(tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantiles": bad}))
    with pytest.raises(DataError, match=f"{tmp_path / 'model'}: "):
        Bundle.load(tmp_path / "model")


def edges_of(bundle: Bundle, folder, **settings) -> list[float]:
    bundle.save(folder / "model")
    return Service(Settings(model=folder / "model", threads=1, **settings)).metrics.scores.edges.tolist()


def test_the_bins_are_those_of_the_settings_else_of_the_model_else_general_ones(tmp_path, caplog):
    demo = replace(Bundle.load(DEMO), quantiles=PAIRS)
    with caplog.at_level(logging.WARNING):
        assert edges_of(demo, tmp_path, score_edges=(1, 2)) == [1, 2]
        assert edges_of(demo, tmp_path) == [-3.5, -1, 2.25]
        assert not caplog.records
        assert edges_of(replace(demo, quantiles=()), tmp_path) == list(SCORE_EDGES)
    assert "'python -m ebm calibrate' adds them" in caplog.text


def test_the_bins_are_what_prometheus_reads(tmp_path):
    replace(Bundle.load(DEMO), quantiles=PAIRS).save(tmp_path / "model")
    with serving(tmp_path / "model", threads=1) as process:
        lines = urlopen(f"{process.url}/metrics").read().decode().splitlines()
    assert [line.split('"')[1] for line in lines if line.startswith("fused_ebm_score_bucket")] == [
        "-3.5", "-1", "2.25", "+Inf"]


def test_counts_go_on_with_the_same_edges_and_begin_again_with_others():
    distribution = ScoreDistribution([0.0, 1.0])
    distribution.observe(np.array([0.5, 2.0], np.float32))
    distribution.start((0.0, 1.0))
    assert distribution.counts.tolist() == [0, 1, 1]
    distribution.start([0.0, 1.0, 2.0])
    assert (distribution.counts.tolist(), distribution.sum) == ([0, 0, 0, 0], 0.0)
