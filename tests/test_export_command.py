"""`python -m export`: what it prints, and what it says of bad input."""

from __future__ import annotations

import json
import sys

import pytest
from export_case import small
from typer.testing import CliRunner

from export import __main__ as commands
from export.__main__ import app
from export.build import TARGETS
from export.describe import describe


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments):
    """The one sentence on stderr of a command that must end with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_build_and_inspect(tmp_path, monkeypatch):
    small().save(tmp_path / "model")
    arguments = ["build", tmp_path / "model", "--to", "torchscript", "--out", tmp_path / "out", "--outputs",
                 "energy,energies", "--noise-level", "3", "--no-preprocess"]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    for words in ("noise level │ 3", "(batch, 6) float32, preprocessed: x0, x1, x2, x3 ... x5", "energies (batch, 10)",
                  "model.pt", "0.5 at noise level 5", "first_call_ms"):
        assert words in result.stdout
    (shown,) = json.loads(run("inspect", tmp_path / "out" / "model.pt", "--json").stdout)
    assert shown["options"] == {"outputs": ["energy", "energies"], "level": 3, "preprocess": False, "batch_max": 65_536}
    assert shown["command"] == ("python -m export build model --to torchscript --out out --outputs energy,energies "
                                "--noise-level 3 --no-preprocess")
    assert "golden" not in shown


def test_build_prints_json(tmp_path):
    small().save(tmp_path / "model")
    result = run("build", tmp_path / "model", "--to", "torchscript", "--out", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["exports"] == json.loads(run("inspect", tmp_path / "out", "--json").stdout)


def test_inspect_says_what_is_damaged(exported, copied):
    assert run("inspect", copied).exit_code == 0
    assert describe(exported[1])[0]["damaged"] == []
    (copied / "source" / "model.json").write_bytes(b"{}")
    result = run("inspect", copied / "model.onnx")
    assert result.exit_code == 1
    assert "DAMAGED" in result.stdout
    assert "model.json" in result.stdout
    assert "model.pt" not in result.stdout


def test_verify_command(exported, copied, tmp_path):
    result = run("verify", exported[1], "--json", tmp_path / "proof.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "proof.json").read_text())["ok"]
    (copied / "model.pt").write_bytes(b"PK")
    assert run("verify", copied).exit_code == 1
    assert "is no directory" in refused("verify", exported[1], "--json", tmp_path / "none" / "proof.json")


def test_bad_input_gives_one_sentence(tmp_path, exported):
    small().save(tmp_path / "model")
    out = tmp_path / "out"
    assert "targets are onnxx" in refused("build", tmp_path / "model", "--to", "onnxx", "--out", out)
    assert "no such model directory" in refused("build", tmp_path / "none", "--to", "onnx", "--out", out)
    assert "never overwritten" in refused("build", tmp_path / "model", "--to", "torchscript", "--out", exported[1])
    assert "arguments for tensorrt" in refused("build", tmp_path / "model", "--to", "torchscript", "--out", out,
                                               "--tensorrt-precision", "fp16")
    assert "'python -m export build' exports it" in refused("inspect", tmp_path / "model")
    assert "holds no export.json" in refused("inspect", tmp_path / "none")
    assert not out.exists()


@pytest.mark.parametrize("command", ["build", "verify", "inspect"])
def test_help_teaches(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example: python -m export" in result.output
    assert list(TARGETS) == commands.TARGETS.split(", ")
