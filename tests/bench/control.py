"""GET /health of a running agent over kept connections, beside Flask, uvicorn and nginx.

    tests/bench/run --only control [--rounds 9] [--seconds 2] [--quick] [--alone]

wrk asks with 16 and with 64 connections, from one core; the servers have the other, one process each.
Flask runs as it does in production, under gunicorn (one worker with four threads, since its plain
worker keeps no connections); uvicorn with Starlette, as `pip install uvicorn` leaves it (h11, asyncio)
and with httptools and uvloop; nginx answers from its configuration.  All send the agent's own answer.
CPU time for a request hardly depends on what else the machine does.  Linux.
"""
import contextlib
import http.client
import os
import re
import subprocess
import sys

from common import (PYTHON, Table, children_of, cpu_s, finish, free_port, in_turn, installed, options,
                    program_path, scratch, version_of)
from helpers import Program, environment, wait_until
from hostile_gateway import TOKEN, HostileGateway

CONNECTIONS = (16, 64)
COLUMNS = dict([("rate_%d" % count, "requests/s, %d connections" % count) for count in CONNECTIONS]
               + [("p99_%d" % count, "p99 at %d, ms" % count) for count in CONNECTIONS]
               + [("cpu_us", "CPU a request, µs")])
APPLICATIONS = """
import json, os
ANSWER = json.loads(os.environ["ANSWER"])

def make_flask():
    from flask import Flask
    application = Flask(__name__)
    application.get("/health")(lambda: ANSWER)
    return application

def make_starlette():
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    async def health(request):
        return JSONResponse(ANSWER)
    return Starlette(routes=[Route("/health", health)])
"""
UVICORN = ["-m", "uvicorn", "applications:make_starlette", "--factory", "--log-level", "warning",
           "--no-access-log", "--port", "PORT"]
PEERS = {
    "Flask, gunicorn": ["-m", "gunicorn", "applications:make_flask()", "--worker-class", "gthread",
                        "--threads", "4", "--keep-alive", "60", "--bind", "127.0.0.1:PORT"],
    "uvicorn, Starlette (h11, asyncio)": UVICORN + ["--http", "h11", "--loop", "asyncio"],
    "uvicorn, Starlette (httptools, uvloop)": UVICORN + ["--http", "httptools", "--loop", "uvloop"]}
NGINX = """%s
daemon off;
worker_processes 1;
pid %s/nginx.pid;
error_log stderr error;
events { worker_connections 1024; }
http {
    access_log off;
    keepalive_requests 100000000;
    default_type application/json;
    server { listen 127.0.0.1:%d; location = /health { return 200 '%s'; } }
}
"""


class Server:
    def __init__(self, name, port, *pids):
        self.name, self.port, self.pids = name, port, pids

    def measure(self, connections, seconds):
        """A row's figures."""
        before = cpu_s(*self.pids)
        done = subprocess.run(["wrk", "-t1", "-c%d" % connections, "-d%d" % seconds, "--latency",
                               "http://127.0.0.1:%d/health" % self.port],
                              stdout=subprocess.PIPE, check=True, universal_newlines=True).stdout
        if "Non-2xx" in done or "Socket errors" in done:
            sys.exit("%s failed:\n%s" % (self.name, done))
        value, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", done).groups()
        count = int(re.search(r"(\d+) requests in", done).group(1))
        return {"rate_%d" % connections: float(re.search(r"Requests/sec:\s+([\d.]+)", done).group(1)),
                "p99_%d" % connections: float(value) * {"us": 0.001, "ms": 1, "s": 1000}[unit],
                "cpu_us": (cpu_s(*self.pids) - before) / count * 1e6}


def ask_health(port):
    """The answer, or nothing yet."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        link.request("GET", "/health")
        return link.getresponse().read().decode()
    except OSError:
        return None
    finally:
        link.close()


def start_agent(folder, end):
    gateway = end.enter_context(HostileGateway())
    agent = end.enter_context(Program(
        [PYTHON, "-I", installed(folder), "run", "--gateway-host", "127.0.0.1", "--gateway-port",
         str(gateway.port), "--control-port", "0"],
        environment(os.path.join(folder, "home"), BETA9_TOKEN=TOKEN)))
    match, _ = agent.wait_line(r"listening api=control url=http://127\.0\.0\.1:(\d+)")
    return Server("b9agent", int(match.group(1)), agent.pid)


def start_peers(folder, end, answer):
    """Raises: AssertionError where one does not give the same answer."""
    with open(os.path.join(folder, "applications.py"), "w") as handle:
        handle.write(APPLICATIONS)
    peers = []
    for name, words in PEERS.items():
        port = free_port()
        peers.append((name, port, [sys.executable] + [word.replace("PORT", str(port)) for word in words]))
    port, path = free_port(), os.path.join(folder, "nginx.conf")
    with open(path, "w") as handle:
        handle.write(NGINX % ("user root;" if os.geteuid() == 0 else "", folder, port, answer))
    peers.append(("nginx, a fixed text", port,
                  [program_path("nginx"), "-c", path, "-p", folder, "-e", "stderr"]))
    for name, port, command in peers:
        program = end.enter_context(Program(command, environment(folder, ANSWER=answer), cwd=folder))
        same = wait_until(lambda: ask_health(port), name + " answers")
        if "".join(same.split()) != "".join(answer.split()):
            sys.exit("%s answers %r, the agent %r" % (name, same, answer))
        yield Server(name, port, *(children_of(program.pid) or [program.pid]))


def main():
    asked = options(__doc__, rounds=(9, 1, "of each server and number of connections"),
                    seconds=(2, 1, "of each"))
    for name in ("wrk",) + ("nginx",) * (not asked.alone):
        if not program_path(name):
            sys.exit("it needs %s: apt-get install %s" % (name, name))
    cores = sorted(os.sched_getaffinity(0))
    with scratch() as folder, contextlib.ExitStack() as end:
        os.sched_setaffinity(0, {cores[-1]})  # the servers inherit it
        servers = [start_agent(folder, end)]
        if not asked.alone:
            servers += start_peers(folder, end, ask_health(servers[0].port))
        os.sched_setaffinity(0, {cores[0]})  # and wrk the other
        table = Table(COLUMNS, [server.name for server in servers])
        for (server, count), counts in in_turn(
                asked.rounds, [(server, count) for server in servers for count in CONNECTIONS]):
            figures = server.measure(count, asked.seconds)
            if counts:
                table.add(server.name, **figures)
    of = table.median
    claims = [(all(of("b9agent", "rate_%d" % count) > of(name, "rate_%d" % count) for count in CONNECTIONS)
               and of("b9agent", "cpu_us") < of(name, "cpu_us"),
               "more requests a second than %s, each with less CPU time" % name)
              for name in PEERS if not asked.alone]
    return finish(asked, "The control API: `GET /health` over kept connections",
                  "one process each, all the same answer; asked by wrk.", table, claims,
                  () if asked.alone else version_of("Flask", "gunicorn", "uvicorn") + [nginx_version()])


def nginx_version():
    said = subprocess.run([program_path("nginx"), "-v"], stderr=subprocess.PIPE, universal_newlines=True)
    return said.stderr.strip().rpartition(": ")[2].replace("/", " ")


if __name__ == "__main__":
    sys.exit(main())
