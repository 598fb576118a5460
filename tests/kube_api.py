"""A Kubernetes API server's stand-in: TLS, tokens and client certificates, objects in memory, pods
that are listed in pages and watched, and every fault that a real one has.  Standard library only."""
import base64
import collections
import http.server
import json
import os
import socket
import ssl
import threading
import time
from urllib.parse import parse_qs, unquote, urlsplit

from helpers import wait_until

TLS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tls")
SERVER_CA = os.path.join(TLS, "k3s-server-ca.pem")
CLIENT_CA = os.path.join(TLS, "k3s-client-ca.pem")
TOKEN = "kube-token-of-a-service-account-5511"
PODS = "/api/v1/namespaces/default/pods"


def text_of(name):
    with open(os.path.join(TLS, name), encoding="ascii") as handle:
        return handle.read()


def data_of(name):
    return base64.b64encode(text_of(name).encode()).decode()


def kubeconfig(port, token=TOKEN, certificate=False, ca="k3s-server-ca.pem", host="127.0.0.1",
               context="default"):
    """A kubeconfig as k3s writes it, but with a token where that is asked for."""
    user = ("    client-certificate-data: %s\n    client-key-data: %s\n" % (
        data_of("k3s-client.pem"), data_of("k3s-client.key")) if certificate else
        "    token: %s\n" % token)
    return ("apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: %s\n"
            "    server: https://%s:%d\n  name: default\ncontexts:\n- context:\n    cluster: default\n"
            "    user: default\n  name: %s\ncurrent-context: %s\nkind: Config\npreferences: {}\n"
            "users:\n- name: default\n  user:\n%s" % (data_of(ca), host, port, context, context, user))


def status(code, reason, message):
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason, "code": code}


def worker_pod(name, machine="0badcafe", worker="w1", phase="Running", statuses=None, pool="gpu",
               created="2026-11-21T10:00:00Z", **more):
    """As the gateway's Jobs make them; statuses: of the container `worker`."""
    return {"metadata": dict({
        "name": name, "namespace": "default", "uid": "uid-" + name, "creationTimestamp": created,
        "labels": {"app": "worker", "run.beam.cloud/role": "worker", "job-name": name.rpartition("-")[0],
                   "run.beam.cloud/worker-pool-name": pool, "run.beam.cloud/worker-id": worker,
                   "run.beam.cloud/machine-id": machine}}, **more),
        "spec": {"containers": [{"name": "worker", "image": "beta9-worker:latest",
                                 "env": [{"name": "WORKER_TOKEN", "value": "worker-token-secret-91"}]}]},
        "status": {"phase": phase, "containerStatuses": [
            {"name": "worker", "ready": True, "restartCount": 0, "image": "beta9-worker:latest",
             "state": {"running": {"startedAt": "2026-11-21T10:00:05Z"}}}]
            if statuses is None else statuses}}


class Fault:
    """What one request gets instead of its answer.  kind: list, watch, or a method; raw: what the
    body of a watch is, in one chunk, after which `then`: end, cut, or hang."""

    def __init__(self, kind, code=None, reason="", message="", headers=(), raw=None, then="end"):
        self.kind, self.code, self.headers, self.raw, self.then = kind, code, headers, raw, then
        self.body = status(code, reason, message) if code else None


Asked = collections.namedtuple("Asked", "kind method path query headers body")


