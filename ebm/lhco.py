"""The LHC Olympics 2020 R&D data as tables: dijet events at 13 TeV, described by their two leading large jets."""

from ebm.events import Schema

# The signal region 3.3 < mjj < 3.7 TeV: the lighter jet's mass, the mass difference, and both jets' tau2 / tau1.
SIGNAL_REGION = Schema(
    "lhco", ("mjj", "mj_min", "delta_mj", "tau21_mj_min", "tau21_mj_max"), ("TeV", "TeV", "TeV", "", "")
)
# The published feature files: momenta, masses and N-subjettiness.
_OF_A_JET = {"px": "GeV", "py": "GeV", "pz": "GeV", "m": "GeV", "tau1": "", "tau2": "", "tau3": ""}
FEATURES = Schema(
    "lhco-features",
    tuple(f"{name}j{jet}" for jet in (1, 2) for name in _OF_A_JET),
    tuple(_OF_A_JET.values()) * 2,
)
