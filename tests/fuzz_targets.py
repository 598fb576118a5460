"""What is fuzzed: ONE table, which test_fuzz.py runs with hypothesis and tests/fuzz with atheris.

A target takes bytes, and holds what must be true of every input: `check` returns where it is, and
raises where it is not.  What may be refused is refused with the exception of the contract, which
`check` takes; any other exception is a finding.  `seeds` are whole, valid inputs, `pieces` what the
grammar gives a meaning to: inputs are seeds with a few pieces put in, taken out or said twice.
"""
import base64
import hashlib
import json
import os
import random
import re
import socket
import struct
import tempfile
import threading
import types
import zlib
from collections import deque
from typing import Any, Callable, NamedTuple, Sequence

import h11
from hypothesis import strategies as st

import b9agent
from b9agent import HttpError, HttpFailure, UsageError

TARGETS = {}


class Target(NamedTuple):
    name: str
    about: str
    seeds: Sequence[bytes]
    pieces: Sequence[bytes]
    check: Callable[[bytes], Any]

    @property
    def inputs(self):
        """A strategy of bytes."""
        cut = st.tuples(st.floats(0, 1), st.integers(0, 24), st.sampled_from(self.pieces)
                        | st.binary(max_size=4), st.sampled_from([1, 1, 1, 2, 40]))
        return st.builds(edited, st.sampled_from(self.seeds), st.lists(cut, max_size=6))


def edited(seed, cuts):
    for place, length, piece, times in cuts:
        at = int(place * len(seed))
        seed = seed[:at] + piece * times + seed[at + length:]
    return seed


def target(name, about, seeds, pieces):
    def add(check):
        TARGETS[name] = Target(name, about, [as_bytes(one) for one in seeds],
                               [as_bytes(one) for one in pieces], check)
        return check
    return add


def as_bytes(value):
    return value if isinstance(value, bytes) else value.encode() if isinstance(
        value, str) else json.dumps(value).encode()


def cuttings(data):
    """The same bytes in pieces: whole, one by one, and cut anywhere, always the same way."""
    dice = random.Random(zlib.crc32(data))
    places = sorted({dice.randrange(len(data) + 1) for _ in range(dice.randrange(1, 6))} | {0, len(data)})
    yield [data]
    yield [data[first:last] for first, last in zip(places, places[1:])]
    if len(data) < 400:
        yield [data[at:at + 1] for at in range(len(data))]


# ---------------------------------------------------------------------- HTTP

class Fed(socket.socket):
    """A socket on which these pieces come, and then the end; what is sent is kept."""

    def __init__(self, pieces=(), ends=True):
        super().__init__(socket.AF_UNIX)
        self.pieces, self.sent, self.ends = deque(filter(None, pieces)), bytearray(), ends

    def recv(self, count, _flags=0):
        if not self.pieces:
            if self.ends:
                return b""
            raise BlockingIOError
        piece = self.pieces.popleft()
        if len(piece) > count:
            self.pieces.appendleft(piece[count:])
        return piece[:count]

    def recv_into(self, buffer):
        piece = self.recv(len(buffer))
        buffer[:len(piece)] = piece
        return len(piece)

    def send(self, data, _flags=0):
        self.sent += data
        return len(data)

    sendall = send

    def ignore(self, *_):
        pass

    settimeout = setsockopt = setblocking = ignore


def h11_body(connection):
    """(the bytes of a body, the event after them)."""
    body, event = b"", connection.next_event()
    while type(event) is h11.Data:
        body += event.data
        event = connection.next_event()
    return body, event


def h11_requests(data):
    """[(method, target, {name: value}, body)] as h11 reads them, until it refuses one."""
    connection, found = h11.Connection(h11.SERVER, 1 << 20), []
    connection.receive_data(data)
    connection.receive_data(b"")
    try:
        while True:
            head = connection.next_event()
            if type(head) is not h11.Request:
                return found
            body, event = h11_body(connection)
            if type(event) not in (h11.EndOfMessage, h11.PAUSED):
                return found
            headers = {}
            for name, value in head.headers:
                headers.setdefault(name.decode(), []).append(value.decode("latin-1"))
            found.append((head.method.decode(), head.target.decode(),
                          {name: ", ".join(values) for name, values in headers.items()}, body))
            connection.send(h11.Response(status_code=404, headers=[("Content-Length", "0")]))
            connection.send(h11.EndOfMessage())
            connection.start_next_cycle()
    except (h11.RemoteProtocolError, h11.LocalProtocolError):
        return found


class Echo(b9agent.Api):
    """Takes anything, and keeps what it was asked."""

    strict, instant = False, ("/i",)

    def __init__(self):
        super().__init__(lambda *_, **__: None)
        self.heard = []
        self._route = b9agent.Route("GET", "/", self.hear, True, "")

    def route(self, method, path):
        return self._route

    def defect(self, error, target):
        raise error

    def answer(self, head, read_body, under_tls=False):
        self.heard.append(None)  # one that is refused
        self.heard[-1] = head.method, head.target, head.headers, read_body()
        return b9agent.Response(200, b"ok", "text/plain")

    def hear(self, request):
        raise AssertionError


def served_by_core(pieces):
    """(requests, what was answered) of the server of section 12."""
    api = Echo()
    server = types.SimpleNamespace(api=api, tls=None, stopping=False, left=lambda _: None,
                                   streams=threading.BoundedSemaphore())
    with Fed(pieces) as sock:
        connection = b9agent._Connection(sock, server)
        try:
            while connection.answer_instant():
                pass
        except b9agent._Gone:
            return api.heard, bytes(sock.sent)
        connection.serve()
        return api.heard, bytes(sock.sent)


class Loop:
    """A relay without a selector."""

    waits = BlockingIOError

    def __init__(self):
        self.wires, self.calls = set(), deque()
        self.soon = self.calls.append

    def watch(self, wire, mask):
        wire.mask = mask

    def receive(self, sock, most_bytes=65536):
        return sock.recv(most_bytes)

    def bury(self, wire):
        wire.mask = 0

    def run(self):
        while self.calls:
            self.calls.popleft()()


class Doorman:
    """Takes every request of the front door's clients, with its body."""

    def __init__(self):
        self.heard = []

    def head_came(self, client):
        client.read_body()

    def whole_came(self, client):
        head = client.head
        self.heard.append((head.method, head.target, head.headers, bytes(client.body)))
        client.answer(b9agent.Response(200, b"ok", "text/plain"))

    def refuse(self, client, error):
        client.answer(b9agent.Response(error.status, b"no", "text/plain"))

    def drained(self, client):
        pass

    left = answered = drained


def served_by_door(pieces):
    """(requests, what was answered) of the clients' side of 13b."""
    loop, owner = Loop(), Doorman()
    with Fed(ends=False) as sock:
        wire = b9agent.ClientWire(loop, sock, ("127.0.0.1", 5), owner,
                                  types.SimpleNamespace(tls=None))
        for piece in pieces:
            sock.pieces.append(piece)
            while sock.pieces and not wire.dead and wire.mask & b9agent._READ:
                wire.ready(b9agent._READ)
                loop.run()
        assert len(wire._held) <= 2 * b9agent.HTTP_HEAD_MAX_BYTES + 65536
        return owner.heard, bytes(sock.sent)


def without_times(raw):
    """Answers without their dates, and without what says that a body is waited for."""
    lines = raw.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").split(b"\r\n")
    return [line for line in lines if not line.startswith(b"Date: ")]


def check_requests(data):
    known = h11_requests(data)
    for serve in (served_by_core, served_by_door):
        first = None
        for pieces in cuttings(data):
            heard, sent = serve(pieces)
            agreed = all(one is None or [one] == known[at:at + 1] for at, one in enumerate(heard))
            assert agreed, "%s hears %r, h11 %r" % (serve.__name__, heard, known)
            found = heard, without_times(sent)
            first = first or found
            assert found == first, "%s: cut otherwise: %r, not %r" % (serve.__name__, found, first)


