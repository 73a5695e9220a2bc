"""Train, calibrate and test events never mix, in whatever file they come."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ebm.bundle import Bundle
from ebm.events import DataError, Events, Schema, fold, load_events, split
from ebm.folds import check_apart, fingerprint, recalibrate, shared, trained_on
from ebm.threshold import calibrate

SCHEMA = Schema("s", ("pt", "n_jets"), ("GeV", ""))


def events(n, first=0, labels=True, seed=0, has_id=True, **more):
    rng = np.random.default_rng(seed)
    x = np.stack([rng.exponential(size=n), rng.integers(0, 4, n)], 1).astype(np.float32)
    return Events(SCHEMA, x, np.arange(first, first + n).astype(str), (np.arange(n) % 10 == 9).astype(np.int8) if labels
                  else None, source="data.csv", has_id=has_id, **more)


def bundle(**provenance):
    return replace(Bundle.random(2, 8, 1), schema=SCHEMA, provenance=provenance)


def energy(x):
    return x[:, 0]


def test_a_sample_is_known_again():
    known = fingerprint(events(50_000))
    assert len(known) < 11_000  # characters
    assert shared(known, events(50_000, seed=1)) == 1024  # other values, the same events
    assert 5 < shared(known, events(1000, first=30_000)) < 45
    assert shared(known, events(50_000, first=50_000)) == 0
    assert shared(known, events(50_000)[:0]) == 0
    assert shared(fingerprint(events(10)), events(3)) == 3


def test_without_event_numbers_the_row_counts():
    a, b = events(3000, has_id=False), events(3000, has_id=False, seed=1)
    gaps = replace(a, x=np.where(a.x == 0, np.float32(np.nan), a.x))
    assert shared(fingerprint(gaps), gaps) == 1024
    assert shared(fingerprint(a), b) == 0
    assert np.array_equal(fold(a), fold(replace(a, event_id=b.event_id[::-1])))


def test_parts_that_share_an_event_are_refused():
    check_apart(train=events(100), calibrate=events(100, first=100), test=events(10, first=500))
    with pytest.raises(DataError, match="2 events are in both train and test, such as event 98"):
        check_apart(train=events(100), calibrate=events(100, first=100), test=events(2, first=98))
    sample = events(2000)
    check_apart(**{name: sample[rows] for name, rows in split(sample)._asdict().items()})


def test_events_in_another_file_are_known():
    model = bundle(source="a.csv", data_digest="1", fingerprint=fingerprint(events(3000)))
    assert trained_on(model, events(3000, digest="1"))
    assert trained_on(model, events(500, seed=3, digest="2"))  # another file with some of the same events
    assert not trained_on(model, events(3000, first=3000, digest="2"))
    assert not trained_on(bundle(source="a.csv", data_digest="1"), events(500, digest="2"))  # of an earlier version


def test_the_three_files_of_higgsml_share_events():
    if "FUSED_EBM_DATA" not in os.environ:
        pytest.skip("FUSED_EBM_DATA is not set")
    files = sorted((Path(os.environ["FUSED_EBM_DATA"]) / "higgsml").glob("*.*"))
    loaded = [load_events(f) for f in files]
    assert len({e.digest for e in loaded}) == len(files) == 3
    for one in loaded:
        model = replace(Bundle.random(one.schema.n_features, 8, 1), provenance={"fingerprint": fingerprint(one)})
        assert all(trained_on(model, other) for other in loaded)


def test_recalibration_of_other_data_leaves_the_test_folds():
    model, data = bundle(source="a.csv", fingerprint=fingerprint(events(3000))), events(5000, first=10_000, digest="2")
    new = recalibrate(model, data, energy, rate=0.01, backend="native")
    used = data[~split(data).test].background()
    assert new.threshold == calibrate(energy(used.x), 0.01, level=model.default_level)
    assert new.threshold.guaranteed
    assert new.class_thresholds is None
    assert new.digest == model.digest
    note = new.provenance["calibration"]
    assert (note["source"], note["background_events"], note["backend"]) == ("data.csv", len(used), "native")
    # From now on only the test folds of these events are tested, but they may calibrate again.
    assert trained_on(new, data)
    assert recalibrate(new, data, energy, rate=0.01).threshold == new.threshold


def test_recalibration_of_the_data_trained_on():
    data = events(20_000)
    model = bundle(fingerprint=fingerprint(data[split(data).train]))
    used = data[split(data).calibrate].background()
    new = recalibrate(model, data, energy, rate=0.01)
    assert new.threshold == calibrate(energy(used.x), 0.01, level=model.default_level)


def test_recalibration_by_class_survives_the_disk(tmp_path):
    new = recalibrate(bundle(), events(20_000), energy, rate=0.01, by="n_jets")
    assert new.class_thresholds.lowest == (0, 1, 2, 3)
    new.save(tmp_path / "m")
    again = Bundle.load(tmp_path / "m")
    assert again.class_thresholds == new.class_thresholds
    assert again.threshold == new.threshold
    assert recalibrate(again, events(20_000), energy, rate=0.01).class_thresholds is None


def test_recalibration_with_weights():
    data = events(20_000)
    weighted = replace(data, weight=np.where(data.x[:, 0] > 3, 0.1, 1.0))
    with pytest.warns(UserWarning, match="guarantee no rate"):
        new = recalibrate(bundle(), weighted, energy, rate=0.01, weighted=True)
    assert new.threshold.energy < recalibrate(bundle(), weighted, energy, rate=0.01).threshold.energy
    with pytest.raises(DataError, match=r"data\.csv: no weights"):
        recalibrate(bundle(), data, energy, weighted=True)
    with pytest.raises(DataError, match="sum to 0"):
        recalibrate(bundle(), replace(data, weight=np.zeros(20_000)), energy, weighted=True)


def test_bad_recalibration():
    with pytest.raises(ValueError, match="by is 'jets', expected a feature of s: pt, n_jets"):
        recalibrate(bundle(), events(100), energy, by="jets")
    signal = replace(events(100), label=np.ones(100, np.int8))
    with pytest.raises(DataError, match="no background event in the calibration folds"):
        recalibrate(bundle(), signal, energy)
    with pytest.raises(DataError, match="no background event"):
        recalibrate(bundle(fingerprint=fingerprint(events(1))), events(1), energy)


def test_a_model_of_an_earlier_version_loads():
    demo = Bundle.load(Path(__file__).parents[1] / "models" / "demo")
    assert demo.threshold.guaranteed
    assert demo.threshold.n_eff is None
    assert demo.threshold.expected_rate < demo.threshold.rate


def test_damaged_classes():
    new = recalibrate(bundle(), events(20_000), energy, rate=0.01, by="n_jets")
    with pytest.raises(DataError, match="'n_jets', which is no feature"):
        replace(new, schema=Schema("other", ("a", "b"), ("", "")))
    with pytest.raises(DataError, match="ascending values of n_jets, given 4 for"):
        replace(new.class_thresholds, lowest=(0, 1, 3, 2))
    with pytest.raises(DataError, match="given 4 for"):
        replace(new.class_thresholds, lowest=(0, 1))
