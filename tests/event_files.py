"""Files of events for the tests: one table in every format, and NanoAOD of several kinds."""

import gzip

import awkward as ak
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import uproot

from ebm.events import DataError, load_events

FORMATS = ("table.csv", "table.csv.gz", "table.parquet", "table.h5", "records.hdf5", "pandas.h5", "records.npy",
           "table.npz", "table.root", "ntuple.root")  # fmt: skip


def columns(n=50, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(50, 20, (n, 3)).astype(np.float32).astype(np.float64)
    x[3:4, 1] = np.nan
    return {"pt": x[:, 0], "eta": x[:, 1], "mass": x[:, 2], "label": (np.arange(n) % 5 == 0).astype(np.int8),
            "weight": rng.normal(3, 2, n), "run": np.full(n, 300000), "luminosityBlock": np.arange(n) // 7,
            "event": np.arange(n) * 2**40 + 1}  # fmt: skip


def write(path, c):
    """The same columns in the format that the name says."""
    c = dict(c)
    if path.suffix in (".csv", ".gz"):
        sink = pa.BufferOutputStream()
        pyarrow.csv.write_csv(pa.table(c), sink)
        text = sink.getvalue().to_pybytes()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table(c), path, row_group_size=20)
    elif path.suffix == ".root":
        with uproot.recreate(path) as f:
            if path.stem == "ntuple":
                f.mkrntuple("events", c)
            else:
                f.mktree("events", c)
    elif path.suffix == ".npz":
        np.savez(path, **c)
    elif path.stem == "records":
        records = np.rec.fromarrays(list(c.values()), names=list(c))
        if path.suffix == ".npy":
            np.save(path, np.asarray(records))
        else:
            with h5py.File(path, "w") as f:
                f["events"] = np.asarray(records)
    elif path.stem == "pandas":  # the layout of DataFrame.to_hdf, of which the LHC Olympics files are made
        numbers = {k: v for k, v in c.items() if v.dtype == np.float64}
        others = {k: v for k, v in c.items() if k not in numbers}
        with h5py.File(path, "w") as f:
            f["df/axis0"] = np.array(list(c), "S")
            f["df"].attrs["nblocks"] = 2
            for i, block in enumerate((numbers, others)):
                f[f"df/block{i}_items"] = np.array(list(block), "S")
                f[f"df/block{i}_values"] = np.stack(list(block.values()), axis=1)
    else:
        with h5py.File(path, "w") as f:
            for name, values in c.items():
                f[f"sample/{name}"] = values
    return path


def message(source, **options):
    with pytest.raises(DataError) as error:
        load_events(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def same(a, b):
    np.testing.assert_array_equal(a.x, b.x)
    np.testing.assert_array_equal(a.event_id, b.event_id)
    for name in ("label", "weight"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.schema == b.schema


def simulated(n=60, seed=0, counts=None):
    """Branches of n events, of which the first has no jets and the second 50."""
    rng = np.random.default_rng(seed)

    def collection(mean, **branches):
        number = rng.poisson(mean, n)
        if counts is not None:
            number[:] = counts
        elif mean == 5:
            number[:2] = 0, 50
        total = number.sum()
        values = {"pt": rng.exponential(30, total) + 5, "eta": rng.normal(0, 1.8, total),
                  "phi": rng.uniform(-np.pi, np.pi, total)} | {k: draw(total) for k, draw in branches.items()}
        return ak.zip({k: ak.unflatten(v.astype(np.float32) if v.dtype.kind == "f" else v, number)
                       for k, v in values.items()})

    def whole(high):
        return lambda k: rng.integers(0, high, k).astype(np.int32)

    def truth(k):
        return rng.random(k) < 0.7

    return {
        "Electron": collection(1, mass=lambda k: np.full(k, 5e-4), cutBased=whole(5)),
        "Muon": collection(1, mass=lambda k: np.full(k, 0.106), looseId=truth, mediumId=truth,
                           pfRelIso04_all=lambda k: rng.exponential(0.2, k)),
        "Photon": collection(1, mvaID_WP90=truth, electronVeto=truth),
        "Jet": collection(5, mass=lambda k: rng.exponential(8, k), jetId=whole(7),
                          btagPNetB=lambda k: rng.choice([-10, 0.1, 0.3, 0.9], k),
                          btagDeepFlavB=lambda k: rng.random(k)),
        "MET_pt": rng.exponential(30, n).astype(np.float32), "MET_phi": rng.uniform(-3, 3, n).astype(np.float32),
        "PuppiMET_pt": rng.exponential(30, n).astype(np.float32),
        "PuppiMET_phi": rng.uniform(-3, 3, n).astype(np.float32),
        "run": np.ones(n, np.uint32), "luminosityBlock": np.full(n, 7, np.uint32),
        "event": np.arange(n).astype(np.uint64) + 2**40, "genWeight": rng.normal(2, 2, n).astype(np.float32),
    }  # fmt: skip


def collisions(run, **options):
    branches = simulated(**options) | {"run": np.broadcast_to(np.uint32(run), 60).copy()}
    del branches["genWeight"]
    return branches


def write_nanoaod(path, branches, compression=None, ntuple=False):
    with uproot.recreate(path, compression=compression) as f:
        if ntuple:
            collections = {k: v for k, v in branches.items() if v.ndim > 1}
            flat = {f"{k}_{name}": v[name] for k, v in collections.items() for name in v.fields}
            numbers = {f"n{k}": ak.num(v).to_numpy().astype(np.uint32) for k, v in collections.items()}
            f.mkrntuple("Events", {k: v for k, v in branches.items() if v.ndim == 1} | flat | numbers)
        else:
            f.mktree("Events", branches)
    return path


def without(branches, *names):
    collection = {name.partition("_")[0]: name.partition("_")[2] for name in names}
    return {k: v[[f for f in v.fields if f != collection[k]]] if k in collection and v.ndim > 1 else v
            for k, v in branches.items() if k not in names}
