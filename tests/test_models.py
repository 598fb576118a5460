"""Models through an Ollama (tests/fake_ollama.py), and what is remembered of them."""
import contextlib
import gc
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import types
import weakref

import pytest

import b9agent
from b9agent import (EngineConflict, EngineMissing, Endpoint, Log, ModelBook, ModelError,
                     ModelFacts, ModelMissing, ModelRefused, ModelUnreachable, OllamaApi,
                     Transfers, TransfersFull, UsageError, convert_command, convert_work,
                     file_records, http_stream, import_work, model_key, model_list,
                     note_ollama_model, parse_model_name, pull_work, read_model,
                     split_model_name, store_folder, verify_entry)
from helpers import HERE, PATIENCE_S, Program, environment, wait_until

FAKE = os.path.join(HERE, "fake_ollama.py")


class Ollama:
    """The stand-in as a process.  api, store, program; start() again keeps the port."""

    def __init__(self, home, **variables):
        self.home, self.variables, self.port = home, variables, 0
        self.store = os.path.join(str(home), ".ollama", "models")
        self.program = None

    def start(self):
        self.program = Program([sys.executable, FAKE, "serve"], environment(
            self.home, OLLAMA_HOST="127.0.0.1:%d" % self.port, **self.variables))
        match, _ = self.program.wait_line(r"Listening on 127\.0\.0\.1:(\d+)")
        self.port = int(match.group(1))
        self.api = OllamaApi(Endpoint("http", "127.0.0.1", self.port))
        return self

    def manifest(self, *parts):
        return os.path.join(self.store, "manifests", *parts)

    def requests(self, path):
        return [line for line in self.program.lines("out") if '"%s' % path in line]


@pytest.fixture
def ollama(home):
    """ollama(**variables): a running one; all end with the test."""
    started = []

    def start(**variables):
        started.append(Ollama(home, **variables).start())
        return started[-1]
    yield start
    for one in started:
        one.program.__exit__()


@pytest.fixture
def transfers():
    known = Transfers()
    yield known
    assert known.cancel_all(PATIENCE_S)


def test_a_pull_without_a_thread_never_was(transfers, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(threading.Thread, "start", refuse)
        transfers.begin("m", "pull", "", lambda _transfer: None)
    assert transfers.get("m") is None and not transfers.any_runs()
    assert ended(transfers.begin("m", "pull", "", lambda _transfer: None)).state == "success"


@contextlib.contextmanager
def scripted(*answers):
    """(Endpoint, what was asked): the first connection gets the first answer, bytes, and so on; the
    last one is given for ever."""
    listener = socket.create_server(("127.0.0.1", 0))
    asked = []

    def serve():
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):  # who has heard enough resets it
                asked.append(sock.recv(65536))
                sock.sendall(answers[min(len(asked), len(answers)) - 1])
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
            asked.append(b"closed")
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield Endpoint("http", "127.0.0.1", listener.getsockname()[1]), asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


HEAD = b"HTTP/1.1 200 OK\r\n"


def answer_of(*lines, end=True):
    """A pull's answer; without `end` it is cut off."""
    body = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
                    for line in lines)
    return HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body) + (0 if end else 5), body)


def ended(transfer):
    transfer.thread.join(PATIENCE_S)
    assert not transfer.thread.is_alive()
    return transfer.progress


def pull(transfers, one, name, who="me"):
    return transfers.begin(model_key(name), "pull", who, pull_work(one.api, name, one.store))


def layer_line(completed, total, digest="sha256:" + "a" * 64):
    return {"status": "pulling aaaa", "digest": digest, "total": total, "completed": completed}


# -- names ---------------------------------------------------------------

@pytest.mark.parametrize("text, key", [
    ("m", "m:latest"), ("m:latest", "m:latest"), (" M:Latest\n", "m:latest"),
    ("library/m", "m:latest"), ("Library/m:8b", "m:8b"), ("m:local", "m:latest"),
    ("m:8b:local", "m:8b"), ("registry.ollama.ai/library/m", "m:latest"),
    ("REGISTRY.OLLAMA.AI/library/m:8B", "m:8b"), ("me/m", "me/m:latest"),
    ("https://registry.ollama.ai/library/m", "m:latest"),
    ("hf.co/Org/Name-GGUF:Q4_K_M", "hf.co/org/name-gguf:q4_k_m"),
    ("hf.co/library/m", "hf.co/library/m:latest"), ("llama3.2:1b-q8_0", "llama3.2:1b-q8_0"),
    ("m" * 80, "m" * 80 + ":latest"), ("_m", "_m:latest"), ("m:clouds", "m:clouds"),
    ("cloud", "cloud:latest"), ("m-cloud", "m-cloud:latest")])
def test_a_model_has_one_key_however_it_is_spelt(text, key):
    assert parse_model_name(text).key == key == model_key(text)


@pytest.mark.parametrize("text", [
    "", " ", "/", "m:", ":m", "a//b", "a/b/c/d", "m m", "m\nm", "../m", "m/../../etc", ".m", "-m", 
    "m:-q", "m@sha256:00", "hf.co/m", "http://hf.co/a/m", "é", "m" * 81, "m:" + "t" * 81, "m:a:b",
    "x" * 100000, "m\0", "\ud800"])
