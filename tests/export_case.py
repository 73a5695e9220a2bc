"""A small model to export."""

from dataclasses import replace

from scorers import preprocessing

from ebm.bundle import Bundle, Threshold


def small(kind: str = "energy", threshold: float | None = 0.5) -> Bundle:
    bundle = Bundle.random(6, 32, 2, kind=kind, preprocessing=preprocessing(6))
    t = None if threshold is None else Threshold(threshold, 0.01, 0.95, 1, 100, 0.01, True, bundle.default_level)
    return replace(bundle, threshold=t)
