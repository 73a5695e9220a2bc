"""Toy collisions with the `hep64-v1` features: four kinds of background and four kinds of signal.

    qcd      two jets back to back with a falling pT spectrum, and their radiation            background
    ttbar    t -> b W, W -> q q' or l nu, decayed and boosted exactly                         background
    wjets    W -> l nu that recoils from a jet                                                background
    zjets    Z -> nu nu or l l that recoils from a jet                                        background
    dijet    a 2.5 TeV resonance that decays into two jets                                    signal
    soft     a mediator of 0.6-1.2 TeV that ends in tens of soft, isotropic particles         signal
    boosted  a 2 TeV resonance -> H H -> 4 b, each H so fast that its b-quarks are one jet    signal
    monojet  a heavy invisible particle that recoils from one hard jet                        signal

Partons are four-momenta (E, px, py, pz) in GeV with a flavour code; the detector clusters, smears and
selects them. The spectra are plausible, not tuned: the toy is for tests and examples.

Event i of a process is the same however many are generated, and from wherever: all its numbers come from the seed, the
process and i.
"""

from __future__ import annotations

import hashlib

import numpy as np

from ebm import hep64
from ebm.events import DataError, Events
from ebm.hep64 import ELECTRON, JET, MUON, NONE
from ebm.toy_detector import (
    BOTTOM,
    CHARM,
    LIGHT,
    boost,
    decay,
    detect,
    jet_flavours,
    momentum,
    radiate,
    within_beam_energy,
)
from ebm.toy_random import Draws

VERSION = "toy-2"  # part of the digest: raise it with any change of the physics below
SIGNALS = ("dijet", "soft", "boosted", "monojet")
PROCESSES = ("qcd", "ttbar", "wjets", "zjets", *SIGNALS)
RESONANCE_MASS = 2500.0
BOSON_MASS = 125.0

_TOP_MASS, _W_MASS, _Z_MASS = 172.5, 80.4, 91.2
_CHUNK = 20_000


def generate(process: str, n: int, seed: int = 0, start: int = 0) -> Events:
    """Events start, ..., start + n - 1 of one process, the same for the same seed whatever `start` and `n`."""
    if process not in PROCESSES:
        raise DataError(f"unknown process {process!r}, expected one of {', '.join(PROCESSES)}")
    if n < 0 or start < 0:
        raise DataError(f"{n} events of {process!r} from event {start} on asked for, expected 0 or more of each")
    code = PROCESSES.index(process)
    x = np.empty((n, hep64.SCHEMA.n_features), np.float32)
    for first in range(0, n, _CHUNK):
        rng = Draws(seed, code, start + first, min(_CHUNK, n - first))
        hard, flavour = _HARD_PROCESS[process](rng)
        x[first : first + rng.n] = hep64.features(detect(rng, *radiate(rng, hard, flavour)))
    event_id = np.array([f"1:{code}:{i}" for i in range(start, start + n)], dtype=str)
    label, name = np.full(n, process in SIGNALS, np.int8), np.full(n, process)
    origin = {"source": f"toy {process}", "digest": _digest(process, n, seed, start)}
    return Events(hep64.SCHEMA, x, event_id, label, process=name, **origin)


