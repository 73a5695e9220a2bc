"""OpenVINO's gradient from an ONNX file: wrong where two products share a weight, right from our export.

The minimal case: one weight W (H, H), taken transposed by one product and as it is by the next,

    z = Gemm(x, W, transB=1)        z = x W^T
    y = MatMul(z, W)                y = z W

which is what an analytic gradient does: forward W_i h, backward (g * silu'(z_i)) W_i. OpenVINO 2026.4 gives y = z W^T:
its CPU plugin lays W out once, for the first product, and takes that for the second one too. Neither the activations
nor the bias matter, only that the two products name the same constant. With a copy of W under another name y is right,
which is why `export.to_onnx` gives each product a weight of its own. ONNX Runtime is right in both cases.
"""

from __future__ import annotations

import numpy as np
import pytest
from scorers import events, model

from export.score_graph import Options
from kernels import load_scorer
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score

onnx = pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

WIDTH = 16


def run(model, x: np.ndarray) -> list[np.ndarray]:
    """The outputs of an ONNX model in OpenVINO; without the hint it computes in bf16 where the processor can."""
    read = openvino.Core().read_model(model.SerializeToString())
    results = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])
    return [results[i] for i in range(len(read.outputs))]


def two_products(second: str, **weights: np.ndarray):
    text = f"""<ir_version: 9, opset_import: ["": 18]>
    minimal (float[n, {WIDTH}] x) => (float[n, {WIDTH}] y) {{
        z = Gemm <transB = 1> (x, W)
        y = MatMul(z, {second})
    }}"""
    parsed = onnx.parser.parse_model(text)
    parsed.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.checker.check_model(parsed)
    return parsed


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, WIDTH)).astype(np.float32), rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)


def test_today_a_shared_weight_is_wrong(case):
    """This fails when OpenVINO mends it: then `_give_each_product_its_weight` can go, and its bytes in the file."""
    x, w = case
    (y,) = run(two_products("W", W=w), x)
    np.testing.assert_allclose(y, x @ w.T @ w.T, rtol=1e-4, atol=1e-4)
    assert np.abs(y - x @ w.T @ w).max() > 1


def test_a_weight_for_each_product_is_right(case):
    x, w = case
    (y,) = run(two_products("V", W=w, V=w), x)
    np.testing.assert_allclose(y, x @ w.T @ w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("features", "layers"), [(30, 2), (64, 3)])
def test_the_exported_gradient_is_right(features, layers):
    """Square weights and others, all transforms, at batches that OpenVINO treats differently."""
    from export.to_onnx import onnx_model

    bundle = model(features, 64, layers)
    exported = onnx_model(bundle, Options.of(bundle, outputs=("energy", "score")))
    x = events(257, features)
    true_energy, true_score = load_scorer(bundle, "reference").energy_and_score(x)
    spread, size = true_energy.std(), float(np.sqrt(np.mean(true_score**2)))
    for n in (1, 7, 257):
        energy, score = run(exported, x[:n])
        assert relative_rms_energy(energy, true_energy[:n], spread) < TOLERANCES["fp32"]
        assert relative_rms_score(score, true_score[:n], size) < TOLERANCES["fp32"]
