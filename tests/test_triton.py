"""The Triton kernel without a GPU, run by Triton's interpreter; what is compiled is in test_triton_compiled.py."""

from __future__ import annotations

import os
from pathlib import Path
from subprocess import CalledProcessError
from types import SimpleNamespace

import numpy as np
import pytest
from scorers import events, model, spreads

from ebm.bundle import Bundle
from ebm.events import load_events
from ebm.preprocess import Preprocessing
from kernels import load_scorer
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_gpu = pytest.importorskip("kernels.triton_gpu")
launch = pytest.importorskip("kernels.launch")
prepare = pytest.importorskip("kernels.triton_kernel")._prepare
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

REDUCED = ("tf32x3", "tf32", "fp16", "bf16")
PRECISIONS = ("fp32", *REDUCED)


def no_driver(name):
    raise OSError(f"{name}: cannot open shared object file")


def test_why_not_without_a_driver(monkeypatch):
    monkeypatch.setattr(triton_gpu.ctypes, "CDLL", no_driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("torch was asked before the driver"))
    assert "no NVIDIA driver" in triton_gpu.why_not()


def pretend_gpu(monkeypatch, available, capability, built):
    """`built()` is where Triton compiles what launches."""
    monkeypatch.setattr(triton_gpu.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    active = type("Driver", (), {"utils": property(lambda self: built())})()
    monkeypatch.setattr(triton_gpu, "driver", SimpleNamespace(active=active))


@pytest.mark.parametrize(("available", "capability", "words"), [
    (False, None, ["PyTorch sees no CUDA GPU"]),
    (True, (7, 5), ["Tesla T4", "sm_75", "no tensor-core code", "TensorRT", "TorchScript"]),
    (True, (6, 1), ["sm_61"]),
    (True, (8, 0), None),
    (True, (9, 0), None),
    (True, (12, 0), None),
])
def test_why_not_of_a_gpu(monkeypatch, available, capability, words):
    pretend_gpu(monkeypatch, available, capability, lambda: None)
    said = triton_gpu.why_not()
    assert said is None if words is None else all(word in said for word in words)


@pytest.mark.parametrize("error", [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),  # Triton's words
    FileNotFoundError(2, "No such file or directory", "/nowhere/cc"),
    CalledProcessError(1, ["gcc", "cuda_utils.c"]),
    AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up"),
])
def test_why_not_where_triton_cannot_compile_what_launches(monkeypatch, error):
    def build():
        raise error

    pretend_gpu(monkeypatch, True, (9, 0), build)
    words = "needs Python.h and a C compiler (gcc, clang or what CC names): " + str(error).partition("\n")[0]
    assert triton_gpu.why_not() == "Triton cannot compile what launches its kernels, for which it " + words


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'fp8', expected 'fp32', 'tf32x3', 'tf32', 'fp16', 'bf16'"):
        triton_gpu.TritonScorer(Bundle.random(4, 64, 1), precision="fp8")


@interpreted
@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("architecture", [(30, 64, 2), (70, 100, 3)], ids=str)
def test_reduced_precisions_agree_with_float64(precision, architecture):
    """Energies, scores and energies at all levels; TF32 is float32 in the interpreter."""
    check_precision(precision, architecture, (1, 17, 65))


@pytest.mark.full
@interpreted
@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("architecture", [(1, 64, 1), (57, 192, 3), (64, 256, 2), (200, 128, 8), (256, 64, 8)], ids=str)
def test_reduced_precisions_agree_with_float64_everywhere(precision, architecture):
    check_precision(precision, architecture, (33,))


def check_precision(precision: str, architecture: tuple[int, int, int], batches: tuple[int, ...]) -> None:
    bundle, tolerance = model(*architecture), TOLERANCES[precision]
    scorer, reference = load_scorer(bundle, "triton", precision=precision), load_scorer(bundle, "reference")
    assert scorer.precision == precision
    energy_spread, score_spread = spreads(*architecture)
    rng = np.random.default_rng(0)
    for n in batches:
        x, k = events(n, architecture[0], seed=n), rng.integers(0, 10, n)
        true_energy, true_score = reference.energy_and_score(x, k)
        energy, score = scorer.energy_and_score(x, k)
        assert relative_rms_energy(energy, true_energy, energy_spread) < tolerance
        assert relative_rms_score(score, true_score, score_spread) < tolerance
        np.testing.assert_array_equal(scorer.energy(x, k), energy)
        np.testing.assert_array_equal(scorer.energies(x)[np.arange(n), k], energy)


