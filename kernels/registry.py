"""The backends, whether each can run here, and `load_scorer`, which picks one."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from kernels.scorer import Scorer

if TYPE_CHECKING:
    from ebm.bundle import Bundle

log = logging.getLogger("fused_ebm")

REDUCED = ("int16", "int8")  # precisions that are offered only with their physics report


@dataclass(frozen=True)
class Backend:
    """One way to compute. `why_not()` gives None where it can run on this machine, else the reason."""

    name: str
    device: str
    dtypes: tuple[str, ...]  # precisions; the first one where none is asked for
    scorer: str  # "module:Class", imported when it is first asked for
    about: str
    why_not: Callable[[], str | None]
    kinds: tuple[str, ...] = ("energy",)

    def why_not_for(self, kind: str) -> str | None:
        """The reason why a model of this kind cannot run, or None."""
        if kind not in self.kinds:
            return f"it computes {' and '.join(self.kinds)} models, this one is of kind {kind!r}"
        return self.why_not()

    def load(self) -> type[Scorer]:
        """The backend's Scorer class."""
        return _named(self.scorer)


def _triton_why_not() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'triton>=3.6,<3.10'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    from kernels.triton_gpu import why_not

    return why_not()


def _native_why_not() -> str | None:
    if find_spec("kernels._native") is None:
        return "the C++ library was not built: install g++ and cmake, unset FUSED_EBM_NATIVE, run 'make setup'"
    return None


def _numba_why_not() -> str | None:
    return None if find_spec("numba") else "numba is not installed: pip install numba"


def _reference_why_not() -> str | None:
    return None if find_spec("torch") else "torch is not installed: pip install torch"


# In order of preference.
BACKENDS = {b.name: b for b in (
    Backend("triton", "cuda", ("fp32", "tf32x3", "tf32", "fp16", "bf16"), "kernels.triton_gpu:TritonScorer",
            "one fused kernel on an NVIDIA GPU (sm_80 and newer)", _triton_why_not),
    Backend("native", "cpu", ("fp32", *REDUCED), "kernels.native_cpu:NativeScorer",
            "fused C++ kernels", _native_why_not),
    Backend("numba", "cpu", ("fp32",), "kernels.numba_cpu:NumbaScorer",
            "fused kernels compiled at first use, no compiler needed", _numba_why_not),
    Backend("reference", "cpu", ("fp64", "fp32"), "kernels.reference:ReferenceScorer",
            "PyTorch in double precision: the truth, not the fast way", _reference_why_not,
            kinds=("energy", "score", "autoencoder")),
)}


# What `python -m export` writes: the suffix of an artefact and its Scorer.
ARTEFACTS = {
    ".pt": "export.scorers:TorchScriptScorer", ".onnx": "export.scorers:OnnxScorer",
    ".pt2": "export.scorers:AOTInductorScorer", ".engine": "export.tensorrt_scorer:TensorRTScorer",
}


def load_scorer(model, backend: str = "auto", *, precision: str | None = None, preprocess: bool = True,
                on_nonfinite: str = "raise", **options) -> Scorer:
    """A Scorer for a model directory (or an `ebm.bundle.Bundle`), or for an exported file such as out/model.onnx.

    `backend` is "auto" (the fastest that runs here; the choice is logged and kept in `chosen_because`) or a
    name from `BACKENDS`; a named backend that cannot run raises RuntimeError with the reason.
    `precision` is one of the backend's `dtypes`, by default their first; "auto" takes the fastest backend that has
    it. A reduced one (`REDUCED`) is never taken unasked, and raises ValueError where the model has no physics report
    of it: 'python -m kernels calibrate' makes one.
    `preprocess=False` takes events that are preprocessed already. `on_nonfinite="propagate"` gives NaN for a
    damaged event instead of raising. Other options go to the backend (`threads=` of native and numba).
    An exported file is a backend of its own, and has its precision and its preprocessing, or none, in it.
    """
    from ebm.bundle import Bundle

    if isinstance(model, str | Path) and Path(model).suffix in ARTEFACTS and not Path(model).is_dir():
        return _load_artefact(Path(model), backend, precision, preprocess, on_nonfinite=on_nonfinite, **options)
    bundle = model if isinstance(model, Bundle) else Bundle.load(Path(model))
    kind = bundle.architecture.kind
    if backend == "auto":
        chosen, reason = _choose(kind, precision)
    elif backend in BACKENDS:
        chosen, reason = BACKENDS[backend], "named by the caller"
        if why_not := chosen.why_not_for(kind):
            raise RuntimeError(f"backend {backend!r} cannot run: {why_not}")
        _check_precision(precision, f"backend {backend!r} has", chosen)
    else:
        raise ValueError(f"backend is {backend!r}, expected 'auto', {', '.join(map(repr, BACKENDS))}")
    if precision in REDUCED:
        _check_report(bundle, precision)
    if precision not in (None, chosen.dtypes[0]):
        options["precision"] = precision
    scorer = chosen.load()(bundle, preprocess=preprocess, on_nonfinite=on_nonfinite, **options)
    scorer.chosen_because = reason
    if backend == "auto":
        log.info("%s", scorer)
    return scorer


def _load_artefact(path: Path, backend: str, precision: str | None, preprocess: bool, **options) -> Scorer:
    if backend != "auto":
        raise ValueError(f"backend is {backend!r}, expected 'auto': {path} is run by the runtime that it was made for")
    scorer = _named(ARTEFACTS[path.suffix])(path, **options)
    if precision not in (None, scorer.precision):
        raise ValueError(f"precision is {precision!r}, {path} has {scorer.precision!r}")
    if scorer.preprocess and not preprocess:
        raise ValueError(f"{path} was exported with its preprocessing: export it again with --no-preprocess")
    return scorer


def _named(lazy: str) -> type[Scorer]:
    """The class of a "module:Class"."""
    module, name = lazy.split(":")
    return getattr(importlib.import_module(module), name)


def _choose(kind: str, precision: str | None) -> tuple[Backend, str]:
    _check_precision(precision, "the backends have", *BACKENDS.values())
    passed_over, asked = [], "" if precision is None else f" in {precision}"
    for b in BACKENDS.values():
        has_it = precision is None or precision in b.dtypes
        why_not = b.why_not_for(kind) if has_it else f"it has no precision {precision}"
        if b.name == "triton" and why_not is None and os.environ.get("TRITON_INTERPRET") == "1":
            why_not = "it would run in the interpreter (TRITON_INTERPRET=1)"
        if why_not is None:
            return b, "; ".join([f"the fastest that runs here{asked}", *passed_over])
        passed_over.append(f"not {b.name}: {why_not}")
    raise RuntimeError(f"no backend can run{asked}: " + "; ".join(passed_over))


def _check_precision(precision: str | None, who_has: str, *backends: Backend) -> None:
    there_is = dict.fromkeys(dtype for b in backends for dtype in b.dtypes)
    if precision is not None and precision not in there_is:
        raise ValueError(f"precision is {precision!r}, {who_has} {', '.join(map(repr, there_is))}")


def _check_report(bundle: Bundle, precision: str) -> None:
    report, threshold = bundle.reports.get(precision), bundle.threshold and bundle.threshold.energy
    if report is None or (report.get("model_digest"), report.get("threshold")) != (bundle.digest, threshold):
        state = "this model has none" if report is None else "the one in this model is of another model or threshold"
        raise ValueError(f"precision {precision!r} is offered only with its physics report, and {state}: run "
                         "'python -m kernels calibrate MODEL DATA'")
