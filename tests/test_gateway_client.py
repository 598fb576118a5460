"""The gateway client against a gateway that answers everything: each answer of the contract's table,
and each nastiness of the network, comes to its typed outcome, and the token goes nowhere else."""
import io
import json
import os
import socket
import time

import pytest

import b9agent
from helpers import HERE, StallMeter, quiet_port
from hostile_gateway import (CLUSTER_SECRETS, FAULTS, TOKEN, ConnectProxy, HostileGateway,
                             decode_json, keepalive_problems, register_problems, secret_words,
                             server_context)

K3S = "k3s-bearer-secret-in-register-771"
IDENTITY = b9agent.Identity("0badcafe", "gpu", "generic", "100.64.0.7", K3S)
METRICS = {"total_cpu_available": 8000, "total_memory_available": 16384, "worker_count": 0,
           "total_disk_space_bytes": 10 ** 12, "total_disk_free_bytes": 10 ** 11,
           "cpu_utilization_pct": 12.5, "memory_utilization_pct": 50.0, "container_count": 0,
           "free_gpu_count": 1, "cache_usage_pct": 0.0, "cache_capacity": 0, "cache_memory_usage": 0,
           "cache_cpu_usage": 0.0}
REGISTER = b9agent.register_payload(IDENTITY, 8000, 16 << 30, 1, "10.0.0.5")
KEEPALIVE = b9agent.keepalive_payload(IDENTITY, METRICS)
TLS = os.path.join(HERE, "tls")


class Wire:
    """A client with its log, at --debug."""

    def __init__(self, endpoint, token=TOKEN, keepalive_limit_s=10.0):
        b9agent.REDACTOR.add(token)
        self.stream = io.StringIO()
        self.log = b9agent.Log("text", "debug", stream=self.stream)
        self.client = b9agent.GatewayClient(endpoint, token, "gpu", self.log, keepalive_limit_s)

    def outcome(self, name):
        """("ok" or the class of the failure, the failure)."""
        payload = REGISTER if name == "register" else KEEPALIVE
        try:
            getattr(self.client, name)(payload)
        except b9agent.GatewayError as error:
            return type(error).__name__, error
        return "ok", None


def wire(gateway, keepalive_limit_s=10.0, **more):
    return Wire(b9agent.Endpoint(more.pop("scheme", "http"), more.pop("host", "127.0.0.1"),
                                 gateway.port, **more), keepalive_limit_s=keepalive_limit_s)


# -- every answer --------------------------------------------------------

