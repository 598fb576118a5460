"""What is fuzzed: ONE table, which test_fuzz.py runs with hypothesis and tests/fuzz with atheris.

A target takes bytes, and holds what must be true of every input: `check` returns where it is, and
raises where it is not.  What may be refused is refused with the exception of the contract, which
`check` takes; any other exception is a finding.  `seeds` are whole, valid inputs, `pieces` what the
grammar gives a meaning to: inputs are seeds with a few pieces put in, taken out or said twice.
"""
import json
import os
import random
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


def h11_requests(data):
    """[(method, target, {name: value}, body)] as h11 reads them, until it refuses one."""
    connection, found = h11.Connection(h11.SERVER, 1 << 20), []
    connection.receive_data(data)
    connection.receive_data(b"")
    try:
        while True:
            head, body = connection.next_event(), b""
            if type(head) is not h11.Request:
                return found
            event = connection.next_event()
            while type(event) is h11.Data:
                body += event.data
                event = connection.next_event()
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
    connection, body = h11.Connection(h11.CLIENT, 1 << 20), b""
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
        event = connection.next_event()
        while type(event) is h11.Data:
            body += event.data
            event = connection.next_event()
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


class Folder:
    """A folder in memory where there is one: an input is a file of it."""

    def __init__(self):
        base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._made = tempfile.TemporaryDirectory(prefix="b9fuzz-", dir=base)
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
                assert all(line.strip() in handle.read() for line in comments[:1])


# ---------------------------------------------------------------------- model files

def gguf_seed(fields, tensors, order="<", version=3):
    def text(value):
        return struct.pack(order + "Q", len(value)) + value.encode()
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
