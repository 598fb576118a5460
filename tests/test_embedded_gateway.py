"""The embedded gateway: the machine API of the contract, over real sockets and a real database."""
import concurrent.futures
import errno
import http.client
import io
import json
import os
import signal
import socket
import sqlite3
import stat
import time

import pytest

import b9agent
from helpers import run_agent

GIB = 1 << 30


class Swap:
    """Stands for what each test sets anew, in a server that all tests of this file share: to end
    one takes half a second."""

    target = None

    def __getattr__(self, name):
        return getattr(self.target, name)


STORE, LOG, SEEN = Swap(), Swap(), []


@pytest.fixture(scope="module")
def server():
    LOG.target = io.StringIO()
    api = b9agent.GatewayApi(b9agent.Log("text", "debug", stream=LOG), STORE,
                             lambda *change: SEEN.append(change))
    running = b9agent.start_gateway("127.0.0.1", 0, api)
    yield running
    running.stop()


class Api:
    """The gateway's API over a database of its own, with a wall clock that the test moves."""

    def __init__(self, folder, port):
        self.now = time.time()
        self.path = str(folder / "gateway.db")
        self.port = port
        self.seen = SEEN
        del SEEN[:]
        self.log = LOG.target = io.StringIO()
        self.store = STORE.target = b9agent.MachineStore(self.path, lambda: self.now)
        self.machine, self.token = self.store.create_machine("gpu")

    def call(self, method, path, body=None, token="", headers=None):
        """(status, JSON).  token: "" takes the machine's, None sends no header at all."""
        token = self.token if token == "" else token
        sent = {"Content-Type": "application/json"}
        if token is not None:
            sent["Authorization"] = "Bearer " + token
        sent.update(headers or {})
        sent = {name: value for name, value in sent.items() if value is not None}
        raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            link.request(method, path, raw, sent)
            reply = link.getresponse()
            text = reply.read()
            assert reply.getheader("Content-Type") == "application/json"
            return reply.status, json.loads(text)
        finally:
            link.close()

    def register(self, change=None, **more):
        return self.call("POST", "/api/v1/machine/register",
                         dict(register_body(self.machine), **(change or {})), **more)

    def keepalive(self, change=None, **more):
        return self.call("POST", "/api/v1/machine/keepalive",
                         dict(keepalive_body(self.machine), **(change or {})), **more)

    def listed(self, query="", token=""):
        status, found = self.call("GET", "/api/v1/machine/list" + query, token=token)
        assert status == 200
        return found

    def state(self):
        return {machine.machine_id: machine.state for machine in self.store.machines()}[self.machine]


def register_body(machine):
    return {"token": "k3s-secret-xyz", "machine_id": machine, "hostname": "100.64.0.9",
            "provider_name": "generic", "pool_name": "gpu", "cpu": "8000m", "memory": "16Gi",
            "gpu_count": "2", "private_ip": "10.0.0.9"}


def keepalive_body(machine):
    return {"machine_id": machine, "provider_name": "generic", "pool_name": "gpu",
            "agent_version": "1.2.3", "metrics": {
                "total_cpu_available": 8000, "total_memory_available": 16384,
                "cpu_utilization_pct": 12.5, "memory_utilization_pct": 50, "free_gpu_count": 2,
                "total_disk_space_bytes": 10 ** 13, "total_disk_free_bytes": 10 ** 12,
                "worker_count": 0, "container_count": 0, "cache_usage_pct": 0.0, "cache_capacity": 0,
                "cache_memory_usage": 0, "cache_cpu_usage": 0.0}}


@pytest.fixture
def api(tmp_path, server):
    folder = tmp_path / "gw"
    folder.mkdir(mode=0o700)
    gateway = Api(folder, server.port)
    yield gateway
    gateway.store.close()


# -- the life of a machine -------------------------------------------------

