"""Logs as one JSON object a line, written by a thread of their own: a full pipe holds up no request."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message, what came in extra={"request": {...}}, and a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{moment}.{int(record.msecs):03}Z", "level": record.levelname.lower(), "logger": record.name,
                "message": record.getMessage(), **getattr(record, "request", {})}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Handler(QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # it stays in this process

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(Full):  # nobody reads: requests go on, and lines are lost
            self.queue.put_nowait(record)


def start(level: str) -> QueueListener:
    """Send everything that is logged to stderr; the caller stops the listener at the end."""
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(JsonFormatter())
    queue: Queue = Queue(10_000)
    listener = QueueListener(queue, output)
    root = logging.getLogger()
    root.handlers[:] = [_Handler(queue)]
    root.setLevel(level.upper())
    listener.start()
    return listener
