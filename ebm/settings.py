"""How a network is trained: every number of the recipe, and its default, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

EPOCHS, FEWEST_STEPS, MOST_STEPS = 100, 2000, 6000  # of a training whose steps are not given


@dataclass(frozen=True)
class Settings:
    """The loss is dsm L_DSM + multi_scale sum_i v_i L_DSM(sigma_i) + l2 |theta|^2; a term with weight 0 is off.

    L_DSM is the mean over levels that are drawn at random, v = `level_weights` (None: 1 / L each, with which the second
    term only repeats the first; other v favour some scales over others).
    """

    steps: int | None = None  # None: `EPOCHS` epochs, but at least FEWEST_STEPS and at most MOST_STEPS
    batch_size: int = 256  # of fewer events each is taken several times, with different noise
    lr: float = 1e-3  # Adam's
    warmup: int = 100  # steps over which the rate rises, a fifth of all at most; then it falls to 0 along a cosine
    ema: float = 0.999  # decay of the average that the weights end as
    dsm: float = 1.0
    multi_scale: float = 0.0
    level_weights: tuple[float, ...] | None = None
    l2: float = 0.0
    patience: int | None = None  # stop after so many steps without a better held-out loss, and go back to the best
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("patience", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value!r}, expected a whole number from {least}")
        for name in ("lr", "ema", "dsm", "multi_scale", "l2", "level_weights"):
            value = getattr(self, name)
            given = () if value is None else value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(v) and v >= 0 for v in given):
                raise ValueError(f"{name} is {value!r}, expected finite numbers from 0")
        if self.ema >= 1 or self.lr == 0:
            raise ValueError(f"expected lr above 0 and ema below 1, given {self.lr!r} and {self.ema!r}")
        if not self.dsm and not self.multi_scale:
            raise ValueError("dsm and multi_scale are both 0: no term of the loss would learn from events")

    def steps_for(self, n: int) -> int:
        """Steps of a training on n events."""
        if self.steps is not None:
            return self.steps
        return min(max(EPOCHS * n // self.batch_size, FEWEST_STEPS), MOST_STEPS)

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of one of `steps` steps, counted from 1."""
        rise = min(1.0, step / min(self.warmup, steps / 5)) if self.warmup else 1.0
        return self.lr * rise * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
