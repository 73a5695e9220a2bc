"""What leaves Python: one graph, one directory with its manifest, whole or not at all, and never without its proof."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scorers import events, model, preprocessing
from typer.testing import CliRunner

from ebm.bundle import Bundle, Threshold
from ebm.events import DataError
from ebm.networks import Autoencoder, EnergyNetwork, ScoreNetwork
from ebm.preprocess import LOG1P, Preprocessing
from export import __main__ as commands
from export import manifest
from export.__main__ import app
from export.build import TARGETS, build
from export.describe import describe
from export.optimize import optimize_for_inference
from export.score_graph import OUTPUTS, ExportGraph, Options, program
from kernels import load_scorer
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score

ROOT = Path(__file__).parents[1]
TOLERANCE = TOLERANCES["fp32"]


def small(kind: str = "energy", threshold: float | None = 0.5) -> Bundle:
    bundle = Bundle.random(6, 32, 2, kind=kind, preprocessing=preprocessing(6))
    t = None if threshold is None else Threshold(threshold, 0.01, 0.95, 1, 100, 0.01, True, bundle.default_level)
    return replace(bundle, threshold=t)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and its export to TorchScript and ONNX."""
    for module in TARGETS["onnx"].needs:
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("export") / "out"
    assert build(small(), ["torchscript", "onnx"], out, command="python -m export build ...") == out
    return small(), out


@pytest.fixture
def copied(exported, tmp_path):
    """An export that a test may damage."""
    import shutil

    return Path(shutil.copytree(exported[1], tmp_path / "out"))


# The graph.

