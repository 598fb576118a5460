"""What the tests share: processes with watched output, conditions with a deadline, an environment
of one's own.  Standard library only, and 3.8: the interpreter matrix runs this with pytest alone."""
import http.client
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
AGENT = os.path.join(ROOT, "b9agent.py")

# Long enough for a loaded machine, and waited for only by a test that fails.
PATIENCE_S = 40.0


def wait_until(condition, what, within_s=PATIENCE_S):
    """The first true value of condition(), which looks at something observable.

    Raises: AssertionError that says `what` did not come true.
    """
    until = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, "not within %g s: %s" % (within_s, what)
        time.sleep(0.01)


def print_table(rows):
    """As Markdown has it: the first row is the head, the first column stands to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) if not column else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(row, widths))]
        print("| " + " | ".join(cells) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def about_the_machine(python=sys.executable):
    """What stands beside figures, in one line.  python: what the agent ran on."""
    with open("/proc/cpuinfo") as handle:
        model = re.search(r"model name\s*: (.*)", handle.read())
    with open("/etc/os-release") as handle:
        system = re.search(r'PRETTY_NAME="?([^"\n]*)', handle.read())
    version = subprocess.run([python, "-c", "import platform; print(platform.python_version())"],
                             stdout=subprocess.PIPE, check=True).stdout.decode().strip()
    return "%d cores of %s, %s, Linux %s, CPython %s" % (
        os.cpu_count(), model.group(1).strip() if model else platform.machine(),
        system.group(1) if system else "", platform.release(), version)


def replace_block(text, name, block):
    """text with that between <!-- name --> and <!-- /name -->.  Raises: ValueError where it has none."""
    begin, end = "<!-- %s -->\n" % name, "<!-- /%s -->" % name
    before, found, rest = text.partition(begin)
    _, found_too, after = rest.partition(end)
    if not found or not found_too:
        raise ValueError("no place for it: %s … %s" % (begin.strip(), end))
    return before + begin + block.rstrip("\n") + "\n" + end + after


def write_readme(name, block):
    path = os.path.join(ROOT, "README.md")
    with open(path, encoding="utf-8") as handle:
        text = replace_block(handle.read(), name, block)
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(text)


def quiet_port():
    """A port of loopback where nobody listens, and that no socket gets by asking for any free one: it
    is below the range that the system hands out (an agent's control API was once its own gateway)."""
    import random
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue  # somebody's; take another


def environment(home, **extra):
    """The environment of a process under test: none of the caller's settings, proxies or units.

    home: also its TMPDIR's parent, so that what it leaves behind is found.
    """
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR", "B9TESTS_RUN", "LD_LIBRARY_PATH")
            if name in os.environ}
    kept.update(HOME=str(home), LANG="C.UTF-8", PYTHONDONTWRITEBYTECODE="1",
                # No port that others hold, and no Ollama of whoever runs the tests.
                B9AGENT_INFERENCE_PORT="0", OLLAMA_HOST="127.0.0.1:9")
    kept.update({name: str(value) for name, value in extra.items() if value is not None})
    return kept


def agent_command(*arguments):
    """B9TESTS_AGENT: an installed one, which is compiled already, in place of the file."""
    return [sys.executable, os.environ.get("B9TESTS_AGENT", AGENT), *map(str, arguments)]


