"""CSV, plain or gzipped, read in pieces; a fault is found again by its line."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ebm.events import DataError
from ebm.readers import rows_of
from ebm.readers.layout import Table

_EMPTY = ("", "NA", "NaN", "nan")  # how programs write a missing value
_LOOKED_AT = 100  # lines that tell text from numbers


class Csv(Table):
    """A comma-separated table with a header line."""

    def __init__(self, path: Path, tree: str | None = None) -> None:
        super().__init__(path)
        if tree is not None:
            raise DataError(f"{path}: a CSV file has no tree {tree!r}")
        with self._open() as f:
            head = f.read(1 << 16)
        if not head.strip():
            raise DataError(f"{path}: the file is empty, expected events as CSV")
        if b"\0" in head or head[:2] == b"\x1f\x8b":
            raise DataError(f"{path}: expected CSV text, given a binary file")
        line, self.names = next(self._lines())
        header = self.names
        if _is_number(header[0]):
            raise DataError(f"{path}, line {line}: expected the names of the columns; the line holds numbers, the "
                            "header is missing")
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"{path}, line {line}: column {', '.join(twice)} appears twice")
        if len(header) == 1 and any(c in header[0] for c in ";\t |"):
            raise DataError(f"{path}, line {line}: expected names with commas between them, no comma in "
                            f"{header[0][:60]!r}, another separator?")
        rows = [fields for _, fields in islice(self._lines(), 1, 1 + _LOOKED_AT)]
        self.text = frozenset(name for j, name in enumerate(header) if _holds_text([r[j] for r in rows if j < len(r)]))

    def read(self, names: Sequence[str], strings: frozenset[str], step: str | int) -> Iterator[dict[str, np.ndarray]]:
        import pyarrow as pa
        import pyarrow.csv

        types = {name: pa.string() if name in strings else pa.float64() for name in names}
        rows = rows_of(step, 8 * len(names))
        with self._open() as f:
            try:
                batches = pyarrow.csv.open_csv(
                    f, read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=1 << 23),
                    convert_options=pyarrow.csv.ConvertOptions(
                        column_types=types, include_columns=list(names), null_values=list(_EMPTY),
                        strings_can_be_null=False),
                )  # fmt: skip
                for batch in batches:
                    for start in range(0, batch.num_rows, rows):
                        part = batch.slice(start, rows)
                        yield {name: _column(part[name], name in strings) for name in names}
            except pa.ArrowInvalid as error:
                raise self._first_fault([n for n in names if n not in strings], str(error)) from None

    def fault(self, row: int, name: str, wanted: str, given: object) -> DataError:
        line, fields = next(islice(self._lines(), row + 1, None))
        given = fields[self.names.index(name)]
        return DataError(f"{self.path}, line {line}, column {name}: expected {wanted}, given {given!r}")

    def place(self, row: int) -> str:
        return f"line {next(islice(self._lines(), row + 1, None))[0]}"

    def _first_fault(self, numbers: Sequence[str], reason: str) -> DataError:
        """Find the line and column that the CSV parser could not read."""
        lines = self._lines()
        _, header = next(lines)
        columns = [(header.index(name), name) for name in numbers]
        try:
            for line, fields in lines:
                if len(fields) != len(header):
                    return DataError(f"{self.path}, line {line}: expected {len(header)} fields, given {len(fields)}")
                for j, name in columns:
                    if fields[j] not in _EMPTY and not _is_number(fields[j]):
                        return DataError(f"{self.path}, line {line}, column {name}: expected a number, given "
                                         f"{fields[j]!r}")
        except csv.Error as error:
            reason = str(error)
        return DataError(f"{self.path}: not a readable CSV file: {reason}")

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The text, unpacked; a damaged file is a DataError wherever it shows."""
        try:
            with (gzip.open if self.path.name.lower().endswith(".gz") else open)(self.path, "rb") as f:
                yield f
        except EOFError:
            raise DataError(f"{self.path}: the gzip file is truncated after {self.path.stat().st_size} bytes (an "
                            "interrupted download?)") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self.path}: expected a gzip file by its name, but it cannot be unpacked: "
                            f"{error}") from None

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """Line number (of the record's end, the first line is 1) and fields of every line that is not empty."""
        with self._open() as f:
            reader = csv.reader(line.decode("utf-8-sig" if i == 0 else "utf-8") for i, line in enumerate(f))
            while True:
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except UnicodeDecodeError:
                    raise DataError(f"{self.path}, line {reader.line_num + 1}: expected CSV text, given bytes that are "
                                    "not UTF-8") from None
                if fields:
                    yield reader.line_num, fields


def _column(values, is_text: bool) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False).astype(str if is_text else np.float64)


def _holds_text(fields: list[str]) -> bool:
    """Whether a column is text: none of its fields is a number, and not all are empty."""
    filled = [f for f in fields if f not in _EMPTY]
    return bool(filled) and not any(map(_is_number, filled))


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return "_" not in field  # Python's 1_000
