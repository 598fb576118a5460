"""The control API of a running agent: who may ask what, and what it costs when it is not to be had."""
import http.client
import io
import json
import os
import socket
import stat
import urllib.request

import pytest

import b9agent
from helpers import run_agent, tree
from hostile_gateway import TOKEN


class Control:
    """The API of one running agent."""

    def __init__(self, program, state):
        match, _ = program.wait_line(r"listening api=control url=http://([\d.]+|\[::1\]):(\d+)")
        self.host, self.port = match.group(1).strip("[]"), int(match.group(2))
        self.program, self.state = program, state
        self.token = (state / "control.token").read_text().strip()

    def get(self, path, headers=None):
        """An answer that is still to be read; a context manager."""
        url = "http://%s:%d%s" % (self.host, self.port, path)
        sent = dict({"Authorization": "Bearer " + self.token}, **(headers or {}))
        return urllib.request.urlopen(urllib.request.Request(url, headers=sent), timeout=30)

    def read(self, path, headers=None):
        """(content type, body)."""
        with self.get(path, headers) as reply:
            return reply.headers["Content-Type"], reply.read()

    def call(self, method, path, headers=None, body=None):
        """(status, JSON, answer).  With the token, unless headers say otherwise; None sends none."""
        sent = dict({"Authorization": "Bearer " + self.token}, **(headers or {}))
        sent = {name: value for name, value in sent.items() if value is not None}
        link = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            link.request(method, path, body, sent)
            reply = link.getresponse()
            raw = reply.read()
            return reply.status, json.loads(raw) if raw else None, reply
        finally:
            link.close()


@pytest.fixture
def control(agent, hostile, state):
    program = agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(hostile.port),
                    "--pool-name", "gpu", "--control-port", "0", "--keepalive-interval", "1",
                    BETA9_TOKEN=TOKEN)
    program.wait_line(r"notice ready\b")
    return Control(program, state)


def test_health_is_open_and_everything_else_wants_the_token(control):
    status, answer, _ = control.call("GET", "/health", {"Authorization": None})
    assert (status, answer["status"], answer["version"]) == (200, "ok", b9agent.VERSION)
    wrong = ["Bearer", "Bearer x", "Basic " + control.token, "bearer " + control.token, control.token,
             "Bearer " + control.token[:-1], "Bearer " + control.token + "0", "Bearer " + TOKEN, None]
    for value in wrong:
        status, answer, reply = control.call("GET", "/status", {"Authorization": value})
        assert status == 401 and reply.getheader("WWW-Authenticate") == "Bearer", value
        assert set(answer) == {"status", "error", "message", "error_code", "suggestion"}
        assert answer["status"] == "error" and control.token not in json.dumps(answer)


def test_status_has_the_fields_of_the_predecessor_and_ours(control):
    status, answer, reply = control.call("GET", "/status")
    assert status == 200 and reply.getheader("Content-Type") == "application/json"
    assert {"status", "machine_id", "pool", "uptime_seconds", "cpu_percent", "memory_percent",
            "gpu_count"} <= set(answer)
    assert answer["status"] == "ready" and answer["pid"] == control.program.pid


@pytest.mark.parametrize("host, status", [
    ("127.0.0.1:9999", 200), ("127.0.0.1", 200), ("localhost:1", 200), ("LOCALHOST", 200),
    ("[::1]:9999", 200), ("evil.example", 421), ("127.0.0.1.evil.example:80", 421), ("", 421),
    ("localhost.evil.example", 421), ("[::1].evil.example", 421), ("evil.example:127", 421),
    ("127.0.0.1 evil.example", 421)])
def test_a_name_that_a_browser_was_fooled_with_is_refused(control, host, status):
    for path in ("/health", "/status"):
        assert control.call("GET", path, {"Host": host})[0] == status


def test_no_answer_carries_cors_headers(control):
    for method in ("GET", "OPTIONS"):
        reply = control.call(method, "/status", {"Origin": "http://evil.example"})[2]
        assert not [name for name, _ in reply.getheaders() if name.lower().startswith("access-control")]


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/", 404), ("GET", "/nothing", 404), ("POST", "/status", 405), ("DELETE", "/health", 405),
    ("GET", "/status/", 404), ("GET", "/../status", 404), ("GET", "/%73tatus", 404),
    ("BREW", "/status", 405)])
def test_other_paths_and_methods_are_json_errors(control, method, path, status):
    got, answer, _ = control.call(method, path)
    assert got == status and answer["status"] == "error" and answer["error_code"]


def test_head_has_the_head_alone(control):
    status, answer, reply = control.call("HEAD", "/health")
    assert (status, answer) == (200, None) and int(reply.getheader("Content-Length")) > 0


def test_the_files_of_the_api_are_private_and_go_with_the_agent(control):
    address = control.state / "control.addr"
    assert address.read_text() == "127.0.0.1:%d\n" % control.port
    for name in ("control.token", "control.addr"):
        assert stat.S_IMODE((control.state / name).stat().st_mode) == 0o600
    assert len(control.token) == 64
    assert control.program.stop() == 0
    assert not address.exists()
    assert (control.state / "control.token").read_text().strip() == control.token
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", control.port), timeout=30).close()


def test_a_token_file_that_is_spoilt_is_made_anew(agent, hostile, state):
    state.mkdir(mode=0o700)
    (state / "control.token").write_text("short\n")
    program = agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(hostile.port),
                    "--control-port", "0", BETA9_TOKEN=TOKEN)
    assert len(Control(program, state).token) == 64
    assert program.stop() == 0


