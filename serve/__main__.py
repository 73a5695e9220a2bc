"""`python -m serve MODEL`: answers at once, or says in one sentence why not."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ebm.command import one_sentence

try:
    import uvicorn

    from serve import logs
    from serve.app import create_app
    from serve.protocol import Connection
    from serve.security import new_key
    from serve.service import Service
    from serve.settings import load_settings
except ModuleNotFoundError as e:
    sys.exit(f"error: {e.name} is not installed: pip install 'fused-ebm[serve]'")

log = logging.getLogger("fused_ebm.serve")


class Server(uvicorn.Server):
    """uvicorn's, which is first not ready and then stops, and loads the model again on SIGHUP."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service, self._stop_at = service, float("inf")

    async def startup(self, sockets=None) -> None:
        self._reloads: set[asyncio.Task] = set()  # which the loop itself would forget
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
        sys.setswitchinterval(0.0005)  # a scored batch waits no 5 ms for a busy loop to take it
        gc.collect()
        gc.freeze()  # what is loaded stays: later collections need not look at it
        with _address(self.config.host, self.config.port):
            await super().startup(sockets)
        self._log_started_message(sockets)

    def handle_exit(self, sig: int, frame: object) -> None:
        """Answer on, not ready and closing connections, so that no request meets a closed port; again: stop now."""
        self._stop_at = 0 if self.service.draining else time.monotonic() + self.service.settings.linger_s
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        self.should_exit = self.should_exit or time.monotonic() >= self._stop_at
        return await super().on_tick(counter)

    def _reload(self) -> None:
        task = asyncio.ensure_future(self.service.reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)


@contextmanager
def _address(host: str, port: int) -> Iterator[None]:
    """RuntimeError with host and port where they cannot be had."""
    try:
        yield
    except OSError as e:
        raise RuntimeError(f"host {host}, port {port}: {e.strerror}") from None


def _bound(host: str, port: int) -> list[socket.socket]:
    """Sockets that have the addresses of a host, and do not listen yet. RuntimeError where they cannot be had."""
    sockets = []
    with _address(host, port):
        for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            sockets.append(s := socket.socket(family))
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            s.bind(address)
    return sockets


@one_sentence
def serve(
    model: Annotated[Path | None, typer.Argument(help="Directory that 'python -m ebm train' wrote, or an exported "
                                                 "file. Default: that of the settings.")] = None,
    host: Annotated[str | None, typer.Option(help="Default: 127.0.0.1. Other addresses need API keys.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: 8000.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings (serve/settings.py); the environment "
                                                "overrides it: FUSED_EBM_PORT=8080.")] = None,
    make_key: Annotated[bool, typer.Option("--new-key", help="Print a new API key and what api_keys needs.")] = False,
) -> None:
    """Serve a model over HTTP: /docs says how to ask. SIGHUP loads it again, SIGTERM stops without losing a reply."""
    if make_key:
        key, digest = new_key()
        print(f'for the client:    {key}\nfor the settings:  api_keys = ["{digest}"]')
        return
    settings = load_settings(config, model=model, host=host, port=port)
    sockets = _bound(settings.host, settings.port)  # before the model is loaded
    listener = logs.start(settings.log_level)
    try:
        try:
            service = Service(settings)
        except TypeError as e:
            raise ValueError(f"threads = {settings.threads} cannot be had of this backend: {e}") from None
        log.info("model %s (%s) on %s", settings.model, service.served.version[:12], service.served.scorer)
        Server(uvicorn.Config(
            create_app(service), settings.host, settings.port, http=functools.partial(Connection, service),
            loop="uvloop", ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_keep_alive=settings.keep_alive_s, timeout_graceful_shutdown=settings.drain_s,
        ), service).run(sockets)  # fmt: skip
    finally:
        gc.unfreeze()
        listener.stop()


def main() -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command(epilog="Example: python -m serve models/demo --port 8000")(serve)
    app(prog_name="python -m serve")


if __name__ == "__main__":
    main()