def test_what_is_no_name_is_refused_with_an_example(text):
    with pytest.raises(UsageError) as refused:
        parse_model_name(text)
    assert "llama3.2" in refused.value.hint and len(refused.value.what) < 500


@pytest.mark.parametrize("text", ["m:cloud", "m:CLOUD", "m:8b-cloud", " m:8b-Cloud ", "me/m:cloud",
                                  "m:8b:cloud", "m:cloud:local", "m: cloud"])
def test_a_name_that_would_run_elsewhere_never_reaches_the_engine(text):
    api = OllamaApi(Endpoint("http", "127.0.0.1", 1))  # asking it would be ModelUnreachable
    for do in (api.load, api.show, lambda name: pull_work(api, name)):
        with pytest.raises(UsageError) as refused:
            do(text)
        assert refused.value.exit_code == b9agent.Exit.USAGE


def test_a_stub_of_a_model_elsewhere_is_not_loaded():
    stub = HEAD + b"\r\n" + json.dumps({"remote_host": "https://ollama.com:443"}).encode()
    with scripted(stub) as (endpoint, asked):
        with pytest.raises(UsageError):
            OllamaApi(endpoint).load("innocent")
    assert [head.split()[1] for head in asked if head != b"closed"] == [b"/api/show"]


def test_a_registry_that_nobody_allowed_is_refused():
    with pytest.raises(UsageError) as refused:
        parse_model_name("models.example:5000/me/m")
    assert "models.example:5000" in refused.value.what and "hf.co" in refused.value.hint
    name = parse_model_name("models.example:5000/me/M", ["models.example:5000"])
    assert name == ("models.example:5000", "me", "M", "latest")
    assert name.key == model_key("models.example:5000/me/M")


def test_any_text_is_a_name_or_is_refused():
    hypothesis = pytest.importorskip("hypothesis")
    text = hypothesis.strategies.text

    @hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=150)
    @hypothesis.given(text(max_size=40) | text("ab/:.-_ LOCloud", max_size=20))
    def check(text):
        key = model_key(text)
        try:
            assert parse_model_name(text).key == key == model_key(key)
        except UsageError:
            pass
    check()


# -- the API -------------------------------------------------------------

def test_a_model_is_pulled_loaded_unloaded_and_deleted(ollama, transfers):
    one = ollama()
    assert one.api.version() == "0.33.0" and not one.api.has("tiny")
    assert ended(pull(transfers, one, "tiny")).state == "success"
    assert one.api.has("TINY:latest") and not one.api.has("tiny:other")
    one.api.load("tiny")
    assert [row["name"] for row in one.api.loaded()] == ["tiny:latest"]
    assert one.api.loaded()[0]["expires_at"] > "2300"  # to stay
    assert one.api.generate_token("tiny") == "You"
    one.api.unload("library/Tiny")
    assert one.api.loaded() == []
    one.api.unload("tiny")  # again
    one.api.delete("tiny")
    assert one.api.tags() == []


def test_a_model_that_only_embeds_is_loaded_by_an_embedding(ollama, transfers):
    one = ollama()
    ended(pull(transfers, one, "nomic-embed-text"))
    one.api.load("nomic-embed-text")
    assert [row["name"] for row in one.api.loaded()] == ["nomic-embed-text:latest"]


def test_a_model_that_is_not_there_is_told_in_ollamas_words(ollama):
    one = ollama()
    for do in (one.api.show, one.api.load, one.api.unload, one.api.delete):
        with pytest.raises(ModelMissing) as missing:
            do("nope")
        assert "not found" in missing.value.what and "pull nope" in missing.value.hint


def test_a_model_that_does_not_load_is_told_in_ollamas_words(ollama, transfers):
    one = ollama(FAKE_OLLAMA_FAULTS="load_fail")
    ended(pull(transfers, one, "tiny"))
    with pytest.raises(ModelError) as failed:
        one.api.load("tiny")
    assert "llama-server process has terminated" in failed.value.what


