"""`python -m ebm`: train, score and evaluate, and one clear sentence for what cannot be done."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ebm import higgsml
from ebm.__main__ import app
from ebm.baselines import baselines
from ebm.bundle import Bundle
from ebm.events import load_events, split
from ebm.threshold import calibrate
from kernels import load_scorer

SMALL = ["--steps", "60", "--hidden", "32", "--batch", "128"]
TOY = "toy:2000"


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments):
    """The one sentence on stderr of a command that must end with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit | None), result.exception
    errors = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert "Traceback" not in result.output
    return errors[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "toy"
    result = run("train", TOY, "--out", out, *SMALL)
    assert result.exit_code == 0, result.output
    return out, result


@pytest.fixture(scope="module")
def higgs(tmp_path_factory):
    """A small file in the Kaggle layout, in which signal lies further out."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "higgs.csv"
    lines = [",".join(["EventId", *higgsml.SCHEMA.features, "Weight", "Label"])]
    for i in range(300):
        x = rng.gamma(2, 30, 30) * (1 + i % 2)
        x[26:29] = -999.0 if i % 4 < 2 else x[26:29]
        lines.append(",".join([str(i), *(f"{v:.3f}" for v in x), "0.5", "bs"[i % 2]]))
    path.write_text("\n".join(lines) + "\n")
    return path


def rewritten(path, new, change):
    """A copy of a CSV whose fields `change(row, fields)` has edited."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    new.write_text("\n".join(",".join(change(i, row)) for i, row in enumerate(rows)) + "\n")
    return new


def test_train_says_what_it_made(trained):
    out, result = trained
    bundle = Bundle.load(out)
    assert bundle.architecture.hidden_dim == 32
    assert bundle.schema.name == "hep64-v1"
    assert "NOT guaranteed" in result.stdout
    assert "29956 are needed" in result.stderr
    assert "held out" in result.stdout
    p = bundle.provenance
    assert p["command"].startswith("python -m ebm train toy:2000 --out toy --steps 60 --seed 0 --hidden 32")
    assert p["data_digest"] == load_events(TOY).digest
    assert {"python", "numpy", "torch"} <= p["versions"].keys()
    assert p["background_events"]["train"] > p["background_events"]["calibrate"] > 0
    assert str(out.parent) not in (out / "model.json").read_text()


def test_threshold_is_of_calibration_background_by_the_backend_that_runs(trained):
    out, _ = trained
    bundle, events = Bundle.load(out), load_events(TOY)
    background = events[split(events).calibrate].background()
    with pytest.warns(UserWarning, match="needed"):
        expected = calibrate(load_scorer(bundle).energy(background.x), level=bundle.default_level)
    assert bundle.threshold == expected
    assert not load_scorer(bundle).flag(background.x).any()


def test_the_same_command_gives_the_same_weights(trained, tmp_path):
    assert run("train", TOY, "--out", tmp_path / "m", *SMALL).exit_code == 0
    assert Bundle.load(tmp_path / "m").digest == Bundle.load(trained[0]).digest
    assert run("train", TOY, "--out", tmp_path / "m", *SMALL, "--seed", 1).exit_code == 0
    assert Bundle.load(tmp_path / "m").digest != Bundle.load(trained[0]).digest


def test_score(trained, tmp_path):
    out, events = tmp_path / "scores.parquet", load_events("toy:300")
    result = run("score", trained[0], "toy:300", "--out", out, "--explain")
    assert result.exit_code == 0, result.output
    assert "backend: " in result.stdout
    table, scorer = pq.read_table(out), load_scorer(trained[0])
    features = events.schema.features
    assert table.column_names == ["event_id", "energy", "flag", *(f"attribution_{f}" for f in features)]
    assert [str(t) for t in table.schema.types[:4]] == ["string", "float", "bool", "float"]
    assert table["event_id"].to_pylist() == events.event_id.tolist()
    energy = table["energy"].to_numpy()
    assert np.array_equal(energy, scorer.energy(events.x))
    assert np.array_equal(table["flag"].to_numpy(), energy > scorer.threshold)
    assert np.array_equal(table["attribution_MET"].to_numpy(), scorer.attribution(events.x)[:, features.index("MET")])
    assert os.listdir(tmp_path) == ["scores.parquet"]
    assert run("score", trained[0], "toy:300", "--out", out, "--backend", "reference").exit_code == 0
    again = pq.read_table(out)
    assert again.column_names == ["event_id", "energy", "flag"]
    np.testing.assert_allclose(again["energy"].to_numpy(), energy, atol=1e-4 * energy.std())


def test_evaluate(trained, tmp_path):
    result = run("evaluate", trained[0], TOY, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    assert "test folds" in result.stdout
    assert "not: it takes 10,000" in result.stdout.replace("is not", "not")
    r = json.loads((tmp_path / "e.json").read_text())
    assert list(r["detectors"]) == ["energy", *(b.name for b in baselines(load_events(TOY).schema))]
    events = load_events(TOY)
    test = split(events).test
    assert (r["n_signal"], r["n_background"]) == tuple(int((events.label[test] == c).sum()) for c in (1, 0))
    energy = r["detectors"]["energy"]
    assert energy["signal_efficiency"] is None
    assert energy["tightest_rejection"] == pytest.approx(1 - 1 / r["n_background"])
    assert energy["auroc_interval"][0] < energy["auroc"] < energy["auroc_interval"][1]
    assert {name: p["signal"] for name, p in r["processes"].items()} == {
        str(name): bool(label) for name, label in zip(events.process[test], events.label[test])}
    assert r["flag"]["background"]["n"] == r["n_background"]
    assert sum(s["n_background"] for s in r["multiplicity"]["strata"]) == r["n_background"]
    assert "test folds" in run("evaluate", trained[0], "toy:1500").stdout  # shares events with toy:2000
    assert list(r["energy_minus"]) == list(r["detectors"])[1:]
    for difference in r["energy_minus"].values():
        assert difference["interval"][0] <= difference["auroc"] <= difference["interval"][1]


def test_higgsml_from_end_to_end(higgs, tmp_path):
    assert run("train", higgs, "--out", tmp_path / "m", *SMALL).exit_code == 0
    bundle = Bundle.load(tmp_path / "m")
    assert bundle.provenance["source"] == "higgs.csv"
    assert bundle.provenance["command"].startswith("python -m ebm train higgs.csv --out m")
    assert bundle.provenance["background_events"]["train"] == (split(load_events(higgs)).train[::2]).sum()
    same = run("evaluate", tmp_path / "m", higgs)
    assert same.exit_code == 0, same.output
    assert "test folds" in same.stdout
    other = rewritten(higgs, tmp_path / "other.csv", lambda i, row: row if i == 0 else [f"7000{row[0]}", *row[1:]])
    result = run("evaluate", tmp_path / "m", other, "--json", tmp_path / "e.json")
    assert "all events" in result.stdout
    assert json.loads((tmp_path / "e.json").read_text())["n_background"] == 150

    unlabelled = rewritten(higgs, tmp_path / "test.csv", lambda _, row: row[:-2])
    assert run("score", tmp_path / "m", unlabelled, "--out", tmp_path / "s.parquet").exit_code == 0
    assert pq.read_table(tmp_path / "s.parquet")["event_id"].to_pylist() == [str(i) for i in range(300)]
    assert "no labels" in refused("evaluate", tmp_path / "m", unlabelled)


def test_labels_and_weights_do_not_train(higgs, tmp_path):
    """Other weights, and other features of the signal, leave every weight of the model as it is."""

    def change(i, row):
        if i == 0:
            return row
        if row[-1] == "s":
            return [row[0], *(v if v == "-999.000" else str(2 * float(v)) for v in row[1:-2]), "3.5", "s"]
        return [*row[:-2], "9.5", "b"]

    run("train", higgs, "--out", tmp_path / "a", *SMALL)
    run("train", rewritten(higgs, tmp_path / "changed.csv", change), "--out", tmp_path / "b", *SMALL)
    a, b = (Bundle.load(tmp_path / name) for name in "ab")
    assert (a.digest, a.threshold) == (b.digest, b.threshold)


def test_bad_data(trained, higgs, tmp_path):
    text = rewritten(higgs, tmp_path / "text.csv", lambda i, r: [*r[:3], "heavy", *r[4:]] if i == 5 else r)
    short = rewritten(higgs, tmp_path / "short.csv", lambda _, r: [r[0], *r[2:]])
    new = tmp_path / "new"
    message = refused("train", text, "--out", new)
    assert str(text) in message
    assert "heavy" in message
    assert "DER_mass_MMC" in refused("train", short, "--out", new)
    assert "nothing.csv" in refused("train", tmp_path / "nothing.csv", "--out", new)
    assert str(tmp_path) in refused("train", tmp_path, "--out", new)
    for bad in ("toy:", "toy:0", "toy:many", "events.xyz"):
        assert bad in refused("train", bad, "--out", new)
    assert "no background event" in refused("train", rewritten(
        higgs, tmp_path / "signal.csv", lambda i, r: r if i == 0 else [*r[:-1], "s"]), "--out", new)
    assert not new.exists()
    background = rewritten(higgs, tmp_path / "b.csv", lambda i, r: r if i == 0 else [*r[:-1], "b"])
    model = tmp_path / "m"
    assert run("train", background, "--out", model, *SMALL).exit_code == 0
    assert "0 signal" in refused("evaluate", model, background)


def test_bad_output(trained, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    assert "not overwritten" in refused("train", TOY, "--out", tmp_path / "thesis")
    assert "cannot be written" in refused("train", TOY, "--out", tmp_path / "file" / "m")
    assert ".parquet" in refused("score", trained[0], TOY, "--out", tmp_path / "scores.csv")
    (tmp_path / "d.parquet").mkdir()
    for out in (tmp_path / "no" / "s.parquet", tmp_path / "file" / "s.parquet", tmp_path / "d.parquet"):
        assert "cannot be written" in refused("score", trained[0], TOY, "--out", out)
    assert "cannot be written" in refused("evaluate", trained[0], TOY, "--json", tmp_path / "thesis")
    assert sorted(os.listdir(tmp_path)) == ["d.parquet", "file", "thesis"]


def test_bad_model(trained, higgs, tmp_path):
    out = tmp_path / "s.parquet"
    assert "no such model directory" in refused("score", tmp_path / "none", TOY, "--out", out)
    message = refused("score", trained[0], higgs, "--out", out)
    for part in ("hep64-v1", "64", "higgsml", "30", "obj0_E", "DER_mass_MMC"):
        assert part in message
    assert "hep64-v1" in refused("evaluate", trained[0], higgs)
    broken = tmp_path / "broken"
    Bundle.load(trained[0]).save(broken)
    os.truncate(broken / "model.safetensors", 100)
    assert "model.safetensors: truncated" in refused("evaluate", broken, TOY)
    assert not out.exists()


def test_bad_backend(trained, tmp_path):
    message = refused("score", trained[0], TOY, "--out", tmp_path / "s.parquet", "--backend", "abacus")
    assert "'abacus'" in message
    assert "'native'" in message
    # Known before the training, not after it.
    assert "abacus" in refused("train", "toy:200", "--out", tmp_path / "m", "--steps", 10**6, "--backend", "abacus")


def test_bad_options(tmp_path):
    for options in (["--steps", "0"], ["--hidden", "1000"], ["--layers", "many"], ["--colour", "red"]):
        result = run("train", TOY, "--out", tmp_path / "m", *options)
        assert result.exit_code == 2
        assert "Traceback" not in result.output
    assert "--events" in refused("train", "toy:100", "--out", tmp_path / "m", "--events", "100")


def test_events_not_finite(trained, higgs, tmp_path):
    """What the reader lets through as missing must have an imputation, or the event is named."""
    model = tmp_path / "m"
    assert run("train", higgs, "--out", model, *SMALL).exit_code == 0
    holes = rewritten(higgs, tmp_path / "holes.csv", lambda i, r: [r[0], "-999.0", *r[2:]] if i == 4 else r)
    assert run("score", model, holes, "--out", tmp_path / "s.parquet").exit_code == 0  # DER_mass_MMC may be missing
    holes = rewritten(higgs, tmp_path / "holes.csv", lambda i, r: [*r[:2], "-999.0", *r[3:]] if i == 4 else r)
    assert "DER_mass_transverse_met_lep" in refused("score", model, holes, "--out", tmp_path / "t.parquet")
    assert not (tmp_path / "t.parquet").exists()


def test_a_failed_write_leaves_nothing(trained, tmp_path, monkeypatch):
    out = tmp_path / "s.parquet"
    out.write_bytes(b"before")

    def full(_):
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr("ebm.command.os.fsync", full)
    assert "No space left" in refused("score", trained[0], "toy:100", "--out", out)
    assert out.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["s.parquet"]


def test_help_teaches():
    for command in ([], ["train"], ["score"], ["evaluate"]):
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert "python -m ebm" in result.stdout


def test_as_a_command(trained, tmp_path):
    """In a process of its own: exit code, streams, no traceback."""
    call = [sys.executable, "-m", "ebm", "score", str(trained[0]), "toy:x", "--out", str(tmp_path / "s.parquet")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'toy:x'")
    assert done.stderr.count("\n") == 1
