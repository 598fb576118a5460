"""A registry of models for a real `ollama` to pull from: what fake_ollama.py has built in, over TLS
with tests/tls.  The models are then called localhost:PORT/library/NAME."""
import json
import os
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fake_ollama

TLS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tls")


class Registry:
    """A context manager.  rate: bytes per second, 0 as fast as it goes; cut_at: bytes after which each
    connection for a larger blob is closed, None never; fetched: the paths that were asked for."""

    def __init__(self):
        self.rate, self.cut_at, self.fetched, self.blobs = 0, None, [], {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(self))
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(os.path.join(TLS, "server.pem"), os.path.join(TLS, "server.key"))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True,
                                                  do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def port(self):
        return self._server.server_address[1]

    def name(self, short):
        return "localhost:%d/library/%s" % (self.port, short)

    environment = {"SSL_CERT_FILE": os.path.join(TLS, "ca.pem")}

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def make_handler(registry):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def handle(self):
            try:
                super().handle()
            except OSError:
                pass  # the client left

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            registry.fetched.append("%s %s" % (self.command, self.path))
            kind, last = self.path.split("/")[-2:]
            if kind == "manifests":
                self.send_manifest(self.path.split("/")[-3] + ":" + last)
            elif kind == "blobs" and self.command == "GET":
                # The registry's own host gives no blobs: it says where they are.
                self.send(307, b"", Location="https://127.0.0.1:%d/data/%s" % (registry.port, last))
            else:
                self.send_blob(registry.blobs.get(last))

        def send_manifest(self, short):
            try:
                raw, blobs = fake_ollama.registry_image(fake_ollama.Name.parse(short))
            except fake_ollama.Refused:
                return self.send(404, json.dumps({"errors": [{"code": "MANIFEST_UNKNOWN"}]}).encode())
            registry.blobs.update(blobs)
            return self.send(200, raw)

        def send_blob(self, raw):
            if raw is None:
                return self.send(404, b"")
            wanted = self.headers.get("Range", "").rpartition("=")[2]
            if not wanted:
                return self.send(200, raw)
            first, last = map(int, wanted.split("-"))
            return self.send(206, raw[first:last + 1],
                             Content_Range="bytes %d-%d/%d" % (first, last, len(raw)))

        def send(self, status, raw, **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            step = max(1, int(registry.rate * 0.02)) if registry.rate else len(raw) + 1
            for at in range(0, len(raw) if self.command == "GET" else 0, step):
                if registry.cut_at is not None and at >= registry.cut_at:
                    self.close_connection = True
                    return self.connection.close()
                self.wfile.write(raw[at:at + step])
                time.sleep(step / registry.rate if registry.rate else 0)
            return None

    return Handler
