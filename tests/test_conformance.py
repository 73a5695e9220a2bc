"""Every Scorer against float64, and the promises that all of them make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scorers import MARKER, events, every_scorer, make, model, spreads

from ebm.bundle import Bundle
from ebm.events import load_events
from ebm.preprocess import Preprocessing
from kernels import load_scorer
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score

TOLERANCE = TOLERANCES["fp32"]
SMALL = (30, 64, 2)

# Pairwise over D, H and depth; the interpreter does the small ones.
ARCHITECTURES = [(1, 64, 1), SMALL, (57, 128, 3), (64, 256, 2), (200, 512, 1), (256, 64, 8), (30, 256, 8)]
MORE = [(d, h, n) for d in (1, 30, 57, 64, 200, 256) for h in (64, 128, 256, 512) for n in (1, 2, 3, 8)]
BATCHES = (1, 2, 3, 7, 64, 257)


def poisoned(shape, dtype=np.float32):
    return np.full(shape, np.nan, dtype)


def check_agreement(name, architecture, batches):
    scorer, reference = make(name, model(*architecture)), load_scorer(model(*architecture), "reference")
    energy_spread, score_spread = spreads(*architecture)
    rng = np.random.default_rng(0)
    for n in batches:
        x, k = events(n, architecture[0], seed=n), rng.integers(0, 10, n)
        true_energy, true_score = reference.energy_and_score(x, k)
        energy, score = scorer.energy_and_score(x, k, out=(poisoned(n), poisoned(x.shape)))
        where = f"{name} {architecture} n={n}"
        assert relative_rms_energy(energy, true_energy, energy_spread) < TOLERANCE, where
        assert relative_rms_score(score, true_score, score_spread) < TOLERANCE, where
        alone = scorer.energy(x, k, out=poisoned(n))
        assert relative_rms_energy(alone, true_energy, energy_spread) < TOLERANCE, where
        if name.startswith("native"):
            np.testing.assert_array_equal(alone, energy, err_msg=where)


@every_scorer
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_agrees_with_float64(name, architecture):
    if name == "triton" and architecture not in ARCHITECTURES[:2]:
        pytest.skip("in the interpreter only small models; `make test-full` does the others")
    check_agreement(name, architecture, (1, 7, 65) if name == "triton" else BATCHES)


@pytest.mark.full
@every_scorer
@pytest.mark.parametrize("architecture", MORE, ids=str)
def test_agrees_with_float64_everywhere(name, architecture):
    check_agreement(name, architecture, (3,) if name == "triton" else (1, 7, 257, 4099))


@every_scorer
@pytest.mark.parametrize("architecture", [(1, 512, 1), (64, 256, 2)], ids=str)
def test_large_batch(name, architecture):
    """Within the tolerance, and at most twice as far from float64 as PyTorch in float32; flags are the same."""
    if name == "triton":
        pytest.skip("in the interpreter only small batches")
    bundle = model(*architecture)
    x = events(4099, architecture[0])
    true_energy, true_score = load_scorer(bundle, "reference").energy_and_score(x)
    energy, score = make(name, bundle).energy_and_score(x)
    torch_energy, torch_score = load_scorer(bundle, "reference", precision="fp32").energy_and_score(x)
    for error, of_torch in (
        (relative_rms_energy(energy, true_energy), relative_rms_energy(torch_energy, true_energy)),
        (relative_rms_score(score, true_score), relative_rms_score(torch_score, true_score)),
    ):
        assert error < TOLERANCE
        assert error <= 2 * of_torch
    threshold = np.quantile(true_energy, 0.99)
    unclear = np.abs(true_energy - threshold) < 1e-5 * true_energy.std()
    assert ((energy > threshold) == (true_energy > threshold))[~unclear].all()


@every_scorer
def test_all_noise_levels(name):
    scorer, reference = make(name, model(*SMALL)), load_scorer(model(*SMALL), "reference")
    x = events(37 if name != "triton" else 5, SMALL[0])
    energies = scorer.energies(x, out=poisoned((len(x), 10)))
    assert relative_rms_energy(energies, reference.energies(x), spreads(*SMALL)[0]) < TOLERANCE
    for k in (0, 9):
        assert relative_rms_energy(scorer.energy(x, k), energies[:, k].astype(float), spreads(*SMALL)[0]) < TOLERANCE


@every_scorer
def test_trained_weights_on_toy_events(name):
    """The committed demo model: values of a trained network, momenta of real size, absent objects."""
    demo = Bundle.load(Path(__file__).parents[1] / "models" / "demo")
    x = load_events("toy:300").x[: 5 if name == "triton" else None]
    scorer, reference = make(name, demo), load_scorer(demo, "reference")
    (energy, score), (true_energy, true_score) = scorer.energy_and_score(x), reference.energy_and_score(x)
    assert relative_rms_energy(energy, true_energy) < TOLERANCE
    assert relative_rms_score(score, true_score) < TOLERANCE
    np.testing.assert_array_equal(scorer.flag(x), true_energy > demo.threshold.energy)


@every_scorer
def test_default_level_is_the_models(name):
    scorer = make(name, model(*SMALL))
    x = events(5, SMALL[0])
    np.testing.assert_array_equal(scorer.energy(x), scorer.energy(x, np.full(5, 5)))
    assert not np.array_equal(scorer.energy(x), scorer.energy(x, 4))


@every_scorer
@pytest.mark.parametrize("n", [3, 40])
def test_score_is_the_gradient_of_its_own_energy(name, n):
    """Finite differences of each Scorer's energy along random directions in the features that have a value."""
    if name == "triton" and n > 3:
        pytest.skip("in the interpreter only small batches")
    scorer = make(name, model(*SMALL))
    x = events(n, SMALL[0], seed=3)
    x[np.isnan(x) | (x == MARKER)] = 0.7
    direction = np.random.default_rng(1).normal(size=x.shape).astype(np.float32) * np.maximum(np.abs(x), 0.1)
    _, score = scorer.energy_and_score(x)
    h = np.float32(2**-6)
    slope = (scorer.energy(x + h * direction).astype(float) - scorer.energy(x - h * direction)) / (2 * h)
    assert relative_rms_score(-(score * direction).sum(1), slope) < 5e-3