def test_who_does_not_answer_and_who_is_no_ollama_are_told_apart(ollama):
    with pytest.raises(ModelUnreachable) as nobody:
        OllamaApi(Endpoint("http", "127.0.0.1", 1)).version()
    assert nobody.value.kind == "refused" and "127.0.0.1:1" in nobody.value.what
    page = b"HTTP/1.1 404 Not Found\r\nContent-Length: 18\r\n\r\n404 page not found"
    with scripted(page) as (endpoint, _):
        with pytest.raises(ModelError) as other:
            OllamaApi(endpoint).show("m")
    assert type(other.value) is ModelError
    with scripted(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n") as (endpoint, _):
        with pytest.raises(ModelRefused):
            OllamaApi(endpoint).tags()
    for body in (b"[1]", b"null", b"{", b'{"models":7}', b"\xff"):
        with scripted(HEAD + b"\r\n" + body) as (endpoint, asked):
            with pytest.raises(ModelError, match="no list of models"):
                OllamaApi(endpoint).tags()
        assert b"\r\nHost: 127.0.0.1:%d\r\n" % endpoint.port in asked[0]
    for body in (b'{"models":[]}', b'{"models":[1,{},{"name":2}]}'):
        with scripted(HEAD + b"\r\n" + body) as (endpoint, asked):
            assert OllamaApi(endpoint).tags() == []
        assert b"\r\nHost: 127.0.0.1:%d\r\n" % endpoint.port in asked[0]


def test_a_busy_model_is_told_and_goes_with_its_last_request(ollama, transfers):
    one = ollama(FAKE_OLLAMA_TOKENS=600, FAKE_OLLAMA_TOKEN_S=0.1)
    ended(pull(transfers, one, "tiny"))
    one.api.load("tiny")
    body = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    with http_stream("POST", one.api.endpoint, "/api/generate", {}, body, 20, 20) as stream:
        next(stream.lines())  # it generates
        with pytest.raises(EngineConflict) as busy:
            one.api.unload("tiny", 0.2)
        assert "still in memory" in busy.value.what and "A request holds it" in busy.value.hint
        assert one.api.loaded() != []
    one.api.unload("tiny", PATIENCE_S)  # its client has left
    assert one.api.loaded() == []


def test_names_that_others_made_do_not_stand_in_the_way(ollama, transfers):
    one = ollama()
    ended(pull(transfers, one, "tiny"))
    made = one.manifest("reg.example", "a", "b")
    shutil.copytree(one.manifest("registry.ollama.ai", "library", "tiny"), made)
    shutil.copy(os.path.join(made, "latest"), os.path.join(made, "8b-cloud"))
    with open(os.path.join(made, "8b-cloud"), "a") as handle:
        handle.write("\n")  # another digest
    one.api.load("reg.example/a/b")
    assert one.api.has("REG.example/a/b")
    one.api.unload("reg.example/a/b")
    assert one.api.loaded() == []
    book = ModelBook(str(one.home) + "/models.json", Log(stream=io.StringIO()))
    assert note_ollama_model(book, one.api, "reg.example/a/b", one.store) == ""
    assert {row["name"] for row in model_list(one.api, book)} == {
        "tiny:latest", "reg.example/a/b:latest", "reg.example/a/b:8b-cloud"}


# -- pulls ---------------------------------------------------------------

def test_a_pull_is_measured_layer_by_layer(ollama, transfers):
    one = ollama(FAKE_OLLAMA_LAYER_BYTES=2000000, FAKE_OLLAMA_RATE=1000000)
    transfer = pull(transfers, one, " tiny ", who="alice")
    assert transfer.thread.name == "pull tiny:latest"
    seen, at = [], []
    for progress in transfer.watch():
        seen.append(progress)
        at.append(time.monotonic())
    last = seen[-1]
    assert last[:4] == ("tiny:latest", "pull", "success", "success"), last
    assert last.who == "alice" and last.started.endswith("Z") and last.message == ""
    assert last.completed_bytes == last.total_bytes >= last.layers[0].total_bytes > 2000000
    assert last.total_bytes == sum(layer.total_bytes for layer in last.layers)
    done = [progress.completed_bytes for progress in seen]
    assert done == sorted(done) and len(set(done)) > 2
    assert len(seen) <= 3 + (at[-1] - at[0]) / 0.19  # five a second
    rates = [progress.rate_bytes_s for progress in seen if progress.rate_bytes_s]
    assert rates and all(100000 < rate < 5000000 for rate in rates)
    assert all(progress.remaining_s < 20 for progress in seen if progress.remaining_s is not None)


def test_what_was_there_already_does_not_count_as_speed(ollama, transfers):
    one = ollama(FAKE_OLLAMA_LAYER_BYTES=20000000)
    ended(pull(transfers, one, "tiny"))
    again = ended(pull(transfers, one, "tiny"))
    assert again.state == "success" and not again.rate_bytes_s


def test_a_pull_outlives_the_server_that_it_began_with(ollama, transfers):
    one = ollama(FAKE_OLLAMA_LAYER_BYTES=3000000, FAKE_OLLAMA_RATE=1500000)
    transfer = pull(transfers, one, "tiny")
    wait_until(lambda: transfer.progress.completed_bytes > 500000, "some of it came")
    os.kill(one.program.pid, signal.SIGKILL)
    one.program.wait()
    kept = [name for name in os.listdir(one.store + "/blobs") if name.endswith("-partial-0")]
    with open(os.path.join(one.store, "blobs", kept[0])) as handle:
        text = handle.read()  # empty where the kill fell between two of its writes
    wait_until(lambda: "trying again" in transfer.progress.status, "it is told")
    shown = transfer.progress.completed_bytes
    before = min(shown, json.loads(text)["Completed"]) if text.endswith("}") else 0
    one.program.__exit__()
    one.start()
    lines = [progress for progress in transfer.watch(600)]
    assert lines[-1].state == "success", lines[-1]
    after = [progress.completed_bytes for progress in lines if "again" not in progress.status]
    assert min(after) >= before > 0 or not text.endswith("}")  # gone on, not anew
    with open(one.manifest("registry.ollama.ai", "library", "tiny", "latest")) as handle:
        assert "layers" in json.load(handle)


def test_a_pull_that_is_cut_goes_on(ollama, transfers):
    one = ollama(FAKE_OLLAMA_FAULTS="pull_cut=2")
    assert ended(pull(transfers, one, "tiny")).state == "success"
    wait_until(lambda: len(one.requests("/api/pull")) >= 2, "it asked again")


def test_a_pull_that_brings_nothing_is_given_up(transfers, monkeypatch):
    monkeypatch.setattr(b9agent, "PULL_TRIES", 2)
    cut = answer_of({"status": "pulling manifest"}, layer_line(5, 10), end=False)
    with scripted(cut) as (endpoint, asked):
        transfer = transfers.begin("m", "pull", "", pull_work(OllamaApi(endpoint), "m"))
        last = ended(transfer)
        assert last.state == "error" and "broke off" in last.message and "cut off" in last.message
        assert len([head for head in asked if head != b"closed"]) == 2
        assert isinstance(transfer.error, ModelError) and last.completed_bytes == 5


def test_only_success_is_success(transfers, monkeypatch):
    monkeypatch.setattr(b9agent, "PULL_TRIES", 1)
    good, whole = {"status": "success"}, layer_line(10, 10)
    for answer, state, words in (
            (answer_of(whole, good), "success", ""),
            (answer_of(good, end=False), "success", ""),
            (answer_of(whole), "error", "without `success`"),
            (answer_of(whole, {"status": "Success"}), "error", "without `success`"),
            (answer_of(), "error", "without `success`"),
            (answer_of(whole, {"error": "no\x1b[2J space"}, good), "error", "no\\x1b[2J space"),
            (answer_of({"status": "success", "error": {"code": 7}}), "error", "7"),
            (answer_of(whole, end=False), "error", "broke off"),
            (HEAD + b"Content-Length: 3000000\r\n\r\n" + b"x" * 3000000, "error", "a line of more"),
            (b"nonsense\r\n\r\n", "error", "not an HTTP answer")):
        with scripted(answer) as (endpoint, _):
            last = ended(transfers.begin("m", "pull", "", pull_work(OllamaApi(endpoint), "m")))
            assert last.state == state and words in last.message, (answer[:200], last)


def test_an_error_inside_a_200_is_an_error(ollama, transfers):
    one = ollama(FAKE_OLLAMA_FAULTS="pull_error=1", FAKE_OLLAMA_RATE=400000)
    last = ended(pull(transfers, one, "tiny"))
    assert last.state == "error" and "max retries exceeded" in last.message
    assert 0 < last.completed_bytes < last.total_bytes
    assert ended(pull(transfers, one, "tiny")).state == "success"  # what came was kept
    transfer = pull(transfers, one, "no-such-model")
    assert ended(transfer).state == "error"
    assert isinstance(transfer.error, ModelMissing) and "does not exist" in transfer.error.what


def test_what_came_damaged_is_an_error(ollama, transfers):
    one = ollama(FAKE_OLLAMA_FAULTS="pull_digest")
    assert "digest mismatch" in ended(pull(transfers, one, "tiny")).message


def test_joined_pulls_are_one_and_end_together(ollama, transfers):
    one = ollama(FAKE_OLLAMA_FAULTS="pull_stall")
    first = pull(transfers, one, "tiny", "a")
    assert first is pull(transfers, one, "library/TINY:latest", "b")
    assert first.progress.who == "a"
    ends = []
    readers = [threading.Thread(target=lambda: ends.append(list(first.watch(0.05))[-1].state))
               for _ in range(2)]
    for reader in readers:
        reader.start()
    leaving = first.watch()
    next(leaving)
    leaving.close()  # one who leaves stops nobody
    wait_until(lambda: first.progress.completed_bytes, "it runs")
    assert transfers.cancel("tiny:latest") and first.cancelled
    for reader in readers:
        reader.join(PATIENCE_S)
    assert ends == ["cancelled", "cancelled"] and first.progress.message == ""
    assert not transfers.cancel("tiny:latest") and not transfers.cancel("other")
    wait_until(lambda: one.requests("/api/pull"), "Ollama saw it end")  # logged at its end
    assert len(one.requests("/api/pull")) == 1


def test_a_pull_that_waits_for_its_next_try_is_cancelled_at_once(transfers):
    with scripted(answer_of(end=False)) as (endpoint, _):
        transfer = transfers.begin("m", "pull", "", pull_work(OllamaApi(endpoint), "m"))
        wait_until(lambda: "(3 of 5)" in transfer.progress.status, "a long pause")
        began = time.monotonic()
        transfer.cancel()
        assert ended(transfer).state == "cancelled" and time.monotonic() - began < 1.9


def test_a_slow_reader_misses_steps_and_never_the_end(ollama, transfers):
    one = ollama(FAKE_OLLAMA_RATE=300000)
    transfer = pull(transfers, one, "tiny")
    watch = transfer.watch()
    assert next(watch).state == "running"
    ended(transfer)
    assert [progress.state for progress in watch] == ["success"]
    assert [progress.state for progress in transfer.watch()] == ["success"]  # and who comes late


def test_who_waits_hears_that_nothing_changed(ollama, transfers):
    one = ollama(FAKE_OLLAMA_FAULTS="pull_stall")
    transfer = pull(transfers, one, "tiny")
    beats = 0
    for progress in transfer.watch(0.05):  # the same line comes every 0.06 s
        beats += progress is None
        if beats == 3:
            transfer.cancel()
    assert progress.state == "cancelled"


def test_few_run_at_once_and_few_are_remembered(transfers):
    gate = threading.Event()
    try:
        for number in range(4):
            transfers.begin("m%d" % number, "pull", "", lambda transfer: gate.wait(PATIENCE_S))
        with pytest.raises(TransfersFull) as full:
            transfers.begin("m4", "pull", "", lambda transfer: None)
        assert "4 pulls" in full.value.what
        with pytest.raises(EngineConflict):
            transfers.begin("m0", "import", "", lambda transfer: None)
        assert transfers.begin("m0", "pull", "", lambda transfer: None) is transfers.get("m0")
        transfers.cancel("m0")
        with pytest.raises(EngineConflict):  # not joined: it will say `cancelled`
            transfers.begin("m0", "pull", "", lambda transfer: None)
    finally:
        gate.set()
    for name in ("m0", "m1", "m2", "m3"):
        ended(transfers.get(name))
    for number in range(40):
        ended(transfers.begin("x%d" % number, "pull", "", lambda transfer: None))
    names = [progress.name for progress in transfers.all()]
    assert names == ["x%d" % number for number in range(8, 40)]


def test_a_defect_of_ours_ends_a_transfer_and_nothing_else(transfers):
    last = ended(transfers.begin("m", "pull", "", lambda transfer: {}["x"]))
    assert last.state == "error" and "KeyError" in last.message and "defect" in last.message


def test_a_pull_that_cannot_fit_is_stopped_at_once(transfers, tmp_path):
    answer = answer_of({"status": "pulling manifest"}, layer_line(0, 1 << 59))
    with scripted(answer) as (endpoint, asked):
        api = OllamaApi(endpoint)
        last = ended(transfers.begin("m", "pull", "", pull_work(api, "m", str(tmp_path))))
        assert last.state == "error" and "Make room" in last.message
        assert str(tmp_path) in last.message
        wait_until(lambda: b"closed" in asked, "Ollama was let go")
        other = ended(transfers.begin("m", "pull", "", pull_work(api, "m", str(tmp_path / "none"))))
        assert "without `success`" in other.message  # a store elsewhere is not ours to judge


def test_many_layers_are_counted_and_few_are_shown(transfers):
    lines = [layer_line(3, 3, "sha256:%d" % number) for number in range(2000)]
    with scripted(answer_of(*lines, {"status": "success"})) as (endpoint, _):
        last = ended(transfers.begin("m", "pull", "", pull_work(OllamaApi(endpoint), "m")))
    assert last.state == "success" and len(last.layers) == 64 and last.total_bytes == 3 * 1024


def test_any_lines_of_a_pull_end_in_success_or_an_error():
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies
    values = some.recursive(
        some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=12),
        lambda inner: some.lists(inner, max_size=3) | some.dictionaries(
            some.text(max_size=6), inner, max_size=3), max_leaves=6)
    objects = some.fixed_dictionaries({}, optional={
        "status": some.sampled_from(["success", "pulling manifest"]) | values,
        "digest": some.sampled_from(["sha256:" + "a" * 64]) | values,
        "total": some.sampled_from([0, 9, 1 << 70, -1]) | values,
        "completed": some.sampled_from([0, 9, 1 << 70, -1]) | values,
        "error": values}).map(lambda line: json.dumps(line).encode())
    noise = some.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b""))

    @hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=150)
    @hypothesis.given(some.lists(objects | noise | some.just(b"[" * 100000), max_size=6))
    def check(lines):
        with scripted(answer_of(*lines)) as (endpoint, _):
            transfer = Transfers().begin("m", "pull", "", pull_work(OllamaApi(endpoint), "m"))
            last = ended(transfer)
        assert last.state in ("success", "error") and "defect" not in last.message
        assert json.loads(json.dumps(last)) and b9agent.printable(last.status) == last.status
        assert 0 <= last.completed_bytes <= last.total_bytes
        if last.state == "success":
            assert any(b'"success"' in line for line in lines)
        else:
            assert isinstance(transfer.error, ModelError)
    check()


