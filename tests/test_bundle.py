"""Bundles: what goes in comes out to the bit, and damage or interruption never passes for a model."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from ebm.bundle import Architecture, Bundle, Threshold, check_destination
from ebm.events import DataError, Schema
from ebm.preprocess import Preprocessing

THRESHOLD = Threshold(float(np.float32(0.1)), 1e-4, 0.95, 5, 100_000, 9.9e-5, True, 5)


def model(seed=0, kind="energy"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(500, 6)).astype(np.float32) ** 3
    x[::4, 2] = -999.0
    schema = Schema("test", tuple("abcdef"), ("GeV",) * 6, -999.0, (False, False, True, True, False, False))
    bundle = Bundle.random(6, 32, 2, seed=seed, kind=kind, preprocessing=Preprocessing.fit(x, schema))
    return replace(bundle, schema=schema, threshold=THRESHOLD, provenance={"seed": seed, "command": "test"})


@pytest.mark.parametrize("kind", ["energy", "score", "autoencoder"])
def test_round_trip(tmp_path, kind):
    before = model(kind=kind)
    before.save(tmp_path / "runs" / "m")
    after = Bundle.load(tmp_path / "runs" / "m")
    assert (after.architecture, after.threshold) == (before.architecture, THRESHOLD)
    assert after.provenance == before.provenance
    assert (after.sigmas, after.default_level, after.digest) == (before.sigmas, before.default_level, before.digest)
    assert after.schema == before.schema
    assert after.tensors.keys() == before.tensors.keys()
    for name, t in before.tensors.items():
        assert after.tensors[name].tobytes() == t.tobytes()
    for name, column in vars(before.preprocessing).items():
        np.testing.assert_array_equal(getattr(after.preprocessing, name), column)
    assert after.reports == {}
    assert sorted(os.listdir(tmp_path / "runs" / "m")) == ["model.json", "model.safetensors"]
    assert os.listdir(tmp_path / "runs") == ["m"]


def test_digest_is_of_what_determines_an_energy():
    b = model()
    assert replace(b, provenance={}, threshold=None, reports={"int8": {"n": 1}}).digest == b.digest
    changed = b.tensors | {"w_out": np.nextafter(b.tensors["w_out"], 9)}
    mean = b.preprocessing.mean.copy()
    mean[0] += 1
    others = [model(1), replace(b, tensors=changed), replace(b, default_level=4),
              replace(b, preprocessing=replace(b.preprocessing, mean=mean))]
    assert len({b.digest, *(o.digest for o in others)}) == 5


def test_reports_are_kept_and_may_be_absent(tmp_path):
    reports = {"int8": {"n": 3, "change": {"auroc": None}, "model_digest": model().digest}}
    replace(model(), reports=reports).save(tmp_path / "m")
    assert Bundle.load(tmp_path / "m").reports == reports
    edit(tmp_path / "m", lambda d: d.pop("reports"))  # a bundle of before there were any
    assert Bundle.load(tmp_path / "m").reports == {}


def edit(path, change):
    description = json.loads((path / "model.json").read_text())
    change(description)
    (path / "model.json").write_text(json.dumps(description))


DAMAGE = {
    "no directory": (lambda p: os.rename(p, p.with_name("gone")), "no such model directory"),
    "no json": (lambda p: (p / "model.json").unlink(), "model.json: cannot be read"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: cannot be read"),
    "json is a directory": (lambda p: ((p / "model.json").unlink(), (p / "model.json").mkdir()), "model.json"),
    "truncated json": (lambda p: (p / "model.json").write_text((p / "model.json").read_text()[:200]), "model.json"),
    "binary json": (lambda p: (p / "model.json").write_bytes(b"\xff\xfe\x00"), "model.json"),
    "foreign json": (lambda p: (p / "model.json").write_text('{"format": "other"}'), "model.json"),
    "json list": (lambda p: (p / "model.json").write_text("[1]"), "model.json"),
    "later version": (lambda p: edit(p, lambda d: d.update(format_version=2)), "model.json: format version 2"),
    "truncated weights": (lambda p: os.truncate(p / "model.safetensors", 5000), "model.safetensors: truncated"),
    "foreign weights": (lambda p: (p / "model.safetensors").write_bytes(b"PK\x03\x04" * 999), "model.safetensors"),
    "entry missing": (lambda p: edit(p, lambda d: d.pop("sigmas")), "model.json: entry 'sigmas'"),
    "feature missing": (lambda p: edit(p, lambda d: d["features"].pop()), "6"),
    "wrong type": (lambda p: edit(p, lambda d: d.update(sigmas="ten")), "m"),
    "wrong width": (lambda p: edit(p, lambda d: d["architecture"].update(hidden_dim=16)), r"\[16"),
    "no kind": (lambda p: edit(p, lambda d: d["architecture"].update(kind="diffusion")), "diffusion"),
    "huge": (lambda p: edit(p, lambda d: d["architecture"].update(n_layers=10**9)), "n_layers"),
    "transform": (lambda p: edit(p, lambda d: d["features"][0].update(transform="sqrt")), "m"),
    "threshold": (lambda p: edit(p, lambda d: d["threshold"].pop("energy")), "energy"),
    "reports": (lambda p: edit(p, lambda d: d.update(reports={"int8": "fine"})), "reports must be a dictionary"),
    "reports list": (lambda p: edit(p, lambda d: d.update(reports=["int8"])), "reports must be a dictionary"),
    "level": (lambda p: edit(p, lambda d: d.update(default_level=99)), "default_level is 99"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path, name):
    damage, message = DAMAGE[name]
    path = tmp_path / "m"
    model().save(path)
    damage(path)
    with pytest.raises(DataError, match=message) as error:
        Bundle.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_of_another_model(tmp_path):
    model(0).save(tmp_path / "a")
    model(1).save(tmp_path / "b")
    os.replace(tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors")
    with pytest.raises(DataError, match="another model"):
        Bundle.load(tmp_path / "b")


def test_what_is_no_bundle_is_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("data")
    for name in ("thesis", "file", "file/model"):
        for refuse in (check_destination, model().save):
            with pytest.raises(DataError, match=name):
                refuse(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["file", "thesis"]
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b/c"):
        check_destination(tmp_path / name)
        model().save(tmp_path / name)
        assert Bundle.load(tmp_path / name).digest == model().digest


def test_a_link_stays_a_link(tmp_path):
    model(0).save(tmp_path / "v1")
    (tmp_path / "latest").symlink_to("v1")
    model(1).save(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert Bundle.load(tmp_path / "v1").digest == model(1).digest


KILLED = """
import os, sys
from test_bundle import model
steps = 0
def dies_at(function):
    def wrapped(*a, **kw):
        global steps
        steps += 1
        if steps == int(sys.argv[2]):
            os._exit(9)
        return function(*a, **kw)
    return wrapped
