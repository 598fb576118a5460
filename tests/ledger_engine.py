#!/usr/bin/env python3
"""An engine that is fast, does what a request says, and keeps a book of every token that it sent.

    llama-server -m FILE --alias NAME --host H --port P …      OpenAI's API, as llama.cpp's server has it
    ollama serve                                               Ollama's own API and OpenAI's, one model

LEDGER names the file of the book: a line for each thing, written before it is sent, so that a process
that is killed leaves a true one.  "B id mark prompt", "T id tokens", "E id how".  What a prompt may say:
"[[mark=a7 tokens=20 prompt=9 …]]"

    tokens=N      pieces of the answer, 5           prompt=N      what it says the prompt came to, 7
    each=N        tokens in a piece, 1              delay=MS      between two pieces, 0
    status=N      an error instead of an answer     fail_after=N  an error after N pieces
    hang_after=N  nothing more after N pieces       cut_after=N   the connection is cut there
    die_after=N   the process dies there            mute=1        the request is never answered
    stop_after=N  the answer ends there, with nothing that says that it is done
One thread; standard library only.
"""
import json
import os
import re
import selectors
import signal
import socket
import sys
import time

NAME = "ledger:latest"
BOOK = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) \
    if "LEDGER" in os.environ else None
SELECTOR = selectors.DefaultSelector()
TOTALS = {"id": 0, "tokens": 0}
DUE = []  # answers with a delay


def note(*words):
    if BOOK is not None:
        os.write(BOOK, (" ".join(map(str, words)) + "\n").encode())


def parse_book(path):
    """[{mark, prompt, sent, end}] of a book; end is "" where the process died with it."""
    found = {}
    with open(path) as book:
        for line in book:
            kind, number, *words = line.split()
            if kind == "B":
                found[number] = {"mark": words[0], "prompt": int(words[1]), "sent": 0, "end": ""}
            elif kind == "T":
                found[number]["sent"] += int(words[0])
            else:
                found[number]["end"] = words[0]
    return list(found.values())


