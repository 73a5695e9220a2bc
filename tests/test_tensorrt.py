"""TensorRT engines: everything around the builder; and, where TensorRT and a GPU are, a real build and its proof."""

from __future__ import annotations

import json
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fake_tensorrt import fake_tensorrt
from scorers import events
from tensorrt_case import ALL, bundle, install

import export.to_tensorrt as t
from export.build import build
from export.score_graph import Options
from kernels import load_scorer
from kernels.tolerances import TOLERANCES, relative_rms_energy, relative_rms_score


@pytest.mark.parametrize("batch_max", [1, 2, 16, 17, 300, 4096, 65_536, 1 << 24])
def test_profiles_cover_every_batch_once(batch_max):
    shapes = t.profiles(batch_max)
    assert shapes[0][0] == 1
    assert shapes[-1][2] == batch_max
    assert all(least <= best == most for least, best, most in shapes)
    assert all(before[2] + 1 == after[0] for before, after in pairwise(shapes))
    assert [most for _, _, most in shapes[:-1]] == [n for n in (1, 16, 256, 4096) if n < batch_max]


def test_timing_cache_key_tells_apart_what_timings_depend_on():
    here = ("NVIDIA H100 80GB HBM3", "sm90", "12.8", "10.13.3.9")
    key = t.timing_cache_key(*here)
    assert key == "nvidia-h100-80gb-hbm3-sm90-cuda12.8-tensorrt10.13.3.9-strongly-typed-no-tf32.timing"
    for i, other in enumerate(("Tesla T4/MIG 1g", "sm75", "13.0", "11.0.0.1")):
        another = t.timing_cache_key(*here[:i], other, *here[i + 1:])
        assert another != key
        assert "/" not in another


@pytest.fixture(params=["10.13.3.9", "11.0.0.114"])
def trt(request, monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path, fake_tensorrt(request.param))


def export(directory: Path, precision: str = "fp32", batch_max: int = 65_536) -> dict:
    directory.mkdir(exist_ok=True)
    options = Options.of(bundle(), outputs=ALL, batch_max=batch_max)
    return t.export(bundle(), directory, options, precision=precision)


