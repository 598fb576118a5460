"""Section 16b: the dashboard on real terminals: tmux, and pseudo-terminals of ours."""
import fcntl
import itertools
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

import b9agent
import engines
from helpers import (PATIENCE_S, StallMeter, agent_command, environment, quiet_port, run_agent,
                     wait_until)

TMUX, BASH = shutil.which("tmux"), shutil.which("bash")
pytestmark = pytest.mark.timeout(240)
HINTS = "q quit"  # of the last line, in every pane
TOP_LEFT, LEFT, BOTTOM = "╔", "╔║╠╟╚", "╚"


def need_tmux():
    if TMUX and BASH and os.path.isdir("/proc/self"):
        return
    if os.environ.get("B9TESTS_HEAVY"):
        pytest.fail("tmux should be here: `tests/run --all` installs it")
    pytest.skip("needs tmux, bash and /proc")


def agent_flags(port, *more):
    return ("--gateway-host", "127.0.0.1", "--gateway-port", str(port), "--pool-name", "gpu",
            "--control-port", "0", "--keepalive-interval", "1") + more


def keepalives(gateway):
    return sum(request.name == "keepalive" for request in list(gateway.requests))


def alive(pid):
    row = b9agent.parse_proc_stat(b9agent.read_text("/proc/%d/stat" % pid, 4096) or "")
    return row is not None and not row.zombie


def family(pid):
    rows = [b9agent.parse_proc_stat(b9agent.read_text("/proc/%s/stat" % name, 4096) or "")
            for name in os.listdir("/proc") if name.isdigit()]
    found = {pid}
    while True:
        more = {row.pid for row in rows if row and row.parent in found} - found
        if not more:
            return sorted(found)
        found |= more


def agent_pid(state):
    text = (state / "agent.lock").read_text().strip() if (state / "agent.lock").exists() else ""
    return int(text) if text.isdigit() and alive(int(text)) else None


