"""The whole life of the agent, as real processes against real peers."""
import ast
import fcntl
import json
import os
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time

import pytest

import b9agent
from helpers import (AGENT, PATIENCE_S, ROOT, Program, StallMeter, agent_command, environment,
                     files_with, quiet_port, run_agent, tree, wait_until)
from hostile_gateway import FAULTS, TOKEN, HostileGateway, decode_json, keepalive_problems, \
    register_problems, secret_words

K3S = "k3s-bearer-secret.of-the-life-8812"
LINE = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (debug|info|notice|warning|error) [a-z_]+( \w+=\S.*)?$")


def to(port, *more):
    """Flags for a gateway on loopback; the token comes in the environment."""
    return ["--gateway-host", "127.0.0.1", "--gateway-port", str(port), "--pool-name", "gpu",
            "--control-port", "0", *more]


@pytest.fixture
def run(agent, hostile):
    """run(*flags, **environment): an agent in service at the hostile gateway, a keepalive a second."""
    def start(*flags, **extra):
        extra.setdefault("BETA9_TOKEN", TOKEN)
        return agent("run", *to(hostile.port), "--keepalive-interval", "1", *flags, **extra)
    return start


# -- once ------------------------------------------------------------------

def test_once_registers_sends_one_keepalive_and_exits_0(home, state, hostile):
    done = run_agent(home, "--once", *to(hostile.port), BETA9_TOKEN=TOKEN, BETA9_K3S_TOKEN=K3S)
    assert (done.code, done.out) == (0, ""), done
    assert [(request.name, request.answered) for request in hostile.requests] == [
        ("register", "ok"), ("keepalive", "ok")]
    register, keepalive = (request.body for request in hostile.requests)
    assert register["token"] == K3S and register["hostname"] == "machine-" + register["machine_id"]
    assert (register["pool_name"], register["provider_name"]) == ("gpu", "generic")
    assert keepalive["machine_id"] == register["machine_id"]
    assert keepalive["agent_version"] == b9agent.VERSION
    assert list(hostile.machines.values()) == ["ready"]
    assert [line.split()[2] for line in done.err.splitlines()] == ["registered", "ready"]
    assert all(LINE.match(line) for line in done.err.splitlines())


def test_once_sends_all_thirteen_metrics_of_a_linux_machine(home, hostile):
    assert run_agent(home, "--once", *to(hostile.port), BETA9_TOKEN=TOKEN).code == 0
    from hostile_gateway import METRICS_FIELDS
    metrics = hostile.requests[1].body["metrics"]
    missing = set(METRICS_FIELDS) - set(metrics)
    assert not missing - {"free_gpu_count"}, "only where no driver answers may a metric be unknown"
    assert metrics["total_cpu_available"] % 10 == 0
    assert 64 < metrics["total_memory_available"] < 2 ** 31, "MB"
    assert metrics["total_disk_space_bytes"] > metrics["total_disk_free_bytes"] > 0


def test_the_machine_id_is_made_once_and_kept(home, state, hostile):
    for _ in range(3):
        assert run_agent(home, "--once", *to(hostile.port), BETA9_TOKEN=TOKEN).code == 0
    ids = {request.body["machine_id"] for request in hostile.requests}
    assert ids == {(state / "machine_id").read_text().strip()} and len(hostile.requests) == 6
    assert set(tree(home)) == {".b9agent", ".b9agent/agent.lock", ".b9agent/machine_id"}
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_a_machine_id_that_is_set_is_used(home, hostile):
    done = run_agent(home, "--once", *to(hostile.port), "--machine-id", "0BADCAFE", BETA9_TOKEN=TOKEN)
    assert done.code == 0 and hostile.requests[0].body["machine_id"] == "0badcafe"


def test_a_spoilt_machine_id_file_is_named(home, state, hostile):
    state.mkdir(mode=0o700)
    (state / "machine_id").write_text("not an id\n")
    done = run_agent(home, "--once", *to(hostile.port), BETA9_TOKEN=TOKEN)
    assert done.code == 2 and str(state / "machine_id") in done.err and hostile.requests == []


EXIT = {"TokenRefused": 3, "RequestRefused": 4, "NoKeepaliveRoute": 4, "MachineNotFound": 5,
        "GatewayUnwell": 5}
SOME = ["unauthorized", "forbidden_html", "invalid_pool", "invalid_cpu", "invalid_payload",
        "no_route_404", "no_route_405", "machine_not_found", "panic", "bad_gateway", "too_many", "close",
        "cut_head", "cut_body", "empty_200", "garbage_json", "promise_broken", "login_page",
        "huge_body", "redirect_302", "redirect_307", "control_characters"]


@pytest.mark.parametrize("where", ["register", "keepalive"])
@pytest.mark.parametrize("fault", SOME)
def test_once_fails_when_either_request_fails(fault, where, home, hostile):
    hostile.fault = lambda request: fault if request.name == where else None
    done = run_agent(home, "--once", *to(hostile.port), BETA9_TOKEN=TOKEN)
    outcome = FAULTS[fault].register if where == "register" else FAULTS[fault].outcome
    assert done.code == EXIT[outcome], done
    said = done.err.splitlines()
    assert said[-1].startswith("b9agent: error: ") and len(said) == (1 if where == "register" else 2)
    assert TOKEN not in done.err and "Traceback" not in done.err
    assert b9agent.printable(done.err.replace("\n", "")) == done.err.replace("\n", "")
    assert len(hostile.requests) == (1 if where == "register" else 2)
    assert hostile.elsewhere.connections == 0


