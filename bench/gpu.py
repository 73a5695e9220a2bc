"""Everything that is to be known about the fused kernel on one NVIDIA GPU, in nine minutes: `python -m bench.gpu`."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from bench import machine as host
from bench.gpu_isolate import FAILED, OK, SKIPPED, TIMED_OUT, Outcome, run_together
from bench.gpu_summary import figures, table
from ebm.bundle import Architecture
from ebm.command import commit, plain, whole_file

ABOUT = """
Needs Python 3.11, numpy, torch and triton, and nothing of this project installed: PYTHONPATH=. python3 -m bench.gpu

The stages, each in a process of its own with a limit on its time: one that fails or hangs is recorded with its
reason, and the next one goes on. What they found is kept in DIR/<name of the GPU>.json after every stage.
  conformance   every precision on fresh random events against float64, levels, finite differences, NaN
  memcheck      compute-sanitizer, where there is one
  hopper        the kernel for sm_90: conformance, beside memcheck; throughput, latency
  ceilings      matrix products in bf16, fp16, tf32, fp32; the device's memory; the bus
  throughput    one event to four million, on the device; from 65,536 over the bus
  latency       a call: NumPy to NumPy, on the device, as a CUDA graph; of one event, the compiler's seconds, too
  training      a step of denoising score matching
  peers         eager and compiled PyTorch in the same precisions, and the matrix products alone
  tune          tiles around the table's: prints what would be better
