"""Section 15b: the tailnet address, from recordings, from a tailscaled and a tailscale that are ours,
and from an interface in a network namespace."""
import contextlib
import http.client
import io
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from hypothesis import given, settings, strategies

import b9agent
from b9agent import TailnetReading, WhoIs
from helpers import Program, StallMeter, agent_command, environment, run_agent, wait_until
from hostile_gateway import TOKEN

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = os.path.join(os.environ.get("B9AGENT_FIXTURES") or os.path.join(
    HERE, "..", "..", "shared", "fixtures"), "tailscale")
pytestmark = pytest.mark.timeout(180)


def recording(name):
    try:
        with open(os.path.join(FIXTURES, name), "rb") as handle:
            return handle.read()
    except OSError:
        pytest.skip("there is no recording " + name)


def status_json(state="Running", addresses=("100.64.0.7", "fd7a:115c:a1e0::7"), name="box.tail1.ts.net.",
                **more):
    """As tailscaled says it; this is our own sample, in its shape."""
    return json.dumps(dict({
        "Version": "1.94.2", "BackendState": state, "TailscaleIPs": addresses and list(addresses),
        "Self": {"HostName": "box", "DNSName": name, "TailscaleIPs": addresses and list(addresses)},
        "Peer": None}, **more), indent="\t").encode()


# -- what is said -----------------------------------------------------------------------

# Read off the recordings by eye.
RECORDED = [
    ("status_1.102_dgx-spark_scrubbed.json",
     TailnetReading("up", "100.64.0.1", "dgx-spark-01.example-tailnet.ts.net")),
    ("status_1.102_macos_peers-false_shape.json",
     TailnetReading("up", "100.101.102.103", "dash.example-tailnet.ts.net")),
    ("status_1.98_needs-login.json",
     TailnetReading("down", message="Tailscale is not logged in")),
    ("status_1.76_peers-no-self.json",
     TailnetReading("down", message="Tailscale runs, but gave this machine no IPv4 address")),
    ("status_stopped.txt", None), ("ip_4.txt", None), ("version.txt", None),
    ("whois_person_shape.json", None), ("whois_tagged_shape.json", None),
    ("whois_shared_shape.json", None), ("whois_unknown_stderr.txt", None)]


@pytest.mark.parametrize("name, expected", RECORDED, ids=[name for name, _ in RECORDED])
def test_recordings(name, expected):
    assert b9agent.parse_tailscale_status(recording(name)) == expected


@pytest.mark.parametrize("body, expected", [
    (status_json(), TailnetReading("up", "100.64.0.7", "box.tail1.ts.net")),
    (status_json(TUN=False), TailnetReading("up", "100.64.0.7", "box.tail1.ts.net", tun=False)),
    (status_json("Stopped"), TailnetReading("down", "", "box.tail1.ts.net", message="Tailscale is stopped")),
    (status_json("NoState", None, ""), TailnetReading("waiting", message="tailscaled is starting")),
    (status_json("Starting"), TailnetReading("waiting", "", "box.tail1.ts.net",
                                             message="tailscaled is connecting")),
    (status_json("NeedsMachineAuth", None, ""), TailnetReading(
        "down", message="an admin of the tailnet has to approve this machine")),
    # What is no address of a tailnet is none of ours: 0.0.0.0 would be every address to a listener.
    (status_json(addresses=["0.0.0.0", "192.168.1.2", "100.128.0.1", "fd7a::1", 7, None], name=""),
     TailnetReading("down", message="Tailscale runs, but gave this machine no IPv4 address")),
    (status_json(addresses=["fd7a:115c:a1e0::7", "100.100.7.8"], name="a\x1b[2J.ts.net"),
     TailnetReading("up", "100.100.7.8")),
    (status_json("Purring"), None), (status_json(["Running"]), None), (b'{"BackendState": null}', None),
    (b"[]", None), (b"", None), (b"{", None), (b"\xff", None), (b"[" * 100000, None)])
def test_statuses(body, expected):
    assert b9agent.parse_tailscale_status(body) == expected


@pytest.mark.parametrize("address, is_one", [
    ("100.64.0.0", True), ("100.127.255.255", True), ("100.63.255.255", False), ("100.128.0.0", False),
    ("101.64.0.1", False), ("0.0.0.0", False), ("100.64.0", False), ("100.64.0.1\n", False),
    ("100.64.0.1\0", False), ("100.64.0.256", False), ("::ffff:100.64.0.1", False), (None, False),
    (["100.64.0.1"], False), ("\ud800", False), ("1" * 100000, False)])
def test_the_range_of_tailnets(address, is_one):
    assert b9agent.is_tailnet_address(address) is is_one


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(strategies.data())
def test_mutated_statuses_are_readings_or_nothing(data):
    seed = data.draw(strategies.sampled_from([status_json(), status_json("NeedsLogin", None, "")] + [
        recording(name) for name, _ in RECORDED[:4] if os.path.exists(os.path.join(FIXTURES, name))]))
    body = bytearray(seed)
    for _ in range(data.draw(strategies.integers(1, 8))):
        at = data.draw(strategies.integers(0, len(body)))
        body[at:at + data.draw(strategies.integers(0, 9))] = data.draw(strategies.binary(max_size=9))
    found = b9agent.parse_tailscale_status(bytes(body))
    assert found is None or (found.state == "up") == b9agent.is_tailnet_address(found.address)


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(strategies.recursive(strategies.none() | strategies.booleans() | strategies.text(max_size=8)
                            | strategies.integers(), lambda inner: strategies.lists(inner, max_size=3)
                            | strategies.dictionaries(strategies.sampled_from(
                                ["Self", "TailscaleIPs", "DNSName", "TUN"]), inner)))
def test_any_value_may_stand_anywhere(value):
    for body in ({"BackendState": "Running", "TailscaleIPs": value}, {"BackendState": value},
                 {"BackendState": "Running", "Self": value, "TUN": value}):
        b9agent.parse_tailscale_status(json.dumps(body).encode())


# -- a tailscaled of ours --------------------------------------------------------------

class Tailscaled:
    """The local API of a tailscaled.  answer: the body of a status, or bytes of a whole answer, or a
    function of the connection; peers: what is said of HOST:PORT; asked: how often."""

    def __init__(self, folder, answer=None):
        self.path, self.peers = str(folder / "tailscaled.sock"), {}
        self.answer, self.asked, self.refused = answer or status_json(), 0, []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(16)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            with link, contextlib.suppress(OSError):
                self.asked += 1
                self._answer(link)

    def _answer(self, link):
        head = b""
        while b"\r\n\r\n" not in head:
            head += link.recv(65536)
        answer = self.answer
        if callable(answer):
            answer(link, self._ended)
            return
        whois = re.match(rb"GET /localapi/v0/whois\?addr=(\S+) HTTP/1.1\r\n", head)
        # As the real one, which defends itself against web pages so.
        if whois and b"\r\nHost: local-tailscaled.sock\r\n" in head:
            body = self.peers.get(whois.group(1).decode())
            answer = (b"HTTP/1.1 404 Not Found\r\nContent-Length: 14\r\n\r\npeer not found" if body is None else
                      b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        elif not head.startswith(b"GET /localapi/v0/status?peers=false HTTP/1.1\r\n") or \
                b"\r\nHost: local-tailscaled.sock\r\n" not in head:
            self.refused.append(head)
            answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
        elif not answer.startswith(b"HTTP/"):
            answer = (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTailscale-Version: 1.94.2\r\n"
                      b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(answer), answer))
        link.sendall(answer)

    def close(self):
        self._ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        assert self.refused == []


