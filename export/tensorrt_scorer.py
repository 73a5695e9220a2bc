"""The Scorer of a TensorRT engine: buffers that stay, one CUDA graph per small batch, CUDA tensors without copies."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.scorers import ArtefactScorer, CannotRun
from export.to_tensorrt import listener, this_gpu, why_not
from kernels.scorer import Array

GRAPHED = 256  # up to here launching takes longer than computing: the whole profile runs, as one recorded graph
ALIGNMENT = 256  # bytes, of every address that TensorRT is given


class TensorRTScorer(ArtefactScorer):
    """An engine on the GPU it was built for. Larger batches than its largest run in several pieces.

    CUDA tensors on `device` are taken and given back there; anything else is copied to the GPU and back. Raises
    RuntimeError where the engine cannot run: no TensorRT, no GPU, another version of TensorRT or kind of GPU than it
    was built with, or not enough memory.
    """

    name = "tensorrt"

    def __init__(self, path: str | Path, *, on_nonfinite: str = "raise", threads: int | None = None):
        super().__init__(path, on_nonfinite=on_nonfinite, threads=threads)
        if reason := why_not():
            raise CannotRun(f"{self.path} cannot run: {reason}")
        import tensorrt as trt

        built = self.entry["tensorrt"], self.entry["compute_capability"]
        here = trt.__version__, this_gpu()[1]
        if built != here:
            raise CannotRun("{} was built by TensorRT {} for {}, here are TensorRT {} and {}: an engine runs nowhere "
                            "else, export the model again here".format(self.path, *built, *here))
        self.precision, self._device = self.entry["precision"], _device()
        self.device = str(self._device)
        self._heard, self._profiles = listener(trt), self.entry["profiles"]
        self._runtime = trt.Runtime(self._heard)
        self._engine = self._loaded(self._runtime.deserialize_cuda_engine(self.path.read_bytes()))
        self._contexts: dict[int, Any] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._lock, self._stream = threading.Lock(), torch.cuda.Stream(self._device)
        widths = {"events": (self.n_features,), "score": (self.n_features,), "energies": (self.n_levels,)}
        self._shapes = {name: widths.get(name, ()) for name in ("events", *self.options.outputs)}
        try:
            self._buffers = self._empty(self._profiles[-1][2], self._shapes, self._device)
        except torch.cuda.OutOfMemoryError:
            raise CannotRun(f"{self.path}: the GPU has no memory for batches of {self._profiles[-1][2]} events: "
                            "export with a smaller batch_max") from None

    def energy(self, x: Array, k: Array = None, *, out: Array = None) -> Array:
        """As Scorer.energy; CUDA tensors stay on the GPU."""
        return self._resident(x, k, ("energy",), (out,))[0] if self._is_here(x) else super().energy(x, k, out=out)

    def energy_and_score(self, x: Array, k: Array = None, *, out: tuple = (None, None)) -> tuple[Array, Array]:
        """As Scorer.energy_and_score; CUDA tensors stay on the GPU."""
        if not self._is_here(x):
            return super().energy_and_score(x, k, out=out)
        return self._resident(x, k, ("energy", "score"), out)

    def energies(self, x: Array, *, out: Array = None) -> Array:
        """As Scorer.energies; CUDA tensors stay on the GPU."""
        return self._resident(x, None, ("energies",), (out,))[0] if self._is_here(x) else super().energies(x, out=out)

    def flag(self, x: Array) -> Array:
        """As ArtefactScorer.flag; CUDA tensors stay on the GPU."""
        if "flag" not in self.options.outputs or not self._is_here(x):
            return super().flag(x)
        return self._resident(x, None, ("energy", "flag"), (None, None))[1]

    def _is_here(self, x: Array) -> bool:
        return isinstance(x, Tensor) and x.device.type == self._device.type

    def _resident(self, x: Tensor, k: Array, names: tuple[str, ...], out: tuple) -> tuple[Tensor, ...]:
        if x.device != self._device:
            raise ValueError(f"events are on {x.device}, this scorer is on {self.device}")
        if x.dtype.is_complex or x.dtype == torch.bool:
            raise ValueError(f"events are {x.dtype}, expected real numbers (float32 is the fast way in)")
        if x.ndim != 2 or x.shape[1] != self.n_features:
            raise ValueError(f"expected events of shape (n, {self.n_features}), given {tuple(x.shape)}")
        self._levels(k, len(x))
        for name, o in zip(names, out):
            shape = (len(x), *self._shapes.get(name, ()))
            if o is not None and not (isinstance(o, Tensor) and o.shape == shape and o.dtype == torch.float32
                                      and o.device == self._device and o.is_contiguous()):
                raise ValueError(f"out must be a contiguous torch.float32{list(shape)} on {self.device}")
        x = x.detach().to(torch.float32).contiguous()
        results = self._outputs(x, *names)
        if self.on_nonfinite == "raise" and not bool(torch.isfinite(results[0]).all()):
            self._check_finite(x.cpu().numpy(), results[0].cpu().numpy())
        return tuple(result if o is None else o.copy_(result) for result, o in zip(results, out))

    def _compute(self, x, names):
        """As in ArtefactScorer; for events on the GPU the outputs are there, too."""
        events = x if isinstance(x, Tensor) else torch.from_numpy(x if x.flags.writeable else x.copy())
        results = self._empty(len(x), names, events.device)
        self._run(events, results)
        return [result if isinstance(x, Tensor) else result.numpy() for result in results.values()]

    def _empty(self, n: int, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        return {name: torch.empty((n, *self._shapes[name]), dtype=torch.bool if name == "flag" else torch.float32,
                                  device=device) for name in names}

    def _run(self, x: Tensor, results: dict[str, Tensor]) -> None:
        """Fill `results` (n, ...), by output, from events x (n, D) float32; all contiguous, on the GPU or not."""
        most = self._profiles[-1][2]
        with self._lock, torch.cuda.device(self._device):
            caller = torch.cuda.current_stream()
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                for first in range(0, len(x), most):
                    piece = slice(first, first + most)
                    self._run_piece(x[piece], {name: result[piece] for name, result in results.items()})
            caller.wait_stream(self._stream)

    def _run_piece(self, x: Tensor, results: dict[str, Tensor]) -> None:
        n = len(x)
        profile = next(i for i, (_, _, most) in enumerate(self._profiles) if n <= most)
        graphed = self._profiles[profile][2] <= GRAPHED
        bound = {name: buffer[:n] for name, buffer in self._buffers.items()}
        if not graphed:
            bound |= {name: t for name, t in ({"events": x} | results).items()
                      if t.device == self._device and t.data_ptr() % ALIGNMENT == 0}
        if bound["events"] is not x:
            bound["events"].copy_(x)
        if graphed:
            self._graph(profile).replay()
        else:
            self._execute(self._context(profile, bound))
        for name, result in results.items():
            if bound[name] is not result:
                result.copy_(bound[name])

    def _graph(self, profile: int) -> torch.cuda.CUDAGraph:
        """The largest batch of a profile, recorded: the events beyond the caller's are left over from before."""
        if profile not in self._graphs:
            rows = {name: buffer[:self._profiles[profile][2]] for name, buffer in self._buffers.items()}
            context = self._context(profile, rows)
            self._execute(context)  # a first run prepares what cannot be recorded
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._execute(context)
            self._graphs[profile] = graph
        return self._graphs[profile]

    def _context(self, profile: int, tensors: dict[str, Tensor]) -> Any:
        """One for each profile, since a graph holds as long as its context keeps its shapes; bound to `tensors`."""
        if profile not in self._contexts:
            self._contexts[profile] = self._loaded(self._engine.create_execution_context())
            self._check(self._contexts[profile].set_optimization_profile_async(profile, self._stream.cuda_stream))
        context = self._contexts[profile]
        self._check(context.set_input_shape("events", tuple(tensors["events"].shape)))
        for name, tensor in tensors.items():
            self._check(context.set_tensor_address(name, tensor.data_ptr()))
        return context

    def _execute(self, context: Any) -> None:
        self._check(context.execute_async_v3(self._stream.cuda_stream))

    def _loaded(self, made: Any) -> Any:
        self._check(made is not None)
        return made

    def _check(self, succeeded: bool) -> None:
        if not succeeded:
            raise RuntimeError(f"{self.path}: TensorRT failed: {self._heard.why()}")


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
