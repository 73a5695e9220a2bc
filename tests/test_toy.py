"""The toy generator: deterministic, and plausible enough to stand in for data."""

import numpy as np
import pytest

from ebm.events import DataError, fold, load_events
from ebm.preprocess import Preprocessing
from ebm.toy import PROCESSES, RESONANCE_MASS, SIGNALS, _decay, generate, toy


@pytest.fixture(scope="module")
def samples():
    return {process: generate(process, 5000, seed=3) for process in PROCESSES}


def column(events, name):
    return events.x[:, events.schema.features.index(name)]


def test_same_arguments_same_events():
    one, two, other = toy(500, 50, seed=1), toy(500, 50, seed=1), toy(500, 50, seed=2)
    np.testing.assert_array_equal(one.x, two.x)
    np.testing.assert_array_equal(one.event_id, two.event_id)
    assert one.digest == two.digest
    assert one.digest != other.digest
    assert not np.array_equal(one.x, other.x, equal_nan=True)


def test_processes_draw_apart():
    assert not np.array_equal(generate("qcd", 10, 0).x, generate("qcd", 10, 1).x, equal_nan=True)


def test_mixture():
    events = toy(1000, 100)
    number = {process: (events.process == process).sum() for process in PROCESSES}
    assert number == {"qcd": 800, "ttbar": 200, "dijet": 50, "soft": 50}
    np.testing.assert_array_equal(events.label == 1, np.isin(events.process, SIGNALS))
    assert len(set(events.event_id)) == len(events)
    assert all(event_id.split(":")[0] == "1" and event_id.count(":") == 2 for event_id in events.event_id)
    assert 0 < events.label[:300].sum() < 100  # shuffled
    assert set(fold(events)) == set(range(10))


def test_types_and_missing_values(samples):
    optional = np.array(samples["qcd"].schema.optional)
    for events in samples.values():
        assert events.x.dtype == np.float32
        assert events.label.dtype == np.int8
        assert not np.isinf(events.x).any()
        assert not np.isnan(events.x[:, ~optional]).any()


def test_multijet_spectrum_falls(samples):
    ht = column(samples["qcd"], "ht")
    counts, _ = np.histogram(ht, np.arange(250, 1500, 250))
    assert (counts[1:] < counts[:-1]).all()
    assert counts[-1] > 0
    assert np.nanmedian(column(samples["qcd"], "dphi_jj")) > 2.8
    assert 2 < column(samples["qcd"], "n_jets").mean() < 5


def test_top_pairs(samples):
    leptonic = column(samples["ttbar"], "n_lep") > 0
    assert 0.25 < leptonic.mean() < 0.5
    met = column(samples["ttbar"], "MET")
    assert (met > 0).all()
    assert np.median(met[leptonic]) > 1.5 * np.median(met[~leptonic])
    assert np.median(met[leptonic]) > 40
    assert column(samples["ttbar"], "n_btag").mean() > 1
    assert column(samples["qcd"], "n_btag").mean() < 0.4


def test_decays_conserve_four_momentum():
    p3 = np.random.default_rng(0).normal(0, 200, (1000, 3))
    top = np.column_stack([np.sqrt(172.5**2 + (p3**2).sum(axis=1)), p3])
    products = _decay(np.random.default_rng(1), top, 4.8, 80.4)
    np.testing.assert_allclose(products.sum(axis=1), top, atol=1e-9)
    mass = np.sqrt(products[..., 0] ** 2 - (products[..., 1:] ** 2).sum(axis=2))
    np.testing.assert_allclose(mass, np.broadcast_to([4.8, 80.4], mass.shape), rtol=1e-6)


def test_resonance_peaks_at_its_mass(samples):
    m_jj = column(samples["dijet"], "m_jj")
    counts, edges = np.histogram(m_jj[~np.isnan(m_jj)], np.arange(0, 4000, 100))
    assert edges[counts.argmax()] == pytest.approx(RESONANCE_MASS, rel=0.06)
    assert np.nanmedian(m_jj) == pytest.approx(RESONANCE_MASS, rel=0.12)


def test_soft_events_are_many_soft_objects(samples):
    soft, qcd = samples["soft"], samples["qcd"]
    assert np.median(column(soft, "n_jets")) >= 8
    assert np.median(column(soft, "obj0_E")) < np.median(column(qcd, "obj0_E"))
    assert np.quantile(column(soft, "ht"), 0.1) < np.quantile(column(qcd, "ht"), 0.9)
    assert np.median(column(soft, "sphericity")) > 0.4


def test_energies_stay_below_those_of_the_beams(samples):
    for events in samples.values():
        assert np.nanmax(column(events, "obj0_E")) < 1.2 * 6500  # with resolution


def test_toy_is_a_source():
    events = load_events("toy:200")
    assert (len(events), events.label.sum()) == (204, 4)
    np.testing.assert_array_equal(events.x, toy(200, 4, seed=0).x)


def test_background_can_be_preprocessed():
    events = toy(5000, 0)
    u = Preprocessing.fit(events.x, events.schema)(events.x)
    assert np.isfinite(u).all()


def test_empty_and_wrong_requests():
    assert toy(0, 0).x.shape == (0, 64)
    with pytest.raises(DataError, match=r"unknown process 'susy', expected one of qcd, ttbar"):
        generate("susy", 1)
    with pytest.raises(DataError, match="-1 events"):
        generate("qcd", -1)