@pytest.fixture
def tailscaled():
    """tailscaled(answer): a stand-in in a folder of its own, for a path may have 107 bytes."""
    started, folders = [], []

    def start(answer=None):
        folders.append(tempfile.TemporaryDirectory(prefix="b9ts"))
        started.append(Tailscaled(pathlib.Path(folders[-1].name), answer))
        return started[-1]
    yield start
    for one in started:
        one.close()
    for folder in folders:
        folder.cleanup()


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without a trace of Tailscale, whatever is on the one that runs this."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(b9agent, "TAILSCALED_SOCKETS", ())
    monkeypatch.setattr(b9agent, "TAILSCALED_SERVICES", ())
    monkeypatch.setattr(b9agent, "_MAC_APP", "/nowhere")
    monkeypatch.setattr(b9agent, "tailnet_interface_address", lambda: "")
    return monkeypatch


def program(tmp_path, text, name="tailscale"):
    """In the PATH of `bare`."""
    path = tmp_path / "bin" / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


UP = TailnetReading("up", "100.64.0.7", "box.tail1.ts.net")


def test_the_socket_is_asked_as_it_wants_to_be(tailscaled, bare):
    one = tailscaled()
    assert b9agent.read_tailnet(one.path) == UP._replace(source="socket")
    bare.setattr(b9agent, "TAILSCALED_SOCKETS", ("/nowhere/s", one.path, one.path))
    assert b9agent.read_tailnet(None) == UP._replace(source="socket")
    assert one.asked == 2


def hang(_link, ended):
    ended.wait(30)


def drip(link, ended):
    for byte in status_json():
        link.sendall(bytes([byte]))
        if ended.wait(0.05):
            return


def flood(link, _ended):
    link.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{\"BackendState\": \"")
    for _ in range(160):
        link.sendall(b"R" * 65536)


