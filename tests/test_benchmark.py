"""`python -m ebm benchmark`: one protocol for all detectors, a killed run goes on, the page says what was measured."""

import functools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ebm import baselines, benchmark, higgsml, lhco, metrics
from ebm.__main__ import app
from ebm.commands.benchmark import run
from ebm.detector import EBMDetector
from ebm.events import load_events, split
from ebm.preprocess import Preprocessing

TINY = {"steps": 3, "hidden_dim": 8}
PUBLISHED = ("Dataset,KNN,IForest,LOF,DDPM,DTE-NP,DTE-IG,DTE-C\n"
             "ring,**91.25(0.1)**,90.5(0.2),80.0(0.0),70.0(1.0),60.0(0.0),50.0(2.0),40.0(3.0)\n")


@pytest.fixture
def few_baselines(monkeypatch):
    """Some that cost nothing: what is tested here is what is done with them."""
    monkeypatch.setattr(benchmark, "baselines", lambda schema, seed: [
        baselines.Norm(), baselines.MissingCount(), baselines.Neighbours(seed=seed),
        baselines.IsolationForest(trees=3, seed=seed)])


@pytest.fixture
def jobs(monkeypatch):
    """What is computed, in order."""
    done, real = [], benchmark.piece
    monkeypatch.setattr(benchmark, "piece", lambda data, seed, settings: (
        done.append((data.name, seed)), real(data, seed, settings))[1])
    return done


def table(path, n=80, anomalies=12, d=3, seed=0, gaps=False, flat=False):
    X = np.random.default_rng(seed).normal(size=(n + anomalies, d)) * np.repeat([not flat, 3], [n, anomalies])[:, None]
    if gaps:
        X[::5, 0], X[:, 2] = np.nan, 7
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, X=X, y=np.repeat([0, 1], [n, anomalies]))
    return path


@pytest.fixture
def folder(tmp_path):
    """Two tables, one of them with NaN and a constant column, and two that cannot take part."""
    data = tmp_path / "data"
    table(data / "1_ring.npz")
    table(data / "2_Gaps.npz", seed=1, gaps=True)
    table(data / "3_wide.npz", d=257)
    table(data / "4_single.npz", anomalies=0)
    table(data / "more" / "5_ring.npz")
    (data / "dte_readme_auroc_semi.csv").write_text(PUBLISHED)
    return data


def command(data, out, *more):
    return CliRunner().invoke(app, ["benchmark", "--data", str(data), "--out", str(out), *more])


def refused(*arguments):
    """The sentence that the command ends with, behind the progress."""
    result = command(*arguments)
    last = result.stderr.splitlines()[-1]
    assert (result.exit_code, last[:7], "Traceback" in result.output) == (2, "error: ", False), result.output
    return last


