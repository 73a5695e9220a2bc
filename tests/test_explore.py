"""Exploration: what the pictures show is what the data hold, and what cannot be shown is said in a sentence."""

import io
import json
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import StepPatch
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp
from typer.testing import CliRunner

from ebm import higgsml
from ebm.__main__ import app
from ebm.events import DataError
from ebm.explore import correlations, explore_data
from ebm.style import ANOMALOUS, GREY, NORMAL, edges, label, number, progress, save, styled

NAMES, UNITS = ("mass", "pt", "eta", "fixed"), ("GeV", "GeV", "", "rad")


def sample(n, seed, shift=0.0):
    """A Gaussian mass, a falling pT, an eta of which a quarter is missing, and a constant."""
    rng = np.random.default_rng(seed)
    eta = np.where(np.arange(n) % 4 == 0, np.nan, rng.normal(size=n))
    return np.stack([90 + 5 * rng.normal(size=n) + 5 * shift, np.exp(1.5 * rng.normal(size=n) + shift) + 1, eta + shift,
                     np.full(n, 2.0)], axis=1)


TRAIN, NORMALS, ANOMALIES = sample(600, 0), sample(400, 1), sample(200, 2, shift=1.5)
TEST, Y = np.concatenate([NORMALS, ANOMALIES]), np.repeat([0, 1], [400, 200])


@pytest.fixture(scope="module")
def explored():
    return explore_data(TRAIN, TEST, Y, NAMES, units=UNITS)


def steps(ax):
    """Colour -> (shares, edges) of the histograms of a panel."""
    return {to_hex(p.get_edgecolor() if p.get_linewidth() else p.get_facecolor()): p.get_data()[:2]
            for p in ax.patches if isinstance(p, StepPatch)}


def test_histograms_hold_the_shares_of_the_events(explored):
    panels = explored.figures["features_1"].axes
    assert [ax.get_xlabel() for ax in panels] == ["mass [GeV]", "pt [GeV]", "eta", "fixed [rad]"]
    assert explored.figures["features_1"].get_supylabel() == "share of events per bin"
    legend = [t.get_text() for t in explored.figures["features_1"].legends[0].get_texts()]
    assert legend == ["training background", "normal, test", "anomalous, test"]
    for j, ax in enumerate(panels[:3]):
        assert set(steps(ax)) == {GREY, NORMAL, ANOMALOUS}
        for x, colour in ((TRAIN, GREY), (NORMALS, NORMAL), (ANOMALIES, ANOMALOUS)):
            shares, bins = steps(ax)[colour]
            values = x[~np.isnan(x[:, j]), j]
            inside = np.clip(values, bins[0], np.nextafter(bins[-1], 0))
            np.testing.assert_allclose(shares, np.histogram(inside, bins)[0] / len(x))
            assert shares.sum() == pytest.approx(0.75 if j == 2 else 1)


def test_logarithmic_where_needed_and_missing_share_shown(explored):
    mass, pt, eta, fixed = explored.figures["features_1"].axes
    assert (mass.get_xscale(), pt.get_xscale(), eta.get_xscale()) == ("linear", "log", "linear")
    assert [t.get_text() for t in eta.texts] == ["missing 25%", "25%", "25%"]
    assert not mass.texts
    assert [t.get_text() for t in fixed.texts] == ["one value in every event"]


def test_edges():
    assert edges([np.array([1.0, 2, 5])])[0].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    rng = np.random.default_rng(0)
    bins, log = edges([rng.lognormal(size=1000), rng.lognormal(size=100000)], logarithmic=True)
    assert log
    assert len(bins) == 21
    np.testing.assert_allclose(np.diff(np.log(bins)), np.log(bins[1] / bins[0]))
    assert not edges([rng.lognormal(size=1000) - 0.1, np.zeros(50)], logarithmic=True)[1]


def test_axes_of_angles_and_counts():
    """A bounded angle is never on a logarithmic axis, long tail or not; counts have ticks at whole numbers alone."""
    rng = np.random.default_rng(0)
    x = np.stack([np.pi - np.minimum(rng.exponential(0.05, 2000), 3), rng.integers(0, 3, 2000)], axis=1)
    x[:20, 0] = 0.1
    pages = {unit: explore_data(x, x, None, ["dphi", "n_lep"], units=[unit, ""]).figures["features_1"]
             for unit in ("rad", "GeV")}
    assert [pages[unit].axes[0].get_xscale() for unit in pages] == ["linear", "log"]
    counts = pages["rad"].axes[1]
    assert {0, 1, 2} <= set(counts.get_xticks())
    assert all(t == round(t) for t in (*counts.get_xticks(), *counts.get_xticks(minor=True)))


def test_what_is_written():
    assert label("x", "GeV^1/2") == "x [GeV$^{1/2}$]"
    assert label("n_jets") == "n_jets"
    assert [number(v) for v in (0.01234, -45.64, 999.7, -1190.4, 2.5e7)] == ["0.0123", "-45.6", "1,000", "-1,190",
                                                                            "2.5e+07"]