HEADS = [
    "GET /health HTTP/1.1\r\nHost: 127.0.0.1:9999\r\n\r\n",
    "GET /i HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nX-A: \t b\xe4 \r\n\r\n".encode("latin-1"),
    "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    "Content-Length: 13\r\n\r\n{\"model\": \"m\"}",
    "POST /x HTTP/1.1\r\nhost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\nabcdGET / HTTP/1.1\r\n"
    "Host: b\r\n\r\n",
    "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nHEAD /2 HTTP/1.1\r\nHost: a\r\n\r\nDELETE /3?a=b HTTP/1.1\r\nHost: [::1]"
    "\r\nContent-Length: 0\r\n\r\n",
]
HEADER_PIECES = [
    "\r\n", "\n", "\r", "\r\n\r\n", "\n\n", " ", "\t", ":", ",", ";", "\x00", "\x0b", "\x85", "\xa0",
    "Content-Length: 3\r\n", "Content-Length: 5, 5\r\n", "content-length:0003\r\n", "Content-Length: +3\r\n",
    "Content-Length : 3\r\n", "Content-Length: 3\r\n 4\r\n", "Content-Length:\r\n", "Content-Length: 0x3\r\n",
    "Content-Length: 3_0\r\n", "Content-Length: \xb2\r\n", "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: identity\r\n", "Transfer-Encoding: chunked, chunked\r\n",
    "Transfer-Encoding:\x0bchunked\r\n", "Transfer-Encoding: gzip, chunked\r\n", "Transfer-Encoding: CHUNKED\r\n",
    "Transfer-Encoding:\r\n", "Transfer_Encoding: chunked\r\n", "Host: b\r\n", "Host:\r\n", "X: y\r\n",
    "Connection: close\r\n", "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n", "Expect: 100-continue\r\n",
    "Expect: x\r\n", "HTTP/1.0", "HTTP/1.1", "HTTP/1.2", "HTTP/2.0", "HTTP/0.9", "http/1.1", "GET ", "CONNECT ",
    "HEAD ", "OPTIONS * ", "GET  /", "0\r\n\r\n", "3\r\nabc\r\n", "3;x=y\r\nabc\r\n", "3 \r\nabc\r\n", "03\r\nabc\r\n",
    "3\nabc\n", "0\n\n", "0\r\nX: y\r\n\r\n", "0;\r\n\r\n", "ffffffff\r\n", "100000000\r\n", "-1\r\n", "2\r\nabc\r\n",
    "GET /s HTTP/1.1\r\nHost: s\r\n\r\n"]

target("requests", "heads and bodies of requests, one after the other: both servers hear what h11 hears, and "
       "what they answer does not depend on how the bytes were cut", HEADS, HEADER_PIECES)(check_requests)


# -- answers ------------------------------------------------------------

def h11_answer(data, method):
    """(status, body, whether the connection may go on) as h11 reads an answer; None where it does not."""
    connection = h11.Connection(h11.CLIENT, 1 << 20)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    connection.receive_data(b"")
    try:
        head = connection.next_event()
        while type(head) is h11.InformationalResponse:
            head = connection.next_event()
        if type(head) is not h11.Response:
            return None
        body, event = h11_body(connection)
        if type(event) is not h11.EndOfMessage:
            return None
        return head.status_code, body, connection.their_state is h11.DONE
    except h11.RemoteProtocolError:
        return None


def read_by_client(pieces, method):
    """(status, body, False) of section 2's reader; None where it refuses."""
    with Fed(pieces) as sock:
        try:
            with b9agent._http_failures("slow"):
                stream = b9agent.HttpStream(sock, method, 5.0, b9agent.now_s() + 5.0, None)
            return stream.status, stream.read(), False
        except HttpFailure:
            return None


class Exchange:
    """Whose answer an EngineWire brings."""

    def __init__(self):
        self.status, self.body, self.end = None, b"", None

    def on_head(self, status, _headers):
        assert self.status is None and self.end is None
        self.status = status

    def on_body(self, piece):
        assert self.status is not None and self.end is None
        self.body += piece

    def on_end(self, problem):
        assert self.end is None
        self.end = problem


def read_by_door(pieces, method):
    """(status, body, whether the connection is kept) of 13b's reader; None where it refuses."""
    loop, exchange, idle = Loop(), Exchange(), []
    wire = b9agent.EngineWire(loop, b9agent.Endpoint("http", "127.0.0.1", 9), idle)
    wire.sock.close()
    wire.sock, wire._connecting = Fed(ends=False), False
    with wire.sock as sock:
        wire.ask(exchange, method, b"request")
        wire._reused = False  # else it would ask again on a new connection
        for piece in filter(None, pieces):
            sock.pieces.append(piece)
            while sock.pieces and not wire.dead:
                wire.ready(b9agent._READ)
        kept, sock.ends = bool(idle) and not wire.dead, True
        if not wire.dead:
            wire.ready(b9agent._READ)
        assert exchange.end is not None and wire.dead
        if exchange.end:
            return None
        return exchange.status, exchange.body, kept


def check_answers(data):
    for method in ("GET", "HEAD") if data[-1:] != b" " else ("HEAD",):
        known = h11_answer(data, method)
        for read in (read_by_client, read_by_door):
            results = [read(pieces, method) for pieces in cuttings(data)]
            for found in results:
                assert found is None or known and found[:2] == known[:2], (
                    "%s reads %r, h11 %r" % (read.__name__, found, known))
            # What comes after the end is seen where it comes with the end.
            assert len({found and found[:2] for found in results} - (
                {None} if read is read_by_door else set())) < 2, results


ANSWERS = [
    "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\nA: b\r\n\r\n",
    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 Internal Server Error\r\nConnection: close\r\n\r\n{}",
    "HTTP/1.0 200\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\nuntil the end",
    "HTTP/1.1 204 No Content\r\nX: y\r\n\r\n", "HTTP/1.1 304 x\r\nContent-Length: 7\r\n\r\n",
    "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nx",
    "HTTP/1.1 503 Busy\r\nRetry-After: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"]
target("answers", "answers to HttpStream and EngineWire: what is whole is what h11 reads, however it was cut",
       ANSWERS, HEADER_PIECES + ["HTTP/1.1 200 OK\r\n", "HTTP/1.1 101 x\r\n", "HTTP/1.1 304 x\r\n", "200", "099", "999",
                                 "HTTP/1.1 100 Continue\r\n\r\n"])(check_answers)


# ---------------------------------------------------------------------- JSON

def same(one, other):
    """Equal, and of the same types: 1 is not 1.0 and not true."""
    return json.dumps(one) == json.dumps(other)


@target("json", "decode_json takes what json takes and means the same; strictly",
        ['{"a": [1, 2.5e3, -0, true, null, "\\u00e9\\ud83d\\ude00"]}', '[]', '"\\\\\\""', '0', '[[[[{"[[":{}}]]]]',
         '{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true}'],
        ['{', '}', '[', ']', ',', ':', '"', '\\', '"a":1', '\\ud800', '\\udc00', '\\u0000', 'NaN', '-Infinity', '1e999',
         '1' * 33, '0.' + '0' * 40, '[' * 33, '{"a":' * 32, '\ufeff', b'\xff', b'\xed\xa0\x80', '\n', ' ', '-', '01',
         '1.', '.5', 'true', "'", '"a":1,"a":2', '"\t"'])
def check_json(data):
    try:
        value = b9agent.decode_json(data)
    except ValueError:
        value = ValueError
    try:
        text = data.decode("utf-8")
        known = json.loads(text)
    except (ValueError, RecursionError):
        known = ValueError
    if value is not ValueError:
        assert same(value, known)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
        assert same(b9agent.decode_json(json.dumps(value).encode()), value)
    elif known is not ValueError:
        strange = (b"NaN" in data or b"Infinity" in data or b"\\u" in data or len(text) > 32
                   or b9agent._json_depth(text) > b9agent.JSON_DEPTH_MAX or twice(text) or b"e" in data.lower())
        assert strange, "refused: %r" % text


def twice(text):
    """Whether an object of a JSON text has a name twice."""
    found = []
    json.loads(text, object_pairs_hook=lambda pairs: found.append(len(dict(pairs)) < len(pairs)))
    return any(found)


# ---------------------------------------------------------------------- YAML, settings, tenants

YAML_PIECES = ["a", ":", ": ", " : ", "- ", "-", "#", " #", " ", "  ", "'", '"', "''", '\\"', "\\", "[", "]", "{", "}",
               ",", ", ", "|", ">", "&a", "*a", "!t", "%", "@", "`", "?", "? ", "~", "=", "<<", "---", "...", "\t", "\u00e9",
               "\\x41", "\\u00e9", "\\n", "0", "-1", "1.5", ".", "/", "\r", "\n", "\n\n", "\x85", "\u00a0", "\u2028", "\ufeff",
               "\\ud800", "a: b\n", "  - c\n", "null", "true"]
CONFIGS = [
    "machine:\n  token: 'abcd-efgh'  # of create\n  id: \"0123abcd\"\npool: gpu\ngateway: {host: gw.example, port: 1994}\n",
    "token: t0k3n-t0k3n\nmax_cpu: 3500m\nmax_memory: 16Gi\ngpu_ids: 0,amd:1\nhostname: '::1'\nkeepalive_interval: 30s\n",
    "limits:\n  gpu_ids:\n  - 0\n  - 1\n  cpu: 4\nenergy:\n  grid_intensity: 380.5\n  pue: 1.2\ninference:\n  port: 0\n"
    "  warm_models: [llama3.2:1b=600, hf.co/a/B=auto]\ntls:\n",
    "tunnel:\n  server: me@[::1]:2222\n  reverse_k3s: yes\nk3s: {server: 'https://[::1]/', token_hours: 24}\n"
    "oidc:\n  jwks: https://x/keys\ninsecure: false\n"]


def text_of(data):
    """As a file is read; None for one that is no text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def plain(node):
    value = node.value
    return {name: plain(child) for name, child in value.items()} if isinstance(value, dict) else [
        plain(child) for child in value] if isinstance(value, list) else value


@target("yaml", "what parse_yaml takes means the same to PyYAML; the rest is a YamlError with its line",
        CONFIGS, YAML_PIECES)
def check_yaml(data):
    import yaml
    text = text_of(data)
    if text is None:
        return
    try:
        tree = plain(b9agent.parse_yaml(text))
    except b9agent.YamlError as error:
        assert 1 <= error.line <= text.count("\n") + 1 and ", expected " in str(error)
        return
    known = yaml.load(text, yaml.BaseLoader)
    assert tree == ({} if known in (None, "") else known)
    if not lists_of_more(tree):
        assert plain(b9agent.parse_yaml(b9agent.render_yaml(tree))) == tree


def lists_of_more(tree):
    """Whether there is a list of anything but text, which render_yaml does not write."""
    if isinstance(tree, list):
        return any(not isinstance(item, str) for item in tree)
    return isinstance(tree, dict) and any(map(lists_of_more, tree.values()))


MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where files cost no disk


class Folder:
    """An input is a file of it.  B9TESTS_FUZZ_FOLDER: where it is made, by who removes it."""

    def __init__(self):
        self._made = tempfile.TemporaryDirectory(prefix="b9fuzz-", dir=os.environ.get("B9TESTS_FUZZ_FOLDER", MEMORY))
        self.path = self._made.name

    def write(self, name, data):
        path = os.path.join(self.path, name)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as handle:
            handle.write(data)
        return path


FOLDER = Folder()


def without_secrets(check):
    """Secrets that a check lets the Redactor know are forgotten after it."""
    def run(data):
        kept = b9agent.REDACTOR._secrets
        try:
            check(data)
        finally:
            b9agent.REDACTOR._secrets = kept
    return run


def load(path, flags=None):
    return b9agent.load_settings(dict({"config": path, "state_dir": FOLDER.path}, **(flags or {})), {})


@target("settings", "a config file is settings or a UsageError, and settings written and read again are the same",
        CONFIGS, YAML_PIECES + [row.path.rpartition(".")[2] + ": " for row in b9agent.SETTINGS if row.path])
@without_secrets
def check_settings(data):
    path = FOLDER.write("config.yaml", data)
    try:
        loaded = load(path)
    except UsageError as error:
        assert error.what and len(error.what) < 9000
        return
    values = {}
    for row in b9agent.SETTINGS:
        value = getattr(loaded.settings, row.key)
        if value is not None:
            text = b9agent.setting_text(row, value)
            assert row.parse(text) == value, row.key
            if row.path and loaded.origins[row.key] != "default":
                values[row.key] = text
    b9agent.save_config(path, {})
    assert load(path).settings == loaded.settings
    b9agent.save_config(path, values)
    assert load(path).settings == loaded.settings


@target("flags", "a command line is settings or a UsageError", [
    "\0".join(("run", "--token=abcd", "--machine-id", "0123abcd", "--gateway-host", "::1", "--max-cpu", "4")),
    "\0".join(("start", "--gpu-ids", "nvidia:0, 1", "--inference-port=0", "--tunnel-reverse-k3s", "-"))],
    ["\0", "=", "--", "-", "\0--", " ", ",", ":", "\u00b2", "\u0660", "9" * 30, "~", "~root/", "../", "1e5", "0x1", "nan",
     "inf", "%", "[::1]", "\n", "auto", "none"] + [row.flag + "\0" for row in b9agent.SETTINGS])
@without_secrets
def check_flags(data):
    text = data.decode("utf-8", "surrogateescape")  # as Python has arguments
    try:
        given = b9agent.parse_arguments(text.split("\0")[:40], (b9agent.Option("--wait", "S", ""),))
        flags = {key: value for key, value in given.flags.items() if key not in ("config", "token_file", "state_dir")}
        loaded = load(FOLDER.write("empty.yaml", b""), flags)
    except UsageError:
        return
    for row in b9agent.SETTINGS:
        value = getattr(loaded.settings, row.key)
        if value is not None:
            assert row.parse(b9agent.setting_text(row, value)) == value, row.key


TENANTS = [
    "# who may\ntenants:\n  - name: ada\n    token_sha256: " + "ab" * 32 + "  # hers\n    models: [llama*, \"hf.co/a/*\"]\n"
    "    tokens_per_day: 5000\n  - name: gateway\n    requests_per_minute: 60\n",
    "tenants:\n- name: b\n  token_sha256:\n  - " + "01" * 32 + "\n  - " + "23" * 32 + "\n  old_token_until: "
    "2026-01-31T12:00:00Z\n  admin: true\n  tailnet: ['*@example.com', tag:ci]\n- {name: c, oidc: 'group:x'}\n",
    "tenants: []\n"]


@target("tenants", "a tenants file is tenants or a UsageError with its line; what the commands change in it is "
        "changed and nothing else", TENANTS, YAML_PIECES + [row.key + ": " for row in b9agent.TENANT_FIELDS]
        + ["  - name: x\n", "tenants:", "tenants: [ ]", "gateway", "default", "*", "2026-01-31T12:00:00Z", "ef" * 32])
def check_tenants(data):
    path = FOLDER.write("tenants.yaml", data)
    try:
        tenants = b9agent.load_tenants(path, False)
    except UsageError as error:
        assert error.what.startswith(path)
        return
    tables = b9agent.tables_of(tenants)
    assert len({tenant.name.lower() for tenant in tenants}) == len(tenants)
    for tenant in tenants:
        assert tenant.may_use("m:latest") in (True, False)
        assert all(tables.by_hash[one] is tenant for one in tenant.token_sha256)
    new = {"name": "new-one", "token_sha256": "cd" * 32}
    for name, hashes, change in [("new-one", ["cd" * 32], lambda text: text.add(new))] + [
            (tenant.name, None, lambda text, tenant=tenant: text.remove(tenant.name)) for tenant in tenants[:2]] + [
            (tenant.name, ["cd" * 32], lambda text, tenant=tenant: text.set_token(
                tenant.name, {"token_sha256": "cd" * 32})) for tenant in tenants[:2] if tenant.name != "gateway"]:
        FOLDER.write("tenants.yaml", data)
        try:
            text = b9agent.TenantText(path, False)
            change(text)
            text.save(name, hashes)
        except UsageError:
            continue
        now = {tenant.name: tenant for tenant in b9agent.load_tenants(path, False)}
        assert [tenant for tenant in tenants if tenant.name != name] == [
            tenant for tenant in now.values() if tenant.name != name]
        assert (name in now) is (hashes is not None)
        comments = [line for line in data.split(b"\n") if line.lstrip().startswith(b"#")]
        if hashes:
            with open(path, "rb") as handle:
                kept = iter(handle.read().split(b"\n"))
            assert all(any(line.strip() in row for row in kept) for line in comments), "they stay, in their order"


# ---------------------------------------------------------------------- model files

def gguf_seed(fields, tensors, order="<", version=3):
    def text(value):
        value = value.encode()
        return struct.pack(order + "Q", len(value)) + value
    raw = b"GGUF" + struct.pack(order + "IQQ", version, len(tensors), len(fields))
    for name, value in fields.items():
        kind, packed = (8, text(value)) if isinstance(value, str) else (4, struct.pack(order + "I", value)) if isinstance(
            value, int) else (9, struct.pack(order + "IQ", 8, len(value)) + b"".join(map(text, value)))
        raw += text(name) + struct.pack(order + "I", kind) + packed
    for name, shape, kind, begin in tensors:
        raw += text(name) + struct.pack(order + "I%dQIQ" % len(shape), len(shape), *shape, kind, begin)
    return raw + bytes(-len(raw) % 32) + bytes(1200)


LLAMA = {"general.architecture": "llama", "general.name": "x", "general.file_type": 15, "llama.block_count": 2,
         "llama.embedding_length": 64, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
         "llama.context_length": 512, "tokenizer.ggml.tokens": ["a", "bc"]}
COUNTS = [b"\xff" * 8, b"\xff" * 4, bytes(8), bytes(4)] + [struct.pack("<Q", count) for count in (
    1, 2, 3, 8, 9, 255, 1 << 16, 1 << 18, 1 << 31, 1 << 40, 1 << 60, 1 << 63)]


def check_model(data):
    path = FOLDER.write("model", data)
    try:
        facts = b9agent.read_model(path)
    except UsageError as error:
        assert path in error.what and error.hint
        return None
    assert b9agent.estimate_fit(facts, 24 << 30).message
    assert all(value is None or value >= 0 for value in (
        facts.parameters, facts.weights_bytes, facts.layers, facts.heads, facts.context_tokens))
    assert facts.weights_bytes is None or facts.weights_bytes <= len(data)
    json.dumps(facts)
    return facts


target("gguf", "a GGUF file is facts that fit into it, or a UsageError", [
    gguf_seed(LLAMA, [("a", (32, 8), 0, 0), ("b", (256,), 12, 1024)]), gguf_seed(LLAMA, [("a", (8,), 0, 0)], ">"),
    gguf_seed({}, [("a", (2, 2, 2, 2), 1, 0)], version=2)], COUNTS + list(LLAMA) + [
        "gemma3", "qwen3next", "llama.attention.sliding_window", "llama.ssm.state_size", "split.count",
        "general.alignment", "GGUF", b"\x09\0\0\0\x09\0\0\0", b"\x08\0\0\0", b"\x0c\0\0\0"])(check_model)


def tensors_seed(header, weights=19):
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(weights)


@target("safetensors", "a safetensors file is facts or a UsageError; what is facts the safetensors package reads", [
    tensors_seed({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
                  "b": {"dtype": "U8", "shape": [3], "data_offsets": [16, 19]}, "__metadata__": {"format": "pt"}}),
    tensors_seed({"w": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}}, 2)],
    COUNTS + ["{", "}", "[", "]", ",", '"', ":", "0", "-1", "1e3", "1.0", "null", "true", "NaN", '"dtype":"F8_E4M3"',
              '"dtype":"F4"', '"dtype":"BOOL"', '"I64"', '"C64"', '"shape":[0]', '"data_offsets":[0,0]', "\\u0061", " ",
              '"__metadata__":{"a":1},', b"\xff", "9" * 30, "[" * 600])
def check_safetensors(data):
    if check_model(data) is None or data[:4] == b"GGUF":
        return
    try:
        import safetensors
    except ImportError:
        return
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        # Types that are newer than the package, and what Rust's JSON is stricter with.
        assert "unknown variant" in str(error) or "metadata" in str(error).lower() or "invalid type" in str(error), error
        return
    assert sum(len(entry["data"]) for _, entry in found) == b9agent.read_model(FOLDER.path + "/model").weights_bytes


# ---------------------------------------------------------------------- the front door's dialects

JSON_PIECES = ["{", "}", "[", "]", ",", ":", '"', "\\", "null", "true", "false", "0", "1", "-1", "1.5", "1e30", "1" * 31,
               '""', "[]", "{}", '"x"', "[{}]", "[[]]", "[null]", '"\\ud83d\\ude00"', '"\\u0000"', '"a":1,', " "]
ROWS = (("openai", "chat"), ("openai", "complete"), ("openai", "embed"), ("openai", "responses"), ("anthropic", "messages"),
        ("ollama", "chat"), ("ollama", "complete"), ("ollama", "embed"))
SAID = [{"role": "system", "content": "s"}, {"role": "user", "content": [
    {"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]},
    {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}]},
    {"role": "tool", "tool_call_id": "1", "content": "r"}]
ASKED = [b"\0" + as_bytes(dict({"model": "m"}, **body)) for body in (
    {"messages": SAID, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5, "n": 2, "stop": ["a"]},
    {"messages": SAID, "tools": [{"type": "function", "function": {"name": "f"}}], "response_format": {
        "type": "json_schema", "json_schema": {"schema": {}}}, "_tree_id": "t", "_task_depth": 1})] + [
    bytes([number]) + as_bytes(dict({"model": "m"}, **body)) for number, body in (
        (1, {"prompt": ["a", "b"], "echo": False, "logprobs": 1}), (2, {"input": [[1, 2], [3]], "encoding_format": "base64"}),
        (3, {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}],
             "max_output_tokens": 5}),
        (4, {"messages": [{"role": "user", "content": "x"}], "system": [{"type": "text", "text": "s"}], "max_tokens": 5}),
        (5, {"messages": [{"role": "user", "content": "x", "images": ["/9j/"]}, {"role": "assistant", "content": "",
             "thinking": "t", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
             {"role": "tool", "content": "r", "tool_name": "f"}], "options": {"num_predict": -1, "num_ctx": 512, "stop": "x"},
             "format": "json", "think": "low", "keep_alive": "5m"}),
        (6, {"prompt": "x", "raw": True, "context": [1, 2], "suffix": "y"}), (5, {"keep_alive": 0}),
        (7, {"prompt": "old"}), (7, {"input": "x", "dimensions": 8}))]
FIELD_NAMES = sorted({word.partition(":")[0] for _, _, names in b9agent._FIELDS for word in names.split()})
ENGINES = [b9agent.ENGINE_BY_NAME[name] for name in ("ollama", "vllm", "llama-server", "mlx")]


def leaves(value):
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from leaves(inner)


@target("asks", "a client's request is refused by an HttpError, or asks every engine in strict JSON for no more than "
        "was reserved", ASKED, JSON_PIECES + ['"%s":' % name for name in FIELD_NAMES] + [
            '"type":"%s"' % kind for kind in b9agent._PARTS] + [bytes([number]) for number in range(8)])
def check_asks(data):
    dialect, task = ROWS[data[0] % len(ROWS)] if data else ROWS[0]
    try:
        ask = b9agent.read_ask(dialect, task, data[1:])
    except HttpError as error:
        assert 400 <= error.status < 500 and error.what
        return
    assert ask.prompt_tokens >= 0 and (ask.output_tokens is None or ask.output_tokens >= 0)
    for engine in ENGINES:
        try:
            wire = b9agent.engine_request(ask, engine, "e/m", 64, 4096)
        except HttpError as error:
            assert 400 <= error.status <= 501 and error.what
            continue
        body = b9agent.decode_json(wire.body)
        if not wire.path:
            continue
        assert body.pop("model") in ("e/m", "default_model")
        said = sum(len(text) for text in leaves(body) if not text.startswith(("data:image", "iVBOR", "/9j/")))
        # Pictures and sounds are priced by their number, and names of roles and kinds within the messages.
        if not any(word in data for word in (b"image", b"audio", b"source")):
            assert said <= ask.prompt_tokens + 64 * (data.count(b"{") + 4), (said, ask.prompt_tokens)
        limits = body.get("options", body)
        most = [limits[name] for name in ("max_tokens", "num_predict", "max_output_tokens") if name in limits]
        assert task == "embed" or most and max(most) * b9agent._choices(ask) <= 64
        b9agent.make_flow(ask, wire, "1")


def stream_rows():
    import test_dialects
    return test_dialects.STREAMS


STREAM_ROWS = stream_rows()


def flowed(row, pieces, problem=""):
    import test_dialects
    _, asked, engine, _ = row
    return test_dialects.run(asked, engine, pieces, problem)


@target("streams", "an engine's stream ends done or with an error, is well-formed in the client's dialect, and is the "
        "same however it was cut", [bytes([number]) + row[3] for number, row in enumerate(STREAM_ROWS)],
        JSON_PIECES + ["\n", "\r\n", "\n\n", "data: ", "data:", "event: error\n", "data: [DONE]\n\n", ": x\n", '"done":true',
                       '"done":false}\n', '"content":"x"', '"response":"x"', '"usage":{"prompt_tokens":9}', '"error":"no"',
                       '"tool_calls":[{"index":0,"function":{"name":"f","arguments":"{}"}}]', '"model":"engine/m"', "\u2028",
                       '"finish_reason":"stop"', '"type":"message_stop"', '"delta":{"text":"x"}', b"\xff"])
def check_streams(data):
    row = STREAM_ROWS[data[0] % len(STREAM_ROWS)] if data else STREAM_ROWS[0]
    data, first = data[1:], None
    honest = all(is_json(line.partition(b":")[2] if line[:1] != b"{" else line) for line in map(
        bytes.strip, data.split(b"\n")) if line[:1] == b"{" or line.startswith((b"data:", b"error:")))
    for pieces in cuttings(data):
        out, flow = flowed(row, pieces)
        assert flow.complete or flow.usage.error
        if not honest:  # what an engine writes is JSON, if anything: it is not read whole again
            continue
        usage = flow.usage
        found = (flow.complete, usage.error, usage.prompt_tokens, usage.completion_tokens, usage.pieces,
                 seen_by_client(row[1], out))
        first = first or found
        assert found == first, "cut otherwise: %r, not %r" % (found, first)


def is_json(raw):
    try:
        json.loads(raw if raw.strip() != b"[DONE]" else b"0")
        return True
    except (ValueError, RecursionError):
        return False


def seen_by_client(asked, out):
    """The values in a stream, without the times in them; every one must be JSON, and end."""
    assert out.endswith(b"\n")
    found = [line if asked.dialect == "ollama" else line[5:] for line in out.split(b"\n")[:-1]
             if asked.dialect == "ollama" or line.startswith(b"data:")]
    found = [json.loads(line) if line.strip() != b"[DONE]" else "[DONE]" for line in found]
    for value in found:
        for name in ("created", "created_at", "total_duration", "prompt_eval_duration", "eval_duration"):
            value.pop(name, None) if isinstance(value, dict) else None
    return json.dumps(found)


# ---------------------------------------------------------------------- tokens of OpenID providers

RSA_MODULUS = (  # of a key whose other half was thrown away
    "rzNrStSFwzqwalDsyLl5fTigg6tQfUnHiCaekU34FkTAkYrxXJrWWEQ8L8S6mz68Kn_-LcdXBCeGly5eNcE9aeeAv0EipvoiJxF6yc5iYacXtq_hrj2"
    "--npqOO7iC1Qh0X_Iz2pYs1DR7XOG7zclV4uOrVHyhIG01lHu4rSEFI5kENWclbuETLL7pqEwChmIpvKmeUBHynwscz6mGCSJN6kry-6ZwIR-0-"
    "YNCOQ1sfLO_cCkRXDsemqkPEb1QCkfAec01Z6q4MEPAPEweRcwt9nRTIn9W6stp4JHftJ9vD0MophWUWIQ5tQILwN-YyK90kdHT4bsiZvd6oNNKUnvOQ")
TOKEN = (
    "eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCIsImtpZCI6Im9uZSJ9.eyJpc3MiOiJodHRwczovL2kiLCJhdWQiOlsiYjkiLCJ4Il0sInN1YiI6ImFkYS03I"
    "iwiZW1haWwiOiJhZGFAeCIsImVtYWlsX3ZlcmlmaWVkIjp0cnVlLCJncm91cHMiOlsiZyJdLCJleHAiOjIwMDAwMDAwMDAuMCwiaWF0IjoxNzAwMDAwMDAw"
    "LjAsIm5iZiI6MTcwMDAwMDAwMC4wfQ.klQBxVnWM3hzEHFjP_YJfdFwbEt6KihYjou0NCHUJybk-7ySJxWo0S-SVqXsr9nx90gjDGXSvRIW91hZc3AlLFPQ"
    "IiffFBngDJAI2uoRBFLB7DlI11LlDuJyKRi-Rbe48AcdYe150HFh_FXdwWM5C94jQWkACB9DZIw0Ad-xAMp1KeUCWWwEkpDoZMPSRTbaoHR45NCRsy5BOS35"
    "sfyAaIRcOcYDk7jqH452OdNX0AYjvOsstQWyE4hC0w0gxfNNdF8sLs0fmA4l5fU6Ff8Lkw1tVOjVD9iR_ZBuEtWpxcg3RgZ4ApaWVC_YG5a7V7DmGnydxP9b"
    "7vE7HYw7i5ei0Q")
JWKS = {"keys": [{"kty": "RSA", "kid": "one", "use": "sig", "alg": "RS256", "n": RSA_MODULUS, "e": "AQAB"}]}


class Quiet:
    """A log.  Whatever is a defect is a finding."""

    debug = False

    def __call__(self, *_, **__):
        pass

    error = __call__

    def defect(self, error, **_):
        raise error


@target("oidc", "no token but the one that was signed is taken, by no keys but those that it was signed with; the "
        "rest is a ValueError", [as_bytes(JWKS) + b"\0" + as_bytes(TOKEN), as_bytes(JWKS) + b"\0" + as_bytes(TOKEN)],
        JSON_PIECES + ["\0", ".", "=", "_", "-", "A", "AAAA", "AQAB", "eyJhbGciOiJub25lIn0", "one", "\u00e9", '"kid":1',
                       '"alg":"none"', '"e":"Aw"', '"n":"AQ"', "AAAAAAAAAAAA"])
def check_oidc(data):
    jwks, _, token = data.partition(b"\0")
    token, path = text_of(token), FOLDER.write("jwks.json", jwks)
    if token is None:
        return
    oidc = b9agent.Oidc("https://i", "b9", path, Quiet(), lambda: 1.0, lambda: 1.8e9)
    try:
        claims = oidc.verify(token, "digest")
    except ValueError:
        assert oidc.known("digest") is None
        return
    jwks = jwks.decode("utf-8", "replace").encode()  # as the file is read
    assert token == TOKEN and b9agent.keys_of(jwks)["one"] == b9agent.keys_of(as_bytes(JWKS))["one"]
    assert claims.names == ("ada-7", "ada@x", "group:g") and oidc.known("digest") == claims


# ---------------------------------------------------------------------- files of the state folder

@target("usage", "a usage.json of any kind is counted from, or is not; what is kept is read again",
        [{"day": 20000, "date": "2024-10-04", "tenants": {"ada": {
            "requests": 3, "prompt_tokens": 100, "completion_tokens": 50, "gpu_seconds": 4.5, "usd": 0.01}}}],
        JSON_PIECES + ["1e308", "1e17", "NaN", "Infinity", '"ada":', '"bob":', "20001", "19999", "-0.0", "20000.0", "\\ud800"])
def check_usage(data):
    path = FOLDER.write("usage.json", data)
    tenant = b9agent.Tenant("ada", limits=b9agent.Limits(tokens_per_day=10**6, gpu_seconds_per_day=1e6))

    def ledger():
        return b9agent.Ledger(path, Quiet(), 0.5, lambda: 5.0, lambda: 20000.5 * 86400)
    first = ledger()
    try:
        first.settle(first.reserve(tenant, 5, 5, 5), 5, 5)
    except b9agent.LimitReached as limit:
        assert limit.args
    first.save()
    json.dumps(first.usage(), allow_nan=False)
    if first.usage():
        assert ledger().usage() == first.usage()


@target("energy", "an energy.json of any kind is gone on from, or is not; what is kept is read again",
        [{"version": 1, "since_wall_s": 1.7e9, "total": dict(b9agent.EnergyTotals()._asdict(), cpu_measured_j=5.5)}],
        JSON_PIECES + ["NaN", "-0.0", "1e14", "1e15", "1.0"] + ['"%s":' % name for name in b9agent.EnergyTotals._fields])
def check_energy(data):
    path = FOLDER.write("energy.json", data)
    settings = types.SimpleNamespace(grid_intensity=300.0, pue=1.2, renewable_pct=10.0, cpu_watts=None,
                                     energy_certificate=None)

    def meter():
        return b9agent.EnergyMeter(path, settings, Quiet(), lambda: 5.0, lambda: 1.8e9)
    first = meter()
    first.save()
    json.dumps(b9agent.energy_payload(first.report(), settings), allow_nan=False)
    assert meter().report().total == first.report().total


DIGEST = "0123456789abcdef" * 4


@target("models", "a models.json of any kind is a book, or is set aside; what is noted is read again",
        [{"models": {"m:latest": {"name": "m:latest", "manifest_digest": DIGEST, "size": 5, "layers": [
            {"digest": "sha256:" + DIGEST, "size": 5}], "files": [{"path": "/m.gguf", "sha256": DIGEST, "size": 5}],
            "first_served_at": "2026-01-02T03:04:05Z", "source": "hf.co/a/b", "license": "mit"}}}],
        JSON_PIECES + ['"files":', '"layers":', '"name":', DIGEST, "sha256:", "/", "\\u0000", "../", "NaN", "\\ud800"])
def check_models(data):
    path = FOLDER.write("models.json", data)
    book = b9agent.ModelBook(path, Quiet())
    book.used("x:latest")
    assert b9agent.ModelBook(path, Quiet()).entries() == json.loads(json.dumps(book.entries()))


def audit_lines(count):
    prev, lines = b9agent.AUDIT_START, []
    for number in range(1, count + 1):
        raw = b'{"v":1,"seq":%d,"time":"2024-10-04T01:00:%02d.000Z","kind":"event","event":"x","n":%d,"prev":"%s"' % (
            number, number, number, prev.encode())
        prev = hashlib.sha256(raw).hexdigest()
        lines.append(raw + b',"hash":"%s"}\n' % prev.encode())
    return b"".join(lines), prev


AUDIT, AUDIT_HASH = audit_lines(4)


@target("audit", "whatever is done to an audit file is found, but for half a line at its end", [AUDIT],
        [AUDIT[at:at + 300] for at in range(0, len(AUDIT), 300)] + AUDIT.splitlines(True) + [
            "\n", "\r\n", "0", "1", "f", '"', "}", "{", ",", " ", "\0", b"\xff", audit_lines(5)[0].splitlines(True)[4],
            audit_lines(5)[0].splitlines(True)[4][:-2], '"kind":"pruned"', "2024-10-05"])
def check_audit(data):
    os.makedirs(FOLDER.path + "/audit", exist_ok=True)
    FOLDER.write("audit/2024-10-04.jsonl", data)
    FOLDER.write("audit/head.json", as_bytes(b9agent.AuditHead(4, AUDIT_HASH, "2024-10-04.jsonl", False)._asdict()))
    folder = FOLDER.path + "/audit"
    verdict = b9agent.verify_audit(folder, "4:" + AUDIT_HASH)
    later = data[len(AUDIT):] if data.startswith(AUDIT) else None
    made = audit_lines(5)[0]  # who may write the files may also add to them
    assert verdict.ok == (later is not None and (b"\n" not in later or data.startswith(made)
                                                 and b"\n" not in data[len(made):])), verdict
    for line in b9agent.read_audit(folder):
        assert line["seq"] in (1, 2, 3, 4, 5)
    b9agent.settle_audit_tail("2024-10-04.jsonl", data.splitlines(True), b9agent.read_audit_head(folder))


@target("head", "a head.json of any kind is a head or is none", [
    b9agent.AuditHead(4, AUDIT_HASH, "2024-10-04.jsonl", False)._asdict()], JSON_PIECES + [AUDIT_HASH, '"seq":', "4.0"])
def check_head(data):
    os.makedirs(FOLDER.path + "/heads", exist_ok=True)
    FOLDER.write("heads/head.json", data)
    head = b9agent.read_audit_head(FOLDER.path + "/heads")
    assert head is None or same(head._asdict(), json.loads(data))


# ---------------------------------------------------------------------- Kubernetes, Tailscale, gateways

POD = {"metadata": {"name": "worker-1", "creationTimestamp": "2026-01-02T03:04:05Z", "labels": {
    "run.beam.cloud/worker-id": "w1"}, "resourceVersion": "5"}, "spec": {"containers": [{"name": "worker"}]}, "status": {
        "phase": "Running", "containerStatuses": [{"name": "worker", "restartCount": 1, "state": {
            "running": {"startedAt": "2026-01-02T03:04:06Z"}}, "lastState": {"terminated": {"exitCode": 1}}}],
        "initContainerStatuses": [{"state": {"waiting": {"reason": "PodInitializing"}}}], "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]}}


@target("pods", "an event of a watch, or a pod of a list, is a pod or is none; its figures can be true",
        [POD, {"type": "ADDED", "object": POD}, {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}}],
        JSON_PIECES + ['"%s":' % word for word in (
            "terminated", "waiting", "running", "exitCode", "reason", "finishedAt", "startedAt", "phase", "type", "object",
            "metadata", "name", "restartCount")] + ['"2026-01-02T03:04:05Z"', '"0000-00-00T99:99:99Z"', '"Succeeded"',
                                                    '"CrashLoopBackOff"', '"DELETED"', '"ERROR"', "\u0660"])
def check_pods(data):
    value = b9agent._json_object(data)
    pod = b9agent.parse_pod(value)
    if pod is not None:
        record = b9agent.pod_record(pod, 1.8e9)
        assert pod.status in ("PENDING", "RUNNING", "COMPLETED", "FAILED") and record["restarts"] >= 0
        assert record["duration_seconds"] is None or record["duration_seconds"] >= 0
        json.dumps(record, allow_nan=False)
    watch = b9agent.PodWatch(types.SimpleNamespace(), "0123abcd", Quiet())
    try:
        if isinstance(value.get("object"), dict):  # the client sees to that
            version = watch._heed(value)
            assert version is None or isinstance(version, str)
    finally:
        watch._wake.close()


PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
KUBE_YAML = (
    "apiVersion: v1\nkind: Config\nclusters:\n- cluster:\n    certificate-authority-data: %s\n    server: https://127.0.0.1:6443\n"
    "  name: default\ncontexts:\n- context:\n    cluster: default\n    user: agent\n  name: default\ncurrent-context: default\n"
    "preferences: {}\nusers:\n- name: agent\n  user:\n    token: abc.def-ghi\n") % base64.b64encode(PEM.encode()).decode()


@target("kubeconfig", "a kubeconfig is one or a UsageError; as YAML it means what it means as JSON", [
    KUBE_YAML, KUBE_YAML.replace("token: abc.def-ghi", "client-certificate-data: {0}\n    client-key-data: {0}".format(
        base64.b64encode(PEM.encode()).decode())), {"current-context": "a", "clusters": [{"name": "a", "cluster": {
            "server": "https://[::1]", "certificate-authority-data": "LS0t"}}], "contexts": [
                {"name": "a", "context": {"cluster": "a"}}]}],
        YAML_PIECES + JSON_PIECES + ["server: ", "https://", "name: ", "token: ", "exec: ", "LS0tLS1CRUdJTiA=", "proxy-url: x"])
@without_secrets
def check_kubeconfig(data):
    import yaml
    text = data.decode("utf-8", "replace")
    if "/" in text.replace("https://", ""):
        text = text.replace("ile: /", "ile: ").replace('ile":"/', 'ile":"')  # no file of this machine

    def parse(text):
        try:
            return b9agent.parse_kubeconfig(text, FOLDER.path + "/config", True)
        except UsageError as error:
            assert error.what.startswith(FOLDER.path)
            return None
    found = parse(text)
    if found is not None:
        assert b9agent.parse_host(found.endpoint.host) == found.endpoint.host and " " not in found.token
        if not text.lstrip().startswith("{"):
            other = parse(json.dumps(yaml.load(text, yaml.BaseLoader)))
            assert other and other.token == found.token and other.endpoint[:3] == found.endpoint[:3]


@target("tailscale", "what tailscaled says is a reading or is none", [
    {"BackendState": "Running", "TUN": True, "TailscaleIPs": ["100.64.0.7", "fd7a::7"], "Self": {"DNSName": "gpu.x.ts.net."}},
    {"BackendState": "NeedsLogin", "Self": {"TailscaleIPs": ["100.64.0.7"]}},
    {"Node": {"Name": "a.x.ts.net.", "Tags": ["tag:ci"], "Hostinfo": {}}, "UserProfile": {"LoginName": "ada@example.com"}}],
        JSON_PIECES + ['"100.127.1.1"', '"100.128.0.1"', '"tag:x"', '"Tags":', '"Sharer":5', '"LoginName":', "\\n", "\\ud800"])
def check_tailscale(data):
    reading, who = b9agent.parse_tailscale_status(data), b9agent.parse_whois(data)
    if reading is not None:
        assert reading.state in ("none", "waiting", "up", "down") and isinstance(reading.message, str)
        assert (reading.state == "up") is b9agent.is_tailnet_address(reading.address)
        reading.name.encode("ascii")
    if who is not None:
        assert all(re.fullmatch("[!-~]+", word) for word in (who.login, *who.tags) if word)
        assert not who.login.startswith("tag:") and not (who.login and who.tags)


class Client(b9agent.GatewayClient):
    """Whose gateway has answered."""

    def __init__(self, reply):
        super().__init__(b9agent.Endpoint("http", "gw", 1994), "t0k3n-t0k3n", "gpu", Quiet())
        self._reply = reply

    def _send(self, method, name, body, limit_s):
        self._compare_clocks(self._reply)
        return self._reply


@target("gateway", "an answer of the gateway is ok or a GatewayError of one line", [
    b"\x00" + as_bytes({"status": "ok", "machine_state": {}}), b"\x01" + as_bytes({"message": "Invalid pool name"}),
    b"\x02" + as_bytes({"error": "x", "error_code": "machine_not_found"}), b"\x03<html>", b"\x04{}"],
        JSON_PIECES + ['"status":"ok"', '"machine_state":', '"config":', '"message":', '"error":', '"error_code":', "\\ud800",
                       "\\n", "\\u001b", "NaN", "machine_expired", "9" * 5000] + [bytes([number]) for number in range(10)])
def check_gateway(data):
    status = (200, 500, 404, 401, 302, 400, 403, 405, 429, 204)[data[0] % 10] if data else 200
    headers = {"retry-after": text_of(data[1:4]) or "", "date": text_of(data[1:31]) or ""}
    client = Client(b9agent.HttpReply(status, headers, data[1:]))
    for ask in (lambda: client.register({}), lambda: client.keepalive({}), client.health, lambda: client.probe("register"),
                lambda: client.heartbeat("0123abcd", ["m"])):
        try:
            ask()
        except b9agent.GatewayError as error:
            assert b9agent.printable(error.what) == error.what and len(error.what) < 600


def embedded():
    store = b9agent.MachineStore(os.path.join(FOLDER.path, "gateway.db"))
    return store, b9agent.GatewayApi(Quiet(), store), store.create_machine("gpu")


GATEWAYS = []
KEEPALIVE = {"machine_id": "ID", "provider_name": "generic", "pool_name": "gpu", "agent_version": "1", "metrics": {
    name: 1 for name in b9agent._METRICS}, "inference": {"status": "running", "ip": "1.2.3.4", "port": 1, "models": ["m"]}}
REGISTER = {"token": "", "machine_id": "ID", "hostname": "h", "provider_name": "generic", "pool_name": "gpu", "cpu": "8000m",
            "memory": "16Gi", "gpu_count": "1", "private_ip": "10.0.0.1"}


@target("embedded", "a request to the embedded gateway is answered, or refused by an HttpError; its list stays JSON",
        [b"r" + as_bytes(REGISTER), b"k" + as_bytes(KEEPALIVE)],
        JSON_PIECES + ['"%s":' % name for name in (*REGISTER, *KEEPALIVE, *b9agent._METRICS)] + [
            "1e308", "NaN", "9" * 400, "\\ud800", "\\u0000", '"MACHINE_ID":', "\u0660", "9223372036854775808", "r", "k"])
def check_embedded(data):
    GATEWAYS[:] = GATEWAYS or [embedded()]
    store, api, (machine, token) = GATEWAYS[0]
    name = "register" if data[:1] == b"r" else "keepalive"
    head = b9agent.RequestHead("POST", "/api/v1/machine/" + name, {
        "host": "x", "content-type": "application/json", "authorization": "Bearer " + token})
    try:
        response = api.answer(head, lambda: data[1:].replace(b"ID", machine.encode()))
        assert response.status == 200
        b9agent.encode_json(response.body)
    except HttpError as error:
        assert error.status in (400, 403, 500) and error.code != "failed", error.what
    json.dumps([b9agent.machine_record(one) for one in store.machines()], allow_nan=False)


class Engineless:
    """Stands for an Inference: keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, method):
        return lambda **fields: self.asked.append((method, fields)) or {}