def rows(page, after):
    """Cells by the first one, of the first table behind a heading."""
    lines = next(part for part in page[page.index(after):].split("\n\n") if part.startswith("| ")).splitlines()
    cells = [[cell.strip().replace("\\|", "|").replace("*", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
             for line in lines]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def shown(values):
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"


def test_the_page_has_the_figures_of_the_file(few_baselines, folder, tmp_path):
    out = tmp_path / "page.md"
    result = run(folder, out, seeds=2, workers=1, settings=TINY)
    assert result == json.loads((tmp_path / "page.json").read_text())
    assert [(p["data"], p["seed"]) for p in result["pieces"]] == [("Gaps", 0), ("Gaps", 1), ("ring", 0), ("ring", 1)]
    page = out.read_text()
    auroc = {name: [p["auroc"] for p in result["pieces"] if p["data"] == name] for name in ("ring", "Gaps")}
    assert [("n_missing" in a[0]) for a in auroc.values()] == [False, True]  # where none is missing it says nothing
    detectors = ["energy", "|x|", "KNN (k=5)", "KNN (k=5, farthest)", "isolation forest"]
    by_table, over_tables = rows(page, "### Table by table"), rows(page, "## ADBench")
    for name, seeds in auroc.items():
        assert {d: by_table[name][d] for d in detectors} == {d: shown([a[d] for a in seeds]) for d in detectors}
        means = [np.mean([a[d] for a in seeds]) for d in detectors]
        place = sorted(means, reverse=True).index(means[0]) + 1
        assert by_table[name]["place"] == f"{place} of 5"
        assert (f"**{by_table[name]['energy']}**" in page) == (place == 1)
    assert (line := page.splitlines()[4]).startswith("- **ADBench, 2 tables, 2 seeds:** energy ")
    for d in detectors:
        of_seeds = [np.mean([auroc[name][seed][d] for name in auroc]) for seed in (0, 1)]
        assert over_tables[d]["mean AUROC"] == shown(of_seeds)
        wins = sum(np.mean([a["energy"] for a in own]) > np.mean([a[d] for a in own]) for own in auroc.values())
        assert over_tables[d]["energy better on"] == ("" if d == "energy" else f"{wins} of 2")
        assert f"{d} {100 * np.mean(of_seeds):.1f}" in line or d in ("|x|", "KNN (k=5, farthest)")
        assert f"the energy is better than KNN (k=5) on {wins} of 2." in line or d != "KNN (k=5)"

    beside = rows(page, "## Published")
    ring = [beside["ring"][k] for k in ("energy, ours", "KNN, published", "DTE-C, published")]
    assert ring == [f"{100 * np.mean([a['energy'] for a in auroc['ring']]):.1f}", "91.2", "40.0"]
    for reason in ("Other splits", "hidden_dim 8", "- HiggsML: not in the folder", "- LHCO: not in the folder",
                   "- wide: 3_wide.npz: 257 columns",
                   "- single: 40 normal events to train on, 40 normal events and 0 anomalies",
                   "- ring: more/5_ring.npz: there is another table of this name",
                   "- Gaps: constant in training, so without influence: x2"):
        assert reason in page
    assert str(tmp_path) not in page + (tmp_path / "page.json").read_text()
    assert all(p["run"]["workers"] == 1 and p["run"]["cpu"] and p["run"]["date"] for p in result["pieces"])


def test_half_of_the_normal_rows_train(tmp_path):
    path = table(tmp_path / "data" / "9_a.npz", n=81, anomalies=7)
    X, data = np.load(path)["X"].astype(np.float32), benchmark.find(path.parent)[0][0]
    samples = [data.sample(seed) for seed in (0, 0, 1)]
    for s in samples:
        assert (len(s.train), len(s.test), s.y.sum()) == (40, 48, 7)
        normal = np.concatenate([s.train, s.test[s.y == 0]])
        np.testing.assert_array_equal(np.sort(normal, axis=0), np.sort(X[:81], axis=0))
        np.testing.assert_array_equal(s.test[s.y == 1], X[81:])
    np.testing.assert_array_equal(samples[0].train, samples[1].train)
    assert not np.array_equal(samples[0].train, samples[2].train)


def test_the_farthest_neighbour():
    knn = benchmark.FarthestNeighbour(k=3).fit(np.array([[0.0], [1], [3], [6], [10]]))
    assert (knn.name, *knn.score(np.array([[0.0]]), None)) == ("KNN (k=3, farthest)", 3)


def test_a_stopped_run_goes_on(few_baselines, folder, tmp_path, monkeypatch, jobs):
    out, fit, fits = tmp_path / "page.md", benchmark.fit_background, iter([True, True])

    def stopped(*args, **options):
        if next(fits, False):
            return fit(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "fit_background", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, seeds=2, workers=1, settings=TINY)
    monkeypatch.setattr(benchmark, "fit_background", fit)
    kept = json.loads((tmp_path / "page.json").read_text())["pieces"]
    assert (len(kept), out.exists()) == (2, False)
    for _ in range(2):
        result = run(folder, out, seeds=2, workers=1, settings=TINY)
        assert len(jobs) == 5  # the third, which was stopped, and the fourth
        assert all(p in result["pieces"] for p in kept)
    run(folder, out, seeds=3, workers=1, only=["RING"], settings=TINY)
    assert jobs[5:] == [("ring", 2)]
    assert "- Gaps: not every seed is there yet" in out.read_text()
    run(folder, out, seeds=3, workers=1, only=["adbench"], settings=TINY)
    assert jobs[6:] == [("Gaps", 2)]  # by its group


def test_what_changed_is_computed_anew(few_baselines, folder, tmp_path, monkeypatch, jobs, capsys):
    def again(**more):
        jobs.clear()
        run(folder, tmp_path / "page.md", seeds=1, workers=1, settings=TINY | more)
        return sorted(name for name, _ in jobs)

    assert again() == ["Gaps", "ring"]
    assert again(lr=0.1) == ["Gaps", "ring"]
    assert "2 of 2 pieces are of other data, settings, source or versions" in capsys.readouterr().out
    assert again(lr=0.1) == []
    table(folder / "1_ring.npz", seed=5)
    assert again(lr=0.1) == ["ring"]
    for name in benchmark._SOURCES:
        text = (Path(benchmark.__file__).parent / f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(text.replace('"""', '"""Said otherwise. ', 1) + "# a comment\n")
    monkeypatch.setattr(benchmark, "__file__", str(tmp_path / "benchmark.py"))
    assert again(lr=0.1) == []
    (tmp_path / "dsm.py").write_text("CHANGED = 1\n")
    assert again(lr=0.1) == ["Gaps", "ring"]
    monkeypatch.setattr(benchmark, "versions", lambda packages: {"numpy": "0.1"})
    assert again(lr=0.1) == ["Gaps", "ring"]


def test_processes_and_a_kill(tmp_path):
    """Several processes give the figures of one, a killed run leaves none of them behind, and the next one goes on."""
    table(tmp_path / "data" / "1_ring.npz", n=40)
    code = ("import sys; from pathlib import Path; from ebm.commands.benchmark import run\n"
            f"run(Path(sys.argv[1]), Path(sys.argv[2]), seeds=40, workers=2, settings={TINY})")
    out, results, end = tmp_path / "page.md", tmp_path / "page.json", time.monotonic() + 60
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "data", out], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, cwd=Path(benchmark.__file__).parents[1])
    while not results.exists() or len(json.loads(results.read_text())["pieces"]) < 2:
        assert process.poll() is None and time.monotonic() < end  # noqa: PT018
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=30)  # the end of an output that the workers have too
    kept = json.loads(results.read_text())["pieces"]
    assert 2 <= len(kept) < 40
    again = run(tmp_path / "data", out, seeds=1, workers=1, settings=TINY)["pieces"]
    assert all(p in again for p in kept)
    data = benchmark.find(tmp_path / "data")[0][0]
    assert benchmark.piece(data, kept[0]["seed"], TINY)["auroc"] == kept[0]["auroc"]


