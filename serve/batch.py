"""A file of events in, a Parquet file of energies out: in parts, so that an interrupted run goes on where it was.

Every part is written whole or not at all, and says what it was made of: model, backend, place, and size and time of
the file that was read. A later run keeps a part if it would write the same label, so that the result has the same bytes
however often it was interrupted. Batch jobs of the service and `python -m serve.batch` are this code.

An event that has no energy ends the run: the error names file, entry and feature, and no result is written. A file of
scores has one row for each event that was read, or is not there; no physicist has to look for gaps in it.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from ebm.command import one_sentence, whole_file
from ebm.events import DataError, Events, check_schema, is_toy, iterate

if TYPE_CHECKING:
    import pyarrow as pa

    from ebm.bundle import Bundle
    from kernels.scorer import Scorer

SCORES = "scores.parquet"  # in the work directory, once all parts are there
CHUNK = 100_000


@dataclass(frozen=True)
class Summary:
    """What a run wrote. `flagged` is None where the model has no threshold."""

    events: int
    flagged: int | None


def score_parts(source: str, work: Path, scorer: Scorer, chunk: int = CHUNK,
                after_part: Callable[[int], None] = lambda events: None) -> Summary:
    """Score `source`, whatever `ebm.events.iterate` reads, into `work / SCORES`, `chunk` events at a time.

    The result has event_id (string), energy (float32) and flag (bool; null without a threshold), in input order, and
    the model's digest and threshold and the backend in its metadata. `after_part` is called with the number of events
    that are on disk; what it raises ends the run, which can go on later.

    Raises DataError where the source cannot be read, changes meanwhile, or has an event without a finite energy.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    stamps: dict[str, str] = {}
    parts, events, flagged = [], 0, 0
    for piece in iterate(source, chunk):
        stamp = stamps.setdefault(piece.source, _stamp(piece.source))
        part = work / f"part-{len(parts):06}.parquet"
        label = _label(scorer, stamp, chunk, events)
        if not part.exists() or pq.read_schema(part).metadata.get(b"label") != label:
            table = _scored(piece, events, source, scorer)
            with whole_file(part) as f:
                pq.write_table(table.replace_schema_metadata({"label": label}), f)
        parts.append(part)
        events += len(piece)
        after_part(events)
    if changed := [path for path, stamp in stamps.items() if _stamp(path) != stamp]:
        raise DataError(f"{changed[0]}: the file changed while it was read")
    metadata = {"model_digest": scorer.bundle.digest, "backend": scorer.name,
                "threshold": "" if scorer.threshold is None else repr(float(scorer.threshold))}
    schema = pq.read_schema(parts[0]).with_metadata(metadata)
    with whole_file(work / SCORES) as f, pq.ParquetWriter(f, schema) as writer:
        for part in parts:
            table = pq.read_table(part).replace_schema_metadata(metadata)
            flagged += pc.sum(table["flag"]).as_py() or 0
            writer.write_table(table)
    return Summary(events, None if scorer.threshold is None else flagged)


def scorer_for(model: Path | Bundle, backend: str = "auto", threads: int | None = None) -> Scorer:
    """`load_scorer`, with the same bits for an event in a chunk of any size, where the backend can promise that."""
    from kernels import load_scorer

    scorer = load_scorer(model, backend)
    if hasattr(scorer, "deterministic"):
        scorer.deterministic = True
    if threads is not None and hasattr(scorer, "threads"):
        scorer.threads = threads
    return scorer


def count(source: str) -> int | None:
    """The events in `source`, for a progress bar, where the format says so without being read to its end."""
    from ebm.readers import readers
    from ebm.readers.arrays import Arrays, Parquet

    total = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again with the events
        for reader in () if is_toy(source) else readers(source):
            table = getattr(reader, "table", reader)
            if isinstance(table, Parquet):
                total += table.file.metadata.num_rows
            elif isinstance(table, Arrays):
                total += len(next(iter(table.columns.values()))[0])
            elif hasattr(table, "tree"):
                total += table.tree.num_entries
            else:
                return None
    return total or None


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """The one run that works in this directory, which is made; RuntimeError where there is another."""
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
        yield
    except BlockingIOError:
        raise RuntimeError(f"{work}: another process is scoring into this directory") from None
    finally:
        os.close(handle)


def move(file: Path, to: Path) -> None:
    """Give a finished file its name, in one step, and see that it keeps it when the power fails."""
    os.replace(file, to)
    directory = os.open(to.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _stamp(path: str) -> str:
    """Size and time of the last change of a file; "" for what is none, such as the toy."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"


def _label(scorer: Scorer, stamp: str, chunk: int, first: int) -> bytes:
    """Everything that the bytes of a part depend on."""
    how = [scorer.name, scorer.precision, scorer.device, getattr(scorer, "isa", None)]
    return json.dumps([scorer.bundle.digest, scorer.threshold, how, stamp, chunk, first]).encode()


def _scored(events: Events, first: int, source: str, scorer: Scorer) -> pa.Table:
    import pyarrow as pa

    check_schema(scorer.bundle.schema, events.schema, "the model", source)
    try:
        energy = np.asarray(scorer.energy(events.x), np.float32)
    except ValueError as e:  # an event without an energy, by its place in this piece
        where = re.sub(r"^event (\d+)", lambda m: f"entry {first + int(m[1])}", str(e))
        raise DataError(f"{events.source or source}, {where}") from None
    flag = pa.nulls(len(energy), pa.bool_()) if scorer.threshold is None else energy > scorer.threshold
    return pa.table({"event_id": pa.array(events.event_id.tolist(), pa.string()), "energy": energy, "flag": flag})


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command(epilog="Example: python -m serve.batch events.parquet --model models/demo --out scores.parquet")
@one_sentence
def main(
    file: Annotated[str, typer.Argument(help="Events: Parquet, ROOT, HDF5, CSV or NumPy, with options behind a "
                                        "question mark where needed, as in **'nano.root?era=UL2018'**.")],
    model: Annotated[Path, typer.Option(help="Model directory, or an exported file.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write, replaced if it is there.")],
    backend: Annotated[str, typer.Option(help="auto, or a name that 'python -m kernels' lists.")] = "auto",
    chunk: Annotated[int, typer.Option(min=1, help="Events that are read and scored at a time.")] = CHUNK,
) -> None:
    """Write event_id, energy (float32) and flag (bool) of every event of a file that may be larger than memory.

    Interrupted in any way, the same command goes on where it was and writes the same bytes; until then the parts are in
    a directory beside the result whose name begins with a dot. An event that has no energy (NaN in a feature without
    imputation, Inf) ends the run with file, entry and feature, and no result is written.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if out.suffix != ".parquet":
        raise DataError(f"{out}: scores are written as Parquet, expected a name that ends in .parquet")
    if out.is_dir() or (out.exists() and any(os.path.samefile(out, p) for p in glob.glob(file.partition("?")[0]))):
        raise DataError(f"{out} cannot be written: it is {'a directory' if out.is_dir() else 'the file of events'}")
    scorer = scorer_for(model, backend)
    work = out.resolve().parent / f".{out.name}.parts"
    columns = (TextColumn("events"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with alone(work), Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=count(file))
        summary = score_parts(file, work, scorer, chunk, lambda events: progress.update(task, completed=events))
        move(work / SCORES, out.resolve())
        shutil.rmtree(work)
    flagged = "no threshold in this model" if summary.flagged is None else f"{summary.flagged:,} flagged"
    print(f"{out}: {summary.events:,} events, {flagged}")


if __name__ == "__main__":
    app(prog_name="python -m serve.batch")