def test_pending_registered_ready(api):
    assert api.state() == "pending"
    status, answer = api.register()
    assert (status, answer) == (200, {"config": None, "machine_state": {
        "machine_id": api.machine, "status": "registered", "pool_name": "gpu", "ttl_seconds": 300}})
    assert api.state() == "registered"
    before = int(time.time())
    status, answer = api.keepalive()
    state = answer["machine_state"]
    assert (status, answer["status"]) == (200, "ok")
    assert {name: state[name] for name in ("machine_id", "status", "pool_name", "ttl_seconds",
                                           "agent_version")} == {
        "machine_id": api.machine, "status": "ready", "pool_name": "gpu", "ttl_seconds": 300,
        "agent_version": "1.2.3"}
    assert isinstance(state["last_keepalive"], str) and isinstance(state["last_worker_seen"], str)
    assert before <= int(state["last_keepalive"]) <= time.time()
    assert api.state() == "ready"
    assert [change[:2] for change in api.seen] == [(api.machine, "registered"), (api.machine, "ready")]


def test_registering_again_sets_a_ready_machine_back(api):
    api.register(), api.keepalive(), api.register()
    assert api.state() == "registered"
    assert api.listed() == []


def test_a_keepalive_alone_makes_a_pending_machine_ready(api):
    assert api.keepalive()[0] == 200
    assert api.state() == "ready"


def test_health_needs_no_token(api):
    assert api.call("GET", "/api/v1/health", token=None) == (200, {"status": "ok"})


def test_config_is_a_500_since_there_is_none(api):
    status, answer = api.call("GET", "/api/v1/machine/config")
    assert status == 500 and "message" in answer


# -- times to live ----------------------------------------------------------

def not_found(api):
    status, answer = api.keepalive()
    assert status == 500
    assert answer["message"] == (
        "Failed to update keepalive: failed to get machine state <provider:machine:generic:gpu:%s>: "
        "machine not found" % api.machine)
    assert answer["error_code"] == "machine_not_found"
    return True


@pytest.mark.parametrize("what, ttl_s", [("pending", 3600), ("registered", 300), ("ready", 300)])
def test_a_machine_is_forgotten_when_its_time_ran_out_and_not_before(api, what, ttl_s):
    if what != "pending":
        api.register()
    if what == "ready":
        api.keepalive()
    began = api.now
    api.now = began + ttl_s - 1
    assert api.state() == what
    api.now = began + ttl_s + 1
    assert api.state() == "expired"
    assert not_found(api)
    assert api.register()[0] == 200 and api.keepalive()[0] == 200
    assert api.state() == "ready"


def test_each_keepalive_renews_the_time(api):
    api.register()
    for _ in range(5):
        api.now += 299
        assert api.keepalive()[0] == 200
    api.now += 301
    assert not_found(api)


def test_a_refused_keepalive_renews_nothing(api):
    api.register(), api.keepalive()
    api.now += 299
    assert api.keepalive({"metrics": None})[0] == 500
    assert api.keepalive({"pool_name": 5})[0] == 400
    api.now += 2
    assert not_found(api)


def test_an_expired_machine_is_not_listed(api):
    api.register(), api.keepalive()
    assert len(api.listed()) == 1
    api.now += 301
    assert api.listed() == []


# -- tokens -------------------------------------------------------------------

@pytest.mark.parametrize("token, headers, status", [
    ("unknown-token", None, 401), (None, {"Authorization": "Bearer "}, 401),
    (None, {"Authorization": "bearer TOKEN"}, 401), (None, {"Authorization": "TOKEN"}, 401),
    (None, {"Authorization": "Basic TOKEN"}, 401), (None, {"Authorization": "Bearer  TOKEN"}, 401),
    (None, {"Authorization": "Bearer TOKENx"}, 401), (None, {"Authorization": "Bearer tOKEN"}, 401),
])
@pytest.mark.parametrize("path", ["register", "keepalive", "list", "config"])
def test_no_way_in_without_the_token(api, token, headers, status, path):
    if headers:
        swapped = api.token.swapcase() if "tOKEN" in headers["Authorization"] else api.token
        headers = {"Authorization": headers["Authorization"].replace("TOKEN", swapped).replace(
            "tOKEN", swapped)}
    method = "POST" if path in ("register", "keepalive") else "GET"
    body = keepalive_body(api.machine) if method == "POST" else None
    got, answer = api.call(method, "/api/v1/machine/" + path, body, token=token, headers=headers)
    assert (got, answer) == (status, {"message": "Unauthorized"})
    assert api.state() == "pending"


def test_no_authorization_header_is_refused(api):
    status, _ = api.register(token=None)
    assert status in (401, 403, 500) and api.state() == "pending"


