"""Significance improvement and AMS against their definitions."""

import numpy as np
import pytest
from scipy.stats import norm

from ebm.significance import HIGGSML_YIELDS, ams, ams_of, sic_curve, sic_max


@pytest.fixture
def labelled():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [20_000, 500])
    return y, rng.normal(size=20_500) + 2 * y


def test_sic_is_that_of_every_cut(labelled):
    y, s = labelled
    e_b, e_s, sic = sic_curve(y, s)
    assert len(sic) == 20_000 - 10 + 1
    assert (e_b[0], e_b[-1], e_s[-1], sic[-1]) == (10 / 20_000, 1, 1, 1)
    for i in (0, 100, 5000):
        cut = np.sort(s[y == 0])[::-1][10 + i]
        assert e_s[i] == (s[y == 1] > cut).mean()
        assert sic[i] == pytest.approx(e_s[i] / np.sqrt((s[y == 0] > cut).mean()))
    many = e_b > 0.01
    assert sic[many] == pytest.approx(norm.sf(norm.isf(e_b[many]) - 2) / np.sqrt(e_b[many]), rel=0.1)
    assert sic_max(y, s)["max"] == sic.max()


def test_no_maximum_without_ten_background_events():
    y = np.repeat([0, 1], [9, 50])
    assert np.isnan(list(sic_max(y, np.arange(59.0)).values())).all()
    y = np.repeat([0, 1], [1000, 50])
    best = sic_max(y, np.concatenate([np.arange(1000.0), np.full(50, 2000.0)]))
    assert best == {"max": pytest.approx(10), "background_efficiency": 0.01, "signal_efficiency": 1.0}


def test_ties_are_not_cut_through():
    y = np.repeat([0, 1], [100, 100])
    e_b, _, sic = sic_curve(y, np.repeat([0.0, 1.0, 1.0], [50, 50, 100]))
    assert e_b.tolist() == [0.5, 1.0]
    assert sic == pytest.approx([1 / np.sqrt(0.5), 1])


def test_weighted_sic_is_that_of_repeated_events(labelled):
    y, s = labelled
    w = np.random.default_rng(1).integers(1, 4, len(y))
    repeated = sic_max(np.repeat(y, w), np.repeat(s, w), least=200)
    weighted = sic_max(y, s, w.astype(float), least=100)
    assert weighted["max"] == pytest.approx(repeated["max"], rel=0.02)
    negative = np.where(np.arange(len(y)) % 5 == 0, -1.0, 1.0)
    assert np.isfinite(sic_curve(y, s, negative)[2]).all()


def test_ams():
    assert ams(100, 1000, 0) == pytest.approx(np.sqrt(2 * (1100 * np.log(1.1) - 100)))
    assert ams(1, 1e6) == pytest.approx(1 / np.sqrt(1e6), rel=1e-4)  # s / sqrt(b) for small s
    assert (ams(0, 0), ams(0, 100)) == (0, 0)
    assert ams(np.array([1.0, 2.0]), 5.0).shape == (2,)
    for s, b, b_reg in ((-1, 10, 10), (1, -10, 10), (1, 0, 0)):
        with pytest.raises(ValueError, match="AMS needs"):
            ams(s, b, b_reg)


def test_ams_at_full_luminosity(labelled):
    """A part of the sample has the AMS of the whole, up to fluctuations: its weights are scaled up."""
    y, s = labelled
    w = np.where(y == 1, HIGGSML_YIELDS[0] / 500, HIGGSML_YIELDS[1] / 20_000)
    all_of_it = ams_of(y, s, w, cut=2.0)
    by_hand = ams(w[(y == 1) & (s > 2)].sum(), w[(y == 0) & (s > 2)].sum())
    assert all_of_it["at_cut"] == pytest.approx(by_hand)
    assert all_of_it["max"] >= by_hand
    part = np.arange(len(y)) % 3 == 0
    assert ams_of(y[part], s[part], w[part], cut=2.0)["at_cut"] == pytest.approx(by_hand, rel=0.15)
    assert ams_of(y, s, 7 * w, cut=2.0) == pytest.approx(all_of_it)
    assert ams_of(y, s, w)["at_cut"] is not None
    assert np.isnan(ams_of(y, s, w)["at_cut"])
    best = np.quantile(s[y == 0], 1 - all_of_it["background_efficiency"])
    assert ams_of(y, s, w, cut=best)["at_cut"] == pytest.approx(all_of_it["max"], rel=0.01)
    few = np.concatenate([np.flatnonzero(y == 0)[:5], np.flatnonzero(y == 1)])
    assert np.isnan(ams_of(y[few], s[few], w[few])["max"])
