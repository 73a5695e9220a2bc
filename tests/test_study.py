"""The HiggsML study: no signal and no test event in any fit, figures, and bad input."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ebm import baselines, higgsml, metrics, study
from ebm.__main__ import app
from ebm.events import DataError, Events, load_events, split
from ebm.study import COUNT, DETECTORS, ENERGY, VARIANTS, figures_of_merit, findings, higgsml_study, page

NAMES = higgsml.SCHEMA.features
TINY = {"steps": 4, "hidden_dim": 8, "n_layers": 1}

def events(n=600, seed=0):
    """Events like HiggsML's: every third is signal, with more momentum and more jets; absent jets are NaN."""
    rng = np.random.default_rng(seed)
    label = (np.arange(n) % 3 == 0).astype(np.int8)
    x = rng.gamma(3, 15, (n, 30)) * (1 + 0.5 * label[:, None])
    for j, name in enumerate(NAMES):
        if "eta" in name or "phi" in name:
            x[:, j] = rng.uniform(-3, 3, n)
    jets = np.clip(rng.integers(0, 4, n) - (rng.random(n) < 0.3 * (1 - label)), 0, 3)
    x[:, NAMES.index("PRI_jet_num")] = jets
    for j, name in enumerate(NAMES):
        x[jets < 1, j] = np.nan if "jet_leading" in name else x[jets < 1, j]
        x[jets < 2, j] = np.nan if "jet_jet" in name or "subleading" in name else x[jets < 2, j]
    return Events(higgsml.SCHEMA, x.astype(np.float32), np.arange(n).astype(str), label, source="higgs.csv")


