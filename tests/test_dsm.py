"""The loss, its sign, the analytic score behind it, and the training loop."""

import numpy as np
import pytest
import torch

from ebm.dsm import Sample, dsm_errors, dsm_loss, geometric_sigmas, held_out_losses, train
from ebm.metrics import auroc
from ebm.networks import Autoencoder, EnergyNetwork, ScoreNetwork
from ebm.scores import compute_anomaly_scores
from ebm.train import train_score_model

SIGMAS = geometric_sigmas(3, 1.0, 0.25)


def gaussian(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def network(cls=EnergyNetwork, d=4, seed=0, **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(d, **({"hidden_dim": 32, "n_sigmas": len(SIGMAS), "n_layers": 2} | sizes))


def test_geometric_sigmas():
    sigmas = geometric_sigmas()
    assert len(sigmas) == 10
    assert sigmas[0] == pytest.approx(2.0)
    assert sigmas[-1] == pytest.approx(0.05)
    np.testing.assert_allclose(np.diff(np.log(sigmas)), np.log(0.05 / 2) / 9)
    assert geometric_sigmas(1, 0.5, 0.5) == (0.5,)
    with pytest.raises(ValueError, match="smallest"):
        geometric_sigmas(10, 0.05, 2.0)


@pytest.mark.parametrize("kind", ["energy", "autoencoder"])
def test_analytic_score_is_minus_the_gradient(kind):
    n = network(n_layers=3) if kind == "energy" else Autoencoder(4, 2)
    n = n.double()
    u = gaussian(16, 4).double().requires_grad_()
    k = torch.arange(16) % 3 if kind == "energy" else None
    energy, score = n.energy_and_score(u, k)
    if kind == "energy":
        torch.testing.assert_close(energy, n(u, k))
    (gradient,) = torch.autograd.grad(energy.sum(), u)
    torch.testing.assert_close(score, -gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["energy", "autoencoder"])
def test_loss_gradient_is_that_of_double_backward(kind):
    """An ordinary backward pass through the analytic score = autograd of autograd."""
    n = (network() if kind == "energy" else Autoencoder(4, 2)).double()

    def by_autograd(u, k):
        u = u.detach().requires_grad_()
        energy = n(u, k) if kind == "energy" else n.energy_and_score(u)[0]
        return energy, -torch.autograd.grad(energy.sum(), u, create_graph=True)[0]

    u, noise, k = gaussian(16, 4).double(), gaussian(16, 4, 1).double(), torch.arange(16) % 3
    sigmas = torch.tensor(SIGMAS, dtype=torch.float64)
    gradients = []
    for score_of in (n.energy_and_score, by_autograd):
        n.zero_grad()
        dsm_loss(score_of, u, k, noise, sigmas).backward()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in n.parameters()])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_loss_by_hand():
    """s(u) = -a u has |sigma s(u + sigma eps) + eps|^2 = |(1 - a sigma^2) eps - a sigma u|^2."""
    a, sigmas = 0.7, torch.tensor(SIGMAS, dtype=torch.float64)
    u, noise, k = gaussian(50, 3).double(), gaussian(50, 3, 1).double(), torch.arange(50) % 3
    sigma = sigmas[k][:, None]
    expected = ((1 - a * sigma**2) * noise - a * sigma * u).square().sum(1)
    errors = dsm_errors(lambda v, k: (None, -a * v), u, k, noise, sigmas)
    torch.testing.assert_close(errors, expected)
    torch.testing.assert_close(dsm_loss(lambda v, k: (None, -a * v), u, k, noise, sigmas), expected.mean())


def test_loss_of_the_best_score_of_a_gaussian():
    """For N(0, 1) s = -u / (1 + sigma^2) is best: its loss is D / (1 + sigma^2), and the opposite sign is worse."""
    u, noise = gaussian(200_000, 2).double(), gaussian(200_000, 2, 1).double()
    for k, sigma in enumerate(SIGMAS):
        level, sigmas = torch.full((len(u),), k), torch.tensor(SIGMAS, dtype=torch.float64)

        def loss(factor, level=level, sigmas=sigmas, sigma=sigma):
            return dsm_errors(lambda v, _: (None, -factor * v / (1 + sigma**2)), u, level, noise, sigmas).mean()

        assert loss(1.0) == pytest.approx(2 / (1 + sigma**2), rel=0.01)
        assert loss(1.0) < min(loss(0.8), loss(1.2), loss(-1.0))


