"""What can go wrong around a machine, done to a real agent that serves streams: what it shows meanwhile,
how long after the end of it the machine is ready again, and what is lost.

    tests/bench/run --only chaos             does all of it and prints the table
    tests/bench/run --only chaos --quick     what needs no root
    tests/bench/run --only chaos --readme    writes the table into README.md, too

The agent, the gateway and the engine are processes; an interval between keepalives is a second.  What
needs root is done in mount and network namespaces of its own, which end with it.
"""
import argparse
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]  # it is a program, too

import engines  # noqa: E402
from helpers import (  # noqa: E402
    Program, RunningDoor, StallMeter, about_the_machine, agent_command, environment, print_table,
    quiet_port, run_agent, wait_until, write_readme)
from hostile_gateway import HostileGateway  # noqa: E402
from test_inference import processes_of  # noqa: E402

psutil = pytest.importorskip("psutil")

INTERVAL_S = 1.0
READY_WITHIN = 3  # intervals: the wait, a request's limit, one to spare
MODEL, SLOW_MODEL = "llama3.2", "llama3.2:1b"


class Row(NamedTuple):
    """shown: what `status` or the log said, the words that were looked for.  ready_s: from the end of
    what was wrong to ready; None where it was ready all the time."""
    what: str
    shown: str
    ready_s: object
    lost: str = "nothing"


# -- a machine, its gateway, and who uses it ---------------------------------------------

class Gateway:
    """The embedded gateway, a process, with one machine in its database.  prefix: a command that
    runs another one where the gateway is to be."""

    def __init__(self, folder, host="127.0.0.1", prefix=()):
        self.folder, self.port = os.path.join(str(folder), "gateway"), quiet_port()
        self.host, self._prefix = host, list(prefix)
        os.makedirs(self.folder, 0o700)
        self.db = os.path.join(self.folder, "gateway.db")
        made = run_agent(self.folder, "machine", "create", "--pool", "gpu", "--db", self.db, "--json")
        made = json.loads(made.out)
        self.machine_id, self.token = made["machine_id"], made["token"]
        self.program = None

    def start(self):
        self.program = Program(self._prefix + agent_command(
            "gateway", "--host", self.host, "--port", self.port, "--db", self.db),
            environment(self.folder))
        self.program.wait_line(r"\blistening\b")

    def kill(self):
        self.program.__exit__()

    def sql(self, text):
        with contextlib.closing(sqlite3.connect(self.db, timeout=10)) as link:
            link.execute(text)
            link.commit()

    def forget(self):
        """The machine's time to live is over."""
        self.sql("UPDATE machines SET expires_at = 0")

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.kill()


def chat(tokens):
    return json.dumps({"model": MODEL, "messages": [
        {"role": "user", "content": "[[tokens=%d delay=0.05]] hello" % tokens}]})


def read_stream(machine, tokens):
    """Raises: OSError, ValueError, HTTPException unless all of it came."""
    link = http.client.HTTPConnection("127.0.0.1", machine.port, timeout=30)
    with contextlib.closing(link):
        link.request("POST", "/api/chat", chat(tokens), {"Authorization": "Bearer " + machine.token})
        reply = link.getresponse()
        rows = [json.loads(line) for line in reply]
    if reply.status != 200 or not rows[-1].get("done") or rows[-1].get("eval_count") != tokens:
        raise ValueError("%s: %s" % (reply.status, rows[-1]))


class Streams(threading.Thread):
    """A client of the front door that reads one stream of half a second after the other."""

    TOKENS = 10

    def __init__(self, machine):
        super().__init__(daemon=True)
        self.machine, self.whole, self.errors = machine, 0, []
        self._go, self._resting, self._end = threading.Event(), threading.Event(), False
        self._go.set()

    def run(self):
        while not self._end:
            if not self._go.is_set():
                self._resting.set()
                self._go.wait()
                self._resting.clear()
                continue
            try:
                read_stream(self.machine, self.TOKENS)
                self.whole += 1
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.errors.append(repr(error))
                time.sleep(0.1)  # a client's own pause; nothing is expected of it

    def go_on(self):
        """Two more end whole, of which one began after this."""
        errors, goal = len(self.errors), self.whole + 2
        wait_until(lambda: self.whole >= goal or self.errors[errors:], "streams go on")
        assert not self.errors[errors:], self.errors

    @contextlib.contextmanager
    def rest(self):
        self._go.clear()
        try:
            assert self._resting.wait(40)
            yield
        finally:
            self._go.set()

    def end(self):
        self._end = True
        self._go.set()
        self.join(40)