def test_progress_bar_on_a_terminal_only(monkeypatch):
    for terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress([1, 2, 3], "counting")) == [1, 2, 3]
        assert ("counting" in stream.getvalue()) == terminal


def test_pca(explored):
    ax = explored.figures["pca"].axes[0]
    shown = {c.get_label(): np.asarray(c.get_offsets()) for c in ax.collections}
    assert {name: len(points) for name, points in shown.items()} == {"normal": 400, "anomalous": 200}
    components = explored.numbers["pca"]["components"]
    assert 0.33 < components[0]["variance"] < 0.45  # three independent features of equal spread
    assert set(components[0]["leading"]) == {"mass", "pt", "eta"}
    assert "principal component 1 [background spread]" in ax.get_xlabel()
    assert f"{components[1]['variance']:.0%} of the variance" in ax.get_ylabel()
    assert np.linalg.norm(shown["anomalous"].mean(0)) > 1 > np.linalg.norm(shown["normal"].mean(0))


def test_correlations_of_what_is_known():
    rng = np.random.default_rng(0)
    u = rng.normal(size=(300, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.3], [0, 0, 1]])
    known = rng.random(u.shape) < 0.8
    c = correlations(u, known)
    for i in range(3):
        for j in range(3):
            both = known[:, i] & known[:, j]
            assert c[i, j] == pytest.approx(np.corrcoef(u[both, i], u[both, j])[0, 1])
    few = known.copy()
    few[9:, 0] = False
    assert np.isnan(correlations(u, few)[0]).all()
    assert np.isnan(correlations(np.ones((50, 2)), np.ones((50, 2), bool))).all()


def test_correlation_picture(explored):
    ax = explored.figures["correlation"].axes[0]
    numbers, shown = explored.numbers["correlation"], ax.images[0].get_array()
    assert numbers["features"] == [t.get_text() for t in ax.get_yticklabels()] == ["mass", "pt", "eta"]
    below, above = np.array(numbers["normal"]), np.array(numbers["anomalous"])
    np.testing.assert_array_equal(np.tril(shown), np.tril(below))
    np.testing.assert_array_equal(np.triu(shown, 1), np.triu(above, 1))
    assert ax.get_title().startswith("below the diagonal: normal events; above: anomalous")


def test_distances(explored):
    ax = explored.figures["distances"].axes[0]
    assert ax.get_xlabel() == "distance between two events [background spread]"
    legend = [t.get_text() for t in ax.get_legend().get_texts()]
    assert legend == ["normal - normal (40,000 pairs)", "normal - anomalous (40,000 pairs)"]
    u = (NORMALS[:, :1] - TRAIN[:, :1].mean()) / TRAIN[:, :1].std()
    numbers = explore_data(TRAIN[:, :1], TEST[:, :1], Y).numbers["distances"]
    expected = np.median(cdist(u, u)[np.triu_indices(400, 1)])
    assert numbers["median"]["normal - normal"] == pytest.approx(expected, rel=0.1)
    assert explored.numbers["distances"]["anomalous_is_farther"] > 0.6


def test_numbers_of_each_feature(explored):
    eta = explored.numbers["features"][2]
    assert eta["feature"] == "eta"
    assert eta["anomalous"]["missing"] == 0.25
    known = [x[~np.isnan(x[:, 2]), 2] for x in (NORMALS, ANOMALIES)]
    np.testing.assert_allclose(eta["normal"]["quartiles"], np.quantile(known[0], (0.25, 0.5, 0.75)))
    assert eta["ks"] == pytest.approx(ks_2samp(*known).statistic)
    assert explored.notes == ["no spread in the training background, so left out of PCA, correlations and distances: "
                              "fixed"]


def test_without_labels_it_shows_what_it_can():
    result = explore_data(TRAIN, TEST, None)
    assert "no labels: test events are shown as one class, beside the training background" in result.notes
    assert set(steps(result.figures["features_1"].axes[0])) == {GREY, NORMAL}
    assert result.figures["features_1"].axes[0].get_xlabel() == "x0"
    assert list(result.numbers["distances"]["median"]) == ["test - test"]
    assert np.isnan(result.numbers["features"][0]["ks"])


@pytest.mark.parametrize(("present", "absent"), [(0, "anomalous"), (1, "normal")])
def test_one_class(present, absent):
    result = explore_data(TRAIN, TEST[present == Y], Y[present == Y])
    n = (present == Y).sum()
    assert f"no {absent} event among the {n} test events, so nothing of theirs is shown" in result.notes
    assert {"features_1", "pca", "correlation", "distances"} == set(result.figures)
    assert f"n_{absent}" not in result.numbers


def test_a_single_test_event():
    result = explore_data(TRAIN, TEST[:1], Y[:1], NAMES)
    assert "one normal event, so there is no distance between two" in result.notes
    assert set(result.figures) == {"features_1", "pca", "correlation"}
    assert steps(result.figures["features_1"].axes[0])[NORMAL][0].sum() == 1


