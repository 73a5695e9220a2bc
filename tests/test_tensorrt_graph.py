"""The graph that TensorRT is given: its precision, its types, and operators that TensorRT documents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from scorers import amplification, events
from tensorrt_case import KINDS, bundle, outputs, typed

import export.to_tensorrt as t
from ebm.bundle import Bundle
from ebm.events import load_events
from export.score_graph import Options
from kernels import load_scorer
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score

OPERATORS = json.loads((Path(t.__file__).parent / "tensorrt_operators.json").read_text())
HALVES = ("fp16", "bf16")


def run(graph: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """As written: an optimiser might take a cast there and back for nothing."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(graph.SerializeToString(), options,
                                        providers=["CPUExecutionProvider"]).run(None, {"events": x})


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("name", ["demo", "deep", *KINDS])
def test_agrees_with_float64_within_the_tolerance_of_its_precision(name, precision):
    kind = name if name in KINDS else "energy"
    if name == "demo":
        b, x = Bundle.load(Path(__file__).parents[1] / "models" / "demo"), load_events("toy:2000").x
    elif name == "deep":
        b, x = bundle(kind, 30, 256, 8), events(2000, 30, seed=1)
    else:
        b, x = bundle(kind), events(2000, 30, seed=1)
    wanted = outputs(kind, precision)
    graph = typed(kind, precision) if name in KINDS else t.typed_model(b, Options.of(b, outputs=wanted), precision)
    results = dict(zip(wanted, run(graph, x)))
    energy, score = load_scorer(b, "reference").energy_and_score(x)
    assert TOLERANCES["fp32"] < relative_rms_energy(results["energy"], energy) < TOLERANCES[precision]
    if "score" in wanted:
        assert relative_rms_score(results["score"], score) < TOLERANCES[precision] * amplification(b, x)


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_read_halves_and_everything_else_is_float32(kind, precision):
    half = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    graph, plain = typed(kind, precision).graph, typed(kind, "fp32").graph
    made_by = {node.output[0]: node for node in graph.node}
    types = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input, *graph.output)}
    columns = {name: value.shape.dim[-1].dim_value for name, value in types.items() if value.shape.dim}

    def through(name):
        """What a tensor was cast through, and from what."""
        up = made_by[name]
        down = made_by[up.input[0]]
        assert [up.op_type, up.attribute[0].i, down.op_type, down.attribute[0].i] == ["Cast", 1, "Cast", half]
        return down.input[0]

    products = [node for node in graph.node if node.op_type in ("Gemm", "MatMul")]
    if kind != "autoencoder":
        assert len(products) == sum(node.op_type in ("Gemm", "MatMul") for node in plain.node)
    for node in products:
        assert columns[node.output[0]] > 1  # the energy's is a sum, in float32
        assert len(node.input) == 2
        for operand in node.input:
            through(operand)
        (rounded,) = (n for n in graph.node if node.output[0] in n.input)
        assert through(next(n for n in graph.node if rounded.output[0] in n.input).output[0]) == node.output[0]
    halves = [name for name, value in types.items() if value.elem_type == half]
    assert halves
    assert all(made_by[name].op_type == "Cast" for name in halves)


def test_precisions_that_cannot_be():
    b = bundle("autoencoder")
    with pytest.raises(ValueError, match=r"score of an autoencoder jumps .* fp16 moves beyond the tolerance.*fp32"):
        t.typed_model(b, Options.of(b), "fp16")
    with pytest.raises(ValueError, match="precision is 'int8', expected 'fp32', 'fp16', 'bf16'"):
        t.typed_model(bundle(), Options.of(bundle()), "int8")


def unsupported(graph: onnx.ModelProto) -> list[str]:
    """What TensorRT's table of operators does not list: an operator, a type of its data, a computed input."""
    g = graph.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*g.value_info, *g.input, *g.output)}
    types |= {tensor.name: tensor.data_type for tensor in g.initializer}
    constant, found = {tensor.name for tensor in g.initializer}, []
    for node in g.node:
        listed = OPERATORS["operators"].get(node.op_type)
        if listed is None or node.domain not in ("", "ai.onnx"):
            found.append(node.op_type)
            continue
        data = [node.input[node.op_type == "Where"]] + [node.output[0]] * (node.op_type == "Cast")
        found += [f"{node.op_type} of {kind}" for kind in (TensorProto.DataType.Name(types[name]) for name in data)
                  if kind not in listed["types"]]
        found += [f"{node.op_type} with a computed input {i}" for i in listed.get("initializers", ())
                  if i < len(node.input) and node.input[i] not in constant]
    return found


@pytest.mark.parametrize("precision", t.PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_operator_is_one_that_tensorrt_documents(kind, precision):
    graph = typed(kind, precision)
    assert unsupported(graph) == []
    (opset,) = (o.version for o in graph.opset_import if o.domain in ("", "ai.onnx"))
    least, most = OPERATORS["opsets"]
    assert least <= opset <= most
    assert all(tensor.data_type != TensorProto.DOUBLE for tensor in graph.graph.initializer)


def test_another_operator_type_or_computed_axis_is_found():
    graph = onnx.ModelProto()
    graph.CopyFrom(typed("score", "fp32"))
    nodes = {node.op_type: node for node in graph.graph.node}
    nodes["Exp"].op_type = "Gelu"
    nodes["IsNaN"].domain = "com.microsoft"
    nodes["ReduceSum"].input[1] = nodes["Shape"].output[0]
    next(v for v in graph.graph.value_info if v.name == nodes["Sqrt"].input[0]).type.tensor_type.elem_type = 11
    assert {"Gelu", "IsNaN", "ReduceSum with a computed input 1", "Sqrt of DOUBLE"} <= set(unsupported(graph))
