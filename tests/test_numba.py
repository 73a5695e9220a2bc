"""What is particular to the Numba backend: threads, forks, bits, and one compilation for every kind of input."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("numba")

from ebm.bundle import Bundle
from ebm.preprocess import Preprocessing
from kernels.numba_cpu import NumbaScorer
from kernels.numba_kernels import EVENTS, WIDTH, run

MOST = len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def bundle():
    return Bundle.random(30, 64, 2)


@pytest.fixture(scope="module")
def events():
    return np.random.default_rng(5).standard_normal((40 * EVENTS + WIDTH - 1, 30)).astype(np.float32)


@pytest.mark.parametrize("threads", [0, -1, 2.0, "2", True, 10**6])
def test_refuses_threads(bundle, threads):
    with pytest.raises(ValueError, match=rf"threads is {threads!r}, expected a whole number from 1 to \d+"):
        NumbaScorer(bundle, threads=threads)


def test_default_threads(bundle):
    assert 1 <= NumbaScorer(bundle).threads <= MOST


@pytest.mark.parametrize("n", [1, 3, WIDTH, EVENTS + 1, 5 * EVENTS, 40 * EVENTS + WIDTH - 1])
def test_threads_do_not_change_a_bit(bundle, events, n):
    k = np.random.default_rng(n).integers(0, 10, n)
    one, most = (NumbaScorer(bundle, threads=t) for t in (1, MOST))
    for a, b in zip(one.energy_and_score(events[:n], k), most.energy_and_score(events[:n], k)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.energy(events[:n], k), most.energy(events[:n], k))
    np.testing.assert_array_equal(one.energies(events[:n]), most.energies(events[:n]))


@pytest.mark.parametrize("n", [1, 2, 5, 6, WIDTH, WIDTH + 1, EVENTS + 1])
def test_an_event_has_the_same_bits_in_any_batch(events, n):
    p = Preprocessing.identity(30)
    p.transform[:] = np.arange(30) % 3
    bundle = Bundle.random(30, 77, 3, preprocessing=p)
    scorer = NumbaScorer(bundle)
    energy, score = scorer.energy_and_score(events)
    energies = scorer.energies(events)
    np.testing.assert_array_equal(energy, scorer.energy(events))
    np.testing.assert_array_equal(energy, energies[:, bundle.default_level])
    for first in range(0, len(events) - n, 61):
        part = slice(first, first + n)
        part_energy, part_score = scorer.energy_and_score(events[part])
        np.testing.assert_array_equal(part_energy, energy[part])
        np.testing.assert_array_equal(part_score, score[part])
        np.testing.assert_array_equal(scorer.energies(events[part]), energies[part])


@pytest.mark.parametrize("threads", [1, MOST])
def test_concurrent_calls(bundle, events, threads):
    scorer = NumbaScorer(bundle, threads=threads)
    sizes = np.random.default_rng(6).integers(1, len(events), 100)

    def call(n):
        return *scorer.energy_and_score(events[-n:]), scorer.energies(events[:n])

    with ThreadPoolExecutor(8) as callers:
        together = list(callers.map(call, sizes))
    for n, results in zip(sizes, together):
        for a, b in zip(results, call(n)):
            np.testing.assert_array_equal(a, b)


def _in_child(scorer, events, connection):
    connection.send(scorer.energy(events))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_computes_too(bundle, events):
    scorer = NumbaScorer(bundle)
    expected = scorer.energy(events)
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(scorer, events, there), daemon=True)
    child.start()
    assert here.poll(30), "the child hangs"
    np.testing.assert_array_equal(here.recv(), expected)
    child.join()


def test_one_compilation_serves_all(bundle, events, tmp_path):
    scorer = NumbaScorer(bundle)
    x = events[:EVENTS + 3]
    k = np.arange(len(x), dtype=np.int32) % 10
    expected = scorer.energy(x, k), scorer.energy_and_score(x, 3)[0], scorer.energies(x)
    kinds = set(run.signatures)
    read_only, unaligned = x.copy(), np.frombuffer(bytearray(x.nbytes + 1), np.float32, offset=1, count=x.size)
    read_only.flags.writeable = False
    unaligned = unaligned.reshape(x.shape)
    unaligned[:] = x
    k.flags.writeable = False
    mapped = np.memmap(tmp_path / "energy", np.float32, "w+", shape=len(x))
    for other in (read_only, unaligned, x.astype(np.float64), np.asfortranarray(x)):
        np.testing.assert_array_equal(scorer.energy(other, k, out=mapped), expected[0])
        np.testing.assert_array_equal(scorer.energy_and_score(other, np.int64(3))[0], expected[1])
        np.testing.assert_array_equal(scorer.energies(other), expected[2])
    assert set(run.signatures) == kinds
    assert len(kinds) == 1
