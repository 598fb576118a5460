"""Guards, scale to zero and the audit log where the front door has them (section 13c)."""
import contextlib
import json
import random
import threading
import time

import pytest

import b9agent
from door_rig import (COMPLETION, DONE, STOP, STREAM_HEAD, TOKEN, ScriptedEngine, chunk, read_answer,
                      token, usage, whole)
from helpers import PATIENCE_S, wait_until
from test_door import TENANTS, ollama_answer, quick, rig_at  # noqa: F401

DAY_S = 86400.0
TWO = TENANTS % b9agent.token_hash(TOKEN) + ("  - name: u\n    token_sha256: %s\n"
                                             % b9agent.token_hash("b9-of-another-tenant"))


class Clock:
    def __init__(self, at_s=1000.0):
        self.at_s = at_s

    def __call__(self):
        return self.at_s


class Gate:
    """A wake that waits until it may end, and takes so long as it says."""

    def __init__(self, took_s=12.0):
        self.begun, self.may_end, self.took_s = threading.Semaphore(0), threading.Event(), took_s

    def __call__(self, _model):
        self.begun.release()
        assert self.may_end.wait(PATIENCE_S)
        return self.took_s


def ollama(folder, **given):
    return rig_at(folder, **dict({"engine": "ollama", "models": ("m:latest", "n:latest", "o:latest"),
                                  "loaded": (), "script": ollama_answer}, **given))


def chat(model="m", **more):
    return dict({"model": model, "stream": False, "messages": [{"role": "user", "content": "x"}]}, **more)


def ask(rig, model="m", **given):
    return rig.ask(chat(model), path="/api/chat", **given)


def send(rig, stack, body, path="/api/chat", **given):
    """A request on its way; read_answer() has its answer."""
    sock = stack.enter_context(rig.connect())
    sock.sendall(rig.request(body, path=path, **given))
    return sock


def metric(rig, name):
    return sum(float(line.rpartition(" ")[2]) for line in rig.tally.lines() if line.startswith(name + "{"))


# -- loads -------------------------------------------------------------------

def test_of_200_requests_for_a_model_that_is_not_loaded_one_loads_it_and_all_are_answered(tmp_path):
    gate = Gate()
    with ollama(tmp_path) as rig, contextlib.ExitStack() as stack:
        rig.inference.on_wake = gate
        socks = [send(rig, stack, chat()) for _ in range(200)]
        wait_until(lambda: rig.door.status()["waiting"] == 200, "all wait")
        assert not rig.engine.asked, "nothing is asked before the model is there"
        gate.may_end.set()
        assert [read_answer(sock)[0] for sock in socks] == [200] * 200
        assert rig.inference.wakes == [("m:latest", ())]
        assert metric(rig, "b9agent_door_cold_starts_total") == 1
        assert metric(rig, "b9agent_door_cold_start_seconds_total") == 12


def test_a_client_that_leaves_during_a_load_leaves_it_to_whoever_comes_next(tmp_path):
    gate = Gate()
    with ollama(tmp_path) as rig, contextlib.ExitStack() as stack:
        rig.inference.on_wake = gate
        with rig.connect() as sock:
            sock.sendall(rig.request(chat(), path="/api/chat"))
            assert gate.begun.acquire(timeout=PATIENCE_S)
        wait_until(lambda: not rig.door.status()["connections"], "the client is gone")
        assert rig.door.status()["loading"] == ["m:latest"]
        later = send(rig, stack, chat())
        gate.may_end.set()
        assert read_answer(later)[0] == 200
        assert len(rig.inference.wakes) == 1 and len(rig.engine.asked) == 1


@pytest.mark.parametrize("error, status, code", [
    (b9agent.EngineError("no room on the GPU"), 502, "engine_failed"),
    (b9agent.ModelMissing("no such model"), 404, "model_not_found"),
    (ZeroDivisionError(), 500, "failed")])
def test_a_load_that_fails_is_told_to_all_who_wait_and_the_next_tries_again(tmp_path, error, status, code):
    gate = Gate()

    def fails(model):
        gate(model)
        raise error
    with ollama(tmp_path, guards_parallel_cold_starts=1) as rig, contextlib.ExitStack() as stack:
        rig.inference.on_wake = fails
        socks = [send(rig, stack, chat()) for _ in range(3)]
        wait_until(lambda: rig.door.status()["waiting"] == 3, "all wait")
        gate.may_end.set()
        answers = [read_answer(sock) for sock in socks]
        assert [(answer[0], json.loads(answer[2])["code"]) for answer in answers] == [(status, code)] * 3
        rig.inference.on_wake = lambda model: 1.0
        assert ask(rig)[0] == 200, "and its slot was given back"
        assert rig.log.defects == [] or status == 500
        rig.log.defects.clear()


def test_a_model_that_is_loaded_does_not_wait_for_the_load_of_another(tmp_path):
    gate = Gate()
    with ollama(tmp_path, slots=1) as rig, contextlib.ExitStack() as stack:
        rig.inference.on_wake = lambda model: gate(model) if model == "n:latest" else 1.0
        assert ask(rig)[0] == 200
        cold = send(rig, stack, chat("n"))
        assert gate.begun.acquire(timeout=PATIENCE_S)
        assert ask(rig)[0] == 200
        gate.may_end.set()
        assert read_answer(cold)[0] == 200