# -- imports -------------------------------------------------------------

def make_gguf(path, file_type=1, weights_bytes=300000):
    """A GGUF of F16 (1) or Q8_0 (7) as the stand-in makes it."""
    import importlib.util
    spec = importlib.util.spec_from_file_location("fake_ollama_tool", FAKE)
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    raw = fake.make_gguf(fake.llama_metadata("own", file_type), weights_bytes, "own")
    with open(str(path), "wb") as handle:
        handle.write(raw)
    return ModelFacts("own", str(path), "gguf", quantization={1: "F16", 7: "Q8_0"}[file_type],
                      files=(str(path),)), hashlib.sha256(raw).hexdigest()


def test_a_gguf_file_becomes_a_model_and_is_sent_once(ollama, transfers, tmp_path):
    one = ollama()
    facts, sha256 = make_gguf(tmp_path / "own.gguf")
    size = os.path.getsize(facts.path)
    assert read_model(facts.path).quantization == "F16"
    transfer = transfers.begin("own", "import", "me", import_work(one.api, "own", facts))
    last = ended(transfer)
    assert (last.state, last.kind, last.message) == ("success", "import", "")
    assert {"hashing own.gguf", "sending own.gguf"} <= {layer.digest for layer in last.layers}
    assert all(layer.completed_bytes == layer.total_bytes for layer in last.layers)
    assert transfer.result == [{"path": facts.path, "size": size, "sha256": sha256}]
    assert one.api.generate_token("own")
    for quantize, level in (("", "F16"), ("q4_K_M", "Q4_K_M")):
        again = ended(transfers.begin("two", "import", "", import_work(
            one.api, "two", facts, quantize)))
        assert again.state == "success" and "sending own.gguf" not in {
            layer.digest for layer in again.layers}
        assert one.api.show("two")["details"]["quantization_level"] == level


