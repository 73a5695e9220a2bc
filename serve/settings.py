"""What the service can be told: a TOML file, and over it the environment (FUSED_EBM_PORT=8080)."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from ebm.events import DataError

PREFIX = "FUSED_EBM_"

Bucket = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")]
S3Url = Annotated[str, StringConstraints(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w./-]*)?$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """All settings and their defaults, which need no other server: SQLite, local files, no cache.

    Raises pydantic.ValidationError (a ValueError) on an unknown name or a value of the wrong kind, and where the
    service would be open to other machines without API keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    model: Path
    """A model directory, or an exported file."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: tuple[Sha256, ...] = ()
    """SHA-256 of each key, in hexadecimal; without keys the service answers on the loopback interface only."""
    backend: str = "auto"
    threads: Positive | None = None
    """Of the scoring kernel; by default the processors that this process may use."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """"debug" logs every request, "info" those that were answered with an error (429 excepted: it is counted)."""
    score_edges: tuple[float, ...] = ()
    """Upper edges of the bins of the score distribution, rising; by default quantiles of the model's background."""

    # Limits of one request, and of those that wait.
    max_body_bytes: Positive = 4 * 2**20
    max_events: Positive = 10_000
    wait_ms: Annotated[float, Field(ge=0, le=100)] = 0.2
    """How long a request may wait for others that share its kernel call."""
    queue_ms: Annotated[float, Field(gt=0, le=1000)] = 3
    """A request that would wait longer for others, by the speed that is measured, gets 429; one is always admitted."""
    deadline_s: Seconds = 1.0
    """From the headers of a request to its score; 429 is answered beyond it."""
    linger_s: Annotated[float, Field(ge=0, le=300)] = 0.5
    """A stopping service goes on answering for so long, not ready, and asks its clients to go elsewhere."""
    drain_s: Positive = 5
    """How long it may take after that to answer what it has admitted."""
    keep_alive_s: Seconds = 15.0
    """From a connection or a reply to the last header of the next request; a reply must be read in it, too."""
    max_connections: Positive = 1024

    # The parts.
    database_url: str = "sqlite:///fused-ebm.sqlite"
    """Models, jobs and scored files; postgresql:// for PostgreSQL."""
    cache_url: str | None = None
    """None (off), memory:// (in this process) or redis://host:port/number."""
    cache_entries: Positive = 100_000
    data_root: Path | None = None
    """The only directory that jobs read local files from; None: no local files."""
    results_root: Path = Path("results")
    """The only directory that jobs write local files to."""
    s3_endpoint: str | None = None
    s3_region: str | None = None
    s3_read_buckets: tuple[Bucket, ...] = ()
    """The only buckets that jobs read from; credentials come from the usual AWS places."""
    s3_results: S3Url | None = None
    """Where results go instead of results_root: s3://bucket/prefix."""
    chunk_events: Positive = 100_000
    """Events of a batch job that are scored, written and remembered at a time."""
    max_jobs: Positive = 2
    """Batch jobs that run at the same time."""
    max_waiting_jobs: Positive = 100
    """Jobs that wait; above 429 is answered."""
    max_file_bytes: Positive = 100 * 2**30

    @model_validator(mode="after")
    def _safe(self) -> Settings:
        if not self.api_keys and not is_loopback(self.host):
            raise ValueError(f"host is {self.host}, which other machines reach: set api_keys ('python -m serve "
                             "--new-key' makes one), or listen on 127.0.0.1")
        if list(self.score_edges) != sorted(set(self.score_edges)):
            raise ValueError("score_edges must rise")
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; "localhost" does, other names are not looked up."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings(config: Path | None = None, environ: Mapping[str, str] = os.environ, **given: object) -> Settings:
    """The settings given, else those of the environment, else those of the file, else the defaults.

    A list is written as JSON in the environment (FUSED_EBM_API_KEYS='["9f86..."]'). Raises DataError that names each
    setting that is wrong, never its value.
    """
    source = str(config) if config else "the settings"
    try:
        values = tomllib.loads(config.read_text()) if config else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{config}: no TOML file: {e}") from None
    try:
        for name, field in Settings.model_fields.items():
            if (text := environ.get(PREFIX + name.upper())) is not None:
                is_list = isinstance(field.default, tuple)
                values[name] = TypeAdapter(tuple).validate_json(text) if is_list else text
        return Settings(**values | {name: value for name, value in given.items() if value is not None})
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}".removeprefix(": Value error, ")
                          for error in e.errors(include_input=False, include_url=False))
        raise DataError(f"{source}: {wrong}") from None

