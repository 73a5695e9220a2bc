"""The registry: what runs here, what does not and why, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import metadata
from types import SimpleNamespace

import pytest
from scorers import events, model

import kernels
from ebm.bundle import Bundle
from ebm.events import DataError
from kernels import BACKENDS, load_scorer, registry


def test_import_is_light():
    code = "import sys, kernels; print([m for m in ('torch', 'numba', 'triton', 'scipy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_distribution_does_not_claim_the_name_kernels():
    """PyPI's `kernels` is another project, which transformers looks for by distribution name."""
    assert metadata("fused-ebm")["Name"] == "fused-ebm"
    assert kernels.__file__.endswith("kernels/__init__.py")


def test_auto_says_what_it_chose(monkeypatch, caplog):
    pytest.importorskip("kernels._native", reason="the C++ library was not built")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with caplog.at_level("INFO", "fused_ebm"):
        scorer = load_scorer(model(5, 64, 1))
    assert scorer.name == "native"
    assert "not triton: it would run in the interpreter" in caplog.text
    assert "not triton" in repr(scorer)


def test_auto_falls_to_the_next_with_the_reason(monkeypatch):
    monkeypatch.setitem(BACKENDS, "native", replace(BACKENDS["native"], why_not=lambda: "it was not built"))
    scorer = load_scorer(model(5, 64, 1))
    assert scorer.name == "numba"
    assert "not native: it was not built" in scorer.chosen_because


def test_named_backend_that_cannot_run_raises(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="backend 'native' cannot run: the C\\+\\+ library was not built"):
        load_scorer(model(5, 64, 1), "native")
    with pytest.raises(ValueError, match="backend is 'cuda', expected 'auto', 'triton'"):
        load_scorer(model(5, 64, 1), "cuda")


@pytest.mark.parametrize("kind", ["score", "autoencoder"])
def test_other_kinds_run_on_the_reference(kind):
    bundle = Bundle.random(5, 64, 1, kind=kind)
    assert load_scorer(bundle).name == "reference"
    with pytest.raises(RuntimeError, match="computes energy models, this one is of kind"):
        load_scorer(bundle, "native")
    energy, score = load_scorer(bundle).energy_and_score(abs(events(3, 5, seed=9)))
    assert energy.shape == (3,)
    assert score.shape == (3, 5)
    assert load_scorer(bundle).energies(abs(events(3, 5, seed=9))).shape == (3, bundle.n_levels)


def test_threshold_and_missing_model(tmp_path):
    with pytest.raises(ValueError, match="no threshold: calibrate it first"):
        load_scorer(model(5, 64, 1)).flag(events(2, 5))
    with pytest.raises(DataError, match="no such model directory"):
        load_scorer(tmp_path / "nothing")
    with pytest.raises(ValueError, match="on_nonfinite is 'ignore'"):
        load_scorer(model(5, 64, 1), on_nonfinite="ignore")


def test_no_reduced_precision_without_its_report(monkeypatch):
    bundle = model(5, 64, 1)
    monkeypatch.setitem(BACKENDS, "native", replace(BACKENDS["native"], why_not=lambda: None))
    for backend in ("native", "auto"):
        with pytest.raises(ValueError, match=r"'int8' is offered only .* has none: run 'python -m kernels calibrate"):
            load_scorer(bundle, backend, precision="int8")
        other = replace(bundle, reports={p: {"model_digest": "0" * 64, "threshold": None} for p in ("int8", "int16")})
        with pytest.raises(ValueError, match="of another model or threshold: run 'python -m kernels calibrate"):
            load_scorer(other, backend, precision="int8")


def test_auto_takes_a_reduced_precision_only_when_asked(monkeypatch):
    class Recorded(SimpleNamespace):
        def __init__(self, bundle, **options):
            super().__init__(**options)

    monkeypatch.setattr(type(BACKENDS["native"]), "load", lambda backend: Recorded)
    monkeypatch.setitem(BACKENDS, "native", replace(BACKENDS["native"], why_not=lambda: None))
    monkeypatch.setitem(BACKENDS, "triton", replace(BACKENDS["triton"], why_not=lambda: None))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    bundle = model(5, 64, 1)
    reported = replace(bundle, reports={"int8": {"model_digest": bundle.digest, "threshold": None}})
    asked = load_scorer(reported, precision="int8")
    assert asked.precision == "int8"
    assert asked.chosen_because == "the fastest that runs here in int8; not triton: it has no precision int8"
    for unasked in (load_scorer(reported), load_scorer(reported, precision="fp32"), load_scorer(reported, "native")):
        assert not hasattr(unasked, "precision")  # the backend's own default: fp32
    monkeypatch.setitem(BACKENDS, "native", replace(BACKENDS["native"], why_not=lambda: "it was not built"))
    with pytest.raises(RuntimeError, match=r"no backend can run in int8: .*not native: it was not built"):
        load_scorer(reported, precision="int8")


def test_a_precision_that_nobody_has():
    bundle = model(5, 64, 1)
    everything = "'fp32', 'tf32x3', 'tf32', 'fp16', 'bf16', 'int16', 'int8', 'fp64'"
    with pytest.raises(ValueError, match=f"'int4', the backends have {everything}"):
        load_scorer(bundle, precision="int4")
    with pytest.raises(ValueError, match="'int8', backend 'reference' has 'fp64', 'fp32'"):
        load_scorer(bundle, "reference", precision="int8")
    assert load_scorer(bundle, "numba", precision="fp32").precision == "fp32"
    assert load_scorer(bundle, precision="fp64").name == "reference"


def test_list_of_backends():
    out = subprocess.check_output([sys.executable, "-m", "kernels"], text=True)
    for name in BACKENDS:
        assert name in out
