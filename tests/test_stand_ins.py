"""The stand-ins for engines, held against the clients that people use and against what the real ones
were seen to do.  Where a real `ollama` is on PATH, or B9TESTS_OLLAMA names one, the same tests of its
API run against it; the real llama-server and mlx_lm.server answer here as well."""
import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import ollama
import openai
import pytest

import engines
from fake_registry import Registry
from helpers import Program, environment, wait_until

UNKNOWN = "no-such-model"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def http_answers(port, path="/"):
    """The status of a GET, or None."""
    try:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as there:
            there.request("GET", path)
            return there.getresponse().status
    except (OSError, http.client.HTTPException):
        return None


def ask(port, method, path, body=None, headers=(), raw=None):
    """(status, content type, body as text)."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as there:
        there.request(method, path, raw if raw is not None else
                      None if body is None else json.dumps(body), dict(headers))
        answer = there.getresponse()
        return answer.status, answer.getheader("Content-Type"), answer.read().decode("utf-8")


def children(pid):
    """{pid: command line} of the processes that a process started."""
    listed = subprocess.run(["ps", "-ww", "-A", "-o", "pid=,ppid=,stat=,args="], stdout=subprocess.PIPE,
                            universal_newlines=True).stdout
    rows = [line.split(None, 3) for line in listed.splitlines()]
    return {int(row[0]): row[3] for row in rows if int(row[1]) == pid and row[2][0] != "Z"}


def alive(pid):
    try:
        with open("/proc/%d/stat" % pid) as handle:
            return handle.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Ollama:
    """A running `ollama serve`, real or played."""

    def __init__(self, program, port, store):
        self.program, self.port, self.store = program, port, store
        self.url = "http://127.0.0.1:%d" % port
        self.clients = []
        self.client = self.another_client()

    def another_client(self):
        self.clients.append(ollama.Client(self.url))
        return self.clients[-1]

    def close(self):
        for client in self.clients:
            client._client.close()  # it offers no other way

    def ask(self, *arguments, **more):
        return ask(self.port, *arguments, **more)

    def lines(self, path, body):
        status, kind, text = self.ask("POST", path, body)
        return status, kind, [json.loads(line) for line in text.splitlines()]

    def load(self, name="tiny"):
        return self.client.generate(name)

    def runner(self):
        """The pid of its one runner."""
        (pid,) = children(self.program.pid)
        return pid

    def add_tiny(self, name="tiny"):
        """A model made from a small GGUF that is uploaded."""
        import fake_ollama
        raw = fake_ollama.make_gguf(fake_ollama.llama_metadata("tiny", 1), 30000, "tiny")
        if isinstance(self, RealOllama):
            with open(engines.tiny_gguf(), "rb") as handle:
                raw = handle.read()
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        status, _, _ = self.ask("POST", "/api/blobs/" + digest, raw=raw)
        assert status in (200, 201)
        self.client.create(name, files={"tiny.gguf": digest})
        return raw, digest


class RealOllama(Ollama):
    pass


@pytest.fixture
def serve(home, tmp_path):
    """serve(program="stand-in", FAULTS…) -> Ollama; all end with the test."""
    started, served = [], []
    folder = engines.stand_in(tmp_path / "bin", "ollama")

    def start(real=False, port=None, until_ready=True, **extra):
        port = port or free_port()
        store = tmp_path / "models"
        command = engines.ollama() if real else os.path.join(folder, "ollama")
        extra.setdefault("OLLAMA_NO_CLOUD", "1")
        program = Program([command, "serve"], environment(
            home, OLLAMA_HOST="127.0.0.1:%d" % port, OLLAMA_MODELS=store, **extra))
        started.append(program)
        found = (RealOllama if real else Ollama)(program, port, store)
        served.append(found)
        if until_ready:
            wait_until(lambda: http_answers(port), "an answer from ollama")
        return found

    yield start
    for one in served:
        one.close()
    for program in reversed(started):
        if program.process.poll() is None:
            for pid in children(program.pid):  # a killed server leaves them
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        program.__exit__()


@pytest.fixture(params=["stand-in", "real"])
def any_ollama(request, serve):
    """What both are asked alike."""
    return serve(real=request.param == "real")


# ---------------------------------------------------------------------- Ollama, both

def test_an_empty_ollama_says_what_it_is(any_ollama):
    assert any_ollama.ask("GET", "/") == (200, "text/plain; charset=utf-8", "Ollama is running")
    assert set(json.loads(any_ollama.ask("GET", "/api/version")[2])) == {"version"}
    assert any_ollama.client.list().models == []
    assert any_ollama.client.ps().models == []
    assert json.loads(any_ollama.ask("GET", "/v1/models")[2]) == {"object": "list", "data": None}
    any_ollama.program.wait_line(r"msg=\"Listening on 127\.0\.0\.1:%d \(version" % any_ollama.port)


@pytest.mark.parametrize("method, path, body, expected", [
    ("GET", "/nope", None, (404, "404 page not found")),
    ("POST", "/api/tags", None, (405, "405 method not allowed")),
    ("POST", "/api/chat", None, (400, '{"error":"missing request body"}')),
    ("POST", "/api/chat", {"model": ""}, (400, '{"error":"model is required"}')),
    ("POST", "/api/chat", {"model": "none"}, (404, '{"error":"model \'none\' not found"}')),
    ("POST", "/api/chat", {"model": 1}, (
        400, '{"error":"json: cannot unmarshal number into Go struct field ChatRequest.model of '
             'type string"}')),
    ("POST", "/api/chat", {"model": "tiny", "keep_alive": "300"}, (
        400, '{"error":"time: missing unit in duration \\"300\\""}')),
    ("POST", "/api/generate", {"model": "none"}, (404, '{"error":"model \'none\' not found"}')),
    ("POST", "/api/embed", {"model": "none", "input": "x"}, (
        404, '{"error":"model \\"none\\" not found, try pulling it first"}')),
    ("POST", "/api/show", {"model": "none"}, (404, '{"error":"model \'none:latest\' not found"}')),
    ("POST", "/api/pull", {}, (400, '{"error":"invalid model name"}')),
    ("POST", "/api/copy", {"source": "none", "destination": "x"}, (
        404, '{"error":"model \\"none\\" not found"}')),
    ("DELETE", "/api/delete", {"model": "none"}, (404, '{"error":"model \'none\' not found"}')),
    ("POST", "/api/chat", {"model": "m:cloud"}, (
        403, '{"error":"ollama cloud is disabled: remote model is unavailable"}')),
    ("POST", "/api/create", {"model": "x"}, (
        400, '{"error":"neither \'from\' or \'files\' was specified"}')),
    ("POST", "/v1/chat/completions", {"model": "none", "messages": [{"role": "user", "content": ""}]},
     (404, '{"error":{"message":"model \'none\' not found","type":"not_found_error","param":null,'
           '"code":null}}')),
    ("GET", "/v1/models/none", None, (
        404, '{"error":{"message":"model \'none:latest\' not found","type":"not_found_error",'
             '"param":null,"code":null}}')),
])
def test_what_it_refuses_it_refuses_in_these_words(serve, method, path, body, expected):
    served = [serve()]
    with contextlib.suppress(pytest.skip.Exception):
        served.append(serve(real=True))
    for one in served:
        status, _, text = one.ask(method, path, body)
        assert (status, text.strip()) == expected


def test_other_hosts_and_origins_are_refused(any_ollama):
    assert any_ollama.ask("GET", "/", headers={"Host": "evil.example"}.items())[0] == 403
    assert any_ollama.ask("GET", "/", headers={"Origin": "http://evil.example"}.items())[0] == 403
    assert any_ollama.ask("GET", "/", headers={"Host": "x.localhost"}.items())[0] == 200


def test_a_gguf_is_uploaded_and_made_into_a_model(any_ollama):
    raw, digest = any_ollama.add_tiny()
    assert any_ollama.ask("HEAD", "/api/blobs/" + digest)[0] == 200
    assert any_ollama.ask("HEAD", "/api/blobs/sha256:" + "0" * 64)[0] == 404
    assert any_ollama.ask("POST", "/api/blobs/sha256:12", raw=b"x")[0] == 400
    status, _, text = any_ollama.ask("POST", "/api/blobs/sha256:" + "0" * 64, raw=b"x")
    assert status == 400 and "digest mismatch, expected" in text
    (model,) = any_ollama.client.list().models
    assert model.model == "tiny:latest"
    assert model.details.family == "llama" and model.details.quantization_level == "F16"
    manifest = any_ollama.store / "manifests/registry.ollama.ai/library/tiny/latest"
    assert hashlib.sha256(manifest.read_bytes()).hexdigest() == model.digest
    layers = json.loads(manifest.read_text())["layers"]
    assert layers[0]["mediaType"] == "application/vnd.ollama.image.model"
    assert layers[0]["digest"] != digest, "it is rewritten"
    blob = any_ollama.store / "blobs" / layers[0]["digest"].replace(":", "-")
    assert "sha256:" + hashlib.sha256(blob.read_bytes()).hexdigest() == layers[0]["digest"]
    assert blob.read_bytes()[:4] == raw[:4] == b"GGUF"


def test_create_quantizes_what_is_not_quantized_yet(any_ollama):
    _, digest = any_ollama.add_tiny()
    lines = [line.status for line in any_ollama.client.create(
        "small", files={"tiny.gguf": digest}, quantize="q8_0", stream=True)]
    assert lines[0] == "parsing GGUF" and lines[-2:] == ["writing manifest", "success"]
    assert any_ollama.client.show("small").details.quantization_level == "Q8_0"
    with pytest.raises(ollama.ResponseError, match="only supported for F16, BF16 and F32 models"):
        any_ollama.client.create("smaller", from_="small", quantize="q4_K_M")
    status, _, text = any_ollama.ask("POST", "/api/create", {
        "model": "x", "from": "tiny", "quantize": "nope"})
    assert status == 500 and "supported types are F32, F16, Q4_K_S, Q4_K_M, Q8_0" in text


def test_safetensors_are_converted(any_ollama, tmp_path):
    if isinstance(any_ollama, RealOllama):
        folder = engines.tiny_safetensors()
    else:
        folder = tmp_path
        (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
        (folder / "model.safetensors").write_bytes(bytes(50000))
    files = {}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        with open(os.path.join(str(folder), name), "rb") as handle:
            raw = handle.read()
        files[name] = "sha256:" + hashlib.sha256(raw).hexdigest()
        assert any_ollama.ask("POST", "/api/blobs/" + files[name], raw=raw)[0] in (200, 201)
    status, _, lines = any_ollama.lines("/api/create", {
        "model": "made", "files": files, "quantize": "q8_0"})
    said = [line["status"] for line in lines if "quantizing" not in line["status"]]
    assert status == 200 and [re.sub(" layer sha256:.*", "", one) for one in said] == [
        "converting model", "verifying conversion", "creating new",
        "using autodetected template chatml", "creating new", "writing manifest", "success"]
    shown = any_ollama.client.show("made")
    assert shown.details.quantization_level == "Q8_0" and "im_start" in shown.template
    assert "general.license" not in shown.modelinfo, "a conversion loses it"
    for missing, message in (("config.json", "open config.json: no such file or directory"),
                             ("tokenizer.json", "unknown tokenizer format")):
        rest = {name: digest for name, digest in files.items() if name != missing}
        _, _, lines = any_ollama.lines("/api/create", {"model": "x", "files": rest})
        assert lines[-1] == {"error": message}
    assert any_ollama.ask("POST", "/api/create", {
        "model": "x", "files": {"config.json": files["config.json"]}})[::2] == (
        400, '{"error":"unknown type"}')


def test_generate_streams_and_counts(any_ollama):
    any_ollama.add_tiny()
    status, kind, lines = any_ollama.lines("/api/generate", {
        "model": "tiny", "prompt": "hi", "options": {"num_predict": 3}})
    assert (status, kind) == (200, "application/x-ndjson")
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    last = lines[-1]
    assert last["done_reason"] == "length" and last["eval_count"] == 3 and last["context"]
    assert last["total_duration"] >= last["load_duration"] > 0
    whole = any_ollama.client.generate("tiny", "hi", options={"num_predict": 3})
    assert whole.done and whole.load_duration < last["load_duration"], "now it was loaded"


def test_chat_answers_in_one_piece_and_in_many(any_ollama):
    any_ollama.add_tiny()
    messages = [{"role": "user", "content": "one two three"}]
    whole = any_ollama.client.chat("tiny", messages, options={"num_predict": 4})
    assert whole.message.role == "assistant" and whole.message.content and whole.done_reason == "length"
    pieces = list(any_ollama.client.chat("tiny", messages, stream=True, options={"num_predict": 4}))
    assert pieces[-1].done and "".join(piece.message.content for piece in pieces)
    spelled = any_ollama.ask("POST", "/api/chat", raw=(
        b'{"model":"none","MODEL":"Library/TINY","messages":[{"role":"user","content":"x"}],'
        b'"stream":false,"options":{"num_predict":1}} and more'))
    assert spelled[0] == 200 and json.loads(spelled[2])["model"] == "Library/TINY"


def test_load_and_unload_can_be_watched(any_ollama):
    any_ollama.add_tiny()
    assert any_ollama.load().done_reason == "load"
    (model,) = any_ollama.client.ps().models
    assert model.name == "tiny:latest" and model.context_length == 512 or model.context_length == 2048
    runner = any_ollama.runner()
    answer = any_ollama.client.generate("tiny", keep_alive=-1)
    assert answer.done_reason == "load" and any_ollama.runner() == runner
    assert any_ollama.client.ps().models[0].expires_at.year > 2300
    assert any_ollama.client.generate("tiny", keep_alive=0).done_reason == "unload"
    wait_until(lambda: not any_ollama.client.ps().models, "unloaded")
    wait_until(lambda: not alive(runner), "the runner has ended")


def test_keep_alive_counts_from_the_end_of_the_last_request(any_ollama):
    any_ollama.add_tiny()
    any_ollama.client.generate("tiny", keep_alive="300ms")
    assert len(any_ollama.client.ps().models) == 1
    wait_until(lambda: not any_ollama.client.ps().models, "it was unloaded when its time was over")


def test_other_options_load_it_again(any_ollama):
    any_ollama.add_tiny()
    any_ollama.load()
    first = any_ollama.runner()
    any_ollama.client.generate("tiny", "x", options={"num_predict": 1, "num_ctx": 128})
    assert any_ollama.runner() != first
    assert any_ollama.client.ps().models[0].context_length == 128
    with pytest.raises(ollama.ResponseError) as caught:
        any_ollama.client.generate("tiny", "x", options={"num_predict": "x"})
    assert caught.value.status_code == 500


def test_a_runner_that_was_killed_is_started_again(any_ollama):
    any_ollama.add_tiny()
    any_ollama.load()
    first = any_ollama.runner()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not alive(first), "the runner has ended")
    assert len(any_ollama.client.ps().models) == 1, "nobody has noticed yet"
    assert any_ollama.client.generate("tiny", "x", options={"num_predict": 2}).done
    assert any_ollama.runner() != first


def test_a_client_that_leaves_ends_the_load(serve):
    one = serve(FAKE_OLLAMA_LOAD_S=60)
    one.add_tiny()
    with contextlib.closing(socket.create_connection(("127.0.0.1", one.port))) as there:
        body = b'{"model":"tiny","prompt":"x"}'
        there.sendall(b"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%s"
                      % (len(body), body))
        wait_until(lambda: children(one.program.pid), "a runner")
        runner = one.runner()
    one.program.wait_line("client connection closed before llama-server finished loading")
    wait_until(lambda: not alive(runner), "the runner has ended")
    assert one.client.ps().models == []


def test_copy_and_delete(any_ollama):
    any_ollama.add_tiny()
    any_ollama.client.copy("tiny", "me/other:1")
    digests = {model.model: model.digest for model in any_ollama.client.list().models}
    assert set(digests) == {"tiny:latest", "me/other:1"} and len(set(digests.values())) == 1
    any_ollama.client.delete("tiny")
    assert any_ollama.client.generate("me/other:1").done_reason == "load", "the layers are still there"
    any_ollama.client.delete("me/other:1")
    assert any_ollama.client.list().models == []
    with pytest.raises(ollama.ResponseError):
        any_ollama.client.delete("tiny")


def test_embeddings_are_for_models_that_embed(serve):
    one = serve()
    one.add_tiny()
    status, _, text = one.ask("POST", "/api/embed", {"model": "tiny", "input": "x"})
    assert status == 501 and "does not support embeddings" in text
    one.client.pull("nomic-embed-text")
    vectors = one.client.embed("nomic-embed-text", ["a", "b"]).embeddings
    assert [len(vector) for vector in vectors] == [64, 64]
    assert abs(sum(number ** 2 for number in vectors[0]) - 1) < 1e-6
    assert one.client.embeddings("nomic-embed-text", "a").embedding == vectors[0]
    status, _, text = one.ask("POST", "/api/generate", {"model": "nomic-embed-text", "prompt": "x"})
    assert (status, text) == (400, '{"error":"\\"nomic-embed-text\\" does not support generate"}')


def test_the_openai_client_works(any_ollama):
    any_ollama.add_tiny()
    with openai.OpenAI(base_url=any_ollama.url + "/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny:latest"]
        messages = [{"role": "user", "content": "hello there"}]
        whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
        assert whole.choices[0].message.content and whole.usage.completion_tokens == 4
        assert whole.choices[0].finish_reason == "length" and whole.id.startswith("chatcmpl-")
        chunks = list(client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=4, stream=True,
            stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 4
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=UNKNOWN, messages=messages)
        text = client.completions.create(model="tiny", prompt="x", max_tokens=3)
        assert text.object == "text_completion" and text.usage.completion_tokens == 3


@pytest.mark.parametrize("real", [False, True])
def test_a_taken_port_is_named_and_ends_it(serve, real):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        one = serve(real=real, port=port, until_ready=False)
        assert one.program.wait() == 1
        assert "Error: listen tcp 127.0.0.1:%d: bind: address already in use" % port in \
            one.program.lines()


@pytest.mark.parametrize("real", [False, True])
def test_sigterm_ends_it_and_its_runners_at_once(serve, real):
    one = serve(real=real)
    one.add_tiny()
    one.load()
    runner = one.runner()
    assert one.program.stop() == 0
    wait_until(lambda: not alive(runner), "the runner has ended")


@pytest.mark.parametrize("real", [False, True])
def test_sigkill_leaves_its_runner_behind(serve, real):
    one = serve(real=real)
    one.add_tiny()
    one.load()
    runner = one.runner()
    one.program.signal(signal.SIGKILL)
    one.program.process.wait()
    assert alive(runner), "nobody ends it: that is the agent's to do"
    os.kill(runner, signal.SIGKILL)


# ---------------------------------------------------------------------- pulls, from the stand-in

class Source:
    """An Ollama and where it pulls from; name(…) is what it calls a model."""

    def __init__(self, real, serve, registry):
        self.real, self._serve, self.registry = real, serve, registry

    def serve(self, rate):
        self.registry.rate = rate
        return self._serve(real=True, **Registry.environment) if self.real else \
            self._serve(FAKE_OLLAMA_RATE=rate)

    def name(self, short):
        return self.registry.name(short) if self.real else short


@pytest.fixture(params=["stand-in", "real"])
def source(request, serve):
    """The stand-in has a registry built in; the real one pulls the same from another stand-in."""
    if request.param == "real":
        engines.ollama()
    with Registry() as registry:
        yield Source(request.param == "real", serve, registry)


def test_a_pull_ends_with_success_and_a_store_that_holds(source):
    one, name = source.serve(400000), source.name("smollm2:135m")
    lines = list(one.client.pull(name, stream=True))
    assert lines[0].status == "pulling manifest"
    assert [line.status for line in lines[-3:]] == [
        "verifying sha256 digest", "writing manifest", "success"]
    layers = [line for line in lines if line.digest]
    weights = [line for line in layers if line.total > 100000]
    counts = [line.completed or 0 for line in weights]
    assert len(counts) > 3 and counts == sorted(counts)
    (model,) = one.client.list().models
    assert model.model == name and model.details.quantization_level == "Q8_0"
    for blob in (one.store / "blobs").iterdir():
        assert blob.name == "sha256-" + hashlib.sha256(blob.read_bytes()).hexdigest()
    again = [line for line in one.client.pull(name, stream=True) if line.digest]
    assert [line.completed for line in again] == [line.total for line in again] and len(again) == 5
    shown = one.client.show(name)
    assert shown.license.startswith("Apache License") and "tools" in shown.capabilities
    assert shown.modelinfo["general.license"] == "apache-2.0"


def test_an_unknown_model_is_an_error_inside_a_200(source):
    one, name = source.serve(0), source.name(UNKNOWN)
    status, kind, lines = one.lines("/api/pull", {"model": name})
    assert (status, kind) == (200, "application/x-ndjson")
    assert lines == [{"status": "pulling manifest"},
                     {"error": "pull model manifest: file does not exist"}]
    status, _, text = one.ask("POST", "/api/pull", {"model": name, "stream": False})
    assert (status, text) == (500, '{"error":"pull model manifest: file does not exist"}')
    status, _, text = one.ask("POST", "/api/pull", {
        "model": source.name("tiny"), "stream": False})
    assert (status, text) == (200, '{"status":"success"}')


@pytest.mark.parametrize("fault, message", [
    ("pull_error=1", "max retries exceeded: unexpected EOF"),
    ("pull_digest", "digest mismatch, file must be downloaded again"),
])
def test_a_pull_that_fails_half_way_says_so_in_its_last_line(serve, fault, message):
    one = serve(FAKE_OLLAMA_FAULTS=fault, FAKE_OLLAMA_RATE=1000000)
    status, _, lines = one.lines("/api/pull", {"model": "tiny"})
    assert status == 200 and message in lines[-1]["error"]
    assert one.client.list().models == []


def test_a_pull_that_was_cut_goes_on_where_it_stopped(serve):
    one = serve(FAKE_OLLAMA_FAULTS="pull_cut=1", FAKE_OLLAMA_RATE=400000)
    seen = []
    with pytest.raises(Exception):
        for line in one.client.pull("tiny", stream=True):
            seen.append(line)
    assert seen[-1].status != "success"
    partial = [name for name in os.listdir(one.store / "blobs") if name.endswith("-partial-0")]
    assert len(partial) == 1
    lines = [line for line in one.client.pull("tiny", stream=True)]
    assert lines[-1].status == "success"
    assert lines[1].completed >= seen[-1].completed > 0
    assert not [name for name in os.listdir(one.store / "blobs") if "partial" in name]


def test_two_pulls_of_one_model_share_the_download(source):
    one, name = source.serve(500000), source.name("tiny")
    ends = []
    threads = [threading.Thread(target=lambda: ends.append(list(
        one.another_client().pull(name, stream=True)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [lines[-1].status for lines in ends] == ["success", "success"]
    (weights,) = {line.digest for line in ends[0] if (line.total or 0) > 100000}
    started = "downloading " + weights[len("sha256:"):][:12]
    assert len([line for line in one.program.lines() if started in line]) == 1


def test_the_last_waiter_that_leaves_ends_the_download(source):
    one, name = source.serve(200000), source.name("tiny")
    pulled = one.client.pull(name, stream=True)
    for line in pulled:
        if line.completed:
            break
    pulled.close()
    wait_until(lambda: any("/api/pull" in line for line in one.program.lines("out")),
               "the pull has ended")
    names = os.listdir(one.store / "blobs")
    assert any(name.endswith("-partial") for name in names) and one.client.list().models == []
    left = line.completed
    rest = [line for line in one.client.pull(name, stream=True) if (line.total or 0) > 100000]
    assert rest[0].completed >= left, "it goes on where it stopped"
    assert not [name for name in os.listdir(one.store / "blobs") if "partial" in name]


def test_unused_blobs_are_removed_at_the_next_start(serve):
    one = serve()
    one.add_tiny()
    before = set(os.listdir(one.store / "blobs"))
    assert one.program.stop() == 0
    two = serve()
    after = set(os.listdir(two.store / "blobs"))
    assert len(before - after) == 1 and len(two.client.list().models) == 1


# ---------------------------------------------------------------------- its faults

def test_slow_start_has_the_port_open_before_it_answers(serve):
    one = serve(FAKE_OLLAMA_FAULTS="slow_start=0.6", until_ready=False)
    one.program.wait_line("Listening on")
    socket.create_connection(("127.0.0.1", one.port)).close()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", one.port, timeout=0.2)) as there:
        there.request("GET", "/")
        with pytest.raises(socket.timeout):
            there.getresponse()
    wait_until(lambda: http_answers(one.port), "it answers in the end")


def test_crash_at_start_counts_its_starts(serve):
    codes = [serve(FAKE_OLLAMA_FAULTS="crash_at_start=2", until_ready=False).program.wait()
             for _ in range(2)]
    assert codes == [1, 1]
    serve(FAKE_OLLAMA_FAULTS="crash_at_start=2")


def test_it_crashes_while_it_serves_and_leaves_its_runner(serve):
    one = serve(FAKE_OLLAMA_FAULTS="crash_on_generate")
    one.add_tiny()
    one.load()
    runner = one.runner()
    with pytest.raises(Exception):
        list(one.client.generate("tiny", "x", stream=True))
    assert one.program.process.wait() == -signal.SIGKILL
    assert alive(runner)
    os.kill(runner, signal.SIGKILL)
    two = serve(FAKE_OLLAMA_FAULTS="crash_while_serving=0.1", until_ready=False)
    assert two.program.wait() == -signal.SIGKILL


def test_it_ignores_sigterm_and_orphans_its_runner(serve):
    one = serve(FAKE_OLLAMA_FAULTS="ignore_sigterm")
    one.program.signal(signal.SIGTERM)
    assert one.client.ps().models == [] and one.program.process.poll() is None
    two = serve(FAKE_OLLAMA_FAULTS="orphan_runner")
    two.add_tiny()
    two.load()
    runner = two.runner()
    two.program.signal(signal.SIGTERM)
    assert two.program.process.wait() == 0, "its output stays open: the runner has it"
    os.kill(runner, signal.SIGTERM)
    assert os.getsid(runner) == runner != two.program.pid and alive(runner)
    os.kill(runner, signal.SIGKILL)


@pytest.mark.parametrize("fault, message", [
    ("stream_error=1", "an error was encountered while running the model"),
    ("runner_crash", "an error was encountered while running the model: unexpected EOF"),
])
def test_an_answer_that_fails_half_way_ends_with_an_error_line(serve, fault, message):
    one = serve(FAKE_OLLAMA_FAULTS=fault)
    one.add_tiny()
    status, _, lines = one.lines("/api/generate", {"model": "tiny", "prompt": "x y z"})
    assert status == 200 and lines[0]["response"] and message in lines[-1]["error"]


def test_a_request_says_what_befalls_it_and_the_ledger_tells(serve, tmp_path):
    ledger = tmp_path / "ledger"
    one = serve(FAKE_OLLAMA_LEDGER=ledger)
    one.add_tiny()

    def ask(told):
        return one.lines("/api/generate", {"model": "tiny", "prompt": "[[%s]]" % told})
    status, _, lines = ask("mark=a tokens=3")
    assert status == 200 and len(lines) == 4 and lines[-1]["eval_count"] == 3
    status, _, lines = ask("mark=b tokens=3 fail_after=2")
    assert [("response" in line, "error" in line) for line in lines] == [(True, False)] * 2 + [(False, True)]
    assert ask("mark=c fail_after=0")[0] == 500
    with pytest.raises((OSError, http.client.HTTPException)):
        ask("mark=d tokens=3 cut_after=1")
    runner = one.runner()
    with pytest.raises((OSError, http.client.HTTPException)):
        ask("mark=e tokens=3 die_after=2")
    one.program.process.wait()
    os.kill(runner, signal.SIGKILL)  # as the real one's, it stays
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [(row["load"], row["seconds"] > 0) for row in rows if "load" in row] == [("tiny:latest", True)]
    assert [(row["mark"], row["sent"], row["end"]) for row in rows if "mark" in row] == [
            ("a", 3, "stop"), ("b", 2, "error"), ("c", 0, "error"), ("d", 1, "cut"), ("e", 2, "died")]


def test_a_stream_of_v1_swallows_the_error(serve):
    one = serve(FAKE_OLLAMA_FAULTS="stream_error=1")
    one.add_tiny()
    _, kind, text = one.ask("POST", "/v1/chat/completions", {
        "model": "tiny", "stream": True, "messages": [{"role": "user", "content": "x"}]})
    last = json.loads(text.strip().split("\n\n")[-1][len("data: "):])
    assert kind == "text/event-stream" and "[DONE]" not in text
    assert last["model"] == "" and last["choices"][0]["finish_reason"] is None


def test_a_load_that_fails_is_a_500_and_one_that_is_cut_is_no_answer(serve):
    one = serve(FAKE_OLLAMA_FAULTS="load_fail")
    one.add_tiny()
    with pytest.raises(ollama.ResponseError, match="llama-server process has terminated"):
        one.load()
    two = serve(FAKE_OLLAMA_FAULTS="disconnect_during_load", FAKE_OLLAMA_LOAD_S=0.1)
    with pytest.raises((ConnectionError, OSError, http.client.HTTPException)):
        two.ask("POST", "/api/generate", {"model": "tiny"})
    assert two.client.list().models != []


def test_loads_come_one_after_the_other_and_only_they_queue(serve):
    one = serve(FAKE_OLLAMA_LOAD_S=0.3, OLLAMA_MAX_QUEUE=1)
    one.add_tiny("a")
    one.client.copy("a", "b")
    one.client.create("b", from_="a", system="other")
    first = threading.Thread(target=one.load, args=("a",))
    first.start()
    wait_until(lambda: children(one.program.pid), "a runner")
    status, _, text = one.ask("POST", "/api/generate", {"model": "b"})
    first.join()
    assert status == 503 and "server busy, please try again.  maximum pending requests" in text
    assert [model.model for model in one.client.ps().models] == ["a:latest"]


def test_a_full_house_lets_the_idle_one_go(serve):
    one = serve(OLLAMA_MAX_LOADED_MODELS=1)
    one.add_tiny("a")
    one.client.create("b", from_="a", system="other")
    one.load("a")
    one.load("b")
    assert [model.model for model in one.client.ps().models] == ["b:latest"]


def test_what_hangs_hangs(serve):
    one = serve(FAKE_OLLAMA_FAULTS="hang_generate,pull_stall")
    one.add_tiny()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", one.port, timeout=0.5)) as there:
        there.request("POST", "/api/generate", '{"model": "tiny", "prompt": "x"}')
        with pytest.raises(socket.timeout):
            there.getresponse()
    assert len(one.client.ps().models) == 1, "all else still answers"
    pulled = one.client.pull("smollm2:135m", stream=True)
    seen = [next(pulled) for _ in range(6)]
    assert seen[-1].completed == seen[-2].completed == seen[-1].total // 2
    pulled.close()
    two = serve(FAKE_OLLAMA_FAULTS="hang_http=0", until_ready=False)
    two.program.wait_line("Listening on")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", two.port, timeout=0.2)) as there:
        there.request("GET", "/")
        with pytest.raises(socket.timeout):
            there.getresponse()


def test_a_stand_in_costs_little_to_start(serve):
    one = serve()
    with open("/proc/%d/stat" % one.program.pid) as handle:
        ticks = handle.read().rpartition(")")[2].split()[11:13]
    spent_s = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    assert spent_s < 0.5, "measured: 0.05 s"


# ---------------------------------------------------------------------- vLLM and SGLang

@pytest.fixture
def model_folder(tmp_path):
    """What the stand-ins take for a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 512}')
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    return folder


