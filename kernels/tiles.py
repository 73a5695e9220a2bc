"""The committed tile table of the Triton kernel: nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """A program takes `block_m` events at a time, through (block_k, block_n) tiles of the weights."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int
    programs_per_sm: int


# fp32 has no tensor-core instruction: 16 accumulators a thread, and 168 registers let three programs share an SM.
# Left to itself, ptxas aims at 128 registers in some of these and spills.
_MANY = Tile(block_m=32, block_n=64, block_k=32, num_warps=4, num_stages=3, max_registers=168, programs_per_sm=3)
# For too few events to give every SM a tile of 32: the shortest way through the layers.
_FEW = Tile(block_m=16, block_n=64, block_k=32, num_warps=8, num_stages=3, max_registers=255, programs_per_sm=1)

# Compute capability -> tiles, the largest block_m last. Chips in between take the entry below theirs.
TILES: dict[int, tuple[Tile, ...]] = {
    80: (_FEW, replace(_MANY, max_registers=255, programs_per_sm=2)),  # ptxas needs up to 224 there
    **dict.fromkeys((86, 89, 90, 100, 120), (_FEW, _MANY)),
}


def tiles_for(cc: int) -> tuple[Tile, ...]:
    """The tiles of a compute capability such as 90."""
    return TILES[max(known for known in TILES if known <= cc)]


def choose(cc: int, n: int, n_sm: int) -> Tile:
    """The smallest tile with which `n` events are done in one round of `n_sm` multiprocessors, else the largest."""
    tiles = tiles_for(cc)
    return next((t for t in tiles if -(-n // t.block_m) <= n_sm), tiles[-1])
