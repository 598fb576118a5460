"""The front door: what passes through it, whatever engine and client do (sections 13b and 13c)."""
import contextlib
import errno
import json
import os
import random
import socket
import ssl
import threading
import time

import pytest
from hypothesis import given, settings, strategies

import b9agent
from door_rig import (COMPLETION, DONE, STOP, STREAM_HEAD, TOKEN, Rig, ScriptedEngine, chunk,
                      event, events_of, read_answer, streamed, token, usage, whole)
from helpers import PATIENCE_S, wait_until

TENANTS = """tenants:
  - name: t
    token_sha256: %s
    admin: true
"""


class AuditLines:
    """An audit log that keeps what it is told."""
    failing = False

    def __init__(self):
        self.lines = []

    def record(self, kind, fields):
        self.lines.append((kind, fields))

    def of(self, wanted):
        return [fields for kind, fields in self.lines if kind == wanted]


@contextlib.contextmanager
def rig_at(folder, **given):
    given.setdefault("tenants", TENANTS % b9agent.token_hash(TOKEN))
    made = Rig(folder, **given)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def rig(tmp_path):
    with rig_at(tmp_path) as made:
        yield made


@pytest.fixture
def quick(monkeypatch):
    """Deadlines that a test can wait for."""
    monkeypatch.setattr(b9agent, "HTTP_REQUEST_LIMIT_S", 0.4)
    monkeypatch.setattr(b9agent, "RELAY_SWEEP_S", 0.05)
    monkeypatch.setattr(b9agent, "RELAY_SLOW_S", 0.4)


# -- the framing of bodies --------------------------------------------------

@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(strategies.lists(strategies.binary(min_size=1, max_size=40), max_size=6),
       strategies.lists(strategies.integers(1, 30), max_size=40))
def test_a_chunked_body_is_the_same_however_it_is_cut(chunks, cuts):
    data = b"".join(map(chunk, chunks)) + b"0\r\nTrailer: x\r\n\r\n"
    reader, got, at = b9agent.BodyReader(None, True), b"", 0
    for size in cuts + [len(data)]:
        if at < len(data):
            assert not reader.done
            got += reader.feed(data[at:at + size])
            at += size
    assert reader.done and got == b"".join(chunks)


@pytest.mark.parametrize("data", [
    b"x\r\n", b"-1\r\n", b"0x3\r\nabc\r\n", b"+3\r\nabc\r\n", b"1_0\r\n", b"\r\n", b"123456789\r\n",
    b"3\r\nabcd\r\n", b"f" * 5000], ids=repr)
def test_a_broken_framing_is_said_to_be_broken(data):
    with pytest.raises(b9agent.HttpFailure):
        b9agent.BodyReader(None, True).feed(data)


@pytest.mark.parametrize("length, first, second", [(3, b"ab", b"cd"), (None, b"1\r\na\r\n2\r\n", b"bc\r\n0\r\n\r\nd")])
def test_more_than_was_announced_is_no_part_of_the_body(length, first, second):
    reader = b9agent.BodyReader(length, length is None)
    assert b"".join((reader.feed(first), reader.feed(second))) == b"abc"
    assert reader.done and reader.excess


# -- what passes --------------------------------------------------------------

def test_an_answer_passes_and_the_engine_sees_nothing_of_the_client(rig):
    status, answer = rig.ask(rig.chat(), headers=[("Cookie", "a=b"), ("X-Forwarded-For", "1.2.3.4"),
                                                  ("User-Agent", "Mozilla")])
    assert status == 200 and answer["choices"][0]["message"]["content"] == "Hi"
    asked = rig.engine.asked[0]
    assert asked.line == "POST /v1/chat/completions HTTP/1.1"
    assert set(asked.headers) == {"host", "content-type", "content-length", "user-agent"}
    assert asked.headers["host"] == f"127.0.0.1:{rig.engine.port}"
    assert TOKEN.encode() not in asked.raw


def test_a_stream_passes_piece_by_piece(rig):
    more, seen = threading.Event(), threading.Event()

    def script(_asked, sock):
        sock.sendall(STREAM_HEAD + chunk(token("one")))
        assert seen.wait(PATIENCE_S)
        sock.sendall(b"".join(map(chunk, [token("two"), STOP, usage(7, 2), DONE])) + b"0\r\n\r\n")
        more.set()
    rig.engine.script = script
    with rig.connect() as sock:
        sock.sendall(rig.request(rig.chat(True)))
        got = b""
        while b"one" not in got:
            got += sock.recv(65536)
        assert not more.is_set(), "the first token came while the engine was still at work"
        seen.set()
        while not got.endswith(b"0\r\n\r\n"):
            got += sock.recv(65536)
    assert b"two" in got and b"[DONE]" in got and b'"usage"' not in got
    assert (rig.used()["prompt_tokens"], rig.used()["completion_tokens"]) == (7, 2)


def test_requests_on_one_connection_are_answered_in_order(rig):
    rig.engine.script = lambda asked, sock: sock.sendall(whole(dict(
        COMPLETION, id=asked.body["messages"][0]["content"])))
    texts = [str(number) for number in range(20)]
    with rig.connect() as sock:
        sock.sendall(b"".join(rig.request(dict(rig.chat(), messages=[
            {"role": "user", "content": text}])) for text in texts))
        file_sock = sock.makefile("rb")
        for _ in texts:
            assert file_sock.readline().startswith(b"HTTP/1.1 200")
            length = 0
            while True:
                line = file_sock.readline().strip()
                if not line:
                    break
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            json.loads(file_sock.read(length))
    assert [asked.body["messages"][0]["content"] for asked in rig.engine.asked] == texts
    assert rig.engine.connections == 1, "the engine's connection is kept"


def test_a_large_body_passes_and_100_continue_is_said(rig):
    body = dict(rig.chat(), messages=[{"role": "user", "content": [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (6 << 20)}}]}])
    raw = rig.request(body, headers=[("Expect", "100-continue")])
    head, _, payload = raw.partition(b"\r\n\r\n")
    with rig.connect() as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(payload)
        status, _, answer = read_answer(sock)
    assert status == 200 and json.loads(answer)["usage"]["total_tokens"] == 9
    assert len(rig.engine.asked[0].raw) > 6 << 20


def test_a_client_of_http_1_0_gets_a_stream_that_ends_with_the_connection(rig):
    raw = rig.request(rig.chat(True)).replace(b"HTTP/1.1", b"HTTP/1.0")
    status, headers, body = rig.raw(raw, until_closed=True)
    assert status == 200 and "transfer-encoding" not in headers
    assert events_of(body)[-1] == "[DONE]"


# -- what engines do ----------------------------------------------------------

ANSWER = json.dumps(COMPLETION).encode()
BROKEN = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "no HTTP": b"hello\r\n\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20000,
    "a status of no kind": b"HTTP/1.1 999999 X\r\n\r\n",
    "two lengths that differ": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"
                               b"\r\n\r\n0\r\n\r\n",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "a coding that nobody knows": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
    "a body cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + ANSWER,
    "more than the body": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" + ANSWER,
    "a chunk without a length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "100 for ever": b"HTTP/1.1 100 Continue\r\n\r\n" * 3,
    "a body that is no JSON": whole(b"<html>oops</html>"),
}


