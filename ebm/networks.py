"""The networks. Each gives energy and score as plain operations, never through autograd.

That is what lets them be trained by an ordinary backward pass, compiled and exported; kernels/README.md has the
mathematics. All of them take preprocessed events u of shape (n, D) and noise levels k of shape (n,).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


def silu_derivative(z: Tensor) -> Tensor:
    """silu'(z) = sig(z) (1 + z (1 - sig(z)))."""
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


class _Trunk(nn.Module):
    """Input projection plus noise-level embedding, then residual SiLU layers: D -> H."""

    kind: str

    def __init__(self, input_dim: int, hidden_dim: int, n_sigmas: int, n_layers: int, output_dim: int):
        super().__init__()
        for name, value in (("input_dim", input_dim), ("hidden_dim", hidden_dim),
                            ("n_sigmas", n_sigmas), ("n_layers", n_layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, given {value}")
        self.input_dim, self.n_sigmas = input_dim, n_sigmas
        self.default_level = 3 * n_sigmas // 4  # of 10 levels from 2 to 0.05: sigma = 0.11 (docs/defaults.md)
        self.input = nn.Linear(input_dim, hidden_dim)
        self.level = nn.Embedding(n_sigmas, hidden_dim)
        nn.init.normal_(self.level.weight, std=0.1)
        self.hidden = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(n_layers))
        self.output = nn.Linear(hidden_dim, output_dim)
        # Mean and spread (L,) of each level's energies on background: without them levels cannot be compared.
        self.register_buffer("level_mean", None)
        self.register_buffer("level_std", None)

    def activations(self, u: Tensor, k: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The last hidden state h_n (n, H) and the pre-activations [z_0, ..., z_n]."""
        if k is None:
            k = torch.full((u.shape[0],), self.default_level, device=u.device)
        z = [self.input(u) + self.level(k)]
        h = silu(z[0])
        for layer in self.hidden:
            z.append(layer(h))
            h = h + silu(z[-1])
        return h, z

    def tensors(self) -> dict[str, Tensor]:
        """The parameters under the names of a bundle."""
        named = {
            "w_in": self.input.weight, "b_in": self.input.bias, "emb": self.level.weight,
            "w_out": self.output.weight, "b_out": self.output.bias,
        }
        for i, layer in enumerate(self.hidden):
            named |= {f"w.{i}": layer.weight, f"b.{i}": layer.bias}
        if self.kind == "energy":
            named["w_out"] = self.output.weight[0]
        return named


class EnergyNetwork(_Trunk):
    """E(u, k): high where events are rare. The score s = -dE/du points towards more normal events."""

    kind = "energy"

    def __init__(self, input_dim: int = 64, hidden_dim: int = 256, n_sigmas: int = 10, n_layers: int = 2):
        super().__init__(input_dim, hidden_dim, n_sigmas, n_layers, output_dim=1)

    def forward(self, x: Tensor, sigma_idx: Tensor | None = None) -> Tensor:
        """Energy (n,) of preprocessed events (n, D) at noise levels (n,); None: the default level."""
        h, _ = self.activations(x, sigma_idx)
        return self.output(h).squeeze(-1)

    def energy_and_score(self, x: Tensor, sigma_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Energy (n,) and score -dE/du (n, D) by the analytic backward pass."""
        h, z = self.activations(x, sigma_idx)
        energy = self.output(h).squeeze(-1)
        g = self.output.weight.expand_as(h)
        for layer, z_i in zip(reversed(self.hidden), reversed(z[1:]), strict=True):
            g = g + (g * silu_derivative(z_i)) @ layer.weight
        return energy, -((g * silu_derivative(z[0])) @ self.input.weight)


def ensemble(networks: Sequence[EnergyNetwork]) -> EnergyNetwork:
    """The network whose energy is the mean of the given ones: M of width H are one of width M H, block by block.

    It runs wherever an energy network does, at the cost of its width; members of 64 or 128 keep within 512, the most
    that a bundle holds. Raises ValueError unless all have the same sizes.
    """
    first = networks[0]
    shapes = {name: t.shape for name, t in first.tensors().items()}
    if any({name: t.shape for name, t in n.tensors().items()} != shapes for n in networks):
        raise ValueError("the members of an ensemble must have the same sizes")
    members = [n.tensors() for n in networks]
    hidden = first.input.out_features
    whole = EnergyNetwork(first.input_dim, len(networks) * hidden, first.n_sigmas, len(first.hidden))
    whole.default_level = first.default_level
    with torch.no_grad():
        for name, tensor in whole.tensors().items():
            parts = [m[name] for m in members]
            if name == "b_out":
                tensor.copy_(torch.stack(parts).mean(0))
            elif name == "w_out":
                tensor.copy_(torch.cat(parts) / len(parts))
            elif name.startswith("w."):
                tensor.copy_(torch.block_diag(*parts))
            else:
                tensor.copy_(torch.cat(parts, dim=-1 if name == "emb" else 0))
    return whole


class ScoreNetwork(_Trunk):
    """The same trunk with a head of width D that predicts the score s(u, k) directly."""

    kind = "score"

    def __init__(self, input_dim: int = 64, hidden_dim: int = 256, n_sigmas: int = 10, n_layers: int = 2):
        super().__init__(input_dim, hidden_dim, n_sigmas, n_layers, output_dim=input_dim)

    def forward(self, x: Tensor, sigma_idx: Tensor | None = None) -> Tensor:
        """Score (n, D) of preprocessed events (n, D) at noise levels (n,)."""
        h, _ = self.activations(x, sigma_idx)
        return self.output(h)

    def energy_and_score(self, x: Tensor, sigma_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """|s| (n,), which serves as the energy of this kind, and s (n, D); s is not the gradient of |s|."""
        score = self(x, sigma_idx)
        return score.square().sum(-1).sqrt(), score


class Autoencoder(nn.Module):
    """D-128-64-latent-64-128-D with ReLU; its energy is the mean squared reconstruction error."""

    kind = "autoencoder"
    n_sigmas = 1
    default_level = 0

    def __init__(self, input_dim: int = 64, latent_dim: int = 8):
        super().__init__()
        self.input_dim = input_dim
        widths = [input_dim, 128, 64, latent_dim, 64, 128, input_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def _preactivations(self, x: Tensor) -> list[Tensor]:
        """Pre-activations of every layer; the last one is the reconstruction, the latent one is linear."""
        z = [self.layers[0](x)]
        for i, layer in enumerate(self.layers[1:]):
            z.append(layer(z[-1] if i == 2 else torch.relu(z[-1])))
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction (n, D) of preprocessed events (n, D)."""
        return self._preactivations(x)[-1]

    def energy_and_score(self, x: Tensor, sigma_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean squared error (n,) and its analytic negative gradient (n, D)."""
        z = self._preactivations(x)
        residual = z[-1] - x
        upstream = residual * (2 / self.input_dim)
        g = upstream
        for i in range(len(self.layers) - 1, 0, -1):
            g = g @ self.layers[i].weight
            if i != 3:
                g = g * (z[i - 1] > 0)
        return residual.square().mean(-1), upstream - g @ self.layers[0].weight

    def tensors(self) -> dict[str, Tensor]:
        """The parameters under the names of a bundle."""
        return {f"{p}.{i}": getattr(layer, name) for i, layer in enumerate(self.layers)
                for p, name in (("w", "weight"), ("b", "bias"))}


def from_bundle(bundle) -> EnergyNetwork | ScoreNetwork | Autoencoder:
    """The network of a bundle, with its weights."""
    a = bundle.architecture
    if a.kind == "autoencoder":
        network = Autoencoder(a.input_dim, a.latent_dim)
    else:
        cls = EnergyNetwork if a.kind == "energy" else ScoreNetwork
        network = cls(a.input_dim, a.hidden_dim, a.n_sigmas, a.n_layers)
        network.default_level = bundle.default_level
        if bundle.level_mean:
            network.level_mean, network.level_std = (torch.tensor(v) for v in (bundle.level_mean, bundle.level_std))
    with torch.no_grad():
        for name, tensor in network.tensors().items():
            tensor.copy_(torch.from_numpy(bundle.tensors[name]))
    return network
