"""NanoAOD of CMS, several eras, to `hep64-v1`: identified and isolated objects, without overlap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebm import hep64
from ebm.events import DataError, Events
from ebm.hep64 import ELECTRON, JET, MUON, PHOTON, Objects
from ebm.readers.eras import MEDIUM, TAGGERS, era_of_run

if TYPE_CHECKING:
    import awkward as ak
    import uproot

    from ebm.readers import Options

_COLLECTIONS = ("Electron", "Muon", "Photon", "Jet")
_CLEAN = 0.4  # dR within which an object is taken for the one of higher priority
_IDS = {  # what identifies an object: the first branch that is there
    "Electron": ("cutBased", "mvaIso_WP90", "mvaFall17V2Iso_WP90"),
    "Muon": ("looseId", "mediumId"),
    "Photon": ("mvaID_WP90",),
}


class UnknownEra(DataError):
    """The era of simulation, or of runs that are not known here, has to be given: one of `eras`."""

    eras: tuple[str, ...]


def is_nanoaod(branches: set[str]) -> bool:
    return any(f"{c}_pt" in branches and f"n{c}" in branches for c in _COLLECTIONS)


class NanoAOD:
    """The events of a NanoAOD file. Its b-tagger is part of the schema's name, so that taggers are never mixed."""

    layout = "NanoAOD"

    def __init__(self, path: Path, tree: uproot.TTree, options: Options) -> None:
        self.path, self.tree, branches = path, tree, set(tree.keys())
        if options.label or options.missing is not None:
            raise DataError(f"{path}: NanoAOD events have no labels and no missing marker to choose")
        self.ids = {c: next((f"{c}_{name}" for name in names if f"{c}_{name}" in branches), f"{c}_{names[0]}")
                    for c, names in _IDS.items()}
        met = next((m for m in ("PuppiMET", "MET") if f"{m}_pt" in branches), "PuppiMET")
        self.met = f"{met}_pt", f"{met}_phi"
        kinematics = [f"{c}_{v}" for c in _COLLECTIONS for v in ("pt", "eta", "phi")]
        required = [*kinematics, *self.ids.values(), "Jet_mass", "Muon_pfRelIso04_all", "Photon_electronVeto",
                    *self.met]
        if missing := [b for b in required if b not in branches]:
            raise DataError(f"{path}: NanoAOD without branch {', '.join(missing[:6])}"
                            f"{f' and {len(missing) - 6} more' if len(missing) > 6 else ''}; choose flat branches with "
                            "the option 'features' to read it as a table")
        self.ultra_legacy = "Jet_btagCMVA" not in branches  # earlier reconstructions still have it
        self.simulated = "genWeight" in branches or "run" not in branches
        self.era, self.tagger, self.working_point = self._era(options.era, branches)
        weight = "genWeight" if "genWeight" in branches and options.weight is None else options.weight
        if weight and weight not in branches:
            raise DataError(f"{path}: no branch {weight}")
        self.id_branches = [b for b in ("run", "luminosityBlock", "event") if b in branches and "event" in branches]
        self.columns = {role: name for role, name in (("weight", weight), ("id", ":".join(self.id_branches))) if name}
        optional = [f"{c}_mass" for c in ("Electron", "Muon")] + ["Jet_jetId"]
        self.branches = [*required, *(b for b in optional if b in branches), f"Jet_btag{self.tagger}",
                         *self.id_branches, *([weight] if weight else [])]
        self.schema = replace(hep64.SCHEMA, name=f"{hep64.SCHEMA.name}/{self.tagger}")

    def pieces(self, step: str | int) -> Iterator[Events]:
        from ebm.readers.root import entries

        first = 0
        for a in entries(self.path, self.tree, self.branches, step, "ak"):
            events = self._events(a, first)
            first += len(events)
            yield events

    def check(self, events: Events) -> None:
        """Event numbers of simulation start again in every sample: nothing to check."""

    def _events(self, a: ak.Array, first: int) -> Events:
        for name in self.branches:
            self._require_finite(a[name], name, first)
        self._require_same_counts(a, first)
        if not self.simulated:
            self._require_one_era(a["run"].to_numpy(), first)
        x = hep64.features(self.objects(a))
        numbers = [a[name].to_numpy().tolist() for name in self.id_branches]
        event_id = [":".join(map(str, row)) for row in zip(*numbers)] if numbers else first + np.arange(len(x))
        weight = None
        if name := self.columns.get("weight"):
            if a[name].ndim != 1:
                raise DataError(f"{self.path}, branch {name}: expected one weight per event, given {a[name].type}")
            weight = a[name].to_numpy().astype(np.float64)
        return Events(self.schema, x, np.array(event_id).astype(str), weight=weight, source=str(self.path),
                      has_id=bool(numbers))

    def objects(self, a: ak.Array) -> Objects:
        """Electrons and muons, then photons and last jets that no kept object of higher priority is near."""
        import awkward as ak

        pt, eta = ({c: a[f"{c}_{v}"] for c in _COLLECTIONS} for v in ("pt", "eta"))
        central = {c: abs(eta[c]) < limit for c, limit in (("Electron", 2.5), ("Muon", 2.4), ("Photon", 2.5),
                                                           ("Jet", 4.7))}  # fmt: skip
        ids = {c: a[name] >= 2 if name.endswith("cutBased") else a[name] for c, name in self.ids.items()}
        electrons = self._collection(a, "Electron", ELECTRON, (pt["Electron"] > 10) & central["Electron"]
                                     & ids["Electron"])  # fmt: skip
        muons = self._collection(a, "Muon", MUON, (pt["Muon"] > 10) & central["Muon"] & ids["Muon"]
                                 & (a["Muon_pfRelIso04_all"] < 0.25))  # fmt: skip
        kept = ak.concatenate([electrons, muons], axis=1)
        photons = self._collection(a, "Photon", PHOTON, (pt["Photon"] > 20) & central["Photon"] & ids["Photon"]
                                   & a["Photon_electronVeto"])  # fmt: skip
        kept = ak.concatenate([kept, _apart(photons, kept)], axis=1)
        identified = a["Jet_jetId"] >= 2 if "Jet_jetId" in a.fields else True
        jets = self._collection(a, "Jet", JET, (pt["Jet"] > 30) & central["Jet"] & identified)
        kept = ak.concatenate([kept, _apart(jets, kept)], axis=1)

        n = ak.num(kept).to_numpy()
        present = np.arange(n.max(initial=1)) < n[:, None]

        def padded(name: str) -> np.ndarray:
            out = np.zeros(present.shape)
            out[present] = ak.flatten(getattr(kept, name)).to_numpy()
            return out

        columns = {name: padded(name) for name in ("pt", "eta", "phi", "mass", "btag")}
        met_pt, met_phi = (a[name].to_numpy() for name in self.met)
        return Objects(**columns, kind=padded("kind").astype(np.int8), met_pt=met_pt, met_phi=met_phi,
                       btag_working_point=self.working_point)

    def _collection(self, a: ak.Array, name: str, kind: int, selected: ak.Array) -> ak.Array:
        import awkward as ak
        import vector

        fields = {v: a[f"{name}_{v}"] for v in ("pt", "eta", "phi")}
        nothing = ak.zeros_like(fields["pt"])
        fields["mass"] = a[f"{name}_mass"] if f"{name}_mass" in a.fields else nothing
        fields["btag"] = a[f"Jet_btag{self.tagger}"] if kind == JET else nothing
        fields["kind"] = ak.full_like(nothing, kind, dtype=np.int8)
        return vector.zip({v: values[selected] for v, values in fields.items()})

    def _era(self, given: str | None, branches: set[str]) -> tuple[str, str, float]:
        """Era, tagger and its medium working point."""
        here = [t for t in TAGGERS if f"Jet_btag{t}" in branches]
        known = dict.fromkeys(era for t in here for era, points in MEDIUM.items() if t in points)
        if not here:
            raise DataError(f"{self.path}: no b-tagger, expected one of the branches "
                            f"{', '.join(f'Jet_btag{t}' for t in TAGGERS)}")
        tagger, colon, number = (given or "").partition(":")
        if colon:
            try:
                point = float(number)
            except ValueError:
                point = np.nan
            if f"Jet_btag{tagger}" not in branches or not 0 < point < 1:
                raise DataError(f"{self.path}: era {given!r}: expected TAGGER:POINT with a tagger of the file "
                                f"({', '.join(here)}) and a working point between 0 and 1")
            return given, tagger, point
        era = given
        if era is None and not self.simulated:
            run = int(self.tree["run"].array(entry_stop=1, library="np")[0])
            era = era_of_run(run, self.ultra_legacy)
        if era is None:
            what = "simulation does not say its era" if self.simulated else f"run {run} is of no era that is known here"
            error = UnknownEra(f"{self.path}: {what}, and its b-tagging working point depends on it: give the option "
                               f"'era', one of {', '.join(known)}, or tagger and point as in {here[0]}:0.3")
            error.eras = (*known, f"{here[0]}:0.5")
            raise error
        tagger = next((t for t in TAGGERS if t in here and t in MEDIUM.get(era, ())), None)
        if tagger is None:
            raise DataError(f"{self.path}: era {era!r}: expected one with a working point for a tagger of this file "
                            f"({', '.join(here)}): {', '.join(known)}")
        return era, tagger, MEDIUM[era][tagger]

    def _require_one_era(self, runs: np.ndarray, first: int) -> None:
        if self.era not in MEDIUM or ":" in self.era:
            return
        for run in np.unique(runs):
            era = era_of_run(int(run), self.ultra_legacy)
            if era not in (self.era, None):
                entry = first + int(np.flatnonzero(runs == run)[0])
                raise DataError(f"{self.path}, branch run, entry {entry}: run {run} is of era {era}, the file was read "
                                f"as {self.era}; eras have their own working points and are not mixed")

    def _require_same_counts(self, a: ak.Array, first: int) -> None:
        import awkward as ak

        counts = {name: ak.num(a[name]).to_numpy() for name in self.branches if a[name].ndim > 1}
        for name, n in counts.items():
            expected = counts[f"{name.partition('_')[0]}_pt"]
            if (n != expected).any():
                entry = int(np.flatnonzero(n != expected)[0])
                raise DataError(f"{self.path}, branch {name}, entry {first + entry}: expected {expected[entry]} values "
                                f"as in the collection's pt, given {n[entry]}")

    def _require_finite(self, values: ak.Array, name: str, first: int) -> None:
        import awkward as ak

        flat = ak.flatten(values, axis=None).to_numpy()
        bad = np.isinf(flat) if "btag" in name else ~np.isfinite(flat)  # a jet may have no b-tag
        if bad.any():
            position = int(np.flatnonzero(bad)[0])
            entry = position if values.ndim == 1 else int(np.searchsorted(np.cumsum(ak.num(values)), position, "right"))
            raise DataError(f"{self.path}, branch {name}, entry {first + entry}: expected a finite number, given "
                            f"{flat[position]}")


def _apart(objects: ak.Array, kept: ak.Array) -> ak.Array:
    """The objects that are further than dR = 0.4 from every kept one."""
    import awkward as ak

    one, other = ak.unzip(ak.cartesian([objects, kept], axis=1, nested=True))
    return objects[ak.all(one.deltaR(other) > _CLEAN, axis=2)]
