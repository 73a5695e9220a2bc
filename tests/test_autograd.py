"""Energy and score as a differentiable function: against float64 autograd, and its kernels against plain PyTorch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import training
from bench.report import write_json
from ebm.__main__ import app
from ebm.bundle import Bundle
from ebm.dsm import dsm_loss, geometric_sigmas, train
from ebm.networks import EnergyNetwork, ScoreNetwork
from kernels import autograd
from kernels.autograd import Plain, energy_and_score, energy_and_score_of

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
NAMES = ("u", "w_in", "b_in", "emb", "w", "b", "w_out", "b_out")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(d: int = 5, hidden: int = 12, levels: int = 3, layers: int = 2, dtype: torch.dtype = torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EnergyNetwork(d, hidden, levels, layers).to(dtype)


def inputs(n: int = 4, d: int = 3, h: int = 4, levels: int = 3, layers: int = 2) -> list[torch.Tensor]:
    """u and the weights in the order of NAMES, float64, each with a gradient."""
    shapes = ((n, d), (h, d), (h,), (levels, h), (layers, h, h), (layers, h), (h,), (1,))
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def by_autograd(n: EnergyNetwork):
    """Energy and score of a network by autograd of the energy, to be differentiated again."""
    def of_network(u, k):
        u = u if u.requires_grad else u.detach().requires_grad_()
        energy = n(u, k)
        return energy, -torch.autograd.grad(energy.sum(), u, create_graph=True)[0]

    return of_network


def loss_of(energy: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Something curved of both."""
    return (energy.sin() + score.square().sum(-1) * energy).mean()


@pytest.mark.parametrize("layers", [1, 3])
def test_gradcheck_and_gradgradcheck(layers):
    k, given = torch.tensor([2, 0, 2, 1]), inputs(layers=layers)

    def function(*given):
        return energy_and_score(given[0], k, *given[1:])

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("which", range(len(NAMES)), ids=NAMES)
@pytest.mark.parametrize("output", [0, 1], ids=["energy", "score"])
def test_gradcheck_of_each_alone(which, output):
    k, given = torch.tensor([2, 0, 2, 1]), [t.detach() for t in inputs()]

    def function(one):
        here = [*given[:which], one, *given[which + 1:]]
        return energy_and_score(here[0], k, *here[1:])[output]

    one = given[which].clone().requires_grad_()
    assert torch.autograd.gradcheck(function, one)
    assert torch.autograd.gradgradcheck(function, one)


