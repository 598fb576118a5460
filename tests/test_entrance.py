"""Around the front door: where it listens, whom it is told to, what it costs when it cannot be had,
what it is told of the engine, and who gets its token."""
import json
import os
import socket

import pytest

import b9agent
from helpers import run_agent, wait_until
from hostile_gateway import TOKEN
from test_inference_hostile import DOOR, Embedded, Liar

Endpoint = b9agent.Endpoint


class Listener:
    def __init__(self, url, host, port):
        self.url, self.host, self.port = url, host, port

    def start(self):
        pass


class Door:
    """In place of the front door: it listens nowhere.  made: how often, of the class."""

    made, faults = [], []

    def __init__(self, *_):
        Door.made.append(self)
        self.listeners = []

    def start(self):
        if Door.faults:
            raise Door.faults[0]

    def listen(self, host, port, on_tailnet=False):
        scheme = "https" if host.startswith("198.51.") else "http"
        self.listeners.append(Listener("%s://%s:%d" % (scheme, host, port or 4711), host, port or 4711))
        return self.listeners[-1]

    def status(self):
        return {}

    def stop(self):
        Door.made.remove(self)


@pytest.fixture
def entrance(tmp_path, monkeypatch):
    """entrance(**settings): one whose front door is no real one."""
    monkeypatch.setattr(b9agent, "FrontDoor", Door, raising=False)
    monkeypatch.setattr(b9agent.Tailnet, "whois", None, raising=False)
    monkeypatch.setattr(Door, "made", [])
    monkeypatch.setattr(Door, "faults", [])
    tmp_path.chmod(0o700)

    def make(address="", **settings):
        loaded = b9agent.load_settings(dict({"inference_port": "0"}, state_dir=str(tmp_path),
                                            **settings), {})
        log = b9agent.make_log(loaded.settings)
        tailnet = b9agent.Tailnet("none", log, lambda status: None)
        if address:
            tailnet.reading = b9agent.TailnetReading("up", address, "box.tail.ts.net", "socket")
        one = b9agent.Entrance(loaded, log, Embedded(tmp_path).inference, tailnet, None)
        one.private_ip = "10.0.0.9"
        return one
    return make


# -- where it is reached ---------------------------------------------------------

@pytest.mark.parametrize("host, gateway, addresses, users, told", [
    # on loopback: only where the gateway is here, and is let in by that
    (None, "localhost", (), "127.0.0.1", None),
    (None, "localhost", ("127.0.0.1", "::1"), "127.0.0.1", "127.0.0.1"),
    (None, "gw.example", ("192.0.2.1",), "127.0.0.1", None),
    # elsewhere: only where the gateway's address is known
    ("0.0.0.0", "gw.example", ("192.0.2.1",), "127.0.0.1", "10.0.0.9"),
    ("0.0.0.0", "gw.example", (), "127.0.0.1", None),
    ("192.168.1.7", "gw.example", ("192.0.2.1",), "192.168.1.7", "192.168.1.7"),
    ("198.51.100.1", "gw.example", ("192.0.2.1",), "198.51.100.1", None)])  # its router speaks no TLS
def test_where_the_door_is_and_what_the_gateway_is_told(entrance, host, gateway, addresses, users, told):
    one = entrance(gateway_host=gateway, insecure="true",
                   **({"inference_host": host} if host else {}))
    assert one.place() == b9agent.DoorPlace(None, None)
    one.start()
    one._addresses = addresses
    place = one.place()
    assert (place.users.host, place.users.port) == (users, 4711)
    assert (place.gateway and place.gateway.url) == (told and "http://%s:4711" % told)
    assert place.users.scheme == ("https" if users.startswith("198.51.") else "http")
    one.stop()
    assert one.place() == b9agent.DoorPlace(None, None) and not Door.made


def test_on_a_tailnet_its_address_is_the_one_that_is_told_as_long_as_it_is_ours(entrance):
    one = entrance("100.64.0.7", gateway_host="gw")
    one.start()
    (follower,) = one._tailnet._listeners
    listener = follower._make("100.64.0.7")
    assert one.place().users.url == listener.url and one.place().gateway is None
    one._addresses = ("100.100.1.2",)
    assert one.place().gateway.url == listener.url
    one._addresses = ("192.0.2.1",)  # a gateway that would come by another address than it is let in by
    assert one.place().gateway is None
    one._addresses, one._tailnet.reading = ("100.100.1.2",), b9agent.TailnetReading("down")
    assert one.place().users.host == "127.0.0.1" and one.place().gateway is None
    # in userspace networking nothing of ours listens on the address
    one._tailnet.reading = b9agent.TailnetReading("up", "100.64.0.7", source="socket", tun=False)
    assert one.place().users.host == "127.0.0.1"