def test_no_test_event():
    result = explore_data(TRAIN, TEST[:0], None)
    assert "no test event among the 0 test events, so nothing of theirs is shown" in result.notes
    assert list(result.numbers["distances"]["median"]) == ["training - training"]


def test_one_feature_has_no_second_component():
    result = explore_data(TRAIN[:, 1:2], TEST[:, 1:2], Y, ["pt"])
    assert result.notes == ["only pt has a spread, so there is no second principal component"]
    assert "pca" not in result.figures


def test_a_feature_missing_everywhere():
    train, test = TRAIN.copy(), TEST.copy()
    train[:, 2] = test[:, 2] = np.nan
    result = explore_data(train, test, Y, NAMES)
    assert "missing in every event" in [t.get_text() for t in result.figures["features_1"].axes[2].texts]


@pytest.mark.parametrize(("arguments", "message"), [
    ((TRAIN[:1], TEST, Y), "expected at least 2 training background events, to see a spread, given 1"),
    ((TRAIN[:, 3:], TEST[:, 3:], Y), "none of the 1 features has a spread in the 600 training events"),
    ((TRAIN[:, :2], TEST, Y), r"expected X_train \(n, D\) and X_test \(m, D\), given \(600, 2\) and \(600, 4\)"),
    ((TRAIN, TEST, Y[1:]), r"expected y_test of shape \(600,\)"),
    ((TRAIN, TEST, Y + 1), r"with 0 \(normal\) and 1 \(anomalous\)"),
    ((TRAIN, np.where(TEST > 100, np.inf, TEST), Y, NAMES), "feature 'mass' is infinite in the test events"),
    ((TRAIN, TEST, Y, ("a", "b")), "2 feature names given for 4 features"),
])
def test_bad_data(arguments, message):
    with pytest.raises(DataError, match=message):
        explore_data(*arguments)
    with pytest.raises(DataError, match="1 units given for 4 features"):
        explore_data(TRAIN, TEST, Y, units=["GeV"])


def test_pictures_are_written_whole_and_the_same_again(explored, tmp_path):
    files = explored.save(tmp_path / "new" / "pictures")
    assert {f.name for f in files} == {f"{n}.{k}" for n in explored.figures for k in ("png", "pdf")}
    assert all(f.read_bytes().startswith({".png": b"\x89PNG", ".pdf": b"%PDF"}[f.suffix]) for f in files)
    again = save(explored.figures["distances"], tmp_path / "again.pdf")
    assert again.read_bytes() == (tmp_path / "new" / "pictures" / "distances.pdf").read_bytes()


def test_without_the_plotting_libraries(monkeypatch):
    monkeypatch.setitem(sys.modules, "mplhep", None)
    with pytest.raises(RuntimeError, match=r"pictures need matplotlib, mplhep and hist.*fused-ebm\[plots\]"), styled():
        pass


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command(tmp_path):
    """HiggsML's missing marker is a missing value, and its units are on the axes."""
    out, rng = tmp_path / "pictures", np.random.default_rng(0)
    lines = [",".join(["EventId", *higgsml.SCHEMA.features, "Weight", "Label"])]
    for i in range(200):
        x = np.where(np.arange(30) == 4, -999.0 if i % 4 else 1.5, rng.gamma(2, 30, 30))
        lines.append(",".join([str(i), *(f"{v:.3f}" for v in x), "0.5", "bs"[i % 2]]))
    (tmp_path / "higgs.csv").write_text("\n".join(lines) + "\n")
    result = run("explore", tmp_path / "higgs.csv", "--out", out, "--json", tmp_path / "numbers.json")
    assert result.exit_code == 0, result.output
    assert f"{out}: 10 files" in result.stdout
    assert {f.stem for f in out.iterdir()} == {"features_1", "features_2", "pca", "correlation", "distances"}
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["n_training"] > numbers["n_normal"] > 0
    assert numbers["features"][0]["unit"] == "GeV"
    assert 0.3 < numbers["features"][4]["training"]["missing"] < 0.7
    assert numbers["features"][4]["normal"]["quartiles"] == [1.5] * 3
    assert "DER_deltaeta_jet_jet" in result.stdout


def test_command_without_labels(tmp_path):
    rows = ["pt", *(f"{a:.4f}" for a in np.random.default_rng(0).normal(size=60))]
    (tmp_path / "plain.csv").write_text("\n".join(rows) + "\n")
    result = run("explore", tmp_path / "plain.csv", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "note: no labels" in result.stdout


def test_command_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "one.csv").write_text("pt,eta\n1.0,2.0\n")
    for arguments, message in (
        (("toy:300", "--out", tmp_path / "file"), f"{tmp_path / 'file'} cannot be written"),
        (("toy:300", "--out", "/proc/pictures"), "/proc/pictures cannot be written"),
        ((tmp_path / "one.csv", "--out", tmp_path / "out"), "event in the "),
    ):
        result = run("explore", *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert "Traceback" not in result.output
