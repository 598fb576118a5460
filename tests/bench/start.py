"""What b9agent costs to start and to keep running, beside floors and its predecessor.

    tests/bench/run --only start [--rounds 25] [--seconds 60] [--idle-seconds 600] [--quick] [--alone]

Each start ends with a stamp that the gateway takes when the first keepalive has arrived whole; peak
memory is read there as well, of the process that sent it.  Then all are in service side by side, each
with a gateway of its own: a keepalive a second, which gives memory and CPU time for a keepalive, and
with the default of a keepalive a minute, from which the hour is extrapolated.  Where there are two
cores the gateway has one and the starts the other.  Linux.
"""
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

from common import (AGENT, HERE, PYTHON, Table, cpu_s, finish, in_turn, installed, memory_mib, options,
                    scratch, version_of)
from helpers import environment, wait_until

TOKEN = "bench-machine-token-0123456789"
START_S = 3
COLUMNS = {"import_ms": "until all is imported, ms", "first_ms": "exec to first keepalive, ms",
           "peak_mib": "peak memory of that, MiB", "rss_mib": "memory in service, MiB",
           "keepalive_ms": "CPU a keepalive, ms", "hour_s": "CPU an idle hour, s"}


class Gateway:
    """Answers every register and keepalive at once.  times: when each keepalive had arrived, in
    nanoseconds; of the process `watched` at that time, cpu: its CPU seconds, and peaks: the most
    memory, in MiB, that it had had."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self.times, self.cpu, self.peaks, self.watched = [], [], [], None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # of this thread alone
        while True:
            link, _ = self._listener.accept()
            with link:
                self._answer(link)

    def _answer(self, link):
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = b""
        while b"\r\n\r\n" not in data:
            piece = link.recv(65536)
            if not piece:
                return
            data += piece
        head, body = data.split(b"\r\n\r\n", 1)
        length = int(re.search(rb"(?i)content-length: *(\d+)", head).group(1))
        while len(body) < length:
            body += link.recv(65536)
        now = time.monotonic_ns()
        json.loads(body)
        if b"/keepalive" in head.split(b"\r\n", 1)[0]:
            if self.watched:
                self.cpu.append(cpu_s(self.watched))
                self.peaks.append(memory_mib(self.watched, "VmHWM"))
            self.times.append(now)
            answer = b'{"status":"ok","machine_state":{"status":"ready"}}'
        else:
            answer = b'{"config":null,"machine_state":{"status":"registered"}}'
        link.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
                     b"Connection: close\r\n\r\n%s" % (len(answer), answer))


class Contender:
    """A way to start an agent.  imports, once, serve: command lines, with PORT and INTERVAL where
    these go; None where it has no such mode."""

    def __init__(self, name, imports=None, once=None, serve=None):
        self.name, self.imports, self.once, self.serve = name, imports, once, serve


def contenders(folder, alone):
    place = installed(folder)
    flags = ["--gateway-host", "127.0.0.1", "--gateway-port", "PORT", "--pool-name", "gpu"]
    service = ["run", "--keepalive-interval", "INTERVAL", "--control-port", "0"] + flags
    floor = [PYTHON, os.path.join(HERE, "floor_agent.py"), "PORT"]
    script = [sys.executable, os.path.join(HERE, "predecessor_agent.py"), "--gateway-port", "PORT"]
    def importing(python, what):
        return [python, "-c", "import os, %s; os._exit(0)" % what]

    found = [
        Contender("b9agent, installed",
                  importing(PYTHON, "sys; sys.path.insert(0, %r); import b9agent" % place),
                  [PYTHON, "-I", place, "--once"] + flags, [PYTHON, "-I", place] + service),
        Contender("b9agent.py as a script, compiled at each start", None,
                  [PYTHON, AGENT, "--once"] + flags, [PYTHON, AGENT] + service),
        Contender("floor: an interpreter", importing(PYTHON, "sys")),
        Contender("floor: the two requests by urllib, and no more", importing(PYTHON, "json, urllib.request"),
                  floor, floor + ["INTERVAL"]),
        Contender("predecessor: httpx, psutil, click", importing(sys.executable, "httpx, psutil, click"),
                  script + ["--once"], script + ["--keepalive-interval", "INTERVAL"])]
    return found[:-1] if alone else found


def start(command, gateway, env):
    """Exec to exit.  Returns: milliseconds."""
    argv = [word.replace("PORT", str(gateway.port)) for word in command]
    gateway.times, gateway.peaks = [], []
    null = os.open(os.devnull, os.O_RDWR)
    began = time.monotonic_ns()
    pid = os.posix_spawn(argv[0], argv, env, file_actions=[
        (os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)])
    gateway.watched = pid
    _, status, _ = os.wait4(pid, 0)
    ended = time.monotonic_ns()
    gateway.watched = None
    os.close(null)
    if status:
        sys.exit("ended with status %d: %s" % (status, " ".join(argv)))
    gateway.times = [(at - began) / 1e6 for at in gateway.times]
    return (ended - began) / 1e6


def measure_starts(found, table, rounds, env):
    gateway = Gateway()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # children inherit it
    for one, counts in in_turn(rounds, [one for one in found if one.imports], warm=2):
        took_ms = start(one.imports, gateway, env)
        if counts:
            table.add(one.name, import_ms=took_ms)
    for one, counts in in_turn(rounds, [one for one in found if one.once], warm=2):
        start(one.once, gateway, env)
        if len(gateway.times) != 1:
            sys.exit("%s sent %d keepalives" % (one.name, len(gateway.times)))
        if counts:
            table.add(one.name, first_ms=gateway.times[0], peak_mib=gateway.peaks[0])


def serve(found, seconds, interval, env, folder):
    """All side by side.  Yields (contender, CPU seconds, seconds, keepalives, MiB): between two
    keepalives, and so of whole intervals; what belongs to the start is before the first of them."""
    running = []
    try:
        for one in found:
            gateway = Gateway()
            home = os.path.join(folder, "service-%d-%d" % (interval, len(running)))
            os.mkdir(home, 0o700)
            values = {"PORT": str(gateway.port), "INTERVAL": str(interval)}
            child = subprocess.Popen([values.get(word, word) for word in one.serve],
                                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                     stderr=subprocess.DEVNULL, env=dict(env, HOME=home))
            gateway.watched = child.pid
            running.append((one, gateway, child))
        wait_until(lambda: all(gateway.times for _, gateway, _ in running), "each sent a keepalive")
        time.sleep(seconds + START_S)
        for one, gateway, child in running:
            first = next((at for at, time_ns in enumerate(gateway.times)
                          if time_ns - gateway.times[0] > START_S * 1e9), -1)
            count = len(gateway.times) - 1 - first
            if first < 0 or not count:
                sys.exit("%d s are too few for a keepalive each %d s" % (seconds, interval))
            yield (one, gateway.cpu[-1] - gateway.cpu[first],
                   (gateway.times[-1] - gateway.times[first]) / 1e9, count, memory_mib(child.pid))
    finally:
        for _, _, child in running:
            child.terminate()
        for _, _, child in running:
            child.wait()


def claims(table):
    """Of the installed agent, as multiples."""
    ours, _, _, floor, *others = table.values
    of = table.median
    found = [(of(ours, "first_ms") <= 1.5 * of(floor, "first_ms"),
              "its first keepalive comes within 1.5 times the floor's time"),
             (of(ours, "rss_mib") <= 1.5 * of(floor, "rss_mib"),
              "in service within 1.5 times the floor's memory")]
    for other in others:
        less = [key for key in COLUMNS if of(other, key) is not None and of(ours, key) >= of(other, key)]
        found.append((not less, "less than the predecessor in each column%s" % (
            less and ", but for: " + ", ".join(COLUMNS[key] for key in less) or "")))
    return found


def main():
    asked = options(__doc__, rounds=(25, 5, "starts of each"), seconds=(60, 5, "with a keepalive a second"),
                    idle_seconds=(600, 0, "with a keepalive a minute; 0: leave that out"))
    with scratch() as folder:
        env = environment(os.path.join(folder, "home"), BETA9_TOKEN=TOKEN)
        found = contenders(folder, asked.alone)
        table = Table(COLUMNS, [one.name for one in found])
        measure_starts(found, table, asked.rounds, env)
        serving = [one for one in found if one.serve]
        for one, cpu, _, count, mib in serve(serving, asked.seconds, 1, env, folder):
            table.add(one.name, rss_mib=mib, keepalive_ms=cpu * 1e3 / count)
        if asked.idle_seconds:
            for one, cpu, took_s, _, _ in serve(serving, asked.idle_seconds, 60, env, folder):
                table.add(one.name, hour_s=cpu / took_s * 3600)
    return finish(
        asked, "A start, a keepalive, an idle hour",
        "the predecessor is an agent written after the earlier Python agent's published behaviour.%s" % (
            " An idle hour has a keepalive a minute, and is extrapolated from %d minutes."
            % (asked.idle_seconds // 60) if asked.idle_seconds else ""), table,
        claims(table), () if asked.alone else version_of("httpx", "psutil", "click"))


if __name__ == "__main__":
    sys.exit(main())
