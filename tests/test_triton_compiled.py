"""The Triton kernel compiled ahead of time for each chip, without a GPU: what it takes, and that nothing spills."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from kernels.resources import PRECISIONS, SHARED, TABLE, count_all, l2_bytes, matrix_instruction
from kernels.tiles import FAMILY, TILES, Tile, choose, tiles_for

pytest.importorskip("triton")

REGISTERS_PER_SM = 65536
REFERENCE = (64, 256, 2)
SHAPES = [(30, 64, 1), (1, 128, 3), (200, 512, 8), (256, 256, 8)]


def case(cc: int, precision: str, tile: Tile, with_score: bool, per_event: bool, shape=REFERENCE) -> dict:
    d, h, n = shape
    return {"cc": cc, "precision": precision, "tile": vars(tile), "with_score": with_score, "per_event": per_event,
            "features": d, "hidden": h, "layers": n}


def check_compiled(cases: Iterable[dict]) -> None:
    cases = list(cases)
    results = count_all(cases)
    assert len(results) == len(cases)
    for c, made in zip(cases, results):
        tile, cc = Tile(**c["tile"]), c["cc"]
        said = f"{c}: {made}"
        assert made["target"].startswith(f"sm_{cc}"), said
        assert made["spills"] == 0, f"registers spill, {said}"
        assert made["registers"] <= tile.max_registers, said
        assert made["shared"] * tile.programs_per_sm <= SHARED[cc], f"fewer programs share an SM, {said}"
        assert made["matrix"] == matrix_instruction(cc, c["precision"], tile), said
        if c["precision"] == "fp32":  # IEEE float32 products are fused multiply-adds
            assert made["fma"] > tile.block_m * tile.block_n * tile.block_k // (32 * tile.num_warps), said


@pytest.mark.parametrize("cc", [80, 90, 100])
def test_compiles_without_spills(cc):
    check_compiled(case(cc, p, tiles_for(cc, p)[-1], True, False) for p in PRECISIONS)


def test_per_event_levels_small_batches_and_energies_compile_without_spills():
    check_compiled([*(case(90, p, tile, True, True) for p in ("fp32", "bf16") for tile in tiles_for(90, p)),
                    *(case(90, p, tiles_for(90, p)[-1], False, False) for p in ("fp32", "bf16"))])


@pytest.mark.full
@pytest.mark.parametrize("cc", TILES)
def test_everything_compiles_without_spills(cc):
    check_compiled([*(case(cc, p, tile, both, both) for p in PRECISIONS for tile in tiles_for(cc, p)
                      for both in (True, False)),
                    *(case(cc, p, tiles_for(cc, p)[-1], True, True, shape) for p in PRECISIONS for shape in SHAPES
                      if p != "bf16")])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cc", TILES)
def test_tile_table(cc, precision):
    tiles = tiles_for(cc, precision)
    assert [t.block_m for t in tiles] == sorted({t.block_m for t in tiles})
    for t in tiles:
        assert t.block_n in (64, 128)  # a width that 128 does not divide is taken in strips of 64
        assert 64 % t.block_k == 0
        assert t.programs_per_sm * t.num_warps * 32 * t.max_registers <= REGISTERS_PER_SM
    assert choose(cc, 1, 132, precision) is tiles[0]
    assert choose(cc, 10**6, 132, precision) is tiles[-1]
    costs = [l2_bytes(t, precision, True) for t in tiles]
    assert costs == sorted(costs, reverse=True)  # more events at a time, fewer bytes for each


def test_chips_in_between_take_the_entry_below():
    assert tiles_for(87) is TILES[86]["fp32"]
    assert tiles_for(103, "bf16") is TILES[100]["half"]
    assert tiles_for(121, "tf32") is TILES[120]["tf32"]


def test_the_table_of_resources_is_of_these_tiles():
    """`python -m kernels.resources` writes it; what the compiler said there it says above."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in TABLE.read_text().splitlines()
            if line.startswith("| sm_")]
    told = {(chip, precision, tile, stages) for chip, precision, _, tile, _, stages, *_ in rows}
    assert told == {(f"sm_{cc}", p, f"{t.block_m} x {t.block_n} x {t.block_k}", str(t.num_stages))
                    for cc in TILES for p in PRECISIONS for t in tiles_for(cc, p)}
    assert {spills for *_, spills, _, _, _ in rows} == {"0"}


def test_families_have_tiles():
    for families in TILES.values():
        assert set(families) == {FAMILY.get(p, p) for p in PRECISIONS}
