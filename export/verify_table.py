"""The proof as tables for people; they fit in 100 columns."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from export.verify import FAIL, NOT_RUN, PASS, Report
from export.verify_checks import CHECKS

WIDTH = 100
_ORDINARY = ("random", "real")
_STYLE = {PASS: "green", FAIL: "bold red", NOT_RUN: "yellow"}


def print_report(report: Report, console: Console | None = None) -> None:
    """One line per Scorer in each of two tables, then what failed and what was not run, with the reasons."""
    console = console or Console(highlight=False)
    if not console.is_terminal:  # a log: do not fold the tables
        console.width = WIDTH
    about, scorers = report.about, {}
    for row in report.rows:
        scorers.setdefault((row["scorer"], row["precision"]), []).append(row)
    ran = {name: rows for name, rows in scorers.items() if any(row["check"] != "load" for row in rows)}
    threshold = "no threshold" if about["threshold"] is None else f"threshold {about['threshold']:.6g}"
    console.print(Text(f"{about['target']}: {about['kind']} model of {about['features']} features "
                       f"({about['schema']}), {threshold}, digest {about['model_digest'][:12]}", style="bold"))
    console.print(_agreement(ran), _checks(ran))
    for row in report.rows:
        if row["status"] == FAIL:
            console.print(Text.assemble(("FAIL ", _STYLE[FAIL]), f"{_name(row)}, {row['check']}{_of(row)}: "
                                        f"{row['reason']}{_worst(row)}"))
    for (what, reason), names in _not_run(report).items():
        console.print(Text.assemble(("NOT RUN ", _STYLE[NOT_RUN]), f"{what}{', '.join(names)}: {reason}"))
    console.print(Text(
        "E, dE/dx: RMS error of the energies over their standard deviation, of the gradients over their RMS, on random "
        f"events{' and on ' + about['data'] if about['data'] else ''}. needed: the smallest limit that passes all "
        "checks. 1 - rank: one minus Spearman's correlation. flags: how many differ, except within 2 limits of the "
        "threshold. Checks: the largest error; bits: an event has the same bits alone and in any batch; same: all "
        "flags.", style="dim"))
    failed = [_name(rows[0]) for rows in scorers.values() if _verdict(rows) == FAIL]
    passed = sum(_verdict(rows) == PASS for rows in scorers.values())
    unproven = [_name(rows[0]) for rows in scorers.values() if rows[0]["file"] and _verdict(rows) == NOT_RUN]
    console.print(Text(f"{'PASS' if report.ok else 'FAIL'}: {passed} of {passed + len(failed)} scorers agree with "
                       f"float64 ({about['seconds']:.0f} s)" + (f"; not {', '.join(failed)}" if failed else "")
                       + (f"; nothing is proven of {', '.join(unproven)}" if unproven else ""),
                       style=_STYLE[PASS if report.ok else FAIL]))


def _agreement(scorers: dict[tuple, list[dict]]) -> Table:
    table = _table("Agreement with float64", "E", "dE/dx", "limit", "needed", "1 - rank", "flags", "worst event", "")
    for rows in scorers.values():
        ordinary = [r for r in rows if r["check"] in _ORDINARY and r["status"] != NOT_RUN]
        same_limit = [r for r in rows if r["check"] != "gradient"]
        worst = max((r for r in same_limit if r["worst"]), key=lambda r: r["worst"]["error"], default=None)
        flags = [r["flags_differ"] for r in rows if r["flags_differ"] is not None]
        ranks = [1 - r["spearman"] for r in ordinary if r["spearman"] is not None]
        verdict = _verdict(rows)
        table.add_row(
            _name(rows[0]), _largest(ordinary, "error_energy"), _largest(ordinary, "error_score"),
            _largest(ordinary, "tolerance"), _largest(same_limit, "needed"), f"{max(ranks):.0e}" if ranks else "-",
            str(sum(flags)) if flags else "-", f"{worst['of']} {worst['worst']['event']}" if worst else "-",
            Text(verdict, style=_STYLE[verdict]))
    return table


def _checks(scorers: dict[tuple, list[dict]]) -> Table:
    checks = [name for name in CHECKS if name not in _ORDINARY]
    table = _table("Checks", *checks)
    for rows in scorers.values():
        table.add_row(_name(rows[0]), *(_cell([r for r in rows if r["check"] == name]) for name in checks))
    return table


def _cell(rows: list[dict]) -> Text:
    """The largest error of a check, or what else it says."""
    status = _verdict(rows) if rows else NOT_RUN
    if status == NOT_RUN:
        return Text("-", style="dim")
    if status == FAIL:
        return Text("FAIL", style=_STYLE[FAIL])
    if any(r["same_bits"] and r["of"] == "alone" for r in rows):
        return Text("bits")
    text = _largest(rows, "needed")
    return Text("same" if text == "-" else text)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False,
                  pad_edge=False, collapse_padding=True)
    table.add_column("scorer", overflow="fold", max_width=26)
    for name in columns:
        table.add_column(name, justify="left" if name in ("worst event", "") else "right")
    return table


def _not_run(report: Report) -> dict[tuple[str, str], list[str]]:
    """(check, reason) -> the scorers, in order."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        if row["status"] == NOT_RUN:
            what = "" if row["check"] == "load" else f"{row['check']} of "
            found.setdefault((what, row["reason"]), []).append(_name(row))
    return found


def _verdict(rows: list[dict]) -> str:
    statuses = {row["status"] for row in rows}
    return FAIL if FAIL in statuses else PASS if PASS in statuses else NOT_RUN


def _largest(rows: list[dict], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return f"{max(values, key=lambda v: float('inf') if v != v else v):.0e}" if values else "-"


def _name(row: dict) -> str:
    return " ".join(filter(None, (row["scorer"], row["precision"])))


def _of(row: dict) -> str:
    return f" ({row['of']})" if row["of"] else ""


def _worst(row: dict) -> str:
    w = row["worst"]
    if not w or w["energy"] is None:
        return ""
    return f"; worst event {w['event']}: E = {w['energy']:.7g}, float64 {w['true_energy']:.7g}"
