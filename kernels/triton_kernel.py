"""Energy and score in one Triton kernel, from the raw event to the raw score, and how it is compiled.

A program takes BLOCK_M events at a time through all layers: weights stream through in tiles, activations stay
in a scratch buffer of the program's own, small enough for the L2 cache. It holds two buffers of activations that
take turns, h_{i-1} and h_i on the way up and g on the way down, and, for the score, silu'(z_i) of every layer.

In fp16 and bf16 these buffers, which feed the products, are of that type, as the weights are; sums, energies, SiLU
and preprocessing stay float32, and so does the residual stream (W_in u, then h, then g), in `wide`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ebm.preprocess import ASINH, LOG1P
from kernels.tiles import Tile, tiles_for

# Precision of a Scorer -> `input_precision` of tl.dot, and the type of weights and scratch.
INPUT_PRECISION = {"fp32": "ieee", "tf32x3": "tf32x3", "tf32": "tf32", "fp16": "ieee", "bf16": "ieee"}
STORED = {"fp16": "fp16", "bf16": "bf16"}
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
def _silu(z, INTERPRETED: tl.constexpr):
    """silu(z) and its derivative."""
    power = 1.0 + tl.exp2(z * -1.4426950408889634)
    if INTERPRETED:
        sig = 1.0 / power
    else:  # one instruction, to one unit in the last place, where a division is eight
        sig = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [power], tl.float32, True, 1)
    y = z * sig
    return y, sig + y * (1.0 - sig)


@triton.jit
def _put(at, a, INTERPRETED: tl.constexpr):
    """Stores float32 as the type of `at`; what is finite stays finite, in fp16 too."""
    if at.dtype.element_ty == tl.float16:
        a = tl.clamp(a, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    elif INTERPRETED and at.dtype.element_ty == tl.bfloat16:  # where the cast would cut digits off, not round
        bits = a.to(tl.int32, bitcast=True)
        a = tl.where(a == a, (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True), a)
    tl.store(at, a.to(at.dtype.element_ty))


@triton.jit
def _product(a, weights, c, K: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
             K_FIRST: tl.constexpr, INTERPRETED: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Activations a (BLOCK_M, K) in scratch, times columns c, ..., c + BLOCK_N of weights (K, N).

    The weights lie (N, K) in memory where K_FIRST: the matrix instructions take TF32 in no other way.
    """
    ks = tl.arange(0, BLOCK_K)
    ns = c + tl.arange(0, BLOCK_N)
    left = a + tl.arange(0, BLOCK_M)[:, None] * WIDTH + ks[None, :]
    right = weights + (ns[None, :] * K + ks[:, None] if K_FIRST else ks[:, None] * N + ns[None, :])
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in range(0, K, BLOCK_K):
        act, weight = tl.load(left + j), tl.load(right + (j if K_FIRST else j * N))
        if INTERPRETED:  # where products of bf16 are wrong
            act, weight = act.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(act, weight, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["n", "first_level", "levels"])