@pytest.mark.parametrize("said", BROKEN.values(), ids=BROKEN)
def test_an_engine_that_breaks_off_or_talks_nonsense_is_a_502_and_costs_no_token(rig, said):
    def script(_asked, sock):
        sock.sendall(said)
        return True
    rig.engine.script = script
    status, answer = rig.ask(rig.chat())
    assert status == 502 and answer["error"]["message"], answer
    rig.settled()
    assert rig.used().get("completion_tokens", 0) == rig.used().get("prompt_tokens", 0) == 0
    rig.engine.script = ScriptedEngine.plain
    assert rig.ask(rig.chat())[0] == 200


GOOD = {
    "an end with the connection": b"HTTP/1.0 200 OK\r\n\r\n" + ANSWER,
    "a 100 before": b"HTTP/1.1 100 Continue\r\n\r\n" + whole(COMPLETION),
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(ANSWER[:9]) + chunk(
        ANSWER[9:]) + b"0\r\n\r\n",
    "a close that is announced": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
                                 % len(ANSWER) + ANSWER,
}


@pytest.mark.parametrize("said", GOOD.values(), ids=GOOD)
def test_every_form_of_an_answer_is_read(rig, said):
    def script(_asked, sock):
        for at in range(0, len(said), 7):
            sock.sendall(said[at:at + 7])
        return True
    rig.engine.script = script
    for _ in range(2):
        status, answer = rig.ask(rig.chat())
        assert status == 200 and answer["usage"]["total_tokens"] == 9


def test_a_stream_that_breaks_off_ends_with_an_error_in_good_form_and_is_billed_as_far_as_it_came(
        rig):
    def script(_asked, sock):
        sock.sendall(streamed(5, end=False))
        return True
    rig.engine.script = script
    status, body = rig.ask(rig.chat(True))
    events = events_of(body)
    assert status == 200 and "error" in events[-1] and "[DONE]" not in events
    assert len([each for each in events if "choices" in each]) == 5
    rig.settled()
    used = rig.used()
    assert used["completion_tokens"] == 5 and used["prompt_tokens"] > 0


def test_a_stream_without_its_last_word_counts_as_broken(rig):
    rig.engine.script = lambda _asked, sock: sock.sendall(
        STREAM_HEAD + chunk(token()) + b"0\r\n\r\n")
    events = events_of(rig.ask(rig.chat(True))[1])
    assert "error" in events[-1] and "[DONE]" not in events


def test_an_engine_that_is_not_there_is_a_502_and_it_is_found_when_it_is_back(rig):
    port = rig.engine.port
    rig.engine.close()
    assert rig.ask(rig.chat())[0] == 502
    other = ScriptedEngine()
    rig.target = rig.target._replace(endpoint=rig.target.endpoint._replace(port=other.port))
    assert rig.ask(rig.chat())[0] == 200
    assert other.port != port or other.asked
    other.close()


def test_an_engine_that_closes_kept_connections_is_asked_again_on_a_fresh_one(rig):
    """The race of every kept connection: it is closed while the request is on its way."""
    def script(_asked, sock):
        sock.sendall(whole(COMPLETION))
        return True
    rig.engine.script = script
    for _ in range(20):
        assert rig.ask(rig.chat())[0] == 200
    assert len(rig.engine.asked) == 20


def test_a_wedged_engine_is_given_up_and_the_door_goes_on(tmp_path, quick):
    limits = b9agent.DoorLimits(silence_s=0.3)
    with rig_at(tmp_path, limits=limits) as rig:
        rig.engine.script = lambda _asked, sock: rig.engine.wait_until_left(sock)
        status, answer = rig.ask(rig.chat())
        assert status == 504 and "0.3 s" in answer["error"]["message"]
        assert rig.engine.left.wait(PATIENCE_S), "its work is ended"

        def script(_asked, sock):
            sock.sendall(STREAM_HEAD + chunk(token()))
            return rig.engine.wait_until_left(sock)
        rig.engine.script = script
        events = events_of(rig.ask(rig.chat(True))[1])
        assert len(events) == 2 and "error" in events[1]
        rig.engine.script = ScriptedEngine.plain
        assert rig.ask(rig.chat())[0] == 200
        assert rig.used()["completion_tokens"] == 3
        wait_until(lambda: rig.suspected == ["m", "m"], "whoever can start it again is told")


def test_another_engine_in_place_of_the_one_that_was_asked_for_is_a_503(tmp_path, quick):
    with rig_at(tmp_path) as rig:
        rig.target = rig.target._replace(state="starting")
        with rig.connect() as sock:
            sock.sendall(rig.request(rig.chat()))
            wait_until(lambda: rig.door.status()["waiting"], "it waits for the engine")
            rig.target = rig.target._replace(state="running",
                                             engine=b9agent.ENGINE_BY_NAME["sglang"])
            assert read_answer(sock)[0] == 503
        assert not rig.engine.asked


def test_a_request_waits_for_an_engine_that_is_being_started_again(tmp_path, quick):
    with rig_at(tmp_path) as rig:
        rig.target = rig.target._replace(state="starting")
        with rig.connect() as sock:
            sock.sendall(rig.request(rig.chat()))
            wait_until(lambda: rig.door.status()["waiting"], "it waits for the engine")
            rig.target = rig.target._replace(state="running")
            assert read_answer(sock)[0] == 200


@pytest.mark.parametrize("state", ["stopped", "error"])
def test_without_an_engine_there_is_a_503_that_says_so(rig, state):
    rig.target = rig.target._replace(state=state)
    status, headers, body = rig.raw(rig.request(rig.chat()))
    assert status == 503 and "retry-after" in headers and b"engine" in body


# -- what clients do ------------------------------------------------------------

def test_a_client_that_leaves_ends_the_engines_work(rig):
    def script(_asked, sock):
        sock.sendall(STREAM_HEAD + chunk(token()))
        return rig.engine.wait_until_left(sock)
    rig.engine.script = script
    with rig.connect() as sock:
        sock.sendall(rig.request(rig.chat(True)))
        sock.recv(65536)
    assert rig.engine.left.wait(PATIENCE_S)
    rig.settled()
    assert rig.used()["completion_tokens"] == 1


def test_a_slow_reader_holds_the_engine_up_for_a_while_and_is_closed_then(tmp_path, quick):
    filler, sent = token("x" * 60000), [0]

    def script(_asked, sock):
        sock.sendall(STREAM_HEAD)
        for _ in range(1000):
            sock.sendall(chunk(filler))
            sent[0] += len(filler)
        return True
    with rig_at(tmp_path, script=script) as rig:
        with rig.connect() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.sendall(rig.request(rig.chat(True)))
            wait_until(lambda: not rig.door.status()["connections"], "it is closed")
        rig.settled()
        assert sent[0] < 30 << 20, "the engine was held up, and nothing without bound kept here"
        rig.engine.script = ScriptedEngine.plain
        assert rig.ask(rig.chat())[0] == 200


def is_stalled(rig):
    return any(client.stalled_s for client in list(rig.door._clients))


def test_a_slow_reader_who_catches_up_gets_all_of_it(tmp_path):
    filler = token("x" * 60000)

    def script(_asked, sock):
        sock.sendall(STREAM_HEAD)
        for _ in range(300):
            sock.sendall(chunk(filler))
        sock.sendall(chunk(usage(7, 300)) + chunk(DONE) + b"0\r\n\r\n")
    with rig_at(tmp_path, script=script) as rig:
        with rig.connect() as sock:
            sock.sendall(rig.request(rig.chat(True)))
            wait_until(lambda: is_stalled(rig), "the engine waits for the reader")
            status, _, body = read_answer(sock)
        events = events_of(body)
        assert status == 200 and len(events) == 301 and events[-1] == "[DONE]"
        assert rig.used()["completion_tokens"] == 300