class Machine(RunningDoor):
    """The agent on an embedded gateway, with an engine, and a client that reads streams all the time.
    With a keepalive a second."""

    streams, tenant = None, "default"

    def __init__(self, folder, gateway=None, flags=(), **given):
        gateway = gateway or Gateway(folder)
        super().__init__(folder, models=[MODEL], gateway=gateway, flags=(
            "--machine-id", gateway.machine_id, "--pool-name", "gpu", "--keepalive-interval", INTERVAL_S,
            *flags), **dict({"FAKE_OLLAMA_LAYER_BYTES": "8192"}, **given))

    def __enter__(self):
        super().__enter__()
        self.streams = Streams(self)
        self.streams.start()
        self.streams.go_on()
        self.before = self.figures()
        return self

    def __exit__(self, kind, *_):
        if self.streams:
            self.streams.end()
        super().__exit__()
        if kind is None:
            assert processes_of(self.home) == {}

    def start_again(self):
        """The agent; returns the seconds until it is ready."""
        began_s = time.monotonic()
        self.agent.__exit__()
        self.start_agent()
        self.agent.wait_line(r"notice ready\b")
        return time.monotonic() - began_s

    # -- what it shows

    def shown(self):
        return self.control("GET", "/status")[1]

    def cli(self, *arguments):
        return run_agent(self.home, *arguments)

    def wait_shown(self, state, *words, by_command=True):
        """Until its status is so, and the command line says it too.  Returns: it, for the table."""
        def fits():
            status = self.shown()
            return status["state"] == state and all(word in status["message"] for word in words)
        wait_until(fits, "%s, %s; it is %s" % (state, words, self.shown()))
        if by_command:
            said = self.cli("status")
            assert said.code == 0 and re.search("^state +%s for" % state, said.out, re.M), said
            assert all(word in said.out for word in words), said
        return told(state, *words)

    def wait_log(self, pattern, after=0):
        return self.agent.wait_line(pattern, after=after)[0]

    def wait_ready(self):
        """From now, seconds until it is ready by itself, with a keepalive since."""
        began_s, keepalives = time.monotonic(), self.shown()["keepalives"]

        def ready():
            status = self.shown()
            return status["state"] == "ready" and status["keepalives"] > keepalives
        with StallMeter() as stalls:
            wait_until(ready, "it is ready again")
            took_s = time.monotonic() - began_s
        assert took_s <= READY_WITHIN * INTERVAL_S + 3 * stalls.worst_s, took_s
        return took_s

    # -- what it holds, and what it keeps

    def figures(self):
        """Descriptors, threads, processes and memory, while nobody asks for anything."""
        with self.streams.rest():
            wait_until(lambda: not self.shown()["front_door"]["streams"], "nothing streams")
            agent = psutil.Process(self.agent.pid)
            return {"descriptors": agent.num_fds(), "threads": agent.num_threads(),
                    "processes": len(agent.children(recursive=True)), "bytes": agent.memory_info().rss}

    def as_before(self, bytes_more=8 << 20):
        """It holds what it held, whatever happened between."""
        def same():
            now = self.figures()
            return all(now[name] <= self.before[name] for name in now if name != "bytes")
        wait_until(same, "it holds what it held: %s, now %s" % (self.before, self.figures()))
        now = self.figures()["bytes"]
        assert now <= self.before["bytes"] + bytes_more, (self.before, now)

    def used(self):
        return json.loads(self.read("usage.json"))["tenants"].get(self.tenant, {"requests": 0})

    def nothing_lost(self, others=0):
        """All streams came whole, and usage and audit log have each of them, and of other clients; all
        files are sound."""
        assert not self.streams.errors, self.streams.errors
        with self.streams.rest():
            whole = self.streams.whole + others
            wait_until(lambda: self.used()["requests"] == whole, "all are counted: %d" % whole)
            wait_until(lambda: len(self.audited()) == whole, "all are in the audit log")
        if not others:
            assert self.used()["completion_tokens"] == whole * Streams.TOKENS
        verified = self.cli("audit", "verify")
        assert verified.code == 0, verified
        assert MODEL + ":latest" in json.loads(self.read("models.json"))["models"]
        assert not [name for name in os.listdir(self.state) if name.endswith((".tmp", ".bad"))]

    def audited(self):
        """Requests in the audit log."""
        folder = os.path.join(self.state, "audit")
        rows = [json.loads(line) for name in sorted(os.listdir(folder)) if name.endswith(".jsonl")
                for line in self.read(os.path.join("audit", name)).splitlines()]
        return [row for row in rows if row["kind"] == "request" and row["outcome"] == "ok"]


