"""EBMDetector: scikit-learn's own check suite, what it finds, and what it refuses."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from ebm.detector import EBMDetector
from ebm.metrics import auroc
from ebm.preprocess import Preprocessing
from kernels import load_scorer

TINY = {"hidden_dim": 16, "n_layers": 1, "n_sigmas": 3, "steps": 20, "batch_size": 32}


def ring(n, seed=0):
    """Events on a circle: density, not distance from the mean, tells them from what lies inside."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(-np.pi, np.pi, n)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.05 * rng.normal(size=(n, 2))


@pytest.fixture(scope="module")
def detector():
    return EBMDetector(hidden_dim=64, steps=800, batch_size=128, lr=3e-3, contamination=0.02).fit(ring(1000))


@pytest.mark.filterwarnings("ignore:constant in background")
@parametrize_with_checks([EBMDetector(**TINY), EBMDetector(**TINY, method="max", members=2, patience=400)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_finds_what_distance_from_the_mean_does_not(detector):
    inside = 0.3 * np.random.default_rng(1).normal(size=(1000, 2))
    x, y = np.concatenate([ring(1000, 1), inside]), np.repeat([0, 1], 1000)
    assert auroc(y, -detector.score_samples(x)) > 0.95
    assert auroc(y, np.linalg.norm(x, axis=1)) < 0.1
    for method in ("mean", "max", "log_mean_exp"):
        other = clone(detector).set_params(method=method)
        other.fit(ring(1000))
        assert auroc(y, -other.score_samples(x)) > 0.95
    by_level = EBMDetector(**detector.get_params() | {"level": 0}).fit(ring(1000))
    assert not np.allclose(by_level.score_samples(x), detector.score_samples(x))


def test_the_share_of_outliers_is_that_asked_for(detector):
    x = ring(1000)
    flagged = detector.predict(x) == -1
    assert flagged.sum() == 20
    assert np.array_equal(flagged, detector.decision_function(x) < 0)
    np.testing.assert_allclose(detector.decision_function(x), detector.score_samples(x) - detector.offset_)
    assert np.array_equal(pickle.loads(pickle.dumps(detector)).predict(x), detector.predict(x))


def test_the_model_in_it_is_one_that_kernels_run(detector, tmp_path):
    detector.bundle_.save(tmp_path / "m")
    x = ring(50, 2).astype(np.float32)
    np.testing.assert_allclose(load_scorer(tmp_path / "m").energy(x), -detector.score_samples(x), rtol=1e-3, atol=1e-3)
    assert detector.history_[0].terms.keys() == {"dsm"}


def test_the_same_random_state_gives_the_same_scores(detector):
    x = ring(60)
    fits = [EBMDetector(**TINY, random_state=state).fit(x).score_samples(x) for state in (1, 1, 2)]
    assert np.array_equal(fits[0], fits[1])
    assert not np.array_equal(fits[0], fits[2])
    state = np.random.RandomState(0)
    fits = [EBMDetector(**TINY, random_state=state).fit(x).score_samples(x) for _ in range(2)]
    assert not np.array_equal(*fits)


@pytest.mark.filterwarnings("ignore:constant in background")
def test_missing_constant_and_all_missing_columns():
    x = np.random.default_rng(0).normal(size=(60, 4))
    x[::3, 1], x[:, 2], x[:, 3] = np.nan, 5.0, np.nan
    detector = EBMDetector(**TINY).fit(x)
    assert np.isfinite(detector.score_samples(x)).all()
    other = x.copy()
    other[:, 2:] = 1e6  # never varied, so without influence
    np.testing.assert_array_equal(detector.score_samples(other), detector.score_samples(x))


@pytest.mark.filterwarnings("ignore:constant in background")
def test_what_cannot_be_fitted_is_said():
    x = ring(40)
    for change, data, message in (
        ({}, x[:1], "1 sample"), ({}, np.ones((9, 3)), "every feature is constant in the 9 background events"),
        ({}, np.full((9, 3), np.nan), "every feature is constant"), ({}, x * [1, np.inf], "infinity"),
        ({}, np.zeros((9, 300)), "300 features, expected 1 to 256"),
        ({"contamination": 0.0}, x, "contamination is 0.0"), ({"contamination": 0.6}, x, "contamination is 0.6"),
        ({"method": "likelihood"}, x, "'likelihood', expected"), ({"level": 3}, x, "expected a level from 0 to 2"),
        ({"steps": 0}, x, "steps is 0"),
        ({"members": 100}, x, "100 members"),
    ):
        with pytest.raises(ValueError, match=message):
            EBMDetector(**TINY | change).fit(data)
    with pytest.raises(RuntimeError, match="diverged"):
        EBMDetector(**TINY | {"lr": 1e30}).fit(x)


def test_names_of_columns_are_kept():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    detector = EBMDetector(**TINY).fit(pandas.DataFrame(ring(30), columns=["MET", "ht"]))
    assert detector.bundle_.schema.features == ("MET", "ht")
    assert isinstance(detector.bundle_.preprocessing, Preprocessing)