def toy(n_background: int = 200_000, n_signal: int = 4_000, seed: int = 0) -> Events:
    """A shuffled mixture: background 70% qcd, 15% ttbar, 10% wjets and 5% zjets; a quarter of each kind of signal."""
    numbers = {"ttbar": n_background * 15 // 100, "wjets": n_background // 10, "zjets": n_background // 20}
    numbers = {"qcd": n_background - sum(numbers.values())} | numbers
    numbers |= {name: (n_signal + i) // len(SIGNALS) for i, name in enumerate(SIGNALS)}
    samples = [generate(process, n, seed) for process, n in numbers.items()]
    order = np.random.default_rng([seed, len(PROCESSES)]).permutation(n_background + n_signal)
    columns = zip(*((sample.x, sample.event_id, sample.label, sample.process) for sample in samples))
    x, event_id, label, name = (np.concatenate(column)[order] for column in columns)
    origin = {"source": f"toy:{n_background}+{n_signal}", "digest": _digest(n_background, n_signal, seed)}
    return Events(hep64.SCHEMA, x, event_id, label, process=name, **origin)


def _digest(*parameters: object) -> str:
    return hashlib.sha256(repr((VERSION, *parameters)).encode()).hexdigest()[:16]


def _qcd(rng: Draws) -> tuple[np.ndarray, np.ndarray]:
    """As every hard process: (n, P, 4) momenta, whose transverse momenta add up to zero, and (n, P) flavours."""
    pt = np.minimum(120 * (1 - rng.random(rng.n)) ** (-1 / 3.5), 4000)  # dN/dpT ~ pT^-4.5
    common, opening, phi = (rng.normal(0, 1, rng.n), rng.normal(0, 1, rng.n), rng.uniform(-np.pi, np.pi, rng.n))
    eta = np.stack([common + opening, common - opening], axis=1)
    hard = momentum(pt[:, None], within_beam_energy(eta, pt[:, None]), np.stack([phi, phi + np.pi], axis=1))
    return hard, jet_flavours(rng, (rng.n, 2))


def _resonance(rng: Draws, mass: float) -> np.ndarray:
    """Produced at rest in the transverse plane, (n, 4), 1% wide."""
    mass = mass * (1 + 0.01 * np.clip(rng.cauchy(rng.n), -20, 20))
    rapidity = rng.normal(0, 0.4, rng.n)
    return np.stack([mass * np.cosh(rapidity), 0 * mass, 0 * mass, mass * np.sinh(rapidity)], axis=1)


def _dijet(rng: Draws) -> tuple[np.ndarray, np.ndarray]:
    return decay(rng, _resonance(rng, RESONANCE_MASS), 0.0, 0.0), jet_flavours(rng, (rng.n, 2))


def _boosted(rng: Draws) -> tuple[np.ndarray, np.ndarray]:
    bosons = decay(rng, _resonance(rng, 2000.0), BOSON_MASS, BOSON_MASS)
    quarks = [decay(rng, bosons[:, i], 4.8, 4.8) for i in range(2)]
    return np.concatenate(quarks, axis=1), np.full((rng.n, 4), BOTTOM)


def _ttbar(rng: Draws) -> tuple[np.ndarray, np.ndarray]:
    n = rng.n
    pt, phi = rng.gamma(2, 55, n), rng.uniform(-np.pi, np.pi, n)
    common, opening = rng.normal(0, 0.8, n), rng.normal(0, 0.6, n)
    momenta, flavours = [], []
    for sign, azimuth in ((1, phi), (-1, phi + np.pi)):
        mass = rng.normal(_TOP_MASS, 1.4, n)
        top = _massive(mass, pt, common + sign * opening, azimuth)
        b_and_w = decay(rng, top, 4.8, _w_mass(rng))
        w_products = decay(rng, b_and_w[:, 1], 0.0, 0.0)
        hadronic, quark = rng.random(n) < 0.676, np.where(rng.random(n) < 0.5, LIGHT, CHARM)
        lepton, visible = _lepton(rng)
        w_products[:, 0] *= np.where(hadronic, 1.0, visible)[:, None]
        momenta += [b_and_w[:, :1], w_products]
        pair = np.stack([np.where(hadronic, quark, lepton), np.where(hadronic, LIGHT, NONE)], axis=1)
        flavours += [np.full((n, 1), BOTTOM), pair]
    return np.concatenate(momenta, axis=1), np.concatenate(flavours, axis=1)


def _wjets(rng: Draws) -> tuple[np.ndarray, np.ndarray]:
    boson, jet = _boson_and_jet(rng, _w_mass(rng), 25.0, 2.5)
    products = decay(rng, boson, 0.0, 0.0)
    lepton, visible = _lepton(rng)
    products[:, 0] *= visible[:, None]
    flavour = np.stack([lepton, np.full(rng.n, NONE)], axis=1)
    return np.concatenate([products, jet], axis=1), np.concatenate([flavour, jet_flavours(rng, (rng.n, 1))], axis=1)


def _zjets(rng: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Z -> nu nu is twice as frequent as to all three charged leptons together."""
    mass = _Z_MASS + 1.25 * np.clip(rng.cauchy(rng.n), -15, 15)
    boson, jet = _boson_and_jet(rng, mass, 25.0, 2.5)
    products, charged = decay(rng, boson, 0.0, 0.0), rng.random(rng.n) > 2 / 3
    (first, seen), (second, seen_too) = _lepton(rng), _lepton(rng)
    electron_or_muon = (first < JET) & (seen == 1)  # the other one is then of the same kind
    second, seen_too = np.where(electron_or_muon, first, second), np.where(electron_or_muon, 1.0, seen_too)
    products *= np.stack([seen, seen_too], axis=1)[:, :, None]
    flavour = np.where(charged[:, None], np.stack([first, second], axis=1), NONE)
    return np.concatenate([products, jet], axis=1), np.concatenate([flavour, jet_flavours(rng, (rng.n, 1))], axis=1)


def _monojet(rng: Draws) -> tuple[np.ndarray, np.ndarray]:
    invisible, jet = _boson_and_jet(rng, np.full(rng.n, 500.0), 200.0, 3.0)
    flavour = np.concatenate([np.full((rng.n, 1), NONE), jet_flavours(rng, (rng.n, 1))], axis=1)
    return np.concatenate([invisible[:, None], jet], axis=1), flavour


def _boson_and_jet(rng: Draws, mass: np.ndarray, least_pt: float, power: float) -> tuple[np.ndarray, np.ndarray]:
    """A particle (n, 4) and the jet (n, 1, 4) that it recoils from; the spectrum falls as pT^-(1 + power)."""
    pt = np.minimum(least_pt * (1 - rng.random(rng.n)) ** (-1 / power), 3000)
    common, opening, phi = rng.normal(0, 1, rng.n), rng.normal(0, 0.8, rng.n), rng.uniform(-np.pi, np.pi, rng.n)
    jet = momentum(pt, within_beam_energy(common - opening, pt), phi + np.pi)
    return _massive(mass, pt, common + opening, phi), jet[:, None]


def _massive(mass: np.ndarray, pt: np.ndarray, rapidity: np.ndarray, phi: np.ndarray) -> np.ndarray:
    mt = np.hypot(mass, pt)
    rapidity = within_beam_energy(rapidity, mt)
    return np.stack([mt * np.cosh(rapidity), pt * np.cos(phi), pt * np.sin(phi), mt * np.sinh(rapidity)], axis=1)


def _w_mass(rng: Draws) -> np.ndarray:
    return _W_MASS + 1.04 * np.clip(rng.cauchy(rng.n), -15, 15)


def _lepton(rng: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Flavour (n,) of a charged lepton, a third of each, and the share (n,) of it that is seen: taus decay."""
    u, v = 3 * rng.random(rng.n), rng.random(rng.n)
    tau_product = np.where(v < 0.65, LIGHT, np.where(v < 0.825, ELECTRON, MUON))
    visible = np.where(u > 2, rng.uniform(0.2, np.where(v < 0.65, 1.0, 0.7), rng.n), 1.0)
    return np.where(u > 2, tau_product, np.where(u < 1, ELECTRON, MUON)), visible


def _soft(rng: Draws, slots: int = 48) -> tuple[np.ndarray, np.ndarray]:
    n = rng.n
    mass, rapidity = rng.uniform(600, 1200, n), rng.normal(0, 0.7, n)
    present = np.arange(slots) < np.maximum(rng.poisson(np.full(n, 30.0), slots), 10)[:, None]
    p = rng.gamma(3, 1, (n, slots))[:, :, None] * rng.isotropic((n, slots)) * present[:, :, None]
    p -= p.sum(axis=1, keepdims=True) / present.sum(axis=1)[:, None, None] * present[:, :, None]
    energy = np.linalg.norm(p, axis=2)
    p = np.concatenate([energy[:, :, None], p], axis=2) * (mass / energy.sum(axis=1))[:, None, None]
    along_beam = np.stack([0 * mass, 0 * mass, np.sinh(rapidity)], axis=1)
    return boost(p, along_beam), np.where(present, LIGHT, NONE)


_HARD_PROCESS = {"qcd": _qcd, "ttbar": _ttbar, "wjets": _wjets, "zjets": _zjets, "dijet": _dijet, "soft": _soft,
                 "boosted": _boosted, "monojet": _monojet}  # fmt: skip