def test_who_waits_for_a_load_is_not_told_that_the_engine_has_no_time(tmp_path, quick):  # noqa: F811
    gate = Gate()
    with ollama(tmp_path, limits=b9agent.DoorLimits(queue_wait_s=0.1)) as rig, contextlib.ExitStack() as stack:
        rig.inference.on_wake = gate
        sock = send(rig, stack, chat())
        assert gate.begun.acquire(timeout=PATIENCE_S)
        threading.Timer(0.5, gate.may_end.set).start()
        assert read_answer(sock)[0] == 200


def test_models_that_nobody_uses_may_make_room_the_longest_unused_first(tmp_path):
    gate = Gate()
    with ollama(tmp_path, models=("a:latest", "b:latest", "c:latest", "d:latest")) as rig, \
            contextlib.ExitStack() as stack:
        for model in "cab":
            assert ask(rig, model)[0] == 200
        rig.engine.script = lambda asked, sock: rig.engine.wait_until_left(sock)
        send(rig, stack, chat("a"))
        wait_until(lambda: rig.door.status()["streams"] == 1, "one computes")
        rig.inference.on_wake = gate
        send(rig, stack, chat("d"))
        assert gate.begun.acquire(timeout=PATIENCE_S)
        assert rig.inference.wakes[-1] == ("d:latest", ("c:latest", "b:latest"))
        gate.may_end.set()


# -- guards ------------------------------------------------------------------

def test_as_many_models_are_loaded_at_once_as_may_be(tmp_path):
    gate = Gate()
    with ollama(tmp_path, guards_parallel_cold_starts=2) as rig, contextlib.ExitStack() as stack:
        rig.inference.on_wake = gate
        socks = [send(rig, stack, chat(model)) for model in "mno"]
        assert gate.begun.acquire(timeout=PATIENCE_S) and gate.begun.acquire(timeout=PATIENCE_S)
        wait_until(lambda: rig.door.status()["waiting"] == 3, "all wait")
        assert len(rig.door.status()["loading"]) == 2
        gate.may_end.set()
        assert [read_answer(sock)[0] for sock in socks] == [200] * 3
        assert len(rig.inference.wakes) == 3


def test_the_days_seconds_of_cold_starts_are_a_limit_until_the_day_turns(tmp_path):
    wall = Clock(20000 * DAY_S + 3600)
    with ollama(tmp_path, guards_cold_start_seconds_per_day=100.0, wall=wall) as rig:
        rig.inference.on_wake = lambda model: 100.0
        assert ask(rig)[0] == 200
        status, headers, body = rig.raw(rig.request(chat("n"), path="/api/chat"))
        answer = json.loads(body)
        assert status == 429 and answer["code"] == "cold_starts"
        assert answer["details"] == {"seconds": 100.0, "budget_seconds": 100.0}
        assert 23 * 3600 <= int(headers["retry-after"]) <= 23 * 3600 + 2
        assert ask(rig)[0] == 200, "what is loaded is served"
        wall.at_s += DAY_S
        assert ask(rig, "n")[0] == 200


def test_a_model_that_is_loaded_too_often_in_an_hour_is_not_loaded_again(tmp_path):
    clock = Clock()
    with ollama(tmp_path, guards_cold_starts_per_hour=5, clock=clock) as rig:
        rig.inference.on_wake = lambda model: 60.0

        def gone():  # Ollama unloaded it, its keep-alive was over
            clock.at_s += 180
            rig.door._warm_s.clear()
            rig.target = rig.target._replace(loaded=())
        for _ in range(5):
            assert ask(rig)[0] == 200
            gone()
        status, answer = ask(rig)
        assert (status, answer["code"]) == (429, "thrash")
        assert answer["details"]["cold_starts"] == 5 and answer["details"]["cold_start_seconds"] == 300
        assert "270 s" in answer["error"], "1.5 times the gap is what it should be kept"
        assert ask(rig, "n")[0] == 200, "another model"
        clock.at_s += 3600
        assert ask(rig)[0] == 200


def test_a_model_that_left_since_anybody_looked_is_a_cold_start_as_others_are(tmp_path):
    with ollama(tmp_path, guards_cold_starts_per_hour=2) as rig:
        rig.inference.on_wake = lambda model: 60.0

        def gone(model):  # and the front door is not told before it asks
            rig.target = rig.target._replace(loaded=())
            return False
        for _ in range(2):
            assert ask(rig)[0] == 200
            rig.settled()
            rig.door._warm_s.clear()
        assert len(rig.inference.wakes) == 1, "it was there still"
        rig.inference.holds = gone
        assert ask(rig)[0] == 200
        rig.settled()
        assert len(rig.inference.wakes) == 2 and rig.guards.cold.figures()["seconds_today"] == 120
        rig.door._warm_s.clear()
        status, answer = ask(rig)
        assert (status, answer["code"]) == (429, "thrash") and len(rig.inference.wakes) == 2


