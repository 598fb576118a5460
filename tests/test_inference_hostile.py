"""Inference under people and programs that do not wait their turn: stops during starts, engines that
come back, lie or say nothing, clients that crowd, servers that break off."""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import b9agent
import engines
from helpers import PATIENCE_S, Program, environment, run_agent, wait_until
from hostile_gateway import TOKEN
from test_inference import (World, engine_processes, free_port, listens, nothing_left, processes_of,
                            real_world, world)

__all__ = ["World", "nothing_left", "real_world", "world", "TOKEN"]


def together(*calls):
    """Their results, in the order of the calls, which run at once."""
    results = [None] * len(calls)

    def run(number, call):
        results[number] = call()
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def command(here, *words):
    return Program([sys.executable, b9agent.__file__, *words], environment(here.home, PATH=here.path))


class Embedded:
    """An Inference without an agent around it; told: the states it was asked to tell of."""

    def __init__(self, folder, **flags):
        folder.chmod(0o700)
        settings = b9agent.load_settings(dict(flags, state_dir=str(folder)), {}).settings
        self.told = []
        self.inference = b9agent.Inference(
            settings, b9agent.make_log(settings), lambda: b9agent.Hardware("", (), None),
            lambda models: None, lambda: self.told.append(self.inference.state()))


def DOOR():
    place = b9agent.Endpoint("http", "127.0.0.1", 4711)
    return b9agent.DoorPlace(place, place)


# -- starts and stops that cross ---------------------------------------------

def test_what_is_asked_while_an_engine_is_being_stopped_waits_for_its_end(world):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS="ignore_sigterm")
    here.post("/inference/start")
    first, answers = here.pid(), []
    stop = threading.Thread(target=lambda: answers.append(here.post("/inference/stop")))
    stop.start()
    wait_until(lambda: "being stopped" in here.get("/inference/status")["message"], "it stops")
    said = here.get("/inference/status")
    assert (said["status"], said["running"], said["pid"], said["models"]) == (
        "stopped", False, first, [])
    again = here.post("/inference/stop")
    assert again[0] == 200 and first not in engine_processes(here.home)
    stop.join()
    assert answers[0][0] == 200 and answers[0][1]["engine"] is None


def test_a_start_during_a_stop_is_a_new_engine_and_not_the_dying_one(world):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS="ignore_sigterm")
    here.post("/inference/start")
    first, answers = here.pid(), []
    stop = threading.Thread(target=lambda: answers.append(here.post("/inference/stop")))
    stop.start()
    wait_until(lambda: "being stopped" in here.get("/inference/status")["message"], "it stops")
    status, answer = here.post("/inference/start")
    assert (status, answer["status"], answer["adopted"]) == (200, "running", False), answer
    assert answer["pid"] not in (None, first)
    stop.join()
    assert answers[0][0] == 200
    assert list(engine_processes(here.home)) == [answer["pid"]]


def test_an_agent_that_ends_during_a_stop_leaves_nothing(world):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS="ignore_sigterm")
    here.post("/inference/start")
    with command(here, "stop") as stopper:
        wait_until(lambda: "being stopped" in here.get("/inference/status")["message"], "it stops")
        assert here.program.stop() == 0
        assert processes_of(here.home).keys() <= {stopper.pid}
        stopper.wait()


def test_an_agent_that_ends_during_a_start_leaves_nothing(world):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS="slow_start=600")
    with command(here, "start") as starter:
        wait_until(lambda: here.get("/inference/status")["status"] == "starting", "it starts")
        assert here.program.stop() == 0
        assert starter.wait() in (1, 5)
    assert processes_of(here.home) == {}


def test_nothing_is_started_once_the_agent_ends(tmp_path):
    inference = Embedded(tmp_path).inference
    inference._find = lambda engine: "/bin/true"
    inference.close()
    with pytest.raises(b9agent.EngineConflict, match="being stopped"):
        inference.start("ollama", "")


