"""Models compiled for GPUs without one: what the command writes, and the library up to the driver."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from c_library import run
from cuda_library import (
    BAD_FILE,
    CANNOT_READ,
    NEWER_FILE,
    NO_DEVICE,
    NO_KERNEL,
    OK,
    Compiled,
    Library,
    compiled,
    install,
    parameter_sizes,
    score,
    small_model,
)
from scorers import events

from ebm.bundle import Bundle
from kernels import load_scorer
from kernels.cubin import ENVIRONMENT, HEADER, KERNEL, LAUNCH, MODEL, Kind

torch = pytest.importorskip("torch")
triton_gpu = pytest.importorskip("kernels.triton_gpu")
launch = pytest.importorskip("kernels.launch")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    return install(tmp_path_factory)


@pytest.fixture(scope="module")
def library(installed) -> Path:
    return installed / "lib" / "libfused_ebm_cuda.so"


COMPILE = """
import json
from kernels.tiles import tiles_for
from kernels.triton_kernel import compile_for
shape = {"features": 5, "hidden": 16, "layers": 1, "flagged": True}
made = [[cc, tile.block_m, with_score, compile_for(cc, **shape, with_score=with_score, tile=tile)] for cc in (80, 90)
        for tile in tiles_for(cc) for with_score in (False, True)]
