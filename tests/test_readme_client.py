"""The clients in the README's section on the service run as they stand there, against a real service."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from bench.machine import ROOT
from bench.serving import serving
from serve.model import Served

DEMO = ROOT / "models" / "demo"
URL = "http://127.0.0.1:8000"
# MET, MET / sqrt(HT), dphi_min and HT; two jets, one of them b-tagged; no other object.
EVENT = [np.nan] * 40 + [812, 52.4, 0, 240] + [0] * 9 + [2, 1, 0] + [np.nan] * 8


@pytest.fixture(scope="module")
def url():
    with serving(DEMO, threads=1) as process:
        yield process.url


@pytest.fixture(scope="module")
def served():
    return Served(DEMO)


def block(language):
    """The one block in that language of the section "As a service"."""
    section = re.search(r"^### As a service\n(.*?)^##", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)
    assert len(blocks) == 1, f"{len(blocks)} blocks of {language} under '### As a service' in README.md, expected one"
    assert URL in blocks[0]
    return blocks[0]


def output(program, url):
    """What a program of the README prints; only the address is another."""
    done = subprocess.run([*program[:-1], program[-1].replace(URL, url)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not there: apt-get install curl")
def test_curl(url, served):
    energy = served.energies(np.float32([EVENT]))[0]
    answer = json.loads(output(["sh", "-ec", block("sh")], url))
    assert answer == {"scores": [float(energy)], "flags": [bool(energy > served.threshold)]}


def test_python(url, served):
    energy, by_feature, _ = served.explain(np.float32([EVENT]))
    said = output([sys.executable, "-I", "-c", block("python")], url).split()  # -I: nothing of this project is imported
    assert [float(said[0]), float(said[1])] == [energy, by_feature["MET"]]