def test_once_without_a_gateway_is_exit_5(home):
    port = quiet_port()
    done = run_agent(home, "--once", *to(port), BETA9_TOKEN=TOKEN)
    assert done.code == 5 and "connection refused" in done.err and "tunnel" in done.err


@pytest.mark.parametrize("arguments", [["--once"], ["run"], []])
def test_without_a_token_it_says_where_one_comes_from(arguments, home, hostile):
    done = run_agent(home, *arguments, *to(hostile.port))
    assert done.code == 2 and "BETA9_TOKEN" in done.err and "machine create" in done.err
    assert done.err.count("\n") == 1 and hostile.requests == []


def test_a_token_on_the_command_line_earns_a_warning(home, hostile):
    done = run_agent(home, "--once", *to(hostile.port), "--token", TOKEN)
    assert done.code == 0
    warning = [line for line in done.err.splitlines() if " warning " in line]
    assert len(warning) == 1 and "`ps`" in warning[0] and TOKEN not in done.err


# -- dry run ---------------------------------------------------------------

def test_a_dry_run_prints_both_payloads_sends_nothing_and_leaves_nothing(home, hostile):
    done = run_agent(home, "--dry-run", *to(hostile.port), "--hostname", "100.64.0.3",
                     BETA9_TOKEN=TOKEN, BETA9_K3S_TOKEN=K3S)
    assert done.code == 0, done
    shown = decode_json(done.out.encode())
    assert register_problems(shown["register"]) == []
    assert keepalive_problems(shown["keepalive"]) == []
    assert shown["gateway"] == hostile.url and shown["register"]["hostname"] == "100.64.0.3"
    assert TOKEN not in done.out + done.err and K3S not in done.out + done.err
    assert hostile.requests == [] and tree(home) == {}


def test_a_dry_run_needs_no_token(home):
    done = run_agent(home, "--dry-run")
    assert done.code == 0 and json.loads(done.out)["token"] is None and tree(home) == {}


# -- in service -------------------------------------------------------------

def test_an_agent_becomes_ready_and_stays_so(run, hostile):
    program = run()
    program.wait_line(r" notice ready\b")
    hostile.wait_count(3, "keepalive", "ok")
    assert len(hostile.named("register")) == 1
    assert program.stop() == 0
    assert program.lines()[-1].split()[2] == "stopped"


def test_keepalives_come_at_the_interval(run, hostile):
    with StallMeter() as stall:
        run()
        hostile.wait_count(5, "keepalive", "ok")
    times = [request.at for request in hostile.named("keepalive")]
    for number, (earlier, later) in enumerate(zip(times, times[1:])):
        least_s = 0.9 if number else 0.1  # the first is spread: who starts in step does not stay so
        assert least_s - stall.worst_s - 0.05 <= later - earlier <= 1.1 + stall.worst_s + 0.25


def test_register_is_followed_by_a_keepalive_at_once(run, hostile):
    with StallMeter() as stall:
        run()
        first = hostile.wait_count(1, "keepalive")
    assert first.at - hostile.named("register")[0].at < 0.5 + 3 * stall.worst_s


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["ready", "hang_register", "hang_keepalive", "unreachable", "refused"])
def test_a_signal_ends_it_within_five_seconds_with_exit_0(number, moment, run, agent, hostile, state):
    if moment == "unreachable":
        port = quiet_port()
        program = agent("run", *to(port), BETA9_TOKEN=TOKEN)
        program.wait_line("unreachable")
    else:
        if moment.startswith("hang"):
            hostile.fault = lambda request: "hang" if request.name == moment[5:] else None
        program = run()
        if moment.startswith("hang"):
            hostile.wait_count(1, moment[5:])
        else:
            program.wait_line(r"notice ready\b")
        if moment == "refused":
            hostile.fault = "unauthorized"
            program.wait_line("error refused")
    with StallMeter() as stall:
        began = time.monotonic()
        program.signal(number)
        code = program.wait()
        took = time.monotonic() - began
    assert code == 0, program.text()
    assert took < 5.0 + stall.worst_s
    assert "Traceback" not in program.text()
    assert not (state / "control.addr").exists()


def test_two_signals_at_once_end_it_as_well(run, hostile):
    program = run()
    program.wait_line(r"notice ready\b")
    for _ in range(5):
        program.signal(signal.SIGTERM)
        program.signal(signal.SIGINT)
    assert program.wait() == 0 and "Traceback" not in program.text()