def fused(x, k, energy, score, flag, up_in, down_in, b_in, up, down, b, w_out, pre, scratch, wide, b_out, threshold, n,
          first_level, levels, D: tl.constexpr, D_PAD: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr,
          WITH_SCORE: tl.constexpr, PRECISION: tl.constexpr, K_FIRST: tl.constexpr, INTERPRETED: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """x (n, D) -> energy (n, levels) at levels first_level, ..., and of the only level score (n, D) and flag (n,).

    `flag` is 1 where energy > threshold, else 0, or None, or NULL. `k` (n,) has one level per event, or is None; `wide`
    is None where `scratch` is float32. Weights are padded to D_PAD and H; rows beyond n are computed from zeros and
    not stored. Every barrier parts threads that write scratch or `wide` from threads that read it; within a strip,
    each thread reads what it wrote itself.
    """
    WIDTH: tl.constexpr = max(D_PAD, H)
    BUFFER: tl.constexpr = BLOCK_M * WIDTH
    BUFFERS: tl.constexpr = 3 + LAYERS if WITH_SCORE else 3
    BLOCK_H: tl.constexpr = BLOCK_N if H % BLOCK_N == 0 else 64
    BLOCK_D: tl.constexpr = min(BLOCK_N, 64)  # wider, its addresses would spill registers
    h = scratch + tl.program_id(0).to(tl.int64) * (BUFFER * BUFFERS)
    slopes = h + 2 * BUFFER
    if wide is None:
        w_in_u = slopes
    else:
        stream = wide + tl.program_id(0).to(tl.int64) * (BUFFER * 2)
        w_in_u = stream if WITH_SCORE else stream + BUFFER
    lines = tl.arange(0, BLOCK_M)
    # Called contiguous by four only: float32 and narrow copies then lie alike in the threads, and none is shuffled.
    strip = tl.max_contiguous(tl.arange(0, BLOCK_H), 4)
    narrow = tl.max_contiguous(tl.arange(0, NARROW), 4)
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
            if h.dtype.element_ty == tl.float16:  # finite values end at the largest of fp16, Inf becomes NaN
                u = tl.where(tl.abs(u) < float("inf"), u, float("nan"))
            _put(h + lines[:, None] * WIDTH + cols[None, :], u, INTERPRETED)
            if WITH_SCORE:
                tl.store(score + first * D + offsets, slope, inside)  # kept there until it is needed
        tl.debug_barrier()
        for c in tl.range(0, H, BLOCK_H, disable_licm=True):  # W_in u, shared by all levels
            z = _product(h, up_in, c, D_PAD, H, WIDTH, PRECISION, K_FIRST, INTERPRETED, BLOCK_M, BLOCK_H, BLOCK_K)
            tl.store(w_in_u + at + c, z)
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
                y, slope = _silu(tl.load(w_in_u + spot) + bias, INTERPRETED)
                e += tl.sum(y * tl.load(w_out + cols)[None, :], 1)
                _put(h + spot, y, INTERPRETED)
                if wide is not None:
                    tl.store(stream + spot, y)
                if WITH_SCORE:
                    _put(slopes + spot, slope, INTERPRETED)
            tl.debug_barrier()
            for i in tl.range(0, LAYERS, disable_licm=True):
                old, new = h + (i % 2) * BUFFER, h + (1 - i % 2) * BUFFER
                inner = i < LAYERS - 1  # h_n itself is nowhere needed
                for c in tl.range(0, H, BLOCK_H, disable_licm=True):
                    z = _product(old, up + i * H * H, c, H, H, WIDTH, PRECISION, K_FIRST, INTERPRETED,
                                 BLOCK_M, BLOCK_H, BLOCK_K)
                    y, slope = _silu(z + tl.load(b + i * H + c + strip)[None, :], INTERPRETED)
                    out = tl.load(w_out + c + strip)[None, :]
                    e += tl.sum(y * out, 1)  # w_out . h_n, term by term
                    if WITH_SCORE:  # g_n = w_out
                        _put(slopes + (i + 1) * BUFFER + at + c, slope if inner else slope * out, INTERPRETED)
                    if inner:
                        if wide is None:
                            tl.store(new + at + c, tl.load(old + at + c) + y)
                        else:
                            y += tl.load(stream + at + c)
                            tl.store(stream + at + c, y)
                            _put(new + at + c, y, INTERPRETED)
                tl.debug_barrier()
            tl.store(energy + first * levels + lines * levels + j, e, there)
            if flag is not None:  # noqa: SIM102
                if flag.to(tl.int64) != 0:  # a caller in C says so at the launch alone
                    tl.store(flag + first + lines, (e > threshold).to(tl.uint8), there)
        if WITH_SCORE:
            g = h if wide is None else stream
            for i in tl.range(LAYERS, 0, -1, disable_licm=True):
                here = slopes + i * BUFFER
                below = here - BUFFER
                for c in tl.range(0, H, BLOCK_H, disable_licm=True):
                    step = _product(here, down + (i - 1) * H * H, c, H, H, WIDTH, PRECISION, K_FIRST, INTERPRETED,
                                    BLOCK_M, BLOCK_H, BLOCK_K)
                    if i == LAYERS:
                        step += tl.load(w_out + c + strip)[None, :]
                    else:
                        step += tl.load(g + at + c)
                    if i > 1:
                        tl.store(g + at + c, step)
                    _put(below + at + c, step * tl.load(below + at + c).to(tl.float32), INTERPRETED)
                tl.debug_barrier()
            for c in range(0, D_PAD, BLOCK_D):
                dE_du = _product(slopes, down_in, c, H, D_PAD, WIDTH, PRECISION, K_FIRST, INTERPRETED,
                                 BLOCK_M, BLOCK_D, BLOCK_K)
                cols = c + tl.arange(0, BLOCK_D)
                inside = there[:, None] & (cols < D)[None, :]
                at_x = score + first * D + lines[:, None] * D + cols[None, :]
                tl.store(at_x, -dE_du * tl.load(at_x, inside, 0.0), inside)


def padded(width: int) -> int:
    """The next multiple of PADDING."""
    return -(-width // PADDING) * PADDING


def constants(features: int, hidden: int, layers: int, with_score: bool, precision: str, tile: Tile) -> dict[str, Any]:
    """The compile-time arguments of `fused`."""
    return {"D": features, "D_PAD": padded(features), "H": padded(hidden), "LAYERS": layers,
            "WITH_SCORE": with_score, "PRECISION": INPUT_PRECISION[precision], "K_FIRST": precision != "fp32",
            "INTERPRETED": not isinstance(fused, triton.JITFunction),
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}


def options(tile: Tile) -> dict[str, int]:
    """What the compiler is told beside the constants; products and sums are fused whatever Triton's default is."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.max_registers,
            "enable_fp_fusion": True}


def compile_for(cc: int, *, features: int = 64, hidden: int = 256, layers: int = 2, with_score: bool = True,
                per_event: bool = False, flagged: bool = False, precision: str = "fp32",
                tile: Tile | None = None) -> Any:
    """`fused` compiled for compute capability `cc` (80, 90, ...) without a GPU: a triton CompiledKernel.

    `tile` is the table's for large batches unless given. Needs TRITON_INTERPRET unset when this is imported.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile = tile or tiles_for(cc, precision)[-1]
    stored = STORED.get(precision, "fp32")
    fixed = constants(features, hidden, layers, with_score, precision, tile)
    given = {"k": per_event, "score": with_score, "flag": flagged, "wide": stored != "fp32"}
    fixed |= dict.fromkeys(name for name, is_given in given.items() if not is_given)
    types = {"k": "*i32", "flag": "*u8", "b_out": "fp32", "threshold": "fp32", "n": "i32", "first_level": "i32",
             "levels": "i32", **dict.fromkeys(("up_in", "down_in", "up", "down", "scratch"), f"*{stored}")}
    signature = {name: "constexpr" if name in fixed else types.get(name, "*fp32") for name in fused.arg_names}
    # As a launch says it, which then finds it compiled; of the constants Triton 3.6 names those that are strings.
    named = [name for name in fixed if isinstance(fixed[name], str) or not triton.__version__.startswith("3.6.")]
    aligned = {(i,): [["tt.divisibility", 16]] if t.startswith("*") else []
               for i, (name, t) in enumerate(signature.items()) if t.startswith("*") or name in named}
    constexprs = {(i,): fixed[name] for i, name in enumerate(fused.arg_names) if name in fixed}
    return triton.compile(ASTSource(fused, signature, constexprs, aligned), target=GPUTarget("cuda", cc, 32),
                          options=options(tile))