class Answer:
    """One generation on a link."""

    def __init__(self, link, path, body):
        text = json.dumps(body.get("messages") or body.get("prompt") or body.get("input") or "")
        match = re.search(r"\[\[(.*?)\]\]", text)
        told = dict(word.partition("=")[::2] for word in match.group(1).split()) if match else {}
        self.link, self.path, self.mark = link, path, told.pop("mark", "-")
        self.told = {name: int(value) for name, value in told.items()}
        self.native = path.startswith("/api/")
        options = body.get("options") or {}
        most = options.get("num_predict") if self.native else (
            body.get("max_tokens") or body.get("max_completion_tokens"))
        self.stream = body.get("stream", self.native)
        self.usage = (body.get("stream_options") or {}).get("include_usage")
        self.each = self.told.get("each", 1)
        self.pieces = self.told.get("tokens", 5)
        self.reason = "stop"
        if most is not None and most > 0 and most < self.pieces * self.each:
            self.pieces, self.reason = most // self.each, "length"
        self.prompt = self.told.get("prompt", 7)
        self.sent, self.due, self.began, self.ended = 0, 0.0, False, False
        # Its process and its number: an engine that was started again goes on in the same book.
        TOTALS["id"] += 1
        self.id = "%d-%d" % (os.getpid(), TOTALS["id"])
        note("B", self.id, self.mark, self.prompt)

    def end(self, how):
        if not self.ended:
            self.ended = True
            note("E", self.id, how)

    def event(self, text, reason=None):
        if self.path == "/api/chat":
            body = {"model": NAME, "created_at": "2026-11-21T12:00:00Z",
                    "message": {"role": "assistant", "content": text}, "done": False}
        elif self.native:
            body = {"model": NAME, "created_at": "2026-11-21T12:00:00Z", "response": text, "done": False}
        elif self.path == "/v1/completions":
            body = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": NAME, "choices":
                    [{"index": 0, "text": text, "finish_reason": reason, "logprobs": None}]}
        else:
            delta = {"content": text} if reason is None else {}
            if not self.sent and reason is None:
                delta["role"] = "assistant"
            body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": NAME,
                    "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        return body

    def framed(self, body):
        raw = json.dumps(body).encode()
        raw = raw + b"\n" if self.native else b"data: " + raw + b"\n\n"
        return b"%x\r\n%b\r\n" % (len(raw), raw)

    def figures(self):
        return {"prompt_tokens": self.prompt, "completion_tokens": self.sent * self.each,
                "total_tokens": self.prompt + self.sent * self.each}

    def last(self):
        """The end of a stream, in chunks."""
        if self.native:
            body = dict(self.event(""), done=True, done_reason=self.reason, total_duration=10 ** 6,
                        load_duration=1000, prompt_eval_count=self.prompt, prompt_eval_duration=1000,
                        eval_count=self.sent * self.each, eval_duration=1000)
            return self.framed(body) + b"0\r\n\r\n"
        raw = self.framed(self.event("", self.reason))
        if self.usage:
            raw += self.framed(dict(self.event(""), choices=[], usage=self.figures()))
        return raw + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

    def whole(self):
        self.sent = self.pieces
        note("T", self.id, self.sent * self.each)
        TOTALS["tokens"] += self.sent * self.each
        text = " token" * self.sent
        if self.native:
            body = dict(self.event(text), done=True, done_reason=self.reason, total_duration=10 ** 6,
                        load_duration=1000, prompt_eval_count=self.prompt, prompt_eval_duration=1000,
                        eval_count=self.sent * self.each, eval_duration=1000)
        else:
            body = self.event(text, None)
            choice = {"index": 0, "finish_reason": self.reason}
            choice.update({"text": text} if self.path == "/v1/completions" else
                          {"message": {"role": "assistant", "content": text}})
            body.update(object=body["object"].replace(".chunk", ""), choices=[choice],
                        usage=self.figures())
        self.end("whole")
        self.link.reply(200, body)

    def begin(self):
        told = self.told
        if told.get("mute"):
            return
        if "status" in told:
            self.end("refused")
            self.link.answer = None
            error = "the engine was told to refuse"
            self.link.reply(told["status"], {"error": error if self.native else {
                "message": error, "type": "api_error", "param": None, "code": told["status"]}})
        elif not self.stream:
            if "hang_after" not in told:
                self.link.answer = None
                self.whole()
        else:
            self.link.send(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % (
                b"application/x-ndjson" if self.native else b"text/event-stream"))
            self.go_on()

    def strike(self):
        """True where something happens at this piece that ends, or holds, the answer."""
        told, link = self.told, self.link
        if told.get("die_after") == self.sent:
            os.kill(os.getpid(), signal.SIGKILL)
        if told.get("hang_after") == self.sent:
            return True
        if told.get("cut_after") == self.sent:
            self.end("cut")
            link.close()
            return True
        if told.get("stop_after") == self.sent:  # as Ollama does after 30 tokens that are alike
            self.end("short")
            link.answer = None
            link.send(b"0\r\n\r\n")
            return True
        if told.get("fail_after") == self.sent:
            self.end("error")
            body = {"error": "the engine failed"} if self.native else {"error": {
                "message": "the engine failed", "type": "server_error", "code": 500}}
            link.answer = None
            link.send(self.framed(body) + b"0\r\n\r\n")
            return True
        return False

    def go_on(self):
        """As many pieces as are due."""
        while not self.link.dead and not self.strike():
            if self.sent >= self.pieces:
                self.end("whole")
                self.link.answer = None
                self.link.send(self.last())
                return
            raw = self.framed(self.event(" token"))
            self.sent += 1
            note("T", self.id, self.each)
            TOTALS["tokens"] += self.each
            self.link.send(raw)
            if self.told.get("delay"):
                self.due = time.monotonic() + self.told["delay"] / 1000
                DUE.append(self)
                return