@pytest.mark.parametrize("answer, said", [
    (hang, "no answer within 2 s"), (drip, "not an HTTP answer|no answer within"),
    (flood, "more than 1048576 bytes"), (lambda link, ended: None, "closed"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{}", "cut off"),
    (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\noops", "an answer of no use"),
    (lambda link, ended: link.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "not an HTTP answer"),
    (b"[]", "an answer of no use")],
    ids=["hangs", "drips", "floods", "closes", "cut", "500", "ssh", "list"])
def test_a_tailscaled_that_is_not_itself_is_waited_for(answer, said, tailscaled, bare):
    one, began = tailscaled(answer), time.monotonic()
    found = b9agent.read_tailnet(one.path)
    assert time.monotonic() - began < 10  # two seconds, on a busy machine
    assert found[:4] == ("waiting", "", "", "")
    assert re.search(said, found.message), found.message


def test_a_socket_that_nobody_serves(bare, tmp_path):
    path = str(tmp_path / "s")
    assert b9agent.read_tailnet(path).state == "waiting"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(path)
    assert b9agent.read_tailnet(path) == TailnetReading(
        "waiting", message="tailscaled does not answer at %s: connection refused" % path)
    assert "too long" in b9agent.read_tailnet("/tmp/" + "x" * 200).message


def test_the_program_is_asked_where_the_socket_does_not_help(tailscaled, bare, tmp_path):
    shown = status_json().decode()
    program(tmp_path, "echo '%s'\necho 'a brace } behind it'\n" % shown)
    assert b9agent.read_tailnet(None).state == "down"  # nobody's JSON
    program(tmp_path, 'echo "$@" > %s/asked\necho "Warning: client version is not the server\'s" >&2\n'
            "echo '%s'\necho 'Health check: so so' >&2\n" % (tmp_path, shown))
    assert b9agent.read_tailnet(None) == UP._replace(source="cli")
    assert (tmp_path / "asked").read_text() == "status --json --peers=false\n"
    bare.setattr(b9agent, "TAILSCALED_SOCKETS", (tailscaled(b"garbage").path,))
    assert b9agent.read_tailnet(None) == UP._replace(source="cli")
    one = tailscaled(status_json("NeedsLogin", None, ""))
    bare.setattr(b9agent, "TAILSCALED_SOCKETS", (one.path,))
    assert b9agent.read_tailnet(None).source == "socket"  # whatever it says, it is the one to know


@pytest.mark.parametrize("text, said", [
    ("echo failed to connect to local tailscaled; echo second; exit 1", "failed to connect to local tailscaled"),
    ("exit 0", "nothing"), ("printf '\\033[2Jx'", "\\x1b[2Jx"), ("kill -9 $$", "was ended by signal 9"),
    ("while :; do echo '{{{{{{{{{{{{{{{{{{{{{{{{{{'; done", "bytes|time limit")])
def test_a_program_that_does_not_tell(text, said, bare, tmp_path):
    program(tmp_path, text + "\n")
    found, began = b9agent.read_tailnet(None), time.monotonic()
    assert found[:4] == ("down", "", "", "") and found.message.startswith("tailscale says: ")
    assert said in found.message or re.search("bytes|time limit", found.message), found.message
    assert time.monotonic() - began < 10


def test_the_interface_is_the_last_to_be_looked_at(bare, tmp_path, tailscaled):
    bare.setattr(b9agent, "tailnet_interface_address", lambda: "100.99.1.2")
    by_interface = TailnetReading("up", "100.99.1.2", source="interface")
    assert b9agent.read_tailnet(None) == by_interface
    assert b9agent.read_tailnet("none") == TailnetReading()
    program(tmp_path, "exit 1\n")
    bare.setattr(b9agent, "TAILSCALED_SOCKETS", (tailscaled(b"garbage").path,))
    assert b9agent.read_tailnet(None) == by_interface
    program(tmp_path, "echo '%s'\n" % status_json("Stopped").decode())
    assert b9agent.read_tailnet(None).state == "down"


def test_an_installed_service_is_worth_a_wait_and_a_program_alone_is_not(bare, tmp_path):
    assert b9agent.read_tailnet(None) == TailnetReading()
    program(tmp_path, "exit 1\n")
    assert b9agent.read_tailnet(None).state == "down"
    service = tmp_path / "tailscaled.service"
    service.write_text("")
    bare.setattr(b9agent, "TAILSCALED_SERVICES", (str(service),))
    assert b9agent.read_tailnet(None).state == "waiting"


# -- who a peer is ----------------------------------------------------------------------

def whois_json(login="alice@example.com", tags=None, name="phone.tail1.ts.net.", node=(), **more):
    """As tailscaled says it; this is our own sample, in its shape."""
    found = dict({"ID": 1, "Name": name, "Addresses": ["100.64.0.9/32"]}, **dict(node))
    if tags is not None:
        found["Tags"] = tags
    return json.dumps(dict({"Node": found, "UserProfile": {"ID": 2, "LoginName": login}, "CapMap": None}, **more)).encode()


ALICE = WhoIs("alice@example.com", (), "phone.tail1.ts.net")


@pytest.mark.parametrize("name, expected", [  # read off the recordings by eye
    ("whois_person_shape.json", WhoIs("pt@example.com", (), "phone.example-tailnet.ts.net")),
    ("whois_tagged_shape.json", WhoIs("", ("tag:ci",), "ci.example-tailnet.ts.net")),
    ("whois_shared_shape.json", WhoIs("someone@example.org", (), "laptop.example-tailnet.ts.net")),
    ("whois_unknown_stderr.txt", None), ("status_1.102_dgx-spark_scrubbed.json", None), ("version.txt", None)])
def test_recordings_of_whois(name, expected):
    assert b9agent.parse_whois(recording(name)) == expected


@pytest.mark.parametrize("body, expected", [
    (whois_json(), ALICE), (whois_json(tags=[]), ALICE), (whois_json(tags=None, node={"Tags": None}), ALICE),
    (whois_json("tagged-devices", ["tag:ci", "tag:gpu-1"]), WhoIs("", ("tag:ci", "tag:gpu-1"), "phone.tail1.ts.net")),
    # A tagged machine is nobody's, whatever its profile says.
    (whois_json("alice@example.com", ["tag:ci"]), WhoIs("", ("tag:ci",), "phone.tail1.ts.net")),
    (whois_json("tagged-devices"), WhoIs("", (), "phone.tail1.ts.net")),
    # Another tailnet gives its machines the tags that it likes.
    (whois_json("tagged-devices", ["tag:ci"], node={"Sharer": 7}), WhoIs("", (), "phone.tail1.ts.net")),
    (whois_json("tagged-devices", ["tag:ci"], node={"Hostinfo": {"ShareeNode": True}}),
     WhoIs("", (), "phone.tail1.ts.net")),
    (whois_json("tagged-devices", ["tag:ci"], node={"Hostinfo": {"OS": "linux"}}), WhoIs("", ("tag:ci",),
                                                                                        "phone.tail1.ts.net")),
    (whois_json("bob@github"), WhoIs("bob@github", (), "phone.tail1.ts.net")),
    (whois_json("tag:ci"), None), (whois_json(tags=["ci"]), None), (whois_json(tags="tag:ci"), None),
    (whois_json(tags=["tag:ci", 7]), None), (whois_json(tags={"tag:ci": 1}), None), (whois_json(""), None),
    (whois_json("a b"), None), (whois_json("a\x1b[2J"), None), (whois_json("a\nb"), None), (whois_json("x" * 255), None),
    (whois_json(7), None), (whois_json(None), None), (whois_json(["alice@example.com"]), None), (whois_json(name=""), None),
    (whois_json(name=None), None), (whois_json(Node=None), None), (whois_json(UserProfile=None), None),
    (whois_json(Node=[]), None), (b"null", None), (b"[]", None), (b"", None), (b"{", None), (b"\xff", None),
    (b"[" * 100000, None), (b"peer not found", None)])
def test_who_is_said_to_be_a_peer(body, expected):
    assert b9agent.parse_whois(body) == expected


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(strategies.data())
def test_mutated_whois_answers_are_somebody_or_nobody(data):
    body = bytearray(data.draw(strategies.sampled_from([whois_json(), whois_json("tagged-devices", ["tag:ci"])])))
    for _ in range(data.draw(strategies.integers(1, 8))):
        at = data.draw(strategies.integers(0, len(body)))
        body[at:at + data.draw(strategies.integers(0, 9))] = data.draw(strategies.binary(max_size=9))
    found = b9agent.parse_whois(bytes(body))
    assert found is None or not (found.login and found.tags)
    for value in (json.loads(whois_json()), data.draw(strategies.recursive(
            strategies.none() | strategies.integers() | strategies.text(max_size=5), lambda inner: strategies.lists(
                inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=5), inner, max_size=3)))):
        for key in ("Tags", "Name", "Sharer", "Hostinfo"):
            b9agent.parse_whois(whois_json(node={key: value}))


def tailnet_of(wanted, pair=()):
    return b9agent.Tailnet(wanted, b9agent.Log(stream=io.StringIO()), lambda status: None, pair)


def test_a_peer_is_asked_for_by_its_address_and_port(tailscaled, bare):
    one = tailscaled()
    one.peers = {"100.64.0.9:5555": whois_json(), "[fd7a:115c:a1e0::9]:80": whois_json("bob@example.com")}
    tailnet = tailnet_of(one.path)
    assert tailnet.whois("100.64.0.9", 5555) == tailnet.whois("::ffff:100.64.0.9", 5555) == ALICE
    assert tailnet.whois("fd7a:115c:a1e0::9", 80).login == "bob@example.com"
    assert tailnet.whois("100.64.0.9", 5556) is None  # in userspace networking the port is who
    asked = one.asked
    for host in ("", "x", "--help", "100.64.0.9 HTTP/1.1\r\nX: y", "100.64.0.9&addr=100.64.0.1", "a" * 46, "fe80::1%eth0"):
        assert tailnet.whois(host, 80) is None
    assert one.asked == asked and tailnet_of("none").whois("100.64.0.9", 5555) is None
    bare.setattr(b9agent, "TAILSCALED_SOCKETS", ("/nowhere/s", one.path))
    assert tailnet_of(None).whois("100.64.0.9", 5555) == ALICE


def test_without_the_socket_the_program_is_asked_who_a_peer_is(tailscaled, bare, tmp_path):
    assert tailnet_of(None).whois("100.64.0.9", 80) is None  # nobody to ask
    program(tmp_path, 'echo "$@" > %s/asked\nprintf \'%%s\' \'%s\'\n' % (tmp_path, whois_json().decode()))
    assert tailnet_of(None).whois("100.64.0.9", 80) == ALICE
    assert (tmp_path / "asked").read_text() == "whois --json 100.64.0.9:80\n"
    assert tailnet_of(None).whois("fd7a::9", 80) == ALICE
    assert (tmp_path / "asked").read_text() == "whois --json [fd7a::9]:80\n"
    bare.setattr(b9agent, "TAILSCALED_SOCKETS", (tailscaled(lambda link, ended: None).path,))
    assert tailnet_of(None).whois("100.64.0.9", 80) == ALICE
    one = tailscaled()  # whatever it says, it is the one to know
    bare.setattr(b9agent, "TAILSCALED_SOCKETS", (one.path,))
    assert tailnet_of(None).whois("100.64.0.9", 80) is None
    program(tmp_path, "echo peer not found >&2; exit 1\n")
    bare.setattr(b9agent, "TAILSCALED_SOCKETS", ())
    assert tailnet_of(None).whois("100.64.0.9", 80) is None


@pytest.mark.parametrize("text", ["exec sleep 30", "while :; do echo '{{{{{{{{'; done"])
def test_a_tailscale_that_hangs_costs_whois_its_limit_once(text, tailscaled, bare, tmp_path):
    program(tmp_path, text + "\n")
    bare.setattr(b9agent, "TAILNET_LIMIT_S", 0.5)
    bare.setattr(b9agent, "TAILSCALED_SOCKETS", (tailscaled(hang).path,))
    calls, run = [], b9agent.run_command
    bare.setattr(b9agent, "run_command", lambda argv, limit_s: calls.append(limit_s) or run(argv, limit_s))
    assert tailnet_of(None).whois("100.64.0.9", 80) is None and calls == []  # the socket took all of it
    bare.setattr(b9agent, "TAILSCALED_SOCKETS", ())
    assert tailnet_of(None).whois("100.64.0.9", 80) is None
    assert len(calls) == 1 and calls[0] <= 0.5


@pytest.mark.parametrize("answer", [hang, drip, flood, lambda link, ended: None, b"HTTP/1.1 200 OK\r\n\r\n",
                                    lambda link, ended: link.sendall(b"\0" * 100)])
def test_a_tailscaled_that_is_not_itself_tells_of_nobody(answer, tailscaled, bare):
    bare.setattr(b9agent, "TAILNET_LIMIT_S", 0.5)
    assert tailnet_of(tailscaled(answer).path).whois("100.64.0.9", 80) is None


# -- its certificate --------------------------------------------------------------------

CERTIFICATE, OTHER_CERTIFICATE, KEY = ((pathlib.Path(HERE) / "tls" / name).read_text()
                                       for name in ("server.pem", "other.pem", "server.key"))


def giver(tmp_path, certificate=CERTIFICATE, key=KEY):
    """A tailscale that gives these, as the real one does with "-": the one, then the other."""
    for name, text in (("given.crt", certificate), ("given.key", key)):
        (tmp_path / name).write_text(text)
    return program(tmp_path, 'echo "$@" >> %s/asked\necho "Warning: client version is not the server\'s" >&2\n'
                   "while read -r line; do echo \"$line\"; done < %s/given.crt\n"
                   "while read -r line; do echo \"$line\"; done < %s/given.key\n" % (tmp_path, tmp_path, tmp_path))


class Kept:
    """A Tailnet that keeps a certificate."""

    def __init__(self, folder, wanted=None):
        self.stream, self.folder = io.StringIO(), folder / "state" / "tls"
        self.paths = [str(self.folder / ("tailnet." + end)) for end in ("crt", "key")]
        self.log = b9agent.Log(stream=self.stream)
        self.tailnet = b9agent.Tailnet(wanted, self.log, lambda status: None, self.paths)

    def keep(self, name="box.tail1.ts.net"):
        self.tailnet._keep_pair(name)
        return [line for line in self.stream.getvalue().splitlines() if " no_certificate " in line]


def test_a_certificate_of_the_tailnet_is_fetched_and_used(bare, tmp_path):
    giver(tmp_path)
    one = Kept(tmp_path)
    tls = b9agent.ServerTls(*one.paths, one.log, later=True)
    with pytest.raises(OSError, match="no certificate at"):
        tls.context()
    assert one.keep() == []
    assert (tmp_path / "asked").read_text() == "cert --cert-file - --key-file - box.tail1.ts.net\n"
    texts = [pathlib.Path(path).read_text() for path in one.paths]
    assert texts == [CERTIFICATE[CERTIFICATE.index("-----BEGIN"):], KEY[KEY.index("-----BEGIN"):]]
    assert [os.stat(path).st_mode & 0o777 for path in one.paths] == [0o600] * 2
    assert one.folder.stat().st_mode & 0o777 == 0o700 and sorted(os.listdir(one.folder)) == ["tailnet.crt", "tailnet.key"]
    tls._look_s = 0.0
    assert tls.context()
    assert "PRIVATE" not in one.stream.getvalue()


def test_it_is_asked_for_once_a_day_and_the_renewed_one_is_kept(bare, tmp_path):
    clock = [1000.0]
    bare.setattr(b9agent, "now_s", lambda: clock[0])
    giver(tmp_path)
    one = Kept(tmp_path)
    asked = lambda: len((tmp_path / "asked").read_text().splitlines())
    for clock[0] in (1000.0, 1005.0, 80000.0):
        one.keep()
    assert asked() == 1
    before = os.stat(one.paths[0]).st_ino
    clock[0] += 86400.0
    one.keep()
    assert asked() == 2 and os.stat(one.paths[0]).st_ino == before  # the same: nothing is written
    giver(tmp_path, OTHER_CERTIFICATE)
    clock[0] += 86400.0
    one.keep()
    assert pathlib.Path(one.paths[0]).read_text() in OTHER_CERTIFICATE
    one.keep("renamed.tail1.ts.net")  # at once
    assert asked() == 4 and one.keep("") == [] and asked() == 4


@pytest.mark.parametrize("text, said, mend", [
    ("echo '500 Internal Server Error: your Tailscale account does not support getting TLS certs' >&2; exit 1",
     "does not support getting TLS certs", "Enable HTTPS Certificates, and MagicDNS, on the DNS page"),
    ("echo 'Access denied: cert access denied'; exit 1", "cert access denied", "sudo tailscale set --operator=USER"),
    ("echo one; echo 'x\033[2J' two; exit 1", "x\\x1b[2J two", "tailscale cert box.tail1.ts.net"),
    ("exit 0", "", "tried again by itself"), ("kill -9 $$", "was ended by signal 9", "tried again"),
    ("echo '-----BEGIN CERTIFICATE-----'; echo QQ==", "QQ==", "tried again")])
def test_no_certificate_is_told_once_with_what_mends_it(text, said, mend, bare, tmp_path):
    clock = [1000.0]
    bare.setattr(b9agent, "now_s", lambda: clock[0])
    if "kill" not in text:
        text = text.replace("exit", "echo >> %s/asked; exit" % tmp_path)
    program(tmp_path, text + "\n")
    one = Kept(tmp_path)
    for clock[0] in (1000.0, 1299.0, 1300.0, 1600.0):
        told = one.keep()
    line, = told
    assert "tailscale gives no certificate: " + said in line.replace('"', "") or said in line
    assert mend in line and not one.folder.exists()
    if (tmp_path / "asked").exists():
        assert (tmp_path / "asked").read_text() == "\n" * 3
    giver(tmp_path)
    clock[0] += 300.0
    one.keep()
    assert os.path.exists(one.paths[1])


def test_a_key_without_its_certificate_is_neither_kept_nor_shown(bare, tmp_path):
    giver(tmp_path, "no certificate here\n")
    one = Kept(tmp_path)
    line, = one.keep()
    assert "gives no certificate" in line and KEY.splitlines()[-2] not in line and "PRIVATE" not in line
    assert not one.folder.exists()


def test_without_the_program_or_room_there_is_no_certificate(bare, tmp_path):
    one = Kept(tmp_path)
    assert "tailscale: No such file or directory" in one.keep()[0]
    giver(tmp_path)
    (tmp_path / "state").mkdir(mode=0o700)
    one.folder.write_text("a file in its place")
    assert "cannot make the folder" in Kept(tmp_path).keep()[0]


def test_a_key_that_others_may_read_is_written_anew(bare, tmp_path):
    giver(tmp_path)
    one = Kept(tmp_path)
    one.keep()
    os.chmod(one.paths[1], 0o644)
    one.keep("other.tail1.ts.net")
    assert os.stat(one.paths[1]).st_mode & 0o777 == 0o600


def test_the_thread_of_the_tailnet_keeps_the_certificate(bare, tailscaled, tmp_path):
    daemon = tailscaled()
    path = giver(tmp_path)
    one = Kept(tmp_path, daemon.path)
    one.tailnet.start()
    try:
        wait_until(lambda: os.path.exists(one.paths[0]), "its certificate")
    finally:
        one.tailnet.stop()
    assert (tmp_path / "asked").read_text() == (
        "--socket %s cert --cert-file - --key-file - box.tail1.ts.net\n" % daemon.path) and path


# -- the thread -------------------------------------------------------------------------

class Watched:
    """A Tailnet that is looked at."""

    def __init__(self, wanted=None):
        self.stream, self.told = io.StringIO(), []
        self.tailnet = b9agent.Tailnet(wanted, b9agent.Log(stream=self.stream), self.told.append)

    def lines(self):
        return self.stream.getvalue().splitlines()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tailnet.stop()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "tailnet"]


