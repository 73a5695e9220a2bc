"""bench: agreement before speed, honest quantiles, a stable JSON, and errors in one sentence."""

import itertools
import json
import sys

import numpy as np
import pytest
from rich.console import Console

from bench import machine, peers
from bench.driver import RESULT_FIELDS, benchmark
from bench.latency import app, make_plan
from bench.measure import Plan, measure
from bench.report import plot, print_report, to_json, write_json
from bench.timer import Timing, interleave
from ebm.bundle import Bundle
from kernels import BACKENDS
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score

# The runtimes' own; TorchScript says with every call that it is deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"),
              pytest.mark.filterwarnings("ignore::FutureWarning")]

TOP_FIELDS = {"machine", "versions", "commit", "limits", "model", "results"}


@pytest.fixture(scope="module")
def bundle():
    return Bundle.random(5, 64, 1, seed=1)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((300, 5), np.float32)


def quiet(*_):
    pass


def run(bundle, x, scorers, batches=(1,), tasks=("energy_and_score",), seconds=0.02):
    plan = Plan(scorers, batches, (1,), tasks, seconds=seconds, check_events=256)
    return measure(bundle, x, plan, 1, quiet, 30.0)


def command(*args):
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, list(args), prog_name="bench.latency")
    return result.exit_code, result.stderr


@pytest.fixture(scope="module")
def report(bundle, x):
    plan = Plan(("numba", "reference", "torch-eager"), (1, 4), (1,), ("energy", "energy_and_score"), seconds=0.05,
                check_events=256)
    with open("/dev/null", "w") as nowhere:
        return benchmark(bundle, x, plan, {"source": "test"}, Console(file=nowhere))


def test_json_has_the_fields_that_other_tools_rely_on(report, tmp_path):
    write_json(report[0], tmp_path / "out.json")
    d = json.loads((tmp_path / "out.json").read_text())
    assert set(d) == TOP_FIELDS
    assert {"fma_gflops_1t", "fma_gflops_all", "read_gbps_600k", "read_gbps_64m", "sgemm_us",
            "sgemm_openblas_us"} <= set(d["limits"])
    assert set(d["limits"]["sgemm_us"]) == {"1x1", "4x1"}
    assert {"cpu", "cores", "memory_gib", "caches", "os", "steal", "python"} <= set(d["machine"])
    assert {"torch", "numpy", "onnxruntime"} <= set(d["versions"])
    keys = [(r["scorer"], r["task"], r["batch"]) for r in d["results"]]
    assert len(keys) == len(set(keys)) == 3 * 2 * 2
    for r in d["results"]:
        assert tuple(r) == RESULT_FIELDS
        assert r["passed"] is True
        assert r["within_budget"] is True
        assert r["peer"] is (r["scorer"] == "torch-eager")
        assert r["precision"] == ("fp64" if r["scorer"] == "reference" else "fp32")
        assert r["device"] == "cpu"
        assert r["timing"] == "call"
        assert r["threads"] == 1
        assert 0 < r["p50_us"] <= r["p90_us"]
        assert r["events_per_s"] == pytest.approx(r["batch"] * 1e6 / r["p50_us"])
        assert r["limit"] == ("read_gbps_600k" if r["batch"] == 1 else "fma_gflops_1t")
        assert (r["share_of_limit"] is None) == (d["limits"][r["limit"]] is None)
        assert r["rel_rms_energy"] <= 5e-6
        assert (r["rel_rms_score"] is None) == (r["task"] == "energy")
        assert r["first_call_s"] > 0


