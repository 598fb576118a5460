"""Section 9d: models that are loaded once for all who want them, engines that sleep while nobody does,
room on a GPU, and what is told of it."""
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

import b9agent
import engines
from helpers import PATIENCE_S, Program, environment, wait_until
from test_inference import engine_processes, free_port, listens, nothing_left, processes_of
from test_inference_hostile import DOOR, Liar, together

__all__ = ["nothing_left"]
MIB, GIB = 1 << 20, 1 << 30


class Machine:
    """An Inference without an agent, with stand-ins on PATH.  gpus: the free bytes of each."""

    def __init__(self, folder, **flags):
        folder.chmod(0o700)
        settings = b9agent.load_settings(dict(flags, state_dir=str(folder)), {}).settings
        self.gpus, self.beats, self.state_dir = (), [], str(folder)
        log = b9agent.Log(stream=io.StringIO(), minimum="debug")
        self.log = log
        self.one = b9agent.Inference(settings, log, lambda: b9agent.Hardware(
            "nvidia" if self.gpus else "", self.gpus, None), self.beats.append, lambda: None)
        self.one.place = DOOR

    def told(self, **wanted):
        """The events of kind "inference" that say a state, one after the other."""
        rows = [json.loads(text) for _, (kind, text) in self.log.events.after(0)
                if kind == "inference"]
        return [row for row in rows if "state" in row and wanted.items() <= row.items()]

    def lines(self, event):
        rows = [json.loads(line) for _, line in self.log.kept.after(0)]
        return [row for row in rows if row["event"] == event]

    def pulled(self, *names):
        for name in names:
            transfer = self.one.pull(name)
            for _ in transfer.watch(PATIENCE_S):
                pass
            assert transfer.progress.state == "success", transfer.error
        return self

    def loads(self):
        """How often the engines have loaded a model, as their own logs say it."""
        folder, count = os.path.join(self.state_dir, "logs"), 0
        for name in os.listdir(folder):
            with open(os.path.join(folder, name)) as handle:
                count += handle.read().count("starting llama-server")
        return count

    def down(self):
        assert self.one.doze(), self.one.status()
        self.one.sleep()
        return self

    def a_token(self, model):
        """As the front door would get it."""
        target = self.one.target()
        if target.engine.many:
            return b9agent.OllamaApi(target.endpoint).generate_token(model)
        return b9agent.generate_one_token(target.endpoint, model, PATIENCE_S) is None


@pytest.fixture
def machine(tmp_path, home, monkeypatch, nothing_left):
    """machine(**flags): with its engines' home at `home`; all end with the test."""
    made = []
    folder = engines.stand_in(tmp_path / "bin", "ollama", "vllm")
    monkeypatch.setenv("PATH", engines.path_with(folder))
    monkeypatch.setenv("HOME", str(home))

    def make(**flags):
        (tmp_path / "state").mkdir(exist_ok=True)
        made.append(Machine(tmp_path / "state", **flags))
        return made[-1]
    yield make
    for each in made:
        each.one.close()
    assert engine_processes(home) == {}


