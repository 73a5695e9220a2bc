"""A bundle as the plain arrays that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ebm.bundle import Bundle
from ebm.preprocess import Preprocessing


@dataclass(frozen=True)
class Packed:
    """C-contiguous float32. Sizes: D features, H hidden, n layers, L noise levels.

    w_in (H, D); b_in (L, H) = b_in + emb, one input bias per level; w (n, H, H) and b (n, H); w_out (H,);
    b_out; and the preprocessing, the identity where events come preprocessed.
    """

    w_in: np.ndarray
    b_in: np.ndarray
    w: np.ndarray
    b: np.ndarray
    w_out: np.ndarray
    b_out: float
    preprocessing: Preprocessing


def pack(bundle: Bundle, preprocess: bool = True) -> Packed:
    """The arrays of an energy network."""
    if bundle.architecture.kind != "energy":
        raise ValueError(f"only energy networks are packed, given kind {bundle.architecture.kind!r}")
    t, layers = bundle.tensors, range(bundle.architecture.n_layers)
    p = bundle.preprocessing if preprocess else Preprocessing.identity(bundle.architecture.input_dim)
    return Packed(
        w_in=np.ascontiguousarray(t["w_in"]), b_in=t["b_in"] + t["emb"],
        w=np.stack([t[f"w.{i}"] for i in layers]), b=np.stack([t[f"b.{i}"] for i in layers]),
        w_out=np.ascontiguousarray(t["w_out"]), b_out=float(t["b_out"][0]), preprocessing=p,
    )