class Tmux:
    """A shell in a tmux of its own.  screen(): its lines; mode(): (alternate screen, cursor)."""

    def __init__(self, folder, home, columns=80, rows=24, command=None, **extra):
        self._socket = str(folder / "tmux")
        self._environment = environment(home, TERM="xterm-256color", **extra)
        self._environment["PS1"] = "shell$ "
        self.folder, self._stamps = folder, 0
        self("new-session", "-d", "-x", columns, "-y", rows, *(command or (BASH, "--norc",
                                                                         "--noprofile")))
        self.server = int(self("display", "-p", "#{pid}"))
        self.pane = int(self("display", "-p", "#{pane_pid}"))
        if command is None:
            self.shows("shell[$]")

    def __call__(self, *arguments):
        done = subprocess.run([TMUX, "-S", self._socket, "-f", "/dev/null", *map(str, arguments)],
                              env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=PATIENCE_S)
        assert done.returncode == 0, (arguments, done)
        return done.stdout.decode().rstrip("\n")

    def screen(self):
        return self("capture-pane", "-p", "-N").split("\n")

    def shows(self, pattern):
        """The screen, once it has the pattern."""
        last = []

        def look():
            last[:] = self.screen()
            return re.search(pattern, "\n".join(last)) and last
        try:
            return wait_until(look, pattern)
        except AssertionError as error:
            raise AssertionError("%s in:\n%s" % (error, "\n".join(last)))

    def keys(self, *names):
        self("send-keys", *names)

    def text(self, text):
        self("send-keys", "-l", text)

    def run(self, *words):
        self.text(" ".join(map(shlex.quote, map(str, words))))
        self.keys("Enter")

    def mode(self):
        return self("display", "-p", "#{alternate_on} #{cursor_flag} #{wrap_flag}")

    def stty(self):
        """Of the shell's own programs: what it sets for its line editing is not seen."""
        self._stamps += 1
        path = self.folder / ("stty.%d" % self._stamps)
        self.text("stty -a > %s; echo >> %s" % (shlex.quote(str(path)), shlex.quote(str(path))))
        self.keys("Enter")
        wait_until(lambda: path.exists() and path.read_text().endswith("\n\n"), "stty")
        return re.sub("rows [0-9]+; columns [0-9]+; ", "", path.read_text())

    def resize(self, columns, rows):
        self("resize-window", "-x", columns, "-y", rows)

    def end(self):
        try:
            os.kill(self.server, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.fixture
def tmux(tmp_path, home):
    """tmux(**environment) starts one; it ends with the test."""
    need_tmux()
    started = []

    def start(**extra):
        folder = tmp_path / ("tmux%d" % len(started))
        folder.mkdir(mode=0o700)
        started.append(Tmux(folder, home, **extra))
        return started[-1]
    yield start
    for one in started:
        one.end()


@pytest.fixture
def shown(tmux, hostile, state):
    """A dashboard in a tmux: (the tmux, the pid of its agent)."""
    one = tmux(BETA9_TOKEN=hostile.token)
    one.before = one.stty()
    one.run(*agent_command("run", *agent_flags(hostile.port)))
    one.shows("Status: READY")
    yield one, agent_pid(state)
    pid = agent_pid(state)
    if pid:
        os.kill(pid, signal.SIGKILL)


def is_framed(screen, columns, rows):
    """Every line of it is the frame's, none is left of another size."""
    return (len(screen) == rows and all(len(line.rstrip()) == columns for line in screen[:-1])
            and screen[0][0] == TOP_LEFT and all(line[0] in LEFT for line in screen[:-1])
            and screen[-2][0] == BOTTOM and HINTS in screen[-1])


def given_back(one):
    """The terminal is as it was before."""
    assert one.mode() == "0 1 1"
    assert one.stty() == one.before


# -- what is seen --------------------------------------------------------------

def test_it_fits_every_size_and_a_storm_of_resizes_ends_in_a_right_screen(shown):
    one, _ = shown
    for columns, rows in ((80, 24), (120, 40), (40, 12)):
        one.resize(columns, rows)
        wait_until(lambda: is_framed(one.screen(), columns, rows), "a frame of %dx%d" % (columns, rows))
        assert "READY" in "\n".join(one.screen()) and one.mode().startswith("1 0")
    for number in range(50):
        one.resize(30 + number * 37 % 120, 8 + number * 7 % 40)
    one.resize(97, 31)
    wait_until(lambda: is_framed(one.screen(), 97, 31), "a frame of 97x31")


def test_keys_open_its_panes_and_esc_leaves_them(shown):
    one, _ = shown
    one.keys("?")
    one.shows("HELP")
    one.keys("l")
    one.shows("LOGS (?s:.*)notice ready")
    one.text("/")
    one.shows("Filter: _")
    one.text("LISTENINGx")
    one.keys("BSpace", "Enter")
    screen = wait_until(lambda: not any("ready" in line for line in one.screen()[2:]) and one.screen(),
                        "the filtered log")
    assert sum(" info " in line for line in screen) == 2  # the control API and the front door
    assert all("api=%s" % name in "\n".join(screen) for name in ("control", "inference"))
    one.keys("Escape")
    one.shows("INFERENCE")
    one.keys("d")
    one.shows("ok    python")
    one.keys("End")
    wait_until(lambda: not any("ok    python" in line for line in one.screen()), "the report's end")
    one.keys("Home")
    one.shows("ok    python")
    one.keys("d")
    one.shows("INFERENCE")


def test_the_log_pane_scrolls_and_stays_where_it_is_while_lines_come(tmux, hostile, state, home):
    one = tmux(BETA9_TOKEN=hostile.token)
    one.run(*agent_command("run", *agent_flags(hostile.port, "--debug")))
    one.shows("Status: READY")
    one.keys("l")
    wait_until(lambda: not any(line[1:-1].isspace() for line in one.screen()[3:-2]), "a full pane")
    one.keys("Home")
    first = one.shows("listening")[3]
    one.keys("Down")
    wait_until(lambda: one.screen()[3] != first, "the next line on top")
    one.keys("Up", "Up")
    wait_until(lambda: one.screen()[3] == first, "the oldest line on top")
    place = one.screen()[3:-2]
    beats = keepalives(hostile)
    wait_until(lambda: keepalives(hostile) > beats + 1, "two keepalives")
    assert place[0] == first and one.screen()[3:-2] == place
    one.keys("End")
    wait_until(lambda: one.screen()[3:-2] != place, "the newest lines")
    one.keys("q")
    wait_until(lambda: not agent_pid(state), "the agent to end")


def test_ctrl_l_draws_everything_again(shown):
    one, _ = shown
    with open(one("display", "-p", "#{pane_tty}"), "w") as terminal:
        terminal.write("\x1b[5;5Hsomebody wrote over it")
    one.shows("somebody wrote")
    one.keys("C-l")
    wait_until(lambda: "somebody" not in "\n".join(one.screen()), "a whole frame")


def test_without_colour_or_utf8_it_shows_what_the_terminal_can(tmux, hostile, state):
    one = tmux(BETA9_TOKEN=hostile.token, LANG="C", NO_COLOR="1")
    one.run(*agent_command("run", *agent_flags(hostile.port)))
    one.shows("Status: READY")
    assert "".join(one.screen()).isascii() and one.screen()[0].startswith("+==")
    assert "\x1b[" not in one("capture-pane", "-p", "-e")
    one.keys("q")
    wait_until(lambda: not agent_pid(state), "the agent to end")


@pytest.mark.parametrize("how", ["--no-tui", "TERM=dumb", "TERM=", "&", "</dev/null"])
def test_plain_log_lines_stay_where_a_dashboard_is_not_wanted_or_cannot_be(how, tmux, hostile, state):
    one = tmux(BETA9_TOKEN=hostile.token)
    command = " ".join(map(shlex.quote, agent_command("run", *agent_flags(hostile.port))))
    one.text(how + " " + command if how.startswith("TERM") else command + " " + how)
    one.keys("Enter")
    one.shows("notice ready")
    assert one.mode() == "0 1 1"
    os.kill(agent_pid(state), signal.SIGTERM)
    one.shows("info stopped")


# -- the terminal is given back ---------------------------------------------------

@pytest.mark.parametrize("how", ["C-c", "q", "TERM", "HUP"])
def test_it_ends_in_order_and_gives_the_terminal_back(how, shown, hostile, state):
    one, pid = shown
    one.keys(how) if how in ("C-c", "q") else os.kill(pid, getattr(signal, "SIG" + how))
    screen = one.shows("info stopped keepalives=")
    wait_until(lambda: not alive(pid), "the agent's end")
    assert "Traceback" not in "\n".join(screen) and "Status:" not in "\n".join(screen)
    one.run("echo", "left")
    one.text("echo code=$?")
    one.keys("Enter")
    one.shows("code=0")
    given_back(one)
    assert not (state / "control.addr").exists()


def test_quit_by_ctrl_backslash_gives_the_terminal_back(shown):
    one, pid = shown
    one.keys("C-\\")
    wait_until(lambda: not alive(pid), "its end")
    one.shows("Quit")
    given_back(one)


def test_ctrl_z_and_fg_twice_and_bg_once(shown, hostile):
    one, pid = shown
    for _ in range(2):
        one.keys("C-z")
        one.shows("Stopped")
        given_back(one)
        one.keys("C-l")
        one.run("fg")
        one.shows("Status: READY")
        assert one.mode().startswith("1 0") and is_framed(one.screen(), 80, 24)
    one.keys("C-z")
    one.shows("Stopped")
    one.keys("C-l")
    one.run("bg")
    one.run("echo", "here", "I", "am")
    one.shows("\nhere I am")
    given_back(one)
    beats = keepalives(hostile)
    wait_until(lambda: keepalives(hostile) > beats + 1, "it lives in the background")
    assert one.mode().startswith("0 1")
    one.run("fg")
    one.shows("Status: READY")
    one.keys("q")
    wait_until(lambda: not alive(pid), "its end")
    given_back(one)


def test_continued_after_a_sigstop_it_draws_everything_again(shown):
    one, pid = shown
    os.kill(pid, signal.SIGSTOP)
    one.shows("shell[$]")  # the shell takes the terminal; nobody could give it back
    one.run("fg")
    wait_until(lambda: is_framed(one.screen(), 80, 24), "a whole frame")
    one.keys("q")
    wait_until(lambda: not alive(pid), "its end")
    one.shows("info stopped")
    given_back(one)


def test_ctrl_z_where_no_shell_could_wake_it_is_a_redraw(tmux, hostile, state):
    """As the pane's own program it is a session's leader: the kernel stops no orphaned group."""
    one = tmux(BETA9_TOKEN=hostile.token,
               command=["exec " + " ".join(map(shlex.quote, agent_command(
                   "run", *agent_flags(hostile.port))))])
    one.shows("Status: READY")
    assert one.pane == agent_pid(state)
    one.keys("C-z", "?")
    one.shows("HELP")
    wait_until(lambda: is_framed(one.screen(), 80, 24), "a whole frame")
    one.keys("q")
    wait_until(lambda: not alive(one.pane), "its end")


BROKEN = """
import os, sys
sys.path.insert(0, %r)
import b9agent
def broken(view, columns, rows, look, whole=b9agent.render_frame):
    if view.pane == "help":
        raise ZeroDivisionError("a mistake of ours")
    return whole(view, columns, rows, look)
b9agent.render_frame = broken
def fail(*_):
    raise ZeroDivisionError("a mistake in the main thread")
b9agent.signal.signal(b9agent.signal.SIGUSR1, fail)
def in_a_thread(*_):
    b9agent.threading.Thread(target=fail, name="failing").start()
b9agent.signal.signal(b9agent.signal.SIGUSR2, in_a_thread)
sys.exit(b9agent.main(sys.argv[1:]))
""" % b9agent.__file__.rpartition("/")[0]


@pytest.fixture
def broken(tmux, hostile, state):
    """As `shown`, with faults that `?` (in the screen), SIGUSR1 and SIGUSR2 set off."""
    one = tmux(BETA9_TOKEN=hostile.token)
    one.before = one.stty()
    path = one.folder / "broken.py"
    path.write_text(BROKEN)
    one.run(sys.executable, path, "run", *agent_flags(hostile.port))
    one.shows("Status: READY")
    yield one, agent_pid(state)
    pid = agent_pid(state)
    if pid:
        os.kill(pid, signal.SIGKILL)


def test_a_defect_of_the_screen_costs_the_dashboard_and_not_the_machine(broken, hostile):
    one, pid = broken
    one.keys("?")
    one.shows("error defect what=.ZeroDivisionError")
    assert one.mode() == "0 1 1" and alive(pid)
    hostile.fault = "unavailable"
    one.shows("warning unreachable")  # plain lines from now on
    one.keys("C-z")
    one.shows("Stopped")
    one.run("fg")
    one.keys("C-c")
    one.shows("info stopped")
    given_back(one)


def test_a_defect_of_the_main_thread_gives_the_terminal_back(broken):
    one, pid = broken
    os.kill(pid, signal.SIGUSR1)
    screen = one.shows("Please report this line")
    assert "b9agent: defect: ZeroDivisionError" in "\n".join(screen)
    wait_until(lambda: not alive(pid), "its end")
    given_back(one)


def test_a_defect_of_another_thread_is_a_note_and_a_line_in_the_log(broken, state):
    one, pid = broken
    os.kill(pid, signal.SIGUSR2)
    one.shows("defect: ZeroDivisionError")
    assert is_framed(one.screen()[:-1] + [HINTS], 80, 24)
    assert "Traceback" not in "\n".join(one.screen())
    assert "error defect" in (state / "agent.log").read_text()
    one.keys("q")
    one.shows("error defect (?s:.*)info stopped")


@pytest.mark.parametrize("how", ["pane", "server"])
def test_a_terminal_that_is_closed_ends_the_agent_and_its_children(how, tmux, hostile, state, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text("#!/bin/sh\nsleep 1000 &\nsleep 1000\n")
    (folder / "ssh").chmod(0o755)
    one = tmux(BETA9_TOKEN=hostile.token, PATH="%s:%s" % (folder, os.environ["PATH"]))
    one.run(*agent_command("run", *agent_flags(hostile.port, "--tunnel", "me@127.0.0.1:1")))
    one.shows("Beta9 Agent")
    pid = wait_until(lambda: agent_pid(state), "the agent")
    wait_until(lambda: len(family(pid)) >= 4, "its children")
    whole = family(pid)
    if how == "pane":
        one("kill-pane")
    else:
        os.kill(one.server, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, whole)), "all of it gone")
    assert "info stopped" in (state / "agent.log").read_text()