class Finished:
    """What a program that ended has said."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def __repr__(self):
        return "exit %s\n--- stdout\n%s\n--- stderr\n%s" % (self.code, self.out, self.err)


def run_agent(home, *arguments, stdin=None, within_s=PATIENCE_S, cwd=None, **extra):
    """Run `python3 b9agent.py …` to its end.  Raises: AssertionError where it does not end."""
    child = subprocess.Popen(agent_command(*arguments), env=environment(home, **extra),
                             stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd,
                             start_new_session=True)
    try:
        out, err = child.communicate(None if stdin is None else stdin.encode(), timeout=within_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
        raise AssertionError("%s did not end within %g s\n%s" % (
            arguments, within_s, Finished(None, out.decode(), err.decode())))
    return Finished(child.returncode, out.decode("utf-8"), err.decode("utf-8"))


class Program:
    """A process whose lines are collected as they come.  A context manager: it is ended, by pid,
    with everything it started, when the block is left."""

    def __init__(self, command, env, cwd=None):
        self._changed = threading.Condition()
        self._lines = {"out": [], "err": []}
        self._open = 2
        self.process = subprocess.Popen(command, env=env, cwd=cwd, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        start_new_session=True)
        self._threads = [threading.Thread(target=self._collect, args=(name, stream), daemon=True)
                         for name, stream in (("out", self.process.stdout),
                                              ("err", self.process.stderr))]
        for thread in self._threads:
            thread.start()

    def _collect(self, name, stream):
        with stream:
            for raw in stream:
                with self._changed:
                    self._lines[name].append(raw.decode("utf-8", "replace").rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    @property
    def pid(self):
        return self.process.pid

    def lines(self, name="err"):
        with self._changed:
            return list(self._lines[name])

    def text(self):
        return "\n".join(self.lines("out") + self.lines("err"))

    def wait_line(self, pattern, name="err", within_s=PATIENCE_S, after=0):
        """(match, number of the line) of the first line from `after` on that has the pattern."""
        until = time.monotonic() + within_s
        seen = after
        with self._changed:
            while True:
                while seen < len(self._lines[name]):
                    match = re.search(pattern, self._lines[name][seen])
                    if match:
                        return match, seen
                    seen += 1
                left = until - time.monotonic()
                assert left > 0, "no line with %r within %g s in:\n%s" % (
                    pattern, within_s, "\n".join(self._lines[name]))
                assert self._open, "it ended without a line with %r:\n%s" % (
                    pattern, "\n".join(self._lines["out"] + self._lines["err"]))
                self._changed.wait(left)

    def signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, within_s=PATIENCE_S):
        """Its exit status, once its output is read to the end as well."""
        try:
            code = self.process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError("it did not end within %g s:\n%s" % (within_s, self.text()))
        for thread in self._threads:
            thread.join(within_s)
        return code

    def stop(self):
        """SIGTERM, then its exit status."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except OSError:
            pass  # it ended, and so did all it started
        self.process.wait()
        for thread in self._threads:
            thread.join(PATIENCE_S)


class StallMeter:
    """How long this machine kept a thread that was due from running: the slack of a test that
    holds a time which somebody else promised.  Use as a context manager around it."""

    def __init__(self):
        self.worst_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._measure, daemon=True)

    def _measure(self):
        last = time.monotonic()
        while not self._stop.wait(0.02):
            now = time.monotonic()
            self.worst_s = max(self.worst_s, now - last - 0.02)
            last = now

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def tree(folder):
    """{path below folder: mode and type}, symbolic links not followed."""
    found = {}
    for top, folders, files in os.walk(str(folder)):
        for name in folders + files:
            path = os.path.join(top, name)
            found[os.path.relpath(path, str(folder))] = os.lstat(path).st_mode
    return found


def files_with(folder, secret):
    """Paths below a folder whose bytes have the secret in them."""
    found = []
    for top, _, files in os.walk(str(folder)):
        for name in files:
            path = os.path.join(top, name)
            try:
                with open(path, "rb") as handle:
                    if secret.encode() in handle.read():
                        found.append(path)
            except OSError:
                pass  # gone in between, or a socket
    return found


def nvidia_smi_script(rows, processes=""):
    """An nvidia-smi of an old driver, which knows the basic columns alone: index, uuid, name, memory
    in all and in use (MiB), load, temperature; and processes: gpu_uuid, pid, memory."""
    # Only what the shell has built in: a test may leave nothing else on PATH.
    return ("#!/bin/sh\ncase $1 in\n"
            "*pci.bus_id*) echo 'Field \"pci.bus_id\" is not a valid field to query.'; exit 2;;\n"
            "*compute-apps*) printf '%%s' '%s';;\n*) printf '%%s' '%s';;\nesac\n" % (processes, rows))


def ask_control(state, path):
    """The text that the agent of a state folder answers to GET, over its control API."""
    address, token = ((state / name).read_text().strip() for name in ("control.addr", "control.token"))
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path, headers={"Authorization": "Bearer " + token})
        return connection.getresponse().read().decode()
    finally:
        connection.close()


