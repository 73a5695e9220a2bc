"""`python -m ebm describe`: what a file holds, as tables and as JSON."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ebm.__main__ import app
from ebm.describe import describe

FILES = Path(os.environ.get("FUSED_EBM_DATA", "/nonexistent")) / "rootfiles"


def run(*arguments):
    return CliRunner().invoke(app, ["describe", *map(str, arguments)])


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    mass = rng.normal(1e4, 0.5, 1000)
    mass[:250] = np.nan
    path = tmp_path / "a.npz"
    np.savez(path, mass=mass, pt=np.arange(1000.0), same=np.full(1000, 3.0), none=np.full(1000, np.nan),
             label=np.arange(1000) % 4 == 0, weight=np.where(np.arange(1000) < 100, -1.0, 1.0), run=np.ones(1000, int),
             event=np.arange(1000))  # fmt: skip
    return path, mass


def test_what_it_sees(table):
    path, mass = table
    d = describe(path)
    assert (d["layout"], d["schema"], d["events"]) == ("table", "table", 1000)
    assert d["labels"] == {"column": "label", "signal": 250, "background": 750}
    assert d["weights"] == {"column": "weight", "sum": 800, "negative": 100, "n_eff": pytest.approx(640)}
    assert d["id"] == {"columns": "run:event", "first": "1:0", "from_file": True}
    feature = {f["name"]: f for f in d["features"]}
    assert list(feature) == ["mass", "pt", "same", "none"]
    assert feature["mass"]["missing"] == 0.25
    kept = mass[250:].astype(np.float32).astype(np.float64)
    assert feature["mass"]["std"] == pytest.approx(kept.std(), rel=1e-9)  # no digits lost beside a mean of 1e4
    assert feature["mass"]["mean"] == pytest.approx(kept.mean(), rel=1e-12)
    assert (feature["pt"]["min"], feature["pt"]["max"]) == (0, 999)
    assert [f["problem"] for f in d["features"]] == [None, None, "constant", "no value"]
    assert feature["none"]["mean"] is None


def test_tables_and_json(table):
    result = run(table[0])
    assert result.exit_code == 0
    for part in ("1,000 of 4 features", "250 signal, 750 background", "100 negative", "25.0%", "constant", "no value",
                 "run:event, the first is 1:0"):  # fmt: skip
        assert part in result.stdout
    result = run(table[0], "--json")
    assert json.loads(result.stdout)["events"] == 1000
    assert "toy" in run("toy:500").stdout


def test_what_cannot_be_described(tmp_path):
    result = run(tmp_path / "absent.root")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'absent.root'}: cannot be read: No such file")
    (tmp_path / "b.csv").write_text("a,b\n1,2\n3\n")
    assert "line 3: expected 2 fields, given 1" in run(tmp_path / "b.csv").stderr


@pytest.mark.skipif("FUSED_EBM_DATA" not in os.environ, reason="FUSED_EBM_DATA is not set: no real NanoAOD")
def test_nanoaod_with_and_without_its_era():
    known = describe(f"{FILES / 'nano_dy.root'}?era=2018")
    assert (known["layout"], known["era"], known["schema"]) == ("NanoAOD", "2018", "hep64-v1/DeepFlavB")
    assert known["weights"]["negative"] == 9
    unknown = describe(FILES / "nano_dy.root")
    assert unknown["era"] == "unknown, 2016 assumed for n_btag"
    assert "simulation does not say its era" in unknown["note"]
    differs = [a["name"] for a, b in zip(known["features"], unknown["features"]) if a != b]
    assert set(differs) <= {"n_btag"}
    output = run(FILES / "nano_dy.root").stdout
    assert "1:13889:3749778" in output
    assert "give the option 'era'" in " ".join(output.split())
