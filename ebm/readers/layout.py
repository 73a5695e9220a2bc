"""What the columns of a table mean: known layouts, and how the columns of any other are recognised."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebm import hep64, higgsml, lhco
from ebm.events import MAX_FEATURES, DataError, Events, Schema

if TYPE_CHECKING:
    from ebm.readers import Options

KNOWN = (higgsml.SCHEMA, lhco.SIGNAL_REGION, lhco.FEATURES, hep64.SCHEMA)
# In lower case, and without the path of a branch: a column that is not recognised would be trained on.
_LABELS = ("label", "is_signal", "issignal", "signal", "target", "y")
_WEIGHTS = ("weight", "weights", "eventweight", "event_weight", "genweight", "mcweight")
_RUN = ("run", "runnum", "runnumber", "run_number")
_LUMI = ("luminosityblock", "lumiblocknum", "lumi", "lumiblock", "lumi_block")
_EVENT = ("event", "evt", "evtnum", "eventnumber", "event_number", "eventid", "event_id")
_CLASSES = (("0", "1"), ("0.0", "1.0"), ("b", "s"), ("background", "signal"), ("False", "True"))


class Table:
    """Columns of one file. A format gives `names`, `text` (those of them that hold text) and `read`; `uneven` names
    what has no single value per event."""

    word = "column"
    names: Sequence[str]
    text: frozenset[str] = frozenset()
    uneven: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, names: Sequence[str], strings: frozenset[str], step: str | int) -> Iterator[dict[str, np.ndarray]]:
        """Pieces of these columns, (n,) each: text as str, and those in `strings` too, numbers as float64."""
        raise NotImplementedError

    def fault(self, row: int, name: str, wanted: str, given: object) -> DataError:
        """The error for a value, by the place that the user can find."""
        return DataError(f"{self.path}, entry {row}, {self.word} {name}: expected {wanted}, given {given!r}")

    def place(self, row: int) -> str:
        return f"entry {row}"


class TableReader:
    """The events of a table."""

    era = None

    def __init__(self, table: Table, options: Options) -> None:
        self.table, self.path, names = table, table.path, list(table.names)
        self._require(names, options.features or ())
        known = next((k for k in KNOWN if set(k.features) <= set(names)), None)
        if not known and not options.features:
            self._refuse_part_of_a_layout(names)

        plain = {n.rpartition(".")[2].lower(): n for n in reversed(names) if n not in (options.features or ())}

        def first(candidates: Sequence[str]) -> str | None:
            return next((plain[c] for c in candidates if c in plain), None)

        label, _, self.signal = (options.label or "").partition("=")
        self.guessed = options.label is None and not known
        if options.label is None:  # y may be a coordinate: it is a label beside x0, x1, ... alone
            label = first(_LABELS if "x0" in names else _LABELS[:-1]) or ""
        weight = first(_WEIGHTS) if options.weight is None else options.weight
        self._require(names, [c for c in (label, weight) if c])
        if weight in table.text:
            raise DataError(f"{self.path}, {table.word} {weight}: expected weights, given text")
        event = first(_EVENT)
        ids = [c for c in (first(_RUN), first(_LUMI), event) if c] if event else []
        process = "process" if "process" in table.text else None
        self.roles = {r: c for r, c in (("label", label), ("weight", weight), ("process", process)) if c}
        self.ids = ids
        self.columns = self.roles | ({"id": ":".join(ids)} if ids else {})
        self.schema = self._schema(names, known, options)
        self.layout = known.name if known and set(self.schema.features) <= set(known.features) else "table"

    def _schema(self, names: list[str], known: Schema | None, options: Options) -> Schema:
        used = {*self.roles.values(), *self.ids}
        if options.features:
            features = tuple(options.features)
        elif known:
            features = known.features
        else:
            text = [n for n in names if n in self.table.text and n not in used]
            for left, why in ((text, "text"), (self.table.uneven, "more or less than one value per event")):
                if left:
                    _notice(f"{self.path}: left aside, for they hold {why}: {_list(left)}")
            features = tuple(n for n in names if n not in used and n not in self.table.text)
        if clash := [f for f in features if f in used or f in self.table.text]:
            what = "holds text" if clash[0] in self.table.text else "is a label, a weight or an event number"
            raise DataError(f"{self.path}, {self.table.word} {clash[0]}: expected a feature, but it {what}")
        if not 1 <= len(features) <= MAX_FEATURES:
            raise DataError(f"{self.path}: {len(features)} {self.table.word}s of numbers, expected 1 to {MAX_FEATURES} "
                            "features: choose some with the option 'features'")
        if known and set(features) <= set(known.features):
            order = [known.features.index(f) for f in features]
            optional = known.optional and tuple(known.optional[j] for j in order)
            schema = Schema(known.name, features, tuple(known.units[j] for j in order), known.missing_marker, optional)
        else:
            schema = Schema("table", features, ("",) * len(features))
        return schema if options.missing is None else replace(schema, missing_marker=options.missing)

    def pieces(self, step: str | int) -> Iterator[Events]:
        strings = {c for role, c in self.roles.items() if role != "weight"} | set(self.ids)
        numbers = [*self.schema.features, *(c for role, c in self.roles.items() if role == "weight")]
        first = 0
        for piece in self.table.read([*numbers, *strings], frozenset(strings), step):
            events = self._events(piece, first)
            first += len(events)
            if len(events):
                yield events
        if first == 0:
            raise DataError(f"{self.path}: no events")

    def _events(self, piece: dict[str, np.ndarray], first: int) -> Events:
        n = len(next(iter(piece.values())))

        def refuse(rows: np.ndarray, name: str, wanted: str) -> None:
            if rows.any():
                row = int(np.flatnonzero(rows)[0])
                raise self.table.fault(first + row, name, wanted, piece[name][row].item())

        x = np.empty((n, self.schema.n_features), np.float32)
        with np.errstate(over="ignore"):
            for j, name in enumerate(self.schema.features):
                x[:, j] = piece[name]
                refuse(np.isinf(x[:, j]), name, "a finite number (within float32)")
        if self.schema.missing_marker is not None:
            x[x == np.float32(self.schema.missing_marker)] = np.nan

        event_id = (first + np.arange(n)).astype(str)
        for name in self.ids:
            refuse(piece[name] == "", name, "an event number" if name == self.ids[-1] else "a number")
        if self.ids:
            event_id = np.array([":".join(numbers) for numbers in zip(*(piece[name] for name in self.ids))], dtype=str)

        label = None
        if column := self.roles.get("label"):
            given = piece[column]
            if self.signal:
                refuse(given == "", column, f"a class, of which {self.signal} is signal")
                label = (given == self.signal).astype(np.int8)
            else:
                classes = max(_CLASSES, key=lambda pair: np.isin(given, pair).sum())
                hint = " (a label; the option 'label=' takes it for a feature)" if self.guessed else ""
                refuse(~np.isin(given, classes), column, f"{classes[1]} or {classes[0]}{hint}")
                label = (given == classes[1]).astype(np.int8)
        weight = piece.get(self.roles.get("weight"))
        if weight is not None:
            refuse(~np.isfinite(weight), self.roles["weight"], "a finite number")
        process = piece.get(self.roles.get("process"))
        return Events(self.schema, x, event_id, label, weight, process, str(self.path), has_id=bool(self.ids))

    def check(self, events: Events) -> None:
        """DataError where a lone event number is there twice. Run and event of simulation start again in every
        sample, so that they may."""
        if len(self.ids) != 1:
            return
        _, first, inverse = np.unique(events.event_id, return_index=True, return_inverse=True)
        repeated = np.flatnonzero(first[inverse] != np.arange(len(events)))
        if len(repeated):
            row, earlier = int(repeated[0]), int(first[inverse][repeated[0]])
            wanted = f"a number that no other event has ({self.table.place(earlier)} has it)"
            raise self.table.fault(row, self.ids[0], wanted, str(events.event_id[row]))

    def _require(self, names: list[str], wanted: Sequence[str]) -> None:
        missing = [c for c in wanted if c not in names]
        if missing:
            raise DataError(f"{self.path}: no {self.table.word} {_list(missing)}, it has {_list(names)}")

    def _refuse_part_of_a_layout(self, names: list[str]) -> None:
        for schema in KNOWN:
            missing = [f for f in schema.features if f not in names]
            if 2 * len(missing) < schema.n_features:
                raise DataError(f"{self.path}: expected the {schema.n_features} features of {schema.name}, missing "
                                f"{_list(missing)}; to do without, choose some with the option 'features'")


def as_strings(values: np.ndarray) -> np.ndarray:
    """Text of event numbers and labels: integers without a decimal point, NaN as an empty field."""
    if values.dtype.kind == "f":
        return np.array(["" if np.isnan(v) else re.sub(r"\.0$", "", repr(float(v))) for v in values], dtype=str)
    if values.dtype.kind in "SO":
        return np.array([v.decode() if isinstance(v, bytes) else "" if v is None else str(v) for v in values], str)
    return values.astype(str)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _notice(text: str) -> None:
    import warnings

    warnings.warn(text, stacklevel=6)