def test_starts_and_pulls_at_once_share_one_engine(world):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS="slow_start=0.5")
    answers = together(*[lambda: here.post("/inference/pull", {"model": "llama3.2"})] * 3,
                       *[lambda: here.post("/inference/start")] * 3)
    assert [status for status, _ in answers] == [200] * 6, answers
    assert here.get("/inference/status")["starts"] == 1
    assert len(engine_processes(here.home)) == 1


def test_starts_and_stops_in_a_heap_end_in_one_truth(world):
    here = world("ollama").start()
    calls = [lambda: here.post("/inference/start"), lambda: here.post("/inference/stop")] * 4
    for _ in range(3):
        assert {status for status, _ in together(*calls)} <= {200, 409}
    assert here.post("/inference/stop")[0] == 200
    assert engine_processes(here.home) == {} and not here.engine_listens()


def test_a_stop_while_a_start_still_chooses_its_engine_is_a_stop(tmp_path):
    here, chooses, may_go, said = Embedded(tmp_path), threading.Event(), threading.Event(), []

    def choose(*wanted):
        chooses.set()
        assert may_go.wait(PATIENCE_S)
        return b9agent._Up(b9agent.ENGINE_BY_NAME["ollama"], b9agent.read_reference(""), "",
                           b9agent.Endpoint("http", "127.0.0.1", 1), None, "", 0.0, 0, 1)

    def start():
        try:
            here.inference.start()
        except b9agent.EngineConflict as conflict:
            said.append(conflict.what)
    here.inference._choose = choose
    starter = threading.Thread(target=start)
    starter.start()
    assert chooses.wait(PATIENCE_S)
    assert here.inference.stop()["message"] == "no engine was running"
    may_go.set()
    starter.join(PATIENCE_S)
    assert said == ["it was stopped while it started"] and here.inference.status()["status"] == "stopped"


# -- engines that go, come back, or say nothing --------------------------------

def test_an_ollama_of_others_that_comes_back_is_running_again(world, tmp_path, monkeypatch):
    monkeypatch.setattr(b9agent, "INFERENCE_CHECK_S", 0.05)
    here = world("ollama")
    env = environment(here.home, PATH=here.path, OLLAMA_HOST="127.0.0.1:%d" % here.port)
    words = [here.path.split(":")[0] + "/ollama", "serve"]
    monkeypatch.setenv("OLLAMA_HOST", env["OLLAMA_HOST"])
    one = Embedded(tmp_path)
    with Program(words, env):
        wait_until(lambda: listens(here.port), "their Ollama listens")
        assert one.inference.start("ollama", "")["adopted"]
    wait_until(lambda: one.told[-1] == "error", "it is missed, and told")
    with Program(words, env):
        wait_until(lambda: one.told[-1] == "running", "it is back, and told")
        one.inference.close()
    assert one.told[-1] == "stopped"


class Liar:
    """An HTTP server on loopback that answers what `say(method, path, body)` returns: (status, bytes),
    or (status, bytes, headers).  asked: what it was asked."""

    def __init__(self, say):
        import http.server
        liar, self.asked = self, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                liar.asked.append((self.command, self.path, body))
                status, data, *headers = say(self.command, self.path, body)
                self.send_response(status)
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in [data] if isinstance(data, bytes) else data:
                    try:
                        self.wfile.write(piece)
                        self.wfile.flush()
                    except OSError:
                        return
            do_GET = do_POST = do_DELETE = do_HEAD = answer

            def log_message(self, *_):
                pass
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


COMPLETION = b'{"choices": [{"text": "a", "finish_reason": "length"}]}'


def test_an_engine_that_is_started_again_has_to_give_another_token():
    said = [COMPLETION]
    with Liar(lambda method, path, body: (200, said[0] if method == "POST" else b"{}")) as engine:
        endpoint = b9agent.Endpoint("http", "127.0.0.1", engine.port)
        probe = b9agent.TokenProbe(b9agent.ENGINE_BY_NAME["mlx"], endpoint, "m")
        wait_until(lambda: probe().ready, "it is ready")
        said[0] = b'{"error": "still loading"}'
        for _ in range(5):
            assert not probe().ready
        said[0] = COMPLETION
        wait_until(lambda: probe().ready, "it is ready again")


