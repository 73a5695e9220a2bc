"""Reading events: both HiggsML layouts, folds, and what a damaged file is told."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ebm import higgsml
from ebm.events import DataError, Events, Schema, fold, load_events, split

NAMES = higgsml.SCHEMA.features
KAGGLE = ["EventId", *NAMES, "Weight", "Label"]


def table(n=6):
    """n events as rows of text, by column name."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        row = {name: f"{value:.3f}" for name, value in zip(NAMES, rng.normal(50, 20, len(NAMES)))}
        row |= {"EventId": str(100000 + i), "Weight": f"{0.1 * (i + 1):.3f}", "Label": "sb"[i % 2], "PRI_jet_num": "1"}
        row |= {name: "-999.0" for name in NAMES if "subleading" in name}
        row |= {"KaggleSet": "t", "KaggleWeight": "9.5"}
        rows.append(row)
    return rows


def csv_text(rows, columns=KAGGLE):
    return "\n".join([",".join(columns), *(",".join(row[c] for c in columns) for row in rows)]) + "\n"


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def message(path):
    with pytest.raises(DataError) as error:
        load_events(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["kaggle.csv", "kaggle.csv.gz", "KAGGLE.CSV"])
def test_kaggle_layout(tmp_path, name):
    rows = table()
    events = load_events(write(tmp_path / name, csv_text(rows)))
    assert events.schema.name == "higgsml"
    assert events.schema.missing_marker == -999
    assert (events.x.shape, events.x.dtype) == ((6, 30), np.float32)
    assert events.event_id.tolist() == [row["EventId"] for row in rows]
    assert events.label.tolist() == [1, 0, 1, 0, 1, 0]
    assert events.weight.tolist() == [float(row["Weight"]) for row in rows]
    for j, feature in enumerate(NAMES):
        if "subleading" in feature:
            assert np.isnan(events.x[:, j]).all()
        else:
            np.testing.assert_array_equal(events.x[:, j], [np.float32(row[feature]) for row in rows])
    assert len(events.digest) == 16


def test_open_data_layout_and_column_order_give_the_same_events(tmp_path):
    rows = table()
    kaggle = load_events(write(tmp_path / "a.csv", csv_text(rows)))
    columns = ["KaggleSet", "Label", *NAMES[::-1], "KaggleWeight", "Weight", "EventId"]
    cern = load_events(write(tmp_path / "b.csv.gz", csv_text(rows, columns)))
    np.testing.assert_array_equal(kaggle.x, cern.x)
    np.testing.assert_array_equal(kaggle.weight, cern.weight)
    np.testing.assert_array_equal(fold(kaggle), fold(cern))
    assert kaggle.digest != cern.digest


def test_label_and_weight_are_optional(tmp_path):
    events = load_events(write(tmp_path / "test.csv", csv_text(table(), ["EventId", *NAMES])))
    assert events.label is None
    assert events.weight is None
    assert len(events.background()) == 6


def test_empty_field_and_other_line_ends(tmp_path):
    rows = table()
    rows[1]["DER_mass_MMC"], rows[2]["DER_mass_MMC"] = "", "nan"
    text = "\ufeff" + csv_text(rows).replace("\n", "\r\n")
    events = load_events(write(tmp_path / "a.csv", text))
    np.testing.assert_array_equal(np.isnan(events.x[:, 0]), [False, True, True, False, False, False])


def test_unreadable_paths(tmp_path, monkeypatch):
    assert "No such file" in message(tmp_path / "absent.csv")
    assert "given a directory" in message(tmp_path)
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    assert "given a directory" in message(folder)
    for name in ("events", "events.gz", "events.txt"):
        assert "expected .root, .csv, .csv.gz, .parquet, .h5, .hdf5, .npy or .npz, or toy" in message(
            write(tmp_path / name, "x"))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.csv", csv_text(table()))
    monkeypatch.setattr("builtins.open", refuse)
    assert "Permission denied" in message(path)


def test_files_that_are_not_csv(tmp_path):
    assert "the file is empty" in message(write(tmp_path / "a.csv", ""))
    assert "the file is empty" in message(write(tmp_path / "b.csv.gz", ""))
    assert "no events" in message(write(tmp_path / "c.csv", ",".join(KAGGLE) + "\n"))
    binary = tmp_path / "d.csv"
    binary.write_bytes(b"root\0\0\1\2" * 100)
    assert "given a binary file" in message(binary)
    binary.write_bytes(gzip.compress(csv_text(table()).encode()))
    assert "given a binary file" in message(binary)
    binary.write_bytes(csv_text(table()).encode() + b"\xff\xfe")
    assert "line 8: expected CSV text, given bytes that are not UTF-8" in message(binary)


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(csv_text(table(500)).encode())
    path = tmp_path / "a.csv.gz"
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in message(path)
    path.write_bytes(whole[:3000] + b"\0" * 2000 + whole[5000:])
    assert "cannot be unpacked" in message(path)
    path.write_bytes(csv_text(table()).encode())
    assert "expected a gzip file by its name" in message(path)


