"""`python -m ebm benchmark`: all detectors on all data sets of a folder, in several processes; a killed run goes on."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ebm.command import check_file, commit, one_sentence, processor, whole_file
from ebm.commands import app, write_json
from ebm.events import DataError


@app.command(epilog="Example: python -m ebm benchmark --data DIR --out docs/benchmark.md --only adbench --seeds 1")
@one_sentence
def benchmark(
    data: Annotated[Path, typer.Option(help="Folder with any of HiggsML (atlas-higgs-challenge-2014-v2 or training, "
                                       "Parquet or CSV), LHCO (lhco_SR_train.parquet and lhco_SR_val.parquet) and "
                                       "tables of ADBench (.npz with X and y), also in folders in it.")],
    out: Annotated[Path, typer.Option(help="Markdown file to write; the figures are beside it, in .json.")],
    seeds: Annotated[int, typer.Option(min=1, help="Splits and trainings of each data set.")] = 3,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes of one thread each; left out, one for each "
                                                "core.")] = None,
    only: Annotated[str, typer.Option(metavar="NAME,...", help="Data sets or groups to compute, such as "
                                      "higgsml,lhco,annthyroid; those computed before stay.")] = "",
) -> None:
    """Compare the energy with simple detectors on every data set of a folder, with the default settings.

    All detectors see the same normal events with the same preprocessing, and no label. Of an ADBench table half of the
    normal rows train; HiggsML and LHCO have splits of their own. What is finished is kept in the .json: a killed
    command goes on when it is given again, and computes anew what other data, settings, source or versions change.
    """
    result = run(data, out, seeds=seeds, workers=workers, only=[name for name in only.split(",") if name])
    from ebm.benchmark_table import summary

    for line in summary(result):
        print(line.replace("**", ""))
    failed = [f"{p['data']}, seed {p['seed']}: {p['error']}" for p in result["pieces"] if "error" in p]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(result['pieces'])} pieces failed, {out} has the others: "
                           f"{'; '.join(failed)}")
    print(f"{out}, {out.with_suffix('.json')}: {len(result['pieces'])} pieces")


def run(folder: Path, out: Path, *, seeds: int = 3, workers: int | None = None, only: Sequence[str] = (),
        settings: dict | None = None) -> dict:
    """Compute what is missing, one piece for each data set and seed; the content of the JSON file beside `out`.

    That file is written after every piece, and read again by the next run; `out`, Markdown, at the end. `only` names
    data sets or groups, in either case; `workers` None: one process for each core; `settings` replace defaults of
    `EBMDetector`. A piece that fails is kept with its error, and tried again by the next run.
    Raises DataError where there is nothing to compute on, or a file cannot be written.
    """
    from ebm.benchmark import find, key, recipe
    from ebm.benchmark_table import markdown, published

    results, settings = out.with_suffix(".json"), settings or {}
    if out.suffix != ".md":
        raise DataError(f"{out}: expected a name that ends in .md; the figures are written beside it, in .json")
    for path in (out, results):
        check_file(path)
    earlier = _earlier(results)
    found, left_out = find(folder)
    chosen = _chosen(found, only)
    used, datasets = recipe(settings), {data.name: data for data in found}
    beside = published(folder, list(datasets))
    pieces = {(p["data"], p["seed"]): p for p in earlier
              if p["data"] in datasets and p["key"] == key(datasets[p["data"]], p["seed"], used)}
    if len(pieces) < len(earlier):
        print(f"{results}: {len(earlier) - len(pieces)} of {len(earlier)} pieces are of other data, settings, source "
              "or versions, and are left away")
    todo = [(data, seed) for data in sorted(chosen, key=lambda data: -data.size) for seed in range(seeds)
            if "error" in pieces.get((data.name, seed), {"error": "not yet computed"})]
    cores = len(os.sched_getaffinity(0))
    workers = max(1, min(workers or cores, len(todo)))
    about = {"cpu": processor(), "cores": cores, "workers": workers, "commit": commit()}
    order = list(datasets)

    def write() -> dict:
        result = {"recipe": used, "seeds": seeds, "left_out": left_out, "published": beside,
                  "pieces": [pieces[k] for k in sorted(pieces, key=lambda k: (order.index(k[0]), k[1]))]}
        write_json(results, result)
        return result

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  TimeRemainingColumn(), console=Console(stderr=True, highlight=False)) as bar:
        task = bar.add_task(f"{workers} at a time", total=len(todo))
        for (data, seed), computed in _computed(todo, settings, workers):
            date = datetime.now(UTC).isoformat(timespec="seconds")
            pieces[data.name, seed] = {
                "data": data.name, "group": data.group, "files": [path.name for path in data.files],
                "digest": data.digest, "seed": seed, "key": key(data, seed, used), **computed,
                "run": about | {"date": date}}
            write()
            bar.console.print(f"{data.name}, seed {seed}: {_in_short(computed)}", markup=False, soft_wrap=True)
            bar.advance(task)
    result = write()
    with whole_file(out) as f:
        f.write(markdown(result).encode())
    return result


def _computed(todo: list, settings: dict, workers: int) -> Iterator[tuple[tuple, dict]]:
    if workers == 1:
        yield from ((job, _attempt(*job, settings)) for job in todo)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent)
    try:
        futures = {pool.submit(_attempt, *job, settings): job for job in todo}
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(data, seed: int, settings: dict) -> dict:
    from ebm import benchmark

    try:
        return benchmark.piece(data, seed, settings)
    except (ValueError, RuntimeError) as e:
        return {"error": str(e)}


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _earlier(results: Path) -> list[dict]:
    if not results.exists():
        return []
    try:
        pieces = json.loads(results.read_text())["pieces"]
        for p in pieces:
            _ = p["data"], p["seed"], p["key"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{results}: expected the figures of an earlier benchmark, or no such file") from None
    return pieces


def _chosen(found: list, only: Sequence[str]) -> list:
    known = {name.lower() for data in found for name in (data.name, data.group)}
    if unknown := [name for name in only if name.lower() not in known]:
        raise DataError(f"no data set {', '.join(unknown)} in the folder, it has "
                        f"{', '.join(dict.fromkeys(name for data in found for name in (data.group, data.name)))}")
    wanted = {name.lower() for name in only} or known
    return [data for data in found if wanted & {data.name.lower(), data.group.lower()}]


def _in_short(computed: dict) -> str:
    if "error" in computed:
        return f"failed: {computed['error']}"
    others = computed["auroc"].copy()
    energy = others.pop("energy")
    best = max(others, key=others.get)
    seconds = sum(map(sum, computed["seconds"].values()))
    return f"AUROC of the energy {energy:.3f}, best of the others {best} {others[best]:.3f}; {seconds:.0f} s"
