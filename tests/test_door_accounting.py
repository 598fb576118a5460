"""What tenants are billed is what the engine sent, to the token: over thousands of mixed requests, with
clients that leave, engines that fail, hang, die and come back, and retries.

The engine (ledger_engine.py) keeps a book of its own, by the mark in each prompt; what it says there is
held against STATE/usage.json and the metrics.  B9TESTS_REQUESTS sets how many requests (6,000; with
`tests/run --all` 10,000)."""
import hashlib
import http.client
import json
import os
import random
import signal
import socket
import threading
import time

import pytest

from helpers import RunningDoor, wait_until
from ledger_engine import parse_book

REQUESTS = int(os.environ.get("B9TESTS_REQUESTS") or (
    10000 if os.environ.get("B9TESTS_HEAVY") else 6000))
PROMPT = 7  # tokens that the engine says each prompt came to; all are equally long, see padded()
TENANTS = ("ada", "bob", "eve")
KEYS = {name: hashlib.sha256(name.encode()).hexdigest() for name in TENANTS + ("restless", "small")}
pytestmark = pytest.mark.timeout(240)


def tenant(name, **limits):
    return "  - name: %s\n    token_sha256: %s\n%s" % (
        name, hashlib.sha256(KEYS[name].encode()).hexdigest(),
        "".join("    %s: %s\n" % pair for pair in limits.items()))


HIGH = {"requests_per_minute": 60000, "concurrent_requests": 1000, "tokens_per_day": 10 ** 9,
        "max_output_tokens": 1000}
EVERYBODY = "tenants:\n" + "".join(
    tenant(name, **HIGH) for name in TENANTS + ("restless",)) + tenant("small", tokens_per_day=3000)


def padded(told):
    """A prompt of always the same length, so that the door's estimate of one whose answer was cut off
    is what the engine would have said."""
    return ("[[%s]]" % told).ljust(160, ".")


class Client:
    """One kept connection, and what a client makes of the answers."""

    def __init__(self, door, model):
        self.door, self.model, self.link = door, model, None

    def body(self, path, told, stream, usage=False):
        text = padded(told)
        body = {"model": self.model, "stream": stream}
        if "embed" in path:
            return {"model": self.model, "input": text}
        if path in ("/api/generate", "/v1/completions"):
            body["prompt"] = text
        else:
            body["messages"] = [{"role": "user", "content": text}]
        if usage:
            body["stream_options"] = {"include_usage": True}
        return body

    def begin(self, key, path, body):
        """The answer's head.  A kept connection that was closed meanwhile is opened anew."""
        raw = json.dumps(body).encode()
        for turn in (1, 2):
            if self.link is None:
                self.link, turn = http.client.HTTPConnection("127.0.0.1", self.door.port, timeout=60), 2
                self.link.connect()
                self.link.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                self.link.request("POST", path, raw, {"Authorization": "Bearer " + key})
                return self.link.getresponse()
            except (ConnectionError, http.client.BadStatusLine):
                self.leave()
                if turn == 2:
                    raise

    def leave(self):
        if self.link is not None:
            self.link.close()
        self.link = None

    def whole(self, key, path, body):
        """(status, pieces that came, the error or None, whether its end was in good form)."""
        reply = self.begin(key, path, body)
        raw = reply.read()
        if reply.will_close:
            self.leave()
        return (reply.status, *judge(path, reply.getheader("Content-Type"), raw))

    def some(self, key, path, body, pieces):
        """Leave after so many pieces.  Returns those that came."""
        reply = self.begin(key, path, body)
        assert reply.status == 200
        came = 0
        while came < pieces:
            line = reply.readline()
            assert line, "it ended after %d pieces" % came
            came += b" token" in line
        reply.close()
        self.leave()
        return came


