"""Formats that keep their columns as arrays: Parquet, HDF5 and NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ebm.events import DataError
from ebm.readers import rows_of
from ebm.readers.layout import Table, as_strings


def open_table(path: Path, tree: str | None) -> Table:
    """The table of a Parquet, HDF5 or NumPy file; `tree` is a group or data set of HDF5, an array of .npz."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return Parquet(path, tree)
        return Arrays(path, _hdf5(path, tree) if suffix in (".h5", ".hdf5") else _numpy(path, tree))
    except DataError:
        raise
    except Exception as error:  # each library has its own errors for a damaged file
        raise unreadable(path, {".parquet": "Parquet", ".npy": "NumPy", ".npz": "NumPy"}.get(suffix, "HDF5"),
                         error) from None


def unreadable(path: Path, kind: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"{path}: cannot be read as {kind}, truncated or damaged? ({reason})")


class Parquet(Table):
    def __init__(self, path: Path, tree: str | None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(path)
        if tree is not None:
            raise DataError(f"{path}: a Parquet file has no tree {tree!r}")
        self.file = pq.ParquetFile(path)
        schema = self.file.schema_arrow
        plain = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_decimal)
        text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary)
        for field in schema:
            if not any(test(field.type) for test in plain + text):
                raise DataError(f"{path}, column {field.name}: expected one number or text per event, given "
                                f"{field.type}")
        self.names = schema.names
        self.text = frozenset(f.name for f in schema if any(test(f.type) for test in text))

    def read(self, names: Sequence[str], strings: frozenset[str], step: str | int) -> Iterator[dict[str, np.ndarray]]:
        try:
            for batch in self.file.iter_batches(rows_of(step, 8 * len(names)), columns=list(names)):
                columns = {n: batch[n].to_numpy(zero_copy_only=False) for n in names}
                yield {n: as_strings(a) if n in strings else a.astype(np.float64) for n, a in columns.items()}
        except OSError as error:
            raise unreadable(self.path, "Parquet", error) from None


class Arrays(Table):
    """Columns of arrays in memory or on disk: (array, which of the values of each of its rows)."""

    def __init__(self, path: Path, columns: dict[str, tuple[np.ndarray, int | str | None]]) -> None:
        super().__init__(path)
        self.columns, self.names = columns, list(columns)
        kinds = {name: a.dtype[which] if isinstance(which, str) else a.dtype for name, (a, which) in columns.items()}
        for name, kind in kinds.items():
            if kind.kind not in "biufSUO" or kind.shape:
                raise DataError(f"{path}, column {name}: expected one number or text per event, given {kind}")
        self.text = frozenset(name for name, kind in kinds.items() if kind.kind in "SUO")

    def read(self, names: Sequence[str], strings: frozenset[str], step: str | int) -> Iterator[dict[str, np.ndarray]]:
        rows = rows_of(step, 8 * len(names))
        for start in range(0, len(self.columns[names[0]][0]), rows):
            piece, loaded = {}, {}
            for name in names:
                a, which = self.columns[name]
                if id(a) not in loaded:
                    try:
                        loaded[id(a)] = np.asarray(a[start : start + rows])
                    except OSError as error:
                        raise unreadable(self.path, "HDF5", error) from None
                part = loaded[id(a)]
                part = part if which is None else part[which] if isinstance(which, str) else part[:, which]
                piece[name] = as_strings(part) if name in strings else part.astype(np.float64)
            yield piece


def _numpy(path: Path, tree: str | None) -> dict:
    content = np.load(path, mmap_mode="r", allow_pickle=False)
    arrays = {"x": content} if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
    return _columns(path, _chosen(path, arrays, tree))


def _hdf5(path: Path, tree: str | None) -> dict:
    """The data sets of a file or group. What pandas wrote as a fixed-format frame has its columns by name."""
    import h5py

    group = h5py.File(path, "r")
    if tree is None and len(group) == 1 and isinstance(next(iter(group.values())), h5py.Group):
        tree = next(iter(group))
    if tree is not None:
        group = _chosen(path, group, tree)[tree]
    if isinstance(group, h5py.Dataset):
        return _columns(path, {tree: group})
    if "block0_values" in group:
        blocks = [(group[f"block{i}_items"][:], group[f"block{i}_values"]) for i in range(group.attrs["nblocks"])]
        return {name.decode(): (values, j) for names, values in blocks for j, name in enumerate(names)}
    return _columns(path, {name: item for name, item in group.items() if isinstance(item, h5py.Dataset)})


def _chosen(path: Path, arrays: Mapping, tree: str | None) -> Mapping:
    if tree is not None and tree not in arrays:
        raise DataError(f"{path}: no {tree!r} in it, expected one of {', '.join(arrays)}")
    return arrays if tree is None else {tree: arrays[tree]}


def _columns(path: Path, arrays: Mapping[str, np.ndarray]) -> dict:
    """One value, a row of values (named x0, x1, ...) or a record of named values per event, of each array."""
    columns = {}
    matrices = [name for name, a in arrays.items() if a.ndim == 2]
    for name, a in arrays.items():
        if a.ndim == 2:
            prefix = "x" if len(matrices) == 1 else f"{name}_"
            columns |= {f"{prefix}{j}": (a, j) for j in range(a.shape[1])}
        elif a.ndim == 1:
            columns |= {field: (a, field) for field in a.dtype.names} if a.dtype.names else {name: (a, None)}
        else:
            raise DataError(f"{path}, {name}: expected one row of numbers per event, given shape {a.shape}")
    lengths = {name: len(a) for name, a in arrays.items()}
    if len(set(lengths.values())) != 1:
        given = ", ".join(f"{n} of {m}" for n, m in lengths.items()) or "none"
        raise DataError(f"{path}: expected arrays of one length, given {given}; choose one with the option 'tree'")
    return columns
