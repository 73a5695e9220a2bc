"""Who is measured: our backends and exports and the peers, each built into one thing that can be called and timed."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import peers
from bench.peers import ENERGY, ENERGY_AND_SCORE
from ebm.bundle import Bundle
from kernels import BACKENDS, Scorer, load_scorer
from kernels.registry import ARTEFACTS

TASKS = (ENERGY, ENERGY_AND_SCORE)
INSTRUCTION_SETS = ("amx", "avx512", "avx2", "generic")
_TAKE_THREADS = ("native", "numba")
_REPEATS = 16  # of one input inside C++, then the next input


@dataclass
class Contender:
    """A backend or a peer that could be built. `function(task, batch)` gives the callable that is timed."""

    name: str
    peer: bool
    device: str
    precision: str
    function: Callable[[str, int], Callable[[np.ndarray], Any]]
    load_s: float
    scorer: Scorer | None = None  # of ours

    @property
    def peak(self) -> str:
        """The rate in `limits` that bounds it."""
        return "tile_gflops" if getattr(self.scorer, "isa", None) == "amx" else "fma_gflops"

    def can(self, task: str) -> bool:
        """Whether it gives what the task asks for."""
        return task == ENERGY or self.scorer is None or self.scorer.gives_score

    def inside(self, task: str, threads: int) -> Callable[[np.ndarray], list[float]] | None:
        """x -> seconds of some calls, measured inside C++; None where the backend cannot tell."""
        tell = getattr(getattr(self.scorer, "_model", None), "time", None)
        if tell is None:
            return None
        level, score = self.scorer.default_level, task == ENERGY_AND_SCORE
        return lambda x: tell(x, level, score, _REPEATS, threads)

    def preallocated(self, task: str, batch: int) -> Callable[[np.ndarray], Any]:
        """The same call of a Scorer of ours, writing into arrays that are there already."""
        energy = np.empty(batch, self.scorer.dtype)
        out = energy if task == ENERGY else (energy, np.empty((batch, self.scorer.n_features), self.scorer.dtype))
        call = getattr(self.scorer, task)
        return lambda x: call(x, out=out)


def scorer_names() -> list[str]:
    """What --backend can name beside exported files: backends, backend-precision, native@instruction-set, and peers."""
    ours = [name if i == 0 else f"{name}-{precision}"
            for name, b in BACKENDS.items() for i, precision in enumerate(b.dtypes)]
    return [*ours, *(f"native@{isa}" for isa in INSTRUCTION_SETS), *peers.PEERS]


def check_names(names: Iterable[str]) -> None:
    """ValueError on a name that is none of `scorer_names` and no exported file."""
    for name in names:
        if name not in scorer_names() and not (Path(name).suffix in ARTEFACTS and Path(name).is_file()):
            raise ValueError(f"--backend {name!r}: expected one of {', '.join(scorer_names())}, or an exported file "
                             "such as out/model.onnx")


def build(name: str, bundle: Bundle, threads: int, not_run: dict[str, str], named: bool) -> Contender | None:
    """The contender, or None and the reason in `not_run`; a contender that the caller named raises instead."""
    try:
        if Path(name).suffix in ARTEFACTS:
            return _build_artefact(name, bundle, threads)
        return _build_peer(name, bundle, threads) if name in peers.PEERS else _build_own(name, bundle, threads)
    except Exception as e:  # a runtime that breaks is a result, not the end of the run
        if named:
            raise RuntimeError(f"{name} cannot run: {sentence(e)}") from e
        not_run[name] = sentence(e)
        return None


def _build_peer(name: str, bundle: Bundle, threads: int) -> Contender:
    cls = peers.PEERS[name]
    if why_not := cls.why_not():
        raise RuntimeError(why_not)
    for module in cls.modules:
        importlib.import_module(module)
    start = time.perf_counter()
    peer = cls(bundle, threads)
    return Contender(name, True, peer.device, peer.precision, peer.function, time.perf_counter() - start)


def _build_own(name: str, bundle: Bundle, threads: int) -> Contender:
    name_of_backend, _, isa = name.partition("@")
    backend, _, precision = name_of_backend.partition("-")
    if why_not := BACKENDS[backend].why_not_for(bundle.architecture.kind):
        raise RuntimeError(why_not)
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("it would run in the interpreter (TRITON_INTERPRET=1), whose times mean nothing")
    BACKENDS[backend].load()
    options: dict[str, Any] = {"threads": threads} if backend in _TAKE_THREADS else {}
    if precision:
        options["precision"] = precision
    with _instruction_set(isa):
        return _of_scorer(name, lambda: load_scorer(bundle, backend, **options))


def _build_artefact(name: str, bundle: Bundle, threads: int) -> Contender:
    contender = _of_scorer(name, lambda: load_scorer(name, threads=threads))
    its = contender.scorer
    if (its.bundle.digest, its.default_level, its.preprocess) != (bundle.digest, bundle.default_level, True):
        raise RuntimeError("it was exported from another model, at another noise level or without preprocessing: name "
                           "its model with --model")
    return contender


def _of_scorer(name: str, load: Callable[[], Scorer]) -> Contender:
    start = time.perf_counter()
    scorer = load()
    return Contender(name, False, scorer.device, scorer.precision, lambda task, batch: getattr(scorer, task),
                     time.perf_counter() - start, scorer)


@contextmanager
def _instruction_set(isa: str) -> Iterator[None]:
    """The C++ kernels of that instruction set, or of the one chosen without a name."""
    before = os.environ.get("FUSED_EBM_ISA")
    if isa:
        os.environ["FUSED_EBM_ISA"] = isa
    try:
        yield
    finally:
        os.environ.pop("FUSED_EBM_ISA", None) if before is None else os.environ.update(FUSED_EBM_ISA=before)


def sentence(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    # Long reports say what happened first and why last.
    text = lines[0] if len(lines) == 1 else f"{lines[0][:200]} ... {lines[-1]}"
    return text if len(text) <= 400 else text[:397] + "..."
