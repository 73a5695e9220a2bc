"""What a launch of the Triton kernel reads and writes: memory, flags, tensors that are on the device already."""

from __future__ import annotations

import math
import mmap
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import kernels
from ebm.bundle import Bundle, Threshold
from kernels import load_scorer
from kernels.tiles import TILES, Tile, choose

torch = pytest.importorskip("torch")
triton_gpu = pytest.importorskip("kernels.triton_gpu")
launch = pytest.importorskip("kernels.launch")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@interpreted
@pytest.mark.parametrize(("precision", "n"), [*(("fp32", n) for n in (1, 31, 32, 33)), ("tf32", 17), ("tf32x3", 65),
                                              ("bf16", 1), ("fp16", 63), ("fp16", 129)])
def test_ragged_tile_touches_no_memory_beyond_its_own(precision, n):
    d, before, after = 5, 3, 140
    scorer = triton_gpu.TritonScorer(Bundle.random(d, 64, 1, seed=1), precision=precision)

    def guarded(*shape):
        whole = torch.full((before + n + after, *shape), torch.nan)
        return whole, whole[before:before + n]

    (_, x), (e_whole, energy), (s_whole, score) = guarded(d), guarded(), guarded(d)
    k = torch.full((before + n + after,), 2**31 - 1, dtype=torch.int32)  # a level far outside the weights
    k = k[before:before + n].random_(0, 10)
    scorer._launch(x.copy_(torch.randn(n, d)), k, energy, score)
    assert torch.isfinite(energy).all()
    assert torch.isfinite(score).all()
    for whole in (e_whole, s_whole):
        assert torch.isnan(whole[:before]).all()
        assert torch.isnan(whole[before + n:]).all()


@interpreted
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_scratch_need_not_be_clean(monkeypatch, precision):
    """A scratch buffer full of NaN leaves no trace: everything is written before it is read."""
    scorer = triton_gpu.TritonScorer(Bundle.random(70, 100, 3, seed=2), precision=precision)
    x = np.random.default_rng(0).normal(size=(40, 70)).astype(np.float32)
    expected = scorer.energy_and_score(x), scorer.energies(x)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    (energy, score), energies = scorer.energy_and_score(x), scorer.energies(x)
    np.testing.assert_array_equal(energy, expected[0][0])
    np.testing.assert_array_equal(score, expected[0][1])
    np.testing.assert_array_equal(energies, expected[1])


