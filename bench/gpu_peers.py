"""The stages of `bench.gpu` beside PyTorch: the same energies and scores another way, and a step of training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_device import (
    DEVICE,
    DTYPES,
    Setting,
    attempt,
    errors,
    matmul_mode,
    on_device,
    product_shapes,
    sample,
    scorers,
)
from bench.gpu_isolate import tell
from bench.gpu_speed import CALL, ON_DEVICE, row
from ebm.dsm import dsm_loss, geometric_sigmas
from ebm.networks import EnergyNetwork
from export.score_graph import ExportGraph, Options
from kernels.tolerances import TOLERANCES

EAGER, ANALYTIC, COMPILED, MAX = "torch-eager", "torch-eager-analytic", "torch-compile", "torch-compile-max"
PRODUCTS = "cublas-products"  # no peer: it computes nothing else
_COMPILE_S = 15.0  # of torch.compile, with what is timed after it
_SAME_MODE = {"fp32": ("fp32", "tf32x3"), "tf32": ("tf32",), "bf16": ("bf16",), "fp16": ("fp16",)}


class Analytic(nn.Module):
    """The analytic graph with the network in another dtype; preprocessing and the slope stay in float32."""

    def __init__(self, setting: Setting, precision: str):
        super().__init__()
        graph = ExportGraph(setting.bundle, Options.of(setting.bundle))
        self.dtype, self.level = DTYPES.get(precision, torch.float32), graph.level
        self.preprocessing, self.network = graph.preprocessing, graph.network.to(self.dtype)
        self.to(setting.device.where).requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, slope = self.preprocessing(x)
        energy, score = self.network.energy_and_score(u.to(self.dtype), self.level)
        return energy.float(), score.float() * slope

    def by_autograd(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same as it is usually written."""
        u, slope = self.preprocessing(x)
        u.requires_grad_()
        energy = self.network(u.to(self.dtype), self.level)
        (gradient,) = torch.autograd.grad(energy.sum(), u)
        return energy.detach().float(), -gradient * slope


def _compile(setting: Setting, module: Callable, mode: str | None = None) -> Callable:
    torch._dynamo.config.recompile_limit = 1000  # above it, eager without a word
    options = {"backend": "eager"} if setting.dry else {"mode": mode}
    return torch.compile(module, dynamic=False, **options)


def peers(setting: Setting, which: str) -> None:
    """Times on the device alone, ours and theirs in turns; of a single event, theirs from NumPy to NumPy, too.

    The likeliest to be the best batch of torch.compile come first. `which` is "max" for torch.compile with tuned matrix
    products, which takes long.
    """
    if which == "max":
        return _beside(setting, {}, "bf16", setting.pick(1 << 18, 1 << 18, 8), mode="max-autotune-no-cudagraphs")
    ours, two = scorers(setting), ("bf16", "fp32")
    todo = setting.pick([(p, 1 << n) for n in (18, 16, 14, 20, 12, 0) for p in two] + [("tf32", 1 << 18),
                        ("fp16", 1 << 18)], [(p, 1 << n) for n in (18, 16) for p in two],
                        [("bf16", 8), ("fp32", 8), ("fp32", 1)])
    for precision, batch in todo:
        what = f"peers {precision}, batch {batch}"
        if setting.has_time(what, _COMPILE_S):
            attempt(what, lambda p=precision, n=batch: _beside(setting, ours, p, n))


def _beside(setting: Setting, ours: dict[str, Any], precision: str, batch: int, mode: str | None = None) -> None:
    matmul_mode(precision)
    device, n = setting.device, min(batch, len(setting.events))
    x, alone = setting.resident(batch), setting.events[:batch]
    graph = Analytic(setting, precision)
    out = torch.empty(batch, device=device.where), torch.empty_like(x)
    contenders: dict[tuple[str, str], Callable[[Tensor], Any]] = {
        (setting.kernel, p): lambda x, s=ours[p]: s.energy_and_score(x, out=out)
        for p in _SAME_MODE[precision] if p in ours}
    if mode:
        contenders[MAX, precision] = _compile(setting, graph, mode)
    else:
        contenders |= {(EAGER, precision): graph.by_autograd, (ANALYTIC, precision): graph,
                       (COMPILED, precision): _compile(setting, graph)}
    ready, agreement = {}, {}
    for (name, p), call in contenders.items():
        peer = name != setting.kernel

        def check(name: str = name, p: str = p, call: Callable = call, peer: bool = peer) -> None:
            agreement[name, p] = errors(tuple(r[:n] for r in call(x)), setting.truth, p, slice(n))
            ready[f"{name} {p} {ON_DEVICE}{DEVICE}"] = on_device(device, lambda: call(x))
            if peer and batch == 1:
                ready[f"{name} {p} {CALL}"] = lambda _: [
                    r.cpu().numpy() for r in call(torch.from_numpy(alone).to(device.where))]

        attempt(f"{name} {p}, batch {batch}", check, ours=not peer)
    what = f"{PRODUCTS} {precision}, batch {batch}"
    if not mode and (products := attempt(what, lambda: _products(setting, precision, batch), ours=False)):
        ready[PRODUCTS + DEVICE] = on_device(device, products)
    for told, quantiles in sample(ready, setting.sample_s).items():
        if told == PRODUCTS + DEVICE:
            tell("limits", {"products_us": {f"{precision} {batch}": quantiles["p50_us"]}})
        else:
            name, p, timing = told.removesuffix(DEVICE).split()
            row(name, name != setting.kernel, batch, p, timing, quantiles, agreement[name, p])


