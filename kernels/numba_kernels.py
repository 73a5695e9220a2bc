"""What `numba_cpu` compiles: register blocks, elementary functions, preprocessing, and `run` with all of it fused.

Events go in tiles through the preprocessing, all layers and the analytic backward; the activations of a tile
stay in a scratch of [feature][event] rows that the cache holds. One event is a tile of width 1: the same code,
with vectors along the outputs in the matrix products. All compiled functions stay in this file, because
Numba's cache looks for changes only in the file of the function that is called.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from ebm.preprocess import ASINH, LOG1P

# Register blocks: ROWS x VECTORS accumulators of WIDTH floats, and room for the operands beside them.
_AVX512 = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2]
WIDTH, VECTORS = (16, 2) if _AVX512 else (8, 1)
ROWS = 8
EVENTS = WIDTH * VECTORS
CHUNK = 128  # terms summed on their own: one long sum in float32 would lose a digit

_ZERO, _ONE, _TWO, _LARGE = (np.float32(v) for v in (0, 1, 2, 1e9))
_LOG2_E, _LN_2 = np.float32(1 / np.log(2)), np.float32(np.log(2))
_LN_2_HIGH, _LN_2_LOW = np.float32(355 / 512), np.float32(np.log(2) - 355 / 512)
_LOG1P, _ASINH = np.float32(LOG1P), np.float32(ASINH)
_ROUND = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits
_MOST = np.float32(87)
_E2, _E3, _E4, _E5, _E6, _E7 = (np.float32(1 / f) for f in (2, 6, 24, 120, 720, 5040))
_L3, _L5, _L7, _L9 = (np.float32(2 / f) for f in (3, 5, 7, 9))


def _compile(function: Callable) -> Callable:
    """Without reassociation: an event has the same bits alone, in a tile of any width and on any thread."""
    options = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no directory can be written for the cache
        return njit(**options)(function)


def _block(rows: int, width: int, vectors: int, one_event: bool = False) -> Callable:
    """out += W h for a block of `rows` x `vectors` accumulators in vector registers.

    As LLVM IR, since the loop vectoriser keeps no block of accumulators. Per k, tiles take `rows` weights and
    the events k of h as vectors; one event takes vectors of weights from `rows` blocks, and its number k of h.
    """
    floats = ir.VectorType(ir.FloatType(), width)
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), width), None)

    @intrinsic
    def block(typing, w, i_w, h, n, out, i_out):
        def emit(context, builder, signature, args):
            def pointer(a, i, offset, kind):
                data = context.make_array(signature.args[a])(context, builder, args[a]).data
                return builder.bitcast(builder.gep(data, [builder.add(i, offset)]), kind.as_pointer())

            def vector(a, i, offset):
                return builder.load(pointer(a, i, offset, floats), align=4)

            def splat(a, i, offset):
                value = builder.load(pointer(a, i, offset, ir.FloatType()))
                one = builder.insert_element(ir.Constant(floats, ir.Undefined), value, ir.IntType(32)(0))
                return builder.shuffle_vector(one, one, lanes)

            index, times = ir.IntType(64), builder.mul
            _, i_w, _, n, _, i_out = args
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fmuladd.v{width}f32")
            cells = [(r, v) for r in range(rows) for v in range(vectors)]
            sums = {c: cgutils.alloca_once(builder, floats) for c in cells}
            with cgutils.for_range_slice(builder, index(0), n, index(CHUNK)) as (start, _):
                for c in cells:
                    builder.store(ir.Constant(floats, None), sums[c])
                stop = builder.add(start, index(CHUNK))
                stop = builder.select(builder.icmp_signed("<", stop, n), stop, n)
                with cgutils.for_range_slice(builder, start, stop, index(1)) as (k, _):
                    if one_event:
                        of_k = builder.add(i_w, times(k, index(width)))
                        left = [vector(0, of_k, times(n, index(r * width))) for r in range(rows)]
                        right = [splat(2, k, index(0))]
                    else:
                        of_k = builder.add(i_w, times(k, index(rows)))
                        left = [splat(0, of_k, index(r)) for r in range(rows)]
                        right = [vector(2, times(k, index(vectors * width)), index(v * width)) for v in range(vectors)]
                    for r, v in cells:
                        total = builder.call(fma, [left[r], right[v], builder.load(sums[r, v])])
                        builder.store(total, sums[r, v])
                for r, v in cells:
                    place = index((r * vectors + v) * width)
                    total = builder.fadd(vector(4, i_out, place), builder.load(sums[r, v]))
                    builder.store(total, pointer(4, i_out, place, floats), align=4)
            return context.get_dummy_value()

        return types.void(w, types.intp, h, types.intp, out, types.intp), emit

    return block


_tile, _narrow_tile = _block(ROWS, WIDTH, VECTORS), _block(ROWS, WIDTH, 1)
_event, _event_4 = _block(1, ROWS, 1, one_event=True), _block(4, ROWS, 1, one_event=True)


@intrinsic
def _power_of_two(typing, t):
    """2^n from t = n + _ROUND."""
    def emit(context, builder, signature, args):
        i32 = ir.IntType(32)
        n = builder.shl(builder.bitcast(args[0], i32), i32(23))
        return builder.bitcast(builder.add(n, i32(0x3F800000)), ir.FloatType())

    return types.float32(types.float32), emit


@intrinsic
def _mantissa_exponent(typing, y):
    """y = m 2^e with m within a factor sqrt(2) of 1."""
    def emit(context, builder, signature, args):
        i32 = ir.IntType(32)
        bits = builder.bitcast(args[0], i32)
        e = builder.ashr(builder.sub(bits, i32(0x3F3504F3)), i32(23))
        m = builder.bitcast(builder.sub(bits, builder.shl(e, i32(23))), ir.FloatType())
        return context.make_tuple(builder, signature.return_type, [m, builder.sitofp(e, ir.FloatType())])

    return types.UniTuple(types.float32, 2)(types.float32), emit


@_compile
def _exp(x):
    """e^x within |x| <= 87, the Taylor series after x = n ln 2 + r, |r| <= 0.35."""
    x = min(max(x, -_MOST), _MOST)
    t = x * _LOG2_E + _ROUND
    n = t - _ROUND
    r = x - n * _LN_2_HIGH - n * _LN_2_LOW
    p = _E2 + r * (_E3 + r * (_E4 + r * (_E5 + r * (_E6 + r * _E7))))
    return (_ONE + (r + r * r * p)) * _power_of_two(t)


@_compile
def _log1p(a):
    """log(1 + a), a >= 0: the series of 2 atanh(s) = log((1 + s) / (1 - s)), |s| < 0.172."""
    y = _ONE + a
    lost = (a - (y - _ONE)) / y
    m, e = _mantissa_exponent(y)
    s = (m - _ONE) / (m + _ONE)
    q = s * s
    log = e * _LN_2_HIGH + (_TWO * s + (s * q * (_L3 + q * (_L5 + q * (_L7 + q * _L9))) + (lost + e * _LN_2_LOW)))
    return log if a <= np.float32(3.4e38) else a  # Inf and NaN stay what they are


@_compile
def _accumulate(t, w, start, n_out, n_in, h, out):
    """out += W h for t events; W lies in `w` from `start` on as [n_out / ROWS][n_in][ROWS]."""
    o = 0
    while t == 1 and o + 4 * ROWS <= n_out:
        _event_4(w, start + o * n_in, h, n_in, out, o)
        o += 4 * ROWS
    while o < n_out:
        if t == 1:
            _event(w, start + o * n_in, h, n_in, out, o)
        elif t == WIDTH:
            _narrow_tile(w, start + o * n_in, h, n_in, out, o * WIDTH)
        else:
            _tile(w, start + o * n_in, h, n_in, out, o * EVENTS)
        o += ROWS


@_compile
def _transform(j, u, slope, prep):
    """Row j of u and slope: raw values -> u and du/dx."""
    t = u.shape[1]
    marker, impute, code, scale = prep[j, 0], prep[j, 1], prep[j, 2], prep[j, 3]
    mean, inv_std = prep[j, 4], prep[j, 5]
    for i in range(t):
        missing = (u[j, i] != u[j, i]) | (u[j, i] == marker)
        slope[j, i] = _ZERO if missing else inv_std
        u[j, i] = impute if missing else u[j, i]
    if code == _LOG1P:
        for i in range(t):
            a = abs(u[j, i])
            slope[j, i] /= _ONE + a
            u[j, i] = np.copysign(_log1p(a), u[j, i])
    elif code == _ASINH:
        for i in range(t):
            r = u[j, i] / scale
            a = abs(r)
            large = a > _LARGE  # where a^2 could overflow and a^2 + 1 is a^2
            root = a if large else np.sqrt(_ONE + a * a)
            slope[j, i] /= scale * root
            log = _log1p(a if large else a + a * (a / (_ONE + root)))
            u[j, i] = np.copysign(log + _LN_2 if large else log, r)
    for i in range(t):
        u[j, i] = (u[j, i] - mean) * inv_std


@_compile
def _prepare(x, lo, prep, u, slope):
    """Raw events from `lo` on -> u and du/dx, both (D or more, t); events past the end are zero."""
    (n, d), t = x.shape, u.shape[1]
    for i in range(t):
        for j in range(d):
            u[j, i] = x[lo + i, j] if lo + i < n else _ZERO
    for j in range(d):
        _transform(j, u, slope, prep)


@_compile
def _activate(z, h, slope, n):
    """h += silu(z), slope = silu'(z) = s (1 + z (1 - s)) with one exponential."""
    for i in range(n):
        e = _exp(-z[i])
        s = _ONE / (_ONE + e)
        h[i] += z[i] * s
        slope[i] = s * (_ONE + z[i] * (e * s))


