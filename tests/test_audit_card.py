"""The audit card at the head of b9agent.py is complete and true: the agent lives as many of its lives as
one machine can give it, strace looks on, and what was seen is compared with the card, both ways.

    python tests/test_audit_card.py    as root, prints what was seen beside the card's own words
"""
import base64
import collections
import concurrent.futures
import fcntl
import http.client
import json
import os
import pathlib
import pty
import py_compile
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)),
                os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import pyte  # noqa: E402
import pytest  # noqa: E402

import b9agent  # noqa: E402
import engines  # noqa: E402
import strace  # noqa: E402
import test_k3s  # noqa: E402
import test_tailnet  # noqa: E402
import test_tunnel  # noqa: E402
from fake_ollama import llama_metadata, make_gguf  # noqa: E402
from helpers import AGENT, HERE, Program, agent_command, nvidia_smi_script, wait_until  # noqa: E402
from kube_api import SERVER_CA, kubeconfig  # noqa: E402

TAILNET = "100.64.0.7"
NAMES = "127.0.0.53:53"
POOL = "gpu"


# -- a world of its own: namespaces, and what is written stays in memory ----------------

def in_a_world(script):
    """Run this file so that nothing of it touches the machine: its own network, processes, /run, and
    an overlay of what an installer writes to."""
    commands = """set -e
ip link set lo up; ip addr add %s/32 dev lo
mount --make-rprivate /; mount -t tmpfs -o mode=755 none /mnt
for d in etc usr var root; do mkdir -p /mnt/.$d/up /mnt/.$d/work
mount -t overlay -o lowerdir=/$d,upperdir=/mnt/.$d/up,workdir=/mnt/.$d/work overlay /$d; done
mount -t tmpfs -o mode=755 none /run
rm -f /etc/resolv.conf; echo nameserver %s > /etc/resolv.conf
exec "$@"
""" % (TAILNET, NAMES.partition(":")[0])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BETA9_", "B9AGENT_"))}
    return ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", commands,
            "sh", *script], environment


def is_agent(argv):
    return "python" in os.path.basename(argv[0]) and any(
        re.search(r"b9agent(\.py)?$", word) for word in argv[1:5])


class World:
    """Programs under strace, and what they are to keep secret."""

    def __init__(self, folder="/mnt"):
        self.folder, self.count, self.lock = folder, 0, threading.Lock()
        self.traces, self.secrets, self.roles, self.programs = [], {}, {}, []
        self.agent = os.path.join(folder, "lib", "b9agent")  # as the service has it: compiled already
        os.makedirs(self.agent)
        shutil.copy(AGENT, self.agent)
        py_compile.compile(os.path.join(self.agent, "b9agent.py"))
        with open(os.path.join(self.agent, "__main__.py"), "w") as handle:
            handle.write("import sys, b9agent\nsys.exit(b9agent.main())\n")
        os.environ["B9TESTS_AGENT"] = self.agent  # for helpers.agent_command
        self.hook = strace.write_hook(os.path.join(folder, "hook"))
        self.bin = os.path.join(folder, "bin")
        os.makedirs(self.bin)
        self.path = self.bin + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        os.makedirs(os.path.join(folder, "traces"))

    def home(self, name):
        path = os.path.join(self.folder, name)
        os.makedirs(os.path.join(path, "tmp"), 0o700)
        return path

    def environment(self, home, **extra):
        base = dict(HOME=home, PATH=self.path, PYTHONPATH=self.hook, LANG="C.UTF-8", PYTHONDONTWRITEBYTECODE="1",
                    TMPDIR=os.path.join(home, "tmp"), OLLAMA_HOST="127.0.0.1:9")
        base.update({name: str(value) for name, value in extra.items()})
        return base

    def command(self, life, argv):
        with self.lock:
            self.count += 1
            output = os.path.join(self.folder, "traces", "%03d" % self.count)
            self.traces.append((life, output))
        return strace.command("strace", output, argv)

    def start(self, life, home, *arguments, **extra):
        self.programs.append(Program(self.command(life, agent_command(*arguments)),
                                     self.environment(home, **extra)))
        return self.programs[-1]

    def run(self, life, home, *arguments, code=0, stdin=None, argv=None, **extra):
        """A command of the agent to its end.  Returns: stdout."""
        done = subprocess.run(self.command(life, argv or agent_command(*arguments)), input=stdin,
                              env=self.environment(home, **extra), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=90, universal_newlines=True,
                              **({} if stdin else {"stdin": subprocess.DEVNULL}))
        assert code is None or done.returncode == code, (arguments, done)
        return done.stdout + ("" if code is not None else done.stderr)

    def terminal(self, life, home, *arguments, keys=(), **extra):
        """On a terminal: [(a pattern to wait for, the keys to send then)]."""
        master, slave = pty.openpty()
        fcntl.ioctl(master, termios.TIOCSWINSZ, b"\x28\0\x78\0\0\0\0\0")

        def own():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        child = subprocess.Popen(self.command(life, agent_command(*arguments)), stdin=slave, stdout=slave,
                                 stderr=slave, preexec_fn=own,
                                 env=self.environment(home, TERM="xterm-256color", **extra))
        os.close(slave)
        screen = pyte.Screen(120, 40)
        stream = pyte.ByteStream(screen)

        def shows(pattern=None):
            if select.select([master], [], [], 0.05)[0]:
                try:
                    stream.feed(os.read(master, 65536))
                except OSError:
                    return child.poll() is not None
            return pattern and re.search(pattern, "\n".join(screen.display))
        try:
            for pattern, sent in keys:
                try:
                    wait_until(lambda: shows(pattern), pattern, 30)
                except AssertionError as error:
                    raise AssertionError("%s in\n%s" % (error, "\n".join(screen.display)))
                os.write(master, sent)
            wait_until(lambda: shows() or child.poll() is not None, "its end")
            assert child.wait(20) == 0
        finally:
            child.kill()
            child.wait()
            os.close(master)

    def secret(self, what, value):
        assert len(value) > 8
        self.secrets[value] = what
        return value

    def read(self, home, name):
        with open(os.path.join(home, ".b9agent", name)) as handle:
            return handle.read().strip()

    def write(self, path, text, mode=0o644):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as handle:
            handle.write(text)
        return path

    def wait_status(self, home, condition, what):
        def look():
            try:
                status = json.loads(self.control(home, "GET", "/status"))
            except (OSError, ValueError):
                return None
            return condition(status) and status
        return wait_until(look, what)

    def control(self, home, method, path, body=None):
        link = http.client.HTTPConnection(self.read(home, "control.addr"), timeout=60)
        link.request(method, path, body and json.dumps(body),
                     {"Authorization": "Bearer " + self.read(home, "control.token")})
        return link.getresponse().read().decode()

    def machine(self):
        """(machine id, token) of a machine made on the gateway."""
        made = json.loads(self.run("gateway", self.gateway_home, "machine", "create", "--pool", POOL, "--json"))
        return made["machine_id"], self.secret("machine token", made["token"])


