"""`python -m ebm calibrate` and `evaluate`: figures of labelled, weighted events, and what cannot be evaluated."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ebm import higgsml, metrics
from ebm.__main__ import app
from ebm.bundle import Bundle
from ebm.evaluate import evaluate
from ebm.events import DataError, Events, Schema, load_events, split
from ebm.preprocess import Preprocessing
from ebm.significance import ams
from ebm.threshold import calibrate, trigger_rate
from kernels import load_scorer

SCHEMA = Schema("s", ("pt", "n_jets", "m_jj"), ("GeV", "", "GeV"))


@pytest.fixture(autouse=True)
def few_baselines(monkeypatch):
    """Two that cost nothing: what is tested here is what is said of them."""
    from ebm import baselines, evaluate

    monkeypatch.setattr(evaluate, "baselines", lambda schema: [baselines.Norm(), baselines.IsolationForest(trees=5)])


def events(n=3000, **more):
    """Signal, every tenth event, has more momentum; the mass follows the momentum, and jets come at random."""
    rng = np.random.default_rng(0)
    label = (np.arange(n) % 10 == 9).astype(np.int8)
    pt = rng.exponential(size=n) * (1 + label)
    x = np.stack([pt, rng.integers(0, 4, n), 100 * pt + rng.normal(size=n)], 1).astype(np.float32)
    more = {"label": label, "weight": rng.uniform(0.5, 1.5, n), **more}
    return Events(SCHEMA, x, np.arange(n).astype(str), source="data.csv", **more)


def energy(x):
    return x[:, 0]


@pytest.fixture
def bundle():
    b = replace(Bundle.random(3, 8, 1), schema=SCHEMA, preprocessing=Preprocessing.fit(events().x, SCHEMA))
    return replace(b, threshold=calibrate(energy(events().background().x), 0.01))


def test_the_figures(bundle):
    e = events()
    r = evaluate(bundle, e, energy, resamples=50, input_rate=1e6, prescale=10)
    assert r["events"] == "all"
    expected = metrics.evaluate_anomaly_detection(e.label, energy(e.x))
    found = r["detectors"]["energy"]
    assert {k: found[k] for k in ("auroc", "sic", "prevalence")} == {k: expected[k] for k in ("auroc", "sic",
                                                                                              "prevalence")}
    assert list(r["energy_minus"]) == ["|x|", "isolation forest"]
    weighted = r["weighted"]["energy"]
    assert weighted["auroc"] == metrics.auroc(e.label, energy(e.x), e.weight) != found["auroc"]
    assert "ams" not in weighted
    trigger = r["flag"]["trigger"]
    assert (trigger["expected"], trigger["at_most"]) == trigger_rate(bundle.threshold, 1e6, 10)
    assert r["multiplicity"]["auroc_within"]["energy"] == metrics.stratified_auroc(e.label, energy(e.x), e.x[:, 1])
    cuts = r["sculpting"]["cuts"]
    assert r["sculpting"]["feature"] == "m_jj"
    assert cuts[0]["p_value"] < 0.01  # the energy is the momentum, which is the mass
    assert cuts[-1]["cut"] == bundle.threshold.energy
    other = evaluate(bundle, e, energy, resamples=5, mass="n_jets")["sculpting"]
    assert other["feature"] == "n_jets"
    assert other["cuts"][0]["distance"] < cuts[0]["distance"] / 3


def test_without_weights_or_mass(bundle):
    e = events(weight=None)
    e.x[:, 2] = 80.0
    r = evaluate(bundle, e, energy, resamples=5)
    assert (r["weighted"], r["sculpting"]) == ({}, {})


def test_ams_of_higgsml():
    rng = np.random.default_rng(0)
    n = 2000
    x = rng.exponential(size=(n, 30)).astype(np.float32)
    label = (np.arange(n) % 4 == 0).astype(np.int8)
    e = Events(higgsml.SCHEMA, x, np.arange(n).astype(str), label, np.where(label, 0.01, 3.0), source="higgs.csv")
    b = replace(Bundle.random(30, 8, 1), schema=higgsml.SCHEMA, preprocessing=Preprocessing.fit(x, higgsml.SCHEMA),
                threshold=calibrate(x[:, 0], 0.1))
    r = evaluate(b, e, energy, resamples=5)["weighted"]
    flag, t = x[:, 0] > b.threshold.energy, (691.99, 410_999.85)
    expected = ams(t[0] * flag[label == 1].mean(), t[1] * flag[label == 0].mean())
    assert r["energy"]["ams"]["at_cut"] == pytest.approx(expected)
    assert r["energy"]["ams"]["max"] >= expected
    assert np.isnan(r["|x|"]["ams"]["at_cut"])


@pytest.mark.parametrize(("more", "message"), [
    ({"label": None}, "no labels"),
    ({"label": np.zeros(3000, np.int8)}, "0 signal and 3000 background events, expected some of both"),
    ({"label": np.ones(3000, np.int8)}, "3000 signal and 0 background events"),
    ({"weight": np.zeros(3000)}, "weights of the background sum to 0"),
    ({"weight": np.where(np.arange(3000) % 10 == 9, -1.0, 1.0)}, "weights of the signal sum to -300"),
])
def test_what_cannot_be_evaluated(bundle, more, message):
    with pytest.raises(DataError, match=f"data.csv: .*{message}"):
        evaluate(bundle, events(**more), energy, resamples=5)


def test_one_event(bundle):
    with pytest.raises(DataError, match="0 signal and 1 background events"):
        evaluate(bundle, events(1), energy)
    with pytest.raises(ValueError, match="scores are NaN"):
        evaluate(bundle, events(), lambda x: np.full(len(x), np.nan))
    with pytest.raises(ValueError, match="'m_tt' is no feature of s"):
        evaluate(bundle, events(), energy, mass="m_tt")
    with pytest.raises(ValueError, match="input rate above 0 Hz"):
        evaluate(bundle, events(), energy, resamples=5, input_rate=0.0)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_detector_has_to_find_every_kind_of_signal(bundle):
    kind = np.where(np.arange(3000) % 20 == 9, "near", "far")
    process = np.where(np.arange(3000) % 10 == 9, kind, "qcd")
    e = events(process=process)
    e.x[process == "far", 0] += 100
    r = evaluate(bundle, e, energy, resamples=5)["signals"]
    near, far = (r["detectors"]["energy"][k] for k in ("near", "far"))
    assert r["rejection"] == metrics.evaluate_anomaly_detection(e.label, energy(e.x))["tightest_rejection"]
    cut = np.sort(energy(e.x[e.label == 0]))[-2]
    assert (near, far) == (np.mean(e.x[process == "near", 0] > cut), 1)
    assert r["detectors"]["energy"]["geometric_mean"] == pytest.approx((near * far) ** 0.5)
    assert evaluate(bundle, events(), energy, resamples=5)["signals"] == {}


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory):
    """A random network for toy events: what is calibrated need not be good."""
    e = load_events("toy:3000")
    b = Bundle.random(64, 16, 1, preprocessing=Preprocessing.fit(e.x, e.schema))
    path = tmp_path_factory.mktemp("models") / "m"
    replace(b, schema=e.schema, provenance={"source": "toy:3000", "data_digest": e.digest}).save(path)
    return path


def test_calibrate_score_and_evaluate(toy_model, tmp_path):
    e = load_events("toy:3000")
    done = run("calibrate", toy_model, "toy:3000", "--rate", 0.02, "--by", "n_jets")
    assert done.exit_code == 0, done.output
    assert "Every class has its own guarantee" in done.stdout
    bundle = Bundle.load(toy_model)
    energies = load_scorer(bundle).energy(e[split(e).calibrate].background().x)
    assert bundle.threshold == calibrate(energies, 0.02, level=bundle.default_level)
    assert bundle.provenance["calibration"]["backend"] == load_scorer(bundle).name
    assert len(bundle.class_thresholds.lowest) > 1

    assert run("score", toy_model, "toy:300", "--out", tmp_path / "s.parquet").exit_code == 0
    table, some = pq.read_table(tmp_path / "s.parquet"), load_events("toy:300")
    energy = table["energy"].to_numpy()
    assert np.array_equal(table["flag"].to_numpy(), energy > bundle.threshold.energy)
    assert np.array_equal(table["flag_by_n_jets"].to_numpy(), bundle.class_thresholds.flag(some, energy))

    pytest.importorskip("mplhep", reason="pictures need matplotlib, mplhep and hist")
    done = run("evaluate", toy_model, "toy:3000", "--json", tmp_path / "e.json", "--pictures", tmp_path / "p",
               "--input-rate", 1e5)
    assert done.exit_code == 0, done.output
    for part in ("test folds", "of 0.1 MHz", "By n_jets: flagged background", "shape m_jj?", "at 0.99", "SIC"):
        assert part in done.stdout, part
    r = json.loads((tmp_path / "e.json").read_text())
    by, tested = r["flag"]["by"], e[split(e).test]
    assert sum(c["background"]["n"] for c in by["classes"] if c["background"]) == r["n_background"]
    flags = bundle.class_thresholds.flag(tested, load_scorer(bundle).energy(tested.x))
    assert by["background"]["rate"] == flags[tested.label == 0].mean()
    assert sorted(r["pictures"]) == sorted(p.name for p in (tmp_path / "p").iterdir())
    assert "sic.png" in r["pictures"]


def test_bad_arguments(toy_model, tmp_path):
    for arguments, message in (
        (["calibrate", toy_model, "toy:3000", "--by", "jets"], "by is 'jets'"),
        (["calibrate", toy_model, "toy:3000", "--weighted"], "no weights to calibrate with"),
        (["calibrate", toy_model, "toy:3000", "--rate", "2"], "between 0 and 1"),
        (["calibrate", tmp_path, "toy:3000"], "model.json"),
        (["evaluate", toy_model, "toy:3000", "--mass", "m_tt"], "'m_tt' is no feature"),
        (["evaluate", toy_model, "toy:3000", "--pictures", toy_model / "model.json"], "cannot be written"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert "Traceback" not in done.output