The last lines are the figures that matter beside those that are wanted.
Exit code: 0; 1 where numbers were wrong or a stage failed; 2 without a GPU that can be used.
"""
# As in bench.driver, which imports what may be missing here; tests hold the two together.
RESULT_FIELDS = (
    "scorer", "peer", "device", "threads", "task", "batch", "p50_us", "p90_us", "p99_us", "p999_us", "events_per_s",
    "rel_rms_energy", "rel_rms_score", "passed", "within_budget", "share_of_limit", "limit", "first_call_s",
    "precision", "timing")
BUDGET_US = 5_000
LISTS = ("results", "tune", "throughput", "training", "conformance")
CONFORMANCE = tuple(f"conformance:{p}" for p in ("fp32", "tf32x3", "tf32", "fp16", "bf16"))
HOPPER = ("hopper:conformance:bf16", "hopper:conformance:fp16")
_RATE = {"tf32x3": "tf32"}  # precision -> the matrix products that bound it, where it is another


@dataclass(frozen=True)
class Stage:
    """`names` run side by side, as long as they take, but at most so many seconds; 0: not at all.

    With less than `least` left they do not start.
    """

    names: tuple[str, ...]
    seconds: float
    quick_seconds: float
    least: float = 20


MACHINE = Stage(("machine",), 90, 60)
# First what is about being right, then the figures, then the rest, which may find no time left.
STAGES = (Stage(CONFORMANCE, 150, 50), Stage(("memcheck", *HOPPER), 100, 0, 40), Stage(("ceilings",), 40, 20),
          Stage(("throughput",), 80, 25), Stage(("hopper:throughput",), 60, 0), Stage(("latency",), 60, 25),
          Stage(("training",), 80, 35), Stage(("peers",), 140, 40, 25), Stage(("hopper:latency",), 50, 0),
          Stage(("tune",), 85, 0, 40), Stage(("peers:max",), 80, 0, 70))
NOT_DRY = ("conformance:tf32x3", "conformance:tf32", "conformance:fp16", "memcheck", *HOPPER, "hopper:throughput",
           "hopper:latency", "tune")  # nothing on a CPU
LIMIT_S, QUICK_LIMIT_S = 520.0, 118.0
BETTER = 1.02  # than the tile of the table; less is noise


def empty_report(model: Architecture, seed: int) -> dict:
    """The report before any stage."""
    about = host.machine() | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "load": "idle", "not_run": {}}
    described = {"source": "random weights", "seed": seed, "kind": model.kind, "input_dim": model.input_dim,
                 "hidden_dim": model.hidden_dim, "n_layers": model.n_layers, "n_sigmas": model.n_sigmas,
                 "events": "random"}
    return {"machine": about, "versions": host.versions(), "commit": commit(), "limits": {"products_us": {}},
            "model": described, "results": [], "tune": [], "throughput": [], "training": [], "conformance": [],
            "stages": {}}


def add(report: dict, name: str, outcome: Outcome) -> None:
    """What a stage found, and how it ended."""
    report["stages"][name] = {"status": outcome.status, "reason": outcome.reason, "seconds": outcome.seconds,
                               "broken": [value for section, value in outcome.items if section == "broken"]}
    if outcome.status == SKIPPED or _only_slow(name, outcome.status):
        report["machine"]["not_run"][f"stage {name}"] = outcome.reason
    for section, value in outcome.items:
        if section in LISTS:
            report[section].append(value)
        elif section == "not_run":
            report["machine"]["not_run"] |= value
        elif section != "broken":
            for key, found in value.items():
                old = report[section].get(key)
                report[section][key] = old | found if isinstance(old, dict) else found


def _only_slow(name: str, status: str) -> bool:
    """torch.compile takes as long as it takes."""
    return status == TIMED_OUT and name.startswith("peers")


def complete(report: dict) -> dict:
    """The report with what follows from its times and from the ceilings."""
    m, limits = report["model"], report["limits"]
    a = Architecture(m["kind"], m["input_dim"], m["hidden_dim"], m["n_layers"], m["n_sigmas"])
    flop, nbytes = host.flop_per_event(a, True), (4 * a.input_dim, 4 * a.input_dim + 4)

    def share(precision: str, per_s: float) -> tuple[str, float | None]:
        name = f"matmul_{_RATE.get(precision, precision)}_gflops"
        return name, flop * per_s / 1e9 / limits[name] if limits.get(name) else None

    results = []
    for r in report["results"]:
        r = dict(r, events_per_s=r["batch"] * 1e6 / r["p50_us"] if r["p50_us"] else None)
        waited = r["p99_us"] or r["p90_us"] or r["p50_us"]
        r["within_budget"] = bool(r["passed"] and waited and waited / r["batch"] < BUDGET_US)
        r["limit"], r["share_of_limit"] = share(r["precision"], r["events_per_s"] or 0)
        results.append({name: r[name] for name in RESULT_FIELDS})
    flows = []
    for t in report["throughput"]:
        t = dict(t, tflops=flop * t["events_per_s"] / 1e12)
        t["limit"], t["share_of_limit"] = share(t["precision"], t["events_per_s"])
        rates = limits.get("h2d_gbps"), limits.get("d2h_gbps")
        if t["where"] != "device" and all(rates):  # both directions at once, the slower one decides
            t["share_of_bus"] = t["events_per_s"] * max(n / r / 1e9 for n, r in zip(nbytes, rates))
        flows.append(t)
    report = report | {"results": results, "throughput": flows}
    return report | {"summary": [asdict(f) | {"reached": f.verdict} for f in figures(report)]}


def failed(report: dict) -> list[str]:
    """What went wrong, in words."""
    bad = [f"stage {n}: {s['status']}, {s['reason']}" for n, s in report["stages"].items()
           if s["status"] in (FAILED, TIMED_OUT) and not _only_slow(n, s["status"])]
    bad += [f"stage {n}: {what}: {report['machine']['not_run'][what]}" for n, s in report["stages"].items()
            for what in s["broken"]]
    bad += [f"{c['kernel']} {c['precision']} {c['model']}, {c['check']}, n = {c['n']}: not within {c['bound']:g}"
            for c in report["conformance"] if not c["passed"]]
    bad += [f"{r['scorer']} {r['precision']}, batch {r['batch']}, {r['timing']}: too far from float64"
            for r in report["results"] if not r["peer"] and not r["passed"]]
    bad += [f"{t['kernel']} {t['precision']}, batch {t['batch']}, {t['where']}: too far from float64"
            for t in report["throughput"] if not t["passed"]]
    return bad + [f"training step of kernels.autograd, {t['precision']}, batch {t['batch']}: wrong gradients"
                  for t in report["training"] if t["method"] == "fused" and not t["passed"]]


def _version(package: str) -> tuple[int, ...]:
    return tuple(map(int, version(package).split(".")[:2]))


def measure(out: Path, quick: bool, dry: bool, only: list[str] | None = None,
            say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)) -> tuple[dict, Path]:
    """Run the stages, write the report after each; RuntimeError, with the reason, where no GPU can be used."""
    # Sixteen events of a tiny model have no spread to rely on: a dry run is the same every time.
    start, seed = time.perf_counter(), 0 if dry else secrets.randbelow(2**31)
    if dry and _version("numpy") >= (2, 4) and _version("triton") < (3, 7):
        raise RuntimeError("a dry run needs Triton's interpreter, which before 3.7 cannot run with NumPy 2.4 or newer")
    limit = QUICK_LIMIT_S if quick else LIMIT_S
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(host.ROOT), os.environ.get("PYTHONPATH"))))}
    if dry:
        environment["TRITON_INTERPRET"] = "1"

    def run(stage: Stage) -> dict[str, Outcome]:
        left = limit - (time.perf_counter() - start)
        seconds = min(stage.quick_seconds if quick else stage.seconds, left)
        if seconds < stage.least:
            reason = "not part of a quick run" if quick and not stage.quick_seconds else "no time left"
            return {name: Outcome(SKIPPED, reason, 0.0) for name in stage.names}
        say(f"[{time.perf_counter() - start:4.0f} s] {', '.join(stage.names)} (at most {seconds:.0f} s)")
        setting = json.dumps({"seconds": seconds, "quick": quick, "dry": dry, "seed": seed})
        threads = max(1, len(os.sched_getaffinity(0)) // len(stage.names))  # more of them would wait for each other
        return run_together({name: [sys.executable, "-m", "bench.gpu_stages", name, setting] for name in stage.names},
                            seconds, {"OMP_NUM_THREADS": str(threads)} | environment)

    model = Architecture("energy", 5, 64, 1) if dry else Architecture("energy", 64)
    report = empty_report(model, seed)
    found = run(MACHINE)["machine"]
    if found.status != OK:
        raise RuntimeError(found.reason)
    add(report, "machine", found)
    name = " ".join([report["machine"]["gpu"], *(["quick"] if quick else []), *(only or [])])
    path = out / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    for stage in STAGES:
        names = tuple(n for n in stage.names if (not only or n.partition(":")[0] in only)
                      and not (dry and n in NOT_DRY))
        for name, outcome in (run(replace(stage, names=names)) if names else {}).items():
            add(report, name, outcome)
            if outcome.status != OK:
                say(f"         {name}: {outcome.status}: {outcome.reason}")
        report["machine"]["run_s"] = round(time.perf_counter() - start, 1)
        with whole_file(path) as f:
            f.write((json.dumps(plain(complete(report)), indent=1, allow_nan=False) + "\n").encode())
    return complete(report), path


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__, epilog=ABOUT,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=host.ROOT / "bench" / "results", metavar="DIR",
                        help="where the JSON goes (bench/results)")
    parser.add_argument("--quick", action="store_true",
                        help="two minutes: fewer sizes, no sanitizer, no kernel for Hopper, no tuning")
    parser.add_argument("--only", metavar="STAGE", action="append", help="this stage alone; may be repeated",
                        choices=sorted({n.partition(":")[0] for s in STAGES for n in s.names}))
    parser.add_argument("--dry-run", action="store_true",
                        help="the same code at tiny sizes on the CPU, in Triton's interpreter: its times mean nothing")
    given = parser.parse_args(arguments)
    if missing := [package for package in ("numpy", "torch", "triton") if find_spec(package) is None]:
        print(f"error: {sys.executable} has no {' and no '.join(missing)}: give another one, as in "
              "'make gpu PYTHON=.venv/bin/python'", file=sys.stderr)
        return 2
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        report, path = measure(given.out, given.quick, given.dry_run, given.only)
    except (ImportError, OSError, RuntimeError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print_report(report, path)
    return 1 if failed(report) else 0


def print_report(report: dict, path: Path) -> None:
    """What people want to know first stands last."""
    for what, reason in report["machine"]["not_run"].items():
        print(f"not run: {what}: {reason}")
    gains = [r for r in report["tune"] if r["gain"] and r["gain"] > BETTER and r["tile"] != r["table_tile"]]
    for r in sorted(gains, key=lambda r: -r["gain"])[:8]:
        changed = {k: v for k, v in r["tile"].items() if v != r["table_tile"][k]}
        print(f"tune: {r['precision']}, batch {r['batch']}: {changed} is {r['gain']:.2f}x the table's tile")
    for line in failed(report):
        print(f"problem: {line}")
    where = report["machine"]
    print(f"{where['gpu']}, driver {where['driver']}, {where['run_s']:.0f} s, commit {report['commit']}: {path}")
    print(table(figures(report)))


if __name__ == "__main__":
    sys.exit(main())
