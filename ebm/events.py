"""Events and the schema that says what their columns are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_FEATURES = 256


class DataError(ValueError):
    """An input that cannot be used; the message names the file, the line or feature, and what was expected."""


@dataclass(frozen=True)
class Schema:
    """Names and units of the D features of an event, in column order.

    `missing_marker` is the number that the format writes for a missing value (HiggsML: -999).
    `optional[j]` says that feature j may be absent from an event by the nature of the schema.
    """

    name: str
    features: tuple[str, ...]
    units: tuple[str, ...]
    missing_marker: float | None = None
    optional: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        n = len(self.features)
        if not 1 <= n <= MAX_FEATURES:
            raise DataError(f"schema {self.name!r} has {n} features, expected 1 to {MAX_FEATURES}")
        if len(set(self.features)) != n:
            repeated = sorted({f for f in self.features if self.features.count(f) > 1})
            raise DataError(f"schema {self.name!r} names a feature twice: {', '.join(repeated)}")
        if len(self.units) != n or (self.optional is not None and len(self.optional) != n):
            raise DataError(f"schema {self.name!r}: one unit and one optional flag per feature, {n} expected")

    @property
    def n_features(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Events:
    """Events in memory. `x` (n, D) float32 in the schema's units, NaN where a value is missing.

    `event_id` (n,) strings: run:lumi:event, the file's id, or the row number. `label` (n,) int8, 1 for
    signal, and `weight` (n,) float64 are for evaluation only and None where the file has none.
    `process` (n,) strings names the generator's process where it is known.
    """

    schema: Schema
    x: np.ndarray
    event_id: np.ndarray
    label: np.ndarray | None = None
    weight: np.ndarray | None = None
    process: np.ndarray | None = None
    source: str = ""
    digest: str = ""

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: np.ndarray | slice) -> Events:
        def take(a: np.ndarray | None) -> np.ndarray | None:
            return None if a is None else a[rows]

        return Events(
            self.schema, self.x[rows], self.event_id[rows], take(self.label), take(self.weight),
            take(self.process), self.source, self.digest,
        )

    def background(self) -> Events:
        """The background events: all of them where there are no labels."""
        return self if self.label is None else self[self.label == 0]