CONTROL_ENGINE = Engineless()
CONTROL = b9agent.ControlApi(types.SimpleNamespace(kept=b9agent.Ring(9), events=b9agent.Ring(9)), "0" * 64, (
    *b9agent.agent_routes(lambda fresh: {}, lambda: ""), *b9agent.inference_routes(CONTROL_ENGINE)))
PATHS = [route.path for route in CONTROL.routes]


@target("control", "a body or query to the control API is refused with what is wrong, or arrives as its route declares it",
        [bytes([PATHS.index(path)]) + query + b"\0" + as_bytes(body) for path, query, body in (
            ("/inference/start", b"", {"engine": "ollama", "model": "m", "context_tokens": 4096, "force": True}),
            ("/inference/pull", b"", {"model": "m:1b", "stream": False}), ("/models/import", b"", {
                "path": "/m", "name": "n", "quantize": "q4_K_M"}), ("/models/verify", b"", {}),
            ("/logs", b"lines=5", ""), ("/events", b"since=5", ""), ("/status", b"fresh=true", ""))],
        JSON_PIECES + ["\0", "=", "&", "%", "%00", "%ff", "+", ";", "lines=", "1e3", "4096.0", '"engine":', '"model":',
                       '"context_tokens":', '"auto"'] + [bytes([number]) for number in range(len(PATHS))])
