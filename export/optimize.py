"""`optimize_for_inference`: a network made ready for deployment, with its proof and its latency."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ebm.bundle import Architecture, Bundle
from ebm.dsm import geometric_sigmas
from ebm.events import Schema
from ebm.networks import Autoencoder, EnergyNetwork, ScoreNetwork
from ebm.preprocess import Preprocessing
from export.manifest import golden_events
from export.score_graph import Options
from export.to_torchscript import WARM_UP_CALLS, milliseconds, traced
from kernels import load_scorer
from kernels.tolerances import CHECK_EVENTS, TOLERANCES, relative_rms_energy, relative_rms_score

BUDGETS_MS = {"cpu": 50.0, "cuda": 5.0}  # the 99th percentile for one event
_CALLS = 200


def optimize_for_inference(model: EnergyNetwork | ScoreNetwork | Autoencoder | Bundle,
                           input_dim: int = 64) -> dict[str, dict[str, Any]]:
    """Trace energy and score of a model, check the trace against float64, time it: on the CPU and, if any, the GPU.

    A network takes preprocessed events, a Bundle raw ones; the noise level is its default. The report has an entry
    "cpu" and, where PyTorch sees a GPU, "cuda", each with `module`, the frozen TorchScript module: (n, input_dim)
    float32 -> energy (n,), score (n, input_dim); `error_energy` and `error_score`, relative, over 4096 events, and
    whether it `agrees` within the `tolerance` of fp32; and the milliseconds a caller waits for one event, from host
    memory to host memory: `first_call_ms`, `first_20_calls_ms`, and of 200 later ones `p50_ms`, `p99_ms` and whether
    that is `within_budget` of `budget_ms`. A module that does not agree has no times: they are None.

    Raises ValueError where `model` is none of these or takes another number of features than `input_dim`.
    """
    bundle = model if isinstance(model, Bundle) else _bundle(model)
    if bundle.schema.n_features != input_dim:
        raise ValueError(f"input_dim is {input_dim}, the model takes {bundle.schema.n_features} features")
    options = Options.of(bundle, outputs=("energy", "score"), preprocess=isinstance(model, Bundle))
    x = golden_events(bundle, options.preprocess, CHECK_EVENTS)
    truth = load_scorer(bundle, "reference", preprocess=options.preprocess).energy_and_score(x)
    return {device: _report(traced(bundle, options, device), device, x, truth)
            for device in BUDGETS_MS if device == "cpu" or torch.cuda.is_available()}


@torch.inference_mode()
def _report(module: torch.jit.ScriptModule, device: str, x: np.ndarray, truth: tuple[np.ndarray, np.ndarray]) -> dict:
    def call(events: np.ndarray) -> list[np.ndarray]:
        return [result.cpu().numpy() for result in module(torch.from_numpy(events).to(device))]

    first, later = (milliseconds(lambda: call(x[:1]), calls) for calls in (WARM_UP_CALLS, _CALLS))
    p50, p99 = (float(q) for q in np.quantile(later, (0.5, 0.99)))
    (energy, score), tolerance, budget = call(x), TOLERANCES["fp32"], BUDGETS_MS[device]
    errors = relative_rms_energy(energy, truth[0]), relative_rms_score(score, truth[1])
    agrees = all(error <= tolerance for error in errors)
    times = {"first_call_ms": first[0], f"first_{WARM_UP_CALLS}_calls_ms": sum(first), "p50_ms": p50, "p99_ms": p99,
             "within_budget": p99 < budget}
    return {"module": module, "error_energy": errors[0], "error_score": errors[1], "tolerance": tolerance,
            "agrees": agrees, "budget_ms": budget, **(times if agrees else dict.fromkeys(times))}


def _bundle(network: torch.nn.Module) -> Bundle:
    """A network as a bundle that takes preprocessed events."""
    if not isinstance(network, EnergyNetwork | ScoreNetwork | Autoencoder):
        raise ValueError(f"model is {type(network).__name__}, expected an EnergyNetwork, a ScoreNetwork, an "
                         "Autoencoder or a Bundle")
    d = network.input_dim
    sizes = {"latent_dim": network.layers[2].out_features} if network.kind == "autoencoder" else {
        "hidden_dim": network.input.out_features, "n_layers": len(network.hidden), "n_sigmas": network.n_sigmas}
    tensors = {name: t.detach().cpu().numpy() for name, t in network.tensors().items()}
    schema = Schema("preprocessed", tuple(f"u{j}" for j in range(d)), ("",) * d)
    return Bundle(Architecture(network.kind, d, **sizes), tensors, geometric_sigmas(network.n_sigmas),
                  network.default_level, schema, Preprocessing.identity(d))
