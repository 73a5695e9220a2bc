"""The stages of bench.gpu without a GPU: they find faults, and take the way of a GPU with a device that pretends."""

from __future__ import annotations

import time
from contextlib import nullcontext
from unittest.mock import MagicMock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton_gpu = pytest.importorskip("kernels.triton_gpu")
gpu_stages = pytest.importorskip("bench.gpu_stages")
from bench import gpu_device, gpu_peers, gpu_speed, gpu_tune  # noqa: E402
from bench.gpu_device import Device, Setting, model  # noqa: E402
from kernels.reference import ReferenceScorer  # noqa: E402


class Faulty:
    """A Scorer with one fault, as a kernel might have it."""

    def __init__(self, bundle, fault):
        self.true, self.fault = ReferenceScorer(bundle, precision="fp32", on_nonfinite="propagate"), fault

    def energy(self, x, k=None):
        return self.true.energy(x, k)

    def energies(self, x, out):
        self.true.energies(x, out=out)
        if self.fault == "levels":
            out[:, 1] = out[:, 0]

    def energy_and_score(self, x, k=None, out=(None, None)):
        energy, score = self.true.energy_and_score(x, k, out=out)
        if self.fault == "score":
            score *= 1.0001
        if self.fault == "rows" and len(x) > 40:
            score[32] = np.nan
        if self.fault == "outside" and isinstance(energy, torch.Tensor) and out[0] is not None:
            torch.as_strided(energy, (len(energy) + 1,), (1,))[-1] = 0
        if self.fault == "neighbour" and not np.isfinite(np.asarray(energy)).all():
            energy[5] += 1e-6
        if self.fault == "slope":
            score *= 1.01
        if self.fault == "host" and isinstance(x, np.ndarray):
            energy += 1e-2
        return energy, score


@pytest.mark.parametrize(("fault", "failing"), [
    (None, set()), ("score", {"agreement", "host path"}), ("rows", {"agreement", "host path"}),
    ("outside", {"written outside"}), ("levels", {"all levels"}),
    ("neighbour", {"isolation of nan", "isolation of inf"}),
    ("slope", {"agreement", "host path", "finite differences"}), ("host", {"host path"}),
])
def test_conformance_finds_faults(fault, failing, monkeypatch):
    told = []
    monkeypatch.setattr(gpu_stages, "tell", lambda section, value: told.append(value))
    bundle = model(7, 64, 2)
    case = gpu_stages._Case(Setting(60, dry=True), bundle, Faulty(bundle, fault), "fp32")
    for n in (1, 65):
        case.agreement(n)
    case.levels(9)
    case.differences(33)
    case.isolation(9)
    assert {v["check"] for v in told if not v["passed"]} == failing