@pytest.mark.parametrize("d", [1, 5])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_energy_score_and_all_gradients_are_those_of_autograd(layers, d):
    n = network(d, layers=layers)
    for events in (0, 1, 17):
        u, k = normal(events, d).requires_grad_(), torch.arange(events) % 3
        (energy, score), (true_energy, true_score) = energy_and_score_of(n)(u, k), by_autograd(n)(u, k)
        torch.testing.assert_close(energy, true_energy, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(score, true_score, rtol=1e-12, atol=1e-14)
        if events:
            wanted = (u, *n.parameters())
            ours = torch.autograd.grad(loss_of(energy, score), wanted)
            true = torch.autograd.grad(loss_of(true_energy, true_score), wanted)
            for a, b in zip(ours, true):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_dsm_loss_and_its_gradients_are_those_of_double_backward(dtype, most):
    """In float32 too the truth is float64; errors are relative to the norm of a gradient."""
    sigmas, k = geometric_sigmas(10), torch.arange(512) % 10

    def loss_and_gradients(n, score_of, dtype):
        u, noise = normal(512, 64, dtype=dtype), normal(512, 64, seed=1, dtype=dtype)
        loss = dsm_loss(score_of(n), u, k, noise, torch.tensor(sigmas, dtype=dtype))
        loss.backward()
        return [loss.detach()] + [torch.zeros_like(p) if p.grad is None else p.grad for p in n.parameters()]

    exact = network(64, 256, 10)
    truth = loss_and_gradients(exact, by_autograd, torch.float64)
    ours = network(64, 256, 10, dtype=dtype)
    ours.load_state_dict({name: t.to(dtype) for name, t in exact.state_dict().items()})
    for a, b in zip(loss_and_gradients(ours, energy_and_score_of, dtype), truth):
        assert (a - b).norm() <= most * b.norm()


def test_saturated_units_have_finite_gradients():
    n = network(dtype=torch.float32)
    u = (normal(8, 5, dtype=torch.float32) * 1e4).requires_grad_()
    loss_of(*energy_and_score_of(n)(u, torch.zeros(8, dtype=torch.long))).backward()
    assert all(torch.isfinite(t.grad).all() for t in (u, *n.parameters()))


def test_training_with_it_ends_where_training_with_the_network_ends():
    events, sigmas = normal(300, 5, dtype=torch.float32), geometric_sigmas(3, 1.0, 0.25)
    weights = []
    for score_of in (energy_and_score_of, lambda n: n.energy_and_score):
        for _ in range(2):
            n = network(hidden=32, dtype=torch.float32)
            train(n, events, sigmas, steps=30, batch_size=64, energy_and_score=score_of(n),
                  validation=(events[:50], None))
            weights.append(torch.cat([p.detach().ravel() for p in n.parameters()]))
    assert torch.equal(weights[0], weights[1])
    torch.testing.assert_close(weights[0], weights[2], rtol=1e-4, atol=1e-5)


def test_the_command_trains_through_it(monkeypatch, tmp_path):
    used = []
    monkeypatch.setattr("kernels.autograd.first_pass", lambda *a, f=autograd.first_pass: used.append(1) or f(*a))
    arguments = ["train", "toy:2000", "--steps", "3", "--hidden", "16", "--out", str(tmp_path / "m")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert len(used) == 3 + 3 * 10  # steps, and after each the held-out loss of every level
    assert Bundle.load(tmp_path / "m").provenance["device"] == "cpu"
    for device in ("tpu", "cuda:one", "cuda:99"):
        refused = CliRunner().invoke(app, [*arguments, "--device", device])
        assert refused.exit_code == 2
        assert f"--device {device}" in refused.stderr.replace("'", "")


def test_the_benchmark_reports_every_way(tmp_path):
    ways = tuple(way for way in training.WAYS if "compiled" not in way)
    threads = torch.get_num_threads()
    report = training.benchmark(1, 32, seconds=0.1, ways=ways)
    assert torch.get_num_threads() == threads
    assert {"machine", "versions", "commit", "training", "results"} == set(report)
    assert [r["way"] for r in report["results"]] == list(ways)
    for r in report["results"]:
        assert tuple(r) == training.RESULT_FIELDS
        assert r["passed"]
        assert 0 < r["steps_per_s_p10"] <= r["steps_per_s"] <= r["steps_per_s_p90"]
    console = Console(record=True, width=140)
    training.print_report(report, console)
    assert "explicit second pass" in console.export_text()
    write_json(report, tmp_path / "training.json")
    for arguments, words in ((["--json", "/no/such/place/x.json"], "cannot be written"), (["--device", "tpu"], "tpu")):
        refused = CliRunner().invoke(training.app, arguments)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert words in refused.stderr


def test_only_energy_networks():
    with pytest.raises(ValueError, match="kind 'score'"):
        energy_and_score_of(ScoreNetwork(4, 8, 3, 1))


@pytest.fixture
def kernel():
    pytest.importorskip("triton")
    from kernels import autograd_kernel

    return autograd_kernel


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@interpreted
@pytest.mark.parametrize(("n", "h"), [(1, 1), (5, 12), (4, 256), (33, 100)])
def test_kernels_are_the_plain_operations(kernel, n, h):
    z, a, b, c = (normal(n, h, seed=i, dtype=torch.float32) * size for i, size in enumerate((4, 1, 1, 1)))
    z[0, 0] = -200.0
    row = normal(h, seed=9, dtype=torch.float32).expand(n, h)
    for h_below in (None, a):
        close(kernel.up(z, h_below), Plain.up(z, h_below))
        for g in (row, b):
            for ours, plain in zip(kernel.tangent(z, c, h_below, g), Plain.tangent(z, c, h_below, g)):
                close(ours, plain)
    for g in (row, b):
        close(kernel.through(g, z), Plain.through(g, z))
    close(kernel.adjoint(a, z, b), Plain.adjoint(a, z, b))
    assert kernel.up(z[:0], None).shape == (0, h)


@interpreted
def test_the_whole_of_it_with_the_kernels(kernel, monkeypatch):
    """As on a GPU: kernels between the products, and plain operations where the gradient is differentiated."""
    n, used = network(dtype=torch.float32), []
    u, k = normal(17, 5, dtype=torch.float32).requires_grad_(), torch.arange(17) % 3

    def gradients(create_graph):
        found = torch.autograd.grad(loss_of(*energy_and_score_of(n)(u, k)), (u, *n.parameters()),
                                    create_graph=create_graph)
        if create_graph:
            found = torch.autograd.grad(sum(g.square().sum() for g in found), (u, *n.parameters()))
        return found

    plain = gradients(False), gradients(True)

    def between(_):
        used.append(Plain if torch.is_grad_enabled() else kernel)
        return used[-1]

    monkeypatch.setattr(autograd, "_between", between)
    for once, plainly in zip((gradients(False), gradients(True)), plain):
        for ours, theirs in zip(once, plainly):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert used == [kernel] * 3 + [Plain] * 2 + [kernel]


@torch.no_grad()
def test_where_the_kernels_are_used(kernel, monkeypatch):
    autograd._kernels_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device == "old" else (9, 0))

    def on(device, dtype=torch.float32):
        return SimpleNamespace(is_cuda=device != "cpu", device=device, dtype=dtype)

    assert autograd._between(on("new")) is kernel
    assert {autograd._between(u) for u in (on("cpu"), on("old"), on("new", torch.float64))} == {Plain}
    with torch.enable_grad():
        assert autograd._between(on("new")) is Plain
    autograd._kernels_on.cache_clear()
    monkeypatch.setattr(autograd, "find_spec", lambda name: None)
    assert autograd._between(on("new")) is Plain
    autograd._kernels_on.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
                    reason="needs a GPU, and TRITON_INTERPRET=0")
def test_agrees_with_float64_on_a_gpu():
    assert training._errors(("explicit second pass",), 512, "cuda")["explicit second pass"] < training.MOST_ERROR


# Compiles in a process of its own: under TRITON_INTERPRET=1 there is nothing to compile.
COMPILE = """
import json, subprocess, sys, tempfile
from pathlib import Path
import triton
from kernels.autograd_kernel import compile_for

tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for cc in map(int, sys.argv[1:]):
    for name, kernel in compile_for(cc).items():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(kernel.asm["cubin"])
            f.flush()
            out = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
        print(json.dumps([cc, name, out, kernel.asm["ptx"]]))
"""


def test_kernels_compile_without_spills(kernel):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, "80", "90", "100"], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(made) == 3 * 8
    for cc, name, resources, ptx in made:
        usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
        assert usage["STACK"] == usage["LOCAL"] == 0, (cc, name, usage)
        assert usage["REG"] <= 64, (cc, name, usage)  # four programs of 4 warps keep half of an SM busy
        assert f".target sm_{cc}" in ptx, (cc, name)
        assert "v4" in ptx, (cc, name, "no vector loads")
