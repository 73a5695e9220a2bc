"""Between host and GPU: buckets, chunks, padding and bounds, on a GPU that pretends; and what CUDA is asked for."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from scorers import events, model

torch = pytest.importorskip("torch")
triton_gpu = pytest.importorskip("kernels.triton_gpu")
from kernels import staging  # noqa: E402
from kernels.staging import BUCKETS, MOST_GRAPHS, Cuda, Interpreter, Staging  # noqa: E402

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
D = 3


class Pretended(Interpreter):
    """The host as a GPU: captures and waits are counted, and chosen arrays are pinned."""

    def __init__(self, pinned=()):
        self.captured, self.waits, self.pinned = 0, 0, {a.ctypes.data for a in pinned}

    def synchronize(self):
        self.waits += 1

    def is_pinned(self, a):
        return a.data_ptr() in self.pinned

    def capture(self, stream, work):
        self.captured += 1
        work()
        return work


class Launches(list):
    """A launch that gives x[:, 0] + k and 2 x, and remembers of how many events it was asked."""

    def __call__(self, x, k, energy, score=None, flag=None):
        self.append(len(x))
        assert {t.data_ptr() % 16 for t in (x, energy, score, flag) if t is not None} == {0}
        assert isinstance(k, int) or (k.dtype == torch.int32 and 0 <= int(k.min()) <= int(k.max()) < 10)
        value = x[:, 0] + k
        energy.copy_(value if energy.ndim == 1 else value[:, None] + torch.arange(energy.shape[1]))
        if score is not None:
            score.copy_(2 * x)
        if flag is not None:
            flag.copy_(value > 0)


def check(stage, n, k, seed=0, x=None, outs=None):
    rng = np.random.default_rng((n, seed))
    x = rng.integers(-9, 9, (n, D)).astype(np.float32) if x is None else x
    k = rng.integers(0, 10, n).astype(np.int32) if k is None else k
    energy, score = outs or (np.full(n, np.nan, np.float32), np.full((n, D), np.nan, np.float32))
    flag = np.full(n, 7, np.uint8)
    stage(x, k, energy=energy, score=score, flag=flag)
    np.testing.assert_array_equal(energy, x[:, 0] + k)
    np.testing.assert_array_equal(score, 2 * x)
    np.testing.assert_array_equal(flag, energy > 0)


@pytest.mark.parametrize("k", [3, None], ids=["one level", "per event"])
@pytest.mark.parametrize("n", [*BUCKETS, *(b + 1 for b in BUCKETS[1:-1]), 2, 300])
def test_few_events_fill_a_bucket_that_is_captured_once(n, k):
    gpu, launches = Pretended(), Launches()
    stage = Staging(launches, gpu)
    for seed in range(3):
        check(stage, n, k, seed)
    assert gpu.captured == 1
    assert set(launches) == {next(b for b in BUCKETS if n <= b)}
    assert len(launches) == 4  # once more to be captured


def test_each_task_and_level_has_its_graph_and_their_number_is_bounded():
    gpu = Pretended()
    stage = Staging(Launches(), gpu)
    x, energy, energies = np.ones((2, D), np.float32), np.empty(2, np.float32), np.empty((2, 4), np.float32)
    stage(x, 5, energy=energies)
    np.testing.assert_array_equal(energies, [[6, 7, 8, 9]] * 2)
    for level in range(MOST_GRAPHS + 8):
        stage(x, level, energy=energy)
        assert energy.tolist() == [1 + level] * 2
    assert (gpu.captured, len(stage._captured)) == (1 + MOST_GRAPHS + 8, MOST_GRAPHS)
    stage(x, 8, energy=energy)  # still there, and now the last to be given up
    stage(x, 50, energy=energy)
    stage(x, 8, energy=energy)
    assert gpu.captured == 1 + MOST_GRAPHS + 9


@pytest.mark.parametrize("k", [3, None], ids=["one level", "per event"])
@pytest.mark.parametrize("n", [513, 999, 1000, 1001, 3000, 3001, 10_007])
def test_many_events_go_in_chunks(n, k, monkeypatch):
    monkeypatch.setattr(staging, "_CHUNK_FLOATS", 1000 * D + 1)
    gpu, launches = Pretended(), Launches()
    stage = Staging(launches, gpu)
    check(stage, n, k)
    check(stage, n, k, seed=1)
    assert gpu.captured == 0
    assert launches == 2 * [min(1000, n - first) for first in range(0, n, 1000)]
    lanes = stage._lanes[1]
    check(stage, n + 1, k)
    assert stage._lanes[1] is lanes
    check(stage, 700, 4)
    assert stage._lanes[1] is not lanes  # one set of large buffers, of the task that was last


def test_without_graphs_everything_goes_in_chunks():
    gpu, launches = Pretended(), Launches()
    check(Staging(launches, gpu, graphs=False), 7, None)
    assert (gpu.captured, launches) == (0, [7])


def test_chunks_hold_some_megabytes_whatever_the_width():
    for features, size in ((1, 65536), (30, 65536), (64, 32768), (256, 8192)):
        launches = []
        stage = Staging(lambda x, k, energy, seen=launches: seen.append(len(x)), Pretended(), graphs=False)
        stage(np.zeros((70_000, features), np.float32), 0, energy=np.empty(70_000, np.float32))
        assert launches[0] == size


def test_pinned_memory_is_copied_from_and_to_directly():
    n = 600
    x, energy, score = np.ones((n, D), np.float32), np.empty(n, np.float32), np.empty((n, D), np.float32)
    stage = Staging(Launches(), Pretended(pinned=(x, energy, score)))
    check(stage, n, 3, x=x, outs=(energy, score))
    lane = stage._lanes[1][0]
    assert not lane.up["x"].any()
    assert not lane.down["energy"].any()
    assert lane.down["flag"][:n].all()  # which was not pinned


def test_arrays_that_cannot_be_written_are_read():
    x = np.ones((600, D), np.float32)
    x.flags.writeable = False
    for n in (5, 600):
        check(Staging(Launches(), Pretended()), n, 3, x=x[:n])


def test_a_launch_that_fails_leaves_nothing_under_way(monkeypatch):
    monkeypatch.setattr(staging, "_CHUNK_FLOATS", 1000 * D)
    gpu, launches = Pretended(), Launches()

    def launch(x, k, **results):
        if len(launches) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        launches(x, k, **results)

    stage = Staging(launch, gpu)
    energy = np.full(5000, np.nan, np.float32)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        stage(np.zeros((5000, D), np.float32), 3, energy=energy)
    assert all(lane.waiting == [] for lane in stage._lanes[1])
    assert gpu.waits >= 2 * staging.LANES
    launches.append(None)
    stage(np.zeros((5000, D), np.float32), 3, energy=energy)
    assert (energy == 3).all()
    failing = Staging(lambda *a, **kw: 1 / 0, gpu)
    with pytest.raises(ZeroDivisionError):
        failing(np.zeros((5, D), np.float32), 3, energy=energy[:5])
    assert len(failing._captured) == 0


def test_threads_take_turns():
    stage = Staging(Launches(), Pretended())
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(check, stage, 1 + i % 40, None if i % 2 else i % 10, i) for i in range(200)]:
            done.result()


@interpreted
@pytest.mark.parametrize("n", [1, 17, 515])
def test_graphs_chunks_and_tensors_agree_to_the_bit(n, monkeypatch):
    monkeypatch.setattr(staging, "_CHUNK_FLOATS", 250 * 5)
    bundle, x = model(5, 64, 1), events(n, 5)
    k = np.arange(n) % 10
    graphs, chunks = (triton_gpu.TritonScorer(bundle, graphs=g) for g in (True, False))
    for a, b in zip(graphs.energy_and_score(x, k), chunks.energy_and_score(x, k)):
        np.testing.assert_array_equal(a, b)


class Calls(list):
    """torch.cuda in so far as it is asked for: every call is remembered."""

    def __init__(self, monkeypatch):
        empty = torch.empty

        def memory(*shape, dtype, device=None, pin_memory=False):
            self.append(f"{'pinned' if pin_memory else device} {shape[0]}")
            return empty(*shape, dtype=dtype).fill_(255)

        class Stream(SimpleNamespace):
            synchronize = staticmethod(lambda: self.append("wait"))

        @contextmanager
        def inside(name, *shown):
            self.append(name)
            yield
            self.append(f"end of {name}")

        def graph(graph, *, pool, stream, capture_error_mode):
            assert (pool, type(stream), capture_error_mode) == ("pool", Stream, "thread_local")
            return inside("capture")

        monkeypatch.setattr(torch, "empty", memory)
        for name, fake in {"Stream": lambda device: Stream(device=device), "stream": lambda s: inside("stream"),
                           "graph_pool_handle": lambda: self.append("pool") or "pool", "graph": graph,
                           "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.append("replay"))}.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def take(self):
        said, self[:] = list(self), []
        return said


def test_what_cuda_is_asked_for(monkeypatch):
    calls = Calls(monkeypatch)
    stage = Staging(lambda x, k, energy: calls.append(f"kernel {len(x)}"), Cuda(torch.device("cuda:1")))
    x, energy = np.zeros((600, D), np.float32), np.empty(600, np.float32)
    stage(x[:3], 5, energy=energy[:3])
    on = ["stream", "replay", "end of stream", "wait"]
    assert calls.take() == [
        "stream", "pinned 256", "cuda:1 256", "pinned 256", "cuda:1 256", "end of stream", "wait",  # x 16 D, energy 16
        "stream", "kernel 16", "end of stream", "wait",  # compiled and loaded before it is captured
        "pool", "capture", "kernel 16", "end of capture", *on]
    (lane,) = stage._captured.values()
    assert not lane.up["x"][3:].any()  # what fills the bucket up is sound from the first call on
    stage(x[:16], 5, energy=energy[:16])
    assert calls.take() == on  # a call is one launch and one wait
    stage(x[:1], 5, energy=energy[:1])
    assert "pool" not in calls.take()  # the graphs of a scorer share their scratch memory
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    stage(x, 5, energy=energy)
    said = calls.take()
    assert [c for c in said if c.startswith("kernel")] == ["kernel 600"]
    assert said[-5:] == ["wait"] * 5  # the lanes at the end, and what makes sure of it


def test_one_graph_at_a_time_in_a_process(monkeypatch):
    calls, inside, most = Calls(monkeypatch), threading.Semaphore(0), []

    @contextmanager
    def graph(*a, **kw):
        most.append(inside.release())
        assert Cuda._capturing.locked()
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    for _ in range(2):
        Staging(lambda x, k, energy: None, Cuda(torch.device("cuda")))(
            np.zeros((1, D), np.float32), 5, energy=np.empty(1, np.float32))
    assert len(most) == 2
    assert calls.count("replay") == 2
