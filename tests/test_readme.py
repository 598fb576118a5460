"""README.md is true: each command in it is run as it stands there, in its order, and says what README
shows; its names are the code's; its numbers are the code's.

The tables that `b9agent.py config` writes into README are test_settings.py's."""
import glob
import json
import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import b9agent
import engines
from fake_ollama import llama_metadata, make_gguf
from helpers import (PATIENCE_S, ROOT, Finished, Program, RunningDoor, environment, quiet_port, run_agent,
                     wait_until)
from kube_api import kubeconfig
from test_k3s import K3sApi
from test_service import in_systemd
from test_settings import Terminal
from test_tailnet import Namespace

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as handle:
    README = handle.read()
with open(os.path.join(ROOT, "b9agent.py"), encoding="utf-8") as handle:
    SOURCE = handle.read()
PIECE = re.compile(r"^```(\w*)\n(.*?)^```$|(?<!`)`([^`]+)`(?!`)", re.S | re.M)
BLOCKS = [(language, text) for language, text, _ in PIECE.findall(README) if text]
SPANS = [" ".join(span.split()) for _, _, span in PIECE.findall(README) if span]
COMMANDS = {row.words for row in b9agent.COMMANDS}
# What begins so is typed into a shell.
TYPED = re.compile(r"(\w+=\S+ )?(curl|sh|kubectl|beta9|pip|apt|tests/run|tests/\.venv/bin/python) |TOKEN=\$"
                   r"|(sudo )?(python3 )?b9agent\.py ")


# -- which commands there are ----------------------------------------------------

def is_command(line):
    """Something for a shell, or for ours without its name: `models verify`, `demo --once`."""
    words = line.split() + ["", ""]
    return bool(TYPED.match(line + " " if line.endswith(".py") and " " in line else line)
                or words[1] and " ".join(words[:2]).strip() in COMMANDS
                or words[0] in COMMANDS and words[1].startswith("-"))


def bare(command):
    return re.sub(r"^(sudo )?(python3 )?b9agent\.py ?", "", command)


def commands():
    """What README tells its reader to type, in its order, each once; without mere mentions, such as
    `models fit`, of what stands elsewhere with its arguments."""
    found = {}
    for language, block, span in PIECE.findall(README):
        lines = [] if language else re.sub(r"\\\n +", "", block).splitlines()
        for line in lines + [" ".join(span.split())]:
            line = re.sub(r" +#.*", "", line)
            if is_command(line):
                found.setdefault(bare(line), line)
    return [line for name, line in found.items()
            if line != name or not any(other.startswith(name + " ") for other in found)]


# -- how each is run --------------------------------------------------------------

class Stage:
    """A machine of a reader: a network of its own, an empty home, the two files in a folder, and
    stand-ins for Ollama and llama.cpp on PATH.  known: what the placeholders of README stand for."""

    def __init__(self, folder, network, k3s):
        self.k3s = k3s
        self.network, self.folder, self.home = network, folder / "checkout", folder / "home"
        self.folder.mkdir()
        self.home.mkdir(mode=0o700)
        for name in ("b9agent.py", "install.sh", "README.md"):
            shutil.copy(os.path.join(ROOT, name), str(self.folder))
        for name in ("qwen", "one"):
            (self.folder / (name + ".gguf")).write_bytes(make_gguf(llama_metadata(name, 1), 4096, name))
        self.programs = engines.stand_in(folder / "bin", "ollama", "llama-server")
        # As an installed one it is compiled once, and not at each of fifty starts.
        py_compile.compile(str(self.folder / "b9agent.py"), doraise=True)
        self.program("python3", '[ "$1" != b9agent.py ] || { shift; set -- -m b9agent "$@"; }\n'
                     'exec "%s" "$@"' % sys.executable)
        self.program("sudo", 'exec "$@"')
        self.environment = {"HOME": str(self.home), "PATH": engines.path_with(self.programs),
                            "LANG": "C.UTF-8", "TERM": "xterm", "PYTHONDONTWRITEBYTECODE": "1",
                            **{name: os.environ[name] for name in ("TMPDIR", "B9TESTS_RUN")
                               if name in os.environ}}
        self.known, self.running = {}, []

    def program(self, name, body):
        path = os.path.join(self.programs, name)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o755), "w") as script:
            script.write("#!/bin/sh\n%s\n" % body)

    def filled(self, command):
        for word, value in self.known.items():
            command = command.replace(word, value)
        command = re.sub(r"^b9agent\.py", "python3 b9agent.py", command)
        command = command.replace("sudo b9agent.py", "sudo python3 b9agent.py")
        return command if TYPED.match(command + " ") or "=" in command.split()[0] else (
            "python3 b9agent.py " + command)

    def shell(self, command, before=""):
        return self.network.command("sh", "-c", before + self.filled(command))

    def run(self, command):
        done = subprocess.run(self.shell(command), env=self.environment, cwd=str(self.folder),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=PATIENCE_S)
        return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, command):
        self.running.append(Program(self.shell(command, "exec "), self.environment,
                                    str(self.folder)))
        return self.running[-1]

    def terminal(self, command):
        """A pseudo-terminal with the command on it."""
        return Terminal(self.home, command=self.shell(command), env=self.environment,
                        cwd=str(self.folder))


