"""`python -m ebm`: see what a file holds, train a model on events, score events with it, see how well it does."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ebm.bundle import Bundle, check_destination
from ebm.command import one_sentence, plain, whole_file
from ebm.events import DataError, Events, check_schema, load_events

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Energy-based anomaly detection for collider events: rare events get a high energy, and the score "
    "-dE/dx says which of their features are unusual.\n\n"
    "**python -m ebm train** toy --out runs/toy\n\n"
    "**python -m ebm score** runs/toy toy:1000 --out scores.parquet --explain\n\n"
    "**python -m ebm evaluate** runs/toy toy",
)

Data = Annotated[str, typer.Argument(
    help="Events: **toy**, **toy:N** with N background events, or files: ROOT, CSV, Parquet, HDF5 or NumPy, with "
    "options behind a question mark where needed, as in **'nano/\\*.root?era=UL2018'**.")]
Model = Annotated[Path, typer.Argument(help="Directory that 'train' wrote.")]
BackendName = Annotated[str, typer.Option(
    "--backend", help="auto, or a name that 'python -m kernels' lists; auto takes the fastest that runs here.")]


@app.command(epilog="Example: python -m ebm train training.csv.gz --out runs/higgs")
@one_sentence
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory for the model; an older model there is replaced.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, data and threads: same weights.")] = 0,
    hidden: Annotated[int, typer.Option(min=1, max=512, help="Width of the network.")] = 256,
    layers: Annotated[int, typer.Option(min=1, max=8, help="Residual layers.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Events per step.")] = 512,
    events: Annotated[int | None, typer.Option(min=1, help="Background events of the toy, as in toy:N.")] = None,
    backend: BackendName = "auto",
    device: Annotated[str, typer.Option(help="Where to train: cpu, or a GPU as cuda or cuda:1.")] = "cpu",
) -> None:
    """Fit a model and its threshold on background, and write both to a directory.

    Folds of the event ids: 0-5 train, 6-7 calibrate the threshold, 8-9 are kept for 'evaluate'. Where the
    file has labels only its background is used. The threshold keeps at most 1 background event in 10,000 at
    95% confidence; with fewer than 29,956 calibration events it cannot, and says what it does guarantee.
    """
    check_destination(out)
    if events is not None:
        if data != "toy":
            raise DataError(f"--events is for the toy, given with {data}")
        data = f"toy:{events}"
    _check_device(device)
    loaded = _load(data)
    from ebm.train import fit
    from kernels import load_scorer
    from kernels.autograd import energy_and_score_of

    # A backend that cannot run is better known before the training than after it.
    scorer = load_scorer(Bundle.random(loaded.schema.n_features, hidden, layers), backend)

    def energies(bundle: Bundle, x: np.ndarray) -> np.ndarray:
        return load_scorer(bundle, scorer.name).energy(x)

    options = {"--out": out, "--steps": steps, "--seed": seed, "--hidden": hidden, "--layers": layers, "--batch": batch,
               "--device": device}
    command = shlex.join(["python", "-m", "ebm", "train", _portable(data),
                          *(part for name, value in options.items() for part in (name, _portable(value)))])
    trained = fit(loaded, energies, steps=steps, hidden_dim=hidden, n_layers=layers, batch_size=batch, seed=seed,
                  command=command, device=device, energy_and_score_of=energy_and_score_of)
    trained.bundle.save(out)
    from ebm.tables import print_trained

    print_trained(trained, loaded, out)


@app.command(epilog="Example: python -m ebm score runs/higgs test.csv --out scores.parquet --explain")
@one_sentence
def score(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Parquet file to write, replaced if it is there.")],
    explain: Annotated[bool, typer.Option("--explain", help="Add attribution_FEATURE columns: dE/du, the change of "
                                          "energy per unit of background spread.")] = False,
    backend: BackendName = "auto",
) -> None:
    """Write energy and flag of every event, in input order: event_id, energy (float32), flag (bool).

    flag = energy > the model's threshold. A positive attribution: raising the feature makes the event more
    anomalous. Labels are not needed.
    """
    if out.suffix != ".parquet":
        raise DataError(f"{out}: scores are written as Parquet, expected a name that ends in .parquet")
    _check_file(out)
    bundle, events, scorer = _open(model, data, backend)
    import pyarrow as pa
    import pyarrow.parquet as pq

    energy = np.asarray(scorer.energy(events.x), np.float32)
    flag = None if scorer.threshold is None else energy > scorer.threshold
    columns = {"event_id": pa.array(events.event_id.tolist(), pa.string()), "energy": energy,
               "flag": pa.nulls(len(energy), pa.bool_()) if flag is None else flag}
    if explain:
        attribution = np.asarray(scorer.attribution(events.x), np.float32)
        columns |= {f"attribution_{name}": attribution[:, j] for j, name in enumerate(events.schema.features)}
    table = pa.table(columns).replace_schema_metadata({"model_digest": bundle.digest, "backend": scorer.name})
    with whole_file(out) as f:
        pq.write_table(table, f)
    flagged = "no threshold in this model" if flag is None else f"{np.count_nonzero(flag):,} flagged"
    print(f"{out}: {len(events):,} events, {flagged}")


@app.command(epilog="Example: python -m ebm evaluate runs/higgs training.csv.gz --json result.json")
@one_sentence
def evaluate(
    model: Model,
    data: Data,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")] = None,
    backend: BackendName = "auto",
) -> None:
    """Compare the energy with simple detectors on labelled events.

    AUROC, AUPRC, and the signal efficiency at 99.99% background rejection (or the tightest rejection that the
    sample resolves), beside |x|, the number of missing values, HT and an isolation forest. On data that the model
    was trained on only the test folds count, on others all events.
    """
    if json_file is not None:
        _check_file(json_file)
    bundle, events, scorer = _open(model, data, backend)
    from ebm.evaluate import evaluate as figures
    from ebm.tables import print_evaluation

    result = figures(bundle, events, scorer.energy)
    print_evaluation(result)
    if json_file is not None:
        with whole_file(json_file) as f:
            f.write((json.dumps(plain(result), indent=1, allow_nan=False) + "\n").encode())


@app.command(epilog="Example: python -m ebm describe 'nano.root?era=UL2018'")
@one_sentence
def describe(
    data: Data,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")] = False,
) -> None:
    """Show what a file holds: layout, events, labels, weights, event numbers, and every feature's range and gaps."""
    from ebm.describe import describe as figures
    from ebm.describe import print_description

    description = figures(data)
    if as_json:
        print(json.dumps(plain(description), indent=1, allow_nan=False))
    else:
        print_description(description)