def _products(setting: Setting, precision: str, batch: int) -> Callable[[], None]:
    """The matrix products alone, through cuBLAS: what anything that calls it has to spend at least."""
    triples = [tuple(torch.randn(s, device=setting.device.where).to(DTYPES.get(precision, torch.float32))
                     for s in ((batch, k), (k, m), (batch, m))) for k, m in product_shapes(*setting.architecture)]

    def products() -> None:
        for left, right, out in triples:
            torch.mm(left, right, out=out)

    products()
    return products


def training(setting: Setting, _: str) -> None:
    """Section "training": a step of denoising score matching with Adam, the host's part included."""
    for batch in setting.pick((512, 8192, 65_536), (8192,), (4,)):
        for precision in setting.pick(("fp32", "tf32"), ("fp32",), ("fp32",)):
            matmul_mode(precision)
            what = f"training {precision}, batch {batch}"
            if setting.has_time(what, _COMPILE_S):
                attempt(what, lambda p=precision, n=batch: _steps(setting, p, n))


def _steps(setting: Setting, precision: str, batch: int) -> None:
    d, h, layers = setting.architecture
    where, levels = setting.device.where, 10
    torch.manual_seed(setting.seed)
    u, noise = torch.randn(2, batch, d, device=where)
    k, sigmas = torch.randint(levels, (batch,), device=where), torch.tensor(geometric_sigmas(levels), device=where)
    start = EnergyNetwork(d, h, levels, layers).state_dict()

    def fresh() -> EnergyNetwork:
        network = EnergyNetwork(d, h, levels, layers)
        network.load_state_dict(start)
        return network.to(where)

    true = fresh().double()
    dsm_loss(true.energy_and_score, u.double(), k, noise.double(), sigmas.double()).backward()
    truth = torch.cat([p.grad.flatten() for p in true.parameters() if p.grad is not None])
    calls, distance = {}, {}
    for name, make in _METHODS.items():
        def ready(name: str = name, make: Callable = make) -> None:
            network = fresh()
            score_of = make(setting, network)
            dsm_loss(score_of, u, k, noise, sigmas).backward()
            pairs = [(p, q) for p, q in zip(network.parameters(), true.parameters()) if q.grad is not None]
            found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p, _ in pairs])
            distance[name] = float((found.double() - truth).norm() / truth.norm())
            adam = torch.optim.Adam(network.parameters(), lr=1e-4, fused=not setting.dry)
            calls[name + DEVICE] = _timed_steps(setting, lambda: dsm_loss(score_of, u, k, noise, sigmas), adam)

        attempt(f"training {precision}, batch {batch}, {name}", ready, ours=name == "fused")
    for told, quantiles in sample(calls, 2 * setting.sample_s).items():
        name = told.removesuffix(DEVICE)
        tell("training", {"method": name, "precision": precision, "batch": batch, "step_us": quantiles["p50_us"],
                          "rel_gradient": distance[name], "passed": distance[name] <= 2 * TOLERANCES[precision]})


def _timed_steps(setting: Setting, loss: Callable[[], Tensor], adam: torch.optim.Optimizer) -> Callable:
    """For `sample`: seconds per step of some steps in a row."""
    steps = setting.pick(10, 10, 1)

    def call(_: Any) -> list[float]:
        setting.device.sync()
        start = time.perf_counter()
        for _ in range(steps):
            adam.zero_grad()
            loss().backward()
            adam.step()
        setting.device.sync()
        return [(time.perf_counter() - start) / steps]

    return call


def _double_backward(_: Setting, network: EnergyNetwork) -> Callable:
    def energy_and_score(u: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        u = u.detach().requires_grad_()
        energy = network(u, k)
        (gradient,) = torch.autograd.grad(energy.sum(), u, create_graph=True)
        return energy, -gradient

    return energy_and_score


def _fused(_: Setting, network: EnergyNetwork) -> Callable:
    from kernels.autograd import energy_and_score_of

    return energy_and_score_of(network)


_METHODS: dict[str, Callable[[Setting, EnergyNetwork], Callable]] = {
    "double backward": _double_backward, "analytic": lambda _, network: network.energy_and_score,
    "analytic compiled": lambda setting, network: _compile(setting, network.energy_and_score), "fused": _fused,
}