@pytest.fixture
def engine(home, tmp_path):
    """engine(name, *arguments, port=…, **environment) -> (Program, port); all end with the test."""
    started = []
    folder = engines.stand_in(tmp_path / "bin", "vllm", "sglang")

    def start(name, model, *arguments, port=None, **extra):
        port = port or free_port()
        flags = [str(model)] if name == "vllm" else ["--model-path", str(model)]
        program = Program([os.path.join(folder, name), "serve", *flags, "--host", "127.0.0.1",
                           "--port", str(port), *arguments], environment(home, **extra))
        started.append(program)
        return program, port

    yield start
    for program in started:
        program.__exit__()


JSON = (("Content-Type", "application/json"),)


def until_healthy(port):
    wait_until(lambda: http_answers(port, "/health") == 200, "healthy")


NO_WAIT = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_the_openai_client_works_with_an_engine(engine, model_folder, name):
    program, port = engine(name, model_folder, "--served-model-name", "tiny", "--api-key", "secret",
                           **NO_WAIT)
    until_healthy(port)
    url = "http://127.0.0.1:%d/v1" % port
    with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        messages = [{"role": "user", "content": "hello there"}]
        whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
        assert whole.usage.completion_tokens == 4 and whole.choices[0].finish_reason == "length"
        chunks = list(client.chat.completions.create(model="tiny", messages=messages, stream=True))
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert client.completions.create(model="tiny", prompt="x").choices[0].text == "You said: x"
        if name == "vllm":
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model=UNKNOWN, messages=messages)
    with openai.OpenAI(base_url=url, api_key="other", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    workers = children(program.pid)
    assert any({"vllm": "EngineCore", "sglang": "scheduler"}[name] in line
               for line in workers.values())
    assert program.stop() == 0
    wait_until(lambda: not any(alive(pid) for pid in workers), "the workers have ended")


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_nothing_listens_while_it_loads(engine, model_folder, name):
    program, port = engine(name, model_folder, FAKE_ENGINE_LOAD_S=0.5, **NO_WAIT)
    program.wait_line("10% Completed")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    until_healthy(port)
    assert http_answers(port, "/ready") == {"vllm": 404, "sglang": 200}[name]


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_unknown_flags_and_models_end_it(engine, model_folder, name):
    program, _ = engine(name, model_folder, "--no-such-flag")
    assert program.wait() == 2 and "unrecognized arguments: --no-such-flag" in program.text()
    program, _ = engine(name, "acme/model")
    assert program.wait() == 1 and "config.json" in program.text()


def test_vllm_notices_a_port_that_was_taken_meanwhile_only_after_loading(engine, model_folder):
    program, port = engine("vllm", model_folder, FAKE_ENGINE_LOAD_S=0.5)
    program.wait_line("10% Completed")
    with socket.create_server(("127.0.0.1", port)):
        assert program.wait() == 1
    assert "90% Completed" in program.text() and "Address already in use" in program.text()
    with socket.create_server(("127.0.0.1", port)):
        program, _ = engine("vllm", model_folder, port=port, FAKE_ENGINE_LOAD_S=0.5)
        assert program.wait() == 1 and "10%" not in program.text()


def test_vllm_ends_when_its_engine_dies(engine, model_folder):
    program, port = engine("vllm", model_folder, FAKE_ENGINE_FAULTS="worker_crash",
                           FAKE_ENGINE_POLL_S=1)
    until_healthy(port)
    status, _, text = ask(port, "POST", "/v1/completions", {"model": str(model_folder), "prompt": "x"},
                          headers=JSON)
    assert status == 500 and "EngineCore encountered an issue" in text
    assert http_answers(port, "/health") == 503
    assert program.wait() == 1


def test_sglang_drains_and_vllm_aborts(engine, model_folder):
    for name, finished in (("sglang", True), ("vllm", False)):
        flags = ["--enable-metrics"] if name == "sglang" else []
        program, port = engine(name, model_folder, *flags, FAKE_ENGINE_TOKEN_S=0.2, **NO_WAIT)
        until_healthy(port)
        ends = []

        def generate(port=port, ends=ends):
            try:
                ends.append(ask(port, "POST", "/v1/completions", {"prompt": "a b"},
                                headers=JSON)[0])
            except (OSError, http.client.HTTPException):
                ends.append(None)
        thread = threading.Thread(target=generate)
        thread.start()
        running = r'(?m)^(vllm:num_requests_running|sglang:num_running_reqs)\{.*\} 1\.0$'
        wait_until(lambda: re.search(running, ask(port, "GET", "/metrics")[2]), "a running request")
        assert program.stop() == 0
        thread.join()
        assert (ends == [200]) is finished


def test_orphaned_workers_are_in_sessions_of_their_own(engine, model_folder):
    program, port = engine("vllm", model_folder, "--tensor-parallel-size", "2",
                           FAKE_ENGINE_FAULTS="orphan_worker")
    until_healthy(port)
    workers = children(program.pid)
    assert len(workers) == 3
    program.signal(signal.SIGTERM)
    assert program.process.wait() == 0, "its output stays open: the workers have it"
    for pid in workers:
        assert alive(pid) and os.getsid(pid) == pid
        os.kill(pid, signal.SIGKILL)


def test_sglang_can_be_started_as_a_module(home, model_folder, tmp_path):
    folder, port = engines.sglang_package(tmp_path / "packages"), free_port()
    with Program([sys.executable, "-m", "sglang.launch_server", "--model-path", str(model_folder),
                  "--port", str(port)], environment(home, PYTHONPATH=folder, **NO_WAIT)) as program:
        until_healthy(port)
        assert "recommended entrypoint" in program.text()
        assert program.stop() == 0


# ---------------------------------------------------------------------- the real ones

def completion(port, model, **more):
    status, _, text = ask(port, "POST", "/v1/chat/completions", dict({
        "model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}, **more),
        headers=JSON)
    assert status == 200, text
    return json.loads(text)


def test_the_real_llama_server_answers(home):
    port = free_port()
    with Program([engines.llama_server(), "-m", engines.tiny_gguf(), "--host", "127.0.0.1", "--port",
                  str(port), "-c", "512", "-np", "1"], engines.engine_environment(home)) as program:
        until_healthy(port)
        answer = completion(port, "tiny")
        assert answer["usage"]["completion_tokens"] == 8
        text = answer["choices"][0]["message"]["content"]
        assert len(text) == 8 and text.isalpha() and text.islower()
        with open("/proc/%d/comm" % program.pid) as handle:
            assert handle.read() == "llama-server\n", "no shell and no chroot stand in between"
        assert program.stop() == 0


def test_the_real_mlx_server_answers(home):
    port = free_port()
    with Program([engines.mlx_server(), "--model", engines.tiny_mlx(), "--host", "127.0.0.1",
                  "--port", str(port)], engines.engine_environment(home)) as program:
        until_healthy(port)
        answer = completion(port, "default_model")
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["choices"][0]["message"]["content"].isalpha()
        program.stop()


@pytest.mark.timeout(600)
def test_the_real_vllm_answers(home):
    port = free_port()
    with Program([engines.vllm(), "serve", engines.tiny_safetensors(), "--host", "127.0.0.1",
                  "--port", str(port), "--served-model-name", "tiny", "--enforce-eager",
                  "--max-model-len", "256"], engines.vllm_environment(home)) as program:
        wait_until(lambda: http_answers(port, "/health") == 200, "vLLM is healthy", 400)
        assert completion(port, "tiny")["usage"]["completion_tokens"] == 8
        assert program.stop() == 0
