"""A short search around the committed tile: what would be better, for a person to put into the table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from bench.contenders import sentence
from bench.gpu_device import Setting, attempt, events, model, scorer
from bench.gpu_isolate import SKIPPED, tell
from kernels import triton_gpu, triton_kernel
from kernels.tolerances import TOLERANCES

PADDING = getattr(triton_kernel, "PADDING", 64)


def tune(setting: Setting, _: str) -> None:
    """Section "tune": a line per candidate, changed in one way from the table's; `gain` above 1 is faster."""
    if not hasattr(triton_gpu, "choose"):
        return tell(SKIPPED, "kernels.triton_gpu does not choose its tile by `choose`")
    large, small = setting.pick(1 << 18, 1 << 18, 8), 64
    wanted = [(p, large) for p in ("bf16", "fp32", "tf32", "tf32x3", "fp16")] + [(p, small) for p in ("bf16", "fp32")]
    searches = []
    for precision, batch in setting.pick(wanted, wanted[:1], [("fp32", large)]):
        table = attempt(f"tune {precision} {batch}", lambda p=precision, n=batch: _tile_of(setting, p, n))
        if table:
            searches.append((precision, batch, table, list(neighbours(table))[:setting.pick(None, 8, 1)]))
    compiled = _compile_all(setting, [(p, tile) for p, _, _, tiles in searches for tile in tiles])
    for search in searches:
        attempt(f"tune {search[0]} {search[1]}", lambda s=search: _search(setting, *s, compiled))


def _search(setting: Setting, precision: str, batch: int, table: Any, tiles: list[Any], compiled: set) -> None:
    x = torch.from_numpy(np.resize(setting.events, (batch, setting.architecture[0]))).to(setting.device.where)
    right, before = _time(setting, precision, table, x)
    for tile in tiles:
        found = {"precision": precision, "batch": batch, "tile": asdict(tile), "table_tile": asdict(table),
                 "us": None, "table_us": before, "gain": None, "problem": None}
        try:
            if (precision, tile) not in compiled or setting.left() < 0:
                raise TimeoutError("it could not be compiled, or not in time")
            given, found["us"] = _time(setting, precision, tile, x)
            error = max(float((g - r).double().square().mean().sqrt() / r.double().std()) for g, r in zip(given, right))
            if not error <= TOLERANCES[precision]:
                raise ArithmeticError(f"wrong by {error:.1e}")
            found["gain"] = before / found["us"]
        except Exception as e:  # too much shared memory, say
            found["problem"] = sentence(e)
        tell("tune", found)
    _, after = _time(setting, precision, table, x)  # the table's own again: how far the device drifts
    tell("tune", {"precision": precision, "batch": batch, "tile": asdict(table), "table_tile": asdict(table),
                  "us": after, "table_us": before, "gain": before / after, "problem": None})


def neighbours(tile: Any) -> Iterator[Any]:
    """Tiles that differ in one number, or in two that belong together; no block is wider than the weights may be."""
    options = {
        "block_m": [v for v in (tile.block_m // 2, tile.block_m * 2) if v >= 16],
        **{name: [v for v in (now // 2, now * 2) if 16 <= v <= max(now, PADDING)]
           for name, now in (("block_n", tile.block_n), ("block_k", tile.block_k))},
        "num_warps": [v for v in (tile.num_warps * 2, tile.num_warps // 2) if 2 <= v <= 16],
        "num_stages": [v for v in (tile.num_stages - 1, tile.num_stages + 1) if v >= 1],
        "programs_per_sm": [v for v in (tile.programs_per_sm + 1, tile.programs_per_sm - 1) if v >= 1],
        "max_registers": [v for v in (128, 168, 255) if v != tile.max_registers],
    }
    for name, values in options.items():
        if hasattr(tile, name):
            yield from (replace(tile, **{name: v}) for v in values)
    yield replace(tile, block_m=2 * tile.block_m, num_warps=min(2 * tile.num_warps, 16))
    if tile.block_m >= 32:
        yield replace(tile, block_m=tile.block_m // 2, programs_per_sm=2 * tile.programs_per_sm)


@contextmanager
def _chosen(tile: Any) -> Iterator[None]:
    """Scorers take this tile."""
    committed = triton_gpu.choose
    triton_gpu.choose = lambda *args, **kwargs: tile
    try:
        yield
    finally:
        triton_gpu.choose = committed


def _tile_of(setting: Setting, precision: str, batch: int) -> Any:
    """The table's tile."""
    seen, committed = [], triton_gpu.choose

    def listen(*args: Any, **kwargs: Any) -> Any:
        seen.append(committed(*args, **kwargs))
        return seen[-1]

    triton_gpu.choose = listen
    try:
        x = torch.from_numpy(np.resize(setting.events, (batch, setting.architecture[0]))).to(setting.device.where)
        scorer(setting.bundle, precision).energy_and_score(x)
    finally:
        triton_gpu.choose = committed
    return seen[-1]


def _time(setting: Setting, precision: str, tile: Any, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], float]:
    """Energies and scores, and the median time on the device in microseconds."""
    with _chosen(tile):
        ours = scorer(setting.bundle, precision, on_nonfinite="propagate")
        out = torch.empty(len(x), device=x.device), torch.empty_like(x)
        ours.energy_and_score(x, out=out)
        setting.device.sync()
        times = [s for _ in range(setting.pick(5, 3, 1))
                 for s in setting.device.seconds(lambda: ours.energy_and_score(x, out=out))]
    return out, float(np.median(times)) * 1e6


def _compile_all(setting: Setting, jobs: list[tuple[str, Any]]) -> set[tuple[str, Any]]:
    """Those that are now in Triton's cache on disk: compiled by other processes, none of which works any more."""
    if setting.dry:
        return set(jobs)
    pool = ProcessPoolExecutor(max(1, min(14, len(os.sched_getaffinity(0)) - 1)), mp_context=get_context("spawn"))
    futures = {pool.submit(_compile, setting.architecture, *job): job for job in jobs}
    done, _ = wait(futures, 0.6 * setting.left())
    pool.shutdown(wait=False, cancel_futures=True)
    wait([f for f in futures if f.running()], 10)
    return {futures[f] for f in done if not f.exception()}


def _compile(architecture: tuple[int, int, int], precision: str, tile: Any) -> None:
    with _chosen(tile):
        x = torch.from_numpy(events(16, architecture[0], 0)).cuda()
        scorer(model(*architecture), precision).energy_and_score(x)
        torch.cuda.synchronize()