@pytest.fixture
def weights(tmp_path):
    """A folder that the stand-in of vLLM takes for a model."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
        "max_position_embeddings": 512}))
    head = json.dumps({"a": {"dtype": "F16", "shape": [8], "data_offsets": [0, 16]}}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(16))
    return str(folder)


# -- what is set -----------------------------------------------------------

def test_what_is_set_for_a_model_goes_before_what_is_set_for_all(tmp_path):
    def kept(model, **flags):
        return b9agent.keep_warm_of(b9agent.load_settings(
            dict(flags, state_dir=str(tmp_path)), {}).settings, model)
    models = "llama3.2=30,hf.co/Org/Big:Q4_K_M=auto,/models/a.gguf=7"
    assert kept("llama3.2") is None
    assert kept("llama3.2", inference_keep_warm="600") == 600.0
    assert kept("any", inference_keep_warm="auto") == "auto"
    assert kept("llama3.2:latest", inference_keep_warm_models=models) == 30.0
    assert kept("hf.co/org/big:q4_k_m", inference_keep_warm_models=models) == "auto"
    assert kept("/models/a.gguf", inference_keep_warm_models=models) == 7.0
    assert kept("other", inference_keep_warm="5", inference_keep_warm_models=models) == 5.0


# -- once for all ------------------------------------------------------------

def test_thirty_who_want_one_model_have_it_loaded_once(machine, monkeypatch):
    monkeypatch.setenv("FAKE_OLLAMA_LOAD_S", "0.6")
    here = machine()
    here.one.start("ollama", "")
    here.pulled("llama3.2")
    key = "llama3.2:latest"
    seen = []
    watch = threading.Thread(target=lambda: seen.append(wait_until(
        lambda: here.one.status()["loads"], "a load is shown")))
    watch.start()
    took = together(*[lambda: here.one.wake(key)] * 30)
    watch.join()
    assert here.loads() == 1 and len(set(took)) == 1 and took[0] >= 0.6
    assert seen[0][0]["model"] == key and seen[0][0]["why"] == "request"
    assert here.one.wake(key) == 0.0 and here.loads() == 1
    assert here.one.target().loaded == (key,) and here.one.status()["loads"] == []
    assert [row["state"] for row in here.told(model=key)] == ["loading", "loaded"]
    (line,) = here.lines("model_loaded")
    assert line["model"] == key and line["why"] == "request" and line["seconds"] >= 0.6
    assert here.a_token(key) and here.loads() == 1


def test_whether_a_model_is_in_memory_is_asked_of_the_engine(machine):
    here = machine()
    here.one.start("ollama", "")
    here.pulled("llama3.2")
    key = "llama3.2:latest"
    here.one.wake(key)
    api = b9agent.OllamaApi(here.one.target().endpoint)
    assert here.one.holds(key)
    api.unload(key, PATIENCE_S)  # by somebody else
    assert here.one.target().loaded == (key,), "nobody has looked"
    assert not here.one.holds(key) and here.one.target().loaded == ()
    assert api.generate_token(key)
    assert here.one.wake(key) == 0.0 and here.one.target().loaded == (key,)


def test_a_sleeping_engine_is_started_once_for_all_who_wake_it(machine, weights, monkeypatch):
    monkeypatch.setenv("FAKE_ENGINE_LOAD_S", "0.3")
    here = machine()
    first = here.one.start("vllm", weights)["pid"]
    here.down()
    took = together(*[lambda: here.one.wake("tiny")] * 30)
    assert len(set(took)) == 1 and took[0] > 0.3
    status = here.one.status()
    assert (status["status"], status["starts"]) == ("running", 1) and status["pid"] != first
    assert here.a_token("tiny") and here.one.wake("tiny") == 0.0
    assert [row["state"] for row in here.told()] == ["asleep", "loading", "awake", "loaded"]
    assert here.lines("engine_asleep")[0]["engine"] == "vllm"
    assert here.lines("engine_awake")[0]["seconds"] > 0.3


# -- asleep --------------------------------------------------------------------

def test_an_idle_engine_sleeps_with_nothing_left_and_the_next_one_who_asks_has_an_answer(
        machine, home, monkeypatch):
    monkeypatch.setattr(b9agent, "INFERENCE_CHECK_S", 0.05)
    here = machine()
    here.one.start("ollama", "")
    here.pulled("llama3.2")
    key, port = "llama3.2:latest", here.one.target().endpoint.port
    here.one.wake(key)
    assert len(engine_processes(home)) == 2  # with its runner
    before = here.one.target()
    assert here.one.doze() and here.one.state() == "asleep"
    assert here.one.target() == before._replace(state="asleep", loaded=())
    assert not here.one.doze(), "once"
    here.one.sleep()
    assert engine_processes(home) == {} and not listens(port)
    assert os.listdir(os.path.join(here.state_dir, "children")) == []
    status = here.one.status()
    assert (status["status"], status["running"], status["pid"]) == ("asleep", False, None)
    assert status["models"] == [key] and status["message"] == "Ollama sleeps; a request starts it"
    assert b9agent.inference_lines(status)[0].startswith("inference  asleep")
    assert here.one.wire() == {"status": "running", "ip": "127.0.0.1", "port": 4711, "models": [key]}
    assert here.one.figures().state == "asleep"
    here.beats.clear()
    wait_until(lambda: len(here.beats) > 3, "the gateway goes on hearing of it")
    assert here.beats[-1] == (key,)
    assert here.one.wake(key) > 0 and here.a_token(key)
    assert here.one.target().loaded == (key,) and here.one.target().digests == before.digests


def test_to_the_gateway_it_runs_while_it_wakes_and_not_while_it_starts(machine, weights, monkeypatch):
    monkeypatch.setenv("FAKE_ENGINE_LOAD_S", "0.5")
    monkeypatch.setattr(b9agent, "INFERENCE_CHECK_S", 0.05)
    here = machine()
    start = threading.Thread(target=here.one.start, args=("vllm", weights))
    start.start()
    wait_until(lambda: here.one.state() == "starting", "it starts")
    assert here.one.wire()["status"] == "starting" and here.one.wire()["models"] == []
    start.join()
    here.down()
    wake = threading.Thread(target=here.one.wake, args=("tiny",))
    wake.start()
    wait_until(lambda: here.one.state() == "starting", "it wakes")
    here.beats.clear()
    said = here.one.wire()
    assert (said["status"], said["models"]) == ("running", ["tiny"])
    assert here.one.target().models == ("tiny",)
    wait_until(lambda: here.beats, "and the gateway hears of it")
    wake.join()
    os.kill(here.one.status()["pid"], signal.SIGKILL)
    wait_until(lambda: here.one.state() == "starting", "it is started again after a crash")
    assert here.one.wire()["status"] == "starting", "which is no waking"


def test_who_is_used_is_not_put_to_sleep(machine, monkeypatch, home):
    monkeypatch.setenv("FAKE_OLLAMA_RATE", "100000")
    monkeypatch.setenv("FAKE_OLLAMA_LAYER_BYTES", "30000")
    monkeypatch.setenv("FAKE_OLLAMA_LOAD_S", "0.4")
    monkeypatch.setenv("FAKE_OLLAMA_FAULTS", "slow_start=0.4")
    here = machine()
    assert not here.one.doze()
    tried = {}

    def doze_while(what, call):
        thread = threading.Thread(target=call)
        thread.start()

        def busy():
            return here.one._works or here.one.transfers.any_runs()
        while thread.is_alive():
            said = [busy() and here.one.doze()]
            tried.setdefault(what, []).extend(said if busy() else [])
            time.sleep(0.01)
        thread.join()
    doze_while("start", lambda: here.one.start("ollama", ""))
    doze_while("pull", lambda: here.pulled("llama3.2"))
    doze_while("load", lambda: here.one.load("llama3.2"))
    here.one.unload("llama3.2")
    doze_while("wake", lambda: here.one.wake("llama3.2:latest"))
    assert all(len(said) > 3 and not any(said) for said in tried.values()), tried
    assert sorted(tried) == ["load", "pull", "start", "wake"] and here.one.doze()


def test_an_ollama_of_others_is_never_put_to_sleep(machine, home, monkeypatch):
    port, here = free_port(), machine()
    env = environment(home, PATH=os.environ["PATH"], OLLAMA_HOST="127.0.0.1:%d" % port)
    monkeypatch.setenv("OLLAMA_HOST", env["OLLAMA_HOST"])
    with Program(["ollama", "serve"], env):
        wait_until(lambda: listens(port), "theirs listens")
        assert here.one.start("ollama", "")["adopted"]
        here.pulled("llama3.2")
        assert not here.one.doze() and here.one.state() == "running"
        assert here.one.wake("llama3.2:latest") > 0 and here.one.wake("llama3.2:latest") == 0.0
        here.one.close()


def test_what_an_operator_does_works_from_asleep(machine, home, weights, monkeypatch):
    monkeypatch.setenv("FAKE_OLLAMA_CATALOGUE", "other")
    here = machine()
    here.one.start("ollama", "")
    here.pulled("llama3.2").down()
    assert "sleeps" in here.one.models()["message"]
    assert [row["name"] for row in here.one.models()["models"]] == ["llama3.2:latest"]
    assert here.one.unload("llama3.2")["status"] == "unloaded" and here.one.state() == "asleep"
    with pytest.raises(b9agent.EngineConflict, match="Ollama is asleep with"):
        here.one.start("vllm", weights)
    here.pulled("other")
    assert here.one.state() == "running"
    assert here.down().one.load("llama3.2")["status"] == "loaded"
    assert here.down().one.start()["running"], "the same, by its own start"
    assert here.down().one.delete("other")["status"] == "deleted"
    here.down()
    here.one.stop()
    assert (here.one.state(), here.one.wire()["status"]) == ("stopped", "stopped")
    with pytest.raises(b9agent.EngineConflict, match="no engine runs"):
        here.one.wake("llama3.2:latest")
    assert here.one.state() == "stopped" and engine_processes(home) == {}, "stopped for good"
    here.one.start("vllm", weights)
    with pytest.raises(b9agent.EngineConflict, match="as long as its engine runs"):
        here.one.unload("tiny")
    assert here.down().one.unload("tiny")["status"] == "unloaded" and here.one.state() == "asleep"
    assert here.one.load("tiny")["status"] == "loaded" and here.one.state() == "running"


def deaf(monkeypatch):
    """Ollamas that have to be killed, after half a second."""
    monkeypatch.setenv("FAKE_OLLAMA_FAULTS", "ignore_sigterm")
    monkeypatch.setattr(b9agent, "ENGINE_BY_NAME", dict(
        b9agent.ENGINE_BY_NAME, ollama=b9agent.ENGINE_BY_NAME["ollama"]._replace(stop_grace_s=0.5)))


# -- what goes wrong ---------------------------------------------------------------

def test_a_wake_during_a_sleep_waits_for_its_end(machine, home, monkeypatch):
    deaf(monkeypatch)
    here = machine()
    first = here.one.start("ollama", "")["pid"]
    here.pulled("llama3.2")
    assert here.one.doze()
    sleeping = threading.Thread(target=here.one.sleep)
    sleeping.start()
    assert here.one.wake("llama3.2:latest") > 0
    sleeping.join()
    said = [(row["state"], row.get("pid")) for row in here.lines("child")]
    second = here.one.status()["pid"]
    assert said.index(("stopped", None)) < said.index(("starting", second)), "it had to wait"
    assert here.one.state() == "running" and first not in engine_processes(home)
    here.one.sleep()  # one that comes late ends nothing
    assert here.one.state() == "running" and here.a_token("llama3.2")


def test_a_stop_during_a_wake_is_the_end_of_it(machine, home, weights, monkeypatch):
    here = machine()
    here.one.start("vllm", weights)
    here.down()
    monkeypatch.setenv("FAKE_ENGINE_LOAD_S", "20")
    failed = []

    def wake():
        try:
            here.one.wake("tiny")
        except b9agent.EngineError as error:
            failed.append(error)
    threads = [threading.Thread(target=wake) for _ in range(5)]
    for thread in threads:
        thread.start()
    wait_until(lambda: here.one.status()["pid"], "it starts")
    here.one.stop()
    for thread in threads:
        thread.join()
    assert len(failed) == 5 and {str(error) for error in failed} == {
        "it was stopped while it was loaded"}
    assert here.one.state() == "stopped" and engine_processes(home) == {}
    assert here.told()[-1]["state"] == "failed" and here.one.status()["loads"] == []


def test_a_model_that_is_not_there_in_time_says_what_to_raise(machine, monkeypatch):
    monkeypatch.setenv("FAKE_OLLAMA_LOAD_S", "30")
    here = machine(inference_load_limit="1")
    here.one.start("ollama", "")
    here.pulled("llama3.2")
    with pytest.raises(b9agent.LoadTooLong) as failed:
        here.one.wake("llama3.2:latest")
    assert "was not in memory after 1 s" in failed.value.what
    assert "Raise inference.load_limit, which is 1 s" in failed.value.hint
    assert here.one.state() == "running" and here.one.target().loaded == ()
    assert here.told()[-1]["state"] == "failed" and here.lines("load_failed")


def test_an_engine_that_wakes_too_slowly_goes_on_and_is_there_for_the_next_one(
        machine, weights, monkeypatch):
    monkeypatch.setattr(b9agent, "INFERENCE_CHECK_S", 0.05)
    here = machine(inference_load_limit="1")
    here.one.start("vllm", weights)
    here.down()
    monkeypatch.setenv("FAKE_ENGINE_LOAD_S", "1.5")
    with pytest.raises(b9agent.LoadTooLong, match="is still starting"):
        here.one.wake("tiny")
    assert here.one.state() == "starting" and here.one.wire()["status"] == "running"
    wait_until(lambda: here.told(state="awake"), "it is there")
    assert here.one.wake("tiny") == 0.0 and here.one.state() == "running"


def test_a_model_that_is_not_here_is_said_to_be_missing(machine, weights):
    here = machine()
    here.one.start("ollama", "")
    for name in ("nobody:latest", "not a name", "m:cloud"):
        with pytest.raises(b9agent.EngineError, match="404|invalid model name|ollama.com"):
            here.one.wake(name)
    assert here.one.state() == "running" and here.one.status()["loads"] == []
    here.one.stop()
    here.one.start("vllm", weights)
    here.down()
    with pytest.raises(b9agent.ModelMissing, match="serves tiny alone"):
        here.one.wake("llama3.2")
    assert here.one.state() == "asleep", "nothing was started for it"


def test_an_engine_that_crashes_while_it_wakes_says_so_and_a_start_mends_it(
        machine, weights, monkeypatch):
    pace = b9agent.Pace(0.01, 0.02, 2)
    child = b9agent.Child
    monkeypatch.setattr(b9agent, "Child", lambda *values: child(*values, pace=pace))
    here = machine()
    here.one.start("vllm", weights)
    here.down()
    monkeypatch.setenv("FAKE_ENGINE_FAULTS", "crash_while_loading")
    with pytest.raises(b9agent.EngineError, match="did not start"):
        here.one.wake("tiny")
    assert here.one.state() == "error" and here.one.wire()["status"] == "error"
    assert not here.one.doze()
    with pytest.raises(b9agent.EngineError):
        here.one.wake("tiny")
    monkeypatch.delenv("FAKE_ENGINE_FAULTS")
    assert here.one.start("vllm", weights)["running"] and here.one.wake("tiny") == 0.0


def test_a_model_that_fails_to_load_leaves_the_engine_as_it_is(machine, monkeypatch):
    monkeypatch.setenv("FAKE_OLLAMA_FAULTS", "load_fail")
    here = machine()
    here.one.start("ollama", "")
    here.pulled("llama3.2")
    with pytest.raises(b9agent.ModelError, match="500"):
        here.one.wake("llama3.2:latest")
    assert here.one.state() == "running" and here.one.doze()


@pytest.mark.parametrize("when", ["before", "during"])
def test_an_engine_that_is_killed_while_it_goes_to_sleep_sleeps(when, machine, home, monkeypatch):
    deaf(monkeypatch)
    here = machine()
    pid = here.one.start("ollama", "")["pid"]
    here.pulled("llama3.2")
    here.one.wake("llama3.2:latest")
    assert here.one.doze()
    if when == "during":
        sleeping = threading.Thread(target=here.one.sleep)
        sleeping.start()
    os.kill(pid, signal.SIGKILL)
    if when == "during":
        sleeping.join()
    here.one.sleep()
    assert here.one.state() == "asleep" and engine_processes(home) == {}
    assert here.one.wake("llama3.2:latest") > 0 and here.a_token("llama3.2")


SLEEPER = """
import os, sys, b9agent
settings = b9agent.load_settings({"state_dir": sys.argv[1]}, {}).settings
one = b9agent.Inference(settings, b9agent.make_log(settings), lambda: b9agent.Hardware("", (), None),
                        lambda models: None, lambda: None)