def ends(code=0, *shows):
    """It ends with this exit code, and what it says has each of the patterns."""
    def run(stage, command):
        done = stage.run(command)
        assert done.code == code, (command, done)
        for pattern in shows:
            assert re.search(pattern, done.out + done.err, re.M), (command, pattern, done)
        return done
    return run


def until_ctrl_c(line, *shows):
    """It goes on until Ctrl-C, and has said such a line by then."""
    def run(stage, command):
        program = stage.start(command)
        program.wait_line(line, "out")
        program.signal(signal.SIGINT)
        assert program.wait() == 0, (command, program.text())
        for pattern in shows:
            assert re.search(pattern, program.text(), re.M), (command, pattern, program.text())
        return program
    return run


class NotHere(str):
    """Why a command cannot be run here, or which test runs it."""


class InBox(str):
    """A script that tests/systemd-box runs in place of the command: COMMAND stands for it.  Each says
    "rc=0", and what README shows."""


def shape(lines):
    """Lines without what differs from machine to machine."""
    return [re.sub(r"\d[\d.]*|\b[0-9a-f]{8}\b|/\S+|http://\S+", "#", re.sub(
        r"\b(machine|pid|state_dir|gateway|url)=\S+|machine [0-9a-f]{8}", r"\1=#", line)) for line in lines]


def sample(first):
    """The lines of the block of README that begins so."""
    (found,) = [text for _, text in BLOCKS if re.match(first, text)]
    return found.splitlines()


def run_demo(stage, command):
    program = until_ctrl_c("keepalive 2")(stage, command)
    shown = sample("b9agent .* demo: ")
    assert shape(program.lines("out"))[:len(shown)] == shape(shown)
    assert not os.listdir(str(stage.home))


def init(stage, command):
    """asks for token and hostname"""
    with stage.terminal(command) as terminal:
        terminal.answer("Token", stage.known["…"])
        terminal.answer("Hostname", "")
        assert terminal.end() == 0, terminal.seen
    path = stage.home / ".b9agent" / "config.yaml"
    assert path.stat().st_mode & 0o777 == 0o600 and "is up" in terminal.seen
    ends(0, "nothing keeps this machine from ready|registers at its start")(stage, "b9agent.py doctor")


def run_and_watch(stage, command):
    """On a terminal a dashboard; else log lines."""
    on_a_terminal("READY", "q")(stage, command)
    agent = stage.agent = stage.start(command)
    agent.wait_line(" notice ready")
    lines = [re.sub("gateway=http://\\S+", "gateway=#", line) for line in agent.lines()
             if "audit_head" not in line]  # of the day, once there are lines of before
    assert shape(lines) == shape(sample("2026-.*listening"))


def on_a_folder_of_its_own(*shows):
    """One that runs beside the agent: a machine of its own."""
    def run(stage, command):
        made = json.loads(stage.run("python3 b9agent.py machine create --json --db gateway.db").out)
        return ends(0, *shows)(stage, "BETA9_TOKEN=%s B9AGENT_HOME=%s/second BETA9_POOL_NAME=gpu "
                              "BETA9_MACHINE_ID=%s %s" % (
            made["token"], stage.folder, made["machine_id"], stage.filled(command)))
    return run


def start_another(stage, command):
    """`stop` the first one before"""
    ends(1, "stop")(stage, command)
    ends()(stage, "b9agent.py stop")
    ends(0, "running")(stage, command)


def ask_the_door(stage, command):
    """After `stop` and `start`, as README says."""
    stage.run("b9agent.py stop")
    ends(0)(stage, "b9agent.py start")
    stage.known["$TOKEN"] = (stage.home / ".b9agent" / "inference.token").read_text().strip()
    said = json.loads(ends()(stage, command + " -sS").out)
    assert [model["id"] for model in said["data"]] == ["llama3.2:1b"], said
    assert "no_token" in stage.run("curl -sS http://127.0.0.1:11434/v1/models").out


