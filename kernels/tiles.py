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
    max_registers: int = 255
    programs_per_sm: int = 1


FAMILY = {"fp16": "half", "bf16": "half"}  # precisions that share their tiles

# Chosen by compiling and counting, docs/triton-resources.md: no spills on any shape tried, then the fewest bytes
# from L2 per event, then the deepest pipeline. An event costs its share 1 / block_m of all weights, and its activations
# once for every strip of block_n outputs: 128 x 128 takes 9 KB from L2 in half precision where 64 x 64 takes 18.

# fp32 has no matrix instruction: 16 accumulators a thread, and 168 registers let three programs share an SM.
# Left to itself, ptxas aims at 128 registers in some of these and spills.
_FP32 = (Tile(16, 64, 32, num_warps=8, num_stages=3),
         Tile(32, 64, 32, num_warps=4, num_stages=3, max_registers=168, programs_per_sm=3))
_FP32_SM80 = (_FP32[0], replace(_FP32[1], max_registers=255, programs_per_sm=2))  # ptxas needs up to 224 there
# The first tile is for too few events to give every SM a larger one: the shortest way through the layers.
_TF32X3 = (Tile(16, 128, 32, 8, 4), Tile(64, 128, 32, 8, 3))
_TF32 = (Tile(16, 128, 32, 8, 4), Tile(64, 128, 32, 8, 2), Tile(128, 128, 32, 8, 2))
_HALF = (Tile(16, 128, 64, 8, 4), Tile(64, 128, 64, 8, 2), Tile(128, 128, 64, 8, 2))

# Compute capability -> precision or family -> tiles, the largest block_m last. Chips in between take the entry below
# theirs.
TILES: dict[int, dict[str, tuple[Tile, ...]]] = {
    80: {"fp32": _FP32_SM80, "tf32": _TF32, "half": (*_HALF[:2], Tile(128, 128, 32, 8, 4)),
         "tf32x3": (_TF32X3[0], Tile(32, 128, 32, 8, 3))},  # with 64 events, 8 bytes spill in the deepest networks
    **{cc: {"fp32": _FP32, "tf32x3": _TF32X3, "tf32": _TF32, "half": _HALF} for cc in (86, 89, 120)},
    90: {"fp32": _FP32, "tf32x3": _TF32X3,
         "tf32": (*_TF32[:2], Tile(128, 128, 32, 8, 3)), "half": (*_HALF[:2], Tile(128, 128, 64, 8, 3))},
    100: {"fp32": _FP32, "tf32x3": _TF32X3, "tf32": (*_TF32[:2], Tile(128, 64, 32, 8, 3)),
          "half": (_HALF[0], Tile(64, 128, 64, 8, 3))},  # every tile tried of 128 events spills somewhere
}


def tiles_for(cc: int, precision: str = "fp32") -> tuple[Tile, ...]:
    """The tiles of a compute capability such as 90."""
    return TILES[max(known for known in TILES if known <= cc)][FAMILY.get(precision, precision)]


def choose(cc: int, n: int, n_sm: int, precision: str = "fp32") -> Tile:
    """The smallest tile with which `n` events are done in one round of `n_sm` multiprocessors, else the largest."""
    tiles = tiles_for(cc, precision)
    return next((t for t in tiles if -(-n // t.block_m) <= n_sm), tiles[-1])
