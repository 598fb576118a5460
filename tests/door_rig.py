"""A front door in this process, before an engine whose every byte a test writes itself."""
import contextlib
import json
import os
import socket
import threading
import time

import b9agent
from helpers import PATIENCE_S, wait_until

TOKEN = "b9-the-token-of-this-test"


class Asked:
    """A request as the engine got it."""

    def __init__(self, head, body):
        self.line, *lines = head.decode("latin-1").split("\r\n")
        self.headers = {name.lower(): value.strip() for name, _, value in
                        (line.partition(":") for line in lines)}
        self.raw = body
        self.body = json.loads(body) if body else None

    @property
    def path(self):
        return self.line.split(" ")[1]


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value):
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def token(text="tok"):
    return event({"id": "x", "object": "chat.completion.chunk", "model": "m", "choices": [
        {"index": 0, "delta": {"content": text}, "finish_reason": None}]})


def usage(prompt, completion):
    return event({"id": "x", "object": "chat.completion.chunk", "model": "m", "choices": [],
                  "usage": {"prompt_tokens": prompt, "completion_tokens": completion,
                            "total_tokens": prompt + completion}})


STOP = event({"id": "x", "object": "chat.completion.chunk", "model": "m", "choices": [
    {"index": 0, "delta": {}, "finish_reason": "stop"}]})
DONE = b"data: [DONE]\n\n"
STREAM_HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
               b"Transfer-Encoding: chunked\r\n\r\n")


def whole(value, status=200):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return (b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (status, len(body))) + body


