"""The one graph that is traced, compiled and exported: raw events in, energy and score out, no autograd."""

from __future__ import annotations

from torch import Tensor, nn

from ebm.bundle import Bundle
from kernels.reference import ScoreGraph


class FixedLevelGraph(nn.Module):
    """Raw events x (n, D) -> energy (n,) and score -dE/dx (n, D) at one noise level, as plain operations.

    The level's embedding is folded into the input bias, so the exported graph has no look-up and no second
    input. `energy_only` gives the energy (n,) alone, without the backward half.
    """

    def __init__(self, bundle: Bundle, level: int | None = None, *, preprocess: bool = True,
                 energy_only: bool = False):
        super().__init__()
        if bundle.architecture.kind != "energy":
            raise ValueError(f"only energy networks have this graph, given kind {bundle.architecture.kind!r}")
        level = bundle.default_level if level is None else level
        if not 0 <= level < bundle.n_levels:
            raise ValueError(f"noise level is {level}, expected 0 to {bundle.n_levels - 1}")
        self.level = level
        self.energy_only = energy_only
        # Not called "graph": a traced module keeps its own graph under that name.
        self.model = ScoreGraph.of(bundle, preprocess)
        network = self.model.network
        network.input.bias += network.level.weight[level]
        del network.level
        network.level = _nothing_to_add
        self.eval()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.energy_only:
            return self.model(x, self.level)
        u = x if self.model.preprocessing is None else self.model.preprocessing(x)[0]
        return self.model.network(u, self.level)


def _nothing_to_add(level: int) -> float:
    return 0.0
