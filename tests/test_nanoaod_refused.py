"""NanoAOD of mixed eras or taggers, with branches that lack, and damaged: one clear sentence."""

import os
from pathlib import Path

import awkward as ak
import numpy as np
import pytest
import uproot
from event_files import collisions, message, simulated, without, write_nanoaod

from ebm import hep64
from ebm.events import DataError, check_schema, iterate, load_events
from ebm.readers.eras import MEDIUM, TAGGERS, era_of_run

FILES = Path(os.environ.get("FUSED_EBM_DATA", "/nonexistent")) / "rootfiles"
real = pytest.mark.skipif("FUSED_EBM_DATA" not in os.environ, reason="FUSED_EBM_DATA is not set: no real NanoAOD")


def test_the_era_of_data_is_that_of_its_runs(tmp_path):
    events = load_events(write_nanoaod(tmp_path / "a.root", collisions(356000)))
    np.testing.assert_array_equal(events.x, load_events(tmp_path / "a.root", era="2022").x)
    later = load_events(write_nanoaod(tmp_path / "b.root", collisions(360000)))
    assert later.schema == events.schema
    for run, era in ((254231, "2015"), (273000, "UL2016preVFP"), (279000, "UL2016postVFP"), (300000, "UL2017"),
                     (320000, "UL2018"), (356000, "2022"), (360000, "2022EE"), (367100, "2023"), (370000, "2023BPix"),
                     (380000, "2024"), (1, None), (400000, None),
                     (278768, "UL2016preVFP"), (278769, "UL2016postVFP"), (278770, "UL2016preVFP"),
                     (278801, "UL2016postVFP"), (284044, "UL2016postVFP"), (306462, "UL2017"), (306546, None),
                     (326381, None), (359021, "2022"), (369802, "2023"), (370790, "2023BPix")):  # fmt: skip
        assert era_of_run(run, ultra_legacy=True) == era
    assert [era_of_run(r, False) for r in (273000, 279000, 300000)] == ["2016", "2016", "2017"]
    assert all(set(points) <= set(TAGGERS) and all(0 < p < 1 for p in points.values()) for points in MEDIUM.values())


def test_eras_are_not_mixed(tmp_path):
    path = write_nanoaod(tmp_path / "a.root", collisions(np.r_[np.full(40, 356000), np.full(20, 360000)]))
    text = message(path)
    assert "branch run, entry 40: run 360000 is of era 2022EE, the file was read as 2022" in text
    with pytest.raises(DataError, match="entry 40"):
        list(iterate(path, step=11))
    write_nanoaod(tmp_path / "c1.root", collisions(356000))
    write_nanoaod(tmp_path / "c2.root", collisions(360000))
    text = message(tmp_path / "c*.root")
    assert f"{tmp_path / 'c2.root'}: era 2022EE, while {tmp_path / 'c1.root'} has 2022" in text
    assert "is of no era that is known here" in message(write_nanoaod(tmp_path / "d.root", collisions(400000)))


def test_simulation_is_told_its_era(tmp_path):
    path = write_nanoaod(tmp_path / "a.root", simulated())
    text = message(path)
    assert "simulation does not say its era" in text
    assert "one of 2022, 2022EE, 2023, 2023BPix" in text
    assert "expected one with a working point for a tagger of this file (PNetB, DeepFlavB)" in message(path, era="2024")
    by_point = load_events(path, era="PNetB:0.245")
    np.testing.assert_array_equal(by_point.x, load_events(f"{path}?era=2022").x)
    for era in ("CSVV2:0.8", "PNetB:high", "PNetB:7"):
        assert "expected TAGGER:POINT with a tagger of the file" in message(path, era=era)