def test_an_address_that_is_set_is_the_only_one(entrance):
    one = entrance("100.64.0.7", inference_host="127.0.0.1")
    one.start()
    assert one._tailnet._listeners == []


def test_behind_a_tunnel_the_gateway_is_told_of_no_door(entrance):
    one = entrance(gateway_host="localhost", tunnel="me@gw.example",
                   inference_gateway_access="loopback")
    one.start()
    one._addresses = ("127.0.0.1",)
    assert one.place().users and one.place().gateway is None


def test_loopback_and_our_own_addresses_are_no_gateways_unless_that_is_asked_for(monkeypatch):
    found = b9agent.gateway_addresses
    assert found("localhost", "address") == () and found("127.0.0.1", "address") == ()
    assert found("127.0.0.1", "loopback") == ("127.0.0.1",) and found("0.0.0.0", "address") == ()
    assert found("192.0.2.1", "address") == ("192.0.2.1",)
    assert found("no-such-name.invalid", "address") is None
    monkeypatch.setattr(b9agent.socket, "getaddrinfo", lambda *_, **__: [
        (0, 0, 0, "", (address, 0)) for address in ("192.0.2.1", "127.0.0.1", "2001:db8::1")])
    assert found("gw", "address") == ("192.0.2.1", "2001:db8::1")


def test_the_gateways_address_is_looked_up_by_a_thread_and_kept_while_names_fail(entrance, monkeypatch):
    answers, changes = [("192.0.2.1",), None, ("192.0.2.2",)], []
    monkeypatch.setattr(b9agent, "gateway_addresses", lambda host, access: answers.pop(0))
    one = entrance(gateway_host="gw")
    one.on_change = lambda: changes.append(one.addresses())
    one.look_up()
    assert len(answers) == 3  # there is no door
    one.start()
    for left, known in ((2, ("192.0.2.1",)), (1, ("192.0.2.1",)), (0, ("192.0.2.2",))):
        one.look_up()
        wait_until(lambda: len(answers) == left and one.addresses() == known, "it is known")
        one.look_up()
        assert len(answers) == left  # it is not time yet
        one._look_up_s = 0.0
    assert changes == [("192.0.2.1",), ("192.0.2.2",)]


def test_where_the_gateway_is_not_let_in_it_is_not_looked_up(entrance, monkeypatch):
    monkeypatch.setattr(b9agent, "gateway_addresses", lambda host, access: 1 / 0)
    for settings in ({"inference_gateway_access": "off"}, {"tunnel": "me@gw"}):
        one = entrance(gateway_host="gw", **settings)
        one.start()
        one.look_up()
        assert one.addresses() == () and one.place().gateway is None


# -- its port, and what it costs -------------------------------------------------

def test_the_default_port_gives_way_to_an_ollama_and_one_that_was_set_does_not(entrance, monkeypatch):
    held = {11434}
    monkeypatch.setattr(b9agent, "port_holder", lambda host, port: "ollama, pid 7" if port in held else None)
    default = entrance(inference_port="11434")
    default._origins = dict(default._origins, inference_port="default")
    assert default._port("127.0.0.1") == 11435
    with pytest.raises(b9agent.LockedError, match="port 11434 is held by ollama, pid 7"):
        default._port("192.168.1.7")
    with pytest.raises(b9agent.LockedError, match="port 11434 is held by ollama, pid 7"):
        entrance(inference_port="11434")._port("127.0.0.1")
    held.add(11435)
    with pytest.raises(b9agent.LockedError, match="port 11435 is held"):
        default._port("127.0.0.1")
    held.clear()
    assert default._port("127.0.0.1") == 11434


@pytest.mark.parametrize("fault", [OSError(98, "Address already in use"), RuntimeError("no thread"),
                                   b9agent.UsageError("a file", "mend it")])
def test_what_goes_wrong_costs_the_door_alone(entrance, fault, tmp_path):
    one = entrance()
    Door.faults.append(fault)
    one.start()
    assert one.status() is None and not Door.made and one._tailnet._listeners == []
    assert not os.path.exists(str(tmp_path / "inference.addr"))
    one.stop()


# -- listening in clear text -------------------------------------------------------

@pytest.mark.parametrize("flags", [("--control-host", "0.0.0.0"), ("--inference-host", "192.168.1.7"),
                                   ("--control-host", "::"), ("--inference-host", "100.64.0.7")])
