"""Who may ask: API keys, of which only digests are kept."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar
from urllib.parse import urlsplit

from serve.errors import Refused
from serve.settings import is_loopback

HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"), (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
POLICY = (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
DOCS_POLICY = (b"content-security-policy", b"default-src 'self'; script-src 'self' 'unsafe-inline'; "
               b"style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'")


class Unknown(Refused):
    """401."""

    headers: ClassVar[dict[str, str]] = {"www-authenticate": 'Bearer, Basic realm="fused-ebm"'}

    def __init__(self) -> None:
        super().__init__(401, "send an API key as Authorization: Bearer KEY, or as the password of Basic")


def new_key() -> tuple[str, str]:
    """A key for a client, and its SHA-256 for `api_keys`. 256 random bits need no slow hash."""
    key = secrets.token_urlsafe(32)
    return key, hashlib.sha256(key.encode()).hexdigest()


def check_key(headers: dict[bytes, bytes], digests: Sequence[str]) -> None:
    """Raises Refused (401) unless the request has one of the keys; without keys, unless it was meant for this machine.

    The latter keeps out a page in this machine's browser whose name was made to point here (421).
    """
    if not digests:
        if not _is_meant_for_us(headers.get(b"host", b"localhost")):
            raise Refused(421, "without API keys the service answers to localhost only")
        return
    given = hashlib.sha256(_key(headers.get(b"authorization", b""))).hexdigest()
    if not sum(hmac.compare_digest(given, digest) for digest in digests):  # a sum looks at all of them
        raise Unknown


@lru_cache(64)
def _is_meant_for_us(host: bytes) -> bool:
    try:
        return is_loopback(urlsplit("//" + host.decode("latin-1")).hostname or "")
    except ValueError:
        return False


def _key(authorization: bytes) -> bytes:
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            pass
    return b""
