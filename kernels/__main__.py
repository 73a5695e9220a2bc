"""`python -m kernels`: the backends, and why each can or cannot run here; `pack` writes a model for C and C++."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ebm.command import one_sentence
from kernels.registry import BACKENDS

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown", invoke_without_command=True,
    help="The kernels that compute energy and score. Without a command: the backends, and whether each runs on this "
    "machine.\n\n"
    "**python -m kernels**\n\n"
    "**python -m kernels pack** models/demo demo.febm",
)


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
    model: Annotated[Path, typer.Argument(help="Directory that 'python -m ebm train' wrote.")],
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


if __name__ == "__main__":
    app(prog_name="python -m kernels")
