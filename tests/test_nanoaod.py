"""NanoAOD to the 64 features: against a loop over events, and on files of several eras."""

import os
from pathlib import Path

import awkward as ak
import numpy as np
import pytest
import uproot
from event_files import message, simulated, without, write_nanoaod

from ebm import hep64
from ebm.events import concatenate, iterate, load_events
from ebm.hep64 import ELECTRON, JET, MUON, NONE, PHOTON, Objects

FILES = Path(os.environ.get("FUSED_EBM_DATA", "/nonexistent")) / "rootfiles"
real = pytest.mark.skipif("FUSED_EBM_DATA" not in os.environ, reason="FUSED_EBM_DATA is not set: no real NanoAOD")
OPEN_DATA, DY = "nanoAOD_2015_CMS_Open_Data_ttbar.root?era=2015", "nano_dy.root?era=2018"


def far(a, others):
    dphi = [np.pi - abs(np.pi - abs(a["phi"] - o["phi"]) % (2 * np.pi)) for o in others]
    return all(np.hypot(a["eta"] - o["eta"], d) > 0.4 for o, d in zip(others, dphi))


def slow_features(branches, tagger, point, met):
    """The selection of the schema, written once more as a loop over events and objects."""
    rows = []
    for i in range(len(branches[f"{met}_pt"])):
        event = {c: branches[c][i].to_list() for c in ("Electron", "Muon", "Photon", "Jet")}
        kept = [(o, ELECTRON) for o in event["Electron"] if o["pt"] > 10 and abs(o["eta"]) < 2.5 and o["cutBased"] >= 2]
        kept += [(o, MUON) for o in event["Muon"] if o["pt"] > 10 and abs(o["eta"]) < 2.4
                 and o.get("looseId", o["mediumId"]) and o["pfRelIso04_all"] < 0.25]
        leptons = [o for o, _ in kept]
        kept += [(o, PHOTON) for o in event["Photon"] if o["pt"] > 20 and abs(o["eta"]) < 2.5 and o["mvaID_WP90"]
                 and o["electronVeto"] and far(o, leptons)]
        clean = [o for o, _ in kept]
        kept += [(o, JET) for o in event["Jet"] if o["pt"] > 30 and abs(o["eta"]) < 4.7 and o["jetId"] >= 2
                 and far(o, clean)]
        size = max(1, len(kept))

        def column(name, kept=kept, size=size):
            values = [o.get(name, 0.0) for o, _ in kept]
            return np.array([values + [0.0] * (size - len(values))])

        kind = np.array([[k for _, k in kept] + [NONE] * (size - len(kept))])
        rows.append(hep64.features(Objects(
            column("pt"), column("eta"), column("phi"), column("mass"), kind, column(f"btag{tagger}"),
            branches[f"{met}_pt"][i : i + 1], branches[f"{met}_phi"][i : i + 1], point))[0])
    return np.array(rows)


def test_the_features_are_those_of_a_loop(tmp_path):
    branches = simulated(200)
    events = load_events(write_nanoaod(tmp_path / "a.root", branches), era="2022")
    np.testing.assert_allclose(events.x, slow_features(branches, "PNetB", 0.245, "PuppiMET"), rtol=2e-6, atol=2e-5)
    x = dict(zip(events.schema.features, events.x.T))
    assert np.isnan(x["jet1_mass"][0])
    assert x["n_jets"][0] == 0
    assert x["n_jets"][1] > 5
    assert set(x["n_lep"]) >= {0, 1, 2}


def test_rntuple_gives_the_same(tmp_path):
    tree = load_events(write_nanoaod(tmp_path / "a.root", simulated()), era="2022")
    ntuple = load_events(write_nanoaod(tmp_path / "b.root", simulated(), ntuple=True), era="2022")
    np.testing.assert_array_equal(tree.x, ntuple.x)
    np.testing.assert_array_equal(tree.event_id, ntuple.event_id)


