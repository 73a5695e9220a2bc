"""Signal efficiencies: what the intervals cover, and what weights change."""

import numpy as np
import pytest
from scipy.stats import norm

from ebm.efficiency import Sample, checked, clopper_pearson, cut_at_rejection, signal_efficiency


def sample(scores, weights=None):
    scores = np.asarray(scores, float)
    return Sample(scores, np.ones(len(scores)) if weights is None else np.asarray(weights, float))


def test_what_lies_above_a_cut():
    s = sample([3, 1, 2, 2, 5], [1, 1, 2, 4, -1])
    assert s.total == 7
    assert s.number(np.array([0, 1, 2, 4.9, 5])).tolist() == [5, 4, 2, 1, 0]
    assert s.number(2, "left") == 4
    assert s.share(2) == 0
    assert s.share(np.array([0.0, 1.0])) == pytest.approx([1, 6 / 7])
    assert s.n_eff == 49 / 23
    assert (sample([1, 2, 3, 4]).cut(0.5), sample([1, 2, 2, 4]).cut(0.5), sample([1, 2]).cut(1)) == (2, 2, -np.inf)
    assert sample([1, 2, 3, 4], [1, 1, 1, 7]).cut(0.5) == 4  # the heavy one does not fit


@pytest.mark.parametrize("n", [50, 999, 20_000])
def test_the_cut_and_how_sure_it_is(n):
    """Between the cuts of `interval_of_cut` the true rejection lies in at least 95% of samples, whatever the size."""
    rejection, rng, inside = 0.99, np.random.default_rng(0), 0
    resolved, signal = n * (1 - rejection) >= 1, sample(norm.isf((np.arange(4000) + 0.5) / 4000))
    for _ in range(200):
        point = signal_efficiency(signal, sample(rng.normal(size=n)), rejection)
        if not resolved:
            assert np.isnan([point["efficiency"], *point["interval"], *point["interval_of_cut"]]).all()
            continue
        low, high = point["interval_of_cut"]
        assert low <= point["efficiency"] <= high
        inside += low <= 0.01 <= high  # signal like background: its efficiency at the true cut
    assert not resolved or inside / 200 > 0.95 - 3 * np.sqrt(0.05 * 0.95 / 200)


def test_the_whole_interval_covers_the_true_efficiency():
    rng, rejection = np.random.default_rng(1), 0.99
    true = norm.sf(norm.isf(0.01) - 1)
    covered = {"interval": 0, "interval_with_cut": 0}
    for _ in range(400):
        point = signal_efficiency(sample(rng.normal(1, 1, 2000)), sample(rng.normal(size=1000)), rejection)
        for name in covered:
            covered[name] += point[name][0] <= true <= point[name][1]
        inner, outer = point["interval"], point["interval_with_cut"]
        assert outer[0] <= inner[0] <= inner[1] <= outer[1]
    assert covered["interval_with_cut"] / 400 >= 0.95
    assert covered["interval"] / 400 < 0.6  # what is usually quoted: signal's uncertainty alone


def test_equal_weights_change_nothing():
    rng = np.random.default_rng(2)
    s, b = rng.normal(2, 1, 500), rng.normal(size=20_000)
    plain = signal_efficiency(sample(s), sample(b), 0.999)
    weighted = signal_efficiency(sample(s, np.full(500, 0.25)), sample(b, np.full(20_000, 3.0)), 0.999)
    assert plain["n_background"] == weighted["n_background"] == 20
    for key, value in plain.items():
        assert weighted[key] == pytest.approx(value), key
    repeated = signal_efficiency(sample(np.repeat(s, 2)), sample(b, np.where(b > 3, 2.0, 1.0)), 0.999)
    assert repeated["efficiency"] < plain["efficiency"]  # a heavier tail moves the cut


def test_a_wide_spread_of_weights_resolves_less():
    rng = np.random.default_rng(3)
    b, w = rng.normal(size=2000), rng.lognormal(0, 2, 2000)
    assert cut_at_rejection(b, 0.999) > 0
    assert np.isnan(signal_efficiency(sample([1.0]), sample(b, w), 0.999)["efficiency"])


def test_clopper_pearson_of_effective_numbers():
    assert clopper_pearson(0.0, 10.5)[0] == 0
    low, high = clopper_pearson(2.5, 10.5)
    assert clopper_pearson(2, 10)[0] < low < 2.5 / 10.5 < high < clopper_pearson(3, 10)[1]


@pytest.mark.parametrize(("y", "s", "w", "message"), [
    ([0, 0], [1.0, 2.0], None, "both present"), ([], [], None, "both present"), ([1], [1.0], None, "both present"),
    ([0, 1, 2], [1.0, 2.0, 3.0], None, "labels"), ([0.0, np.nan], [1.0, 2.0], None, "labels"),
    ([0, 1], [1.0], None, "one shape"), ([[0, 1]], [[1.0, 2.0]], None, "one shape"),
    ([0, 1], [1.0, np.nan], None, "1 of 2 scores are NaN"), ([0, 1], [1.0, 2.0], [1.0], "one weight for each of 2"),
    ([0, 1], [1.0, 2.0], [1.0, np.inf], "1 of 2 weights are not finite"),
    ([0, 1], [1.0, 2.0], [0.0, 1.0], "weights of the background sum to 0"),
    ([0, 1, 1], [1.0, 2.0, 3.0], [1.0, 1.0, -1.0], "weights of the signal sum to 0"),
])
def test_bad_input(y, s, w, message):
    with pytest.raises(ValueError, match=message):
        checked(y, s, w)