@pytest.mark.parametrize("command", ["run", "gateway", "demo"])
def test_a_signal_that_another_thread_takes_ends_it_as_well(command, home, hostile):
    """The kernel may give a signal to any thread, and to the main one just before it waits: neither
    interrupts the wait, so the handler must not be what ends it."""
    patch = ("import signal, threading\n"
             "def take():\n    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)\n"
             "real = b9agent.%s\n"
             "def waiting(self, *rest):\n"
             "    if threading.current_thread() is threading.main_thread() and not told:\n"
             "        told.append(threading.Timer(0.5, take))\n        told[0].start()\n"
             "    return real(self, *rest)\n"
             "told = []\nb9agent.%s = waiting" % (("Wake.wait",) * 2))
    arguments = {"run": ["run", *to(hostile.port)], "demo": ["demo"],
                 "gateway": ["gateway", "--port", "0", "--db", home / "g.db"]}[command]
    with StallMeter() as stall, patched(home, patch, *arguments, BETA9_TOKEN=TOKEN) as program:
        program.wait_line("ready|listening", "out" if command == "demo" else "err")
        began = time.monotonic()
        assert program.wait() == 0, program.text()
        assert time.monotonic() - began < 0.5 + 5.0 + 2 * stall.worst_s


def test_an_ignored_hangup_stays_ignored(hostile, home):
    command = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"] + agent_command(
        "run", *to(hostile.port), "--keepalive-interval", "1")
    with Program(command, environment(home, BETA9_TOKEN=TOKEN)) as program:
        program.wait_line(r"notice ready\b")
        seen = len(hostile.named("keepalive"))
        program.signal(signal.SIGHUP)
        hostile.wait_count(seen + 2, "keepalive", "ok")
        assert program.stop() == 0


@pytest.mark.parametrize("second", [["run"], ["--once"]])
def test_a_second_agent_on_the_same_folder_says_who_holds_it_and_exits_6(second, run, home, hostile):
    program = run()
    program.wait_line(r"notice ready\b")
    seen = len(hostile.named("register"))
    done = run_agent(home, *second, *to(hostile.port), BETA9_TOKEN=TOKEN)
    assert done.code == 6, done
    assert "pid %d" % program.pid in done.err and str(home / ".b9agent") in done.err
    assert len(hostile.named("register")) == seen
    other = run_agent(home, "--once", *to(hostile.port), "--state-dir", home / "other",
                      BETA9_TOKEN=TOKEN)
    assert other.code == 0


def test_a_killed_agent_holds_nothing(run, home, hostile):
    program = run()
    program.wait_line(r"notice ready\b")
    program.signal(signal.SIGKILL)
    program.wait()
    done = run_agent(home, "--once", *to(hostile.port), BETA9_TOKEN=TOKEN)
    assert done.code == 0, done


def test_a_state_folder_that_is_none_is_exit_2(home, hostile, tmp_path):
    path = tmp_path / "a-file"
    path.write_text("")
    for arguments in (["--once"], ["run"]):
        done = run_agent(home, *arguments, *to(hostile.port), "--state-dir", path, BETA9_TOKEN=TOKEN)
        assert done.code == 2 and str(path) in done.err and "Traceback" not in done.err, done


def test_a_refusal_at_the_start_ends_the_service(run, hostile):
    for fault, code in (("unauthorized", 3), ("invalid_pool", 4), ("no_route_404", 4)):
        hostile.fault = fault
        program = run()
        assert program.wait() == code, program.text()
        assert program.lines()[-1].startswith("b9agent: error: ")


def test_an_outage_at_the_start_does_not_end_the_service(run, hostile):
    hostile.fault = "bad_gateway"
    program = run()
    hostile.wait_count(3, "register", "bad_gateway")
    hostile.fault = None
    program.wait_line(r"notice ready\b")
    assert program.stop() == 0


def test_a_gateway_that_comes_up_later_is_found(agent, home):
    port = quiet_port()
    program = agent("run", *to(port), "--keepalive-interval", "1", BETA9_TOKEN=TOKEN)
    program.wait_line("unreachable")
    with HostileGateway(port=port) as gateway:
        gateway.wait_count(2, "keepalive", "ok")
        assert gateway.violations == []
        assert program.stop() == 0


def test_a_gateway_that_forgets_is_registered_with_again(embedded, agent, home):
    machine, token = embedded.create()
    program = agent("run", *to(embedded.port), "--machine-id", machine, "--keepalive-interval", "1",
                    BETA9_TOKEN=token)
    _, line = program.wait_line(r"notice ready\b")
    database = sqlite3.connect(embedded.db, timeout=30)
    try:
        with database:
            database.execute("UPDATE machines SET expires_at = 0")
    finally:
        database.close()
    _, line = program.wait_line(r" expired\b", after=line + 1)
    _, line = program.wait_line(r" registered\b", after=line)
    program.wait_line(r"notice ready\b", after=line)
    found = json.loads(run_agent(home, "machine", "list", "--db", embedded.db, "--json").out)
    assert [entry["state"]["status"] for entry in found] == ["ready"]
    assert program.stop() == 0


def test_the_embedded_gateway_restarted_under_a_running_agent(embedded, agent):
    machine, token = embedded.create()
    program = agent("run", *to(embedded.port), "--machine-id", machine, "--keepalive-interval", "1",
                    BETA9_TOKEN=token)
    line = -1
    for _ in range(3):
        _, line = program.wait_line(r"notice ready\b", after=line + 1)
        embedded.program.signal(signal.SIGKILL)
        embedded.program.wait()
        _, line = program.wait_line(r"unreachable\b", after=line)
        embedded.start()
    program.wait_line(r"notice ready\b", after=line)
    assert not [text for text in program.lines() if " expired" in text]
    assert program.stop() == 0