@every_scorer
def test_imputed_and_constant_features_have_no_score(name):
    x = events(5, SMALL[0])
    x[2, 1], x[3, 1] = np.nan, MARKER
    scorer = make(name, model(*SMALL))
    for values in (scorer.energy_and_score(x)[1], scorer.attribution(x)):
        assert (values[2:4, 1] == 0).all()
        assert (values[:, 4] == 0).all()
    energy = scorer.energy(x[[2, 3]])
    x[2:4, 1] = scorer.bundle.preprocessing.impute[1]
    np.testing.assert_allclose(energy, scorer.energy(x[[2, 3]]), rtol=1e-5)


@every_scorer
def test_attribution_is_the_derivative_by_preprocessed_features(name):
    bundle = model(*SMALL)
    x = events(6, SMALL[0])
    preprocess = bundle.preprocessing
    _, score_u = load_scorer(bundle, "reference", preprocess=False).energy_and_score(preprocess(x.astype(float)))
    expected = np.where(preprocess.derivative(x.astype(float)) == 0, 0, -score_u)
    assert relative_rms_score(make(name, bundle).attribution(x), expected) < TOLERANCE


@every_scorer
def test_without_preprocessing(name):
    bundle = model(*SMALL)
    u = np.random.default_rng(2).normal(size=(5, SMALL[0])).astype(np.float32)
    energy, score = make(name, bundle, preprocess=False).energy_and_score(u)
    true_energy, true_score = load_scorer(bundle, "reference", preprocess=False).energy_and_score(u)
    assert relative_rms_energy(energy, true_energy, spreads(*SMALL)[0]) < TOLERANCE
    assert relative_rms_score(score, true_score) < TOLERANCE


@every_scorer
def test_mean_far_from_zero(name):
    """mean / std = 1e4: the mean is subtracted, not folded into a bias, so only the input's rounding remains."""
    d = SMALL[0]
    far = Preprocessing(marker=np.full(d, np.nan), impute=np.full(d, np.nan), transform=np.zeros(d),
                        scale=np.ones(d), mean=np.full(d, 1e4), inv_std=np.ones(d))
    bundle = Bundle.random(*SMALL, preprocessing=far)
    x = (1e4 + np.random.default_rng(0).normal(size=(7, d))).astype(np.float32)
    energy, score = make(name, bundle).energy_and_score(x)
    true_energy, true_score = load_scorer(bundle, "reference").energy_and_score(x)
    assert relative_rms_energy(energy, true_energy) < TOLERANCE
    assert relative_rms_score(score, true_score) < TOLERANCE