@pytest.mark.parametrize("precision", t.PRECISIONS)
def test_export(trt, tmp_path, precision):
    entry = export(tmp_path / "out", precision, batch_max=300)
    name = f"model-sm90-{precision}"
    assert entry["file"] == f"{name}.engine"
    assert entry["also"] == [f"tensorrt-{precision}.onnx", f"{name}.layers.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([entry["file"], *entry["also"]])
    assert json.loads((tmp_path / "out" / f"{name}.layers.json").read_text())["Format"] == "JSON"
    onnx.checker.check_model(tmp_path / "out" / entry["also"][0])
    ((_, built),) = trt.log
    shapes = [(1, 1, 1), (2, 16, 16), (17, 256, 256), (257, 300, 300)]
    assert built["profiles"] == [{"events": tuple((n, 30) for n in batches)} for batches in shapes]
    assert (built["strongly typed"], built["tf32"], built["verbosity"]) == (True, False, "DETAILED")
    assert {key: entry[key] for key in ("precision", "tensorrt", "compute_capability", "gpu", "cuda", "profiles")} == {
        "precision": precision, "tensorrt": trt.__version__, "compute_capability": "sm90",
        "gpu": "NVIDIA H100 80GB HBM3", "cuda": "12.8", "profiles": shapes}
    assert json.loads(json.dumps(entry))


def test_timing_cache_is_kept_and_a_useless_one_replaced(trt, tmp_path):
    cache = tmp_path / "cache" / "fused-ebm" / "tensorrt" / export(tmp_path / "a")["timing_cache"]
    timings = f"{trt.__version__} timings".encode()
    assert cache.read_bytes() == timings
    for content, used in ((timings, timings), (b"damaged", b""), (b"of another version", b"")):
        cache.write_bytes(content)
        export(tmp_path / "b")
        assert trt.log[-1][1]["cache"] == used
        assert cache.read_bytes() == timings


def test_an_engine_is_not_lost_for_a_cache_that_cannot_be_written(trt, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match=r"\.timing: cannot be written \(.*measured anew"):
        entry = export(tmp_path / "out")
    assert (tmp_path / "out" / entry["file"]).is_file()


def test_commands_do_the_same(trt, tmp_path):
    entry = export(tmp_path / "out", "fp16", batch_max=100)
    trtexec, polygraphy = (shlex.split(entry["commands"][tool]) for tool in ("trtexec", "polygraphy"))
    assert trtexec[:3] == ["trtexec", "--onnx=tensorrt-fp16.onnx", "--saveEngine=model-sm90-fp16.engine"]
    assert {"--noTF32", f"--timingCacheFile={entry['timing_cache']}", "--profilingVerbosity=detailed",
            "--exportLayerInfo=model-sm90-fp16.layers.json"} <= set(trtexec)
    assert ("--stronglyTyped" in trtexec) == trt.__version__.startswith("10.")
    assert not {"--fp16", "--bf16", "--best", "--precisionConstraints"} & {word.partition("=")[0] for word in trtexec}
    assert trtexec[trtexec.index("--profile=1"):][:4] == [
        "--profile=1", "--minShapes=events:2x30", "--optShapes=events:16x30", "--maxShapes=events:16x30"]
    assert polygraphy[:7] == ["polygraphy", "convert", "tensorrt-fp16.onnx", "--convert-to", "trt", "--output",
                              "model-sm90-fp16.engine"]
    assert "--strongly-typed" in polygraphy
    assert not {"--fp16", "--bf16", "--tf32"} & set(polygraphy)
    last = [polygraphy[i + 1] for i, word in enumerate(polygraphy) if word.startswith("--trt-")][-3:]
    assert last == ["events:[17,30]", "events:[100,30]", "events:[100,30]"]


def test_all_that_the_parser_says(monkeypatch, tmp_path):
    errors = ["In node 3 (importAsinh): UNSUPPORTED_NODE: no", "In node 7 (importWhere): INVALID_NODE: neither"]
    install(monkeypatch, tmp_path, fake_tensorrt(parser_errors=errors))
    with pytest.raises(RuntimeError) as e:
        export(tmp_path / "out")
    assert str(e.value) == f"TensorRT 10.13.3.9 cannot read the graph: {errors[0]}; {errors[1]}"


def test_why_the_builder_failed(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, fake_tensorrt("11.0.0.114", build_error="Error Code 2: OutOfMemory (no 9 GiB)"))
    with pytest.raises(RuntimeError) as e:
        export(tmp_path / "out")
    assert str(e.value) == "TensorRT 11.0.0.114 could not build the engine: Error Code 2: OutOfMemory (no 9 GiB)"
    assert not any((tmp_path / "out").iterdir())


def test_where_it_cannot_be_built(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RuntimeError, match=r"cannot be built: TensorRT cannot be imported \(.*\): install TensorRT 10"):
        export(tmp_path / "out")
    install(monkeypatch, tmp_path, fake_tensorrt("8.6.1"))
    with pytest.raises(RuntimeError, match=r"this is TensorRT 8.6.1, expected version 10 or 11"):
        export(tmp_path / "out")
    install(monkeypatch, tmp_path, fake_tensorrt())
    monkeypatch.setattr(t, "this_gpu", lambda: None)
    with pytest.raises(RuntimeError, match="PyTorch sees no CUDA GPU"):
        export(tmp_path / "out")


def test_the_fake_lacks_what_a_version_lacks():
    ten, eleven = fake_tensorrt("10.13.3.9"), fake_tensorrt("11.0.0.114")
    assert ten.BuilderFlag.FP16 != ten.BuilderFlag.TF32
    with pytest.raises(AttributeError):
        _ = eleven.BuilderFlag.FP16
    for fake in (ten, eleven):
        with pytest.raises(AttributeError):
            _ = fake.IInt8Calibrator
        with pytest.raises(AttributeError):
            fake.Builder(t.listener(fake)).create_builder_config().max_workspace_size = 1


@pytest.mark.parametrize("precision", t.PRECISIONS)
def test_real_engine(monkeypatch, tmp_path, precision):
    if reason := t.why_not():
        pytest.skip(reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    b = bundle(features=64, hidden=256)
    out = build(b, ["tensorrt"], tmp_path / "out", outputs=ALL, extra={"tensorrt": {"precision": precision}})
    (path,) = out.glob("*.engine")
    scorer, reference = load_scorer(path), load_scorer(b, "reference")
    x = events(70_000, 64)
    true_energy, true_score = reference.energy_and_score(x)
    spread = true_energy.std(), np.sqrt(np.mean(true_score**2))
    for n in (1, 2, 16, 17, 257, 4096, len(x)):
        for like in (np.asarray, lambda a: torch.from_numpy(a).cuda()):
            energy, score = (torch.as_tensor(a).cpu().numpy() for a in scorer.energy_and_score(like(x[:n])))
            assert relative_rms_energy(energy, true_energy[:n], spread[0]) < TOLERANCES[precision], n
            assert relative_rms_score(score, true_score[:n], spread[1]) < TOLERANCES[precision], n
    layers = json.loads((out / f"{path.stem}.layers.json").read_text())
    assert layers["Layers"]
