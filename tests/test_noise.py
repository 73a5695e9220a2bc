"""Which features of an event get noise in training, and of what kind: present, absent, marked as missing, counting."""

import numpy as np
import pytest
import torch

from ebm.dsm import held_out_losses, train
from ebm.events import DataError, Schema
from ebm.networks import EnergyNetwork
from ebm.preprocess import Preprocessing
from ebm.train import counting, tensors

SIGMAS = (1.0, 0.5, 0.25)


@pytest.mark.parametrize("marker", [None, -999.0])
def test_padding_is_masked_and_marked_values_are_noised(marker):
    x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    absent = np.nan if marker is None else marker
    x[::2, 1], x[:, 2] = absent, 4.0
    schema = Schema("test", ("a", "b", "constant"), ("",) * 3, marker)
    with pytest.warns(UserWarning, match="constant"):
        p = Preprocessing.fit(x, schema)
    u, mask, _ = tensors(p, x, schema)
    assert torch.isfinite(u).all()
    assert mask[:, 0].all()
    assert not mask[:, 2].any()
    assert mask[:, 1].tolist() == [i % 2 == 1 or marker is not None for i in range(100)]


def test_counts_are_dequantised():
    """Whole numbers, 3 to 32 of them, get noise as wide as a step: without gaps, and none that reaches beyond."""
    rng = np.random.default_rng(0)
    x = np.stack([rng.poisson(2, 4000), rng.normal(size=4000), rng.integers(0, 2, 4000), rng.integers(0, 99, 4000),
                  np.where(rng.random(4000) < 0.5, np.nan, rng.integers(1, 4, 4000))], axis=1).astype(np.float32)
    schema = Schema("test", ("jets", "angle", "flag", "channel", "btags"), ("",) * 5)
    p = Preprocessing.fit(x, schema)
    counts = counting(x, p)
    assert counts.tolist() == [True, False, False, False, True]
    sample = tensors(p, x, schema, counts)
    noisy = sample.dequantised(torch.Generator().manual_seed(0))
    back = (noisy / torch.from_numpy(np.where(p.inv_std, p.inv_std, 1)) + torch.from_numpy(p.mean)).numpy()
    assert np.array_equal(noisy[:, 1:4], sample.u[:, 1:4])
    moved = back[:, 0] - x[:, 0]
    assert np.abs(moved).max() < 0.5001
    assert moved.std() == pytest.approx(12**-0.5, rel=0.05)
    present = ~np.isnan(x[:, 4])
    assert torch.equal(noisy[~present, 4], sample.u[~present, 4])
    assert (noisy[present, 4] != sample.u[present, 4]).all()
    assert tensors(p, x, schema, np.zeros(5, bool)).width is None
    sigmas = torch.tensor(SIGMAS)

    def network():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return EnergyNetwork(5, 32, len(SIGMAS))

    score_of = network().energy_and_score
    assert held_out_losses(score_of, *sample[:2], sigmas) != held_out_losses(score_of, *sample[:2], sigmas,
                                                                             width=sample.width)
    assert train(network(), sample.u, SIGMAS, steps=2, width=sample.width).train_loss != \
        train(network(), sample.u, SIGMAS, steps=2).train_loss


def test_what_was_never_missing_may_not_be_missing_when_held_out():
    x = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    schema = Schema("test", ("a", "b"), ("", ""))
    p = Preprocessing.fit(x, schema)
    x[3, 1] = np.nan
    with pytest.raises(DataError, match="event 3: feature 'b' is nan"):
        tensors(p, x, schema)