def judge(path, kind, raw):
    """(pieces, error, good form) of an answer's body."""
    if kind.startswith("application/json"):
        body = json.loads(raw)
        return raw.count(b" token"), body.get("error"), True
    if path.startswith("/api/"):
        lines = [json.loads(line) for line in raw.splitlines()]
        error = lines[-1].get("error")
        return raw.count(b" token"), error, bool(error) != bool(lines[-1].get("done"))
    events = [event[6:] for event in raw.decode().split("\n\n") if event]
    error = [json.loads(event)["error"] for event in events if '"error"' in event]
    assert all(event == "[DONE]" or json.loads(event) for event in events)
    return raw.count(b" token"), error and error[0] or None, bool(error) != (events[-1] == "[DONE]")


STREAMS = ("/v1/chat/completions", "/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate")
KINDS = {"stream": 34, "usage": 9, "whole": 15, "pairs": 5, "fail": 7, "cut": 5, "short": 2, "refuse": 4, "cancel": 9,
         "mute": 2, "embed": 4, "unknown": 2, "restless": 2}


def one(client, chance, kind, name, mark):
    """One request of a kind, and its retry.  Returns (attempts that were admitted, what was wrong)."""
    key, path, tokens = KEYS[name], chance.choice(STREAMS), chance.randrange(1, 12)
    told = "mark=%s prompt=%d tokens=%d" % (mark, PROMPT, tokens)
    if kind in ("stream", "usage", "pairs"):
        told += " each=2" * (kind == "pairs")
        got = client.whole(key, path, client.body(path, told, True, kind == "usage" and "/v1/" in path))
        return 1, got != (200, tokens, None, True) and (kind, path, got)
    if kind == "whole":
        got = client.whole(key, path, client.body(path, told, False))
        return 1, got != (200, tokens, None, True) and (kind, path, got)
    if kind == "embed":
        path = chance.choice(("/api/embed", "/v1/embeddings"))
        got = client.whole(key, path, client.body(path, told, False))
        return 1, got[0] != 200 and (kind, path, got)
    if kind == "unknown":
        body = dict(client.body(path, told, True), model="nobody")
        got = client.whole(key, path, body)
        return 0, got[0] != 404 and (kind, path, got)
    if kind == "cancel":
        after = chance.randrange(1, tokens + 1)
        client.some(key, path, client.body(path, told + " hang_after=%d" % after, True), after)
        return 1, None
    if kind == "restless":
        after = chance.randrange(1, 6)
        told = "mark=%s prompt=%d tokens=40 delay=2" % (mark, PROMPT)
        client.some(KEYS["restless"], path, client.body(path, told, True), after)
        return 1, None
    if kind == "mute":
        client.begin_and_leave(key, path, client.body(path, told + " mute=1", chance.random() < 0.5))
        return 1, None
    fault = {"fail": "fail_after", "cut": "cut_after", "short": "stop_after", "refuse": "status"}[kind]
    after = chance.choice((500, 503, 400)) if kind == "refuse" else chance.randrange(0, tokens + 1)
    got = client.whole(key, path, client.body(path, told + " %s=%d" % (fault, after), True))
    bad = not got[3] or got[2] is None or got[1] != (0 if kind == "refuse" else after)
    told = told.replace("mark=" + mark, "mark=" + mark + "r")
    again = client.whole(key, path, client.body(path, told, True))
    return 2, (bad or again != (200, tokens, None, True)) and (kind, path, after, got, again)


def begin_and_leave(self, key, path, body):
    """Ask, and go away before anything comes."""
    self.leave()
    raw = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", self.door.port), 60) as link:
        link.sendall(("POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n"
                      % (path, key, len(raw))).encode() + raw)
        time.sleep(0.005)  # some are admitted by then, and some are not: nothing is due for either


Client.begin_and_leave = begin_and_leave