@pytest.mark.parametrize("name", ["register", "keepalive"])
def test_a_token_used_with_the_id_of_another_machine_is_a_403(api, name):
    other, other_token = api.store.create_machine("gpu")
    for body_machine, token in ((other, api.token), (api.machine, other_token), ("ffffffff", api.token)):
        status, answer = getattr(api, name)({"machine_id": body_machine}, token=token)
        assert status == 403 and answer["message"].startswith("Invalid token")
    assert {machine.state for machine in api.store.machines()} == {"pending"}


def test_tokens_are_long_unlike_and_made_of_base64url(api):
    made = [api.store.create_machine("gpu") for _ in range(50)]
    assert len({token for _, token in made}) == len({machine for machine, _ in made}) == 50
    for machine, token in made:
        assert len(token) >= 43 and not set(token) - set(
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=")
        assert len(machine) == 8 and not set(machine) - set("0123456789abcdef")


def test_of_a_token_nothing_but_its_hash_is_in_the_database_or_the_log(api):
    api.register(), api.keepalive(), api.listed()
    api.keepalive(token="another-token-entirely")
    with open(api.path, "rb") as handle:
        raw = handle.read()
    for name in os.listdir(os.path.dirname(api.path)):
        with open(os.path.join(os.path.dirname(api.path), name), "rb") as handle:
            raw += handle.read()
    assert api.token.encode() not in raw and b"k3s-secret-xyz" not in raw
    assert api.token not in api.log.getvalue() and "k3s-secret-xyz" not in api.log.getvalue()
    assert "another-token-entirely" not in api.log.getvalue()


def test_a_list_shows_no_token(api):
    api.register(), api.keepalive()
    text = json.dumps(api.listed())
    assert api.token not in text and "k3s-secret-xyz" not in text and "sha256" not in text


# -- types, as strict as Go ----------------------------------------------------

INVALID = (400, {"message": "Invalid payload"})


@pytest.mark.parametrize("field", sorted(register_body("x")))
@pytest.mark.parametrize("value", [5, 5.0, True, [], {}, ["x"]])
def test_register_takes_strings_and_nothing_else(api, field, value):
    assert api.register({field: value}) == INVALID
    assert api.state() == "pending"


@pytest.mark.parametrize("field", ["machine_id", "provider_name", "pool_name", "agent_version"])
def test_keepalive_takes_strings_where_it_says_so(api, field):
    assert api.keepalive({field: 5}) == INVALID


INTS = ["total_cpu_available", "total_memory_available", "total_disk_space_bytes",
        "total_disk_free_bytes", "worker_count", "container_count", "free_gpu_count", "cache_capacity",
        "cache_memory_usage"]
FLOATS = ["cpu_utilization_pct", "memory_utilization_pct", "cache_usage_pct", "cache_cpu_usage"]


def with_metric(api, name, literal):
    """A keepalive with one metric written exactly so."""
    body = json.dumps(dict(keepalive_body(api.machine), metrics={name: "@"}))
    return api.call("POST", "/api/v1/machine/keepalive", body.replace('"@"', literal).encode())


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("literal", ["15.0", "1e3", '"15"', "true", "[]", "{}", "9223372036854775808",
                                     "1.5", "NaN", "Infinity", "9" * 5000])
def test_an_int_is_a_json_integer_of_64_bits(api, name, literal):
    assert with_metric(api, name, literal) == INVALID


@pytest.mark.parametrize("name", INTS + FLOATS)
@pytest.mark.parametrize("literal", ["0", "15", "-1", "null", "9007199254740993"])
def test_whole_numbers_fit_everywhere(api, name, literal):
    assert with_metric(api, name, literal)[0] == 200


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("literal, fits", [("15.0", True), ("1e3", True), ("1E-2", True), ('"1"', False),
                                           ("true", False), ("NaN", False), ("-Infinity", False),
                                           ("1e999", False), (".5", False), ("5.", False)])
def test_a_float_is_a_json_number(api, name, literal, fits):
    status, answer = with_metric(api, name, literal)
    assert status == 200 if fits else (status, answer) == INVALID


@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b"null", b'"x"', b"5", b"{}}", b'{"machine_id": "a",}', b"\xff\xfe", b"[" * 100000,
    b'{"a":' * 100000, b"{'machine_id': 'x'}", b'{"machine_id": "a"} {"b": 1}'])
