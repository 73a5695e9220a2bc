"""`python -m kernels`: the backends, and why each can or cannot run here; `pack` writes a model for C and C++, `cubin`
one for NVIDIA GPUs, `tune` looks for the fastest tiles on a GPU, and `calibrate` reports what a reduced precision costs
in physics."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ebm.command import one_sentence
from kernels.registry import BACKENDS, REDUCED

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown", invoke_without_command=True,
    help="The kernels that compute energy and score. Without a command: the backends, and whether each runs on this "
    "machine.\n\n"
    "**python -m kernels**\n\n"
    "**python -m kernels pack** models/demo demo.febm\n\n"
    "**python -m kernels cubin** models/demo demo-cuda\n\n"
    "**python -m kernels tune** --precision bf16\n\n"
    "**python -m kernels calibrate** models/demo toy",
)

Model = Annotated[Path, typer.Argument(help="Directory that 'python -m ebm train' wrote.")]


@app.callback()
def backends(context: typer.Context) -> None:
    """Print one line per backend."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("backend", "device", "precision", "what it is", "on this machine", title="fused-ebm backends")
    for b in BACKENDS.values():
        why_not = b.why_not()
        state = "[green]runs[/]" if why_not is None else f"[yellow]no:[/] {why_not}"
        table.add_row(b.name, b.device, ", ".join(b.dtypes), b.about, state)
    Console().print(table)


@app.command(epilog="Example: python -m kernels pack models/demo demo.febm")
@one_sentence
def pack(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Packed file to write; an older packed file there is replaced.")],
) -> None:
    """Write a model as one file for C and C++ programs, which open it with fused_ebm_open (fused_ebm.h).

    It holds the weights, the preprocessing, the threshold and the feature names, under a checksum. Energies and
    flags are those of the native backend, bit for bit on one instruction set.
    """
    from ebm.bundle import Bundle
    from kernels.febm import write_febm

    bundle = Bundle.load(model)
    size = write_febm(bundle, out)
    a = bundle.architecture
    threshold = "no threshold" if bundle.threshold is None else f"threshold {bundle.threshold.energy:.6g}"
    print(f"{out}: {size:,} bytes, {a.input_dim} features, width {a.hidden_dim}, {a.n_layers} residual layers, "
          f"{a.n_sigmas} noise levels (default {bundle.default_level}), {threshold}")


@app.command(epilog="Example: python -m kernels cubin models/demo demo-cuda --arch 80,90")
@one_sentence
def cubin(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Directory to write; what an earlier call wrote there is replaced.")],
    arch: Annotated[str | None, typer.Option(
        help="Compute capabilities, as 80,90. Default: all from 80 to 121, which takes a minute.")] = None,
    precision: Annotated[str, typer.Option(help="Of the Triton backend.")] = "fp32",
) -> None:
    """Compile a model for NVIDIA GPUs, which C and C++ programs open with fused_ebm_cuda_open (fused_ebm_cuda.h).

    OUT/model.febm-cuda holds the compiled kernels with weights, preprocessing, threshold and feature names, under a
    checksum; OUT/launch.h says in C how the kernels are launched. Neither this nor building the library needs a GPU.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: its interpreter compiles nothing
    from kernels import cubin as c

    os.environ.update(c.ENVIRONMENT)
    from rich.console import Console

    from ebm.bundle import Bundle

    words = (arch or ",".join(map(str, c.ARCHITECTURES))).split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--arch is {arch!r}, expected compute capabilities such as 80,90")
    bundle = Bundle.load(model)
    with Console(stderr=True).status(f"compiling for {len(words)} architectures"):
        sizes = c.write_cubin(bundle, out, map(int, words), precision)
    for name, size in sizes.items():
        print(f"{out / name}: {size:,} bytes")


@app.command(epilog="Example: python -m kernels tune --precision bf16 --precision fp32")
@one_sentence
def tune(
    precision: Annotated[list[str] | None, typer.Option(help="Repeated for several. Default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: the table, kernels/tiles.json.")] = None,
) -> None:
    """Time tiles of the Triton kernel on this machine's GPU, and write the fastest into the tile table.

    For each precision two tiles are looked for, that of small batches and that of large ones. What spills registers, or
    gives other results, is left out. Takes some minutes for each precision; needs an NVIDIA GPU (sm_80 and newer).
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from kernels.tiles import PRECISIONS, TABLE, describe, read_table, write_table
    from kernels.triton_gpu import why_not

    if unknown := set(precision or ()) - set(PRECISIONS):
        raise ValueError(f"precision is {min(unknown)!r}, expected {', '.join(map(repr, PRECISIONS))}")
    if reason := why_not():
        raise RuntimeError(f"tiles are timed on a GPU: {reason}")
    from kernels import tune as t

    gpu, path, table = t.OnGpu(), out or TABLE, read_table()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("compiling")

        def tell(trial: t.Trial) -> None:
            said = trial.problem or f"{trial.us:.1f} us"
            bar.update(task, description=f"{trial.precision}, {trial.regime}: {describe(trial.tile)}: {said}")

        table, pairs = t.tune(gpu, table, precision or PRECISIONS, tell=tell)
    shown = Table("precision", "regime", "batch", "table's tile", "us", "fastest", "us", title=gpu.name)
    for before, best in pairs:
        shown.add_row(before.precision, before.regime, str(t.BATCHES[before.regime]), describe(before.tile),
                      f"{before.us:.1f}", describe(best.tile), f"{best.us:.1f}")
    Console().print(shown)
    write_table(table, path)
    print(f"{path}: written. 'python -m kernels.resources' writes what the tiles take of every chip")


