"""What `python -m bench.service` says of servers that are killed, and of those that are not there."""

from __future__ import annotations

import pytest

from bench import servers
from bench.machine import ROOT
from bench.service import killed
from ebm.events import load_events

DEMO = ROOT / "models" / "demo"


@pytest.mark.parametrize("name", ["redis", "postgresql"])
def test_a_server_that_is_not_there_is_a_row_with_the_reason(monkeypatch, name):
    monkeypatch.setattr(servers, f"{name}_why_not", lambda: "not here: apt-get install it")
    assert killed(DEMO, load_events("toy:1").x, 1, name) == {"skipped": "not here: apt-get install it"}


@pytest.mark.parametrize("name", ["redis", "postgresql"])
def test_every_request_is_answered_while_a_server_is_killed(name):
    if why_not := getattr(servers, f"{name}_why_not")():
        pytest.skip(why_not)
    found = killed(DEMO, load_events("toy:1").x, 1, name)  # RuntimeError where a reply is not 200
    assert found["ready_before_and_after"] == "ready degraded"
    assert found["added_p99_ms"] == found["killed"]["p99_ms"] - found["before"]["p99_ms"]