@pytest.mark.parametrize("path", ["register", "keepalive"])
def test_a_body_that_is_no_json_object_is_an_invalid_payload(api, raw, path):
    status, answer = api.call("POST", "/api/v1/machine/" + path, raw)
    assert status == 400, answer


def test_names_fit_in_any_case_and_unknown_ones_are_ignored(api):
    body = {name.upper(): value for name, value in register_body(api.machine).items()}
    assert api.call("POST", "/api/v1/machine/register", dict(body, news=[1, {"a": None}]))[0] == 200


def test_null_is_the_zero_value(api):
    assert api.register({"private_ip": None, "token": None, "hostname": None})[0] == 200


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded",
                                          "multipart/form-data; boundary=x", ""])
def test_without_the_json_content_type_nothing_is_bound(api, content_type):
    assert api.register(headers={"Content-Type": content_type})[0] in (400, 500)
    assert api.keepalive(headers={"Content-Type": content_type})[0] in (400, 500)
    assert api.state() == "pending"


def test_a_content_type_with_a_charset_is_the_json_one(api):
    assert api.register(headers={"Content-Type": "application/json; charset=utf-8"})[0] == 200


@pytest.mark.parametrize("change, said", [
    ({"pool_name": "nowhere"}, "Invalid pool name"), ({"pool_name": ""}, "Invalid pool name"),
    ({"cpu": ""}, "Invalid machine cpu value"), ({"cpu": "8.5"}, "Invalid machine cpu value"),
    ({"cpu": "8 cores"}, "Invalid machine cpu value"), ({"cpu": "m"}, "Invalid machine cpu value"),
    ({"cpu": "8000m\n"}, "Invalid machine cpu value"), ({"cpu": "\u0668"}, "Invalid machine cpu value"),
    ({"memory": "1.5Gi"}, "Invalid machine memory value"),
    ({"memory": "16GiB"}, "Invalid machine memory value"),
    ({"memory": "16G"}, "Invalid machine memory value"), ({"memory": "1Ti"}, "Invalid machine memory "
                                                                              "value"),
    ({"memory": "16"}, "Invalid machine memory value"), ({"memory": ""}, "Invalid machine memory value"),
    ({"memory": "16Gi\n"}, "Invalid machine memory value"),
    ({"gpu_count": ""}, "Invalid gpu count"), ({"gpu_count": "two"}, "Invalid gpu count"),
    ({"gpu_count": "1.0"}, "Invalid gpu count"),
])
def test_values_that_the_real_gateway_refuses(api, change, said):
    status, answer = api.register(change)
    assert (status, answer["message"]) == (500, said)
    assert api.state() == "pending"


@pytest.mark.parametrize("change", [{"cpu": "8"}, {"cpu": "0m"}, {"memory": "32768Mi"},
                                    {"memory": "1024Ki"}, {"gpu_count": "0"}])
def test_values_that_the_real_gateway_takes(api, change):
    assert api.register(change)[0] == 200


@pytest.mark.parametrize("missing", ["machine_id", "pool_name"])
def test_keepalive_wants_machine_and_pool(api, missing):
    status, answer = api.keepalive({missing: ""})
    assert (status, answer) == (400, {"message": "machine_id and pool_name are required"})


def test_metrics_may_be_empty_but_not_missing(api):
    api.register()
    assert api.keepalive({"metrics": {}})[0] == 200
    for change in ({"metrics": None}, {"metrics": []}):
        assert api.keepalive(change)[0] in (400, 500)
    body = keepalive_body(api.machine)
    del body["metrics"]
    assert api.call("POST", "/api/v1/machine/keepalive", body)[0] == 500


def test_inference_is_optional_and_typed(api):
    api.register()
    running = {"status": "running", "ip": "100.64.0.9", "port": 11434, "models": ["llama3:8b"]}
    for good in (running, None, {}, {"status": "stopped", "models": []}):
        assert api.keepalive({"inference": good})[0] == 200
    for bad in ("running", [], dict(running, port="11434"), dict(running, port=1.0),
                dict(running, models="x"), dict(running, models=[5]), dict(running, status=1)):
        assert api.keepalive({"inference": bad}) == INVALID