def test_a_safetensors_folder_is_sent_with_what_belongs_to_it(ollama, transfers, tmp_path):
    one = ollama()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [64, 64],
                               "data_offsets": [0, 8192]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"\1" * 8192)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (tmp_path / "notes.md").write_text("not of the model")
    facts = read_model(str(tmp_path))
    transfer = transfers.begin("st", "import", "", import_work(one.api, "st", facts, "q8_0"))
    assert ended(transfer).state == "success", transfer.progress
    assert [os.path.basename(row["path"]) for row in transfer.result] == [
        "model.safetensors", "config.json", "tokenizer.json"]


@pytest.mark.parametrize("quantize, file_type, words", [
    ("q2_K", 1, "q8_0, q4_K_S, q4_K_M"), ("Q8_0", 1, "q8_0"),
    ("q8_0", 7, "only F16, BF16 and F32")])
def test_a_quantisation_that_ollama_cannot_make_is_refused_before_anything_is_done(
        tmp_path, quantize, file_type, words):
    facts, _ = make_gguf(tmp_path / "own.gguf", file_type)
    with pytest.raises(UsageError) as refused:
        import_work(OllamaApi(Endpoint("http", "127.0.0.1", 1)), "own", facts, quantize)
    assert words in str(refused.value)


def test_mlx_weights_are_refused_before_anything_is_done(tmp_path):
    with pytest.raises(UsageError):
        import_work(OllamaApi(Endpoint("http", "127.0.0.1", 1)), "own",
                    ModelFacts("own", str(tmp_path), "mlx"))


