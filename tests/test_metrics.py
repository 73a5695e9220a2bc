"""Figures of merit against their definitions."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from ebm import metrics
from ebm.baselines import IsolationForest, MissingCount, Norm
from ebm.efficiency import clopper_pearson, cut_at_rejection


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
    assert clopper_pearson(0, 10) == pytest.approx((0, 0.3084971), abs=1e-6)
    assert clopper_pearson(10, 10) == pytest.approx((0.6915029, 1), abs=1e-6)
    assert clopper_pearson(4, 20) == pytest.approx((0.0573340, 0.4366140), abs=1e-6)


def test_efficiency_at_a_rejection_that_the_sample_resolves():
    background, signal = np.arange(20_000.0), np.array([19_996.0, 19_997.0, 19_998.0, 19_999.0])
    y = np.repeat([0, 1], [20_000, 4])
    result = metrics.evaluate_anomaly_detection(y, np.concatenate([background, signal]))
    assert cut_at_rejection(background) == 19_997  # keeps two: 19,998 and 19,999
    assert result["signal_efficiency"] == 0.5
    assert result["signal_efficiency_interval"] == clopper_pearson(2, 4)
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
    cut = cut_at_rejection(background)
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


def test_whole_weights_are_repeated_events(sample):
    y, s = sample
    w = np.random.default_rng(3).integers(0, 4, len(y))
    ys, ss = np.repeat(y, w), np.repeat(s, w)
    assert metrics.auroc(y, s, w) == pytest.approx(metrics.auroc(ys, ss))
    assert metrics.auprc(y, s, w) == pytest.approx(metrics.auprc(ys, ss))
    weighted, repeated = (metrics.evaluate_anomaly_detection(*a) for a in ((y, s, 0.9, w), (ys, ss, 0.9)))
    for key in ("auroc", "auprc", "prevalence", "signal_efficiency"):
        assert weighted[key] == pytest.approx(repeated[key]), key
    assert weighted["n_signal"] == (y == 1).sum()
    assert weighted["n_signal_effective"] < repeated["n_signal_effective"]
    strata = np.arange(len(y)) % 3
    assert metrics.stratified_auroc(y, s, strata, w) == pytest.approx(
        metrics.stratified_auroc(ys, ss, np.repeat(strata, w)))


def test_negative_weights_keep_their_sign(sample):
    """An event and its double with the opposite weight say nothing."""
    y, s = sample
    pair = np.concatenate([y, y[:100], y[:100]]), np.concatenate([s, s[:100] + 1, s[:100] + 1])
    w = np.concatenate([np.ones(len(y)), np.ones(100), -np.ones(100)])
    assert metrics.auroc(*pair, w) == pytest.approx(metrics.auroc(y, s))
    assert metrics.auprc(*pair, w) == pytest.approx(metrics.auprc(y, s))
    result = metrics.evaluate_anomaly_detection(*pair, 0.9, w)
    assert np.isfinite([result["signal_efficiency"], result["sic"]["max"]]).all()


def test_auprc_of_chance_is_the_prevalence():
    rng = np.random.default_rng(0)
    y = (rng.random(20_000) < 0.1).astype(int)
    result = metrics.evaluate_anomaly_detection(y, rng.normal(size=20_000))
    assert result["prevalence"] == y.mean()
    assert result["auprc"] == pytest.approx(result["prevalence"], rel=0.1)


def test_working_points():
    y = np.repeat([0, 1], [5000, 100])
    result = metrics.evaluate_anomaly_detection(y, np.concatenate([np.arange(5000.0), np.arange(4900.0, 5000) + 0.5]))
    points = result["working_points"]
    assert [p["rejection"] for p in points] == [0.99, 0.999, 0.9999]
    assert [p["n_background"] for p in points] == [50, 5, 0]
    assert [p["efficiency"] for p in points[:2]] == [0.51, 0.06]
    assert np.isnan(points[2]["efficiency"])
    assert np.isnan(result["signal_efficiency"])
    assert result["tightest_rejection"] == 1 - 1 / 5000
    assert result["signal_efficiency_at_tightest_interval_with_cut"][0] == 0  # that cut may as well lie above all
    assert result["sic"]["max"] == pytest.approx(1 / np.sqrt(99 / 5000))
    assert result["sic"]["background_efficiency"] == pytest.approx(99 / 5000)


def test_within_strata():
    """A score that only knows the stratum is chance within it."""
    rng = np.random.default_rng(0)
    strata = rng.integers(0, 4, 4000)
    y = (rng.random(4000) < 0.1 + 0.2 * strata).astype(int)
    assert metrics.auroc(y, strata) > 0.65
    assert metrics.stratified_auroc(y, strata, strata) == 0.5
    s = rng.normal(size=4000) + y
    by_hand = [metrics.auroc(y[strata == k], s[strata == k]) for k in range(4)]
    assert metrics.stratified_auroc(y, s, strata) == pytest.approx(np.average(by_hand, weights=np.bincount(strata, y)))
    alone = np.where(y == 1, strata, 9)
    assert np.isnan(metrics.stratified_auroc(y, s, alone))  # no stratum has both
    with pytest.raises(ValueError, match="one stratum for each"):
        metrics.stratified_auroc(y, s, strata[:5])


def test_weighted_bootstrap(sample):
    y, s = sample
    w = np.random.default_rng(3).uniform(0.5, 1.5, len(y))
    ones = np.ones(len(y))
    assert np.array_equal(metrics.bootstrap_auroc(y, [s], 20), metrics.bootstrap_auroc(y, [s], 20, weights=ones))
    samples = metrics.bootstrap_auroc(y, [s], 500, weights=w)[:, 0]
    assert samples.mean() == pytest.approx(metrics.auroc(y, s, w), abs=0.01)
    difference, low, high = metrics.paired_bootstrap(y, s, -s, weights=w)
    assert difference == pytest.approx(2 * metrics.auroc(y, s, w) - 1)
    assert low < difference < high


@pytest.mark.parametrize("one", [0, 1])
def test_one_event_of_a_class(one):
    y = np.repeat([one, 1 - one], [1, 30])
    result = metrics.evaluate_anomaly_detection(y, np.arange(31.0))
    assert result["auroc"] == 1 - one
    assert np.isfinite([result["auprc"], result["signal_efficiency_at_tightest"]]).all()
    assert np.isnan([result["signal_efficiency"], result["sic"]["max"]]).sum() == 2 - one


def test_infinite_scores_are_ranks_too():
    result = metrics.evaluate_anomaly_detection([0, 0, 1, 1], [-np.inf, 0.0, 1.0, np.inf])
    assert result["auroc"] == 1
