"""The checks of `verify` and their events: a wrong Scorer fails where it is wrong, even if it is close."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scorers import MARKER
from test_verify import failing, of, small_model

from ebm import networks
from export.verify import FAIL, verify
from export.verify_events import NEAR_THRESHOLD, Truth
from kernels import registry
from kernels.numba_cpu import NumbaScorer
from kernels.reference import ReferenceScorer


def wrong_scorer(monkeypatch, backend, cls, **changes):
    """`backend` with other methods."""
    changed = type(cls.__name__, (cls,), changes)
    monkeypatch.setattr(registry.Backend, "load", lambda self: changed if self.name == backend else cls)


def test_bits_are_checked_where_they_are_promised(monkeypatch):
    """A difference far below the tolerance, in the events of odd places or of large batches."""
    for of_row, mask in (("at another place", lambda n: np.arange(n) % 2), ("alone", lambda n: np.full(n, n > 1))):
        def _energy_and_score(self, x, k, energy, score, mask=mask):
            NumbaScorer._energy_and_score(self, x, k, energy, score)
            energy *= 1 + np.float32(2e-7) * mask(len(x)).astype(np.float32)

        with monkeypatch.context() as m:
            wrong_scorer(m, "numba", NumbaScorer, _energy_and_score=_energy_and_score)
            report = verify(small_model(), backends=["numba"])
        rows = {row["of"]: row for row in of(report, check="alone")}
        assert rows[of_row]["status"] == FAIL
        assert rows[of_row]["reason"] == "not the same bits"
        assert failing(report) == {("numba", "alone")}


def test_the_truth_must_be_its_own_gradient(monkeypatch):
    """A wrong backward half in float64 would be taken for the truth by all others."""
    right = networks.EnergyNetwork.energy_and_score

    def wrong(self, x, k=None):
        energy, score = right(self, x, k)
        return energy, score * (1 + 1e-6)

    monkeypatch.setattr(networks.EnergyNetwork, "energy_and_score", wrong)
    report = verify(small_model(), backends=["reference"])
    assert failing(report) == {("reference", "gradient")}
    assert {row["precision"] for row in of(report, status=FAIL)} == {"fp64"}


def test_an_energy_of_its_own_way_is_checked(monkeypatch):
    """`energy` may be computed elsewhere than `energy_and_score`."""
    def _energy(self, x, k, energy):
        ReferenceScorer._energy(self, x, k, energy)
        energy *= 1 + 1e-4 * (self.precision == "fp32")

    wrong_scorer(monkeypatch, "reference", ReferenceScorer, _energy=_energy)
    assert ("reference", "batches") in failing(verify(small_model(), backends=["reference"]))


def test_what_raises_in_a_check_is_a_failure_of_that_check(monkeypatch):
    def _energies(self, x, energies):
        raise RuntimeError("out of\nmemory")

    wrong_scorer(monkeypatch, "numba", NumbaScorer, _energies=_energies)
    report = verify(small_model(), backends=["numba"])
    assert failing(report) == {("numba", "levels")}
    assert of(report, status=FAIL)[0]["reason"] == "RuntimeError: out of memory"


def test_events_near_the_threshold():
    """On both sides, at the distances that are promised, in float64; none where the level has no threshold."""
    bundle = small_model()
    truth = Truth(bundle, bundle.default_level, True, None, None)
    distance = (truth.of(truth.near_threshold).energy - bundle.threshold.energy) / truth.spread[0]
    for d in NEAR_THRESHOLD:
        for sign in (1, -1):
            assert (np.abs(distance / (sign * d) - 1) < 0.1).sum() == 8
    assert Truth(bundle, 0, True, None, None).near_threshold is None
    out_of_reach = replace(bundle, threshold=replace(bundle.threshold, energy=1e30))
    assert Truth(out_of_reach, bundle.default_level, True, None, None).near_threshold is None


def test_adversarial_events_are_what_they_are_called():
    bundle = small_model()
    truth = Truth(bundle, bundle.default_level, True, None, None)
    sets, p = truth.adversarial, bundle.preprocessing
    assert all(x.dtype == np.float32 for x in (*sets.values(), truth.damaged))
    assert (sets["zeros"] == 0).all()
    tiny = np.finfo(np.float32).tiny
    assert ((sets["denormal"] != 0) & (np.abs(sets["denormal"]) < tiny)).all()
    assert np.abs(sets["huge"]).max() > 1e37
    assert (sets["one-hot"][:6] == np.eye(6)).all()
    assert len(np.unique(sets["repeated"], axis=0)) == 3
    missing = sets["missing"]
    assert np.isnan(missing).any()
    assert (missing == MARKER).any()
    assert (p.missing(missing).sum(1) > 0).all()
    for x in sets.values():
        answer = truth.of(x)
        assert np.isfinite(answer.energy).all()
        assert np.isfinite(answer.score).all()
    damaged = truth.damaged
    assert (~np.isfinite(damaged)).sum(1).tolist() == [1] * len(damaged)
    assert not np.isfinite(truth.of(damaged).energy).any()
    assert set(np.flatnonzero(np.isnan(damaged).any(0))) == set(np.flatnonzero(np.isnan(p.impute)))
