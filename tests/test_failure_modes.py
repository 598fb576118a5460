"""Four ways to ask that burn a GPU's money, and an idle engine: as they are without the front door's
guards, and with them.  Real processes: clients, agents, the stand-in for Ollama, which books its loads.

    tests/.venv/bin/python tests/test_failure_modes.py        prints what was measured as one table
"""
import calendar
import collections
import contextlib
import http.client
import json
import os
import socket
import sys
import tempfile
import threading
import time
from typing import NamedTuple
from unittest import mock

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]  # it is a program, too

import engines  # noqa: E402
from helpers import Program, RunningDoor, environment, print_table, quiet_port, wait_until  # noqa: E402
from test_door import ollama_answer, rig_at  # noqa: E402
from test_inference import engine_processes, processes_of  # noqa: E402

RATE_USD_S = 0.0006
REAL_S = 60.0  # what a load, or an answer that is too late, takes at real scale
MODEL = "llama3.2"
TEN = ["fm%d" % number for number in range(10)]


class Count(NamedTuple):
    """How often, and the seconds that it kept the GPU."""
    number: int
    gpu_s: float


class Row(NamedTuple):
    """shows: `before` has no fewer.  limit: `after` has no more.  real_s: of each, at real scale;
    real_after_s: of each after, where that is another."""
    pattern: str
    what: str
    before: Count
    after: Count
    shows: int
    limit: int
    real_s: float = REAL_S
    real_after_s: float = 0.0

    def check(self):
        assert self.before.number >= self.shows, self
        assert 0 < self.after.number <= self.limit <= self.shows, self
        assert self.shows == self.limit or self.after.gpu_s < self.before.gpu_s, self
        return self


# -- who is asked ------------------------------------------------------------

class Ledger:
    """What the stand-in has booked."""

    def __init__(self, path):
        self.path = str(path)

    def rows(self):
        if not os.path.exists(self.path):
            return []
        with open(self.path) as file:
            return [json.loads(line) for line in file]

    def loads(self):
        return self.count([row for row in self.rows() if "load" in row])

    def answers(self, mark):
        return self.count([row for row in self.rows() if row.get("mark") == mark])

    def at_once(self, mark):
        """The most of them that were computed at one time."""
        spans = [(row["began"], row["began"] + row["seconds"]) for row in self.rows()
                 if row.get("mark") == mark]
        return max(sum(begin <= at < end for begin, end in spans) for at, _ in spans)

    @staticmethod
    def count(rows):
        return Count(len(rows), sum(row["seconds"] for row in rows))


class Bare:
    """The stand-in, without an agent before it; asked as RunningDoor is."""

    token = "none"

    def __init__(self, folder, models, extra):
        self.home, self.models, self.port = str(folder), models, quiet_port()
        self.program = Program(
            [os.path.join(engines.stand_in(os.path.join(folder, "bin"), "ollama"), "ollama"), "serve"],
            environment(folder, **dict(extra, OLLAMA_HOST="127.0.0.1:%d" % self.port)))

    def __enter__(self):
        try:
            self.program.wait_line("Listening on")
            for name in self.models:
                assert self.ask("POST", "/api/pull", {"model": name, "stream": False})[0] == 200
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        try:
            self.program.stop()  # which ends its runners
        finally:
            self.program.__exit__()

    def ask(self, method, path, body=None, headers=None):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=40)) as link:
            link.request(method, path, body and json.dumps(body), headers or {})
            reply = link.getresponse()
            return reply.status, reply.headers, reply.read()


@contextlib.contextmanager
def place(kind, folder, models=(MODEL,), **extra):
    """A Bare or a RunningDoor, with its .ledger; nothing of it is left at the end."""
    folder = os.path.join(str(folder), kind)
    os.makedirs(folder, 0o700)
    extra = dict({"FAKE_OLLAMA_LEDGER": os.path.join(folder, "loads"), "FAKE_OLLAMA_LAYER_BYTES": "8192",
                  "FAKE_OLLAMA_CATALOGUE": " ".join(TEN)}, **extra)
    made = Bare(folder, models, extra) if kind == "bare" else RunningDoor(folder, models=models, **extra)
    with made as here:
        here.ledger = Ledger(extra["FAKE_OLLAMA_LEDGER"])
        yield here
    assert processes_of(made.home) == {}


