"""What is malformed gets a 4xx in no time, repeats nothing, leaves nothing behind, and never stops the service."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from bench.machine import ROOT
from bench.serving import Connection, Process, Reply, request, serving
from ebm.events import load_events

DEMO = ROOT / "models" / "demo"
D = 64
JSON, BINARY = "application/json", "application/octet-stream"
SECRET = b"54321987"  # a value in the corpus, that no answer may repeat


@pytest.fixture(scope="module")
def process():
    with serving(DEMO, threads=1, deadline_s=0.5, keep_alive_s=1, queue_ms=1000) as process:
        yield process


@pytest.fixture(scope="module")
def event() -> str:
    row = load_events("toy:1").x[0]
    return ", ".join("null" if np.isnan(v) else SECRET.decode() if j == 0 else str(v) for j, v in enumerate(row))


def ask(process: Process, *requests: bytes) -> list[Reply]:
    async def all_of_them() -> list[Reply]:
        replies, connection = [], await Connection.open(process.port)
        for r in requests:
            connection = connection if connection.is_open else await Connection.open(process.port)
            replies.append(await asyncio.wait_for(connection.ask(r), 5))
        connection.close()
        return replies

    return asyncio.run(all_of_them())


def with_first(event: str, value: str) -> str:
    return ", ".join([value, *event.split(", ")[1:]])


def corpus(event: str) -> dict[str, tuple[int, bytes]]:
    """The status expected of each malformed request to /api/v1/score."""
    def of(text: str | bytes, status: int = 422, content_type: str = JSON) -> tuple[int, bytes]:
        body = text if isinstance(text, bytes) else text.encode()
        return status, request("/api/v1/score", body, content_type)

    def value(v: str, status: int = 422) -> tuple[int, bytes]:
        return of('{"events": [[%s], [%s]]}' % (event, with_first(event, v)), status)  # noqa: UP031

    good = '{"events": [[%s]]}' % event  # noqa: UP031
    row = np.zeros((1, D), "<f4")
    compressed = gzip.compress(b" " * 50_000_000)
    head = f"POST /api/v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\n"
    return {
        "NaN": value("NaN", 400), "Infinity": value("Infinity", 400), "-Infinity": value("-Infinity", 400),
        "1e400": value("1e400"), "-1e400": value("-1e400"), "10**400": value("1" + "0" * 400), "1e39": value("1e39"),
        "string": value('"1.5"'), "empty string": value('""'), "true": value("true"), "object": value("{}"),
        "list": value("[1]"), "hexadecimal": value("0x10", 400), "leading zero": value("01", 400),
        "plus": value("+1", 400), "dot": value(".5", 400), "comma": value("1,,2", 400), "lone": value("-", 400),
        "63 features": of('{"events": [[%s]]}' % event.split(", ", 1)[1]),  # noqa: UP031
        "65 features": of('{"events": [[%s, 1]]}' % event), "no features": of('{"events": [[]]}'),  # noqa: UP031
        "first row alone right": of('{"events": [[%s], [1]]}' % event),  # noqa: UP031
        "depth 1e5": of('{"events": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        "depth 1e5 of objects": of('{"a":' * 100_000 + "1" + "}" * 100_000),
        "lone surrogate": of('{"events": [["\\ud800"]]}', 400), "lone surrogate as a name": of('{"\\udfff": 1}', 400),
        "surrogate in UTF-8": of(b'{"events": ["\xed\xa0\x80"]}'), "no UTF-8": of(b"\xff\xfe{", 400),
        "UTF-16": of(good.encode("utf-16"), 400), "byte order mark": of(b"\xef\xbb\xbf" + good.encode(), 400),
        "twice the same name": of('{"events": [], "events": [[%s]]}' % event),  # noqa: UP031
        "unknown name": of('{"events": [], "threshold": 0}'), "other name": of('{"event": []}'),
        "not an object": of("[]"), "null": of("null"), "null events": of('{"events": null}'),
        "null row": of('{"events": [null]}'), "number": of("12"), "text": of('"x"'), "empty": of("", 400),
        "blank": of("  ", 400), "truncated": of(good[:-5], 400), "trailing": of(good + "x", 400),
        "comment": of("/* */" + good, 400), "single quotes": of("{'events': []}", 400), "zeros": of(b"\0" * 9, 400),
        "no content type": (415, head.partition("Content-Type")[0].encode() + b"Content-Length: 2\r\n\r\n{}"),
        "text/plain": of(good, 415, "text/plain"), "multipart": of(good, 415, "multipart/form-data; boundary=x"),
        "other charset": of(good, 415, "application/json; charset=utf-16"), "binary as JSON": of(row.tobytes(), 400),
        "JSON as binary": of(good[:-1] if len(good) % 256 == 0 else good, 422, BINARY),
        "gzip bomb": (415, head.encode() + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(compressed)
                      + compressed),
        "gzip without a word": of(compressed, 400),
        "half an event": of(row.tobytes()[:-1], 422, BINARY), "binary NaN": of((row * np.nan).tobytes(), 422, BINARY),
        "binary Inf": of((row + np.float32(np.inf)).tobytes(), 422, BINARY),
        "too many events": of(np.zeros((10_001, D), "<f4").tobytes(), 413, BINARY),
        "too many bytes": of(b" " * (4 * 2**20 + 1), 413),
        "a size that is a lie": (413, head.encode() + b"Content-Length: 99999999999\r\n\r\n"),
        "chunks": (411, head.encode() + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        "two sizes": (400, head.encode() + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
        "size and chunks": (400, head.encode() + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}"),
        "negative size": (400, head.encode() + b"Content-Length: -1\r\n\r\n"),
        "huge size": (400, head.encode() + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"),
        "no HTTP": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
        "GET": (405, b"GET /api/v1/score HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        "other host": (421, head.replace("localhost", "evil.example").encode() + b"Content-Length: 2\r\n\r\n{}"),
        "path that climbs": (404, b"GET /static-offline-docs/../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    }  # fmt: skip


def test_each_of_the_corpus_gets_its_status_at_once_and_hears_nothing_of_itself(process, event):
    wrong = {}
    for name, (status, r) in corpus(event).items():
        start = time.perf_counter()
        (reply,) = ask(process, r)
        seconds = time.perf_counter() - start
        if reply.status != status or seconds > 1 or SECRET in reply.body or b"Traceback" in reply.body:
            wrong[name] = (reply.status, status, seconds, reply.body[:200])
    assert not wrong
    assert SECRET.decode() not in process.log.read_text()


@pytest.mark.parametrize(("value", "word"), [("1e39", "inf"), ("-1e39", "-inf")])
def test_a_value_beyond_float32_is_named_by_row_and_feature(process, event, value, word):
    body = '{"events": [[%s], [%s]]}' % (event, with_first(event, value))  # noqa: UP031
    (reply,) = ask(process, request("/api/v1/score", body.encode()))
    assert reply.status == 422
    detail = json.loads(reply.body)["detail"]
    assert detail == f"event 1: feature 0 (obj0_E) is {word}, expected a finite number"


def test_a_missing_value_that_may_not_be_missing_is_named_and_counted(process):
    x = np.zeros((3, D), "<f4")
    x[2, 40] = np.nan
    before = process.metric("fused_ebm_nonfinite_total")
    binary, as_json, explained = ask(
        process, request("/api/v1/score", x.tobytes(), BINARY),
        request("/api/v1/score", json.dumps({"events": [[0] * D, [0] * D, [0] * 40 + [None] + [0] * 23]}).encode()),
        request("/api/v1/explain", json.dumps({"event": [0] * 40 + [None] + [0] * 23}).encode()))
    assert [binary.status, as_json.status, explained.status] == [422] * 3
    assert "event 2: feature 40 (MET)" in binary.body.decode()
    assert binary.body == as_json.body
    assert "feature 40 (MET)" in explained.body.decode()
    assert process.metric("fused_ebm_nonfinite_total") == before + 3


def test_a_bad_event_fails_its_own_request_alone(process, event):
    good, bad = (request("/api/v1/score", ('{"events": [[%s]]}' % e).encode())  # noqa: UP031
                 for e in (event, with_first(event, "1e39")))

    async def together() -> list[int]:
        connections = [await Connection.open(process.port) for _ in range(20)]
        replies = await asyncio.gather(*(c.ask(bad if i % 3 == 0 else good) for i, c in enumerate(connections)))
        return [r.status for r in replies]

    assert asyncio.run(together()) == [422 if i % 3 == 0 else 200 for i in range(20)]


def test_a_body_that_does_not_come_is_given_up_at_the_deadline(process):
    start = time.perf_counter()
    (reply,) = ask(process, request("/api/v1/score", b"x" * 1000)[:-500])
    assert (reply.status, reply.header("retry-after")) == (429, "1")
    assert 0.4 < time.perf_counter() - start < 2


@pytest.mark.parametrize("sent", [b"", b"POST /api/v1/score HT", b"GET / HTTP/1.1\r\nA: " + b"b" * 200_000])
def test_a_head_that_does_not_end_is_given_up(process, sent):
    async def wait_for_the_end() -> float:
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
        writer.write(sent)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        return time.perf_counter() - start

    assert asyncio.run(wait_for_the_end()) < 3


def test_a_client_that_does_not_read_is_given_up(process):
    get, n = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 2000

    async def read_late() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port, limit=2**12)
        writer.write(get * n)
        await asyncio.sleep(4)
        replies = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while part := await asyncio.wait_for(reader.read(2**16), 5):
                replies += part
        writer.close()
        return replies

    assert 0 < asyncio.run(read_late()).count(b"HTTP/1.1 200 OK") < n


@pytest.mark.parametrize("n", [2000, pytest.param(100_000, marks=pytest.mark.full)])
def test_mutations_of_requests_never_fail_the_service_nor_make_it_grow(process, event, n):
    """Requests of the corpus and a good one, with bytes replaced, removed, repeated and swapped."""
    rng = random.Random(0)
    bodies = [r.partition(b"\r\n\r\n")[2] for _, r in corpus(event).values() if len(r) < 10_000]
    bodies.append(('{"events": [[%s]]}' % event).encode())  # noqa: UP031

    def mutated() -> bytes:
        body = bytearray(rng.choice(bodies))
        for _ in range(rng.randrange(4)):
            i, j = sorted(rng.randrange(len(body) + 1) for _ in range(2))
            part = body[i : min(j, i + 40)]
            body[i : i + len(part)] = rng.choice([b"", part * 3, rng.randbytes(len(part)), b"null", b'"', b"1e999"])
        path = rng.choice(["/api/v1/score", "/api/v1/score", "/api/v1/explain"])
        return request(path, bytes(body), rng.choice([JSON, JSON, BINARY]))

    async def send_all() -> tuple[list[int], float]:
        connection, statuses, slowest = await Connection.open(process.port), [], 0.0
        for _ in range(n):
            connection = connection if connection.is_open else await Connection.open(process.port)
            start = time.perf_counter()
            reply = await asyncio.wait_for(connection.ask(mutated()), 5)
            slowest = max(slowest, time.perf_counter() - start)
            statuses.append(reply.status)
        connection.close()
        return statuses, slowest

    ask(process, *(mutated() for _ in range(200)))
    before = process.rss_mb()
    statuses, slowest = asyncio.run(send_all())
    assert set(statuses) <= {200, 400, 413, 415, 422}
    assert statuses.count(422) > n / 20
    assert slowest < 1
    assert process.rss_mb() - before < 20


@pytest.mark.parametrize("n", [10, pytest.param(300, marks=pytest.mark.full)])
def test_what_openapi_promises_holds_for_what_schemathesis_makes_of_it(process, n, tmp_path):
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{process.url}/openapi.json", "--checks", checks,
               "--seed", "0", "--max-examples", str(n), "--mode", "all", "--phases", "examples,coverage,fuzzing",
               "--max-response-time", "1", "--generation-database", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_a_client_that_goes_away_is_no_failure(process):
    async def go_away() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", process.port)
        writer.write(request("/api/v1/score", b"x" * 1000)[:-500])
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()

    asyncio.run(go_away())
    end = time.monotonic() + 5
    while not any(line.get("status") == 499 for line in process.lines()):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert [line for line in process.lines() if line["level"] == "error"] == []
