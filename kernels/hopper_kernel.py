"""Energy and score on Hopper (sm_90) in half precision: activations never leave the multiprocessor.

A program takes 128 events at a time. Two groups of four warps have 64 events each; a ninth warp streams the weights
past both of them, in tiles of 64 inputs (fp16: 32) x H outputs, by TMA through a ring in shared memory. While one group
computes SiLU the other's products run. For each group, shared memory holds

    act  64 events x H    in half precision: u, then h_i (the sum on which silu(z_i) is added), then g_i silu'(z_i)
    bent 64 events x H    for every layer but the last: silu'(z_i), four to a word (bf16) or in half precision (fp16)

and registers hold the sums, 128 a thread: z_i on the way up, g_i in float32 all the way down.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton 3.6 has the longer name

STRIP = gl.constexpr(16)  # columns of the sums that are in work at a time
PANEL = gl.constexpr(64)  # columns of a swizzled panel of shared memory
EVENTS = gl.constexpr(64)  # of a group


@gluon.jit
def _asm(instruction: gl.constexpr, a):
    return gl.inline_asm_elementwise(instruction + " $0, $1;", "=f,f", [a], gl.float32, True, 1)


@gluon.jit
def _half(a, to: gl.constexpr):
    """Rounds float32 to pairs of half-precision numbers; what is finite stays finite in fp16, NaN stays NaN."""
    if to == gl.float16:
        return gl.inline_asm_elementwise("cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,f,f", [a], gl.float16, True, 2)
    else:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [a], gl.bfloat16, True, 2)


@gluon.jit
def _silu(half_z):
    """silu(z) and its derivative from z / 2, with one instruction of the special-function unit."""
    t = _asm("tanh.approx.f32", half_z)
    sig = gl.fma(t, 0.5, 0.5)
    y = gl.fma(half_z, t, half_z)
    return y, gl.fma(y, gl.fma(t, -0.5, 0.5), sig)


@gluon.jit
def _column(table, row: gl.constexpr, cols, D_PAD: gl.constexpr):
    return gl.load(table + row * D_PAD + cols)[None, :]


@gluon.jit
def _known(x, table, cols, D_PAD: gl.constexpr):
    """Where x is missing, x with those imputed, and |x| / scale with sqrt(1 + its square), which never overflow."""
    missing = (x != x) | (x == _column(table, 0, cols, D_PAD))
    x = gl.where(missing, _column(table, 1, cols, D_PAD), x)
    a = gl.abs(x) * _column(table, 2, cols, D_PAD)
    small = gl.minimum(a, 1e15)
    return missing, x, a, _asm("sqrt.approx.ftz.f32", gl.fma(small, small, 1.0))


@gluon.jit
def _preprocess(x, table, cols, D_PAD: gl.constexpr):
    """Raw x to u, to all the digits that half precision keeps; the rows of `table` are those of `hopper.pack`."""
    _missing, x, a, root = _known(x, table, cols, D_PAD)
    # asinh(a) = log1p(a + a r) with r = a / (1 + sqrt(1 + a^2)) <= 1; in halves, so that 2 a does not overflow
    r = gl.minimum(a * _asm("rcp.approx.ftz.f32", 1.0 + root), 1.0) * _column(table, 5, cols, D_PAD)
    half = a * 0.5
    half = gl.fma(half, r, half)
    log1p = gl.fma(_asm("lg2.approx.ftz.f32", half + 0.5), 0.6931471805599453, 0.6931471805599453)
    grown = half + half
    log1p = gl.where(half < 0.00390625, grown - grown * grown * gl.fma(grown, -0.33333333, 0.5), log1p)
    curved = _column(table, 6, cols, D_PAD)
    t = gl.where(curved != 0, gl.where(x < 0, -log1p, log1p), x)
    u = (t - _column(table, 3, cols, D_PAD)) * _column(table, 4, cols, D_PAD)
    return gl.fma(x, 0.0, u)  # NaN where x is not finite


@gluon.jit
def _slope(x, table, cols, D_PAD: gl.constexpr):
    """du/dx: 1 / std by one over 1, 1 + |x| or sqrt(x^2 + scale^2)."""
    missing, _x, a, root = _known(x, table, cols, D_PAD)
    by = gl.fma(gl.maximum(root, a), _column(table, 7, cols, D_PAD), gl.fma(a, _column(table, 8, cols, D_PAD),
                                                                         _column(table, 9, cols, D_PAD)))
    return gl.where(missing, 0.0, _asm("rcp.approx.ftz.f32", by) * _column(table, 4, cols, D_PAD))


@gluon.jit
def _encode(words, slope, place: gl.constexpr):
    """Puts silu', from -0.0999 to 1.0999, into a byte of `words`: added to 2^23, a float's last bits count in ones."""
    whole = gl.fma(slope, 210.0, 8388630.0).to(gl.int32, bitcast=True)
    keep: gl.constexpr = ["0x3214", "0x3240", "0x3410", "0x4210"][place]
    return gl.inline_asm_elementwise("prmt.b32 $0, $1, $2, " + keep + ";", "=r,r,r", [words, whole], gl.int32, True, 1)


@gluon.jit
def _decode(words, place: gl.constexpr):
    take: gl.constexpr = ["0x7440", "0x7441", "0x7442", "0x7443"][place]
    whole = gl.inline_asm_elementwise("prmt.b32 $0, $1, $2, " + take + ";", "=r,r,r",
                                      [words, gl.full_like(words, 0x4B000000)], gl.int32, True, 1)
    return (whole.to(gl.float32, bitcast=True) - 8388630.0) * 0.004761904761904762


@gluon.jit
def _halves(a):
    return a.reshape([a.shape[0], 2, a.shape[1] // 2]).permute(0, 2, 1).split()


@gluon.jit
def _strips(a, layout: gl.constexpr):
    """Sums (64, 64) or (64, 256) as a tuple of narrow strips, which the same threads hold."""
    left, right = _halves(a)
    if a.shape[1] == 2 * STRIP:
        return (gl.convert_layout(left, layout, assert_trivial=True),
                gl.convert_layout(right, layout, assert_trivial=True))
    else:
        return _strips(left, layout) + _strips(right, layout)


@gluon.jit
def _wait(full, at: gl.constexpr, turn, RING: gl.constexpr, ROUNDS: gl.constexpr):
    """Waits for the tile at place `at` of the program's `turn`; every turn goes round the ring ROUNDS times."""
    mbarrier.wait(full.index(at % RING), (at // RING + turn * ROUNDS) & 1)


@gluon.jit
def _product(act, first: gl.constexpr, tiles: gl.constexpr, sums, KEEP: gl.constexpr, ring, full, empty,
             at: gl.constexpr, turn, ROWS: gl.constexpr, RING: gl.constexpr, ROUNDS: gl.constexpr):
    """sums + act W over `tiles` tiles of weights, from place `at` on; without KEEP the sums start from zero."""
    fence_async_shared()
    for p in gl.static_range(tiles):
        _wait(full, at + p, turn, RING, ROUNDS)
        inputs = act.index(first + p * ROWS // PANEL).slice(p * ROWS % PANEL, ROWS, 1)
        sums = warpgroup_mma(inputs, ring.index((at + p) % RING), sums, use_acc=KEEP or p > 0, is_async=True)
        if p > 0:  # the tile before this one has been read
            sums = warpgroup_mma_wait(1, deps=[sums])
            mbarrier.arrive(empty.index((at + p - 1) % RING), count=1)
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(empty.index((at + tiles - 1) % RING), count=1)
    return sums


@gluon.jit
def _group(x, k, energy, score, flag, b_in, b, w_out, table, b_out, threshold, n, first_level, levels, ring, full,
           empty, act, bent, group: gl.constexpr, D: gl.constexpr, D_PAD: gl.constexpr, H: gl.constexpr,
           LAYERS: gl.constexpr, HALF: gl.constexpr, PACKED: gl.constexpr, ROWS: gl.constexpr, RING: gl.constexpr):
    """Half of a program's events through all layers and back."""
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STRIP, 16])
    across: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    here: gl.constexpr = group * (H // PANEL)
    IN: gl.constexpr = D_PAD // ROWS
    OVER: gl.constexpr = H // ROWS
    TILES: gl.constexpr = (IN + LAYERS * OVER) * (1 if score is None else 2)
    LAST: gl.constexpr = IN + 2 * LAYERS * OVER  # the place of W_in on the way down
    ROUNDS: gl.constexpr = (TILES + RING - 1) // RING
    lines = gl.arange(0, EVENTS, layout=gl.SliceLayout(1, narrow))
    strip = gl.arange(0, STRIP, layout=gl.SliceLayout(0, narrow))
    turn = 0
    for item in range(gl.program_id(0), (n + 2 * EVENTS - 1) // (2 * EVENTS) * levels, gl.num_programs(0)):
        j = item % levels
        first = gl.cast(item // levels, gl.int64) * (2 * EVENTS) + group * EVENTS
        there = lines < n - first
        for c in gl.static_range(D_PAD // STRIP):
            cols = c * STRIP + strip
            inside = there[:, None] & (cols < D)[None, :]
            events = gl.load(x + first * D + lines[:, None] * D + cols[None, :], inside, 0.0)
            u = _preprocess(events, table, cols, D_PAD)
            act.index(here + c * STRIP // PANEL).slice(c * STRIP % PANEL, STRIP, 1).store(_half(u, HALF))
        e = gl.zeros([EVENTS, STRIP], gl.float32, narrow)
        sums = _product(act, here, IN, gl.zeros([EVENTS, H], gl.float32, wide), False, ring, full, empty, 0, turn, ROWS,
                        RING, ROUNDS)
        for i in gl.static_range(LAYERS + 1):
            z = _strips(sums, narrow)
            words = gl.zeros([EVENTS, STRIP], gl.int32, narrow)
            for c in gl.static_range(H // STRIP):
                cols = c * STRIP + strip
                if i > 0:
                    bias = gl.load(b + (i - 1) * H + cols)[None, :]
                elif k is not None:
                    level = gl.load(k + first + lines, there, 0)
                    bias = gl.load(b_in + level[:, None] * H + cols[None, :])
                else:
                    bias = gl.load(b_in + (first_level + j) * H + cols)[None, :]
                y, slope = _silu(gl.fma(z[c], 0.5, 0.5 * bias))
                out = gl.load(w_out + cols)[None, :]
                e += y * out  # w_out . h_n, term by term
                spot = act.index(here + c * STRIP // PANEL).slice(c * STRIP % PANEL, STRIP, 1)
                if i < LAYERS:
                    if i > 0:
                        y += spot.load(narrow).to(gl.float32)
                    spot.store(_half(y, HALF))
                    if score is not None:
                        place = bent.index((group * LAYERS + i) * (H // STRIP // PACKED) + c // PACKED)
                        if PACKED == 1:
                            place.store(_half(slope, HALF))
                        else:
                            words = _encode(words, slope, c % PACKED)
                            if c % PACKED == PACKED - 1:
                                place.store(words)
                elif score is not None:  # g_n = w_out
                    spot.store(_half(slope * out, HALF))
            if i < LAYERS:
                sums = _product(act, here, OVER, gl.zeros([EVENTS, H], gl.float32, wide), False, ring, full, empty,
                                IN + i * OVER, turn, ROWS, RING, ROUNDS)
        total = gl.sum(e, 1) + b_out
        gl.store(energy + (first + lines) * levels + j, total, there)
        if flag is not None:
            gl.store(flag + first + lines, (total > threshold).to(gl.uint8), there)
        if score is not None:
            g = gl.zeros([EVENTS, H], gl.float32, wide) + gl.load(
                w_out + gl.arange(0, H, layout=gl.SliceLayout(0, wide)))[None, :]
            for i in gl.static_range(LAYERS - 1, -1, -1):
                g = _product(act, here, OVER, g, True, ring, full, empty, IN + (2 * LAYERS - 1 - i) * OVER, turn,
                             ROWS, RING, ROUNDS)
                q = _strips(g, narrow)
                for c in gl.static_range(H // STRIP):
                    if c % PACKED == 0:
                        words = bent.index((group * LAYERS + i) * (H // STRIP // PACKED) + c // PACKED).load(narrow)
                    slope = words.to(gl.float32) if PACKED == 1 else _decode(words, c % PACKED)
                    spot = act.index(here + c * STRIP // PANEL).slice(c * STRIP % PANEL, STRIP, 1)
                    spot.store(_half(q[c] * slope, HALF))
            fence_async_shared()
            for p in gl.static_range(IN):
                _wait(full, LAST + p, turn, RING, ROUNDS)
                dE_du = gl.zeros([EVENTS, ROWS], gl.float32, across)
                for part in gl.static_range(H // PANEL):  # the tile of W_in, read across
                    tile = ring.index((LAST + p) % RING).slice(part * PANEL, PANEL, 1).permute((1, 0))
                    dE_du = warpgroup_mma(act.index(here + part), tile, dE_du, use_acc=part > 0, is_async=True)
                dE_du = warpgroup_mma_wait(0, deps=[dE_du])
                mbarrier.arrive(empty.index((LAST + p) % RING), count=1)
                wanted = _strips(dE_du, narrow)
                for c in gl.static_range(ROWS // STRIP):
                    cols = p * ROWS + c * STRIP + strip
                    inside = there[:, None] & (cols < D)[None, :]
                    offsets = first * D + lines[:, None] * D + cols[None, :]
                    slope = _slope(gl.load(x + offsets, inside, 0.0), table, cols, D_PAD)
                    gl.store(score + offsets, -wanted[c] * slope, inside)
        for at in gl.static_range(TILES, ROUNDS * RING):  # so that every turn begins at the ring's first place
            _wait(full, at, turn, RING, ROUNDS)
            mbarrier.arrive(empty.index(at % RING), count=1)
        turn ^= 1


@gluon.jit
def _stream(tiles, n, levels, ring, full, empty, TILES: gl.constexpr, ROWS: gl.constexpr, RING: gl.constexpr):
    """All tiles of weights, in the order in which the groups want them, once for every 128 events and level."""
    ROUNDS: gl.constexpr = (TILES + RING - 1) // RING
    phase = 1
    for _ in range(gl.program_id(0), (n + 2 * EVENTS - 1) // (2 * EVENTS) * levels, gl.num_programs(0)):
        for first in range(0, ROUNDS * RING, RING):
            for slot in gl.static_range(RING):
                mbarrier.wait(empty.index(slot), phase)
                mbarrier.expect(full.index(slot), tiles.block_type.nbytes)
                _load_tile(tiles, [(first + slot) * ROWS, 0], full.index(slot), ring.index(slot))  # zeros beyond it
            phase ^= 1


@gluon.jit(do_not_specialize=["n", "first_level", "levels"])
def hopper(x, k, energy, score, flag, tiles, b_in, b, w_out, table, b_out, threshold, n, first_level, levels,
           D: gl.constexpr, D_PAD: gl.constexpr, H: gl.constexpr, LAYERS: gl.constexpr, HALF: gl.constexpr,
           PACKED: gl.constexpr, ROWS: gl.constexpr, RING: gl.constexpr):
    """x (n, D) -> energy (n, levels) at levels first_level, ..., score (n, D) and flag (n,) of the only level.

    `k` (n,) has one level per event, or is None; so are `score` and `flag` where they are not wanted. `tiles` describes
    the weights as `hopper.pack` lays them out, in tiles of ROWS x H; PACKED values of silu' share a word, or are in
    half precision where that is 1.
    """
    UP: gl.constexpr = (D_PAD + LAYERS * H) // ROWS
    ring = gl.allocate_shared_memory(HALF, [RING, ROWS, H], tiles.layout)
    act = gl.allocate_shared_memory(HALF, [2 * (H // PANEL), EVENTS, PANEL], gl.NVMMASharedLayout(128, 16, 2))
    if score is None:
        bent = act
    elif PACKED == 1:
        bent = gl.allocate_shared_memory(HALF, [2 * LAYERS * (H // STRIP), EVENTS, STRIP],
                                         gl.NVMMASharedLayout(2 * STRIP, 16, 2))
    else:
        bent = gl.allocate_shared_memory(gl.int32, [2 * LAYERS * (H // STRIP // PACKED), EVENTS, STRIP],
                                         gl.NVMMASharedLayout(4 * STRIP, 32, 2))
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(RING):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_group, (x, k, energy, score, flag, b_in, b, w_out, table, b_out, threshold, n, first_level, levels, ring,
                  full, empty, act, bent, 0, D, D_PAD, H, LAYERS, HALF, PACKED, ROWS, RING)),
        (_group, (x, k, energy, score, flag, b_in, b, w_out, table, b_out, threshold, n, first_level, levels, ring,
                  full, empty, act, bent, 1, D, D_PAD, H, LAYERS, HALF, PACKED, ROWS, RING)),
        (_stream, (tiles, n, levels, ring, full, empty, UP if score is None else 2 * UP, ROWS, RING)),
    ], [4, 1], [240, 24])
