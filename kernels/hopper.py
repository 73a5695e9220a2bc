"""What the kernel of hopper_kernel.py needs: its weights in tiles, its table of preprocessing, its ring, its launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from triton.experimental.gluon import language as gl

from ebm.preprocess import ASINH, LOG1P
from kernels.hopper_kernel import EVENTS, PANEL, hopper
from kernels.tiles import Tile

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.launch import Loaded

CC = 90
WIDTH = 256  # hidden units, padded with zeros; the accumulators of other widths are not laid out
TILE = Tile(128, WIDTH, 64, num_warps=4, num_stages=2, max_registers=168, kernel="hopper")
MOST_LAYERS, MOST_FEATURES = 2, 256
SHARED = 227 << 10  # bytes that a program can have
TILES_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)  # swizzled panels of 128 bytes
# Values of silu' in a word of shared memory (bytes lose no digits of bf16, but of fp16 they would), rows of a tile.
PACKED, ROWS = {"bf16": 4, "fp16": 1}, {"bf16": 64, "fp16": 32}
_PANEL, _EVENTS = PANEL.value, EVENTS.value


def why_not(features: int, hidden: int, layers: int, precision: str, cc: int = CC) -> str | None:
    """None where the kernel computes such a network on such a chip, else the reason."""
    if cc != CC:
        return f"it needs sm_{CC}, this is sm_{cc}"
    if precision not in PACKED:
        return f"it computes {' and '.join(PACKED)}, not {precision}"
    if not WIDTH // 2 < hidden <= WIDTH or layers > MOST_LAYERS or features > MOST_FEATURES:
        return (f"it takes {WIDTH // 2 + 1} to {WIDTH} hidden units, at most {MOST_LAYERS} layers and {MOST_FEATURES} "
                f"features, given {hidden}, {layers} and {features}")
    return None


def constants(features: int, layers: int, with_score: bool, precision: str) -> dict[str, Any]:
    """The compile-time arguments of `hopper`."""
    d, rows, packed = -(-features // _PANEL) * _PANEL, ROWS[precision], PACKED[precision]
    tiles = (d + layers * WIDTH) // rows * (2 if with_score else 1)
    taken = 2 * _EVENTS * WIDTH * (2 + (layers * (1 if packed == 4 else 2) if with_score else 0))
    most = (SHARED - 1024 - taken) // (2 * rows * WIDTH)
    # The largest ring with the fewest places left over at the end of a turn.
    ring = min(range(2, most + 1), key=lambda r: (-(-tiles // r) * r, -r))
    return {"D": features, "D_PAD": d, "H": WIDTH, "LAYERS": layers, "PACKED": packed, "ROWS": rows, "RING": ring,
            "HALF": gl.float16 if precision == "fp16" else gl.bfloat16}


def pack(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """tiles, b_in, b, w_out and table of `hopper` from the weights of `triton_kernel.fused` in half precision.

    The tiles stream by: W_in^T, W_1^T, ..., W_n^T on the way up, then W_n, ..., W_1 and W_in^T again, which is read
    across, on the way down.

    The table has rows of coefficients, zero beyond the features. With a = |x| / scale, t is x or, where row 6 is 1,
    sign(x) log1p(a + a r), r = 0 or, where row 5 is 1, what makes it asinh; dt/dx is
    1 / (row 7 max(sqrt(1 + a^2), a) + row 8 a + row 9). Scale is 1 but for asinh.
    """
    import torch
    from torch.nn.functional import pad

    _, w_in_t, b_in, w, w_t, b, w_out, pre = weights
    more = (0, WIDTH - len(w_out))
    rows = [w_in_t, *w_t, *w.flip(0), w_in_t]
    tiles = torch.cat([pad(r, more if r is w_in_t else more * 2) for r in rows])
    marker, impute, scale, mean, inv_std, code = pre
    asinh, log1p = code == ASINH, code == LOG1P
    scale = torch.where(asinh, scale, 1)
    coefficients = [marker, impute, 1 / scale, mean, inv_std, asinh, asinh | log1p, asinh * scale, log1p, ~asinh]
    return tiles, pad(b_in, more), pad(b, more), pad(w_out, more), torch.stack([c.float() for c in coefficients])


def compile_for(*, features: int = 64, layers: int = 2, with_score: bool = True, per_event: bool = False,
                flagged: bool = False, precision: str = "bf16") -> Any:
    """`hopper` compiled for sm_90 without a GPU: a triton CompiledKernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    fixed = constants(features, layers, with_score, precision)
    given = {"k": per_event, "score": with_score, "flag": flagged}
    fixed |= dict.fromkeys(name for name, is_given in given.items() if not is_given)
    types = {"k": "*i32", "flag": "*u8",
             "tiles": f"tensordesc<{precision}[{ROWS[precision]},{WIDTH}],{TILES_LAYOUT!r}>",
             **dict.fromkeys(("b_out", "threshold"), "fp32"), **dict.fromkeys(("n", "first_level", "levels"), "i32")}
    signature = {name: "constexpr" if name in fixed else types.get(name, "*fp32") for name in hopper.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    constexprs = {(i,): fixed[name] for i, name in enumerate(hopper.arg_names) if name in fixed}
    return triton.compile(GluonASTSource(hopper, signature, constexprs, aligned), target=GPUTarget("cuda", CC, 32),
                          options={"num_warps": 4})


def launch(m: Loaded, tile: Tile, x: Tensor, k: int | Tensor, energy: Tensor, score: Tensor | None,
           flag: Tensor | None, wrap: None = None) -> None:
    """As `kernels.launch.launch_fused`, for a model that has `m.hopper`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    n, features = x.shape
    fixed = constants(features, m.layers, score is not None, m.precision)
    tiles, *others = m.hopper
    level, k = (k, None) if isinstance(k, int) else (0, k)
    levels = energy.shape[1] if energy.ndim == 2 else 1
    hopper[(min(-(-n // tile.block_m) * levels, m.n_sm),)](
        x, k, energy, score, flag, TensorDescriptor.from_tensor(tiles, [fixed["ROWS"], WIDTH], TILES_LAYOUT), *others,
        m.b_out, m.threshold, n, level, levels, **fixed, num_warps=tile.num_warps)
