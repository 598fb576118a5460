#!/usr/bin/env python3
"""GET /health of a running agent over kept connections, beside uvicorn with Starlette.

    tests/bench/control.py [--rounds 9] [--seconds 2] [--python /usr/bin/python3]

wrk (Debian's package) asks with 16 and with 64 connections.  Rounds are interleaved, so that a busy
minute of the machine falls on all alike; medians are printed, and the CPU time that a server took for
a request, which other people's load hardly changes.  wrk has one core, the servers the other.  uvicorn
runs as `pip install uvicorn` leaves it (h11, asyncio), and with httptools and uvloop; both come into a
temporary folder.  Linux.  Exit status: 1 where the agent is not twice as fast as the faster of them.
"""
import argparse
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from helpers import Program, agent_command, environment  # noqa: E402
from hostile_gateway import TOKEN, HostileGateway  # noqa: E402

PINS = ["uvicorn==0.54.0", "starlette==1.10.0", "httptools==0.9.0", "uvloop==0.23.0"]
APPLICATION = """
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
app = Starlette(routes=[Route("/health", lambda request: JSONResponse(
    {"status": "ok", "version": "0.1.0"}))])
"""
UVICORN = {"uvicorn, h11, asyncio": ["--http", "h11", "--loop", "asyncio"],
           "uvicorn, httptools, uvloop": ["--http", "httptools", "--loop", "uvloop"]}
CONNECTIONS = (16, 64)


class Server:
    """One contestant.  rates, p99_ms, cpu_us: lists by number of connections."""

    def __init__(self, name, port, pid):
        self.name, self.port, self.pid = name, port, pid
        self.rates, self.p99_ms, self.cpu_us = ({count: [] for count in CONNECTIONS} for _ in range(3))

    def cpu_s(self):
        with open("/proc/%d/stat" % self.pid) as handle:
            words = handle.read().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def measure(self, connections, seconds, keep=True):
        before = self.cpu_s()
        done = subprocess.run(["wrk", "-t1", "-c%d" % connections, "-d%d" % seconds, "--latency",
                               "http://127.0.0.1:%d/health" % self.port],
                              stdout=subprocess.PIPE, check=True, universal_newlines=True).stdout
        if "Non-2xx" in done or "Socket errors" in done:
            sys.exit("%s failed:\n%s" % (self.name, done))
        count = int(re.search(r"(\d+) requests in", done).group(1))
        value, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", done).groups()
        if keep:
            self.rates[connections].append(float(re.search(r"Requests/sec:\s+([\d.]+)", done).group(1)))
            self.p99_ms[connections].append(float(value) * {"us": 0.001, "ms": 1, "s": 1000}[unit])
            self.cpu_us[connections].append((self.cpu_s() - before) / count * 1e6)


def make_venv(python, folder):
    venv = os.path.join(folder, "venv")
    subprocess.run([python, "-m", "venv", venv], check=True)
    subprocess.run([os.path.join(venv, "bin", "pip"), "install", "-q", "--disable-pip-version-check",
                    "--no-input", "--only-binary=:all:", *PINS], check=True)
    with open(os.path.join(folder, "application.py"), "w") as handle:
        handle.write(APPLICATION)
    return os.path.join(venv, "bin", "python")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(port):
    until = time.monotonic() + 40
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def report(servers):
    print("%-28s" % "" + "".join("%14s %8s %8s" % ("c%d req/s" % count, "p99 ms", "CPU us")
                                 for count in CONNECTIONS))
    for server in servers:
        print("%-28s" % server.name + "".join("%14.0f %8.1f %8.1f" % (
            statistics.median(server.rates[count]), statistics.median(server.p99_ms[count]),
            statistics.median(server.cpu_us[count])) for count in CONNECTIONS))
    worst = min(statistics.median(servers[0].rates[count])
                / max(statistics.median(other.rates[count]) for other in servers[1:])
                for count in CONNECTIONS)
    print("\naim: twice the faster uvicorn: %s (%.1f times)" % ("met" if worst >= 2 else "MISSED", worst))
    return worst >= 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--python", default="/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK)
                        else sys.executable)
    options = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("it needs wrk: apt-get install wrk")
    cores = sorted(os.sched_getaffinity(0))
    folder = tempfile.mkdtemp(prefix="b9bench-")
    os.mkdir(os.path.join(folder, "home"), 0o700)
    programs = []
    try:
        python = make_venv(options.python, folder)
        os.sched_setaffinity(0, {cores[-1]})  # the servers inherit it
        with HostileGateway() as gateway:
            try:
                agent = Program([options.python] + agent_command(
                    "run", "--gateway-host", "127.0.0.1", "--gateway-port", gateway.port,
                    "--control-port", "0")[1:], environment(os.path.join(folder, "home"), BETA9_TOKEN=TOKEN))
                programs.append(agent)
                match, _ = agent.wait_line(r"listening api=control url=http://127\.0\.0\.1:(\d+)")
                servers = [Server("b9agent", int(match.group(1)), agent.pid)]
                for name, arguments in UVICORN.items():
                    port = free_port()
                    programs.append(Program(
                        [python, "-m", "uvicorn", "application:app", "--port", str(port), "--log-level",
                         "warning", "--no-access-log", *arguments], environment(folder), cwd=folder))
                    wait_for(port)
                    servers.append(Server(name, port, programs[-1].pid))
                os.sched_setaffinity(0, {cores[0]})  # and wrk the other
                for turn in range(options.rounds + 1):  # the first warms up
                    for count in CONNECTIONS:
                        for server in servers:
                            server.measure(count, options.seconds, turn > 0)
            finally:
                for program in programs:
                    program.__exit__()
        os.sched_setaffinity(0, set(cores))
        print("CPython %s, %d cores, load %.1f\n" % (subprocess.run(
            [options.python, "-c", "import sys; print(sys.version.split()[0])"], check=True,
            stdout=subprocess.PIPE, universal_newlines=True).stdout.strip(), len(cores), os.getloadavg()[0]))
        return 0 if report(servers) else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if not sys.platform.startswith("linux"):
        sys.exit("tests/bench/control.py reads /proc: Linux only")
    sys.exit(main())
