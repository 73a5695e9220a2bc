"""The threshold as an order statistic: ranks, guarantee, ties, coverage."""

import warnings

import numpy as np
import pytest
from scipy.stats import beta

from ebm.events import DataError
from ebm.threshold import calibrate, events_needed, largest_rank


@pytest.mark.parametrize(("n", "rank"), [(29_955, 0), (29_956, 1), (100_000, 5), (1_000_000, 84)])
def test_golden_ranks(n, rank):
    assert largest_rank(n) == rank


@pytest.mark.parametrize(("rate", "confidence", "n"), [(1e-4, 0.95, 29_956), (0.01, 0.95, 299), (0.5, 0.5, 1),
                                                       (0.05, 0.99, 90), (1e-6, 0.95, 2_995_731)])
def test_events_needed(rate, confidence, n):
    assert events_needed(rate, confidence) == n
    assert 1 - (1 - rate) ** n >= confidence
    assert 1 - (1 - rate) ** (n - 1) < confidence


@pytest.mark.parametrize(("n", "rate", "confidence"), [(500, 0.01, 0.9), (5000, 0.01, 0.95), (300, 0.2, 0.99)])
def test_rank_is_the_largest_that_suffices(n, rate, confidence):
    r = largest_rank(n, rate, confidence)
    assert beta.cdf(rate, r, n + 1 - r) >= confidence > beta.cdf(rate, r + 1, n - r)


def test_threshold_is_that_order_statistic():
    energies = np.random.default_rng(0).permutation(100_000).astype(np.float32)
    t = calibrate(energies, level=5)
    assert (t.energy, t.rank, t.n_background, t.level) == (99_995.0, 5, 100_000, 5)
    assert t.guaranteed
    assert t.upper_bound <= t.rate
    assert (energies > t.energy).sum() == 4  # strict: the event on the threshold is not flagged


def test_too_few_events():
    with pytest.warns(UserWarning, match="29956 are needed") as caught:
        t = calibrate(np.arange(1000, dtype=np.float32))
    assert len(caught) == 1
    assert (t.energy, t.rank, t.guaranteed) == (999.0, 1, False)
    assert t.upper_bound == pytest.approx(1 - 0.05 ** (1 / 1000))
    with pytest.warns(UserWarning, match="299 are needed"):
        calibrate(np.zeros(10), rate=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibrate(np.arange(29_956.0)).guaranteed


def test_ties_flag_fewer():
    energies = np.concatenate([np.zeros(99_900), np.ones(100)])
    t = calibrate(energies)
    assert t.energy == 1.0
    assert (energies > t.energy).sum() == 0


def test_float32_and_float64_energies_give_the_same_flags():
    energies = np.random.default_rng(1).normal(size=100_000) * 1e3
    for given in (energies, energies.astype(np.float32)):
        t = calibrate(given)
        assert np.float32(t.energy) == t.energy
        narrow = energies.astype(np.float32)
        flags = narrow > np.float32(t.energy)
        assert np.array_equal(flags, narrow.astype(np.float64) > t.energy)
        assert flags.sum() <= t.rank - 1
        assert (energies > t.energy).sum() <= t.rank - 1


@pytest.mark.parametrize("energies", [np.array([]), np.array([1.0, np.nan]), np.array([1.0, np.inf]),
                                      np.zeros((5, 2))])
def test_bad_energies(energies):
    with pytest.raises(DataError):
        calibrate(energies)


@pytest.mark.parametrize(("rate", "confidence"), [(0.0, 0.95), (1.0, 0.95), (1e-4, 1.0), (-1, 0.5)])
def test_bad_rate(rate, confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibrate(np.arange(10.0), rate, confidence)


def test_coverage_by_simulation():
    """In at least 95% of repetitions the true rate is within the asked one; the heavy tail does not matter."""
    rng, rate, repetitions = np.random.default_rng(0), 0.01, 1000
    within = 0
    for _ in range(repetitions):
        t = calibrate(rng.pareto(1.5, 1000).astype(np.float32), rate)
        true_rate = (1 + t.energy) ** -1.5
        within += true_rate <= rate
    nominal = beta.cdf(rate, t.rank, 1001 - t.rank)
    assert nominal >= 0.95
    assert within / repetitions == pytest.approx(nominal, abs=4 * np.sqrt(0.05 * 0.95 / repetitions))
