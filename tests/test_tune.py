"""The tile table, as it is read and written, and the search for tiles on a GPU that pretends."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ebm.events import DataError
from kernels.resources import SHAPES
from kernels.tiles import PRECISIONS, TABLE, TILES, Tile, choose, in_order, read_table, tiles_for, why_not, write_table
from kernels.tune import Trial, neighbours, tune

hopper = pytest.importorskip("kernels.hopper", reason="needs triton")
ROOT = Path(__file__).parents[1]
START = TILES[90]["bf16"]["throughput"].tiles[-1]


def test_the_table_is_written_as_it_is_read(tmp_path):
    write_table(TILES, tmp_path / "tiles.json")
    assert (tmp_path / "tiles.json").read_text() == TABLE.read_text()
    assert read_table(tmp_path / "tiles.json") == TILES


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.clear(), "is empty"),
    (lambda t: t.update({"sm_90": t["90"]}), "'sm_90' is no compute capability such as 90"),
    (lambda t: t["90"].pop("tf32"), "90 has fp32, tf32x3, fp16, bf16, expected fp32, tf32x3, tf32, fp16, bf16"),
    (lambda t: t["90"]["fp16"].pop("latency"), "90, fp16 has throughput, expected latency, throughput"),
    (lambda t: t["90"].update(fp16=[]), "90, fp16 is list, expected an object"),
    (lambda t: t["90"]["fp16"]["latency"].pop("chosen"), "90, fp16, latency has tiles, expected chosen, tiles"),
    (lambda t: t["90"]["fp16"]["latency"].update(tiles=[]), "90, fp16, latency: expected .* at least one tile"),
    (lambda t: t["90"]["fp16"]["latency"]["tiles"][0].pop("block_k"), "90, fp16, latency, tile 0 has block_m, "),
    (lambda t: t["90"]["fp16"]["latency"]["tiles"][0].update(block_n=96), "tile 0: block_n is 96, expected 64 or 128"),
    (lambda t: t["90"]["fp16"]["latency"]["tiles"][0].update(block_m=256), "fp16: block_m are 256, 64, 128, expected"),
])
def test_a_damaged_table_is_refused(tmp_path, change, words):
    content = json.loads(TABLE.read_text())
    change(content)
    (tmp_path / "tiles.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        read_table(tmp_path / "tiles.json")


def test_a_table_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "tiles.json").write_text("{")
    for name in ("tiles.json", "none.json"):
        with pytest.raises(DataError, match=f"{name} cannot be read as a tile table"):
            read_table(tmp_path / name)


@pytest.mark.parametrize(("change", "words"), [
    ({"block_m": 0}, "block_m is 0, expected a number from 1 on"),
    ({"num_stages": 2.0}, "num_stages is 2.0"),
    ({"num_warps": True}, "num_warps is True"),
    ({"block_m": 48}, "block_m is 48, expected one of 16, 32"),
    ({"num_warps": 6}, "num_warps is 6, expected one of 1, 2"),
    ({"block_k": 128}, "block_k is 128, expected 16, 32 or 64"),
    ({"programs_per_sm": 2}, "more than the 65536 registers"),
    ({"kernel": "metal"}, "kernel is 'metal', expected 'triton' or 'hopper'"),
])
def test_tiles_that_nothing_is_compiled_with(change, words):
    assert why_not(START) is None
    assert words in why_not(replace(START, **change))


def test_kernels_share_the_table(monkeypatch):
    """Of the same block_m the later row is meant, and only kernels that were asked for are given."""
    other = replace(START, kernel="hopper")
    rows = TILES[90]["bf16"]["throughput"]
    assert in_order([*rows.tiles, other])
    assert not in_order([*rows.tiles, START])
    assert not in_order([START, *rows.tiles])
    monkeypatch.setitem(TILES[90]["bf16"], "throughput", replace(rows, tiles=(*rows.tiles, other)))
    assert choose(90, 10**6, 132, "bf16", ("triton", "hopper")) == other
    assert choose(90, 10**6, 132, "bf16") == START
    assert other not in tiles_for(90, "bf16")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("regime", ["latency", "throughput"])
def test_neighbours_can_be_compiled(precision, regime):
    tile = TILES[90][precision][regime].tiles[-1]
    found = list(neighbours(tile))
    assert len(found) == len(set(found)) >= 5
    assert tile not in found
    assert all(why_not(t) is None for t in found)


class Pretends:
    """A GPU with a best tile: time counts the steps to it. What is `made` of a tile, and which are wrong, tests say."""

    name, cc, n_sm = "Fake GPU", 90, 132
    best = replace(START, block_n=64, block_k=32, num_stages=2)

    def __init__(self, made=lambda case: {"spills": 0, "shared": 1024}, wrong=()):
        self.made, self.wrong, self.measured = made, wrong, []

    def count(self, cases):
        return [self.made(c) for c in cases]

    def measure(self, precision, batch):
        def measure(tile):
            self.measured.append((precision, batch, tile))
            if tile in self.wrong:
                raise ArithmeticError("wrong by 1.0e+00")
            return 10.0 + sum(getattr(tile, name) != value for name, value in vars(self.best).items())

        return measure


def search(gpu, **options):
    told = []
    table, pairs = tune(gpu, TILES, ["bf16"], ["throughput"], told.append, **options)
    return table, pairs, told


def test_the_search_finds_the_fastest_and_writes_the_table(tmp_path):
    gpu = Pretends()
    table, ((before, best),), told = search(gpu)
    assert (before.tile, before.us, best.tile, best.us) == (START, 13, gpu.best, 10)
    assert [t.tile for t in told] == [tile for _, _, tile in gpu.measured]
    assert len({t.tile for t in told}) == len(told)
    assert {(p, n) for p, n, _ in gpu.measured} == {("bf16", 1 << 18)}
    entry = table[90]["bf16"]["throughput"]
    assert (entry.tiles[:-1], entry.tiles[-1]) == (TILES[90]["bf16"]["throughput"].tiles[:-1], gpu.best)
    assert entry.chosen == "measured on Fake GPU"
    assert TILES[90]["bf16"]["throughput"].tiles[-1] == START  # what was given stays as it is
    assert {cc: chip for cc, chip in table.items() if cc != 90} == {cc: c for cc, c in TILES.items() if cc != 90}
    write_table(table, tmp_path / "tiles.json")
    assert read_table(tmp_path / "tiles.json") == table


@pytest.mark.parametrize("us", [9.0, 10.0, None])
def test_the_kernel_for_hopper_is_in_the_table_where_it_is_faster(us):
    class Hopper(Pretends):
        def measure(self, precision, batch):
            def measure(tile):
                if us is None and tile == hopper.TILE:
                    raise RuntimeError("illegal instruction")
                return us if tile == hopper.TILE else usual(tile)

            usual = super().measure(precision, batch)
            return measure

    table, pairs, told = search(Hopper())
    assert told[-1] == Trial("bf16", "throughput", hopper.TILE, us, None if us else "illegal instruction")
    faster = us == 9.0
    assert (table[90]["bf16"]["throughput"].tiles[-1] == hopper.TILE) is faster
    assert pairs[-1][1].tile == (hopper.TILE if faster else Pretends.best)
    again, _ = tune(Pretends(), table, ["bf16"], ["throughput"])
    assert again[90]["bf16"]["throughput"].tiles == (*TILES[90]["bf16"]["throughput"].tiles[:-1], Pretends.best)


def test_what_spills_is_too_large_or_wrong_is_left_out():
    def made(case):
        tile = Tile(**case["tile"])
        return {"spills": 8 if tile.block_n == 64 else 0, "shared": 1 << 20 if tile.block_k == 32 else 1024}

    _, ((_, best),), told = search(gpu := Pretends(made, wrong=(replace(START, num_stages=4),)))
    assert best.tile == replace(START, num_stages=2)
    assert not any(t.block_n == 64 or t.block_k == 32 for _, _, t in gpu.measured)
    problems = {t.problem for t in told}
    assert problems >= {"8 bytes of registers spill", "1048576 bytes of shared memory, the chip has 232448",
                        "wrong by 1.0e+00"}
    assert all((t.us is None) == (t.problem is not None) for t in told)


def test_a_winner_that_spills_in_another_model_is_none():
    def made(case):
        shape = case["features"], case["hidden"], case["layers"]
        return {"spills": 8 if shape in SHAPES and case["tile"]["num_stages"] == 2 else 0, "shared": 1024}

    _, ((_, best),), _ = search(Pretends(made))
    assert best.tile == replace(Pretends.best, num_stages=START.num_stages)


def test_a_search_without_time_left_keeps_the_table():
    assert search(Pretends(), left=lambda: False)[1] == []
    answers = iter([True])
    table, ((before, best),), _ = search(Pretends(), left=lambda: next(answers, False))
    assert before == best
    assert table[90]["bf16"]["throughput"].tiles == TILES[90]["bf16"]["throughput"].tiles


def test_a_chip_without_an_entry_gets_its_own():
    gpu = Pretends()
    gpu.cc = 103
    table, _, _ = search(gpu)
    assert set(table) == {*TILES, 103}
    assert table[100] == TILES[100]


def test_without_a_gpu_the_command_says_so_in_a_sentence(tmp_path):
    from kernels.triton_gpu import why_not

    if why_not() is None:
        pytest.skip("there is a GPU")
    for arguments, words in ((["--out", str(tmp_path / "t.json")], f"error: tiles are timed on a GPU: {why_not()}\n"),
                             (["--precision", "fp8"], "error: precision is 'fp8', expected 'fp32', ")):
        done = subprocess.run([sys.executable, "-m", "kernels", "tune", *arguments], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(words)
        assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
