"""The physics report of a reduced precision: its arithmetic, what it cannot say, and the command that stores it."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from ebm.bundle import Bundle
from ebm.events import DataError, load_events, split
from ebm.preprocess import Preprocessing
from ebm.threshold import calibrate as threshold_of
from kernels import calibrate, load_scorer
from kernels.__main__ import app
from kernels.calibrate import physics_report
from kernels.registry import REDUCED

TOY = "toy:2000"


class Perturbed:
    """Stands for native in one precision: energies of the reference in fp32, with a known error."""

    isa = "test"

    def __init__(self, bundle, error):
        self.reference, self.error = load_scorer(bundle, "reference", precision="fp32"), error

    def energy(self, x):
        energy = self.reference.energy(x)
        return energy + self.error * np.random.default_rng(0).standard_normal(len(energy), np.float32)

    def energy_and_score(self, x):
        return self.energy(x), self.reference.energy_and_score(x)[1] * np.float32(1 + self.error)


@pytest.fixture(scope="module")
def events():
    return load_events(TOY)


@pytest.fixture(scope="module")
def bundle(events):
    """Random weights, as if trained on these events, with a threshold that a tenth of the background passes."""
    b = Bundle.random(64, 32, 1, preprocessing=Preprocessing.fit(events.background().x, events.schema))
    b = replace(b, schema=events.schema, provenance={"source": events.source})
    energy = load_scorer(b, "reference", precision="fp32").energy(events.background().x)
    return replace(b, threshold=threshold_of(energy, rate=0.1, level=b.default_level))


@pytest.fixture
def native(monkeypatch):
    """Set the energy error of each precision; one that has none cannot run. Perfect unless it is told otherwise."""
    errors = {"fp32": 0.0, "int16": 0.0, "int8": 0.0}

    def scorer(bundle, precision):
        if precision not in errors:
            raise RuntimeError(f"this processor has no instructions for {precision}")
        return Perturbed(bundle, errors[precision])

    monkeypatch.setattr(calibrate, "_native", scorer)
    return errors


def run(*arguments):
    return CliRunner().invoke(app, ["calibrate", *(str(a) for a in arguments)])


def refused(*arguments):
    """The one sentence on stderr of a command that must end with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_figures_by_hand():
    truth, energy = np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 3.5, 3])
    label = np.array([0, 0, 0, 1])
    assert calibrate._figures(energy, truth, label, 2.5) == pytest.approx({
        "auroc": 2 / 3, "spearman": 0.8, "rms_energy": 0.75 / np.sqrt(1.25), "signal_efficiency": 1.0,
        "background_flag_rate": 1 / 3, "n_flagged": 2, "n_flags_different": 1, "flag_agreement": 0.75})


def test_a_perfect_precision_changes_nothing(bundle, events, native):
    r = physics_report(bundle, events, "int16")
    assert list(r["figures"]) == ["fp64", "fp32", "int16"]
    assert r["figures"]["fp32"] == r["figures"]["int16"]
    for f in r["figures"].values():
        assert (f["flag_agreement"], f["n_flags_different"]) == (1.0, 0)
        assert f["spearman"] == pytest.approx(1, abs=1e-6)
        assert f["rms_energy"] < 5e-6
    assert r["rms_score"] < 5e-6
    assert all(abs(r["change"][key]) < 1e-3 for key in ("auroc", "signal_efficiency", "background_flag_rate"))