def test_a_model_that_was_put_out_for_another_is_a_cold_start_however_newly_it_was_used(tmp_path):
    with ollama(tmp_path, guards_cold_start_seconds_per_day=100.0) as rig:
        rig.inference.on_wake = lambda model: 60.0
        for model in "mn":
            assert ask(rig, model)[0] == 200
            rig.settled()
            rig.target = rig.target._replace(loaded=(model + ":latest",))  # there is room for one
        assert ask(rig, "n")[0] == 200
        assert ask(rig)[1]["code"] == "cold_starts" and len(rig.inference.wakes) == 2


def test_keep_warm_auto_is_what_the_guard_advises_where_it_pays(tmp_path):
    clock = Clock()
    with ollama(tmp_path, inference_keep_warm="auto", clock=clock) as rig:
        rig.inference.on_wake = lambda model: 60.0
        for _ in range(4):
            assert ask(rig)[0] == 200
            rig.settled()
            clock.at_s += 180
            rig.door._warm_s.clear()
            rig.target = rig.target._replace(loaded=())
        assert [asked.body["keep_alive"] for asked in rig.engine.asked][0] == 301
        assert rig.engine.asked[-1].body["keep_alive"] == 271


def test_keep_warm_goes_with_each_request_of_an_ollama_and_of_no_other(tmp_path):
    keep = dict(inference_keep_warm=10.0, inference_keep_warm_models=(("n", 60.0),))
    with ollama(tmp_path, **keep) as rig:
        for model, path in (("m", "/api/chat"), ("N:latest", "/v1/chat/completions")):
            assert rig.ask(chat(model), path=path)[0] == 200
        assert [asked.body["keep_alive"] for asked in rig.engine.asked] == [11, 61]
    with rig_at(tmp_path, **keep) as rig:
        assert rig.ask(rig.chat())[0] == 200
        assert "keep_alive" not in rig.engine.asked[0].body


@pytest.mark.parametrize("given", [
    {"headers": [("X-Task-Depth", "4"), ("X-Task-Tree-Id", "a")]},
    {"body": {"_task_depth": 4, "_tree_id": "a"}}, {"body": {"_task_depth": 4}}])
def test_a_task_that_is_too_deep_is_refused(tmp_path, given):
    with rig_at(tmp_path) as rig:
        status, answer = rig.ask(rig.chat(**given.get("body", {})), headers=given.get("headers", ()))
        assert (status, answer["error"]["code"]) == (422, "task_depth")
        assert answer["error"]["details"]["depth"] == 4 and answer["error"]["details"]["max_depth"] == 4
        assert not rig.engine.asked and rig.used().get("running", 0) == 0


def test_a_tree_of_tasks_has_an_end_and_is_the_tenants_own(tmp_path):
    with rig_at(tmp_path, tenants=TWO, guards_task_tree=5) as rig:
        task = [("X-Task-Tree-Id", "t1")]
        found = [rig.ask(rig.chat(_task_depth=1), headers=task)[0] for _ in range(7)]
        assert found == [200] * 5 + [422] * 2
        assert "_task_depth" not in rig.engine.asked[0].raw.decode()
        assert rig.ask(rig.chat(), headers=task, token="b9-of-another-tenant")[0] == 200
        assert rig.ask(rig.chat(), headers=[("X-Task-Tree-Id", "t2")])[0] == 200
        assert rig.ask(rig.chat())[0] == 200, "of no tree"


@pytest.mark.parametrize("headers", [("X-Task-Depth", "-1"), ("X-Task-Depth", "deep"), ("X-Task-Depth", "1e3"),
                                     ("X-Task-Depth", ""), ("X-Task-Depth", "9" * 40)])
def test_a_depth_that_is_no_number_is_a_mistake(tmp_path, headers):
    with rig_at(tmp_path) as rig:
        assert rig.ask(rig.chat(), headers=[headers])[0] == 400


@contextlib.contextmanager
def one_under_way(rig, stack, **given):
    """A request that is computed until the end of the block."""
    begun, go_on = threading.Event(), threading.Event()

    def script(_asked, sock):
        begun.set()
        assert go_on.wait(PATIENCE_S)
        sock.sendall(whole(COMPLETION))
    rig.engine.script = script
    sock = send(rig, stack, rig.chat(), "/v1/chat/completions", **given)
    assert begun.wait(PATIENCE_S)
    rig.engine.script = ScriptedEngine.plain
    yield sock
    go_on.set()
    assert read_answer(sock)[0] == 200


KEY, RETRY = [("Idempotency-Key", "k1")], [("X-Stainless-Retry-Count", "1")]


@pytest.mark.parametrize("mode, first, second, status", [
    ("auto", (), (), 200), ("auto", (), RETRY, 409), ("auto", KEY, KEY, 409), ("auto", KEY, (), 200),
    ("auto", KEY, [("Idempotency-Key", "k2")], 200), ("payload", (), (), 409), ("payload", KEY, KEY, 409),
    ("payload", KEY, [("Idempotency-Key", "k2")], 200), ("off", KEY, KEY, 200), ("off", (), RETRY, 200)])
def test_a_retry_of_what_is_computed_still_is_refused(tmp_path, mode, first, second, status):
    with rig_at(tmp_path, tenants=TWO, guards_duplicates=mode) as rig, contextlib.ExitStack() as stack:
        with one_under_way(rig, stack, headers=first):
            found, answer = rig.ask(rig.chat(), headers=second)
            assert found == status and (status == 200 or answer["error"]["code"] == "duplicate")
            assert rig.ask(rig.chat(), headers=second, token="b9-of-another-tenant")[0] == 200
            assert rig.ask(rig.chat(seed=2), headers=second)[0] == 200, "another request"
        rig.settled()
        assert rig.ask(rig.chat(), headers=second)[0] == 200, "once that has ended"