print(json.dumps([[*key, k.metadata.shared, k.metadata.num_warps] for *key, k in made]))
"""


def test_what_is_written(out, tmp_path):
    c = Compiled(out / MODEL)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | ENVIRONMENT
    said = json.loads(subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True,
                                     check=True).stdout)
    assert [[k["cc"], k["block_m"], k["with_score"], k["shared"], k["threads"] // 32] for k in c.kernels] == said
    assert [k["exact"] for k in c.kernels] == [0] * 4 + [1] * 4  # sm_80 runs on sm_89, sm_90a nowhere else
    assert len({k["cubin"] for k in c.kernels}) == 8
    for k in c.kernels:
        assert struct.unpack_from("<H", k["cubin"], 18) == (190,)  # EM_CUDA
        assert len(parameter_sizes(k["cubin"])) == k["n_parameters"]
    weights = [w.numpy().tobytes() for w in launch.load(small_model(), True, "cpu")]
    offsets = [value for kind, value in c.kernels[0]["parameters"] if kind == Kind.WEIGHTS]
    for offset, expected in zip(offsets, weights, strict=True):
        assert offset % 64 == 0
        assert c.content[c.weights[0] + offset:][:len(expected)] == expected

    (tmp_path / "a.c").write_text(
        f'#include "{out / LAUNCH}"\n#include <stdio.h>\nint main(void) {{\n'
        '  printf("%d %d %lld ", febm_kernels[7].cc, febm_kernels[7].shared_bytes, febm_kernels[7].cubin_at);\n'
        '  printf("%d %d", febm_kernels[7].parameters[2].kind == FEBM_SCORE, febm_weights_at + febm_weights_bytes);\n'
        '  return 0;\n}\n')
    run("g++", "-x", "c", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", tmp_path / "a.c", "-o",
        tmp_path / "a")
    at = c.content.index(c.kernels[7]["cubin"])
    assert run(tmp_path / "a").stdout == f"90 {c.kernels[7]['shared']} {at} 1 {sum(c.weights)}"


def test_command_refuses(out, tmp_path):
    def cubin(*arguments: object) -> str:
        command = [sys.executable, "-m", "kernels", "cubin", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1, result.stderr
        return result.stderr

    saved, new = out.parent / "model", tmp_path / "new"
    assert "no such model directory" in cubin(tmp_path / "none", new)
    assert "architectures are [75, 80], expected some of 80, 86," in cubin(saved, new, "--arch", "80,75")
    assert "--arch is 'sm_80', expected compute capabilities such as 80,90" in cubin(saved, new, "--arch", "sm_80")
    assert "precision is 'fp8', expected 'fp32'" in cubin(saved, new, "--precision", "fp8")
    Bundle.random(5, 16, 1, kind="score").save(tmp_path / "score")
    assert "only energy networks are packed" in cubin(tmp_path / "score", new)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter").write_text("dear")
    for path in (tmp_path / "foreign", tmp_path / "foreign" / "letter"):
        assert "is no directory of compiled models: nothing is written there" in cubin(saved, path)
    assert "cannot be written" in cubin(saved, tmp_path / "none" / "new", "--arch", "80")
    assert sorted(p.name for p in tmp_path.rglob("*") if "score" not in str(p)) == ["foreign", "letter"]
    before = (out / MODEL).read_bytes()  # what it wrote itself is replaced, the same by the same
    run(sys.executable, "-m", "kernels", "cubin", saved, out, "--arch", "80,90")
    assert (out / MODEL).read_bytes() == before


def test_damaged_files(library, out, tmp_path):
    c = Library(library)
    whole, path = (out / MODEL).read_bytes(), tmp_path / "m.febm-cuda"

    def code(content: bytes) -> int:
        path.write_bytes(content)
        result, handle = c.try_open(path)
        if result == OK:
            c.close(handle)
        elif result not in (NO_DEVICE, NO_KERNEL):
            assert c.error().startswith(f"{path}: ")
        return result

    sound = (OK, NO_DEVICE, NO_KERNEL)  # on a GPU of another kind, too
    assert code(whole) in sound
    rng = np.random.default_rng(0)
    for at in [*range(0, HEADER.size, 3), *rng.integers(HEADER.size, len(whole), 30)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1
        assert code(damaged) in (BAD_FILE, NEWER_FILE), at
    for length in [*range(0, HEADER.size + 40, 7), *rng.integers(HEADER.size, len(whole), 30), len(whole) - 1]:
        assert code(whole[:length]) == BAD_FILE, length
    for content, expected, message in (
        (whole[:8] + struct.pack("<I", 2) + whole[12:], NEWER_FILE, "format version 2, this library"),
        (whole[:-1], BAD_FILE, f"truncated: {len(whole) - 1} bytes, expected {len(whole)}"),
        (whole[:-1] + b"?", BAD_FILE, "damaged: its SHA-256 is another"),
        (whole + b"?", BAD_FILE, "damaged: bytes after its end"),
        (b"FUSEDEBM" + whole, BAD_FILE, "not a compiled model: 'python -m kernels cubin' writes one"),
    ):
        assert code(content) == expected
        assert c.error().startswith(f"{path}: {message}")
    assert c.try_open(tmp_path / "none")[0] == CANNOT_READ
    assert c.error() == f"{tmp_path / 'none'}: No such file or directory"
    assert c.try_open(tmp_path)[0] == CANNOT_READ

    # With the checksum put right only the bounds stand between a number and the memory behind it.
    table = HEADER.unpack_from(whole)[15]
    for at in [*range(24, 96, 4), *range(table, table + KERNEL.size, 4)]:
        for value in (0, 1, 63, 2**31 - 1, 2**32 - 64, 2**32 - 1):
            content = bytearray(whole)
            content[at:at + 4] = struct.pack("<I", value)
            content[144:176] = hashlib.sha256(content[:144] + content[176:]).digest()
            assert code(content) in (*sound, BAD_FILE), (at, value)


@pytest.mark.skipif("no NVIDIA driver" not in (triton_gpu.why_not() or ""), reason="this machine has a driver")
def test_no_driver(library, out):
    c = Library(library)
    assert c.try_open(out / MODEL)[0] == NO_DEVICE
    assert c.error() == "no NVIDIA driver on this machine (libcuda.so.1 cannot be opened)"


def test_header_is_c_and_only_its_functions_are_exported(installed, library, tmp_path):
    header = installed / "include" / "fused_ebm_cuda.h"
    (tmp_path / "a.c").write_text("#include <fused_ebm_cuda.h>\n"
                                  "int main(void) { return fused_ebm_cuda_n_levels(0) + 1; }\n")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(a LANGUAGES CXX)\nfind_package(fused_ebm_cuda 0.1 REQUIRED)\n"
        "set_source_files_properties(a.c PROPERTIES LANGUAGE CXX)\nadd_executable(a a.c)\n"
        "target_link_libraries(a PRIVATE fused_ebm_cuda::fused_ebm_cuda)\n")
    run("g++", "-x", "c", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only",
        f"-I{header.parent}", tmp_path / "a.c")
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", tmp_path / "build")
    run(tmp_path / "build" / "a")
    table = run("nm", "-D", "--defined-only", library).stdout
    names = [line.split()[-1] for line in table.splitlines()]
    assert len(names) == header.read_text().count("\nFUSED_EBM_CUDA_API ") == 14
    assert all(name.startswith("fused_ebm_cuda_") for name in names)
    assert "libcuda" not in run("ldd", library).stdout


@pytest.mark.skipif(triton_gpu.why_not() is not None, reason="needs a GPU")
def test_agrees_with_float64_on_a_gpu(library, out, tmp_path):
    major, minor = torch.cuda.get_device_capability()
    run(sys.executable, "-m", "kernels", "cubin", out.parent / "model", tmp_path / "out", "--arch", 10 * major + minor)
    c, reference = Library(library), load_scorer(small_model(), "reference")
    with c.opened(tmp_path / "out" / MODEL) as handle:
        for n in (1, 257, 70_001):
            x = events(n, 5)
            true_energy, true_score = reference.energy_and_score(x, 3)
            code, energy, s, _ = score(c, handle, x)
            assert code == OK, c.error()
            spread = reference.energy(events(4096, 5)).std()
            assert np.sqrt(np.mean((energy - true_energy) ** 2)) < 5e-6 * spread
            assert np.sqrt(np.mean((s - true_score) ** 2)) < 5e-6 * np.sqrt(np.mean(true_score**2))
            x, out = torch.from_numpy(x).cuda(), torch.empty(n, device="cuda")
            stream = torch.cuda.current_stream().cuda_stream
            assert c.score_device(handle, x.data_ptr(), n, 3, out.data_ptr(), None, None, stream) == OK, c.error()
            torch.testing.assert_close(out.cpu(), torch.from_numpy(energy), rtol=1e-5, atol=1e-5)
