"""The threshold as an order statistic: ranks, guarantee, ties, coverage."""

import warnings

import numpy as np
import pytest
from scipy.stats import beta

from ebm.events import DataError, Events, Schema
from ebm.threshold import (
    ClassThresholds,
    Threshold,
    calibrate,
    calibrate_by,
    events_needed,
    largest_rank,
    prescale_for,
    trigger_rate,
)


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


def test_equal_weights_change_nothing():
    energies = np.random.default_rng(0).normal(size=40_000)
    assert calibrate(energies, weights=np.full(40_000, 0.3)) == calibrate(energies)
    assert calibrate(energies, weights=None).n_eff is None


def test_the_weighted_law_is_the_unweighted_one_for_nearly_equal_weights():
    energies = np.random.default_rng(0).normal(size=100_000)
    weights = np.ones(100_000)
    weights[0] += 1e-9
    with pytest.warns(UserWarning, match="count as 100000 where the threshold is, guarantee no rate"):
        weighted = calibrate(energies, weights=weights)
    plain = calibrate(energies)
    assert (weighted.energy, weighted.rank) == (plain.energy, plain.rank)
    assert weighted.upper_bound == pytest.approx(plain.upper_bound)
    assert weighted.expected_rate == pytest.approx(plain.expected_rate)
    assert not weighted.guaranteed


@pytest.mark.filterwarnings("ignore:.*weighted background events")
def test_weights_move_the_threshold():
    rng = np.random.default_rng(0)
    energies = rng.standard_exponential(50_000)
    light = calibrate(energies, 0.01, weights=np.where(energies > 3, 0.1, 1))
    heavy = calibrate(energies, 0.01, weights=np.where(energies > 3, 10.0, 1))
    plain = calibrate(energies, 0.01)
    assert light.energy < plain.energy < heavy.energy
    assert light.upper_bound <= 0.01
    # A weight that is not there, and another order of events that are equal, change nothing.
    weights = rng.integers(1, 5, 50_000).astype(float)
    coarse = np.round(energies, 1)
    order = rng.permutation(50_000)
    t = calibrate(coarse, 0.01, weights=weights)
    assert calibrate(coarse[order], 0.01, weights=weights[order]) == t
    more = calibrate(np.append(coarse, 99.0), 0.01, weights=np.append(weights, 0.0))
    assert (more.energy, more.n_background) == (t.energy, 50_001)


@pytest.mark.filterwarnings("ignore:.*weighted background events")
def test_negative_weights_lower_no_bound():
    """The lower the threshold the higher the bound, though the sum of weights above it falls in between."""
    energies = np.arange(5000.0)
    weights = np.where(energies % 3 == 0, -1.0, 1.0)
    weights[4940:4960] = -1.0
    rates = np.geomspace(0.01, 0.5, 50)
    found = [calibrate(energies, rate, weights=weights) for rate in rates]
    assert all(t.upper_bound <= rate for t, rate in zip(found, rates))
    assert found[0].energy >= 4960 > 4940 > found[-1].energy
    assert (np.diff([t.energy for t in found]) <= 0).all()
    assert (np.diff([t.upper_bound for t in found]) >= 0).all()
    in_effect = [t.rank_eff / t.n_eff * weights.sum() for t in found]
    assert in_effect == pytest.approx([np.cumsum(weights[::-1])[: t.rank].max() for t in found])
    top = np.where(energies > 4998, -1.0, 1.0)
    known = calibrate(energies, 0.01, weights=top)
    assert 4900 < known.energy < 4999
    nothing = calibrate(energies[:2], 0.01, weights=np.array([3.0, -1.0]))
    assert (nothing.energy, nothing.upper_bound, nothing.rank) == (1.0, 1.0, 1)


def test_too_few_weighted_events():
    with pytest.warns(UserWarning, match="299 are needed"):
        t = calibrate(np.arange(100.0), 0.01, weights=np.arange(1, 101.0))
    assert (t.energy, t.guaranteed) == (99.0, False)
    assert t.upper_bound > 0.01


@pytest.mark.parametrize(("weights", "message"), [
    ([1.0, 1.0], "one weight for each of 3"), ([1.0, -1.0, 0.0], "sum to 0"), ([1.0, np.nan, 1.0], "finite"),
    ([np.inf, 1.0, 1.0], "finite"), ([-1.0, -1.0, -1.0], "positive sum"), ([[1.0], [1.0], [1.0]], "one weight"),
])
def test_bad_weights(weights, message):
    with pytest.raises(DataError, match=message):
        calibrate(np.arange(3.0), 0.5, weights=np.array(weights))


def test_classes_are_joined_until_they_can_guarantee():
    rng = np.random.default_rng(0)
    jets = np.repeat([0.0, 1.0, 2.0, 3.0, 4.0], [40, 300, 1000, 250, 100])  # 299 are needed
    energies = rng.normal(size=len(jets)) + jets
    by = calibrate_by("n_jets", jets, energies, 0.01)
    assert by.lowest == (0.0, 2.0, 3.0)
    assert [t.n_background for t in by.thresholds] == [340, 1000, 350]
    assert all(t.guaranteed for t in by.thresholds)
    assert by.thresholds[1] == calibrate(energies[jets == 2], 0.01)
    with pytest.warns(UserWarning, match="299 are needed"):
        few = calibrate_by("n_jets", jets[:100], energies[:100], 0.01)
    assert (few.lowest, few.thresholds[0].guaranteed) == ((0.0,), False)


def test_each_event_meets_the_threshold_of_its_class():
    schema = Schema("s", ("pt", "n_jets"), ("GeV", ""))
    t = [Threshold(e, 0.01, 0.95, 1, 300, 0.01, True, 0) for e in (1.0, 5.0)]
    by = ClassThresholds("n_jets", (1.0, 3.0), tuple(t))
    jets = np.array([0, 1, 2, 3, 9, 2, 3], np.float32)
    events = Events(schema, np.stack([np.zeros(7, np.float32), jets], 1), np.arange(7).astype(str))
    energy = np.array([2, 1, 1.5, 4, 6, 0, 5], np.float32)
    assert by.flag(events, energy).tolist() == [True, False, True, False, True, False, False]
    events.x[3, 1] = np.nan
    with pytest.raises(DataError, match="n_jets is missing in 1 of 7"):
        by.flag(events, energy)


@pytest.mark.parametrize(("values", "message"), [
    ([1.0], "one value of n_jets per energy"), ([1.0, np.nan, 2.0], "missing in 1 of 3"), ([], "per energy")])
def test_bad_classes(values, message):
    with pytest.raises(DataError, match=message):
        calibrate_by("n_jets", np.array(values), np.arange(3.0 if values else 0.0), 0.5)


def test_trigger_rate_and_prescale():
    t = calibrate(np.arange(100_000.0))
    expected, at_most = trigger_rate(t)
    assert expected == pytest.approx(40e6 * 5 / 100_001)
    assert at_most == t.upper_bound * 40e6 <= 4000
    assert trigger_rate(t, 1e5, 10) == pytest.approx((expected / 4000, at_most / 4000))
    assert prescale_for(t, 1000) == int(np.ceil(at_most / 1000)) == 4
    assert prescale_for(t, 1e9) == 1
    assert trigger_rate(t, prescale=prescale_for(t, 1000))[1] <= 1000
    for arguments in ((0.0,), (-1.0,), (np.inf,), (1e6, 0), (1e6, 1.5)):
        with pytest.raises(ValueError, match="input rate"):
            trigger_rate(t, *arguments)
    with pytest.raises(ValueError, match="budget"):
        prescale_for(t, 0)
