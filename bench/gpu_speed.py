"""The stages of `bench.gpu` that time the fused kernel alone: latency of a call, and throughput."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from bench.gpu_device import DEVICE, PRECISIONS, Absent, Setting, attempt, errors, on_device, sample, scorers
from bench.gpu_isolate import tell
from bench.peers import ENERGY_AND_SCORE

CALL, ON_DEVICE, GRAPH, GRAPH_DEVICE = "call", "device", "graph", "graph-device"


def row(name: str, peer: bool, batch: int, precision: str, timing: str, quantiles: dict, agreement: dict,
        first_call_s: float | None = None) -> None:
    """Tell one line of `results`; what follows from its times the parent adds."""
    tell("results", {"scorer": name, "peer": peer, "device": "cuda:0", "threads": 1, "task": ENERGY_AND_SCORE,
                     "batch": batch, "precision": precision, "timing": timing, "first_call_s": first_call_s}
         | {q: quantiles[q] for q in ("p50_us", "p90_us", "p99_us", "p999_us")} | agreement)


def latency(setting: Setting, _: str) -> None:
    """One call: NumPy to NumPy; on the device; and as a CUDA graph, with and without the host's part."""
    precisions = setting.pick(PRECISIONS, ("fp32", "bf16"), ("fp32",))
    usual, ours = scorers(setting, precisions, "raise"), scorers(setting, precisions)
    for batch in setting.pick((1, 8, 64, 512, 4096), (1, 64, 4096), (1,)):
        for precision in ours:
            what = f"latency of {setting.kernel} {precision}, batch {batch}"
            if setting.has_time(what):
                attempt(what, lambda p=precision, n=batch: _latency(setting, usual[p], ours[p], p, n))


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Triton finds nothing on disk."""
    with tempfile.TemporaryDirectory(prefix="fused-ebm-triton-") as cache:
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            yield
        finally:
            os.environ.pop("TRITON_CACHE_DIR") if before is None else os.environ.update(TRITON_CACHE_DIR=before)


def _latency(setting: Setting, usual: Any, scorer: Any, precision: str, batch: int) -> None:
    x, device = setting.events, setting.device
    cold = batch == 1 and setting.kernel == "triton"  # the compiler's time is told once; Hopper's is ten times as long
    with _nothing_compiled() if cold else nullcontext():
        start = time.perf_counter()
        usual.energy_and_score(x[:batch])
        first_s = time.perf_counter() - start if cold else None
    parts = [usual.energy_and_score(x[i:i + batch]) for i in range(0, len(x), batch)]
    agreement = errors(tuple(np.concatenate(p) for p in zip(*parts)), setting.truth, precision)
    there = torch.from_numpy(x[:batch].copy()).to(device.where)
    out = torch.full((batch,), torch.nan, device=device.where), torch.full_like(there, torch.nan)
    calls: dict[str, Callable[[Any], Any]] = {CALL: lambda _: usual.energy_and_score(x[:batch])}

    def resident() -> Any:
        return scorer.energy_and_score(there, out=out)

    resident()
    calls[ON_DEVICE + DEVICE] = on_device(device, resident)
    if replay := attempt(f"CUDA graph of {setting.kernel} {precision}, batch {batch}", lambda: device.replay(resident)):
        replay()
        device.sync()
        agreement["passed"] &= errors(out, setting.truth, precision, slice(batch))["passed"]

        def waited(_: Any) -> None:
            replay()
            device.sync()

        calls |= {GRAPH: waited, GRAPH_DEVICE + DEVICE: on_device(device, replay)}
    for name, quantiles in sample(calls, 0.6 * setting.sample_s).items():
        timing = name.removesuffix(DEVICE)
        row(setting.kernel, False, batch, precision, timing, quantiles, agreement, first_s if timing == CALL else None)


def throughput(setting: Setting, _: str) -> None:
    """Section "throughput": on the device with buffers in rotation, larger together than its cache; over the bus."""
    precisions = setting.pick(("bf16", "fp32", "tf32", "tf32x3", "fp16"), ("bf16", "fp32"), ("fp32",))
    ours, usual = scorers(setting, precisions), scorers(setting, precisions, "raise")
    first, rest = setting.pick(((1 << 20, 1 << 18), (1 << 22, 1 << 16, 1 << 14, 1 << 12, 1 << 10, 32, 1)),
                               ((1 << 20, 1 << 16), ()), ((8,), (1,)))
    on_bus = setting.pick((1 << 20, 1 << 18, 1 << 16), (1 << 20,), (8,))
    two = [p for p in ("bf16", "fp32") if p in usual]  # the bus is the same for all
    todo = [(measure, batch, p) for measure, batches, among in (  # what the figures need comes first
        (_resident, first, ours), (_over_the_bus, on_bus, two), (_resident, rest, ours), (_pageable, on_bus, two))
        for batch in batches for p in among]
    for measure, batch, precision in todo:
        what = f"throughput{measure.__name__}, {setting.kernel} {precision}, batch {batch}"
        if setting.has_time(what):
            ready = ours if measure is _resident else usual
            attempt(what, lambda m=measure, s=ready[precision], p=precision, n=batch: m(setting, s, p, n))


def _rate(setting: Setting, scorer: Any, precision: str, batch: int, where: str, us: float, energy: torch.Tensor,
          score: torch.Tensor, **more: Any) -> None:
    """A line; the first and the last events are checked."""
    n, agreement = min(batch, len(setting.events)), {}
    for part in (slice(0, n), slice(batch - n, batch)):
        which = np.arange(batch)[part] % len(setting.events)
        found = errors((energy[part], score[part]), setting.truth, precision, which)
        agreement = found if not agreement or not found["passed"] else agreement
    tell("throughput", {"kernel": setting.kernel, "precision": precision, "batch": batch, "where": where, "us": us,
                        "events_per_s": batch / us * 1e6} | agreement | more)


def _repeated(setting: Setting, batch: int) -> np.ndarray:
    return np.resize(setting.events, (batch, setting.architecture[0]))


def _resident(setting: Setting, scorer: Any, precision: str, batch: int) -> None:
    device, d = setting.device, setting.architecture[0]
    nbytes = 4 * batch * (2 * d + 1)
    buffers = max(2, -(-2 * device.l2() // nbytes))
    if buffers * nbytes > 0.7 * device.free():
        raise Absent(f"{buffers * nbytes >> 20} MiB of buffers do not fit on the device")
    x = setting.resident(batch).expand(buffers, -1, -1).contiguous()
    energy = torch.full((buffers, -(-batch // 4) * 4), torch.nan, device=device.where)[:, :batch]  # each 16 bytes on
    score = torch.full_like(x, torch.nan)
    turns = itertools.cycle(range(buffers))

    def call() -> None:
        i = next(turns)
        scorer.energy_and_score(x[i], out=(energy[i], score[i]))

    call()
    timed = sample({f"it{DEVICE}": on_device(device, call, 8)}, setting.sample_s)
    _rate(setting, scorer, precision, batch, "device", timed[f"it{DEVICE}"]["p50_us"], energy[0], score[0],
          buffers=buffers)


def _pinned(setting: Setting, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pinned, d = setting.device.pinned, setting.architecture[0]
    return (pinned(batch, d).copy_(torch.from_numpy(_repeated(setting, batch))), pinned(batch).fill_(torch.nan),
            pinned(batch, d).fill_(torch.nan))


def _over_the_bus(setting: Setting, scorer: Any, precision: str, batch: int) -> None:
    """The call that people make, on NumPy arrays in pinned memory."""
    _host_to_host(setting, scorer, precision, _pinned(setting, batch), "host")


def _pageable(setting: Setting, scorer: Any, precision: str, batch: int) -> None:
    """The same on plain arrays, which go by way of pinned buffers."""
    x, energy, score = (torch.from_numpy(a.numpy().copy()) for a in _pinned(setting, batch))
    _host_to_host(setting, scorer, precision, (x, energy, score), "pageable")


def _host_to_host(setting: Setting, scorer: Any, precision: str, tensors: tuple[torch.Tensor, ...], where: str) -> None:
    x, energy, score = tensors
    arrays, out = x.numpy(), (energy.numpy(), score.numpy())
    timed = sample({"it": lambda _: scorer.energy_and_score(arrays, out=out)}, setting.sample_s)
    _rate(setting, scorer, precision, len(x), where, timed["it"]["p50_us"], energy, score)
