"""Error analysis: what it calls a mistake is one, and its pulls are what the energy is made of."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn
from typer.testing import CliRunner

from ebm import hep64, higgsml
from ebm.__main__ import app
from ebm.attribution import faithfulness, group, group_pulls, pulls
from ebm.bundle import Bundle
from ebm.errors import error_analysis, summary
from ebm.events import DataError, load_events
from ebm.networks import Autoencoder, EnergyNetwork
from ebm.style import number
from kernels import load_scorer

DEMO = Path(__file__).parents[1] / "models" / "demo"
SIGMAS = (0.5,)


class Gaussian(nn.Module):
    """The energy of independent unit Gaussians seen through noise; `turn` permutes its score to a false one."""

    kind, n_sigmas, default_level = "energy", 1, 0

    def __init__(self, input_dim, turn=0):
        super().__init__()
        self.input_dim, self.turn = input_dim, turn
        self.variance = nn.Parameter(torch.tensor(1 + SIGMAS[0] ** 2, dtype=torch.float64))

    def forward(self, x, sigma_idx=None):
        return x.square().sum(1) / (2 * self.variance)

    def energy_and_score(self, x, sigma_idx=None):
        return self(x), torch.roll(-x / self.variance, self.turn, dims=1)


def sample(n=400, d=24, outliers=40, seed=0):
    """Unit Gaussians; the last events are anomalous in three features."""
    u = np.random.default_rng(seed).normal(size=(n, d))
    u[-outliers:, :3] += 2.5
    return u, np.repeat([0, 1], [n - outliers, outliers])


@pytest.fixture(scope="module")
def analysed():
    u, y = sample()
    model = Gaussian(24)
    scores = model(torch.as_tensor(u)).detach().numpy()
    return u, y, scores, error_analysis(model, u, y, scores, SIGMAS, rejection=0.9)


def test_pull_is_the_distance_from_what_is_expected():
    u, _ = sample()
    expected_clean = u / (1 + SIGMAS[0] ** 2)  # of a unit Gaussian after noise
    np.testing.assert_allclose(pulls(Gaussian(24), u, SIGMAS), u - expected_clean, rtol=1e-12)


def test_pulls_of_a_scorer_are_its_attribution_in_background_spreads():
    scorer, x = load_scorer(DEMO), load_events("toy:100").x
    sigma = scorer.bundle.sigmas[scorer.default_level]
    pull = pulls(scorer, x, scorer.bundle.sigmas)
    np.testing.assert_allclose(pull, sigma**2 * scorer.attribution(x), rtol=1e-6)
    assert (pull[np.isnan(x)] == 0).all()


def test_pull_of_an_autoencoder_is_its_residual():
    network = Autoencoder(6, 2)
    with torch.no_grad():
        for layer in network.layers:
            layer.weight.zero_()
    u = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    residual = u - network(torch.from_numpy(u)).detach().numpy()
    np.testing.assert_allclose(pulls(network, u, ()), residual, rtol=1e-5)


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


def test_group_pulls_have_a_length_and_say_whether_less_is_more_ordinary():
    pull = np.array([[3.0, -4.0, -0.5], [-3.0, 4.0, 0.0]])
    x = np.array([[10.0, -20.0, 1.0], [10.0, -20.0, np.nan]])
    np.testing.assert_allclose(group_pulls(pull, x, {"both": [0, 1], "third": [2]}), [[5, -0.5], [-5, 0]])


def test_faithful_pulls_pass_and_false_ones_do_not():
    u, y = sample()
    good = faithfulness(Gaussian(24), u[y == 1], SIGMAS, u[y == 0])
    spread = (u[y == 0] ** 2).sum(1).std() / (2 * 1.25)
    assert good["energy_spread"] == pytest.approx(spread, rel=1e-6)
    assert good["removed"] == [1, 2, 4, 8, 16]
    top, far, random = (good["drop"][k] for k in ("largest pulls", "farthest out", "random"))
    np.testing.assert_allclose(top, far)  # for this energy they are the same features
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


def test_false_positives_and_negatives(analysed):
    u, y, scores, result = analysed
    cut = result.numbers["cut"]
    assert (scores[y == 0] > cut).sum() == 36  # a tenth of 360
    positives, negatives = (result.numbers[k] for k in ("false_positives", "false_negatives"))
    assert (positives["n"], positives["of"]) == (36, 360)
    assert (negatives["n"], negatives["of"]) == (((y == 1) & (scores <= cut)).sum(), 40)
    norm = np.linalg.norm(u, axis=1)
    assert positives["norm_quantile"] == pytest.approx(
        np.median([np.mean(norm[y == 0] < n) for n in norm[(y == 0) & (scores > cut)]]))
    leading = {f["feature"]: f["ks"] for f in negatives["features"]}
    missed = u[(y == 1) & (scores <= cut)]
    assert set(list(leading)[:3]) == {"x0", "x1", "x2"}
    assert leading["x1"] == pytest.approx(ks_2samp(missed[:, 1], u[y == 0, 1]).statistic, abs=1e-6)


def test_pictures_of_mistakes(analysed):
    result = analysed[3]
    fig, leading = result.figures["false_positives"], result.numbers["false_positives"]["features"]
    assert [ax.get_xlabel() for ax in fig.axes] == [f"{f['feature']} [background spread]" for f in leading[:12]]
    legend = [t.get_text() for t in fig.legends[0].get_texts()]
    assert legend == ["normal", "anomalous", "false positives (36 of 360)"]
    points = fig.axes[0].containers[-1].lines[0].get_ydata()
    assert np.nansum(points) == pytest.approx(1)
    assert np.nanmin(points[points > 0]) == pytest.approx(round(36 * np.nanmin(points[points > 0])) / 36)
    missed = [t.get_text() for t in result.figures["false_negatives"].legends[0].get_texts()]
    assert missed[:2] == ["normal", "anomalous above the cut"]


def test_candidates(analysed):
    u, _, scores, result = analysed
    entries, order = result.numbers["candidates"], np.argsort(-scores)[:10]
    assert [int(e["event"]) for e in entries] == order.tolist()
    assert [e["score"] for e in entries] == pytest.approx(scores[order].tolist())
    expected = 0.2 * u[order]  # sigma^2 / (1 + sigma^2)
    shown = np.array([[e["groups"][f"x{j}"] for j in range(24)] for e in entries])
    np.testing.assert_allclose(np.abs(shown), np.abs(expected), rtol=1e-5)
    assert (shown >= 0).all()  # less of anything is more ordinary for a Gaussian
    first = result.figures["candidate_1"]
    features = first.axes[0]
    strongest = np.argsort(-np.abs(expected[0]))[:14]
    assert [t.get_text() for t in features.get_yticklabels()] == [f"x{j} = {number(u[order[0], j])}" for j in strongest]
    np.testing.assert_allclose([b.get_width() for b in features.containers[1]], expected[0, strongest], rtol=1e-5)
    usual = np.sqrt(np.mean((0.2 * u[:360]) ** 2, axis=0))[strongest]
    np.testing.assert_allclose([b.get_width() / 2 for b in features.containers[0]], usual, rtol=1e-5)
    assert features.get_xlabel() == "pull [background spread]"
    assert first.get_suptitle() == f"Rank 1: event {order[0]}, score {scores[order[0]]:.4g}, labelled anomalous"
    overview = result.figures["candidates"].axes[0]
    np.testing.assert_allclose(overview.images[0].get_array(), shown)
    assert [t.get_text() for t in overview.get_xticklabels()] == [f"x{j}" for j in range(24)]


def test_faithfulness_picture_and_summary(analysed):
    result = analysed[3]
    check, ax = result.numbers["faithfulness"], result.figures["faithfulness"].axes[0]
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    for name, values in check["drop"].items():
        np.testing.assert_array_equal(lines[name], values)
    assert ax.get_ylabel() == "mean fall of the energy [spread over background]"
    text = summary(result.numbers)
    assert text[0].startswith("36 of 360 normal events above the cut")
    d = check["top_minus_random"][2]
    assert f"difference {d['mean']:.2f} [{d['interval'][0]:.2f}, {d['interval'][1]:.2f}]" in text[-1]
    assert "removing the 4 features" in text[-1]


def test_scorer_gives_units_processes_and_the_event_picture():
    scorer, events = load_scorer(DEMO), load_events("toy:400")
    energy = scorer.energy(events.x)
    result = error_analysis(scorer, events.x, events.label, energy, scorer.bundle.sigmas, event_id=events.event_id,
                            process=events.process, rejection=0.95, n_top=2)
    top = int(np.argmax(energy))
    entry, fig = result.numbers["candidates"][0], result.figures["candidate_1"]
    assert (entry["event"], entry["process"]) == (events.event_id[top], events.process[top])
    assert entry["event"] in fig.get_suptitle()
    assert [ax.name for ax in fig.axes] == ["rectilinear", "rectilinear", "polar"]
    values = {f["feature"]: f for f in entry["features"]}
    assert values["MET"]["value"] == events.x[top, 40]
    assert values["MET"]["unit"] == "GeV"
    assert any(t.get_text().startswith("MET: ") for t in fig.axes[1].get_yticklabels())
    assert any(t.get_text().endswith(" GeV") for t in fig.axes[0].get_yticklabels())
    assert sum(result.numbers["false_positives"]["processes"].values()) == pytest.approx(1)
    assert result.numbers["sigma"] == scorer.bundle.sigmas[scorer.bundle.default_level]
    assert result.numbers["above_the_models_threshold"] == int((energy > scorer.threshold).sum())
    assert "candidate_3" not in result.figures


def test_without_labels():
    u = sample()[0]
    result = error_analysis(Gaussian(24), u, None, (u**2).sum(1), SIGMAS, n_top=1)
    assert result.notes == ["no labels: false positives and false negatives cannot be told, only the highest scores "
                            "and their pulls"]
    assert set(result.figures) == {"candidate_1", "candidates", "faithfulness"}
    assert "labelled" not in result.figures["candidate_1"].get_suptitle()


@pytest.mark.parametrize(("kept", "note", "picture"), [
    (0, "none of 360 events is anomalous, so there are no false negatives", "false_positives"),
    (1, "0 of 40 events are normal, too few for a cut, so neither false positives nor false negatives are shown", None),
])
def test_one_class(kept, note, picture):
    u, y = sample()
    u = u[y == kept]
    result = error_analysis(Gaussian(24), u, np.full(len(u), kept), (u**2).sum(1), SIGMAS, n_top=1)
    assert note in result.notes
    assert {k for k in result.figures if k.startswith("false")} == ({picture} if picture else set())
    assert ("faithfulness" in result.figures) == (kept == 0)


def test_a_single_event():
    u, y = sample()
    result = error_analysis(Gaussian(24), u[:1], y[:1], (u[:1] ** 2).sum(1), SIGMAS)
    assert [n.split(",")[0] for n in result.notes] == ["1 of 1 events are normal", "1 normal event(s)"]
    assert set(result.figures) == {"candidate_1", "candidates"}
    assert summary(result.numbers) == []
    two = error_analysis(Gaussian(24), u[:2], y[:2], (u[:2] ** 2).sum(1), SIGMAS)
    assert two.numbers["false_positives"]["n"] == 1
    assert "KS" not in summary(two.numbers)[0]


def test_nothing_missed():
    u, y = sample()
    result = error_analysis(Gaussian(24), u, y, y + 0.0, SIGMAS, n_top=1, rejection=0.9)
    assert result.notes == ["no false positives at the cut 0", "no false negatives at the cut 0"]
    assert result.numbers["false_negatives"] == {"n": 0, "of": 40}
    assert len(summary(result.numbers)) == 1


def test_features_without_spread():
    u, y = sample()
    u[:, 5] = 0.0
    result = error_analysis(Gaussian(24), u, y, (u**2).sum(1), SIGMAS, n_top=1, rejection=0.9)
    assert {f["feature"]: f["ks"] for f in result.numbers["false_positives"]["features"]}["x5"] == 0
    assert result.numbers["candidates"][0]["groups"]["x5"] == 0


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"scores": np.ones(3)}, DataError, r"events \(n, 24\) with n > 0 and scores \(n,\), given \(400, 24\) and \(3,\)"),
    ({"scores": np.full(400, np.nan)}, DataError, "400 of 400 scores are NaN"),
    ({"y_test": np.ones(3)}, DataError, r"expected y_test of shape \(400,\)"),
    ({"X_test": np.empty((0, 24)), "scores": np.empty(0)}, DataError, "given \\(0, 24\\)"),
    ({"X_test": np.zeros((400, 3))}, DataError, r"expected events \(n, 24\) .*given \(400, 3\)"),
    ({"sigmas": (1.0, 0.5)}, ValueError, "2 noise levels given, the model has 1"),
    ({"rejection": 1.0}, ValueError, "rejection is 1.0, expected at least 0 and less than 1"),
    ({"feature_names": ["a"]}, DataError, "1 feature names given for 24 features"),
])
def test_bad_arguments(change, error, message):
    u, y = sample()
    arguments = {"X_test": u, "y_test": y, "scores": (u**2).sum(1), "sigmas": SIGMAS} | change
    with pytest.raises(error, match=message):
        error_analysis(Gaussian(24), **arguments)


def test_features_that_no_normal_event_has():
    scorer, x = load_scorer(DEMO), load_events("toy:300").x.copy()
    x[1:, 36:40] = np.nan
    x[0, 36:40] = 50, 30, 30, 20
    check = faithfulness(scorer, x[:50], scorer.bundle.sigmas, x[1:])
    assert np.isfinite(check["drop"]["largest pulls"]).all()


def test_network_with_levels_wants_its_own():
    with pytest.raises(ValueError, match="3 noise levels given, the model has 10"):
        pulls(EnergyNetwork(4, 8), np.zeros((2, 4)), (1, 0.5, 0.2))


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A labelled CSV of three features and a model of it."""
    rng, directory = np.random.default_rng(0), tmp_path_factory.mktemp("table")
    rows = [f"{a:.4f},{b:.4f},{c:.4f},{int(i % 10 == 0)}" for i, (a, b, c) in
            enumerate(rng.normal(size=(400, 3)) * np.where(np.arange(400) % 10 == 0, 3, 1)[:, None])]
    path = directory / "table.csv"
    path.write_text("\n".join(["pt,eta,mass,label", *rows]) + "\n")
    result = run("train", path, "--out", directory / "model", "--steps", "50", "--hidden", "16", "--batch", "64")
    assert result.exit_code == 0, result.output
    return path, directory / "model"


