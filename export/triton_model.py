"""One version of a model on Triton Inference Server's Python backend: our fused kernels behind the server.

A copy of this file, model.py, lies in every such version beside export.json and source/. The Python of the server
must be able to import `kernels`: fused-ebm installed there or its checkout on PYTHONPATH, with numpy and safetensors;
on a CPU no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as server

from ebm.bundle import Bundle
from kernels import load_scorer


class TritonPythonModel:
    """An instance of the model, in a process of its own. An error while it loads keeps the older version serving."""

    def initialize(self, args: dict[str, str]) -> None:
        directory = Path(args["model_repository"]) / args["model_version"]
        manifest = json.loads((directory / "export.json").read_bytes())
        for name, expected in manifest["model"]["files"].items():
            path = directory / "source" / name
            if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
                raise RuntimeError(f"{path}: damaged, or from another export: its SHA-256 is not that of export.json")
        options = manifest["options"]
        self.outputs, self.level = options["outputs"], options["level"]
        # The server chooses the batches, so that an event must get the same bits in any of them.
        name, how = ("triton", {"device": f"cuda:{args['model_instance_device_id']}"}) \
            if args["model_instance_kind"] == "GPU" else ("native", {"deterministic": True})
        self.scorer = load_scorer(Bundle.load(directory / "source"), name, preprocess=options["preprocess"], **how)

    def execute(self, requests: list) -> list:
        """One batch of all requests. Where it holds an event that cannot be scored, only its request gets the error."""
        batches = [server.get_input_tensor_by_name(request, "events").as_numpy() for request in requests]
        wanted = {name for request in requests for name in request.requested_output_names()}
        try:
            results = self._score(np.concatenate(batches), wanted)
        except ValueError:
            return [self._alone(batch, wanted) for batch in batches]
        ends = np.cumsum([len(batch) for batch in batches])
        return [_response({name: array[end - len(batch):end] for name, array in results.items()})
                for batch, end in zip(batches, ends)]

    def _alone(self, batch: np.ndarray, wanted: set[str]):
        try:
            return _response(self._score(batch, wanted))
        except ValueError as e:
            return server.InferenceResponse([], server.TritonError(str(e), server.TritonError.INVALID_ARG))

    def _score(self, events: np.ndarray, wanted: set[str]) -> dict[str, np.ndarray]:
        results = {}
        if "score" in wanted:
            results["energy"], results["score"] = self.scorer.energy_and_score(events, self.level)
        elif wanted & {"energy", "flag"}:
            results["energy"] = self.scorer.energy(events, self.level)
        if "flag" in wanted:
            results["flag"] = results["energy"] > self.scorer.threshold
        if "energies" in wanted:
            results["energies"] = self.scorer.energies(events)
        return {name: results[name] for name in self.outputs if name in wanted}


def _response(results: dict[str, np.ndarray]):
    return server.InferenceResponse([server.Tensor(name, array) for name, array in results.items()])