def mixed(door, model, count, threads=12):
    """Ask so many requests of all kinds.  Returns {tenant: attempts that were admitted}."""
    jobs = list(range(count))
    admitted, wrong, lock = {}, [], threading.Lock()
    kinds, weights = list(KINDS), list(KINDS.values())

    def work():
        client = Client(door, model)
        while True:
            with lock:
                if not jobs or len(wrong) > 3:
                    break
                number = jobs.pop()
            chance = random.Random(number)
            kind, name = chance.choices(kinds, weights)[0], chance.choice(TENANTS)
            try:
                asked, problem = one(client, chance, kind, name, "%s:%d" % (
                    "restless" if kind == "restless" else name, number))
            except Exception as error:
                asked, problem = 0, (kind, repr(error))
                client.leave()
            with lock:
                name = "restless" if kind == "restless" else name
                admitted[name] = admitted.get(name, 0) + (0 if kind == "mute" else asked)
                if problem:
                    wrong.append((number, problem))
        client.leave()
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    return admitted


def settled(door):
    wait_until(lambda: door.status() and door.metrics().get(("b9agent_door_streams", ()), 0) == 0,
               "nothing runs any more")


def booked(door):
    """{tenant: (prompt tokens, completion tokens)} that the engine has sent, by its own book."""
    found = {}
    for row in parse_book(door.book):
        name = row["mark"].partition(":")[0]
        prompt, completion = found.get(name, (0, 0))
        # A prompt counts where something came of it.
        counts = row["sent"] > 0 or row["end"] == "whole"
        found[name] = (prompt + (row["prompt"] if counts else 0), completion + row["sent"])
    return found


def measured(door):
    """The same by the metrics."""
    found = {}
    for (name, labels), value in door.metrics().items():
        if name in ("b9agent_door_prompt_tokens_total", "b9agent_door_completion_tokens_total"):
            tenant_name = dict(labels)["tenant"]
            pair = found.setdefault(tenant_name, [0, 0])
            pair["completion" in name] += int(value)
    return {name: tuple(pair) for name, pair in found.items()}


def billed(door):
    """The same by usage.json, which is complete once the agent has stopped."""
    with open(os.path.join(door.state, "usage.json")) as handle:
        rows = json.load(handle)["tenants"]
    return {name: (row["prompt_tokens"], row["completion_tokens"]) for name, row in rows.items()}


def the_only_model(door):
    (model,) = door.status()["models"]
    return model


