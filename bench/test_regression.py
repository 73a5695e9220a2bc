"""Has a kernel become slower? `make regress` asks, on a machine that need not be quiet.

Each CPU Scorer is timed at batch 1, 64 and 4096 on one thread, in turns with the matrix products of the same
sizes alone through NumPy. What counts is the ratio of the two medians: another load slows both. The ratios are
compared with those committed in `results/regression.json`. One that is more than 25% higher (50% for
`reference`, which lives on new pages from the system) is measured again twice, and fails with a table if it
stays so. `make regress-baseline` writes the file anew, the median of three: commit it with the change that
explains it. Ratios depend on the processor and on NumPy's BLAS, which the file names. The times themselves are
in pytest-benchmark's table (`--benchmark-json` and `--benchmark-compare` work as ever). These are timings, so
`make test` does not run them.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from bench.machine import machine, sgemm_contenders
from bench.options import TOY, load
from bench.report import write_json
from bench.timer import interleave
from ebm.command import commit
from kernels import BACKENDS, load_scorer

BASELINE = Path(__file__).parent / "results" / "regression.json"
REWRITE = os.environ.get("FUSED_EBM_REGRESSION") == "rewrite"
WORSE = 1.25
WORSE_OF = {"reference": 1.5}
BATCHES = (1, 64, 4096)
SCORERS = [name for name, b in BACKENDS.items() if b.device == "cpu" and not b.why_not()]
_TRIES, _SECONDS, _ROUNDS = 3, 0.4, 5


@pytest.fixture(scope="module")
def model():
    bundle, x, _ = load(None, TOY)
    return bundle, np.resize(x, (max(BATCHES), x.shape[1]))


@pytest.fixture(scope="module")
def ratios():
    return {}


@pytest.fixture(scope="module")
def baseline():
    return json.loads(BASELINE.read_text()) if BASELINE.exists() else {"cpu": None, "ratios": {}}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SCORERS)
def test_measure(name, batch, model, ratios, baseline, benchmark):
    bundle, events = model
    scorer = load_scorer(bundle, name, **({"threads": 1} if name in ("native", "numba") else {}))
    product = sgemm_contenders(bundle.architecture)["sgemm_openblas_us"](batch)
    inputs = [events[i:i + batch] for i in range(0, len(events) - batch + 1, batch)][:64]
    calls = {"scorer": scorer.energy_and_score, "product": product}
    key, tries = f"{name}, batch {batch}", []
    with threadpool_limits(1):
        for _ in range(_TRIES):
            timings = interleave(calls, inputs, _SECONDS)
            p50 = {what: t.quantiles_us()["p50_us"] for what, t in timings.items()}
            tries.append(p50["scorer"] / p50["product"])
            ratios[key] = float(np.median(tries)) if REWRITE else min(tries)
            if not REWRITE and not _worse(key, ratios[key], baseline["ratios"]):
                break
        benchmark.extra_info |= {"ratio": ratios[key], "product_us": p50["product"]}
        benchmark.pedantic(scorer.energy_and_score, (inputs[0],), rounds=_ROUNDS,
                           iterations=max(1, int(20_000 / p50["scorer"])), warmup_rounds=1)


def test_no_ratio_is_worse_than_the_baseline(ratios, baseline, capsys):
    cpu = machine()["cpu"]
    if REWRITE:
        found = {key: round(ratio, 4) for key, ratio in ratios.items()}
        write_json({"cpu": cpu, "numpy": np.__version__, "isa": _isa(), "commit": commit(), "ratios": found}, BASELINE)
    before = ratios if REWRITE else baseline["ratios"]
    worse = [key for key, ratio in ratios.items() if _worse(key, ratio, before)]
    table = Table(title="Median of a call over that of NumPy's matrix products of the same sizes, one thread")
    for name in ("scorer", "ratio", "baseline", "change"):
        table.add_column(name, justify="left" if name == "scorer" else "right")
    for key, ratio in ratios.items():
        old = before.get(key)
        table.add_row(key, f"{ratio:.3f}", "-" if old is None else f"{old:.3f}",
                      "new" if old is None else f"{100 * (ratio / old - 1):+.0f}%{' worse' if key in worse else ''}",
                      style="bold red" if key in worse else None)
    with capsys.disabled():
        Console().print("", table)
    here = "" if cpu == baseline["cpu"] or REWRITE else f"; the baseline is from another processor, {baseline['cpu']}"
    assert not worse, f"slower than the baseline: {'; '.join(worse)}{here}"


def _worse(key: str, ratio: float, before: dict[str, float]) -> bool:
    return ratio > WORSE_OF.get(key.partition(",")[0], WORSE) * before.get(key, float("inf"))


def _isa() -> str | None:
    return load_scorer(load(None, TOY)[0], "native").isa if "native" in SCORERS else None