@pytest.mark.parametrize("request_name", ["register", "keepalive"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_answer_comes_to_its_outcome(fault, request_name, hostile, monkeypatch):
    limit_s = 1.0 if FAULTS[fault].slow else 10.0
    monkeypatch.setattr(b9agent, "REGISTER_LIMIT_S", limit_s)
    hostile.fault = fault
    client = wire(hostile, limit_s)
    outcome, error = client.outcome(request_name)
    expected = FAULTS[fault].register if request_name == "register" else FAULTS[fault].outcome
    if fault == "status_not_ok" and request_name == "register":
        expected = "GatewayUnwell"
    assert outcome == expected, error
    said = client.stream.getvalue() + str(error)
    assert TOKEN not in said and K3S not in said
    assert not [word for word in secret_words() if word in said]
    assert hostile.elsewhere.connections == 0
    if error is not None:
        assert hostile.url in error.what or "127.0.0.1" in error.what
        assert error.hint, "a failure without a word on what to do"
        assert b9agent.printable(str(error)) == str(error)
        assert len(str(error)) < 700
    assert all(b9agent.printable(line) == line for line in client.stream.getvalue().splitlines())


def test_the_table_of_faults_has_every_outcome():
    found = {fault.outcome for fault in FAULTS.values()}
    def below(kind):
        return {kind.__name__}.union(*map(below, kind.__subclasses__()))
    assert found == (below(b9agent.GatewayError) | {"ok"}) - {"GatewayError"}


EXIT_CODES = {"TokenRefused": 3, "RequestRefused": 4, "NoKeepaliveRoute": 4, "MachineNotFound": 5,
              "GatewayUnwell": 5, "GatewayUnreachable": 5}


def test_exit_codes_of_the_outcomes():
    for name, code in EXIT_CODES.items():
        assert getattr(b9agent, name).exit_code == code


@pytest.mark.parametrize("fault, request_name, words", [
    ("unauthorized", "keepalive", ["401", "Unauthorized", "beta9 machine create --pool gpu"]),
    ("forbidden", "register", ["403", "Invalid token", "beta9 machine create --pool gpu",
                               "only once"]),
    ("invalid_pool", "register", ["no pool `gpu`", "--pool-name"]),
    ("no_route_404", "keepalive", ["404", "keepalive"]),
    ("no_route_405", "keepalive", ["405", "keepalive"]),
    ("machine_not_found", "keepalive", ["does not know this machine", "300 s"]),
    ("invalid_cpu", "register", ["500", "Invalid machine cpu value"]),
    ("invalid_payload", "register", ["400", "Invalid payload", "--debug"]),
    ("redis", "keepalive", ["500", "10.0.0.5:6379"]),
    ("unavailable", "keepalive", ["503"]),
    ("redirect_302", "keepalive", ["redirects (302)", "not followed"]),
])
def test_a_failure_says_what_happened_and_what_to_do(fault, request_name, words, hostile):
    hostile.fault = fault
    error = wire(hostile).outcome(request_name)[1]
    for word in words:
        assert word in str(error)


def test_a_connection_refused_offers_the_tunnel():
    port = quiet_port()
    outcome, error = Wire(b9agent.Endpoint("http", "127.0.0.1", port)).outcome("keepalive")
    assert outcome == "GatewayUnreachable"
    assert "127.0.0.1:%d unreachable: connection refused" % port in str(error)
    assert "--tunnel USER@HOST" in str(error)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 70 + ".invalid", "[", "%"])
def test_a_name_that_does_not_resolve_is_unreachable(host):
    outcome, error = Wire(b9agent.Endpoint("http", host, 1994)).outcome("keepalive")
    assert outcome == "GatewayUnreachable" and "cannot look up" in str(error)


@pytest.mark.parametrize("text, seconds", [
    ("1", 1.0), ("30", 30.0), ("86400", b9agent.RETRY_AFTER_MAX_S), ("-5", None), ("soon", None),
    ("1.5", None), ("", None), ("9" * 400, None), ("Wed, 21 Oct 2015 07:28:00 GMT", None),
    ("\u0661", None), ("nan", None), ("inf", None)])
def test_retry_after_is_taken_in_seconds_and_capped(text, seconds):
    found = b9agent._retry_after_s(text)
    assert found == seconds or (found == b9agent.RETRY_AFTER_MAX_S and text.isdecimal()
                                and len(text) > 300)


def test_retry_after_reaches_the_outcome(hostile):
    hostile.fault = "too_many"
    assert wire(hostile).outcome("keepalive")[1].retry_after_s == 1.0
    hostile.fault = "too_many_dated"
    assert wire(hostile).outcome("keepalive")[1].retry_after_s is None


# -- limits --------------------------------------------------------------

@pytest.mark.parametrize("fault", [name for name in FAULTS if FAULTS[name].slow])
@pytest.mark.parametrize("name", ["register", "keepalive"])
def test_a_peer_that_hangs_or_drips_costs_the_limit_and_no_more(fault, name, hostile, monkeypatch):
    monkeypatch.setattr(b9agent, "REGISTER_LIMIT_S", 0.7)
    hostile.fault = fault
    with StallMeter() as stall:
        began = time.monotonic()
        outcome, error = wire(hostile, 0.7).outcome(name)
        took = time.monotonic() - began
    assert outcome == "GatewayUnreachable" and "no answer within 0.7 s" in str(error)
    assert 0.7 <= took < 0.7 + 0.5 + 3 * stall.worst_s