def test_without_tailscale_there_is_no_thread_and_no_word(bare):
    with Watched() as watched:
        for _ in range(3):
            watched.tailnet.start()
        assert threads() == [] and watched.tailnet.settled and watched.lines() == []
        assert watched.tailnet.status() == {"state": "none", "address": None, "name": None,
                                            "source": None, "message": ""}
    assert watched.lines() == [] and watched.told == []


def test_tailscale_that_is_installed_later_is_found(bare, tmp_path, tailscaled):
    bare.setattr(b9agent, "TAILNET_RARELY_S", 0.0)
    with Watched() as watched:
        watched.tailnet.start()
        assert threads() == []
        bare.setattr(b9agent, "TAILSCALED_SOCKETS", (tailscaled().path,))
        watched.tailnet.start()
        wait_until(lambda: watched.told, "the address")
        assert len(threads()) == 1
        watched.tailnet.start()
        assert len(threads()) == 1
    assert threads() == []


def test_only_changes_are_told(bare, tailscaled):
    bare.setattr(b9agent, "TAILNET_EVERY_S", 0.01)
    one = tailscaled()
    with Watched(one.path) as watched:
        watched.tailnet.start()
        wait_until(lambda: one.asked > 5, "some looks")
        one.answer = status_json(addresses=["100.64.0.8"])
        wait_until(lambda: len(watched.told) == 2, "the change")
        one.answer = status_json("Stopped")
        wait_until(lambda: len(watched.told) == 3, "the end")
    assert [(row["state"], row["address"], row["source"]) for row in watched.told] == [
        ("up", "100.64.0.7", "socket"), ("up", "100.64.0.8", "socket"), ("down", None, "socket")]
    assert [line.split(" ", 1)[1] for line in watched.lines()] == [
        "notice tailnet state=up address=100.64.0.7 name=box.tail1.ts.net source=socket",
        "notice tailnet state=up address=100.64.0.8 name=box.tail1.ts.net source=socket",
        'info tailnet state=down name=box.tail1.ts.net source=socket message="Tailscale is stopped"']


