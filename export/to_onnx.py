"""ONNX: one file for ONNX Runtime, OpenVINO, TensorRT and every other runtime that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebm.bundle import Bundle
from export.score_graph import Options, program, without_notices

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

FILE = "model.onnx"
OPSET = 18


def export(bundle: Bundle, directory: Path, options: Options) -> dict:
    """Write model.onnx into `directory`; the entry of the manifest."""
    (directory / FILE).write_bytes(onnx_model(bundle, options).SerializeToString(deterministic=True))
    return {"file": FILE, "opset": OPSET}


def onnx_model(bundle: Bundle, options: Options) -> ModelProto:
    """The checked model: input `events` (batch, D) float32 with a free batch, outputs as in `options.outputs`.

    The same model and options give the same bytes.
    """
    import onnx
    import torch

    with without_notices():
        model = torch.onnx.export(
            program(bundle, options), verbose=False, opset_version=OPSET, input_names=["events"],
            output_names=list(options.outputs), external_data=False, dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table={torch.ops.aten.log1p.default: _log1p, torch.ops.aten.silu.default: _silu,
                                      torch.ops.aten.sigmoid.default: _sigmoid}).model_proto
    _remove_notes(model)
    _sum_single_columns(model.graph)
    _give_each_product_its_weight(model.graph)
    onnx.helper.set_model_props(model, _properties(bundle, options))
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    onnx.checker.check_model(model, full_check=True)
    return model


def _log1p(a):
    """log(1 + a), accurate for small a too, which ONNX has no operator for.

    The error of w = 1 + a cancels in log(w) a / (w - 1) (Goldberg, "What every computer scientist should know about
    floating-point arithmetic", 1991, theorem 4).
    """
    from onnxscript import opset18 as op

    one = op.Constant(value_float=1.0)
    w = op.Add(a, one)
    return op.Where(op.Equal(w, one), a, op.Mul(op.Log(w), op.Div(a, op.Sub(w, one))))


def _sigmoid(z):
    """By Exp: the Sigmoid of ONNX Runtime is a rational function, whose error steep networks multiply."""
    from onnxscript import opset18 as op

    one = op.Constant(value_float=1.0)
    return op.Div(one, op.Add(one, op.Exp(op.Neg(z))))


def _silu(z):
    from onnxscript import opset18 as op

    return op.Div(z, op.Add(op.Constant(value_float=1.0), op.Exp(op.Neg(z))))


def _remove_notes(model: ModelProto) -> None:
    """The exporter notes where in the Python source, and in which directory, each part comes from."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def _sum_single_columns(graph: GraphProto) -> None:
    """The energy's product, which has one column, as a sum: ONNX Runtime adds up a product of one column less well."""
    from onnx import helper, numpy_helper

    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    one_column = {v.name for v in graph.value_info if [d.dim_value for d in v.type.tensor_type.shape.dim][-1:] == [1]}
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type not in ("Gemm", "MatMul") or node.output[0] not in one_column:
            graph.node.append(node)
            continue
        (x, weight, *bias), y = node.input, node.output[0]
        graph.initializer.append(numpy_helper.from_array(weights[weight].ravel(), f"{y}.weight"))
        graph.initializer.append(numpy_helper.from_array(np.array([-1]), f"{y}.axis"))
        graph.node.append(helper.make_node("Mul", [x, f"{y}.weight"], [f"{y}.products"]))
        graph.node.append(helper.make_node("ReduceSum", [f"{y}.products", f"{y}.axis"], [f"{y}.sum" if bias else y]))
        if bias:
            graph.node.append(helper.make_node("Add", [f"{y}.sum", *bias], [y]))
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _give_each_product_its_weight(graph: GraphProto) -> None:
    """A copy of every weight that two products share, forward and, not transposed, backward.

    OpenVINO's CPU plugin lays a weight out once, for the first product that takes it, and the other product then comes
    out wrong (2026.4; tests/test_openvino_gradient.py). Other runtimes lay it out twice anyway: the copy costs them
    its bytes in the file.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    taken = set()
    for node in graph.node:
        if node.op_type in ("Gemm", "MatMul") and node.input[1] in weights:
            name = node.input[1]
            if name in taken:
                copy = graph.initializer.add()
                copy.CopyFrom(weights[name])
                copy.name = node.input[1] = f"{name}.{node.output[0]}"
            taken.add(name)


def _properties(bundle: Bundle, options: Options) -> dict[str, str]:
    """What a user of the bare file needs to know about it; export.json has the rest."""
    threshold = bundle.threshold.energy if "flag" in options.outputs else None
    properties = {"model_digest": bundle.digest, "kind": bundle.architecture.kind, "noise_level": options.level,
                  "preprocess": options.preprocess, "threshold": threshold, "features": bundle.schema.features,
                  "units": bundle.schema.units}
    return {f"fused_ebm.{name}": value if isinstance(value, str) else json.dumps(value)
            for name, value in properties.items()}
