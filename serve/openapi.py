"""What OpenAPI says of each route, written out: bodies are parsed here, not by FastAPI."""

from __future__ import annotations

from serve.parsing import BINARY, JSON

ABOUT = ("Scores collision events with an energy-based model. The energy is the anomaly score, high for unusual "
         "events; an event is flagged where it is above the calibrated threshold.")

_NUMBER, _TEXT = {"type": "number"}, {"type": "string"}
_REASONS = {
    400: "The body is no valid JSON", 401: "No valid API key", 411: "No Content-Length",
    413: "Too many bytes or events", 415: "Another media type, or compressed", 421: "Meant for another host",
    422: "An event that cannot be scored, by row and feature", 429: "Over capacity: try again in Retry-After seconds",
}


def of(n_features: int) -> dict[str, dict]:
    """Arguments of FastAPI's decorators for each route, for events of so many features."""
    event = {"type": "array", "items": {"type": ["number", "null"]}, "minItems": n_features, "maxItems": n_features,
             "description": "Features in the order of /api/v1/model, raw, in the model's units; null is missing."}
    raw = {"type": "string", "format": "binary"}
    attribution = {"type": "object", "additionalProperties": _NUMBER}
    health = _object(status=_TEXT, parts={"type": "object", "additionalProperties": _TEXT})
    return {
        "score": _route({JSON: _object(events={"type": "array", "items": event}), BINARY: raw},
                        {JSON: _object(scores={"type": "array", "items": _NUMBER},
                                       flags={"type": "array", "items": {"type": "boolean"}}), BINARY: raw}),
        "explain": _route({JSON: _object(event=event)},
                          {JSON: _object(score=_NUMBER, feature_attribution=attribution,
                                         object_attribution=attribution)}),
        "model": _route({}, {JSON: _object(
            model=_TEXT, version=_TEXT, n_features={"type": "integer"}, feature_names={"type": "array", "items": _TEXT},
            threshold=_NUMBER, rate=_NUMBER, backend=_TEXT, device=_TEXT, precision=_TEXT)}),
        "live": _route({}, {JSON: _object(status=_TEXT)}, is_open=True),
        "ready": _route({}, {JSON: health}, is_open=True, more={503: ("Stopping", {JSON: health})}),
        "metrics": _route({}, {"text/plain": _TEXT}),
    }


def _object(**properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _content(schemas: dict[str, dict]) -> dict:
    return {media_type: {"schema": schema} for media_type, schema in schemas.items()}


def _route(body: dict[str, dict], answer: dict[str, dict], *, is_open: bool = False,
           more: dict[int, tuple[str, dict]] | None = None) -> dict:
    refusal = {JSON: _object(detail=_TEXT)}
    statuses = (_REASONS if body else {s: _REASONS[s] for s in (() if is_open else (401, 421)) + (411, 413, 415, 429)})
    answers = {status: (reason, refusal) for status, reason in statuses.items()} | {200: ("Answered", answer)}
    responses = {s: {"description": why, "content": _content(c)} for s, (why, c) in (answers | (more or {})).items()}
    extra = {"requestBody": {"required": True, "content": _content(body)}} if body else {}
    return {"responses": responses, "openapi_extra": extra, "response_model": None}
