"""The page at /: what is served and how it fares, for a person."""

from __future__ import annotations

import time
from html import escape

from serve.service import Service

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5"><title>fused-ebm: {model}</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; margin: 3em auto; max-width: 44em; padding: 0 1em }}
th {{ text-align: left; font-weight: normal; padding-right: 2em; color: #555 }} td {{ overflow-wrap: anywhere }}
</style></head><body><h1>{model}</h1><table>{rows}</table>
<p><a href="/docs">Interface</a> &middot; <a href="/metrics">Metrics</a></p></body></html>
"""


def page(service: Service) -> str:
    """HTML, without scripts; all of it since the service was started."""
    m, about = service.metrics, service.served.describe()
    events, flagged = m.count("events"), m.count("flagged")
    half, most = (_ms(m.seconds_within("/api/v1/score", q)) for q in (0.5, 0.99))
    rows = {
        "state": "stopping" if service.draining else "ready",
        "version": about["version"],
        "features": about["n_features"],
        "threshold": f"{about['threshold']:.6g} (background rate {about['rate']:.3g})",
        "runs on": f"{about['backend']}, {about['device']}, {about['precision']}",
        "up for": f"{(time.time() - service.started) / 3600:.1f} h",
        "events scored": f"{events:,.0f}",
        "flag rate": f"{flagged / events:.3g} ({flagged:,.0f} events)" if events else "no events yet",
        "latency of /api/v1/score": f"half within {half}, 99% within {most}",
        "events waiting": service.batcher.events,
    }
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return _PAGE.format(model=escape(str(about["model"])), rows=table)


def _ms(seconds: float | None) -> str:
    return "no requests yet" if seconds is None else "more than 100 ms" if seconds > 1 else f"{seconds * 1e3:g} ms"