def test_higgsml_and_lhco(few_baselines, tmp_path):
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    x = rng.gamma(2, 30, (400, 30))
    x[::2, 0], x[:, 22] = -999, rng.integers(0, 4, 400)
    x[::4] += 20 * (x[::4] > 0)
    pq.write_table(pa.table({"EventId": np.arange(400), **dict(zip(higgsml.SCHEMA.features, x.T)),
                             "Label": np.where(np.arange(400) % 4 == 0, "s", "b")}),
                   folder / "atlas-higgs-challenge-2014-v2.parquet")
    for seed, name in enumerate(("train", "val")):
        x = np.random.default_rng(seed).uniform(0.1, 1, (300, 5))
        x[0, 3] = 0
        pq.write_table(pa.table({**dict(zip(lhco.SIGNAL_REGION.features, x.T)), "is_signal": np.arange(300) % 9 == 0}),
                       folder / f"lhco_SR_{name}.parquet")

    found = {data.name: data for data in benchmark.find(folder)[0]}
    assert list(found) == ["HiggsML", "LHCO", "LHCO-log-tau21", "LHCO-with-mjj"]
    events = load_events(folder / "atlas-higgs-challenge-2014-v2.parquet")
    folds, sample = split(events), found["HiggsML"].sample(1)
    np.testing.assert_array_equal(sample.train, events[folds.train].background().x)
    np.testing.assert_array_equal(sample.y, events.label[folds.test])
    plain, log, mass = (found[name].sample(2) for name in list(found)[1:])
    assert plain.schema.features == mass.schema.features[1:] == lhco.SIGNAL_REGION.features[1:]
    np.testing.assert_array_equal(log.test[:, :2], plain.test[:, :2])
    np.testing.assert_allclose(log.test[:, 2:], np.log(np.maximum(plain.test[:, 2:], 0.01)))
    assert (len(plain.train), len(plain.test)) == (266, 300)
    result = run(folder, tmp_path / "page.md", seeds=2, workers=1, settings=TINY)
    page = (tmp_path / "page.md").read_text()
    for name in found:
        pieces = [p for p in result["pieces"] if p["data"] == name]
        for d, row in rows(page, f"## {name}\n").items():
            assert row["AUROC"] == shown([p["auroc"][d] for p in pieces])
            if name == "HiggsML":
                assert row["within a number of jets"] == shown([p["within"][d] for p in pieces])
            if d != "energy":
                low, high = 100 * np.mean([p["energy_minus"][d] for p in pieces], axis=0)
                less = 100 * np.mean([p["auroc"]["energy"] - p["auroc"][d] for p in pieces])
                assert low <= less <= high
                assert row["energy minus it, paired 95%"] == f"{less:+.1f} [{low:+.1f}, {high:+.1f}]"
        assert f"- **{name}, 2 seeds:** energy " in page
    norm = np.linalg.norm(Preprocessing.fit(sample.train, sample.schema)(sample.test), axis=1)
    within = metrics.stratified_auroc(sample.y, norm, sample.test[:, 22])
    assert result["pieces"][0]["within"]["|x|"] == pytest.approx(within, abs=1e-6)
    assert re.search("tight bottleneck.*- ADBench: not in the folder", page, re.S)


