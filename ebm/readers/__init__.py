"""Events from files: every format as columns, what the columns mean, and the pieces in which they are read."""

from __future__ import annotations

import glob
import hashlib
import importlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ebm.events import DataError, Events, Schema, concatenate

FORMATS = ".root, .csv, .csv.gz, .parquet, .h5, .hdf5, .npy or .npz"


@dataclass(frozen=True)
class Options:
    """What a file does not say of itself. As text behind a path: lists with commas, an empty value for "none".

    features  the columns that are features, in this order (default: those of a known layout, else all numbers)
    label     the column of labels; "class=h" for those where the value h is signal. "" for none
    weight    the column of event weights; "" for none
    tree      ROOT tree, or HDF5 group or dataset, where there are several
    missing   the number that stands for a missing value
    era       of NanoAOD simulation: UL2018, 2022EE, ... (see `ebm.readers.eras`), or tagger and medium working
              point, "PNetB:0.245". Data are recognised by their run numbers
    """

    features: Sequence[str] | str | None = None
    label: str | None = None
    weight: str | None = None
    tree: str | None = None
    missing: float | None = None
    era: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.features, str):
            object.__setattr__(self, "features", self.features.split(","))
        if self.missing is not None:
            try:
                object.__setattr__(self, "missing", float(self.missing))
            except ValueError:
                raise DataError(f"missing={self.missing!r}: expected the number that marks a missing value") from None


class Reader(Protocol):
    """An open file: what is known of it before its events are read, and the events."""

    path: Path
    layout: str
    schema: Schema
    era: str | None
    columns: dict[str, str]

    def pieces(self, step: str | int) -> Iterator[Events]: ...
    def check(self, events: Events) -> None: ...


def readers(source: str | Path, **options: object) -> Iterator[Reader]:
    """A reader of each file that `source` names, opened when it is asked for; DataError where one cannot be read, or
    is not of one data set with the first."""
    first = None
    for path, chosen in _files(source, options):
        reader = _open(path, chosen)
        first = first or reader
        if reader.layout != first.layout or reader.schema != first.schema or reader.era != first.era:
            raise DataError(f"{path}: {_unlike(reader, first)}: they are not one data set")
        yield reader


def _files(source: str | Path, options: dict) -> list[tuple[Path, Options]]:
    path, names = Path(source), sorted(f.name for f in fields(Options))
    if "?" in str(source) and not path.exists():
        text, _, query = str(source).partition("?")
        path, options = Path(text), options | dict(o.partition("=")[::2] for o in query.split("&"))
    if foreign := sorted(options.keys() - set(names)):
        raise DataError(f"{path}: no option {', '.join(map(repr, foreign))}, expected {', '.join(names)}")
    paths = [path]
    if not path.exists() and glob.has_magic(str(path)):
        paths = [Path(name) for name in sorted(glob.glob(str(path)))]
        if not paths:
            raise DataError(f"{path}: no file has such a name")
    return [(p, Options(**options)) for p in paths]


def _unlike(reader: Reader, first: Reader) -> str:
    if reader.era != first.era:
        return f"era {reader.era}, while {first.path} has {first.era}"
    here, there = set(reader.schema.features), set(first.schema.features)
    if here == there:
        return f"schema {reader.schema.name}, while {first.path} has {first.schema.name}, or another order of features"
    return (f"features {', '.join(sorted(here - there)) or 'none more'}, while {first.path} has "
            f"{', '.join(sorted(there - here)) or 'none more'}")


def iterate(source: str | Path, step: str | int, **options: object) -> Iterator[Events]:
    """See `ebm.events.iterate`."""
    rows_of(step, 1)
    first = 0
    for reader in readers(source, **options):
        for events in reader.pieces(step):
            if not events.has_id:  # rows count on through all files
                events = replace(events, event_id=(first + np.arange(len(events))).astype(str))
            first += len(events)
            yield events


def load(source: str | Path, **options: object) -> Events:
    """See `ebm.events.load_events`."""
    first, parts, digests = None, [], []
    for reader in readers(source, **options):
        first = first or reader
        parts += reader.pieces("100 MB")
        with open(reader.path, "rb") as f:
            digests.append(hashlib.file_digest(f, "sha256").hexdigest())
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    events = replace(concatenate(parts), source=str(source), digest=digest[:16])
    if len(digests) == 1:
        first.check(events)
    if not events.has_id:
        events = replace(events, event_id=np.arange(len(events)).astype(str))
    weight = events.weight
    if weight is not None and not weight.sum() > 0:
        raise DataError(f"{source}, column {first.columns['weight']}: the weights of the {len(events)} events sum "
                        f"to {weight.sum():g}, expected a positive sum; an empty 'weight' option leaves them out")
    optional = events.schema.optional or (False,) * events.schema.n_features
    empty = [name for name, may, values in zip(events.schema.features, optional, events.x.T)
             if not may and np.isnan(values).all()]
    if empty:
        warnings.warn(f"{source}: no event has a value in column {', '.join(empty)}", stacklevel=3)
    return events


def rows_of(step: str | int, row_bytes: int) -> int:
    """Events that `step` allows at once where one takes `row_bytes`."""
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
    if isinstance(step, int) and step > 0:
        return step
    number, _, unit = str(step).partition(" ")
    if isinstance(step, str) and unit in units and number.replace(".", "", 1).isdigit() and float(number) > 0:
        return max(1, int(float(number) * units[unit] / row_bytes))
    raise DataError(f"step {step!r}: expected a number of events, or memory such as '100 MB' (kB, MB, GB)")


def _open(path: Path, options: Options) -> Reader:
    if path.is_dir():
        raise DataError(f"{path}: expected a file, given a directory")
    name = path.name.lower()
    try:
        with open(path, "rb") as f:
            if not f.read(1):
                raise DataError(f"{path}: the file is empty")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    needed = ("uproot", "awkward", "vector") if name.endswith(".root") else ("h5py",) * name.endswith((".h5", ".hdf5"))
    for package in needed:
        try:
            importlib.import_module(package)
        except ImportError:
            raise RuntimeError(f"{path}: files {path.suffix} need {package}: pip install 'fused-ebm[hep]'") from None
    if name.endswith(".root"):
        from ebm.readers.root import open_tree

        return open_tree(path, options)
    from ebm.readers.layout import TableReader

    if name.endswith((".csv", ".csv.gz")):
        from ebm.readers.text import Csv as Table
    elif name.endswith((".parquet", ".h5", ".hdf5", ".npy", ".npz")):
        from ebm.readers.arrays import open_table as Table
    else:
        kind = f"files {path.suffix!r}" if path.suffix else "files without a suffix"
        raise DataError(f"{path}: {kind} are not supported, expected {FORMATS}, or toy")
    return TableReader(Table(path, options.tree), options)