one.start("ollama", "")
assert one.doze()
if sys.argv[2] == "whole":
    one.sleep()
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("when, left", [("whole", 0), ("half", 1)])
def test_an_agent_that_is_killed_leaves_no_ghost_of_a_sleeping_engine(when, left, machine, home):
    here = machine()
    done = subprocess.run([sys.executable, "-c", SLEEPER, here.state_dir, when], cwd=os.path.dirname(
        b9agent.__file__), env=environment(home, PATH=os.environ["PATH"]), stderr=subprocess.PIPE)
    assert done.returncode == -9, done
    assert len(processes_of(home)) == left
    assert (b9agent.end_leftovers(here.state_dir, here.log) > 0) == bool(left)
    assert processes_of(home) == {} and here.one.state() == "stopped"


# -- room on the GPU: a scripted Ollama ------------------------------------------------

class Script:
    """An Ollama of others: models {name: bytes}, loaded {name: bytes}, in order; free: of the GPU."""

    def __init__(self, models, free=0, slow_s=0.0):
        self.models, self.loaded, self.free, self._slow_s = models, {}, free, slow_s
        self.asked, self.busy, self.back_s, self.held = [], set(), 0.0, 0

    def gpus(self):
        """Memory comes back a while after a model has gone."""
        return (self.free - sum(self.loaded.values())
                - (self.held if time.monotonic() < self.back_s else 0),)

    def say(self, method, path, body):
        if path == "/":
            return 200, b"Ollama is running"
        if path in ("/api/tags", "/api/ps"):
            rows = self.models if path == "/api/tags" else dict(self.loaded)
            return 200, json.dumps({"models": [
                {"name": name, "size": size, "size_vram": size, "digest": "%064x" % size}
                for name, size in rows.items()]}).encode()
        fields = json.loads(body or b"{}")
        if path == "/api/generate":
            name = b9agent.model_key(fields["model"])
            self.asked.append((name, fields.get("keep_alive")))
            if fields.get("keep_alive") == 0 and not fields.get("prompt"):
                if name not in self.busy:
                    self.held = self.loaded.pop(name, 0)
                    self.back_s = time.monotonic() + self._slow_s
            else:
                self.loaded[name] = self.models[name]
            return 200, b'{"done": true, "response": "a"}'
        return 200, b'{"version": "1"}'


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    made = []

    def make(script, **flags):
        liar = Liar(script.say).__enter__()
        monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:%d" % liar.port)
        here = Machine(tmp_path, **flags)
        made.append((liar, here))
        here.one.start("ollama", "")
        return here
    yield make
    for liar, here in made:
        here.one.close()
        liar.__exit__()