# -- under supervisors that restart whatever ends ------------------------------

def write_private(path, text):
    draft = path.with_name(path.name + ".new")
    draft.write_text(text)
    draft.chmod(0o600)
    draft.replace(path)


GOOD = "gateway: {host: 127.0.0.1, port: %d}\npool: gpu\nkeepalive_interval: 1\ncontrol: {port: 0}\n" \
       "machine: {token: %s}\n"


@pytest.mark.parametrize("supervisor", ["launchd", "openrc"])
@pytest.mark.parametrize("wrong", ["token", "line", "mode", "token_file"])
def test_where_nothing_may_end_it_waits_for_what_mends_it(supervisor, wrong, agent, hostile, state, home):
    state.mkdir(mode=0o700)
    path, good = state / "config.yaml", GOOD % (hostile.port, TOKEN)
    if wrong == "token":
        write_private(path, GOOD % (hostile.port, "a-token-of-another-time"))
    elif wrong == "line":
        write_private(path, good + "poool: x\n")
    elif wrong == "mode":
        write_private(path, good)
        path.chmod(0o644)
    else:
        write_private(path, good.replace("token: " + TOKEN, "token_file: %s" % (home / "t")))
        write_private(home / "t", "a-token-of-another-time\n")
    program = agent("run", B9AGENT_SUPERVISOR=supervisor)
    match, _ = program.wait_line(r" waiting\b")
    assert {"token": "401", "line": "poool", "mode": "chmod 600", "token_file": "401"}[wrong] in match.string
    assert not hostile.named(answered="ok")
    if wrong == "mode":
        path.chmod(0o600)
    elif wrong == "token_file":
        write_private(home / "t", TOKEN + "\n")
    else:
        write_private(path, good)
    hostile.wait_count(1, "keepalive", "ok")
    assert program.stop() == 0


def test_while_it_waits_a_signal_ends_it(agent, hostile, state):
    state.mkdir(mode=0o700)
    write_private(state / "config.yaml", GOOD % (hostile.port, "a-token-of-another-time"))
    program = agent("run", B9AGENT_SUPERVISOR="openrc")
    program.wait_line(r" waiting\b")
    assert program.stop() == 0
    assert len(hostile.requests) == 1


# -- a week in one minute ------------------------------------------------------

def peak_mib(pid):
    with open("/proc/%d/status" % pid) as handle:
        return int(re.search(r"VmHWM:\s*(\d+) kB", handle.read()).group(1)) / 1024


WEEK = sorted(name for name in FAULTS if FAULTS[name].outcome != "ok")
DAYS = 4


@pytest.mark.parametrize("day", range(DAYS))
def test_a_week_in_one_minute(day, run, hostile, home):
    """Through every fault, and ready again within two intervals after each, without a restart.

    After every other fault the gateway has also forgotten the machine.
    """
    program = run("--debug", BETA9_K3S_TOKEN=K3S)
    hostile.wait_count(1, "keepalive", "ok")
    registered = len(hostile.named("register", "ok"))
    for number, fault in enumerate(WEEK[day::DAYS]):
        with StallMeter() as stall:
            seen = len(hostile.named(answered=fault))
            hostile.fault = fault
            hostile.wait_count(seen + 1, answered=fault)
            if number % 2:
                hostile.forget()
            ready = len(hostile.named("keepalive", "ok"))
            hostile.fault = None
            mended = time.monotonic()
            again = hostile.wait_count(ready + 1, "keepalive", "ok")
        assert again.at - mended <= 2 * 1.0 + 2 * stall.worst_s + 0.2, "late after %s" % fault
        assert program.process.poll() is None
    assert len(hostile.named("register", "ok")) > registered
    assert hostile.elsewhere.connections == 0
    assert program.stop() == 0
    assert "Traceback" not in program.text() and " defect" not in program.text()
    for secret in [TOKEN, K3S] + secret_words():
        assert secret not in program.text()
        assert files_with(home, secret) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
def test_huge_answers_do_not_cost_the_memory_that_they_would_take(run, hostile):
    program = run()
    hostile.wait_count(1, "keepalive", "ok")
    before = peak_mib(program.pid)
    for fault in ("huge_body", "huge_chunked", "huge_without_length", "deep_object", "endless_headers"):
        hostile.fault = fault
        hostile.wait_count(1, answered=fault)
        seen = len(hostile.named("keepalive", "ok"))
        hostile.fault = None
        hostile.wait_count(seen + 1, "keepalive", "ok")
    assert peak_mib(program.pid) < before + 16
    assert program.stop() == 0


# -- the log ------------------------------------------------------------------

def test_every_line_of_the_log_has_time_level_event_and_fields(run, hostile, state):
    program = run("--debug", BETA9_K3S_TOKEN=K3S)
    hostile.wait_count(2, "keepalive", "ok")
    hostile.fault = "control_characters"
    hostile.wait_count(1, answered="control_characters")
    hostile.fault = None
    program.stop()
    for line in program.lines():
        assert LINE.match(line), line
        assert b9agent.printable(line) == line
    assert not [line for line in program.lines() if line.startswith("fake=")]
    kept = (state / "agent.log").read_text().splitlines()
    assert kept == program.lines()
    assert stat.S_IMODE((state / "agent.log").stat().st_mode) == 0o600