def check_control(data):
    path = PATHS[data[0] % len(PATHS)] if data else PATHS[0]
    query, _, body = data[1:].partition(b"\0")
    if b"follow" in query:
        return
    target = path + ("?" + query.decode("latin-1") if query else "")
    del CONTROL_ENGINE.asked[:]
    method = next(route.method for route in CONTROL.routes if route.path == path)
    head = b9agent.RequestHead(method, target, {"host": "127.0.0.1", "content-type": "application/json",
                                                "authorization": "Bearer " + "0" * 64})
    try:
        response = CONTROL.answer(head, lambda: body)
    except HttpError as error:
        assert 400 <= error.status < 500 and b9agent.printable(error.what) == error.what
        assert b9agent.encode_json(CONTROL.error_body(error))
        return
    assert response.status == 200
    rows = {field.name: field for route in CONTROL.routes if route.path == path for field in route.fields}
    for _, fields in CONTROL_ENGINE.asked:
        for name, value in fields.items():
            assert b9agent.field_problem(rows[name], value) == ""


# ---------------------------------------------------------------------- this machine and its GPUs

TEXT_PIECES = ["", "-1", "9" * 400, ":", "\n", " ", "\x00", "\u00b2", "kB", "/..", "\\777", "1e9", "nan", "N/A", "[N/A]", "ERR!",
               ",", '"', "{", "[", "}", "]", "null", "NaN", "1e999", "\ud7ff", "true", "<dict>", "</dict>", "<integer>", "<data>",
               "&", "<array>", "</array>", "0x", "\x1b[", "GPU-", "MIG-", "\r", "No devices were found\n"]


