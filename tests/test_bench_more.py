"""bench: throughput, roofline, times inside C++, and the load of --busy, which must never outlive its run."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench import roofline, throughput
from bench.contenders import Contender
from bench.driver import BUSY, RESULT_FIELDS, benchmark
from bench.latency import make_plan
from bench.load import spinning
from bench.machine import ROOT
from bench.measure import Plan, measure
from bench.report import print_report
from bench.timer import interleave
from ebm.bundle import Bundle
from kernels import BACKENDS

CORES = sorted(os.sched_getaffinity(0))
MANY = tuple(sorted({1, len(CORES)}))
LIMITS = {"fma_gflops_1t": 200.0, "fma_gflops_all": 700.0, "read_gbps_600k": 180.0, "read_gbps_64m": 30.0}


@pytest.fixture(scope="module")
def bundle():
    return Bundle.random(5, 64, 1, seed=1)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((300, 5), np.float32)


@pytest.fixture(scope="module")
def report(bundle, x):
    plan = throughput.make_plan(["reference,numba"], ["16,1"], [",".join(map(str, MANY))], False, False)
    plan = replace(plan, seconds=0.05, check_events=256, spin_on=(CORES[0],))
    a = bundle.architecture
    model = {"source": "test", "kind": a.kind, "input_dim": a.input_dim, "hidden_dim": a.hidden_dim,
             "n_layers": a.n_layers, "n_sigmas": a.n_sigmas}
    with open(os.devnull, "w") as nowhere:
        return benchmark(bundle, x, plan, model, Console(file=nowhere))


def test_throughput_gives_the_results_of_latency(report):
    d = report[0]
    keys = [(r["scorer"], r["batch"], r["threads"]) for r in d["results"]]
    assert len(keys) == len(set(keys)) == 2 * 2 * len(MANY)
    assert all(tuple(r) == RESULT_FIELDS and r["passed"] and r["events_per_s"] > 0 for r in d["results"])
    assert d["limits"]["sgemm_us"] == {}
    assert d["machine"]["load"] == BUSY


def test_throughput_for_people(report, tmp_path, capsys):
    throughput.print_report(*report, Console())
    text = " ".join(capsys.readouterr().out.split())  # a narrow table folds its title
    assert all(word in text for word in ("numba", "1 thr", "energy + score", BUSY))
    assert ("%)" in text) == (len(MANY) > 1)
    throughput.plot(report[1], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_scaling_efficiency():
    def row(threads, rate):
        return {"scorer": "a", "batch": 64, "threads": threads, "timing": "call", "events_per_s": rate, "problem": None,
                "task": "energy"}

    rows = [row(1, 100.0), row(4, 300.0), row(2, None)]
    assert [throughput.efficiency(rows, r) for r in rows] == [1.0, 0.75, None]
    assert throughput.efficiency(rows[1:], rows[1]) is None


def test_throughput_plans():
    plan = throughput.make_plan(None, None, None, False, False)
    assert plan.batches == (*(4**i for i in range(10)), 1_048_576)
    assert plan.threads[0] == 1
    assert plan.threads[-1] == len(CORES)
    assert plan.scorers == ("native", "numba")
    peers = throughput.make_plan(None, None, None, True, True)
    assert peers.batches[-1] == 65_536
    assert "openvino" in peers.scorers
    assert peers.tasks == ("energy",)


@pytest.mark.parametrize(("args", "words"), [
    (["--backend", "nativ"], "--backend 'nativ': expected one of"), (["--batch", "0"], "--batch '0'"),
    (["--threads", "9999"], "--threads '9999'"), (["--plot", "x.txt"], "expected a file that ends in")])
def test_bad_options_give_one_sentence(args, words):
    result = CliRunner().invoke(throughput.app, args)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert words in result.stderr


def test_intensity_by_hand():
    a = Bundle.random().architecture  # 64/256/2
    weights, flop = 147_712, 590_336
    assert roofline.intensity(a, 1, True) == pytest.approx(flop / 4 / (2 * weights + 129 + 2 * 3 * 256))
    assert roofline.intensity(a, 64, True) == pytest.approx(flop / 4 / (2 * weights / 32 + 129 + 2 * 3 * 256))
    assert roofline.intensity(a, 1, False) == pytest.approx(2 * weights / 4 / (weights + 65))
    assert roofline.intensity(a, 1, False, weight_bytes=2) == pytest.approx(2 * weights / (2 * weights + 4 * 65))
    assert roofline.intensity(a, 4096, True) == roofline.intensity(a, 32, True)


def test_roofline_of_a_report(report, tmp_path):
    d = json.loads(json.dumps(report[0] | {"limits": LIMITS}))
    found = roofline.points(d, "energy_and_score")
    assert len(found) == len(d["results"])
    for p in found:
        assert p["gflops"] == pytest.approx(p["events_per_s"] * roofline.flop_per_event(Bundle.random(
            5, 64, 1).architecture, True) / 1e9)
    (tmp_path / "out.json").write_text(json.dumps(d))
    result = CliRunner().invoke(roofline.app, [str(tmp_path / "out.json"), "--plot", str(tmp_path / "plot.png")])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "FLOP/byte" in result.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_roofs():
    one = {"threads": 1, "batch": 64, "flop_per_byte": 10.0, "limit": "fma_gflops_1t"}
    assert roofline.roof(one, LIMITS) == 200
    assert roofline.roof(one | {"threads": 2}, LIMITS) == 400
    assert roofline.roof(one | {"threads": 4}, LIMITS) == 700
    assert roofline.roof(one | {"threads": 4, "batch": 1, "flop_per_byte": 0.5}, LIMITS) == 90
    tiles = LIMITS | {"tile_gflops_1t": 600.0, "tile_gflops_all": 2000.0}
    assert roofline.roof(one | {"limit": "tile_gflops_1t", "flop_per_byte": 4.0}, tiles) == 600
    assert roofline.roof(one | {"limit": "tile_gflops_all", "flop_per_byte": 10.0, "threads": 4}, tiles) == 2000


@pytest.mark.parametrize(("text", "words"), [
    ("", "not a report"), ("[1]", "not a report"), ('{"results": []}', "not a report"), (None, "No such file"),
    (json.dumps({"limits": dict.fromkeys(LIMITS), "model": {"hidden_dim": 1}, "machine": {"cpu": ""}, "results": []}),
     "limits of the machine were not measured")])
def test_a_file_that_is_no_report(text, words, tmp_path):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(roofline.app, [str(path)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert words in result.stderr


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_spinners_end_with_the_block(error):
    seen = []

    def interrupted():
        with spinning(CORES) as pids:
            seen.extend(pids)
            assert [os.sched_getaffinity(pid) for pid in pids] == [{core} for core in CORES]
            assert all(map(running, pids))
            raise error

    with pytest.raises(error):
        interrupted()
    assert len(seen) == len(CORES)
    assert not any(map(running, seen))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_spinners_do_not_outlive_a_parent_that_is_killed(how):
    code = (f"import time\nfrom bench.load import spinning\nwith spinning({CORES}) as pids:\n"
            "    print(*pids, flush=True)\n    time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          cwd=ROOT) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == len(CORES)
        parent.send_signal(how)
    end = time.monotonic() + 10
    while any(map(running, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(running, pids))


def test_busy_is_an_option():
    with pytest.raises(RuntimeError, match="did not start"), spinning([CORES[0], 100_000]):
        pass
    assert make_plan(None, None, None, True, False, True).spin_on == tuple(CORES)
    assert make_plan(None, None, None, True, False).spin_on == ()


@pytest.fixture(scope="module")
def inside(bundle, x):
    pytest.importorskip("kernels._native")
    plan = Plan(("native", "torch-eager"), (1, 64, 65), (1,), seconds=0.02, check_events=256, preallocated=True)
    return measure(bundle, x, plan, 1, lambda *_: None, 30.0)["rows"]


def test_times_inside_the_library_stand_beside_the_call(inside):
    keys = [(r["scorer"], r["batch"], r["timing"]) for r in inside]
    assert keys == [("native", 1, "call"), ("native", 1, "kernel"), ("native", 64, "call"), ("native", 64, "kernel"),
                    ("native", 65, "call"), *(("torch-eager", b, "call") for b in (1, 64, 65))]
    for r in inside:
        assert r["passed"]
        assert r["p50_us"] > 0
        assert (r["first_call_s"] is None) == (r["timing"] == "kernel")
        assert (r["out_p50_us"] is not None) == (r["scorer"] == "native" and r["timing"] == "call" and r["batch"] < 65)


def test_what_python_costs_is_printed(bundle, x, capsys):
    pytest.importorskip("kernels._native")
    plan = Plan(("native", "torch-eager"), (1,), (1,), seconds=0.02, check_events=256, preallocated=True)
    with open(os.devnull, "w") as nowhere:
        d, rows = benchmark(bundle, x, plan, {"source": "test"}, Console(file=nowhere))
    keys = [(r["scorer"], r["precision"], r["timing"]) for r in d["results"]]
    assert len(keys) == len(set(keys)) == 3
    assert all(tuple(r) == RESULT_FIELDS for r in d["results"])
    assert d["machine"]["load"] == "idle"
    kernel = next(r for r in d["results"] if r["timing"] == "kernel")
    assert kernel["limit"] == "read_gbps_600k"
    assert kernel["share_of_limit"] > 0
    print_report(d, rows, Console(width=200))
    text = capsys.readouterr().out
    assert "native (C++)" in text
    assert "Python around native, energy + score, batch 1, threads 1" in text
    assert "with out=" in text


def test_a_contender_may_have_its_own_clock():
    for scorer in (None, object()):
        assert Contender("a", False, "cpu", "fp32", lambda *_: None, 0.0, scorer).inside("energy", 1) is None
    timings = interleave({"a": lambda _: None, "a (C++)": lambda _: [1e-6, 3e-6]}, [0], 0.01, tells_time=" (C++)")
    assert set(timings["a (C++)"].samples_ns) == {1000, 3000}
    assert len(timings["a (C++)"].samples_ns) >= 5


def test_the_regression_baseline_covers_every_cpu_scorer():
    with open(ROOT / "bench" / "results" / "regression.json") as f:
        ratios = json.load(f)["ratios"]
    names = [name for name, b in BACKENDS.items() if b.device == "cpu"]
    assert set(ratios) >= {f"{name}, batch {batch}" for name in names for batch in (1, 64, 4096)}
    assert all(0 < ratio < 100 for ratio in ratios.values())


def test_nothing_here_needs_torch_in_the_parent():
    code = "import sys, bench.throughput, bench.roofline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
