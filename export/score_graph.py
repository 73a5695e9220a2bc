"""The one graph that is traced, compiled and exported: raw events in, energy and score out, no autograd."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ebm.bundle import Bundle
from kernels.reference import ScoreGraph

OUTPUTS = ("energy", "score", "flag", "energies")
MAX_BATCH = 1 << 24
_TALKATIVE = ("torch.onnx._internal.exporter._registration", "torch.export.pt2_archive._package")


@dataclass(frozen=True)
class Options:
    """What an artefact computes. Make it with `Options.of`, which checks it against the model.

    `outputs` is a part of OUTPUTS in their order; `level` the noise level of energy, score and flag; `batch_max` the
    largest batch that formats with a limit are built for.
    """

    outputs: tuple[str, ...]
    level: int
    preprocess: bool = True
    batch_max: int = 65_536

    @classmethod
    def of(cls, bundle: Bundle, *, outputs: Sequence[str] | None = None, level: int | None = None,
           preprocess: bool = True, batch_max: int = 65_536) -> Options:
        """Options for a model; None: energy, score and, where there is a threshold for this level, flag.

        The energy is always among them: it alone tells an event that cannot be scored from an ordinary one.
        Raises ValueError on outputs without it, unknown or repeated, on a flag that has no threshold at this level,
        and on a level or batch out of range.
        """
        level = bundle.default_level if level is None else level
        if type(level) is not int or not 0 <= level < bundle.n_levels:
            raise ValueError(f"noise level is {level!r}, expected 0 to {bundle.n_levels - 1}")
        if type(batch_max) is not int or not 1 <= batch_max <= MAX_BATCH:
            raise ValueError(f"batch_max is {batch_max!r}, expected a whole number from 1 to {MAX_BATCH}")
        has_flag = bundle.threshold is not None and bundle.threshold.level == level
        if outputs is None:
            outputs = OUTPUTS[:3] if has_flag else OUTPUTS[:2]
        if isinstance(outputs, str) or "energy" not in outputs or sorted(outputs) != sorted({*outputs} & {*OUTPUTS}):
            raise ValueError(f"outputs are {outputs!r}, expected energy and any of {', '.join(OUTPUTS[1:])}, each once")
        if "flag" in outputs and not has_flag:
            state = ("this model has none: calibrate it first" if bundle.threshold is None else
                     f"this model's is for noise level {bundle.threshold.level}, not {level}")
            raise ValueError(f"output 'flag' needs a threshold, and {state}")
        return cls(tuple(name for name in OUTPUTS if name in outputs), level, bool(preprocess), batch_max)


class ExportGraph(nn.Module):
    """Raw events x (n, D) -> a tuple in the order of `options.outputs`, by plain operations.

    energy (n,) and score -dE/dx (n, D) at the level of the options; flag (n,) bool, energy above the threshold,
    strictly; energies (n, L) at every level. All but the flag in the dtype of the graph, float32.
    The level's embedding is folded into the input bias, so there is no look-up and no second input; what `network`
    takes in place of a level is added to that bias. Without "score" there is no backward half.
    """

    level = 0.0

    def __init__(self, bundle: Bundle, options: Options):
        super().__init__()
        graph = ScoreGraph.of(bundle, options.preprocess)
        self.preprocessing, self.network = graph.preprocessing, graph.network
        self.options, self.kind = options, bundle.architecture.kind
        self.threshold = bundle.threshold and bundle.threshold.energy
        if self.kind != "autoencoder":
            embedding = self.network.level.weight
            self.network.input.bias += embedding[options.level]
            self.network.level = nn.Identity()
            if "energies" in options.outputs:
                self.register_buffer("levels", embedding - embedding[options.level])
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        u, slope = (x, None) if self.preprocessing is None else self.preprocessing(x)
        outputs = self.options.outputs
        result: dict[str, Tensor] = {}
        if self.kind == "energy" and "score" not in outputs:
            energy = self.network(u, self.level)
        else:
            energy, score = self.network.energy_and_score(u, self.level)
            result["score"] = score if slope is None else score * slope
        result["energy"] = energy
        if "flag" in outputs:
            result["flag"] = energy > self.threshold
        if "energies" in outputs:
            result["energies"] = energy[:, None] if self.kind == "autoencoder" else self._energies(u)
        return tuple(result[name] for name in outputs)

    def _energies(self, u: Tensor) -> Tensor:
        if self.kind == "energy":
            return self.network(u[:, None], self.levels)
        return self.network.energy_and_score(u[:, None], self.levels)[0]


def program(bundle: Bundle, options: Options) -> torch.export.ExportedProgram:
    """The graph as torch.export gives it, with a free batch."""
    # A batch of 1 would be taken for a constant.
    return torch.export.export(ExportGraph(bundle, options), (example_events(bundle, 7),),
                               dynamic_shapes=({0: torch.export.Dim("batch")},))


def example_events(bundle: Bundle, batch: int) -> Tensor:
    """Ordinary events (batch, D) float32, the same every time, for tracing."""
    p = bundle.preprocessing
    row = np.where(np.isnan(p.impute), p.mean, p.impute)
    return torch.from_numpy(row).expand(batch, -1).contiguous()


@contextmanager
def without_notices() -> Iterator[None]:
    """Without what torch says about itself while it exports: its own deprecations, torchvision, other processors."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    before = [log.level for log in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`?torch\.jit\.", DeprecationWarning)
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        try:
            for log in loggers:
                log.setLevel(logging.ERROR)
            yield
        finally:
            for log, level in zip(loggers, before):
                log.setLevel(level)
