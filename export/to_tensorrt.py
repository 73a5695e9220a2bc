"""TensorRT engines, strongly typed: what a tensor is computed in stands in the ONNX file that goes in.

TensorRT 10 and 11 (docs.nvidia.com/deeplearning/tensorrt). An engine runs with the TensorRT version that built it, on
GPUs of the compute capability that it was built on. Written after the sources and the documentation of the Python
bindings; the library itself has not run this yet.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ebm.bundle import Bundle
from ebm.command import whole_file
from export.score_graph import Options
from export.to_onnx import OPSET, onnx_model

if TYPE_CHECKING:
    from onnx import ModelProto

PRECISIONS = ("fp32", "fp16", "bf16")
BUCKETS = (1, 16, 256, 4096)  # TensorRT tunes its kernels for one batch of each profile: its largest
VERSIONS = (10, 11)
FLAGS = "strongly-typed-no-tf32"

log = logging.getLogger("fused_ebm")


def export(bundle: Bundle, directory: Path, options: Options, *, precision: str = "fp32") -> dict:
    """Build an engine for the GPU of this machine; the entry of the manifest.

    Writes model-smXX-PRECISION.engine, the ONNX file it was built from and what TensorRT's inspector says of it.
    `precision` is what the matrix products read: fp32 (without TF32), fp16 or bf16; all else is float32.
    Raises ValueError on an unknown precision and on one that the model cannot keep to, RuntimeError without TensorRT
    or GPU and where TensorRT refuses, with all it said.
    """
    if reason := why_not():
        raise RuntimeError(f"a TensorRT engine cannot be built: {reason}")
    import tensorrt as trt

    model = typed_model(bundle, options, precision).SerializeToString(deterministic=True)
    gpu, capability, cuda = this_gpu()
    name, shapes = f"model-{capability}-{precision}", profiles(options.batch_max)
    files = [f"{name}.engine", f"tensorrt-{precision}.onnx", f"{name}.layers.json"]
    key = timing_cache_key(gpu, capability, cuda, trt.__version__)
    plan, layers = _build(trt, model, bundle.schema.n_features, shapes, _cache_directory() / key)
    for file, content in zip(files, (plan, model, layers.encode()), strict=True):
        (directory / file).write_bytes(content)
    return {
        "file": files[0], "also": files[1:], "precision": precision, "opset": OPSET, "tensorrt": trt.__version__,
        "compute_capability": capability, "gpu": gpu, "cuda": cuda, "profiles": shapes,
        "timing_cache": key, "commands": commands(files, key, shapes, bundle.schema.n_features, trt.__version__),
    }


def why_not() -> str | None:
    """None where engines can be built and run, else the reason."""
    try:
        import tensorrt
    except (ImportError, OSError, RuntimeError) as e:  # the last two where the wheel finds no libnvinfer
        return f"TensorRT cannot be imported ({e}): install TensorRT 10 or 11, such as pip install 'tensorrt>=10,<12'"
    if int(tensorrt.__version__.partition(".")[0]) not in VERSIONS:
        return f"this is TensorRT {tensorrt.__version__}, expected version 10 or 11"
    if this_gpu() is None:
        return "PyTorch sees no CUDA GPU, and TensorRT builds an engine on the kind of GPU that will run it"
    return None


def this_gpu() -> tuple[str, str, str] | None:
    """Name, compute capability (such as "sm90") and CUDA version of the current GPU; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"sm{major}{minor}", str(torch.version.cuda)


def profiles(batch_max: int) -> list[tuple[int, int, int]]:
    """Least, best and largest batch of every optimisation profile: together 1 to `batch_max`, without gaps."""
    most = [n for n in BUCKETS if n < batch_max] + [batch_max]
    return [(before + 1, n, n) for before, n in zip([0, *most], most)]


def timing_cache_key(gpu: str, capability: str, cuda: str, version: str) -> str:
    """Name of the file of measured kernels: they hold for one kind of GPU, CUDA, TensorRT and one set of flags."""
    return re.sub(r"[^\w.]+", "-", f"{gpu} {capability} cuda{cuda} tensorrt{version} {FLAGS}").lower() + ".timing"


