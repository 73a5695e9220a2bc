"""Features derived from those of HiggsML by what is known of its physics: ratios, balances and compressed angles.

All are dimensionless, so that an event and the same event with all momenta doubled look alike. c maps the names of
`ebm.higgsml` to columns (n,) float64, NaN where missing; a derived value is missing, NaN, where one that it is made of
is, and where it would be divided by zero. Momenta pt, masses m and missing transverse momentum (MET) are in GeV; the
definitions of the columns are those of Adam-Bourdarios et al., "Learning to discover: the Higgs boson machine learning
challenge" (2014), appendix B. tau is the hadronic tau, lep the electron or muon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ebm import higgsml
from ebm.events import DataError, Events

Columns = Mapping[str, np.ndarray]


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b (n,), NaN where b is not above zero."""
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=b > 0)


def transverse_momentum_ratios(c: Columns) -> dict[str, np.ndarray]:
    """From 0 up; what may vanish (MET) is above the line, and what selection keeps from zero below it.

    met_over_tau_pt, met_over_lep_pt    MET / pt
    subleading_over_leading_jet_pt      at most 1; missing with fewer than two jets
    pt_h_over_sum_pt                    |vector sum of tau, lep and MET| / scalar sum of tau, lep and jets
    """
    return {
        "met_over_tau_pt": ratio(c["PRI_met"], c["PRI_tau_pt"]),
        "met_over_lep_pt": ratio(c["PRI_met"], c["PRI_lep_pt"]),
        "subleading_over_leading_jet_pt": ratio(c["PRI_jet_subleading_pt"], c["PRI_jet_leading_pt"]),
        "pt_h_over_sum_pt": ratio(c["DER_pt_h"], c["DER_sum_pt"]),
    }


def mass_to_momentum_ratios(c: Columns) -> dict[str, np.ndarray]:
    """From 0 up.

    mass_vis_over_pt            m(tau, lep) / (pt_tau + pt_lep)
    transverse_mass_over_pt     m_T(lep, MET) / pt_lep
    mass_vis_over_mass_MMC      the visible share of the mass; missing where the mass estimate is
    mass_jet_jet_over_pt        m(jj) / (pt_j1 + pt_j2); missing with fewer than two jets
    """
    jets = c["PRI_jet_leading_pt"] + c["PRI_jet_subleading_pt"]
    return {
        "mass_vis_over_pt": ratio(c["DER_mass_vis"], c["PRI_tau_pt"] + c["PRI_lep_pt"]),
        "transverse_mass_over_pt": ratio(c["DER_mass_transverse_met_lep"], c["PRI_lep_pt"]),
        "mass_vis_over_mass_MMC": ratio(c["DER_mass_vis"], c["DER_mass_MMC"]),
        "mass_jet_jet_over_pt": ratio(c["DER_mass_jet_jet"], jets),
    }


def event_balance(c: Columns) -> dict[str, np.ndarray]:
    """tau_lep_balance       (pt_tau - pt_lep) / (pt_tau + pt_lep), -1 to 1: positive where the tau is the harder
    met_balance           MET / (MET + pt_tau + pt_lep + pt of all jets), 0 to 1
    pt_tot_over_sum_pt    |vector sum of tau, lep, MET and two jets| / scalar sum of tau, lep and jets, from 0 up
    """
    tau, lep = c["PRI_tau_pt"], c["PRI_lep_pt"]
    return {
        "tau_lep_balance": ratio(tau - lep, tau + lep),
        "met_balance": ratio(c["PRI_met"], c["PRI_met"] + tau + lep + c["PRI_jet_all_pt"]),
        "pt_tot_over_sum_pt": ratio(c["DER_pt_tot"], c["DER_sum_pt"]),
    }


def jet_activity(c: Columns) -> dict[str, np.ndarray]:
    """The scalar sum of all jets' pt, 0 without jets, in units of something of the event; from 0 up.

    jets_over_sum_pt    / scalar sum of tau, lep and jets, below 1
    jets_over_met       / (that sum of jets + MET), at most 1
    jets_over_sumet     / the transverse energy of the whole detector
    """
    jets = c["PRI_jet_all_pt"]
    return {
        "jets_over_sum_pt": ratio(jets, c["DER_sum_pt"]),
        "jets_over_met": ratio(jets, jets + c["PRI_met"]),
        "jets_over_sumet": ratio(jets, c["PRI_met_sumet"]),
    }


def angular_compressions(c: Columns) -> dict[str, np.ndarray]:
    """Differences of angles on a bounded scale, without the jump of phi at pi.

    cos_dphi_tau_lep, ..._tau_met, ..._lep_met, ..._jet_met    cos(phi_a - phi_b), -1 (back to back) to 1; the leading
                                                               jet, missing without jets
    cos_theta_tau_lep, cos_theta_jet_jet    tanh(|eta_a - eta_b| / 2), 0 to 1: |cos| of the angle to the beam where
                                            both go back to back (Banfi et al., Eur. Phys. J. C 71, 1600, 2011)
    """

    def cos_dphi(a: str, b: str) -> np.ndarray:
        return np.cos(c[f"PRI_{a}_phi"] - c[f"PRI_{b}_phi"])

    return {
        "cos_dphi_tau_lep": cos_dphi("tau", "lep"),
        "cos_dphi_tau_met": cos_dphi("tau", "met"),
        "cos_dphi_lep_met": cos_dphi("lep", "met"),
        "cos_dphi_jet_met": cos_dphi("jet_leading", "met"),
        "cos_theta_tau_lep": np.tanh(np.abs(c["PRI_tau_eta"] - c["PRI_lep_eta"]) / 2),
        "cos_theta_jet_jet": np.tanh(np.abs(c["DER_deltaeta_jet_jet"]) / 2),
    }


GROUPS = (transverse_momentum_ratios, mass_to_momentum_ratios, event_balance, jet_activity, angular_compressions)


def engineered(events: Events) -> Events:
    """The events with the derived features behind their own: x (n, 50) and its schema, in which all may be missing.

    Nothing is fitted, so that an event's derived features depend on that event alone. Raises DataError on events that
    are not in the HiggsML layout.
    """
    schema, wanted = events.schema, higgsml.SCHEMA
    if schema.features != wanted.features:
        raise DataError(f"{events.source or 'the data'} has {schema.name} events ({_named(schema)}), expected "
                        f"{wanted.name} events ({_named(wanted)})")
    x = np.where(events.x == np.float32(wanted.missing_marker), np.nan, events.x).astype(np.float64)
    columns = dict(zip(schema.features, x.T))
    derived = {name: values for group in GROUPS for name, values in group(columns).items()}
    n = len(derived)
    larger = replace(schema, name="higgsml-engineered", features=(*schema.features, *derived),
                     units=(*schema.units, *[""] * n), optional=(True,) * (schema.n_features + n))
    return replace(events, schema=larger, x=np.column_stack([x, *derived.values()]).astype(np.float32))


def _named(schema) -> str:
    first, last = schema.features[0], schema.features[-1]
    return f"{schema.n_features} features, {first} to {last}"
