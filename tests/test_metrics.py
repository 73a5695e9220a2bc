"""Figures of merit against their definitions."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from ebm import metrics
from ebm.baselines import IsolationForest, MissingCount, Norm
from ebm.networks import EnergyNetwork


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    y = (rng.random(700) < 0.3).astype(np.int8)
    return y, np.round(rng.normal(size=700) + y, 1)  # rounded: with ties


def test_auroc_is_the_share_of_ordered_pairs(sample):
    y, s = sample
    pairs = s[y == 1][:, None] - s[y == 0][None]
    assert metrics.auroc(y, s) == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean())
    assert metrics.auroc(y, s) == pytest.approx(roc_auc_score(y, s))
    assert metrics.auroc(y, -s) == pytest.approx(1 - metrics.auroc(y, s))
    assert metrics.auprc(y, s) == pytest.approx(average_precision_score(y, s))


def test_clopper_pearson():
    assert metrics.clopper_pearson(0, 10) == pytest.approx((0, 0.3084971), abs=1e-6)
    assert metrics.clopper_pearson(10, 10) == pytest.approx((0.6915029, 1), abs=1e-6)
    assert metrics.clopper_pearson(4, 20) == pytest.approx((0.0573340, 0.4366140), abs=1e-6)


def test_efficiency_at_a_rejection_that_the_sample_resolves():
    background, signal = np.arange(20_000.0), np.array([19_996.0, 19_997.0, 19_998.0, 19_999.0])
    y = np.repeat([0, 1], [20_000, 4])
    result = metrics.evaluate_anomaly_detection(y, np.concatenate([background, signal]))
    assert metrics.cut_at_rejection(background) == 19_997  # keeps two: 19,998 and 19,999
    assert result["signal_efficiency"] == 0.5
    assert result["signal_efficiency_interval"] == metrics.clopper_pearson(2, 4)
    assert result["tightest_rejection"] == 0.9999
    assert {"auroc", "auprc", "signal_efficiency"} <= result.keys()


def test_efficiency_at_a_rejection_that_it_does_not_resolve():
    y = np.repeat([0, 1], [9_999, 4])
    result = metrics.evaluate_anomaly_detection(y, np.concatenate([np.arange(9_999.0), [0, 9_997.0, 9_997.5, 1e9]]))
    assert np.isnan(result["signal_efficiency"])
    assert np.isnan(result["signal_efficiency_interval"]).all()
    assert result["tightest_rejection"] == pytest.approx(1 - 1 / 9_999)
    assert result["signal_efficiency_at_tightest"] == 0.5


@pytest.mark.parametrize("n", [1, 2, 9_999, 10_000, 10_001, 30_000])
def test_the_cut_keeps_no_more_than_it_may(n):
    background = np.random.default_rng(n).integers(0, 500, n).astype(float)
    cut = metrics.cut_at_rejection(background)
    if n < 10_000:
        assert np.isnan(cut)
    else:
        assert (background > cut).sum() <= n * 1e-4


def test_bootstrap_is_that_of_resampled_events(sample):
    y, s = sample
    aurocs = metrics.bootstrap_auroc(y, [s], 4000)[:, 0]
    rng = np.random.default_rng(1)
    by_hand = []
    for _ in range(1000):
        rows = np.concatenate([rng.choice(np.flatnonzero(y == c), (y == c).sum()) for c in (0, 1)])
        by_hand.append(roc_auc_score(y[rows], s[rows]))
    assert aurocs.mean() == pytest.approx(np.mean(by_hand), abs=0.002)
    assert aurocs.std() == pytest.approx(np.std(by_hand), rel=0.1)


def test_paired_bootstrap(sample):
    y, s = sample
    noisy = s + np.random.default_rng(2).normal(size=len(s)) / 10
    difference, low, high = metrics.paired_bootstrap(y, s, noisy)
    assert difference == pytest.approx(metrics.auroc(y, s) - metrics.auroc(y, noisy))
    assert low < difference < high
    # Paired: far narrower than the difference of independent intervals.
    alone = np.subtract(*metrics.interval(metrics.bootstrap_auroc(y, [s])[:, 0])[::-1])
    assert high - low < alone / 3
    assert metrics.paired_bootstrap(y, s, s) == (0.0, 0.0, 0.0)
    assert metrics.paired_bootstrap(y, s, noisy) == (difference, low, high)
    chunked = metrics.bootstrap_auroc(y, [s, noisy], 20, seed=3)
    assert chunked.shape == (20, 2)


def test_bootstrap_in_chunks(sample, monkeypatch):
    y, s = sample
    monkeypatch.setattr(metrics, "_BOOTSTRAP_CELLS", 3 * len(y))
    aurocs = metrics.bootstrap_auroc(y, [s], 100)[:, 0]
    assert aurocs.std() == pytest.approx(metrics.bootstrap_auroc(y, [s], 400)[:, 0].std(), rel=0.3)
    assert aurocs.mean() == pytest.approx(metrics.auroc(y, s), abs=0.01)


@pytest.mark.parametrize(("y", "s", "message"), [
    ([0, 0], [1.0, 2.0], "both present"), ([0, 1, 2], [1.0, 2.0, 3.0], "labels"), ([0, 1], [1.0], "one shape"),
    ([0, 1], [1.0, np.nan], "NaN"),
])
def test_bad_input(y, s, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate_anomaly_detection(y, s)


def test_baselines():
    rng = np.random.default_rng(0)
    u = rng.normal(size=(500, 4)).astype(np.float32)
    missing = np.zeros(u.shape, bool)
    missing[0, 1:3] = True
    u[1] = 6
    for baseline in (Norm(), IsolationForest()):
        scores = baseline.fit(u[2:]).score(u, missing)
        assert scores.shape == (500,)
        assert scores.argmax() == 1
    assert MissingCount().fit(u).score(u, missing)[:2].tolist() == [2, 0]


def test_compute_anomaly_scores():
    network = EnergyNetwork(5, 16, n_sigmas=3)
    sigmas, u = (2.0, 0.5, 0.1), torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    energy = metrics.compute_anomaly_scores(network, u.numpy(), sigmas)
    np.testing.assert_array_equal(energy, network(u).detach().numpy())
    norm = metrics.compute_anomaly_scores(network, u.numpy(), sigmas, method="score_norm")
    score_at_the_lowest = network.energy_and_score(u, torch.full((7,), 2))[1].detach().numpy()
    np.testing.assert_allclose(norm, np.linalg.norm(score_at_the_lowest, axis=1), rtol=1e-6)
    with pytest.raises(ValueError, match="method is 'norm', expected 'energy' or 'score_norm'"):
        metrics.compute_anomaly_scores(network, u.numpy(), sigmas, method="norm")
