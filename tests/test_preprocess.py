"""Preprocessing: what is fitted, what is missing, and the derivative that the score needs."""

from dataclasses import replace

import numpy as np
import pytest

from ebm.events import DataError, Schema
from ebm.preprocess import ASINH, IDENTITY, LOG1P, Preprocessing

SCHEMA = Schema("test", ("angle", "pt", "px", "count"), ("rad", "GeV", "GeV", ""), missing_marker=-999.0)


def background(n=4000, seed=0):
    rng = np.random.default_rng(seed)
    columns = rng.uniform(-3, 3, n), rng.exponential(50, n) ** 1.5, rng.standard_t(2, n) * 30, rng.integers(0, 5, n)
    return np.stack(columns, axis=1).astype(np.float32)


def test_transforms_follow_the_shape():
    p = Preprocessing.fit(background(), SCHEMA)
    assert p.transform.tolist() == [IDENTITY, ASINH, ASINH, IDENTITY]
    np.testing.assert_allclose(p.scale[1:3], np.median(np.abs(background()[:, 1:3]), axis=0), rtol=1e-6)
    u = p(background().astype(np.float64))
    np.testing.assert_allclose(u.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(u.std(0), 1, atol=1e-4)


@pytest.mark.parametrize(("shape", "transform"), [
    (lambda rng: rng.normal(size=4000), IDENTITY),
    (lambda rng: rng.exponential(size=4000), ASINH),  # kurtosis 9
    (lambda rng: np.append(rng.uniform(-1, 1, 3999), 9), ASINH),  # kurtosis 5, one value 15 standard deviations out
    (lambda rng: np.minimum(rng.geometric(0.5, 4000), 30), IDENTITY),  # a count, as long as its tail is
    (lambda rng: rng.integers(0, 2, 4000) * 1e6, IDENTITY),
])
def test_only_long_tails_are_compressed(shape, transform):
    x = shape(np.random.default_rng(1)).astype(np.float32)[:, None]
    assert Preprocessing.fit(x, Schema("test", ("x",), ("",))).transform[0] == transform


def test_a_tail_above_a_median_of_zero_is_measured_by_its_mean():
    x = np.maximum(np.random.default_rng(2).standard_t(2, 4000), 1)[:, None].astype(np.float32) - 1
    p = Preprocessing.fit(x, Schema("test", ("x",), ("GeV",)))
    assert p.transform[0] == ASINH
    assert p.scale[0] == pytest.approx(x.mean(), rel=1e-6)


def test_the_smallest_value_of_a_long_tail_is_no_outlier():
    """HT = 0 where there is no jet: log1p put it 11 standard deviations below the mean."""
    x = np.random.default_rng(3).lognormal(5, 1, (4000, 1)).astype(np.float32)
    x[0] = 0
    assert -3 < Preprocessing.fit(x, Schema("test", ("ht",), ("GeV",)))(x)[0, 0] < 0


@pytest.mark.parametrize("transform", [IDENTITY, LOG1P, ASINH])
def test_inverse_gives_the_event_back(transform):
    p = replace(Preprocessing.fit(background(), SCHEMA), transform=np.full(4, transform))
    x = background(100, 1).astype(np.float64)
    np.testing.assert_allclose(p.inverse(p(x)), x, rtol=1e-9, atol=1e-9)
    constant = replace(p, inv_std=np.zeros(4))
    np.testing.assert_allclose(constant(constant.inverse(p(x))), 0)


def test_values_are_float32_and_the_reference_uses_them():
    p = Preprocessing.fit(background(), SCHEMA)
    for name in ("marker", "impute", "scale", "mean", "inv_std"):
        assert getattr(p, name).dtype == np.float32
    x = background(100, 1)
    by_hand = (x[:, 0].astype(np.float64) - np.float64(p.mean[0])) * np.float64(p.inv_std[0])
    assert np.array_equal(p(x.astype(np.float64))[:, 0], by_hand)
    assert p(x).dtype == np.float32


def test_missing_values_become_the_median():
    x = background()
    x[::3, 1] = -999.0
    x[1::3, 2] = np.nan
    p = Preprocessing.fit(x, SCHEMA)
    assert p.impute[1] == np.float32(np.median(x[x[:, 1] != -999, 1]))
    assert np.isnan(p.impute[[0, 3]]).all()  # never missing in training: not allowed later either
    missing = p.missing(x)
    assert missing.sum(0).tolist() == [0, len(x[::3]), len(x[1::3]), 0]
    u = p(x)
    assert np.isfinite(u).all()
    assert len(np.unique(u[::3, 1])) == 1
    assert (p.derivative(x)[missing] == 0).all()
    assert (p.derivative(x)[~missing] > 0).all()
    broken = x[:1].copy()
    broken[0, 0] = np.nan
    assert np.isnan(p(broken)[0, 0])


def test_optional_features_may_be_missing_later():
    schema = Schema("test", SCHEMA.features, SCHEMA.units, optional=(False, True, False, False))
    p = Preprocessing.fit(background(), schema)
    assert np.isfinite(p.impute).tolist() == [False, True, False, False]


def test_every_finite_value_stays_finite():
    p = Preprocessing.fit(background(), SCHEMA)
    x = np.array([[3.0, 3e38, -3e38, 4], [-3.0, -3e38, 3e38, 0], [0, 0, 0, 0]], np.float32)
    assert np.isfinite(p(x)[:, 1:3]).all()


def test_derivative_against_finite_differences():
    p = Preprocessing.fit(background(), SCHEMA)
    x = background(200, 2).astype(np.float64) + 0.01
    step = 1e-5 * np.maximum(1, np.abs(x))
    numeric = np.stack([(p(x + step * e) - p(x - step * e))[:, j] / (2 * step[:, j])
                        for j, e in enumerate(np.eye(4))], axis=1)
    np.testing.assert_allclose(p.derivative(x), numeric, rtol=1e-6, atol=1e-9)


def test_large_mean_keeps_its_digits():
    """mean / std = 1e4: subtracting the mean first loses nothing that the input has."""
    rng = np.random.default_rng(0)
    x = (1e5 + 10 * rng.normal(size=(5000, 1))).astype(np.float32)
    p = Preprocessing.fit(x, Schema("test", ("m",), ("GeV",)))
    exact = (x.astype(np.float64) - p.mean.astype(np.float64)) * p.inv_std.astype(np.float64)
    np.testing.assert_allclose(p(x), exact, rtol=1e-6, atol=1e-6)
    assert exact.std() == pytest.approx(1, rel=1e-3)
    assert abs(exact.mean()) < 1e-3


def test_constant_column_keeps_its_place():
    x = background()
    x[:, 3] = 7
    with pytest.warns(UserWarning, match="count"):
        p = Preprocessing.fit(x, SCHEMA)
    assert p.n_features == 4
    other = background(10, 3)
    assert (p(other)[:, 3] == 0).all()
    assert (p.derivative(other)[:, 3] == 0).all()


@pytest.mark.parametrize("value", [np.nan, -999.0])
def test_column_without_a_value(value):
    x = background()
    x[:, 2] = value
    with pytest.raises(DataError, match=r"'px' is missing in all 4000"):
        Preprocessing.fit(x, SCHEMA)


def test_bad_background():
    x = background()
    x[5, 1] = np.inf
    with pytest.raises(DataError, match=r"'pt' is infinite in 1 "):
        Preprocessing.fit(x, SCHEMA)
    for shape in ((0, 4), (10, 3), (10,)):
        with pytest.raises(DataError, match=r"\(n, 4\)"):
            Preprocessing.fit(np.zeros(shape, np.float32), SCHEMA)
