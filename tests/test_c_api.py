"""The C door: the library built and installed as a C++ user does, against the Python backend, bit for bit."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from c_library import BAD_ARGUMENT, FAILED, NOT_FINITE, ROOT, Library, install, load, run
from scorers import SCORERS, events, make, model

from ebm.bundle import Bundle, Threshold
from ebm.events import load_events
from kernels import load_scorer
from kernels.febm import write_febm

LEVELS = 10


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    return install(tmp_path_factory)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    return load(tmp_path_factory)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "demo.febm"
    result = run(sys.executable, "-m", "kernels", "pack", ROOT / "models" / "demo", path)
    assert "64 features, width 256, 2 residual layers, 10 noise levels (default 7)" in result.stdout
    return path


@pytest.fixture(scope="module")
def toy() -> np.ndarray:
    return np.ascontiguousarray(load_events("toy:900").x, np.float32)


def _score(library, handle, x, level=None, threads=2, *, score=True, flag=None, levels=None):
    energy = np.full(len(x), np.nan, np.float32)
    s = np.full(x.shape, np.nan, np.float32) if score else None
    at = lambda a: None if a is None else a.ctypes.data  # noqa: E731
    if levels is None:
        level = library.default_level(handle) if level is None else level
        code = library.score(handle, at(x), len(x), level, at(energy), at(s), at(flag), threads)
    else:
        code = library.score_levels(handle, at(x), len(x), at(levels), at(energy), at(s), threads)
    return code, energy, s


def test_example_gives_the_bits_of_python(installed, demo, toy, tmp_path):
    build = tmp_path / "build"
    run("cmake", "-S", ROOT / "examples" / "trigger", "-B", build, f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", build)
    toy.astype("<f4").tofile(tmp_path / "events.f32")
    trigger, arguments = build / "trigger", (demo, tmp_path / "events.f32")
    out = subprocess.run([trigger, "--binary", *arguments], capture_output=True, check=True).stdout
    scorer = load_scorer(ROOT / "models" / "demo", "native")
    energy = scorer.energy(toy)
    np.testing.assert_array_equal(np.frombuffer(out, "<f4"), energy)
    lines = run(trigger, *arguments).stdout.splitlines()
    assert [line.endswith("*") for line in lines] == scorer.flag(toy).tolist()
    for given, message in (((tmp_path / "none", arguments[1]), "No such file"), ((demo, demo), "whole event")):
        failed = subprocess.run([trigger, *given], capture_output=True, text=True)
        assert failed.returncode > 0
        assert message in failed.stderr


@pytest.mark.parametrize("name", [n for n in SCORERS if n.startswith("native")])
def test_bits_of_python(library, name, tmp_path, monkeypatch):
    bundle = model(21, 60, 2)
    middle = float(np.median(make(name, bundle).energy(events(500, 21))))
    bundle = replace(bundle, threshold=Threshold(middle, 0.5, 0.95, 1, 1, 1.0, False, bundle.default_level))
    scorer = make(name, bundle)
    monkeypatch.setenv("FUSED_EBM_ISA", scorer.isa)
    write_febm(bundle, tmp_path / "m.febm")
    code, handle = library.try_open(tmp_path / "m.febm")
    assert code == 0, library.error()
    assert library.isa(handle).decode() == scorer.isa
    assert library.set_deterministic(handle, int(scorer.deterministic)) == 0
    assert library.threshold(handle) == np.float32(middle)
    for n in (0, 1, 2, 3, 5, 8, 14, 15, 33, 500):
        x, k = events(n, 21), np.random.default_rng(n).integers(0, LEVELS, n).astype(np.int32)
        for threads in (1, 3):
            flag = np.full(n, 7, np.uint8)
            code, energy, _ = _score(library, handle, x, flag=flag, threads=threads, score=False)
            assert code == 0, library.error()
            np.testing.assert_array_equal(energy, scorer.energy(x))
            np.testing.assert_array_equal(flag, scorer.flag(x))
            for options in ({"level": 2}, {"levels": k}):
                code, *results = _score(library, handle, x, threads=threads, **options)
                assert code == 0, library.error()
                for a, b in zip(results, scorer.energy_and_score(x, options.get("level", k))):
                    np.testing.assert_array_equal(a, b)
            energies = np.full((n, LEVELS), np.nan, np.float32)
            assert library.energies(handle, x.ctypes.data, n, energies.ctypes.data, threads) == 0
            np.testing.assert_array_equal(energies, scorer.energies(x))
    library.close(handle)


def test_concurrent_calls(library, demo, toy):
    handle = library.try_open(demo)[1]
    expected = _score(library, handle, toy)

    def call(i: int) -> bool:
        n = 40 + 37 * i % (len(toy) - 40)
        code, energy, score = _score(library, handle, toy[-n:], threads=1 + i % 3)
        return code == 0 and np.array_equal(energy, expected[1][-n:]) and np.array_equal(score, expected[2][-n:])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(call, range(100)))
    library.close(handle)


@pytest.mark.parametrize("name", [n for n in SCORERS if n.startswith("native")])
def test_calls_allocate_nothing(installed, name, tmp_path, monkeypatch):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("allocations are counted by replacing the malloc of glibc")
    monkeypatch.setenv("FUSED_EBM_ISA", make(name, model(21, 60, 2)).isa)
    write_febm(model(21, 60, 2), tmp_path / "m.febm")
    program = tmp_path / "allocations"
    run("g++", "-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", ROOT / "tests" / "native" / "allocations.cpp",
        f"-I{installed / 'include'}", f"-L{installed / 'lib'}", f"-Wl,-rpath,{installed / 'lib'}", "-lfused_ebm",
        "-pthread", "-o", program)
    printed = run(program, tmp_path / "m.febm").stdout
    opening, first, threads, steady = map(int, re.findall(r"\d+", printed))
    assert (opening > 0, first > 0, threads) == (True, True, 3), printed  # the counter counts, on every thread
    assert steady == 0, printed


def test_what_a_model_says(library, demo):
    bundle, handle = Bundle.load(ROOT / "models" / "demo"), library.try_open(demo)[1]
    assert (library.n_features(handle), library.n_levels(handle)) == (64, len(bundle.sigmas))
    assert library.default_level(handle) == bundle.default_level
    assert library.threshold(handle) == np.float32(bundle.threshold.energy)
    assert library.digest(handle).decode() == bundle.digest
    assert tuple(library.feature(handle, j).decode() for j in range(64)) == bundle.schema.features
    assert library.feature(handle, 64) is None
    assert library.feature(handle, -1) is None
    library.close(handle)
    assert f'version = "{library.version().decode()}"' in (ROOT / "pyproject.toml").read_text()
    assert (library.n_features(None), library.n_levels(None), library.default_level(None)) == (-1, -1, -1)
    assert np.isnan(library.threshold(None))
    assert library.isa(None) is library.digest(None) is library.feature(None, 0) is None
    library.close(None)


def test_bad_arguments(library, demo, tmp_path, monkeypatch):
    handle = library.try_open(demo)[1]
    x, out = np.zeros((9, 64), np.float32), np.full(9 * 64, 7, np.float32)
    at, to, levels = x.ctypes.data, out.ctypes.data, np.array([0, 1, 2, 10], np.int32)
    for name, arguments, message in (
        ("score", (None, at, 9, 5, to, None, None, 1), "model is NULL"),
        ("score", (handle, None, 9, 5, to, None, None, 1), "x is NULL"),
        ("score", (handle, at, 9, 5, None, to, None, 1), "the place for energies is NULL"),
        ("score", (handle, at, -1, 5, to, None, None, 1), "n is -1, expected a number of events"),
        ("score", (handle, at, 9, 5, to, None, None, 0), "threads is 0, expected a whole number from 1 on"),
        ("score", (handle, at, 9, 10, to, None, None, 1), "noise level k = 10 is out of range, expected 0 to 9"),
        ("score", (handle, at, 0, -1, to, None, None, 1), "noise level k = -1 is out of range, expected 0 to 9"),
        ("score", (handle, at, 9, 4, to, None, to, 1), "flags at noise level 4, the threshold is of level 7"),
        ("score_levels", (handle, at, 9, None, to, None, 1), "levels is NULL"),
        ("score_levels", (handle, at, 4, levels.ctypes.data, to, None, 1),
         "event 3: noise level k = 10 is out of range, expected 0 to 9"),
        ("energies", (handle, at, 9, None, 1), "the place for energies is NULL"),
        ("open", (None, ctypes.byref(ctypes.c_void_p())), "path is NULL"),
        ("open", (b"x", None), "the place for the model is NULL"),
        ("set_deterministic", (None, 1), "model is NULL"),
    ):
        assert getattr(library, name)(*arguments) == BAD_ARGUMENT
        assert library.error() == message
    with ThreadPoolExecutor(1) as other:
        assert other.submit(library.error).result() == ""
    assert (out == 7).all()
    library.close(handle)

    bare = tmp_path / "bare.febm"
    write_febm(model(5, 64, 1), bare)
    handle = library.try_open(bare)[1]
    assert np.isnan(library.threshold(handle))
    assert library.score(handle, at, 1, 5, to, None, to, 1) == BAD_ARGUMENT
    assert "without a threshold: calibrate it first" in library.error()
    library.close(handle)
    monkeypatch.setenv("FUSED_EBM_ISA", "altivec")
    assert library.try_open(bare)[0] == FAILED
    assert "FUSED_EBM_ISA=altivec is not known" in library.error()


def test_events_that_are_not_finite(library, tmp_path):
    bundle = model(21, 60, 2)
    write_febm(bundle, tmp_path / "m.febm")
    handle = library.try_open(tmp_path / "m.febm")[1]
    scorer = load_scorer(bundle, "native")
    propagate = load_scorer(bundle, "native", on_nonfinite="propagate")
    for bad, value in (([3], np.inf), ([3, 7], -np.inf), ([3], np.nan), ([39], 3e38)):
        x = events(40, 21)
        x[bad, 6] = value  # feature 6 has the identity, and no imputation
        code, energy, score = _score(library, handle, x)
        with pytest.raises(ValueError, match=f"event {bad[0]}") as e:
            scorer.energy_and_score(x)
        assert code == NOT_FINITE
        assert library.error() == str(e.value)
        for a, b in zip((energy, score), propagate.energy_and_score(x)):
            np.testing.assert_array_equal(a, b)
        energies = np.zeros((40, LEVELS), np.float32)
        assert library.energies(handle, x.ctypes.data, 40, energies.ctypes.data, 1) == NOT_FINITE
        assert library.error() == str(e.value)
    library.close(handle)


def test_header_is_c_and_only_its_functions_are_exported(installed, tmp_path):
    header = installed / "include" / "fused_ebm.h"
    assert header.read_text().count("\nFUSED_EBM_API ") == 15
    (tmp_path / "a.c").write_text('#include <fused_ebm.h>\nint main(void) { return fused_ebm_n_levels(0) + 1; }\n')
    run("g++", "-x", "c", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only",
         f"-I{header.parent}", tmp_path / "a.c")
    table = run("nm", "-D", "--defined-only", installed / "lib" / "libfused_ebm.so").stdout
    names = [line.split()[-1] for line in table.splitlines()]
    assert len(names) == 15
    assert all(name.startswith("fused_ebm_") for name in names)
