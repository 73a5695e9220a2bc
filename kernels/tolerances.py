"""How far a Scorer may be from the float64 truth: the one table, and the two errors that it bounds.

Both errors are taken over a fixed set of 4096 events (CHECK_EVENTS), where the truth is the energies and
scores of `reference` in float64 from the same float32 events.
"""

from __future__ import annotations

import numpy as np

CHECK_EVENTS = 4096

# Derived from the measured rounding of random networks, never loosened to make a test pass: PyTorch itself has 2e-7 to
# 5e-7 in fp32; int16 has up to 1.5e-4 and int8 up to 0.04 in the deepest, and what that does to the physics its report
# says. Trained networks may be steeper: see `tolerance_of_model`.
TOLERANCES = {"fp64": 1e-12, "fp32": 5e-6, "tf32x3": 5e-6, "tf32": 2e-3, "fp16": 2e-3, "bf16": 2e-2, "int16": 3e-4,
              "int8": 8e-2}


def tolerance_of_model(precision: str, reports: dict[str, dict]) -> float:
    """How far a Scorer of one model may be off: as `TOLERANCES` has it, or twice what the physics report says, up to
    twice that limit.

    How far integers are off depends on how steep the network is, whatever the kernel does; the report of this model
    (`Bundle.reports`) is what was accepted by whoever asks for the precision.
    """
    limit = TOLERANCES[precision]
    if (report := reports.get(precision)) is None:
        return limit
    reported = max(report["figures"][precision]["rms_energy"], report["rms_score"] or 0.0)
    return min(max(limit, 2 * reported), 2 * limit)


def relative_rms_energy(energy: np.ndarray, truth: np.ndarray, spread: float | None = None) -> float:
    """RMS error of the energies (n,) over the standard deviation of the true ones.

    `spread` is that deviation over the fixed events, where these are too few to have one.
    """
    scale = np.std(truth, dtype=np.float64) if spread is None else spread
    return _ratio(_rms(energy - truth.astype(np.float64)), float(scale))


def relative_rms_score(score: np.ndarray, truth: np.ndarray, spread: float | None = None) -> float:
    """RMS error of the scores (n, D) over the RMS of the true ones; `spread` as above."""
    return _ratio(_rms(score - truth.astype(np.float64)), _rms(truth.astype(np.float64)) if spread is None else spread)


def _rms(a: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a))))


def _ratio(error: float, scale: float) -> float:
    return 0.0 if error == 0 else error / scale if scale > 0 else float("inf")
