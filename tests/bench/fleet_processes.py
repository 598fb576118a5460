"""Real agents on one embedded gateway, for fleet.py: an outage that begins with SIGKILL, the return,
what a keepalive costs the gateway, and the same keepalive in Flask under gunicorn beside it."""
import http.client
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone

import psutil

import b9agent
from helpers import AGENT, PATIENCE_S, environment, quiet_port, wait_until

HERE = os.path.dirname(os.path.abspath(__file__))
PYTHON = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
PEER = ["Flask==3.1.3", "gunicorn==27.0.1", "blinker==1.9.0", "click==8.1.8", "itsdangerous==2.2.0",
        "Jinja2==3.1.6", "MarkupSafe==3.0.4", "packaging==26.0", "Werkzeug==3.1.9"]
PEER_NAME = "Flask %s, gunicorn %s" % tuple(pin.partition("==")[2] for pin in PEER[:2])
METRICS = {"cpu_utilization_pct": 12.5, "memory_utilization_pct": 40.0, "free_gpu_count": 1,
           "total_cpu_available": 8000, "total_memory_available": 32768}


class Sender:
    """A machine of our own that sends keepalives as an agent does: each over a new connection.
    said: the number in the newest one that was answered "ok"."""

    def __init__(self, port, machine):
        self.port, (self.machine_id, self.token) = port, machine
        self.said = self.count = 0
        self.latency_ms = []

    def post(self, path, body):
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            link.request("POST", "/api/v1/machine/" + path, json.dumps(body),
                         {"Authorization": "Bearer " + self.token, "Content-Type": "application/json"})
            reply = link.getresponse()
            return reply.status == 200 and bool(json.loads(reply.read()))
        finally:
            link.close()

    def register(self):
        return self.post("register", {"machine_id": self.machine_id, "pool_name": "gpu", "cpu": "8000m",
                                      "provider_name": "generic", "memory": "32768Mi", "gpu_count": "1"})

    def keepalive(self):
        """Whether it was answered "ok", in time."""
        self.count += 1
        began = time.monotonic()
        try:
            fine = self.post("keepalive", {
                "machine_id": self.machine_id, "pool_name": "gpu", "provider_name": "generic",
                "agent_version": "bench", "metrics": dict(METRICS, container_count=self.count)})
        except (OSError, http.client.HTTPException):
            return False
        self.latency_ms.append((time.monotonic() - began) * 1e3)
        self.said = self.count if fine else self.said
        return fine

    def pace(self, rate, stop):
        """Keepalives at a rate until stop is set; the next one is sent when it is due."""
        due = time.monotonic() + random.random() / rate
        while not stop.wait(max(0.0, due - time.monotonic())):
            self.keepalive()
            due = max(due + 1.0 / rate, time.monotonic())


class Senders:
    """Some of them, at a rate in all, while the block runs."""

    def __init__(self, port, machines, rate):
        self.all = [Sender(port, machine) for machine in machines]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=sender.pace, args=(rate / len(machines), self._stop))
                         for sender in self.all]

    def __enter__(self):
        for sender in self.all:
            sender.register()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def latency_ms(self):
        return [value for sender in self.all for value in sender.latency_ms]


class Arrivals(threading.Thread):
    """Keepalives as the gateway's database dates them.  A machine's next one is seconds away, so a look
    each half second sees all of them; the gateway itself does nothing for it."""

    def __init__(self, db, left_out):
        super().__init__(daemon=True)
        self.times, self._db, self._ended = [], db, threading.Event()
        self._newest = dict.fromkeys(left_out, float("inf"))

    def run(self):
        link = sqlite3.connect(self._db, timeout=10.0)
        while not self._ended.wait(0.5):
            for machine_id, at in link.execute("SELECT machine_id, last_keepalive FROM machines "
                                               "WHERE last_keepalive IS NOT NULL"):
                if at > self._newest.get(machine_id, 0.0):
                    self._newest[machine_id] = at
                    self.times.append(at)
        link.close()

    def stop(self):
        self._ended.set()
        self.join()


def install(folder):
    """As `service install` leaves it: compiled once."""
    os.mkdir(folder)
    subprocess.run([PYTHON, "-m", "py_compile", shutil.copy(AGENT, folder)], check=True)
    with open(os.path.join(folder, "__main__.py"), "w") as handle:
        handle.write("import sys, b9agent\nsys.exit(b9agent.main())\n")
    return [PYTHON, "-I", folder]