def test_second_term():
    """With every event at every level the estimate is exact: L + sum_i w_i L_i + l2 |theta|^2."""
    n = network().double()
    events, levels = 20, len(SIGMAS)
    u, noise = (gaussian(events, 4, s).double().repeat(levels, 1) for s in (0, 1))
    k = torch.arange(levels).repeat_interleave(events)
    sigmas, w = torch.tensor(SIGMAS, dtype=torch.float64), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    per_level = torch.stack([dsm_errors(n.energy_and_score, u[k == i], k[k == i], noise[k == i], sigmas).mean()
                             for i in range(levels)])
    size = sum(p.square().sum() for p in n.parameters())
    total = dsm_loss(n.energy_and_score, u, k, noise, sigmas, level_weights=w, l2=0.01, parameters=list(n.parameters()))
    torch.testing.assert_close(total, per_level.mean() + (w * per_level).sum() + 0.01 * size)


def test_terms_are_switched_and_logged():
    def terms(**weights):
        return train(network(), gaussian(64, 4), SIGMAS, steps=3, record_every=2, **weights)

    plain, all_on = terms(), terms(dsm=2.0, multi_scale=0.5, l2=0.1)
    assert list(plain.terms) == ["dsm"]
    assert list(all_on.terms) == ["dsm", "multi_scale", "l2"]
    assert plain.steps == all_on.steps == [2, 3]
    np.testing.assert_allclose(np.sum(list(all_on.terms.values()), axis=0), all_on.train_loss, rtol=1e-6)
    even = terms(dsm=0.0, multi_scale=1.0)  # all levels alike: the mean over levels, as L_DSM itself
    assert list(even.terms) == ["multi_scale"]
    np.testing.assert_allclose(even.train_loss, plain.train_loss, rtol=1e-6)
    last = terms(dsm=0.0, multi_scale=1.0, level_weights=(0.0, 0.0, 1.0))
    assert last.train_loss[0] != pytest.approx(plain.train_loss[0], rel=1e-3)


def test_absent_features_have_no_noise_and_no_part_in_the_loss():
    u, noise, k = gaussian(20, 4), gaussian(20, 4, 1), torch.zeros(20, dtype=torch.long)
    mask = torch.rand(20, 4, generator=torch.Generator().manual_seed(2)) > 0.4
    seen = []

    def score_of(v, k):
        seen.append(v)
        return None, torch.full_like(v, 3.0)

    errors = dsm_errors(score_of, u, k, noise, torch.tensor(SIGMAS), mask)
    assert torch.equal(seen[0][~mask], u[~mask])
    assert (seen[0][mask] != u[mask]).all()
    torch.testing.assert_close(errors, ((3.0 * SIGMAS[0] + noise).square() * mask).sum(1))


def test_sign_energy_rises_outward_and_score_points_inward():
    u = gaussian(4000, 2)
    n = network(d=2, hidden_dim=64)
    history = train(n, u, SIGMAS, steps=400, batch_size=256, ema=0.99, validation=(gaussian(1000, 2, 5), None))
    assert history.train_loss[-1] < history.train_loss[0]
    assert len(history.held_out_per_level) == len(SIGMAS)
    points = gaussian(2000, 2, 7)
    for k, sigma in enumerate(SIGMAS):
        _, score = n.energy_and_score(points, torch.full((2000,), k))
        best = -points / (1 + sigma**2)
        assert np.corrcoef(score.detach().ravel(), best.ravel())[0, 1] > 0.95
        assert history.held_out_per_level[k] == pytest.approx(2 / (1 + sigma**2), rel=0.15)
        radii = torch.tensor([0.0, 1.0, 2.0, 3.0])
        energy = n(torch.stack([radii, torch.zeros(4)], 1), torch.full((4,), k))
        assert (energy.diff() > 0).all()
    far = gaussian(1000, 2, 8) * 3
    scores = compute_anomaly_scores(n, torch.cat([points, far]).numpy(), SIGMAS)
    assert auroc(np.repeat([0, 1], [2000, 1000]), scores) > 0.8


def test_same_seed_same_weights_other_seed_others():
    def run(seed):
        n = network()
        history = train(n, gaussian(300, 4), SIGMAS, steps=20, batch_size=64, seed=seed, record_every=5)
        return torch.cat([p.detach().ravel() for p in n.parameters()]), history.train_loss

    torch.manual_seed(99)  # the global generator plays no part
    weights, losses = run(3)
    torch.manual_seed(1)
    again, same_losses = run(3)
    assert torch.equal(weights, again)
    assert losses == same_losses
    assert len(losses) == 4
    assert not torch.equal(weights, run(4)[0])


