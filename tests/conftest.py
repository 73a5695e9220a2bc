"""Set before anything imports triton: its kernels run in the interpreter, on a machine without a GPU."""

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def postgresql():
    """What `bench.servers.postgresql` gives, or the reason why its tests are skipped."""
    from bench import servers

    if why_not := servers.postgresql_why_not():
        pytest.skip(why_not)
    with servers.postgresql() as both:
        yield both


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A small model and its export to TorchScript and ONNX."""
    from export_case import small

    from export.build import TARGETS, build

    for module in TARGETS["onnx"].needs:
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("export") / "out"
    assert build(small(), ["torchscript", "onnx"], out, command="python -m export build ...") == out
    return small(), out


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    """An export that a test may damage."""
    return Path(shutil.copytree(exported[1], tmp_path / "out"))