def test_who_waits_for_the_address_goes_on_when_it_has_been_told(bare, tailscaled):
    """Or a machine could register under its other name first, and then again."""
    settled = []
    with Watched(tailscaled().path) as watched:
        watched.tailnet._on_change = lambda status: settled.append(watched.tailnet.settled)
        watched.tailnet.start()
        wait_until(lambda: watched.tailnet.settled, "a look")
    assert settled == [False]


def test_a_defect_costs_one_look(bare, tailscaled):
    bare.setattr(b9agent, "TAILNET_RARELY_S", 0.01)
    answers = iter([ZeroDivisionError("ours")])

    def read(_wanted):
        error = next(answers, None)
        if error:
            raise error
        return UP
    bare.setattr(b9agent, "read_tailnet", read)
    with Watched("/x") as watched:
        bare.setattr(b9agent, "TAILNET_BOOT_S", 0.0)
        watched.tailnet.start()
        wait_until(lambda: watched.told, "the next look")
    assert "defect" in watched.lines()[0] and "ZeroDivisionError: ours" in watched.lines()[0]


def test_it_stops_at_once_while_it_waits_and_soon_while_tailscaled_hangs(tailscaled, bare):
    for answer, limit_s in ((None, 0.5), (hang, 1.5)):
        one = tailscaled(answer)
        with Watched(one.path) as watched:
            watched.tailnet.start()
            wait_until(lambda: one.asked, "a look")
            wait_until(lambda: answer or watched.told, "its end")
            began = time.monotonic()
            watched.tailnet.stop()
            assert time.monotonic() - began < limit_s + 1.0
            told = len(watched.told)
            one._ended.set()
        wait_until(lambda: threads() == [], "the end of the thread")
        assert len(watched.told) == told  # what comes after the stop is not acted upon
    with Watched(one.path) as watched:
        watched.tailnet.stop()
        watched.tailnet.start()  # a tick that comes late
        assert threads() == []


def test_who_waits_for_it_goes_on_only_once_its_news_are_told(tailscaled, monkeypatch):
    with Watched(str(tailscaled().path)) as watched:
        tailnet, seen = watched.tailnet, []
        monkeypatch.setattr(tailnet, "_thread", threading.current_thread())  # as one that runs
        monkeypatch.setattr(tailnet, "_boot_until_s", b9agent.now_s() + 60)
        monkeypatch.setattr(tailnet, "_on_change", lambda status: seen.append(
            (status["state"], tailnet.settled)))
        tailnet.look()
        assert seen == [("up", False)] and tailnet.settled
        monkeypatch.undo()


