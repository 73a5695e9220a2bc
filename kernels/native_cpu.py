"""The C++ backend: fused kernels for the instruction set of this processor (FUSED_EBM_ISA names another)."""

from __future__ import annotations

import os
from dataclasses import asdict

from ebm.bundle import Bundle
from kernels import _native
from kernels.packing import pack
from kernels.registry import REDUCED
from kernels.scorer import Scorer

PRECISIONS = ("fp32", *REDUCED)


class NativeScorer(Scorer):
    """Energy and score by `kernels/native`; see kernels/README.md for how.

    `threads` (default: the processors this process may use) share the tiles of a large batch; an event's bits
    depend neither on them nor on its place. `deterministic=True` gives an event the same bits in a batch of any
    size, too; without it a batch of a few events takes a faster path that sums in another order.

    `precision` is "fp32", "int16" (weights of 16 bits, a scale for every channel) or "int8" (weights and activations
    of 8 bits, energies only); the threshold is the one that was calibrated in fp32. RuntimeError where this processor
    cannot run it. `load_scorer` asks for the physics report of a reduced precision, this class does not.
    """

    name = "native"

    def __init__(self, bundle: Bundle, *, threads: int | None = None, deterministic: bool = False,
                 precision: str = "fp32", **options):
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}, expected {', '.join(map(repr, PRECISIONS))}")
        super().__init__(bundle, **options)
        self.precision = precision
        self.gives_score = precision != "int8"
        self.threads = check_threads(threads)
        self.deterministic = deterministic
        packed = asdict(pack(bundle, self.preprocess))
        self._model = _native.Model(**packed.pop("preprocessing"), **packed, precision=precision)
        self.isa = self._model.isa

    def _energy(self, x, k, energy):
        return self._energy_and_score(x, k, energy, None)

    def _energy_and_score(self, x, k, energy, score):
        if score is not None and not self.gives_score:
            raise ValueError("precision int8 gives energies only; load the model with fp32 or int16 for scores")
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
