"""The kernel for Hopper without a GPU: run in NumPy, warps and copies interleaved, and compiled ahead of time."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from scorers import amplification, events, model, preprocessing, spreads

from ebm.bundle import Bundle
from ebm.events import load_events
from ebm.preprocess import Preprocessing
from kernels import load_scorer
from kernels.resources import SHARED, count_all
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score

hopper = pytest.importorskip("kernels.hopper", reason="triton with Gluon is not installed")
gluon_emulator = pytest.importorskip("gluon_emulator")
launch = pytest.importorskip("kernels.launch")
torch = pytest.importorskip("torch")
kernel = hopper.hopper
PRECISIONS = ("bf16", "fp16")
SMALL = (30, 200, 1)
# Bytes of a thread, of the reference model and of the widest: mostly addresses, which are put away before the loop over
# events begins; in the loop 1% of the instructions fetch them.
SPILLS, MOST_SPILLS = 320, 720


class Emulated:
    """The kernel as `hopper.launch` calls it; what it writes is in the tensors that it was given."""

    def __init__(self, seed):
        self.seed = seed

    def __getitem__(self, grid):
        def launched(*arguments, num_warps, HALF, **fixed):
            given = {name: self.plain(a) for name, a in zip(kernel.arg_names, arguments)}
            half = gluon_emulator.BFLOAT16 if "bf" in str(HALF) else np.float16
            gluon_emulator.Machine(self.seed).run(kernel, *grid, **given, **fixed, HALF=half)

        return launched

    @staticmethod
    def plain(a):
        if isinstance(a, torch.Tensor):
            return a.view(-1).numpy()
        if hasattr(a, "block_shape"):
            return gluon_emulator.Descriptor(a.base.float().numpy(), a.block_shape)
        return a


def run(bundle, x, k=None, *, precision="bf16", with_score=True, levels=None, level=5, threshold=None, programs=2,
        seed=0):
    """Energy, score and flag by `hopper.launch`; outputs start as NaN."""
    weights = launch.load(bundle, True, "cpu", precision)
    loaded = launch.Loaded(weights, precision, float(bundle.tensors["b_out"][0]), threshold or 0.0, 90, programs,
                           hopper.pack(weights))
    n, d = x.shape
    energy = torch.full((n, levels) if levels else (n,), torch.nan)
    score = torch.full((n, d), torch.nan) if with_score else None
    flag = torch.full((n,), 7, dtype=torch.uint8) if threshold is not None else None
    with mock.patch.object(hopper, "hopper", Emulated(seed)):
        hopper.launch(loaded, hopper.TILE, torch.from_numpy(x), level if k is None else torch.from_numpy(k).int(),
                      energy, score, flag)
    return tuple(t if t is None else t.numpy() for t in (energy, score, flag))


def check(precision, architecture, n):
    bundle = model(*architecture)
    x, k = events(n, architecture[0], seed=n), np.random.default_rng(0).integers(0, 10, n)
    true_energy, true_score = load_scorer(bundle, "reference").energy_and_score(x, k)
    energy, score, _ = run(bundle, x, k, precision=precision, seed=n)
    energy_spread, score_spread = spreads(*architecture)
    assert relative_rms_energy(energy, true_energy, energy_spread) < TOLERANCES[precision]
    assert relative_rms_score(score, true_score, score_spread) < TOLERANCES[precision]
    np.testing.assert_array_equal(run(bundle, x, k, precision=precision, with_score=False)[0], energy)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("architecture", "n"), [((64, 256, 2), 257), (SMALL, 64), ((200, 130, 2), 1)], ids=str)
def test_agrees_with_float64(precision, architecture, n):
    """Also where nothing is a multiple of anything, with one program for several turns and more programs than work."""
    check(precision, architecture, n)


@pytest.mark.full
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("features", [5, 57, 64, 65, 128, 193, 256])
def test_agrees_with_float64_everywhere(precision, layers, features):
    check(precision, (features, 256, layers), 700)


def test_any_order_of_warps_and_copies_gives_the_same_bits():
    x = events(300, SMALL[0])
    first = run(model(*SMALL), x, seed=0)
    for seed in range(1, 8):
        for a, b in zip(first[:2], run(model(*SMALL), x, seed=seed, programs=seed)[:2]):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("broken", "says"), [
    ("fence", "no fence has published"),
    ("wait", "more arrivals|nan"),
    ("arrive", "deadlock"),
])
def test_the_emulator_notices_what_a_gpu_would_not_forgive(monkeypatch, broken, says):
    """A kernel without its fences, waits or arrivals fails."""
    owner = gluon_emulator.Barrier if broken == "arrive" else gluon_emulator.Machine
    monkeypatch.setattr(owner, broken, lambda self, *arguments: None)
    with pytest.raises((AssertionError, RuntimeError), match=says):
        check("bf16", SMALL, 200)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_events_nan_reaches_no_other(precision):
    x = events(70, SMALL[0])
    clean = run(model(*SMALL), x, precision=precision)
    for value in (np.nan, np.inf, -np.inf):
        damaged = x.copy()
        damaged[4, 2], damaged[66, 4] = value, value  # feature 4 is constant: no influence, but no excuse either
        energy, score, _ = run(model(*SMALL), damaged, precision=precision)
        bad = np.isin(np.arange(len(x)), (4, 66))
        assert not np.isfinite(energy[bad]).any()
        assert not np.isfinite(score[bad]).any(1).all()
        np.testing.assert_array_equal(energy[~bad], clean[0][~bad])
        np.testing.assert_array_equal(score[~bad], clean[1][~bad])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_flags_levels_and_all_energies(precision):
    bundle, x = model(*SMALL), events(130, SMALL[0])
    energies, _, _ = run(bundle, x, precision=precision, with_score=False, levels=10, level=0)
    threshold = np.float32(np.median(energies[:, 3]))
    energy, _, flag = run(bundle, x, precision=precision, level=3, threshold=threshold)
    np.testing.assert_array_equal(energy, energies[:, 3])
    np.testing.assert_array_equal(flag, energy > threshold)
    assert relative_rms_energy(energies, load_scorer(bundle, "reference").energies(x)) < TOLERANCES[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_trained_weights_on_toy_events(precision):
    demo = Bundle.load(Path(__file__).parents[1] / "models" / "demo")
    x = load_events("toy:300").x
    true_energy, true_score = load_scorer(demo, "reference").energy_and_score(x)
    energy, score, _ = run(demo, x, precision=precision, level=demo.default_level)
    assert relative_rms_energy(energy, true_energy) < TOLERANCES[precision]
    assert relative_rms_score(score, true_score) < TOLERANCES[precision] * amplification(demo, x)


def coefficients(p):
    weights = launch.load(Bundle.random(p.n_features, 256, 1, preprocessing=p), True, "cpu", "bf16")
    return gluon_emulator.Pointer(hopper.pack(weights)[-1].numpy().ravel())


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1, 1e4, 1e12, 1e30, 1e34])
def test_preprocessing_keeps_the_digits_of_half_precision(size):
    """u and du/dx of every transform, far from 0 and near to it, from the functions that the kernel calls."""
    d = 64
    p = Preprocessing(marker=np.full(d, np.nan), impute=np.full(d, np.nan), transform=np.arange(d) % 3,
                      scale=np.geomspace(1e-3, 1e3, d), mean=np.zeros(d), inv_std=np.ones(d))
    x = np.clip(np.random.default_rng(0).normal(size=(32, d)) * size, -3e38, 3e38).astype(np.float32)
    names = gluon_emulator.Machine().names(kernel)
    table = coefficients(p)
    x = x.view(gluon_emulator.Tensor)
    np.testing.assert_allclose(names["_preprocess"](x, table, np.arange(d), d), p(x.astype(float)), rtol=2e-4)
    np.testing.assert_allclose(names["_slope"](x, table, np.arange(d), d), p.derivative(x.astype(float)), rtol=1e-5)


def test_missing_values_are_imputed_and_have_no_slope():
    p = preprocessing(30)
    x = events(200, 30).view(gluon_emulator.Tensor)
    names = gluon_emulator.Machine().names(kernel)
    table = coefficients(p)
    true, slope = p(np.asarray(x, float)), p.derivative(np.asarray(x, float))
    np.testing.assert_allclose(names["_preprocess"](x, table, np.arange(30), 64), true, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(names["_slope"](x, table, np.arange(30), 64), slope, rtol=1e-5)


def test_silu_slopes_survive_their_packing():
    names = gluon_emulator.Machine().names(kernel)
    z = np.linspace(-30, 30, 999, dtype=np.float32).view(gluon_emulator.Tensor)
    slope = names["_silu"](z / 2)[1]
    words = np.full(len(z), -1, np.int32).view(gluon_emulator.Tensor)
    for place in range(4):
        words = names["_encode"](words, slope * (1 - place / 4), place)
    for place in range(4):
        assert np.abs(names["_decode"](words, place) - slope * (1 - place / 4)).max() < 1.001 * 0.5 / 210


@pytest.mark.parametrize(("features", "hidden", "layers", "precision", "words"), [
    (64, 256, 2, "fp32", "it computes bf16 and fp16, not fp32"), (64, 512, 2, "bf16", "given 512, 2 and 64"),
    (64, 128, 2, "bf16", "129 to 256 hidden units"), (64, 256, 3, "bf16", "at most 2 layers"),
    (257, 256, 1, "fp16", "256 features"), (64, 256, 2, "bf16", None), (1, 129, 1, "fp16", None)])
def test_what_it_computes(features, hidden, layers, precision, words):
    said = hopper.why_not(features, hidden, layers, precision)
    assert said is None if words is None else words in said


def test_a_scorer_refuses_it_where_it_cannot_run():
    from kernels.triton_gpu import TritonScorer

    with pytest.raises(ValueError, match="kernel is 'metal', expected 'triton' or 'hopper'"):
        TritonScorer(model(*SMALL), kernel="metal")
    if os.environ.get("TRITON_INTERPRET") == "1":
        with pytest.raises(ValueError, match="kernel 'hopper' cannot run: it needs sm_90, this is sm_120"):
            TritonScorer(model(*SMALL), precision="bf16", kernel="hopper")


def compiled(cases, most_spills):
    tile = vars(hopper.TILE)
    for case, made in zip(cases, count_all([{"cc": 90, "tile": tile} | case for case in cases])):
        said = f"{case}: {made}"
        assert made["target"] == "sm_90a", said
        assert made["matrix"] == ["wgmma"], said
        assert made["shared"] <= SHARED[90], said
        assert made["spills"] <= most_spills, said


def test_compiles_within_its_budget():
    compiled([{"precision": p} for p in PRECISIONS], SPILLS)


@pytest.mark.full
def test_every_variant_compiles_within_its_budget():
    compiled([{"precision": p, "with_score": with_score, "per_event": with_score, "flagged": not with_score,
               "features": features, "layers": layers} for p in PRECISIONS for with_score in (True, False)
              for features in (64, 256) for layers in (1, 2)], MOST_SPILLS)
