"""What a Go decoder makes of the agent's requests: the structs of the gateway, the decoder of the
gateway, a real `--once`."""
import http.client
import io
import json
import os
import subprocess
import threading

import pytest

import b9agent
from helpers import HERE, environment, run_agent

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

TOKEN = "-dash_first_Machine-token-0123456789"
K3S = "k3s-token-for-go-4471"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The compiled gateway.  Nothing but Go's own library is needed, so nothing is fetched."""
    folder = tmp_path_factory.mktemp("go")
    target = folder / "strict_gateway"
    env = dict(os.environ, GOCACHE=str(folder / "cache"), GOPATH=str(folder / "path"), GOFLAGS="",
               GOTOOLCHAIN="local", GOPROXY="off", GO111MODULE="off", CGO_ENABLED="0")
    subprocess.run(["go", "vet", os.path.join(HERE, "strict_gateway.go")], env=env, check=True)
    subprocess.run(["go", "build", "-o", str(target), os.path.join(HERE, "strict_gateway.go")], env=env,
                   check=True)
    return str(target)


class GoGateway:
    def __init__(self, program, home, *more):
        self._process = subprocess.Popen([program, TOKEN, *more], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, env=environment(home))
        self.port = self.next("listening")["port"]

    def next(self, what):
        """The next thing that happens; whatever is refused on the way to it is a failure."""
        while True:
            line = self._process.stdout.readline()
            assert line, "the gateway ended"
            told = json.loads(line)
            if told["what"] == what:
                return told
            assert told["what"] == "raw", told

    def all_the_while(self, work):
        """The result of work(), during which nobody has to read what happens."""
        reader = threading.Thread(target=lambda: list(self._process.stdout), daemon=True)
        reader.start()
        result = work()
        self._process.stdin.close()
        reader.join(60)
        return result

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture
def gateway(program, home):
    with GoGateway(program, home) as running:
        yield running


def once(home, gateway, *more, **extra):
    return run_agent(home, "--once", "--gateway-host", "127.0.0.1", "--gateway-port", gateway.port,
                     "--pool-name", "gpu", *more, **dict({"BETA9_TOKEN": TOKEN}, **extra))


def test_go_decodes_what_once_sends(home, gateway, state):
    done = once(home, gateway, "--max-cpu", "1.5", "--max-memory", "512Mi", BETA9_K3S_TOKEN=K3S,
                BETA9_HOSTNAME="100.64.0.9")
    assert done.code == 0, done
    machine = (state / "machine_id").read_text().strip()
    told = gateway.next("registered")
    assert told["request"] == {
        "token": K3S, "machine_id": machine, "hostname": "100.64.0.9", "provider_name": "generic",
        "pool_name": "gpu", "cpu": told["request"]["cpu"], "memory": "512Mi",
        "gpu_count": told["request"]["gpu_count"], "private_ip": told["request"]["private_ip"]}
    assert told["memory_mb"] == 512
    assert told["cpu_millicores"] == min(1500, 1000 * len(os.sched_getaffinity(0)))
    assert str(told["gpus"]) == told["request"]["gpu_count"]
    told = gateway.next("ready")["request"]
    assert (told["machine_id"], told["pool_name"], told["provider_name"], told["agent_version"]) == (
        machine, "gpu", "generic", b9agent.VERSION)
    metrics = told["metrics"]
    assert metrics["total_memory_available"] == 512
    assert 0 <= metrics["cpu_utilization_pct"] <= 100 and 0 < metrics["memory_utilization_pct"] <= 100
    disk = os.statvfs(str(home))
    assert metrics["total_disk_space_bytes"] == disk.f_blocks * disk.f_frsize
    assert 0 < metrics["total_disk_free_bytes"] < metrics["total_disk_space_bytes"]
    assert told["inference"] is None


def test_go_decodes_capacities_of_the_whole_machine(home, gateway):
    assert once(home, gateway).code == 0
    told = gateway.next("registered")
    metrics = gateway.next("ready")["request"]["metrics"]
    assert told["cpu_millicores"] == metrics["total_cpu_available"] > 0
    assert told["memory_mb"] == metrics["total_memory_available"] > 0
    with open("/proc/meminfo") as handle:
        total_kib = int(handle.readline().split()[1])
    assert metrics["total_memory_available"] <= total_kib // 1024


NUMBERS = ["15", "15.0", "1e3", "1E2", "-1", '"15"', "true", "null", "[]", "{}", "1e999", "1e-999",
           "9223372036854775807", "9223372036854775808", "0.1", "-0", "1.", ".5", "01", "NaN"]


def bodies(machine):
    """Requests of every shape, good and bad."""
    register = {"token": "", "machine_id": machine, "hostname": "h", "provider_name": "generic",
                "pool_name": "gpu", "cpu": "8000m", "memory": "16Gi", "gpu_count": "0",
                "private_ip": "10.0.0.1"}
    keepalive = {"machine_id": machine, "pool_name": "gpu", "provider_name": "generic",
                 "agent_version": "1", "metrics": {}}
    yield from ("", "{", "[]", "null", '"x"', "5", "{}", "\ufeff{}", '{"machine_id": "\\ud800"}')
    for name in register:
        for number in NUMBERS:
            yield json.dumps(dict(register, **{name: "@"})).replace('"@"', number)
    for name in ("total_cpu_available", "cpu_utilization_pct"):
        for number in NUMBERS:
            yield json.dumps(dict(keepalive, metrics={name: "@"})).replace('"@"', number)
    for name, texts in (("cpu", ["8", "0m", "", "m", "8.5", "8000M", "8 m", "8_0"]),
                        ("memory", ["16Gi", "16G", "1.5Gi", "16GiB", "1Ti", "1024Ki", "", "Gi", " 1Gi"]),
                        ("gpu_count", ["0", "8", "", "two", "1.0", "-1"]),
                        ("pool_name", ["gpu", "", "other"])):
        for text in texts:
            yield json.dumps(dict(register, **{name: text}))


def statuses(port, token, machine):
    """[(path, body, status)] of each body at both routes."""
    found = []
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        for body in bodies(machine):
            for path in ("register", "keepalive"):
                link.request("POST", "/api/v1/machine/" + path, body.encode(), {
                    "Authorization": "Bearer " + token, "Content-Type": "application/json"})
                reply = link.getresponse()
                reply.read()
                found.append((path, body.replace(machine, "MACHINE"), reply.status))
    finally:
        link.close()
    return found


def test_the_embedded_gateway_takes_nothing_that_go_would_refuse(program, home):
    with GoGateway(program, home, "lenient") as go:
        of_go = go.all_the_while(lambda: statuses(go.port, TOKEN, "0badcafe"))
    store = b9agent.MachineStore(str(home / "g.db"))
    machine, token = store.create_machine("gpu")
    server = b9agent.start_gateway("127.0.0.1", 0, b9agent.GatewayApi(
        b9agent.Log(stream=io.StringIO()), store))
    try:
        of_ours = statuses(server.port, token, machine)
    finally:
        server.stop()
        store.close()
    assert [row[:2] for row in of_go] == [row[:2] for row in of_ours]
    taken = [row for row in of_ours if row[2] == 200]
    assert len(taken) > 25
    assert [row for row, go_row in zip(of_ours, of_go) if row[2] == 200 != go_row[2]] == []