def test_how_often_it_asks(bare, tmp_path):
    tailnet = Watched().tailnet
    tailnet._thread = threading.Thread()  # as one that runs
    tailnet._thread.start()
    cases = [(UP._replace(source="socket"), 5.0), (TailnetReading("down", source="socket"), 5.0),
             (UP._replace(source="interface"), 5.0), (TailnetReading("waiting"), 5.0),
             (TailnetReading(), 30.0)]
    tailnet._boot_until_s = b9agent.now_s() + 30
    assert tailnet._interval_s() == 1.0 and not tailnet.settled  # not looked yet
    tailnet.reading = TailnetReading("waiting")
    tailnet._heeded = "waiting"
    assert tailnet._interval_s() == 1.0 and not tailnet.settled
    tailnet._boot_until_s = b9agent.now_s() - 1
    for tailnet.reading, interval_s in cases:
        assert tailnet._interval_s() == interval_s, tailnet.reading
    program(tmp_path, "exit 1\n")  # one that is run each time
    for tailnet.reading in (UP._replace(source="interface"), UP._replace(source="cli"),
                            TailnetReading("waiting"), TailnetReading("down")):
        assert tailnet._interval_s() == 30.0
    tailnet.reading = UP._replace(source="socket")
    assert tailnet._interval_s() == 5.0


def test_a_tailscaled_that_is_restarted_is_back_soon(bare, tmp_path, tailscaled):
    """Though there is a program to run, which is otherwise run every 30 s."""
    program(tmp_path, "date >> %s/runs; exit 1\n" % tmp_path)
    service = tmp_path / "tailscaled.service"
    service.write_text("")
    one = tailscaled()
    bare.setattr(b9agent, "TAILSCALED_SERVICES", (str(service),))
    bare.setattr(b9agent, "TAILSCALED_SOCKETS", (one.path,))
    bare.setattr(b9agent, "TAILNET_EVERY_S", 0.05)
    with Watched() as watched:
        watched.tailnet.start()
        wait_until(lambda: watched.told, "the address")
        watched.tailnet._boot_until_s = 0.0  # long ago
        os.rename(one.path, one.path + ".gone")
        wait_until(lambda: len(watched.told) == 2, "its loss")
        os.rename(one.path + ".gone", one.path)
        began = time.monotonic()
        wait_until(lambda: len(watched.told) == 3, "its return")
        assert time.monotonic() - began < 10
    assert [row["state"] for row in watched.told] == ["up", "waiting", "up"]


def test_a_program_that_fails_otherwise_every_time_is_told_of_once(bare, tmp_path):
    program(tmp_path, "echo $$ cannot\n")
    with Watched() as watched:
        for _ in range(4):
            watched.tailnet.look()
        assert "cannot" in watched.tailnet.status()["message"]
    assert len(watched.lines()) == len(watched.told) == 1


# -- who listens there ----------------------------------------------------------------

class Hello(b9agent.Api):
    name = "hello"

    def __init__(self):
        super().__init__(b9agent.Log(stream=io.StringIO()))
        self.routes = (b9agent.Route("GET", "/", lambda request: b9agent.Response(200, {}), True, "hello"),)


def answers(host, port):
    link = http.client.HTTPConnection(host, port, timeout=10)
    try:
        link.request("GET", "/")
        return link.getresponse().status == 200
    except OSError:
        return False
    finally:
        link.close()


needs_loopback_net = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is Linux'")


@needs_loopback_net
def test_a_listener_follows_the_address():
    stream, port = io.StringIO(), b9agent.tunnel_port()
    api = Hello()
    listener = b9agent.TailnetListener("hello", lambda host: b9agent.ApiServer(api, host, port),
                                       b9agent.Log(stream=stream))
    try:
        listener.follow("")
        listener.follow("127.0.0.2")
        listener.follow("127.0.0.2")
        assert answers("127.0.0.2", port) and not answers("127.0.0.3", port)
        listener.follow("127.0.0.3")
        assert answers("127.0.0.3", port) and not answers("127.0.0.2", port)
        for _ in range(3):
            listener.follow("100.64.255.254")  # not here (yet): EADDRNOTAVAIL
        assert not answers("127.0.0.3", port)
        listener.follow("127.0.0.2")
        assert answers("127.0.0.2", port)
    finally:
        listener.follow("")
    assert not answers("127.0.0.2", port)
    said = [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]
    on = lambda host: "api=hello url=http://%s:%d" % (host, port)
    assert said == [
        "info listening " + on("127.0.0.2"), "info not_listening " + on("127.0.0.2"),
        "info listening " + on("127.0.0.3"), "info not_listening " + on("127.0.0.3"),
        'warning no_tailnet api=hello what="cannot listen on 100.64.255.254: Cannot assign requested '
        'address" do="It is tried again by itself"',
        "info listening " + on("127.0.0.2"), "info not_listening " + on("127.0.0.2")]


@needs_loopback_net
def test_two_hundred_changes_and_as_many_failures_leave_no_descriptor_and_no_thread(bare):
    class NoThread(b9agent.ApiServer):
        def start(self):
            raise RuntimeError("can't start new thread")

    def left():
        return (len(os.listdir("/dev/fd")), threading.active_count())
    listener = b9agent.TailnetListener("hello", lambda host: (NoThread if host == "127.0.0.9" else
                                                              b9agent.ApiServer)(Hello(), host, 0),
                                       b9agent.Log(stream=io.StringIO()))
    before = left()
    for number in range(200):
        listener.follow("127.0.0.%d" % (2 + number % 2))
        for _ in range(2):  # it is tried again
            with pytest.raises(RuntimeError):
                listener.follow("127.0.0.9")
    listener.follow("127.0.0.2")
    assert listener._server is not None
    listener.follow("")
    assert left() == before


@needs_loopback_net
def test_in_userspace_networking_no_address_is_bound(bare, tailscaled):
    one, hosts = tailscaled(status_json(TUN=False)), []
    with Watched(one.path) as watched:
        watched.tailnet.serve("hello", hosts.append)
        watched.tailnet.look()
    assert watched.tailnet.reading.address == "100.64.0.7" and hosts == []


# -- an agent -----------------------------------------------------------------------------

@pytest.fixture
def run(agent, hostile, home):
    def start(*arguments, **extra):
        extra.setdefault("BETA9_TOKEN", TOKEN)
        return agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(hostile.port),
                     "--control-port", "0", "--keepalive-interval", "30", *arguments, **extra)
    return start


def hostnames(hostile):
    return [request.body["hostname"] for request in hostile.named("register")]


def test_the_address_is_offered_and_offered_again_when_it_changes(run, hostile, tailscaled, home):
    one = tailscaled()
    program = run("--tailnet-socket", one.path)
    program.wait_line(r" notice ready\b")
    assert hostnames(hostile) == ["100.64.0.7"]
    one.answer = status_json(addresses=["100.64.0.9"])
    program.wait_line(r" notice tailnet state=up address=100.64.0.9")
    _, at = program.wait_line(r" info registered", after=4)
    hostile.wait_count(2, "register", "ok")
    wait_until(lambda: hostile.requests[-1].name == "keepalive", "the keepalive that follows at once")
    assert hostnames(hostile) == ["100.64.0.7", "100.64.0.9"]
    assert [request.name for request in hostile.requests][-2:] == ["register", "keepalive"]
    shown = run_agent(home, "status")
    assert "up, 100.64.0.9, box.tail1.ts.net" in shown.out and "hostname 100.64.0.9" in shown.out
    status = json.loads(run_agent(home, "status", "--json").out)
    assert status["tailnet"] == {"state": "up", "address": "100.64.0.9", "name": "box.tail1.ts.net",
                                 "source": "socket", "message": ""}
    assert "\nb9agent_tailnet_up 1\n" in run_agent(home, "metrics").out
    one.answer = status_json("Stopped")
    program.wait_line(r" info tailnet state=down")
    one.answer = status_json(addresses=["100.64.0.9"])
    program.wait_line(r" notice tailnet state=up address=100.64.0.9", after=len(program.lines()) - 1)
    wait_until(lambda: len(hostile.named("keepalive")) > 2, "the keepalive of one that is back")
    assert len(hostile.named("register")) == 2  # it is the same: ready stays ready
    assert program.stop() == 0


