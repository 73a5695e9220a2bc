"""What a report says in words and in bins: formats, the verdict on pulls, the model card, efficiencies."""

from dataclasses import replace

import numpy as np
import pytest

from ebm.bundle import Bundle
from ebm.model_card import model_card
from ebm.report_pictures import efficiencies, plot_energies
from ebm.report_words import explained, hertz, plural, short, summary, typed
from ebm.threshold import calibrate


@pytest.mark.parametrize(("value", "text"), [
    (None, "–"), (float("nan"), "–"), (0, "0"), (1e-4, "10⁻⁴"), (7.488e-5, "7.5 × 10⁻⁵"), (0.0012, "0.0012"),  # noqa: RUF001
    (-0.25, "−0.25"), (999.97, "1,000"), (157.7, "158"), (4e7, "4.0 × 10⁷"), (9.99e-4, "0.001"),  # noqa: RUF001
])
def test_short(value, text):
    assert short(value) == text


def test_hertz():
    assert [hertz(v) for v in (999.97, 4e7, 26936.0, 0.0749)] == ["1,000 Hz", "40 MHz", "26.9 kHz", "0.0749 Hz"]


def test_names_and_numbers():
    assert [plural(n, "event") for n in (0, 1, 2000)] == ["0 events", "1 event", "2,000 events"]
    assert [typed(s) for s in ("toy:20000+400", "toy", "/data/a+1.csv", "")] == ["toy:20000", "toy", "a+1.csv", ""]
    meanings = explained(["KNN (k=5)", "LOF", "a detector of one's own"])
    assert meanings.startswith("KNN: ")
    assert meanings.count(";") == meanings.count("LOF: ") == 1


BARE = {"threshold": None, "flagged": None, "evaluation": None, "sculpting": {}, "errors": {}}


def test_one_flagged_event_is_called_one():
    flagged = {"rate": 1 / 40137, "n": 40137, "interval": (1e-6, 1.4e-4)}
    numbers = BARE | {"threshold": {"n_background": 9, "guaranteed": True, "confidence": 0.95, "rate": 1e-4,
                                    "upper_bound": 1e-4, "trigger": [{"input_rate": 1, "expected": 1, "at_most": 1}]}}
    line = summary(numbers | {"flagged": {"background": flagged}})[-1]
    assert line.startswith("It flags 1 of 40,137 background events here: 2.5 × 10⁻⁵ ")  # noqa: RUF001
    assert summary(numbers | {"flagged": {"events": flagged | {"rate": 1.0, "n": 1}}})[-1].startswith(
        "It flags 1 of 1 event here: 1 ")


def test_one_variable_either_way_round_is_one_detector():
    names = ("energy", "n_missing", "n_objects", "LOF")
    detector = {"auroc": 0.7, "auroc_interval": (0.6, 0.8), "rejection": 0.99, "tightest_rejection": 0.99,
                "signal_efficiency_at_tightest": 0.5, "signal_efficiency_at_tightest_interval_with_cut": (0.4, 0.6)}
    evaluation = {"detectors": dict.fromkeys(names, detector), "weighted": {},
                  "energy_minus": {name: {"auroc": 0.0, "interval": (-0.1, 0.1)} for name in names[1:]}}
    assert "best of 2 simple detectors" in summary(BARE | {"evaluation": evaluation})[1]


@pytest.mark.parametrize(("interval", "fall", "verdict"), [
    ((0.1, 0.3), 0.4, ""), ((-0.1, 0.3), 0.4, "matter as much."), ((-0.3, -0.1), 0.4, "matter as much or more."),
    ((0.1, 0.3), -0.1, "are no lower."),
])
def test_summary_says_where_pulls_explain_nothing(interval, fall, verdict):
    check = {"removed": [1, 2, 4], "top_minus_random": [{"interval": i} for i in ((9, 9), (9, 9), interval)],
             "drop": {"largest pulls": [9, 9, fall]}}
    numbers = BARE | {"errors_in_words": ["removing"]}
    line = summary(numbers | {"errors": {"faithfulness": check}})[-1]
    assert line.startswith("Removing")
    assert line.endswith(verdict)
    assert ("do not explain" in line) == bool(verdict)
    assert not summary(numbers)[-1].startswith("Removing")


def test_model_card():
    provenance = {"command": "python -m ebm train toy --out m", "seed": 3, "members": 2, "training_seconds": 7200.0,
                  "threads": 4, "device": "cpu", "source": "toy:100+2", "background_events": {"train": 60}, "steps": 5}
    card = model_card(replace(Bundle.random(5), provenance=provenance))
    text = " ".join(line for lines in card.values() for line in lines)
    assert "toy:100 " in text
    for part in ("filter", "not the final arbiter", "five standard deviations", "look-elsewhere", "surveillance",
                 "8 core-hours", "2 networks with seeds 3 to 4", "$ python -m ebm train toy --out m", "toy events",
                 "steps = 5", "energy: not measured"):
        assert part in text, part
    provenance |= {"cpu_seconds": 3600.0, "threads": 1, "calibration": {"source": "toy:900+18"}}
    anew = replace(Bundle.random(5), provenance=provenance, threshold=calibrate(np.arange(100.0), 0.05))
    card = model_card(anew)
    assert card["How to train it again"][1] == ("$ python -m ebm calibrate m toy:900 --rate 0.05 --confidence 0.95")
    assert ", 1 thread on cpu" in card["How to train it again"][2]
    assert "7,200 s of wall clock, 1 CPU hours," in card["Cost of the training"][0]
    bare = model_card(Bundle.random(5))
    assert bare["How to train it again"] == ["The command was not recorded."]
    assert bare["Cost of the training"] == ["Time: not measured.", "Electrical energy: not measured."]


def test_energies_have_poisson_intervals_and_no_steps_to_zero():
    energy = np.array([0.0, 0.0, 1.0, 0.0, 5.0])
    rows = np.arange(5) < 3
    axes = plot_energies(energy, {"background": rows, "signal": ~rows}, None, None).axes
    drawn = [s[:, 1] for c in axes[0].containers for bars in c.lines[2] for s in bars.get_segments() if len(s)]
    assert any(s == pytest.approx([0.17275 / 2, 3.29953 / 2], abs=1e-4) for s in drawn)
    assert all((s > 0).all() for s in drawn)
    assert len(axes[1].containers[0].lines[0].get_xdata()) == 1
    assert plot_energies(energy[:2], {"signal": rows[:2]}, None, None).axes[0].lines


def test_efficiencies_count_every_event_that_has_the_variable():
    x = np.append(np.random.default_rng(0).exponential(size=999), np.nan)
    found = efficiencies(x, x > 1, {"events": np.ones(1000, bool)})
    assert sum(e["n"] for e in found["events"]) == 999
    assert found["events"][0]["rate"] == 0
    assert found["events"][-1]["rate"] == 1
    assert efficiencies(np.ones(5), np.ones(5, bool), {"events": np.ones(5, bool)}) == {}
    two = efficiencies(np.append(np.zeros(999), 0.5), np.ones(1000, bool), {"events": np.ones(1000, bool)})
    assert [e["n"] for e in two["events"]] == [999, 1]