@app.command(epilog="Example: python -m kernels calibrate runs/higgs training.csv.gz --precision int8")
@one_sentence
def calibrate(
    model: Model,
    data: Annotated[str, typer.Argument(help="Events: **toy**, **toy:N** with N background events, or a HiggsML file "
                                        "(.csv, .csv.gz).")],
    precision: Annotated[list[str] | None, typer.Option(
        help=f"{' or '.join(REDUCED)}, repeated for several. Default: all that can run here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")] = False,
) -> None:
    """Report what a reduced precision costs in physics, and store the report in the model.

    int16 (energy and score) and int8 (energy only) of the native backend, beside float64: the change of AUROC and of
    signal efficiency at the calibrated threshold, how many flags differ, rank correlation and errors. On data that
    the model was trained on only the test folds count, on others all events; without labels AUROC and rates stay
    empty. load_scorer(..., precision="int8") asks for the report, and nothing ever chooses a reduced precision by
    itself. The threshold stays the one calibrated in fp32: that is what the report tests.
    """
    from rich.console import Console

    from ebm.bundle import Bundle, check_destination
    from ebm.events import check_schema, load_events
    from ebm.tables import print_physics_report
    from kernels.calibrate import physics_report, why_not

    bundle = Bundle.load(model)
    check_destination(model)
    reasons = {p: why_not(bundle, p) for p in precision or REDUCED}
    not_run = {p: reason for p, reason in reasons.items() if reason is not None}
    if len(not_run) == len(reasons):
        raise RuntimeError("no reduced precision can run: " + "; ".join(f"{p}: {why}" for p, why in not_run.items()))
    with Console(stderr=True).status(f"comparing on {data}"):
        events = load_events(data)
        check_schema(bundle.schema, events.schema, model, data)
        reports = {p: physics_report(bundle, events, p) for p in reasons if p not in not_run}
    replace(bundle, reports=bundle.reports | reports).save(model)
    if as_json:
        print(json.dumps({"model": str(model), "reports": reports, "not_run": not_run}, indent=1, allow_nan=False))
        return
    for report in reports.values():
        print_physics_report(report)
    for p, why in not_run.items():
        print(f"not run: {p}: {why}")
    print(f"The physics report of {' and of '.join(reports)} was stored in {model}: load_scorer gives this precision "
          "where it is asked for.")


if __name__ == "__main__":
    app(prog_name="python -m kernels")
