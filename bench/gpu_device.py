"""What the stages of `bench.gpu` share: their sizes, the device and its clock, models, events, and the Scorers.

Imports NumPy, torch and Triton only. In a dry run everything happens on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from bench.contenders import sentence
from bench.gpu_isolate import tell
from bench.timer import interleave
from ebm.bundle import Bundle
from ebm.preprocess import Preprocessing
from kernels.reference import ReferenceScorer
from kernels.tolerances import CHECK_EVENTS, TOLERANCES, relative_rms_energy, relative_rms_score

PRECISIONS = ("fp32", "tf32x3", "tf32", "fp16", "bf16")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # of the matrix products; float32 elsewhere
DEVICE = " (device)"  # mark of a call that tells its own seconds
MARKER = -999.0
_AHEAD_CYCLES = (4_000_000, 16_000_000, 64_000_000)  # some 2, 8, 32 ms that the GPU waits while the host enqueues


class Absent(RuntimeError):
    """What is not there, or does not fit, and need not."""


@dataclass(frozen=True)
class Setting:
    """How much a stage may do, and with which of our kernels. `dry`: tiny sizes, on the CPU."""

    seconds: float
    quick: bool = False
    dry: bool = False
    seed: int = 0
    kernel: str = "triton"
    started: float = field(default_factory=time.perf_counter)

    def left(self) -> float:
        """Seconds until the stage should have ended by itself."""
        return self.started + 0.9 * self.seconds - time.perf_counter()

    def has_time(self, what: str, seconds: float = 6.0) -> bool:
        """Whether so many seconds are left, a compiler's included; `what` is told to be not run where they are not."""
        enough = self.left() >= seconds
        if not enough:
            tell("not_run", {what: "no time left"})
        return enough

    def pick(self, full: Any, quick: Any, dry: Any) -> Any:
        """The size for this run."""
        return dry if self.dry else quick if self.quick else full

    @property
    def sample_s(self) -> float:
        """Seconds of samples for one number."""
        return self.pick(0.4, 0.15, 0.01)

    @property
    def architecture(self) -> tuple[int, int, int]:
        """Features, width and layers of the model that is timed."""
        return self.pick((64, 256, 2), (64, 256, 2), (5, 64, 1))

    @cached_property
    def device(self) -> Device:
        return Device(self.dry)

    @cached_property
    def bundle(self) -> Bundle:
        return model(*self.architecture)

    @cached_property
    def events(self) -> np.ndarray:
        """The events that are timed and checked."""
        return events(self.pick(CHECK_EVENTS, CHECK_EVENTS, 16), self.architecture[0], self.seed)

    @cached_property
    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        """Their energies and scores in float64."""
        return ReferenceScorer(self.bundle).energy_and_score(self.events)

    def resident(self, n: int) -> torch.Tensor:
        """The events over and over, (n, D) on the device."""
        x = torch.from_numpy(self.events).to(self.device.where)
        return x.repeat(-(-n // len(x)), 1)[:n].contiguous()


class Device:
    """The GPU, or, in a dry run, a CPU that pretends."""

    def __init__(self, dry: bool):
        self.dry, self.where = dry, torch.device("cpu" if dry else "cuda:0")

    def sync(self) -> None:
        """Wait until all is done."""
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], repeats: int = 4) -> list[float]:
        """Seconds on the device of each of some calls back to back; what the host needs, up to 32 ms, is hidden.

        Where the first of them began before all were enqueued, the device may have waited for the host: once more,
        with a longer head start.
        """
        if self.dry:
            start = time.perf_counter()
            call()
            return [time.perf_counter() - start]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        for cycles in _AHEAD_CYCLES:
            torch.cuda._sleep(cycles)
            marks[0].record()
            for mark in marks[1:]:
                call()
                mark.record()
            began = marks[0].query()
            marks[-1].synchronize()
            if not began:
                break
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    def replay(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph: everything it reads and writes stays where it is."""
        if self.dry:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()
        return lambda kept=kept: graph.replay()

    def pinned(self, *shape: int) -> torch.Tensor:
        """Memory of the host that the bus copies from directly."""
        return torch.empty(shape, pin_memory=not self.dry)

    def free(self) -> int:
        """Free bytes on the device."""
        if self.dry:
            return 1 << 30
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def l2(self) -> int:
        """Bytes of its last cache."""
        return 1 << 12 if self.dry else torch.cuda.get_device_properties(0).L2_cache_size


def sample(calls: dict[str, Callable[[Any], Any]], seconds: float) -> dict[str, dict[str, float | None]]:
    """Quantiles of each call in microseconds, all in turns; a name that ends in DEVICE tells its own seconds."""
    timings = interleave(calls, [None], seconds, tells_time=DEVICE)
    return {name: t.quantiles_us() | {"least_us": min(t.samples_ns) / 1e3} for name, t in timings.items()}


def on_device(device: Device, call: Callable[[], Any], repeats: int = 4) -> Callable[[Any], list[float]]:
    """For `sample`, under a name that ends in DEVICE."""
    return lambda _: device.seconds(call, repeats)


def model(features: int, hidden: int, layers: int, seed: int = 0) -> Bundle:
    """Random weights; all transforms, imputation of every other feature, and a constant feature."""
    rng, j = np.random.default_rng((seed, features)), np.arange(features)
    impute = np.where(j % 2, rng.normal(size=features), np.nan)
    p = Preprocessing(marker=np.where(j % 2, MARKER, np.nan), impute=impute, transform=j % 3,
                      scale=rng.uniform(0.5, 2, features), mean=rng.normal(size=features) / 2,
                      inv_std=np.where(j == 4, 0, rng.uniform(0.5, 2, features)))
    return Bundle.random(features, hidden, layers, seed=seed + features, preprocessing=p)


def events(n: int, features: int, seed: int, missing: float = 0.1) -> np.ndarray:
    """Raw events (n, D), heavy tails where a transform tames them, some values missing where they are imputed."""
    rng, j = np.random.default_rng((seed, n, features)), np.arange(features)
    x = rng.standard_normal((n, features), np.float32)
    x[:, j % 3 > 0] *= np.exp(rng.standard_normal((n, (j % 3 > 0).sum()), np.float32))
    gone = (rng.random(x.shape) < missing) & (j % 2 == 1)
    x[gone] = np.where(rng.random(gone.sum()) < 0.5, np.nan, MARKER)
    return x


def scorer(bundle: Bundle, precision: str, kernel: str = "triton", **options: Any) -> Any:
    """The TritonScorer of a kernel; Absent where that has no such precision, or does not take the model."""
    from kernels.triton_gpu import TritonScorer

    try:
        return TritonScorer(bundle, precision=precision, kernel=kernel, **options)
    except ValueError as e:
        if "precision is" in str(e) or "cannot run" in str(e):
            raise Absent(sentence(e)) from e
        raise


def scorers(setting: Setting, among: tuple[str, ...] = PRECISIONS, on_nonfinite: str = "propagate") -> dict[str, Any]:
    """Precision -> Scorer of the timed model, for all that there are; unless they raise, nothing waits for the GPU."""
    found = {}
    for precision in among:
        attempt(f"{setting.kernel} {precision}", lambda p=precision: found.update(
            {p: scorer(setting.bundle, p, setting.kernel, on_nonfinite=on_nonfinite)}))
    return found


def attempt(what: str, call: Callable[[], Any], ours: bool = True) -> Any:
    """The result; where it raises, None, and the reason among what was not run. Of ours, only what is absent may."""
    try:
        return call()
    except Exception as e:  # one that breaks is a result, not the end of the stage
        tell("not_run", {what: sentence(e)})
        if ours and not isinstance(e, Absent):
            tell("broken", what)
        return None


def tolerance(precision: str, n: int) -> float:
    """The table is about the RMS over 4096 events: a few of them may lie further out."""
    return TOLERANCES[precision] * (4 if n < 1000 else 1)


def errors(found: tuple[Any, Any], truth: tuple[np.ndarray, np.ndarray], precision: str,
           which: Any = slice(None)) -> dict[str, Any]:
    """Distance of energies and scores from the true ones at `which`, and whether the precision allows it."""
    energy, score = (np.asarray(f.cpu() if isinstance(f, torch.Tensor) else f, np.float64) for f in found)
    e = relative_rms_energy(energy, truth[0][which], float(truth[0].std()))  # of all: a few have no spread
    s = relative_rms_score(score, truth[1][which], float(np.sqrt(np.mean(truth[1]**2))))
    return {"rel_rms_energy": e, "rel_rms_score": s, "passed": bool(max(e, s) <= tolerance(precision, len(energy)))}


def matmul_mode(precision: str) -> None:
    """How torch multiplies float32: on the tensor cores in "tf32", else in full."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def product_shapes(features: int, hidden: int, layers: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of the matrix products of energy and score: one per layer and direction."""
    up = [(features, hidden)] + [(hidden, hidden)] * layers
    return up + [(b, a) for a, b in reversed(up)]
