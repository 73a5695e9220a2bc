"""What `verify` checks, what it says, and that nothing wrong passes for right."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scorers import preprocessing

from ebm import hep64
from ebm.bundle import Bundle
from ebm.events import DataError, Events
from ebm.threshold import calibrate
from export import manifest
from export.build import build
from export.verify import ALL, FAIL, NOT_RUN, OF_KERNELS, PASS, ROW, verify
from export.verify_checks import BATCHES
from export.verify_table import print_report
from kernels import BACKENDS, load_scorer
from kernels.tolerances import CHECK_EVENTS, TOLERANCES

DEMO = Path(__file__).parents[1] / "models" / "demo"


def small_model(kind: str = "energy", n_features: int = 6) -> Bundle:
    bundle = Bundle.random(n_features, 64, 2, 3, kind, seed=2, preprocessing=preprocessing(n_features))
    energy = load_scorer(bundle, "reference").energy(manifest.golden_events(bundle, n=4096))
    return replace(bundle, threshold=calibrate(energy.astype(np.float32), rate=0.02, level=bundle.default_level))


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return build(small_model(), ["torchscript", "onnx"], tmp_path_factory.mktemp("export") / "out")


@pytest.fixture
def copy(export, tmp_path) -> Path:
    return shutil.copytree(export, tmp_path / "out")


def of(report, **what) -> list[dict]:
    return [row for row in report.rows if all(row[key] == value for key, value in what.items())]


def printed(report) -> str:
    text = io.StringIO()
    print_report(report, Console(file=text, highlight=False))
    return text.getvalue()


def failing(report) -> set[tuple[str, str]]:
    return {(row["scorer"], row["check"]) for row in of(report, status=FAIL)}


def real_events(monkeypatch, bundle: Bundle, x: np.ndarray) -> None:
    events = Events(bundle.schema, x, np.arange(len(x)).astype(str))
    monkeypatch.setattr("export.verify.load_events", lambda name: events)


def test_the_demo_model():
    """Every backend and precision that runs here passes every check; the others say why they did not run."""
    report = verify(DEMO)
    assert report.ok
    assert report.about["data"].startswith("toy:")
    assert {(r["scorer"], r["precision"]) for r in of(report, check="load") if "deterministic" not in r["scorer"]} == {
        (b.name, precision) for b in BACKENDS.values() for precision in b.dtypes}
    for name, precision in (("native", "fp32"), ("native deterministic", "fp32"), ("numba", "fp32"),
                            ("reference", "fp32")):
        if BACKENDS[name.split()[0]].why_not():
            continue
        rows = of(report, scorer=name, precision=precision)
        assert {row["check"] for row in rows} == {"load", *OF_KERNELS}
        assert {row["status"] for row in rows} == {PASS}
        assert {row["tolerance"] for row in rows if row["check"] not in ("load", "gradient")} == {TOLERANCES["fp32"]}
        assert [row["of"] for row in rows if row["check"] == "batches"] == [f"n = {n}" for n in BATCHES]
        assert [row["of"] for row in rows if row["check"] == "adversarial"] == [
            "zeros", "tiny", "denormal", "huge", "one huge", "one-hot", "repeated", "missing"]
        assert [row["of"] for row in rows if row["check"] == "flags"] == ["random", "real", "near the threshold"]
        for row in rows:
            if row["check"] in ("random", "real"):
                assert row["events"] == CHECK_EVENTS
                assert 0 < max(row["error_energy"], row["error_score"]) == row["needed"] < row["tolerance"]
                assert row["spearman"] > 1 - 1e-6
    for row in of(report, scorer="triton"):
        assert row["status"] == NOT_RUN
        assert "interpreter" in row["reason"] or "NVIDIA" in row["reason"] or "GPU" in row["reason"]


def test_every_artefact_and_every_backend(export):
    report = verify(export)
    assert report.ok
    for name in ("model.pt", "model.onnx"):
        rows = of(report, scorer=name)
        assert {row["check"] for row in rows} == {"load", *ALL}
        assert {row["file"] for row in rows} == {str(export / name)}
        assert {row["check"]: row["reason"] for row in rows if row["status"] == NOT_RUN} == {
            "real": "no real events: give a file of the model's schema as data",
            "levels": "one noise level was exported: --outputs energies exports all"}
        assert [row["of"] for row in rows if row["check"] == "golden"] == ["artefact", "float64"]
    assert of(report, scorer="reference", precision="fp32", status=PASS)
    (tensorrt,) = of(report, scorer="TensorRT")
    assert tensorrt["status"] == NOT_RUN
    assert "no engine was built" in tensorrt["reason"]
    assert {r["scorer"] for r in verify(export, backends=["reference"]).rows} == {
        "reference", "model.pt", "model.onnx", "TensorRT"}


def test_the_report_is_whole(export, copy):
    """Strict JSON with one set of entries; tables of 100 columns that say all that failed or was not run."""
    (copy / "model.pt").write_bytes(b"")
    report = verify(copy)
    document = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert document["ok"] is False
    assert document["tolerances"] == TOLERANCES
    assert document["model_digest"] == small_model().digest
    assert len(document["rows"]) == len(report.rows)
    assert all(tuple(row) == ROW for row in document["rows"])
    assert {row["status"] for row in document["rows"]} == {PASS, FAIL, NOT_RUN}
    assert all(row["reason"] for row in document["rows"] if row["status"] != PASS)
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 100
    flowing = " ".join(text.split())
    for row in document["rows"]:
        assert row["scorer"].split()[0] in text
        if row["status"] != PASS:
            assert row["reason"].split(":")[0] in flowing
    assert f"FAIL model.pt, load: {copy / 'model.pt'}: damaged" in flowing
    assert flowing.endswith("; not model.pt")
    assert "NOT RUN TensorRT" in flowing
    assert "PASS: " in printed(verify(export))


@pytest.mark.parametrize("name", ["model.pt", "model.onnx", "source/model.safetensors"])
def test_a_damaged_file_fails_by_its_digest(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    if name.startswith("source"):
        with pytest.raises(DataError, match=r"model\.safetensors"):
            verify(copy, backends=())
        return
    report = verify(copy, backends=())
    assert not report.ok
    assert failing(report) == {(name, "load")}
    assert name in of(report, scorer=name)[0]["reason"]
    other = {"model.pt": "model.onnx", "model.onnx": "model.pt"}[name]
    assert of(report, scorer=other, check="random", status=PASS)


@pytest.mark.parametrize("what", ["energy", "score"])
def test_golden_answers_are_checked(copy, what):
    """Of float64 itself, too: the answers in export.json must be those that it gives today."""
    path = copy / "export.json"
    document = json.loads(path.read_text())
    golden = np.array(document["golden"][what])
    golden.flat[5] += 1e-9 * golden.std()
    document["golden"][what] = golden.tolist()
    path.write_text(json.dumps(document))
    report = verify(copy, backends=())
    assert {(r["check"], r["of"]) for r in of(report, status=FAIL)} == {("golden", "float64")}
    golden.flat[5] += golden.std()
    document["golden"][what] = golden.tolist()
    path.write_text(json.dumps(document))
    assert len(of(verify(copy, backends=()), status=FAIL, of="artefact")) == 2


def test_other_kinds(tmp_path):
    """ScoreNetwork, whose score is not the gradient of its energy, and Autoencoder, which has one level."""
    for kind in ("score", "autoencoder"):
        out = build(small_model(kind), ["torchscript"], tmp_path / kind)
        report = verify(out)
        assert report.ok, printed(report)
        for name in ("model.pt", "reference"):
            (row,) = of(report, scorer=name, check="gradient", **({"precision": "fp32"} if name == "reference" else {}))
            assert row["status"] == (NOT_RUN if kind == "score" else PASS), row
        assert "it computes energy models" in of(report, scorer="numba")[0]["reason"]


def test_other_options(tmp_path):
    """Events that are preprocessed already, another level, all levels, and fewer outputs."""
    for i, (options, not_run) in enumerate((
        ({"preprocess": False}, {"real", "levels"}), ({"level": 0}, {"real", "levels", "flags"}),
        ({"outputs": ("energy", "energies")}, {"real", "gradient", "flags"}),
        ({"outputs": ("energy", "score", "flag", "energies")}, {"real"}),
    )):
        report = verify(build(small_model(), ["torchscript"], tmp_path / str(i), **options), backends=())
        assert report.ok, printed(report)
        assert {row["check"] for row in of(report, scorer="model.pt", status=NOT_RUN)} == not_run


def test_torchscript_is_checked_on_the_gpu_too(export, monkeypatch):
    """Where there is one; here another name of the CPU stands for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("export.verify.load_scorer", lambda path, *a, device=None, **options: load_scorer(
        path, *a, **options | ({"device": device.replace("cuda", "cpu")} if device else {})))
    report = verify(export, backends=())
    assert {row["status"] for row in of(report, scorer="model.pt on the GPU", device="cpu:0")} == {PASS, NOT_RUN}
    assert report.ok, printed(report)


