"""Features derived from those of HiggsML, by hand."""

import numpy as np
import pytest

from ebm import higgsml
from ebm.events import Events
from ebm.higgsml_features import engineered, ratio

NAMES = higgsml.SCHEMA.features

TWO_JETS = {
    "DER_mass_MMC": 120, "DER_mass_transverse_met_lep": 30, "DER_mass_vis": 60, "DER_pt_h": 50,
    "DER_deltaeta_jet_jet": 2, "DER_mass_jet_jet": 300, "DER_prodeta_jet_jet": -1, "DER_deltar_tau_lep": 2.5,
    "DER_pt_tot": 25, "DER_sum_pt": 250, "DER_pt_ratio_lep_tau": 1.5, "DER_met_phi_centrality": 1,
    "DER_lep_eta_centrality": 0.5, "PRI_tau_pt": 40, "PRI_tau_eta": 0.5, "PRI_tau_phi": 3, "PRI_lep_pt": 60,
    "PRI_lep_eta": -0.5, "PRI_lep_phi": -3, "PRI_met": 20, "PRI_met_phi": 0, "PRI_met_sumet": 500, "PRI_jet_num": 2,
    "PRI_jet_leading_pt": 100, "PRI_jet_leading_eta": 1, "PRI_jet_leading_phi": np.pi,
    "PRI_jet_subleading_pt": 50, "PRI_jet_subleading_eta": -1, "PRI_jet_subleading_phi": 1, "PRI_jet_all_pt": 150,
}  # fmt: skip
DERIVED = {
    "met_over_tau_pt": 0.5, "met_over_lep_pt": 1 / 3, "subleading_over_leading_jet_pt": 0.5, "pt_h_over_sum_pt": 0.2,
    "mass_vis_over_pt": 0.6, "transverse_mass_over_pt": 0.5, "mass_vis_over_mass_MMC": 0.5, "mass_jet_jet_over_pt": 2,
    "tau_lep_balance": -0.2, "met_balance": 20 / 270, "pt_tot_over_sum_pt": 0.1,
    "jets_over_sum_pt": 0.6, "jets_over_met": 150 / 170, "jets_over_sumet": 0.3,
    "cos_dphi_tau_lep": np.cos(6), "cos_dphi_tau_met": np.cos(3), "cos_dphi_lep_met": np.cos(3),
    "cos_dphi_jet_met": -1, "cos_theta_tau_lep": np.tanh(0.5), "cos_theta_jet_jet": np.tanh(1),
}  # fmt: skip
ABSENT = {n: -999 for n, optional in zip(NAMES, higgsml.SCHEMA.optional) if optional and "jet" in n}
OF_TWO_JETS = ("subleading_over_leading_jet_pt", "mass_jet_jet_over_pt", "cos_theta_jet_jet")


def event(**changes):
    """The derived features of one event by name."""
    row = np.array([list((TWO_JETS | changes).values())], np.float32)
    e = engineered(Events(higgsml.SCHEMA, row, np.array(["1"])))
    np.testing.assert_array_equal(e.x[:, :30], np.where(row == -999, np.nan, row))
    return dict(zip(e.schema.features[30:], e.x[0, 30:]))


def test_every_derived_feature_by_hand():
    found = event()
    assert list(found) == list(DERIVED)
    for name, value in DERIVED.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_what_is_missing_stays_missing():
    none = event(PRI_jet_num=0, PRI_jet_all_pt=0, **ABSENT)
    gone = {n for n, v in none.items() if np.isnan(v)}
    assert gone == {*OF_TWO_JETS, "cos_dphi_jet_met"}
    assert (none["jets_over_sum_pt"], none["jets_over_met"], none["met_balance"]) == (0, 0, pytest.approx(20 / 120))
    one = {n: v for n, v in ABSENT.items() if "jet_leading" not in n}
    assert {n for n, v in event(PRI_jet_num=1, **one).items() if np.isnan(v)} == set(OF_TWO_JETS)
    assert {n for n, v in event(DER_mass_MMC=np.nan).items() if np.isnan(v)} == {"mass_vis_over_mass_MMC"}


def test_nothing_is_divided_by_zero():
    with np.errstate(all="raise"):
        zero = event(**dict.fromkeys((n for n in NAMES if "pt" in n or "mass" in n or "met" in n), 0))
        np.testing.assert_array_equal(ratio(np.array([1.0, 1, 1, np.nan]), np.array([2.0, 0, np.nan, 2])),
                                      [0.5, np.nan, np.nan, np.nan])
    assert all(np.isnan(v) for n, v in zero.items() if not n.startswith("cos"))
    assert not any(np.isinf(v) for v in zero.values())


def test_derived_features_know_no_scale_and_no_direction():
    scaled = {n: 2 * TWO_JETS[n] for n, unit in zip(NAMES, higgsml.SCHEMA.units) if unit == "GeV"}
    rotated = {n: TWO_JETS[n] + 1 for n in NAMES if n.endswith("_phi")}
    for jets in ({}, ABSENT):
        for changed in (scaled, rotated):
            assert event(**changed | jets) == pytest.approx(event(**jets), abs=1e-5, nan_ok=True)
    empty = Events(higgsml.SCHEMA, np.zeros((0, 30), np.float32), np.array([], str))
    assert engineered(empty).schema.units[30:] == ("",) * len(DERIVED)