class Link:
    """A connection."""

    def __init__(self, sock):
        self.sock, self.held, self.out, self.dead, self.answer = sock, b"", b"", False, None
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        SELECTOR.register(sock, selectors.EVENT_READ, self)

    def close(self):
        if not self.dead:
            self.dead = True
            SELECTOR.unregister(self.sock)
            self.sock.close()
            if self.answer is not None:
                self.answer.end("gone")

    def send(self, raw):
        if self.dead:
            return
        self.out += raw
        try:
            self.out = self.out[self.sock.send(self.out):]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        SELECTOR.modify(self.sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if self.out else 0), self)

    def reply(self, status, body):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send(b"HTTP/1.1 %d Said\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
            status, len(raw), raw))

    def ready(self, mask):
        if mask & selectors.EVENT_WRITE:
            self.send(b"")
        if mask & selectors.EVENT_READ and not self.dead:
            try:
                data = self.sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            self.held += data
            self.requests()

    def requests(self):
        while not self.dead and self.answer is None:
            head, mark, rest = self.held.partition(b"\r\n\r\n")
            if not mark:
                return
            size = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
            size = int(size.group(1)) if size else 0
            if len(rest) < size:
                return
            body, self.held = rest[:size], rest[size:]
            method, path = head.split(b" ", 2)[:2]
            self.serve(path.decode().partition("?")[0], json.loads(body or b"{}"))

    def serve(self, path, body):
        if path in ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions"):
            if path == "/api/generate" and not body.get("prompt"):
                return self.reply(200, {"model": NAME, "response": "", "done": True, "done_reason": "load"})
            self.answer = Answer(self, path, body)
            return self.answer.begin()
        if path in ("/api/embed", "/v1/embeddings"):
            return self.embed(path, body)
        shown = {"name": NAME, "model": NAME, "modified_at": "2026-11-21T12:00:00Z", "size": 1, "size_vram": 1,
                 "expires_at": "2318-01-01T00:00:00Z", "digest": "0" * 64, "details": {
                     "format": "gguf", "family": "llama"}}
        found = {"/health": {"status": "ok"}, "/api/version": {"version": "0.33.0"},
                 "/": b"Ollama is running",
                 "/api/tags": {"models": [shown]}, "/api/ps": {"models": [shown]},
                 "/api/show": {"details": shown["details"], "model_info": {}, "capabilities": ["completion"]},
                 "/v1/models": {"object": "list", "data": [{"id": NAME, "object": "model"}]},
                 "/metrics": b"llamacpp:tokens_predicted_total %d\n" % TOTALS["tokens"]}.get(path)
        return self.reply(404 if found is None else 200, {"error": "not found"} if found is None else found)

    def embed(self, path, body):
        answer = Answer(self, path, body)
        if "status" in answer.told:
            answer.end("refused")
            return self.reply(answer.told["status"], {"error": "the engine was told to refuse"})
        answer.end("whole")
        if path == "/api/embed":
            return self.reply(200, {"model": NAME, "embeddings": [[1.0, 0.0]], "total_duration": 1000,
                                    "load_duration": 1000, "prompt_eval_count": answer.prompt})
        return self.reply(200, {"object": "list", "model": NAME, "data": [
            {"object": "embedding", "index": 0, "embedding": [1.0, 0.0]}], "usage": {
                "prompt_tokens": answer.prompt, "total_tokens": answer.prompt}})


def serve(host, port):
    listener = socket.create_server((host, port), backlog=1024)
    listener.setblocking(False)
    SELECTOR.register(listener, selectors.EVENT_READ, None)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print("server is listening on http://%s:%d" % (host, port), file=sys.stderr, flush=True)
    while True:
        wait_s = max(0.0, min(answer.due for answer in DUE) - time.monotonic()) if DUE else None
        for key, mask in SELECTOR.select(wait_s):
            if key.data is not None:
                key.data.ready(mask)
                continue
            try:
                Link(listener.accept()[0])
            except OSError:
                pass
        now = time.monotonic()
        late = [answer for answer in DUE if answer.due <= now]
        DUE[:] = [answer for answer in DUE if answer.due > now]
        for answer in late:
            answer.go_on()
            if answer.link.answer is None:
                answer.link.requests()


def main(words):
    global NAME
    if words[:1] == ["serve"]:
        host, _, port = os.environ["OLLAMA_HOST"].rpartition(":")
        return serve(host, int(port))
    if words[:1] in (["--help"], ["--version"]):
        print("version: 10488 (ledger)")
        return None
    said = dict(zip(words, words[1:]))
    NAME = said.get("--alias", NAME)
    return serve(said["--host"], int(said["--port"]))


if __name__ == "__main__":
    main(sys.argv[1:])
