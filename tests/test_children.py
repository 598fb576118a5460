"""Child processes: real programs, well-behaved and not; psutil says what is left of them."""
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid

import pytest
from hypothesis import given, settings, strategies

import b9agent
from b9agent import ChildSpec, ChildState, Pace, Probe
from helpers import HERE, ROOT, wait_until

psutil = pytest.importorskip("psutil")
SOON = Pace(first_s=0.01, held_s=0.3)
LONG_WAIT = Pace(first_s=1e6, most_s=1e6, held_s=0.3)  # in BACKOFF for days
ENDED = (ChildState.ERROR, ChildState.STOPPED)
LIVE_ON = "import signal, time\nprint('up')\nwhile True: signal.pause()"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")


def of_tag(tag):
    """{pid: process} of all that have a word in their command, or in the environment they were
    started with; zombies have ended."""
    found = {}
    for process in psutil.process_iter():
        try:
            words = process.cmdline() + list(process.environ().values())
            if process.status() != psutil.STATUS_ZOMBIE and any(tag in word for word in words):
                found[process.pid] = process
        except psutil.Error:
            pass
    found.pop(os.getpid(), None)
    return found


class Lines(list):
    """A Log that keeps what it is told."""

    defect = b9agent.Log.defect

    def __call__(self, level, event, **fields):
        self.append((level, event, fields))

    def of(self, level):
        return [fields for one, _, fields in self if one == level]


class Maker:
    """make(code, …): a Child that runs Python code; `tag` is in every process of the test."""

    def __init__(self, state_dir):
        self.state_dir, self.tag, self.log, self.children = str(state_dir), uuid.uuid4().hex, Lines(), []

    def __call__(self, code, pace=SOON, on_change=lambda: None, processes=b9agent.read_processes, **spec):
        argv = spec.pop("argv", None) or [sys.executable, "-S", "-uc", code, self.tag]
        spec = dict(dict(name="engine", environment={"TAG": self.tag}, ports=(),
                         probe=lambda: Probe(True)), **spec)
        child = b9agent.Child(ChildSpec(argv=argv, **spec), self.state_dir, self.log, on_change, pace,
                              processes)
        self.children.append(child)
        return child

    def running(self, code, **spec):
        child = self(code, **spec)
        child.start()
        reached = child.wait((ChildState.RUNNING,) + ENDED, 40)
        assert reached.state is ChildState.RUNNING, reached
        return child

    def said(self, child, word):
        return wait_until(lambda: [line for line in child.tail(200) if line.startswith(word)], word)

    def pidfiles(self):
        return sorted(os.listdir(os.path.join(self.state_dir, "children")))


@pytest.fixture
def make(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    maker = Maker(folder)
    yield maker
    for child in maker.children:
        child.stop()
    left = of_tag(maker.tag)
    for process in left.values():
        process.kill()
    assert left == {}
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("child-")] == []
    assert [entry for entry in maker.log if entry[1] == "defect"] == []


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def is_open(host, port):
    with socket.socket() as one:
        return one.connect_ex((host, port)) == 0


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def backed_off(child):
    """Its message, once it is cleaned up and waits for the next start."""
    return wait_until(lambda: "starts again in" in child.snapshot.message and child.snapshot.message,
                      "the wait for the next start")


# -- an ordinary life ----------------------------------------------------------

def test_a_child_runs_in_a_session_of_its_own_and_nothing_is_left_when_it_is_stopped(make):
    child = make.running(LIVE_ON)
    pid = child.snapshot.pid
    assert os.getsid(pid) == os.getpgid(pid) == pid
    assert make.pidfiles() == ["engine.json"]
    path = os.path.join(make.state_dir, "children", "engine.json")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert child.stop() == ""
    assert gone(pid) and make.pidfiles() == []
    assert child.snapshot.state is ChildState.STOPPED and child.snapshot.pid is None
    assert child.snapshot.starts == 1


def test_it_is_starting_until_its_probe_says_that_it_is_ready(make):
    ready = threading.Event()
    child = make(LIVE_ON, probe=lambda: Probe(ready.is_set(), None, "loading 45 %"))
    child.start()
    wait_until(lambda: child.snapshot.said == "loading 45 %", "what the probe said")
    assert child.snapshot.state is ChildState.STARTING
    ready.set()
    assert child.wait((ChildState.RUNNING,), 40).said == ""
    assert child.snapshot.state is ChildState.RUNNING


def test_the_environment_has_none_of_our_secrets_and_no_notify_socket(make, monkeypatch):
    for name in ("BETA9_TOKEN", "B9AGENT_GATEWAY_PROXY", "NOTIFY_SOCKET", "WATCHDOG_USEC"):
        monkeypatch.setenv(name, "sesame-open")
    child = make.running("import os, signal\nfor pair in os.environ.items(): print(*pair)\n"
                         "print('that is all')\nsignal.pause()",
                         environment={"TAG": make.tag, "ENGINE_HOST": "127.0.0.1"})
    make.said(child, "that is all")
    said = dict(line.partition(" ")[::2] for line in child.tail(200))
    assert "sesame-open" not in said.values() and said["ENGINE_HOST"] == "127.0.0.1"
    assert len(said["B9AGENT_CHILD"]) == 32 and said["PATH"] == os.environ["PATH"]