@every_scorer
def test_extreme_but_finite_values(name):
    """Zeros, denormals and values near the end of float32 pass the compressing transforms and stay accurate."""
    bundle = model(*SMALL)
    scorer, reference = make(name, bundle), load_scorer(bundle, "reference")
    for value in (0.0, 1e-40, -1e-40, 1e-20, 1e4, -1e4, 1e18, 1e25, -1e25, 3e38, -3e38):
        x = np.full((1, SMALL[0]), 0.3, np.float32)
        x[:, 1::3], x[:, 2::3] = value, np.clip(value, -5e37, 5e37)
        np.testing.assert_allclose(scorer.energy(x), reference.energy(x), rtol=2e-5, atol=1e-5, err_msg=str(value))


@every_scorer
def test_one_events_nan_reaches_no_other(name):
    bundle = model(*SMALL)
    scorer = make(name, bundle, on_nonfinite="propagate")
    x = events(40 if name != "triton" else 9, SMALL[0])
    clean = scorer.energy_and_score(x)
    for value in (np.nan, np.inf, -np.inf):
        damaged = x.copy()
        damaged[4, 2], damaged[6, 4] = value, value  # feature 4 is constant: no influence, but no excuse either
        energy, score = scorer.energy_and_score(damaged)
        bad = np.isin(np.arange(len(x)), (4, 6))
        assert not np.isfinite(energy[bad]).any()
        np.testing.assert_array_equal(energy[~bad], clean[0][~bad])
        np.testing.assert_array_equal(score[~bad], clean[1][~bad])


@every_scorer
def test_every_feature_refuses_what_is_not_finite(name):
    d = 5 if name == "triton" else SMALL[0]
    bundle = model(d, 64, 1)
    scorer = make(name, bundle)
    for j in range(d):
        for value in (np.nan, np.inf, -np.inf):
            x = events(3, d)
            x[1, j] = value
            if np.isnan(value) and j % 2:
                assert np.isfinite(scorer.energy(x)).all()
                continue
            with pytest.raises(ValueError, match=rf"event 1: feature {j} \(x{j}\) is {value}"):
                scorer.energy(x)
            with pytest.raises(ValueError, match=f"feature {j} "):
                scorer.energies(x)


@every_scorer
def test_bad_arguments(name):
    scorer = make(name, model(*SMALL))
    x = events(3, 30)
    for wrong, message in (
        (events(3, 31), r"expected events of shape \(n, 30\), given \(3, 31\)"),
        (x[0], r"expected events of shape \(n, 30\), given \(30,\)"),
        (x[None], r"given \(1, 3, 30\)"),
        (x.astype(object), "events are object, expected real numbers"),
        (np.full(x.shape, "a"), "expected real numbers"),
        (x.astype(complex), "expected real numbers"),
        ([[1.0, 2.0], [1.0]], r"one array of shape \(n, D\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer.energy(wrong)
    for k, message in ((10, "k = 10 is out of range, expected 0 to 9"), (-1, "k = -1 is out of range"),
                       ([0, 1], r"shape \(2,\), expected one number or shape \(3,\)"),
                       ([0, 1, 99], "k = 99"), (1.0, "float64, expected whole numbers"), (True, "bool")):
        with pytest.raises(ValueError, match=message):
            scorer.energy_and_score(x, k)
    for out in (np.empty(4, np.float32), np.empty(3, np.int32), np.empty(6, np.float32)[::2], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="out must be a writable, C-contiguous float32"):
            scorer.energy(x, out=out)


@every_scorer
def test_empty_batch(name):
    scorer = make(name, model(*SMALL))
    x = np.empty((0, 30), np.float32)
    energy, score = scorer.energy_and_score(x)
    assert energy.shape == (0,)
    assert score.shape == (0, 30)
    assert scorer.energies(x).shape == (0, 10)
    assert scorer.energy(x, np.empty(0, int)).shape == (0,)


@every_scorer
def test_other_dtypes_layouts_and_torch(name):
    scorer = make(name, model(*SMALL))
    x = events(4, 30)
    energy, score = scorer.energy_and_score(x)
    for same in (x.astype(np.float64), np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x.tolist()):
        np.testing.assert_array_equal(scorer.energy_and_score(same)[1], score)
    t_energy, t_score = scorer.energy_and_score(torch.from_numpy(x), torch.full((4,), 5))
    assert isinstance(t_energy, torch.Tensor)
    np.testing.assert_array_equal(t_energy.numpy(), energy)
    np.testing.assert_array_equal(t_score.numpy(), score)
    rounded = torch.from_numpy(x).bfloat16().requires_grad_()
    np.testing.assert_array_equal(scorer.energy(rounded), scorer.energy(rounded.detach().float()))
    whole = np.array([[3] * 30], np.int64)
    np.testing.assert_array_equal(scorer.energy(whole), scorer.energy(whole.astype(np.float32)))
