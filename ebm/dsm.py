"""Multi-scale denoising score matching on the analytic score, and the training loop.

With noise eps ~ N(0, 1) of size sigma the best score of the blurred density is -eps / sigma on average
(Vincent 2011), so the loss of one event at level k is |sigma s(u + sigma eps, k) + eps|^2. Only an ordinary
backward pass is needed, since the score is plain operations of the weights.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ebm.checkpoint import History, Run, digest
from ebm.events import DataError
from ebm.settings import Settings

EnergyAndScore = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # u (n, D), k (n,) -> E (n,), s (n, D)
HELD_OUT_EVENTS = 4096


class Sample(NamedTuple):
    """Preprocessed events u (n, D) float32, and how noise enters them.

    `mask` (n, D) bool is false where a feature is absent: no noise there, and no part in the loss. `width` (n, D)
    float32 is the distance between neighbouring values of a feature that counts, 0 of others: uniform noise of this
    width goes in beforehand, or the density would have a peak at each whole number.
    """

    u: Tensor
    mask: Tensor | None = None
    width: Tensor | None = None

    def rows(self, rows: Tensor | slice) -> Sample:
        return Sample(*(None if t is None else t[rows] for t in self))

    def to(self, device: torch.device | str) -> Sample:
        return Sample(*(None if t is None else t.to(device) for t in self))

    def dequantised(self, generator: torch.Generator) -> Tensor:
        """u with uniform noise in the features that count."""
        if self.width is None:
            return self.u
        uniform = torch.rand(self.u.shape, generator=generator, device=self.u.device, dtype=self.u.dtype)
        return self.u + self.width * (uniform - 0.5)


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


def loss_terms(energy_and_score: EnergyAndScore, u: Tensor, k: Tensor, noise: Tensor, sigmas: Tensor, *,
               mask: Tensor | None = None, dsm: float = 1.0, level_weights: Tensor | None = None, l2: float = 0.0,
               parameters: Sequence[Tensor] = ()) -> dict[str, Tensor]:
    """The terms of L = dsm L_DSM + sum_i w_i L_DSM(sigma_i) + l2 |theta|^2 that are on, with w = `level_weights` (L,).

    L_DSM is the mean over events, whose levels k were drawn uniformly. The same draws estimate the second
    term without bias: an event at level k stands for L w_k L_DSM(sigma_k).
    """
    errors = dsm_errors(energy_and_score, u, k, noise, sigmas, mask)
    terms = {}
    if dsm:
        terms["dsm"] = dsm * errors.mean()
    if level_weights is not None:
        terms["multi_scale"] = (len(sigmas) * level_weights[k] * errors).mean()
    if l2:
        terms["l2"] = l2 * sum(p.square().sum() for p in parameters)
    return terms


def dsm_loss(energy_and_score: EnergyAndScore, u: Tensor, k: Tensor, noise: Tensor, sigmas: Tensor,
             **options: object) -> Tensor:
    """The sum of `loss_terms`, which has the arguments."""
    return sum(loss_terms(energy_and_score, u, k, noise, sigmas, **options).values())


def train(network: nn.Module, u: Tensor, sigmas: Sequence[float], *, mask: Tensor | None = None,
          width: Tensor | None = None, validation: Sequence[Tensor | None] | None = None,
          energy_and_score: EnergyAndScore | None = None, record_every: int | None = None,
          checkpoint: Path | None = None, resume: bool = False, progress: bool | None = None,
          **settings: object) -> History:
    """Train an EnergyNetwork or ScoreNetwork on preprocessed background u (n, D); its weights end as their EMA.

    `mask` and `width` are those of `Sample`, `validation` the fields of one of held-out events, whose loss with one
    fixed draw of noise is recorded every `record_every` steps (None: some 30 times); `settings` are the fields of
    `Settings`. `energy_and_score` may be a fused kernel that reads the network's weights. The same seed, data and
    number of threads give the same weights, also where the training was killed: at every record the file `checkpoint`
    is replaced, and `resume` continues from it, if it is there. `progress`: True or False; None shows it on a terminal.
    Raises ValueError on arguments that cannot be trained with, DataError on a checkpoint that is damaged, not asked
    for or of another training, RuntimeError where the loss diverges.
    """
    s, sample = Settings(**settings), Sample(u, mask, width)
    held_out = None if validation is None else Sample(*validation).rows(slice(HELD_OUT_EVENTS))
    _check(network, sample, sigmas, s, held_out)
    steps, sigma = s.steps_for(len(u)), torch.as_tensor(sigmas, dtype=u.dtype, device=u.device)
    record_every = record_every or math.ceil(steps / 30)
    weights = s.level_weights or [1 / len(sigma)] * len(sigma)
    terms_on = {"dsm": s.dsm, "level_weights": s.multi_scale * sigma.new_tensor(weights) if s.multi_scale else None,
                "l2": s.l2, "parameters": list(network.parameters())}
    score_of = energy_and_score or network.energy_and_score
    run = Run(network.parameters(), s.seed, u.device)
    about = {}
    if checkpoint:
        about = asdict(s) | {
            "sigmas": list(sigmas), "record_every": record_every, "first weights": digest(run.parameters),
            "data": digest([*sample, *(held_out or ())]), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "device": str(u.device)}
        if checkpoint.exists() and not resume:
            raise DataError(f"{checkpoint}: there is a checkpoint already: resume it or name another place")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if checkpoint.exists():
            run.read(checkpoint, about)
    recent, started = [], time.perf_counter() - run.history.seconds
    cpu_started = time.process_time() - run.history.cpu_seconds

    with _progress(progress) as bar:
        task = bar.add_task("training", total=steps, completed=run.step, loss="")
        while not run.done(steps, s.patience):
            run.step += 1
            batch = sample.rows(run.rows(len(u), s.batch_size))
            k = torch.randint(len(sigma), batch.u.shape[:1], generator=run.generator, device=u.device)
            noise = torch.randn(batch.u.shape, generator=run.generator, device=u.device, dtype=u.dtype)
            terms = loss_terms(score_of, batch.dequantised(run.generator), k, noise, sigma, mask=batch.mask, **terms_on)
            run.update(sum(terms.values()), s.lr_at(run.step, steps), s.ema)
            recent.append(torch.stack(list(terms.values())).detach())
            if run.step % record_every == 0 or run.step == steps:
                run.record(dict(zip(terms, torch.stack(recent).mean(0).tolist())))
                recent.clear()
                if held_out is not None:
                    with run.averaged():
                        run.compare(held_out_losses(score_of, *held_out[:2], sigma, width=held_out.width), s.patience)
                run.history.seconds = time.perf_counter() - started
                run.history.cpu_seconds = time.process_time() - cpu_started
                if checkpoint:
                    run.write(checkpoint, about)
                bar.update(task, loss=f"loss {run.history.train_loss[-1]:.2f}")
            bar.advance(task)
    run.finish()
    return run.history


@torch.no_grad()
def held_out_losses(energy_and_score: EnergyAndScore, u: Tensor, mask: Tensor | None, sigmas: Tensor, seed: int = 0,
                    width: Tensor | None = None) -> list[float]:
    """L_DSM(sigma_i) of every level with one fixed draw of noise, on at most the first 4096 events."""
    sample = Sample(u, mask, width).rows(slice(HELD_OUT_EVENTS))
    generator = torch.Generator(device=u.device).manual_seed(seed)
    noise = torch.randn(sample.u.shape, generator=generator, device=u.device, dtype=u.dtype)
    u = sample.dequantised(generator)
    levels = (torch.full((len(u),), k, device=u.device) for k in range(len(sigmas)))
    return [float(dsm_errors(energy_and_score, u, k, noise, sigmas, sample.mask).mean()) for k in levels]


def _check(network: nn.Module, sample: Sample, sigmas: Sequence[float], s: Settings, held_out: Sample | None) -> None:
    u, descending = sample.u, np.asarray(sigmas, dtype=float)
    if u.ndim != 2 or len(u) == 0 or u.shape[1] != network.input_dim:
        raise ValueError(f"expected events of shape (n, {network.input_dim}) with n > 0, given {tuple(u.shape)}")
    for name in ("mask", "width"):
        t = getattr(sample, name)
        if t is not None and t.shape != u.shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {tuple(u.shape)} as the events")
    if not torch.isfinite(u).all():
        bad = int((~torch.isfinite(u)).any(1).sum())
        raise ValueError(f"{bad} of {len(u)} events have a feature that is not finite")
    if sample.mask is not None and not sample.mask.any():
        raise ValueError(f"the mask leaves no feature of the {len(u)} events to learn from")
    if len(sigmas) != network.n_sigmas:
        raise ValueError(f"{len(sigmas)} noise levels given, the network has {network.n_sigmas}")
    if (descending <= 0).any() or (np.diff(descending) >= 0).any():
        raise ValueError(f"noise levels must be positive and descend, given {tuple(sigmas)}")
    if s.level_weights is not None and len(s.level_weights) != len(sigmas):
        raise ValueError(f"{len(s.level_weights)} level weights given, the network has {len(sigmas)} levels")
    if s.patience and held_out is None:
        raise ValueError("patience needs held-out events: give validation")


def _progress(show: bool | None):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    show = sys.stderr.isatty() if show is None else show
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[loss]}"))
    return Progress(*columns, console=Console(stderr=True), disable=not show)
