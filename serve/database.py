"""What the service remembers: models, jobs and the files that came of them, in SQLite or PostgreSQL.

Whether a job waits, runs, failed or was cancelled is known to dbos alone, whose tables are in the same database.
"""

from __future__ import annotations

import hashlib
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa

from ebm.bundle import Bundle

FILES = ("model.json", "model.safetensors")

_tables = sa.MetaData()


def _created() -> sa.Column:
    return sa.Column("created", sa.DateTime(timezone=True), nullable=False, default=lambda: datetime.now(UTC))


models = sa.Table(
    "models", _tables,
    sa.Column("model_id", sa.String(64), primary_key=True),  # SHA-256 of both files
    sa.Column("digest", sa.String(64), nullable=False, index=True),
    sa.Column("description", sa.LargeBinary, nullable=False),  # model.json
    sa.Column("weights", sa.LargeBinary, nullable=False),  # model.safetensors
    _created(),
)  # fmt: skip
jobs = sa.Table(
    "jobs", _tables,
    sa.Column("job_id", sa.String(32), primary_key=True),
    sa.Column("model_id", sa.ForeignKey("models.model_id"), nullable=False),
    sa.Column("events_file", sa.Text, nullable=False),
    sa.Column("stamp", sa.Text, nullable=False),  # of that file, when the job was submitted
    sa.Column("events", sa.BigInteger, nullable=False, default=0),  # scored and on disk
    sa.Column("events_in_file", sa.BigInteger),
    _created(),
)  # fmt: skip
scored_files = sa.Table(
    "scored_files", _tables,
    sa.Column("job_id", sa.ForeignKey("jobs.job_id"), primary_key=True),
    sa.Column("results_file", sa.Text, nullable=False, unique=True),
    sa.Column("model_digest", sa.String(64), nullable=False, index=True),
    sa.Column("events", sa.BigInteger, nullable=False),
    sa.Column("flagged", sa.BigInteger),
    _created(),
)  # fmt: skip


class Database:
    """An address such as sqlite:///file or postgresql://user@host/name, else ValueError; nothing is connected before
    it is used. Where the database cannot be reached methods raise sqlalchemy.exc.OperationalError, within seconds.
    """

    def __init__(self, url: str) -> None:
        try:
            address = sa.make_url(url)
        except sa.exc.ArgumentError:
            address = None
        in_memory = address is not None and address.database in (None, "", ":memory:")
        if address is None or in_memory or address.drivername not in ("sqlite", "postgresql"):
            raise ValueError("database_url: expected sqlite:///FILE or postgresql://USER@HOST/NAME")  # it has passwords
        options: dict = {"pool_timeout": 3}
        if address.drivername == "postgresql":
            address = address.set(drivername="postgresql+psycopg")
            options |= {"pool_pre_ping": True, "connect_args": {
                "connect_timeout": 2, "keepalives_idle": 5, "tcp_user_timeout": 5000,
                "options": "-c statement_timeout=30000 -c idle_in_transaction_session_timeout=60000"}}
        self.engine = sa.create_engine(address, **options)
        if self.engine.dialect.name == "sqlite":
            sa.event.listen(self.engine, "connect", _set_up_sqlite)

    def why_not(self) -> str | None:
        """The reason why the database cannot be used, or None; takes 2 s at most where its machine does not answer."""
        try:
            with self.engine.connect() as c:
                c.execute(sa.text("SELECT 1"))
        except sa.exc.SQLAlchemyError as e:
            return f"the database cannot be reached ({type(e).__name__})"  # its message may hold addresses and names
        return None

    def create_tables(self) -> None:
        """Make the tables that are not there; for two processes at once, too."""
        with self.engine.begin() as c:
            if c.dialect.name == "postgresql":
                c.execute(sa.text("SELECT pg_advisory_xact_lock(8364732)"))
            else:
                c.exec_driver_sql("BEGIN IMMEDIATE")
            _tables.create_all(c)

    def add_model(self, c: sa.Connection, bundle: Bundle) -> str:
        """Keep all of a model, so that its jobs can be scored with it on any machine and after any swap; its id."""
        with tempfile.TemporaryDirectory() as folder:
            bundle.save(Path(folder, "model"))
            description, weights = (Path(folder, "model", name).read_bytes() for name in FILES)
        model_id = hashlib.sha256(hashlib.sha256(description).digest() + weights).hexdigest()
        self._upsert(c, models, {"model_id": model_id}, digest=bundle.digest, description=description, weights=weights)
        return model_id

    def model_of(self, job_id: str) -> Bundle:
        """The model that a job was submitted with."""
        with self.engine.connect() as c:
            row = c.execute(sa.select(models).join(jobs).where(jobs.c.job_id == job_id)).one()
        with tempfile.TemporaryDirectory() as folder:
            for name, content in zip(FILES, (row.description, row.weights), strict=True):
                Path(folder, name).write_bytes(content)
            return Bundle.load(folder)

    def add_job(self, c: sa.Connection, job_id: str, model_id: str, events_file: str, stamp: str) -> None:
        c.execute(jobs.insert().values(job_id=job_id, model_id=model_id, events_file=events_file, stamp=stamp))

    def job(self, job_id: str) -> sa.Row | None:
        """The row of a job, and `results_file` where there is one; None where there is no such job."""
        query = sa.select(jobs, scored_files.c.results_file).outerjoin(scored_files).where(jobs.c.job_id == job_id)
        with self.engine.connect() as c:
            return c.execute(query).one_or_none()

    def progress(self, job_id: str, events: int, events_in_file: int | None) -> None:
        with self.engine.begin() as c:
            c.execute(jobs.update().where(jobs.c.job_id == job_id).values(events=events, events_in_file=events_in_file))

    def add_scored_file(self, job_id: str, results_file: str, model_digest: str, events: int,
                        flagged: int | None) -> None:
        with self.engine.begin() as c:
            self._upsert(c, scored_files, {"job_id": job_id}, results_file=results_file, model_digest=model_digest,
                         events=events, flagged=flagged)

    def _upsert(self, c: sa.Connection, table: sa.Table, key: dict, **values: object) -> None:
        """Insert a row unless it is there: the same work, done again after a crash, leaves the same row."""
        insert = sa.dialects.sqlite.insert if c.dialect.name == "sqlite" else sa.dialects.postgresql.insert
        c.execute(insert(table).values(**key, **values).on_conflict_do_nothing(index_elements=list(key)))


def _set_up_sqlite(connection, _record) -> None:
    connection.isolation_level = "IMMEDIATE"  # a writer waits for the lock when it begins, and cannot fail later
    connection.execute("PRAGMA busy_timeout=30000")
    connection.execute("PRAGMA journal_mode=WAL")  # who reads does not wait for who writes
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
