"""The Scorer of TensorRT engines, with ONNX Runtime for an engine and the processor for a GPU."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from fake_tensorrt import ALIGNMENT, fake_tensorrt
from scorers import events
from tensorrt_case import ALL, bundle, install

from export.build import build
from kernels import load_scorer
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """An export of all outputs, for batches up to 600, and the fake it was made by, with an empty log."""
    fake = install(monkeypatch, tmp_path, fake_tensorrt())
    out = build(bundle(), ["tensorrt"], tmp_path / "out", outputs=ALL, batch_max=600)
    fake.log.clear()
    return out / "model-sm90-fp32.engine", fake


def test_scorer_agrees_with_float64_at_every_batch_size(engine):
    scorer, reference = load_scorer(engine[0]), load_scorer(bundle(), "reference")
    assert (scorer.name, scorer.precision, scorer.gives_score) == ("tensorrt", "fp32", True)
    all_energy, all_score = reference.energy_and_score(events(4096, 30, seed=1))
    spread = all_energy.std(), np.sqrt(np.mean(all_score**2))
    for n in (1, 2, 3, 7, 16, 17, 64, 256, 257, 600, 601, 1300, 4096):
        x = events(n, 30, seed=n)
        true_energy, true_score = reference.energy_and_score(x)
        for like in (np.asarray, torch.from_numpy):
            energy, score = (np.asarray(a) for a in scorer.energy_and_score(like(x)))
            assert relative_rms_energy(energy, true_energy, spread[0]) < TOLERANCES["fp32"], n
            assert relative_rms_score(score, true_score, spread[1]) < TOLERANCES["fp32"], n
            np.testing.assert_array_equal(scorer.energy(like(x)), energy)
            np.testing.assert_array_equal(scorer.flag(like(x)), energy > scorer.threshold)
            energies = np.asarray(scorer.energies(like(x)))
            assert relative_rms_energy(energies, reference.energies(x), spread[0]) < TOLERANCES["fp32"], n


def test_small_batches_replay_one_graph_of_their_profile(engine):
    path, fake = engine
    scorer = load_scorer(path)
    for n in (1, 5, 16, 9, 200, 1, 17):
        scorer.energy(events(n, 30))
    assert fake.log == [(what, (profile, n)) for profile, n in enumerate((1, 16, 256))
                        for what in ("execute", "capture")]


def test_large_batches_run_from_and_to_the_callers_memory(engine):
    """An address that TensorRT would not take is the exception: its events are copied."""
    path, fake = engine
    scorer = load_scorer(path)
    x = torch.zeros(1 + 2 * 600 + 300, 30)
    x[1:] = torch.from_numpy(events(len(x) - 1, 30))
    aligned, unaligned = x[:-1].clone(), x[1:]
    aligned.copy_(unaligned)
    assert [a.data_ptr() % ALIGNMENT == 0 for a in (aligned, unaligned)] == [True, False]
    for buffer in scorer._buffers.values():
        buffer.fill_(1)
    energy, score = scorer.energy_and_score(aligned)
    assert fake.log == [("execute", (3, n)) for n in (600, 600, 300)]
    assert (scorer._buffers["events"] == 1).all()
    assert (scorer._buffers["score"] == 1).all()
    again = scorer.energy_and_score(unaligned)
    assert not (scorer._buffers["events"] == 1).all()
    torch.testing.assert_close(again, (energy, score), rtol=0, atol=0)


def test_results_into_out_and_other_inputs(engine):
    scorer = load_scorer(engine[0])
    for n in (5, 300):
        x = torch.from_numpy(events(n, 30))
        energy, score = scorer.energy_and_score(x)
        out = torch.full((n,), torch.nan), torch.full((n, 30), torch.nan)
        assert scorer.energy_and_score(x, scorer.default_level, out=out) == out
        torch.testing.assert_close(out, (energy, score), rtol=0, atol=0)
        torch.testing.assert_close(scorer.energy(x.double().T.contiguous().T), energy, rtol=0, atol=0)
    assert scorer.energy(x[:0]).shape == (0,)
    assert scorer.energies(x[:0]).shape == (0, 10)
    read_only = events(3, 30)
    read_only.flags.writeable = False
    assert np.isfinite(scorer.energy(read_only)).all()


def test_bad_events_and_results(engine):
    scorer = load_scorer(engine[0])
    x = torch.from_numpy(events(300, 30))
    for wrong, message in (
        (x[0], r"given \(30,\)"), (x[:, 1:], r"expected events of shape \(n, 30\), given \(300, 29\)"),
        (x > 0, "torch.bool, expected real numbers"), (x + 0j, "complex64, expected real numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer.energy(wrong)
    with pytest.raises(ValueError, match="exported at noise level 5, given 2"):
        scorer.energy(x, 2)
    for out in (torch.empty(299), torch.empty(300, dtype=torch.float64), torch.empty(600)[::2], np.empty(300)):
        with pytest.raises(ValueError, match=r"out must be a contiguous torch.float32\[300\] on cpu"):
            scorer.energy(x, out=out)
    x[7, 2] = torch.nan
    for bad in (x, x.numpy(), x[5:9], x[5:9].numpy()):
        with pytest.raises(ValueError, match=r"event [27]: feature 2 \(x2\) is nan"):
            scorer.energy_and_score(bad)
        with pytest.raises(ValueError, match="feature 2"):
            scorer.flag(bad)
    careless = load_scorer(engine[0], on_nonfinite="propagate")
    assert torch.nonzero(~torch.isfinite(careless.energy(x))).tolist() == [[7]]


def test_an_output_that_was_not_exported(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, fake_tensorrt())
    out = build(bundle(), ["tensorrt"], tmp_path / "out", outputs=["energy"], batch_max=16)
    scorer, x = load_scorer(out / "model-sm90-fp32.engine"), torch.from_numpy(events(3, 30))
    np.testing.assert_array_equal(scorer.flag(x), scorer.energy(x) > scorer.threshold)
    for call in (scorer.energy_and_score, scorer.energies):
        with pytest.raises(ValueError, match="only energy: export it again with --outputs energy,"):
            call(x)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_reduced_precision_through_the_scorer(monkeypatch, tmp_path, precision):
    install(monkeypatch, tmp_path, fake_tensorrt("11.0.0.114"))
    out = build(bundle(), ["tensorrt"], tmp_path / "out", outputs=ALL, batch_max=16,
                extra={"tensorrt": {"precision": precision}})
    scorer = load_scorer(out / f"model-sm90-{precision}.engine", precision=precision)
    assert scorer.precision == precision
    x = events(2000, 30)
    true_energy = load_scorer(bundle(), "reference").energy(x)
    assert relative_rms_energy(scorer.energy(x), true_energy) < TOLERANCES[precision]


@pytest.mark.parametrize(("version", "capability"), [
    ("10.13.2.6", "sm90"), ("10.13.3.9", "sm80"), ("11.0.0.1", "sm120")])
def test_another_version_or_gpu_refuses(engine, monkeypatch, tmp_path, version, capability):
    install(monkeypatch, tmp_path, fake_tensorrt(version), capability)
    message = f"built by TensorRT 10.13.3.9 for sm90, here are TensorRT {version} and {capability}: .*export the model"
    with pytest.raises(RuntimeError, match=message):
        load_scorer(engine[0])


def test_without_tensorrt_an_engine_says_why(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RuntimeError, match=r"model-sm90-fp32.engine cannot run: TensorRT cannot be imported"):
        load_scorer(engine[0])


def test_a_failure_of_tensorrt_has_its_words(engine, monkeypatch):
    path, fake = engine
    scorer = load_scorer(path)
    monkeypatch.setattr(scorer._engine, "create_execution_context", lambda: None)
    scorer._heard.log(fake.ILogger.Severity.ERROR, "Error Code 2: OutOfMemory")
    with pytest.raises(RuntimeError, match=r"model-sm90-fp32.engine: TensorRT failed: Error Code 2: OutOfMemory"):
        scorer.energy(events(300, 30))


def test_no_memory_for_the_buffers(engine, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(RuntimeError, match="no memory for batches of 600 events: export with a smaller batch_max"):
        load_scorer(engine[0])
