"""The repository for Triton Inference Server: what lies in it, that versions are only added, and what model.py does."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scorers import events, model

from ebm.bundle import Bundle
from ebm.events import DataError
from export import manifest, triton_repository
from export.score_graph import ExportGraph, Options, example_events
from export.triton_repository import BACKENDS, export
from kernels import load_scorer
from kernels.tolerances import TOLERANCES

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
FILES = {"python": "model.py", "pytorch": "model.pt", "onnxruntime": "model.onnx"}
TYPES = {"FP32": "float32", "BOOL": "bool"}


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
            for p in folder.rglob("*") if p.is_file()}


def small(**options) -> tuple[Bundle, Options]:
    bundle = model(5, 64, 1)
    return bundle, Options.of(bundle, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_and_tensors(tmp_path, backend):
    """The tensors of config.pbtxt are those of the graph, in its order; a version needs nothing from outside."""
    bundle = Bundle.load(DEMO)
    options = Options.of(bundle, outputs=("energy", "score", "flag", "energies"), batch_max=256)
    entry = export(bundle, tmp_path, options, backend=backend, name="demo", command="test")
    folder = tmp_path / "triton" / "demo"
    assert entry["file"] == f"triton/demo/1/{FILES[backend]}"
    assert {p.name for p in folder.iterdir()} == {"config.pbtxt", "1"}
    assert {p.name for p in (folder / "1").iterdir()} == {FILES[backend], "export.json", "source"}
    text = (folder / "config.pbtxt").read_text()
    for line in (f'backend: "{backend}"', 'name: "demo"', "max_batch_size: 256", "[ { kind: KIND_CPU count: 2 } ]",
                 "latest { num_versions: 1 }", "max_queue_size: 1024", "For Triton Inference Server 2.51"):
        assert line in text
    (given,) = re.findall(r'input \[ { name: "events" data_type: TYPE_FP32 dims: \[ (\d+) \] } \]', text)
    assert int(given) == bundle.schema.n_features
    output = r'  { name: "(\w+)" data_type: TYPE_(\w+) dims: \[ (\d+) \]( reshape { shape: \[ \] })? }'
    tensors = re.findall(output, text)
    assert [name for name, *_ in tensors] == list(options.outputs)
    for (_, dtype, dims, reshaped), result in zip(tensors, ExportGraph(bundle, options)(example_events(bundle, 3))):
        assert str(result.dtype) == f"torch.{TYPES[dtype]}"
        assert list(result.shape) == ([3] if reshaped else [3, int(dims)])
    document = manifest.read(folder / "1")
    told = document["files"]["triton"]
    assert {key: told[key] for key in ("backend", "device", "triton_version", "model", "version")} == \
        {"backend": backend, "device": "cpu", "triton_version": "2.51", "model": "demo", "version": 1}
    assert Bundle.load(folder / "1" / "source").digest == bundle.digest
    manifest.check_files(folder / "1", told["sha256"])
    if backend != "python":
        assert told["errors"]["score"] < TOLERANCES["fp32"]
        assert load_scorer(folder / "1" / FILES[backend]).options == options


def test_gpu_and_default_name(tmp_path):
    bundle, options = small()
    assert export(bundle, tmp_path, options, device="gpu")["file"] == "triton/random/1/model.py"
    assert "kind: KIND_GPU" in (tmp_path / "triton" / "random" / "config.pbtxt").read_text()


def test_a_crash_leaves_nothing_that_a_server_would_take_for_a_model(tmp_path, monkeypatch):
    bundle, options = small()
    export(bundle, tmp_path, options)
    seen = []

    def writes(bundle, folder, options):
        seen.append({p.name for p in (tmp_path / "triton").iterdir()})
        return BACKENDS["pytorch"](bundle, folder, options)

    monkeypatch.setitem(BACKENDS, "python", writes)
    assert export(bundle, tmp_path, options, name="hep64-v1")["version"] == 1
    assert seen == [{"random"}]


def test_a_schema_with_a_slash_names_a_model(tmp_path):
    bundle, options = small()
    bundle = replace(bundle, schema=replace(bundle.schema, name="hep64-v1/PNetB"))
    assert export(bundle, tmp_path, options)["model"] == "hep64-v1_PNetB"


def test_versions_are_only_added(tmp_path):
    bundle, options = small()
    folder = tmp_path / "triton" / "random"
    export(bundle, tmp_path, options)
    (folder / "config.pbtxt").write_text("# tuned by hand\n" + (folder / "config.pbtxt").read_text())
    (folder / ".2.crashed").mkdir()
    (folder / "labels").mkdir()
    before = content(folder)
    other = Bundle.random(5, 64, 2, seed=7)
    assert export(other, tmp_path, Options.of(other, level=3))["version"] == 2
    assert {name: now for name, now in content(folder).items() if not name.startswith("2/")} == before
    assert Bundle.load(folder / "2" / "source").digest == other.digest
    (folder / "2").rename(folder / "10")
    assert export(bundle, tmp_path, options)["file"] == "triton/random/11/model.py"
    assert export(bundle, tmp_path, options, name="second")["version"] == 1
    assert {p.name for p in folder.iterdir()} == {"config.pbtxt", "1", "10", "11", ".2.crashed", "labels"}


@pytest.mark.parametrize("first", [True, False])
def test_an_error_leaves_the_repository_as_it_was(tmp_path, monkeypatch, first):
    bundle, options = small()
    if not first:
        export(bundle, tmp_path, options)
    before = content(tmp_path)
    monkeypatch.setattr(triton_repository.manifest, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export(bundle, tmp_path, options)
    assert content(tmp_path) == before
    assert not list(tmp_path.rglob(".*"))


def test_a_version_with_other_tensors_is_refused(tmp_path):
    bundle, options = small()
    export(bundle, tmp_path, options)
    before = content(tmp_path)
    wider, renamed = model(6, 64, 1), Bundle.random(5, 64, 1)
    object.__setattr__(renamed.schema, "features", ("a", "x1", "x2", "x3", "x4"))
    other_units = replace(bundle, schema=replace(bundle.schema, units=("MeV",) * 5))
    for given, changed, keywords, message in (
        (wider, Options.of(wider), {}, r"features of version 1, \['x0', .*'x4'\], given \['x0', .*'x5'\]"),
        (renamed, Options.of(renamed), {}, r"features of version 1, .* given \['a', 'x1'"),
        (other_units, options, {}, r"units of version 1, .* given \['MeV', "),
        (bundle, Options.of(bundle, outputs=("energy",)), {}, r"outputs of .*'score'\], given \['energy'\]"),
        (bundle, Options.of(bundle, preprocess=False), {}, "preprocess of version 1, True, given False"),
        (bundle, Options.of(bundle, batch_max=8), {}, "batch_max of version 1, 65536, given 8"),
        (bundle, options, {"backend": "pytorch"}, "backend of version 1, 'python', given 'pytorch'"),
        (bundle, options, {"device": "gpu"}, "device of version 1, 'cpu', given 'gpu'"),
    ):
        with pytest.raises(ValueError, match=rf"triton/random: a new version needs the {message}"):
            export(given, tmp_path, changed, **keywords)
    assert content(tmp_path) == before
    (tmp_path / "triton" / "random" / "1").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="triton/random exists and holds no version of a model"):
        export(bundle, tmp_path, options)


@pytest.mark.parametrize(("keywords", "message"), [
    ({"triton_version": "2.40"}, "triton_version is '2.40', expected '2.51'"),
    ({"backend": "tensorflow"}, "backend is 'tensorflow', expected 'python' or 'pytorch' or 'onnxruntime'"),
    ({"device": "cuda"}, "device is 'cuda', expected 'cpu' or 'gpu'"),
    ({"name": "a/b"}, "name is 'a/b', expected letters"), ({"name": ".a"}, "not first '-' or '.'"),
    ({"name": 'a"'}, "expected letters"), ({"name": ""}, "expected letters"),
])
def test_bad_arguments(tmp_path, keywords, message):
    with pytest.raises(ValueError, match=message):
        export(small()[0], tmp_path, small()[1], **keywords)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["score", "autoencoder"])
def test_the_python_backend_has_energy_models_only(tmp_path, kind):
    bundle = Bundle.random(5, 64, 1, kind=kind)
    with pytest.raises(ValueError, match=f"compute energy models; this one is of kind '{kind}'"):
        export(bundle, tmp_path, Options.of(bundle))
    assert not list(tmp_path.rglob("*"))
    assert export(bundle, tmp_path, Options.of(bundle), backend="pytorch")["version"] == 1


class Request:
    def __init__(self, x: np.ndarray, *wanted: str):
        self.events, self.wanted = x, wanted or ("energy", "score")

    def requested_output_names(self) -> tuple[str, ...]:
        return self.wanted


FAKE_SERVER = SimpleNamespace(
    get_input_tensor_by_name=lambda request, name: SimpleNamespace(as_numpy=lambda: getattr(request, name)),
    Tensor=lambda name, array: (name, array), TritonError=type("TritonError", (Exception,), {"INVALID_ARG": 3}),
    InferenceResponse=lambda tensors, error=None: SimpleNamespace(tensors=dict(tensors), error=error),
)


def load(folder: Path, monkeypatch, version: str = "1", kind: str = "CPU"):
    """model.py of a version, as the server would load it."""
    pytest.importorskip("kernels._native", reason="the C++ library was not built")
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", FAKE_SERVER)
    spec = importlib.util.spec_from_file_location("served_model", folder / version / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    served = module.TritonPythonModel()
    served.initialize({"model_repository": str(folder), "model_version": version, "model_instance_kind": kind,
                       "model_instance_device_id": "0"})
    return served


def test_model_py_answers_many_requests_at_once(tmp_path, monkeypatch):
    bundle = Bundle.load(DEMO)
    options = Options.of(bundle, outputs=("energy", "score", "flag", "energies"))
    export(bundle, tmp_path, options, name="demo")
    served = load(tmp_path / "triton" / "demo", monkeypatch)
    native = load_scorer(bundle, "native", deterministic=True)
    batches = [np.abs(np.random.default_rng(n).normal(size=(n, 64))).astype(np.float32) for n in (1, 5, 300)]
    for wanted in (("energy",), ("flag",), ("energies",), ("energy", "score"), options.outputs):
        for x, reply in zip(batches, served.execute([Request(x, *wanted) for x in batches])):
            energy, score = native.energy_and_score(x)
            expected = {"energy": energy, "score": score, "flag": native.flag(x), "energies": native.energies(x)}
            assert reply.error is None
            for name in wanted:
                np.testing.assert_array_equal(reply.tensors[name], expected[name])
    monkeypatch.setattr(served.scorer, "energy_and_score", None)
    assert served.execute([Request(batches[0], "energy", "flag")])[0].tensors.keys() == {"energy", "flag"}


def test_model_py_refuses_only_the_request_with_a_bad_event(tmp_path, monkeypatch):
    bundle, options = small(level=2)
    export(bundle, tmp_path, options)
    served = load(tmp_path / "triton" / "random", monkeypatch)
    batches = [events(n, 5, seed=n) for n in (3, 4, 2)]
    batches[1][2, 0] = np.inf
    first, bad, last = served.execute([Request(x) for x in batches])
    assert "event 2: feature 0 (x0) is inf, expected a finite number" in str(bad.error)
    assert not bad.tensors
    native = load_scorer(bundle, "native", deterministic=True)
    for reply, x in ((first, batches[0]), (last, batches[2])):
        np.testing.assert_array_equal(reply.tensors["score"], native.energy_and_score(x, 2)[1])


def test_model_py_without_preprocessing(tmp_path, monkeypatch):
    bundle, options = small(preprocess=False)
    export(bundle, tmp_path, options)
    u = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    (reply,) = load(tmp_path / "triton" / "random", monkeypatch).execute([Request(u)])
    expected = load_scorer(bundle, "native", deterministic=True, preprocess=False).energy(u)
    np.testing.assert_array_equal(reply.tensors["energy"], expected)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_model_py_refuses_a_damaged_version(tmp_path, monkeypatch, name):
    export(small()[0], tmp_path, small()[1])
    folder = tmp_path / "triton" / "random"
    with open(folder / "1" / "source" / name, "ab") as f:
        f.write(b" ")
    with pytest.raises(RuntimeError, match=f"1/source/{name}: damaged, or from another export"):
        load(folder, monkeypatch)


def test_model_py_on_a_gpu_asks_for_the_gpu_kernel(tmp_path, monkeypatch):
    export(small()[0], tmp_path, small()[1], device="gpu")
    asked = []
    monkeypatch.setattr("kernels.load_scorer", lambda bundle, name, **how: asked.append((name, how)))
    load(tmp_path / "triton" / "random", monkeypatch, kind="GPU")
    assert asked == [("triton", {"device": "cuda:0", "preprocess": True})]


def test_model_py_needs_no_torch(tmp_path):
    """The Python of the server needs numpy and safetensors."""
    pytest.importorskip("kernels._native", reason="the C++ library was not built")
    export(small()[0], tmp_path, small()[1])
    folder = tmp_path / "triton" / "random"
    (tmp_path / "triton_python_backend_utils.py").touch()
    code = ("import sys, model; model.TritonPythonModel().initialize({'model_repository': sys.argv[1], "
            "'model_version': '1', 'model_instance_kind': 'CPU'}); "
            "print([m for m in ('torch', 'numba', 'scipy', 'pyarrow') if m in sys.modules])")
    path = os.pathsep.join(map(str, (folder / "1", tmp_path, ROOT)))
    environment = os.environ | {"PYTHONPATH": path}
    printed = subprocess.check_output([sys.executable, "-c", code, folder], env=environment, text=True)
    assert printed.strip() == "[]"
