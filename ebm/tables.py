"""What the commands print."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ebm.events import Events
from ebm.train import Trained


def console() -> Console:
    """stdout; wide enough for the tables where it is no terminal."""
    c = Console(highlight=False)
    return c if c.is_terminal else Console(highlight=False, width=140)


def print_trained(trained: Trained, events: Events, out: Path) -> None:
    """What was trained, its losses and the threshold with its guarantee."""
    bundle, history, n = trained.bundle, trained.history, trained.events
    a, t = bundle.architecture, bundle.threshold
    guarantee = "guaranteed" if t.guaranteed else f"NOT guaranteed at {t.rate:g}"
    table = Table(title=str(out), show_header=False, title_justify="left")
    table.add_row("data", f"{events.source}: {len(events):,} events of {events.schema.name}")
    table.add_row("background events", f"train {n['train']:,}, calibrate {n['calibrate']:,}, test {n['test']:,}")
    table.add_row("network", f"{a.input_dim} features, {a.n_layers} layers of {a.hidden_dim}, {a.n_sigmas} noise "
                  f"levels ({bundle.sigmas[0]:g} to {bundle.sigmas[-1]:g}), default level {bundle.default_level}")
    table.add_row("training", f"{history.steps[-1]:,} steps in {history.seconds:.0f} s")
    table.add_row("loss per event", f"train {history.train_loss[-1]:.3f}, held out {history.held_out_loss[-1]:.3f}")
    table.add_row("threshold", f"{t.energy:.6g}: energy {t.rank} from the top of {t.n_background:,}; background "
                  f"rate at most {t.upper_bound:.2g} at {t.confidence:.0%} confidence ({guarantee})")
    console().print(table)


def print_evaluation(result: dict) -> None:
    """The figures of `ebm.evaluate`."""
    c = console()
    scope = "test folds of the data trained on" if result["events"] == "test folds" else "all events"
    numbers = f"{result['n_signal']:,} signal, {result['n_background']:,} background"
    table = Table(title=f"{result['data']}, {scope}: {numbers}", title_justify="left")
    first = next(iter(result["detectors"].values()))
    rejection = first["tightest_rejection"]
    note = "" if rejection == first["rejection"] else f", the tightest resolved here; {first['rejection']:.2%} is not"
    for heading in ("detector", "AUROC", "95% interval", "AUPRC", f"signal efficiency at {rejection:.2%} rejection",
                    "95% interval"):
        table.add_column(heading, justify="left" if heading == "detector" else "right")
    for name, d in result["detectors"].items():
        table.add_row(name, f"{d['auroc']:.4f}", _between(d["auroc_interval"]), f"{d['auprc']:.4f}",
                      f"{d['signal_efficiency_at_tightest']:.4f}",
                      _between(d["signal_efficiency_at_tightest_interval"]), style="bold" if name == "energy" else "")
    c.print(table)
    if note:
        c.print(f"Rejection {rejection:.2%}{note}: it takes {math.ceil(1 / (1 - first['rejection']) - 1e-6):,} "
                "background events.")
    reversed_ = [f"{name} ({1 - d['auroc']:.3f})" for name, d in result["detectors"].items() if d["auroc"] < 0.5]
    if reversed_:
        c.print(f"Below 0.5, signal is on the ordinary side; the opposite cut, which only labels can suggest: "
                f"{', '.join(reversed_)}.")
    difference = result["energy_minus_isolation_forest"]
    c.print(f"AUROC of the energy minus the isolation forest's: {difference['auroc']:+.4f}, 95% paired bootstrap "
            f"[{difference['interval'][0]:+.4f}, {difference['interval'][1]:+.4f}]")
    if flag := result["flag"]:
        b = flag["background"]
        bound = "guaranteed" if flag["guaranteed"] else f"not guaranteed, the bound is {flag['upper_bound']:.2g}"
        c.print(f"Flagged background: {b['rate']:.2e} {_between(b['interval'], '.1e')} of {b['n']:,}; "
                f"target {flag['target']:g} ({bound}). Flagged signal: {flag['signal']['rate']:.4f}")
    _print_parts(c, result)


def _print_parts(c: Console, result: dict) -> None:
    if result["processes"]:
        table = Table("process", "kind", "events", "flagged", "95% interval", "AUROC against all background",
                      title="By process", title_justify="left")
        for name, p in result["processes"].items():
            flagged = p["flagged"]
            cells = (f"{flagged['rate']:.2e}", _between(flagged["interval"], ".1e")) if flagged else ("-", "-")
            table.add_row(name, "signal" if p["signal"] else "background", f"{p['n']:,}", *cells,
                          f"{p['auroc']:.4f}" if p["signal"] else "")
        c.print(table)
    if m := result["multiplicity"]:
        names = list(result["detectors"])
        table = Table(m["feature"], "background", "signal", "background flagged", *(f"AUROC {d}" for d in names),
                      title="By multiplicity: is the energy more than a count?", title_justify="left")
        for s in m["strata"]:
            flagged = s["background_flagged"]
            table.add_row(f"{s['jets']}{'+' if s['or_more'] else ''}", f"{s['n_background']:,}", f"{s['n_signal']:,}",
                          f"{flagged['rate']:.1e}" if flagged else "-",
                          *("-" if math.isnan(s["auroc"][d]) else f"{s['auroc'][d]:.3f}" for d in names))
        c.print(table)


def print_physics_report(report: dict) -> None:
    """The figures of `kernels.calibrate` for one reduced precision."""
    precision, figures, change = report["precision"], report["figures"], report["change"]
    scope = "test folds of the data trained on" if report["events"] == "test folds" else "all events"
    labelled = report["n_signal"] is not None
    numbers = f"{report['n_signal']:,} signal, {report['n_background']:,} background" if labelled else "no labels"
    table = Table(title=f"{precision} ({report['instruction_set']}) on {report['data']}, {scope}: {report['n']:,} "
                  f"events, {numbers}", title_justify="left")
    for heading in ("", "float64", "native fp32", f"native {precision}", f"{precision} - float64"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = (("AUROC", "auroc", ".4f"), ("signal efficiency at the threshold", "signal_efficiency", ".4f"),
            ("background flagged", "background_flag_rate", ".2e"), ("events flagged", "n_flagged", ",d"),
            ("flags unlike float64", "n_flags_different", ",d"), ("flag agreement", "flag_agreement", ".4%"),
            ("Spearman rank correlation", "spearman", ".6f"), ("RMS energy error over the spread", "rms_energy", ".1e"))
    for name, key, form in rows:
        difference = _number(change[key], "+.1e" if form == ".2e" else "+.6f") if key in change else ""
        if key == "auroc" and change["auroc_interval"]:
            difference += " " + _between(change["auroc_interval"], "+.6f")
        table.add_row(name, *(_number(f[key], form) for f in figures.values()), difference)
    if report["rms_score"] is not None:
        table.add_row("RMS score error over the RMS score", "", "", _number(report["rms_score"], ".1e"))
    c = console()
    c.print(table)
    c.print("This model has no threshold, so no flag is compared." if report["threshold"] is None else
            f"Flags are raised above {report['threshold']:.6g}, the threshold calibrated in fp32, in every column: its "
            f"guarantee is of fp32, and this table is what is known of {precision}.")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _between(interval: tuple[float, float], form: str = ".4f") -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"
