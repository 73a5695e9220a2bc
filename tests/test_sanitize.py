"""A slice of `make sanitize`: kernels under ASan and UBSan, concurrent calls under TSan."""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest
from c_library import PATH, ROOT, run


@pytest.mark.parametrize(("sanitizer", "flag", "part"), [
    ("address", "-fsanitize=address,undefined", "slice"),
    ("thread", "-fsanitize=thread", "threads"),
])
def test_nothing_found(sanitizer, flag, part, tmp_path, monkeypatch):
    for tool in ("cmake", "g++"):
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"{tool} was not found, which builds the sanitized kernels")
    start = _without_randomisation()
    (tmp_path / "probe.cpp").write_text("int main() {}\n")
    for command in (["g++", flag, tmp_path / "probe.cpp", "-o", tmp_path / "probe"], [*start, tmp_path / "probe"]):
        if (probe := subprocess.run(command, capture_output=True, text=True)).returncode != 0:
            pytest.skip(f"{flag} does not work here: {probe.stderr[-300:]}")
    # For a processor of no known kind CMake builds the generic kernels alone: seconds instead of minutes.
    run("cmake", "-S", ROOT, "-B", tmp_path / "build", f"-DFUSED_EBM_SANITIZE={sanitizer}",
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=any")
    run("cmake", "--build", tmp_path / "build", "--target", "sanitize", "--parallel", "2")
    monkeypatch.delenv("FUSED_EBM_ISA", raising=False)
    assert run(*start, tmp_path / "build" / "sanitize", part).stdout == "generic: nothing found\n"


def _without_randomisation() -> list[str]:
    """What starts a program at fixed addresses, where that is allowed: ThreadSanitizer may need it."""
    start = ["setarch", platform.machine(), "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*start, "true"], capture_output=True).returncode == 0
    return start if allowed else []
