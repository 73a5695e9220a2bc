"""The 64 features against answers that are known exactly."""

import numpy as np
import pytest

from ebm.events import DataError
from ebm.hep64 import ELECTRON, JET, MUON, NONE, PHOTON, SCHEMA, Objects, features

SHAPES = ["sphericity", "aplanarity", "sphericity_t", "c_lin", "thrust_t", "centrality"]


def event(px=(), py=(), pz=(), kind=JET, mass=0.0, btag=0.0, met=(0.0, 0.0)):
    """One event from Cartesian momenta in GeV."""
    px, py, pz = (np.array(p, float)[None, :] for p in (px, py, pz))
    pt = np.hypot(px, py)

    def per_object(values):
        return np.broadcast_to(values, px.shape).copy()

    eta = np.arcsinh(np.divide(pz, pt, out=np.zeros_like(pz), where=pt > 0))
    return Objects(
        pt, eta, np.arctan2(py, px), per_object(mass), per_object(kind), per_object(btag),
        np.array([met[0]]), np.array([met[1]]), btag_working_point=0.5,
    )  # fmt: skip


def named(objects):
    return dict(zip(SCHEMA.features, features(objects)[0].tolist()))


def random_events(n=300, slots=14, seed=5):
    rng = np.random.default_rng(seed)
    shape = (n, slots)
    return Objects(
        pt=20 + rng.exponential(60, shape),
        eta=rng.uniform(-4, 4, shape),
        phi=rng.uniform(-np.pi, np.pi, shape),
        mass=rng.exponential(8, shape),
        kind=rng.choice([NONE, ELECTRON, MUON, PHOTON, JET], shape, p=[0.4, 0.05, 0.05, 0.05, 0.45]),
        btag=rng.random(shape),
        met_pt=rng.exponential(30, n),
        met_phi=rng.uniform(-np.pi, np.pi, n),
        btag_working_point=0.5,
    )


def replaced(objects, **changes):
    return Objects(**(vars(objects) | changes))


def test_schema_has_the_64_features_in_order():
    names = SCHEMA.features
    assert (SCHEMA.name, len(names)) == ("hep64-v1", 64)
    assert names[:5] == ("obj0_E", "obj0_px", "obj0_py", "obj0_pz", "obj1_E")
    where = {"MET": 40, "ht": 43, "mvis": 46, "thrust_t": 51, "n_jets": 53, "jet1_mass": 56, "dphi_jj": 59}
    assert {name: names.index(name) for name in where} == where
    assert names[-1] == "jet4_btag"
    optional = [name for name, flag in zip(names, SCHEMA.optional) if flag]
    assert len(optional) == 48
    assert not set(optional) & {"MET", "ht", "n_jets", *SHAPES}


def test_dijet():
    f = named(event(px=[100, -100], py=[0, 0], pz=[30, -30]))
    assert f["sphericity"] == pytest.approx(0, abs=1e-7)
    assert f["aplanarity"] == pytest.approx(0, abs=1e-7)
    assert f["c_lin"] == pytest.approx(0, abs=1e-7)
    assert f["sphericity_t"] == pytest.approx(0, abs=1e-7)
    assert f["thrust_t"] == pytest.approx(1)
    assert f["m_jj"] == pytest.approx(2 * np.hypot(100, 30))
    assert f["dphi_jj"] == pytest.approx(np.pi)


def test_mercedes():
    phi = 2 * np.pi / 3 * np.arange(3) + 0.3
    f = named(event(px=50 * np.cos(phi), py=50 * np.sin(phi), pz=[0, 0, 0]))
    assert f["sphericity"] == pytest.approx(0.75)
    assert f["aplanarity"] == pytest.approx(0, abs=1e-7)
    assert f["sphericity_t"] == pytest.approx(1)
    assert f["c_lin"] == pytest.approx(0.75)
    assert f["thrust_t"] == pytest.approx(2 / 3)


def test_isotropic():
    corners = np.array(np.meshgrid([-40, 40], [-40, 40], [-40, 40])).reshape(3, -1)
    f = named(event(*corners))
    assert f["sphericity"] == pytest.approx(1)
    assert f["aplanarity"] == pytest.approx(0.5)
    assert f["c_lin"] == pytest.approx(1)
    assert f["sphericity_t"] == pytest.approx(1)
    assert f["thrust_t"] == pytest.approx(np.sqrt(0.5))
    assert f["centrality"] == pytest.approx(np.sqrt(2 / 3))


def test_thrust_is_the_maximum_over_all_axes():
    objects = random_events(50)
    x = dict(zip(SCHEMA.features, features(objects).T.astype(float)))
    px, py = (np.nan_to_num(np.stack([x[f"obj{i}_{c}"] for i in range(10)])) for c in ("px", "py"))
    angle = np.linspace(0, np.pi, 20_001)[:, None, None]
    scan = np.abs(px * np.cos(angle) + py * np.sin(angle)).sum(axis=1).max(axis=0) / np.hypot(px, py).sum(axis=0)
    np.testing.assert_allclose(x["thrust_t"], scan, rtol=2e-6)


def test_no_objects():
    f = named(event(met=(25.0, 1.0)))
    zero = [*SHAPES, "ht", "mht", "mvis", "met_over_sqrt_ht", "n_jets", "n_btag", "n_lep"]
    assert [f[name] for name in zero] == [0] * len(zero)
    assert (f["MET"], f["meff"]) == (25, 25)
    assert f["dphi_min"] == np.float32(np.pi)
    for name, optional in zip(SCHEMA.features, SCHEMA.optional):
        assert np.isnan(f[name]) == optional