def ask(link, token, path, body, method="POST"):
    link.request(method, path, body and json.dumps(body), {"Authorization": "Bearer " + token})
    reply = link.getresponse()
    raw = reply.read()
    link.close()
    return reply.status, raw.decode()


def jwt():
    """A token of id.example, which no key has signed."""
    encoded = lambda value: base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")
    return "%s.%s.c2lnbmF0dXJl" % (encoded({"alg": "RS256", "kid": "one"}), encoded(
        {"iss": "https://id.example", "aud": "b9", "sub": "ada", "exp": time.time() + 600}))


def stand_in(world, name, text):
    path = world.write(os.path.join(world.bin, name), "#!/bin/sh\n" + text, 0o755)
    os.chmod(path, 0o755)


# -- lives -------------------------------------------------------------------------------

def life_of_the_gateway(world):
    """Its own defaults: port 1994, gateway.db in its state folder.  Others join it."""
    world.gateway_home = world.home("gateway")
    world.gateway = world.start("gateway", world.gateway_home, "gateway")
    world.gateway.wait_line("listening")
    world.roles["127.0.0.1:1994"] = "GATEWAY"


def life_of_a_member(world):
    """With every default: ports, tailnet, engine, tenants, reports."""
    home = world.home("member")
    machine_id, token = world.machine()
    model = os.path.join(home, "models", "tiny.gguf")
    os.makedirs(os.path.dirname(model))
    with open(model, "wb") as handle:
        handle.write(make_gguf(llama_metadata("tiny", 1), 4096, "tiny"))
    weights = os.path.join(home, "models", "weights")
    head = b'{"w": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}}'
    world.write(os.path.join(weights, "config.json"), '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with open(os.path.join(weights, "model.safetensors"), "wb") as handle:
        handle.write(len(head).to_bytes(8, "little") + head + bytes(8))
    token_file = world.write(os.path.join(home, "token"), token + "\n", 0o600)
    cli = lambda *words, **more: world.run("commands", home, *words, **more)
    cli("init", "--gateway", "127.0.0.1:1994", "--pool", POOL, "--machine-id", machine_id, "-y", BETA9_TOKEN=token)
    with open(os.path.join(home, ".b9agent", "config.yaml"), "a") as handle:
        handle.write("# a comment\n")
    cli("init", "--token-file", token_file, "--keepalive-interval", "1", "-y")
    cli("config")
    cli("run", "--dry-run")
    secrets = {"INFERENCE_TOKEN": world.secret("INFERENCE_TOKEN", "inference-token-of-the-environment"),
               "B9AGENT_CONTROL_TOKEN": world.secret("a control token", "control-token-of-the-environment"),
               "BETA9_K3S_TOKEN": world.secret("k3s token", "k3s-token-of-the-environment"),
               "BETA9_TOKEN": token, "B9AGENT_TAILNET_SOCKET": world.tailscaled.path,
               "NOTIFY_SOCKET": world.notify}
    agent = world.start("agent", home, "run", **secrets)
    world.wait_status(home, lambda status: status["state"] == "ready", "ready")
    for name in ("control.token", "inference.token"):
        world.secret(name, world.read(home, name))
    cli("status")
    cli("metrics")
    cli("start")
    cli("pull", "llama3.2:1b")
    for words in (("models", "load", "llama3.2:1b"), ("models",), ("models", "fit", model),
                  ("models", "verify"), ("models", "import", model, "--name", "mine")):
        cli(*words, code=None)
    door = lambda: http.client.HTTPConnection("127.0.0.1", 11434, timeout=60)
    chat = {"model": "llama3.2:1b", "messages": [{"role": "user", "content": "Hello!"}]}
    assert ask(door(), world.read(home, "inference.token"), "/v1/chat/completions", chat)[0] == 200
    world.run("client", home, argv=[sys.executable, "-c", CLIENT % world.agent])
    ada = world.secret("a tenant's token", cli("tenant", "add", "ada", "--tokens-per-day", "200000",
                                               "--tailnet", "ada@example.com").split()[-1])
    ada = world.secret("a tenant's token", re.findall(r"\S{30,}", cli("tenant", "rotate", "ada"))[-1])
    # Not too often: wrong tokens make the door refuse for a while.
    # Not too often: wrong tokens make the door refuse for a while.
    wait_until(lambda: ask(door(), ada, "/api/chat", chat)[0] == 200 or time.sleep(0.5), "the tenant")
    ask(door(), "no token", "/api/chat", chat)
    ask(http.client.HTTPConnection(TAILNET, 11434, timeout=60), "", "/api/chat", chat)
    for words in (("tenant", "list"), ("audit", "verify"), ("audit", "head"), ("audit", "show"), ("report",),
                  ("report", "--evidence", "--out", os.path.join(home, "report.md")), ("logs",), ("doctor",),
                  ("top", "--once"), ("top", "--once", "--host", world.read(home, "control.addr")),
                  ("models", "convert", weights, "--to", os.path.join(home, "mlx")),
                  ("models", "unload", "llama3.2:1b"), ("models", "delete", "mine"), ("smoke", "--model", "llama3.2:1b"), ("tenant", "remove", "ada"),
                  ("stop",), ("start", "--model", model), ("stop",)):
        extra = {"B9AGENT_CONTROL_TOKEN": world.read(home, "control.token")} if "--host" in words else {}
        cli(*words, code=None, **extra)
    world.terminal("top", home, "top", keys=(("READY", b"q"),))
    world.run("gateway", world.gateway_home, "machine", "list")
    assert agent.stop() == 0


CLIENT = """
import sys; sys.path.insert(0, %r)
from b9agent import inference
result = inference.chat("llama3.2:1b", [{"role": "user", "content": "Hello!"}])
assert result.ok, result.error
"""


def life_behind_a_tunnel(world):
    """Through ssh to a real sshd, with k3s, TLS by tailscale, and an OpenID provider."""
    home = world.home("tunnel")
    sshd_folder = pathlib.Path(world.home("sshd"))
    sshd = test_tunnel.Sshd(sshd_folder, pathlib.Path(home)).start()
    world.roles["127.0.0.1:%d" % sshd.port] = "SSHD"
    with test_k3s.K3sApi() as api:
        world.roles["127.0.0.1:%d" % api.port] = "K3S"
        admin = world.write(os.path.join(home, "admin.yaml"), kubeconfig(api.port), 0o600)
        k3s = lambda *words, **more: world.run("k3s", home, "k3s", *words, "--k3s-kubeconfig", admin, **more)
        k3s("rbac", "--apply")
        k3s("token", "--write", os.path.join(home, "worker.token"))
        k3s("check", code=None)
        machine_id, token = world.machine()
        jwks = world.write(os.path.join(home, "jwks.json"), '{"keys": []}')
        api.life_s = 6  # so that it is renewed soon
        agent = world.start(
            "tunnel", home, "run", "--tunnel", "%s@127.0.0.1:%d" % (sshd.user, sshd.port), "--tunnel-identity-file",
            sshd.key, "--tunnel-reverse-k3s", "--gateway-port", 1994, "--machine-id", machine_id, "--pool-name",
            POOL, "--keepalive-interval", 1, "--control-port", 0, "--inference-port", 0, "--k3s-service-account",
            "beta9-gateway", "--tls", "tailscale", "--inference-autostart", "--oidc-issuer", "https://id.example", "--oidc-audience", "b9",
            "--oidc-jwks", jwks, "--tailnet-socket", world.tailscaled.path, BETA9_TOKEN=token)
        wait_until(lambda: "ready" in agent.text(), "ready through the tunnel")
        wait_until(lambda: os.path.exists(home + "/.b9agent/tls/tailnet.key"), "the tailnet's certificate")
        wait_until(lambda: len(api.minted) > 4, "a token that was renewed")
        door, _ = agent.wait_line(r"api=inference url=http://127\.0\.0\.1:(\d+)")
        ask(http.client.HTTPConnection("127.0.0.1", int(door.group(1))), jwt(), "/api/tags", None, "GET")
        for minted in api.minted:
            world.secret("k3s token", minted)
        cli = lambda *words, **more: world.run("tunnel", home, *words, **more)
        cli("status", code=None)
        cli("doctor", "--tunnel", "%s@127.0.0.1:%d" % (sshd.user, sshd.port), code=None)
        assert agent.stop() == 0
    sshd.stop()


def life_on_a_terminal(world):
    home = world.home("terminal")
    world.write(os.path.join(home, ".kube", "config"), kubeconfig(7003, context="of-work"), 0o600)
    machine_id, token = world.machine()
    world.run("once", home, "run", "--once", "--gateway-host", "127.0.0.1", "--machine-id", machine_id,
              "--pool-name", POOL, BETA9_TOKEN=token)
    world.terminal("terminal", home, "run", "--gateway-host", "127.0.0.1", "--machine-id", machine_id, "--pool-name",
                   POOL, "--control-port", 0, "--inference-port", 0, BETA9_TOKEN=token, keys=(
                       ("READY", b"d"), ("disk", b"\x1b"), ("READY", b"s"), ("Status: running", b"p"),
                       ("odel", b"llama3.2\r"), ("Models: llama3.2", b"s"), ("y/n", b"y"), ("Status: stopped", b"q")))


def life_of_a_demo(world):
    world.run("demo", world.home("demo"), "demo", "--once")


def life_of_an_installation(world):
    """A machine's service and k3s, with stand-ins for systemctl and k3s's installer."""
    home = world.home("installed")
    os.makedirs("/run/systemd/system")
    world.write("/run/systemd/container", "docker\n")
    stand_in(world, "systemctl", 'case "$*" in *show-environment*) exit 0;; *is-active*) exit 3;; esac\n')
    stand_in(world, "loginctl", "")
    _, token = world.machine()
    install = lambda *words, **more: world.run("service", home, "service", *words, **more)
    ports = ("--control-port", "9998", "--inference-port", "9997", "--gateway", "127.0.0.1")
    world.dry = install("install", "--system", "--dry-run", *ports, BETA9_TOKEN=token)
    world.dry += install("install", "--user", "--run-as", "root", "--dry-run", *ports, BETA9_TOKEN=token)
    install("install", "--system", "--no-start", *ports, "--yes", BETA9_TOKEN=token, code=None)
    install("status", code=None)
    install("uninstall", "--system", "--purge", code=None)
    install("install", "--user", "--run-as", "root", "--no-start", *ports, "--yes",
            BETA9_TOKEN=token, code=None)
    install("uninstall", "--user", "--run-as", "root", code=None)
    with test_k3s.K3sApi() as api:
        script = world.write(os.path.join(home, "install.sh"), (
            "#!/bin/sh\nmkdir -p /etc/rancher/k3s\ncat > /etc/rancher/k3s/k3s.yaml <<END\n%s\nEND\n"
            % kubeconfig(api.port)))
        binary = os.path.join(home, "k3s")
        with open(binary, "wb") as handle:
            handle.write(test_k3s.elf())
        os.makedirs(os.path.join(home, "images"))
        world.write(os.path.join(home, "images", "k3s-airgap-images-amd64.tar.zst"), "images")
        world.roles["127.0.0.1:%d" % api.port] = "K3S"
        world.dry += world.run("k3s install", home, "k3s", "install", "--dry-run", "--installer", script, "--binary",
                               binary, "--images", os.path.join(home, "images"))
        world.run("k3s install", home, "k3s", "install", "-y", "--installer", script, "--binary", binary,
                  "--images", os.path.join(home, "images"), code=None)
        os.remove("/usr/local/bin/k3s")
        world.run("k3s install", home, "k3s", "install", "-y", "--installer", script, code=None)
    with open("/etc/hosts", "a") as handle:
        handle.write("127.0.0.9 get.k3s.io\n")
    world.run("k3s install", home, "k3s", "install", "-y", code=None)
    os.remove("/etc/rancher/k3s/k3s.yaml")


def life_with_nvidia(world):
    home = world.home("nvidia")
    library = os.path.join(home, "lib", "libnvidia-ml.so.1")
    os.makedirs(os.path.dirname(library))
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-D", "new", "-o", library, os.path.join(HERE, "fake_nvml.c")],
                   check=True)
    smi = os.path.join(home, "bin")
    os.chmod(world.write(os.path.join(smi, "nvidia-smi"), nvidia_smi_script("0, GPU-1, H100, 81559, 0, 0, 30")), 0o755)
    path = smi + ":" + world.path
    world.run("nvidia-smi", home, "run", "--dry-run", PATH=path)
    world.run("nvml", home, "run", "--dry-run", PATH=path, LD_LIBRARY_PATH=os.path.dirname(library))