def test_clear_text_beyond_loopback_is_refused_until_somebody_says_so(home, flags, hostile):
    done = run_agent(home, "run", *flags, "--gateway-port", hostile.port, BETA9_TOKEN=TOKEN)
    assert done.code == 2 and "insecure: true" in done.err, done
    assert flags[1] in done.err and "clear text" in done.err and hostile.requests == []


def test_insecure_is_warned_of_and_then_done(agent, hostile):
    program = agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(hostile.port),
                    "--control-host", "0.0.0.0", "--control-port", "0", "--insecure", BETA9_TOKEN=TOKEN)
    program.wait_line("warning insecure .*control.host is 0.0.0.0.*clear text")
    program.wait_line(r"notice ready\b")
    assert program.stop() == 0


def test_a_tailnets_address_needs_no_tls_where_there_is_a_tailnet(monkeypatch):
    settings = b9agent.load_settings({"inference_host": "100.64.0.7"}, {}).settings
    for interface, trace, fine in (("100.64.0.7", True, True), ("", True, True), ("", False, False),
                                   ("100.64.0.8", True, False)):
        monkeypatch.setattr(b9agent, "tailnet_interface_address", lambda: interface)
        monkeypatch.setattr(b9agent, "tailnet_trace", lambda wanted: trace)
        if fine:
            assert b9agent.listeners_tls(settings, None) == (None, None, [])
        else:
            with pytest.raises(b9agent.UsageError, match="clear text"):
                b9agent.listeners_tls(settings, None)


def test_of_a_certificate_and_its_key_both_are_needed(home, hostile):
    done = run_agent(home, "run", "--tls-cert", "/nowhere/c.pem", "--gateway-port", hostile.port,
                     BETA9_TOKEN=TOKEN)
    assert done.code == 2 and "tls.key" in done.err, done


# -- what the door is told of the engine --------------------------------------------

def ollama(models, loaded):
    def say(method, path, body):
        return 200, {"/": b"Ollama is running", "/api/version": b'{"version": "1"}',
                     "/api/tags": json.dumps({"models": [{"name": name} for name in models]}).encode(),
                     "/api/ps": json.dumps({"models": [{"name": name} for name in loaded]}).encode()
                     }[path]
    return Liar(say)


def test_the_target_has_one_spelling_of_each_model_and_what_is_in_memory(tmp_path, monkeypatch):
    loaded = ["A:1b", "gone:latest"]
    with ollama(["A:1b", "registry.ollama.ai/library/b"], loaded) as engine:
        monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:%d" % engine.port)
        one = Embedded(tmp_path, inference_parallel="3")
        assert one.inference.target() == ("stopped", None, None, (), (), 0, 8192, 1, {})
        one.inference.place = DOOR
        assert one.inference.wire() is None and one.inference.port() == 4711
        one.inference.start("ollama", "")
        assert one.inference.target() == (
            "running", b9agent.ENGINE_BY_NAME["ollama"], Endpoint("http", "127.0.0.1", engine.port),
            ("a:1b", "b:latest"), ("a:1b",), 0, 8192, 3, {})
        loaded[:] = ["b"]
        one.inference._look(one.inference._up)
        assert one.inference.target().loaded == ("b:latest",)
        assert one.inference.wire() == {"status": "running", "ip": "127.0.0.1", "port": 4711,
                                        "models": ["A:1b", "registry.ollama.ai/library/b"]}
        status = one.inference.status()
        assert (status["endpoint"], status["engine_endpoint"]) == (
            "http://127.0.0.1:4711", "http://127.0.0.1:%d" % engine.port)
        one.inference.close()
    assert one.inference.target().state == "stopped" and one.inference.target().endpoint is None


@pytest.mark.parametrize("engine, settings, slots", [
    ("mlx", {}, 32), ("vllm", {}, 256), ("sglang", {"inference_parallel": "4"}, 256),
    ("llama-server", {"inference_parallel": "4"}, 4), ("vllm", {"inference_slots": "9"}, 9)])
def test_as_many_requests_at_once_as_the_engine_computes(engine, settings, slots, tmp_path):
    inference = Embedded(tmp_path, **settings).inference
    up = b9agent._Up(b9agent.ENGINE_BY_NAME[engine], b9agent.Reference("m", "gguf"), "m",
                     Endpoint("http", "127.0.0.1", 1), None, "", 0.0, 2, 4096)
    inference._set(up, ("m",), ("m",))
    assert inference.target()[3:8] == (("m",), ("m",), 2, 4096, slots)


@pytest.mark.parametrize("says, version", [(b"Ollama is running", "1"), (b"b9agent is running", "")])
def test_a_front_door_is_not_taken_for_an_ollama_that_was_here(says, version):
    with Liar(lambda method, path, body: (200, says if path == "/" else b'{"version": "1"}')) as theirs:
        assert b9agent.is_ollama(Endpoint("http", "127.0.0.1", theirs.port)) == version