def told(state, *words):
    return "`%s`: %s" % (state, " … ".join(words))


# -- the gateway: one machine, which lives through all of it -------------------------------

def gateway_down(machine):
    machine.gateway.kill()
    shown = machine.wait_shown("unreachable", "connection refused", "Is the gateway running there?")
    machine.streams.go_on()
    machine.gateway.start()
    return Row("gateway down", shown, machine.wait_ready())


def gateway_half_open(machine):
    """Its kernel takes connections, and nobody answers them."""
    machine.gateway.program.signal(signal.SIGSTOP)
    shown = machine.wait_shown("unreachable", "no answer within", "A firewall, or a tunnel that hangs?")
    machine.streams.go_on()
    machine.gateway.program.signal(signal.SIGCONT)
    return Row("gateway half open: it accepts and is silent", shown, machine.wait_ready())


@contextlib.contextmanager
def another_gateway(machine):
    """A hostile one at the place of the machine's own, until the end of the block."""
    gateway = machine.gateway
    gateway.kill()
    with HostileGateway(token=gateway.token, port=gateway.port) as other:
        other.machines[gateway.machine_id] = "ready"
        yield other
    gateway.start()


def through_faults(machine, faults):
    """Each fault in turn: what is shown, and that it is not ready.  Returns: seconds from the last."""
    with another_gateway(machine) as other:
        for number, (fault, *words) in enumerate(faults):
            before = len(other.requests)
            other.fault = fault
            other.wait_count(before + 1)
            machine.wait_shown("unreachable", *words, by_command=not number)
        machine.streams.go_on()
        assert other.elsewhere.connections == 0, "nothing went where it redirects to"
        other.fault = None
        took_s = machine.wait_ready()
    machine.wait_ready()
    return took_s


def gateway_slow(machine):
    took_s = through_faults(machine, [(fault, "no answer within", "curl -m 5 http://")
                                      for fault in ("drip", "drip_for_ever")])
    return Row("gateway slow: a byte each 100 ms", told("unreachable", "no answer within", "curl"), took_s)


def gateway_lies(machine):
    took_s = through_faults(machine, [
        ("login_page", "it answered 200 and no JSON", "a proxy or an ingress before it?"),
        ("promise_broken", "is unwell: it answered 200 without status ok"),
        ("status_not_ok", "without status ok"), ("json_list", "200 and no JSON"),
        ("panic", "500 Internal Server Error", "what does its log say?"),
        ("redirect_302", "it redirects (302), which is not followed", "port and scheme to the target")])
    return Row("gateway lies: HTML, wrong JSON, 500, a redirect", told(
        "unreachable", "is unwell: it answered 200 and no JSON", "a proxy or an ingress before it?"), took_s)


def token_revoked(machine):
    machine.gateway.sql("UPDATE machines SET token_sha256 = 'not ' || token_sha256")
    shown = machine.wait_shown("refused", "refused the machine token (401", "beta9 machine create")
    machine.streams.go_on()
    machine.gateway.sql("UPDATE machines SET token_sha256 = substr(token_sha256, 5)")
    return Row("token revoked, and restored", shown, machine.wait_ready())


def machine_forgotten(machine):
    """What is shown of that lasts milliseconds; the log has it."""
    registrations, lines = machine.shown()["registrations"], len(machine.agent.lines())
    machine.gateway.forget()
    took_s = machine.wait_ready()
    machine.wait_log(r"warning expired what=.*does not know this machine.*registers again by itself", lines)
    assert machine.shown()["registrations"] == registrations + 1
    machine.streams.go_on()
    return Row("gateway has forgotten the machine", told(
        "expired", "does not know this machine", "It registers again by itself"), took_s)


def move(source, target):
    for end in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(source + end, target + end)


def database_lost(machine):
    """A new one knows no token; then the old one is put back."""
    gateway = machine.gateway
    gateway.kill()
    move(gateway.db, gateway.db + ".kept")
    gateway.start()
    shown = machine.wait_shown("refused", "refused the machine token (401", "beta9 machine create")
    machine.streams.go_on()
    gateway.kill()
    move(gateway.db, gateway.db + ".new")
    move(gateway.db + ".kept", gateway.db)
    gateway.start()
    return Row("gateway's database lost, and put back", shown, machine.wait_ready())