def cpu_s(pids):
    """CPU time of processes with all their threads, to the nanosecond.  clock_getcpuclockid(3)."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


class Processes:
    """The gateway and its agents.  log: the gateway's stderr of all its lives."""

    def __init__(self, folder, agents, interval_s):
        self.folder, self.count, self.interval_s = folder, agents, interval_s
        self.db, self.log = os.path.join(folder, "gateway.db"), os.path.join(folder, "gateway.log")
        self.program, self.port = install(os.path.join(folder, "installed")), quiet_port()
        store = b9agent.MachineStore(self.db)
        self.machines = [store.create_machine("gpu") for _ in range(agents)]
        self.ours = [store.create_machine("gpu") for _ in range(9)]
        store.close()
        self.gateway, self.agents = None, []
        self.arrivals = Arrivals(self.db, [machine_id for machine_id, _ in self.ours])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.arrivals.is_alive():
            self.arrivals.stop()
        for child in self.agents + [self.gateway] if self.gateway else self.agents:
            if child.poll() is None:
                child.kill()
            child.wait()

    def spawn(self, home, log, *arguments, **extra):
        os.makedirs(home, 0o700, exist_ok=True)
        with open(log, "ab") as handle:
            return subprocess.Popen(self.program + list(map(str, arguments)), stdin=subprocess.DEVNULL,
                                    stdout=handle, stderr=handle, env=environment(home, **extra))

    def start_gateway(self):
        home = os.path.join(self.folder, "gateway")
        self.gateway = self.spawn(home, self.log, "gateway", "--port", self.port, "--db", self.db)
        probe = Sender(self.port, self.ours[0])

        def up():
            try:
                return probe.register()
            except OSError:
                return False
        wait_until(up, "the gateway answers")
        return time.time()

    def start_agents(self):
        self.arrivals.start()
        for number, (machine_id, token) in enumerate(self.machines):
            home = os.path.join(self.folder, "agent-%d" % number)
            self.agents.append(self.spawn(
                home, home + ".log", "run", "--gateway-host", "127.0.0.1", "--gateway-port", self.port,
                "--control-port", 0, "--keepalive-interval", self.interval_s, BETA9_TOKEN=token,
                BETA9_MACHINE_ID=machine_id, B9AGENT_TAILNET_SOCKET="none", BETA9_POOL_NAME="gpu"))

    def ready_after(self, since_s):
        """{machine id: seconds from a moment to its first keepalive since}, of those that sent one."""
        link = sqlite3.connect(self.db, timeout=10.0)
        rows = link.execute("SELECT machine_id, last_keepalive FROM machines "
                            "WHERE last_keepalive > ?", (since_s,)).fetchall()
        link.close()
        return {machine_id: at - since_s for machine_id, at in rows}

    def wait_all_ready(self, since_s, within_s):
        """[seconds]: when each was first ready, after a moment."""
        first, ours = {}, {machine_id for machine_id, _ in self.ours}

        def look():
            for machine_id, after_s in self.ready_after(since_s).items():
                first.setdefault(machine_id, after_s)
            time.sleep(0.2)
            return len(first.keys() - ours) == self.count
        wait_until(look, "all %d agents are ready" % self.count, within_s)
        return sorted(after_s for machine_id, after_s in first.items() if machine_id not in ours)

    def registered_at(self, since_s):
        """Times, to the second, of registrations that the gateway has logged."""
        ours = {machine_id for machine_id, _ in self.ours}
        with open(self.log, encoding="utf-8") as handle:
            found = re.findall(r"^(\S+)Z info machine_registered machine=(\w+)", handle.read(), re.M)
        times = [(datetime.fromisoformat(stamp).replace(tzinfo=timezone.utc).timestamp(), machine_id)
                 for stamp, machine_id in found]
        return [at for at, machine_id in times if at >= since_s - 1 and machine_id not in ours]

    def kill_gateway_at_work(self):
        """SIGKILL while keepalives are written.  Returns what is wrong with the database then: ""."""
        with Senders(self.port, self.ours[1:], 200) as senders:
            time.sleep(1.5)
            self.gateway.kill()
            self.gateway.wait()
        link = sqlite3.connect("file:%s?mode=ro" % self.db, uri=True)
        sound = link.execute("PRAGMA integrity_check").fetchone()[0]
        kept = dict(link.execute("SELECT machine_id, metrics FROM machines WHERE state = 'ready'"))
        link.close()
        lost = [sender for sender in senders.all
                if json.loads(kept[sender.machine_id])["container_count"] < sender.said]
        return "" if sound == "ok" and len(kept) >= self.count and not lost else (
            "integrity %s, %d machines, %d of 8 lost a keepalive that was answered" % (
                sound, len(kept), len(lost)))

    def gateway_figures(self):
        process = psutil.Process(self.gateway.pid)
        return {"pss_mib": process.memory_full_info().pss / 2**20, "threads": process.num_threads(),
                "descriptors": process.num_fds()}

    def stop_agents(self):
        """How many ended otherwise than with exit code 0, or were gone before."""
        early = sum(child.poll() is not None for child in self.agents)
        for child in self.agents:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        codes = [child.wait(PATIENCE_S) for child in self.agents]
        self.arrivals.stop()
        return early + sum(code != 0 for code in codes)