def test_the_limits_are_those_of_the_issue():
    assert (b9agent.REGISTER_LIMIT_S, b9agent.KEEPALIVE_LIMIT_S) == (30.0, 10.0)


@pytest.mark.parametrize("fault", ["huge_body", "huge_without_length", "huge_chunked",
                                   "endless_headers"])
def test_of_a_huge_answer_a_megabyte_is_read_at_most(fault, hostile):
    hostile.fault = fault
    assert wire(hostile).outcome("keepalive")[0] == "GatewayUnwell"
    hostile.close()  # the sender has ended: it got no further than the buffers of two sockets
    assert hostile.poured < 40 << 20, "%d bytes went through" % hostile.poured


def test_an_answer_of_just_under_a_megabyte_is_read(hostile):
    reply = b9agent.http_request("GET", b9agent.Endpoint("http", "127.0.0.1", hostile.port),
                                 "/api/v1/health", {}, None, 10)
    assert (reply.status, json.loads(reply.body)) == (200, {"status": "ok"})
    hostile.fault = "ok_with_secrets"
    reply = b9agent.http_request("GET", b9agent.Endpoint("http", "127.0.0.1", hostile.port),
                                 "/api/v1/health", {}, None, 10)
    size = len(reply.body)
    for limit, fits in ((size, True), (size - 1, False)):
        try:
            b9agent.http_request("GET", b9agent.Endpoint("http", "127.0.0.1", hostile.port),
                                 "/api/v1/health", {}, None, 10, limit)
            assert fits
        except b9agent.HttpFailure as failure:
            assert not fits and failure.kind == "too_large"


# -- what is sent --------------------------------------------------------

def test_the_payloads_are_what_a_go_decoder_takes():
    assert register_problems(decode_json(json.dumps(REGISTER).encode())) == []
    assert keepalive_problems(decode_json(json.dumps(KEEPALIVE).encode())) == []
    assert set(KEEPALIVE["metrics"]) == set(METRICS) and len(METRICS) == 13


def test_register_sends_the_k3s_token_and_never_the_machine_token():
    assert REGISTER["token"] == K3S
    empty = b9agent.register_payload(IDENTITY._replace(k3s_token=""), None, None, 0, "10.0.0.5")
    assert empty["token"] == "" and register_problems(empty) == []


@pytest.mark.parametrize("cpu, memory, gpus, expected", [
    (8000, 16 << 30, 8, ("8000m", "16384Mi", "8")), (500, 1 << 20, 0, ("500m", "1Mi", "0")),
    (1, (1 << 30) + 1, 1, ("1m", "1024Mi", "1"))])
def test_capacities_are_text_in_the_units_of_the_gateway(cpu, memory, gpus, expected):
    payload = b9agent.register_payload(IDENTITY, cpu, memory, gpus, "10.0.0.5")
    assert (payload["cpu"], payload["memory"], payload["gpu_count"]) == expected
    assert register_problems(payload) == []


def test_an_unknown_metric_is_left_out_and_a_whole_one_stays_whole():
    payload = b9agent.metrics_payload({"cpu_utilization_pct": None, "total_cpu_available": 8000,
                                       "memory_utilization_pct": 33.33333, "free_gpu_count": 0})
    assert payload == {"total_cpu_available": 8000, "memory_utilization_pct": 33.33,
                       "free_gpu_count": 0}
    assert isinstance(payload["total_cpu_available"], int)
    assert b9agent.metrics_payload({}) == {}