def test_what_ends_it_at_the_start_is_said_on_the_normal_screen(tmux, hostile):
    one = tmux(BETA9_TOKEN="not-the-token-of-it")
    one.before = one.stty()
    one.run(*agent_command("run", *agent_flags(hostile.port)))
    one.shows("b9agent: error: ")
    one.text("echo code=$?")
    one.keys("Enter")
    one.shows("code=3")
    given_back(one)


def test_warnings_that_were_held_back_are_printed_once_the_screen_is_back(shown, hostile, state):
    one, pid = shown
    hostile.fault = "control_characters"
    one.shows("UNREACHABLE")
    one.keys("q")
    screen = "\n".join(one.shows("info stopped"))
    assert "warning unreachable" in screen and "info registered" not in screen
    wait_until(lambda: not alive(pid), "its end")


# -- what keys ask for ------------------------------------------------------------

@pytest.mark.parametrize("where", ["run", "top"])
def test_models_are_pulled_and_the_engine_started_and_stopped_by_keys(where, tmux, hostile, agent,
                                                                      state, tmp_path):
    path = engines.path_with(engines.stand_in(tmp_path / "bin", "ollama"))
    given = dict(BETA9_TOKEN=hostile.token, PATH=path, FAKE_OLLAMA_RATE="100000",
                 B9AGENT_INFERENCE_PORT=quiet_port())
    one = tmux(**given)
    one.resize(140, 30)
    flags = agent_flags(hostile.port)
    if where == "top":
        watched = agent("run", *flags, **given)
        watched.wait_line("notice ready")
    one.run(*agent_command(*(("top",) if where == "top" else ("run",) + flags)))
    one.shows("Status: READY")
    whole = agent_pid(state)
    one.keys("p")
    one.shows("Pull model: _")
    one.text("no such model!")
    one.shows("Pull model: no such model!_")
    one.keys("C-u")
    one.shows("Pull model: _")
    one.text("no such model!")
    one.keys("Enter")
    one.shows("`no such model!` is no name of a model")
    one.keys("p", "x", "Escape")
    wait_until(lambda: HINTS in one.screen()[-1] and "Pull" not in one.screen()[-1], "the keys again")
    one.keys("p")
    one.text("llama3.2")
    one.keys("Enter")
    one.shows("llama3.2: pulling .* [0-9]+ %")
    one.keys("p")  # again, while it goes on
    one.shows("End the pull of llama3.2[?] y/n")
    one.keys("y")
    one.shows("pull of llama3.2:latest: cancelled")
    one.keys("p")
    one.text("llama3.2:1b")
    one.keys("Enter")
    one.shows("llama3.2:1b is here")
    one.keys("s")
    one.shows("Stop inference[?] y/n")
    one.keys("n")
    last = wait_until(lambda: HINTS in one.screen()[-1] and one.screen()[-1], "the keys again")
    assert "stop …" not in last and "stopped" not in last
    one.keys("s")
    one.shows("Stop inference[?] y/n")
    one.keys("y")
    one.shows("(?i)status: stopped")
    one.keys("s")
    one.shows("inference started: .*llama3.2:1b")
    children = family(whole)
    assert len(children) > 1
    one.keys("q")
    one.shows("shell[$]")
    if where == "top":
        assert alive(whole)
        assert watched.stop() == 0
    wait_until(lambda: not any(map(alive, children)), "agent and engine gone")