def test_a_start_is_one_start_however_often_it_is_asked_for(make):
    child = make.running(LIVE_ON)
    pid = child.snapshot.pid
    child.start()
    assert child.snapshot.pid == pid and child.snapshot.starts == 1
    assert child.stop() == child.stop() == ""
    child.start()
    assert child.wait((ChildState.RUNNING,), 40).starts == 2


def test_a_child_that_was_never_started_is_stopped_already(make):
    child = make(LIVE_ON)
    assert child.stop() == "" and child.snapshot.state is ChildState.STOPPED
    assert child.wait((ChildState.RUNNING,), 0.05).state is ChildState.STOPPED


def test_while_it_is_being_stopped_it_cannot_be_started(make):
    child = make.running("import signal\nsignal.signal(15, lambda *_: print('asked'))\nprint('up')\n"
                         "while True: signal.pause()", stop_grace_s=2.0)
    make.said(child, "up")
    stops = [threading.Thread(target=child.stop) for _ in range(3)]
    for thread in stops:
        thread.start()
    make.said(child, "asked")
    with pytest.raises(b9agent.UsageError, match="being stopped"):
        child.start()
    for thread in stops:
        thread.join()
    assert child.snapshot.state is ChildState.STOPPED


def test_a_probe_that_has_failed_ends_the_start(make):
    child = make(LIVE_ON, probe=lambda: Probe(False, said="it has no completions", failed=True))
    child.start()
    ended = child.wait(ENDED, 40)
    assert ended.state is ChildState.ERROR and ended.starts == 1
    assert "will not be ready: it has no completions" in ended.message


def test_without_a_thread_to_be_had_it_is_as_it_was_and_starts_later(make, monkeypatch):
    child = make(LIVE_ON)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: {}["can't start new thread"])
        with pytest.raises(KeyError):
            child.start()
    assert child.snapshot == b9agent.ChildSnapshot() and child.stop() == ""
    child.start()
    assert child.wait((ChildState.RUNNING,) + ENDED, 40).state is ChildState.RUNNING
    assert child.stop() == ""


def test_a_hundred_lives_leak_no_descriptor_and_no_thread(make):
    child = make.running("print('up')", pace=SOON._replace(exits=1000, most_s=1e-6))
    counts = lambda: (len(os.listdir("/dev/fd")), threading.active_count())
    wait_until(lambda: child.snapshot.starts > 5, "a few lives")
    child.stop()
    before = counts()
    child.start()
    wait_until(lambda: child.snapshot.starts > 30, "many lives")
    child.stop()
    assert counts() == before
    assert len(os.listdir(os.path.join(make.state_dir, "logs"))) == 5


def test_who_listens_is_told_of_every_change(make):
    states = []
    child = make(LIVE_ON, on_change=lambda: states.append(child.snapshot.state.value))
    child.start()
    child.wait((ChildState.RUNNING,), 40)
    assert child.stop() == ""
    assert list(dict.fromkeys(states)) == ["starting", "running", "stopping", "stopped"]


# -- ends that nobody asked for ------------------------------------------------

def test_one_that_is_killed_is_started_again_and_the_signal_is_named(make):
    child = make.running(LIVE_ON)
    pid = child.snapshot.pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: child.snapshot.pid not in (None, pid), "another process")
    assert child.wait((ChildState.RUNNING,), 40).starts == 2
    message = next(fields["what"] for fields in make.log.of("warning") if fields["state"] == "backoff")
    assert "ended with signal SIGKILL" in message and "memory" in message


def test_one_that_lives_and_is_of_no_use_is_ended_and_started_again(make):
    child = make.running(LIVE_ON)
    first = child.snapshot.pid
    child.give_up("gave no token")
    wait_until(lambda: child.snapshot.state is ChildState.RUNNING and child.snapshot.pid != first, "again")
    assert not psutil.pid_exists(first) and child.snapshot.starts == 2
    assert [entry["what"] for entry in make.log.of("warning")] == ["engine gave no token"]


def test_five_exits_in_two_minutes_end_in_an_error_with_the_last_twenty_lines(make):
    child = make("for n in range(30): print('line', n)\nraise SystemExit(7)")
    child.start()
    ended = child.wait(ENDED, 60)
    assert ended.state is ChildState.ERROR and ended.starts == 5
    said = ended.message.splitlines()
    assert said[0] == "engine ended with exit code 7, as 4 times before"
    assert said[1:] == ["line %d" % n for n in range(10, 30)]
    assert child.stop() == "" and child.snapshot.state is ChildState.STOPPED


def test_exits_that_lie_far_apart_are_no_crash_loop(make):
    child = make("pass", pace=SOON._replace(window_s=0.0))
    child.start()
    wait_until(lambda: child.snapshot.starts > 7, "more exits than a crash loop has")


