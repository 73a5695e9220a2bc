"""The toy generator: deterministic, and plausible enough to stand in for data."""

import numpy as np
import pytest

from ebm.events import DataError, fold, load_events
from ebm.preprocess import Preprocessing
from ebm.toy import BOSON_MASS, PROCESSES, RESONANCE_MASS, SIGNALS, generate, toy
from ebm.toy_detector import decay
from ebm.toy_random import Draws


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


@pytest.mark.parametrize("process", PROCESSES)
def test_an_event_is_the_same_in_every_slice(process):
    whole = generate(process, 5000, seed=2)
    for start, n in ((0, 1), (1, 2), (7, 64), (1000, 333), (4097, 903)):
        part = generate(process, n, seed=2, start=start)
        np.testing.assert_array_equal(part.x, whole.x[start : start + n])
        np.testing.assert_array_equal(part.event_id, whole.event_id[start : start + n])
        assert part.digest != whole.digest


def test_toys_of_two_sizes_share_their_events():
    small, large = toy(400, 8), toy(4000, 80)
    rows = dict(zip(large.event_id, large.x))
    for event_id, x in zip(small.event_id, small.x):
        np.testing.assert_array_equal(rows[event_id], x)


def test_draws_have_the_distributions_they_name():
    from scipy import stats

    rng = Draws(0, 0, 0, 20_000)
    for drawn, wanted in ((rng.random(rng.n), stats.uniform()), (rng.normal(3, 2, rng.n), stats.norm(3, 2)),
                          (rng.cauchy(rng.n), stats.cauchy()),
                          (rng.gamma(1.5, 1.6, rng.n), stats.gamma(1.5, scale=1.6)),
                          (rng.uniform(-1, 4, (rng.n, 3))[:, 2], stats.uniform(-1, 5)),
                          (rng.isotropic((rng.n, 2))[:, 1, 0], stats.uniform(-1, 2))):  # fmt: skip
        assert stats.kstest(drawn, wanted.cdf).pvalue > 1e-3
    counts = np.bincount(rng.poisson(np.full(rng.n, 4.0), 30), minlength=31)
    np.testing.assert_allclose(counts[:10] / rng.n, stats.poisson(4).pmf(range(10)), atol=0.01)
    assert rng.poisson(np.full(rng.n, 50.0), 10).max() == 10
    first, second = rng.random(rng.n), rng.random(rng.n)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert not np.array_equal(Draws(0, 1, 0, 5).random(5), Draws(0, 0, 0, 5).random(5))


def test_mixture():
    events = toy(1000, 101)
    number = {process: (events.process == process).sum() for process in PROCESSES}
    assert number == {"qcd": 700, "ttbar": 150, "wjets": 100, "zjets": 50, "dijet": 25, "soft": 25, "boosted": 25,
                      "monojet": 26}  # fmt: skip
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
    products = decay(Draws(1, 0, 0, 1000), top, 4.8, 80.4)
    np.testing.assert_allclose(products.sum(axis=1), top, atol=1e-9)
    mass = np.sqrt(products[..., 0] ** 2 - (products[..., 1:] ** 2).sum(axis=2))
    np.testing.assert_allclose(mass, np.broadcast_to([4.8, 80.4], mass.shape), rtol=1e-6)


def test_resonance_peaks_at_its_mass(samples):
    m_jj = column(samples["dijet"], "m_jj")
    counts, edges = np.histogram(m_jj[~np.isnan(m_jj)], np.arange(0, 4000, 100))
    assert edges[counts.argmax()] == pytest.approx(RESONANCE_MASS, rel=0.06)
    assert np.nanmedian(m_jj) == pytest.approx(RESONANCE_MASS, rel=0.12)


def test_boosted_bosons_are_jets_of_their_mass(samples):
    mass, m_jj = column(samples["boosted"], "jet1_mass"), column(samples["boosted"], "m_jj")
    counts, edges = np.histogram(mass, np.arange(0, 400, 10))
    assert edges[counts.argmax()] == pytest.approx(BOSON_MASS, abs=20)
    assert np.median(mass) > 2 * np.median(column(samples["qcd"], "jet1_mass"))
    assert np.nanmedian(m_jj) == pytest.approx(2000, rel=0.25)
    assert column(samples["boosted"], "n_btag").mean() > 1.5


def test_monojets_recoil_from_nothing(samples):
    met, ht = column(samples["monojet"], "MET"), column(samples["monojet"], "ht")
    assert np.median(met) > 200
    assert np.median(met / ht) > 0.7
    assert np.median(column(samples["monojet"], "n_lep")) == 0
    jet = np.hypot(column(samples["monojet"], "obj0_px"), column(samples["monojet"], "obj0_py"))
    assert np.corrcoef(jet, met)[0, 1] > 0.8


def test_bosons_and_jets(samples):
    w, z = samples["wjets"], samples["zjets"]
    assert 0.5 < (column(w, "n_lep") == 1).mean() < 0.8
    assert (column(w, "n_lep") > 1).mean() < 0.02
    assert 0.1 < (column(z, "n_lep") == 2).mean() < 0.3
    invisible = column(z, "n_lep") == 0
    assert 0.6 < invisible.mean() < 0.85
    assert np.median(column(z, "MET")[invisible]) > 2 * np.median(column(z, "MET")[~invisible])
    two = (column(z, "n_lep") == 2) & (column(z, "n_jets") == 0)
    assert np.median(column(z, "mvis")[two]) == pytest.approx(91.2, rel=0.03)
    for events in (w, z):
        counts, _ = np.histogram(column(events, "ht"), [100, 200, 400, 800])
        assert (counts[1:] < counts[:-1]).all()


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
    with pytest.raises(DataError, match="from event -2 on"):
        generate("qcd", 1, start=-2)
