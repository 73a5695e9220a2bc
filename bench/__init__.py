"""Latency and throughput of every Scorer beside its peers, measured in one run."""
