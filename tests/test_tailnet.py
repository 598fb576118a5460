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
from b9agent import TailnetReading
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
    function of the connection; asked: how often."""

    def __init__(self, folder, answer=None):
        self.path = str(folder / "tailscaled.sock")
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
        # As the real one, which defends itself against web pages so.
        if not head.startswith(b"GET /localapi/v0/status?peers=false HTTP/1.1\r\n") or \
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
        assert agent.stop() == 0 and "url=http://100." not in agent.text()


@pytest.mark.root
def test_an_address_that_is_not_there_yet_is_tried_again(network, home, tailscaled):
    one = tailscaled()
    command = agent_command("run", "--gateway-port", "9", "--tailnet-socket", one.path)
    with Program(network.command(*command), environment(home, BETA9_TOKEN=TOKEN)) as agent:
        agent.wait_line("cannot listen on 100.64.0.7: Cannot assign requested address")
        network.add("tailscale0")
        network.ip("addr add 100.64.0.7/32 dev tailscale0")
        agent.wait_line("listening api=control url=http://100.64.0.7:9999")
        assert agent.stop() == 0
        assert agent.text().count("cannot listen on") == 1
