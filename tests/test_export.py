"""The exported graph and its formats: what leaves Python computes what the reference does."""

from __future__ import annotations

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
from export_case import small
from scorers import events

from ebm.bundle import Bundle, Threshold
from ebm.preprocess import LOG1P, Preprocessing
from export.build import TARGETS, build
from export.score_graph import OUTPUTS, ExportGraph, Options, program
from kernels import load_scorer
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score

ROOT = Path(__file__).parents[1]
TOLERANCE = TOLERANCES["fp32"]


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
