"""The report: one page that needs nothing beside it, whose numbers are those of its JSON, whatever the sample lacks."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from html_page import Page
from typer.testing import CliRunner

pytest.importorskip("mplhep", reason="pictures need matplotlib, mplhep and hist")

from ebm import baselines, errors, evaluate
from ebm.__main__ import app
from ebm.bundle import Bundle
from ebm.efficiency import clopper_pearson, cut_at_rejection
from ebm.events import DataError, Events, Schema
from ebm.metrics import auroc
from ebm.preprocess import Preprocessing
from ebm.report import report
from ebm.report_words import between, between_short, fixed, hertz, short
from ebm.style import Pictures, save
from ebm.threshold import calibrate, calibrate_by, trigger_rate
from kernels import load_scorer

DEMO = Path(__file__).parents[1] / "models" / "demo"
EVIL = "<script>alert('x')</script>"
SCHEMA = Schema("s", ("ht", "MET", "n_jets", "m_jj", EVIL), ("GeV", "GeV", "", "GeV", "GeV^1/2"))
SECTIONS = ["Summary", "Threshold and trigger rate", "Energies", "Separation of signal and background",
            "Efficiency and mass sculpting", "Training", "Mistakes", "Top candidates", "Model card", "Provenance"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HISTORY = {"history": [{"steps": [10, 20], "dsm": [5.0, 4.0], "held_out": [5.1, 4.2]}],
           "held_out_loss_per_level": [1.0, 2.0, 3.0]}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Two simple detectors, one candidate, two features of mistakes: how many there are is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "baselines", lambda schema: [baselines.Norm(), baselines.IsolationForest(trees=5)])
        patch.setattr("ebm.report.error_analysis", partial(errors.error_analysis, n_top=1))
        patch.setattr(errors, "_PANELS", 2)
        yield


def events(n=2000, signal=0.1, **more):
    """Signal has twice the momentum; names that a page must not take for its own."""
    rng = np.random.default_rng(0)
    label = (np.arange(n) < signal * n).astype(np.int8)
    ht = 100 * rng.exponential(size=n) * (1 + label)
    x = np.stack([ht, rng.exponential(30, n), rng.integers(0, 4, n), ht + rng.normal(size=n), rng.normal(size=n)], 1)
    process = np.where(label, np.where(np.arange(n) % 2, "<i>s</i>", "heavy_s"), "b & c")
    more = {"label": label, "process": process, "source": "/data/<b>d.csv", **more}
    return Events(SCHEMA, x.astype(np.float32), np.arange(n).astype(str), digest="d1", **more)


def model(e, rate=0.05, **more):
    b = Bundle.random(5, 16, 1, n_sigmas=3)
    b = replace(b, schema=SCHEMA, preprocessing=Preprocessing.fit(e.x, SCHEMA), provenance=HISTORY)
    energy = load_scorer(b, "reference").energy(e.background().x)
    return replace(b, **({"threshold": calibrate(energy, rate, level=b.default_level)} | more))


def write(bundle, e, out):
    return report(bundle, e, load_scorer(bundle, "reference"), out, model="m<1>", resamples=20)


def checked(done):
    """The page, of which holds what holds of every one."""
    page = Page(done.page)
    assert page.headings == SECTIONS
    assert not page.open
    assert "script" not in page.tags
    assert all(a.startswith(("data:", "#")) for a in page.addresses)
    assert all(i["src"].startswith("data:image/png;base64,") and i["alt"] and int(i["width"]) > 0 for i in page.images)
    assert len(page.images) == len([f for f in done.files if f.suffix == ".png"])
    assert all(f.stat().st_size for f in done.files)
    assert done.files[0].read_text() == done.page
    assert "nan" not in page.text.lower().split()
    return page


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    e = events(weight=np.ones(2000) * 2)
    by = calibrate_by("n_jets", e.x[:, 2], np.zeros(len(e)), 0.05)
    bundle = model(e, class_thresholds=by)
    return bundle, e, write(bundle, e, tmp_path_factory.mktemp("report") / "r")


def test_numbers_on_the_page_are_those_of_the_json(labelled):
    bundle, e, done = labelled
    page, n = checked(done), json.loads(json.dumps(done.numbers, allow_nan=False))
    energy, t = load_scorer(bundle, "reference").energy(e.x), bundle.threshold
    assert n["evaluation"]["detectors"]["energy"]["auroc"] == auroc(e.label, energy)
    assert (n["n"], n["data"], n["model"]) == ({"events": 2000, "background": 1800, "signal": 200}, "<b>d.csv",
                                               "m<1>")
    for name, d in n["evaluation"]["detectors"].items():
        row = page.row(name, fixed(d["auroc"]))
        assert row[2] == between(d["auroc_interval"])
        assert row[5] == fixed(d["auprc"])
        if less := n["evaluation"]["energy_minus"].get(name):
            assert row[3:5] == [fixed(less["auroc"], 4, True), between(less["interval"], 4, True)]
        points = d["working_points"]
        assert page.row(name, fixed(points[0]["efficiency"]))[2] == between(points[0]["interval_with_cut"])
    assert page.row("all")[1:] == [short(t.energy, 6), str(t.rank), "1,800", "0.05", short(t.upper_bound), "95%", "yes"]
    assert page.row("n_jets from 0")
    signals = n["evaluation"]["signals"]["detectors"]["energy"]
    assert list(signals) == ["<i>s</i>", "heavy_s", "geometric_mean"]
    assert page.row("energy", *map(fixed, signals.values()))
    flag = energy > t.energy
    for name, rows in (("background", e.label == 0), ("signal", e.label == 1)):
        k, m = int(flag[rows].sum()), int(rows.sum())
        assert n["flagged"][name] == {"rate": k / m, "interval": list(clopper_pearson(k, m)), "n": m}
        assert page.row(name, f"{m:,}")[2:] == [short(k / m), between_short(clopper_pearson(k, m))]
    expected, at_most = trigger_rate(t)
    assert page.row("every bunch crossing") == ["every bunch crossing", "40 MHz", hertz(expected), hertz(at_most)]
    for line in n["summary"] + n["notes"]:
        assert line.rstrip(".") in page.text
    top = n["errors"]["candidates"][0]
    assert top["event"] == str(np.argmax(energy))
    row, strongest = page.row("1", top["event"]), max(top["groups"], key=lambda g: abs(top["groups"][g]))
    assert row[2] == short(top["score"], 5)
    assert row[6].startswith(f"{strongest} {fixed(top['groups'][strongest], 1, True)}, ")
    assert "With the weights" in page.text


def test_pictures(labelled):
    _, _, done = labelled
    names = {f.stem for f in done.files if f.suffix == ".png"}
    assert names == {"roc", "sic", "sculpting_m_jj", "energies", "efficiency", "training", "candidates", "candidate_1",
                     "faithfulness", "false_positives", "false_negatives"}
    assert names == {f.stem for f in done.files if f.suffix == ".pdf"}


def test_names_are_escaped(labelled):
    page = checked(labelled[2])
    for name in (EVIL, "<b>d.csv", "<i>s</i>", "b & c", "m<1>"):
        assert name in page.text
    assert not {"b", "i", "script"} & set(page.tags)


def test_efficiency_of_a_looser_cut_where_the_flag_is_rare(labelled):
    bundle, e, done = labelled
    energy = load_scorer(bundle, "reference").energy(e.x)
    found, cut = done.numbers["efficiency"], cut_at_rejection(energy[e.label == 0], 1 - 100 / 1800)
    assert (found["is_flag"], found["cut"], list(found["of"])) == (False, cut, ["ht", "MET", "n_jets"])
    assert "the cut that keeps 5.6% of the background" in done.page
    flagged = round(1800 * done.numbers["flagged"]["background"]["rate"])
    assert f"of 1,800 background events it is raised for {flagged}, too few" in done.page
    jets = found["of"]["n_jets"]
    assert jets["edges"] == [-0.5, 0.5, 1.5, 2.5, 3.5]
    rows = (e.label == 1) & (e.x[:, 2] == 3)
    assert jets["signal"][3] == {"n": int(rows.sum()), "rate": (energy[rows] > cut).mean(),
                                 "interval": list(clopper_pearson((energy[rows] > cut).sum(), rows.sum()))}


def constant(e):
    e.x[:, :4] = 1.0
    return e


@pytest.mark.parametrize(("e", "change", "present", "absent"), [
    (events(label=None, process=None), {"threshold": None}, ["no labels: neither", "has no threshold, so it flags",
                                                             "no trigger rate"], ["roc"]),
    (events(signal=0), {"rate": 0.2}, ["background only: nothing to tell apart", "Share of events above the threshold",
                                       "of 2,000 background events here: 0.", "Jensen-Shannon"],
     ["roc", "false_negatives"]),
    (events(signal=1), {"provenance": {}}, ["signal only: nothing", "Electrical energy: not measured",
                                                 "Share of events above the threshold, with"],
     ["roc", "training", "faithfulness"]),
    (events(1, signal=0), {}, ["1 background event: no efficiency", "of 1 background event here"],
     ["roc", "efficiency", "faithfulness"]),
    (events(1, signal=0)[np.zeros(5, int)], {}, ["ht has fewer than two values", "of 5 background events here"],
     ["efficiency", "faithfulness"]),
    (events(2, signal=0.5), {}, ["no comparison with simple detectors"], ["roc"]),
    (constant(events(label=None)), {}, ["ht has fewer than two values", "Not tested: it takes background events"],
     ["efficiency"]),
], ids=["no labels, no threshold", "background", "signal, no provenance", "one event", "five the same",
        "two events", "no spread"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_the_sample_lacks(e, change, present, absent, tmp_path, monkeypatch):
    monkeypatch.setattr(Pictures, "save", lambda self, out: [  # without the PDFs, which take as long again
        save(figure, out / f"{name}.png") for name, figure in self.figures.items()])
    done = write(model(events(), **change), e, tmp_path)
    page = checked(done)
    for text in present:
        assert text.lower() in page.text.lower()
    assert not {f.stem for f in done.files} & set(absent)
    json.dumps(done.numbers, allow_nan=False)


def test_refused(tmp_path):
    bundle = model(events())
    with pytest.raises(DataError, match="no event"):
        write(bundle, events()[:0], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file cannot be written"):
        write(bundle, events(), tmp_path / "file")


def chromium(*arguments, profile):
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]
    return subprocess.run([CHROMIUM, *quiet, "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
                           *map(str, arguments)], capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_in_a_browser(labelled, tmp_path):
    look = """<script>addEventListener('load', () => { document.body.textContent = JSON.stringify({
        widths: [...document.images].map(i => i.naturalWidth),
        overflow: document.documentElement.scrollWidth > innerWidth,
        wanted: performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('data:'))
    }) })</script>"""
    page = tmp_path / "page.html"
    page.write_text(labelled[2].page + look)
    done = chromium("--window-size=1440,900", "--dump-dom", f"file://{page}", profile=tmp_path / "profile")
    seen = json.loads(re.search(r"\{\"widths.*\}", done.stdout).group())
    assert len(seen["widths"]) == 11
    assert min(seen["widths"]) > 0
    assert seen["wanted"] == []
    assert not seen["overflow"]
    assert "CONSOLE" not in done.stderr
    pdf = tmp_path / "page.pdf"
    chromium("--no-pdf-header-footer", f"--print-to-pdf={pdf}", f"file://{labelled[2].files[0]}",
             profile=tmp_path / "profile")
    assert len(re.findall(rb"/Type /Page\b", pdf.read_bytes())) > 3


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A labelled CSV of three features and a model of it."""
    rng, directory = np.random.default_rng(0), tmp_path_factory.mktemp("table")
    x = rng.normal(size=(400, 3)) * np.where(np.arange(400) % 10 == 0, 3, 1)[:, None]
    rows = [",".join(f"{v:.4f}" for v in row) + f",{int(i % 10 == 0)}" for i, row in enumerate(x)]
    path = directory / "table.csv"
    path.write_text("\n".join(["pt,eta,mass,label", *rows]) + "\n")
    done = run("train", path, "--out", directory / "model", "--steps", "20", "--hidden", "16", "--batch", "64")
    assert done.exit_code == 0, done.output
    return path, directory / "model"


