"""The features of the HiggsML challenge (ATLAS, 2014), in the Kaggle and the CERN Open Data layout alike."""

from ebm.events import Schema

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
