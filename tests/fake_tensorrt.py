"""TensorRT that is not there: as much of its Python bindings as export uses, in versions 10 and 11, and CUDA beside it.

Names, signatures, defaults and return values are those of the bindings (python/src in NVIDIA/TensorRT, 10.13) and of
the 11.0 documentation; what a version lacks raises AttributeError here too. An engine holds its ONNX model and computes
in ONNX Runtime, from and to the addresses it was given.
"""

from __future__ import annotations

import ctypes
import enum
import json
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import torch

_GONE = ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS",
         "DIRECT_IO", "REJECT_EMPTY_ALGORITHMS", "WEIGHTLESS")  # with version 11
_STAYED = ("DEBUG", "GPU_FALLBACK", "REFIT", "DISABLE_TIMING_CACHE", "EDITABLE_TIMING_CACHE", "TF32", "SPARSE_WEIGHTS",
           "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "ERROR_ON_TIMING_CACHE_MISS", "DISABLE_COMPILATION_CACHE",
           "STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING", "REFIT_INDIVIDUAL", "STRICT_NANS", "MONITOR_MEMORY")


ALIGNMENT = 64  # of the processor's memory; TensorRT asks for 256 bytes, and memory of a GPU has 512


class HostMemory(bytes):
    """IHostMemory: a buffer."""


