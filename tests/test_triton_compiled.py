"""The Triton kernel compiled ahead of time for each chip, without a GPU: what it takes, and that nothing spills."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from kernels.resources import REFERENCE, SHAPES, SHARED, TABLE, count_all, l2_bytes, matrix_instruction
from kernels.tiles import PRECISIONS, TILES, Tile, choose, tiles_for

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
PROCESSES = len(os.sched_getaffinity(0))


def case(cc: int, precision: str, tile: Tile, with_score: bool, per_event: bool, flagged: bool,
         shape=REFERENCE) -> dict:
    d, h, n = shape
    return {"cc": cc, "precision": precision, "tile": vars(tile), "with_score": with_score, "per_event": per_event,
            "flagged": flagged, "features": d, "hidden": h, "layers": n}


def check_compiled(cases: Iterable[dict]) -> None:
    cases = list(cases)
    results = count_all(cases, PROCESSES)
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
    check_compiled(case(cc, p, tiles_for(cc, p)[-1], True, False, False) for p in PRECISIONS)


def test_per_event_levels_small_batches_and_energies_compile_without_spills():
    check_compiled([*(case(90, p, tile, True, True, False) for p in ("fp32", "bf16") for tile in tiles_for(90, p)),
                    *(case(90, p, tiles_for(90, p)[-1], False, False, True) for p in ("fp32", "bf16"))])


@pytest.mark.full
@pytest.mark.parametrize("cc", TILES)
def test_everything_compiles_without_spills(cc):
    check_compiled([*(case(cc, p, tile, both, both, not both) for p in PRECISIONS for tile in tiles_for(cc, p)
                      for both in (True, False)),
                    *(case(cc, p, tiles_for(cc, p)[-1], True, True, True, shape) for p in PRECISIONS for shape in SHAPES
                      if p != "bf16")])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cc", TILES)
def test_tile_table(cc, precision):
    tiles = tiles_for(cc, precision)
    assert [t.block_m for t in tiles] == sorted({t.block_m for t in tiles})
    assert choose(cc, 1, 132, precision) is tiles[0]
    assert choose(cc, 10**6, 132, precision) is tiles[-1]
    costs = [l2_bytes(t, precision, True) for t in tiles]
    assert costs == sorted(costs, reverse=True)  # more events at a time, fewer bytes for each


def test_chips_in_between_take_the_entry_below():
    assert tiles_for(87) == tiles_for(86)
    assert tiles_for(103, "bf16") == tiles_for(100, "bf16") != tiles_for(90, "bf16")
    assert tiles_for(121, "tf32") == tiles_for(120, "tf32")


def test_the_table_of_resources_is_of_these_tiles():
    """`python -m kernels.resources` writes it; what the compiler said there it says above."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in TABLE.read_text().splitlines()
            if line.startswith("| sm_")]
    assert [precision for chip, precision, *_ in rows if chip == "sm_90, hopper"] == ["fp16", "fp16", "bf16", "bf16"]
    rows = [row for row in rows if row[0] != "sm_90, hopper"]
    told = {(chip, precision, tile, stages) for chip, precision, _, tile, _, stages, *_ in rows}
    assert told == {(f"sm_{cc}", p, f"{t.block_m} x {t.block_n} x {t.block_k}", str(t.num_stages))
                    for cc in TILES for p in PRECISIONS for t in tiles_for(cc, p)}
    assert {spills for *_, spills, _, _, _ in rows} == {"0"}


# A driver that only says what GPU it is: how many kernels Triton has compiled after they were counted, and launched.
LAUNCHED = """
import os
from pathlib import Path
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from ebm.bundle import Bundle
from kernels.launch import Loaded, launch, load
from kernels.resources import count_all
from kernels.tiles import tiles_for
from kernels.triton_kernel import fused

triton.runtime.driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, get_current_stream=lambda d: 0))
run = fused.run
fused.run = lambda *a, warmup, **given: run(*a, warmup=True, **given)
x, k, flag = torch.zeros(9, 64), torch.zeros(9, dtype=torch.int32), torch.zeros(9, dtype=torch.uint8)
variants = [{"precision": p, "per_event": both, "with_score": both, "flagged": not both}
            for p in ("fp32", "bf16") for both in (True, False)]

def made():
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))

count_all([v | {"cc": 90, "tile": vars(tiles_for(90, v["precision"])[0])} for v in variants], 1)
print(made())
for v in variants:
    weights = load(Bundle.random(64, 256, 2), True, "cpu", v["precision"])
    launch(Loaded(weights, v["precision"], 0.5, 0.25, 90, 132), x, k if v["per_event"] else 3, torch.zeros(9),
           x if v["with_score"] else None, flag if v["flagged"] else None)
print(made())
"""


@pytest.mark.parametrize("fusion", [None, "0"])
def test_what_is_counted_is_what_is_launched(tmp_path, fusion):
    """A launch finds the very kernels that were counted, whatever Triton is told about kernels in general."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_DEFAULT_FP_FUSION", None)
    environment |= {} if fusion is None else {"TRITON_DEFAULT_FP_FUSION": fusion}
    done = subprocess.run([sys.executable, "-c", LAUNCHED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["4", "4"], done.stderr


def test_what_has_been_compiled_is_kept_by_its_source(tmp_path, monkeypatch):
    """A second matrix compiles nothing, as long as TRITON_CACHE_DIR (~/.triton/cache) stays."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    one = [case(90, "bf16", tiles_for(90, "bf16")[0], False, False, True, (1, 64, 1))]
    first = count_all(one, 1)
    (made,) = tmp_path.rglob("*.cubin")
    written = made.stat().st_mtime_ns
    assert count_all(one, 1) == first
    assert [p.stat().st_mtime_ns for p in tmp_path.rglob("*.cubin")] == [written]