@pytest.mark.parametrize("arguments, hostname", [
    (["--hostname", "mine.example"], "mine.example"), (["--tailnet-socket", "none"], "machine-0badcafe")])
def test_a_hostname_of_ones_own_stays(arguments, hostname, run, hostile, tailscaled):
    one = tailscaled()
    program = run("--machine-id", "0badcafe", "--tailnet-socket", one.path, *arguments)
    program.wait_line(r" notice ready\b")
    assert hostnames(hostile) == [hostname]
    assert program.stop() == 0 and hostnames(hostile) == [hostname]


def test_at_boot_the_registration_waits_for_the_address(run, hostile, tailscaled):
    one = tailscaled(status_json("NoState", None, ""))
    program = run("--tailnet-socket", one.path)
    program.wait_line("registration waits for the tailnet address, 30 s at most")
    one.answer = status_json("Starting", None, "")
    program.wait_line("tailscaled is connecting")
    assert hostile.requests == []
    one.answer = status_json()
    program.wait_line(r" notice ready\b")
    assert hostnames(hostile) == ["100.64.0.7"]


def test_what_does_not_pass_by_itself_is_not_waited_for(run, hostile, tailscaled):
    one = tailscaled(status_json("NeedsLogin", None, ""))
    program = run("--machine-id", "0badcafe", "--tailnet-socket", one.path)
    program.wait_line(r" notice ready\b")
    assert hostnames(hostile) == ["machine-0badcafe"] and "waits" not in program.text()
    one.answer = status_json()
    hostile.wait_count(2, "register", "ok")
    assert hostnames(hostile) == ["machine-0badcafe", "100.64.0.7"]


def test_one_that_waits_for_its_address_still_ends_when_told(run, hostile, tailscaled):
    program = run("--tailnet-socket", tailscaled(status_json("Starting", None, "")).path)
    program.wait_line("registration waits")
    with StallMeter() as stalled:
        began = time.monotonic()
        assert program.stop() == 0
        took_s = time.monotonic() - began
    assert took_s < 1.9 + 3 * stalled.worst_s  # after 2 s the agent gives its thread up
    assert hostile.requests == []


def agent_of(hostile, tmp_path, **given):
    """In this process."""
    loaded = b9agent.load_settings(dict({
        "config": os.devnull, "state_dir": str(tmp_path / "state"), "token": TOKEN,
        "gateway_host": "127.0.0.1", "gateway_port": str(hostile.port), "machine_id": "0badcafe"},
        **given), {})
    return b9agent.Agent(loaded, b9agent.Log(stream=io.StringIO()), keep=False)


def test_after_the_wait_it_registers_without(hostile, bare, tailscaled, home, tmp_path):
    bare.setattr(b9agent, "TAILNET_BOOT_S", 1.5)
    one = tailscaled(status_json("Starting", None, ""))
    agent = agent_of(hostile, tmp_path, tailnet_socket=one.path)
    began = time.monotonic()
    agent.run_once()
    assert 1.4 < time.monotonic() - began < 20
    assert hostnames(hostile) == ["machine-0badcafe"] and threads() == []


def test_a_defect_of_every_look_costs_the_wait_and_no_more(hostile, bare, tmp_path):
    bare.setattr(b9agent, "TAILNET_BOOT_S", 1.5)
    bare.setattr(b9agent, "read_tailnet", lambda wanted: {}[wanted])
    agent_of(hostile, tmp_path, tailnet_socket="/nowhere/s").run_once()
    assert hostnames(hostile) == ["machine-0badcafe"]


def test_without_a_thread_to_be_had_there_is_no_tailnet_and_an_agent_all_the_same(hostile, bare, tmp_path):
    agent = agent_of(hostile, tmp_path, tailnet_socket="/nowhere/s")

    def refuse():
        raise RuntimeError("can't start new thread")
    agent.tailnet._thread.start = refuse
    agent.run_once()
    assert hostnames(hostile) == ["machine-0badcafe"]


def test_once_and_a_dry_run_offer_it_too(home, hostile, tailscaled):
    one = tailscaled()
    to = ("--gateway-host", "127.0.0.1", "--gateway-port", hostile.port, "--tailnet-socket", one.path)
    done = run_agent(home, "--dry-run", *to, BETA9_TOKEN=TOKEN)
    assert json.loads(done.out)["register"]["hostname"] == "100.64.0.7" and hostile.requests == []
    done = run_agent(home, "--once", *to, BETA9_TOKEN=TOKEN)
    assert done.code == 0 and hostnames(hostile) == ["100.64.0.7"]
    one.answer = status_json("Starting", None, "")
    began = time.monotonic()  # one that sends nothing waits for nothing
    done = run_agent(home, "--dry-run", *to, BETA9_TOKEN=TOKEN)
    assert json.loads(done.out)["register"]["hostname"].startswith("machine-")
    assert time.monotonic() - began < 15


def test_what_a_tailscale_program_left_ends_with_the_agent(run, hostile, home, tmp_path):
    """It has ended itself, and holds the agent's pipe by what it started."""
    (tmp_path / "bin").mkdir()
    path, pid = program(tmp_path, "sleep 600 &\necho $! > %s\n" % (tmp_path / "pid")), tmp_path / "pid"
    started = run("--hostname", "mine", PATH="%s:%s" % (os.path.dirname(path), os.environ["PATH"]))
    wait_until(lambda: pid.exists() and pid.read_text().endswith("\n"), "the program")
    assert started.stop() == 0

    def lives():
        with contextlib.suppress(OSError):
            os.kill(int(pid.read_text()), 0)
            state = b9agent.read_text("/proc/%s/stat" % pid.read_text().strip()) or ""
            return not re.search(r"\) Z", state)
        return False
    try:
        wait_until(lambda: not lives(), "its end", 5)
    finally:
        if lives():
            os.kill(int(pid.read_text()), 9)


def test_a_tailscaled_that_hangs_costs_no_keepalive(run, hostile, tailscaled):
    program = run("--hostname", "mine", "--keepalive-interval", "1", "--tailnet-socket",
                  tailscaled(hang).path)
    hostile.wait_count(4, "keepalive", "ok")
    program.wait_line("tailscaled does not answer at .*: no answer within 2 s")
    assert program.stop() == 0


