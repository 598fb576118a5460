"""The HTTP server of the control API and the gateway: what it takes, what it refuses, streams, and
a thousand hostile requests to a running agent.  Standard library and pytest only."""
import contextlib
import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

import b9agent
import engines
from helpers import StallMeter, environment, wait_until
from hostile_gateway import TOKEN

Field, Response, Route = b9agent.Field, b9agent.Response, b9agent.Route
FIELDS = (
    Field("name", "string", "what it is called", True, max_length=8, example="llama"),
    Field("size", "integer", "how large", minimum=1, maximum=10), Field("rate", "number", "how fast"),
    Field("sure", "boolean", "whether"), Field("more", "object", "anything"),
    Field("tags", "array", "words", max_length=2), Field("way", "string", "which", choices=("up", "down")))
HOST = b"Host: 127.0.0.1\r\n"
GOOD = b"GET /open HTTP/1.1\r\n" + HOST + b"\r\n"


class TestApi(b9agent.Api):
    """Routes to try the server with.  closed: set when the generator of a stream was closed."""
    __test__ = False
    name, max_connections, max_streams, refusals = "test", 12, 2, 5
    instant = ("/instant",)
    statuses = ((b9agent.UsageError, 400, "bad_request"),)

    def __init__(self, log):
        super().__init__(log)
        self.seen, self.closed, self.ring = [], threading.Event(), b9agent.Ring(10)
        self.routes = (
            Route("GET", "/open", lambda request: Response(200, {"ok": True}), True, "open"),
            Route("GET", "/instant", lambda request: Response(200, {"ok": True}), True, "open"),
            Route("GET", "/locked", lambda request: Response(200, {"ok": True}), False, "locked"),
            Route("POST", "/take", self._take, True, "takes fields", fields=FIELDS,
                  query=(Field("n", "integer", "a number"), Field("b", "boolean", "a truth"))),
            Route("POST", "/none", self._take, True, "takes nothing"),
            Route("GET", "/defect", lambda request: [][1], True, "fails"),
            Route("GET", "/odd", lambda request: Response(200, {"set": {1}}), True, "is no JSON"),
            Route("GET", "/os", lambda request: open("/nonexistent"), True, "fails"),
            Route("GET", "/usage", self._usage, True, "fails"),
            Route("GET", "/large", lambda request: Response(200, b"x" * (30 << 20)), True, "large"),
            Route("GET", "/stream", lambda request: Response(
                200, self._stream(request), "text/plain"), True, "three pieces"),
            Route("GET", "/endless", lambda request: Response(
                200, self._endless(), "text/plain"), True, "for ever"),
            Route("GET", "/flood", lambda request: Response(
                200, self._flood(), "text/plain"), True, "all the time"),
            Route("GET", "/breaks", lambda request: Response(
                200, (b"x" if n == 0 else [][1] for n in range(2)), "text/plain"), True, "breaks"))

    def authorize(self, headers):
        if headers.get("authorization") != "Bearer right":
            raise b9agent.HttpError(401, "unauthorized", "no")

    def _take(self, request):
        self.seen.append(request)
        return Response(200, {"fields": request.fields, "query": request.query})

    def _usage(self, request):
        raise b9agent.UsageError("a mistake", "mend it")

    def _stream(self, request):
        yield b"one\n"
        yield b""
        yield b"two\n"

    def _endless(self):
        try:
            yield from b9agent.follow_ring(self.ring, 0, lambda number, item: item, b"quiet\n")
        finally:
            self.closed.set()

    def _flood(self):
        try:
            while True:
                yield b"x" * 65536
        finally:
            self.closed.set()


class Served:
    """A running server over a TestApi."""

    def __init__(self):
        self.log = io.StringIO()
        self.api = TestApi(b9agent.Log(stream=self.log))
        self.server = b9agent.ApiServer(self.api, "127.0.0.1", 0)
        self.server.start()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=30)

    def send(self, data, half_close=False):
        """(status, headers, body) of the first answer, the connection then closed."""
        with self.connect() as link:
            link.sendall(data)
            if half_close:
                link.shutdown(socket.SHUT_WR)
            return read_answer(link)

    def ask(self, method, path, body=b"", *headers, kind="application/json"):
        lines = [b"%s %s HTTP/1.1" % (method.encode(), path.encode()), b"Host: 127.0.0.1", *headers]
        if body:
            lines += [b"Content-Length: %d" % len(body)]
            lines += [b"Content-Type: " + kind.encode()] if kind else []
        status, headers, answer = self.send(b"\r\n".join(lines + [b"", b""]) + body)
        return status, json.loads(answer) if answer else None, headers


