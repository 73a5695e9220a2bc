"""Multi-scale denoising score matching on the analytic score, and the training loop.

With noise eps ~ N(0, 1) of size sigma the best score of the blurred density is -eps / sigma on average
(Vincent 2011), so the loss of one event at level k is |sigma s(u + sigma eps, k) + eps|^2. Only an ordinary
backward pass is needed, since the score is plain operations of the weights.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

EnergyAndScore = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # u (n, D), k (n,) -> E (n,), s (n, D)
_HELD_OUT_EVENTS = 4096


def geometric_sigmas(n: int = 10, largest: float = 2.0, smallest: float = 0.05) -> tuple[float, ...]:
    """n noise levels in units of background spread, from the largest (k = 0) down to the smallest."""
    if n < 1 or not 0 < smallest <= largest:
        raise ValueError(f"expected n >= 1 and 0 < smallest <= largest, given {n}, {smallest}, {largest}")
    return tuple(float(s) for s in np.geomspace(largest, smallest, n))


def dsm_errors(energy_and_score: EnergyAndScore, u: Tensor, k: Tensor, noise: Tensor, sigmas: Tensor,
               mask: Tensor | None = None) -> Tensor:
    """|sigma s(u + sigma eps, k) + eps|^2 of each event, (n,).

    u (n, D) preprocessed events, k (n,) levels, noise (n, D) standard normal, sigmas (L,). Features where
    `mask` (n, D) is false are absent: they get no noise and do not enter the sum.
    """
    sigma = sigmas[k].unsqueeze(-1)
    if mask is not None:
        noise = noise * mask
    _, score = energy_and_score(u + sigma * noise, k)
    error = sigma * score + noise
    if mask is not None:
        error = error * mask
    return error.square().sum(-1)


def dsm_loss(energy_and_score: EnergyAndScore, u: Tensor, k: Tensor, noise: Tensor, sigmas: Tensor, *,
             mask: Tensor | None = None, level_weights: Tensor | None = None, l2: float = 0.0,
             parameters: Sequence[Tensor] = ()) -> Tensor:
    """L = L_DSM + sum_i w_i L_DSM(sigma_i) + l2 |theta|^2 with w = l1 v = `level_weights` (L,).

    L_DSM is the mean over events, whose levels k were drawn uniformly. The same draws estimate the second
    term without bias: an event at level k stands for L w_k L_DSM(sigma_k).
    """
    errors = dsm_errors(energy_and_score, u, k, noise, sigmas, mask)
    if level_weights is not None:
        errors = errors * (1 + len(sigmas) * level_weights[k])
    loss = errors.mean()
    if l2:
        loss = loss + l2 * sum(p.square().sum() for p in parameters)
    return loss


@dataclass
class History:
    """What a training run left behind; losses are per event, summed over features (D means: learned nothing)."""

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)  # mean since the entry before
    held_out_loss: list[float] = field(default_factory=list)  # of the averaged weights, at the same steps
    held_out_per_level: list[float] = field(default_factory=list)  # at the end, (L,)
    seconds: float = 0.0


def train(network: nn.Module, u: Tensor, sigmas: Sequence[float], *, mask: Tensor | None = None,
          steps: int = 4000, batch_size: int = 512, lr: float = 1e-3, ema: float = 0.999, seed: int = 0,
          energy_and_score: EnergyAndScore | None = None, level_weights: Sequence[float] | None = None,
          l2: float = 0.0, validation: tuple[Tensor, Tensor | None] | None = None, record_every: int = 200,
          progress: bool | None = None) -> History:
    """Train an EnergyNetwork or ScoreNetwork on preprocessed background u (n, D); its weights end as their EMA.

    Adam with a cosine schedule from `lr` to 0. `mask` (n, D) bool is false where a feature is absent.
    `validation` is (u, mask) of held-out events, whose loss with one fixed draw of noise is recorded.
    `energy_and_score` may be a fused kernel that reads the network's weights. The same seed, data and
    number of threads give the same weights. `progress`: True or False; None shows it on a terminal.
    Raises ValueError on arguments that cannot be trained with, RuntimeError where the loss diverges.
    """
    if u.ndim != 2 or len(u) == 0 or steps < 1 or batch_size < 1:
        raise ValueError(f"expected events (n, D) with n > 0, steps and batch_size at least 1, given "
                         f"{tuple(u.shape)}, {steps}, {batch_size}")
    if mask is not None and mask.shape != u.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(u.shape)} as the events")
    if len(sigmas) != network.n_sigmas:
        raise ValueError(f"{len(sigmas)} noise levels given, the network has {network.n_sigmas}")
    score_of = energy_and_score or network.energy_and_score
    sigma = torch.as_tensor(sigmas, dtype=u.dtype, device=u.device)
    weights = None if level_weights is None else torch.as_tensor(level_weights, dtype=u.dtype, device=u.device)
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator(device=u.device).manual_seed(seed)
    batches = _batches(len(u), batch_size, generator)
    history, recent, started = History(), [], time.perf_counter()

    with _progress(progress) as bar:
        task = bar.add_task("training", total=steps, loss="")
        for step in range(1, steps + 1):
            rows = next(batches)
            k = torch.randint(len(sigma), rows.shape, generator=generator, device=u.device)
            noise = torch.randn(len(rows), u.shape[1], generator=generator, device=u.device, dtype=u.dtype)
            loss = dsm_loss(score_of, u[rows], k, noise, sigma, mask=None if mask is None else mask[rows],
                            level_weights=weights, l2=l2, parameters=parameters)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            # The average forgets its random start quickly, then settles at the asked-for decay.
            decay = min(ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            recent.append(loss.detach())
            if step % record_every == 0 or step == steps:
                value = float(torch.stack(recent).mean())
                if not math.isfinite(value):
                    raise RuntimeError(f"the loss is {value} at step {step}: lower the learning rate (now {lr})")
                history.steps.append(step)
                history.train_loss.append(value)
                recent.clear()
                if validation is not None:
                    with _weights(parameters, average):
                        per_level = held_out_losses(score_of, *validation, sigma)
                    history.held_out_loss.append(float(np.mean(per_level)))
                    history.held_out_per_level = per_level
                bar.update(task, loss=f"loss {value:.2f}")
            bar.advance(task)
    with torch.no_grad():
        for p, a in zip(parameters, average, strict=True):
            p.copy_(a)
    history.seconds = time.perf_counter() - started
    return history


@torch.no_grad()
def held_out_losses(energy_and_score: EnergyAndScore, u: Tensor, mask: Tensor | None, sigmas: Tensor,
                    seed: int = 0) -> list[float]:
    """L_DSM(sigma_i) of every level with one fixed draw of noise, on at most the first 4096 events."""
    u, mask = u[:_HELD_OUT_EVENTS], None if mask is None else mask[:_HELD_OUT_EVENTS]
    generator = torch.Generator(device=u.device).manual_seed(seed)
    noise = torch.randn(u.shape, generator=generator, device=u.device, dtype=u.dtype)
    levels = (torch.full((len(u),), k, device=u.device) for k in range(len(sigmas)))
    return [float(dsm_errors(energy_and_score, u, k, noise, sigmas, mask).mean()) for k in levels]


def train_score_model(model: nn.Module, X_train: np.ndarray | Tensor, sigmas: Sequence[float], n_epochs: int = 500,
                      lr: float = 1e-3, batch_size: int = 512) -> tuple[nn.Module, list[float]]:
    """Train an EnergyNetwork or ScoreNetwork on preprocessed events (n, D): the model and its loss per epoch.

    The noise levels are those of the model, descending.
    """
    u = torch.as_tensor(X_train, dtype=torch.float32)
    per_epoch = max(1, len(u) // batch_size)
    history = train(model, u, sigmas, steps=n_epochs * per_epoch, lr=lr, batch_size=batch_size,
                    record_every=per_epoch)
    return model, history.train_loss


def _batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of equally large batches: every event once per epoch, but for an incomplete last batch."""
    size = min(size, n)
    while True:
        order = torch.randperm(n, generator=generator, device=generator.device)
        yield from order[:n - n % size].split(size)


class _weights:
    """Within the block, the parameters have other values."""

    def __init__(self, parameters: list[Tensor], values: list[Tensor]):
        self.parameters, self.values = parameters, values

    def _swap(self) -> None:
        with torch.no_grad():
            for p, v in zip(self.parameters, self.values, strict=True):
                kept = p.detach().clone()
                p.copy_(v)
                v.copy_(kept)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()


def _progress(show: bool | None):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    show = sys.stderr.isatty() if show is None else show
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[loss]}"))
    return Progress(*columns, console=Console(stderr=True), disable=not show)
