"""What lies between the matrix products of kernels/autograd.py, one Triton kernel each; the formulas are in `Plain`.

silu' and silu'' are computed from z wherever they are needed: reading z costs what reading them would, and nothing has
to be written for it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # 8 elements a thread: two vector loads of each operand


@triton.jit
def _slope(z):
    """silu'(z)."""
    sig = tl.sigmoid(z)
    return sig * (1.0 + z * (1.0 - sig))


@triton.jit
def _at(size, BLOCK: tl.constexpr):
    """The offsets of a program, in 64 bits, and which of them exist."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < size


@triton.jit
def up_kernel(z, h, out, size, BLOCK: tl.constexpr):
    """out = h + silu(z); h may be None."""
    at, there = _at(size, BLOCK)
    here = tl.load(z + at, there, 0.0)
    result = here * tl.sigmoid(here)
    if h is not None:
        result += tl.load(h + at, there, 0.0)
    tl.store(out + at, result, there)


@triton.jit
def through_kernel(g, z, out, size, width, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """out = g silu'(z); with ROW g is one row of `width` for all events."""
    at, there = _at(size, BLOCK)
    upstream = tl.load(g + (at % width if ROW else at), there, 0.0)
    tl.store(out + at, upstream * _slope(tl.load(z + at, there, 0.0)), there)


@triton.jit
def tangent_kernel(z, z_dot, h_dot, g, out, bend, size, width, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """out = h_dot + silu'(z) z_dot and bend = g silu''(z) z_dot; h_dot may be None."""
    at, there = _at(size, BLOCK)
    here, along = tl.load(z + at, there, 0.0), tl.load(z_dot + at, there, 0.0)
    upstream = tl.load(g + (at % width if ROW else at), there, 0.0)
    sig = tl.sigmoid(here)
    rest = 1.0 - sig
    result = sig * (1.0 + here * rest) * along
    if h_dot is not None:
        result += tl.load(h_dot + at, there, 0.0)
    tl.store(out + at, result, there)
    tl.store(bend + at, upstream * along * (sig * rest * (2.0 + here * (rest - sig))), there)


@triton.jit
def adjoint_kernel(c, z, bend, out, size, BLOCK: tl.constexpr):
    """out = c silu'(z) + bend."""
    at, there = _at(size, BLOCK)
    slope = _slope(tl.load(z + at, there, 0.0))
    tl.store(out + at, tl.load(c + at, there, 0.0) * slope + tl.load(bend + at, there, 0.0), there)


def up(z: Tensor, h: Tensor | None) -> Tensor:
    """As `Plain.up`; all of these take contiguous tensors (n, H)."""
    out = torch.empty_like(z)
    _launch(up_kernel, z, z, h, out, z.numel())
    return out


def through(g: Tensor, z: Tensor) -> Tensor:
    """As `Plain.through`; g may be a row expanded to (n, H)."""
    out = torch.empty_like(z)
    _launch(through_kernel, z, g, z, out, z.numel(), z.shape[1], ROW=g.stride(0) == 0)
    return out


def tangent(z: Tensor, z_dot: Tensor, h_dot: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor]:
    """As `Plain.tangent`; g may be a row expanded to (n, H)."""
    out, bend = torch.empty_like(z), torch.empty_like(z)
    _launch(tangent_kernel, z, z, z_dot, h_dot, g, out, bend, z.numel(), z.shape[1], ROW=g.stride(0) == 0)
    return out, bend


def adjoint(c: Tensor, z: Tensor, bend: Tensor) -> Tensor:
    """As `Plain.adjoint`."""
    out = torch.empty_like(z)
    _launch(adjoint_kernel, z, c, z, bend, out, z.numel())
    return out


def _launch(kernel: Any, like: Tensor, *arguments: Any, **constants: Any) -> None:
    if like.numel():
        with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
            kernel[(triton.cdiv(like.numel(), BLOCK),)](*arguments, **constants, BLOCK=BLOCK, num_warps=WARPS)


def compile_for(cc: int) -> dict[str, Any]:
    """Every kernel in every form, compiled for compute capability `cc` without a GPU: name -> CompiledKernel.

    Needs TRITON_INTERPRET unset when this is imported.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    forms = {
        "up": (up_kernel, {}), "up of the first layer": (up_kernel, {"h": None}),
        "through": (through_kernel, {"ROW": False}), "through from a row": (through_kernel, {"ROW": True}),
        "tangent": (tangent_kernel, {"ROW": False}), "tangent from a row": (tangent_kernel, {"ROW": True}),
        "tangent of the first layer": (tangent_kernel, {"h_dot": None, "ROW": False}),
        "adjoint": (adjoint_kernel, {}),
    }
    compiled = {}
    for name, (kernel, fixed) in forms.items():
        fixed = fixed | {"BLOCK": BLOCK}
        types = {"size": "i32", "width": "i32"} | dict.fromkeys(fixed, "constexpr")
        signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
        # PyTorch's allocations and widths that 16 divides: what `_launch` finds out by itself.
        aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t != "constexpr"}
        constants = {(i,): fixed[argument] for i, argument in enumerate(kernel.arg_names) if argument in fixed}
        compiled[name] = triton.compile(ASTSource(kernel, signature, constants, aligned),
                                        target=GPUTarget("cuda", cc, 32), options={"num_warps": WARPS})
    return compiled