def test_a_repository_of_models_of_different_schemas(tmp_path, monkeypatch):
    for name, d in (("a", 6), ("b", 3)):
        build(small_model(n_features=d), ["triton"], tmp_path / "out",
              extra={"triton": {"backend": "pytorch", "name": name}})
    real_events(monkeypatch, small_model(), manifest.golden_events(small_model()))
    report = verify(tmp_path / "out", backends=(), data="real")
    assert report.ok, printed(report)
    (row,) = of(report, scorer="triton/b/1/model.pt", check="real")
    assert row["reason"] == "the real events are of random, this model is of another schema"


def test_onnx_keeps_its_digits_at_the_largest_noise_level(tmp_path):
    """There ONNX Runtime's own Sigmoid and its product of one column lose more than is allowed."""
    report = verify(build(DEMO, ["onnx"], tmp_path / "out", level=0), backends=())
    assert report.ok, printed(report)


def test_few_real_events_that_lie_far_out(monkeypatch):
    """Relative to how far out they are, as adversarial events: ten such events have no spread of their own."""
    real_events(monkeypatch, small_model(), 1000 * manifest.golden_events(small_model())[:10])
    report = verify(small_model(), backends=["native", "reference"], data="real")
    assert report.ok, printed(report)


def test_a_repository_of_versions(tmp_path):
    """Every version has its own model; what a crash left behind, and what only a server runs, is not a version."""
    out = tmp_path / "out"
    other = small_model()
    other = replace(other, tensors=other.tensors | {"w_out": 2 * other.tensors["w_out"]}, threshold=replace(
        other.threshold, energy=2 * other.threshold.energy))
    for bundle in (small_model(), other):
        build(bundle, ["triton"], out, extra={"triton": {"backend": "pytorch", "name": "m"}})
    shutil.copytree(out / "triton" / "m" / "2", out / "triton" / "m" / ".3.tmp")
    report = verify(out, backends=())
    assert report.ok, printed(report)
    passed = {row["scorer"] for row in of(report, check="random", status=PASS)}
    assert passed == {f"triton/m/{version}/model.pt" for version in (1, 2)}
    build(small_model(), ["triton"], tmp_path / "python", extra={"triton": {"name": "m"}})
    path = tmp_path / "python" / "triton" / "m" / "1" / "model.py"
    assert not verify(tmp_path / "python", backends=()).ok  # nothing ran
    report = verify(tmp_path / "python", backends=["reference"])
    assert report.ok
    assert printed(report).split(" s); ")[-1].split() == ["nothing", "is", "proven", "of", "triton/m/1/model.py"]
    (row,) = of(report, scorer="triton/m/1/model.py")
    assert row["status"] == NOT_RUN
    path.write_text(path.read_text() + "\n")
    (row,) = of(verify(tmp_path / "python", backends=()), scorer="triton/m/1/model.py")
    assert row["status"] == FAIL
    assert "model.py: damaged" in row["reason"]


