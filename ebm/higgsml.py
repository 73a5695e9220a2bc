"""Reader of the HiggsML files (ATLAS, 2014): the Kaggle layout and the CERN Open Data layout, .csv or .csv.gz."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ebm.events import DataError, Events, Schema

_FEATURES = (  # name, unit, may be missing (-999)
    ("DER_mass_MMC", "GeV", True), ("DER_mass_transverse_met_lep", "GeV", False), ("DER_mass_vis", "GeV", False),
    ("DER_pt_h", "GeV", False), ("DER_deltaeta_jet_jet", "", True), ("DER_mass_jet_jet", "GeV", True),
    ("DER_prodeta_jet_jet", "", True), ("DER_deltar_tau_lep", "", False), ("DER_pt_tot", "GeV", False),
    ("DER_sum_pt", "GeV", False), ("DER_pt_ratio_lep_tau", "", False), ("DER_met_phi_centrality", "", False),
    ("DER_lep_eta_centrality", "", True), ("PRI_tau_pt", "GeV", False), ("PRI_tau_eta", "", False),
    ("PRI_tau_phi", "rad", False), ("PRI_lep_pt", "GeV", False), ("PRI_lep_eta", "", False),
    ("PRI_lep_phi", "rad", False), ("PRI_met", "GeV", False), ("PRI_met_phi", "rad", False),
    ("PRI_met_sumet", "GeV", False), ("PRI_jet_num", "", False), ("PRI_jet_leading_pt", "GeV", True),
    ("PRI_jet_leading_eta", "", True), ("PRI_jet_leading_phi", "rad", True), ("PRI_jet_subleading_pt", "GeV", True),
    ("PRI_jet_subleading_eta", "", True), ("PRI_jet_subleading_phi", "rad", True), ("PRI_jet_all_pt", "GeV", False),
)  # fmt: skip
_NAMES, _UNITS, _OPTIONAL = zip(*_FEATURES)
SCHEMA = Schema("higgsml", _NAMES, _UNITS, missing_marker=-999.0, optional=_OPTIONAL)
_EMPTY = ("", "NA", "NaN", "nan")  # how other programs rewrite a missing value


def read(path: str | Path) -> Events:
    """All events of a HiggsML file: x (n, 30) float32, in the order of `SCHEMA` whatever the order in the file.

    -999 and an empty field are missing values (NaN). Label and Weight are read where the file has them;
    KaggleSet, KaggleWeight and unknown columns are left aside.
    """
    import pyarrow as pa
    import pyarrow.csv

    path = Path(path)
    raw = _read_bytes(path)
    text = _decompress(path, raw)
    header = _header(path, text)
    has_label, has_weight = "Label" in header, "Weight" in header
    numbers = [*SCHEMA.features, *(["Weight"] if has_weight else [])]
    types = {name: pa.float64() for name in numbers} | {"EventId": pa.string()} | (
        {"Label": pa.string()} if has_label else {})  # fmt: skip
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(text),
            read_options=pyarrow.csv.ReadOptions(use_threads=False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=types, include_columns=list(types), null_values=list(_EMPTY), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        raise _first_fault(path, text, numbers, str(error)) from None
    if len(table) == 0:
        raise DataError(f"{path}: the file has a header but no events")

    def column(name: str) -> np.ndarray:
        return table[name].to_numpy()

    def fault(rows: np.ndarray, name: str, wanted: str) -> DataError:
        line, fields = _row(text, int(np.flatnonzero(rows)[0]))
        return DataError(f"{path}, line {line}, column {name}: expected {wanted}, given {fields[header.index(name)]!r}")

    x = np.empty((len(table), SCHEMA.n_features), np.float32)
    with np.errstate(over="ignore"):
        for j, name in enumerate(SCHEMA.features):
            x[:, j] = column(name)
            if np.isinf(x[:, j]).any():
                raise fault(np.isinf(x[:, j]), name, "a finite number (within float32)")
    x[x == SCHEMA.missing_marker] = np.nan

    event_id = column("EventId").astype(str)
    if (event_id == "").any():
        raise fault(event_id == "", "EventId", "an event number")
    _, first, inverse = np.unique(event_id, return_index=True, return_inverse=True)
    repeated = first[inverse] != np.arange(len(event_id))
    if repeated.any():
        line, _ = _row(text, int(first[inverse][repeated][0]))
        raise fault(repeated, "EventId", f"a number that no other event has (line {line} has it)")

    label = weight = None
    if has_label:
        given = column("Label").astype(str)
        if not np.isin(given, ["s", "b"]).all():
            raise fault(~np.isin(given, ["s", "b"]), "Label", "s or b")
        label = (given == "s").astype(np.int8)
    if has_weight:
        weight = column("Weight")
        if not np.isfinite(weight).all():
            raise fault(~np.isfinite(weight), "Weight", "a finite number")
    return Events(SCHEMA, x, event_id, label, weight, source=str(path), digest=hashlib.sha256(raw).hexdigest()[:16])


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"{path}: expected a file, given a directory")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not raw:
        raise DataError(f"{path}: the file is empty, expected HiggsML events as CSV")
    return raw


def _decompress(path: Path, raw: bytes) -> bytes:
    if path.name.lower().endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except EOFError:
            raise DataError(
                f"{path}: the gzip file is truncated after {len(raw)} bytes (an interrupted download?)"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: expected a gzip file by its name, but it cannot be unpacked: {error}") from None
    return raw.removeprefix(b"\xef\xbb\xbf")


def _header(path: Path, text: bytes) -> list[str]:
    """Column names, after the checks that do not need the events."""
    head = text[: 1 << 16]
    if not head.strip():
        raise DataError(f"{path}: the file is empty, expected HiggsML events as CSV")
    if b"\0" in head or head[:2] == b"\x1f\x8b":
        raise DataError(f"{path}: expected CSV text, given a binary file")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: expected CSV text, given bytes that are not UTF-8") from None
    line, header = next(_lines(text))
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice and not _is_number(header[0]):
        raise DataError(f"{path}, line {line}: column {', '.join(twice)} appears twice")
    missing = [name for name in ("EventId", *SCHEMA.features) if name not in header]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        hint = ""
        if _is_number(header[0]):
            hint = "; the line holds numbers, the header is missing"
        elif len(header) == 1:
            hint = f"; no comma in {header[0][:60]!r}, another separator?"
        elif len(missing) > len(SCHEMA.features) // 2:
            hint = f"; the columns are not those of HiggsML: {', '.join(header[:4])}, ..."
        raise DataError(f"{path}, line {line}: expected the 30 HiggsML features and EventId, missing {shown}{hint}")
    return header


def _first_fault(path: Path, text: bytes, numbers: list[str], reason: str) -> DataError:
    """Find the line and column that the CSV parser could not read."""
    lines = _lines(text)
    _, header = next(lines)
    columns = [(header.index(name), name) for name in numbers]
    try:
        for line, fields in lines:
            if len(fields) != len(header):
                return DataError(f"{path}, line {line}: expected {len(header)} fields, given {len(fields)}")
            for j, name in columns:
                if fields[j] not in _EMPTY and not _is_number(fields[j]):
                    return DataError(f"{path}, line {line}, column {name}: expected a number, given {fields[j]!r}")
    except csv.Error as error:
        reason = str(error)
    return DataError(f"{path}: not a readable CSV file: {reason}")


def _row(text: bytes, row: int) -> tuple[int, list[str]]:
    """Line number and fields of an event, counted from 0."""
    lines = _lines(text)
    next(lines)
    return next(line for i, line in enumerate(lines) if i == row)


def _lines(text: bytes) -> Iterator[tuple[int, list[str]]]:
    """Line number (of the record's end, the first line is 1) and fields of every line that is not empty."""
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(text), "utf-8", newline=""))
    return ((reader.line_num, fields) for fields in reader if fields)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return "_" not in field  # Python's 1_000
