"""The directory of an export and its manifest: whole, true, and refused where it is damaged."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from export_case import small
from scorers import model

from ebm.bundle import Bundle
from ebm.events import DataError
from export import manifest
from export.build import TARGETS, build
from export.score_graph import OUTPUTS, ExportGraph
from kernels import load_scorer
from kernels.tolerances import TOLERANCES

TOLERANCE = TOLERANCES["fp32"]


def test_the_manifest(exported):
    bundle, out = exported
    document = json.loads((out / "export.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert (document["format"], document["format_version"]) == ("fused-ebm export", 1)
    assert document["command"] == "python -m export build ..."
    assert document["model"]["digest"] == bundle.digest == Bundle.load(out / "source").digest
    assert document["options"] == {"outputs": ["energy", "score", "flag"], "level": 5, "preprocess": True,
                                   "batch_max": 65_536}
    assert document["outputs"]["score"] == ["float32", ["batch", 6]]
    assert (document["features"], document["units"]) == ([f"x{j}" for j in range(6)], [""] * 6)
    assert document["threshold"]["energy"] == 0.5
    assert document["versions"]["torch"] == torch.__version__
    for entry in document["files"].values():
        content = (out / entry["file"]).read_bytes()
        assert entry["sha256"] == {entry["file"]: hashlib.sha256(content).hexdigest()}
        assert entry["bytes"] == len(content)
        assert 0 < entry["errors"]["energy"] < TOLERANCE
        assert 0 < entry["errors"]["score"] < TOLERANCE
    assert document["files"]["onnx"]["opset"] == 18
    torchscript = document["files"]["torchscript"]
    assert torchscript["first_20_calls_ms"] > torchscript["first_call_ms"] > torchscript["later_call_ms"] > 0
    golden = {k: np.array(v, float) for k, v in document["golden"].items()}
    assert golden["events"].shape == (64, 6)
    assert np.isnan(golden["events"]).sum() + (golden["events"] == -999).sum() > 0
    energy, score = load_scorer(bundle, "reference").energy_and_score(golden["events"].astype(np.float32))
    np.testing.assert_array_equal(golden["energy"], energy)
    np.testing.assert_array_equal(golden["score"], score)


def test_golden_events_are_like_background():
    bundle = model(30, 64, 2)
    x = manifest.golden_events(bundle)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, manifest.golden_events(bundle))
    p = bundle.preprocessing
    u = p(x.astype(np.float64))[:, p.inv_std > 0]
    known = ~p.missing(x)[:, p.inv_std > 0]
    assert np.abs(u[known]).max() < 3.01
    assert abs(u[known].std() - 1) < 0.1
    assert not p.missing(x)[:, np.isnan(p.impute)].any()


@pytest.mark.parametrize("name", ["model.onnx", "source/model.json", "source/model.safetensors"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_damaged_file_is_refused_by_name(copied, name, how):
    path = copied / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content if how == "changed" else content[:-1])
    problem = "(no such file|cannot be read)" if how == "gone" else "damaged, or from another export"
    with pytest.raises(DataError, match=rf"{path.name}: {problem}"):
        load_scorer(copied / "model.onnx")


@pytest.mark.parametrize(("content", "message"), [
    (None, "export.json: cannot be read .*'python -m export build' writes it"),
    ("{", "export.json: not valid JSON"),
    ('{"format": "other"}', "export.json: not the manifest of a fused-ebm export"),
    ('{"format": "fused-ebm export", "format_version": 9}', "format version 9, this version reads 1"),
    ('{"format": "fused-ebm export", "format_version": 1}', "export.json: entry 'options' is missing"),
])
def test_a_damaged_manifest_is_refused(copied, content, message):
    (copied / "export.json").unlink()
    if content is not None:
        (copied / "export.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_scorer(copied / "model.pt")


@pytest.mark.parametrize(("damage", "message"), [
    (lambda d: d["model"].update(files={}), "digests of 'model' are of no file, expected model.json, model.safet"),
    (lambda d: d["files"]["onnx"].update(sha256={}), "digests of 'onnx' are of no file, expected model.onnx"),
    (lambda d: d["files"]["onnx"]["sha256"].update({"../x": ""}), r"digests of 'onnx' are of \.\./x, model.onnx, exp"),
    (lambda d: d["files"]["onnx"].pop("sha256"), r"'files' is damaged \(KeyError: 'sha256'\)"),
    (lambda d: d["files"]["onnx"].pop("file"), r"'files' is damaged \(KeyError: 'file'\)"),
    (lambda d: d.update(files=[]), "'files' is damaged"),
    (lambda d: d["model"].update(digest="0" * 64), "digest [0-9a-f]{12}, export.json says 000000000000"),
])
def test_a_manifest_without_its_digests_is_refused(copied, damage, message):
    path = copied / "export.json"
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message):
        load_scorer(copied / "model.onnx")


def test_options_that_do_not_fit_the_model(copied):
    text = (copied / "export.json").read_text()
    for old, new in (('"level": 5', '"level": 77'), ('"preprocess"', '"preprocessed"')):
        (copied / "export.json").write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match=r"export.json: damaged options"):
            load_scorer(copied / "model.pt")


def test_a_file_that_the_manifest_does_not_know(copied):
    (copied / "model.pt").rename(copied / "other.pt")
    with pytest.raises(DataError, match=r"other.pt: .*json does not know this file, it lists model.pt, model.onnx"):
        load_scorer(copied / "other.pt")
    with pytest.raises(DataError, match=r"model.pt: no such file"):
        load_scorer(copied / "model.pt")


def test_exports_are_never_overwritten(exported, tmp_path):
    before = {p: p.read_bytes() for p in exported[1].rglob("*") if p.is_file()}
    with pytest.raises(DataError, match="exports are never overwritten, name a new directory"):
        build(small(), ["torchscript"], exported[1])
    assert {p: p.read_bytes() for p in exported[1].rglob("*") if p.is_file()} == before


def test_what_does_not_agree_with_float64_does_not_leave(tmp_path, monkeypatch):
    """A flipped sign in the graph: the export is refused and nothing is left of it."""
    right = ExportGraph.forward
    monkeypatch.setattr(ExportGraph, "forward", lambda *a: tuple(-r if r.dim() == 2 else r for r in right(*a)))
    with pytest.raises(RuntimeError, match=r"model.pt does not agree with float64: .*2.0e\+00 in the score, the toler"):
        build(small(), ["torchscript"], tmp_path / "out")
    for output, mistake in (("flag", torch.logical_not), ("energies", lambda r: 2 * r)):
        def wrong(self, x, output=output, mistake=mistake):
            return tuple(mistake(r) if name == output else r for name, r in zip(self.options.outputs, right(self, x)))

        monkeypatch.setattr(ExportGraph, "forward", wrong)
        with pytest.raises(RuntimeError, match=f"model.pt does not agree with float64: .*{output.removesuffix('s')}"):
            build(small(), ["torchscript"], tmp_path / "out", outputs=OUTPUTS)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_of_build(tmp_path, monkeypatch):
    out = tmp_path / "out"
    for to, options, error, message in (
        (["onnxx"], {}, ValueError, "targets are onnxx, expected some of torchscript, onnx"),
        ("onnxx", {}, ValueError, "targets are onnxx, expected some of torchscript, onnx"),
        ([], {}, ValueError, "targets are none"),
        (["torchscript"], {"extra": {"triton": {"name": "a"}}}, ValueError, "arguments for triton, which is no target"),
        (["triton"], {"extra": {"triton": {"bakend": "a"}}}, ValueError, "triton takes no bakend"),
        (["torchscript"], {"outputs": ["score"]}, ValueError, "expected energy and any of"),
    ):
        with pytest.raises(error, match=message):
            build(small(), to, out, **options)
    with pytest.raises(DataError, match="no such model directory"):
        build(tmp_path / "none", ["torchscript"], out)
    monkeypatch.setitem(TARGETS, "onnx", TARGETS["onnx"]._replace(needs=("onnx", "no_such_module")))
    with pytest.raises(RuntimeError, match="'onnx' cannot be built: no_such_module not installed: pip install no"):
        build(small(), ["torchscript", "onnx"], out)
    assert not out.exists()
