"""What the Triton kernel takes of each chip, compiled ahead of time: `python -m kernels.resources` writes the table.

Registers, shared memory and spills are the compiler's; bytes from L2 per event are counted from the tile. Nothing
here needs a GPU, and nothing here has been measured on one. Triton's own cache keeps what has been compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kernels.tiles import PRECISIONS, TILES, Tile, tiles_for

# Shared memory that a block can have, in bytes.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Bytes a second from L2, assumed: what an H100 reads.
L2_RATE = 5.5e12
# (features, hidden, layers): the model that is timed, and the corners at which a tile must not spill either.
REFERENCE = (64, 256, 2)
SHAPES = ((30, 64, 1), (1, 128, 3), (200, 512, 8), (256, 256, 8))
TABLE = Path(__file__).parents[1] / "docs" / "triton-resources.md"


def count(case: dict[str, Any]) -> dict[str, Any]:
    """What the compiler makes of a case: the arguments of `triton_kernel.compile_for`, the tile as a dict."""
    import triton

    from kernels import hopper, triton_kernel

    if case["tile"]["kernel"] == "hopper":
        kernel = hopper.compile_for(**{name: value for name, value in case.items() if name not in ("cc", "tile")})
    else:
        kernel = triton_kernel.compile_for(**case | {"tile": Tile(**case["tile"])})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        said = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    ptx = kernel.asm["ptx"]
    found = {"mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05.mma": "tcgen05.mma"}
    return {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"], "shared": kernel.metadata.shared,
            "fma": ptx.count("fma.rn.f32"), "matrix": [name for name, word in found.items() if word in ptx],
            "target": re.search(r"^\.target (\w+)", ptx, re.M)[1]}


def matrix_instruction(cc: int, precision: str, tile: Tile) -> list[str]:
    """What multiplies matrices there: IEEE float32 has nothing, and fewer than 64 rows only the oldest."""
    newest = {90: "wgmma", 100: "tcgen05.mma"}.get(cc, "mma.sync")
    return [] if precision == "fp32" else [newest if tile.block_m >= 64 else "mma.sync"]


def count_all(cases: list[dict[str, Any]], workers: int = 2) -> list[dict[str, Any]]:
    """`count` of each case, in a few processes of their own: under TRITON_INTERPRET=1 there is nothing to compile.

    What has been compiled before, of the same source, comes from Triton's cache on disk in some milliseconds.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            return list(pool.map(count, cases))
    finally:
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)


def l2_bytes(tile: Tile, precision: str, with_score: bool, shape: tuple[int, int, int] = REFERENCE) -> float:
    """Bytes that cross L2 for an event: its share of the weights, its activations, its own numbers.

    Widths are multiples of 64. What the L1 cache might hold between two strips is counted again.
    """
    narrow = precision in ("fp16", "bf16")
    size, wide = (2, 4) if narrow else (4, 0)  # wide: the residual stream that is kept beside narrow activations
    d, h, layers = shape
    if tile.kernel == "hopper":  # activations stay where they are
        passes = 2 if with_score else 1
        return passes * (size * (d * h + layers * h * h) / tile.block_m + 4 * d) + (4 * d if with_score else 0)
    strips_h, strips_d = h // (tile.block_n if h % tile.block_n == 0 else 64), d // min(tile.block_n, 64)
    weights = size * (d * h + layers * h * h) / tile.block_m
    up = (4 * d + size * d * (1 + strips_h)  # x; u, read for every strip
          + h * (4 + 4 + size + wide)  # W_in u; h_0
          + layers * strips_h * size * h  # h_{i-1}, read for every strip
          + (layers - 1) * h * (4 + size + wide))  # the residual, read and written
    down = (h * size * (layers + 1)  # silu'
            + layers * (strips_h * size * h + 2 * size * h)  # g_i silu'(z_i), read for every strip; the one below
            + (layers - 1) * 2 * 4 * h  # g
            + strips_d * size * h + 4 * 4 * d)  # the last product; du/dx twice, the score
    return weights + up + (weights + down if with_score else 0)


def table() -> str:
    """The reference model on every chip, in every precision, with every tile, as Markdown."""
    import triton

    from kernels import hopper

    cases = [{"cc": cc, "precision": p, "with_score": with_score, "per_event": with_score, "flagged": not with_score,
              "tile": vars(tile)} for cc in sorted(TILES) for p in PRECISIONS
             for tile in (*tiles_for(cc, p), *((hopper.TILE,) if cc == hopper.CC and p in hopper.PACKED else ()))
             for with_score in (True, False)]
    lines = [_HEAD.format(triton=triton.__version__, rate=L2_RATE / 1e12)]
    for case, made in zip(cases, count_all(cases)):
        tile = Tile(**case["tile"])
        crossing = l2_bytes(tile, case["precision"], case["with_score"])
        on_hopper = tile.kernel == "hopper"
        stages = tile.num_stages
        if on_hopper:
            stages = hopper.constants(REFERENCE[0], REFERENCE[2], case["with_score"], case["precision"])["RING"]
        lines.append(" | ".join(map(str, (
            f"| sm_{case['cc']}{', hopper' if on_hopper else ''}", case["precision"],
            "score" if case["with_score"] else "energy",
            f"{tile.block_m} x {tile.block_n} x {tile.block_k}", f"{tile.num_warps} x {tile.programs_per_sm}",
            stages, made["registers"], f"{made['shared']:,}", made["spills"],
            ", ".join(made["matrix"]) or "-", f"{crossing / 1e3:.1f} KB", f"{L2_RATE / crossing:.1e} |"))))
    return "\n".join(lines) + "\n"


_HEAD = """# Resources of the GPU kernels

Written by `python -m kernels.resources`: the reference model (64 features, 2 layers of 256), compiled ahead of time by
Triton {triton} for every chip of `kernels/tiles.json`. *score* is energy and score with a noise level per event,
*energy* energy and flag at one level. Tile: events x outputs x inputs; warps: of a program x programs on a
multiprocessor; registers a thread, shared memory and spills of a program in bytes. L2: bytes that cross L2 for an
event, counted from the tile, and the events a second that would follow at {rate} TB/s, about what an H100 reads, if
nothing else took time.
*hopper* is the kernel with activations in shared memory: twelve warps, its stages are the ring of weights; the spills
are addresses, put away before its loop. **Nothing here has been measured on a GPU.**

| chip | precision | task | tile | warps | stages | registers | shared | spills | matrix | L2, an event | bound, 1/s |
|---|---|---|---|---|---|---|---|---|---|---|---|"""

if __name__ == "__main__":
    TABLE.write_text(table())
    print(TABLE.read_text(), end="")