def told(words="tokens=1", model=MODEL):
    return {"model": model, "stream": False,
            "messages": [{"role": "user", "content": "[[%s]] hello" % words}]}


def together(*calls):
    """Their results; all are called at once."""
    found, errors = [None] * len(calls), []

    def run(number):
        try:
            found[number] = calls[number]()
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


# -- 1. many cold starts at once -----------------------------------------------

LOAD_S, DAY_S = 0.1, 0.25


def all_ten_twice(here):
    """Ten agents want ten models at once, and again.  Returns: (answers, loads after each time)."""
    answers, loads = [], []
    for _ in range(2):
        answers += together(*[lambda model=model: here.ask("POST", "/api/chat", told(model=model))
                              for model in TEN])
        loads.append(here.ledger.loads())
    return answers, loads


def storm(folder):
    settings = dict(models=TEN, FAKE_OLLAMA_LOAD_S=LOAD_S, OLLAMA_MAX_LOADED_MODELS=2)

    def before():
        with place("bare", folder, **settings) as here:
            answers, loads = all_ten_twice(here)
            assert [answer[0] for answer in answers] == [200] * 20
            return loads

    def after():
        with place("door", folder, B9AGENT_GUARDS_PARALLEL_COLD_STARTS=2,
                   B9AGENT_GUARDS_COLD_START_SECONDS=DAY_S, **settings) as here:
            answers, loads = all_ten_twice(here)
            refused = [answer for answer in answers if answer[0] != 200]
            assert len(refused) >= 10
            for status, headers, body in refused:
                assert status == 429 and 1 <= int(headers["Retry-After"]) <= 86401
                assert json.loads(body)["code"] == "cold_starts", body
            return loads
    before, after = together(before, after)
    # Two begin at once; a third while the day's seconds are not used up by those that have ended.
    limit = int(DAY_S / LOAD_S) + 2
    return [Row("10 models at once", "loads", before[0], after[0], 10, limit),
            Row("and once more, where 2 fit", "loads", before[1], after[1], 18, limit)]


def test_ten_cold_models_at_once_are_loaded_as_far_as_the_day_allows(tmp_path):
    for row in storm(tmp_path):
        row.check()


PATIENT_S = 0.4  # how long a client waits for a model that takes 1.5 s


def one_model(folder):
    """200 want one model; then, with another, a client gives up before it is loaded, six times."""
    def before():
        with place("bare", folder, TEN[:2], FAKE_OLLAMA_LOAD_S=1.5, OLLAMA_NUM_PARALLEL=4) as here:
            assert two_hundred(here) == [200] * 200
            first, lines = here.ledger.loads(), here.program.lines
            for number in range(6):
                with sent(here, TEN[1]):
                    wait_until(lambda: sum("starting llama-server" in line for line in lines())
                               == number + 2, "a load is begun")
                    time.sleep(PATIENT_S)
                wait_until(lambda: here.ledger.loads().number == number + 2, "it is given up")
            return first, here.ledger.loads()

    def after():
        with place("door", folder, TEN[:2], FAKE_OLLAMA_LOAD_S=1.5, B9AGENT_INFERENCE_SLOTS=4,
                   B9AGENT_INFERENCE_QUEUE=256) as here:
            assert two_hundred(here) == [200] * 200
            first = here.ledger.loads()
            for _ in range(6):
                with sent(here, TEN[1]):
                    time.sleep(PATIENT_S)
            assert here.ask("POST", "/api/chat", told(model=TEN[1]))[0] == 200
            return first, here.ledger.loads()
    (first, all_before), (first_after, all_after) = together(before, after)
    rest = [Count(one.number - other.number, one.gpu_s - other.gpu_s) for one, other in (
        (all_before, first), (all_after, first_after))]
    return [Row("200 requests for one model", "loads", first, first_after, 1, 1),
            Row("gives up before it is loaded, 6 times", "loads", *rest, 6, 1, 16.0, REAL_S)]


def two_hundred(here):
    return [answer[0] for answer in together(*[
        lambda: here.ask("POST", "/api/chat", told(model=TEN[0]))] * 200)]


@contextlib.contextmanager
def sent(here, model):
    """A request whose client leaves at the end of the block, without an answer."""
    body = json.dumps(told(model=model)).encode()
    with socket.create_connection(("127.0.0.1", here.port)) as sock:
        sock.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (here.token.encode(), len(body), body))
        yield