def test_what_is_pasted_is_no_key(shown):
    one, pid = shown
    one("set-buffer", "q\nstuff y\x1b[A")
    one("paste-buffer", "-p")
    one.keys("p")
    one.shows("Pull model: _")
    one("set-buffer", "gemma3:1b\nq\n")
    one("paste-buffer", "-p")
    one.shows("Pull model: gemma3:1b_")
    one.keys("Escape")
    wait_until(lambda: "Pull" not in one.screen()[-1], "the prompt is left")
    assert alive(pid)


# -- top -------------------------------------------------------------------------

def test_top_shows_an_agent_that_ends_and_comes_back(tmux, hostile, agent, state):
    flags = agent_flags(hostile.port)
    first = agent("run", *flags, BETA9_TOKEN=hostile.token)
    first.wait_line("notice ready")
    one = tmux()
    one.before = one.stty()
    one.run(*agent_command("top"))
    one.shows("Status: READY (?s:.*)notice ready")
    assert first.stop() == 0
    one.shows("no agent is running")
    second = agent("run", *flags, BETA9_TOKEN=hostile.token)
    second.wait_line("notice ready")
    one.shows("Status: READY")
    wait_until(lambda: "no agent" not in "\n".join(one.screen()), "the new one's figures")
    one.keys("l")
    assert "pid=%d" % first.pid not in "\n".join(one.shows("pid=%d" % second.pid))
    one.keys("q")
    one.shows("shell[$]")
    given_back(one)
    assert second.process.poll() is None, "only the view has ended"


def test_an_agent_that_hangs_keeps_no_key_and_no_resize_waiting(tmux, hostile, agent):
    hung = agent("run", *agent_flags(hostile.port), BETA9_TOKEN=hostile.token)
    hung.wait_line("notice ready")
    one = tmux()
    one.run(*agent_command("top"))
    one.shows("Status: READY")
    hung.signal(signal.SIGSTOP)
    one.shows("no answer within 5 s")  # and the next one is asked for now
    begun_s = time.monotonic()
    with StallMeter() as stall:
        for columns, rows in ((100, 30), (90, 28), (80, 24)):
            one.resize(columns, rows)
            wait_until(lambda: is_framed(one.screen(), columns, rows), "a frame")
            one.keys("?")
        one.shows("HELP")
    assert time.monotonic() - begun_s < 3.0 + 4 * stall.worst_s
    hung.signal(signal.SIGCONT)
    wait_until(lambda: "no answer" not in "\n".join(one.screen()), "its figures again")


