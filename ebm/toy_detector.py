"""The toy's radiation, decays and detector: from partons to reconstructed objects.

No step depends on which events are generated together, not even through the width of an array.
"""

from __future__ import annotations

import numpy as np

from ebm.hep64 import ELECTRON, JET, MUON, NONE, PHOTON, Objects
from ebm.toy_random import Draws

LIGHT, CHARM, BOTTOM = JET, JET + 1, JET + 2  # jet flavours; NONE also stands for what no detector sees
_B_TAG_MEDIUM = 0.44  # 1% of light jets, 18% of charm and 81% of b-jets lie above it


def radiate(rng: Draws, p: np.ndarray, flavour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add initial-state jets, from which the hard system (n, P, 4) recoils; its jets split twice at wide angle."""
    n, slots = len(p), 10
    pt = np.minimum(20 * (1 - rng.random((n, slots))) ** -0.5, 400)
    rapidity = within_beam_energy(rng.normal(0, 2, (n, slots)), pt)
    isr = momentum(pt, rapidity, rng.uniform(-np.pi, np.pi, (n, slots)))
    present = np.arange(slots) < rng.poisson(rng.gamma(1.5, 1.6, n), slots)[:, None]
    isr *= present[:, :, None]
    recoil = -isr.sum(axis=1)[:, 1:] / p[:, :, 0].sum(axis=1)[:, None]
    recoil[:, 2] = 0
    p = boost(p, recoil)
    if p.shape[1] < 16:  # soft particles do not split further
        for _ in range(2):
            p, flavour = _split(rng, p, flavour)
    isr_flavour = np.where(present, jet_flavours(rng, (n, slots)), NONE)
    return np.concatenate([p, isr], axis=1), np.concatenate([flavour, isr_flavour], axis=1)


def _split(rng: Draws, p: np.ndarray, flavour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half of the jets radiate a share z of their pT, dN/dz ~ 1/z, at 0.2 < dR < 1.2: (n, P, 4) -> (n, 2 P, 4)."""
    pt, eta, phi = cylindrical(p)
    z = 0.03 * (0.5 / 0.03) ** rng.random(pt.shape) * ((flavour >= JET) & (rng.random(pt.shape) < 0.5))
    dr, angle = 0.2 * 6 ** rng.random(pt.shape), rng.uniform(-np.pi, np.pi, pt.shape)
    deta, dphi = dr * np.cos(angle), dr * np.sin(angle)
    mother = momentum((1 - z) * pt, eta - z * deta, phi - z * dphi)
    emitted = momentum(z * pt, eta + (1 - z) * deta, phi + (1 - z) * dphi)
    return np.concatenate([mother, emitted], axis=1), np.concatenate([flavour, np.where(z > 0, LIGHT, NONE)], axis=1)


def detect(rng: Draws, p: np.ndarray, flavour: np.ndarray) -> Objects:
    """What a detector makes of partons (n, P, 4): clustered, smeared, identified and selected objects, and MET."""
    p, flavour = _cluster(p, flavour)
    shape = flavour.shape
    pt, eta, phi = cylindrical(p)
    u = rng.random(shape)  # a jet is seldom taken for a photon or a lepton; leptons are sometimes not identified
    is_jet = flavour >= JET
    kind = np.where(is_jet, np.select([u < 0.002, u < 0.0025, u < 0.003], [PHOTON, ELECTRON, MUON], JET), flavour)
    kind[(kind == ELECTRON) & (u > 0.85) & ~is_jet] = JET
    kind[(kind == MUON) & (u > 0.95) & ~is_jet] = NONE

    parton_mass = np.sqrt(np.maximum(p[..., 0] ** 2 - (p[..., 1:] ** 2).sum(axis=-1), 0))
    resolution = np.where(kind == JET, np.sqrt(0.8**2 / np.maximum(pt, 1) + 0.05**2), 0.015)
    response = np.maximum(1 + resolution * rng.normal(0, 1, shape), 0.05)
    mass = np.hypot(parton_mass, 0.1 * pt * np.exp(rng.normal(0, 0.3, shape))) * response * (kind == JET)
    angular = np.where(kind == JET, 0.02, 0.001)
    pt = pt * response * (kind != NONE)
    eta, phi = eta + angular * rng.normal(0, 1, shape), phi + angular * rng.normal(0, 1, shape)

    # Everything in the calorimeters enters the MET, objects below threshold too, with noise from the underlying event.
    seen = pt * (np.abs(eta) < 4.7)
    noise = rng.normal(0, 1, (len(p), 2)).T * np.sqrt(10**2 + 0.5**2 * seen.sum(axis=1))
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
    p, flavour = np.take_along_axis(p, order[:, :, None], axis=1), np.take_along_axis(flavour, order, axis=1)
    pt, eta, phi = cylindrical(p)
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


def momentum(pt: np.ndarray, eta: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Massless (E, px, py, pz), on a new last axis."""
    return np.stack([pt * np.cosh(eta), pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta)], axis=-1)


def cylindrical(p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pt = np.hypot(p[..., 1], p[..., 2])
    return pt, np.arcsinh(p[..., 3] / np.maximum(pt, 1e-9)), np.arctan2(p[..., 2], p[..., 1])


def boost(p: np.ndarray, beta_gamma: np.ndarray) -> np.ndarray:
    """Boost the momenta (n, P, 4) of each event by its beta gamma (n, 3)."""
    gamma = np.sqrt(1 + (beta_gamma**2).sum(axis=1))[:, None]
    along = np.einsum("nic,nc->ni", p[..., 1:], beta_gamma)
    space = p[..., 1:] + beta_gamma[:, None, :] * (along / (gamma + 1) + p[..., 0])[..., None]
    return np.concatenate([(gamma * p[..., 0] + along)[..., None], space], axis=2)


def decay(rng: Draws, parent: np.ndarray, m1: float, m2: np.ndarray | float) -> np.ndarray:
    """Isotropic two-body decay of parents (n, 4): (n, 2, 4)."""
    mass = np.sqrt(parent[:, 0] ** 2 - (parent[:, 1:] ** 2).sum(axis=1))
    k = np.sqrt((mass**2 - (m1 + m2) ** 2) * (mass**2 - (m1 - m2) ** 2)) / (2 * mass)
    direction = k[:, None] * rng.isotropic((len(parent),))
    first = np.concatenate([np.hypot(k, m1)[:, None], direction], axis=1)
    second = np.concatenate([np.hypot(k, m2)[:, None], -direction], axis=1)
    return boost(np.stack([first, second], axis=1), parent[:, 1:] / mass[:, None])


def within_beam_energy(rapidity: np.ndarray, mt: np.ndarray) -> np.ndarray:
    """Bend the rapidity so that mt exp(|y|) stays below 6.5 TeV: hard collisions are central."""
    limit = np.log(6500 / mt)
    return limit * np.tanh(rapidity / limit)


def jet_flavours(rng: Draws, shape: tuple[int, ...]) -> np.ndarray:
    u = rng.random(shape)
    return np.select([u < 0.89, u < 0.96], [LIGHT, CHARM], BOTTOM)