def test_a_control_port_that_is_taken_costs_the_api_and_never_the_keepalive(agent, hostile, state, home):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        program = agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(hostile.port),
                        "--control-port", str(port), "--keepalive-interval", "1", BETA9_TOKEN=TOKEN)
        match, _ = program.wait_line(r" error \w+ .*127\.0\.0\.1:%d" % port)
        assert "control.port" in match.string
        hostile.wait_count(2, "keepalive", "ok")
        assert not (state / "control.addr").exists()
        done = run_agent(home, "status")
        assert done.code == 5 and done.err.count("\n") == 1
    program.wait_line(r"info listening api=control url=http://127\.0\.0\.1:%d$" % port)
    assert run_agent(home, "status").code == 0
    assert sum(" error " in line for line in program.lines()) == 1
    assert program.stop() == 0


def test_stalled_clients_do_not_hold_the_agent(control, hostile):
    stalled = []
    try:
        for _ in range(30):
            link = socket.create_connection((control.host, control.port), timeout=30)
            link.sendall(b"GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            stalled.append(link)
        assert control.call("GET", "/status")[0] == 200
        seen = len(hostile.named("keepalive"))
        hostile.wait_count(seen + 2, "keepalive", "ok")
        assert control.program.stop() == 0
    finally:
        for link in stalled:
            link.close()


def test_it_listens_on_the_address_it_is_told(agent, hostile, state):
    """On a machine without IPv6, that the address is not to be had is said, and costs no keepalive."""
    program = agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(hostile.port),
                    "--control-host", "::1", "--control-port", "0", BETA9_TOKEN=TOKEN)
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        program.wait_line(r"cannot listen on \[::1\]:0")
    else:
        control = Control(program, state)
        assert control.host == "::1" and control.call("GET", "/status")[0] == 200
        assert (state / "control.addr").read_text() == "[::1]:%d\n" % control.port
    hostile.wait_count(1, "keepalive", "ok")
    assert program.stop() == 0


def test_once_opens_no_port_and_writes_no_address(home, hostile):
    done = run_agent(home, "--once", "--gateway-host", "127.0.0.1", "--gateway-port", hostile.port,
                     BETA9_TOKEN=TOKEN)
    assert done.code == 0 and "listening" not in done.err
    assert not [path for path in tree(home) if "control" in path]


# -- logs, events, openapi ---------------------------------------------------------

def test_logs_are_the_newest_lines_as_text_or_json(control):
    kind, body = control.read("/logs?lines=2")
    lines = body.decode().splitlines()
    assert kind == "text/plain; charset=utf-8"
    assert len(lines) == 2 and lines[-1] in control.program.lines()
    kind, body = control.read("/logs", {"Accept": "application/x-ndjson"})
    records = [json.loads(line) for line in body.splitlines()]
    assert kind == "application/x-ndjson"
    assert {"listening", "started", "ready"} <= {record["event"] for record in records}
    assert control.read("/logs?lines=0")[1] == b""
    for query in ("lines=-1", "lines=1001", "lines=x", "follow=yes", "level=debug"):
        assert control.call("GET", "/logs?" + query)[0] == 400


def test_the_log_can_be_followed(control, hostile):
    with control.get("/logs?follow=true&lines=1", {"Accept": "application/x-ndjson"}) as reply:
        first = json.loads(reply.readline())
        hostile.fault = "unauthorized"
        following = json.loads(reply.readline())
    assert following["time"] >= first["time"] and following["level"] in ("warning", "error")


def event(reply):
    lines = []
    while not lines or lines[-1]:
        lines.append(reply.readline().decode().rstrip("\n"))
    return dict(line.split(": ", 1) for line in lines[:-1])


def test_events_tell_of_states_and_can_be_resumed(control, hostile):
    with control.get("/events") as stream:
        assert stream.headers["Content-Type"] == "text/event-stream"
        hostile.fault = "unauthorized"
        found = [event(stream)]
        while found[-1]["event"] != "state" or json.loads(found[-1]["data"])["state"] != "refused":
            found.append(event(stream))
    assert {one["event"] for one in found} == {"log", "state"}
    with control.get("/events", {"Last-Event-ID": str(int(found[0]["id"]) - 1)}) as again:
        assert [event(again) for _ in found] == found
    with control.get("/events?since=0") as everything:
        assert int(event(everything)["id"]) < int(found[0]["id"])


def test_no_secret_is_in_logs_or_events(control, hostile):
    hostile.fault = "unauthorized"
    control.program.wait_line(r"refused")
    text = control.read("/logs")[1].decode()
    assert "refused" in text and TOKEN not in text and control.token not in text


def test_openapi_describes_every_route_and_every_status_field(control):
    status, document, _ = control.call("GET", "/openapi.json")
    assert (status, document["openapi"]) == (200, "3.1.0")
    assert set(document["paths"]) == {row[0].split()[1].strip("`")
                                      for row in b9agent.routes_table()[1]}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert operation["summary"] and {"200", "400", "429", "500"} <= set(operation["responses"])
            assert (operation.get("security") == []) == (path == "/health")
            for response in operation["responses"].values():
                name = response.get("$ref", "").rpartition("/")[2]
                assert not name or name in document["components"]["responses"]
    fields = document["paths"]["/status"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert set(fields["properties"]) == set(control.call("GET", "/status")[1])


def test_an_address_that_is_taken_back_is_not_kept_again_while_the_api_ends(state):
    """By the membership's thread, which does that once a slice, and may tick still."""
    state.mkdir(mode=0o700)
    loaded = b9agent.load_settings({"config": os.devnull, "state_dir": str(state), "token": TOKEN,
                                    "control_port": "0"}, {})
    agent = b9agent.Agent(loaded, b9agent.Log(stream=io.StringIO()), keep=False)
    agent._start_control()
    assert (state / "control.addr").exists()
    end = agent._control.stop
    agent._control.stop = lambda: (agent._keep_control_address(), end())
    agent._stop_control()
    assert not (state / "control.addr").exists()
