"""The tile table of the GPU kernels, `tiles.json`: which kernel takes a batch, and in which tiles. Nothing is tuned at
run time; `python -m kernels tune` measures on a GPU and writes the table anew.

    compute capability -> precision -> regime -> {"chosen": how, "tiles": [...]}, smaller batches first

The tiles of "latency" are for too few events to give every multiprocessor a larger one, those of "throughput" for more.
Chips in between take the entry below theirs. Where no GPU was at hand, tiles were chosen by compiling and counting,
docs/triton-resources.md: no spills on any shape tried, then the fewest bytes from L2 per event, then the deepest
pipeline. An event costs its share 1 / block_m of all weights, and its activations once for every strip of block_n
outputs: 128 x 128 takes 9 KB from L2 in half precision where 64 x 64 takes 18. fp32 has no matrix instruction: 16
accumulators a thread, and 168 registers let three programs share a multiprocessor; left to itself, ptxas aims at 128 in
some of these and spills (on sm_80 it needs up to 224).
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ebm.command import whole_file
from ebm.events import DataError

PRECISIONS = ("fp32", "tf32x3", "tf32", "fp16", "bf16")
REGIMES = ("latency", "throughput")
KERNELS = ("triton", "hopper")
REGISTERS_PER_SM = 65536
TABLE = Path(__file__).with_name("tiles.json")


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
    kernel: str = "triton"  # which one of KERNELS


@dataclass(frozen=True)
class Entry:
    """The tiles of a regime, the smallest block_m first, and how they were chosen."""

    tiles: tuple[Tile, ...]
    chosen: str


def describe(tile: Tile) -> str:
    """In a few words."""
    return (f"{tile.block_m} x {tile.block_n} x {tile.block_k}, {tile.num_warps} warps x {tile.programs_per_sm}, "
            f"{tile.num_stages} stages, {tile.max_registers} registers")


Table = dict[int, dict[str, dict[str, Entry]]]


def read_table(path: Path = TABLE) -> Table:
    """The table of a file; DataError names the entry that is wrong."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise DataError(f"{path} cannot be read as a tile table: {e}") from None
    where = f"tile table {path}"
    table: Table = {}
    for cc, precisions in _object(content, where).items():
        if not cc.isdecimal():
            raise DataError(f"{where}: {cc!r} is no compute capability such as 90")
        table[int(cc)] = {}
        for p, regimes in _object(precisions, f"{where}, {cc}", PRECISIONS).items():
            entries = _object(regimes, f"{where}, {cc}, {p}", REGIMES)
            table[int(cc)][p] = {r: _entry(entries[r], f"{where}, {cc}, {p}, {r}") for r in REGIMES}
            tiles = [t for r in REGIMES for t in table[int(cc)][p][r].tiles]
            if not in_order(tiles):
                raise DataError(f"{where}, {cc}, {p}: block_m are {', '.join(str(t.block_m) for t in tiles)}, expected "
                                "ever larger ones of each kernel")
    if not table:
        raise DataError(f"{where} is empty")
    return table


def _object(value: Any, where: str, expected: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {type(value).__name__}, expected an object")
    if expected and set(value) != set(expected):
        raise DataError(f"{where} has {', '.join(value) or 'nothing'}, expected {', '.join(expected)}")
    return value


def _entry(value: Any, where: str) -> Entry:
    entry = _object(value, where, ("chosen", "tiles"))
    if not isinstance(entry["chosen"], str) or not isinstance(entry["tiles"], list) or not entry["tiles"]:
        raise DataError(f"{where}: expected in 'chosen' how, and in 'tiles' at least one tile")
    names = tuple(f.name for f in fields(Tile))
    tiles = tuple(Tile(**_object(t, f"{where}, tile {i}", names)) for i, t in enumerate(entry["tiles"]))
    for i, tile in enumerate(tiles):
        if wrong := why_not(tile):
            raise DataError(f"{where}, tile {i}: {wrong}")
    return Entry(tiles, entry["chosen"])


def in_order(tiles: Sequence[Tile]) -> bool:
    """Whether block_m never falls, and grows from tile to tile of the same kernel."""
    sizes = [t.block_m for t in tiles]
    return sizes == sorted(sizes) and len({(t.block_m, t.kernel) for t in tiles}) == len(tiles)


def why_not(tile: Tile) -> str | None:
    """What no kernel could be compiled with, or None."""
    for name, value in vars(tile).items():
        if name != "kernel" and (type(value) is not int or value < 1):
            return f"{name} is {value!r}, expected a number from 1 on"
    if tile.kernel not in KERNELS:
        return f"kernel is {tile.kernel!r}, expected {' or '.join(map(repr, KERNELS))}"
    for name, allowed in (("block_m", (16, 32, 64, 128, 256)), ("num_warps", (1, 2, 4, 8, 16))):
        if getattr(tile, name) not in allowed:
            return f"{name} is {getattr(tile, name)}, expected one of {', '.join(map(str, allowed))}"
    if tile.kernel == "triton":
        if tile.block_n not in (64, 128):  # a width that 128 does not divide is taken in strips of 64
            return f"block_n is {tile.block_n}, expected 64 or 128"
        if tile.block_k not in (16, 32, 64):
            return f"block_k is {tile.block_k}, expected 16, 32 or 64, which divide every padded width"
        if tile.programs_per_sm * tile.num_warps * 32 * tile.max_registers > REGISTERS_PER_SM:
            return f"its programs take more than the {REGISTERS_PER_SM} registers of a multiprocessor"
    return None


def write_table(table: Table, path: Path = TABLE) -> None:
    """The table as a file, a tile a line, whole or not at all."""
    def entry(e: Entry) -> str:
        tiles = ",\n    ".join(json.dumps(vars(t)) for t in e.tiles)
        return f'{{"chosen": {json.dumps(e.chosen)}, "tiles": [\n    {tiles}]}}'

    chips = (f'"{cc}": {{\n ' + ",\n ".join(
        f'"{p}": {{\n  ' + ",\n  ".join(f'"{r}": {entry(regimes[r])}' for r in REGIMES) + "}"
        for p, regimes in table[cc].items()) + "}" for cc in sorted(table))
    with whole_file(path) as f:
        f.write(("{" + ",\n".join(chips) + "}\n").encode())


TILES = read_table()


def known(cc: int, table: Mapping[int, Any] = TILES) -> int:
    """The compute capability whose entry a chip takes."""
    return max(k for k in table if k <= cc)


def tiles_for(cc: int, precision: str = "fp32", kernels: Container[str] = ("triton",)) -> tuple[Tile, ...]:
    """The tiles of a compute capability such as 90, as far as they are of these kernels."""
    regimes = TILES[known(cc)][precision]
    return tuple(t for r in REGIMES for t in regimes[r].tiles if t.kernel in kernels)


def choose(cc: int, n: int, n_sm: int, precision: str = "fp32", kernels: Container[str] = ("triton",)) -> Tile:
    """The smallest tile with which `n` events are done in one round of `n_sm` multiprocessors, else the largest.

    Of two kernels with tiles as large as each other the later one in the table is meant.
    """
    tiles = tiles_for(cc, precision, kernels)
    block_m = next((t.block_m for t in tiles if -(-n // t.block_m) <= n_sm), tiles[-1].block_m)
    return next(t for t in reversed(tiles) if t.block_m == block_m)
