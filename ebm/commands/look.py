"""`python -m ebm evaluate`, `explore`, `errors`: how well a model does, what the data look like, what it gets wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ebm.command import check_file, one_sentence
from ebm.commands import (
    BackendName,
    Data,
    Json,
    Model,
    Pictured,
    app,
    check_pictures,
    deliver,
    load,
    open_model,
    write_json,
)
from ebm.threshold import CROSSINGS


@app.command(epilog="Example: python -m ebm evaluate runs/higgs training.csv.gz --json result.json")
@one_sentence
def evaluate(
    model: Model,
    data: Data,
    json_file: Json = None,
    pictures: Annotated[Path | None, typer.Option(help="Directory for pictures: significance improvement, and the "
                                                  "mass before and after cuts on the energy.")] = None,
    mass: Annotated[str | None, typer.Option(help="Feature that a cut may shape; left out, m_jj or its like.")] = None,
    input_rate: Annotated[float, typer.Option(help="Events per second before the trigger.")] = CROSSINGS,
    prescale: Annotated[int, typer.Option(min=1, help="Of so many flagged events one is kept.")] = 1,
    backend: BackendName = "auto",
) -> None:
    """Compare the energy with simple detectors on labelled events.

    AUROC, AUPRC, the signal efficiency at 99, 99.9 and 99.99% background rejection (or the tightest rejection that
    the sample resolves), and the significance improvement, beside simple detectors; weighted too where there are
    weights. How often the flag is raised, in which classes, and whether it shapes a mass. Where the model was trained
    or calibrated on some of the events only the test folds count, else all events.
    """
    if json_file is not None:
        check_file(json_file)
    if pictures is not None:
        from ebm.style import check_directory

        check_directory(pictures)
    bundle, events, scorer = open_model(model, data, backend)
    from ebm.evaluate import evaluate as figures
    from ebm.tables import print_evaluation

    result = figures(bundle, events, scorer.energy, input_rate=input_rate, prescale=prescale, mass=mass,
                     pictures=pictures)
    print_evaluation(result)
    if json_file is not None:
        write_json(json_file, result)


@app.command(epilog="Example: python -m ebm explore training.csv.gz --out pictures")
@one_sentence
def explore(data: Data, out: Pictured, json_file: Json = None) -> None:
    """Draw every feature, principal components, correlations and distances, normal events against anomalous ones.

    The training folds' background and the test folds are shown; without labels the test events as one class.
    """
    check_pictures(out, json_file)
    events = load(data)
    from ebm.explore import explore as look

    deliver(look(events), out, json_file)


@app.command(epilog="Example: python -m ebm errors runs/higgs training.csv.gz --out pictures --json errors.json")
@one_sentence
def errors(
    model: Model,
    data: Data,
    out: Pictured,
    rejection: Annotated[float, typer.Option(
        help="Share of background at or below the cut; less where fewer than 50 events would be above.")] = 0.99,
    json_file: Json = None,
    backend: BackendName = "auto",
) -> None:
    """Draw what the energy gets wrong and why it ranks ten events highest, and check that explanation.

    False positives and negatives at a cut on the energy; of the ten highest energies the pull of every feature and
    object, and the event along the beam; and whether removing the features with the largest pulls lowers the energy.
    On data that the model was trained on only the test folds count, on others all events. Labels are not needed.
    """
    check_pictures(out, json_file)
    bundle, events, scorer = open_model(model, data, backend)
    from ebm.errors import errors as look
    from ebm.errors import summary

    pictures = look(bundle, events, scorer, rejection=rejection)
    deliver(pictures, out, json_file)
    for line in summary(pictures.numbers):
        print(line)