def read_head(link):
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = link.recv(1)
        if not piece:
            return None, {}
        data += piece
    first, *lines = data.decode("latin-1").strip().split("\r\n")
    return int(first.split()[1]), {name.lower(): value for name, _, value in
                                   (line.partition(": ") for line in lines)}


def read_answer(link, head_only=False):
    status, headers = read_head(link)
    if status is None:
        return None, {}, b""
    body = b""
    while not head_only and len(body) < int(headers["content-length"]):
        piece = link.recv(int(headers["content-length"]) - len(body))
        assert piece, "cut off"
        body += piece
    return status, headers, body


@pytest.fixture
def served():
    running = Served()
    yield running
    running.server.stop()
    wait_until(no_threads, "all its threads have ended", 5)


def no_threads():
    return not [thread for thread in threading.enumerate() if thread.name.startswith("test")]


# -- heads ---------------------------------------------------------------------

@pytest.mark.parametrize("data, status", [
    (b"\r\n\r\n", 400), (b"nonsense\r\n\r\n", 400), (b"GET /open\r\n\r\n", 400), (b"GET  /open HTTP/1.1\r\n\r\n", 400),
    (b"GET /open HTTP/1.1 \r\n\r\n", 400), (b"GET /op\x00en HTTP/1.1\r\n\r\n", 400), (b" GET /open HTTP/1.1\r\n\r\n", 400),
    (b"GET /\xc3\xa9 HTTP/1.1\r\n" + HOST + b"\r\n", 400), (b"G@T /open HTTP/1.1\r\n\r\n", 400),
    (b"GET /open HTTP/9.9\r\n\r\n", 505), (b"GET /open HTTP/2.0\r\n\r\n", 505), (b"GET /open http/1.1\r\n\r\n", 400),
    (b"GET /open HTTP/1.1\r\n\r\n", 400), (b"GET /open HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    (b"GET /open HTTP/1.1\r\n" + HOST + b"Bad Header: x\r\n\r\n", 400),
    (b"GET /open HTTP/1.1\r\n" + HOST + b"Bad : x\r\n\r\n", 400),
    (b"GET /open HTTP/1.1\r\n" + HOST + b" folded: x\r\n\r\n", 400),
    (b"GET /open HTTP/1.1\r\n" + HOST + b"X: a\x00b\r\n\r\n", 400),
    (b"GET /open HTTP/1.1\r\n" + HOST + b"X: a\nY: b\r\n\r\n", 400),
    (b"GET /open HTTP/1.1\r\n" + HOST + b"X: a\rY: b\r\n\r\n", 400),
    (b"GET /open HTTP/1.1\r\n" + HOST + b": x\r\n\r\n", 400),
    (b"GET /open HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 63 + b"\r\n", 200),
    (b"GET /open HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 64 + b"\r\n", 431),
    (b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431),
    (b"GET /open HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 70000, 431),
    (b"GET /open HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 16000 + b"\r\n\r\n", 200),
    (b"GET /open HTTP/1.0\r\n\r\n", 200), (b"GET http://127.0.0.1/open HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    (b"get /open HTTP/1.1\r\n" + HOST + b"\r\n", 405), (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 404),
])
def test_a_head_is_taken_or_refused(served, data, status):
    got, headers, body = served.send(data, half_close=True)
    assert got == status, body
    if status != 200:
        answer = json.loads(body)
        assert set(answer) == {"status", "error", "message", "error_code", "suggestion"}
        assert answer["status"] == "error" and answer["error"] and answer["error_code"]
    assert "defect" not in served.log.getvalue()


def test_a_method_that_a_path_does_not_take_is_a_405_that_says_which_it_takes(served):
    status, answer, headers = served.ask("DELETE", "/open")
    assert (status, headers["allow"]) == (405, "GET, HEAD")
    assert served.ask("GET", "/take")[2]["allow"] == "POST"


@pytest.mark.parametrize("path", ["/open", "/instant"])
def test_head_is_get_without_the_body_and_the_connection_goes_on(served, path):
    with served.connect() as link:
        for _ in range(2):
            link.sendall(b"HEAD %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
            status, headers, _ = read_answer(link, head_only=True)
            assert (status, headers["content-length"]) == (200, "13")
            assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", headers["date"])
        link.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
        assert read_answer(link)[2] == b'{"ok": true}\n'


@pytest.mark.parametrize("data, answers", [
    (GOOD * 3, 3), (GOOD.replace(b"/open", b"/instant") * 3, 3), (GOOD.replace(b"/open", b"/instant") + GOOD, 2),
    (b"POST /none HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}" + GOOD, 2)])
def test_requests_sent_at_once_are_answered_in_turn(served, data, answers):
    for pause in (False, True):
        with served.connect() as link:
            if pause:  # byte by byte: wherever the kernel cuts, it is the same
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for position in range(len(data)):
                    link.send(data[position:position + 1])
            else:
                link.sendall(data)
            for _ in range(answers):
                assert read_answer(link)[0] == 200


def test_a_stream_is_closed_where_that_is_asked_for(served):
    with served.connect() as link:
        link.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = link.makefile("rb").read()  # to its end
        assert b"\r\nConnection: close\r\n" in answer and answer.endswith(b"\r\n0\r\n\r\n")


@pytest.mark.parametrize("path", [b"/open", b"/instant"])
@pytest.mark.parametrize("line, version", [(b"Connection: close\r\n", b"1.1"), (b"Connection: Keep-Alive, Close\r\n", b"1.1"),
                                           (b"", b"1.0")])
def test_a_connection_is_closed_where_that_is_asked_for(served, path, line, version):
    with served.connect() as link:
        link.sendall(b"GET %s HTTP/%s\r\nHost: x\r\n%s\r\n" % (path, version, line))
        status, headers, _ = read_answer(link)
        assert (status, headers["connection"], link.recv(1)) == (200, "close", b"")


# -- bodies ----------------------------------------------------------------------

def post(path=b"/take", body=b"", *lines):
    return b"POST %s HTTP/1.1\r\n" % path + HOST + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


@pytest.mark.parametrize("data, status", [
    (post(b"/take", b"{}", b"Content-Length: -1"), 400), (post(b"/take", b"{}", b"Content-Length: +2"), 400),
    (post(b"/take", b"{}", b"Content-Length: 2x"), 400), (post(b"/take", b"{}", b"Content-Length: "), 400),
    (post(b"/take", b"{}", b"Content-Length: 2", b"Content-Length: 2"), 400),
    (post(b"/take", b"{}", b"Content-Length: 2", b"Content-Length: 3"), 400),
    (post(b"/take", b"{}", b"Content-Length: 2, 2"), 400), (post(b"/take", b"{}", b"Content-Length: 99999999999999999"), 400),
    (post(b"/take", b"{}", b"Content-Length: \xb2"), 400), (post(b"/take", b"{", b"Content-Length: 2"), 400),
    (post(b"/take", b"{}", b"Content-Length: 1048577"), 413),
    (post(b"/take", b"0\r\n\r\n", b"Transfer-Encoding: chunked"), 411),
    (post(b"/take", b"0\r\n\r\n", b"Transfer-Encoding: chunked", b"Content-Length: 5"), 400),
    (post(b"/none", b"{}", b"Content-Length: 2", b"Expect: 200-ok", b"Content-Type: application/json"), 417),
    (post(b"/none", b"{}", b"Content-Length: 2"), 415), (post(b"/none", b"{}", b"Content-Length: 2", b"Content-Type: text/plain"), 415),
    (post(b"/none", b"{}", b"Content-Length: 2", b"Content-Type: application/json, text/plain"), 415),
    (post(b"/none", b"{}", b"Content-Length: 2", b"Content-Type: Application/JSON; charset=utf-8"), 200),
    (post(b"/none"), 200), (post(b"/none", b"", b"Content-Length: 0"), 200), (post(b"/take"), 400),
    (post(b"/none", b"", b"Content-Type: text/plain"), 200)])
def test_a_body_is_taken_or_refused(served, data, status):
    got, _, answer = served.send(data, half_close=True)
    assert got == status, answer
    assert "defect" not in served.log.getvalue()


def test_a_body_on_a_get_is_checked_as_any_other(served):
    assert served.ask("GET", "/open", b'{"x": 1}')[0] == 400
    assert served.ask("GET", "/open", b"{}")[0] == 200


def test_the_body_is_asked_for_where_the_client_waits_for_that(served):
    head = post(b"/take", b"", b"Content-Length: 13", b"Content-Type: application/json", b"Expect: 100-Continue")
    with served.connect() as link:
        link.sendall(head)
        assert read_head(link) == (100, {})
        link.sendall(b'{"name": "x"}')
        assert read_answer(link)[0] == 200
    refused = head.replace(b": 13", b": 2000000")
    with served.connect() as link:
        link.sendall(refused)
        assert read_answer(link)[0] == 413, "told before a byte of it was sent"


@pytest.mark.parametrize("raw", [
    b"{", b"[]", b"null", b'"x"', b"5", b"{}}", b'{"name": "a",}', b"\xff\xfe", b"{'name': 'a'}", b'{"name": "a"} x',
    b'{"name": "a", "name": "b"}', b'{"name": "a", "more": {"x": 1, "x": 2}}', b'{"name": "a", "rate": NaN}',
    b'{"name": "a", "rate": Infinity}', b'{"name": "a", "rate": 1e999}', b'{"name": "a", "size": ' + b"9" * 5000 + b"}",
    b'{"name": "a", "size": ' + b"9" * 1000000 + b"}", b"[" * 100000, b'{"a":' * 100000, b'\xef\xbb\xbf{"name": "a"}',
    b'{"name": "\\ud800"}', b'{"name": "a", "more": {"\\udfff": 1}}', b'{"name": "a", "more": ' + b'{"a": ' * 40 + b"1" + b"}" * 41,
    b'{"name": "a\x01"}', b"\0", b'{"name": "a"}\0', b'{"more": "' + b"\\\"" * 300000 + b"[" * 90 + b'"}'])
def test_a_body_that_is_no_strict_json_object_is_refused_quickly(served, raw):
    began = time.monotonic()
    with StallMeter() as stall:
        status, answer, _ = served.ask("POST", "/take", raw)
    assert status == 400 and answer["error_code"] in ("bad_json", "bad_field", "missing_field"), answer
    assert time.monotonic() - began < 3 + 20 * stall.worst_s
    assert served.api.seen == [] and "defect" not in served.log.getvalue()


def test_brackets_within_strings_are_no_nesting(served):
    body = json.dumps({"name": "[[[[\"[\\", "more": {"x": "[" * 1000 + "\\" * 7 + '"{{'}}).encode()
    status, answer, _ = served.ask("POST", "/take", body)
    assert status == 200 and answer["fields"] == json.loads(body)


@pytest.mark.parametrize("given, code, name", [
    ({}, "missing_field", "name"), ({"name": None}, "bad_field", "name"), ({"name": 5}, "bad_field", "name"),
    ({"name": "a" * 9}, "bad_field", "name"), ({"name": "a", "size": 0}, "bad_field", "size"),
    ({"name": "a", "size": 11}, "bad_field", "size"), ({"name": "a", "size": 1.5}, "bad_field", "size"),
    ({"name": "a", "size": True}, "bad_field", "size"), ({"name": "a", "size": "1"}, "bad_field", "size"),
    ({"name": "a", "rate": True}, "bad_field", "rate"), ({"name": "a", "rate": 10 ** 19}, "bad_field", "rate"),
    ({"name": "a", "sure": 1}, "bad_field", "sure"), ({"name": "a", "sure": "true"}, "bad_field", "sure"),
    ({"name": "a", "more": []}, "bad_field", "more"), ({"name": "a", "tags": {}}, "bad_field", "tags"),
    ({"name": "a", "tags": ["a", "b", "c"]}, "bad_field", "tags"), ({"name": "a", "tags": ["a", 5]}, "bad_field", "tags"),
    ({"name": "a", "way": "left"}, "bad_field", "way"), ({"name": "a", "news": 1}, "unknown_field", "news"),
    ({"name": "a", "Name": "a"}, "unknown_field", "Name")])
def test_a_field_that_is_wrong_is_named_with_what_would_be_right(served, given, code, name):
    status, answer, _ = served.ask("POST", "/take", json.dumps(given).encode())
    assert (status, answer["error_code"]) == (400, code)
    assert "`%s`" % name in answer["error"] and answer["suggestion"] and answer["message"] == answer["error"]
    assert ("name, size" if code == "unknown_field" else name + ": ") in answer["suggestion"]


def test_fields_and_queries_arrive_as_what_they_are(served):
    given = {"name": "é\u2028", "size": 3.0, "rate": 1, "sure": False, "more": {"a": [None]}, "tags": [], "way": "up"}
    status, answer, _ = served.ask("POST", "/take?n=-7&b=true", json.dumps(given).encode())
    assert (status, answer) == (200, {"fields": dict(given, size=3), "query": {"n": -7, "b": True}})
    assert type(served.api.seen[0].fields["size"]) is int


@pytest.mark.parametrize("query", ["n=x", "n=", "n", "n=1.5", "n=1&n=2", "m=1", "b=1", "b=TRUE", "n=%ff", "n=" + "9" * 5000,
                                   "&".join("a%d=" % n for n in range(40)), "=", "n=%D9%A1"])
def test_a_query_that_is_wrong_is_refused(served, query):
    status, answer, _ = served.ask("POST", "/take?" + query, b'{"name": "a"}')
    assert status == 400 and answer["suggestion"]
    assert "defect" not in served.log.getvalue()


# -- failures ----------------------------------------------------------------------

@pytest.mark.parametrize("path", ["/defect", "/os", "/odd"])
def test_a_handler_that_fails_is_a_logged_500_with_a_number_and_the_connection_goes_on(served, path):
    with served.connect() as link:
        for _ in range(2):
            link.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
            status, _, body = read_answer(link)
            number = re.search("number ([0-9a-f]{8})", json.loads(body)["error"]).group(1)
            assert status == 500 and "id=" + number in served.log.getvalue()
            assert b"Error" not in body and b"nonexistent" not in body
        link.sendall(GOOD)
        assert read_answer(link)[0] == 200


def test_a_mistake_that_a_handler_finds_has_the_status_of_its_class(served):
    status, answer, _ = served.ask("GET", "/usage")
    assert (status, answer["error"], answer["suggestion"]) == (400, "a mistake", "mend it")


def test_too_many_wrong_tokens_are_a_429_and_the_right_one_still_goes(served):
    got = [served.ask("GET", "/locked", b"", b"Authorization: Bearer wrong") for _ in range(8)]
    assert [status for status, _, _ in got] == [401] * 5 + [429] * 3
    assert got[-1][2]["retry-after"] == "60"
    assert served.ask("GET", "/locked", b"", b"Authorization: Bearer right")[0] == 200


def test_too_many_connections_are_a_429_and_the_rest_goes_on(served):
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(served.connect()) for _ in range(12)]
        for link in links:
            link.sendall(GOOD)
            assert read_answer(link)[0] == 200
        with served.connect() as link:
            status, headers, body = read_answer(link)
            assert (status, headers["retry-after"], json.loads(body)["error_code"]) == (429, "1", "too_many")
        for link in links:
            link.sendall(GOOD)
            assert read_answer(link)[0] == 200
    wait_until(lambda: served.ask("GET", "/open")[0] == 200, "a place is free again")


# -- slow clients (limits shortened) -------------------------------------------------

@pytest.mark.parametrize("data", [b"G", b"GET /open HTTP/1.1\r\nHost: x\r\n", post(b"/take", b"{", b"Content-Length: 50")])
def test_a_request_that_does_not_arrive_in_time_is_a_408(served, monkeypatch, data):
    monkeypatch.setattr(b9agent, "HTTP_REQUEST_LIMIT_S", 0.5)
    with served.connect() as link:
        link.sendall(data)
        status, headers, body = read_answer(link)
        assert (status, headers["connection"], json.loads(body)["error_code"]) == (408, "close", "too_slow")
        assert link.recv(1) == b""


def test_a_request_that_drips_has_no_more_time(served, monkeypatch):
    monkeypatch.setattr(b9agent, "HTTP_REQUEST_LIMIT_S", 0.6)
    with served.connect() as link:
        began = time.monotonic()
        link.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - began < 20:
            link.sendall(b"x")
            with contextlib.suppress(socket.timeout):
                answer = link.recv(65536)
        assert b" 408 " in answer


@pytest.mark.parametrize("first", [b"", GOOD, GOOD.replace(b"/open", b"/instant")])
def test_a_connection_on_which_nothing_is_said_is_closed(monkeypatch, first):
    monkeypatch.setattr(b9agent, "HTTP_REQUEST_LIMIT_S", 0.2)
    monkeypatch.setattr(b9agent, "HTTP_PEER_LIMIT_S", 0.3)
    running = Served()
    try:
        with running.connect() as link:
            link.sendall(first)
            if first:
                assert read_answer(link)[0] == 200
            assert link.recv(1) == b""
    finally:
        running.server.stop()


# -- streams -------------------------------------------------------------------------

def chunks(link):
    while True:
        line = b""
        while not line.endswith(b"\r\n"):
            piece = link.recv(1)
            if not piece:
                return
            line += piece
        size, data = int(line, 16), b""
        while len(data) < size + 2:
            data += link.recv(size + 2 - len(data))
        yield data[:-2]
        if size == 0:
            return


def test_a_stream_is_chunked_and_the_connection_goes_on(served):
    with served.connect() as link:
        for _ in range(2):
            link.sendall(GOOD.replace(b"/open", b"/stream"))
            status, headers = read_head(link)
            assert (status, headers["transfer-encoding"]) == (200, "chunked") and "content-length" not in headers
            assert list(chunks(link)) == [b"one\n", b"two\n", b""]
        link.sendall(b"HEAD /stream HTTP/1.1\r\nHost: x\r\n\r\n" + GOOD)
        assert read_head(link)[0] == 200
        assert read_answer(link)[2] == b'{"ok": true}\n'


def test_to_an_http_1_0_client_a_stream_ends_with_the_connection(served):
    with served.connect() as link:
        link.sendall(b"GET /stream HTTP/1.0\r\n\r\n")
        status, headers = read_head(link)
        assert status == 200 and not {"transfer-encoding", "content-length"} & set(headers)
        assert link.makefile("rb").read() == b"one\ntwo\n"


def test_a_stream_that_fails_breaks_off_without_its_last_chunk(served):
    with served.connect() as link:
        link.sendall(GOOD.replace(b"/open", b"/breaks"))
        assert read_head(link)[0] == 200
        assert list(chunks(link)) == [b"x"]
    wait_until(lambda: "IndexError" in served.log.getvalue(), "it is logged")


@pytest.mark.parametrize("way", ["close", "reset", "half"])
def test_the_generator_of_a_stream_is_closed_when_its_reader_leaves(served, way):
    with served.connect() as link:
        link.sendall(GOOD.replace(b"/open", b"/endless"))
        assert read_head(link)[0] == 200
        served.api.ring.add(b"hello\n")
        assert next(chunks(link)) == b"hello\n"
        if way == "half":
            link.shutdown(socket.SHUT_WR)
        elif way == "reset":
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if way == "half":
            assert served.api.closed.wait(30)
    assert served.api.closed.wait(30)


def test_a_reader_that_takes_nothing_loses_its_stream(served, monkeypatch):
    monkeypatch.setattr(b9agent, "HTTP_PEER_LIMIT_S", 0.5)
    with served.connect() as link:
        link.sendall(GOOD.replace(b"/open", b"/flood"))
        assert served.api.closed.wait(30)
        with contextlib.suppress(ConnectionResetError):
            while link.recv(1 << 20):
                pass


def test_a_client_that_does_not_take_a_large_answer_is_dropped(served, monkeypatch):
    monkeypatch.setattr(b9agent, "HTTP_PEER_LIMIT_S", 0.5)
    with served.connect() as link:
        link.sendall(GOOD.replace(b"/open", b"/large"))
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "test-client"],
                   "its thread is gone")


def test_a_stream_in_which_nothing_happens_says_so(served, monkeypatch):
    monkeypatch.setattr(b9agent, "STREAM_LOOK_S", 0.05)
    monkeypatch.setattr(b9agent, "STREAM_QUIET_S", 0.2)
    with served.connect() as link:
        link.sendall(GOOD.replace(b"/open", b"/endless"))
        assert read_head(link)[0] == 200
        found = chunks(link)
        assert [next(found), next(found)] == [b"quiet\n"] * 2


def test_too_many_streams_are_a_429_and_other_requests_go_on(served):
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            link = stack.enter_context(served.connect())
            link.sendall(GOOD.replace(b"/open", b"/endless"))
            assert read_head(link)[0] == 200
        status, answer, headers = served.ask("GET", "/endless")
        assert (status, headers["retry-after"]) == (429, "10")
        assert served.ask("GET", "/open")[0] == 200


def test_stopping_ends_streams_and_kept_connections_but_lets_an_answer_out():
    running = Served()
    with running.connect() as stream, running.connect() as kept, running.connect() as silent:
        stream.sendall(GOOD.replace(b"/open", b"/endless"))
        assert read_head(stream)[0] == 200
        kept.sendall(GOOD)
        assert read_answer(kept)[0] == 200
        began = time.monotonic()
        with StallMeter() as stall:
            running.server.stop()
        assert time.monotonic() - began < 2.5 + 3 * stall.worst_s
        assert running.api.closed.is_set() and list(chunks(stream)) == []
        assert kept.recv(1) == silent.recv(1) == b""
        wait_until(no_threads, "all its threads have ended", 1)


# -- rings -------------------------------------------------------------------------

def test_a_ring_keeps_the_newest_and_tells_what_is_newer():
    ring = b9agent.Ring(3)
    first = ring.last
    for item in "abcde":
        ring.add(item)
    assert [item for _, item in ring.after(0)] == [item for _, item in ring.after(first)] == ["c", "d", "e"]
    assert ring.after(ring.last - 1) == [(first + 5, "e")]
    assert ring.after(ring.last, 0.01) == []
    assert len(ring.after(ring.last + 1000)) == 3, "a number from before the clock was set back"
    assert b9agent.Ring(3).last >= first, "numbers of a later run are higher"


# -- a thousand hostile requests -------------------------------------------------------

def hostile_requests(token):
    """What strangers and careless programs send: (bytes, whether they wait for the answer)."""
    auth = b"Authorization: Bearer " + token.encode() + b"\r\n"
    return [
        GOOD.replace(b"/open", b"/status"), b"GET /status HTTP/1.1\r\n" + HOST + b"Authorization: Bearer x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n",
        b"GET /" + b"x" * 100000 + b" HTTP/1.1\r\n\r\n", b"GET /logs?lines=zz HTTP/1.1\r\n" + HOST + auth + b"\r\n",
        b"GET /health HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 500 + b"\r\n", b"nonsense\r\n\r\n", b"\0" * 5000,
        b"POST /status HTTP/1.1\r\n" + HOST + auth + b"Content-Length: 900000\r\n\r\n" + b"x" * 900000,
        b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999\r\n\r\n" + b"x" * 65536,
        b"GET /status HTTP/1.1\r\n" + HOST + auth + b"Content-Type: application/json\r\nContent-Length: 200000\r\n\r\n"
        + b"[" * 200000, b"GET /health HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET /events HTTP/1.1\r\n" + HOST + auth + b"\r\n",
        b"GET /logs?follow=true HTTP/1.1\r\n" + HOST + auth + b"\r\n", b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /metrics HTTP/1.1\r\n" + HOST + auth + b"\r\n", b"GET /hea", b"DELETE /openapi.json HTTP/1.1\r\n" + HOST + b"\r\n"]


def throw(port, data, number):
    """Send it in one of several ill-mannered ways; whatever becomes of it."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as link:
            link.sendall(data)
            link.settimeout(1)
            if number % 3 == 0:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return b""
            if number % 3 == 1:
                link.shutdown(socket.SHUT_WR)
            return link.recv(65536)
    except OSError:
        return b""  # refused in the middle of it: its right


def process_figures(pid):
    """(threads, descriptors, resident KiB)."""
    with open("/proc/%d/status" % pid) as handle:
        text = handle.read()
    return (int(re.search(r"Threads:\s+(\d+)", text).group(1)), len(os.listdir("/proc/%d/fd" % pid)),
            int(re.search(r"VmRSS:\s+(\d+)", text).group(1)))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_a_thousand_hostile_requests_delay_no_keepalive_and_leave_nothing(agent, hostile, state):
    # One arena: glibc's others, for threads that allocate at once, grow by megabytes and stay.
    program = agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(hostile.port), "--pool-name", "gpu",
                    "--control-port", "0", "--keepalive-interval", "1", BETA9_TOKEN=TOKEN, MALLOC_ARENA_MAX="1")
    match, _ = program.wait_line(r"listening api=control url=http://127\.0\.0\.1:(\d+)")
    port, token = int(match.group(1)), (state / "control.token").read_text().strip()
    hostile.wait_count(1, "keepalive", "ok")
    requests = hostile_requests(token)
    order = random.Random(7)

    def attack(number):
        return throw(port, order.choice(requests), number)

    def attack_many(share):
        answers.extend(attack(number) for number in share)

    def run_all(count):
        threads = [threading.Thread(target=attack_many, args=(range(first, count, 8),)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    answers = []
    run_all(200)  # fills what is kept: rings, caches, the allocator
    wait_until(lambda: process_figures(program.pid)[0] <= 6, "threads end")  # with the front door and the audit log
    threads, descriptors, resident_kib = process_figures(program.pid)
    seen = len(hostile.named("keepalive", "ok"))
    with StallMeter() as stall, contextlib.ExitStack() as stack:
        for _ in range(30):  # slow ones, beside them all the time
            link = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            link.sendall(b"GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        run_all(1000)
        hostile.wait_count(seen + 3, "keepalive", "ok")
    times = [request.at for request in hostile.named("keepalive", "ok")]
    late = max(later - earlier for earlier, later in zip(times, times[1:]))
    assert late <= 1.1 + 0.3 + 3 * stall.worst_s
    statuses = {answer[9:12] for answer in answers if answer.startswith(b"HTTP/1.1 ")}
    assert {b"200", b"400", b"401", b"405", b"413", b"421", b"431"} <= statuses and b"500" not in statuses
    assert "defect" not in program.text()
    wait_until(lambda: process_figures(program.pid)[:2] <= (threads, descriptors), "nothing of it is left")
    assert process_figures(program.pid)[2] - resident_kib < 3 << 10
    assert program.stop() == 0


# -- what /openapi.json says is so -------------------------------------------------------

FUZZER = os.path.join(os.path.dirname(sys.executable), "st")


@pytest.mark.skipif(not os.access(FUZZER, os.X_OK), reason="schemathesis is not installed")
def test_a_fuzzer_driven_by_openapi_finds_no_defect_and_nothing_undocumented(agent, hostile, state, tmp_path):
    program = agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(hostile.port), "--pool-name", "gpu",
                    "--control-port", "0", "--keepalive-interval", "1", "--inference-port", "0",
                    PATH=engines.path_with(engines.stand_in(tmp_path / "bin", "ollama")), BETA9_TOKEN=TOKEN)
    match, _ = program.wait_line(r"listening api=control url=(http://127\.0\.0\.1:\d+)")
    hostile.wait_count(1, "keepalive", "ok")
    token = (state / "control.token").read_text().strip()
    # Streams without end are not for it: /events, and a log that is followed.
    (tmp_path / "hooks.py").write_text(
        "import schemathesis\n\n@schemathesis.hook\ndef before_call(context, case, kwargs):\n"
        "    if str((case.query or {}).get('follow')).lower() == 'true':\n"
        "        case.query['follow'] = 'false'\n")
    # A name that fits the schema may still be no model's: 400, 404 and 409 are right answers to it.
    command = [FUZZER, "run", match.group(1) + "/openapi.json", "-H", "Authorization: Bearer " + token,
               "--exclude-path", "/events", "--exclude-checks", "positive_data_acceptance", "--seed", "1", "-n", "20", "--generation-deterministic",
               "--request-timeout", "10", "--no-color", "--continue-on-failure", "--max-time", "15"]
    done = subprocess.run(command, cwd=str(tmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=100,
                          env=environment(tmp_path, SCHEMATHESIS_HOOKS="hooks", PYTHONPATH=str(tmp_path)))
    text = done.stdout.decode("utf-8", "replace")
    assert program.stop() == 0  # and with it the engine that the fuzzer may have started
    assert done.returncode == 0, text
    assert "defect" not in program.text()