@pytest.mark.parametrize("garbage", [b"", b"[]", b"{}", b"<html>", b'{"choices": [1]}',
                                     b'{"choices": {"0": 1}}', b'{"choices": [{}]}'])
def test_a_200_with_garbage_is_no_token(garbage):
    with Liar(lambda method, path, body: (200, garbage)) as engine:
        with pytest.raises(b9agent.EngineError, match="did not answer a one-token request"):
            b9agent.generate_one_token(b9agent.Endpoint("http", "127.0.0.1", engine.port), "m", 5.0)


def test_an_engine_of_ours_that_hangs_is_no_longer_said_to_run_and_a_start_mends_it(
        world, tmp_path, monkeypatch):
    monkeypatch.setattr(b9agent, "INFERENCE_CHECK_S", 0.05)
    here, silent = world("ollama"), []
    monkeypatch.setenv("PATH", here.path)
    monkeypatch.setenv("HOME", str(here.home))
    one = Embedded(tmp_path)
    one.inference.place = DOOR
    try:
        first = one.inference.start("ollama", "")["pid"]
        tags = b9agent.OllamaApi.tags

        def asked(api):
            if silent:
                raise b9agent.ModelError("nothing came")
            return tags(api)
        monkeypatch.setattr(b9agent.OllamaApi, "tags", asked)
        silent.append(True)
        wait_until(lambda: one.told[-1] == "error", "it is told")
        said = one.inference.status()
        assert not said["running"] and "does not answer" in said["message"] and said["models"] == []
        assert one.inference.wire()["status"] == "error"
        assert one.inference.target()[:4] == ("error",) + one.inference.target()[1:3] + ((),)
        silent.clear()
        wait_until(lambda: one.told[-1] == "running", "it answers again")
        silent.append(True)
        wait_until(lambda: one.told[-1] == "error", "it is told again")
        assert one.inference.start("ollama", "")["pid"] != first
    finally:
        one.inference.close()


def test_a_stopped_engine_is_told_to_the_gateway(world):
    here = world("ollama").start()
    assert all("inference" not in request.body for request in here.hostile.named("keepalive"))
    here.post("/inference/start")
    here.last_inference(lambda sent: sent and sent["status"] == "running")
    here.post("/inference/stop")
    assert here.last_inference(lambda sent: sent and sent["status"] == "stopped") == {
        "status": "stopped", "ip": "127.0.0.1", "port": here.port, "models": []}


def test_a_lying_ollama_cannot_blow_up_a_keepalive(tmp_path, monkeypatch):
    names = [{"name": "m%d" % number} for number in range(5000)] + [{"name": "x" * 100000}, 5, {}]
    tags = json.dumps({"models": names[::-1]}).encode()

    def say(method, path, body):
        return 200, {"/": b"Ollama is running", "/api/version": b'{"version": "1"}'}.get(path, tags)
    with Liar(say) as engine:
        monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:%d" % engine.port)
        one = Embedded(tmp_path)
        one.inference.place = DOOR
        one.inference.start("ollama", "")
        assert len(one.inference.wire()["models"]) == 1000
        assert len(json.dumps(one.inference.wire())) < 20000
        one.inference.close()


# -- what is asked for ----------------------------------------------------------

def test_a_start_without_a_model_takes_that_of_the_settings(world):
    here = world("ollama").start("--inference-model", "llama3.2")
    status, answer = here.post("/inference/start")
    assert status == 404 and "llama3.2" in answer["error"], answer
    assert here.post("/inference/pull", {"model": "llama3.2"})[0] == 200
    assert here.post("/inference/start")[0] == 200
    assert here.get("/models")["models"][0]["loaded"]
    assert here.post("/inference/start", {"model": ""})[0] == 200


