"""The one way in which a request is refused."""

from __future__ import annotations

from typing import ClassVar


class Refused(Exception):
    """A request that is answered with a status of 4xx and a sentence that never repeats what was sent."""

    headers: ClassVar[dict[str, str]] = {}

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Busy(Refused):
    """429: more than the service can answer in time; `reason` is what it is counted under."""

    headers: ClassVar[dict[str, str]] = {"retry-after": "1"}

    def __init__(self, reason: str, message: str):
        super().__init__(429, message)
        self.reason = reason