def test_a_request_id_in_the_body_is_known_and_not_passed_on(tmp_path):
    with rig_at(tmp_path) as rig, contextlib.ExitStack() as stack:
        with one_under_way(rig, stack):
            assert rig.ask(rig.chat(request_id="r1"))[0] == 200
        assert "request_id" not in rig.engine.asked[-1].body


def leave(rig, stream=False):
    """A client that gives up."""
    asked = len(rig.engine.asked)
    with rig.connect() as sock:
        sock.sendall(rig.request(rig.chat(stream)))
        wait_until(lambda: len(rig.engine.asked) > asked, "the engine was asked")
        if stream:
            sock.recv(4096)
    rig.settled()


@pytest.mark.parametrize("mode", ["auto", "payload", "off"])
def test_what_timed_out_twice_is_not_tried_for_ever(tmp_path, monkeypatch, mode):
    clock = Clock()
    monkeypatch.setattr(b9agent, "DOOR_TIMEOUT_S", 0.0)
    with rig_at(tmp_path, tenants=TWO, clock=clock, guards_duplicates=mode) as rig:
        rig.engine.script = lambda asked, sock: rig.engine.wait_until_left(sock)
        leave(rig)
        leave(rig)
        status, headers, body = rig.raw(rig.request(rig.chat()))
        assert (status, json.loads(body)["error"]["code"]) == (429, "retries")
        assert 1 <= int(headers["retry-after"]) <= 301
        assert len(rig.engine.asked) == 2
        rig.engine.script = ScriptedEngine.plain
        assert rig.ask(rig.chat(), token="b9-of-another-tenant")[0] == 200
        assert rig.ask(rig.chat(seed=1))[0] == 200
        clock.at_s += 301
        assert rig.ask(rig.chat())[0] == 200


def test_who_gives_up_while_the_model_is_loaded_may_come_again(tmp_path, monkeypatch):
    monkeypatch.setattr(b9agent, "DOOR_TIMEOUT_S", 0.0)
    with ollama(tmp_path) as rig:
        rig.inference.on_wake = gate = Gate()
        for _ in range(4):
            with rig.connect() as sock:
                sock.sendall(rig.request(chat(), path="/api/chat"))
                wait_until(lambda: rig.door.status()["waiting"], "it waits")
            rig.settled()
        gate.may_end.set()
        assert ask(rig)[0] == 200


def test_who_stops_a_stream_that_he_reads_has_not_timed_out(tmp_path, monkeypatch):
    monkeypatch.setattr(b9agent, "DOOR_TIMEOUT_S", 0.0)

    def script(_asked, sock):
        sock.sendall(STREAM_HEAD + chunk(token()))
        return rig.engine.wait_until_left(sock)
    with rig_at(tmp_path, script=script) as rig:
        for _ in range(4):
            leave(rig, True)
        rig.engine.script = ScriptedEngine.plain
        assert rig.ask(rig.chat(True))[0] == 200


def test_with_no_retries_set_time_outs_are_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(b9agent, "DOOR_TIMEOUT_S", 0.0)
    with rig_at(tmp_path, guards_max_retries=0) as rig:
        rig.engine.script = lambda asked, sock: rig.engine.wait_until_left(sock)
        for _ in range(3):
            leave(rig)
        rig.engine.script = ScriptedEngine.plain
        assert rig.ask(rig.chat())[0] == 200


# -- an idle engine ------------------------------------------------------------

IDLE = {"inference_idle_stop": 0.2}


def test_an_idle_engine_is_stopped_and_the_next_request_starts_it(tmp_path, quick):  # noqa: F811
    with rig_at(tmp_path, **IDLE) as rig:
        wait_until(lambda: rig.inference.slept == 1, "nobody asked for anything")
        assert rig.target.state == "asleep"
        assert rig.ask(rig.chat())[0] == 200
        assert rig.inference.wakes == [("m", ())]
        wait_until(lambda: rig.inference.slept == 2, "and again")


def test_models_are_listed_while_their_engine_is_asleep(tmp_path, quick):  # noqa: F811
    with ollama(tmp_path, **IDLE) as rig:
        wait_until(lambda: rig.inference.slept == 1, "it is idle")
        for path, field, count in (("/api/tags", "models", 3), ("/api/ps", "models", 0), ("/v1/models", "data", 3)):
            status, answer = rig.ask(path=path, method="GET")
            assert status == 200 and len(answer[field]) == count
        assert not rig.inference.wakes


def test_an_engine_is_not_stopped_under_a_request(tmp_path, quick):  # noqa: F811
    with rig_at(tmp_path, **IDLE) as rig, contextlib.ExitStack() as stack:
        with one_under_way(rig, stack):
            slept = rig.inference.slept
            time.sleep(0.5)
            assert rig.inference.slept == slept
        wait_until(lambda: rig.inference.slept > slept, "after it")