@pytest.mark.parametrize("engine", ["ledger", "ledger-ollama"])
def test_thousands_of_mixed_requests_are_billed_to_the_token(tmp_path, engine):
    day = time.gmtime().tm_yday
    with RunningDoor(tmp_path, engine, tenants=EVERYBODY, B9AGENT_INFERENCE_SLOTS=32) as door:
        model = the_only_model(door)
        client = Client(door, model)
        for name in TENANTS + ("restless",):  # what a prompt comes to is known before one is cut off
            path = "/v1/chat/completions"
            assert client.whole(KEYS[name], path, client.body(
                path, "mark=%s:first prompt=%d tokens=3" % (name, PROMPT), True))[0] == 200
        client.leave()
        admitted = mixed(door, model, REQUESTS // 2)
        settled(door)
        told, said = booked(door), measured(door)
        requests = {}
        for (name, labels), value in door.metrics().items():
            if name == "b9agent_door_requests_total":
                who = dict(labels)["tenant"]
                requests[who] = requests.get(who, 0) + int(value)
        door.agent.stop()
        kept = billed(door)
    rest = [kept.pop("restless"), said.pop("restless"), told.pop("restless")]
    told = {name: told[name] for name in TENANTS}
    assert said == told
    if time.gmtime().tm_yday == day:  # at midnight the day's usage begins anew
        assert {name: kept[name] for name in TENANTS} == told
        assert rest[0] == rest[1]
    # Who leaves while tokens are on their way pays for no more than was sent.
    assert 0 < rest[1][1] <= rest[2][1] and rest[1][0] == rest[2][0]
    for name in TENANTS:
        assert requests[name] >= admitted[name] + 1


def streams(door, model, count, told, path="/v1/chat/completions", name="ada"):
    """Threads that each read one stream to its end, and the list of what they found."""
    found = []

    def read(number):
        client = Client(door, model)
        try:
            found.append(client.whole(KEYS[name], path, client.body(
                path, "mark=%s:%s%d prompt=%d %s" % (name, path[-4:], number, PROMPT, told), True)))
        except Exception as error:
            found.append(repr(error))
        client.leave()
    threads = [threading.Thread(target=read, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads, found


def all_sent(door, total):
    wait_until(lambda: sum(row["sent"] for row in parse_book(door.book)) >= total, "all have their tokens")
    time.sleep(0.1)  # and the door has read them


def works_again(door, model):
    def good():
        client = Client(door, model)
        try:
            path = "/v1/chat/completions"
            return client.whole(KEYS["bob"], path, client.body(
                path, "mark=bob:again prompt=%d tokens=2" % PROMPT, True)) == (200, 2, None, True)
        except (OSError, http.client.HTTPException):
            return False
        finally:
            client.leave()
    wait_until(good, "the door answers again")


@pytest.mark.parametrize("engine", ["ledger", "ledger-ollama"])
def test_the_usage_is_counted_of_all_and_told_to_who_asks_alone(tmp_path, engine):
    with RunningDoor(tmp_path, engine, tenants=EVERYBODY) as door:
        model = the_only_model(door)
        client = Client(door, model)
        for path in STREAMS[1:3]:
            for asks in (True, False):
                reply = client.begin(KEYS["ada"], path, client.body(
                    path, "mark=ada:1 prompt=7 tokens=3 each=2", True, asks))
                events = [json.loads(event[6:]) for event in reply.read().decode().split("\n\n")[:-2]]
                told = [event["usage"] for event in events if event.get("usage")]
                assert [row["completion_tokens"] for row in told] == [6] * asks
        client.leave()
        settled(door)
        assert measured(door)["ada"] == booked(door)["ada"] == (28, 24)


PATHS = ("/v1/chat/completions", "/api/chat")


@pytest.mark.parametrize("engine", ["ledger", "ledger-ollama"])
def test_an_engine_that_is_killed_in_mid_stream(tmp_path, engine):
    with RunningDoor(tmp_path, engine, tenants=EVERYBODY, B9AGENT_INFERENCE_SLOTS=32) as door:
        model = the_only_model(door)
        works_again(door, model)
        before = booked(door)
        begun = [streams(door, model, 5, "tokens=9 hang_after=4", path) for path in PATHS]
        all_sent(door, sum(pair[1] for pair in before.values()) + 40)
        os.kill(door.status()["pid"], signal.SIGKILL)
        for threads, found in begun:
            for thread in threads:
                thread.join(30)
            assert len(found) == 5
            for status, pieces, error, good in found:
                assert (status, pieces, good) == (200, 4, True) and error, found
        works_again(door, model)
        settled(door)
        assert measured(door)["ada"] == booked(door)["ada"] == (70, 40)


def test_an_engine_that_dies_of_a_request(tmp_path):
    with RunningDoor(tmp_path, "ledger", tenants=EVERYBODY, B9AGENT_INFERENCE_SLOTS=32) as door:
        model = the_only_model(door)
        works_again(door, model)
        for after in (0, 3):
            client = Client(door, model)
            got = client.whole(KEYS["ada"], PATHS[0], client.body(
                PATHS[0], "mark=ada:%d prompt=7 tokens=9 die_after=%d" % (after, after), True))
            client.leave()
            assert got[1] == after and got[2] and got[3], got
            works_again(door, model)
        settled(door)
        assert measured(door)["ada"] == booked(door)["ada"] == (7, 3)


@pytest.mark.parametrize("engine", ["ledger", "ledger-ollama"])
def test_an_engine_that_is_wedged(tmp_path, engine):
    with RunningDoor(tmp_path, engine, tenants=EVERYBODY, B9AGENT_INFERENCE_SLOTS=32,
                     B9AGENT_INFERENCE_SILENCE_LIMIT="1") as door:
        model = the_only_model(door)
        works_again(door, model)
        begun = [streams(door, model, 3, told, path) for path in PATHS
                 for told in ("tokens=9 hang_after=2", "mute=1")]
        for threads, found in begun:
            for thread in threads:
                thread.join(30)
            assert len(found) == 3
            for got in found:
                assert got[1:] in ((2, got[2], True), (0, got[2], True)) and got[2], got
                assert got[0] == (200 if got[1] else 504)
        works_again(door, model)
        settled(door)
        assert measured(door)["ada"] == booked(door)["ada"] == (42, 12)


def test_an_engine_that_is_stopped_and_started_in_mid_stream(tmp_path):
    with RunningDoor(tmp_path, "ledger", tenants=EVERYBODY, B9AGENT_INFERENCE_SLOTS=32) as door:
        model = the_only_model(door)
        works_again(door, model)
        begun = [streams(door, model, 4, "tokens=9 hang_after=4", path) for path in PATHS]
        all_sent(door, 34)
        assert door.control("POST", "/inference/stop")[0] == 200
        for threads, found in begun:
            for thread in threads:
                thread.join(30)
            assert [(got[:2], got[3], bool(got[2])) for got in found] == [((200, 4), True, True)] * 4
        client = Client(door, model)
        status, _, error, good = client.whole(KEYS["ada"], PATHS[0], client.body(PATHS[0], "tokens=1", True))
        client.leave()
        assert status == 503 and error and good
        door.start_engine()
        works_again(door, model)
        settled(door)
        assert measured(door)["ada"] == booked(door)["ada"] == (56, 32)


def test_an_agent_that_stops_in_mid_stream_has_billed_what_was_sent(tmp_path):
    day = time.gmtime().tm_yday
    with RunningDoor(tmp_path, "ledger", tenants=EVERYBODY, B9AGENT_INFERENCE_SLOTS=32) as door:
        model = the_only_model(door)
        works_again(door, model)
        begun = [streams(door, model, 4, "tokens=9 hang_after=4", path) for path in PATHS]
        all_sent(door, 34)
        door.agent.stop()
        for threads, found in begun:
            for thread in threads:
                thread.join(30)
            assert [(got[:2], got[3], bool(got[2])) for got in found] == [((200, 4), True, True)] * 4
        if time.gmtime().tm_yday == day:
            assert billed(door)["ada"] == (56, 32)


def test_a_burst_gets_no_further_than_the_days_tokens(tmp_path):
    with RunningDoor(tmp_path, "ledger", tenants=EVERYBODY, B9AGENT_INFERENCE_SLOTS=32) as door:
        model = the_only_model(door)
        works_again(door, model)
        found, lock = [], threading.Lock()

        def ask(number):
            client, path = Client(door, model), PATHS[number % 2]
            told = "mark=small:%d prompt=%d tokens=20" % (number, PROMPT)
            body = client.body(path, told, True)
            body.update({"max_tokens": 20} if "/v1/" in path else {"options": {"num_predict": 20}})
            reply = client.begin(KEYS["small"], path, body)
            with lock:
                found.append((reply.status, reply.getheader("Retry-After"), reply.read()))
            client.leave()
        good, before = 0, -1
        while good > before:  # until a whole burst is refused
            before = good
            threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            good = sum(status == 200 for status, _, _ in found)
            assert len(found) < 2000, "nothing stops them"
        settled(door)
        # Reserved is what a prompt could come to at most, some 700 tokens here, and billed what it did.
        total = sum(booked(door)["small"])
        assert measured(door)["small"] == booked(door)["small"] and 2000 < total <= 3000
        refused = [(retry, body) for status, retry, body in found if status == 429]
        assert len(refused) == len(found) - good > 40
        assert all(int(retry) > 0 and b"tokens_per_day" in body for retry, body in refused)