def test_taggers_are_not_mixed(tmp_path):
    write_nanoaod(tmp_path / "a.root", simulated())
    write_nanoaod(tmp_path / "b.root", without(simulated(), "Jet_btagPNetB"))
    text = message(tmp_path / "*.root", era="2022")
    assert "b.root: schema hep64-v1/DeepFlavB, while" in text
    assert "has hep64-v1/PNetB" in text
    one, other = (load_events(tmp_path / f"{name}.root", era="2022").schema for name in "ab")
    with pytest.raises(DataError, match="hep64-v1/PNetB events"):
        check_schema(one, other, "model", "b.root")
    with pytest.raises(DataError, match="hep64-v1 events"):
        check_schema(hep64.SCHEMA, other, "toy model", "b.root")
    none = write_nanoaod(tmp_path / "c.root", without(simulated(), "Jet_btagPNetB", "Jet_pt"))
    assert "c.root: NanoAOD without branch Jet_pt" in message(none, era="2022")


def test_wrong_branches(tmp_path):
    branches = simulated()
    text = message(write_nanoaod(tmp_path / "a.root", without(branches, "Muon_pfRelIso04_all", "Jet_mass")), era="2022")
    assert "NanoAOD without branch Jet_mass, Muon_pfRelIso04_all; choose flat branches" in text
    del branches["Electron"]
    text = message(write_nanoaod(tmp_path / "b.root", branches), era="2022")
    assert "without branch Electron_pt, Electron_eta" in text
    flat = load_events(tmp_path / "b.root", features="MET_pt,PuppiMET_pt")
    assert flat.schema.features == ("MET_pt", "PuppiMET_pt")
    assert flat.event_id[0] == f"1:7:{2**40}"
    assert "NanoAOD events have no labels" in message(tmp_path / "a.root", era="2022", label="genWeight")
    no_tagger = simulated()
    no_tagger["Jet"] = no_tagger["Jet"][[f for f in no_tagger["Jet"].fields if "btag" not in f]]
    assert "no b-tagger, expected one of the branches Jet_btagUParTAK4B" in message(
        write_nanoaod(tmp_path / "c.root", no_tagger), era="2022")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_numbers(tmp_path, value):
    branches = simulated()
    pt = branches["Jet"].pt
    flat, counts = ak.flatten(pt).to_numpy().copy(), ak.num(pt)
    position = int(np.sum(counts[:9]))  # the first jet of entry 9 or of the next one that has any
    entry = 9 + int(np.flatnonzero(counts[9:])[0])
    flat[position] = value
    branches["Jet"] = ak.with_field(branches["Jet"], ak.unflatten(flat, counts), "pt")
    path = write_nanoaod(tmp_path / "a.root", branches)
    wanted = f"branch Jet_pt, entry {entry}: expected a finite number, given {value}"
    assert wanted in message(path, era="2022")
    with pytest.raises(DataError, match=wanted):
        list(iterate(path, step=4, era="2022"))


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, share):
    path = write_nanoaod(tmp_path / "a.root", simulated())
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    assert "truncated" in message(path, era="2022")


def test_damaged_files_say_so_or_read_as_they_were(tmp_path):
    """Bytes in the middle are overwritten: an error names the file, whichever part of uproot it comes from."""
    path = write_nanoaod(tmp_path / "a.root", simulated(400), compression=uproot.LZ4(4))
    raw, rng = path.read_bytes(), np.random.default_rng(1)
    refused = read = 0
    for start in rng.integers(300, len(raw) - 64, 20):
        path.write_bytes(raw[:start] + rng.bytes(64) + raw[start + 64 :])
        try:
            load_events(path, era="2022")
        except DataError as error:
            refused += str(path) in str(error)
        else:
            read += 1
    assert refused > 5
    assert refused + read == 20


@real
def test_real_files_that_cannot_become_hep64(tmp_path):
    assert "simulation does not say its era" in message(FILES / "nano_dy.root")
    for name in ("Run2012BC_DoubleMuParked_Muons_1000evts_rntuple_v1-0-0-0.root", "uproot-small-dy-nooffsets.root"):
        assert f"{name}: NanoAOD without branch Electron_pt" in message(FILES / name)
    raw = (FILES / "nano_dy.root").read_bytes()
    cut = tmp_path / "cut.root"
    cut.write_bytes(raw[: len(raw) // 2])
    text = message(cut, era="2018")
    assert f"{cut}: the ROOT file is truncated: {len(raw) // 2} of its {len(raw)} bytes are there" in text
