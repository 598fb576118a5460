"""Half an hour under mixed load: what of the agent grows?

    tests/bench/run --only soak [--minutes 30]     --quick: one minute
    tests/bench/run --only soak --readme           writes its block of README.md, too

An installed agent with an embedded gateway, and an Ollama (tests/fake_ollama.py) that it starts.  Clients
at its front door: streams and whole answers of Ollama's and OpenAI's API for three tenants; some leave
half way, read slowly, have a wrong token, are over their limit or send nonsense.  Beside them /metrics and
/status each 5 s, a follower of /events, `logs -f`, `top` on a terminal, `status` and `models`; pulls, half
of them cancelled; models loaded and unloaded; tenants.yaml edited; engine and gateway killed now and then.

First three times as many clients, and all else three times as often, for some minutes, in which what has
a bound comes to it (Load.age): memory that was needed once the allocators keep.  Then the claims, from samples each 5 s, after a warm-up of a fifth: memory (USS) grows by less than 480 KiB a run
(slope of Theil and Sen); when the load ends, threads, descriptors and children are what they were before
it; the log stays in its bound, the audit log grows with requests alone, what else is in the state folder
does not.  No defect was logged, no line of the audit log is lost.  Exit status: 1 where one does not hold.
"""
import argparse
import contextlib
import http.client
import json
import os
import pty
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import psutil

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), os.path.dirname(HERE), HERE]

import b9agent  # noqa: E402
from fleet_processes import PYTHON, install  # noqa: E402
from helpers import (Program, RunningDoor, about_the_machine, agent_command, environment,  # noqa: E402
                     print_table, quiet_port, run_agent, wait_until, write_readme)

SAMPLE_S = 5.0
GROWTH_KIB = 480.0  # of the whole run
MODELS = ["tiny", "llama3.2:1b"]
TOKENS = {name: "token-of-%s-0123456789abcdef" % name for name in ("ada", "bob", "eve", "small", "guest")}


class EmbeddedGateway:
    """`b9agent.py gateway` with one machine."""

    def __init__(self, folder):
        self.home, self.port = os.path.join(folder, "gateway"), quiet_port()
        self.db = os.path.join(self.home, "gateway.db")
        store = b9agent.MachineStore(self.db)
        self.machine_id, self.token = store.create_machine("external")
        store.close()

    def __enter__(self):
        self.program = Program(agent_command("gateway", "--port", self.port, "--db", self.db),
                               environment(self.home))
        self.program.wait_line("listening")
        return self

    def __exit__(self, *_):
        self.program.__exit__()

    def restart(self, away_s):
        self.program.__exit__()
        time.sleep(away_s)
        self.__enter__()


def tenants(*names):
    limits = {"small": "    requests_per_minute: 5\n"}
    return "tenants:\n" + "".join("  - name: %s\n    token_sha256: %s\n%s" % (
        name, b9agent.token_hash(TOKENS[name]), limits.get(name, "")) for name in names)


USUAL = ("ada", "bob", "eve", "small")


# -- who comes to the front door -----------------------------------------

