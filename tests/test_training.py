"""Settings, early stopping, checkpoints that survive a kill, ensembles, and models of raw background."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ebm.__main__ import app
from ebm.bundle import Bundle
from ebm.checkpoint import Run
from ebm.dsm import held_out_losses, train
from ebm.events import DataError, Events, Schema
from ebm.networks import EnergyNetwork, ensemble, from_bundle
from ebm.scores import level_energies
from ebm.settings import Settings
from ebm.train import fit, fit_background
from kernels import load_scorer
from kernels.autograd import energy_and_score_of

SIGMAS = (1.0, 0.5, 0.25)
SMALL = {"hidden_dim": 16, "n_sigmas": 3, "steps": 40, "batch_size": 32}
SCHEMA = Schema("test", ("a", "b", "c"), ("",) * 3)


def gaussian(n, d=4, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def network(seed=0, hidden_dim=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EnergyNetwork(4, hidden_dim, len(SIGMAS))


def weights(n):
    return torch.cat([p.detach().ravel() for p in n.parameters()])


def raw(n, seed=0):
    return (np.random.default_rng(seed).normal(size=(n, 3)) * [1, 10, 0.1]).astype(np.float32)


def test_steps_left_out_follow_the_number_of_events():
    s = Settings(batch_size=256)
    assert s.steps_for(100) == 2000
    assert s.steps_for(10_240) == 4000
    assert s.steps_for(10**6) == 6000
    assert Settings(steps=7).steps_for(10**6) == 7


def test_learning_rate_rises_then_falls_to_zero():
    s = Settings(lr=2.0, warmup=10)
    rates = [s.lr_at(step, 1000) for step in range(1, 1001)]
    assert np.argmax(rates) == 9
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0, rel=1e-3)
    assert rates[499] == pytest.approx(1.0, rel=0.01)
    assert 0 < rates[-1] < 1e-4
    assert Settings(lr=2.0, warmup=0).lr_at(1, 10) == 2.0


def test_early_stopping_takes_the_best_weights():
    """On 30 events a network overfits: the held-out loss rises again, the training ends and goes back."""
    n, validation = network(hidden_dim=64), (gaussian(500, seed=1), None)
    history = train(n, gaussian(30), SIGMAS, steps=3000, batch_size=32, lr=1e-2, ema=0.9, record_every=20,
                    validation=validation, patience=200)
    best = min(history.held_out_loss)
    assert history.steps[-1] - history.steps[history.held_out_loss.index(best)] == 200
    assert history.steps[-1] < 3000
    assert history.held_out_loss[-1] > best
    again = held_out_losses(n.energy_and_score, *validation, torch.tensor(SIGMAS))
    assert again == history.held_out_per_level
    assert np.mean(again) == pytest.approx(best)


def test_early_stopping_holds_out_training_events_alone():
    """Not the calibration folds, or the threshold would be of events that chose the model."""
    x = raw(200)
    bundles = [fit_background(x, SCHEMA, watched=raw(50, seed), patience=400, progress=False, **SMALL)[0]
               for seed in (1, 2)]
    assert bundles[0].digest == bundles[1].digest
    assert bundles[0].provenance["held_out_loss"] == bundles[1].provenance["held_out_loss"]
    watched = [fit_background(x, SCHEMA, watched=raw(50, seed), progress=False, **SMALL)[0] for seed in (1, 2)]
    assert watched[0].digest == watched[1].digest != bundles[0].digest
    assert watched[0].provenance["held_out_loss"] != watched[1].provenance["held_out_loss"]
    with pytest.raises(DataError, match="of 9 none can be spared"):
        fit_background(raw(9), SCHEMA, patience=10, **SMALL)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, monkeypatch, explicit):
    """At every record, with all that it has to remember: epochs, noise, moments, averages, the best weights."""
    options = {"steps": 50, "batch_size": 32, "record_every": 7, "multi_scale": 0.5, "l2": 1e-4, "patience": 30,
               "mask": gaussian(100, seed=3) > -1, "width": torch.rand(100, 4),
               "validation": (gaussian(50, seed=1), gaussian(50, seed=2) > -1, torch.rand(50, 4))}

    def run(**more):
        n = network()
        score_of = energy_and_score_of(n) if explicit else None
        return n, train(n, gaussian(100), SIGMAS, energy_and_score=score_of, **options, **more)

    whole, history = run()
    path, write, spent, times = tmp_path / "new" / "c.safetensors", Run.write, [], {"seconds": 0, "cpu_seconds": 0}

    class Killed(Exception):
        pass

    def write_and_die(self, *arguments):
        write(self, *arguments)
        spent.append((self.history.seconds, self.history.cpu_seconds))
        raise Killed

    monkeypatch.setattr(Run, "write", write_and_die)
    for _ in range(8):
        with pytest.raises(Killed):
            run(checkpoint=path, resume=True)
    monkeypatch.undo()
    resumed, same = run(checkpoint=path, resume=True)
    for so_far in zip(*spent, (same.seconds, same.cpu_seconds)):  # of all runs together
        assert (np.diff((0, *so_far)) >= 0).all()
        assert so_far[-1] > so_far[0] > 0
    assert torch.equal(weights(resumed), weights(whole))
    assert replace(same, **times) == replace(history, **times)
    finished, _ = run(checkpoint=path, resume=True)
    assert torch.equal(weights(finished), weights(whole))
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"

    def run(seed=0, n=None, **options):
        options = {"steps": 10, "resume": True} | options
        return train(n or network(), gaussian(100, seed=seed), SIGMAS, checkpoint=path, **options)

    run()
    with pytest.raises(DataError, match=r"c\.safetensors: there is a checkpoint already: resume it"):
        run(resume=False)
    with pytest.raises(DataError, match="another training: steps 10 there, 20 here"):
        run(steps=20)
    with pytest.raises(DataError, match="another training: data"):
        run(seed=1)
    with pytest.raises(DataError, match="another training: first weights"):
        run(n=network(hidden_dim=8))
    content = path.read_bytes()
    for damaged in (content[:1000], b"", b"{}" * 100):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"c\.safetensors: not a checkpoint of a training, or a damaged one"):
            run()


def test_a_killed_command_is_resumed(tmp_path):
    """kill -9 in the middle of `python -m ebm train`; the model is that of a command that nobody killed."""
    def command(out, *options):
        sizes = ["--steps", "1000", "--hidden", "16", "--layers", "1", "--batch", "64", "--members", "2"]
        return ["train", "toy:300", "--out", str(tmp_path / out), *sizes, *options]

    def finish(*arguments):  # in a process of its own, where torch has as many threads as in the one that was killed
        done = subprocess.run([*python, *command(*arguments)], cwd=root, capture_output=True, text=True)
        return done.returncode, done.stderr

    python, root = [sys.executable, "-m", "ebm"], Path(__file__).parents[1]
    kept = ("--checkpoint", str(tmp_path / "kept"))
    process = subprocess.Popen([*python, *command("a", *kept)], cwd=root, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    state, deadline = tmp_path / "kept" / "member-0.safetensors", time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert state.exists()
    assert not (tmp_path / "a").exists()
    assert "there is a checkpoint already" in finish("a", *kept)[1]
    assert finish("a", *kept, "--resume")[0] == finish("b")[0] == 0
    a, b = Bundle.load(tmp_path / "a"), Bundle.load(tmp_path / "b")
    assert (a.digest, a.threshold, a.level_mean) == (b.digest, b.threshold, b.level_mean)
    assert a.provenance["history"] == b.provenance["history"]
    assert "error: --resume needs --checkpoint" in finish("c", "--resume")[1]


def test_the_command_shows_and_keeps_what_it_did(tmp_path):
    """300 events are fewer than a batch; the counts of hep64 are dequantised."""
    result = CliRunner().invoke(app, [
        "train", "toy:300", "--out", str(tmp_path / "m"), "--steps", "250", "--hidden", "8", "--multi-scale", "0.5",
        "--l2", "0.001", "--patience", "1000", "--lr", "0.002"])
    assert result.exit_code == 0, result.output
    for part in ("dsm", "multi_scale", "l2", "sum", "held out", "250"):
        assert part in result.output
    p = Bundle.load(tmp_path / "m").provenance
    assert "--multi-scale 0.5 --l2 0.001 --patience 1000" in p["command"]
    assert (p["learning_rate"], p["multi_scale"], p["l2"], p["patience"]) == (0.002, 0.5, 0.001, 1000)
    assert p["history"][0]["steps"] == [*range(9, 250, 9), 250]
    assert set(p["dequantised"]) <= {"n_jets", "n_btag", "n_lep"}
    assert "n_jets" in p["dequantised"]
    assert p["cpu_seconds"] > 0


def test_an_ensemble_is_one_network_with_the_mean_energy():
    members = [network(seed).double() for seed in range(3)]
    whole, u, k = ensemble(members).double(), gaussian(20).double(), torch.arange(20) % 3
    results = [m.energy_and_score(u, k) for m in members]
    energy, score = whole.energy_and_score(u, k)
    # ensemble() holds float32 weights
    torch.testing.assert_close(energy, sum(e for e, _ in results) / 3, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(score, sum(s for _, s in results) / 3, rtol=1e-6, atol=1e-6)
    assert whole.input.out_features == 48
    with pytest.raises(ValueError, match="same sizes"):
        ensemble([network(), network(hidden_dim=8)])


def test_members_are_trained_with_the_seeds_that_follow(tmp_path):
    x = raw(200)
    bundle, histories = fit_background(x, SCHEMA, members=2, seed=3, progress=False, **SMALL)
    singles = [fit_background(x, SCHEMA, seed=seed, progress=False, **SMALL)[0] for seed in (3, 4)]
    assert bundle.architecture.hidden_dim == 32
    assert len(histories) == len(bundle.provenance["history"]) == 2
    bundle.save(tmp_path / "m")
    for backend in ("reference", "auto"):
        energy = load_scorer(tmp_path / "m", backend).energy(x)
        expected = np.mean([load_scorer(b, "reference").energy(x) for b in singles], axis=0)
        np.testing.assert_allclose(energy, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="40 members of width 16 given"):
        fit_background(x, SCHEMA, members=40, **SMALL)


def test_levels_of_a_bundle_travel_with_it(tmp_path):
    x = raw(300)
    bundle, _ = fit_background(x, SCHEMA, progress=False, **SMALL)
    bundle.save(tmp_path / "m")
    loaded = Bundle.load(tmp_path / "m")
    assert (loaded.level_mean, loaded.level_std) == (bundle.level_mean, bundle.level_std)
    energies = level_energies(from_bundle(loaded), loaded.preprocessing(x))
    np.testing.assert_allclose(energies.mean(axis=0), loaded.level_mean, rtol=1e-5)
    np.testing.assert_allclose(energies.std(axis=0), loaded.level_std, rtol=1e-5)
    np.testing.assert_allclose(load_scorer(loaded, "reference").energies(x), energies, rtol=1e-4, atol=1e-4)
    assert loaded.digest == replace(bundle, level_mean=(), level_std=()).digest  # no energy depends on them
    for bad in ({"level_mean": (0.0,)}, {"level_std": (1.0, 0.0, 1.0)}, {"level_mean": (0.0, np.nan, 0.0)}):
        with pytest.raises(DataError, match="level_mean and level_std must be 3 numbers each"):
            replace(bundle, **bad)


def test_the_history_is_kept_small():
    bundle, (history,) = fit_background(raw(200), SCHEMA, watched=raw(50, 1), l2=1e-3, progress=False,
                                        **(SMALL | {"steps": 500}))
    kept = bundle.provenance["history"][0]
    assert kept["steps"] == [*range(17, 500, 17), 500]
    assert kept.keys() == {"steps", "dsm", "l2", "held_out"}
    np.testing.assert_allclose(kept["dsm"], history.terms["dsm"], rtol=1e-5)
    assert bundle.provenance["l2"] == 1e-3


@pytest.mark.parametrize(("x", "error", "message"), [
    (np.full((20, 3), 7.0), DataError, "every feature is constant in the 20 background events"),
    (raw(1), DataError, "every feature is constant in the 1 background events"),
    (raw(20) * [1, np.nan, 1], DataError, "feature 'b' is missing in all 20 background events"),
    (raw(20) * [1, np.inf, 1], DataError, "feature 'b' is infinite in 20"),
    (raw(0), DataError, r"with n > 0, given \(0, 3\)"),
])
@pytest.mark.filterwarnings("ignore:constant in background")
def test_background_that_cannot_train(x, error, message):
    with pytest.raises(error, match=message):
        fit_background(x.astype(np.float32), SCHEMA, **SMALL)


def test_a_constant_column_and_few_events_train(tmp_path):
    x = raw(20)
    x[:, 1] = 5.0
    with pytest.warns(UserWarning, match="constant in background, so without influence: b"):
        bundle, _ = fit_background(x, SCHEMA, progress=False, **(SMALL | {"batch_size": 512}))
    assert np.isfinite(load_scorer(bundle).energy(x)).all()
    events = Events(SCHEMA, raw(1), np.array(["1"]), source="one.csv")
    with pytest.raises(DataError, match=r"one\.csv: no background event in the .* folds \(1 events in all\)"):
        fit(events, lambda b, x: load_scorer(b).energy(x))
