"""Whether a cut shapes a mass: distances against chance, and the pictures."""

import numpy as np
import pytest

from ebm.events import Schema
from ebm.sculpting import jensen_shannon, resonance, sculpting


def test_jensen_shannon():
    assert jensen_shannon([1, 1], [5, 5]) == pytest.approx(0, abs=1e-7)
    assert jensen_shannon([1, 0], [0, 3]) == 1
    # p = (1, 0), q = (1/2, 1/2): JSD = 1/2 log2(4/3) + 1/2 (1/2 log2(2/3) + 1/2 log2(2)) bits
    expected = np.log2(4 / 3) / 2 + (np.log2(2 / 3) / 2 + 1 / 2) / 2
    assert jensen_shannon([[7, 0], [1, 1]], [[4, 4], [1, 1]]) == pytest.approx([np.sqrt(expected), 0])


def test_a_cut_that_knows_nothing_shapes_nothing():
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(60):
        found = sculpting(rng.exponential(size=3000), rng.normal(size=3000), shares=(0.1, 0.01), draws=200)
        p_values += [f["p_value"] for f in found]
    assert 0.4 < np.mean(p_values) < 0.6
    assert np.mean(np.array(p_values) <= 0.05) < 0.12


def test_a_cut_on_the_mass_itself_is_seen():
    rng = np.random.default_rng(0)
    mass = rng.exponential(size=50_000)
    found = sculpting(mass, mass + rng.normal(size=50_000) / 2, cut=4.0)
    assert [f["n"] for f in found[:3]] == [5000, 500, 50]
    assert found[3]["cut"] == 4.0
    for f in found:
        assert f["median"] < f["limit"] < f["distance"] <= 1
        assert f["p_value"] < 0.01
    weak = sculpting(mass, 0.1 * mass + rng.normal(size=50_000), shares=(0.1,))[0]
    assert weak["limit"] < weak["distance"] < found[0]["distance"]


def test_too_few_events_have_no_shape():
    found = sculpting(np.arange(500.0), np.arange(500.0), shares=(0.1, 0.01, 1.0), cut=1e9)
    assert [f["n"] for f in found] == [50, 5, 500, 0]
    assert [np.isnan(f["distance"]) for f in found] == [False, True, True, True]


def test_missing_values_are_left_out():
    rng = np.random.default_rng(0)
    mass, score = rng.exponential(size=2000), rng.normal(size=2000)
    gaps = np.concatenate([mass, np.full(100, np.nan)])
    above = np.concatenate([score, np.full(100, 9.0)])
    assert sculpting(gaps, above, shares=(0.1, 0.01)) == sculpting(mass, score, shares=(0.1, 0.01))


@pytest.mark.parametrize(("mass", "score", "message"), [
    ([1.0, 2.0], [1.0], "one shape"), ([[1.0]], [[1.0]], "one shape"), ([1.0, 2.0], [1.0, np.nan], "1 of 2 scores"),
    ([1.0, 1.0], [1.0, 2.0], "fewer than two values in 2"), ([], [], "in 0 events"), ([np.nan], [1.0], "in 0 events"),
])
def test_bad_input(mass, score, message):
    with pytest.raises(ValueError, match=message):
        sculpting(np.array(mass), np.array(score))


def test_the_mass_that_is_looked_at():
    schema = Schema("s", ("pt", "mjj", "DER_mass_vis"), ("GeV", "GeV", "GeV"))
    assert resonance(schema) == "mjj"
    assert resonance(schema, "pt") == "pt"
    assert resonance(Schema("s", ("pt",), ("GeV",))) is None
    with pytest.raises(ValueError, match="'m_tt' is no feature of s, expected one of pt, mjj"):
        resonance(schema, "m_tt")


def test_pictures(tmp_path):
    pytest.importorskip("mplhep", reason="pictures need matplotlib, mplhep and hist")
    from ebm.plots import plot_sculpting, plot_sic
    from ebm.style import Pictures

    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [3000, 100])
    scores = {"energy": rng.normal(size=3100) + y, "a constant": np.zeros(3100)}
    mass = rng.exponential(size=3000)
    mass[:10] = np.nan
    shaped = plot_sculpting(mass, scores["energy"][:3000], [1.0, 2.0, 50.0], "m_jj", "GeV")
    _, bottom = shaped.axes
    labels = [t.get_text() for t in shaped.legends[0].get_texts()]
    assert labels[0] == "all background"
    assert len(labels) == 3  # nothing passes the last cut
    assert bottom.get_xlabel() == "m_jj [GeV]"
    curves = plot_sic(y, scores)
    assert [line.get_label() for line in curves.axes[0].lines][:2] == ["energy", "a constant"]
    assert curves.axes[0].lines[0].get_xdata()[0] == pytest.approx(10 / 3000)
    files = Pictures({"sic": curves, "sculpting": shaped}).save(tmp_path)
    assert sorted(f.name for f in files) == ["sculpting.pdf", "sculpting.png", "sic.pdf", "sic.png"]
    with pytest.raises(ValueError, match="m_jj is missing in every event"):
        plot_sculpting(np.full(5, np.nan), np.zeros(5), [0.0], "m_jj")


def test_the_sculpting_picture_hides_nothing():
    """Every point is within the axes, beside those of other cuts, with the Poisson interval of its number of events."""
    pytest.importorskip("mplhep", reason="pictures need matplotlib, mplhep and hist")
    from scipy.stats import chi2

    from ebm.plots import plot_sculpting

    rng = np.random.default_rng(0)
    mass = rng.exponential(100, size=20_000)
    score = mass + rng.normal(size=20_000)
    figure = plot_sculpting(mass, score, np.quantile(score, [0.9, 0.999]).tolist(), "m_jj", "GeV")
    x = []
    for ax in figure.axes:
        assert ax.get_yscale() == "log"
        for n, container in zip((2000, 20), ax.containers):
            points, _, (bars,) = container.lines
            at, y = points.get_data()
            assert ax.get_ylim()[0] < y.min()
            assert y.max() < ax.get_ylim()[1]
            x.append(set(at))
            if ax is figure.axes[0]:
                width = np.ptp(ax.get_xlim()) / 25
                k = np.round(y * n * width)
                np.testing.assert_allclose(k.sum(), n)
                low, high = np.array([s[:, 1] for s in bars.get_segments()]).T * n * width
                tail = 0.158655
                np.testing.assert_allclose(low, chi2.ppf(tail, 2 * k) / 2, rtol=1e-4)
                np.testing.assert_allclose(high, chi2.ppf(1 - tail, 2 * k + 2) / 2, rtol=1e-4)
    assert not x[0] & x[1]
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert labels == ["all background", "most anomalous 10% (2,000 events)", "most anomalous 0.1% (20 events)"]


@pytest.mark.filterwarnings("error")
def test_the_picture_of_a_mass_that_is_nearly_constant():
    pytest.importorskip("mplhep", reason="pictures need matplotlib, mplhep and hist")
    from ebm.plots import plot_sculpting

    mass = np.r_[np.ones(5000), 2.0]
    assert plot_sculpting(mass, np.arange(5001.0), [4000.0], "m_jj").axes[0].get_xlim() == (1, 2)
