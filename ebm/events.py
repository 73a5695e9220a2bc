"""Events and the schema that says what their columns are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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

    `event_id` (n,) strings: run:lumi:event, the file's id, or, with `has_id` false, the row number.
    `label` (n,) int8, 1 for signal, and `weight` (n,) float64 are for evaluation only and None where the
    file has none. `process` (n,) strings names the generator's process where it is known.
    """

    schema: Schema
    x: np.ndarray
    event_id: np.ndarray
    label: np.ndarray | None = None
    weight: np.ndarray | None = None
    process: np.ndarray | None = None
    source: str = ""
    digest: str = ""
    has_id: bool = True

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: np.ndarray | slice) -> Events:
        def take(a: np.ndarray | None) -> np.ndarray | None:
            return None if a is None else a[rows]

        return Events(
            self.schema, self.x[rows], self.event_id[rows], take(self.label), take(self.weight),
            take(self.process), self.source, self.digest, self.has_id,
        )

    def background(self) -> Events:
        """The background events: all of them where there are no labels."""
        return self if self.label is None else self[self.label == 0]


class Split(NamedTuple):
    """Three (n,) boolean masks that share no event; each event is in one of them."""

    train: np.ndarray
    calibrate: np.ndarray
    test: np.ndarray


def load_events(source: str | Path) -> Events:
    """Events of `source`: the path of a HiggsML file (.csv, .csv.gz), "toy" or "toy:N".

    "toy" is 200,000 background and 4,000 signal events; "toy:N" has N background events and N // 50
    signal events. The file "./toy" is a path. Anything that cannot be read raises DataError.
    """
    if isinstance(source, str) and (source == "toy" or source.startswith("toy:")):
        from ebm.toy import toy

        number = source.removeprefix("toy").removeprefix(":") or ("200000" if source == "toy" else "")
        if not (number.isascii() and number.isdigit() and int(number) > 0):
            raise DataError(f"{source!r}: expected toy or toy:N with N background events, a positive whole number")
        return toy(n_background=int(number), n_signal=int(number) // 50, seed=0)
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{path}: expected a file, given a directory")
    if not path.name.lower().endswith((".csv", ".csv.gz")):
        kind = f"files {path.suffix!r}" if path.suffix else "files without a suffix"
        raise DataError(f"{path}: {kind} are not supported, expected .csv or .csv.gz (HiggsML), or toy")
    from ebm import higgsml

    return higgsml.read(path)


def check_schema(model: Schema, data: Schema, model_name: str | Path, data_name: str | Path) -> None:
    """DataError unless the data have the features that the model was trained on, in its order."""
    if model.features == data.features and model.missing_marker == data.missing_marker:
        return
    different = next((f"; feature {j} is {a!r} in the model, {b!r} in the data" for j, (a, b) in
                      enumerate(zip(model.features, data.features, strict=False)) if a != b), "")
    raise DataError(f"{model_name} is a model of {model.name} events ({model.n_features} features, missing "
                    f"{model.missing_marker}), {data_name} has {data.name} events ({data.n_features} features, missing "
                    f"{data.missing_marker}){different}")


def fold(events: Events) -> np.ndarray:
    """The fold 0..9 of each event, (n,): a hash of its id, or of its float32 row where the file has no ids.

    It depends on nothing else, so that an event is in the same fold in every file and command.
    """
    if events.has_id:
        keys = (str(event_id).encode() for event_id in events.event_id)
    else:
        rows = np.where(np.isnan(events.x), np.float32(np.nan), events.x).astype("<f4")  # NaN has many bit patterns
        keys = (row.tobytes() for row in rows)
    heads = b"".join(hashlib.blake2b(key).digest()[:8] for key in keys)
    return (np.frombuffer(heads, "<u8") % 10).astype(np.int64)


def split(events: Events) -> Split:
    """Folds 0-5 train, 6-7 calibrate, 8-9 test."""
    number = fold(events)
    return Split(train=number < 6, calibrate=(number >= 6) & (number < 8), test=number >= 8)
