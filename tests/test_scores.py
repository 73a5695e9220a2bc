"""Anomaly scores of one level and of several, for every kind of network."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from ebm.baselines import build_autoencoder
from ebm.bundle import Bundle
from ebm.networks import EnergyNetwork, ScoreNetwork, from_bundle
from ebm.scores import combine_levels, compute_anomaly_scores, level_energies, standardise_levels

SIGMAS = (1.0, 0.5, 0.25)
U = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


def network(cls=EnergyNetwork):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(4, 16, len(SIGMAS))


@pytest.mark.parametrize("cls", [EnergyNetwork, ScoreNetwork])
def test_one_level(cls):
    n, u = network(cls), torch.from_numpy(U)
    with torch.no_grad():
        energy, score = zip(*(n.energy_and_score(u, torch.full((50,), k)) for k in range(3)))
    np.testing.assert_allclose(compute_anomaly_scores(n, U, SIGMAS), energy[2], rtol=1e-6)  # its default level
    n.default_level = 0
    np.testing.assert_allclose(compute_anomaly_scores(n, U, SIGMAS), energy[0], rtol=1e-6)
    np.testing.assert_allclose(compute_anomaly_scores(n, U, SIGMAS, "energy", level=1), energy[1], rtol=1e-6)
    np.testing.assert_allclose(compute_anomaly_scores(n, U, SIGMAS, "score_norm"), score[2].norm(dim=1), rtol=1e-6)
    np.testing.assert_allclose(compute_anomaly_scores(n, U, SIGMAS, "score_norm", level=0), score[0].norm(dim=1),
                               rtol=1e-6)
    np.testing.assert_allclose(level_energies(n, U), torch.stack(energy, dim=1), rtol=1e-6)
    assert compute_anomaly_scores(n, U[:0], SIGMAS).shape == (0,)
    assert compute_anomaly_scores(n.double(), U, SIGMAS).dtype == np.float64


def test_levels_are_combined_in_units_of_their_spread():
    """A free constant and factor of each level change no combination."""
    energies = np.random.default_rng(1).normal(size=(100, 3)) * [1, 5, 0.1] + [3, -2, 40]
    mean, std = energies.mean(0), energies.std(0)
    z = (energies - mean) / std
    combined = {m: combine_levels(energies, mean, std, m) for m in ("mean", "max", "log_mean_exp")}
    np.testing.assert_allclose(combined["mean"], z.mean(1))
    np.testing.assert_allclose(combined["max"], z.max(1))
    np.testing.assert_allclose(combined["log_mean_exp"], logsumexp(z, axis=1, b=1 / 3))
    assert (combined["mean"] <= combined["log_mean_exp"]).all()
    assert (combined["log_mean_exp"] <= combined["max"]).all()
    moved = energies * [7, 0.5, 2] + [1, 2, 3]
    for m, scores in combined.items():
        np.testing.assert_allclose(combine_levels(moved, moved.mean(0), moved.std(0), m), scores, atol=1e-9)


@pytest.mark.parametrize("cls", [EnergyNetwork, ScoreNetwork])
def test_combinations_are_standardised_on_background(cls):
    n = network(cls)
    with pytest.raises(ValueError, match="'mean' needs the spread of each level's energies on background"):
        compute_anomaly_scores(n, U, SIGMAS, "mean")
    standardise_levels(n, U)
    energies = level_energies(n, U)
    for method in ("mean", "max", "log_mean_exp"):
        expected = combine_levels(energies, energies.mean(0), energies.std(0), method)
        np.testing.assert_allclose(compute_anomaly_scores(n, U, SIGMAS, method), expected, atol=1e-4)
        half = compute_anomaly_scores(n, U[:25], SIGMAS, method)  # constants of the background, not of what is scored
        np.testing.assert_allclose(half, expected[:25], atol=1e-4)
    standardise_levels(n, U[:1])
    assert np.isfinite(compute_anomaly_scores(n, U, SIGMAS, "max")).all()


def test_an_autoencoder_has_one_level():
    n = build_autoencoder(4, 2)
    with torch.no_grad():
        error = (n(torch.from_numpy(U)) - torch.from_numpy(U)).square().mean(1)
    np.testing.assert_allclose(compute_anomaly_scores(n, U, SIGMAS), error, rtol=1e-5)
    with pytest.raises(ValueError, match="this autoencoder model does not have"):
        compute_anomaly_scores(n, U, SIGMAS, "max")


def test_a_bundle_of_an_earlier_version_has_no_standardisation():
    n = from_bundle(Bundle.random(4, 16, 1, 3))
    assert np.isfinite(compute_anomaly_scores(n, U, SIGMAS)).all()
    with pytest.raises(ValueError, match="train it again"):
        compute_anomaly_scores(n, U, SIGMAS, "max")


@pytest.mark.parametrize(("arguments", "message"), [
    ((U, SIGMAS, "norm"), "'norm', expected 'energy', 'score_norm', 'mean'"), ((U, SIGMAS[:2]), "2 noise levels given"),
    ((U[:, :3], SIGMAS), r"shape \(n, 4\), given \(50, 3\)"), ((U[0], SIGMAS), r"given \(4,\)"),
    ((U, SIGMAS, "energy", 3), "level 3 given"), ((U, SIGMAS, "energy", -1), "level -1 given"),
    ((U, SIGMAS, "max", 1), "level 1 given with method 'max'"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        compute_anomaly_scores(network(), *arguments)


def test_combination_of_what_does_not_fit():
    with pytest.raises(ValueError, match="'energy', expected 'mean'"):
        combine_levels(np.ones((2, 3)), np.zeros(3), np.ones(3), "energy")
    with pytest.raises(ValueError, match=r"given \(2, 3\), \(2,\)"):
        combine_levels(np.ones((2, 3)), np.zeros(2), np.ones(2), "max")
