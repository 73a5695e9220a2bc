"""`load_particle_data`: background to train on, anomalies to find, and features chosen without labels."""

import inspect
import os
from pathlib import Path

import numpy as np
import pytest

from ebm.events import DataError, Schema, fold, load_events
from ebm.particle_data import ANOMALIES, inject, load_particle_data, select_features
from ebm.toy import generate


def save(path, n=2000, d=6, **more):
    rng = np.random.default_rng(0)
    np.savez(path, X=rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), **more)
    return path


def test_the_signature_of_the_case_study():
    parameters = inspect.signature(load_particle_data).parameters
    assert list(parameters)[:2] == ["filepath", "n_features"]
    assert parameters["n_features"].default == 64


def test_a_labelled_file_trains_on_its_background():
    x_train, x_val, x_test, y_test = load_particle_data("toy:5000")
    events = load_events("toy:5000")
    number = fold(events)
    assert x_train.shape == (((number < 6) & (events.label == 0)).sum(), 64)
    assert len(x_val) == ((number >= 6) & (number < 8)).sum()
    np.testing.assert_array_equal(y_test, events.label[number >= 8])
    assert y_test.sum() > 0
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in (x_train, x_val, x_test))
    present = x_train.std(axis=0) > 0
    assert present.sum() > 60
    measured = x_train[:, 40:56].astype(np.float64)  # what no event lacks
    np.testing.assert_allclose(measured.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(measured.std(axis=0), 1, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"y": np.zeros(2000)}])