def read_as_host(text):
    import test_host
    for parse in test_host.PARSERS:
        parse(text)
    for pair in (b9agent.parse_diskstats(text, test_host.DISKS), b9agent.parse_net_dev(text),
                 b9agent.parse_ioreg_disks(text), b9agent.parse_swapusage(text),
                 b9agent.swap_use(b9agent.parse_meminfo(text)), (b9agent.parse_uptime(text),),
                 b9agent.parse_cpuinfo(text)[1:], (b9agent.parse_boottime(text),)):
        assert all(value is None or 0 <= value < 1 << 80 for value in pair)
    for pid, row in b9agent.parse_ps(text).items():
        assert pid == row.pid
    b9agent.parse_proc_stat(text)
    b9agent.parse_process_stat(text)
    b9agent.parse_listeners(text, 11111)


def host_seeds():
    import test_children
    import test_host
    return [text.encode() for text in test_host.SEEDS + [test_children.MAC_PS,
            "7 (a b) S 1 7 6 " + "0 " * 15 + "4711 5 6", " 0: 0100007F:2B67 00000000:0000 0A 0 0 0 0 0 4242\n"]]


@target("host", "what the system says of itself is figures that can be true, or None", host_seeds(), TEXT_PIECES)
def check_host(data):
    read_as_host(data.decode("utf-8", "replace"))


