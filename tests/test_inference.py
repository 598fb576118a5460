"""From a POST to a token: engines that are started, adopted, killed, missing and in the way, by HTTP,
by the command line and by the Python client; real ones where they are installed."""
import http.client
import http.server
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

import b9agent
import engines
from helpers import Program, environment, run_agent, wait_until
from hostile_gateway import TOKEN
from test_control_api import Control


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def processes_of(home):
    """{pid: command line} of all that run with this HOME, found by their environment."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc here")
    found, mark = {}, ("\0HOME=%s\0" % home).encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/environ" % pid, "rb") as handle:
                ours = mark in b"\0" + handle.read()
            with open("/proc/%s/cmdline" % pid, "rb") as handle:
                command = handle.read().decode().replace("\0", " ").strip()
            with open("/proc/%s/stat" % pid) as handle:
                zombie = handle.read().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            continue
        if ours and not zombie and int(pid) != os.getpid():
            found[int(pid)] = command
    return found


def engine_processes(home):
    return {pid: line for pid, line in processes_of(home).items() if "b9agent.py" not in line}


@pytest.fixture
def nothing_left(home):
    """What a killed agent leaves running is ended with the test."""
    yield
    for pid in processes_of(home):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass


class World:
    """An agent with programs of ours first on its PATH."""

    def __init__(self, agent, hostile, home, state, folders):
        self._agent, self.hostile, self.home, self.state = agent, hostile, home, state
        self.path = engines.path_with(*folders)
        self.port = free_port()  # of the front door
        self.program = self.control = None
        self._engine_ports = set()

    def start(self, *flags, **extra):
        # stand-ins keep their files below this home
        extra = dict({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, **extra)
        self.program = self._agent(
            "run", "--gateway-host", "127.0.0.1", "--gateway-port", str(self.hostile.port),
            "--control-port", "0", "--keepalive-interval", "1",
            *(flags if "--inference-port" in flags else flags + ("--inference-port",
                                                                 str(self.port))),
            # the gateway is on this machine, and is told of the door only where that lets it in
            *(() if any("gateway-access" in flag for flag in flags) else
              ("--inference-gateway-access", "loopback")),
            BETA9_TOKEN=TOKEN, PATH=self.path, **extra)
        self.program.wait_line(r"notice ready\b")
        self.control = Control(self.program, self.state)
        return self

    @property
    def token(self):
        return (self.state / "inference.token").read_text().strip()

    def post(self, path, body=None):
        status, answer, _ = self.control.call(
            "POST", path, {"Content-Type": "application/json"}, json.dumps(body or {}))
        return status, self._seen(answer)

    def get(self, path):
        return self._seen(self.control.call("GET", path)[1])

    def _seen(self, answer):
        place = answer.get("engine_endpoint")
        self._engine_ports |= {int(place.rpartition(":")[2])} if place else set()
        return answer

    def engine_listens(self):
        """Whether any engine that was seen here still has its port."""
        assert self.port not in self._engine_ports
        return any(map(listens, self._engine_ports))

    def cli(self, *arguments, **extra):
        return run_agent(self.home, *arguments, PATH=self.path, **extra)

    def pid(self):
        return self.get("/inference/status")["pid"]

    def last_inference(self, condition):
        """Once a keepalive says that."""
        def looked(requests):
            sent = [request.body.get("inference") for request in requests
                    if request.name == "keepalive" and isinstance(request.body, dict)]
            return sent and condition(sent[-1]) and (sent[-1] or True)
        return self.hostile.wait_for(looked, "a keepalive with that inference")


@pytest.fixture
def world(agent, hostile, home, state, tmp_path, nothing_left):
    """world(*programs): an agent that finds stand-ins for these, not started yet."""
    return lambda *names: World(agent, hostile, home, state,
                                [engines.stand_in(tmp_path / "bin", *names)])


@pytest.fixture
def real_world(agent, hostile, home, state, tmp_path, nothing_left):
    return lambda folder: World(agent, hostile, home, state, [folder])


# -- Ollama: a stand-in, and a real one where there is one ------------------

def test_start_a_token_and_stop_by_http(world):
    here = world("ollama").start()
    status, answer = here.post("/inference/start", {"engine": "ollama"})
    assert (status, answer["status"], answer["running"]) == (200, "running", True)
    assert answer["endpoint"] == "http://127.0.0.1:%d" % here.port and answer["models"] == []
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", answer["engine_endpoint"])
    assert answer["engine_endpoint"] != answer["endpoint"]
    assert here.post("/inference/pull", {"model": "llama3.2"})[1]["status"] == "success"
    status, answer = here.post("/models/load", {"model": "llama3.2"})
    assert (status, answer["status"]) == (200, "loaded")
    row = next(row for row in here.get("/models")["models"] if row["name"] == "llama3.2:latest")
    assert row["loaded"] and row["pulled_by"] == "control API" and row["license"] and row["layers"]
    link = http.client.HTTPConnection("127.0.0.1", here.port, timeout=30)
    link.request("POST", "/api/generate", json.dumps({"model": "llama3.2", "prompt": "Hi",
                                                      "stream": False}),
                 {"Authorization": "Bearer " + here.token})
    assert json.loads(link.getresponse().read())["response"]
    link.close()
    assert here.last_inference(lambda said: said and said["models"] == ["llama3.2:latest"]) == {
        "status": "running", "ip": "127.0.0.1", "port": here.port, "models": ["llama3.2:latest"]}
    assert here.post("/models/unload", {"model": "llama3.2"})[1]["status"] == "unloaded"
    link = http.client.HTTPConnection(here.control.host, here.control.port, timeout=30)
    link.request("GET", "/events?since=0", headers={"Authorization": "Bearer " + here.control.token})
    told = link.getresponse()
    seen = []
    while ("pull", "success") not in seen or ("inference", "running") not in seen:
        kind = told.readline().decode().partition("event: ")[2].strip()
        if kind:
            seen.append((kind, json.loads(told.readline().decode().partition("data: ")[2]).get("status")))
    told.close()
    link.close()
    assert seen.index(("pull", "running")) < seen.index(("pull", "success"))
    status, answer = here.post("/inference/stop")
    assert (status, answer["status"]) == (200, "stopped")
    assert engine_processes(here.home) == {} and not here.engine_listens()
    assert here.get("/inference/status")["engine"] is None


def test_start_pull_and_stop_by_the_command_line(world):
    here = world("ollama").start()
    done = here.cli("start")
    assert done.code == 0 and "running" in done.out and str(here.port) in done.out, done
    done = here.cli("pull", "llama3.2:1b")
    assert done.code == 0 and "llama3.2:1b is here" in done.out, done
    assert json.loads(here.cli("models", "--json").out)["models"][0]["name"] == "llama3.2:1b"
    assert "llama3.2:1b" in here.cli("models").out
    assert here.cli("models", "load", "llama3.2:1b").code == 0
    assert here.cli("models", "verify").out.strip() == "llama3.2:1b: as it was"
    assert "free: fits" in here.cli("models", "fit", "llama3.2:1b").out
    refused = here.cli("models", "delete", "llama3.2:1b")
    assert refused.code == 2 and "--yes" in refused.err, refused
    assert here.cli("models", "delete", "llama3.2:1b", "--yes").code == 0
    assert "no models" in here.cli("models").out
    assert here.cli("stop").code == 0 and engine_processes(here.home) == {}
    assert "no engine was running" in here.cli("stop").out


def test_smoke_says_each_step_and_its_time(world):
    here = world("ollama").start()
    done = here.cli("smoke", TEST_MODEL="llama3.2")
    assert done.code == 0, done
    steps = done.out.splitlines()
    assert [line[:5] for line in steps] == ["[%d/6]" % number for number in range(7)]
    assert all("✓" in line and " s" in line for line in steps)
    assert engine_processes(here.home) == {}


def test_smoke_ends_at_the_first_step_that_fails(world):
    here = world("ollama").start()
    done = here.cli("smoke", "--model", "no-such-model")
    assert done.code == 1 and done.out.splitlines()[-1].startswith("[2/6]"), done
    assert "✗" in done.out and "no-such-model" in done.err, done


def test_the_python_client_and_the_official_ones_reach_the_engine(world):
    ollama, openai = pytest.importorskip("ollama"), pytest.importorskip("openai")
    here = world("ollama").start()
    here.post("/inference/start")
    for name in ("llama3.2", "nomic-embed-text"):
        assert here.post("/inference/pull", {"model": name})[0] == 200
    url = here.get("/inference/status")["endpoint"]
    client = b9agent.InferenceClient()
    client.configure("127.0.0.1", here.port, here.token)
    said = client.chat("llama3.2", [{"role": "user", "content": "hello"}])
    assert said.ok and said.content and said.finish_reason == "stop" and said.usage["total_tokens"]
    pieces = list(client.chat("llama3.2", [{"role": "user", "content": "hello"}], stream=True))
    assert "".join(piece.content for piece in pieces) == said.content
    assert pieces[-1].usage == said.usage and all(pieces)
    assert client.generate("llama3.2", "hello").content
    assert len(client.embed("nomic-embed-text", ["a", "b"]).embeddings) == 2
    assert client.embed("nomic-embed-text", "a").embedding
    assert set(client.list_models()) == {"llama3.2:latest", "nomic-embed-text:latest"}
    assert client.health()
    assert client.load_model("llama3.2")
    assert client.unload_model("llama3.2"), "the token of inference.token has admin rights"
    theirs = ollama.Client(host=url, headers={"Authorization": "Bearer " + here.token})
    assert theirs.chat("llama3.2", [{"role": "user", "content": "hello"}]
                       )["message"]["content"] == said.content
    theirs._client.close()
    with openai.OpenAI(base_url=url + "/v1", api_key=here.token, max_retries=0) as official:
        assert official.chat.completions.create(model="llama3.2", messages=[
            {"role": "user", "content": "hello"}]).choices[0].message.content == said.content
    missing = client.chat("nobody", [{"role": "user", "content": "x"}])
    assert not missing.ok and "nobody" in missing.error
    client.configure("127.0.0.1", here.port, here.token, raise_errors=True)
    with pytest.raises(b9agent.InferenceModelMissing):
        client.chat("nobody", [{"role": "user", "content": "x"}])
    client.configure("127.0.0.1", free_port(), raise_errors=True)
    with pytest.raises(b9agent.InferenceUnreachable):
        client.health()


def test_importing_the_client_starts_and_writes_nothing(home, state):
    done = subprocess.run([sys.executable, "-c", "from b9agent import inference; import threading; "
                           "print(threading.active_count(), inference.chat)"],
                          cwd=os.path.dirname(b9agent.__file__), env=environment(home),
                          stdout=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0 and done.stdout.startswith("1 "), done
    assert not state.exists()


def test_a_pull_tells_its_progress_and_two_that_ask_share_one(world):
    here = world("ollama").start(FAKE_OLLAMA_RATE="300000", FAKE_OLLAMA_LAYER_BYTES="400000")
    here.post("/inference/start")
    control = here.control
    links = []
    for _ in range(2):
        link = http.client.HTTPConnection(control.host, control.port, timeout=60)
        link.request("POST", "/inference/pull", json.dumps({"model": "llama3.2", "stream": True}),
                     {"Authorization": "Bearer " + control.token,
                      "Content-Type": "application/json"})
        links.append(link)
    told = []
    for link in links:
        reply = link.getresponse()
        assert reply.getheader("Content-Type") == "application/x-ndjson"
        told.append([json.loads(line) for line in reply.read().splitlines() if line.strip()])
        link.close()
    for lines in told:
        assert lines[-1]["status"] == "success" and lines[0]["status"] == "running"
        done = [line["completed"] for line in lines]
        assert done == sorted(done) and len(set(done)) > 3
        assert any(line["rate_bytes_s"] and line["remaining_s"] is not None for line in lines)
    assert told[0][0]["started"] == told[1][0]["started"]


def test_a_pull_that_is_cut_goes_on_where_it_was(world):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS="pull_cut=2")
    here.post("/inference/start")
    status, answer = here.post("/inference/pull", {"model": "llama3.2"})
    assert status == 200 and answer["completed"] == answer["total"] > 0


@pytest.mark.parametrize("fault, said", [("pull_error", "Ollama"), ("pull_digest", "digest")])
def test_a_pull_that_fails_after_a_200_is_an_error(world, fault, said):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS=fault)
    here.post("/inference/start")
    status, answer = here.post("/inference/pull", {"model": "llama3.2"})
    assert status == 502 and answer["error_code"] == "model_failed" and said in answer["error"]
    done = here.cli("pull", "llama3.2")
    assert done.code == 1 and said in done.err, done


def test_a_pull_can_be_cancelled(world):
    here = world("ollama").start(FAKE_OLLAMA_RATE="20000")
    here.post("/inference/start")
    puller = Program([sys.executable, b9agent.__file__, "pull", "llama3.2", "--json"],
                     environment(here.home, PATH=here.path))
    with puller:
        puller.wait_line('"completed": [1-9]', "out")
        (seen,) = here.get("/inference/status")["transfers"]
        assert seen["model"] == "llama3.2:latest" and 0 < seen["completed"] < seen["total"]
        assert here.post("/inference/cancel", {"model": "llama3.2"})[0] == 200
        assert puller.wait() == 1
    assert here.get("/inference/status")["transfers"] == []
    assert here.post("/inference/cancel", {"model": "llama3.2"})[0] == 404


def test_an_ollama_that_is_here_is_used_and_never_ended(world):
    here, port = world("ollama"), free_port()
    env = environment(here.home, PATH=here.path, OLLAMA_HOST="127.0.0.1:%d" % port)
    with Program([here.path.split(":")[0] + "/ollama", "serve"], env) as theirs:
        wait_until(lambda: listens(port), "their Ollama listens")
        here.start(OLLAMA_HOST="0.0.0.0:%d" % port)
        status, answer = here.post("/inference/start")
        assert status == 200 and answer["adopted"] and answer["pid"] is None
        assert answer["engine_endpoint"] == "http://127.0.0.1:%d" % port
        assert answer["endpoint"] == "http://127.0.0.1:%d" % here.port
        assert here.post("/inference/pull", {"model": "llama3.2"})[0] == 200
        assert here.post("/models/load", {"model": "llama3.2"})[0] == 200
        status, answer = here.post("/inference/stop")
        assert status == 200 and "runs on" in answer["message"]
        assert theirs.process.poll() is None and listens(port)
        here.post("/inference/start")
        here.program.stop()
        assert theirs.process.poll() is None


# -- what can go wrong ------------------------------------------------------

def test_a_missing_engine_is_an_error_that_names_its_installer(world):
    here = world()
    here.path = "/usr/bin:/bin"
    here.start()
    status, answer = here.post("/inference/start", {"engine": "vllm", "model": "org/model"})
    assert status == 409 and answer["error_code"] == "engine_missing"
    assert "pip install vllm" in answer["suggestion"]
    done = here.cli("start", "--engine", "sglang", "--model", "org/model")
    assert done.code == 1 and "SGLang is not installed" in done.err and "pip install" in done.err


def test_a_taken_port_costs_the_front_door_and_names_who_holds_it(world):
    here = world("ollama")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", here.port))
        holder.listen(1)
        here.start()
        here.program.wait_line("error no_front_door what=.*held by .*pid %d" % os.getpid())
        status, answer = here.post("/inference/start")
        assert (status, answer["status"], answer["endpoint"]) == (200, "running", None)
        assert all(
            request.body.get("inference") is None for request in here.hostile.named("keepalive"))
        assert here.get("/status")["front_door"] is None
        here.hostile.wait_count(len(here.hostile.named("keepalive")) + 3, "keepalive", "ok")  # tried again, and said once
    wait_until(lambda: here.get("/status")["front_door"], "the front door, once the port is free")
    wait_until(lambda: here.hostile.named("keepalive")[-1].body.get("inference"), "its place is told of")
    assert sum("error no_front_door" in line for line in here.program.lines()) == 1


def test_the_gateway_is_not_told_of_a_door_that_would_not_let_it_in(world):
    here = world("ollama").start("--inference-gateway-access", "address")
    assert here.post("/inference/start")[1]["endpoint"]
    here.hostile.wait_count(len(here.hostile.named("keepalive")) + 3, "keepalive")
    assert all(request.body.get("inference") is None
               for request in here.hostile.named("keepalive"))


def test_an_engine_that_crashes_at_its_start_is_an_error_with_its_last_words(world):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS="crash_at_start")
    status, answer = here.post("/inference/start")
    assert status == 502 and "exit code 1" in answer["error"], answer
    said = here.get("/inference/status")
    assert said["status"] == "error" and not said["running"] and said["starts"] == 5
    here.last_inference(lambda sent: sent and sent["status"] == "error" and sent["models"] == [])
    done = here.cli("start")
    assert done.code == 1 and "Its log:" in done.err, done


def test_an_engine_that_is_killed_comes_back(world):
    here = world("ollama").start()
    here.post("/inference/start")
    first = here.pid()
    os.kill(first, signal.SIGKILL)
    second = wait_until(lambda: here.pid() not in (None, first) and here.get(
        "/inference/status")["running"] and here.pid(), "another one runs")
    assert second != first and here.get("/inference/status")["starts"] == 2
    here.last_inference(lambda sent: sent and sent["status"] == "running")
    assert here.post("/inference/stop")[0] == 200 and engine_processes(here.home) == {}


def test_a_runner_that_is_killed_costs_a_request_and_no_more(world):
    here = world("ollama").start()
    here.post("/inference/start")
    here.post("/inference/pull", {"model": "llama3.2"})
    here.post("/models/load", {"model": "llama3.2"})
    runner = next(pid for pid in engine_processes(here.home) if pid != here.pid())
    os.kill(runner, signal.SIGKILL)
    wait_until(lambda: here.post("/models/load", {"model": "llama3.2"})[0] == 200, "it loads again")
    assert here.post("/inference/stop")[0] == 200 and engine_processes(here.home) == {}


@pytest.mark.parametrize("fault", ["ignore_sigterm", "orphan_runner"])
def test_an_engine_that_will_not_go_is_gone(world, fault):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS=fault)
    here.post("/inference/start")
    here.post("/inference/pull", {"model": "llama3.2"})
    here.post("/models/load", {"model": "llama3.2"})
    assert len(engine_processes(here.home)) == 2
    assert here.post("/inference/stop")[0] == 200
    assert engine_processes(here.home) == {} and not here.engine_listens()


def test_what_a_killed_agent_leaves_is_ended_by_the_next(world):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS="orphan_runner")
    here.post("/inference/start")
    here.post("/inference/pull", {"model": "llama3.2"})
    here.post("/models/load", {"model": "llama3.2"})
    here.program.signal(signal.SIGKILL)
    here.program.wait()
    left = engine_processes(here.home)
    assert len(left) == 2
    here.start()
    assert engine_processes(here.home) == {} and not here.engine_listens()
    assert here.get("/inference/status")["status"] == "stopped"


def test_an_agent_that_is_told_to_stop_takes_its_engine_with_it(world):
    here = world("ollama").start("--inference-autostart=true")
    wait_until(lambda: here.get("/inference/status")["running"], "it started by itself")
    assert here.program.stop() == 0
    assert processes_of(here.home) == {} and not here.engine_listens()


def test_a_second_engine_waits_for_the_first_to_stop(world):
    here = world("ollama", "vllm").start()
    here.post("/inference/start", {"engine": "ollama"})
    assert here.post("/inference/start", {"engine": "ollama"})[0] == 200
    status, answer = here.post("/inference/start", {"engine": "vllm", "model": "org/model"})
    assert status == 409 and "One engine runs at a time" in answer["suggestion"]


def test_a_start_can_be_stopped(world):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS="slow_start=600")
    starter = Program([sys.executable, b9agent.__file__, "start"],
                      environment(here.home, PATH=here.path))
    with starter:
        wait_until(lambda: here.get("/inference/status")["status"] == "starting", "it starts")
        assert here.post("/inference/stop")[0] == 200
        assert starter.wait() == 1
    assert engine_processes(here.home) == {}


def test_keepalives_go_on_while_an_engine_starts_slowly(world):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS="hang_http=0")
    starter = Program([sys.executable, b9agent.__file__, "start"],
                      environment(here.home, PATH=here.path))
    with starter:
        wait_until(lambda: here.get("/inference/status")["status"] == "starting", "it starts")
        before = len(here.hostile.named("keepalive"))
        here.hostile.wait_count(before + 3, "keepalive")
        assert here.last_inference(lambda sent: sent)["status"] == "starting"
        here.post("/inference/stop")
        starter.wait()


# -- what the gateway is told ------------------------------------------------

def test_the_gateways_router_hears_of_a_running_engine(world):
    here = world("ollama")
    here.hostile.has_router = True
    here.start()
    here.post("/inference/start")
    beat = here.hostile.wait_count(1, "heartbeat", "ok")
    assert beat.body == {"models": {}}


def test_an_engine_on_loopback_is_not_offered_to_a_gateway_elsewhere():
    assert b9agent.reachable_host("127.0.0.1", "10.0.0.1", "10.0.0.9") is None
    assert b9agent.reachable_host("100.64.0.9", "10.0.0.1", "10.0.0.9") == "100.64.0.9"
    assert b9agent.reachable_host("::", "gw", "10.0.0.9") == "10.0.0.9"
    assert b9agent.reachable_host("127.0.0.1", "localhost", "10.0.0.9") == "127.0.0.1"


# -- which engine -------------------------------------------------------------

def reference(form):
    return b9agent.Reference("m", form)


@pytest.mark.parametrize("form, vendor, engine", [
    ("safetensors", "nvidia", "vllm"), ("safetensors", "amd", "vllm"), ("hub", "nvidia", "vllm"),
    ("mlx", "apple", "mlx"), ("safetensors", "apple", "mlx"), ("hub", "apple", "mlx"),
    ("gguf", "nvidia", "llama-server"), ("gguf", "", "llama-server"), ("name", "", "ollama"),
    ("name", "apple", "ollama"), ("", "", "ollama"), ("hub", "", "ollama")])
def test_the_engine_follows_from_the_files_and_the_hardware(form, vendor, engine):
    choice = b9agent.choose_engine("auto", reference(form), vendor, lambda row: "/bin/" + row.program)
    assert choice.engine.name == engine and choice.program and choice.why


def test_what_is_not_installed_is_passed_over_and_what_nothing_runs_is_told():
    only = lambda name: lambda row: "/bin/x" if row.name == name else None
    assert b9agent.choose_engine("", reference("safetensors"), "nvidia",
                                 only("sglang")).engine.name == "sglang"
    assert b9agent.choose_engine("", reference("gguf"), "", only("ollama")).engine.name == "ollama"
    with pytest.raises(b9agent.EngineMissing, match="vLLM or SGLang, and none is installed"):
        b9agent.choose_engine("", reference("safetensors"), "nvidia", only("ollama"))
    with pytest.raises(b9agent.EngineMissing, match="no engine runs a safetensors folder"):
        b9agent.choose_engine("", reference("safetensors"), "", only("ollama"))
    with pytest.raises(b9agent.UsageError, match="vLLM does not load a GGUF file"):
        b9agent.choose_engine("vllm", reference("gguf"), "nvidia", only("vllm"))
    with pytest.raises(b9agent.UsageError, match="starts with a model"):
        b9agent.choose_engine("vllm", reference(""), "nvidia", only("vllm"))
    assert b9agent.choose_engine("", reference(""), "", only("none"), ("ollama",)).program is None


def test_every_command_binds_where_it_is_told_and_names_its_model():
    launch = b9agent.Launch("/bin/x", "/models/m", "m", "127.0.0.1", 4711, 4096, 2, 1, "/tmp")
    for row in b9agent.ENGINES:
        if row.name == "ollama":
            assert row.command(launch) == ["/bin/x", "serve"]
            said = row.environment(launch)
            assert said["OLLAMA_HOST"] == "127.0.0.1:4711" and said["OLLAMA_NO_CLOUD"] == "1"
            assert said["OLLAMA_CONTEXT_LENGTH"] == "4096"
            continue
        words = row.command(launch)
        assert words[words.index("--host") + 1] == "127.0.0.1"
        assert words[words.index("--port") + 1] == "4711" and "/models/m" in words


class Counts:
    """An engine's GET /metrics, with what `text` holds."""

    def __init__(self):
        self.status, self.text = 200, ""

    def __enter__(self):
        counts = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                body = counts.text.encode()
                self.send_response(counts.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass
        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return b9agent.Endpoint("http", "127.0.0.1", self.server.server_port)

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def test_the_load_of_an_engine_comes_from_its_own_counters():
    vllm, counts = b9agent.ENGINE_BY_NAME["vllm"], Counts()
    counts.text = ('# HELP vllm:generation_tokens_total made\n'
                   'vllm:generation_tokens_total{engine="0",model_name="a b"} 100.0\n'
                   'vllm:request_success_total{finished_reason="stop"} 3\n'
                   'vllm:request_success_total{finished_reason="length"} 1.0\n'
                   'vllm:num_requests_waiting{engine="0"} 2.0\nvllm:num_requests_waiting_x 9\n')
    with counts as place:
        first = b9agent.read_engine_load(vllm, place, None)
        assert first[1:] == (4.0, 100.0, 2.0, None, None)
        counts.text = counts.text.replace("100.0", "1.5e2").replace(" 3\n", " 13\n")
        then = first._replace(at_s=first.at_s - 10)
        second = b9agent.read_engine_load(vllm, place, then)
        assert abs(second.tokens_per_s - 5.0) < 1 and abs(second.requests_per_s - 1.0) < 0.2
        counts.text = "vllm:generation_tokens_total 7\n"
        assert b9agent.read_engine_load(vllm, place, second)[1:] == (None, 7.0, None, None, None)
        counts.text = "vllm:generation_tokens_total NaN\nvllm:num_requests_waiting 1e999\n\x00{} {"
        assert b9agent.read_engine_load(vllm, place, second).tokens is None
        counts.text = "vllm:num_requests_waiting -1e999\nvllm:generation_tokens_total -9e99\n"
        assert b9agent.read_engine_load(vllm, place, second)[2:4] == (0.0, 0.0)  # as integers in JSON
        counts.text, began = "\n" * 1000000, time.process_time()
        assert b9agent.read_engine_load(vllm, place, second)[1:4] == (None, None, None)
        assert time.process_time() - began < 0.2  # the agent's other threads wait meanwhile
        ollama = b9agent.read_engine_load(b9agent.ENGINE_BY_NAME["ollama"], place, None)
        assert ollama[1:] == (None,) * 5
    gone = b9agent.read_engine_load(vllm, place, second)
    assert gone[1:] == (None,) * 5


# -- the other engines' stand-ins, and real engines -----------------------------

@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_vllm_and_sglang_start_give_a_token_and_leave_nothing(world, name, tmp_path):
    here = world(name).start()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\1" * 8)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    status, answer = here.post("/inference/start", {"engine": name, "model": str(folder)})
    assert (status, answer.get("models")) == (200, ["tiny-model"]), answer
    client = b9agent.InferenceClient()
    client.configure("127.0.0.1", here.port, here.token)
    assert client.chat("tiny-model", [{"role": "user", "content": "hello"}]).content
    status, answer = here.post("/inference/pull", {"model": "llama3.2"})
    assert status == 409 and "serves tiny-model alone" in answer["error"]
    assert here.post("/inference/stop")[0] == 200
    assert engine_processes(here.home) == {} and not here.engine_listens()


REAL = {"llama-server": (engines.llama_server, engines.tiny_gguf),
        "mlx": (engines.mlx_server, engines.tiny_mlx),
        "vllm": (engines.vllm, engines.tiny_safetensors)}  # skips without B9TESTS_VLLM=1


@pytest.mark.parametrize("name", ["llama-server", "mlx", pytest.param(
    "vllm", marks=pytest.mark.timeout(1500))])  # it takes minutes, twice
def test_a_real_engine_starts_gives_a_token_and_is_gone(real_world, name):
    openai = pytest.importorskip("openai")
    find_program, find_model = REAL[name]
    program, model = find_program(), find_model()
    here = real_world(os.path.dirname(program)).start(VLLM_CPU_KVCACHE_SPACE="1")
    limit_s = 500 if name == "vllm" else 120
    done = here.cli("start", "--engine", name, "--model", model, within_s=limit_s)
    assert done.code == 0 and "running" in done.out, done
    status = here.get("/inference/status")
    (served,) = status["models"]
    client = b9agent.InferenceClient()
    client.configure("127.0.0.1", here.port, here.token, raise_errors=True)
    said = client.chat(served, [{"role": "user", "content": "hello"}], max_tokens=8)
    assert said.usage["completion_tokens"] >= 1 and said.finish_reason in ("length", "stop")
    assert any(client.chat(served, [{"role": "user", "content": "hello"}], max_tokens=8, stream=True))
    with openai.OpenAI(base_url=status["endpoint"] + "/v1", api_key=here.token,
                       max_retries=0) as official:
        assert official.chat.completions.create(model=served, max_tokens=4, messages=[
            {"role": "user", "content": "hello"}]).usage.completion_tokens >= 1
    if any(b9agent.ENGINE_BY_NAME[name].counts):
        place = b9agent.Endpoint("http", "127.0.0.1",
                                 int(status["engine_endpoint"].rpartition(":")[2]))
        assert b9agent.read_engine_load(b9agent.ENGINE_BY_NAME[name], place, None).tokens >= 8
        said = wait_until(lambda: here.get("/inference/status")["tokens_per_second"] is not None
                          and here.get("/inference/status"), "two looks at its load", 60)
        assert said["tokens_per_second"] >= 0 and said["queue"] == 0
    wait_until(lambda: here.get("/models")["models"][0].get("files"), "its files are hashed")
    (row,) = here.get("/models")["models"]
    assert row["loaded"] and all(len(kept["sha256"]) == 64 for kept in row["files"])
    assert here.cli("models", "verify").code == 0
    first = status["pid"]
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: here.get("/inference/status")["running"] and here.pid() != first,
               "it came back", limit_s)
    assert here.cli("smoke", "--model", served, within_s=limit_s).code == 0
    assert engine_processes(here.home) == {} and not here.engine_listens()


