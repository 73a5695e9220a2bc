"""Train, calibrate and test events never mix: events are known again by their ids, in whatever file they come."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ebm.bundle import Bundle
from ebm.events import DataError, Events, split
from ebm.threshold import calibrate, calibrate_by

SHARES = (0.001, 0.01, 0.02, 0.05, *(i / 10 for i in range(1, 10)), 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999)
_KEPT = 1024  # hashes in a fingerprint: 11 kB of text


def fingerprint(events: Events) -> str:
    """The 1,024 smallest 64-bit hashes of the event ids, in base64: enough to know a sample again.

    n events of a fingerprint's N are found with probability 1 - exp(-1024 n / N): surely from N / 100 on.
    """
    return base64.b64encode(np.unique(_hashes(events))[:_KEPT].tobytes()).decode()


def shared(known: str, events: Events) -> int:
    """How many hashes of a fingerprint belong to `events`; 0 where they have none in common."""
    return int(np.isin(np.frombuffer(base64.b64decode(known), "<u8"), _hashes(events)).sum())


def check_apart(**parts: Events) -> None:
    """DataError where an event, by its id (by its row where the file has none), is in two of the named parts."""
    for (a, first), (b, second) in itertools.combinations(parts.items(), 2):
        both = np.isin(_hashes(first), _hashes(second))
        if both.any():
            raise DataError(f"{np.count_nonzero(both)} events are in both {a} and {b}, such as event "
                            f"{first.event_id[both.argmax()]}: expected parts without common events")


def trained_on(bundle: Bundle, events: Events) -> bool:
    """Whether these data hold events that the model was trained or calibrated on, as far as it knows.

    Toy samples of other sizes share events with the one trained on, under the same ids and so the same folds.
    """
    calibration = bundle.provenance.get("calibration", {})
    return _holds(bundle.provenance, events) or _holds(calibration, events)


def quantiles(energies: np.ndarray, weights: np.ndarray | None = None) -> tuple[tuple[float, float], ...]:
    """(share, energy): the part `share` of background energies (n,) is at most `energy`, for those of SHARES that n
    events resolve, one or more on either side. With weights (n,), some of which may be negative, it is their sum."""
    order = np.argsort(energies)
    sums = np.maximum.accumulate(np.cumsum(np.ones(len(order)) if weights is None else weights[order]))
    resolved = [q for q in SHARES if min(q, 1 - q) * len(order) >= 1]
    rows = order[np.searchsorted(sums, np.multiply(resolved, sums[-1]) * (1 - 1e-12))]
    return tuple(zip(resolved, (float(e) for e in energies[rows]), strict=True))


def recalibrate(bundle: Bundle, events: Events, energies: Callable[[np.ndarray], np.ndarray], *, rate: float = 1e-4,
                confidence: float = 0.95, by: str | None = None, weighted: bool = False, backend: str = "") -> Bundle:
    """The bundle with a new threshold, of the background of `events`, and with one for each class `by` a multiplicity;
    and with the quantiles of that background's energies.

    `energies(x)` gives the energies (n,) of raw events (n, D) at the default level: of the backend that will score.
    Of data that the model was trained on the calibration folds count, of others all but the test folds, which
    'evaluate' then keeps to. Raises DataError without background there, ValueError for what is no feature.
    """
    name, folds = events.source or "the data", split(events)
    if by is not None and by not in events.schema.features:
        raise ValueError(f"by is {by!r}, expected a feature of {events.schema.name}: "
                         f"{', '.join(events.schema.features)}")
    if weighted and events.weight is None:
        raise DataError(f"{name}: no weights to calibrate with")
    kept = events[folds.calibrate if _holds(bundle.provenance, events) else ~folds.test].background()
    if len(kept) == 0:
        raise DataError(f"{name}: no background event in the calibration folds ({len(events)} events in all)")
    energy, level = np.asarray(energies(kept.x)), bundle.default_level
    weights = kept.weight if weighted else None
    threshold = calibrate(energy, rate, confidence, weights, level=level)
    classes = by and calibrate_by(by, kept.x[:, events.schema.features.index(by)], energy, rate, confidence, level,
                                  weights=weights)
    calibration = {"source": Path(name).name, "data_digest": events.digest, "background_events": len(kept),
                   "fingerprint": fingerprint(kept), "backend": backend}
    return replace(bundle, threshold=threshold, class_thresholds=classes, quantiles=quantiles(energy, weights),
                   provenance=bundle.provenance | {"calibration": calibration})


def _holds(used: dict, events: Events) -> bool:
    toy = str(used.get("source", "")).startswith("toy") and events.source.startswith("toy")
    return toy or (bool(events.digest) and used.get("data_digest") == events.digest) or (
        "fingerprint" in used and shared(used["fingerprint"], events) > 0)


def _hashes(events: Events) -> np.ndarray:
    """(n,) the numbers that `ebm.events.fold` takes modulo 10."""
    if events.has_id:
        keys = (str(event_id).encode() for event_id in events.event_id)
    else:
        rows = np.where(np.isnan(events.x), np.float32(np.nan), events.x).astype("<f4")
        keys = (row.tobytes() for row in rows)
    return np.frombuffer(b"".join(hashlib.blake2b(key).digest()[:8] for key in keys), "<u8")