def life_of_strangers(world):
    """Addresses that are configured and nobody else's: a proxy, an OpenID provider, k3s with a token."""
    home = world.home("strangers")
    shutil.copy(SERVER_CA, os.path.dirname(world.write("/var/lib/rancher/k3s/server/tls/server-ca.crt", "")) + "/server-ca.crt")
    state = os.path.join(home, ".b9agent")
    os.makedirs(state + "/audit", 0o700)
    for name, text in (("energy.json", "{"), ("models.json", "{"), ("usage.json", "{"),
                       ("agent.log", "old line\n" * 600000), ("audit/2020-01-01.jsonl", "{}\n")):
        world.write(os.path.join(state, name), text, 0o600)
    world.roles.update({"127.0.0.1:7001": "PROXY", "127.0.0.1:7002": "JWKS", "127.0.0.1:7003": "K3S"})
    world.run("proxy", home, "run", "--once", "--gateway-scheme", "https", "--gateway-proxy", "http://127.0.0.1:7001",
              "--gateway-host", "gateway.example", BETA9_TOKEN="a-token-of-nobody", code=5)
    strangers = ("--oidc-issuer", "https://id.example", "--oidc-audience", "b9", "--oidc-jwks",
                 "https://127.0.0.1:7002/jwks", "--k3s-token", "a-k3s-token", "--k3s-server", "https://127.0.0.1:7003")
    pair = [shutil.copy(os.path.join(HERE, "tls", "server" + end), home) for end in (".pem", ".key")]
    os.chmod(pair[1], 0o600)
    with socket.create_server(("127.0.0.1", 11434)):  # another program has it
        agent = world.start("strangers", home, "run", "--control-port", 0, "--control-host", "0.0.0.0", "--tls-cert",
                            pair[0], "--tls-key", pair[1], "--gateway-host", "127.0.0.1", "--gateway-port", 9,
                            *strangers, BETA9_TOKEN="a-token-of-nobody")
        agent.wait_line("listening.*api=inference.*:11435")
    ask(http.client.HTTPConnection("127.0.0.1", 11435), jwt(), "/api/tags", None, "GET")
    wait_until(lambda: re.search("pods|k3s", agent.text()), "k3s was asked")
    assert agent.stop() == 0
    world.run("doctor", home, "doctor", "--gateway-host", "gateway.example", *strangers, code=None)