MODELS_STATUS = ("curl -sSo /dev/null -w '%{http_code}' -H 'Authorization: Bearer $TOKEN' "
                 "http://127.0.0.1:11434/v1/models")


def add_tenant(stage, command):
    """A change counts within a second; the first one ends the token in inference.token."""
    stage.known["ADA"] = ends(0, "shown this once")(stage, command).out.strip()
    chat = ("curl -sS -H 'Authorization: Bearer ADA' http://127.0.0.1:11434/api/chat -d "
            """'{"model": "llama3.2:1b", "messages": [{"role": "user", "content": "Hello!"}]}'""")

    def taken_up():  # tenants.yaml is looked at when somebody asks
        stage.run("curl -sS http://127.0.0.1:11434/v1/models")
        return any("tenants count=1 names=ada" in line for line in stage.agent.lines())
    wait_until(taken_up, "the tenants are read again")
    ends(0, '"done":true')(stage, chat)
    assert stage.run(MODELS_STATUS).out == "401"


def remove_tenant(stage, command):
    """Nobody is let in, until the file is removed, too."""
    ends(0, "nobody is let in")(stage, command)
    assert stage.run(MODELS_STATUS).out == "401"
    os.remove(str(stage.home / ".b9agent" / "tenants.yaml"))
    wait_until(lambda: stage.run(MODELS_STATUS).out == "200", "the token in inference.token counts again")


def audit_head(stage, command):
    stage.known["SEQ:HASH"] = ends(0, r"^\d+:[0-9a-f]{64}$")(stage, command).out.strip()


def on_a_terminal(text, key):
    """It shows the dashboard until a key is pressed."""
    def run(stage, command):
        with stage.terminal(command) as terminal:
            terminal.read_until(text)
            terminal.type(key)
            assert terminal.end() == 0, terminal.seen
    return run


def other_gateway(stage, command):
    stage.network.ip("addr add 192.168.1.10/32 dev lo")
    stage.start(command).wait_line("listening.*url=http://192.168.1.10:1994")


def create_there(stage, command):
    said = ends(0, "The token is shown once")(stage, command).out
    typed = re.search(r"^  (BETA9_TOKEN=.*)", said, re.M).group(1)
    ends(0, "info ready")(stage, typed + " --once --state-dir %s/third" % stage.folder)