def test_command(table, tmp_path):
    path, trained = table
    done = run("report", trained, path, "--out", tmp_path / "r", "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    numbers = json.loads((tmp_path / "r.json").read_text())
    page = Page((tmp_path / "r" / "report.html").read_text())
    assert page.headings == SECTIONS
    assert (numbers["events"], numbers["model"], numbers["data"]) == ("test folds", "model", "table.csv")
    assert numbers["provenance"]["model digest (SHA-256)"] == Bundle.load(trained).digest
    assert numbers["training"]["history"] == Bundle.load(trained).provenance["history"]
    assert "python -m ebm train" in page.text
    for line in numbers["summary"]:
        assert line in done.stdout
        assert line in page.text


def test_command_refuses(table, tmp_path):
    path, _ = table
    (tmp_path / "file").write_text("")
    for arguments, messages in (  # a model that is not there shows what is looked at first
        ((DEMO, path, "--out", tmp_path), ("hep64-v1", "64 features", "3 features", str(DEMO), str(path))),
        (("no-model", path, "--out", tmp_path / "file"), (f"{tmp_path / 'file'} cannot be written",)),
        (("no-model", path, "--out", "/proc/report"), ("/proc/report cannot be written",)),
        (("no-model", path, "--out", tmp_path, "--json", "/proc/r.json"), ("/proc/r.json cannot be written",)),
        (("no-model", path, "--out", tmp_path), ("no-model: no such model directory",)),
    ):
        done = run("report", *arguments)
        assert done.exit_code == 2
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert all(m in done.stderr for m in messages), done.stderr
        assert "Traceback" not in done.output