def agent_stopped(machine):
    """SIGSTOP for longer than the gateway remembers it; who asks it meanwhile is told so."""
    machine.agent.signal(signal.SIGSTOP)
    machine.gateway.forget()
    said = machine.cli("status")
    assert said.code == 5 and "does not answer: no answer within 5 s" in said.err, said
    machine.agent.signal(signal.SIGCONT)
    took_s = machine.wait_ready()
    machine.streams.go_on()
    return Row("agent stopped (SIGSTOP) for longer than it is remembered", "exit 5: the agent … does "
               "not answer", took_s)


GATEWAY = (gateway_down, gateway_half_open, gateway_slow, gateway_lies, token_revoked, machine_forgotten,
           database_lost, agent_stopped)


def around_one_machine(folder):
    with Machine(folder) as machine:
        rows = [happens(machine) for happens in GATEWAY]
        machine.nothing_lost()
        machine.as_before()
    return rows


@pytest.mark.timeout(240)
def test_whatever_the_gateway_does_is_shown_and_streams_go_on(tmp_path):
    around_one_machine(str(tmp_path))


# -- the agent, killed ----------------------------------------------------------------------

def agent_killed(folder):
    """kill -9 in the midst of a pull, with an engine that serves."""
    with Machine(folder, B9AGENT_INFERENCE_ENGINE="ollama", FAKE_OLLAMA_LAYER_BYTES="60000",
                 FAKE_OLLAMA_RATE="20000") as machine, machine.streams.rest():
        whole = machine.streams.whole
        wait_until(lambda: machine.used()["requests"] == whole, "it is counted")
        kept = ("control.token", "inference.token", "usage.json")
        before = {name: machine.read(name) for name in kept}
        pull = Program(agent_command("pull", SLOW_MODEL), environment(machine.home))
        wait_until(lambda: machine.status()["transfers"], "the pull runs")
        engine = {child.pid for child in psutil.Process(machine.agent.pid).children(recursive=True)}
        machine.agent.signal(signal.SIGKILL)
        machine.agent.wait()
        assert pull.wait() != 0 and "Has it ended? b9agent.py status" in pull.text(), pull.text()
        assert any(map(lives, engine)), "nobody has ended the engine"
        said = machine.cli("status")
        assert said.code == 5 and "no agent is running on" in said.err, said
        machine._extra["B9AGENT_INFERENCE_AUTOSTART"] = "true"
        took_s = machine.start_again()
        machine.wait_log(r"\bleftover\b")
        machine.wait_log("notice inference_ready")
        assert not any(map(lives, engine)), "what was left has ended"
        assert {name: machine.read(name) for name in kept} == before
        assert machine.used()["requests"] == whole and len(machine.audited()) == whole
        assert machine.cli("audit", "verify").code == 0
        again = machine.cli("pull", SLOW_MODEL)
        assert again.code == 0 and "is here" in again.out, again
        read_stream(machine, 5)
        return [Row("agent killed (-9) in a pull, started again", "exit 5: no agent is running on … its log "
                    "says why", took_s, "streams; the pull, until asked for again; ≤ 5 s of usage, 5 min of "
                    "energy")]


