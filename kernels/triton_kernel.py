"""Energy and score in one Triton kernel, from the raw event to the raw score, and how it is compiled.

A program takes BLOCK_M events at a time through all layers: weights stream through in tiles, activations stay
in a scratch buffer of the program's own, small enough for the L2 cache. It holds two buffers of activations that
take turns, h_{i-1} and h_i on the way up and g on the way down, and, for the score, silu'(z_i) of every layer.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ebm.preprocess import ASINH, LOG1P
from kernels.tiles import Tile, tiles_for

INPUT_PRECISION = {"fp32": "ieee"}  # precision of a Scorer -> `input_precision` of tl.dot
PADDING = 64  # widths are padded with zeros to a multiple of this; every tile divides it
NARROW = tl.constexpr(16)  # columns at a time where there is no product: fewer values alive in registers
_LOG1P, _ASINH = tl.constexpr(LOG1P), tl.constexpr(ASINH)


@triton.jit
def _log1p(a):
    """log(1 + a) of a >= 0 to about one unit in the last place, where tl.log may be off by 2^-22 absolute."""
    y = 1.0 + a
    bits = y.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)  # y = m 2^exponent, m from sqrt(1/2) to sqrt(2)
    f = m - 1.0
    s = f / (m + 1.0)
    s2 = s * s
    rest = s2 * (0.33333333 + s2 * (0.2 + s2 * (0.14285714 + s2 * (0.11111111 + s2 * 0.09090909))))
    log_m = 2.0 * s + 2.0 * s * rest
    lost = (a - (y - 1.0)) / y  # what rounding y lost; NaN where a is NaN or Inf
    e = exponent.to(tl.float32)
    return e * 0.693359375 + (log_m + (lost + e * -2.12194440e-4))  # ln 2 in two parts, e times the first is exact


@triton.jit
def _prepare(x, pre, cols, D_PAD: tl.constexpr):
    """Raw x (BLOCK_M, columns) -> u and du/dx; `pre` has rows marker, impute, scale, mean, inv_std, transform."""
    marker, impute = tl.load(pre + cols)[None, :], tl.load(pre + D_PAD + cols)[None, :]
    scale, mean = tl.load(pre + 2 * D_PAD + cols)[None, :], tl.load(pre + 3 * D_PAD + cols)[None, :]
    inv_std, code = tl.load(pre + 4 * D_PAD + cols)[None, :], tl.load(pre + 5 * D_PAD + cols)[None, :]
    missing = (x != x) | (x == marker)
    x = tl.where(missing, impute, x)
    size = tl.abs(x)
    # asinh(a) = log1p(a + a^2 / (1 + sqrt(1 + a^2))), and log(2a) where a^2 would overflow.
    a = size / scale
    small = tl.where(a > 1e8, 1.0, a)
    squared = small * small
    grown = tl.where(a > 1e8, a, small + squared / (1.0 + tl.sqrt(1.0 + squared)))
    log1p = _log1p(tl.where(code == _ASINH, grown, size))
    log1p += tl.where((code == _ASINH) & (a > 1e8), 0.6931471805599453, 0.0)
    t = tl.where((code == _LOG1P) | (code == _ASINH), tl.where(x < 0, -log1p, log1p), x)
    # 1 / hypot(x, scale) without squaring the larger one.
    most = tl.maximum(size, scale)
    ratio = tl.minimum(size, scale) / most
    slope = tl.where(code == _ASINH, 1.0 / most / tl.sqrt(1.0 + ratio * ratio), 1.0)
    slope = tl.where(code == _LOG1P, 1.0 / (1.0 + size), slope)
    return (t - mean) * inv_std, tl.where(missing, 0.0, slope * inv_std)


@triton.jit
def _product(a, weights, K: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Activations a (BLOCK_M, K) in scratch, times a strip (K, BLOCK_N) of weights (K, N)."""
    ks = tl.arange(0, BLOCK_K)
    left = a + tl.arange(0, BLOCK_M)[:, None] * WIDTH + ks[None, :]
    right = weights + ks[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in range(0, K, BLOCK_K):
        total = tl.dot(tl.load(left + j), tl.load(right + j * N), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["n", "first_level", "levels"])
def fused(x, k, energy, score, w_in, w_in_t, b_in, w, w_t, b, w_out, pre, scratch, b_out, n, first_level, levels,
          D: tl.constexpr, D_PAD: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, WITH_SCORE: tl.constexpr,
          PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """x (n, D) -> energy (n, levels) at levels first_level, ... and score (n, D) of the only level.

    `k` (n,) has one level per event, or is None. Weights are padded to D_PAD and H; rows beyond n are computed
    from zeros and not stored. Every barrier parts threads that write scratch from threads that read it.
    """
    WIDTH: tl.constexpr = max(D_PAD, H)
    BUFFER: tl.constexpr = BLOCK_M * WIDTH
    BUFFERS: tl.constexpr = 3 + LAYERS if WITH_SCORE else 3
    h = scratch + tl.program_id(0).to(tl.int64) * (BUFFER * BUFFERS)
    slopes = h + 2 * BUFFER
    lines = tl.arange(0, BLOCK_M)
    strip = tl.arange(0, BLOCK_N)
    narrow = tl.arange(0, NARROW)
    at = lines[:, None] * WIDTH + strip[None, :]
    # What the whole loop shares is computed again where it is needed: kept, it would spill registers.
    for tile in tl.range(tl.program_id(0), (n - 1) // BLOCK_M + 1, tl.num_programs(0), disable_licm=True):
        first = tl.cast(tile, tl.int64) * BLOCK_M  # offsets to the tile in 64 bits, within it in 32
        there = lines < n - first
        for c in range(0, D_PAD, NARROW):
            cols = c + narrow
            inside = there[:, None] & (cols < D)[None, :]
            offsets = lines[:, None] * D + cols[None, :]
            u, slope = _prepare(tl.load(x + first * D + offsets, inside, 0.0), pre, cols, D_PAD)
            tl.store(h + lines[:, None] * WIDTH + cols[None, :], u)
            if WITH_SCORE:
                tl.store(score + first * D + offsets, slope, inside)  # kept there until it is needed
        tl.debug_barrier()
        for c in range(0, H, BLOCK_N):  # W_in u, shared by all levels
            z = _product(h, w_in_t + c, D_PAD, H, WIDTH, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            tl.store(slopes + at + c, z)
        tl.debug_barrier()
        for j in range(levels):
            e = tl.zeros((BLOCK_M,), tl.float32) + b_out
            for c in range(0, H, NARROW):
                cols = c + narrow
                if k is not None:
                    level_of = tl.load(k + first + lines, there, 0)
                    bias = tl.load(b_in + level_of[:, None] * H + cols[None, :])
                else:
                    bias = tl.load(b_in + (first_level + j) * H + cols)[None, :]
                spot = lines[:, None] * WIDTH + cols[None, :]
                z = tl.load(slopes + spot) + bias
                sig = tl.sigmoid(z)
                tl.store(h + spot, z * sig)
                e += tl.sum(z * sig * tl.load(w_out + cols)[None, :], 1)
                if WITH_SCORE:
                    tl.store(slopes + spot, sig * (1.0 + z * (1.0 - sig)))
            tl.debug_barrier()
            for i in range(LAYERS):
                old, new = h + (i % 2) * BUFFER, h + (1 - i % 2) * BUFFER
                for c in range(0, H, BLOCK_N):
                    z = _product(old, w_t + i * H * H + c, H, H, WIDTH, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
                    z += tl.load(b + i * H + c + strip)[None, :]
                    sig = tl.sigmoid(z)
                    out = tl.load(w_out + c + strip)[None, :]
                    e += tl.sum(z * sig * out, 1)  # w_out . h_n, term by term
                    up = tl.load(old + at + c) + z * sig
                    if WITH_SCORE:  # the last layer leaves g_n = w_out and g_n silu'(z_n)
                        slope = sig * (1.0 + z * (1.0 - sig))
                        tl.store(slopes + (i + 1) * BUFFER + at + c, tl.where(i == LAYERS - 1, slope * out, slope))
                        up = tl.where(i == LAYERS - 1, out, up)
                    tl.store(new + at + c, up)
                tl.debug_barrier()
            tl.store(energy + first * levels + lines * levels + j, e, there)
        if WITH_SCORE:
            g = h + (LAYERS % 2) * BUFFER
            for i in range(LAYERS, 0, -1):
                here = slopes + i * BUFFER
                below = here - BUFFER
                for c in range(0, H, BLOCK_N):
                    step = _product(here, w + (i - 1) * H * H + c, H, H, WIDTH, PRECISION,
                                    BLOCK_M, BLOCK_N, BLOCK_K) + tl.load(g + at + c)
                    tl.store(g + at + c, step)
                    tl.store(below + at + c, step * tl.load(below + at + c))
                tl.debug_barrier()
            for c in range(0, D_PAD, BLOCK_N):
                dE_du = _product(slopes, w_in + c, H, D_PAD, WIDTH, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
                cols = c + strip
                inside = there[:, None] & (cols < D)[None, :]
                at_x = score + first * D + lines[:, None] * D + cols[None, :]
                tl.store(at_x, -dE_du * tl.load(at_x, inside, 0.0), inside)


def padded(width: int) -> int:
    """The next multiple of PADDING."""
    return -(-width // PADDING) * PADDING


def constants(features: int, hidden: int, layers: int, with_score: bool, precision: str, tile: Tile) -> dict[str, Any]:
    """The compile-time arguments of `fused`."""
    return {"D": features, "D_PAD": padded(features), "H": padded(hidden), "LAYERS": layers,
            "WITH_SCORE": with_score, "PRECISION": INPUT_PRECISION[precision],
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}


def options(tile: Tile) -> dict[str, int]:
    """What the compiler is told beside the constants."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.max_registers}


def compile_for(cc: int, *, features: int = 64, hidden: int = 256, layers: int = 2, with_score: bool = True,
                per_event: bool = False, precision: str = "fp32", tile: Tile | None = None) -> Any:
    """`fused` compiled for compute capability `cc` (80, 90, ...) without a GPU: a triton CompiledKernel.

    `tile` is the table's for large batches unless given. Needs TRITON_INTERPRET unset when this is imported.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile = tile or tiles_for(cc)[-1]
    fixed = constants(features, hidden, layers, with_score, precision, tile)
    fixed |= {name: None for name, given in (("k", per_event), ("score", with_score)) if not given}
    types = {"k": "*i32", "b_out": "fp32", "n": "i32", "first_level": "i32", "levels": "i32"}
    signature = {name: "constexpr" if name in fixed else types.get(name, "*fp32") for name in fused.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    constexprs = {(i,): fixed[name] for i, name in enumerate(fused.arg_names) if name in fixed}
    return triton.compile(ASTSource(fused, signature, constexprs, aligned), target=GPUTarget("cuda", cc, 32),
                          options=options(tile))
