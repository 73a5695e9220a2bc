"""The stages of `bench.gpu` that are about the device and about being right, and where each stage's process starts:

    python -m bench.gpu_stages STAGE[:ARGUMENT] '{"seconds": 60, "quick": false, "dry": false, "seed": 1}'
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench import gpu_peers, gpu_speed, gpu_tune
from bench.gpu_device import (
    DEVICE,
    Absent,
    Setting,
    events,
    matmul_mode,
    model,
    on_device,
    sample,
    scorer,
    tolerance,
)
from bench.gpu_isolate import SKIPPED, tell
from ebm.bundle import Bundle, Threshold
from kernels.launch import chip
from kernels.reference import ReferenceScorer
from kernels.tiles import tiles_for
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score

EXACT = ("fp32", "tf32x3")  # as accurate as float32
_GUARD = 16  # rows before and after a result: a multiple of what keeps its address aligned


def machine(setting: Setting, _: str) -> None:
    """The GPU, or why there is none to be used."""
    if setting.dry:
        return tell("machine", {"gpu": "dry run", "capability": None, "driver": None})
    from kernels.triton_gpu import why_not

    if reason := why_not():
        return tell(SKIPPED, reason)
    p = torch.cuda.get_device_properties(0)
    tell("machine", {
        "gpu": p.name, "capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count,
        "gpu_memory_gib": round(p.total_memory / 2**30, 1), "l2_mib": p.L2_cache_size / 2**20,
        "cuda": torch.version.cuda, "driver": _driver(), "compiler": next(filter(None, map(
            shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))), None),
        "clocks_power": _smi("clocks.max.sm,clocks.max.mem,power.limit")})


def _smi(fields: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"], check=True,
                              capture_output=True, text=True, timeout=20).stdout.strip()
    return None


def _driver() -> str | None:
    if found := _smi("driver_version"):
        return found
    with suppress(OSError):
        if match := re.search(r"(\d+\.\d+(\.\d+)?)", Path("/proc/driver/nvidia/version").read_text()):
            return match[1]
    return None


def ceilings(setting: Setting, _: str) -> None:
    """What the device can do at most: matrix products, its memory, the bus. The fastest sample counts."""
    device, n = setting.device, setting.pick(8192, 8192, 64)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32),
                             ("fp32", torch.float32)):
        matmul_mode(precision)
        a, b = (torch.randn(n, n, device=device.where).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        us = _least(setting, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        tell("limits", {f"matmul_{precision}_gflops": 2 * n**3 / us / 1e3})
    matmul_mode("fp32")
    big = torch.ones(setting.pick(1 << 28, 1 << 28, 1 << 16), device=device.where)
    copy = torch.empty_like(big)
    tell("limits", {"copy_gbps": 2 * big.nbytes / _least(setting, lambda: copy.copy_(big)) / 1e3})
    bus = setting.pick(1 << 26, 1 << 26, 1 << 16)  # floats: 256 MB
    out_there, back_here, (there, here) = big[:bus], copy[:bus], (device.pinned(bus).zero_() for _ in range(2))
    nbytes = out_there.nbytes
    tell("limits", {"h2d_gbps": nbytes / _least(setting, lambda: out_there.copy_(there, non_blocking=True)) / 1e3})
    tell("limits", {"d2h_gbps": nbytes / _least(setting, lambda: here.copy_(back_here, non_blocking=True)) / 1e3})
    if not setting.dry:
        side = torch.cuda.Stream()

        def both() -> None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                here.copy_(back_here, non_blocking=True)
            out_there.copy_(there, non_blocking=True)
            torch.cuda.current_stream().wait_stream(side)

        tell("limits", {"duplex_gbps": 2 * nbytes / _least(setting, both) / 1e3})


def _least(setting: Setting, call: Callable[[], object]) -> float:
    timed = sample({f"it{DEVICE}": on_device(setting.device, call)}, setting.sample_s)
    return timed[f"it{DEVICE}"]["least_us"]


def conformance(setting: Setting, precision: str) -> None:
    """One precision on fresh random events, against float64, with results that were NaN before."""
    more = [(30, 200, 1)] if setting.kernel == "hopper" else [(30, 64, 2), (200, 512, 1)]
    for i, (features, hidden, layers) in enumerate(setting.pick([(64, 256, 2), *more], [(64, 256, 2)], [(5, 64, 1)])):
        bundle = model(features, hidden, layers, setting.seed)
        try:
            ours = scorer(bundle, precision, setting.kernel, on_nonfinite="propagate")
        except Absent as e:
            return tell(SKIPPED, str(e))
        case = _Case(setting, bundle, ours, precision)
        for n in setting.pick((1, 7, 64, 257, 4099, 40_009), (1, 64, 4099, 40_009), (1, 7)):  # rounds and a ragged rest
            case.agreement(n)
        once = () if i else (20_011,)
        for n in setting.pick((257, *once), (257,), (3,)):
            case.levels(n)
        case.differences(setting.pick(1024, 1024, 3))
        case.isolation(setting.pick(257, 257, 9))
        for n in setting.pick((4099, *once), (257,), (9,)):
            case.flags(n)


class _Case:
    """One model and precision; each check tells one line of the section "conformance"."""

    def __init__(self, setting: Setting, bundle: Bundle, ours: object, precision: str):
        a = bundle.architecture
        self.where, self.seed, self.d = setting.device.where, setting.seed, a.input_dim
        self.bundle, self.ours, self.precision, self.kernel = bundle, ours, precision, setting.kernel
        self.model = f"{a.input_dim}/{a.hidden_dim}/{a.n_layers}"
        self.reference = ReferenceScorer(bundle)
        energy, score = self.reference.energy_and_score(events(setting.pick(4096, 4096, 64), self.d, self.seed + 1))
        self.spread, self.score_rms = float(energy.std()), float(np.sqrt(np.mean(score**2)))

    def say(self, check: str, n: int, bound: float, **found: float) -> None:
        passed = all(v <= bound for v in found.values())  # NaN is no agreement
        tell("conformance", {"kernel": self.kernel, "precision": self.precision, "model": self.model, "check": check,
                             "n": n, "bound": bound, "passed": passed} | found)

    def poisoned(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Results full of NaN, with guards around them."""
        whole = torch.full((shape[0] + 2 * _GUARD, *shape[1:]), torch.nan, device=self.where)
        return whole, whole[_GUARD:-_GUARD]

    def agreement(self, n: int) -> None:
        """Energy and score at a level per event; nothing written beyond them; the way over the host the same."""
        x, k = events(n, self.d, self.seed), np.random.default_rng(self.seed + n).integers(0, self.bundle.n_levels, n)
        (e_whole, energy), (s_whole, score) = self.poisoned(n), self.poisoned(n, self.d)
        self.ours.energy_and_score(torch.from_numpy(x).to(self.where), torch.from_numpy(k).to(self.where),
                                   out=(energy, score))
        true_energy, true_score = self.reference.energy_and_score(x, k)
        energy, score = energy.cpu().numpy(), score.cpu().numpy()
        self.say("agreement", n, tolerance(self.precision, n),
                 energy=relative_rms_energy(energy, true_energy, self.spread),
                 score=relative_rms_score(score, true_score, self.score_rms))
        outside = sum(int((~torch.isnan(torch.cat((w[:_GUARD], w[-_GUARD:])))).sum()) for w in (e_whole, s_whole))
        self.say("written outside", n, 0, values=outside)
        host = self.ours.energy_and_score(x, k)
        self.say("host path", n, tolerance(self.precision, n),
                 energy=relative_rms_energy(host[0], true_energy, self.spread),
                 score=relative_rms_score(host[1], true_score, self.score_rms))

    def levels(self, n: int) -> None:
        x, (_, energies) = events(n, self.d, self.seed + 2), self.poisoned(n, self.bundle.n_levels)
        self.ours.energies(torch.from_numpy(x).to(self.where), out=energies)
        self.say("all levels", n, tolerance(self.precision, n), energy=relative_rms_energy(
            energies.cpu().numpy(), self.reference.energies(x), self.spread))

    def differences(self, n: int) -> None:
        """Finite differences of the energy along random directions; a coarse precision takes longer steps."""
        x = torch.from_numpy(events(n, self.d, self.seed + 3, missing=0)).to(self.where)
        direction = torch.randn_like(x) * x.abs().clamp_min(0.1)
        _, score = self.ours.energy_and_score(x)
        h = 2**-6 if self.precision in EXACT else 2**-3
        up, down = (self.ours.energy(x + step * direction).double() for step in (h, -h))
        slope, expected = ((up - down) / (2 * h)).cpu().numpy(), -(score * direction).double().sum(1).cpu().numpy()
        rounding = TOLERANCES[self.precision] * self.spread / h / float(np.sqrt(np.mean(slope**2)))
        self.say("finite differences", n, (5e-3 if h < 0.1 else 0.15) + rounding,
                 error=relative_rms_score(expected, slope))

    def isolation(self, n: int) -> None:
        """What is not finite in one event reaches no other, bit by bit."""
        x = events(n, self.d, self.seed + 4)
        clean, bad = self.ours.energy_and_score(torch.from_numpy(x).to(self.where)), np.isin(np.arange(n), (4, 6))
        for value in (np.nan, np.inf):
            damaged = x.copy()
            damaged[4, 2], damaged[6, 4] = value, value  # neither is imputed
            found = self.ours.energy_and_score(torch.from_numpy(damaged).to(self.where))
            hidden = int(torch.isfinite(found[0].cpu()[bad]).sum())
            reached = sum(int((f.cpu()[~bad] != c.cpu()[~bad]).sum()) for f, c in zip(found, clean))
            self.say(f"isolation of {value}", n, 0, hidden=hidden, reached=reached)

    def flags(self, n: int) -> None:
        """Flags of the kernel are its own energies above the threshold, strictly: that of an event is among them."""
        x = events(n, self.d, self.seed + 5)
        threshold = Threshold(float(self.ours.energy(x)[n // 2]), 0.5, 0.95, 1, 1, 1.0, False,
                              self.bundle.default_level)
        ours = scorer(replace(self.bundle, threshold=threshold), self.precision, self.kernel)
        for how, given in (("device", torch.from_numpy(x).to(self.where)), ("host", x)):
            wrong = int((np.asarray(ours.flag(given).cpu() if how == "device" else ours.flag(given))
                         != (np.asarray(ours.energy(x)) > threshold.energy)).sum())
            self.say(f"flags, {how}", n, 0, wrong=wrong)


def hopper(setting: Setting, argument: str) -> None:
    """Another stage, by the kernel for Hopper: "conformance:bf16", "throughput", "latency"."""
    from kernels.hopper import CC

    if setting.dry or torch.cuda.get_device_capability() != divmod(CC, 10):
        return tell(SKIPPED, f"the kernel for Hopper needs sm_{CC}")
    setting, (stage, _, precision) = replace(setting, kernel="hopper"), argument.partition(":")
    STAGES[stage](setting, precision)


def memcheck(setting: Setting, _: str) -> None:
    """compute-sanitizer over a small case."""
    tool = shutil.which("compute-sanitizer", path=os.environ.get("PATH", os.defpath) + ":/usr/local/cuda/bin")
    if tool is None:
        return tell(SKIPPED, "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or one block would hide a step beyond another
    done = subprocess.run([tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", __spec__.name,
                           "memcheck-case", json.dumps({"seconds": setting.seconds})], env=environment, text=True,
                          capture_output=True)
    said = done.stdout + done.stderr
    if "Device not supported" in said:  # under some hypervisors
        return tell(SKIPPED, "compute-sanitizer: device not supported")
    summary, first = re.search(r"ERROR SUMMARY: .*", said), re.search(r"=+ (Invalid .*|Program hit .*)", said)
    if done.returncode:
        raise RuntimeError(f"compute-sanitizer, status {done.returncode}: {summary[0] if summary else 'no summary'}"
                           f"{'; ' + first[1] if first else ''}")
    tell("machine", {"memcheck": summary[0] if summary else "no errors"})


def memcheck_case(setting: Setting, _: str) -> None:
    """What the sanitizer looks at."""
    for precision in ("fp32", "bf16"):
        ours = scorer(model(30, 64, 2), precision)
        ours.tile = tiles_for(chip(setting.device.where)[0], precision)[0]  # the smallest: several rounds
        for n in (37, 5000):
            x = torch.from_numpy(events(n, 30, 0)).to(setting.device.where)
            for k in (None, torch.zeros(n, dtype=torch.int32, device=x.device)):
                ours.energy_and_score(x, k)
            ours.energies(x)
    setting.device.sync()


STAGES: dict[str, Callable[[Setting, str], None]] = {
    "machine": machine, "ceilings": ceilings, "conformance": conformance, "latency": gpu_speed.latency,
    "throughput": gpu_speed.throughput, "peers": gpu_peers.peers, "training": gpu_peers.training,
    "hopper": hopper, "tune": gpu_tune.tune, "memcheck": memcheck, "memcheck-case": memcheck_case,
}

if __name__ == "__main__":
    name, _, argument = sys.argv[1].partition(":")
    STAGES[name](Setting(**json.loads(sys.argv[2])), argument)