def test_an_empty_provider_is_generic_in_a_keepalive_and_not_in_a_register(api):
    api.register()
    assert api.keepalive({"provider_name": ""})[0] == 200
    assert api.keepalive({"provider_name": "other"})[0] == 500


def test_a_machine_kept_alive_in_another_pool_is_not_found(api):
    api.register()
    api.store.create_machine("second")
    status, answer = api.keepalive({"pool_name": "second"})
    assert status == 500 and "machine not found" in answer["message"]


@pytest.mark.parametrize("text", ["\ud800", "a\0b", "\U0001f600", "x" * 200000, "'; DROP TABLE machines;--",
                                  "\x1b[2J\nline two"])
def test_odd_text_is_kept_or_refused_and_never_a_defect(api, text):
    for field in ("hostname", "private_ip", "provider_name", "token"):
        status, answer = api.register({field: text})
        assert status in (200, 400), (field, answer)
    api.register()
    assert api.keepalive({"agent_version": text})[0] in (200, 400)
    assert api.keepalive({"inference": {"models": [text]}})[0] in (200, 400)
    assert "defect" not in api.log.getvalue()
    assert all(b9agent.printable(line) == line for line in api.log.getvalue().splitlines())
    assert api.listed() is not None


# -- HTTP -----------------------------------------------------------------------

@pytest.mark.parametrize("method, path, status", [
    ("GET", "/", 404), ("GET", "/api/v1/machine", 404), ("GET", "/api/v1/machine/register", 405),
    ("POST", "/api/v1/health", 405), ("DELETE", "/api/v1/machine/list", 405),
    ("GET", "/api/v1/../v1/health", 404), ("PUT", "/x", 404)])
def test_other_paths_and_methods(api, method, path, status):
    assert api.call(method, path)[0] == status


def raw_exchange(port, data, half_close=True):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as link:
        out = b""
        try:
            link.sendall(data)
            if half_close:
                link.shutdown(socket.SHUT_WR)
            while True:
                piece = link.recv(65536)
                if not piece:
                    break
                out += piece
        except ConnectionError:
            pass  # cut off in the middle of it
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
        return out


