"""How to compute E(x) and its score fast: one interface, several backends.

    from kernels import load_scorer
    scorer = load_scorer("models/demo")
    energy, score = scorer.energy_and_score(events)
"""

from kernels.registry import BACKENDS, Backend, load_scorer
from kernels.scorer import Scorer

__all__ = ["BACKENDS", "Backend", "Scorer", "load_scorer"]