def seconds_since(times, since_s, until_s):
    """How many in each second."""
    counts = [0] * max(1, int(until_s - since_s))
    for at in times:
        if 0 <= at - since_s < len(counts):
            counts[int(at - since_s)] += 1
    return counts


def run(folder, agents, interval_s, steady_s, outage_s):
    """All that is told of the processes, as a dictionary."""
    found = {"agents": agents, "interval_s": interval_s, "outage_s": outage_s}
    with Processes(folder, agents, interval_s) as fleet:
        fleet.start_gateway()
        began = time.time()
        fleet.start_agents()
        found["first_ready_s"] = fleet.wait_all_ready(began, 60 + agents)
        time.sleep(steady_s)
        found["agent_pss_mib"] = sorted(psutil.Process(child.pid).memory_full_info().pss / 2**20
                                        for child in fleet.agents)
        found.update(fleet.gateway_figures())
        # Once all have sent their second one, it is a steady state.
        steady_from = began + found["first_ready_s"][-1] + 1.1 * interval_s
        found["steady"] = seconds_since(fleet.arrivals.times, steady_from, time.time())
        found["database"] = fleet.kill_gateway_at_work()
        time.sleep(outage_s)
        back = fleet.start_gateway()
        found["ready_s"] = fleet.wait_all_ready(back, 90 + 2 * interval_s)
        time.sleep(2 * min(interval_s, steady_s))
        again = fleet.registered_at(back)
        found["registered_again"] = len(again)
        # Who registers again was refused as unknown before: two requests beside the keepalive.
        found["return"] = seconds_since(fleet.arrivals.times + 2 * again, back, time.time())
        found["ended_badly"] = fleet.stop_agents()
    return found


# -- what a keepalive costs, beside Flask ---------------------------------------

def peer(folder, db):
    """gunicorn with the Flask gateway, one process of eight threads: (process, port)."""
    venv, port = os.path.join(folder, "venv"), quiet_port()
    subprocess.run([PYTHON, "-m", "venv", venv], check=True)
    subprocess.run([os.path.join(venv, "bin", "pip"), "install", "-q", "--disable-pip-version-check",
                    "--no-input", "--only-binary=:all:", *PEER], check=True)
    return subprocess.Popen(
        [os.path.join(venv, "bin", "gunicorn"), "--chdir", HERE, "-w", "1", "-k", "gthread", "--threads",
         "8", "-b", "127.0.0.1:%d" % port, "--log-level", "error", "--no-control-socket",
         "flask_gateway:app"], env=environment(folder, DB=db), stdin=subprocess.DEVNULL), port


def cost(folder, rate, seconds, rounds):
    """[(name, CPU us a keepalive, p50 ms, p99 ms, PSS MiB)] of both, interleaved, medians of rounds."""
    os.makedirs(folder)
    with Processes(folder, 0, 60) as fleet:
        fleet.start_gateway()
        other, port = peer(folder, fleet.db)
        try:
            wait_until(lambda: _answers(port), "gunicorn's worker answers")
            rows = [["the embedded gateway", fleet.port, [fleet.gateway.pid], []],
                    [PEER_NAME, port, [other.pid], []]]
            rows[1][2] += [child.pid for child in psutil.Process(other.pid).children(recursive=True)]
            for sender in fleet.ours:
                Sender(fleet.port, sender).register()
            for turn in range(rounds + 1):  # the first warms up
                for name, port, pids, kept in rows:
                    before = cpu_s(pids)
                    with Senders(port, fleet.ours[:8], rate) as senders:
                        time.sleep(seconds)
                    late = sorted(senders.latency_ms)
                    if turn:
                        kept.append(((cpu_s(pids) - before) * 1e6 / len(late), late[len(late) // 2],
                                     late[int(0.99 * len(late))]))
            return [(name, *(statistics.median(column) for column in zip(*kept)),
                     sum(psutil.Process(pid).memory_full_info().pss for pid in pids) / 2**20)
                    for name, _, pids, kept in rows]
        finally:
            other.terminate()
            other.wait()


def _answers(port):
    try:
        return Sender(port, ("", "")).post("keepalive", {}) is not None
    except OSError:
        return False