def on_k3s(code=0, *shows):
    """It runs beside a stand-in of k3s's API, as its administrator."""
    def run(stage, command):
        path = stage.folder / "admin.yaml"
        path.write_text(kubeconfig(stage.k3s.port))
        path.chmod(0o600)
        done = subprocess.run(["sh", "-c", stage.filled(command)], cwd=str(stage.folder), env=dict(
            stage.environment, B9AGENT_K3S_KUBECONFIG=str(path), BETA9_HOSTNAME="127.0.0.1"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=PATIENCE_S)
        said = done.stdout.decode()
        assert done.returncode == code, (command, said)
        for pattern in shows:
            assert re.search(pattern, said, re.M), (command, pattern, said)
    return run


def every_help(stage, _command):
    for words in ("status", "models load", "k3s token"):
        ends(0, "^usage: b9agent.py " + words)(stage, "b9agent.py %s --help" % words)


def follow_log(stage, command):
    program = stage.start(command)
    program.wait_line("notice ready", "out")
    program.signal(signal.SIGINT)
    assert program.wait() == 130, program.text()


def import_model(stage, command):
    """Ollama quantizes; llama.cpp, which runs, is not asked."""
    ends(0)(stage, "b9agent.py stop")
    ends(0)(stage, "b9agent.py start")
    ends(0, "one")(stage, command)
    ends(0)(stage, "b9agent.py models delete one --yes")


def add_without_token(stage, command):
    ends(0, "ada")(stage, command.replace("…", "ada@example.com"))
    ends(0)(stage, "b9agent.py tenant remove ada")
    os.remove(str(stage.home / ".b9agent" / "tenants.yaml"))


def report_of_today(stage, command):
    today = time.strftime("%Y-%m-%d", time.gmtime())
    ends(0, today)(stage, re.sub(r"2026-11-\d\d", today, command))


def report_into_a_file(stage, command):
    """0600; not over a file that is there"""
    ends(0, "written: ")(stage, command)
    assert (stage.folder / "report.md").stat().st_mode & 0o777 == 0o600
    ends(2, "report.md")(stage, command)


def top_elsewhere(stage, command):
    """copy that machine's `control.token` for `--control-token-file`"""
    shutil.copy(str(stage.home / ".b9agent" / "control.token"), str(stage.folder))
    os.chmod(str(stage.folder / "control.token"), 0o600)
    on_a_terminal("READY", "q")(stage, command + " --control-token-file control.token")


VENDOR = NotHere("an installer of others, which needs the Internet")
ROWS = [
    ("python3 b9agent.py demo", run_demo),
    ("demo --once", ends(0, "keepalive 2")),
    ("beta9 machine create --pool gpu", NotHere("Beta9's own program, on its gateway")),
    ("b9agent.py machine create", ends(0, "^machine id .*\n.*\ntoken ")),
    ("python3 b9agent.py init --gateway HOST:1994 --pool gpu --machine-id ID", init),
    ("python3 b9agent.py", run_and_watch),
    ("python3 b9agent.py status", ends(0, "^state +ready")),
    ("b9agent.py --once", on_a_folder_of_its_own("info ready")),
    ("b9agent.py doctor", ends(0, "nothing keeps this machine from ready")),
    ("b9agent.py --dry-run", ends(0, '"keepalive": {')),
    ("BETA9_TOKEN=… sh install.sh --gateway HOST:1994 --pool gpu --machine-id ID", InBox("COMMAND")),
    ("curl -fsSL URL/install.sh | BETA9_TOKEN=… sh -s -- --base-url URL --gateway HOST:1994 --pool gpu "
     "--machine-id ID", InBox("b9agent service uninstall --purge; python3 -m http.server 8000 -b 127.0.0.1 "
                              "& until_true curl -s 127.0.0.1:8000; COMMAND")),
    ("sh install.sh --help", ends(0, "--dry-run", "--offline", "--rollback", "--token-file")),
    ("b9agent.py service install|uninstall|status", InBox(
        "b9agent service status && $python b9agent.py service install")),  # uninstall: above
    ("sh install.sh --uninstall", InBox("COMMAND && ls /var/lib/b9agent/config.yaml && "
                                        "! ls /usr/local/lib/b9agent/b9agent.py")),
    ("python3 b9agent.py start", ends(0, "^inference +running", "Ollama|ollama")),
    ("python3 b9agent.py pull llama3.2:1b", ends(0, "llama3.2:1b")),
    ("python3 b9agent.py models", ends(0, "llama3.2:1b")),
    ("python3 b9agent.py models load llama3.2:1b", ends(0)),
    ("python3 b9agent.py stop", ends(0)),
    ("python3 b9agent.py models fit ./qwen.gguf", ends(0, "fits")),
    ("python3 b9agent.py start --model ./qwen.gguf", ends(0, "^inference +running", "llama")),
    ("curl -fsSL https://ollama.com/install.sh \\| sh", VENDOR),
    ("pip install vllm", VENDOR),
    ('pip install "sglang[all]"', VENDOR),
    ("apt install llama.cpp", VENDOR),
    ("pip install mlx-lm", VENDOR),
    ("b9agent.py logs -f", follow_log),
    ("models verify", ends(0)),
    ("models import PATH --quantize q4_K_M", import_model),
    ("models convert PATH --to FOLDER", NotHere("test_models.py and real engines")),
    ("b9agent.py smoke", ends(0, r"^\[0/6\]", r"^\[6/6\]")),
    ("TOKEN=$(cat ~/.b9agent/inference.token)", ends(0)),
    ('curl -H "Authorization: Bearer $TOKEN" http://127.0.0.1:11434/v1/models', ask_the_door),
    ('curl -H "Authorization: Bearer $TOKEN" http://127.0.0.1:11434/v1/chat/completions -d \'{"model": '
     '"llama3.2:1b", "messages": [{"role": "user", "content": "Hello!"}]}\'', ends(0, "You said: Hello!")),
    ("python3 b9agent.py tenant add ada --models 'llama*,qwen*' --tokens-per-day 200000", add_tenant),
    ("python3 b9agent.py tenant list", ends(0, "^ada .*tokens_per_day=200000")),
    ("python3 b9agent.py tenant rotate ada --overlap 24", ends(0, "old one counts until")),
    ("python3 b9agent.py tenant remove ada", remove_tenant),
    ("tenant add ada --no-token --oidc …", add_without_token),
    ("tests/.venv/bin/python tests/test_failure_modes.py", NotHere("test_failure_modes.py, as tests")),
    ("python3 b9agent.py audit verify", ends(0, "^whole: ")),
    ("python3 b9agent.py audit head", audit_head),
    ("python3 b9agent.py audit verify --head SEQ:HASH", ends(0, "^whole: ")),
    ("python3 b9agent.py audit show --last 20", ends(0, "tenant=ada")),
    ("python3 b9agent.py report", ends(0, "^# Use of AI models", "^## Read this first", "`ada`")),
    ("python3 b9agent.py report --from 2026-11-01 --to 2026-11-22", report_of_today),
    ("python3 b9agent.py report --json | python3 -m json.tool", ends(0, '"report": "usage"')),
    ("python3 b9agent.py report --out report.md", report_into_a_file),
    ("python3 b9agent.py report --days 7 --tenant ada", ends(0, "`ada`")),
    ("report --evidence", ends(0, "AI Act")),
    ("b9agent.py top", on_a_terminal("READY", "q")),
    ("b9agent.py top --host HOST[:PORT]", top_elsewhere),
    ("sudo b9agent.py k3s install", NotHere("test_k3s.py, with stand-ins of the vendor's installer")),
    ("b9agent.py k3s rbac", ends(0, "^kind: .ServiceAccount")),
    ("kubectl apply -f -", NotHere("test_k3s.py: test_kubectl_takes_the_manifest")),
    ("sudo b9agent.py k3s rbac --apply", on_k3s(0)),
    ("k3s token", on_k3s(0, r"\w+\.\w+\.")),
    ("k3s check", on_k3s(0)),
    ("kubectl delete serviceaccount beta9-gateway beta9-agent", NotHere("kubectl, on a real k3s")),
    ("python3 b9agent.py gateway --host 192.168.1.10", other_gateway),
    ("python3 b9agent.py machine create --pool gpu --gateway-host 192.168.1.10", create_there),
    ("python3 b9agent.py machine list", ends(0, "^MACHINE .*STATE", " ready ")),
    ("b9agent.py config", ends(0, "^pool +gpu +/.*config.yaml:[0-9]")),
    ("b9agent.py COMMAND --help", every_help),
    ("b9agent.py init", ends(2, "not a terminal")),
    ("beta9 machine create --pool POOL", NotHere("Beta9's own program, on its gateway")),
    ("b9agent.py metrics", ends(0, "^b9agent_build_info")),
    ("tests/run --all", NotHere("it runs this")),
]


def test_the_table_has_each_command_of_the_readme_in_its_order_and_no_other():
    """A command that README has and the table has not is one that nobody runs."""
    assert [command for command, _ in ROWS] == commands()


@pytest.fixture
def stage(tmp_path):
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("needs root, unshare, nsenter and ip")
    with Namespace() as network, K3sApi() as k3s:
        found = Stage(tmp_path, network, k3s)
        yield found
        for program in reversed(found.running):
            if program.process.poll() is None:
                program.stop()
            program.__exit__()


@pytest.mark.root
@pytest.mark.timeout(240)
def test_every_command_does_what_the_readme_says(stage):
    gateway = "python3 b9agent.py %s --db {}/gateway.db".format(stage.folder)
    stage.start(gateway % "gateway").wait_line("listening")
    made = json.loads(stage.run(gateway % "machine create --pool gpu --json").out)
    stage.known = {"HOST:1994": "localhost:1994", "--machine-id ID": "--machine-id " + made["machine_id"],
                   "…": made["token"], "HOST[:PORT]": "127.0.0.1:9999", "PATH": "./one.gguf",
                   "FOLDER": "mlx"}
    for command, run in ROWS:
        if not isinstance(run, (NotHere, InBox)):
            run(stage, command)


@pytest.mark.root
@pytest.mark.timeout(300)
def test_what_installs_does_what_the_readme_says():
    script = ""
    for number, (command, run) in enumerate(ROWS):
        if isinstance(run, InBox):
            script += "part %d; %s; echo rc=$?\n" % (number, run.replace("COMMAND", command))
    for word, value in (("HOST:1994", "127.0.0.1:1994"), ("--machine-id ID", "--machine-id $id"),
                        ("…", "$token"), ("URL", "http://127.0.0.1:8000")):
        script = script.replace(word, value)
    parts = in_systemd(script)
    shown = shape(sample("b9agent .* installed and running"))
    for number, (command, run) in enumerate(ROWS):
        if isinstance(run, InBox):
            said = parts[str(number)]
            assert said.rstrip().endswith("rc=0"), (command, said)
            if "installed and running" in said:
                last = said.replace("user b9agent", "user ubuntu").strip().splitlines()[-4:-1]
                assert shape(last) == shown, said
    assert sum("installed and running" in said for said in parts.values()) >= 2


# -- what is no command: Python, YAML, clients ------------------------------------

def block(words):
    """The one block of README that has these words."""
    (found,) = [text for _, text in BLOCKS if words in text]
    return found


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    with RunningDoor(tmp_path_factory.mktemp("door"), models=["llama3.2:1b"]) as found:
        yield found


def python(door, program, **extra):
    """What a program says that is started beside the agent, as the user whose agent it is."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=environment(door.home, **extra), timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()


def test_the_programs_in_python_run_as_they_stand(door):
    said = python(door, block("from b9agent import inference"))
    assert said.startswith("You said: Hello! ") and "completion_tokens" in said and said.endswith("You said: Hello!")
    assert python(door, "ask_the_model, payload = lambda payload: 'said', {}\n" +
                  block("from b9agent import ColdStartGuard") + "print(result)").strip() == "said"


def cells(first):
    """The rows of the table of README whose head begins so, as lists of cells."""
    table = README[README.index("\n| " + first) + 1:].partition("\n\n")[0]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()[2:]]


USED = {
    "OpenAI's": "import openai; c = openai.OpenAI(); print(c.chat.completions.create("
                "model=M, messages=HELLO).choices[0].message.content)",
    "Ollama's": "import ollama; print(ollama.chat(M, HELLO).message.content)",
    "Anthropic's": "import os, urllib.request as r; print(r.urlopen(r.Request(os.environ['ANTHROPIC_BASE_URL'] + "
                   "'/v1/messages', json.dumps(dict(model=M, max_tokens=20, messages=HELLO)).encode(), {"
                   "'x-api-key': os.environ['ANTHROPIC_API_KEY'], 'content-type': 'application/json'})"
                   ").read().decode())",
}


def test_the_clients_are_let_in_as_the_table_says(door):
    begin = "import json; M, HELLO = 'llama3.2:1b', [{'role': 'user', 'content': 'Hello!'}]\n"
    tried = set()
    for client, how in cells("client |"):
        how = how.replace("HOST:11434", "127.0.0.1:%d" % door.port)
        if client == "LangChain's":
            pytest.importorskip("langchain_openai")
            for call in re.findall("`(.*?)`", how):
                call = call.replace("TOKEN", "token").replace("…", "model=M")
                said = python(door, begin + "from langchain_openai import ChatOpenAI\n"
                              "from langchain_ollama import ChatOllama\n"
                              "token = %r\nprint(%s.invoke('Hello!').content)" % (door.token, call))
                assert "You said: Hello!" in said, call
        else:
            extra = dict(pair.split("=", 1) for pair in re.findall("`(.*?=.*?)`", how.replace("TOKEN", door.token)))
            assert "You said: Hello!" in python(door, begin + USED[client.split()[0].rstrip(",")], **extra), client
        tried.add(client.split()[0].rstrip(","))
    assert tried == set(USED) | {"LangChain's"}


def test_each_config_file_that_is_shown_is_one(tmp_path):
    shown = [text for language, text in BLOCKS if language == "yaml"]
    assert len(shown) == 4
    tmp_path.chmod(0o700)
    for text in shown[1:3]:  # nested and flat say the same, but for what only one of them says
        loaded = loaded_from(tmp_path, text).settings
        assert (loaded.gateway_host, loaded.gateway_port, loaded.pool_name) == ("gw.example.org", 1994, "gpu")
    warm = loaded_from(tmp_path, shown[0]).settings
    assert warm.inference_keep_warm == "auto" and warm.inference_idle_stop == 1800
    assert [name for name, _ in warm.inference_keep_warm_models] == ["llama3.2:1b", "qwen2.5"]


def loaded_from(folder, text):
    path = folder / "config.yaml"
    path.write_text(text.replace("…", "t0ken"))
    path.chmod(0o600)
    return b9agent.load_settings({"state_dir": str(folder), "config": str(path)}, {})


def test_prometheus_takes_what_is_shown_and_is_let_in_with_that_token(tmp_path):
    yaml = pytest.importorskip("yaml")
    (job,) = yaml.safe_load(block("scrape_configs"))["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:9999"]}]
    assert job["authorization"]["credentials_file"].endswith("/.b9agent/control.token")
    if shutil.which("promtool"):
        path = tmp_path / "prometheus.yml"
        (tmp_path / "control.token").write_text("token")
        path.write_text(block("scrape_configs").replace("/home/USER/.b9agent", str(tmp_path)))
        assert subprocess.run(["promtool", "check", "config", str(path)], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT).returncode == 0


# -- names -------------------------------------------------------------------------

def test_every_link_and_file_of_the_project_is_there():
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
               for title in re.findall(r"^## (.*)$", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            assert target[1:] in anchors if target[0] == "#" else os.path.exists(os.path.join(ROOT, target)), target
    for span in SPANS:
        if re.match(r"(tests/[a-z_]|\.ci/|install\.sh$|b9agent\.py$)[\w./]*$", span):
            assert os.path.exists(os.path.join(ROOT, span)), span


def test_every_flag_variable_and_setting_exists():
    others = ""  # the installer's and the benches'
    for path in [os.path.join(ROOT, "install.sh"), os.path.join(ROOT, "tests", "fuzz"), os.path.join(
            ROOT, "tests", "bench", "run")] + glob.glob(
            os.path.join(ROOT, "tests", "bench", "*.py")) + glob.glob(os.path.join(ROOT, "tests", "test_*.py")):
        with open(path, encoding="utf-8") as handle:
            others += handle.read()
    options = {row.flag for row in b9agent.SETTINGS} | {
        option.flag for row in b9agent.COMMANDS for option in row.options} | {"--help", "--all", "--FLAG"}
    flags = {flag for span in SPANS for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", span)}
    assert sorted(flag for flag in flags - options if flag not in others) == []
    variables = {row.variable for row in b9agent.SETTINGS}
    named = set(re.findall(r"\b(?:BETA9|B9AGENT)_[A-Z0-9_]+\b", README))
    assert sorted(name for name in named - variables if name not in SOURCE + others) == []
    paths = {row.path for row in b9agent.SETTINGS if row.path}
    groups = {path.partition(".")[0] for path in paths if "." in path} - {"machine"}
    dotted = {span for span in SPANS if re.match(r"(%s)\.[a-z_0-9]+$" % "|".join(groups), span)}
    files = {"inference.token", "control.addr", "control.token", "energy.json", "control.py"}
    assert sorted(dotted - paths - files) == []


def test_each_error_and_metric_that_is_named_is_one_of_ours():
    for _, codes, _ in cells("status | code"):
        for code in re.findall("`([a-z_]+)`", codes):
            assert '"%s"' % code in SOURCE or code in SOURCE, code
    for row in cells("guard | setting"):
        for code in re.findall("`([a-z_]+)`", row[3]):
            assert '"%s"' % code in SOURCE, code
    for span in SPANS:
        if span.startswith("b9agent_") and not span.endswith("…"):
            assert span[len("b9agent_"):] in SOURCE, span
    states = {state for row in cells("state | means") for state in re.findall("`([a-z]+)`", row[0])}
    assert states == {state.value for state in b9agent.State} - {"stopped"}


def test_what_is_said_when_something_is_wrong_is_what_the_readme_has(home, state, embedded, agent):
    machine, token = embedded.create()
    other, _ = embedded.create()
    state.mkdir(0o700)
    (state / "config.yaml").write_text("token: abc\n")
    open_file = str(state / "config.yaml")
    os.chmod(open_file, 0o644)

    def once(machine_id=machine, secret=token, pool="gpu", port=embedded.port, host="127.0.0.1"):
        return ("--once", "--gateway-host", host, "--gateway-port", port, "--pool-name", pool, "--machine-id",
                machine_id, "--token", secret, "--state-dir", home / "first")
    with agent("run", *once()[1:], "--control-port", "0") as running:
        running.wait_line("notice ready")
        said = [run_agent(home, *once()).err]
    for arguments in (("--config", os.devnull), once(secret="wrong"), once(machine_id=other), once(pool="none"),
                      once(port=quiet_port()), ("status", "--state-dir", home / "first"),
                      ("config", "--config", open_file)):
        done = run_agent(home, *arguments)
        assert done.code != 0 and "defect" not in done.err, done
        said.append(done.err)
    here = {"another agent holds", "there is no machine token", "refused the machine token (401",
            "refused the machine token (403", "has no pool", "unreachable: connection refused",
            "no agent is running on", "holds secrets and others may read it"}
    assert [words for words in sorted(here) if not any(words in text for text in said)] == [], said
    shown = {cell.strip("`").split(" …")[0] for cell, _ in cells("it says")}
    assert here <= shown
    for words in shown - here:  # of gateways and ports that test_membership.py and others make
        assert all(part in SOURCE for part in words.split(": ")), words


# -- numbers -----------------------------------------------------------------------

def facts(form, weights):
    return b9agent.ModelFacts(**dict.fromkeys(b9agent.ModelFacts._fields))._replace(
        format=form, weights_bytes=weights)


# README's words; what the code has; what README means by the words.
SETTING = {row.path: row.default for row in b9agent.SETTINGS}
MIB, GIB = 1 << 20, 1 << 30
NUMBERS = [
    ("waits for it at boot, 30 s at most", b9agent.TAILNET_BOOT_S, 30),
    ("tried again within three seconds, where the server refuses our key up to a minute apart",
     sorted({row[2] for row in b9agent._SSH_SAYS}), [3, 60]),
    ("has answered for five seconds", b9agent.STEADY_S, 5),
    ("after exit codes 2, 3, 4 and 6", sorted(map(int, b9agent.PERMANENT_EXITS)), [2, 3, 4, 6]),
    ("which has 10 to 30 s", [min(row.stop_grace_s for row in b9agent.ENGINES),
                              max(row.stop_grace_s for row in b9agent.ENGINES)], [10, 30]),
    ("after five crashes in two minutes", [b9agent.Pace().exits, b9agent.Pace().window_s], [5, 120]),
    ("(five are kept)", b9agent.LOGS_KEPT, 5),
    ("(11435 where an Ollama of yours has that port)", b9agent.DOOR_PORT_BESIDE_OLLAMA, 11435),
    ("for each GPU 512 MiB and a share of 5 % of the weights, which is 256 MiB at least, 1.25 GiB for "
     "safetensors", [b9agent.overhead_bytes(facts(form, weights)) for form, weights in (
         ("gguf", 100 * GIB), ("gguf", 1), ("safetensors", 1))],
     [512 * MIB + 5 * GIB, 768 * MIB, 512 * MIB + 5 * GIB // 4]),
    ("a body of more than 32 MiB", b9agent.RELAY_BODY_MAX_BYTES, 32 * MIB),
    ("`inference.load_limit` (600 s)", SETTING["inference.load_limit"], "600"),
    ("after 4.5 s or more", b9agent.DOOR_TIMEOUT_S, 4.5),
    ("refused more than 60 times a minute", b9agent.DOOR_REFUSED_MAX, 60),
    ("`audit.keep_days` (184; 0: no log)", SETTING["audit.keep_days"], "184"),
    ("lines wait in memory, 8 MiB at most", b9agent.AUDIT_WAITING_MAX, 8 * MIB),
    ("makes the gateway's tokens, 24 hours each", SETTING["k3s.token_hours"], "24"),
    ("machine is `pending` for an hour", b9agent.PENDING_TTL_S, 3600),
    ("and then `ready` for 300 s", b9agent.GATEWAY_TTL_S, 300),
    ("at most the interval or a minute, or after `Retry-After` (60 s at most)", b9agent.RETRY_AFTER_MAX_S, 60),
    ("again at the interval for ten minutes, then every five",
     [b9agent.REFUSED_SOON_S, b9agent.REFUSED_LATER_S], [600, 300]),
    ("where ours is more than 60 s off", b9agent.CLOCK_OFFSET_MAX_S, 60),
    ("costs one keepalive five seconds", b9agent.GPU_LIMIT_S, 5),
    ("Its last figures stand for five minutes", b9agent.GPU_UNKNOWN_AFTER_S, 300),
    ("a `kill -9` loses five minutes at most", b9agent.ENERGY_SAVE_S, 300),
    ("0.74 W to 3.5 W a thread", [b9agent.CPU_IDLE_W_PER_THREAD, b9agent.CPU_MAX_W_PER_THREAD], [0.74, 3.5]),
    ("strict JSON to 1 MiB; at most 64 connections",
     [b9agent.HTTP_BODY_MAX_BYTES, b9agent.Api.max_connections], [MIB, 64]),
    ("On `127.0.0.1:9999`", [SETTING["control.host"], SETTING["control.port"]], ["127.0.0.1", "9999"]),
    ("It listens on `127.0.0.1:11434`", SETTING["inference.port"], "11434"),
    ("default: 127.0.0.1; port 1994", SETTING["gateway.port"], "1994"),
    ("b9agent 0.1.0", b9agent.VERSION, "0.1.0"),
] + [("| %s | `%s` | %s |" % (name, path, SETTING[path]), 0, 0) for name, path in (
    ("cold starts at once", "guards.parallel_cold_starts"), ("depth of tasks", "guards.task_depth"),
    ("cold starts of a day", "guards.cold_start_seconds_per_day"), ("twins", "guards.duplicates"),
    ("cold starts of an hour", "guards.cold_starts_per_hour"), ("tree of tasks", "guards.task_tree"))]


@pytest.mark.parametrize("words, code, number", NUMBERS, ids=[row[0] for row in NUMBERS])
def test_a_number_is_the_code_s(words, code, number):
    assert words in " ".join(README.split()) and code == number