def test_a_request_has_one_of_each_header_and_the_bearer_token(hostile):
    client = wire(hostile)
    assert client.outcome("register")[0] == client.outcome("keepalive")[0] == "ok"
    for request in hostile.requests:
        assert request.values("authorization") == ["Bearer " + TOKEN]
        assert request.values("host") == ["127.0.0.1:%d" % hostile.port]
        assert request.values("content-type") == ["application/json"]
        names = [name.lower() for name, _ in request.headers]
        assert len(names) == len(set(names))
    assert hostile.requests[0].body == REGISTER and hostile.requests[0].problems == []
    assert hostile.machines == {"0badcafe": "ready"}


def test_the_strict_gateway_does_object_to_what_go_would_refuse():
    """The judge itself: each of these is a mistake that a predecessor made or could make."""
    for change in ({"gpu_count": 1}, {"cpu": "8"}, {"memory": "16GiB"}, {"memory": "1.5Gi"},
                   {"private_ip": "::1"}, {"machine_id": "abc"}, {"hostname": None}):
        assert register_problems(dict(REGISTER, **change)), change
    for name, value in (("total_memory_available", 16 << 30), ("cpu_utilization_pct", "5"),
                        ("worker_count", True), ("free_gpu_count", None), ("worker_count", 1.5)):
        body = decode_json(json.dumps(dict(KEEPALIVE, metrics=dict(METRICS, **{name: value}))).encode())
        assert keepalive_problems(body), name
    with pytest.raises(ValueError):
        decode_json(b'{"a": NaN}')
    body = dict(KEEPALIVE)
    del body["metrics"]
    assert keepalive_problems(body)


def test_a_line_break_cannot_get_into_a_header():
    for token in ("abc\r\nX-Evil: 1", "abc\n", "a\0b"):
        with pytest.raises(b9agent.HttpFailure):
            b9agent.http_request("GET", b9agent.Endpoint("http", "127.0.0.1", 9), "/",
                                 {"Authorization": "Bearer " + token}, None, 1)


# -- health --------------------------------------------------------------

def test_health_carries_no_token(hostile):
    wire(hostile).client.health()
    assert not hostile.requests[0].values("authorization")


@pytest.mark.parametrize("fault", ["panic", "bad_gateway", "login_page", "close", "status_not_ok"])
def test_health_of_a_gateway_that_is_not_well(fault, hostile):
    hostile.fault = fault
    with pytest.raises(b9agent.GatewayUnwell):
        wire(hostile).client.health()


# -- https ---------------------------------------------------------------

@pytest.fixture
def secure():
    context = server_context(os.path.join(TLS, "server.pem"), os.path.join(TLS, "server.key"))
    with HostileGateway(context=context) as gateway:
        yield gateway
    assert gateway.violations == []


def test_https_with_an_authority_of_ones_own(secure):
    client = wire(secure, scheme="https", ca_file=os.path.join(TLS, "ca.pem"))
    assert client.outcome("register")[0] == client.outcome("keepalive")[0] == "ok"
    client = wire(secure, scheme="https", host="localhost", ca_file=os.path.join(TLS, "ca.pem"))
    assert client.outcome("keepalive")[0] == "ok"


def test_https_with_an_unknown_authority_sends_nothing(secure):
    outcome, error = wire(secure, scheme="https").outcome("keepalive")
    assert outcome == "GatewayUnreachable" and "certificate" in str(error)
    assert secure.requests == []


def test_https_with_the_certificate_of_another_host_sends_nothing():
    context = server_context(os.path.join(TLS, "other.pem"), os.path.join(TLS, "server.key"))
    with HostileGateway(context=context) as gateway:
        outcome, error = wire(gateway, scheme="https",
                              ca_file=os.path.join(TLS, "ca.pem")).outcome("keepalive")
        assert outcome == "GatewayUnreachable" and "certificate" in str(error)
        assert gateway.requests == []


@pytest.mark.parametrize("ca_file", ["/nowhere/ca.pem", os.path.join(TLS, "server.key")])
def test_https_with_an_authority_file_that_is_none(ca_file, secure):
    outcome, error = wire(secure, scheme="https", ca_file=ca_file).outcome("keepalive")
    assert outcome == "GatewayUnreachable" and ca_file in str(error)