def _load(data: str) -> Events:
    """`load_events`, with a sign of life on a terminal: the toy takes seconds to generate."""
    from rich.console import Console

    with Console(stderr=True).status(f"reading {data}"):
        return load_events(data)


def _open(model: Path, data: str, backend: str):
    """The model, the events, which must have its features, and the Scorer, whose choice is printed."""
    from kernels import load_scorer

    bundle = Bundle.load(model)
    scorer = load_scorer(bundle, backend)
    events = _load(data)
    check_schema(bundle.schema, events.schema, model, data)
    print(f"backend: {scorer.name} on {scorer.device} ({scorer.chosen_because})")
    return bundle, events, scorer


def _portable(value: object) -> str:
    """An argument as the provenance keeps it: of an absolute path only the name."""
    text = str(value)
    return os.path.basename(text) if os.path.isabs(text) else text


def _check_device(device: str) -> None:
    """DataError where there is no such device to train on."""
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or (index and not index.isdecimal())):
        raise DataError(f"--device {device!r}: expected cpu, cuda or cuda:N")
    if kind == "cuda":
        import torch

        if int(index or 0) >= torch.cuda.device_count():
            raise DataError(f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs")


def _check_file(path: Path) -> None:
    """DataError where the file could not be written; called before long work."""
    parent = path.resolve().parent
    if path.is_dir():
        raise DataError(f"{path} cannot be written: it is a directory")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as e:
        raise DataError(f"{path} cannot be written: {parent}: {e.strerror}") from None


if __name__ == "__main__":
    app(prog_name="python -m ebm")