TOGETHER = (life_of_a_member, life_behind_a_tunnel, life_on_a_terminal, life_of_a_demo, life_with_nvidia)
AFTER = (life_of_an_installation, life_of_strangers)  # they would be in the others' way


def live(world):
    """All lives; what went wrong in them."""
    world.tailscaled = test_tailnet.Tailscaled(pathlib.Path(world.home("ts")))
    world.roles["unix:" + world.tailscaled.path] = "TAILSCALED"
    world.notify = os.path.join(world.folder, "notify")
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(world.notify)
    world.roles["unix:" + world.notify] = "SYSTEMD"
    tls = os.path.join(HERE, "tls")
    for name in ("mlx_lm.convert", "restorecon"):
        stand_in(world, name, "")
    engines.stand_in(world.bin, "ollama", "llama-server")
    stand_in(world, "tailscale", "cat %s/server.pem %s/server.key\n" % (tls, tls))
    life_of_the_gateway(world)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        def one(life):
            try:
                life(world)
                return ""
            except BaseException:
                print(traceback.format_exc(), file=sys.stderr)
                return life.__name__
        problems = [name for name in pool.map(one, TOGETHER) if name]
    problems += [name for name in map(one, AFTER) if name]
    for program in world.programs:
        program.stop()
    return problems


# -- the card, in pieces ----------------------------------------------------------------
# Row: the card's own words, and the acts that they allow.  All rows of a section, in order, are its whole
# text but for the words between them, so that the card can neither lose a claim nor add one unseen.
# An act is `kind what`, what as told() writes it; every pattern must have been seen.  NOT_HERE: why not.

Row = collections.namedtuple("Row", "words allows mode why", defaults=((), 0o600, ""))


def row(words, *allows, mode=0o600):
    return Row(words, allows, mode)


def not_here(words, why, *allows):
    return Row(words, allows, 0o600, why)