def fake_tensorrt(version: str = "10.13.3.9", *, parser_errors=(), build_error: str = "") -> ModuleType:
    """The module `tensorrt`. Its `log` has what happened, in order: (what, details)."""
    trt, log = ModuleType("tensorrt"), []
    trt.__spec__ = ModuleSpec("tensorrt", None)
    trt.__version__, trt.log, trt.capturing = version, log, None
    eleven = not version.startswith("10.")

    class ILogger:
        Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)

        def __init__(self):
            self.initialised = True

    def listen(logger) -> None:
        if not isinstance(logger, ILogger) or not logger.initialised:
            raise TypeError("incompatible constructor arguments")

    class Network:
        model = None

    class OnnxParser:
        def __init__(self, network, logger):
            listen(logger)
            self._network = network
            self.num_errors = 0

        def parse(self, model: bytes) -> bool:
            self._network.model = onnx.load_from_string(model)
            onnx.checker.check_model(self._network.model)
            self.num_errors = len(parser_errors)
            return not parser_errors

        def get_error(self, index: int) -> SimpleNamespace:
            return parser_errors[index]

    class TimingCache:
        def __init__(self, content: bytes):
            self.content = content

        def serialize(self) -> HostMemory:
            return HostMemory(self.content)

    class Profile:
        def __init__(self):
            self.shapes = {}

        def set_shape(self, input: str, min, opt, max) -> None:
            min, opt, max = tuple(min), tuple(opt), tuple(max)
            if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
                raise RuntimeError("Shape provided for opt is inconsistent with other shapes.")
            self.shapes[input] = (min, opt, max)

    class BuilderConfig:
        __slots__ = ("_cache", "_flags", "_profiles", "profiling_verbosity")

        def __init__(self):
            self._flags, self._profiles, self._cache = {trt.BuilderFlag.TF32}, [], None
            self.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY

        def clear_flag(self, flag) -> None:
            self._flags.discard(trt.BuilderFlag(flag))

        def add_optimization_profile(self, profile: Profile) -> int:
            self._profiles.append(profile.shapes)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
            return None if serialized_timing_cache == b"damaged" else TimingCache(bytes(serialized_timing_cache))

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            usable = cache.content == b"" or cache.content.startswith(version.encode()) or ignore_mismatch
            if usable:
                self._cache = cache
            return usable

        def get_timing_cache(self) -> TimingCache:
            return self._cache

    class Builder:
        def __init__(self, logger):
            listen(logger)
            self._logger = logger

        def create_network(self, flags: int = 0) -> Network:
            network = Network()
            network.strongly_typed = eleven or bool(flags & 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            return network

        def create_builder_config(self) -> BuilderConfig:
            return BuilderConfig()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: BuilderConfig) -> HostMemory | None:
            log.append(("build", {
                "strongly typed": network.strongly_typed, "tf32": trt.BuilderFlag.TF32 in config._flags,
                "verbosity": config.profiling_verbosity.name, "profiles": config._profiles,
                "cache": config._cache.content,
            }))
            if build_error:
                self._logger.log(ILogger.Severity.ERROR, build_error)
                self._logger.log(ILogger.Severity.INFO, "not an error")
                return None
            config._cache.content = config._cache.content or f"{version} timings".encode()
            model = network.model.SerializeToString().hex()
            return HostMemory(json.dumps({"version": version, "profiles": config._profiles, "model": model}).encode())

    class Inspector:
        def get_engine_information(self, format) -> str:
            return json.dumps({"Layers": [], "Format": trt.LayerInformationFormat(format).name})

    class Context:
        def __init__(self, engine):
            self._engine, self._profile, self._shape, self._fresh = engine, 0, None, True
            self._address = dict.fromkeys(engine.names)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            self._profile, self._shape, self._fresh = profile_index, None, True
            return 0 <= profile_index < len(self._engine.profiles)

        def set_input_shape(self, name: str, shape) -> bool:
            least, _, most = self._engine.profiles[self._profile][name]
            self._fresh |= self._shape != tuple(shape)
            self._shape = tuple(shape)
            return all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

        def set_tensor_address(self, name: str, memory: int) -> bool:
            known = name in self._address
            self._address[name] = memory
            return known and memory % ALIGNMENT == 0

        def execute_async_v3(self, stream_handle: int) -> bool:
            shape, address = self._shape, dict(self._address)
            if shape is None or None in address.values() or (trt.capturing is not None and self._fresh):
                return False
            run = lambda: self._engine.run(shape, address)  # noqa: E731
            if trt.capturing is None:
                self._fresh = False
                log.append(("execute", (self._profile, shape[0])))
                run()
            else:
                log.append(("capture", (self._profile, shape[0])))
                trt.capturing.append(run)
            return True

    class Engine:
        def __init__(self, plan: dict):
            self.profiles = plan["profiles"]
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            self.session = onnxruntime.InferenceSession(bytes.fromhex(plan["model"]), options,
                                                        providers=["CPUExecutionProvider"])
            self.outputs = [o.name for o in self.session.get_outputs()]
            self.names = ["events", *self.outputs]

        def create_engine_inspector(self) -> Inspector:
            return Inspector()

        def create_execution_context(self) -> Context:
            return Context(self)

        def run(self, shape, address) -> None:
            floats = (ctypes.c_float * int(np.prod(shape))).from_address(address["events"])
            for name, result in zip(self.outputs, self.session.run(None, {"events": np.array(floats).reshape(shape)})):
                ctypes.memmove(address[name], np.ascontiguousarray(result).ctypes.data, result.nbytes)

    class Runtime:
        def __init__(self, logger):
            listen(logger)
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            plan = json.loads(bytes(serialized_engine))
            if plan["version"] == version:
                return Engine(plan)
            self._logger.log(ILogger.Severity.ERROR, "The engine plan file is not compatible with this version")
            return None

    for cls in (ILogger, OnnxParser, Builder, Runtime):
        setattr(trt, cls.__name__, cls)
    trt.BuilderFlag = enum.IntEnum("BuilderFlag", [*(() if eleven else _GONE), *_STAYED], start=0)
    creation = ["STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS", "PREFER_JIT_PYTHON_PLUGINS"]
    trt.NetworkDefinitionCreationFlag = enum.IntEnum(
        "NetworkDefinitionCreationFlag", creation if eleven else ["EXPLICIT_BATCH", *creation], start=0)
    trt.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED NONE")
    trt.LayerInformationFormat = enum.Enum("LayerInformationFormat", "ONELINE JSON")
    return trt


def fake_cuda(monkeypatch, trt: ModuleType) -> None:
    """As much of torch.cuda as the Scorer uses, with the processor for a GPU; a graph replays what was captured."""

    class Graph(list):
        def replay(self):
            for run in self:
                run()

    @contextmanager
    def graph(cuda_graph, stream=None, capture_error_mode="global"):
        trt.capturing = cuda_graph
        try:
            yield
        finally:
            trt.capturing = None

    class Stream:
        cuda_stream = 7

        def __init__(self, device=None):
            pass

        def wait_stream(self, stream):
            pass

    for name, value in {"device": lambda _: nullcontext(), "Stream": Stream, "current_stream": Stream,
                        "stream": lambda _: nullcontext(), "CUDAGraph": Graph, "graph": graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