SIZES = {"a:1": 4 * GIB, "b:1": 6 * GIB, "c:1": 8 * GIB, "d:1": 9 * GIB}


def follow_gpu(here, script):
    """hardware() of what the script says."""
    here.one._hardware = lambda: b9agent.Hardware("nvidia", script.gpus(), None)


@pytest.mark.parametrize("free, idle, unloaded", [
    (30, ["a:1", "b:1", "c:1"], []),              # there is room: 30 - 18 = 12 of 10.8 GiB
    (26, ["a:1", "b:1", "c:1"], ["a:1"]),         # 8: the least recently used one goes
    (26, ["b:1", "a:1"], ["b:1"]),
    (20, ["a:1", "b:1", "c:1"], ["a:1", "b:1"]),  # 2
    (10, ["a:1"], ["a:1"]),                       # not enough, and no more are idle
    (26, ["x:1", "d:1", "b:1"], ["b:1"]),         # neither one that is not loaded, nor itself
    (26, [], []),
])
def test_as_many_idle_models_go_as_real_memory_wants(free, idle, unloaded, scripted):
    script = Script(dict(SIZES), free * GIB)
    here = scripted(script)
    script.loaded = {name: SIZES[name] for name in ("a:1", "b:1", "c:1")}
    here.one._refresh(here.one._up)
    follow_gpu(here, script)
    assert here.one.wake("d:1", idle) > 0
    assert [name for name, kept in script.asked if kept == 0] == unloaded
    assert script.asked[-1] == ("d:1", None), "nothing is set: Ollama's own time"
    assert [(row["model"], row["why"]) for row in here.lines("model_unloaded")] == [
        (name, "room for d:1") for name in unloaded]


