"""A model repository for Triton Inference Server: <repository>/<model>/config.pbtxt, <N>/model.{py,pt,onnx}."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ebm.bundle import Bundle
from ebm.events import DataError
from export import manifest, to_onnx, to_torchscript
from export.publish import publish
from export.score_graph import Options

REPOSITORY = "triton"
VERSIONS = ("2.51",)
DEVICES = {"cpu": "KIND_CPU", "gpu": "KIND_GPU"}


def _python(bundle: Bundle, directory: Path, options: Options) -> dict:
    if bundle.architecture.kind != "energy":
        raise ValueError("Triton's python backend runs the fused kernels, which compute energy models; this one is of "
                         f"kind {bundle.architecture.kind!r}: give it the backend pytorch or onnxruntime")
    shutil.copyfile(Path(__file__).with_name("triton_model.py"), directory / "model.py")
    return {"file": "model.py"}


# The tensors have the same names on all of them: onnxruntime looks them up in the graph, and the pytorch backend takes
# outputs that are not called NAME__INDEX in the order of config.pbtxt, which is that of the graph.
BACKENDS: dict[str, Callable[[Bundle, Path, Options], dict]] = {
    "python": _python, "pytorch": to_torchscript.export, "onnxruntime": to_onnx.export,
}

# Energy and flag are one number per event; on the wire they are (n, 1), because the server knows no (n,).
_CONFIG = """\
# For Triton Inference Server {version}. The server reads it when it loads the model; change it as you need.
name: "{name}"
backend: "{backend}"
max_batch_size: {batch_max}
input [ {{ name: "events" data_type: TYPE_FP32 dims: [ {features} ] }} ]
output [
{outputs}
]
# One version serves; a new one is loaded and warm before it takes over.
version_policy {{ latest {{ num_versions: 1 }} }}
model_warmup [ {{
  name: "zeros" batch_size: 1 count: 20
  inputs {{ key: "events" value {{ data_type: TYPE_FP32 dims: [ {features} ] zero_data: true }} }}
}} ]
# With one instance the batcher of this server lets a request wait for half a second now and then, with two it did not.
instance_group [ {{ kind: {kind} count: 2 }} ]
# Requests that arrive within 100 us share a batch. Rather than wait for longer than 10 s, or than its own timeout, or
# behind 1024 others, a request is refused.
dynamic_batching {{
  max_queue_delay_microseconds: 100
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: 10000000
    allow_timeout_override: true
    max_queue_size: 1024
  }}
}}
"""


def export(bundle: Bundle, directory: Path, options: Options, *, triton_version: str = VERSIONS[0],
           backend: str = "python", name: str | None = None, device: str = "cpu", command: str = "") -> dict:
    """Add a version of a model to the repository `directory`/triton; the entry of the manifest.

    A model that is not there is made with config.pbtxt and version 1; of one that is, nothing is touched and version
    N + 1 is added, whole or not at all, so that a server which watches the repository swaps it in. Every version
    holds its own export.json and source/. `name` (default: the name of the schema) is how clients call the model,
    `backend` what runs it, `device` "cpu" or "gpu" where.

    Raises ValueError on a server version, backend, device or name that is not known, and where the new version would
    not take and give the tensors of the one before.
    """
    name = re.sub(r"[^\w.-]", "_", bundle.schema.name) if name is None else name
    for what, given, known in (("triton_version", triton_version, VERSIONS), ("backend", backend, tuple(BACKENDS)),
                               ("device", device, tuple(DEVICES))):
        if given not in known:
            raise ValueError(f"{what} is {given!r}, expected {' or '.join(map(repr, known))}")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"name is {name!r}, expected letters, digits, '_', '-' and '.', not first '-' or '.'")
    model = Path(directory) / REPOSITORY / name
    server = {"triton_version": triton_version, "backend": backend, "device": device, "model": name}
    version = 1
    if model.exists():
        newest = max((int(p.name) for p in model.iterdir() if re.fullmatch(r"[1-9][0-9]*", p.name)), default=None)
        if newest is None:
            raise DataError(f"{model} exists and holds no version of a model")
        _check_same_tensors(model / str(newest), bundle, options, server)
        version += newest
    # A server refuses a repository that holds what is no model; in a model it passes over names that are no number.
    place, beside = (model, directory) if version == 1 else (model / str(version), None)
    with publish(place, beside) as new:
        if version == 1:
            (new / "config.pbtxt").write_text(config(bundle, options, **server))
            new = new / "1"
            new.mkdir()
        entry = BACKENDS[backend](bundle, new, options) | server | {"version": version}
        manifest.write(new, bundle, options, {"triton": entry}, command)
    return entry | {"file": f"{REPOSITORY}/{name}/{version}/{entry['file']}"}


def config(bundle: Bundle, options: Options, *, model: str, backend: str, device: str, triton_version: str) -> str:
    """The text of config.pbtxt."""
    d = bundle.schema.n_features
    tensors = {"energy": "FP32 dims: [ 1 ] reshape { shape: [ ] }", "score": f"FP32 dims: [ {d} ]",
               "flag": "BOOL dims: [ 1 ] reshape { shape: [ ] }", "energies": f"FP32 dims: [ {bundle.n_levels} ]"}
    outputs = ",\n".join(f'  {{ name: "{name}" data_type: TYPE_{tensors[name]} }}' for name in options.outputs)
    return _CONFIG.format(version=triton_version, name=model, backend=backend, batch_max=options.batch_max,
                          features=d, outputs=outputs, kind=DEVICES[device])


def _check_same_tensors(older: Path, bundle: Bundle, options: Options, server: dict[str, str]) -> None:
    """config.pbtxt holds for all versions, and so do the clients."""
    there = manifest.read(older)
    entry = there["files"].get("triton", {})
    for what, given, expected in (
        *((key, server[key], entry.get(key)) for key in ("backend", "device", "triton_version")),
        ("features", list(bundle.schema.features), there["features"]),
        ("units", list(bundle.schema.units), there["units"]),
        ("outputs", list(options.outputs), list(there["outputs"])),
        ("preprocess", options.preprocess, there["options"]["preprocess"]),
        ("batch_max", options.batch_max, there["options"]["batch_max"]),
    ):
        if given != expected:
            raise ValueError(f"{older.parent}: a new version needs the {what} of version {older.name}, {expected!r}, "
                             f"given {given!r}: give the model another name")
