"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

LATENCY_EDGES = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1)
BATCH_EDGES = tuple(2**i for i in range(14))


class ScoreDistribution(Collector):
    """A histogram of energies with fixed edges, counted a batch at a time."""

    def __init__(self, edges: Sequence[float]):
        self.edges = np.empty(0)
        self.start(edges)

    def start(self, edges: Sequence[float]) -> None:
        """Begin again with other edges, rising; with the same ones go on."""
        if not np.array_equal(edges, self.edges):
            self.edges = np.asarray(edges, np.float64)
            self.counts, self.sum = np.zeros(len(edges) + 1, np.int64), 0.0

    def observe(self, energies: np.ndarray) -> None:
        """Count energies (n,), all of them finite."""
        self.counts += np.bincount(np.searchsorted(self.edges, energies), minlength=len(self.counts))
        self.sum += float(energies.sum(dtype=np.float64))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        names = [*(f"{edge:.12g}" for edge in self.edges), "+Inf"]
        cumulative = zip(names, self.counts.cumsum().tolist(), strict=True)
        yield HistogramMetricFamily("fused_ebm_score", "Energies of the events that were scored", list(cumulative),
                                    sum_value=self.sum)


class Metrics:
    """All metrics of one service, in a registry of their own."""

    def __init__(self, score_edges: Sequence[float]):
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        self.seconds = Histogram("fused_ebm_request_seconds", "From the headers of a request to its answer", ["path"],
                                 buckets=LATENCY_EDGES, registry=r)
        self.requests = Counter("fused_ebm_requests", "Answered requests", ["path", "status"], registry=r)
        self.rejected = Counter("fused_ebm_rejected", "Requests answered with 429", ["reason"], registry=r)
        self.events = Counter("fused_ebm_events", "Events scored by /api/v1/score", registry=r)
        self.flagged = Counter("fused_ebm_flagged", "Events above the threshold", registry=r)
        self.nonfinite = Counter("fused_ebm_nonfinite", "Requests refused for an event that cannot be scored",
                                 registry=r)
        self.batch = Histogram("fused_ebm_batch_events", "Events of one kernel call", buckets=BATCH_EDGES, registry=r)
        self.depth = Gauge("fused_ebm_queue_events", "Events that wait for their energies", registry=r)
        self.wait = Gauge("fused_ebm_queue_seconds", "Predicted wait of the next request", registry=r)
        self.cache = Counter("fused_ebm_cache", "Events looked up in the cache", ["result"], registry=r)
        self.model = Gauge("fused_ebm_model", "1 for the model that is served", ["version"], registry=r)
        self.swaps = Counter("fused_ebm_model_swaps", "Reloads of the model", ["result"], registry=r)
        self.scores = ScoreDistribution(score_edges)
        r.register(self.scores)
        for reason in ("queue", "deadline", "jobs"):
            self.rejected.labels(reason)
        for result in ("hit", "miss"):
            self.cache.labels(result)
        for result in ("done", "failed"):
            self.swaps.labels(result)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def refuse(self, reason: str) -> None:
        """Count a request that was answered with 429."""
        self.rejected.labels(reason).inc()

    def cached(self, events: int, unknown: int) -> None:
        """Count events that were looked up."""
        self.cache.labels("hit").inc(events - unknown)
        self.cache.labels("miss").inc(unknown)

    def scored(self, energies: np.ndarray, flags: np.ndarray) -> None:
        """Count the energies and flags (n,) of one answer."""
        self.events.inc(len(energies))
        self.flagged.inc(int(np.count_nonzero(flags)))
        self.scores.observe(energies)

    def count(self, name: str) -> float:
        """A counter without labels."""
        return self.registry.get_sample_value(f"fused_ebm_{name}_total")

    def seconds_within(self, path: str, q: float) -> float | None:
        """The upper edge of the bucket that has the quantile q of the times of a path; None without requests."""
        counts = [s.value for family in self.seconds.collect() for s in family.samples
                  if s.name.endswith("_bucket") and s.labels["path"] == path]
        if not counts or not counts[-1]:
            return None
        return (*LATENCY_EDGES, float("inf"))[int(np.searchsorted(counts, q * counts[-1]))]

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