@pytest.mark.parametrize("took, unloaded", [(12, ["b:1"]), (10, []), (0, [])])
def test_what_it_took_when_it_was_loaded_last_is_better_than_an_estimate(took, unloaded, scripted):
    script = Script(dict(SIZES, **{"e:1": 9 * GIB}), 22 * GIB)  # estimated: 10.8
    here = scripted(script)
    script.loaded = {"e:1": took * GIB}  # with its context; 0 is on the CPU
    here.one._refresh(here.one._up)
    script.loaded = {"b:1": 6 * GIB, "a:1": 4 * GIB, "c:1": GIB}  # 11 free
    follow_gpu(here, script)
    here.one.wake("e:1", ["b:1", "a:1"])
    assert [name for name, kept in script.asked if kept == 0] == unloaded


@pytest.mark.parametrize("gpus", [(), (None,), (GIB, None)])
def test_without_a_gpu_or_its_figures_nothing_is_unloaded(gpus, scripted):
    script = Script(dict(SIZES))
    here = scripted(script)
    script.loaded, here.gpus = {"a:1": 4 * GIB}, gpus
    assert here.one.wake("d:1", ["a:1"]) > 0
    assert [kept for _, kept in script.asked] == [None]


def test_the_memory_of_a_model_is_waited_for_before_the_next_one_goes(scripted, monkeypatch):
    script = Script(dict(SIZES), 26 * GIB, slow_s=0.5)
    here = scripted(script)
    script.loaded = {name: SIZES[name] for name in ("a:1", "b:1", "c:1")}
    here.one._refresh(here.one._up)
    follow_gpu(here, script)
    assert here.one.wake("d:1", ["a:1", "b:1"]) >= 0.5
    assert [name for name, kept in script.asked if kept == 0] == ["a:1"]
    monkeypatch.setattr(b9agent, "MEMORY_BACK_S", 0.2)  # and not for ever
    script._slow_s, script.loaded = 3600.0, {"d:1": 9 * GIB}
    script.free = 10 * GIB
    assert here.one.wake("c:1", ["d:1"]) < 10