class Meddled(OllamaApi):
    """Between the hash and the upload, meddle() is called."""

    def has_blob(self, digest):
        self.meddle()
        return super().has_blob(digest)


@pytest.mark.parametrize("change, words", [
    (lambda raw: raw[:-1] + b"?", "digest mismatch"),
    (lambda raw: raw[:-9], "changed while it was sent"),
    (lambda raw: raw + b"more", "changed while it was sent"), (lambda raw: None, "No such file")])
def test_a_file_that_changes_under_an_import_is_noticed(ollama, transfers, tmp_path, change, words):
    one = ollama()
    facts, _ = make_gguf(tmp_path / "own.gguf")
    api = Meddled(one.api.endpoint)

    def meddle():
        raw = change((tmp_path / "own.gguf").read_bytes())
        if raw is None:
            os.remove(facts.path)
        else:
            (tmp_path / "own.gguf").write_bytes(raw)
    api.meddle = meddle
    last = ended(transfers.begin("own", "import", "", import_work(api, "own", facts)))
    assert last.state == "error" and words in last.message and "defect" not in last.message
    assert not one.api.has("own")


def test_an_import_is_cancelled_while_it_hashes(ollama, transfers, tmp_path):
    one = ollama()
    facts, _ = make_gguf(tmp_path / "own.gguf", weights_bytes=5000000)
    work = import_work(one.api, "own", facts)

    def cancelled_work(transfer):
        transfer.cancel()
        work(transfer)
    assert ended(transfers.begin("own", "import", "", cancelled_work)).state == "cancelled"
    assert one.requests("/api/blobs") == []


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(UsageError) as refused:
        file_records(ModelFacts("x", "/none", "gguf", files=(str(tmp_path / "none.gguf"),)))
    assert "none.gguf" in refused.value.what


def test_a_conversion_is_run_or_its_tool_is_named(transfers, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder) + ":/usr/bin:/bin")
    target = str(tmp_path / "out")
    with pytest.raises(EngineMissing) as missing:
        convert_work("org/m", target)
    assert "pip install mlx-lm" in missing.value.hint and "--hf-path=org/m" in missing.value.hint
    tool = folder / "mlx_lm.convert"
    tool.write_text('#!/bin/sh\nmkdir "${2#--mlx-path=}" && echo "$@"\necho "no such model"\n'
                    'case $1 in *bad) exit 3;; esac\n')
    tool.chmod(0o755)
    work = convert_work("org/m", target)
    assert ended(transfers.begin("m", "convert", "", work)).state == "success"
    assert os.path.isdir(target) and convert_command("a", "b")[3:] == ["-q"]
    with pytest.raises(UsageError):
        convert_work("org/m", target)  # there already
    last = ended(transfers.begin("m", "convert", "", convert_work("bad", target + "2", False)))
    assert (last.state, last.message) == ("error", "mlx_lm.convert: no such model")


# -- the book ------------------------------------------------------------

@pytest.fixture
def log():
    return Log(stream=io.StringIO())


def said(log):
    return log._stream.getvalue()


