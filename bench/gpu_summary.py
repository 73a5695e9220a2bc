"""The figures that `bench.gpu` was written for, beside those that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

EXACT = ("fp32", "tf32x3")


@dataclass(frozen=True)
class Figure:
    """One line: `value` is None where it was not measured; `wanted` and `dream` are bounds."""

    what: str
    value: float | None
    wanted: float
    dream: float
    unit: str
    how: str = ""

    @property
    def verdict(self) -> str:
        """What was reached."""
        if self.value is None:
            return "-"
        reached: Callable[[float], bool] = (lambda v: self.value <= v) if self.unit == "us" else \
            (lambda v: self.value >= v)
        return "dream" if reached(self.dream) else "yes" if reached(self.wanted) else "NO"


def figures(report: dict) -> list[Figure]:
    """From the report, as it is written to JSON."""
    rows, flows = report["results"], [t for t in report["throughput"] if t["passed"]]
    return [_matrix_rate(flows), _against_compiled(rows, flows, ("bf16",), "bf16", 2.5, 4.0),
            _against_compiled(rows, flows, EXACT, "fp32", 1.5, 3.0),
            _latency(rows, "graph-device", "p50_us", "batch 1, graph replay on the device, p50", 20, 10),
            _latency(rows, "call", "p50_us", "batch 1, NumPy to NumPy, p50", 40, 25),
            _latency(rows, "call", "p99_us", "batch 1, NumPy to NumPy, p99", 80, 40),
            _bus(flows), *_training(report["training"])]


def _matrix_rate(flows: list[dict]) -> Figure:
    best = _most((f for f in flows if f["where"] == "device" and f["precision"] == "bf16"), "share_of_limit")
    return Figure("share of the bf16 matrix rate", best and best["share_of_limit"], 0.4, 0.6, "%", _how(best))


def _against_compiled(rows: list[dict], flows: list[dict], ours: tuple[str, ...], theirs: str, wanted: float,
                      dream: float) -> Figure:
    """Events a second, each at the batch that suits it best."""
    timed = [r for r in rows if r["timing"] == "device"]
    own = [r for r in timed if not r["peer"] and r["passed"]] + [f for f in flows if f["where"] == "device"]
    best = _most((r for r in own if r["precision"] in ours), "events_per_s")
    peer = _most((r for r in timed if r["scorer"].startswith("torch-compile") and r["precision"] == theirs),
                 "events_per_s")
    ratio = best["events_per_s"] / peer["events_per_s"] if best and peer else None
    return Figure(f"against torch.compile in {theirs}", ratio, wanted, dream, "x",
                  f"{_how(best)}; {_how(peer)}" if ratio else "")


def _latency(rows: list[dict], timing: str, quantile: str, what: str, wanted: float, dream: float) -> Figure:
    """Of float32 accuracy where it is there: nothing is asked about speed that costs digits."""
    own = [r for r in rows if not r["peer"] and r["passed"] and r["batch"] == 1 and r["timing"] == timing
           and r[quantile] is not None]
    own = [r for r in own if r["precision"] in EXACT] or own
    best = min(own, key=lambda r: r[quantile], default=None)
    return Figure(what, best and best[quantile], wanted, dream, "us",
                  f"{best['scorer']} {best['precision']}" if best else "")


def _bus(flows: list[dict]) -> Figure:
    best = _most((f for f in flows if f["where"] == "host"), "share_of_bus")
    return Figure("host to host, share of the bus", best and best["share_of_bus"], 0.8, 0.95, "%", _how(best))


def _training(steps: list[dict]) -> list[Figure]:
    """Ours against the usual way, and against the fastest that PyTorch has, in the same mode."""
    best: dict[str, tuple[float, str]] = {}
    for ours in (s for s in steps if s["method"] == "fused" and s["passed"]):
        same = {s["method"]: s["step_us"] for s in steps if s["method"] != "fused"
                and (s["precision"], s["batch"]) == (ours["precision"], ours["batch"])}
        for name, other in (("double backward", same.get("double backward")),
                            ("the fastest of PyTorch", min(same.values(), default=None))):
            if other:
                ratio = other / ours["step_us"], f"{ours['precision']}, batch {ours['batch']}"
                best[name] = max(best.get(name, ratio), ratio)
    return [Figure(f"DSM step, against {name}", *best.get(name, (None, ""))[:1], 3.0, 6.0, "x",
                   best.get(name, (None, ""))[1]) for name in ("double backward", "the fastest of PyTorch")]


def _how(row: dict | None) -> str:
    return f"{row.get('kernel') or row['scorer']} {row['precision']}, batch {row['batch']}" if row else ""


def _most(rows: Iterable[dict], key: str) -> dict | None:
    return max((r for r in rows if r.get(key) is not None), key=lambda r: r[key], default=None)


def table(found: list[Figure]) -> str:
    """For people."""
    lines = [("", "measured", "wanted", "dream", "reached", "")]
    lines += [(f.what, *(_text(v, f.unit) for v in (f.value, f.wanted, f.dream)), f.verdict, f.how) for f in found]
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join("  ".join(cell.ljust(w) if i in (0, 4, 5) else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(line, widths))).rstrip() for line in lines)


def _text(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.0f}%" if unit == "%" else f"{value:.1f} us" if unit == "us" else f"{value:.2f}x"