@pytest.mark.parametrize("precision", REDUCED)
def test_figures_are_of_the_test_folds(bundle, events, native, precision):
    native[precision] = 0.3 * float(load_scorer(bundle, "reference").energy(events.x).std())
    r = physics_report(bundle, events, precision)
    kept = events[split(events).test]
    truth = load_scorer(bundle, "reference").energy(kept.x)
    energy = Perturbed(bundle, native[precision]).energy(kept.x)
    signal, t = kept.label == 1, bundle.threshold.energy
    f, change = r["figures"][precision], r["change"]
    assert (r["events"], r["n"]) == ("test folds", len(kept))
    assert (r["n_signal"], r["n_background"]) == (signal.sum(), (~signal).sum())
    assert f["auroc"] == pytest.approx(roc_auc_score(kept.label, energy))
    assert r["figures"]["fp64"]["auroc"] == pytest.approx(roc_auc_score(kept.label, truth))
    assert change["auroc"] == pytest.approx(f["auroc"] - r["figures"]["fp64"]["auroc"])
    assert change["auroc_interval"][0] < change["auroc"] < change["auroc_interval"][1]
    assert change["signal_efficiency"] == pytest.approx((energy > t)[signal].mean() - (truth > t)[signal].mean())
    assert f["background_flag_rate"] == pytest.approx((energy > t)[~signal].mean())
    different = (energy > t) != (truth > t)
    assert f["n_flags_different"] == different.sum() > 0
    assert f["flag_agreement"] == pytest.approx(1 - different.mean())
    assert f["spearman"] == pytest.approx(spearmanr(energy, truth).statistic)
    assert f["rms_energy"] == pytest.approx(np.sqrt(np.mean((energy - truth) ** 2)) / truth.std())
    assert r["figures"]["fp32"]["n_flags_different"] == 0
    assert r["rms_score"] == (pytest.approx(native[precision], rel=1e-3) if precision == "int16" else None)
    assert (r["model_digest"], r["data_digest"]) == (bundle.digest, events.digest)
    assert (r["precision"], r["data"], r["instruction_set"]) == (precision, events.source, "test")
    assert r["threshold"] == t


def test_float64_comes_in_parts(bundle, events, native, monkeypatch):
    whole = physics_report(bundle, events, "int16")
    monkeypatch.setattr(calibrate, "_PART", 100)
    parts = physics_report(bundle, events, "int16")
    assert parts["figures"]["int16"] == pytest.approx(whole["figures"]["int16"])
    assert parts["rms_score"] == pytest.approx(whole["rms_score"])


def test_foreign_data_count_in_full(bundle, events, native):
    foreign = replace(bundle, provenance={"source": "other.csv", "data_digest": "0123"})
    r = physics_report(foreign, events, "int8")
    assert (r["events"], r["n"]) == ("all", len(events))


def test_without_labels_the_ranks_and_flags_remain(bundle, events, native):
    native["int8"] = 0.1
    r = physics_report(bundle, replace(events, label=None), "int8")
    assert (r["n_signal"], r["n_background"]) == (None, None)
    assert set(r["change"].values()) == {None}
    for f in r["figures"].values():
        assert {f["auroc"], f["signal_efficiency"], f["background_flag_rate"]} == {None}
        assert f["n_flagged"] > 0
        assert f["flag_agreement"] > 0.9
        assert f["spearman"] > 0.9
        assert f["rms_energy"] < 1


def test_what_a_sample_cannot_say_is_none(bundle, events, native):
    """No threshold, one class, one event: never NaN, which model.json forbids."""
    bundle = replace(bundle, provenance={})
    r = physics_report(replace(bundle, threshold=None), events, "int8")
    assert r["change"]["auroc"] == pytest.approx(0, abs=1e-3)
    for figures in r["figures"].values():
        assert {figures[key] for key in ("signal_efficiency", "flag_agreement", "n_flagged", "n_flags_different")} == {
            None}
    background = physics_report(bundle, events.background(), "int8")
    assert (background["n_signal"], background["change"]["auroc"], background["change"]["auroc_interval"]) == (
        0, None, None)
    assert background["change"]["background_flag_rate"] == pytest.approx(0, abs=1e-3)
    one = physics_report(bundle, events[:1], "int16")
    assert one["figures"]["int16"]["spearman"] is None
    for report in (r, background, one):
        json.dumps(report, allow_nan=False)
    with pytest.raises(DataError, match="0 events, expected some"):
        physics_report(bundle, events[:0], "int8")


