"""Toy collisions with the `hep64-v1` features: multijet and top-pair background, two kinds of signal.

    qcd     two jets back to back with a falling pT spectrum, and their radiation       background
    ttbar   t -> b W, W -> q q' or l nu, decayed and boosted exactly                    background
    dijet   a 2.5 TeV resonance that decays into two jets                               signal
    soft    a mediator of 0.6-1.2 TeV that ends in tens of soft, isotropic particles    signal

Partons are four-momenta (E, px, py, pz) in GeV with a flavour code; the detector clusters, smears and
selects them. The spectra are plausible, not tuned: the toy is for tests and examples.
"""

from __future__ import annotations

import hashlib

import numpy as np

from ebm import hep64
from ebm.events import DataError, Events
from ebm.hep64 import ELECTRON, JET, MUON, NONE, PHOTON, Objects

VERSION = "toy-1"  # part of the digest: raise it with any change of the physics below
PROCESSES = ("qcd", "ttbar", "dijet", "soft")
SIGNALS = ("dijet", "soft")
RESONANCE_MASS = 2500.0

LIGHT, CHARM, BOTTOM = JET, JET + 1, JET + 2  # jet flavours; NONE also stands for what no detector sees
_TOP_MASS, _W_MASS = 172.5, 80.4
_B_TAG_MEDIUM = 0.44  # 1% of light jets, 18% of charm and 81% of b-jets lie above it
_CHUNK = 20_000


def generate(process: str, n: int, seed: int = 0) -> Events:
    """n events of one process, the same for the same arguments."""
    if process not in PROCESSES:
        raise DataError(f"unknown process {process!r}, expected one of {', '.join(PROCESSES)}")
    if n < 0:
        raise DataError(f"{n} events of {process!r} asked for, expected 0 or more")
    code = PROCESSES.index(process)
    x = np.empty((n, hep64.SCHEMA.n_features), np.float32)
    for start in range(0, n, _CHUNK):
        rng = np.random.default_rng([seed, code, start])
        hard, flavour = _HARD_PROCESS[process](rng, min(_CHUNK, n - start))
        x[start : start + _CHUNK] = hep64.features(detect(rng, *radiate(rng, hard, flavour)))
    event_id = np.array([f"1:{code}:{i}" for i in range(n)], dtype=str)
    label, name = np.full(n, process in SIGNALS, np.int8), np.full(n, process)
    origin = {"source": f"toy {process}", "digest": _digest(process, n, seed)}
    return Events(hep64.SCHEMA, x, event_id, label, process=name, **origin)


def toy(n_background: int = 200_000, n_signal: int = 4_000, seed: int = 0) -> Events:
    """A shuffled mixture: background 80% qcd and 20% ttbar, signal half dijet and half soft."""
    n_ttbar, n_soft = n_background // 5, n_signal // 2
    numbers = {"qcd": n_background - n_ttbar, "ttbar": n_ttbar, "dijet": n_signal - n_soft, "soft": n_soft}
    samples = [generate(process, n, seed) for process, n in numbers.items()]
    order = np.random.default_rng([seed, len(PROCESSES)]).permutation(n_background + n_signal)
    columns = zip(*((sample.x, sample.event_id, sample.label, sample.process) for sample in samples))
    x, event_id, label, name = (np.concatenate(column)[order] for column in columns)
    origin = {"source": f"toy:{n_background}+{n_signal}", "digest": _digest(n_background, n_signal, seed)}
    return Events(hep64.SCHEMA, x, event_id, label, process=name, **origin)


def _digest(*parameters: object) -> str:
    return hashlib.sha256(repr((VERSION, *parameters)).encode()).hexdigest()[:16]