def gpu_seeds():
    import test_other_gpus
    smi = ("index, uuid, name\n0, GPU-1, NVIDIA A100, 81920 MiB, 5 MiB, 7 %, 30, 00000000:0C:00.0, 55.1 W, 400 W, [N/A], 1410 "
           "MHz, 1593 MHz, 0, Enabled, 550.1\n")
    return [text.encode() for text in (*test_other_gpus.SAMPLES, smi, "GPU-1, 4242, 512 MiB\n",
                                       "Unable to determine the device handle for GPU 0000:02:00.0: Unknown Error\n")]


@target("gpus", "what nvidia-smi, amd-smi, rocm-smi, xpu-smi, ioreg and files of /sys say is figures that can be true, or "
        "None", gpu_seeds(), TEXT_PIECES)
def check_gpus(data):
    import test_other_gpus
    import test_recordings
    text = data.decode("utf-8", "replace")
    test_other_gpus.parse_everything(text)
    test_other_gpus.read_everything(text)
    for columns in (b9agent.NVIDIA_SMI_COLUMNS, b9agent.NVIDIA_SMI_BASIC):
        gpus = b9agent.parse_nvidia_smi(text, columns)
        test_recordings.check_reading(b9agent.GpuReading("nvidia-smi", None if gpus is None else tuple(gpus), problem="x"))
    for line in b9agent.parse_lost_gpus(text):
        assert b9agent.printable(line) == line
    b9agent.parse_compute_apps(text)
    b9agent.parse_gpu_information(text)