COMPLETION = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [
    {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}


def streamed(tokens=3, prompt=7, end=True):
    """A whole answer."""
    pieces = [token()] * tokens + ([STOP, usage(prompt, tokens), DONE] if end else [])
    return STREAM_HEAD + b"".join(map(chunk, pieces)) + (b"0\r\n\r\n" if end else b"")


class ScriptedEngine:
    """script(asked, sock): writes the answer; what it returns true for closes the connection."""

    def __init__(self, script=None):
        self.script = script or self.plain
        self.asked = []
        self.connections = 0
        self.open = 0
        self.left = threading.Event()  # a client's connection was closed while a script waited
        self._ended = False
        self._socks = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @staticmethod
    def plain(asked, sock):
        sock.sendall(streamed() if asked.body.get("stream") else whole(COMPLETION))

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._socks.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        held = b""
        self.open += 1
        try:
            while True:
                while b"\r\n\r\n" not in held:
                    data = sock.recv(65536)
                    if not data:
                        return
                    held += data
                head, _, held = held.partition(b"\r\n\r\n")
                length = Asked(head, b"").headers.get("content-length", "0")
                while len(held) < int(length):
                    held += sock.recv(65536)
                asked = Asked(head, held[:int(length)])
                held = held[int(length):]
                self.asked.append(asked)
                if self.script(asked, sock):
                    return
        except OSError:
            pass
        finally:
            self.open -= 1
            sock.close()

    def wait_until_left(self, sock):
        """For a script: until the other side closes."""
        sock.settimeout(PATIENCE_S)
        if not sock.recv(1):
            self.left.set()
        return True

    def close(self):
        with contextlib.suppress(OSError):  # it is closed already
            self._listener.shutdown(socket.SHUT_RDWR)  # who accepts in it would keep it open
        self._listener.close()
        for sock in self._socks:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class QuietLog:
    """What the door needs of a log; defects are kept, and fail the test."""

    def __init__(self):
        self.lines, self.defects = [], []

    def __call__(self, level, event, **pairs):
        self.lines.append((level, event, pairs))

    def error(self, event, error, level="error", **pairs):
        self.lines.append((level, event, dict(pairs, what=str(error))))

    def defect(self, error, **_pairs):
        import traceback
        self.defects.append("".join(traceback.format_exception(
            type(error), error, error.__traceback__)))


def settings_of(**given):
    """The agent's settings, their defaults but for these."""
    found = b9agent.load_settings({"state_dir": "/nonexistent"}, {})
    return found.settings._replace(**given)


class RigInference:
    """What the door needs of an Inference: `target` is what it is told, wakes what it was asked."""

    def __init__(self, rig):
        self._rig, self.wakes, self.slept, self.may_doze = rig, [], 0, True
        self.on_wake = lambda model: 0.0  # seconds that it took, or raises

    def target(self):
        return self._rig.target

    def suspect(self, model):
        self._rig.suspected.append(model)

    def holds(self, model):
        return model in self._rig.target.loaded

    def wake(self, model, idle=()):
        self.wakes.append((model, tuple(idle)))
        took_s = self.on_wake(model)
        target = self._rig.target
        self._rig.target = target._replace(state="running", loaded=tuple({*target.loaded, model}))
        return took_s

    def doze(self):
        if self.may_doze:
            self._rig.target = self._rig.target._replace(state="asleep", loaded=())
        return self.may_doze

    def sleep(self):
        self.slept += 1


class Rig:
    """door, engine and what a client needs."""

    def __init__(self, state, engine="vllm", script=None, tenants="", limits=None, tls=None,
                 whois=lambda host, port: None, gateway=(), models=("m",), loaded=("m",), slots=64,
                 on_tailnet=False, gpus=1, usd=0.0006, oidc=None, audit=None,
                 power=lambda: (None, "", None), clock=b9agent.now_s, wall=time.time, **settings):
        self.state, self.suspected = str(state), []
        self.log = QuietLog()
        self.engine = ScriptedEngine(script)
        path = os.path.join(self.state, "tenants.yaml")
        if tenants:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(tenants)
        self.token = TOKEN
        self.target = b9agent.Target(
            "running", b9agent.ENGINE_BY_NAME[engine],
            b9agent.Endpoint("http", "127.0.0.1", self.engine.port), tuple(models), tuple(loaded),
            gpus, 8192, slots)
        self.book = b9agent.TenantBook(self.state, self.log, bool(usd))
        self.ledger = b9agent.Ledger(os.path.join(self.state, "usage.json"), self.log, usd)
        self.tally = b9agent.DoorTally()
        self.access = b9agent.Access(self.book, oidc, whois, lambda: gateway, self.log)
        self.inference = RigInference(self)
        self.guards = b9agent.DoorGuards(settings_of(**settings), clock, wall)
        self.door = b9agent.FrontDoor(self.log, self.access, self.ledger, self.inference,
                                      self.tally, limits or b9agent.DoorLimits(), self.guards,
                                      audit, tls, power)
        self.listener = self.door.listen("127.0.0.1", 0, on_tailnet)
        self.port = self.listener.port
        self.door.start()
        self.listener.start()

    def close(self):
        self.engine.close()
        self.door.stop()
        assert not self.log.defects, self.log.defects[0]

    # -- a client

    def connect(self, source="127.0.0.1"):
        sock = socket.create_connection(("127.0.0.1", self.port), PATIENCE_S, (source, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def request(self, body=None, path="/v1/chat/completions", method="POST", token=TOKEN,
                headers=()):
        raw = b"" if body is None else body if isinstance(body, bytes) else (
            json.dumps(body).encode())
        lines = ["%s %s HTTP/1.1" % (method, path), "Host: 127.0.0.1"]
        lines += ["Authorization: Bearer " + token] if token else []
        lines += ["Content-Length: %d" % len(raw)] if body is not None else []
        lines += ["%s: %s" % pair for pair in headers]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + raw

    def raw(self, data, until_closed=False):
        """(status, headers, body) of one answer to these bytes."""
        with self.connect() as sock:
            sock.sendall(data)
            return read_answer(sock, until_closed)

    def ask(self, body=None, **given):
        """(status, JSON or bytes)."""
        status, headers, raw = self.raw(self.request(body, **given))
        if headers.get("content-type", "").startswith("application/json"):
            return status, json.loads(raw)
        return status, raw

    def chat(self, stream=False, model="m", **more):
        return dict({"model": model, "stream": stream, "max_tokens": 16,
                     "messages": [{"role": "user", "content": "Hello"}]}, **more)

    def settled(self):
        """Nothing runs, waits or is reserved any more."""
        wait_until(lambda: not (self.door.status()["streams"] or self.door.status()["waiting"]),
                   "the door is done with all requests")

    def used(self, tenant="t"):
        return self.ledger.usage().get(tenant, {})


def read_answer(sock, until_closed=False, within_s=PATIENCE_S):
    """(status, headers, body); the body is out of its chunks.  Raises: EOFError where it ends in
    the middle."""
    sock.settimeout(within_s)
    file = sock.makefile("rb")
    line = file.readline()
    if not line:
        raise EOFError("no answer")
    status, headers = int(line.split(b" ")[1]), {}
    while True:
        line = file.readline()
        if not line.strip():
            break
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while True:
            line = file.readline()
            if not line:
                raise EOFError("the chunks end early: %r" % body)
            size = int(line, 16)
            if not size:
                file.readline()
                break
            body += file.read(size)
            assert file.readline() == b"\r\n"
    elif "content-length" in headers:
        body = file.read(int(headers["content-length"]))
    else:
        body = file.read()
    if until_closed:
        assert file.read() == b""
    return status, headers, body


def events_of(body):
    """The data of server-sent events: JSON values and "[DONE]"."""
    found = []
    for part in body.decode().split("\n\n"):
        for line in part.split("\n"):
            if line.startswith("data: "):
                found.append("[DONE]" if line[6:] == "[DONE]" else json.loads(line[6:]))
    return found