MAC = "macOS's"
WORDS = "words about a row above, which that row's traces hold"
CARD = {
    "files": (
        row("STATE is ~/.b9agent, or --state-dir; in it, and it, folders are 0700 and files 0600.",
            r"make STATE", mode=0o700),
        row("reads what it wrote", r"read STATE(/.*)?"),
        row("a token file if one is set", r"read ~/token"),
        row("the files of tls.cert, tls.key", r"read ~/server\.(pem|key)"),
        row("oidc.jwks", r"read ~/jwks\.json"),
        row("/proc, with the environments of processes (to know those it started)",
            r"read /proc/N/environ", r"read /proc\b.*"),
        row("/sys", r"read /sys/.*"),
        row("os-release", r"read /(etc|usr/lib)/os-release"),
        row("/run/systemd/container", r"read /run/systemd/container"),
        row("whether marks of a container", r"look /\.dockerenv", r"look /run/\.containerenv"),
        row("devices of GPUs", r"look /dev/(nvidiactl|kfd|dxg)", r"look /proc/driver/nvidia/version"),
        row("tailscaled", r"look \S*tailscaled?\S*", r"look /var/run"),
        row("k3s are there", r"look .*/k3s\S*", r"look /var/lib/rancher/k3s/server"),
        row("the heads of model files it is asked about, all of them to hash them", r"(read|look) ~/models\S*"),
        row("Ollama's manifests and blobs", r"read ~/\.ollama/models/(manifests|blobs)\S*",
            r"look (~|/usr/share/ollama)/\.ollama\S*"),
        row("that of k3s.kubeconfig", r"read ~/admin\.yaml"),
        row("else /etc/rancher/k3s/k3s.yaml", r"read /etc/rancher/k3s/k3s\.yaml"),
        row("~/.kube/config", r"read ~/\.kube/config"),
        not_here("the files that the one in use names", "k3s's own names none; test_pods.py reads such"),
        row("with k3s.token its authority's certificate", r"read /var/lib/rancher/k3s/server/tls/server-ca\.crt"),
        row("`service`, `doctor`: the service's files",
            r"read (/usr/local|~/\.local)/(share|lib|bin)\S*", r"look (/etc|/run|~/\.config)/systemd\S*", r"look /run/openrc",
            r"look \S*/b9agent(/\S*|\.service)?"),
        row("`k3s install`: config.yaml of k3s, and the files it is given",
            r"read /etc/rancher/k3s/config\.yaml", r"read ~/(install\.sh|k3s|images\S*)"),
        row("writes STATE/config.yaml (`init`", r"write STATE/config\.yaml"),
        row("config.yaml.old where it had comments)", r"write STATE/config\.yaml\.old"),
        row("machine_id", r"write STATE/machine_id"),
        row("agent.lock", r"write STATE/agent\.lock"),
        row("agent.log (5 MiB and one old one; not under journald)", r"write STATE/agent\.log",
            r"rename STATE/agent\.log STATE/agent\.log\.1"),
        row("energy.json", r"write STATE/energy\.json"),
        row("models.json", r"write STATE/models\.json"),
        row("usage.json (and .bad where one was broken)", r"write STATE/usage\.json",
            r"rename STATE/(energy|models|usage)\.json STATE/\1\.json\.bad"),
        row("control.token", r"write STATE/control\.token"),
        row("control.addr", r"write STATE/control\.addr"),
        row("inference.token", r"write STATE/inference\.token"),
        row("inference.addr", r"write STATE/inference\.addr"),
        row("audit/", r"(make|write) STATE/audit", mode=0o700),
        row("with DATE.jsonl", r"write STATE/audit/\d{4}-\d\d-\d\d\.jsonl"),
        row("head.json", r"write STATE/audit/head\.json"),
        row("removed after audit.keep_days", r"remove STATE/audit/2020-01-01\.jsonl"),
        row("tenants.yaml (`tenant`)", r"write STATE/tenants\.yaml"),
        row("tls/tailnet.crt and .key (tls: tailscale)", r"write STATE/tls/tailnet\.crt", r"write STATE/tls/tailnet\.key"),
        row("children/engine.json", r"write STATE/children/engine\.json"),
        row("logs/engine-*.log (16 MiB each, five)", r"write STATE/logs/engine-\S+\.log"),
        row("the same two of tunnel", r"write STATE/children/tunnel\.json", r"write STATE/logs/tunnel-\S+\.log"),
        row("k3s.kubeconfig (`k3s rbac --apply`, and to renew its token)", r"write STATE/k3s\.kubeconfig"),
        not_here("hub/ (a cache of Hugging Face's where there is none)", "MLX, Apple's; test_inference.py has one"),
        row("gateway.db", r"write STATE/gateway\.db"),
        row("with its -wal, -shm and -journal (`gateway`, `machine`)", r"write STATE/gateway\.db-wal",
            r"write STATE/gateway\.db-shm", r"write STATE/gateway\.db-journal"),
        row("Elsewhere: FILE 0600 (`report --out FILE`, `k3s token --write FILE`)", r"write ~/report\.md",
            r"write ~/worker\.token"),
        row("a temporary folder 0700 (`demo`), removed", r"make TMP/b9agent-demo", r"remove TMP/b9agent-demo",
            mode=0o700),
        not_here("on macOS, for an instant, k3s's client key 0600", MAC),
        row("`service install`, `k3s install`: what their --dry-run prints", r"(write|make) INSTALLED", mode=0o755),
        row("install.lock beside it", r"write \S+/b9agent/install\.lock"),
        row("the vendor's installer in a temporary file, removed", r"write TMP/b9agent-k3s-\w+",
            r"remove TMP/b9agent-k3s-\w+"),
    ),
    "ports": (
        row("127.0.0.1:9999 control API", r"listen 127\.0\.0\.1:9999"),
        row("9999 on the tailnet address where there is one, unless control.host is set or tailnet.control is false",
            r"(bind|listen) TAILNET:9999", r"(bind|listen) 0\.0\.0\.0:(0|FREE)"),
        row("127.0.0.1:11434 front door", r"listen 127\.0\.0\.1:11434"),
        row("(11435 where that is taken)", r"listen 127\.0\.0\.1:11435"),
        row("11434 on the tailnet address, unless inference.host is set", r"(bind|listen) TAILNET:(11434|FREE)"),
        row("the engine, once started, a free one of 127.0.0.1", r"bind 127\.0\.0\.1:FREE", r"engine listens 127\.0\.0\.1:FREE"),
        row("127.0.0.1:1994 only as `gateway`", r"(bind|listen) 127\.0\.0\.1:1994"),
        row("three free ones as `demo`", r"listen 127\.0\.0\.1:(0|FREE)"),
        row("`doctor`, `service install` and `k3s install` bind the ports they tell of for an instant",
            r"bind 127\.0\.0\.1:(9999|1143[45])", r"bind 127\.0\.0\.1:9998", r"bind 0\.0\.0\.0:6443"),
        row("the tunnel's ssh a free one of 127.0.0.1", r"ssh listens 127\.0\.0\.1:FREE"),
        not_here("with tunnel.reverse_k3s the server's sshd 6443 there", "that is the server's own process"),
    ),
    "hosts": (
        row("the gateway that is configured", r"connect GATEWAY"),
        row("the proxy set for it", r"connect PROXY"),
        row("the engine", r"connect ENGINE"),
        row("an Ollama that is here", r"connect OLLAMA"),
        row("tailscaled and systemd, over their sockets", r"connect TAILSCALED", r"connect SYSTEMD"),
        row("that of oidc.jwks, where it is an address", r"connect JWKS"),
        row("k3s's API, as its kubeconfig or k3s.server has it", r"connect K3S"),
        row("the server of the tunnel, where one is set", r"ssh connects SSHD"),
        row("then the gateway through it alone", r"connect TUNNEL"),
        row("commands the agent that runs", r"connect AGENT"),
        row("`top --host` the one that it names", r"connect AGENT"),
        row("`k3s install` get.k3s.io", r"connect get\.k3s\.io"),
        not_here("what the vendor's installer fetches", "the installer is a stand-in"),
        row("the system's name servers", r"connect NAMES"),
        row("nobody else."),
        row("(The routing table is asked for the way to the gateway, or to 192.0.2.1: that sends nothing.)",
            r"route GATEWAY", r"route 192\.0\.2\.1"),
        not_here("The machine token goes to the gateway and nowhere else", "held by what is_sent() finds"),
        not_here("no redirect is followed.", "test_gateway_client.py"),
        not_here("Ollama itself fetches models from its registries", "the stand-in has none"),
        not_here("the others are told to stay offline with files that are here", "test_inference.py"),
    ),
    "terminal": (
        row("`run` on one", r"write /dev/pts/N"),
        row("`top`: its alternate screen, and keys without echo, given back at every end but SIGKILL",
            r"write /dev/pts/N"),
    ),
    "loads": (
        row("libnvidia-ml.so.1, the driver's library, where there is a trace of NVIDIA",
            r"read (\S*/libnvidia-ml\.so\.1|/usr/lib/wsl/drivers)"),
    ),
    "programs": (
        row("nvidia-smi where that library is lacking", r"run nvidia-smi"),
        not_here("amd-smi, rocm-smi, xpu-smi where the kernel's files do not tell enough", "no such GPU here"),
        not_here("on macOS sysctl, vm_stat, netstat, ioreg, system_profiler and python3 with Metal", MAC),
        row("tailscale where it is installed and tailscaled's socket does not answer, and with tls: tailscale for the "
            "certificate", r"run tailscale status", r"run tailscale cert"),
        row("`service` runs systemctl", r"run systemctl"),
        row("loginctl", r"run loginctl"),
        row("useradd", r"run useradd"),
        not_here("launchctl, rc-service or rc-update", "macOS's and Alpine's; test_service.py has stand-ins"),
        row("restorecon", r"run restorecon"),
        row("by env, the new b9agent.py to try it", r"run env python"),
        row("`doctor` asks the service managers", r"run systemctl"),
        not_here("ps and lsof on macOS (lsof with --tunnel, too)", MAC),
        row("the engine that is started: ollama", r"run ollama"),
        not_here("vllm, sglang", "they want NVIDIA or AMD; test_inference.py starts stand-ins"),
        row("llama-server", r"run llama-server"),
        not_here("mlx_lm.server", "Apple's; test_inference.py starts it"),
        row("mlx_lm.convert", r"run mlx_lm\.convert", r"look ~/mlx"),
        row("with --tunnel ssh", r"run ssh"),
        row("which reads its keys and ~/.ssh/known_hosts, /etc/ssh/ssh_known_hosts, and writes none",
            r"ssh reads ~/\.ssh/known_hosts"),
        row("`k3s install` env and sh with the vendor's installer", r"run env .*sh TMP/b9agent-k3s-\w+"),
        row("k3s --version.", r"run k3s\.b9agent-trial"),
        not_here("None of them is given a token", "held by what secrets_given() finds"),
        row("what it started it ends.", r"signal SIG(TERM|CONT|KILL)"),
        row("As root, `service` and `k3s` do with a user's rights what is that user's",
            r"power (setres[ug]id|setgroups)\(.*", r"power chown\(.*"),
    ),
    "threads": (
        not_here("main (signals, systemd)", "no thread that is started"),
        row("membership (the requests to the gateway)", r"thread membership"),
        row("gpus-VENDOR (asks one vendor's driver, and ends)", r"thread gpus-nvidia"),
        row("control", r"thread control"),
        row("gateway (accepts; another for the tailnet's address)", r"thread gateway"),
        row("control-client or gateway-client for each connection to those, 64 or 256 at most",
            r"thread control-client", r"thread gateway-client"),
        row("door (all connections of the front door)", r"thread door"),
        row("door-errand", r"thread door-errand"),
        not_here("-asking", "asked of a peer of a real tailnet", r"thread door-asking"),
        row("-load (a few, for what would hold it up)", r"thread door-load"),
        row("audit (writes the audit log)", r"thread audit"),
        row("gateway-address (looks it up, and ends)", r"thread gateway-address"),
        row("child-engine and child-engine-output", r"thread child-engine", r"thread child-engine-output"),
        row("the same two of the tunnel's ssh", r"thread child-tunnel", r"thread child-tunnel-output"),
        row("tunnel (starts it again)", r"thread tunnel"),
        row("first-token", r"thread first-token"),
        row("inference-start", r"thread inference-start"),
        row("inference (looks at the engine)", r"thread inference"),
        row("pull, import or conversion NAME (4 at most)", r"thread pull \S+", r"thread import \S+", r"thread conversion \S+"),
        row("provenance (hashes files)", r"thread provenance"),
        row("tailnet (asks tailscaled, where there is a trace of it)", r"thread tailnet"),
        row("pods (watches worker pods, looks for a kubeconfig once a minute, renews the agent's own token for k3s)",
            r"thread pods"),
        row("k3s-token (renews, with k3s.service_account)", r"thread k3s-token"),
        row("dashboard (the terminal)", r"thread dashboard"),
        row("dashboard-facts", r"thread dashboard-facts"),
        row("dashboard-log", r"thread dashboard-log"),
        row("dashboard- start", r"thread dashboard-start"),
        row("-stop", r"thread dashboard-stop"),
        row("-pull", r"thread dashboard-pull"),
        not_here("-cancel", "a pull that lasts; test_terminal.py has one", r"thread dashboard-cancel"),
        row("-doctor (what a key asks for, one of each)", r"thread dashboard-doctor"),
        row("check-NAME (`doctor`)", r"thread check-\w+"),
        row("start", r"thread start"),
        row("installer", r"thread installer"),
        row("demo (commands of these names wait in them)", r"thread demo"),
    ),
}