def test_the_wait_doubles_and_has_full_jitter():
    most = lambda low, high: high
    assert [b9agent.backoff_s(n, Pace(), most) for n in (1, 2, 3, 7, 5000)] == [1.0, 2.0, 4.0, 60.0, 60.0]
    assert b9agent.backoff_s(9, Pace(), lambda low, high: low) == 0.0


@pytest.mark.parametrize("code, words", [
    (0, "exit code 0"), (3, "exit code 3"), (-9, "signal SIGKILL"), (-40, "signal 40"),
    (137, "exit code 137")])
def test_how_it_ended_in_words(code, words):
    assert b9agent.exit_words(code) == words


@pytest.mark.parametrize("argv", [
    ["/nowhere/ollama", "serve"], ["no-such-program-anywhere"], ["/dev/null"], ["a\0b"]])
def test_a_program_that_cannot_be_started_is_tried_once(make, argv):
    child = make("", argv=argv)
    child.start()
    ended = child.wait(ENDED, 40)
    assert ended.state is ChildState.ERROR and ended.starts == 1
    assert "engine cannot be started: " in ended.message
    assert argv[0] in ended.message and make.pidfiles() == []


def test_a_port_that_is_taken_is_said_before_anything_is_started(make):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        child = make(LIVE_ON, ports=(("127.0.0.1", port),))
        child.start()
        ended = child.wait(ENDED, 40)
    assert ended.state is ChildState.ERROR and ended.starts == 1
    assert "127.0.0.1:%d is taken" % port in ended.message and child.tail() == []
    child.start()
    assert child.wait((ChildState.RUNNING,), 40).state is ChildState.RUNNING


def test_one_that_has_died_does_not_count_as_running_while_its_memory_comes_back(make):
    held = ["1 GiB"]
    child = make.running(LIVE_ON, still_held=lambda: held[-1], pace=LONG_WAIT._replace(held_s=30.0))
    os.kill(child.snapshot.pid, signal.SIGKILL)
    assert "starts again" not in child.wait((ChildState.BACKOFF,), 20).message
    held.append("")
    backed_off(child)


# -- readiness -----------------------------------------------------------------

BUSY = "import time\nwhile True: sum(range(10**5))"
MOVES = {
    "progress": LIVE_ON,
    "output": "import time\nwhile True: print('.', end=''); time.sleep(0.05)",
    "cpu": BUSY,
    "cpu of a grandchild": "import os, signal\nif os.fork() == 0:\n os.setsid()\n exec(%r)\nsignal.pause()" % BUSY}



@pytest.mark.parametrize("what", sorted(MOVES))
def test_the_stall_limit_starts_again_while_something_moves(make, what):
    until = time.monotonic() + 3.0
    progress = (lambda: time.monotonic()) if what == "progress" else (lambda: 1)
    child = make(MOVES[what], stall_limit_s=1.2,
                 probe=lambda: Probe(time.monotonic() > until, progress(), "loading"))
    child.start()
    reached = child.wait((ChildState.RUNNING,) + ENDED, 40)
    assert reached.state is ChildState.RUNNING, reached


@pytest.mark.parametrize("limits, words", [
    (dict(stall_limit_s=0.5), "nothing moved for 0.5 s"),
    (dict(ready_limit_s=0.5), "not ready within 0.5 s")])
def test_one_that_does_not_get_ready_is_ended_and_said(make, limits, words):
    child = make(LIVE_ON, probe=lambda: Probe(False, None, "loading"), **limits)
    child.start()
    ended = child.wait(ENDED, 40)
    assert ended.state is ChildState.ERROR and ended.starts == 1
    assert words + "; last it was: loading\nup" in ended.message
    assert of_tag(make.tag) == {}


def test_one_that_was_ready_before_is_tried_again(make):
    answers = [True]
    child = make.running(LIVE_ON, probe=lambda: Probe(answers[-1]), stall_limit_s=0.4, pace=LONG_WAIT)
    answers.append(False)
    child._pace = SOON._replace(exits=3)
    os.kill(child.snapshot.pid, signal.SIGKILL)
    ended = child.wait(ENDED, 40)
    assert ended.starts >= 2 and "nothing moved" in str(make.log.of("warning"))


def test_a_probe_that_fails_costs_nothing_but_time(make):
    answers = [Probe(True), KeyError("oops"), KeyError("oops")]

    def probe():
        answer = answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return answer

    child = make.running(LIVE_ON, probe=probe)
    assert child.snapshot.said == "" and answers == []


def test_who_answers_for_a_dead_child_is_not_believed(make):
    child = make("import time; time.sleep(0.2)", probe=lambda: time.sleep(0.5) or Probe(True),
                 pace=LONG_WAIT)
    child.start()
    reached = child.wait((ChildState.RUNNING, ChildState.BACKOFF), 40)
    assert reached.state is ChildState.BACKOFF


# -- stop ------------------------------------------------------------------------

def test_stop_ends_a_wait_for_the_next_start_at_once(make):
    child = make("raise SystemExit(1)", pace=LONG_WAIT)
    child.start()
    assert "exit code 1; starts again in" in backed_off(child)
    began = time.monotonic()
    assert child.stop() == "" and time.monotonic() - began < 5
    assert child.snapshot.state is ChildState.STOPPED