def lives(pid):
    """One that ended and that nobody has waited for does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.timeout(240)
def test_an_agent_that_is_killed_leaves_nothing_once_it_is_started_again(tmp_path):
    agent_killed(str(tmp_path))


# -- what needs root: in namespaces of its own -----------------------------------------------

def run(*command):
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, (command, done.stdout.decode())


def small_state(folder):
    """The state folder of the machine to come, on a file system of its own."""
    state = os.path.join(folder, "door-home", ".b9agent")
    os.makedirs(state)
    run("mount", "-t", "tmpfs", "-o", "mode=700,size=2m", "tmpfs", state)
    return state


def fill(state):
    """To its last byte.  Returns: the file that has it."""
    path = os.path.join(state, "filler")
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def disk_full(folder):
    state = small_state(folder)
    with Machine(folder) as machine:
        filler = fill(state)
        machine.streams.go_on()
        machine.wait_log("error audit_failing what=.*No space left on device.*Make room")
        machine.wait_log("error usage_not_kept what=.*No space left on device")
        pulled = machine.cli("pull", SLOW_MODEL)
        assert pulled.code == 0, "the models' own disk is another"
        machine.wait_log("error models_not_kept what=.*No space left on device")
        said = machine.cli("status").out
        assert re.search("^state +ready", said, re.M) and "the disk does not take it: b9agent.py doctor" in said
        doctor = machine.cli("doctor")
        assert re.search("^fail +disk +state: 0.0 of", doctor.out, re.M), doctor
        os.remove(filler)
        machine.wait_log("notice audit_written_again lost=0")
        machine.streams.go_on()
        machine.nothing_lost()
        wait_until(lambda: SLOW_MODEL in json.loads(machine.read("models.json"))["models"],
                   "what was pulled meanwhile is kept")
        machine.as_before()
        assert machine.shown()["failures"] == 0
        rows = [Row("state folder's disk full, and freed", "`ready`; audit log: the disk does not take "
                    "it: b9agent.py doctor", None, "the engine's log, until its next start")]
        rows.append(full_at_start(machine, state))
    return rows


def full_at_start(machine, state):
    """Nobody finds it then; it is kept alive, and found once there is room."""
    with machine.streams.rest():
        machine.agent.stop()
        os.remove(os.path.join(state, "control.token"))  # as it is at the first start
        filler = fill(state)
        machine.start_again()
        machine.wait_log("error no_control_api what=.*control.token: No space left on device.*tried again")
        machine.wait_log("error address_not_kept what=.*No space left on device.*Make room")
        said = machine.cli("status")
        assert said.code == 5 and "has no control API" in said.err and "the disk full?" in said.err, said
        os.remove(filler)
        wait_until(lambda: machine.cli("status").code == 0, "it is found by itself")
        machine.wait_log("notice audit_written_again lost=0")
        machine.start_engine()
        read_stream(machine, 5)
    return Row("agent started on a full disk, which is freed", "exit 5: has no control API … is the port "
               "taken, or the disk full?", None)


def read_only(folder):
    """The state folder under a read-only mount of itself: what is open can be written, nothing else."""
    state = small_state(folder)
    with Machine(folder) as machine:
        run("mount", "--bind", state, state)
        run("mount", "-o", "remount,bind,ro", state)
        machine.streams.go_on()
        machine.wait_log("error audit_failing what=.*Read-only file system")
        machine.wait_log("error usage_not_kept what=.*Read-only file system")
        said = machine.cli("status").out
        assert re.search("^state +ready", said, re.M) and "the disk does not take it" in said, said
        refused = machine.cli("tenant", "add", "ada")
        assert refused.code == 2 and "Read-only file system" in refused.err, refused
        run("umount", state)
        machine.wait_log("notice audit_written_again lost=0")
        machine.streams.go_on()
        machine.nothing_lost()
        machine.as_before()
        assert machine.shown()["failures"] == 0
        rows = [Row("state folder read-only, and writable again", "`ready`; audit log: the disk does not "
                    "take it: b9agent.py doctor", None)]
        rows.append(read_only_at_start(machine, state))
    return rows


def read_only_at_start(machine, state):
    with machine.streams.rest():
        machine.agent.stop()
        run("mount", "-o", "remount,ro", state)
        machine.agent.__exit__()
        machine.start_agent()
        assert machine.agent.wait() == 2, machine.agent.text()
        assert "cannot write in the state folder" in machine.agent.text()
        assert "Read-only file system. Mend its permissions" in machine.agent.text()
        run("mount", "-o", "remount,rw", state)
        took_s = machine.start_again()
    return Row("agent started on a read-only state folder", "exit 2: cannot write in the state folder … "
               "Read-only file system", took_s)


def descriptors(folder):
    """No more than it has, and clients who want some."""
    with Machine(folder) as machine, machine.streams.rest(), ThreadPoolExecutor() as pool:
        agent = psutil.Process(machine.agent.pid)
        control = machine.read("control.addr")
        kept = http.client.HTTPConnection(control, timeout=30)

        def status():
            kept.request("GET", "/status", headers={"Authorization": "Bearer " + machine.read("control.token")})
            return json.loads(kept.getresponse().read())
        status()
        stream = pool.submit(read_stream, machine, 200)
        wait_until(lambda: status()["front_door"]["streams"] == 1, "a stream runs")
        limits = agent.rlimit(psutil.RLIMIT_NOFILE)
        agent.rlimit(psutil.RLIMIT_NOFILE, (agent.num_fds(), limits[1]))
        ports = int(control.rpartition(":")[2]), machine.port
        socks = [socket.create_connection(("127.0.0.1", port)) for port in ports * 50]
        words = "Too many open files", "raise LimitNOFILE of the service, or ulimit -n"
        wait_until(lambda: status()["state"] == "unreachable" and all(
            word in status()["message"] for word in words), "it says so: %s" % status())
        machine.wait_log("warning unreachable what=.*%s.* do=.*%s" % words)
        before_s = sum(agent.cpu_times()[:2])
        began_s = time.monotonic()
        stream.result()  # it ends whole, and takes its time
        used = (sum(agent.cpu_times()[:2]) - before_s) / (time.monotonic() - began_s)
        assert used < 0.3, "it turns in circles: %.2f of a processor" % used
        said = machine.cli("pull", SLOW_MODEL)
        assert said.code == 5 and "does not answer" in said.err, said
        agent.rlimit(psutil.RLIMIT_NOFILE, limits)
        for sock in [*socks, kept.sock]:
            sock.close()
        took_s = machine.wait_ready()
        read_stream(machine, 5)
    return [Row("descriptors exhausted, clients waiting", told("unreachable", *words), took_s)]


# Of Debian's libfaketime; the other libfaketime.so.1 is for programs of one thread.
FAKETIME = "/usr/lib/%s-linux-gnu/faketime/libfaketimeMT.so.1" % os.uname().machine


def ollama_without_preload(folder):
    """The stand-in behind a shell that lets go of libfaketime, under which its threads hang."""
    real = engines.stand_in(os.path.join(folder, "real"), "ollama")
    path = os.path.join(folder, "bin", "ollama")
    os.mkdir(os.path.dirname(path))
    with open(path, "w") as file:
        file.write('#!/bin/sh\nunset LD_PRELOAD\nexec %s/ollama "$@"\n' % real)
    os.chmod(path, 0o755)
    return os.path.dirname(path)


TENANTS = """tenants:
  - {name: ada, token_sha256: ["%s", "%s"], old_token_until: "%s"}
