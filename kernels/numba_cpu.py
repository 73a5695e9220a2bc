"""Fused CPU kernels that Numba compiles when they are first used: no C++ compiler needed.

Threads are Python threads in kernels that release the GIL, not prange: Numba's thread pools abort the process
on concurrent calls (workqueue) or after a fork (OpenMP), and spin while others need the cores.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from ebm.bundle import Bundle
from kernels.numba_kernels import EVENTS, ROWS, WIDTH, run
from kernels.packing import pack
from kernels.scorer import Scorer

FEW = 5  # of so many events left over, one at a time is faster than a padded tile
LEAST, MOST = 2, 8  # tiles that a thread takes at a time: worth waking it for, and even shares at the end


def _blocks(w: np.ndarray) -> np.ndarray:
    """W (R, K) as [R / ROWS][K][ROWS], flat, zero rows at the end."""
    padded = np.zeros((-(-len(w) // ROWS) * ROWS, w.shape[1]), np.float32)
    padded[:len(w)] = w
    return padded.reshape(-1, ROWS, w.shape[1]).transpose(0, 2, 1).ravel()


class NumbaScorer(Scorer):
    """Compiled at the first call, which takes seconds; later processes read the compiled code from the cache.

    `threads` (default: the cores this process may use) is the most that one call takes. An event has the same
    bits for any number of threads, in any batch and from any of the methods.
    """

    name = "numba"

    def __init__(self, bundle: Bundle, *, threads: int | None = None, **options):
        super().__init__(bundle, **options)
        most = numba.config.NUMBA_NUM_THREADS
        if threads is None:
            threads = min(len(os.sched_getaffinity(0)), most)
        elif isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or not 1 <= threads <= most:
            raise ValueError(f"threads is {threads!r}, expected a whole number from 1 to {most} (NUMBA_NUM_THREADS)")
        self.threads = int(threads)
        packed = pack(bundle, self.preprocess)
        n_layers, hidden = packed.b.shape
        rows = np.vstack([packed.w_out[None], packed.b, packed.b_in])
        matrices = [packed.w_in, *packed.w, *packed.w.transpose(0, 2, 1), packed.w_in.T]
        weights = np.concatenate([_blocks(w) for w in matrices])
        aligned = np.empty(len(weights) + 16, np.float32)
        aligned = aligned[-aligned.ctypes.data % 64 // 4:][:len(weights)]
        aligned[:] = weights
        p = packed.preprocessing
        prep = np.stack([p.marker, p.impute, p.transform.astype(np.float32), p.scale, p.mean, p.inv_std], axis=1)
        self._model = (aligned, np.pad(rows, ((0, 0), (0, -hidden % ROWS))), np.ascontiguousarray(prep), n_layers,
                       hidden, np.float32(packed.b_out))
        self._each_level = np.arange(self.n_levels, dtype=np.int32).reshape(-1, 1)
        self._no_level, self._no_score = np.empty(0, np.int32), np.empty((0, 0), np.float32)
        self._pool, self._pool_of = None, 0

    def _energy(self, x, k, energy):
        self._compute(x, self._each_level[k] if isinstance(k, int) else k, energy.reshape(-1, 1), self._no_score)

    def _energy_and_score(self, x, k, energy, score):
        self._compute(x, self._each_level[k] if isinstance(k, int) else k, energy.reshape(-1, 1), score)

    def _energies(self, x, energies):
        self._compute(x, self._no_level, energies, self._no_score)

    def _compute(self, x: np.ndarray, k: np.ndarray, energy: np.ndarray, score: np.ndarray) -> None:
        # Read-only and unaligned arrays have types of their own, for which Numba would compile again.
        # `out` may be of a subclass, such as a memory map.
        x, k = (a if a.flags.behaved else a.copy() for a in (x, k))
        energy, score = np.asarray(energy), np.asarray(score)
        arguments = (x, k, energy, score, *self._model)
        n, left = len(x), len(x) % EVENTS
        if left <= WIDTH:
            if left:
                run(1 if left <= FEW else WIDTH, n - left, n, *arguments)
            n -= left
        tiles = -(-n // EVENTS)
        step = EVENTS * min(max(LEAST, -(-tiles // self.threads)), MOST)
        starts = iter(range(0, n, step))

        def work() -> None:
            for lo in starts:
                run(EVENTS, lo, min(lo + step, n), *arguments)

        helpers = [self._executor().submit(work) for _ in range(min(self.threads, -(-n // step)) - 1)]
        work()
        for helper in helpers:
            if not helper.cancel():  # one that did not start has nothing left to do
                helper.result()

    def _executor(self) -> ThreadPoolExecutor:
        if self._pool_of != os.getpid():  # threads do not survive a fork
            self._pool, self._pool_of = ThreadPoolExecutor(max(1, self.threads - 1), "fused-ebm"), os.getpid()
        return self._pool