def test_the_book_is_kept_private_and_read_again(tmp_path, log):
    path = str(tmp_path / "models.json")
    book = ModelBook(path, log)
    assert not os.path.exists(path)
    book.note("m:latest", engine="ollama", license="mit", pulled_by="alice")
    book.note("m:latest", license=None, base_model="b")
    book.used("m:latest")
    entry = ModelBook(path, log).entries()["m:latest"]
    stamps = entry.pop("first_served_at"), entry.pop("last_used_at")
    assert stamps[0] == stamps[1] and stamps[0].endswith("Z")
    assert entry == {"name": "m:latest", "engine": "ollama", "license": "mit", "pulled_by": "alice",
                     "base_model": "b"}
    assert os.stat(path).st_mode & 0o777 == 0o600 and said(log) == ""
    inode = os.stat(path).st_ino
    book.used("m:latest")  # within the minute: no write
    assert os.stat(path).st_ino == inode
    book.forget("m:latest")
    book.forget("m:latest")
    assert ModelBook(path, log).entries() == {}


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"models": []}', '{"models": {"m": 1}}', '{"models": {"m": {}}}',
    '{"models": {"m": {"name": "m", "layers": 7}}}',
    '{"models": {"m": {"name": "m", "layers": [{"digest": "sha256:../../etc/passwd"}]}}}',
    '{"models": {"m": {"name": "m", "files": [{"path": 3, "sha256": ""}]}}}',
    '{"models": {"m": {"name": "m", "manifest_digest": "x"}}}', "[" * 100000, "\0"])
def test_a_broken_book_is_set_aside_and_told(tmp_path, log, text):
    path = tmp_path / "models.json"
    path.write_text(text)
    book = ModelBook(str(path), log)
    assert book.entries() == {} and "models_file" in said(log) and "models.json.bad" in said(log)
    assert (tmp_path / "models.json.bad").read_text() == text
    book.note("m", engine="x")
    assert list(ModelBook(str(path), log).entries()) == ["m"]


def test_a_broken_book_that_cannot_be_moved_is_never_written_over(tmp_path, log):
    path = tmp_path / "models.json"
    path.write_text("mine")
    (tmp_path / "models.json.bad").mkdir()
    book = ModelBook(str(path), log)
    book.note("m", engine="x")
    assert path.read_text() == "mine" and "nothing will be kept" in said(log)
    assert list(book.entries()) == ["m"]


