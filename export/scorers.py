"""Artefacts as Scorers: what left Python, run here, with all the promises of a Scorer."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ebm.bundle import Bundle
from ebm.events import DataError
from export import manifest
from export.score_graph import without_notices
from export.to_aot_inductor import MARCH
from kernels.scorer import Array, Scorer


class CannotRun(RuntimeError):
    """This machine lacks what an artefact needs: a runtime, a processor, a GPU. The artefact itself is sound."""


class ArtefactScorer(Scorer):
    """A Scorer over an exported file: one noise level, the outputs that were exported, its preprocessing or none.

    Beside the file lie export.json and source/; their digests are checked, and DataError names what differs. Another
    noise level or output than the exported ones raises ValueError. `threads` is for the runtime, by default the
    processors that this process may use. A subclass implements `_compute`.
    """

    def __init__(self, path: str | Path, *, on_nonfinite: str = "raise", threads: int | None = None):
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(f"threads is {threads!r}, expected a whole number from 1 on")
        self.path = Path(path)
        document, _, self.entry = manifest.locate(self.path)
        manifest.check_files(self.path.parent, manifest.digests(document, self.entry))
        bundle = Bundle.load(self.path.parent / manifest.SOURCE)
        if document["model"].get("digest") != bundle.digest:
            raise DataError(f"{self.path}: the model beside it has digest {bundle.digest[:12]}, {manifest.NAME} says "
                            f"{str(document['model'].get('digest'))[:12]}")
        self.options = manifest.options(document, bundle)
        super().__init__(bundle, preprocess=self.options.preprocess, on_nonfinite=on_nonfinite)
        self.default_level = self.options.level
        if bundle.threshold and bundle.threshold.level != self.default_level:
            self.threshold = None
        self.gives_score = "score" in self.options.outputs
        self.threads = threads or len(os.sched_getaffinity(0))

    def flag(self, x: Array) -> Array:
        """(n,) bool, as the artefact itself decides; from its energy where the flag was not exported."""
        if "flag" not in self.options.outputs:
            return super().flag(x)
        events, _, like = self._prepare(x, None)
        flag = np.empty(len(events), bool)
        if len(events):
            energy, flag[:] = self._compute(events, ("energy", "flag"))
            self._check_finite(events, energy)
        if like is None:
            return flag
        import torch

        return torch.from_numpy(flag).to(like.device)

    def _levels(self, k: Array, n: int) -> int:
        given, level = np.ravel(super()._levels(k, n)), self.options.level
        if (given != level).any():
            raise ValueError(f"{self.path} was exported at noise level {level}, given {given[given != level][0]}: "
                             "export another with --noise-level")
        return level

    def _energy(self, x, k, energy):
        (energy[:],) = self._outputs(x, "energy")

    def _energy_and_score(self, x, k, energy, score):
        energy[:], score[:] = self._outputs(x, "energy", "score")

    def _energies(self, x, energies):
        (energies[:],) = self._outputs(x, "energies")

    def _outputs(self, x: np.ndarray, *names: str) -> list[np.ndarray]:
        for name in names:
            if name not in self.options.outputs:
                raise ValueError(f"{self.path} has no {name}, only {', '.join(self.options.outputs)}: export it again "
                                 f"with --outputs {','.join((*self.options.outputs, name))}")
        return self._compute(x, names)

    def _compute(self, x: np.ndarray, names: tuple[str, ...]) -> list[np.ndarray]:
        """The outputs of these names for events x (n, D), C-contiguous float32, n > 0."""
        raise NotImplementedError


class OnnxScorer(ArtefactScorer):
    """model.onnx in ONNX Runtime, on a GPU where ONNX Runtime was built for one.

    Its threads sleep while there is nothing to do: by default they would spin and take the processors from others.
    """

    name = "onnxruntime"

    def __init__(self, path: str | Path, **options):
        super().__init__(path, **options)
        try:
            import onnxruntime
        except ImportError:
            raise CannotRun(f"{path} needs ONNX Runtime: pip install onnxruntime") from None
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = self.threads, 1
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # In CUDA's default, TF32, the products would keep only 10 bits.
        wanted = {"CUDAExecutionProvider": {"use_tf32": "0"}, "CPUExecutionProvider": {}}
        there = [(name, how) for name, how in wanted.items() if name in onnxruntime.get_available_providers()]
        self._session = onnxruntime.InferenceSession(self.path, settings, providers=there)
        self.device = "cuda:0" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"

    def _compute(self, x, names):
        return self._session.run(names, {"events": x})


class _TorchArtefact(ArtefactScorer):
    """What torch runs. Threads are those of torch in this process: `threads` sets them for all, None leaves them."""

    device = "cpu"

    def __init__(self, path: str | Path, *, threads: int | None = None, **options):
        super().__init__(path, threads=threads, **options)
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self._torch = torch
        with without_notices():
            self._module = self._load()

    def _load(self) -> Callable:
        """The module: events (n, D) -> a tuple of tensors in the order of the outputs."""
        raise NotImplementedError

    def _compute(self, x, names):
        x = x if x.flags.writeable else x.copy()  # torch knows no read-only tensors
        with self._torch.inference_mode():
            results = self._module(self._torch.from_numpy(x).to(self.device))
        return [results[self.options.outputs.index(name)].cpu().numpy() for name in names]


class TorchScriptScorer(_TorchArtefact):
    """model.pt in libtorch, on `device`, such as "cuda:0". Its first calls are slow: export.json says how slow."""

    name = "torchscript"

    def __init__(self, path: str | Path, *, device: str = "cpu", **options):
        self.device = device
        super().__init__(path, **options)

    def _load(self):
        if self.device.startswith("cuda") and not self._torch.cuda.is_available():
            raise CannotRun(f"{self.path} on {self.device}: PyTorch sees no CUDA GPU")
        return self._torch.jit.load(self.path, map_location=self.device)


class AOTInductorScorer(_TorchArtefact):
    """model.pt2, compiled code. RuntimeError on a processor that it was not compiled for."""

    name = "aot-inductor"

    def _load(self):
        machine, instructions = self.entry["machine"], self.entry["instructions"]
        capability = self._torch.backends.cpu.get_cpu_capability()
        if machine != platform.machine() or (instructions == MARCH and not capability.startswith("AVX")):
            raise CannotRun(f"{self.path} was compiled for {machine} ({instructions}), this processor is "
                            f"{platform.machine()} ({capability})")
        return self._torch._inductor.aoti_load_package(str(self.path))
