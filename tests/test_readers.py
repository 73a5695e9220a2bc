"""Every format gives the same events, whole or in pieces, and the columns are recognised."""

import os
import warnings
from pathlib import Path

import awkward as ak
import h5py
import numpy as np
import pytest
import uproot
from event_files import FORMATS, columns, message, same, write

from ebm import hep64, lhco
from ebm.events import concatenate, iterate, load_events

DATA = os.environ.get("FUSED_EBM_DATA")
real = pytest.mark.skipif(DATA is None, reason="FUSED_EBM_DATA is not set: no real files")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_events(tmp_path, name):
    c = columns()
    events = load_events(write(tmp_path / name, c))
    assert sorted(events.schema.features) == ["eta", "mass", "pt"]
    for feature, values in zip(events.schema.features, events.x.T):
        np.testing.assert_array_equal(values, c[feature].astype(np.float32))
    assert (events.x.dtype, events.label.dtype, events.weight.dtype) == (np.float32, np.int8, np.float64)
    np.testing.assert_array_equal(events.label, c["label"])
    np.testing.assert_allclose(events.weight, c["weight"], rtol=1e-15)
    assert events.event_id[9] == f"300000:1:{9 * 2**40 + 1}"
    assert events.has_id
    assert len(events.digest) == 16


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_are_the_whole(tmp_path, name):
    path = write(tmp_path / name, columns())
    whole = load_events(path)
    for step in (7, "1 kB"):
        pieces = list(iterate(path, step=step))
        assert len(pieces) > 2
        assert max(map(len, pieces)) < 50
        same(concatenate(pieces), whole)