def _qcd(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """As every hard process: (n, P, 4) momenta, whose transverse momenta add up to zero, and (n, P) flavours."""
    pt = np.minimum(120 * (1 - rng.random(n)) ** (-1 / 3.5), 4000)  # dN/dpT ~ pT^-4.5
    boost, opening, phi = rng.normal(0, 1, n), rng.normal(0, 1, n), rng.uniform(-np.pi, np.pi, n)
    eta = np.stack([boost + opening, boost - opening], axis=1)
    hard = _momentum(pt[:, None], _within_beam_energy(eta, pt[:, None]), np.stack([phi, phi + np.pi], axis=1))
    return hard, _jet_flavours(rng, (n, 2))


def _dijet(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    mass = RESONANCE_MASS * (1 + 0.01 * np.clip(rng.standard_cauchy(n), -20, 20))
    rapidity = rng.normal(0, 0.4, n)
    resonance = np.stack([mass * np.cosh(rapidity), 0 * mass, 0 * mass, mass * np.sinh(rapidity)], axis=1)
    return _decay(rng, resonance, 0.0, 0.0), _jet_flavours(rng, (n, 2))


def _ttbar(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    pt, phi = rng.gamma(2, 55, n), rng.uniform(-np.pi, np.pi, n)
    boost, opening = rng.normal(0, 0.8, n), rng.normal(0, 0.6, n)
    momenta, flavours = [], []
    for sign, azimuth in ((1, phi), (-1, phi + np.pi)):
        mt = np.hypot(rng.normal(_TOP_MASS, 1.4, n), pt)
        rapidity = _within_beam_energy(boost + sign * opening, mt)
        transverse = pt * np.cos(azimuth), pt * np.sin(azimuth)
        top = np.stack([mt * np.cosh(rapidity), *transverse, mt * np.sinh(rapidity)], axis=1)
        w_mass = _W_MASS + 1.04 * np.clip(rng.standard_cauchy(n), -15, 15)
        b_and_w = _decay(rng, top, 4.8, w_mass)
        w_products = _decay(rng, b_and_w[:, 1], 0.0, 0.0)
        flavour, visible = _w_channel(rng, n)
        w_products[:, 0] *= visible[:, None]
        momenta += [b_and_w[:, :1], w_products]
        flavours += [np.full((n, 1), BOTTOM), flavour]
    return np.concatenate(momenta, axis=1), np.concatenate(flavours, axis=1)


def _w_channel(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Flavours (n, 2) of the W's decay products, and the share (n,) of the first that is seen."""
    u, v = rng.random(n), rng.random(n)
    hadronic, tau = u < 0.676, u > 0.892
    quark = np.where(v < 0.5, LIGHT, CHARM)
    tau_product = np.where(v < 0.65, LIGHT, np.where(v < 0.825, ELECTRON, MUON))
    lepton = np.where(tau, tau_product, np.where(u < 0.784, ELECTRON, MUON))
    visible = np.where(tau, rng.uniform(0.2, np.where(v < 0.65, 1.0, 0.7)), 1.0)
    return np.stack([np.where(hadronic, quark, lepton), np.where(hadronic, LIGHT, NONE)], axis=1), visible


def _soft(rng: np.random.Generator, n: int, slots: int = 48) -> tuple[np.ndarray, np.ndarray]:
    mass, rapidity = rng.uniform(600, 1200, n), rng.normal(0, 0.7, n)
    present = np.arange(slots) < np.clip(rng.poisson(30, n), 10, slots)[:, None]
    p = rng.gamma(3, 1, (n, slots))[:, :, None] * _isotropic(rng, (n, slots)) * present[:, :, None]
    p -= p.sum(axis=1, keepdims=True) / present.sum(axis=1)[:, None, None] * present[:, :, None]
    energy = np.linalg.norm(p, axis=2)
    p = np.concatenate([energy[:, :, None], p], axis=2) * (mass / energy.sum(axis=1))[:, None, None]
    along_beam = np.stack([0 * mass, 0 * mass, np.sinh(rapidity)], axis=1)
    return _boost(p, along_beam), np.where(present, LIGHT, NONE)


_HARD_PROCESS = {"qcd": _qcd, "ttbar": _ttbar, "dijet": _dijet, "soft": _soft}


def _within_beam_energy(rapidity: np.ndarray, mt: np.ndarray) -> np.ndarray:
    """Bend the rapidity so that mt exp(|y|) stays below 6.5 TeV: hard collisions are central."""
    limit = np.log(6500 / mt)
    return limit * np.tanh(rapidity / limit)


def _jet_flavours(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.choice([LIGHT, CHARM, BOTTOM], size=shape, p=[0.89, 0.07, 0.04])


def radiate(rng: np.random.Generator, p: np.ndarray, flavour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add initial-state jets, from which the hard system (n, P, 4) recoils; its jets split twice at wide angle."""
    n, slots = len(p), 10
    pt = np.minimum(20 * (1 - rng.random((n, slots))) ** -0.5, 400)
    rapidity = _within_beam_energy(rng.normal(0, 2, (n, slots)), pt)
    isr = _momentum(pt, rapidity, rng.uniform(-np.pi, np.pi, (n, slots)))
    present = np.arange(slots) < rng.poisson(rng.gamma(1.5, 1.6, n))[:, None]
    isr *= present[:, :, None]
    recoil = -isr.sum(axis=1)[:, 1:] / p[:, :, 0].sum(axis=1)[:, None]
    recoil[:, 2] = 0
    p = _boost(p, recoil)
    if p.shape[1] < 16:  # soft particles do not split further
        for _ in range(2):
            p, flavour = _split(rng, p, flavour)
    isr_flavour = np.where(present, _jet_flavours(rng, (n, slots)), NONE)
    return np.concatenate([p, isr], axis=1), np.concatenate([flavour, isr_flavour], axis=1)


def _split(rng: np.random.Generator, p: np.ndarray, flavour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half of the jets radiate a share z of their pT, dN/dz ~ 1/z, at 0.2 < dR < 1.2: (n, P, 4) -> (n, 2 P, 4)."""
    pt, eta, phi = _cylindrical(p)
    z = 0.03 * (0.5 / 0.03) ** rng.random(pt.shape) * ((flavour >= JET) & (rng.random(pt.shape) < 0.5))
    dr, angle = 0.2 * 6 ** rng.random(pt.shape), rng.uniform(-np.pi, np.pi, pt.shape)
    deta, dphi = dr * np.cos(angle), dr * np.sin(angle)
    mother = _momentum((1 - z) * pt, eta - z * deta, phi - z * dphi)
    emitted = _momentum(z * pt, eta + (1 - z) * deta, phi + (1 - z) * dphi)
    return np.concatenate([mother, emitted], axis=1), np.concatenate([flavour, np.where(z > 0, LIGHT, NONE)], axis=1)


def detect(rng: np.random.Generator, p: np.ndarray, flavour: np.ndarray) -> Objects:
    """What a detector makes of partons (n, P, 4): clustered, smeared, identified and selected objects, and MET."""
    p, flavour = _cluster(p, flavour)
    shape = flavour.shape
    pt, eta, phi = _cylindrical(p)
    u = rng.random(shape)  # a jet is seldom taken for a photon or a lepton; leptons are sometimes not identified
    is_jet = flavour >= JET
    kind = np.where(is_jet, np.select([u < 0.002, u < 0.0025, u < 0.003], [PHOTON, ELECTRON, MUON], JET), flavour)
    kind[(kind == ELECTRON) & (u > 0.85) & ~is_jet] = JET
    kind[(kind == MUON) & (u > 0.95) & ~is_jet] = NONE

    parton_mass = np.sqrt(np.maximum(p[..., 0] ** 2 - (p[..., 1:] ** 2).sum(axis=-1), 0))
    resolution = np.where(kind == JET, np.sqrt(0.8**2 / np.maximum(pt, 1) + 0.05**2), 0.015)
    response = np.maximum(1 + resolution * rng.standard_normal(shape), 0.05)
    mass = np.hypot(parton_mass, 0.1 * pt * rng.lognormal(0, 0.3, shape)) * response * (kind == JET)
    angular = np.where(kind == JET, 0.02, 0.001)
    pt = pt * response * (kind != NONE)
    eta, phi = eta + angular * rng.standard_normal(shape), phi + angular * rng.standard_normal(shape)

    # Everything in the calorimeters enters the MET, objects below threshold too, with noise from the underlying event.
    seen = pt * (np.abs(eta) < 4.7)
    noise = rng.standard_normal((2, len(p))) * np.sqrt(10**2 + 0.5**2 * seen.sum(axis=1))
    met_x, met_y = noise[0] - (seen * np.cos(phi)).sum(axis=1), noise[1] - (seen * np.sin(phi)).sum(axis=1)

    min_pt, max_eta = np.choose(kind, [np.inf, 10, 10, 20, 30]), np.choose(kind, [0, 2.5, 2.4, 2.5, 4.7])
    kind[(pt < min_pt) | (np.abs(eta) > max_eta)] = NONE
    u = rng.random(shape)
    btag = np.select([flavour == BOTTOM, flavour == CHARM], [np.sqrt(u), 1 - u ** (1 / 3)], 1 - u ** (1 / 8))
    btag = np.where((kind == JET) & (np.abs(eta) < 2.5), btag, 0)
    return Objects(pt, eta, phi, mass, kind, btag, np.hypot(met_x, met_y), np.arctan2(met_y, met_x), _B_TAG_MEDIUM)


def _cluster(p: np.ndarray, flavour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hardest first, collect what lies within dR < 0.4; a lepton with over 25% of its pT around it becomes a jet."""
    order = np.argsort(np.where(flavour > NONE, -np.hypot(p[..., 1], p[..., 2]), np.inf), axis=1)
    order = order[:, : (flavour > NONE).sum(axis=1).max()]
    p, flavour = np.take_along_axis(p, order[:, :, None], axis=1), np.take_along_axis(flavour, order, axis=1)
    pt, eta, phi = _cylindrical(p)
    for i in range(p.shape[1] - 1):
        rest = slice(i + 1, None)
        dphi = np.abs(phi[:, rest] - phi[:, i, None])
        dr2 = (eta[:, rest] - eta[:, i, None]) ** 2 + np.minimum(dphi, 2 * np.pi - dphi) ** 2
        near = (dr2 < 0.4**2) & (flavour[:, i, None] > NONE) & (flavour[:, rest] > NONE)
        added = np.einsum("nj,njc->nc", near, p[:, rest])
        isolated = (flavour[:, i] < JET) & (np.hypot(added[:, 1], added[:, 2]) < 0.25 * pt[:, i])
        merged = np.maximum(flavour[:, i], np.where(near, np.maximum(flavour[:, rest], JET), NONE).max(axis=1))
        flavour[:, i] = np.where(isolated, flavour[:, i], merged)
        p[:, i] += added
        flavour[:, rest][near] = NONE
    return p, flavour


def _momentum(pt: np.ndarray, eta: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Massless (E, px, py, pz), on a new last axis."""
    return np.stack([pt * np.cosh(eta), pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta)], axis=-1)


def _cylindrical(p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pt = np.hypot(p[..., 1], p[..., 2])
    return pt, np.arcsinh(p[..., 3] / np.maximum(pt, 1e-9)), np.arctan2(p[..., 2], p[..., 1])


def _isotropic(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    cos, phi = rng.uniform(-1, 1, shape), rng.uniform(-np.pi, np.pi, shape)
    sin = np.sqrt(1 - cos**2)
    return np.stack([sin * np.cos(phi), sin * np.sin(phi), cos], axis=-1)


def _boost(p: np.ndarray, beta_gamma: np.ndarray) -> np.ndarray:
    """Boost the momenta (n, P, 4) of each event by its beta gamma (n, 3)."""
    gamma = np.sqrt(1 + (beta_gamma**2).sum(axis=1))[:, None]
    along = np.einsum("nic,nc->ni", p[..., 1:], beta_gamma)
    space = p[..., 1:] + beta_gamma[:, None, :] * (along / (gamma + 1) + p[..., 0])[..., None]
    return np.concatenate([(gamma * p[..., 0] + along)[..., None], space], axis=2)


def _decay(rng: np.random.Generator, parent: np.ndarray, m1: float, m2: np.ndarray | float) -> np.ndarray:
    """Isotropic two-body decay of parents (n, 4): (n, 2, 4)."""
    mass = np.sqrt(parent[:, 0] ** 2 - (parent[:, 1:] ** 2).sum(axis=1))
    k = np.sqrt((mass**2 - (m1 + m2) ** 2) * (mass**2 - (m1 - m2) ** 2)) / (2 * mass)
    direction = k[:, None] * _isotropic(rng, (len(parent),))
    first = np.concatenate([np.hypot(k, m1)[:, None], direction], axis=1)
    second = np.concatenate([np.hypot(k, m2)[:, None], -direction], axis=1)
    return _boost(np.stack([first, second], axis=1), parent[:, 1:] / mass[:, None])