def test_one_that_ignores_sigterm_is_killed_after_its_grace(make):
    child = make.running("import signal\nsignal.signal(15, signal.SIG_IGN)\nprint('up')\n"
                         "while True: signal.pause()", stop_grace_s=0.5)
    make.said(child, "up")
    began = time.monotonic()
    assert child.stop() == "" and 0.5 <= time.monotonic() - began < 10


def test_one_that_is_stopped_by_a_signal_still_hears_sigterm(make):
    child = make.running("import signal, sys\n"
                         "signal.signal(15, lambda *_: (print('bye'), sys.exit()))\nprint('up')\n"
                         "while True: signal.pause()", stop_grace_s=30.0)
    make.said(child, "up")
    os.kill(child.snapshot.pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(child.snapshot.pid).status() == psutil.STATUS_STOPPED, "stopped")
    assert child.stop() == "" and child.tail(1) == ["bye"]


def test_the_main_process_may_end_its_own_before_they_are_asked(make):
    child = make.running("""import os, signal, sys
worker = os.fork()
if worker == 0:
    signal.signal(15, lambda *_: os.write(1, b'worker was asked\\n'))
    os.write(1, b'worker up\\n')
    while True: signal.pause()
def end(*_):
    os.kill(worker, 9); os.wait(); print('ended in order'); sys.exit()
signal.signal(15, end)
os.write(1, b'main up\\n')
while True: signal.pause()""", stop_grace_s=30.0)
    make.said(child, "worker up"), make.said(child, "main up")
    assert child.stop() == "" and child.tail(1) == ["ended in order"]
    assert "worker was asked" not in child.tail(200)


# What a program does to get away from us, each before it says "away".
AWAY = {
    "same group": "",
    "own session": "os.setsid()",
    "two forks": "os.fork() and os._exit(0)",
    "two forks and own session": "os.setsid()\n    os.fork() and os._exit(0)",
    "daemon": "os.setsid()\n    os.fork() and os._exit(0)\n    signal.signal(15, signal.SIG_IGN)\n"
              "    null = os.open('/dev/null', 2)\n    say(null)",
    "another environment": "os.execve(sys.executable, [sys.executable, '-S', '-uc', LIVE_ON, TAG], {})",
    "own group, another environment": "os.setpgid(0, 0)\n    os.execve(sys.executable, [sys.executable, "
                                      "'-S', '-uc', LIVE_ON, TAG], {})"}
PARENT = """import os, signal, sys, time
LIVE_ON, TAG = %r, %r
def say(descriptor=1):
    os.write(1, b'away %%d\\n' %% os.getpid())
    for n in (0, 1, 2):
        descriptor == 1 or os.dup2(descriptor, n)
    while True: signal.pause()
if os.fork() == 0:
    %s
    say()
os.write(1, b'main\\n')
while True: signal.pause()"""


def parent(make, how):
    # One write a line, or the lines of two processes mix.
    live_on = LIVE_ON.replace("'up'", "'away %d\\n' % __import__('os').getpid(), end=''")
    return PARENT % (live_on, make.tag, AWAY[how])


def away_pid(make, child):
    return int(make.said(child, "away")[0].split()[1])


@linux
@pytest.mark.parametrize("how", sorted(AWAY))
def test_no_descendant_outlives_a_stop(make, how):
    child = make.running(parent(make, how), stop_grace_s=0.5)
    pid = away_pid(make, child)
    assert not gone(pid)
    assert child.stop() == "" and gone(pid) and of_tag(make.tag) == {}


@linux
@pytest.mark.parametrize("how", sorted(AWAY))
def test_no_descendant_outlives_a_main_process_that_was_killed(make, how):
    child = make.running(parent(make, how), pace=LONG_WAIT)
    pid = away_pid(make, child)
    os.kill(child.snapshot.pid, signal.SIGKILL)
    assert backed_off(child)
    assert gone(pid) and of_tag(make.tag) == {}


LISTEN = """import signal, socket
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
sock.bind(('127.0.0.1', %d))
sock.listen(5)
print('up')
while True: signal.pause()"""


def test_its_port_is_closed_when_it_is_stopped_and_can_be_had_again_at_once(make):
    port = free_port()
    listens = lambda: Probe(is_open("127.0.0.1", port))
    child = make.running(LISTEN % port, ports=(("127.0.0.1", port),), probe=listens)
    with socket.create_connection(("127.0.0.1", port)):
        assert child.stop() == ""
    assert not is_open("127.0.0.1", port)
    child.start()
    assert child.wait((ChildState.RUNNING,) + ENDED, 40).state is ChildState.RUNNING


def test_what_is_not_given_back_is_reported(make):
    port = free_port()
    child = make.running(LIVE_ON, ports=(("127.0.0.1", port),), still_held=lambda: "3.1 GiB of GPU memory")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen(1)
        left = child.stop()
    assert left == "127.0.0.1:%d is taken by %s; 3.1 GiB of GPU memory" % (
        port, b9agent.process_name(os.getpid()))
    assert child.snapshot.state is ChildState.STOPPED and child.snapshot.message == left