def test_the_log_as_json(run, hostile):
    program = run("--debug", "--log-format", "json")
    hostile.wait_count(2, "keepalive", "ok")
    hostile.fault = "control_characters"
    hostile.wait_count(1, answered="control_characters")
    program.stop()
    records = [json.loads(line) for line in program.lines()]
    assert {"started", "registered", "ready", "stopped"} <= {record["event"] for record in records}
    for record in records:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["time"])
        assert record["level"] in ("debug", "info", "notice", "warning", "error")


def test_under_systemd_the_log_has_priorities_and_no_time_of_its_own(home, hostile, state):
    reader, writer = os.pipe()
    try:
        status = os.fstat(writer)
        child = subprocess.Popen(
            agent_command("run", *to(hostile.port), "--debug"), stderr=writer, stdin=subprocess.DEVNULL,
            env=environment(home, BETA9_TOKEN=TOKEN, JOURNAL_STREAM="%d:%d" % (status.st_dev,
                                                                              status.st_ino)))
        os.close(writer)
        writer = None
        try:
            hostile.wait_count(1, "keepalive", "ok")
            wait_until(lambda: (state / "control.addr").exists(), "the control API to listen")
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=PATIENCE_S) == 0
        finally:
            child.kill()
            child.wait()
        with os.fdopen(reader, closefd=False) as stream:
            lines = stream.read().splitlines()
    finally:
        os.close(reader)
        if writer is not None:
            os.close(writer)
    levels = {"debug": 7, "info": 6, "notice": 5, "warning": 4, "error": 3}
    for line in lines:
        match = re.match(r"^<(\d)>(\w+) [a-z_]+", line)
        assert match and int(match.group(1)) == levels[match.group(2)], line
    assert {"<6>info", "<5>notice", "<7>debug"} <= {line.split()[0] for line in lines}
    assert not (state / "agent.log").exists(), "the journal keeps it"


def test_nobody_reading_the_log_is_no_reason_to_stop(home, hostile):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        child = subprocess.Popen(agent_command("run", *to(hostile.port), "--keepalive-interval", "1"),
                                 stderr=writer, stdin=subprocess.DEVNULL,
                                 env=environment(home, BETA9_TOKEN=TOKEN))
    finally:
        os.close(writer)
    try:
        hostile.wait_count(3, "keepalive", "ok")
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=PATIENCE_S) == 0
    finally:
        child.kill()
        child.wait()


# -- secrets -------------------------------------------------------------------

def every_command_line():
    """What `ps` shows to every user; it reads the same files."""
    if not os.path.isdir("/proc/self"):
        return subprocess.run(["ps", "-A", "-o", "args"], stdout=subprocess.PIPE, check=True).stdout.decode()
    found = [b9agent.read_text("/proc/%s/cmdline" % name) for name in os.listdir("/proc") if name.isdecimal()]
    return "\n".join(text.replace("\0", " ") for text in found if text)


def others_may_read(folder):
    return [path for path, mode in tree(folder).items()
            if stat.S_ISREG(mode) and mode & 0o077]


@pytest.mark.parametrize("way", ["environment", "file", "token_file"])
def test_the_token_is_found_by_nobody(way, agent, hostile, home, state, tmp_path):
    """In `ps`, the log at --debug, the status, any file that is not 0600.

    Secrets of this test alone: `ps` shows what other tests do at the same time as well.
    """
    token, k3s = (word + os.urandom(16).hex() for word in ("machine-token-", "k3s-token-"))
    hostile.token = token
    state.mkdir(mode=0o700)
    extra, flags = {}, []
    if way == "environment":
        extra = {"BETA9_TOKEN": token, "BETA9_K3S_TOKEN": k3s}
    elif way == "file":
        (state / "config.yaml").write_text("machine:\n  token: %s\nk3s:\n  token: %s\n" % (token, k3s))
        (state / "config.yaml").chmod(0o600)
    else:
        (home / "token").write_text(token)
        (home / "token").chmod(0o600)
        flags = ["--token-file", str(home / "token")]
    hostile.fault = "ok_with_secrets"
    program = agent("run", *to(hostile.port), "--debug", "--keepalive-interval", "1", *flags, **extra)
    hostile.wait_count(2, "keepalive")
    assert hostile.requests[0].authorized
    hostile.fault = "unauthorized"
    hostile.wait_count(1, "keepalive", "unauthorized")
    listing = every_command_line()
    assert agent_command()[1] in listing
    status = run_agent(home, "status", "--json")
    assert status.code == 0, status
    control = (state / "control.token").read_text().strip()
    said = program.text() + status.out + status.err + run_agent(home, "config").out + listing
    program.stop()
    said += program.text()
    for secret in [token, k3s, control] + secret_words():
        assert secret not in said, "in the output"
        for path in files_with(home, secret):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            assert os.path.basename(path) in ("config.yaml", "token", "control.token"), path
    assert others_may_read(home) == []


