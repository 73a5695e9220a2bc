"""The other ways to compute the same thing: each takes raw NumPy events and gives NumPy energies and scores.

A peer is given its best ordinary form: constants folded, one compiled program per batch size where the
runtime gains by it, its own thread setting, no copies that it does not need.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from ebm.bundle import Bundle

ENERGY, ENERGY_AND_SCORE = "energy", "energy_and_score"


class Peer:
    """One runtime. `function` gives the callable for a task and a batch size; building it is its first cost."""

    name: str
    device = "cpu"
    precision = "fp32"
    modules: tuple[str, ...] = ("torch",)  # imported before the first call is timed

    def __init__(self, bundle: Bundle, threads: int):
        self.bundle, self.threads = bundle, threads

    @classmethod
    def why_not(cls) -> str | None:
        """The reason why this peer cannot run here, or None."""
        missing = [m for m in cls.modules if find_spec(m) is None]
        return f"{', '.join(missing)} not installed: pip install 'fused-ebm[bench]'" if missing else None

    def function(self, task: str, batch: int) -> Callable[[np.ndarray], Any]:
        """x (batch, D) -> energy, or energy and score."""
        raise NotImplementedError

    def options(self, task: str) -> Any:
        """What the exported graph has to compute for a task."""
        from export.score_graph import Options

        return Options.of(self.bundle, outputs=(ENERGY,) if task == ENERGY else (ENERGY, "score"))

    def graph(self, task: str) -> Any:
        """The model in plain torch operations; it gives a tuple."""
        from export.score_graph import ExportGraph

        return ExportGraph(self.bundle, self.options(task))


class TorchEager(Peer):
    """PyTorch as it is usually written: the energy forward, then torch.autograd.grad."""

    name = "torch-eager"

    def function(self, task: str, batch: int) -> Callable[[np.ndarray], Any]:
        import torch

        graph = self.graph(ENERGY)
        if task == ENERGY:
            return _torch_function(graph)

        def call(x: np.ndarray) -> Any:
            u, slope = graph.preprocessing(torch.from_numpy(x))
            u.requires_grad_()
            energy = graph.network(u, graph.level)
            (gradient,) = torch.autograd.grad(energy.sum(), u)
            return energy.detach().numpy(), (-gradient * slope).numpy()

        return call


class TorchCompile(Peer):
    """torch.compile of the analytic graph (it cannot compile autograd inside forward), one shape each."""

    name = "torch-compile"
    modules = ("torch", "torch._dynamo", "torch._inductor.compile_fx")
    compile_options: dict | None = None

    def function(self, task: str, batch: int) -> Callable[[np.ndarray], Any]:
        import torch

        # Above its limit of programs per function, dynamo would fall back to eager without a word.
        torch._dynamo.config.recompile_limit = 1000
        return _torch_function(torch.compile(self.graph(task), dynamic=False, options=self.compile_options))


class TorchCompileMax(TorchCompile):
    """The same with tuned matrix products and frozen weights: slow to compile."""

    name = "torch-compile-max"
    compile_options = {"max_autotune": True}  # noqa: RUF012

    def function(self, task: str, batch: int) -> Callable[[np.ndarray], Any]:
        import torch

        from export.score_graph import example_events

        call = super().function(task, batch)
        # Freezing is read from the global settings while it compiles; among the options it does nothing.
        with torch._inductor.config.patch(freezing=True):
            call(example_events(self.bundle, batch).numpy())
        return call


class TorchScript(Peer):
    """Traced and frozen. optimize_for_inference gains nothing on this graph."""

    name = "torchscript"

    def function(self, task: str, batch: int) -> Callable[[np.ndarray], Any]:
        from export.to_torchscript import traced

        return _torch_function(traced(self.bundle, self.options(task)))


class OnnxRuntime(Peer):
    """ONNX Runtime on a file with a dynamic batch."""

    name = "onnxruntime"
    modules = ("torch", "onnx", "onnxscript", "onnxruntime")

    def __init__(self, bundle: Bundle, threads: int):
        super().__init__(bundle, threads)
        self.sessions: dict[str, Any] = {}

    def function(self, task: str, batch: int) -> Callable[[np.ndarray], Any]:
        if task not in self.sessions:
            self.sessions[task] = self._session(task)
        run = self.sessions[task].run
        return (lambda x: run(None, {"events": x})[0]) if task == ENERGY else (lambda x: run(None, {"events": x}))

    def _session(self, task: str) -> Any:
        import onnxruntime

        from export.to_onnx import onnx_model

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = onnx_model(self.bundle, self.options(task)).SerializeToString()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OpenVino(Peer):
    """OpenVINO, converted from torch: from an ONNX file in which products share a weight its gradient is wrong."""

    name = "openvino"
    modules = ("torch", "openvino")

    def __init__(self, bundle: Bundle, threads: int):
        super().__init__(bundle, threads)
        self.models: dict[str, Any] = {}

    def function(self, task: str, batch: int) -> Callable[[np.ndarray], Any]:
        import openvino

        from export.score_graph import example_events

        width = self.bundle.schema.n_features
        if task not in self.models:
            example = example_events(self.bundle, 7)
            self.models[task] = openvino.convert_model(self.graph(task), [-1, width], example_input=example)
        model = self.models[task].clone()
        model.reshape([batch, width])
        # Without the precision hint it computes in bf16 where the processor can.
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.threads,
                  "INFERENCE_PRECISION_HINT": "f32"}
        request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
        # Its own tensors, filled and read in place: request.infer([x]) alone costs 50 us more.
        tensor = openvino.Tensor(np.empty((batch, width), np.float32))
        request.set_input_tensor(tensor)
        events, energy = tensor.data, request.get_output_tensor(0).data
        score = request.get_output_tensor(1).data if task == ENERGY_AND_SCORE else None

        def call(x: np.ndarray) -> Any:
            events[:] = x
            request.infer()
            return energy.copy() if score is None else (energy.copy(), score.copy())

        return call


class Jax(Peer):
    """JAX: jit of vmap of value_and_grad, the weights as constants."""

    name = "jax"
    modules = ("jax",)

    def function(self, task: str, batch: int) -> Callable[[np.ndarray], Any]:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax
        import jax.numpy as jnp

        from kernels.reference import preprocess, preprocessing_constants

        t, layers = self.bundle.tensors, range(self.bundle.architecture.n_layers)
        b_in = t["b_in"] + t["emb"][self.bundle.default_level]
        constants = preprocessing_constants(self.bundle.preprocessing)

        def energy(u: Any) -> Any:
            h = jax.nn.silu(t["w_in"] @ u + b_in)
            for i in layers:
                h = h + jax.nn.silu(t[f"w.{i}"] @ h + t[f"b.{i}"])
            return t["w_out"] @ h + t["b_out"][0]

        def one(x: Any) -> Any:
            u, slope = preprocess(jnp, x, **constants)
            if task == ENERGY:
                return energy(u)
            e, gradient = jax.value_and_grad(energy)(u)
            return e, -gradient * slope

        all_events = jax.jit(jax.vmap(one))
        if task == ENERGY:
            return lambda x: np.asarray(all_events(x))
        return lambda x: tuple(map(np.asarray, all_events(x)))


def _torch_function(module: Callable[[Any], Any]) -> Callable[[np.ndarray], Any]:
    """NumPy to NumPy around a torch module that gives a tuple of one or two tensors."""
    import torch

    def call(x: np.ndarray) -> Any:
        with torch.inference_mode():
            results = tuple(r.numpy() for r in module(torch.from_numpy(x)))
            return results if len(results) > 1 else results[0]

    return call


PEERS: dict[str, type[Peer]] = {
    p.name: p for p in (TorchEager, TorchCompile, TorchCompileMax, TorchScript, OnnxRuntime, OpenVino, Jax)}
DEFAULT_PEERS = tuple(name for name in PEERS if name != TorchCompileMax.name)