def test_any_client_may_leave_at_any_time_and_nothing_is_left_of_it(tmp_path):
    shots = random.Random(7)

    def script(asked, sock):
        if asked.body["stream"]:
            sock.sendall(streamed(3)[:shots.randrange(10, 900)] if shots.random() < 0.2 else
                         streamed(3))
            return shots.random() < 0.3
        sock.sendall(whole(COMPLETION))
        return shots.random() < 0.3
    with rig_at(tmp_path, script=script, slots=4) as rig:
        def one(seed):
            dice = random.Random(seed)
            with contextlib.suppress(OSError, EOFError), rig.connect() as sock:
                raw = rig.request(rig.chat(dice.random() < 0.5))
                sock.sendall(raw[:dice.randrange(1, len(raw))] if dice.random() < 0.3 else raw)
                if dice.random() < 0.4:
                    sock.settimeout(dice.random() / 20)
                    sock.recv(dice.randrange(1, 300))
                elif dice.random() < 0.8:
                    read_answer(sock, within_s=0.2)
        threads = [threading.Thread(target=lambda base=base: [one(base * 50 + n) for n in range(50)])
                   for base in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rig.settled()
        wait_until(lambda: not rig.door.status()["connections"], "all connections are gone")
        assert rig.ask(rig.chat())[0] == 200
        rig.settled()
        for account in rig.ledger._accounts.values():
            assert not (account.active or account.held_tokens or account.held_gpu_s), "all is given back"


def test_who_has_no_time_for_a_head_or_a_body_is_told_so(tmp_path, quick):
    with rig_at(tmp_path) as rig:
        for part in (b"POST /v1/chat/completions HTTP/1.1\r\nHost:", rig.request(rig.chat())[:-5]):
            status, _, _ = rig.raw(part, until_closed=True)
            assert status == 408
        with rig.connect() as sock:
            assert sock.recv(1) == b"", "who says nothing is closed without a word"


def test_the_oldest_who_asks_for_nothing_makes_room(tmp_path, monkeypatch):
    with rig_at(tmp_path) as rig:
        rig.door._most = 20
        idle = [rig.connect() for _ in range(20)]
        wait_until(lambda: rig.door.status()["connections"] == 20, "they are in")
        assert rig.ask(rig.chat())[0] == 200
        assert idle[0].recv(1) == b"", "the oldest was closed"
        for sock in idle:
            sock.close()


# -- requests that are to fool somebody -----------------------------------------------

AUTH = b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
CHAT = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
FORGED = {
    "a length and chunks": (400, b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunks": (411, b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunks in disguise": (411, b"Transfer-Encoding: xchunked\r\n\r\n"),
    "two lengths": (400, b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
    "two lengths in one": (400, b"Content-Length: 3, 3\r\n\r\nabc"),
    "a length with a sign": (400, b"Content-Length: +3\r\n\r\nabc"),
    "a negative length": (400, b"Content-Length: -1\r\n\r\n"),
    "a length in hex": (400, b"Content-Length: 0x3\r\n\r\nabc"),
    "a length without end": (400, b"Content-Length: 99999999999999999999\r\n\r\n"),
    "a length too large": (413, b"Content-Length: 99999999999\r\n\r\n"),
    "a blank before the colon": (400, b"Content-Length : 3\r\n\r\nabc"),
    "a folded header": (400, b"X: a\r\n b: c\r\n\r\n"),
    "a bare line feed": (400, b"X: a\nContent-Length: 3\r\n\r\nabc"),
    "a NUL": (400, b"X: a\0b\r\n\r\n"),
    "no header": (400, b"nonsense\r\n\r\n"),
    "many headers": (431, b"".join(b"X-%d: y\r\n" % n for n in range(100)) + b"\r\n"),
    "a head without end": (431, b"X: " + b"y" * 20000),
    "two tokens": (400, AUTH + b"Content-Length: 0\r\n\r\n"),
    "two hosts": (400, b"Host: b\r\nContent-Length: 0\r\n\r\n"),
    "an expectation": (417, b"Expect: miracles\r\nContent-Length: 3\r\n\r\nabc"),
}


@pytest.mark.parametrize("status, rest", FORGED.values(), ids=FORGED)
def test_a_request_with_two_meanings_is_refused_and_the_connection_closed(rig, status, rest):
    smuggled = rig.request(rig.chat())
    raw = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n" + AUTH + rest + smuggled
    assert rig.raw(raw, until_closed=True)[0] == status
    assert not rig.engine.asked


@pytest.mark.parametrize("line", [
    b"GET http://x/v1/models HTTP/1.1", b"CONNECT x:80 HTTP/1.1", b"GET * HTTP/1.1",
    b"POST //api/chat HTTP/1.1", b"POST /api/./chat HTTP/1.1", b"POST /v1/../api/pull HTTP/1.1",
    b"POST /api/%63hat HTTP/1.1", b"POST /API/chat HTTP/1.1", b"POST /api/chat/ HTTP/1.1",
    b"POST /api/chat;x HTTP/1.1", b"POST /api\\chat HTTP/1.1", b"POST /api/chat%00 HTTP/1.1",
    b"GET /metrics HTTP/1.1", b"GET /slots HTTP/1.1", b"POST /api/push HTTP/1.1",
    b"POST /api/me HTTP/1.1", b"POST /api/signout HTTP/1.1", b"DELETE /api/user/keys/x HTTP/1.1",
    b"POST /api/experimental/web_search HTTP/1.1", b"POST /api/blobs/sha256:00 HTTP/1.1",
    b"POST /api/create HTTP/1.1", b"POST /sleep HTTP/1.1", b"POST /tokenize HTTP/1.1"],
    ids=lambda line: line.split(b" ")[1].decode())
def test_what_is_not_on_the_list_is_not_there(rig, line):
    raw = line + b"\r\nHost: a\r\n" + AUTH + b"Content-Length: 0\r\n\r\n"
    assert rig.raw(raw)[0] in (404, 405)
    assert not rig.engine.asked


@pytest.mark.parametrize("line", [b"GET / HTTP/2.0", b"PRI * HTTP/2.0", b"GET /", b"\x16\x03\x01",
                                  b"GET  / HTTP/1.1", b"G\tT / HTTP/1.1", b"GET / HTTP/1.1 x"],
                         ids=repr)
def test_what_is_no_http_1_1_is_refused(rig, line):
    assert rig.raw(line + b"\r\nHost: a\r\n\r\n", until_closed=True)[0] in (400, 505)


def test_hello_is_open_and_says_nothing(rig):
    for path in ("/", "/health"):
        assert rig.ask(method="GET", path=path, token="")[1] == b"b9agent is running"
    with rig.connect() as sock:
        sock.sendall(b"HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        got = b""
        while True:
            data = sock.recv(1000)
            if not data:
                break
            got += data
    assert got.startswith(b"HTTP/1.1 200") and got.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("path", ["/v1/models", "/api/tags", "/api/version", "/v1/models/m"])
def test_without_a_token_nothing_is_told(rig, path):
    for wrong in ("", "wrong", TOKEN + "x", TOKEN[:-1]):
        status, headers, _ = rig.raw(rig.request(None, path=path, method="GET", token=wrong))
        assert status == 401 and headers["www-authenticate"].startswith("Bearer")


def test_a_body_is_not_read_before_its_sender_is_known(rig):
    head = rig.request(b"x" * 100, token="wrong").partition(b"\r\n\r\n")[0]
    head = head.replace(b"Content-Length: 100", b"Content-Length: 30000000")
    assert rig.raw(head + b"\r\n\r\n")[0] == 401
    status = rig.raw(head.replace(b"Bearer wrong", b"Bearer x") + b"\r\nExpect: 100-continue\r\n\r\n")
    assert status[0] == 401


# -- models ------------------------------------------------------------------------------

SCOPED = """tenants:
  - name: t
    token_sha256: %s
    models: [m, "small*"]
  - name: other
    token_sha256: %s
    models: ["secret*"]
"""


def test_a_model_of_others_is_not_there(tmp_path):
    with rig_at(tmp_path, tenants=SCOPED % (b9agent.token_hash(TOKEN), b9agent.token_hash("y" * 40)),
                engine="ollama", models=("m:latest", "small:1b", "secret:latest")) as rig:
        listed = rig.ask(method="GET", path="/v1/models")[1]["data"]
        assert sorted(each["id"] for each in listed) == ["m:latest", "small:1b"]
        for name in ("secret", "secret:latest", "SECRET", "library/secret", " secret ",
                     "registry.ollama.ai/library/secret:latest", "secret:local", "missing", "",
                     "m:cloud", "m:120b-cloud", "secret:cloud:local", "../m", "m\0", "m" * 600):
            for path in ("/v1/chat/completions", "/api/chat", "/api/generate", "/api/embed"):
                body = dict(rig.chat(), model=name)
                if path != "/v1/chat/completions":
                    body = {"model": name, "messages": [{"role": "user", "content": "x"}]} if (
                        "chat" in path) else {"model": name, "prompt": "x"} if (
                        "generate" in path) else {"model": name, "input": "x"}
                assert rig.ask(body, path=path)[0] in (400, 404), (name, path)
        assert not rig.engine.asked


def test_one_model_has_many_spellings_and_the_answer_has_the_one_that_was_sent(tmp_path):
    def script(asked, sock):
        sock.sendall(whole({"model": "m:latest", "message": {"role": "assistant", "content": "Hi"},
                            "done": True, "done_reason": "stop", "prompt_eval_count": 7,
                            "eval_count": 2}))
    with rig_at(tmp_path, engine="ollama", models=("m:latest",), loaded=("m:latest",),
                script=script) as rig:
        for name in ("m", "M:Latest", "library/m", "registry.ollama.ai/library/m:latest", "m:local"):
            status, answer = rig.ask({"model": name, "stream": False, "messages": [
                {"role": "user", "content": "x"}]}, path="/api/chat")
            assert status == 200 and answer["model"] == name
        assert {asked.body["model"] for asked in rig.engine.asked} == {"m:latest"}


def test_managing_models_wants_admin_and_goes_to_ollama_alone(tmp_path):
    plain = (TENANTS % b9agent.token_hash(TOKEN)).replace("admin: true", "admin: false")
    with rig_at(tmp_path, tenants=plain, engine="ollama") as rig:
        for method, path, body in (("POST", "/api/pull", {"model": "m"}),
                                   ("DELETE", "/api/delete", {"model": "m"}),
                                   ("POST", "/api/copy", {"source": "m", "destination": "n"})):
            assert rig.ask(body, path=path, method=method)[0] == 403
        assert not rig.engine.asked


@pytest.mark.parametrize("admin", [True, False])
def test_an_admin_and_the_gateway_load_for_good_and_unload(tmp_path, admin):
    tenants = (TENANTS % b9agent.token_hash(TOKEN)).replace("admin: true", f"admin: {str(admin).lower()}")

    def script(_asked, sock):
        sock.sendall(whole({"model": "m", "response": "", "done": True, "done_reason": "unload"}))
    with rig_at(tmp_path, tenants=tenants, engine="ollama", models=("m:latest",), loaded=("m:latest",),
                gateway=("127.0.0.1",), script=script) as rig:
        def keep(seconds, token=TOKEN):
            status, _ = rig.ask({"model": "m", "prompt": "", "stream": False, "keep_alive": seconds},
                                path="/api/generate", token=token)
            return status, rig.engine.asked[-1].body.get("keep_alive") if rig.engine.asked else None
        assert keep(0, "") == (200, 0), "the gateway's router unloads"
        assert keep(-1) == (200, -1 if admin else None)
        assert keep(0) == ((200, 0) if admin else (403, None))


def test_an_admin_pulls_and_hears_of_it_as_it_goes(tmp_path):
    lines = [b'{"status":"pulling manifest"}\n', b'{"status":"success"}\n']

    def script(_asked, sock):
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
                     b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(map(chunk, lines))
                     + b"0\r\n\r\n")
    with rig_at(tmp_path, engine="ollama", script=script) as rig:
        status, body = rig.ask({"model": "Library/M"}, path="/api/pull")
        assert status == 200 and body == b"".join(lines)
        assert rig.engine.asked[0].body == {"model": "m:latest"}
        for bad in ({"model": "m", "insecure": True}, {"model": "evil.example/a/b"},
                    {"model": "m:cloud"}, {"model": "m", "x": 1}, {"model": ""}, {}, [], "x"):
            assert rig.ask(bad, path="/api/pull")[0] == 400, bad
        assert len(rig.engine.asked) == 1


# -- limits ---------------------------------------------------------------------------------

def limited(**limits):
    return TENANTS % b9agent.token_hash(TOKEN) + "".join(
        f"    {name}: {value}\n" for name, value in limits.items())


def test_a_limit_that_is_reached_is_a_429_that_says_which(tmp_path):
    with rig_at(tmp_path, tenants=limited(requests_per_minute=2)) as rig:
        assert [rig.ask(rig.chat())[0] for _ in range(2)] == [200, 200]
        status, headers, body = rig.raw(rig.request(rig.chat()))
        assert status == 429 and 0 < int(headers["retry-after"]) <= 60
        assert b"requests_per_minute" in body
        assert len(rig.engine.asked) == 2


def test_money_that_is_spent_is_a_402_in_the_middle_of_a_stream_too(tmp_path, quick):
    def script(_asked, sock):
        sock.sendall(STREAM_HEAD + chunk(token()))
        return rig.engine.wait_until_left(sock)
    # A GPU second costs 1 dollar: a second and a half of it is there.
    with rig_at(tmp_path, tenants=limited(usd_per_day=1.5), usd=1.0, script=script) as rig:
        events = events_of(rig.ask(rig.chat(True))[1])
        assert "usd_per_day" in json.dumps(events[-1]) or "usd" in json.dumps(events[-1])
        assert rig.engine.left.wait(PATIENCE_S)
        assert rig.used()["usd"] <= 1.5
        assert rig.ask(rig.chat(True))[0] == 402


def test_concurrent_requests_are_limited_and_given_back(tmp_path):
    go_on = threading.Event()

    def script(_asked, sock):
        assert go_on.wait(PATIENCE_S)
        sock.sendall(whole(COMPLETION))
    with rig_at(tmp_path, tenants=limited(concurrent_requests=2), script=script) as rig:
        socks = [rig.connect() for _ in range(2)]
        for sock in socks:
            sock.sendall(rig.request(rig.chat()))
        wait_until(lambda: len(rig.engine.asked) == 2, "both are at the engine")
        assert rig.ask(rig.chat())[0] == 429
        go_on.set()
        assert [read_answer(sock)[0] for sock in socks] == [200, 200]
        assert rig.ask(rig.chat())[0] == 200
        for sock in socks:
            sock.close()


def test_the_queue_is_bounded_and_fair(tmp_path):
    """One tenant's flood does not hold up another's first request."""
    tenants = "tenants:\n" + "".join(
        f"  - name: {name}\n    token_sha256: {b9agent.token_hash(name * 40)}\n" for name in "ab")
    go_on = threading.Semaphore(0)

    def script(_asked, sock):
        assert go_on.acquire(timeout=PATIENCE_S)
        sock.sendall(whole(COMPLETION))
    with rig_at(tmp_path, tenants=tenants, script=script, slots=1,
                limits=b9agent.DoorLimits(queue=6)) as rig:
        socks, order = [], []

        def send(name):
            sock = rig.connect()
            sock.sendall(rig.request(dict(rig.chat(), seed=ord(name)), token=name * 40))
            socks.append(sock)
        send("a")
        wait_until(lambda: len(rig.engine.asked) == 1, "the first is at the engine")
        for number in range(5):
            send("a")
            wait_until(lambda: rig.door.status()["waiting"] == number + 1, "it waits")
        send("b")
        wait_until(lambda: rig.door.status()["waiting"] == 6, "it waits")
        status, body = rig.ask(rig.chat(), token="a" * 40)
        assert status == 429 and "6" in body["error"]["message"]
        for _ in socks:
            go_on.release()
        assert [read_answer(sock)[0] for sock in socks] == [200] * 7
        order = [chr(asked.body["seed"]) for asked in rig.engine.asked]
        assert "b" in order[1:3], order
        for sock in socks:
            sock.close()


def test_who_waits_too_long_is_told_so(tmp_path, quick):
    with rig_at(tmp_path, slots=1, limits=b9agent.DoorLimits(queue_wait_s=0.3)) as rig:
        rig.engine.script = lambda _asked, sock: rig.engine.wait_until_left(sock)
        with rig.connect() as first:
            first.sendall(rig.request(rig.chat()))
            wait_until(lambda: rig.engine.asked, "it is at the engine")
            status, headers, body = rig.raw(rig.request(rig.chat()))
            assert status == 503 and "retry-after" in headers and b"0.3 s" in body


def test_who_does_not_say_how_long_an_answer_may_be_gets_the_room_that_is_left(rig):
    """vLLM refuses a prompt and max_tokens that are more than the context, which nobody asked for."""
    body = rig.chat()
    del body["max_tokens"]
    for text, least, most in (("x" * 100, 7800, 8192), ("x" * 12000, 3000, 5000), ("x" * 60000, 1024, 1024)):
        rig.ask(dict(body, messages=[{"role": "user", "content": text}]))
        assert least <= rig.engine.asked[-1].body["max_tokens"] <= most
        rig.door._prompts.clear()
    rig.target = rig.target._replace(engine=b9agent.ENGINE_BY_NAME["llama-server"])
    rig.ask(dict(body, messages=[{"role": "user", "content": "x" * 12000}]))
    assert rig.engine.asked[-1].body["max_tokens"] == 8192


# -- identities that come with the address -----------------------------------------------------

def test_a_web_page_cannot_use_the_identity_of_an_address(tmp_path):
    with rig_at(tmp_path, gateway=("127.0.0.1",)) as rig:
        assert rig.ask(rig.chat(), token="")[0] == 200
        for name, value in (("Origin", "http://evil.example"), ("Sec-Fetch-Site", "cross-site")):
            assert rig.ask(rig.chat(), token="", headers=[(name, value)])[0] == 403
        raw = rig.request(rig.chat(), token="").replace(b"Host: 127.0.0.1", b"Host: evil.example")
        assert rig.raw(raw)[0] == 403
        assert rig.ask(rig.chat(), headers=[("Origin", "http://app.example")])[0] == 200


def test_the_tailnets_identity_counts_for_other_machines_alone(tmp_path):
    """A user of this machine can come from its own tailnet address."""
    tenants = "tenants:\n  - name: t\n    tailnet: ada@example.com\n"
    ada = b9agent.WhoIs("ada@example.com", (), "box")
    with rig_at(tmp_path, tenants=tenants, whois=lambda host, port: ada, on_tailnet=True) as rig:
        assert rig.ask(rig.chat(), token="")[0] == 401
        with rig.connect("127.0.0.2") as sock:  # as another machine: not the listener's address
            sock.sendall(rig.request(rig.chat(), token=""))
            assert read_answer(sock)[0] == 200


# -- what fresh eyes found ---------------------------------------------------------------------

def test_who_runs_before_the_end_of_its_load_is_told_is_billed_for_all_of_it(tmp_path, monkeypatch):
    """The engine counts as running some time before wake() returns."""
    monkeypatch.setattr(b9agent, "RELAY_SWEEP_S", 0.05)
    at_work, told = threading.Event(), threading.Event()

    def script(_asked, sock):
        at_work.set()
        assert told.wait(PATIENCE_S)
        time.sleep(0.6)  # of work, with all that it is billed for
        sock.sendall(whole(COMPLETION))
    with rig_at(tmp_path, script=script, loaded=()) as rig:
        rig.target = rig.target._replace(state="asleep")
        loaded = rig.door._loaded

        def on_wake(_model):
            rig.target = rig.target._replace(state="running")
            assert at_work.wait(PATIENCE_S), "the sweep sent it"
            return 0.1

        def then(*given):
            loaded(*given)
            told.set()
        rig.inference.on_wake, rig.door._loaded = on_wake, then
        assert rig.ask(rig.chat())[0] == 200
        rig.settled()
        assert rig.used()["gpu_seconds"] > 0.5


def test_what_an_engine_worked_on_is_not_asked_for_again(tmp_path, monkeypatch):
    asked = []

    def script(_asked, sock):
        asked.append(1)
        if len(asked) == 2:
            time.sleep(1.2)
            return True  # it dies, and has answered nothing
        sock.sendall(whole(COMPLETION))
    with rig_at(tmp_path, script=script) as rig:
        assert rig.ask(rig.chat())[0] == 200
        assert (rig.ask(rig.chat())[0], len(asked)) == (502, 2)


def test_a_stream_that_a_limit_ends_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(b9agent, "RELAY_SWEEP_S", 0.05)
    monkeypatch.setattr(b9agent, "GPU_SLICE_S", 0.6)

    def script(_asked, sock):
        sock.sendall(STREAM_HEAD + chunk(token()))
        sock.recv(1)  # until the door leaves
        return True
    with rig_at(tmp_path, script=script, tenants=TENANTS % b9agent.token_hash(TOKEN)
                + "    gpu_seconds_per_day: 1.2\n") as rig:
        status, body = rig.ask(rig.chat(True))
        error = events_of(body)[-1]["error"]
        assert (status, error["code"], error["type"]) == (200, "gpu_seconds_per_day", "rate_limit_error")


def test_an_answer_that_nobody_reads_is_charged_until_it_is_read(tmp_path):
    large = dict(COMPLETION, system_fingerprint="x" * (24 << 20))
    with rig_at(tmp_path, script=lambda _asked, sock: sock.sendall(whole(large))) as rig:
        with rig.connect() as sock:
            sock.sendall(rig.request(rig.chat()))
            rig.settled()
            wait_until(lambda: rig.door._bodies_bytes > 1 << 20, "it is held, and counted")
            assert len(read_answer(sock)[2]) > 24 << 20
        wait_until(lambda: rig.door._bodies_bytes == 0, "it is read")
        with rig.connect() as sock:
            sock.sendall(rig.request(rig.chat()))
            rig.settled()
        wait_until(lambda: rig.door._bodies_bytes == 0, "nobody reads it")


def test_a_stream_whose_end_came_is_whole_however_the_engine_closes(tmp_path):
    lines = AuditLines()
    with rig_at(tmp_path, audit=lines, script=lambda _asked, sock: sock.sendall(
            STREAM_HEAD + chunk(token()) + chunk(STOP) + chunk(DONE)) or True) as rig:
        status, body = rig.ask(rig.chat(True))
        assert status == 200 and events_of(body)[-1] == "[DONE]"
        rig.settled()
        wait_until(lambda: lines.of("request"), "it is recorded")
        assert [line["outcome"] for line in lines.of("request")] == ["ok"]


def test_a_management_request_that_fails_has_one_line(tmp_path):
    lines = AuditLines()
    with rig_at(tmp_path, engine="ollama", audit=lines, script=lambda _asked, _sock: True) as rig:
        assert rig.ask({"source": "m", "destination": "n"}, path="/api/copy")[0] == 502
        wait_until(lambda: lines.lines, "it is recorded")
        assert rig.ask(path="/", method="GET")[0] == 200
        assert len(lines.lines) == 1, lines.lines


def test_a_client_of_http_1_0_is_not_told_to_go_on(rig):
    raw = rig.request(rig.chat(), headers=(("Expect", "100-continue"),)).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    head, _, body = raw.partition(b"\r\n\r\n")
    with rig.connect() as sock:
        sock.sendall(head + b"\r\n\r\n")
        sock.sendall(body)
        assert read_answer(sock)[0] == 200


# -- TLS -----------------------------------------------------------------------------------------

TLS_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tls")


@pytest.fixture
def tls_rig(tmp_path, quick):
    key = tmp_path / "server.key"
    with open(os.path.join(TLS_FOLDER, "server.key")) as source:
        key.touch(0o600)
        key.write_text(source.read())
    made = b9agent.ServerTls(os.path.join(TLS_FOLDER, "server.pem"), str(key), lambda *a, **b: None)
    with rig_at(tmp_path, tls=made) as rig:
        yield rig


def tls_client(rig, **given):
    context = ssl.create_default_context(cafile=os.path.join(TLS_FOLDER, "ca.pem"))
    for name, value in given.items():
        setattr(context, name, value)
    return context.wrap_socket(rig.connect(), server_hostname="localhost")


def test_requests_and_streams_pass_over_tls(tls_rig):
    assert tls_rig.listener.url.startswith("https://")
    for stream in (False, True):
        with tls_client(tls_rig) as sock:
            sock.sendall(tls_rig.request(tls_rig.chat(stream)))
            status, _, body = read_answer(sock)
        assert status == 200 and (b"[DONE]" if stream else b"Hi") in body


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_over_tls_is_said_where_the_connection_is_the_end(tls_rig, stream):
    context = ssl.create_default_context(cafile=os.path.join(TLS_FOLDER, "ca.pem"))
    with context.wrap_socket(tls_rig.connect(), server_hostname="localhost",
                             suppress_ragged_eofs=False) as sock:
        sock.sendall(tls_rig.request(tls_rig.chat(stream)).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        assert (b"[DONE]" if stream else b"Hi") in read_answer(sock, until_closed=True)[2]


def test_a_body_of_many_tls_records_arrives_whole(tls_rig):
    with tls_client(tls_rig) as sock:
        text = "x" * 900000
        sock.sendall(tls_rig.request(dict(tls_rig.chat(), messages=[
            {"role": "user", "content": text}])))
        assert read_answer(sock)[0] == 200
    assert tls_rig.engine.asked[0].body["messages"][0]["content"] == text


def test_a_slow_reader_over_tls_gets_all_of_it(tls_rig):
    filler = token("x" * 60000)

    def script(_asked, sock):
        sock.sendall(STREAM_HEAD + b"".join(chunk(filler) for _ in range(100)))
        sock.sendall(chunk(usage(7, 100)) + chunk(DONE) + b"0\r\n\r\n")
    tls_rig.engine.script = script
    with tls_client(tls_rig) as sock:
        sock.sendall(tls_rig.request(tls_rig.chat(True)))
        wait_until(lambda: tls_rig.engine.asked, "the engine was asked")
        assert len(events_of(read_answer(sock)[2])) == 101


def test_plain_http_at_a_tls_port_is_told_so(tls_rig):
    status, _, body = tls_rig.raw(tls_rig.request(tls_rig.chat()), until_closed=True)
    assert status == 400 and b"https" in body
    assert not tls_rig.engine.asked


@pytest.mark.parametrize("said", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01", b"\x16" + b"x" * 3000],
                         ids=repr)
def test_a_handshake_that_stalls_or_is_nonsense_is_closed_and_holds_nobody_up(tls_rig, said):
    with tls_rig.connect() as stalled:
        stalled.sendall(said)
        with tls_client(tls_rig) as sock:
            sock.sendall(tls_rig.request(tls_rig.chat()))
            assert read_answer(sock)[0] == 200
        stalled.settimeout(PATIENCE_S)
        with contextlib.suppress(ConnectionError):
            while stalled.recv(1000):
                pass
    wait_until(lambda: not tls_rig.door.status()["connections"], "all are closed")


def test_old_tls_is_refused(tls_rig):
    with pytest.raises((ssl.SSLError, OSError)), pytest.warns(DeprecationWarning):
        tls_client(tls_rig, minimum_version=ssl.TLSVersion.TLSv1,
                   maximum_version=ssl.TLSVersion.TLSv1_1)


# -- the worst moments ----------------------------------------------------------------------------

def test_a_body_that_came_before_its_sender_was_known_is_read_to_its_end(tmp_path):
    asked, known = threading.Event(), threading.Event()

    def whois(_host, _port):
        asked.set()
        assert known.wait(PATIENCE_S)
        return b9agent.WhoIs("ada@example.com", (), "laptop")
    with rig_at(tmp_path, whois=whois, on_tailnet=True,
                tenants="tenants:\n  - name: t\n    tailnet: ada@example.com\n") as rig:
        with rig.connect("127.0.0.2") as sock:
            sock.sendall(rig.request(rig.chat(user="y" * 200000), token=""))
            assert asked.wait(PATIENCE_S)
            client, = rig.door._clients
            wait_until(lambda: not client.mask, "it is not read from before its sender is known")
            known.set()
            assert read_answer(sock)[0] == 200


def test_who_was_refused_while_the_answer_was_written_gets_no_second_one(tmp_path, monkeypatch):
    """Money runs out, or the agent stops, while a large answer is turned over beside the loop."""
    real, goes_on = b9agent.whole_answer, threading.Event()

    def held(*given):
        assert goes_on.wait(PATIENCE_S)
        return real(*given)
    monkeypatch.setattr(b9agent, "whole_answer", held)
    monkeypatch.setattr(b9agent, "RELAY_SWEEP_S", 0.05)
    monkeypatch.setattr(b9agent, "GPU_SLICE_S", 0.6)
    large = dict(COMPLETION, system_fingerprint="x" * (2 * b9agent.DOOR_BIG_BYTES))
    with rig_at(tmp_path, script=lambda _asked, sock: sock.sendall(whole(large)),
                tenants=TENANTS % b9agent.token_hash(TOKEN) + "    gpu_seconds_per_day: 1.2\n"
                ) as rig, rig.connect() as sock:
        sock.sendall(rig.request(rig.chat()))
        assert read_answer(sock)[0] == 429
        goes_on.set()
        rig.settled()
        sock.sendall(rig.request(path="/", method="GET"))
        assert read_answer(sock)[2] == b"b9agent is running"


def test_without_a_descriptor_for_the_engine_a_request_ends_and_nothing_is_left_of_it(
        tmp_path, monkeypatch):
    real, none_left = b9agent.EngineWire, [True]

    def wire(*given):
        if none_left:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(*given)
    monkeypatch.setattr(b9agent, "EngineWire", wire)
    goes_on = threading.Event()

    def script(_asked, sock):
        assert goes_on.wait(PATIENCE_S)
        sock.sendall(whole(COMPLETION))
        return True
    with rig_at(tmp_path, slots=1, script=script) as rig:
        status, headers, body = rig.raw(rig.request(rig.chat()))
        assert status == 503 and "retry-after" in headers and b"Too many open files" in body
        none_left.clear()
        with rig.connect() as first, rig.connect() as second:
            first.sendall(rig.request(rig.chat()))
            wait_until(lambda: rig.engine.asked, "it is at the engine")
            second.sendall(rig.request(rig.chat()))
            wait_until(lambda: rig.door.status()["waiting"], "the other waits")
            none_left.append(True)  # its turn comes beside any request
            goes_on.set()
            assert read_answer(first)[0] == 200
            assert read_answer(second)[0] in (502, 503)  # 502: a kept connection was tried first
        rig.settled()
        assert rig.used()["running"] == 0


# -- what a newcomer tripped over ------------------------------------------

def test_short_prompts_do_not_make_room_for_long_ones(tmp_path):
    with rig_at(tmp_path, tenants=limited(max_context_tokens=500)) as rig:
        def ask(words):
            return rig.ask(rig.chat(messages=[{"role": "user", "content": "a " * words}]))
        assert [ask(1)[0] for _ in range(5)] == [200] * 5
        status, answer = ask(1500)
        assert status == 400 and answer["error"]["code"] == "max_context_tokens"
        assert ask(400)[0] == 200  # 800 bytes, which may be some 200 tokens


def test_who_leaves_with_the_last_word_has_had_all_of_it(tmp_path):
    def script(asked, sock):
        sock.sendall(STREAM_HEAD + chunk(token()) + chunk(STOP) + chunk(usage(7, 1)) + chunk(DONE))
        return rig.engine.wait_until_left(sock)  # the end of its answer is on its way
    with rig_at(tmp_path, script=script) as rig:
        sock = rig.connect()
        sock.sendall(rig.request(rig.chat(True)))
        said = b""
        while b"[DONE]" not in said:
            said += sock.recv(65536)
        sock.close()
        rig.settled()
        codes = [line for line in rig.tally.lines() if line.startswith("b9agent_door_requests_total{")]
        assert len(codes) == 1 and 'code="200"' in codes[0]


def test_of_a_model_nothing_is_said_while_no_engine_runs(rig):
    rig.target = rig.target._replace(state="stopped", models=(), loaded=())
    assert rig.ask(path="/api/show", body={"model": "m"})[0] == 503
    assert rig.ask(path="/v1/models/m", method="GET")[0] == 503


def test_a_model_that_a_starting_engine_has_not_told_of_yet_is_not_said_to_be_missing(tmp_path):
    with rig_at(tmp_path, tenants=limited(models="m*")) as rig:
        rig.target = rig.target._replace(state="starting", models=(), loaded=())
        status, headers, body = rig.raw(rig.request(rig.chat()))
        assert (status, headers["retry-after"]) == (503, "5") and b"starting" in body
        assert rig.ask(rig.chat(model="other"))[0] == 404


def tenants_of(*names, more=""):
    return "tenants:\n" + "".join(
        f"  - name: {name}\n    token_sha256: {b9agent.token_hash(name * 40)}\n{more}"
        for name in names)


def test_in_a_full_queue_whoever_has_most_there_makes_room_for_one_who_has_less(tmp_path):
    goes_on = threading.Event()

    def script(_asked, sock):
        assert goes_on.wait(PATIENCE_S)
        sock.sendall(whole(COMPLETION))
    with rig_at(tmp_path, tenants=tenants_of("a", "b"), script=script, slots=1,
                limits=b9agent.DoorLimits(queue=4)) as rig, contextlib.ExitStack() as stack:
        def send(name):
            sock = stack.enter_context(rig.connect())
            sock.sendall(rig.request(rig.chat(), token=name * 40))
            return sock
        floods = []
        for number in range(5):
            floods.append(send("a"))
            wait_until(lambda: rig.door.status()["waiting"] == number, "it waits, or runs")
        others = [send("b"), send("b")]
        status, headers, body = read_answer(floods[-1])
        assert status == 429 and headers["retry-after"] and b"queue_full" in body
        assert read_answer(floods[-2])[0] == 429
        status, body = rig.ask(rig.chat(), token="b" * 40)
        assert status == 429 and body["error"]["code"] == "queue_full"  # now both have two
        goes_on.set()
        assert [read_answer(sock)[0] for sock in floods[:3] + others] == [200] * 5


def test_a_limit_that_is_reached_at_the_turn_of_a_request_says_which_and_when_to_come(tmp_path):
    """The last GPU second is enough to be let in, and not to begin on four GPUs."""
    with rig_at(tmp_path, gpus=4,
                tenants=tenants_of("a", more="    gpu_seconds_per_day: 2\n")) as rig:
        status, headers, body = rig.raw(rig.request(rig.chat(), token="a" * 40))
        assert status == 429 and int(headers["retry-after"]) > 0
        assert json.loads(body)["error"]["details"]["limit"] == 2


def test_large_bodies_of_one_tenant_leave_room_for_those_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(b9agent, "RELAY_BODIES_MAX_BYTES", 400000)
    with rig_at(tmp_path, tenants=tenants_of("a", "b")) as rig, contextlib.ExitStack() as stack:
        waiting = []
        for _ in range(4):
            waiting.append(stack.enter_context(rig.connect()))
            raw = rig.request(rig.chat(user="y" * 90000), token="a" * 40)
            waiting[-1].sendall(raw[:-1])  # its last byte does not come
        status, headers, _ = read_answer(waiting[2])
        assert status == 503 and headers["retry-after"]
        assert rig.ask(rig.chat(user="y" * 90000), token="b" * 40)[0] == 200
        waiting[0].sendall(b"}")
        assert read_answer(waiting[0])[0] == 200
        # An answered request takes no room, though its connection is kept.
        assert rig.ask(rig.chat(user="y" * 90000), token="a" * 40)[0] == 200


def test_a_prompt_teaches_nothing_of_the_prompts_of_others_nor_makes_room_for_a_longer_one(tmp_path):
    counted = []

    def script(_asked, sock):
        sock.sendall(whole(dict(COMPLETION, usage={
            "prompt_tokens": counted[-1], "completion_tokens": 2})))
    with rig_at(tmp_path, script=script, tenants=tenants_of(
            "a", "b", more="    max_context_tokens: 1000\n")) as rig:
        long = rig.chat(messages=[{"role": "user", "content": "x" * 3000}])
        for name, body, said in (("a", rig.chat(), 100000), ("b", long, 700), ("a", rig.chat(), 1)):
            counted.append(said)
            assert rig.ask(body, token=name * 40)[0] == 200
        longer = rig.chat(messages=[{"role": "user", "content": "x" * 8000}])
        status, body = rig.ask(longer, token="a" * 40)
        assert status == 400 and body["error"]["code"] == "max_context_tokens"


def test_an_answer_is_no_longer_than_the_context_that_a_tenant_may_use(tmp_path):
    with rig_at(tmp_path, tenants=tenants_of("a", more="    max_context_tokens: 1000\n")) as rig:
        assert rig.ask(rig.chat(max_tokens=100000), token="a" * 40)[0] == 200
        assert rig.ask(rig.chat(max_tokens=5), token="a" * 40)[0] == 200
        first, second = (asked.body["max_tokens"] for asked in rig.engine.asked)
        assert 500 < first < 1000 and second == 5


def test_who_lingers_after_a_refusal_makes_room_for_others(tmp_path):
    with rig_at(tmp_path) as rig, contextlib.ExitStack() as stack:
        rig.door._most = 4
        for _ in range(4):
            sock = stack.enter_context(rig.connect())
            sock.sendall(rig.request(rig.chat(), token="")[:-1])
            assert read_answer(sock)[0] == 401
        assert rig.ask(rig.chat())[0] == 200


def test_an_engine_that_never_ends_after_an_error_is_left(rig):
    rig.engine.script = lambda _asked, sock: (
        sock.sendall(STREAM_HEAD + chunk(token()) + chunk(event({"error": {"message": "no"}}))),
        rig.engine.wait_until_left(sock))
    status, _, body = rig.raw(rig.request(rig.chat(stream=True)))
    assert status == 200 and events_of(body)[-1]["error"]["message"] == "no"
    assert rig.engine.left.wait(PATIENCE_S)
    rig.settled()
    assert rig.used()["completion_tokens"] == 1


def test_any_number_of_words_before_an_answer_is_passed_over(rig):
    rig.engine.script = lambda _asked, sock: sock.sendall(
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3000 + whole(COMPLETION))
    assert rig.ask(rig.chat())[0] == 200


@pytest.mark.parametrize("place, what, stream", [
    (b9agent, "make_flow", True), (b9agent, "whole_answer", False), (b9agent._Job, "on_head", True),
    (b9agent._Job, "on_body", False), (b9agent._Job, "on_body", True)])
def test_a_defect_of_ours_is_an_answer_at_once(rig, monkeypatch, place, what, stream):
    def broken(*_given):
        raise RuntimeError("a defect")
    monkeypatch.setattr(place, what, broken)
    status, answer = rig.ask(rig.chat(stream=stream))
    assert status in (500, 502) or what == "on_body" and "error" in events_of(answer)[-1]
    rig.settled()
    assert rig.log.defects.pop() and rig.used()["running"] == 0


def test_a_defect_in_letting_somebody_in_costs_him_alone(rig, monkeypatch):
    def broken(*_given):
        raise RuntimeError("a defect")
    with monkeypatch.context() as patch:
        patch.setattr(b9agent, "ClientWire", broken)
        with rig.connect() as sock:
            assert sock.recv(1) == b""
    assert rig.ask(rig.chat())[0] == 200 and "a defect" in rig.log.defects.pop()


def test_listeners_that_have_ended_are_not_kept(rig):
    """The tailnet's address may come and go for years."""
    for _ in range(5):
        listener = rig.door.listen("127.0.0.1", 0)
        listener.start()
        listener.stop()
        wait_until(lambda: listener.dead, "it has ended")
    assert len(rig.door._listeners) <= 2


def test_a_stop_ends_a_pull_in_good_form(tmp_path):
    def script(_asked, sock):
        sock.sendall(STREAM_HEAD + chunk(b'{"status":"pulling"}\n'))
        return rig.engine.wait_until_left(sock)
    with rig_at(tmp_path, engine="ollama", script=script) as rig, rig.connect() as sock:
        sock.sendall(rig.request({"model": "m"}, path="/api/pull"))
        wait_until(lambda: rig.door.errands, "it is at the engine")
        wait_until(lambda: any(each._status for each in rig.door.errands), "it has begun")
        rig.door.stop()
        rig.door.stop = lambda: None  # once
        body = read_answer(sock)[2]
        assert "stopped" in json.loads(body.split(b"\n")[1])["error"]


def test_an_engine_that_answers_no_list_holds_up_nobody_elses_identification(tmp_path):
    def whois(_host, _port):
        return b9agent.WhoIs("ada@example.com", (), "laptop")

    def script(asked, sock):
        if asked.path == "/api/tags":
            return rig.engine.wait_until_left(sock)
        sock.sendall(whole({"message": {"content": "x"}, "done": True}))
    tenants = tenants_of("a") + "  - name: ada\n    tailnet: ada@example.com\n"
    with rig_at(tmp_path, engine="ollama", models=("m:latest",), loaded=("m:latest",),
                script=script, whois=whois, on_tailnet=True, tenants=tenants
                ) as rig, contextlib.ExitStack() as stack:
        for _ in range(12):
            sock = stack.enter_context(rig.connect())
            sock.sendall(rig.request(path="/api/tags", method="GET", token="a" * 40))
        wait_until(lambda: rig.engine.asked, "the engine is asked")
        with rig.connect("127.0.0.2") as other:
            other.sendall(rig.request(rig.chat(), token=""))
            assert read_answer(other)[0] == 200
        waiting = [asked for asked in rig.engine.asked if asked.path == "/api/tags"]
        assert len(waiting) < 12, "it had to wait until lists were given up"
        rig.engine.close()


# -- what a front of Ollama has to design around -----------------------------------------------------

def ollama_answer(asked, sock):
    sock.sendall(whole({"model": asked.body["model"], "message": {"role": "assistant", "content": "Hi"},
                        "done": True, "done_reason": "stop", "prompt_eval_count": 7, "eval_count": 2}))


def test_requests_for_a_loaded_model_wait_here_and_not_in_ollama(tmp_path):
    """Its own bound counts only those that need a load."""
    goes_on = threading.Event()

    def script(asked, sock):
        assert goes_on.wait(PATIENCE_S)
        ollama_answer(asked, sock)
    with rig_at(tmp_path, engine="ollama", models=("m:latest", "other:latest"), loaded=("m:latest",), slots=1,
                script=script, limits=b9agent.DoorLimits(queue=2)) as rig, contextlib.ExitStack() as stack:
        def send(model="m"):
            sock = stack.enter_context(rig.connect())
            sock.sendall(rig.request({"model": model, "stream": False, "messages": [
                {"role": "user", "content": "x"}]}, path="/api/chat"))
            return sock
        socks = [send()]  # alone: it waits, too, until somebody has seen that the model is there
        wait_until(lambda: rig.engine.asked, "the engine has one")
        socks += [send() for _ in range(2)]
        wait_until(lambda: rig.door.status()["waiting"] == 2, "two wait")
        assert len(rig.engine.asked) == 1
        assert read_answer(send())[0] == 429, "and no more than the queue holds"
        goes_on.set()
        assert [read_answer(sock)[0] for sock in socks] == [200] * 3


def test_answers_have_numbers_of_their_own(tmp_path):
    """Ollama's own have one of 999."""
    with rig_at(tmp_path, engine="ollama", models=("m:latest",), script=ollama_answer) as rig:
        found = {rig.ask(rig.chat())[1]["id"] for _ in range(20)}
        assert len(found) == 20


def test_no_cookie_and_no_other_word_of_the_client_goes_to_an_ollama(tmp_path):
    """To a model of ollama.com it would pass them on."""
    with rig_at(tmp_path, engine="ollama", models=("m:latest",), script=ollama_answer) as rig:
        assert rig.ask({"model": "m", "stream": False, "messages": [{"role": "user", "content": "x"}]},
                       path="/api/chat", headers=[("Cookie", "a=b"), ("Origin", "http://x")])[0] == 200
        assert not {"cookie", "origin", "authorization"} & rig.engine.asked[0].headers.keys()