def test_real_events_of_a_file(monkeypatch):
    """Of the model's schema; of another one, or with a value that is not finite, they are refused by name."""
    bundle, rng = small_model(), np.random.default_rng(0)
    x = rng.normal(size=(5000, 6)).astype(np.float32)
    files = {"good.csv": Events(bundle.schema, x, np.arange(5000).astype(str)),
             "other.csv": Events(replace(bundle.schema, features=tuple("abcdef")), x, np.arange(5000).astype(str)),
             "bad.csv": Events(bundle.schema, np.where(np.arange(5000)[:, None] == 7, np.inf, x), np.zeros(0))}
    monkeypatch.setattr("export.verify.load_events", files.get)
    report = verify(bundle, data="good.csv", backends=["reference"])
    assert report.ok
    assert report.about["data"] == "good.csv"
    assert [row["events"] for row in of(report, check="real")] == [CHECK_EVENTS]
    with pytest.raises(DataError, match=r"other\.csv has .*feature 0 is 'x0' in the model, 'a' in the data"):
        verify(bundle, data="other.csv")
    with pytest.raises(DataError, match=r"bad\.csv: event 7: feature 0 \(x0\) is inf"):
        verify(bundle, data="bad.csv")


def test_what_cannot_be_verified(tmp_path):
    with pytest.raises(DataError, match="nothing to verify"):
        verify(tmp_path)
    with pytest.raises(DataError, match="nothing to verify"):
        verify(tmp_path / "missing")
    with pytest.raises(ValueError, match="no backend is called cuda, expected some of triton, native"):
        verify(DEMO, backends=["cuda", "native"])
    with pytest.raises(DataError, match="toy"):
        verify(small_model(), data="toy:100")


def test_a_reduced_precision_needs_its_physics_report():
    report = verify(replace(Bundle.load(DEMO), reports={}), backends=["native"])
    for precision in ("int16", "int8"):
        (row,) = of(report, precision=precision)
        assert row["status"] == NOT_RUN
        assert "physics report" in row["reason"] or "C++" in row["reason"]


def test_the_toy_fits_models_of_its_features_whatever_their_b_tagger():
    demo = Bundle.load(DEMO)
    assert demo.schema.features == hep64.SCHEMA.features
    bundle = replace(demo, schema=replace(demo.schema, name="hep64-v1/PNetB"))
    (row,) = of(verify(bundle, backends=["reference"]), check="real")
    assert row["status"] == PASS