class Clients:
    """Requests of every kind at the front door.  counts: how many of each came to which status."""

    def __init__(self, door, dice):
        self.door, self.dice, self.counts, self._lock = door, dice, {}, threading.Lock()

    def one(self):
        kinds = (self.ollama, self.openai, self.whole, self.leaves, self.slow, self.over_limit,
                 self.unknown_model, self.nonsense, self.lists, self.bad_token)
        kind = self.dice.choices(kinds, (25, 25, 12, 12, 6, 5, 4, 4, 6, 1))[0]
        try:
            self._note(kind, kind())
        except (OSError, http.client.HTTPException) as error:
            self._note(kind, type(error).__name__)  # the engine was killed in the midst of it

    def _note(self, kind, came):
        with self._lock:
            key = kind.__name__, came
            self.counts[key] = self.counts.get(key, 0) + 1

    def total(self):
        with self._lock:
            return sum(self.counts.values())

    def _body(self, stream, told="tokens=40 delay=0.02"):
        return {"model": self.dice.choice(MODELS), "stream": stream, "messages": [
            {"role": "user", "content": "[[%s]] %s" % (told, "word " * self.dice.randrange(200))}]}

    @contextlib.contextmanager
    def _ask(self, path, body, token=None, method="POST"):
        """The reply, its body not read."""
        link = http.client.HTTPConnection("127.0.0.1", self.door.port, timeout=90)
        try:
            link.request(method, path, None if body is None else json.dumps(body), {
                "Authorization": "Bearer " + TOKENS.get(token or self.dice.choice(USUAL[:3]), str(token))})
            yield link.getresponse()
        finally:
            link.close()

    def _read(self, path, body, **more):
        with self._ask(path, body, **more) as reply:
            reply.read()
            return reply.status

    def ollama(self):
        return self._read("/api/chat", self._body(True))

    def short(self):
        return self._read("/api/chat", self._body(True, "tokens=8"))

    def openai(self):
        return self._read("/v1/chat/completions", self._body(True))

    def whole(self):
        return self._read(self.dice.choice(("/api/chat", "/v1/chat/completions")),
                          self._body(False, "tokens=10 delay=0.01"))

    def leaves(self):
        with self._ask("/v1/chat/completions", self._body(True, "tokens=200 delay=0.02")) as reply:
            reply.read1(4000)
            time.sleep(self.dice.random())
            return reply.status

    def slow(self):
        with self._ask("/api/chat", self._body(True, "tokens=300 delay=0.002")) as reply:
            while reply.read1(2000):
                time.sleep(0.1)
            return reply.status

    def over_limit(self):
        return self._read("/api/chat", self._body(False, "tokens=1"), token="small")

    def unknown_model(self):
        return self._read("/api/chat", {"model": "no-such-%d" % self.dice.randrange(10 ** 9), "messages": []})

    def nonsense(self):
        with socket.create_connection(("127.0.0.1", self.door.port), timeout=90) as link:
            link.sendall(self.dice.choice((b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"POST /api/chat "
                         b"HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{\"model\":")))
            with contextlib.suppress(ConnectionResetError):
                link.recv(65536)
        return "sent"

    def lists(self):
        return self._read(self.dice.choice(("/v1/models", "/api/tags", "/api/ps")), None, method="GET")

    def bad_token(self):
        return self._read("/api/chat", self._body(False), token="wrong-%d" % self.dice.randrange(10 ** 9))


# -- what else goes on ----------------------------------------------------

