"""How often the threshold keeps its promise, on energies whose true rate is known."""

import numpy as np
import pytest
from scipy.stats import beta

from ebm.threshold import calibrate, calibrate_by

REPETITIONS = 2000
# P(true rate <= 1e-4) for the rank that is taken, exactly: never below the 95% asked for.
EXACT = {100_000: 0.97075, 1_000_000: 0.95369}


def coverage(n, step=0.0, repetitions=REPETITIONS, seed=0):
    """Share of repetitions in which the true rate of exponential energies, in multiples of `step`, is within 1e-4."""
    rng, within = np.random.default_rng(seed), 0
    for _ in range(repetitions):
        energies = rng.standard_exponential(n, np.float32)
        if step:
            energies = np.floor(energies / np.float32(step)) * np.float32(step)
        t = calibrate(energies)
        # Energies in multiples of `step` exceed t where the continuous ones reach the next multiple.
        tail = np.float32(np.floor(t.energy / step + 0.5) + 1) * step if step else t.energy
        within += np.exp(-tail) <= 1e-4
    assert t.guaranteed
    return within / repetitions, beta.cdf(1e-4, t.rank, n + 1 - t.rank)


def test_coverage():
    found, exact = coverage(100_000)
    assert exact == pytest.approx(EXACT[100_000], abs=1e-4)
    assert found == pytest.approx(exact, abs=0.015)


@pytest.mark.parametrize("step", [0.1, 1.0])
def test_coverage_with_ties(step):
    found, exact = coverage(100_000, step, repetitions=700)
    assert found >= exact - 0.015


@pytest.mark.full
@pytest.mark.parametrize("step", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [100_000, 1_000_000])
def test_coverage_in_full(n, step):
    found, exact = coverage(n, step)
    print(f"n = {n:,}, step {step:g}: {found:.4f}, exact without ties {exact:.4f}")
    assert exact == pytest.approx(EXACT[n], abs=1e-4)
    assert found >= exact - 0.015
    assert step or found <= exact + 0.015


@pytest.mark.filterwarnings("ignore:.*background events cannot guarantee")
def test_what_too_few_events_guarantee_holds_too():
    rng = np.random.default_rng(1)
    thresholds = [calibrate(rng.standard_exponential(3000)) for _ in range(REPETITIONS)]
    held = np.mean([np.exp(-t.energy) <= t.upper_bound for t in thresholds])
    assert held == pytest.approx(0.95, abs=0.015)


def test_every_class_holds():
    """Energies that rise with the number of jets: each class keeps the rate, which one threshold would not."""
    rng, rate, within = np.random.default_rng(2), 0.01, []
    for _ in range(300):
        jets = rng.integers(0, 4, 6000)
        classes = calibrate_by("n_jets", jets, rng.standard_exponential(6000) * (1 + jets), rate)
        within.append([np.exp(-t.energy / (1 + c)) <= rate for c, t in enumerate(classes.thresholds)])
    assert np.shape(within) == (300, 4)
    assert (np.mean(within, axis=0) > 0.95 - 3 * np.sqrt(0.05 * 0.95 / 300)).all()


WEIGHTS = {
    "independent": lambda rng, e: rng.standard_exponential(len(e)),
    "heavy": lambda rng, e: rng.lognormal(0, 2, len(e)),
    "negative": lambda rng, e: np.where(rng.random(len(e)) < 0.2, -1.0, 1.0),
}


@pytest.mark.filterwarnings("ignore:.*weighted background events")
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_weighted_estimate(kind):
    rng, rate, within = np.random.default_rng(3), 0.01, 0
    for _ in range(300):
        energies = rng.standard_exponential(5000)
        t = calibrate(energies, rate, weights=WEIGHTS[kind](rng, energies))
        assert not t.guaranteed
        within += np.exp(-t.energy) <= max(rate, t.upper_bound)
    assert within / 300 > 0.95 - 3 * np.sqrt(0.05 * 0.95 / 300)