def test_what_is_carried_along(tmp_path):
    branches = simulated()
    events = load_events(write_nanoaod(tmp_path / "a.root", branches), era="2022")
    assert events.schema.name == "hep64-v1/PNetB"
    assert events.schema.features == hep64.SCHEMA.features
    assert events.event_id[5] == f"1:7:{2**40 + 5}"
    np.testing.assert_array_equal(events.weight, branches["genWeight"].astype(np.float64))
    assert (events.weight < 0).any()
    assert events.label is None
    assert load_events(tmp_path / "a.root", era="2022", weight="").weight is None
    assert "no branch lheWeight" in message(tmp_path / "a.root", era="2022", weight="lheWeight")
    assert "branch Jet_mass: expected one weight per event, given 60 * var" in message(
        tmp_path / "a.root", era="2022", weight="Jet_mass")


def test_pieces_are_the_whole(tmp_path):
    path = write_nanoaod(tmp_path / "a.root", simulated())
    whole = load_events(path, era="2022")
    for step in (7, "5 kB"):
        pieces = list(iterate(path, step=step, era="2022"))
        assert len(pieces) > 2
        np.testing.assert_array_equal(concatenate(pieces).x, whole.x)
        np.testing.assert_array_equal(concatenate(pieces).event_id, whole.event_id)


def test_other_versions_of_the_branches(tmp_path):
    """NanoAOD without looseId and PuppiMET, and one of 2024 without jetId."""
    branches = simulated()
    for name in ("PuppiMET_pt", "PuppiMET_phi"):
        del branches[name]
    branches = without(branches, "Muon_looseId")
    events = load_events(write_nanoaod(tmp_path / "a.root", branches), era="2022")
    np.testing.assert_allclose(events.x, slow_features(branches, "PNetB", 0.245, "MET"), rtol=2e-6, atol=2e-5)
    branches = without(simulated(), "Jet_jetId")
    more = load_events(write_nanoaod(tmp_path / "b.root", branches), era="2022")
    n_jets = hep64.SCHEMA.features.index("n_jets")
    assert more.x[:, n_jets].sum() > events.x[:, n_jets].sum()


def test_events_without_any_objects(tmp_path):
    events = load_events(write_nanoaod(tmp_path / "a.root", simulated(counts=0)), era="2022")
    optional = np.array(hep64.SCHEMA.optional)
    assert np.isnan(events.x[:, optional]).all()
    assert np.isfinite(events.x[:, ~optional]).all()
    one = load_events(write_nanoaod(tmp_path / "b.root", simulated(1, counts=3)), era="2022")
    assert one.x.shape == (1, 64)


@real
@pytest.mark.parametrize(
    ("name", "n", "tagger", "first"),
    [(OPEN_DATA, 200, "CSVV2", "1:2272915:227291401"), (DY, 40, "DeepFlavB", "1:13889:3749778"),
     ("nano_tree.root?era=2016", 10, "DeepFlavB", "1:916:1895304"),
     ("missing_luminosityBlock.root?era=2018", 2, "DeepFlavB", "1:61978970")],
)  # fmt: skip
def test_real_files_of_several_eras(name, n, tagger, first):
    events = load_events(str(FILES / name))
    assert (len(events), events.schema.name, events.event_id[0]) == (n, f"hep64-v1/{tagger}", first)
    optional = np.array(events.schema.optional)
    assert np.isfinite(events.x[:, ~optional]).all()
    assert len(events.weight) == n
    pieces = concatenate(list(iterate(str(FILES / name), step=1 + n // 4)))
    np.testing.assert_array_equal(pieces.x, events.x)


@real
def test_real_events_against_the_loop():
    events = load_events(str(FILES / OPEN_DATA))
    tree = uproot.open(FILES / "nanoAOD_2015_CMS_Open_Data_ttbar.root")["Events"]
    branches = {c: ak.zip({k: tree[f"{c}_{k}"].array() for k in keys}) for c, keys in (
        ("Electron", ("pt", "eta", "phi", "mass", "cutBased")),
        ("Muon", ("pt", "eta", "phi", "mass", "looseId", "mediumId", "pfRelIso04_all")),
        ("Photon", ("pt", "eta", "phi", "mvaID_WP90", "electronVeto")),
        ("Jet", ("pt", "eta", "phi", "mass", "jetId", "btagCSVV2")),
    )}  # fmt: skip
    branches |= {k: tree[k].array(library="np") for k in ("PuppiMET_pt", "PuppiMET_phi")}
    np.testing.assert_allclose(events.x, slow_features(branches, "CSVV2", 0.8, "PuppiMET"), rtol=2e-6, atol=2e-4)
