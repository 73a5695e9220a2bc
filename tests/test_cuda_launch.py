"""How libfused_ebm_cuda.so launches, on a stand-in for the driver: the same as Python, and what goes wrong."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cuda_library import (
    BAD_ARGUMENT,
    FAILED,
    NO_DEVICE,
    NO_KERNEL,
    NOT_FINITE,
    OK,
    Compiled,
    Library,
    compiled,
    install,
    score,
    small_model,
)
from fake_gpu import Child, FakeGpu, build, in_interpreter, simple
from scorers import events

from kernels.cubin import MODEL, Kind
from kernels.tiles import choose

torch = pytest.importorskip("torch")
triton_gpu = pytest.importorskip("kernels.triton_gpu")
launch = pytest.importorskip("kernels.launch")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
D, CC, N_SM = 5, 90, 3


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return install(tmp_path_factory) / "lib" / "libfused_ebm_cuda.so"


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def child(stand_in) -> Iterator[Child]:
    with Child(stand_in) as c:
        yield c


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory) / MODEL


class Recorder:
    """In place of `fused`: how Python launches it."""

    def __init__(self, names: list[str]):
        self.names = names

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, *arguments, **options):
        self.given, self.options = dict(zip(self.names, arguments)), options


def one_launch(library: Path, path: Path, precision: str, types: dict, n: int) -> dict:
    with_score = types["score"] is not None
    gpu = FakeGpu(Compiled(path), in_interpreter(lambda: gpu, precision, types), CC, N_SM)
    c, x = Library(library), events(n, D)
    with c.opened(path) as handle:
        assert (c.architecture(handle), c.precision(handle).decode()) == (CC, precision)
        assert gpu.calls() == "u"
        code, energy, s, _ = score(c, handle, x, with_score=with_score)
        assert code == OK, c.error()
        assert gpu.calls() == ("uwlrdd" if with_score else "uwlrd")
    assert (gpu.live(), gpu.c.fake_depth(), len(gpu.launches)) == (0, 0, 1)
    return {"energy": energy, "score": s, **gpu.launches[0]}


@interpreted
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("with_score", [True, False])
@pytest.mark.parametrize("n", [1, 48, 49, 300])
def test_launches_as_python_does(library, child, tmp_path_factory, precision, with_score, n, monkeypatch):
    scorer = triton_gpu.TritonScorer(small_model(), precision=precision)
    scorer._loaded = replace(scorer._loaded, cc=CC, n_sm=N_SM)
    x, energy, s = torch.from_numpy(events(n, D)), torch.empty(n), torch.empty(n, D) if with_score else None
    flag = torch.empty(n, dtype=torch.bool)
    scorer._launch(x, 3, energy, s, flag)
    recorder = Recorder(launch.fused.arg_names)
    monkeypatch.setattr(launch, "fused", recorder)
    scorer._launch(x, 3, energy, s, flag)
    given = recorder.given
    types = {name: None if a is None else str(a.dtype).removeprefix("torch.") if isinstance(a, torch.Tensor)
             else type(a).__name__ for name, a in given.items()}

    made = child.run(one_launch, library, compiled(tmp_path_factory, precision) / MODEL, precision, types, n)
    tile, k = choose(CC, n, N_SM, precision), made["kernel"]
    assert made["grid"] == (*recorder.grid, 1, 1)
    assert made["grid"][0] == min(-(-n // tile.block_m), tile.programs_per_sm * N_SM)
    assert made["block"] == (32 * recorder.options["num_warps"], 1, 1)
    assert made["shared"] == k["shared"]  # test_cubin.py: as the compiler says
    assert made["dynamic_shared"] == (k["shared"] if k["shared"] > 48 << 10 else 0)
    scratch = [value * made["grid"][0] for kind, value in k["parameters"] if kind == Kind.SCRATCH]
    assert scratch == [given[name].nbytes for name in ("scratch", "wide") if given[name] is not None]
    np.testing.assert_array_equal(made["energy"], energy.numpy())
    if with_score:
        np.testing.assert_array_equal(made["score"], s.numpy())


def blocks_and_flags(library: Path, path: Path) -> None:
    gpu = FakeGpu(Compiled(path), simple(lambda: gpu))
    c = Library(library)
    with c.opened(path) as handle:
        n, level = 65536 * 2 + 5, c.default_level(handle)
        x = np.random.default_rng(0).normal(size=(n, D)).astype(np.float32)
        gpu.calls()
        code, energy, s, flag = score(c, handle, x, with_flag=True, level=level)
        assert code == OK, c.error()
        np.testing.assert_array_equal(energy, x[:, 0])
        np.testing.assert_array_equal(s, 2 * x)
        np.testing.assert_array_equal(flag, x[:, 0] > c.threshold(handle))
        assert gpu.calls() == 3 * "uwlrdd"
        assert [launch["grid"][0] for launch in gpu.launches] == [9, 9, 1]
        assert [launch["kernel"]["block_m"] for launch in gpu.launches] == [32, 32, 16]
        assert score(c, handle, x[:0])[0] == OK
        x[[4, 9], 0] = np.inf, np.nan
        code, energy, _, flag = score(c, handle, x[:20], with_flag=True, level=level)
        assert code == NOT_FINITE
        assert c.error() == "event 4 (and 1 more): feature 0 (x0) is inf, expected a finite number"
        assert (flag[9], np.isnan(energy[9])) == (0, True)
        assert score(c, handle, x[9:20])[0] == NOT_FINITE
        assert c.error() == "event 0: feature 0 (x0) is nan, expected a number: this feature has no imputation"

        at, to = x.ctypes.data, energy.ctypes.data
        for arguments, message in (
            ((None, at, 9, 5, to, None, None), "model is NULL"),
            ((handle, None, 9, 5, to, None, None), "x is NULL"),
            ((handle, at, 9, 5, None, to, None), "the place for energies is NULL"),
            ((handle, at, -1, 5, to, None, None), "n is -1, expected a number of events"),
            ((handle, at, 9, 10, to, None, None), "noise level k = 10 is out of range, expected 0 to 9"),
            ((handle, at, 9, 4, to, None, to), "flags at noise level 4, the threshold is of level 5"),
        ):
            assert c.score(*arguments) == BAD_ARGUMENT
            assert c.error() == message
        assert c.open(None, 0, ctypes.byref(ctypes.c_void_p())) == BAD_ARGUMENT
        assert c.open(b"x", 0, None) == BAD_ARGUMENT
        assert c.try_open(path, 1)[0] == BAD_ARGUMENT
        assert c.error() == "device is 1, expected 0 to 0"


def what_the_model_says(library: Path, path: Path) -> None:
    c, bundle = Library(library), small_model()
    with c.opened(path) as handle:
        assert (c.n_features(handle), c.n_levels(handle)) == (D, len(bundle.sigmas))
        assert c.default_level(handle) == bundle.default_level
        assert c.threshold(handle) == np.float32(bundle.threshold.energy)
        assert c.digest(handle).decode() == bundle.digest
        assert [c.feature(handle, j) for j in range(-1, D + 1)] == [
            None, *(name.encode() for name in bundle.schema.features), None]
    assert (c.n_features(None), c.n_levels(None), c.default_level(None), c.architecture(None)) == (-1, -1, -1, -1)
    assert c.digest(None) is c.precision(None) is c.feature(None, 0) is None
    assert np.isnan(c.threshold(None))
    c.close(None)


def pointers_of_the_device(library: Path, path: Path) -> None:
    gpu = FakeGpu(Compiled(path), simple(lambda: gpu))
    c = Library(library)
    x = np.random.default_rng(0).normal(size=(40, D)).astype(np.float32)
    with c.opened(path) as handle:
        level = c.default_level(handle)
        at, energy, s, flag = (gpu.allocate(a) for a in (x, np.zeros(40, np.float32), np.zeros((40, D), np.float32),
                                                         np.zeros(48, np.uint8)))
        gpu.calls()
        for to in (s, None):
            assert c.score_device(handle, at, 40, 2, energy, to, None, 0x1230) == OK, c.error()
            assert gpu.calls() == "wlr"  # after the launch before, on whatever stream; nothing is waited for here
            launch = gpu.launches[-1]
            kinds = [kind for kind, _ in launch["kernel"]["parameters"]]
            assert (launch["stream"], launch["values"][:2], launch["grid"]) == (0x1230, [at, energy], (3, 1, 1))
            assert [launch["values"][kinds.index(kind)] for kind in (Kind.EVENTS, Kind.LEVEL)] == [40, 2]
        np.testing.assert_array_equal(gpu.tensor(energy).numpy(), x[:, 0])
        np.testing.assert_array_equal(gpu.tensor(s).numpy(), 2 * x.ravel())
        assert not gpu.tensor(flag, "uint8").any()
        assert c.score_device(handle, at, 40, level, energy, None, flag, 0x1230) == OK, c.error()
        assert gpu.tensor(flag, "uint8").tolist() == [1] * 40 + [0] * 8
        gpu.calls()
        gpu.set(fake_capturing=1)
        assert c.score_device(handle, at, 40, 2, energy, s, None, 0x1230) == OK
        assert gpu.calls() == "l"
        for arguments, message in (((at + 4, 30, 2, energy, None, None), "x is not at a multiple of 16 bytes"),
                                   ((at, 30, 2, energy, s + 8, None), "the place for scores is not at a multiple"),
                                   ((at, 30, level, energy, s, flag + 1), "the place for flags is not at a multiple"),
                                   ((at, 30, 2, energy, s, flag), f"the threshold is of level {level}"),
                                   ((at, 2**31, 2, energy, s, None), "n is 2147483648, expected at most 2147483647")):
            assert c.score_device(handle, *arguments, None) == BAD_ARGUMENT
            assert message in c.error()
        gpu.free(at, energy, s, flag)
    assert (gpu.live(), gpu.c.fake_depth()) == (0, 0)


def concurrent_calls(library: Path, path: Path) -> None:
    gpu = FakeGpu(Compiled(path), simple(lambda: gpu))
    c = Library(library)
    x = np.random.default_rng(0).normal(size=(500, D)).astype(np.float32)

    def call(i: int) -> bool:
        code, energy, s, _ = score(c, handle, x[i:], with_score=i % 2 == 0)
        return code == OK and np.array_equal(energy, x[i:, 0]) and (s is None or np.array_equal(s, 2 * x[i:]))

    with c.opened(path) as handle, ThreadPoolExecutor(6) as pool:
        assert all(pool.map(call, range(200)))


def which_kernel(library: Path, path: Path) -> None:
    gpu = FakeGpu(Compiled(path), lambda launch: None)
    c = Library(library)
    for cc, expected in ((80, 80), (86, 80), (89, 80), (90, 90)):
        gpu.set(fake_cc=cc)
        with c.opened(path) as handle:
            assert c.architecture(handle) == expected
    for cc, advice in ((75, "the kernels need sm_80 or newer"),
                       *((cc, f"compile it with 'python -m kernels cubin ... --arch {cc}'") for cc in (91, 100, 120))):
        gpu.set(fake_cc=cc)
        assert c.try_open(path)[0] == NO_KERNEL
        assert c.error() == f"{path}: compiled for sm_80, sm_90a, but Fake GPU is sm_{cc}: {advice}"
    assert gpu.live() == 0


@pytest.mark.parametrize("function", [blocks_and_flags, what_the_model_says, pointers_of_the_device,
                                      concurrent_calls, which_kernel])
def test_on_the_stand_in(library, child, path, function):
    child.run(function, library, path)


def failing(library: Path, path: Path, function: bytes) -> None:
    gpu = FakeGpu(Compiled(path), lambda launch: None)
    c = Library(library)
    gpu.fail(function)
    code, handle = c.try_open(path)
    if code == OK:
        assert score(c, handle, events(9, D))[0] == FAILED
    else:
        assert code == (NO_DEVICE if function == b"cuInit" else FAILED)
    assert "as the test asked for (CUDA_ERROR_FAKE)" in c.error()
    gpu.fail(b"")
    c.close(handle)
    assert (gpu.live(), gpu.c.fake_depth()) == (0, 0)


@pytest.mark.parametrize("function", [
    "cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuEventCreate", "cuModuleLoadData", "cuModuleGetFunction",
    "cuMemAlloc_v2", "cuMemcpyHtoDAsync_v2", "cuLaunchKernel", "cuMemcpyDtoHAsync_v2"])
def test_failures_of_the_driver_leave_nothing_behind(library, child, path, function):
    child.run(failing, library, path, function.encode())


def no_gpu(library: Path, path: Path) -> None:
    failing(library, path, b"cuInit")
    gpu, c = FakeGpu(Compiled(path), lambda launch: None), Library(library)
    gpu.set(fake_devices=0)
    assert c.try_open(path)[0] == NO_DEVICE
    assert c.error().startswith("starting the NVIDIA driver: ")
    gpu.set(fake_devices=1)
    with c.opened(path):
        gpu.set(fake_devices=0)
        assert c.try_open(path)[0] == NO_DEVICE
        assert c.error() == "the NVIDIA driver sees no GPU"


def test_a_driver_without_a_gpu(library, stand_in, path):
    with Child(stand_in) as fresh:  # whose driver has not been started yet
        fresh.run(no_gpu, library, path)