def test_one_that_is_used_after_all_stays_and_the_next_one_goes(scripted, monkeypatch):
    monkeypatch.setattr(b9agent, "UNLOAD_LIMIT_S", 0.2)
    script = Script(dict(SIZES), 20 * GIB)
    here = scripted(script)
    script.loaded = {name: SIZES[name] for name in ("a:1", "b:1", "c:1")}
    script.busy = {"a:1"}
    here.one._refresh(here.one._up)
    follow_gpu(here, script)
    here.one.wake("d:1", ["a:1", "c:1"])
    assert set(script.loaded) == {"a:1", "b:1", "d:1"}


@pytest.mark.parametrize("flags, pinned, told", [
    ({}, False, None), ({}, True, -1), ({"inference_keep_warm": "600"}, False, 600),
    ({"inference_keep_warm": "600"}, True, 600), ({"inference_keep_warm": "auto"}, True, None),
    ({"inference_keep_warm": "1"}, False, 5),  # the request itself is still on its way
    ({"inference_keep_warm_models": "a:1=77"}, False, 77)])
def test_a_load_tells_ollama_how_long_the_model_is_kept(flags, pinned, told, scripted):
    script = Script(dict(SIZES))
    here = scripted(script, **flags)
    if pinned:
        here.one.load("a:1")
        script.loaded.clear()
    here.one.wake("a:1")
    assert script.asked[-1] == ("a:1", told)
    here.one.unload("a:1")
    here.one.wake("a:1")
    assert script.asked[-1] == ("a:1", None if pinned and told == -1 else told), "no longer pinned"


