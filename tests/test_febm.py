"""Packed model files: what is damaged, foreign or newer is refused, and whatever the bytes are, nothing crashes."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from c_library import BAD_FILE, CANNOT_READ, NEWER_FILE, PATH, ROOT, Library, load, run
from scorers import model

from ebm.bundle import Bundle, Threshold
from kernels.febm import HEADER, febm_bytes


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    return load(tmp_path_factory)


def test_damaged_files(library, tmp_path):
    whole, path = febm_bytes(model(5, 16, 1)), tmp_path / "m.febm"
    assert library.try_bytes(whole, path) == 0
    rng = np.random.default_rng(0)
    for at in [*range(HEADER.size), *rng.integers(HEADER.size, len(whole), 200)]:
        for bit in (1, 128):
            damaged = bytearray(whole)
            damaged[at] ^= bit
            assert library.try_bytes(damaged, path) in (BAD_FILE, NEWER_FILE), at
    for length in [*range(HEADER.size + 40), *range(HEADER.size, len(whole), 97), len(whole) - 1]:
        assert library.try_bytes(whole[:length], path) == BAD_FILE, length
    for content, code, message in (
        (whole[:8] + struct.pack("<I", 2) + whole[12:], NEWER_FILE, "format version 2, this library"),
        (whole[:-1], BAD_FILE, f"truncated: {len(whole) - 1} bytes, expected {len(whole)}"),
        (whole[:-1] + b"?", BAD_FILE, "damaged: its SHA-256 is another"),
        (whole + b"?", BAD_FILE, "damaged: bytes after its end"),
        (b"PK\3\4" + whole, BAD_FILE, "not a packed model: 'python -m kernels pack' writes one"),
        (b"", BAD_FILE, "not a packed model"),
    ):
        assert library.try_bytes(content, path) == code
        assert library.error().startswith(f"{path}: {message}")
    assert library.try_open(tmp_path / "none")[0] == CANNOT_READ
    assert library.error() == f"{tmp_path / 'none'}: No such file or directory"
    assert library.try_open(tmp_path)[0] == CANNOT_READ
    assert library.error() == f"{tmp_path}: not a regular file"


def test_every_number_of_the_header_is_checked(library, tmp_path):
    """With the checksum put right, so that only the bounds stand between a number and the memory behind it."""
    whole, path = febm_bytes(model(5, 16, 1)), tmp_path / "m.febm"
    for at in range(24, 160, 4):
        for value in (0, 1, 63, 257, 2**31 - 1, 2**32 - 64, 2**32 - 1):
            content = bytearray(whole)
            content[at:at + 4] = struct.pack("<I", value)
            content[192:224] = hashlib.sha256(content[:192] + content[224:]).digest()
            code = library.try_bytes(content, path)
            assert code in (0, BAD_FILE)
            assert code == BAD_FILE or value < 2**31 or at in (48, 52), (at, value)


def test_pack_refuses(tmp_path):
    def pack(*arguments: object) -> str:
        command = [sys.executable, "-m", "kernels", "pack", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        return result.stderr

    assert "no such model directory" in pack(tmp_path / "none", tmp_path / "m.febm")
    demo = ROOT / "models" / "demo"
    assert "cannot be written" in pack(demo, tmp_path / "none" / "m.febm")
    (tmp_path / "letter").write_text("dear")
    assert "is no packed model: it is not overwritten" in pack(demo, tmp_path / "letter")
    assert [p.name for p in tmp_path.iterdir()] == ["letter"]
    with pytest.raises(ValueError, match="only energy networks are packed"):
        febm_bytes(Bundle.random(5, 16, 1, kind="score"))
    other = Threshold(1.0, 0.5, 0.95, 1, 1, 1.0, False, level=0)
    with pytest.raises(ValueError, match="threshold is of noise level 0, the default level is 5"):
        febm_bytes(replace(model(5, 16, 1), threshold=other))


@pytest.mark.full
def test_sanitizers(tmp_path):
    if shutil.which("cmake", path=PATH) is None:
        pytest.skip("cmake was not found")
    assert run(ROOT / "tests" / "native" / "sanitize.sh", tmp_path).stdout.count("nothing found") >= 3
