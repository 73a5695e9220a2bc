"""The kernel as an operator of PyTorch: its numbers in the interpreter, what programs keep of it without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scorers import events, model, spreads

from kernels import load_scorer
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score

torch = pytest.importorskip("torch")
launch = pytest.importorskip("kernels.launch")
torch_op = pytest.importorskip("kernels.torch_op")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
ROOT = Path(__file__).parents[1]
SHAPE = (30, 64, 2)


def outside_the_interpreter(code: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@interpreted
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_agrees_with_float64(precision):
    bundle, reference = model(*SHAPE), load_scorer(model(*SHAPE), "reference")
    fused = torch_op.FusedEnergy(bundle, precision=precision)
    x, k = events(17, 30), np.arange(17, dtype=np.int32) % 10
    for given, level in ((None, None), (3, 3), (torch.from_numpy(k), k), (torch.from_numpy(k).long(), k)):
        energy, score = fused(torch.from_numpy(x), given)
        true_energy, true_score = reference.energy_and_score(x, level)
        assert relative_rms_energy(energy.numpy(), true_energy, spreads(*SHAPE)[0]) < TOLERANCES[precision]
        assert relative_rms_score(score.numpy(), true_score, spreads(*SHAPE)[1]) < TOLERANCES[precision]
        assert torch.equal(fused.energy(torch.from_numpy(x), given), energy)
    empty = fused(torch.empty(0, 30))
    assert [tuple(r.shape) for r in empty] == [(0,), (0, 30)]


def test_weights_travel_as_buffers():
    fused = torch_op.FusedEnergy(model(*SHAPE), precision="bf16")
    assert list(fused.parameters()) == []
    assert tuple(fused.state_dict()) == launch.WEIGHTS
    assert fused.up.dtype == torch.bfloat16
    assert {b.device.type for b in fused.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize(("given", "error", "words"), [
    (lambda f, x: f(x.double()), TypeError, r"events are torch.float64, expected torch.float32"),
    (lambda f, x: f(x[:, :3]), ValueError, r"expected events of shape \(n, 30\), given \(9, 3\)"),
    (lambda f, x: f(x[0]), ValueError, r"expected events of shape \(n, 30\), given \(30,\)"),
    (lambda f, x: f(x.T.contiguous().T), ValueError, "events are not contiguous"),
    (lambda f, x: f(x.requires_grad_()), RuntimeError, r"require a gradient.*kernels\.autograd"),
    (lambda f, x: f(x, 10), ValueError, "noise level k = 10 is out of range, expected 0 to 9"),
    (lambda f, x: f(x, -1), ValueError, "noise level k = -1 is out of range"),
    (lambda f, x: f(x, torch.arange(9) + 4), ValueError, "k is out of range, expected 0 to 9, given 4 to 12"),
    (lambda f, x: f(x, torch.full((9,), 1 << 32)), ValueError, "given 4294967296 to 4294967296"),
    (lambda f, x: f(x, torch.zeros(9)), TypeError, "k are torch.float32, expected whole numbers"),
    (lambda f, x: f(x, torch.zeros(9, dtype=torch.bool)), TypeError, "k are torch.bool, expected whole numbers"),
    (lambda f, x: f(x, np.int64(12)), ValueError, "noise level k = 12 is out of range"),
    (lambda f, x: f(x, 1.5), TypeError, "noise level k is 1.5, expected a whole number or a tensor"),
    (lambda f, x: f(x, True), TypeError, "noise level k is True, expected a whole number or a tensor"),
    (lambda f, x: f(x, "1"), TypeError, "noise level k is '1', expected"),
    (lambda f, x: f(x.numpy()), TypeError, "events are ndarray, expected a tensor"),
    (lambda f, x: torch_op.energy(x, torch.zeros(9, dtype=torch.int64), list(f.buffers()), 0, 0.0, "fp32"), ValueError,
     r"k are torch.int64\[9\], expected torch.int32\[9\]"),
    (lambda f, x: f(x, torch.zeros(8, dtype=torch.int32)), ValueError,
     r"k are torch.int32\[8\], expected torch.int32\[9\]"),
    (lambda f, x: f(x, torch.zeros(18, dtype=torch.int32)[::2]), ValueError, "k are not contiguous"),
    (lambda f, x: f.to("meta")(x), ValueError, "events are on cpu, the weights are on meta"),
    (lambda f, x: f.half()(x), TypeError, "the weights were cast"),
])
def test_bad_input_is_refused_before_the_launch(given, error, words, monkeypatch):
    monkeypatch.setattr(torch_op, "launch", lambda *a, **kw: pytest.fail("it was launched"))
    with pytest.raises(error, match=words):
        given(torch_op.FusedEnergy(model(*SHAPE)), torch.randn(9, 30))


def test_events_that_require_a_gradient_nobody_wants_are_taken(monkeypatch):
    monkeypatch.setattr(torch_op, "_run", lambda x, *rest: (x[:, 0].clone(), x.clone()))
    with torch.no_grad():
        assert not torch_op.FusedEnergy(model(*SHAPE))(torch.randn(9, 30, requires_grad=True))[0].requires_grad


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision is 'fp8', expected 'fp32'"):
        torch_op.FusedEnergy(model(*SHAPE), precision="fp8")


def test_an_old_gpu_and_a_cpu_are_told_what_else_there_is(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch_op, "INTERPRETED", False)
    t4 = SimpleNamespace(name="Tesla T4", major=7, minor=5, multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: t4)
    with pytest.raises(RuntimeError, match=r"Tesla T4 is sm_75: .*TensorRT or TorchScript"):
        launch.chip.__wrapped__(torch.device("cuda:1"))
    with pytest.raises(RuntimeError, match=r"events are on cpu: .*load_scorer\(model, 'native'\)"):
        torch_op.FusedEnergy(model(*SHAPE))(torch.randn(9, 30))


EXPORT = """
import sys, torch
from ebm.bundle import Bundle
from kernels.torch_op import FusedEnergy