def test_top_of_an_agent_elsewhere_wants_its_token(tmux, hostile, agent, state, tmp_path):
    agent("run", *agent_flags(hostile.port), BETA9_TOKEN=hostile.token).wait_line("notice ready")
    address, token = (state / "control.addr").read_text().strip(), state / "control.token"
    away = tmp_path / "away"
    away.mkdir()
    asked = run_agent(away, "top", "--host", address, "--once")
    assert asked.code == 2 and "control.token" in asked.err and "--control-token-file" in asked.err
    lost = run_agent(away, "top", "--host", address, "--control-token-file", tmp_path / "lost")
    assert lost.code == 2 and "cannot read" in lost.err
    wide = tmp_path / "wide"
    wide.write_text(token.read_text())
    wide.chmod(0o644)
    shared = run_agent(away, "top", "--host", address, "--control-token-file", wide)
    assert shared.code == 2 and "chmod 600" in shared.err and token.read_text().strip() not in shared.err
    wrong = run_agent(away, "top", "--host", address, "--once", B9AGENT_CONTROL_TOKEN="0" * 64)
    assert wrong.code == 4 and "refused the control token" in wrong.err and "Bearer" not in wrong.err
    nobody = run_agent(away, "top", "--host", "no.such.invalid", "--once", B9AGENT_CONTROL_TOKEN="0" * 64)
    assert nobody.code == 5 and "cannot look up no.such.invalid: " in nobody.err and "Errno" not in nobody.err
    once = run_agent(away, "top", "--host", "localhost:" + address.rpartition(":")[2], "--once",
                     B9AGENT_CONTROL_TOKEN=token.read_text().strip())
    assert once.code == 0 and "Status: READY" in once.out and "\x1b" not in once.out, once
    one = tmux(HOME=away)
    one.run(*agent_command("top", "--host", address, "--control-token-file", token))
    one.shows("Status: READY (?s:.*)notice ready")
    one.keys("d")
    one.shows("b9agent.py doctor, there")
    one.keys("C-c")
    one.shows("shell[$]")


def test_top_without_an_agent_or_a_terminal_says_so(home, state):
    none = run_agent(home, "top", "--once")
    assert none.code == 5 and "no agent is running" in none.err


class Liar:
    """What calls itself an agent.  answers: by the first word of a path, a JSON value, the bytes of a
    whole answer, or a function to the pieces of a body.  heads: of the requests."""

    def __init__(self, **answers):
        self.answers, self.heads = answers, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = "127.0.0.1:%d" % self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return  # shut down
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection:
            try:
                self.heads.append(connection.recv(65536).decode())
                said = self.answers.get(re.split("[ /?]+", self.heads[-1])[1], {})
                if not isinstance(said, bytes):
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for piece in (said() if callable(said) else
                              [said if isinstance(said, bytes) else json.dumps(said).encode()]):
                    connection.sendall(piece)
            except OSError:
                pass  # it had enough

    def end(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def liar():
    started = []

    def start(**answers):
        started.append(Liar(**answers))
        return started[-1]
    yield start
    for one in started:
        one.end()


TOKEN = "5" * 64
CLAIMED = {"version": "0", "pid": 1, "state": "ready", "status": "ready"}


def there(liar):
    host, _, port = liar.host.partition(":")
    return b9agent.AgentThere((b9agent.Endpoint("http", host, int(port)), {}))


def drip():
    while True:
        yield b" "
        select.select([], [], [], 0.02)


def test_an_agent_that_drips_or_floods_is_not_listened_to_for_ever(liar, monkeypatch):
    call = b9agent.call_agent
    monkeypatch.setattr(b9agent, "call_agent", lambda where, path, body, limit_s, *most: call(
        where, path, body, limit_s / 10, *most))
    for said, why in ((drip, "no answer within 0.5 s"),
                      (lambda: itertools.repeat(b" " * 65536), "more than 1048576 bytes")):
        with pytest.raises(b9agent.GatewayUnreachable, match=why):
            there(liar(status=said)).status()


def test_a_log_without_end_is_read_no_faster_than_it_is_looked_at(liar, monkeypatch):
    sent = itertools.count()
    source = there(liar(logs=lambda: (b'{"n": %d}\n' % next(sent) * 5000 for _ in itertools.count())))

    def follow():
        with pytest.raises(SystemExit):
            source.follow()
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    wait_until(lambda: len(source._came) > 1000, "as many lines as are kept")
    begun_s = time.process_time()
    select.select([], [], [], 0.5)
    used_s, came = time.process_time() - begun_s, len(source._came)
    monkeypatch.setattr(b9agent, "pause", lambda seconds: sys.exit())  # of the thread alone
    thread.join(PATIENCE_S)
    assert used_s < 0.25 and came == 1001


@pytest.mark.parametrize("flood", [b"{}\n" * 20000, b"x" * 60000], ids=["lines", "a line"])
def test_a_log_without_end_ends_one_frame(flood, liar, home):
    once = run_agent(home, "top", "--host", liar(
        status=CLAIMED, logs=lambda: itertools.repeat(flood)).host, "--once",
        B9AGENT_CONTROL_TOKEN=TOKEN, within_s=15.0)
    assert once.code in (0, 5) and "defect" not in once.err, once


def test_the_control_token_goes_nowhere_but_to_the_agent_that_was_named(liar, home):
    other = liar(status=CLAIMED)
    away = liar(status=b"HTTP/1.1 307 Away\r\nLocation: http://%s/status\r\nContent-Length: 0\r\n\r\n"
                % other.host.encode())
    once = run_agent(home, "top", "--host", away.host, "--once", B9AGENT_CONTROL_TOKEN=TOKEN,
                     http_proxy="http://" + other.host, HTTP_PROXY="http://" + other.host)
    assert once.code == 4 and other.heads == [] and TOKEN in away.heads[0], once
    assert TOKEN not in once.out + once.err


def test_an_agent_that_lies_costs_no_more_memory_than_a_screen_has_use_for():
    figures = b9agent._figures(dict(CLAIMED, gpus=[{"utilization_pct": 1}] * 5000, host=[], inference=3))
    assert len(figures) < 100
    assert b9agent.bar(10 ** 12, 1, 8) == "########" and b9agent.bar(-9, 1, 8) == "--------"


# -- on pseudo-terminals of ours ----------------------------------------------------

class Pty:
    """A program on a pseudo-terminal, its controlling one.  seen: all that it wrote."""

    def __init__(self, home, *arguments, size=(80, 24), ignored=(), blocked=(), **extra):
        self.master, slave = pty.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(slave)

        def own():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        self.process = subprocess.Popen(
            agent_command(*arguments), env=environment(home, **{"TERM": "xterm", **extra}), stdin=slave,
            stdout=slave, stderr=slave, preexec_fn=own)
        self.slave, self.seen = slave, b""

    def resize(self, columns, rows):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, limit_s=0.05):
        piece = b""
        if select.select([self.master], [], [], limit_s)[0]:
            try:
                piece = os.read(self.master, 65536)
            except OSError:
                pass
        self.seen += piece
        return piece

    def until(self, pattern, after=0):
        wait_until(lambda: self.read() is not None and re.search(pattern, self.seen[after:]),
                   "%r in %r" % (pattern, self.seen[-3000:]))

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for descriptor in (self.master, self.slave):
            try:
                os.close(descriptor)
            except OSError:
                pass