def test_without_signal_anomalies_are_made_at_the_given_rate(tmp_path, more):
    path = save(tmp_path / "a.npz", **more)
    x_train, x_val, x_test, y_test = load_particle_data(path, anomaly_rate=0.1, seed=3)
    assert len(x_train) + len(x_val) + len(x_test) == 2000
    assert y_test.sum() == round(0.1 * len(y_test))
    again = load_particle_data(path, anomaly_rate=0.1, seed=3)
    for a, b in zip((x_train, x_val, x_test, y_test), again):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(x_test, load_particle_data(path, anomaly_rate=0.1, seed=4)[2])
    np.testing.assert_allclose(x_train.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(x_train.std(axis=0), 1, rtol=1e-4)


@pytest.fixture(scope="module")
def background():
    return generate("qcd", 4000, seed=1)


@pytest.mark.parametrize("kind", ANOMALIES)
def test_only_the_labelled_events_change(background, kind):
    x, y = inject(background.x, background.schema, background.x, 0.2, np.random.default_rng(0), kinds=(kind,))
    filled, before = (np.where(np.isnan(a), np.nanmedian(background.x, axis=0), a) for a in (x, background.x))
    changed = (filled != before).any(axis=1)  # what an imputed value would not undo
    np.testing.assert_array_equal(x[y == 0], background.x[y == 0])
    assert changed[y == 1].mean() > 0.99
    assert y.sum() == 800


def test_scaled_events_stay_consistent(background):
    """With all momenta s times as large, masses and HT are too, and MET / sqrt(HT) sqrt(s) times; shapes stay."""
    x, y = inject(background.x, background.schema, background.x, 0.2, np.random.default_rng(0), ("scaled_momenta",))
    column = {name: j for j, name in enumerate(background.schema.features)}
    with np.errstate(invalid="ignore"):
        ratio = (x / background.x)[y == 1]
    scale = ratio[:, column["MET"]]
    assert 2 < scale.min() < 2.2
    assert 3.8 < scale.max() < 4
    for name in ("obj0_E", "ht", "m_jj", "jet1_mass"):
        np.testing.assert_allclose(ratio[:, column[name]][~np.isnan(ratio[:, column[name]])],
                                   scale[~np.isnan(ratio[:, column[name]])], rtol=1e-5)
    filled = background.x[y == 1][:, column["met_over_sqrt_ht"]] > 0
    np.testing.assert_allclose(ratio[filled, column["met_over_sqrt_ht"]], np.sqrt(scale[filled]), rtol=1e-5)
    np.testing.assert_array_equal(x[:, column["thrust_t"]], background.x[:, column["thrust_t"]])


def test_a_resonance_is_a_narrow_peak(background):
    x, y = inject(background.x, background.schema, background.x, 0.2, np.random.default_rng(0), ("resonance",))
    j = background.schema.features.index("m_jj")
    mass = x[y == 1, j]
    mass = mass[~np.isnan(mass)]
    assert np.median(mass) == pytest.approx(np.nanquantile(background.x[:, j], 0.999), rel=0.01)
    assert mass.std() / mass.mean() == pytest.approx(0.02, rel=0.2)
    plain = Schema("table", ("a", "b"), ("", ""))
    values = np.random.default_rng(0).normal([0, 9], 1, size=(1000, 2)).astype(np.float32)
    x, y = inject(values, plain, values, 0.2, np.random.default_rng(0), ("resonance",))
    np.testing.assert_array_equal(x[:, 0], values[:, 0])
    assert x[y == 1, 1].std() < 0.5 * values[:, 1].std()


def test_anomalies_can_be_found(tmp_path):
    """The distance to background neighbours ranks what was injected above the rest."""
    from sklearn.metrics import roc_auc_score
    from sklearn.neighbors import NearestNeighbors

    x_train, _, x_test, y_test = load_particle_data(save(tmp_path / "a.npz", n=5000), anomaly_rate=0.2)
    distance = NearestNeighbors(n_neighbors=5).fit(x_train).kneighbors(x_test)[0].mean(axis=1)
    assert roc_auc_score(y_test, distance) > 0.75


def test_features_are_chosen_without_labels():
    rng = np.random.default_rng(0)
    independent = rng.normal(size=(3000, 4))
    copies = independent[:, :3] + 0.01 * rng.normal(size=(3000, 3))
    u = np.column_stack([independent[:, 0], copies, np.zeros(3000), independent[:, 1:]])
    u[:, :4] /= u[:, :4].std(axis=0)
    chosen = select_features(u, 4).tolist()
    assert chosen == sorted(chosen)
    groups = {0: 0, 1: 0, 2: 1, 3: 2, 5: 1, 6: 2, 7: 3}
    assert {groups[j] for j in chosen} == {0, 1, 2, 3}  # one of each group of copies, never the constant
    assert select_features(u, 64).tolist() == list(range(8))


def test_a_wide_file_is_narrowed(tmp_path):
    x_train, x_val, x_test, _ = load_particle_data(save(tmp_path / "a.npz", n=500, d=100))
    assert x_train.shape[1] == x_val.shape[1] == x_test.shape[1] == 64
    assert load_particle_data(tmp_path / "a.npz", n_features=7)[0].shape[1] == 7


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(DataError, match=r"a.npz: no .*event in the .* folds \(1 events in all\)"):
        load_particle_data(save(tmp_path / "a.npz", n=1))
    with pytest.raises(DataError, match=r"no background event in the train folds"):
        load_particle_data(save(tmp_path / "b.npz", n=50, y=np.ones(50)))
    with pytest.raises(ValueError, match="expected n_features > 0 and 0 < anomaly_rate < 1, given 0 and"):
        load_particle_data("toy:10", n_features=0)
    path = tmp_path / "c.npz"
    np.savez(path, X=np.column_stack([np.arange(300.0), np.full(300, np.nan)]))
    with pytest.warns(UserWarning, match="no event has a value in column x1"), \
            pytest.raises(DataError, match="feature 'x1' is missing in all"):  # fmt: skip
        load_particle_data(path)


@pytest.mark.skipif("FUSED_EBM_DATA" not in os.environ, reason="FUSED_EBM_DATA is not set: no real HiggsML file")
def test_real_file():
    path = Path(os.environ["FUSED_EBM_DATA"]) / "higgsml" / "training_kaggle_layout_even.csv.gz"
    x_train, x_val, x_test, y_test = load_particle_data(path)
    assert x_train.shape[1] == 30
    assert 0.3 < y_test.mean() < 0.4
    assert len(x_val) > 2000
    assert len(x_test) == len(y_test)