def test_a_piece_that_fails_is_kept_and_tried_again(few_baselines, tmp_path, monkeypatch, jobs):
    table(tmp_path / "data" / "1_ring.npz")
    table(tmp_path / "data" / "2_flat.npz", flat=True)
    monkeypatch.setattr(benchmark, "EBMDetector", functools.partial(EBMDetector, **TINY))
    out = tmp_path / "page.md"
    arguments = tmp_path / "data", out, "--seeds", "1", "--workers", "1"
    for computed in (["flat", "ring"], ["flat"]):
        jobs.clear()
        assert re.search("1 of 2 pieces failed, .*: flat, seed 0: every feature is constant", refused(*arguments))
        assert sorted(name for name, _ in jobs) == computed
    assert "- flat: seed 0 failed: every feature is constant" in out.read_text()
    table(tmp_path / "data" / "2_flat.npz")
    done = command(*arguments)
    assert done.exit_code == 0, done.output
    assert re.search("ADBench, 2 tables, 1 seed: energy .*2 pieces", done.stdout, re.S)
    assert "±" not in rows(out.read_text(), "### Table by table")["flat"]["energy"]


def test_what_cannot_be_run(folder, tmp_path):
    out = tmp_path / "page.md"
    assert "expected a directory" in refused(tmp_path / "absent", out)
    (tmp_path / "bad").mkdir()
    assert re.search("no data set to compare detectors on.*HiggsML: not in the folder", refused(tmp_path / "bad", out))
    (tmp_path / "bad" / "7_broken.npz").write_bytes(b"PK no zip")
    np.savez(tmp_path / "bad" / "8_bare.npz", X=np.zeros((9, 2)))
    assert re.search(r"bare: 8_bare.npz: no labels.*broken: 7_broken.npz: cannot be read as NumPy",
                     refused(tmp_path / "bad", out))
    assert "expected a name that ends in .md" in refused(folder, tmp_path / "page.json")
    assert "cannot be written" in refused(folder, tmp_path / "absent" / "page.md")
    (tmp_path / "taken.md").mkdir()
    assert "it is a directory" in refused(folder, tmp_path / "taken.md")
    results = tmp_path / "page.json"
    for text in ("not JSON", "[1]", '{"pieces": [{"data": "ring"}]}'):
        results.write_text(text)
        assert "expected the figures of an earlier benchmark" in refused(folder, out)
        assert results.read_text() == text
    results.unlink()
    assert "no data set moon in the folder, it has ADBench, Gaps, ring" in refused(folder, out, "--only", "ring,moon")
    (folder / "dte_readme_auroc_semi.csv").write_text(PUBLISHED.replace("**91.25(0.1)**", "high"))
    assert "row ring: expected a number for KNN" in refused(folder, out)
    assert not results.exists()
