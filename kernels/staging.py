"""From host to host through a GPU: few events as the replay of one CUDA graph, many in chunks that overlap.

A program of the kernel takes 16 events at least, and as long for one as for 16; so do as many programs as there are
multiprocessors. So few events are filled up to the next of BUCKETS, each captured once, when it is first needed: one
copy of everything up, the kernel, one copy of everything down, from and to pinned memory that stays where it is. A call
is then one launch. Bucket 1 spares the bus 15 events; the others differ only in what they copy.

More events go in chunks through LANES sets of buffers, each with a stream of its own, so that copies in both directions
and the kernel run at once. What is pinned already is copied from and to where it lies, anything else by way of pinned
buffers.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BUCKETS = (1, 16, 32, 64, 128, 256, 512)
MOST_GRAPHS = 32  # of a scorer, the least recently used is given up first: one for each bucket, task and noise level
LANES = 3  # one copies up, one computes, one copies down
_CHUNK_FLOATS, _MOST_EVENTS = 1 << 21, 1 << 16  # of a lane: 8 MB, some 0.2 ms on the bus, where a launch takes 0.03
_ALIGNMENT = 256  # bytes

Launch = Callable[..., None]  # (x, k, **results), tensors on the device, in turn on the current stream


class Cuda:
    """What staging asks of CUDA."""

    _capturing = threading.Lock()  # one graph at a time in a process

    def __init__(self, device: torch.device):
        self.device, self._pool = device, None

    def stream(self) -> Any:
        """One that waits for nothing but its own work."""
        import torch

        return torch.cuda.Stream(self.device)

    def on(self, stream: Any) -> AbstractContextManager:
        """What is enqueued meanwhile goes to the stream, on its device."""
        import torch

        return torch.cuda.stream(stream)

    def is_pinned(self, a: Tensor) -> bool:
        """Whether the bus copies from there directly."""
        return a.is_pinned()

    def memory(self, nbytes: int, on_host: bool) -> Tensor:
        """Zeros, on the host pinned."""
        import torch

        made = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if on_host else \
            torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return made.zero_()

    def capture(self, stream: Any, work: Callable[[], None]) -> Callable[[], None]:
        """`work`, from now on as one launch. Meanwhile other threads may use the GPU, but not capture graphs."""
        import torch

        with self.on(stream):
            work()  # compiles and loads what cannot be loaded while a graph is captured
        stream.synchronize()
        self._pool = self._pool or torch.cuda.graph_pool_handle()  # graphs of a scorer never run at the same time
        graph = torch.cuda.CUDAGraph()
        options = {"pool": self._pool, "stream": stream, "capture_error_mode": "thread_local"}
        with self._capturing, torch.cuda.graph(graph, **options):
            work()
        return graph.replay


class Interpreter:
    """The same where the kernel runs in Triton's interpreter: everything happens at once, on the host."""

    def stream(self) -> Interpreter:
        """Nothing to wait for."""
        return self

    def synchronize(self) -> None:
        """As a stream."""

    def on(self, stream: Any) -> AbstractContextManager:
        """Nothing."""
        return nullcontext()

    def is_pinned(self, a: Tensor) -> bool:
        """Never."""
        return False

    def memory(self, nbytes: int, on_host: bool) -> Tensor:
        """Zeros."""
        import torch

        return torch.zeros(nbytes, dtype=torch.uint8)

    def capture(self, stream: Any, work: Callable[[], None]) -> Callable[[], None]:
        """The work itself."""
        return work