@pytest.fixture
def on_pty(home):
    started = []

    def start(*arguments, **extra):
        started.append(Pty(home, *arguments, **extra))
        return started[-1]
    yield start
    for one in started:
        one.end()


def test_an_idle_refresh_writes_little_and_costs_under_a_hundredth_of_a_core(on_pty, hostile, state):
    one = on_pty("run", *agent_flags(hostile.port), BETA9_TOKEN=hostile.token)
    one.until(b"READY")

    def used_s():
        words = b9agent.read_text("/proc/%d/stat" % one.process.pid).rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    until, begun_s, sizes = time.monotonic() + 3.0, used_s(), []
    while time.monotonic() < until:
        sizes.append(len(one.read(1.0)))
    refreshes = [size for size in sizes if size]
    assert 2 <= len(refreshes) <= 14, sizes
    assert max(refreshes) < 2000 and sum(refreshes) < 6000, sizes
    # A keepalive each second is in it; the kernel counts in hundredths.
    assert used_s() - begun_s < 0.02 * 3.0


def test_a_terminal_that_takes_no_more_costs_frames_and_no_keepalive(on_pty, hostile, state):
    one = on_pty("run", *agent_flags(hostile.port), size=(250, 100), BETA9_TOKEN=hostile.token)
    one.until(b"READY")
    first, widths = keepalives(hostile), itertools.cycle(range(200, 250))

    def beats():  # and each time another width, so a whole frame of some 30 kB that nobody reads
        one.resize(next(widths), 100)
        return keepalives(hostile) > first + 1
    wait_until(beats, "keepalives while nobody reads the terminal")
    begun_s = time.monotonic()
    with StallMeter() as stall:
        one.process.send_signal(signal.SIGTERM)
        one.process.wait(PATIENCE_S)
    assert time.monotonic() - begun_s < 5.0 + 4 * stall.worst_s and one.process.returncode == 0
    assert termios.tcgetattr(one.slave) == one.before
    while one.read(0.2):
        pass
    assert b"\x1b[?1049l" in one.seen[-2000:], "the normal screen, for who reads on"


def test_what_was_stalled_is_drawn_whole_when_it_goes_on(on_pty, hostile, state):
    pyte = pytest.importorskip("pyte")
    one = on_pty("run", *agent_flags(hostile.port), BETA9_TOKEN=hostile.token)
    one.until(b"READY")
    for number in range(60):
        one.resize(81 + number, 24)
        select.select([], [], [], 0.01)
    one.resize(90, 20)
    screen = pyte.Screen(90, 20)
    stream = pyte.ByteStream(screen)

    def framed():
        one.read()
        last = one.seen.rfind(b"\x1b[2J")
        screen.reset()
        stream.feed(one.seen[last:])
        return is_framed(screen.display, 90, 20)
    wait_until(framed, "a frame of 90x20")


def test_a_hung_up_terminal_ends_it_even_where_the_signal_is_lost(on_pty, hostile, state):
    one = on_pty("run", *agent_flags(hostile.port), BETA9_TOKEN=hostile.token,
                 blocked=[signal.SIGHUP])
    one.until(b"READY")
    os.close(one.slave)
    os.close(one.master)
    assert one.process.wait(PATIENCE_S) == 0
    assert "info stopped" in (state / "agent.log").read_text()


def test_where_a_hang_up_is_ignored_the_agent_goes_on_without_its_terminal(on_pty, hostile, state):
    one = on_pty("run", *agent_flags(hostile.port), BETA9_TOKEN=hostile.token,
                 ignored=[signal.SIGHUP])
    one.until(b"READY")
    os.close(one.slave)
    os.close(one.master)
    beats = keepalives(hostile)
    wait_until(lambda: keepalives(hostile) > beats + 1, "keepalives without a terminal")
    threads = os.listdir("/proc/%d/task" % one.process.pid)
    names = {b9agent.read_text("/proc/%d/task/%s/comm" % (one.process.pid, name)) for name in threads}
    assert "dashboard\n" not in names
    one.process.terminate()
    assert one.process.wait(PATIENCE_S) == 0


def test_garbage_that_is_typed_ends_nothing_and_costs_nothing(on_pty, hostile, state):
    import random
    chance = random.Random(5)
    one = on_pty("run", *agent_flags(hostile.port), BETA9_TOKEN=hostile.token, PATH="/nonexistent")
    one.until(b"READY")
    # Not q; nor what the terminal makes signals of.
    choice = [code for code in range(256) if code not in (3, 26, 28, ord("q"))]
    for _ in range(60):
        os.write(one.master, bytes(chance.choice(choice) for _ in range(200)) + b"\x1b[200~")
        one.read(0.01)
        os.write(one.master, bytes(chance.choice(choice) for _ in range(200)) + b"q\x1b[201~")
        one.read(0.01)
    # The end of a paste, out of a prompt, and out of that there is.
    os.write(one.master, b"\x1b[201~\x1b\x1bq")
    assert wait_until(lambda: one.read() is not None and one.process.poll() is not None, "its end")
    assert one.process.returncode == 0 and termios.tcgetattr(one.slave) == one.before
    assert "defect" not in (state / "agent.log").read_text()