def test_gpu_memory_gets_the_time_it_needs(make):
    looks = ["", "1 GiB", "2 GiB"]
    child = make.running(LIVE_ON, still_held=lambda: looks.pop(), pace=SOON._replace(held_s=30.0))
    assert child.stop() == "" and looks == []


def test_what_cannot_be_ended_is_an_error_and_its_pidfile_stays(make, monkeypatch):
    """A process stuck in a driver: here, one that the table of processes shows for ever."""
    monkeypatch.setattr(b9agent, "KILL_LIMIT_S", 0.3)
    ghost = b9agent.ProcessRow(1 << 30, 1, 0, False, 0.0, "1", "stuck", "stuck", True)
    child = make.running(LIVE_ON, stop_grace_s=0.1, processes=lambda mark: {ghost.pid: ghost})
    assert child.stop() == "lives on: stuck, pid %d" % ghost.pid
    assert child.snapshot.state is ChildState.ERROR and make.pidfiles() == ["engine.json"]
    assert of_tag(make.tag) == {}


def test_without_a_table_of_processes_its_group_is_killed_and_that_is_said(make, monkeypatch):
    monkeypatch.setattr(b9agent, "KILL_LIMIT_S", 0.3)
    child = make.running(PARENT % (LIVE_ON, make.tag, ""), stop_grace_s=0.1, processes=lambda mark: None)
    away_pid(make, child)
    assert "cannot be read" in child.stop()
    wait_until(lambda: of_tag(make.tag) == {}, "the end of the group")


# -- output ----------------------------------------------------------------------

def test_output_goes_into_a_log_file_of_its_own_for_each_start(make):
    child = make("import sys, os\nprint('out', os.getpid()); print('err', file=sys.stderr)\n"
                 "raise SystemExit(1)", pace=SOON._replace(exits=7))
    child.start()
    child.wait(ENDED, 60)
    folder = os.path.join(make.state_dir, "logs")
    names = os.listdir(folder)
    assert len(names) == 5 and child.snapshot.log_path in [os.path.join(folder, one) for one in names]
    for name in names:
        path = os.path.join(folder, name)
        pid = name.rpartition("-")[2][:-len(".log")]
        with open(path) as handle:
            assert handle.read() == "out %s\nerr\n" % pid
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert child.tail(200)[1:] == ["err"]


def test_a_child_never_waits_on_a_full_pipe_even_while_a_probe_blocks(make, tmp_path):
    done, answer = tmp_path / "done", threading.Event()
    child = make("import os, signal\nfor _ in range(64): os.write(1, b'x' * 65535 + b'\\n')\n"
                 "open(%r, 'w').close()\nsignal.pause()" % str(done),
                 probe=lambda: (answer.wait(30), Probe(True))[-1])
    child.start()
    wait_until(done.exists, "the end of 4 MiB of output")
    answer.set()
    assert child.wait((ChildState.RUNNING,), 40).state is ChildState.RUNNING


def test_a_flood_ends_the_log_file_and_its_last_lines_are_kept(make):
    child = make("import os\nfor n in range(800): os.write(1, (b'%06d' % n + b'x' * 57 + b'\\n') * 1024)\n"
                 "print('the last line')\nraise SystemExit(3)", pace=LONG_WAIT)
    child.start()
    assert backed_off(child)
    assert child.tail(1) == ["the last line"] and child.tail(3)[0].startswith("000799x")
    assert os.path.getsize(child.snapshot.log_path) < 17 << 20
    with open(child.snapshot.log_path) as handle:
        assert handle.read().endswith("has reached its limit]\n")


def test_a_line_of_a_hundred_megabytes_costs_no_memory(make):
    child = make("import os\nfor n in range(1600): os.write(1, b'x' * 65536)\nprint()\nprint('next')\n"
                 "raise SystemExit(1)", pace=LONG_WAIT)
    before = psutil.Process().memory_info().rss
    child.start()
    assert backed_off(child)
    assert psutil.Process().memory_info().rss - before < 30 << 20
    assert child.tail(1) == ["next"] and max(map(len, child.tail(200))) <= 2000


@pytest.fixture
def output(tmp_path):
    made = b9agent.Output(str(tmp_path / "logs"), "engine", Lines())
    made.open(4711)
    yield made
    made._close()


def log_text(output):
    folder = output._folder
    texts = []
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), encoding="utf-8") as handle:
            texts.append(handle.read())
    return "".join(texts)


def test_lines_end_with_newline_or_carriage_return_and_the_last_with_neither(output):
    output.feed(b"one\ntwo\r\n\n 10%\r 20%\rhal")
    assert output.lines == ("one", "two", " 10%", " 20%")
    output.read(io.BytesIO(b"f a line"))
    assert output.lines[4:] == ("half a line",) and "half a line\n" in log_text(output)


def test_binary_output_is_made_printable(output):
    output.feed(bytes(range(256)) + b"\n\x1b[31mred\x1b[0m\ttab\n")
    for line in output.lines:
        assert b9agent.printable(line) == line
    assert output.lines[-1].startswith("\\x1b[31mred\\x1b[0m ")
    assert output.lines[-1].endswith(" tab")


