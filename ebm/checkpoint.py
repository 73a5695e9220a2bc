"""What changes while a network trains, and how it is kept on disk: a killed training goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ebm.command import whole_file
from ebm.events import DataError


@dataclass
class History:
    """What a training run left behind; losses are per event, summed over features (D means: learned nothing)."""

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)  # mean since the entry before
    terms: dict[str, list[float]] = field(default_factory=dict)  # with their weights: train_loss is their sum
    held_out_loss: list[float] = field(default_factory=list)  # of the averaged weights, at the same steps
    held_out_per_level: list[float] = field(default_factory=list)  # of the weights that were kept, (L,)
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of all threads of the process


class Run:
    """A training in progress: weights, their average, Adam's moments, random numbers, the place in the epoch."""

    def __init__(self, parameters: Sequence[Tensor], seed: int, device: torch.device):
        self.parameters = list(parameters)
        self.average = [p.detach().clone() for p in self.parameters]
        self.best: list[Tensor] = []  # the average with the lowest held-out loss, where early stopping asks for it
        self.optimizer = torch.optim.Adam(self.parameters, fused=True)
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long, device=device)
        self.position = self.step = 0
        self.history = History()

    def rows(self, n: int, size: int) -> Tensor:
        """The next batch: every event once per epoch, but for an incomplete last batch; of few events, each equally
        often (give or take one)."""
        if self.position + size > len(self.order):
            repeats = -(-size // n)
            self.order = torch.randperm(repeats * n, generator=self.generator, device=self.generator.device) % n
            self.position = 0
        self.position += size
        return self.order[self.position - size : self.position]

    def update(self, loss: Tensor, lr: float, ema: float) -> None:
        """One step of Adam, and of the average: it forgets its random start quickly, then decays as asked for."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        decay = min(ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def record(self, terms: dict[str, float]) -> None:
        """The mean of each term since the record before; RuntimeError where their sum is no number."""
        loss = sum(terms.values())
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} at step {self.step}: the training diverged; lower the learning "
                               "rate or look at the ranges of the features")
        self.history.steps.append(self.step)
        self.history.train_loss.append(loss)
        for name, value in terms.items():
            self.history.terms.setdefault(name, []).append(value)

    def compare(self, per_level: list[float], patience: int | None) -> None:
        """Record the held-out losses (L,) of the average; with patience keep the average that has the lowest mean."""
        losses = self.history.held_out_loss
        losses.append(sum(per_level) / len(per_level))
        if patience is None or losses[-1] <= min(losses):
            self.history.held_out_per_level = per_level
            self.best = [a.clone() for a in self.average] if patience else []

    def done(self, steps: int, patience: int | None) -> bool:
        """Whether the last step was made, or `patience` steps brought no better held-out loss."""
        losses = self.history.held_out_loss
        if not patience or not losses or self.step >= steps:
            return self.step >= steps
        return self.step - self.history.steps[losses.index(min(losses))] >= patience

    def finish(self) -> None:
        """Make the parameters the average, or the best one."""
        _copy(self.best or self.average, self.parameters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the parameters are their average."""
        kept = [p.detach().clone() for p in self.parameters]
        _copy(self.average, self.parameters)
        try:
            yield
        finally:
            _copy(kept, self.parameters)

    def write(self, path: Path, about: dict) -> None:
        """Replace the checkpoint, whole or not at all; `about` says which training it is of."""
        from safetensors.torch import save

        tensors = {"order": self.order, "generator": self.generator.get_state()}
        for i, p in enumerate(self.parameters):
            tensors |= {f"weight.{i}": p.detach(), f"average.{i}": self.average[i]}
            tensors |= {f"best.{i}": self.best[i]} if self.best else {}
            tensors |= {f"{name}.{i}": t for name, t in self.optimizer.state.get(p, {}).items()}
        description = {"about": about, "step": self.step, "position": self.position, "history": asdict(self.history)}
        with whole_file(path) as f:
            f.write(save({name: t.contiguous() for name, t in tensors.items()}, {"training": json.dumps(description)}))

    def read(self, path: Path, about: dict) -> None:
        """Go on where `write` left off; DataError where the file is damaged or of another training."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as f:
                tensors, d = {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["training"])  # noqa: SIM118
            about = json.loads(json.dumps(about))  # with lists for tuples, as in the file
            if other := [name for name in about if d["about"].get(name) != about[name]]:
                differences = (f"{name} {d['about'].get(name)} there, {about[name]} here" for name in other)
                raise DataError(f"{path}: a checkpoint of another training: {'; '.join(differences)}")
            device = self.order.device
            self.step, self.position, self.history = d["step"], d["position"], History(**d["history"])
            self.order = tensors.pop("order").to(device)
            self.generator.set_state(tensors.pop("generator"))
            stored: list[dict[str, Tensor]] = [{} for _ in self.parameters]
            for name, t in tensors.items():
                stem, _, i = name.rpartition(".")
                stored[int(i)][stem] = t.to(device)
            _copy([s.pop("weight") for s in stored], self.parameters)
            self.average = [s.pop("average") for s in stored]
            self.best = [s.pop("best") for s in stored if "best" in s]
        except (SafetensorError, KeyError, TypeError, AttributeError) as e:
            raise DataError(f"{path}: not a checkpoint of a training, or a damaged one ({e})") from None
        for p, moments in zip(self.parameters, stored, strict=True):
            if moments:
                self.optimizer.state[p] = moments


def digest(tensors: Sequence[Tensor | None]) -> str:
    """SHA-256 over shapes and bytes, shortened: tells the data of one training from another's."""
    h = hashlib.sha256()
    for t in tensors:
        h.update(b"-" if t is None else str(tuple(t.shape)).encode() + t.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for s, t in zip(source, target, strict=True):
        t.copy_(s)