def test_https_to_a_plain_gateway_and_plain_to_an_https_one(secure):
    assert wire(secure).outcome("keepalive")[0] in ("GatewayUnwell", "GatewayUnreachable")
    assert secure.requests == []
    with HostileGateway() as plain:
        outcome, _ = wire(plain, 1.0, scheme="https").outcome("keepalive")
        assert outcome == "GatewayUnreachable"
        assert plain.requests == []


@pytest.mark.parametrize("fault", ["hang", "drip", "close", "cut_body", "huge_body"])
def test_limits_hold_under_tls_too(fault, secure):
    secure.fault = fault
    client = wire(secure, 1.0, scheme="https", ca_file=os.path.join(TLS, "ca.pem"))
    assert client.outcome("keepalive")[0] == FAULTS[fault].outcome


# -- proxies -------------------------------------------------------------

PROXY_PASSWORD = "proxy-password-55aa"


def test_https_through_a_proxy_keeps_the_token_encrypted(secure):
    with ConnectProxy(secure.port) as proxy:
        found = b9agent.proxy_for("https", "gw.example", None,
                                  {"https_proxy": "http://me:%s@127.0.0.1:%d" % (PROXY_PASSWORD,
                                                                                 proxy.port)})
        endpoint = b9agent.Endpoint("https", "localhost", 443, os.path.join(TLS, "ca.pem"), found)
        client = Wire(endpoint)
        assert client.outcome("keepalive")[0] == "MachineNotFound"
        assert client.outcome("register")[0] == client.outcome("keepalive")[0] == "ok"
        assert len(proxy.heads) == 3
        for head in proxy.heads:
            assert head.startswith("CONNECT localhost:443 HTTP/1.1\r\n")
            assert "Proxy-Authorization: Basic " in head and TOKEN not in head
    for request in secure.requests:
        assert not request.values("proxy-authorization")
    assert PROXY_PASSWORD not in client.stream.getvalue()


def test_a_proxy_that_says_no_is_named(secure):
    with ConnectProxy(secure.port, status=407) as proxy:
        endpoint = b9agent.Endpoint("https", "localhost", 443, None, ("127.0.0.1", proxy.port, ""))
        outcome, error = Wire(endpoint).outcome("keepalive")
        assert outcome == "GatewayUnreachable" and "407" in str(error) and "proxy" in str(error)
        assert "\\r" not in str(error)  # its first line alone
    assert secure.requests == []


def test_plain_http_through_a_proxy_that_was_set_on_purpose(hostile):
    with ConnectProxy(hostile.port) as proxy:
        found = b9agent.proxy_for("http", "gw.example", "http://127.0.0.1:%d" % proxy.port, {})
        endpoint = b9agent.Endpoint("http", "gw.example", 1994, None, found)
        assert Wire(endpoint).outcome("register")[0] == "ok"
        assert proxy.heads[0].startswith("POST http://gw.example:1994/api/v1/machine/register HTTP/1.1")
        assert "\r\nHost: gw.example:1994\r\n" in proxy.heads[0]


EVERY_PROXY = {name: "http://proxy.example:8080" for base in ("http_proxy", "https_proxy", "all_proxy")
               for name in (base, base.upper())}


def test_plain_http_never_goes_through_a_proxy_of_the_environment():
    assert b9agent.proxy_for("http", "gw.example", None, EVERY_PROXY) is None