def test_secrets_are_scrubbed_even_where_output_comes_in_pieces(output, monkeypatch):
    redactor = b9agent.Redactor()
    monkeypatch.setattr(b9agent, "REDACTOR", redactor)
    secret = "s3cr3t-" + "k" * 32
    redactor.add(secret)
    for size in range(1, 45):
        data = ("key=%s.\n" % secret).encode()
        output.feed(data[:size])
        output.feed(data[size:])
    for place in range(b9agent.LINE_BYTES - 50, b9agent.LINE_BYTES + 5):
        output.feed(b"y" * place + secret.encode() + b"\n")
    assert secret[:9] not in log_text(output) + "".join(output.lines)
    assert "key=…kkkk." in log_text(output)


def test_the_log_file_is_bounded_and_says_so(output, monkeypatch):
    monkeypatch.setattr(b9agent, "LOG_BYTES", 10000)
    for n in range(1000):
        output.feed(b"line %d of many\n" % n)
    text = log_text(output)
    assert len(text) < 10100 and text.endswith("the file has reached its limit]\n")
    assert output.lines[-1] == "line 999 of many"


@linux
def test_a_full_disk_costs_the_log_file_and_one_warning(output):
    output._file.close()
    output._file = open("/dev/full", "wb", buffering=0)
    output.feed(b"one\n")
    output.feed(b"two\n")
    assert output.lines == ("one", "two")
    assert len(output._log) == 1 and "No space left" in str(output._log[0])


def test_without_a_folder_for_logs_and_pidfiles_a_child_runs_all_the_same(make):
    for name in ("logs", "children"):
        with open(os.path.join(make.state_dir, name), "w"):
            pass
    child = make.running(LIVE_ON)
    make.said(child, "up")
    assert child.snapshot.log_path == "" and child.stop() == ""
    assert "no log file" in str(make.log) and "no pidfile" in str(make.log)


def test_one_that_closes_its_output_lives_on_and_its_end_is_seen(make):
    child = make.running("import os, signal\nprint('closing')\nos.close(1); os.close(2)\nsignal.pause()",
                         pace=LONG_WAIT)
    make.said(child, "closing")
    wait_until(lambda: not child._reader.is_alive(), "the end of the output")
    assert child.wait((ChildState.BACKOFF,), 1.2).state is ChildState.RUNNING
    os.kill(child.snapshot.pid, signal.SIGTERM)
    assert "SIGTERM" in backed_off(child)


def test_an_end_is_seen_although_a_descendant_holds_the_pipe(make):
    child = make.running(PARENT % (LIVE_ON, make.tag, "os.setsid()"), pace=LONG_WAIT)
    away_pid(make, child)
    os.kill(child.snapshot.pid, signal.SIGKILL)
    assert "SIGKILL" in backed_off(child)


# -- what a killed agent leaves ----------------------------------------------------

AGENT = """import sys, time
sys.path[:0] = [%r, %r]
import b9agent
state, tag, code = sys.argv[1:]
child = b9agent.Child(b9agent.ChildSpec("engine", [sys.executable, "-S", "-uc", code, tag], {"TAG": tag}, (),
                      lambda: b9agent.Probe(any("away" in line for line in child.tail()))), state,
                      b9agent.Log(stream=sys.stderr), processes=b9agent.%s)
child.start()
child.wait((b9agent.ChildState.RUNNING,), 40)
print(child.snapshot.pid, flush=True)
time.sleep(1000)
"""


def killed_agent(make, how, processes="read_processes"):
    """An agent with a child that has a grandchild is killed; pid of the child."""
    agent = subprocess.Popen([sys.executable, "-c", AGENT % (ROOT, HERE, processes), make.state_dir, make.tag,
                              parent(make, how)], stdout=subprocess.PIPE, start_new_session=True)
    with agent.stdout:
        pid = int(agent.stdout.readline())
        agent.kill()
        agent.wait()
    return pid


@linux
@pytest.mark.parametrize("how", sorted(AWAY))
def test_what_a_killed_agent_left_is_ended_at_the_next_start(make, how):
    pid = killed_agent(make, how)
    assert not gone(pid) and len(of_tag(make.tag)) == 2
    assert b9agent.end_leftovers(make.state_dir, make.log) == 2
    assert of_tag(make.tag) == {} and make.pidfiles() == []
    assert str(pid) in make.log.of("warning")[0]["pids"]
    assert b9agent.end_leftovers(make.state_dir, make.log) == 0


@linux
@pytest.mark.parametrize("how", sorted(AWAY))
def test_descendants_are_found_when_the_agent_and_the_main_process_are_gone(make, how):
    os.kill(killed_agent(make, how), signal.SIGKILL)
    wait_until(lambda: len(of_tag(make.tag)) == 1, "the end of the main process")
    assert b9agent.end_leftovers(make.state_dir, make.log) == 1
    assert of_tag(make.tag) == {} and make.pidfiles() == []


def test_a_state_folder_without_children_has_no_leftovers(tmp_path):
    assert b9agent.end_leftovers(str(tmp_path), Lines()) == 0


