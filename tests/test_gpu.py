"""bench.gpu without a GPU: a dry run of its stages, what it makes of their numbers, and what happens if one breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import driver, gpu
from bench.gpu_isolate import FAILED, OK, SKIPPED, TIMED_OUT, Outcome, run_together
from bench.gpu_summary import Figure, figures, table

triton_gpu = pytest.importorskip("kernels.triton_gpu")

ROOT = Path(__file__).parents[1]
MAY_BE_MISSING = ("typer", "rich", "safetensors", "sklearn", "pytest", "scipy", "pyarrow", "numba", "matplotlib")
TOP_FIELDS = {"machine", "versions", "commit", "limits", "model", "results", "tune", "throughput", "training",
              "conformance", "stages", "summary"}


def command(*arguments, path=ROOT):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-m", "bench.gpu", *arguments], cwd=ROOT, env=environment, text=True,
                          capture_output=True)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The whole command, where a bare machine's missing packages are missing."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({MAY_BE_MISSING}))\n")
    done = command("--dry-run", "--out", str(folder / "out"), path=os.pathsep.join((str(folder), str(ROOT))))
    return done, json.loads((folder / "out" / "dry-run.json").read_text())


def test_a_dry_run_passes_through_every_stage(dry_run):
    done, report = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(report) == TOP_FIELDS
    assert {s["status"] for s in report["stages"].values()} == {OK}
    assert set(report["stages"]) == {"machine", *(n for s in gpu.STAGES for n in s.names)} - set(gpu.NOT_DRY)
    assert report["machine"]["not_run"] == {}
    assert {c["precision"] for c in report["conformance"]} >= {"fp32"}
    assert all(c["passed"] for c in report["conformance"])
    assert {t["method"] for t in report["training"]} >= {"double backward", "analytic", "analytic compiled"}
    assert {t["where"] for t in report["throughput"]} == {"device", "host", "pageable"}
    assert {"matmul_bf16_gflops", "matmul_tf32_gflops", "matmul_fp32_gflops", "copy_gbps", "h2d_gbps", "d2h_gbps",
            "products_us"} <= set(report["limits"])
    assert "wanted" in done.stdout.splitlines()[-len(report["summary"]) - 1]


def test_results_have_the_fields_of_the_other_benchmarks(dry_run):
    assert gpu.RESULT_FIELDS == driver.RESULT_FIELDS
    assert driver.BUDGET_US["cuda"] == gpu.BUDGET_US
    _, report = dry_run
    for r in report["results"]:
        assert tuple(r) == driver.RESULT_FIELDS
        assert r["device"] == "cuda:0"
        assert r["p50_us"] > 0
    timed = {(r["scorer"], r["timing"], r["precision"]) for r in report["results"]}
    assert {("triton", t, "fp32") for t in ("call", "device", "graph", "graph-device")} <= timed
    assert {(name, "device", "bf16") for name in ("torch-eager", "torch-eager-analytic", "torch-compile")} <= timed
    assert all(r["passed"] for r in report["results"])


@pytest.mark.skipif(triton_gpu.why_not() is None, reason="there is a GPU")
def test_without_a_gpu_it_says_why_in_a_sentence(tmp_path):
    done = command("--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {triton_gpu.why_not()}"
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_that_an_old_interpreter_cannot_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "version", {"numpy": "2.4.0rc1", "triton": "3.6.0"}.__getitem__)
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 2
    assert "before 3.7 cannot run with NumPy 2.4" in capsys.readouterr().err


def test_what_is_about_being_right_comes_first_and_has_the_time_it_needs():
    first = [name.split(":")[0] for stage in gpu.STAGES[:2] for name in stage.names]
    assert set(first) == {"conformance", "memcheck", "hopper"}
    for stage in gpu.STAGES:
        assert stage.least <= stage.seconds
        assert stage.quick_seconds == 0 or stage.least <= stage.quick_seconds


def test_make_gpu_passes_its_arguments_on():
    shown = subprocess.run(["make", "-n", "gpu", "OUT=there", "GPUFLAGS=--quick"], cwd=ROOT, text=True, check=True,
                           capture_output=True).stdout
    assert "-m bench.gpu --out there --quick\n" in shown


def test_help_teaches_and_bad_arguments_are_refused(capsys):
    for arguments, code in ((["--help"], 0), (["--only", "nothing"], 2), (["surplus"], 2)):
        with pytest.raises(SystemExit) as end:
            gpu.main(arguments)
        assert end.value.code == code
    shown = capsys.readouterr()
    assert all(n.partition(":")[0] in shown.out for s in gpu.STAGES for n in s.names)
    assert "Exit code" in shown.out
    assert "invalid choice: 'nothing'" in shown.err


def test_the_command_itself_needs_no_torch():
    code = "import sys; sys.modules['torch'] = sys.modules['triton'] = None; import bench.gpu"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_limits_keep_to_nine_and_two_minutes():
    to_end_one_that_hangs = 10
    assert gpu.LIMIT_S + to_end_one_that_hangs < 9 * 60
    assert gpu.QUICK_LIMIT_S <= 2 * 60


def test_a_stage_that_fails_or_hangs_costs_nothing_but_itself(tmp_path):
    told = "from bench.gpu_isolate import tell; tell('tune', {'us': 1.5}); print('noise'); "
    child = f"import subprocess, sys; p = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'pid')!r}, 'w')" \
            ".write(str(p.pid)); p.wait()"
    commands = {"good": told, "raises": told + "raise ValueError('it broke')", "hangs": told + child,
                "skips": "from bench.gpu_isolate import tell; tell('skipped', 'nothing to do')",
                "dies": "import os; os.abort()"}
    start = time.perf_counter()
    found = run_together({name: [sys.executable, "-c", code] for name, code in commands.items()}, 4,
                         os.environ | {"PYTHONPATH": str(ROOT)})
    assert time.perf_counter() - start < 15
    assert {n: o.status for n, o in found.items()} == {"good": OK, "raises": FAILED, "hangs": TIMED_OUT,
                                                       "skips": SKIPPED, "dies": FAILED}
    assert "ValueError: it broke" in found["raises"].reason
    assert found["skips"].reason == "nothing to do"
    assert "status -6" in found["dies"].reason
    for name in ("good", "raises", "hangs"):  # what was told before is kept
        assert found[name].items == [("tune", {"us": 1.5})]
    assert found["skips"].items == []
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    while status.exists() and status.read_text().split()[2] != "Z":  # its child ends with it, not later
        assert time.perf_counter() - start < 15
        time.sleep(0.05)


def test_the_run_goes_on_and_the_report_is_written_after_each_stage(tmp_path, monkeypatch):
    lines, written = [], []

    def fake(commands, seconds, environment):
        written.append(json.loads((tmp_path / "nvidia-h100-quick.json").read_text())["stages"]
                       if (tmp_path / "nvidia-h100-quick.json").exists() else None)
        assert environment.get("TRITON_INTERPRET") is None
        assert int(environment["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // len(commands))
        outcome = Outcome(OK, None, 1.0, [("machine", {"gpu": "NVIDIA H100", "driver": "1"})])
        return {n: outcome if n == "machine" else Outcome(FAILED, "it broke", 1.0) for n in commands}

    monkeypatch.setattr(gpu, "run_together", fake)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    report, path = gpu.measure(tmp_path, quick=True, dry=False, say=lines.append)
    assert path == tmp_path / "nvidia-h100-quick.json"
    assert [len(w) if w else w for w in written] == [None, None, 9, 10, 12, 13, 14]
    assert report["stages"]["peers"] == {"status": FAILED, "reason": "it broke", "seconds": 1.0, "broken": []}
    assert report["machine"]["not_run"]["stage tune"] == "not part of a quick run"
    assert any("latency: failed: it broke" in line for line in lines)
    assert len(gpu.failed(report)) == 10
    assert [p.name for p in tmp_path.iterdir()] == ["nvidia-h100-quick.json"]


def test_what_breaks_in_a_stage_is_a_problem_and_what_is_absent_is_none():
    report = gpu.empty_report(gpu.Architecture("energy", 64), 1)
    items = [("not_run", {"triton fp32": "no compiler", "triton fp7": "no such precision"}), ("broken", "triton fp32")]
    gpu.add(report, "latency", Outcome(OK, None, 1.0, items))
    assert gpu.failed(report) == ["stage latency: triton fp32: no compiler"]
    for name, outcome in (("peers", Outcome(TIMED_OUT, "late", 1.0)), ("memcheck", Outcome(SKIPPED, "absent", 0.0))):
        gpu.add(report, name, outcome)
    assert set(report["machine"]["not_run"]) == {"triton fp32", "triton fp7", "stage peers", "stage memcheck"}
    assert len(gpu.failed(report)) == 1
    gpu.add(report, "throughput", Outcome(TIMED_OUT, "late", 1.0))
    assert gpu.failed(report)[0] == "stage throughput: timed out, late"


def result(**values):
    return {"scorer": "triton", "peer": False, "device": "cuda:0", "threads": 1, "task": "energy_and_score",
            "batch": 1 << 18, "precision": "bf16", "timing": "device", "first_call_s": None, "p50_us": 1000.0,
            "p90_us": 1100.0, "p99_us": None, "p999_us": None, "rel_rms_energy": 1e-3, "rel_rms_score": 1e-3,
            "passed": True} | values


@pytest.fixture
def report():
    """Invented numbers: an H100 on a good day."""
    r = gpu.empty_report(gpu.Architecture("energy", 64), 1)
    r["machine"] |= {"gpu": "NVIDIA H100", "driver": "1", "run_s": 1.0, "not_run": {"a peer": "no compiler"}}
    r["limits"] |= {"matmul_bf16_gflops": 700e3, "matmul_fp32_gflops": 50e3, "h2d_gbps": 50.0, "d2h_gbps": 52.0}
    r["results"] = [
        result(), result(precision="fp32", p50_us=4000.0), result(precision="fp32", p50_us=1.0, passed=False),
        result(precision="fp16", p50_us=1.0), result(batch=1 << 16, p50_us=500.0),
        result(scorer="torch-compile", peer=True, p50_us=3000.0),
        result(scorer="torch-compile", peer=True, batch=1 << 14, p50_us=2600.0 / 16),
        result(scorer="torch-compile", peer=True, batch=1 << 14, p50_us=1.0, timing="call"),
        result(scorer="torch-compile-max", peer=True, p50_us=2700.0, passed=False),
        result(scorer="torch-compile", peer=True, precision="fp32", p50_us=5000.0),
        result(batch=1, precision="fp32", timing="graph-device", p50_us=9.0),
        result(batch=1, precision="fp32", timing="graph", p50_us=5.0),
        result(batch=1, precision="fp32", timing="call", p50_us=30.0, p99_us=90.0),
        result(batch=1, precision="bf16", timing="call", p50_us=20.0, p99_us=30.0),
    ]
    flow = {"kernel": "triton", "precision": "bf16", "batch": 1 << 20, "where": "device", "us": 1.0, "passed": True}
    r["throughput"] = [flow | {"events_per_s": 0.5 * 700e12 / 590_336}, flow | {"events_per_s": 1e12, "passed": False},
                       flow | {"precision": "tf32x3", "events_per_s": 1.5 * 2**18 / 5e-3},
                       flow | {"precision": "fp16", "events_per_s": 1e12},
                       flow | {"where": "host", "events_per_s": 0.9 * 50e9 / 256}]
    step = {"precision": "fp32", "batch": 512, "rel_gradient": 1e-7, "passed": True}
    r["training"] = [step | {"method": m, "step_us": us} for m, us in
                     (("double backward", 700.0), ("analytic compiled", 350.0), ("fused", 100.0))]
    r["tune"] = [{"precision": "bf16", "batch": 64, "tile": {"a": 2}, "table_tile": {"a": 1}, "gain": 1.2}]
    return r


def test_the_figures_that_matter(report, capsys):
    report = gpu.complete(report)
    found = {f.what: (None if f.value is None else round(f.value, 3), f.verdict) for f in figures(report)}
    assert found == {
        "share of the bf16 matrix rate": (0.5, "yes"),
        "against torch.compile in bf16": (round(0.5 * 700e12 / 590_336 * 2.6e-3 / 2**18, 3), "dream"),
        "against torch.compile in fp32": (1.5, "yes"),
        "batch 1, graph replay on the device, p50": (9.0, "dream"),
        "batch 1, NumPy to NumPy, p50": (30.0, "yes"),
        "batch 1, NumPy to NumPy, p99": (90.0, "NO"),
        "host to host, share of the bus": (0.9, "yes"),
        "DSM step, against double backward": (7.0, "dream"),
        "DSM step, against the fastest of PyTorch": (3.5, "yes"),
    }
    gpu.print_report(report, Path("out.json"))
    shown = capsys.readouterr().out.splitlines()
    assert len(shown[-10].split()) == 4
    assert shown[-9].split()[-8:-4] == ["50%", "40%", "60%", "yes"]
    assert "not run: a peer: no compiler" in shown
    assert any(line.startswith("tune: bf16, batch 64: {'a': 2} is 1.20x") for line in shown)
    assert any("triton fp32, batch 262144, device: too far from float64" in line for line in shown)
    assert report["results"][0]["share_of_limit"] == pytest.approx(590_336 * 2**18 / 1e-3 / 700e12)
    assert report["results"][0]["within_budget"] is True


def test_figures_that_were_not_measured_are_said_to_be_missing():
    empty = gpu.complete(gpu.empty_report(gpu.Architecture("energy", 64), 1))
    assert all(f.value is None and f.verdict == "-" for f in figures(empty))
    assert "NO" not in table(figures(empty))
    assert [Figure("", v, 2, 4, "x").verdict for v in (1.9, 2.0, 4.0)] == ["NO", "yes", "dream"]
