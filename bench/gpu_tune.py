"""A short search around the committed tiles: what would be better. `python -m kernels tune` looks longer and writes."""

from __future__ import annotations

from dataclasses import asdict

from bench.gpu_device import Setting, attempt
from bench.gpu_isolate import tell
from kernels.tiles import TILES
from kernels.tune import BATCHES, OnGpu, Trial
from kernels.tune import tune as search

_ROUND_S = 10  # of compiling
_SEARCHES = (("bf16", "throughput"), ("fp32", "throughput"), ("bf16", "latency"), ("fp32", "latency"))


def tune(setting: Setting, _: str) -> None:
    """Section "tune": a line for every tile that was tried; `gain` above 1 is faster than the table's."""
    gpu = OnGpu()
    for precision, regime in _SEARCHES:
        table: list[Trial] = []

        def say(trial: Trial, table: list[Trial] = table) -> None:
            table.append(trial)
            tell("tune", {"precision": trial.precision, "batch": BATCHES[trial.regime], "tile": asdict(trial.tile),
                          "table_tile": asdict(table[0].tile), "us": trial.us, "table_us": table[0].us,
                          "gain": trial.us and table[0].us / trial.us, "problem": trial.problem})

        attempt(f"tune triton {precision}, {regime}", lambda p=precision, r=regime, say=say: search(
            gpu, TILES, [p], [r], say, lambda: setting.left() > _ROUND_S))