@interpreted
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 40])
def test_flags_are_strict_and_those_of_the_float32_energies(n, precision):
    bare = Bundle.random(5, 64, 1, seed=1)
    x = np.random.default_rng(0).normal(size=(n, 5)).astype(np.float32)
    energy = load_scorer(bare, "triton", precision=precision).energy(x)
    for threshold in (energy[n // 2], np.nextafter(energy[n // 2], np.float32(-np.inf)), float(energy[0]) + 1e-12):
        bundle = replace(bare, threshold=Threshold(float(threshold), 0.5, 0.95, 1, 1, 1.0, False, bare.default_level))
        scorer = load_scorer(bundle, "triton", precision=precision, on_nonfinite="propagate")
        expected = energy > scorer.threshold
        assert scorer.flag(x).dtype == bool
        np.testing.assert_array_equal(scorer.flag(x), expected)
        np.testing.assert_array_equal(scorer.flag(torch.from_numpy(x)).numpy(), expected)
        kernel_flag = torch.full((n + 2,), 7, dtype=torch.uint8)
        scorer._launch(torch.from_numpy(x), bundle.default_level, torch.empty(n), None, kernel_flag[1:-1])
        assert kernel_flag.tolist() == [7, *expected, 7]  # in the kernel, and nothing beside it
    damaged = x.copy()
    damaged[0, 0] = np.nan
    assert not scorer.flag(damaged)[0]
    assert scorer.flag(x[:0]).shape == (0,)
    with pytest.raises(ValueError, match="event 0: feature 0"):
        load_scorer(bundle, "triton", precision=precision).flag(damaged)
    with pytest.raises(ValueError, match="this model has no threshold"):
        load_scorer(bare, "triton").flag(x)


@interpreted
@pytest.mark.parametrize(("precision", "per_event"), [("fp32", True), ("bf16", False)])
def test_offsets_beyond_two_to_the_31(precision, per_event, monkeypatch):
    """The last program of a batch whose events, scores and scratch memory reach beyond 2^31 numbers each.

    Memory is reserved, and only what is touched is there; the programs before the last are left out.
    """
    from triton.runtime import interpreter

    d, n = 200, (1 << 31) // 200 + 1000
    scorer = triton_gpu.TritonScorer(Bundle.random(d, 64, 1, seed=1), precision=precision)
    tile = choose(scorer._loaded.cc, n, 1, precision)

    def reserved(*shape, device=None, dtype=torch.float32):
        size = math.prod(shape) * dtype.itemsize
        not_counted = 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | not_counted)
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    last = slice(n // tile.block_m * tile.block_m if n % tile.block_m else n - tile.block_m, n)
    x, energy, score, k = reserved(n, d), reserved(n), reserved(n, d), reserved(n, dtype=torch.int32)
    x[last], k[last] = torch.randn(last.stop - last.start, d), 7
    expected = scorer.energy_and_score(x[last].clone(), 7)
    monkeypatch.setattr(torch, "empty", reserved)
    monkeypatch.setattr(interpreter, "range", lambda *a: range(*a)[-1:] if a[0] > 1e4 else range(*a), raising=False)
    loaded = replace(scorer._loaded, n_sm=1 << 30)  # one program for every tile
    launch.launch(loaded, x, k if per_event else 7, energy, score, tile=tile)
    assert min(x.numel(), score.numel(), n // tile.block_m * tile.block_m * 256 * 4) > 1 << 31
    assert torch.equal(energy[last], expected[0])
    assert torch.equal(score[last], expected[1])
    assert not energy[:last.start][:1000].any()


@interpreted
def test_the_table_says_which_kernel_takes_a_batch(monkeypatch):
    """Another kernel is launched where the table names it, the batch is as large, and it takes the model."""
    calls, rows = [], TILES[120]["bf16"]["throughput"]
    other = SimpleNamespace(pack=lambda weights: ["packed"],
                            why_not=lambda d, h, n, p, cc: None if n < 3 else "too deep",
                            launch=lambda m, tile, x, *rest: calls.append((m.hopper, tile, len(x))))
    monkeypatch.setitem(sys.modules, "kernels.hopper", other)
    monkeypatch.setattr(kernels, "hopper", other, raising=False)
    tile = Tile(128, 256, 64, 4, 2, kernel="hopper")
    monkeypatch.setitem(TILES[120]["bf16"], "throughput", replace(rows, tiles=(*rows.tiles, tile)))
    for layers, precision, n, taken in ((2, "bf16", 200, True), (2, "bf16", 16, False), (3, "bf16", 130, False),
                                        (2, "fp16", 130, False)):
        scorer = triton_gpu.TritonScorer(Bundle.random(4, 64, layers), precision=precision)
        calls.clear()
        scorer._launch(torch.zeros(n, 4), 0, energy := torch.full((n,), torch.nan))
        assert calls == ([(["packed"], tile, n)] if taken else [])
        assert bool(torch.isnan(energy).all()) == taken


@pytest.fixture
def resident(monkeypatch):
    """A scorer that takes every tensor for one on its own device, as it takes CUDA tensors on a GPU."""
    monkeypatch.setattr(triton_gpu, "_on_gpu", lambda x: isinstance(x, torch.Tensor))
    return triton_gpu.TritonScorer(Bundle.random(5, 64, 1, seed=3))


@interpreted
def test_tensors_on_the_device_stay_there(resident):
    x, k = torch.randn(9, 5, requires_grad=True), torch.arange(9)
    energy, score = resident.energy_and_score(x, k)
    plain_energy, plain_score = triton_gpu.Scorer.energy_and_score(resident, x, k)
    assert torch.equal(energy, plain_energy)
    assert torch.equal(score, plain_score)
    assert not energy.requires_grad
    assert torch.equal(resident.energies(x)[k, k], resident.energy(x, k))
    assert torch.equal(resident.energy(x.double().T.contiguous().T, k), energy)
    out = torch.full((9,), torch.nan), torch.full((9, 5), torch.nan)
    given = resident.energy_and_score(x, 4, out=out)
    assert given[0] is out[0]
    assert given[1] is out[1]
    assert torch.equal(out[0], resident.energy(x, torch.tensor(4)))
    resident.threshold = float(energy.median())
    resident._loaded = replace(resident._loaded, threshold=resident.threshold)
    assert torch.equal(resident.flag(x), resident.energy(x) > resident.threshold)
    empty = resident.energy_and_score(x[:0])
    assert [tuple(r.shape) for r in empty] == [(0,), (0, 5)]


@interpreted
@pytest.mark.parametrize(("given", "words"), [
    (lambda s, x: s.energy(x[:, :3]), r"shape \(n, 5\), given \(9, 3\)"),
    (lambda s, x: s.energy(x[0]), r"shape \(n, 5\), given \(5,\)"),
    (lambda s, x: s.energy(torch.tensor(1.0)), r"shape \(n, 5\), given \(\)"),
    (lambda s, x: s.energy(x > 0), "expected real numbers"),
    (lambda s, x: s.energy(x, torch.full((9,), 10)), "k = 10 is out of range, expected 0 to 9"),
    (lambda s, x: s.energy(x, torch.full((8,), 1)), "noise levels k have shape"),
    (lambda s, x: s.energy(x, torch.full((9,), 1.0)), "noise level k is float32"),
    (lambda s, x: s.energy(x, out=torch.empty(8)), r"out must be a contiguous torch.float32\[9\]"),
    (lambda s, x: s.energy(x.to("meta")), "events are on meta, this scorer is on cpu"),
    (lambda s, x: s.energy(x.index_fill(1, torch.tensor(2), torch.inf)), r"event 0 \(and 8 more\): feature 2 \(x2\)"),
])
def test_tensors_on_the_device_are_checked(resident, given, words):
    with pytest.raises(ValueError, match=words):
        given(resident, torch.randn(9, 5))
