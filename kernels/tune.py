"""The search for tiles on the GPU of this machine: `python -m kernels tune` prints what it finds and writes the table.

From the table's tile on, tiles that differ in one number are compiled ahead of time, side by side; those that spill or
are too large for the chip are left out, the others timed, and the fastest is where it goes on, until none is faster.
Events and weights are random.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels import hopper
from kernels.resources import REFERENCE, SHAPES, SHARED, count_all
from kernels.tiles import PRECISIONS, REGIMES, REGISTERS_PER_SM, Entry, Table, Tile, in_order, known, why_not
from kernels.tolerances import TOLERANCES

if TYPE_CHECKING:
    from torch import Tensor

BATCHES = {"latency": 64, "throughput": 1 << 18}
BETTER = 1.02  # than the best so far; less is noise
_ROUNDS, _SAMPLES, _CALLS = 4, 7, 8


@dataclass(frozen=True)
class Trial:
    """A tile, and the time of a batch on the device in microseconds, or why it has none."""

    precision: str
    regime: str
    tile: Tile
    us: float | None = None
    problem: str | None = None


Count = Callable[[Sequence[dict[str, Any]]], Sequence[dict[str, Any]]]
Measure = Callable[[Tile], float]


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles that differ in one number, or in two that belong together, as far as a kernel can be compiled with them."""
    options = {
        "block_m": (tile.block_m // 2, tile.block_m * 2), "block_n": (64, 128), "block_k": (16, 32, 64),
        "num_warps": (tile.num_warps * 2, tile.num_warps // 2),
        "num_stages": (tile.num_stages - 1, tile.num_stages + 1),
        "programs_per_sm": (tile.programs_per_sm + 1, tile.programs_per_sm - 1), "max_registers": (128, 168, 255),
    }
    found = [replace(tile, **{name: v}) for name, values in options.items() for v in values]
    found += [replace(tile, block_m=2 * tile.block_m, num_warps=2 * tile.num_warps),
              replace(tile, block_m=tile.block_m // 2, programs_per_sm=2 * tile.programs_per_sm)]
    found = [replace(t, max_registers=min(t.max_registers, _registers(t))) for t in found]
    yield from dict.fromkeys(t for t in found if t != tile and why_not(t) is None)


def _registers(tile: Tile) -> int:
    """Of a thread, where its programs share a multiprocessor."""
    return REGISTERS_PER_SM // (32 * max(1, tile.num_warps * tile.programs_per_sm))


def cases(cc: int, precision: str, tile: Tile, shapes: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """For `count_all`: energy and score, which take the most."""
    return [{"cc": cc, "precision": precision, "tile": vars(tile), "with_score": True, "per_event": False,
             "features": d, "hidden": h, "layers": n} for d, h, n in shapes]


def problem_of(cc: int, tile: Tile, made: dict[str, Any]) -> str | None:
    """Why a tile is left out that the compiler made this of."""
    if made["spills"]:
        return f"{made['spills']} bytes of registers spill"
    most = SHARED[known(cc, SHARED)]
    if made["shared"] * tile.programs_per_sm > most:
        return f"{made['shared'] * tile.programs_per_sm} bytes of shared memory, the chip has {most}"
    return None


def search(precision: str, regime: str, start: Tile, cc: int, measure: Measure, count: Count,
           allowed: Callable[[Tile], bool], tell: Callable[[Trial], None],
           left: Callable[[], bool]) -> tuple[Trial, Trial]:
    """The tile at the start and the fastest one; `tell` hears of all that were tried."""
    best = first = Trial(precision, regime, start, measure(start))
    tell(first)
    seen = {start}
    for _ in range(_ROUNDS):
        tiles = [t for t in neighbours(best.tile) if t not in seen and allowed(t)]
        seen.update(tiles)
        made = count([case for t in tiles for case in cases(cc, precision, t, [REFERENCE])]) if left() else []
        trials = []
        for tile, resources in zip(tiles, made):
            us, problem = None, problem_of(cc, tile, resources) if left() else "no time left"
            if problem is None:
                try:
                    us = measure(tile)
                except (RuntimeError, ArithmeticError) as e:  # one that cannot run is a result, too
                    problem = str(e).splitlines()[0]
            trials.append(Trial(precision, regime, tile, us, problem))
            tell(trials[-1])
        faster = sorted((t for t in trials if t.us is not None and t.us * BETTER < best.us), key=lambda t: t.us)
        winner = next((t for t in faster if _sound_everywhere(cc, t, count)), None)
        if winner is None:
            break
        best = winner
    return first, best


def _sound_everywhere(cc: int, trial: Trial, count: Count) -> bool:
    made = count(cases(cc, trial.precision, trial.tile, SHAPES))
    return all(problem_of(cc, trial.tile, m) is None for m in made)


def replaced(table: Table, cc: int, trial: Trial, start: Tile, chosen: str) -> Table:
    """The table with a trial's tile instead of `start`; a chip without an entry gets one of its own."""
    chip = {p: dict(regimes) for p, regimes in table[known(cc, table)].items()}
    tiles = chip[trial.precision][trial.regime].tiles
    chip[trial.precision][trial.regime] = Entry(tuple(trial.tile if t == start else t for t in tiles), chosen)
    return table | {cc: chip}


class OnGpu:
    """Times tiles on the current GPU, with the reference model."""

    def __init__(self) -> None:
        import torch

        from ebm.bundle import Bundle
        from kernels.launch import chip

        self.bundle, self.device = Bundle.random(*REFERENCE), torch.device("cuda", torch.cuda.current_device())
        self.cc, self.n_sm = chip(self.device)
        self.name = torch.cuda.get_device_name(self.device)

    def count(self, cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """`count_all` on all processors but one; what it compiles a launch finds in Triton's cache."""
        return count_all(list(cases), max(1, min(16, len(os.sched_getaffinity(0)) - 1)))

    def measure(self, precision: str, batch: int) -> Measure:
        """Microseconds of energy and score of a batch with a tile; ArithmeticError where they are wrong."""
        import torch

        from kernels.triton_gpu import TritonScorer

        scorers = {"triton": TritonScorer(self.bundle, precision=precision, kernel="triton", on_nonfinite="propagate")}
        x = torch.randn(batch, REFERENCE[0], device=self.device)
        right = scorers["triton"].energy_and_score(x)

        def measure(tile: Tile) -> float:
            if tile.kernel not in scorers:
                scorers[tile.kernel] = TritonScorer(self.bundle, precision=precision, kernel=tile.kernel,
                                                    on_nonfinite="propagate")
            scorer = scorers[tile.kernel]
            scorer.tile = tile
            out: tuple[Tensor, Tensor] = torch.full_like(right[0], torch.nan), torch.full_like(right[1], torch.nan)
            scorer.energy_and_score(x, out=out)
            for given, expected in zip(out, right):
                error = float((given - expected).double().square().mean().sqrt() / expected.double().std())
                if not error <= 2 * TOLERANCES[precision]:
                    raise ArithmeticError(f"wrong by {error:.1e}")
            times = [self._sample(lambda: scorer.energy_and_score(x, out=out)) for _ in range(_SAMPLES)]
            return float(np.median(times))

        return measure

    def _sample(self, call: Callable[[], Any]) -> float:
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # a millisecond in which the host gets ahead
        begin.record()
        for _ in range(_CALLS):
            call()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / _CALLS


def tune(gpu: OnGpu, table: Table, precisions: Sequence[str] = PRECISIONS, regimes: Sequence[str] = REGIMES,
         tell: Callable[[Trial], None] = lambda trial: None,
         left: Callable[[], bool] = lambda: True) -> tuple[Table, list[tuple[Trial, Trial]]]:
    """The table with the fastest tiles of this GPU, and for each (precision, regime) the table's tile and the fastest.

    The last tile of a regime that the Triton kernel takes is searched for; `tell` hears of every tile that was tried,
    and when `left()` is false, what is not done yet is left out.
    """
    pairs = []
    for precision in precisions:
        for regime in regimes:
            entries = table[known(gpu.cc, table)][precision]
            start = next((t for t in reversed(entries[regime].tiles) if t.kernel == "triton"), None)
            if start is None or not left():
                continue
            rows = [t for r in REGIMES for t in entries[r].tiles]

            def allowed(tile: Tile, rows: list[Tile] = rows, start: Tile = start) -> bool:
                return in_order([tile if t == start else t for t in rows])

            measure = gpu.measure(precision, BATCHES[regime])
            pairs.append(search(precision, regime, start, gpu.cc, measure, gpu.count, allowed, tell, left))
            table = replaced(table, gpu.cc, pairs[-1][1], start, f"measured on {gpu.name}")
            if regime == "throughput" and hopper.why_not(*REFERENCE, precision, gpu.cc) is None and left():
                table, trial = _beside_hopper(gpu, table, pairs[-1][1], tell)
                pairs += [(pairs[-1][1], trial)] if trial else []
    return table, pairs


def _beside_hopper(gpu: OnGpu, table: Table, best: Trial, tell: Callable[[Trial], None]) -> tuple[Table, Trial | None]:
    """The table with a row of the kernel "hopper", and its trial, where it is faster than the best tile; else without.

    It comes last: one that hung would take nothing along.
    """
    us = problem = None
    try:
        us = gpu.measure(best.precision, BATCHES[best.regime])(hopper.TILE)
    except (RuntimeError, ArithmeticError) as e:
        problem = str(e).splitlines()[0]
    trial = Trial(best.precision, best.regime, hopper.TILE, us, problem)
    tell(trial)
    faster = us is not None and us * BETTER < best.us
    chip = dict(table[gpu.cc])
    entry = chip[best.precision][best.regime]
    tiles = tuple(t for t in entry.tiles if t.kernel != "hopper") + ((hopper.TILE,) if faster else ())
    chip[best.precision] = chip[best.precision] | {best.regime: replace(entry, tiles=tiles)}
    return table | {gpu.cc: chip}, trial if faster else None
