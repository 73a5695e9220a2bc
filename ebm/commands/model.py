"""`python -m ebm describe`, `train`, `calibrate`, `score`: from a file to a model, and from a model to flags."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ebm.bundle import Bundle, check_destination
from ebm.command import check_device, check_file, one_sentence, plain, whole_file
from ebm.commands import BackendName, Data, Model, app, load, open_model, open_scorer
from ebm.events import DataError, Events, check_schema, iterate
from ebm.settings import Settings


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


@app.command(epilog="Example: python -m ebm train training.csv.gz --out runs/higgs")
@one_sentence
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory for the model; an older model there is replaced.")],
    steps: Annotated[int | None, typer.Option(
        min=1, help=f"Training steps; left out, {Settings.steps or 'as many as the number of events suggests'}.",
    )] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, data and threads: same weights.")] = Settings.seed,
    hidden: Annotated[int, typer.Option(min=1, max=512, help="Width of the network.")] = 256,
    layers: Annotated[int, typer.Option(min=1, max=8, help="Residual layers.")] = 2,
    members: Annotated[int, typer.Option(min=1, max=512, help="Networks in one, trained with the seeds that follow; "
                                         "--hidden times these is at most 512.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Events per step.")] = Settings.batch_size,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = Settings.lr,
    dsm: Annotated[float, typer.Option(help="Weight of the score matching loss, levels at random.")] = Settings.dsm,
    multi_scale: Annotated[float, typer.Option(help="Weight of the sum of that loss over all noise levels, 1 / L "
                                               "each.")] = Settings.multi_scale,
    l2: Annotated[float, typer.Option("--l2", help="Weight of the squared parameters.")] = Settings.l2,
    patience: Annotated[int | None, typer.Option(
        min=1, help="Stop after so many steps without a better loss on held-out training events, and take the best "
        "weights.")] = Settings.patience,
    checkpoint: Annotated[Path | None, typer.Option(help="Directory to keep the unfinished training in.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --checkpoint, if anything is: the "
                                         "weights end as if nothing had stopped it.")] = False,
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
    if resume and checkpoint is None:
        raise DataError("--resume needs --checkpoint DIR, the directory that the training was kept in")
    check_device(device)
    loaded = load(data)
    from ebm.train import fit
    from kernels import load_scorer
    from kernels.autograd import energy_and_score_of

    # A backend that cannot run is better known before the training than after it.
    scorer = load_scorer(Bundle.random(loaded.schema.n_features, members * hidden, layers), backend)

    def energies(bundle: Bundle, x: np.ndarray) -> np.ndarray:
        return load_scorer(bundle, scorer.name).energy(x)

    settings = {"steps": steps or Settings.steps, "seed": seed, "batch_size": batch, "lr": lr, "dsm": dsm,
                "multi_scale": multi_scale, "l2": l2, "patience": patience}
    options = {"--out": out, "--steps": settings["steps"], "--seed": seed, "--hidden": hidden, "--layers": layers,
               "--batch": batch, "--device": device, "--members": members, "--lr": lr, "--dsm": dsm,
               "--multi-scale": multi_scale, "--l2": l2, "--patience": patience}
    command = shlex.join(["python", "-m", "ebm", "train", _portable(data), *(
        part for name, value in options.items() if value is not None for part in (name, _portable(value)))])
    trained = fit(loaded, energies, hidden_dim=hidden, n_layers=layers, members=members, command=command, device=device,
                  energy_and_score_of=energy_and_score_of, checkpoint=checkpoint, resume=resume, **settings)
    trained.bundle.save(out)
    from ebm.tables import print_history, print_trained

    print_trained(trained, loaded, out)
    print_history(trained.history)


@app.command(epilog="Example: python -m ebm calibrate runs/nano 'zerobias.root?era=UL2018' --rate 1e-5 --by n_jets")
@one_sentence
def calibrate(
    model: Model,
    data: Data,
    rate: Annotated[float, typer.Option(help="Share of background that may be flagged.")] = 1e-4,
    confidence: Annotated[float, typer.Option(help="With which that holds.")] = 0.95,
    by: Annotated[str | None, typer.Option(help="Feature, such as n_jets: a threshold for each of its values too.")
                  ] = None,
    weighted: Annotated[bool, typer.Option("--weighted", help="Use the events' weights; nothing is guaranteed then.")
                        ] = False,
    backend: BackendName = "auto",
) -> None:
    """Give the model a new threshold, of background events and with the backend that will run.

    Background of the calibration folds counts; of data that the model was not trained on, all but the test folds.
    """
    bundle, events, scorer = open_model(model, data, backend)
    from ebm.folds import recalibrate
    from ebm.tables import print_calibrated

    bundle = recalibrate(bundle, events, scorer.energy, rate=rate, confidence=confidence, by=by, weighted=weighted,
                         backend=scorer.name)
    bundle.save(model)
    print_calibrated(bundle, model)


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

    flag = energy > the model's threshold, and flag_by_FEATURE where it has thresholds by class. A positive
    attribution: raising the feature makes the event more anomalous. Labels are not needed. Read and written in pieces.
    """
    if out.suffix != ".parquet":
        raise DataError(f"{out}: scores are written as Parquet, expected a name that ends in .parquet")
    check_file(out)
    bundle, scorer = open_scorer(model, backend)
    import pyarrow as pa
    import pyarrow.parquet as pq
    from rich.console import Console

    def scored(events: Events) -> pa.Table:
        check_schema(bundle.schema, events.schema, model, data)
        energy = np.asarray(scorer.energy(events.x), np.float32)
        flag = pa.nulls(len(energy), pa.bool_()) if scorer.threshold is None else energy > scorer.threshold
        columns = {"event_id": pa.array(events.event_id.tolist(), pa.string()), "energy": energy, "flag": flag}
        if by := bundle.class_thresholds:
            columns[f"flag_by_{by.feature}"] = by.flag(events, energy)
        if explain:
            attribution = np.asarray(scorer.attribution(events.x), np.float32)
            columns |= {f"attribution_{name}": attribution[:, j] for j, name in enumerate(events.schema.features)}
        return pa.table(columns).replace_schema_metadata({"model_digest": bundle.digest, "backend": scorer.name})

    n = flagged = 0
    with Console(stderr=True).status(f"reading {data}") as status, whole_file(out) as f, ExitStack() as stack:
        writer = None
        for events in iterate(data):
            table = scored(events)
            writer = writer or stack.enter_context(pq.ParquetWriter(f, table.schema))
            writer.write_table(table)
            n, flagged = n + len(events), flagged + np.count_nonzero(table["flag"])
            status.update(f"{n:,} events of {data}")
    said = "no threshold in this model" if scorer.threshold is None else f"{flagged:,} flagged"
    print(f"{out}: {n:,} events, {said}")


def _portable(value: object) -> str:
    """An argument as the provenance keeps it: of an absolute path only the name."""
    text = str(value)
    return os.path.basename(text) if os.path.isabs(text) else text