def test_the_lines_variable_is_not_trusted_over_the_terminal(on_pty, hostile, state):
    one = on_pty("run", *agent_flags(hostile.port), size=(60, 15), BETA9_TOKEN=hostile.token,
                 COLUMNS="200", LINES="99")
    one.until(b"READY")
    one.until(rb"\x1b\[15;1H")
    assert b"\x1b[16;1H" not in one.seen


def test_a_terminal_of_no_size_and_one_of_a_mad_size_are_drawn_on(on_pty, hostile, state):
    one = on_pty("run", *agent_flags(hostile.port), size=(0, 0), BETA9_TOKEN=hostile.token)
    one.until(b"READY")
    one.until(rb"\x1b\[24;1H")
    one.resize(65535, 65535)
    one.until(rb"\x1b\[500;1H")
    one.resize(1, 1)
    at = len(one.seen)
    one.until(rb"\x1b\[2J", at)
    one.process.send_signal(signal.SIGINT)
    one.until(rb"1049l")
    assert one.process.wait(PATIENCE_S) == 0


def test_who_watches_has_fresh_figures_and_the_keepalive_its_own(hostile, tmp_path):
    loaded = b9agent.load_settings({"state_dir": str(tmp_path / "state"), "config": os.devnull,
                                    "token": hostile.token, "gateway_host": "127.0.0.1",
                                    "gateway_port": str(hostile.port)}, {})
    os.mkdir(tmp_path / "state", 0o700)
    looks = []

    class Source(b9agent.GpuSource):
        vendor = "nvidia"

        def present(self):
            return True

        def read(self):
            looks.append(time.monotonic())
            return b9agent.GpuReading("test", (b9agent.Gpu(0, "nvidia", name="L4",
                                                           utilization_pct=len(looks)),))
    with open(os.devnull, "w") as stream:
        made = b9agent.Agent(loaded, b9agent.Log(stream=stream))
        made._gpus = b9agent.GpuSampler([Source()])
        assert made.status()["gpus"] == [] and made.status()["cpu_percent"] is None
        threads = [threading.Thread(target=made.status, args=(True,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(looks) == 1, "eight who watch, one look"
        fresh = made.status(fresh=True)
        assert fresh["gpus"][0]["utilization_pct"] == 1 and fresh["cpu_percent"] is not None
        assert len(looks) == 1 and made.status()["gpus"] == [], "the keepalive's figures are its own"
        before = made._host._last
        wait_until(lambda: made.status(fresh=True)["gpus"][0]["utilization_pct"] > 1, "another look")
        assert made._host._last is before, "the keepalive's interval is its own"
        assert looks[1] - looks[0] > 0.8
        made._live = None
        made.look()
        with made._live_lock:  # somebody's first look takes its time
            assert made.status(fresh=True)["cpu_percent"] == made.status()["cpu_percent"] is not None
        made._log.close()


@pytest.mark.parametrize("length", [37, 700])
def test_a_log_costs_no_time_where_its_terminal_takes_half_a_line(length, tmp_path):
    master, slave = pty.openpty()
    with open(slave, "w") as terminal:
        log = b9agent.Log(stream=terminal)

        def until_full():
            begun_s = now_s = 0.0
            while now_s - begun_s < 0.15:
                begun_s = time.monotonic()
                log("info", "quiet", what="x" * length)
                now_s = time.monotonic()
        thread = threading.Thread(target=until_full, daemon=True)
        thread.start()
        thread.join(10.0)
        assert not thread.is_alive(), "it waits for the rest of a line"
        log.hold()
        for _ in range(60):
            log("warning", "loud")
        begun_s = time.monotonic()
        log.release()
        assert time.monotonic() - begun_s < 5.0, "fifty lines, each with its patience, would be ten"
    os.close(master)


def test_a_log_that_is_held_tells_the_worse_and_how_it_ends_later(tmp_path):
    master, slave = pty.openpty()
    with open(slave, "w") as terminal, open(str(tmp_path / "file"), "w+") as file:
        log, other = b9agent.Log(stream=terminal), b9agent.Log(stream=file)
        for one in (log, other):
            one.hold()
            one("info", "quiet")
            one("warning", "loud")
            one.held_level = "debug"
            one("info", "ending")
        assert select.select([master], [], [], 0)[0] == []
        for one in (log, other):
            one.release()
            one("info", "after")
        seen = b""
        while b"after" not in seen:
            seen += os.read(master, 4096)
        assert re.findall(r"(?:info|warning) (\w+)", seen.decode()) == ["loud", "ending", "after"]
        file.seek(0)
        assert re.findall("(?:info|warning) ([a-z]+)", file.read()) == [
            "quiet", "loud", "ending", "after"], "what is no terminal shows nothing else"
    os.close(master)


def test_a_lying_agent_or_a_defect_leaves_no_top_behind_that_shows_nothing(on_pty, liar, state):
    one = on_pty("top", "--host", liar(status=dict(CLAIMED, inference=["running"], host=3, gpus=[7]),
                                       inference=dict(models=5)).host, B9AGENT_CONTROL_TOKEN=TOKEN)
    one.until(b"READY")
    os.write(one.master, b"s")
    one.until(b"start ...|TypeError")
    os.write(one.master, b"?")
    one.until(b"HELP")
    os.write(one.master, b"q")
    assert wait_until(lambda: one.read() is not None and one.process.poll() is not None, "its end")
    assert one.process.returncode == 0 and termios.tcgetattr(one.slave) == one.before


def test_a_defect_of_the_screen_ends_top_and_is_told(on_pty, liar, tmp_path, monkeypatch):
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    monkeypatch.setattr("test_terminal.agent_command", lambda *words: [sys.executable, str(path), *words])
    one = on_pty("top", "--host", liar(status=CLAIMED).host, B9AGENT_CONTROL_TOKEN=TOKEN)
    one.until(b"READY")
    os.write(one.master, b"?")
    one.until(b"1049l(?s:.*)b9agent: defect: ZeroDivisionError")
    assert one.process.wait(PATIENCE_S) == 70 and termios.tcgetattr(one.slave) == one.before


def test_what_is_typed_before_a_question_is_seen_is_no_answer(on_pty, liar):
    agent = liar(status=dict(CLAIMED, inference={"status": "running"}))
    one = on_pty("top", "--host", agent.host, B9AGENT_CONTROL_TOKEN=TOKEN)
    one.until(b"READY")
    os.write(one.master, b"sy")
    one.until(rb"Stop inference\? y/n")
    assert not any("/stop" in head for head in agent.heads)
    os.write(one.master, b"y")
    wait_until(lambda: one.read() is not None and any("/stop" in head for head in agent.heads), "the answer")


def test_no_note_has_a_secret_in_it(on_pty, hostile, state):
    one = on_pty("run", *agent_flags(hostile.port), BETA9_TOKEN=hostile.token)
    one.until(b"READY")
    os.write(one.master, b"p" + hostile.token.encode() + b"!")
    one.until(b"!_")
    at = len(one.seen)
    os.write(one.master, b"\r")
    one.until(rb"\x1b\[24;1H\S*`.* is no name of a model", at)
    assert hostile.token.encode() not in one.seen[at:]


def test_what_was_typed_to_the_shell_is_no_key(on_pty, liar):
    typed = threading.Event()

    def late():  # the screen is taken after the first answer
        typed.wait(PATIENCE_S)
        yield json.dumps(CLAIMED).encode()
    one = on_pty("top", "--host", liar(status=late).host, B9AGENT_CONTROL_TOKEN=TOKEN)
    os.write(one.master, b"q")
    typed.set()
    one.until(b"READY")
    os.write(one.master, b"?")
    one.until(b"HELP")


# -- keys -------------------------------------------------------------------------

def keys(*pieces, settle=True):
    one, found = b9agent.Keys(), []
    for piece in pieces:
        found += one.feed(piece)
    return found + (one.settle() if settle else [])


@pytest.mark.parametrize("raw, wanted", [
    (b"qs?/", ["q", "s", "?", "/"]),
    (b"\x1b[A\x1bOB\x1b[5~\x1b[6~\x1b[H\x1bOF\x1b[1~\x1b[4~\x1b[7~\x1b[8~",
     ["up", "down", "page up", "page down", "home", "end", "home", "end", "home", "end"]),
    (b"\x1b", ["esc"]), (b"\x1b\x1b", ["esc", "esc"]), (b"\x1bq", ["esc", "q"]),
    (b"\r\n\x7f\x08\x15\x0c", ["enter", "enter", "backspace", "backspace", "clear", "redraw"]),
    ("ä日😀".encode(), ["ä", "日", "😀"]), (b"\xff\xc3(\xe2\x82", ["("]),
    (b"\x1b[1;5A\x1b[<0;1;1M\x1b[?62c\x1b[200~a\x1b[Aq\n\x1b[201~b", ["paste a\x1b[Aq\n", "b"]),
    (b"\x1b[12\x1b[A\x1bO\r\x1b[\xc3\xa4", ["up", "enter", "ä"]),
    (b"\x00\x01\x04\x11\x13\x1a", []), (b"\x1b[" + b"9" * 500, []),
], ids=lambda value: repr(value)[:30])
def test_bytes_become_keys_whole_or_one_at_a_time(raw, wanted):
    assert keys(raw) == wanted
    if len(raw) < 100 and b"\x1b\x1b" not in raw:
        assert keys(*[raw[at:at + 1] for at in range(len(raw))]) == wanted


def test_a_paste_without_end_is_bounded_and_no_key():
    one = b9agent.Keys()
    assert one.feed(b"\x1b[200~") == [] and not one.unsure
    for _ in range(100):
        assert one.feed(b"q" * 4096) == []
        assert len(one.rest) <= b9agent.PASTE_MAX
    (pasted,) = one.feed(b"\x1b[201~")
    assert pasted.startswith("paste qqq") and one.feed(b"q") == ["q"]


def test_any_bytes_are_keys_or_nothing():
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies

    pieces = strategies.lists(strategies.one_of(
        strategies.binary(max_size=40),
        strategies.sampled_from([b"\x1b", b"\x1b[", b"\x1b[200~", b"\x1b[201~", b"\x1bO", b"\x1b[1;"])),
        max_size=12)

    @hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=300)
    @hypothesis.given(pieces)
    def check(pieces):
        one = b9agent.Keys()
        for piece in pieces:
            for key in one.feed(piece):
                assert key and (len(key) == 1) == key.isprintable() * (len(key) == 1)
            assert len(one.rest) <= b9agent.PASTE_MAX
        one.settle()
        assert one.rest == ""
    check()


@pytest.mark.parametrize("environ, utf8, color", [
    ({"LANG": "en_GB.UTF-8"}, True, True), ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, False, True),
    ({"LC_CTYPE": "C.UTF-8"}, False, True), ({"LC_ALL": "C", "LANG": "de_DE.utf8"}, False, True),
    ({"LC_CTYPE": "UTF-8"}, True, True), ({"LANG": "C.UTF-8", "NO_COLOR": "1"}, True, False),
    ({"LANG": "C.UTF-8", "NO_COLOR": ""}, True, True), ({}, False, True),
    ({"LANG": "C.UTF-8", "TERM": "dumb"}, True, False)])
def test_the_environment_says_what_the_terminal_can(environ, utf8, color, monkeypatch):
    for name in ("LC_ALL", "LC_CTYPE", "LANG", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert b9agent.read_look() == (utf8, color)