@pytest.mark.parametrize("kind", ["energy", "score", "autoencoder"])
@pytest.mark.parametrize("preprocess", [True, False])
def test_the_graph_is_the_reference(kind, preprocess):
    """In float64 all outputs are those of the reference, at the level that was asked for."""
    bundle = small(kind, threshold=None)
    level = 0 if kind == "autoencoder" else 3
    bundle = replace(bundle, threshold=Threshold(0.5, 0.01, 0.95, 1, 100, 0.01, True, level))
    options = Options.of(bundle, outputs=OUTPUTS, level=level, preprocess=preprocess)
    x = events(50, 6).astype(np.float64) if preprocess else np.random.default_rng(0).normal(size=(50, 6))
    reference = load_scorer(bundle, "reference", preprocess=preprocess)
    energy, score = reference.energy_and_score(x, level)
    with torch.inference_mode():
        results = dict(zip(OUTPUTS, ExportGraph(bundle, options).double()(torch.from_numpy(x))))
    np.testing.assert_allclose(results["energy"], energy, rtol=1e-6, atol=1e-6)  # the folded bias is float32
    np.testing.assert_allclose(results["score"], score, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(results["energies"], reference.energies(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(results["flag"], energy > 0.5)


def test_the_energy_alone_has_no_backward_half():
    bundle = small()

    def products(outputs):
        nodes = program(bundle, Options.of(bundle, outputs=outputs)).graph.nodes
        return sum("linear" in str(node.target) or "matmul" in str(node.target) for node in nodes)

    assert (products(["energy", "flag"]), products(["energy", "score"])) == (4, 7)


def test_options_are_checked_against_the_model():
    bundle = small()
    assert Options.of(bundle).outputs == ("energy", "score", "flag")
    assert Options.of(bundle, outputs=["flag", "energy"]).outputs == ("energy", "flag")
    # The threshold holds for the level that it was calibrated at.
    assert Options.of(bundle, level=2).outputs == ("energy", "score")
    assert Options.of(small(threshold=None)).outputs == ("energy", "score")
    for b, given, message in (
        (bundle, {"outputs": ["energy", "scores"]}, r"outputs are \['energy', 'scores'\], expected energy and any of"),
        (bundle, {"outputs": ["energy", "energy"]}, "each once"),
        (bundle, {"outputs": ["score"]}, "expected energy and any of"),
        (bundle, {"outputs": []}, "expected energy"),
        (bundle, {"outputs": "energy"}, "expected energy and"),
        (small(threshold=None), {"outputs": ["energy", "flag"]}, "has none: calibrate it first"),
        (bundle, {"outputs": ["energy", "flag"], "level": 2}, "is for noise level 5, not 2"),
        (bundle, {"level": 10}, "noise level is 10, expected 0 to 9"),
        (bundle, {"level": -1}, "noise level is -1"),
        (bundle, {"level": 1.0}, "noise level is 1.0"),
        (bundle, {"batch_max": 0}, "batch_max is 0, expected a whole number from 1"),
        (bundle, {"batch_max": 1 << 30}, "batch_max is 1073741824"),
    ):
        with pytest.raises(ValueError, match=message):
            Options.of(b, **given)


# The formats.

def test_the_onnx_file(exported):
    onnx = pytest.importorskip("onnx")
    bundle, out = exported
    loaded = onnx.load(out / "model.onnx")
    onnx.checker.check_model(loaded, full_check=True)
    assert [(o.domain, o.version) for o in loaded.opset_import] == [("", 18)]
    tensors = {v.name: (onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type),
                        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
               for v in (*loaded.graph.input, *loaded.graph.output)}
    assert tensors == {"events": ("FLOAT", ["batch", 6]), "energy": ("FLOAT", ["batch"]),
                       "score": ("FLOAT", ["batch", 6]), "flag": ("BOOL", ["batch"])}
    inferred = {v.name for v in loaded.graph.value_info}
    assert inferred >= {name for node in loaded.graph.node for name in node.output} - tensors.keys()
    properties = {p.key.removeprefix("fused_ebm."): p.value for p in loaded.metadata_props}
    assert properties["model_digest"] == bundle.digest
    assert (properties["noise_level"], properties["threshold"], properties["preprocess"]) == ("5", "0.5", "true")
    assert json.loads(properties["features"]) == list(bundle.schema.features)
    assert sorted(os.listdir(out)) == ["export.json", "model.onnx", "model.pt", "source"]
    assert str(ROOT).encode() not in (out / "model.onnx").read_bytes()


def test_two_onnx_exports_are_the_same_bytes(exported, tmp_path):
    """In another process too, with another order of hashes."""
    out = exported[1]
    code = ("import sys; from pathlib import Path; from ebm.bundle import Bundle; from export.to_onnx import export; "
            "from export.score_graph import Options; b = Bundle.load(sys.argv[1]); "
            "export(b, Path(sys.argv[2]), Options.of(b))")
    subprocess.run([sys.executable, "-c", code, out / "source", tmp_path], cwd=ROOT, check=True,
                   env=os.environ | {"PYTHONHASHSEED": "7"})
    assert (tmp_path / "model.onnx").read_bytes() == (out / "model.onnx").read_bytes()


@pytest.mark.parametrize("file", ["model.onnx", "model.pt"])
def test_small_values_of_a_wide_feature_keep_their_digits(file, tmp_path):
    """log1p of values around 1e-5 whose spread is 1e-5: log(1 + x) would lose three digits."""
    d = 4
    tiny = Preprocessing(marker=np.full(d, np.nan), impute=np.full(d, np.nan), transform=np.full(d, LOG1P),
                         scale=np.ones(d), mean=np.full(d, 1e-5), inv_std=np.full(d, 1e5))
    bundle = Bundle.random(d, 32, 2, preprocessing=tiny)
    target = {"model.onnx": "onnx", "model.pt": "torchscript"}[file]
    for module in TARGETS[target].needs:
        pytest.importorskip(module)
    scorer = load_scorer(build(bundle, [target], tmp_path / "out") / file)
    x = (1e-5 * np.random.default_rng(0).gamma(2, 0.5, (257, d))).astype(np.float32)
    energy, score = scorer.energy_and_score(x)
    true_energy, true_score = load_scorer(bundle, "reference").energy_and_score(x)
    assert relative_rms_energy(energy, true_energy) < TOLERANCE
    assert relative_rms_score(score, true_score) < TOLERANCE


def test_exporting_warns_of_nothing(tmp_path):
    """TorchScript's deprecation is known to whoever asks for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_scorer(build(small(), ["torchscript"], tmp_path / "out") / "model.pt").energy(events(3, 6))


def test_no_compiler(tmp_path, monkeypatch):
    import torch._inductor.cpp_builder as cpp_builder

    def none():
        from torch._inductor.exc import InvalidCxxCompiler
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(RuntimeError, match=r"'aot-inductor' cannot be built: there is no C\+\+ compiler: install g"):
        build(small(), ["torchscript", "aot-inductor"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# The directory and its manifest.

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


# The commands.

def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments):
    """The one sentence on stderr of a command that must end with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_build_and_inspect(tmp_path, monkeypatch):
    small().save(tmp_path / "model")
    arguments = ["build", tmp_path / "model", "--to", "torchscript", "--out", tmp_path / "out", "--outputs",
                 "energy,energies", "--noise-level", "3", "--no-preprocess"]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    for words in ("noise level │ 3", "(batch, 6) float32, preprocessed: x0, x1, x2, x3 ... x5", "energies (batch, 10)",
                  "model.pt", "0.5 at noise level 5", "first_call_ms"):
        assert words in result.stdout
    (shown,) = json.loads(run("inspect", tmp_path / "out" / "model.pt", "--json").stdout)
    assert shown["options"] == {"outputs": ["energy", "energies"], "level": 3, "preprocess": False, "batch_max": 65_536}
    assert shown["command"] == ("python -m export build model --to torchscript --out out --outputs energy,energies "
                                "--noise-level 3 --no-preprocess")
    assert "golden" not in shown


def test_build_prints_json(tmp_path):
    small().save(tmp_path / "model")
    result = run("build", tmp_path / "model", "--to", "torchscript", "--out", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["exports"] == json.loads(run("inspect", tmp_path / "out", "--json").stdout)


def test_inspect_says_what_is_damaged(exported, copied):
    assert run("inspect", copied).exit_code == 0
    assert describe(exported[1])[0]["damaged"] == []
    (copied / "source" / "model.json").write_bytes(b"{}")
    result = run("inspect", copied / "model.onnx")
    assert result.exit_code == 1
    assert "DAMAGED" in result.stdout
    assert "model.json" in result.stdout
    assert "model.pt" not in result.stdout


def test_verify_command(exported, copied, tmp_path):
    result = run("verify", exported[1], "--json", tmp_path / "proof.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "proof.json").read_text())["ok"]
    (copied / "model.pt").write_bytes(b"PK")
    assert run("verify", copied).exit_code == 1
    assert "is no directory" in refused("verify", exported[1], "--json", tmp_path / "none" / "proof.json")


def test_bad_input_gives_one_sentence(tmp_path, exported):
    small().save(tmp_path / "model")
    out = tmp_path / "out"
    assert "targets are onnxx" in refused("build", tmp_path / "model", "--to", "onnxx", "--out", out)
    assert "no such model directory" in refused("build", tmp_path / "none", "--to", "onnx", "--out", out)
    assert "never overwritten" in refused("build", tmp_path / "model", "--to", "torchscript", "--out", exported[1])
    assert "arguments for tensorrt" in refused("build", tmp_path / "model", "--to", "torchscript", "--out", out,
                                               "--tensorrt-precision", "fp16")
    assert "'python -m export build' exports it" in refused("inspect", tmp_path / "model")
    assert "holds no export.json" in refused("inspect", tmp_path / "none")
    assert not out.exists()


@pytest.mark.parametrize("command", ["build", "verify", "inspect"])
def test_help_teaches(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example: python -m export" in result.output
    assert list(TARGETS) == commands.TARGETS.split(", ")


# The name of the case study.

@pytest.mark.parametrize("network", [EnergyNetwork, ScoreNetwork, Autoencoder], ids=lambda n: n.__name__)
def test_optimize_for_inference(network):
    torch.manual_seed(0)
    network = network()
    report = optimize_for_inference(network)["cpu"]
    assert report["agrees"]
    assert 0 < report["error_energy"] < TOLERANCE
    assert 0 < report["error_score"] < TOLERANCE
    assert report["first_20_calls_ms"] > report["p50_ms"] > 0
    assert report["within_budget"] == (report["p99_ms"] < 50)
    u = torch.randn(9, 64)
    with torch.no_grad():
        expected = network.energy_and_score(u)
        for given, wanted in zip(report["module"](u), expected, strict=True):
            torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_optimize_for_inference_reports_no_speed_of_what_is_wrong(monkeypatch):
    right = ExportGraph.forward
    monkeypatch.setattr(ExportGraph, "forward", lambda self, x: tuple(2 * r for r in right(self, x)))
    report = optimize_for_inference(small(), 6)["cpu"]
    assert not report["agrees"]
    assert report["error_energy"] > 1
    assert [report[name] for name in ("first_call_ms", "p50_ms", "p99_ms", "within_budget")] == [None] * 4


def test_optimize_for_inference_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="input_dim is 64, the model takes 6 features"):
        optimize_for_inference(small())
    with pytest.raises(ValueError, match="model is Linear, expected an EnergyNetwork"):
        optimize_for_inference(torch.nn.Linear(64, 1))
