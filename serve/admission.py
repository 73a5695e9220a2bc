"""Which requests are answered, of more than can be: those that wait for others no longer than a limit."""

from __future__ import annotations

from serve.parsing import BINARY

SCORE, EXPLAIN = QUEUED = ("/api/v1/score", "/api/v1/explain")
REQUEST_S = 200e-6  # of the event loop for a request, whatever it asks: measured under load, as are the next two
BINARY_S, JSON_S = 1e-9, 6e-9  # for each byte that is read and parsed
EVENT_S = 1e-6  # of the kernel for each event, until it is measured
MEMORY = 0.99  # what a kernel call leaves of the weight of those before it: one that was held up counts little

_BINARY = BINARY.encode()


class Queue:
    """The time that what was admitted will take, by what is known of requests when their head is there.

    A request that comes is admitted if that is at most `limit` seconds; so one of any size is if nothing waits.
    """

    def __init__(self, limit: float, n_features: int):
        self.seconds = 0.0
        self._limit, self._n_features = limit, n_features
        self._events, self._event_s = 1.0, EVENT_S

    @property
    def is_full(self) -> bool:
        return self.seconds > self._limit

    def enter(self, headers: dict[bytes, bytes]) -> float | None:
        """The seconds by which the request with these headers makes others wait; None where it may not enter."""
        if self.is_full:
            return None
        size, is_binary = int(headers.get(b"content-length", 0)), headers.get(b"content-type") == _BINARY
        events = size / (self._n_features * (4 if is_binary else 8))
        seconds = REQUEST_S + size * (BINARY_S if is_binary else JSON_S) + events * self._event_s / self._events
        self.seconds += seconds
        return seconds

    def leave(self, seconds: float) -> None:
        """A request that entered is over, however it ended."""
        self.seconds -= seconds

    def learn(self, events: int, seconds: float) -> None:
        """A kernel call took so long."""
        self._events = MEMORY * self._events + events
        self._event_s = MEMORY * self._event_s + seconds
