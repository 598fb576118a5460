#!/usr/bin/env python3
"""What b9agent costs to start and to keep running, beside floors and its predecessor.

    tests/bench/start.py [--rounds 25] [--seconds 60] [--python /usr/bin/python3]

Runs are interleaved, so that a busy minute of the machine falls on all alike; medians are printed.
"exec to keepalive" ends with a stamp that the gateway takes when the first keepalive has arrived whole;
peak RSS is read there as well, of the process that sent it.  Where there are two cores the gateway has
one and the agents the other.  Linux.
"""
import argparse
import json
import os
import platform
import py_compile
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.dirname(HERE))

from helpers import print_table  # noqa: E402

AGENT = os.path.join(ROOT, "b9agent.py")
TOKEN = "bench-machine-token-0123456789"
AIMS = {("b9agent.py, a script", "first_ms"): 60, ("b9agent, installed", "first_ms"): 45,
        ("b9agent, installed", "rss_mib"): 22, ("b9agent, installed", "cpu_ms"): 2}


class Gateway:
    """Answers every register and keepalive at once.  times: when each keepalive had arrived, in
    nanoseconds; peaks: the most memory, in MiB, that the process `watched` had had by then."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self.times, self.peaks, self.watched = [], [], None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[-1]})  # of this thread alone
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
            self.times.append(now)
            if self.watched:
                self.peaks.append(memory_mib(self.watched, "VmHWM"))
            answer = b'{"status":"ok","machine_state":{"status":"ready"}}'
        else:
            answer = b'{"config":null,"machine_state":{"status":"registered"}}'
        link.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
                     b"Connection: close\r\n\r\n%s" % (len(answer), answer))


def memory_mib(pid, name):
    with open("/proc/%d/status" % pid) as handle:
        return int(re.search(name + r":\s*(\d+) kB", handle.read()).group(1)) / 1024


def cpu_s(pid):
    """CPU time of a process with all its threads, to the nanosecond: the clock that the kernel keeps
    for it.  Source: clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


class Contender:
    """A way to start an agent.  once, serve: command lines, with PORT where the port goes; None where
    it has no such mode."""

    def __init__(self, name, once, serve=None, keepalive=True):
        self.name, self.once, self.serve, self.keepalive = name, once, serve, keepalive
        self.first_ms, self.wall_ms, self.cpu_ms, self.peak_mib = [], [], [], []
        self.rss_mib = self.per_keepalive_ms = self.period_s = None


def at_port(command, port):
    return [word.replace("PORT", str(port)) for word in command]


def run_once(contender, gateway, environment):
    """One start, exec to exit."""
    argv = at_port(contender.once, gateway.port)
    gateway.times, gateway.peaks = [], []
    null = os.open(os.devnull, os.O_RDWR)
    began = time.monotonic_ns()
    pid = os.posix_spawn(argv[0], argv, environment, file_actions=[
        (os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)])
    gateway.watched = pid
    _, status, usage = os.wait4(pid, 0)
    ended = time.monotonic_ns()
    gateway.watched = None
    os.close(null)
    if status:
        sys.exit("%s ended with status %d: %s" % (contender.name, status, " ".join(argv)))
    contender.wall_ms.append((ended - began) / 1e6)
    contender.cpu_ms.append((usage.ru_utime + usage.ru_stime) * 1e3)
    if contender.keepalive:
        if len(gateway.times) != 1:
            sys.exit("%s sent %d keepalives" % (contender.name, len(gateway.times)))
        contender.first_ms.append((gateway.times[0] - began) / 1e6)
        contender.peak_mib.append(gateway.peaks[0])


def run_service(contenders, seconds, environment, scratch):
    """All side by side, each with a gateway of its own, a keepalive a second."""
    running = []
    try:
        for contender in contenders:
            gateway = Gateway()
            home = os.path.join(scratch, "service-%d" % len(running))
            os.mkdir(home, 0o700)
            child = subprocess.Popen(at_port(contender.serve, gateway.port), stdin=subprocess.DEVNULL,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                     env=dict(environment, HOME=home))
            running.append((contender, gateway, child))
        until = time.monotonic() + 30
        while any(len(gateway.times) < 3 for _, gateway, _ in running):
            if time.monotonic() > until:
                sys.exit("not every agent sent three keepalives within 30 s")
            time.sleep(0.05)
        before = [(len(gateway.times), cpu_s(child.pid)) for _, gateway, child in running]
        time.sleep(seconds)
        for (contender, gateway, child), (count, cpu) in zip(running, before):
            sent = gateway.times[count:]
            contender.per_keepalive_ms = (cpu_s(child.pid) - cpu) * 1e3 / len(sent)
            contender.rss_mib = memory_mib(child.pid, "VmRSS")
            contender.period_s = (sent[-1] - sent[0]) / 1e9 / (len(sent) - 1)
    finally:
        for _, _, child in running:
            child.terminate()
        for _, _, child in running:
            child.wait()


def install(scratch):
    """The file as `service install` leaves it: a folder with a __main__.py, compiled."""
    folder = os.path.join(scratch, "installed")
    os.mkdir(folder)
    py_compile_into(shutil.copy(AGENT, folder))
    with open(os.path.join(folder, "__main__.py"), "w") as handle:
        handle.write("import sys, b9agent\nsys.exit(b9agent.main())\n")
    return folder


def py_compile_into(path):
    if OPTIONS.python == sys.executable:
        py_compile.compile(path, doraise=True)
    else:
        subprocess.run([OPTIONS.python, "-m", "py_compile", path], check=True)