@pytest.mark.parametrize("named, url", [
    ("", "127.0.0.1:11434"), ("127.0.0.1", "127.0.0.1:11434"), ("0.0.0.0", "127.0.0.1:11434"),
    ("127.0.0.2:5", "127.0.0.2:5"), (":5", "127.0.0.1:5"), ("5", "127.0.0.1:5"),
    ("http://localhost:5/", "localhost:5"), ("gpu.lan:5", "127.0.0.1:11434"),
    ("127.0.0.1:99999", "127.0.0.1:11434"), ("\0", "127.0.0.1:11434"), ("0", "127.0.0.1:11434")])
def test_an_ollama_of_others_is_where_its_own_variable_says_if_that_is_here(named, url):
    assert b9agent.ollama_place(named).url == "http://" + url


# -- the client, and whose token it takes --------------------------------------------

@pytest.fixture
def local(tmp_path, monkeypatch):
    """A state folder of an agent that runs, with a door at 127.0.0.1:4711."""
    tmp_path.chmod(0o700)
    (tmp_path / "inference.addr").write_text("http://127.0.0.1:4711\n")
    b9agent.write_atomic(str(tmp_path / "inference.token"), "ab" * 32 + "\n")
    monkeypatch.setenv("B9AGENT_HOME", str(tmp_path))
    return tmp_path


def asked(*place, **more):
    client = b9agent.InferenceClient()
    client.configure(*place, **more)
    endpoint, headers = client._place()
    return endpoint.url, headers.get("Authorization", "").replace("Bearer ", "")


def test_the_token_of_the_local_agent_goes_to_its_door_and_nowhere_else(local, monkeypatch):
    nobody = ("http://127.0.0.1:11434", "")
    assert asked() == nobody  # none runs: the port may be anybody's
    lock = b9agent.StateLock(str(local))
    try:
        ours = ("http://127.0.0.1:4711", "ab" * 32)
        assert asked() == asked("127.0.0.1", 4711) == asked("localhost", 4711) == ours
        assert asked("127.0.0.1", 4712) == ("http://127.0.0.1:4712", "")
        assert asked("gpu.lan", 4711) == ("http://gpu.lan:4711", "")
        assert asked(token="t-given") == ("http://127.0.0.1:4711", "t-given")
        monkeypatch.setenv("INFERENCE_TOKEN", "t-of-the-environment")
        assert asked() == ("http://127.0.0.1:4711", "t-of-the-environment")
        assert asked("127.0.0.1") == ("http://127.0.0.1:11434", "t-of-the-environment")
        assert asked("gpu.lan", 4711) == ("http://gpu.lan:4711", "t-of-the-environment")
        assert asked(token="t-given")[1] == "t-given"
        monkeypatch.delenv("INFERENCE_TOKEN")
        for rubbish in ("", "ftp://127.0.0.1:1", "http://127.0.0.1", "\0"):
            (local / "inference.addr").write_text(rubbish)
            assert asked() == nobody
    finally:
        lock.release()


def test_the_demo_takes_no_port_that_an_ollama_would_have(tmp_path):
    tmp_path.chmod(0o700)
    loaded = b9agent.load_settings({"state_dir": str(tmp_path)}, {})
    server = type("Server", (), {"port": 1994})
    log = b9agent.make_log(loaded.settings)
    agent = b9agent.demo_agent(loaded, log, str(tmp_path), server, "0a1b2c3d", "t")
    assert agent.settings.inference_port == 0


def test_an_agent_tells_where_its_door_is_as_long_as_it_runs(agent, home, state, hostile):
    program = agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(hostile.port),
                    "--control-port", "0", BETA9_TOKEN=TOKEN)
    program.wait_line(r"notice ready\b")
    place = (state / "inference.addr").read_text().strip()
    host, _, port = place.rpartition("//")[2].rpartition(":")
    with socket.create_connection((host, int(port)), 30):
        pass
    status = json.loads(run_agent(home, "status", "--json").out)
    assert status["inference_port"] == int(port) and status["inference"]["endpoint"] == place
    assert "front door  %s" % place in run_agent(home, "status").out
    assert oct((state / "inference.token").stat().st_mode & 0o777) == "0o600"
    assert program.stop() == 0 and not (state / "inference.addr").exists()
    with pytest.raises(OSError):
        socket.create_connection((host, int(port)), 30)


def test_an_engine_that_was_just_stopped_holds_no_model(tmp_path):
    assert Embedded(tmp_path).inference.holds("m") is False