def test_a_users_model_of_ollamas_library_is_one_for_ollama(world):
    here = world("ollama").start(FAKE_OLLAMA_CATALOGUE="someone/tiny")
    for _ in range(2):
        status, answer = here.post("/inference/start", {"engine": "ollama", "model": "someone/tiny"})
        assert status == 404 and "pull someone/tiny" in answer["suggestion"], answer
    assert here.post("/inference/pull", {"model": "someone/tiny"})[0] == 200
    assert here.post("/inference/start", {"engine": "ollama", "model": "someone/tiny"})[0] == 200


def test_an_address_that_is_not_ours_costs_the_front_door_and_no_more(world):
    here = world("ollama").start("--inference-host", "203.0.113.9", "--insecure")
    here.program.wait_line("error no_front_door .*where=203.0.113.9:%d" % here.port)
    status, answer = here.post("/inference/start")
    assert (status, answer["running"], answer["endpoint"]) == (200, True, None)


def test_files_that_are_being_hashed_are_not_hashed_twice_at_once(tmp_path, monkeypatch):
    hold, begun = threading.Event(), []

    def slow(facts):
        begun.append(facts)
        hold.wait(30)
        return []
    monkeypatch.setattr(b9agent, "file_records", slow)
    (tmp_path / "weights").write_bytes(b"w")
    facts = b9agent.ModelFacts(**dict.fromkeys(b9agent.ModelFacts._fields))._replace(
        path=str(tmp_path), files=(str(tmp_path / "weights"),))
    one = Embedded(tmp_path)
    for _ in range(20):
        one.inference._note_served("m", b9agent.ENGINE_BY_NAME["vllm"], facts)
    hold.set()
    wait_until(lambda: "provenance" not in [each.name for each in threading.enumerate()], "it ends")
    assert len(begun) == 1


# -- the client, and who answers it ---------------------------------------------------

def asked(say, ask, **settings):
    """What a client gets of a server that answers so: of each of ask(client)."""
    with Liar(say) as server:
        client = b9agent.InferenceClient()
        client.configure("127.0.0.1", server.port, **dict({"timeout_s": 1.0}, **settings))
        return ask(client)


def every_call(client):
    hello = [{"role": "user", "content": "x"}]
    return [client.chat("m", hello), client.generate("m", "x"), client.embed("m", "x"),
            list(client.chat("m", hello, stream=True))[-1], client.load_model("m"), client.health(),
            client.list_models()]


def drip():
    for _ in range(200):
        yield b" "
        time.sleep(0.05)


