"""Every baseline: fitted on background, high for what is unusual, the same each time."""

import numpy as np
import pytest
import torch

from ebm import baselines as module
from ebm import hep64, higgsml
from ebm.baselines import AutoencoderError, baselines, build_autoencoder, train_autoencoder
from ebm.events import Schema
from ebm.metrics import auroc
from ebm.preprocess import Preprocessing

SCHEMA = Schema("test", ("ht", "b", "c", "d"), ("",) * 4)


@pytest.fixture
def sample():
    """Background on a plane in four dimensions; half of the anomalies leave it, half lie far out on it."""
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(2, 4))
    background = (rng.normal(size=(600, 2)) @ plane + 0.05 * rng.normal(size=(600, 4))).astype(np.float32)
    off = rng.normal(size=(50, 4)).astype(np.float32)
    far = (6 * rng.normal(size=(50, 2)) @ plane).astype(np.float32)
    return background[:400], np.concatenate([background[400:], off, far]), np.repeat([0, 1], [200, 100])


def test_all_of_them(sample):
    fitted, u, y = sample
    missing = np.zeros(u.shape, bool)
    scores = {b.name: b.fit(fitted).score(u, missing) for b in baselines(SCHEMA)}
    assert list(scores) == ["|x|", "n_missing", "n_objects", "HT", "Mahalanobis", "isolation forest", "KNN (k=5)",
                            "LOF", "autoencoder (latent 8)", "autoencoder (latent 3)"]
    for name, s in scores.items():
        assert s.shape == (300,), name
        assert np.isfinite(s).all(), name
        if name in ("Mahalanobis", "isolation forest", "KNN (k=5)", "LOF", "autoencoder (latent 3)"):
            assert auroc(y, s) > 0.8, name
    again = {b.name: b.fit(fitted).score(u, missing) for b in baselines(SCHEMA)}
    for name, s in scores.items():
        assert np.array_equal(s, again[name]), name


def test_against_their_definitions(sample):
    fitted, u, _ = sample
    none = np.zeros(u.shape, bool)
    by_name = {b.name: b.fit(fitted) for b in baselines(SCHEMA) if not b.name.startswith(("auto", "iso", "LOF"))}
    distances = np.sort(np.linalg.norm(u[:, None].astype(float) - fitted[None], axis=2), axis=1)
    np.testing.assert_allclose(by_name["KNN (k=5)"].score(u, none), distances[:, :5].mean(1), rtol=1e-3, atol=1e-3)
    delta = u - fitted.mean(0, dtype=float)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", delta, np.linalg.inv(np.cov(fitted.T.astype(float), ddof=0)), delta))
    np.testing.assert_allclose(by_name["Mahalanobis"].score(u, none), expected, rtol=1e-3)
    np.testing.assert_allclose(by_name["HT"].score(u, none), u[:, 0])
    missing = np.random.default_rng(1).random(u.shape) < 0.3
    assert np.array_equal(by_name["n_missing"].score(u, missing), missing.sum(1))
    assert np.array_equal(by_name["n_objects"].score(u, missing), 4 - missing.sum(1))


def test_constant_columns_and_few_events():
    u = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    u[:, 2] = 0
    for b in baselines(SCHEMA):
        assert np.isfinite(b.fit(u).score(u, np.zeros(u.shape, bool))).all(), b.name
    with pytest.raises(ValueError, match="at least 2 background events, given 1"):
        module.LocalOutlierFactor().fit(u[:1])


def test_neighbours_are_looked_for_among_a_sample(sample, monkeypatch):
    monkeypatch.setattr(module, "_NEIGHBOUR_EVENTS", 100)
    fitted, u, y = sample
    for b in (module.Neighbours(), module.LocalOutlierFactor()):
        assert auroc(y, b.fit(fitted).score(u, np.zeros(u.shape, bool))) > 0.8
    assert module.Neighbours().fit(fitted).neighbours.n_samples_fit_ == 100


def test_ht_of_the_known_layouts():
    for schema, column in ((hep64.SCHEMA, "ht"), (higgsml.SCHEMA, "PRI_jet_all_pt")):
        ht = next(b for b in baselines(schema) if b.name == "HT")
        assert schema.features[ht.column] == column
        x = np.random.default_rng(0).permuted(np.tile(np.geomspace(1, 999, 100), (schema.n_features, 1)), axis=1).T
        x = x.astype(np.float32)
        u = Preprocessing.fit(x, schema)(x)
        assert np.array_equal(np.argsort(ht.fit(u).score(u, np.isnan(x))), np.argsort(x[:, ht.column]))
    assert "HT" not in [b.name for b in baselines(Schema("other", ("a",), ("",)))]


def test_train_autoencoder():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(400, 3)) @ rng.normal(size=(3, 12))).astype(np.float32)

    def run(**options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return train_autoencoder(build_autoencoder(12, 4), x, **options)

    model, losses = run(n_epochs=20, batch_size=64)
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
    assert run(n_epochs=20, batch_size=64)[1] == losses
    assert [tuple(layer.weight.shape) for layer in build_autoencoder().layers] == [
        (128, 64), (64, 128), (8, 64), (64, 8), (128, 64), (64, 128)]
    for bad, message in (
        ((model, x[:, :5]), r"\(n, 12\)"), ((model, x[:0]), "n > 0"), ((model, x * np.nan), "400 of 400"),
        ((model, x, 0), "one epoch"), ((model, x, 1, 1e-3, 0), "one event per batch"),
    ):
        with pytest.raises(ValueError, match=message):
            train_autoencoder(*bad)
    with pytest.raises(RuntimeError, match="diverged"):
        train_autoencoder(model, x, lr=1e30)


def test_huber_loss():
    u = np.array([[0.0] * 4, [0.5] * 4, [5.0] * 4], np.float32)
    for loss, of in (("mse", lambda r: r**2), ("huber", lambda r: np.where(abs(r) <= 1, r**2 / 2, abs(r) - 0.5))):
        torch.manual_seed(0)
        model = build_autoencoder(4, 2)
        with torch.no_grad():
            residual = (model(torch.from_numpy(u)) - torch.from_numpy(u)).double().numpy()
        _, losses = train_autoencoder(model, u, n_epochs=1, loss=loss)
        assert losses == [pytest.approx(of(residual).mean(), rel=1e-6)]
    with pytest.raises(ValueError, match="loss is 'l1', expected 'mse' or 'huber'"):
        train_autoencoder(model, u, loss="l1")
    u = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    mse, huber = (AutoencoderError(2, loss=loss).fit(u).score(u, u > 9) for loss in ("mse", "huber"))
    assert not np.array_equal(mse, huber)
