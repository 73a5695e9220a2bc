"""What a file holds, as the readers see it, in one pass and without keeping its events."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebm.events import Events, is_toy, load_events


def describe(source: str | Path) -> dict:
    """A dictionary of plain numbers: layout, schema, events, labels, weights, ids, era, and of every feature
    its unit, share of missing values, range, mean, standard deviation and what is wrong with it.

    Raises DataError for what cannot be read. Where NanoAOD simulation does not say its era, that is said, and
    `n_btag` is shown with the first working point that its tagger has.
    """
    layout, era, columns, first, note = "toy", None, {}, None, None
    if is_toy(source):
        parts = iter([load_events(source)])
    else:
        from ebm.readers import readers
        from ebm.readers.nanoaod import UnknownEra

        options = {}
        try:
            reader = next(readers(source))
        except UnknownEra as error:
            note, options = str(error), {"era": error.eras[0]}
            reader = next(readers(source, **options))
        layout, columns = reader.layout, reader.columns
        era = f"unknown, {reader.era} assumed for n_btag" if note else reader.era
        parts = (events for reader in readers(source, **options) for events in reader.pieces("100 MB"))
    totals = None
    for events in parts:
        first = first or events
        totals = _Totals(events) if totals is None else totals
        totals.add(events)
    return {
        "source": str(source), "layout": layout, "schema": first.schema.name, "events": totals.n,
        "features": totals.features(first), "missing_marker": first.schema.missing_marker,
        "id": {"columns": columns.get("id"), "first": str(first.event_id[0]), "from_file": first.has_id},
        "labels": None if first.label is None else {"column": columns.get("label"), "signal": totals.signal,
                                                    "background": totals.n - totals.signal},
        "weights": None if first.weight is None else totals.weights(columns.get("weight")),
        "processes": totals.processes or None, "era": era, "note": note,
    }


class _Totals:
    def __init__(self, events: Events) -> None:
        d = events.schema.n_features
        self.n = self.signal = self.negative = 0
        self.sum_w = self.sum_w2 = 0.0
        self.present, self.sum, self.sum2 = np.zeros(d, int), np.zeros(d), np.zeros(d)
        self.low, self.high = np.full(d, np.inf), np.full(d, -np.inf)
        first = events.x[:1000].astype(np.float64)  # near the mean, so that no digits cancel
        self.shift = np.nansum(first, axis=0) / np.maximum((~np.isnan(first)).sum(axis=0), 1)
        self.processes: dict[str, int] = {}

    def add(self, events: Events) -> None:
        x = events.x.astype(np.float64)
        self.n += len(x)
        self.present += (~np.isnan(x)).sum(axis=0)
        self.low, self.high = np.fmin(self.low, np.fmin.reduce(x)), np.fmax(self.high, np.fmax.reduce(x))
        x -= self.shift
        self.sum += np.nansum(x, axis=0)
        self.sum2 += np.nansum(x**2, axis=0)
        if events.label is not None:
            self.signal += int(events.label.sum())
        if events.weight is not None:
            self.negative += int((events.weight < 0).sum())
            self.sum_w += float(events.weight.sum())
            self.sum_w2 += float((events.weight**2).sum())
        if events.process is not None:
            for name, number in zip(*np.unique(events.process, return_counts=True)):
                self.processes[str(name)] = self.processes.get(str(name), 0) + int(number)

    def features(self, events: Events) -> list[dict]:
        rows, schema = [], events.schema
        for j, (name, unit) in enumerate(zip(schema.features, schema.units)):
            n = int(self.present[j])
            row = {"name": name, "unit": unit, "missing": 1 - n / self.n, "min": None, "max": None, "mean": None,
                   "std": None, "problem": "no value" if n == 0 else None}
            if n:
                mean = self.sum[j] / n
                row |= {"min": self.low[j], "max": self.high[j], "mean": self.shift[j] + mean,
                        "std": np.sqrt(max(self.sum2[j] / n - mean**2, 0))}
                row["problem"] = "constant" if self.low[j] == self.high[j] else None
            rows.append(row)
        return rows

    def weights(self, column: str | None) -> dict:
        """n_eff = (sum w)^2 / sum w^2: as many unweighted events say as much."""
        n_eff = self.sum_w**2 / self.sum_w2 if self.sum_w2 else 0.0
        return {"column": column, "sum": self.sum_w, "negative": self.negative, "n_eff": n_eff}


def print_description(d: dict) -> None:
    """The dictionary of `describe` as tables."""
    from rich.table import Table

    from ebm.tables import console

    c = console()
    table = Table(title=d["source"], show_header=False, title_justify="left")
    table.add_row("layout", d["layout"] + (f", schema {d['schema']}" if d["schema"] != d["layout"] else ""))
    table.add_row("events", f"{d['events']:,} of {len(d['features'])} features")
    identity = f"{d['id']['columns'] or 'event_id'}, the first is {d['id']['first']}"
    table.add_row("event id", identity if d["id"]["from_file"] else "none in the file: the row number")
    if d["labels"]:
        numbers = f"{d['labels']['signal']:,} signal, {d['labels']['background']:,} background"
    table.add_row("labels", numbers if d["labels"] else "none")
    if w := d["weights"]:
        table.add_row("weights", f"{w['column']}: sum {w['sum']:.6g}, {w['negative']:,} negative, worth "
                      f"{w['n_eff']:,.0f} unweighted events; for evaluation only")
    for name, number in (d["processes"] or {}).items():
        table.add_row(f"process {name}", f"{number:,}")
    if d["era"]:
        table.add_row("era", d["era"])
    c.print(table)
    table = Table(title="Features", title_justify="left")
    for heading in ("", "unit", "missing", "min", "max", "mean", "std", ""):
        table.add_column(heading, justify="left" if heading in ("", "unit") else "right")
    for f in d["features"]:
        numbers = ("-" if f[k] is None else f"{f[k]:.4g}" for k in ("min", "max", "mean", "std"))
        table.add_row(f["name"], f["unit"], f"{f['missing']:.1%}" if f["missing"] else "", *numbers, f["problem"] or "")
    c.print(table)
    if d["note"]:
        c.print(d["note"])