# What the interpreter, libc and the libraries do by themselves: (acts, why).
OWN = (
    (r"(read|look) (%s)\S*" % "|".join(map(re.escape, {
        sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), os.path.realpath(os.path.dirname(os.__file__))})),
     "the interpreter and its library"),
    (r"(read|look) /mnt/(lib|hook)\b.*", "b9agent.py itself, and this test's hook"),
    (r"(read|look) (/usr)?/(local/)?lib(64)?(/((x86_64|aarch64)-linux-gnu|python3|locale|ssl|glibc-hwcaps|tls|lib|"
     r"x86_64|userdb)\S*)?", "shared libraries and locales"),
    (r"(read|look) ~/lib(/(glibc-hwcaps|tls|x86_64)\S*|/lib[a-z]+[-.0-9]*\.so[.0-9]*)?", "LD_LIBRARY_PATH of the NVML"),
    (r"(read|look) /etc/(ld\.so\S*|locale\S*|nsswitch\.conf|passwd|group|hosts|host\.conf|resolv\.conf|localtime|ssl\S*"
     r"|userdb\S*|gai\.conf|services)?", "libc's: names of users and hosts, certificates, time zone"),
    (r"(read|look) /usr/share/(zoneinfo|locale)\S*", "time zone, locale"),
    (r"look \S*/lib/python[0-9]+\.zip|read %s" % re.escape(os.getcwd()),
     "the interpreter, the folder it was started in"),
    (r"read (/|/etc|/usr|/usr/local)", "libnss_systemd's: names of users"),
    (r"read (~|TMP/b9agent-demo|/etc/rancher/k3s)", "the folder of what was written: fsync"),
    (r"(read|look) /run(/(host|userdb|systemd/userdb)\S*)?", "libnss_systemd's: names of users"),
    (r"connect unix:/var/run/nscd/socket", "libc's: names of users"),
    (r"(read|write) /dev/(null|urandom|tty)", "no file"),
    (r"look /(proc/(self|net|mounts|thread-self)\S*|dev/pts/N)", "isatty(), paths by way of /proc"),
    (r"(write|remove) TMP/[a-z0-9_]{8}", "Python's tempfile tries which folder takes a file"),
    (r"(bind|listen|engine listens) 127\.0\.0\.1:0|bind udp .*|name .*", "a free port; which one it was"),
    (r"run python", "the program that imports the client"),
    (r"power fchown\(.*gateway\.db-\w+>, 0, 0\)", "SQLite, as root: the owner of its files"),
)


def section_of(name):
    """The words of one section of the card, with one space between them."""
    text = re.search(r"(?ms)^%s +(.*?)(?=^\w|\Z)" % name, b9agent.__doc__.partition("\n\nTo read it")[0]).group(1)
    return " ".join(text.split())


@pytest.mark.parametrize("name", CARD)
def test_every_word_of_the_card_is_in_the_table_that_is_compared_with_the_traces(name):
    left, gap = section_of(name), r"^[\s,;:.]*((and|or)[\s,]*)?$"
    for entry in CARD[name]:
        before, words, left = left.partition(entry.words)
        assert words, "the card does not say, or not here: %r; it goes on: %s" % (entry.words, before[:200])
        assert re.match(gap, before), "the card says what no row stands for: %r" % before
    assert re.match(gap, left), "the card says what no row stands for: %r" % left


# -- comparing ---------------------------------------------------------------------------