@_compile
def run(t, lo, hi, x, k, energy, score, weights, rows, prep, n_layers, hidden, b_out):
    """Events lo .. hi - 1, t at a time. Rows are w_out, the bias of each layer, then b_in of each level.

    No `k`: all levels. No `score`: energies alone.
    """
    d, padded = x.shape[1], rows.shape[1]
    n_levels = 1 if len(k) else energy.shape[1]
    backward = padded * (d + n_layers * hidden)
    size = max(padded, -(-d // ROWS) * ROWS) * t
    slots = n_layers + 6
    space = np.empty(slots * size + 16, np.float32)
    shift = (-space.ctypes.data % 64) // 4  # vectors that cross cache lines load at half the rate
    scratch = space[shift:shift + slots * size].reshape(slots, size)
    u, du, base, z, h = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    total = np.empty(t)  # float64: one sum over all of h would lose a digit
    n = padded * t
    for first in range(lo, hi, t):
        count = min(t, hi - first)
        _prepare(x, first, prep, u.reshape(-1, t), du.reshape(-1, t))
        base[:n] = _ZERO
        _accumulate(t, weights, 0, padded, d, u, base)
        for level in range(n_levels):
            for o in range(padded):
                for i in range(t):
                    own = k[min(first + i, len(k) - 1)] if len(k) else level
                    z[o * t + i] = base[o * t + i] + rows[1 + n_layers + own, o]
            h[:n] = _ZERO
            _activate(z, h, scratch[5], n)
            for layer in range(n_layers):
                for o in range(padded):
                    z[o * t:o * t + t] = rows[1 + layer, o]
                _accumulate(t, weights, padded * (d + layer * hidden), padded, hidden, h, z)
                _activate(z, h, scratch[6 + layer], n)
            total[:] = b_out
            for o in range(hidden):
                for i in range(t):
                    total[i] += rows[0, o] * h[o * t + i]
            for i in range(count):
                energy[first + i, level] = total[i]
        if len(score) == 0:
            continue
        for o in range(padded):
            h[o * t:o * t + t] = rows[0, o]
        for layer in range(n_layers - 1, -1, -1):
            slope = scratch[6 + layer]
            for i in range(n):
                z[i] = h[i] * slope[i]
            _accumulate(t, weights, backward + padded * layer * hidden, padded, hidden, z, h)
        for i in range(n):
            z[i] = h[i] * scratch[5, i]
        base[:] = _ZERO
        _accumulate(t, weights, backward + padded * n_layers * hidden, d, hidden, z, base)
        for i in range(count):
            for j in range(d):
                score[first + i, j] = -base[j * t + i] * du[j * t + i]
