"""Events from the body of a request, strictly: what is not a number or null is refused, and never repeated."""

from __future__ import annotations

import re
from itertools import chain

import msgspec
import numpy as np

from serve.errors import Refused

JSON, BINARY = "application/json", "application/octet-stream"


class ScoreRequest(msgspec.Struct, forbid_unknown_fields=True):
    events: list[list[float | None]]


class ExplainRequest(msgspec.Struct, forbid_unknown_fields=True):
    event: list[float | None]


_score, _explain = msgspec.json.Decoder(ScoreRequest), msgspec.json.Decoder(ExplainRequest)


def content_type(headers: dict[bytes, bytes], *accepted: str) -> str:
    """The media type of the body, one of those accepted; else 415."""
    given, _, parameters = headers.get(b"content-type", b"").decode("latin-1").lower().partition(";")
    if given.strip() not in accepted or (parameters.strip() and parameters.strip().replace('"', "") != "charset=utf-8"):
        raise Refused(415, f"Content-Type must be {' or '.join(accepted)}")
    return given.strip()


def events_from_json(body: bytes, n_features: int, max_events: int) -> np.ndarray:
    """{"events": [[f1, ..., fD], ...]} -> (n, D) float32, null becoming NaN. Raises Refused (400, 413, 422)."""
    rows = _decode(_score, body).events
    if len(rows) > max_events:
        raise Refused(413, f"{len(rows)} events, expected at most {max_events}")
    for i, row in enumerate(rows):
        if len(row) != n_features:
            raise Refused(422, f"event {i} has {len(row)} features, expected {n_features}")
    return _to_float32(list(chain.from_iterable(rows))).reshape(len(rows), n_features)


def event_from_json(body: bytes, n_features: int) -> np.ndarray:
    """{"event": [f1, ..., fD]} -> (1, D) float32, null becoming NaN. Raises Refused (400, 422)."""
    row = _decode(_explain, body).event
    if len(row) != n_features:
        raise Refused(422, f"the event has {len(row)} features, expected {n_features}")
    return _to_float32(row).reshape(1, n_features)


def events_from_binary(body: bytes, n_features: int, max_events: int) -> np.ndarray:
    """Little-endian float32, event after event -> (n, D). Raises Refused (413, 422)."""
    n, rest = divmod(len(body), 4 * n_features)
    if rest:
        raise Refused(422, f"{len(body)} bytes are no whole number of events of {n_features} float32")
    if n > max_events:
        raise Refused(413, f"{n} events, expected at most {max_events}")
    return np.frombuffer(body, "<f4").reshape(n, n_features)


def _decode(decoder: msgspec.json.Decoder, body: bytes) -> msgspec.Struct:
    name = decoder.type.__struct_fields__[0]
    try:
        decoded = decoder.decode(body)
    except msgspec.ValidationError as e:
        raise Refused(422, _where(str(e), name)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused(400, "the body is no valid JSON") from None
    if body.count(b'"') != 2:  # the one name is the one string that a valid body has
        raise Refused(422, f"the name {name!r} is there twice")
    return decoded


def _where(message: str, name: str) -> str:
    """A sentence of our own, with nothing of the body but the place that msgspec names."""
    if place := re.search(r"`\$\.\w+((?:\[\d+\])+)`$", message):
        return f"{name}{place[1]} is not a finite number or null"
    return f'expected {{"{name}": [...]}} with numbers and null, and nothing else'


def _to_float32(values: list[float | None]) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large for float32 becomes Inf, which is then refused by name
        return np.array(values, np.float32)
