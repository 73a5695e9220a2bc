"""`python -m bench.training`: training steps per second, by the way the gradient of the loss is found."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.machine import cpu_ticks, machine, steal_fraction, versions
from bench.options import check_outputs, keep
from bench.timer import interleave
from ebm.command import commit
from ebm.dsm import EnergyAndScore, dsm_loss, geometric_sigmas, train
from ebm.networks import EnergyNetwork
from ebm.settings import MOST_STEPS
from kernels.autograd import energy_and_score_of

FEATURES, HIDDEN, LAYERS, LEVELS = 64, 256, 2, 10
EVENTS, STEPS = 20_000, 25  # steps per sample
MOST_ERROR = 1e-5
RESULT_FIELDS = ("way", "steps_per_s", "steps_per_s_p10", "steps_per_s_p90", "samples", "first_s", "default_run_s",
                 "rel_error", "passed")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

EPILOG = """
**Examples**

`python -m bench.training` every way on all cores, in about a minute

`python -m bench.training --threads 1 --batch 4096 --json out.json` one thread, larger steps; keep the result

`python -m bench.training --device cuda` on a GPU, where the explicit pass runs with its Triton kernels

Exit code 0; 1 if a way gave wrong gradients; 2 if the options cannot be used.
"""


def _double_backward(network: EnergyNetwork) -> EnergyAndScore:
    """The score by autograd of the energy, to be differentiated once more."""

    @torch.enable_grad()
    def energy_and_score(u: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u = u.detach().requires_grad_()
        energy = network(u, k)
        return energy, -torch.autograd.grad(energy.sum(), u, create_graph=True)[0]

    return energy_and_score


WAYS: dict[str, Callable[[EnergyNetwork], EnergyAndScore]] = {
    "double backward": _double_backward,
    "analytic score": lambda network: network.energy_and_score,
    "analytic score, compiled": lambda network: torch.compile(network.energy_and_score),
    "explicit second pass": energy_and_score_of,
}


@app.command(epilog=EPILOG)
def main(
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = len(os.sched_getaffinity(0)),
    batch: Annotated[int, typer.Option(min=1, max=EVENTS, help="Events per step.")] = 512,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of steps for each way.")] = 10.0,
    json: Annotated[str | None, typer.Option(help="Write the report to this file; - for standard output.")] = None,
) -> None:
    """Measure how fast denoising score matching trains a network of 64/256/2, through `ebm.dsm.train` itself.

    Every way makes its first step, which includes compiling from an empty cache and one held-out loss, and is compared
    with double backward in float64: the worst error of the gradient of any weight, relative to its norm. Then all take
    turns.
    """
    try:
        check_outputs(json, None)
        if device not in ("cpu", "cuda"):
            raise ValueError(f"--device {device!r}: expected cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch sees no CUDA GPU")
        report = benchmark(threads, batch, device, seconds)
        print_report(report, Console(stderr=json == "-"))
        keep(report, json)
    except (ValueError, RuntimeError, OSError) as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(2) from None
    if wrong := [r["way"] for r in report["results"] if not r["passed"]]:
        typer.echo(f"error: {', '.join(wrong)} did not agree with float64", err=True)
        raise typer.Exit(1)


def benchmark(threads: int, batch: int, device: str = "cpu", seconds: float = 10.0,
              ways: tuple[str, ...] = tuple(WAYS)) -> dict[str, Any]:
    """The report: machine, versions, commit, what was trained, and a result with RESULT_FIELDS for each way."""
    start, ticks, before = time.perf_counter(), cpu_ticks(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="fused-ebm-training-") as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            results = _measure(ways, batch, device, seconds)
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        torch.set_num_threads(before)
    about = machine() | {"date": datetime.now(UTC).isoformat(timespec="seconds"),
                         "steal": steal_fraction(ticks, cpu_ticks()), "run_s": round(time.perf_counter() - start, 1)}
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    return {
        "machine": about, "versions": versions(), "commit": commit(),
        "training": {"input_dim": FEATURES, "hidden_dim": HIDDEN, "n_layers": LAYERS, "n_sigmas": LEVELS,
                     "batch": batch, "threads": threads, "device": device, "dtype": "float32",
                     "steps_per_sample": STEPS},
        "results": results,
    }


def _measure(ways: tuple[str, ...], batch: int, device: str, seconds: float) -> list[dict[str, Any]]:
    u = torch.randn(EVENTS, FEATURES, generator=torch.Generator().manual_seed(0)).to(device)
    sigmas = geometric_sigmas(LEVELS)

    def call(way: str) -> Callable[..., None]:
        network = _network().to(device)
        score_of = WAYS[way](network)
        return lambda steps, **options: train(network, u, sigmas, steps=steps, batch_size=batch, progress=False,
                                              energy_and_score=score_of, **options)

    call("analytic score")(1)  # what the first step of a process costs, whichever way
    calls, first_s = {way: call(way) for way in ways}, {}
    for way in ways:
        start = time.perf_counter()
        calls[way](1, validation=(u[:4096], None))
        first_s[way] = time.perf_counter() - start
    errors, results = _errors(ways, batch, device), []
    timings = interleave(calls, [STEPS], seconds)
    for way, timing in timings.items():
        p90, p50, p10 = (STEPS * 1e9 / float(np.quantile(timing.samples_ns, q)) for q in (0.1, 0.5, 0.9))
        values = (way, p50, p10, p90, len(timing.samples_ns), first_s[way], first_s[way] + MOST_STEPS / p50,
                  errors[way], errors[way] <= MOST_ERROR)
        results.append(dict(zip(RESULT_FIELDS, values, strict=True)))
    return results


def _network(dtype: torch.dtype = torch.float32) -> EnergyNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EnergyNetwork(FEATURES, HIDDEN, LEVELS, LAYERS).to(dtype)


def _errors(ways: tuple[str, ...], batch: int, device: str) -> dict[str, float]:
    """Way -> the largest |gradient - truth| / |truth| of a weight, for one DSM loss."""
    draws = torch.randn(2, batch, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k = torch.arange(batch, device=device) % LEVELS

    def gradients(way: str, dtype: torch.dtype) -> list[torch.Tensor]:
        network = _network(dtype).to(device)
        u, noise = draws.to(device, dtype)
        sigmas = torch.tensor(geometric_sigmas(LEVELS), dtype=dtype, device=device)
        dsm_loss(WAYS[way](network), u, k, noise, sigmas).backward()
        return [p.grad for p in list(network.parameters())[:-1]]  # b_out has no part in the score

    truth = gradients("double backward", torch.float64)
    return {way: max(float((g - t).norm() / t.norm()) for g, t in zip(gradients(way, torch.float32), truth))
            for way in ways}


def print_report(report: dict[str, Any], console: Console) -> None:
    """The table and what belongs to it."""
    a, m = report["training"], report["machine"]
    if not console.is_terminal:  # a log: do not fold the table into 80 columns
        console.width = 120
    t = Table(title=f"Training {a['input_dim']}/{a['hidden_dim']}/{a['n_layers']}, batch {a['batch']}, {a['device']}, "
                    f"{a['threads']} thread{'s' if a['threads'] > 1 else ''}", title_style="bold", box=SIMPLE_HEAD,
              show_edge=False, pad_edge=False)
    t.add_column("way")
    for name in ("steps/s", "10% to 90%", "first step", f"{MOST_STEPS} steps", "error", "samples"):
        t.add_column(name, justify="right", no_wrap=True)
    slowest = report["results"][0]["steps_per_s"]
    for r in report["results"]:
        t.add_row(r["way"], f"{r['steps_per_s']:.1f} ({r['steps_per_s'] / slowest:.2f}x)",
                  f"{r['steps_per_s_p10']:.1f} to {r['steps_per_s_p90']:.1f}", f"{r['first_s']:.2f} s",
                  f"{r['default_run_s']:.1f} s", Text(f"{r['rel_error']:.1e}", "" if r["passed"] else "bold red"),
                  str(r["samples"]))
    console.print(t)
    steal = "unknown" if m["steal"] is None else f"{100 * m['steal']:.1f}%"
    console.print(Text(f"{m.get('gpu', m['cpu'])}, {m['cores']} cores, {m['os']}; torch {report['versions']['torch']}; "
                       f"steal {steal}; {m['run_s']:.0f} s; commit {report['commit']}"))
    console.print(Text(f"steps/s: {STEPS} steps of ebm.dsm.train over their time, sampling and Adam included; median, "
                       f"and against the first line. {MOST_STEPS} steps, as trained on many events: with the "
                       "first one, whose cost is compiling. error: of the worst gradient, against float64.",
                       style="dim"))


if __name__ == "__main__":
    app(prog_name="python -m bench.training")