def test_wrong_columns(tmp_path):
    rows = table()
    text = message(write(tmp_path / "a.csv", csv_text(rows, [c for c in KAGGLE if c != "PRI_met"])))
    assert "expected the 30 features of higgsml, missing PRI_met; to do without" in text
    assert "another separator?" in message(write(tmp_path / "c.csv", csv_text(rows).replace(",", ";")))
    assert "the header is missing" in message(write(tmp_path / "d.csv", csv_text(rows).split("\n", 1)[1]))
    assert "PRI_met appears twice" in message(write(tmp_path / "e.csv", csv_text(rows, [*KAGGLE, "PRI_met"])))


@pytest.mark.parametrize(
    ("column", "value", "wanted"),
    [
        ("PRI_met", "abc", "line 4, column PRI_met: expected a number, given 'abc'"),
        ("Weight", "heavy", "line 4, column Weight: expected a number, given 'heavy'"),
        ("Weight", "", "line 4, column Weight: expected a finite number, given ''"),
        ("Label", "x", "line 4, column Label: expected s or b, given 'x'"),
        ("Label", "", "line 4, column Label: expected s or b, given ''"),
        ("PRI_tau_pt", "inf", "line 4, column PRI_tau_pt: expected a finite number (within float32), given 'inf'"),
        ("PRI_tau_pt", "-1e300", "line 4, column PRI_tau_pt: expected a finite number (within float32)"),
        ("EventId", "100000", "line 4, column EventId: expected a number that no other event has (line 2 has it)"),
        ("EventId", "", "line 4, column EventId: expected an event number, given ''"),
    ],
)
def test_bad_values(tmp_path, column, value, wanted):
    rows = table()
    rows[2][column] = value
    assert wanted in message(write(tmp_path / "a.csv.gz", csv_text(rows)))


def test_bad_rows(tmp_path):
    lines = csv_text(table()).splitlines()
    short = [*lines[:3], "", lines[3].rsplit(",", 5)[0], *lines[4:]]  # the empty line counts
    assert "line 5: expected 33 fields, given 28" in message(write(tmp_path / "a.csv", "\n".join(short)))
    long = [*lines[:3], lines[3] + ",1", *lines[4:]]
    assert "line 4: expected 33 fields, given 34" in message(write(tmp_path / "b.csv", "\n".join(long)))
    cut = "\n".join(lines)[:-40]
    assert "line 7: expected 33 fields" in message(write(tmp_path / "c.csv", cut))


@pytest.mark.parametrize("source", ["toy:", "toy:0", "toy:-3", "toy:many", "toy:1e3"])
def test_bad_toy_sizes(source):
    with pytest.raises(DataError, match="expected toy or toy:N"):
        load_events(source)


def plain(n, x=None, has_id=True):
    x = np.zeros((n, 2), np.float32) if x is None else np.array(x, np.float32)
    schema = Schema("plain", ("a", "b"), ("", ""))
    return Events(schema, x, np.array([f"1:0:{i}" for i in range(n)]), has_id=has_id)


def test_folds_never_change():
    assert fold(plain(10)).tolist() == [8, 2, 4, 4, 0, 2, 4, 4, 9, 2]
    x = [[1, 2], [np.nan, -0.5], [0, 1e30]]
    assert fold(plain(3, x, has_id=False)).tolist() == [1, 2, 8]
    negative_nan = -np.array(x, np.float32)
    negative_nan[[0, 2]] *= -1
    negative_nan[1, 1] = -0.5
    assert fold(plain(3, negative_nan, has_id=False)).tolist() == [1, 2, 8]
    assert fold(plain(0)).shape == (0,)


def test_split_covers_every_event_once():
    events = plain(5000)
    masks = split(events)
    np.testing.assert_array_equal(sum(mask.astype(int) for mask in masks), 1)
    assert [mask.mean() for mask in masks] == pytest.approx([0.6, 0.2, 0.2], abs=0.03)
    np.testing.assert_array_equal(fold(events[masks.test]) >= 8, True)
    assert plain(4, has_id=False)[:2].has_id is False


def test_events_needs_numpy_alone():
    code = "import sys, ebm.events; print(sorted({'pyarrow', 'torch', 'sklearn', 'ebm.toy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.skipif("FUSED_EBM_DATA" not in os.environ, reason="FUSED_EBM_DATA is not set: no real HiggsML file")
def test_real_file():
    events = load_events(Path(os.environ["FUSED_EBM_DATA"]) / "higgsml" / "training_kaggle_layout_even.csv.gz")
    assert events.x.shape == (11445, 30)
    assert events.label.mean() == pytest.approx(0.345, abs=0.001)
    jets = events.x[:, NAMES.index("PRI_jet_num")]
    np.testing.assert_array_equal(np.isnan(events.x[:, NAMES.index("PRI_jet_leading_pt")]), jets == 0)
    np.testing.assert_array_equal(np.isnan(events.x[:, NAMES.index("DER_mass_jet_jet")]), jets < 2)
    missing = np.isnan(events.x).any(axis=0)
    assert not (missing & ~np.array(events.schema.optional)).any()
    assert fold(events)[:10].tolist() == [5, 0, 9, 5, 4, 6, 0, 6, 6, 0]