fused, x, k = FusedEnergy(Bundle.random(5, 64, 1)), torch.randn(9, 5), torch.zeros(9, dtype=torch.int32)
n = torch.export.Dim("n")
for given, shapes in (((x,), ({0: n},)), ((x, k), ({0: n}, {0: n})), ((x, k.long()), ({0: n}, {0: n}))):
    torch.export.save(torch.export.export(fused, given, dynamic_shapes=shapes), sys.argv[1])
    program = torch.export.load(sys.argv[1])
    assert torch.ops.fused_ebm.energy_and_score.default in [node.target for node in program.graph.nodes]
    try:
        program.module()(*given)
    except RuntimeError as e:
        print(e)
for backend in ("eager", "aot_eager"):
    try:
        torch.compile(fused, backend=backend)(x)
    except RuntimeError as e:
        print(" ".join(str(e).split()))
"""


def test_export_and_compile_keep_the_operator(tmp_path):
    code = EXPORT.replace("sys.argv[1]", repr(str(tmp_path / "model.pt2")))
    lines = outside_the_interpreter(code).splitlines()
    assert len(lines) == 5
    assert all("events are on cpu: the fused kernel runs on CUDA tensors" in line for line in lines)


# CUDA tensors without memory, a driver that only says what GPU it is, and what a compiler is given.
SEEN = """
from types import SimpleNamespace
import torch, triton
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from ebm.bundle import Bundle
from kernels.launch import load
from kernels.torch_op import energy, energy_and_score

triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
torch.cuda.get_device_properties = lambda d: SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H100")
real = load(Bundle.random(5, 64, 1), True, "cpu", "bf16")
for op, n, written in ((energy_and_score, 3000, 4), (energy, 1, 3), (energy_and_score, None, 4)):
    with FakeTensorMode(shape_env=ShapeEnv()) as mode, torch.no_grad():
        if n is None:
            symbol = mode.shape_env.create_symbol(3000, ConstantSource("n"))
            n = mode.shape_env.create_symintnode(symbol, hint=3000)
        x, k = torch.empty(n, 5, device="cuda"), torch.empty(n, dtype=torch.int32, device="cuda")
        weights = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in real]
        graph = aot_export_joint_simple(lambda *t: torch.utils._pytree.tree_leaves(op(*t[:2], t[2:], 0, 0.5, "bf16")),
                                        (x, k, *weights), trace_joint=False)
    (node,) = [a for a in graph.graph.nodes if a.target is torch.ops.higher_order.triton_kernel_wrapper_functional]
    (grid,) = node.kwargs["grid"]
    guards = [str(g.expr) for g in mode.shape_env.guards]
    print(sorted(node.kwargs["tensors_to_clone"]), grid[0], node.kwargs["kwargs"]["BLOCK_M"], guards)
"""


def test_a_compiler_sees_the_kernel_and_what_it_writes():
    assert outside_the_interpreter(SEEN).splitlines() == [
        "['energy', 'score', 'scratch', 'wide'] 47 64 []",  # one round of the smaller tile
        "['energy', 'scratch', 'wide'] 1 16 []",
        "['energy', 'score', 'scratch', 'wide'] 132 128 []",  # of any size: the largest tile, no guard
    ]