def test_one_model_is_loaded_once_for_200_and_for_those_who_leave_and_come_again(tmp_path):
    for row in one_model(tmp_path):
        row.check()


# -- 2. tasks that spawn tasks ---------------------------------------------------

CALLS_MAX = 400


def grow(here, mark, tells_depth):
    """A worker: each answer to a task gives it three more.  Returns: statuses of its calls."""
    tasks, found = collections.deque([0]), []
    while tasks and len(found) < CALLS_MAX:
        depth = tasks.popleft()
        headers = {"X-Task-Tree-Id": mark, "X-Task-Depth": str(depth if tells_depth else 0)}
        status, _, body = here.ask("POST", "/api/chat", told("tokens=1 mark=" + mark), headers=headers)
        found.append(status)
        if status == 200:
            tasks.extend([depth + 1] * 3)
        else:
            assert status == 422 and json.loads(body)["code"] == (
                "task_depth" if tells_depth else "task_tree"), body
    return found


def trees(folder):
    def before():
        with place("bare", folder) as here:
            assert grow(here, "deep", True) == [200] * CALLS_MAX, "it grows for ever"
            return here.ledger.answers("deep")

    def after():
        with place("door", folder) as here:
            deep, wide = grow(here, "deep", True), grow(here, "wide", False)
            assert (deep.count(200), deep.count(422)) == (1 + 3 + 9 + 27, 81)
            assert (wide.count(200), wide.count(422)) == (50, 1 + 3 * 50 - 50)
            return here.ledger.answers("deep"), here.ledger.answers("wide")
    before, (deep, wide) = together(before, after)
    return [Row("3 children a task, depth told", "calls", before, deep, CALLS_MAX, 40, 2.0),
            Row("3 children a task, tree alone told", "calls", before, wide, CALLS_MAX, 50, 2.0)]


def test_a_tree_of_tasks_ends_by_itself(tmp_path):
    for row in trees(tmp_path):
        row.check()


# -- 3. time-outs and retries ------------------------------------------------------

ANSWER = "tokens=30 delay=0.1 mark=%s"  # 3 s, and who asks waits 0.25 s


class DeafProxy:
    """Passes bytes on, but not that a client has left, as many a proxy: what it asked for goes on."""

    def __init__(self, port):
        self._to, self._socks = port, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                pair = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._to))
                self._socks += pair
                for source, sink in (pair, pair[::-1]):
                    self._threads.append(threading.Thread(target=self._pass, args=(source, sink)))
                    self._threads[-1].start()

    @staticmethod
    def _pass(source, sink):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                with contextlib.suppress(OSError):  # the client has left: what comes is thrown away
                    sink.sendall(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sock in [self._listener] + self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join()


def official_client(port, token, mark):
    """The openai client with a short time-out and three retries.  Returns: its last error."""
    import httpx
    import openai
    with httpx.Client(trust_env=False) as link, openai.OpenAI(
            base_url="http://127.0.0.1:%d/v1" % port, api_key=token, timeout=0.25, max_retries=3,
            http_client=link) as client:
        try:
            client.chat.completions.create(model=MODEL, messages=told(ANSWER % mark)["messages"])
        except openai.APIError as error:
            return error
    raise AssertionError("it was answered")


def plain_client(port, token, mark):
    """One that tells its tries by an Idempotency-Key.  Returns: statuses; 0 is a time-out."""
    found = []
    for _ in range(4):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=0.25)) as link:
            try:
                link.request("POST", "/api/chat", json.dumps(told(ANSWER % mark)), {
                    "Authorization": "Bearer " + token, "Idempotency-Key": "order-7"})
                found.append(link.getresponse().status)
            except OSError:
                found.append(0)
    return found


