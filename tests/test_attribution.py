"""Pulls are what the energy is made of, in units of what is usual, and a check says whether to believe them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gaussians import SIGMAS, Gaussian, rms, sample

from ebm import hep64, higgsml
from ebm.attribution import faithfulness, group, group_pulls, pulls
from ebm.events import load_events
from ebm.networks import Autoencoder, EnergyNetwork
from export.manifest import golden_events
from kernels import load_scorer

DEMO = Path(__file__).parents[1] / "models" / "demo"


def test_pull_of_independent_features_is_their_distance_in_units_of_what_is_usual():
    u, y = sample()
    u[:, 5] *= 7
    np.testing.assert_allclose(pulls(Gaussian(24), u, SIGMAS, u[y == 0]), u / rms(u[y == 0]), rtol=1e-12)


def test_pulls_are_averaged_over_noise_levels_each_in_its_own_unit():
    class Levels(Gaussian):
        """At level 1 the score is that of the second feature, a thousand times as large."""

        n_sigmas = 2

        def energy_and_score(self, x, sigma_idx=None):
            return self(x), torch.where(sigma_idx[:, None] == 0, -x, -1000 * torch.roll(x, 1, dims=1))

    u, y = sample()
    normal = u[y == 0]
    mean = (u / rms(normal) + np.roll(u, 1, axis=1) / rms(np.roll(normal, 1, axis=1))) / 2
    np.testing.assert_allclose(pulls(Levels(24), u, (1.0, 0.5), normal), mean / rms(mean[y == 0]), rtol=1e-12)


def test_pulls_of_a_scorer_are_1_on_average_among_events_that_have_the_feature():
    scorer, x = load_scorer(DEMO), load_events("toy:300").x.copy()
    x[:, 36:40] = np.nan  # an object that no event has
    x[np.isnan(x[:, 32]).argsort(kind="stable")[9:], 32:36] = np.nan  # and one that too few have
    pull = pulls(scorer, x, scorer.bundle.sigmas, x)
    missing = np.isnan(x)
    assert (pull[missing] == 0).all()
    n = (pull != 0).sum(axis=0)
    usual = np.sqrt((pull**2).sum(axis=0) / np.maximum(n, 1))
    np.testing.assert_allclose(usual[n >= 10], 1, rtol=1e-6)
    assert 10 < n[28] < len(x) / 2  # a rare jet is among them
    assert n[32] == 9
    assert 0.1 < usual[32] < 3  # measured by all features
    events = load_events("toy:2000").x
    of_the_unseen = pulls(scorer, events[~np.isnan(events[:, 36])], scorer.bundle.sigmas, x)[:, 36]
    assert 0.1 < np.abs(of_the_unseen).max() < 30


def test_pull_of_an_autoencoder_is_its_residual():
    network = Autoencoder(6, 2)
    with torch.no_grad():
        for layer in network.layers:
            layer.weight.zero_()
    u = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    residual = u - network(torch.from_numpy(u)).detach().numpy()
    np.testing.assert_allclose(pulls(network, u, (), u), residual / rms(residual), rtol=1e-5)


def test_groups():
    of_hep64 = group(hep64.SCHEMA.features)
    assert list(of_hep64) == [*(f"obj{i}" for i in range(10)), "MET", "scalar sums", "event shape", "multiplicity",
                              "dijet", "b-tags"]
    assert of_hep64["obj3"] == [12, 13, 14, 15]
    of_higgsml = group(higgsml.SCHEMA.features)
    assert {"tau", "lepton", "leading jet", "MET", "dijet"} < set(of_higgsml)
    assert [higgsml.SCHEMA.features[j] for j in of_higgsml["tau"]] == ["PRI_tau_pt", "PRI_tau_eta", "PRI_tau_phi"]
    for groups, n in ((of_hep64, 64), (of_higgsml, 30)):
        assert sorted(j for members in groups.values() for j in members) == list(range(n))
    assert group(["a", "b"]) == {"a": [0], "b": [1]}


def test_group_pulls_are_an_rms_and_say_whether_less_is_more_ordinary():
    pull = np.array([[3.0, -4.0, -0.5], [-3.0, 4.0, 0.0], [0.0, 2.0, 1.0]])
    x = np.array([[10.0, -20.0, 1.0], [10.0, -20.0, np.nan], [np.nan, -20.0, 1.0]])
    expected = [[np.sqrt(12.5), -0.5], [-np.sqrt(12.5), 0], [-2, 1]]
    np.testing.assert_allclose(group_pulls(pull, x, ["obj0_px", "obj0_py", "third"]), expected)


def test_angles_do_not_say_whether_an_object_should_be_softer():
    names = ["PRI_tau_pt", "PRI_tau_eta", "PRI_tau_phi", "its_phi"]
    group_pull = group_pulls(np.array([[1.0, -5.0, 4.0, -2.0]]), np.array([[30.0, 2.0, -1.0, 0.5]]), names)
    np.testing.assert_allclose(group_pull, [[np.sqrt(42 / 3), -2]])  # and an angle alone has its own sign


def test_faithful_pulls_pass_and_false_ones_do_not():
    u, y = sample()
    good = faithfulness(Gaussian(24), u[y == 1], SIGMAS, u[y == 0])
    spread = (u[y == 0] ** 2).sum(1).std() / (2 * 1.25)
    assert good["energy_spread"] == pytest.approx(spread, rel=1e-6)
    assert good["excess"] == pytest.approx(
        ((u[y == 1] ** 2).sum(1).mean() - (u[y == 0] ** 2).sum(1).mean()) / 2.5 / spread)
    assert good["removed"] == [1, 2, 4, 8, 16]
    top, far, random = (good["drop"][k] for k in ("largest pulls", "farthest out", "random"))
    np.testing.assert_allclose(top, far, rtol=0.05)  # for this energy they are the same features, up to their RMS
    largest = np.sort(np.abs(u[y == 1]), axis=1)[:, -1]
    assert top[0] == pytest.approx((largest**2).mean() / 2.5 / spread, rel=0.05)
    assert all(a > b for a, b in zip(top, random))
    assert all(d["interval"][0] > 0 and d["interval"][0] <= d["mean"] <= d["interval"][1]
               for d in good["top_minus_random"])
    assert good["top_minus_random"][0]["better"] == 1
    bad = faithfulness(Gaussian(24, turn=7), u[y == 1], SIGMAS, u[y == 0])
    assert bad["top_minus_random"][0]["interval"][1] < 0
    assert np.isnan(faithfulness(Gaussian(24), u[-1:], SIGMAS, u[y == 0])["top_minus_random"][0]["interval"]).all()


def test_what_is_removed_becomes_what_the_other_features_imply():
    """A sum is restored from its parts, a part from the sum: no event is made that cannot be."""
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(2000, 2))
    u = np.column_stack([parts, parts.sum(1), rng.normal(size=2000), np.zeros(2000)])

    class Impossible(Gaussian):
        def forward(self, x, sigma_idx=None):
            return x.square().sum(1) + 1e4 * (x[:, 0] + x[:, 1] - x[:, 2]).square()

    check = faithfulness(Impossible(5), u[:50], SIGMAS, u[50:])
    assert check["removed"] == [1, 2]  # of four that can be removed
    assert all(abs(fall[0]) < 2 for fall in check["drop"].values())


def test_features_that_no_normal_event_has():
    scorer, x = load_scorer(DEMO), load_events("toy:300").x.copy()
    x[1:, 36:40] = np.nan
    x[0, 36:40] = 50, 30, 30, 20
    check = faithfulness(scorer, x[:50], scorer.bundle.sigmas, x[1:])
    assert np.isfinite(check["drop"]["largest pulls"]).all()


@pytest.mark.parametrize(("feature", "value"), [("n_jets", 300), ("c_lin", 1e6), ("dphi_min", 999)])
def test_a_value_that_cannot_be_implies_nothing_that_cannot_be_either(feature, value):
    scorer, x = load_scorer(DEMO), load_events("toy:400").x.copy()
    x[0, hep64.SCHEMA.features.index(feature)] = value
    check = faithfulness(scorer, x[:20], scorer.bundle.sigmas, x[1:])
    assert np.isfinite([*check["drop"].values()]).all()


def test_pulls_of_an_export_are_those_of_its_level(exported):
    bundle, out = exported
    x = golden_events(bundle, n=200)
    of_onnx, of_native = (pulls(load_scorer(s), x, bundle.sigmas, x) for s in (out / "model.onnx", bundle))
    gradient = load_scorer(bundle, "reference").attribution(x)
    n = np.count_nonzero(gradient, axis=0)
    there = n >= 10
    expected = gradient[:, there] / np.sqrt((gradient**2).sum(0)[there] / n[there])
    np.testing.assert_allclose(of_onnx[:, there], expected, rtol=1e-3, atol=1e-3)
    assert not np.allclose(of_onnx, of_native, rtol=1e-2)  # which is averaged over levels


def test_network_with_levels_wants_its_own():
    with pytest.raises(ValueError, match="3 noise levels given, the model has 10"):
        pulls(EnergyNetwork(4, 8), np.zeros((2, 4)), (1, 0.5, 0.2), np.zeros((2, 4)))