class Load:
    """All that goes on at once, each on a thread that comes round again after its seconds.  times: so
    many clients more, and all so much oftener."""

    def __init__(self, door, gateway, clients, times=1):
        self.door, self.gateway, self.clients = door, gateway, clients
        self._stop, self.failed = threading.Event(), []
        self._pulls = 0
        rounds = [(self.clients.one, 1.0)] * (10 * times) + [
            (self.scrape, 5.0), (self.follow_events, 1.0), (self.pull, 12.0), (self.load_and_unload, 10.0),
            (self.edit_tenants, 15.0), (self.commands, 30.0), (self.kill_engine, 90.0),
            (self.restart_gateway, 130.0)]
        self._threads = [threading.Thread(target=self._round, args=(what, pause_s / times))
                         for what, pause_s in rounds]

    def __enter__(self):
        home = self.door.home
        self.logs = subprocess.Popen(agent_command("logs", "-f"), env=environment(home),
                                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.master, terminal = pty.openpty()
        self.top = subprocess.Popen(agent_command("top"), env=environment(home, TERM="xterm"), stdin=terminal,
                                    stdout=terminal, stderr=terminal, start_new_session=True)
        os.close(terminal)
        self._threads.append(threading.Thread(target=self._drain))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        os.write(self.master, b"q")
        for child in (self.logs, self.top):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(2)
            child.kill()
            child.wait()
        for thread in self._threads:
            thread.join()
        os.close(self.master)

    def _drain(self):
        with contextlib.suppress(OSError):  # what a terminal says when nobody holds its other end
            while os.read(self.master, 65536):
                pass

    def _round(self, what, pause_s):
        dice = random.Random()
        while not self._stop.wait(pause_s * dice.uniform(0.5, 1.5)):
            try:
                what()
            except Exception as error:  # told at the end, not hidden
                self.failed.append("%s: %r" % (what.__name__, error))

    def age(self, share):
        """Beside the rounds, hours of what fills bounds (the kept lines of the log, the events, caches)
        in minutes."""
        work = ((self.scrape, 1500), (self.clients.short, 1500), (self.clients.leaves, 200),
                (self.clients.unknown_model, 4500), (self.clients.lists, 500), (self.edit_tenants, 500),
                (self.fail_to_pull, 1200), (self.load_and_unload, 100), (self.pull, 40))

        def repeat(what, times):
            for _ in range(int(times * share)):
                with contextlib.suppress(OSError, http.client.HTTPException):  # gateway and engine are killed
                    what()
        threads = [threading.Thread(target=repeat, args=each) for each in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def fail_to_pull(self):
        self.door.control("POST", "/inference/pull", {"model": "no-such-model"})

    def scrape(self):
        for path in ("/metrics", "/status"):
            status, _ = self.door.control("GET", path)
            if status != 200:
                raise AssertionError("%s: %d" % (path, status))

    def follow_events(self):
        link = http.client.HTTPConnection(self.door.read("control.addr"), timeout=20)
        try:
            link.request("GET", "/events", headers={"Authorization": "Bearer "
                                                    + self.door.read("control.token")})
            reply, until = link.getresponse(), time.monotonic() + 40
            while not self._stop.is_set() and time.monotonic() < until:
                with contextlib.suppress(socket.timeout):
                    reply.readline()
        finally:
            link.close()

    def pull(self):
        """Each other one is cancelled half way; what came whole is deleted again."""
        self._pulls += 1
        asked = {"model": "qwen2.5:0.5b"}
        puller = threading.Thread(target=self.door.control, args=("POST", "/inference/pull", asked))
        puller.start()
        if self._pulls % 2:
            time.sleep(0.7)
            self.door.control("POST", "/inference/cancel", asked)
        puller.join()
        if not self._pulls % 2:
            self.door.control("POST", "/models/delete", asked)

    def load_and_unload(self):
        model = random.choice(MODELS)
        self.door.control("POST", "/models/unload", {"model": model})
        self.door.control("POST", "/models/load", {"model": model})

    def edit_tenants(self):
        self.door.write_tenants(tenants(*USUAL, *random.choice(((), ("guest",)))))

    def commands(self):
        for words in (("status",), ("status", "--json"), ("models",)):
            done = run_agent(self.door.home, *words)
            if done.code not in (0, 1):
                raise AssertionError("%s: %r" % (words, done))

    def kill_engine(self):
        for child in psutil.Process(self.door.agent.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "serve" in child.cmdline():
                    child.send_signal(signal.SIGKILL)

    def restart_gateway(self):
        self.gateway.restart(10.0)


# -- samples ---------------------------------------------------------------

def size_of(path):
    if os.path.isfile(path):
        return os.path.getsize(path)
    total = 0
    for top, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(top, name))
    return total


class Sample:
    """One look.  Sizes in bytes; requests: how many were sent to the front door by then."""

    def __init__(self, door, requests, began):
        process, state = psutil.Process(door.agent.pid), door.state
        self.minute = (time.monotonic() - began) / 60
        memory = process.memory_full_info()
        self.uss, self.pss, self.rss = memory.uss, memory.pss, memory.rss
        self.threads, self.descriptors = process.num_threads(), process.num_fds()
        self.children = len(process.children())
        self.log = sum(size_of(os.path.join(state, name)) for name in os.listdir(state)
                       if name.startswith("agent.log"))
        self.audit, self.usage = (size_of(os.path.join(state, name)) for name in ("audit", "usage.json"))
        self.engine_logs = size_of(os.path.join(state, "logs"))
        self.rest = size_of(state) - self.log - self.audit - self.engine_logs
        self.requests = requests


def slope(points):
    """Of Theil and Sen: the median of the slopes of all pairs."""
    slopes = [(y - x_y) / (x - x_x) for number, (x, y) in enumerate(points)
              for x_x, x_y in points[:number] if x > x_x]
    return statistics.median(slopes) if slopes else 0.0


def level(samples):
    """(threads, descriptors, children), the medians."""
    return tuple(int(statistics.median(getattr(sample, name) for sample in samples))
                 for name in ("threads", "descriptors", "children"))


def come_to_rest(door, clients, began, still_s):
    """Samples of an agent that nobody asks for anything, once its level has stayed for so long."""
    samples = []
    while True:
        samples.append(Sample(door, clients.total(), began))
        newest = samples[-int(still_s):]
        if len(newest) == still_s and len({level([sample]) for sample in newest}) == 1 or (
                len(samples) > 240):
            return newest
        time.sleep(1.0)


def soak(folder, minutes):
    """(samples before the load, under it, after it; the clients; what went wrong; share of a core)."""
    os.environ["B9TESTS_AGENT"] = install(os.path.join(folder, "installed"))[-1]
    gateway = EmbeddedGateway(folder)
    door = RunningDoor(folder, "ollama", MODELS, tenants(*USUAL), flags=(
        "--machine-id", gateway.machine_id, "--keepalive-interval", "5", "--inference-parallel", "6",
        "--guards-cold-starts-per-hour", "0", "--guards-cold-start-seconds-per-day", "0"),
        FAKE_OLLAMA_RATE=120000, B9AGENT_TAILNET_SOCKET="none")
    door.gateway = gateway
    wrong = []
    with door:
        began, clients = time.monotonic(), Clients(door, random.Random(1))
        for kind in (clients.ollama, clients.openai, clients.whole, clients.lists, clients.leaves):
            kind()
        still_s = 45 if minutes >= 3 else 15
        before = come_to_rest(door, clients, began, still_s)
        with Load(door, gateway, clients, times=3) as load:
            load.age(min(1.0, minutes / 10))
        wrong += load.failed
        agent = psutil.Process(door.agent.pid)
        cpu, samples = sum(agent.cpu_times()[:2]), []
        began = time.monotonic()
        with Load(door, gateway, clients) as load:
            while time.monotonic() - began < 60 * minutes:
                time.sleep(SAMPLE_S)
                samples.append(Sample(door, clients.total(), began))
        share = (sum(agent.cpu_times()[:2]) - cpu) / (time.monotonic() - began)
        wait_until(lambda: door.status()["status"] == "running", "the engine runs")
        for kind in (clients.ollama, clients.openai):
            kind()
        after = come_to_rest(door, clients, began, still_s)
        wrong += load.failed
        wrong += [line for line in door.agent.lines() if " error defect" in line]
        if door.agent.stop() != 0:
            wrong.append("the agent's exit code is %s" % door.agent.process.returncode)
        verified = run_agent(door.home, "audit", "verify")
        if verified.code != 0:
            wrong.append("audit verify: %r" % verified)
    return before, samples, after, clients, wrong, share


# -- the table ---------------------------------------------------------------

def mib(size):
    return "%.2f MiB" % (size / 2**20)


def table(before, samples, after, minutes):
    """(rows, whether all hold)."""
    warm = samples[len(samples) // 5:]
    grown = slope([(sample.minute, sample.uss / 1024) for sample in warm])
    limit = GROWTH_KIB / minutes
    rows, fine = [("", "idle before", "after warm-up", "at the end", "idle after", "verdict")], True

    def add(name, shown, holds, verdict=""):
        nonlocal fine
        fine = fine and holds
        rows.append((name, *shown, (verdict + ": " if verdict else "") + ("flat" if holds else "GROWS")))

    def at_four(name, text):
        return [text(statistics.median(getattr(sample, name) for sample in part))
                for part in (before, warm[:6], warm[-6:], after)]
    add("memory (USS)", at_four("uss", mib), grown < limit,
        "%+.1f KiB a minute, %+.1f MiB in 24 h" % (grown, grown * 1440 / 1024))
    for name in ("rss", "pss"):
        rows.append(("(%s)" % name.upper(), *at_four(name, mib), ""))
    for number, name in enumerate(("threads", "descriptors", "children")):
        add(name, at_four(name, "%d".__mod__), level(after)[number] <= level(before)[number],
            "at most %d" % max(getattr(sample, name) for sample in samples))
    add("agent.log", at_four("log", mib), max(sample.log for sample in samples) < 2 * (5 << 20) + 2**16,
        "bound 10 MiB")
    each = [(part[-1].audit - part[0].audit) / max(1, part[-1].requests - part[0].requests)
            for part in (warm[:len(warm) // 2], warm[len(warm) // 2:])]
    add("audit log", at_four("audit", mib), minutes < 5 or each[1] < 1.25 * each[0],
        "%.0f, then %.0f B a request" % tuple(each))
    add("engines' logs", at_four("engine_logs", mib), samples[-1].engine_logs < 5 * (16 << 20), "bound 80 MiB")
    add("usage.json", at_four("usage", "%d B".__mod__), after[-1].usage < warm[0].usage + 200)
    add("the rest of the state folder", at_four("rest", "%d B".__mod__), after[-1].rest < warm[0].rest + 2**14)
    return rows, fine


def plot(values, width=72):
    """One line: the lowest to the highest, from left to right."""
    marks, low, high = "▁▂▃▄▅▆▇█", min(values), max(values)
    step = max(1, len(values) // width)
    means = [statistics.mean(values[at:at + step]) for at in range(0, len(values), step)]
    return "".join(marks[min(7, int(8 * (value - low) / max(1, high - low)))] for value in means)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="one minute")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    options = parser.parse_args()
    minutes = 1.0 if options.quick else options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it started ends with it
    folder = tempfile.mkdtemp(prefix="b9soak-")
    try:
        before, samples, after, clients, wrong, share = soak(folder, minutes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    requests = sum(clients.counts.values())
    about = "%s, %s" % (time.strftime("%-d %B %Y"), about_the_machine(PYTHON))
    print("%s\n%.1f minutes, %d requests at the front door in all, the agent took %.1f %% of a core\n" % (
        about, minutes, requests, 100 * share))
    rows, fine = table(before, samples, after, minutes)
    print_table(rows)
    print("\nUSS, %s to %s: %s\n" % (mib(min(s.uss for s in samples)), mib(max(s.uss for s in samples)),
                                    plot([sample.uss for sample in samples])))
    print("requests: " + ", ".join("%s %s: %d" % (*key, count)
                                   for key, count in sorted(clients.counts.items(), key=str)))
    for what in wrong:
        print("WRONG: " + what)
    if options.readme:
        lines = ["| %s |" % " | ".join(row) for row in rows if not row[0].startswith("(")]
        lines[1:1] = ["| --- | --- | --- | --- | --- | --- |"]
        lines[:0] = ["**%.0f minutes under load**, by `tests/bench/run --only soak`, after some minutes of three" % minutes,
                     "times as much: streams of several tenants, clients that leave or are refused, slow ones,",
                     "scrapes, pulls, an engine and a gateway that are killed now and then; %s requests in all." % (
                         format(requests, ",")), about + ".", ""]
        write_readme("soak", "\n".join(lines))
    return 0 if fine and not wrong else 1


if __name__ == "__main__":
    if not sys.platform.startswith("linux"):
        sys.exit("tests/bench/soak.py reads /proc: Linux only")
    sys.exit(main())
