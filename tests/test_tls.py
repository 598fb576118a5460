"""Section 12: TLS of the servers, with real clients (ssl, curl, openssl) and with those that stall, drip
or speak something else."""
import contextlib
import io
import json
import os
import re
import select
import shutil
import socket
import ssl
import subprocess
import sys
import threading

import pytest

import b9agent
from helpers import Program, agent_command, environment, run_agent, wait_until
from hostile_gateway import TOKEN
from test_http_hostile import GOOD, HOST, TestApi, read_answer, read_head

HERE = os.path.dirname(os.path.abspath(__file__))
TLS = os.path.join(HERE, "tls")
CA = os.path.join(TLS, "ca.pem")
pytestmark = pytest.mark.timeout(120)
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")


class Pair:
    """A certificate and its key, where a server is told to find them."""

    def __init__(self, folder):
        self.cert, self.key = str(folder / "tls.crt"), str(folder / "tls.key")

    def put(self, cert="server.pem", key="server.key", mode=0o600):
        """As renewers do it: another file in place of the old one."""
        for source, path, rights in ((cert, self.cert, 0o644), (key, self.key, mode)):
            if source:
                shutil.copyfile(os.path.join(TLS, source), path + ".new")
                os.chmod(path + ".new", rights)
                os.replace(path + ".new", path)
        return self


@pytest.fixture
def pair(tmp_path):
    return Pair(tmp_path).put()


class Secured:
    """A server over a TestApi, with TLS."""

    def __init__(self, pair, host="127.0.0.1"):
        self.text = io.StringIO()
        self.log = b9agent.Log(minimum="debug", stream=self.text)
        self.tls = b9agent.ServerTls(pair.cert, pair.key, self.log)
        self.api = TestApi(self.log)
        self.server = b9agent.ApiServer(self.api, host, 0, self.tls)
        self.server.start()

    @property
    def port(self):
        return self.server.port

    def plain(self, to="127.0.0.1"):
        return socket.create_connection((to, self.port), timeout=30, source_address=("127.0.0.1", 0))

    def connect(self, context=None):
        return (context or client()).wrap_socket(self.plain(), server_hostname="localhost",
                                                 suppress_ragged_eofs=False)

    def lines(self, *events):
        return [line for line in self.text.getvalue().splitlines() if line.split(" ")[2] in events]


def client(**attributes):
    context = ssl.create_default_context(cafile=CA)
    for name, value in attributes.items():
        setattr(context, name, value)
    return context


@pytest.fixture
def secured(pair):
    one = Secured(pair)
    yield one
    one.server.stop()