def patched(home, patch, *arguments, **extra):
    """The agent as a process, after a patch of its module: how a defect of ours is had on order."""
    script = "import sys; sys.path.insert(0, %r); import b9agent\n%s\nsys.exit(b9agent.main(%r))" % (
        ROOT, patch, list(map(str, arguments)))
    return Program([sys.executable, "-c", script], environment(home, **extra))


@pytest.mark.parametrize("where", ["Agent.run", "Agent.register_payload", "Agent.keepalive_payload",
                                   "GatewayClient._send", "StateLock.__init__", "Agent.status"])
def test_a_defect_of_ours_shows_no_secret_and_no_traceback(where, home, hostile):
    patch = ("def broken(self, *rest, **more):\n    raise RuntimeError('broken with %s\\nand %s')\n"
             "b9agent.%s = broken" % (TOKEN, K3S, where))
    once = where != "Agent.status"
    arguments = (["run"] if where == "Agent.run" else ["--once"] if once else ["run"])
    with patched(home, patch, *arguments, *to(hostile.port), BETA9_TOKEN=TOKEN,
                 BETA9_K3S_TOKEN=K3S) as program:
        if once:
            assert program.wait() == 70, program.text()
            assert "b9agent: defect: RuntimeError" in program.lines()[-1]
            assert re.search(r"\(at .*\bbroken:\d+", program.lines()[-1]), "it does not say where"
        else:
            program.wait_line(r"notice ready\b")
            status = run_agent(home, "status")
            assert status.code == 5 and TOKEN not in status.err
            assert program.stop() == 0
        for secret in (TOKEN, K3S):
            assert secret not in program.text()
        assert "Traceback" not in program.text()


def test_a_defect_in_service_costs_an_interval_and_not_the_machine(home, hostile):
    patch = ("real, count = b9agent.Agent.keepalive_payload, []\n"
             "def broken(self):\n    count.append(1)\n    if len(count) == 2:\n"
             "        raise RuntimeError('broken with %s')\n    return real(self)\n"
             "b9agent.Agent.keepalive_payload = broken" % TOKEN)
    with patched(home, patch, "run", *to(hostile.port), "--keepalive-interval", "1",
                 BETA9_TOKEN=TOKEN) as program:
        program.wait_line(r"error defect .*RuntimeError")
        hostile.wait_count(3, "keepalive", "ok")
        assert program.stop() == 0
        assert TOKEN not in program.text() and "Traceback" not in program.text()


def test_a_part_that_cannot_be_looked_after_does_not_end_the_agent(home, hostile):
    patch = ("def broken(self):\n    raise RuntimeError(\"can't start new thread\")\n"
             "b9agent.Agent._look_after_parts = broken")
    with patched(home, patch, "run", *to(hostile.port), "--keepalive-interval", "1",
                 BETA9_TOKEN=TOKEN) as program:
        program.wait_line(r"error defect .*can't start new thread")
        hostile.wait_count(3, "keepalive", "ok")
        assert program.stop() == 0


def test_who_asks_for_the_lock_a_moment_keeps_no_agent_from_starting(tmp_path):
    b9agent.StateLock(str(tmp_path)).release()
    with open(tmp_path / "agent.lock") as asked:
        fcntl.flock(asked, fcntl.LOCK_SH)
        letting_go = threading.Timer(0.05, fcntl.flock, (asked, fcntl.LOCK_UN))
        letting_go.start()
        b9agent.StateLock(str(tmp_path)).release()
        letting_go.join()


def test_programs_that_it_starts_do_not_get_its_secrets(run, hostile, tmp_path, home):
    tools = tmp_path / "tools"
    tools.mkdir()
    seen = tmp_path / "environment"
    (tools / "nvidia-smi").write_text("#!/bin/sh\nenv > '%s.new'\nmv '%s.new' '%s'\nexit 1\n"
                                      % (seen, seen, seen))
    (tools / "nvidia-smi").chmod(0o755)
    program = run(PATH="%s:%s" % (tools, os.environ["PATH"]), BETA9_K3S_TOKEN=K3S,
                  INFERENCE_TOKEN="inference-token-of-a-client", NOTIFY_SOCKET="@b9agent-tests-nobody", WATCHDOG_USEC="60000000")
    hostile.wait_count(1, "keepalive", "ok")
    wait_until(seen.exists, "nvidia-smi to be asked")
    text = seen.read_text()
    assert "PATH=" in text
    for word in (TOKEN, K3S, "INFERENCE_TOKEN", "NOTIFY_SOCKET", "WATCHDOG"):
        assert word not in text
    assert program.stop() == 0


# -- status ----------------------------------------------------------------------

def test_status_of_a_running_agent(run, hostile, home, state):
    program = run("--machine-id", "0badcafe")
    hostile.wait_count(2, "keepalive", "ok")
    program.wait_line(r"notice ready\b")
    done = run_agent(home, "status", "--wait", "30", "--json")
    assert (done.code, done.err) == (0, ""), done
    status = json.loads(done.out)
    assert (status["status"], status["machine_id"], status["pool"], status["pid"], status["gateway"],
            status["version"]) == ("ready", "0badcafe", "gpu", program.pid, hostile.url,
                                   b9agent.VERSION)
    assert status["keepalives"] >= 1 and status["registrations"] == 1
    assert 0 <= status["cpu_percent"] <= 100 and 0 < status["memory_percent"] <= 100
    text = run_agent(home, "status")
    assert text.code == 0 and re.search(r"^state +ready for ", text.out, re.M)
    assert "0badcafe" in text.out and hostile.url in text.out
    hostile.fault = "bad_gateway"
    program.wait_line(r"unreachable\b")
    status = json.loads(run_agent(home, "status", "--json").out)
    assert status["state"] == "unreachable" and "502" in status["message"]
    program.stop()
    assert not (state / "control.addr").exists()


