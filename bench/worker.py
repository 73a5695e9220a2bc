"""A process of its own for each number of threads: `python -m bench.worker` reads a job and writes JSON lines.

Thread pools take their size from the environment and the processor affinity when they start, once per
process; so the parent sets both and every contender gets the same.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Read the job from standard input, write progress and the result as JSON lines to standard output."""
    # Libraries print what they like: what they write to standard output goes to standard error.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    os.sched_setaffinity(0, job["processors"])  # before anything that starts threads is imported

    def send(**message: object) -> None:
        out.write(json.dumps(message) + "\n")

    try:
        send(result=_measure(job, lambda contender, what, fraction: send(progress=[contender, what, fraction])))
    except (ValueError, RuntimeError, OSError) as e:
        send(error=str(e))


def _measure(job: dict, notify) -> dict:
    notify("torch", "importing", 0.0)
    import numpy as np
    import torch

    from bench.measure import Plan, measure
    from ebm.bundle import Bundle

    torch.set_num_threads(job["threads"])
    plan = Plan(**{name: tuple(v) if isinstance(v, list) else v for name, v in job["plan"].items()})
    return measure(Bundle.load(job["model"]), np.load(job["events"]), plan, job["threads"], notify, job["share_s"])


if __name__ == "__main__":
    main()
