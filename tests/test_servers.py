"""The test set-up installs the servers that are missing, where it may, and fails nowhere."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "debian-packages.sh"
POLICY = Path("/usr/sbin/policy-rc.d")
PROGRAMS = ("postgres", "redis-server", "promtool", "chromium", "curl")


def set_up(tmp_path, *programs, user=0, apt_get="exit 0"):
    """What the script prints with these programs alone in PATH, and the calls of apt-get, which does as told."""
    said = tmp_path / "calls"
    scripts = dict.fromkeys(programs, "exit 0") | {"id": f"echo {user}", "apt-get": f'echo "$@" >>{said}; {apt_get}'}
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("tr", "tail", "rm", "chmod"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    there = POLICY.exists()
    done = subprocess.run(["/bin/sh", SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, POLICY.exists()) == (0, "", there)
    return done.stdout, said.read_text().splitlines() if said.exists() else []


def test_where_all_is_there_it_does_nothing(tmp_path):
    assert set_up(tmp_path, *PROGRAMS) == ("", [])


def test_who_is_not_root_is_told_what_is_skipped(tmp_path):
    said, calls = set_up(tmp_path, "postgres", "promtool", "curl", user=1000)
    assert said.startswith("their tests are skipped;")
    assert said.endswith(": redis-server chromium\n")
    assert calls == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can keep services from starting")
def test_root_installs_what_is_missing_and_that_alone(tmp_path):
    arrives = f'case "$*" in install*redis-server*) ln -s /bin/true {tmp_path}/redis-server;; esac'
    said, calls = set_up(tmp_path, "postgres", "chromium", "curl", apt_get=f"PATH=/bin; {arrives}")
    assert [call.split()[:2] for call in calls] == [["update", "-q"], ["install", "redis-server"],
                                                    ["install", "prometheus"]]
    assert said.splitlines()[0] == "installing for the tests: redis-server prometheus"
    assert said.splitlines()[1].endswith(": prometheus")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can keep services from starting")
def test_what_cannot_be_installed_says_why(tmp_path):
    says = "echo 'E: no such package' >&2; exit 100"
    said, _ = set_up(tmp_path, "postgres", "redis-server", "promtool", "curl", apt_get=says)
    assert "E: no such package" in said
    assert said.endswith("their tests are skipped; install as root, on Debian with apt-get install: chromium\n")