def norm(bundle, x):
    """An energy that costs nothing."""
    return np.linalg.norm(bundle.preprocessing(x), axis=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One epoch for autoencoders, few trees, few steps: what is tested is what is made of the scores."""
    monkeypatch.setattr(baselines, "_AUTOENCODER_EVENTS", 1)
    monkeypatch.setitem(study.BASELINES, "isolation forest", lambda seed: baselines.IsolationForest(5, seed))
    monkeypatch.setattr(study, "fit_background", functools.partial(study.fit_background, **TINY))


def test_neither_signal_nor_test_events_enter_a_fit(monkeypatch):
    e = events()
    inside = split(e).train & (e.label == 0)

    def fitted(x):
        seen = []

        class Recorder(baselines.Norm):
            def fit(self, u):
                seen.append(u)
                return self

        for name in study.BASELINES:
            monkeypatch.setitem(study.BASELINES, name, lambda seed: Recorder())

        def energies(bundle, x):
            p = bundle.preprocessing
            seen.extend([*bundle.tensors.values(), p.impute, p.scale, p.mean, p.inv_std, p.transform])
            return norm(bundle, x)

        higgsml_study(replace(e, x=x), energies, seeds=1, resamples=2)
        return seen

    rng = np.random.default_rng(1)
    changed = e.x.copy()
    changed[~inside] = 100 * rng.random((np.sum(~inside), 30))
    changed[:, NAMES.index("PRI_jet_num")] = e.x[:, NAMES.index("PRI_jet_num")]
    first, same = fitted(e.x), fitted(changed)
    assert len(first[0]) == inside.sum()
    assert len(first) == len(same)
    assert all(np.array_equal(a, b) for a, b in zip(first, same))
    changed[np.flatnonzero(inside)[0]] *= 3  # so that equality above says something
    assert not all(np.array_equal(a, b) for a, b in zip(first, fitted(changed)))


def made_up(seeds=2, n=400):
    """Labels, numbers of jets, and scores: noise before and after, but for some detectors."""
    rng = np.random.default_rng(0)
    y, jets = rng.integers(0, 2, n), rng.integers(0, 3, n).astype(float)
    scores = {(v, d, s): rng.normal(size=n) for v in VARIANTS for d in DETECTORS for s in range(seeds)}
    for s in range(seeds):
        scores["after", ENERGY, s] = y + 0.5 * rng.normal(size=n)
        scores["before", "isolation forest", s] = y + 0.5 * rng.normal(size=n)
        scores["after", COUNT, s] = scores["before", COUNT, s] = jets
    return y, jets, scores


def test_figures_of_merit():
    y, jets, scores = made_up()
    r = figures_of_merit(y, jets, scores, 2, 200)
    for d in DETECTORS:
        for v in VARIANTS:
            own, e = [scores[v, d, s] for s in range(2)], r["detectors"][d][v]
            assert e["per_seed"] == pytest.approx([metrics.auroc(y, s) for s in own])
            assert e["auroc"] == pytest.approx(np.mean(e["per_seed"]))
            assert e["spread"] == pytest.approx(np.std(e["per_seed"], ddof=1))
            assert e["interval"][0] < e["auroc"] < e["interval"][1]
            assert e["auprc"] == pytest.approx(np.mean([metrics.auprc(y, s) for s in own]))
            assert e["within"]["per_seed"] == pytest.approx([metrics.stratified_auroc(y, s, jets) for s in own])
            assert e["strata"][1]["per_seed"] == pytest.approx([metrics.auroc(y[jets == 1], s[jets == 1]) for s in own])
        before, after, gain = (r["detectors"][d][k]["auroc"] for k in (*VARIANTS, "after_minus_before"))
        assert gain == pytest.approx(after - before)
    verdicts = {d: e["after_minus_before"]["verdict"] for d, e in r["detectors"].items()}
    assert verdicts == dict.fromkeys(DETECTORS, "not resolved") | {ENERGY: "better", "isolation forest": "worse"}
    assert r["detectors"][COUNT]["after"]["within"]["auroc"] == 0.5
    assert [s["jets"] for s in r["strata"]] == [0, 1, 2]
    assert r["strata"][2]["n_signal"] + r["strata"][2]["n_background"] == np.sum(jets == 2)
    assert r["best"] in (("after", ENERGY), ("before", "isolation forest"))
    assert r["best_minus_count"]["verdict"] == "better"


def test_a_verdict_needs_every_seed():
    y, jets, scores = made_up()
    scores["after", ENERGY, 1] = scores["before", ENERGY, 1] - 0.01 * y
    gain = figures_of_merit(y, jets, scores, 2, 200)["detectors"][ENERGY]["after_minus_before"]
    assert gain["interval"][0] > 0
    assert gain["verdict"] == "not resolved"


def test_one_seed_and_strata_of_one_class():
    y, jets, scores = made_up(seeds=1)
    jets[y == 1] = np.where(jets[y == 1] == 0, 1, jets[y == 1])
    r = figures_of_merit(y, jets, scores, 1, 20)
    assert [s["jets"] for s in r["strata"]] == [1, 2]
    assert np.isnan(r["detectors"][ENERGY]["after"]["spread"])
    with pytest.raises(DataError, match="PRI_jet_num: expected test events of both classes with the same number"):
        figures_of_merit(y, y.astype(float), scores, 1, 20)


def write(path, e, label=True):
    """A file in the layout of Kaggle."""
    columns = ["EventId", *NAMES, "Weight", *(["Label"] if label else [])]
    rows = [[i, *row, 0.5, *(["bs"[k]] if label else [])] for i, row, k in
            zip(e.event_id, np.where(np.isnan(e.x), -999.0, e.x), e.label)]
    path.write_text("\n".join(",".join(map(str, row)) for row in (columns, *rows)) + "\n")
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["study", *(str(a) for a in arguments)])


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.output
    return line


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "higgs.csv", events())


def test_the_command(file, tmp_path):
    out = tmp_path / "study"
    result = run("higgsml", file, "--out", out, "--json", tmp_path / "study.json", "--seeds", 2)
    assert result.exit_code == 0, result.output
    figures = ("auroc", "strata", "roc", "scores", "derived_features")
    files = {"study.md", "study.json", *(f"{f}.{k}" for f in figures for k in ("png", "pdf"))}
    assert {p.name for p in out.iterdir()} == files
    r = json.loads((tmp_path / "study.json").read_text())
    assert (r["features"], r["seeds"], len(r["derived"])) == ([30, 50], 2, 20)
    assert json.loads((out / "study.json").read_text()) | {"notes": []} == r
    e = load_events(file)
    inside = split(e)
    assert r["n_events"] == len(e)
    assert r["n_train_background"] == np.sum(inside.train & (e.label == 0))
    assert (r["n_signal"], r["n_background"]) == tuple(np.sum(inside.test & (e.label == c)) for c in (1, 0))
    assert set(r["compressed"].values()) <= {"asinh"}
    assert list(r["detectors"]) == list(DETECTORS)
    missing = np.isnan(e.x[inside.test]).sum(1)
    assert r["detectors"][COUNT]["before"]["auroc"] == pytest.approx(metrics.auroc(e.label[inside.test], -missing))
    text = (out / "study.md").read_text()
    for part in (*DETECTORS, "| 0.58 |", "| 0.63 |", "0.60 to 0.70", "3 jets or more", "![roc](roc.png)", *findings(r),
                 f"here has {len(e):,}. It calls", "Means over 2 seeds, ±"):
        assert part in text
    assert f"{r['detectors'][ENERGY]['before']['auroc']:.3f}" in text


def test_the_same_events_give_the_same_numbers_and_figures_show_them():
    pictures = higgsml_study(events(), norm, seeds=2, resamples=20)
    assert repr(higgsml_study(events(), norm, seeds=2, resamples=20).numbers) == repr(pictures.numbers)
    d = pictures.numbers["detectors"]
    left, _, right = pictures.figures["auroc"].axes
    points = {round(float(x), 9) for line in left.lines for x in line.get_xdata()}
    assert {round(d[name][v]["auroc"], 9) for name in DETECTORS for v in VARIANTS} <= points
    assert {0.58, 0.63} <= points
    assert {round(e["after_minus_before"]["auroc"], 9) for e in d.values()} <= {
        round(float(x), 9) for line in right.lines for x in line.get_xdata()}
    assert len(pictures.figures["strata"].axes) == len(pictures.numbers["strata"]) == 4
    ax = pictures.figures["roc"].axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == (r"signal efficiency $\epsilon_S$",
                                                  r"background rejection $1/\epsilon_B$")
    for line in ax.lines:
        assert (np.diff(line.get_xdata()) >= 0).all()
        assert (line.get_ydata() >= 1).all()
    assert [a.get_xlabel() for a in pictures.figures["derived_features"].axes] == list(pictures.numbers["derived"])
    assert "in training), AUROC" in pictures.figures["scores"].axes[0].get_legend().get_title().get_text()
    assert "One seed; brackets" in page(higgsml_study(events(), norm, seeds=1, resamples=2).numbers)


def test_small_networks_are_fitted_on_one_thread():
    seen, before = [], torch.get_num_threads()

    def energies(bundle, x):
        seen.append(torch.get_num_threads())
        return norm(bundle, x)

    torch.set_num_threads(3)
    try:
        higgsml_study(events(), energies, seeds=1, resamples=2)
        assert (seen, torch.get_num_threads()) == ([1, 1], 3)
    finally:
        torch.set_num_threads(before)


def test_bad_input(file, tmp_path):
    e = events()
    out = tmp_path / "study"
    assert "unlabelled.csv: no labels, which the study needs" in refused(
        "higgsml", write(tmp_path / "unlabelled.csv", e, label=False), "--out", out)
    for kept, absent in ((0, "signal event in the test folds"), (1, "background event in the training folds")):
        one = write(tmp_path / "one.csv", e[e.label == kept])
        assert f"one.csv: no {absent}" in refused("higgsml", one, "--out", out)
    line = refused("higgsml", "toy:300", "--out", out)
    assert "hep64-v1 events (64 features, " in line
    assert line.endswith("expected higgsml events (30 features, DER_mass_MMC to PRI_jet_all_pt)")
    assert f"{file} cannot be written" in refused("higgsml", file, "--out", file)
    assert "is a directory" in refused("higgsml", file, "--out", out, "--json", tmp_path)
    assert "no.csv" in refused("higgsml", tmp_path / "no.csv", "--out", out)
    for arguments in (("lhco", file, "--out", out), ("higgsml", file, "--out", out, "--seeds", 0), ("higgsml", file)):
        assert run(*arguments).exit_code == 2
    with pytest.raises(ValueError, match="0 seeds and 5 resamples given, expected at least 1"):
        higgsml_study(e, norm, seeds=0, resamples=5)


def test_a_value_that_is_missing_in_the_test_folds_alone():
    e = events()
    x = e.x.copy()
    x[np.flatnonzero(split(e).test)[0], NAMES.index("PRI_tau_pt")] = np.nan
    r = higgsml_study(replace(e, x=x), norm, seeds=1, resamples=2).numbers
    assert all(np.isfinite(r["detectors"][d][v]["auroc"]) for d in DETECTORS for v in VARIANTS)