REFUSALS = {
    "500 with a page": (500, b"<html><h1>Oops</h1></html>"),
    "a redirect": (302, b"", {"Location": "http://203.0.113.1/"}),
    "nothing": (200, b""), "no JSON": (200, b"<html>"), "a list": (200, b"[1]"),
    "empty JSON": (200, b"{}"), "numbers": (200, b'{"choices": 5, "data": 5}'),
    "odd rows": (200, b'{"choices": [5], "data": "five", "done": 1}'),
    "half": (200, b'{"choices": [{"me', {"Content-Length": "5000"}),
    "a stream without an end": (200, b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'),
    "an error inside": (200, b'data: {"error": {"message": "it broke"}}\n\ndata: [DONE]\n\n'),
}


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_the_client_calls_nothing_a_success_that_is_none(name):
    for result in asked(lambda *_: REFUSALS[name], every_call):
        if isinstance(result, list):
            assert result == [] and result.error
        else:
            assert not result.ok and result.error, result


def test_an_answer_that_drips_is_over_when_its_time_is():
    begun = time.monotonic()
    results = asked(lambda *_: (200, drip()), lambda client: [
        client.chat("m", []), client.embed("m", "x"), client.health()], timeout_s=0.4)
    assert not any(results) and time.monotonic() - begun < 5


def test_as_many_embeddings_as_texts_or_an_error():
    def say(method, path, body):
        return 200, b'{"data": [{"embedding": [1.0, 2]}, {"embedding": [3, 4]}]}'
    two, three, one, tokens = asked(say, lambda client: [
        client.embed("m", ["a", "b"]), client.embed("m", ["a", "b", "c"]), client.embed("m", "a"),
        client.embed("m", [[1, 2], [3]])])
    assert two.ok and two.embeddings == ((1.0, 2), (3, 4)) and tokens.ok
    assert not three.ok and not one.ok


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_is_none_is_told_at_once(port, monkeypatch):
    with pytest.raises(b9agent.UsageError):
        b9agent.InferenceClient().configure("127.0.0.1", port)
    monkeypatch.setenv("B9AGENT_INFERENCE_PORT", str(port))
    b9agent.InferenceClient().configure("127.0.0.1")


def test_a_token_stays_with_the_host_it_was_given_for():
    def say(method, path, body):
        return 200, b'{"data": []}'
    with Liar(say) as one, Liar(say) as other:
        client, stop = b9agent.InferenceClient(), threading.Event()

        def change():
            while not stop.is_set():
                client.configure("127.0.0.1", one.port, token="t-one")
                client.configure("127.0.0.1", other.port)
        thread = threading.Thread(target=change)
        client.configure("127.0.0.1", other.port)
        thread.start()
        try:
            targets = [client._target for _ in range(20000)]
        finally:
            stop.set()
            thread.join()
        assert all((endpoint.port == one.port) == bool(headers) for endpoint, headers, _ in targets)


def test_smoke_does_not_pass_what_says_nothing(monkeypatch, tmp_path):
    def say(method, path, body):
        if path == "/v1/models":
            return 200, b'{"data": [{"id": "llama3.2"}]}'
        return 200, b'{"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}'
    with Liar(say) as liar:
        monkeypatch.setattr(b9agent, "call_agent", lambda *_: {
            "engine": "ollama", "endpoint": "http://127.0.0.1:%d" % liar.port})
        monkeypatch.setattr(b9agent, "local_door", lambda state_dir: (
            b9agent.Endpoint("http", "127.0.0.1", liar.port), "token-of-the-door"))
        steps = b9agent.Smoke(str(tmp_path), "127.0.0.1", "llama3.2").steps
        for _, step in steps[:3]:
            step()
        with pytest.raises(b9agent.InferenceError, match="said nothing"):
            steps[3][1]()


# -- the command line, when it gets in the way --------------------------------------------

def test_a_crowd_that_waits_does_not_shut_out_who_would_help(world):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS="slow_start=600")
    request = ("POST /inference/start HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n\r\n"
               % here.control.token).encode()
    links = []
    try:
        for _ in range(50):
            links.append(socket.create_connection((here.control.host, here.control.port)))
            links[-1].sendall(request)
        refused = 0
        for link in links[b9agent.WAITING_MAX:]:
            link.settimeout(0.2)
            try:
                refused += b" 429 " in link.recv(100)
            except socket.timeout:
                pass
        assert refused or wait_until(lambda: here.post("/inference/start")[0] == 429, "it is full")
        assert here.cli("status").code == 0
        full = here.cli("start")
        assert full.code == 1 and "wait for the engine already" in full.err, full
        assert here.cli("stop").code == 0
    finally:
        for link in links:
            link.close()
    assert engine_processes(here.home) == {}


def test_ctrl_c_of_a_start_and_of_a_pull_says_what_goes_on_and_what_ends_it(world):
    here = world("ollama").start(FAKE_OLLAMA_RATE="10000", FAKE_OLLAMA_FAULTS="slow_start=2")
    with command(here, "start") as starter:
        wait_until(lambda: here.get("/inference/status")["status"] == "starting", "it starts")
        starter.wait_line("starting|loading", "out")
        starter.signal(signal.SIGINT)
        assert starter.wait() == 130 and "b9agent.py stop" in starter.text(), starter.text()
    wait_until(lambda: here.get("/inference/status")["running"], "it went on")
    with command(here, "pull", "llama3.2") as puller:
        puller.wait_line("pulling .*%", "out")
        puller.signal(signal.SIGINT)
        assert puller.wait() == 130 and "--cancel" in puller.text(), puller.text()
    done = here.cli("pull", "llama3.2", "--cancel")
    assert done.code == 0 and "cancelled" in done.out, done
    wait_until(lambda: here.cli("pull", "llama3.2", "--cancel").code == 1, "it has ended")


