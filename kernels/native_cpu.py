"""The C++ backend: fused kernels for the instruction set of this processor (FUSED_EBM_ISA names another)."""

from __future__ import annotations

import os
from dataclasses import asdict

from ebm.bundle import Bundle
from kernels import _native
from kernels.packing import pack
from kernels.scorer import Scorer


class NativeScorer(Scorer):
    """Energy and score by `kernels/native`; see kernels/README.md for how.

    `threads` (default: the processors this process may use) share the tiles of a large batch; an event's bits
    depend neither on them nor on its place. `deterministic=True` gives an event the same bits in a batch of any
    size, too; without it a batch of a few events takes a faster path that sums in another order.
    """

    name = "native"

    def __init__(self, bundle: Bundle, *, threads: int | None = None, deterministic: bool = False, **options):
        super().__init__(bundle, **options)
        self.threads = check_threads(threads)
        self.deterministic = deterministic
        packed = asdict(pack(bundle, self.preprocess))
        self._model = _native.Model(**packed.pop("preprocessing"), **packed)
        self.isa = self._model.isa

    def _energy(self, x, k, energy):
        return self._energy_and_score(x, k, energy, None)

    def _energy_and_score(self, x, k, energy, score):
        level, levels = (k, None) if isinstance(k, int) else (0, k)
        return self._model.run(x, level, levels, energy, score, self.threads, self.deterministic)

    def _energies(self, x, energies):
        return self._model.run_all_levels(x, energies, self.threads)


def check_threads(threads: int | None) -> int:
    """The number of threads asked for; by default the processors that this process may use."""
    if threads is None:
        return len(os.sched_getaffinity(0))
    if type(threads) is not int or threads < 1:
        raise ValueError(f"threads is {threads!r}, expected a whole number from 1 on")
    return threads