class Event:
    """torch.cuda.Event on the host's clock."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def query(self):
        return False

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Graph:
    """torch.cuda.CUDAGraph and Stream that do nothing."""

    def replay(self):
        pass

    def wait_stream(self, other):
        pass


class Small(Setting):
    """A quick run, with a smaller model and fewer events."""

    sample_s = 0.01
    architecture = (7, 64, 2)
    events = gpu_device.events(512, 7, 3)


@pytest.fixture
def pretended(monkeypatch):
    """A Setting that takes the way of a GPU, on the CPU, and what it told."""
    told = []
    fakes = {"Event": Event, "CUDAGraph": Graph, "Stream": Graph, "current_stream": Graph,
             "stream": lambda s: nullcontext(), "graph": lambda g: nullcontext(), "synchronize": lambda: None,
             "_sleep": lambda cycles: None, "empty_cache": lambda: None, "mem_get_info": lambda: (1 << 32, 1 << 32)}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for module in (gpu_device, gpu_speed, gpu_peers, gpu_stages, gpu_tune):
        monkeypatch.setattr(module, "tell", lambda *item: told.append(item), raising=False)
    setting = Small(60, quick=True, seed=3)
    device = Device(False)
    device.where, device.l2 = torch.device("cpu"), lambda: 1 << 17
    device.pinned = lambda *shape: torch.empty(shape)
    setting.__dict__["device"] = device
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them would wait for whatever else runs
    yield setting, ReferenceScorer(setting.bundle, precision="fp32", on_nonfinite="propagate"), told
    torch.set_num_threads(threads)


def test_the_way_of_a_gpu_through_latency_and_throughput(pretended, monkeypatch):
    setting, scorer, told = pretended
    gpu_speed._latency(setting, scorer, scorer, "fp32", 64)
    assert [v["timing"] for _, v in told] == ["call", "device", "graph", "graph-device"]
    assert all(v["passed"] for _, v in told)
    told.clear()
    for measure in (gpu_speed._resident, gpu_speed._over_the_bus, gpu_speed._pageable):
        measure(setting, scorer, "fp32", 700)
    assert [(v["where"], v["passed"]) for _, v in told] == [("device", True), ("host", True), ("pageable", True)]
    assert told[0][1]["buffers"] == 7  # twice the cache, of 42 kB each
    told.clear()
    gpu_speed._resident(setting, scorer, "fp32", 1)
    assert told[0][1]["passed"]


def test_a_device_that_waited_for_the_host_gets_a_longer_head_start(pretended, monkeypatch):
    setting, _, _ = pretended
    slept, calls = [], []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(Event, "query", lambda self: slept[-1] < 10_000_000)
    assert len(setting.device.seconds(lambda: calls.append(1))) == 4
    assert slept == [4_000_000, 16_000_000]
    assert len(calls) == 8


def test_what_has_no_time_left_is_told_and_not_begun(pretended, monkeypatch):
    setting, _, told = pretended
    monkeypatch.setattr(Small, "left", lambda self: 1.0)
    for stage in (gpu_speed.latency, gpu_speed.throughput, gpu_peers.peers, gpu_peers.training):
        monkeypatch.setattr(gpu_speed, "scorers", lambda setting, among=("fp32",), *_: dict.fromkeys(among))
        monkeypatch.setattr(gpu_peers, "scorers", lambda setting: {})
        told.clear()
        stage(setting, "")
        assert told
        assert all(section == "not_run" and list(value.values()) == ["no time left"] for section, value in told)


def test_the_way_of_a_gpu_beside_the_peers(pretended, monkeypatch):
    setting, scorer, told = pretended
    monkeypatch.setattr(gpu_peers, "_compile", lambda setting, module, mode=None: module)
    for precision in ("fp32", "bf16"):
        gpu_peers._beside(setting, {"fp32": scorer}, precision, 512)
    rows = {(v["scorer"], v["precision"]): v for s, v in told if s == "results"}
    assert len(rows) == 7
    assert all(r["passed"] for r in rows.values())
    assert rows["torch-eager", "bf16"]["rel_rms_score"] > 1e-4 > rows["torch-eager", "fp32"]["rel_rms_score"]
    assert next(v for s, v in told if s == "limits")["products_us"].keys() == {"fp32 512"}
    told.clear()
    gpu_peers._beside(setting, {"fp32": scorer}, "fp32", 1)
    timed = {(v["scorer"], v["timing"]) for s, v in told if s == "results"}
    peers = ("torch-eager", "torch-eager-analytic", "torch-compile")
    assert timed == {("triton", "device"), *((name, timing) for name in peers for timing in ("device", "call"))}
    assert all(v["passed"] for s, v in told if s == "results")


class Pretends:
    """A GPU on which warps are all that counts."""

    name, cc, n_sm = "Fake GPU", 90, 132

    def count(self, cases):
        return [{"spills": 0, "shared": 1024} for _ in cases]

    def measure(self, precision, batch):
        return lambda tile: 100.0 / tile.num_warps


def test_the_search_tells_every_tile_beside_the_tables(pretended, monkeypatch):
    setting, _, told = pretended
    monkeypatch.setattr(gpu_tune, "OnGpu", Pretends)
    gpu_tune.tune(setting, "")
    rows = [value for section, value in told if section == "tune"]
    assert len(rows) == len(told) > 40
    assert {(r["precision"], r["batch"]) for r in rows} == {(p, n) for p in ("fp32", "bf16") for n in (64, 1 << 18)}
    for r in rows:
        assert r["gain"] == pytest.approx(r["tile"]["num_warps"] / r["table_tile"]["num_warps"])
    assert max(r["gain"] for r in rows) == 4  # 16 warps where the table has 4


def test_a_precision_that_is_not_there_is_skipped(monkeypatch):
    told = []
    monkeypatch.setattr(gpu_stages, "tell", lambda *item: told.append(item))
    gpu_stages.conformance(Setting(60, dry=True), "fp7")
    assert told[0][0] == "skipped"
    assert "precision is 'fp7'" in told[0][1]


def test_the_kernel_for_hopper_takes_every_model_that_it_is_tested_with(monkeypatch):
    hopper, found = pytest.importorskip("kernels.hopper"), []
    monkeypatch.setattr(gpu_stages, "scorer", lambda *_, **__: None)
    monkeypatch.setattr(gpu_stages, "_Case", lambda _, bundle, *__: found.append(bundle.architecture) or MagicMock())
    gpu_stages.conformance(Setting(60, kernel="hopper"), "bf16")
    assert len(found) == 2
    assert [hopper.why_not(a.input_dim, a.hidden_dim, a.n_layers, "bf16") for a in found] == [None, None]


@pytest.mark.parametrize(("said", "status", "told"), [
    ("========= ERROR SUMMARY: 0 errors", 0, ("machine", {"memcheck": "ERROR SUMMARY: 0 errors"})),
    ("Error: Device not supported", 1, ("skipped", "compute-sanitizer: device not supported")),
    ("========= Invalid __global__ read of size 4 bytes", 9, None),
])
def test_memcheck_reads_what_the_sanitizer_says(said, status, told, pretended, monkeypatch, tmp_path):
    setting, _, found = pretended
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{said}'\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="Invalid __global__ read") if told is None else nullcontext():
        gpu_stages.memcheck(setting, "")
    assert found == ([told] if told else [])


def test_only_what_is_absent_may_be_left_out(pretended):
    _, _, told = pretended
    for problem in (gpu_device.Absent("no such precision"), KeyError("a mistake")):
        def call(problem=problem):
            raise problem

        assert gpu_device.attempt("triton fp7", call) is None
    assert gpu_device.attempt("beside triton", call, ours=False) is None
    assert told == [("not_run", {"triton fp7": "no such precision"}), ("not_run", {"triton fp7": "'a mistake'"}),
                    ("broken", "triton fp7"), ("not_run", {"beside triton": "'a mistake'"})]


def test_a_step_of_training_that_breaks_is_a_problem_where_it_is_ours(pretended, monkeypatch):
    setting, _, told = pretended

    def broken(*_):
        raise KeyError("a mistake")

    monkeypatch.setattr(gpu_peers, "_METHODS", {"analytic": broken, "fused": broken})
    monkeypatch.setattr(gpu_peers, "sample", lambda calls, seconds: {})
    gpu_peers._steps(setting, "fp32", 4)
    assert [value for section, value in told if section == "broken"] == ["training fp32, batch 4, fused"]