def twins(folder):
    import openai

    def booked(here, mark, number):
        """All of them, once they have ended by themselves."""
        wait_until(lambda: here.ledger.answers(mark).number == number, "the twins have ended")
        return here.ledger.answers(mark), here.ledger.at_once(mark)

    def warm(here):
        assert here.ask("POST", "/api/chat", told())[0] == 200

    def both(here, proxy):
        return together(lambda: official_client(proxy.port, here.token, "official"),
                        lambda: plain_client(proxy.port, here.token, "plain"))

    def before():
        with place("bare", folder, OLLAMA_NUM_PARALLEL=8) as here, DeafProxy(here.port) as proxy:
            warm(here)
            error, statuses = both(here, proxy)
            assert isinstance(error, openai.APITimeoutError) and statuses == [0] * 4
            found = [booked(here, mark, 4) for mark in ("official", "plain")]
            assert [most for _, most in found] == [4, 4]
            return [count for count, _ in found]

    def after():
        with place("door", folder, B9AGENT_INFERENCE_SLOTS=8) as here, DeafProxy(here.port) as proxy:
            warm(here)
            error, statuses = both(here, proxy)
            assert isinstance(error, openai.ConflictError) and error.code == "duplicate", error
            assert statuses == [0] + [409] * 3
            return booked(here, "official", 1)[0], booked(here, "plain", 1)[0]
    with mock.patch("openai._base_client.INITIAL_RETRY_DELAY", 0.05):  # half a second else
        (official, plain), (official_after, plain_after) = together(before, after)
    return [Row("times out, 3 retries: openai client", "computed at once", official, official_after, 4, 1),
            Row("times out, 3 retries: Idempotency-Key", "computed at once", plain, plain_after, 4, 1)]


def test_a_client_that_times_out_and_retries_has_no_twins(tmp_path):
    pytest.importorskip("openai")
    for row in twins(str(tmp_path)):
        row.check()


# -- 4. calls spaced just past keep-warm ---------------------------------------------

POLLS = 6


def poll(here):
    """A poller that asks each time when the model has just gone.  Returns: its answers."""
    found = []
    for _ in range(POLLS):
        found.append(here.ask("POST", "/api/chat", told()))
        for row in in_memory(here):  # a second's keep-warm, and one for the way
            ends_s = calendar.timegm(time.strptime(row["expires_at"][:19], "%Y-%m-%dT%H:%M:%S"))
            assert ends_s - time.time() <= 2, row
        wait_until(lambda: in_memory(here) == [], "its keep-warm is over")
        assert not any("runner" in line for line in engine_processes(here.home).values()), (
            "its memory is returned")
    return found


def in_memory(here):
    return json.loads(here.ask("GET", "/api/ps")[2])["models"]


def thrash(folder):
    def before():
        with place("bare", folder, FAKE_OLLAMA_LOAD_S=LOAD_S, OLLAMA_KEEP_ALIVE="1s") as here:
            assert [answer[0] for answer in poll(here)] == [200] * POLLS
            return here.ledger.loads()

    def after():
        with place("door", folder, FAKE_OLLAMA_LOAD_S=LOAD_S, B9AGENT_INFERENCE_KEEP_WARM=1,
                   B9AGENT_GUARDS_COLD_STARTS_PER_HOUR=3) as here:
            answers = poll(here)
            assert [answer[0] for answer in answers] == [200] * 3 + [429] * 3
            _, headers, body = answers[-1]
            said = json.loads(body)
            assert said["code"] == "thrash" and said["details"]["cold_starts"] == 3
            assert "Keep the model warm for longer" in said["error"], "the advice of a minute's calls"
            assert 3000 < int(headers["Retry-After"]) <= 3601
            return here.ledger.loads()
    before, after = together(before, after)
    return [Row("6 polls past keep-warm, ceiling 3/h", "loads", before, after, POLLS, 3)]


def test_a_poller_past_keep_warm_is_stopped_with_advice(tmp_path):
    for row in thrash(tmp_path):
        row.check()


class Clock:
    def __init__(self):
        self.at_s = 1000.0

    def __call__(self):
        return self.at_s


def polled(folder, gap_s, **settings):
    """Loads of an hour's polls, each of 60 s; the model leaves when the front door's keep_alive says."""
    os.makedirs(str(folder))
    clock, loads = Clock(), []
    with rig_at(folder, engine="ollama", models=("m:latest",), loaded=(), script=ollama_answer,
                clock=clock, **settings) as rig:
        rig.inference.on_wake = lambda model: loads.append(clock.at_s) or REAL_S
        for _ in range(int(3600 / gap_s)):
            assert rig.ask({"model": "m", "stream": False, "messages": [
                {"role": "user", "content": "x"}]}, path="/api/chat")[0] == 200
            rig.settled()
            clock.at_s += gap_s
            rig.door._warm_s.clear()  # whose clock is the machine's
            if gap_s >= rig.engine.asked[-1].body["keep_alive"]:
                rig.target = rig.target._replace(loaded=())
            elif not rig.target.loaded:
                raise AssertionError("it was never loaded")
    return Count(len(loads), len(loads) * REAL_S)


