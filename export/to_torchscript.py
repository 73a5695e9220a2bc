"""TorchScript: traced and frozen, for libtorch and Triton Inference Server's pytorch backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ebm.bundle import Bundle
from export.score_graph import ExportGraph, Options, example_events, without_notices

FILE = "model.pt"
WARM_UP_CALLS = 20


def export(bundle: Bundle, directory: Path, options: Options) -> dict:
    """Write model.pt into `directory`; the entry of the manifest, with what the first calls at batch 1 cost."""
    x = example_events(bundle, 1)
    with without_notices(), torch.inference_mode():
        torch.jit.save(traced(bundle, options), directory / FILE)
        module = torch.jit.load(directory / FILE)
        first = milliseconds(lambda: module(x), WARM_UP_CALLS)
        later = milliseconds(lambda: module(x), WARM_UP_CALLS)
    return {"file": FILE, "first_call_ms": first[0], f"first_{WARM_UP_CALLS}_calls_ms": sum(first),
            "later_call_ms": sorted(later)[WARM_UP_CALLS // 2]}


def traced(bundle: Bundle, options: Options, device: str = "cpu") -> torch.jit.ScriptModule:
    """The frozen trace: (batch, D) float32 with a free batch, on `device` -> a tuple as in `options.outputs`."""
    graph, x = ExportGraph(bundle, options).to(device), example_events(bundle, 7).to(device)
    with torch.inference_mode(), without_notices():
        return torch.jit.freeze(torch.jit.trace(graph, x))


def milliseconds(call: Callable[[], object], calls: int) -> list[float]:
    """How long each of some calls takes."""
    took = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        took.append(1e3 * (time.perf_counter() - start))
    return took