def test_a_real_ollama_imports_loads_verifies_and_forgets_a_model(real_world):
    program, model = engines.ollama(), engines.tiny_gguf()
    here = real_world(os.path.dirname(program)).start()
    done = here.cli("start", "--engine", "ollama", within_s=120)
    assert done.code == 0 and "running" in done.out, done
    done = here.cli("models", "import", model, "--name", "tiny", within_s=120)
    assert done.code == 0 and "tiny:latest is here" in done.out, done
    assert here.cli("models", "load", "tiny", within_s=120).code == 0
    (row,) = here.get("/models")["models"]
    assert row["loaded"] and row["name"] == "tiny:latest" and row["manifest_digest"] and row["layers"]
    client = b9agent.InferenceClient()
    client.configure("127.0.0.1", here.port, here.token, raise_errors=True)
    assert client.generate("tiny", "hello", max_tokens=4).usage["completion_tokens"] >= 1
    status = here.get("/inference/status")
    theirs = pytest.importorskip("ollama").Client(
        host=status["endpoint"], headers={"Authorization": "Bearer " + here.token})
    assert theirs.generate("tiny", "hello", options={"num_predict": 4})["eval_count"] >= 1
    theirs._client.close()
    with pytest.importorskip("openai").OpenAI(base_url=status["endpoint"] + "/v1", api_key=here.token,
                                              max_retries=0) as official:
        assert official.completions.create(model="tiny", prompt="hello", max_tokens=4).usage
    runner = next(pid for pid in engine_processes(here.home) if pid != status["pid"])
    os.kill(runner, signal.SIGKILL)
    wait_until(lambda: here.post("/models/load", {"model": "tiny"})[0] == 200, "it loads again")
    os.kill(status["pid"], signal.SIGKILL)  # and its new runner is an orphan
    wait_until(lambda: here.get("/inference/status")["running"] and here.pid() != status["pid"],
               "it came back")
    assert len(engine_processes(here.home)) == 1
    assert here.cli("models", "verify", "tiny").code == 0
    assert here.cli("models", "load", "tiny", within_s=120).code == 0
    assert here.cli("models", "unload", "tiny").code == 0
    (row,) = here.get("/models")["models"]
    assert not row["loaded"] and row["source"] == model
    again = here.cli("models", "import", model, "--name", "tiny")
    assert again.code == 1 and "there is a model tiny:latest already" in again.err, again
    assert here.cli("start", "--engine", "ollama", "--model", model, within_s=120).code == 0
    other = here.cli("start", "--model", model)
    assert other.code == 1 and "One engine runs at a time" in other.err, other
    assert here.cli("smoke", "--model", "tiny", within_s=120).code == 0
    assert engine_processes(here.home) == {} and not here.engine_listens()


def test_secrets_of_the_agent_are_not_in_an_engines_environment_or_command(world):
    here = world("ollama").start()
    here.post("/inference/start")
    with open("/proc/%d/environ" % here.pid(), "rb") as handle:
        environ = handle.read().decode()
    assert TOKEN not in environ and here.control.token not in environ
    assert "B9AGENT_CHILD=" in environ
    log = here.get("/inference/status")["log"]
    assert stat.S_IMODE(os.stat(log).st_mode) == 0o600
    assert log.endswith("-%d.log" % here.pid())