class RunningDoor:
    """A real agent with an engine behind its front door: a context manager.

        with RunningDoor(tmp_path, "ollama", models=["llama3.2"]) as door:
            status, headers, body = door.ask("POST", "/api/chat", {…})

    engine: "ollama" (fake_ollama.py), "ledger" or "ledger-ollama" (ledger_engine.py as llama-server or
    as Ollama), or "none".  folder: of another program, which `model` is started with, by `kind`.
    tenants: text of tenants.yaml; without it the token is that of inference.token.  Settings of the
    agent and of the stand-in are given as variables: B9AGENT_INFERENCE_SLOTS=4.  gateway: a context
    manager with port and token, in place of a HostileGateway.
    """

    def __init__(self, folder, engine="ollama", models=(), tenants=None, program_folder=None, kind="",
                 model="", flags=(), gateway=None, **extra):
        import engines
        from hostile_gateway import HostileGateway
        self.folder, self.engine, self.models = str(folder), engine, models
        self.home = os.path.join(self.folder, "door-home")
        self.state = os.path.join(self.home, ".b9agent")
        os.makedirs(self.state, 0o700, exist_ok=True)
        os.chmod(self.home, 0o700)
        if tenants is not None:
            self.write_tenants(tenants)
        self.book = os.path.join(self.folder, "ledger")
        self.kind, self.model = kind, model
        if engine.startswith("ledger"):
            name = "ollama" if engine == "ledger-ollama" else "llama-server"
            program_folder = engines.stand_in(os.path.join(self.folder, "bin"), name,
                                              file="ledger_engine.py")
            self.kind, extra = name, dict({"LEDGER": self.book}, **extra)
            self.model = "" if name == "ollama" else self.write_model("ledger")
        elif engine == "ollama" and not kind:
            program_folder = engines.stand_in(os.path.join(self.folder, "bin"), "ollama")
            self.kind = "ollama"
        self.gateway = gateway or HostileGateway()
        self._flags, self._extra = flags, dict({
            "PATH": engines.path_with(*[program_folder] if program_folder else []),
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, **extra)
        self.agent = None

    def write_model(self, name):
        """A GGUF file of a few kilobytes."""
        from fake_ollama import llama_metadata, make_gguf
        path = os.path.join(self.folder, name + ".gguf")
        with open(path, "wb") as handle:
            handle.write(make_gguf(llama_metadata(name, 1), 4096, name))
        return path

    def write_tenants(self, text):
        path = os.path.join(self.state, "tenants.yaml")
        with open(os.open(path + "-new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
            handle.write(text)
        os.rename(path + "-new", path)

    def __enter__(self):
        self.gateway.__enter__()
        self.port = quiet_port()
        try:
            self.start_agent()
            self.agent.wait_line(r"notice ready\b")
            if self.engine != "none":
                self.start_engine()
        except BaseException:
            self.__exit__()
            raise
        return self

    def start_agent(self):
        self.agent = Program(agent_command(
            "run", "--gateway-host", "127.0.0.1", "--gateway-port", self.gateway.port, "--control-port",
            "0", "--inference-port", self.port, *self._flags),
            environment(self.home, BETA9_TOKEN=self.gateway.token, **self._extra))

    def __exit__(self, *_):
        if self.agent is not None:
            try:
                self.agent.stop()  # which ends its engine too
            except AssertionError:
                for line in self.agent.lines():  # what a stuck one leaves, in a session of its own
                    match = re.search(r"child name=engine state=running pid=(\d+)", line)
                    if match:
                        try:
                            os.killpg(int(match.group(1)), signal.SIGKILL)
                        except OSError:
                            pass
            self.agent.__exit__()
        self.gateway.__exit__(None, None, None)

    def start_engine(self):
        status, answer = self.control("POST", "/inference/start", {"engine": self.kind,
                                                                   "model": self.model})
        assert status == 200 and answer["status"] == "running", answer
        for name in self.models:
            status, answer = self.control("POST", "/inference/pull", {"model": name})
            assert status == 200, answer
        return self.status()

    def control(self, method, path, body=None):
        """(status, answer) of the agent's control API."""
        import json
        address, token = map(self.read, ("control.addr", "control.token"))
        link = http.client.HTTPConnection(address, timeout=120)
        try:
            link.request(method, path, None if method == "GET" else json.dumps(body or {}),
                         {"Authorization": "Bearer " + token, "Content-Type": "application/json"})
            reply = link.getresponse()
            raw = reply.read()
            return reply.status, json.loads(raw) if raw[:1] in b"{[" else raw.decode()
        finally:
            link.close()

    def status(self):
        return self.control("GET", "/inference/status")[1]

    @property
    def url(self):
        return self.status()["endpoint"]

    def read(self, name):
        """The text of a file in its state folder."""
        with open(os.path.join(self.state, name)) as handle:
            return handle.read().strip()

    @property
    def token(self):
        return self.read("inference.token")

    def ask(self, method, path, body=None, token=None, headers=None, timeout=PATIENCE_S):
        """(status, headers, body) of the door.  token: "" sends none."""
        import json
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        token = self.token if token is None else token
        sent = dict({"Authorization": "Bearer " + token} if token else {}, **headers or {})
        try:
            link.request(method, path, body if body is None or isinstance(body, bytes)
                         else json.dumps(body), sent)
            reply = link.getresponse()
            return reply.status, reply.headers, reply.read()
        finally:
            link.close()

    def metrics(self):
        """{(name, ((label, value), …)): number} of the agent's metrics."""
        found = {}
        for line in self.control("GET", "/metrics")[1].splitlines():
            match = re.match(r"^(\w+)(?:\{(.*)\})? (\S+)$", line)
            if match and not line.startswith("#"):
                labels = tuple(sorted(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match.group(2) or "")))
                found[match.group(1), labels] = float(match.group(3))
        return found
