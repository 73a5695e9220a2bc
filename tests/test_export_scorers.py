"""Exported files as Scorers: what every Scorer promises holds for them, at the one noise level that they have."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import test_conformance as conformance
import torch
from scorers import events, model, preprocessing

from bench import contenders
from ebm.bundle import Bundle, Threshold
from export.build import build, why_not
from export.score_graph import OUTPUTS
from kernels import Scorer, load_scorer
from kernels.tolerances import CHECK_EVENTS, TOLERANCES, relative_rms_energy, relative_rms_score

TOLERANCE = TOLERANCES["fp32"]
SMALL = (30, 64, 2)
BATCHES = (1, 2, 3, 7, 64, 257, 4096)
SLICE = [("energy", 1, 64, 1), ("energy", 200, 64, 4), ("energy", 64, 128, 3), ("score", 30, 64, 2),
         ("autoencoder", 64, 1, 1)]
MATRIX = [(kind, d, 256, layers) for kind in ("energy", "score") for d in (1, 30, 64, 200) for layers in (1, 2, 3, 4)]
FILES = {"torchscript": "model.pt", "onnx": "model.onnx", "aot-inductor": "model.pt2"}
every_target = pytest.mark.parametrize("target", FILES)
# Compiling takes 20 s: in the slice only SMALL is compiled.
every_quick_target = pytest.mark.parametrize(
    "target", [*list(FILES)[:2], pytest.param("aot-inductor", marks=pytest.mark.full)])


@pytest.fixture(scope="module")
def make():
    """make(target, bundle, ...): the Scorer of a model's export, by default with all outputs. It is exported once."""
    with tempfile.TemporaryDirectory() as folder:
        made: dict[tuple, Path] = {}

        def make(target: str, bundle: Bundle, *, outputs=None, preprocess=True, level=None, **options) -> Scorer:
            if reason := why_not(target):
                pytest.skip(reason)
            has_flag = bundle.threshold and level in (None, bundle.threshold.level)
            outputs = outputs or tuple(name for name in OUTPUTS if name != "flag" or has_flag)
            key = target, bundle.digest, bundle.threshold, outputs, preprocess, level
            if key not in made:
                made[key] = build(bundle, [target], Path(folder) / str(len(made)), level=level, preprocess=preprocess,
                                  outputs=outputs)
            return load_scorer(made[key] / FILES[target], **options)

        yield make


@cache
def truth(kind: str, features: int, hidden: int, layers: int) -> tuple[Bundle, np.ndarray, np.ndarray, np.ndarray]:
    """A model, the fixed events, and their energy and score in float64."""
    bundle = Bundle.random(features, hidden, layers, kind=kind, seed=features, preprocessing=preprocessing(features))
    x = events(CHECK_EVENTS, features, seed=1)
    return bundle, x, *load_scorer(bundle, "reference").energy_and_score(x)


def with_threshold(bundle: Bundle, energy: float) -> Bundle:
    return replace(bundle, threshold=Threshold(float(np.float32(energy)), 0.01, 0.95, 1, 100, 0.01, True,
                                               bundle.default_level))


@every_target
@pytest.mark.parametrize(("promise", "arguments"), [
    (conformance.test_score_is_the_gradient_of_its_own_energy, (3,)),
    (conformance.test_score_is_the_gradient_of_its_own_energy, (40,)),
    (conformance.test_imputed_and_constant_features_have_no_score, ()),
    (conformance.test_attribution_is_the_derivative_by_preprocessed_features, ()),
    (conformance.test_extreme_but_finite_values, ()),
    (conformance.test_one_events_nan_reaches_no_other, ()),
    (conformance.test_bad_arguments, ()),
    (conformance.test_empty_batch, ()),
    (conformance.test_other_dtypes_layouts_and_torch, ()),
], ids=lambda value: getattr(value, "__name__", None))
def test_promise_of_every_scorer(target, promise, arguments, make, monkeypatch):
    """The conformance tests of the kernels, run on what was exported."""
    monkeypatch.setattr(conformance, "make", make)
    promise(target, *arguments)


@every_quick_target
@pytest.mark.parametrize("promise", [
    conformance.test_without_preprocessing, conformance.test_mean_far_from_zero,
    conformance.test_trained_weights_on_toy_events, conformance.test_every_feature_refuses_what_is_not_finite,
], ids=lambda promise: promise.__name__)
def test_promise_on_other_models(target, promise, make, monkeypatch):
    monkeypatch.setattr(conformance, "make", make)
    promise(target)


