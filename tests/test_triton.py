"""The Triton kernel without a GPU: compiled ahead of time for each chip, and run by Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from ebm.bundle import Bundle
from ebm.preprocess import Preprocessing
from kernels.tiles import TILES, choose, tiles_for

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_gpu = pytest.importorskip("kernels.triton_gpu")
prepare = pytest.importorskip("kernels.triton_kernel")._prepare
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

# Shared memory a block can have, in bytes.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTERS_PER_SM = 65536

# Compiles in a process of its own: under TRITON_INTERPRET=1 there is nothing to compile.
COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from kernels.tiles import Tile
from kernels.triton_gpu import compile_for

tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for line in sys.stdin:
    case = json.loads(line)
    kernel = compile_for(case.pop("cc"), tile=Tile(**case.pop("tile")), **case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        out = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    ptx = kernel.asm["ptx"]
    print(json.dumps({
        "usage": {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\\d+)", out)},
        "shared": kernel.metadata.shared, "fma": ptx.count("fma.rn.f32"), "mma": ptx.count("mma"),
        "target": re.search(r"^\\.target (\\w+)", ptx, re.M)[1],
    }), flush=True)
"""


def compile_all(cases: list[dict]) -> list[dict]:
    """What the compiler made of each case."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    lines = "".join(json.dumps(case | {"tile": vars(case["tile"])}) + "\n" for case in cases)
    done = subprocess.run([sys.executable, "-c", COMPILE], input=lines, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_compiled(cases: list[dict]) -> None:
    results = compile_all(cases)
    assert len(results) == len(cases)
    for case, made in zip(cases, results):
        tile, cc = case["tile"], case["cc"]
        said = f"{case}: {made}"
        assert made["target"].startswith(f"sm_{cc}"), said
        assert made["usage"]["STACK"] == made["usage"]["LOCAL"] == 0, f"registers spill, {said}"
        assert made["usage"]["REG"] <= tile.max_registers, said
        assert made["shared"] <= SHARED[cc], said
        assert made["shared"] * tile.programs_per_sm <= SHARED[cc], f"fewer programs share an SM, {said}"
        # IEEE float32 products are fused multiply-adds; a matrix instruction would be TF32.
        assert made["fma"] > tile.block_m * tile.block_n * tile.block_k // (32 * tile.num_warps), said
        assert made["mma"] == 0, said


@pytest.mark.parametrize("cc", [80, 90, 100])
def test_compiles_without_spills(cc):
    check_compiled([{"cc": cc, "tile": tiles_for(cc)[-1], "with_score": with_score}
                    for with_score in (True, False)])


def test_per_event_levels_and_small_batches_compile_without_spills():
    check_compiled([{"cc": 90, "tile": tile, "with_score": True, "per_event": True} for tile in tiles_for(90)])


@pytest.mark.full
@pytest.mark.parametrize("cc", TILES)
def test_every_tile_and_shape_compiles_without_spills(cc):
    shapes = [(64, 256, 2), (30, 64, 1), (1, 128, 3), (200, 512, 8), (256, 256, 8)]
    check_compiled([{"cc": cc, "tile": tile, "features": d, "hidden": h, "layers": n, "with_score": with_score,
                     "per_event": per_event}
                    for tile in tiles_for(cc) for d, h, n in shapes
                    for with_score in (True, False) for per_event in (True, False)])


@pytest.mark.parametrize("cc", TILES)
def test_tile_table(cc):
    tiles = tiles_for(cc)
    assert [t.block_m for t in tiles] == sorted({t.block_m for t in tiles})
    for t in tiles:
        assert 64 % t.block_n == 0 == 64 % t.block_k
        assert t.programs_per_sm * t.num_warps * 32 * t.max_registers <= REGISTERS_PER_SM
    assert choose(cc, 1, 132) is tiles[0]
    assert choose(cc, 10**6, 132) is tiles[-1]


def test_chips_in_between_take_the_entry_below():
    assert tiles_for(87) is TILES[86]
    assert tiles_for(103) is TILES[100]
    assert tiles_for(121) is TILES[120]


def no_driver(name):
    raise OSError(f"{name}: cannot open shared object file")


def test_why_not_without_a_driver(monkeypatch):
    monkeypatch.setattr(triton_gpu.ctypes, "CDLL", no_driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("torch was asked before the driver"))
    assert "no NVIDIA driver" in triton_gpu.why_not()


@pytest.mark.parametrize(("available", "capability", "words"), [
    (False, None, ["PyTorch sees no CUDA GPU"]),
    (True, (7, 5), ["Tesla T4", "sm_75", "no tensor-core code", "TensorRT", "TorchScript"]),
    (True, (6, 1), ["sm_61"]),
    (True, (8, 0), None),
    (True, (9, 0), None),
    (True, (12, 0), None),
])
def test_why_not_of_a_gpu(monkeypatch, available, capability, words):
    monkeypatch.setattr(triton_gpu.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    said = triton_gpu.why_not()
    assert said is None if words is None else all(word in said for word in words)


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'bf16', expected 'fp32'"):
        triton_gpu.TritonScorer(Bundle.random(4, 64, 1), precision="bf16")


@interpreted
@pytest.mark.parametrize("n", [1, 31, 32, 33])
def test_ragged_tile_touches_no_memory_beyond_its_own(n):
    d, before, after = 5, 3, 70
    scorer = triton_gpu.TritonScorer(Bundle.random(d, 64, 1, seed=1))

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
def test_scratch_need_not_be_clean(monkeypatch):
    """A scratch buffer full of NaN leaves no trace: everything is written before it is read."""
    scorer = triton_gpu.TritonScorer(Bundle.random(70, 100, 3, seed=2))
    x = np.random.default_rng(0).normal(size=(40, 70)).astype(np.float32)
    expected = scorer.energy_and_score(x), scorer.energies(x)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    (energy, score), energies = scorer.energy_and_score(x), scorer.energies(x)
    np.testing.assert_array_equal(energy, expected[0][0])
    np.testing.assert_array_equal(score, expected[0][1])
    np.testing.assert_array_equal(energies, expected[1])


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
    pre = triton_gpu._weights(Bundle.random(4, 64, 1, preprocessing=p), True, "cpu")[-1]
    u, slope = torch.full((2, 64, 4), torch.nan)
    transform[(1,)](torch.from_numpy(x), pre, u, slope, 64)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(u.numpy(), p(exact), rtol=5e-7)
    np.testing.assert_allclose(slope.numpy(), p.derivative(exact), rtol=5e-7)


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
    (lambda s, x: s.energy(x.index_fill(1, torch.tensor(2), torch.inf)), r"event 0 \(and 8 more\): feature 2 \(x2\)"),
])
def test_tensors_on_the_device_are_checked(resident, given, words):
    with pytest.raises(ValueError, match=words):
        given(resident, torch.randn(9, 5))


@pytest.mark.skipif(not isinstance(triton_gpu.fused, triton.JITFunction) or triton_gpu.why_not() is not None,
                    reason="needs a GPU, and TRITON_INTERPRET=0")
@pytest.mark.parametrize("n", [1, 257, 100_003])
def test_agrees_with_float64_on_a_gpu(n):
    from kernels.reference import ReferenceScorer

    bundle = Bundle.random(64, 256, 2, seed=4)
    scorer, x = triton_gpu.TritonScorer(bundle), torch.randn(n, 64)
    k = torch.randint(0, 10, (n,))
    energy, score = scorer.energy_and_score(x.cuda(), k.cuda())
    true_energy, true_score = ReferenceScorer(bundle).energy_and_score(x, k)
    spread = ReferenceScorer(bundle).energy(torch.randn(4096, 64)).std()
    assert (energy.cpu() - true_energy).square().mean().sqrt() < 5e-6 * spread
    assert (score.cpu() - true_score).square().mean().sqrt() < 5e-6 * true_score.square().mean().sqrt()