class Staging:
    """Carries events and results between NumPy arrays and `launch`; any number of threads may call, in turns.

    With `graphs` off, few events take the way of many, and nothing is captured.
    """

    def __init__(self, launch: Launch, gpu: Cuda | Interpreter, graphs: bool = True):
        self._launch, self._gpu, self._lock = launch, gpu, threading.Lock()
        self._most = BUCKETS[-1] if graphs else 0
        self._captured: OrderedDict[tuple, _Lane] = OrderedDict()
        self._lanes: tuple[tuple, list[_Lane]] | None = None  # those of the last task: they are large

    def __call__(self, x: np.ndarray, k: int | np.ndarray, **results: np.ndarray) -> None:
        """x (n, D) float32, n > 0; k an int or int32 (n,); results, named as `launch` names them, are written."""
        given = {"x": x} if isinstance(k, int) else {"x": x, "k": k}
        level = k if isinstance(k, int) else None
        task = (level, *((name, a.shape[1:], a.dtype) for name, a in (given | results).items()))
        with self._lock:
            if len(x) <= self._most:
                bucket = next(b for b in BUCKETS if len(x) <= b)
                lane = self._recent((bucket, task)) or self._capture((bucket, task), level, given, results)
                lane.replayed(given, results)
            else:
                self._in_chunks(task, level, given, results)

    def _recent(self, key: tuple) -> _Lane | None:
        if key in self._captured:
            self._captured.move_to_end(key)
        return self._captured.get(key)

    def _capture(self, key: tuple, level: int | None, given: Mapping, results: Mapping) -> _Lane:
        if len(self._captured) >= MOST_GRAPHS:
            self._captured.popitem(last=False)
        lane = _Lane(self._gpu, self._launch, key[0], level, given, results)
        lane.capture()
        self._captured[key] = lane
        return lane

    def _in_chunks(self, task: tuple, level: int | None, given: Mapping, results: Mapping) -> None:
        n, features = given["x"].shape
        size = min(max(1, _CHUNK_FLOATS // features), _MOST_EVENTS)
        if self._lanes is None or self._lanes[0] != task:
            self._lanes = None  # gives its memory back first
            self._lanes = task, [_Lane(self._gpu, self._launch, size, level, given, results) for _ in range(LANES)]
        lanes = self._lanes[1]
        with _settled(lanes):
            for first, lane in zip(range(0, n, size), cycle(lanes)):
                lane.finish()
                lane.begin(*({name: a[first:first + size] for name, a in part.items()} for part in (given, results)))
            for lane in lanes:
                lane.finish()


@contextmanager
def _settled(lanes: list[_Lane]) -> Iterator[None]:
    """Whatever happens, nothing reads or writes the caller's memory afterwards."""
    try:
        yield
    finally:
        for lane in lanes:
            lane.stream.synchronize()
            lane.waiting.clear()


class _Lane:
    """Buffers for `capacity` events, on both sides of the bus, and a stream."""

    def __init__(self, gpu: Cuda | Interpreter, launch: Launch, capacity: int, level: int | None, given: Mapping,
                 results: Mapping):
        self.gpu, self.launch, self.level = gpu, launch, level
        self.stream = gpu.stream()
        with gpu.on(self.stream):
            (self.up, self.there), (self.down, self.back) = (
                [_arrays(gpu.memory(_nbytes(capacity, like), side), capacity, like) for side in (True, False)]
                for like in (given, results))
        self.waiting: list[tuple[Tensor, Tensor]] = []  # (the caller's, where the result arrives)
        self.stream.synchronize()

    def compute(self, n: int) -> None:
        """The kernel, on the first n events of the buffers."""
        k = self.there["k"][:n] if self.level is None else self.level
        self.launch(self.there["x"][:n], k, **{name: a[:n] for name, a in self.back.items() if name})

    def capture(self) -> None:
        """Everything between the two pinned buffers, for all of the capacity."""
        def work() -> None:
            self.there[""].copy_(self.up[""], non_blocking=True)
            self.compute(len(self.there["x"]))
            self.down[""].copy_(self.back[""], non_blocking=True)

        self.replay = self.gpu.capture(self.stream, work)
        self.views = [{name: a.numpy() for name, a in part.items()} for part in (self.up, self.down)]

    def replayed(self, given: Mapping, results: Mapping) -> None:
        """One call; rows beyond the given ones hold earlier events, or zeros, and nobody reads what becomes of them."""
        up, down = self.views
        n = len(given["x"])
        for name, a in given.items():
            up[name][:n] = a
        with self.gpu.on(self.stream):
            self.replay()
        self.stream.synchronize()
        for name, a in results.items():
            a[...] = down[name][:n]

    def begin(self, given: Mapping, results: Mapping) -> None:
        """Enqueue a chunk."""
        n = len(given["x"])
        with self.gpu.on(self.stream):
            for name, a in given.items():
                source = _tensor(a)
                if not self.gpu.is_pinned(source):
                    source = self.up[name][:n].copy_(source)
                self.there[name][:n].copy_(source, non_blocking=True)
            self.compute(n)
            for name, a in results.items():
                target = _tensor(a)
                arriving = target if self.gpu.is_pinned(target) else self.down[name][:n]
                arriving.copy_(self.back[name][:n], non_blocking=True)
                if arriving is not target:
                    self.waiting.append((target, arriving))

    def finish(self) -> None:
        """Wait for what was begun, and give the caller its results."""
        self.stream.synchronize()
        for target, arrived in self.waiting:
            target.copy_(arrived)
        self.waiting.clear()


def _tensor(a: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(a if a.flags.writeable else a.copy())


def _sizes(capacity: int, like: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {name: capacity * math.prod(a.shape[1:]) * a.itemsize for name, a in like.items()}


def _nbytes(capacity: int, like: Mapping[str, np.ndarray]) -> int:
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in _sizes(capacity, like).values())


def _arrays(memory: Tensor, capacity: int, like: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Name -> (capacity, ...) in `memory`, one after the other; "" is all of it."""
    import torch

    made, at = {"": memory}, 0
    for name, size in _sizes(capacity, like).items():
        dtype = torch.from_numpy(np.empty(0, like[name].dtype)).dtype
        made[name] = memory[at:at + size].view(dtype).view(capacity, *like[name].shape[1:])
        at += -(-size // _ALIGNMENT) * _ALIGNMENT
    return made
