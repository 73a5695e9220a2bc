"""Events and the schema that says what their columns are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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

    Weights keep their sign: sums of them, negative ones among them, are what estimates a yield at next-to-leading
    order. Training takes every event once and no weight, so that a negative one can neither turn the loss round
    nor cost events (others train on absolute weights, or drop the negative ones; both change what is learned).
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


def is_toy(source: str | Path) -> bool:
    return isinstance(source, str) and (source == "toy" or source.startswith("toy:"))


def load_events(source: str | Path, **options: object) -> Events:
    """All events of `source` in memory.

    "toy" is 200,000 background and 4,000 signal events; "toy:N" has N background events and N // 50 signal
    events. Anything else is a path, or a pattern with * that names several files of one kind: ROOT (NanoAOD
    becomes `hep64-v1`; other trees give their flat branches), .csv, .csv.gz, .parquet, .h5, .hdf5, .npy, .npz.
    The file "./toy" is a path. `ebm.readers.Options` lists the options; they can be written behind the path
    too, as in "flat.root?tree=events&features=pt1,pt2&label=class=h". Anything that cannot be read raises DataError.

    Where the layout is known (HiggsML, LHCO, hep64-v1) the columns are recognised; else every column of numbers
    is a feature, up to 256, but for those that are named like a label, a weight or an event number.
    """
    if is_toy(source):
        from ebm.toy import toy

        number = source.removeprefix("toy").removeprefix(":") or ("200000" if source == "toy" else "")
        if options or not (number.isascii() and number.isdigit() and int(number) > 0):
            raise DataError(f"{source!r}: expected toy or toy:N with N background events, a positive whole number")
        return toy(n_background=int(number), n_signal=int(number) // 50, seed=0)
    from ebm.readers import load

    return load(source, **options)


def iterate(source: str | Path, step: str | int = "100 MB", **options: object) -> Iterator[Events]:
    """The events of `source`, in order and in pieces, so that a file larger than memory can be read.

    `step` is the most that is read at once, as memory ("100 MB") or as a number of events. The options and the
    errors are those of `load_events`; the pieces have no digest, and what only the whole file can tell (an event
    number that is there twice, weights that sum to zero) is not checked.
    """
    from ebm.readers import iterate as pieces
    from ebm.readers import rows_of

    if is_toy(source):
        events = load_events(source, **options)
        rows = rows_of(step, events.x[0].nbytes)
        yield from (events[i : i + rows] for i in range(0, len(events), rows))
    else:
        yield from pieces(source, step, **options)


def concatenate(parts: Sequence[Events]) -> Events:
    """The events of all parts, one after the other; what one part has not (labels, say) the result has not.

    Raises DataError where the schemas differ.
    """
    first = parts[0]
    for part in parts[1:]:
        check_schema(first.schema, part.schema, first.source, part.source)

    def joined(name: str) -> np.ndarray | None:
        columns = [getattr(part, name) for part in parts]
        return None if any(column is None for column in columns) else np.concatenate(columns)

    return replace(first, has_id=all(part.has_id for part in parts),
                   **{name: joined(name) for name in ("x", "event_id", "label", "weight", "process")})


def check_schema(model: Schema, data: Schema, model_name: str | Path, data_name: str | Path) -> None:
    """DataError unless the data have the features that the model was trained on, in its order and from its b-tagger."""
    if (model.name, model.features, model.missing_marker) == (data.name, data.features, data.missing_marker):
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