def check_agreement(make, target: str, *architecture, outputs=("energy", "score"), batches=BATCHES):
    """Energy and score against float64 at every batch size, over 64 events or more, written into arrays of NaN.

    The error is a mean over events: in one event with much cancellation any float32 sum can be three times as far off.
    """
    bundle, x, true_energy, true_score = truth(*architecture)
    scorer = make(target, bundle, outputs=outputs)
    spread, size = true_energy.std(), float(np.sqrt(np.mean(true_score**2)))
    for n in batches:
        m = n * -(-64 // n)
        energy, score = np.full(m, np.nan, np.float32), np.full((m, x.shape[1]), np.nan, np.float32)
        for i in range(0, m, n):
            scorer.energy_and_score(x[i:i + n], out=(energy[i:i + n], score[i:i + n]))
        assert relative_rms_energy(energy, true_energy[:m], spread) < TOLERANCE, n
        assert relative_rms_score(score, true_score[:m], size) < TOLERANCE, n


@every_quick_target
@pytest.mark.parametrize("architecture", SLICE, ids=str)
def test_agrees_with_float64_at_every_batch_size(target, architecture, make):
    check_agreement(make, target, *architecture)


def test_compiled_code_agrees_with_float64_at_every_batch_size(make):
    check_agreement(make, "aot-inductor", "energy", *SMALL, outputs=None)


@pytest.mark.full
@every_target
@pytest.mark.parametrize("architecture", MATRIX, ids=str)
def test_agrees_with_float64_everywhere(target, architecture, make):
    check_agreement(make, target, *architecture)


@every_quick_target
@pytest.mark.parametrize("kind", ["energy", "score", "autoencoder"])
def test_all_noise_levels(target, kind, make):
    bundle, x, _, _ = truth(kind, *SMALL)
    true_energies = load_scorer(bundle, "reference").energies(x[:257])
    scorer = make(target, bundle)
    for n in (1, 7, 257):
        energies = scorer.energies(x[:n], out=np.full((n, bundle.n_levels), np.nan, np.float32))
        for k in range(bundle.n_levels):
            true = true_energies[:, k]
            assert relative_rms_energy(energies[:, k], true[:n], true.std()) < TOLERANCE, (n, k)


def check_flags(scorer: Scorer, x: np.ndarray, true_energy: np.ndarray):
    unclear = np.abs(true_energy - scorer.threshold) < 1e-5 * true_energy.std()
    flag = scorer.flag(x)
    assert flag.dtype == bool
    assert 0 < flag.sum() < len(x)
    assert (flag == (true_energy > scorer.threshold))[~unclear].all()
    np.testing.assert_array_equal(flag, scorer.energy(x) > scorer.threshold)
    as_torch = scorer.flag(torch.from_numpy(x))
    assert as_torch.dtype == torch.bool
    np.testing.assert_array_equal(as_torch.numpy(), flag)


@every_quick_target
@pytest.mark.parametrize("n", [4096, pytest.param(100_000, marks=pytest.mark.full)])
def test_flags_of_the_artefact(target, n, make):
    """Its own flags, which it computes itself: those of float64, but for energies at the threshold."""
    x = events(n, SMALL[0], seed=4)
    true_energy = load_scorer(model(*SMALL), "reference").energy(x)
    scorer = make(target, with_threshold(model(*SMALL), np.quantile(true_energy, 0.99)))
    check_flags(scorer, x, true_energy)
    x[7, 0] = np.inf
    with pytest.raises(ValueError, match=r"event 7: feature 0 \(x0\) is inf"):
        scorer.flag(x)
    assert scorer.flag(x[:0]).shape == (0,)


def test_one_noise_level(make):
    bundle = with_threshold(model(*SMALL), 0.5)
    scorer = make("torchscript", bundle, level=2)
    reference = load_scorer(bundle, "reference")
    x = events(5, 30)
    assert scorer.default_level == 2
    for k in (None, 2, np.full(5, 2), torch.full((5,), 2)):
        np.testing.assert_allclose(scorer.energy(x, k), reference.energy(x, 2), rtol=1e-4)
    for k in (5, np.array([2, 2, 5, 2, 2])):
        with pytest.raises(ValueError, match=r"model.pt was exported at noise level 2, given 5: export another with"):
            scorer.energy_and_score(x, k)
    # The threshold was calibrated at another level, so here it says nothing.
    assert scorer.threshold is None
    with pytest.raises(ValueError, match="no threshold"):
        scorer.flag(x)


def test_outputs_that_were_not_exported(tmp_path):
    bundle = with_threshold(model(*SMALL), 0.5)
    scorer = load_scorer(build(bundle, ["torchscript"], tmp_path / "out", outputs=["energy"]) / "model.pt")
    x = events(5, 30)
    assert not scorer.gives_score
    assert scorer.energy(x).shape == (5,)
    np.testing.assert_array_equal(scorer.flag(x), scorer.energy(x) > 0.5)
    for method, name in ((scorer.energy_and_score, "score"), (scorer.energies, "energies")):
        with pytest.raises(ValueError, match=rf"has no {name}, only energy: .* --outputs energy,{name}"):
            method(x)


@every_quick_target
def test_arguments_of_load_scorer(target, make):
    bundle = model(*SMALL)
    scorer = make(target, bundle, threads=1)
    assert (scorer.threads, scorer.precision, scorer.device) == (1, "fp32", "cpu")
    for options, message in (
        ({"backend": "native"}, "backend is 'native', expected 'auto'"),
        ({"precision": "fp16"}, "precision is 'fp16', .* has 'fp32'"),
        ({"preprocess": False}, "was exported with its preprocessing: export it again with --no-preprocess"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'"),
        ({"threads": 0}, "threads is 0, expected a whole number from 1 on"),
    ):
        with pytest.raises(ValueError, match=message):
            load_scorer(scorer.path, **options)


def test_events_that_cannot_be_written_to(make):
    x = events(7, 30)
    x.flags.writeable = False
    for target in ("torchscript", "onnx"):
        scorer = make(target, model(*SMALL))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.array_equal(scorer.energy(x), scorer.energy(x.copy()))


def test_torchscript_runs_where_it_is_told_to(make):
    x = events(7, 30)
    scorer = make("torchscript", model(*SMALL), device="cpu:0")
    assert scorer.device == "cpu:0"
    assert np.array_equal(scorer.energy(x), make("torchscript", model(*SMALL)).energy(x))


def test_onnx_runtime_sleeps_while_there_is_nothing_to_do(make, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = make("onnx", model(*SMALL)).path
    seen, session = [], onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: (seen.append((a, k)), session(*a, **k))[1])
    load_scorer(path, threads=3)
    (_, settings), options = seen[0]
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert (settings.intra_op_num_threads, settings.inter_op_num_threads) == (3, 1)
    assert options["providers"][-1][0] == "CPUExecutionProvider"


def test_a_gpu_is_used_where_onnx_runtime_has_one(make, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = make("onnx", model(*SMALL)).path
    asked = {}

    class Session:
        def __init__(self, path, settings, providers):
            asked.update(providers)

        def get_providers(self):
            return list(asked)

    there = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert load_scorer(path).device == "cuda:0"
    assert asked == {"CUDAExecutionProvider": {"use_tf32": "0"}, "CPUExecutionProvider": {}}


def test_compiled_code_refuses_another_processor(make, monkeypatch):
    path = make("aot-inductor", model(*SMALL)).path
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(RuntimeError, match=r"was compiled for x86_64 \(x86-64-v3\), this processor is"):
        load_scorer(path)
    monkeypatch.undo()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(RuntimeError, match="this processor is aarch64"):
        load_scorer(path)


def test_torch_threads_are_left_alone_unless_asked_for(make):
    before = torch.get_num_threads()
    assert make("torchscript", model(*SMALL)).threads == before
    try:
        assert make("torchscript", model(*SMALL), threads=before + 1).threads == before + 1 == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def test_the_benchmark_takes_an_exported_file(make):
    bundle = model(*SMALL)
    path = str(make("torchscript", bundle).path)
    contenders.check_names([path])
    contender = contenders.build(path, bundle, torch.get_num_threads(), {}, named=True)
    x = events(3, 30)
    np.testing.assert_array_equal(contender.function("energy", 3)(x), make("torchscript", bundle).energy(x))
    with pytest.raises(RuntimeError, match="exported from another model"):
        contenders.build(path, model(30, 64, 1), torch.get_num_threads(), {}, named=True)
    with pytest.raises(ValueError, match=r"'none.onnx': expected one of .*, or an exported file"):
        contenders.check_names(["none.onnx"])