def test_a_model_that_ollama_lets_go_is_told(scripted, monkeypatch):
    script = Script(dict(SIZES))
    here = scripted(script)
    here.one.wake("a:1")
    here.one.wake("b:1")
    script.loaded.pop("a:1")
    here.one._refresh(here.one._up)
    here.one._refresh(here.one._up)
    assert [(row["model"], row["why"]) for row in here.told(state="unloaded")] == [
        ("a:1", "the engine let it go")]
    here.one.unload("b:1")
    assert [(row["model"], row["why"]) for row in here.lines("model_unloaded")][1:] == [
        ("b:1", "asked for")]


def test_a_look_that_began_before_a_load_does_not_undo_it(scripted, monkeypatch):
    script = Script(dict(SIZES))
    here, hold, held = scripted(script), threading.Event(), threading.Event()
    loaded = b9agent.OllamaApi.loaded

    def late(api):
        rows = loaded(api)
        if threading.current_thread() is slow:
            held.set()
            hold.wait(PATIENCE_S)
        return rows
    monkeypatch.setattr(b9agent.OllamaApi, "loaded", late)
    slow = threading.Thread(target=lambda: here.one._refresh(here.one._up))
    slow.start()
    held.wait(PATIENCE_S)
    here.one.wake("a:1")
    hold.set()
    slow.join()
    assert here.one.target().loaded == ("a:1",) and not here.told(state="unloaded")


# -- digests ---------------------------------------------------------------------------

def test_each_model_has_the_digest_that_ollama_says(scripted):
    here = scripted(Script(dict(SIZES)))
    assert here.one.target().digests == {name: "sha256:%064x" % size for name, size in SIZES.items()}


def test_a_model_of_files_has_the_digest_of_its_file_once_it_was_hashed(machine, weights):
    here = machine()
    here.one.start("vllm", weights)
    wait_until(lambda: here.one.book.entries()["tiny"].get("files"), "its files are hashed")
    here.one._refresh(here.one._up)
    sums = sorted(row["sha256"] for row in here.one.book.entries()["tiny"]["files"])
    import hashlib
    assert len(sums) == 2 and here.one.target().digests == {
        "tiny": "sha256:" + hashlib.sha256("\n".join(sums).encode()).hexdigest()}
    assert b9agent.files_digest([{"path": "/x", "sha256": "a" * 64}]) == "sha256:" + "a" * 64
    assert b9agent.files_digest(None) is None
    assert [b9agent.tag_digest(text) for text in ("A" * 64, None, 5, "sha256:" + "b" * 64, "")] == [
        None, None, None, "sha256:" + "b" * 64, None]


def test_an_engine_that_cannot_be_ended_is_in_error_and_does_not_sleep(tmp_path):
    here = Machine(tmp_path)
    endpoint = b9agent.Endpoint("http", "127.0.0.1", free_port())

    class Undying:
        snapshot = b9agent.ChildSnapshot(b9agent.ChildState.RUNNING, 7)

        def stop(self):
            self.snapshot = self.snapshot._replace(state=b9agent.ChildState.ERROR)
            return "lives on: x, pid 7"
    one, child = here.one, Undying()
    one._set(b9agent._Up(b9agent.ENGINE_BY_NAME["mlx"], b9agent.read_reference(""), "m", endpoint,
                         child, "", 0.0, 0, 1), ("m",))
    assert one.doze()
    one.sleep()
    assert one.state() == "error" and one.wire() is None and one.target().state == "error"
    assert here.told()[-1]["state"] == "error" and here.lines("engine_error")[0]["left"]
    child.stop = lambda: ""
    child.snapshot = child.snapshot._replace(state=b9agent.ChildState.STOPPED)
    one.stop()
    assert one.state() == "stopped"


# -- random schedules ---------------------------------------------------------------------

class Living:
    """Counts the engines of one schedule that live at once."""

    def __init__(self, seed, say):
        self.lock, self.now, self.most, self.chance = threading.Lock(), 0, 0, random.Random(seed)
        self.say = say

    def count(self, step):
        with self.lock:
            self.now += step
            self.most = max(self.most, self.now)


