"""The reduced precisions of the C++ backend: int16 for energy and score, int8 for the energy."""

from __future__ import annotations

import numpy as np
import pytest
from scorers import INSTRUCTION_SETS, MARKER, events, model, spreads

from kernels import load_scorer
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score, tolerance_of_model

native_cpu = pytest.importorskip("kernels.native_cpu", reason="the C++ library was not built")
SETS = [isa for isa in ("amx", "vnni") if isa in INSTRUCTION_SETS]
ARCHITECTURES = [(1, 64, 1), (30, 64, 2), (57, 100, 3), (64, 256, 2), (200, 512, 1), (256, 64, 8)]
BATCHES = (1, 2, 5, 6, 16, 17, 40, 257)

pytestmark = pytest.mark.skipif(not SETS, reason="this processor has neither AMX nor AVX-512 VNNI")


def scorer_of(isa, precision, architecture, monkeypatch, **options):
    monkeypatch.setenv("FUSED_EBM_ISA", isa)
    return native_cpu.NativeScorer(model(*architecture), precision=precision, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("precision", ["int16", "int8"])
@pytest.mark.parametrize("isa", SETS)
def test_agrees_with_float64(isa, precision, architecture, monkeypatch):
    reference = load_scorer(model(*architecture), "reference")
    scorer = scorer_of(isa, precision, architecture, monkeypatch)
    energy_spread, score_spread = spreads(*architecture)
    rng = np.random.default_rng(0)
    for n in BATCHES:
        x, k = events(n, architecture[0], seed=n), rng.integers(0, 10, n)
        true_energy, true_score = reference.energy_and_score(x, k)
        energy = scorer.energy(x, k, out=np.full(n, np.nan, np.float32))
        assert relative_rms_energy(energy, true_energy, energy_spread) < TOLERANCES[precision], n
        energies = scorer.energies(x, out=np.full((n, 10), np.nan, np.float32))
        assert relative_rms_energy(energies, reference.energies(x), energy_spread) < TOLERANCES[precision], n
        if precision == "int16":
            again, score = scorer.energy_and_score(x, k, out=(None, np.full(x.shape, np.nan, np.float32)))
            np.testing.assert_array_equal(again, energy)
            assert relative_rms_score(score, true_score, score_spread) < TOLERANCES[precision], n


@pytest.mark.parametrize("precision", ["int16", "int8"])
@pytest.mark.parametrize("isa", SETS)
def test_bits_depend_neither_on_the_batch_nor_on_threads(isa, precision, monkeypatch):
    x = events(83, 64)
    one = scorer_of(isa, precision, (64, 128, 2), monkeypatch, threads=1)
    four = scorer_of(isa, precision, (64, 128, 2), monkeypatch, threads=4)
    energy = one.energy(x)
    np.testing.assert_array_equal(four.energy(x), energy)
    for n in (1, 2, 5, 6, 15, 16, 17, 33):
        np.testing.assert_array_equal(one.energy(x[-n:]), energy[-n:])


@pytest.mark.skipif(SETS != ["amx", "vnni"], reason="this processor has no AMX")
@pytest.mark.parametrize("precision", ["int16", "int8"])
def test_tiles_and_vectors_give_the_same_bits(precision, monkeypatch):
    x = events(83, 64)
    energies = [scorer_of(isa, precision, (64, 128, 2), monkeypatch).energies(x) for isa in SETS]
    np.testing.assert_array_equal(*energies)


@pytest.mark.parametrize("precision", ["fp32", "int16", "int8"])
def test_an_unusual_event_neither_saturates_nor_reaches_its_neighbours(precision, monkeypatch):
    """Scales are each event's own: a feature of 1e6 leaves the others of its batch as they are."""
    x = events(20, 64)
    x[np.isnan(x) | (x == MARKER)] = 0.5
    scorer = scorer_of(SETS[0], precision, (64, 128, 2), monkeypatch, on_nonfinite="propagate")
    reference = load_scorer(model(64, 128, 2), "reference")
    usual = scorer.energy(x)
    for value in (1e3, 1e6, np.inf, np.nan):
        y = x.copy()
        y[7, 0] = value
        energy = scorer.energy(y)
        np.testing.assert_array_equal(np.delete(energy, 7), np.delete(usual, 7))
        if np.isfinite(value):
            np.testing.assert_allclose(energy[7], reference.energy(y)[7], rtol=2 * TOLERANCES[precision])
        else:
            assert np.isnan(energy[7])


def test_what_cannot_be_had_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="precision int8 gives energies only"):
        scorer_of(SETS[0], "int8", (30, 64, 2), monkeypatch).energy_and_score(events(3, 30))
    with pytest.raises(ValueError, match="precision is 'fp16', expected 'fp32', 'int16', 'int8'"):
        scorer_of(SETS[0], "fp16", (30, 64, 2), monkeypatch)
    with pytest.raises(RuntimeError, match="precision int16 needs AVX-512 VNNI or AMX, here the avx2 kernels run"):
        scorer_of("avx2", "int16", (30, 64, 2), monkeypatch)


def test_a_models_tolerance_is_what_its_report_allows():
    def report(rms_energy, rms_score):
        return {"int16": {"figures": {"int16": {"rms_energy": rms_energy}}, "rms_score": rms_score}}

    assert tolerance_of_model("int16", {}) == tolerance_of_model("int16", report(1e-4, None)) == TOLERANCES["int16"]
    assert tolerance_of_model("int16", report(1e-4, 2.5e-4)) == 5e-4
    assert tolerance_of_model("int16", report(2e-4, 1e-4)) == 4e-4
    assert tolerance_of_model("int16", report(1.0, 1.0)) == 2 * TOLERANCES["int16"]
    assert tolerance_of_model("fp32", report(5e-4, 4e-4)) == TOLERANCES["fp32"]