@interpreted
@pytest.mark.parametrize("precision", REDUCED)
def test_flags_are_those_of_float64_but_for_what_is_too_near(precision):
    demo = Bundle.load(Path(__file__).parents[1] / "models" / "demo")
    x = load_events("toy:300").x
    truth = load_scorer(demo, "reference").energy(x)
    x = x[np.argsort(np.abs(truth - np.median(truth)))[::19]]  # from the middle to both ends
    truth = load_scorer(demo, "reference").energy(x)
    scorer = load_scorer(demo, "triton", precision=precision)
    energy = scorer.energy(x)
    assert relative_rms_energy(energy, truth) < TOLERANCES[precision]
    np.testing.assert_array_equal(scorer.flag(x), truth > demo.threshold.energy)
    clear = np.abs(truth - np.median(truth)) > 5 * TOLERANCES[precision] * truth.std()
    np.testing.assert_array_equal((energy > np.median(truth))[clear], (truth > np.median(truth))[clear])


@interpreted
@pytest.mark.parametrize("precision", REDUCED)
def test_one_events_nan_reaches_no_other_in_reduced_precision(precision):
    scorer = load_scorer(model(30, 64, 2), "triton", precision=precision, on_nonfinite="propagate")
    x = events(9, 30)
    clean = scorer.energy_and_score(x)
    for value in (np.nan, np.inf, -np.inf):
        damaged = x.copy()
        damaged[4, 2], damaged[6, 4] = value, value
        energy, score = scorer.energy_and_score(damaged)
        bad = np.isin(np.arange(len(x)), (4, 6))
        assert not np.isfinite(energy[bad]).any()
        np.testing.assert_array_equal(energy[~bad], clean[0][~bad])
        np.testing.assert_array_equal(score[~bad], clean[1][~bad])


@interpreted
@pytest.mark.parametrize("value", [1e6, -1e6, 3e30])
def test_what_is_beyond_fp16_stays_finite(value):
    """Far outside of what it can tell apart, fp16 still says that an event is unusual."""
    bundle = Bundle.random(4, 64, 2, seed=5)
    x = np.array([[0.1, 0.2, -0.3, 0.4], [0.1, value, -0.3, 0.4]], np.float32)
    energy, score = load_scorer(bundle, "triton", precision="fp16").energy_and_score(x)
    assert np.isfinite(score).all()
    truth = load_scorer(bundle, "reference").energy(np.clip(x, -65504, 65504))
    assert abs(energy[0] / truth[0] - 1) < 5e-3
    assert 0.5 < energy[1] / truth[1] < 2


@triton.jit
def transform(x, pre, u, slope, N: tl.constexpr):
    cols = tl.arange(0, 4)
    at = tl.arange(0, N)[:, None] * 4 + cols[None, :]
    here, there = prepare(tl.load(x + at), pre, cols, 64)
    tl.store(u + at, here)
    tl.store(slope + at, there)


@interpreted
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1, 1e4, 1e12, 1e36])
def test_transforms_keep_their_digits(size):
    x = (np.random.default_rng(0).normal(size=(64, 4)) * size).astype(np.float32)
    p = Preprocessing(marker=np.full(4, np.nan), impute=np.full(4, np.nan), transform=[0, 1, 2, 2],
                      scale=[1, 1, 0.3, 50], mean=np.zeros(4), inv_std=[1, 2, 3, 1])
    pre = launch.load(Bundle.random(4, 64, 1, preprocessing=p), True, "cpu")[-1]
    u, slope = torch.full((2, 64, 4), torch.nan)
    transform[(1,)](torch.from_numpy(x), pre, u, slope, 64)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(u.numpy(), p(exact), rtol=5e-7)
    np.testing.assert_allclose(slope.numpy(), p.derivative(exact), rtol=5e-7)


@pytest.mark.skipif(not isinstance(launch.fused, triton.JITFunction) or triton_gpu.why_not() is not None,
                    reason="needs a GPU, and TRITON_INTERPRET=0")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", [1, 257, 3001, 100_003])
def test_agrees_with_float64_on_a_gpu(n, precision):
    bundle = Bundle.random(64, 256, 2, seed=4)
    scorer, x = triton_gpu.TritonScorer(bundle, precision=precision), torch.randn(n, 64)
    k = torch.randint(0, 10, (n,))
    energy, score = (r.cpu().numpy() for r in scorer.energy_and_score(x.cuda(), k.cuda()))
    reference = load_scorer(bundle, "reference")
    true_energy, true_score = reference.energy_and_score(x.numpy(), k.numpy())
    spread = reference.energy(np.random.default_rng(0).normal(size=(4096, 64))).std()
    assert relative_rms_energy(energy, true_energy, spread) < TOLERANCES[precision]
    assert relative_rms_score(score, true_score) < TOLERANCES[precision]
