"""Runs a Gluon kernel for Hopper in NumPy: Triton's interpreter cannot.

It computes what a program computes, and breaks what a GPU would break: warps run interleaved at random, copies by TMA
and products of warp groups happen as late as they may, shared memory starts as NaN, a wait that nothing can end is a
deadlock, a product that reads what no fence has published is an error, and so is an access outside of an array.
"""

from __future__ import annotations

import random
import threading
import types
from typing import Any

import numpy as np


class Tensor(np.ndarray):
    """An array with the methods that kernels use. bfloat16 is float32 with rounded values."""

    def permute(self, *axes):
        return self.transpose(*axes)

    def split(self):
        return self[..., 0], self[..., 1]

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else self.astype(dtype)


class Pointer:
    """A place in a flat array, or as many as `offset` has elements."""

    def __init__(self, array: np.ndarray, offset=0):
        self.array, self.offset = array, offset

    def __add__(self, more):
        return Pointer(self.array, self.offset + np.asarray(more, np.int64))

    def places(self, mask):
        places = np.broadcast_arrays(self.offset, mask)[0] if mask is not None else np.asarray(self.offset)
        wrong = (places < 0) | (places >= self.array.size)
        if (wrong if mask is None else wrong & mask).any():
            raise IndexError(f"{places[wrong].flat[0]} is outside of {self.array.size} elements")
        return places.clip(0, self.array.size - 1)


class Shared:
    """A buffer in shared memory, or a view of one, with the warps whose writes no fence has published yet."""

    def __init__(self, machine, array, unpublished):
        self.machine, self.array, self.unpublished = machine, array, unpublished

    def index(self, i):
        return Shared(self.machine, self.array[i], self.unpublished[i])

    def slice(self, start, length, dim):
        rows = (slice(None),) * dim + (slice(start, start + length),)
        return Shared(self.machine, self.array[rows], self.unpublished[rows])

    def permute(self, order):
        return Shared(self.machine, self.array.transpose(order), self.unpublished.transpose(order))

    def load(self, layout):
        return self.array.copy().view(Tensor)

    def store(self, values):
        assert values.shape == self.array.shape
        self.array[...] = values
        self.unpublished[...] = self.machine.me()

    def published(self) -> np.ndarray:
        assert (self.unpublished == -1).all(), "a product reads what no fence has published"
        return self.array


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self):
        self.phase = self.count = self.missing = self.bytes = 0

    def init(self, count):
        self.count = self.missing = count

    def arrive(self, count=1, more_bytes=0):
        self.missing -= count
        self.bytes += more_bytes
        assert self.missing >= 0, "more arrivals than were announced"
        if self.missing == 0 and self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count


class Barriers:
    def __init__(self, n):
        self.of = [Barrier() for _ in range(n)]

    def index(self, i):
        return self.of[i]


class Product:
    """A product of a warp group that may not have been computed yet."""

    def __init__(self, a, b, sums, use_acc):
        self.operands, self.value = (a, b, sums, use_acc), None

    def compute(self):
        a, b, sums, use_acc = self.operands
        total = a.published().astype(np.float32) @ b.published().astype(np.float32)
        before = sums.value if isinstance(sums, Product) else sums
        self.value = (total + before if use_acc else total).view(Tensor)


class Descriptor:
    """A tensor descriptor: blocks of `block` rows; what is beyond the array is zero."""

    def __init__(self, array, block):
        self.array, self.block, self.layout = array, block, "rows"
        self.block_type = types.SimpleNamespace(nbytes=block[0] * block[1] * 2)


