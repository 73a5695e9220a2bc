"""What a report says in words and in bins: formats, the verdict on pulls, the model card, efficiencies."""

from dataclasses import replace

import numpy as np
import pytest

from ebm.bundle import Bundle
from ebm.model_card import model_card
from ebm.report_pictures import efficiencies
from ebm.report_words import hertz, short, summary


@pytest.mark.parametrize(("value", "text"), [
    (None, "–"), (float("nan"), "–"), (0, "0"), (1e-4, "10⁻⁴"), (7.488e-5, "7.5 × 10⁻⁵"), (0.0012, "0.0012"),  # noqa: RUF001
    (-0.25, "−0.25"), (999.97, "1,000"), (157.7, "158"), (4e7, "4.0 × 10⁷"), (9.99e-4, "0.001"),  # noqa: RUF001
])
def test_short(value, text):
    assert short(value) == text


def test_hertz():
    assert [hertz(v) for v in (999.97, 4e7, 26936.0, 0.0749)] == ["1,000 Hz", "40 MHz", "26.9 kHz", "0.0749 Hz"]


@pytest.mark.parametrize(("interval", "verdict"), [
    ((0.1, 0.3), ""), ((-0.1, 0.3), "matter as much."), ((-0.3, -0.1), "matter as much or more."),
])
def test_summary_says_where_pulls_explain_nothing(interval, verdict):
    check = {"removed": [1, 2, 4], "top_minus_random": [{"interval": i} for i in ((9, 9), (9, 9), interval)]}
    numbers = {"threshold": None, "flagged": None, "evaluation": None, "errors_in_words": ["removing"]}
    line = summary(numbers | {"errors": {"faithfulness": check}})[-1]
    assert line.startswith("Removing")
    assert line.endswith(verdict)
    assert ("do not explain" in line) == bool(verdict)
    assert not summary(numbers | {"errors": {}})[-1].startswith("Removing")


def test_model_card():
    provenance = {"command": "python -m ebm train toy --out m", "seed": 3, "members": 2, "training_seconds": 7200.0,
                  "threads": 4, "device": "cpu", "source": "toy:100", "background_events": {"train": 60}, "steps": 5}
    card = model_card(replace(Bundle.random(5), provenance=provenance))
    text = " ".join(line for lines in card.values() for line in lines)
    for part in ("filter", "not the final arbiter", "five standard deviations", "look-elsewhere", "surveillance",
                 "8 core-hours", "2 networks with seeds 3 to 4", "$ python -m ebm train toy --out m", "toy events",
                 "steps = 5", "energy: not measured"):
        assert part in text, part
    bare = model_card(Bundle.random(5))
    assert bare["How to train it again"] == ["The command was not recorded."]
    assert bare["Cost of the training"] == ["Time: not measured.", "Electrical energy: not measured."]


def test_efficiencies_count_every_event_that_has_the_variable():
    x = np.append(np.random.default_rng(0).exponential(size=999), np.nan)
    found = efficiencies(x, x > 1, {"events": np.ones(1000, bool)})
    assert sum(e["n"] for e in found["events"]) == 999
    assert found["events"][0]["rate"] == 0
    assert found["events"][-1]["rate"] == 1
    assert efficiencies(np.ones(5), np.ones(5, bool), {"events": np.ones(5, bool)}) == {}
    two = efficiencies(np.append(np.zeros(999), 0.5), np.ones(1000, bool), {"events": np.ones(1000, bool)})
    assert [e["n"] for e in two["events"]] == [999, 1]