def test_https_goes_through_the_proxy_of_the_environment_unless_told_otherwise():
    def found(environ, setting=None, host="gw.example"):
        return b9agent.proxy_for("https", host, setting, environ)
    assert found(EVERY_PROXY) == ("proxy.example", 8080, "")
    assert found({"http_proxy": "http://p:1"}) is None
    assert found({"ALL_PROXY": "p.example:81"}) == ("p.example", 81, "")
    assert found(EVERY_PROXY, "none") is None
    assert found(EVERY_PROXY, "http://own:3128") == ("own", 3128, "")
    for rule in ("gw.example", ".example", "example", "*", "a, GW.example"):
        assert found(dict(EVERY_PROXY, no_proxy=rule)) is None, rule
    for rule in ("w.example", "gw.example.org", ""):
        assert found(dict(EVERY_PROXY, NO_PROXY=rule)) is not None, rule
    for host in ("localhost", "127.0.0.1", "::1"):
        assert found(EVERY_PROXY, host=host) is None
    with pytest.raises(b9agent.UsageError) as caught:
        found({"https_proxy": "socks5://me:%s@p:1" % PROXY_PASSWORD})
    assert PROXY_PASSWORD not in str(caught.value)


# -- secrets -------------------------------------------------------------

def test_the_debug_log_has_every_request_and_no_secret(hostile):
    hostile.fault = "ok_with_secrets"
    client = wire(hostile)
    client.outcome("register")
    client.outcome("keepalive")
    said = client.stream.getvalue()
    assert said.count("request=register") == said.count("request=keepalive") == 2
    assert "0badcafe" in said
    for word in secret_words() + [TOKEN, K3S, json.dumps(CLUSTER_SECRETS)]:
        assert word not in said


# -- clocks --------------------------------------------------------------

@pytest.mark.parametrize("text, seconds", [
    ("Sun, 06 Nov 1994 08:49:37 GMT", 784111777.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ("Thu, 29 Feb 2024 23:59:59 GMT", 1709251199.0), ("Fri, 01 Mar 2024 00:00:00 GMT", 1709251200.0),
    ("Wed, 31 Dec 2098 12:00:00 GMT", 4070865600.0), ("Sunday, 06-Nov-94 08:49:37 GMT", None),
    ("Sun Nov  6 08:49:37 1994", None), ("Sun, 06 Nov 1994 08:49:37 +0100", None),
    ("Sun, 06 Foo 1994 08:49:37 GMT", None), ("", None), ("x" * 5000, None)])
def test_dates_are_read_in_the_one_form_that_servers_write(text, seconds):
    assert b9agent.parse_http_date(text) == seconds


def test_a_clock_that_is_off_is_measured_and_said_once(monkeypatch):
    """Against an answer's Date; after it was mended and is off again, it is said again."""
    client = Wire(b9agent.Endpoint("http", "127.0.0.1", 1))
    walls = [784111777.5 - 7200, 784111777.5 - 7201, 784111777.5 + 59, 784111777.5 + 61,
             784111777.5 + 90]
    monkeypatch.setattr(b9agent, "http_request", lambda *_, **__: b9agent.HttpReply(
        200, {"date": "Sun, 06 Nov 1994 08:49:37 GMT"}, b'{"status": "ok"}'))
    offsets = []
    for wall in walls:
        monkeypatch.setattr(b9agent.time, "time", lambda: wall)
        assert client.outcome("keepalive")[0] == "ok"
        offsets.append(client.client.clock_offset_s)
    monkeypatch.undo()
    assert offsets == [-7200.0, -7201.0, 59.0, 61.0, 90.0]
    said = [line for line in client.stream.getvalue().splitlines() if " warning clock " in line]
    assert ["7200 s behind" in said[0], "61 s ahead of" in said[1], len(said)] == [True, True, 2]


def test_an_answer_without_a_date_says_nothing_of_clocks(monkeypatch):
    client = Wire(b9agent.Endpoint("http", "127.0.0.1", 1))
    monkeypatch.setattr(b9agent, "http_request",
                        lambda *_, **__: b9agent.HttpReply(200, {}, b'{"status": "ok"}'))
    assert client.outcome("keepalive")[0] == "ok"
    assert client.client.clock_offset_s is None
