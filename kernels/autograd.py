"""Energy and score as one differentiable function of events and weights: what score matching needs of its network.

The first pass is that of kernels/README.md. Let e (n,) = dL/dE and v (n, D) = dL/ds of a loss L. As s = -dE/du, v s is
the change of E as u moves along -v: so dL is the gradient of e E + E', where E' goes with the dual numbers

    z'_0 = -W_in v       h'_0 = silu'(z_0) z'_0       z'_i = W_i h'_{i-1}       h'_i = h'_{i-1} + silu'(z_i) z'_i

as w_out . h'_n. The adjoints of h'_i and z'_i are known already: g_i and q_i = g_i silu'(z_i), of which the score was
made. Those of h_i and z_i, c_i and a_i, go down once more:

    c_n = e w_out        a_i = c_i silu'(z_i) + g_i silu''(z_i) z'_i        c_{i-1} = c_i + W_i^T a_i

    dL/dW_i  = sum a_i h_{i-1}^T + q_i h'_{i-1}^T        dL/db_i = sum a_i        dL/dw_out = sum e h_n + h'_n
    dL/dW_in = sum a_0 u^T - q_0 v^T                     dL/du = W_in^T a_0       dL/db_out = sum e

with sums over events; dL/db_in is the sum of a_0 and dL/demb[k] that over the events at level k. Every product is a
matrix product of the whole batch; what lies between two of them is one kernel on a GPU (autograd_kernel.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ebm.networks import silu_derivative


class Weights(NamedTuple):
    """As in a bundle: w_in (H, D), b_in (H,), emb (L, H), w_out (H,), b_out (1,), w n of (H, H), b n of (H,)."""

    w_in: Tensor
    b_in: Tensor
    emb: Tensor
    w_out: Tensor
    b_out: Tensor
    w: Sequence[Tensor]
    b: Sequence[Tensor]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Weights:
        """From all of them in one row."""
        layers = (len(tensors) - 5) // 2
        return cls(*tensors[:5], tensors[5:5 + layers], tensors[5 + layers:])


class Kept(NamedTuple):
    """What the first pass leaves for the second: n + 1 tensors (events, H) of each, from layer 0 on."""

    z: Sequence[Tensor]
    h: Sequence[Tensor]
    g: Sequence[Tensor]  # dE/dh
    q: Sequence[Tensor]  # dE/dz


def energy_and_score(u: Tensor, k: Tensor, w_in: Tensor, b_in: Tensor, emb: Tensor, w: Sequence[Tensor] | Tensor,
                     b: Sequence[Tensor] | Tensor, w_out: Tensor, b_out: Tensor) -> tuple[Tensor, Tensor]:
    """E (n,) and s = -dE/du (n, D) of preprocessed events u (n, D) at levels k (n,), differentiable to any order.

    The weights have the shapes of `Weights`. A first derivative is the explicit second pass; higher ones are plain
    operations of PyTorch on every device.
    """
    return _EnergyAndScore.apply(u, k, w_in, b_in, emb, w_out, b_out, *w, *b)


def energy_and_score_of(network: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(u (n, D), k (n,)) -> E (n,), s (n, D), with the weights that an EnergyNetwork has when it is called."""
    if network.kind != "energy":
        raise ValueError(f"expected an energy network, whose score is the gradient of its energy; given kind "
                         f"{network.kind!r}")

    def of_network(u: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        first, level, last = network.input, network.level, network.output
        w, b = [layer.weight for layer in network.hidden], [layer.bias for layer in network.hidden]
        return energy_and_score(u, k, first.weight, first.bias, level.weight, w, b, last.weight[0], last.bias)

    return of_network


class Plain:
    """What lies between two matrix products, in PyTorch; autograd_kernel.py has the same as one kernel each.

    Tensors are (n, H); g may be one row (H,) expanded to all events.
    """

    @staticmethod
    def up(z: Tensor, h: Tensor | None) -> Tensor:
        """h + silu(z)."""
        return silu(z) if h is None else silu(z).add_(h)

    @staticmethod
    def through(g: Tensor, z: Tensor) -> Tensor:
        """g silu'(z). PyTorch has it as one operation, which cannot be differentiated again."""
        return g * silu_derivative(z) if torch.is_grad_enabled() else torch.ops.aten.silu_backward(g, z)

    @staticmethod
    def tangent(z: Tensor, z_dot: Tensor, h_dot: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor]:
        """h' + silu'(z) z' and g silu''(z) z', where silu'' = sig (1 - sig) (2 + z - 2 z sig)."""
        step = Plain.through(z_dot, z)
        sig = torch.sigmoid(z)
        bend = torch.addcmul(z, z, sig, value=-2).add_(2).mul_(z_dot).mul_(g)
        return step if h_dot is None else step.add_(h_dot), torch.ops.aten.sigmoid_backward(bend, sig)

    @staticmethod
    def adjoint(c: Tensor, z: Tensor, bend: Tensor) -> Tensor:
        """c silu'(z) + bend."""
        return Plain.through(c, z).add_(bend)


def _between(u: Tensor) -> Any:
    """`Plain`, or the module of kernels: for float32 on a GPU, where nobody wants a derivative of what is computed."""
    fused = u.is_cuda and u.dtype == torch.float32 and not torch.is_grad_enabled()
    return _kernels_on(u.device) if fused else Plain


@cache
def _kernels_on(device: torch.device) -> Any:
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return Plain
    from kernels import autograd_kernel

    return autograd_kernel


def first_pass(u: Tensor, k: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Kept]:
    """Energy (n,), score (n, D) and what the second pass needs."""
    between = _between(u)
    z = [torch.addmm((weights.b_in + weights.emb).index_select(0, k), u, weights.w_in.T)]
    h = [between.up(z[0], None)]
    for w, b in zip(weights.w, weights.b, strict=True):
        z.append(torch.addmm(b, h[-1], w.T))
        h.append(between.up(z[-1], h[-1]))
    g = [weights.w_out.contiguous().expand_as(h[-1])]
    q = [between.through(g[0], z[-1])]
    for w, below in zip(reversed(weights.w), reversed(z[:-1]), strict=True):
        g.append(torch.addmm(g[-1], q[-1], w))
        q.append(between.through(g[-1], below))
    return h[-1] @ weights.w_out + weights.b_out, -(q[-1] @ weights.w_in), Kept(z, h, g[::-1], q[::-1])


def second_pass(e: Tensor | None, v: Tensor, u: Tensor, k: Tensor, weights: Weights, kept: Kept,
                wrt_u: bool = True) -> tuple[Tensor | None, Weights]:
    """dL/du (n, D), if it is wanted, and dL/dweights, from e = dL/dE (n,) (None: 0) and v = dL/ds (n, D)."""
    between = _between(u)
    inward, z_dot = -v, None
    h_dot, bend = [], []
    for i, z in enumerate(kept.z):
        z_dot = h_dot[-1] @ weights.w[i - 1].T if i else inward @ weights.w_in.T
        moved, bent = between.tangent(z, z_dot, h_dot[-1] if i else None, kept.g[i])
        h_dot.append(moved)
        bend.append(bent)
    c = None if e is None else torch.outer(e, weights.w_out)
    w, b = [], []
    for i in range(len(weights.w), 0, -1):
        a = bend[i] if c is None else between.adjoint(c, kept.z[i], bend[i])
        w.append((a.T @ kept.h[i - 1]).addmm_(kept.q[i].T, h_dot[i - 1]))
        b.append(a.sum(0))
        c = a @ weights.w[i - 1] if c is None else torch.addmm(c, a, weights.w[i - 1])
    a = bend[0] if c is None else between.adjoint(c, kept.z[0], bend[0])
    w_in = (a.T @ u).addmm_(kept.q[0].T, inward)
    levels = torch.arange(len(weights.emb), device=k.device)[:, None] == k
    emb = levels.to(a.dtype) @ a  # not index_add_, whose order of summing changes from run to run on a GPU
    w_out = h_dot[-1].sum(0) if e is None else torch.addmv(h_dot[-1].sum(0), kept.h[-1].T, e)
    b_out = torch.zeros_like(weights.b_out) if e is None else e.sum().reshape(1)
    return a @ weights.w_in if wrt_u else None, Weights(w_in, emb.sum(0), emb, w_out, b_out, w[::-1], b[::-1])


class _EnergyAndScore(torch.autograd.Function):
    """The first pass, and the second one as its gradient."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        energy, score, kept = first_pass(u, k, Weights.of(tensors))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, k, *tensors, *(t for row in kept for t in row))
        return energy, score

    @staticmethod
    def backward(ctx: Any, e: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        given = len(ctx.needs_input_grad)
        (u, k, *tensors), rest = ctx.saved_tensors[:given], ctx.saved_tensors[given:]
        weights = Weights.of(tensors)
        if torch.is_grad_enabled():  # a derivative of this one is wanted: what was kept has no graph
            kept = first_pass(u, k, weights)[2]
        else:
            each = len(weights.w) + 1
            kept = Kept(*(rest[i * each:(i + 1) * each] for i in range(4)))
        du, d = second_pass(e, torch.zeros_like(u) if v is None else v, u, k, weights, kept, ctx.needs_input_grad[0])
        return du, None, *d[:5], *d.w, *d.b