import ebm.bundle
for name in ("fsync", "rename"):
    setattr(ebm.bundle.os, name, dies_at(getattr(os, name)))
ebm.bundle._exchange = dies_at(ebm.bundle._exchange)
ebm.bundle.shutil.rmtree = dies_at(ebm.bundle.shutil.rmtree)
model(1).save(sys.argv[1])
"""


def test_killed_while_saving(tmp_path):
    """At whatever step the process dies, the directory holds the old model or the new one, whole."""
    path, old, new = tmp_path / "m", model(0).digest, model(1).digest
    found = []
    for step in range(1, 10):
        model(0).save(path)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.path.dirname(__file__)])}
        done = subprocess.run([sys.executable, "-c", KILLED, path, str(step)], env=environment, check=False)
        found.append(Bundle.load(path).digest)
        if done.returncode == 0:
            break
        assert done.returncode == 9
    assert found == [old] * 3 + [new] * (len(found) - 3)
    assert len(found) > 4


def test_a_failed_write_leaves_the_old_model(tmp_path, monkeypatch):
    path = tmp_path / "m"
    model(0).save(path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ebm.bundle.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        model(1).save(path)
    monkeypatch.undo()
    assert Bundle.load(path).digest == model(0).digest
    assert os.listdir(tmp_path) == ["m"]


def test_without_an_exchange_the_file_system_renames_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("ebm.bundle.ctypes.CDLL", lambda _: object())
    model(0).save(tmp_path / "m")
    model(1).save(tmp_path / "m")
    assert Bundle.load(tmp_path / "m").digest == model(1).digest
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("sizes", [{"hidden_dim": 0}, {"n_layers": 9}, {"input_dim": 257}, {"input_dim": 6.0},
                                   {"kind": "flow"}])
def test_impossible_architectures(sizes):
    with pytest.raises(DataError, match=next(iter(sizes))):
        Architecture(**({"kind": "energy", "input_dim": 6} | sizes))


@pytest.mark.parametrize("change", [{"sigmas": (1.0,) * 10}, {"sigmas": (2.0, 1.0)}, {"default_level": 10},
                                    {"preprocessing": Preprocessing.identity(5)}, {"tensors": {}}])
def test_parts_that_do_not_fit(change):
    with pytest.raises(DataError):
        replace(model(), **change)
    tensors = model().tensors
    for name, t in (("w_out", tensors["w_out"][:-1]), ("w_in", tensors["w_in"].astype(np.float64)),
                    ("b_in", np.full_like(tensors["b_in"], np.nan)), ("extra", tensors["b_in"])):
        with pytest.raises(DataError, match=name):
            replace(model(), tensors=tensors | {name: t})