def test_status_without_an_agent_is_exit_5(home, state, run, hostile):
    done = run_agent(home, "status")
    assert done.code == 5 and "no agent is running on %s" % state in done.err
    assert tree(home) == {}
    program = run()
    program.wait_line(r"notice ready\b")
    program.signal(signal.SIGKILL)  # leaves control.addr behind
    program.wait()
    done = run_agent(home, "status")
    assert done.code == 5 and done.err.count("\n") == 1


def test_status_waits_for_ready(run, hostile, home):
    hostile.fault = "bad_gateway"
    program = run()
    hostile.wait_count(2, answered="bad_gateway")
    done = run_agent(home, "status", "--wait", "0.5")
    assert done.code == 5, done
    threading.Timer(0.3, lambda: setattr(hostile, "fault", None)).start()
    done = run_agent(home, "status", "--wait", str(PATIENCE_S / 2), "--json")
    assert done.code == 0 and json.loads(done.out)["state"] == "ready", done
    program.stop()


def test_status_is_not_fooled_by_another_program_on_the_port(home, state, hostile):
    state.mkdir(mode=0o700)
    (state / "control.addr").write_text("127.0.0.1:%d\n" % hostile.port)
    (state / "control.token").write_text("ab" * 32 + "\n")
    (state / "control.token").chmod(0o600)
    done = run_agent(home, "status")
    assert done.code == 5 and "no agent is running" in done.err
    assert not hostile.requests  # and so the control token has gone nowhere


def test_status_goes_to_loopback_whatever_proxy_is_set(run, hostile, home):
    program = run()
    program.wait_line(r"notice ready\b")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = "http://127.0.0.1:%d" % listener.getsockname()[1]
        done = run_agent(home, "status", http_proxy=proxy, HTTP_PROXY=proxy, ALL_PROXY=proxy)
        assert done.code == 0, done
    program.stop()


# -- systemd -----------------------------------------------------------------------

class NotifySocket:
    """What systemd would hear."""

    def __init__(self, address):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(PATIENCE_S)
        self.address, self.messages = address, []

    def next(self):
        self.messages.append((time.monotonic(), self._socket.recv(4096).decode()))
        return self.messages[-1][1]

    def until(self, text):
        while text not in self.next():
            pass
        return self.messages[-1][1]

    def quiet_for(self, seconds):
        self._socket.settimeout(seconds)
        try:
            self.next()
        except socket.timeout:
            return True
        finally:
            self._socket.settimeout(PATIENCE_S)
        return False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def notify(request):
    if request.param == "abstract" and not sys.platform.startswith("linux"):
        pytest.skip("abstract sockets are Linux's own")
    with tempfile.TemporaryDirectory() as folder:
        address = ("@b9agent-tests-%s" % os.urandom(8).hex() if request.param == "abstract"
                   else os.path.join(folder, "s"))
        with NotifySocket(address) as opened:
            yield opened


def test_systemd_hears_ready_status_and_stopping(run, hostile, notify):
    program = run(NOTIFY_SOCKET=notify.address)
    assert "READY=1" in notify.next().split("\n")
    said = notify.until("STATUS=ready")
    assert hostile.url in said and TOKEN not in said
    hostile.fault = "bad_gateway"
    notify.until("STATUS=unreachable")
    hostile.fault = None
    notify.until("STATUS=ready")
    program.signal(signal.SIGTERM)
    assert "STOPPING=1" in notify.until("STOPPING=1").split("\n")
    assert program.wait() == 0
    assert not [text for _, text in notify.messages if "WATCHDOG" in text]


def test_systemd_hears_ready_before_the_gateway_is_reached(agent, notify):
    port = quiet_port()
    program = agent("run", *to(port), BETA9_TOKEN=TOKEN, NOTIFY_SOCKET=notify.address)
    assert "READY=1" in notify.next()
    notify.until("STATUS=unreachable")
    assert program.stop() == 0


def test_systemd_does_not_hear_ready_from_an_agent_without_settings(home, notify):
    done = run_agent(home, "run", NOTIFY_SOCKET=notify.address)
    assert done.code == 2 and notify.quiet_for(0.05)


def test_the_watchdog_is_fed_in_time_while_the_agent_lives(run, hostile, notify):
    allowed_s = 1.5
    with StallMeter() as stall:
        run(NOTIFY_SOCKET=notify.address, WATCHDOG_USEC=str(int(allowed_s * 1e6)))
        times = []
        while len(times) < 8:
            if "WATCHDOG=1" in notify.next():
                times.append(notify.messages[-1][0])
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    assert max(gaps) < allowed_s / 2 + stall.worst_s