@pytest.mark.parametrize("data", [
    b"\r\n\r\n", b"nonsense\r\n\r\n", b"GET /api/v1/health HTTP/9.9\r\n\r\n",
    b"GET /api/v1/health HTTP/1.1\r\nBad Header\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /" + b"x" * 100000 + b" HTTP/1.1\r\n\r\n",
    b"GET /api/v1/health HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    b"POST /api/v1/machine/register HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/v1/machine/register HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n{}",
    b"POST /api/v1/machine/register HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b""])
def test_whoever_does_not_speak_http_disturbs_nobody(api, data):
    out = raw_exchange(api.port, data)
    assert b" 200 " not in out.split(b"\r\n", 1)[0] or b"X: y" in data or b"Bad Header" in data
    assert api.call("GET", "/api/v1/health")[0] == 200
    assert "defect" not in api.log.getvalue()


def test_a_body_over_the_limit_is_refused_unread(api):
    head = ("POST /api/v1/machine/register HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"
            "Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (api.token, 50 << 20))
    out = raw_exchange(api.port, head.encode(), half_close=False)
    assert b" 413 " in out.split(b"\r\n", 1)[0]


def test_a_stranger_with_a_large_body_gets_an_answer_and_not_a_reset(api):
    head = ("POST /api/v1/machine/register HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer nobody\r\n"
            "Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(20):
        out = raw_exchange(api.port, head.encode() + b"x" * 1000000)
        assert b" 401 " in out.split(b"\r\n", 1)[0]


def test_a_stalled_client_does_not_hold_up_others(api):
    stalled = []
    try:
        for _ in range(20):
            link = socket.create_connection(("127.0.0.1", api.port), timeout=30)
            link.sendall(b"POST /api/v1/machine/keepalive HTTP/1.1\r\nContent-Length: 100\r\n")
            stalled.append(link)
        assert api.register()[0] == 200
        assert api.keepalive()[0] == 200
    finally:
        for link in stalled:
            link.close()


def test_a_kept_connection_serves_many_requests(api):
    link = http.client.HTTPConnection("127.0.0.1", api.port, timeout=30)
    try:
        link.connect()
        sock = link.sock
        for _ in range(20):
            link.request("POST", "/api/v1/machine/keepalive", json.dumps(keepalive_body(api.machine)),
                         {"Authorization": "Bearer " + api.token, "Content-Type": "application/json"})
            assert link.getresponse().read()
            assert link.sock is sock, "the connection was closed in between"
    finally:
        link.close()


# -- list -----------------------------------------------------------------------

def test_list_shows_ready_machines_with_their_metrics(api):
    api.register()
    assert api.listed() == []
    api.keepalive()
    found = api.listed()
    assert len(found) == 1
    state, metrics = found[0]["state"], found[0]["metrics"]
    assert (state["machine_id"], state["pool_name"], state["status"], state["cpu"], state["memory"],
            state["gpu_count"], state["agent_version"]) == (
        api.machine, "gpu", "ready", "8000m", "16Gi", "2", "1.2.3")
    assert metrics["total_memory_available"] == 16384 and metrics["cpu_utilization_pct"] == 12.5


def test_list_by_pool_and_provider(api):
    other, other_token = api.store.create_machine("second")
    api.register(), api.keepalive()
    change = {"machine_id": other, "pool_name": "second", "provider_name": "lambda"}
    assert api.register(change, token=other_token)[0] == 200
    assert api.keepalive(change, token=other_token)[0] == 200
    def ids(query):
        return {entry["state"]["machine_id"] for entry in api.listed(query)}
    assert ids("") == {api.machine, other}
    assert ids("?pool_name=gpu") == {api.machine}
    assert ids("?provider_name=lambda") == {other}
    assert ids("?pool_name=gpu&provider_name=lambda") == set()
    assert ids("?pool_name=nowhere") == set()


# -- many at once, and the worst of ends ------------------------------------------

def test_keepalives_of_many_machines_at_once_are_all_kept(api):
    machines = [api.store.create_machine("gpu") for _ in range(12)]

    def live(entry):
        machine, token = entry
        change = {"machine_id": machine}
        codes = [api.register(change, token=token)[0]]
        for number in range(10):
            codes.append(api.keepalive(dict(change, agent_version="v%d" % number), token=token)[0])
        return codes

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        codes = [code for found in pool.map(live, machines) for code in found]
    assert set(codes) == {200} and len(codes) == 12 * 11
    ready = {machine.machine_id: machine for machine in api.store.machines()}
    assert all(ready[machine].state == "ready" and ready[machine].agent_version == "v9"
               for machine, _ in machines)


def test_the_command_line_writes_beside_a_running_gateway(api, home):
    for number in range(3):
        done = run_agent(home, "machine", "create", "--pool", "pool%d" % number, "--db", api.path,
                         "--json")
        made = json.loads(done.out)
        assert api.register({"machine_id": made["machine_id"], "pool_name": "pool%d" % number},
                            token=made["token"])[0] == 200
        assert api.keepalive({"machine_id": made["machine_id"], "pool_name": "pool%d" % number},
                             token=made["token"])[0] == 200
    assert len(api.listed()) == 3


def test_killed_and_started_again_on_the_same_database_it_knows_every_machine(embedded, home):
    machine, token = embedded.create()
    client = b9agent.GatewayClient(b9agent.Endpoint("http", "127.0.0.1", embedded.port), token, "gpu",
                                   b9agent.Log(stream=io.StringIO()))
    client.register(register_body(machine))
    client.keepalive(keepalive_body(machine))
    for _ in range(3):
        embedded.program.signal(signal.SIGKILL)
        embedded.program.wait()
        with pytest.raises(b9agent.GatewayUnreachable):
            client.keepalive(keepalive_body(machine))
        embedded.start()  # on the same port: its old connections must not hold it
        client.keepalive(keepalive_body(machine))
    found = json.loads(run_agent(home, "machine", "list", "--db", embedded.db, "--json").out)
    assert [entry["state"]["status"] for entry in found] == ["ready"]
    check = sqlite3.connect(embedded.db)
    try:
        assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert check.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    finally:
        check.close()


def test_the_gateway_ends_in_order_on_a_signal(embedded):
    for number in (signal.SIGTERM, signal.SIGINT):
        embedded.program.signal(number)
        assert embedded.program.wait() == 0
        embedded.start()


def test_a_port_that_is_taken_is_exit_6(embedded, home, tmp_path):
    done = run_agent(home, "gateway", "--port", embedded.port, "--db", tmp_path / "other.db")
    assert done.code == 6 and "cannot listen on 127.0.0.1:%d" % embedded.port in done.err
    assert "--port" in done.err and done.err.count("\n") == 1


def test_it_listens_on_loopback_unless_told_otherwise(embedded):
    with pytest.raises(ConnectionRefusedError):  # all of 127/8 is loopback, and this is not 127.0.0.1
        socket.create_connection(("127.0.0.2", embedded.port), timeout=30).close()
    socket.create_connection(("127.0.0.1", embedded.port), timeout=30).close()


# -- machine create and list ---------------------------------------------------------

def test_machine_create_prints_id_token_and_the_command_to_run(home, tmp_path):
    db = tmp_path / "g.db"
    done = run_agent(home, "machine", "create", "--pool", "gpu", "--db", db)
    assert (done.code, done.err) == (0, "")
    found = {line.split("  ")[0]: line.split()[-1] for line in done.out.splitlines()[:3]}
    machine, token = found["machine id"], found["token"]
    assert "BETA9_TOKEN=%s python3 b9agent.py --machine-id %s --pool-name gpu" % (token, machine) \
        in done.out
    assert stat.S_IMODE(db.stat().st_mode) == 0o600
    assert token.encode() not in db.read_bytes()


def test_machine_list_shows_states_and_remaining_time(home, embedded):
    machine, token = embedded.create("gpu")
    second, _ = embedded.create("second")
    client = b9agent.GatewayClient(b9agent.Endpoint("http", "127.0.0.1", embedded.port), token, "gpu",
                                   b9agent.Log(stream=io.StringIO()))
    client.register(register_body(machine))
    client.keepalive(keepalive_body(machine))
    done = run_agent(home, "machine", "list", "--db", embedded.db)
    rows = {line.split()[0]: line.split() for line in done.out.splitlines()}
    assert rows["MACHINE"][:4] == ["MACHINE", "POOL", "STATE", "TTL"]
    assert rows[machine][1:3] == ["gpu", "ready"] and 0 < int(rows[machine][3]) <= 300
    assert rows[second][1:3] == ["second", "pending"] and 300 < int(rows[second][3]) <= 3600
    only = run_agent(home, "machine", "list", "--db", embedded.db, "--pool", "second")
    assert second in only.out and machine not in only.out
    assert token not in done.out


def test_machine_list_without_a_database_says_so_and_makes_none(home, tmp_path):
    done = run_agent(home, "machine", "list", "--db", tmp_path / "none.db")
    assert done.code == 2 and "no gateway database" in done.err
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("content", [b"not a database at all, but text" * 40,
                                     b"SQLite format 3\0" + b"x" * 90], ids=["text", "cut"])
def test_a_file_that_is_no_database_is_refused_and_left_alone(content, home, tmp_path):
    path = tmp_path / "g.db"
    path.write_bytes(content)
    for command in (["machine", "create", "--pool", "gpu"], ["machine", "list"], ["gateway", "--port", "0"]):
        done = run_agent(home, *command, "--db", path)
        assert done.code == 2 and "cannot use the gateway database" in done.err, done
    assert path.read_bytes() == content


def test_a_database_in_a_folder_of_others_leaves_the_folder_as_it_is(home, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o755)
    done = run_agent(home, "machine", "create", "--pool", "gpu", "--db", folder / "g.db")
    assert done.code == 0, done
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / "g.db").stat().st_mode) == 0o600


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--port", "x"], ["--host", "a b"]])
def test_a_bad_address_is_exit_2(arguments, home, tmp_path):
    done = run_agent(home, "gateway", "--db", tmp_path / "g.db", *arguments)
    assert done.code == 2 and done.err.count("\n") == 1


@pytest.mark.parametrize("pool", ["", " x", "a\nb"])
def test_a_bad_pool_is_exit_2(pool, home, tmp_path):
    assert run_agent(home, "machine", "create", "--pool=" + pool, "--db", tmp_path / "g.db").code == 2