class Drawn(b9agent.NvmlLibrary):
    """A libnvidia-ml that answers with these bytes.  Calls whose code is none of NVML's fail so."""

    def __init__(self, data):
        import ctypes
        self._ctypes, self._struct, self.left = ctypes, struct, data

    def draw(self, count):
        found, self.left = self.left[:count], self.left[count:]
        return found.ljust(count, b"\0")

    def has(self, symbol):
        return self.draw(1) != b"\xff"

    def call(self, symbol, *arguments):
        code = self.draw(1)[0]
        for one in arguments:
            one = getattr(one, "_obj", one)  # of byref()
            if isinstance(one, self._ctypes.Array):
                one.raw = self.draw(len(one))
            elif isinstance(one, self._ctypes.c_uint32):
                one.value = int.from_bytes(self.draw(4), "little")
        return 0 if code < 200 else code - 200


@target("nvml", "whatever values NVML's structures hold, a GPU has figures that can be true, or None", [
    bytes(4000), bytes([1, 0, 2, 0, 0, 0]) + b"550.54\0" + bytes(89) + bytes(range(250)) * 8,
    b"".join(b"\0" + struct.pack("<QIQ", number, 5, 81920 << 20) for number in range(80))],
        COUNTS + [bytes([200 + code]) for code in (0, 2, 3, 4, 7, 9, 13, 15, 16, 22)] + ["GPU-", "\x01\0\0\0"])