def test_an_engine_that_has_other_things_to_do_is_asked_again_later(tmp_path, quick):  # noqa: F811
    with rig_at(tmp_path, **IDLE) as rig:
        rig.inference.may_doze = False
        time.sleep(0.4)
        assert not rig.inference.slept
        rig.inference.may_doze = True
        wait_until(lambda: rig.inference.slept == 1, "now it may")


def test_an_engine_with_one_model_goes_when_its_model_would(tmp_path, quick):  # noqa: F811
    with rig_at(tmp_path, inference_keep_warm=0.2) as rig:
        wait_until(lambda: rig.inference.slept == 1, "keep_warm is over")
    with ollama(tmp_path, inference_keep_warm=0.1) as rig:
        time.sleep(0.4)
        assert not rig.inference.slept, "an Ollama has its own timer for models"


def test_in_1000_random_schedules_nothing_is_stopped_under_a_request(tmp_path, quick, monkeypatch):  # noqa: F811
    """Requests of random lengths at random times around the limit, on many doors at once; the engine is
    torn down in earnest: who is asked while it sleeps fails."""
    monkeypatch.setattr(b9agent, "RELAY_SWEEP_S", 0.002)
    chance, torn = random.Random(7), []
    with contextlib.ExitStack() as stack:
        rigs = []
        for number in range(10):
            folder = tmp_path / str(number)
            folder.mkdir()
            rigs.append(stack.enter_context(rig_at(folder, inference_idle_stop=0.004,
                                                   clock=b9agent.now_s)))

        def drive(rig, seed):
            draw = random.Random(seed)

            def script(asked, sock):
                for _ in range(draw.randrange(3)):
                    if rig.target.state != "running":
                        torn.append(asked.raw)
                    time.sleep(draw.choice((0, 0.002, 0.006)))
                if rig.target.state != "running":
                    torn.append(asked.raw)
                ScriptedEngine.plain(asked, sock)
            rig.engine.script = script
            with rig.connect() as sock:
                for _ in range(100):
                    time.sleep(draw.choice((0, 0.001, 0.003, 0.004, 0.005, 0.008)))
                    sock.sendall(rig.request(rig.chat()))
                    status = read_answer(sock)[0]
                    if status != 200:
                        torn.append(status)
        threads = [threading.Thread(target=drive, args=(rig, chance.random())) for rig in rigs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torn == []
        slept = sum(rig.inference.slept for rig in rigs)
        assert slept > 50, "it was stopped %d times" % slept
        assert sum(len(rig.engine.asked) for rig in rigs) == 1000


# -- the audit log ---------------------------------------------------------------

@contextlib.contextmanager
def audited(folder, **given):
    """(rig, its lines so far)."""
    from door_rig import QuietLog
    log = b9agent.AuditLog(str(folder / "audit"), 184, QuietLog())
    log.open()

    def lines():
        return [line for line in b9agent.read_audit(str(folder / "audit"), None, None)
                if line["kind"] in ("request", "refusals")]
    try:
        with rig_at(folder, audit=log, **given) as rig:
            yield rig, lines
    finally:
        log.close()
        verdict = b9agent.verify_audit(str(folder / "audit"))
        assert verdict.ok, verdict.faults


def line_of(lines, count=1):
    wait_until(lambda: len(lines()) >= count, "%d lines" % count)
    found = lines()
    assert len(found) == count
    return found[-1]


def test_a_request_is_a_line_with_what_it_was_and_what_it_took(tmp_path):
    with audited(tmp_path, gpus=2, power=lambda: (400.0, "measured", 0.5), tenants=TWO) as (rig, lines):
        rig.target = rig.target._replace(digests={"m": "sha256:abc"})
        assert rig.ask(rig.chat(), headers=[("Idempotency-Key", "k7")])[0] == 200
        line = line_of(lines)
        assert {name: line[name] for name in (
            "tenant", "identity", "peer", "path", "task", "stream", "model", "digest", "engine", "request_id",
            "prompt_tokens", "completion_tokens", "tokens_basis", "cold", "load_ms", "outcome", "status",
            "reason", "guards", "energy_basis")} == {
            "tenant": "t", "identity": "token", "peer": "127.0.0.1", "path": "/v1/chat/completions",
            "task": "chat", "stream": False, "model": "m", "digest": "sha256:abc", "engine": "vllm",
            "request_id": "k7", "prompt_tokens": 7, "completion_tokens": 2, "tokens_basis": "engine",
            "cold": False, "load_ms": None, "outcome": "ok", "status": 200, "reason": "", "guards": [],
            "energy_basis": "measured"}
        assert line["prompt_sha256"] == b9agent.payload_hash([{"role": "user", "content": "Hello"}])
        assert "prompt" not in line and "Hello" not in json.dumps(line)
        assert 0 <= line["queued_ms"] <= line["total_ms"] and line["gpu_seconds"] > 0
        assert line["usd"] == pytest.approx(line["gpu_seconds"] * 0.0006, rel=0.01, abs=1e-8)
        assert line["energy_wh"] == pytest.approx(line["gpu_seconds"] / 2 * 400 / 3600, rel=0.01, abs=2e-6)
        assert line["co2e_g"] == pytest.approx(line["energy_wh"] * 0.5, rel=0.01, abs=2e-6)


def test_what_is_not_known_is_unknown_in_its_line(tmp_path):
    with audited(tmp_path, usd=None) as (rig, lines):
        assert rig.ask(rig.chat())[0] == 200
        line = line_of(lines)
        assert [line[name] for name in ("usd", "energy_wh", "co2e_g", "first_token_ms", "energy_basis")] == [
            None, None, None, None, ""]


def test_the_prompt_itself_is_kept_where_that_was_asked_for(tmp_path):
    with audited(tmp_path, limits=b9agent.DoorLimits(keeps_prompts=True)) as (rig, lines):
        assert rig.ask(rig.chat())[0] == 200
        assert json.loads(line_of(lines)["prompt"]) == [{"role": "user", "content": "Hello"}]


def test_streams_failures_refusals_and_those_who_leave_have_lines(tmp_path):
    with audited(tmp_path) as (rig, lines):
        assert rig.ask(rig.chat(True))[0] == 200
        line = line_of(lines)
        assert line["stream"] and 0 < line["first_token_ms"] <= line["total_ms"]
        rig.engine.script = lambda asked, sock: sock.sendall(whole({"error": "broken"}, 500))
        assert rig.ask(rig.chat())[0] == 502
        line = line_of(lines, 2)
        assert (line["outcome"], line["status"]) == ("failed", 502)
        rig.engine.script = lambda asked, sock: rig.engine.wait_until_left(sock)
        leave(rig)
        line = line_of(lines, 3)
        assert (line["outcome"], line["status"], line["reason"]) == ("left", 499, "left")
        assert rig.ask(rig.chat(model="other"))[0] == 404
        line = line_of(lines, 4)
        assert (line["outcome"], line["status"], line["reason"]) == ("refused", 404, "model_not_found")
        assert rig.ask(rig.chat(_task_depth=9))[0] == 422
        line = line_of(lines, 5)
        assert (line["outcome"], line["reason"], line["guards"]) == ("refused", "task_depth", ["task_depth"])


def test_one_whose_load_failed_has_one_line(tmp_path):
    def fails(model):
        raise b9agent.EngineError("no room")
    with audited(tmp_path, engine="ollama", models=("m:latest",), loaded=(), script=ollama_answer) as (rig, lines):
        rig.inference.on_wake = fails
        assert ask(rig)[0] == 502
        rig.inference.on_wake = lambda model: 1.0
        assert ask(rig)[0] == 200
        line_of(lines, 2)
        assert [line["reason"] for line in lines()] == ["engine_failed", ""]


def test_only_who_had_a_model_loaded_has_a_cold_start_in_his_line(tmp_path):
    gate = Gate(12.5)
    with audited(tmp_path, engine="ollama", models=("m:latest",), loaded=(), script=ollama_answer) as (rig, lines), \
            contextlib.ExitStack() as stack:
        rig.inference.on_wake = gate
        socks = [send(rig, stack, chat()) for _ in range(5)]
        wait_until(lambda: rig.door.status()["waiting"] == 5, "all wait")
        gate.may_end.set()
        assert [read_answer(sock)[0] for sock in socks] == [200] * 5
        line_of(lines, 5)
        assert sorted(line["load_ms"] or 0 for line in lines()) == [0, 0, 0, 0, 12500]
        assert sum(line["cold"] for line in lines()) == 1


def test_strangers_are_counted_and_write_no_lines(tmp_path, monkeypatch, quick):  # noqa: F811
    with audited(tmp_path) as (rig, lines):
        for _ in range(5):
            assert rig.ask(rig.chat(), token="b9-nobodys-token-at-all")[0] == 401
        assert lines() == []
        rig.door._refused_s = 0.0  # the minute is over
        line = line_of(lines)
        assert (line["kind"], line["tenant"], line["reason"], line["count"]) == ("refusals", "", "bad_token", 5)


def test_who_is_refused_all_the_time_does_not_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(b9agent, "DOOR_REFUSED_MAX", 3)
    with audited(tmp_path) as (rig, lines):
        for _ in range(8):
            assert rig.ask(rig.chat(model="none"))[0] == 404
        rig.door._refused_s = 0.0
        wait_until(lambda: any(line["kind"] == "refusals" for line in lines()), "a sum")
        assert len([line for line in lines() if line["kind"] == "request"]) == 3
        assert lines()[-1]["count"] == 5 and lines()[-1]["tenant"] == "t"


class FullDisk:
    failing = True

    def record(self, kind, fields):
        pass


@pytest.mark.parametrize("needs, status", [(True, 503), (False, 200)])
def test_what_cannot_be_recorded_is_refused_where_that_is_set(tmp_path, needs, status):
    with rig_at(tmp_path, audit=FullDisk(), limits=b9agent.DoorLimits(needs_audit=needs)) as rig:
        found, answer = rig.ask(rig.chat())
        assert found == status and (status == 200 or answer["error"]["code"] == "audit_failing")


# -- what others may do to one ------------------------------------------------------

OTHER = "b9-of-another-tenant"


def test_a_refusal_after_admission_does_not_fill_the_disk_either(tmp_path, monkeypatch):
    monkeypatch.setattr(b9agent, "DOOR_REFUSED_MAX", 3)
    with audited(tmp_path, engine="ollama", models=("m:latest",), loaded=(), script=ollama_answer,
                 guards_cold_starts_per_hour=1) as (rig, lines):
        rig.guards.thrash("m:latest").note(True, 60.0)
        for _ in range(8):
            assert ask(rig)[0] == 429
        rig.door._refused_s = 0.0
        wait_until(lambda: any(line["kind"] == "refusals" for line in lines()), "a sum")
        assert len([line for line in lines() if line["kind"] == "request"]) == 3
        assert [lines()[-1][name] for name in ("tenant", "reason", "count")] == ["t", "thrash", 5]


def test_a_line_is_of_its_own_request_whatever_comes_next_on_its_connection(tmp_path):
    with audited(tmp_path, tenants=TWO) as (rig, lines):
        may_end, soon = threading.Event(), rig.door._relay.soon

        def script(asked, sock):
            assert may_end.wait(PATIENCE_S)
            ScriptedEngine.plain(asked, sock)

        def next_request_first(function):  # it comes in the same batch of events
            for client in list(rig.door._clients):
                client.caller = client.route = None
            soon(function)
        rig.engine.script = script
        with rig.connect() as sock:
            sock.sendall(rig.request(rig.chat()))
            wait_until(lambda: rig.door.status()["streams"] == 1, "it computes")
            rig.door._relay.soon = next_request_first
            may_end.set()
            assert read_answer(sock)[0] == 200
            line = line_of(lines)
            assert (line["tenant"], line["path"]) == ("t", "/v1/chat/completions")


def test_who_wants_many_models_leaves_a_turn_to_load_to_others(tmp_path):
    loaded = []
    gates = {name + ":latest": Gate() for name in "abcx"}

    def wake(model):
        loaded.append(model[0])
        return gates[model](model)
    with ollama(tmp_path, models=tuple(gates), guards_parallel_cold_starts=1, tenants=TWO) as rig, \
            contextlib.ExitStack() as stack:
        rig.inference.on_wake = wake
        for count, name in enumerate("abc", 1):
            send(rig, stack, chat(name))
            wait_until(lambda: rig.door.status()["waiting"] == count, "it waits")
        send(rig, stack, chat("x"), token=OTHER)
        wait_until(lambda: rig.door.status()["waiting"] == 4, "all wait")
        for name in "axbc":
            wait_until(lambda: loaded[-1:] == [name], "%s is loaded, not %s" % (name, loaded[-1:]))
            gates[name + ":latest"].may_end.set()


def test_a_model_whose_answer_is_an_error_is_not_taken_to_be_loaded(tmp_path):
    def script(asked, sock):
        rig.door._warm_s["m:latest"] -= 60.0  # its load was a while ago
        rig.target = rig.target._replace(loaded=())
        sock.sendall(whole({"error": "out of memory"}, 500))
    with ollama(tmp_path, script=script) as rig:
        assert [ask(rig)[0], ask(rig)[0]] == [502, 502]
        assert len(rig.inference.wakes) == 2


def test_who_had_it_loaded_pays_nothing_while_others_compute(tmp_path):
    """One at a time: whoever had it loaded may wait for the others then."""
    ticks = []
    with ollama(tmp_path, slots=1, tenants=TWO) as rig, contextlib.ExitStack() as stack:
        rig.inference.on_wake = gate = Gate()
        may_end = threading.Event()

        def script(asked, sock):
            ticks.append(asked)
            assert may_end.wait(PATIENCE_S)
            ollama_answer(asked, sock)
        rig.engine.script = script
        first = send(rig, stack, chat())
        assert gate.begun.acquire(timeout=PATIENCE_S)
        second = send(rig, stack, chat(), token=OTHER)
        wait_until(lambda: rig.door.status()["waiting"] == 2, "both wait")
        rig.door._queue._classes["normal"].move_to_end("t")  # the other's turn is first
        gate.may_end.set()
        wait_until(lambda: ticks, "one computes")
        assert rig.ledger._running == 1, "the one that computes"
        may_end.set()
        assert [read_answer(sock)[0] for sock in (first, second)] == [200, 200]


def test_what_an_engine_with_one_model_is_not_asked_for_does_not_wake_it(tmp_path):
    with rig_at(tmp_path, models=("m",)) as rig:
        rig.target = rig.target._replace(state="asleep", loaded=())

        def wake(model):
            raise b9agent.ModelMissing("vLLM serves m alone")
        rig.inference.on_wake = wake
        assert rig.ask({"model": "m"}, path="/api/show")[0] == 200
        assert rig.inference.wakes == []


def test_a_model_that_went_while_its_request_waited_is_not_answered_by_another(tmp_path, quick):  # noqa: F811
    may_end = threading.Event()

    def script(asked, sock):
        assert may_end.wait(PATIENCE_S)
        ScriptedEngine.plain(asked, sock)
    with rig_at(tmp_path, engine="llama-server", slots=1, script=script) as rig, contextlib.ExitStack() as stack:
        first = send(rig, stack, rig.chat(), "/v1/chat/completions")
        wait_until(lambda: rig.door.status()["streams"] == 1, "one computes")
        second = send(rig, stack, rig.chat(), "/v1/chat/completions")
        wait_until(lambda: rig.door.status()["waiting"] == 1, "one waits")

        rig.target = rig.target._replace(models=("other",), loaded=("other",))
        may_end.set()
        assert read_answer(first)[0] == 200
        assert read_answer(second)[0] == 503
        assert len(rig.engine.asked) == 1


def test_what_was_counted_and_who_was_being_formed_has_a_line_when_the_door_stops(tmp_path, monkeypatch):
    begun, may_go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(b9agent, "engine_request", lambda *given: (
        begun.set(), may_go_on.wait(PATIENCE_S)))
    with audited(tmp_path) as (rig, lines):
        assert rig.ask(rig.chat(), token="b9-nobodys-token-at-all")[0] == 401
        with rig.connect() as sock:
            sock.sendall(rig.request(rig.chat(messages=[{"role": "user", "content": "x" * 200000}])))
            assert begun.wait(PATIENCE_S)
            stop, rig.door.stop = rig.door.stop, lambda: None
            stop()
        may_go_on.set()
        line_of(lines, 2)
        assert sorted((line["kind"], line["reason"]) for line in lines()) == [
            ("refusals", "bad_token"), ("request", "stopping")]


def test_a_prompt_of_megabytes_whose_sender_left_is_not_hashed_on_the_loop(tmp_path, monkeypatch):
    seen, real = [], b9agent.payload_hash
    may_go_on = threading.Event()
    monkeypatch.setattr(b9agent, "payload_hash", lambda value: (
        seen.append(threading.current_thread().name), real(value))[1])
    monkeypatch.setattr(b9agent, "engine_request", lambda *given: may_go_on.wait(PATIENCE_S))
    with audited(tmp_path, limits=b9agent.DoorLimits(keeps_prompts=True)) as (rig, lines):
        monkeypatch.setattr(b9agent, "prompt_of", lambda ask: (
            seen.append(threading.current_thread().name), ask.body["messages"])[1])
        body = rig.chat(messages=[{"role": "user", "content": "x" * 200000}])
        with rig.connect() as sock:
            sock.sendall(rig.request(body))
            wait_until(lambda: seen, "it is being formed")
        line_of(lines)
        may_go_on.set()
        assert "door" not in seen


@pytest.mark.parametrize("engine, status, wakes", [("ollama", 200, [("", ())]), ("vllm", 501, [])])
def test_models_are_managed_in_an_engine_that_sleeps(tmp_path, engine, status, wakes):
    with rig_at(tmp_path, engine=engine, script=lambda asked, sock: sock.sendall(whole({}))) as rig:
        rig.target = rig.target._replace(state="asleep", loaded=())
        assert rig.ask({"source": "m", "destination": "n"}, path="/api/copy")[0] == status
        assert rig.inference.wakes == wakes


def test_who_leaves_a_load_that_he_began_pays_until_then_and_it_counts_for_nobody_twice(tmp_path):
    gate = Gate()
    with ollama(tmp_path) as rig:
        rig.inference.on_wake = gate
        with rig.connect() as sock:
            sock.sendall(rig.request(chat(), path="/api/chat"))
            assert gate.begun.acquire(timeout=PATIENCE_S)
        wait_until(lambda: not rig.door.status()["waiting"], "the client is gone")
        assert rig.used()["gpu_seconds"] > 0 and rig.ledger._running == 0
        gate.may_end.set()
        wait_until(lambda: not rig.door.status()["loading"], "it is loaded")
        assert rig.guards.cold.figures()["active"] == 0 and rig.ledger._running == 0


def test_a_guard_that_trips_a_thousand_times_is_told_once_a_minute_and_tenant(tmp_path, monkeypatch):
    with ollama(tmp_path, tenants=TWO) as rig, contextlib.ExitStack() as stack:
        clock = Clock(b9agent.now_s())
        sock = stack.enter_context(rig.connect())

        def refused(count, depth=9):
            for _ in range(count):
                sock.sendall(rig.request(chat(_task_depth=depth), path="/api/chat"))
                assert read_answer(sock)[0] == 422

        def told():
            return [(pairs["tenant"], pairs["guard"], pairs["times"], pairs["depth"])
                    for _, event, pairs in rig.log.lines if event == "guard_tripped"]
        monkeypatch.setattr(b9agent, "DOOR_TRIP_TOLD_S", 3600.0)
        refused(200)
        assert told() == [("t", "task_depth", 1, 9)]
        ask(rig, token="b9-of-another-tenant", headers=[("X-Task-Depth", "4")])
        assert told()[1:] == [("u", "task_depth", 1, 4)]
        monkeypatch.setattr(b9agent, "DOOR_TRIP_TOLD_S", 0.0)
        refused(1, 5)
        assert told()[2:] == [("t", "task_depth", 200, 5)], "with how often it was meanwhile"


def test_an_unload_whose_answer_has_no_end_of_line_is_whole(tmp_path):
    unloaded = b'{"model":"m","response":"","done":true,"done_reason":"unload"}'
    script = lambda asked, sock: sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (
        len(unloaded), unloaded))
    with ollama(tmp_path, script=script, loaded=("m:latest",), tenants=TENANTS % b9agent.token_hash(TOKEN)) as rig:
        status, _, raw = rig.raw(rig.request({"model": "m", "keep_alive": 0}, path="/api/generate"))
        assert status == 200 and json.loads(raw)["done_reason"] == "unload", raw
        rig.settled()
        assert 'code="200"' in "".join(rig.tally.lines())
