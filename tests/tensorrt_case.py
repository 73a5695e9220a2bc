"""What the tests of TensorRT share: small models of each kind, their typed graphs, and a machine that has a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import lru_cache

import numpy as np
import onnx
import torch
from fake_tensorrt import ALIGNMENT, fake_cuda
from scorers import events, preprocessing

import export.to_tensorrt as t
from ebm.bundle import Bundle, Threshold
from export import tensorrt_scorer
from export.score_graph import Options
from kernels import load_scorer

KINDS = ("energy", "score", "autoencoder")
ALL = ("energy", "score", "flag", "energies")


@lru_cache
def bundle(kind: str = "energy", features: int = 30, hidden: int = 64, layers: int = 2) -> Bundle:
    b = Bundle.random(features, hidden, layers, kind=kind, seed=3, preprocessing=preprocessing(features))
    energy = load_scorer(b, "reference").energy(events(500, features))
    return replace(b, threshold=Threshold(float(np.quantile(energy, 0.9)), 0.1, 0.95, 1, 500, 0.2, True,
                                          b.default_level))


def outputs(kind: str, precision: str) -> tuple[str, ...]:
    return tuple(o for o in ALL if not (o == "score" and kind == "autoencoder" and precision != "fp32"))


@lru_cache
def _typed(kind: str, options: Options, precision: str, typed_model=t.typed_model) -> onnx.ModelProto:
    return typed_model(bundle(kind), options, precision)


def typed(kind: str, precision: str) -> onnx.ModelProto:
    return _typed(kind, Options.of(bundle(kind), outputs=outputs(kind, precision), batch_max=1), precision)


def install(monkeypatch, tmp_path, fake, capability="sm90"):
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(t, "this_gpu", lambda: ("NVIDIA H100 80GB HBM3", capability, "12.8"))
    monkeypatch.setattr(t, "typed_model", lambda b, options, precision: _typed(
        b.architecture.kind, replace(options, batch_max=1), precision))
    monkeypatch.setattr(tensorrt_scorer, "this_gpu", t.this_gpu)
    monkeypatch.setattr(tensorrt_scorer, "ALIGNMENT", ALIGNMENT)
    monkeypatch.setattr(tensorrt_scorer, "_device", lambda: torch.device("cpu"))
    fake_cuda(monkeypatch, fake)
    return fake
