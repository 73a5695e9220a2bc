"""Stages of a long measurement as processes of their own: one that fails or hangs costs nothing but itself.

A stage says what it found while it runs, a line of JSON each; what it said before it failed is kept.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, SKIPPED, FAILED, TIMED_OUT = "ok", "skipped", "failed", "timed out"
_MARK = "@fused-ebm "  # before a line that is meant for the parent: libraries print, too


@dataclass
class Outcome:
    """How a stage ended, why, and the (section, value) pairs that it told."""

    status: str
    reason: str | None
    seconds: float
    items: list[tuple[str, Any]] = field(default_factory=list)


def tell(section: str, value: Any) -> None:
    """In a stage: something for the report, at once."""
    print(f"{_MARK}{json.dumps([section, value])}", flush=True)


def run_together(commands: Mapping[str, list[str]], seconds: float, environment: Mapping[str, str] | None = None,
                 clock: Callable[[], float] = time.perf_counter) -> dict[str, Outcome]:
    """Run the commands side by side, none longer than `seconds`; a process that is late dies with its children."""
    start, outcomes, running = clock(), {}, {}
    with tempfile.TemporaryDirectory(prefix="fused-ebm-gpu-") as folder:
        try:
            for i, (name, command) in enumerate(commands.items()):
                out, err = Path(folder) / f"{i}.out", Path(folder) / f"{i}.err"
                with open(out, "wb") as o, open(err, "wb") as e:
                    running[name] = subprocess.Popen(command, stdout=o, stderr=e, stdin=subprocess.DEVNULL,
                                                     env=environment, start_new_session=True), out, err
            for name, (process, out, err) in running.items():
                late = False
                try:
                    process.wait(max(start + seconds - clock(), 0.01))
                except subprocess.TimeoutExpired:
                    late = True
                    _end(process)
                items = _items(out)
                outcomes[name] = Outcome(*_verdict(process, late, seconds, items, err), round(clock() - start, 2),
                                         [(s, v) for s, v in items if s != SKIPPED])
        finally:
            for process, *_ in running.values():
                if process.poll() is None:
                    _end(process)
    return outcomes


def _end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one that hangs in the driver cannot even die
        process.wait(5)


def _items(out: Path) -> list[tuple[str, Any]]:
    """What a stage told; the last line may be cut off."""
    items = []
    for line in out.read_text(errors="replace").splitlines():
        if _MARK in line:
            with suppress(ValueError):
                items.append(tuple(json.loads(line.rpartition(_MARK)[2])))
    return items


def _verdict(process: subprocess.Popen, late: bool, seconds: float, items: list[tuple[str, Any]],
             err: Path) -> tuple[str, str | None]:
    skipped = next((v for s, v in items if s == SKIPPED), None)
    if late:
        return TIMED_OUT, f"it was not done after {seconds:.0f} s"
    if process.returncode:
        lines = [line.strip() for line in err.read_text(errors="replace").splitlines() if line.strip()]
        return FAILED, f"status {process.returncode}: {lines[-1][:400] if lines else 'nothing on standard error'}"
    return (OK, None) if skipped is None else (SKIPPED, skipped)