def advised(folder):
    never = {"inference_keep_warm": 10.0, "guards_cold_starts_per_hour": 0}
    rows = []
    for gap_s, limit in ((180.0, 1), (330.0, 4)):
        before, after = (polled(os.path.join(str(folder), "%s-%g" % (name, gap_s)), gap_s, **settings)
                         for name, settings in (("before", never),
                                                ("after", {"inference_keep_warm": "auto"})))
        rows.append(Row("an hour's polls each %g s (own clock), auto" % gap_s, "loads", before, after,
                        int(3600 / gap_s), limit))
    return rows


def test_keep_warm_auto_ends_the_loads_of_a_poller(tmp_path):
    for row in advised(tmp_path):
        row.check()


# -- 5. idle ---------------------------------------------------------------------------

def is_group(number):
    try:
        os.killpg(number, 0)
        return True
    except ProcessLookupError:
        return False


def test_an_idle_engine_ends_whole_and_never_under_a_request(tmp_path):
    with place("door", tmp_path, B9AGENT_INFERENCE_IDLE_STOP=1) as here:
        assert here.ask("POST", "/api/chat", told())[0] == 200
        (group,) = {os.getpgid(pid) for pid in engine_processes(here.home)}
        wait_until(lambda: here.status()["status"] == "asleep" and engine_processes(here.home) == {},
                   "it ends with all its processes")
        wait_until(lambda: not is_group(group), "nobody is left to be waited for")
        began_s = time.monotonic()
        status, _, body = here.ask("POST", "/api/chat", dict(told("tokens=40 delay=0.1"), stream=True))
        lines = [json.loads(line) for line in body.splitlines()]
        assert status == 200 and lines[-1]["done"] and lines[-1]["eval_count"] == 40
        assert len(lines) == 41 and time.monotonic() - began_s >= 4
        assert here.ledger.loads().number == 2, "it was started again, once"
        wait_until(lambda: engine_processes(here.home) == {}, "and then it ends")


# -- the table --------------------------------------------------------------------------

HEAD = ("pattern", "counted", "before", "after", "limit", "GPU-s before", "after", "USD before", "after",
        "real scale", "USD before", "after")


def cells(row):
    counts = [str(row.before.number), str(row.after.number), str(row.limit)]
    gpu_s = ["%.2f" % one.gpu_s for one in (row.before, row.after)]
    usd = ["%.5f" % (one.gpu_s * RATE_USD_S) for one in (row.before, row.after)]
    seconds = row.real_s, row.real_after_s or row.real_s
    real = ["%.3f" % cost(*pair) for pair in zip((row.before.number, row.after.number), seconds)]
    return [row.pattern, row.what, *counts, *gpu_s, *usd,
            "x %s s" % " or ".join("%g" % one for one in sorted(set(seconds))), *real]


def cost(number, seconds):
    """The contract's arithmetic."""
    return number * seconds * RATE_USD_S


def test_the_table_has_the_contracts_arithmetic():
    # By hand: 10 x 60 s x $0.0006; 160 polls of an 8-hour session; three a day's hour.
    assert ["%.2f" % cost(*pair) for pair in ((10, 60), (160, 60), (3, 60))] == ["0.36", "5.76", "0.11"]
    row = Row("p", "loads", Count(20, 1200.0), Count(1, 60.0), 20, 1)
    assert cells(row.check()) == ["p", "loads", "20", "1", "1", "1200.00", "60.00", "0.72000", "0.03600",
                                  "x 60 s", "0.720", "0.036"]
    for wrong in (row._replace(after=Count(2, 60.0)), row._replace(before=Count(19, 1200.0)),
                  row._replace(after=Count(0, 0.0)), row._replace(after=Count(1, 1201.0))):
        with pytest.raises(AssertionError):
            wrong.check()


def main():
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for measure in (storm, one_model, trees, twins, thrash, advised):
            own = os.path.join(folder, measure.__name__)
            os.mkdir(own)
            rows += [row.check() for row in measure(own)]
    print_table([list(HEAD)] + [cells(row) for row in rows])


if __name__ == "__main__":
    main()