"""


class Clock:
    """What an agent takes for the time: this machine's, and what was set."""

    def __init__(self, folder, wall_alone):
        self._path = os.path.join(folder, "clock")
        self.environment = {"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": self._path,
                            "FAKETIME_NO_CACHE": 1, "FAKETIME_DONT_FAKE_MONOTONIC": int(wall_alone)}
        self.set("+0")

    def set(self, text):
        with open(self._path + "-new", "w") as file:
            file.write(text)
        os.rename(self._path + "-new", self._path)


class TenantsMachine(Machine):
    token, old_token, tenant = "b9-ada-has-this-token-now-0123456789", "b9-ada-had-this-token-then-012345", "ada"


def clock_steps(folder):
    """The agent's wall clock alone; what measures times goes on as it was."""
    clock, base = Clock(folder, wall_alone=True), 0

    def stepped(text, day_begins=False):
        """It is ready all the time, streams go on, and what is used is used of the right day."""
        nonlocal base
        with machine.streams.rest():
            clock.set(text)
            base = machine.streams.whole if day_begins else base
        machine.streams.go_on()
        with machine.streams.rest():
            whole = machine.streams.whole
            wait_until(lambda: machine.used()["requests"] == whole - base, "%s: all is counted: %s of %d" % (
                text, machine.used(), whole - base))
            wait_until(lambda: len(machine.audited()) == whole, "the audit log goes on")
        verified = machine.cli("audit", "verify")
        assert verified.code == 0, verified
        return machine.ask("GET", "/api/tags", token=machine.old_token)[0]
    half_a_day = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 43200))
    tokens = [hashlib.sha256(token.encode()).hexdigest() for token in (
        TenantsMachine.token, TenantsMachine.old_token)]
    with TenantsMachine(
            folder, program_folder=ollama_without_preload(folder), kind="ollama", **clock.environment,
            tenants=TENANTS % (*tokens, half_a_day)) as machine:
        words = "clock what=.*this machine's clock is 86[34].. s %s the gateway's.* do=.*timedatectl status"
        assert stepped("-1d") == 200, "a token's end is later still"
        machine.wait_log(words % "behind")
        assert stepped("+0") == 200
        assert stepped("+1d", day_begins=True) == 401, "the old token has ended"
        machine.wait_log(words % "ahead of")
        assert stepped("+0") == 200, "and has not"
        status = machine.shown()
        assert status["state"] == "ready" and not status["failures"], status
        machine.as_before()
    shown = "`ready`; log: this machine's clock is 86400 s %s the gateway's … timedatectl status"
    return [Row("clock stepped by −1 day, and back", shown % "behind", None),
            Row("clock stepped by +1 day, and back", shown % "ahead of", None,
                "what tenants had used that day: a new one began")]


