"""`python -m ebm report`: everything about a model on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ebm.command import one_sentence
from ebm.commands import BackendName, Data, Json, Model, app, check_pictures, open_model, write_json


@app.command(epilog="Example: python -m ebm report runs/higgs training.csv.gz --out report")
@one_sentence
def report(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory for report.html, and for its pictures as PNG and PDF.")],
    json_file: Json = None,
    backend: BackendName = "auto",
) -> None:
    """Write one page about a model on a sample: for the screen, for print, and to send, as it needs no other file.

    What the flag guarantees and how often it is raised, the energy beside simple detectors, where a cut is efficient
    and whether it shapes a mass, how the training went, the ten highest energies explained, and a model card. Where
    the model was trained on the data only the test folds count, else all events. Labels are not needed.
    """
    check_pictures(out, json_file)
    bundle, events, scorer = open_model(model, data, backend)
    from ebm.report import report as write
    from ebm.report_words import plural

    done = write(bundle, events, scorer, out, model=model.resolve().name)
    if json_file is not None:
        write_json(json_file, done.numbers)
    for line in done.numbers["summary"]:
        print(line)
    notes = [f"note: {note}" for note in done.numbers["notes"]]
    pictures = plural(len(done.files) // 2, "picture")
    print(*notes, f"{done.files[0]}: the page, and {pictures} beside it, each as PNG and PDF", sep="\n")