class Compared:
    """acts: all of them, by all programs.  problems: what the card and the traces disagree on."""

    def __init__(self, world, acts, sent):
        self.world, self.problems, self.seen = world, [], collections.OrderedDict()
        self._named = {act.what.rpartition(":")[2] for act in acts if act.kind == "name"}
        self._listeners = {}
        for act in acts:
            if act.kind in ("bind", "listen") and self._listeners.get(act.what, "agent") == "agent":
                self._listeners[act.what] = act.by  # the agent looks whether a port is free, for others
        self._modes, self._widest, self._touched = {}, {}, set()
        for path in [act.what for act in acts if act.by == "agent" and act.kind in ("read", "write", "make")]:
            while path not in self._touched:
                self._touched.add(path)
                path = os.path.dirname(path)
        rows = [(section, entry) for section in CARD for entry in CARD[section]]
        self._rows = [(re.compile("(?:%s)$" % pattern), section, entry) for section, entry in rows
                      for pattern in entry.allows]
        for act in sorted(acts, key=lambda act: act.at_s):
            for told in self._told(act):
                self._compare(act, told)
        for pattern, section, entry in self._rows:
            if not entry.why and pattern.pattern not in self.seen:
                self.problems.append("not seen, though the card says it: %s (%s)" % (entry.words, pattern.pattern))
        self._secrets(acts, sent)

    def path(self, path):
        path = re.sub(r"\.[0-9]+\.tmp$|(?<=\.pyc)\.[0-9]+$", "", path)
        path = re.sub(r"^/proc/[0-9]+", "/proc/N", re.sub(r"^/dev/pts/[0-9]+", "/dev/pts/N", path))
        path = re.sub(r"^(/mnt/\w+/tmp/b9agent-demo)-\w+", r"\1", path)
        if path.startswith("/mnt/demo/tmp/b9agent-demo/"):
            return "STATE" + path[len("/mnt/demo/tmp/b9agent-demo"):]
        return re.sub(r"^/mnt/(?!lib|hook|bin)\w+(?=/|$)", "~", re.sub(
            r"^/mnt/\w+/tmp\b", "TMP", re.sub(r"^(/mnt/\w+/\.b9agent|/var/lib/b9agent)\b", "STATE", path)))

    def _told(self, act):
        """What one act is called in the table."""
        path = self.path(act.what)
        if act.by not in ("agent", "ssh", "ollama", "llama-server"):
            return
        if act.by != "agent":
            if act.kind == "listen":
                yield "%s listens %s" % ("ssh" if act.by == "ssh" else "engine", self._port(act.what))
            elif act.by == "ssh" and act.kind == "connect" and act.what in self.world.roles:
                yield "ssh connects " + self.world.roles[act.what]
            elif act.by == "ssh" and act.kind == "read" and path.startswith("~/.ssh"):
                yield "ssh reads " + path
        elif act.kind in ("bind", "listen", "name"):
            yield "%s %s%s" % (act.kind, "udp " if act.more == "udp" else "", self._port(act.what))
        elif act.kind == "connect":
            yield "%s %s" % ("route" if act.more == "udp" and act.what != NAMES else "connect", self._host(act))
        elif act.kind == "run":
            if act.what != "agent":
                yield self._program(act)
        elif act.kind == "rename":
            from_, to = self._written(act.what), self._written(act.more)
            yield "rename %s %s" % (from_, to) if to != from_ else "write " + to
        elif act.kind == "write" or act.kind == "mode":
            yield "write " + self._written(act.what)
        else:
            yield "%s %s" % (act.kind, self._written(act.what) if act.kind in ("make", "remove") else path)

    def _written(self, path):
        """A file of an installation by what the dry run called it."""
        clean = self.path(path)
        plain = re.sub(r"\.[0-9]+\.tmp$|(\.new|\.b9agent-trial)?(\.[0-9]+\.tmp)?$|/__pycache__(/\S*)?$", "", path)
        if clean.startswith("STATE") or plain.endswith("install.lock"):
            return clean
        told = re.findall(r"/[\w./-]+", self.world.dry)
        return "INSTALLED" if any(word == plain or word.startswith(plain + "/") or os.path.dirname(plain) == word
                                  for word in told) else clean

    def _port(self, address):
        host, _, port = address.rpartition(":")
        known = port in ("0", "9999", "9998", "11434", "11435", "1994", "6443")
        return "%s:%s" % (host.replace(TAILNET, "TAILNET"), port if known and port not in self._named else "FREE")

    def _host(self, act):
        if act.what == NAMES:
            return "NAMES"
        if act.more == "udp":
            return {"192.0.2.1:9": "192.0.2.1", "127.0.0.1:9": "GATEWAY"}.get(act.what, act.what)
        port = act.what.rpartition(":")[2]
        by = {"ollama": "ENGINE", "llama-server": "ENGINE", "ssh": "TUNNEL"}.get(self._listeners.get(act.what))
        fixed = {"127.0.0.1:9": "OLLAMA", "127.0.0.1:6443": "K3S", "127.0.0.9:443": "get.k3s.io"}
        return by or self.world.roles.get(act.what) or fixed.get(act.what) or (
            "AGENT" if port in self._named or act.what in self._listeners else act.what)

    def _program(self, act):
        argv = act.more[0]
        if act.what == "env":
            return "run env " + ("sh " + self.path(argv[-1]) if argv[-2] == "sh" else
                                 "python" if any("python" in word for word in argv) else " ".join(argv))
        words = [word for word in argv[1:3] if act.what == "tailscale" and word in ("status", "cert")]
        words = words or ["cert"] * (act.what == "tailscale" and "cert" in argv)
        return " ".join(["run", act.what, *words])

    def _compare(self, act, told):
        found = [(pattern.pattern, section, entry) for pattern, section, entry in self._rows if pattern.match(told)]
        if told.startswith("remove ") and not found:  # what it wrote or made it may remove
            found = [(pattern.pattern, section, entry) for pattern, section, entry in self._rows
                     if pattern.match("write " + told[7:]) or pattern.match("make " + told[7:])]
        own = next((why for pattern, why in OWN if re.match("(?:%s)$" % pattern, told)), "")
        if told.startswith("look ") and not found and not own:
            own = self._looked(act.what)
        if told.startswith("make STATE/") and not found and act.mode == 0o700:
            found = [("make STATE", "files", CARD["files"][0])]
        if not found and not own:
            self.problems.append("the card does not say: %s, life %s (%s)" % (told, act.life, act.what[:120]))
        for pattern, section, entry in found if not (act.kind in ("read", "write", "run") and self._failed(act)) else ():
            self.seen.setdefault(pattern, collections.OrderedDict())[told] = (section, entry)
        if found and act.kind in ("write", "make", "mode") and not told.startswith("write /dev"):
            self._check_mode(act, told, found[0][2].mode)
        if act.kind == "remove":
            self._modes.pop(act.what, None)
        elif act.kind == "rename":
            self._modes[act.more] = self._modes.pop(act.what, None)

    def _looked(self, path):
        """Why it may look whether something is there, or "" where it may not."""
        if path in self._touched:
            return "what it read or wrote, or a folder above that"
        programs = re.findall(r"[\w.-]+", section_of("programs")) + ["nvidia-modprobe", "Tailscale"]
        if os.path.basename(path) in programs:
            return "a program on PATH"
        below = ("read " + self.path(path), "write " + self.path(path))
        return "what it might read or write" if any(
            pattern.match(word) for pattern, _, _ in self._rows for word in below) else ""

    @staticmethod
    def _failed(act):
        """Such an act shows what the agent wanted, and not that the card is right to say it."""
        return str(act.mode if act.kind == "run" else act.more or "").startswith("E")

    def _check_mode(self, act, told, mode):
        known = self._modes.get(act.what)
        if act.kind != "mode" and known is not None:
            return  # it was there
        if act.mode is not None:
            self._modes[act.what] = act.mode
            self._widest[act.what] = self._widest.get(act.what, 0) | act.mode
            if act.mode & ~mode:
                self.problems.append("%s has mode %#o, the card says %#o" % (told, act.mode, mode))

    def _secrets(self, acts, sent):
        for act in acts:
            if act.kind != "run":
                continue
            for value, what in self.world.secrets.items():
                if any(value in word for word in act.more[0]):
                    self.problems.append("%s in the arguments of %s" % (what, act.what))
                if act.what != "agent" and any(value in word for word in act.more[1]):
                    self.problems.append("%s in the environment of %s, started by %s" % (what, act.what, act.by))
        routes = {act.what for act in acts if act.kind == "connect" and act.more == "udp"} - {NAMES}
        for piece in sent:
            if piece.by == "agent" and piece.to in routes:
                self.problems.append("something was sent where only the way was asked for: " + piece.to)
            for value, what in self.world.secrets.items():
                if piece.by == "agent" and value in piece.data:
                    self._check_sent(piece, what)

    def _check_sent(self, piece, what):
        to = self.path(piece.to)
        if piece.to.startswith("/"):
            if self._widest.get(piece.to, 0o777) & 0o177:
                self.problems.append("%s in a file that others may read: %s" % (what, piece.to))
        else:
            to = self._host(strace.Act(0, "", "", "", piece.to, None)) if ":" in piece.to and "[" not in piece.to else \
                re.sub(r":\[.*", "", piece.to)
        if not re.match("(?:%s)$" % PLACES[what], to):
            self.problems.append("%s went to %s (life %s)" % (what, to, piece.life))


