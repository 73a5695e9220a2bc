"""The `hep64-v1` schema: 64 features of a collider event, computed from its reconstructed objects.

Ten leading objects as (E, px, py, pz), missing energy, event shapes, jets and b-tags. The event is
rotated so that phi(MET) = 0. What an event does not have (a fifth object, a second jet) is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ebm.events import DataError, Schema

NONE, ELECTRON, MUON, PHOTON, JET = range(5)

_LEADING = 10  # objects that enter with their four-momenta, and of which the event shapes are made
_BTAG_MAX_ETA = 2.5
_CHUNK = 4096  # events at a time, so that the sign subsets of the thrust stay small in memory

_MEASURED = {  # always there, with their units
    "MET": "GeV", "met_over_sqrt_ht": "GeV^1/2", "dphi_min": "rad", "ht": "GeV", "mht": "GeV", "meff": "GeV",
    "mvis": "GeV", "sphericity": "", "aplanarity": "", "sphericity_t": "", "c_lin": "", "thrust_t": "",
    "centrality": "", "n_jets": "", "n_btag": "", "n_lep": "",
}  # fmt: skip
_OBJECTS = {f"obj{i}_{component}": "GeV" for i in range(_LEADING) for component in ("E", "px", "py", "pz")}
_JETS = {"jet1_mass": "GeV", "m_jj": "GeV", "deta_jj": "", "dphi_jj": "rad"} | {f"jet{i}_btag": "" for i in range(1, 5)}
_COLUMNS = _OBJECTS | _MEASURED | _JETS

SCHEMA = Schema(
    name="hep64-v1",
    features=tuple(_COLUMNS),
    units=tuple(_COLUMNS.values()),
    optional=tuple(feature not in _MEASURED for feature in _COLUMNS),
)

# All choices of sign for ten objects, up to a common one: (512, 10).
_SIGNS = np.array([[1] + [1 - 2 * (subset >> bit & 1) for bit in range(_LEADING - 1)] for subset in range(512)], float)


@dataclass(frozen=True)
class Objects:
    """Reconstructed objects of n events, padded to M per event, in any order.

    `pt`, `mass` (n, M) in GeV, `eta`, `phi` (n, M); `kind` (n, M) is 0 for padding, 1 electron, 2 muon,
    3 photon, 4 jet; what the other arrays hold under padding is ignored. `btag` (n, M) is the tagger's
    score of a jet in [0, 1]: below 0, the tagger's "not computed", it counts as 0, and NaN stays missing;
    a jet above `btag_working_point` with |eta| < 2.5 is a b-jet. `met_pt` in GeV and `met_phi` are (n,).
    Selection, identification and overlap removal have been done.
    """

    pt: np.ndarray
    eta: np.ndarray
    phi: np.ndarray
    mass: np.ndarray
    kind: np.ndarray
    btag: np.ndarray
    met_pt: np.ndarray
    met_phi: np.ndarray
    btag_working_point: float

    def __len__(self) -> int:
        return len(self.met_pt)


def features(objects: Objects) -> np.ndarray:
    """The features of `SCHEMA`, (n, 64) float32, NaN where the event has no such object.

    Does not depend on the order of the objects (of two with the same pT the first one leads).
    """
    n = len(objects)
    for name in ("pt", "eta", "phi", "mass", "kind", "btag"):
        shape = getattr(objects, name).shape
        if shape != objects.kind.shape or len(shape) != 2 or shape[0] != n:
            raise DataError(f"objects of {n} events: {name} has shape {shape}, expected that of kind, ({n}, M)")
    out = np.empty((n, SCHEMA.n_features), np.float32)
    for start in range(0, n, _CHUNK):
        out[start : start + _CHUNK] = _features(objects, slice(start, min(start + _CHUNK, n)))
    return out


def _features(objects: Objects, rows: slice) -> np.ndarray:
    """One chunk of events in float64, (n, 64)."""
    pt, eta, phi, mass, btag, kind = _sorted_by_pt(objects, rows)
    met = np.asarray(objects.met_pt[rows], np.float64)
    met_phi = np.where(met > 0, np.asarray(objects.met_phi[rows], np.float64), 0.0)
    _require_finite("met_pt", met, rows.start)
    _require_finite("met_phi", met_phi, rows.start)

    phi = phi - np.where(met > 0, met_phi, phi[:, 0])[:, None]
    px, py, pz = pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta)
    energy = np.sqrt(pt**2 + pz**2 + mass**2)
    present, is_jet, is_lepton = kind != NONE, kind == JET, (kind == ELECTRON) | (kind == MUON)
    f: dict[str, np.ndarray] = {"MET": met}

    momentum = np.stack([energy, px, py, pz], axis=2)[:, :_LEADING]
    leading = np.where(present[:, :_LEADING, None], momentum, np.nan).reshape(len(met), -1)
    f |= dict(zip(_OBJECTS, leading.T))
    total = momentum.sum(axis=1)
    f["mvis"] = _mass(total)
    f |= _shapes(momentum, pt[:, :_LEADING], present[:, :_LEADING].sum(axis=1))

    jet_pt = np.where(is_jet, pt, 0)
    f["ht"] = ht = jet_pt.sum(axis=1)
    f["mht"] = np.hypot(np.where(is_jet, px, 0).sum(axis=1), np.where(is_jet, py, 0).sum(axis=1))
    f["meff"] = ht + met + np.where(present & ~is_jet, pt, 0).sum(axis=1)
    f["met_over_sqrt_ht"] = _ratio(met, np.sqrt(ht))
    f["n_jets"], f["n_lep"] = is_jet.sum(axis=1), is_lepton.sum(axis=1)
    tagged = is_jet & (np.abs(eta) < _BTAG_MAX_ETA) & (btag > objects.btag_working_point)
    f["n_btag"] = tagged.sum(axis=1)

    jets = np.argsort(~is_jet, axis=1, kind="stable")[:, :4]  # the leading four, hardest first

    def of_jets(a: np.ndarray) -> np.ndarray:
        return np.where(np.take_along_axis(is_jet, jets, 1), np.take_along_axis(a, jets, 1), np.nan)

    f["dphi_min"] = np.fmin.reduce(_fold_phi(of_jets(phi)), axis=1, initial=np.pi)
    jet_eta, jet_phi = of_jets(eta), of_jets(phi)
    f["jet1_mass"] = of_jets(mass)[:, 0]
    two = np.stack([of_jets(component)[:, :2].sum(axis=1) for component in (energy, px, py, pz)], axis=1)
    f["m_jj"] = _mass(two)
    f["deta_jj"] = np.abs(jet_eta[:, 0] - jet_eta[:, 1])
    f["dphi_jj"] = _fold_phi(jet_phi[:, 0] - jet_phi[:, 1])
    f |= {f"jet{i + 1}_btag": b for i, b in enumerate(np.maximum(of_jets(btag), 0).T)}
    return np.stack([f[name] for name in SCHEMA.features], axis=1)


def _sorted_by_pt(objects: Objects, rows: slice) -> list[np.ndarray]:
    """pt, eta, phi, mass, btag and kind in falling pT, padding last and zero; at least ten columns."""
    kind = np.asarray(objects.kind[rows])
    present = kind != NONE
    columns = []
    for name in ("pt", "eta", "phi", "mass", "btag"):
        column = np.where(present, np.asarray(getattr(objects, name)[rows], np.float64), 0.0)
        if name != "btag":  # a jet outside the tracker may have no score
            _require_finite(name, column, rows.start)
        columns.append(column)
    order = np.argsort(np.where(present, -columns[0], np.inf), axis=1, kind="stable")
    width = ((0, 0), (0, max(0, _LEADING - kind.shape[1])))
    return [np.pad(np.take_along_axis(column, order, axis=1), width) for column in (*columns, kind)]


def _require_finite(name: str, values: np.ndarray, first: int) -> None:
    bad = ~np.isfinite(values)
    if name in ("pt", "met_pt"):
        bad |= values < 0
    if bad.any():
        where = tuple(np.argwhere(bad)[0])
        wanted = "a finite number, 0 or more" if name in ("pt", "met_pt") else "a finite number"
        raise DataError(f"event {first + where[0]}: {name} is {values[where]}, expected {wanted}")


def _shapes(momentum: np.ndarray, pt: np.ndarray, n_objects: np.ndarray) -> dict[str, np.ndarray]:
    """Event shapes of (n, 10, 4) momenta, each (n,); 0 for fewer than two objects."""
    p3 = momentum[:, :, 1:]
    p = np.sqrt((p3**2).sum(axis=2))
    quadratic = np.einsum("nia,nib->nab", p3, p3)
    linear = np.einsum("nia,nib->nab", p3, _ratio(p3, p[:, :, None]))

    _, l2, l3 = _eigenvalues(quadratic)
    k1, k2, k3 = _eigenvalues(linear)
    xx, yy, xy = quadratic[:, 0, 0], quadratic[:, 1, 1], quadratic[:, 0, 1]
    # max over n of sum |pT . n| is the largest |sum of +-pT|: n then lies along that sum.
    subset_sums = (p3[:, :, 0] @ _SIGNS.T) ** 2 + (p3[:, :, 1] @ _SIGNS.T) ** 2
    sum_pt = pt.sum(axis=1)
    shapes = {
        "sphericity": 1.5 * (l2 + l3),
        "aplanarity": 1.5 * l3,
        "sphericity_t": np.maximum(1 - _ratio(np.hypot(xx - yy, 2 * xy), xx + yy), 0),
        "c_lin": 3 * (k1 * k2 + k1 * k3 + k2 * k3),
        "thrust_t": _ratio(np.sqrt(subset_sums.max(axis=1)), sum_pt),
        "centrality": _ratio(sum_pt, momentum[:, :, 0].sum(axis=1)),
    }
    return {name: np.where(n_objects >= 2, shape, 0) for name, shape in shapes.items()}


def _eigenvalues(tensor: np.ndarray) -> np.ndarray:
    """Eigenvalues l1 >= l2 >= l3 of (n, 3, 3) tensors divided by their trace, (3, n)."""
    trace = np.trace(tensor, axis1=1, axis2=2)[:, None, None]
    return np.maximum(np.linalg.eigvalsh(_ratio(tensor, trace)), 0).T[::-1]


def _mass(p: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(p[:, 0] ** 2 - (p[:, 1:] ** 2).sum(axis=1), 0))


def _fold_phi(dphi: np.ndarray) -> np.ndarray:
    """|dphi| in [0, pi]."""
    return np.pi - np.abs(np.pi - np.abs(dphi) % (2 * np.pi))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b > 0)