def test_weights_end_as_their_average():
    fast, slow = network(), network()
    start = torch.cat([p.detach().ravel().clone() for p in fast.parameters()])
    for n, ema in ((fast, 0.0), (slow, 0.999)):
        train(n, gaussian(300, 4), SIGMAS, steps=30, batch_size=64, ema=ema)
    moved = [(torch.cat([p.detach().ravel() for p in n.parameters()]) - start).norm() for n in (fast, slow)]
    assert 0 < moved[1] < moved[0]


def test_a_kernel_can_be_handed_in():
    n, calls = network(), []

    def kernel(u, k):
        calls.append(len(u))
        return n.energy_and_score(u, k)

    train(n, gaussian(100, 4), SIGMAS, steps=5, batch_size=32, energy_and_score=kernel)
    assert calls == [32] * 5


def test_held_out_loss_is_of_one_fixed_draw():
    n, u, sigmas = network(), gaussian(100, 4), torch.tensor(SIGMAS)
    first = held_out_losses(n.energy_and_score, u, None, sigmas)
    assert first == held_out_losses(n.energy_and_score, u, None, sigmas)
    assert first != held_out_losses(n.energy_and_score, u, torch.rand(100, 4) > 0.5, sigmas)


@pytest.mark.parametrize("cls", [EnergyNetwork, ScoreNetwork])
def test_train_score_model(cls):
    model, losses = train_score_model(network(cls), gaussian(600, 4).numpy(), SIGMAS, n_epochs=15, batch_size=100)
    assert isinstance(model, cls)
    assert len(losses) == 15
    assert losses[-1] < losses[0]
    for method in ("energy", "score_norm", "mean", "max", "log_mean_exp"):
        assert compute_anomaly_scores(model, gaussian(10, 4).numpy(), SIGMAS, method).shape == (10,)
    for n in (1, 3):  # fewer events than a batch, down to one
        _, losses = train_score_model(network(cls), gaussian(n, 4), SIGMAS, n_epochs=3)
        assert np.isfinite(losses).all()


def test_every_event_is_used_equally_often():
    """Once per epoch; where a batch is larger than the sample, as often as any other, give or take one."""
    seen = []

    def of_rows(v, k):
        seen.append(v[:, 0].round().long())
        return None, (v * 0).requires_grad_()

    for n, batch, steps in ((10, 5, 4), (3, 8, 6)):
        seen.clear()
        u = torch.arange(n, dtype=torch.float32)[:, None] * 10
        train(network(d=1), u, (1e-4, 1e-5, 1e-6), batch_size=batch, steps=steps, energy_and_score=of_rows)
        counts = torch.bincount(torch.cat(seen) // 10, minlength=n)
        assert sum(map(len, seen)) == batch * steps
        assert counts.max() - counts.min() <= (0 if n > batch else steps)
        assert counts.min() > 0


@pytest.mark.parametrize(("change", "message"), [
    ({"u": torch.zeros(0, 4)}, "n > 0"), ({"u": torch.zeros(5, 3)}, r"\(n, 4\)"), ({"steps": 0}, "steps is 0"),
    ({"sigmas": (1.0, 0.5)}, "2 noise levels"), ({"sigmas": (0.5, 1.0, 2.0)}, "descend"),
    ({"sigmas": (1.0, 0.5, 0.0)}, "positive"), ({"mask": torch.ones(3, 4)}, "mask has shape"),
    ({"width": torch.ones(10, 3)}, "width has shape"), ({"mask": torch.zeros(10, 4, dtype=bool)}, "no feature"),
    ({"u": torch.full((10, 4), float("nan"))}, "10 of 10 events"), ({"lr": 0.0}, "lr above 0"),
    ({"lr": float("nan")}, "lr is nan"), ({"ema": 1.0}, "ema below 1"), ({"dsm": 0.0}, "no term"),
    ({"l2": -1.0}, "l2 is -1.0"), ({"batch_size": 0}, "batch_size is 0"), ({"patience": 100}, "validation"),
    ({"level_weights": (1.0, 2.0)}, "2 level weights"), ({"level_weights": (1.0, -2.0, 0.0)}, "level_weights is"),
])
def test_bad_arguments(change, message):
    arguments = {"u": gaussian(10, 4), "sigmas": SIGMAS, "steps": 2} | change
    with pytest.raises(ValueError, match=message):
        train(network(), **arguments)


def test_a_diverging_loss_is_said():
    with pytest.raises(RuntimeError, match=r"diverged; lower the learning rate"):
        train(network(), gaussian(10, 4), SIGMAS, steps=50, lr=1e30)


def test_a_sample_is_cut_as_one():
    part = Sample(gaussian(6, 2), None, torch.ones(6, 2)).rows(torch.tensor([4, 1]))
    assert torch.equal(part.u, gaussian(6, 2)[[4, 1]])
    assert part.mask is None
    assert part.width.shape == (2, 2)
