"""Real servers for the service: PostgreSQL and Redis from Debian's packages, and the protocol of S3 from moto."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


class Server:
    """A process that answers on a port of 127.0.0.1; it can be killed and started again."""

    def __init__(self, command: list[str | Path], port: int, is_ready: list[str | Path] | None = None,
                 **options: object) -> None:
        self.command, self.port, self.is_ready, self.options = command, port, is_ready, options
        self.start()

    def start(self) -> None:
        """Start it, and wait until the port is open and the command `is_ready`, if there is one, says so too."""
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        start_new_session=True, **self.options)
        until = time.monotonic() + 30
        while time.monotonic() < until and self.process.poll() is None:
            with socket.socket() as s:
                is_open = s.connect_ex(("127.0.0.1", self.port)) == 0
            if is_open and not (self.is_ready and subprocess.run(self.is_ready, capture_output=True).returncode):
                return
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"{self.command[0]} does not answer on port {self.port}")

    def kill(self) -> None:
        """As the kernel does when there is no memory left: with all processes that it started."""
        pid = self.process.pid
        with contextlib.suppress(OSError):  # PostgreSQL gives its children sessions of their own
            for process in (pid, *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
                os.kill(int(process), 9)
        self.process.wait()


def postgresql_why_not() -> str | None:
    return None if _postgresql() else "PostgreSQL is not installed: apt-get install postgresql"


def redis_why_not() -> str | None:
    return None if shutil.which("redis-server") else "Redis is not installed: apt-get install redis-server"


def s3_why_not() -> str | None:
    return None if find_spec("moto") else "moto is not installed: pip install 'moto[server]'"


@contextlib.contextmanager
def postgresql() -> Iterator[tuple[Server, str]]:
    """A cluster of its own, and the address of an empty database in it. It does not run as root: postgres does."""
    who = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        if who:
            shutil.chown(folder, "postgres", "postgres")
        data, port, bin_ = Path(folder, "data"), free_port(), _postgresql()
        subprocess.run([bin_ / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"], check=True,
                       capture_output=True, cwd=folder, **who)
        server = Server([bin_ / "postgres", "-D", data, "-p", str(port), "-k", folder, "-h", "127.0.0.1"],
                        port, [bin_ / "pg_isready", "-h", "127.0.0.1", "-p", str(port)], cwd=folder, **who)
        try:
            yield server, f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            server.kill()
            time.sleep(0.1)  # for its children, which write until they see that it is gone


def new_database(url: str) -> str:
    """The address of an empty database on the server of `url`."""
    import psycopg

    name = f"test{os.urandom(4).hex()}"
    with psycopg.connect(url, autocommit=True) as c:
        c.execute(f"CREATE DATABASE {name}")
    return f"{url.rpartition('/')[0]}/{name}"


@contextlib.contextmanager
def redis() -> Iterator[tuple[Server, str]]:
    port = free_port()
    server = Server(["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", "/"], port)
    try:
        yield server, f"redis://127.0.0.1:{port}/0"
    finally:
        server.kill()


@contextlib.contextmanager
def s3() -> Iterator[tuple[Server, str]]:
    """moto, in a process of its own, and its address; any credentials are good."""
    port = free_port()
    server = Server([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port)
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def _postgresql() -> Path | None:
    """Debian keeps the server's programs out of PATH."""
    there = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    found = str(there[-1]) if there else shutil.which("postgres")
    return Path(found).parent if found else None