def predecessor(scratch):
    """A Python with what the predecessor needs, or a sentence on why there is none."""
    venv = os.path.join(scratch, "venv")
    for command in ([OPTIONS.python, "-m", "venv", venv],
                    [os.path.join(venv, "bin", "python"), "-m", "pip", "install", "-q", "--no-input",
                     "--only-binary=:all:", "-r", os.path.join(HERE, "requirements.txt")]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            return None, done.stdout.decode("utf-8", "replace").strip().splitlines()[-1]
    return os.path.join(venv, "bin", "python"), ""


def contenders(scratch):
    python, installed = OPTIONS.python, install(scratch)
    flags = ["--gateway-host", "127.0.0.1", "--gateway-port", "PORT", "--pool-name", "gpu"]
    service = ["run", "--keepalive-interval", "1", "--control-port", "0"] + flags
    floor = [python, os.path.join(HERE, "floor_agent.py"), "PORT"]
    found = [
        Contender("b9agent.py, a script", [python, AGENT, "--once"] + flags, [python, AGENT] + service),
        Contender("b9agent, installed", [python, "-I", installed, "--once"] + flags,
                  [python, "-I", installed] + service),
        Contender("floor: an agent over urllib", floor, floor + ["1"]),
        Contender("floor: python3 -c pass", [python, "-c", "pass"], keepalive=False),
        Contender("floor: python3 -I -S -c pass", [python, "-I", "-S", "-c", "pass"], keepalive=False),
    ]
    if not OPTIONS.alone:
        other, why = predecessor(scratch)
        if other is None:
            print("the predecessor is not in the table: its packages cannot be had here (%s)\n" % why)
        else:
            script = [other, os.path.join(HERE, "predecessor_agent.py"), "--gateway-port", "PORT"]
            found.append(Contender("the predecessor (httpx, psutil, click)", script + ["--once"],
                                   script + ["--keepalive-interval", "1"]))
    return found


def number(values, digits=1):
    return "%.*f" % (digits, statistics.median(values)) if values else "–"


def report(found):
    floor = next(row for row in found if "urllib" in row.name)
    against = statistics.median(floor.first_ms)
    rows = [("start: medians of %d" % OPTIONS.rounds, "exec to keepalive, ms", "÷ urllib floor",
             "wall, ms", "CPU, ms", "peak RSS, MiB")]
    for row in found:
        ratio = "%.2f" % (statistics.median(row.first_ms) / against) if row.first_ms else "–"
        rows.append((row.name, number(row.first_ms), ratio, number(row.wall_ms), number(row.cpu_ms),
                     number(row.peak_mib)))
    print_table(rows)
    print()
    rows = [("in service: %d s, a keepalive a second" % OPTIONS.seconds, "RSS, MiB",
             "CPU, ms a keepalive", "÷ urllib floor", "period, s")]
    for row in found:
        if row.rss_mib is not None:
            rows.append((row.name, "%.1f" % row.rss_mib, "%.2f" % row.per_keepalive_ms,
                         "%.2f" % (row.per_keepalive_ms / floor.per_keepalive_ms),
                         "%.3f" % row.period_s))
    if len(rows) > 1:
        print_table(rows)
        print()
    figures = {"first_ms": lambda row: row.first_ms and statistics.median(row.first_ms),
               "rss_mib": lambda row: row.rss_mib, "cpu_ms": lambda row: row.per_keepalive_ms}
    words = {"first_ms": "ms to the first keepalive", "rss_mib": "MiB in service",
             "cpu_ms": "ms of CPU a keepalive"}
    for (name, figure), aim in AIMS.items():
        value = figures[figure](next(row for row in found if row.name == name))
        if value:
            print("aim: %s under %d %s: %s (%.1f)" % (name, aim, words[figure],
                                                     "met" if value < aim else "MISSED", value))


def about_the_machine():
    with open("/proc/cpuinfo") as handle:
        model = re.search(r"model name\s*: (.*)", handle.read())
    version = subprocess.run([OPTIONS.python, "-c", "import sys; print(sys.version.split()[0])"],
                             stdout=subprocess.PIPE, check=True).stdout.decode().strip()
    with open(AGENT, encoding="utf-8") as handle:
        lines = handle.read().count("\n")
    print("%s, %d cores, %s, Linux %s\nCPython %s (%s), b9agent.py of %d lines\n" % (
        model.group(1) if model else platform.machine(), os.cpu_count(),
        platform.freedesktop_os_release()["PRETTY_NAME"] if hasattr(platform, "freedesktop_os_release")
        else "", platform.release(), version, OPTIONS.python, lines))


def main():
    about_the_machine()
    scratch = tempfile.mkdtemp(prefix="b9bench-")
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": os.path.join(scratch, "home"),
                   "LANG": "C.UTF-8", "BETA9_TOKEN": TOKEN, "PYTHONDONTWRITEBYTECODE": "1"}
    os.mkdir(environment["HOME"], 0o700)
    try:
        found = contenders(scratch)
        gateway = Gateway()
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[0]})  # children inherit it; the gateway's thread has its own
        for turn in range(OPTIONS.rounds + 2):
            for contender in found:
                run_once(contender, gateway, environment)
            if turn == 1:  # two turns that fill the caches are not counted
                for contender in found:
                    for values in (contender.first_ms, contender.wall_ms, contender.cpu_ms,
                                   contender.peak_mib):
                        values.clear()
        os.sched_setaffinity(0, set(cores))
        if OPTIONS.seconds:
            run_service([row for row in found if row.serve], OPTIONS.seconds, environment, scratch)
        report(found)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=int, default=60, help="in service; 0 leaves that part out")
    parser.add_argument("--python", default="/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK)
                        else sys.executable)
    parser.add_argument("--alone", action="store_true", help="without the predecessor")
    return parser.parse_args()


if __name__ == "__main__":
    if not sys.platform.startswith("linux"):
        sys.exit("tests/bench/start.py reads /proc: Linux only")
    OPTIONS = options()
    main()