@pytest.mark.parametrize("words", [
    ("start", "--engine", "nosuch"), ("start", "--context", "5"), ("pull", "a" * 600),
    ("models", "fit", "llama3.2", "--context", "abc"), ("models", "import", "x", "--quantize", "q9")])
def test_wrong_words_are_wrong_usage(world, words):
    done = world("ollama").start().cli(*words)
    assert done.code == 2, done


def test_an_engines_last_words_are_lines_and_its_state_is_one(world):
    here = world("ollama").start(FAKE_OLLAMA_FAULTS="crash_at_start")
    done = here.cli("start")
    assert done.code == 1 and "\\n" not in done.err and len(done.err.splitlines()) > 1, done
    done = here.cli("status")
    assert "\\n" not in done.out and "exit code 1" in done.out, done


def test_a_pull_and_a_log_may_be_silent_for_long(world, monkeypatch):
    here = world("ollama").start()
    seen = []
    monkeypatch.setattr(b9agent, "http_request", lambda *given: None)  # whether it lives at all
    monkeypatch.setattr(b9agent, "http_stream", lambda *given: seen.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(b9agent.agent_lines(str(here.state), "/logs?follow=true"))
    assert seen[0][-1] >= b9agent.SILENCE_LIMIT_S and seen[0][-2] > 60


@pytest.mark.parametrize("name", ["", " ", "\0", "a\nb", "é", "x" * 512, "a:b:c", "/", "//", ".."])
def test_an_odd_name_is_a_wrong_request_before_any_engine_is_asked(name, tmp_path):
    inference = Embedded(tmp_path).inference
    for call in (inference.load, inference.unload, inference.delete,
                 *([lambda name: inference.start("ollama", name)] if name else [])):
        with pytest.raises(b9agent.UsageError):
            call(name)
    inference.close()


@pytest.mark.parametrize("garbage", [b"", b"<html>", b"{}", b"[]", b'{"error": "x"}'])
def test_an_engine_that_tells_garbage_unloads_and_deletes_nothing(garbage, tmp_path, monkeypatch):
    def say(method, path, body):
        return 200, {"/": b"Ollama is running", "/api/version": b'{"version": "1"}'}.get(path,
                                                                                        garbage)
    with Liar(say) as engine:
        monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:%d" % engine.port)
        one = Embedded(tmp_path)
        one.inference.start("ollama", "")
        for call in (one.inference.load, one.inference.unload, one.inference.delete):
            with pytest.raises(b9agent.ModelError):
                call("m")
        one.inference.close()


def test_json_that_could_not_be_written_is_no_success(world):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    here = world("ollama").start()
    with open("/dev/full", "w") as full:
        for words in (["models", "--json"], ["stop", "--json"]):
            done = subprocess.run([sys.executable, b9agent.__file__, *words], stdout=full,
                                  stderr=subprocess.PIPE, env=environment(here.home))
            assert done.returncode == 2 and b"No space left" in done.stderr, done


def test_a_pull_is_told_as_it_begins_and_ends_and_why_it_failed_is_in_the_log(world):
    here = world("ollama").start()
    here.post("/inference/start")
    assert here.post("/inference/pull", {"model": "llama3.2"})[0] == 200
    assert here.cli("pull", "no-such-model").code == 1
    here.program.wait_line("warning model_failed .*does not exist")
    with here.control.get("/events?since=0") as stream:
        told = []
        while len(told) < 4:
            line = stream.readline().decode().strip()
            if line == "event: pull":
                told.append(json.loads(stream.readline().decode().partition(":")[2]))
    assert [(each["model"], each["status"]) for each in told] == [
        ("llama3.2:latest", "running"), ("llama3.2:latest", "success"),
        ("no-such-model:latest", "running"), ("no-such-model:latest", "error")]


def test_a_conversion_is_run_where_its_tool_is_and_its_command_is_named_where_not(
        world, real_world, tmp_path):
    here = world().start()
    folder = tmp_path / "tiny model"
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\1" * 8)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    target = str(tmp_path / "made here")
    done = here.cli("models", "convert", str(folder), "--to", target)
    assert done.code == 1 and "pip install mlx-lm, then: mlx_lm.convert" in done.err, done
    assert here.cli("models", "convert", str(folder)).code == 2
    assert here.cli("models", "convert", "/dev/null", "--to", target).code == 2
    assert here.cli("models", "convert", str(folder), "--to", str(tmp_path)).code == 2
    here.program.stop()
    engines.mlx_python()
    here = real_world(engines.BIN).start()
    done = here.cli("models", "convert", engines.tiny_safetensors(), "--to", target, "--plain",
                    within_s=120)
    assert done.code == 0 and "is here" in done.out, done
    assert here.cli("start", "--engine", "mlx", "--model", target, within_s=120).code == 0
    assert here.cli("stop").code == 0


def test_a_defect_in_a_look_at_the_engine_costs_one_look(tmp_path, monkeypatch):
    monkeypatch.setattr(b9agent, "INFERENCE_CHECK_S", 0.02)

    def say(method, path, body):
        return 200, {"/": b"Ollama is running", "/api/version": b'{"version": "1"}'}.get(
            path, b'{"models": [{"name": "m"}]}')
    with Liar(say) as engine:
        monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:%d" % engine.port)
        one, beats = Embedded(tmp_path), []

        def beat(models):
            beats.append(models)
            raise RuntimeError("a defect")
        one.inference._beat = beat
        one.inference.start("ollama", "")
        wait_until(lambda: len(beats) > 2, "it looks again")
        one.inference.close()


def test_every_status_of_an_engines_error_is_in_the_openapi_document(world):
    here = world("ollama").start()
    document = here.get("/openapi.json")
    for body in ({"model": "no-such"}, {"model": "a b"}):
        status, _ = here.post("/models/load", body)
        assert str(status) in document["paths"]["/models/load"]["post"]["responses"]
    for path, item in document["paths"].items():
        if path.startswith(("/inference", "/models")):
            for operation in item.values():
                assert {"404", "409", "502"} <= set(operation["responses"])
    assert document["components"]["responses"]["409"]


# -- what is asked of the machine ---------------------------------------------

def test_an_engine_that_refuses_its_first_token_has_failed_and_does_not_start_for_an_hour():
    def say(method, path, _):
        return (200, b"{}") if method == "GET" else (400, b'{"error": {"message": "embeds only"}}')
    with Liar(say) as liar:
        probe = b9agent.TokenProbe(b9agent.ENGINE_BY_NAME["vllm"],
                                   b9agent.Endpoint("http", "127.0.0.1", liar.port), "m")
        seen = []
        wait_until(lambda: seen.append(probe()) or seen[-1].failed, "it has failed")
    asked = [method for method, _, _ in liar.asked].count("POST")
    assert asked == b9agent.TOKEN_REFUSALS and not any(one.ready for one in seen)
    assert "embeds only" in seen[-1].said


def facts(**more):
    return b9agent.ModelFacts("m", "/m", "gguf", weights_bytes=1 << 30, layers=32, heads=32, kv_heads=8,
                              head_dim=128, context_tokens=131072,
                              kv=(b9agent.KvLayers(32, 2048),), **more)


def test_whether_a_model_fits_is_judged_with_the_context_it_will_have(tmp_path):
    hardware = b9agent.Hardware("nvidia", (8 << 30, 8 << 30), 1 << 30)
    vllm = b9agent.ENGINE_BY_NAME["vllm"]
    small = Embedded(tmp_path).inference.fit(facts(), hardware, vllm, None)
    large = Embedded(tmp_path, inference_context="131072").inference.fit(facts(), hardware, vllm, None)
    assert (small.context_tokens, small.fits) == (8192, True)
    assert (large.context_tokens, large.fits) == (131072, False)
    # each GPU has an overhead of its own
    assert small.overhead_bytes == 2 * (512 + 256) << 20
    assert b9agent.gpus_for(facts(), hardware) == 1
    assert b9agent.gpus_for(facts(), hardware, 65536) == 2


def test_an_engine_sees_the_gpus_that_are_offered_and_no_others():
    seen = b9agent.visible_gpus(b9agent.Hardware("nvidia", (1, 1), 1, (1, 2)))
    assert seen == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1,2",
                    "ROCR_VISIBLE_DEVICES": "-1"}
    seen = b9agent.visible_gpus(b9agent.Hardware("amd", (1,), 1, (0,)))
    assert (seen["ROCR_VISIBLE_DEVICES"], seen["CUDA_VISIBLE_DEVICES"]) == ("0", "-1")
    assert set(b9agent.visible_gpus(b9agent.Hardware("", (), 1)).values()) == {"PCI_BUS_ID", "-1"}