def test_a_file_larger_than_the_step_is_never_in_memory(tmp_path):
    """Peak memory of reading 8 MB in pieces of 200 kB, in NumPy's own account."""
    import tracemalloc

    path = tmp_path / "large.npy"
    large = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(100_000, 10))
    large[:] = np.arange(10)
    large.flush()
    tracemalloc.start()
    n = sum(len(piece) for piece in iterate(path, step="200 kB"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 100_000
    assert peak < 2e6


def test_rows_without_ids_are_numbered_through_all_pieces_and_files(tmp_path):
    for name, seed in (("a.parquet", 1), ("b.parquet", 2)):
        write(tmp_path / name, {k: columns(20, seed)[k] for k in ("pt", "eta")})
    events = load_events(tmp_path / "*.parquet")
    assert events.event_id.tolist() == [str(i) for i in range(40)]
    assert not events.has_id
    same(events, concatenate(list(iterate(tmp_path / "*.parquet", step=3))))
    assert events.digest not in (load_events(tmp_path / "a.parquet").digest, "")


def test_options_by_name_and_behind_the_path(tmp_path):
    path = write(tmp_path / "a.parquet", {**columns(), "class": np.array(list("ghggh") * 10)})
    behind = load_events(f"{path}?features=mass,pt&label=class=h&weight=&missing=50")
    named = load_events(path, features=["mass", "pt"], label="class=h", weight="", missing=50)
    same(behind, named)
    assert behind.schema.features == ("mass", "pt")
    assert behind.schema.missing_marker == 50
    assert behind.label[:5].tolist() == [0, 1, 0, 0, 1]
    assert behind.weight is None
    chosen = load_events(path, features="weight,run")  # no weight and no run number then
    assert (chosen.schema.features, chosen.weight, chosen.event_id[1]) == (("weight", "run"), None, f"0:{2**40 + 1}")
    literal = write(tmp_path / "a?b.parquet", columns())
    assert len(load_events(literal)) == 50


def test_adbench_lhco_and_hep64_are_recognised(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "set.npz", X=rng.normal(size=(30, 5)), y=np.arange(30) % 2)
    events = load_events(tmp_path / "set.npz")
    assert (events.schema.features, events.label.sum()) == (("x0", "x1", "x2", "x3", "x4"), 15)
    for schema in (lhco.SIGNAL_REGION, lhco.FEATURES, hep64.SCHEMA):
        table = dict(zip(schema.features, rng.normal(size=(schema.n_features, 20)))) | {"label": np.arange(20) % 2,
                                                                                         "other": np.zeros(20)}
        path = write(tmp_path / f"{schema.name}.parquet", table)
        assert load_events(path).schema == schema
        del table[schema.features[1]]
        text = message(write(tmp_path / "part.parquet", table))
        assert f"expected the {schema.n_features} features of {schema.name}, missing {schema.features[1]}" in text
    part = load_events(path, features=["obj0_E", "ht"]).schema
    assert (part.name, part.units, part.optional) == ("hep64-v1", ("GeV", "GeV"), (True, False))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [(["0", "1", "1"], [0, 1, 1]), ([0.0, 1.0, 0.0], [0, 1, 0]), ([True, False, True], [1, 0, 1]),
     (["s", "b", "b"], [1, 0, 0]), (["signal", "background", "signal"], [1, 0, 1])],
)  # fmt: skip
def test_labels_as_people_write_them(tmp_path, values, wanted):
    path = write(tmp_path / "a.parquet", {"pt": np.ones(3), "label": np.array(values)})
    assert load_events(path).label.tolist() == wanted


@pytest.mark.parametrize("names", [
    ("label", "run", "event"), ("isSignal", "RunNumber", "EventNumber"), ("TARGET", "run_number", "evt"),
    ("signal", "Info.runNumber", "Info.eventNumber"),
])
def test_labels_and_event_numbers_are_no_features_however_they_are_spelt(tmp_path, names):
    path = tmp_path / "x.csv"
    path.write_text(",".join(["pt", *names]) + "\n30,1,5,7\n40,0,5,8\n")
    events = load_events(path)
    assert events.schema.features == ("pt",)
    assert events.label.tolist() == [1, 0]
    assert events.event_id.tolist() == ["5:7", "5:8"]
    assert load_events(f"{path}?features=pt,{names[0]}&label=").schema.features == ("pt", names[0])


def test_text_among_the_features(tmp_path):
    c = columns(4)
    names = np.array(["qcd", "qcd", "tt", "tt"])
    text = message(write(tmp_path / "t.parquet", c | {"weight": names}))
    assert "column weight: expected weights, given text" in text
    with pytest.warns(UserWarning, match="left aside, for they hold text: channel"):
        events = load_events(write(tmp_path / "a.csv", c | {"channel": names}))
    assert "channel" not in events.schema.features
    assert load_events(write(tmp_path / "b.parquet", c | {"process": names})).process.tolist() == names.tolist()


def test_the_toy_comes_in_pieces_too():
    same(concatenate(list(iterate("toy:100", step=30))), load_events("toy:100"))


def test_one_event(tmp_path):
    events = load_events(write(tmp_path / "one.csv", columns(1)))
    assert events.x.shape == (1, 3)


def flat_root(path, **trees):
    with uproot.recreate(path) as f:
        for name, tree in trees.items():
            f.mktree(name, tree)
    return path


def test_flat_trees(tmp_path):
    c = {k: columns()[k] for k in ("pt", "eta")}
    jets = ak.unflatten(np.arange(100.0), np.full(50, 2))
    path = flat_root(tmp_path / "a.root", one=c | {"jet_pt": jets}, two=c)
    assert "several trees, choose one with the option 'tree'; it has one, two" in message(path)
    assert "no tree 'three'; it has one, two" in message(path, tree="three")
    with pytest.warns(UserWarning, match="left aside, for they hold more or less than one value per event: jet_pt$"):
        events = load_events(path, tree="one")
    assert set(events.schema.features) >= {"pt", "eta"}
    text = message(f"{path}?tree=one&features=pt,jet_pt")
    assert "branch jet_pt: expected one number per event, given double[]" in text
    assert "no branch charge" in message(path, tree="two", features="pt,charge")
    empty = flat_root(tmp_path / "empty.root", events={k: v[:0] for k, v in c.items()})
    assert "tree events has no events" in message(empty)


def test_hdf5_groups_are_chosen(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as f:
        f["train/pt"], f["test/pt"] = np.ones(3), np.ones(4)
        f["x"] = np.ones((5, 2))
    assert len(load_events(path, tree="test")) == 4
    assert load_events(path, tree="x").schema.features == ("x0", "x1")
    assert "no 'valid' in it, expected one of test, train, x" in message(path, tree="valid")


@real
def test_real_tables():
    data = Path(DATA)
    events = load_events(data / "higgsml" / "atlas-higgs-challenge-2014-v2_first22889_even.parquet")
    csv = load_events(data / "higgsml" / "atlas-higgs-challenge-2014-v2_first22889_even.csv.gz")
    same(events, csv)
    events = load_events(data / "lhco_rnd_signal_region" / "lhco_SR_val.parquet")
    assert (events.schema.name, len(events), events.label.sum()) == ("lhco", 60000, 369)
    without_mjj = load_events(events.source, features=lhco.SIGNAL_REGION.features[1:])
    assert (without_mjj.schema.name, without_mjj.x.shape[1]) == ("lhco", 4)
    sets = sorted((data / "adbench").glob("*.npz"))
    for path in sets:
        content = np.load(path)
        if content["X"].shape[1] > 256:
            assert "expected 1 to 256 features" in message(path)
        else:
            events = load_events(path)
            np.testing.assert_array_equal(events.x, content["X"].astype(np.float32))
            np.testing.assert_array_equal(events.label, content["y"])
    assert len(sets) > 20
    zmumu = load_events(data / "cms_opendata_csv" / "Zmumu_Run2011A.csv.gz")
    assert zmumu.event_id[0] == "165617:74969122"


@real
def test_real_root_files():
    files = Path(DATA) / "rootfiles"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        events = load_events(files / "uproot-Zmumu.root")
        assert (events.x.shape, events.event_id[0]) == ((2304, 17), "148031:10507008")
        hzz = load_events(files / "uproot-HZZ.root")
        assert hzz.weight.sum() > 0
        assert load_events(files / "treemaker.root").event_id[0] == "1:9533:119150022"
    assert "tree tree has no events" in message(files / "uproot-empty.root")
    text = message(files / "uproot-HZZ.root", features="MET_px,Jet_Px")
    assert "branch Jet_Px: expected one number per event, given float[]" in text
