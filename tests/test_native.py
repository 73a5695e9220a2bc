"""What the C++ backend promises beyond the conformance suite: bits, threads, processes, dispatch."""

from __future__ import annotations

import multiprocessing
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scorers import INSTRUCTION_SETS, events, make, model

from kernels import load_scorer

pytest.importorskip("kernels._native", reason="the C++ library was not built")
ARCHITECTURE = (64, 128, 2)


def test_bits_depend_neither_on_threads_nor_on_place():
    bundle = model(*ARCHITECTURE)
    x = events(1003, 64)
    k = np.random.default_rng(0).integers(0, 10, len(x))
    one = load_scorer(bundle, "native", threads=1)
    energy, score = one.energy_and_score(x, k)
    for threads in (2, 3, 8):
        scorer = load_scorer(bundle, "native", threads=threads)
        for a, b in zip(scorer.energy_and_score(x, k), (energy, score)):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(scorer.energies(x), one.energies(x))
    order = np.random.default_rng(1).permutation(len(x))
    for a, b in zip(one.energy_and_score(x[order], k[order]), (energy, score)):
        np.testing.assert_array_equal(a, b[order])


@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "generic"])
def test_deterministic_gives_an_event_the_same_bits_in_any_batch(isa):
    if isa not in INSTRUCTION_SETS:
        pytest.skip(f"this processor has no {isa}")
    scorer = make(f"native-{isa}", model(*ARCHITECTURE), deterministic=True)
    x = events(65, 64)
    energy, score = scorer.energy_and_score(x)
    for n in (1, 2, 5, 14, 15, 16, 17, 33):
        a, b = scorer.energy_and_score(x[-n:])
        np.testing.assert_array_equal(a, energy[-n:])
        np.testing.assert_array_equal(b, score[-n:])
        np.testing.assert_array_equal(scorer.energies(x[-n:]), scorer.energies(x)[-n:])


def test_concurrent_calls_on_one_scorer():
    scorer = load_scorer(model(*ARCHITECTURE), "native", threads=3)
    x = events(700, 64)
    expected = scorer.energy_and_score(x)

    def call(i: int) -> bool:
        n = 1 + 37 * i % 700
        energy, score = scorer.energy_and_score(x[-n:])
        return n < 15 or (np.array_equal(energy, expected[0][-n:]) and np.array_equal(score, expected[1][-n:]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(300)))


def test_calls_into_given_arrays_leave_no_memory():
    """Python's objects and NumPy's arrays, also for the time of a call; test_c_api.py counts what C++ allocates."""
    scorer = load_scorer(model(*ARCHITECTURE), "native", threads=3)
    x = events(64, 64)
    out = np.empty(64, np.float32), np.empty((64, 64), np.float32)

    def most(calls: int, **options) -> int:
        tracemalloc.start()
        for _ in range(calls):
            scorer.energy_and_score(x, **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    most(10, out=out)
    assert most(1) > x.nbytes  # arrays are counted
    assert min(most(1000, out=out) for _ in range(3)) < 2048  # other threads of the tests may allocate once


def _energy_in_child(scorer, x, results):
    results.put(scorer.energy(x))


def test_after_fork():
    scorer = load_scorer(model(*ARCHITECTURE), "native", threads=4)
    x = events(500, 64)
    energy = scorer.energy(x)  # starts the threads, which the child will not have
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    child = fork.Process(target=_energy_in_child, args=(scorer, x, results), daemon=True)
    child.start()
    np.testing.assert_array_equal(results.get(timeout=30), energy)
    child.join()


def test_bad_threads_and_instruction_set(monkeypatch):
    for threads in (0, -1, 1.5, "two", True):
        with pytest.raises(ValueError, match=r"threads is .*, expected a whole number from 1 on"):
            load_scorer(model(*ARCHITECTURE), "native", threads=threads)
    monkeypatch.setenv("FUSED_EBM_ISA", "altivec")
    with pytest.raises(RuntimeError, match=r"FUSED_EBM_ISA=altivec is not known, expected one of .*generic"):
        load_scorer(model(*ARCHITECTURE), "native")