class ScriptedChild:
    """As a Child, without processes: it starts and ends in a moment, and sometimes fails or dies."""

    def __init__(self, living):
        self.living, self.thread, self.stopping = living, None, False
        self.snapshot = b9agent.ChildSnapshot()

    def _enter(self, state):
        self.snapshot = self.snapshot._replace(state=state)

    def start(self):
        assert self.thread is None
        self._enter(b9agent.ChildState.STARTING)
        with self.living.lock:
            self.plan = [self.living.chance.random() for _ in range(3)]
        self.thread = threading.Thread(target=self._live)
        self.thread.start()

    def _live(self):
        states, (fails, dies, pause) = b9agent.ChildState, self.plan
        self.living.count(1)
        time.sleep(pause * 0.004)
        if fails < 0.1:
            self.living.count(-1)
            self._enter(states.ERROR)
            return
        while not self.stopping:
            self._enter(states.RUNNING)
            time.sleep(0.001)
            if dies < 0.1 and not self.stopping:  # and is started again
                self._enter(states.BACKOFF)
                time.sleep(0.001)
        self._enter(states.STOPPING)
        time.sleep(pause * 0.003)
        self.living.count(-1)
        self._enter(states.STOPPED)

    def stop(self):
        self.stopping = True
        if self.thread:
            self.thread.join()
        self._enter(b9agent.ChildState.STOPPED)
        return ""

    def wait(self, states, limit_s):
        until = time.monotonic() + limit_s
        while self.snapshot.state not in states and time.monotonic() < until:
            time.sleep(0.0005)
        return self.snapshot


def schedule(seed, here, endpoint, engine):
    """One random schedule of four threads; what it came to is checked."""
    living, one, chance = Living(seed, None), here.one, random.Random(seed)
    name = "" if engine.many else "m"
    one._choose = lambda wanted, reference, context, force: b9agent._Up(
        engine, reference, name, endpoint, ScriptedChild(living), "", b9agent.now_s(), 0, 1)
    ops = {"wake": lambda: one.wake("m:latest" if engine.many else "m"), "stop": one.stop,
           "start": lambda: one.start(engine.name, ""), "sleep": one.sleep,
           "doze": lambda: one.doze() and one.sleep(), "half": one.doze,
           "load": lambda: one.load("m")}
    plans = [chance.choices(sorted(ops), [6, 1, 1, 1, 2, 2, 6], k=6) for _ in range(4)]
    plans[0][:0] = ["start"]
    defects = []

    def act(plan):
        for what in plan:
            try:
                ops[what]()
            except b9agent.EngineError:
                pass
            except BaseException as error:
                defects.append((what, repr(error), b9agent.defect_place(error)))
    threads = [threading.Thread(target=act, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    what = "schedule %d: %s" % (seed, plans)
    assert not any(thread.is_alive() for thread in threads), "deadlock in " + what
    assert defects == [], what
    assert living.most <= 1, "two engines in " + what
    one.sleep()  # the front door owes it after a doze()
    assert (one._works, one._loads) == (0, {}), what
    state, lives = one.state(), living.now
    assert lives == {"running": 1, "starting": 1}.get(state, 0), (state, what)
    assert one.target().state == state and (one._up is None) == (state == "stopped"), what
    if state == "asleep":
        try:
            one.wake("m:latest" if engine.many else "m")
            assert one.state() in ("running", "starting"), what
        except b9agent.EngineError:
            assert one.state() in ("error", "starting"), (one.state(), what)
    one.stop()
    assert (one.state(), living.now, one._asleep, one._ending) == ("stopped", 0, False, False), what
    return state


@pytest.mark.parametrize("engine", ["ollama", "mlx"])
def test_no_schedule_of_wakes_and_sleeps_and_stops_ends_in_a_deadlock_two_engines_or_a_lie(
        engine, tmp_path, monkeypatch):
    monkeypatch.setattr(b9agent, "INFERENCE_CHECK_S", 0.003)
    script = Script({"m:latest": MIB})
    said = {"GET": b'{"data": []}', "POST": b'{"choices": [{"text": "a"}]}'}
    say = script.say if engine == "ollama" else lambda method, path, body: (200, said[method])
    with Liar(say) as liar:
        here = Machine(tmp_path)
        endpoint = b9agent.Endpoint("http", "127.0.0.1", liar.port)
        ends = [schedule(seed, here, endpoint, b9agent.ENGINE_BY_NAME[engine])
                for seed in range(120)]
        here.one.close()
        assert len(set(ends)) > 2, "they come to different ends"
        assert here.lines("defect") == []


def test_an_ollama_is_woken_without_a_model(machine):
    """For what asks of models that need not be in memory."""
    here = machine()
    here.one.start("ollama", "")
    here.pulled("llama3.2").down()
    assert here.one.wake("") > 0.0
    assert here.one.state() == "running" and here.one.target().loaded == ()
    assert here.one.wake("") == 0.0