# Where each secret may go: files, peers, and `pipe` where it was to be printed.
PLACES = {
    "machine token": r"STATE/config\.yaml(\.old)?|GATEWAY|TUNNEL|pipe",
    "control.token": r"STATE/control\.token|AGENT",
    "a control token": r"nowhere",
    "inference.token": r"STATE/inference\.token|AGENT",
    "INFERENCE_TOKEN": r"nowhere",
    "a tenant's token": r"pipe",
    "k3s token": r"STATE/k3s\.kubeconfig|~/worker\.token|GATEWAY|TUNNEL",
}


def compare():
    """Run inside in_a_world().  Returns: Compared."""
    world = World()
    failed = live(world)
    assert not failed, "it did not end well: " + ", ".join(failed)
    strace.wait_ended()
    acts, sent = [], []
    for life, output in world.traces:
        trace = strace.Trace(output, life, is_agent)
        acts += trace.acts
        sent += trace.sent
    return Compared(world, acts, sent)


def print_found(compared):
    for pattern, found in compared.seen.items():
        for told, (section, entry) in found.items():
            print("%-9s %-60s %s" % (section, told[:60], entry.words[:70]))
    rows = [entry for section in CARD.values() for entry in section]
    print("\n%s, Linux %s, Python %s, %s" % (time.strftime("%Y-%m-%d"), os.uname().release, sys.version.split()[0],
                                             subprocess.getoutput("strace --version").splitlines()[0]))
    print("%d rows of the card, %d not to be had here; %d different acts compared; %d problems" % (
        len(rows), sum(bool(entry.why) for entry in rows), len({told for found in compared.seen.values()
                                                                 for told in found}), len(compared.problems)))
    for problem in collections.Counter(compared.problems).items():
        print("%s  (%d times)" % problem)


class Small:
    """A world in which little is known."""
    secrets, roles, dry = {"sesame-open-up": "machine token"}, {"127.0.0.1:1994": "GATEWAY"}, ""


STATE = "/mnt/member/.b9agent/"


@pytest.mark.parametrize("done, problem", [
    (("write", "/etc/passwd.new", 0o600), "does not say: write /etc/passwd.new"),
    (("write", STATE + "unheard-of", 0o600), "does not say: write STATE/unheard-of"),
    (("read", "/mnt/member/.ssh/id_rsa"), "does not say: read ~/.ssh/id_rsa"),
    (("look", "/etc/shadow"), "does not say: look /etc/shadow"),
    (("remove", "/mnt/member/thesis.md"), "does not say: remove ~/thesis.md"),
    (("rename", STATE + "config.yaml", None, "/mnt/member/public"), "does not say: rename STATE/config.yaml ~/public"),
    (("write", STATE + "usage.json.77.tmp", 0o644), "write STATE/usage.json has mode 0o644, the card says 0o600"),
    (("mode", STATE + "config.yaml", 0o640), "write STATE/config.yaml has mode 0o640, the card says 0o600"),
    (("make", STATE + "audit", 0o755), "make STATE/audit has mode 0o755, the card says 0o700"),
    (("listen", "0.0.0.0:11434", None, "tcp"), "does not say: listen 0.0.0.0:11434"),
    (("bind", "127.0.0.1:4711", None, "udp"), ""),
    (("connect", "198.51.100.7:443", None, "tcp"), "does not say: connect 198.51.100.7:443"),
    (("connect", "unix:/run/docker.sock", None, "tcp"), "does not say: connect unix:/run/docker.sock"),
    (("run", "curl", None, (["curl"], [])), "does not say: run curl"),
    (("run", "ollama", None, (["ollama", "sesame-open-up"], [])), "machine token in the arguments of ollama"),
    (("run", "ollama", None, (["ollama"], ["X=sesame-open-up"])), "machine token in the environment of ollama"),
    (("thread", "miner"), "does not say: thread miner"),
    (("power", "mount(x)"), "does not say: power mount(x)"),
    (("signal", "SIGSTOP"), "does not say: signal SIGSTOP"),
])
def test_what_the_card_does_not_say_is_found(done, problem):
    found = [text for text in Compared(Small, [strace.Act(1.0, "life", "agent", *done)], []).problems
             if not text.startswith("not seen")]
    assert len(found) == bool(problem) and all(problem in text for text in found), found


@pytest.mark.parametrize("to, mode, found", [
    (STATE + "config.yaml.7.tmp", 0o600, 0), (STATE + "config.yaml.7.tmp", 0o644, 2), (STATE + "agent.log", 0o600, 1),
    ("127.0.0.1:1994", None, 0), ("127.0.0.1:1995", None, 1), ("pipe:[7]", None, 0)])
def test_a_token_in_the_wrong_place_is_found(to, mode, found):
    acts = [strace.Act(1.0, "life", "agent", "write", to, mode)] if mode else []
    compared = Compared(Small, acts, [strace.Sent(2.0, "life", "agent", to, "token: sesame-open-up\n")])
    assert sum(not text.startswith("not seen") for text in compared.problems) == found


def test_a_claim_that_no_life_shows_is_found():
    assert any("not seen, though the card says it: usage.json" in text for text in Compared(Small, [], []).problems)


@pytest.mark.root
@pytest.mark.timeout(300)
def test_what_the_agent_does_is_what_its_card_says():
    missing = [name for name in ("strace", "unshare", "ip", "gcc", "ssh") if not shutil.which(name)]
    assert not missing, "`tests/run --all` installs " + ", ".join(missing)
    argv, environment = in_a_world([sys.executable, os.path.abspath(__file__), "in the world"])
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True)
    assert done.returncode == 0, done.stdout[-8000:]


if __name__ == "__main__":
    if sys.argv[1:] != ["in the world"]:
        os.execvpe("unshare", *in_a_world([sys.executable, os.path.abspath(__file__), "in the world"]))
    result = compare()
    print_found(result)
    sys.exit(1 if result.problems else 0)