def test_the_watchdog_of_another_process_is_not_fed(run, hostile, notify):
    run(NOTIFY_SOCKET=notify.address, WATCHDOG_USEC="300000", WATCHDOG_PID="1")
    notify.until("STATUS=ready")
    hostile.wait_count(3, "keepalive", "ok")
    assert notify.quiet_for(0.05)


def test_the_watchdog_starves_when_the_membership_thread_hangs(home, hostile, notify):
    patch = ("import threading\ndef hung(self, wake, stopping, tick):\n    tick(0.5)\n"
             "    threading.Event().wait()\nb9agent.Membership.run = hung")
    with patched(home, patch, "run", *to(hostile.port), BETA9_TOKEN=TOKEN,
                 NOTIFY_SOCKET=notify.address, WATCHDOG_USEC="300000") as program:
        notify.until("WATCHDOG=1")
        wait_until(lambda: notify.quiet_for(0.6), "silence")  # twice what systemd would allow
        assert program.process.poll() is None


# -- demo -----------------------------------------------------------------------------

def demo_folders(home):
    scratch = home / "tmp"
    scratch.mkdir()
    return {"TMPDIR": str(scratch), "HOME": str(home)}


def test_demo_once_shows_the_three_states_and_leaves_nothing(home):
    folders = demo_folders(home)
    before = tree(home)
    done = run_agent(home, "demo", "--once", cwd=home, **folders)
    assert (done.code, done.err) == (0, ""), done
    states = re.findall(r"^ *[\d.]+ s  (\w+)", done.out, re.M)
    assert states == ["pending", "registered", "ready", "ready"]
    figures = re.findall(r"keepalive (\d+), cpu ([\d.]+) %, memory ([\d.]+) %, free GPUs (\d+)", done.out)
    assert [row[0] for row in figures] == ["1", "2"]
    assert tree(home) == before


def test_the_demo_leaves_the_settings_of_its_user_alone(home, state, hostile):
    """It must not reach their gateway, whatever their settings say."""
    folders = demo_folders(home)
    state.mkdir(mode=0o700)
    (state / "config.yaml").write_text(
        "gateway: {host: 127.0.0.1, port: %d}\nmachine: {token: %s}\ncontrol: {port: 1}\n"
        % (hostile.port, TOKEN))
    (state / "config.yaml").chmod(0o600)
    before = tree(home)
    done = run_agent(home, "demo", "--once", **dict(folders, BETA9_GATEWAY_PORT=hostile.port))
    assert done.code == 0 and hostile.requests == [], done
    assert tree(home) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_ends_cleanly_on_ctrl_c(number, agent, home):
    folders = demo_folders(home)
    before = tree(home)
    program = agent("demo", **folders)
    program.wait_line(r"ready +keepalive 3", "out")
    program.signal(number)
    assert program.wait() == 0, program.text()
    assert program.lines("err") == [] and tree(home) == before


def test_two_demos_at_once_do_not_meet(agent, home):
    folders = demo_folders(home)
    programs = [agent("demo", "--once", **folders) for _ in range(3)]
    assert [program.wait() for program in programs] == [0, 0, 0]


def test_a_demo_into_a_closed_pipe_ends(home):
    folders = demo_folders(home)
    before = tree(home)
    command = " ".join("'%s'" % word for word in agent_command("demo")) + " | head -n 2"
    with Program(["sh", "-c", command], environment(home, **folders)) as program:
        program.wait_line("", "out", after=1)
        program.wait()
        assert len(program.lines("out")) == 2
        assert "Traceback" not in program.text() and tree(home) == before


# -- what it costs to start -----------------------------------------------------------

# Each of these takes milliseconds that the way to the first keepalive does not need.
HEAVY = {"asyncio", "urllib.request", "http.server", "http.client", "http.cookies", "sqlite3", "ssl",
         "ctypes", "concurrent.futures", "logging", "argparse", "subprocess", "uuid", "secrets", "shutil",
         "email", "platform", "tempfile", "inspect", "dataclasses", "multiprocessing", "difflib",
         "getpass", "hmac", "socketserver", "optparse", "configparser", "pathlib", "textwrap", "pdb",
         "urllib.parse", "base64", "calendar", "datetime", "decimal", "fractions", "locale", "random",
         "hashlib", "statistics", "tokenize", "traceback", "linecache", "string", "gettext"}


def test_once_imports_nothing_that_the_path_does_not_need(home, hostile):
    """-S: what the machine's own site packages import at every start is not ours."""
    environ = environment(home, BETA9_TOKEN=TOKEN, PATH=str(home))  # no nvidia-smi to start
    done = subprocess.run([sys.executable, "-S", "-E", "-X", "importtime", AGENT, "--once",
                           *to(hostile.port)], env=environ, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr.decode(), re.M))
    assert {"json", "socket", "re"} <= imported, "the list of imports was not read"
    assert imported & HEAVY == set()


def test_the_list_of_heavy_modules_is_of_modules():
    with open(AGENT, encoding="utf-8") as handle:
        lazily = {name.name for node in ast.walk(ast.parse(handle.read()))
                  if isinstance(node, ast.Import) for name in node.names}
    assert {"ssl", "sqlite3", "subprocess"} <= lazily
