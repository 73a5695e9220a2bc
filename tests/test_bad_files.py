"""Every bad file, value and option is told in one sentence that names it."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from event_files import FORMATS, columns, message, write

from ebm.events import DataError, iterate, load_events


def test_files_of_other_columns_are_not_one_data_set(tmp_path):
    write(tmp_path / "a.npz", columns())
    write(tmp_path / "b.npz", {k: v for k, v in columns().items() if k != "eta"})
    text = message(tmp_path / "*.npz")
    assert "features none more, while" in text
    assert "a.npz has eta: they are not one data set" in text
    assert str(tmp_path / "b.npz") in text
    assert "no file has such a name" in message(tmp_path / "*.root")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"features": "pt,charge"}, "no column charge, it has pt, eta, mass, label, weight and 3 more"),
        ({"features": "pt,label", "label": "label"}, "column label: expected a feature, but it is a label, a weight"),
        ({"features": "pt,pt"}, "names a feature twice: pt"),
        ({"label": "truth"}, "no column truth"),
        ({"weight": "lumi"}, "no column lumi"),
        ({"colour": "red"}, "no option 'colour', expected era, features, label, missing, tree, weight"),
        ({"missing": "none"}, "missing='none': expected the number that marks a missing value"),
        ({"label": "pt"}, "column pt: expected 1 or 0, given"),
    ],
)
def test_bad_options(tmp_path, options, wanted):
    assert wanted in message(write(tmp_path / "a.npz", columns()), **options)


def test_step_has_a_unit(tmp_path):
    path = write(tmp_path / "a.npz", columns())
    for step in (0, -1, "100", "many", "10 MiB"):
        with pytest.raises(DataError, match="expected a number of events, or memory such as '100 MB'"):
            next(iterate(path, step=step))


def test_bad_labels_and_weights(tmp_path):
    c = columns()
    bad = c["label"].copy()
    bad[11] = 7
    text = message(write(tmp_path / "a.npz", c | {"label": bad}))
    assert "entry 11, column label: expected 1 or 0 (a label; the option 'label=' takes it for a feature), " in text
    assert "given '7'" in text
    nan = np.where(np.arange(50) == 12, np.nan, 1.0)
    text = message(write(tmp_path / "b.npz", c | {"weight": nan}))
    assert "entry 12, column weight: expected a finite number, given nan" in text
    zero = np.where(np.arange(50) % 2, 1.0, -1.0)
    text = message(write(tmp_path / "c.npz", c | {"weight": zero}))
    assert "column weight: the weights of the 50 events sum to 0, expected a positive sum" in text
    assert load_events(f"{tmp_path / 'c.npz'}?weight=").weight is None
    negative = load_events(write(tmp_path / "d.npz", c | {"weight": np.where(np.arange(50) == 3, -2.0, 1.0)}))
    assert negative.weight[3] == -2
    assert load_events(write(tmp_path / "e.npz", {k: c[k] for k in ("pt", "eta")})).label is None


def test_infinite_values_and_columns_without_any(tmp_path):
    c = columns()
    c["mass"][4] = np.inf
    assert "entry 4, column mass: expected a finite number (within float32), given inf" in message(
        write(tmp_path / "a.npz", c))
    c["mass"][:] = np.nan
    with pytest.warns(UserWarning, match=r"b.npz: no event has a value in column mass"):
        load_events(write(tmp_path / "b.npz", c))


def test_bad_csv_rows_in_any_table(tmp_path):
    path = write(tmp_path / "a.csv", columns(3000))
    lines = path.read_text().splitlines()
    lines[2500] = lines[2500].replace(",", ",x", 1)
    path.write_text("\n".join(lines))
    assert "line 2501, column eta: expected a number, given 'x" in message(path)
    lines[2500] = "1,2"
    path.write_text("\n".join(lines))
    assert "line 2501: expected 8 fields, given 2" in message(path)
    path.write_text("pt;eta\n1;2\n")
    assert "another separator?" in message(path)


def test_too_wide_and_too_deep(tmp_path):
    np.savez(tmp_path / "wide.npz", X=np.ones((3, 257)), y=np.zeros(3))
    assert "257 columns of numbers, expected 1 to 256 features: choose some" in message(tmp_path / "wide.npz")
    assert load_events(tmp_path / "wide.npz", features="x3,x1").schema.features == ("x3", "x1")
    np.save(tmp_path / "deep.npy", np.ones((3, 4, 5)))
    assert "expected one row of numbers per event, given shape (3, 4, 5)" in message(tmp_path / "deep.npy")
    np.savez(tmp_path / "odd.npz", a=np.ones(3), b=np.ones(4))
    assert "expected arrays of one length, given a of 3, b of 4" in message(tmp_path / "odd.npz")
    pyarrow.parquet.write_table(pa.table({"jets": [[1.0], [1.0, 2.0]]}), tmp_path / "a.parquet")
    assert "column jets: expected one number or text per event, given list" in message(tmp_path / "a.parquet")
    np.save(tmp_path / "none.npy", np.ones((0, 4)))
    assert "no events" in message(tmp_path / "none.npy")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]))
    assert "cannot be read as NumPy" in message(tmp_path / "objects.npy")


@pytest.mark.parametrize("name", [n for n in FORMATS if "csv" not in n])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.97])
def test_truncated_files(tmp_path, name, share):
    path = write(tmp_path / name, columns(2000))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    text = message(path)
    assert str(path) in text
    assert "truncated" in text


@pytest.mark.parametrize("name", FORMATS)
def test_empty_and_foreign_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    assert "the file is empty" in message(path)
    path.write_bytes(b"\0\1\2\3" * 300)
    assert str(path) in message(path)


@pytest.mark.parametrize(("name", "package"), [("table.root", "vector"), ("table.h5", "h5py")])
def test_a_library_that_is_not_there(tmp_path, monkeypatch, name, package):
    path = write(tmp_path / name, columns())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=rf"need {package}: pip install 'fused-ebm\[hep\]'"):
        load_events(path)