def gateway_by_name(folder):
    """Names come from a file of our own, and from a name server that is not there."""
    names = os.path.join(folder, "hosts")

    def write(text):
        with open(names, "w") as file:
            file.write("127.0.0.1 localhost%s\n" % text)
    write(" gw.chaos.test")
    servers = os.path.join(folder, "resolv.conf")
    with open(servers, "w") as file:
        file.write("nameserver 127.0.0.1\n")
    run("mount", "--bind", names, "/etc/hosts")
    run("mount", "--bind", servers, "/etc/resolv.conf")
    with Machine(folder, flags=("--gateway-host", "gw.chaos.test")) as machine:
        write("")
        shown = machine.wait_shown("unreachable", "cannot look up gw.chaos.test",
                                   "Check gateway.host, or the machine's name server")
        machine.streams.go_on()
        write(" gw.chaos.test")
        took_s = machine.wait_ready()
        machine.nothing_lost()
        machine.as_before()
    return [Row("no names (DNS), and names again", shown, took_s)]


HERE_IP, THERE_IP = "10.97.0.1", "10.97.0.2"


def network_cut(folder):
    """The gateway, and a client of the front door, are on the other end of a cable."""
    with Program(["unshare", "--net", "sleep", "infinity"], environment(folder)) as other:
        there = ["nsenter", "--target", str(other.pid), "--net"]
        wait_until(lambda: os.readlink("/proc/%d/ns/net" % other.pid) != os.readlink("/proc/self/ns/net"),
                   "another network")
        run("ip", "link", "add", "here", "type", "veth", "peer", "name", "there", "netns", other.pid)
        for prefix, name, address in (((), "here", HERE_IP), (there, "there", THERE_IP)):
            run(*prefix, "ip", "address", "add", address + "/24", "dev", name)
            run(*prefix, "ip", "link", "set", name, "up")
        run(*there, "ip", "link", "set", "lo", "up")
        with Machine(folder, Gateway(folder, THERE_IP, there), flags=(
                "--gateway-host", THERE_IP, "--inference-host", "0.0.0.0", "--insecure")) as machine:
            rows = [cut(machine, there, *each) for each in CUTS]
            machine.nothing_lost(len(CUTS))
            machine.as_before()
    return rows


SILENT = ("neigh", "replace", THERE_IP, "lladdr", "02:00:00:00:00:99", "dev", "here", "nud", "permanent")
CUTS = (("network cut (link down), and healed", ("link", "set", "here", "down"),
         ("link", "set", "here", "up"), ("Network is unreachable", "Check the network")),
        ("packets vanish silently, and arrive again", SILENT, ("neigh", "del", THERE_IP, "dev", "here"),
         ("no answer within", "A firewall")))


def cut(machine, there, what, begin, end, words):
    """The client on the other side reads its stream to the end, later; those on this side go on."""
    reader = Program([*there, "curl", "-sN", "-H", "Authorization: Bearer " + machine.token, "-d", chat(60),
                      "http://%s:%d/api/chat" % (HERE_IP, machine.port)], environment(machine.home))
    with reader:
        reader.wait_line('"content"', "out")
        run("ip", *begin)
        shown = machine.wait_shown("unreachable", *words)
        machine.streams.go_on()
        run("ip", *end)
        took_s = machine.wait_ready()
        assert reader.wait() == 0
        assert json.loads(reader.lines("out")[-1])["eval_count"] == 60
    return Row(what, shown, took_s)


def small_memory(pid):
    """Put a process into a memory cgroup that it does not fit.  Returns: how many the kernel has
    killed there, as a function; None where this machine has no such cgroup for us."""
    for top, limit, kills in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.oom_control"),
                              ("/sys/fs/cgroup", "memory.max", "memory.events")):
        folder = os.path.join(top, "b9chaos-%d-%s" % (os.getpid(), os.urandom(4).hex()))
        with contextlib.suppress(OSError):
            os.mkdir(folder)
            try:
                for name, value in ((limit, 1 << 20), ("cgroup.procs", pid)):
                    with open(os.path.join(folder, name), "w") as file:
                        file.write(str(value))
                return folder, lambda: int(re.search(r"^oom_kill (\d+)", open(
                    os.path.join(folder, kills)).read(), re.M).group(1))
            except OSError:
                os.rmdir(folder)
    return None


