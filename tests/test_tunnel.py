"""Section 15: the SSH tunnel, against a real sshd that is stopped, hangs, or has another key."""
import getpass
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import types

import pytest

import b9agent
from helpers import StallMeter, Program, ask_control, environment, run_agent, wait_until

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
AGAIN_S = 10.0
pytestmark = pytest.mark.timeout(300)


def need_sshd():
    if SSHD and shutil.which("ssh") and os.path.isdir("/proc/self"):
        return
    if os.environ.get("B9TESTS_HEAVY"):
        pytest.fail("sshd should be here: `tests/run --all` installs openssh-server")
    pytest.skip("needs sshd, ssh and /proc (Debian: openssh-server)")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes():
    rows = (b9agent.parse_proc_stat(b9agent.read_text("/proc/%s/stat" % name, 4096) or "")
            for name in os.listdir("/proc") if name.isdigit())
    return {row.pid: row for row in rows if row and not row.zombie}


def family(pid):
    """A process and all that descends from it."""
    table, found = processes(), {pid}
    while True:
        more = {row.pid for row in table.values() if row.parent in found} - found
        if not more:
            return sorted(found)
        found |= more


def make_key(path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return str(path)


class Sshd:
    """A real sshd on a free port of loopback, for this user and one key."""

    def __init__(self, folder, home):
        self.folder, self.home, self.port, self.program = folder, home, free_port(), None
        self.user = getpass.getuser()
        self.host_key, self.key = make_key(folder / "host"), make_key(folder / "user")
        self.known = home / ".ssh" / "known_hosts"
        self.known.parent.mkdir(mode=0o700)
        self.trust()
        shutil.copy(self.key + ".pub", str(folder / "authorized"))
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", 0o755, exist_ok=True)  # sshd wants it, and its unit makes it

    def trust(self):
        with open(self.host_key + ".pub") as handle:
            self.known.write_text("[127.0.0.1]:%d %s\n" % (self.port,
                                                           " ".join(handle.read().split()[:2])))

    def start(self, *options):
        path = self.folder / "sshd_config"
        path.write_text("\n".join(options + (
            "ListenAddress 127.0.0.1:%d" % self.port, "HostKey " + self.host_key, "PidFile none",
            "AuthorizedKeysFile %s" % (self.folder / "authorized"), "StrictModes no", "UsePAM no",
            "PasswordAuthentication no", "KbdInteractiveAuthentication no", "MaxStartups 100",
            "PermitRootLogin prohibit-password", "AllowTcpForwarding yes")) + "\n")
        self.program = Program([SSHD, "-D", "-e", "-f", str(path)], environment(self.home))
        self.program.wait_line("Server listening")
        return self

    def stop(self):
        """It, and every session of it."""
        if self.program is not None:
            for pid in family(self.program.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.program.__exit__()
            self.program = None


@pytest.fixture
def sshd(tmp_path, home):
    need_sshd()
    folder = tmp_path / "sshd"
    folder.mkdir(mode=0o755)
    server = Sshd(folder, home)
    yield server
    server.stop()


class Tunnelled:
    """An agent whose gateway is behind the tunnel."""

    def __init__(self, agent, home, state, sshd, embedded, extra=()):
        self._start, self.home, self.state = agent, home, state
        self.machine_id, self.token = embedded.create()
        self.arguments = ("--tunnel", "%s@127.0.0.1:%d" % (sshd.user, sshd.port),
                          "--tunnel-identity-file", sshd.key, "--gateway-port", embedded.port,
                          "--machine-id", self.machine_id, "--pool-name", "gpu",
                          "--keepalive-interval", "1", "--control-port", "0") + tuple(extra)
        self.program = None

    def start(self):
        self.program = self._start("run", *self.arguments, BETA9_TOKEN=self.token)
        wait_until(lambda: (self.state / "control.addr").exists(), "the control API")
        return self

    def get(self, path):
        return ask_control(self.state, path)

    def status(self):
        return json.loads(self.get("/status"))

    def tunnel(self):
        return self.status()["tunnel"]

    def wait_tunnel(self, state, words=""):
        def look():
            now = self.tunnel()
            return now if now["state"] == state and words in now["message"] else None
        return wait_until(look, "tunnel %s %s\n%s" % (state, words, self.program.text()))

    def wait_ready(self, within_s=40.0):
        return wait_until(lambda: self.status()["state"] == "ready" and self.status(),
                          "ready", within_s)

    def stop(self):
        assert self.program.stop() == 0, self.program.text()


@pytest.fixture
def tunnelled(agent, home, state, sshd, embedded):
    def make(*extra):
        return Tunnelled(agent, home, state, sshd, embedded, extra)
    return make


def health(port):
    """Whether the gateway's own answer comes out of the near end."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/api/v1/health")
        return json.loads(connection.getresponse().read())["status"] == "ok"
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()


def no_ssh_of(home, ssh_pid):
    return ssh_pid not in processes() and not os.listdir(str(home / ".b9agent" / "children"))


def test_the_gateway_is_reached_again_within_ten_seconds_ten_times_in_a_row(sshd, tunnelled):
    sshd.start()
    one = tunnelled().start()
    one.wait_ready()
    port = one.tunnel()["local_port"]
    took = []
    for _ in range(10):
        sshd.stop()
        wait_until(lambda: one.tunnel()["state"] == "backoff", "the break is told")
        wait_until(lambda: one.status()["state"] == "unreachable", "the membership knows")
        assert not health(port)
        with StallMeter() as stalls:
            sshd.start()
            began = b9agent.now_s()
            wait_until(lambda: health(port), "the gateway through the tunnel\n" + one.program.text())
            took.append(b9agent.now_s() - began)
            one.wait_ready(within_s=AGAIN_S)
        assert took[-1] <= AGAIN_S + stalls.worst_s, took
    print("reachable again after", ["%.1f s" % value for value in took])
    ssh_pid = one.tunnel()["pid"]
    one.stop()
    assert no_ssh_of(one.home, ssh_pid)
    assert one.token not in one.program.text()


def test_its_state_is_in_status_metrics_and_log_and_no_secret_is_in_its_argv(sshd, tunnelled):
    sshd.start()
    one = tunnelled().start()
    one.wait_ready()
    tunnel = one.tunnel()
    assert tunnel["server"] == "%s@127.0.0.1:%d" % (sshd.user, sshd.port)
    assert (tunnel["state"], tunnel["message"], tunnel["starts"]) == ("running", "", 1)
    assert 'b9agent_tunnel_state{state="running"} 1' in one.get("/metrics")
    assert 'b9agent_tunnel_state{state="backoff"} 0' in one.get("/metrics")
    shown = run_agent(one.home, "status")
    assert "tunnel" in shown.out and "running, " + tunnel["server"] in shown.out
    one.program.wait_line(r"notice tunnel state=running server=")
    for name in ("cmdline", "environ"):
        with open("/proc/%d/%s" % (tunnel["pid"], name), "rb") as handle:
            text = handle.read().decode()
        assert one.token not in text and (one.state / "control.token").read_text().strip() not in text
    done = run_agent(one.home, "doctor", *one.arguments, BETA9_TOKEN=one.token)
    assert "through the tunnel" in done.out, done
    one.stop()
    assert no_ssh_of(one.home, tunnel["pid"])


def test_once_opens_the_tunnel_and_closes_it(sshd, tunnelled):
    sshd.start()
    one = tunnelled()
    done = run_agent(one.home, "--once", *one.arguments, BETA9_TOKEN=one.token)
    assert done.code == 0 and " ready " in done.err, done
    assert os.listdir(str(one.state / "children")) == []
    sshd.stop()
    done = run_agent(one.home, "--once", *one.arguments, BETA9_TOKEN=one.token)
    assert done.code == 5 and "the tunnel to" in done.err and "Connection refused" in done.err, done


def test_a_server_that_hangs_is_noticed_and_found_again(sshd, tunnelled):
    sshd.start()
    one = tunnelled().start()
    one.wait_ready()
    port, hung = one.tunnel()["local_port"], family(sshd.program.pid)
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: one.status()["state"] == "unreachable", "the membership notices")
    one.wait_tunnel("backoff")
    for pid in hung:
        os.kill(pid, signal.SIGCONT)
    with StallMeter() as stalls:
        began = b9agent.now_s()
        wait_until(lambda: health(port), "the gateway through the tunnel")
        took_s = b9agent.now_s() - began
    assert took_s <= AGAIN_S + stalls.worst_s
    one.wait_ready()
    one.stop()


def test_another_host_key_is_refused_with_the_command_to_run(sshd, tunnelled, tmp_path):
    sshd.start()
    one = tunnelled().start()
    one.wait_ready()
    before = sshd.known.read_text()
    sshd.stop()
    sshd.host_key = make_key(tmp_path / "other")
    sshd.start()
    message = one.wait_tunnel("backoff", "ssh-keygen -R")["message"]
    assert "'[127.0.0.1]:%d' -f %s" % (sshd.port, sshd.known) in message
    assert "ssh-keyscan -p %d 127.0.0.1 >> %s" % (sshd.port, sshd.known) in message
    one.program.wait_line("warning tunnel state=backoff .*ssh-keygen -R")
    wait_until(lambda: "ssh-keygen -R" in one.status()["message"], "the membership says it too")
    assert sshd.known.read_text() == before
    subprocess.run(["ssh-keygen", "-R", "[127.0.0.1]:%d" % sshd.port, "-f", str(sshd.known)],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with open(str(sshd.known), "ab") as handle:
        handle.write(subprocess.run(["ssh-keyscan", "-p", str(sshd.port), "127.0.0.1"], check=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    one.wait_ready()
    one.stop()


def test_an_unknown_host_key_is_never_accepted(sshd, tunnelled):
    sshd.start()
    sshd.known.unlink()
    one = tunnelled().start()
    message = one.wait_tunnel("backoff", "not known here")["message"]
    assert "ssh-keyscan -p %d 127.0.0.1 >> %s" % (sshd.port, sshd.known) in message
    assert "ssh-keygen -R" not in message
    assert not sshd.known.exists()
    sshd.trust()
    one.wait_ready()
    one.stop()


def test_a_key_that_the_server_does_not_know_and_one_that_is_missing(sshd, tunnelled, tmp_path):
    sshd.start()
    key = make_key(tmp_path / "stranger")
    one = tunnelled("--tunnel-identity-file", key).start()
    message = one.wait_tunnel("backoff", "refuses our key")["message"]
    assert "Permission denied" in message and key in message
    one.stop()
    os.remove(key)
    one = tunnelled("--tunnel-identity-file", key).start()
    message = one.wait_tunnel("backoff", "the key file cannot be used")["message"]
    assert key in message and ".." not in message
    one.stop()


def test_a_server_that_does_not_forward_is_told_of(sshd, tunnelled):
    sshd.start("AllowTcpForwarding no")
    one = tunnelled().start()
    one.wait_tunnel("running", "AllowTcpForwarding")
    one.stop()


def test_no_gateway_behind_the_server_is_told_of_until_there_is_one(sshd, tunnelled, embedded):
    sshd.start()
    embedded.program.stop()
    one = tunnelled().start()
    one.wait_tunnel("running", "nothing answers it at localhost:%d" % embedded.port)
    embedded.start()
    one.wait_ready()
    one.wait_tunnel("running")
    wait_until(lambda: one.tunnel()["message"] == "", "the message goes")
    one.stop()


def test_a_reverse_forward_that_is_refused_keeps_the_tunnel_down_and_says_why(sshd, tunnelled):
    sshd.start("PermitListen 127.0.0.1:1")
    one = tunnelled("--tunnel-reverse-k3s").start()
    one.wait_tunnel("backoff", "its port 6443 is taken, or")
    one.stop()


def test_what_a_killed_agent_left_is_ended_by_the_next(sshd, tunnelled):
    sshd.start()
    port = free_port()
    one = tunnelled("--tunnel-local-port", port).start()
    one.wait_ready()
    old = one.tunnel()["pid"]
    one.program.signal(signal.SIGKILL)
    one.program.wait()
    assert old in processes()
    (one.state / "control.addr").unlink()
    one.start()
    one.wait_ready()
    assert old not in processes() and one.tunnel()["local_port"] == port
    one.stop()
    assert no_ssh_of(one.home, old)


def test_a_port_that_another_program_took_gets_no_token(sshd, tunnelled):
    sshd.start()
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        thief.setblocking(False)
        port = thief.getsockname()[1]
        one = tunnelled("--tunnel-local-port", port).start()
        one.wait_tunnel("backoff", "127.0.0.1:%d is taken by" % port)
        with pytest.raises(BlockingIOError):
            thief.accept()
    one.wait_ready()
    one.stop()


@pytest.mark.parametrize("lives", [True, False], ids=["another-process", "ended"])
def test_who_listens_there_and_is_not_our_ssh_is_sent_nothing(lives):
    """It was when we last looked, a tenth of a second ago, and its port has been taken since."""
    settings = b9agent.load_settings({"config": os.devnull, "tunnel": "me@h"}, {}).settings
    ours = subprocess.Popen(["sleep", "60"])
    try:
        with socket.socket() as thief:
            thief.bind(("127.0.0.1", 0))
            thief.listen()
            port, pid = thief.getsockname()[1], ours.pid if lives else None
            client = b9agent.GatewayClient(b9agent.tunnel_endpoint(settings, port, lambda: pid), "secret",
                                           "gpu", b9agent.Log(stream=io.StringIO()))
            with pytest.raises(b9agent.GatewayUnreachable, match="ssh has ended"):
                client.keepalive({})
            with thief.accept()[0] as link:
                assert link.recv(65536) == b""
    finally:
        ours.kill()
        ours.wait()


def test_a_listener_of_another_address_on_its_port_is_in_nobodys_way(sshd, tunnelled):
    sshd.start()
    for host in ("127.0.0.2", "::1"):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as other:
            port = free_port()
            other.bind((host, port))
            other.listen()
            one = tunnelled("--tunnel-local-port", port).start()
            one.wait_ready()
            one.stop()


def test_keys_that_are_refused_are_offered_once_a_minute():
    settings = b9agent.load_settings({"config": os.devnull, "tunnel": "me@h"}, {}).settings
    for line in ("me@h: Permission denied (publickey).",
                 "Received disconnect from 192.0.2.1 port 22:2: Too many authentication failures"):
        said, limit_s = b9agent.ssh_problem([line, "Disconnected from 192.0.2.1 port 22"], settings)
        assert limit_s == 60.0 and "refuses our key (%s)" % line.rstrip(".") in said


def test_what_the_server_says_of_a_forward_hurries_no_request():
    """Or one that says it otherwise each time had a request and two lines of log every half second."""
    hurried = []
    agent = types.SimpleNamespace(_log=b9agent.Log(stream=io.StringIO()), _wake_membership=b9agent.Wake(),
                                  membership=types.SimpleNamespace(hurry=hurried.append))
    for message in ("open failed: 1", "open failed: 2", ""):
        assert not hurried
        b9agent.Agent._tell_tunnel(agent, {"state": "running", "message": message})
    assert len(hurried) == 1


def test_an_ssh_config_is_not_read(sshd, tunnelled, home, tmp_path):
    (home / ".ssh" / "config").write_text("Host *\n  StrictHostKeyChecking no\n")
    settings = b9agent.load_settings({"config": os.devnull, "tunnel": "x@h"}, {}).settings
    command = b9agent.ssh_command("ssh", settings, 20001)
    assert command[1:3] == ["-F", "none"] and command[-4:] == [
        "-L", "127.0.0.1:20001:localhost:1994", "--", "h"]
    done = subprocess.run([command[0], "-G", *command[1:]], stdout=subprocess.PIPE, check=True
                          ) if shutil.which("ssh") else None
    if done:
        shown = dict(line.split(" ", 1) for line in done.stdout.decode().lower().splitlines()
                     if " " in line)
        wanted = {"batchmode": "yes", "exitonforwardfailure": "yes", "stricthostkeychecking": "true",
                  "serveraliveinterval": "3", "serveralivecountmax": "3", "forwardagent": "no",
                  "updatehostkeys": "false", "controlmaster": "false"}
        assert {name: shown[name] for name in wanted} == wanted


@pytest.mark.parametrize("name", ["a b", 'a"b', "a'b", "50%o", "é"])
def test_a_home_of_any_name_has_its_known_hosts(name, monkeypatch):
    if not shutil.which("ssh"):
        pytest.skip("needs ssh")
    monkeypatch.setenv("HOME", "/nowhere/" + name)
    settings = b9agent.load_settings({"config": os.devnull, "tunnel": "x@h"}, {}).settings
    command = b9agent.ssh_command("ssh", settings, 20001)
    shown = subprocess.run([command[0], "-G", *command[1:]], stdout=subprocess.PIPE, check=True).stdout
    assert "userknownhostsfile /nowhere/%s/.ssh/known_hosts\n" % name in shown.decode().replace("%%", "%")


def test_https_is_verified_under_the_gateways_own_name():
    settings = b9agent.load_settings({"config": os.devnull, "tunnel": "me@h", "gateway_host": "gw.lan",
                                      "gateway_scheme": "https"}, {}).settings
    endpoint = b9agent.tunnel_endpoint(settings, 20001, lambda: None)
    assert (endpoint.url, endpoint.dial, endpoint.proxy) == (
        "https://gw.lan:1994", ("127.0.0.1", 20001), None)