@pytest.mark.parametrize("flags, told", [((), None), (("--max-gpus", "0"), "-1")])
def test_the_caps_on_gpus_hold_for_the_engine_too(world, flags, told):
    here = world("ollama").start(*flags)
    assert here.post("/inference/start")[0] == 200
    with open("/proc/%d/environ" % here.pid()) as handle:
        names = dict(line.partition("=")[::2] for line in handle.read().split("\0") if line)
    assert names.get("CUDA_VISIBLE_DEVICES") == names.get("ROCR_VISIBLE_DEVICES") == told


def test_one_thread_at_a_time_asks_the_samplers(tmp_path):
    tmp_path.chmod(0o700)
    loaded = b9agent.load_settings({"state_dir": str(tmp_path), "token": "t"}, {})
    agent = b9agent.Agent(loaded, b9agent.make_log(loaded.settings), keep=False)
    inside, most, crowd = [], [], threading.Barrier(2)

    def sample(*_):
        inside.append(1)
        most.append(len(inside))
        try:
            crowd.wait(0.3)  # two at once would meet here
        except threading.BrokenBarrierError:
            crowd.reset()
        inside.pop()
        return b9agent.GpuSample()
    agent._gpus.sample = sample
    together(agent._hardware, agent.look, agent.register_payload)
    assert most == [1, 1, 1]


def test_a_run_that_writes_nothing_leaves_a_broken_book_of_models_alone(home, state, hostile):
    state.mkdir(mode=0o700)
    (state / "models.json").write_text("rubbish")
    done = run_agent(home, "--dry-run", "--gateway-port", hostile.port, BETA9_TOKEN=TOKEN)
    assert done.code == 0 and sorted(os.listdir(str(state))) == ["models.json"], done


def test_an_engine_of_ours_that_gives_no_token_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(engines.stand_in(tmp_path / "bin", "ollama")) + os.pathsep
                       + os.environ["PATH"])
    monkeypatch.setattr(b9agent, "SUSPECT_LIMIT_S", 0.5)
    folder = tmp_path / "state"
    folder.mkdir()
    inference = Embedded(folder).inference
    try:
        first = inference.start("ollama", "")["pid"]
        inference.suspect("nobody:latest")
        assert inference.status()["pid"] == first, "it answers, if only that there is no such model"
        os.kill(first, signal.SIGSTOP)
        inference.suspect("nobody:latest")
        wait_until(lambda: inference.state() == "running" and inference.status()["pid"] != first,
                   "another one runs")
        assert inference.status()["starts"] == 2
    finally:
        inference.close()
