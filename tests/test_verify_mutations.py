"""A mistake in an artefact is found by its numbers alone: digests and manifest fit the mistaken file."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MethodType

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from scorers import MARKER, preprocessing
from torch.nn.functional import silu

from ebm import networks
from ebm.bundle import Bundle
from ebm.threshold import calibrate
from export.build import build
from export.manifest import golden_events
from export.score_graph import ExportGraph, Options
from export.verify import FAIL, verify
from kernels import load_scorer

OUTPUTS = ("energy", "score", "flag", "energies")
LEVEL = 1
pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit:DeprecationWarning")


@cache
def small_model() -> Bundle:
    """All transforms, imputed features, a constant one, and a threshold that 2% of the random events pass."""
    bundle = Bundle.random(7, 16, 2, 3, seed=5, preprocessing=preprocessing(7, seed=1))
    energy = load_scorer(bundle, "reference").energy(golden_events(bundle, n=4096))
    return replace(bundle, threshold=calibrate(energy.astype(np.float32), rate=0.02, level=LEVEL))


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    return build(small_model(), ["torchscript", "onnx"], tmp_path_factory.mktemp("clean") / "out", outputs=OUTPUTS)


def failures(clean: Path, directory: Path, target: str, write) -> set[str]:
    """The checks that fail where `write(path)` has written the artefact of `target`, under a manifest that fits."""
    shutil.copytree(clean, directory)
    manifest = directory / "export.json"
    document = json.loads(manifest.read_text())
    document["files"] = {target: document["files"][target]}
    path = directory / document["files"][target]["file"]
    write(path)
    document["files"][target]["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    document["files"][target]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(document))
    report = verify(directory, backends=())
    assert report.ok == (not any(row["status"] == FAIL for row in report.rows))
    return {row["check"] for row in report.rows if row["status"] == FAIL}


class Mutant(ExportGraph):
    """The graph that is exported, with one mistake in it."""

    def __init__(self, mistake=None, after=None, before=None, bundle=None, **options):
        bundle = bundle or small_model()
        super().__init__(bundle, Options.of(bundle, **{"outputs": OUTPUTS} | options))
        self.after, self.before = after, before
        if mistake:
            with torch.no_grad():
                mistake(self)

    def forward(self, x):
        x = x if self.before is None else self.before(x)
        energy, score, flag, energies = super().forward(x)
        return (energy, score, flag, energies) if self.after is None else self.after(energy, score, flag, energies, x)


def of_preprocessing(change):
    """A mistake in u and du/dx."""
    def mistake(graph):
        right = graph.preprocessing
        graph.preprocessing = Wrapped(lambda x: change(x, *right(x)))
    return mistake


def of_network(**methods):
    def mistake(graph):
        for name, method in methods.items():
            setattr(graph.network, name, MethodType(method, graph.network))
    return mistake


class Wrapped(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def no_residual(self, u, k):
    z = [self.input(u) + self.level(k)]
    h = silu(z[0])
    for layer in self.hidden:
        z.append(layer(h))
        h = silu(z[-1])
    return h, z


def backward(keep=1.0, matrix=lambda w: w, derivative=networks.silu_derivative):
    """energy_and_score with a mistake in its backward half."""
    def energy_and_score(self, x, k=None):
        h, z = self.activations(x, k)
        g = self.output.weight.expand_as(h)
        for layer, z_i in zip(reversed(self.hidden), reversed(z[1:])):
            g = keep * g + (g * derivative(z_i)) @ matrix(layer.weight)
        return self.output(h).squeeze(-1), -((g * derivative(z[0])) @ self.input.weight)
    return energy_and_score


def preprocessed_twice(graph):
    right = graph.preprocessing

    def change(x, u, slope):
        again, slope_again = right(u)
        return again, slope * slope_again
    of_preprocessing(change)(graph)


def log_of_positive(graph):
    """Negative values of a feature with a logarithm become 0."""
    of_log = graph.preprocessing.log1p
    graph.before = lambda x: torch.where(of_log & (x < 0) & (x != MARKER), 0 * x, x)


def swapped(v):
    return torch.cat([v[:, 1:2], v[:, 0:1], v[:, 2:]], dim=1)


def scaled(name, factor):
    def mistake(graph):
        graph.get_parameter(f"network.{name}").mul_(factor)
    return mistake


def transposed(graph):
    weight = graph.network.hidden[0].weight
    weight.copy_(weight.T.clone())


def other_preprocessing(**columns):
    """A mistake in the constants: name -> the array made of the right one."""
    def make():
        bundle, p = small_model(), small_model().preprocessing
        wrong = {name: change(getattr(p, name).copy()) for name, change in columns.items()}
        return Mutant(bundle=replace(bundle, preprocessing=replace(p, **wrong)))
    return make


def threshold_moved(by):
    """By a share of the standard deviation of the energies."""
    def mistake(graph):
        graph.threshold += by * float(np.std(load_scorer(small_model(), "reference").energy(
            golden_events(small_model(), n=4096))))
    return mistake


# What is wrong -> the graph, and a check that finds it; "" is none.
MISTAKES = {
    "nothing": (Mutant, ""),
    "score with the other sign": (lambda: Mutant(after=lambda e, s, f, each, x: (e, -s, f, each)), "gradient"),
    "energy with the other sign": (lambda: Mutant(after=lambda e, s, f, each, x: (-e, s, f, each)), "random"),
    "one feature's score with the other sign": (lambda: Mutant(
        after=lambda e, s, f, each, x: (e, torch.cat([-s[:, :1], s[:, 1:]], 1), f, each)), "gradient"),
    "transposed weight": (lambda: Mutant(transposed), "random"),
    "transposed weight in the backward half": (
        lambda: Mutant(of_network(energy_and_score=backward(matrix=lambda w: w.T))), "gradient"),
    "no residual": (lambda: Mutant(of_network(activations=no_residual)), "random"),
    "no residual in the backward half": (lambda: Mutant(of_network(energy_and_score=backward(keep=0.0))), "gradient"),
    "silu' taken for the sigmoid": (
        lambda: Mutant(of_network(energy_and_score=backward(derivative=torch.sigmoid))), "gradient"),
    "no bias in a hidden layer": (lambda: Mutant(scaled("hidden.1.bias", 0)), "random"),
    "no bias in the output": (lambda: Mutant(scaled("output.bias", 0)), "random"),
    "a weight off by a thousandth": (lambda: Mutant(scaled("hidden.0.weight", 1.001)), "random"),
    "another level": (lambda: Mutant(level=2, outputs=OUTPUTS, bundle=replace(
        small_model(), threshold=replace(small_model().threshold, level=2))), "random"),
    "levels in reverse": (lambda: Mutant(after=lambda e, s, f, each, x: (e, s, f, each.flip(1))), "levels"),
    "no preprocessing": (lambda: Mutant(preprocess=False), "random"),
    "preprocessed twice": (lambda: Mutant(preprocessed_twice), "random"),
    "no chain rule": (lambda: Mutant(of_preprocessing(lambda x, u, slope: (u, torch.ones_like(slope)))), "gradient"),
    "swapped features": (lambda: Mutant(before=swapped), "random"),
    "swapped scores": (lambda: Mutant(after=lambda e, s, f, each, x: (e, swapped(s), f, each)), "gradient"),
    "a score where a value is missing": (
        lambda: Mutant(of_preprocessing(lambda x, u, slope: (u, torch.where(slope == 0, 0.3, slope)))), "adversarial"),
    "imputed by another value": (other_preprocessing(impute=lambda v: v + 0.01), "adversarial"),
    "another marker": (other_preprocessing(marker=lambda v: np.where(np.isnan(v), v, -998)), "adversarial"),
    "another transform": (other_preprocessing(transform=lambda v: np.roll(v, 1)), "random"),
    "another mean": (other_preprocessing(mean=lambda v: v + np.float32(1e-3)), "random"),
    "a logarithm for positive values only": (lambda: Mutant(log_of_positive), "adversarial"),
    "clipped at 10 standard deviations": (
        lambda: Mutant(of_preprocessing(lambda x, u, slope: (u.clip(-10, 10), slope))), "adversarial"),
    "the threshold a thousandth higher": (lambda: Mutant(threshold_moved(1e-3)), "flags"),
    "the threshold a thousandth lower": (lambda: Mutant(threshold_moved(-1e-3)), "flags"),
    "flags of the ordinary": (lambda: Mutant(after=lambda e, s, f, each, x: (e, s, ~f, each)), "flags"),
    "NaN made a number": (
        lambda: Mutant(after=lambda e, s, f, each, x: (torch.nan_to_num(e), s, f, each)), "not finite"),
    "events that see each other": (
        lambda: Mutant(after=lambda e, s, f, each, x: (e + 1e-3 * (e - e.mean()), s, f, each)), "alone"),
    "the last of 257 forgotten": (
        lambda: Mutant(after=lambda e, s, f, each, x: (e * (torch.arange(x.shape[0]) != 256), s, f, each)), "batches"),
    "energies in half precision": (
        lambda: Mutant(after=lambda e, s, f, each, x: (e.half().float(), s, f, each)), "random"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_by_its_numbers(clean, tmp_path, name):
    graph, check = MISTAKES[name]
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(graph().eval(), torch.from_numpy(golden_events(small_model(), n=7))))
    found = failures(clean, tmp_path / "out", "torchscript", lambda path: torch.jit.save(traced, path))
    assert (check in found) if check else not found


@pytest.mark.parametrize("target", ["torchscript", "onnx"])
def test_a_file_that_its_runtime_cannot_read_fails(clean, tmp_path, target):
    """It is not merely what cannot run here."""
    found = failures(clean, tmp_path / "out", target, lambda path: path.write_bytes(path.read_bytes()[:-500]))
    assert found == {"load"}


# An operation of ONNX -> another that takes and gives the same shapes and types.
OTHER = {"Add": "Sub", "Sub": "Add", "Mul": "Div", "Div": "Mul", "Neg": "Identity", "Abs": "Identity", "Sqrt": "Abs",
         "Exp": "Abs", "ReduceSum": "ReduceMax", "Asinh": "Sinh", "Sign": "Identity", "Log": "Identity", "Or": "And",
         "IsNaN": "IsInf", "Greater": "Less", "Equal": "Less"}


def onnx_mistakes(model):
    """(name, model with one other operation, or one number of a constant changed), where it makes a difference."""
    logarithm = next(node.output[0] for node in model.graph.node if node.op_type == "Log")
    for i, node in enumerate(model.graph.node):
        if logarithm in node.input:  # times a correction that is 1 within rounding, but for values next to 0
            continue
        wrong = onnx.ModelProto()
        wrong.CopyFrom(model)
        if node.op_type == "Where":
            wrong.graph.node[i].input[1:] = reversed(node.input[1:])
        elif node.op_type in OTHER:
            wrong.graph.node[i].op_type = OTHER[node.op_type]
        else:
            continue
        yield f"{node.op_type} {node.name}", wrong
    p, rng = small_model().preprocessing, np.random.default_rng(0)
    uses = {"marker": ~np.isnan(p.marker), "impute": ~np.isnan(p.impute), "scale": p.transform == 2,
            "log1p": p.inv_std > 0, "asinh": p.inv_std > 0, "mean": p.inv_std > 0}  # not of the constant feature
    for i, constant in enumerate(model.graph.initializer):
        value = numpy_helper.to_array(constant).copy()
        if value.dtype == np.int64:  # shapes
            continue
        used = uses.get(constant.name.removeprefix("preprocessing."), np.ones(value.shape, bool))
        if value.shape[-2:] in ((7, 16), (16, 7)):
            used = used & (p.inv_std > 0)[:, None] if value.shape[-1] == 16 else used & (p.inv_std > 0)
        at = tuple(rng.choice(np.argwhere(used)))
        value[at] = ~value[at] if value.dtype == bool else 1.01 * value[at] if value[at] else 0.01
        wrong = onnx.ModelProto()
        wrong.CopyFrom(model)
        wrong.graph.initializer[i].CopyFrom(numpy_helper.from_array(value, constant.name))
        yield f"constant {constant.name}{list(at)}", wrong


def test_every_operation_and_constant_of_onnx_matters(clean, tmp_path):
    """No part of the graph can be another without a check that fails."""
    mistakes = list(onnx_mistakes(onnx.load(clean / "model.onnx")))
    found = {}
    for i, (name, wrong) in enumerate(mistakes):
        found[name] = failures(clean, tmp_path / str(i), "onnx", lambda path, m=wrong: onnx.save(m, path))
    assert len(mistakes) > 60
    assert {name for name, checks in found.items() if not checks} == set()
    assert sum("load" in checks for checks in found.values()) == 0
