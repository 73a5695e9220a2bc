"""What the commands print."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ebm.bundle import Bundle
from ebm.checkpoint import History
from ebm.events import Events
from ebm.threshold import trigger_rate
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
    table.add_row("trigger rate", _hertz(*trigger_rate(t), t.confidence) + " of 40 MHz")
    console().print(table)


def print_calibrated(bundle: Bundle, out: Path) -> None:
    """The new threshold of a model, and those of its classes."""
    t, by = bundle.threshold, bundle.class_thresholds
    classes = zip(by.lowest, by.thresholds) if by else ()
    parts = [("all", t), *((f"from {low:g}", own) for low, own in classes)]
    table = Table(by.feature if by else "", "background", "threshold", "rank", "rate at most", "guaranteed",
                  "at 40 MHz", title=f"{out}: rate {t.rate:g} at {t.confidence:.0%} confidence", title_justify="left")
    for name, own in parts:
        table.add_row(name, f"{own.n_background:,}", f"{own.energy:.6g}", str(own.rank), f"{own.upper_bound:.2g}",
                      "yes" if own.guaranteed else "no", _hertz(*trigger_rate(own), own.confidence))
    c = console()
    c.print(table)
    if by:
        c.print("Every class has its own guarantee. 'score' and 'evaluate' apply the classes; backends, C and exports "
                "the threshold of all.")


def print_evaluation(result: dict) -> None:
    """The figures of `ebm.evaluate`."""
    c = console()
    scope = "test folds of the data trained on" if result["events"] == "test folds" else "all events"
    numbers = f"{result['n_signal']:,} signal, {result['n_background']:,} background"
    first = next(iter(result["detectors"].values()))
    rejection = first["tightest_rejection"]
    note = "" if rejection == first["rejection"] else f", the tightest resolved here; {first['rejection']:.2%} is not"
    within = result["multiplicity"].get("auroc_within")
    table = Table("detector", "AUROC", "95% interval", "the energy's minus it, paired 95%", "AUPRC",
                  *(["AUROC within a multiplicity"] if within else []),
                  title=f"{result['data']}, {scope}: {numbers}", title_justify="left")
    for name, d in result["detectors"].items():
        less = result["energy_minus"].get(name)
        table.add_row(name, f"{d['auroc']:.4f}", _between(d["auroc_interval"]),
                      f"{less['auroc']:+.4f} {_between(less['interval'], '+.4f')}" if less else "", f"{d['auprc']:.4f}",
                      *([_number(within[name], ".4f")] if within else []), style="" if less else "bold")
    c.print(table)
    points = [p["rejection"] for p in first["working_points"][:2]]
    table = Table("detector", *(f"{h}" for r in (*points, rejection) for h in (f"at {r:.4g}", "95% interval")), "SIC",
                  title="Signal efficiency at a background rejection", title_justify="left")
    for name, d in result["detectors"].items():
        tightest = (d["signal_efficiency_at_tightest"], d["signal_efficiency_at_tightest_interval_with_cut"])
        cells = [*((p["efficiency"], p["interval_with_cut"]) for p in d["working_points"][:2]), tightest]
        table.add_row(name, *(cell for e, i in cells for cell in (_number(e, ".4f"), _between(i))),
                      _number(d["sic"]["max"], ".2f"), style="" if name in result["energy_minus"] else "bold")
    c.print(table)
    c.print(f"AUPRC by chance: {first['prevalence']:.4f}. Intervals of efficiencies have the uncertainty of the cut in "
            "them. SIC: the highest significance improvement with 10 background events or more.")
    if note:
        c.print(f"Rejection {rejection:.2%}{note}: it takes {math.ceil(1 / (1 - first['rejection']) - 1e-6):,} "
                "background events.")
    reversed_ = [f"{name} ({1 - d['auroc']:.3f})" for name, d in result["detectors"].items() if d["auroc"] < 0.5]
    if reversed_:
        c.print(f"Below 0.5, signal is on the ordinary side; the opposite cut, which only labels can suggest: "
                f"{', '.join(reversed_)}.")
    if flag := result["flag"]:
        _print_flag(c, flag)
    _print_parts(c, result)


def _print_flag(c: Console, flag: dict) -> None:
    b, trigger = flag["background"], flag["trigger"]
    bound = "guaranteed" if flag["guaranteed"] else f"not guaranteed, the bound is {flag['upper_bound']:.2g}"
    c.print(f"Flagged background: {b['rate']:.2e} {_between(b['interval'], '.1e')} of {b['n']:,}; "
            f"target {flag['target']:g} ({bound}). Flagged signal: {flag['signal']['rate']:.4f}")
    c.print(f"Trigger rate: {_hertz(trigger['expected'], trigger['at_most'], flag['confidence'])} of "
            f"{trigger['input_rate'] / 1e6:g} MHz, prescale {trigger['prescale']}")
    if by := flag["by"]:
        b, each = by["background"], (f"{k['lowest']:g}: {k['background']['rate']:.1e}" for k in by["classes"]
                                     if k["background"])
        c.print(f"By {by['feature']}: flagged background {b['rate']:.2e} {_between(b['interval'], '.1e')}, signal "
                f"{by['signal']['rate']:.4f}; background from {', '.join(each)}")


def _print_parts(c: Console, result: dict) -> None:
    if result["weighted"]:
        ams = any("ams" in d for d in result["weighted"].values())
        table = Table("detector", "AUROC", "AUPRC", "signal efficiency at 99%", "95% interval", "SIC",
                      *(["AMS, best cut", "AMS, flag"] if ams else []), title="Weighted", title_justify="left")
        for name, d in result["weighted"].items():
            p, significance = d["working_points"][0], d.get("ams", {})
            table.add_row(name, f"{d['auroc']:.4f}", f"{d['auprc']:.4g}", _number(p["efficiency"], ".4f"),
                          _between(p["interval_with_cut"]), _number(d["sic"]["max"], ".2f"),
                          *(_number(significance[k], ".3f") for k in ("max", "at_cut") if ams))
        c.print(table)
        c.print(f"AUPRC by chance: {d['prevalence']:.4g}; {d['n_signal_effective']:,.0f} signal and "
                f"{d['n_background_effective']:,.0f} background events in effect")
    if result["processes"]:
        table = Table("process", "kind", "events", "flagged", "95% interval", "AUROC against all background",
                      title="By process", title_justify="left")
        for name, p in result["processes"].items():
            flagged = p["flagged"]
            cells = (f"{flagged['rate']:.2e}", _between(flagged["interval"], ".1e")) if flagged else ("-", "-")
            table.add_row(name, "signal" if p["signal"] else "background", f"{p['n']:,}", *cells,
                          f"{p['auroc']:.4f}" if p["signal"] else "")
        c.print(table)
    if found := result["signals"]:
        kinds = list(found["detectors"]["energy"])
        table = Table("detector", *(kind.replace("_", " ") for kind in kinds), title_justify="left",
                      title=f"Efficiency for each signal at {100 * found['rejection']:.6g}% background rejection")
        for name, d in found["detectors"].items():
            table.add_row(name, *(f"{d[kind]:.4f}" for kind in kinds))
        c.print(table)
    if m := result["multiplicity"]:
        strata = m["strata"]
        table = Table(m["feature"], *(f"{s['jets']}{'+' if s['or_more'] else ''}" for s in strata),
                      title="By multiplicity: is the energy more than a count?", title_justify="left")
        for kind in ("background", "signal"):
            table.add_row(kind, *(f"{s[f'n_{kind}']:,}" for s in strata))
        flagged = [s["background_flagged"] for s in strata]
        table.add_row("background flagged", *(f"{f['rate']:.1e}" if f else "-" for f in flagged), end_section=True)
        for d in result["detectors"]:
            table.add_row(f"AUROC {d}", *(_number(s["auroc"][d], ".3f") for s in strata))
        c.print(table)
    if shaped := result["sculpting"]:
        table = Table("background kept", "events", "Jensen-Shannon distance", "95% of random choices below", "p-value",
                      title=f"Does a cut on the energy shape {shaped['feature']}?", title_justify="left")
        for cut in shaped["cuts"]:
            table.add_row(f"{cut['share']:.2g}", f"{cut['n']:,}", *(_number(cut[k], ".3f") for k in
                                                                   ("distance", "limit", "p_value")))
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
    return "-" if value is None or math.isnan(value) else f"{value:{form}}"


def _hertz(expected: float, at_most: float, confidence: float) -> str:
    return f"{expected:,.4g} Hz expected, at most {at_most:,.4g} Hz ({confidence:.0%})"


def _between(interval: tuple[float, float], form: str = ".4f") -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def print_history(history: History) -> None:
    """The loss by its terms and on held-out events, at up to eight steps of the training."""
    columns = {**history.terms, **({"sum": history.train_loss} if len(history.terms) > 1 else {}),
               "held out": history.held_out_loss}
    table = Table("step", *columns, title="Loss per event", title_justify="left")
    for i in sorted({round(i) for i in np.linspace(0, len(history.steps) - 1, 8)}):
        table.add_row(f"{history.steps[i]:,}", *(f"{values[i]:.3f}" for values in columns.values()))
    console().print(table)
