"""The event along the beam: where its objects lie, how long they are drawn, and in which colour."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation

from ebm import hep64, higgsml, lhco
from ebm.event_picture import JET, NARROW, UNSEEN, Object, draw_event, objects
from ebm.hep64 import ELECTRON, MUON, PHOTON, Objects
from ebm.style import figure, styled


def hep64_event(pt, eta, phi, mass, kind, met=(50.0, 0.3)):
    row = [np.array([values], float) for values in (pt, eta, phi, mass)]
    made = Objects(*row, np.array([kind]), np.zeros((1, len(pt))), np.array([met[0]]), np.array([met[1]]), 0.5)
    return hep64.features(made)[0]


def drawn(event, **options):
    with styled():
        fig = figure(5, 5)
        ax = fig.add_subplot(projection="polar")
        draw_event(ax, event, **options)
        fig.canvas.draw()
    return ax


def test_objects_of_hep64_are_those_the_features_were_made_of():
    pt, eta, phi = [300.0, 80.0, 40.0, 25.0], [1.0, -4.5, 2.3, 0.5], [0.5, 3.0, -2.0, 1.5]
    x = hep64_event(pt, eta, phi, [30.0, 8.0, 0.0005, 0.1], [hep64.JET, hep64.JET, ELECTRON, MUON])
    found = objects(x, hep64.SCHEMA.features)
    assert [o.name for o in found] == ["obj0", "obj1", "obj2", "obj3", "MET"]
    assert [o.kind for o in found] == [JET, JET, NARROW, NARROW, UNSEEN]
    np.testing.assert_allclose([o.pt for o in found], [*pt, 50], rtol=1e-5)
    np.testing.assert_allclose([o.eta for o in found[:4]], eta, rtol=1e-4)
    turned = [(p - 0.3 + np.pi) % (2 * np.pi) - np.pi for p in phi]
    np.testing.assert_allclose([o.phi for o in found], [*turned, 0], atol=1e-5)


def test_absent_objects_and_other_schemas():
    x = hep64_event([60.0], [0.0], [1.0], [0.0], [PHOTON], met=(0.0, 0.0))
    assert [(o.name, o.kind) for o in objects(x, hep64.SCHEMA.features)] == [("obj0", NARROW)]
    alone = np.where(np.arange(64) == 40, 70.0, np.nan)
    assert [(o.name, o.pt) for o in objects(alone, hep64.SCHEMA.features)] == [("MET", 70)]
    assert objects(np.ones(5), lhco.SIGNAL_REGION.features) == []
    assert objects(np.full(64, np.nan), hep64.SCHEMA.features) == []


def test_objects_of_higgsml():
    at = {"PRI_tau_pt": 40, "PRI_tau_eta": 1, "PRI_tau_phi": 0.5, "PRI_lep_pt": 30, "PRI_lep_eta": -1,
          "PRI_lep_phi": -2, "PRI_met": 25, "PRI_met_phi": 3, "PRI_jet_leading_pt": 90, "PRI_jet_leading_eta": 2,
          "PRI_jet_leading_phi": 1}
    found = objects(np.array([at.get(f, np.nan) for f in higgsml.SCHEMA.features]), higgsml.SCHEMA.features)
    assert found[:3] == [Object("tau", JET, 40, 1, 0.5), Object("lepton", NARROW, 30, -1, -2),
                         Object("leading jet", JET, 90, 2, 1)]
    assert (found[3].name, found[3].pt, found[3].phi) == ("MET", 25, 3)
    assert len(found) == 4


EVENT = [Object("obj0", JET, 400, 0.5, 1.0), Object("obj1", NARROW, 100, 1.0, -2.0),
         Object("MET", UNSEEN, 225, np.nan, 0)]


def test_radius_direction_and_colour():
    ax = drawn(EVENT, pulls={"obj0": 0.8, "obj1": -0.4}, largest=0.8)
    bars = [p for p in ax.patches if isinstance(p, Rectangle)]
    assert [b.get_height() for b in bars] == [20, 10]
    np.testing.assert_allclose([b.get_x() + b.get_width() / 2 for b in bars], [1, -2])
    assert bars[0].get_width() > 3 * bars[1].get_width()
    (red, _, blue, _), (red1, _, blue1, _) = (b.get_facecolor() for b in bars)
    assert red > 2 * blue
    assert blue1 > 1.1 * red1
    arrow = next(t for t in ax.texts if isinstance(t, Annotation))
    assert (arrow.xy, arrow.xyann) == ((0, 15), (0, 0))


def test_labels_rings_and_legend():
    ax = drawn(EVENT, pulls={"obj0": 0.8})
    assert {t.get_text() for t in ax.texts} >= {"0", "1", "MET"}
    rings = [t for t in ax.texts if t.get_text().endswith("GeV")]
    assert [(t.get_text(), t.get_position()[1] ** 2) for t in rings] == [("100 GeV", pytest.approx(100)),
                                                                         ("200 GeV", pytest.approx(200))]
    assert all(t.zorder > max(p.zorder for p in ax.patches) for t in rings)  # over the objects
    np.testing.assert_allclose(ax.get_yticks(), np.sqrt([100, 200]))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["jet (broad)", "lepton or photon", "MET"]
    units, colours = ax.get_legend().get_title().get_text().split("\n")
    assert units == "azimuth [rad], radius ∝ √pT"
    assert "softer would be more ordinary" in colours
    assert drawn(EVENT[:2]).get_legend().get_title().get_text() == units


def test_missing_momentum_alone():
    assert [t.get_text() for t in drawn(EVENT[2:]).get_legend().get_texts()] == ["MET"]


@pytest.mark.parametrize("n", [4, 10])
def test_names_do_not_lie_on_each_other(n):
    crowd = [Object(f"obj{i}", JET, 100 - i, 0, 0.05 * i) for i in range(n)]
    ax = drawn([*crowd, Object("MET", UNSEEN, 100 - n, np.nan, 0.05 * n)])
    names = [t for t in ax.texts if t.get_text().isdigit() or t.get_text() == "MET"]
    boxes = [t.get_window_extent() for t in names]
    assert len(boxes) == n + 1
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert ax.get_rmax() > 1.1 * np.sqrt(100)