def ask(link, path=b"/open"):
    link.sendall(b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    return read_answer(link)[0]


# -- which listeners want it ------------------------------------------------------------

@pytest.mark.parametrize("host, wants", [
    ("127.0.0.1", False), ("127.255.0.1", False), ("::1", False), ("localhost", False), ("LocalHost", False),
    ("::ffff:127.0.0.1", False), ("::FFFF:127.0.0.1", False), ("100.64.0.7", False), ("0.0.0.0", True), ("::", True),
    ("192.168.1.2", True), ("100.64.0.8", True), ("::ffff:10.0.0.1", True), ("fe80::1", True), ("box.lan", True),
    ("127.0.0.1.example", True), ("127.example", True), ("localhost.example", True), ("", True), ("127.0.0.1\n", True)])
def test_all_but_loopback_and_the_tailnet_want_tls(host, wants):
    assert b9agent.wants_tls(host, "100.64.0.7") is wants
    assert b9agent.wants_tls(host) is (wants or host == "100.64.0.7")


# -- what is spoken ---------------------------------------------------------------------

@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_client_of_either_version_is_served(secured, version):
    wanted = getattr(ssl.TLSVersion, version)
    context = client(minimum_version=wanted, maximum_version=wanted)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with secured.connect(context) as link:
        assert link.version() == version.replace("_", ".") and link.selected_alpn_protocol() == "http/1.1"
        assert link.compression() is None and re.search("GCM|CHACHA20", link.cipher()[0])
        assert ask(link) == ask(link) == ask(link, b"/instant") == 200
        assert ask(link, b"/locked") == 401
    assert secured.server.url == "https://127.0.0.1:%d" % secured.port


def s_client(port, *arguments, typed=b"", until=None):
    """What `openssl s_client` says; `typed` is sent once it has said `until`."""
    command = ["openssl", "s_client", "-connect", "127.0.0.1:%d" % port, "-CAfile", CA, *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = b""
    with child:
        while until and until not in said:
            piece = os.read(child.stdout.fileno(), 65536)
            said += piece
            if not piece:
                break
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(typed)
            child.stdin.close()
        child.stdin = None
        said += child.stdout.read()
    return (said or b"").decode()


@needs_openssl
@pytest.mark.parametrize("flags, refused", [
    (["-tls1"], True), (["-tls1_1"], True), (["-tls1_2"], False), (["-tls1_3"], False),
    (["-tls1_2", "-cipher", "AES128-GCM-SHA256"], True),         # no forward secrecy
    (["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA"], True)])   # CBC
def test_old_versions_and_weak_ciphers_are_refused(secured, flags, refused):
    flags = flags + ["-cipher", "ALL:@SECLEVEL=0"] if "-cipher" not in flags else flags
    said = s_client(secured.port, *flags, "-verify_return_error")
    assert ("Cipher is (NONE)" in said) is refused, said
    assert ("Verify return code: 0 (ok)" in said) is not refused or refused


@needs_openssl
def test_a_client_cannot_ask_for_another_handshake(secured):
    said = s_client(secured.port, "-tls1_2", typed=b"R\n", until=b"---\n")
    assert "RENEGOTIATING" in said and re.search("no renegotiation|handshake failure|:error:", said), said
    with secured.connect() as link:
        assert ask(link) == 200


def test_an_end_that_only_the_connection_shows_is_told_under_tls(secured):
    """Else nobody could tell it from one that somebody on the way has made."""
    with secured.connect() as link:
        link.sendall(b"GET /stream HTTP/1.0\r\n\r\n")
        said = b""
        while True:
            piece = link.recv(65536)  # an SSLEOFError without that word
            if not piece:
                break
            said += piece
        assert said.endswith(b"\r\n\r\none\ntwo\n")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_is_served(secured):
    url = "https://localhost:%d" % secured.port
    got = subprocess.run(["curl", "-sS", "--noproxy", "*", "--cacert", CA, "--http1.0", url + "/stream", url + "/open"],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
    assert (got.returncode, got.stdout) == (0, b'one\ntwo\n{"ok": true}\n'), got.stdout


def test_a_name_of_the_certificate_may_stand_in_the_host_header_and_only_there(pair, state):
    """A web page of another name cannot have its certificate; without TLS the name is all there is."""
    log = b9agent.Log(stream=io.StringIO())
    api = b9agent.ControlApi(log, "0" * 64, ())
    server = b9agent.ApiServer(api, "127.0.0.1", 0, b9agent.ServerTls(pair.cert, pair.key, log))
    server.start()
    try:
        head = b"GET /health HTTP/1.1\r\nHost: box.example\r\n\r\n"
        for wrap, status in ((True, 200), (False, 421)):
            link = socket.create_connection(("127.0.0.1", server.port), 30)
            with client().wrap_socket(link, server_hostname="localhost") if wrap else link as link:
                link.sendall(head)
                assert read_answer(link)[0] == status
    finally:
        server.stop()


# -- who speaks something else ----------------------------------------------------------

def test_plain_http_from_elsewhere_is_a_400_that_says_https(pair, monkeypatch):
    monkeypatch.setattr(b9agent, "wants_tls", lambda *_: True)  # as if 127.0.0.2 were a network's
    other = Secured(pair, "127.0.0.2")
    try:
        with other.plain("127.0.0.2") as link:
            link.sendall(b"POST /take HTTP/1.1\r\n" + HOST + b"Authorization: Bearer right\r\nContent-Length: 9\r\n\r\n")
            status, headers, body = read_answer(link)
            assert status == 400 and headers["connection"] == "close"
            answer = json.loads(body)
            assert answer["error_code"] == "https_wanted" and "https://" in answer["suggestion"]
            assert link.recv(10) == b""
        assert other.api.seen == []
        with other.plain("127.0.0.2") as link:
            link.sendall(GOOD.replace(b"/open", b"/instant"))
            assert read_answer(link)[0] == 400
    finally:
        other.server.stop()


def test_plain_http_from_this_machine_is_served(secured, monkeypatch):
    for path in (b"/open", b"/instant", b"/locked"):
        with secured.plain() as link:
            assert ask(link, path) == (401 if path == b"/locked" else 200)
    monkeypatch.setattr(b9agent, "wants_tls", lambda *_: True)  # to an address of a network card, from itself
    with secured.plain() as link:
        assert ask(link) == 200


@pytest.mark.parametrize("sent", [
    b"\x16", b"\x16\x03\x01\x02\x00", b"\x16" + b"\xff" * 4000, b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
    b"\x80\x2e\x01\x00\x02", b"SSH-2.0-x\r\n\r\n", b"\0" * 5000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
def test_garbage_ends_its_own_connection_alone(secured, sent):
    with secured.connect() as good, secured.plain() as link:
        with contextlib.suppress(OSError):  # it may be closed before all is sent
            link.sendall(sent)
            link.shutdown(socket.SHUT_WR)
            while link.recv(65536):
                pass
        assert ask(good) == 200
    wait_until(lambda: not secured.server._connections, "no connection to be left")
    assert secured.lines("defect") == []


def client_hello():
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    half = client().wrap_bio(inward, outward, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        half.do_handshake()
    return outward.read()


@pytest.mark.parametrize("drips", [False, True])
def test_handshakes_that_stall_or_drip_are_ended_and_delay_nobody(secured, monkeypatch, drips):
    monkeypatch.setattr(b9agent, "HTTP_REQUEST_LIMIT_S", 1.0)
    hello = client_hello()
    stalled = [secured.plain() for _ in range(8)]
    over = threading.Event()

    def drip():
        for at in range(1, len(hello)):
            for link in stalled:
                with contextlib.suppress(OSError):
                    link.sendall(hello[at:at + 1])
            if over.wait(0.2):
                return
    for link, begun in zip(stalled, [b"", hello[:1], hello[:5], hello[:-1]] * 2):
        link.sendall(hello[:1] if drips else begun)
    thread = threading.Thread(target=drip, daemon=True)
    if drips:
        thread.start()
    for _ in range(3):
        with secured.connect() as link:
            assert ask(link) == 200
    for link in stalled:  # each is closed, though something comes all the time
        with contextlib.suppress(ConnectionResetError):
            assert link.recv(65536) == b""
        link.close()
    over.set()
    if drips:
        thread.join()
    assert secured.lines("defect") == []


def test_as_many_stalled_handshakes_as_there_is_room_for_leave_the_rest_a_closed_connection(secured):
    stalled = [secured.plain() for _ in range(secured.api.max_connections)]
    for link in stalled:
        link.sendall(b"\x16\x03")
    wait_until(lambda: len(secured.server._connections) == len(stalled), "all to be taken")
    with secured.plain() as link:
        assert link.recv(100) == b""  # and no word of plain HTTP to who speaks TLS
    for link in stalled:
        link.close()
    wait_until(lambda: not secured.server._connections, "all to be gone")
    with secured.connect() as link:
        assert ask(link) == 200


# -- streams, ends ----------------------------------------------------------------------

def test_a_stream_over_tls_is_whole_and_the_connection_goes_on(secured):
    with secured.connect() as link:
        link.sendall(b"GET /stream HTTP/1.1\r\n" + HOST + b"\r\n")
        assert read_head(link)[0] == 200
        body = b""
        while not body.endswith(b"0\r\n\r\n"):
            body += link.recv(100)
        assert body == b"4\r\none\n\r\n4\r\ntwo\n\r\n0\r\n\r\n"
        assert ask(link) == 200


@pytest.mark.parametrize("way", ["close", "reset", "close_notify"])
def test_a_stream_ends_when_its_reader_over_tls_leaves(secured, way):
    link = secured.connect()
    link.sendall(b"GET /endless HTTP/1.1\r\n" + HOST + b"\r\n")
    assert read_head(link)[0] == 200
    if way == "close_notify":
        link.settimeout(0)
        with contextlib.suppress(OSError):
            link.unwrap()
    else:
        if way == "reset":
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        link.close()
    assert secured.api.closed.wait(30)
    link.close()


def test_what_is_sent_while_a_stream_runs_is_answered_after_it(secured):
    for connect in (secured.connect, secured.plain):
        with connect() as link:
            link.sendall(b"GET /stream HTTP/1.1\r\n" + HOST + b"\r\n" + GOOD)
            said = b""
            while b'{"ok": true}' not in said:
                said += link.recv(65536)
            assert said.count(b"HTTP/1.1 200") == 2


def test_who_floods_a_stream_with_requests_loses_it(secured, monkeypatch):
    monkeypatch.setattr(b9agent, "HTTP_BODY_MAX_BYTES", 200000)
    monkeypatch.setattr(b9agent, "STREAM_LOOK_S", 0.01)
    for connect in (secured.connect, secured.plain):
        secured.api.closed.clear()
        with connect() as link:
            link.sendall(b"GET /endless HTTP/1.1\r\n" + HOST + b"\r\n")
            with contextlib.suppress(OSError):
                for _ in range(100):
                    link.sendall(b"x" * 65536)
            assert secured.api.closed.wait(30)


def test_a_client_over_tls_that_takes_a_large_answer_slowly_is_dropped(secured, monkeypatch):
    """The limit is one for the whole answer, not for each record of it."""
    monkeypatch.setattr(b9agent, "HTTP_PEER_LIMIT_S", 1.0)
    with secured.connect() as link:
        link.sendall(b"GET /large HTTP/1.1\r\n" + HOST + b"\r\n")
        came = 0
        with contextlib.suppress(OSError):
            while came < 31 << 20:
                piece = link.recv(16384)
                if not piece:
                    break
                came += len(piece)
                select.select([], [], [], 0.01)
        assert came < 30 << 20


def test_an_answer_that_goes_out_while_the_server_stops_is_not_in_clear_text(pair, monkeypatch):
    """SSLSocket.shutdown() from another thread would let who answers go on without TLS."""
    secured, begun, goes_on = Secured(pair), threading.Event(), threading.Event()
    shut, is_shut = b9agent._Connection.shut, threading.Event()
    monkeypatch.setattr(b9agent._Connection, "shut", lambda *of: (shut(*of), is_shut.set()))

    def slow(request):
        begun.set()
        goes_on.wait(30)
        return b9agent.Response(200, {"secret": "x" * 1000})
    secured.api.routes += (b9agent.Route("GET", "/slow", slow, True, "slow"),)
    raw, inward, outward = secured.plain(), ssl.MemoryBIO(), ssl.MemoryBIO()
    half = client().wrap_bio(inward, outward, server_hostname="localhost")
    seen = b""

    def pump(call, *arguments):
        nonlocal seen
        while True:
            try:
                return call(*arguments)
            except ssl.SSLWantReadError:
                raw.sendall(outward.read())
                piece = raw.recv(65536)
                assert piece
                seen += piece
                inward.write(piece)
    pump(half.do_handshake)
    half.write(b"GET /slow HTTP/1.1\r\n" + HOST + b"\r\n")
    raw.sendall(outward.read())
    assert begun.wait(30)
    thread = threading.Thread(target=secured.server.stop)
    thread.start()
    assert is_shut.wait(30)
    goes_on.set()
    said = b""
    while b"}" not in said:
        said += pump(half.read, 65536)
    assert said.startswith(b"HTTP/1.1 200 OK") and b"xxx" not in seen
    thread.join()
    raw.close()


# -- without blocking, as the front door does it ----------------------------------------

def test_a_handshake_on_a_socket_that_does_not_block(pair):
    tls = b9agent.ServerTls(pair.cert, pair.key, b9agent.Log(stream=io.StringIO()))
    near, far = socket.socketpair()
    near.setblocking(False)
    ours, waits = tls.wrap(near), 0
    answer = []

    def ask_it():
        with client().wrap_socket(far, server_hostname="localhost") as link:
            link.sendall(b"hello")
            answer.append(link.recv(100))
    thread = threading.Thread(target=ask_it, daemon=True)

    def until_done(call, *arguments):
        nonlocal waits
        while True:
            try:
                return call(*arguments)
            except b9agent.tls_waits():
                waits += 1
                if thread.ident is None:
                    thread.start()
                select.select([ours], [], [], 30)
    until_done(ours.do_handshake)
    assert until_done(ours.recv, 100) == b"hello" and waits
    ours.send(b"well")
    ours.close()
    thread.join(30)
    assert answer == [b"well"]


# -- the files --------------------------------------------------------------------------

@pytest.mark.parametrize("cert, key, mode, said, mend", [
    ("server.pem", "k3s-server.key", 0o600, "cannot be used: KEY_VALUES_MISMATCH", "made as a pair"),
    ("ca.pem", "server.key", 0o600, "cannot be used: KEY_VALUES_MISMATCH", "before its chain"),
    ("server.pem", "server.pem", 0o600, "cannot be used: ", "PEM"),
    ("README", "server.key", 0o600, "cannot be used: ", "PEM"),
    ("server.key", "server.pem", 0o600, "tls.crt holds a private key and others may read it", "chmod 600"),
    ("server.pem", "server.key", 0o644, "others may read it (mode 0644)", "chmod 600"),
    ("server.pem", "server.key", 0o640, "others may read it (mode 0640)", "chmod 600"),
    ("server.pem", "locked.key", 0o600, "cannot be used: ", "no passphrase"),
    ("server.pem", None, 0o600, "cannot read", "tls.cert and tls.key"),
    (None, "server.key", 0o600, "cannot read", "tls.cert and tls.key")])
def test_files_of_no_use_are_refused_with_their_name_and_a_mend(tmp_path, cert, key, mode, said, mend):
    pair = Pair(tmp_path).put(cert, key, mode)
    with pytest.raises(b9agent.UsageError) as caught:
        b9agent.ServerTls(pair.cert, pair.key, b9agent.Log(stream=io.StringIO()))
    assert said in caught.value.what and re.search(mend, caught.value.hint)
    assert str(tmp_path) in caught.value.what


@pytest.mark.parametrize("what", ["cut", "junk within", "a folder", "a key with the chain, shared"])
def test_other_files_of_no_use(pair, what):
    with open(pair.cert) as handle:
        text = handle.read()
    if what == "a folder":
        os.unlink(pair.cert)
        os.mkdir(pair.cert)
    else:
        with open(pair.cert, "w") as handle, open(pair.key) as key:
            handle.write({"cut": text[:300], "junk within": text.replace("A", "\0", 3),
                          "a key with the chain, shared": text + key.read()}[what])
    with pytest.raises(b9agent.UsageError) as caught:
        b9agent.ServerTls(pair.cert, pair.key, b9agent.Log(stream=io.StringIO()))
    assert pair.cert in caught.value.what and caught.value.hint


def test_one_file_may_hold_both(pair):
    with open(pair.cert) as cert, open(pair.key, "a") as key:
        key.write(cert.read())
    assert b9agent.ServerTls(pair.key, pair.key, b9agent.Log(stream=io.StringIO())).context()


def test_a_certificate_that_has_ended_is_served_with_a_warning(tmp_path):
    one = Secured(Pair(tmp_path).put("ended.pem"))
    try:
        line, = one.lines("certificate")
        assert " warning " in line and "tls.crt until=2020-01-02T03:04:05Z" in line and "renew it" in line
        with pytest.raises(ssl.SSLCertVerificationError), one.connect():
            pass
    finally:
        one.server.stop()


ENDS = {"server.pem": "2126-10-28T04:36:34Z", "ended.pem": "2020-01-02T03:04:05Z",
        "k3s-server.pem": "2126-10-28T19:56:28Z"}


@pytest.mark.parametrize("name", sorted(ENDS))
def test_the_end_of_a_certificate_is_what_openssl_says(name):
    path = os.path.join(TLS, name)
    with open(path) as handle:
        assert b9agent.certificate_end("a remark\n" + handle.read()) == ENDS[name]
    if shutil.which("openssl"):
        shown = subprocess.run(["openssl", "x509", "-in", path, "-noout", "-enddate"],
                               stdout=subprocess.PIPE, timeout=30).stdout.decode().strip()
        assert b9agent.utc_stamp(ssl.cert_time_to_seconds(shown.partition("=")[2])) == ENDS[name]


def test_any_bytes_for_a_certificate_have_an_end_or_none():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    with open(os.path.join(TLS, "server.pem")) as handle:
        good = ssl.PEM_cert_to_DER_cert(handle.read())

    @hypothesis.settings(max_examples=400, derandomize=True, database=None, deadline=None)
    @hypothesis.given(st.lists(st.tuples(st.integers(0, 120), st.binary(max_size=3)), max_size=4), st.integers(0, 600))
    def check(changes, length):
        raw = bytearray(good)
        for at, put in changes:
            raw[at:at + len(put)] = put
        found = b9agent.certificate_end(ssl.DER_cert_to_PEM_cert(bytes(raw[:length])))
        assert found == "" or re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found)
    check()
    for text in ("", "-----BEGIN CERTIFICATE----------END CERTIFICATE-----", "-----BEGIN CERTIFICATE-----é-----END",
                 "-----BEGIN CERTIFICATE-----A-----END"):
        assert b9agent.certificate_end(text) == ""


# -- renewal ----------------------------------------------------------------------------

def shown_certificate(secured):
    with open(os.path.join(TLS, "k3s-server-ca.pem")) as k3s:
        context = client(verify_flags=ssl.VerifyFlags.VERIFY_DEFAULT)
        context.load_verify_locations(cadata=k3s.read())
    with secured.connect(context) as link:
        assert ask(link) == 200
        return ssl.DER_cert_to_PEM_cert(link.getpeercert(True)).split()


def is_shown(secured, name):
    with open(os.path.join(TLS, name)) as handle:
        text = handle.read()
    return shown_certificate(secured) == text[text.index("-----BEGIN"):].split()


def test_renewed_files_are_taken_up_and_open_connections_stay(secured, pair, monkeypatch):
    with secured.connect() as link:
        assert ask(link) == 200 and is_shown(secured, "server.pem")
        pair.put("k3s-server.pem", "k3s-server.key")
        assert is_shown(secured, "server.pem")  # nobody has looked yet
        secured.tls._look_s = 0.0
        assert is_shown(secured, "k3s-server.pem") and ask(link) == 200
    assert [line.rpartition("until=")[2] for line in secured.lines("certificate")] == [
        "2126-10-28T04:36:34Z", "2126-10-28T19:56:28Z"]


@pytest.mark.parametrize("cert, key, mode, said", [
    ("k3s-server.pem", None, 0o600, "KEY_VALUES_MISMATCH"), (None, "k3s-server.key", 0o600, "KEY_VALUES_MISMATCH"),
    ("README", None, 0o600, "cannot be used"), ("k3s-server.pem", "k3s-server.key", 0o644, "others may read")])
def test_a_broken_renewal_leaves_the_old_pair_in_use_and_is_told_once(secured, pair, cert, key, mode, said):
    pair.put(cert, key, mode)
    for _ in range(3):
        secured.tls._look_s = 0.0
        assert is_shown(secured, "server.pem")
    line, = secured.lines("certificate_not_taken")
    assert said in line and " warning " in line and "the one from before is in use" in line
    if mode == 0o644:
        os.chmod(pair.key, 0o600)  # mended in place
    else:
        pair.put("k3s-server.pem", "k3s-server.key")
    secured.tls._look_s = 0.0
    assert is_shown(secured, "k3s-server.pem")


def test_files_that_are_gone_leave_the_old_pair_in_use(secured, pair):
    os.unlink(pair.cert)
    secured.tls._look_s = 0.0
    assert is_shown(secured, "server.pem")
    assert "cannot read" in secured.lines("certificate_not_taken")[0]


def test_it_looks_at_its_files_every_ten_seconds_and_not_more_often(pair, monkeypatch):
    clock, looks = [1000.0], []
    monkeypatch.setattr(b9agent, "now_s", lambda: clock[0])
    tls = b9agent.ServerTls(pair.cert, pair.key, b9agent.Log(stream=io.StringIO()))
    tls._read_stamp = lambda: looks.append(clock[0])
    for clock[0] in (1000.0, 1005.0, 1009.9, 1010.0, 1010.1, 1019.9, 1020.0):
        tls.context()
    assert looks == [1010.0, 1020.0]


def test_files_may_come_later_where_that_is_said(tmp_path):
    pair, text = Pair(tmp_path), io.StringIO()
    tls = b9agent.ServerTls(pair.cert, pair.key, b9agent.Log(stream=text), later=True)
    with pytest.raises(OSError, match="there is no certificate at .*tls.crt yet"):
        tls.context()
    near, far = socket.socketpair()
    with near, far, pytest.raises(OSError):
        tls.wrap(near)
    pair.put()
    tls._look_s = 0.0
    assert tls.context() and " info certificate " in text.getvalue()
    # What was left broken is mended by who brings it anew, and keeps nobody from starting.
    pair.put("README")
    tls = b9agent.ServerTls(pair.cert, pair.key, b9agent.Log(stream=text), later=True)
    with pytest.raises(OSError):
        tls.context()
    assert "certificate_not_taken" in text.getvalue() and "still=" not in text.getvalue()


# -- an agent ---------------------------------------------------------------------------

def flags(port, *more):
    return ("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(port), "--pool-name", "gpu", "--control-port",
            "0", "--keepalive-interval", "1") + more


@pytest.mark.parametrize("more, said", [
    (["--tls-cert", "{}.crt"], "of tls.cert and tls.key only one is set. They belong together"),
    (["--tls-key", "{}.key"], "only one is set"),
    (["--tls-cert", "{}.crt", "--tls-key", "{}.none"], "cannot read {}.none. "),
    (["--tls-cert", "{}.key", "--tls-key", "{}.crt"], "holds a private key and others may read it|cannot be used")])
def test_an_agent_with_files_of_no_use_does_not_start(home, pair, more, said):
    base = pair.cert[:-4]
    done = run_agent(home, *flags(9, *(word.format(base) for word in more)), BETA9_TOKEN=TOKEN)
    assert done.code == 2 and re.search(said.format(base), done.err), done
    assert "Traceback" not in done.err


def test_beyond_loopback_an_agent_does_not_start_without_tls_and_says_what_that_would_mean(home, hostile):
    ended = run_agent(home, *flags(hostile.port, "--control-host", "0.0.0.0"), BETA9_TOKEN=TOKEN)
    assert ended.code == 2 and "control.host 0.0.0.0 is beyond loopback and the tailnet" in ended.err
    assert "clear text" in ended.err and "tls.cert and tls.key, or tls: tailscale" in ended.err
    assert "insecure: true" in ended.err


def test_an_agent_waits_for_the_certificate_of_its_tailnet(agent, hostile):
    program = agent(*flags(hostile.port, "--tls", "tailscale", "--tailnet-socket", "none"), BETA9_TOKEN=TOKEN)
    program.wait_line("warning no_certificate .*there is no Tailscale here")
    program.wait_line(r"notice ready\b")
    assert program.stop() == 0


def test_on_loopback_the_control_api_stays_plain(agent, hostile, pair, home):
    program = agent(*flags(hostile.port, "--tls-cert", pair.cert, "--tls-key", pair.key), BETA9_TOKEN=TOKEN)
    program.wait_line("listening api=control url=http://127")
    assert run_agent(home, "status").code == 0


@pytest.fixture
def elsewhere():
    """(our network, another one) with a wire between them: 192.0.2.1 and 192.0.2.2."""
    Namespace = pytest.importorskip("test_tailnet", reason="needs hypothesis").Namespace
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip", "curl"))):
        pytest.skip("needs root, unshare, nsenter, ip and curl")
    with Namespace() as network, Namespace() as other:
        network.ip("link add wire0 type veth peer name wire1 netns %d" % other.holder.pid)
        for one, name, address in ((network, "wire0", "192.0.2.1"), (other, "wire1", "192.0.2.2")):
            one.ip("addr add %s/24 dev %s" % (address, name))
            one.ip("link set %s up" % name)
        yield network, other


@pytest.mark.root
@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1"])
def test_the_control_api_beyond_loopback_speaks_tls_and_its_own_machine_may_speak_plain(
        elsewhere, host, home, state, tmp_path):
    here, there = elsewhere
    pair = Pair(tmp_path).put()
    link = here.command(*agent_command("gateway", "--port", "1994", "--db", tmp_path / "db"))
    with Program(link, environment(home)) as gateway:
        gateway.wait_line("listening")
        made = json.loads(run_agent(home, "machine", "create", "--pool", "gpu", "--db", tmp_path / "db", "--json").out)
        command = agent_command(*flags(1994, "--control-port", "9999", "--machine-id", made["machine_id"],
                                       "--control-host", host, "--tls-cert", pair.cert, "--tls-key", pair.key))
        with Program(here.command(*command), environment(home, BETA9_TOKEN=made["token"])) as agent:
            agent.wait_line("listening api=control url=https://%s:9999" % re.escape(host))
            agent.wait_line(r" notice ready\b")

            def run(place, *words, **extra):
                with Program(place.command(*words), environment(home, **extra)) as one:
                    return one.wait(), one.text()
            code, said = run(here, *agent_command("status"))
            assert code == 0 and "ready" in said, said
            assert run(here, *agent_command("metrics"))[0] == 0
            url, token = "192.0.2.1:9999/status", (state / "control.token").read_text().strip()
            secure = ["curl", "-sS", "--cacert", CA, "--resolve", "localhost:9999:192.0.2.1", "-H",
                      "Authorization: Bearer " + token]
            assert '"ready"' in run(there, *secure, "https://localhost:9999/status")[1]
            code, said = run(there, "curl", "-sS", "-H", "Authorization: Bearer " + token, "http://" + url)
            assert '"https_wanted"' in said and "make a new one" in said and "machine_id" not in said
            there.ip("link set lo up")
            top = agent_command("top", "--once", "--host")
            code, said = run(there, *top, "192.0.2.1", B9AGENT_CONTROL_TOKEN=token)
            assert code == 2 and "https" in said, said
            code, said = run(there, *top, "https://192.0.2.1", B9AGENT_CONTROL_TOKEN=token)
            assert code == 5 and "certificate" in said, said  # of nobody whom this machine trusts
            # As a name of the certificate: a forwarder to it, on loopback there.
            forward = [sys.executable, "-c", FORWARD, "192.0.2.1", "9999"]
            with Program(there.command(*forward), environment(home)) as one:
                one.wait_line("up", "out")
                code, said = run(there, *top, "https://localhost:9999", B9AGENT_CONTROL_TOKEN=token, SSL_CERT_FILE=CA)
                assert code == 0 and "READY" in said, said
            assert agent.stop() == 0 and "defect" not in agent.text()


FORWARD = """
import socket, sys, threading
def copy(a, b):
    try:
        while True:
            piece = a.recv(65536)
            if not piece: break
            b.sendall(piece)
    except OSError: pass
    try: b.shutdown(socket.SHUT_WR)
    except OSError: pass
listener = socket.create_server(("127.0.0.1", 9999))
print("up", flush=True)
while True:
    one = listener.accept()[0]
    two = socket.create_connection((sys.argv[1], int(sys.argv[2])))
    for pair in ((one, two), (two, one)):
        threading.Thread(target=copy, args=pair, daemon=True).start()
"""


@pytest.mark.root
def test_insecure_is_said_and_then_it_is_plain(elsewhere, home, state):
    here, there = elsewhere
    command = agent_command(*flags(9, "--control-port", "9999", "--control-host", "192.0.2.1", "--insecure"))
    with Program(here.command(*command), environment(home, BETA9_TOKEN=TOKEN)) as agent:
        agent.wait_line("listening api=control url=http://192.0.2.1:9999")
        assert '"ok"' in there.get("http://192.0.2.1:9999/health")
