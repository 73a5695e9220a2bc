"""`python -m export`: leave Python, prove that what left agrees with float64, see what an export is."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ebm.command import one_sentence, plain, whole_file

TARGETS = "torchscript, onnx, aot-inductor, tensorrt, triton"

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Export a model for other runtimes. Raw events go in; energy, score -dE/dx and flag come out, from one graph "
    "without autograd. Every export has export.json beside it: digests, options, 64 events with their float64 "
    "answers and the measured errors.\n\n"
    "**python -m export build** models/demo --to torchscript,onnx --out out\n\n"
    "**python -m export verify** out\n\n"
    "**python -m export inspect** out/model.onnx",
)


@app.command(epilog="Example: python -m export build models/demo --to onnx --outputs energy,flag --out trigger")
@one_sentence
def build(
    model: Annotated[Path, typer.Argument(help="Directory that 'python -m ebm train' wrote.")],
    to: Annotated[str, typer.Option(help=f"Some of {TARGETS}, separated by commas.")],
    out: Annotated[Path, typer.Option(help="New directory for the export. One that exists is refused; only --to triton "
                                           "alone adds a version to the repository that it holds.")],
    outputs: Annotated[str | None, typer.Option(
        help="energy, and any of score, flag (needs a threshold) and energies (at every noise level). Without score "
        "half the work is saved. Default: energy, score and, where there is a threshold, flag.")] = None,
    noise_level: Annotated[int | None, typer.Option(
        help="Of energy, score and flag; 0 is the largest noise. Default: the model's.")] = None,
    batch_max: Annotated[int, typer.Option(help="Largest batch of tensorrt and triton; others have none.")] = 65_536,
    no_preprocess: Annotated[bool, typer.Option(
        "--no-preprocess", help="Leave the preprocessing out: the artefact takes preprocessed events.")] = False,
    tensorrt_precision: Annotated[str | None, typer.Option(
        help="fp32 (the default), fp16 or bf16.", rich_help_panel="tensorrt")] = None,
    triton_version: Annotated[str | None, typer.Option(
        help="Of the server that config.pbtxt is for. Default: 2.51.", rich_help_panel="triton")] = None,
    triton_backend: Annotated[str | None, typer.Option(
        help="python (our kernels, the default), pytorch or onnxruntime.", rich_help_panel="triton")] = None,
    triton_name: Annotated[str | None, typer.Option(
        help="Of the model on the server. Default: the name of its schema.", rich_help_panel="triton")] = None,
    triton_device: Annotated[str | None, typer.Option(
        help="cpu (the default) or gpu.", rich_help_panel="triton")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")] = False,
) -> None:
    """Export a model: what 'inspect' shows, and 'verify' proves.

    torchscript is model.pt for libtorch; onnx is model.onnx for ONNX Runtime, OpenVINO and others; aot-inductor is
    model.pt2, code compiled with g++; tensorrt is an engine for the GPU of this machine; triton is a model repository
    for Triton Inference Server. All take events (batch, features) in float32, of any batch size.

    The directory appears when all of it is written, and only if every artefact that can run here agrees with float64.
    """
    from rich.console import Console

    from export.build import build
    from export.describe import describe, print_exports

    triton = {"triton_version": triton_version, "backend": triton_backend, "name": triton_name,
              "device": triton_device}
    extra = {"tensorrt": {"precision": tensorrt_precision}, "triton": triton}
    extra = {target: {k: v for k, v in given.items() if v is not None} for target, given in extra.items()}
    with Console(stderr=True).status("loading") as status:
        build(model, _parts(to), out, outputs=_parts(outputs), level=noise_level, preprocess=not no_preprocess,
              batch_max=batch_max, extra={k: v for k, v in extra.items() if v}, command=_command(),
              progress=lambda step: status.update(f"exporting: {step}"))
    exports = describe(out)
    if as_json:
        print(json.dumps(plain({"out": str(out), "exports": exports}), indent=1, allow_nan=False))
    else:
        print_exports(exports)


@app.command(epilog="Example: python -m export verify out --json proof.json")
@one_sentence
def verify(
    target: Annotated[Path, typer.Argument(metavar="DIR|MODEL", help="An export, a Triton repository, or a model.")],
    data: Annotated[str | None, typer.Option(
        help="Real events of the model's features: **toy:N** or a HiggsML file. Default: toy events if they fit.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the whole report there too.")] = None,
) -> None:
    """Check every artefact, and every backend that runs here, against float64.

    On random, real and adversarial events: errors of the energy and of its gradient, flags, ranking, batch sizes, an
    event alone and in a batch, the golden events of export.json. PASS, FAIL, or NOT RUN with the reason. The exit code
    is 1 where anything fails.
    """
    from rich.console import Console

    from export.verify import verify
    from export.verify_table import print_report

    if to is not None and not to.resolve().parent.is_dir():
        raise ValueError(f"--json {to}: {to.resolve().parent} is no directory")
    with Console(stderr=True).status("verifying"):
        report = verify(target, data=data)
    if to is not None:
        with whole_file(to) as f:
            f.write(report.to_json().encode())
    print_report(report)
    if not report.ok:
        sys.exit(1)


@app.command(epilog="Example: python -m export inspect out")
@one_sentence
def inspect(
    path: Annotated[Path, typer.Argument(help="An artefact, an export, or a directory with exports in it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of tables.")] = False,
) -> None:
    """Show what an artefact is: inputs, outputs, model, threshold, errors, and whether its files are intact.

    The exit code is 1 where a file is damaged.
    """
    from export.describe import describe, print_exports

    exports = describe(path)
    if as_json:
        print(json.dumps(plain(exports), indent=1, allow_nan=False))
    else:
        print_exports(exports)
    if any(export["damaged"] for export in exports):
        sys.exit(1)


def _parts(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _command() -> str:
    """The command line as the manifest keeps it: of absolute paths only the names."""
    def named(match: re.Match) -> str:
        return (match[1] or "") + os.path.basename(match[0].rstrip("/"))

    return shlex.join(["python", "-m", "export", *(re.sub(r"^(--[\w-]+=)?/.*", named, a) for a in sys.argv[1:])])


if __name__ == "__main__":
    app(prog_name="python -m export")