def test_command_prints_and_stores(bundle, native, tmp_path):
    bundle.save(tmp_path / "m")
    result = run(tmp_path / "m", TOY)
    assert result.exit_code == 0, result.output
    for word in ("AUROC", "signal efficiency", "Spearman", "flags unlike float64", "int8 - float64",
                 "calibrated in fp32", f"The physics report of int16 and of int8 was stored in {tmp_path / 'm'}"):
        assert word in result.stdout
    stored = Bundle.load(tmp_path / "m")
    assert set(stored.reports) == set(REDUCED)
    assert (stored.digest, stored.threshold, stored.provenance) == (bundle.digest, bundle.threshold, bundle.provenance)

    del native["int16"]
    native["int8"] = 0.2
    result = run(tmp_path / "m", TOY, "--json")
    printed = json.loads(result.stdout)
    again = Bundle.load(tmp_path / "m")
    assert printed["reports"] == {"int8": again.reports["int8"]}
    assert printed["not_run"] == {"int16": "this processor has no instructions for int16"}
    assert again.reports["int8"] != stored.reports["int8"]
    assert again.reports["int16"] == stored.reports["int16"]
    assert "not run: int16: this processor" in run(tmp_path / "m", TOY).stdout
    assert os.listdir(tmp_path) == ["m"]


def test_command_prints_what_is_unknown(bundle, events, native, tmp_path, monkeypatch):
    replace(bundle, threshold=None).save(tmp_path / "m")
    monkeypatch.setattr("ebm.events.load_events", lambda data: replace(events, label=None))
    result = run(tmp_path / "m", TOY, "--precision", "int8")
    assert result.exit_code == 0, result.output
    assert "no labels" in result.stdout
    assert "This model has no threshold" in result.stdout


def test_command_refuses(bundle, native, tmp_path):
    path = tmp_path / "m"
    bundle.save(path)
    assert "precision is 'fp16', expected 'int16' or 'int8'" in refused(path, TOY, "--precision", "fp16")
    assert "no such model directory" in refused(tmp_path / "none", TOY)
    assert "toy:x" in refused(path, "toy:x")
    foreign = replace(bundle, schema=replace(bundle.schema, features=tuple(f"x{j}" for j in range(64))))
    foreign.save(tmp_path / "foreign")
    assert "'x0' in the model" in refused(tmp_path / "foreign", TOY)
    del native["int16"], native["int8"]
    message = refused(path, TOY)
    assert "no reduced precision can run: int16: this processor has no instructions for int16; int8: " in message
    assert Bundle.load(path).reports == {}


def test_command_refuses_what_native_does_not_compute(tmp_path):
    Bundle.random(64, kind="score").save(tmp_path / "m")
    assert "this one is of kind 'score'" in refused(tmp_path / "m", TOY, "--precision", "int8")


def test_help_teaches():
    result = run("--help")
    assert result.exit_code == 0
    assert "python -m kernels calibrate" in result.stdout


@pytest.mark.parametrize("precision", REDUCED)
def test_from_end_to_end(bundle, tmp_path, precision):
    """The precisions of the C++ backend itself, where it has them on this processor."""
    native_cpu = pytest.importorskip("kernels.native_cpu", reason="the C++ library was not built")
    try:
        native_cpu.NativeScorer(bundle, precision=precision)
    except (RuntimeError, TypeError) as e:
        pytest.skip(f"native has no {precision} here: {str(e).splitlines()[0]}")
    path, x = tmp_path / "m", load_events("toy:200").x
    bundle.save(path)
    with pytest.raises(ValueError, match="offered only with its physics report"):
        load_scorer(path, "native", precision=precision)
    result = run(path, TOY, "--precision", precision)
    assert result.exit_code == 0, result.output
    report = Bundle.load(path).reports[precision]
    assert report["figures"][precision]["spearman"] > 0.99
    assert abs(report["change"]["auroc"]) < 0.02
    scorer = load_scorer(path, precision=precision)
    assert (scorer.name, scorer.precision, scorer.isa) == ("native", precision, report["instruction_set"])
    assert load_scorer(path).precision == "fp32"
    truth = load_scorer(path, "reference").energy(x)
    assert np.std(scorer.energy(x) - truth) < 0.1 * np.std(truth)
