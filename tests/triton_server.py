"""A real Triton Inference Server on this machine, from the environment that `make triton-server` makes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".triton-server"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PACKAGES = ENVIRONMENT / "lib" / f"python{PYTHON}" / "site-packages"
TRITON = PACKAGES / "pytriton" / "tritonserver"
STUB = TRITON / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"


def why_not() -> str | None:
    """The reason why no server can start here, or None; then `tritonclient` can be imported."""
    if not (PACKAGES / "safetensors").is_dir():
        return "Triton Inference Server is not there: run 'make triton-server'"
    if not STUB.exists():
        return f"nvidia-pytriton has no Python backend for Python {PYTHON}"
    sys.path.append(str(PACKAGES))  # last: what both environments have comes from this one
    return None


@dataclass(frozen=True)
class Server:
    """Addresses of a server that is ready, and the file that it logs to."""

    http: str
    grpc: str
    log: Path


@contextmanager
def serve(repository: Path, *options: str) -> Iterator[Server]:
    """Serve a model repository on free ports of 127.0.0.1 until the block ends; `options` go to tritonserver.

    Raises RuntimeError with the server's log where it is not ready within a minute.
    """
    with tempfile.TemporaryDirectory() as folder:
        backend = Path(folder, "backends", "python")
        backend.mkdir(parents=True)
        for file in (STUB, *(TRITON / "backends" / "python").glob("*.*")):
            (backend / file.name).symlink_to(file)
        http, grpc = _free_ports(2)
        log = Path(folder, "log")
        # Without completing configurations by itself: ours are complete.
        command = [
            TRITON / "bin" / "tritonserver", "--model-repository", repository, "--backend-directory", backend.parent,
            "--http-address", "127.0.0.1", "--http-port", str(http), "--grpc-address", "127.0.0.1",
            "--grpc-port", str(grpc), "--allow-metrics", "false", "--disable-auto-complete-config",
            "--exit-timeout-secs", "5", *options,
        ]
        environment = os.environ | {
            "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",  # where the backend looks for its Python
            "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{PACKAGES / 'nvidia_pytriton.libs'}",
            "PYTHONPATH": str(ROOT),
        }
        with open(log, "wb") as f:
            process = subprocess.Popen(command, env=environment, stdout=f, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, http, log)
            yield Server(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen, port: int, log: Path) -> None:
    from tritonclient.http import InferenceServerClient

    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        with socket.socket() as s:
            listening = s.connect_ex(("127.0.0.1", port)) == 0
        if listening and InferenceServerClient(f"127.0.0.1:{port}").is_server_ready():
            return
        time.sleep(0.05)
    raise RuntimeError(f"the server is not ready:\n{log.read_text()}")


def _free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