def typed_model(bundle: Bundle, options: Options, precision: str) -> ModelProto:
    """The ONNX model whose matrix products read `precision`; bias, residual sums and energy stay float32.

    Casting the operands up again right before a product, and the product down, is how TensorRT is told to add up in
    float32 in a kernel that reads halves (its guide, "Control of Computational Precision").
    """
    import onnx
    from onnx import TensorProto

    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected {', '.join(map(repr, PRECISIONS))}")
    if precision != "fp32" and bundle.architecture.kind == "autoencoder" and "score" in options.outputs:
        raise ValueError(f"the score of an autoencoder jumps where one of its ReLUs switches, which {precision} moves "
                         "beyond the tolerance: export it in fp32, or without the output 'score'")
    model = onnx_model(bundle, options)
    if precision == "fp32":
        return model
    half = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    nodes = []

    def cast(x: str, y: str, dtype: int) -> str:
        nodes.append(onnx.helper.make_node("Cast", [x], [y], to=dtype))
        return y

    for node in model.graph.node:
        y = node.output[0]
        if node.op_type not in ("Gemm", "MatMul"):
            nodes.append(node)
            continue
        operands, bias = node.input[:2], node.input[2:]
        for i, x in enumerate(operands):
            node.input[i] = cast(cast(x, f"{y}_half{i}", half), f"{y}_wide{i}", TensorProto.FLOAT)
        del node.input[2:]
        node.output[0] = f"{y}_sum"
        nodes.append(node)
        product = cast(cast(f"{y}_sum", f"{y}_half", half), f"{y}_product" if bias else y, TensorProto.FLOAT)
        if bias:
            nodes.append(onnx.helper.make_node("Add", [product, *bias], [y]))
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    onnx.checker.check_model(model, full_check=True)
    return model


def commands(files: list[str], key: str, shapes: list[tuple[int, int, int]], width: int, version: str) -> dict:
    """The same build by `trtexec` and by `polygraphy`, in the directory of the export."""
    engine, onnx, layers = files
    trtexec = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}", "--noTF32", "--profilingVerbosity=detailed",
               f"--exportLayerInfo={layers}", f"--timingCacheFile={key}", "--skipInference"]
    if version.startswith("10."):  # from 11 on there is nothing else
        trtexec.append("--stronglyTyped")
    polygraphy = ["polygraphy", "convert", onnx, "--convert-to", "trt", "--output", engine, "--strongly-typed",
                  "--profiling-verbosity", "detailed", "--load-timing-cache", key, "--save-timing-cache", key]
    for i, batches in enumerate(shapes):
        named = list(zip(("min", "opt", "max"), batches))
        trtexec += [f"--profile={i}", *(f"--{which}Shapes=events:{n}x{width}" for which, n in named)]
        polygraphy += [word for which, n in named for word in (f"--trt-{which}-shapes", f"events:[{n},{width}]")]
    return {"trtexec": shlex.join(trtexec), "polygraphy": shlex.join(polygraphy)}


def listener(trt: ModuleType) -> Any:
    """A logger for TensorRT, which tells Python of a failure only that there was one; `errors` has the reasons."""

    class Listener(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity, message):
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)
            log.debug("TensorRT: %s", message)

        def why(self) -> str:
            return "; ".join(self.errors) or "TensorRT gave no reason"

    return Listener()


def _build(trt: ModuleType, model: bytes, width: int, shapes: list[tuple[int, int, int]],
           cache: Path) -> tuple[bytes, str]:
    """The serialised engine, and the inspector's JSON."""
    heard = listener(trt)
    builder = trt.Builder(heard)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, heard)
    if not parser.parse(model):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeError(f"TensorRT {trt.__version__} cannot read the graph: {errors or heard.why()}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # allowed unless cleared
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for batches in shapes:
        profile = builder.create_optimization_profile()
        profile.set_shape("events", *((n, width) for n in batches))
        config.add_optimization_profile(profile)
    known = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
    if known is None or not config.set_timing_cache(known, False):  # damaged, or not from here
        config.set_timing_cache(config.create_timing_cache(b""), False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"TensorRT {trt.__version__} could not build the engine: {heard.why()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(cache) as f:
            f.write(config.get_timing_cache().serialize())
    except OSError as e:
        warnings.warn(f"{cache}: cannot be written ({e.strerror}): the next engine is measured anew", stacklevel=3)
    engine = trt.Runtime(heard).deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(f"TensorRT {trt.__version__} cannot load the engine it built: {heard.why()}")
    return bytes(plan), engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused-ebm" / "tensorrt"
