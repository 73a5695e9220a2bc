"""Energy and score as operators of PyTorch: torch.compile, torch.export and AOTInductor keep the fused kernel.

    from kernels.torch_op import FusedEnergy

    fused = FusedEnergy(Bundle.load("models/demo"), precision="bf16").cuda()
    energy, score = torch.compile(fused)(x)                      # x (n, D) float32 on the GPU, of any size n
    program = torch.export.export(fused, (x,), dynamic_shapes={"x": {0: Dim("n")}})

The operators, `fused_ebm::energy_and_score` and `fused_ebm::energy`, take the tensors that `kernels.launch.load` makes.
A program with them is loaded after this module has been imported. Tensors go in and out as they are, in turn on the
current stream of their device. Where n is not known when the program is compiled, it is compiled for a large one.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

from kernels.launch import INTERPRETED, WEIGHTS, Loaded, chip, launch, load, stored_dtype
from kernels.tiles import PRECISIONS

if TYPE_CHECKING:
    from ebm.bundle import Bundle

_WHOLE = torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64


def _results(x: Tensor, with_score: bool) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape[:1]), torch.empty_like(x)) if with_score else (x.new_empty(x.shape[:1]),)


def _check(x: Tensor, k: Tensor | None, weights: list[Tensor], precision: str) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"events are {x.dtype}, expected torch.float32: the kernel rounds to {precision} inside")
    if x.ndim != 2 or not 1 <= x.shape[1] <= weights[0].numel() // weights[WEIGHTS.index("w_out")].numel():
        raise ValueError(f"events have shape {tuple(x.shape)}, expected (n, D) with the D features of the model")
    if k is not None and (k.dtype != torch.int32 or k.ndim != 1 or k.shape[0] != x.shape[0]):
        raise ValueError(f"noise levels k are {k.dtype}{list(k.shape)}, expected torch.int32[{x.shape[0]}]")
    for name, t in (("events", x), ("noise levels k", k)):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name} are not contiguous: call .contiguous() first")
    for name, w in zip(("events", "noise levels k", *WEIGHTS), (x, k, *weights), strict=True):
        if w is not None and w.device != weights[0].device:
            raise ValueError(f"{name} are on {w.device}, the weights are on {weights[0].device}")
    if weights[0].dtype != stored_dtype(precision) or weights[WEIGHTS.index("b_in")].dtype != torch.float32:
        raise TypeError(f"the weights were cast, expected those that were loaded for {precision}")


def _run(x: Tensor, k: Tensor | None, weights: list[Tensor], level: int, b_out: float, precision: str,
         with_score: bool, seen: bool) -> tuple[Tensor, ...]:
    """`seen`: PyTorch is to see the launch instead of carrying it out."""
    _check(x, k, weights, precision)
    if x.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"events are on {x.device}: the fused kernel runs on CUDA tensors; on a CPU take "
                           "kernels.load_scorer(model, 'native')")
    results = _results(x, with_score)
    if not seen and x.shape[0] == 0:
        return results
    m = Loaded(weights, precision, b_out, 0.0, *chip(x.device))
    with torch.cuda.device(x.device) if x.is_cuda and not seen else nullcontext():
        launch(m, x, level if k is None else k, *results, wrap=wrap_triton if seen else None)
    return results


@triton_op("fused_ebm::energy_and_score", mutates_args=())
def energy_and_score(x: Tensor, k: Tensor | None, weights: list[Tensor], level: int, b_out: float,
                     precision: str) -> tuple[Tensor, Tensor]:
    """Energy (n,) and score -dE/dx (n, D) of raw events x (n, D) float32, contiguous; not differentiable.

    `k` (n,) int32 is the noise level of each event, or None: `level` for all; nothing here looks whether the levels
    are there. `weights` are those of `kernels.launch.load`. RuntimeError on a CPU, or a GPU before sm_80; TypeError and
    ValueError say what is wrong with the tensors.
    """
    return _run(x, k, weights, level, b_out, precision, True, True)


@triton_op("fused_ebm::energy", mutates_args=())
def energy(x: Tensor, k: Tensor | None, weights: list[Tensor], level: int, b_out: float, precision: str) -> Tensor:
    """The energy alone, as above."""
    return _run(x, k, weights, level, b_out, precision, False, True)[0]


@energy_and_score.register_kernel(("cpu", "cuda"))
def _(x, k, weights, level, b_out, precision):
    return _run(x, k, weights, level, b_out, precision, True, False)


@energy.register_kernel(("cpu", "cuda"))
def _(x, k, weights, level, b_out, precision):
    return _run(x, k, weights, level, b_out, precision, False, False)[0]


@energy_and_score.register_fake
def _(x, k, weights, level, b_out, precision):
    _check(x, k, weights, precision)
    return _results(x, True)


@energy.register_fake
def _(x, k, weights, level, b_out, precision):
    _check(x, k, weights, precision)
    return _results(x, False)[0]


class FusedEnergy(nn.Module):
    """A trained energy network as one kernel, its weights as buffers: raw events x (n, D) -> energy (n,), score (n, D).

    Not differentiable: `kernels.autograd` is, for training.
    """

    def __init__(self, bundle: Bundle, *, precision: str = "fp32", preprocess: bool = True):
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}, expected {', '.join(map(repr, PRECISIONS))}")
        for name, tensor in zip(WEIGHTS, load(bundle, preprocess, "cpu", precision), strict=True):
            self.register_buffer(name, tensor)
        self.precision, self.b_out = precision, float(bundle.tensors["b_out"][0])
        self.n_features, self.n_levels = bundle.schema.n_features, bundle.n_levels
        self.default_level = bundle.default_level

    def forward(self, x: Tensor, k: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """Energy (n,) and score -dE/dx (n, D) at the noise level k: None (the default), an int, or integers (n,)."""
        return energy_and_score(*self._arguments(x, k))

    def energy(self, x: Tensor, k: Tensor | int | None = None) -> Tensor:
        """The energy (n,) alone."""
        return energy(*self._arguments(x, k))

    def _arguments(self, x: Tensor, k: Tensor | int | None) -> tuple:
        if not isinstance(x, Tensor):
            raise TypeError(f"events are {type(x).__name__}, expected a tensor")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("events require a gradient, which the fused kernel does not give: detach them, or take "
                               "kernels.autograd.energy_and_score, which is differentiable")
        if x.ndim != 2 or x.shape[1] != self.n_features:
            raise ValueError(f"expected events of shape (n, {self.n_features}), given {tuple(x.shape)}")
        expected, level = f"expected 0 to {self.n_levels - 1}", 0
        if isinstance(k, Tensor):
            if k.dtype not in _WHOLE:
                raise TypeError(f"noise levels k are {k.dtype}, expected whole numbers")
            inside = ((k >= 0) & (k < self.n_levels)).all()
            if torch.compiler.is_compiling():  # a program does not wait for the GPU to see what is wrong
                torch._assert_async(inside, f"a noise level k is out of range, {expected}")
            elif not inside:
                raise ValueError(f"a noise level k is out of range, {expected}, given {k.min()} to {k.max()}")
            k = k.to(torch.int32)
        elif k is None or (isinstance(k, int | np.integer | torch.SymInt) and not isinstance(k, bool)):
            level = self.default_level if k is None else int(k) if isinstance(k, np.integer) else k
            k = None
            if not 0 <= level < self.n_levels:
                raise ValueError(f"noise level k = {level} is out of range, {expected}")
        else:
            raise TypeError(f"noise level k is {k!r}, expected a whole number or a tensor of them")
        return x, k, [getattr(self, name) for name in WEIGHTS], level, self.b_out, self.precision