def test_report_for_people(report, tmp_path, capsys):
    print_report(*report, Console())
    text = capsys.readouterr().out
    for word in ("numba", "torch-eager", "p99.9", "PASS", "vs peer", "steal"):
        assert word in text
    plot(report[1], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plot.png"]


def test_nan_is_null_in_json(report):
    d = report[0] | {"limits": {"fma_gflops_1t": float("nan"), "read_gbps_600k": float("inf")}}
    assert json.loads(to_json(d))["limits"] == {"fma_gflops_1t": None, "read_gbps_600k": None}


@pytest.mark.parametrize(("n", "missing"), [
    (0, {"p50_us", "p90_us", "p99_us", "p999_us"}), (9, {"p90_us", "p99_us", "p999_us"}),
    (99, {"p99_us", "p999_us"}), (999, {"p999_us"}), (1000, set())])
def test_quantiles_of_too_few_samples_are_null(n, missing):
    q = Timing(list(range(1000, 1000 + n))).quantiles_us()
    assert {name for name, value in q.items() if value is None} == missing


def test_contenders_take_turns():
    order = []
    calls = {name: lambda x, name=name: order.append(name) for name in "ab"}
    timings = interleave(calls, [0, 1], 0.12)
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes >= 3
    assert all(len(t.samples_ns) >= 5 for t in timings.values())
    assert timings["a"].slowest_us >= timings["a"].quantiles_us()["p50_us"]


class Flipped(peers.TorchEager):
    """A peer whose score points the wrong way, as a known library's did."""

    def function(self, task, batch):
        right = super().function(task, batch)

        def call(x):
            energy, score = right(x)
            return energy, -score

        return call


class Broken(peers.TorchEager):
    """A peer that raises."""

    def function(self, task, batch):
        raise RuntimeError("no kernel image\nlong explanation")


class Absent(peers.TorchEager):
    """A peer that is not installed."""

    modules = ("no_such_module",)


class NanScore(Flipped):
    """A peer that gives NaN."""

    def function(self, task, batch):
        return lambda x: (np.zeros(len(x), np.float32), np.full_like(x, np.nan))


@pytest.mark.parametrize(("peer", "problem"), [(Flipped, "wrong"), (NanScore, "wrong"), (Broken, "no kernel image")])
def test_a_wrong_peer_is_shown_and_not_timed(bundle, x, monkeypatch, peer, problem):
    monkeypatch.setitem(peers.PEERS, "torch-eager", peer)
    rows = run(bundle, x, ("torch-eager", "reference"))["rows"]
    wrong, right = rows
    assert wrong["passed"] is False
    assert wrong["problem"].startswith(problem)
    assert all(wrong[name] is None for name in ("p50_us", "p90_us", "p99_us", "p999_us", "slowest_us"))
    assert right["passed"]
    assert right["p50_us"] > 0
    if peer is Flipped:
        assert wrong["rel_rms_score"] == pytest.approx(2)


def test_a_large_call_is_checked_at_events_spread_over_it(bundle, x, monkeypatch):
    monkeypatch.setattr("bench.measure._MOST_CHECKED", 50)
    monkeypatch.setitem(peers.PEERS, "torch-eager", Flipped)
    wrong, right = run(bundle, x, ("torch-eager", "reference"), batches=(700,))["rows"]
    assert wrong["rel_rms_score"] == pytest.approx(2)
    assert right["passed"]


def test_an_absent_peer_is_listed_with_the_reason(bundle, x, monkeypatch):
    monkeypatch.setattr(peers, "DEFAULT_PEERS", ("torch-eager",))
    monkeypatch.setattr("bench.measure.BACKENDS", {"reference": BACKENDS["reference"]})
    monkeypatch.setitem(peers.PEERS, "torch-eager", Absent)
    result = run(bundle, x, None)
    assert "not installed" in result["not_run"]["torch-eager"]
    assert {r["scorer"] for r in result["rows"]} >= {"reference"}
    with pytest.raises(RuntimeError, match="torch-eager cannot run"):
        run(bundle, x, ("torch-eager",))


def test_the_triton_interpreter_is_never_timed(bundle, x, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreter"):
        run(bundle, x, ("triton",))


@pytest.mark.parametrize("name", ["torchscript", "onnxruntime", "openvino", "jax"])
def test_every_runtime_agrees_with_float64(name):
    cls = peers.PEERS[name]
    if why_not := cls.why_not():
        pytest.skip(why_not)
    n = 6
    p = all_transforms(n)
    x = np.random.default_rng(3).standard_normal((64, n), np.float32) * 30
    x[:, 1] = np.abs(x[:, 1])
    x[::3, 2] = np.nan
    x[::5, 3] = -999
    x[::7, 1] = 0  # where the derivative of sign(x) log1p(|x|) is easily lost
    bundle = Bundle.random(n, 64, 2, preprocessing=p)
    rows = run(bundle, x, (name,), batches=(1, 7), tasks=("energy", "energy_and_score"))
    assert [r["problem"] for r in rows["rows"]] == [None] * 4


def all_transforms(n):
    from ebm.preprocess import Preprocessing

    one = np.ones(n)
    return Preprocessing(marker=np.full(n, -999), impute=np.linspace(-1, 1, n), transform=[0, 1, 2, 0, 2, 1],
                         scale=3 * one, mean=0.3 * one, inv_std=0.5 * one)


def test_relative_errors():
    truth = np.array([1.0, 2, 3, 4])
    assert relative_rms_energy(truth + 0.1, truth) == pytest.approx(0.1 / truth.std())
    assert relative_rms_score(truth * 1.01, truth) == pytest.approx(0.01)
    assert relative_rms_energy(np.ones(3), np.ones(3)) == 0
    assert relative_rms_energy(np.zeros(3), np.ones(3)) == np.inf
    assert TOLERANCES["fp32"] == 5e-6


def test_machine_and_counts(bundle):
    assert machine.machine()["cores"] >= 1
    assert machine.steal_fraction((0, 100), (1, 200)) == 0.01
    assert machine.steal_fraction(None, (1, 200)) is None
    a = Bundle.random().architecture
    assert machine.n_weights(a) == 147_712
    assert machine.flop_per_event(a, score=True) == 590_336
    assert machine.flop_per_event(a, score=False) == 295_424


def test_plans():
    cores = len(machine.os.sched_getaffinity(0))
    quick, default, full = (make_plan(None, None, None, q, f) for q, f in ((1, 0), (0, 0), (0, 1)))
    assert (quick.batches, quick.threads, quick.tasks) == ((1, 64), (1,), ("energy_and_score",))
    assert (default.batches, default.threads) == ((1, 64, 4096), tuple(sorted({1, cores})))
    assert full.batches[-1] == 65536
    assert "torch-compile-max" in full.extra
    assert make_plan(["native,jax", "numba"], ["8"], ["all"], True, False).scorers == ("native", "jax", "numba")


@pytest.mark.parametrize(("args", "words"), [
    (["--backend", "nativ"], "--backend 'nativ': expected one of"),
    (["--batch", "0"], "--batch '0': expected a whole number from 1"),
    (["--batch", "x,1"], "--batch 'x'"),
    (["--threads", "9999"], "--threads '9999'"),
    (["--quick", "--full"], "exclude each other"),
    (["--json", "/no/such/place/x.json"], "cannot be written"),
    (["--plot", "x.txt"], "expected a file that ends in"),
    (["--model", "/no/such/model"], "no such model directory"),
    (["--data", "/no/such/file.csv"], "/no/such/file.csv"),
    (["--data", "toy:none"], "toy:N"),
])
def test_bad_options_give_one_sentence(args, words):
    code, error = command(*args)
    assert code == 2
    assert words in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_model_and_data_of_different_width(bundle, tmp_path):
    bundle.save(tmp_path / "model")
    code, error = command("--model", str(tmp_path / "model"), "--data", "toy:100")
    assert (code, error.count("\n")) == (2, 1)
    assert "takes 5 features" in error
    assert "has 64" in error


def test_help_teaches():
    from typer.testing import CliRunner

    out = CliRunner().invoke(app, ["--help"]).output
    assert "--quick" in out
    assert "Examples" in out


def test_measuring_needs_no_torch_in_the_parent():
    import subprocess

    code = "import sys, bench.latency; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", ["TorchCompile", "TorchCompileMax"])
def test_what_compiles_has_the_graph_that_others_have(name):
    """An option of the compiler once took the name of the method that says what the graph gives."""
    import torch

    from bench import peers


    energy, score = getattr(peers, name)(Bundle.random(3, 8, 1), 1).graph("energy_and_score")(torch.zeros(2, 3))
    assert (energy.shape, score.shape) == ((2,), (2, 3))