def out_of_memory(folder):
    """The engine's server, at the next request."""
    with Machine(folder) as machine:
        registered, server = machine.shown()["registrations"], machine.status()["pid"]
        cgroup = small_memory(server)
        if cgroup is None:
            os.kill(server, signal.SIGKILL)
        what = machine.wait_log(r'child name=engine state=backoff .*what="([^"]*)"').group(1)
        began_s = time.monotonic()
        wait_until(lambda: machine.status()["status"] == "running", "it runs again")
        took_s = time.monotonic() - began_s
        assert len(machine.streams.errors) <= 20, machine.streams.errors
        machine.streams.go_on()
        status = machine.shown()
        assert (status["state"], status["failures"], status["registrations"]) == ("ready", 0, registered)
        if cgroup:
            assert cgroup[1]() > 0, "it was the kernel"
            os.rmdir(cgroup[0])
        machine.streams.errors.clear()
        machine.as_before()
    return [Row("engine killed for lack of memory" + ("" if cgroup else " (SIGKILL: no memory cgroup here)"), what, took_s,
                "the streams that it computed")]


def machine_asleep(folder):
    """All clocks of the agent go on for ten minutes while it is stopped; then nobody answers."""
    clock = Clock(folder, wall_alone=False)
    with Machine(folder, program_folder=ollama_without_preload(folder), kind="ollama",
                 **clock.environment) as machine:
        lines = len(machine.agent.lines())
        machine.agent.signal(signal.SIGSTOP)
        machine.gateway.program.signal(signal.SIGSTOP)
        machine.gateway.forget()
        clock.set("+600")
        machine.agent.signal(signal.SIGCONT)
        machine.wait_log("warning expired what=.*no keepalive was sent for 60. s.*registers again by itself", lines)
        assert machine.shown()["state"] != "ready"
        machine.gateway.program.signal(signal.SIGCONT)
        took_s = machine.wait_ready()
        machine.streams.go_on()
        machine.nothing_lost()
    return [Row("machine asleep for ten minutes", told(
        "expired", "no keepalive was sent for 600 s", "It registers again by itself"), took_s)]


HEAVY = ("disk_full", "read_only", "descriptors", "clock_steps", "gateway_by_name", "network_cut",
         "out_of_memory", "machine_asleep")


def inside(name):
    """The rows of one of HEAVY, done in a process in namespaces that end with it."""
    done = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
         sys.executable, os.path.abspath(__file__), "--inside", name], stdout=subprocess.PIPE)
    assert done.returncode == 0, "%s: exit %d" % (name, done.returncode)
    return [Row(*row) for row in json.loads(done.stdout.decode().splitlines()[-1])]


def be_inside(name):
    run("ip", "link", "set", "lo", "up")
    with tempfile.TemporaryDirectory(prefix="b9chaos-") as folder:
        try:
            rows = globals()[name](folder)
        finally:
            state = os.path.join(folder, "door-home", ".b9agent")
            while os.path.ismount(state):
                run("umount", "--lazy", state)
    print(json.dumps(rows))


@pytest.mark.root
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", HEAVY)
def test_the_machine_lives_through(name):
    inside(name)


# -- the table ---------------------------------------------------------------------------------

HEAD = "what happens", "what is shown meanwhile", "ready again after", "what is lost"


def cells(row):
    return [row.what, row.shown, "it is, all the time" if row.ready_s is None else "%.2f s" % row.ready_s,
            row.lost]


def installed():
    """What the heavy rows need, of Debian."""
    missing = [package for shows, package in (
        (FAKETIME, "libfaketime"), (shutil.which("ip"), "iproute2"), (shutil.which("curl"), "curl"))
        if not shows or not os.path.exists(shows)]
    if missing:
        run("apt-get", "-q", "install", "-y", "--no-install-recommends", *missing)


def main(arguments):
    if arguments[:1] == ["--inside"]:
        return be_inside(arguments[1])
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="what needs no root")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md, too")
    asked = parser.parse_args(arguments)
    began_s, rows, heavy = time.monotonic(), [], () if asked.quick else HEAVY
    if heavy:
        installed()
    for measure in (around_one_machine, agent_killed):
        with tempfile.TemporaryDirectory(prefix="b9chaos-") as folder:
            rows += measure(folder)
    for name in heavy:
        rows += inside(name)
    print_table([list(HEAD)] + [cells(row) for row in rows])
    about = "%s, %s" % (time.strftime("%-d %B %Y"), about_the_machine())
    print("%s, a keepalive each %g s; this took %.0f s" % (about, INTERVAL_S, time.monotonic() - began_s))
    if asked.readme:
        write_readme("chaos", "".join("| %s |\n" % " | ".join(line) for line in [
            HEAD, ["---"] * len(HEAD)] + [cells(row) for row in rows]) + "\n%s.\n" % about)


if __name__ == "__main__":
    main(sys.argv[1:])
