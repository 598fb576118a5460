"""Fixtures of all tests.  Standard library and pytest only: the interpreter matrix uses this too."""
import os
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

from helpers import Program, agent_command, environment, quiet_port, run_agent  # noqa: E402
from hostile_gateway import HostileGateway  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "root: needs root, a chroot, a real systemd or a Go compiler; "
                                       "only `tests/run --all` runs these")
    try:
        import pytest_timeout  # noqa: F401
    except ImportError:  # the matrix has pytest alone; it limits the whole run
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """The settings, proxies and units of whoever runs the tests are not ours to test with."""
    for name in list(os.environ):
        if (name.startswith(("BETA9_", "B9AGENT_")) or name.lower().endswith("_proxy")
                or name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM",
                            "INVOCATION_ID", "INFERENCE_TOKEN")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # nor is an Ollama of theirs


@pytest.fixture
def home(tmp_path):
    """An empty home folder, for HOME of the processes of one test."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def state(home):
    """Where the agent keeps what it keeps when it is not told otherwise; not made yet."""
    return home / ".b9agent"


@pytest.fixture
def agent(home):
    """agent(*arguments, **environment) starts `b9agent.py …` and returns a Program; all end with
    the test."""
    started = []

    def start(*arguments, **extra):
        program = Program(agent_command(*arguments), environment(home, **extra))
        started.append(program)
        return program

    yield start
    for program in reversed(started):
        program.__exit__()


@pytest.fixture
def hostile():
    """A scriptable gateway on a free loopback port.  A request that a Go decoder would refuse
    fails the test, unless the test takes it out of `hostile.violations`."""
    with HostileGateway() as gateway:
        yield gateway
    assert gateway.violations == []


class Embedded:
    """A running `b9agent.py gateway`.  port, db, url; create() makes a machine."""

    def __init__(self, start, home, folder):
        self._start, self._home = start, home
        self.db = str(folder / "gateway.db")
        self.port = quiet_port()  # still its own while it is stopped
        self.program = None

    def start(self):
        self.program = self._start("gateway", "--host", "127.0.0.1", "--port", str(self.port),
                                   "--db", self.db)
        match, _ = self.program.wait_line(r"\blistening\b.*url=http://127\.0\.0\.1:(\d+)")
        assert self.port == int(match.group(1))
        return self

    @property
    def url(self):
        return "http://127.0.0.1:%d" % self.port

    def create(self, pool="gpu"):
        """(machine id, token)."""
        import json
        done = run_agent(self._home, "machine", "create", "--pool", pool, "--db", self.db, "--json")
        assert done.code == 0, done
        made = json.loads(done.out)
        return made["machine_id"], made["token"]


@pytest.fixture
def embedded(agent, home, tmp_path):
    folder = tmp_path / "gateway"
    folder.mkdir(mode=0o700)
    return Embedded(agent, home, folder).start()