def check_nvml(data):
    import test_recordings
    clock = [1.0]
    nvml = b9agent.Nvml(Drawn(data), FOLDER.path, lambda: clock[0])
    for _ in range(2):
        test_recordings.check_reading(nvml.read())
        clock[0] += 1000.0


@target("engine_metrics", "an engine's metrics are sums or None", [
    'vllm:num_requests_running{model="m \\" x"} 1\nvllm:num_requests_waiting 2.5\n# HELP a b\na{n="1 2"} 1e3\n'],
        TEXT_PIECES + ["a{", "} ", "a ", " 1\n", "1" * 31, "+Inf", "1e400", "-5"])
def check_metric_sums(data):
    for value in b9agent.metric_sums(data.decode("utf-8", "replace"), ["a", "vllm:num_requests_waiting", ""]):
        assert value is None or 0 <= value <= 1e300


def least_ask(dialect, task):
    body = {"messages": SAID[:1]} if task in ("chat", "messages") else {"prompt" if task == "complete" else "input": "x"}
    return b9agent.read_ask(dialect, task, as_bytes(dict(
        body, model="m", **{"max_tokens": 5} if task == "messages" else {})))


LEAST_ASKS = [least_ask(*row) for row in ROWS]


@target("whole_answers", "an engine's whole answer, or its error, is JSON of the client's dialect with figures that can be true",
        [bytes([number]) + as_bytes(value) for number, value in enumerate((
            {"id": "1", "model": "e", "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None, "message": {
                "role": "assistant", "content": "hi", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}}],
             "usage": {"prompt_tokens": 9, "completion_tokens": 3}}, {"choices": [{"text": "x"}]},
            {"data": [{"embedding": [0.1, -2e-3]}], "usage": {"prompt_tokens": 4}}, {"error": {"message": "no /a/b/c"}},
            {"error": ["x"], "detail": [{"loc": [1], "msg": "y"}]}, {"model": "m", "message": {"content": "hi", "thinking": "t"},
             "done": True, "eval_count": 3, "prompt_eval_count": 9}, {"response": "x", "done": True},
            {"embeddings": [[1, 2]], "prompt_eval_count": 2}))],
        JSON_PIECES + ["<html>", "NaN", "1e999", "\\ud800", b"\xff", '"tool_calls":', '"function":', '"arguments":', '"error":',
                       '"message":', '"choices":', "[1,]", "[.]", "[-]", "[1e999]"] + [bytes([number]) for number in range(32)])
def check_whole_answers(data):
    ask = LEAST_ASKS[data[0] % len(LEAST_ASKS) if data else 0]
    status, body = (200, 200, 200, 500)[(data[0] >> 3) % 4] if data else 200, data[1:]
    for engine in ENGINES[:2]:
        try:
            wire = b9agent.engine_request(ask, engine, "e/m", 64, 4096)
        except HttpError:
            continue
        if not wire.path:
            continue
        told, raw, usage = b9agent.whole_answer(ask, wire, status, body, "1", 5)
        assert 200 <= told <= 599
        if told == 200 and ask.task == "embed":
            continue  # numbers are moved, and not read
        json.loads(raw)
        for count in (usage.prompt_tokens, usage.completion_tokens):
            assert count is None or 0 <= count < 1 << 53


@target("doors", "what a head's path, token, host and origin mean is known, or refused by an error of one line", [
    "GET /v1/models/m:1b?x=1 HTTP/1.1\r\nHost: gpu.x.ts.net:11434\r\nAuthorization: Bearer b9-abc\r\nx-api-key: b9-abc",
    "POST /api/chat HTTP/1.1\r\nHost: [::1]:9999\r\nOrigin: http://evil\r\nSec-Fetch-Site: none",
    "DELETE /v1/chat/completions HTTP/1.1\r\nHost: evil.example\r\nX-Request-Id: a"],
        HEADER_PIECES + ["%0a", "%ff", "%", "/v1/models/", "Bearer", "bearer  ", "Basic x", "evil.example", "127.0.0.1", "localhost",
                         ".ts.net", "::ffff:1.2.3.4", "/../", "//", "\xb2"])
def check_doors(data):
    try:
        head = b9agent.parse_request_head(data)
    except HttpError:
        return

    def ask(function, *arguments):
        """What it returns; None where it refuses."""
        try:
            return function(*arguments) or True
        except (HttpError, b9agent.AccessRefused) as error:
            assert 400 <= error.status < 500 and b9agent.printable(error.what) == error.what
            assert not any(char in "\r\n" for name, value in getattr(error, "headers", ()) for char in name + value)
            return None
    found = ask(b9agent.door_route, head.method, head.target)
    if found:
        assert found[0].method in (head.method, "GET") and found[0].path == found[0].path.partition("?")[0]
    token = ask(b9agent.credentials, head.headers)
    if isinstance(token, str):
        assert token == token.strip(" ") and "\n" not in token
    host, by_address = head.headers.get("host", ""), (ask(b9agent.refuse_browsers, head.headers),
                                                      ask(CONTROL.check, head.headers))
    if "evil" in host.lower() and not host.lower().partition(":")[0].endswith(".ts.net") and "." in host:
        assert by_address == (None, None), host
    if "origin" in head.headers:
        assert by_address[0] is None
    b9agent.plain_address(host)