@pytest.fixture
def bystander(make):
    """Somebody else's process, a group and session leader without our mark."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import signal\nsignal.pause()"],
                               start_new_session=True)
    # An exec closes what tells Popen of it before it sets the command.
    wait_until(psutil.Process(process.pid).cmdline, "its command")
    yield process
    process.kill()
    process.wait()


def write_pidfile(make, **record):
    folder = os.path.join(make.state_dir, "children")
    os.makedirs(folder, exist_ok=True)
    record = dict(dict(mark="B9AGENT_CHILD=" + uuid.uuid4().hex, pid=None, processes=[]), **record)
    with open(os.path.join(folder, "engine.json"), "w") as handle:
        json.dump(record, handle)


@linux
@pytest.mark.parametrize("change", ["start", "command", "both", "none listed"])
def test_a_pid_that_is_somebody_elses_by_now_is_left_alone(make, bystander, change):
    row = b9agent.read_processes("NO=MARK")[bystander.pid]
    start = "1" if change in ("start", "both") else row.start
    command = "ollama serve" if change in ("command", "both") else b9agent.read_command(row)
    rows = [] if change == "none listed" else [(bystander.pid, start, command)]
    write_pidfile(make, pid=bystander.pid, processes=rows)
    assert b9agent.end_leftovers(make.state_dir, make.log) == 0
    assert bystander.poll() is None and make.pidfiles() == []


@linux
def test_one_without_our_mark_is_ended_where_pid_start_and_command_agree(make, bystander):
    """A program that writes its title over its environment."""
    row = b9agent.read_processes("NO=MARK")[bystander.pid]
    write_pidfile(make, pid=bystander.pid, processes=[(row.pid, row.start, b9agent.read_command(row))])
    reaper = threading.Thread(target=bystander.wait)
    reaper.start()
    assert b9agent.end_leftovers(make.state_dir, make.log) == 1
    reaper.join()
    assert bystander.returncode == -signal.SIGTERM


@linux
def test_one_that_was_started_before_its_pid_could_be_written_is_found_by_its_mark(make):
    write_pidfile(make, mark="B9AGENT_CHILD=" + "ab" * 16)
    process = subprocess.Popen([sys.executable, "-S", "-c", LIVE_ON, make.tag], stdout=subprocess.DEVNULL,
                               env=dict(os.environ, B9AGENT_CHILD="ab" * 16))
    reaper = threading.Thread(target=process.wait)
    reaper.start()
    assert b9agent.end_leftovers(make.state_dir, make.log) == 1
    reaper.join()


@pytest.mark.parametrize("text", [
    "", "{}", "[]", "null", "\0" * 100, '{"mark": ""}', '{"mark": "B9AGENT_CHILD="}', '{"mark": null}',
    '{"pid": 1, "mark": "PATH=/bin", "processes": []}', "[" * 100000])
def test_a_pidfile_that_is_no_pidfile_ends_nothing_and_goes(make, bystander, text):
    write_pidfile(make)
    with open(os.path.join(make.state_dir, "children", "engine.json"), "w") as handle:
        handle.write(text)
    assert b9agent.end_leftovers(make.state_dir, make.log) == 0
    assert make.pidfiles() == [] and bystander.poll() is None


def test_a_pidfile_stays_while_the_table_of_processes_cannot_be_read(make, monkeypatch):
    monkeypatch.setattr(b9agent, "KILL_LIMIT_S", 0.1)
    monkeypatch.setattr(b9agent, "LEFTOVER_GRACE_S", 0.1)
    write_pidfile(make)
    assert b9agent.end_leftovers(make.state_dir, make.log, lambda mark: None) == 0
    assert make.pidfiles() == ["engine.json"] and make.log.of("error")


rows = strategies.lists(strategies.one_of(strategies.none(), strategies.integers(), strategies.lists(
    strategies.one_of(strategies.integers(), strategies.text(), strategies.none()), max_size=4)))


@given(pid=strategies.one_of(strategies.integers(), strategies.text(), strategies.none()), processes=rows)
@settings(derandomize=True, database=None, deadline=None)
def test_any_pidfile_with_a_mark_is_read_without_an_exception(pid, processes):
    left = b9agent.parse_pidfile(json.dumps({"mark": "B9AGENT_CHILD=" + "0" * 32, "pid": pid,
                                             "processes": processes}))
    assert all(number > 1 for number in left.known)


# -- the table of processes ----------------------------------------------------------

@linux
def test_the_table_is_what_psutil_sees(make):
    child = make.running(LIVE_ON)
    mark = child._family.mark
    row, process = b9agent.read_processes(mark)[child.snapshot.pid], psutil.Process(child.snapshot.pid)
    assert row.marked and not row.zombie and row.parent == os.getpid() == process.ppid()
    assert row.group == row.pid and row.name == process.name()
    assert b9agent.read_command(row) == " ".join(process.cmdline())[:499].strip()
    assert abs(row.cpu_s - sum(process.cpu_times()[:4])) < 0.5
    assert not b9agent.read_processes(mark[:-1])[row.pid].marked


def test_a_row_of_proc_with_a_name_that_lies():
    text = "7 (a) Z 1 (b) S 1 7 6 0 0 0 0 0 0 0 3 4 5 8 0 0 1 0 4711 0"
    assert b9agent.parse_proc_stat(text) == (7, 1, 6, False, 20 / os.sysconf("SC_CLK_TCK"), "4711", "a) Z 1 (b", "", False)


@given(strategies.text())
@settings(derandomize=True, database=None, deadline=None)
def test_no_text_makes_the_parsers_raise(text):
    b9agent.parse_ps(text)
    b9agent.parse_ps("7 1 6 Ss 1:02.50 Sun Nov 1 09:05:07 2026 " + text)
    b9agent.parse_proc_stat(text)
    b9agent.parse_proc_stat("7 (" + text + ") S 1 7 6 " + "0 " * 15 + "4711 " + text)
    b9agent.parse_pidfile(text)


# Invented in the form that ps has on macOS.
MAC_PS = """    1     0     1 Ss     5:12.33 Sat Nov 14 08:01:10 2026     /sbin/launchd
  812     1   812 Ss     0:01.50 Sun Nov  1 09:05:07 2026     /opt/homebrew/bin/ollama serve
  813   812   812 S    101:02.00 Sun Nov  1 09:05:09 2026     /opt/homebrew/bin/ollama runner --port 5  x
  814   813   812 Z      0:00.00 Sun Nov  1 09:05:10 2026     (sysctl)
  900     1   900 S      0:00.25 Sun Nov  1 09:06:00 2026     /Applications/My App.app/Contents/MacOS/My App
 1000   812   812 S