def test_a_full_disk_costs_one_line_and_no_model(tmp_path, log):
    path = str(tmp_path / "models.json")
    book = ModelBook(path, log)
    book.note("a", engine="x")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        book.note("b", engine="x")
        book.note("c", engine="x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said(log).count("models_not_kept") == 1
    assert list(ModelBook(path, log).entries()) == ["a"]
    assert os.listdir(str(tmp_path)) == ["models.json"]
    book.note("d", engine="x")
    assert list(ModelBook(path, log).entries()) == ["a", "b", "c", "d"]


def test_the_book_has_an_end(tmp_path, log, monkeypatch):
    monkeypatch.setattr(b9agent, "write_atomic", lambda path, text: written.append(text))
    written = []
    book = ModelBook(str(tmp_path / "models.json"), log)
    for number in range(1004):
        book.note("m%d" % number, engine="x")
    book.note("m6", license="mit")
    names = list(book.entries())
    assert len(names) == 1000 and names[:2] == ["m4", "m5"] and names[-1] == "m6"
    monkeypatch.setattr(b9agent, "MODEL_BOOK_MAX_BYTES", 5000)
    book.note("big", license="x" * 3000)
    assert 3000 < len(written[-1]) <= 5100 and "big" in json.loads(written[-1])["models"]


def pulled(ollama, transfers, tmp_path, log, name="tiny"):
    """(Ollama, book) with one model in it."""
    one = ollama()
    assert ended(pull(transfers, one, name)).state == "success"
    book = ModelBook(str(tmp_path / "models.json"), log)
    assert note_ollama_model(book, one.api, name, one.store, pulled_by="me", pulled_at="T") == ""
    return one, book


def test_the_book_says_where_a_model_is_from(ollama, transfers, tmp_path, log):
    one, book = pulled(ollama, transfers, tmp_path, log)
    entry = ModelBook(str(tmp_path / "models.json"), log).entries()["tiny:latest"]
    with open(one.manifest("registry.ollama.ai", "library", "tiny", "latest"), "rb") as handle:
        raw = handle.read()
    manifest = json.loads(raw)
    assert entry["manifest_digest"] == hashlib.sha256(raw).hexdigest()
    assert [row["digest"] for row in entry["layers"]] == [manifest["config"]["digest"]] + [
        row["digest"] for row in manifest["layers"]]
    assert entry["layers"][1]["size_bytes"] == manifest["layers"][0]["size"]
    assert (entry["source"], entry["license"], entry["base_model"], entry["quantization"]) == (
        "registry.ollama.ai/library/tiny", "apache-2.0", "tiny:latest base", "Q8_0")
    assert (entry["pulled_by"], entry["pulled_at"]) == ("me", "T") and entry["parameters"]


def test_what_is_on_disk_is_verified_blob_by_blob(ollama, transfers, tmp_path, log):
    one, book = pulled(ollama, transfers, tmp_path, log)
    entry, counted = book.entries()["tiny:latest"], []
    assert verify_entry(entry, one.store, lambda *row: counted.append(row)) == []
    assert len({path for path, _, _ in counted}) == 6 and counted[-1][1] == counted[-1][2]
    digests = [row["digest"] for row in entry["layers"]]
    weights, template = [os.path.join(one.store, "blobs", digest.replace(":", "-"))
                         for digest in digests[1:3]]
    with open(weights, "r+b") as handle:  # one bit
        handle.seek(100000)
        byte = handle.read(1)[0]
        handle.seek(100000)
        handle.write(bytes([byte ^ 1]))
    os.remove(template)
    manifest = one.manifest("registry.ollama.ai", "library", "tiny", "latest")
    with open(manifest, "a") as handle:
        handle.write(" ")
    assert verify_entry(entry, one.store) == [
        (entry["manifest_digest"], manifest, "differs"), (digests[1], weights, "differs"),
        (digests[2], template, "missing")]


def test_a_store_that_cannot_be_read_is_told_and_verifies_nothing(ollama, transfers, tmp_path, log):
    one, book = pulled(ollama, transfers, tmp_path, log)
    told = note_ollama_model(book, one.api, "tiny", str(tmp_path / "elsewhere"))
    assert "elsewhere" in told and "cannot be read" in told
    entry = book.entries()["tiny:latest"]
    assert entry["layers"] == [] and len(entry["manifest_digest"]) == 64
    assert entry["pulled_by"] == "me"
    assert verify_entry(entry, str(tmp_path / "elsewhere"))[0].problem == "missing"
    assert verify_entry(entry, one.store) == []  # the layers are in the manifest, which is checked
    assert verify_entry({"name": "x", "engine": "vllm"}, one.store)[0].problem.startswith("nothing")


def test_files_of_other_engines_are_verified_too(tmp_path):
    facts, sha256 = make_gguf(tmp_path / "own.gguf")
    entry = {"name": "own", "engine": "llama-server", "files": file_records(facts)}
    assert entry["files"][0]["sha256"] == sha256 and verify_entry(entry, "/none") == []
    (tmp_path / "own.gguf").write_bytes(b"GGUF")
    assert verify_entry(entry, "/none") == [(sha256, facts.path, "differs")]
    os.remove(facts.path)
    assert verify_entry(entry, "/none") == [(sha256, facts.path, "missing")]


def test_a_name_is_found_in_the_store_as_it_is_spelt_there(ollama, transfers, tmp_path, log):
    name = "hf.co/Org/Name-GGUF:Q4_K_M"
    one = ollama(FAKE_OLLAMA_CATALOGUE=name)
    assert ended(pull(transfers, one, name)).state == "success"
    book = ModelBook(str(tmp_path / "models.json"), log)
    assert note_ollama_model(book, one.api, name.lower(), one.store) == ""
    entry = book.entries()[name.lower()]
    assert len(entry["layers"]) == 5 and verify_entry(entry, one.store) == []


def test_the_list_joins_ollama_and_the_book(ollama, transfers, tmp_path, log):
    one, book = pulled(ollama, transfers, tmp_path, log)
    ended(pull(transfers, one, "tiny:other"))
    one.api.load("tiny")
    book.used("tiny:latest")
    book.note("own", engine="vllm", license="mit")
    book.note("gone:latest", engine="ollama")
    rows = {row["name"]: row for row in model_list(one.api, book)}
    assert list(rows) == ["own", "tiny:latest", "tiny:other"]
    tiny, other = rows["tiny:latest"], rows["tiny:other"]
    assert tiny["loaded"] and tiny["vram_bytes"] == 0 and tiny["context_tokens"] == 2048
    assert tiny["license"] == "apache-2.0" and tiny["last_used_at"] and tiny["size_bytes"] > 200000
    assert tiny["digest"] == tiny["manifest_digest"] and tiny["expires_at"] > "2300"
    assert not other["loaded"] and other["vram_bytes"] is None and other["license"] is None
    assert other["last_used_at"] is None and other["quantization"] == "Q8_0"
    assert [row["name"] for row in model_list(None, book)] == ["gone:latest", "own", "tiny:latest"]


def test_the_store_is_where_ollama_says(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    assert store_folder() == str(tmp_path)
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path))
    os.makedirs(str(tmp_path / ".ollama" / "models"))
    assert store_folder() == str(tmp_path / ".ollama" / "models")


def test_a_manifest_of_any_content_is_no_exception(tmp_path):
    path = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "m"
    path.mkdir(parents=True)
    for text in ("", "{", "[]", '{"layers": 5}', '{"layers": [1, {}, {"digest": 3}]}',
                 "\0", "[" * 9999, '{"config": {"digest": "sha256:../x"}, "layers": null}'):
        (path / "latest").write_text(text)
        assert b9agent.read_layers(str(tmp_path), split_model_name("m")) == ("", [])


def test_verify_says_where_there_is_nothing_to_verify(monkeypatch, capsys):
    monkeypatch.setattr(b9agent, "call_agent", lambda *_: {"models": []})
    loaded = b9agent.load_settings({"config": os.devnull}, {})
    assert b9agent.command_models_verify(loaded, {}) == 0
    assert capsys.readouterr().out == "no models yet: b9agent.py pull NAME\n"


def test_a_transfer_that_failed_is_gone_once_nobody_has_it():
    """Its failure's frames held it, in a cycle: ten kilobytes a pull, until a full collection."""
    def work(transfer):
        raise ModelUnreachable("nothing there", "Try again", "refused")

    def ask():
        transfer = b9agent.Transfer("tiny", "pull", "somebody", work)
        transfer.thread.start()
        try:
            b9agent._transfer_answer(types.SimpleNamespace(fields={}, headers={}), transfer)
        except ModelUnreachable as error:
            assert str(error) == "nothing there. Try again"
        else:
            raise AssertionError("it did not fail")
        transfer.thread.join()
        return weakref.ref(transfer)
    gc.disable()
    try:
        assert ask()() is None
    finally:
        gc.enable()