class KubeApi:
    """A context manager, on a free port of loopback.  objects: {path: object}; asked: every request
    that was let in.  token None: nobody's token is accepted.  client_ca: certificates are too."""

    def __init__(self, token=TOKEN, client_ca=None, certificate="k3s-server", page=500):
        self.token, self.page = token, page
        self.objects, self.asked, self.faults = {"/version": {"gitVersion": "v1.33.1+k3s1"}}, [], []
        self.version, self.oldest, self.gone_as = 100, 0, "status"
        self.port, self.refused = 0, 0
        self._history, self._changed, self._links = [], threading.Condition(), set()
        self._server = None
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(os.path.join(TLS, certificate + ".pem"),
                                      os.path.join(TLS, {"other": "server"}.get(certificate, certificate)
                                                   + ".key"))
        if client_ca:
            self._context.verify_mode = ssl.CERT_OPTIONAL
            self._context.load_verify_locations(client_ca)

    @property
    def url(self):
        return "https://127.0.0.1:%d" % self.port

    # -- what the test does

    def start(self):
        api = self

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads, block_on_close, allow_reuse_address = True, False, True

            def handle_error(self, request, client_address):
                pass  # a client that is cut off, or does not like our certificate

            def finish_request(self, request, client_address):
                with api._changed:
                    api._links.add(request)
                try:
                    with api._context.wrap_socket(request, server_side=True) as link:
                        with api._changed:
                            api._links.add(link)
                        Handler(link, client_address, self)
                except ssl.SSLError:
                    api.refused += 1
                    raise

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle_one_request(self):
                self.close_connection = True
                self.raw_requestline = self.rfile.readline(65537)
                if self.raw_requestline and self.parse_request():
                    api._serve(self)

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self):
        """As a process that ends: the port is closed and every connection is cut."""
        self._server.shutdown()
        self._server.server_close()
        self.cut()

    def cut(self):
        with self._changed:
            links, self._links = self._links, set()
        for link in links:
            try:
                socket.socket.shutdown(link, socket.SHUT_RDWR)
            except (OSError, ValueError):
                pass

    __enter__ = start

    def __exit__(self, *_):
        self.stop()

    def put(self, path, thing):
        """Make or change an object, and tell those who watch."""
        with self._changed:
            self.version += 1
            thing = json.loads(json.dumps(thing))
            thing.setdefault("metadata", {})["resourceVersion"] = str(self.version)
            kind = "MODIFIED" if path in self.objects else "ADDED"
            self.objects[path] = thing
            self._history.append((self.version, path, kind, thing))
            self._changed.notify_all()
            return thing

    def remove(self, path):
        with self._changed:
            self.version += 1
            thing = dict(self.objects.pop(path))
            thing["metadata"] = dict(thing["metadata"], resourceVersion=str(self.version))
            self._history.append((self.version, path, "DELETED", thing))
            self._changed.notify_all()

    def put_pod(self, pod):
        return self.put("%s/%s" % (PODS, pod["metadata"]["name"]), pod)

    def remove_pod(self, name):
        self.remove("%s/%s" % (PODS, name))

    def bookmark(self):
        """The version moves on, for reasons that do not concern those who watch."""
        with self._changed:
            self.version += 50
            self._history.append((self.version, "", "BOOKMARK", {
                "kind": "Pod", "apiVersion": "v1", "metadata": {
                    "resourceVersion": str(self.version), "creationTimestamp": None},
                "spec": {"containers": None}, "status": {}}))
            self._changed.notify_all()

    def forget(self):
        """As after a compaction: versions from before it are gone."""
        with self._changed:
            self.oldest = self.version = self.version + 1
            self._history = []

    def fault(self, *arguments, **more):
        self.faults.append(Fault(*arguments, **more))

    def count(self, kind):
        return sum(asked.kind == kind for asked in list(self.asked))

    def wait_for(self, condition, what, within_s=40.0):
        try:
            wait_until(condition, what, within_s)
        except AssertionError as error:
            raise AssertionError("%s; asked: %s" % (error, [(asked.kind, asked.path)
                                                            for asked in self.asked]))

    # -- what a client gets

    def _serve(self, handler):
        url = urlsplit(handler.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        length = int(handler.headers.get("content-length") or 0)
        body = handler.rfile.read(length)
        path, method = unquote(url.path), handler.command
        below = path.split("/")[3 if path.startswith("/api/") else 4:]
        many = method == "GET" and path != "/version" and len(below) % 2 == 1
        kind = method if not many else "watch" if query.get("watch") in ("1", "true") else "list"
        if not self._known(handler):
            return self._send(handler, 401, status(401, "Unauthorized", "Unauthorized"))
        with self._changed:
            self.asked.append(Asked(kind, method, path, query, dict(handler.headers.items()), body))
            fault = next((fault for fault in self.faults if fault.kind == kind), None)
            if fault:
                self.faults.remove(fault)
        if fault and fault.code:
            return self._send(handler, fault.code, fault.body, fault.headers)
        if fault:
            return self._raw(handler, fault)
        if kind == "watch":
            return self._watch(handler, path, query)
        code, answer = self._answer(kind, path, query, body)
        return self._send(handler, code, answer)

    def _known(self, handler):
        given = handler.headers.get("authorization", "")
        return bool(handler.connection.getpeercert()) or (
            self.token is not None and given == "Bearer " + self.token)

    def _answer(self, kind, path, query, body):
        if kind == "list":
            return self._list(path, query)
        if kind == "POST":
            thing = json.loads(body)
            place = "%s/%s" % (path, (thing.get("metadata") or {}).get("name"))
            if place in self.objects:
                return 409, status(409, "AlreadyExists", "%s already exists" % place)
            return 201, self.put(place, thing)
        if path not in self.objects and kind != "PUT":
            return 404, status(404, "NotFound", "%s not found" % path)
        if kind in ("PUT", "PATCH"):
            thing = json.loads(body)
            return 200, self.put(path, thing if kind == "PUT" else dict(self.objects[path], **thing))
        if kind == "DELETE":
            self.remove(path)
            return 200, {"kind": "Status", "status": "Success"}
        return 200, self.objects[path]

    def _wanted(self, path, place, thing, query):
        if place.rpartition("/")[0] != path:
            return False
        labels = thing["metadata"].get("labels") or {}
        pairs = [pair.partition("=") for pair in query.get("labelSelector", "").split(",") if pair]
        return all(labels.get(name.rstrip("=")) == value.lstrip("=") for name, _, value in pairs)

    def _list(self, path, query):
        with self._changed:
            found = [thing for place, thing in sorted(self.objects.items())
                     if self._wanted(path, place, thing, query)]
            begin = int(query.get("continue") or 0)
            size = min(self.page, int(query.get("limit") or self.page))
            metadata = {"resourceVersion": str(self.version)}
            if begin + size < len(found):
                metadata.update({"continue": str(begin + size),
                                 "remainingItemCount": len(found) - begin - size})
            return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": metadata,
                         "items": found[begin:begin + size]}

    def _watch(self, handler, path, query):
        seen = int(query.get("resourceVersion") or 0)
        until = time.monotonic() + float(query.get("timeoutSeconds") or 1800)
        if seen < self.oldest:
            message = "too old resource version: %d (%d)" % (seen, self.oldest)
            if self.gone_as == "status":
                return self._send(handler, 410, status(410, "Expired", message))
            self._head(handler)
            self._chunk(handler, json.dumps({"type": "ERROR", "object": status(
                410, self.gone_as, message)}).encode() + b"\n")
            return self._chunk(handler, b"")
        self._head(handler)
        while time.monotonic() < until and self._server is not None:
            with self._changed:
                self._changed.wait_for(lambda: any(row[0] > seen for row in self._history),
                                       max(0.0, min(0.2, until - time.monotonic())))
                fresh = [row for row in self._history if row[0] > seen]
            for seen, place, kind, thing in fresh:
                if kind == "BOOKMARK" and query.get("allowWatchBookmarks") != "true":
                    continue
                if kind == "BOOKMARK" or self._wanted(path, place, thing, query):
                    self._chunk(handler, json.dumps({"type": kind, "object": thing}).encode() + b"\n")
        return self._chunk(handler, b"")

    def _raw(self, handler, fault):
        self._head(handler)
        if fault.raw:
            self._chunk(handler, fault.raw)
        if fault.then == "end":
            self._chunk(handler, b"")
        elif fault.then == "hang":
            with self._changed:
                self._changed.wait_for(lambda: handler.connection not in self._links, 60.0)
        else:
            handler.wfile.write(b"40\r\n{\"type\":\"ADDED\",\"obj")  # and 44 bytes that never come

    def _head(self, handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                            b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")

    def _chunk(self, handler, data):
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _send(self, handler, code, answer, headers=()):
        body = json.dumps(answer).encode() if isinstance(answer, dict) else answer
        head = ["HTTP/1.1 %d X" % code, "Content-Type: application/json", "Content-Length: %d" % len(body),
                "Connection: close"] + ["%s: %s" % pair for pair in headers]
        handler.wfile.write("\r\n".join(head + ["", ""]).encode() + body)