def test_one_object_and_no_jets():
    f = named(event(px=[0], py=[40], pz=[0], kind=MUON, mass=0.105, met=(10.0, np.pi / 2)))
    assert [f[name] for name in SHAPES] == [0] * 6
    assert [f[f"obj0_{c}"] for c in ("E", "px", "py", "pz")] == pytest.approx([np.hypot(40, 0.105), 40, 0, 0], abs=1e-5)
    assert (f["n_lep"], f["n_jets"], f["ht"], f["met_over_sqrt_ht"]) == (1, 0, 0, 0)
    assert f["meff"] == pytest.approx(50)
    assert f["mvis"] == pytest.approx(0.105, rel=1e-5)
    assert np.isnan([f["obj1_E"], f["jet1_mass"], f["m_jj"], f["jet1_btag"]]).all()


def test_hand_computed_event():
    """Jets of 60 GeV at phi 0 and 80 GeV at phi 90 degrees, eta 0 and 1; an electron of 30 GeV; MET at 180 degrees."""
    eta = np.array([[0.0, 1.0, -0.5]])
    objects = Objects(
        pt=np.array([[60.0, 80.0, 30.0]]), eta=eta, phi=np.array([[0.0, np.pi / 2, np.pi]]),
        mass=np.array([[6.0, 8.0, 0.0]]), kind=np.array([[JET, JET, ELECTRON]]), btag=np.array([[0.9, -10.0, 0.0]]),
        met_pt=np.array([50.0]), met_phi=np.array([np.pi]), btag_working_point=0.5,
    )  # fmt: skip
    f = named(objects)
    assert f["ht"] == pytest.approx(140)
    assert f["mht"] == pytest.approx(100)
    assert f["meff"] == pytest.approx(220)
    assert f["met_over_sqrt_ht"] == pytest.approx(50 / np.sqrt(140))
    assert f["dphi_min"] == pytest.approx(np.pi / 2)
    e1, e2 = np.sqrt(60**2 + 6**2), np.sqrt((80 * np.cosh(1)) ** 2 + 8**2)
    assert f["m_jj"] == pytest.approx(np.sqrt(6**2 + 8**2 + 2 * e1 * e2))  # p1 . p2 = 0
    assert f["deta_jj"] == pytest.approx(1)
    assert f["dphi_jj"] == pytest.approx(np.pi / 2)
    assert f["jet1_mass"] == 8
    assert [f["jet1_btag"], f["jet2_btag"]] == [0, pytest.approx(0.9)]
    assert np.isnan([f["jet3_btag"], f["jet4_btag"]]).all()
    assert (f["n_jets"], f["n_btag"], f["n_lep"]) == (2, 1, 1)
    # Rotated by -phi(MET): the 80 GeV jet, now leading, points to -y.
    assert [f["obj0_px"], f["obj0_py"], f["obj0_pz"]] == pytest.approx([0, -80, 80 * np.sinh(1)], abs=1e-4)
    assert f["obj2_px"] == pytest.approx(30)
    pt_over_e = (60 + 80 + 30) / (e1 + e2 + 30 * np.cosh(0.5))
    assert f["centrality"] == pytest.approx(pt_over_e)


def test_the_order_of_the_objects_does_not_matter():
    objects = random_events()
    shuffle = np.random.default_rng(1).permuted(np.tile(np.arange(14), (300, 1)), axis=1)
    per_object = ("pt", "eta", "phi", "mass", "kind", "btag")
    moved = replaced(objects, **{a: np.take_along_axis(getattr(objects, a), shuffle, 1) for a in per_object})
    np.testing.assert_array_equal(features(objects), features(moved))


@pytest.mark.parametrize("with_met", [True, False])
def test_rotation_in_phi_changes_nothing(with_met):
    objects = random_events()
    if not with_met:
        objects = replaced(objects, met_pt=np.zeros(300))
    turned = replaced(objects, phi=objects.phi + 2.1, met_phi=objects.met_phi + 2.1)
    np.testing.assert_allclose(features(objects), features(turned), rtol=2e-6, atol=2e-4)


def test_all_jets_count_but_ten_objects_lead():
    objects = random_events()
    objects = replaced(objects, kind=np.full(objects.kind.shape, JET))
    x = dict(zip(SCHEMA.features, features(objects).T))
    assert (x["n_jets"] == 14).all()
    np.testing.assert_allclose(x["ht"], objects.pt.sum(axis=1), rtol=1e-6)
    pt = np.stack([np.hypot(x[f"obj{i}_px"], x[f"obj{i}_py"]) for i in range(10)], axis=1)
    np.testing.assert_allclose(pt, -np.sort(-objects.pt, axis=1)[:, :10], rtol=1e-5)


def test_what_lies_under_padding_is_ignored():
    objects = random_events()
    padding = objects.kind == NONE
    other = {a: np.where(padding, np.nan, getattr(objects, a)) for a in ("pt", "eta", "phi", "mass", "btag")}
    np.testing.assert_array_equal(features(objects), features(replaced(objects, **other)))
    assert not np.isinf(features(objects)).any()


def test_bad_objects_are_named():
    objects = random_events(4)
    bad = objects.pt.copy()
    bad[2, 3], kind = -5, np.full(objects.kind.shape, JET)
    with pytest.raises(DataError, match=r"event 2: pt is -5.0, expected a finite number, 0 or more"):
        features(replaced(objects, pt=bad, kind=kind))
    with pytest.raises(DataError, match="event 1: met_phi is nan"):
        features(replaced(objects, met_phi=np.array([0, np.nan, 0, 0])))
    with pytest.raises(DataError, match=r"eta has shape \(3, 14\)"):
        features(replaced(objects, eta=objects.eta[:3]))
