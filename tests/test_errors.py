"""Error analysis: what it calls a mistake is one, and its pulls are what the energy is made of."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussians import SIGMAS, Gaussian, rms, sample
from scipy.stats import ks_2samp
from typer.testing import CliRunner

from ebm.__main__ import app
from ebm.attribution import faithfulness
from ebm.bundle import Bundle
from ebm.errors import error_analysis, summary
from ebm.events import DataError, load_events
from ebm.style import number
from kernels import load_scorer

DEMO = Path(__file__).parents[1] / "models" / "demo"


@pytest.fixture(scope="module")
def analysed():
    u, y = sample(1000, outliers=100)
    model = Gaussian(24)
    scores = model(torch.as_tensor(u)).detach().numpy()
    return u, y, scores, error_analysis(model, u, y, scores, SIGMAS, rejection=0.9)


def test_false_positives_and_negatives(analysed):
    u, y, scores, result = analysed
    cut = result.numbers["cut"]
    assert (scores[y == 0] > cut).sum() == 90  # a tenth of 900
    positives, negatives = (result.numbers[k] for k in ("false_positives", "false_negatives"))
    assert (positives["n"], positives["of"]) == (90, 900)
    assert result.numbers["rejection"] == 0.9
    assert (negatives["n"], negatives["of"]) == (((y == 1) & (scores <= cut)).sum(), 100)
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
    assert legend == ["background", "signal", "false positives (90 of 900)"]
    points = fig.axes[0].containers[-1].lines[0].get_ydata()
    assert np.nansum(points) == pytest.approx(1)
    assert np.nanmin(points[points > 0]) == pytest.approx(round(90 * np.nanmin(points[points > 0])) / 90)
    missed = [t.get_text() for t in result.figures["false_negatives"].legends[0].get_texts()]
    assert missed[:2] == ["background", "signal above the cut"]


def test_candidates(analysed):
    u, y, scores, result = analysed
    entries, order = result.numbers["candidates"], np.argsort(-scores)[:10]
    assert [int(e["event"]) for e in entries] == order.tolist()
    assert [e["score"] for e in entries] == pytest.approx(scores[order].tolist())
    expected = u[order] / rms(u[y == 0])
    shown = np.array([[e["groups"][f"x{j}"] for j in range(24)] for e in entries])
    np.testing.assert_allclose(np.abs(shown), np.abs(expected), rtol=1e-5)
    assert (shown >= 0).all()  # less of anything is more ordinary for a Gaussian
    first = result.figures["candidate_1"]
    features = first.axes[0]
    strongest = np.argsort(-np.abs(expected[0]))[:10]
    assert [t.get_text() for t in features.get_yticklabels()] == [f"x{j} = {number(u[order[0], j])}" for j in strongest]
    np.testing.assert_allclose([b.get_width() for b in features.containers[0]], expected[0, strongest], rtol=1e-5)
    assert features.get_xlabel() == "pull [RMS in background]"
    assert [t.get_text() for t in features.get_legend().get_texts()] == ["usual in background"]
    assert first.get_suptitle() == f"Rank 1: event {order[0]}, score {scores[order[0]]:.4g}, signal"
    np.testing.assert_allclose([f["u"] for f in entries[0]["features"]], [f["value"] for f in entries[0]["features"]])
    overview = result.figures["candidates"].axes[0]
    np.testing.assert_allclose(overview.images[0].get_array(), shown)
    assert [t.get_text() for t in overview.get_xticklabels()] == [f"x{j}" for j in range(24)]


def test_faithfulness_picture_and_summary(analysed):
    result = analysed[3]
    check, ax = result.numbers["faithfulness"], result.figures["faithfulness"].axes[0]
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    for name, values in check["drop"].items():
        np.testing.assert_array_equal(lines[name], values)
    assert ax.get_ylabel() == "mean fall of the energy\n[spread of background energies]"
    text = summary(result.numbers)
    assert text[0].startswith("90 of 900 background events are above the cut")
    assert "farther from the mean of background than" in text[0]
    assert f"background energies, above whose mean they lie by {check['excess']:.2f} spreads" in text[-1]
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
    assert any(t.get_text().startswith("MET\n") for t in fig.axes[1].get_yticklabels())
    u = scorer.bundle.preprocessing(events.x[top : top + 1].astype(float))[0]
    assert values["MET"]["u"] == pytest.approx(u[40])
    first = entry["features"][0]
    assert fig.axes[0].get_yticklabels()[0].get_text().endswith(f"({first['u']:+.1f})")
    assert "in brackets: the preprocessed value" in fig.axes[0].get_xlabel()
    assert sum(result.numbers["false_positives"]["processes"].values()) == pytest.approx(1)
    assert result.numbers["sigma"] == scorer.bundle.sigmas[scorer.bundle.default_level]
    assert result.numbers["above_the_models_threshold"] == int((energy > scorer.threshold).sum())
    assert "candidate_3" not in result.figures


def test_without_labels():
    u = sample()[0]
    result = error_analysis(Gaussian(24), u, None, (u**2).sum(1), SIGMAS, n_top=1)
    assert result.notes == ["no labels: false positives and false negatives cannot be told"]
    assert set(result.figures) == {"candidate_1", "candidates", "faithfulness"}
    title = result.figures["candidate_1"].get_suptitle()
    assert "background" not in title
    assert "signal" not in title
    legend = result.figures["candidate_1"].axes[0].get_legend().get_texts()
    assert [t.get_text() for t in legend] == ["usual in these events"]
    assert result.figures["faithfulness"].axes[0].get_ylabel().endswith("[spread of all energies]")
    assert "times the spread of all energies" in summary(result.numbers)[-1]


@pytest.mark.parametrize(("kept", "note", "picture"), [
    (0, "none of 360 events is signal, so there are no false negatives", "false_positives"),
    (1, "0 of 40 events are background, too few for a cut, so neither false positives nor false negatives are shown",
     None),
])
def test_one_class(kept, note, picture):
    u, y = sample()
    u = u[y == kept]
    result = error_analysis(Gaussian(24), u, np.full(len(u), kept), (u**2).sum(1), SIGMAS, n_top=1)
    assert note in result.notes
    assert {k for k in result.figures if k.startswith("false")} == ({picture} if picture else set())
    assert ("faithfulness" in result.figures) == (kept == 0)
    if kept == 1:
        assert result.notes[-1].startswith("fewer than 10 background events (0): what is usual is not known")


def test_signal_alone_is_missed_at_the_models_threshold():
    u, y = sample()
    model = Gaussian(24)
    scores = (u[y == 1] ** 2).sum(1)
    model.threshold = float(np.median(scores))
    result = error_analysis(model, u[y == 1], y[y == 1], scores, SIGMAS)
    assert (result.numbers["cut"], result.numbers["rejection"]) == (model.threshold, None)
    assert result.numbers["false_negatives"]["n"] == 20
    assert set(result.figures) == {"false_negatives"}
    legend = [t.get_text() for t in result.figures["false_negatives"].legends[0].get_texts()]
    assert legend == ["signal above the cut", "false negatives (20 of 40)"]
    assert summary(result.numbers)[0].startswith("20 of 40 signal events are not above the threshold ")
    assert "the model's threshold is taken" in result.notes[0]


@pytest.mark.parametrize(("n", "labelled", "note"), [
    (1, True, "fewer than 10 background events (1)"), (9, True, "fewer than 10 background events (9)"),
    (1, False, "fewer than 10 events (1)")])
def test_a_few_events_cannot_say_what_is_usual(n, labelled, note):
    u, y = sample()
    result = error_analysis(Gaussian(24), u[:n], y[:n] if labelled else None, (u[:n] ** 2).sum(1), SIGMAS)
    assert result.notes[-1].startswith(f"{note}: what is usual is not known")
    assert result.figures == {}
    assert [(e["features"], e["groups"]) for e in result.numbers["candidates"]] == [([], {})] * n
    assert all("KS" not in line for line in summary(result.numbers))


def test_a_few_mistakes_are_counted_and_not_compared():
    u, y = sample()
    u, y = np.vstack([u[y == 0][:8], u[y == 1]]), np.repeat([0, 1], [8, 40])
    result = error_analysis(Gaussian(24), u, y, (u**2).sum(1), SIGMAS)
    assert result.numbers["false_positives"] == {"n": 4, "of": 8, "processes": {}}  # half of so few
    assert "false_positives" not in result.figures
    assert any(n.startswith("false positives at the cut") and "4, to compare with 8 of background" in n
               for n in result.notes)


def test_the_cut_keeps_enough_to_look_at():
    u, y = sample()
    result = error_analysis(Gaussian(24), u, y, (u**2).sum(1), SIGMAS, n_top=1)
    assert result.numbers["false_positives"]["n"] == 50
    assert result.numbers["rejection"] == pytest.approx(1 - 50 / 360)


def test_nothing_missed():
    u, y = sample()
    result = error_analysis(Gaussian(24), u, y, y + 0.0, SIGMAS, n_top=1, rejection=0.8)
    assert result.notes == ["no false positives at the cut 0", "no false negatives at the cut 0"]
    assert result.numbers["false_negatives"] == {"n": 0, "of": 40, "processes": {}}
    assert len(summary(result.numbers)) == 1


@pytest.mark.parametrize("labelled", [True, False])
def test_energies_without_spread_leave_out_the_check_alone(labelled):
    u = np.tile(sample()[0][0], (40, 1))
    y = np.zeros(40, int) if labelled else None
    result = error_analysis(Gaussian(24), u, y, (u**2).sum(1), SIGMAS, n_top=1)
    assert result.notes[-1].endswith("have no spread, so the pulls cannot be checked")
    assert set(result.figures) == {"candidate_1", "candidates"}
    assert "faithfulness" not in result.numbers
    with pytest.raises(ValueError, match="the energies of 40 normal events have no spread"):
        faithfulness(Gaussian(24), u, SIGMAS, u)


def test_an_event_without_a_large_pull_says_so():
    u, y = sample()
    u[0] = 0.5
    scores = np.zeros(len(u))
    scores[0] = 1
    result = error_analysis(Gaussian(24), u, y, scores, SIGMAS, n_top=2)
    assert result.figures["candidate_1"].get_suptitle().endswith("; no feature pulls more than usual")
    assert "no feature" not in result.figures["candidate_2"].get_suptitle()


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
    ({"event_id": ["a"]}, DataError, "event_id has 1 entries, expected one for each of 400 events"),
    ({"process": np.array(["qcd"] * 401)}, DataError, "process has 401 entries, expected one for each of 400 events"),
])
def test_bad_arguments(change, error, message):
    u, y = sample()
    arguments = {"X_test": u, "y_test": y, "scores": (u**2).sum(1), "sigmas": SIGMAS} | change
    with pytest.raises(error, match=message):
        error_analysis(Gaussian(24), **arguments)


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