# -- the real thing, nearly ---------------------------------------------------------------

ASK = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"Authorization": "Bearer " + sys.argv[2]})
try:
    sys.stdout.write(urllib.request.urlopen(request, timeout=5).read().decode())
except OSError as error:
    sys.stdout.write("%s" % error)
"""


class Namespace:
    """A network of one's own, with loopback up.  It ends with the block."""

    def __init__(self):
        self.holder = None

    def __enter__(self):
        self.holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && "
                                        "exec sleep 600"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = self.holder.stdout.readline().decode().strip()
        if said != "up":
            self.__exit__()
            pytest.skip(said)
        return self

    def __exit__(self, *_):
        self.holder.kill()
        self.holder.wait()
        self.holder.stdout.close()

    def command(self, *words):
        return ["nsenter", "-t", str(self.holder.pid), "-n"] + list(map(str, words))

    def run(self, *words):
        done = subprocess.run(self.command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=60)
        return done.returncode, done.stdout.decode()

    def ip(self, line):
        code, said = self.run("ip", *line.split())
        assert code == 0, said

    def add(self, name):
        """An interface of that name: a tun device, as tailscaled makes it, or a dummy."""
        if self.run("ip", "tuntap", "add", "dev", name, "mode", "tun")[0]:
            code, said = self.run("ip", "link", "add", name, "type", "dummy")
            if code:
                pytest.skip(said)
        self.ip("link set %s up" % name)

    def get(self, url, token=""):
        return self.run(sys.executable, "-c", ASK, url, token)[1]


@pytest.fixture
def network():
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("needs root, unshare, nsenter and ip")
    with Namespace() as found:
        yield found


@pytest.mark.root
def test_the_address_of_an_interface_is_found_and_no_other_of_its_range(network):
    def look():
        code, said = network.run(sys.executable, "-B", "-c", "import sys; sys.path.insert(0, %r); import "
                                 "b9agent; print(b9agent.tailnet_interface_address())"
                                 % os.path.dirname(b9agent.__file__))
        assert code == 0, said
        return said.strip()
    assert look() == ""
    network.add("tailscale0")
    assert look() == ""
    for name in ("ppp0", "cni0", "eth1"):  # a mobile carrier's, a pod network's, a cloud's
        network.add(name)
        network.ip("addr add 100.65.0.1/32 dev " + name)
        assert look() == ""
    network.ip("addr add 192.168.7.7/32 dev tailscale0")
    assert look() == ""
    network.ip("addr flush dev tailscale0")
    network.ip("addr add 100.70.1.2/32 dev tailscale0")
    assert look() == "100.70.1.2"


@pytest.mark.root
def test_the_control_api_follows_the_tailnet_address(network, home, state, tmp_path):
    network.add("tailscale0")
    network.ip("addr add 100.70.1.2/32 dev tailscale0")

    def listening(host):
        return '"status": "ok"' in network.get("http://%s:9999/health" % host)
    with Program(network.command(*agent_command("gateway", "--port", "1994", "--db", tmp_path / "db")),
                 environment(home)) as gateway:
        gateway.wait_line("listening")
        made = json.loads(run_agent(home, "machine", "create", "--pool", "gpu", "--db", tmp_path / "db",
                                    "--json").out)
        command = agent_command("run", "--machine-id", made["machine_id"], "--pool-name", "gpu",
                                "--keepalive-interval", "1")
        with Program(network.command(*command), environment(home, BETA9_TOKEN=made["token"])) as agent:
            agent.wait_line("listening api=control url=http://100.70.1.2:9999")
            agent.wait_line(r" notice ready\b")
            assert listening("100.70.1.2") and listening("127.0.0.1")
            token = (state / "control.token").read_text().strip()
            assert "401" in network.get("http://100.70.1.2:9999/status")
            status = json.loads(network.get("http://100.70.1.2:9999/status", token))
            assert status["hostname"] == "100.70.1.2" and status["tailnet"] == {
                "state": "up", "address": "100.70.1.2", "name": None, "source": "interface",
                "message": ""}
            network.ip("addr flush dev tailscale0")
            network.ip("addr add 100.70.1.3/32 dev tailscale0")
            agent.wait_line("listening api=control url=http://100.70.1.3:9999")
            assert listening("100.70.1.3") and not listening("100.70.1.2")
            network.ip("link del tailscale0")
            agent.wait_line("not_listening api=control url=http://100.70.1.3:9999")
            assert listening("127.0.0.1")
            wait_until(lambda: json.loads(network.get("http://127.0.0.1:9999/status", token))[
                "state"] == "ready", "the machine is ready")
            assert agent.stop() == 0
            assert not any(word in agent.text() for word in ("defect", "warning", "unreachable"))


@pytest.mark.root
@pytest.mark.parametrize("arguments", [["--control-host", "127.0.0.1"], ["--tailnet-control=false"]])
def test_who_wants_the_control_api_on_loopback_alone_has_it(arguments, network, home, hostile):
    network.add("tailscale0")
    network.ip("addr add 100.70.1.2/32 dev tailscale0")
    command = agent_command("run", "--gateway-port", "9", *arguments)
    with Program(network.command(*command), environment(home, BETA9_TOKEN=TOKEN)) as agent:
        agent.wait_line("tailnet state=up address=100.70.1.2")
        agent.wait_line("unreachable")
        agent.wait_line("listening api=inference url=http://100.70.1.2:")  # the front door is there
        assert agent.stop() == 0 and "api=control url=http://100." not in agent.text()


@pytest.mark.root
def test_a_front_door_that_is_set_to_loopback_stays_there(network, home, hostile):
    network.add("tailscale0")
    network.ip("addr add 100.70.1.2/32 dev tailscale0")
    command = agent_command("run", "--gateway-port", "9", "--inference-host", "127.0.0.1")
    with Program(network.command(*command), environment(home, BETA9_TOKEN=TOKEN)) as agent:
        agent.wait_line("listening api=control url=http://100.70.1.2:9999")
        agent.wait_line("unreachable")
        assert agent.stop() == 0 and "api=inference url=http://100." not in agent.text()


@pytest.mark.root
def test_an_address_that_is_not_there_yet_is_tried_again(network, home, tailscaled):
    one = tailscaled()
    command = agent_command("run", "--gateway-port", "9", "--tailnet-socket", one.path)
    with Program(network.command(*command), environment(home, BETA9_TOKEN=TOKEN)) as agent:
        agent.wait_line("cannot listen on 100.64.0.7: Cannot assign requested address")
        network.add("tailscale0")
        network.ip("addr add 100.64.0.7/32 dev tailscale0")
        agent.wait_line("listening api=control url=http://100.64.0.7:9999")
        agent.wait_line("listening api=inference url=http://100.64.0.7:")
        assert agent.stop() == 0
        for name in ("control", "inference"):
            assert agent.text().count("no_tailnet api=%s what=" % name) == 1