class Machine:
    """One program after another, its warps interleaved by `seed`."""

    def __init__(self, seed: int = 0):
        self.random = random.Random(seed)
        self.turn = threading.Condition()
        self.ids: dict[int, int] = {}

    def me(self) -> int:
        return self.ids.get(threading.get_ident(), -2)

    def run(self, kernel, grid: int, **arguments) -> None:
        """`kernel` is a gluon.jit function; arrays are flat or `Descriptor`s, everything by name."""
        names = self.names(kernel)
        for program in range(grid):
            self.program, self.programs, self.buffers, self.copies = program, grid, [], []
            given = {k: Pointer(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
            names[kernel.fn.__name__](**given)
            assert not self.copies, "a copy was still under way at the end"

    def names(self, kernel) -> dict[str, Any]:
        """The globals of the kernel's module, with plain functions for compiled ones and this machine for the GPU."""
        gl = types.SimpleNamespace(
            constexpr=lambda v: v, arange=lambda a, b, layout: np.arange(a, b, dtype=np.int32).view(Tensor),
            zeros=lambda shape, dtype, layout: np.zeros(shape, dtype).view(Tensor), full_like=np.full_like,
            load=self.load, store=self.store, where=_where, minimum=np.minimum, maximum=np.maximum, abs=np.abs,
            fma=_fma, sum=lambda a, axis: a.sum(axis, dtype=np.float32), cast=lambda a, dtype: a, static_range=range,
            program_id=lambda axis: self.program, num_programs=lambda axis: self.programs,
            inline_asm_elementwise=_asm, convert_layout=lambda a, layout, assert_trivial: a,
            allocate_shared_memory=self.allocate, warp_specialize=self.specialize,
            float16=np.float16, bfloat16=BFLOAT16, float32=np.float32, int32=np.int32, int64=np.int64, uint8=np.uint8,
            **{name: lambda *a: a for name in ("SliceLayout", "NVMMADistributedLayout", "NVMMASharedLayout")})
        names = {k: getattr(v, "value", v) if type(v).__name__ == "constexpr" else v
                 for k, v in kernel.fn.__globals__.items()}
        names |= {"gl": gl, "mbarrier": types.SimpleNamespace(
            MBarrierLayout=lambda: None, init=lambda b, count: b.init(count), wait=self.wait,
            arrive=lambda b, count: (self.switch(), b.arrive(count)),
            expect=lambda b, nbytes: b.arrive(1, nbytes))}
        names |= {"fence_async_shared": self.fence, "warpgroup_mma": self.multiply,
                  "warpgroup_mma_wait": self.wait_for_products, "_load_tile": self.copy_tile}
        for name, value in names.items():
            if type(value).__name__ == "GluonJITFunction":
                names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        return names

    def load(self, pointer, mask=None, other=None):
        values = pointer.array[pointer.places(mask)].view(Tensor)
        return values if mask is None else np.where(mask, values, values.dtype.type(other)).view(Tensor)

    def store(self, pointer, values, mask):
        places, values, mask = np.broadcast_arrays(pointer.places(mask), values, mask)
        pointer.array[places[mask]] = values[mask]

    def allocate(self, dtype, shape, layout):
        if layout is None:
            return Barriers(shape[0])
        array = np.full(shape, np.nan, np.float32) if dtype != np.int32 else np.full(shape, 0x7FC00000, np.int32)
        self.buffers.append(Shared(self, array, np.full(shape, -1)))
        return self.buffers[-1]

    def fence(self):
        for buffer in self.buffers:
            buffer.unpublished[buffer.unpublished == self.me()] = -1

    def copy_tile(self, tiles, place, barrier, result):
        def copy():
            assert place[1] == 0
            rows = tiles.array[place[0]:place[0] + tiles.block[0]]
            result.array[...] = 0
            result.array[:len(rows)] = rows
            barrier.bytes -= tiles.block_type.nbytes
            barrier.arrive(0)

        result.array[...] = np.nan  # until it has come
        self.copies.append(copy)
        self.switch()

    def multiply(self, a, b, sums, use_acc, is_async):
        product = Product(a, b, sums, use_acc)
        self.under_way[self.me()].append(product)
        self.switch()
        return product

    def wait_for_products(self, outstanding, deps):
        self.switch()
        mine = self.under_way[self.me()]
        while len(mine) > outstanding:
            mine.pop(0).compute()
        done = deps[0]
        return done if done.value is None else done.value

    def wait(self, barrier, phase):
        while barrier.phase == phase & 1:
            self.switch(blocked_by=(barrier, phase & 1))

    def specialize(self, functions, warps, registers):
        self.under_way: dict[int, list] = {i: [] for i in range(len(functions))}
        self.blocked: dict[int, Any] = dict.fromkeys(range(len(functions)))
        self.running, self.failed = 0, None
        threads = [threading.Thread(target=self._warps, args=(i, f, a)) for i, (f, a) in enumerate(functions)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if self.failed:
            raise self.failed

    def _warps(self, i, function, arguments):
        self.ids[threading.get_ident()] = i
        with self.turn:
            self.turn.wait_for(lambda: self.running == i or self.failed)
            try:
                if not self.failed:
                    function(*arguments)
                del self.blocked[i]
                self._next()
            except BaseException as e:
                self.failed = self.failed or e
                self.turn.notify_all()

    def _next(self):
        """Somebody who can go on, after a copy or two."""
        def able():
            return [i for i, b in self.blocked.items() if b is None or b[0].phase != b[1]]

        while self.copies and (not able() or self.random.random() < 0.3):
            self.copies.pop(0)()
        if able():
            self.running = self.random.choice(able())
        elif self.blocked:
            self.failed = self.failed or RuntimeError(f"deadlock: {len(self.blocked)} groups of warps wait for ever")
        self.turn.notify_all()

    def switch(self, blocked_by=None):
        me = self.me()
        self.blocked[me] = blocked_by
        self._next()
        self.turn.wait_for(lambda: self.running == me or self.failed)
        if self.failed:
            raise RuntimeError("another group of warps has failed")
        self.blocked[me] = None


class BFLOAT16(np.float32):
    """The dtype's name; `_asm` rounds."""


def _where(condition, a, b):
    return np.where(condition, a, b).view(Tensor)


def _fma(a, b, c):
    return (np.asarray(a, np.float64) * b + c).astype(np.float32).view(Tensor)


def _bits(a):
    return np.ascontiguousarray(a).view(np.uint32)


def _prmt(a, b, selector):
    of = np.stack([(_bits(v) >> np.uint32(8 * i)) & np.uint32(255) for v in (a, b) for i in range(4)])
    taken = [of[(int(selector, 16) >> (4 * i)) & 15] << np.uint32(8 * i) for i in range(4)]
    return (taken[0] | taken[1] | taken[2] | taken[3]).view(np.int32)


def _tanh(a):
    """As far off as the instruction may be: 2^-11 of the value."""
    return np.tanh(a) * (1 + 2.0**-11 * np.where(_bits(a) & 1, 1, -1)).astype(np.float32)


def _bfloat16(a):
    bits = _bits(a)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000))
    return np.where(np.isnan(a), np.float32(np.nan), rounded.view(np.float32))


INSTRUCTIONS = {
    "cvt.rn.satfinite.f16x2.f32": lambda a: np.clip(a, -65504, 65504).astype(np.float16).astype(np.float32),
    "cvt.rn.bf16x2.f32": _bfloat16, "tanh.approx.f32": _tanh,
    "sqrt.approx.ftz.f32": np.sqrt, "rcp.approx.ftz.f32": lambda a: np.float32(1) / a, "lg2.approx.ftz.f32": np.log2,
}


def _asm(text, constraints, operands, dtype, is_pure, pack):
    name, rest = text.split(" ", 1)
    if name == "prmt.b32":
        return _prmt(*operands, rest.rstrip(";").split(",")[-1].strip()).view(Tensor)
    with np.errstate(all="ignore"):
        return INSTRUCTIONS[name](*operands).astype(np.float32).view(Tensor)