"""


def test_the_table_of_macos():
    table = b9agent.parse_ps(MAC_PS)
    assert sorted(table) == [1, 812, 813, 814, 900]
    assert (table[813].parent, table[813].group, table[813].cpu_s) == (812, 812, 6062.0)
    assert table[812].start == "Sun Nov 1 09:05:07 2026" and table[812].name == "ollama"
    assert table[813].command == "/opt/homebrew/bin/ollama runner --port 5  x" and table[814].zombie
    assert sorted(b9agent.family_of(table, {}, 812)) == [812, 813]
    assert sorted(b9agent.family_of(table, {812: "Sun Nov 1 09:05:07 2026"}, 0)) == [812, 813]
    assert b9agent.family_of(table, {812: "Sun Nov 1 09:05:08 2026"}, 0) == {}


@pytest.fixture
def ps_of_macos(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "ps"
    script.write_text("#!/bin/sh\n[ \"$*\" = '-axww -o pid=,ppid=,pgid=,stat=,time=,lstart=,command=' ] "
                      "|| exit 2\n[ \"$LC_ALL\" = C ] || exit 3\ncat <<'END'\n%sEND\n" % MAC_PS)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", "%s:%s" % (folder, os.environ["PATH"]))
    return script


def test_ps_is_asked_for_the_table_where_there_is_no_proc(ps_of_macos):
    assert b9agent.read_ps() == b9agent.parse_ps(MAC_PS)
    ps_of_macos.write_text("#!/bin/sh\nexit 1\n")
    assert b9agent.read_ps() is None


# A ps with the columns of macOS, made from /proc: sessions and environments stay unknown.
PS_FROM_PROC = """#!%s
import os
for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
        head, _, rest = open('/proc/%%s/stat' %% pid, errors='replace').read().rpartition(')')
        command = open('/proc/%%s/cmdline' %% pid, errors='replace').read().replace(chr(0), ' ')
    except OSError:
        continue
    words, n = rest.split(), int(rest.split()[19])
    print('%%5s %%5s %%5s %%s 0:00.%%02d Sun Nov  1 %%02d:%%02d:%%02d %%d     %%s' %% (
        pid, words[1], words[2], words[0], int(words[11]) %% 100, n // 3600 %% 24, n // 60 %% 60, n %% 60,
        2026 + n // 86400, command.replace(chr(10), ' ').strip() or '(x)'))
"""
MAC_AWAY = ["own session", "same group", "another environment", "own group, another environment"]


@pytest.fixture
def ps_from_proc(ps_of_macos):
    ps_of_macos.write_text(PS_FROM_PROC % sys.executable)


@linux
@pytest.mark.parametrize("how", MAC_AWAY)
def test_the_way_of_macos_ends_group_and_tree(make, ps_from_proc, how):
    child = make.running(parent(make, how), stop_grace_s=0.5, processes=lambda mark: b9agent.read_ps())
    pid = away_pid(make, child)
    assert child.stop() == "" and gone(pid) and of_tag(make.tag) == {}


@linux
@pytest.mark.parametrize("how", MAC_AWAY)
def test_the_way_of_macos_ends_what_a_killed_agent_left(make, ps_from_proc, how):
    pid = killed_agent(make, how, "read_ps")
    assert b9agent.end_leftovers(make.state_dir, make.log, b9agent.read_ps) == 2
    assert gone(pid) and of_tag(make.tag) == {} and make.pidfiles() == []