def test_command(table, tmp_path):
    path, model = table
    result = run("errors", model, path, "--out", tmp_path / "out", "--json", tmp_path / "e.json", "--rejection", "0.9")
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "e.json").read_text())
    assert 0 < numbers["n_events"] < 150  # the test folds
    assert len(numbers["candidates"]) == 10
    assert numbers["sigma"] == Bundle.load(model).sigmas[Bundle.load(model).default_level]
    assert {f"candidate_{i}.{kind}" for i in range(1, 11) for kind in ("png", "pdf")} < {
        f.name for f in (tmp_path / "out").iterdir()}
    assert "removing the" in result.stdout


def test_command_refuses(table, tmp_path):
    path, model = table
    (tmp_path / "file").write_text("")
    for arguments, messages in (
        ((DEMO, path, "--out", tmp_path), ("hep64-v1", "64 features", "3 features", str(DEMO), str(path))),
        ((model, path, "--out", tmp_path / "file"), (f"{tmp_path / 'file'} cannot be written",)),
        ((model, path, "--out", "/proc/pictures"), ("/proc/pictures cannot be written",)),
        ((model, path, "--out", tmp_path, "--rejection", "2"), ("rejection is 2.0",)),
    ):
        result = run("errors", *arguments)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("error: ")
        assert all(m in result.stderr for m in messages), result.stderr
        assert "Traceback" not in result.output
