#!/usr/bin/env python3
# SPDX-License-Identifier: AGPL-3.0-or-later
"""b9agent makes this machine a node of a Beta9 cluster: it registers it with the gateway and keeps
it alive with true figures.  One file, the standard library of Python 3.8, Linux and macOS.

What it does to this machine, all of it:

files     STATE is ~/.b9agent, or --state-dir; the folder is 0700.
          reads   STATE/config.yaml, a token file if one is set; /proc, /sys, /etc/os-release, and
                  whether the devices of GPUs are there; the heads of model files it is asked
                  about, all of them to hash them; Ollama's manifests and blobs; whether tailscaled
                  is installed; STATE/k3s.kubeconfig, /etc/rancher/k3s/k3s.yaml, ~/.kube/config and
                  the files that the one in use names; with k3s.token its authority's certificate
          writes  STATE/config.yaml 0600 (`init`; config.yaml.old 0600 where it had comments),
                  machine_id, agent.lock, agent.log 0600 (5 MiB and one old one; not under
                  journald), energy.json 0600 (energy.json.bad where it was broken),
                  control.token 0600, control.addr; models.json 0600 (models.json.bad);
                  children/engine.json 0600, logs/engine-*.log 0600 (16 MiB each, five), the
                  same two of tunnel; k3s.kubeconfig 0600 (`k3s rbac --apply`, and to renew its
                  token); hub/ (a cache of Hugging Face's where there is none);
                  gateway.db 0600 with its -wal and -shm (`gateway`, `machine`); a temporary
                  folder (`demo`), removed; on macOS, for an instant, k3s's client key 0600;
                  `service install`, `k3s install`: what their --dry-run prints, and
                  the vendor's installer in a temporary file, removed
ports     127.0.0.1:9999 control API, and 9999 on the tailnet address where there is one, unless
          control.host is set or tailnet.control is false; 127.0.0.1:1994 only as `gateway`; two
          free ones as `demo`; `doctor` binds the ports it tells of for an instant; the engine, once
          started, listens on 127.0.0.1:11434; the tunnel's ssh on a free one of 127.0.0.1, and with
          tunnel.reverse_k3s the server's sshd on 6443 there
hosts     the gateway that is configured, or the proxy set for it; the engine; tailscaled, over its
          socket; k3s's API, as its kubeconfig or k3s.server has it; the server of the tunnel, where
          one is set, and then the gateway through it alone; `top --host` the agent that it names;
          `k3s install` get.k3s.io, and what the vendor's installer fetches; nobody else. (The
          routing table is asked for the way to the gateway, or to 192.0.2.1: that sends nothing.)
          The machine token goes to the gateway and nowhere else, and no redirect is followed.
          Ollama itself fetches models from its registries; the others are told to stay offline with
          files that are here
terminal  `run` on one, and `top`: its alternate screen, and keys without echo, given back at every
          end but SIGKILL
loads     libnvidia-ml.so.1, the driver's library, where there is a trace of NVIDIA
programs  nvidia-smi where that library is lacking; amd-smi, rocm-smi, xpu-smi where the kernel's
          files do not tell enough; on macOS sysctl, vm_stat, netstat, ioreg, system_profiler and
          python3 with Metal; tailscale where it is installed and tailscaled's socket does not
          answer; `service` runs systemctl, loginctl, useradd, launchctl or rc-service, and `doctor`
          asks them, ps and lsof on macOS (lsof with --tunnel, too); the engine that is started:
          ollama, vllm, sglang, llama-server or mlx_lm.server; mlx_lm.convert; with --tunnel ssh,
          which reads its keys and ~/.ssh/known_hosts, /etc/ssh/ssh_known_hosts, and writes none;
          `k3s install` sh with the vendor's installer, and k3s --version
threads   main (signals, systemd), membership (the requests to the gateway), gpus-VENDOR (asks one
          vendor's driver, and ends), control or gateway (accepts; another for the tailnet's
          address), and control-client or gateway-client for each connection to those, 64 or 256 at
          most; child-engine and child-engine-output, the same two of the tunnel's ssh, and tunnel
          (starts it again); first-token, inference-start, inference (looks at the engine), pull,
          import or convert NAME (4 at most), provenance (hashes files); tailnet (asks tailscaled,
          where there is a trace of it); pods (watches worker pods, looks for a kubeconfig once a
          minute, renews the agent's own token for k3s); k3s-token (renews, with
          k3s.service_account); dashboard (the terminal), dashboard-facts, dashboard-log,
          dashboard-start, -stop, -pull, -cancel or -doctor (what a key asks for, one of each);
          check-NAME (`doctor`)

To read it: sections stand in order, and each uses only names from above it.

   1 errors, exit codes, redaction, clock      12 HTTP server core, 12b metrics
   2 doors: files, programs, the network       14 control API
   3 settings: one table, YAML subset, flags   15a tunnel, 15b tailnet, 15c pods, 15d k3s
   4 log, events and snapshot                  16a dashboard: frame, 16b terminal
   5 host metrics                              17 embedded gateway
   6 GPUs, energy and carbon                   18 client: from b9agent import inference
   7 gateway client and membership             19 agent: the composition
   8 child processes, 9a model files           20 service, 20b doctor, 20c k3s
   9b engines, 9c models, 9d inference         21 commands, main
"""
import sys

if sys.version_info < (3, 8):
    sys.stderr.write("b9agent.py needs Python 3.8 or newer; this is %s (%s)\n"
                     % (sys.version.split()[0], sys.executable))
    sys.exit(2)

import os

if os.name != "posix":
    sys.stderr.write("b9agent.py runs on Linux and macOS; on Windows, run it inside WSL\n")
    sys.exit(2)

import collections
import contextlib
import enum
import functools
import io
import json
import re
import select
import signal
import socket
import stat
import threading
import time
from typing import (Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence,
                    Set, Tuple, Union)

VERSION = "0.1.0"


# ----------------------------------------------------------------------
# 1. Errors, exit codes, redaction, clock                       no effects
# ----------------------------------------------------------------------
# Every failure a user can meet is an AgentError: what happened, what to do
# about it, and the exit code that main() ends with.  Secrets are known to
# one Redactor, and every line that leaves the process goes through it.


class Exit(enum.IntEnum):
    """Exit codes of every command.  2, 3, 4 and 6 are permanent: no service manager restarts on
    them, because the same start would end the same way."""

    OK = 0
    FAILED = 1
    USAGE = 2
    TOKEN_REFUSED = 3
    REQUEST_REFUSED = 4
    UNREACHABLE = 5
    LOCKED = 6
    PRIVILEGE = 7
    UNHEALTHY = 8
    NO_SERVICE_MANAGER = 9
    DEFECT = 70


EXIT_MEANINGS = (
    (Exit.OK, "done, or stopped by a signal"),
    (Exit.FAILED, "an engine or a model did not do what was asked (`start`, `pull`, `models`, "
                  "`smoke`)"),
    (Exit.USAGE, "usage or configuration: the message names the flag, variable or line; "
                 "`doctor`: something here keeps the machine from ready"),
    (Exit.TOKEN_REFUSED, "the gateway refused the token"),
    (Exit.REQUEST_REFUSED, "the gateway refused the request: unknown pool, payload, "
                           "no keepalive route"),
    (Exit.UNREACHABLE, "gateway unreachable or unwell (`--once`, `doctor`); no agent running "
                       "(`status`, `top`, `metrics` …)"),
    (Exit.LOCKED, "another instance owns the state folder, or the port"),
    (Exit.PRIVILEGE, "more rights are needed (`service`, `k3s install`): run it with sudo"),
    (Exit.UNHEALTHY, "installed, but not healthy (`k3s install`); `service` has put the previous "
                     "version back"),
    (Exit.NO_SERVICE_MANAGER, "files installed, but no service manager here (`service`)"),
    (Exit.DEFECT, "a defect of ours: please report it"),
)
PERMANENT_EXITS = (Exit.USAGE, Exit.TOKEN_REFUSED, Exit.REQUEST_REFUSED, Exit.LOCKED)


class AgentError(Exception):
    """A failure with a message for a person: what happened, and a hint that mends it."""

    exit_code = Exit.DEFECT

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}. {self.hint}" if self.hint else self.what


class UsageError(AgentError):
    """A flag, a variable, a line of the config file, or a file's permissions."""
    exit_code = Exit.USAGE


class LockedError(AgentError):
    """Somebody else holds the state folder or the port."""
    exit_code = Exit.LOCKED


class GatewayError(AgentError):
    """What a request to the gateway came to when it was not "ok"."""
    exit_code = Exit.UNREACHABLE


class TokenRefused(GatewayError):
    """401 or 403: unknown, revoked, or another machine's token."""
    exit_code = Exit.TOKEN_REFUSED


class RequestRefused(GatewayError):
    """The gateway understood the request and will never accept it: pool, capacity, payload."""
    exit_code = Exit.REQUEST_REFUSED


class NoKeepaliveRoute(RequestRefused):
    """404 or 405: a gateway without the machine API's keepalive."""


class MachineNotFound(GatewayError):
    """The machine's time to live ran out, or it was never registered: register again."""


class GatewayUnwell(GatewayError):
    """It answered, but not usefully: 5xx, 429, a redirect, HTML, half a body."""

    def __init__(self, what: str, hint: str = "", retry_after_s: Optional[float] = None) -> None:
        super().__init__(what, hint)
        self.retry_after_s = retry_after_s


class GatewayUnreachable(GatewayError):
    """No answer: name, connection, TLS, time limit."""


class HttpFailure(Exception):
    """No usable answer came back.  kind: dns, refused, network, timeout, tls, proxy, closed,
    garbage, too_large."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def mask(secret: Optional[str]) -> str:
    """What may be shown of a secret.

    >>> mask("abcdefghijklmnop"), mask("short"), mask(None)
    ('…mnop', '…', '')
    """
    if not secret:
        return ""
    return "…" + secret[-4:] if len(secret) >= 12 else "…"


# C0, DEL, C1, line and paragraph separators, and the marks that reorder text on a terminal.
_UNPRINTABLE = {code: "\\x%02x" % code for code in (*range(0x20), *range(0x7F, 0xA0))}
_UNPRINTABLE.update({code: "\\u%04x" % code
                     for code in (0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F),
                                  *range(0x2066, 0x206A))})
_UNPRINTABLE.update({0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"})


def printable(text: str) -> str:
    """One line that a terminal or a log reader can be shown, whatever a peer sent.

    >>> printable("a\\nb\\x1b[2J")
    'a\\\\nb\\\\x1b[2J'
    """
    # A lone surrogate (from os.fsdecode or JSON "\ud800") cannot be written to a UTF-8 stream.
    return text.translate(_UNPRINTABLE).encode("utf-8", "backslashreplace").decode("utf-8")


class Redactor:
    """Replaces every known secret in a text by its mask.

    _lock guards _secrets, which is replaced whole and never changed in place.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._secrets: Tuple[str, ...] = ()

    def add(self, secret: Optional[str]) -> None:
        """Secrets under four characters would blot out half of every line; they are not added."""
        if not secret or len(secret) < 4:
            return
        with self._lock:
            known = set(self._secrets) | {secret}
            self._secrets = tuple(sorted(known, key=len, reverse=True))

    def scrub(self, text: str) -> str:
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, mask(secret))
        return text


REDACTOR = Redactor()
_STEADY_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now_s() -> float:
    """Seconds on a clock that never steps and goes on while the machine sleeps.

    Linux: CLOCK_BOOTTIME (CLOCK_MONOTONIC stands still in suspend).  macOS: CLOCK_MONOTONIC, which
    counts sleep there, while time.monotonic() (mach_absolute_time) does not.
    """
    return time.clock_gettime(_STEADY_CLOCK)


def rounded(record: Dict[str, Any]) -> Dict[str, Any]:
    """For people as much as for programs: three digits after the point are enough."""
    return {name: round(value, 3) if isinstance(value, float) else value
            for name, value in record.items()}


class Wake:
    """An event to wait on that no step of the wall clock can stretch.

    threading.Event.wait(timeout) sleeps until a wall-clock time before CPython 3.11 (bpo-41710):
    a clock set back by a day would hold a keepalive for a day.  poll() on a pipe counts seconds.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)

    def set(self) -> None:
        """Safe in a signal handler and from any thread; setting twice is setting once."""
        try:
            os.write(self._writer, b"!")
        except BlockingIOError:
            pass  # the pipe is full: it is set

    def wait(self, timeout_s: float) -> bool:
        """True if it was set, which also clears it; False after timeout_s."""
        if not self._poll.poll(max(0.0, timeout_s) * 1000):
            return False
        try:
            os.read(self._reader, 65536)
        except BlockingIOError:
            pass  # another waiter was faster
        return True

    def also_on_signals(self) -> None:
        """Every signal that has a handler sets it as well: the kernel may give a signal to any
        thread, and only the main one runs handlers, once it is awake."""
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def fileno(self) -> int:
        """For select(), beside other descriptors."""
        return self._reader

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


# ----------------------------------------------------------------------
# 2. Doors                                     files, programs, the network
# ----------------------------------------------------------------------
# Everything that touches the outside goes through one of these.  Each has a
# limit on time and on size, and none of them raises what its caller does not
# expect.


def read_text(path: str, max_bytes: int = 1 << 20) -> Optional[str]:
    """A small file's text, or None where there is none to read (/proc and /sys included)."""
    pieces, left = [], max_bytes
    try:
        with open(path, "rb", buffering=0) as handle:
            while left > 0:
                # Small pieces: for a megabyte malloc maps memory, twice the cost of a /proc file.
                piece = handle.read(min(left, 16384))
                if not piece:
                    break
                pieces.append(piece)
                left -= len(piece)
    except OSError:
        return None
    return b"".join(pieces).decode("utf-8", "replace")


def make_private_folder(path: str) -> None:
    """Make a folder 0700, and its parents.  An existing one stays as it is, for it may be shared on
    purpose; but where others can write they could put files of theirs in place of ours.

    Raises: UsageError.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.stat(path)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path}: {error.strerror}",
                         "Choose another with --state-dir, or mend its permissions") from error
    if status.st_uid not in (0, os.geteuid()):
        raise UsageError(f"the folder {path} belongs to another user",
                         "Run this as that user, or choose a folder of your own")
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise UsageError(f"other users may write in the folder {path}",
                         f"Choose a folder of your own, or close this one: chmod 700 {path}")


def remove_file(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def write_atomic(path: str, text: str, mode: int = 0o600) -> None:
    """Write a file whole or not at all: a reader sees the old text or the new, after a power cut
    too.  Raises OSError, with nothing left behind."""
    draft = f"{path}.{os.getpid()}.tmp"
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            os.fchmod(handle.fileno(), mode)
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, path)
    except BaseException:
        remove_file(draft)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError:
        pass  # some network file systems cannot sync a folder
    finally:
        os.close(folder)


def clean_environment() -> Dict[str, str]:
    """The environment for a child: without our secrets, and without systemd's notify socket, which
    would let the child speak for us."""
    return {name: value for name, value in os.environ.items()
            if name not in ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
            and not (name.startswith(("BETA9_", "B9AGENT_")) and name.endswith(("TOKEN", "PROXY")))}


class CommandResult(NamedTuple):
    """exit_code is None where the program is missing, was killed, or ran past its limit.  stuck:
    the child, where not even SIGKILL ended it."""
    exit_code: Optional[int]
    output: str
    problem: str = ""
    stuck: Any = None


def _read_until(descriptor: int, until_s: float, max_bytes: int) -> Tuple[bytes, str]:
    """(bytes, problem): all that comes until end of file, a deadline, or a size."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    collected = bytearray()
    while True:
        left_s = until_s - now_s()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            return bytes(collected), "ran past its time limit"
        chunk = os.read(descriptor, 65536)
        if not chunk:
            return bytes(collected), ""
        collected += chunk
        if len(collected) > max_bytes:
            return bytes(collected[:max_bytes]), f"printed more than {max_bytes} bytes"


def _kill(child: Any) -> None:
    """End a child and all that it started; wait a second for it."""
    import subprocess
    try:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(timeout=1.0)
    except (OSError, subprocess.TimeoutExpired):
        pass  # stuck in the kernel, or gone already


_RUNNING: List[Any] = []  # the children of run_command() now


def end_programs() -> None:
    """End what threads that nobody waits for have started, so that nothing outlives us."""
    for child in _RUNNING[:]:
        if child.returncode is None:  # nobody has reaped it: its group is its own, if it ended too
            _kill(child)


def run_command(argv: Sequence[str], limit_s: float, max_bytes: int = 1 << 20) -> CommandResult:
    """Run a program to its end, its stdout and stderr together; never longer than limit_s.

    A program stuck in the kernel (a hung driver) cannot be killed: it is left behind, not waited
    for.
    """
    import subprocess  # 9 ms that a machine without such programs never pays
    try:
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=dict(clean_environment(), LC_ALL="C"), start_new_session=True)
    except OSError as error:
        return CommandResult(None, "", f"{argv[0]}: {error.strerror}")
    _RUNNING.append(child)
    until_s = now_s() + limit_s
    output, problem = _read_until(child.stdout.fileno(), until_s, max_bytes)
    child.stdout.close()
    try:
        child.wait(timeout=0.0 if problem else max(0.1, until_s - now_s()))
    except subprocess.TimeoutExpired:
        problem = problem or "ran past its time limit"
    if problem:
        _kill(child)
    elif child.returncode < 0:
        problem = f"was ended by signal {-child.returncode}"
    _RUNNING.remove(child)
    return CommandResult(None if problem else child.returncode, output.decode("utf-8", "replace"),
                         problem and f"{argv[0]} {problem}",
                         child if child.returncode is None else None)


def read_link(path: str) -> str:
    """Where a link leads; "" where it cannot be read."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def process_name(pid: int) -> str:
    """For a person: `python3, pid 7`."""
    name = printable((read_text(f"/proc/{pid}/comm", 64) or "").strip())
    return f"{name}, pid {pid}" if name else f"pid {pid}"


def parse_listeners(text: str, port: int) -> List[str]:
    """Inodes of the sockets that listen on a port, of all addresses, in /proc/net/tcp or tcp6.
    Source: proc(5); state 0A listens."""
    rows = re.findall(r"(?m)^ *[0-9]+: [0-9A-F]+:([0-9A-F]{4}) \S+ 0A(?: +\S+){5} +([0-9]+)", text)
    return [inode for number, inode in rows if int(number, 16) == port]


def _listener(port: int, pid: Optional[int] = None) -> str:
    """Who listens on a port, as far as this user may see it: root all, others their own.  pid: ""
    unless that process does."""
    if sys.platform == "darwin":
        shown = run_command(["lsof", "-nP", "-a", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"]
                            + (["-p", str(pid)] if pid else []), 10.0).output
        match = re.search("(?m)^p([0-9]+)\nc(.+)$", shown)
        return printable(f"{match.group(2)}, pid {match.group(1)}") if match else ""
    import glob
    sockets = {f"socket:[{inode}]" for name in ("tcp", "tcp6")
               for inode in parse_listeners(read_text(f"/proc/net/{name}") or "", port)}
    paths = glob.iglob(f"/proc/{pid or '[0-9]*'}/fd/*") if sockets else ()
    return next((process_name(int(path.split("/")[2])) for path in paths
                 if read_link(path) in sockets), "")


def port_holder(host: str, port: int) -> Optional[str]:
    """None where a server could listen (it is bound, and let go of at once); else who prevents
    it: `python3, pid 7`, or `another program`.  Raises: OSError for what is no address of ours."""
    import errno
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return None
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    return _listener(port) or "another program"


def find_program(name: str, search_path: Optional[str] = None) -> Optional[str]:
    """search_path: folders as in PATH, which is also the default."""
    path = os.environ.get("PATH", os.defpath) if search_path is None else search_path
    programs = (os.path.join(folder, name) for folder in path.split(":") if folder)
    return next((program for program in programs
                 if os.access(program, os.X_OK) and os.path.isfile(program)), None)


def host_port(host: str, port: int) -> str:
    """
    >>> host_port("::1", 1994), host_port("gw", 80)
    ('[::1]:1994', 'gw:80')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def _private_path(text: str) -> Iterator[str]:
    """Where a library can read a secret: in memory; without that (macOS), in a file that only we
    can read and that is gone at once."""
    try:
        descriptor, kept = os.memfd_create("b9agent"), ""
    except (AttributeError, OSError):
        import tempfile
        descriptor, kept = tempfile.mkstemp(prefix="b9agent-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            yield kept or f"/proc/self/fd/{descriptor}"
    finally:
        if kept:
            remove_file(kept)


class TlsIdentity:
    """A server's authority, "" for the system's, and a client's certificate with its key, "" for
    none, both as PEM.  No NamedTuple, so that printing one shows no key."""

    def __init__(self, ca_pem: str, client_pem: str = "") -> None:
        self.ca_pem, self._client_pem = ca_pem, client_pem
        self._context: Any = None

    def context(self) -> Any:
        """Raises: HttpFailure."""
        if self._context is None:
            import ssl
            try:
                context = ssl.create_default_context(cadata=self.ca_pem or None)
                # Since 3.13 Python asks for extensions that k3s's authorities did not always have.
                context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
                if self._client_pem:
                    with _private_path(self._client_pem) as path:
                        context.load_cert_chain(path, password="")  # "": nobody is asked for one
                self._context = context
            except (OSError, ValueError, TypeError) as error:  # SSLError; no ASCII
                raise HttpFailure("tls", "the certificates for it cannot be used: "
                                  f"{getattr(error, 'reason', None) or error}") from error
        return self._context


class Endpoint(NamedTuple):
    """Where an HTTP server is.  proxy: host, port and Proxy-Authorization value, or None.  dial:
    where to connect instead: the near end of a tunnel to it, or the path of a unix socket.  tls:
    instead of ca_file.  check: called once it is connected; raises where nothing is to be sent."""
    scheme: str
    host: str
    port: int
    ca_file: Optional[str] = None
    proxy: Optional[Tuple[str, int, str]] = None
    dial: Union[None, str, Tuple[str, int]] = None
    tls: Optional[TlsIdentity] = None
    check: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"{self.scheme}://{host_port(self.host, self.port)}"


class HttpReply(NamedTuple):
    """headers: names in lower case; of a repeated header the last value."""
    status: int
    headers: Dict[str, str]
    body: bytes


def _left_s(until_s: float) -> float:
    left_s = until_s - now_s()
    if left_s <= 0:
        raise socket.timeout("time limit reached")
    return left_s


class _TimedSocket(io.RawIOBase):
    """A connected socket with one deadline for everything that is read from it.

    A socket's own timeout starts anew at every byte, so a peer that drips would hold us for ever.
    """

    def __init__(self, sock: socket.socket, until_s: float) -> None:
        super().__init__()
        self._sock = sock
        self._until_s = until_s

    def allow(self, limit_s: float) -> None:
        """A new deadline, from now."""
        self._until_s = now_s() + limit_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._sock.settimeout(_left_s(self._until_s))
        return self._sock.recv_into(buffer)


def _http_failure(error: Exception) -> HttpFailure:
    """The kind of an exception from sockets or TLS."""
    detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
    ssl = sys.modules.get("ssl")  # half of it, while another thread imports it
    if isinstance(error, getattr(ssl, "SSLCertVerificationError", ())):
        return HttpFailure("tls", f"certificate not accepted: {error.verify_message}")
    if isinstance(error, getattr(ssl, "SSLError", ())):
        return HttpFailure("tls", error.reason or detail)
    if isinstance(error, ConnectionRefusedError):
        return HttpFailure("refused", "connection refused")
    if isinstance(error, ConnectionError):
        return HttpFailure("closed", "the connection was closed before the answer was complete")
    return HttpFailure("network", detail)


def _connect(host: str, port: int, until_s: float) -> socket.socket:
    """Try every address of a name in turn; the time that is left is shared among them."""
    try:
        # As bytes: for text, Python loads its tables of international names (1 ms).
        found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise HttpFailure("dns", f"cannot look up {host}: {reason}") from error
    problem: Exception = HttpFailure("dns", f"{host} has no address")
    for position, (family, kind, protocol, _, address) in enumerate(found):
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(_left_s(until_s) / (len(found) - position))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            if sock is not None:
                sock.close()
            # "Refused" says more than another address's "no such network".
            if not isinstance(problem, ConnectionRefusedError):
                problem = error
    raise problem


def _connect_path(path: str, until_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(_left_s(until_s))
        sock.connect(path)
        return sock
    except BaseException:
        sock.close()
        raise


def _read_line(stream: io.BufferedReader, left_bytes: int) -> bytes:
    """A line with its end.  Raises: HttpFailure where the peer stops in the middle of it."""
    line = stream.readline(left_bytes)
    if not line.endswith(b"\n"):
        if len(line) >= left_bytes:
            raise HttpFailure("too_large", "an answer whose head is too long")
        raise HttpFailure("closed", "the connection was closed before the answer was complete")
    return line


def _read_head(stream: io.BufferedReader) -> Tuple[str, Dict[str, str]]:
    """(status line, headers with names in lower case)."""
    left_bytes, lines = 65536, []
    while True:
        line = _read_line(stream, left_bytes)
        left_bytes -= len(line)
        text = line.rstrip(b"\r\n").decode("latin-1")
        if not text:
            break
        lines.append(text)
    pairs = [line.partition(":") for line in lines[1:]]
    if not lines or any(not colon or name != name.strip() for name, colon, _ in pairs):
        raise HttpFailure("garbage", "not an HTTP answer")
    return lines[0], {name.lower(): value.strip() for name, _, value in pairs}


def _tunnel(sock: socket.socket, endpoint: Endpoint, until_s: float) -> None:
    target = host_port(endpoint.host, endpoint.port)
    head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
    if endpoint.proxy[2]:
        head += f"Proxy-Authorization: {endpoint.proxy[2]}\r\n"
    sock.settimeout(_left_s(until_s))
    sock.sendall((head + "\r\n").encode("ascii"))
    # A byte at a time: what follows the head belongs to TLS.
    first, _ = _read_head(io.BufferedReader(_TimedSocket(sock, until_s), 1))
    if not re.match("HTTP/1[.][01] 2", first):
        raise HttpFailure("proxy", f"the proxy answered {printable(first[:80])}")


_TLS_CONTEXTS: Dict[Any, Any] = {}


def _tls_context(ca_file: Optional[str]) -> Any:
    """Kept, because it takes 20 ms to make; made anew when the CA file changes."""
    import ssl
    try:
        key = (ca_file, ca_file and os.stat(ca_file).st_mtime_ns)
        context = _TLS_CONTEXTS.get(key)
        if context is None:
            context = ssl.create_default_context(cafile=ca_file)
            _TLS_CONTEXTS.clear()  # and another thread may do so now
            _TLS_CONTEXTS[key] = context
        return context
    except (OSError, ssl.SSLError) as error:
        raise HttpFailure("tls", f"cannot use {ca_file}: {error}") from error


def _open_connection(endpoint: Endpoint, until_s: float) -> socket.socket:
    """A connected socket, through the proxy's CONNECT and under TLS where that is asked for."""
    if isinstance(endpoint.dial, str):
        return _connect_path(endpoint.dial, until_s)
    target = endpoint.proxy[:2] if endpoint.proxy else (
        endpoint.dial or (endpoint.host, endpoint.port))
    try:
        sock = _connect(target[0], target[1], until_s)
    except (OSError, HttpFailure) as error:
        if endpoint.proxy is None:
            raise
        raise HttpFailure("proxy", f"the proxy {host_port(*target)} cannot be reached: "
                          f"{getattr(error, 'strerror', None) or error}") from error
    try:
        endpoint.check()
        if endpoint.scheme == "http":
            return sock
        if endpoint.proxy:
            _tunnel(sock, endpoint, until_s)
        context = endpoint.tls.context() if endpoint.tls else _tls_context(endpoint.ca_file)
        sock.settimeout(_left_s(until_s))
        return context.wrap_socket(sock, server_hostname=endpoint.host)
    except BaseException:
        sock.close()
        raise


def _pieces_of(stream: io.BufferedReader, length: int) -> Iterator[bytes]:
    while length > 0:
        piece = stream.read1(min(length, 65536))
        if not piece:
            raise HttpFailure("closed", "the answer was cut off")
        length -= len(piece)
        yield piece


def _chunks(stream: io.BufferedReader) -> Iterator[bytes]:
    """A chunked body.  Source: RFC 9112, section 7.1."""
    while True:
        size = _read_line(stream, 1024).split(b";")[0].strip()
        if not re.fullmatch(b"[0-9a-fA-F]{1,8}", size):
            raise HttpFailure("garbage", "a chunk without a length")
        if int(size, 16) == 0:
            while _read_line(stream, 65536).strip():
                pass  # trailers
            return
        yield from _pieces_of(stream, int(size, 16))
        if _read_line(stream, 3).strip():
            raise HttpFailure("garbage", "a chunk longer than it says")


class Upload(NamedTuple):
    """A body that is sent as it is read."""
    length: int
    pieces: Iterable[bytes]


@contextlib.contextmanager
def _http_failures(slow: str) -> Iterator[None]:
    """Whatever a socket does is a HttpFailure.  slow: what to say of a time limit."""
    try:
        yield
    except HttpFailure:
        raise
    except socket.timeout as error:
        raise HttpFailure("timeout", slow) from error
    except (OSError, ValueError) as error:  # ValueError: closed by another thread
        raise _http_failure(error) from error


class HttpStream:
    """An answer that is read as it comes.  A head or a body that was cut off is a failure, never a
    short answer (http.client takes half a head for a whole one, and costs 14 ms to import).

    The head is there within limit_s; so is the body, unless the peer may go on for ever and be
    silent for idle_limit_s at most.
    """

    def __init__(self, sock: socket.socket, method: str, limit_s: float, until_s: float,
                 idle_limit_s: Optional[float]) -> None:
        self._sock = sock
        self._source = source = _TimedSocket(sock, until_s)
        self._idle_limit_s = idle_limit_s
        self._slow = (f"no answer within {limit_s:g} s" if idle_limit_s is None else
                      f"the answer stopped for {idle_limit_s:g} s")
        self._stream = io.BufferedReader(source)
        self.status = 100
        for _ in range(10):
            first, self.headers = _read_head(self._stream)
            match = re.fullmatch(r"HTTP/1\.[01] ([1-5][0-9]{2})( .*)?", first)
            if not match:
                raise HttpFailure("garbage", "not an HTTP answer")
            self.status = int(match.group(1))
            if self.status >= 200:
                break
        length = self.headers.get("content-length")
        if self.status < 200 or length and (not re.fullmatch("[0-9]{1,15}", length)
                                            or "transfer-encoding" in self.headers):
            raise HttpFailure("garbage", "an answer without a clear end")
        if method == "HEAD" or self.status in (204, 304):
            self._body: Iterator[bytes] = iter(())
        elif self.headers.get("transfer-encoding"):
            self._body = _chunks(self._stream)
        elif length:
            self._body = _pieces_of(self._stream, int(length))
        else:
            self._body = iter(lambda: self._stream.read1(65536), b"")

    def pieces(self) -> Iterator[bytes]:
        """What is left of the body.  Raises: HttpFailure."""
        with _http_failures(self._slow):
            while True:
                if self._idle_limit_s is not None:
                    self._source.allow(self._idle_limit_s)
                piece = next(self._body, None)
                if piece is None:
                    return
                yield piece

    def lines(self, max_bytes: int = 1 << 20) -> Iterator[bytes]:
        """Lines without their ends; the last one may lack one.  Raises: HttpFailure."""
        rest = bytearray()  # added to, not made anew: a peer may send a long line in small bits
        for piece in self.pieces():
            *whole, last = piece.split(b"\n")
            if whole:
                yield bytes(rest) + whole[0]
                yield from whole[1:]
                rest = bytearray()
            rest += last
            if len(rest) > max_bytes:
                raise HttpFailure("too_large", f"a line of more than {max_bytes} bytes")
        if rest:
            yield bytes(rest)

    def read(self, max_bytes: int = 1 << 20) -> bytes:
        """The rest of the body.  Raises: HttpFailure."""
        body = bytearray()
        for piece in self.pieces():
            body += piece
            if len(body) > max_bytes:
                raise HttpFailure("too_large", f"an answer of more than {max_bytes} bytes")
        return bytes(body)

    def cut(self) -> None:
        """From any thread: who reads it now gets a HttpFailure.  The descriptor stays until
        close(): its number could be another's before the reader has looked up."""
        try:
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster, or it is closed

    def close(self) -> None:
        """By the one who reads it."""
        self._sock.close()

    def __enter__(self) -> "HttpStream":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _request_head(method: str, endpoint: Endpoint, path: str, headers: Dict[str, str],
                  body_bytes: Optional[int]) -> bytes:
    absolute = endpoint.url if endpoint.proxy and endpoint.scheme == "http" else ""
    fields = {"Host": host_port(endpoint.host, endpoint.port), "Accept": "application/json",
              "User-Agent": f"b9agent/{VERSION}", "Connection": "close", **headers}
    if absolute and endpoint.proxy[2]:
        fields["Proxy-Authorization"] = endpoint.proxy[2]
    if body_bytes is not None:
        fields["Content-Length"] = str(body_bytes)
    head = [f"{method} {absolute}{path} HTTP/1.1"]
    head += [f"{name}: {value}" for name, value in fields.items()]
    if any(char in line for line in head for char in "\r\n\0"):
        raise HttpFailure("garbage", "a header or path with a line break was not sent")
    return "\r\n".join(head + ["", ""]).encode("utf-8")


def _send_upload(sock: socket.socket, upload: Upload, idle_limit_s: float) -> None:
    """A peer that has seen enough may answer and close before the end: then its answer counts."""
    try:
        for piece in upload.pieces:
            sock.settimeout(idle_limit_s)
            sock.sendall(piece)
    except (BrokenPipeError, ConnectionResetError):
        pass


def http_stream(method: str, endpoint: Endpoint, path: str, headers: Dict[str, str],
                body: Any, limit_s: float, idle_limit_s: Optional[float] = None) -> HttpStream:
    """One request on a connection of its own; the head of the answer is there within limit_s (a
    name look-up and an upload apart).  body: bytes, an Upload, or None.

    Redirects are answers like any other: nothing is followed, so a token goes nowhere else.
    Raises: HttpFailure.
    """
    until_s = now_s() + limit_s
    upload = body if isinstance(body, Upload) else None
    size = upload.length if upload else None if body is None else len(body)
    head = _request_head(method, endpoint, path, headers, size)
    with _http_failures(f"no answer within {limit_s:g} s"):
        sock = _open_connection(endpoint, until_s)
        try:
            sock.settimeout(_left_s(until_s))
            sock.sendall(head + (b"" if upload else body or b""))
            if upload:
                _send_upload(sock, upload, limit_s)
                until_s = now_s() + limit_s
            return HttpStream(sock, method, limit_s, until_s, idle_limit_s)
        except BaseException:
            sock.close()
            raise


def http_request(method: str, endpoint: Endpoint, path: str, headers: Dict[str, str],
                 body: Optional[bytes], limit_s: float, max_bytes: int = 1 << 20) -> HttpReply:
    """One request and its answer, whole within limit_s.  Raises: HttpFailure, as http_stream()."""
    with http_stream(method, endpoint, path, headers, body, limit_s) as stream:
        return HttpReply(stream.status, stream.headers, stream.read(max_bytes))


# ----------------------------------------------------------------------
# 3a. The YAML subset                                          no effects
# ----------------------------------------------------------------------
# Mappings and lists, in blocks or on one line, plain and quoted scalars,
# comments.  All scalars stay text: the table of settings decides, so that
# machine id 12345678 or 1e100000 is no number.  What is not supported is
# refused by name and line, and what is accepted means the same to PyYAML.


class Node(NamedTuple):
    """value: text, {name: Node} or [Node]; plain: an unquoted scalar."""
    value: Any
    line: int
    plain: bool = False


class YamlError(Exception):
    def __init__(self, line: int, what: str, expected: str) -> None:
        super().__init__(f"{what}, expected {expected}")
        self.line = line


_YAML_REFUSED = {
    "&": "an anchor (&)", "*": "an alias (*)", "!": "a tag (!)", "|": "a block of text (|)",
    ">": "a folded block of text (>)", "%": "a directive (%)", "@": "the reserved character @",
    "`": "the reserved character `", "?": "a complex key (?)", "<": "a merge (<<)",
}
_YAML_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", '"': '"', "\\": "\\", "/": "/",
                 "a": "\a", "b": "\b", "e": "\x1b", "f": "\f", "v": "\v", " ": " "}
_YAML_MAX_DEPTH = 8
_YAML_QUOTED = {"'": r"'(?:[^']|'')*'(?!')", '"': r'"(?:[^"\\]|\\.)*"'}
_YAML_NAME = r"[\w.](?:[\w. /-]*[\w./-])?"
_YAML_PLAIN = (r"(?:[^][{},#:-]|[:-](?=[^ ]))"                        # the first character
               r"(?:[^ :#]|(?<! )#|:(?=[^ ])| +(?=[^ #]))*")       # ` #` and `: ` end it
_YAML_FLOW_PLAIN = r"""[^][{},:#?\\"'-][^][{},:#?\\"']*"""  # what no reader takes otherwise


class _YamlLine:
    """A line that says something, without the blanks around it, and how far it is read."""

    def __init__(self, number: int, indent: int, text: str) -> None:
        self.number = number
        self.indent = indent
        self.text = text
        self.is_item = text == "-" or text.startswith("- ")
        self._at = 0

    def error(self, what: str, expected: str) -> YamlError:
        return YamlError(self.number, what, expected)

    def take(self, pattern: str) -> Optional[str]:
        """What matches here, and is read then; None where it does not."""
        match = re.compile(pattern).match(self.text, self._at)
        if match is None:
            return None
        self._at = match.end()
        return match.group()

    def next_char(self) -> str:
        return self.text[self._at:self._at + 1]

    def name(self) -> str:
        """A name with its colon and what blanks follow."""
        rest = self.text[self._at:]
        name = self._scalar(_YAML_NAME, "`name: value`")
        if name is None or len(name) > 512 or self.take(" *:( +|$)") is None:
            # The line may hold a secret: what does not look like a setting's name is not shown.
            shown = rest.split(":", 1)[0]
            shown = f"`{shown}`" if re.fullmatch("[a-z][a-z_.]{0,24}", shown) else "this line"
            raise self.error(f"{shown} is no name with a value",
                             "`name: value`, with a blank after the colon")
        return name

    def begins_mapping(self) -> bool:
        """In a list: whether what is left is the first line of a mapping."""
        pattern = "|".join((_YAML_NAME, *_YAML_QUOTED.values()))
        return re.match(f"({pattern}) *:( |$)", self.text[self._at:]) is not None

    def rest(self) -> "_YamlLine":
        """What is left, as a line that begins where it stands."""
        return _YamlLine(self.number, self.indent + self._at, self.text[self._at:])

    def value(self, depth: int, closing: str = "") -> Node:
        """A scalar, [a, b] or {a: b}.  closing: the bracket that ends what it stands in."""
        char = self.next_char()
        if char and char in "[{":
            return self._flow({"[": "]", "{": "}"}[char], depth)
        text = self._scalar(_YAML_FLOW_PLAIN if closing else _YAML_PLAIN, "a plain or quoted value")
        if text is None:
            raise self.error(f"a value that begins with `{char}`" if char else "no value",
                             "a plain value, or quotes around it")
        return Node(text, self.number, char not in _YAML_QUOTED)

    def refuse_depth(self, depth: int) -> None:
        if depth > _YAML_MAX_DEPTH:
            raise self.error("too many levels", f"at most {_YAML_MAX_DEPTH}")

    def _flow(self, closing: str, depth: int) -> Node:
        """A list is read as a mapping whose names are numbers."""
        self.refuse_depth(depth)
        found: Dict[Any, Node] = {}
        self.take(r"[\[{] *")
        while self.take(closing) is None:
            if not self.next_char():
                raise self.error("a list or mapping that does not end on its line", f"`{closing}`")
            name = self.name() if closing == "}" else len(found)
            if name in found:
                raise self.error(f"`{printable(name)}` is given twice", "each name once")
            found[name] = self.value(depth + 1, closing)
            self.take(" *")
            if self.take(f", *|(?={closing})|$") is None:
                raise self.error(f"`{self.next_char()}` after a value",
                                 f"`,` or `{closing}`, or quotes around the value")
        return Node(found if closing == "}" else list(found.values()), self.number)

    def _scalar(self, plain: str, expected: str) -> Optional[str]:
        """A quoted text, or what the pattern matches; None where it does not."""
        mark = self.next_char()
        if mark in _YAML_REFUSED:
            raise self.error(f"{_YAML_REFUSED[mark]} is not supported", expected)
        if mark not in _YAML_QUOTED:
            text = self.take(plain)
            return text and text.rstrip(" ")
        text = self.take(_YAML_QUOTED[mark])
        if text is None:
            raise self.error(f"a text that begins with {mark} has no end",
                             f"a second {mark} on the same line")
        if mark == "'":
            return text[1:-1].replace("''", "'")
        return re.sub(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", self._unescape,
                      text[1:-1])

    def _unescape(self, match: Any) -> str:
        escape = match.group(1)
        code = int(escape[1:], 16) if len(escape) > 1 else ord(_YAML_ESCAPES.get(escape, "\ud800"))
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise self.error(f"the escape \\{escape[0]}", 'one of \\n \\t \\" \\\\ \\xNN \\uNNNN')
        return chr(code)


def _yaml_check_characters(raw: str, number: int) -> None:
    bad = next((char for char in raw if printable(char) != char and char != "\t"
                or char in "\ufeff\ufffe\uffff"), None)
    if bad is not None:
        raise YamlError(number, f"the control character {ascii(bad)[1:-1]}", "printable text")
    if len(raw) > 8192:
        raise YamlError(number, "a line of more than 8192 characters", "a shorter one")
    if "\t" in raw and not raw.lstrip(" ").startswith("#"):
        raise YamlError(number, "a tab", 'spaces, or \\t between double quotes')


def _yaml_lines(text: str) -> List[_YamlLine]:
    """Lines that say something, their comments still on them."""
    found: List[_YamlLine] = []
    marked = False
    for number, raw in enumerate(text[text.startswith("\ufeff"):].split("\n"), 1):
        raw = raw[:-1] if raw.endswith("\r") else raw
        _yaml_check_characters(raw, number)
        bare = raw.strip(" ")
        if not bare or bare.startswith("#"):
            continue
        if re.match(r"(---|\.\.\.)( |$)", raw):
            if found or marked or not re.fullmatch("--- *(#.*)?", raw):
                raise YamlError(number, f"a document marker ({raw[:3]})", "one document")
            marked = True
            continue
        found.append(_YamlLine(number, len(raw) - len(raw.lstrip(" ")), bare))
    return found


def _yaml_block(lines: List[_YamlLine], depth: int) -> Node:
    """The mapping or list that the next line begins.  lines: what is to come, the next one last."""
    first, found = lines[-1], {}
    first.refuse_depth(depth)
    while lines[-1].indent >= first.indent:
        line = lines[-1]
        if line.indent > first.indent:
            raise line.error("this line is indented more than the one it follows",
                             f"{first.indent} spaces before it, or a value on the line above")
        if line.is_item != first.is_item:
            break
        lines.pop()
        name: Any = len(found) if line.take("-( +|$)") is not None else line.name()
        if name in found:
            raise line.error(f"`{printable(name)}` is given twice, first in line "
                             f"{found[name].line}", "each name once")
        node, below = Node("", line.number, True), lines[-1]
        if first.is_item and line.begins_mapping():
            lines.append(line.rest())
            node = _yaml_block(lines, depth + 1)
        elif line.next_char() not in ("", "#"):
            node = line.value(depth + 1)
            if line.take("( +#.*)?$") is None:
                raise line.error("something after the end of the value",
                                 "quotes around it all, a comment, or the end of the line")
        elif below.indent > line.indent or (below.indent == line.indent and below.is_item
                                            and not line.is_item):
            node = _yaml_block(lines, depth + 1)
        found[name] = node._replace(line=line.number)
    return Node(list(found.values()) if first.is_item else found, first.number)


def parse_yaml(text: str) -> Node:
    """The file as one Node, a mapping.  Raises: YamlError with the line."""
    lines = [_YamlLine(0, -1, "")] + _yaml_lines(text)[::-1]
    if len(lines) == 1:
        return Node({}, 1)
    node = _yaml_block(lines, 0)
    if len(lines) > 1:
        raise lines[-1].error("this line is indented less than the first",
                              "the same indentation for all names of one level")
    if not isinstance(node.value, dict):
        raise YamlError(node.line, "this is not a mapping", "lines of the form `name: value`")
    return node


def _yaml_scalar(text: str) -> str:
    """Plain where no YAML reader could take it for anything but this text (or a plain number)."""
    if re.fullmatch(r"([a-z][a-z_]*|0|[1-9][0-9]*)", text) and text not in (
            "y", "n", "yes", "no", "on", "off", "true", "false", "null"):
        return text
    # JSON writes what is beyond 16 bits as two escapes, which YAML does not join again.
    return '"' + "".join(json.dumps(char)[1:-1] if char in '"\\' else char
                         if " " <= char <= "~" else f"\\U{ord(char):08x}" for char in text) + '"'


def render_yaml(tree: Dict[str, Any], indent: str = "") -> str:
    """A tree of text, lists of text and mappings as a file that parse_yaml reads back."""
    out = []
    for name, value in tree.items():
        if isinstance(value, list):
            shown = f" [{', '.join(map(_yaml_scalar, value))}]\n"
        elif isinstance(value, str):
            shown = f" {_yaml_scalar(value)}\n"
        else:
            shown = f"\n{render_yaml(value, indent + '  ')}" if value else " {}\n"
        out.append(f"{indent}{_yaml_scalar(name)}:{shown}")
    return "".join(out)


# ----------------------------------------------------------------------
# 3b. Settings                      reads the config file, the token file
# ----------------------------------------------------------------------
# One table.  The parser, --help, `config`, the config file's names and the
# README's table come out of it.  Flags > environment > file > defaults.
# Text becomes a value in one place per type, whatever the text came from.


def parse_text(text: str) -> str:
    if not 0 < len(text) <= 200 or printable(text) != text or text != text.strip():
        raise ValueError("1 to 200 characters, no control characters, no blanks around them")
    return text


def matching(pattern: str, expected: str,
             convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """A parser for text that a pattern matches as a whole."""
    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError(expected)
        return convert(text)
    return parse


def number_within(what: str, lowest: int, highest: int,
                  kind: Callable[[str], Any] = float) -> Callable[[str], Any]:
    """A parser for a number without sign or exponent; of kind int also without a point."""
    pattern = "[0-9]{1,8}" if kind is int else r"[0-9]{1,6}(\.[0-9]{1,3})?"

    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text) or not lowest <= kind(text) <= highest:
            raise ValueError(f"{what}, {lowest} to {highest}")
        return kind(text)
    return parse


def one_of(*words: str) -> Callable[[str], str]:
    return matching("|".join(words), " or ".join(words))


ENGINE_NAMES = ("ollama", "vllm", "sglang", "llama-server", "mlx")
parse_secret = matching("[!-~]+", "one word of printable ASCII characters")
parse_machine_id = matching("[0-9a-fA-F]{8}", "8 hexadecimal digits, as `machine create` prints "
                            "them", str.lower)
parse_port = number_within("a port", 1, 65535, int)
parse_listen_port = number_within("a port, or 0 for a free one", 0, 65535, int)
parse_switch = matching("(?ai)true|yes|on|1|false|no|off|0", "true or false",
                        lambda text: text.lower() in ("true", "yes", "on", "1"))
parse_kube_name = matching("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "lower-case letters, digits and "
                           "dashes, 63 at most")
parse_token_hours = number_within("hours", 1, 168, int)
parse_proxy = matching(r"none|http://([^\s@/]+@)?(\[[0-9a-fA-F:.]+\]|[\w.-]+):[0-9]{1,5}/?",
                       "http://HOST:PORT of a proxy, or none")
_GPU_ID = r"\s*((nvidia|amd|intel|apple):)?[0-9]{1,3}\s*"
parse_gpu_ids = matching(
    f"{_GPU_ID}(,{_GPU_ID})*", "GPU indexes with commas between them, such as 0,1 or amd:0",
    lambda text: tuple(sorted({(word.rpartition(":")[0].strip(), int(word.rpartition(":")[2]))
                               for word in text.split(",")})))


def parse_host(text: str) -> str:
    """A host name, IPv4 or IPv6 address; `[::1]` loses its brackets."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if bare.count(":") == 1 or not re.fullmatch("[A-Za-z0-9_.:%][A-Za-z0-9_.:%-]{0,252}", bare):
        raise ValueError("a host name or an IP address alone, without scheme, port or path")
    return bare


def split_tunnel(text: str) -> Tuple[str, str, int]:
    """
    >>> split_tunnel("beta9@gw.example"), split_tunnel("me@[::1]:2222")
    (('beta9', 'gw.example', 22), ('me', '::1', 2222))
    """
    match = re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,63})@(\[[^\]]*\]|[^:\[\]]+)"
                         "(?::([0-9]{1,5}))?", text)
    if not match:
        raise ValueError("USER@HOST or USER@HOST:PORT, an IPv6 address in brackets")
    return match.group(1), parse_host(match.group(2)), parse_port(match.group(3) or "22")


def split_server(text: str) -> Tuple[str, int]:
    """
    >>> split_server("https://127.0.0.1:6443"), split_server("https://[::1]/")
    (('127.0.0.1', 6443), ('::1', 443))
    """
    match = re.fullmatch(r"https://(\[[^\]]*\]|[^:/\[\]]+)(?::([0-9]{1,5}))?/?", text)
    if not match:
        raise ValueError("https://HOST or https://HOST:PORT, without a path")
    return parse_host(match.group(1)), parse_port(match.group(2) or "443")


def parse_server(text: str) -> str:
    split_server(text)
    return text


def parse_tunnel(text: str) -> str:
    split_tunnel(text)
    return text


def parse_interval(text: str) -> float:
    """Seconds.  The gateway forgets a machine after 300 s, so one lost keepalive must fit in."""
    return number_within("seconds", 1, 150)(text[:-1] if text.endswith("s") else text)


def parse_cpu(text: str) -> int:
    """Millicores, from cores ("8", "0.5") or millicores ("8000m")."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)(m?)", text)
    millicores = 0 if not match else float(match.group(1)) * (1 if match.group(2) else 1000)
    if millicores < 1 or millicores != int(millicores):
        raise ValueError('cores ("8", "0.5") or millicores ("8000m")')
    return int(millicores)


def parse_memory(text: str) -> int:
    """Bytes, a whole number of KiB."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([KMGT])i", text)
    kib = int(float(match.group(1)) * 1024 ** "KMGT".index(match.group(2))) if match else 0
    if kib < 1024:
        raise ValueError('a size such as "16Gi" or "32768Mi", at least 1Mi')
    return kib << 10


def parse_path(text: str) -> str:
    if not text or printable(text) != text or os.path.expanduser(text).startswith("~"):
        raise ValueError("a path; after `~` only a user who is known here")
    return os.path.abspath(os.path.expanduser(text))


def parse_path_or_none(text: str) -> str:
    return text if text == "none" else parse_path(text)


class Setting(NamedTuple):
    """A row.  path: place in the config file, None where a file cannot say it; flat: its key names
    it there as well, as in the predecessors' files.  kind: metavar of the flag, "" for a switch.
    default: as a user would write it, "" for none."""
    key: str
    variable: str
    path: Optional[str]
    kind: str
    parse: Callable[[str], Any]
    help: str
    default: str = ""
    flat: bool = False
    secret: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def also(self) -> str:
        return self.key if self.flat else ""


SETTINGS = (
    Setting("token", "BETA9_TOKEN", "machine.token", "TOKEN", parse_secret,
            "machine token, from `machine create`; on a command line `ps` shows it to every user",
            flat=True, secret=True),
    Setting("token_file", "B9AGENT_TOKEN_FILE", "machine.token_file", "PATH", parse_path,
            "file, mode 0600, that holds the machine token", flat=True),
    Setting("machine_id", "BETA9_MACHINE_ID", "machine.id", "ID", parse_machine_id,
            "8 hex digits; else the kept one, else made once and kept", flat=True),
    Setting("hostname", "BETA9_HOSTNAME", "machine.hostname", "HOST", parse_host,
            "what the gateway dials to reach this machine's k3s; default: the tailnet address, or "
            "`machine-<machine id>`",
            flat=True),
    Setting("provider_name", "BETA9_PROVIDER_NAME", "machine.provider", "NAME", parse_text,
            "provider the machine belongs to", default="generic", flat=True),
    Setting("pool_name", "BETA9_POOL_NAME", "pool", "NAME", parse_text,
            "worker pool; it must exist in the gateway's configuration", default="external",
            flat=True),
    Setting("gateway_host", "BETA9_GATEWAY_HOST", "gateway.host", "HOST", parse_host,
            "gateway's host name or address", default="localhost"),
    Setting("gateway_port", "BETA9_GATEWAY_PORT", "gateway.port", "PORT", parse_port,
            "gateway's HTTP port", default="1994"),
    Setting("gateway_scheme", "BETA9_GATEWAY_SCHEME", "gateway.scheme", "SCHEME",
            one_of("http", "https"), "http or https", default="http"),
    Setting("gateway_ca_file", "B9AGENT_GATEWAY_CA_FILE", "gateway.ca_file", "PATH", parse_path,
            "PEM file of the authority that signed an https gateway"),
    Setting("gateway_proxy", "B9AGENT_GATEWAY_PROXY", "gateway.proxy", "URL", parse_proxy,
            "proxy to the gateway, or `none`; default: https goes through the environment's, http "
            "through none", secret=True),
    Setting("tunnel", "B9AGENT_TUNNEL", "tunnel.server", "USER@HOST[:PORT]", parse_tunnel,
            "reach the gateway through `ssh` to this server, which the agent keeps up; "
            "gateway.host and gateway.port are then as seen from there"),
    Setting("tunnel_local_port", "B9AGENT_TUNNEL_LOCAL_PORT", "tunnel.local_port", "PORT",
            parse_listen_port, "port of the tunnel's near end, on loopback; 0 takes a free one",
            default="0"),
    Setting("tunnel_identity_file", "B9AGENT_TUNNEL_IDENTITY_FILE", "tunnel.identity_file", "PATH",
            parse_path, "private key for the tunnel; default: ssh's own, and those of ssh-agent"),
    Setting("tunnel_reverse_k3s", "B9AGENT_TUNNEL_REVERSE_K3S", "tunnel.reverse_k3s", "",
            parse_switch, "let the tunnel's server reach this machine's k3s, at its own port 6443",
            default="false"),
    Setting("tailnet_control", "B9AGENT_TAILNET_CONTROL", "tailnet.control", "", parse_switch,
            "false keeps the control API off the tailnet address, where it listens as well unless "
            "control.host is set; it wants its token there too", default="true"),
    Setting("tailnet_socket", "B9AGENT_TAILNET_SOCKET", "tailnet.socket", "PATH",
            parse_path_or_none, "socket of the one tailscaled to ask, where it is in no usual "
            "place; `none` looks for no tailnet"),
    Setting("k3s_token", "BETA9_K3S_TOKEN", "k3s.token", "TOKEN", parse_secret,
            "bearer token with which the gateway makes worker jobs on our k3s", flat=True,
            secret=True),
    Setting("k3s_service_account", "B9AGENT_K3S_SERVICE_ACCOUNT", "k3s.service_account", "NAME",
            parse_kube_name, "in place of k3s.token: the agent makes the gateway's tokens of this "
            "account, and renews them before they end; see `k3s rbac`"),
    Setting("k3s_token_hours", "B9AGENT_K3S_TOKEN_HOURS", "k3s.token_hours", "HOURS",
            parse_token_hours, "life of the tokens of k3s.service_account", default="24"),
    Setting("k3s_kubeconfig", "B9AGENT_K3S_KUBECONFIG", "k3s.kubeconfig", "PATH", parse_path,
            "kubeconfig with which worker pods are watched; default: the one that `k3s rbac` "
            "makes, k3s's own, or ~/.kube/config where it is of k3s on this machine"),
    Setting("k3s_server", "B9AGENT_K3S_SERVER", "k3s.server", "URL", parse_server,
            "where k3s.token is used to watch worker pods", default="https://127.0.0.1:6443"),
    Setting("k3s_ca_file", "B9AGENT_K3S_CA_FILE", "k3s.ca_file", "PATH", parse_path,
            "PEM file of the authority of k3s.server; default: k3s's own, where it can be read"),
    Setting("keepalive_interval", "BETA9_KEEPALIVE_INTERVAL", "keepalive_interval", "SECONDS",
            parse_interval, "seconds between keepalives, 1 to 150", default="60"),
    Setting("max_cpu", "B9AGENT_MAX_CPU", "limits.cpu", "CORES", parse_cpu,
            "offer at most this much CPU, such as 4 or 3500m", flat=True),
    Setting("max_memory", "B9AGENT_MAX_MEMORY", "limits.memory", "SIZE", parse_memory,
            "offer at most this much memory, such as 16Gi", flat=True),
    Setting("max_gpus", "B9AGENT_MAX_GPUS", "limits.gpus", "N",
            number_within("a whole number", 0, 1024, int), "offer at most this many GPUs",
            flat=True),
    Setting("gpu_ids", "B9AGENT_GPU_IDS", "limits.gpu_ids", "LIST", parse_gpu_ids,
            "offer only the GPUs with these indexes, such as 0,1, or amd:0 for one of another "
            "vendor than the first", flat=True),
    Setting("grid_intensity", "B9AGENT_GRID_INTENSITY", "energy.grid_intensity", "GRAMS",
            number_within("grams of CO2e per kWh", 0, 2000),
            "grams of CO2e per kWh of the grid here; without it no CO2e is told"),
    Setting("renewable_pct", "B9AGENT_RENEWABLE_PCT", "energy.renewable_pct", "PERCENT",
            number_within("a percentage", 0, 100),
            "share of the electricity that certificates call renewable: for the market-based CO2e",
            default="0"),
    Setting("energy_certificate", "B9AGENT_ENERGY_CERTIFICATE", "energy.certificate", "TEXT",
            parse_text,
            "which certificates, such as their registry and number; shown, and used for nothing "
            "else"),
    Setting("pue", "B9AGENT_PUE", "energy.pue", "RATIO", number_within("a ratio", 1, 3),
            "power usage effectiveness of the building, 1.0 to 3.0: CO2e is multiplied by it",
            default="1.0"),
    Setting("cpu_watts", "B9AGENT_CPU_WATTS", "energy.cpu_watts", "WATTS",
            number_within("watts", 1, 10000),
            "what the CPUs draw at full load, where that cannot be measured; default 3.5 W a "
            "thread"),
    Setting("inference_engine", "B9AGENT_INFERENCE_ENGINE", "inference.engine", "ENGINE",
            one_of("auto", *ENGINE_NAMES),
            f"engine that `start` takes: {', '.join(ENGINE_NAMES)}; auto chooses by model and "
            "hardware", default="auto"),
    Setting("inference_model", "B9AGENT_INFERENCE_MODEL", "inference.model", "MODEL", parse_text,
            "model that `start` takes: a name, a GGUF file, or a folder"),
    Setting("inference_autostart", "B9AGENT_INFERENCE_AUTOSTART", "inference.autostart", "",
            parse_switch, "start the engine with the agent", default="false"),
    Setting("inference_host", "B9AGENT_INFERENCE_HOST", "inference.host", "HOST", parse_host,
            "address the engine listens on; engines ask nobody for a token, so whoever reaches it "
            "may use it", default="127.0.0.1"),
    Setting("inference_port", "B9AGENT_INFERENCE_PORT", "inference.port", "PORT", parse_listen_port,
            "port of the engine; 0 takes a free one", default="11434"),
    Setting("inference_context", "B9AGENT_INFERENCE_CONTEXT", "inference.context_tokens", "TOKENS",
            number_within("a number of tokens", 128, 1 << 24, int),
            "context of each request; default 8192, or the model's own where that is less"),
    Setting("inference_parallel", "B9AGENT_INFERENCE_PARALLEL", "inference.parallel", "N",
            number_within("a number of requests", 1, 256, int),
            "requests that are computed at once, each with a context of its own; 1 to 256",
            default="1"),
    Setting("inference_program", "B9AGENT_INFERENCE_PROGRAM", "inference.program", "PATH",
            parse_path, "the engine's program, where it is not on PATH"),
    Setting("control_host", "B9AGENT_CONTROL_HOST", "control.host", "HOST", parse_host,
            "address the control API listens on", default="127.0.0.1"),
    Setting("control_port", "B9AGENT_CONTROL_PORT", "control.port", "PORT", parse_listen_port,
            "port of the control API; 0 takes a free one", default="9999"),
    Setting("log_format", "B9AGENT_LOG_FORMAT", "log.format", "FORMAT", one_of("text", "json"),
            "text or json", default="text"),
    Setting("debug", "BETA9_DEBUG", "debug", "", parse_switch,
            "log every request and answer, without their secrets", default="false"),
    Setting("state_dir", "B9AGENT_HOME", None, "PATH", parse_path,
            "folder of everything the agent keeps", default="~/.b9agent"),
    Setting("config", "B9AGENT_CONFIG", None, "PATH", parse_path,
            "config file; default `config.yaml` in the state folder"),
)
SETTING_BY_KEY = {row.key: row for row in SETTINGS}
Settings = collections.namedtuple("Settings", [row.key for row in SETTINGS])


class Loaded(NamedTuple):
    """origins: key -> "flag --x", "environment X", "FILE:LINE" or "default".  problem: why what was
    given was left out, in part or whole; only `doctor` goes on then."""
    settings: Any
    origins: Dict[str, str]
    warnings: Tuple[str, ...]
    problem: Optional[UsageError] = None


# -- from flags, variables and the file to values ----------------------

class _Given(NamedTuple):
    text: str
    origin: str


def _value(row: Setting, given: Dict[str, _Given]) -> Any:
    text, origin = given.get(row.key, _Given(row.default, "default"))
    if text == "" and origin == "default":
        return None
    try:
        return row.parse(text)
    except ValueError as error:
        place = origin.split(" ", 1)[-1] if not origin.startswith("/") else f"{origin}: {row.path}"
        shown = "this value" if row.secret else f"`{printable(text[:60])}`"
        raise UsageError(f"{place}: {shown} cannot be used, expected {error}") from error


def _warnings(flags: Dict[str, str]) -> Tuple[str, ...]:
    """Secrets on the command line; a proxy's address is one only where it holds a password."""
    rows = [SETTING_BY_KEY[key] for key, text in flags.items()
            if SETTING_BY_KEY[key].secret and (key != "gateway_proxy" or "@" in text)]
    return tuple(f"{row.flag} on the command line is visible to every user in `ps`: use "
                 f"{row.variable} or the config file" for row in rows)


def shared_mode(path: str) -> Optional[int]:
    """The mode of a file that others than its owner may use; None for one that is private."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        return None
    return mode if mode & 0o077 else None


def refuse_if_shared(path: str, what: str) -> None:
    mode = shared_mode(path)
    if mode is not None:
        raise UsageError(f"{path} holds {what} and others may read it (mode {mode:04o})",
                         f"Mend it with: chmod 600 {path}")


def _given_here(flags: Dict[str, str], environ: Dict[str, str]) -> Dict[str, _Given]:
    """What flags and variables say; flags win."""
    given = {row.key: _Given(environ[row.variable], f"environment {row.variable}")
             for row in SETTINGS if environ.get(row.variable)}
    given.update({key: _Given(text, f"flag {SETTING_BY_KEY[key].flag}")
                  for key, text in flags.items()})
    return given


def _config_path(given: Dict[str, _Given]) -> str:
    state_dir = _value(SETTING_BY_KEY["state_dir"], given)
    return _value(SETTING_BY_KEY["config"], given) or os.path.join(state_dir, "config.yaml")


def config_path(flags: Dict[str, str], environ: Dict[str, str]) -> str:
    """Where the config file is, without reading it."""
    return _config_path(_given_here(flags, environ))


def _apply_token_file(values: Dict[str, Any], origins: Dict[str, str]) -> None:
    """The token out of its file, unless a token was given where it counts at least as much."""
    def rank(key: str) -> int:
        return {"flag": 2, "environment": 1}.get(origins[key].split(" ")[0], 0)
    path = values["token_file"]
    if not path or (values["token"] and rank("token") >= rank("token_file")):
        return
    text = read_text(path, 65536)
    if text is None:
        raise UsageError(f"cannot read the token file {path}",
                         f"It is set by {origins['token_file']}")
    refuse_if_shared(path, "a token")
    try:
        values["token"] = parse_secret(text.strip())
    except ValueError as error:
        raise UsageError(f"{path}: this is not a token, expected {error}") from error
    origins["token"] = f"file {path}"


CONFIG_MAX_BYTES = 1 << 18


def _read_config_tree(path: str, must_exist: bool) -> Node:
    try:
        with open(path, "rb") as handle:
            raw = handle.read(CONFIG_MAX_BYTES + 1)
        if len(raw) > CONFIG_MAX_BYTES:
            raise UsageError(f"{path} has more than {CONFIG_MAX_BYTES} bytes, which no config "
                             "file needs", "Is it the right file?")
        return parse_yaml(raw.decode("utf-8"))
    except FileNotFoundError as error:
        if must_exist:
            raise UsageError(f"there is no config file {path}",
                             "Make one with `b9agent.py init`") from error
        return Node({}, 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}",
                         "Run as the user who owns it") from error
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: bytes that are not UTF-8, expected text") from error
    except YamlError as error:
        raise UsageError(f"{path}:{error.line}: {error}") from error


def _nearest(name: str, known: Iterable[str], listed_by: str) -> str:
    import difflib
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    close = close or [other for other in known if other.endswith("." + name)]
    return f"`{close[0]}`" if close else f"one of the names that `b9agent.py {listed_by}` lists"


def _leaves(node: Node, prefix: str, known: Dict[str, Setting],
            path: str) -> Iterator[Tuple[str, Node]]:
    """(name, what it is set to) of all settings in a file; what is left empty is not set."""
    for name, child in node.value.items():
        full = prefix + name
        if full in known:
            if not child.plain or child.value not in ("", "~", "null", "Null", "NULL"):
                yield full, child
        elif not any(other.startswith(full + ".") for other in known):
            raise UsageError(f"{path}:{child.line}: unknown name `{printable(full)}`, "
                             f"expected {_nearest(full, known, 'config')}")
        elif isinstance(child.value, dict):
            yield from _leaves(child, full + ".", known, path)
        elif child.value != "":
            raise UsageError(f"{path}:{child.line}: `{full}` is a group, expected names "
                             "below it, indented")


def _leaf_text(node: Node, row: Setting, path: str) -> str:
    value = node.value
    if row.parse is parse_gpu_ids and isinstance(value, list) and all(
            isinstance(item.value, str) for item in value):
        return ",".join(item.value for item in value)
    if not isinstance(value, str):
        form = "a list" if isinstance(value, list) else "a group of names"
        raise UsageError(f"{path}:{node.line}: `{row.path}` is {form}, expected one value")
    return value


def read_config(path: str, must_exist: bool = False) -> Dict[str, _Given]:
    """{key: text and FILE:LINE} of a config file; nothing where there is none."""
    known = {name: row for row in SETTINGS if row.path for name in (row.path, row.also) if name}
    found: Dict[str, _Given] = {}
    for name, node in _leaves(_read_config_tree(path, must_exist), "", known, path):
        row = known[name]
        if row.key in found:
            raise UsageError(f"{path}:{node.line}: `{name}` is given twice, first in line "
                             f"{found[row.key].origin.rsplit(':', 1)[-1]}, expected it once")
        found[row.key] = _Given(_leaf_text(node, row, path), f"{path}:{node.line}")
    if any(SETTING_BY_KEY[key].secret for key in found):
        refuse_if_shared(path, "secrets")
    return found


def load_settings(flags: Dict[str, str], environ: Dict[str, str],
                  must_exist: bool = True) -> Loaded:
    """Every setting with where it came from.

    flags: {key: text} as parse_arguments made them.  must_exist: a config file that is asked for
    by name, that is.
    Raises: UsageError that names the flag, the variable, or the file and line.
    """
    given = _given_here(flags, environ)
    path = _config_path(given)
    given = {**read_config(path, must_exist and "config" in given), **given}
    values = {row.key: _value(row, given) for row in SETTINGS}
    values["config"] = path
    origins = {row.key: given[row.key].origin if row.key in given else "default"
               for row in SETTINGS}
    _apply_token_file(values, origins)
    for key in ("token", "k3s_token"):
        REDACTOR.add(values[key])
    REDACTOR.add((values["gateway_proxy"] or "").rpartition("@")[0].rpartition("/")[2])
    return Loaded(Settings(**values), origins, _warnings(flags))


def save_config(path: str, values: Dict[str, Any]) -> Optional[str]:
    """Merge settings into the config file: nested form, 0600, whole or not at all.

    values: {key: text}; None removes one.  Returns the path of a copy of the old file where it
    had comments, which the new one has not.
    Raises: UsageError where the file cannot be read or written.
    """
    merged = {**{key: item.text for key, item in read_config(path).items()}, **values}
    tree: Dict[str, Any] = {}
    for row in SETTINGS:
        text = merged.get(row.key)
        if row.path and text is not None:
            *groups, leaf = row.path.split(".")
            place = tree
            for group in groups:
                place = place.setdefault(group, {})
            place[leaf] = text.split(",") if row.parse is parse_gpu_ids else str(text)
    old = read_text(path)
    backup = path + ".old" if old and re.search(r"(^|\s)#", old) else None
    try:
        make_private_folder(os.path.dirname(path))
        if backup:
            write_atomic(backup, old)
        write_atomic(path, render_yaml(tree))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}",
                         "Nothing was changed") from error
    return backup


# -- the command line --------------------------------------------------

class Option(NamedTuple):
    """A flag that one command takes beside the settings.  metavar "" makes it a switch."""
    flag: str
    metavar: str
    help: str

    @property
    def name(self) -> str:
        return self.flag.lstrip("-")


class Arguments(NamedTuple):
    """words: what is no flag; flags: settings by key; options: by name, "" for switches."""
    words: Tuple[str, ...]
    flags: Dict[str, str]
    options: Dict[str, str]


def parse_arguments(argv: Sequence[str], options: Sequence[Option]) -> Arguments:
    """`--flag value`, `--flag=value`, switches.  A value may begin with a dash, as one token in 64
    does.  Raises: UsageError."""
    table: Dict[str, Any] = {row.flag: row for row in (*SETTINGS, *options)}
    words, flags, chosen = [], {}, {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or argument == "-":
            words.append(argument)
            continue
        flag, equals, text = argument.partition("=")
        row = table.get(flag)
        if row is None:
            raise UsageError(f"unknown flag {printable(flag)}, expected "
                             f"{_nearest(flag, table, 'COMMAND --help')}")
        takes_value = row.kind if isinstance(row, Setting) else row.metavar
        if takes_value and not equals:
            if not rest or rest[0].partition("=")[0] in table:
                raise UsageError(f"{flag} needs a value ({takes_value})")
            text = rest.pop(0)
        if takes_value and not text:
            raise UsageError(f"{flag} has an empty value, expected {takes_value}")
        if isinstance(row, Setting):
            flags[row.key] = text if takes_value or equals else "true"
        elif equals and not takes_value:
            raise UsageError(f"{flag} takes no value")
        else:
            chosen[row.name] = text
    return Arguments(tuple(words), flags, chosen)


def setting_text(row: Setting, value: Any) -> str:
    """A value as it would be written in a flag or the file; parse(setting_text(v)) == v."""
    if value is None:
        return ""
    if row.parse is parse_switch:
        return "true" if value else "false"
    if row.parse is parse_gpu_ids:
        return ",".join(f"{vendor}:{index}" if vendor else str(index) for vendor, index in value)
    if row.parse is parse_cpu:
        return f"{value}m"
    if row.parse is parse_memory:
        return f"{value >> 10}Ki" if value % (1 << 20) else f"{value >> 20}Mi"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def split_gateway(text: str, flag: str = "--gateway") -> Tuple[str, str]:
    """
    >>> split_gateway("gw:1994"), split_gateway("gw"), split_gateway("[::1]:80")
    (('gw', '1994'), ('gw', ''), ('::1', '80'))
    """
    match = re.fullmatch(r"(\[[^\]]*\]|[^:/]+)(?::([0-9]{1,5}))?", text)
    try:
        if not match:
            raise ValueError("HOST or HOST:PORT, an IPv6 address in brackets")
        return parse_host(match.group(1)), str(parse_port(match.group(2)) if match.group(2) else "")
    except ValueError as error:
        raise UsageError(f"{flag}: `{printable(text[:60])}` cannot be used, expected "
                         f"{error}") from error


def option_value(options: Dict[str, str], name: str, parse: Callable[[str], Any]) -> Any:
    """None where it is not given.  Raises: UsageError that names the flag."""
    try:
        return parse(options[name]) if name in options else None
    except ValueError as error:
        raise UsageError(f"--{name}: `{printable(options[name][:60])}` cannot be used, expected "
                         f"{error}") from error


def init_values(loaded: Loaded, options: Dict[str, str]) -> Dict[str, str]:
    """{key: text} that flags and variables ask for; init's short forms are flags as well."""
    wanted = {row.key: setting_text(row, getattr(loaded.settings, row.key)) for row in SETTINGS
              if row.path and loaded.origins[row.key].startswith(("flag ", "environment "))}
    short = {"gateway_port": options.get("port"), "pool_name": options.get("pool")}
    if "gateway" in options:
        short["gateway_host"], port = split_gateway(options["gateway"])
        short["gateway_port"] = short["gateway_port"] or port
    wanted.update((key, text) for key, text in short.items() if text)
    return wanted


# ----------------------------------------------------------------------
# 4. Log, events and snapshot                    stderr, STATE/agent.log
# ----------------------------------------------------------------------
# One line an event: time, level, event, key=value.  Every line is redacted
# and has its control characters escaped before it goes anywhere.  The newest
# lines and events are kept for those who follow them.  What other threads may
# know of the agent is one immutable Snapshot, replaced whole.

_PRIORITIES = {"debug": 7, "info": 6, "notice": 5, "warning": 4, "error": 3}
LOG_FILE_MAX_BYTES = 5 << 20
LOG_KEPT_LINES = 1000
LOG_KEPT_LINE_MAX = 4096
EVENTS_KEPT = 500


def _log_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    text = printable(str(value))
    return text if re.fullmatch(r'[^\s"=]+', text) else '"' + text.replace('"', "'") + '"'


def render_event(level: str, event: str, fields: Dict[str, Any], stamp: str, form: str) -> str:
    """One line without its end.

    >>> render_event("info", "ready", {"pool": "my gpu", "s": 1}, "T", "text")
    'T info ready pool="my gpu" s=1'
    """
    if form == "json":
        record = {"time": stamp, "level": level, "event": event}
        record.update((name, value) for name, value in fields.items() if name not in record)
        return json.dumps(record, default=str)
    words = [stamp, level, event] if stamp else [level, event]
    return " ".join(words + [f"{name}={_log_value(value)}" for name, value in fields.items()])


def utc_stamp(wall_s: Optional[float] = None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(wall_s))


def _is_journal(stream: Any) -> bool:
    """systemd names the journal's socket in JOURNAL_STREAM as device:inode."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _writable_poll(stream: Any) -> Any:
    """A poll that says whether a stream takes a line now; None for one that is no descriptor."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return poll
    except (OSError, ValueError, AttributeError):
        return None


def _terminal_of(stream: Any) -> Optional[int]:
    """A descriptor of its own, which does not block, of a stream that is a terminal; else None.  A
    terminal says that it takes more as long as it takes a byte."""
    try:
        return os.open(os.ttyname(stream.fileno()), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except (OSError, ValueError, AttributeError):
        return None


class Ring:
    """The newest items of something, numbered as they come, for any number of readers.

    The first number is made of the time, so that a number from before a restart is older than all.
    _changed guards _items and last.
    """

    def __init__(self, size: int) -> None:
        self._changed = threading.Condition()
        self._items: Any = collections.deque(maxlen=size)
        self.last = int(time.time()) * 1000000

    def add(self, item: Any) -> None:
        with self._changed:
            self.last += 1
            self._items.append((self.last, item))
            self._changed.notify_all()

    def after(self, number: int, limit_s: float = 0.0) -> List[Tuple[int, Any]]:
        """(number, item) of all that is newer than a number, as soon as there is any; none once
        limit_s have passed.  Where the clock was set back before a restart, all is newer."""
        with self._changed:
            known = number if number <= self.last else 0
            return self._changed.wait_for(
                lambda: [pair for pair in self._items if pair[0] > known], limit_s)


def _scrubbed(fields: Dict[str, Any]) -> Dict[str, Any]:
    """Redacted before they are quoted: an escaped secret would not be recognised."""
    return {name: REDACTOR.scrub(value) if isinstance(value, str) else value
            for name, value in fields.items() if value is not None}


class EventRing(Ring):
    """What happened, for GET /events: (kind, JSON).  Kinds: state, tunnel, tailnet, inference,
    pull, log.  on_add: called after each, by the thread that adds it."""

    on_add: Callable[[], None] = staticmethod(lambda: None)

    def add(self, item: Any) -> None:
        super().add(item)
        self.on_add()

    def tell(self, kind: str, **fields: Any) -> None:
        record = dict(_scrubbed(fields), time=utc_stamp())
        self.add((kind, REDACTOR.scrub(json.dumps(record, default=str))))


def render_kept_line(line: str) -> str:
    """A line of Log.kept as people read it.

    >>> render_kept_line('{"time": "T", "level": "info", "event": "ready", "pool": "my gpu"}')
    'T info ready pool="my gpu"'
    """
    record = json.loads(line)
    stamp, level, event = (record.pop(name) for name in ("time", "level", "event"))
    return render_event(level, event, record, stamp, "text")


def defect_place(error: BaseException) -> str:
    """Where a defect was raised: function and line of the last frames, no values."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(frames[-6:])


class Log:
    """kept: the newest lines as JSON; events: what may be told of beside them, warnings included.

    _lock guards _held, the file and its size; a full disk costs lines in the file, nothing else.
    """

    def __init__(self, form: str = "text", minimum: str = "info", folder: Optional[str] = None,
                 stream: Any = None) -> None:
        self._lock = threading.Lock()
        self._form = form
        self._lowest = _PRIORITIES[minimum]
        self._stream = stream or sys.stderr
        self._journal = _is_journal(self._stream)
        self._poll, self._terminal = _writable_poll(self._stream), _terminal_of(self._stream)
        self._path = os.path.join(folder, "agent.log") if folder and not self._journal else None
        self._file: Any = None
        self._held: Any = None
        self.held_level = "warning"
        self.kept = Ring(LOG_KEPT_LINES)
        self.events = EventRing(EVENTS_KEPT)

    def _keep(self, level: str, event: str, fields: Dict[str, Any]) -> None:
        line = REDACTOR.scrub(render_event(level, event, fields, utc_stamp(), "json"))
        if len(line) > LOG_KEPT_LINE_MAX:
            fields = {"cut": line[:LOG_KEPT_LINE_MAX // 2]}
            line = render_event(level, event, fields, utc_stamp(), "json")
        self.kept.add(line)
        if _PRIORITIES[level] <= _PRIORITIES["warning"]:
            self.events.add(("log", line))

    def __call__(self, level: str, event: str, **fields: Any) -> None:
        if _PRIORITIES[level] > self._lowest:
            return
        fields = _scrubbed(fields)
        self._keep(level, event, fields)
        stamp = "" if self._journal and self._form == "text" else utc_stamp()
        line = REDACTOR.scrub(render_event(level, event, fields, stamp, self._form)) + "\n"
        with self._lock:
            if self._held is None:
                self._write(f"<{_PRIORITIES[level]}>{line}" if self._journal else line)
            elif _PRIORITIES[level] <= _PRIORITIES[self.held_level]:
                self._held.append(line)
            self._append(line)

    def _write(self, line: str) -> bool:
        """A terminal that is paused (Ctrl-S), or a pipe that nobody reads, costs the line and never
        a keepalive: False."""
        try:
            if self._poll is not None and not self._poll.poll(200):
                return False
            if self._terminal is not None:
                os.write(self._terminal, line.encode(self._stream.encoding, "backslashreplace"))
            else:
                self._stream.write(line)
                self._stream.flush()
            return True
        except (OSError, ValueError):
            return False  # nobody reads our stderr any more: not a reason to stop

    def hold(self) -> None:
        """Until release() nothing is written to a terminal, which shows something else.  What is of
        held_level or worse is written then, the newest."""
        with self._lock:
            self._held = collections.deque(maxlen=50) if self._stream.isatty() else None

    def release(self) -> None:
        with self._lock:
            held, self._held = self._held, None
            all(self._write(line) for line in held or ())  # until one is not taken

    def _append(self, line: str) -> None:
        if not self._path:
            return
        try:
            if self._file is None:
                opener = lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o600)
                self._file = open(self._path, "a", encoding="utf-8", opener=opener)
            self._file.write(line)
            self._file.flush()
            if self._file.tell() > LOG_FILE_MAX_BYTES:
                self.close()
                os.replace(self._path, self._path + ".1")
        except OSError:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass  # the disk is full: the last line is lost
            self._file = None

    def error(self, event: str, error: AgentError, level: str = "error", **fields: Any) -> None:
        self(level, event, what=error.what, do=error.hint or None, **fields)

    def defect(self, error: BaseException, **fields: Any) -> None:
        """A mistake of ours, where it costs something and must not cost more."""
        self("error", "defect", what=f"{type(error).__name__}: {error}",
             where=defect_place(error), **fields)


class State(enum.Enum):
    """Membership, as DESIGN's state machine has it."""
    STARTING = "starting"
    REGISTERING = "registering"
    REGISTERED = "registered"
    READY = "ready"
    UNREACHABLE = "unreachable"
    EXPIRED = "expired"
    REFUSED = "refused"
    STOPPED = "stopped"


class Failures(NamedTuple):
    """How many requests to the gateway came to something else than "ok"."""
    unreachable: int = 0
    unwell: int = 0
    refused: int = 0
    expired: int = 0


class Snapshot(NamedTuple):
    """What is known of the membership now.  Times: now_s() but last_ready_wall_s, which is for
    people.  message: of the last failure, empty when ready.  registrations, keepalives: those that
    were answered "ok"."""
    state: State = State.STARTING
    since_s: float = 0.0
    last_ready_s: Optional[float] = None
    last_ready_wall_s: Optional[float] = None
    registrations: int = 0
    keepalives: int = 0
    failures: int = 0
    message: str = ""
    failed_registrations: Failures = Failures()
    failed_keepalives: Failures = Failures()


# ----------------------------------------------------------------------
# 5. Host metrics   reads /proc, /sys, os-release; on macOS runs programs
# ----------------------------------------------------------------------
# What this process may use of the machine, and how busy that is: where a
# cgroup limits us, the limit is our machine.  Parsers come first and are
# pure; then one Host per platform with the same methods in the same order.
# Nothing waits: CPU percent and rates are differences between two calls.


class Capacity(NamedTuple):
    """What this process may use, after CPU affinity and cgroup limits."""
    cpu_millicores: Optional[int]
    memory_bytes: Optional[int]


class HostFacts(NamedTuple):
    """What a machine is; it does not change while it runs.  Texts are "" where unknown.

    cpu_threads: what the system schedules on; cpu_cores: without SMT.  container: docker, podman,
    kubernetes, lxc, …; wsl: a Linux inside Windows.
    """
    os_name: str = ""
    kernel: str = ""
    architecture: str = ""
    cpu_model: str = ""
    cpu_cores: Optional[int] = None
    cpu_threads: Optional[int] = None
    container: str = ""
    wsl: bool = False


class HostSample(NamedTuple):
    """Percentages are shares of the capacity, 0 to 100.  The counters of network and disk run
    since boot, over the real interfaces and whole disks; rates are the difference to the sample
    before, None in the first.  The load is the whole machine's, whatever the capacity is."""
    cpu_pct: Optional[float]
    memory_pct: Optional[float]
    memory_total_bytes: Optional[int]
    memory_used_bytes: Optional[int]
    disk_total_bytes: Optional[int]
    disk_free_bytes: Optional[int]
    net_received_bytes: Optional[int]
    net_sent_bytes: Optional[int]
    disk_read_bytes: Optional[int] = None
    disk_written_bytes: Optional[int] = None
    net_received_bytes_per_s: Optional[float] = None
    net_sent_bytes_per_s: Optional[float] = None
    disk_read_bytes_per_s: Optional[float] = None
    disk_written_bytes_per_s: Optional[float] = None
    swap_total_bytes: Optional[int] = None
    swap_used_bytes: Optional[int] = None
    load_1m: Optional[float] = None
    load_5m: Optional[float] = None
    load_15m: Optional[float] = None
    uptime_s: Optional[float] = None


class CpuReading(NamedTuple):
    """Counters of busy and of idle time, in any one unit.  Only readings of one source compare."""
    source: str
    busy: Tuple[int, ...]
    idle: Tuple[int, ...]


# (total, used), (total, free), (received, sent) or (read, written)
BytesPair = Tuple[Optional[int], Optional[int]]
_UNKNOWN: BytesPair = (None, None)


class Counters(NamedTuple):
    """What only grows.  traffic: network received and sent, disk read and written."""
    at_s: float
    cpu: Optional[CpuReading]
    traffic: Tuple[Optional[int], ...] = _UNKNOWN + _UNKNOWN


SHORTEST_WINDOW_S = 0.5  # in less, clock ticks of 10 ms and bursts say nothing of how busy it is


def parse_int(word: str) -> Optional[int]:
    """
    >>> parse_int(" 42\\n"), parse_int("[N/A]"), parse_int("9" * 5000)
    (42, None, None)
    """
    try:
        return int(word) if len(word) <= 24 else None  # 2^64 has 20 digits
    except ValueError:
        return None


def share_pct(part: Optional[float], whole: Optional[float]) -> Optional[float]:
    """
    >>> share_pct(1, 4), share_pct(5, 4), share_pct(1, 0), share_pct(None, 4)
    (25.0, 100.0, None, None)
    """
    if part is None or whole is None or whole <= 0:
        return None
    return min(100.0, max(0.0, 100.0 * part / whole))


def busy_pct(old: Optional[CpuReading], new: Optional[CpuReading],
             wraps_at: Optional[int] = None) -> Optional[float]:
    """None where no time passed.  wraps_at: where the counters start again from 0.

    >>> busy_pct(CpuReading("", (10,), (50,)), CpuReading("", (20,), (80,)))
    25.0
    """
    if old is None or new is None or old.source != new.source:
        return None
    # Linux lets idle and iowait go back a little (proc(5)): that is no time at all.
    steps = [(after - before) % wraps_at if wraps_at else max(0, after - before)
             for before, after in zip(old.busy + old.idle, new.busy + new.idle)]
    return share_pct(sum(steps[:len(old.busy)]), sum(steps))


def mean_pct(reading: Optional[CpuReading]) -> Optional[float]:
    """CPU percent since the counters began."""
    return reading and share_pct(sum(reading.busy), sum(reading.busy + reading.idle))


def rates_per_s(old: Counters, new: Counters) -> Tuple[Optional[float], ...]:
    """Of each traffic; None where it went back: counters restart with their interface or disk."""
    elapsed_s = new.at_s - old.at_s
    return tuple(None if before is None or after is None or after < before or elapsed_s <= 0
                 else (after - before) / elapsed_s
                 for before, after in zip(old.traffic, new.traffic))


def sum_traffic(rows: Iterable[Tuple[str, Optional[int], Optional[int]]],
                virtual: Tuple[str, ...]) -> BytesPair:
    """(received, sent) or (read, written) of the devices whose names do not begin like a virtual
    one's."""
    real = [(inward, outward) for name, inward, outward in rows
            if inward is not None and outward is not None and min(inward, outward) >= 0
            and not name.startswith(virtual)]
    if not real:
        return _UNKNOWN
    return sum(inward for inward, _ in real), sum(outward for _, outward in real)


def read_disk(path: str) -> BytesPair:
    """(total, free to an ordinary user) of the file system that holds a path."""
    try:
        disk = os.statvfs(path)
    except OSError:
        return _UNKNOWN
    return disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize


def read_load() -> Tuple[Optional[float], ...]:
    """Runnable programs over 1, 5 and 15 minutes, of the whole machine."""
    try:
        return os.getloadavg()
    except OSError:
        return None, None, None


# Linux: text of /proc.  Sources: proc(5), psutil's _pslinux.py.

# Their traffic passes a real interface as well and would count twice.
_LINUX_VIRTUAL = ("lo", "veth", "br", "docker", "cni", "flannel", "cali", "cilium", "lxc", "lxd",
                  "virbr", "vnet", "vxlan", "kube", "nodelocaldns", "bond", "team", "vlan", "ifb",
                  "dummy", "tun", "tap", "tailscale", "wg", "zt", "sit", "gre", "ip6tnl")
_LINUX_STACKED = ("loop", "ram", "zram", "dm-", "md", "bcache", "drbd", "zd")  # zd: ZFS volumes


def parse_cpu_ticks(text: str, cpus: Sequence[int] = ()) -> Optional[CpuReading]:
    """Ticks from /proc/stat, of the whole machine or summed over some CPUs.

    Steal counts as busy.  guest and guest_nice are left out: user and nice contain them.
    """
    some = bool(cpus) and text.count("\ncpu") > len(cpus)
    wanted = {f"cpu{number}" for number in cpus} if some else {"cpu"}
    rows = {}
    for line in text.split("\n"):
        name, _, rest = line.partition(" ")
        if name in wanted and name not in rows:
            # Kernels before 2.6.11 have seven columns; what they lack is 0.
            rows[name] = [parse_int(word) for word in (rest.split() + ["0"] * 4)[:8]]
            if len(rows) == len(wanted):
                break
    if not rows or any(len(row) < 8 or None in row for row in rows.values()):
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = map(sum, zip(*rows.values()))
    return CpuReading(" ".join(sorted(wanted)), (user, nice, system, irq, softirq, steal),
                      (idle, iowait))


def parse_meminfo(text: str) -> Dict[str, int]:
    """The lines of /proc/meminfo that are sizes, in bytes."""
    rows = re.findall(r"^([^\s:]+): *([0-9]{1,15}) kB", text, re.MULTILINE)
    return {name: int(size_kib) * 1024 for name, size_kib in rows}


def memory_use(fields: Dict[str, int]) -> BytesPair:
    """(total, used) of a machine from its meminfo; used is what no program could still get."""
    total, free = fields.get("MemTotal"), fields.get("MemFree")
    if total is None or free is None:
        return total, None
    # Before kernel 3.14 there is no MemAvailable, and some containers say 0: then near enough (the
    # kernel also takes off its watermarks, about 1 %).
    cache = fields.get("Active(file)", 0) + fields.get("Inactive(file)", 0)
    reclaimable = cache + fields.get("SReclaimable", 0) if cache else fields.get("Cached", 0)
    available = fields.get("MemAvailable") or free + reclaimable
    if available > total:  # seen under LXC
        available = free
    return total, min(total, max(0, total - available))


def swap_use(fields: Dict[str, int]) -> BytesPair:
    """(total, used) of a machine from its meminfo; without swap (0, 0)."""
    total, free = fields.get("SwapTotal"), fields.get("SwapFree")
    return total, None if total is None or free is None else max(0, total - free)


def parse_net_dev(text: str) -> BytesPair:
    """(received, sent) from /proc/net/dev."""
    rows = []
    for line in text.splitlines():
        name, _, rest = line.rpartition(":")  # a number may touch the colon; an alias has one too
        words = rest.split()
        if name and len(words) >= 9 and "." not in name:  # eth0.7 is a VLAN on eth0
            rows.append((name.strip(), parse_int(words[0]), parse_int(words[8])))
    return sum_traffic(rows, _LINUX_VIRTUAL)


def parse_diskstats(text: str, disks: Iterable[str]) -> BytesPair:
    """(read, written) from /proc/diskstats; disks: the names in /sys/block, no partitions."""
    whole, rows = set(disks), []
    for words in map(str.split, text.splitlines()):
        if len(words) >= 14 and words[2] in whole:
            rows.append((words[2], parse_int(words[5]), parse_int(words[9])))
    read, written = sum_traffic(rows, _LINUX_STACKED)
    # A sector is 512 bytes here, whatever the disk says (the kernel's iostats.rst).
    return (None, None) if read is None or written is None else (read * 512, written * 512)


def parse_uptime(text: str) -> Optional[float]:
    """Seconds, the first number of /proc/uptime."""
    match = re.match(r"[0-9]{1,12}(\.[0-9]{1,9})?\b", text)
    return float(match.group()) if match else None


def parse_os_release(text: str) -> str:
    """The name for people from /etc/os-release, which holds shell assignments: the last counts."""
    fields = dict(re.findall(r"^(PRETTY_NAME|NAME)=(.*)$", text, re.MULTILINE))
    value = (fields.get("PRETTY_NAME") or fields.get("NAME", "")).strip()
    if len(value) > 1 and value[0] in "'\"" and value[0] == value[-1]:
        value = value[1:-1]
    return re.sub(r'\\(["$`\\])', r"\1", value)[:128]


# ARM processors do not say what they are called: (implementer, part).  Those that GPUs come with.
# Sources: Linux arch/arm64/include/asm/cputype.h, util-linux sys-utils/lscpu-arm.c.
_ARM_CPUS = {
    ("0x41", "0xd0c"): "Neoverse-N1", ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd49"): "Neoverse-N2", ("0x41", "0xd4f"): "Neoverse-V2",  # Grace
    ("0x41", "0xd84"): "Neoverse-V3", ("0x41", "0xd8e"): "Neoverse-N3",
    ("0x41", "0xd85"): "Cortex-X925", ("0x41", "0xd87"): "Cortex-A725",  # both in a GB10
    ("0x41", "0xd42"): "Cortex-A78AE",  # Jetson Orin
    ("0x4e", "0x004"): "Carmel", ("0x4e", "0x010"): "Olympus",  # Jetson Xavier; Vera
    ("0xc0", "0xac3"): "Ampere-1", ("0xc0", "0xac4"): "Ampere-1a", ("0x48", "0xd01"): "TSV110"}


def parse_cpuinfo(text: str) -> Tuple[str, Optional[int], Optional[int]]:
    """(model, cores, threads) from /proc/cpuinfo of x86, ARM, POWER or s390x.  cores: None where it
    does not say which threads share one."""
    first: Dict[str, str] = {}
    threads, socket_id, cores, parts = 0, "", set(), {}
    for line in text.split("\n"):
        name, value = [word.strip() for word in line.partition(":")[::2]]
        threads += name == "processor" or name.startswith("processor ")
        first.setdefault(name, value)
        if name == "physical id":
            socket_id = value
        elif name == "core id" and socket_id:
            cores.add((socket_id, value))
        elif name == "CPU part":  # a dictionary is a set that keeps its order
            parts[_ARM_CPUS.get((first.get("CPU implementer"), value), "")] = True
    model = (first.get("Model") or " + ".join(filter(None, parts)) or first.get("model name")
             or first.get("cpu", "").partition(",")[0])
    mainframe = re.search("machine = ([0-9A-F]{4,8})", first.get("processor 0", ""))
    if mainframe:
        model = f"{first.get('vendor_id', '')} {mainframe.group(1)}"
    return " ".join(model.split())[:128], len(cores) or None, threads or None


# What a container manager leaves in /proc/1/cgroup, and in mountinfo of what it mounts into a
# container.  (The host has lines with these folders too, but not over its own files.)
_CONTAINER_TRACES = (
    ("kubernetes", r"kubepods|/kubelet/pods/\S+ /etc/hosts "),
    ("podman", r"/libpod[-_]|/containers/storage/\S+ /etc/(?:hosts|hostname|resolv\.conf) "),
    ("docker", r":/docker/|/docker-[0-9a-f]{12,64}\.scope|/docker/containers/\S+ /etc/hosts "),
    ("lxc", r":/lxc[./]|/lxc/\S+ / | /proc/\w+ .* - fuse\.lxcfs "))


def find_container(cgroup_text: str, mountinfo_text: str) -> str:
    """The container manager that runs process 1, from its cgroups and our mounts; "" for none."""
    text = cgroup_text + "\n" + mountinfo_text
    return next((kind for kind, trace in _CONTAINER_TRACES if re.search(trace, text)), "")


# Linux: cgroups.  Sources: cgroups(7), the kernel's cgroup-v1 and cgroup-v2 documents.


class CgroupFiles(NamedTuple):
    """Where a version of cgroups keeps what we ask for; reclaimable is a line of memory.stat."""
    cpu_limit: Tuple[str, ...]
    cpu_usage: str
    memory_limit: str
    memory_used: str
    reclaimable: str


CGROUP_V1 = CgroupFiles(("cpu.cfs_quota_us", "cpu.cfs_period_us"), "cpuacct.usage",
                        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
CGROUP_V2 = CgroupFiles(("cpu.max",), "cpu.stat", "memory.max", "memory.current", "inactive_file")


class Cgroup(NamedTuple):
    """mount: the folder where a hierarchy can be seen.  path: ours below it, "" or "/a/b"."""
    files: CgroupFiles
    mount: str
    path: str

    def levels(self) -> List[str]:
        """"", "/a", "/a/b": each of them may set a limit, and the smallest one counts."""
        parts = self.path.split("/")
        return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


class CgroupLimit(NamedTuple):
    """level: the part of the path that sets the limit; None where the machine itself does."""
    amount: Optional[int]
    level: Optional[str]


def parse_cgroup_paths(text: str) -> Dict[str, str]:
    """/proc/self/cgroup as {controller: path}; the name of the v2 hierarchy is ""."""
    rows = [line.split(":", 2) for line in text.splitlines()]
    return {name: row[2] for row in rows if len(row) == 3 for name in row[1].split(",")}


def parse_cgroup_mounts(text: str) -> List[Tuple[str, str, str]]:
    """(controller, root, mount point) from /proc/self/mountinfo; v2 is controller ""."""
    found = []
    for line in text.split("\n"):
        left, _, right = line.partition(" - ")
        where, what = left.split(" "), right.split(" ")
        if len(where) < 5 or what[0] not in ("cgroup", "cgroup2"):
            continue
        # A blank, a line break or a backslash in a name stands there as an octal number.
        root, mount = [re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), name)
                       for name in where[3:5]]
        names = [""] if what[0] == "cgroup2" else what[-1].split(",")
        found.extend((name, root, mount) for name in names)
    return found


def find_cgroup(controller: str, cgroup_text: str, mountinfo_text: str) -> Optional[Cgroup]:
    """Our cgroup for a controller, from /proc/self/cgroup and /proc/self/mountinfo."""
    paths = parse_cgroup_paths(cgroup_text)
    key = controller if controller in paths else ""  # what v1 lists is governed by v1
    mounts = [row[1:] for row in parse_cgroup_mounts(mountinfo_text) if row[0] == key]
    if key not in paths or not mounts:
        return None
    files, path = CGROUP_V1 if key else CGROUP_V2, paths[key]
    for root, mount in mounts:
        above = root.rstrip("/")  # in a container this mount may begin further down
        if ".." not in path.split("/") and (path + "/").startswith(above + "/"):
            return Cgroup(files, mount, path[len(above):].rstrip("/"))
    # The path is one that another namespace sees; where we are mounted is all that we see.
    return Cgroup(files, mounts[0][1], "")


def parse_cpu_limit(text: str) -> Optional[int]:
    """Millicores from `quota period` in microseconds; None for no limit.

    >>> parse_cpu_limit("250000 100000"), parse_cpu_limit("50000"), parse_cpu_limit("max 100000")
    (2500, 500, None)
    """
    quota, period = [parse_int(word) for word in (text.split() + ["100000", ""])[:2]]
    if not quota or not period or quota < 0 or period < 0:
        return None
    return max(1, quota * 1000 // period)


def parse_memory_limit(text: str) -> Optional[int]:
    """Bytes; None for no limit: `max`, or in v1 a number near 2^63 or 2^64."""
    limit = parse_int(text)
    return limit if limit is not None and 0 <= limit < 1 << 62 else None


def parse_keyed(text: str) -> Dict[str, int]:
    """cpu.stat and memory.stat: `name number` lines."""
    rows = [line.split() for line in text.splitlines()]
    pairs = [(row[0], parse_int(row[1])) for row in rows if len(row) == 2]
    return {name: number for name, number in pairs if number is not None}


def parse_cpu_usage_ns(text: str) -> Optional[int]:
    """v2: usage_usec of cpu.stat; v1: the one number of cpuacct.usage, nanoseconds."""
    usage_us = parse_keyed(text).get("usage_usec")
    return parse_int(text) if usage_us is None else usage_us * 1000


# macOS: output of its programs.  Sources: psutil's arch/osx, exelban/stats, Apple's vm_stat.

_MACOS_VIRTUAL = ("lo", "utun", "awdl", "llw", "bridg", "gif", "stf", "anpi", "ap", "vmnet",
                  "vmenet", "feth")


def parse_vm_stat(text: str) -> Optional[int]:
    """Bytes in use as Activity Monitor counts them: wired, compressed, and what programs hold.

    File cache and purgeable memory are left out: `top` counts them, and so always looks full.
    """
    head = re.search(r"page size of ([0-9]{1,9}) bytes", text)
    rows = [line.partition(":") for line in text.splitlines()]
    pages = {name.strip('"'): parse_int(rest.strip().rstrip(".")) for name, _, rest in rows}
    parts = [pages.get(name) for name in ("Pages wired down", "Pages occupied by compressor",
                                          "Anonymous pages", "Pages purgeable")]
    if not head or None in parts:
        return None
    wired, compressed, anonymous, purgeable = parts
    return (wired + compressed + max(0, anonymous - purgeable)) * int(head.group(1))


def parse_netstat(text: str) -> BytesPair:
    """(received, sent) from `netstat -ibn`: only the <Link> rows, the others repeat them."""
    rows = [line.split() for line in text.splitlines()]
    # Counted from the right, because some rows have no address: Ibytes Opkts Oerrs Obytes Coll.
    return sum_traffic(((row[0], parse_int(row[-5]), parse_int(row[-2])) for row in rows
                        if len(row) >= 10 and row[2].startswith("<Link#")), _MACOS_VIRTUAL)


def parse_ioreg_disks(text: str) -> BytesPair:
    """(read, written) from the statistics of every IOBlockStorageDriver."""
    read, written = [[int(count) for count in re.findall(way + r' ?= ?([0-9]{1,20})\b', text)]
                     for way in (r'"Bytes \(Read\)"', r'"Bytes \(Write\)"')]
    return (sum(read), sum(written)) if read and len(read) == len(written) else _UNKNOWN


def parse_swapusage(text: str) -> BytesPair:
    """(total, used) from `sysctl -n vm.swapusage`: `total = 2048.00M  used = 80.31M  …`."""
    rows = re.findall(r"\b(total|used) = ([0-9]{1,9})[.,]([0-9]{2})M", text)
    sizes = {name: (int(whole + hundredths) << 20) // 100 for name, whole, hundredths in rows}
    return sizes.get("total"), sizes.get("used")


def parse_boottime(text: str) -> Optional[int]:
    """Wall-clock seconds from `sysctl -n kern.boottime`: `{ sec = 1592836479, usec = … } …`."""
    match = re.search(r"\bsec = ([0-9]{1,12})\b", text)
    return int(match.group(1)) if match else None


class MachTicks:
    """CPU ticks of all cores together, from the call that `top` uses.

    Source: mach/host_info.h: HOST_CPU_LOAD_INFO is 3; user, system, idle, nice, each 32 bits.
    """

    def __init__(self, library: Any = None) -> None:
        try:
            import ctypes
            self._library = library or ctypes.CDLL("/usr/lib/libSystem.B.dylib")
            self._library.mach_host_self.restype = ctypes.c_uint32
            self._host = self._library.mach_host_self()  # kept: each call adds a port reference
        except (ImportError, OSError, AttributeError):
            self._library = None

    def read(self) -> Optional[CpuReading]:
        if self._library is None:
            return None
        import ctypes
        ticks, count = (ctypes.c_uint32 * 4)(), ctypes.c_uint32(4)
        if self._library.host_statistics(ctypes.c_uint32(self._host), 3, ticks,
                                         ctypes.byref(count)) != 0:
            return None
        user, system, idle, nice = ticks
        return CpuReading("mach", (user, system, nice), (idle,))


class Host:
    """A platform that we cannot measure: every value but the load is None.  One thread calls
    sample().  clock_s must stand still while the machine sleeps, as the CPU counters do: so
    monotonic(), not now_s()."""

    name = "unknown"
    cpu_wraps_at: Optional[int] = None

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._last = Counters(clock_s(), self._read_cpu())
        self._cpu_pct: Optional[float] = None
        self._rates: Tuple[Optional[float], ...] = ()

    def sample(self, disk_path: str) -> HostSample:
        """CPU percent covers the time since the sample before, or since the start.  What is asked
        again within SHORTEST_WINDOW_S gets the last percent and rates: several callers share us."""
        now = Counters(self._clock_s(), self._read_cpu(), self._read_traffic())
        long_enough = now.at_s - self._last.at_s >= SHORTEST_WINDOW_S
        if long_enough or not self._rates:
            # `--once` is over before the counters tick: then the mean since boot.
            self._cpu_pct = (busy_pct(self._last.cpu, now.cpu, self.cpu_wraps_at) if long_enough
                             else mean_pct(now.cpu))
            self._rates, self._last = rates_per_s(self._last, now), now
        (total, used), swap = self._read_memory()
        return HostSample(self._cpu_pct, share_pct(used, total), total, used,
                          *self._read_disk(disk_path), *now.traffic, *self._rates, *swap,
                          *read_load(), self._read_uptime())

    def capacity(self) -> Capacity:
        return Capacity(None, None)

    def facts(self) -> HostFacts:
        """Costs some milliseconds; the caller keeps them."""
        return HostFacts()

    def _read_cpu(self) -> Optional[CpuReading]:
        return None

    def _read_memory(self) -> Tuple[BytesPair, BytesPair]:
        """(total, used) of memory and of swap."""
        return _UNKNOWN, _UNKNOWN

    def _read_disk(self, disk_path: str) -> BytesPair:
        return _UNKNOWN

    def _read_traffic(self) -> Tuple[Optional[int], ...]:
        """Network received and sent, disk read and written."""
        return _UNKNOWN + _UNKNOWN

    def _read_uptime(self) -> Optional[float]:
        return None


def read_affinity() -> Sequence[int]:
    """The CPUs that this process may run on (cpusets included); () where unknown."""
    try:
        return tuple(os.sched_getaffinity(0))
    except OSError:
        return range(os.cpu_count() or 0)


class LinuxHost(Host):
    """root: the folder under which proc, sys, etc and run lie."""

    name = "linux"

    def __init__(self, root: str = "/", affinity: Callable[[], Sequence[int]] = read_affinity,
                 clock_s: Callable[[], float] = time.monotonic) -> None:
        self._root = root.rstrip("/")
        self._affinity = affinity
        # Found once: we stay in our cgroup, and mountinfo may hold thousands of lines.  The limits
        # themselves are read every time: `systemctl set-property` changes them.
        texts = [read_text(f"{self._root}/proc/self/{name}") or ""
                 for name in ("cgroup", "mountinfo")]
        self._cpu_group = find_cgroup("cpu", *texts)
        self._memory_group = find_cgroup("memory", *texts)
        # v1 may count CPU time in another hierarchy than the one that limits it.
        split = self._cpu_group is not None and self._cpu_group.files is CGROUP_V1
        self._usage_group = find_cgroup("cpuacct", *texts) if split else self._cpu_group
        super().__init__(clock_s)

    def capacity(self) -> Capacity:
        total, _ = memory_use(parse_meminfo(self._read("/proc/meminfo")))
        return Capacity(self._cpu_limit().amount, self._memory_limit(total).amount)

    def facts(self) -> HostFacts:
        # 1,024 threads of an x86 fill 2 MiB.
        model, cores, threads = parse_cpuinfo(
            read_text(f"{self._root}/proc/cpuinfo", 4 << 20) or "")
        if cores is None and self._read("/sys/devices/system/cpu/smt/active").strip() == "0":
            cores = threads
        system, version = os.uname(), self._read("/proc/version")
        # The release names Microsoft, unless somebody built a kernel: then the door to Windows.
        wsl = bool(re.match(r"Linux version \S*microsoft", version, re.IGNORECASE)
                   or self._has("/proc/sys/fs/binfmt_misc/WSLInterop"))
        return HostFacts(
            parse_os_release(self._read("/etc/os-release") or self._read("/usr/lib/os-release")),
            system.release, system.machine, model, cores, threads, self._find_container(), wsl)

    def _find_container(self) -> str:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            return "kubernetes"
        # systemd writes the file in a container; nspawn, podman and LXC set the variable.
        return (self._read("/run/systemd/container").strip()[:64] or os.environ.get("container")
                or find_container(self._read("/proc/1/cgroup"), self._read("/proc/self/mountinfo"))
                or self._has("/run/.containerenv") and "podman"
                or self._has("/.dockerenv") and "docker" or "")

    def _has(self, path: str) -> bool:
        return os.path.exists(self._root + path)

    def _read_cpu(self) -> Optional[CpuReading]:
        limit = self._cpu_limit()
        if limit.level is None:
            return parse_cpu_ticks(self._read("/proc/stat"), self._affinity())
        if self._usage_group is None:
            return None
        group = self._usage_group
        used_ns = parse_cpu_usage_ns(self._read(group.mount + limit.level, group.files.cpu_usage))
        if used_ns is None:
            return None
        granted_ns = int(self._clock_s() * limit.amount * 1000000)  # 1 millicore: 10^6 ns a second
        return CpuReading(f"{limit.amount} {limit.level}", (used_ns,), (granted_ns - used_ns,))

    def _read_memory(self) -> Tuple[BytesPair, BytesPair]:
        fields = parse_meminfo(self._read("/proc/meminfo"))
        (total, used), swap = memory_use(fields), swap_use(fields)
        limit = self._memory_limit(total)
        if limit.level is None:
            return (total, used), swap
        files, folder = self._memory_group.files, self._memory_group.mount + limit.level
        held = parse_int(self._read(folder, files.memory_used))
        cache = parse_keyed(self._read(folder, "memory.stat")).get(files.reclaimable)
        # The working set, as the kubelet counts it: file cache goes before anybody is killed.
        used = None if held is None or cache is None else max(0, held - cache)
        most = parse_memory_limit(self._read(folder, "memory.swap.max"))  # v1 has no such file
        if most is not None and swap[0] is not None:
            used_swap = parse_memory_limit(self._read(folder, "memory.swap.current"))
            swap = min(most, swap[0]), used_swap and min(used_swap, most, swap[0])
        return (limit.amount, used), swap

    def _read_disk(self, disk_path: str) -> BytesPair:
        return read_disk(disk_path)

    def _read_traffic(self) -> Tuple[Optional[int], ...]:
        try:
            disks = os.listdir(f"{self._root}/sys/block")
        except OSError:
            disks = []
        return (parse_net_dev(self._read("/proc/net/dev"))
                + parse_diskstats(self._read("/proc/diskstats"), disks))

    def _read_uptime(self) -> Optional[float]:
        return parse_uptime(self._read("/proc/uptime"))

    def _read(self, folder: str, *name: str) -> str:
        # Room for 800 interfaces.  From 128 KiB on malloc maps memory: a read takes twice as long.
        return read_text("/".join((self._root + folder, *name))) or ""

    def _cpu_limit(self) -> CgroupLimit:
        group = self._cpu_group
        return self._tightest(len(self._affinity()) * 1000 or None, group,
                              group.files.cpu_limit if group else (), parse_cpu_limit)

    def _memory_limit(self, total_bytes: Optional[int]) -> CgroupLimit:
        group = self._memory_group
        return self._tightest(total_bytes, group, (group.files.memory_limit,) if group else (),
                              parse_memory_limit)

    def _tightest(self, machine: Optional[int], group: Optional[Cgroup], names: Sequence[str],
                  parse: Callable[[str], Optional[int]]) -> CgroupLimit:
        """The smallest limit from the root down; of equal ones the outer, which more share."""
        tightest = CgroupLimit(machine, None)
        for level in group.levels() if group else ():
            texts = [self._read(group.mount + level, name) for name in names]
            amount = parse(" ".join(texts)) if all(texts) else None
            if amount is not None and (tightest.amount is None or amount < tightest.amount):
                tightest = CgroupLimit(amount, level)
        return tightest


class MacHost(Host):
    """run: the door for programs.  read_ticks: where CPU ticks come from.

    There is no fallback to `top`: it takes a second, and the call behind MachTicks is public.
    """

    name = "macos"
    cpu_wraps_at = 1 << 32  # 16 busy cores get there in a month

    def __init__(self, run: Callable[..., CommandResult] = run_command,
                 read_ticks: Optional[Callable[[], Optional[CpuReading]]] = None,
                 clock_s: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._read_ticks = read_ticks or MachTicks().read
        self._capacity = Capacity(None, None)
        self._booted_s: Optional[float] = None
        super().__init__(clock_s)

    def capacity(self) -> Capacity:
        """Asked until both are known; neither changes while the machine runs."""
        if None in self._capacity:
            cores = parse_int(self._sysctl("hw.logicalcpu"))
            self._capacity = Capacity(cores * 1000 if cores else None,
                                      parse_int(self._sysctl("hw.memsize")))
        return self._capacity

    def facts(self) -> HostFacts:
        system = os.uname()
        return HostFacts(
            f"macOS {self._sysctl('kern.osproductversion')}".strip(), system.release,
            system.machine, " ".join(self._sysctl("machdep.cpu.brand_string").split()),
            parse_int(self._sysctl("hw.physicalcpu")) or None,
            parse_int(self._sysctl("hw.logicalcpu")) or None)

    def _read_cpu(self) -> Optional[CpuReading]:
        return self._read_ticks()

    def _read_memory(self) -> Tuple[BytesPair, BytesPair]:
        return ((self.capacity().memory_bytes, parse_vm_stat(self._output("/usr/bin/vm_stat"))),
                parse_swapusage(self._sysctl("vm.swapusage")))

    def _read_disk(self, disk_path: str) -> BytesPair:
        # "/" is the sealed system volume; what fills up is Data.  Python before 3.13 counts blocks
        # in 32 bits here (gh-87804): right up to 16 TiB of APFS.
        data = read_disk("/System/Volumes/Data") if disk_path == "/" else _UNKNOWN
        return read_disk(disk_path) if data == _UNKNOWN else data

    def _read_traffic(self) -> Tuple[Optional[int], ...]:
        # -d 1: without it a driver below another one is printed twice.
        disks = self._output("/usr/sbin/ioreg", "-r", "-d", "1", "-w", "0", "-c",
                             "IOBlockStorageDriver")
        return parse_netstat(self._output("/usr/sbin/netstat", "-ibn")) + parse_ioreg_disks(disks)

    def _read_uptime(self) -> Optional[float]:
        # Asked until it is known; from there now_s() goes on, whatever the wall clock is set to.
        if self._booted_s is None:
            wall_s = parse_boottime(self._sysctl("kern.boottime"))
            self._booted_s = None if wall_s is None else now_s() - max(0.0, time.time() - wall_s)
        return None if self._booted_s is None else now_s() - self._booted_s

    def _sysctl(self, name: str) -> str:
        """One name at a time: an unknown one makes sysctl fail for all."""
        return self._output("/usr/sbin/sysctl", "-n", name).strip()

    def _output(self, *argv: str) -> str:
        result = self._run(argv, 2.0)
        return result.output if result.exit_code == 0 else ""


def make_host() -> Host:
    """The one choice by platform."""
    if sys.platform.startswith("linux"):
        return LinuxHost()
    return MacHost() if sys.platform == "darwin" else Host()


# ----------------------------------------------------------------------
# 6a. GPUs: what is said of one                                no effects
# ----------------------------------------------------------------------
# One shape for every vendor; what a driver does not say is None.  A list of
# GPUs is empty for a machine that has none, and None where nobody knows: a
# hung driver, a library of another version, a GPU that fell off the bus.


LookUp = Callable[[str], Any]  # what is found under a key
Run = Callable[..., CommandResult]  # run_command, or a test's
Clock = Callable[[], float]


class GpuProcess(NamedTuple):
    """A process that computes on a GPU.  pid: as the driver sees it (a container sees others)."""
    pid: int
    memory_bytes: Optional[int]


class MigInstance(NamedTuple):
    """A slice of an NVIDIA GPU.  name: with its profile, such as "NVIDIA A100 MIG 1g.10gb"."""
    uuid: str
    name: str
    memory_total_bytes: Optional[int]
    memory_used_bytes: Optional[int]


class Gpu(NamedTuple):
    """One GPU.  Texts are "" and figures None where the driver does not say.

    index: as the vendor's tools count; it may change between boots.  bus_id: as in sysfs, such as
    "0000:65:00.0".  energy_j: a counter of the driver's own, since it was loaded.  processes: those
    that compute; () is none.  integrated: part of the CPU, with the machine's memory.  problem: why
    nothing may be placed on it.  stale: the driver did not answer now; these are its last figures.
    """
    index: int
    vendor: str
    uuid: str = ""
    name: str = ""
    bus_id: str = ""
    memory_total_bytes: Optional[int] = None
    memory_used_bytes: Optional[int] = None
    utilization_pct: Optional[float] = None
    temperature_c: Optional[float] = None
    power_w: Optional[float] = None
    power_limit_w: Optional[float] = None
    energy_j: Optional[float] = None
    fan_pct: Optional[float] = None
    graphics_clock_mhz: Optional[float] = None
    memory_clock_mhz: Optional[float] = None
    ecc_errors: Optional[int] = None
    mig_enabled: Optional[bool] = None
    mig_instances: Tuple[MigInstance, ...] = ()
    processes: Optional[Tuple[GpuProcess, ...]] = None
    cores: Optional[int] = None
    asleep: bool = False
    integrated: bool = False
    problem: str = ""
    stale: bool = False


class GpuReading(NamedTuple):
    """What one source says.  source: "nvml", "nvidia-smi", "amdgpu", …; problem: what it could not
    tell, for a person."""
    source: str
    gpus: Optional[Tuple[Gpu, ...]]
    driver_version: str = ""
    cuda_version: str = ""
    problem: str = ""


class GpuSource:
    """The GPUs of one vendor.  One thread at a time calls read(), which may take as long as a
    driver likes."""

    vendor = ""

    def present(self) -> bool:
        """Whether there is a trace of them: a few file look-ups, no program."""
        raise NotImplementedError

    def read(self) -> GpuReading:
        raise NotImplementedError


# The greatest values that can be true, by field or the ending of its name: for "unknown" drivers
# have said 2^32-1 and 2^64-1.
_MOST = {"pct": 100, "fan_pct": 300, "c": 200, "w": 1e4, "mhz": 1e5, "j": 1e15, "bytes": 1 << 50,
         "errors": 1 << 60}


def possible(found: Dict[str, Any]) -> Dict[str, Any]:
    """Figures by their fields of Gpu, without those that cannot be true."""
    kept = {}
    for field, value in found.items():
        most = _MOST.get(field) or _MOST.get(field.rpartition("_")[2])
        if most is None or value is not None and 0 <= value <= most:
            kept[field] = value
    if kept.get("memory_used_bytes", 0) > kept.get("memory_total_bytes", 1 << 50):
        del kept["memory_used_bytes"]
    return kept


class Figure(NamedTuple):
    """Where a field of Gpu is found, in files or in what a tool says.  keys: the first one that
    holds a number counts.  unit: what 1 is worth in the field's."""
    field: str
    keys: Tuple[str, ...]
    unit: float = 1


def parse_figure(word: Any) -> Optional[float]:
    """The number of a JSON value such as {"value": 94, "unit": "%"}, or of a word with its unit,
    such as "(1402Mhz)"; None where it is none."""
    if isinstance(word, dict):
        word = word.get("value")
    if isinstance(word, (int, float)) and not isinstance(word, bool):
        return float(word) if 0 <= word < 1e18 else None
    if not isinstance(word, str) or len(word) > 64:
        return None
    match = re.fullmatch(r"\s*\(?([0-9]{1,18}(\.[0-9]{1,18})?)\s*[A-Za-z%]*\)?\s*", word)
    return float(match.group(1)) if match else None


def read_figures(table: Sequence[Figure], look: LookUp) -> Dict[str, Any]:
    """{field: figure} of those that are known.  look: what is found under a key."""
    found: Dict[str, Any] = {}
    for field, keys, unit in table:
        values = (parse_figure(look(key)) for key in keys)
        value = next((one for one in values if one is not None), None)
        if value is not None:
            whole = field.endswith(("_bytes", "_errors"))
            found[field] = int(value * unit) if whole else round(value * unit, 6)
    return possible(found)


def first_text(look: LookUp, *keys: str) -> str:
    """The first that is a name: no number, no "N/A", no "[Not Supported]"."""
    for text in map(look, keys):
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace").rstrip("\0")
        unsaid = r"(?i)\s*(\[|N/A|ERR!|not supp|unknown|0x|$)"
        if isinstance(text, str) and not re.match(unsaid, text):
            return printable(text.strip()[:200])
    return ""


# What tools call them: nvidia-smi, rocm-smi (in lower case, for that has changed), amd-smi, xpu-smi
# and ioreg.  AMD's memory is of two kinds: see amd_gpu.
_MIB = 1 << 20  # which amd-smi calls MB
TOOL_FIGURES = (
    Figure("utilization_pct", ("utilization.gpu", "gpu use (%)", "usage.gfx_activity",
                               "GPU Utilization (%)", "Device Utilization %")),
    Figure("temperature_c", (
        "temperature.gpu", "temperature (sensor edge) (c)", "temperature (sensor junction) (c)",
        "temperature.edge", "temperature.hotspot", "GPU Core Temperature (Celsius Degree)")),
    Figure("power_w", ("power.draw", "average graphics package power (w)", "power.socket_power",
                       "current socket graphics package power (w)", "GPU Power (W)")),
    Figure("power_limit_w", ("enforced.power.limit", "max graphics package power (w)",
                             "limit.socket_power", "limit.ppt0.socket_power_limit")),
    Figure("fan_pct", ("fan.speed", "fan speed (%)", "fan.usage")),
    Figure("graphics_clock_mhz", ("clocks.gr", "sclk clock speed:", "clock.gfx_0.clk",
                                  "GPU Frequency (MHz)")),
    Figure("memory_clock_mhz", ("clocks.mem", "mclk clock speed:", "clock.mem_0.clk")),
    Figure("ecc_errors", ("ecc.errors.uncorrected.volatile.total",)),
    Figure("memory_total_bytes", ("memory.total", "Memory Physical Size"), _MIB),
    Figure("memory_used_bytes", ("memory.used", "GPU Memory Used (MiB)"), _MIB),
    Figure("memory_used_bytes", ("In use system memory",)),
    Figure("vram_total_bytes", ("vram total memory (b)",)),
    Figure("vram_total_bytes", ("mem_usage.total_vram",), _MIB),
    Figure("vram_used_bytes", ("vram total used memory (b)",)),
    Figure("vram_used_bytes", ("mem_usage.used_vram",), _MIB),
    Figure("gtt_total_bytes", ("gtt total memory (b)",)),
    Figure("gtt_total_bytes", ("mem_usage.total_gtt",), _MIB),
    Figure("gtt_used_bytes", ("gtt total used memory (b)",)),
    Figure("gtt_used_bytes", ("mem_usage.used_gtt",), _MIB))


# The names that Beta9's scheduler knows.  A laptop's chip, or a slice of a GPU (vGPU), is not the
# GPU whose name it bears: work that needs that one's memory would fail on it.
_GPU_TYPES = (
    (r"A100\b.*\b80GB", "A100-80"), (r"A100\b.*\b40GB", "A100-40"), (r"A100\b", "A100"),
    (r"V100S?\b.*\b32GB", "V100-32"), (r"V100\b", "V100"),
    (r"RTX PRO 6000\b", "RTXPro6000"), (r"RTX 6000 Ada\b", "RTX6000Ada"),
    (r"RTX 4000( SFF)? Ada\b", "RTX4000Ada"), (r"RTX 6000$", "RTX6000"),
    (r"RTX (4090|5090)( D)?$", r"RTX\1"), (r"RTX (A[456]000)\b", r"\1"),
    (r"(GH200|H100|H200|B200|B300|L40S|L40|L4|A10G|A10|A16|A30|A40|T4)\b", r"\1"))


def gpu_type(name: str) -> str:
    """Beta9's name for a device name; "" for a device it has none for."""
    bare = re.sub(r"^(NVIDIA |Tesla |Quadro |GeForce |GRID )*", "", name.strip())
    if re.search(r"\bLaptop\b|-[0-9]+[ABCQ]$|\bMIG\b", bare):
        return ""
    matches = ((re.match(pattern, bare), known) for pattern, known in _GPU_TYPES)
    return next((match.expand(known) for match, known in matches if match), "")


def list_folder(path: str) -> List[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


TOOL_LIMIT_S = 30.0


class Tool:
    """A vendor's program.  It may hang in a driver, where nothing can end it; until it has ended no
    second one is started.  search_path: folders as in PATH, which is also the default."""

    def __init__(self, name: str, search_path: Optional[str], run: Run) -> None:
        self.name, self._search_path, self._run = name, search_path, run
        self._stuck: Any = None

    def find(self) -> Optional[str]:
        """Before it is started: a try to start a missing program costs a fork."""
        return find_program(self.name, self._search_path)

    def ask(self, *arguments: str) -> CommandResult:
        program = self.find()
        if program is None:
            return CommandResult(None, "", f"{self.name} is not installed")
        if self._stuck is not None and self._stuck.poll() is None:
            return CommandResult(None, "", f"{self.name} hangs in the driver")
        result = self._run((program,) + arguments, TOOL_LIMIT_S)
        self._stuck = result.stuck
        return result


def _visible(gpus: Sequence[Gpu], variable: str) -> List[Gpu]:
    """What CUDA_VISIBLE_DEVICES leaves: indexes, or the beginnings of UUIDs; the first word that is
    none of them, and what comes after it, counts for nothing (CUDA C Programming Guide)."""
    found: List[Gpu] = []
    for word in map(str.strip, variable.split(",")):
        named = [gpu for gpu in gpus if str(gpu.index) == word
                 or len(word) > 4 and gpu.uuid.startswith(word)
                 or any(part.uuid == word for part in gpu.mig_instances)]
        if len(named) != 1:
            break
        found += [gpu for gpu in named if gpu not in found]
    return found


def offered_gpus(gpus: Sequence[Gpu], vendor: str, gpu_ids: Optional[Sequence[Tuple[str, int]]],
                 max_gpus: Optional[int], visible: Optional[str] = None) -> List[Gpu]:
    """The healthy GPUs that the gateway is told of: of one vendor, for a pool has GPUs of one type;
    one that is part of the CPU only where there is no other, and with known memory.  gpu_ids:
    (vendor, index) of those that are chosen instead, "" being `vendor`; an empty list is no GPU.
    visible: CUDA_VISIBLE_DEVICES, about NVIDIA's GPUs only."""
    if gpu_ids is None:
        own = [gpu for gpu in gpus if gpu.vendor == vendor]
        chosen = [gpu for gpu in own if not gpu.integrated] or [
            gpu for gpu in own if gpu.memory_total_bytes is not None]
    else:
        wanted = {(named or vendor, index) for named, index in gpu_ids}
        chosen = [gpu for gpu in gpus if (gpu.vendor, gpu.index) in wanted]
    if visible is not None:
        seen = _visible([gpu for gpu in gpus if gpu.vendor == "nvidia"], visible)
        chosen = [gpu for gpu in chosen if gpu.vendor != "nvidia" or gpu in seen]
    chosen = [gpu for gpu in chosen if gpu.stale or not gpu.problem]
    return chosen if max_gpus is None else chosen[:max(0, max_gpus)]


def is_free(gpu: Gpu, idle_pids: Iterable[int] = ()) -> bool:
    """Whether the scheduler may place work on a GPU: it is healthy, nobody computes on it, and less
    than 5 % of its memory, and less than 1 GiB, is in use; where that is unknown it may be busy.
    idle_pids: engines of ours that are idle and would be ended for the work: they do not count."""
    total, used = gpu.memory_total_bytes, gpu.memory_used_bytes
    if gpu.problem or total is None or used is None:
        return False
    idle = set(idle_pids)
    if any(process.pid not in idle for process in gpu.processes or ()):
        return False
    used -= sum(process.memory_bytes or 0 for process in gpu.processes or ())
    return used < min(total * 0.05, 1 << 30)


# ----------------------------------------------------------------------
# 6b. GPUs: NVIDIA    loads libnvidia-ml.so.1; where there is none, runs nvidia-smi
# ----------------------------------------------------------------------
# NVML is the library behind nvidia-smi (nvml.h).  One session with it stays
# open: without the persistence daemon every new one starts all GPUs, which
# takes seconds.  Each figure is asked for by itself, for a driver refuses
# those that a GPU does not have, and a GPU off the bus spoils no other.


class NvmlFigure(NamedTuple):
    """A call.  layout: of its result, as in the module struct; fields: of Gpu, one for each of the
    result's members; arguments: between the device and the result; version: the word that the
    result begins with."""
    symbol: str
    layout: str
    fields: Tuple[str, ...]
    arguments: Tuple[int, ...] = ()
    version: int = 0


# Two rows with the same fields: the second is for drivers that refuse the first.  Power and energy
# come in thousandths.
NVML_MEMORY = (
    NvmlFigure("nvmlDeviceGetMemoryInfo_v2", "IQQQQ",
               ("", "memory_total_bytes", "", "", "memory_used_bytes"), version=0x02000028),
    NvmlFigure("nvmlDeviceGetMemoryInfo", "QQQ", ("memory_total_bytes", "", "memory_used_bytes")))
NVML_FIGURES = (NvmlFigure("nvmlDeviceGetMigMode", "I", ("mig_enabled",)),) + NVML_MEMORY + (
    NvmlFigure("nvmlDeviceGetUtilizationRates", "II", ("utilization_pct", "")),
    NvmlFigure("nvmlDeviceGetTemperature", "I", ("temperature_c",), (0,)),
    NvmlFigure("nvmlDeviceGetTemperatureV", "IIi", ("", "", "temperature_c"), version=0x0100000C),
    NvmlFigure("nvmlDeviceGetPowerUsage", "I", ("power_w",)),
    NvmlFigure("nvmlDeviceGetEnforcedPowerLimit", "I", ("power_limit_w",)),
    NvmlFigure("nvmlDeviceGetTotalEnergyConsumption", "Q", ("energy_j",)),
    NvmlFigure("nvmlDeviceGetFanSpeed", "I", ("fan_pct",)),
    NvmlFigure("nvmlDeviceGetClockInfo", "I", ("graphics_clock_mhz",), (0,)),
    NvmlFigure("nvmlDeviceGetClockInfo", "I", ("memory_clock_mhz",), (2,)),
    NvmlFigure("nvmlDeviceGetTotalEccErrors", "Q", ("ecc_errors",), (1, 0)))

# nvmlReturn_t
_NOT_SUPPORTED, _TOO_SMALL, _NOT_LOADED, _NO_SYMBOL, _MISMATCH = 3, 7, 9, 13, 18
_LOST, _NEEDS_RESET, _UNKNOWN_ERROR = 15, 16, 999
_SICK = (_LOST, _NEEDS_RESET, _UNKNOWN_ERROR)
_REFUSALS = (_NOT_SUPPORTED, _NO_SYMBOL, 25, 26)  # 25, 26: of another version
NVML_REOPEN_S = 3600.0  # what is sick may come back in another session, which may cost seconds

_NVML_PROBLEMS = {
    4: "no permission to open it: look at the rights of /dev/nvidia*",
    _NOT_LOADED: "the driver is not loaded: try `modprobe nvidia`; after a new kernel, reinstall "
                 "the driver",
    _LOST: "it fell off the bus (NVML: GPU is lost): reboot the machine",
    _NEEDS_RESET: "it needs a reset: nvidia-smi --gpu-reset, or reboot the machine",
    17: "the operating system keeps it from this process: a container that lost its devices has to "
        "be started again",
    _MISMATCH: "the driver and its library are of different versions (NVML: version mismatch), as "
               "after an update: reboot, or reload the module nvidia",
    _UNKNOWN_ERROR: "its driver fails (NVML: unknown error): a container that lost its devices has "
                    "to be started again; otherwise see dmesg for Xid, and reboot the machine"}


def nvml_problem(code: int) -> str:
    return _NVML_PROBLEMS.get(code, f"its driver fails (NVML code {code})")


def is_sick(symbol: str, code: int) -> bool:
    """Whether a call's code says that the whole GPU is unwell.  Unknown errors of a power or fan
    sensor alone are common on laptops."""
    return code in (_LOST, _NEEDS_RESET) or code == _UNKNOWN_ERROR and bool(
        re.match("nvmlDeviceGet(Memory|Utilization|Temperature)", symbol))


def processes_of(rows: Sequence[Tuple[Optional[int], Optional[int]]]
                 ) -> Optional[Tuple[GpuProcess, ...]]:
    """From (pid, bytes): a process has a row for each slice of a GPU that it is on.  None where a
    row does not say which process it is."""
    found: Dict[int, Optional[int]] = {}
    for pid, memory in rows:
        if pid is None or pid < 0:
            return None
        before = found.get(pid, 0)
        # 2^64-1: Windows keeps the books.
        known = before is not None and memory is not None and 0 <= memory <= 1 << 50
        found[pid] = before + memory if known else None
    return tuple(GpuProcess(pid, found[pid]) for pid in sorted(found))


def with_host_memory(gpu: Gpu, root: str) -> Gpu:
    """A GPU that shares the machine's memory (GB10, Jetson), of which NVML says nothing: all of it
    is the GPU's, and what its processes hold is in use."""
    total = parse_meminfo(read_text(f"{root}/proc/meminfo") or "").get("MemTotal")
    held = [None] if gpu.processes is None else [process.memory_bytes for process in gpu.processes]
    used = None if None in held else sum(held)
    found = possible({"memory_total_bytes": total, "memory_used_bytes": used})
    return gpu._replace(memory_total_bytes=found.get("memory_total_bytes"),
                        memory_used_bytes=found.get("memory_used_bytes"), integrated=True)


def parse_gpu_information(text: str) -> Dict[str, str]:
    """/proc/driver/nvidia/gpus/BUS/information: lines such as `Model: 		 Tesla T4`."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs if value.strip()}


def has_nvidia_hardware(root: str) -> bool:
    """Whether there is an NVIDIA GPU for a driver to load for: in a Jetson, behind Windows, or on
    the PCI bus (class 03).  True where there is no telling."""
    folder = f"{root}/sys/bus/pci/devices"
    found = [tuple((read_text(f"{folder}/{device}/{name}", 64) or "")[:length]
                   for name, length in (("vendor", 6), ("class", 4)))
             for device in list_folder(folder)]
    other = any(os.path.exists(f"{root}/dev/{name}") for name in ("nvhost-gpu", "dxg"))
    return other or not found or ("0x10de", "0x03") in found


class NvmlError(Exception):
    """A call that failed.  code: nvmlReturn_t."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class NvmlLibrary:
    """The door to libnvidia-ml.  Raises: OSError where it cannot be opened."""

    def __init__(self, path: str) -> None:
        import ctypes  # 3 ms that a machine without NVIDIA's driver never pays
        import struct
        self._ctypes, self._struct, self._library = ctypes, struct, ctypes.CDLL(path)

    def has(self, symbol: str) -> bool:
        return hasattr(self._library, symbol)

    def call(self, symbol: str, *arguments: Any) -> int:
        """What a function returns; 13 where this library lacks it."""
        return getattr(self._library, symbol)(*arguments) if self.has(symbol) else _NO_SYMBOL

    def ask(self, symbol: str, layout: str, *arguments: Any, version: int = 0) -> Tuple[Any, ...]:
        """The members of the result, whose address goes last.  Raises: NvmlError."""
        result = self._ctypes.create_string_buffer(self._struct.calcsize(layout))
        if version:
            self._struct.pack_into("I", result, 0, version)
        results = [result]
        if symbol == "nvmlDeviceGetMigMode":
            results.append(self._ctypes.create_string_buffer(4))  # the mode after the next reset
        code = self.call(symbol, *arguments, *results)
        if code:
            raise NvmlError(code)
        return self._struct.unpack(layout, result.raw)

    def handle(self, symbol: str, *arguments: Any) -> Any:
        """A device, as a pointer: ctypes would cut a number to 32 bits.  Raises: NvmlError."""
        return self._ctypes.c_void_p(self.ask(symbol, "P", *arguments)[0])

    def text(self, symbol: str, *arguments: Any) -> str:
        """A text, or "" where the library has none to give.  Raises: NvmlError for a sick GPU."""
        buffer = self._ctypes.create_string_buffer(96)
        code = self.call(symbol, *arguments, buffer, 96)
        if code in _SICK:
            raise NvmlError(code)
        return "" if code else printable(buffer.value.decode("utf-8", "replace"))

    def rows(self, symbol: str, layout: str, device: Any) -> List[Tuple[Any, ...]]:
        """An array whose length the library says, and may outgrow before it is asked again."""
        size, room, array = self._struct.calcsize(layout), 0, None
        for _ in range(4):
            count = self._ctypes.c_uint32(room)
            code = self.call(symbol, device, self._ctypes.byref(count), array)
            if code != _TOO_SMALL:
                break
            room = min(count.value, 4096) * 2 + 5
            array = self._ctypes.create_string_buffer(room * size)
        if code:
            raise NvmlError(code)
        used = array.raw[:min(count.value, room) * size] if array else b""
        return list(self._struct.iter_unpack(layout, used))


class Nvml:
    """A session with NVML, and what is remembered of its GPUs.  root: the folder under which proc,
    sys and dev lie."""

    def __init__(self, library: NvmlLibrary, root: str, clock: Clock) -> None:
        self._library, self._root, self._clock = library, root, clock
        self._is_open, self._count, self._versions = False, 0, ("", "")
        self._reopen_s: Optional[float] = None  # on the clock, where a GPU is sick
        self._handles: Dict[int, Any] = {}      # of this session
        self._known: Dict[int, Gpu] = {}        # what does not change, of this and earlier ones
        self.init_code = 0

    def read(self) -> GpuReading:
        try:
            self._open()
        except NvmlError as error:
            self.init_code = error.code
            # Images for GPU machines have NVIDIA's library on machines without a GPU as well.
            if error.code == _NOT_LOADED and not has_nvidia_hardware(self._root):
                return GpuReading("nvml", ())
            return GpuReading("nvml", None, problem="NVIDIA: " + nvml_problem(error.code))
        buses = list_folder(f"{self._root}/proc/driver/nvidia/gpus")
        gpus = tuple(self._read_gpu(index, buses) for index in range(self._count))
        listed = {gpu.bus_id for gpu in gpus}
        hidden = self._hidden([bus_id for bus_id in buses if not listed & {bus_id, ""}])
        return GpuReading("nvml", gpus, *self._versions, "; ".join(hidden))

    def _open(self) -> None:
        """Raises: NvmlError."""
        library, due_s = self._library, self._reopen_s
        if self._is_open and (due_s is None or self._clock() < due_s):
            return
        if self._is_open:
            library.call("nvmlShutdown")
            self._is_open = False
        code = library.call("nvmlInit_v2")
        if code:
            raise NvmlError(code)
        try:
            count = min(library.ask("nvmlDeviceGetCount_v2", "I")[0], 64)
            self._versions = library.text("nvmlSystemGetDriverVersion"), self._cuda_version()
        except NvmlError:
            library.call("nvmlShutdown")
            raise
        if count != self._count:
            self._known.clear()  # other GPUs may stand at these indexes now
        self._handles.clear()
        self._is_open, self._count, self._reopen_s, self.init_code = True, count, None, 0

    def _cuda_version(self) -> str:
        try:
            version, = self._library.ask("nvmlSystemGetCudaDriverVersion_v2", "i")
        except NvmlError:
            return ""
        return f"{version // 1000}.{version % 1000 // 10}"

    def _information(self, bus_id: str) -> Dict[str, str]:
        return parse_gpu_information(
            read_text(f"{self._root}/proc/driver/nvidia/gpus/{bus_id}/information", 65536) or "")

    def _hidden(self, buses: Sequence[str]) -> Iterator[str]:
        """Why NVML may not list GPUs that the kernel's driver knows."""
        for bus_id in buses:
            facts = self._information(bus_id)
            minor = facts.get("Device Minor", "")
            if minor.isdigit() and not os.path.exists(f"{self._root}/dev/nvidia{minor}"):
                continue  # another container has it
            why = "the driver knows it, but NVML does not list it: see dmesg"
            if facts.get("GPU Excluded", facts.get("Blacklisted")) == "Yes":
                why = "it is excluded (NVreg_ExcludedGpus), or the driver took it out as broken"
            elif facts.get("Video BIOS", "").startswith("??"):
                why = "the driver could not start it: see dmesg for NVRM"
            yield f"GPU {bus_id}: {why}"

    def _read_gpu(self, index: int, buses: Sequence[str]) -> Gpu:
        known = self._known.get(index) or self._guess(index, buses)
        path = f"{self._root}/sys/bus/pci/devices/{known.bus_id}/power/runtime_status"
        if known.bus_id and (read_text(path, 64) or "").strip() == "suspended":
            # Any question would wake it.  It sleeps because nobody computes on it.
            return known._replace(asleep=True, memory_used_bytes=0, utilization_pct=0.0,
                                  processes=())
        try:
            if index not in self._handles:
                handle = self._library.handle("nvmlDeviceGetHandleByIndex_v2", index)
                self._known[index] = known = self._identify(handle, known)
                self._handles[index] = handle
            gpu = self._measure(self._handles[index], known)
        except NvmlError as error:
            return self._sick(known, error.code)
        if not gpu.problem:
            self._known[index] = known._replace(memory_total_bytes=gpu.memory_total_bytes,
                                                mig_enabled=gpu.mig_enabled)
        return gpu

    def _guess(self, index: int, buses: Sequence[str]) -> Gpu:
        """What the kernel says of a GPU that was never asked.  NVML counts in the bus's order."""
        if len(buses) != self._count:
            return Gpu(index, "nvidia")
        facts = self._information(buses[index])
        uuid = facts.get("GPU UUID", "")
        return Gpu(index, "nvidia", "" if "?" in uuid else uuid, first_text(facts.get, "Model"),
                   buses[index])

    def _identify(self, handle: Any, guess: Gpu) -> Gpu:
        """Raises: NvmlError, where the GPU is sick."""
        known = guess._replace(uuid=self._library.text("nvmlDeviceGetUUID", handle),
                               name=self._library.text("nvmlDeviceGetName", handle))
        try:
            pci = self._library.ask("nvmlDeviceGetPciInfo_v3", "16s5I32s", handle)
        except NvmlError:
            return known
        return known._replace(bus_id="{:04x}:{:02x}:{:02x}.0".format(*pci[1:4]))

    def _sick(self, gpu: Gpu, code: int) -> Gpu:
        if code in _SICK and self._reopen_s is None:
            self._reopen_s = self._clock() + NVML_REOPEN_S
        return gpu._replace(problem=nvml_problem(code))

    def _measure(self, handle: Any, known: Gpu) -> Gpu:
        found, failed = self._figures(handle, NVML_FIGURES)
        mig = {0: False, 1: True}.get(found.pop("mig_enabled", None))
        gpu = known._replace(**dict(possible(found), mig_enabled=mig))
        for symbol, code in failed.items():
            if is_sick(symbol, code):
                return self._sick(gpu, code)
        slices = list(self._slices(handle)) if mig else []
        gpu = gpu._replace(mig_instances=tuple(part for _, part in slices),
                           processes=self._processes(handle, [part for part, _ in slices]))
        shares = failed.get("nvmlDeviceGetMemoryInfo") == _NOT_SUPPORTED
        return with_host_memory(gpu, self._root) if shares else gpu

    def _figures(self, handle: Any, rows: Sequence[NvmlFigure]
                 ) -> Tuple[Dict[str, Any], Dict[str, int]]:
        """(figures by their fields, codes of the calls that failed).  A sick GPU is left alone:
        every call may last until a time limit of the driver."""
        found: Dict[str, Any] = {}
        failed: Dict[str, int] = {}
        for row in rows:
            if any(field in found for field in row.fields):
                continue
            try:
                members = self._library.ask(row.symbol, row.layout, handle, *row.arguments,
                                            version=row.version)
            except NvmlError as error:
                failed[row.symbol] = error.code
                if is_sick(row.symbol, error.code):
                    break
                continue
            found.update((field, value / 1000 if field.endswith(("_w", "_j")) else value)
                         for field, value in zip(row.fields, members) if field)
        return found, failed

    def _slices(self, device: Any) -> Iterator[Tuple[Any, MigInstance]]:
        """(handle, slice): the slots have holes."""
        library = self._library
        try:
            slots = min(library.ask("nvmlDeviceGetMaxMigDeviceCount", "I", device)[0], 16)
        except NvmlError:
            return
        for slot in range(slots):
            try:
                handle = library.handle("nvmlDeviceGetMigDeviceHandleByIndex", device, slot)
                texts = [library.text(symbol, handle)
                         for symbol in ("nvmlDeviceGetUUID", "nvmlDeviceGetName")]
            except NvmlError:
                continue
            memory = possible(self._figures(handle, NVML_MEMORY)[0])
            yield handle, MigInstance(*texts, memory.get("memory_total_bytes"),
                                      memory.get("memory_used_bytes"))

    def _processes(self, device: Any, slices: Sequence[Any]) -> Optional[Tuple[GpuProcess, ...]]:
        """A GPU's own list has those of its slices, but needs rights where it is sliced."""
        own = self._process_list(device)
        lists = [self._process_list(part) for part in slices] if own is None else [own]
        if not lists or None in lists:
            return None
        return processes_of([row for rows in lists for row in rows])

    def _process_list(self, handle: Any) -> Optional[List[Tuple[int, int]]]:
        """(pid, bytes) by the newest function that is there.  Some drivers 530 to 535 wrote 32
        bytes for each process of _v3 (nvitop's rule)."""
        longer = (self._library.has("nvmlDeviceGetConfComputeMemSizeInfo")
                  and not self._library.has("nvmlDeviceGetRunningProcessDetailList"))
        newest = "IQIIQ" if longer else "IQII"
        for version, layout in (("_v3", newest), ("_v2", "IQII"), ("", "IQ")):
            symbol = "nvmlDeviceGetComputeRunningProcesses" + version
            try:
                return [row[:2] for row in self._library.rows(symbol, layout, handle)]
            except NvmlError as error:
                if error.code not in _REFUSALS:
                    return None
        return None


# nvidia-smi.  The first seven columns every driver has.
NVIDIA_SMI_COLUMNS = (
    "index", "uuid", "name", "memory.total", "memory.used", "utilization.gpu", "temperature.gpu",
    "pci.bus_id", "power.draw", "enforced.power.limit", "fan.speed", "clocks.gr", "clocks.mem",
    "ecc.errors.uncorrected.volatile.total", "mig.mode.current", "driver_version")
NVIDIA_SMI_BASIC = NVIDIA_SMI_COLUMNS[:7]
_SMI_ABSENT = ("[N/A]", "N/A", "[Not Supported]")  # there is no such figure
_SMI_SICK = {"[GPU is lost]": _LOST, "[GPU requires reset]": _NEEDS_RESET,
             "[Unknown Error]": _UNKNOWN_ERROR, "ERR!": _UNKNOWN_ERROR}


def parse_smi_bus_id(word: str) -> str:
    """As in sysfs: "0000:0c:00.0" for "00000000:0C:00.0"."""
    match = re.match(r"(?:0000)?([0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f])$", word.lower())
    return match.group(1) if match else ""


def parse_nvidia_smi(text: str, columns: Sequence[str]) -> Optional[List[Gpu]]:
    """The rows that are GPUs; sentences and rows of [Unknown Error] between them, which a failing
    GPU leaves, are passed over.  [] only where no GPU is all that it says, else None."""
    gpus = []
    for line in text.splitlines():
        words = [word.strip() for word in line.split(",")]
        index, after_name = parse_int(words[0]), len(words) - len(columns) + 3
        if (index is None or not 0 <= index < 256 or after_name < 3
                or not re.match(r"GPU-|\[|N/A|ERR!|$", words[1])):
            continue
        name = ", ".join(words[2:after_name])  # which may hold commas
        row = dict(zip(columns, words[:2] + [name] + words[after_name:]))
        # Of the unknown errors only those of memory, load and temperature count: see is_sick.
        codes = [_SMI_SICK[word] for column, word in row.items() if word in _SMI_SICK
                 and (column in NVIDIA_SMI_BASIC[3:] or _SMI_SICK[word] != _UNKNOWN_ERROR)]
        gpus.append(Gpu(
            index, "nvidia", first_text(row.get, "uuid"), first_text(row.get, "name"),
            parse_smi_bus_id(row.get("pci.bus_id", "")),
            mig_enabled={"Enabled": True, "Disabled": False}.get(row.get("mig.mode.current")),
            problem=nvml_problem(codes[0]) if codes else "",
            # Not one of which it may not say it: "[Insufficient Permissions]".
            integrated=not codes and row["memory.total"] in _SMI_ABSENT,
            **read_figures(TOOL_FIGURES, row.get)))
    return gpus if gpus or text.strip() == "No devices were found" else None


def parse_lost_gpus(text: str) -> List[str]:
    """`Unable to determine the device handle for GPU1: 0000:34:00.0: Lost` and the like, as
    problems."""
    found = re.findall(r"handle for GPU ?(?:[0-9]+: )?([0-9A-Fa-f:.]{7,16}): (.{1,200})", text)
    return [f"GPU {parse_smi_bus_id(bus_id) or bus_id}: {printable(why.strip())}"
            for bus_id, why in found]


def parse_compute_apps(text: str) -> Dict[str, Optional[Tuple[GpuProcess, ...]]]:
    """Processes by the UUID of their GPU, from rows of gpu_uuid, pid, used_memory."""
    rows: Dict[str, List[Tuple[Optional[int], Optional[int]]]] = {}
    for line in text.splitlines():
        uuid, *words = [word.strip() for word in line.split(",")]
        if len(words) == 2 and uuid.startswith("GPU-"):
            mib = parse_figure(words[1])
            size = None if mib is None else int(mib) << 20
            rows.setdefault(uuid, []).append((parse_int(words[0]), size))
    return {uuid: processes_of(pairs) for uuid, pairs in rows.items()}


class NvidiaSmi(GpuSource):
    """Asks nvidia-smi.  search_path, run: as a Tool's."""

    vendor = "nvidia"

    def __init__(self, search_path: Optional[str] = None, run: Run = run_command,
                 root: str = "") -> None:
        self._tool, self._root = Tool("nvidia-smi", search_path, run), root
        self._columns = NVIDIA_SMI_COLUMNS

    def present(self) -> bool:
        return self._tool.find() is not None

    def read(self) -> GpuReading:
        if not self.present():
            return GpuReading("nvidia-smi", ())
        result = self._ask("--query-gpu=" + ",".join(self._columns))
        if "is not a valid field to query" in result.output:  # says an old driver
            self._columns = NVIDIA_SMI_BASIC
            result = self._ask("--query-gpu=" + ",".join(self._columns))
        # It may fail and still show what works: so the text counts, not its exit code.
        gpus = None if result.problem else parse_nvidia_smi(result.output, self._columns)
        if gpus is None:
            first = printable(" ".join(result.output.split())[:200])
            return GpuReading("nvidia-smi", None,
                              problem=f"nvidia-smi: {result.problem or first or 'no answer'}")
        version = re.search(r"(?m)^[0-9]+, .*, ([0-9]+\.[0-9.]+)$", result.output)
        return GpuReading("nvidia-smi", tuple(self._with_processes(gpus)) if gpus else (),
                          version.group(1) if version else "",
                          problem="; ".join(parse_lost_gpus(result.output)))

    def _ask(self, query: str) -> CommandResult:
        return self._tool.ask(query, "--format=csv,noheader,nounits")

    def _with_processes(self, gpus: Sequence[Gpu]) -> Iterator[Gpu]:
        result = self._ask("--query-compute-apps=gpu_uuid,pid,used_memory")
        found = parse_compute_apps(result.output)
        for gpu in gpus:
            if result.exit_code == 0 and gpu.uuid:
                gpu = gpu._replace(processes=found.get(gpu.uuid, ()))
            shares = gpu.integrated
            yield with_host_memory(gpu, self._root) if shares else gpu


class Nvidia(GpuSource):
    """NVIDIA's GPUs, by whatever way is there.  library: of NVML.  search_path: as PATH."""

    vendor = "nvidia"

    def __init__(self, library: str = "libnvidia-ml.so.1", root: str = "/",
                 search_path: Optional[str] = None, clock: Clock = now_s) -> None:
        self._path, self._root, self._clock = library, root.rstrip("/"), clock
        self._smi = NvidiaSmi(search_path, root=self._root)
        self._nvml: Optional[Nvml] = None

    def _exists(self, path: str) -> bool:
        return os.path.exists(f"{self._root}/{path}")

    def present(self) -> bool:
        return any(map(self._exists, ("dev/nvidiactl", "proc/driver/nvidia/version",
                                      "usr/lib/wsl/lib/libnvidia-ml.so.1"))) or self._smi.present()

    def read(self) -> GpuReading:
        nvml = self._nvml = self._nvml or self._load()
        if nvml is None:
            return self._read_without()
        reading = nvml.read()
        if nvml.init_code == _MISMATCH and self._smi.present():
            # The library in our memory may be the old one: a new process has the new one.
            other = self._smi.read()
            return reading if other.gpus is None else other
        return reading

    def _load(self) -> Optional[Nvml]:
        drivers = "usr/lib/wsl/drivers"
        folders = ["usr/lib/wsl/lib"] + [f"{drivers}/{name}"
                                         for name in list_folder(f"{self._root}/{drivers}")]
        for path in [self._path] + [f"{self._root}/{folder}/libnvidia-ml.so.1"
                                    for folder in folders]:
            try:
                return Nvml(NvmlLibrary(path), self._root, self._clock)
            except OSError:
                pass  # it is not here, or of another architecture
        return None

    def _read_without(self) -> GpuReading:
        if self._smi.present():
            return self._smi.read()
        if self._exists("dev/nvidiactl"):
            return GpuReading("nvml", None, problem="libnvidia-ml.so.1 cannot be opened, and there "
                              "is no nvidia-smi: install what the driver has for compute")
        # /proc shows a container the driver of its host.
        return GpuReading("nvml", (), problem="NVIDIA's driver runs, but no device of it is here: "
                          "start the container with --gpus all"
                          if self._exists("proc/driver/nvidia/version") else "")


# ----------------------------------------------------------------------
# 6c. GPUs: AMD, Intel, Apple     reads /sys; runs rocm-smi, xpu-smi, ioreg
# ----------------------------------------------------------------------
# Linux shows AMD's and Intel's GPUs in files that every user may read: no
# library, no root, no ROCm.  What those leave out comes from the vendor's
# tool, where one is installed.  Tables say where a field of Gpu is found.


def parse_json_within(text: str) -> Any:
    """The first JSON object, or list of objects, at the beginning of a line; None without one.
    Tools print warnings around it."""
    decoder = json.JSONDecoder(parse_int=parse_int, parse_constant=lambda name: None)
    for _, match in zip(range(20), re.finditer(r"^[ \t]*(?=[\[{])", text, re.MULTILINE)):
        try:
            value, _ = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) or value and isinstance(value[0], dict):
            return value
    return None


def look_up(record: Any, path: str) -> Any:
    """What lies at a path of keys, with dots between them; None where it ends early."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def objects_in(rows: Any) -> List[Dict[str, Any]]:
    """The objects of a JSON list; none where it is no list."""
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


# Linux: cards.  Source: the kernel's sysfs documents of amdgpu, i915 and xe.


def read_sysfs(path: str) -> Tuple[str, bool]:
    """(text, asleep): since Linux 6.15 amdgpu refuses with EPERM rather than wake a GPU up."""
    try:
        with open(path, "rb", buffering=0) as handle:
            return handle.read(65536).decode("utf-8", "replace").strip(), False
    except OSError as error:
        return "", error.errno == 1  # a file that is not for us says EACCES


SysfsReader = Callable[[str], Tuple[str, bool]]  # read_sysfs, or a test's


class Card:
    """A GPU in /sys.  Names of files are relative to /sys/class/drm/cardN, "hwmon/" is the folder
    of its sensors.  asleep: most files would wake it up, and are not read."""

    def __init__(self, root: str, name: str, read: SysfsReader) -> None:
        self._read = read
        self.folder = f"{root}/sys/class/drm/{name}/"
        self.sensors = (list_folder(self.folder + "device/hwmon") + [""])[0]
        self.asleep = False
        self.asleep = self.text("device/power/runtime_status") == "suspended"
        facts = dict(line.partition("=")[::2] for line in self.text("device/uevent").splitlines())
        self.driver, self.code = facts.get("DRIVER", ""), facts.get("PCI_ID", "")[5:].lower()
        self.bus_id = facts.get("PCI_SLOT_NAME", "").lower()
        # A container sees the host's /sys, but only the devices that it was given.
        self.is_ours = any(os.path.exists(f"{root}/dev/dri/{node}") for node in
                           [name] + list_folder(self.folder + "device/drm"))

    def path(self, name: str) -> str:
        return self.folder + name.replace("hwmon/", f"device/hwmon/{self.sensors or 'none'}/")

    def text(self, name: str) -> str:
        text, asleep = self._read(self.path(name))
        self.asleep = self.asleep or asleep
        return text

    def temperature(self, *labels: str) -> Dict[str, Any]:
        """Of the sensor with the first of these labels; "": of one without a label."""
        numbers = {self.text(f"hwmon/temp{number}_label"): number for number in (3, 2, 1)}
        number = next((numbers[label] for label in labels if label in numbers), 0)
        return read_figures([Figure("temperature_c", (f"hwmon/temp{number}_input",), 1e-3)],
                            self.text)


def list_cards(root: str, drivers: Sequence[str], read: SysfsReader) -> List[Card]:
    """In the order of the PCI bus.  Connectors (card1-DP-1) and render nodes are no cards."""
    cards = [Card(root, name, read) for name in list_folder(f"{root}/sys/class/drm")
             if re.fullmatch("card[0-9]{1,4}", name)]
    return sorted((card for card in cards if card.driver in drivers and card.is_ours),
                  key=lambda card: (len(card.bus_id), card.bus_id))


# AMD.  Sources: the kernel's amdgpu documents, amdgpu_pm.c and kfd_process.c; rocm-smi and amd-smi
# as recorded from ROCm 4.3 to 7.2.

AMD_MEMORY = [Figure(f"{kind}_{part}_bytes", (f"device/mem_info_{kind}_{part}",))
              for kind in ("vram", "gtt") for part in ("total", "used")]
AMD_SENSORS = [
    Figure("utilization_pct", ("device/gpu_busy_percent",)),
    Figure("power_w", ("hwmon/power1_average", "hwmon/power1_input"), 1e-6),
    Figure("power_limit_w", ("hwmon/power1_cap",), 1e-6),
    Figure("graphics_clock_mhz", ("hwmon/freq1_input",), 1e-6),
    Figure("memory_clock_mhz", ("hwmon/freq2_input",), 1e-6),
    Figure("fan_pct", ("hwmon/pwm1",), 100 / 255)]
ROCM_SMI_ARGUMENTS = (
    "--showid --showuniqueid --showproductname --showbus --showtemp --showuse --showpower "
    "--showmaxpower --showclocks --showfan --showdriverversion "
    "--showmeminfo vram gtt --json").split()
# Tools do not say which GPUs are part of a CPU; these architectures are.
_AMD_APU = r"gfx(902|909|90c|1033|1035|1036|1037|1103|115[0-3])\b"


def amd_uuid(text: Any) -> str:
    """As ROCR_VISIBLE_DEVICES takes it: "GPU-02150e7d042a1124" for "0x2150e7d042a1124"."""
    match = re.fullmatch("(?:0x)?0*([1-9a-fA-F][0-9a-fA-F]{0,15})",
                         text if isinstance(text, str) else "")
    return "GPU-" + match.group(1).lower().zfill(16) if match else ""


def amd_gpu(index: int, figures: Dict[str, Any], integrated: bool, **more: Any) -> Gpu:
    """One GPU.  An APU has a small carve-out (VRAM) and may use system memory beside it (GTT): a
    model lies in both, so its memory is both together.  For others GTT is only on the way."""
    kinds = ("vram", "gtt") if integrated else ("vram",)
    parts = [[figures.get(f"{kind}_{part}_bytes") for kind in kinds] for part in ("total", "used")]
    total, used = [None if None in sizes else sum(sizes) for sizes in parts]
    figures = {field: value for field, value in figures.items() if not field.endswith("_bytes")}
    memory = possible({"memory_total_bytes": total or None, "memory_used_bytes": used})
    return Gpu(index, "amd", integrated=integrated, **memory, **figures, **more)


def amd_gpu_of_tool(index: int, look: LookUp) -> Gpu:
    """Of what rocm-smi or amd-smi says of a GPU."""
    codes = [look(key) for key in ("device id", "gpu id", "asic.device_id")]
    code = next((printable(code[:20]) for code in codes if isinstance(code, str)), index)
    name = first_text(look, "device name", "card series", "card model", "asic.market_name",
                      "board.product_name")
    architecture = first_text(look, "gfx version", "asic.target_graphics_version")
    return amd_gpu(index, read_figures(TOOL_FIGURES, look), bool(re.match(_AMD_APU, architecture)),
                   name=name or f"AMD GPU {code}",
                   uuid=amd_uuid(look("unique id")) or amd_uuid(look("asic.asic_serial")),
                   bus_id=first_text(look, "pci bus", "bus.bdf").lower())


def parse_rocm_smi(text: str) -> Tuple[List[Gpu], str]:
    """(GPUs, version of the driver) from rocm-smi's JSON."""
    found = parse_json_within(text)
    gpus = []
    for name, card in found.items() if isinstance(found, dict) else ():
        if isinstance(card, dict) and re.fullmatch("card[0-9]{1,4}", name):
            look = {key.lower(): value for key, value in card.items()}.get
            gpus.append(amd_gpu_of_tool(int(name[4:]), look))
    return gpus, first_text(lambda key: look_up(found, key), "system.Driver version")


def parse_amd_smi(*texts: str) -> Tuple[List[Gpu], str]:
    """(GPUs, version of the driver) from the JSON of `amd-smi static` and `amd-smi metric`: a list
    up to ROCm 6, in ROCm 7 an object around it.  "N/A" may stand for a value or for a group."""
    rows: Dict[int, Dict[str, Any]] = {}
    for found in map(parse_json_within, texts):
        for row in objects_in(look_up(found, "gpu_data") or found):
            if type(row.get("gpu")) is int and 0 <= row["gpu"] < 10000:
                rows.setdefault(row["gpu"], {}).update(row)
    gpus, version = [], ""
    for number in sorted(rows):
        look = lambda path: look_up(rows[number], path)
        gpus.append(amd_gpu_of_tool(number, look))
        version = version or first_text(look, "driver.version")
    return gpus, version


def parse_dpm_clock(text: str) -> Optional[str]:
    """The line with the star, `1: 800Mhz *`; lines may be unsorted or doubled."""
    match = re.search(r"(?im)^\s*\w{1,3}:\s*([0-9]{1,5}Mhz)\s*\*", text)
    return match.group(1) if match else None


def read_amd_processes(root: str, bus_id: str) -> Optional[Tuple[GpuProcess, ...]]:
    """Processes that hold memory of a GPU through ROCm's driver; None where that does not show the
    GPU.  One that computes through Vulkan shows in the memory that is used, and not here."""
    folder, numbers = f"{root}/sys/class/kfd/kfd", set()
    place = re.fullmatch("([0-9a-f]{4,8}):([0-9a-f]{2}):([01][0-9a-f])[.][0-7]", bus_id)
    for node in list_folder(f"{folder}/topology/nodes") if place else ():
        facts = parse_keyed(read_sysfs(f"{folder}/topology/nodes/{node}/properties")[0])
        domain, bus, device = (int(part, 16) for part in place.groups())
        # The last three bits are the function, or the partition of an MI300.
        if (facts.get("domain", 0), facts.get("location_id", 0) >> 3) == (
                domain, bus << 5 | device):
            numbers.add(parse_int(read_sysfs(f"{folder}/topology/nodes/{node}/gpu_id")[0]))
    if not any(numbers):
        return None
    held = {parse_int(pid): sum(parse_int(read_sysfs(f"{folder}/proc/{pid}/vram_{number}")[0]) or 0
                                for number in numbers) for pid in list_folder(f"{folder}/proc")}
    # Whoever opens the driver is listed for every GPU, with 0 for those that it does not use.
    return processes_of((pid, size) for pid, size in held.items() if pid and size > 0)


class Amd(GpuSource):
    """amdgpu's files; where these show no GPU though there is a device, amd-smi, then rocm-smi."""

    vendor = "amd"

    def __init__(self, root: str = "/", search_path: Optional[str] = None, run: Run = run_command,
                 read: SysfsReader = read_sysfs) -> None:
        self._root, self._read = root.rstrip("/"), read
        self._amd_smi, self._rocm_smi = [Tool(name, search_path, run)
                                         for name in ("amd-smi", "rocm-smi")]

    def present(self) -> bool:
        return bool(self._cards()) or self._has_device("kfd", "dxg") and bool(
            self._amd_smi.find() or self._rocm_smi.find())

    def read(self) -> GpuReading:
        cards = self._cards()
        if not cards:
            return self._ask_tools()
        return GpuReading("amdgpu", tuple(self._read_card(*pair) for pair in enumerate(cards)),
                          self._read(f"{self._root}/sys/module/amdgpu/version")[0])

    def _cards(self) -> List[Card]:
        return list_cards(self._root, ("amdgpu",), self._read)

    def _has_device(self, *names: str) -> bool:
        return any(os.path.exists(f"{self._root}/dev/{name}") for name in names)

    @staticmethod
    def _is_apu(card: Card) -> bool:
        """By what amdgpu leaves out for an APU: the maker and load of its memory, the form of the
        board, a critical temperature.  Sizes say nothing: a carve-out may have 96 GB."""
        return card.text("device/mem_info_vram_vendor") in ("", "unknown") and not any(
            os.path.exists(card.path(name)) for name in (
                "device/board_info", "device/mem_busy_percent", "hwmon/temp1_crit"))

    def _read_card(self, index: int, card: Card) -> Gpu:
        figures = read_figures(AMD_MEMORY, card.text)  # which wakes nothing up
        if not card.asleep:
            figures.update(read_figures([Figure("graphics_clock_mhz", ("device/pp_dpm_sclk",))],
                                        lambda name: parse_dpm_clock(card.text(name))))
            figures.update(read_figures(AMD_SENSORS, card.text))
            figures.update(card.temperature("edge", "junction", ""))
        return amd_gpu(
            index, figures, self._is_apu(card), asleep=card.asleep, bus_id=card.bus_id,
            name=first_text(card.text, "device/product_name") or f"AMD GPU 0x{card.code}",
            uuid=amd_uuid(card.text("device/unique_id")),
            processes=read_amd_processes(self._root, card.bus_id))

    def _ask_tools(self) -> GpuReading:
        results = [self._amd_smi.ask(what, "--json") for what in ("static", "metric")]
        gpus, version = parse_amd_smi(*(result.output for result in results))
        if gpus:
            return GpuReading("amd-smi", tuple(gpus), version)
        result = self._rocm_smi.ask(*ROCM_SMI_ARGUMENTS)
        gpus, version = parse_rocm_smi(result.output)
        if gpus:
            return GpuReading("rocm-smi", tuple(gpus), version)
        # A tool that fails may exit 0.  And dxg, Windows' door, is there whatever its GPU is.
        return GpuReading("rocm-smi", None if self._has_device("kfd") else (),
                          problem=result.problem or "amd-smi and rocm-smi name no GPU")


# Intel.  Sources: the kernel's sysfs-driver-intel-i915-hwmon and -xe-hwmon, xpu-smi's user guide.

INTEL_SENSORS = [  # hwmon: of the card, else of the chip
    Figure("energy_j", ("hwmon/energy1_input", "hwmon/energy2_input"), 1e-6),
    Figure("power_limit_w", ("hwmon/power1_max", "hwmon/power2_max"), 1e-6),
    Figure("graphics_clock_mhz", ("device/tile0/gt0/freq0/act_freq", "gt_act_freq_mhz"))]


def parse_xpu_csv(text: str) -> List[Dict[str, Any]]:
    """Rows by the names of the columns, which may be quoted or padded."""
    import csv
    header, rows = [], []
    for line in text.replace("\0", "").splitlines():
        try:
            words = [word.strip() for word in next(csv.reader([line], skipinitialspace=True), [])]
        except csv.Error:
            continue
        if "Device ID" in words or "DeviceId" in words:
            header = words
        elif header and len(words) == len(header):
            rows.append(dict(zip(header, words)))
    return rows


def parse_xpu_smi(text: str) -> Dict[int, Dict[str, Any]]:
    """{device: row} from xpu-smi's CSV, or from the JSON of `discovery -j`.  Of several rows of a
    device the last counts."""
    devices = {}
    for row in objects_in(look_up(parse_json_within(text), "device_list")) or parse_xpu_csv(text):
        numbers = map(parse_figure, map(row.get, ("device_id", "Device ID", "DeviceId")))
        number = next((one for one in numbers if one is not None), None)
        if number is not None:
            devices[int(number)] = row
    return devices


def awake_pct(old: Dict[str, float], new: Dict[str, float], passed_s: float) -> Optional[float]:
    """How long the busiest part of a GPU was awake, from counters of milliseconds in deep sleep.
    One that stands at 0 has its deep sleep switched off, and tells nothing."""
    shares = [share_pct(1000 * passed_s - (new[name] - old[name]), 1000 * passed_s)
              for name in new if new[name] and name in old and new[name] >= old[name]]
    return max((share for share in shares if share is not None), default=None)


class Intel(GpuSource):
    """Files of i915 and xe; for cards with memory of their own xpu-smi, since no driver says how
    much of it is used: without it such a card is never free.  Load is how long the GPU was not in
    deep sleep since the read before (fdinfo would show our own processes' alone)."""

    vendor = "intel"

    def __init__(self, root: str = "/", search_path: Optional[str] = None, run: Run = run_command,
                 clock: Clock = now_s) -> None:
        self._root, self._clock = root.rstrip("/"), clock
        self._tool = Tool("xpu-smi", search_path, run)
        self._devices: Dict[int, Dict[str, Any]] = {}  # asked for once: they do not change
        self._last: Dict[str, Any] = {}  # by bus_id: time, energy, sleep of each GT in ms

    def present(self) -> bool:
        return bool(self._cards())

    def read(self) -> GpuReading:
        cards = self._cards()
        # xpu-smi wakes GPUs up: it is asked only where one is awake anyway.
        ask = any(not (card.asleep or self._is_integrated(card)) for card in cards)
        told = self._ask_tool() if ask else {}
        return GpuReading("+".join(sorted({card.driver for card in cards})), tuple(
            self._read_card(index, card, told) for index, card in enumerate(cards)),
            problem="" if told or not ask else "without a working xpu-smi the memory of Intel's "
                                               "cards is unknown")

    def _cards(self) -> List[Card]:
        return list_cards(self._root, ("i915", "xe"), read_sysfs)

    @staticmethod
    def _is_integrated(card: Card) -> bool:
        """A CPU's own GPU is always at this place; only other cards have sensors."""
        return card.bus_id.startswith("0000:00:02.") and not card.sensors

    def _read_card(self, index: int, card: Card, told_of: Dict[str, Dict[str, Any]]) -> Gpu:
        integrated = self._is_integrated(card)  # then its memory is the machine's
        told = {} if integrated else told_of.get(card.bus_id, {})
        figures = read_figures(TOOL_FIGURES, told.get)
        if not card.asleep:
            figures.update(read_figures(INTEL_SENSORS, card.text))
            figures.update(card.temperature("pkg", ""))
            figures.update(self._differences(card, figures.get("energy_j")))
        return Gpu(index, "intel", first_text(told.get, "UUID", "SOC UUID", "uuid"),
                   first_text(told.get, "Device Name", "device_name") or f"Intel GPU 0x{card.code}",
                   card.bus_id, asleep=card.asleep, integrated=integrated, **possible(figures))

    def _differences(self, card: Card, energy_j: Optional[float]) -> Dict[str, Any]:
        """Power and load since the read before; nothing in the first."""
        import glob
        paths = [path for pattern in ("device/tile*/gt*/gtidle/idle_residency_ms",
                                      "gt/gt*/rc6_residency_ms")
                 for path in glob.glob(glob.escape(card.folder) + pattern)]
        slept_ms = {path: parse_figure(read_sysfs(path)[0]) or 0 for path in paths}
        now_at_s = self._clock()
        old_at_s, old_j, old_ms = self._last.get(card.bus_id, (now_at_s, None, {}))
        self._last[card.bus_id] = now_at_s, energy_j, slept_ms
        passed_s = now_at_s - old_at_s
        found = {"utilization_pct": awake_pct(old_ms, slept_ms, passed_s)}
        if passed_s > 0 and energy_j is not None and old_j is not None:
            found["power_w"] = (energy_j - old_j) / passed_s
        return possible(found)  # a counter that begins again at 0 would say less than nothing

    def _ask_tool(self) -> Dict[str, Dict[str, Any]]:
        """{bus_id: what xpu-smi says}"""
        if not self._devices:
            # Device ID, name, UUID, PCI address, memory; an old xpu-smi knows only the second form.
            self._devices = parse_xpu_smi(
                self._tool.ask("discovery", "--dump", "1,2,4,11,16").output) or parse_xpu_smi(
                    self._tool.ask("discovery", "-j").output)
        figures = parse_xpu_smi(self._tool.ask("dump", "-d", "-1", "-m", "0,1,2,3,18", "-i", "1",
                                               "-n", "1").output)
        return {first_text(row.get, "PCI BDF Address", "pci_bdf_address").lower():
                {**row, **figures.get(number, {})} for number, row in self._devices.items()}


# Apple.  Sources: ioreg as recorded from M1 to M5, macmon, exelban/stats.

# What Metal allows a GPU.  In a process of its own: a framework may end the process that loads it.
METAL_LIMIT = """\
from ctypes import CDLL, c_char_p, c_uint64, c_void_p
metal = CDLL("/System/Library/Frameworks/Metal.framework/Metal")
objc = CDLL("/usr/lib/libobjc.A.dylib")
metal.MTLCreateSystemDefaultDevice.restype = objc.sel_registerName.restype = c_void_p
objc.sel_registerName.argtypes = [c_char_p]
objc.objc_msgSend.restype, objc.objc_msgSend.argtypes = c_uint64, [c_void_p, c_void_p]
device = metal.MTLCreateSystemDefaultDevice()
selector = objc.sel_registerName(b"recommendedMaxWorkingSetSize")
print(objc.objc_msgSend(device, selector) if device else 0)
"""


def parse_ioreg(text: str) -> Optional[List[Dict[str, Any]]]:
    """The GPUs of Apple silicon in the answer of `ioreg -a`; None for what is none.  Left out are
    those of Intel Macs, of virtual machines, and entries for old programs' sake.  What is there
    twice counts once, with its higher load."""
    import plistlib
    from xml.parsers.expat import ExpatError
    if not text.strip():
        return []  # it prints nothing where there is no accelerator
    begin, end = max(0, text.find("<?xml")), text.rfind("</plist>") + 8
    try:
        entries = plistlib.loads(text[begin:end].encode("utf-8"), fmt=plistlib.FMT_XML)
    except (ExpatError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
            RecursionError):
        return None
    found: Dict[Any, Dict[str, Any]] = {}
    # Nothing is turned into text that may be nested deeper than Python's stack.
    load = lambda entry: parse_figure(look_up(entry, "PerformanceStatistics.Device Utilization %"))
    for entry in objects_in(entries):
        if (isinstance(entry.get("PerformanceStatistics"), dict)
                and first_text(entry.get, "IOClass").startswith("AGXAccelerator")):
            key = parse_figure(entry.get("IORegistryEntryID")) or entry["IOClass"]
            found[key] = max(found.get(key, entry), entry, key=lambda one: load(one) or 0)
    return list(found.values())


def parse_displays(text: str) -> Tuple[str, Optional[float]]:
    """(name, cores) of Apple's GPU from `system_profiler SPDisplaysDataType -json`."""
    for row in objects_in(look_up(parse_json_within(text), "SPDisplaysDataType")):
        name = first_text(row.get, "sppci_model")
        if name.startswith("Apple"):
            return name, parse_figure(row.get("sppci_cores"))
    return "", None


class Apple(GpuSource):
    """Apple silicon through ioreg.  Power, clocks and temperature need root there: unknown.  Not
    integrated, though its memory is the machine's: for it is the machine's GPU."""

    vendor = "apple"

    def __init__(self, search_path: str = "/usr/sbin", run: Run = run_command) -> None:
        self._run = run
        self._ioreg, self._sysctl, self._profiler = [
            Tool(name, search_path, run) for name in ("ioreg", "sysctl", "system_profiler")]
        self._displays: Optional[Tuple[str, Optional[float]]] = None
        self._default_limit: Optional[int] = None

    def present(self) -> bool:
        return self._ioreg.find() is not None

    def read(self) -> GpuReading:
        result = self._ioreg.ask("-r", "-d", "1", "-w", "0", "-c", "IOAccelerator", "-a")
        entries = None if result.problem else parse_ioreg(result.output)
        if entries is None:
            return GpuReading("ioreg", None, problem=result.problem or "ioreg says nothing of use")
        total = self._read_limit() if entries else None
        return GpuReading("ioreg", tuple(self._make(index, entry, total)
                                         for index, entry in enumerate(entries)))

    def _make(self, index: int, entry: Dict[str, Any], total: Optional[int]) -> Gpu:
        name, cores = first_text(entry.get, "model"), parse_figure(entry.get("gpu-core-count"))
        if not (name and cores) and self._displays is None:  # takes seconds: once
            self._displays = parse_displays(
                self._profiler.ask("SPDisplaysDataType", "-json").output)
        known = self._displays or ("", None)
        cores = cores or known[1]
        return Gpu(index, "apple", name=name or known[0] or "Apple GPU", memory_total_bytes=total,
                   cores=int(cores) if cores and cores < 10000 else None,
                   **read_figures(TOOL_FIGURES, entry["PerformanceStatistics"].get))

    def _read_limit(self) -> Optional[int]:
        """Bytes that the GPU may use: what the owner set, else what Metal says, else two thirds of
        the memory, which is a guess (macOS allows 0.67 to 0.84 of it)."""
        text = self._sysctl.ask("iogpu.wired_limit_mb").output
        match = re.search(r"(?m)^iogpu\.wired_limit_mb: ([0-9]{1,8})\s*$", text)
        if match and int(match.group(1)):
            return int(match.group(1)) << 20
        if self._default_limit is None:
            result = self._run((sys.executable, "-I", "-c", METAL_LIMIT), 20.0)
            memory = parse_int(self._sysctl.ask("-n", "hw.memsize").output) or 0
            allowed = (parse_int(result.output) if result.exit_code == 0 else None) or 0
            self._default_limit = allowed if 0 < allowed <= memory else memory * 2 // 3
        limit = self._default_limit or None
        return possible({"memory_total_bytes": limit}).get("memory_total_bytes")


# ----------------------------------------------------------------------
# 6d. GPUs: all of them, in time             a thread for each vendor found
# ----------------------------------------------------------------------
# A driver that hangs holds its caller for ever, in a place where no signal
# reaches it.  So it is asked in a thread that nobody waits for longer than
# they like; its last figures stand for a while, marked as such, and then
# nothing is known.

GPU_LIMIT_S = 5.0         # a keepalive waits so long for the drivers
GPU_WAKE_LIMIT_S = 30.0   # and registration, since eight sleeping GPUs may take seconds to wake up
GPU_UNKNOWN_AFTER_S = 300.0


class GpuSample(NamedTuple):
    """All GPUs of a machine.  gpus: those that are known, by vendor and index.  vendor: whose GPUs
    the machine is for, "" where it has none.  known: False where that vendor's driver does not say.
    readings: what each source said."""
    gpus: Tuple[Gpu, ...] = ()
    vendor: str = ""
    known: bool = True
    readings: Tuple[GpuReading, ...] = ()

    @property
    def silent(self) -> str:
        """The vendor whose driver does not say, or ""."""
        return "" if self.known else self.vendor

    @property
    def problems(self) -> List[str]:
        """What a person should know of, one line each."""
        found = [reading.problem for reading in self.readings if reading.problem]
        return found + [f"GPU {gpu.index} ({gpu.name or gpu.vendor}): {gpu.problem}"
                        for gpu in self.gpus if gpu.problem and not gpu.stale]


class _Watch:
    """One source and its last answer.  The thread that asks it sets _last and then clears _busy."""

    def __init__(self, source: GpuSource, clock: Clock) -> None:
        self.source, self._clock = source, clock
        self._done, self._busy, self._begun_s = Wake(), False, 0.0
        self._last: Optional[Tuple[float, GpuReading]] = None

    def ask(self) -> bool:
        """False where there is nothing to ask.  A source that sits in its driver is not asked
        again."""
        if not self._busy:
            if not self.source.present():
                return False
            self._busy, self._begun_s = True, now_s()
            try:
                threading.Thread(target=self._work, name=f"gpus-{self.source.vendor}",
                                 daemon=True).start()
            except RuntimeError as error:  # no thread to be had: the figures wait, nothing else
                self._last, self._busy = (self._clock(), GpuReading(
                    "", None, problem=f"{self.source.vendor}: {error}")), False
        return True

    def _work(self) -> None:
        try:
            reading = self.source.read()
        except Exception as error:  # a defect of ours costs the GPUs' figures, nothing else
            reading = GpuReading("", None, problem=f"defect: {type(error).__name__}: {error} (at "
                                                   f"{defect_place(error)})")
        self._last = self._clock(), reading
        self._busy = False
        self._done.set()

    def answer(self, limit_s: float) -> GpuReading:
        """limit_s after the question at the latest: whoever asks again does not wait again."""
        until_s = self._begun_s + limit_s
        while self._busy and now_s() < until_s:
            self._done.wait(until_s - now_s())
        silent = self._busy
        asked_s, reading = self._last or (self._clock(), GpuReading("", None))
        if not silent:
            return reading
        gpus = None
        if reading.gpus is not None and self._clock() - asked_s <= GPU_UNKNOWN_AFTER_S:
            gpus = tuple(gpu._replace(stale=True, problem="its driver does not answer")
                         for gpu in reading.gpus)
        return reading._replace(gpus=gpus,
                                problem=f"{self.source.vendor}: the driver does not answer")


class GpuSampler:
    """Asks every source at once.  One thread at a time calls sample()."""

    def __init__(self, sources: Sequence[GpuSource], clock: Clock = now_s) -> None:
        self._watches = [_Watch(source, clock) for source in sources]

    def sample(self, limit_s: float) -> GpuSample:
        """Returns within limit_s, and at once where the machine has no GPU."""
        asked = [watch for watch in self._watches if watch.ask()]
        answers = [(watch.source.vendor, watch.answer(limit_s)) for watch in asked]
        answers = [(vendor, one) for vendor, one in answers if one.gpus != () or one.problem]
        told = [(vendor, one.gpus) for vendor, one in answers if one.gpus != ()]
        # What is part of a CPU makes the machine its vendor's only where there is nothing else.
        vendor, gpus = next((row for row in told if row[1] is None or not all(
            gpu.integrated for gpu in row[1])), told[0] if told else ("", ()))
        readings = tuple(one for _, one in answers)
        return GpuSample(tuple(gpu for one in readings for gpu in one.gpus or ()), vendor,
                         gpus is not None, readings)


def make_gpu_sources() -> List[GpuSource]:
    """In the order in which a machine with several is taken for one vendor's."""
    return [Apple()] if sys.platform == "darwin" else [Nvidia(), Amd(), Intel()]


# ----------------------------------------------------------------------
# 6e. Energy and carbon           reads powercap; STATE/energy.json
# ----------------------------------------------------------------------
# Joules since the state folder was made, and what they did to the climate.
# A figure is measured (a counter, or power samples added up) or estimated
# (from how busy the machine was), and the two are never added unseen.
#
# cpu: processors, with their memory where it has a counter of its own; gpu:
# what is no part of a processor.  Disks, fans and the power supply's losses
# are in neither: energy.pue can stand for them.  The clock is one that stands
# still while the machine sleeps, which draws next to nothing then.


class EnergyTotals(NamedTuple):
    """co2e_g: of the electricity of the grid where the machine stands (location-based), PUE
    included; None as long as the grid's intensity was never set.  market_co2e_g: less the share
    that certificates call renewable.  gpu_unknown_s: GPUs times seconds that are in no figure."""
    gpu_measured_j: float = 0.0
    gpu_estimated_j: float = 0.0
    cpu_measured_j: float = 0.0
    cpu_estimated_j: float = 0.0
    co2e_g: Optional[float] = None
    market_co2e_g: Optional[float] = None
    gpu_unknown_s: float = 0.0


class Energy(NamedTuple):
    """started: since this process started.  total: since since_wall_s, over restarts.  gpu_w,
    cpu_w: now, None where one of the GPUs is not known; the bases are "measured", "estimated" (all
    or some of it) or ""."""
    started: EnergyTotals
    total: EnergyTotals
    since_wall_s: float
    gpu_w: Optional[float] = None
    gpu_basis: str = ""
    cpu_w: Optional[float] = None
    cpu_basis: str = ""


class RaplZone(NamedTuple):
    """A counter in microjoules, and where it starts again from 0."""
    energy_uj: int
    range_uj: int


RAPL_MAX_W = 1000.0  # no package draws as much: more is a counter that was reset


def read_rapl(root: str = "/sys/class/powercap") -> Dict[str, RaplZone]:
    """The counters of CPU packages and of the memory beside them, by zone; {} where one of a
    package cannot be read: that takes root since Linux 5.10, and few VMs have them.  core and
    uncore are parts of their package, psys is all of a laptop, and intel-rapl-mmio is the same
    package again.  Source: Linux, Documentation/power/powercap/powercap.rst."""
    zones = {}
    for name in list_folder(root):
        if not name.startswith("intel-rapl:"):
            continue
        what = (read_text(f"{root}/{name}/name", 64) or "").strip()
        if not what.startswith("package-") and what != "dram":
            continue
        energy_uj, range_uj = [parse_int(read_text(f"{root}/{name}/{file}", 64) or "")
                               for file in ("energy_uj", "max_energy_range_uj")]
        if energy_uj is not None and range_uj is not None and 0 <= energy_uj <= range_uj:
            zones[name] = RaplZone(energy_uj, range_uj)
        elif what != "dram":
            return {}
    return zones


def rapl_joules(old: Dict[str, RaplZone], new: Dict[str, RaplZone],
                seconds: float) -> Optional[float]:
    """What the counters rose by; None where that cannot be told: a zone came or went, a counter may
    have wrapped more than once, or it was reset (a sleeping machine loses it)."""
    if not new or old.keys() != new.keys():
        return None
    total_j = 0.0
    for name, zone in new.items():
        rise_j = (zone.energy_uj - old[name].energy_uj) % (zone.range_uj + 1) / 1e6
        if seconds * RAPL_MAX_W >= zone.range_uj / 1e6 or rise_j > seconds * RAPL_MAX_W:
            return None
        total_j += rise_j
    return total_j


# Cloud Carbon Footprint, Methodology, "Energy Estimate: Compute": servers' averages over AWS's
# processors, out of SPECpower.  For one machine it may be wrong by a factor of two, and for an idle
# laptop by five: hence energy.cpu_watts.
CPU_IDLE_W_PER_THREAD, CPU_MAX_W_PER_THREAD = 0.74, 3.5


def cpu_estimate_w(busy_pct: Optional[float], threads: Optional[float],
                   max_w: Optional[float] = None) -> Optional[float]:
    """Watts, linear in how busy the CPUs are; max_w in place of the model's at full load."""
    if max_w is None and threads is not None:
        max_w = CPU_MAX_W_PER_THREAD * threads
    if busy_pct is None or max_w is None or not 0 <= busy_pct <= 100:
        return None
    idle_w = max_w * CPU_IDLE_W_PER_THREAD / CPU_MAX_W_PER_THREAD
    return idle_w + (max_w - idle_w) * busy_pct / 100.0


GPU_MAX_W = 3000.0     # of one GPU: more is a driver's nonsense
GPU_GAP_S = 300.0      # power samples farther apart than this say nothing of the time between
GPU_IDLE_SHARE = 0.10  # of the power limit: what a GPU draws that does nothing, near enough


class GpuPoint(NamedTuple):
    """What one GPU drew at a time.  basis: of power_w."""
    at_s: float
    energy_j: Optional[float] = None
    power_w: Optional[float] = None
    basis: str = ""


def gpu_point(gpu: Gpu, at_s: float) -> GpuPoint:
    """Its power as the driver says it; else its limit times how busy it is."""
    power_w, basis = gpu.power_w, "measured"
    if power_w is None:
        basis = "estimated"
        if gpu.asleep:
            power_w = 0.0
        elif gpu.power_limit_w is not None and gpu.utilization_pct is not None:
            power_w = gpu.power_limit_w * max(gpu.utilization_pct / 100.0, GPU_IDLE_SHARE)
    if power_w is None or not 0 <= power_w <= GPU_MAX_W:  # NaN is not
        return GpuPoint(at_s, gpu.energy_j)
    return GpuPoint(at_s, gpu.energy_j, power_w, basis)


def gpu_joules(old: GpuPoint, new: GpuPoint) -> Tuple[Optional[float], str]:
    """(joules between two points, basis): by the counter, where that is plausible (a driver that is
    loaded again starts it anew), else by the trapezoid of the power at both ends."""
    seconds = new.at_s - old.at_s
    if old.energy_j is not None and new.energy_j is not None \
            and 0 <= new.energy_j - old.energy_j <= seconds * GPU_MAX_W:
        return new.energy_j - old.energy_j, "measured"
    if old.power_w is None or new.power_w is None or seconds > GPU_GAP_S:
        return None, ""
    basis = "measured" if old.basis == new.basis == "measured" else "estimated"
    return (old.power_w + new.power_w) / 2 * seconds, basis


def wants_power_samples(sample: GpuSample) -> bool:
    """Whether samples between keepalives tell more: a GPU says its power and has no counter.
    Vendors' programs are left alone: one run of them costs more than it tells."""
    return (not any(reading.source.endswith("-smi") for reading in sample.readings)
            and any(gpu.power_w is not None and gpu.energy_j is None
                    and not (gpu.stale or gpu.asleep) for gpu in sample.gpus))


ENERGY_SAVE_S = 300.0     # a kill -9 loses so much at most
ENERGY_BETWEEN_S = 10.0   # a RAPL counter may wrap in a minute, and power has changed by then
ENERGY_MIN_STEP_S = 1.0   # counters tick: of less than this they say nothing


def parse_energy_file(text: str) -> Optional[Tuple[float, EnergyTotals]]:
    """(since, total), or None where one figure of it cannot be."""
    try:
        record = json.loads(text)
        if record["version"] != 1 or set(record["total"]) != set(EnergyTotals._fields):
            return None
        since_wall_s, total = record["since_wall_s"], EnergyTotals(**record["total"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    for name, value in [("since", since_wall_s), *total._asdict().items()]:
        known = type(value) in (int, float) and 0 <= value < 1e15  # NaN is not
        if not known and not (value is None and name.endswith("co2e_g")):
            return None
    return since_wall_s, total


class EnergyMeter:
    """Adds up what the machine draws.  One thread at a time calls its methods.  path: the file that
    keeps the totals, None to keep none.  clock: seconds that do not count sleep, unlike now_s()."""

    def __init__(self, path: Optional[str], settings: Any, log: Callable[..., None],
                 clock: Clock = time.monotonic, wall: Clock = time.time) -> None:
        self._path, self._settings, self._log, self._clock = path, settings, log, clock
        self._since_wall_s, self._total = self._kept() or (wall(), EnergyTotals())
        self._started = EnergyTotals()
        self._count("gpu_measured_j", 0.0)  # with an intensity, CO2e is known to be 0
        self._saved_s = self._added_s = clock()
        self._failing = False
        self._cpu: Optional[Tuple[float, Dict[str, RaplZone]]] = None
        self._cpu_w: Tuple[Optional[float], str] = (None, "")
        self._gpus: Dict[Tuple[str, Any], GpuPoint] = {}

    def add(self, busy_pct: Optional[float], threads: Optional[float], gpus: Sequence[Gpu],
            zones: Dict[str, RaplZone], silent: str = "") -> None:
        """A whole look.  busy_pct: of the threads, since the look before.  silent: the vendor whose
        driver does not say: its GPUs draw on, and their counters tell later how much."""
        self._add_cpu(zones, cpu_estimate_w(busy_pct, threads, self._settings.cpu_watts), True)
        self._add_gpus(gpus, silent)
        self._added()

    def add_between(self, gpus: Optional[Sequence[Gpu]], zones: Dict[str, RaplZone],
                    silent: str = "") -> None:
        """Counters and power samples between two looks.  gpus: None where they were not asked."""
        self._add_cpu(zones, None, False)
        if gpus is not None:
            self._add_gpus(gpus, silent)
        self._added()

    def is_due(self) -> bool:
        return self._clock() - self._added_s >= ENERGY_BETWEEN_S

    def report(self) -> Energy:
        powers = [point.power_w for point in self._gpus.values()]
        gpu_w, gpu_basis = None, ""
        if powers and None not in powers:
            measured = all(point.basis == "measured" for point in self._gpus.values())
            gpu_w, gpu_basis = sum(powers), "measured" if measured else "estimated"
        return Energy(self._started, self._total, self._since_wall_s, gpu_w, gpu_basis,
                      *self._cpu_w)

    def save(self) -> None:
        """Keep the totals.  A disk that is full costs them, and one line in the log."""
        if self._path is None:
            return
        self._saved_s = self._clock()
        record = {"version": 1, "since_wall_s": self._since_wall_s, "total": self._total._asdict()}
        try:
            write_atomic(self._path, json.dumps(record, indent=2) + "\n")
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._log("error", "energy_not_kept", what=f"{self._path}: {error.strerror}",
                          do="The totals go on in memory, and the file is tried again every 5 min")
            self._failing = True

    def _kept(self) -> Optional[Tuple[float, EnergyTotals]]:
        """What an earlier run kept; a file that is none is moved aside, never written over."""
        if self._path is None or not os.path.lexists(self._path):
            return None
        kept = parse_energy_file(read_text(self._path, 65536) or "")
        if kept is None:
            what = f"{self._path} is not one of ours"
            try:
                os.replace(self._path, self._path + ".bad")
                done = f"It is now {self._path}.bad, and counting begins anew"
            except OSError as error:
                done = f"It cannot be moved aside ({error.strerror}): nothing will be kept"
                self._path = None
            self._log("warning", "energy_file", what=what, do=done)
        return kept

    def _added(self) -> None:
        self._added_s = self._clock()
        if self._added_s - self._saved_s >= ENERGY_SAVE_S:
            self.save()

    def _count(self, field: str, amount: float) -> None:
        """Add to one field, and what its joules emit."""
        settings, amounts = self._settings, {field: amount}
        if field.endswith("_j") and settings.grid_intensity is not None:
            grams = amount / 3.6e6 * settings.pue * settings.grid_intensity
            amounts.update(co2e_g=grams,
                           market_co2e_g=grams * (1.0 - settings.renewable_pct / 100.0))
        self._started, self._total = [
            totals._replace(**{name: (getattr(totals, name) or 0.0) + more
                               for name, more in amounts.items()})
            for totals in (self._started, self._total)]

    def _add_cpu(self, zones: Dict[str, RaplZone], estimate_w: Optional[float],
                 whole: bool) -> None:
        """whole: the estimate is about the time since the last such look; what cannot be measured
        between two looks is left to the next one."""
        now = self._clock()
        old_s, old_zones = self._cpu or (now, zones)
        seconds = now - old_s
        if self._cpu and seconds < ENERGY_MIN_STEP_S:
            return
        joules, basis = rapl_joules(old_zones, zones, seconds), "measured"
        if joules is None and estimate_w is not None:
            joules, basis = estimate_w * seconds, "estimated"
        if joules is not None:
            self._count(f"cpu_{basis}_j", joules)
        if joules is not None or whole:
            self._cpu = now, zones
            self._cpu_w = (None, "") if joules is None or not seconds else (joules / seconds, basis)

    def _add_gpus(self, gpus: Sequence[Gpu], silent: str) -> None:
        """A GPU that is gone counts no more, and is a new one when it comes back."""
        now, before = self._clock(), self._gpus
        self._gpus = {key: point._replace(power_w=None, basis="")
                      for key, point in before.items() if key[0] == silent}
        for gpu in gpus:
            # A processor's own GPU is in the processor's figure; NVIDIA's (GB10) tell their own.
            if gpu.integrated and gpu.vendor != "nvidia":
                continue
            key = gpu.vendor, gpu.uuid or gpu.bus_id or gpu.index
            point = before.get(key, GpuPoint(now))
            if gpu.stale:  # nothing now; its counter tells later what this time was
                point = point._replace(power_w=None, basis="")
            elif key not in before or now - point.at_s >= ENERGY_MIN_STEP_S:
                point = self._add_gpu(point, gpu_point(gpu, now))
            self._gpus[key] = point

    def _add_gpu(self, old: GpuPoint, new: GpuPoint) -> GpuPoint:
        """Returns the new point, with the counter's power where the driver says none."""
        joules, basis = gpu_joules(old, new)
        if joules is None:
            self._count("gpu_unknown_s", new.at_s - old.at_s)
            return new
        self._count(f"gpu_{basis}_j", joules)
        if basis == "measured" and new.basis != "measured":
            return new._replace(power_w=joules / (new.at_s - old.at_s), basis="measured")
        return new


def _energy_figures(totals: EnergyTotals) -> Dict[str, Any]:
    """As JSON, in watt-hours.  co2e_basis: "estimated" once a joule of the sum is."""
    shown = {re.sub("_j$", "_wh", name): value if value is None else
             round(value / 3600.0 if name.endswith("_j") else value, 3)
             for name, value in totals._asdict().items()}
    estimated = totals.gpu_estimated_j + totals.cpu_estimated_j > 0
    return dict(shown, co2e_basis="" if totals.co2e_g is None else
                "estimated" if estimated else "measured")


def energy_payload(energy: Optional[Energy], settings: Any) -> Dict[str, Any]:
    """What `status` says of it."""
    payload = {"grid_intensity_g_per_kwh": settings.grid_intensity, "pue": settings.pue,
               "renewable_pct": settings.renewable_pct, "certificate": settings.energy_certificate}
    if energy is not None:
        payload.update(energy._asdict(), started=_energy_figures(energy.started),
                       total=_energy_figures(energy.total))
        payload["since"] = utc_stamp(payload.pop("since_wall_s"))
    return payload


class MachineSample(NamedTuple):
    """One look at the machine.  offered: the GPUs that the gateway is told of; None: unknown.
    taken_s: when, on now_s()."""
    host: HostSample
    gpus: GpuSample
    offered: Optional[Tuple[Gpu, ...]]
    energy: Optional[Energy]
    taken_s: Optional[float] = None


# ----------------------------------------------------------------------
# 7. Gateway client and membership                    the gateway, nobody else
# ----------------------------------------------------------------------
# Two requests, and what every answer to them means.  The gateway says "you
# are unknown" and "I am unwell" with the same status, so the body decides;
# what is no clear "ok" is never taken for one.  Membership is one step
# function that a thread calls, or a test with a clock of its own.

REGISTER_LIMIT_S = 30.0
KEEPALIVE_LIMIT_S = 10.0
GATEWAY_TTL_S = 300
CLOCK_OFFSET_MAX_S = 60.0
RETRY_AFTER_MAX_S = 120.0  # the gateway forgets a machine after 300 s, whatever it asked for
REFUSED_SOON_S = 600.0     # a 401 can be the gateway's own outage: ten minutes at the interval,
REFUSED_LATER_S = 300.0    # then every five


class Identity(NamedTuple):
    """Who we say we are, in every request."""
    machine_id: str
    pool_name: str
    provider_name: str
    hostname: str
    k3s_token: str


def register_payload(
        identity: Identity, cpu_millicores: Optional[int], memory_bytes: Optional[int],
        gpu_count: int, private_ip: str) -> Dict[str, Any]:
    """The gateway decodes into Go structs and refuses a number where a string is declared: cpu in
    millicores with an m, memory in whole Mi, gpu_count a string.  `token` is the k3s token, never
    the machine's.  An unknown capacity is said as the smallest that it accepts."""
    return {"token": identity.k3s_token, "machine_id": identity.machine_id,
            "hostname": identity.hostname, "provider_name": identity.provider_name,
            "pool_name": identity.pool_name, "cpu": f"{cpu_millicores or 1000}m",
            "memory": f"{(memory_bytes or 1 << 30) >> 20}Mi", "gpu_count": str(gpu_count),
            "private_ip": private_ip}


_METRICS = {  # name -> the Go type it is decoded into: an int must be written as one
    "total_cpu_available": int, "total_memory_available": int, "total_disk_space_bytes": int,
    "total_disk_free_bytes": int, "cpu_utilization_pct": float, "memory_utilization_pct": float,
    "worker_count": int, "container_count": int, "free_gpu_count": int, "cache_usage_pct": float,
    "cache_capacity": int, "cache_memory_usage": int, "cache_cpu_usage": float,
}


def metrics_payload(values: Dict[str, Any]) -> Dict[str, Any]:
    """What is unknown is left out: `{}` is fine to the gateway, null is not."""
    return {name: kind(round(values[name], 2)) if kind is float else kind(values[name])
            for name, kind in _METRICS.items() if values.get(name) is not None}


def keepalive_payload(identity: Identity, metrics: Dict[str, Any],
                      inference: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """inference: status, ip, port, models; None where the gateway could reach no engine here."""
    payload = {"machine_id": identity.machine_id, "pool_name": identity.pool_name,
               "provider_name": identity.provider_name, "agent_version": VERSION,
               "metrics": metrics_payload(metrics)}
    return payload if inference is None else dict(payload, inference=inference)


def _no_proxy(host: str, rule: str) -> bool:
    """
    >>> _no_proxy("gw.lan", ".lan, 10.0.0.1"), _no_proxy("gw.land", "lan"), _no_proxy("a", "*")
    (True, False, True)
    """
    if host in ("localhost", "::1") or host.startswith("127."):
        return True
    words = [word.strip().lstrip(".").lower() for word in rule.split(",") if word.strip()]
    return any(word == "*" or host.lower() == word or host.lower().endswith("." + word)
               for word in words)


def proxy_for(scheme: str, host: str, setting: Optional[str],
              environ: Dict[str, str]) -> Optional[Tuple[str, int, str]]:
    """(host, port, Proxy-Authorization or ""), or None for a direct connection.

    The environment's proxy serves https only, where CONNECT keeps the token encrypted; over plain
    http a proxy would read it, so there it must be set on purpose.
    """
    url = setting
    if not url and scheme == "https":
        named = next((environ[name] for name in ("https_proxy", "HTTPS_PROXY", "all_proxy",
                                                 "ALL_PROXY") if environ.get(name)), "")
        if named and not _no_proxy(host, environ.get("no_proxy") or environ.get("NO_PROXY") or ""):
            url = named if "://" in named else "http://" + named
    if not url or url == "none":
        return None
    match = re.fullmatch(r"https?://(?:([^@/]*)@)?(\[[^\]]+\]|[^:/@]+)(?::([0-9]{1,5}))?/?", url)
    if not match or url.startswith("https:"):
        raise UsageError(f"the proxy {url.rpartition('@')[2]} cannot be used",
                         "Expected http://HOST:PORT in gateway.proxy or https_proxy")
    credentials = ""
    if match.group(1):
        import base64
        from urllib.parse import unquote
        REDACTOR.add(match.group(1))
        REDACTOR.add(match.group(1).partition(":")[2])
        credentials = base64.b64encode(unquote(match.group(1)).encode()).decode()
        REDACTOR.add(credentials)
        credentials = "Basic " + credentials
    return match.group(2).strip("[]"), int(match.group(3) or 80), credentials


_ROUTES = {"register": "machine/register", "keepalive": "machine/keepalive", "health": "health"}
_PROBES = {"register": b'{"cpu": 1}', "keepalive": b"{}"}  # a wrong type; fields that are missing
_UNREACHABLE_HINTS = {
    "refused": "Is the gateway running there? Where only SSH leads to it: --tunnel USER@HOST",
    "dns": "Check gateway.host, or the machine's name server",
    "tls": "Check gateway.scheme, and gateway.ca_file for an authority of your own",
    "proxy": "Check gateway.proxy or https_proxy; `gateway.proxy: none` goes without",
    "timeout": "A firewall, or a tunnel that hangs? Try: "
               "curl -m 5 http://{host}:{port}/api/v1/health",
}


def _json_object(body: bytes) -> Dict[str, Any]:
    """The body's JSON object, or {} for anything else."""
    try:
        value = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _without_token(body: bytes) -> str:
    """A request body for the debug log.  The k3s token is in the Redactor as well."""
    payload = _json_object(body)
    if payload.get("token"):
        payload["token"] = mask(payload["token"])
    return json.dumps(payload)


def _retry_after_s(text: str) -> Optional[float]:
    """Seconds only: the form with a date would need our clocks to agree."""
    return min(float(text), RETRY_AFTER_MAX_S) if re.fullmatch(r"[0-9]{1,6}", text) else None


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def parse_http_date(text: str) -> Optional[float]:
    """Seconds since 1970 of a Date header; the obsolete forms of RFC 9110 are unknown.

    >>> parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT")
    784111777.0
    """
    match = re.fullmatch(r"[A-Z][a-z]{2}, (\d\d) ([A-Z][a-z]{2}) (\d{4}) (\d\d):(\d\d):(\d\d) GMT",
                         text, re.ASCII)
    if not match or match.group(2) not in _MONTHS:
        return None
    day, year, hour, minute, second = (int(match.group(part)) for part in (1, 3, 4, 5, 6))
    if not 1 <= day <= 31 or hour > 23 or minute > 59 or second > 60:
        return None
    # Days since 1970 in a year that begins in March, so that February's length comes last.
    month = (_MONTHS.index(match.group(2)) - 2) % 12
    year -= month >= 10
    leap_days = year // 4 - year // 100 + year // 400
    days = 365 * year + leap_days + (153 * month + 2) // 5 + day - 719469
    return float(days * 86400 + hour * 3600 + minute * 60 + second)


def gateway_endpoint(settings: Any) -> Endpoint:
    """Where the gateway is, and the proxy on the way.  Raises: UsageError for a proxy."""
    proxy = proxy_for(settings.gateway_scheme, settings.gateway_host, settings.gateway_proxy,
                      dict(os.environ))
    return Endpoint(settings.gateway_scheme, settings.gateway_host, settings.gateway_port,
                    settings.gateway_ca_file, proxy)


class GatewayClient:
    """Register, keepalive and health.  Raises a GatewayError for everything but "ok"."""

    def __init__(self, endpoint: Endpoint, token: str, pool_name: str, log: Log,
                 keepalive_limit_s: float = KEEPALIVE_LIMIT_S) -> None:
        self._endpoint = endpoint
        self._keepalive_limit_s = keepalive_limit_s
        self._token = token
        self._pool_name = pool_name
        self._log = log
        self.clock_offset_s: Optional[float] = None  # ours less the gateway's, to half a second
        self.before_request: Callable[[], None] = lambda: None  # raises where none can be sent

    def register(self, payload: Dict[str, Any]) -> None:
        """The answer's `config` can hold the cluster's passwords: it is dropped unread."""
        answer = self._post("register", payload, REGISTER_LIMIT_S)
        if "machine_state" not in answer and "config" not in answer:
            raise self._unwell("it answered 200 without a machine state")

    def keepalive(self, payload: Dict[str, Any]) -> None:
        answer = self._post("keepalive", payload, self._keepalive_limit_s)
        if answer.get("status") != "ok":
            raise self._unwell("it answered 200 without status ok")

    def heartbeat(self, machine_id: str, models: Sequence[str]) -> bool:
        """Tell the gateway's inference router that these models answer here: it drops a node that
        is silent for 30 s, half of a keepalive's interval.  False where it has no such route."""
        body = {"models": {name: {"name": name, "load_state": "ready"} for name in models}}
        reply = self._send("POST", f"inference/nodes/{machine_id}/heartbeat",
                           json.dumps(body).encode(), 5.0)
        return reply.status not in (404, 405)

    def health(self) -> None:
        reply = self._send("GET", "health", None, self._keepalive_limit_s)
        if reply.status != 200 or _json_object(reply.body).get("status") != "ok":
            raise self._unwell(f"its health answer was {reply.status}")

    def probe(self, name: str) -> None:
        """Whether a route is there and takes the token, by a body that it refuses after both: it
        changes nothing.  A registration that counts would set a ready machine back."""
        reply = self._send("POST", name, _PROBES[name], self._keepalive_limit_s)
        answer = _json_object(reply.body)
        if reply.status != 400 or not answer:
            raise self._outcome(name, reply, answer)

    def _post(self, name: str, payload: Dict[str, Any], limit_s: float) -> Dict[str, Any]:
        reply = self._send("POST", name, json.dumps(payload).encode(), limit_s)
        answer = _json_object(reply.body)
        self._log("debug", "answer", request=name, status=reply.status, bytes=len(reply.body),
                  keys=",".join(sorted(answer))[:200] or None)
        if reply.status == 200 and answer:
            return answer
        raise self._outcome(name, reply, answer)

    def _send(self, method: str, name: str, body: Optional[bytes], limit_s: float) -> HttpReply:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        self.before_request()
        self._log("debug", "request", request=name, url=self._endpoint.url,
                  body=body and _without_token(body))
        try:
            reply = http_request(method, self._endpoint, f"/api/v1/{_ROUTES.get(name, name)}",
                                 headers if body else {}, body, limit_s)
        except HttpFailure as failure:
            raise self._failure(failure) from failure
        self._compare_clocks(reply)
        return reply

    def _compare_clocks(self, reply: HttpReply) -> None:
        """A wrong clock breaks TLS and makes logs lie; the keepalive itself does not mind."""
        theirs_s = parse_http_date(reply.headers.get("date", ""))
        if theirs_s is None:
            return
        was, now = self.clock_offset_s or 0.0, time.time() - theirs_s - 0.5  # it has no fractions
        self.clock_offset_s = now
        if abs(now) > CLOCK_OFFSET_MAX_S and abs(was) <= CLOCK_OFFSET_MAX_S:
            self._log("warning", "clock", what=f"this machine's clock is {abs(now):.0f} s "
                      f"{'ahead of' if now > 0 else 'behind'} the gateway's",
                      do="Check it: timedatectl status (on macOS: sntp time.apple.com)")

    def _failure(self, failure: HttpFailure) -> GatewayError:
        url, port = self._endpoint.url, self._endpoint.port
        if failure.kind in ("closed", "garbage", "too_large"):
            return self._unwell(str(failure))
        hint = _UNREACHABLE_HINTS.get(failure.kind, "Check the network, and gateway.host and "
                                                    "gateway.port")
        return GatewayUnreachable(f"gateway {url} unreachable: {failure}",
                                  hint.format(port=port, host=self._endpoint.host))

    def _unwell(self, what: str, retry_after_s: Optional[float] = None) -> GatewayUnwell:
        return GatewayUnwell(f"gateway {self._endpoint.url} is unwell: {what}",
                             "Is this the gateway's HTTP port, and what does its log say?",
                             retry_after_s)

    def _outcome(self, name: str, reply: HttpReply, answer: Dict[str, Any]) -> GatewayError:
        """The contract's table of answers that are not "ok"."""
        message = str(answer.get("message") or answer.get("error") or "")
        said = printable(REDACTOR.scrub(message))[:200]  # cut after: half a secret is one too
        code = str(answer.get("error_code") or "")
        pool, url = self._pool_name, self._endpoint.url
        if not answer and reply.status in (400, 403, 404, 405):
            return self._unwell(f"it answered {reply.status} and no JSON, which is not the "
                                "gateway's way: a proxy or an ingress before it?")
        if reply.status in (401, 403):
            return TokenRefused(f"gateway {url} refused the machine token ({reply.status}"
                                f"{' ' + said if said else ''})",
                                f"Get a new one with: beta9 machine create --pool {pool}, and set "
                                "its machine id with it. A token from a cloud provider's "
                                "provisioning works only once")
        if code in ("machine_not_found", "machine_expired") or "machine not found" in message:
            return MachineNotFound(f"gateway {url} does not know this machine (its time to live "
                                   f"of {GATEWAY_TTL_S} s ran out)", "It registers again by itself")
        if message == "Invalid pool name":
            return RequestRefused(f"gateway {url} has no pool `{pool}`",
                                  "Set pool (--pool-name) to one of its configuration's pools")
        if reply.status in (404, 405) and name == "keepalive":
            return NoKeepaliveRoute(f"gateway {url} has no keepalive route ({reply.status})",
                                    "It is an upstream Beta9 gateway or another program: machines "
                                    "become ready only on a gateway with POST "
                                    "/api/v1/machine/keepalive")
        if reply.status in (400, 404, 405, 413, 415, 422) or message.startswith("Invalid "):
            return RequestRefused(f"gateway {url} refused the {name} request ({reply.status} "
                                  f"{said or 'without a message'})",
                                  "Check gateway.host, gateway.port and gateway.scheme; with "
                                  "--debug the log shows what was sent")
        if 300 <= reply.status < 400:
            return self._unwell(f"it redirects ({reply.status}), which is not followed: the token "
                                "would go with it. Set gateway.host, port and scheme to the target")
        return self._unwell(f"it answered {reply.status} {said or 'without a message'}",
                            _retry_after_s(reply.headers.get("retry-after", "")))


def random_between(low: float, high: float) -> float:
    from random import uniform  # `--once` never waits, and never pays for it
    return uniform(low, high)


class Membership:
    """The life of the machine on the gateway.

    step() does what is due and says how long to wait for the next; run() calls it until stopped.
    Only the thread in run() changes anything; others read `snapshot`, which is replaced whole.
    send_register and send_keepalive raise GatewayError.
    """

    def __init__(self, send_register: Callable[[], None], send_keepalive: Callable[[], None],
                 interval_s: float, log: Log, clock: Callable[[], float] = now_s,
                 uniform: Callable[[float, float], float] = random_between) -> None:
        self._send_register = send_register
        self._send_keepalive = send_keepalive
        self._interval_s = interval_s
        self._log = log
        self._clock = clock
        self._uniform = uniform
        self._must_register = True
        self._failures_in_row = 0
        self._refused_since_s: Optional[float] = None
        self._hurried: Tuple[State, ...] = ()
        self._outdated = False
        self._not_told = ""  # why, the last time
        self.snapshot = Snapshot(since_s=clock())

    def hurry(self, states: Tuple[State, ...] = (State.READY,)) -> None:
        """From any thread: there is news; send the next request soon, in one of these states."""
        self._hurried = states

    def register_again(self) -> None:
        """From any thread: what the gateway was told at registration is not so any more."""
        self._outdated = True
        self.hurry((State.READY, State.UNREACHABLE))

    def _enter(self, state: State, **changes: Any) -> None:
        old = self.snapshot
        if state is not old.state:
            changes["since_s"] = self._clock()
        self.snapshot = old._replace(state=state, **changes)

    def step(self) -> float:
        """Register if that is due, then keepalive.  Returns seconds to the next step.

        Raises: TokenRefused, RequestRefused as long as the machine has never been ready.
        """
        started_s, only_keepalive = self._clock(), not self._must_register
        try:
            if self._must_register or self._outdated:
                self._register()
            self._send_keepalive()
        except GatewayError as error:
            return self._failed(error, only_keepalive)
        return self._succeeded(started_s)

    def _register(self) -> None:
        """One that only brings news may be refused: the machine is alive without it, and the next
        keepalive brings it again."""
        if self.snapshot.state in (State.STARTING, State.EXPIRED):
            self._enter(State.REGISTERING)
        self._outdated = False  # before it is sent: what changes from now on is news again
        try:
            self._send_register()
        except Exception as error:
            self._outdated = True
            if self._must_register or not isinstance(error, GatewayError):
                raise
            self._count_failure(error, "failed_registrations")
            self._log.error("not_registered_again", error,
                            "debug" if str(error) == self._not_told else "warning")
            self._not_told = str(error)
            return
        self._must_register = False
        self._enter(State.REGISTERED, registrations=self.snapshot.registrations + 1)
        self._log("info", "registered")

    def _succeeded(self, started_s: float) -> float:
        was, failures = self.snapshot.state, self._failures_in_row
        self._failures_in_row = 0
        self._refused_since_s = None
        self._enter(State.READY, message="", keepalives=self.snapshot.keepalives + 1,
                    last_ready_s=self._clock(), last_ready_wall_s=time.time())
        if was is not State.READY:
            self._log("notice", "ready", after_failures=failures or None)
        # Jitter, so that a thousand agents started together do not march in step; less the time
        # that the requests took, so that the period is the interval.
        took_s = self._clock() - started_s
        return max(0.0, self._interval_s * self._uniform(0.9, 1.1) - took_s)

    def _count_failure(self, error: GatewayError, name: str) -> None:
        outcome = ("refused" if isinstance(error, (TokenRefused, RequestRefused)) else
                   "expired" if isinstance(error, MachineNotFound) else
                   "unwell" if isinstance(error, GatewayUnwell) else "unreachable")
        counts = getattr(self.snapshot, name)
        counts = counts._replace(**{outcome: getattr(counts, outcome) + 1})
        self.snapshot = self.snapshot._replace(**{name: counts})

    def _failed(self, error: GatewayError, only_keepalive: bool) -> float:
        self._count_failure(error, "failed_registrations" if self._must_register
                            else "failed_keepalives")
        refused = isinstance(error, (TokenRefused, RequestRefused))
        if refused and self.snapshot.keepalives == 0:
            self._enter(State.REFUSED, message=str(error))
            raise error
        self._failures_in_row += 1
        state = (State.REFUSED if refused else
                 State.EXPIRED if isinstance(error, MachineNotFound) else State.UNREACHABLE)
        self._enter(state, message=str(error), failures=self.snapshot.failures + 1)
        if isinstance(error, MachineNotFound):
            self._must_register = True
        # To register is due at once; unless it was just done, or a confused gateway would make us
        # spin.
        at_once = isinstance(error, MachineNotFound) and only_keepalive
        wait_s = 0.0 if at_once else self._retry_wait_s(error, refused)
        # The 1st, 2nd, 4th, 8th … failure in a row: loud at once, and never a flood.
        milestone = self._failures_in_row & (self._failures_in_row - 1) == 0
        self._log.error(state.value, error,
                        "error" if refused else "warning" if milestone else "debug",
                        failures=self._failures_in_row, retry_s=round(wait_s, 1))
        return wait_s

    def _retry_wait_s(self, error: GatewayError, refused: bool) -> float:
        now = self._clock()
        if refused:
            if self._refused_since_s is None:
                self._refused_since_s = now
            soon = now - self._refused_since_s < REFUSED_SOON_S
            return (self._interval_s if soon else REFUSED_LATER_S) * self._uniform(0.9, 1.1)
        # Full jitter from 1 s, doubled each time, capped at the interval.
        ceiling_s = min(2.0 ** min(self._failures_in_row - 1, 10), self._interval_s, 60.0)
        asked_s = getattr(error, "retry_after_s", None) or 0.0
        return max(asked_s, self._uniform(0.0, ceiling_s))

    def run(self, wake: Wake, stopping: Callable[[], bool], tick: Callable[[float], None]) -> None:
        """Until stopping() is true.  wake: asks to look again, at once.  tick(seconds): "I am
        alive, and will say so again within these seconds".

        The wait is cut in slices, on a clock that counts suspend: after eight hours of sleep the
        next slice finds the keepalive overdue.
        """
        due_s = self._clock()
        while not stopping():
            left_s = due_s - self._clock()
            if self.snapshot.state in self._hurried and (
                    self._clock() - (self.snapshot.last_ready_s or 0.0) >= 1.0):
                left_s = 0.0
            if left_s > 0:
                tick(KEEPALIVE_LIMIT_S)
                wake.wait(min(left_s, 5.0))
                continue
            tick(6 * REGISTER_LIMIT_S)  # two requests, GPUs, and name look-ups that have no limit
            self._hurried = ()
            wait_s = self._safe_step()
            due_s = self._clock() + wait_s
        self._enter(State.STOPPED)

    def _safe_step(self) -> float:
        """A defect of ours costs one interval and a line in the log, not the machine."""
        try:
            return self.step()
        except AgentError:
            raise
        except Exception as error:
            self._log.defect(error)
            return self._interval_s


# ----------------------------------------------------------------------
# 8. Child processes       programs; STATE/children, STATE/logs; /proc or ps
# ----------------------------------------------------------------------
# One supervisor for every program that lives beside the agent.  One thread
# owns a child from start to stop, a second one reads what it says.  Stopped
# means looked for and not found: every descendant carries a mark in its
# environment, and what a killed agent left is ended at the start of the next
# one, by pid, start time and command, never by pid alone.

RING_LINES, LINE_CHARS, LINE_BYTES = 200, 2000, 16384
LOG_BYTES, LOGS_KEPT = 16 << 20, 5
WATCH_S = 0.1  # how often a child is looked after
KILL_LIMIT_S = 5.0  # after SIGKILL: what is stuck in a driver does not go even then
LEFTOVER_GRACE_S = 5.0
ProcessTable = Dict[int, "ProcessRow"]


class ChildState(enum.Enum):
    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    ERROR = "error"


class Probe(NamedTuple):
    """What a look at a child that starts has found.  progress: any value; a change of it restarts
    the stall limit.  said: for people, such as "loading 45 %".  failed: it will never be ready."""
    ready: bool
    progress: Any = None
    said: str = ""
    failed: bool = False


class ChildSpec(NamedTuple):
    """What to run.  environment: added to clean_environment().  probe: may block, two seconds at
    most.  still_held: "" once what it used (GPU memory) is free again, else what is not; it may
    neither block nor raise.  is_told: whether its starts and ends are news, or for --debug."""
    name: str
    argv: Sequence[str]
    environment: Dict[str, str]
    ports: Tuple[Tuple[str, int], ...]
    probe: Callable[[], Probe]
    stall_limit_s: float = 120.0
    ready_limit_s: float = 3600.0
    stop_grace_s: float = 10.0
    still_held: Callable[[], str] = lambda: ""
    is_told: bool = True


class ChildSnapshot(NamedTuple):
    """message: why it is in BACKOFF or ERROR, or what it left when it was stopped."""
    state: ChildState = ChildState.STOPPED
    pid: Optional[int] = None
    starts: int = 0
    message: str = ""
    said: str = ""
    log_path: str = ""


class Pace(NamedTuple):
    """How a child that ends by itself is started again, and when no more: after `exits` within
    window_s.  held_s: for its ports and memory to come back."""
    first_s: float = 1.0
    most_s: float = 60.0
    exits: int = 5
    window_s: float = 120.0
    held_s: float = 10.0


def backoff_s(exits: int, pace: Pace, uniform: Callable[[float, float], float]) -> float:
    """Full jitter below a ceiling that doubles with each exit within the window."""
    return uniform(0.0, min(pace.most_s, pace.first_s * 2.0 ** min(exits - 1, 16)))


def exit_words(code: int) -> str:
    """code: as subprocess has it."""
    name = next((known.name for known in signal.Signals if known == -code), str(-code))
    return f"signal {name}" if code < 0 else f"exit code {code}"


def _pause(wait_s: float) -> None:
    """Not by the wall clock, as Event.wait() may (see Wake)."""
    select.poll().poll(max(0.0, wait_s) * 1000)


class Output:
    """What a child says from one start to its end: the last lines, and a log file.

    Written by the thread that runs read(); `lines` is replaced and never changed, for others.
    """

    def __init__(self, folder: str, name: str, log: Log) -> None:
        self._folder, self._name, self._log = folder, name, log
        self._file: Any = None
        self._partial = b""
        self.lines: Tuple[str, ...] = ()
        self.received_bytes = 0

    def open(self, pid: int) -> str:
        """Returns: the path of a new log file, "" where there can be none.  The oldest ones go."""
        name = f"{self._name}-{utc_stamp().replace(':', '')}-{pid}.log"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        try:
            make_private_folder(self._folder)
            descriptor = os.open(os.path.join(self._folder, name), flags, 0o600)
        except (OSError, UsageError) as error:
            self._log("warning", "child", name=self._name, what=f"no log file: {error}")
            return ""
        self._file = os.fdopen(descriptor, "ab", buffering=0)
        others = [other for other in list_folder(self._folder) if other != name
                  and other.startswith(self._name + "-") and other.endswith(".log")]
        for old in others[:1 - LOGS_KEPT]:
            remove_file(os.path.join(self._folder, old))
        return os.path.join(self._folder, name)

    def read(self, pipe: Any) -> None:
        """To its end, so that the child never waits on a full pipe."""
        with pipe:
            for data in iter(lambda: pipe.read(65536), b""):
                self.feed(data)
        self.feed(b"\n")  # the last line may lack its end
        self._close()

    def feed(self, data: bytes) -> None:
        self.received_bytes += len(data)
        # Progress bars end their lines with a carriage return.
        *whole, rest = re.split(b"[\r\n]+", self._partial + data)
        self._partial = rest[:LINE_BYTES]
        if self._file is None:
            whole = whole[-RING_LINES:]  # a flood costs little once the file is full
        lines = [self._line(raw) for raw in whole if raw]
        self.lines = (self.lines + tuple(lines))[-RING_LINES:]
        if self._file is not None and lines:
            self._write("".join(line + "\n" for line in lines).encode())

    def _line(self, raw: bytes) -> str:
        text = REDACTOR.scrub(raw[:LINE_BYTES].decode("utf-8", "replace").expandtabs(4))
        text = printable(text)
        return text if len(text) <= LINE_CHARS else text[:LINE_CHARS - 1] + "…"

    def _write(self, data: bytes) -> None:
        try:
            full = self._file.tell() + len(data) > LOG_BYTES
            self._file.write(b"[cut here: the file has reached its limit]\n" if full else data)
        except OSError as error:  # a full disk costs the file, and nothing else
            self._log("warning", "child", name=self._name, what=f"log file: {error.strerror}")
            full = True
        if full:
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError:
            pass  # the disk is full


class ProcessRow(NamedTuple):
    """A row of the table of processes.  group: on Linux the session, which holds all groups of a
    child.  start: as the system writes it; two processes never have it and the pid in common.
    command: "" where it has to be read.  marked: it has our mark, which macOS does not tell."""
    pid: int
    parent: int
    group: int
    zombie: bool
    cpu_s: float
    start: str
    name: str
    command: str = ""
    marked: bool = False


def parse_proc_stat(text: str) -> Optional[ProcessRow]:
    """/proc/PID/stat.  Source: proc(5)."""
    head, _, rest = text.rpartition(")")  # the name may hold parentheses too
    pid, _, name = head.partition(" (")
    words = rest.split()
    numbers = [parse_int(word) for word in [pid] + words[1:20]]
    if len(numbers) < 20 or None in numbers:
        return None
    cpu_s = sum(numbers[11:15]) / os.sysconf("SC_CLK_TCK")
    return ProcessRow(numbers[0], numbers[1], numbers[3], words[0] in "ZX", cpu_s, words[19], name)


def read_proc(mark: str) -> Optional[ProcessTable]:
    table = {}
    for name in filter(str.isdigit, list_folder("/proc")):
        row = parse_proc_stat(read_text(f"/proc/{name}/stat", 4096) or "")
        if row is not None:
            environment = "\0" + (read_text(f"/proc/{name}/environ") or "") + "\0"
            table[row.pid] = row._replace(marked=f"\0{mark}\0" in environment)
    return table or None


def parse_ps(text: str) -> ProcessTable:
    """`ps -o pid=,ppid=,pgid=,stat=,time=,lstart=,command=`"""
    table = {}
    for line in text.splitlines():
        words = line.split(None, 10)
        numbers = [parse_int(word) for word in words[:3]]
        if len(words) < 11 or None in numbers:
            continue
        cpu_s, start, command = 0.0, " ".join(words[5:10]), words[10].strip()
        for part in re.findall(r"[0-9]{1,9}(?:\.[0-9]{1,9})?", words[4]):  # 1:02.50
            cpu_s = cpu_s * 60 + float(part)
        table[numbers[0]] = ProcessRow(*numbers, words[3][0] == "Z", cpu_s, start,
                                       os.path.basename(command.split()[0]), command)
    return table


def read_ps(_mark: str = "") -> Optional[ProcessTable]:
    result = run_command(["ps", "-axww", "-o", "pid=,ppid=,pgid=,stat=,time=,lstart=,command="],
                         10.0, 8 << 20)
    return parse_ps(result.output) if result.exit_code == 0 else None


def read_processes(mark: str) -> Optional[ProcessTable]:
    """All processes, None where they cannot be read.  mark: NAME=value in an environment."""
    return read_ps() if sys.platform == "darwin" else read_proc(mark)


def read_command(row: ProcessRow) -> str:
    """As far as it is compared."""
    text = row.command or read_text(f"/proc/{row.pid}/cmdline", 500) or ""
    return text.replace("\0", " ").strip()[:500]


def family_of(table: ProcessTable, known: Dict[int, str], group: int) -> ProcessTable:
    """Those of one child: marked, known by pid and start, of its group, and whatever descends from
    these.  Zombies have ended.  group: 0 where it may be somebody else's by now."""
    found = {pid: row for pid, row in table.items()
             if row.marked or known.get(pid) == row.start or group and group == row.group}
    more = found
    while more:
        more = {pid: row for pid, row in table.items() if row.parent in found and pid not in found}
        found.update(more)
    return {pid: row for pid, row in found.items() if not row.zombie and pid != os.getpid()}


class ProcessFamily:
    """The processes of one child.  Those once seen are known even when they leave group and
    parent.  known: {pid: start}; group: the pid of the first, or 0 as in family_of()."""

    def __init__(self, mark: str, group: int, known: Dict[int, str],
                 processes: Callable[[str], Optional[ProcessTable]]) -> None:
        self._processes = processes
        self.mark, self.group, self.known = mark, group, known

    def look(self) -> Optional[ProcessTable]:
        """Those that live; None where that cannot be read."""
        table = self._processes(self.mark)
        if table is None:
            return None
        found = family_of(table, self.known, self.group)
        self.known.update((pid, row.start) for pid, row in found.items())
        return found


def _signal(pid: int, *numbers: int) -> None:
    try:
        for number in numbers:
            os.kill(pid, number)
    except OSError:
        pass  # gone, or another user's: the next look tells


def end_processes(family: ProcessFamily, grace_s: float) -> str:
    """SIGTERM to the first alone as long as it lives, for it ends its own; then to the others;
    after grace_s SIGKILL to all.  Returns: "", or what lives on."""
    began_s, asked, misses = now_s(), set(), 0
    while misses < 2:  # a process in the middle of fork or exec hides from one look
        found, passed_s = family.look(), now_s() - began_s
        misses = misses + 1 if found == {} else 0
        for pid in found or ():
            if passed_s >= grace_s:
                _signal(pid, signal.SIGKILL)
            elif pid not in asked and (pid == family.group or family.group not in found):
                asked.add(pid)
                _signal(pid, signal.SIGTERM, signal.SIGCONT)  # a stopped one cannot hear
        if passed_s > grace_s + KILL_LIMIT_S and misses == 0:
            return ("the table of processes cannot be read" if found is None else "lives on: " +
                    ", ".join(f"{row.name}, pid {pid}" for pid, row in sorted(found.items())[:8]))
        _pause(min(0.2, 0.02 + passed_s / 20))
    return ""


def _taken(host: str, port: int) -> str:
    """Who holds a port, "" where it can be had."""
    try:
        holder = port_holder(host, port)
    except OSError:  # no address of ours: the program itself will say so
        holder = None
    return f"{host_port(host, port)} is taken by {holder}" if holder else ""


class Child:
    """The life of one program: start() and stop() from any thread, but not from on_change, which
    the child's thread calls after every change of `snapshot` and which must neither block nor
    raise.

    _lock guards _thread, _living and _stopping.  The rest is written by the child's thread while
    it lives; `snapshot` and `output` are replaced whole, and anyone may read them.
    """

    def __init__(self, spec: ChildSpec, state_dir: str, log: Log,
                 on_change: Callable[[], None] = lambda: None, pace: Pace = Pace(),
                 processes: Callable[[str], Optional[ProcessTable]] = read_processes) -> None:
        self.spec, self._log, self._on_change, self._pace = spec, log, on_change, pace
        self._processes = processes
        self._logs = os.path.join(state_dir, "logs")
        self._pidfile = os.path.join(state_dir, "children", spec.name + ".json")
        self._lock = threading.Lock()
        self._thread: Any = None
        self._living = self._stopping = False
        self._process: Any = None
        self._reader: Any = None
        self._family: Any = None
        self._written: Any = None
        self._served = False
        self._left = self._lives_on = ""
        self.output = Output(self._logs, spec.name, log)
        self.snapshot = ChildSnapshot()

    # -- for others

    def start(self) -> None:
        """Returns at once; wait() tells what came of it.  Raises: UsageError during a stop."""
        with self._lock:
            if self._living and self._stopping:
                raise UsageError(f"{self.spec.name} is being stopped", "Start it when it has ended")
            if self._living:
                return
            thread = threading.Thread(target=self._live, name=f"child-{self.spec.name}",
                                      daemon=True)
            before, self._stopping = self.snapshot, False
            self.snapshot = before._replace(state=ChildState.STARTING, message="", said="")
            try:
                thread.start()
            except BaseException:  # none is to be had: as if it had not been asked for
                self.snapshot = before
                raise
            self._thread, self._living = thread, True  # it sees the lock before it ends

    def stop(self) -> str:
        """Returns when it has ended: "", or what is left of it."""
        with self._lock:
            self._stopping = True
            thread = self._thread
        if thread is not None:
            thread.join()  # as long as its own limits last
        with self._lock:
            if not self._living and not self._lives_on:
                self.snapshot = self.snapshot._replace(state=ChildState.STOPPED, message=self._left)
        return self._left

    def wait(self, states: Sequence[ChildState], limit_s: float) -> ChildSnapshot:
        """The snapshot once it is in one of the states, or after limit_s."""
        until_s = now_s() + limit_s
        while self.snapshot.state not in states and now_s() < until_s:
            _pause(min(WATCH_S, until_s - now_s()))
        return self.snapshot

    def tail(self, lines: int = 20) -> List[str]:
        """The last lines of this start, or of the last one."""
        return list(self.output.lines[-lines:])

    # -- the child's thread

    def _enter(self, state: ChildState, level: str = "info", **changes: Any) -> None:
        self.snapshot = self.snapshot._replace(state=state, **changes)
        self._tell(level)

    def _tell(self, level: str) -> None:
        now = self.snapshot
        self._log(level if self.spec.is_told else "debug", "child", name=self.spec.name,
                  state=now.state.value, pid=now.pid, what=now.message or None,
                  log=now.log_path or None)
        self._on_change()

    def _live(self) -> None:
        try:
            state, message = self._supervise()
        except Exception as error:
            message = f"a defect of ours: {type(error).__name__}: {error}"
            state = ChildState.ERROR
            self._log.defect(error)
            if self._process is not None and self._process.poll() is None:
                _kill(self._process)
        with self._lock:
            self._living = False
            self.snapshot = self.snapshot._replace(state=state, message=message, pid=None, said="")
        self._tell("error" if state is ChildState.ERROR else "info")

    def _supervise(self) -> Tuple[ChildState, str]:
        """Start it until it is stopped or there is no use.  Returns: the last state, message."""
        ends: List[float] = []
        self._served = False
        while not self._stopping:
            problem, ended = self._run_once()
            if self._stopping:
                break
            ends = [end_s for end_s in ends if now_s() - end_s < self._pace.window_s] + [now_s()]
            often = len(ends) >= self._pace.exits
            if often or self._lives_on or not (ended or self._served):
                problem += f", as {len(ends) - 1} times before" if often and ends[1:] else ""
                last = [line[:300] for line in self.tail(20)]
                return ChildState.ERROR, "\n".join([f"{self.spec.name} {problem}"] + last)
            wait_s = backoff_s(len(ends), self._pace, random_between)
            self._enter(ChildState.BACKOFF, pid=None,
                        message=f"{self.spec.name} {problem}; starts again in {wait_s:.1f} s")
            until_s = now_s() + wait_s
            while not self._stopping and now_s() < until_s:
                _pause(min(WATCH_S, until_s - now_s()))
        return ChildState.ERROR if self._lives_on else ChildState.STOPPED, self._left

    def _run_once(self) -> Tuple[str, bool]:
        """From its start to its end: (what it came to, whether it ended by itself)."""
        self._left = self._lives_on = ""
        self.snapshot = self.snapshot._replace(state=ChildState.STARTING,
                                               starts=self.snapshot.starts + 1)
        problem = self._spawn()
        if problem:
            return f"cannot be started: {problem}", False
        late = self._await_ready()
        while not late and self._process.poll() is None and not self._stopping:
            _pause(WATCH_S)
        code = self._process.poll()
        problem = late if code is None else f"ended with {exit_words(code)}"
        if code == -signal.SIGKILL:
            problem += ": somebody ended it, or the system for lack of memory"
        if self._stopping:
            self._enter(ChildState.STOPPING, said="")
        else:
            self._enter(ChildState.BACKOFF, "warning", said="",
                        message=f"{self.spec.name} {problem}")
        self._end(self.spec.stop_grace_s if code is None else 0.0)
        return problem + (f" ({self._left})" if self._left else ""), code is not None

    def _spawn(self) -> str:
        """"", or why it cannot be started."""
        import subprocess
        self._process, self.output = None, Output(self._logs, self.spec.name, self._log)
        taken = next(filter(None, (_taken(*port) for port in self.spec.ports)), "")
        if taken:
            return taken
        mark = os.urandom(16).hex()
        self._family = ProcessFamily("B9AGENT_CHILD=" + mark, 0, {}, self._processes)
        # Written before there is a process: if we are killed now, its mark is known.
        self._remember()
        try:
            self._process = subprocess.Popen(
                self.spec.argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0,
                stderr=subprocess.STDOUT, start_new_session=True,
                env=dict(clean_environment(), **self.spec.environment, B9AGENT_CHILD=mark))
        except (OSError, ValueError) as error:
            remove_file(self._pidfile)
            return f"{self.spec.argv[0]}: {getattr(error, 'strerror', None) or error}"
        self._family.group = pid = self._process.pid
        self._remember()
        log_path = self.output.open(pid)
        self._reader = threading.Thread(target=self.output.read, args=(self._process.stdout,),
                                        daemon=True, name=f"child-{self.spec.name}-output")
        self._reader.start()
        self._enter(ChildState.STARTING, pid=pid, message="", log_path=log_path)
        return ""

    def _remember(self) -> ProcessTable:
        """Its processes, written down for the next agent: a program may hide its mark, for it may
        write its title there."""
        found = self._family.look() or {}
        record = {"pid": self._family.group, "mark": self._family.mark, "processes": [
            (row.pid, row.start, read_command(row)) for row in found.values()][:200]}
        if record != self._written:
            self._written = record
            try:
                make_private_folder(os.path.dirname(self._pidfile))
                write_atomic(self._pidfile, json.dumps(record) + "\n")
            except (OSError, UsageError) as error:
                self._log("warning", "child", name=self.spec.name, what=f"no pidfile: {error}")
        return found

    def _ask(self) -> Probe:
        try:
            return self.spec.probe()
        except Exception as error:  # a defect of the probe is said, and the limits hold
            return Probe(False, None, f"probe: {type(error).__name__}: {error}")

    def _await_ready(self) -> str:
        """"" once it is ready, has ended or shall stop; else which limit it has passed.

        What moves is the probe's progress, the output, or the processor: 1 % of a core.
        """
        clock = time.monotonic  # stands still while the machine sleeps
        spec, began_s = self.spec, clock()
        moved_s, look_s, seen, effort = began_s, 0.0, None, 0
        while self._process.poll() is None and not self._stopping:
            probe = self._ask()
            if probe.ready and self._process.poll() is None:  # else it was somebody else's answer
                self._remember()
                self._served = True
                self._enter(ChildState.RUNNING, said="")
                break
            if probe.said != self.snapshot.said:
                self._enter(ChildState.STARTING, "debug", said=probe.said)
            if clock() >= look_s:
                cpu_s = sum(row.cpu_s for row in self._remember().values())
                effort = int(cpu_s * 100 / spec.stall_limit_s)
                look_s = clock() + min(2.0, spec.stall_limit_s / 4)
            motion = (probe.progress, self.output.received_bytes, effort)
            if motion != seen:
                seen, moved_s = motion, clock()
            said = f"; last it was: {probe.said}" if probe.said else ""
            if probe.failed:
                return f"will not be ready: {probe.said}"
            if clock() - moved_s > spec.stall_limit_s:
                return f"was not ready, and nothing moved for {spec.stall_limit_s:g} s{said}"
            if clock() - began_s > spec.ready_limit_s:
                return f"was not ready within {spec.ready_limit_s:g} s{said}"
            _pause(min(0.5, 0.05 + (clock() - began_s) / 10))
        return ""

    def _end(self, grace_s: float) -> None:
        """No process of it is left, or _lives_on says which; its ports are closed and nothing is
        held, or _left says what is, after held_s."""
        self._lives_on = end_processes(self._family, grace_s)
        if self._process.poll() is None:
            _kill(self._process)
        self._reader.join(1.0)
        if not self._lives_on:
            remove_file(self._pidfile)
        self._left, until_s = self._lives_on, now_s() + self._pace.held_s
        while not self._lives_on:
            held = [_taken(*port) for port in self.spec.ports] + [self.spec.still_held()]
            if not any(held) or now_s() >= until_s:
                self._left = "; ".join(filter(None, held))
                break
            _pause(WATCH_S)


class Leftover(NamedTuple):
    """A killed agent's child.  pid: 0 where there was none yet.  known: {pid: (start, command)}."""
    pid: int
    mark: str
    known: Dict[int, Tuple[str, str]]


def parse_pidfile(text: str) -> Optional[Leftover]:
    record = parse_json_within(text)
    mark = str(record.get("mark")) if isinstance(record, dict) else ""
    if not re.fullmatch("B9AGENT_CHILD=[0-9a-f]{32}", mark):
        return None
    rows, pid = record.get("processes"), record.get("pid")
    known = {row[0]: (row[1], row[2]) for row in (rows if isinstance(rows, list) else ())
             if isinstance(row, list) and list(map(type, row)) == [int, str, str] and row[0] > 1}
    return Leftover(pid if type(pid) is int else 0, mark, known)


def leftover_family(left: Leftover, processes: Callable[[str], Optional[ProcessTable]]
                    ) -> ProcessFamily:
    """A pid is believed only with its start and its command, or the mark; a group only with one of
    these in it."""
    known = {}
    for pid, row in (processes(left.mark) or {}).items():
        start, command = left.known.get(pid, ("", ""))
        if row.marked or row.start == start and read_command(row) == command != "":
            known[pid] = row
    group = left.pid if any(row.group == left.pid for row in known.values()) else 0
    starts = {pid: row.start for pid, row in known.items()}
    return ProcessFamily(left.mark, group, starts, processes)


def end_leftovers(state_dir: str, log: Log,
                  processes: Callable[[str], Optional[ProcessTable]] = read_processes) -> int:
    """End what a killed agent has left running; how many processes.  Its pidfile goes when they
    have gone.  To be called by the one who holds the state folder, before the first Child."""
    folder, count = os.path.join(state_dir, "children"), 0
    for name in list_folder(folder):
        path = os.path.join(folder, name)
        left = parse_pidfile(read_text(path) or "")
        if left is None:
            log("warning", "leftover", file=name, what="unreadable, removed")
            remove_file(path)
            continue
        family = leftover_family(left, processes)
        problem = end_processes(family, LEFTOVER_GRACE_S)
        if problem or family.known:
            log("error" if problem else "warning", "leftover", file=name,
                what=problem or "ended what a killed agent had left",
                pids=" ".join(map(str, family.known)))
        if not problem:
            remove_file(path)
        count += len(family.known)
    return count


# ----------------------------------------------------------------------
# 9a. Model files                       reads headers, never the weights
# ----------------------------------------------------------------------
# What a model is and what it needs, from the front of its GGUF or safetensors
# files.  They come from strangers: every count, length and offset is checked
# against the file before it is used, and of no file is more read than 256 MiB,
# or for longer than 30 s.  What a file does not say is None.


class KvLayers(NamedTuple):
    """Layers alike in their KV cache.  values: of one token in one layer; window: the tokens that
    are kept, None for all."""
    layers: int
    values: int
    window: Optional[int] = None


class ModelFacts(NamedTuple):
    """What the files of a model say of it.

    format: gguf, safetensors or mlx.  quantization: "Q4_K_M", "AWQ 4-bit", "BF16", …  parameters:
    None where several are packed in one integer.  heads, kv_heads: of the layer with most.
    context_tokens: what it was made for.  kv: () where there is no KV cache.  state_bytes: what
    recurrent layers keep of one sequence.
    """
    name: str
    path: str
    format: str
    architecture: Optional[str] = None
    parameters: Optional[int] = None
    quantization: Optional[str] = None
    weights_bytes: Optional[int] = None
    layers: Optional[int] = None
    heads: Optional[int] = None
    kv_heads: Optional[int] = None
    head_dim: Optional[int] = None
    context_tokens: Optional[int] = None
    license: Optional[str] = None
    base_model: Optional[str] = None
    files: Tuple[str, ...] = ()
    kv: Optional[Tuple[KvLayers, ...]] = None
    state_bytes: int = 0


class Tensor(NamedTuple):
    """begin: from the first byte of weights.  size_bytes: None for a type that we do not know."""
    name: str
    kind: str
    elements: int
    begin: int
    size_bytes: Optional[int]


HEADER_MAX_BYTES, HEADER_LIMIT_S = 256 << 20, 30.0
_MAX_TENSORS, _JSON_MAX_BYTES = 1 << 18, 32 << 20
_FETCH_AGAIN = "Fetch it again: it did not come whole, or is damaged"
_GIVE_MODEL = "Give a GGUF file, a safetensors file, or the folder of one model"


class ModelFile(io.BufferedReader):
    """The front of a file, read in order.  Raises UsageError, and OSError as any file does."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path, opener=lambda name, flags: os.open(
            name, flags | os.O_NONBLOCK)), 1 << 16)  # without the flag a FIFO would hold us
        status = os.fstat(self.fileno())
        self.path, self.at, self.size, self.order = path, 0, status.st_size, "little"
        self._until_s = now_s() + HEADER_LIMIT_S
        if not stat.S_ISREG(status.st_mode) or not self.size:
            self.close()
            raise UsageError(f"{path} is no file, or an empty one", _GIVE_MODEL)

    def wrong(self, what: str) -> UsageError:
        return UsageError(printable(f"{self.path}, byte {self.at}: {what}"), _FETCH_AGAIN)

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise self.wrong(f"{count} bytes should follow, there are {self.size - self.at}")
        self.at += count

    def take(self, count: int) -> bytes:
        self.seek(self.at)
        self.skip(count)
        if self.at > HEADER_MAX_BYTES or now_s() > self._until_s:
            raise self.wrong(f"a header of more than {HEADER_MAX_BYTES >> 20} MiB, or one that "
                             f"took longer than {HEADER_LIMIT_S:g} s to read")
        found = self.read(count) or b""
        if len(found) < count:
            raise self.wrong("the file became shorter while it was read")
        return found

    def integer(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), self.order, signed=signed)

    def text(self, max_bytes: int) -> Optional[str]:
        """A text with its length before it; None where it is too long to be wanted."""
        length = self.integer(8)
        if length > max_bytes:
            return self.skip(length)
        return self.take(length).decode("utf-8", "replace")

    def check(self, tensors: Sequence[Tensor]) -> None:
        """The weights begin here; all are there, and no two tensors share a byte."""
        end = 0
        for tensor in sorted(tensors, key=lambda one: (one.begin, one.size_bytes or 0)):
            if tensor.begin < end:
                raise self.wrong(f"the tensor {tensor.name[:80]} overlaps another")
            end = tensor.begin + (tensor.size_bytes or 0)
        if end > self.size - self.at:
            raise self.wrong(f"{end} bytes of weights should follow, there are "
                             f"{self.size - self.at}")


def _number(value: Any, most: int = 1 << 32) -> Optional[int]:
    """A count that can be true."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value <= most else None


def _name(value: Any) -> Optional[str]:
    return printable(value.strip()[:200]) or None if isinstance(value, str) else None


# What only the code of the engines knows (llama.cpp's src/models/): every n-th layer sees all and
# the others a window; every n-th layer has attention and the others a recurrent state.
_WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gptoss": 2, "cohere2": 4, "exaone4": 4,
                   "olmo2": 4, "afmoe": 4}
_ATTENTION_PERIODS = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}


def _per_layer(value: Any, layers: int) -> Optional[List[int]]:
    """One count for all layers, or one for each."""
    values = value if isinstance(value, list) else [value] * layers
    counts = [_number(one, 1 << 20) for one in values[:layers]]
    return None if len(counts) < layers or None in counts else counts


def _windowed(pattern: Any, layers: int) -> List[bool]:
    """Which layers see a window alone; none where that is not known: an estimate then is too high,
    never too low."""
    if isinstance(pattern, list) and len(pattern) >= layers:
        return list(map(bool, pattern[:layers]))
    period = _number(pattern) or 1
    return [layer % period < period - 1 for layer in range(layers)]


def _shape(fields: Dict[str, Any], name: str) -> Dict[str, Any]:
    """What ModelFacts has of layers, heads and their cache.  fields: named as in GGUF's metadata;
    name: of the architecture."""
    def look(key: str, other: int = 0) -> int:
        return _number(fields.get(key)) or other

    name, layers = re.sub("[-_.]|text", "", name), _number(fields.get("block_count"), 4096)
    every = fields.get("attention.head_count")
    heads = max(_per_layer(every, layers or 1) or [0])
    kv_heads = _per_layer(fields.get("attention.head_count_kv", every), layers or 1)
    width = look("embedding_length") // heads if heads else 0
    key, value = look("attention.key_length", width), look("attention.value_length", width)
    found = {"layers": layers, "heads": heads or None, "kv_heads": max(kv_heads or [0]) or None,
             "head_dim": key or None, "context_tokens": look("context_length") or None}
    if fields.get("attention.causal") == 0:
        return dict(found, kv=())
    if not layers or not kv_heads:
        return found
    period = look("full_attention_interval", _ATTENTION_PERIODS.get(name, 1))
    kept = max(0, layers - look("nextn_predict_layers") - look("attention.shared_kv_layers"))
    kv_heads = [count * ((layer + 1) % period == 0) for layer, count in enumerate(kv_heads[:kept])]
    # The state and the convolution of recurrent layers, 4 bytes a value (llama-hparams.cpp).
    state, inner = look("ssm.state_size"), look("ssm.inner_size")
    found["state_bytes"] = 4 * kv_heads.count(0) * (inner * state + (
        look("ssm.conv_kernel", 1) - 1) * (inner + 2 * look("ssm.group_count") * state))
    near = look("attention.key_length_swa", key) + look("attention.value_length_swa", value)
    window = look("attention.sliding_window") or None
    local = _windowed(window and fields.get("attention.sliding_window_pattern",
                                            _WINDOW_PERIODS.get(name)), layers)
    if look("attention.kv_lora_rank") and look("attention.key_length_mla"):
        # Multi-head latent attention.  GGUF files without the second key are run without it.
        kv_heads = [min(count, 1) for count in kv_heads]
        key, value = look("attention.kv_lora_rank"), look("rope.dimension_count")
    rows = collections.Counter((count * (near if seen else key + value), window if seen else None)
                               for count, seen in zip(kv_heads, local) if count)
    if key if rows else found["state_bytes"]:
        found["kv"] = tuple(KvLayers(count, *row) for row, count in rows.items())
    return found


def _read_parts(files: Sequence[str], read: Callable[[str], Tuple[Dict, List[Tensor], int]]
                ) -> Tuple[Dict[str, Any], List[Tensor], int]:
    """(metadata of the first, tensors, bytes of weights) of all the files of a model."""
    metadata, tensors, weights_bytes, until_s = None, [], 0, now_s() + 4 * HEADER_LIMIT_S
    for path in files:
        found, more, size_bytes = read(path)
        metadata = found if metadata is None else metadata
        tensors, weights_bytes = tensors + more, weights_bytes + size_bytes
        if len(tensors) > _MAX_TENSORS or now_s() > until_s:
            raise UsageError(f"{path}: more than {_MAX_TENSORS} tensors so far, or more than "
                             f"{4 * HEADER_LIMIT_S:g} s to read them", _GIVE_MODEL)
    if not tensors or len({tensor.name for tensor in tensors}) < len(tensors):
        raise UsageError(f"{files[0]} has no tensors, or one of them comes twice", _FETCH_AGAIN)
    return metadata or {}, tensors, weights_bytes


def _most_used(tensors: Sequence[Tensor]) -> str:
    """The type of most values."""
    counted: Dict[str, int] = collections.Counter()
    for tensor in tensors:
        counted[tensor.kind] += tensor.elements
    return max(counted, key=lambda kind: counted[kind])


def model_name(path: str) -> str:
    """
    >>> model_name("/m/Big-Q4_K_M-00001-of-00003.gguf"), model_name("/h/models--a--b/snapshots/5f/")
    ('Big-Q4_K_M', 'a/b')
    """
    cached = re.search("models--([^/]+?)--([^/]+)/snapshots/", path + "/")
    last = "/".join(cached.groups()) if cached else os.path.basename(os.path.abspath(path))
    return printable(re.sub(r"(-[0-9]{5}-of-[0-9]{5})?\.(gguf|safetensors)$", "", last))


# -- GGUF.  Sources: ggml's docs/gguf.md, gguf-py's constants.py -------

# {type: (bytes, signed)}; of numbers with a fraction nothing is wanted.
_GGUF_NUMBERS = {0: (1, False), 1: (1, True), 2: (2, False), 3: (2, True), 4: (4, False),
                 5: (4, True), 6: (4, None), 7: (1, False), 10: (8, False), 11: (8, True),
                 12: (8, None)}
_GGUF_TEXT, _GGUF_ARRAY = 8, 9
# {type: (its name, values in a block, bytes of a block)}
_GGML_TYPES = {int(number): (name, int(values), int(size)) for number, name, values, size in (
    row.split(":") for row in (
        "0:F32:1:4 1:F16:1:2 2:Q4_0:32:18 3:Q4_1:32:20 6:Q5_0:32:22 7:Q5_1:32:24 8:Q8_0:32:34 "
        "9:Q8_1:32:40 10:Q2_K:256:84 11:Q3_K:256:110 12:Q4_K:256:144 13:Q5_K:256:176 "
        "14:Q6_K:256:210 15:Q8_K:256:292 16:IQ2_XXS:256:66 17:IQ2_XS:256:74 18:IQ3_XXS:256:98 "
        "19:IQ1_S:256:50 20:IQ4_NL:32:18 21:IQ3_S:256:110 22:IQ2_S:256:82 23:IQ4_XS:256:136 "
        "24:I8:1:1 25:I16:1:2 26:I32:1:4 27:I64:1:8 28:F64:1:8 29:IQ1_M:256:56 30:BF16:1:2 "
        "34:TQ1_0:256:54 35:TQ2_0:256:66 39:MXFP4:32:17 40:NVFP4:64:36 41:Q1_0:128:18").split())}
_GGUF_FILE_TYPES = (
    "F32 F16 Q4_0 Q4_1 ? ? ? Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M "
    "Q6_K IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M "
    "BF16 ? ? ? TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0").split()


def _gguf_value(file: ModelFile) -> Any:
    """A number, a text, or a list of whole numbers; None for what is too long to be wanted."""
    kind, count = file.integer(4), 1
    if kind == _GGUF_TEXT:
        return file.text(4096)
    listed = kind == _GGUF_ARRAY
    if listed:
        kind, count = file.integer(4), file.integer(8)
    if kind == _GGUF_TEXT:  # a vocabulary of 250,000
        for _ in range(count):
            file.skip(file.integer(8))
        return None
    if kind not in _GGUF_NUMBERS:
        raise file.wrong(f"a value of type {kind}, which is unknown or in a list within a list")
    size, signed = _GGUF_NUMBERS[kind]
    if signed is None or count > 1024:
        return file.skip(count * size)
    values = [file.integer(size, signed) for _ in range(count)]
    return values if listed else values[0]


def _gguf_tensor(file: ModelFile, alignment: int) -> Tensor:
    name, axes = file.text(256), file.integer(4)
    if name is None or axes > 4:
        raise file.wrong(f"a tensor of {axes} dimensions, or with a name of more than 256 bytes")
    shape = [file.integer(8) for _ in range(axes)] or [1]
    number, begin, elements = file.integer(4), file.integer(8), 1
    for length in shape:
        elements *= length
    kind, block, size = _GGML_TYPES.get(number, (f"type {number}", 1, None))
    if not elements or begin % alignment or shape[0] % block:
        raise file.wrong(f"the tensor {name} with the shape {shape} of {kind} at {begin} cannot be")
    return Tensor(name, kind, elements, begin, None if size is None else elements // block * size)


def _read_gguf(path: str) -> Tuple[Dict[str, Any], List[Tensor], int]:
    """(metadata, tensors, bytes of weights) of one file."""
    with ModelFile(path) as file:
        file.skip(4)
        version = file.integer(4)
        if not version & 0xFFFF:  # the magic is the same in both orders
            file.order, version = "big", version >> 24
        tensors, fields, metadata = file.integer(8), file.integer(8), {}
        if version not in (2, 3) or tensors > _MAX_TENSORS or fields > 4096:
            raise file.wrong(f"GGUF version {version} with {tensors} tensors and {fields} fields "
                             f"of metadata; read are 2 and 3, {_MAX_TENSORS} and 4096")
        for _ in range(fields):
            key = file.text(256)
            if key is None or key in metadata:
                raise file.wrong(f"the field {key} twice, or with a name of more than 256 bytes")
            metadata[key] = _gguf_value(file)
        alignment = _number(metadata.get("general.alignment", 32), 1 << 16)
        if not alignment:
            raise file.wrong("an alignment of the weights that cannot be")
        found = [_gguf_tensor(file, alignment) for _ in range(tensors)]
        file.skip(min(-file.at % alignment, file.size - file.at))
        file.check(found)
        sizes = [tensor.size_bytes for tensor in found]
        return metadata, found, file.size - file.at if None in sizes else sum(sizes)


def _gguf_facts(path: str, files: Sequence[str]) -> ModelFacts:
    metadata, tensors, weights_bytes = _read_parts(files, _read_gguf)
    parts = _number(metadata.get("split.count"), 1 << 16) or len(files)
    if parts != len(files):
        raise UsageError(f"{path} is part of a model in {parts} files",
                         "Give a file …-00001-of-0000N.gguf with the others beside it")

    def say(key: str) -> Optional[str]:
        return _name(metadata.get("general." + key))

    kind = _number(metadata.get("general.file_type"), len(_GGUF_FILE_TYPES) - 1)
    name, url = say("architecture") or "", say("base_model.0.repo_url") or ""
    return ModelFacts(
        say("name") or model_name(files[0]), path, "gguf", name or None,
        sum(tensor.elements for tensor in tensors),
        _most_used(tensors) if kind is None or _GGUF_FILE_TYPES[kind] == "?"
        else _GGUF_FILE_TYPES[kind], weights_bytes, files=tuple(files),
        license=say("license.name" if say("license") == "other" else "license") or say("license"),
        base_model=url.partition("huggingface.co/")[2] or url or say("base_model.0.name"),
        **_shape({key[len(name) + 1:]: value for key, value in metadata.items()
                  if key.startswith(name + ".")}, name))


# -- safetensors.  Source: huggingface/safetensors' README --------------

# What config.json calls the fields of GGUF's metadata.
_CONFIG_FIELDS = (
    ("block_count", "num_hidden_layers n_layer n_layers num_layers"),
    ("embedding_length", "hidden_size n_embd d_model"),
    ("attention.head_count", "num_attention_heads n_head n_heads"),
    ("attention.head_count_kv", "num_key_value_heads num_kv_heads"),
    ("attention.key_length", "global_head_dim head_dim"), ("attention.key_length_swa", "head_dim"),
    ("attention.value_length", "v_head_dim global_head_dim head_dim"),
    ("attention.value_length_swa", "v_head_dim head_dim"),
    ("attention.kv_lora_rank", "kv_lora_rank"), ("attention.key_length_mla", "kv_lora_rank"),
    ("rope.dimension_count", "qk_rope_head_dim"),
    ("attention.sliding_window", "sliding_window attention_chunk_size"),
    ("attention.sliding_window_pattern", "sliding_window_pattern"),
    ("attention.shared_kv_layers", "num_kv_shared_layers"),
    ("full_attention_interval", "full_attention_interval"),
    ("context_length", "max_position_embeddings n_positions max_seq_len seq_length"),
    ("ssm.state_size", "linear_key_head_dim mamba_d_state"),
    ("ssm.group_count", "linear_num_key_heads mamba_n_groups"),
    ("ssm.conv_kernel", "linear_conv_kernel_dim mamba_d_conv"))


def _config_shape(config: Dict[str, Any]) -> Dict[str, Any]:
    """_shape() of a Hugging Face config.json."""
    fields: Dict[str, Any] = {}
    for field, keys in _CONFIG_FIELDS:
        values = (config[key] for key in keys.split() if config.get(key) is not None)
        fields.update({field: value for _, value in zip(range(1), values)})
    if config.get("use_sliding_window") is False:
        fields.pop("attention.sliding_window", None)
    if isinstance(config.get("layer_types"), list):
        kinds, some = list(map(_name, config["layer_types"][:4096])), fields.get(
            "attention.head_count_kv", fields.get("attention.head_count"))
        local = [bool(re.match("sliding|chunked", kind or "")) for kind in kinds]
        whole = _number(config.get("num_global_key_value_heads")) or some
        fields.update({"attention.sliding_window_pattern": local, "full_attention_interval": 1,
                       "attention.head_count_kv": [
                           0 if re.match("linear|mamba|conv|recurrent", kind or "")
                           else some if near else whole for kind, near in zip(kinds, local)]})
    for one, other in (("linear_num_value_heads", "linear_value_head_dim"),
                       ("mamba_n_heads", "mamba_d_head")):
        if _number(config.get(one), 1 << 20) and _number(config.get(other), 1 << 20):
            fields["ssm.inner_size"] = config[one] * config[other]
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    context = _number(fields.get("context_length"))
    if context and isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "yarn":
        factor, made_for = rope.get("factor"), rope.get("original_max_position_embeddings")
        if isinstance(factor, (int, float)) and 1 <= factor <= 1024:
            fields["context_length"] = max(context, int((_number(made_for) or 0) * factor))
    return _shape(fields, _name(config.get("model_type")) or "")


def _unique(pairs: Sequence[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def _take_json(file: ModelFile, length: int) -> Dict[str, Any]:
    """An object.  A million values at most, for they take more memory than their text."""
    if length > _JSON_MAX_BYTES:
        raise file.wrong(f"{length} bytes of JSON, more than {_JSON_MAX_BYTES}")
    text = file.take(length)
    try:
        value = json.loads(text.decode("utf-8") if text.count(b",") <= 1 << 20 else "",
                           parse_int=parse_int, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise file.wrong(f"no JSON, or too much: {str(error)[:100]}") from error
    return value if isinstance(value, dict) else {}


def _read_json(path: str) -> Dict[str, Any]:
    """{} where there is no such file."""
    if not os.path.lexists(path):
        return {}
    with ModelFile(path) as file:
        return _take_json(file, file.size)


def _safetensor(file: ModelFile, name: str, entry: Any) -> Tensor:
    """An entry of the header.  Types are named by their bits: BF16, F8_E4M3."""
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, places = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(kind, str) and isinstance(shape, list) and isinstance(places, list)
            and len(shape) <= 16 and len(places) == 2
            and None not in [_number(one, 1 << 60) for one in shape + places]):
        raise file.wrong(f"the tensor {name[:80]} without a type, shape and place")
    elements, (begin, end) = 1, places
    for length in shape:
        elements *= length
    bits = re.fullmatch("[A-Z]+([0-9]{1,2})(_.*)?|BOOL", kind[:20])
    if begin > end or bits and elements * int(bits.group(1) or 8) != (end - begin) * 8:
        raise file.wrong(f"the tensor {name[:80]} of {kind[:20]} is not as long as its shape")
    return Tensor(name, kind[:20], elements, begin, end - begin)


def _read_safetensors(path: str) -> Tuple[Dict[str, Any], List[Tensor], int]:
    """(metadata, tensors, bytes of weights) of one file."""
    with ModelFile(path) as file:
        header = _take_json(file, file.integer(8))
        metadata = header.pop("__metadata__", None)
        found = [_safetensor(file, name, entry) for name, entry in header.items()]
        file.check(found)
        weights_bytes = sum(tensor.size_bytes or 0 for tensor in found)
        if weights_bytes < file.size - file.at:
            raise file.wrong("weights that belong to no tensor")
        return metadata if isinstance(metadata, dict) else {}, found, weights_bytes


def _quantization(config: Dict[str, Any]) -> Optional[str]:
    """What quantised the weights; None for nothing."""
    found = config.get("quantization_config") or config.get("quantization")
    if not isinstance(found, dict):
        return None
    method = _name(found.get("quant_algo")) or _name(found.get("quant_method")) or "MLX"
    method = method.upper() if len(method) < 9 else method
    for key in ("config_groups", "group_0", "weights"):  # of compressed-tensors
        found = found[key] if isinstance(found.get(key), dict) else found
    bits = [_number(found.get(key), 16) for key in ("bits", "w_bit", "num_bits")]
    bits.append(4 if found.get("load_in_4bit") is True else None)
    count = next(filter(None, bits), None)
    return f"{method} {count}-bit" if count and "FP" not in method else method


def _front_matter(folder: str, key: str) -> Optional[str]:
    """A word, or the first of a list, from the YAML on top of README.md (a model card)."""
    path = os.path.join(folder, "README.md")
    text = os.path.isfile(path) and read_text(path, 1 << 16) or ""
    block = re.match("---\n(.*?)\n---", text.replace("\r", ""), re.DOTALL)
    found = block and re.search(f"(?m)^{key}:(.*(?:\n *-.*)?)", block.group(1))
    words = re.split("[][,\n]", found.group(1)) if found else []
    return next(filter(None, (_name(word.strip(" -\"'")) for word in words)), None)


def _safetensors_facts(path: str, files: Sequence[str]) -> ModelFacts:
    folder = os.path.dirname(files[0]) or "."
    config = _read_json(os.path.join(folder, "config.json"))
    metadata, tensors, weights_bytes = _read_parts(files, _read_safetensors)
    quantization, classes = _quantization(config), config.get("architectures")
    packed = quantization and any(re.match("[IU][0-9]", tensor.kind) for tensor in tensors)
    mlx = metadata.get("format") == "mlx" or isinstance(config.get("quantization"), dict)
    license_name = _front_matter(folder, "license") or _name(config.get("license"))
    inner = config.get("text_config")
    return ModelFacts(
        model_name(path), path, "mlx" if mlx else "safetensors",
        _name(classes[0] if isinstance(classes, list) and classes else config.get("model_type")),
        None if packed else sum(tensor.elements for tensor in tensors),
        quantization or _most_used(tensors), weights_bytes,
        license=license_name == "other" and _front_matter(folder, "license_name") or license_name,
        base_model=_front_matter(folder, "base_model"), files=tuple(files),
        **_config_shape(dict(config, **inner) if isinstance(inner, dict) else config))


# -- which files, and do they fit --------------------------------------

# What people have in place of a model, by how it begins.
_OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file", "Run: git lfs pull"),
    (b"PK\3\4|\x80", "a PyTorch file, which can run code", "Convert it to safetensors"),
    (b"<", "a web page", "Fetch the file itself: its address has /resolve/, not /blob/"),
    (b"", "neither GGUF nor safetensors", _GIVE_MODEL))


def _parts(path: str) -> List[str]:
    """All files of a model that is in parts (1999 at most), from the path of any; or [path]."""
    match = re.fullmatch(r"(.*-)[0-9]{5}-(of-0[01][0-9]{3}\.(?:gguf|safetensors))", path, re.DOTALL)
    count = int(match.group(2)[3:8]) if match else 0
    return [f"{match.group(1)}{number:05d}-{match.group(2)}"
            for number in range(1, count + 1)] or [path]


def _model_files(folder: str) -> List[str]:
    """Of the model in a folder: safetensors (those of its index, where it has one) before GGUF."""
    index = _read_json(os.path.join(folder, "model.safetensors.index.json")).get("weight_map")
    if isinstance(index, dict) and index:
        names = sorted({os.path.basename(_name(name) or "") for name in index.values()})
        return [os.path.join(folder, name) for name in names]
    models: Any = ()
    for ending in (".safetensors", ".gguf"):
        models = models or {tuple(_parts(os.path.join(folder, name)))
                            for name in list_folder(folder)
                            if name.endswith(ending) and not name.startswith("mmproj")}
    if len(models) != 1:
        raise UsageError(f"{folder} has {len(models) or 'no'} models in GGUF or safetensors files",
                         _GIVE_MODEL)
    return list(models.pop())


def read_model(path: str) -> ModelFacts:
    """What a GGUF file (or one of its parts), a safetensors file or the folder of a model says of
    itself; its weights are not looked at.

    Raises: UsageError, with the file, the place in it, and what mends it.
    """
    try:
        files = _model_files(path) if os.path.isdir(path) else _parts(path)
        with ModelFile(files[0]) as file:
            front = file.take(min(file.size, 24))
        if front.startswith(b"GGUF"):
            return _gguf_facts(path, files)
        for begin, what, mend in _OTHER_FILES:
            if re.match(begin, front) and front[8:9] != b"{":
                raise UsageError(f"{files[0]} is {what}", mend)
        return _safetensors_facts(path, files)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise UsageError(f"cannot read {getattr(error, 'filename', None) or path}: "
                         f"{getattr(error, 'strerror', None) or error}",
                         "Check that it is there, whole, and that you may read it") from error


class Fit(NamedTuple):
    """Whether a model fits into memory.  context_tokens: of each sequence.
    largest_context_tokens: that would fit, 0 for none."""
    weights_bytes: Optional[int]
    kv_bytes: Optional[int]
    overhead_bytes: Optional[int]
    needed_bytes: Optional[int]
    available_bytes: Optional[int]
    context_tokens: int
    fits: Optional[bool]
    message: str
    largest_context_tokens: Optional[int] = None


def kv_cache_bytes(facts: ModelFacts, context_tokens: int, parallel: int = 1,
                   bytes_per_value: float = 2.0) -> Optional[int]:
    """The KV cache, in blocks of 256 tokens; a layer with a window keeps that and a batch of 512
    (llama-kv-cache-iswa.cpp).  bytes_per_value: 2 is f16; 34/32 is q8_0."""
    if facts.kv is None:
        return None
    values = sum(row.layers * row.values
                 * -(-min(context_tokens, (row.window or context_tokens) + 512) // 256) * 256
                 for row in facts.kv)
    return int(parallel * (values * bytes_per_value + facts.state_bytes))


def overhead_bytes(facts: ModelFacts, gpus: int = 1) -> Optional[int]:
    """512 MiB a GPU for the driver's context, and 5 % of the weights for buffers to compute in, at
    least 256 MiB a GPU, or 1.25 GiB under the engines of safetensors.

    Source: their logs.  llama.cpp's "compute buffer size" is 105 to 560 MiB for 1 to 8 GiB of
    weights; vLLM has 0.3 GiB of "non_torch_memory" and 1.0 to 1.3 of "activation peak memory".
    """
    if facts.weights_bytes is None:
        return None
    least = (1280 if facts.format == "safetensors" else 256) << 20
    return gpus * (512 << 20) + max(facts.weights_bytes // 20, gpus * least)


def show_bytes(count: Optional[float]) -> str:
    """
    >>> show_bytes(1 << 29), show_bytes(17.44 * 2**30), show_bytes(4711), show_bytes(None)
    ('512 MiB', '17.4 GiB', '5 KiB', 'unknown')
    """
    if count is None:
        return "unknown"
    if 0 < count < 1 << 20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**20:.0f} MiB" if count < 1 << 30 else f"{count / 2**30:.1f} GiB"


def _largest_context(facts: ModelFacts, parallel: int, bytes_per_value: float,
                     left_bytes: int) -> int:
    """In blocks of 256 tokens; no more than the model was made for, where that is known."""
    most = facts.context_tokens or 1 << 20
    low, high = 0, -(-most // 256) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = (kv_cache_bytes(facts, middle * 256, parallel, bytes_per_value) or 0) <= left_bytes
        low, high = (middle, high) if fits else (low, middle)
    return min(low * 256, most)


def estimate_fit(facts: ModelFacts, available_bytes: Optional[int],
                 context_tokens: Optional[int] = None, parallel: int = 1, gpus: int = 1,
                 bytes_per_value: float = 2.0) -> Fit:
    """Weights, KV cache and overhead against the free memory of all `gpus` together.

    context_tokens: of each of `parallel` sequences; if None, what the model was made for, up to
    8192.  What is too much even without what is unknown does not fit.
    """
    context = max(1, context_tokens or min(facts.context_tokens or 8192, 8192))
    parts = (facts.weights_bytes, kv_cache_bytes(facts, context, parallel, bytes_per_value),
             overhead_bytes(facts, gpus))
    known, free = sum(part or 0 for part in parts), available_bytes
    needed = None if None in parts else known
    fits = None if free is None or needed is None and known <= free else known <= free
    largest = None if free is None or needed is None else _largest_context(
        facts, parallel, bytes_per_value, free - parts[0] - parts[2])
    advice = "unknown whether it fits" if fits is None else "fits"
    if fits is False:
        advice = (f"does not fit by {show_bytes(max(known - free, 1 << 20))}"
                  + (f"; {largest} tokens would" if largest else "; fewer tokens would not help"))
    elif fits and largest > context:
        advice = f"fits; up to {largest} tokens would"
    weights, cache, overhead = map(show_bytes, parts)
    shared = f" in {parallel} sequences each" if parallel > 1 else ""
    message = (f"needs {'at least ' if needed is None else ''}{show_bytes(known)} (weights "
               f"{weights}, KV cache {cache} for {context} tokens{shared}, overhead {overhead}), "
               f"{show_bytes(free)} free: {advice}")
    if context > (facts.context_tokens or context):
        message += f"; the model was made for {facts.context_tokens} tokens"
    return Fit(*parts, needed, free, context, fits, message, largest)


# ----------------------------------------------------------------------
# 9b. Engines                                    runs an engine's --help
# ----------------------------------------------------------------------
# One row an engine: where it is found, how it is started, how it shows that
# it answers, what it can run.  Every flag that decides who may reach it and
# what it may do stands in its command, because defaults move between
# releases.  Source: the engines' own servers, of vLLM 0.33, SGLang 0.5.23,
# llama.cpp b10488, mlx-lm 0.32 and Ollama 0.33.


TOKEN_REFUSALS = 5
CONTEXT_TOKENS = 8192  # of a request, where neither the user nor the model says otherwise


class EngineError(AgentError):
    """An engine or a model did not do what was asked."""
    exit_code = Exit.FAILED


class EngineMissing(EngineError):
    """No engine that is installed here can do it."""


class EngineRefused(EngineError):
    """It answered, and gave no token."""


class EngineConflict(EngineError):
    """Something is in the way: another engine, another start, a taken port."""


class Launch(NamedTuple):
    """What an engine is asked to do.  model: as the engine takes it, "" for none.  name: what
    clients call it.  context_tokens: None leaves it to the engine.  gpus: 0, the CPU computes.
    help: what the program says of its own flags, where it was asked."""
    program: str
    model: str
    name: str
    host: str
    port: int
    context_tokens: Optional[int]
    parallel: int
    gpus: int
    folder: str
    help: str = ""


def _flags(**values: Any) -> List[str]:
    """Flags with their values; those without one are left out.

    >>> _flags(max_model_len=4096, quantization=None)
    ['--max-model-len', '4096']
    """
    return [word for name, value in values.items() if value is not None
            for word in ("--" + name.replace("_", "-"), str(value))]


def _ollama_command(launch: Launch) -> List[str]:
    return [launch.program, "serve"]


def _ollama_environment(launch: Launch) -> Dict[str, str]:
    # Without a pinned context a large GPU starts at 262,144 tokens; cloud models would be asked
    # of ollama.com with this host's key; a prompt in a temporary folder is a leak.
    return {"OLLAMA_HOST": host_port(launch.host, launch.port), "OLLAMA_NO_CLOUD": "1",
            "OLLAMA_CONTEXT_LENGTH": str(launch.context_tokens or CONTEXT_TOKENS),
            "OLLAMA_NUM_PARALLEL": str(launch.parallel), "OLLAMA_DEBUG_LOG_REQUESTS": "0",
            "HOME": os.environ.get("HOME") or launch.folder}


def _vllm_command(launch: Launch) -> List[str]:
    return [launch.program, "serve", launch.model] + _flags(
        served_model_name=launch.name, host=launch.host, port=launch.port,
        tensor_parallel_size=max(1, launch.gpus), max_model_len=launch.context_tokens,
        gpu_memory_utilization=0.9 if launch.gpus else None)


def _vllm_environment(_launch: Launch) -> Dict[str, str]:
    return {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_SERVER_DEV_MODE": "0"}


def _sglang_command(launch: Launch) -> List[str]:
    return [launch.program, "serve"] + _flags(
        model_path=launch.model, served_model_name=launch.name, host=launch.host,
        port=launch.port, tp_size=max(1, launch.gpus), context_length=launch.context_tokens,
        device=None if launch.gpus else "cpu") + ["--enable-metrics"]


def _llama_command(launch: Launch) -> List[str]:
    # The context is divided among the slots.  What keeps the door shut is said where this build
    # knows the word: no page, no view into requests, no download, no tools.
    context = (launch.context_tokens or CONTEXT_TOKENS) * launch.parallel
    shut = [flag for flag in ("--no-webui", "--no-slots", "--offline") if flag in launch.help]
    return [launch.program, "-m", launch.model, "-c", str(context), "-np", str(launch.parallel),
            "-ngl", "999" if launch.gpus else "0"] + _flags(
                alias=launch.name, host=launch.host, port=launch.port) + ["--metrics"] + shut


def _mlx_command(launch: Launch) -> List[str]:
    return [launch.program] + _flags(model=launch.model, host=launch.host, port=launch.port,
                                     log_level="INFO")


def _mlx_environment(launch: Launch) -> Dict[str, str]:
    # A request may name any repository, and its server would fetch it; and GET /v1/models fails
    # where the cache's folder was never made.
    cache = os.path.join(launch.folder, "hub")
    make_private_folder(cache)
    offline = {"HF_HUB_OFFLINE": "1"} if os.path.isabs(launch.model) else {}
    return dict(offline, HF_HUB_DISABLE_TELEMETRY="1", **(
        {} if os.path.isdir(os.path.expanduser("~/.cache/huggingface/hub"))
        or os.environ.get("HF_HOME") else {"HF_HUB_CACHE": cache}))


class Engine(NamedTuple):
    """A row.  install: the command that brings it.  alive: a GET that is 200 once the server
    answers.  many: serves every model of a store, and starts without one.  formats: what it loads;
    vendors: the GPUs it computes on, "" for the CPU.  never: paths that nobody but the machine's
    owner may reach.  counts: what its GET /metrics calls the counter of finished requests, the
    counter of tokens made, and the requests that wait; "" for what it does not tell."""
    name: str
    title: str
    program: str
    install: str
    command: Callable[[Launch], List[str]]
    environment: Callable[[Launch], Dict[str, str]]
    alive: str
    many: bool
    formats: Tuple[str, ...]
    vendors: Tuple[str, ...]
    stop_grace_s: float
    never: Tuple[str, ...]
    counts: Tuple[str, str, str] = ("", "", "")


ENGINES = (
    Engine("ollama", "Ollama", "ollama", "curl -fsSL https://ollama.com/install.sh | sh",
           _ollama_command, _ollama_environment, "/api/version", True, ("name", "gguf"),
           ("nvidia", "amd", "apple", ""), 10.0,
           ("/api/me", "/api/signout", "/api/user", "/api/push", "/api/experimental")),
    Engine("vllm", "vLLM", "vllm", "pip install vllm", _vllm_command, _vllm_environment,
           "/health", False, ("safetensors", "hub"), ("nvidia", "amd", "intel", ""), 15.0,
           ("/sleep", "/wake_up", "/is_sleeping", "/tokenize", "/pooling", "/invocations"),
           ("vllm:request_success_total", "vllm:generation_tokens_total",
            "vllm:num_requests_waiting")),
    Engine("sglang", "SGLang", "sglang", 'pip install "sglang[all]"', _sglang_command,
           lambda _launch: {}, "/ready", False, ("safetensors", "hub", "gguf"),
           ("nvidia", "amd", "intel", ""), 30.0,
           ("/flush_cache", "/update_weights", "/release_memory_occupation", "/server_info"),
           ("sglang:num_requests_total", "sglang:generation_tokens_total",
            "sglang:num_queue_reqs")),
    Engine("llama-server", "llama.cpp", "llama-server",
           "apt install llama.cpp   # or: brew install llama.cpp", _llama_command,
           lambda _launch: {}, "/health", False, ("gguf",),
           ("nvidia", "amd", "intel", "apple", ""), 10.0,
           ("/slots", "/props", "/models/load", "/models/unload"),
           ("", "llamacpp:tokens_predicted_total", "llamacpp:requests_deferred")),
    Engine("mlx", "MLX", "mlx_lm.server", "pip install mlx-lm", _mlx_command, _mlx_environment,
           "/health", False, ("mlx", "safetensors", "hub"), ("apple", ""), 10.0, ()),
)
ENGINE_BY_NAME = {engine.name: engine for engine in ENGINES}
# What is tried for a model of this format on GPUs of this vendor, in this order.
_ENGINES_FOR = (
    ("safetensors", ("nvidia", "amd"), ("vllm", "sglang")),
    ("hub", ("nvidia", "amd"), ("vllm", "sglang")),
    ("hub", ("apple",), ("mlx",)),
    ("safetensors", ("apple",), ("mlx",)),
    ("mlx", ("apple",), ("mlx",)),
    ("gguf", ("nvidia", "amd", "intel", "apple", ""), ("llama-server", "ollama")),
    ("name", ("nvidia", "amd", "intel", "apple", ""), ("ollama",)),
)
_FORMAT_TITLES = {"gguf": "a GGUF file", "safetensors": "a safetensors folder",
                  "mlx": "a folder of MLX weights", "hub": "a model of a hub",
                  "name": "a model of Ollama's library"}
# Where installers put programs that the PATH of a service lacks.
_PROGRAM_FOLDERS = ("~/.local/bin", "/usr/local/bin", "/opt/homebrew/bin",
                    "/Applications/Ollama.app/Contents/Resources")


def find_engine(name: str) -> Optional[str]:
    """An engine's program on PATH, or where its installer puts it."""
    places = [os.environ.get("PATH", os.defpath), *map(os.path.expanduser, _PROGRAM_FOLDERS)]
    return find_program(name, ":".join(places))


class Reference(NamedTuple):
    """What a user calls a model.  format: of its files; "hub" for ORG/NAME, "name" for one of
    Ollama's; "" for no model.  facts: of its files, where they are here."""
    text: str
    format: str
    facts: Any = None


def read_reference(text: str) -> Reference:
    """Raises: UsageError where it looks like a path and there is no model at it."""
    path = os.path.expanduser(text)
    if not text:
        return Reference("", "")
    if text.startswith(("/", "./", "../", "~")) or os.path.exists(path):
        facts = read_model(os.path.abspath(path))
        return Reference(os.path.abspath(path), facts.format, facts)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith(("library/", "hf.co/")):
        return Reference(text, "hub")
    return Reference(text, "name")


class Choice(NamedTuple):
    """program: None where an engine that runs already is to be used.  why: a sentence."""
    engine: Engine
    program: Optional[str]
    why: str


def _hardware_title(vendor: str) -> str:
    return {"nvidia": "an NVIDIA GPU", "amd": "an AMD GPU", "intel": "an Intel GPU",
            "apple": "Apple silicon"}.get(vendor, "the CPU alone")


def choose_engine(wanted: str, model: Reference, vendor: str,
                  find: Callable[[Engine], Optional[str]], running: Sequence[str] = ()) -> Choice:
    """The engine for a model on this hardware, and why.

    wanted: its name, "" or "auto" to choose.  vendor: of the GPUs, "" for none.  find: the
    program, None where it is not installed.  running: engines of others that can be used.
    Raises: EngineMissing with what to install, UsageError where an engine cannot load the format.
    """
    def choice(engine: Engine, why: str) -> Optional[Choice]:
        program = None if engine.name in running else find(engine)
        return Choice(engine, program, why) if program or engine.name in running else None
    what = _FORMAT_TITLES.get(model.format, "no model yet")
    if wanted and wanted != "auto":
        engine = ENGINE_BY_NAME[wanted]
        if model.format and model.format not in engine.formats:
            able = [row.name for row in ENGINES if model.format in row.formats]
            raise UsageError(f"{engine.title} does not load {what} ({printable(model.text)})",
                             f"Choose --engine {' or '.join(able)}")
        if not (model.format or engine.many):
            raise UsageError(f"{engine.title} starts with a model, and none is named",
                             "Give --model, or set inference.model")
        found = choice(engine, "asked for")
        if found is None:
            raise EngineMissing(f"{engine.title} is not installed: there is no {engine.program} "
                                "on PATH", f"Install it: {engine.install}")
        return found
    names = [name for form, vendors, engines in _ENGINES_FOR
             if form == (model.format or "name") and vendor in vendors for name in engines]
    if model.format == "hub":  # ORG/NAME is a name in Ollama's library, too
        names.append("ollama")
    for name in names:
        found = choice(ENGINE_BY_NAME[name], f"{what} on {_hardware_title(vendor)}: "
                       + ", then ".join(ENGINE_BY_NAME[each].title for each in names))
        if found:
            return found
    if not names:
        raise EngineMissing(f"no engine runs {what} on {_hardware_title(vendor)}", "Convert it to "
                            "GGUF (llama.cpp's convert_hf_to_gguf.py) or choose an --engine")
    first = ENGINE_BY_NAME[names[0]]
    raise EngineMissing(f"{what} on {_hardware_title(vendor)} needs "
                        + " or ".join(ENGINE_BY_NAME[name].title for name in names)
                        + ", and none is installed", f"Install it: {first.install}")


def is_ollama(endpoint: Endpoint) -> str:
    """The version of the Ollama that answers there, or "".  (SGLang answers /api/tags, too.)"""
    try:
        root = http_request("GET", endpoint, "/", {}, None, 2.0)
        version = http_request("GET", endpoint, "/api/version", {}, None, 2.0)
    except HttpFailure:
        return ""
    said = _json_object(version.body).get("version")
    return said if b"Ollama is running" in root.body and isinstance(said, str) else ""


def generate_one_token(endpoint: Endpoint, name: str, limit_s: float) -> None:
    """One real token of an engine with OpenAI's API.  Raises: EngineError with what it said."""
    body = {"model": name, "prompt": "Hello", "max_tokens": 1}
    try:
        reply = http_request("POST", endpoint, "/v1/completions",
                             {"Content-Type": "application/json"}, json.dumps(body).encode(),
                             limit_s)
    except HttpFailure as failure:
        raise EngineError(f"no token came from {endpoint.url}: {failure}") from failure
    answer = _json_object(reply.body)
    choices = answer.get("choices")
    if reply.status != 200 or not (isinstance(choices, list) and choices and isinstance(
            choices[0], dict) and isinstance(choices[0].get("text"), str)):
        said = answer.get("error") or reply.body.decode("utf-8", "replace")
        said = said.get("message") if isinstance(said, dict) else said
        raise EngineRefused(f"{name} did not answer a one-token request: {reply.status} "
                            f"{printable(str(said)[:300])}")


def metric_sums(text: str, names: Sequence[str]) -> List[Optional[float]]:
    """Each metric, summed over its labels; None where it is not told.

    >>> metric_sums('a{n="1 2"} 1\\na 2.5\\nab 9\\n# a 3', ["a", "b"])
    [3.5, None]
    """
    found: Dict[str, float] = {}
    wanted = "|".join(map(re.escape, filter(None, names)))
    # One search, for a hostile text has many lines.
    for match in re.finditer(rf"(?m)^({wanted})(?:\{{.*)? ([0-9.eE+-]{{1,30}})$", text):
        with contextlib.suppress(ValueError):
            value = max(0.0, min(float(match.group(2)), 1e15))
            found[match.group(1)] = found.get(match.group(1), 0.0) + value
    return [found.get(name) for name in names]


class EngineLoad(NamedTuple):
    """Of a moment, on the time of now_s(): what an engine has counted since it started, and what
    that makes in a second.  Unknown: None."""
    at_s: float
    requests: Optional[float] = None
    tokens: Optional[float] = None
    queue: Optional[float] = None
    requests_per_s: Optional[float] = None
    tokens_per_s: Optional[float] = None


def read_engine_load(engine: Engine, endpoint: Endpoint,
                     before: Optional[EngineLoad]) -> EngineLoad:
    """before: the look that the rates are counted from."""
    load = EngineLoad(now_s())
    if not any(engine.counts):
        return load
    try:
        reply = http_request("GET", endpoint, "/metrics", {}, None, 2.0)
    except HttpFailure:
        return load
    load = load._make([load.at_s, *metric_sums(reply.body.decode("utf-8", "replace"),
                                               engine.counts), None, None])

    def rate(now: Optional[float], then: Optional[float]) -> Optional[float]:
        known = now is not None and then is not None and now >= then  # less: it has been restarted
        return (now - then) / max(load.at_s - before.at_s, 0.1) if known else None
    return load if before is None else load._replace(
        requests_per_s=rate(load.requests, before.requests),
        tokens_per_s=rate(load.tokens, before.tokens))


class TokenProbe:
    """Whether an engine with one model is ready: its server answers, and a token came of it.

    The token is asked for by a thread, once at a time, since a model may take minutes to load;
    each call returns within two seconds, as a child's probe must.  An engine that refuses it
    TOKEN_REFUSALS times in a row has failed: a model without completions never has one.
    """

    def __init__(self, engine: Engine, endpoint: Endpoint, name: str) -> None:
        self._engine, self._endpoint, self._name = engine, endpoint, name
        self._results: Optional[List[Any]] = None  # of the question that is out; None for none
        self._refusals = 0

    def _ask(self, results: List[Any]) -> None:
        try:
            generate_one_token(self._endpoint, self._name, 3600.0)
            results.append("ready")
        except EngineError as error:
            results.append(error)

    def __call__(self) -> Probe:
        try:
            status = http_request("GET", self._endpoint, self._engine.alive, {}, None, 2.0).status
        except HttpFailure as failure:
            if failure.kind == "refused":
                # It is another start, which has to give a token of its own.
                self._results, self._refusals = None, 0
            return Probe(False, failure.kind, "starting")
        if status != 200:
            return Probe(False, status, f"loading {self._name}")
        if self._engine.many:
            return Probe(True)
        if self._results is None:
            self._results = []
            threading.Thread(target=self._ask, args=(self._results,), name="first-token",
                             daemon=True).start()
        result = self._results[0] if self._results else None
        if result is not None:
            self._results = None
        if isinstance(result, EngineError):
            self._refusals += isinstance(result, EngineRefused)
            return Probe(False, status, str(result), self._refusals >= TOKEN_REFUSALS)
        return Probe(result == "ready", status, f"loading {self._name}")


# ----------------------------------------------------------------------
# 9c. Models         the engine on loopback; STATE/models.json, Ollama's store
# ----------------------------------------------------------------------
# What is done with models through an Ollama, and what is remembered of every
# model that was served here.  Only the line `success` is success: Ollama says
# 200 first, and may put an error into any line after it.

TRANSFERS_MAX = 4            # at once; more only share the same line
TRANSFERS_KEPT = 32          # that can be asked about, with those that run
PULL_TRIES = 5               # in a row without a byte of progress
RATE_WINDOW_S = 8.0
LAYERS_SHOWN, LAYERS_MAX = 64, 1024
SILENCE_LIMIT_S = 1800.0     # Ollama says nothing while it hashes what it pulled
QUANTIZATIONS = ("q8_0", "q4_K_S", "q4_K_M")
REGISTRIES = ("registry.ollama.ai", "hf.co", "huggingface.co")


class ModelError(EngineError):
    """What the engine said about a model, when it was not "success"."""


class ModelMissing(ModelError):
    """The engine has no such model, and no registry has."""


class ModelRefused(ModelError):
    """The engine will not do this, however often it is asked."""


class ModelUnreachable(ModelError):
    """No whole answer came.  kind: as of HttpFailure."""
    kind = ""


class TransfersFull(EngineError):
    """As many transfers as may be run already."""


class ModelName(NamedTuple):
    """A model's name in Ollama's library, in its parts.  Source: Ollama's types/model/name.go."""
    host: str
    namespace: str
    model: str
    tag: str

    @property
    def key(self) -> str:
        """One spelling for all: they differ in no case, and defaults are left out."""
        host = "" if self.host == REGISTRIES[0] else self.host + "/"
        space = "" if not host and self.namespace.lower() == "library" else self.namespace + "/"
        return f"{host}{space}{self.model}:{self.tag}".lower()


def split_model_name(text: str) -> Optional[ModelName]:
    """As Ollama reads it, `:local` left out; None for what is no name."""
    host, space, word = r"\w[\w.-]{0,349}(?::[0-9]{1,5})?", r"\w[\w-]{0,79}", r"\w[\w.-]{0,79}"
    match = re.fullmatch(rf"(?:https://)?(?:(?:({host})/)?({space})/)?({word})(?::({word}))??"
                         "(?::local)?", text.strip(), re.ASCII | re.IGNORECASE)
    if not match:
        return None
    host, namespace, model, tag = match.groups()
    return ModelName((host or REGISTRIES[0]).lower(), namespace or "library", model,
                     tag or "latest")


def model_key(text: str) -> str:
    """The one spelling of a name that somebody else may have made; never raises."""
    name = split_model_name(text)
    return name.key if name else text.strip().lower()


def refuse_cloud(text: str) -> None:
    """Raises: UsageError for a name that Ollama would pass on to ollama.com."""
    if re.search(r":(\s*cloud|[^:/]*-cloud)\s*(:\s*local\s*)?$", text, re.IGNORECASE):
        raise UsageError(f"{printable(text[:80])} would run on ollama.com, not here",
                         "Choose a tag without `cloud`")


def check_name(text: str) -> ModelName:
    """Raises: UsageError for what is no name of a model in Ollama, before it is asked."""
    name = split_model_name(text)
    if name is None:
        raise UsageError(f"`{printable(text[:80])}` is no name of a model",
                         "Such as llama3.2, llama3.2:1b or hf.co/ORG/NAME:Q4_K_M; those here: "
                         "b9agent.py models")
    return name


def parse_model_name(text: str, registries: Sequence[str] = ()) -> ModelName:
    """Raises: UsageError; for any other registry than ours and `registries`, too.

    >>> parse_model_name(" Library/M ").key, parse_model_name("registry.ollama.ai/library/m:8b").key
    ('m:latest', 'm:8b')
    """
    refuse_cloud(text)
    name = check_name(text)
    if name.host not in REGISTRIES + tuple(registries):
        raise UsageError(f"{printable(name.host)} is no registry that models are pulled from",
                         "They are: " + ", ".join(REGISTRIES + tuple(registries)))
    return name


class OllamaApi:
    """Requests to an Ollama.  Raises (all): ModelError with its own words, UsageError for a name
    that would leave this machine."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    @contextlib.contextmanager
    def _ask(self, method: str, path: str, body: Any, limit_s: float,
             idle_limit_s: Optional[float] = None) -> Iterator[HttpStream]:
        # A Host that is not loopback's is refused, whatever the address.
        headers, name = {"Host": host_port("127.0.0.1", self.endpoint.port)}, ""
        if isinstance(body, dict):
            name = printable(str(body.get("model", "")))
            if method == "POST":
                refuse_cloud(name)
            headers["Content-Type"] = "application/json"
            body = json.dumps(body).encode("utf-8")
        try:
            with http_stream(method, self.endpoint, path, headers, body, limit_s,
                             idle_limit_s) as stream:
                if stream.status not in (200, 201):
                    raise self._error(stream.status, stream.read(), name)
                yield stream
        except HttpFailure as failure:
            error = ModelUnreachable(f"Ollama at {self.endpoint.url} cannot be asked: {failure}",
                                     "Is it running? See `b9agent.py status`")
            error.kind = failure.kind
            raise error from failure

    @staticmethod
    def _error(status: int, body: bytes, name: str) -> ModelError:
        said = _json_object(body).get("error")
        text = said if isinstance(said, str) else body.decode("utf-8", "replace").strip()
        text = f"Ollama answered {status}: {printable(text[:300])}"
        if status == 404 and not body.startswith(b"404 page"):
            return ModelMissing(text, name and f"To fetch it: b9agent.py pull {name}")
        return (ModelRefused if status in (400, 401, 403) else ModelError)(text)

    def ask(self, method: str, path: str, body: Optional[Dict[str, Any]] = None,
            limit_s: float = 30.0) -> Dict[str, Any]:
        with self._ask(method, path, body, limit_s) as stream:
            return _json_object(stream.read(16 << 20))

    def _rows(self, path: str) -> List[Dict[str, Any]]:
        rows = self.ask("GET", path).get("models")
        if not isinstance(rows, list):  # taken for an empty one, whatever is looked for has gone
            raise ModelError(f"Ollama at {self.endpoint.url}, of {path}: no list of models came")
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("name"), str)]

    def version(self) -> str:
        return printable(str(self.ask("GET", "/api/version", limit_s=5.0).get("version"))[:40])

    def tags(self) -> List[Dict[str, Any]]:
        """The models in its store: name, size, digest, modified_at, details."""
        return self._rows("/api/tags")

    def loaded(self) -> List[Dict[str, Any]]:
        """The models in memory: as tags(), with size_vram and expires_at."""
        return self._rows("/api/ps")

    def has(self, name: str) -> bool:
        return any(model_key(row["name"]) == model_key(name) for row in self.tags())

    def show(self, name: str) -> Dict[str, Any]:
        return self.ask("POST", "/api/show", {"model": name})

    def generate_token(self, name: str, keep_alive: Any = None, limit_s: float = 3600.0) -> str:
        """One token: who gives it is loaded and able.  Of a model that only embeds: "".
        keep_alive: None leaves it as it is."""
        keep = {"model": name} if keep_alive is None else {"model": name, "keep_alive": keep_alive}
        try:
            answer = self.ask("POST", "/api/generate", dict(
                keep, prompt="Hello", stream=False, think=False, options={"num_predict": 1}),
                limit_s)
        except ModelRefused as refused:
            if "does not support" not in refused.what:
                raise
            answer = self.ask("POST", "/api/embed", dict(keep, input="Hello"), limit_s)
        if answer.get("done") is not True and not answer.get("embeddings"):
            raise ModelError(f"{name} gave no token: {printable(str(answer)[:200])}")
        return str(answer.get("response", ""))

    def load(self, name: str, keep_alive: Any = -1, limit_s: float = 3600.0) -> None:
        """Into memory, to stay there; and one token of it, for loaded is not yet able."""
        if self.show(name).get("remote_host"):  # a stub, whatever its name
            refuse_cloud(f"{name}:cloud")
        self.generate_token(name, keep_alive, limit_s)

    def unload(self, name: str, limit_s: float = 60.0) -> None:
        """Until it is out of memory: a busy model goes after its last request.

        Raises: EngineConflict where that takes longer.
        """
        key, until_s = model_key(name), now_s() + limit_s
        self.ask("POST", "/api/generate", {"model": name, "keep_alive": 0, "stream": False})
        with contextlib.closing(Wake()) as wake:
            while any(model_key(row["name"]) == key for row in self.loaded()):
                if now_s() > until_s:
                    raise EngineConflict(f"{name} is still in memory after {limit_s:g} s",
                                         "A request holds it; it goes when that ends")
                wake.wait(0.1)

    def delete(self, name: str) -> None:
        self.ask("DELETE", "/api/delete", {"model": name}, 60.0)

    def events(self, path: str, body: Dict[str, Any], opened: Callable[[HttpStream], None]
               ) -> Iterator[Dict[str, Any]]:
        """The lines of a long request.  opened: gets the stream, to close it from elsewhere.
        Raises: ModelError for a line that is an error, too."""
        with self._ask("POST", path, dict(body, stream=True), 20.0, SILENCE_LIMIT_S) as stream:
            opened(stream)
            for event in map(_json_object, stream.lines()):
                said = printable(str(event.get("error") or "")[:300])
                if said:
                    missing = "manifest: file does not exist" in said
                    raise (ModelMissing if missing else ModelError)(
                        f"Ollama, of {printable(str(body['model']))}: {said}",
                        "Is it spelt as its registry does?" if missing else "")
                yield event

    def has_blob(self, digest: str) -> bool:
        try:
            with self._ask("HEAD", f"/api/blobs/{digest}", None, 30.0):
                return True
        except ModelMissing:
            return False

    def send_blob(self, digest: str, upload: Upload) -> None:
        with self._ask("POST", f"/api/blobs/{digest}", upload, 120.0):
            pass


# -- long works ----------------------------------------------------------

class Layer(NamedTuple):
    digest: str
    completed_bytes: int
    total_bytes: int


class Progress(NamedTuple):
    """A pull or an import now.  state: running, success, error or cancelled.  total_bytes: of the
    layers that were named so far, and so is remaining_s; Ollama names them one after the other.
    layers: the last 64.  who: asked for it."""
    name: str
    kind: str
    state: str
    status: str = ""
    completed_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_s: Optional[float] = None
    remaining_s: Optional[float] = None
    layers: Tuple[Layer, ...] = ()
    started: str = ""
    who: str = ""
    message: str = ""


class Transfer:
    """A long work with a model, in a thread of its own; any number may watch it.  error, result:
    of its end, the result as the work left it.

    Without a lock: only its thread changes progress, which is replaced whole; and of attach() and
    cancel() the later one sees what the other has done.
    """

    def __init__(self, name: str, kind: str, who: str, work: Callable[["Transfer"], None]) -> None:
        self.progress = Progress(name, kind, "running", started=utc_stamp(), who=who)
        self.cancelled = False
        self.result: Any = None
        self.error: Optional[AgentError] = None
        self._work = work
        self._stream: Optional[HttpStream] = None
        self._layers: Dict[str, Layer] = {}
        self._moved_bytes = 0
        self._samples: Any = collections.deque(maxlen=256)
        self.thread = threading.Thread(target=self._run, name=f"{kind} {name}", daemon=True)

    def attach(self, stream: HttpStream) -> None:
        """What cancel() closes."""
        self._stream = stream
        if self.cancelled:
            stream.cut()

    def cancel(self) -> None:
        self.cancelled = True
        if self._stream is not None:
            self._stream.cut()

    def _rate(self) -> Optional[float]:
        """Over the last seconds; what was there already has not come at any rate."""
        now, samples = now_s(), self._samples
        if not samples or now - samples[-1][0] > RATE_WINDOW_S / 200:
            samples.append((now, self._moved_bytes))
        while now - samples[0][0] > RATE_WINDOW_S:
            samples.popleft()
        took_s = now - samples[0][0]
        return (self._moved_bytes - samples[0][1]) / took_s if took_s > 0.5 else None

    def count(self, status: str, layer: str = "", completed_bytes: int = 0,
              total_bytes: int = 0) -> None:
        """A line of progress, or of one layer of it.  Raises: ModelError once cancelled."""
        if self.cancelled:
            raise ModelError("cancelled")
        known = self._layers.get(layer)
        if not layer or known is None and len(self._layers) >= LAYERS_MAX:
            self.progress = self.progress._replace(status=status)
            return
        self._moved_bytes += max(0, completed_bytes - known.completed_bytes) if known else 0
        self._layers[layer] = Layer(layer, completed_bytes, total_bytes)
        layers, rate = tuple(self._layers.values()), self._rate()
        done, total = (sum(each[field] for each in layers) for field in (1, 2))
        self.progress = self.progress._replace(
            status=status, completed_bytes=done, total_bytes=total, rate_bytes_s=rate,
            remaining_s=(total - done) / rate if rate else None, layers=layers[-LAYERS_SHOWN:])

    def _run(self) -> None:
        state = "success"
        try:
            self._work(self)
        except AgentError as error:
            state, self.error = "error", error
        except Exception as error:
            state, self.error = "error", AgentError(
                printable(f"{type(error).__name__}: {error} (a defect of ours, at "
                          f"{defect_place(error)})"))
        now = self.progress
        if state == "success":  # Ollama leaves out the last line of a layer
            now = now._replace(status=state, completed_bytes=now.total_bytes, layers=tuple(
                layer._replace(completed_bytes=layer.total_bytes) for layer in now.layers))
        elif self.cancelled:
            state, self.error = "cancelled", None
        self.progress = now._replace(state=state, remaining_s=None, message=str(self.error or ""))

    def pause(self, seconds: float) -> None:
        """For the work: wait, but not once cancelled."""
        until_s = now_s() + seconds
        with contextlib.closing(Wake()) as wake:
            while not self.cancelled and now_s() < until_s:
                wake.wait(0.1)

    def watch(self, heartbeat_s: float = 5.0) -> Iterator[Optional[Progress]]:
        """What is now, then what has changed, five times a second at most, to the end.  None where
        nothing did for a while, so that who waits can see whether somebody still listens."""
        told, told_s = None, now_s()
        with contextlib.closing(Wake()) as wake:
            while told is None or told.state == "running":
                progress = self.progress
                if progress != told or now_s() - told_s >= heartbeat_s:
                    yield None if progress == told else progress
                    told, told_s = progress, now_s()
                wake.wait(0.2 if progress.state == "running" else 0.0)


class Transfers:
    """Those that run, each once however many ask for it, and the last that ended.

    _lock guards _known.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: Dict[str, Transfer] = {}

    def begin(self, name: str, kind: str, who: str, work: Callable[[Transfer], None]) -> Transfer:
        """The one that runs, or a new one.  Raises: TransfersFull, EngineConflict."""
        with self._lock:
            running = {key: each for key, each in self._known.items()
                       if each.progress.state == "running"}
            known = running.get(name)
            if known is not None:
                if known.cancelled or known.progress.kind != kind:
                    raise EngineConflict(f"the {known.progress.kind} of {name} has not ended",
                                         "Ask again when it has")
                return known
            if len(running) >= TRANSFERS_MAX:
                raise TransfersFull(f"{len(running)} pulls and imports are under way",
                                    "Wait for one to end, or cancel one")
            self._known.pop(name, None)
            for key in [key for key in self._known if key not in running]:
                if len(self._known) >= TRANSFERS_KEPT:
                    del self._known[key]
            transfer = self._known[name] = Transfer(name, kind, who, work)
            transfer.thread.start()
            return transfer

    def get(self, name: str) -> Optional[Transfer]:
        with self._lock:
            return self._known.get(name)

    def all(self) -> List[Progress]:
        with self._lock:
            return [transfer.progress for transfer in self._known.values()]

    def cancel(self, name: str) -> bool:
        """Whether it was running."""
        transfer = self.get(name)
        if transfer is None or transfer.progress.state != "running":
            return False
        transfer.cancel()
        return True

    def cancel_all(self, limit_s: float = 10.0) -> bool:
        """Whether all have ended within limit_s."""
        until_s = now_s() + limit_s
        with self._lock:
            transfers = [each for each in self._known.values() if each.thread.is_alive()]
        for transfer in transfers:
            transfer.cancel()
        for transfer in transfers:
            transfer.thread.join(max(0.0, until_s - now_s()))
        return not any(transfer.thread.is_alive() for transfer in transfers)


def _check_space(folder: str, needed_bytes: int) -> None:
    """Ollama itself would find out at the end.  A folder that is not here is not looked at."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return
    if needed_bytes > disk.f_bavail * disk.f_frsize:
        raise ModelError(f"{show_bytes(needed_bytes)} are still to come, and {folder} has "
                         f"{show_bytes(disk.f_bavail * disk.f_frsize)} left", "Make room there")


def _follow(api: OllamaApi, transfer: Transfer, path: str, body: Dict[str, Any],
            folder: str) -> None:
    """Count the lines of a pull or a create, to `success`.  folder: see _check_space()."""
    status = ""
    with contextlib.closing(api.events(path, body, transfer.attach)) as events:
        for event in events:
            status, layer = (printable(value[:200]) if isinstance(value, str) else ""
                             for value in (event.get("status"), event.get("digest")))
            total, done = event.get("total"), event.get("completed", 0)
            if type(total) is int and type(done) is int and 0 <= done <= total < 1 << 60:
                transfer.count(status, layer or status, done, total)
                now = transfer.progress
                _check_space(folder, now.total_bytes - now.completed_bytes)
            else:
                transfer.count(status)
            if status == "success":
                return
    raise ModelError(f"Ollama ended the work on {body['model']} without `success`, at `{status}`")


def pull_work(api: OllamaApi, name: str, folder: str = "", registries: Sequence[str] = ()
              ) -> Callable[[Transfer], None]:
    """A pull that goes on where the connection breaks, as long as every try brings bytes.  folder:
    Ollama's store, where it is on this machine.  Raises (now): UsageError for the name."""
    parse_model_name(name, registries)

    def work(transfer: Transfer) -> None:
        tries, best = 0, -1
        while True:
            try:
                return _follow(api, transfer, "/api/pull", {"model": name.strip()}, folder)
            except ModelUnreachable as error:
                done = transfer.progress.completed_bytes
                tries, best = 1 if done > best else tries + 1, max(done, best)
                if tries >= PULL_TRIES or error.kind in ("garbage", "too_large"):
                    raise ModelError(f"the pull of {name} broke off: {error.what}",
                                     "What came is kept: pull it again to go on") from error
                transfer.count(f"{error.what}; trying again ({tries} of {PULL_TRIES})")
                transfer.pause(random_between(0.5, 1.0) * min(8.0, 0.5 * 2 ** tries))
    return work


def _file_pieces(path: str, count: Callable[[int], None]) -> Iterator[bytes]:
    done = 0
    with open(path, "rb", buffering=0) as handle:
        for piece in iter(lambda: handle.read(1 << 20), b""):
            yield piece
            done += len(piece)
            count(done)


def sha256_file(path: str, count: Callable[[int], None] = lambda done: None) -> str:
    """Hexadecimal.  count: gets the bytes read so far.  Raises: OSError."""
    import hashlib
    digest = hashlib.sha256()
    for piece in _file_pieces(path, count):
        digest.update(piece)
    return digest.hexdigest()


def import_files(facts: ModelFacts) -> Dict[str, str]:
    """{name in the model: path} of what an engine needs of a model's files."""
    files = [os.path.abspath(path) for path in facts.files]
    if facts.format != "gguf":
        folder = os.path.dirname(files[0]) if files else facts.path
        files += [os.path.join(folder, name) for name in list_folder(folder)
                  if name.endswith((".json", ".model", ".jinja"))]
    return {os.path.basename(path): path for path in files}


FileCount = Callable[[str, int, int], None]  # path, bytes done, its size


def file_records(facts: ModelFacts, count: FileCount = lambda path, done, size: None
                 ) -> List[Dict[str, Any]]:
    """[{path, size, sha256}] of a model's files, for the book.  Raises: UsageError."""
    records = []
    for path in import_files(facts).values():
        try:
            size = os.path.getsize(path)
            digest = sha256_file(path, lambda done: count(path, done, size))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}",
                             "Mend its permissions, or fetch it again") from error
        records.append({"path": path, "size": size, "sha256": digest})
    return records


def _sized_pieces(path: str, size: int, count: FileCount) -> Iterator[bytes]:
    """What was promised, or ModelError."""
    sent = 0
    for piece in _file_pieces(path, lambda done: count(path, done, size)):
        sent += len(piece)
        if sent > size:
            break
        yield piece
    if sent != size:
        raise ModelError(f"{path} changed while it was sent")


def import_work(api: OllamaApi, name: str, facts: ModelFacts, quantize: str = "",
                folder: str = "") -> Callable[[Transfer], None]:
    """Files into Ollama's store as one model: hashed, sent, and created from.  Its result:
    file_records().  Raises (now): UsageError for what Ollama cannot make."""
    parse_model_name(name)
    if facts.format == "mlx":
        raise UsageError(f"{facts.name} has MLX weights, which Ollama cannot import",
                         "Serve it with the engine mlx")
    if quantize and quantize not in QUANTIZATIONS:
        raise UsageError(f"Ollama makes no {printable(quantize)}",
                         "It makes " + ", ".join(QUANTIZATIONS))
    if quantize and (facts.quantization or "").upper() not in ("F16", "BF16", "F32"):
        raise UsageError(f"{facts.name} is {facts.quantization or 'of an unknown type'}: only F16, "
                         "BF16 and F32 can be quantised", "Leave --quantize away")

    def work(transfer: Transfer) -> None:
        def counter(verb: str) -> FileCount:
            return lambda path, done, size: transfer.count(
                *[f"{verb} {printable(os.path.basename(path))}"] * 2, min(done, size), size)
        records = transfer.result = file_records(facts, counter("hashing"))
        wanted = [row for row in records if not api.has_blob("sha256:" + row["sha256"])]
        _check_space(folder, sum(row["size"] for row in wanted))
        for row in wanted:
            api.send_blob("sha256:" + row["sha256"], Upload(row["size"], _sized_pieces(
                row["path"], row["size"], counter("sending"))))
        files = {inner: "sha256:" + row["sha256"]
                 for inner, row in zip(import_files(facts), records)}
        body = {"model": name.strip(), "files": files, "quantize": quantize or None}
        _follow(api, transfer, "/api/create", body, "")
    return work


def convert_command(source: str, target: str, quantize: bool = True) -> List[str]:
    """What makes MLX weights of safetensors; -q: in 4 bits."""
    return ["mlx_lm.convert", f"--hf-path={source}", f"--mlx-path={target}"] + ["-q"] * quantize


def convert_work(source: str, target: str, quantize: bool = True) -> Callable[[Transfer], None]:
    """The conversion; cancelled, it still runs to its end.  Raises (now): EngineMissing with what
    to install and to run, UsageError."""
    from shlex import quote
    command = convert_command(source, target, quantize)
    if os.path.lexists(target):
        raise UsageError(f"{target} is there already", "Name a folder that is not")
    program = find_program(command[0])
    if program is None:
        raise EngineMissing("mlx_lm.convert is not installed",
                            "pip install mlx-lm, then: " + " ".join(map(quote, command)))

    def work(transfer: Transfer) -> None:
        transfer.count("converting")
        done = run_command([program, *command[1:]], 6 * 3600.0, 64 << 20)
        if done.exit_code != 0:
            said = done.output.strip().rpartition("\n")[2]
            raise ModelError(f"mlx_lm.convert: {done.problem or printable(said[-300:])}")
    return work


# -- what is remembered of a model --------------------------------------

class BlobFault(NamedTuple):
    """What verify() found.  path: of the file; problem: "missing", "differs", or why not read."""
    digest: str
    path: str
    problem: str


def store_folder() -> str:
    """Where Ollama keeps models: its own rule, and its installer's service."""
    own = os.environ.get("OLLAMA_MODELS") or os.path.expanduser("~/.ollama/models")
    service = "/usr/share/ollama/.ollama/models"
    return service if not os.path.isdir(own) and os.path.isdir(service) else own


def manifest_path(folder: str, name: ModelName) -> str:
    """Names differ in no case, but files do: as it is spelt there."""
    path = os.path.join(folder, "manifests")
    for part in name:
        there = [each for each in list_folder(path) if each.lower() == part.lower()]
        path = os.path.join(path, part if part in there or not there else there[0])
    return path


def read_layers(folder: str, name: ModelName) -> Tuple[str, List[Dict[str, Any]]]:
    """(the manifest's SHA-256, its layers: digest, size_bytes, media_type); ("", []) where it
    cannot be read."""
    path = manifest_path(folder, name)
    manifest = _json_object((read_text(path, 4 << 20) or "").encode("utf-8"))
    rows = manifest.get("layers")
    rows = [manifest.get("config")] + (rows if isinstance(rows, list) else [])
    layers = [{"digest": row["digest"], "size_bytes": row.get("size"),
               "media_type": row.get("mediaType")} for row in rows
              if isinstance(row, dict) and re.fullmatch("sha256:[0-9a-f]{64}",
                                                        str(row.get("digest")))]
    try:
        return (sha256_file(path), layers) if layers else ("", [])
    except OSError:
        return "", []


MODEL_BOOK_MAX, MODEL_BOOK_MAX_BYTES, USED_STEP_S = 1000, 16 << 20, 60.0


def _sound(entry: Any) -> bool:
    """Whether an entry of the book can be used without a further look."""
    def rows(field: str, key: str, form: str) -> bool:
        found = entry.get(field) or []
        return isinstance(found, list) and all(
            isinstance(row, dict) and re.fullmatch(form, str(row.get(key))) for row in found)
    return (isinstance(entry, dict) and isinstance(entry.get("name"), str)
            and re.fullmatch("([0-9a-f]{64})?", str(entry.get("manifest_digest") or "")) is not None
            and rows("layers", "digest", "sha256:[0-9a-f]{64}")
            and rows("files", "sha256", "[0-9a-f]{64}") and rows("files", "path", "/[^\0]*"))


class ModelBook:
    """Every model that was pulled, imported or served here; STATE/models.json.

    _lock guards _entries, _used_s and the file.
    """

    def __init__(self, path: Optional[str], log: Log) -> None:
        """path: None keeps nothing."""
        self._path = path
        self._log = log
        self._lock = threading.Lock()
        self._failing = False
        self._used_s: Dict[str, float] = {}
        self._entries: Dict[str, Dict[str, Any]] = {}
        if path is not None and os.path.lexists(path):
            text = read_text(path, 2 * MODEL_BOOK_MAX_BYTES) or ""
            entries = _json_object(text.encode("utf-8")).get("models")
            if isinstance(entries, dict) and all(map(_sound, entries.values())):
                self._entries = entries
                return
            self._set_aside(path)

    def _set_aside(self, path: str) -> None:
        try:
            os.replace(path, path + ".bad")
            done = f"It is now {path}.bad, and the book begins anew"
        except OSError as error:
            self._path = None
            done = f"It cannot be moved aside ({error.strerror}): nothing will be kept"
        self._log("warning", "models_file", what=f"{path} is not one of ours", do=done)

    def entries(self) -> Dict[str, Dict[str, Any]]:
        with self._lock:
            return {name: dict(entry) for name, entry in self._entries.items()}

    def note(self, name: str, **fields: Any) -> None:
        """Add to what is known of a model; what is None changes nothing."""
        with self._lock:
            entry = dict(self._entries.pop(name, {}), name=name)
            entry.update((key, value) for key, value in fields.items() if value is not None)
            self._entries[name] = entry
            self._save()

    def used(self, name: str) -> None:
        """It was served now; exact to a minute, so that a request costs no write."""
        with self._lock:
            if now_s() - self._used_s.get(name, -USED_STEP_S) < USED_STEP_S:
                return
            self._used_s[name] = now_s()
            served = self._entries.get(name, {}).get("first_served_at")
        stamp = utc_stamp()
        self.note(name, first_served_at=served or stamp, last_used_at=stamp)

    def forget(self, name: str) -> None:
        with self._lock:
            if self._entries.pop(name, None) is not None:
                self._save()

    def _save(self) -> None:
        """Those that changed last.  A disk that is full costs the change, and one line."""
        rows = {name: f"{json.dumps(name)}: {json.dumps(entry)}"
                for name, entry in self._entries.items()}
        while len(rows) > MODEL_BOOK_MAX or sum(map(len, rows.values())) > MODEL_BOOK_MAX_BYTES:
            oldest = next(iter(rows))
            del rows[oldest], self._entries[oldest]
        self._used_s = {name: at for name, at in self._used_s.items() if name in rows}
        try:
            if self._path is not None:
                write_atomic(self._path, '{"models": {\n%s\n}}\n' % ",\n".join(rows.values()))
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._log("error", "models_not_kept", what=f"{self._path}: {error.strerror}",
                          do="They are known until the agent ends; the next change tries again")
            self._failing = True


def _line(value: Any) -> Optional[str]:
    """The first line of a text, to be kept."""
    return printable(str(value or "").strip().partition("\n")[0][:200]) or None


def note_ollama_model(book: ModelBook, api: OllamaApi, name: str, folder: str,
                      **fields: Any) -> str:
    """What Ollama and its store tell of a model goes into the book.  Returns "", or what of the
    store could not be read.  Raises: ModelError."""
    parsed = split_model_name(name) or parse_model_name(name)
    shown = api.show(name)
    info, details = (value if isinstance(value, dict) else {}
                     for value in (shown.get("model_info"), shown.get("details")))
    digest, layers = read_layers(folder, parsed)
    listed = [row.get("digest") for row in api.tags() if model_key(row["name"]) == parsed.key]
    said = str(listed[0] if listed else "").rpartition(":")[2]
    if digest and re.fullmatch("[0-9a-f]{64}", said) and digest != said:
        digest, layers = "", []  # another Ollama's store
    known = digest or (said if re.fullmatch("[0-9a-f]{64}", said) else None)
    before = book.entries().get(parsed.key, {}).get("source")
    noted = dict({"source": before or "/".join(parsed[:3])}, **fields)
    book.note(parsed.key, engine="ollama", manifest_digest=known, layers=layers,
              license=_line(info.get("general.license") or shown.get("license")),
              base_model=_line(details.get("parent_model")
                               or info.get("general.base_model.0.name")),
              parameters=_line(details.get("parameter_size")),
              quantization=_line(details.get("quantization_level")), **noted)
    return "" if digest else f"{manifest_path(folder, parsed)} cannot be read: layers are unknown"


def verify_entry(entry: Dict[str, Any], folder: str,
                 count: FileCount = lambda path, done, size: None) -> List[BlobFault]:
    """Hash again what a model is made of.  [] is: all of it is as it was."""
    name, layers, wanted = split_model_name(entry["name"]), entry.get("layers") or [], []
    if entry.get("engine") == "ollama" and name and entry.get("manifest_digest"):
        wanted.append((entry["manifest_digest"], manifest_path(folder, name)))
        layers = layers or read_layers(folder, name)[1]  # of a manifest that is checked as well
    wanted += [(layer["digest"], os.path.join(folder, "blobs", layer["digest"].replace(":", "-")))
               for layer in layers]
    wanted += [(kept["sha256"], kept["path"]) for kept in entry.get("files") or ()]
    faults = []
    for digest, path in wanted:
        try:
            size = os.path.getsize(path)
            found = sha256_file(path, lambda done: count(path, done, size))
            if found != digest.rpartition(":")[2]:
                faults.append(BlobFault(digest, path, "differs"))
        except FileNotFoundError:
            faults.append(BlobFault(digest, path, "missing"))
        except OSError as error:
            faults.append(BlobFault(digest, path, error.strerror or "cannot be read"))
    if not faults and not layers and not entry.get("files"):
        faults.append(BlobFault("", folder, "nothing is known to compare it with"))
    return faults


_ROW = dict.fromkeys(("loaded", "parameters", "quantization", "license", "base_model", "source",
                      "pulled_by", "pulled_at", "first_served_at", "last_used_at", "verified_at",
                      "verified_ok"))


def model_list(api: Optional[OllamaApi], book: ModelBook) -> List[Dict[str, Any]]:
    """Every model that can be served, from Ollama and the book.  Unknown: None."""
    kept, rows = book.entries(), []
    memory = {model_key(row["name"]): row for row in api.loaded()} if api else {}
    for tag in api.tags() if api else ():
        key = model_key(tag["name"])
        running, details = memory.get(key, {}), tag.get("details")
        details = details if isinstance(details, dict) else {}
        row = {**_ROW, "parameters": _line(details.get("parameter_size")),
               "quantization": _line(details.get("quantization_level")), **kept.pop(key, {}),
               "name": printable(tag["name"]), "engine": "ollama", "loaded": key in memory}
        row.update((ours, _number(source.get(theirs), 1 << 60)) for ours, theirs, source in (
            ("size_bytes", "size", tag), ("vram_bytes", "size_vram", running),
            ("context_tokens", "context_length", running)))
        row.update((field, _line(source.get(field))) for field, source in (
            ("digest", tag), ("modified_at", tag), ("expires_at", running)))
        rows.append(row)
    rows += [{**_ROW, **entry} for entry in kept.values()
             if not (api and entry.get("engine") == "ollama")]
    return sorted(rows, key=lambda row: row["name"])


# ----------------------------------------------------------------------
# 9d. Inference                            one engine's processes and port
# ----------------------------------------------------------------------
# The engine of this machine: one at a time, ours or an Ollama that was here
# before us, which is used and never ended.  What is called running has
# answered a real token, or, without a model yet, a request.


def progress_record(progress: Progress) -> Dict[str, Any]:
    """A pull or an import as JSON, in the words of Ollama's own API; step: what it says of it."""
    words = {"name": "model", "state": "status", "status": "step", "completed_bytes": "completed",
             "total_bytes": "total"}
    record = {words.get(field, field): value for field, value in progress._asdict().items()}
    return dict(rounded(record), layers=[layer._asdict() for layer in progress.layers])


def imported_name(facts: ModelFacts) -> str:
    """What files are called in Ollama, where nobody says otherwise."""
    return model_key(re.sub(r"[^\w.-]", "-", facts.name or "model", flags=re.ASCII))


class Hardware(NamedTuple):
    """vendor: of the GPUs that are offered, "" for none.  gpu_free_bytes: of each; None where a
    driver does not say.  host_free_bytes: for what a GPU cannot hold.  gpu_indexes: of each, as the
    vendor's tools count."""
    vendor: str
    gpu_free_bytes: Tuple[Optional[int], ...]
    host_free_bytes: Optional[int]
    gpu_indexes: Tuple[int, ...] = ()


def visible_gpus(hardware: Hardware) -> Dict[str, str]:
    """The environment that keeps an engine to the GPUs that are offered, and off all others.

    >>> visible_gpus(Hardware("nvidia", (1, 1), 1, (0, 3)))["CUDA_VISIBLE_DEVICES"]
    '0,3'
    """
    chosen = ",".join(map(str, hardware.gpu_indexes))
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **{
        variable: chosen if chosen and vendor == hardware.vendor else "-1" for vendor, variable in (
            ("nvidia", "CUDA_VISIBLE_DEVICES"), ("amd", "ROCR_VISIBLE_DEVICES"))}}


def loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def reachable_host(engine_host: str, gateway_host: str, private_ip: str) -> Optional[str]:
    """The address under which the gateway can reach an engine; None where it cannot.

    >>> reachable_host("127.0.0.1", "gw", "10.0.0.5"), reachable_host("0.0.0.0", "gw", "10.0.0.5")
    (None, '10.0.0.5')
    """
    if loopback(engine_host):
        return "127.0.0.1" if loopback(gateway_host) else None
    return private_ip if engine_host in ("0.0.0.0", "::") else engine_host


def gpus_for(facts: Optional[ModelFacts], hardware: Hardware,
             context_tokens: Optional[int] = None, parallel: int = 1) -> int:
    """How many GPUs share a model: the fewest that hold it, a power of two that divides its
    attention heads, as tensor parallelism wants it."""
    free, best = hardware.gpu_free_bytes, 0
    for count in (1, 2, 4, 8, 16):
        if count > len(free) or best and facts and facts.heads and facts.heads % count:
            break
        best = count
        if facts is None or None in free[:count] or estimate_fit(
                facts, sum(free[:count]), context_tokens, parallel, count).fits is not False:
            break
    return best


class EngineFigures(NamedTuple):
    """name: "" where none was started.  state: "" where no agent runs."""
    name: str = ""
    state: str = ""
    starts: Optional[int] = None
    uptime_s: Optional[float] = None
    models: Optional[int] = None


class _Up(NamedTuple):
    """An engine that was started, or found.  child: None for one that is not ours."""
    engine: Engine
    reference: Reference
    name: str
    endpoint: Endpoint
    child: Optional[Child]
    why: str
    since_s: float


_WIRE_STATES = {ChildState.STOPPED: "stopped", ChildState.STARTING: "starting",
                ChildState.RUNNING: "running", ChildState.BACKOFF: "starting",
                ChildState.STOPPING: "running", ChildState.ERROR: "error"}
INFERENCE_CHECK_S = 10.0  # the gateway's router drops a node that is silent for 30 s
SILENT_CHECKS = 3         # in a row without an answer: it is no longer said to run
MODELS_TOLD = 1000        # to the gateway, of an Ollama


class Inference:
    """The engine and its models.

    _lock guards _up, _place, _ending, _closed, _models, _told and _watch_thread, and is held for
    nothing that takes time.  _up stays until its processes have ended.  hardware(): what is here
    now.  beat(models): called every INFERENCE_CHECK_S while an engine runs.  keep: whether what is
    known of models is read and written.
    """

    def __init__(self, settings: Any, log: Log, hardware: Callable[[], Hardware],
                 beat: Callable[[Sequence[str]], None], on_change: Callable[[], None],
                 keep: bool = True) -> None:
        self._settings = settings
        self._log = log
        self._hardware = hardware
        self._beat = beat
        self._on_change = on_change
        self._lock = threading.Lock()
        self._up: Optional[_Up] = None
        self._place: Optional[Endpoint] = None  # of the engine, or of the last one
        self._ending = self._closed = False
        self._models: Tuple[str, ...] = ()
        self._silent = 0  # checks in a row that it did not answer
        self._load: Optional[EngineLoad] = None  # at the last check
        self._told = self._version = ""
        self._watch_wake = Wake()
        self._watch_thread: Any = None
        self._hashing: Set[str] = set()  # names of models whose files are being hashed
        self.book = ModelBook(os.path.join(settings.state_dir, "models.json") if keep else None,
                              log)
        self.transfers = Transfers()

    # -- what is said of it ---------------------------------------------

    def state(self) -> str:
        up = self._up
        if up is None or self._ending:
            return "stopped"
        state = "running" if up.child is None else _WIRE_STATES[up.child.snapshot.state]
        return "error" if state == "running" and self._silent >= SILENT_CHECKS else state

    def _message(self, up: _Up) -> str:
        if self._ending:
            return f"{up.engine.title} is being stopped"
        if up.child is None:
            return ("the Ollama that was here has stopped answering" if self.state() == "error" else
                    "an Ollama that was here before; it is used, and never ended")
        if up.child.snapshot.state is ChildState.RUNNING and self.state() == "error":
            return f"{up.engine.title} lives and does not answer; a start ends it first"
        child = up.child.snapshot
        return child.message or child.said

    def status(self) -> Dict[str, Any]:
        """The fields of GET /inference/status: the predecessor's, and ours."""
        up, state = self._up, self.state()
        record: Dict[str, Any] = {
            "status": state, "running": state == "running", "endpoint": None, "models": [],
            "message": self._told, "engine": None,
            "transfers": [dict(progress_record(progress), layers=len(progress.layers))
                          for progress in self.transfers.all() if progress.state == "running"],
            **dict.fromkeys(("requests_per_second", "tokens_per_second", "queue"))}
        if up is None:
            return record
        child = up.child.snapshot if up.child else None
        record.update(
            endpoint=up.endpoint.url, models=list(self._models) if state == "running" else [],
            message=self._message(up),
            engine=up.engine.name, version=up.engine.many and self._version or None,
            adopted=up.child is None,
            model=up.name or None, why=up.why, pid=child and child.pid,
            starts=child and child.starts, uptime_seconds=round(now_s() - up.since_s, 1),
            log=child and child.log_path)
        load = self._load
        if load is not None and state == "running":
            record.update(rounded({"requests_per_second": load.requests_per_s,
                                   "tokens_per_second": load.tokens_per_s}),
                          queue=load.queue if load.queue is None else int(load.queue))
        return record

    def port(self) -> Optional[int]:
        up = self._up
        return up.endpoint.port if up else None

    def figures(self) -> EngineFigures:
        """For the metrics."""
        up, state = self._up, self.state()
        if up is None:
            return EngineFigures("", state)
        return EngineFigures(up.engine.name, state, up.child and up.child.snapshot.starts,
                             now_s() - up.since_s, len(self._models))

    def wire(self, private_ip: str) -> Optional[Dict[str, Any]]:
        """The `inference` of a keepalive; None where the gateway could not reach the engine, for
        it would send its users there, and before the first start."""
        place, state = self._place, self.state()
        # A gateway that is local to the tunnel's far end is far from here.
        gateway = "" if self._settings.tunnel else self._settings.gateway_host
        host = place and reachable_host(place.host, gateway, private_ip)
        return host and {"status": state, "ip": host, "port": place.port,
                         "models": list(self._models) if state == "running" else []}

    # -- start ----------------------------------------------------------

    def start(self, engine: str = "", model: Optional[str] = None,
              context_tokens: Optional[int] = None, force: bool = False) -> Dict[str, Any]:
        """Until a token came, or the API answered where there is no model yet.

        model: None for the one of the settings.  force: also where it should not fit.
        Raises: EngineError, UsageError.
        """
        engine = engine or self._settings.inference_engine
        if model is None:
            model = self._settings.inference_model
        reference = read_reference(model or "")
        if engine == "ollama" and reference.format == "hub":
            reference = reference._replace(format="name")  # of a user, in Ollama's library
        if reference.format == "name":
            check_name(reference.text)
        up = None
        while up is None:
            up = self._same(engine, reference) or self._begin(engine, reference, context_tokens,
                                                              force)
        if up.child is not None:
            self._await_ready(up)
        if up.engine.many:
            self._version = OllamaApi(up.endpoint).version()
        self._refresh(up)
        if up.engine.many and reference.text:
            self._load_first(reference)
        elif reference.facts is not None:
            self._note_served(up.name, up.engine, reference.facts)
        if self._up is not up or self._ending:
            raise EngineConflict("it was stopped while it started")
        self._log("notice", "inference_ready", engine=up.engine.name, endpoint=up.endpoint.url,
                  models=",".join(self._models) or None)
        self._on_change()
        return self.status()

    def _load_first(self, reference: Reference) -> None:
        """The model that a start names, in an engine with many.  Raises: EngineError."""
        name = reference.text
        if reference.format == "gguf":
            name = imported_name(reference.facts)
            if self.book.entries().get(name, {}).get("source") == reference.facts.path and (
                    self._ollama().has(name)):
                self.load(name)
                return
            transfer = self.bring(reference.text, who="start")
            for _ in transfer.watch(3600.0):
                pass
            if transfer.progress.state != "success":
                raise transfer.error or EngineConflict("the import was cancelled")
        self.load(name)

    def _same(self, engine: str, reference: Reference) -> Optional[_Up]:
        """What runs, where it is what is asked for.  Raises: EngineConflict where it is not."""
        up = self._up
        if up is not None and (self._ending or up.child is not None and self.state() == "error"):
            self._end(up)  # the start means what comes after the stop, or after one that hangs
            up = self._up
        if up is None or self.state() in ("stopped", "error"):
            return None
        if engine in ("", "auto", up.engine.name) and (
                up.engine.many and reference.format in ("", "name")
                or up.engine.many and engine == up.engine.name and reference.format == "gguf"
                or reference.text in ("", up.reference.text)):
            return up
        raise EngineConflict(f"{up.engine.title} is {self.state()} with {up.name or 'no model'}",
                             "One engine runs at a time: b9agent.py stop")

    def _begin(self, wanted: str, reference: Reference, context_tokens: Optional[int],
               force: bool) -> Optional[_Up]:
        """What was chosen and started; None where another start was faster."""
        before = self._up
        try:
            up = self._choose(wanted, reference, context_tokens, force)
        except EngineConflict:
            if self._up is before:
                raise
            return None  # it is the faster one that holds the port
        with self._lock:
            if self._closed:
                raise EngineConflict("the agent is being stopped")
            if self._up is not before or self._ending:
                return None
            self._up, self._models, self._silent, self._told = up, (), 0, ""
            self._load = None
            self._place = up.endpoint
            if up.child is not None:
                up.child.start()  # here, so that a stop finds it started; its thread does the rest
        self._log("info", "inference_starting", engine=up.engine.name, model=up.name or None,
                  why=up.why, endpoint=up.endpoint.url, adopted=up.child is None or None)
        self._start_watch()
        return up

    def _choose(self, wanted: str, reference: Reference, context_tokens: Optional[int],
                force: bool) -> _Up:
        """The engine for it, once it fits and its port is free; not started yet."""
        hardware, port = self._hardware(), self._settings.inference_port
        place = Endpoint("http", "127.0.0.1", port)
        choice = choose_engine(wanted, reference, hardware.vendor, self._find,
                               ("ollama",) if port and is_ollama(place) else ())
        if reference.facts is not None and not force:
            self._check_fit(choice.engine, reference.facts, hardware, context_tokens)
        if choice.program is None:
            return _Up(choice.engine, reference, "", place, None, choice.why, now_s())
        return self._launch(choice, reference, hardware, context_tokens)

    def _find(self, engine: Engine) -> Optional[str]:
        set_program = self._settings.inference_program
        if set_program and os.path.basename(set_program) == engine.program:
            return set_program if os.access(set_program, os.X_OK) else None
        return find_engine(engine.program)

    def _check_fit(self, engine: Engine, facts: ModelFacts, hardware: Hardware,
                   context_tokens: Optional[int]) -> None:
        """Raises: EngineError where the estimate says no."""
        verdict = self.fit(facts, hardware, engine, context_tokens)
        if verdict.fits is False:
            raise EngineError(f"{facts.name} does not fit: {verdict.message}",
                              "Choose a smaller model, quantisation or context; or --force")

    def fit(self, facts: ModelFacts, hardware: Hardware, engine: Optional[Engine],
            context_tokens: Optional[int]) -> Fit:
        """Against the GPUs; with the host's memory for engines that can use both."""
        free: List[Optional[int]] = list(hardware.gpu_free_bytes)
        if not free or engine is not None and engine.name in ("llama-server", "ollama"):
            if hardware.vendor != "apple":  # there the GPU's memory is the host's
                free.append(hardware.host_free_bytes)
        known, settings = None if None in free else sum(free), self._settings
        return estimate_fit(facts, known, context_tokens or settings.inference_context,
                            settings.inference_parallel, max(1, len(hardware.gpu_free_bytes)))

    def _launch(self, choice: Choice, reference: Reference, hardware: Hardware,
                context_tokens: Optional[int]) -> _Up:
        settings, engine, facts = self._settings, choice.engine, reference.facts
        host = settings.inference_host
        try:
            port = settings.inference_port or free_port(host)
            held = port_holder(host, port)
        except OSError as error:
            raise UsageError(f"no engine can listen on {printable(host)}: {error.strerror}",
                             "Set inference.host to an address of this machine") from error
        if held:
            raise EngineConflict(f"port {port} is taken by {held}", "End that program, or choose "
                                 "another port with inference.port (0 takes a free one)")
        context = context_tokens or settings.inference_context
        if context is None and facts is not None and facts.context_tokens:
            context = min(CONTEXT_TOKENS, facts.context_tokens)
        name = "" if engine.many else reference.text if engine.name == "mlx" or not facts else (
            facts.name)
        gpus = gpus_for(facts, hardware, context, settings.inference_parallel
                        ) if hardware.vendor in engine.vendors else 0
        launch = Launch(choice.program, "" if engine.many else reference.text, name, host, port,
                        context, settings.inference_parallel, gpus, settings.state_dir,
                        run_command([choice.program, "--help"], 10.0).output
                        if engine.name == "llama-server" else "")
        endpoint = Endpoint("http", "127.0.0.1" if host == "0.0.0.0" else host, port)
        chosen = settings.gpu_ids is not None or settings.max_gpus is not None
        environment = dict(engine.environment(launch), **(visible_gpus(hardware) if chosen else {}))
        spec = ChildSpec(
            "engine", tuple(engine.command(launch)), environment, ((host, port),),
            TokenProbe(engine, endpoint, name), stop_grace_s=engine.stop_grace_s,
            still_held=self._still_held(hardware))
        child = Child(spec, settings.state_dir, self._log, self._on_change)
        return _Up(engine, reference, name, endpoint._replace(host=host), child, choice.why,
                   now_s())

    def _still_held(self, before: Hardware) -> Callable[[], str]:
        """What is gone from the GPUs' free memory since before the engine started."""
        def held() -> str:
            if not before.gpu_free_bytes:
                return ""
            missing = [old - new for old, new in zip(before.gpu_free_bytes,
                                                     self._hardware().gpu_free_bytes)
                       if old is not None and new is not None and old - new > 1 << 30]
            return f"{sum(missing) / 2**30:.1f} GiB of GPU memory" if missing else ""
        return held

    def _await_ready(self, up: _Up) -> None:
        done = (ChildState.RUNNING, ChildState.ERROR, ChildState.STOPPED)
        while True:
            child = up.child.wait(done, 3600.0)
            if child.state is ChildState.RUNNING:
                return
            if child.state in done:
                break
        if self._up is not up or self._ending:
            raise EngineConflict("it was stopped while it started")
        raise EngineError(f"{up.engine.title} did not start: {child.message}",
                          f"Its log: {child.log_path}" if child.log_path else "")

    # -- while it runs ---------------------------------------------------

    def _refresh(self, up: _Up) -> None:
        """Ask whether it answers and what it serves; an engine with one model serves that."""
        models: Tuple[str, ...] = (up.name,) if up.name else ()
        try:
            if up.engine.many:
                names = (row["name"] for row in OllamaApi(up.endpoint).tags())
                models = tuple(name for name in names if len(name) <= 512 and name.isprintable()
                               )[:MODELS_TOLD]
            elif http_request("GET", up.endpoint, up.engine.alive, {}, None, 5.0).status != 200:
                raise EngineError(f"{up.engine.title} is unwell")
            silent = 0
        except (AgentError, HttpFailure):
            models, silent = self._models or models, self._silent + 1
        with self._lock:
            if self._up is up and not self._ending:
                self._models, self._silent = models, silent

    def _start_watch(self) -> None:
        with self._lock:
            if self._watch_thread is None:
                self._watch_thread = threading.Thread(target=self._watch, name="inference",
                                                      daemon=True)
                self._watch_thread.start()

    def _look(self, up: _Up) -> None:
        """At one that runs, or ran and may answer again; a change is told."""
        if up.child is not None and up.child.snapshot.state is not ChildState.RUNNING:
            self._silent = 0  # another start begins with a clean slate
            return
        before = self.state()
        self._refresh(up)
        state = self.state()
        if state == "running":
            self._load = read_engine_load(up.engine, up.endpoint, self._load)
            self._beat(self._models)
        if state != before:
            self._log("notice", "inference", state=state, what=self._message(up))
            self._on_change()

    def _watch(self) -> None:
        while True:
            with self._lock:
                up = self._up
                if up is None:
                    self._watch_thread = None
                    return
            try:
                self._look(up)
            except Exception as error:  # a defect costs one look, not the watch
                self._log.defect(error)
            self._watch_wake.wait(INFERENCE_CHECK_S)

    # -- stop -------------------------------------------------------------

    def stop(self) -> Dict[str, Any]:
        """Ended whole and verified; an Ollama of others is only let go of.

        Raises: EngineError with what is left.
        """
        with self._lock:
            up = self._up
            self._told = "" if up else "no engine was running"
        if up is not None:
            left = self._end(up)
            if left:
                raise EngineError(f"{up.engine.title} has ended, but not whole: {left}",
                                  "See which process holds it: b9agent.py doctor")
        return self.status()

    def _end(self, up: _Up) -> str:
        """Returns when it has ended, however many ask for it: "", or what is left."""
        with self._lock:
            if self._up is up:
                self._ending, self._models = True, ()
        left = up.child.stop() if up.child else ""
        with self._lock:
            if self._up is not up:
                return left  # another was as fast, and told
            lives_on = up.child is not None and up.child.snapshot.state is ChildState.ERROR
            self._up, self._models, self._ending = up if lives_on else None, (), False
            self._told = left if up.child else (
                f"the Ollama at {up.endpoint.url} was here before, and runs on")
        self._watch_wake.set()
        self._log("notice", "inference_stopped", engine=up.engine.name, left=left or None)
        self._on_change()
        return left

    def close(self) -> None:
        """The agent ends: nothing is begun any more, and what runs is ended.  Raises: as stop()."""
        with self._lock:
            self._closed = True
        self.transfers.cancel_all()
        self.stop()

    # -- models -----------------------------------------------------------

    def _ollama(self, start: bool = False) -> OllamaApi:
        """The Ollama that runs.  start: or is started for this.  Raises: EngineError."""
        up, state = self._up, self.state()
        if start and state != "running" and (state != "starting" or up and up.engine.many):
            self.start("ollama", "")
            up = self._up
        if up is None or not up.engine.many or self.state() != "running":
            what = f"{up.engine.title} serves {up.name} alone" if up and not up.engine.many else (
                f"Ollama is {self.state()}")
            raise EngineConflict(what, "Models are pulled, imported, loaded and deleted in Ollama: "
                                 "b9agent.py start --engine ollama")
        return OllamaApi(up.endpoint)

    def pull(self, model: str, who: str = "control API") -> Transfer:
        """Begin to pull a model, or join who does.  Raises: UsageError, EngineError."""
        key, api = parse_model_name(model).key, self._ollama(start=True)
        return self._transfer(key, "pull", who, api, pull_work(api, model.strip(),
                                                              store_folder()))

    def bring(self, path: str, name: str = "", quantize: str = "",
              who: str = "control API") -> Transfer:
        """Begin to import files into Ollama.  Raises: UsageError, EngineError."""
        facts = read_model(os.path.abspath(os.path.expanduser(path)))
        key = parse_model_name(name).key if name else imported_name(facts)
        api = self._ollama(start=True)
        if api.has(key):
            raise EngineConflict(f"there is a model {key} already", "Choose another --name, or "
                                 f"remove it: b9agent.py models delete {key}")
        return self._transfer(key, "import", who, api, import_work(
            api, key, facts, quantize, store_folder()), source=facts.path)

    def convert(self, path: str, target: str, plain: bool = False,
                who: str = "control API") -> Transfer:
        """Begin to make MLX weights of a safetensors folder, in 4 bits unless plain.

        Raises: UsageError; EngineMissing with the command, where its tool is not here.
        """
        source, target = (os.path.abspath(os.path.expanduser(each)) for each in (path, target))
        facts = read_model(source)
        if facts.format != "safetensors":
            raise UsageError(f"{printable(source)} is {_FORMAT_TITLES[facts.format]}",
                             "What is converted is a safetensors folder")
        work = convert_work(source, target, not plain)
        if self._closed:
            raise EngineConflict("the agent is being stopped")
        return self.transfers.begin(target, "conversion", who, work)

    def _transfer(self, key: str, kind: str, who: str, api: OllamaApi,
                  work: Callable[[Transfer], None], **noted: Any) -> Transfer:
        def tell(status: str, message: str = "") -> None:
            self._log.events.tell("pull", model=key, how=kind, status=status, message=message)

        def whole(transfer: Transfer) -> None:
            tell("running")
            try:
                work(transfer)
                self._note(api, key, pulled_by=who, pulled_at=utc_stamp(), **noted)
            except AgentError as error:
                tell("cancelled" if transfer.cancelled else "error", str(error))
                if not transfer.cancelled:
                    self._log.error("model_failed", error, "warning")
                raise
            tell("success")
            self._log("notice", "model_here", model=key, how=kind)
            up = self._up
            if up is not None:
                self._refresh(up)
            self._on_change()
        if self._closed:
            raise EngineConflict("the agent is being stopped")
        return self.transfers.begin(key, kind, who, whole)

    def _note(self, api: OllamaApi, name: str, **noted: Any) -> None:
        unread = note_ollama_model(self.book, api, name, store_folder(), **noted)
        if unread:
            self._log("info", "provenance", model=name, what=unread)

    def cancel(self, model: str) -> Dict[str, Any]:
        key = model if self.transfers.get(model) else model_key(model)  # a conversion's is a folder
        if not self.transfers.cancel(key):
            raise ModelMissing(f"nothing is pulled or imported as {printable(key)}")
        return {"status": "cancelled", "model": key, "message": "what came is kept"}

    def _note_served(self, name: str, engine: Engine, facts: ModelFacts) -> None:
        """A model of files is remembered with their hashes; reading gigabytes takes its time."""
        self.book.note(name, engine=engine.name, source=facts.path, license=facts.license,
                       base_model=facts.base_model, quantization=facts.quantization,
                       parameters=facts.parameters and f"{facts.parameters / 1e9:.3g}B")
        self.book.used(name)
        sizes = {path: os.path.getsize(path) for path in facts.files if os.path.exists(path)}
        known = self.book.entries()[name].get("files") or ()
        if sizes and sizes.items() <= {row["path"]: row["size"] for row in known}.items():
            return

        def hash_files() -> None:
            try:
                self.book.note(name, files=file_records(facts))
            except AgentError as error:
                self._log.error("provenance", error, "warning")
            finally:
                self._hashing.discard(name)
        with self._lock:
            if self._closed or name in self._hashing:
                return
            self._hashing.add(name)
        threading.Thread(target=hash_files, name="provenance", daemon=True).start()

    def _alone(self, name: str) -> Optional[_Up]:
        """The engine that serves one model, where that is what runs.  Raises: ModelMissing."""
        up = self._up
        if up is None or up.engine.many or self.state() != "running":
            return None
        if name != up.name:
            raise ModelMissing(f"{up.engine.title} serves {up.name} alone",
                               "One with other models starts after: b9agent.py stop")
        return up

    def load(self, model: str) -> Dict[str, Any]:
        """Into memory, and a token of it.  Raises: EngineError."""
        up = self._alone(model)
        if up is not None:
            generate_one_token(up.endpoint, model, 600.0)
        else:
            check_name(model)
            api = self._ollama()
            api.load(model)
            model = model_key(model)
            self._note(api, model)
        self.book.used(model)
        return {"status": "loaded", "model": model, "message": "it is in memory and gave a token"}

    def unload(self, model: str) -> Dict[str, Any]:
        up = self._alone(model)
        if up is not None:
            raise EngineConflict(f"{up.engine.title} holds {model} as long as it runs",
                                 "b9agent.py stop")
        check_name(model)
        self._ollama().unload(model)
        return {"status": "unloaded", "model": model, "message": "it is out of memory"}

    def delete(self, model: str) -> Dict[str, Any]:
        check_name(model)
        api = self._ollama()
        api.delete(model)
        if api.has(model):
            raise ModelError(f"Ollama says that it deleted {model}, and still lists it")
        self.book.forget(model_key(model))
        if self._up is not None:
            self._refresh(self._up)
        return {"status": "deleted", "model": model, "message": "it is out of Ollama's store"}

    def models(self) -> Dict[str, Any]:
        """What is in the store or served now, and what is remembered of it."""
        up, running = self._up, self.state() == "running"
        rows = model_list(OllamaApi(up.endpoint) if running and up.engine.many else None, self.book)
        for row in rows:
            if up is not None and up.name == row["name"]:
                row["loaded"] = running
        transfers = [progress_record(progress) for progress in self.transfers.all()]
        return {"models": rows, "transfers": transfers,
                "message": "" if running else "no engine runs: this is what is remembered"}

    def fit_of(self, model: str, context_tokens: Optional[int] = None) -> Dict[str, Any]:
        """Of files, or of a model in Ollama's store.  Raises: UsageError."""
        reference = read_reference(model)
        facts = reference.facts
        if facts is None:
            _, layers = read_layers(store_folder(), parse_model_name(model))
            blob = next((layer["digest"] for layer in layers
                         if str(layer["media_type"]).endswith(".model")), None)
            if blob is None:
                raise ModelMissing(f"there are no files of {model} here to look at",
                                   f"b9agent.py pull {model}, or give a path")
            facts = read_model(os.path.join(store_folder(), "blobs", blob.replace(":", "-")))
        verdict = self.fit(facts, self._hardware(), None if reference.format != "name" else
                           ENGINE_BY_NAME["ollama"], context_tokens)
        return dict(verdict._asdict(), model=model, facts=dict(facts._asdict(), files=len(
            facts.files)))

    def verify(self, model: Optional[str] = None) -> Dict[str, Any]:
        """Hash again the files of one model, or of all that are remembered."""
        book, rows = self.book.entries(), []
        wanted = list(book)
        if model:
            wanted = [key for key in book if key in (model, model_key(model))]
            if not wanted:
                raise ModelMissing(f"nothing is remembered of {model}", "See: b9agent.py models")
        for key in wanted:
            faults = verify_entry(book[key], store_folder())
            self.book.note(key, verified_at=utc_stamp(), verified_ok=not faults)
            rows.append({"name": key, "ok": not faults,
                         "faults": [fault._asdict() for fault in faults]})
        return {"models": rows}


# ----------------------------------------------------------------------
# 12. HTTP server core                          sockets it was told to open
# ----------------------------------------------------------------------
# For the two small servers in this file: a table of routes from which
# requests are checked and OpenAPI is written, every limit bounded, JSON
# errors, one send per answer (two, without TCP_NODELAY, cost 44 ms each).
# One thread accepts and answers what needs no waiting; a connection that asks
# for more has a thread of its own.  Strict where HTTP would let us tolerate.

HTTP_HEAD_MAX_BYTES = 16384
HTTP_HEADERS_MAX = 64
HTTP_BODY_MAX_BYTES = 1 << 20
HTTP_REQUEST_LIMIT_S = 10.0   # from the first byte of a request to the last of its body
HTTP_PEER_LIMIT_S = 30.0      # between requests on a kept connection; to take what is sent
STREAM_LOOK_S = 1.0           # how often a stream in which nothing happens looks for its reader
STREAM_QUIET_S = 15.0         # after which it says so
JSON_DEPTH_MAX = 32


class Field(NamedTuple):
    """A value in a JSON body, a query or a result.

    kind: string, integer, number, boolean, object, array.  max_length: characters or items.
    items: the kind of an array's.  Of a result, what is not required may be null.
    """
    name: str
    kind: str
    about: str
    required: bool = False
    choices: Tuple[str, ...] = ()
    max_length: int = 1000
    minimum: int = -10**18
    maximum: int = 10**18
    example: Any = None
    items: str = "string"


class Request(NamedTuple):
    """headers: names in lower case.  caller: what authorize() returned.  query, fields: as their
    route declares them, checked and converted; of an Api that checks none, text and nothing."""
    method: str
    path: str
    query: Dict[str, Any]
    headers: Dict[str, str]
    body: bytes
    caller: Any = None
    fields: Dict[str, Any] = {}


class Response(NamedTuple):
    """body: a JSON value, or bytes with their content type, or an iterator of bytes: a stream.

    Where its reader is slow, or is gone, a stream is closed.  One that has nothing to send yields
    b"" at least every STREAM_LOOK_S, so that this is seen."""
    status: int
    body: Any
    content_type: str = "application/json"
    headers: Tuple[Tuple[str, str], ...] = ()


class Route(NamedTuple):
    """open: needs no authorization.  fields: of the JSON body; result: of the answer, where it is
    JSON; produces: content types of the answer; statuses: those of errors that only this one has.
    """
    method: str
    path: str
    handler: Callable[[Request], Response]
    open: bool
    summary: str
    fields: Tuple[Field, ...] = ()
    query: Tuple[Field, ...] = ()
    result: Tuple[Field, ...] = ()
    produces: Tuple[str, ...] = ("application/json",)
    statuses: Tuple[int, ...] = ()


# What any request may come to, besides 404.
HTTP_ERRORS = (400, 401, 405, 408, 411, 413, 415, 417, 421, 429, 431, 500, 505)


class HttpError(Exception):
    """An answer that is not a success, from anywhere in a handler."""

    def __init__(self, status: int, code: str, what: str, hint: str = "",
                 headers: Tuple[Tuple[str, str], ...] = ()) -> None:
        super().__init__(what)
        self.status = status
        self.code = code
        self.what = what
        self.hint = hint
        self.headers = headers


def _too_many(what: str, wait_s: int) -> HttpError:
    return HttpError(429, "too_many", what, f"Come again in {wait_s} s",
                     (("Retry-After", str(wait_s)),))


# -- JSON and fields ---------------------------------------------------

def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _json_integer(text: str) -> int:
    if len(text) > 32:
        raise ValueError("a number out of range")
    return int(text)


def _json_float(text: str) -> float:
    if len(text) > 32 or abs(float(text)) == float("inf"):
        raise ValueError("a number out of range")
    return float(text)


def _json_pairs(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name that is there twice")
    return found


_STRICT_JSON = json.JSONDecoder(object_pairs_hook=_json_pairs, parse_constant=_no_constant,
                                parse_int=_json_integer, parse_float=_json_float)


def _json_depth(text: str) -> int:
    """How deep a JSON text is nested.

    >>> _json_depth('{"[[": ["\\\\\\"[", [1]]}')
    3
    """
    # Without escaped backslashes, then without escaped quotes, every other piece is a string.
    bare = text.replace("\\\\", "").replace('\\"', "") if "\\" in text else text
    depth = deepest = 0
    for marks in re.findall(r"[\[{]+|[\]}]+", "".join(bare.split('"')[::2])):
        depth += len(marks) if marks[0] in "[{" else -len(marks)
        deepest = max(deepest, depth)
    return deepest


def decode_json(raw: bytes) -> Any:
    """Strictly RFC 8259: UTF-8, each name once, finite numbers, no half of a surrogate pair.

    Nesting is bounded before the decoder, which recurses, sees it.  Megabytes in one string (a
    picture) cost little more than copying them.  Raises: ValueError.
    >>> decode_json(b'{"a": [1, 2.5, "["]}')
    {'a': [1, 2.5, '[']}
    """
    text = raw.decode("utf-8")
    if text.count("[") + text.count("{") > JSON_DEPTH_MAX and _json_depth(text) > JSON_DEPTH_MAX:
        raise ValueError(f"nested deeper than {JSON_DEPTH_MAX}")
    value = _STRICT_JSON.decode(text)
    if "\\ud" in text or "\\uD" in text:  # the one way to half of a surrogate pair
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


_JSON_KINDS: Any = {"string": str, "integer": int, "number": (int, float), "boolean": bool,
                    "object": dict, "array": list}


def _is_kind(value: Any, kind: str) -> bool:
    return isinstance(value, _JSON_KINDS[kind]) and (kind == "boolean") is isinstance(value, bool)


def field_problem(field: Field, value: Any) -> str:
    """What is wrong with a value, or nothing.

    >>> field_problem(Field("n", "integer", "", minimum=1), 0)
    'must be from 1 to 1000000000000000000'
    """
    if not _is_kind(value, field.kind):
        return f"must be of type {field.kind}"
    if field.kind in ("string", "array") and len(value) > field.max_length:
        return f"is longer than {field.max_length}"
    if field.kind == "array" and not all(_is_kind(item, field.items) for item in value):
        return f"must hold items of type {field.items}"
    if field.choices and value not in field.choices:
        return "must be one of " + ", ".join(field.choices)
    if field.kind in ("integer", "number") and not field.minimum <= value <= field.maximum:
        return f"must be from {field.minimum} to {field.maximum}"
    return ""


def checked_fields(fields: Sequence[Field], given: Any, place: str) -> Dict[str, Any]:
    """What was given, if it is what is taken.  place: "body" or "query".  Raises: HttpError."""
    if not isinstance(given, dict):
        raise HttpError(400, "bad_json", f"the {place} must be a JSON object")
    for name in sorted(given.keys() - {field.name for field in fields}):
        raise HttpError(400, "unknown_field", f"the {place} has an unknown field "
                        f"`{printable(name[:64])}`", f"Fields of the {place} here: "
                        + (", ".join(field.name for field in fields) or "none"))
    for field in fields:
        if field.name not in given:
            problem = "is missing" if field.required else ""
        else:
            value = given[field.name]
            if field.kind == "integer" and isinstance(value, float) and value.is_integer():
                given[field.name] = value = int(value)  # 1.0 is an integer in JSON Schema
            problem = field_problem(field, value)
        if problem:
            example = "" if field.example is None else f", as {json.dumps(field.example)}"
            raise HttpError(400, "missing_field" if problem == "is missing" else "bad_field",
                            f"`{field.name}` {problem}", f"{field.name}: {field.about}{example}")
    return given


def parse_query(fields: Sequence[Field], text: str) -> Dict[str, Any]:
    """A query's values as their fields' kinds; text stays text where it is none, and is refused
    when it is checked.  Raises: HttpError."""
    if not text:
        return {}
    from urllib.parse import parse_qsl
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=True, errors="strict",
                          max_num_fields=32)
        given: Dict[str, Any] = _json_pairs(pairs)
    except ValueError as error:
        raise HttpError(400, "bad_query", f"a query of no use: {printable(str(error)[:100])}",
                        "It is NAME=VALUE&..., each name once") from error
    for field in fields:
        value = given.get(field.name)
        if field.kind == "integer" and value and re.fullmatch("-?[0-9]{1,18}", value):
            given[field.name] = int(value)
        elif field.kind == "boolean" and value in ("true", "false"):
            given[field.name] = value == "true"
    return given


def encode_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8") + b"\n"


def media_type(headers: Dict[str, str]) -> str:
    """
    >>> media_type({"content-type": "Application/JSON; charset=utf-8"})
    'application/json'
    """
    return headers.get("content-type", "").partition(";")[0].strip().lower()


# -- what is served ----------------------------------------------------

class RequestHead(NamedTuple):
    """headers: names in lower case.  minor: of HTTP/1.minor."""
    method: str
    target: str
    headers: Dict[str, str]
    minor: str = "1"

    @property
    def has_body(self) -> bool:
        return (self.headers.get("content-length", "0") != "0"
                or "transfer-encoding" in self.headers)


class Api:
    """What a server serves.  Subclasses give routes, authorize() and the shape of an error.

    strict: bodies and queries are checked against their route.  refusals: failed authorizations
    in a minute, after which they are 429; 0 for no limit.  A right token is never held up.
    statuses: HTTP's and ours for an AgentError that a handler raises, by its class.  instant: paths
    of open routes whose handlers never wait: they need no thread.
    """

    name = "api"
    max_connections = 64  # well under the 256 descriptors that a terminal on macOS grants
    max_streams = 16
    strict = True
    refusals = 0
    statuses: Tuple[Tuple[Any, int, str], ...] = ()
    instant: Tuple[str, ...] = ()

    def __init__(self, log: Log) -> None:
        self.log = log
        self.routes: Tuple[Route, ...] = ()
        self._refused_s: Any = collections.deque(maxlen=self.refusals)

    def check(self, headers: Dict[str, str]) -> None:
        """Before anything else is looked at.  Raises: HttpError."""

    def authorize(self, headers: Dict[str, str]) -> Any:
        """Who calls.  Raises: HttpError."""
        raise HttpError(401, "unauthorized", "no way to authorize is set up")

    def error_body(self, error: HttpError) -> Dict[str, Any]:
        return {"status": "error", "error": error.what, "message": error.what,
                "error_code": error.code, "suggestion": error.hint}

    def route(self, method: str, path: str) -> Route:
        found = [route for route in self.routes if route.path == path]
        if not found:
            raise HttpError(404, "not_found", f"there is no {printable(path[:100])} here",
                            "GET /openapi.json lists what there is")
        wanted = "GET" if method == "HEAD" else method
        for route in found:
            if route.method == wanted:
                return route
        allowed = [route.method for route in found]
        allowed += ["HEAD"] if "GET" in allowed else []
        raise HttpError(405, "method_not_allowed", f"{path} does not take {printable(method[:16])}",
                        "It takes " + ", ".join(allowed), (("Allow", ", ".join(allowed)),))

    def _caller(self, headers: Dict[str, str]) -> Any:
        try:
            return self.authorize(headers)
        except HttpError as error:
            times = self._refused_s
            if not self.refusals or error.status != 401:
                raise
            if len(times) == self.refusals and now_s() - times[0] < 60:
                raise _too_many("too many requests with a wrong token", 60) from error
            times.append(now_s())
            raise

    def _fields(self, route: Route, headers: Dict[str, str], body: bytes) -> Dict[str, Any]:
        given: Any = {}
        if body:
            if media_type(headers) != "application/json":
                raise HttpError(415, "unsupported_media_type", "the body must be JSON",
                                "Send Content-Type: application/json")
            try:
                given = decode_json(body)
            except ValueError as error:
                raise HttpError(400, "bad_json", f"the body is not strict JSON: {error}") from error
        return checked_fields(route.fields, given, "body")

    def answer(self, head: RequestHead, read_body: Callable[[], bytes]) -> Response:
        """Route, then authority, then the body, so that a stranger's megabytes are not read."""
        self.check(head.headers)
        path, _, query_text = head.target.partition("?")
        route = self.route(head.method, path)
        caller = None if route.open else self._caller(head.headers)
        query, body, fields = parse_query(route.query, query_text), read_body(), {}
        if self.strict:
            query = checked_fields(route.query, query, "query")
            fields = self._fields(route, head.headers, body)
        try:
            return route.handler(
                Request(head.method, path, query, head.headers, body, caller, fields))
        except AgentError as error:
            _, status, code = next((row for row in self.statuses if isinstance(error, row[0])),
                                   (None, 500, "failed"))
            self.log.error("failed", error, "error" if status >= 500 else "info", request=path)
            raise HttpError(status, code, error.what, error.hint) from error

    def failure(self, error: HttpError) -> Response:
        return Response(error.status, encode_json(self.error_body(error)), headers=error.headers)

    def defect(self, error: Exception, target: str) -> Response:
        """What is said of an exception that nobody expected, once it is logged."""
        number = os.urandom(4).hex()
        self.log.defect(error, id=number, request=target[:200])
        return self.failure(HttpError(
            500, "internal", f"a defect of ours, number {number} in the log",
            "Please report it with the lines of the log that have this number"))


def _field_schema(field: Field, of_result: bool = False) -> Dict[str, Any]:
    schema: Dict[str, Any] = {"type": field.kind, "description": field.about}
    if of_result:
        return schema if field.required else dict(schema, type=[field.kind, "null"])
    if field.kind in ("integer", "number"):
        schema.update(minimum=field.minimum, maximum=field.maximum)
    elif field.kind == "string":
        schema.update(maxLength=field.max_length)
    elif field.kind == "array":
        schema.update(maxItems=field.max_length, items={"type": field.items})
    schema.update({"enum": list(field.choices)} if field.choices else {})
    return dict(schema, examples=[field.example]) if field.example is not None else schema


def _object_schema(fields: Sequence[Field], of_result: bool = False) -> Dict[str, Any]:
    return {"type": "object", "additionalProperties": of_result,
            "properties": {field.name: _field_schema(field, of_result) for field in fields},
            "required": [field.name for field in fields if field.required]}


def _operation(route: Route) -> Dict[str, Any]:
    """A route as OpenAPI has it."""
    json_only = {"application/json": {"schema": _object_schema(route.result, True)}}
    errors = sorted(({*HTTP_ERRORS, *route.statuses}) - ({401} if route.open else set()))
    operation: Dict[str, Any] = {
        "operationId": (route.method + re.sub("[^a-z]+", "_", route.path)).lower(),
        "summary": route.summary,
        "responses": dict({"200": {"description": route.summary, "content": {
            kind: json_only.get(kind, {"schema": {"type": "string"}}) for kind in route.produces}}},
            **{str(status): {"$ref": f"#/components/responses/{status}"} for status in errors})}
    if route.query:
        operation["parameters"] = [
            {"name": field.name, "in": "query", "required": field.required,
             "description": field.about, "schema": _field_schema(field)} for field in route.query]
    if route.method != "GET":
        operation["requestBody"] = {
            "required": any(field.required for field in route.fields),
            "content": {"application/json": {"schema": _object_schema(route.fields)}}}
    if route.open:
        operation["security"] = []
    return operation


def openapi(routes: Sequence[Route], title: str) -> Dict[str, Any]:
    """The OpenAPI 3.1 document of a table of routes."""
    from http import HTTPStatus
    error = {name: {"type": "string"} for name in ("status", "error", "message", "error_code",
                                                  "suggestion")}
    texts = {status: HTTPStatus(status).phrase for status in HTTP_ERRORS + sum(
        (route.statuses for route in routes), ())}
    paths: Dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0", "info": {"title": title, "version": VERSION},
        "servers": [{"url": "/"}], "security": [{"token": []}], "paths": paths, "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": {"type": "object", "properties": error, "required": list(error)}},
            "responses": {str(status): {"description": text, "content": {"application/json": {
                "schema": {"$ref": "#/components/schemas/Error"}}}}
                for status, text in sorted(texts.items())}}}


# -- a connection ------------------------------------------------------

_HTTP_TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = f"({_HTTP_TOKEN}) ([!-~]+) HTTP/([0-9])[.]([0-9])"
_HEADER_LINE = f"{_HTTP_TOKEN}:[\t -~\x80-\xff]*"
_HTTP_ONCE = ("authorization", "content-length", "content-type", "expect", "host",
              "transfer-encoding")


def parse_request_head(raw: bytes) -> RequestHead:
    """A request's head without its empty line.  Raises: HttpError.  Source: RFC 9112, 2 to 5."""
    first, *lines = raw.decode("latin-1").split("\r\n")
    match = re.fullmatch(_REQUEST_LINE, first)
    if not match:
        raise HttpError(400, "bad_request", "this is no HTTP request")
    method, target, major, minor = match.groups()
    if major != "1":
        raise HttpError(505, "bad_version", "HTTP/1.1 is spoken here")
    if len(lines) > HTTP_HEADERS_MAX:
        raise HttpError(431, "too_many_headers", f"more than {HTTP_HEADERS_MAX} headers")
    headers: Dict[str, str] = {}
    for line in lines:
        if not re.fullmatch(_HEADER_LINE, line):
            raise HttpError(400, "bad_header", "a malformed header")
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            if name in _HTTP_ONCE:
                raise HttpError(400, "repeated_header", f"{name} is there twice")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    if "host" not in headers and minor != "0":
        raise HttpError(400, "no_host", "a request without a Host header")
    return RequestHead(method, target, headers, minor)


def body_length(headers: Dict[str, str]) -> int:
    """Raises: HttpError for a body without a clear end, or one that is too long."""
    text = headers.get("content-length", "0")
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise HttpError(400, "bad_length", "a Content-Length and a Transfer-Encoding")
        raise HttpError(411, "length_required", "a chunked body", "Send a Content-Length")
    if not re.fullmatch("[0-9]{1,15}", text):
        raise HttpError(400, "bad_length", "a Content-Length that is no number")
    if int(text) > HTTP_BODY_MAX_BYTES:
        raise HttpError(413, "too_large", f"a body of more than {HTTP_BODY_MAX_BYTES} bytes")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise HttpError(417, "bad_expectation", "an Expect other than 100-continue")
    return int(text)


@functools.lru_cache(maxsize=1)
def http_date(wall_s: int) -> str:
    """
    >>> http_date(784111777)
    'Sun, 06 Nov 1994 08:49:37 GMT'
    """
    at = time.gmtime(wall_s)
    day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[at.tm_wday]
    return time.strftime(f"{day}, %d {_MONTHS[at.tm_mon - 1]} %Y %H:%M:%S GMT", at)


def render_response(response: Response, length: Optional[int], more: str = "") -> bytes:
    """The head of an answer.  more: header lines, each with its end."""
    from http import HTTPStatus
    sized = "" if length is None else f"Content-Length: {length}\r\n"
    named = "".join([f"{name}: {value}\r\n" for name, value in response.headers])
    return (f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}\r\n"
            f"Content-Type: {response.content_type}\r\n{sized}"
            f"Date: {http_date(int(time.time()))}\r\nX-Content-Type-Options: nosniff\r\n"
            f"Cache-Control: no-store\r\n{named}{more}\r\n").encode("latin-1")


class _Gone(Exception):
    """The client left, or takes nothing more: there is nobody to answer."""


class _Connection:
    """One client's requests, one after the other.

    answer_instant() is for the thread that accepts, serve() for one of its own after that.
    """

    def __init__(self, sock: socket.socket, server: Any) -> None:
        self.sock = sock
        self._server, self._api = server, server.api
        self._held = b""  # what came and was not looked at yet
        self._until_s = 0.0
        self._unread = False  # whether there is a body that nobody has read
        self.idle_until_s = now_s() + HTTP_REQUEST_LIMIT_S
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(0)

    def _receive(self, until_s: float, begun: bool = True) -> bytes:
        """More of a request, or the beginning of one.  Raises: HttpError, _Gone."""
        try:
            self.sock.settimeout(_left_s(until_s))
            piece = self.sock.recv(65536)
        except socket.timeout as error:
            if not begun:
                raise _Gone from error
            raise HttpError(408, "too_slow", "the request did not arrive within "
                            f"{HTTP_REQUEST_LIMIT_S:g} s") from error
        except OSError as error:
            raise _Gone from error
        if not piece:
            raise HttpError(400, "cut_off", "the request ended early") if begun else _Gone
        return piece

    def _send(self, data: bytes) -> None:
        try:
            self.sock.settimeout(HTTP_PEER_LIMIT_S)
            self.sock.sendall(data)
        except OSError as error:
            raise _Gone from error

    def _read_head(self) -> RequestHead:
        """Raises: HttpError, _Gone."""
        held = self._held or self._receive(now_s() + HTTP_PEER_LIMIT_S, False)
        self._until_s = now_s() + HTTP_REQUEST_LIMIT_S
        self._unread = True
        end = held.find(b"\r\n\r\n")
        while end < 0 and len(held) <= HTTP_HEAD_MAX_BYTES:
            held += self._receive(self._until_s)
            end = held.find(b"\r\n\r\n")
        if not 0 <= end <= HTTP_HEAD_MAX_BYTES:
            raise HttpError(431, "too_large", f"a head of more than {HTTP_HEAD_MAX_BYTES} bytes")
        self._held = held[end + 4:]
        head = parse_request_head(held[:end])
        self._unread = head.has_body
        return head

    def _read_body(self, headers: Dict[str, str]) -> bytes:
        """Raises: HttpError, _Gone."""
        length = body_length(headers)
        if length > len(self._held) and "expect" in headers:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray(self._held)
        while len(body) < length:
            body += self._receive(self._until_s)
        self._held = bytes(body[length:])
        self._unread = False
        return bytes(body[:length])

    def _drop_unread(self) -> None:
        """Read away, for two seconds, a body that was answered without being read.

        Closing on unread bytes makes the kernel reset the connection, and the answer may be lost.
        """
        until_s, left = now_s() + 2.0, HTTP_BODY_MAX_BYTES
        self.shut(socket.SHUT_WR)
        try:
            while left > 0:
                left -= len(self._receive(until_s))
        except (OSError, HttpError, _Gone):
            pass  # it is closed next in any case

    def _answer(self, head: RequestHead) -> Response:
        """Whatever happens in it.  Raises: _Gone."""
        try:
            response = self._api.answer(head, lambda: self._read_body(head.headers))
            if not isinstance(response.body, bytes) and not hasattr(response.body, "__next__"):
                response = response._replace(body=encode_json(response.body))
        except HttpError as error:
            response = self._api.failure(error)
        except _Gone:
            raise
        except Exception as error:
            response = self._api.defect(error, head.target)
        self._api.log("debug", "served", api=self._api.name, status=response.status,
                      request=f"{head.method} {head.target[:200]}")
        return response

    def _render(self, response: Response, head: RequestHead) -> Tuple[bytes, bool]:
        """(what is sent, whether another request may follow)."""
        goes_on = not (self._unread or head.minor == "0" or self._server.stopping
                       or "close" in head.headers.get("connection", "").lower())
        answer = render_response(response, len(response.body),
                                 "" if goes_on else "Connection: close\r\n")
        return answer if head.method == "HEAD" else answer + response.body, goes_on

    def answer_instant(self) -> bool:
        """Answer what has come, without waiting.  Raises: _Gone.  Returns: whether that could be:
        one whole request, of a path that is instant."""
        try:
            self._held = self.sock.recv(65536)
            if not self._held:
                raise _Gone
            if not self._held.endswith(b"\r\n\r\n"):
                return False
            head = parse_request_head(self._held[:-4])
            if head.target not in self._api.instant or head.has_body:
                return False
            answer, goes_on = self._render(self._answer(head), head)
            if self.sock.send(answer) < len(answer) or not goes_on:
                raise _Gone
        except HttpError:
            return False
        except OSError as error:
            raise _Gone from error
        self._held, self.idle_until_s = b"", now_s() + HTTP_PEER_LIMIT_S
        return True

    def shut(self, how: int) -> None:
        """From any thread."""
        try:
            self.sock.shutdown(how)
        except OSError:
            pass  # it ended by itself

    def _is_left(self) -> bool:
        """Whether the reader of a stream has closed his side."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        try:
            return bool(poll.poll(0)) and not self.sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _stream(self, response: Response, head: RequestHead) -> bool:
        """Whether the connection can be used again.  A stream that breaks off has no last chunk."""
        chunked = head.minor != "0"
        self._send(render_response(response, None, "Transfer-Encoding: chunked\r\n" if chunked
                                   else "Connection: close\r\n"))
        for piece in () if head.method == "HEAD" else response.body:
            if self._server.stopping or not piece and self._is_left():
                return False
            if piece:
                self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if chunked and head.method != "HEAD":
            self._send(b"0\r\n\r\n")
        return chunked and not self._unread

    def _serve_one(self) -> bool:
        """Whether another request may follow.  Raises: _Gone."""
        head, streams = RequestHead("", "", {}, "0"), self._server.streams
        try:
            head = self._read_head()
            response = self._answer(head)
        except HttpError as error:
            response = self._api.failure(error)
        if hasattr(response.body, "__next__"):
            if streams.acquire(blocking=False):
                try:
                    return self._stream(response, head)
                finally:
                    streams.release()
                    getattr(response.body, "close", int)()
            response = self._api.failure(_too_many("too many streams are open", 10))
        answer, goes_on = self._render(response, head)
        self._send(answer)
        if self._unread:
            self._drop_unread()
        return goes_on

    def serve(self) -> None:
        """In a thread of its own, to the end."""
        try:
            while self._serve_one():
                pass
        except _Gone:
            pass
        except Exception as error:  # in the middle of a stream: nothing more can be said
            self._api.defect(error, "")
        finally:
            self._server.left(self)


class ApiServer:
    """A listening socket, a thread that accepts, and one for each connection that needs it.

    Raises OSError where the address is not to be had.  _lock guards _connections (with their
    threads); _waiting (by descriptor) is the accepting thread's own.
    """

    def __init__(self, api: Api, host: str, port: int) -> None:
        self.api = api
        self.stopping = False
        self.streams = threading.BoundedSemaphore(api.max_streams)
        self._lock = threading.Lock()
        self._connections: Dict[_Connection, Optional[threading.Thread]] = {}
        self._waiting: Dict[int, _Connection] = {}
        self._poll = select.poll()
        self._listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((host, port))
            self._listener.listen(1024)
        except BaseException:
            self._listener.close()
            raise
        self._listener.settimeout(0)
        self.host, self.port = self._listener.getsockname()[:2]
        self._end_read, self._end_write = os.pipe()
        self._poll.register(self._listener, select.POLLIN)
        self._poll.register(self._end_read, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name=api.name, daemon=True)

    @property
    def url(self) -> str:
        return f"http://{host_port(self.host, self.port)}"

    def _run(self) -> None:
        sweep_s = 0.0
        while not self.stopping:
            for descriptor, _ in self._poll.poll(1000 if self._waiting else None):
                try:
                    if descriptor in self._waiting:
                        self._look(descriptor)
                    elif descriptor == self._listener.fileno():
                        self._accept(self._listener.accept()[0])
                except BlockingIOError:
                    pass  # it left again
                except Exception as error:  # no descriptor or no thread was to be had
                    self.api.log("debug", "not_accepted", what=repr(error))
                    select.poll().poll(50)  # what we cannot accept stays ready: do not spin
            if now_s() > sweep_s:
                sweep_s = now_s() + 1.0
                for descriptor in [descriptor for descriptor, found in self._waiting.items()
                                   if found.idle_until_s < now_s()]:
                    self.left(self._forget(descriptor))

    def _forget(self, descriptor: int) -> _Connection:
        self._poll.unregister(descriptor)
        return self._waiting.pop(descriptor)

    def _accept(self, sock: socket.socket) -> None:
        try:
            connection = _Connection(sock, self)
            with self._lock:
                full = len(self._connections) >= self.api.max_connections
                if not full:
                    self._connections[connection] = None
            if full:
                error = self.api.failure(_too_many("too many connections are open", 1))
                sock.send(render_response(error, len(error.body), "Connection: close\r\n")
                          + error.body)
                sock.close()
                return
        except OSError:
            sock.close()  # it left again
            return
        self._poll.register(sock, select.POLLIN)
        self._waiting[sock.fileno()] = connection

    def _look(self, descriptor: int) -> None:
        """Something came on a connection that has no thread."""
        try:
            if self._waiting[descriptor].answer_instant():
                return
        except Exception as error:
            self.left(self._forget(descriptor))
            if not isinstance(error, _Gone):
                self.api.defect(error, "")
            return
        connection = self._forget(descriptor)
        thread = threading.Thread(target=connection.serve, name=f"{self.api.name}-client",
                                  daemon=True)
        with self._lock:
            self._connections[connection] = thread
        try:
            thread.start()
        except BaseException:
            self.left(connection)
            raise

    def left(self, connection: _Connection) -> None:
        """A connection is done with."""
        with self._lock:
            self._connections.pop(connection, None)
        connection.sock.close()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Answers that are being made have a moment to go out."""
        self.stopping = True
        os.write(self._end_write, b"!")
        if self._thread.ident is not None:
            self._thread.join(2.0)
        for how, limit_s in ((socket.SHUT_RD, 1.5), (socket.SHUT_RDWR, 0.5)):
            until_s = now_s() + limit_s
            with self._lock:
                found = list(self._connections.items())
            for connection, thread in found:
                connection.shut(how)
                if thread is None:
                    self.left(connection)
            for _, thread in found:
                if thread is not None:
                    thread.join(max(0.0, until_s - now_s()))
        self._listener.close()
        os.close(self._end_read)
        os.close(self._end_write)


def follow_ring(ring: Ring, number: int, render: Callable[[int, Any], bytes],
                quiet: bytes) -> Iterator[bytes]:
    """The body of a stream without end: what is in a ring after a number, and what comes; quiet:
    what is sent where nothing comes."""
    told_s = now_s()
    while True:
        found = ring.after(number, STREAM_LOOK_S)
        if found:
            number = found[-1][0]
        piece = b"".join([render(*pair) for pair in found])
        if not found and now_s() - told_s >= STREAM_QUIET_S:
            piece = quiet
        if piece:
            told_s = now_s()
        yield piece


# ----------------------------------------------------------------------
# 12b. Metrics (Prometheus text)                 reads /proc/self, /dev/fd
# ----------------------------------------------------------------------
# What GET /metrics says, in Prometheus' text format 0.0.4: one table of
# families, each a function of one immutable view.  Base units; what is
# unknown is absent, never 0.  Names, versions and the like are labels of
# _info families alone, so that no other series breaks off when they change.

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METRIC_GPUS_MAX = 64
METRIC_MIG_MAX = 16
METRIC_LABEL_MAX = 128


class ProcessFigures(NamedTuple):
    """This process.  started_wall_s: seconds since 1970."""
    cpu_s: float
    started_wall_s: float
    resident_bytes: Optional[int] = None
    open_fds: Optional[int] = None
    threads: Optional[int] = None


class MetricsView(NamedTuple):
    """All that the metrics are made of.  at_s: the time on now_s().  keepalive_took_s: of the last
    request, whatever it came to.  clock_offset_s: our clock less the gateway's.  process: None
    where no agent runs, and then nobody knows the agent's counters either.  tunnel_state,
    tailnet_state: "" where there is none.  pods_state: "" where nobody looks; pods: how many of
    each status."""
    snapshot: Snapshot
    machine: Optional[MachineSample] = None
    facts: HostFacts = HostFacts()
    capacity: Capacity = Capacity(None, None)
    identity: Optional[Identity] = None
    process: Optional[ProcessFigures] = None
    at_s: float = 0.0
    keepalive_took_s: Optional[float] = None
    clock_offset_s: Optional[float] = None
    grid_g_per_kwh: Optional[float] = None
    pue: Optional[float] = None
    version: str = VERSION
    engine: EngineFigures = EngineFigures()
    tunnel_state: str = ""
    tailnet_state: str = ""
    pods_state: str = ""
    pods: Optional[Dict[str, int]] = None


Samples = List[Tuple[Dict[str, Any], Any]]  # (labels, value); a value of None is left out
Family = Callable[[MetricsView], Samples]


def parse_process_stat(text: str) -> Tuple[Optional[int], Optional[int]]:
    """(threads, resident pages) from /proc/self/stat, proc(5).

    >>> parse_process_stat("7 (a) b) S" + " 0" * 16 + " 3 0 9 4096 512")
    (3, 512)
    """
    # The program's name stands in parentheses and may hold any character: count from the last one.
    words = text.rpartition(")")[2].split()
    return (parse_int(words[17]), parse_int(words[21])) if len(words) > 21 else (None, None)


def read_process(started_wall_s: float) -> ProcessFigures:
    """macOS has no /proc: memory and threads are unknown there (getrusage says the peak alone)."""
    threads, pages = parse_process_stat(read_text("/proc/self/stat", 4096) or "")
    try:
        open_fds: Optional[int] = len(os.listdir("/dev/fd")) - 1  # less the one that lists them
    except OSError:
        open_fds = None
    resident = None if pages is None else pages * os.sysconf("SC_PAGE_SIZE")
    return ProcessFigures(time.process_time(), started_wall_s, resident, open_fds, threads)


def _figure(thing: Any, path: str, times: int = 1, per: int = 1) -> Any:
    """What lies at a path of attributes; None where anything on the way is None."""
    for name in path.split("."):
        thing = None if thing is None else getattr(thing, name)
    return thing if thing is None or times == per else thing * times / per


def _at(path: str, per: int = 1) -> Family:
    return lambda view: [({}, _figure(view, path, per=per))]


def _host(path: str, per: int = 1) -> Family:
    return _at("machine.host." + path, per)


def _age(path: str) -> Family:
    def samples(view: MetricsView) -> Samples:
        then_s = _figure(view, path)
        return [({}, None if then_s is None else max(0.0, view.at_s - then_s))]
    return samples


def _outcomes(ok: str, failed: str) -> Family:
    return lambda view: [({"outcome": outcome}, count) for outcome, count in (
        ("ok", getattr(view.snapshot, ok)), *getattr(view.snapshot, failed)._asdict().items())
        ] if view.process else []


def _all_gpus(value: Callable[[GpuSample], Any]) -> Family:
    return lambda view: [({}, value(view.machine.gpus))] if view.machine else []


def shown_gpus(gpus: Sequence[Gpu]) -> List[Gpu]:
    """The first of each index, for no series may stand in a page twice; and not too many."""
    found: Dict[Tuple[str, int], Gpu] = {}
    for gpu in gpus:
        found.setdefault((gpu.vendor, gpu.index), gpu)
    return list(found.values())[:METRIC_GPUS_MAX]


def _labelled_gpus(view: MetricsView) -> List[Tuple[Dict[str, Any], Gpu]]:
    return [({"vendor": gpu.vendor, "index": gpu.index}, gpu)
            for gpu in shown_gpus(_figure(view, "machine.gpus.gpus") or ())]


def _each_gpu(value: Callable[[Gpu], Any]) -> Family:
    return lambda view: [(labels, value(gpu)) for labels, gpu in _labelled_gpus(view)]


def _gpu(path: str, times: int = 1, per: int = 1) -> Family:
    return _each_gpu(lambda gpu: _figure(gpu, path, times, per))


def _mig(value: Callable[[MigInstance], Any], *texts: str) -> Family:
    """texts: the fields that are labels."""
    return lambda view: [
        (dict(labels, mig=at, **{name: getattr(part, name) for name in texts}), value(part))
        for labels, gpu in _labelled_gpus(view)
        for at, part in enumerate(gpu.mig_instances[:METRIC_MIG_MAX])]


def _host_info(view: MetricsView) -> Samples:
    facts = view.facts
    return [({"os": facts.os_name, "kernel": facts.kernel, "architecture": facts.architecture,
              "cpu_model": facts.cpu_model, "container": facts.container,
              "wsl": "true" if facts.wsl else "false"}, 1)] if facts != HostFacts() else []


def _gpu_info(view: MetricsView) -> Samples:
    readings = _figure(view, "machine.gpus.readings") or ()
    driver = lambda gpu: next((reading.driver_version for reading in readings
                               if gpu in (reading.gpus or ())), "")
    return [(dict(labels, uuid=gpu.uuid, name=gpu.name, type=gpu_type(gpu.name), bus_id=gpu.bus_id,
                  driver=driver(gpu)), 1) for labels, gpu in _labelled_gpus(view)]


def _offered(value: Callable[[Gpu], Any]) -> Family:
    """0 for a GPU that is not offered; nothing where that is unknown."""
    def samples(view: MetricsView) -> Samples:
        offered = _figure(view, "machine.offered")
        return [] if offered is None else [
            (labels, gpu in offered and value(gpu)) for labels, gpu in _labelled_gpus(view)]
    return samples


def _power(view: MetricsView) -> Samples:
    energy = _figure(view, "machine.energy")
    return [({"component": "gpu", "basis": energy.gpu_basis}, energy.gpu_w),
            ({"component": "cpu", "basis": energy.cpu_basis}, energy.cpu_w)] if energy else []


def _energy(view: MetricsView) -> Samples:
    energy, samples = _figure(view, "machine.energy"), []
    for component in ("gpu", "cpu") if energy else ():
        joules = {basis: getattr(energy.total, f"{component}_{basis}_j")
                  for basis in ("measured", "estimated")}
        # Two zeros of a component that nobody can tell anything of are not zeros.
        if getattr(energy, component + "_basis") or any(joules.values()):
            samples += [({"component": component, "basis": basis}, joules[basis])
                        for basis in joules]
    return samples


# Name, help, samples.  "b9agent_" goes before every name but the process_ ones, which are the names
# of Prometheus' own clients.  What ends with _total is a counter, everything else a gauge.
def _engine(field: str) -> Family:
    """A figure of the engine's, labelled with its name; nothing where none was started."""
    return lambda view: [({"engine": view.engine.name}, getattr(view.engine, field))
                         ] if view.engine.name else []


METRIC_FAMILIES = tuple((name if name.startswith("process_") else "b9agent_" + name, text, samples)
                        for name, text, samples in (
    ("build_info", "Version of b9agent.", lambda view: [({"version": view.version}, 1)]),
    ("machine_info", "Id and pool of this machine.", lambda view: [
        ({"machine_id": view.identity.machine_id, "pool": view.identity.pool_name}, 1)
    ] if view.identity else []),
    ("membership_state", "1 for the state of the membership, 0 for the others.", lambda view: [
        ({"state": state.value}, state is view.snapshot.state) for state in State]),
    ("keepalive_age_seconds", "Time since the gateway last accepted a keepalive.",
     _age("snapshot.last_ready_s")),
    ("keepalive_duration_seconds", "Time that the last keepalive request took.",
     _at("keepalive_took_s")),
    ("keepalives_total", "Keepalives sent, by outcome.",
     _outcomes("keepalives", "failed_keepalives")),
    ("registrations_total", "Registrations sent, by outcome.",
     _outcomes("registrations", "failed_registrations")),
    ("gateway_clock_offset_seconds", "Our clock less the gateway's.", _at("clock_offset_s")),
    ("sample_age_seconds", "Age of the figures of host and GPUs.", _age("machine.taken_s")),
    ("capacity_cpu_cores", "CPU cores on offer.", _at("capacity.cpu_millicores", 1000)),
    ("capacity_memory_bytes", "Memory on offer.", _at("capacity.memory_bytes")),

    ("tunnel_state", "1 for the state of the SSH tunnel, 0 for the others.", lambda view: [
        ({"state": state}, state == view.tunnel_state)
        for state in ("stopped", "starting", "running", "backoff")] if view.tunnel_state else []),
    ("tailnet_up", "1 where this machine has a tailnet address, 0 where Tailscale gives none.",
     lambda view: [({}, view.tailnet_state == "up")] if view.tailnet_state else []),
    ("pods_watch_state", "1 for the state of the watch on worker pods, 0 for the others.",
     lambda view: [({"state": state}, state == view.pods_state)
                   for state in ("off", "connecting", "watching", "failed")]
     if view.pods_state else []),
    ("worker_pods", "Pods on this machine's k3s in which the gateway's work is done, by status.",
     lambda view: [({"status": status}, view.pods.get(status, 0)) for status in
                   ("PENDING", "RUNNING", "COMPLETED", "FAILED")] if view.pods is not None else []),

    ("inference_state", "1 for the state of the engine, 0 for the others.", lambda view: [
        ({"state": state}, state == view.engine.state)
        for state in ("stopped", "starting", "running", "error")] if view.engine.state else []),
    ("inference_starts_total", "Starts of the engine since it was asked for.", _engine("starts")),
    ("inference_uptime_seconds", "Time since the engine was asked for.", _engine("uptime_s")),
    ("inference_models", "Models that the engine serves.", _engine("models")),

    ("host_info", "System and processor of this machine.", _host_info),
    ("host_cpu_cores", "CPU cores, without SMT.", _at("facts.cpu_cores")),
    ("host_cpu_threads", "CPU threads that the system schedules on.", _at("facts.cpu_threads")),
    ("host_cpu_utilization_ratio", "Busy share of the CPU, within limits.", _host("cpu_pct", 100)),
    ("host_memory_size_bytes", "Memory, within limits.", _host("memory_total_bytes")),
    ("host_memory_used_bytes", "Memory that is not available.", _host("memory_used_bytes")),
    ("host_swap_size_bytes", "Swap space.", _host("swap_total_bytes")),
    ("host_swap_used_bytes", "Swap space in use.", _host("swap_used_bytes")),
    ("host_disk_size_bytes", "File system of the state folder.", _host("disk_total_bytes")),
    ("host_disk_free_bytes", "Space on it for ordinary users.", _host("disk_free_bytes")),
    ("host_disk_read_bytes_total", "Bytes read from disks.", _host("disk_read_bytes")),
    ("host_disk_written_bytes_total", "Bytes written to disks.", _host("disk_written_bytes")),
    ("host_network_received_bytes_total", "Bytes received from the network.",
     _host("net_received_bytes")),
    ("host_network_sent_bytes_total", "Bytes sent to the network.", _host("net_sent_bytes")),
    ("host_load1", "Load average of 1 minute.", _host("load_1m")),
    ("host_load5", "Load average of 5 minutes.", _host("load_5m")),
    ("host_load15", "Load average of 15 minutes.", _host("load_15m")),
    ("host_uptime_seconds", "Time since boot.", _host("uptime_s")),

    ("gpus_known", "0 where the driver does not answer, 1 elsewhere.", _at("machine.gpus.known")),
    ("gpus", "GPUs in this machine.",
     _all_gpus(lambda sample: len(sample.gpus) if sample.known else None)),
    ("gpus_omitted", "GPUs past those that these metrics name.",
     _all_gpus(lambda sample: len(sample.gpus) - len(shown_gpus(sample.gpus)))),
    ("gpu_problems", "Problems of GPUs and their drivers.",
     _all_gpus(lambda sample: len(sample.problems))),
    ("gpu_info", "Identity of a GPU.", _gpu_info),
    ("gpu_healthy", "0 for a GPU that must not be used.", _each_gpu(lambda gpu: not gpu.problem)),
    ("gpu_offered", "1 for a GPU that the gateway is told of.", _offered(lambda gpu: True)),
    ("gpu_free", "1 for a GPU that is counted as free for work.", _offered(is_free)),
    ("gpu_stale", "1 where the figures are old: no answer from the driver.", _gpu("stale")),
    ("gpu_asleep", "1 for a GPU that is powered down.", _gpu("asleep")),
    ("gpu_memory_size_bytes", "Memory of a GPU.", _gpu("memory_total_bytes")),
    ("gpu_memory_used_bytes", "Memory of a GPU in use.", _gpu("memory_used_bytes")),
    ("gpu_utilization_ratio", "Busy share of a GPU's time.", _gpu("utilization_pct", per=100)),
    ("gpu_temperature_celsius", "Temperature of a GPU.", _gpu("temperature_c")),
    ("gpu_power_watts", "Power that a GPU draws.", _gpu("power_w")),
    ("gpu_power_limit_watts", "Power that a GPU may draw.", _gpu("power_limit_w")),
    ("gpu_energy_joules_total", "Energy counter of the driver.", _gpu("energy_j")),
    ("gpu_fan_ratio", "Fan speed, as a share of the highest.", _gpu("fan_pct", per=100)),
    ("gpu_graphics_clock_hertz", "Clock of a GPU.", _gpu("graphics_clock_mhz", times=10**6)),
    ("gpu_memory_clock_hertz", "Clock of a GPU's memory.", _gpu("memory_clock_mhz", times=10**6)),
    ("gpu_ecc_errors_total", "Memory errors that the driver counted.", _gpu("ecc_errors")),
    ("gpu_processes", "Processes that compute on a GPU.",
     _each_gpu(lambda gpu: None if gpu.processes is None else len(gpu.processes))),
    ("gpu_mig_enabled", "1 for a GPU that is cut into instances.", _gpu("mig_enabled")),
    ("gpu_mig_info", "Identity of a MIG instance.", _mig(lambda part: 1, "uuid", "name")),
    ("gpu_mig_memory_size_bytes", "Memory of a MIG instance.",
     _mig(lambda part: part.memory_total_bytes)),
    ("gpu_mig_memory_used_bytes", "Memory of a MIG instance in use.",
     _mig(lambda part: part.memory_used_bytes)),

    ("power_watts", "Power drawn, by component.", _power),
    ("energy_joules_total", "Energy used since the state folder was made.", _energy),
    ("co2e_grams_total", "Emissions of that energy, PUE included.", lambda view: [
        ({"method": "location"}, _figure(view, "machine.energy.total.co2e_g")),
        ({"method": "market"}, _figure(view, "machine.energy.total.market_co2e_g"))]),
    ("grid_co2e_grams_per_kwh", "Emissions of the grid's electricity.", _at("grid_g_per_kwh")),
    ("pue_ratio", "Power usage effectiveness of the site.", _at("pue")),

    ("process_cpu_seconds_total", "CPU time of the agent.", _at("process.cpu_s")),
    ("process_resident_memory_bytes", "Memory of the agent.", _at("process.resident_bytes")),
    ("process_open_fds", "Open file descriptors of the agent.", _at("process.open_fds")),
    ("process_threads", "Threads of the agent.", _at("process.threads")),
    ("process_start_time_seconds", "When the agent started.", _at("process.started_wall_s")),
))


def _label_text(labels: Dict[str, Any]) -> str:
    def quoted(value: Any) -> str:
        shown = printable(str(value))[:METRIC_LABEL_MAX]
        return '"' + shown.replace("\\", "\\\\").replace('"', '\\"') + '"'
    words = [f"{name}={quoted(value)}" for name, value in labels.items()]
    return "{" + ",".join(words) + "}" if words else ""


def _is_number(value: Optional[float]) -> bool:
    return value is not None and -float("inf") < value < float("inf")


def render_metrics(view: MetricsView) -> str:
    """The page.  A family of which nothing is known is left out whole."""
    lines: List[str] = []
    for name, text, samples in METRIC_FAMILIES:
        rows = [f"{name}{_label_text(labels)} {int(value) if isinstance(value, bool) else value}"
                for labels, value in samples(view) if _is_number(value)]
        if rows:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *rows]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------
# 13a. Dialects                                                no effects
# ----------------------------------------------------------------------
# What a client asks in Ollama's, OpenAI's or Anthropic's words is checked
# field by field, and a body is written anew from what was checked: an engine
# never sees a client's bytes.  What it answers is counted as it passes, and
# turned into the client's dialect where the engine speaks another one.
# Source: the APIs of OpenAI and Anthropic, and the servers of Ollama 0.33,
# vLLM 0.33, SGLang 0.5, llama.cpp b10488 and mlx-lm 0.32.

IMAGE_TOKENS = 2048      # of a picture, at the most that a model in use here makes of one
MESSAGE_TOKENS = 16      # what a chat template writes around a message
TEMPLATE_TOKENS = 512    # what it writes by itself
CHOICES_MAX = 16         # answers to one request
STREAM_LINE_MAX_BYTES = 4 << 20  # Ollama's last line may hold a context of 262,144 numbers

_PLACES = {"C": "openai/chat", "T": "openai/complete", "E": "openai/embed",
           "R": "openai/responses", "M": "openai/message", "A": "anthropic/messages",
           "B": "anthropic/message", "c": "ollama/chat", "g": "ollama/complete",
           "e": "ollama/embed", "o": "ollama/options", "m": "ollama/message"}
_KINDS = {"string": str, "integer": int, "number": float, "boolean": bool, "object": dict,
          "list": list}
# Where, what is done, and names with the first letters of the kinds of their values (none: any).
# "send": as it is, or in the engine's dialect.  "own": read, and written by the door.  "drop":
# taken, and left out.  Any other word is why it is refused, unless it is false.  What has no row
# is refused.
_TAKEN = ("send", "own")
_FIELDS = (
    ("CTERAcge", "own", "model:s"),  # the engine gets its own name of it
    ("CTRAcg", "own", "stream:b"),
    ("CT", "own", "max_tokens:i max_completion_tokens:i stream_options:o"),
    ("CT", "send", "temperature:n top_p:n frequency_penalty:n presence_penalty:n min_p:n n:i"
     " top_k:i typical_p:n repetition_penalty:n repeat_penalty:n repeat_last_n:i length_penalty:n"
     " seed:i xtc_probability:n xtc_threshold:n repetition_context_size:i min_tokens:i stop:sl"
     " logit_bias:o thinking_token_budget:i truncate_prompt_tokens:i stop_token_ids:l"
     " allowed_token_ids:l bad_words:l ignore_eos:b skip_special_tokens:b"
     " spaces_between_special_tokens:b include_stop_str_in_output:b add_special_tokens:b"
     " response_format:o structured_outputs:o guided_json:o guided_regex:s guided_grammar:s"
     " guided_choice:l cache_salt:s"),
    ("CT", "its work is not counted", "best_of use_beam_search prompt_logprobs"),
    ("CT", "it reaches into the machine, or to other requests", "adapters draft_model lora"
     " lora_path num_draft_tokens chat_template mm_processor_kwargs media_io_kwargs prompt_embeds"
     " id_slot kv_transfer_params ec_transfer_params vllm_xargs priority request_id"),
    ("CTER", "drop", "user metadata store service_tier safety_identifier prompt_cache_key"
     " moderation prompt_cache_retention"
     " prompt_cache_options"),  # nothing is kept here, and nobody is told
    ("C", "send", "messages:l tools:l documents:l reasoning_effort:s verbosity:s reasoning:o"
     " chat_template_kwargs:o logprobs:b parallel_tool_calls:b add_generation_prompt:b"
     " continue_final_message:b include_reasoning:b separate_reasoning:b tool_choice:so"
     " top_logprobs:i"),
    ("C", "drop", "prediction modalities"),  # hints
    ("C", "use `tools`", "functions function_call"),
    ("C", "nothing is searched or spoken here", "audio web_search_options"),
    ("T", "send", "prompt:sl suffix:s echo:b logprobs:i"),
    ("E", "send", "input:sl encoding_format:s dimensions:i truncate_prompt_tokens:i"),
    ("R", "send", "input:sl instructions:s truncation:s tools:l include:l reasoning:o text:o"
     " tool_choice:so temperature:n top_p:n top_logprobs:i parallel_tool_calls:b"),
    ("R", "own", "max_output_tokens:i"),
    ("R", "drop", "stream_options max_tool_calls"),
    ("R", "no answer is kept here, so send the whole conversation", "previous_response_id prompt"
     " conversation background context_management"),
    ("A", "send", "messages:l tools:l stop_sequences:l system:sl temperature:n top_p:n top_k:i"
     " tool_choice:o thinking:o"),
    ("A", "own", "max_tokens:i"),
    ("A", "drop", "metadata service_tier context_management output_config cache_control"),
    ("A", "it reaches other machines", "mcp_servers container"),
    ("c", "send", "messages:l tools:l"),
    ("g", "send", "prompt:s suffix:s system:s template:s images:l context:l raw:b"),
    ("cg", "send", "format:so think:sb logprobs:b top_logprobs:i truncate:b"),
    ("cg", "of no use to a client", "_debug_render_only"),
    ("e", "send", "input:sl prompt:s dimensions:i truncate:b"),
    ("cge", "own", "options:o"),
    ("cge", "drop", "keep_alive shift"),  # the agent loads and unloads; it would reload the model
    ("o", "send", "temperature:n seed:n top_k:n top_p:n min_p:n typical_p:n tfs_z:n repeat_last_n:n"
     " repeat_penalty:n presence_penalty:n frequency_penalty:n num_keep:n mirostat:n mirostat_tau:n"
     " mirostat_eta:n stop:sl penalize_newline:b"),
    ("o", "own", "num_predict:i num_ctx:i"),
    ("o", "drop", "num_batch num_gpu main_gpu use_mmap num_thread draft_num_predict shift use_mlock"
     " numa low_vram f16_kv logits_all vocab_only embedding_only"),  # they would reload the model
    ("MBm", "send", "role:s content:sl"),
    ("Mm", "send", "tool_calls:l tool_call_id:s"),
    ("M", "send", "name:s reasoning:s reasoning_content:s"),
    ("M", "use `tool_calls`", "function_call"),
    ("M", "drop", "refusal annotations audio"),  # of an answer that came before
    ("m", "send", "thinking:s tool_name:s images:l"),
)
# The parts of a message, and what each may have.  What would make the engine fetch an address, open
# a file or load a tensor is not among them.
_PARTS = {
    "text": "text citations", "input_text": "text", "output_text": "text annotations logprobs",
    "refusal": "refusal", "thinking": "thinking signature", "redacted_thinking": "data",
    "reasoning": "summary content id status encrypted_content", "image_url": "image_url",
    "input_image": "image_url detail", "image": "source", "input_audio": "input_audio",
    "tool_use": "id name input", "tool_result": "tool_use_id content is_error",
    "function_call": "call_id name arguments id status",
    "function_call_output": "call_id output id status", "message": "role content id status phase"}


class Ask(NamedTuple):
    """A request that was checked.  body: what is sent of it, without what the door writes.
    prompt_tokens: an upper bound.  output_tokens: asked for, of all answers together."""
    dialect: str
    task: str
    model: str
    stream: bool
    body: Dict[str, Any]
    prompt_tokens: int
    output_tokens: Optional[int]
    context_tokens: Optional[int]
    wants_usage: bool


class Wire(NamedTuple):
    """What the engine is asked, in its dialect.  path "": nothing, and body is the answer."""
    path: str
    body: bytes
    dialect: str
    task: str


# -- what a client asks ------------------------------------------------

def _within(value: Any, *names: Any) -> Dict[str, Any]:
    """The object within objects and lists; an empty one where there is none.

    >>> _within({"a": [{"b": {"c": 1}}]}, "a", 0, "b"), _within({"a": []}, "a", 0)
    ({'c': 1}, {})
    """
    for name in names:
        if type(value) is list and type(name) is int:
            value = value[name] if name < len(value) else None
        else:
            value = value.get(name) if type(value) is dict else None
    return value if type(value) is dict else {}


def _list(value: Dict[str, Any], name: str) -> List[Any]:
    return value[name] if type(value.get(name)) is list else []


def _bad(what: str, hint: str = "", code: str = "bad_field") -> HttpError:
    return HttpError(400, code, what, hint)


@functools.lru_cache(maxsize=16)
def _fields_of(place: str) -> Dict[str, Tuple[Tuple[type, ...], str]]:
    """{name: (types, what is done)} in a place, such as "openai/chat"."""
    found = {}
    for letters, what, names in _FIELDS:
        if any(_PLACES[letter] == place for letter in letters):
            for name, _, kinds in (word.partition(":") for word in names.split()):
                found[name] = tuple(type_ for kind, type_ in _KINDS.items() if kind[0] in
                                    kinds.replace("n", "ni")), what
    return found


def _checked(place: str, given: Any, where: str = "") -> Dict[str, Any]:
    """What is taken of an object's fields; null is absent.  Raises: HttpError."""
    if type(given) is not dict:
        raise _bad(f"`{where.rstrip('.') or 'the body'}` must be an object")
    fields, kept = _fields_of(place), {}
    for name, value in given.items():
        types, what = fields.get(name, ((), ""))
        if what == "drop" or what and (value is None or value is False and what not in _TAKEN):
            continue
        if what not in _TAKEN:
            like = {known.casefold(): known for known in fields}.get(name.casefold(), name)
            raise _bad(f"`{where}{printable(name[:64])}` is not taken here: "
                       + (what or "there is no such field"),
                       f"It is spelled `{like}`" if like != name else "Leave it out",
                       "unknown_field")
        if type(value) not in types:
            if not (int in types and type(value) is float and value.is_integer()):
                raise _bad(f"`{where}{name}` must be of type " + " or ".join(
                    kind for kind, type_ in _KINDS.items() if type_ in types))
            value = int(value)  # 1.0 is an integer
        kept[name] = value
    return kept


def _weight(value: Any) -> int:
    """An upper bound of the tokens of what a template writes: no tokenizer makes more of a text
    than it has bytes."""
    if type(value) is str:
        return len(value) if value.isascii() else len(value.encode("utf-8"))
    if type(value) is dict:
        return sum(_weight(name) + 4 + _weight(item) for name, item in value.items())
    return sum(map(_weight, value)) if type(value) is list else 32


def _picture(url: Any) -> str:
    """The base64 of a data: URL.  Raises: HttpError for an address, which an engine would fetch."""
    url = url.get("url") if type(url) is dict else url
    head, comma, data = url.partition(",") if type(url) is str else ("", "", "")
    if not (comma and re.fullmatch("data:[a-z0-9./+-]{0,64};base64", head)):
        raise _bad("a picture must be data:image/png;base64,...: nothing is fetched from elsewhere")
    return data


def _content_weight(content: Any, where: str) -> int:
    """The bound of a message's content, each part of which is checked.  Raises: HttpError."""
    if type(content) is not list:
        return _weight(content)
    total = 0
    for part in content:
        kind = str(_within(part).get("type", "message" if where == "input" else None))
        extra = _within(part).keys() - {"type", "cache_control", *_PARTS.get(kind, "").split()}
        if not _within(part) or kind not in _PARTS or extra or \
                (kind == "message") > (where == "input"):
            raise _bad(f"`{where}` has a part that is not taken here: "
                       + printable(f"{kind} {min(extra, default='')}"[:64]), "Text is, and "
                       "pictures as data: URLs, calls of tools and their results")
        total += MESSAGE_TOKENS
        if kind in ("image_url", "input_image"):
            _picture(part.get("image_url"))
            total += IMAGE_TOKENS
        elif kind == "image":
            source = _within(part, "source")
            if source.get("type") != "base64" or source.keys() - {"type", "media_type", "data"}:
                raise _bad(f"a picture in `{where}` must have a source of type base64")
            total += IMAGE_TOKENS
        elif kind == "input_audio":  # at most 50 tokens a second, of two kilobytes at least
            total += IMAGE_TOKENS + _weight(part) // 32
        elif kind in ("message", "tool_result", "function_call_output"):
            total += _content_weight(part.get("output", part.get("content")), where + ".content")
        else:
            total += _weight(part)
    return total


def _inputs(body: Dict[str, Any], name: str) -> List[Any]:
    """Texts, or lists of tokens, as a list.  Raises: HttpError."""
    value = body.get(name)
    texts = value if type(value) is list and value and type(value[0]) is not int else [value]
    for text in texts:
        if not (type(text) is str or type(text) is list and {type(each) for each in text} == {int}):
            raise _bad(f"`{name}` must be a text, or a list of texts or of tokens")
    return texts


def _chat_weight(dialect: str, messages: List[Any]) -> int:
    """The bound of a conversation; messages are replaced by checked ones.  Raises: HttpError."""
    total = 0
    for number, given in enumerate(messages):
        where = f"messages[{number}]."
        messages[number] = message = _checked(dialect + "/message", given, where)
        content = message.get("content")
        if not message.get("role"):
            raise _bad(f"`{where}role` is missing", code="missing_field")
        for part in _list(message, "content"):
            if type(_within(part).get("image_url")) is str:
                part["image_url"] = {"url": part["image_url"]}
        total += MESSAGE_TOKENS + _content_weight(content, where + "content")
        total += len(message.get("images", ())) * IMAGE_TOKENS
        total += _weight({name: value for name, value in message.items()
                          if name not in ("role", "content", "images")})
    return total


def _prompt_weight(dialect: str, task: str, body: Dict[str, Any]) -> int:
    """An upper bound of the prompt's tokens.  Raises: HttpError for parts that are not taken."""
    name = {"chat": "messages", "messages": "messages", "complete": "prompt"}.get(
        task, "prompt" if "prompt" in body else "input")
    if not body.get(name) and dialect != "ollama":
        raise _bad(f"`{name}` is missing", code="missing_field")
    if {"chat_template", "tokenize"} & body.get("chat_template_kwargs", {}).keys():
        raise _bad("`chat_template_kwargs` may not replace the template")
    for tool in body.get("tools", ()):  # others the engine itself would use
        if not _within(tool) or tool.get("type", "function") not in ("function", "custom"):
            raise _bad("`tools` may hold the client's own functions alone")
    total = TEMPLATE_TOKENS + len(body.get("images", ())) * IMAGE_TOKENS + sum(
        MESSAGE_TOKENS + _weight(value) for key, value in body.items()
        if key not in (name, "images", "options", "system") and type(value) in (str, list, dict))
    total += _content_weight(body.get("system", ""), "system")
    if name == "messages":
        return total + _chat_weight(dialect, body.setdefault("messages", []))
    if task == "responses":
        return total + _content_weight(body[name], name)
    return total + sum(MESSAGE_TOKENS + (_weight(text) if type(text) is str else len(text))
                       for text in _inputs(body, name) if body.get(name))


def _limit(fields: Dict[str, Any], *names: str) -> Optional[int]:
    """The first of these that a request has; it loses them all.  Raises: HttpError."""
    found = [(name, fields.pop(name)) for name in names if name in fields]
    if found and found[0][1] < 1:
        raise _bad(f"`{found[0][0]}` must be at least 1")
    return found[0][1] if found else None


def _choices(ask: Ask) -> int:
    """How many answers are asked for.  Raises: HttpError."""
    if ask.dialect != "openai" or ask.task not in ("chat", "complete"):
        return 1
    wanted = ask.body.get("n", 1)
    total = wanted * (len(_inputs(ask.body, "prompt")) if ask.task == "complete" else 1)
    if not 1 <= wanted <= total <= CHOICES_MAX:
        raise _bad(f"`n` must be from 1 to {CHOICES_MAX}, of all prompts together")
    return total


def _only_loads(body: Dict[str, Any]) -> bool:
    """Whether a request in Ollama's words asks for nothing but that the model be loaded."""
    return not (body.get("messages") or body.get("prompt") or body.get("input"))


def read_ask(dialect: str, task: str, raw: bytes) -> Ask:
    """A client's request, checked field by field.  POST /api/embeddings is an "embed" with a
    `prompt`.  Raises: HttpError 400 with the field and the mend, 403 for one that unloads."""
    try:
        given = decode_json(raw)
    except (ValueError, RecursionError) as error:
        raise _bad("the body is not strict JSON: " + printable(str(error)[:200]),
                   code="bad_json") from error
    body = _checked(dialect + "/" + task, given)
    model = body.pop("model", "")
    if not model.strip() or len(model) > 512:
        raise _bad("`model` is missing, or longer than 512", "GET /v1/models lists those here",
                   "missing_field")
    wants_usage = body.pop("stream_options", {}).get("include_usage") is True
    stream = body.pop("stream", dialect == "ollama" and task != "embed")
    limits = _checked("ollama/options", body.pop("options", {}), "options.")
    if limits.get("num_predict") in (-1, -2):  # without an end; the door sets one
        del limits["num_predict"]
    context = _limit(limits, "num_ctx")
    output = _limit(limits, "num_predict") or _limit(
        body, "max_completion_tokens", "max_tokens", "max_output_tokens")
    if limits:
        body["options"] = limits
    ask = Ask(dialect, task, model, stream, body, _prompt_weight(dialect, task, body),
              0 if task == "embed" else output, context, wants_usage)
    choices = _choices(ask)
    if task == "messages" and not output:
        raise _bad("`max_tokens` is missing", code="missing_field")
    if dialect == "ollama" and _only_loads(body) and re.fullmatch(
            "0[.0]*[a-z]*", str(given.get("keep_alive"))):
        raise HttpError(403, "unload_refused", "models are unloaded by the agent alone",
                        "On the machine: b9agent.py stop")
    return ask._replace(output_tokens=output * choices) if output else ask


# -- what an engine is asked -------------------------------------------

# Of Ollama's options, and what OpenAI's engines call them.  Its other ones only Ollama knows.
_OPTIONS = {"repeat_penalty": "repetition_penalty", **{name: name for name in (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "stop", "presence_penalty",
    "frequency_penalty", "repeat_last_n")}}


def _call(call: Any) -> Tuple[str, str, Dict[str, Any]]:
    """A call of a tool, in either dialect, as (id, name, arguments).  Raises: HttpError."""
    function = call.get("function") if type(call) is dict else None
    arguments = function.get("arguments") if type(function) is dict else None
    if type(arguments) is str:
        try:
            arguments = decode_json(arguments.encode("utf-8", "replace") or b"{}")
        except ValueError:
            arguments = None
    if type(arguments) is not dict or type(function.get("name")) is not str:
        raise _bad("a call of a tool must have a name, and a JSON object of arguments")
    return str(call.get("id") or ""), function["name"], arguments


def _ollama_messages(messages: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """OpenAI's messages as Ollama has them.  Raises: HttpError."""
    turned, names = [], {}
    for message in messages:
        content, images = message.get("content", ""), []
        if type(content) is list:
            images = [_picture(part["image_url"]) for part in content
                      if part["type"] == "image_url"]
            texts = [str(part.get(part["type"])) for part in content
                     if part["type"] in ("text", "refusal")]
            if len(images) + len(texts) < len(content):
                raise _bad("Ollama takes text and pictures alone")
            content = "\n".join(texts)
        calls = [_call(call) for call in message.get("tool_calls", ())]
        names.update({mark: name for mark, name, _ in calls})
        called = message.get("tool_call_id", "")
        more = {"images": images, "tool_call_id": called, "tool_calls": [
            {"id": mark, "function": {"name": name, "arguments": arguments}}
            for mark, name, arguments in calls],
            "thinking": message.get("reasoning") or message.get("reasoning_content"),
            "tool_name": names.get(called) or message["role"] == "tool" and message.get("name")}
        new = {"role": message["role"].replace("developer", "system"), "content": content}
        turned.append(dict(new, **{key: said for key, said in more.items() if said}))
    return turned


def _to_ollama(ask: Ask, each: int) -> Tuple[str, Dict[str, Any]]:
    """OpenAI's words in Ollama's, as Ollama's own /v1 does it, whose streams swallow errors."""
    body, options = ask.body, {"num_predict": each}
    if body.get("n", 1) != 1 or body.get("echo") or ask.task == "complete" and "logprobs" in body:
        raise _bad("Ollama has no `n` over 1, and no `echo` and `logprobs` of a completion")
    options.update({native: body[name] for native, name in _OPTIONS.items() if name in body})
    if type(options.get("stop")) is str:
        options["stop"] = [options["stop"]]
    form = body.get("response_format", {})
    schema = form.get("json_schema")
    if form.get("type", "text") not in ("text", "json_object", "json_schema"):
        raise _bad("`response_format` must be of type text, json_object or json_schema")
    effort = body.get("reasoning_effort", body.get("reasoning", {}).get("effort"))
    think = {"none": False, "minimal": "low", "xhigh": "max"}.get(str(effort), effort)
    found = {"options": options, "think": think, "format": schema.get("schema")
             if type(schema) is dict else "json" if form.get("type") == "json_object" else None}
    if ask.task == "complete":
        texts = _inputs(body, "prompt")
        if len(texts) > 1 or type(texts[0]) is not str:
            raise _bad("`prompt` must be one text: Ollama takes no tokens, and one at a time")
        return "/api/generate", dict(found, prompt=texts[0], suffix=body.get("suffix"))
    tools = None if body.get("tool_choice") == "none" else body.get("tools")
    return "/api/chat", dict(found, messages=_ollama_messages(body["messages"]), tools=tools,
                             logprobs=body.get("logprobs"), top_logprobs=body.get("top_logprobs"))


def _openai_messages(messages: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Ollama's messages as OpenAI has them: calls get marks, by which their results are known."""
    turned, waiting = [], []
    for number, message in enumerate(messages):
        new = {"role": message["role"], "content": message.get("content", "")}
        if message.get("images"):
            new["content"] = [{"type": "text", "text": new["content"]}] + [
                {"type": "image_url", "image_url": {"url": "data:image/%s;base64,%s" % (
                    {"/9j/": "jpeg", "R0lG": "gif", "UklG": "webp"}.get(image[:4], "png"), image)}}
                for image in map(str, message["images"])]
        if message.get("thinking"):
            new["reasoning_content"] = message["thinking"]
        calls = [_call(call) for call in message.get("tool_calls", ())]
        calls = [(mark or f"call_{number}_{index}", name, arguments)
                 for index, (mark, name, arguments) in enumerate(calls)]
        if calls:
            new["tool_calls"] = [{"id": mark, "type": "function", "function": {
                "name": name, "arguments": json.dumps(arguments)}}
                for mark, name, arguments in calls]
        waiting += [(mark, name) for mark, name, _ in calls]
        if message["role"] == "tool":
            found = [pair for pair in waiting if message.get("tool_call_id") == pair[0]] or [
                pair for pair in waiting if message.get("tool_name", pair[1]) == pair[1]]
            new["tool_call_id"] = found[0][0] if found else f"call_{number}"
            waiting = [pair for pair in waiting if pair not in found[:1]]
        turned.append(new)
    return turned


def _from_ollama(ask: Ask, each: int) -> Tuple[str, Dict[str, Any]]:
    """Ollama's words in OpenAI's.  Raises: HttpError."""
    body, form, think = ask.body, ask.body.get("format"), ask.body.get("think")
    found = {_OPTIONS[name]: value for name, value in body.get("options", {}).items()
             if name in _OPTIONS}
    found.update(max_tokens=each, logprobs=body.get("logprobs"), tools=body.get("tools") or None,
                 top_logprobs=body.get("top_logprobs"))
    if form:
        found["response_format"] = {"type": "json_object"} if type(form) is str else {
            "type": "json_schema", "json_schema": {"name": "answer", "schema": form}}
    if type(think) is bool:
        found["chat_template_kwargs"] = {"enable_thinking": think}
    elif think:
        found["reasoning_effort"] = think
    if ask.task == "chat":
        return "/v1/chat/completions", dict(found, messages=_openai_messages(body["messages"]))
    for name in ("suffix", "template", "context"):
        if body.get(name):
            raise _bad(f"`{name}` is known to Ollama alone, and another engine runs here")
    if body.get("raw"):
        return "/v1/completions", dict(found, prompt=body["prompt"], logprobs=None)
    said = [{"role": "system", "content": body["system"]}] if body.get("system") else []
    said.append({"role": "user", "content": body["prompt"], "images": body.get("images")})
    return "/v1/chat/completions", dict(found, messages=_openai_messages(said))


def _same_dialect(ask: Ask, each: int) -> Tuple[str, Dict[str, Any]]:
    """A request to an engine that speaks its dialect."""
    if ask.dialect == "ollama":
        return "/api/chat" if ask.task == "chat" else "/api/generate", dict(
            ask.body, options=dict(ask.body.get("options", {}), num_predict=each))
    path, limit, more = {
        "chat": ("/v1/chat/completions", "max_tokens", {}),
        "complete": ("/v1/completions", "max_tokens", {}),
        "messages": ("/v1/messages", "max_tokens", {}),
        "responses": ("/v1/responses", "max_output_tokens", {"store": False})}[ask.task]
    if ask.stream and limit == "max_tokens" and ask.task != "messages":
        more = {"stream_options": {"include_usage": True}}
    return path, dict(ask.body, **{limit: each}, **more)


def _embed_request(ask: Ask, native: bool) -> Tuple[str, Dict[str, Any]]:
    """POST /api/embeddings, whose answer does not say what it counted, is asked as /api/embed."""
    name = "prompt" if "prompt" in ask.body else "input"
    if native == (ask.dialect == "ollama") and name == "input":
        return "/api/embed" if native else "/v1/embeddings", ask.body
    if native and any(type(text) is not str for text in _inputs(ask.body, name)):
        raise _bad("`input` must be text: Ollama takes no tokens",
                   "LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False)")
    body = {"input": ask.body.get(name, ""), "dimensions": ask.body.get("dimensions")}
    return ("/api/embed", body) if native else ("/v1/embeddings", dict(
        body, encoding_format="float"))


def engine_request(ask: Ask, engine: Engine, model: str, output_tokens: int,
                   context_tokens: int) -> Wire:
    """What the engine is asked.  model: as it knows it.  output_tokens: the most of all answers
    together.  context_tokens: the largest here.  Raises: HttpError 400, 404."""
    native, chat = engine.name == "ollama", ask.task in ("chat", "complete")
    each, task = output_tokens // _choices(ask), ask.task
    if (ask.context_tokens or 0) > context_tokens:
        raise _bad(f"`options.num_ctx` is {ask.context_tokens}, and the largest here is "
                   f"{context_tokens}", "Leave it out, or ask for less", "context_too_large")
    if each < 1 and task != "embed":
        raise _bad("fewer tokens are left than answers are asked for", "Ask for a smaller `n`")
    if ask.output_tokens is None and engine.name in ("vllm", "sglang"):
        # They refuse what may become longer than the context; and this limit was nobody's wish.
        each = min(each, max(context_tokens - ask.prompt_tokens, context_tokens // 8, 1))
    if engine.name == "mlx":
        model = "default_model"  # any other name it would look for, and load
        if not chat:
            raise HttpError(404, "not_found", f"{engine.title} has no such route")
    if ask.dialect == "ollama" and not native and _only_loads(ask.body):
        said = {"message": {"role": "assistant", "content": ""}} if task == "chat" else {
            "embeddings": []} if task == "embed" else {"response": ""}
        return Wire("", encode_json(dict({"model": ask.model, "created_at": utc_stamp()}, **said,
                                         done=True, done_reason="load")), "ollama", task)
    dialect = "ollama" if native else "openai"
    if task == "embed":
        path, body = _embed_request(ask, native)
    elif ask.dialect == dialect or not chat:
        (path, body), dialect = _same_dialect(ask, each), ask.dialect
    else:
        path, body = (_to_ollama if native else _from_ollama)(ask, each)
        task = "complete" if path in ("/v1/completions", "/api/generate") else "chat"
        if ask.stream and not native:
            body["stream_options"] = {"include_usage": True}
    if task != "embed":
        body = dict(body, stream=ask.stream)
    if engine.name == "llama-server" and "repetition_penalty" in body:
        body = dict(body, repeat_penalty=body["repetition_penalty"])
    return Wire(path, encode_json(dict({name: value for name, value in body.items()
                                        if value is not None}, model=model)), dialect, task)


# -- what an engine answers --------------------------------------------

_ERROR_TYPES = {401: "authentication_error", 402: "billing_error", 403: "permission_error",
                404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
                503: "overloaded_error"}


def error_answer(dialect: str, status: int, code: str, what: str,
                 numbers: Optional[Dict[str, Any]] = None) -> bytes:
    """The body of an error as a dialect has it.  numbers: of a limit, such as what is left."""
    details = {"details": numbers} if numbers else {}
    if dialect == "ollama":
        return encode_json(dict({"error": what, "code": code}, **details))
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    if dialect == "anthropic":
        return encode_json({"type": "error", "error": dict({"type": kind, "message": what},
                                                           **details)})
    return encode_json({"error": dict({"message": what, "type": kind, "param": None, "code": code},
                                      **details)})


def _said_error(value: Any, failed: bool = False) -> str:
    """The error in an engine's answer, in whichever form, as a client may read it: one line,
    without folders of this machine.  "" where there is none.  failed: there must be one."""
    error = value
    if type(value) is dict:
        error = value.get("error") or failed and value.get("detail")
        if type(error) is list:  # FastAPI's
            error = "; ".join(f"{item.get('loc')}: {item.get('msg')}" if type(item) is dict
                              else str(item) for item in error[:3])
        if type(error) is dict:
            error = error.get("message") or error.get("type") or "an error without words"
        if not error and (failed or "error" in (value.get("object"), value.get("type"))):
            error = value.get("message")
    line = " ".join(str(error or "")[:4000].split())
    line = re.sub(r"(?<![\w:/.])/(?:[^\s'\"/]+/)+", "…/", line)
    return printable(line[:400]) if not line.startswith("<") else "a page of HTML"


def _json_dict(raw: bytes) -> Optional[Dict[str, Any]]:
    """What an engine said, or None where it is no JSON object."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if type(value) is dict else None


class Usage:
    """What an answer took.  prompt_tokens, completion_tokens: the engine's own figures, or None.
    pieces: of its content that came.  load_s: of the model, where it is told.  error: why the
    answer is not whole, or ""."""

    __slots__ = ("prompt_tokens", "completion_tokens", "pieces", "load_s", "error")
    _NAMES = {"prompt_tokens": "prompt_tokens", "completion_tokens": "completion_tokens",
              "prompt_eval_count": "prompt_tokens", "eval_count": "completion_tokens",
              "input_tokens": "prompt_tokens", "output_tokens": "completion_tokens"}

    def __init__(self) -> None:
        self.prompt_tokens: Optional[int] = None
        self.completion_tokens: Optional[int] = None
        self.pieces, self.error = 0, ""
        self.load_s: Optional[float] = None

    def take(self, figures: Dict[str, Any]) -> None:
        """From any dialect's figures.  Ollama's last line leaves zeros out."""
        if figures.get("done") is True:
            figures = dict({"prompt_eval_count": 0, "eval_count": 0}, **figures)
        for name, value in figures.items():
            if type(value) is int and 0 <= value < 1 << 53:
                if name in self._NAMES:
                    setattr(self, self._NAMES[name], value)
                elif name == "load_duration":
                    self.load_s = value / 1e9

    def as_openai(self) -> Dict[str, int]:
        prompt, made = self.prompt_tokens or 0, self.completion_tokens
        made = self.pieces if made is None else made
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def as_ollama(self, total_ns: int, eval_ns: int) -> Dict[str, int]:
        figures = {"total_duration": total_ns, "prompt_eval_count": self.prompt_tokens,
                   "prompt_eval_duration": total_ns - eval_ns, "eval_duration": eval_ns,
                   "eval_count": self.as_openai()["completion_tokens"]}
        return {name: value for name, value in figures.items() if value}


def _openai_said(ask: Ask, value: Dict[str, Any], request_id: str, first: int) -> Dict[str, Any]:
    """What Ollama said, as a delta or a message of OpenAI's.  first: the number of its first call.
    """
    if ask.task != "chat":
        return {"text": value.get("response") or ""}
    message, calls = _within(value, "message"), []
    for number, call in enumerate(_list(message, "tool_calls"), first):
        function = _within(call, "function")
        calls.append({"index": number, "type": "function", "function": {
            "name": function.get("name"), "arguments": json.dumps(function.get("arguments") or {})},
            "id": _within(call).get("id") or f"call_{request_id}_{number}"})
    said = {"content": message.get("content"), "reasoning": message.get("thinking"),
            "tool_calls": calls}
    return {name: part for name, part in said.items() if part}


def _ollama_said(ask: Ask, choice: Dict[str, Any], said: Dict[str, Any],
                 calls: Sequence[Any] = ()) -> Dict[str, Any]:
    """What OpenAI's delta or message said, as a line of Ollama's has it.  Raises: HttpError."""
    more = {"thinking": said.get("reasoning") or said.get("reasoning_content"), "tool_calls": [
        {"id": mark, "function": {"name": name, "arguments": arguments}}
        for mark, name, arguments in map(_call, calls)]}
    more = {name: part for name, part in more.items() if part}
    text = said.get("content") or said.get("text") or ""
    line = {"message": dict({"role": "assistant", "content": text}, **more)} \
        if ask.task == "chat" else dict({"response": text}, **more)
    logprobs = choice.get("logprobs")
    return dict(line, logprobs=logprobs["content"]) if _within(logprobs).get("content") else line


def _openai_answer(ask: Ask, request_id: str, kind: str, choices: Sequence[Any]) -> Dict[str, Any]:
    chat = ask.task == "chat"
    return {"id": ("chatcmpl-" if chat else "cmpl-") + request_id,
            "object": "chat.completion" + kind if chat else "text_completion",
            "created": int(time.time()), "model": ask.model, "choices": choices}


def _reason(said: Any, calls: Any, called: str) -> str:
    """Why an answer ended: the same in both dialects, but after calls of tools."""
    return "length" if said == "length" else called if calls else "stop"


_NEVER = b"\0never"


class StreamFlow:
    """An engine's stream on its way to a client: each piece goes through feed(), and end() says the
    rest.  complete: the engine said that it was done.

    What most pieces are, one event with some text, is known by a mark in its bytes: the key before
    the text, which the last event that was read whole had.  A model cannot forge it, for quotes
    within its words are escaped.  Every other event is read whole."""

    content_type = "text/event-stream"
    _tail, _lines = b"\n\n", 2  # of one event; no lines: each is read whole

    def __init__(self, ask: Ask, request_id: str, clock: Callable[[], int]) -> None:
        self.ask, self.request_id, self.clock = ask, request_id, clock
        self.usage, self.complete, self.began_ns, self.first_ns = Usage(), False, clock(), 0
        self._mark, self._name, self._held, self._held_bytes = _NEVER, b"", [], 0
        self._new_name = b'"model":' + json.dumps(ask.model).encode()

    def feed(self, piece: bytes) -> bytes:
        """What goes to the client for this piece of the engine's body."""
        at = piece.find(self._mark)
        if at >= 0 and not self._held and piece.endswith(self._tail) \
                and piece.count(b"\n") == self._lines and b'_tokens"' not in piece \
                and piece[at + len(self._mark)] != 34:  # the quote that ends an empty text
            self.usage.pieces += 1
            return piece.replace(self._name, self._new_name, 1) if self._name else piece
        return self._read(piece)

    def _read(self, piece: bytes) -> bytes:
        *lines, rest = piece.split(b"\n")
        if lines:
            lines[0] = b"".join(self._held) + lines[0]
            self._held, self._held_bytes = [], 0
        self._held += [rest] if rest else []
        self._held_bytes += len(rest)
        out = [self._line(line.strip()) for line in lines]
        if self._held_bytes > STREAM_LINE_MAX_BYTES:
            self._held, self._held_bytes = [], 0
            out.append(self.fail("the engine sent a line without an end"))
        return b"".join(out)

    def _line(self, line: bytes) -> bytes:
        """An event of an engine ends with its one line of data."""
        if self.complete or self.usage.error or not line:
            return b""
        events = self._tail == StreamFlow._tail
        if events and not line.startswith((b"data:", b"error:", b"{")):
            return line + b"\n" if self.content_type == StreamFlow.content_type else b""
        data = line.partition(b":")[2].strip() if line[:1] != b"{" else line
        if data == b"[DONE]" and events:
            self.complete, self._mark = True, _NEVER
            return self._done()
        value = _json_dict(data)
        if value is None or _said_error(value):
            return self.fail(_said_error(value) or "the engine sent what is no JSON")
        return self._event(value, data)

    def _event(self, value: Dict[str, Any], data: bytes) -> bytes:
        raise NotImplementedError

    def _done(self) -> bytes:
        return b"data: [DONE]\n\n"

    def _piece(self, said: Dict[str, Any], keys: str, data: bytes) -> None:
        """Count an event with something under one of these keys; the next may be known by it."""
        for key in keys.split():
            if said.get(key):
                self.usage.pieces += 1
                marks = [form % key.encode() for form in (b'"%s":"', b'"%s": "')]
                self._mark = next((mark for mark in marks if mark in data), _NEVER)
                name = re.search(rb'"model": ?"[^"\\]*"', data)
                self._name = name.group() if name else b""
                return

    def _named(self, data: bytes) -> bytes:
        """An event with the model's name as the client spelled it."""
        return re.sub(rb'"model": ?"[^"\\]*"', lambda _: self._new_name, data, 1)

    def fail(self, problem: str) -> bytes:
        """The error that ends the stream, as the client's dialect has it."""
        self.usage.error, self._mark, task = problem, _NEVER, self.ask.task
        body = error_answer(self.ask.dialect, 502, "engine_failed", problem)
        if task == "responses":
            body = encode_json({"type": "error", "code": "engine_failed", "message": problem,
                                "param": None, "sequence_number": self.usage.pieces})
        if self.ask.dialect == "ollama":
            return body
        event = b"event: error\n" if task in ("responses", "messages") else b""
        return event + b"data: " + body + b"\n"

    def end(self, problem: str) -> bytes:
        """problem: "" where the engine's body ended as its framing says, or why it did not."""
        held = b"".join(self._held).rstrip()
        rest = self._read(b"\n") if held.endswith((b"}", b"]")) and not problem else b""
        if self.complete or self.usage.error:
            return rest
        return rest + self.fail(problem or "the engine's answer ended in the middle")


class _OpenAiFlow(StreamFlow):
    """From OpenAI's chat or completions to the same."""

    def _event(self, value: Dict[str, Any], data: bytes) -> bytes:
        self.usage.take(_within(value, "usage"))
        if not value.get("choices") and value.get("usage") and not self.ask.wants_usage:
            return b""
        for choice in _list(value, "choices"):
            delta = _within(choice, "delta") or _within(choice)
            self._piece(delta, "content text reasoning reasoning_content tool_calls", data)
        return b"data: " + self._named(data) + b"\n\n"


class _EventFlow(StreamFlow):
    """From Anthropic's messages, or OpenAI's responses, to the same."""

    _lines = 3

    def _event(self, value: Dict[str, Any], data: bytes) -> bytes:
        inner = _within(value, "message") or _within(value, "response")
        kind = str(value.get("type"))
        self.usage.take(_within(inner or value, "usage"))
        if kind == "message_start":  # its figure of what is made is none yet
            self.usage.completion_tokens = None
        if kind.endswith("delta"):
            self._piece(value if type(value.get("delta")) is str else _within(value, "delta"),
                        "delta text thinking partial_json", data)
        if kind == "response.failed":
            self.usage.error = _said_error(inner) or "the engine failed"
        self.complete = kind in ("message_stop", "response.completed", "response.incomplete")
        self._mark = _NEVER if self.complete or self.usage.error else self._mark
        return b"data: " + (self._named(data) if inner else data) + b"\n\n"


class _OllamaFlow(StreamFlow):
    """From Ollama's lines to the same."""

    content_type = "application/x-ndjson"
    _tail, _lines = b'"done":false}\n', 1

    def _event(self, value: Dict[str, Any], data: bytes) -> bytes:
        said = _within(value, "message") or value
        self._piece(said, "content response thinking tool_calls", data)
        if value.get("done") is True:
            self.usage.take(value)
            self.complete, self._mark = True, _NEVER
        return self._named(data) + b"\n"


class _OllamaToOpenAi(_OllamaFlow):
    """From Ollama's lines to OpenAI's chunks."""

    content_type, _lines = StreamFlow.content_type, 0
    _calls, _role = 0, {"role": "assistant"}

    def _chunk(self, choices: Any, **more: Any) -> bytes:
        return b"data: " + encode_json(dict(_openai_answer(
            self.ask, self.request_id, ".chunk", choices), **more)) + b"\n"

    def _event(self, value: Dict[str, Any], data: bytes) -> bytes:
        super()._event(value, data)
        said = _openai_said(self.ask, value, self.request_id, self._calls)
        self._calls += len(said.get("tool_calls", ()))
        out, chat = b"", self.ask.task == "chat"
        if any(said.values()) or not self.complete:
            choice = {"index": 0, "finish_reason": None, "logprobs": {
                "content": value["logprobs"]} if value.get("logprobs") else None}
            choice.update({"delta": dict(self._role, **said)} if chat else said)
            out, self._role = self._chunk([choice]), {}
        if self.complete:
            reason = _reason(value.get("done_reason"), self._calls, "tool_calls")
            out += self._chunk([dict({"delta": {}} if chat else {"text": ""}, index=0,
                                     finish_reason=reason)])
            out += self._chunk([], usage=self.usage.as_openai()) if self.ask.wants_usage else b""
            out += b"data: [DONE]\n\n"
        return out


class _OpenAiToOllama(StreamFlow):
    """From OpenAI's chunks to Ollama's lines."""

    content_type, _lines = _OllamaFlow.content_type, 0
    _reason: Any = None

    def __init__(self, ask: Ask, request_id: str, clock: Callable[[], int]) -> None:
        super().__init__(ask, request_id, clock)
        self._calls: Dict[Any, Dict[str, Any]] = {}
        self._head = {"model": ask.model, "created_at": utc_stamp()}

    def _event(self, value: Dict[str, Any], data: bytes) -> bytes:
        self.usage.take(_within(value, "usage"))
        choice = _within(value, "choices", 0)
        said = _within(choice, "delta") or choice
        self._reason = choice.get("finish_reason") or self._reason
        self._piece(said, "content text reasoning reasoning_content tool_calls", data)
        self.first_ns = self.first_ns or self.usage.pieces and self.clock()
        for part in _list(said, "tool_calls"):  # fragments, until the end
            call = self._calls.setdefault(str(_within(part).get("index"))[:9], {
                "id": _within(part).get("id"), "function": {"name": "", "arguments": ""}})
            for name, whole in call["function"].items():
                call["function"][name] = whole + str(_within(part, "function").get(name) or "")
        if not any(map(said.get, ("content", "text", "reasoning", "reasoning_content"))):
            return b""
        return encode_json(dict(self._head, **_ollama_said(self.ask, choice, said), done=False))

    def _done(self) -> bytes:
        try:
            line = dict(self._head, **_ollama_said(self.ask, {}, {}, self._calls.values()))
        except HttpError as error:
            self.complete = False
            return self.fail(error.what)
        called = encode_json(dict(line, done=False)) if self._calls else b""
        total_ns = self.clock() - self.began_ns
        return called + encode_json(dict(
            self._head, **_ollama_said(self.ask, {}, {}), done=True,
            done_reason=_reason(self._reason, 0, ""), **self.usage.as_ollama(
                total_ns, total_ns - (self.first_ns or self.began_ns) + self.began_ns)))


def make_flow(ask: Ask, wire: Wire, request_id: str,
              clock: Callable[[], int] = time.perf_counter_ns) -> StreamFlow:
    """For an answer in pieces.  clock: of nanoseconds, read now and at the end."""
    if wire.dialect == "ollama":
        kind: Any = _OllamaFlow if ask.dialect == "ollama" else _OllamaToOpenAi
    elif ask.dialect == "ollama":
        kind = _OpenAiToOllama
    else:
        kind = _EventFlow if ask.task in ("messages", "responses") else _OpenAiFlow
    return kind(ask, request_id, clock)


def _failed(ask: Ask, status: int, error: str, usage: Usage) -> Tuple[int, bytes, Usage]:
    """What is wrong with a request is said as the engine said it.  That the engine does not take
    us, or fails, is no business of the client's."""
    usage.error = error or f"the engine answered {status} without a word"
    if status in (400, 404, 413, 422, 429, 501, 503):
        code = "engine_busy" if status in (429, 503) else "engine_refused"
        return status, error_answer(ask.dialect, status, code, usage.error), usage
    what = "the engine failed: " + usage.error
    return 502, error_answer(ask.dialect, 502, "engine_failed", what), usage


def _vector(numbers: bytes, packed: bool) -> bytes:
    """An embedding as OpenAI has it: a list, or its 32-bit floats in base64."""
    if not packed:
        return b"[" + numbers + b"]"
    import array
    import base64
    floats = array.array("f", map(float, numbers.split(b",")))
    if sys.byteorder == "big":
        floats.byteswap()
    return b'"' + base64.b64encode(floats.tobytes()) + b'"'


def _embeddings(ask: Ask, wire: Wire, body: bytes, usage: Usage) -> bytes:
    """May be tens of megabytes: numbers are moved, and not read as JSON."""
    usage.completion_tokens = 0
    for edge in (body[:4096], body[-4096:]):
        for found in re.findall(rb'"prompt_(?:tokens|eval_count)"\s*:\s*(\d{1,15})\b', edge):
            usage.prompt_tokens = int(found)
    if ask.dialect == wire.dialect and "prompt" not in ask.body:
        return body
    vectors = re.findall(rb"\[([-+.\deE,\s]+)\]", body)
    model, prompt = json.dumps(ask.model).encode(), usage.prompt_tokens or 0
    if "prompt" in ask.body:
        return b'{"embedding":[%s]}\n' % b"".join(vectors[:1])
    if ask.dialect == "ollama":
        return b'{"model":%s,"embeddings":[%s],"prompt_eval_count":%d}\n' % (
            model, b",".join([_vector(vector, False) for vector in vectors]), prompt)
    packed = ask.body.get("encoding_format") == "base64"
    return b'{"object":"list","data":[%s],"model":%s,"usage":{"prompt_tokens":%d,' \
        b'"total_tokens":%d}}\n' % (b",".join(
            [b'{"object":"embedding","index":%d,"embedding":%s}' % (number, _vector(vector, packed))
             for number, vector in enumerate(vectors)]), model, prompt, prompt)


def whole_answer(ask: Ask, wire: Wire, status: int, body: bytes, request_id: str,
                 took_ns: int = 0) -> Tuple[int, bytes, Usage]:
    """(status, body, usage) for the client, of an answer that is no stream, or of an error."""
    usage, value = Usage(), None
    if status != 200 or ask.task != "embed":
        value = _json_dict(body)
    if status != 200:
        said = body[:4000].decode("utf-8", "replace") if value is None else value
        return _failed(ask, status, _said_error(said, True), usage)
    if ask.task == "embed":
        return 200, _embeddings(ask, wire, body, usage), usage
    if value is None or _said_error(value):
        return _failed(ask, 502, _said_error(value) or "its answer is no JSON object", usage)
    usage.take(value if wire.dialect == "ollama" else _within(value, "usage"))
    usage.pieces = len(body) // 4  # a bound of what was made, where the engine does not say
    if ask.dialect == wire.dialect:
        return 200, encode_json(dict(value, model=ask.model)), usage
    if wire.dialect == "ollama":
        said = _openai_said(ask, value, request_id, 0)
        reason = _reason(value.get("done_reason"), said.get("tool_calls"), "tool_calls")
        choice = dict({"message": dict({"role": "assistant", "content": ""}, **said)}
                      if ask.task == "chat" else said, index=0, finish_reason=reason)
        choice["logprobs"] = {"content": value["logprobs"]} if value.get("logprobs") else None
        return 200, encode_json(dict(_openai_answer(ask, request_id, "", [choice]),
                                     usage=usage.as_openai())), usage
    choice = _within(value, "choices", 0)
    said = _within(choice, "message") or choice
    try:
        line = _ollama_said(ask, choice, said, _list(said, "tool_calls"))
    except HttpError as error:
        return _failed(ask, 502, error.what, usage)
    if not choice:
        return _failed(ask, 502, "its answer is empty", usage)
    return 200, encode_json(dict(
        {"model": ask.model, "created_at": utc_stamp()}, **line, done=True,
        done_reason=_reason(choice.get("finish_reason"), 0, ""),
        **usage.as_ollama(took_ns, took_ns))), usage


def model_answer(path: str, names: Sequence[str], context_tokens: int,
                 since_s: float) -> Dict[str, Any]:
    """To GET /v1/models, /v1/models/NAME, /api/tags, /api/ps (names: those in memory) and
    /api/version, and to POST /api/show, of an engine that is no Ollama.  since_s: when it started,
    in seconds since 1970."""
    if path == "/api/version":
        return {"version": "0.33.0"}  # whose API this is
    if path.startswith("/v1/models"):
        cards = [{"id": name, "object": "model", "created": int(since_s), "owned_by": "b9agent"}
                 for name in names]
        return {"object": "list", "data": cards} if path == "/v1/models" else cards[0]
    details = {"parent_model": "", "format": "", "family": "", "families": [],
               "parameter_size": "", "quantization_level": ""}
    facts = {"details": details, "capabilities": ["completion", "tools"],
             "modified_at": utc_stamp(since_s)}
    if path == "/api/show":
        return dict(facts, modelfile="", parameters="", template="", model_info={
            "general.architecture": "unknown", "unknown.context_length": context_tokens})
    if path == "/api/ps":
        facts = {"details": details, "size_vram": 0, "context_length": context_tokens,
                 "expires_at": "2318-01-01T00:00:00Z"}  # for ever, as Ollama says it
    return {"models": [dict(facts, name=name, model=name, size=0, digest="") for name in names]}


# ----------------------------------------------------------------------
# 14. Control API                           127.0.0.1:9999, STATE/control.*
# ----------------------------------------------------------------------
# How the command line, the installer and other programs on this machine ask
# the running agent.  All but /health want the token of control.token; the
# Host header must be an address of ours, so that a web page in a browser
# cannot reach it under a name of its own (DNS rebinding).


def kept_secret(path: str) -> str:
    """The token in a file of ours, 0600; made at first use, and anew where others could read it.

    Raises: UsageError.
    """
    token = (read_text(path, 4096) or "").strip()
    if shared_mode(path) or not re.fullmatch(r"[0-9a-f]{64}", token):
        token = os.urandom(32).hex()
        try:
            write_atomic(path, token + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}",
                             "The state folder must be writable; choose one with --state-dir"
                             ) from error
    REDACTOR.add(token)
    return token


# What a handler's error is to HTTP; and what an answer's error_code is to the command line.
AGENT_ERRORS: Tuple[Tuple[Any, int, str], ...] = (
    (UsageError, 400, "bad_request"), (LockedError, 409, "locked"),
    (ModelMissing, 404, "model_not_found"), (ModelRefused, 400, "model_refused"),
    (TransfersFull, 429, "too_many_transfers"),
    (EngineMissing, 409, "engine_missing"), (EngineConflict, 409, "conflict"),
    (ModelError, 502, "model_failed"), (EngineError, 502, "engine_failed"))


def fields_of(*rows: Tuple[str, str]) -> Tuple[Field, ...]:
    """Fields of an answer, from (kind, names).  Those that may be unknown have none of the "!"; an
    array is one of objects."""
    return tuple(Field(name, kind.rstrip("!"), name.replace("_", " "), kind.endswith("!"),
                       items="object" if kind.startswith("array") else "string")
                 for kind, names in rows for name in names.split())


STATUS_FIELDS = fields_of(
    ("string!", "status machine_id pool state message version gateway hostname provider "
                "inference_status"),
    ("number!", "uptime_seconds state_seconds"),
    ("integer!", "pid keepalives registrations failures running_jobs total_jobs"),
    ("object!", "host energy metrics inference pods tailnet"), ("array!", "gpus"),
    ("string", "last_keepalive"), ("object", "k3s tunnel"),
    ("number", "cpu_percent memory_percent last_keepalive_seconds_ago clock_offset_seconds"),
    ("integer", "gpu_count network_received_bytes network_sent_bytes inference_port"),
) + (Field("gpu_problems", "array", "of GPUs and their drivers", True),)


INFERENCE_FIELDS = fields_of(
    ("string!", "status message"), ("boolean!", "running"),
    ("string", "endpoint engine version model why log"), ("boolean", "adopted"),
    ("integer", "pid starts queue"),
    ("number", "uptime_seconds requests_per_second tokens_per_second"), ("array!", "transfers"),
) + (Field("models", "array", "names that the engine serves", True),)


def agent_routes(status: Callable[[bool], Dict[str, Any]],
                 metrics: Callable[[], str]) -> Tuple[Route, ...]:
    """status(fresh): the fields of GET /status; metrics(): the text of GET /metrics."""
    return (
        Route("GET", "/status", lambda request: Response(200, status(
            bool(request.query.get("fresh")))), False, "the agent, its membership, its figures",
              query=(Field("fresh", "boolean", "figures of now, not of the last keepalive"),),
              result=STATUS_FIELDS),
        Route("GET", "/metrics", lambda request: Response(
            200, metrics().encode("utf-8"), METRICS_CONTENT_TYPE), False,
            "the same and more, for Prometheus", produces=("text/plain",)),
    )


# -- inference and models --------------------------------------------------

_MODEL = Field("model", "string", "its name, such as llama3.2:1b", required=True, max_length=512)
_STREAM = Field("stream", "boolean", "a line of JSON for each step, instead of one answer at the "
                "end; `Accept: application/x-ndjson` asks for the same")


def _transfer_answer(request: Request, transfer: Transfer) -> Response:
    """Its progress as it goes, or its end."""
    if request.fields.get("stream") or "x-ndjson" in request.headers.get("accept", ""):
        def lines() -> Iterator[bytes]:
            for progress in transfer.watch(STREAM_LOOK_S):
                yield b"" if progress is None else REDACTOR.scrub(json.dumps(
                    progress_record(progress))).encode("utf-8") + b"\n"
        return Response(200, lines(), "application/x-ndjson")
    progress = transfer.progress
    for step in transfer.watch(3600.0):
        progress = step or progress
    if progress.state != "success":
        raise transfer.error or EngineConflict(f"the {progress.kind} of {progress.name} was "
                                               f"{progress.state}")
    return Response(200, dict(progress_record(progress), message=f"{progress.name} is here"))


_ENGINE_STATUSES = tuple(sorted({row[1] for row in AGENT_ERRORS} - {400, 429}))
WAITING_MAX = 32  # requests for what takes its time: half of the connections stay for the rest
_CONTEXT = Field("context_tokens", "integer", "tokens of context for each request", minimum=128,
                 maximum=1 << 24)
_PATH = Field("path", "string", "a GGUF file or a folder of safetensors on this machine",
              required=True, max_length=4096)


# What is asked, the method of Inference that does it (its arguments are named as the fields), what
# it is about, the fields.
_INFERENCE_ROUTES: Tuple[Tuple[str, str, str, Tuple[Field, ...]], ...] = (
    ("GET /inference/status", "status", "the engine, its address and its models", ()),
    ("POST /inference/start", "start",
     "start an engine; answers when a token came, or why none did", (
         Field("engine", "string", "default: what suits the model and this machine",
               choices=("auto",) + ENGINE_NAMES),
         _MODEL._replace(required=False, about="a name, a GGUF file, or a folder"), _CONTEXT,
         Field("force", "boolean", "also where it should not fit"))),
    ("POST /inference/stop", "stop", "end the engine, and see that all of it is gone", ()),
    ("POST /inference/pull", "pull", "bring a model into Ollama's store", (_MODEL, _STREAM)),
    ("POST /inference/cancel", "cancel", "end a pull or an import; what came is kept", (_MODEL,)),
    ("GET /models", "models",
     "every model here: size, digest, loaded or not, where it came from", ()),
    ("POST /models/load", "load", "into memory, to stay; answers when a token came", (_MODEL,)),
    ("POST /models/unload", "unload", "out of memory; answers when it is gone", (_MODEL,)),
    ("POST /models/delete", "delete", "out of Ollama's store", (_MODEL,)),
    ("POST /models/import", "bring", "local files into Ollama's store", (
        _PATH, Field("name", "string", "default: the file's", max_length=512),
        Field("quantize", "string", "from F16, BF16 or F32", choices=QUANTIZATIONS), _STREAM)),
    ("POST /models/convert", "convert", "safetensors into MLX weights", (
        _PATH, Field("target", "string", "a folder that is not there yet", required=True,
                     max_length=4096),
        Field("plain", "boolean", "as they are, not in 4 bits"), _STREAM)),
    ("POST /models/fit", "fit_of", "whether a model fits here, from its files' headers",
     (_MODEL, _CONTEXT)),
    ("POST /models/verify", "verify", "hash a model's files again",
     (_MODEL._replace(required=False),)),
)


def inference_routes(inference: Any) -> Tuple[Route, ...]:
    """The routes under /inference and /models."""
    waiting = threading.BoundedSemaphore(WAITING_MAX)

    def now(method: str, request: Request) -> Response:
        fields = {name: value for name, value in request.fields.items() if name != "stream"}
        answer = getattr(inference, method)(**fields)
        return (_transfer_answer(request, answer) if isinstance(answer, Transfer) else
                Response(200, answer))

    def patient(method: str, request: Request) -> Response:
        if method in ("status", "models", "stop", "cancel"):
            return now(method, request)
        if not waiting.acquire(blocking=False):
            raise TransfersFull(f"{WAITING_MAX} requests wait for the engine already",
                                "See what it does: b9agent.py status")
        try:
            return now(method, request)
        finally:
            waiting.release()
    return tuple(
        Route(*what.split(), lambda request, method=method: patient(method, request), False, about,
              fields, statuses=_ENGINE_STATUSES,
              produces=("application/json", "application/x-ndjson")[:2 if _STREAM in fields else 1],
              result=INFERENCE_FIELDS if method in ("status", "start", "stop") else ())
        for what, method, about, fields in _INFERENCE_ROUTES)


class ControlApi(Api):
    """What every agent answers, and the routes that it is given."""

    name = "control"
    instant = ("/health",)
    refusals = 30
    statuses = AGENT_ERRORS

    def __init__(self, log: Log, token: str, routes: Sequence[Route]) -> None:
        super().__init__(log)
        self._token = token
        self.routes = (
            Route("GET", "/health", lambda request: Response(
                200, {"status": "ok", "version": VERSION}), True, "whether the agent lives",
                result=(Field("status", "string", "ok", True),
                        Field("version", "string", "of the agent", True))),
            *routes,
            Route("GET", "/logs", self._logs, False,
                  "the newest lines of the log; as JSON to who accepts application/x-ndjson",
                  query=(Field("lines", "integer", "how many", minimum=0, maximum=LOG_KEPT_LINES,
                               example=100),
                         Field("follow", "boolean", "go on as they come")),
                  produces=("text/plain", "application/x-ndjson")),
            Route("GET", "/events", self._events, False,
                  "server-sent events: state, tunnel, tailnet, inference, pull, log; Last-Event-ID "
                  "is understood",
                  query=(Field("since", "integer", "those after this id; 0: all that are kept",
                               minimum=0, maximum=10**18),), produces=("text/event-stream",)),
            Route("GET", "/openapi.json", lambda request: Response(
                200, openapi(self.routes, "b9agent control API")), False, "this document"),
        )

    def check(self, headers: Dict[str, str]) -> None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if name.lower() != "localhost" and not re.fullmatch(r"([0-9.]+|\[[0-9a-fA-F:.%]+\])", name):
            raise HttpError(421, "wrong_host", "the Host header must be an IP address or localhost",
                            "Call this API by its address")

    def authorize(self, headers: Dict[str, str]) -> str:
        import hmac
        given = headers.get("authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, b"Bearer " + self._token.encode()):
            raise HttpError(401, "unauthorized", "this needs the control token",
                            "Send `Authorization: Bearer` with the text of control.token in the "
                            "state folder", (("WWW-Authenticate", "Bearer"),))
        return "control"

    def _logs(self, request: Request) -> Response:
        ring, is_json = self.log.kept, "x-ndjson" in request.headers.get("accept", "")
        kind = "application/x-ndjson" if is_json else "text/plain; charset=utf-8"
        number = ring.last - request.query.get("lines", 100)

        def render(number: int, line: str) -> bytes:
            text = line if is_json else render_kept_line(line)
            return text.encode("utf-8", "replace") + b"\n"
        if request.query.get("follow"):
            return Response(200, follow_ring(ring, number, render, b"\n" if is_json else b""), kind)
        return Response(200, b"".join([render(*pair) for pair in ring.after(number)]), kind)

    def _events(self, request: Request) -> Response:
        ring, last = self.log.events, request.headers.get("last-event-id", "")
        number = (int(last) if re.fullmatch("[0-9]{1,18}", last)
                  else request.query.get("since", ring.last))
        return Response(200, follow_ring(
            ring, number, lambda number, event: "id: {}\nevent: {}\ndata: {}\n\n".format(
                number, *event).encode("utf-8", "replace"), b": keep-alive\n\n"),
            "text/event-stream")


def agent_holds(state_dir: str) -> bool:
    """Whether an agent runs on this state folder.  Raises: UsageError where that cannot be seen."""
    import fcntl
    try:
        descriptor = os.open(os.path.join(state_dir, "agent.lock"), os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UsageError(f"cannot look into the state folder {state_dir}: {error.strerror}",
                         "Run this as the user whose agent it is, or with sudo") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


# An agent: of a state folder, or elsewhere, with the headers that it wants.
AgentPlace = Union[str, Tuple[Endpoint, Dict[str, str]]]


def agent_address(state_dir: AgentPlace) -> Tuple[Endpoint, Dict[str, str]]:
    """(where the agent of this state folder listens, the header that it wants).  The control token
    is sent only while one runs: after a kill -9 the port may be anybody's.

    Raises: GatewayUnreachable where none runs, UsageError where its files are not ours to read.
    """
    if isinstance(state_dir, tuple):
        return state_dir
    address = (read_text(os.path.join(state_dir, "control.addr"), 512) or "").strip()
    token = (read_text(os.path.join(state_dir, "control.token"), 4096) or "").strip()
    host, _, port = address.rpartition(":")
    if not agent_holds(state_dir):
        raise GatewayUnreachable(f"no agent is running on {state_dir}", "Start one with "
                                 "`b9agent.py run`; its log says why one ended")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not token:
        raise GatewayUnreachable(f"the agent on {state_dir} has no control API",
                                 "Its log says why; is the port taken, or the disk full?")
    REDACTOR.add(token)
    return (Endpoint("http", host.strip("[]"), int(port)),
            {"Authorization": f"Bearer {token}", "Content-Type": "application/json"})


def ask_agent(state_dir: str, path: str, is_ours: Callable[[HttpReply], bool],
              limit_s: float = 5.0) -> HttpReply:
    """GET something of the agent that runs on this state folder.  Raises: as agent_address()."""
    endpoint, headers = agent_address(state_dir)
    try:
        reply = http_request("GET", endpoint, path, headers, None, limit_s)
    except HttpFailure as failure:
        raise GatewayUnreachable(f"the agent at {endpoint.url} does not answer: {failure}",
                                 "Its log says why: is it being started or stopped?") from failure
    if reply.status != 200 or not is_ours(reply):
        raise GatewayUnreachable(f"{endpoint.url} answered {reply.status}, and not as this b9agent "
                                 "does", "Another program holds the control port, or the agent is "
                                 "of another version: restart it")
    return reply


def agent_stream(state_dir: AgentPlace, path: str, body: Optional[Dict[str, Any]], limit_s: float,
                 idle_limit_s: Optional[float] = 120.0) -> HttpStream:
    """A 200 of the running agent: GET, or POST of a body.

    Raises: as agent_address(), and the error that the agent answers, as its own class.
    """
    endpoint, headers = agent_address(state_dir)
    data = None if body is None else json.dumps(body).encode("utf-8")
    try:
        stream = http_stream("GET" if body is None else "POST", endpoint, path, headers, data,
                             limit_s, idle_limit_s)
        if stream.status == 200:
            return stream
        with stream:
            answer = _json_object(stream.read())
    except HttpFailure as failure:
        raise GatewayUnreachable(f"the agent at {endpoint.url} does not answer: {failure}",
                                 "Does it run there, and listen on that address? Its agent.log "
                                 "says more") from failure
    if stream.status == 401:
        raise RequestRefused(f"the agent at {endpoint.url} refused the control token",
                             "It has another one now: take control.token of its state folder anew")
    code = answer.get("error_code")
    kind = next((row[0] for row in AGENT_ERRORS if row[2] == code),
                {400: UsageError, 413: UsageError, 429: EngineError}.get(stream.status,
                                                                         RequestRefused))
    said = str(answer.get("error") or f"{endpoint.url}{path} answered {stream.status}: is that a "
               "b9agent?")
    raise kind("\n".join(map(printable, said.splitlines())),
               printable(str(answer.get("suggestion") or "")))


def call_agent(state_dir: AgentPlace, path: str, body: Optional[Dict[str, Any]] = None,
               limit_s: float = 30.0, max_bytes: int = 16 << 20) -> Dict[str, Any]:
    """A JSON answer of the running agent, whole within limit_s.  Raises: as agent_stream()."""
    with agent_stream(state_dir, path, body, limit_s, None) as stream:
        try:
            return _json_object(stream.read(max_bytes))
        except HttpFailure as failure:
            raise GatewayUnreachable(f"the agent's answer broke off: {failure}") from failure


def agent_lines(state_dir: AgentPlace, path: str, body: Optional[Dict[str, Any]] = None
                ) -> Iterator[bytes]:
    """The lines of a stream of the running agent, which may be silent for as long as it lives: a
    log, or a pull whose gigabytes are being hashed.  Raises: as agent_stream()."""
    with agent_stream(state_dir, path, body, 7200.0, 7 * 86400.0) as stream:
        try:
            yield from stream.lines()
        except HttpFailure as failure:
            raise GatewayUnreachable(f"the agent's answer broke off: {failure}",
                                     "Has it ended? b9agent.py status") from failure


def read_agent_status(state_dir: str, limit_s: float = 5.0) -> Dict[str, Any]:
    """GET /status.  Raises: as ask_agent()."""
    fields = {"version", "pid", "state", "metrics"}
    return _json_object(ask_agent(state_dir, "/status",
                                  lambda reply: fields <= set(_json_object(reply.body)),
                                  limit_s).body)


def read_agent_metrics(state_dir: str) -> bytes:
    """GET /metrics.  Raises: as ask_agent()."""
    return ask_agent(state_dir, "/metrics",
                     lambda reply: reply.body.startswith(b"# HELP b9agent_")).body


# ----------------------------------------------------------------------
# 15a. Tunnel                      runs ssh; the port of its end on loopback
# ----------------------------------------------------------------------
# `ssh -N` through a server from which the gateway can be reached, kept up.
# ssh reads no config file (-F none): what it does stands here, whole, and
# none can add a ProxyCommand or accept a host key.  It is tried again for
# ever; no request is sent unless our own ssh holds the near end, for the
# token is not for a program that took the port while it was away.

TUNNEL_PACE = Pace(exits=1, held_s=2.0)  # one try a start: Tunnel knows how long to wait then
TUNNEL_FIRST_S, TUNNEL_WAIT_S = 0.5, 20.0  # before the second try; for the end of the first one
KNOWN_HOSTS = "~/.ssh/known_hosts"
_SSH_OPTIONS = (
    "BatchMode=yes", "StrictHostKeyChecking=yes", "UpdateHostKeys=no", "ExitOnForwardFailure=yes",
    "ConnectTimeout=5", "ServerAliveInterval=3", "ServerAliveCountMax=3", "ForwardAgent=no",
    "ForwardX11=no", "ControlMaster=no", "ControlPath=none", "AddKeysToAgent=no",
    "PermitLocalCommand=no", "LogLevel=INFO")  # INFO: tells what the server does not forward

# What ssh's words mean, what to do, and the longest wait before the next try.  A server that comes
# back must be found within 10 s; one that refuses our key would ban us for asking so often.
_SSH_SAYS: Tuple[Tuple[str, str, float], ...] = (
    ("IDENTIFICATION HAS CHANGED", "its host key is another than the known one: somebody in "
     "between, or a new server. If it is new: ssh-keygen -R {name} -f {known} && {scan}", 3.0),
    ("Host key verification failed", "its host key is not known here. As the agent's user: {scan}",
     3.0),
    ("(?i)not accessible|bad permissions|error in libcrypto|invalid format", "the key file cannot "
     "be used: {line}. It must be a private key without passphrase, of mode 0600", 60.0),
    ("Permission denied|Too many authentication failures", "it refuses our key ({line}): put the "
     "public half of {key} into authorized_keys there", 60.0),
    ("remote port forwarding failed", "its port 6443 is taken, or its sshd_config forbids us to "
     "listen there: see AllowTcpForwarding and PermitListen", 3.0),
    ("open failed: .*prohibited", "its sshd_config forbids to forward to {gateway} ({line}): see "
     "AllowTcpForwarding and PermitOpen", 3.0),
    ("open failed", "nothing answers it at {gateway} ({line}): gateway.host and gateway.port are "
     "as seen from there", 3.0),
    ("", "{line}", 3.0))


def ssh_command(program: str, settings: Any, local_port: int) -> List[str]:
    """The whole command line; nothing in it is secret."""
    user, host, port = split_tunnel(settings.tunnel)
    target = host_port(settings.gateway_host, settings.gateway_port)
    known = os.path.expanduser(KNOWN_HOSTS).replace("%", "%%").replace('"', '\\"')
    options = (*_SSH_OPTIONS, f'UserKnownHostsFile="{known}"')
    command = [program, "-F", "none", "-N", "-T", "-p", str(port), "-l", user]
    command += [word for option in options for word in ("-o", option)]
    if settings.tunnel_identity_file:
        command += ["-o", "IdentitiesOnly=yes", "-i", settings.tunnel_identity_file]
    if settings.tunnel_reverse_k3s:
        command += ["-R", "6443:127.0.0.1:6443"]
    return command + ["-L", f"127.0.0.1:{local_port}:{target}", "--", host]


def ssh_problem(lines: Sequence[str], settings: Any) -> Tuple[str, float]:
    """(what ssh has said, in words that help; the longest wait before the next try)."""
    from shlex import quote
    _, host, port = split_tunnel(settings.tunnel)
    known, folder = (quote(os.path.expanduser(path)) for path in (KNOWN_HOSTS, "~/.ssh"))
    pattern, words, limit_s = next(row for row in _SSH_SAYS
                                   if any(re.search(row[0], line) for line in lines or [""]))
    line = next(line for line in reversed(lines or ["ssh ended"]) if re.search(pattern, line))
    scan = (f"mkdir -p {folder}; ssh-keyscan -p {port} {quote(host)} >> {known}, "
            f"then compare `ssh-keygen -lf {known}` with what the server's owner tells you")
    return words.format(
        name=quote(host if port == 22 else f"[{host}]:{port}"), known=known, scan=scan,
        line=line[:200].rstrip("."), key=settings.tunnel_identity_file or "~/.ssh/id_*",
        gateway=host_port(settings.gateway_host, settings.gateway_port)), limit_s


def tunnel_port() -> int:
    """A free one below those that systems give to outgoing connections: one of these could take it
    while ssh is away, or even connect to itself."""
    ports = (20000 + int(random_between(0, 10000)) for _ in range(1000))
    return next(port for port in ports if port_holder("127.0.0.1", port) is None)


def tunnel_endpoint(settings: Any, local_port: int, ssh_pid: Callable[[], Optional[int]]
                    ) -> Endpoint:
    """The gateway by its own name, for TLS as well, and the way to it.

    Looked at when the connection is made: our ssh may have ended since we last looked, and who has
    taken its port would read the token.
    """
    def check() -> None:
        pid = ssh_pid()
        if not pid or not _listener(local_port, pid):
            raise HttpFailure("refused", "the tunnel's ssh has ended")
    return Endpoint(settings.gateway_scheme, settings.gateway_host, settings.gateway_port,
                    settings.gateway_ca_file, None, ("127.0.0.1", local_port), check=check)


class Tunnel:
    """start() once, stop() once; the rest from any thread.  is_ready(): whether requests get
    through.  on_change(status()), from the tunnel's thread."""

    def __init__(self, settings: Any, log: Log, is_ready: Callable[[], bool],
                 on_change: Callable[[Dict[str, Any]], None]) -> None:
        program = find_program("ssh")
        if program is None:
            raise UsageError("there is no ssh for the tunnel", "apt install openssh-client")
        self._settings, self._log = settings, log
        self._is_ready, self._on_change = is_ready, on_change
        self._port = settings.tunnel_local_port or tunnel_port()
        self.endpoint = tunnel_endpoint(settings, self._port, lambda: self._child.snapshot.pid)
        self._told = ("starting", "")  # state and message, replaced whole
        self._failures, self._again_s = 0, 0.0
        self._stopping, self._wake = False, Wake()
        self._thread = threading.Thread(target=self._run, name="tunnel", daemon=True)
        self._child = Child(ChildSpec(
            "tunnel", ssh_command(program, settings, self._port), {}, (("127.0.0.1", self._port),),
            self._probe, stall_limit_s=15.0, ready_limit_s=30.0, stop_grace_s=2.0, is_told=False),
            settings.state_dir, log, pace=TUNNEL_PACE)

    def _probe(self) -> Probe:
        """Our ssh listens, and takes a connection."""
        try:
            socket.create_connection(("127.0.0.1", self._port), 1.0).close()
        except OSError:
            return Probe(False)
        return Probe(_listener(self._port, self._child.snapshot.pid) != "")

    def status(self) -> Dict[str, Any]:
        child, (state, message) = self._child.snapshot, self._told
        return {"state": state, "server": self._settings.tunnel, "local_port": self._port,
                "message": message, "pid": child.pid, "starts": child.starts}

    def start(self) -> None:
        self._child.start()
        self._thread.start()

    def stop(self) -> None:
        """Returns when no ssh of ours is left."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        left = self._child.stop()
        self._tell("stopped", left)

    def await_running(self) -> None:
        """As long as the first try lasts.  Raises: GatewayUnreachable."""
        until_s = now_s() + TUNNEL_WAIT_S
        while self._child.snapshot.state is not ChildState.RUNNING:
            state, message = self._told
            if message or self._stopping or now_s() > until_s:
                raise GatewayUnreachable(f"the tunnel to {self._settings.tunnel} is not up: "
                                         f"{message or state}", "`b9agent.py run` tries it again "
                                         "by itself")
            _pause(WATCH_S)

    # -- its thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._look()
            except Exception as error:  # a defect costs one look, not the tunnel
                self._log.defect(error)
            is_up = self._child.snapshot.state is ChildState.RUNNING
            self._wake.wait(5 * WATCH_S if is_up else WATCH_S)

    def _look(self) -> None:
        child = self._child.snapshot
        if child.state is ChildState.RUNNING:
            self._failures = 0
            refused = [line for line in self._child.tail() if "open failed: " in line]
            self._tell("running", ssh_problem(refused[-1:], self._settings)[0]
                       if refused and not self._is_ready() else "")
        elif child.state is ChildState.ERROR and not self._again_s:
            lines = [line for line in self._child.tail() if "open failed: " not in line
                     ] if "ended with" in child.message else []
            problem, limit_s = ssh_problem(lines or [child.message.partition("\n")[0]],
                                           self._settings)
            self._failures += 1
            wait_s = min(limit_s, TUNNEL_FIRST_S * 2.0 ** min(self._failures, 10))
            self._again_s = now_s() + random_between(wait_s / 2, wait_s)
            self._tell("backoff", problem)
        elif child.state is ChildState.ERROR and now_s() >= self._again_s:
            self._again_s = 0.0
            self._child.start()

    def _tell(self, state: str, message: str) -> None:
        if (state, message) != self._told:
            self._told = (state, message)
            self._log("notice" if not message else "warning", "tunnel", state=state,
                      server=self._settings.tunnel, what=message or None)
            self._on_change(self.status())


# ----------------------------------------------------------------------
# 15b. Tailnet          asks tailscaled's socket, or the tailscale program
# ----------------------------------------------------------------------
# The address under which a gateway on the same tailnet dials this machine:
# it comes late at boot, changes with the account, and goes with `tailscale
# down`.  Whoever listens there follows it.  Where there is no trace of
# Tailscale this costs a look at some files every 30 s, and no thread.

TAILNET_EVERY_S, TAILNET_RARELY_S = 5.0, 30.0  # asking the socket; running the program, or none
TAILNET_BOOT_S = 30.0                          # how long a registration waits for the address
TAILNET_LIMIT_S = 2.0
TAILSCALED_SOCKETS = ("/var/run/tailscale/tailscaled.sock", "/run/tailscale/tailscaled.sock",
                      "/var/run/tailscaled.socket")  # Linux; macOS
TAILSCALED_SERVICES = (  # started at boot: systemd, OpenRC, launchd
    "/etc/systemd/system/multi-user.target.wants/tailscaled.service",
    "/etc/runlevels/default/tailscale", "/Library/LaunchDaemons/com.tailscale.tailscaled.plist")
_MAC_APP = "/Applications/Tailscale.app/Contents/MacOS"

# Its ipn.State, what that is to us, and what to say.  What passes by itself is worth a wait.
_BACKEND_STATES = {
    "Running": ("up", ""), "Starting": ("waiting", "tailscaled is connecting"),
    "NoState": ("waiting", "tailscaled is starting"),
    "Stopped": ("down", "Tailscale is stopped"),
    "NeedsLogin": ("down", "Tailscale is not logged in"),
    "NeedsMachineAuth": ("down", "an admin of the tailnet has to approve this machine"),
    "InUseOtherUser": ("down", "Tailscale is in use by another user of this machine")}


class TailnetReading(NamedTuple):
    """state: none, waiting, up, down.  address: IPv4; name: in the tailnet's DNS; source: socket,
    cli, interface; "" where unknown.  tun: whether this machine's own sockets can have the address;
    in userspace networking tailscaled takes connections to it and makes them to loopback."""
    state: str = "none"
    address: str = ""
    name: str = ""
    source: str = ""
    message: str = ""
    tun: bool = True


def is_tailnet_address(text: Any) -> bool:
    """Of 100.64.0.0/10, from which every tailnet has its IPv4 addresses.

    >>> is_tailnet_address("100.127.255.254"), is_tailnet_address("100.128.0.1")
    (True, False)
    """
    try:
        first, second = socket.inet_pton(socket.AF_INET, text)[:2]
    except (OSError, TypeError, ValueError):
        return False
    return first == 100 and 64 <= second < 128


def parse_tailscale_status(body: bytes) -> Optional[TailnetReading]:
    """From what `tailscale status --json` and the local API say; None for anything else."""
    found = _json_object(body)
    state, message = _BACKEND_STATES.get(str(found.get("BackendState")), ("", ""))
    own = found.get("Self")
    own = own if isinstance(own, dict) else {}
    addresses, name = found.get("TailscaleIPs") or own.get("TailscaleIPs"), own.get("DNSName")
    address = next(filter(is_tailnet_address, addresses if isinstance(addresses, list) else ()), "")
    if state == "up" and not address:
        state, message = "down", "Tailscale runs, but gave this machine no IPv4 address"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,254}", name):
        name = ""
    # A stopped one keeps its address in mind, and no packet for it comes here.
    return TailnetReading(state, address if state == "up" else "", name.rstrip("."),
                          message=message, tun=found.get("TUN") is not False) if state else None


def ask_tailscaled(path: str) -> TailnetReading:
    """By its local API, which any user may read."""
    endpoint = Endpoint("http", "local-tailscaled.sock", 80, dial=path)
    try:
        reply = http_request("GET", endpoint, "/localapi/v0/status?peers=false",
                             {"Host": endpoint.host}, None, TAILNET_LIMIT_S)
        found, problem = parse_tailscale_status(reply.body), "an answer of no use"
    except HttpFailure as failure:
        found, problem = None, str(failure)
    return found._replace(source="socket") if found else TailnetReading(
        "waiting", message=f"tailscaled does not answer at {path}: {problem}")


def tailscale_program() -> Optional[str]:
    return find_program("tailscale") or find_program("Tailscale", _MAC_APP)


def ask_tailscale(program: str) -> TailnetReading:
    """By its command line, which also knows the ways of the macOS apps."""
    result = run_command([program, "status", "--json", "--peers=false"], 5.0)
    text = result.output  # a warning may stand before or after the JSON
    found = parse_tailscale_status(text[text.find("{"):text.rfind("}") + 1].encode("utf-8"))
    said = printable((result.problem or text.strip().partition("\n")[0])[:200])
    return found._replace(source="cli") if found else TailnetReading(
        "down", message=f"tailscale says: {said or 'nothing'}")


def tailnet_interface_address() -> str:
    """By the name of the interface alone: of this range are a mobile carrier's ppp0, a cloud's
    eth0 and pods of Kubernetes as well, and the first is a point-to-point link like ours."""
    import fcntl
    prefix, request = ("utun", 0xC0206921) if sys.platform == "darwin" else ("tailscale", 0x8915)
    found, nothing = "", contextlib.suppress(OSError)
    with nothing, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in (name for _, name in socket.if_nameindex() if name.startswith(prefix)):
            with nothing:  # SIOCGIFADDR; it may have none
                record = fcntl.ioctl(probe, request, os.fsencode(name).ljust(40, b"\0"))
                address = socket.inet_ntoa(record[20:24])
                found = address if is_tailnet_address(address) else found
    return found


def tailnet_trace(wanted: Optional[str]) -> bool:
    """Whether Tailscale may be here at all."""
    return wanted != "none" and bool(
        wanted or any(map(os.path.exists, TAILSCALED_SOCKETS + TAILSCALED_SERVICES))
        or tailscale_program() or tailnet_interface_address())


def read_tailnet(wanted: Optional[str]) -> TailnetReading:
    """By tailscaled's socket, else by its program, else by the interface; within some 10 s.
    wanted: the one socket to ask instead, or none."""
    if wanted == "none":
        return TailnetReading()
    found = TailnetReading()
    for path in [wanted] if wanted else dict.fromkeys(map(os.path.realpath, TAILSCALED_SOCKETS)):
        found = ask_tailscaled(path) if wanted or os.path.exists(path) else found
        if wanted or found.source:
            return found
    program = tailscale_program()
    said = ask_tailscale(program) if program else found
    if said.source:
        return said
    address = tailnet_interface_address()
    if address:
        return TailnetReading("up", address, source="interface")
    if found.state == "none" and any(map(os.path.exists, TAILSCALED_SERVICES)):
        return TailnetReading("waiting", message="tailscaled is started at boot, and is not there")
    return said if found.state == "none" else found


class TailnetListener:
    """A server on the tailnet address, wherever that goes.  make(host): one with start(), stop()
    and url.  Of one thread at a time."""

    def __init__(self, name: str, make: Callable[[str], Any], log: Log) -> None:
        self._name, self._make, self._log = name, make, log
        self._server: Any = None
        self._host, self._problem = "", ""

    def follow(self, host: str) -> None:
        """To this address, or to none; what could not be had is tried again with each call."""
        if self._server is not None and host != self._host:
            self._log("info", "not_listening", api=self._name, url=self._server.url)
            self._server.stop()
            self._server = None
        if not host or self._server is not None:
            return
        try:
            server = self._make(host)
        except OSError as error:
            problem = f"cannot listen on {host}: {error.strerror or error}"
            if problem != self._problem:
                self._log("warning", "no_tailnet", api=self._name, what=problem,
                          do="It is tried again by itself")
            self._problem = problem
            return
        self._server, self._host, self._problem = server, host, ""
        try:
            server.start()
        except BaseException:  # no thread is to be had: the next call finds nothing here
            self._server = None
            server.stop()
            raise
        self._log("info", "listening", api=self._name, url=server.url)


class Tailnet:
    """What is known of it, kept up by a thread; start() and stop() from others.

    on_change(status()): from who looks.  _lock is held for what follows a look, and by stop().
    """

    def __init__(self, wanted: Optional[str], log: Log,
                 on_change: Callable[[Dict[str, Any]], None]) -> None:
        self._wanted, self._log, self._on_change = wanted, log, on_change
        self.reading = TailnetReading()  # replaced whole
        self._listeners: List[TailnetListener] = []
        self._lock, self._wake, self._stopping = threading.Lock(), Wake(), False
        self._heeded = "waiting"  # the state that on_change has been told of
        self._boot_until_s, self._trace_s = 0.0, 0.0
        self._thread = threading.Thread(target=self._run, name="tailnet", daemon=True)

    def serve(self, name: str, make: Callable[[str], Any]) -> None:
        """Before start(): listen on the address as well, as TailnetListener has it."""
        self._listeners.append(TailnetListener(name, make, self._log))

    def start(self) -> None:
        """Where there is a trace of Tailscale.  To be called again and again: it may be installed
        at any time."""
        if self._thread.ident is not None or self._stopping or now_s() < self._trace_s:
            return
        self._trace_s = now_s() + TAILNET_RARELY_S
        try:
            if tailnet_trace(self._wanted):
                self._boot_until_s = now_s() + TAILNET_BOOT_S
                self._thread.start()
        except Exception as error:  # no thread is to be had: the caller has more to do than this
            self._log.defect(error)

    def stop(self) -> None:
        """Its listeners are closed then, and none is opened any more."""
        with self._lock:
            self._stopping = True
            for listener in self._listeners:
                listener.follow("")
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(1.0)  # it may sit in a look: it is a daemon

    @property
    def settled(self) -> bool:
        """Nothing is on its way that would be worth a wait."""
        return (self._thread.ident is None or now_s() >= self._boot_until_s
                or self._heeded != "waiting")

    def status(self) -> Dict[str, Any]:
        told = self.reading
        return {"state": told.state, "address": told.address or None, "name": told.name or None,
                "source": told.source or None, "message": told.message}

    def look(self) -> None:
        """Now, and act on it; a few seconds where Tailscale hangs."""
        reading = read_tailnet(self._wanted)
        with self._lock:
            if self._stopping:
                return
            was, self.reading = self.reading, reading
            if was.source == "socket" and not reading.source:  # tailscaled is restarted, perhaps
                self._boot_until_s = now_s() + TAILNET_BOOT_S
            # How a program fails may read otherwise every time.
            if reading[:4] != was[:4] or reading.source and reading != was:
                self._log("notice" if reading.state == "up" else "info", "tailnet",
                          **{name: value or None for name, value in self.status().items()})
                self._on_change(self.status())
            self._heeded = reading.state
            for listener in self._listeners:
                listener.follow(reading.address if reading.tun else "")

    # -- its thread

    def _interval_s(self) -> float:
        if not self.settled:
            return 1.0
        told = self.reading
        runs = told.source != "socket" and not self._wanted and tailscale_program()
        return TAILNET_RARELY_S if runs or told.state == "none" else TAILNET_EVERY_S

    def _run(self) -> None:
        while not self._stopping:
            try:
                self.look()
            except Exception as error:  # a defect costs one look
                self._log.defect(error)
            self._wake.wait(self._interval_s())


# ----------------------------------------------------------------------
# 15c. Kubernetes and worker pods      k3s's API; reads kubeconfigs; a thread
# ----------------------------------------------------------------------
# The Jobs that the gateway makes on this machine's k3s, seen through its API:
# without kubectl, and with the authority that the kubeconfig names, always.
# Whose cluster it is, is decided by where the configuration was found: a
# cluster that somebody works with elsewhere is none of our business.

K3S_KUBECONFIG = "/etc/rancher/k3s/k3s.yaml"
K3S_CA_FILE = "/var/lib/rancher/k3s/server/tls/server-ca.crt"
# A hundred pods are 2 MB; of 8 MiB of JSON Python can make 180 MiB of objects.
KUBE_LIMIT_S, KUBE_MAX_BYTES, KUBE_LINE_BYTES = 15.0, 8 << 20, 2 << 20
# What k3s, k3d and Rancher Desktop write; k3d has its server at 0.0.0.0.
_K3S_CONTEXT = r"rancher-desktop|default|k3s|k3d-[\w.-]+"
_LOOPBACK = r"127\.[0-9.]+|::1|localhost|0\.0\.0\.0"
_RBAC_HINT = ("sudo b9agent.py k3s rbac --apply makes a kubeconfig that can do what is needed, and "
              "no more")

# What a kubeconfig may hold, and is not done: why.
_KUBE_REFUSED = (
    ("cluster", "insecure-skip-tls-verify", "a server that is not verified could be anybody, and "
     "would be told the token"),
    ("cluster", "proxy-url", "k3s runs on this machine"),
    ("user", "exec", "no program is run for a token"),
    ("user", "auth-provider", "no program is run for a token"),
    ("user", "username", "k3s takes no password any more since 1.19"),
    ("user", "password", "k3s takes no password any more since 1.19"))
_KUBE_FILES = ("certificate-authority", "client-certificate", "client-key", "tokenFile")


class KubeError(AgentError):
    """What a request to the Kubernetes API came to."""
    exit_code = Exit.UNREACHABLE


class KubeUnreachable(KubeError):
    """No answer: connection, TLS, time limit."""


class KubeUnauthorized(KubeError):
    """401: the token or certificate is unknown, or has run out."""
    exit_code = Exit.TOKEN_REFUSED


class KubeForbidden(KubeError):
    """403: known, and without the right to do this."""
    exit_code = Exit.REQUEST_REFUSED


class KubeGone(KubeError):
    """410: what a list or watch refers to is too old; list again."""


class KubeUnwell(KubeError):
    """5xx, 429, or no answer of Kubernetes.  retry_after_s: what it asks for."""
    retry_after_s: Optional[float] = None


class KubeConfig(NamedTuple):
    """endpoint: with its authority and the client's certificate.  token: "" for none.  source: the
    file or setting, for people."""
    endpoint: Endpoint
    token: str
    source: str


def _bare(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {name: _bare(child) for name, child in node.value.items()}
    return [_bare(child) for child in node.value] if isinstance(node.value, list) else node.value


def _kube_tree(text: str, path: str) -> Any:
    """A kubeconfig, which is YAML or JSON, as JSON has it.  Raises: UsageError."""
    try:
        return json.loads(text) if text.lstrip().startswith("{") else _bare(parse_yaml(text))
    except YamlError as error:
        raise UsageError(f"{path}:{error.line}: {error}", "`kubectl config view --raw --minify` "
                         "writes it in a form that is understood") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON, which it begins like", "Make it anew") from error


def _kube_entry(tree: Any, kind: str, name: Any, path: str) -> Dict[str, Any]:
    """The cluster, context or user of a name.  Raises: UsageError."""
    entries = tree.get(kind + "s") if isinstance(tree, dict) else None
    entries = entries if isinstance(entries, list) else []
    found = next((entry.get(kind) or {} for entry in entries
                  if isinstance(entry, dict) and entry.get("name") == name), None)
    if not isinstance(found, dict):
        raise UsageError(f"{path}: {kind}s has none named `{printable(str(name))[:60]}`",
                         "It is cut, or no kubeconfig: make it anew")
    for part, key, why in _KUBE_REFUSED:
        if part == kind and found.get(key) not in (None, "", "null", "false", False):
            raise UsageError(f"{path}: {kind}s[{printable(str(name))[:60]}].{key} is not "
                             f"supported: {why}", _RBAC_HINT)
    return found


def _kube_text(entry: Dict[str, Any], key: str, path: str) -> str:
    value = entry.get(key)
    if value is None or value == "null":
        return ""
    if not isinstance(value, str):
        raise UsageError(f"{path}: {key} is no text", "It is cut, or made by hand: make it anew")
    return value


def _kube_file(entry: Dict[str, Any], key: str, path: str) -> str:
    """The text of a file that a kubeconfig names, relative to itself; "" where it names none."""
    name = _kube_text(entry, key, path)
    if not name:
        return ""
    usable = printable(name) == name  # with a NUL in it, open() would not be the one to refuse it
    text = read_text(os.path.join(os.path.dirname(path), name)) if usable else None
    if text is None:
        raise UsageError(f"{path}: {key}: {printable(name)[:200]} cannot be read", "Mend the path "
                         "or its permissions, or run as the user whose file it is")
    return text


def _kube_pem(entry: Dict[str, Any], key: str, path: str) -> str:
    """What a kubeconfig holds as KEY-data, or in the file KEY."""
    import binascii
    data = _kube_text(entry, key + "-data", path)
    try:
        text = binascii.a2b_base64(data).decode("ascii") if data else _kube_file(entry, key, path)
    except ValueError:
        text = "none"
    if text and "-----BEGIN " not in text or not re.fullmatch(r"[A-Za-z0-9+/\s]*=*\s*", data):
        raise UsageError(f"{path}: {key} is no PEM", "It is cut, or made by hand: make it anew")
    return text


def parse_kubeconfig(text: str, path: str, alone: bool = False) -> KubeConfig:
    """Of the current context; the files that it names are read.  alone: it may name none.
    Raises: UsageError."""
    tree = _kube_tree(text, path)
    current = tree.get("current-context") if isinstance(tree, dict) else None
    context = _kube_entry(tree, "context", current, path)
    user = _kube_entry(tree, "user", context.get("user"), path) if context.get("user") else {}
    cluster = _kube_entry(tree, "cluster", context.get("cluster"), path)
    named = [key for key in _KUBE_FILES if alone and (user.get(key) or cluster.get(key))]
    if named:
        raise UsageError(f"{path} is another user's: root reads no {named[0]} for it",
                         f"sudo chown root {path}, or have it hold what it names")
    try:
        host, port = split_server(_kube_text(cluster, "server", path))
    except ValueError as error:
        raise UsageError(f"{path}: server cannot be used, expected {error}", _RBAC_HINT) from error
    certificate = _kube_pem(user, "client-certificate", path)
    key = _kube_pem(user, "client-key", path)
    token = _kube_text(user, "token", path) or _kube_file(user, "tokenFile", path).strip()
    if bool(certificate) != bool(key) or re.search("[^!-~]", token):
        raise UsageError(f"{path}: the user's token is no word, or its certificate lacks its key",
                         "Make it anew")
    REDACTOR.add(token)
    tls = TlsIdentity(_kube_pem(cluster, "certificate-authority", path),
                      key and f"{certificate}\n{key}")
    return KubeConfig(Endpoint("https", host, port, tls=tls), token, path)


def _token_config(settings: Any, ca_file: str) -> KubeConfig:
    """Of k3s.token, with an authority that verifies whom we tell it to.  Raises: UsageError."""
    ca_pem = read_text(ca_file)
    if ca_pem is None:
        raise UsageError(f"k3s.token is set, but {ca_file}, by which {settings.k3s_server} is "
                         "verified, cannot be read", "Set k3s.ca_file to a copy of "
                         f"{K3S_CA_FILE} that this user can read")
    host, port = split_server(settings.k3s_server)
    return KubeConfig(Endpoint("https", host, port, tls=TlsIdentity(ca_pem)), settings.k3s_token,
                      "k3s.token")


def kubeconfig_at(path: str) -> Optional[KubeConfig]:
    """None where there is no file to read.  Another user's may not make root read for it what it
    names, least of all as a token for a server that it names as well.  Raises: UsageError."""
    try:
        with open(path, "rb") as handle:
            text = handle.read(1 << 20).decode("utf-8", "replace")
            alone = os.geteuid() == 0 != os.fstat(handle.fileno()).st_uid
    except OSError:
        return None
    return parse_kubeconfig(text, path, alone)


def _users_kubeconfig() -> Optional[KubeConfig]:
    """The user's own, where its current context is k3s on this machine.  Most of them are not, and
    may hold what we do not read: they are not even parsed."""
    path = os.path.expanduser("~/.kube/config")
    text = read_text(path) or ""
    if not re.search(rf"""(?m)^\s*["']?current-context["']?: *["']?({_K3S_CONTEXT})["',\s]""", text
                     ) or not re.search(rf"https://\[?({_LOOPBACK})\]?:", text):
        return None
    config = kubeconfig_at(path)
    return config if config and re.fullmatch(_LOOPBACK, config.endpoint.host) else None


def read_kubeconfig(settings: Any, installed: str = K3S_KUBECONFIG,
                    ca_file: str = K3S_CA_FILE) -> Optional[KubeConfig]:
    """The first of: k3s.kubeconfig; what `k3s rbac` made; k3s.token with k3s.ca_file; k3s's own;
    the user's, where it is of k3s on this machine; k3s.token with k3s's own authority.  None where
    there is no k3s.  Raises: UsageError that says what to mend.
    """
    ours = os.path.join(settings.state_dir, "k3s.kubeconfig")
    for path in (settings.k3s_kubeconfig, ours):
        config = kubeconfig_at(path) if path else None
        if config is not None:
            return config
        if path and (path != ours or os.path.lexists(path)):
            raise UsageError(f"{path} cannot be read", "Mend the path (k3s.kubeconfig), or its "
                             "permissions")
    if settings.k3s_token and settings.k3s_ca_file:
        return _token_config(settings, settings.k3s_ca_file)
    config = kubeconfig_at(installed) or _users_kubeconfig()
    if config is None and settings.k3s_token:
        return _token_config(settings, ca_file)
    if config is None and os.path.lexists(installed):
        raise UsageError(f"{installed} is there, and this user cannot read it", _RBAC_HINT)
    return config


class KubeClient:
    """The API of one cluster.  From any thread; each request has a connection of its own."""

    def __init__(self, config: KubeConfig) -> None:
        self.config = config

    def request(self, method: str, path: str, body: Optional[Dict[str, Any]] = None,
                content_type: str = "application/json") -> Tuple[int, Dict[str, Any]]:
        """(status, answer): 2xx, and those 4xx that the caller knows best.  Raises: KubeError."""
        sent = None if body is None else json.dumps(body).encode()
        with self._open(method, path, sent, content_type, None) as stream:
            return stream.status, self._answer(stream)

    def watch(self, path: str, idle_limit_s: float,
              opened: Callable[[HttpStream], None] = lambda stream: None
              ) -> Iterator[Dict[str, Any]]:
        """Events as they come, until the server or the network ends them; of a line that was cut
        nothing is told.  opened(stream): its cut() ends the watch from another thread.
        Raises: KubeError, for an event of type ERROR as well."""
        with self._open("GET", path, None, "", idle_limit_s) as stream:
            if stream.status != 200:
                raise self._strange(self._answer(stream))
            opened(stream)
            try:
                for line in stream.lines(KUBE_LINE_BYTES):
                    event = _json_object(line)
                    detail = event.get("object")
                    if not isinstance(detail, dict):
                        return  # the beginning of a line, where the answer's end is its only mark
                    if event.get("type") == "ERROR":
                        raise self._error(detail.get("code"), detail) or self._strange(detail)
                    yield event
            except HttpFailure as failure:
                if failure.kind in ("too_large", "garbage"):
                    raise self._strange({"message": str(failure)}) from failure

    def _open(self, method: str, path: str, body: Optional[bytes], content_type: str,
              idle_limit_s: Optional[float]) -> HttpStream:
        headers = {"Authorization": f"Bearer {self.config.token}"} if self.config.token else {}
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            return http_stream(method, self.config.endpoint, path, headers, body, KUBE_LIMIT_S,
                               idle_limit_s)
        except HttpFailure as failure:
            raise self._unreachable(failure) from failure

    def _answer(self, stream: HttpStream) -> Dict[str, Any]:
        try:
            answer = _json_object(stream.read(KUBE_MAX_BYTES))
        except HttpFailure as failure:
            raise self._unreachable(failure) from failure
        error = self._error(stream.status, answer)
        if isinstance(error, KubeUnwell):
            error.retry_after_s = _retry_after_s(stream.headers.get("retry-after", ""))
        if error or not answer:
            raise error or self._strange(answer)
        return answer

    def _error(self, status: Any, answer: Dict[str, Any]) -> Optional[KubeError]:
        """Of an answer, or of the Status in a watch; None where the caller decides."""
        where, status = self.config.endpoint.url, status if isinstance(status, int) else 500
        said = self.said(answer)
        if status == 410 or status >= 400 and answer.get("reason") in ("Gone", "Expired"):
            return KubeGone(f"k3s at {where} has forgotten that version: {said}")
        if status == 401:
            return KubeUnauthorized(f"k3s at {where} does not accept who we are, as "
                                    f"{self.config.source} has it", "It has run out, or k3s was "
                                    f"made anew. {_RBAC_HINT}")
        if status == 403:
            return KubeForbidden(f"k3s at {where} refuses: {said}", _RBAC_HINT)
        if status == 429 or status >= 500 or 300 <= status < 400:
            return KubeUnwell(f"k3s at {where} is unwell: it answered {status}, {said}",
                              "It may be starting; its log: journalctl -u k3s")
        return None

    def said(self, answer: Dict[str, Any]) -> str:
        return printable(REDACTOR.scrub(str(answer.get("message") or "no message")))[:300]

    def _strange(self, answer: Dict[str, Any]) -> KubeUnwell:
        return KubeUnwell(f"{self.config.endpoint.url} does not answer as Kubernetes does: "
                          f"{self.said(answer)}", f"Is the server in {self.config.source} the "
                          "right one?")

    def _unreachable(self, failure: HttpFailure) -> KubeError:
        if failure.kind in ("too_large", "garbage"):
            return self._strange({"message": str(failure)})
        hint = (f"The authority in {self.config.source} is another server's, or of before k3s was "
                f"made anew. {_RBAC_HINT}" if failure.kind == "tls" else
                "Does it run? sudo systemctl status k3s; on macOS start Rancher Desktop")
        return KubeUnreachable(f"k3s at {self.config.endpoint.url} is not reached: {failure}", hint)


# -- worker pods -------------------------------------------------------

PODS_PATH = "/api/v1/namespaces/default/pods"  # where the gateway makes its Jobs, on every k3s
PODS_KEPT, PODS_TOLD, POD_PAGES = 1000, 100, 20
_POD_LABEL = "run.beam.cloud/"
# Worker pods carry no function's name: one worker runs containers of many.  A gateway that makes a
# pod for one stub says so in this label, which the predecessor looked for.
_STUB_LABEL = "beta9.io/stub-id"


class PodPace(NamedTuple):
    """Seconds.  look_s: between looks for a kubeconfig; idle_s: longest silence of a watch, which
    hears a bookmark a minute; watch_s: what a watch lasts; soon_s: a shorter one is no good;
    read_s: until the kubeconfig is read again, though all is well; keep_s: how long pods that
    cannot be asked for any more still count."""
    first_s: float = 1.0
    most_s: float = 30.0
    look_s: float = 60.0
    idle_s: float = 100.0
    watch_s: int = 270
    soon_s: float = 1.0
    read_s: float = 3600.0
    keep_s: float = 300.0


class Pod(NamedTuple):
    """status: PENDING, RUNNING, COMPLETED or FAILED.  created, started, finished: as the API writes
    times.  containers: those that run."""
    name: str
    worker_id: Optional[str]
    status: str
    function: Optional[str]
    reason: Optional[str]
    created: Optional[str]
    started: Optional[str]
    finished: Optional[str]
    exit_code: Optional[int]
    restarts: int
    containers: int


def parse_kube_time(stamp: Any) -> Optional[float]:
    """
    >>> parse_kube_time("1970-01-02T00:00:00Z"), parse_kube_time("2026-13-01T00:00:00Z")
    (86400.0, None)
    """
    match = re.fullmatch(r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})"
                         r"(?:\.[0-9]{1,9})?Z", stamp if isinstance(stamp, str) else "")
    if not match:
        return None
    import calendar
    try:
        return float(calendar.timegm(tuple(map(int, match.groups()))))
    except (ValueError, OverflowError):
        return None


def _object(value: Any, *path: str) -> Dict[str, Any]:
    """The object at a path of keys, or {}."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _word(value: Any) -> Optional[str]:
    return printable(value)[:253] if isinstance(value, str) and value else None


def _count(value: Any) -> Optional[int]:
    """An int32."""
    return value if type(value) is int and abs(value) < 1 << 31 else None


def _main_container(thing: Dict[str, Any]) -> Dict[str, Any]:
    """The status of `worker`, else of the first one in the spec: the API sorts them by name."""
    found = {str(one.get("name")): one
             for one in objects_in(_object(thing, "status").get("containerStatuses"))}
    names = ["worker"] + [str(one.get("name"))
                          for one in objects_in(_object(thing, "spec").get("containers"))]
    return next((found[name] for name in names if name in found), {})


def _pod_reason(thing: Dict[str, Any], state: Dict[str, Any]) -> Optional[str]:
    """Why it is not simply running, or done: as `kubectl get pods` says it."""
    status = _object(thing, "status")
    if "running" in state:
        return "Terminating" if _object(thing, "metadata").get("deletionTimestamp") else None
    said = [status.get("reason"), _object(state, "terminated").get("reason")]
    for one in objects_in(status.get("initContainerStatuses")):
        waits = _word(_object(one, "state", "waiting").get("reason"))
        said.append(waits and waits != "PodInitializing" and f"Init:{waits}")
        code = _count(_object(one, "state", "terminated").get("exitCode"))
        said.append(code and f"Init:ExitCode:{code}")
    said += [one.get("reason") for one in objects_in(status.get("conditions"))
             if one.get("type") == "PodScheduled" and one.get("status") == "False"]
    said.append(_object(state, "waiting").get("reason"))
    reason = next((word for word in map(_word, said) if word), None)
    return None if reason == "Completed" else reason


def parse_pod(thing: Any) -> Optional[Pod]:
    """A pod of the API; None for what is none.  What is not said is None."""
    metadata, status = _object(thing, "metadata"), _object(thing, "status")
    name, phase, main = _word(metadata.get("name")), status.get("phase"), {}
    if name is None:
        return None
    main = _main_container(thing)
    state, labels = _object(main, "state"), _object(metadata, "labels")
    reason, runs = _pod_reason(thing, state), _object(state, "running")
    crashed = reason is not None and reason.endswith("CrashLoopBackOff")
    done = _object(state, "terminated") or (_object(main, "lastState", "terminated")
                                            if crashed else {})
    code = _count(done.get("exitCode"))
    ended = ("COMPLETED" if phase == "Succeeded" else "FAILED" if phase == "Failed" or crashed
             else "COMPLETED" if code == 0 else "FAILED" if done else "")
    waits = "running" not in state and (state or phase != "Running")
    times = [stamp if parse_kube_time(stamp) is not None else None for stamp in (
        metadata.get("creationTimestamp"), runs.get("startedAt") or done.get("startedAt"),
        done.get("finishedAt"))]
    return Pod(name, _word(labels.get(_POD_LABEL + "worker-id")),
               ended or ("PENDING" if waits else "RUNNING"), _word(labels.get(_STUB_LABEL)), reason,
               *times, code, max(0, _count(main.get("restartCount")) or 0),
               sum("running" in _object(one, "state")
                   for one in objects_in(status.get("containerStatuses"))))


def pod_record(pod: Pod, wall_s: float) -> Dict[str, Any]:
    """As GET /status has it.  A clock that was set back makes no negative duration."""
    record = pod._asdict()
    started_s, finished_s = parse_kube_time(pod.started), parse_kube_time(record.pop("finished"))
    until_s = wall_s if pod.status == "RUNNING" else finished_s
    record["duration_seconds"] = None if started_s is None or until_s is None else round(
        max(0.0, until_s - started_s), 1)
    return record


class PodWatch:
    """The gateway's worker pods on this machine's k3s, by the labels that they carry.  start()
    any number of times, stop() once; the rest from any thread.

    The machine's own label is looked at here and not by the API: older gateways do not set it, and
    all workers on a machine's k3s are its own then.
    """

    def __init__(self, settings: Any, machine_id: str, log: Log, pace: PodPace = PodPace(),
                 read: Callable[[Any], Optional[KubeConfig]] = read_kubeconfig) -> None:
        self._settings, self._machine_id, self._log = settings, machine_id, log
        self._pace, self._read = pace, read
        self._pods: Optional[Dict[str, Pod]] = None  # replaced whole; None: never listed
        self._told: Tuple[str, str, Optional[str]] = ("off", "", None)  # state, message, server
        self._failures, self._at_once_s = 0, -60.0
        self._lost_s: Optional[float] = None  # since when it is failed
        self._stopping, self._wake = False, Wake()
        self._stream: Optional[HttpStream] = None
        self._opened_s: Optional[float] = None  # when the watch was answered
        self._thread = threading.Thread(target=self._run, name="pods", daemon=True)

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        stream = self._stream
        if stream is not None:
            stream.cut()
        if self._thread.ident is not None:
            self._thread.join(2.0)  # it may sit in a request: it is a daemon and changes nothing

    def pods(self) -> Optional[List[Pod]]:
        """The newest first; None where they are not known, or not any more."""
        lost_s = self._lost_s
        lost = lost_s is not None and now_s() - lost_s > self._pace.keep_s
        pods = {} if self._told[0] == "off" else None if lost else self._pods
        return pods if pods is None else sorted(pods.values(), key=lambda pod: pod.created or "",
                                                reverse=True)

    def counts(self) -> Optional[Dict[str, int]]:
        """{status: number of pods}."""
        pods = self.pods()
        return None if pods is None else dict(collections.Counter(pod.status for pod in pods))

    @property
    def state(self) -> str:
        return self._told[0]

    def status(self) -> Dict[str, Any]:
        state, message, server = self._told
        wall_s = time.time()
        return {"state": state, "server": server, "message": message,
                "pods": [pod_record(pod, wall_s) for pod in (self.pods() or [])[:PODS_TOLD]]}

    # -- its thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                wait_s = self._follow()
            except AgentError as error:
                wait_s = self._failed(error)
            except Exception as error:  # a defect costs the pods, not the agent
                self._log.defect(error)
                wait_s = self._pace.look_s
            self._wake.wait(wait_s)

    def _follow(self) -> float:
        """As long as all is well; how long to wait where there is no k3s.  Raises: AgentError."""
        config = self._read(self._settings)
        if config is None:
            self._pods = None
            self._tell("off", "", None)
            return self._pace.look_s
        if self._told[2] != config.endpoint.url:
            self._tell("connecting", "", config.endpoint.url)
        client = KubeClient(config)
        version, until_s = self._list(client), now_s() + self._pace.read_s
        while not self._stopping and now_s() < until_s:
            version = self._watch(client, version)
        return 0.0

    def _failed(self, error: AgentError) -> float:
        """Seconds to wait.  A list that is too old, or a token that was renewed, needs none: once,
        that is."""
        if self._stopping:
            return 0.0
        if isinstance(error, (KubeGone, KubeUnauthorized)) and now_s() - self._at_once_s > 10.0:
            self._at_once_s = now_s()
            return 0.0
        server = self._told[2] if isinstance(error, KubeError) else None
        self._tell("failed", printable(REDACTOR.scrub(str(error))), server)
        if isinstance(error, UsageError):
            return self._pace.look_s
        self._failures += 1
        wait_s = min(self._pace.most_s, self._pace.first_s * 2.0 ** min(self._failures - 1, 10))
        asked_s = getattr(error, "retry_after_s", None) or 0.0
        return max(random_between(wait_s / 2, wait_s), min(asked_s, 60.0))

    def _path(self, **query: Any) -> str:
        from urllib.parse import urlencode
        query["labelSelector"] = _POD_LABEL + "role=worker"
        return f"{PODS_PATH}?{urlencode(query)}"

    def _list(self, client: KubeClient) -> str:
        """All of them, page by page; the version that they are of."""
        found: Dict[str, Pod] = {}
        query: Dict[str, Any] = {"limit": 100}
        for _ in range(POD_PAGES):
            status, answer = client.request("GET", self._path(**query))
            if status != 200 or not isinstance(answer.get("items"), list):
                raise KubeUnwell(f"{client.config.endpoint.url} lists no pods, but answers "
                                 f"{status}", "Is it a Kubernetes API?")
            for thing in answer["items"]:
                self._take(found, thing)
            metadata = _object(answer, "metadata")
            query["continue"] = metadata.get("continue")
            if not re.fullmatch("[!-~]{1,4096}", str(query["continue"] or "")):
                break
        self._pods = found
        return _word(metadata.get("resourceVersion")) or ""

    def _take(self, pods: Dict[str, Pod], thing: Any, deleted: bool = False) -> None:
        pod, labels = parse_pod(thing), _object(thing, "metadata", "labels")
        ours = labels.get(_POD_LABEL + "role") == "worker" and labels.get(
            _POD_LABEL + "machine-id", self._machine_id) == self._machine_id
        if pod is None:
            return
        if deleted or not ours:
            pods.pop(pod.name, None)
        elif pod.name in pods or len(pods) < PODS_KEPT:
            pods[pod.name] = pod

    def _watch(self, client: KubeClient, version: str) -> str:
        """One watch, to its end; the version that it has seen."""
        self._opened_s = None
        path = self._path(watch="true", allowWatchBookmarks="true", resourceVersion=version,
                          timeoutSeconds=self._pace.watch_s)
        try:
            for event in client.watch(path, self._pace.idle_s, self._opened):
                version = self._heed(event) or version
        finally:
            lasted_s = 0.0 if self._opened_s is None else now_s() - self._opened_s
            if lasted_s > self._pace.soon_s:
                self._failures = 0
        if lasted_s <= self._pace.soon_s and not self._stopping:
            self._failures += 1
            if self._failures > 2:
                raise KubeUnwell(f"k3s at {client.config.endpoint.url} ends every watch at once",
                                 "It may be starting; its log: journalctl -u k3s")
            self._wake.wait(self._pace.first_s)
        return version

    def _heed(self, event: Dict[str, Any]) -> Optional[str]:
        """The version that an event moves us to."""
        if event.get("type") != "BOOKMARK":
            pods = dict(self._pods or {})
            self._take(pods, event["object"], event.get("type") == "DELETED")
            self._pods = pods
        return _word(_object(event, "object", "metadata").get("resourceVersion"))

    def _opened(self, stream: HttpStream) -> None:
        self._stream, self._opened_s = stream, now_s()
        if self._stopping:
            stream.cut()
        self._tell("watching", "", self._told[2])

    def _tell(self, state: str, message: str, server: Optional[str]) -> None:
        if (state, message, server) != self._told:
            self._told = (state, message, server)
            self._lost_s = None if state != "failed" else self._lost_s or now_s()
            level = {"failed": "warning", "watching": "info"}.get(state, "debug")
            self._log(level, "pods", state=state, server=server, what=message or None)


# ----------------------------------------------------------------------
# 15d. k3s: rights and tokens          the Kubernetes API; STATE/k3s.kubeconfig
# ----------------------------------------------------------------------
# What the gateway may do on this machine's k3s, and the tokens with which it
# does that.  One table: a row for every call that the gateway's source makes
# with the token of the registration.  Manifest, `k3s check` and README come
# out of it.  Whoever may make Jobs may make a privileged one, as workers are,
# and so owns the machine: no Role can narrow that.  But a token that ends by
# itself is worth little to who finds it, and this one asks for no Secret.

K3S_NAMESPACE = "default"  # the gateway's own constant for machines that register
GATEWAY_ACCOUNT, AGENT_ACCOUNT = "beta9-gateway", "beta9-agent"
OWN_TOKEN_HOURS = 30 * 24  # of the agent's own token, in STATE/k3s.kubeconfig
_RBAC_GROUP = "rbac.authorization.k8s.io"
_REVIEWS = "/apis/authorization.k8s.io/v1"
_KUBE_KINDS = {"ServiceAccount": ("/api/v1", "serviceaccounts"),
               "Role": (f"/apis/{_RBAC_GROUP}/v1", "roles"),
               "RoleBinding": (f"/apis/{_RBAC_GROUP}/v1", "rolebindings")}


class KubeRefused(KubeError):
    """It was understood, and is not so."""
    exit_code = Exit.REQUEST_REFUSED


class Right(NamedTuple):
    """One verb on one resource, in one namespace.  names: of these objects alone."""
    group: str
    resource: str
    verb: str
    why: str
    names: Tuple[str, ...] = ()

    def __str__(self) -> str:
        names = f" of {' and '.join(self.names)}" if self.names else ""
        return f"{self.verb} {self.resource}{names}"


# Source: beta9's pkg/scheduler, pool_external.go (later pool_provider.go) and pool_cleaner.go: all
# that is done with the client of getProxiedClient().
GATEWAY_RIGHTS = (
    Right("batch", "jobs", "create", "a worker starts as a Job (createWorkerOnMachine)"),
    Right("batch", "jobs", "list", "which workers there are, by label (Clean)"),
    Right("batch", "jobs", "delete", "a worker that hangs or is forgotten, and with it its pods "
                                     "(deleteWorkerResources)"),
    Right("", "pods", "list", "how the pods of each of these Jobs are (Clean)"),
)


def k3s_accounts(gateway: str) -> Dict[str, Tuple[Right, ...]]:
    """{service account: its rights}.  gateway: the name of the gateway's."""
    return {gateway: GATEWAY_RIGHTS, AGENT_ACCOUNT: (
        Right("", "pods", "list", "the dashboard's worker pods"),
        Right("", "pods", "watch", "as they change"),
        Right("", "serviceaccounts/token", "create", "renews the gateway's token, and its own",
              (gateway, AGENT_ACCOUNT)))}


def k3s_objects(namespace: str, gateway: str) -> List[Dict[str, Any]]:
    """Both accounts, a Role and a RoleBinding for each; nothing of the cluster's."""
    objects: List[Dict[str, Any]] = []
    for name, rights in k3s_accounts(gateway).items():
        named = {"metadata": {"name": name, "namespace": namespace}}
        rules = [dict({"apiGroups": [right.group], "resources": [right.resource],
                       "verbs": [right.verb]},
                      **({"resourceNames": list(right.names)} if right.names else {}))
                 for right in rights]
        objects += [
            {"apiVersion": "v1", "kind": "ServiceAccount", **named,
             "automountServiceAccountToken": False},
            {"apiVersion": f"{_RBAC_GROUP}/v1", "kind": "Role", **named, "rules": rules},
            {"apiVersion": f"{_RBAC_GROUP}/v1", "kind": "RoleBinding", **named,
             "roleRef": {"apiGroup": _RBAC_GROUP, "kind": "Role", "name": name},
             "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}]}]
    return objects


def render_manifest(namespace: str, gateway: str) -> str:
    """For `kubectl apply -f -`.  A value of JSON is one of YAML, and no reader takes it for
    anything else; each rule says why it is there."""
    accounts, documents = k3s_accounts(gateway), []
    for item in k3s_objects(namespace, gateway):
        lines = [f"{name}: {json.dumps(value)}" for name, value in item.items() if name != "rules"]
        if "rules" in item:
            rights = accounts[item["metadata"]["name"]]
            lines += ["rules:"] + [f"  - {json.dumps(rule)}  # {right.why}"
                                   for rule, right in zip(item["rules"], rights)]
        documents.append("\n".join(lines))
    return "\n---\n".join(documents) + "\n"


def kube_names(settings: Any, options: Dict[str, str]) -> Tuple[str, str]:
    """(namespace, the gateway's service account).  Raises: UsageError."""
    names = (option_value(options, "namespace", parse_kube_name) or K3S_NAMESPACE,
             option_value(options, "service-account", parse_kube_name)
             or settings.k3s_service_account or GATEWAY_ACCOUNT)
    if names[1] == AGENT_ACCOUNT:
        raise UsageError(f"{AGENT_ACCOUNT} is the agent's own account", "The gateway's must be "
                         "another: what it may do is another thing")
    return names


def kube_answer(kube: KubeClient, method: str, path: str,
                body: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """{} for what is not there.  Raises: KubeError; KubeRefused for other 4xx."""
    status, answer = kube.request(method, path, body)
    if status >= 300 and status != 404:
        raise KubeRefused(f"k3s refused {method} {path}: {status}, {kube.said(answer)}",
                          "b9agent.py k3s check")
    return {} if status == 404 else answer


def _holds(live: Dict[str, Any], item: Dict[str, Any]) -> bool:
    """Whether an object of the server's says what ours does; it may say more of itself."""
    return all(live.get(name) == value for name, value in item.items()
               if name not in ("apiVersion", "kind", "metadata"))


def apply_object(kube: KubeClient, item: Dict[str, Any]) -> str:
    """Make it so, see that it is, and say what was done.  Raises: KubeError."""
    group, plural = _KUBE_KINDS[item["kind"]]
    folder = f"{group}/namespaces/{item['metadata']['namespace']}/{plural}"
    path = f"{folder}/{item['metadata']['name']}"
    live = kube_answer(kube, "GET", path)
    if live and _holds(live, item):
        return "unchanged"
    replaced = live and live.get("roleRef") != item.get("roleRef")
    if replaced:  # what role a binding is of, it keeps for ever
        kube_answer(kube, "DELETE", path)
    if live and not replaced:
        kube_answer(kube, "PUT", path, {**live, **item, "metadata": live["metadata"]})
    elif not kube_answer(kube, "POST", folder, item):
        raise KubeRefused(f"there is no namespace {item['metadata']['namespace']}",
                          f"kubectl create namespace {item['metadata']['namespace']}")
    live_now = kube_answer(kube, "GET", path)
    if not live_now or not _holds(live_now, item):
        raise KubeRefused(f"{item['kind']} {item['metadata']['name']} is not what was written",
                          "Does something else on this cluster manage it?")
    return "replaced" if replaced else "changed" if live else "created"


def may(kube: KubeClient, namespace: str, right: Right) -> bool:
    """Whether the client has a right; of several names, on each.  Raises: KubeError."""
    resource, _, below = right.resource.partition("/")
    asked = {"namespace": namespace, "group": right.group, "resource": resource,
             "subresource": below, "verb": right.verb}
    answers = [kube_answer(kube, "POST", f"{_REVIEWS}/selfsubjectaccessreviews", {
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {**asked, "name": name}}}) for name in right.names or ("",)]
    return all(_object(answer, "status").get("allowed") is True for answer in answers)


def _texts(value: Any) -> List[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def excess_rights(answer: Dict[str, Any], rights: Sequence[Right]) -> List[str]:
    """What a SelfSubjectRulesReview tells beyond the table and beyond what everybody may ask about
    himself, such as `get secrets`."""
    known = {(right.group, right.resource, right.verb, name) for right in rights
             for name in right.names or ("",)}
    found = []
    for rule in objects_in(_object(answer, "status").get("resourceRules")):
        for group in _texts(rule.get("apiGroups")):
            for resource in _texts(rule.get("resources")):
                if group.endswith(".k8s.io") and resource.startswith("selfsubject"):
                    continue
                found += [f"{verb} {resource}{' of ' + group if group else ''}".replace(
                              "* * of *", "everything (cluster-admin)")
                          for verb in _texts(rule.get("verbs"))
                          for name in _texts(rule.get("resourceNames")) or ("",)
                          if (group, resource, verb, name) not in known]
    return sorted(set(found))


def read_rights(kube: KubeClient, namespace: str) -> Dict[str, Any]:
    """All that the client may do there.  Raises: KubeError."""
    return kube_answer(kube, "POST", f"{_REVIEWS}/selfsubjectrulesreviews", {
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace}})


def mint_token(kube: KubeClient, namespace: str, account: str,
               life_s: int) -> Tuple[str, float]:
    """(token, when it ends, in seconds since 1970), which may be sooner than was asked for.

    Raises: KubeError.
    """
    answer = kube_answer(
        kube, "POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token",
        {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
         "spec": {"expirationSeconds": life_s}})
    if not answer:
        raise KubeRefused(f"there is no service account {account} in {namespace}",
                          "sudo b9agent.py k3s rbac --apply")
    status = _object(answer, "status")
    token, ends_s = str(status.get("token")), parse_kube_time(status.get("expirationTimestamp"))
    if not re.fullmatch("[!-~]{16,16384}", token) or ends_s is None:
        raise KubeError("k3s answered without a token, or without its end", "b9agent.py k3s check")
    REDACTOR.add(token)
    return token, ends_s


def token_claims(token: str) -> Dict[str, Any]:
    """What a service account's token says of itself: `sub`, and `iat` and `exp` where they are
    times; {} for any other."""
    import base64
    body = (token.split(".") + [""])[1]
    try:
        claims = _json_object(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except ValueError:
        return {}
    return {name: value for name, value in claims.items()
            if name == "sub" or type(value) is int and 0 < value < 1 << 33}


def with_token(config: KubeConfig, token: str) -> KubeConfig:
    """The same server, as whom the token is; without a certificate of ours."""
    tls = TlsIdentity(config.endpoint.tls.ca_pem)
    return KubeConfig(config.endpoint._replace(tls=tls), token, "the gateway's token")


def render_kubeconfig(config: KubeConfig, token: str) -> str:
    """For the agent: the same server, another user.  JSON, which every reader of YAML reads."""
    import base64
    ca_data = base64.b64encode(config.endpoint.tls.ca_pem.encode()).decode()
    cluster = {"server": config.endpoint.url, "certificate-authority-data": ca_data}
    return json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": AGENT_ACCOUNT,
        "clusters": [{"name": "k3s", "cluster": cluster}],
        "users": [{"name": AGENT_ACCOUNT, "user": {"token": token}}],
        "contexts": [{"name": AGENT_ACCOUNT,
                      "context": {"cluster": "k3s", "user": AGENT_ACCOUNT}}]}) + "\n"


def renew_own_token(config: KubeConfig, path: str) -> None:
    """In the agent's kubeconfig, where two thirds of its life are over.  Raises: KubeError."""
    claims = token_claims(config.token)
    begun_s, ends_s = claims.get("iat"), claims.get("exp")
    if (config.source != path or begun_s is None or ends_s is None
            or time.time() < begun_s + (ends_s - begun_s) * 2 / 3):
        return
    token, _ = mint_token(KubeClient(config), K3S_NAMESPACE, AGENT_ACCOUNT, OWN_TOKEN_HOURS * 3600)
    try:
        write_atomic(path, render_kubeconfig(config, token))
    except OSError as error:
        raise KubeError(f"cannot write {path}: {error.strerror}", "Is the disk full?") from error


class TokenKeeper:
    """Keeps the gateway's token alive.  mint() makes one, as mint_token(); take(token) hands it on.
    step() does what is due and says how long to wait; its thread calls it until stop().

    Renewed at two thirds of its life, which leaves a third for an API that is away.
    """

    def __init__(self, mint: Callable[[], Tuple[str, float]], take: Callable[[str], None],
                 log: Log, clock: Callable[[], float] = now_s,
                 uniform: Callable[[float, float], float] = random_between) -> None:
        self._mint, self._take, self._log = mint, take, log
        self._clock, self._uniform = clock, uniform
        self._failures, self._worst = 0, 0
        self._ends_s: Optional[float] = None  # on the steady clock
        self.told: Tuple[Optional[float], str] = (None, "")  # its end since 1970, message; at once
        self._stopping, self._wake, self._due_s, self._wall_ahead_s = False, Wake(), 0.0, 0.0
        self._thread = threading.Thread(target=self._run, name="k3s-token", daemon=True)

    def renew(self) -> float:
        """How long it lasts, in seconds.  Raises: AgentError."""
        token, ends_wall_s = self._mint()
        # By the server's clock, as its end is.
        life_s = ends_wall_s - token_claims(token).get("iat", time.time())
        if life_s <= 0:
            raise KubeError("k3s made a token that has ended", "Are its clock and ours right?")
        self._failures, self._worst, self._ends_s = 0, 0, self._clock() + life_s
        self.told = ends_wall_s, ""
        self._take(token)
        self._log("info", "k3s_token", ends=utc_stamp(ends_wall_s))
        return life_s

    def step(self) -> float:
        try:
            return max(1.0, self.renew() * self._uniform(0.62, 0.7))
        except AgentError as error:
            return self._failed(error)

    def _failed(self, error: AgentError) -> float:
        self._failures += 1
        left_s = None if self._ends_s is None else self._ends_s - self._clock()
        end = ("and the gateway has none" if left_s is None else
               "and it has ended: the gateway starts no workers here" if left_s <= 0 else
               f"it ends in {left_s:.0f} s")
        self.told = self.told[0], f"the k3s token is not renewed: {error.what}; {end}"
        wait_s = max(1.0, self._uniform(0.5, 1.0) * min(60.0, 2.0 ** min(self._failures, 10)))
        # Loud when it begins, from time to time, and when it grows worse: minutes left, none left.
        was, self._worst = self._worst, sum((left_s or 0.0) <= bound for bound in (600.0, 0.0))
        loud = self._worst > was or self._failures & (self._failures - 1) == 0
        self._log("debug" if not loud else "error" if self._worst else "warning", "k3s_token",
                  what=self.told[1], do=error.hint or None, retry_s=round(wait_s, 1))
        return wait_s

    def start(self) -> None:
        """One step here and now, so that the first registration has a token."""
        self._safe_step()
        self._thread.start()

    def _safe_step(self) -> None:
        try:
            wait_s = self.step()
        except Exception as error:  # a defect costs a minute, not the token, nor the agent
            self._log.defect(error)
            wait_s = 60.0
        self._due_s, self._wall_ahead_s = self._clock() + wait_s, time.time() - self._clock()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(2.0)  # it may sit in a request: it is a daemon

    def _run(self) -> None:
        while not self._stopping:
            left_s = self._due_s - self._clock()
            # k3s is on this machine: where its clock was set, as at boot, a token of before has
            # ended, or is not valid yet.
            if left_s > 0 and abs(time.time() - self._clock() - self._wall_ahead_s) < 60.0:
                self._wake.wait(min(left_s, 30.0))  # a machine that slept finds it overdue
            else:
                self._safe_step()


# ----------------------------------------------------------------------
# 16a. Dashboard: the frame                                   no effects
# ----------------------------------------------------------------------
# From what is known and the size of a terminal to the lines of a screen:
# text and its width in cells, what lines are put together from, the parts
# of the screen, and the table that says which of them go first where there
# are too few rows.  A status is another program's answer: any of it may be
# missing, or something else than it should be.


class View(NamedTuple):
    """What a dashboard shows.  status: as GET /status, {} before the first; age_s: of it, where it
    could not be had anew, and problem: why.  lines: the newest records of the log, as GET /logs has
    them, oldest first.  history: oldest first, by "cpu", "memory", "power", "tokens", and "gpu0" …
    as they stand in status.  pane: "" for the main one, "logs", "doctor" or "help"; scroll: lines
    back from the newest in "logs", lines down from the top in the others.  filter: what a line of
    the log must have in it, case ignored.  prompt: where a line is typed, the question and what is
    typed so far.  note: what came of the last key.  report: the doctor's lines."""
    status: Dict[str, Any]
    lines: Tuple[Dict[str, Any], ...] = ()
    history: Dict[str, Tuple[float, ...]] = {}
    age_s: Optional[float] = None
    problem: str = ""
    pane: str = ""
    scroll: int = 0
    filter: str = ""
    prompt: Optional[str] = None
    note: str = ""
    report: Tuple[str, ...] = ()


class Look(NamedTuple):
    """What a terminal can show."""
    utf8: bool
    color: bool


Line = List[Tuple[str, str]]  # clean texts, each with its style: a key of _SGR, or ""
_SGR = {"ok": "32", "warn": "33", "bad": "31", "dim": "2", "head": "1"}
_ASCII = str.maketrans("╔╗╚╝╠╣╟╢║│═─█▉▊▋▌▍▎▏░▁▂▃▄▅▆▇…–°", "++++++++||=-#####...._.:-=+*~- ")
# Terminals disagree on how wide these are (conjoining Jamo, symbols that Unicode 16 made wide,
# halves of flags), as they do on spacing marks (Mc).
_DISPUTED = ((0x1160, 0x11FF), (0x2630, 0x2637), (0x268A, 0x268F), (0x3164, 0x3164),
             (0x4DC0, 0x4DFF), (0xD7B0, 0xD7FF), (0xFFA0, 0xFFA0), (0x1D300, 0x1D376),
             (0x1F1E6, 0x1F1FF))


# -- text and its width ---------------------------------------------------

@functools.lru_cache(maxsize=4096)
def _cells(char: str) -> int:
    import unicodedata
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cell_width(text: str) -> int:
    """How many cells of a terminal a clean() text takes; what is ambiguous takes one.

    >>> cell_width("gpu"), cell_width("日本"), cell_width("e\\u0301")
    (3, 4, 1)
    """
    return len(text) if text.isascii() else sum(map(_cells, text))


def _prefix(text: str, cells: int) -> int:
    """How many characters fit."""
    for count, char in enumerate(text):
        cells -= _cells(char)
        if cells < 0:
            return count
    return len(text)


def clip(text: str, cells: int) -> str:
    """What fits; a text that is cut says so and takes all the cells.

    >>> clip("gemma3:1b", 9), clip("gemma3:1b", 6), clip("日本語", 5), clip("日本語", 4)
    ('gemma3:1b', 'gemma…', '日本…', '日… ')
    """
    if cell_width(text) <= cells:
        return text
    kept = text[:_prefix(text, cells - 1)]
    return "" if cells < 1 else kept + "…" + " " * (cells - 1 - cell_width(kept))


@functools.lru_cache(maxsize=4096)
def _clean_char(char: str) -> str:
    import unicodedata
    code, category = ord(char), unicodedata.category(char)
    # What is invisible, or changes the character before it: joiners, variations, tones of skin.
    if category == "Cf" or 0xFE00 <= code <= 0xFE0F or 0x1F3FB <= code <= 0x1F3FF \
            or code >= 0xE0000:
        return ""
    if category in ("Mc", "Cn", "Co") or any(low <= code <= high for low, high in _DISPUTED):
        return "\ufffd"
    return " " if category == "Zs" else char


@functools.lru_cache(maxsize=2048)
def clean(text: str) -> str:
    """One line, of characters that are as wide on every terminal and whatever stands beside them.

    >>> clean("a\\x1b[2J\\u202eb"), clean("\\u2764\\ufe0f"), len(clean("a" + "\\u0301" * 9))
    ('a\\\\x1b[2J\\\\u202eb', '❤', 3)
    """
    text = printable(text)
    if text.isascii():
        return text
    import unicodedata
    cleaned = "".join(map(_clean_char, unicodedata.normalize("NFC", text)))
    # Two marks on a character are some languages' need; a tower of them is somebody's joke.
    return "".join(char for at, char in enumerate(cleaned) if _cells(char)
                   or any(map(_cells, cleaned[max(0, at - 2):at])))


def _amount(value: Any) -> Optional[float]:
    """None for what is no number, or none that a figure of a machine can be."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and -1e15 < value < 1e15 else None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return clean(value[:1000])
    number = _amount(value)
    return "" if number is None else f"{number:.15g}"


def _shown(value: Any, unit: str = "", form: str = ".0f") -> str:
    """
    >>> _shown(28.13, "%"), _shown(None, " W"), _shown(0.5, " Wh", ".1f")
    ('28%', '–', '0.5 Wh')
    """
    number = _amount(value)
    return "–" if number is None else f"{number:{form}}{unit}"


def show_duration(seconds: Any) -> str:
    """
    >>> [show_duration(seconds) for seconds in (25.4, 192, 7380, 450000, None)]
    ['25s', '3m12s', '2h03m', '5d05h', '–']
    """
    for size, part, names in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if (_amount(seconds) or 0) >= size:
            return f"{seconds // size:.0f}{names[0]}{seconds % size // part:02.0f}{names[1]}"
    return _shown(seconds, "s")


def _used(record: Dict[str, Any]) -> str:
    """
    >>> _used({"memory_used_bytes": 3 << 29, "memory_total_bytes": 24 << 30}), _used({})
    ('1.5/24.0 GiB', '–')
    """
    used, total = (_amount(record.get(f"memory_{name}_bytes")) for name in ("used", "total"))
    shown = "/".join(_shown(value and value / 2**30, "", ".1f") for value in (used, total))
    return "–" if used is None and total is None else shown + " GiB"


# -- lines ----------------------------------------------------------------

def _wide(line: Line) -> int:
    return sum(cell_width(text) for text, _ in line)


def _cut(line: Line, cells: int) -> Line:
    """What fits of a line."""
    if _wide(line) <= cells:
        return line
    kept: Line = []
    for text, style in line:
        if cell_width(text) >= cells:
            return kept + [(clip(text + "…", cells), style)]
        kept.append((text, style))
        cells -= cell_width(text)
    return kept


def _drawn(edges: Sequence[str], line: Line, columns: int, look: Look) -> str:
    """A line of the screen.  edges: left, what fills the line up, right."""
    left, fill, right = edges
    line = _cut(line, columns - len(left + right))
    filled = fill * (columns - len(left + right) - _wide(line))
    drawn = []
    for text, style in filter(lambda span: span[0], [(left, ""), *line, (filled + right, "")]):
        if not look.utf8 and not text.isascii():
            text = "".join(char if char.isascii() else "?" * _cells(char)
                           for char in text.translate(_ASCII))
        drawn.append(f"\x1b[{_SGR[style]}m{text}\x1b[0m" if style and look.color else text)
    return "".join(drawn) + ("\x1b[0m" if look.color else "")


def _flow(items: Iterable[Line], columns: int, rows: int) -> List[Line]:
    """Items beside each other in so many rows; those that do not fit are left out."""
    lines: List[Line] = []
    left = 0
    for item in items:
        width = _wide(item)
        if width and lines and width + 3 <= left:
            lines[-1] += [(" │ ", "dim"), *item]
            left -= width + 3
        elif width and len(lines) < rows:
            lines.append(list(item))
            left = columns - width
    return lines


def _wrapped(text: str, columns: int, style: str = "", most: int = 1000) -> List[Line]:
    """A clean text over several lines, parted at spaces where that leaves them half full."""
    lines: List[Line] = []
    while cell_width(text) > columns and len(lines) < most - 1:
        fits = max(1, _prefix(text, columns))
        space = text.rfind(" ", fits // 2, fits + 1)
        lines.append([(text[:space] if space > 0 else text[:fits], style)])
        text = text[space + 1 if space > 0 else fits:]
    return lines + [[(text, style)]]


def _table(rows: Sequence[Line], keep: Sequence[int], right: Sequence[int],
           columns: int) -> List[Line]:
    """keep: the columns by how long they stay where there is no room for all; the first gives way
    before, down to ten cells.  right: those that stand to the right."""
    widths = [max(cell_width(row[at][0]) for row in rows) for at in range(len(rows[0]))]
    shown, elastic = [at for at in keep if widths[at]], widths[keep[0]]
    widths[keep[0]] = min(elastic, 10)
    while len(shown) > 1 and sum(widths[at] + 2 for at in shown) - 2 > columns:
        shown.pop()
    spare = columns + 2 - sum(widths[at] + 2 for at in shown)
    widths[keep[0]] = min(elastic, widths[keep[0]] + max(0, spare))
    lines: List[Line] = []
    for row in rows:
        lines.append([])
        for at in sorted(shown):
            text = clip(row[at][0], widths[at])
            space = " " * (widths[at] - cell_width(text))
            lines[-1].append((space + text if at in right else text + space, row[at][1]))
            lines[-1].append(("  ", ""))
        lines[-1].pop()
    return lines


def _bar(pct: Optional[float], cells: int) -> str:
    """
    >>> _bar(50, 5), _bar(None, 5)
    ('██▌░░', '     ')
    """
    if pct is None:
        return " " * cells
    eighths = int(min(100.0, max(0.0, pct)) * cells * 8 / 100)
    part = "▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else ""
    return ("█" * (eighths // 8) + part).ljust(cells, "░")


def _spark(view: View, name: str, cells: int, most: float = 0.0) -> str:
    """A space and the newest values of a history, as high as they are of `most`, or of their
    greatest; "" without any."""
    values = [_amount(value) or 0.0 for value in view.history.get(name, ())[-cells:]]
    most = most or max(values, default=0.0) or 1.0
    drawn = ["▁▂▃▄▅▆▇█"[int(min(7.0, max(0.0, value / most * 8)))] for value in values]
    return "".join([" "] * bool(drawn) + drawn)


def _level(value: Any, warn_at: float, bad_at: float) -> str:
    number = _amount(value) or 0.0
    return "bad" if number >= bad_at else "warn" if number >= warn_at else ""


_STATES = {state: style for style, states in (
    ("ok", "ready running up watching"), ("dim", "stopped none off completed"),
    ("warn", "starting registering registered connecting waiting pending backoff expired"),
    ("bad", "unreachable refused error failed down")) for state in states.split()}


def _state(value: Any) -> Tuple[str, str]:
    text = _text(value) or "–"
    return text, _STATES.get(text.lower(), "")


def _named(name: str, value: Any) -> Line:
    """Nothing where there is nothing to say."""
    text = _text(value)
    return [(f"{name}: {text}", "")] if text else []


def _heading(title: str, more: str = "") -> Line:
    return [(title, "head"), (f": {more}" if more else "", "")]


def _some(rows: List[Any], most: int) -> Tuple[List[Any], List[Line]]:
    """The first rows, and a line that tells of the rest."""
    if len(rows) <= most:
        return rows, []
    shown = rows[:max(1, most - 1)]
    return shown, [[(f"… {len(rows) - len(shown)} more", "dim")]]


# -- the parts of the screen ----------------------------------------------

def _status_part(view: View, columns: int, rows: int) -> List[Line]:
    status = view.status
    if not status:
        return [[("Status: ", ""), ("waiting for the agent", "warn")]]
    word, style = _state(status.get("status"))
    aged = "" if view.age_s is None else f", as of {show_duration(view.age_s)} ago"
    ago = _amount(status.get("last_keepalive_seconds_ago"))
    beat = "never" if ago is None else f"{show_duration(ago)} ago"
    return _flow((
        [("Status: ", ""), (word.upper(), style), (aged, "warn")],
        [(f"Heartbeat {beat}", _level(ago, 120.0, 300.0))],
        _named("Gateway", status.get("gateway")), _named("Pool", status.get("pool")),
        [] if status.get("gpus") else [(f"GPUs: {_shown(status.get('gpu_count'))}", "")],
        [(f"Up {show_duration(status.get('uptime_seconds'))}", "")]), columns, rows)


def _message_part(view: View, columns: int, rows: int) -> List[Line]:
    """What is wrong between us and the agent, and between the agent and its gateway."""
    style = _state(view.status.get("status"))[1] or "warn"
    said = [row for row in ((_text(view.problem), "bad"),
                            (_text(view.status.get("message")), style)) if row[0]]
    return [line for text, style in said for line in _wrapped(
        "! " + text, columns, style, max(1, min(3, rows // len(said))))][:rows]


def _gauge(view: View, label: str, tail: str, columns: int) -> Line:
    """Percent, with a bar, a history and more as far as there is room."""
    name = label.lower()
    pct = _amount(view.status.get(f"{name}_percent"))
    style = _level(pct, 85.0, 95.0) if name == "memory" else ""
    room = columns - len(label) - 6
    tail = f" {tail}" if tail and room - len(tail) > 6 else ""
    spark = _spark(view, name, (room - len(tail)) // 2, 100.0) if columns > 45 else ""
    cells = min(30, room - len(tail) - len(spark))
    drawn = [(f" {_bar(pct, cells)} {_shown(pct, '%'):>4}", style or "ok")] if cells > 2 else [
        (" " + _shown(pct, "%"), style)]
    return [(label if columns > 12 else label[:3], ""), *drawn, (spark, "dim"), (tail, "")]


def _host_part(view: View, columns: int, rows: int) -> List[Line]:
    host = _object(view.status.get("host"))
    threads = _shown(host.get("cpu_threads"))
    tails = {"CPU": "" if threads == "–" else f"of {threads} threads", "Memory": _used(host)}
    both = columns >= 60 or rows < 2
    width = (columns - 3) // 2 if both else columns
    gauges = [_gauge(view, label, tail, width) for label, tail in tails.items()]
    joint = [(" │ " if columns > 20 else " ", "dim")]
    return [] if not view.status else [gauges[0] + joint + gauges[1]] if both else gauges


def _links_part(view: View, columns: int, rows: int) -> List[Line]:
    items = []
    name = "name " if columns > 95 else ""
    for title, keys in (("Tunnel", "server message"), ("Tailnet", f"address {name}message")):
        link = _object(view.status.get(title.lower()))
        if link and link.get("state") != "none":
            said = filter(None, (_text(link.get(key)) for key in keys.split()))
            items.append([(f"{title}: ", ""), _state(link.get("state")),
                          (" " + " ".join(said), "")])
    return _flow(items, columns, rows)


def _gpu_cells(view: View, number: int, gpu: Dict[str, Any], wide: bool) -> Line:
    pct, degrees = _amount(gpu.get("utilization_pct")), gpu.get("temperature_c")
    vendor, name = _text(gpu.get("vendor")), _text(gpu.get("name")) or "unknown model"
    if name.lower().startswith(vendor.lower() + " "):
        name = name[len(vendor) + 1:]
    state = next((row[1:] for row in (
        ("problem", "unwell", "bad"), ("stale", "stale", "warn"), ("asleep", "asleep", "dim"),
        ("free", "free", "ok"), ("offered", "in use", "")) if gpu.get(row[0])),
        ("not offered", "dim"))
    return [(_shown(gpu.get("index")), ""), (name, ""), (_bar(pct, 10), ""),
            (_shown(pct, "%"), ""),
            (_spark(view, f"gpu{number}", 16, 100.0)[1:] if wide else "", "dim"),
            (_used(gpu), ""),
            ("shared" if gpu.get("integrated") or vendor == "apple" else "", ""),
            (_shown(degrees, "°C"), _level(degrees, 85.0, 95.0)),
            (_shown(gpu.get("power_w"), " W"), ""), state]


def _gpus_part(view: View, columns: int, rows: int) -> List[Line]:
    """A row each, then what is wrong with them."""
    gpus, listed = objects_in(view.status.get("gpus")), view.status.get("gpu_problems")
    problems = [f"{_text(gpu.get('vendor'))} {_shown(gpu.get('index'))}: {text}"
                for gpu in gpus for text in [_text(gpu.get("problem"))] if text]
    problems += filter(None, map(_text, listed)) if isinstance(listed, list) else []
    if not gpus and not problems:
        return []
    free = sum(gpu.get("free") is True for gpu in gpus)
    said = problems[:max(1, (rows - 1) // 2)]
    shown, rest = _some(gpus, max(1, rows - 1 - len(said)))
    cells = [_gpu_cells(view, at, gpu, columns > 95) for at, gpu in enumerate(shown)]
    counts = [f"{free} free of {len(gpus)}"] * bool(gpus)
    counts += [f"problems: {len(problems)}"] * bool(problems)
    lines = [_heading("GPUS", ", ".join(counts))]
    lines += _table(cells, (1, 3, 5, 9, 7, 8, 2, 0, 6, 4), (3, 5, 7, 8), columns) if cells else []
    return (lines + rest + [[(f"! {text}", "bad")] for text in said])[:rows]


def _pod_cells(pod: Dict[str, Any]) -> Line:
    code, restarts = _amount(pod.get("exit_code")), _amount(pod.get("restarts"))
    ending = ("" if code is None else f"exit {code:.0f}", clip(_text(pod.get("reason")), 24),
              f"{restarts:.0f} restarts" if restarts else "")
    return [(_text(pod.get("name")) or "–", ""), _state(pod.get("status")),
            (clip(_text(pod.get("function")), 30), ""),
            (show_duration(pod.get("duration_seconds")), ""),
            (", ".join(filter(None, ending)), "bad" if code else "warn" if restarts else "")]


def _pods_part(view: View, columns: int, rows: int) -> List[Line]:
    watch = _object(view.status.get("pods"))
    if watch.get("state") in (None, "off"):
        return []
    pods = objects_in(watch.get("pods"))
    running = sum(pod.get("status") == "RUNNING" for pod in pods)
    lines = [_heading("WORKER PODS", f"{running} running of {len(pods)}" if pods else "")]
    if watch["state"] != "watching":
        said = filter(None, (_text(watch.get("server")), _text(watch.get("message"))))
        lines.append([_state(watch["state"]), (" " + " ".join(said), "")])
    elif not pods:
        lines.append([("No jobs yet", "dim")])
    shown, rest = _some(pods, max(1, rows - len(lines)))
    cells = [_pod_cells(pod) for pod in shown]
    return (lines + (_table(cells, (0, 1, 4, 3, 2), (3,), columns) if cells else []) + rest)[:rows]


def bar(done: int, total: int, columns: int = 24) -> str:
    """
    >>> bar(1, 4, 8)
    '##------'
    """
    filled = max(0, min(columns, columns * done // total)) if total else 0
    return "#" * filled + "-" * (columns - filled)


def progress_line(record: Dict[str, Any], columns: int = 24) -> str:
    """A pull's step in a line.  columns: of its bar.

    >>> progress_line({"step": "pulling 8eeb", "completed": 1 << 30, "total": 1 << 31,
    ...                "rate_bytes_s": 1 << 27, "remaining_s": 8.0})
    'pulling 8eeb [############------------] 50 % of 2.0 GiB, 128 MiB/s, 8 s left'
    """
    done, total = record.get("completed") or 0, record.get("total") or 0
    if not total:
        return record.get("step") or ""
    parts = [f"{record.get('step')} [{bar(done, total, columns)}] {100 * done // total} % of "
             f"{show_bytes(total)}"]
    if record.get("rate_bytes_s"):
        parts.append(f"{show_bytes(int(record['rate_bytes_s']))}/s")
    if record.get("remaining_s") is not None:
        parts.append(f"{record['remaining_s']:.0f} s left")
    return ", ".join(parts)


def _transfer_line(transfer: Dict[str, Any]) -> Line:
    """A pull or an import; its step where nothing tells how far it is."""
    record: Dict[str, Any] = {name: int(_amount(transfer.get(name)) or 0) for name in (
        "completed", "total", "rate_bytes_s")}
    record.update(step="" if record["total"] else _text(transfer.get("step")),
                  remaining_s=_amount(transfer.get("remaining_s")))
    return [(f"{_text(transfer.get('kind'))} {_text(transfer.get('model'))}", ""),
            (f" {progress_line(record, 10).strip()}", "dim")]


def _inference_part(view: View, columns: int, rows: int) -> List[Line]:
    engine = _object(view.status.get("inference"))
    listed, state = engine.get("models"), _state(engine.get("status"))
    models = ", ".join(map(_text, listed[:20])) if isinstance(listed, list) else ""
    named = filter(None, (_text(engine.get("engine")), _text(engine.get("version"))))
    said = [(_text(engine.get("message")), "bad" if state[1] == "bad" else "dim")]
    items = [[("Status: ", ""), state], said if said[0][1] == "bad" else [],
             # A long list is cut rather than left out.
             _cut(_named("Models", models or ("none yet" if engine.get("running") else "")),
                  max(18, columns - 18)),
             _named("Endpoint", engine.get("endpoint")), _named("Engine", " ".join(named))]
    for name, unit, form in (("requests_per_second", "requests/s", ".1f"),
                             ("tokens_per_second", "tokens/s", ".1f"), ("queue", "waiting", ".0f")):
        if _amount(engine.get(name)) is not None:
            items.append([(_shown(engine[name], f" {unit}", form), "")])
            if unit == "tokens/s" and columns > 95:
                items[-1].append((_spark(view, "tokens", 24), "dim"))
    items.append(said if said[0][1] == "dim" else [])
    moving = [_transfer_line(each) for each in objects_in(engine.get("transfers"))]
    lines = _flow(items, columns, max(1, rows - 1 - len(moving)))
    return [_heading("INFERENCE"), *lines, *moving][:rows] if engine else []


def _energy_part(view: View, columns: int, rows: int) -> List[Line]:
    """Each figure with its basis: what was measured is never added to what was estimated."""
    energy = _object(view.status.get("energy"))
    total, kinds = _object(energy.get("total")), (("gpu", "GPUs"), ("cpu", "CPUs"))
    now = [f"{label} {_shown(energy[part + '_w'], ' W')} {_text(energy.get(part + '_basis'))}"
           for part, label in kinds if _amount(energy.get(part + "_w")) is not None]
    used = [f"{label} {_shown(total[f'{part}_{basis}_wh'], ' Wh', '.1f')} {basis}"
            for part, label in kinds for basis in ("measured", "estimated")
            if _amount(total.get(f"{part}_{basis}_wh"))]
    carbon = [] if _amount(total.get("co2e_g")) is None else [
        f"{_shown(total['co2e_g'], ' gCO2e', '.1f')} {_text(total.get('co2e_basis'))}"]
    if not now + used + carbon:
        return []
    items = [_named("Now", ", ".join(now)), [(", ".join(used), "")],
             *([(text, "")] for text in carbon), _named("Since", energy.get("since"))]
    if now and columns > 95:
        items[0].append((_spark(view, "power", 24), "dim"))
    return [_heading("ENERGY"), *_flow(items, columns, rows - 1)]


def _log_lines(view: View, most: int) -> Iterator[Tuple[str, str]]:
    """(text, style), the newest first.  The times are UTC, as in the log itself."""
    wanted = view.filter.casefold()
    for record in reversed(objects_in(list(view.lines))):
        level, event, stamp = (_text(record.get(name)) for name in ("level", "event", "time"))
        fields = {_text(name): value if isinstance(value, bool) else _text(value) or "…"
                  for name, value in record.items() if name not in ("level", "event", "time")}
        clock = re.findall("T([0-9:]{8})", stamp) or [stamp]
        text = clean(render_event(level, event, fields, clock[0], "text")[:1000])
        if wanted in text.casefold():
            yield text, {"error": "bad", "warning": "warn", "debug": "dim"}.get(level, "")
            most -= 1
        if most <= 0:
            return


def _filtered(view: View) -> str:
    return f"with `{_text(view.filter)}`" if view.filter else ""


def _logs_part(view: View, columns: int, rows: int) -> List[Line]:
    lines = [[line] for line in _log_lines(view, rows - 1)] or [[("nothing yet", "dim")]]
    return [_heading("LOGS", _filtered(view)), *lines[::-1]][:rows]


class Part(NamedTuple):
    """A part of the screen; one with a name in capitals has it for a heading.  rank: where there
    are too few rows, the highest goes first.  least: the rows without which it is left out; enough:
    those that it gets before any part gets more.  lines: (view, columns, rows) to what it has to
    say, in so many rows at most."""
    name: str
    rank: int
    least: int
    enough: int
    lines: Callable[[View, int, int], List[Line]]
    about: str


PARTS = (
    Part("status", 1, 1, 3, _status_part, "state, gateway, pool, last heartbeat"),
    Part("message", 3, 1, 3, _message_part, "what is wrong, where something is"),
    Part("host", 2, 1, 2, _host_part, "CPU and memory"),
    Part("links", 8, 1, 2, _links_part, "tunnel and tailnet, where there are any"),
    Part("GPUS", 4, 2, 6, _gpus_part, "a row for each GPU"),
    Part("WORKER PODS", 6, 2, 5, _pods_part, "a row for each pod, the newest first"),
    Part("INFERENCE", 5, 2, 3, _inference_part, "engine, models, rates"),
    Part("ENERGY", 9, 2, 2, _energy_part, "watts now; watt-hours and CO2e in all"),
    Part("LOGS", 7, 2, 4, _logs_part, "the newest lines of the log"),
)
KEYS = (("q", "quit", "end the agent (in top: the view)"),
        ("s", "start/stop", "start or stop the engine"), ("p", "pull", "pull a model"),
        ("l", "logs", "the log; / filters it"), ("d", "doctor", "check this machine"),
        ("?", "help", "this page"))
_PANE_KEYS = (("Esc", "back", ""), ("Up/Down", "scroll", ""), ("q", "quit", ""),
              ("/", "filter", ""))


def share_rows(parts: Sequence[Tuple[Part, int]], rows: int) -> Dict[str, int]:
    """How many rows each part gets, from how many it could use; those left out are not in it."""
    given: Dict[str, int] = {}
    ranked = sorted(parts, key=lambda pair: pair[0].rank)
    for part, wanted in ranked:
        least = min(part.least, wanted)
        if least <= rows:
            given[part.name] = least
            rows -= least
    for without_limit in (False, True):
        for part, wanted in ranked:
            most = wanted if without_limit else min(part.enough, wanted)
            more = min(rows, most - given.get(part.name, most))
            if more > 0:
                given[part.name] += more
                rows -= more
    return given


Body = List[Tuple[Sequence[str], Line]]  # what _drawn() takes
_SIDE, _RULE, _THIN = ("║ ", " ", " ║"), ("╠═", "═", "═╣"), ("╟─", "─", "─╢")


def _inside_rule(line: Line) -> Line:
    return [("═ ", ""), *line, (" ", "")]


def _main_body(view: View, columns: int, rows: int) -> Body:
    """Headings have lines of their own where all that there is to say fits even so."""
    said = [(part, part.lines(view, columns, rows)) for part in PARTS]
    wants = [(part, len(lines)) for part, lines in said if lines]
    headings = 2 * sum(part.name.isupper() for part, _ in wants)
    roomy = headings + sum(min(want, part.enough) if part.name == "LOGS" else want
                           for part, want in wants) <= rows
    given = share_rows(wants, rows - headings if roomy else rows)
    body: Body = []
    for part, lines in said:
        if part.name not in given:
            continue
        if len(lines) > given[part.name]:
            lines = part.lines(view, columns, given[part.name])
        if part.name.isupper():
            head, lines = lines[0], lines[1:]
            body += [(_RULE, []), (_SIDE, head), (_THIN, [])] if roomy else [
                (_RULE, _inside_rule(head))]
        body += [(_SIDE, line) for line in lines]
    return body


def _pane_lines(view: View, columns: int, rows: int) -> List[Line]:
    """What is in sight of a pane; scrolling stops at its ends."""
    lines: List[Line] = []
    if view.pane == "logs":
        for text, style in _log_lines(view, rows + max(0, view.scroll)):
            lines += _wrapped(text, columns, style)[::-1]
    elif view.pane == "doctor":
        for text in map(_text, view.report):
            style = {"ok": "ok", "warn": "warn", "fail": "bad"}.get(text[:5].strip(), "")
            lines += _wrapped(text, columns, style)
    else:
        lines += [[(f"{key:<4}", "head"), (about, "")] for key, _, about in KEYS]
        lines += [[], *_wrapped("Where there are too few rows, these are left out, the last one "
                                "first:", columns)]
        lines += [[(f"{part.name:<13}", "head"), (part.about, "")]
                  for part in sorted(PARTS, key=lambda part: part.rank)]
    top = max(0, min(view.scroll, len(lines) - rows))
    return lines[top:top + rows][::-1 if view.pane == "logs" else 1]


def _pane_body(view: View, columns: int, rows: int) -> Body:
    head = _heading(_text(view.pane).upper(), _filtered(view) if view.pane == "logs" else "")
    body: Body = [(_SIDE, line) for line in _status_part(view, columns, 1)[:rows - 2]]
    body.append((_RULE, _inside_rule(head)))
    return body + [(_SIDE, line) for line in _pane_lines(view, columns, rows - len(body))]


def _last_line(view: View, columns: int) -> Line:
    """What is typed with its end in sight; or what came of the last key, and the keys."""
    if view.prompt is not None:
        text = _text(view.prompt[-500:])
        while cell_width(text) > columns:
            text = text[1:]
        return [(text, "head")]
    line: Line = [(_text(view.note), "head"), ("  ", "")] if view.note else []
    keys = KEYS if not view.pane else _PANE_KEYS if view.pane == "logs" else _PANE_KEYS[:-1]
    for key, word, _ in keys:
        if _wide(line) + len(key + word) < columns:
            line += [(key, "head"), (f" {word}", ""), ("  ", "")]
    return line[:-1]


def _only_line(view: View, columns: int) -> Line:
    """All that a terminal without room for a frame shows."""
    if view.prompt is not None or view.note:
        return _last_line(view, columns)
    cpu, memory, gpus = (_shown(view.status.get(name)) for name in (
        "cpu_percent", "memory_percent", "gpu_count"))
    return [("no answer, was " if view.problem else "", "bad"), _state(view.status.get("status")),
            (f" CPU {cpu}% Mem {memory}% GPUs {gpus}", "")]


def render_frame(view: View, columns: int, rows: int, look: Look) -> List[str]:
    """Exactly `rows` lines of exactly `columns` cells, with no control characters but colours',
    whatever the size and whatever the view has in it."""
    view, columns = view._replace(status=_object(view.status)), max(0, columns)
    bare = ("", " ", "")
    if columns < 20 or rows < 4:
        lines = [(bare, _only_line(view, columns))] + [(bare, [])] * rows
        return [_drawn(edges, line, columns, look) for edges, line in lines[:max(0, rows)]]
    name, host = (_text(view.status.get(key)) for key in ("machine_id", "hostname"))
    title = _heading(*(("Beta9 Agent", name) if columns >= 40 else (name or "Beta9",)))
    title += [(" ═ ", ""), (host, "")] if columns >= 70 and host else []
    body = (_pane_body if view.pane else _main_body)(view, columns - 4, rows - 3)
    body += [(_SIDE, [])] * (rows - 3 - len(body))
    return [_drawn(edges, line, columns, look) for edges, line in (
        (("╔═", "═", "═╗"), _inside_rule(title)), *body, (("╚═", "═", "═╝"), []),
        (bare, _last_line(view, columns)))]


# ----------------------------------------------------------------------
# 16b. The terminal                     the terminal; what its keys ask for
# ----------------------------------------------------------------------
# The dashboard's life on a terminal.  One thread owns it: that alone reads
# keys, writes, and gives it back; handlers of signals only ask it to.  Another
# brings the figures, and what a key asks for has a thread of its own, so that
# nothing keeps a key, a signal or the membership waiting.

REFRESH_S = 1.0
HISTORY_KEPT = 600
TYPED_MAX = 200
PASTE_MAX = 4096
# The alternate screen, no wrap at its edge, no cursor, and pastes marked as such.
_TAKE = b"\x1b[?1049h\x1b[?7l\x1b[?25l\x1b[?2004h"
# Cleared, for a console that has no alternate screen.
_GIVE_BACK = b"\x1b[0m\x1b[2J\x1b[H\x1b[?2004l\x1b[?25h\x1b[?7h\x1b[?1049l"


def read_look() -> Look:
    """What the terminal can show, as the environment says.  C.UTF-8 may be Python's own word for a
    locale C (PEP 538), which says nothing of the terminal."""
    ctype, lang = (os.environ.get(name, "") for name in ("LC_CTYPE", "LANG"))
    if ctype in ("C.UTF-8", "C.utf8") and lang in ("", "C", "POSIX"):
        ctype = ""
    named = os.environ.get("LC_ALL") or ctype or lang
    return Look("utf" in named.lower(), not os.environ.get("NO_COLOR")
                and os.environ.get("TERM") != "dumb")


def terminal_fits() -> bool:
    """Whether a dashboard can be shown: a terminal on both sides, more than a printer, and ours to
    use (not started with `&`)."""
    try:
        return (os.isatty(0) and os.isatty(1) and os.environ.get("TERM") not in (None, "", "dumb")
                and os.tcgetpgrp(1) == os.getpgrp())
    except OSError:
        return False  # it is nobody's: after setsid, or in half a container


# The end of a sequence, and the key that it stands for.  Source: xterm's ctlseqs; the console of
# Linux, screen and PuTTY send the numbers.
_KEY_NAMES = {"A": "up", "B": "down", "H": "home", "F": "end", "1~": "home", "7~": "home",
              "4~": "end", "8~": "end", "5~": "page up", "6~": "page down", "\r": "enter",
              "\n": "enter", "\x7f": "backspace", "\b": "backspace", "\x15": "clear",
              "\x0c": "redraw"}
# The last but one: a sequence that broke off.
_KEY = (r"\x1b\[200~(?P<paste>.*?)\x1b\[201~|\x1b\[(?!200~)(?P<csi>[ -?]{0,20}[@-~])|"
        r"\x1bO(?P<ss3>[ -~])|(?P<esc>\x1b)(?=[^\[O])|\x1b[\[O][ -?]*(?=[^ -~])|(?P<char>[^\x1b])")


class Keys:
    """What a terminal sends, as keys: a character, or a name of several; "paste TEXT".

    >>> Keys().feed(b"q\\x1b[A\\x1b[200~hi\\x1b[201~\\x1b[6~\\x1b")
    ['q', 'up', 'paste hi', 'page down']
    """

    def __init__(self) -> None:
        import codecs
        self._decode = codecs.getincrementaldecoder("utf-8")("ignore").decode
        self._match = re.compile(_KEY, re.DOTALL).match
        self.rest = ""  # the beginning of a key

    def feed(self, data: bytes) -> List[str]:
        text, keys, place = self.rest + self._decode(data), [], 0
        while True:
            found = self._match(text, place)
            if found is None:
                break
            place, kind = found.end(), found.lastgroup or ""
            said = found.group(kind) if kind else ""
            name = "esc" if kind == "esc" else "paste " + said if kind == "paste" else (
                _KEY_NAMES.get(said, said if kind == "char" and said.isprintable() else ""))
            keys += [name] if name else []
        self.rest = text[place:]
        if self._pasting() and len(self.rest) > PASTE_MAX:
            self.rest = self.rest[:PASTE_MAX - 8] + self.rest[-8:]
        elif not self._pasting() and len(self.rest) > 32:
            self.rest = ""  # no key is so long
        return keys

    def _pasting(self) -> bool:
        return self.rest.startswith("\x1b[200~")

    @property
    def unsure(self) -> bool:
        """Whether time tells: Esc alone, or the beginning of a sequence?"""
        return bool(self.rest) and not self._pasting()

    def settle(self) -> List[str]:
        """Nothing has followed."""
        rest, self.rest = self.rest, ""
        return ["esc"] if rest == "\x1b" else []


class Terminal:
    """The terminal of this process, taken and given back.  One thread uses it.

    On a descriptor of its own, which does not block; for others nothing changes.  A terminal that
    takes no more (a stuck ssh) costs frames, and keeps nobody waiting.
    Raises: OSError where it is gone.
    """

    def __init__(self) -> None:
        flags = os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK
        try:
            self._descriptor = os.open(os.ttyname(1), flags)
        except OSError:  # in a container it may have no name
            self._descriptor = os.open("/dev/tty", flags)
        self._before: Any = None
        self._taken = False
        self._unsent = b""
        self._shown: List[str] = []
        self.size = (80, 24)

    def is_ours(self) -> bool:
        """False while the shell has it: we were sent to the background."""
        return os.tcgetpgrp(self._descriptor) == os.getpgrp()

    def take(self, again: bool = False) -> None:
        """Ctrl-C and Ctrl-Z stay signals; Ctrl-S would only look like a hang."""
        if self._taken and not again:
            return
        import termios
        try:
            mode = termios.tcgetattr(self._descriptor)
            if self._before is None:
                self._before = termios.tcgetattr(self._descriptor)
            if not self._taken:  # what was typed to the shell is no key
                termios.tcflush(self._descriptor, termios.TCIFLUSH)
            mode[0] &= ~termios.IXON
            mode[3] = mode[3] & ~(termios.ICANON | termios.ECHO | termios.IEXTEN) | termios.ISIG
            mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self._descriptor, termios.TCSANOW, mode)
        except termios.error as error:
            raise OSError(*error.args) from error
        self._taken, self._shown = True, []
        self._unsent += _TAKE

    def draw(self, render: Callable[[int, int], List[str]], encoding: str) -> None:
        """What changed, at once; nothing as long as the frame before is on its way."""
        self._flush()
        if self._unsent:
            return
        columns, rows = os.get_terminal_size(self._descriptor)
        size = (min(columns, 1000) or 80, min(rows, 500) or 24)  # a serial line says 0
        frame, out = render(*size), []
        if size != self.size or not self._shown:
            self.size, self._shown = size, [""] * len(frame)
            out.append("\x1b[0m\x1b[2J")
        for row, (old, new) in enumerate(zip(self._shown, frame), 1):
            if old != new:
                out.append(f"\x1b[{row};1H{new}")
        self._shown = frame
        self._unsent = "".join(out).encode(encoding, "replace")
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self._descriptor, self._unsent):]
        except BlockingIOError:
            pass  # later

    def wait(self, wake: Wake, limit_s: float) -> bytes:
        """What was typed, as soon as there is any or wake is set."""
        readable, _, _ = select.select([self._descriptor, wake],
                                       [self._descriptor] if self._unsent else [], [], limit_s)
        if wake in readable:
            wake.wait(0.0)
        if self._descriptor not in readable:
            return b""
        try:
            data = os.read(self._descriptor, 4096)
        except BlockingIOError:
            return b""
        if not data:
            raise OSError("the terminal is gone")
        return data

    def give_back(self) -> None:
        """As it was found; never raises.  What was typed and not read is not for the shell."""
        if not self._taken:
            return
        import termios
        self._taken, until_s = False, now_s() + 0.3
        try:
            if not self.is_ours():
                return  # the shell has it already
            self._unsent += _GIVE_BACK
            self._flush()
            while self._unsent and now_s() < until_s:
                select.select([], [self._descriptor], [], 0.1)
                self._flush()
            if self._unsent:  # what nobody has seen makes room
                termios.tcflush(self._descriptor, termios.TCOFLUSH)
                self._unsent = _GIVE_BACK
                self._flush()
            termios.tcflush(self._descriptor, termios.TCIFLUSH)
            termios.tcsetattr(self._descriptor, termios.TCSANOW, self._before)
        except (OSError, termios.error):
            pass  # it is gone
        finally:
            self._unsent = b""

    def close(self) -> None:
        self.give_back()
        os.close(self._descriptor)


# -- whom a dashboard asks -------------------------------------------------

def transfer_end(last: Dict[str, Any]) -> str:
    """What a pull or an import came to, of its last record.  Raises: ModelError."""
    if last.get("status") != "success":
        raise ModelError(f"{last.get('kind', 'pull')} of {last.get('model', 'it')}: "
                         f"{last.get('message') or last.get('status') or 'broke off'}",
                         "" if last.get("message") or last.get("status") == "cancelled" else
                         "The agent's log says why: b9agent.py logs")
    return f"{last['model']} is here" + (
        f", {show_bytes(last['total'])}" if last.get("total") else "")


class AgentHere:
    """The agent of this process, for a dashboard.  ask(): a method of Inference, as the control API
    names it.  lines(): of the log, those that are new; None where it begins anew."""

    def __init__(self, agent: Any, log: Log) -> None:
        self._agent, self._ring, self._number = agent, log.kept, 0

    def status(self) -> Dict[str, Any]:
        return self._agent.status(fresh=True)

    def lines(self) -> List[Optional[str]]:
        found = self._ring.after(self._number)
        self._number = found[-1][0] if found else self._number
        return [line for _, line in found]

    def ask(self, method: str, **fields: Any) -> Dict[str, Any]:
        return getattr(self._agent.inference, method)(**fields)

    def pull(self, model: str) -> Iterator[Dict[str, Any]]:
        for progress in self._agent.inference.pull(model, "dashboard").watch():
            if progress is not None:
                yield progress_record(progress)


class AgentThere:
    """The same of an agent that is asked through its control API: of a state folder, or elsewhere.
    follow(), in a thread of its own, brings the log as it is written."""

    def __init__(self, where: AgentPlace) -> None:
        self._where = where
        self._came: Any = collections.deque(maxlen=LOG_KEPT_LINES + 1)

    def status(self) -> Dict[str, Any]:
        answer = call_agent(self._where, "/status?fresh=true", None, 5.0, 1 << 20)
        if not {"version", "pid", "state"} <= set(answer):
            raise GatewayUnreachable("what answers there is no b9agent")
        return answer

    def newest(self, query: str, idle_limit_s: Optional[float] = None) -> Iterator[bytes]:
        """Lines of the log as JSON.  Raises: AgentError."""
        endpoint, headers = agent_address(self._where)
        headers = dict(headers, Accept="application/x-ndjson")
        with agent_stream((endpoint, headers), "/logs?" + query, None, 5.0,
                          idle_limit_s) as stream:
            try:
                yield from (line for line in stream.lines(2 * LOG_KEPT_LINE_MAX)
                            if len(line) <= 2 * LOG_KEPT_LINE_MAX)
            except HttpFailure as failure:
                raise GatewayUnreachable(f"the agent's log broke off: {failure}") from failure

    def follow(self) -> None:
        while True:
            try:
                begun = False
                for line in self.newest(f"lines={LOG_KEPT_LINES}&follow=true", 4 * STREAM_QUIET_S):
                    self._came.extend([line] if begun else [None, line])
                    begun = True
                    if len(self._came) > LOG_KEPT_LINES:  # more than is looked at
                        _pause(0.1)
            except AgentError:
                pass  # it is not there now; status() says so
            _pause(REFRESH_S)

    def lines(self) -> List[Optional[bytes]]:
        return [self._came.popleft() for _ in range(len(self._came))]

    def ask(self, method: str, **fields: Any) -> Dict[str, Any]:
        return call_agent(self._where, f"/inference/{method}", fields, 7200.0)

    def pull(self, model: str) -> Iterator[Dict[str, Any]]:
        for line in agent_lines(self._where, "/inference/pull", {"model": model, "stream": True}):
            yield _json_object(line)


# -- the dashboard ---------------------------------------------------------

class _Prompt(NamedTuple):
    """A line that is typed, for done(); or a question, answered by one key: done("y")."""
    label: str
    done: Callable[[str], None]
    question: bool = False


_PANE_OF = {"l": "logs", "d": "doctor", "?": "help"}
# The way in lines; None for a page of them.
_MOVES = {"up": (-1, 1), "down": (1, 1), "page up": (-1, None), "page down": (1, None),
          "home": (-1, 1 << 20), "end": (1, 1 << 20)}


def _figures(status: Dict[str, Any]) -> Dict[str, Any]:
    """What has a history."""
    host, gpus = _object(status.get("host")), objects_in(status.get("gpus"))[:64]
    powers = [_amount(gpu.get("power_w")) or 0.0 for gpu in gpus if gpu.get("power_w") is not None]
    return dict({f"gpu{number}": gpu.get("utilization_pct") for number, gpu in enumerate(gpus)},
                cpu=host.get("cpu_pct"), memory=host.get("memory_pct"),
                power=sum(powers) if powers else None,
                tokens=_object(status.get("inference")).get("tokens_per_second"))


class Dashboard:
    """A screen beside a life that goes on without it: a context manager around that, for the main
    thread.

    source: an AgentHere or an AgentThere.  on_quit(): from any thread, for `q` and for a terminal
    that is gone.  doctor(): its lines; None where it would look at another machine.  log: of this
    process, which has no place to print while the screen is shown.
    What several threads set is replaced whole, so there is no lock.
    """

    def __init__(self, source: Any, on_quit: Callable[[], Any],
                 doctor: Optional[Callable[[], Sequence[str]]], log: Optional[Log] = None) -> None:
        self._source, self._quit, self._doctor, self._log = source, on_quit, doctor, log
        self.news, self._wake, self._left = Wake(), Wake(), Wake()
        self._terminal, self._keys, self._shown_as = Terminal(), Keys(), read_look()
        self._ended = self._away = self._again = False
        self._seen, self._seen_s, self._lines_seen = View({}, (), {}), now_s(), 0
        self._kept: Any = collections.deque(maxlen=LOG_KEPT_LINES)
        self._history: Dict[str, Any] = {}
        self._pane = self._filter = self._note = self._typed = ""
        self._report: Tuple[str, ...] = ()
        self._scroll, self._scrolled_at = 0, 0
        self._prompt: Optional[_Prompt] = None
        self._asked: Optional[_Prompt] = None
        self._failed: Optional[Exception] = None
        self._busy: Set[str] = set()
        self._pulled = ""
        self._handlers: Dict[int, Any] = {}
        self._hook = threading.excepthook
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)

    # -- its life, and signals: the main thread -------------------------

    def __enter__(self) -> "Dashboard":
        for number, handler in ((signal.SIGWINCH, self._woken), (signal.SIGCONT, self._woken),
                                (signal.SIGTSTP, self._give_way), (signal.SIGQUIT, self._give_way)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, handler)
        threading.excepthook = lambda caught: self._defect(caught.exc_value)
        if self._log:
            self._log.events.on_add = self.news.set
            self._log.hold()
        threading.Thread(target=self._watch, name="dashboard-facts", daemon=True).start()
        self._thread.start()
        return self

    def end(self) -> None:
        """From a signal handler or another thread: give the terminal back."""
        if self._log and not self._ended:
            self._log.held_level = "debug"  # how it ends is told below the screen
        self._ended = True
        self._wake.set()

    def __exit__(self, *_: Any) -> None:
        self.end()
        self._thread.join(2.0)
        threading.excepthook = self._hook
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._failed is not None and self._log is None:
            raise self._failed  # nobody was told

    def _woken(self, number: int, _frame: Any) -> None:
        self._again = self._again or number == signal.SIGCONT
        self._wake.set()

    def _give_way(self, number: int, _frame: Any) -> None:
        """Ctrl-Z and Ctrl-\\: do what they do, with the terminal as it was.  The kernel decides
        whether there is a shell that could wake us again."""
        self._left.wait(0.0)  # of another time
        self._away = True
        self._wake.set()
        if self._thread.is_alive():
            self._left.wait(1.0)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        # Continued, or never stopped.
        signal.signal(number, self._give_way)
        self._away = False
        self._wake.set()

    def _defect(self, error: BaseException) -> None:
        if self._log:
            self._log.defect(error)
        self._note = REDACTOR.scrub(f"defect: {type(error).__name__}: {error} (at "
                                    f"{defect_place(error)})")

    # -- its figures: a thread of their own -----------------------------

    def _watch(self) -> None:
        while not self._ended:
            self._look()
            self._wake.set()
            if self.news.wait(REFRESH_S):
                _pause(0.1)  # what happens in one breath is shown at once

    def _look(self) -> None:
        problem, status = "", self._seen.status
        try:
            status = self._source.status()
            self._seen_s = now_s()
            for name, value in _figures(status).items():
                figure = _amount(value)
                if figure is not None:
                    self._history.setdefault(name, collections.deque(maxlen=HISTORY_KEPT)).append(
                        figure)
        except AgentError as error:
            problem = str(error)
        except Exception as error:
            problem = f"its figures are not understood: {type(error).__name__}"
            if problem != self._seen.problem:  # what is logged is news, and has us look again
                self._defect(error)
        lines = self._source.lines()
        if None in lines:
            self._kept.clear()
        self._kept.extend(_json_object(line if isinstance(line, bytes) else line.encode())
                          for line in lines if line)
        self._lines_seen += len(lines) - lines.count(None)
        self._seen = View(status, tuple(self._kept) if lines else self._seen.lines,
                          {name: tuple(kept) for name, kept in self._history.items()},
                          problem=problem)

    # -- the screen: its own thread -------------------------------------

    def _run(self) -> None:
        terminal, gone = self._terminal, False
        try:
            while not self._ended:
                if self._away or not terminal.is_ours():
                    terminal.give_back()
                    self._left.set()
                    self._wake.wait(1.0)  # nobody says when the shell hands it back
                    continue
                again, self._again = self._again, False
                terminal.take(again)
                terminal.draw(self._render, "utf-8" if self._shown_as.utf8 else "ascii")
                typed = terminal.wait(self._wake, 0.1 if self._keys.unsure else 5.0)
                for key in (self._keys.feed(typed) if typed or not self._keys.unsure
                            else self._keys.settle()):
                    if not self._ended:
                        self._press(key)
        except OSError:
            gone = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # nohup: it goes on
        except Exception as error:
            self._defect(error)  # it costs the dashboard, and not the machine
            self._failed, gone = error, self._log is None
        finally:
            self._ended = True
            terminal.close()
            if self._log:
                self._log.release()
            if gone:
                self._quit()

    def _view(self) -> View:
        seen, prompt = self._seen, self._prompt
        self._asked = prompt
        new, self._scrolled_at = self._lines_seen - self._scrolled_at, self._lines_seen
        if self._scroll and self._pane == "logs" and new:  # what is read stays where it is
            self._scroll += self._pane_rows(seen._replace(lines=seen.lines[-new:]))
        return seen._replace(
            age_s=now_s() - self._seen_s if seen.problem else None, pane=self._pane,
            scroll=self._scroll, filter=self._filter, note=self._note, report=self._report,
            prompt=prompt and prompt.label + self._typed + ("" if prompt.question else "_"))

    def _pane_rows(self, view: View) -> int:
        """All of a pane, were the terminal as high as that."""
        view = view._replace(scroll=0, pane=self._pane, filter=self._filter, report=self._report)
        return len(_pane_lines(view, self._terminal.size[0] - 4, 1 << 20))

    def _render(self, columns: int, rows: int) -> List[str]:
        return render_frame(self._view(), columns, rows, self._shown_as)

    # -- its keys -------------------------------------------------------

    def _press(self, key: str) -> None:
        if self._prompt is not None:
            self._type(self._prompt, key)
            return
        if key not in _MOVES:
            self._note = ""
        if key == "q":
            self.end()
            self._quit()
        elif key == "s":
            self._start_or_stop()
        elif key == "p":
            self._ask_pull()
        elif key == "/":
            self._show("logs")
            self._prompt = _Prompt("Filter: ", self._set_filter)
        elif key == "redraw":
            self._again = True
        elif key == "esc" or _PANE_OF.get(key) == self._pane:
            self._show("")
        elif key in _PANE_OF:
            self._show(_PANE_OF[key])
            if key == "d":
                self._examine()
        elif key in _MOVES and self._pane:
            self._move(*_MOVES[key])

    def _show(self, pane: str) -> None:
        if pane != self._pane:
            self._pane, self._scroll, self._filter = pane, 0, ""

    def _set_filter(self, text: str) -> None:
        self._filter, self._scroll = text, 0

    def _move(self, way: int, lines: Optional[int]) -> None:
        shown = max(1, self._terminal.size[1] - 5)
        step = way * (lines or shown) * (-1 if self._pane == "logs" else 1)
        most = max(0, self._pane_rows(self._seen) - shown)
        self._scroll = max(0, min(self._scroll + step, most))

    def _type(self, prompt: _Prompt, key: str) -> None:
        if prompt.question:
            if prompt is not self._asked:
                return  # typed before the question could be seen
            self._prompt = prompt if key.startswith("paste ") else None
            if key in ("y", "Y"):
                prompt.done("y")
        elif key in ("esc", "enter"):
            text, self._prompt, self._typed = self._typed.strip(), None, ""
            if key == "enter":
                prompt.done(text)
        elif key in ("backspace", "clear"):
            self._typed = self._typed[:-1] if key == "backspace" else ""
        elif key.startswith("paste ") or len(key) == 1:
            lines = key[6:].strip().splitlines() if len(key) > 1 else [key]
            self._typed = (self._typed + printable("".join(lines[:1])))[:TYPED_MAX]

    # -- what keys ask for: a thread for each ---------------------------

    def _do(self, what: str, work: Callable[[], str]) -> None:
        """One of a kind at a time; work() says what came of it, or nothing."""
        def act() -> None:
            try:
                self._note = work() or self._note
            except AgentError as error:
                self._note = REDACTOR.scrub(" ".join(str(error).split()))
                if self._log:  # where all of it can be read
                    self._log.error(what + "_failed", error, "warning")
            except Exception as error:
                self._defect(error)
            self._busy.discard(what)
            self.news.set()
        if what in self._busy:
            self._note = f"{what}: it is under way already"
            return
        self._busy.add(what)
        self._note = f"{what} …"
        threading.Thread(target=act, name=f"dashboard-{what}", daemon=True).start()

    def _start_or_stop(self) -> None:
        inference = _object(self._seen.status.get("inference"))
        if "start" in self._busy or inference.get("status") in ("starting", "running"):
            self._prompt = _Prompt("Stop inference? y/n ", lambda _: self._do("stop", lambda: (
                self._source.ask("stop").get("message") or "inference stopped")), True)
        else:
            self._do("start", lambda: "inference started: " + (
                " ".join(self._source.ask("start").get("models") or ()) or "no models yet"))

    def _ask_pull(self) -> None:
        if "pull" in self._busy:
            self._prompt = _Prompt(f"End the pull of {self._pulled}? y/n ", lambda _: self._do(
                "cancel", lambda: self._source.ask("cancel", model=self._pulled) and ""), True)
        else:
            self._prompt = _Prompt("Pull model: ", self._pull)

    def _pull(self, model: str) -> None:
        def work() -> str:
            last: Dict[str, Any] = {}
            for last in self._source.pull(model):
                self._note = printable(f"{model}: {progress_line(last)}")
                self._wake.set()
            return transfer_end(last)
        if model:
            self._pulled = model
            self._do("pull", work)

    def _examine(self) -> None:
        def work() -> str:
            self._report = tuple(self._doctor() if self._doctor else (
                "The doctor looks at the machine that it runs on: b9agent.py doctor, there",))
            return self._report[-1]
        self._do("doctor", work)


# ----------------------------------------------------------------------
# 17. Embedded gateway                     its port; SQLite at gateway.db
# ----------------------------------------------------------------------
# The machine API of a Beta9 gateway for a handful of machines, for `demo`
# and for the tests: as strict about types as the real one, which decodes
# into Go structs.  Unlike it, a token serves one machine id and no other,
# and of a token only the SHA-256 is kept.

PENDING_TTL_S = 3600
_SCHEMA = """
CREATE TABLE IF NOT EXISTS pools (name TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS machines (
    machine_id TEXT PRIMARY KEY, pool_name TEXT NOT NULL, token_sha256 TEXT NOT NULL UNIQUE,
    provider_name TEXT NOT NULL DEFAULT '', state TEXT NOT NULL, created_at REAL NOT NULL,
    expires_at REAL NOT NULL, last_keepalive REAL, hostname TEXT NOT NULL DEFAULT '',
    cpu TEXT NOT NULL DEFAULT '', memory TEXT NOT NULL DEFAULT '',
    gpu_count TEXT NOT NULL DEFAULT '', private_ip TEXT NOT NULL DEFAULT '',
    agent_version TEXT NOT NULL DEFAULT '', metrics TEXT NOT NULL DEFAULT '{}',
    inference TEXT NOT NULL DEFAULT '{}');
"""


class Machine(NamedTuple):
    """A row as others may see it.  ttl_s: seconds until the gateway forgets it, 0 once it has
    (state is then "expired")."""
    machine_id: str
    pool_name: str
    provider_name: str
    state: str
    ttl_s: int
    created_at: float
    last_keepalive: Optional[float]
    hostname: str
    cpu: str
    memory: str
    gpu_count: str
    private_ip: str
    agent_version: str
    metrics: Dict[str, Any]
    inference: Dict[str, Any]


def _sha256(token: str) -> str:
    import hashlib
    return hashlib.sha256(token.encode("utf-8")).hexdigest()


class MachineStore:
    """Machines and pools in SQLite, in WAL mode: the command line writes beside a running gateway.

    One connection is kept open for the life of the store, since closing the last one folds the
    log into the database, with its syncs; each call has a connection of its own.
    Raises: UsageError where the file is not a database of ours or cannot be written.
    """

    def __init__(self, path: str, wall_clock: Callable[[], float] = time.time,
                 must_exist: bool = False) -> None:
        if must_exist and not os.path.exists(path):
            raise UsageError(f"there is no gateway database at {path}",
                             "`b9agent.py gateway` and `machine create` make one; --db names it")
        self._path = path
        self._wall_clock = wall_clock
        import sqlite3
        try:
            make_private_folder(os.path.dirname(os.path.abspath(path)))
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            os.chmod(path, 0o600)
            self._kept = self._connect()
            self._kept.execute("PRAGMA journal_mode=WAL")
            self._kept.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise UsageError(f"cannot use the gateway database {path}: {error}",
                             "Name another file with --db") from error

    def _connect(self) -> Any:
        import sqlite3
        connection = sqlite3.connect(self._path, timeout=5.0, isolation_level=None,
                                     check_same_thread=False)
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.row_factory = sqlite3.Row
        return connection

    def _execute(self, sql: str, values: Any) -> Tuple[List[Any], int]:
        """(rows, how many were changed).  Raises: AgentError where the database cannot be asked."""
        import sqlite3
        try:
            connection = self._connect()
            try:
                cursor = connection.execute(sql, values)
                return cursor.fetchall(), cursor.rowcount
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise UsageError(f"the gateway database {self._path} cannot be used: {error}",
                             "Is the disk full, or the file damaged?") from error

    def _run(self, sql: str, values: Any = ()) -> List[Any]:
        return self._execute(sql, values)[0]

    def close(self) -> None:
        self._kept.close()

    def create_machine(self, pool_name: str) -> Tuple[str, str]:
        """(machine id, token).  The pool is made if it is new."""
        import base64
        machine_id = os.urandom(4).hex()
        token = "-"
        while token.startswith("-"):  # kinder to command lines than the real one
            token = base64.urlsafe_b64encode(os.urandom(48)).decode("ascii")
        now = self._wall_clock()
        self._run("INSERT OR IGNORE INTO pools VALUES (?)", (pool_name,))
        self._run("INSERT INTO machines (machine_id, pool_name, token_sha256, state, created_at, "
                  "expires_at) VALUES (?, ?, ?, 'pending', ?, ?)",
                  (machine_id, pool_name, _sha256(token), now, now + PENDING_TTL_S))
        return machine_id, token

    def machine_of_token(self, token: str) -> Optional[str]:
        rows = self._run("SELECT machine_id FROM machines WHERE token_sha256 = ?",
                         (_sha256(token),))
        return rows[0]["machine_id"] if rows else None

    def has_pool(self, name: str) -> bool:
        return bool(self._run("SELECT 1 FROM pools WHERE name = ?", (name,)))

    def register(self, fields: Dict[str, Any]) -> None:
        self._run("UPDATE machines SET state = 'registered', pool_name = :pool_name, "
                  "provider_name = :provider_name, hostname = :hostname, cpu = :cpu, "
                  "memory = :memory, gpu_count = :gpu_count, private_ip = :private_ip, "
                  "expires_at = :expires_at WHERE machine_id = :machine_id",
                  {**fields, "expires_at": self._wall_clock() + GATEWAY_TTL_S})

    def keepalive(self, fields: Dict[str, Any]) -> bool:
        """False where the machine's time ran out, or it is in another pool or provider."""
        now = self._wall_clock()
        return bool(self._execute(
            "UPDATE machines SET state = 'ready', last_keepalive = :now, expires_at = :expires_at, "
            "agent_version = :agent_version, metrics = :metrics, inference = :inference "
            "WHERE machine_id = :machine_id AND pool_name = :pool_name AND expires_at > :now "
            "AND provider_name IN (:provider_name, '')",
            {**fields, "now": now, "expires_at": now + GATEWAY_TTL_S,
             "metrics": json.dumps(fields["metrics"]),
             "inference": json.dumps(fields["inference"] or {})})[1])

    def machines(self, pool_name: str = "", provider_name: str = "") -> List[Machine]:
        now = self._wall_clock()
        rows = self._run("SELECT * FROM machines WHERE ? IN (pool_name, '') "
                         "AND ? IN (provider_name, '') ORDER BY created_at, machine_id",
                         (pool_name, provider_name))
        return [self._machine(dict(row), now) for row in rows]

    @staticmethod
    def _machine(row: Dict[str, Any], now: float) -> Machine:
        row["ttl_s"] = max(0, round(row["expires_at"] - now))
        row["state"] = row["state"] if row["expires_at"] > now else "expired"
        row["metrics"] = json.loads(row["metrics"])
        row["inference"] = json.loads(row["inference"])
        return Machine(**{name: row[name] for name in Machine._fields})


_GO_INT = "int"  # a JSON number without fraction or exponent that fits 64 bits
_REGISTER_TYPES = {name: str for name in (
    "token", "machine_id", "hostname", "provider_name", "pool_name", "cpu", "memory", "gpu_count",
    "private_ip")}
_KEEPALIVE_TYPES = {
    "machine_id": str, "provider_name": str, "pool_name": str, "agent_version": str,
    "metrics": {name: float if kind is float else _GO_INT for name, kind in _METRICS.items()},
    "inference": {"status": str, "ip": str, "port": _GO_INT, "models": [str]},
}


def decode_go(value: Any, kind: Any) -> Any:
    """A JSON value as Go's encoding/json decodes it into a declared type: names in any case, null
    leaves the zero value (None for an object), unknown names ignored.  Raises: ValueError."""
    if isinstance(kind, dict):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError("an object")
        folded = {name.lower(): item for name, item in value.items()}
        return {name: decode_go(folded.get(name), inner) for name, inner in kind.items()}
    if isinstance(kind, list):
        if not isinstance(value, (list, type(None))):
            raise ValueError("an array")
        return [decode_go(item, kind[0]) for item in value or []]
    if value is None:
        return "" if kind is str else 0
    fits = (isinstance(value, str) if kind is str else
            isinstance(value, int) and not isinstance(value, bool) and -2**63 <= value < 2**63
            if kind is _GO_INT else
            isinstance(value, (int, float)) and not isinstance(value, bool)
            and abs(value) < 1.8e308)
    if not fits:
        raise ValueError(f"a {kind if kind is _GO_INT else kind.__name__}")
    # Half of a surrogate pair is no text; Go puts U+FFFD in its place.
    return re.sub("[\ud800-\udfff]", "\ufffd", value) if kind is str else value


def machine_record(machine: Machine) -> Dict[str, Any]:
    """The shape of GET /api/v1/machine/list, without the tokens that the real one shows."""
    state = machine._asdict()
    metrics = state.pop("metrics")
    state["status"] = state.pop("state")
    state["ttl_seconds"] = state.pop("ttl_s")
    return {"state": dict(state), "metrics": metrics}


class GatewayApi(Api):
    """The machine API.  on_change(machine id, state, metrics) is told of every transition."""

    name = "gateway"
    max_connections = 256
    strict = False  # as Go is, of which decode_go() knows

    def __init__(self, log: Log, store: MachineStore,
                 on_change: Optional[Callable[[str, str, Dict[str, Any]], None]] = None) -> None:
        super().__init__(log)
        self._store = store
        self._on_change = on_change or (lambda machine_id, state, metrics: None)
        base = "/api/v1/"
        self.routes = (
            Route("GET", base + "health", self._health, True, "whether the database answers"),
            Route("POST", base + "machine/register", self._register, False, "a machine joins"),
            Route("POST", base + "machine/keepalive", self._keepalive, False, "it lives, metrics"),
            Route("GET", base + "machine/list", self._list, False, "machines that are ready"),
            Route("GET", base + "machine/config", self._config, False, "remote config: none here"),
        )

    def error_body(self, error: HttpError) -> Dict[str, Any]:
        body = {"message": error.what}
        if error.code == "machine_not_found":
            body.update(error_code=error.code, suggestion=error.hint)
        return body

    def authorize(self, headers: Any) -> str:
        """The machine id that the token belongs to."""
        given = headers.get("authorization", "")
        machine_id = None
        if given.startswith("Bearer "):
            machine_id = self._store.machine_of_token(given[len("Bearer "):])
        if machine_id is None:
            raise HttpError(401, "unauthorized", "Unauthorized")
        return machine_id

    def _health(self, _request: Request) -> Response:
        try:
            self._store.has_pool("")
        except UsageError as error:
            return Response(500, {"status": "not ok", "error": error.what})
        return Response(200, {"status": "ok"})

    def _decode(self, request: Request, kinds: Dict[str, Any]) -> Dict[str, Any]:
        """The body into declared types, for the machine that the token belongs to."""
        if media_type(request.headers) != "application/json":
            raise HttpError(400, "bad_request", "Invalid payload")
        try:
            value = json.loads(request.body.decode("utf-8"), parse_constant=_no_constant)
            fields = decode_go(value, kinds)
        except (ValueError, RecursionError) as error:
            raise HttpError(400, "bad_request", "Invalid payload") from error
        if fields is None:
            raise HttpError(400, "bad_request", "Invalid payload")
        return fields

    def _bind(self, request: Request, fields: Dict[str, Any]) -> None:
        if fields["machine_id"] != request.caller:
            raise HttpError(403, "token_of_another_machine",
                            "Invalid token: it belongs to another machine id")

    def _register(self, request: Request) -> Response:
        fields = self._decode(request, _REGISTER_TYPES)
        self._bind(request, fields)
        if not self._store.has_pool(fields["pool_name"]):
            raise HttpError(500, "invalid_pool", "Invalid pool name")
        for name, pattern, what in (("cpu", "[0-9]{1,9}m?", "Invalid machine cpu value"),
                                    ("memory", "[0-9]{1,12}(Ki|Mi|Gi)",
                                     "Invalid machine memory value"),
                                    ("gpu_count", "[0-9]{1,6}", "Invalid gpu count")):
            if not re.fullmatch(pattern, fields[name]):
                raise HttpError(500, "invalid_value", what)
        self._store.register(fields)
        self.log("info", "machine_registered", machine=fields["machine_id"],
                 pool=fields["pool_name"], cpu=fields["cpu"], memory=fields["memory"],
                 gpus=fields["gpu_count"])
        self._on_change(fields["machine_id"], "registered", {})
        return Response(200, {"config": None, "machine_state": {
            "machine_id": fields["machine_id"], "status": "registered",
            "pool_name": fields["pool_name"], "ttl_seconds": GATEWAY_TTL_S}})

    def _keepalive(self, request: Request) -> Response:
        fields = self._decode(request, _KEEPALIVE_TYPES)
        if not fields["machine_id"] or not fields["pool_name"]:
            raise HttpError(400, "bad_request", "machine_id and pool_name are required")
        self._bind(request, fields)
        if fields["metrics"] is None:
            raise HttpError(500, "no_metrics", "Failed to update keepalive: metrics missing")
        fields["provider_name"] = fields["provider_name"] or "generic"
        key = ":".join(("provider", "machine", fields["provider_name"], fields["pool_name"],
                        fields["machine_id"]))
        if not self._store.keepalive(fields):
            raise HttpError(500, "machine_not_found", "Failed to update keepalive: failed to get "
                            f"machine state <{key}>: machine not found",
                            "Register the machine again")
        self.log("debug", "machine_keepalive", machine=fields["machine_id"])
        self._on_change(fields["machine_id"], "ready", fields["metrics"])
        return Response(200, {"status": "ok", "machine_state": {
            "machine_id": fields["machine_id"], "status": "ready",
            "pool_name": fields["pool_name"], "last_keepalive": str(int(time.time())),
            "last_worker_seen": "", "ttl_seconds": GATEWAY_TTL_S,
            "agent_version": fields["agent_version"]}})

    def _list(self, request: Request) -> Response:
        found = self._store.machines(request.query.get("pool_name", ""),
                                     request.query.get("provider_name", ""))
        return Response(200, [machine_record(machine) for machine in found
                              if machine.state == "ready"])

    def _config(self, _request: Request) -> Response:
        raise HttpError(500, "no_config", "Unable to create remote config")


def start_gateway(host: str, port: int, api: GatewayApi) -> ApiServer:
    """Raises: LockedError where another program has the port, UsageError for any other reason."""
    try:
        server = ApiServer(api, host, port)
    except OSError as error:
        import errno
        what = f"cannot listen on {host_port(host, port)}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            raise LockedError(what, "Choose another port with --port") from error
        raise UsageError(what, "Give an address of this machine with --host") from error
    server.start()
    return server


# ----------------------------------------------------------------------
# 18. Client: `from b9agent import inference`           whom it is told to ask
# ----------------------------------------------------------------------
# For programs that use the models: OpenAI's API, which every engine here
# speaks.  Importing this file starts nothing.  Failures come back in the
# result, as in the predecessor's client, or as exceptions where asked for.


class InferenceError(AgentError):
    """No usable answer.  status: HTTP's, None where none came."""
    exit_code = Exit.FAILED

    def __init__(self, what: str, hint: str = "", status: Optional[int] = None) -> None:
        super().__init__(what, hint)
        self.status = status


class InferenceUnreachable(InferenceError):
    """Nobody answered, or the answer broke off."""


class InferenceRefused(InferenceError):
    """401 or 403: the token is missing or may not do this."""


class InferenceModelMissing(InferenceError):
    """404: there is no such model, or no such route."""


class InferenceLimited(InferenceError):
    """402, 429 or 503: a limit or a queue; retry_after_s is what was asked for."""
    retry_after_s: Optional[float] = None


_INFERENCE_ERRORS = {401: InferenceRefused, 403: InferenceRefused, 404: InferenceModelMissing,
                     402: InferenceLimited, 429: InferenceLimited, 503: InferenceLimited}


class InferenceResult(NamedTuple):
    """An answer, or a piece of one that streams.  usage: prompt_tokens, completion_tokens,
    total_tokens, as far as the engine tells; of a stream in its last piece.  error: "" where ok."""
    ok: bool
    content: str = ""
    finish_reason: Optional[str] = None
    usage: Dict[str, Any] = {}
    model: str = ""
    error: str = ""
    embeddings: Tuple[Tuple[float, ...], ...] = ()

    @property
    def embedding(self) -> Optional[Tuple[float, ...]]:
        """The first one."""
        return self.embeddings[0] if self.embeddings else None

    def __bool__(self) -> bool:
        return self.ok


class ModelNames(list):
    """Names that can be asked for; error: "" where they were told."""
    error = ""


def _dict_at(record: Any, *path: Any) -> Dict[str, Any]:
    """The object at a place in JSON; {} where there is none."""
    for step in path:
        inside = isinstance(record, dict) and step in record or (
            isinstance(record, list) and type(step) is int and step < len(record))
        record = record[step] if inside else None
    return record if isinstance(record, dict) else {}


def parse_answer(answer: Dict[str, Any], streams: bool = False) -> InferenceResult:
    """A completion, or a chunk of one, in OpenAI's form.

    >>> parse_answer({"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}]})[:3]
    (True, 'Hi', 'stop')
    """
    choice = _dict_at(answer, "choices", 0)
    said = _dict_at(choice, "delta" if streams else "message").get("content", choice.get("text"))
    reason = choice.get("finish_reason")
    return InferenceResult(True, said if isinstance(said, str) else "",
                           reason if isinstance(reason, str) else None,
                           _dict_at(answer, "usage"), str(answer.get("model") or ""))


class InferenceClient:
    """One front of models.  Every method may be called from any thread."""

    def __init__(self) -> None:
        self.configure()

    def configure(self, host: Optional[str] = None, port: Optional[int] = None,
                  token: Optional[str] = None, scheme: str = "http", timeout_s: float = 300.0,
                  raise_errors: bool = False, ca_file: Optional[str] = None) -> None:
        """Where the models are.  timeout_s: to an answer, or between two pieces of a stream.
        raise_errors: raise a typed InferenceError instead of giving a result that is not ok."""
        host = host or os.environ.get("BETA9_INFERENCE_HOST") or "127.0.0.1"
        text = os.environ.get("B9AGENT_INFERENCE_PORT", "")
        port = port or (int(text) if re.fullmatch("[0-9]{1,5}", text) and 0 < int(text) < 65536
                        else 11434)
        if token:
            REDACTOR.add(token)
        if scheme not in ("http", "https") or not 0 < port < 65536:
            raise UsageError(f"`{scheme}` and {port} are no scheme and port of a server",
                             "Such as http and 11434; B9AGENT_INFERENCE_PORT may say otherwise")
        # At once: a token goes to the host that it was given with, whichever thread asks.
        self._target = (Endpoint(scheme, host, port, ca_file),
                        {"Authorization": f"Bearer {token}"} if token else {})
        self._timeout_s = timeout_s
        self._raise = raise_errors

    # -- requests --------------------------------------------------------

    def _open(self, method: str, path: str, body: Optional[Dict[str, Any]],
              streams: bool = False) -> HttpStream:
        """The head of a 200.  Raises: InferenceError."""
        data = None if body is None else json.dumps(body).encode("utf-8")
        endpoint, headers = self._target
        headers = dict(headers, **({"Content-Type": "application/json"} if data else {}))
        try:
            stream = http_stream(method, endpoint, path, headers, data, self._timeout_s,
                                 self._timeout_s if streams else None)
        except HttpFailure as failure:
            raise InferenceUnreachable(f"{endpoint.url} cannot be asked: {failure}",
                                       "Is an engine running there? b9agent.py status") from failure
        if stream.status == 200:
            return stream
        with stream:
            answer = _json_object(self._rest(stream))
        said = answer.get("error")
        said = said.get("message") if isinstance(said, dict) else said or answer.get("message")
        error = _INFERENCE_ERRORS.get(stream.status, InferenceError)(
            printable(str(said or f"{path} answered {stream.status}")[:500]), status=stream.status)
        if isinstance(error, InferenceLimited):
            after = stream.headers.get("retry-after", "")
            error.retry_after_s = float(after) if re.fullmatch("[0-9]{1,6}", after) else None
        raise error

    def _rest(self, stream: HttpStream) -> bytes:
        try:
            return stream.read(64 << 20)
        except HttpFailure as failure:
            raise InferenceUnreachable(f"the answer broke off: {failure}") from failure

    def _ask(self, method: str, path: str, body: Optional[Dict[str, Any]]) -> Dict[str, Any]:
        with self._open(method, path, body) as stream:
            return _json_object(self._rest(stream))

    def _result(self, ask: Callable[[], InferenceResult]) -> InferenceResult:
        try:
            return ask()
        except InferenceError as error:
            if self._raise:
                raise
            return InferenceResult(False, error=str(error))

    def _pieces(self, path: str, body: Dict[str, Any]) -> Iterator[InferenceResult]:
        """Server-sent events to `[DONE]`; a stream that ends without it has broken off."""
        body = dict(body, stream=True, stream_options={"include_usage": True})
        with self._open("POST", path, body, streams=True) as stream:
            try:
                for line in stream.lines():
                    if line.strip() == b"data: [DONE]":
                        return
                    if not line.startswith(b"data:"):
                        continue
                    answer = _json_object(line[5:])
                    if answer.get("error"):
                        said = answer["error"]
                        said = said.get("message") or said if isinstance(said, dict) else said
                        raise InferenceError(printable(str(said)[:500]))
                    if not isinstance(answer.get("choices"), list):
                        raise InferenceError("a piece of the answer is none of a completion")
                    yield parse_answer(answer, streams=True)
            except HttpFailure as failure:
                raise InferenceUnreachable(f"the answer broke off: {failure}") from failure
        raise InferenceUnreachable("the answer ended before it was complete")

    def _stream(self, path: str, body: Dict[str, Any]) -> Iterator[InferenceResult]:
        try:
            yield from self._pieces(path, body)
        except InferenceError as error:
            if self._raise:
                raise
            yield InferenceResult(False, error=str(error))

    def _complete(self, path: str, body: Dict[str, Any], stream: bool) -> Any:
        if stream:
            return self._stream(path, body)
        def ask() -> InferenceResult:
            answer = self._ask("POST", path, dict(body, stream=False))
            if not _dict_at(answer, "choices", 0):
                raise InferenceError("the answer holds no completion")
            return parse_answer(answer)
        return self._result(ask)

    # -- what there is to ask --------------------------------------------

    def chat(self, model: str, messages: Sequence[Dict[str, Any]], stream: bool = False,
             **parameters: Any) -> Any:
        """The model's next message.  parameters: max_tokens, temperature, …, in OpenAI's names.

        stream: an iterator of pieces instead, each with its part of the content.
        """
        return self._complete("/v1/chat/completions",
                              dict(parameters, model=model, messages=list(messages)), stream)

    def generate(self, model: str, prompt: str, stream: bool = False, **parameters: Any) -> Any:
        """What the model writes after a prompt.  Otherwise as chat()."""
        return self._complete("/v1/completions", dict(parameters, model=model, prompt=prompt),
                              stream)

    def embed(self, model: str, input: Any, **parameters: Any) -> InferenceResult:
        """The embedding of a text, or those of several, in their order."""
        def ask() -> InferenceResult:
            answer = self._ask("POST", "/v1/embeddings", dict(parameters, model=model, input=input))
            rows = answer.get("data")
            vectors = [row.get("embedding") for row in rows if isinstance(row, dict)] if isinstance(
                rows, list) else []
            # A list of numbers is one text, in tokens.
            count = len(input) if isinstance(input, (list, tuple)) and not (
                input and isinstance(input[0], int)) else 1
            if len(vectors) != count or not all(
                    isinstance(vector, list) and vector and all(type(number) in (int, float)
                    for number in vector) for vector in vectors):
                raise InferenceError("the answer does not hold the embeddings")
            return InferenceResult(True, usage=_dict_at(answer, "usage"), model=model,
                                   embeddings=tuple(map(tuple, vectors)))
        return self._result(ask)

    def _model_rows(self) -> List[Any]:
        """Raises: InferenceError."""
        answer = self._ask("GET", "/v1/models", None)
        rows = answer.get("data") or []  # Ollama: null where none
        if "data" not in answer or not isinstance(rows, list):
            raise InferenceError("the answer is no list of models")
        return rows

    def list_models(self) -> ModelNames:
        """The names that can be asked for."""
        try:
            rows = self._model_rows()
        except InferenceError as error:
            if self._raise:
                raise
            names = ModelNames()
            names.error = str(error)
            return names
        return ModelNames(row["id"] for row in rows if isinstance(row, dict)
                          and isinstance(row.get("id"), str))

    def _keep(self, model: str, keep_alive: int) -> InferenceResult:
        def ask() -> InferenceResult:
            answer = self._ask("POST", "/api/generate", {
                "model": model, "prompt": "", "stream": False, "keep_alive": keep_alive})
            if answer.get("done") is not True:
                raise InferenceError(printable(str(answer.get("error") or "the answer is not "
                                                   "Ollama's: it loads and unloads")[:500]))
            return InferenceResult(True, model=model)
        return self._result(ask)

    def load_model(self, model: str) -> InferenceResult:
        """Into memory, to stay there: of an Ollama; other engines hold their one model."""
        return self._keep(model, -1)

    def unload_model(self, model: str) -> InferenceResult:
        """Out of memory, once its requests have ended: of an Ollama."""
        return self._keep(model, 0)

    def health(self) -> InferenceResult:
        """ok where an engine answers."""
        return self._result(lambda: InferenceResult(self._model_rows() is not None))


inference = InferenceClient()


# ----------------------------------------------------------------------
# 19. Agent                          STATE/agent.lock, machine_id, control.*
# ----------------------------------------------------------------------
# The composition: what a running agent is made of, started in order and
# stopped in reverse.  One agent per state folder, held by a lock that the
# kernel drops when the process ends, however it ends.


class StateLock:
    """The state folder is ours.  Raises: LockedError with the pid of the one who has it."""

    def __init__(self, state_dir: str) -> None:
        import fcntl
        make_private_folder(state_dir)
        path = os.path.join(state_dir, "agent.lock")
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise UsageError(f"cannot write in the state folder {state_dir}: {error.strerror}",
                             "Mend its permissions, or choose another with --state-dir") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            raise LockedError(f"another agent holds {state_dir} (pid {printable(holder)})",
                              "Stop it first, or give this one its own folder with --state-dir"
                              ) from error
        except OSError as error:
            os.close(self._descriptor)
            raise UsageError(f"cannot lock {path}: {error.strerror}", "Choose a state folder on a "
                             "local file system with --state-dir") from error
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass  # the disk is full: the lock holds all the same, only its message will not say who

    def release(self) -> None:
        os.close(self._descriptor)


def kept_machine_id(settings: Any, keep: bool) -> str:
    """The machine id: set, or kept from an earlier run, or made now (and kept, if asked to).

    Made once: a new id at every start would leave ghosts in the pool.
    """
    if settings.machine_id:
        return settings.machine_id
    path = os.path.join(settings.state_dir, "machine_id")
    kept = (read_text(path, 64) or "").strip()
    if re.fullmatch("[0-9a-f]{8}", kept):
        return kept
    if os.path.lexists(path):
        raise UsageError(f"{path} cannot be read, or does not hold 8 hexadecimal digits",
                         "Put the machine's id there, or delete the file for a new one")
    made = os.urandom(4).hex()
    if keep:
        try:
            write_atomic(path, made + "\n", 0o644)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}",
                             "The state folder must be writable") from error
    return made


def read_private_ip(gateway_host: str) -> str:
    """This machine's address on the way to the gateway, a dotted quad.

    Connecting a datagram socket chooses a route and sends nothing.  Where the gateway is a name
    (looking it up can take long) or on loopback (a tunnel), the default route's address counts:
    192.0.2.1 is reserved for documents and never reached.
    """
    numeric = re.fullmatch("[0-9.]+", gateway_host) is not None
    for target in (gateway_host, "192.0.2.1") if numeric else ("192.0.2.1",):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                address = probe.getsockname()[0]
        except (OSError, UnicodeError):
            continue
        if not address.startswith("127."):
            return address
    return "127.0.0.1"


def nearest_folder(path: str) -> str:
    """The path, or what exists above it: the file system where it will be made."""
    while not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def sd_notify(message: str) -> None:
    """Tell systemd, where it listens.  Source: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode("utf-8"), address)
    except OSError:
        pass  # its supervisor is gone: nobody to tell


def watchdog_interval_s() -> Optional[float]:
    """How often systemd wants a sign of life; a third of what it allows.  None: it does not."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not re.fullmatch("[0-9]{1,15}", microseconds) or pid not in ("", str(os.getpid())):
        return None
    return max(0.1, int(microseconds) / 3e6)


def gpu_record(gpu: Gpu, offered: bool) -> Dict[str, Any]:
    """One GPU as JSON: the fields of Gpu, Beta9's name for its type, what it may be used for."""
    return dict(rounded(gpu._asdict()), type=gpu_type(gpu.name), offered=offered,
                free=offered and is_free(gpu),
                mig_instances=[part._asdict() for part in gpu.mig_instances],
                processes=gpu.processes and [process._asdict() for process in gpu.processes])


def host_record(facts: HostFacts, sample: Optional[HostSample]) -> Dict[str, Any]:
    """The machine as JSON: what it is, and how it was at the last look."""
    return dict(facts._asdict(), **rounded(sample._asdict() if sample else {}))


LIVE_LIMIT_S = 2.0  # who watches waits so long for the drivers


class Agent:
    """A machine's agent.  Only construction decides what it is made of; run() is its life.

    Raises (construction): UsageError.  keep: whether a new machine id may be written.
    """

    def __init__(self, loaded: Loaded, log: Log, keep: bool = True) -> None:
        settings = self.settings = loaded.settings
        self._log = log
        machine_id = kept_machine_id(settings, keep)
        self.identity = Identity(machine_id, settings.pool_name, settings.provider_name,
                                 settings.hostname or f"machine-{machine_id}",
                                 settings.k3s_token or "")
        self._identifying = threading.Lock()  # who replaces identity; it is read without
        self.tunnel = Tunnel(settings, log, self._is_ready, self._tell_tunnel
                             ) if settings.tunnel else None
        self.endpoint = self.tunnel.endpoint if self.tunnel else gateway_endpoint(settings)
        if settings.k3s_service_account and settings.k3s_token:
            raise UsageError("k3s.token and k3s.service_account are both set",
                             "Keep one: tokens of the account are made and renewed by the agent")
        self.k3s = TokenKeeper(self._mint_k3s_token, lambda token: self.change_identity(
            k3s_token=token), log) if settings.k3s_service_account else None
        self.tailnet = Tailnet(settings.tailnet_socket, log, self._tell_tailnet)
        # Behind a tunnel the gateway is on no tailnet of ours: it could not dial that address.
        self._offers_tailnet = not settings.hostname and self.tunnel is None
        self._tailnet_control = (settings.tailnet_control
                                 and loaded.origins.get("control_host") == "default")
        self._host = make_host()
        self._facts: Optional[HostFacts] = None
        self._gpus = GpuSampler(make_gpu_sources())
        # The samplers take one thread at a time, and an engine's start and stop look as well as a
        # keepalive: held for a look, which has its own limit on time.
        self._looking = threading.Lock()
        self._energy = EnergyMeter(os.path.join(settings.state_dir, "energy.json") if keep
                                   else None, settings, log)
        client = GatewayClient(self.endpoint, settings.token, settings.pool_name, log,
                               # A request that hangs costs one interval at most.
                               min(KEEPALIVE_LIMIT_S, settings.keepalive_interval))
        self.client = client
        if self.tunnel:
            client.before_request = self.tunnel.await_running
        self.send_register = lambda: client.register(self.register_payload())
        self.send_keepalive = lambda: self._send_keepalive(client)
        self.membership = Membership(self.send_register, self.send_keepalive,
                                     settings.keepalive_interval, log)
        self._started_s, self._started_wall_s = now_s(), time.time()
        self._keepalive_took_s: Optional[float] = None
        self._capacity = Capacity(None, None)
        self._cpus: Optional[float] = None
        self._alive_until_s = now_s() + 60.0
        self._metrics: Dict[str, Any] = {}
        self._sample: Optional[MachineSample] = None
        # For who watches: the keepalive's load is that of its own interval.
        self._live_lock = threading.Lock()  # guards _live_host and _live_due_s, for a look
        self._live_host: Optional[Host] = None
        self._live: Optional[MachineSample] = None
        self._live_due_s = 0.0
        self.wake_main, self._wake_membership = Wake(), Wake()
        self._stopping = False
        self._told: Optional[State] = None
        self._failure: Optional[AgentError] = None
        self._control: Optional[ApiServer] = None
        self._private_ip, self._beat_after_s = "", 0.0
        self.inference = Inference(settings, log, self._hardware, self._beat, self._tell_inference,
                                   keep)
        self.pods = PodWatch(settings, machine_id, log, read=self._pods_kubeconfig)

    # -- what is said of this machine ----------------------------------

    def _capped(self) -> Capacity:
        """What is offered of CPU and memory."""
        capacity = self._host.capacity()
        self._cpus = None if not capacity.cpu_millicores else capacity.cpu_millicores / 1000
        def least(*values: Optional[int]) -> Optional[int]:
            known = [value for value in values if value is not None]
            return min(known) if known else None
        self._capacity = Capacity(least(capacity.cpu_millicores, self.settings.max_cpu),
                                  least(capacity.memory_bytes, self.settings.max_memory))
        return self._capacity

    def facts(self) -> HostFacts:
        """Read when somebody first asks: a machine of 256 cores tells of each."""
        if self._facts is None:
            self._facts = self._host.facts()
        return self._facts

    def _look_at_gpus(self, limit_s: float) -> Tuple[GpuSample, Optional[Tuple[Gpu, ...]]]:
        """(all of them, those that are offered); the drivers get limit_s at most."""
        with self._looking:
            gpus, settings = self._gpus.sample(limit_s), self.settings
        if not gpus.known:
            return gpus, None
        return gpus, tuple(offered_gpus(gpus.gpus, gpus.vendor, settings.gpu_ids, settings.max_gpus,
                                        os.environ.get("CUDA_VISIBLE_DEVICES")))

    def _look_at_host(self) -> HostSample:
        with self._looking:
            return self._host.sample(nearest_folder(self.settings.state_dir))

    def look(self) -> MachineSample:
        """One look at the machine."""
        gpus, offered = self._look_at_gpus(GPU_LIMIT_S)
        host = self._look_at_host()
        self._capped()
        self._count_energy(lambda: self._energy.add(host.cpu_pct, self._cpus, gpus.gpus,
                                                    read_rapl(), gpus.silent))
        self._sample = MachineSample(host, gpus, offered, self._energy.report(), now_s())
        return self._sample

    def _look_live(self) -> Optional[MachineSample]:
        """The last look of those that are taken for who watches: one a second at most, and fewer
        where drivers and programs take their time, so that all cost a hundredth of it."""
        if self._live_lock.acquire(blocking=False):
            try:
                begun_s = now_s()
                if begun_s >= self._live_due_s:
                    self._live_host = self._live_host or make_host()
                    gpus, offered = self._look_at_gpus(LIVE_LIMIT_S)
                    host = self._live_host.sample(nearest_folder(self.settings.state_dir))
                    self._live = MachineSample(host, gpus, offered, self._energy.report(), now_s())
                    self._live_due_s = begun_s + max(0.9, min(30.0, 100 * (now_s() - begun_s)))
            finally:
                self._live_lock.release()
        return self._live or self._sample  # at first, while another takes the first

    def _count_energy(self, count: Callable[[], None]) -> None:
        """A defect of ours costs figures, not the keepalive."""
        try:
            count()
        except Exception as error:
            self._log.defect(error)

    def _energy_between(self) -> None:
        gpus = self._look_at_gpus(1.0)[0] if wants_power_samples(self._sample.gpus) else None
        self._energy.add_between(gpus and gpus.gpus, read_rapl(), gpus.silent if gpus else "")

    def register_payload(self) -> Dict[str, Any]:
        cpu_millicores, memory_bytes = self._capped()
        # The number of GPUs is said once: eight of them may take seconds to wake up.
        gpus, offered = self._look_at_gpus(GPU_WAKE_LIMIT_S)
        if offered is None:
            self._log("warning", "gpus_unknown", what="; ".join(gpus.problems),
                      do="Registering without GPUs; see `b9agent.py doctor`, then restart")
        self._private_ip = read_private_ip(self.settings.gateway_host)
        return register_payload(self.identity, cpu_millicores, memory_bytes, len(offered or ()),
                                self._private_ip)

    def change_identity(self, **facts: str) -> None:
        """From any thread: the gateway is to know what is another now, such as hostname=NAME."""
        with self._identifying:
            changed = self.identity._replace(**facts)
            if changed == self.identity:
                return
            self.identity = changed
        self.membership.register_again()
        self._wake_membership.set()

    def _pods_kubeconfig(self, settings: Any) -> Optional[KubeConfig]:
        """Its own token is renewed by the way: without k3s.service_account nobody else does it.
        Where that fails the watch says why, or the next hour's does it.  Raises: UsageError."""
        config = read_kubeconfig(settings)
        with contextlib.suppress(KubeError):
            if config:
                renew_own_token(config, os.path.join(settings.state_dir, "k3s.kubeconfig"))
        return config

    def _mint_k3s_token(self) -> Tuple[str, float]:
        """For the gateway.  Raises: AgentError."""
        settings, config = self.settings, read_kubeconfig(self.settings)
        if config is None:
            raise UsageError("there is no k3s here", "sudo b9agent.py k3s install")
        try:
            renew_own_token(config, os.path.join(settings.state_dir, "k3s.kubeconfig"))
        except KubeError as error:
            self._log.error("k3s_kubeconfig", error, "warning")
        return mint_token(KubeClient(config), K3S_NAMESPACE, settings.k3s_service_account,
                          settings.k3s_token_hours * 3600)

    def _k3s_status(self) -> Optional[Dict[str, Any]]:
        if self.k3s is None:
            return None
        ends_s, message = self.k3s.told
        return {"service_account": self.settings.k3s_service_account,
                "token_expires": None if ends_s is None else utc_stamp(ends_s),
                "message": message}

    def _is_ready(self) -> bool:
        return self.membership.snapshot.state is State.READY

    def _tell_tunnel(self, status: Dict[str, Any]) -> None:
        """What waits for the gateway need not wait any longer once the tunnel is there."""
        self._log.events.tell("tunnel", **status)
        if status["state"] == "running" and not status["message"]:
            self.membership.hurry((State.READY, State.UNREACHABLE))
            self._wake_membership.set()

    def _tell_tailnet(self, status: Dict[str, Any]) -> None:
        """What has no address now keeps its name: to register again would only set it back."""
        self._log.events.tell("tailnet", **status)
        address = status["address"]
        if address:  # the way to the gateway may be there again
            self.membership.hurry((State.READY, State.UNREACHABLE))
        self._wake_membership.set()
        if address and self._offers_tailnet:
            self.change_identity(hostname=address)

    def _hardware(self) -> Hardware:
        """What an engine may use now."""
        _, offered = self._look_at_gpus(GPU_LIMIT_S)
        host = self._look_at_host()
        free = tuple(None if gpu.memory_total_bytes is None or gpu.memory_used_bytes is None else
                     gpu.memory_total_bytes - gpu.memory_used_bytes for gpu in offered or ())
        unused = None if host.memory_total_bytes is None or host.memory_used_bytes is None else (
            host.memory_total_bytes - host.memory_used_bytes)
        return Hardware(offered[0].vendor if offered else "", free, unused,
                        tuple(gpu.index for gpu in offered or ()))

    def _beat(self, models: Sequence[str]) -> None:
        """To the gateway's router, where it has one; a gateway without is asked again later."""
        if now_s() < self._beat_after_s or self.inference.wire(self._private_ip) is None:
            return
        try:
            known = self.client.heartbeat(self.identity.machine_id, models)
        except GatewayError:
            return  # the keepalive tells of it
        if not known:
            self._beat_after_s = now_s() + 600.0

    def _tell_inference(self) -> None:
        """A change of the engine is worth a keepalive at once: work may come, or must not."""
        status = self.inference.status()
        self._log.events.tell("inference", **{name: status[name] for name in (
            "status", "engine", "endpoint", "models", "message")})
        self.membership.hurry()
        self._wake_membership.set()

    def keepalive_payload(self) -> Dict[str, Any]:
        look = self.look()
        sample, offered = look.host, look.offered
        cpu_millicores, memory_bytes = self._capacity
        pods = self.pods.pods()
        running = None if pods is None else [pod for pod in pods if pod.status == "RUNNING"]
        self._metrics = {
            "total_cpu_available": cpu_millicores,
            "total_memory_available": None if memory_bytes is None else memory_bytes >> 20,
            "total_disk_space_bytes": sample.disk_total_bytes,
            "total_disk_free_bytes": sample.disk_free_bytes,
            "cpu_utilization_pct": sample.cpu_pct, "memory_utilization_pct": sample.memory_pct,
            "free_gpu_count": None if offered is None else sum(map(is_free, offered)),
            "worker_count": None if running is None else len(running),
            "container_count": None if running is None else sum(pod.containers for pod in running),
            # This agent has no cache of its own: true zeros.
            "cache_usage_pct": 0.0, "cache_capacity": 0, "cache_memory_usage": 0,
            "cache_cpu_usage": 0.0}
        return keepalive_payload(self.identity, self._metrics,
                                 self.inference.wire(self._private_ip))

    def _send_keepalive(self, client: GatewayClient) -> None:
        payload, begun_s = self.keepalive_payload(), now_s()
        try:
            client.keepalive(payload)
        finally:
            self._keepalive_took_s = now_s() - begun_s

    def metrics_view(self) -> MetricsView:
        """Of what the last keepalive saw: no driver is asked for it."""
        return MetricsView(
            self.membership.snapshot, self._sample, self.facts(), self._capacity,
            self.identity, read_process(self._started_wall_s), now_s(), self._keepalive_took_s,
            self.client.clock_offset_s, self.settings.grid_intensity, self.settings.pue,
            engine=self.inference.figures(),
            tunnel_state=self.tunnel.status()["state"] if self.tunnel else "",
            tailnet_state=self.tailnet.reading.state.replace("none", ""),
            pods_state=self.pods.state, pods=self.pods.counts())

    def metrics_text(self) -> str:
        return render_metrics(self.metrics_view())

    def status(self, fresh: bool = False) -> Dict[str, Any]:
        """The fields of GET /status: the predecessor's names, and ours.  fresh: figures of now;
        but `metrics`, which are what the last keepalive sent."""
        snapshot, metrics = self.membership.snapshot, metrics_payload(self._metrics)
        # Once: the next look may come while this is told.
        sample = self._look_live() if fresh else self._sample
        host, offered = (sample.host, sample.offered) if sample else (None, None)
        machine, offset_s = host_record(self.facts(), host), self.client.clock_offset_s
        inference, jobs = self.inference.status(), self.pods.counts() or {}
        ago_s = None if snapshot.last_ready_s is None else round(now_s() - snapshot.last_ready_s, 1)
        return {
            "status": snapshot.state.value, "machine_id": self.identity.machine_id,
            "pool": self.identity.pool_name, "uptime_seconds": round(now_s() - self._started_s, 1),
            "cpu_percent": machine.get("cpu_pct"), "memory_percent": machine.get("memory_pct"),
            "gpu_count": None if offered is None else len(offered), "state": snapshot.state.value,
            "message": REDACTOR.scrub(snapshot.message), "version": VERSION, "pid": os.getpid(),
            "gateway": self.endpoint.url, "hostname": self.identity.hostname,
            "provider": self.identity.provider_name,
            "state_seconds": round(now_s() - snapshot.since_s, 1),
            "last_keepalive": snapshot.last_ready_wall_s and utc_stamp(snapshot.last_ready_wall_s),
            "last_keepalive_seconds_ago": ago_s, "keepalives": snapshot.keepalives,
            "registrations": snapshot.registrations, "failures": snapshot.failures,
            "network_received_bytes": host and host.net_received_bytes,
            "network_sent_bytes": host and host.net_sent_bytes,
            "clock_offset_seconds": offset_s if offset_s is None else round(offset_s, 1),
            "host": machine,
            "gpus": [gpu_record(gpu, gpu in (offered or ())) for gpu in sample.gpus.gpus]
                    if sample else [],
            "gpu_problems": sample.gpus.problems if sample else [],
            "energy": energy_payload(sample and sample.energy, self.settings),
            "inference_status": inference["status"],
            "inference_port": self.inference.port(), "pods": self.pods.status(),
            "running_jobs": jobs.get("RUNNING", 0), "total_jobs": sum(jobs.values()),
            "inference": inference, "metrics": metrics,
            "k3s": self._k3s_status(), "tailnet": self.tailnet.status(),
            "tunnel": self.tunnel.status() if self.tunnel else None}

    # -- its life -------------------------------------------------------

    def run_once(self) -> None:
        """Register and one keepalive.  Raises: GatewayError."""
        try:
            if self.tunnel:
                end_leftovers(self.settings.state_dir, self._log)
                self.tunnel.start()
            self.tailnet.start()
            self._await_tailnet()
            if self.k3s:
                self.k3s.renew()
            self.send_register()
            self._log("info", "registered", machine=self.identity.machine_id,
                      pool=self.identity.pool_name, gateway=self.endpoint.url)
            self.send_keepalive()
            self._log("info", "ready", machine=self.identity.machine_id)
        finally:
            self.tailnet.stop()
            if self.tunnel:
                self.tunnel.stop()

    def stop(self) -> None:
        """From a signal handler or another thread: end run()."""
        self._stopping = True
        self.wake_main.set()
        self._wake_membership.set()

    def run(self) -> None:
        """Until stop(), or until the gateway refuses the machine.  The caller holds the state
        folder's lock.  Raises: TokenRefused, RequestRefused."""
        try:
            end_leftovers(self.settings.state_dir, self._log)
            self._start_control()
            if self.tunnel:
                self.tunnel.start()
            self.tailnet.start()
            if self.k3s:
                self.k3s.start()
            self._autostart()
            thread = threading.Thread(target=self._run_membership, name="membership", daemon=True)
            sd_notify("READY=1\nSTATUS=starting")
            self._log("info", "started", version=VERSION, machine=self.identity.machine_id,
                      pool=self.identity.pool_name, gateway=self.endpoint.url,
                      state_dir=self.settings.state_dir, pid=os.getpid())
            thread.start()
            self._watch(watchdog_interval_s())
            sd_notify("STOPPING=1")
            thread.join(2.0)  # it may sit in a request: it is a daemon and sends nothing more
        finally:
            self.pods.stop()
            self.tailnet.stop()
            self._stop_inference()
            if self.k3s:
                self.k3s.stop()
            if self.tunnel:
                self.tunnel.stop()
            self._stop_control()
            self._energy.save()
        if self._failure is not None:
            raise self._failure
        self._log("info", "stopped", keepalives=self.membership.snapshot.keepalives)

    def _autostart(self) -> None:
        def start() -> None:
            try:
                self.inference.start()
            except AgentError as error:
                self._log.error("inference_failed", error)
            except Exception as error:
                self._log.defect(error)
        if self.settings.inference_autostart:
            threading.Thread(target=start, name="inference-start", daemon=True).start()

    def _stop_inference(self) -> None:
        try:
            self.inference.close()
        except AgentError as error:
            self._log.error("inference_left", error)

    def _await_tailnet(self) -> None:
        """At boot its address may be on its way, and who registers before registers twice."""
        told = False
        while self._offers_tailnet and not self.tailnet.settled and not self._stopping:
            self._tick(KEEPALIVE_LIMIT_S)
            if not told and self.tailnet.reading.state == "waiting":
                told = True
                self._log("info", "tailnet", what="registration waits for the tailnet address, "
                          f"{TAILNET_BOOT_S:g} s at most")
            self._wake_membership.wait(0.1)

    def _run_membership(self) -> None:
        try:
            self._await_tailnet()
            self.membership.run(self._wake_membership, lambda: self._stopping, self._tick)
        except AgentError as error:
            self._failure = error
        finally:
            self.stop()

    def _tick(self, within_s: float) -> None:
        self._alive_until_s = now_s() + within_s
        self.tailnet.start()
        if self._sample is not None and self._energy.is_due():
            self._count_energy(self._energy_between)
        if self.membership.snapshot.state is not State.STARTING:
            self.pods.start()  # after the first keepalive, which is not to wait for it
        if self.membership.snapshot.state is not self._told:
            self.wake_main.set()

    def _watch(self, watchdog_s: Optional[float]) -> None:
        """The main thread: signals arrive here, systemd hears from here."""
        while not self._stopping:
            state = self.membership.snapshot.state
            if state is not self._told:
                self._told = state
                self._log.events.tell("state", state=state.value,
                                      message=self.membership.snapshot.message)
                sd_notify(f"STATUS={state.value}: machine {self.identity.machine_id}, pool "
                          f"{self.identity.pool_name}, {self.endpoint.url}")
            if watchdog_s and now_s() < self._alive_until_s:
                sd_notify("WATCHDOG=1")
            self.wake_main.wait(watchdog_s or 3600.0)

    def _start_control(self) -> None:
        """A port that is taken costs the control API, never the keepalive."""
        settings = self.settings
        address_file = os.path.join(settings.state_dir, "control.addr")
        remove_file(address_file)
        try:
            token = kept_secret(os.path.join(settings.state_dir, "control.token"))
            api = ControlApi(self._log, token, agent_routes(self.status, self.metrics_text)
                             + inference_routes(self.inference))
            server = ApiServer(api, settings.control_host, settings.control_port)
            server.start()
            self._control = server
            write_atomic(address_file, host_port(server.host, server.port) + "\n")
            if self._tailnet_control:
                self.tailnet.serve("control", lambda host: ApiServer(api, host, server.port))
        except (AgentError, OSError) as error:
            self._stop_control()
            self._log("error", "no_control_api", where=host_port(settings.control_host,
                                                                 settings.control_port),
                      what=getattr(error, "strerror", None) or error,
                      do="The machine is kept alive without it. A taken port? Free it, or set "
                         "control.port (0 takes a free one)")
            return
        self._log("info", "listening", api="control", url=server.url)

    def _stop_control(self) -> None:
        if self._control is not None:
            remove_file(os.path.join(self.settings.state_dir, "control.addr"))
            self._control.stop()
            self._control = None


# ----------------------------------------------------------------------
# 20. Service installation           files as listed below; the service manager
# ----------------------------------------------------------------------
# `service install` copies this file, writes a service definition, starts it
# and believes in it only after the running agent has answered.  Every change
# goes through Steps, so that a dry run prints them all and a failure undoes
# them.  systemd, launchd and OpenRC are one Manager each.

SYSTEM_STATE = "/var/lib/b9agent"
HEALTH_LIMIT_S, STEADY_S = 30.0, 5.0
CODE_MAX_BYTES = 8 << 20
_LAUNCHER_MARK = "# b9agent's launcher, written by `b9agent service install`"
_MAIN_FILE = "import sys, b9agent\nsys.exit(b9agent.main())\n"  # imported, it is not compiled anew
_CODE_FILES = ("b9agent.py", "b9agent.py.prev", "__main__.py", "__pycache__", "definition",
               "definition.prev", "install.lock")
_KEPT_BY_PURGE = {".ollama", ".cache", "models"}
_HANDED_ON = ("BETA9_TOKEN", "https_proxy", "no_proxy")

SERVICE_STATUS_OPTIONS = (
    Option("--system", "", "a service of the machine; needs root"),
    Option("--user", "", "a service of the user who runs this"),
    Option("--run-as", "USER", "whose rights the machine's service has; default: who calls sudo, "
                               "else a new system user b9agent"),
)
_CHANGE_OPTIONS = SERVICE_STATUS_OPTIONS + (
    Option("--dry-run", "", "print every step, change nothing"),
    Option("--quiet", "", "say only what went wrong"),
)
SERVICE_UNINSTALL_OPTIONS = _CHANGE_OPTIONS + (
    Option("--purge", "", "remove configuration, token and state as well; never models"),)
SERVICE_OPTIONS = _CHANGE_OPTIONS + (
    Option("--gateway", "ADDRESS", "the gateway: HOST[:PORT], or a URL"),
    Option("--pool", "POOL", "the worker pool"),
    Option("--no-service", "", "install the files, no service"),
    Option("--no-start", "", "install everything, start nothing"),
    Option("--offline", "", "do not wait for the gateway"),
    Option("--yes", "", "ask nothing"),
    Option("--rollback", "", "put the previous version back"),
    Option("--print", "MANAGER", "print the definition for systemd, launchd or openrc, and end"),
    Option("--environment-stdin", "", f"read NAME=VALUE lines of {', '.join(_HANDED_ON)} from "
           "standard input: sudo drops variables, and arguments show in `ps`"),
)


class PrivilegeError(AgentError):
    """A machine's service is root's to change."""
    exit_code = Exit.PRIVILEGE


class UnhealthyError(AgentError):
    """The service did not come up as it should."""
    exit_code = Exit.UNHEALTHY


# -- where everything lies ----------------------------------------------

class Account(NamedTuple):
    """Whose rights the service has.  uid, gid: None for a user yet to be made."""
    name: str
    uid: Optional[int]
    gid: Optional[int]
    home: str


class Place(NamedTuple):
    """One installation.  definition: the service's file, "" where there is no manager."""
    manager: str
    scope: str
    account: Account
    python: str
    code: str
    launcher: str
    definition: str
    state: str

    @property
    def config(self) -> str:
        return f"{self.state}/config.yaml"

    @property
    def command(self) -> Tuple[str, ...]:
        return (self.python, "-I", "-u", self.code, "run")


_DEFINITIONS = {
    ("systemd", "system"): "/usr/local/lib/systemd/system/b9agent.service",
    ("systemd", "user"): "~/.local/share/systemd/user/b9agent.service",
    ("launchd", "system"): "/Library/LaunchDaemons/com.b9agent.plist",
    ("launchd", "user"): "~/Library/LaunchAgents/com.b9agent.plist",
    ("openrc", "system"): "/etc/init.d/b9agent"}


def make_place(manager: str, scope: str, account: Account, python: str,
               data_home: str = "") -> Place:
    """Raises: UsageError for a path that a service definition cannot hold."""
    home, state = account.home, SYSTEM_STATE
    code, launcher = "/usr/local/lib/b9agent", "/usr/local/bin/b9agent"
    if scope == "user":
        code = os.path.join(data_home or home + "/.local/share", "b9agent")
        launcher = home + "/.local/bin/b9agent"
    if scope == "user" or manager == "launchd":
        state = home + "/.b9agent"
    for path in (python, code, state):
        if not re.fullmatch(r"/[\w@+,./:=~ -]*", path):
            raise UsageError(f"the path `{printable(path)}` has a character that no service "
                             "definition holds", "Choose a Python and a home folder without it")
    definition = _DEFINITIONS.get((manager, scope), "").replace("~", home)
    return Place(manager, scope, account, python, code, launcher, definition, state)


def _find_manager(scope: str) -> str:
    import shutil
    if sys.platform == "darwin":
        return "launchd"
    if os.path.isdir("/run/systemd/system") and shutil.which("systemctl"):
        return "systemd"
    if scope == "system" and os.path.isdir("/run/openrc") and shutil.which("rc-service"):
        return "openrc"
    return "none"


def _find_account(wanted: str) -> Account:
    """The user of a system service: asked for, or the one it has, or who called sudo, or who would
    call it (a dry run), or our own.  Root only where it is asked for."""
    import pwd
    names = [os.environ.get("SUDO_USER"), os.environ.get("DOAS_USER"),
             pwd.getpwuid(os.geteuid()).pw_name]
    try:
        names.insert(0, pwd.getpwuid(os.stat(SYSTEM_STATE).st_uid).pw_name)
    except (OSError, KeyError):
        pass  # a first installation, or a user who is gone
    name = wanted or next((name for name in names if name and name != "root"), "b9agent")
    try:
        record = pwd.getpwnam(name)
    except KeyError as error:
        if name != "b9agent" or sys.platform == "darwin":
            raise UsageError(f"there is no user {printable(name)} to run the service as",
                             "Name one with --run-as USER") from error
        return Account(name, None, None, SYSTEM_STATE)
    return Account(name, record.pw_uid, record.pw_gid, record.pw_dir.rstrip("/"))


def find_place(options: Dict[str, str]) -> Place:
    """The installation that the options speak of, present or to come."""
    import pwd
    if "user" in options and "system" in options:
        raise UsageError("--user and --system exclude each other", "Give one of them")
    me, wanted = pwd.getpwuid(os.geteuid()), options.get("run-as", "")
    python = os.path.abspath(sys.executable or "/usr/bin/python3")
    account = Account(me.pw_name, me.pw_uid, me.pw_gid, os.path.expanduser("~").rstrip("/"))
    data_home = os.environ.get("XDG_DATA_HOME", "")
    mine = make_place(_find_manager("user"), "user", account, python,
                      data_home if os.path.isabs(data_home) else "")
    has_own = me.pw_uid != 0 and (sys.platform == "darwin"
                                  or os.path.exists(f"{mine.code}/b9agent.py"))
    if "user" not in options and ("system" in options or not has_own):
        return make_place(_find_manager("system"), "system", _find_account(wanted), python)
    if wanted not in ("", me.pw_name):
        raise UsageError("--user installs for the user who runs it", f"Run it as {wanted}")
    if me.pw_uid == 0 and wanted != "root":
        raise UsageError("--user is for ordinary users, and this is root",
                         "Run it without sudo, or leave --user away")
    return mine


def as_user(account: Optional[Account], action: Callable[..., Any], *arguments: Any) -> Any:
    """What an action comes to.  Root does it with the service user's rights: a link planted in that
    user's folders must lead no further than the user could go."""
    if os.geteuid() != 0 or account is None or not account.uid:
        return action(*arguments)
    groups = os.getgroups()
    os.setgroups([account.gid])
    os.setegid(account.gid)
    os.seteuid(account.uid)
    try:
        return action(*arguments)
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


# -- service definitions, as text ---------------------------------------
# Lines with a "!" are of the machine's unit alone.

_UNIT = """\
# Written by `b9agent service install`. To change it: systemctl edit b9agent
[Unit]
Description=b9agent compute worker
!Wants=network-online.target
!After=network-online.target nvidia-persistenced.service tailscaled.service
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart=@COMMAND@
Environment="B9AGENT_HOME=@STATE@"
EnvironmentFile=-@ENVIRONMENT@
WatchdogSec=60
TimeoutStopSec=90
KillMode=mixed
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=@PERMANENT@
OOMPolicy=continue
TasksMax=infinity
LimitNOFILE=65536:524288
LimitMEMLOCK=infinity
LimitCORE=0
!@BEFORE@User=@USER@
!StateDirectory=b9agent
!StateDirectoryMode=0700
!WorkingDirectory=@STATE@
!NoNewPrivileges=yes
!CapabilityBoundingSet=
!ProtectSystem=full
!ProtectControlGroups=yes
!ProtectKernelTunables=yes
!ProtectKernelModules=yes
!LockPersonality=yes
!RestrictRealtime=yes
!RestrictSUIDSGID=yes
!RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_IB
!SystemCallArchitectures=native

[Install]
WantedBy=@TARGET@
"""
_OPENRC = """\
#!/sbin/openrc-run
# Written by `b9agent service install`. To change it: /etc/conf.d/b9agent
name=b9agent
description="b9agent compute worker"
supervisor=supervise-daemon
command="@PYTHON@"
command_args="-I -u @CODE@ run"
command_user="@USER@"
directory="@STATE@"
pidfile=/run/b9agent.pid
output_log=/var/log/b9agent.log
error_log=/var/log/b9agent.log
respawn_delay=5
respawn_max=0
retry=TERM/90/KILL/5
export B9AGENT_HOME="@STATE@" B9AGENT_SUPERVISOR=openrc HOME="@HOME@"

depend() {
	want net
	after firewall
}

start_pre() {
	checkpath -d -m 0700 -o "@USER@" "@STATE@"
	checkpath -f -m 0640 -o "@USER@" "$output_log"
}
"""


def _fill(template: str, **values: str) -> str:
    """With each @NAME@ replaced by its value."""
    return re.sub("@([A-Z]+)@", lambda match: values[match.group(1).lower()], template)


def render_unit(place: Place, modprobe: str = "") -> str:
    """modprobe: the path of nvidia-modprobe, which is setuid and so cannot help a service that has
    NoNewPrivileges; systemd runs it before, with full rights."""
    system = place.scope == "system"
    text = re.sub("(?m)^!" if system else "(?m)^!.*\n", "", _UNIT)
    if place.account.name == "root":
        text = text.replace("CapabilityBoundingSet=\n", "")
    return _fill(
        text, state=place.state, user=place.account.name,
        command=" ".join(f'"{word}"' if " " in word else word for word in place.command),
        environment="/etc/b9agent/agent.env" if system else "%h/.config/b9agent/agent.env",
        permanent=" ".join(str(int(code)) for code in PERMANENT_EXITS),
        before=f"ExecStartPre=-+{modprobe} -c 0 -u\n" if modprobe else "",
        target="multi-user.target" if system else "default.target")


def launchd_log(place: Place) -> str:
    return place.account.home + "/Library/Logs/b9agent/launchd.log"


def render_plist(place: Place) -> str:
    import plistlib
    values = {
        "Label": "com.b9agent",
        "ProgramArguments": list(place.command),
        "EnvironmentVariables": {
            "B9AGENT_HOME": place.state, "B9AGENT_SUPERVISOR": "launchd",
            "PATH": "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"},
        "RunAtLoad": True, "KeepAlive": {"SuccessfulExit": False}, "ThrottleInterval": 15,
        "ExitTimeOut": 60, "ProcessType": "Interactive",  # unset, macOS slows it down
        "SoftResourceLimits": {"NumberOfFiles": 65536},
        "StandardOutPath": launchd_log(place), "StandardErrorPath": launchd_log(place)}
    if place.scope == "system":
        values["UserName"] = place.account.name
    else:
        values["LimitLoadToSessionType"] = ["Aqua", "Background"]
    return plistlib.dumps(values, sort_keys=False).decode("utf-8")


def render_definition(place: Place, modprobe: str = "") -> str:
    if place.manager == "launchd":
        return render_plist(place)
    if place.manager == "openrc":
        return _fill(_OPENRC, python=place.python, code=place.code, state=place.state,
                     user=place.account.name, home=place.account.home)
    return render_unit(place, modprobe)


def render_launcher(place: Place) -> str:
    import shlex
    return (f"#!/bin/sh\n{_LAUNCHER_MARK}\n"
            f"[ -n \"${{B9AGENT_HOME:-}}\" ] || B9AGENT_HOME={shlex.quote(place.state)}\n"
            "export B9AGENT_HOME\n"
            f"exec {shlex.quote(place.python)} -I {shlex.quote(place.code)} \"$@\"\n")


def _print_definition(manager: str, say: Callable[[str], None]) -> int:
    """What the installer writes where the user is `b9agent` and the Python the system's."""
    if (manager, "system") not in _DEFINITIONS:
        raise UsageError(f"--print: `{printable(manager)}` cannot be used, expected systemd, "
                         "launchd or openrc")
    home = SYSTEM_STATE if manager != "launchd" else "/Users/b9agent"
    place = make_place(manager, "system", Account("b9agent", None, None, home), "/usr/bin/python3")
    say(render_definition(place).rstrip("\n"))
    return Exit.OK


# -- service managers ---------------------------------------------------

class Process(NamedTuple):
    """pid: None where the manager does not say, 0 for none; ended: the exit code of one that stays
    ended."""
    pid: Optional[int] = None
    ended: Optional[int] = None

    def __str__(self) -> str:
        if self.ended is not None:
            return f"not running, ended with exit code {self.ended}"
        return "not running" if self.pid == 0 else f"running, pid {self.pid or 'unknown'}"


def said_by(result: CommandResult) -> str:
    """What a command that failed says of it, in one line."""
    text = " ".join((result.problem or result.output).split())
    return printable(text[-300:]).rstrip(".") or "no reason"


class Manager(NamedTuple):
    """What starts services here, as the command lines that drive it; none where there is none.

    enable: at every boot; restart: now; disable: neither; forget: once its definition is gone; ask:
    whether it runs; logs: follows its log.  A line with a "-" may fail; any other is tried again
    for patience_s.
    """
    place: Place
    enable: Tuple[str, ...] = ()
    restart: Tuple[str, ...] = ()
    disable: Tuple[str, ...] = ()
    forget: Tuple[str, ...] = ()
    ask: str = "false"
    logs: str = ""
    patience_s: float = 0.0

    def run(self, lines: Iterable[str]) -> None:
        """Raises: UnhealthyError."""
        import shlex
        wake = Wake()
        for line in lines:
            argv, until_s = shlex.split(line.lstrip("-")), now_s() + self.patience_s
            while True:
                result = run_command(argv, 200.0)  # a stop may take 90 s
                if result.exit_code == 0 or line[0] == "-":
                    break
                if now_s() >= until_s:
                    raise UnhealthyError(f"`{line}` failed: {said_by(result)}")
                wake.wait(1.0)

    def process(self) -> Process:
        result = run_command(self.ask.split(), 10.0)
        if self.place.manager == "openrc":  # it knows its supervisor's pid alone
            return Process(None if result.exit_code == 0 else 0)
        pid = re.search(r"(?m)^\s*(?:MainPID=|pid = )([0-9]+)$", result.output)
        status = re.search("(?m)^ExecMainStatus=([0-9]+)$", result.output)
        failed = {"ActiveState=failed", "ExecMainCode=1"} <= set(result.output.split())
        return Process(int(pid.group(1)) if pid else 0,
                       int(status.group(1)) if status and failed else None)

    def last_lines(self) -> str:
        import shlex
        argv = shlex.split(self.logs.replace(" -f", " -n 20", 1))
        account = None if self.place.manager == "systemd" else self.place.account
        return as_user(account, run_command, argv, 10.0).output


def systemd(place: Place) -> Manager:
    user = " --user" if place.scope == "user" else ""
    if user:  # missing after su and in cron
        os.environ.setdefault("XDG_RUNTIME_DIR", f"/run/user/{place.account.uid}")
    control, unit = f"systemctl{user}", "b9agent.service"
    return Manager(
        place, enable=(f"{control} daemon-reload", f"{control} enable {unit}"),
        restart=(f"{control} restart {unit}",), disable=(f"-{control} disable --now {unit}",),
        forget=(f"-{control} daemon-reload", f"-{control} reset-failed {unit}"),
        ask=f"{control} show {unit} -p MainPID,ActiveState,ExecMainCode,ExecMainStatus",
        logs=f"journalctl{user} -u b9agent -f")


def launchd(place: Place) -> Manager:
    import shlex
    domain = "system"
    if place.scope == "user":
        # Over ssh there is no gui session: a launch agent then belongs in the user's domain.
        gui = run_command(["launchctl", "print", f"gui/{place.account.uid}"], 10.0).exit_code == 0
        domain = f"{'gui' if gui else 'user'}/{place.account.uid}"
    target = f"{domain}/com.b9agent"
    return Manager(
        place, disable=(f"-launchctl bootout {target}",), ask=f"launchctl print {target}",
        restart=(f"-launchctl bootout {target}", f"launchctl enable {target}",
                 f"launchctl bootstrap {domain} {shlex.quote(place.definition)}",
                 f"launchctl kickstart {target}"),
        logs="tail -f " + shlex.quote(launchd_log(place)),
        patience_s=8.0)  # `bootstrap` fails while the old job is still going away


def openrc(place: Place) -> Manager:
    return Manager(
        place, enable=("rc-update add b9agent default",), restart=("rc-service b9agent restart",),
        disable=("-rc-service b9agent stop", "-rc-update del b9agent"),
        ask="rc-service b9agent status", logs="tail -f /var/log/b9agent.log")


MANAGERS = {"systemd": systemd, "launchd": launchd, "openrc": openrc, "none": Manager}


def prepare_manager(place: Place, say: Callable[[str], None]) -> bool:
    """What comes before all calls.  False where the manager is not there after all."""
    if place.manager == "launchd":
        # launchd would make the folder, but as root.
        as_user(place.account, os.makedirs, os.path.dirname(launchd_log(place)), 0o755, True)
    if (place.manager, place.scope) != ("systemd", "user"):
        return True
    # A user's services need that user's manager, which without linger ends at logout.
    linger = ["loginctl", "enable-linger", place.account.name]
    if run_command(linger, 20.0).exit_code != 0:
        say("warning: the service stops when you log out. To change that: sudo " + " ".join(linger))
    until_s, wake = now_s() + 10.0, Wake()
    while run_command(["systemctl", "--user", "show-environment"], 10.0).exit_code != 0:
        if now_s() > until_s:
            return False
        wake.wait(0.2)
    return True


def overriding_files(place: Place) -> List[str]:
    """Of the operator's, that come before our unit."""
    folders = (("/etc/systemd/system", "/run/systemd/system") if place.scope == "system" else
               (place.account.home + "/.config/systemd/user", "/etc/systemd/user"))
    paths = [f"{folder}/b9agent.service{end}" for folder in folders for end in ("", ".d")]
    return [path for path in paths if place.manager == "systemd" and os.path.exists(path)]


# -- changes, and whether the service is well -----------------------------

def version_of(code: str) -> str:
    match = re.search(r'^VERSION = "([^"]+)"$', code, re.M)
    return match.group(1) if match else "unknown"


def make_public_folder(path: str) -> None:
    """A folder that everybody may read, whatever the umask; its missing parents as well."""
    if not os.path.isdir(path):
        make_public_folder(os.path.dirname(path))
        os.mkdir(path)
        os.chmod(path, 0o755)


class Steps:
    """Says each change and makes it, or in a dry run only says it; undo() takes back what was
    written."""

    def __init__(self, say: Callable[[str], None], options: Dict[str, str]) -> None:
        self.dry, self._say = "dry-run" in options, say
        self._quiet = "quiet" in options and not self.dry
        self._undo: List[Tuple[str, Optional[str], int, Optional[Account]]] = []

    def say(self, text: str) -> None:
        try:
            if not self._quiet:
                self._say(text)
        except OSError:
            pass  # the terminal is gone: what was begun must be ended, or taken back

    def do(self, what: str, action: Callable[..., Any], *arguments: Any) -> Any:
        self.say(("would " if self.dry else "") + what)
        return None if self.dry else action(*arguments)

    def keep(self, path: str, mode: int, account: Optional[Account] = None) -> None:
        """Before it is written."""
        self._undo.append((path, read_text(path, CODE_MAX_BYTES), mode, account))

    def write(self, path: str, text: str, mode: int) -> bool:
        """True where there was something to change."""
        old = read_text(path, CODE_MAX_BYTES)
        if old == text and stat.S_IMODE(os.stat(path).st_mode) == mode:
            return False
        self.do(f"write {path}", self._write, path, text, mode)
        return True

    def _write(self, path: str, text: str, mode: int) -> None:
        make_public_folder(os.path.dirname(path))
        self.keep(path, mode)
        write_atomic(path, text, mode)

    def undo(self) -> None:
        while self._undo:
            path, old, mode, account = self._undo.pop()
            if old is None:
                as_user(account, remove_file, path)
            else:
                as_user(account, write_atomic, path, old, mode)


def _answer(place: Place, version: str, pid: Optional[int]) -> Tuple[Dict[str, Any], str]:
    """(what the agent says of itself, what is wrong with that)."""
    try:
        status = as_user(place.account, read_agent_status, place.state, 3.0)
    except AgentError as error:
        return {}, error.what
    if status["version"] != version:
        return status, f"b9agent {printable(str(status['version']))} answers, not {version}"
    if pid is not None and status["pid"] != pid:
        return status, f"process {status['pid']} answers, but the service is process {pid}"
    return status, ""


def _raise_refused(exit_code: Optional[int], version: str) -> None:
    what = f"b9agent {version} is installed, but the gateway refused "
    if exit_code == Exit.TOKEN_REFUSED:
        raise TokenRefused(what + "its token", "Make one with `machine create`, and run this again "
                           "with it and its --machine-id")
    if exit_code == Exit.REQUEST_REFUSED:
        raise RequestRefused(what + "the machine", "Its log says why: mend --pool or --gateway, "
                             "and run this again")
    if exit_code in PERMANENT_EXITS:
        raise UnhealthyError(f"the agent ended with exit code {exit_code}")


def _run_as(place: Place, *argv: str) -> CommandResult:
    """Run our own code as the service will: with its user's rights and its folders."""
    environment = (f"B9AGENT_HOME={place.state}", f"HOME={place.account.home}")
    return as_user(place.account, run_command, ["/usr/bin/env", *environment, *argv], 120.0)


def await_health(manager: Manager, version: str, offline: bool) -> Dict[str, Any]:
    """The status of an agent of this version that has stayed up for five seconds.

    A gateway that does not answer is not the service's illness.
    Raises: TokenRefused, RequestRefused, UnhealthyError.
    """
    wake, place, steady_pid, since_s = Wake(), manager.place, None, now_s()
    until_s = since_s + HEALTH_LIMIT_S
    late = False
    while not late:
        late = now_s() > until_s
        process = manager.process()
        status, problem = _answer(place, version, process.pid)
        _raise_refused(process.ended, version)
        if status.get("pid") != steady_pid:
            steady_pid, since_s = status.get("pid"), now_s()
        settled = late or offline or status.get("state") not in ("starting", "registering")
        if settled and not problem and now_s() - since_s >= STEADY_S:
            return status
        wake.wait(0.25)
    if not status and place.manager in ("launchd", "openrc"):
        # They keep an agent that may not end: why it waits, by one more attempt.
        code = _run_as(place, *place.command, "--once").exit_code
        if code in (Exit.TOKEN_REFUSED, Exit.REQUEST_REFUSED):
            _raise_refused(code, version)
    raise UnhealthyError(problem or "it starts again and again")


def check_port(place: Place, manager: Manager, host: str, port: int) -> None:
    """Raises: LockedError where another program than our service listens on the control port."""
    try:
        holder = port_holder(host, port)
    except OSError:
        return  # no address of this machine now, perhaps later: the agent will say
    ours = holder and holder.endswith(f"pid {manager.process().pid}")
    if holder and not ours and not _answer(place, "", None)[0]:
        raise LockedError(f"the control port {port} is held by {holder}",
                          "Stop that, or choose another with --control-port PORT")


# -- what it is to be told -----------------------------------------------

def _handed_environment(options: Dict[str, str]) -> Dict[str, str]:
    """The environment, with what sudo would have dropped from it."""
    found = dict(os.environ)
    found.setdefault("BETA9_TOKEN", found.get("B9AGENT_TOKEN", ""))
    if "environment-stdin" in options:
        lines = (line.partition("=") for line in sys.stdin.read(65536).splitlines())
        found.update({name: value for name, _, value in lines if name in _HANDED_ON})
    REDACTOR.add(found["BETA9_TOKEN"])
    return found


def wanted_settings(loaded: Loaded, options: Dict[str, str],
                    environ: Dict[str, str]) -> Dict[str, str]:
    """{key: text} that this installation is told: by a --config file, variables, flags."""
    wanted = {}
    if loaded.origins["config"].startswith("flag "):
        wanted = {key: item.text for key, item in read_config(loaded.settings.config).items()}
    if environ["BETA9_TOKEN"]:
        wanted["token"] = environ["BETA9_TOKEN"]
    scheme, is_url, address = options.get("gateway", "").rpartition("://")
    if is_url and scheme not in ("http", "https"):
        raise UsageError(f"--gateway: `{printable(scheme[:20])}://` cannot be used, expected "
                         "HOST[:PORT] or a URL of http or https")
    if is_url:
        wanted.update(gateway_scheme=scheme, gateway_port="443" if scheme == "https" else "80")
        options = dict(options, gateway=address.rstrip("/"))
    wanted.update(init_values(loaded, options))
    if wanted.pop("token_file", ""):
        wanted["token"] = loaded.settings.token
    return wanted


def _ask_token() -> str:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return ""  # nobody to ask
    import getpass
    return getpass.getpass("Machine token (it is not shown): ").strip()


def _complete(wanted: Dict[str, str], known: Dict[str, str], environ: Dict[str, str],
              may_ask: bool, must: bool) -> Dict[str, str]:
    """The wanted settings with a token, and the proxy that a service's environment has not.

    Raises: UsageError where the agent would have no gateway or no token.
    """
    wanted, merged = dict(wanted), {**known, **wanted}
    if must and "gateway_host" not in merged:
        raise UsageError("no gateway is known", "Say which with --gateway HOST[:PORT]")
    if must and not {"token", "token_file"} & set(merged):
        wanted["token"] = _ask_token() if may_ask else ""
        if not wanted["token"]:
            raise UsageError("there is no machine token", "Give one in B9AGENT_TOKEN or with "
                             "--token-file PATH; `beta9 machine create --pool POOL` makes one")
    if merged.get("gateway_scheme") == "https" and "gateway_proxy" not in merged:
        if proxy_for("https", merged.get("gateway_host", ""), None, environ):
            url = next(environ[name] for name in ("https_proxy", "HTTPS_PROXY", "all_proxy",
                                                  "ALL_PROXY") if environ.get(name))
            wanted["gateway_proxy"] = url if "://" in url else "http://" + url
    for key, text in wanted.items():
        row = SETTING_BY_KEY[key]
        _value(row, {key: _Given(text, f"flag {row.flag}")})
    REDACTOR.add(wanted.get("token"))
    return {key: text for key, text in wanted.items() if known.get(key) != text}


# -- installing ----------------------------------------------------------

def _create_user(name: str) -> None:
    """A system user of ours, in the groups that own GPU devices."""
    import grp
    import shutil
    groups = [row.gr_name for row in grp.getgrall() if row.gr_name in ("video", "render")]
    if shutil.which("useradd"):
        calls = [["useradd", "--system", "--user-group", "--no-create-home", "--home-dir",
                  SYSTEM_STATE, "--shell", "/usr/sbin/nologin", "--groups", ",".join(groups), name]]
    else:  # busybox
        calls = [["addgroup", "-S", name], ["adduser", "-S", "-D", "-H", "-h", SYSTEM_STATE, "-s",
                                            "/sbin/nologin", "-G", name, name],
                 *(["addgroup", name, group] for group in groups)]
    for argv in calls:
        result = run_command(argv, 60.0)
        if result.exit_code != 0:
            raise UsageError(f"cannot make the user {name}: {said_by(result)}",
                             "Name an existing one with --run-as USER")


def _make_state_folder(place: Place) -> None:
    if place.state == SYSTEM_STATE:
        make_public_folder(os.path.dirname(place.state))
        os.mkdir(place.state, 0o700)
        os.chown(place.state, place.account.uid, place.account.gid)
    else:
        as_user(place.account, make_private_folder, place.state)


def _remove_from(folder: str, names: Iterable[str]) -> None:
    """Files, links, folders with what is in them; then the folder, where nothing else is in it."""
    import shutil
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            remove_file(path)
    try:
        os.rmdir(folder)
    except OSError:
        pass


def _claim(place: Place, steps: Steps) -> None:
    """Rights, and one installer at a time.  Raises: PrivilegeError, LockedError."""
    if steps.dry:
        return
    if place.scope == "system" and os.geteuid() != 0:
        raise PrivilegeError("the machine's service is root's to change",
                             "Run this with sudo, or add --user for a service of your own")
    import fcntl
    make_public_folder(place.code)
    descriptor = os.open(f"{place.code}/install.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW,
                         0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except OSError as error:
        raise LockedError(f"another installer is at work in {place.code}",
                          "Wait until it has ended") from error
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # so that a change is taken back


class Installation:
    """One run of `service install`: code is what is installed, definition its service's text."""

    def __init__(self, place: Place, options: Dict[str, str], steps: Steps) -> None:
        import shutil
        self.place, self.steps, self._options = place, steps, options
        self._serve = "no-service" not in options
        self._start = self._serve and "no-start" not in options
        self.manager = MANAGERS[place.manager if self._serve else "none"](place)
        self._code_file, self._record = f"{place.code}/b9agent.py", f"{place.code}/definition"
        self._old_code = read_text(self._code_file, CODE_MAX_BYTES)
        self._restarted = False
        self.code: Optional[str] = read_text(os.path.abspath(__file__), CODE_MAX_BYTES)
        self.definition = render_definition(place, shutil.which("nvidia-modprobe") or "")
        if "rollback" in options:
            self.code = read_text(self._code_file + ".prev", CODE_MAX_BYTES)
            self.definition = read_text(self._record + ".prev") or self.definition
        if self.code is None:
            raise UsageError(f"there is no previous version in {place.code}")
        self.version = version_of(self.code)

    def run(self, loaded: Loaded) -> int:
        for warning in loaded.warnings:
            self.steps.say(f"warning: {warning}")
        self._check()
        settings = self._new_settings(loaded)
        self._prepare()
        try:
            changed = self._write(settings)
            ready = self._serve and self.place.manager != "none" and (
                self.steps.dry or prepare_manager(self.place, self.steps.say))
            status = self._take_up(changed) if ready else {}
        except GatewayError:
            raise  # its token or pool was refused: that is no fault of the installation
        except (AgentError, OSError, KeyboardInterrupt) as error:
            self._take_back(str(error) or "interrupted")
        self._report(ready, status)
        served = ready or not self._serve or self.steps.dry
        return Exit.OK if served else Exit.NO_SERVICE_MANAGER

    def _check(self) -> None:
        """Nothing of somebody else's is in the way.  Raises: UsageError."""
        place, launcher = self.place, read_text(self.place.launcher)
        if launcher is not None and _LAUNCHER_MARK not in launcher:
            raise UsageError(f"{place.launcher} is not one of ours",
                             "Move it away, and run this again")
        if os.path.isdir(place.state) and os.stat(place.state).st_uid != place.account.uid:
            name = place.account.name
            raise UsageError(f"{place.state} is not {name}'s", "Name its owner with --run-as USER, "
                             f"or: chown -R {name} {place.state}")
        for path in overriding_files(place) if self._serve else ():
            self.steps.say(f"note: {path} is yours and stays in force")

    def _new_settings(self, loaded: Loaded) -> Dict[str, str]:
        """{key: text} that the config file lacks; with them the service can start."""
        environ, wanted, known = _handed_environment(self._options), {}, {}
        if "rollback" not in self._options:
            wanted = wanted_settings(loaded, self._options, environ)
        try:
            found = as_user(self.place.account, read_config, self.place.config)
            known = {key: item.text for key, item in found.items()}
        except UsageError:
            if not self.steps.dry or os.access(self.place.state, os.R_OK):
                raise
            self.steps.say(f"cannot look into {self.place.state}: that needs sudo")
        settings = _complete(wanted, known, environ, "yes" not in self._options,
                             self._start and not self.steps.dry)
        merged = {**known, **settings}
        port = int(merged.get("control_port", "9999"))
        if self._start and port:
            check_port(self.place, self.manager, merged.get("control_host", "127.0.0.1"), port)
        return settings

    def _prepare(self) -> None:
        """User, folders, and a trial of the new file with that user's rights."""
        account, steps = self.place.account, self.steps
        if account.uid is None:
            steps.do(f"create the system user {account.name}", _create_user, account.name)
            account = account if steps.dry else _find_account(account.name)
            self.place = self.place._replace(account=account)
            self.manager = self.manager._replace(place=self.place)
        if not os.path.isdir(self.place.state):
            steps.do(f"make {self.place.state}", _make_state_folder, self.place)
        steps.do(f"try b9agent {self.version} with {self.place.python} as {account.name}",
                 self._try)

    def _try(self) -> None:
        draft = self._code_file + ".new"
        try:
            write_atomic(draft, self.code, 0o644)
            result = _run_as(self.place, self.place.python, "-I", draft, "version")
        finally:
            remove_file(draft)
        if result.exit_code != 0 or self.version not in result.output:
            raise UsageError(f"{self.place.python} cannot run b9agent {self.version} as "
                             f"{self.place.account.name}: {said_by(result)}",
                             "Mend that, or name another Python with --python PATH")

    def _write(self, settings: Dict[str, str]) -> bool:
        """True where the running service has something to take up."""
        place, steps = self.place, self.steps
        if settings:
            steps.do(f"set {', '.join(sorted(settings))} in {place.config}", self._save_config,
                     settings)
        changed = [path for path, text, mode in self._files() if steps.write(path, text, mode)]
        if changed:
            steps.do("compile it", self._compile)
        return bool(settings or changed)

    def _files(self) -> List[Tuple[str, str, int]]:
        """(path, text, mode) of what is to be there.  The definition that we wrote last is kept
        beside the code: one that differs from it was changed by somebody, and is theirs."""
        place, record, files = self.place, read_text(self._record), []
        if self._old_code not in (None, self.code):
            files += [(self._code_file + ".prev", self._old_code, 0o644),
                      (self._record + ".prev", record or self.definition, 0o644)]
        files += [(self._code_file, self.code, 0o644),
                  (f"{place.code}/__main__.py", _MAIN_FILE, 0o644),
                  (place.launcher, render_launcher(place), 0o755)]
        if not self._serve or not place.definition:
            return files
        if read_text(place.definition) not in (None, record, self.definition):
            self.steps.say(f"note: {place.definition} was changed by hand and stays as it is")
            return files
        mode = 0o755 if place.manager == "openrc" else 0o644
        return files + [(self._record, self.definition, 0o644),
                        (place.definition, self.definition, mode)]

    def _save_config(self, settings: Dict[str, str]) -> None:
        account, path = self.place.account, self.place.config
        as_user(account, self.steps.keep, path, 0o600, account)
        backup = as_user(account, save_config, path, settings)
        if backup:
            self.steps.say(f"note: the old file, with its comments, is {backup}")

    def _compile(self) -> None:
        """The service's user cannot write here, so the compiled form is made now."""
        import py_compile
        cached = py_compile.compile(self._code_file, doraise=True)
        os.chmod(cached, 0o644)
        os.chmod(os.path.dirname(cached), 0o755)

    def _take_up(self, changed: bool) -> Dict[str, Any]:
        """Enable the service; restart it where something changed or nothing runs; its status."""
        import shutil
        place, steps = self.place, self.steps
        if shutil.which("restorecon"):  # SELinux
            steps.do("restore file labels", run_command, [
                "restorecon", "-RF", place.code, place.launcher, place.definition], 30.0)
        steps.do(f"enable the service ({place.manager})", self.manager.run, self.manager.enable)
        if not self._start:
            return {}
        if not changed and self.manager.process().pid != 0:
            steps.say("nothing changed: the service keeps running")
        else:
            self._restarted = not steps.dry
            steps.do("restart it", self.manager.run, self.manager.restart)
        return steps.do("wait until it is healthy", await_health, self.manager, self.version,
                        "offline" in self._options) or {}

    def _take_back(self, what: str) -> None:
        """The previous version, running; or after a first installation a stopped service.

        Raises: UnhealthyError, always.
        """
        if self._restarted:
            self.steps.say(self.manager.last_lines())
        if self._restarted and self._old_code is None:
            self.manager.run(self.manager.disable)
            raise UnhealthyError(f"the service did not become healthy: {what}", "It is stopped, "
                                 "its files stay; see the lines above, and run this again")
        self.steps.undo()
        if self._old_code is not None:
            self._compile()
        if not self._restarted:
            raise UnhealthyError(f"not installed: {what}", "Nothing was changed")
        old_version = version_of(self._old_code)
        try:
            self.manager.run(self.manager.enable + self.manager.restart)
            await_health(self.manager, old_version, True)
        except AgentError as error:
            raise UnhealthyError(f"b9agent {old_version}, put back since the new version was not "
                                 f"healthy ({what}), is not either ({error})",
                                 f"See: {self.manager.logs}") from error
        raise UnhealthyError(f"the new version was not healthy: {what}",
                             "Previous version restored")

    def _report(self, ready: bool, status: Dict[str, Any]) -> None:
        """What is true now, and nothing more."""
        import shutil
        say, done, launcher = self.steps.say, f"b9agent {self.version}", self.place.launcher
        if self.steps.dry:
            say("nothing was changed")
        elif status:
            gateway = printable(str(status.get("state")))
            if "offline" in self._options:
                gateway = "not checked (offline)"
            elif gateway == "unreachable":
                gateway += f", retrying ({printable(str(status.get('message')))})"
            command = "b9agent" if shutil.which("b9agent") == launcher else launcher
            say(f"{done} installed and running (pid {status['pid']}, user "
                f"{self.place.account.name})\ngateway: {gateway}\nlogs: {self.manager.logs}     "
                f"status: {command} status     remove: {command} service uninstall")
        elif ready:
            say(f"{done}: files installed, service NOT started; run this without --no-start")
        else:
            say(f"{done}: files installed, no service. In the foreground: {launcher} run")


def service_install(loaded: Loaded, options: Dict[str, str], say: Callable[[str], None]) -> int:
    """Install or upgrade; with --rollback go back to the version before."""
    if "print" in options:
        return _print_definition(options["print"], say)
    if loaded.origins["state_dir"].startswith("flag "):
        raise UsageError("a service has its own state folder", "Leave --state-dir away")
    place, steps = find_place(options), Steps(say, options)
    _claim(place, steps)
    try:
        return Installation(place, options, steps).run(loaded)
    except KeyboardInterrupt as error:
        raise UnhealthyError("interrupted", "No service was touched") from error
    finally:
        if not steps.dry and not os.path.exists(f"{place.code}/b9agent.py"):
            _remove_from(place.code, _CODE_FILES)


# -- uninstalling, status ---------------------------------------------------

def _remove_state(place: Place) -> None:
    names = set(as_user(place.account, os.listdir, place.state)) - _KEPT_BY_PURGE
    as_user(place.account, _remove_from, place.state, names)
    _remove_from(place.state, ())  # where the folder above it is root's


def service_uninstall(_loaded: Loaded, options: Dict[str, str],
                      say: Callable[[str], None]) -> int:
    """Stop it and remove what was installed; configuration and state stay unless --purge."""
    place, steps = find_place(options), Steps(say, options)
    purge = "purge" in options and os.path.isdir(place.state)
    if not os.path.isdir(place.code) and not purge:
        steps.say(f"nothing is installed in {place.code}")
        return Exit.OK
    _claim(place, steps)
    manager, definition = MANAGERS[place.manager](place), read_text(place.definition or os.devnull)
    if definition:
        steps.do("stop and disable the service", manager.run, manager.disable)
        if not steps.dry and manager.process().pid != 0:
            raise UnhealthyError("the service cannot be stopped", f"See: {manager.logs}")
    if definition and definition == read_text(f"{place.code}/definition"):
        steps.do(f"remove {place.definition}", remove_file, place.definition)
        steps.do("tell the service manager", manager.run, manager.forget)
    elif definition:
        steps.say(f"note: {place.definition} was changed by hand and stays")
    if _LAUNCHER_MARK in (read_text(place.launcher) or ""):
        steps.do(f"remove {place.launcher}", remove_file, place.launcher)
    steps.do(f"remove {place.code}", _remove_from, place.code, _CODE_FILES)
    if purge:
        steps.do(f"remove {place.state}, but no models", _remove_state, place)
    elif os.path.isdir(place.state):
        steps.say(f"kept: {place.state}, with configuration and token (--purge removes it)")
    if place.account.name == "b9agent" and place.account.uid is not None:
        steps.say("kept: the system user b9agent (userdel b9agent)")
    steps.say("nothing was changed" if steps.dry else "b9agent is uninstalled")
    return Exit.OK


def service_status(_loaded: Loaded, options: Dict[str, str], say: Callable[[str], None]) -> int:
    """The service as its manager and the agent itself see it."""
    place = find_place(options)
    code = read_text(f"{place.code}/b9agent.py", CODE_MAX_BYTES)
    say(f"files    {place.code}, " + (f"b9agent {version_of(code)}" if code else "not installed"))
    if place.definition:
        say(f"service  {MANAGERS[place.manager](place).process()}; {place.definition}")
    try:
        status = as_user(place.account, read_agent_status, place.state, 5.0)
    except AgentError as error:
        say(f"agent    {error.what}")
        return Exit.UNREACHABLE
    say(f"agent    b9agent {printable(str(status['version']))}, pid {status.get('pid')}, "
        f"{printable(str(status.get('state')))}")
    return Exit.OK


# ----------------------------------------------------------------------
# 20b. Doctor       reads; asks the gateway, k3s and drivers; changes nothing
# ----------------------------------------------------------------------
# One table of checks.  Each says what it saw and, where that is not well,
# the command that mends it; an AgentError that it raises is such a finding
# as well.  Every check runs in a thread of its own: one
# that hangs costs its row and nothing else.  A running agent is not touched,
# and nothing is sent to the gateway that it would act upon.

DOCTOR_LIMIT_S, _REQUEST_LIMIT_S, _DRIVER_LIMIT_S = 13.0, 4.0, 8.0  # all checks; one request
_CLOCK_EARLIEST_S = 1704067200.0  # 2024: a machine that lost its clock's battery stands before it
_STATE_LOW_BYTES, _STATE_LEAST_BYTES = 1 << 30, 16 << 20
_MODELS_LOW_BYTES = 20 << 30      # one model of 30 billion parameters, quantised
_PRIVATE_FILES = ("config.yaml", "config.yaml.old", "control.token", "agent.log", "agent.log.1",
                  "agent.lock", "k3s.kubeconfig", "gateway.db", "models.json", "energy.json",
                  "logs")
_K3S = Endpoint("https", "127.0.0.1", 6443)


class Finding(NamedTuple):
    """level: ok, warn or fail; only what keeps the machine from `ready` is a fail.  mend: a command
    to copy, or what to do.  exit_code: what a fail comes to.  name: of its check."""
    level: str
    seen: str
    mend: str = ""
    exit_code: Exit = Exit.USAGE
    name: str = ""


class Check(NamedTuple):
    """late: what it comes to when it does not end in time; OK makes that a warning."""
    name: str
    look: Callable[[Loaded], Iterator[Finding]]
    late: Exit = Exit.OK


class NotTried(Exception):
    """A check that cannot be made, because of something that another one reports."""


def ok(seen: str) -> Finding:
    return Finding("ok", seen)


def warn(seen: str, mend: str) -> Finding:
    return Finding("warn", seen, mend)


def finding_of(error: AgentError) -> Finding:
    unwell = error.exit_code is Exit.UNREACHABLE
    return Finding("fail", error.what, error.hint, Exit.UNREACHABLE if unwell else Exit.USAGE)


def load_what_can_be(flags: Dict[str, str], environ: Dict[str, str],
                     must_exist: bool = True) -> Loaded:
    """Settings as far as they can be had: without the file, or without flags and variables as well
    but for the state folder's.  `problem` says what was wrong."""
    row, bare, problem = SETTING_BY_KEY["state_dir"], {"config": os.devnull}, None
    folder = flags.get(row.key) or environ.get(row.variable) or row.default
    for some_flags, some_environ in ((flags, environ), ({**flags, **bare}, environ),
                                     ({**bare, row.key: folder}, {}), (bare, {})):
        try:
            return load_settings(some_flags, some_environ, must_exist)._replace(problem=problem)
        except UsageError as error:
            problem = problem or error
    raise problem


def refuse_default(loaded: Loaded, key: str) -> None:
    """Raises: NotTried where a setting may stand in a configuration that cannot be used."""
    if loaded.problem is not None and loaded.origins[key] == "default":
        raise NotTried("the configuration, which says it, cannot be used")


# -- this machine ---------------------------------------------------------

def check_python(_loaded: Loaded) -> Iterator[Finding]:
    import importlib
    missing, seen = [], f"{sys.version.split()[0]} ({sys.executable})"
    for name in ("ssl", "ctypes", "sqlite3"):  # Debian's python3-minimal has none of them
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    yield ok(seen) if not missing else warn(
        f"{seen} lacks {', '.join(missing)} (for https, GPUs and the embedded gateway)",
        "sudo apt install libpython3-stdlib")


def judge_clock(here_s: float, ahead_s: Optional[float], https: bool) -> Finding:
    """ahead_s: of the gateway's; None where it did not say."""
    mend = ("sudo sntp -sS time.apple.com" if sys.platform == "darwin" else
            "sudo timedatectl set-ntp true")
    stamp = utc_stamp(here_s)
    if here_s < _CLOCK_EARLIEST_S:
        return Finding("fail" if https else "warn", f"{stamp} cannot be: certificates are refused "
                       "as not valid yet", mend)
    if ahead_s is None:
        return ok(f"{stamp}; the gateway's time is not known")
    seen = f"{stamp}, {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the gateway's"
    return warn(seen, mend) if abs(ahead_s) > CLOCK_OFFSET_MAX_S else ok(seen)


def doctor_endpoint(loaded: Loaded) -> Endpoint:
    """Through the running agent's tunnel, where one is set."""
    if not loaded.settings.tunnel:
        return gateway_endpoint(loaded.settings)
    try:
        tunnel = read_agent_status(loaded.settings.state_dir).get("tunnel") or {}
    except AgentError as error:
        raise NotTried("the gateway is behind the tunnel, which a running agent keeps") from error
    if tunnel.get("state") != "running":
        raise GatewayUnreachable(f"the tunnel is {tunnel.get('state')}: {tunnel.get('message')}",
                                 "b9agent.py status   # tells more")
    return tunnel_endpoint(loaded.settings, tunnel["local_port"], lambda: tunnel["pid"])


def doctor_client(loaded: Loaded) -> GatewayClient:
    refuse_default(loaded, "gateway_host")
    settings = loaded.settings
    log = Log(settings.log_format, "debug" if settings.debug else "error")
    return GatewayClient(doctor_endpoint(loaded), settings.token or "-", settings.pool_name, log,
                         _REQUEST_LIMIT_S)


def check_clock(loaded: Loaded) -> Iterator[Finding]:
    ahead_s = None
    try:
        client = doctor_client(loaded)
        client.health()
        ahead_s = client.clock_offset_s
    except (AgentError, NotTried):
        pass  # the gateway's own row says why
    yield judge_clock(time.time(), ahead_s, loaded.settings.gateway_scheme == "https")


def judge_space(what: str, folder: str, space: BytesPair, low_bytes: int,
                least_bytes: int) -> Finding:
    import shlex
    mend = f"du -xhd1 {shlex.quote(nearest_folder(folder))} | sort -h   # what takes the space"
    total, free = space
    if total is None or free is None:
        return warn(f"{what}: free space of {folder} is not known", mend)
    seen = f"{what}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free at {folder}"
    if free < least_bytes:
        return Finding("fail", f"{seen}, less than {least_bytes / 2**30:.3g} GiB", mend)
    return ok(seen) if free >= low_bytes else warn(
        f"{seen}, less than {low_bytes / 2**30:.3g} GiB", mend)


def check_disk(loaded: Loaded) -> Iterator[Finding]:
    state = loaded.settings.state_dir
    for what, folder, low_bytes, least_bytes in (
            ("state", state, _STATE_LOW_BYTES, _STATE_LEAST_BYTES),
            ("models", os.path.abspath(store_folder()), _MODELS_LOW_BYTES, 0)):
        yield judge_space(what, folder, read_disk(nearest_folder(folder)), low_bytes, least_bytes)


def check_host(loaded: Loaded) -> Iterator[Finding]:
    host, settings = make_host(), loaded.settings
    (cpu, memory), facts = host.capacity(), host.facts()
    if cpu is None or memory is None:
        yield warn("its CPUs or its memory cannot be measured: too little is offered",
                   "b9agent.py run --max-cpu CORES --max-memory SIZE   # and please report this")
        return
    place = " in ".join(filter(None, (facts.os_name or sys.platform, facts.container,
                                      "WSL" if facts.wsl else "")))
    yield ok(f"{place}: offers {min(cpu, settings.max_cpu or cpu) / 1000:g} of {cpu / 1000:g} "
             f"CPUs, {min(memory, settings.max_memory or memory) / 2**30:.1f} of "
             f"{memory / 2**30:.1f} GiB of memory")
    for key, whole in (("max_cpu", cpu), ("max_memory", memory)):
        row, cap = SETTING_BY_KEY[key], getattr(settings, key)
        if cap is not None and cap > whole:
            most = setting_text(row, whole)
            yield warn(f"{row.path} {setting_text(row, cap)} is more than the machine's {most}, "
                       "which is what it offers", f"b9agent.py init {row.flag} {most} -y")


# -- GPUs -----------------------------------------------------------------

_GPU_MENDS = (  # the first that fits; words of the problems above and of nvidia-smi's own
    ("does not answer|hangs|time limit", "sudo dmesg | grep -iE 'nvrm|xid|amdgpu'   # then reboot"),
    ("mismatch|different versions",
     "sudo reboot   # the driver was upgraded, and its old module is still loaded"),
    ("--gpus all", "docker run --gpus all …   # start the container again so"),
    (r"\bcontainer\b|initialize NVML: Unknown",
     "docker restart CONTAINER   # on its host; where there is none: sudo reboot"),
    ("no permission|insufficient perm", "ls -l /dev/nvidia*   # this user must be in their group"),
    ("not loaded|couldn't communicate",
     "sudo modprobe nvidia   # after a new kernel: reinstall the driver"),
    ("libnvidia-ml", "sudo apt install nvidia-utils-NUMBER   # NUMBER: of the driver, see "
     "/proc/driver/nvidia/version"),
    ("xpu-smi", "Install xpu-smi: https://github.com/intel/xpumanager"),
    ("rocm-smi", "sudo usermod -aG render,video $USER   # they own /dev/kfd; then log in again"),
    ("is excluded", "grep -rs NVreg_ExcludedGpus /etc/modprobe.d /proc/cmdline   # else see dmesg"),
    (r"lost|fell|\bbus\b|Xid|reset", "sudo reboot   # again lost: power, riser or GPU"),
    ("dmesg", "sudo dmesg | grep -iE 'nvrm|xid'"),
    ("", "nvidia-smi -q   # or the tool of its vendor says more"),
)


def gpu_problem(problem: str) -> Finding:
    return warn(problem, next(mend for pattern, mend in _GPU_MENDS
                              if re.search(pattern, problem, re.I)))


def why_not_offered(gpu: Gpu, sample: GpuSample, settings: Any, visible: Optional[str]) -> str:
    """Which of the settings leaves a GPU out, or ""."""
    def kept(max_gpus: Optional[int], seen: Optional[str]) -> bool:
        return gpu in offered_gpus(sample.gpus, sample.vendor, settings.gpu_ids, max_gpus, seen)
    if not kept(None, None):
        return ("left out by limits.gpu_ids (--gpu-ids)" if settings.gpu_ids is not None else
                "left out: it is part of the processor" if gpu.integrated else
                f"left out: a pool has GPUs of one type, and {sample.vendor}'s come first")
    if not kept(None, visible):
        return f"left out by CUDA_VISIBLE_DEVICES={visible}"
    return "" if kept(settings.max_gpus, visible) else "left out by limits.gpus (--max-gpus)"


def why_not_free(gpu: Gpu) -> str:
    """Why the scheduler is not given a GPU that is offered and well, or ""."""
    if is_free(gpu):
        return ""
    if gpu.processes:
        return "held by " + "; ".join(process_name(process.pid) for process in gpu.processes[:8])
    if gpu.memory_total_bytes is None or gpu.memory_used_bytes is None:
        return "its memory is not known, so it counts as busy"
    return (f"{gpu.memory_used_bytes / 2**30:.1f} of {gpu.memory_total_bytes / 2**30:.1f} GiB of "
            "its memory in use")


def judge_gpus(sample: GpuSample, settings: Any, visible: Optional[str]) -> Iterator[Finding]:
    """visible: CUDA_VISIBLE_DEVICES."""
    offered = offered_gpus(sample.gpus, sample.vendor, settings.gpu_ids, settings.max_gpus, visible)
    drivers = "; ".join(" ".join(filter(None, (
        reading.source, reading.driver_version and f"driver {reading.driver_version}",
        reading.cuda_version and f"CUDA {reading.cuda_version}"))) for reading in sample.readings)
    if not sample.known:
        yield gpu_problem(str(sample.problems))._replace(seen="not known, so none is offered")
    elif not offered and any(not (gpu.problem or gpu.integrated) for gpu in sample.gpus):
        yield warn(f"none of {len(sample.gpus)} offered ({drivers})",
                   "unset CUDA_VISIBLE_DEVICES   # or mend limits.gpu_ids, limits.gpus")
    else:
        yield ok(f"{len(offered)} of {len(sample.gpus)} offered, {sum(map(is_free, offered))} free "
                 f"({drivers})" if sample.gpus else "none")
    for gpu in sample.gpus:
        why = why_not_offered(gpu, sample, settings, visible) or why_not_free(gpu)
        if why and not gpu.problem:
            yield ok(f"GPU {gpu.index} ({gpu.name or gpu.vendor}): {why}")
    yield from map(gpu_problem, sample.problems)
    there = {(gpu.vendor, gpu.index) for gpu in sample.gpus}
    for vendor, index in settings.gpu_ids or ():
        if sample.known and (vendor or sample.vendor, index) not in there:
            yield warn(f"limits.gpu_ids names GPU {index}, which is not there",
                       "Mend limits.gpu_ids (--gpu-ids)")


def read_nvidia_pci(root: str = "/sys/bus/pci/devices") -> Dict[str, str]:
    """{address: driver or ""} of NVIDIA's display controllers, class 0x03.  A container sees the
    whole machine's."""
    def is_gpu(folder: str) -> bool:
        return ((read_text(folder + "/vendor", 16) or "").startswith("0x10de")
                and (read_text(folder + "/class", 16) or "").startswith("0x03"))
    return {address: os.path.basename(read_link(f"{root}/{address}/driver"))
            for address in list_folder(root) if is_gpu(f"{root}/{address}")}


def judge_pci(devices: Dict[str, str], seen: bool) -> Iterator[Finding]:
    """seen: whether NVIDIA's driver told of a GPU, or of a problem."""
    for address, driver in devices.items():
        if driver in ("", "nouveau"):
            has = f"the driver {driver}" if driver else "no driver"
            yield warn(f"an NVIDIA GPU at {address} has {has}", "sudo ubuntu-drivers install && "
                       "sudo reboot   # elsewhere: https://www.nvidia.com/drivers")
        elif driver == "nvidia" and not seen:
            yield warn(f"the NVIDIA GPU at {address} has its driver, but no tool here shows it",
                       "docker run --gpus all …   # in a container; else install nvidia-smi of the "
                       "driver's version")


def check_gpus(loaded: Loaded) -> Iterator[Finding]:
    sample = GpuSampler(make_gpu_sources()).sample(_DRIVER_LIMIT_S)
    yield from judge_gpus(sample, loaded.settings, os.environ.get("CUDA_VISIBLE_DEVICES"))
    yield from judge_pci(read_nvidia_pci(), bool(sample.problems) or any(
        gpu.vendor == "nvidia" for gpu in sample.gpus))


# -- the gateway ----------------------------------------------------------

def check_gateway(loaded: Loaded) -> Iterator[Finding]:
    """Health, and the routes; the token's row is the next."""
    client, endpoint = doctor_client(loaded), doctor_endpoint(loaded)
    way = f", through the tunnel {loaded.settings.tunnel}" if endpoint.dial else ""
    way += f", through the proxy {host_port(*endpoint.proxy[:2])}" if endpoint.proxy else ""
    begun_s = now_s()
    client.health()
    took_ms = (now_s() - begun_s) * 1000
    yield ok(f"{endpoint.url} is well, answered in {took_ms:.0f} ms{way}")
    if not loaded.settings.token:
        raise NotTried("its routes are seen with a token only")
    try:
        for route in ("keepalive", "register"):
            client.probe(route)
    except TokenRefused as error:
        raise NotTried("its routes are seen with a good token only") from error
    yield ok("it has the routes keepalive and register")


def check_token(loaded: Loaded) -> Iterator[Finding]:
    if not loaded.settings.token:
        refuse_default(loaded, "token")
        raise UsageError("there is none", "b9agent.py init   # asks for it; it comes from: "
                         f"beta9 machine create --pool {loaded.settings.pool_name}")
    try:
        doctor_client(loaded).probe("register")
    except TokenRefused:
        raise
    except GatewayError as error:
        raise NotTried("the gateway did not judge it") from error
    yield ok(f"accepted; from {loaded.origins['token']}")


def agent_status(loaded: Loaded) -> Dict[str, Any]:
    """What the running agent says; {} where none runs, or it does not say."""
    try:
        return read_agent_status(loaded.settings.state_dir)
    except AgentError:
        return {}


def check_pool(loaded: Loaded) -> Iterator[Finding]:
    """Whether a pool exists shows in registering alone, which would set a ready machine back."""
    status = agent_status(loaded)
    if status.get("state") == "ready":
        yield ok(f"`{status.get('pool')}` has machine {status.get('machine_id')}, ready")
    elif "has no pool" in str(status.get("message")):
        raise UsageError(f"`{status.get('pool')}` does not exist on the gateway",
                         "b9agent.py init --pool POOL   # one of the gateway's configuration")
    else:
        refuse_default(loaded, "pool_name")
        yield ok(f"`{loaded.settings.pool_name}` is looked for at the first registration; "
                 "`b9agent.py --once` tries it")


# -- what runs beside it --------------------------------------------------

def why_not_listening(host: str, port: int) -> str:
    """Why a server could not listen there now, or ""."""
    try:
        holder = port_holder(host, port)
    except OSError as error:
        return error.strerror or str(error)
    return f"held by {holder}" if holder else ""


def judge_engine_port(settings: Any, state: str) -> Finding:
    """The engine's port.  state: of the running agent's engine."""
    host, port = settings.inference_host, settings.inference_port
    what = f"engine: {host_port(host, port) if port else 'a free port'}"
    why = why_not_listening(host, port) if port and state == "stopped" else ""
    version = is_ollama(Endpoint("http", "127.0.0.1", port)) if why else ""
    if version:
        return ok(f"{what}: Ollama {version} is here, and would be used")
    return warn(f"{what}: {why}", "Set inference.port (0 takes a free one), or end that program"
                ) if why else ok(what + (f", {state}" if state != "stopped" else ""))


def check_ports(loaded: Loaded) -> Iterator[Finding]:
    host, port = loaded.settings.control_host, loaded.settings.control_port
    status = agent_status(loaded)
    where = host_port(host, port) if port else "a free one"
    why = why_not_listening(host, port) if port and not status else ""
    if why:
        yield warn(f"control API: {where}: {why}; the machine would be kept alive without it",
                   "b9agent.py run --control-port 0   # a free one")
    else:
        yield ok("control API: " + (f"the agent listens, pid {status['pid']}" if status else where))
    yield judge_engine_port(loaded.settings, (status or {}).get("inference_status", "stopped"))


def check_engines(loaded: Loaded) -> Iterator[Finding]:
    settings = loaded.settings
    found = [(engine, find_engine(engine.program)) for engine in ENGINES]
    yield ok(", ".join(f"{engine.title} ({path})" for engine, path in found if path) or
             "none yet; such as: " + ENGINES[0].install)
    program, wanted = settings.inference_program, ENGINE_BY_NAME.get(settings.inference_engine)
    if program and not os.access(program, os.X_OK):
        yield warn(f"inference.program: {program} is no program that this user can run",
                   "b9agent.py init --inference-program PATH -y")
    elif wanted and not program and not find_engine(wanted.program):
        yield warn(f"inference.engine is {wanted.name}, and there is no {wanted.program} on PATH",
                   wanted.install)


def k3s_answers(endpoint: Endpoint, limit_s: float) -> bool:
    """Its certificate is signed by an authority of its own: that it is refused is an answer too."""
    try:
        http_request("GET", endpoint, "/version", {}, None, limit_s)
        return True
    except HttpFailure as failure:
        return failure.kind == "tls"


def judge_k3s(installed: bool, answers: bool, token: bool) -> Finding:
    where = host_port(_K3S.host, _K3S.port)
    if answers and not token:
        return warn(f"answers on {where}; without k3s.token the gateway starts no workers on it",
                    "sudo b9agent.py k3s rbac --apply   # then set k3s.service_account")
    if not answers and (installed or token):
        why = "installed" if installed else "a k3s token is set"
        return warn(f"{why}, but nothing answers on {where}", "sudo systemctl start k3s"
                    if installed else "sudo b9agent.py k3s install   # or unset the token")
    return ok(f"answers on {where}; its token is set" if answers else
              "none: this machine runs models, not the gateway's workers")


def check_pods(settings: Any) -> Iterator[Finding]:
    """Whether worker pods can be watched, where there is a configuration for it."""
    try:
        config = read_kubeconfig(settings)
        if config is not None:
            KubeClient(config).request("GET", PODS_PATH + "?limit=1")
            yield ok(f"worker pods can be watched, with {config.source}")
    except (KubeError, UsageError) as error:
        yield warn(f"worker pods cannot be watched: {error.what}", error.hint)


def check_k3s(loaded: Loaded) -> Iterator[Finding]:
    yield from check_pods(loaded.settings)
    yield judge_k3s(os.path.exists("/etc/rancher/k3s/k3s.yaml"),
                    k3s_answers(_K3S, _REQUEST_LIMIT_S),
                    bool(loaded.settings.k3s_token or loaded.settings.k3s_service_account))


def check_tailnet(loaded: Loaded) -> Iterator[Finding]:
    found, hostname = read_tailnet(loaded.settings.tailnet_socket), loaded.settings.hostname or ""
    if found.state in ("waiting", "down"):
        yield warn(f"no address: {found.message}", "tailscale status   # then: sudo tailscale up")
    elif found.address and hostname.startswith("100.") and hostname != found.address:
        yield warn(f"{found.address}, but machine.hostname is {hostname}, which the gateway dials",
                   "Take machine.hostname out of the config file: the agent offers the address")
    else:
        yield ok(" ".join(filter(None, (found.address, found.name)))
                 or "none: no tailscale here")


# -- our files, the agent, the service -------------------------------------

def check_config(loaded: Loaded) -> Iterator[Finding]:
    path = loaded.settings.config
    given = sum(origin != "default" for origin in loaded.origins.values())
    yield finding_of(loaded.problem) if loaded.problem is not None else ok(
        (path if os.path.exists(path) else f"there is no {path}")
        + f"; {given} of {len(SETTINGS)} settings are not the default")
    for warning in loaded.warnings:
        yield warn(warning, "b9agent.py init   # keeps it in the config file, 0600")


def check_files(loaded: Loaded) -> Iterator[Finding]:
    from shlex import quote
    folder, user = loaded.settings.state_dir, os.geteuid()
    above, found = nearest_folder(folder), []
    if os.path.lexists(folder) and above != folder or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} is no folder that this user can write in",
                         "b9agent.py run --state-dir PATH   # or: sudo chown "
                         f"{user} {quote(above)}")
    if above != folder:
        yield ok(f"{folder}, not made yet")
        return
    make_private_folder(folder)  # makes none: it looks at who owns and writes in this one
    for path in [folder] + [os.path.join(folder, name) for name in _PRIVATE_FILES]:
        mode = shared_mode(path)
        if os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
            found.append(Finding("fail", f"{path} is not this user's to use",
                                 f"sudo chown {user} {quote(path)}"))
        elif mode is not None:
            found.append(warn(f"{path} has mode {mode:04o}: others may use it",
                              f"chmod {700 if path == folder else 600} {quote(path)}"))
    yield from found or [ok(f"{folder}, with what is in it, is private")]
    kept_machine_id(loaded.settings, keep=False)


def check_agent(loaded: Loaded) -> Iterator[Finding]:
    folder = loaded.settings.state_dir
    if not agent_holds(folder):
        yield ok(f"none runs on {folder}: b9agent.py run")
        return
    try:
        status = read_agent_status(folder)
    except GatewayUnreachable as error:
        yield warn(error.what, error.hint)
        return
    state = str(status["state"])
    seen = (f"b9agent {status['version']}, pid {status['pid']}, {state} for "
            f"{status.get('state_seconds')} s, {status.get('keepalives')} keepalives")
    if state not in ("ready", "starting", "registering", "registered"):
        yield warn(f"{seen}: {status.get('message')}", "b9agent.py status   # and the rows above")
    elif status["version"] != VERSION:
        yield warn(f"{seen}; this is {VERSION}", "b9agent.py service install   # or restart it")
    else:
        yield ok(seen)


def check_service(_loaded: Loaded) -> Iterator[Finding]:
    place = find_place({})
    if not place.definition or not os.path.exists(place.definition):
        yield ok("not installed: b9agent.py service install")
        return
    manager = MANAGERS[place.manager](place)
    process = manager.process()
    seen = f"{place.definition}, state folder {place.state}: {process}"
    sudo = "sudo " if place.scope == "system" else ""
    start = " && ".join(sudo + line for line in manager.restart if line[0] != "-")
    yield ok(seen) if process.pid != 0 else warn(seen, f"{start}   # its log: {manager.logs}")


# -- all of them ----------------------------------------------------------

CHECKS = (
    Check("python", check_python),
    Check("clock", check_clock),
    Check("disk", check_disk, Exit.USAGE),
    Check("host", check_host),
    Check("gpus", check_gpus),
    Check("gateway", check_gateway, Exit.UNREACHABLE),
    Check("token", check_token),
    Check("pool", check_pool),
    Check("ports", check_ports),
    Check("engines", check_engines),
    Check("k3s", check_k3s),
    Check("tailnet", check_tailnet),
    Check("config", check_config, Exit.USAGE),
    Check("files", check_files, Exit.USAGE),
    Check("agent", check_agent),
    Check("service", check_service),
)


def _look(check: Check, loaded: Loaded, found: List[Finding]) -> None:
    """Append what a check sees, whatever happens in it."""
    try:
        for finding in check.look(loaded):
            found.append(finding)
    except NotTried as reason:
        found.append(warn(f"not tried: {reason}", ""))
    except AgentError as error:
        found.append(finding_of(error))
    except Exception as error:
        found.append(Finding("fail", f"defect: {type(error).__name__}: {error} (at "
                             f"{defect_place(error)}, version {VERSION})", "Please report this"))


def run_checks(checks: Sequence[Check], loaded: Loaded, limit_s: float) -> List[Finding]:
    """All findings in the order of the checks, within limit_s, and without a secret in them."""
    until_s, result = now_s() + limit_s, []
    found: List[List[Finding]] = [[] for _ in checks]
    threads = [threading.Thread(target=_look, args=(check, loaded, rows), daemon=True,
                                name=f"check-{check.name}") for check, rows in zip(checks, found)]
    for thread in threads:
        thread.start()
    for check, thread, rows in zip(checks, threads, found):
        thread.join(max(0.0, until_s - now_s()))
        rows = rows[:]
        if thread.is_alive():
            rows.append(Finding("fail" if check.late else "warn", f"did not end within {limit_s:g} "
                                "s", "b9agent.py doctor --debug   # shows more", check.late))
        for finding in rows:
            seen, mend = (printable(REDACTOR.scrub(text)) for text in finding[1:3])
            result.append(finding._replace(name=check.name, seen=seen, mend=mend))
    return result


def doctor_exit(findings: Sequence[Finding]) -> Exit:
    """What is to be mended here comes before a gateway that may come back by itself."""
    codes = {finding.exit_code for finding in findings if finding.level == "fail"}
    return Exit.OK if not codes else Exit.USAGE if Exit.USAGE in codes else Exit.UNREACHABLE


def doctor_lines(findings: Sequence[Finding], cannot: str = "this machine cannot be ready",
                 can: str = "nothing keeps this machine from ready") -> List[str]:
    """cannot, can: what to say where something fails, and where nothing does."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<5} {finding.name:<8} {finding.seen}")
        if finding.mend:
            lines.append(f"{'':<14} mend: {finding.mend}")
    levels = [finding.level for finding in findings]
    verdict = cannot if "fail" in levels else can
    return lines + ["", f"{verdict}: {len(findings)} findings, {levels.count('warn')} warn, "
                        f"{levels.count('fail')} fail"]


# ----------------------------------------------------------------------
# 20c. k3s: check and install         reads; k3s's own files, as --dry-run says
# ----------------------------------------------------------------------
# `k3s check` asks as the gateway would, with a token of its kind.  `k3s
# install` runs the vendor's installer once, on a machine that has no k3s, and
# believes in it when the API answers and a node is Ready.  What k3s is to do
# stands in its config.yaml and not in the installer's flags: run again without
# flags, as for an upgrade, the installer would drop them.

K3S_INSTALLER_BYTES, K3S_INSTALL_LIMIT_S, K3S_READY_LIMIT_S = 1 << 20, 1200.0, 300.0
# A worker's pods have the host's network and folders: what k3s brings for other uses would hold
# ports 80 and 443 of this machine (traefik, servicelb), or memory.
_K3S_DISABLED = ["traefik", "servicelb", "metrics-server", "local-storage"]
# Machine: the number in a program's head (elf(5), e_machine), and its name in k3s's releases.
_K3S_MACHINES = {"x86_64": (62, "amd64"), "aarch64": (183, "arm64"), "armv7l": (40, "arm"),
                 "s390x": (22, "s390x")}

K3S_KEYS = ("k3s_token", "k3s_service_account", "k3s_token_hours", "k3s_kubeconfig", "hostname",
            "state_dir")
_AGENTS_KEYS = ("k3s_token", "k3s_service_account", "k3s_token_hours", "hostname")
K3S_ACCOUNT_OPTIONS = (
    Option("--service-account", "NAME", f"the gateway's; default {GATEWAY_ACCOUNT}"),
    Option("--namespace", "NAME", "where workers run; the gateway knows `default` alone"))
K3S_INSTALL_OPTIONS = (
    Option("--dry-run", "", "print every step, change nothing"),
    Option("-y", "", "do not ask before the installer runs"),
    Option("--sha256", "HEX", "run no installer but the one with this SHA-256"),
    Option("--release", "VERSION", "such as v1.30.4+k3s1; default: the vendor's stable one"),
    Option("--installer", "PATH", "the vendor's installer, from https://get.k3s.io, as a file"),
    Option("--binary", "PATH", "without a network: the program k3s; wants --installer as well"),
    Option("--images", "FOLDER", "without a network: the folder of k3s-airgap-images-*"))


def admin_kubeconfig(settings: Any) -> KubeConfig:
    """One with all rights: named, k3s's own, or the user's.  Raises: UsageError."""
    config = read_kubeconfig(settings._replace(state_dir=os.devnull, k3s_token=None))
    if config is None:
        raise UsageError("there is no k3s here", "sudo b9agent.py k3s install")
    return config


# -- check ------------------------------------------------------------------

def node_is_ready(node: Dict[str, Any]) -> bool:
    return any(row.get("type") == "Ready" and row.get("status") == "True"
               for row in objects_in(_object(node, "status").get("conditions")))


def judge_nodes(nodes: Sequence[Dict[str, Any]], gpus: int) -> Iterator[Finding]:
    """gpus: of NVIDIA's in this machine."""
    names = {str(_object(node, "metadata").get("name")): node_is_ready(node) for node in nodes}
    waiting = [name for name, ready in names.items() if not ready]
    if not names or waiting:
        yield Finding("fail", f"not ready: {', '.join(waiting) or 'there is no node'}",
                      "sudo k3s kubectl describe nodes   # its log: journalctl -u k3s")
    else:
        yield ok(f"ready: {', '.join(names)}")
    counts = [str(_object(node, "status", "allocatable").get("nvidia.com/gpu")) for node in nodes]
    there = sum(int(count) for count in counts if re.fullmatch("[0-9]{1,6}", count))
    if there < gpus:
        yield warn(f"{there} of {gpus} GPUs can be given to workers",
                   "Install nvidia-container-toolkit, restart k3s, then NVIDIA's device plugin: "
                   "https://docs.k3s.io/advanced#nvidia-container-runtime")
    elif gpus:
        yield ok(f"{there} GPUs can be given to workers")


def judge_token(token: str, minted: bool, now_wall_s: float) -> Finding:
    """What a token that was accepted says of its end."""
    claims = token_claims(token)
    who, ends_s = printable(str(claims.get("sub") or "a user"))[:200], claims.get("exp")
    if minted:
        return ok(f"{who}: one was made, and accepted")
    seen = f"{who}: accepted, and it " + (f"ends {utc_stamp(ends_s)}" if ends_s else "never ends")
    return ok(seen) if ends_s and ends_s - now_wall_s > 86400 else warn(
        seen, "sudo b9agent.py k3s rbac --apply   # then k3s.service_account in place of "
        "k3s.token, and it is renewed")


class K3sChecks:
    """The rows of `k3s check`.  running: the status of the agent, or {}."""

    def __init__(self, settings: Any, options: Dict[str, str], running: Dict[str, Any]) -> None:
        self._settings, self._running = settings, running
        self._namespace, self._account = kube_names(settings, options)

    def rows(self) -> Tuple[Check, ...]:
        checks = (Check("api", self._api, Exit.UNREACHABLE), Check("token", self._token),
                  Check("rights", self._rights), Check("own", self._own),
                  Check("address", self._address), Check("nodes", self._nodes))
        try:
            self._client()
        except UsageError:  # no k3s, or no way to ask it: the first row says so, once
            return checks[:1]
        return checks

    def _client(self) -> KubeClient:
        config = read_kubeconfig(self._settings)
        return KubeClient(config or admin_kubeconfig(self._settings))

    def _gateway(self) -> Tuple[KubeClient, str]:
        """(a client as the gateway is one, its token)."""
        kube, token = self._client(), self._settings.k3s_token
        if not token:
            token, _ = mint_token(kube, self._namespace, self._account, 600)
        return KubeClient(with_token(kube.config, token)), token

    def _api(self, _loaded: Loaded) -> Iterator[Finding]:
        kube = self._client()
        version = kube_answer(kube, "GET", "/version").get("gitVersion")
        yield ok(f"{printable(str(version))[:60]} at {kube.config.endpoint.url}, verified; asked "
                 f"with {kube.config.source}")
        mode = shared_mode(K3S_KUBECONFIG)
        if mode:
            yield warn(f"{K3S_KUBECONFIG} has mode {mode:04o}: who reads it owns the cluster",
                       f"sudo chmod 600 {K3S_KUBECONFIG}   # and write-kubeconfig-mode in its "
                       "config.yaml")

    def _token(self, _loaded: Loaded) -> Iterator[Finding]:
        kube, token = self._gateway()
        read_rights(kube, self._namespace)
        yield judge_token(token, not self._settings.k3s_token, time.time())
        running = self._running.get("k3s")
        if running:
            yield (warn(str(running.get("message")), "b9agent.py k3s check   # the rows above")
                   if running.get("message") else
                   ok(f"the agent's ends {running.get('token_expires')}, and is renewed before"))
        elif not self._settings.k3s_token and not self._settings.k3s_service_account:
            yield warn("the agent has none: k3s.service_account is not set",
                       f"b9agent.py init --k3s-service-account {self._account} -y   # then restart "
                       "it")

    def _rights(self, _loaded: Loaded) -> Iterator[Finding]:
        (kube, token), rights = self._gateway(), GATEWAY_RIGHTS
        yield from self._judge(kube, "the gateway", rights, "fail")
        found = excess_rights(read_rights(kube, self._namespace), rights)
        if found:
            account = str(token_claims(token).get("sub")).rpartition(":")[2]
            yield warn("it may also: " + ", ".join(found[:8]) + (" …" if len(found) > 8 else ""),
                       "kubectl get clusterrolebindings,rolebindings -A -o wide | grep "
                       f"{account}   # and delete what binds it so; or let the gateway have the "
                       "account of `k3s rbac`")

    def _own(self, _loaded: Loaded) -> Iterator[Finding]:
        """Without them the agent shows no pods, or a token ends."""
        rights = [right for right in k3s_accounts(self._account)[AGENT_ACCOUNT]
                  if not (right.names and self._settings.k3s_token)]
        yield from self._judge(self._client(), "the agent", rights, "warn")

    def _judge(self, kube: KubeClient, who: str, rights: Sequence[Right],
               level: str) -> Iterator[Finding]:
        missing = [right for right in rights if not may(kube, self._namespace, right)]
        for right in missing:
            yield Finding(level, f"{who} may not {right} in {self._namespace}: {right.why}",
                          "sudo b9agent.py k3s rbac --apply")
        if not missing:
            yield ok(f"{who} may " + ", ".join(map(str, rights)) + f" in {self._namespace}")

    def _address(self, _loaded: Loaded) -> Iterator[Finding]:
        """HOSTNAME:6443, as it is registered, from here."""
        name = str(self._running.get("hostname") or self._settings.hostname or "")
        if not name:
            raise NotTried("no agent runs that has a hostname, and machine.hostname is not set")
        config = with_token(self._client().config, "")  # nobody there is told who we are
        endpoint = config.endpoint._replace(host=name, port=6443)
        try:
            http_request("GET", endpoint, "/version", {}, None, _REQUEST_LIMIT_S)
        except HttpFailure as failure:
            if failure.kind != "tls":  # the gateway does not verify it
                yield warn(f"{host_port(name, 6443)} is not reached from here: {failure}"
                           + ("; the gateway adds its tailnet's name" if failure.kind == "dns"
                              else ""), "b9agent.py init --hostname $(tailscale ip -4) -y   # or "
                           "the name by which the gateway reaches this machine")
                return
        yield ok(f"{host_port(name, 6443)} is reached from here")

    def _nodes(self, _loaded: Loaded) -> Iterator[Finding]:
        try:
            kube = KubeClient(admin_kubeconfig(self._settings))
            nodes = objects_in(kube_answer(kube, "GET", "/api/v1/nodes").get("items"))
        except (UsageError, KubeForbidden):
            yield ok("not looked at: the agent may not see them, and need not; with sudo they are")
            return
        gpus = GpuSampler(make_gpu_sources()).sample(_DRIVER_LIMIT_S).gpus
        count = sum(gpu.vendor == "nvidia" for gpu in gpus)
        yield from judge_nodes(nodes, count)
        if count and not kube_answer(kube, "GET", "/apis/node.k8s.io/v1/runtimeclasses/nvidia"):
            yield warn("there is no runtime class nvidia, which pools for GPUs often name",
                       "Install nvidia-container-toolkit, then: sudo systemctl restart k3s")


# -- rbac --apply -----------------------------------------------------------

def folder_owner(folder: str) -> Account:
    """Whose a folder is, or will be.  A user's link leads no further than that user could go."""
    folder = nearest_folder(folder)
    found = os.lstat(folder)
    found = found if found.st_uid else os.stat(folder)
    return Account("", found.st_uid, found.st_gid, "")


def for_the_agent(loaded: Loaded) -> Loaded:
    """For root: with the state folder of the agent's service, or of who called sudo, and with what
    is configured there of the gateway's token.  No path: root would read it for another user."""
    user = os.environ.get("SUDO_USER", "root")
    if os.geteuid() != 0 or loaded.origins["state_dir"] != "default":
        return loaded
    place = find_place({})
    state = place.state if os.path.isdir(place.state) else os.path.expanduser(f"~{user}/.b9agent")
    if user == "root" and state != place.state:
        return loaded
    theirs = as_user(folder_owner(state), load_settings, {"state_dir": state}, {}).settings
    known = {key: getattr(theirs, key) for key in _AGENTS_KEYS if loaded.origins[key] == "default"}
    return loaded._replace(settings=loaded.settings._replace(state_dir=state, **known))


def k3s_apply(settings: Any, options: Dict[str, str], say: Callable[[str], None]) -> None:
    """Apply the manifest, and give the agent a kubeconfig that can do what its account may.

    Raises: KubeError, UsageError.
    """
    namespace, account = kube_names(settings, options)
    if namespace != K3S_NAMESPACE:
        say(f"warning: gateway and agent know the namespace {K3S_NAMESPACE} alone")
    kube = KubeClient(admin_kubeconfig(settings))
    for item in k3s_objects(namespace, account):
        say(f"{item['kind']} {namespace}/{item['metadata']['name']}: {apply_object(kube, item)}")
    token, _ = mint_token(kube, namespace, AGENT_ACCOUNT, OWN_TOKEN_HOURS * 3600)
    path = os.path.join(settings.state_dir, "k3s.kubeconfig")
    text, owner = render_kubeconfig(kube.config, token), folder_owner(settings.state_dir)
    as_user(owner, make_private_folder, settings.state_dir)
    as_user(owner, write_atomic, path, text)
    agent = KubeClient(as_user(owner, kubeconfig_at, path))
    until_s, wake = now_s() + 10.0, Wake()  # a new Role counts once the server has seen it
    rights = k3s_accounts(account)[AGENT_ACCOUNT]
    while not all(may(agent, namespace, right) for right in rights):
        if now_s() > until_s:
            raise KubeRefused("the agent's new token lacks rights of its Role",
                              "b9agent.py k3s check")
        wake.wait(0.2)
    mint_token(agent, namespace, account, 600)
    say(f"wrote {path} (0600, for user id {owner.uid}); with it a token of {account} was made")
    if settings.k3s_service_account != account:
        say(f"next: b9agent.py init --k3s-service-account {account} -y, and restart the agent")


# -- install ----------------------------------------------------------------

class K3sPlaces(NamedTuple):
    """Where k3s has its files, what shows that it is there, where the installer comes from."""
    binary: str = "/usr/local/bin/k3s"
    images: str = "/var/lib/rancher/k3s/agent/images"
    config: str = "/etc/rancher/k3s/config.yaml"
    kubeconfig: str = K3S_KUBECONFIG
    traces: Tuple[str, ...] = (
        "/etc/systemd/system/k3s.service", "/etc/systemd/system/k3s-agent.service",
        "/etc/init.d/k3s", "/etc/init.d/k3s-agent", "/var/lib/rancher/k3s/server")
    source: Endpoint = Endpoint("https", "get.k3s.io", 443)
    port: int = 6443


def _digest(text: bytes) -> str:
    import hashlib
    return hashlib.sha256(text).hexdigest()


def elf_problem(head: bytes, number: int) -> str:
    """Why a file is no program for a machine, or "".  head: its first bytes."""
    if head[:4] != b"\x7fELF" or len(head) < 20:
        return "is no Linux program"
    found = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    return "" if found == number else "is a program for another processor than this machine's"


def _copy_atomic(source: str, target: str, mode: int) -> None:
    """A file of any size, whole or not at all."""
    import shutil
    make_public_folder(os.path.dirname(target))
    draft = f"{target}.{os.getpid()}.tmp"
    try:
        with open(source, "rb") as reader, open(draft, "xb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            os.fchmod(writer.fileno(), mode)
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(draft, target)
    except BaseException:
        remove_file(draft)
        raise


def read_installer(path: Optional[str], source: Endpoint) -> bytes:
    """Of a file, or from the vendor.  Raises: UsageError."""
    what = path or source.url
    try:
        if path:
            with open(path, "rb") as handle:
                script = handle.read(K3S_INSTALLER_BYTES + 1)
        else:
            proxy = proxy_for(source.scheme, source.host, None, dict(os.environ))
            reply = http_request("GET", source._replace(proxy=proxy), "/", {"Accept": "*/*"}, None,
                                 60.0, K3S_INSTALLER_BYTES)
            script = reply.body if reply.status == 200 else b""
    except (OSError, HttpFailure) as error:
        raise UsageError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}",
                         "Carry the vendor's installer here: --installer PATH") from error
    if not script.startswith(b"#!") or len(script) > K3S_INSTALLER_BYTES:
        raise UsageError(f"{what} is no shell script", "It is to be what https://get.k3s.io "
                         "answers; is there a proxy or a portal in between?")
    return script


class K3sInstall:
    """One run of `k3s install`.  confirm(question): whether the user wants it; show(text): how far
    it is."""

    def __init__(self, steps: Steps, options: Dict[str, str], names: Sequence[str],
                 places: K3sPlaces = K3sPlaces()) -> None:
        self._steps, self._options, self._places = steps, options, places
        self._names = [name for name in names if name]
        self._binary, self._images = options.get("binary", ""), options.get("images", "")

    def run(self, confirm: Callable[[str], bool], show: Callable[[str], None]) -> None:
        """Raises: AgentError.  Where there is a k3s already it is looked at, and left alone."""
        steps, trace = self._steps, next(filter(os.path.exists, self._places.traces), "")
        if trace:
            steps.say(f"k3s is here ({trace}): it is left as it is")
        else:
            images = self._check()
            self._install(images, confirm, show)
        # One that was there is only looked at.
        limit_s = 5.0 if trace else K3S_READY_LIMIT_S
        version = steps.do("wait until its API answers and a node is Ready", self._await_ready,
                           show, limit_s)
        steps.say("nothing was changed" if steps.dry else
                  f"k3s {version} is ready\nnext: sudo b9agent.py k3s rbac --apply")

    def _check(self) -> List[str]:
        """The images to copy.  Raises: UsageError, LockedError."""
        option_value(self._options, "sha256", matching("[0-9a-fA-F]{64}", "64 hexadecimal digits"))
        option_value(self._options, "release", matching(
            r"v[0-9]+\.[0-9]+\.[0-9]+[0-9A-Za-z.+-]*", "a version such as v1.30.4+k3s1"))
        holder = port_holder("0.0.0.0", self._places.port)
        if holder:
            raise LockedError(f"port {self._places.port}, which k3s needs, is held by {holder}",
                              "End that first")
        number, arch = _K3S_MACHINES.get(os.uname().machine, (0, ""))
        if not arch:
            raise UsageError(f"there is no k3s for {os.uname().machine}", "See https://docs.k3s.io")
        offline = bool(self._binary or self._images)
        if offline and not (self._binary and "installer" in self._options):
            raise UsageError("without a network three things are needed: the program, the images, "
                             "the installer", "Give --binary PATH --images FOLDER --installer PATH")
        try:
            with open(self._binary or os.devnull, "rb") as handle:
                problem = elf_problem(handle.read(20), number) if offline else ""
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem:
            raise UsageError(f"{self._binary} {problem}", "Take the one for this machine from "
                             "https://github.com/k3s-io/k3s/releases")
        return self._find_images(arch) if self._images else []

    def _find_images(self, arch: str) -> List[str]:
        names = [name for name in sorted(list_folder(self._images))
                 if re.fullmatch(r"[\w.+-]+\.(tar|tar\.gz|tgz|tar\.zst)", name)
                 and os.path.isfile(os.path.join(self._images, name))]
        for name in names:
            marked = re.search("-(amd64|arm64|arm|s390x)[.-]", name)
            if marked and marked.group(1) != arch or not os.path.getsize(f"{self._images}/{name}"):
                raise UsageError(f"{name} is empty, or not for {arch}", "Fetch it again")
        if not names:
            raise UsageError(f"{self._images} has no images (*.tar, *.tar.gz, *.tar.zst)",
                             f"Take k3s-airgap-images-{arch}.tar.zst of the same release")
        return [os.path.join(self._images, name) for name in names]

    def _install(self, images: List[str], confirm: Callable[[str], bool],
                 show: Callable[[str], None]) -> None:
        steps, places = self._steps, self._places
        local = self._options.get("installer")
        what = local or places.source.url
        script = steps.do(f"read {local}" if local else f"fetch {what}", self._installer, local)
        if script is not None:
            steps.say(f"its SHA-256 is {_digest(script)}")
            if "y" not in self._options and not confirm(f"Run {what} as root?"):
                raise UsageError("nothing was changed", "Say yes, or -y")
        for path in images:
            steps.do(f"copy {path} to {places.images}", _copy_atomic, path,
                     os.path.join(places.images, os.path.basename(path)), 0o644)
        config = render_yaml({"write-kubeconfig-mode": "0600", "disable": _K3S_DISABLED,
                              **({"tls-san": self._names} if self._names else {})})
        if read_text(places.config) in (None, config):
            steps.write(places.config, config, 0o600)
        else:
            steps.say(f"note: {places.config} is there already and stays as it is")
        if self._binary:
            steps.do(f"copy {self._binary} to {places.binary}", self._place_binary)
        environment = ["INSTALL_K3S_EXEC=server"]
        environment += ["INSTALL_K3S_SKIP_DOWNLOAD=true"] if self._binary else []
        environment += [f"INSTALL_K3S_VERSION={self._options['release']}"
                        ] if "release" in self._options else []
        steps.do(f"run the installer: {' '.join(environment)} sh", self._run, script, environment,
                 show)

    def _installer(self, path: Optional[str]) -> bytes:
        script = read_installer(path, self._places.source)
        digest, wanted = _digest(script), self._options.get("sha256", "").lower()
        if wanted and digest != wanted:
            raise UsageError(f"the installer's SHA-256 is {digest}, not the one that was asked "
                             "for", "Nothing was run; look at what changed in it")
        return script

    def _place_binary(self) -> None:
        """Tried before it is in place.  Raises: UsageError."""
        trial = self._places.binary + ".b9agent-trial"
        try:
            _copy_atomic(self._binary, trial, 0o755)
            result = run_command([trial, "--version"], 30.0)
            if result.exit_code != 0 or not result.output.startswith("k3s version "):
                raise UsageError(f"{self._binary} does not run here, or is no k3s: "
                                 f"{said_by(result)}", "Take it anew from the releases of k3s")
            self._steps.say("it is " + printable(result.output.splitlines()[0])[:80])
            os.replace(trial, self._places.binary)
        finally:
            remove_file(trial)

    def _run(self, script: bytes, environment: List[str], show: Callable[[str], None]) -> None:
        """The installer keeps what it finds of K3S_*: a K3S_URL would make this another cluster's
        node.  Raises: UnhealthyError."""
        import tempfile
        drop = [word for name in os.environ if name.startswith(("K3S_", "INSTALL_K3S_"))
                for word in ("-u", name)]
        results: List[CommandResult] = []
        with tempfile.NamedTemporaryFile(prefix="b9agent-k3s-") as handle:
            handle.write(script)
            handle.flush()
            argv = ["/usr/bin/env", *drop, *environment, "sh", handle.name]
            thread = threading.Thread(daemon=True, target=lambda: results.append(
                run_command(argv, K3S_INSTALL_LIMIT_S)))
            thread.start()
            begun_s = now_s()
            while thread.is_alive():
                thread.join(0.5)
                show(f"the installer runs ({now_s() - begun_s:.0f} s)")
        for line in results[0].output.splitlines()[-200:]:
            self._steps.say("  " + printable(line)[:300])
        if results[0].exit_code != 0:
            raise UnhealthyError(f"the installer failed: {said_by(results[0])}", "Run this again, "
                                 "mended; if it finds a k3s here then: sudo k3s-uninstall.sh")

    def _await_ready(self, show: Callable[[str], None], limit_s: float) -> str:
        """The version.  Raises: UnhealthyError."""
        until_s, wake, path = now_s() + limit_s, Wake(), self._places.kubeconfig
        config = None
        while True:
            try:
                config = kubeconfig_at(path)
                if config is None:
                    raise UsageError(f"there is no {path}")
                kube = KubeClient(config)
                nodes = objects_in(kube_answer(kube, "GET", "/api/v1/nodes").get("items"))
                if any(map(node_is_ready, nodes)):
                    return printable(str(kube_answer(kube, "GET", "/version").get("gitVersion")))
                what = "its node is not Ready yet" if nodes else "it has no node yet"
            except AgentError as error:
                what = error.what
            if now_s() > until_s:
                raise UnhealthyError(f"k3s is not ready: {what}", "Its log: journalctl -u k3s -n 50"
                                     + ("" if config else "  # was its installation cut off? sudo "
                                        "k3s-uninstall.sh, and again"))
            show(f"{what} ({until_s - now_s():.0f} s left)")
            wake.wait(1.0)


# ----------------------------------------------------------------------
# 21. Commands                                         stdout, exit code
# ----------------------------------------------------------------------
# One row a command; help, parsing and the README's list come from the rows.
# Results go to stdout, the log and errors to stderr; exit codes are made
# here and nowhere else.


class Command(NamedTuple):
    """words: what the user types.  settings: the keys its --help shows, () for all.  operand: the
    word that follows, as help names it; in brackets where it may be left out."""
    words: str
    run: Callable[[Loaded, Dict[str, str]], int]
    options: Tuple[Option, ...]
    settings: Tuple[str, ...]
    help: str
    operand: str = ""


def say(text: str = "") -> None:
    """A line of a command's result."""
    sys.stdout.write(REDACTOR.scrub(text) + "\n")
    sys.stdout.flush()


def say_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
    sys.stdout.flush()  # a full disk is to be an error, not the end of the output


def end_with(message: str, code: Exit) -> int:
    try:
        sys.stderr.write(REDACTOR.scrub(f"b9agent: {message}\n"))
    except OSError:
        pass  # nobody reads it; the exit code says it too
    return int(code)


def make_log(settings: Any, folder: Optional[str] = None) -> Log:
    return Log(settings.log_format, "debug" if settings.debug else "info", folder)


def table_lines(rows: Sequence[Sequence[str]]) -> List[str]:
    """Columns padded to their widest cell.

    >>> table_lines([("ID", "STATE"), ("1", "ready")])
    ['ID  STATE', '1   ready']
    """
    # What a machine says of itself must not move the reader's cursor.
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
            for row in rows]


# -- run ----------------------------------------------------------------

TOLD_TO_STOP: List[int] = []  # the signals that came; kept, since one may come at any moment


def on_stop_signals(stop: Callable[[], Any], wake: Wake) -> None:
    """SIGTERM, SIGINT and SIGHUP end the process in order; an ignored one (nohup) stays so.

    wake: what the main thread waits on.
    """
    def told(number: int, _frame: Any) -> None:
        TOLD_TO_STOP.append(number)
        stop()
    wake.also_on_signals()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, told)


_NO_TOKEN_HINT = ("Set BETA9_TOKEN, or run `b9agent.py init`; a token comes from `beta9 machine "
                  "create --pool POOL` on the gateway, or from `b9agent.py machine create`. To "
                  "look around without one: `b9agent.py demo`")


def dry_run(loaded: Loaded) -> int:
    """Print both payloads, without their secrets; send nothing, write nothing."""
    settings = loaded.settings
    agent = Agent(loaded._replace(settings=settings._replace(token=settings.token or "-")),
                  make_log(settings), keep=False)
    agent.tailnet.look()
    register = agent.register_payload()
    register["token"] = mask(register["token"])
    say_json({"gateway": agent.endpoint.url, "token": mask(settings.token) or None,
              "register": register, "keepalive": agent.keepalive_payload()})
    return Exit.OK


def doctor_of(loaded: Loaded) -> Callable[[], List[str]]:
    return lambda: doctor_lines(run_checks(CHECKS, loaded, DOCTOR_LIMIT_S))


def live(agent: Agent, shown: Optional[Dashboard]) -> None:
    """In service until a signal.  Raises: GatewayError."""
    import faulthandler
    faulthandler.enable()  # a hang that the watchdog ends leaves its stacks in the journal

    def stop() -> None:
        if shown is not None:
            shown.end()
        agent.stop()
    on_stop_signals(stop, agent.wake_main)
    with shown or contextlib.nullcontext():
        agent.run()


def command_run(loaded: Loaded, options: Dict[str, str]) -> int:
    """Until a signal; or --once: register and one keepalive, both of which must succeed."""
    settings, once = loaded.settings, "once" in options
    if "dry-run" in options:
        return dry_run(loaded)
    if not settings.token:
        raise UsageError("there is no machine token", _NO_TOKEN_HINT)
    lock = StateLock(settings.state_dir)
    log = make_log(settings, None if once else settings.state_dir)
    try:
        for warning in loaded.warnings:
            log("warning", "setting", what=warning)
        agent = Agent(loaded, log)
        if once:
            agent.run_once()
        else:
            live(agent, Dashboard(AgentHere(agent, log), agent.stop, doctor_of(loaded), log)
                 if "no-tui" not in options and terminal_fits() else None)
    finally:
        log.close()
        lock.release()
    return Exit.OK


def file_stamps(paths: Sequence[str]) -> List[Optional[int]]:
    """When each file was last changed, its mode included; None where there is none."""
    return [os.stat(path).st_ctime_ns if os.path.exists(path) else None for path in paths]


def wait_for_change(paths: Sequence[str], before: List[Optional[int]], error: AgentError) -> bool:
    """True once one of the files is another than it was `before`; False when told to stop.

    launchd and OpenRC restart whatever ends, at once and for ever, where systemd can be told which
    exit codes are permanent: under them the agent waits instead.  (A lock may be let go of without
    a file changing: that is tried again every minute.)
    """
    log, wake = Log(), Wake()
    on_stop_signals(lambda: None, wake)
    log.error("waiting", error, until=f"{' or '.join(paths)} changes")
    until_s = now_s() + (60.0 if isinstance(error, LockedError) else float("inf"))
    while not TOLD_TO_STOP and file_stamps(paths) == before and now_s() < until_s:
        wake.wait(2.0)
    return not TOLD_TO_STOP


# -- init, config -------------------------------------------------------

INIT_OPTIONS = (
    Option("--gateway", "HOST[:PORT]", "the gateway"),
    Option("--port", "PORT", "the gateway's port"),
    Option("--pool", "POOL", "the worker pool"),
    Option("-y", "", "ask nothing: flags, what the file has, defaults"),
)


def ask(question: str, default: str) -> str:
    sys.stdout.write(f"{question} [{default}]: ")
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:
        raise UsageError("the input ended before every question was answered",
                         "Nothing was written")
    return line.strip() or default


def ask_settings(wanted: Dict[str, str], settings: Any, tailnet: str, machine_id: str) -> None:
    """Ask for what no flag gave; Enter takes what stands in brackets."""
    gateway = ask("Gateway host[:port]", host_port(settings.gateway_host, settings.gateway_port)
                  ) if "gateway_host" not in wanted else ""
    if gateway:
        wanted["gateway_host"], port = split_gateway(gateway)
        wanted["gateway_port"] = port or wanted.get("gateway_port") or str(settings.gateway_port)
    if "pool_name" not in wanted:
        wanted["pool_name"] = ask("Pool", settings.pool_name)
    if "machine_id" not in wanted:
        wanted["machine_id"] = ask("Machine id (from `machine create`)", machine_id)
    if "token" not in wanted:
        import getpass
        token = getpass.getpass(f"Token [{mask(settings.token) or 'none'}]: ").strip()
        if token:
            wanted["token"] = token
    if "hostname" not in wanted:
        offered = settings.hostname or tailnet or f"machine-{wanted['machine_id']}"
        hostname = ask("Hostname that the gateway can dial", offered)
        if hostname != offered:  # the agent takes that by itself, and a tailnet's once there is one
            wanted["hostname"] = hostname


def report_health(loaded: Loaded) -> None:
    settings, endpoint = loaded.settings, gateway_endpoint(loaded.settings)
    client = GatewayClient(endpoint, "", settings.pool_name, make_log(settings))
    try:
        if not settings.tunnel:  # the agent keeps that, and there is none yet
            client.health()
            say(f"gateway {endpoint.url} is up")
    except GatewayError as error:
        say(str(error))
    say("next: " + ("b9agent.py run" if settings.token else
                    "get a token, then b9agent.py init again"))


def command_init(loaded: Loaded, options: Dict[str, str]) -> int:
    """Write the config file, then try the gateway and say what was found."""
    settings = loaded.settings
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    wanted = init_values(loaded, options)
    silent = "y" in options or all(key in wanted for key in ("gateway_host", "token", "pool_name"))
    if not silent and not sys.stdin.isatty():
        raise UsageError("init has nobody to ask: its input is not a terminal",
                         "Give --gateway HOST[:PORT] --token TOKEN --pool POOL, or -y")
    known = {key: item.text for key, item in read_config(settings.config).items()}
    machine_id = known.get("machine_id") or kept_machine_id(settings, False)
    tailnet = "" if settings.hostname or settings.tunnel else read_tailnet(
        settings.tailnet_socket).address
    if not silent:
        ask_settings(wanted, settings, tailnet, machine_id)
    wanted.setdefault("machine_id", machine_id)
    for key, text in wanted.items():
        _value(SETTING_BY_KEY[key], {key: _Given(text, f"flag {SETTING_BY_KEY[key].flag}")})
    make_private_folder(settings.state_dir)
    backup = save_config(settings.config, wanted)
    say(f"wrote {settings.config} (0600)" + (f"; the old one, with its comments, is {backup}"
                                             if backup else ""))
    written = load_settings({"config": settings.config, "state_dir": settings.state_dir}, {})
    say(f"machine {written.settings.machine_id}, pool {written.settings.pool_name}, "
        f"token {mask(written.settings.token) or 'none yet'}"
        + (f", hostname {written.settings.hostname}" if written.settings.hostname else
           f", hostname {tailnet}, of the tailnet" if tailnet else ""))
    report_health(written)
    return Exit.OK


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> List[str]:
    """
    >>> markdown_table(("code", "meaning"), [("0", "done")])
    ['| code | meaning |', '| --- | --- |', '| 0 | done |']
    """
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


Table = Tuple[Sequence[str], Iterable[Sequence[str]]]


def settings_table() -> Table:
    return ("in the file", "flag", "environment", "default", "what"), (
        ((f"`{row.path}`" + (f", `{row.also}`" if row.also not in ("", row.path) else ""))
         if row.path else "–", f"`{row.flag}{' ' + row.kind if row.kind else ''}`",
         f"`{row.variable}`", f"`{row.default}`" if row.default else "–", row.help)
        for row in SETTINGS)


def engines_table() -> Table:
    return ("engine", "program", "loads", "on", "to install it"), (
        (engine.title, f"`{engine.program}`", ", ".join(
            {"name": "its library", "hub": "Hugging Face"}.get(form, form)
            for form in engine.formats), ", ".join(vendor or "CPU" for vendor in engine.vendors),
         f"`{engine.install}`") for engine in ENGINES)


def routes_table() -> Table:
    routes = ControlApi(Log(), "", agent_routes(dict, str) + inference_routes(None)).routes
    return ("request", "body or query", "what"), (
        (f"`{route.method} {route.path}`", ", ".join(
            f"`{field.name}`" if field.required else f"[`{field.name}`]"
            for field in route.fields + route.query) or "–", route.summary) for route in routes)


README_TABLES: Tuple[Tuple[str, Callable[[], Table]], ...] = (
    ("settings", settings_table), ("engines", engines_table), ("routes", routes_table),
    ("k3s-rights", lambda: (("account", "verb", "resource", "why"), (
        (name, right.verb, str(right).partition(" ")[2], right.why)
        for name, rights in k3s_accounts(GATEWAY_ACCOUNT).items() for right in rights))),
    ("exit-codes", lambda: (("code", "meaning"), (
        (str(int(code)), text) for code, text in EXIT_MEANINGS))))


def command_config(loaded: Loaded, options: Dict[str, str]) -> int:
    """Every setting, its value and where it came from."""
    for name, table in README_TABLES:
        if name in options:
            say("\n".join(markdown_table(*table())))
            return Exit.OK
    shown = [(row, getattr(loaded.settings, row.key)) for row in SETTINGS]
    texts = {row.key: mask(str(value)) if row.secret and value else setting_text(row, value)
             for row, value in shown}
    if "json" in options:
        say_json({key: {"value": text or None, "origin": loaded.origins[key]}
                  for key, text in texts.items()})
        return Exit.OK
    rows = [("SETTING", "VALUE", "FROM")]
    rows += [(row.path or row.flag, texts[row.key] or "-", loaded.origins[row.key])
             for row in SETTINGS]
    say("\n".join(table_lines(rows)))
    return Exit.OK


# -- status -------------------------------------------------------------

def gpu_line(gpu: Dict[str, Any]) -> str:
    """A GPU's record in a line: what is unknown is left out.

    >>> gpu_line({"name": "NVIDIA L4", "memory_total_bytes": 24 << 30, "memory_used_bytes": 3 << 29,
    ...           "utilization_pct": 7.0, "power_w": 31.2, "offered": True, "free": False})
    'NVIDIA L4, 7 %, 1.5 of 24.0 GiB, 31 W, in use'
    """
    total, used = gpu.get("memory_total_bytes"), gpu.get("memory_used_bytes")
    parts = [gpu["name"] or "unknown model"]
    for name, unit in (("utilization_pct", "%"), ("temperature_c", "°C"), ("power_w", "W")):
        if gpu.get(name) is not None:
            parts.append(f"{gpu[name]:.0f} {unit}")
    if total is not None:
        in_use = "?" if used is None else f"{used / 2**30:.1f}"
        parts.insert(2, f"{in_use} of {total / 2**30:.1f} GiB")
    words = (("stale", "stale"), ("problem", "sick"), ("asleep", "asleep"), ("free", "free"),
             ("offered", "in use"))
    return ", ".join(parts + [next((word for name, word in words if gpu.get(name)), "not offered")])


def energy_line(energy: Dict[str, Any]) -> str:
    """What was used since the state folder was made, each figure with its basis; "" for nothing.

    >>> energy_line({"total": {"gpu_measured_wh": 1250.0, "gpu_estimated_wh": 0.0,
    ...     "co2e_g": 98.76, "co2e_basis": "estimated"}, "cpu_w": 9.6,
    ...     "cpu_basis": "estimated", "since": "T"})
    'GPUs 1250 Wh measured, 98.8 g CO2e estimated, since T; now CPUs 10 W estimated'
    """
    total = energy.get("total") or {}
    parts = [f"{label} {total[f'{part}_{basis}_wh']:.4g} Wh {basis}"
             for part, label in (("gpu", "GPUs"), ("cpu", "CPUs"))
             for basis in ("measured", "estimated") if total.get(f"{part}_{basis}_wh")]
    if total.get("co2e_g") is not None:
        parts.append(f"{total['co2e_g']:.3g} g CO2e {total['co2e_basis']}".rstrip())
    now = [f"{label} {energy[part + '_w']:.0f} W {energy[part + '_basis']}"
           for part, label in (("gpu", "GPUs"), ("cpu", "CPUs"))
           if energy.get(part + "_w") is not None]
    return (", ".join(parts) + f", since {energy['since']}" if parts else "") + (
        f"; now {', '.join(now)}" if parts and now else "")


def pod_row(pod: Dict[str, Any]) -> Tuple[str, str]:
    words = [pod["status"].lower(), pod["reason"], pod["function"]]
    if pod["exit_code"] is not None:
        words.append(f"exit code {pod['exit_code']}")
    if pod["duration_seconds"] is not None:
        words.append(f"{pod['duration_seconds']:.0f} s")
    return "worker pod", f"{pod['name']} {', '.join(filter(None, words))}"


def pod_rows(pods: Dict[str, Any]) -> List[Tuple[str, str]]:
    """Nothing where there is no k3s; else the newest ten."""
    if not pods or pods["state"] == "off":
        return []
    counts = collections.Counter(pod["status"].lower() for pod in pods["pods"])
    seen = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return [("worker pods", "; ".join(filter(None, (
        pods["state"], pods["server"], seen or "none", pods["message"]))))
            ] + [pod_row(pod) for pod in pods["pods"][:10]]


def status_lines(status: Dict[str, Any]) -> List[str]:
    def shown(value: Any, unit: str) -> str:
        return "unknown" if value is None else f"{value}{unit}"
    metrics = status.get("metrics") or {}
    free_bytes = metrics.get("total_disk_free_bytes")
    ago = status.get("last_keepalive_seconds_ago")
    rows = [
        ("state", f"{status['state']} for {status['state_seconds']:.0f} s"),
        ("machine", f"{status['machine_id']}, pool {status['pool']}, provider "
                    f"{status['provider']}, hostname {status['hostname']}"),
        ("gateway", status["gateway"]),
        ("keepalives", f"{status['keepalives']}, last "
                       + ("never" if ago is None else f"{ago:.0f} s ago")
                       + f"; {status['registrations']} registrations, "
                         f"{status['failures']} failures"),
        ("host", f"cpu {shown(status['cpu_percent'], ' %')}, memory "
                 f"{shown(status['memory_percent'], ' %')}, disk free "
                 + ("unknown" if free_bytes is None else f"{free_bytes / 2**30:.1f} GiB")
                 + f", GPUs {shown(status['gpu_count'], '')}, free "
                   f"{shown(metrics.get('free_gpu_count'), '')}"),
        ("agent", f"b9agent {status['version']}, pid {status['pid']}, up "
                  f"{status['uptime_seconds']:.0f} s"),
    ]
    tunnel, inference = status.get("tunnel"), status.get("inference") or {}
    tailnet = status.get("tailnet") or {}
    if tailnet.get("state", "none") != "none":
        rows.insert(3, ("tailnet", ", ".join(filter(None, (
            tailnet["state"], tailnet["address"], tailnet["name"], tailnet["message"])))))
    if tunnel:
        rows.insert(3, ("tunnel", ", ".join(filter(None, (
            f"{tunnel['state']}, {tunnel['server']}", tunnel["message"])))))
    k3s = status.get("k3s") or {}
    rows += [("k3s", k3s["message"] or f"token ends {k3s['token_expires']}")] if k3s else []
    if inference.get("engine"):
        rows.append(("inference", ", ".join(filter(None, (
            f"{inference['engine']} {inference['status']}", inference.get("endpoint"),
            "models " + (" ".join(inference["models"]) or "none yet"),
            inference["message"].partition("\n")[0])))))
    rows += pod_rows(status.get("pods") or {})
    if status.get("message"):
        rows.insert(1, ("message", status["message"]))
    rows += [(f"{gpu['vendor']} {gpu['index']}", gpu_line(gpu)) for gpu in status.get("gpus") or ()]
    energy = energy_line(status.get("energy") or {})
    rows += [("energy", energy)] if energy else []
    rows += [("problem", problem) for problem in status.get("gpu_problems") or ()]
    return table_lines(rows)


def command_status(loaded: Loaded, options: Dict[str, str]) -> int:
    """The running agent; with --wait, once it is ready."""
    limit_s = 0.0
    if "wait" in options:
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", options["wait"]):
            raise UsageError(f"--wait: `{printable(options['wait'])}` cannot be used, expected "
                             "seconds")
        limit_s = float(options["wait"])
    until_s, wake = now_s() + limit_s, Wake()
    while True:
        try:
            status, problem = read_agent_status(loaded.settings.state_dir), None
        except GatewayUnreachable as error:
            status, problem = {}, error
        done = status.get("state") in ("ready", "refused") or now_s() >= until_s
        if done and problem is not None:
            raise problem
        if done:
            break
        wake.wait(0.2)
    if "json" in options:
        say_json(status)
    else:
        say("\n".join(status_lines(status)))
    return Exit.UNREACHABLE if limit_s and status["state"] != "ready" else Exit.OK


def command_metrics(loaded: Loaded, _options: Dict[str, str]) -> int:
    """The running agent's metrics; where none runs, one look at the machine, and exit code 5.

    In bytes: the format is UTF-8, whatever the locale's encoding is.
    """
    settings = loaded.settings
    if agent_holds(settings.state_dir):
        sys.stdout.buffer.write(read_agent_metrics(settings.state_dir))
        return Exit.OK
    agent = Agent(loaded._replace(settings=settings._replace(token=settings.token or "-")),
                  make_log(settings), keep=False)
    agent.keepalive_payload()  # looks at the machine; nobody sends it
    view = agent.metrics_view()
    view = view._replace(snapshot=Snapshot(State.STOPPED), identity=None, process=None,
                         machine=view.machine._replace(energy=None))  # nobody counts it
    sys.stdout.buffer.write(render_metrics(view).encode("utf-8"))
    return end_with(f"no agent is running on {settings.state_dir}: this is one look at the machine",
                    Exit.UNREACHABLE)


# -- doctor -------------------------------------------------------------

def report_findings(findings: Sequence[Finding], as_json: bool, *verdicts: str) -> int:
    if as_json:
        levels = [finding.level for finding in findings]
        say_json({"version": VERSION, "exit_code": doctor_exit(findings),
                  "overall": next((level for level in ("fail", "warn") if level in levels), "ok"),
                  "checks": [{"name": finding.name, "level": finding.level, "seen": finding.seen,
                              "mend": finding.mend} for finding in findings]})
    else:
        say("\n".join(doctor_lines(findings, *verdicts)))
    return doctor_exit(findings)


def command_doctor(loaded: Loaded, options: Dict[str, str]) -> int:
    """What keeps this machine from `ready`, and what mends it."""
    return report_findings(run_checks(CHECKS, loaded, DOCTOR_LIMIT_S), "json" in options)


# -- top --------------------------------------------------------------------

def agent_elsewhere(text: str, token_file: Optional[str]) -> Tuple[Endpoint, Dict[str, str]]:
    """An agent on another machine, by its address: it takes no name in a Host header.

    Raises: UsageError, GatewayUnreachable.
    """
    host, port = split_gateway(text, "--host")
    token: Optional[str] = os.environ.get("B9AGENT_CONTROL_TOKEN", "")
    if token_file:
        token = read_text(token_file, 4096)
        if token:  # a folder has others' rights too, and must keep them
            refuse_if_shared(token_file, "a control token")
    if not re.fullmatch("[0-9a-f]{64}", (token or "").strip()):
        raise UsageError(
            f"cannot read {token_file}" if token is None else
            f"{token_file or 'B9AGENT_CONTROL_TOKEN'} is no control token, which has 64 "
            "hexadecimal digits" if token or token_file else
            f"the agent at {host} wants its control token",
            f"It lies there in the state folder (~/.b9agent, of a service {SYSTEM_STATE}) as "
            "control.token: copy it here, then --control-token-file PATH")
    token = token.strip()
    REDACTOR.add(token)
    try:
        found = socket.getaddrinfo(host, int(port or 9999), type=socket.SOCK_STREAM)[0][4]
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise GatewayUnreachable(f"--host: cannot look up {host}: {said}") from error
    return (Endpoint("http", found[0], found[1]),
            {"Authorization": f"Bearer {token}", "Content-Type": "application/json"})


def command_top(loaded: Loaded, options: Dict[str, str]) -> int:
    """The dashboard of an agent that runs; it may end and come back meanwhile."""
    token_file = option_value(options, "control-token-file", parse_path)
    if token_file and "host" not in options:
        raise UsageError("--control-token-file is of no use without --host", "The agent of "
                         f"{loaded.settings.state_dir} is asked with the token that lies there")
    source = AgentThere(agent_elsewhere(options["host"], token_file)
                        if "host" in options else loaded.settings.state_dir)
    status = source.status()
    if "once" in options:
        import shutil
        lines = tuple(_json_object(line) for _, line in zip(range(100),
                                                            source.newest("lines=100")))
        look = read_look()
        say("\n".join(render_frame(View(status, lines, {}), *shutil.get_terminal_size(),
                                   look._replace(color=look.color and sys.stdout.isatty()))))
        return Exit.OK
    if not terminal_fits():
        raise UsageError("a dashboard needs a terminal", "--once prints one frame; for programs "
                         "there is `status --json`")
    wake, ended = Wake(), []

    def stop() -> None:
        ended.append(True)
        shown.end()
        wake.set()
    shown = Dashboard(source, stop, None if "host" in options else doctor_of(loaded))
    on_stop_signals(stop, wake)
    threading.Thread(target=source.follow, name="dashboard-log", daemon=True).start()
    with shown:
        while not ended:
            wake.wait(3600.0)
    return Exit.OK


# -- gateway, machine, demo ---------------------------------------------

DB_OPTION = Option("--db", "PATH", "its database; default gateway.db in the state folder")
GATEWAY_OPTIONS = (
    Option("--host", "HOST", "address to listen on; default 127.0.0.1"),
    Option("--port", "PORT", "port to listen on; default 1994, 0 takes a free one"),
    DB_OPTION,
)
MACHINE_OPTIONS = (DB_OPTION, Option("--pool", "POOL", "the worker pool"),
                   Option("--json", "", "for programs"))


def open_store(loaded: Loaded, options: Dict[str, str], must_exist: bool = False) -> MachineStore:
    path = options.get("db") or os.path.join(loaded.settings.state_dir, "gateway.db")
    return MachineStore(os.path.abspath(os.path.expanduser(path)), must_exist=must_exist)


def command_gateway(loaded: Loaded, options: Dict[str, str]) -> int:
    """The embedded gateway, until a signal ends it."""
    try:
        host = parse_host(options.get("host", "127.0.0.1"))
        port = parse_listen_port(options.get("port", "1994"))
    except ValueError as error:
        raise UsageError(f"--host or --port cannot be used, expected {error}") from error
    log, wake = make_log(loaded.settings), Wake()
    store = open_store(loaded, options)
    server = start_gateway(host, port, GatewayApi(log, store))
    on_stop_signals(lambda: None, wake)
    log("info", "listening", api="gateway", url=server.url)
    if host not in ("localhost", "::1") and not host.startswith("127."):
        log("warning", "plain_http", what="tokens travel unencrypted to this address",
            do="Let machines reach it through a tailnet or an SSH tunnel")
    while not TOLD_TO_STOP:
        wake.wait(3600.0)
    server.stop()
    store.close()
    log("info", "stopped", api="gateway")
    return Exit.OK


def command_machine_create(loaded: Loaded, options: Dict[str, str]) -> int:
    settings = loaded.settings
    pool = options.get("pool") or settings.pool_name
    try:
        parse_text(pool)
    except ValueError as error:
        raise UsageError(f"--pool cannot be used, expected {error}") from error
    store = open_store(loaded, options)
    machine_id, token = store.create_machine(pool)
    store.close()
    if "json" in options:
        say_json({"machine_id": machine_id, "token": token, "pool": pool,
                  "pending_ttl_seconds": PENDING_TTL_S})
        return Exit.OK
    import shlex
    sys.stdout.write(  # not say(): this once the token is shown
        f"machine id  {machine_id}\npool        {pool}\ntoken       {token}\n"
        "The token is shown once; only its SHA-256 is kept. Within the hour, on the machine:\n\n"
        f"  BETA9_TOKEN={token} python3 b9agent.py --machine-id {machine_id} "
        f"--pool-name {shlex.quote(pool)} "
        f"--gateway-host {settings.gateway_host} --gateway-port {settings.gateway_port}\n")
    return Exit.OK


def command_machine_list(loaded: Loaded, options: Dict[str, str]) -> int:
    store = open_store(loaded, options, must_exist=True)
    machines = store.machines(options.get("pool", ""))
    store.close()
    if "json" in options:
        say_json([machine_record(machine) for machine in machines])
        return Exit.OK
    rows = [("MACHINE", "POOL", "STATE", "TTL", "HOSTNAME", "CPU", "MEMORY", "GPUS", "FREE",
             "CPU %", "MEM %", "AGENT")]
    for machine in machines:
        metric = lambda name: str(machine.metrics.get(name, "-"))
        rows.append((machine.machine_id, machine.pool_name, machine.state, f"{machine.ttl_s} s",
                     machine.hostname or "-", machine.cpu or "-", machine.memory or "-",
                     machine.gpu_count or "-", metric("free_gpu_count"),
                     metric("cpu_utilization_pct"), metric("memory_utilization_pct"),
                     machine.agent_version or "-"))
    say("\n".join(table_lines(rows)) if machines else "no machines yet: b9agent.py machine create")
    return Exit.OK


DEMO_INTERVAL_S = 1.0


def demo_detail(state: str, metrics: Dict[str, Any], keepalives: int) -> str:
    if state == "pending":
        return "created on the gateway, its token issued"
    if state == "registered":
        return "the agent has registered it"
    figures = [f"keepalive {keepalives}"]
    for name, label, unit in (("cpu_utilization_pct", "cpu", " %"),
                              ("memory_utilization_pct", "memory", " %"),
                              ("free_gpu_count", "free GPUs", "")):
        figures.append(f"{label} {metrics[name]}{unit}")
    return ", ".join(figures)


def demo_agent(loaded: Loaded, log: Log, folder: str, server: ApiServer, machine_id: str,
               token: str) -> Agent:
    """Nothing of the user's settings: the demo must not reach a gateway of theirs."""
    defaults = load_settings({"config": os.devnull, "state_dir": folder}, {}).settings
    settings = defaults._replace(
        token=token, machine_id=machine_id, pool_name="demo", gateway_host="127.0.0.1",
        gateway_port=server.port, control_port=0, keepalive_interval=DEMO_INTERVAL_S,
        tailnet_socket="none")
    return Agent(loaded._replace(settings=settings), log)


def command_demo(loaded: Loaded, options: Dict[str, str]) -> int:
    """An embedded gateway and an agent on free loopback ports, in a folder that goes at the end."""
    import tempfile
    once, seen, begun_s = "once" in options, [], now_s()
    agent: Any = None

    def show(machine_id: str, state: str, metrics: Dict[str, Any]) -> None:
        seen.append(state)
        try:
            say(f"{now_s() - begun_s:6.2f} s  {state:<11}"
                + demo_detail(state, metrics, seen.count("ready")))
        except BrokenPipeError:
            agent.stop()  # nobody looks any more (`demo | head`)
        if once and seen.count("ready") == 2:
            agent.stop()
    with tempfile.TemporaryDirectory(prefix="b9agent-demo-") as folder:
        say(f"b9agent {VERSION} demo: an embedded gateway and an agent, on loopback only")
        log = Log(loaded.settings.log_format, "debug" if loaded.settings.debug else "warning")
        store = MachineStore(os.path.join(folder, "gateway.db"))
        server = start_gateway("127.0.0.1", 0, GatewayApi(log, store, show))
        machine_id, token = store.create_machine("demo")
        REDACTOR.add(token)
        agent = demo_agent(loaded, log, folder, server, machine_id, token)
        on_stop_signals(agent.stop, agent.wake_main)
        say(f"gateway {server.url}, machine {machine_id}, pool demo, Ctrl-C ends it")
        show(machine_id, "pending", {})
        late = threading.Timer(20.0, agent.stop)
        late.daemon = True
        if once:
            late.start()
        agent.run()
        late.cancel()
        server.stop()
        store.close()
    if once and seen.count("ready") < 2:
        raise GatewayUnreachable("the demo's machine was not ready within 20 s",
                                 "Look at what it does with: b9agent.py demo --debug")
    say("ended: agent and gateway are stopped, and nothing is left behind")
    return Exit.OK


# -- inference -----------------------------------------------------------

class ProgressLine:
    """One line that is written over on a terminal; elsewhere a line where the step changes, and
    one every ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._told, self._told_s, self._written = "", 0.0, False

    def show(self, step: str, line: str) -> None:
        line = printable(line)
        if not line:
            return
        if self._terminal:
            import shutil
            columns = shutil.get_terminal_size().columns - 1
            sys.stdout.write("\r\x1b[K" + REDACTOR.scrub(line)[:columns])
            sys.stdout.flush()
            self._written = True
        elif step != self._told or now_s() - self._told_s > 10.0:
            say(line)
        else:
            return
        self._told, self._told_s = step, now_s()

    def end(self) -> None:
        if self._written:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()
            self._written = False


@contextlib.contextmanager
def goes_on(what: str, how_to_end: str) -> Iterator[ProgressLine]:
    """A line for the progress of a work in the agent, which goes on when nobody looks any more."""
    line = ProgressLine()
    try:
        yield line
    except KeyboardInterrupt:
        line.end()
        end_with(f"{what} goes on in the agent; to end it: {how_to_end}", Exit.OK)
        raise
    finally:
        line.end()


def follow_transfer(state_dir: str, path: str, body: Dict[str, Any], as_json: bool) -> int:
    """A pull or an import to its end, with its progress.  Raises: AgentError."""
    import shlex
    last: Dict[str, Any] = {}
    what = str(body.get("model") or body.get("target") or body.get("name")
               or model_name(body["path"]))
    with goes_on(f"the work on {what}", f"b9agent.py pull {shlex.quote(what)} --cancel") as line:
        for raw in agent_lines(state_dir, path, dict(body, stream=True)):
            last = _json_object(raw)
            if as_json:
                sys.stdout.write(json.dumps(last) + "\n")
                sys.stdout.flush()
            elif last.get("status") == "running":
                line.show(last.get("step", ""), progress_line(last))
    end = transfer_end(last)
    if not as_json:
        say(end)
    return Exit.OK


def inference_lines(status: Dict[str, Any]) -> List[str]:
    """What GET /inference/status says, for people."""
    said = (status.get("message") or "").partition("\n")[0]
    rows = [("inference", status["status"] + (f": {said}" if said else ""))]
    if status.get("engine"):
        rows.append(("engine", " ".join(filter(None, (
            status["engine"], status.get("version"), status.get("pid") and f"pid {status['pid']}",
            "adopted" if status.get("adopted") else "")))))
        rows.append(("endpoint", status.get("endpoint") or "-"))
        rows.append(("models", ", ".join(status.get("models") or ()) or "none yet"))
    return table_lines(rows)


def context_of(options: Dict[str, str]) -> Dict[str, Any]:
    """The field that --context becomes.  Raises: UsageError."""
    text = options.get("context")
    if text is not None and not re.fullmatch("[0-9]{1,8}", text):
        raise UsageError(f"--context: `{printable(text)}` cannot be used, expected a number of "
                         "tokens")
    return {} if text is None else {"context_tokens": int(text)}


def start_said(state_dir: str) -> str:
    """How far a start is, in a line; the answer to the start itself tells of its end."""
    try:
        status = call_agent(state_dir, "/inference/status", None, 5.0)
    except AgentError:
        return "the agent does not say how far it is"
    return str(status.get("message") or status.get("status") or "").partition("\n")[0]


def command_start(loaded: Loaded, options: Dict[str, str]) -> int:
    """Start the engine; shows what it does until a token came."""
    state_dir, outcome = loaded.settings.state_dir, []
    body: Dict[str, Any] = {key: options[key] for key in ("engine", "model") if key in options}
    if body.get("model") and os.path.exists(os.path.expanduser(body["model"])):
        body["model"] = os.path.abspath(os.path.expanduser(body["model"]))
    body.update(context_of(options))
    if "force" in options:
        body["force"] = True

    def post() -> None:
        try:
            outcome.append(call_agent(state_dir, "/inference/start", body, 7200.0))
        except AgentError as error:
            outcome.append(error)
    thread, wake, begun_s = threading.Thread(target=post, daemon=True), Wake(), now_s()
    thread.start()
    with goes_on("the start", "b9agent.py stop") as line:
        while thread.is_alive():
            wake.wait(0.3)
            if now_s() - begun_s > 1.0 and "json" not in options and thread.is_alive():
                said = start_said(state_dir)
                line.show(said, f"{said} ({now_s() - begun_s:.0f} s)")
    if isinstance(outcome[0], AgentError):
        raise outcome[0]
    if "json" in options:
        say_json(outcome[0])
    else:
        say("\n".join(inference_lines(outcome[0])))
    return Exit.OK


def command_stop(loaded: Loaded, options: Dict[str, str]) -> int:
    status = call_agent(loaded.settings.state_dir, "/inference/stop", {}, 120.0)
    if "json" in options:
        say_json(status)
    else:
        say(status.get("message") or "stopped: its processes are gone and its port is closed")
    return Exit.OK


def command_pull(loaded: Loaded, options: Dict[str, str]) -> int:
    """To its end; with --cancel, to an end."""
    if "cancel" in options:
        answer = call_agent(loaded.settings.state_dir, "/inference/cancel",
                            {"model": options["operand"]})
        if "json" in options:
            say_json(answer)
        else:
            say(f"{answer['model']} is cancelled: {answer['message']}")
        return Exit.OK
    return follow_transfer(loaded.settings.state_dir, "/inference/pull",
                           {"model": options["operand"]}, "json" in options)


def model_rows(answer: Dict[str, Any]) -> List[Sequence[str]]:
    rows: List[Sequence[str]] = [("NAME", "ENGINE", "SIZE", "LOADED", "DIGEST", "QUANTIZATION",
                                  "LICENSE", "LAST USED")]
    for model in answer["models"]:
        rows.append((model["name"], model.get("engine") or "-", show_bytes(model.get("size_bytes")),
                     {True: "yes", False: "no"}.get(model.get("loaded"), "-"),
                     (model.get("digest") or "-")[:12], model.get("quantization") or "-",
                     (model.get("license") or "-")[:24],
                     model.get("last_used_at") or "-"))
    return rows


def command_models(loaded: Loaded, options: Dict[str, str]) -> int:
    answer = call_agent(loaded.settings.state_dir, "/models", None, 30.0)
    if "json" in options:
        say_json(answer)
        return Exit.OK
    say("\n".join(table_lines(model_rows(answer))) if answer["models"] else
        "no models yet: b9agent.py pull NAME")
    if answer.get("message"):
        say(answer["message"])
    return Exit.OK


def model_command(verb: str, done: str) -> Callable[[Loaded, Dict[str, str]], int]:
    """`models VERB NAME`: ask, and say what was done."""
    def run(loaded: Loaded, options: Dict[str, str]) -> int:
        name = options["operand"]
        if verb == "delete" and "yes" not in options:
            if not sys.stdin.isatty():
                raise UsageError(f"nothing was deleted: there is nobody to ask about {name}",
                                 "Say --yes")
            if ask(f"Delete {printable(name)} from this machine? yes or no", "no") != "yes":
                say("nothing was deleted")
                return Exit.OK
        answer = call_agent(loaded.settings.state_dir, f"/models/{verb}", {"model": name}, 7200.0)
        if "json" in options:
            say_json(answer)
        else:
            say(f"{name} {done}")
        return Exit.OK
    return run


def command_models_import(loaded: Loaded, options: Dict[str, str]) -> int:
    body = {"path": os.path.abspath(os.path.expanduser(options["operand"]))}
    body.update((key, options[key]) for key in ("name", "quantize") if key in options)
    return follow_transfer(loaded.settings.state_dir, "/models/import", body, "json" in options)


def command_models_convert(loaded: Loaded, options: Dict[str, str]) -> int:
    if "to" not in options:
        raise UsageError("models convert needs --to FOLDER", "Name the folder that is to be made")
    body: Dict[str, Any] = {"path": os.path.abspath(os.path.expanduser(options["operand"])),
                            "target": os.path.abspath(os.path.expanduser(options["to"]))}
    return follow_transfer(loaded.settings.state_dir, "/models/convert",
                           dict(body, plain="plain" in options), "json" in options)


def command_models_fit(loaded: Loaded, options: Dict[str, str]) -> int:
    """Whether it fits; exit code 1 where it does not."""
    name, body = options["operand"], context_of(options)
    if os.path.exists(os.path.expanduser(name)):
        name = os.path.abspath(os.path.expanduser(name))
    answer = call_agent(loaded.settings.state_dir, "/models/fit", dict(body, model=name), 60.0)
    if "json" in options:
        say_json(answer)
    else:
        say(answer["message"])
    return Exit.FAILED if answer["fits"] is False else Exit.OK


def command_models_verify(loaded: Loaded, options: Dict[str, str]) -> int:
    """Exit code 1 where a file is not what it was."""
    body = {"model": options["operand"]} if options.get("operand") else {}
    answer = call_agent(loaded.settings.state_dir, "/models/verify", body, 7200.0)
    if "json" in options:
        say_json(answer)
    else:
        for row in answer["models"]:
            say(f"{row['name']}: " + ("as it was" if row["ok"] else "not as it was"))
            for fault in row["faults"]:
                say(f"  {fault['problem']}: {fault['path']}")
    return Exit.OK if all(row["ok"] for row in answer["models"]) else Exit.FAILED


def command_logs(loaded: Loaded, options: Dict[str, str]) -> int:
    """The agent's newest lines; -f goes on until Ctrl-C."""
    count = options.get("n", "100")
    if not re.fullmatch("[0-9]{1,4}", count):
        raise UsageError(f"-n: `{printable(count)}` cannot be used, expected a number of lines")
    path = f"/logs?lines={count}" + ("&follow=true" if "f" in options else "")
    for line in agent_lines(loaded.settings.state_dir, path):
        say(line.decode("utf-8", "replace"))
    return Exit.OK


# -- smoke ------------------------------------------------------------------

class Smoke:
    """The predecessor's check.  Each step returns what it saw; an AgentError fails it."""

    HELLO = ({"role": "user", "content": "Say hello."},)

    def __init__(self, state_dir: str, host: str, model: str) -> None:
        self._state_dir, self._host, self._model = state_dir, host, model
        self._client = InferenceClient()
        self.steps: Tuple[Tuple[str, Callable[[], str]], ...] = (
            ("Sending start-inference command to agent", self._start),
            ("Testing health endpoint", self._health), ("Checking model availability", self._have),
            ("Testing chat", self._chat), ("Testing Python client, streamed", self._stream),
            ("Testing latency (3 requests)", self._latency),
            ("Stopping inference server", self._stop))

    def _start(self) -> str:
        status = call_agent(self._state_dir, "/inference/start", {}, 7200.0)
        where = re.match(r"http://(.+):([0-9]+)$", status["endpoint"])
        self._client.configure(self._host or where.group(1).strip("[]"), int(where.group(2)),
                               raise_errors=True)
        return f"{status['engine']} at {status['endpoint']}"

    def _health(self) -> str:
        self._client.health()
        return ""

    def _have(self) -> str:
        names = self._client.list_models()
        self._model = self._model or (names[0] if names else "")
        if not self._model:
            raise ModelMissing("there is no model here", "b9agent.py pull llama3.2, or --model")
        if model_key(self._model) not in map(model_key, names):
            call_agent(self._state_dir, "/inference/pull", {"model": self._model}, 7200.0)
        return self._model

    def _tokens_of(self, pieces: Sequence[InferenceResult]) -> Any:
        """A token may be no letter: what the engine counts is believed, too."""
        counts = [piece.usage.get("completion_tokens") for piece in pieces]
        count = next(filter(None, counts), None)
        if not count and not any(piece.content for piece in pieces):
            raise InferenceError(f"{self._model} said nothing", "The engine's log may say why: "
                                 "b9agent.py status --json names it")
        return count or "?"

    def _chat(self) -> str:
        reply = self._client.chat(self._model, self.HELLO, max_tokens=16)
        return f"{self._tokens_of([reply])} tokens"

    def _stream(self) -> str:
        pieces = list(self._client.chat(self._model, self.HELLO, stream=True, max_tokens=16))
        return f"{self._tokens_of(pieces)} tokens in {len(pieces)} pieces"

    def _latency(self) -> str:
        times = []
        for _ in range(3):
            begun_s = now_s()
            self._client.chat(self._model, self.HELLO, max_tokens=1)
            times.append(now_s() - begun_s)
        return f"{sorted(times)[1] * 1000:.0f} ms"

    def _stop(self) -> str:
        return call_agent(self._state_dir, "/inference/stop", {}, 120.0).get("message") or ""


def command_smoke(loaded: Loaded, options: Dict[str, str]) -> int:
    """[0/6] to [6/6], each with its time; ends at the first that fails."""
    steps = Smoke(loaded.settings.state_dir,
                  options.get("host") or os.environ.get("BETA9_INFERENCE_HOST", ""),
                  options.get("model") or os.environ.get("TEST_MODEL", "")).steps
    for number, (what, how) in enumerate(steps):
        sys.stdout.write(f"[{number}/{len(steps) - 1}] {(what + '...').ljust(46)}")
        sys.stdout.flush()
        begun_s = now_s()
        try:
            saw = how()
        except AgentError as error:
            say(f"✗ {now_s() - begun_s:.1f} s")
            return end_with(f"error: {error}", Exit.FAILED)
        say(f"✓ {now_s() - begun_s:.1f} s" + (f"  {printable(saw)}" if saw else ""))
    return Exit.OK


# -- k3s -----------------------------------------------------------------

def command_k3s_check(loaded: Loaded, options: Dict[str, str]) -> int:
    """Whether k3s has what the gateway needs of it."""
    import fcntl  # agent_status() needs it, and as another user may not reach root's own Python
    loaded, _ = for_the_agent(loaded), fcntl
    running = as_user(folder_owner(loaded.settings.state_dir), agent_status, loaded)
    findings = run_checks(K3sChecks(loaded.settings, options, running).rows(), loaded,
                          DOCTOR_LIMIT_S)
    return report_findings(findings, "json" in options, "the gateway can start no workers here",
                           "nothing keeps the gateway from starting workers here")


def command_k3s_rbac(loaded: Loaded, options: Dict[str, str]) -> int:
    """Print the manifest, or apply it."""
    if "apply" in options:
        k3s_apply(for_the_agent(loaded).settings, options, say)
    else:
        say(render_manifest(*kube_names(for_the_agent(loaded).settings, options)).rstrip("\n"))
    return Exit.OK


def command_k3s_token(loaded: Loaded, options: Dict[str, str]) -> int:
    """A token of the gateway's account: to stdout and nowhere else, or into a file."""
    settings = for_the_agent(loaded).settings
    namespace, account = kube_names(settings, options)
    hours = option_value(options, "hours", parse_token_hours) or settings.k3s_token_hours
    path = option_value(options, "write", parse_path)
    config = read_kubeconfig(settings) or admin_kubeconfig(settings)
    token, ends_s = mint_token(KubeClient(config), namespace, account, hours * 3600)
    got_hours = (ends_s - time.time()) / 3600
    ends = f"it ends {utc_stamp(ends_s)}" + (
        f": k3s gave {got_hours:.1f} of {hours} hours" if got_hours < hours * 0.99 else "")
    if path:
        write_atomic(path, token + "\n")
        say(f"wrote {path} (0600); {ends}")
        return Exit.OK
    if sys.stdout.isatty():
        end_with("warning: a terminal keeps what it shows; --write PATH keeps it private", Exit.OK)
    sys.stdout.write(token + "\n")  # not say(), which would mask it
    sys.stdout.flush()
    return end_with(ends, Exit.OK)


def command_k3s_install(loaded: Loaded, options: Dict[str, str]) -> int:
    if sys.platform == "darwin":
        raise UsageError("k3s runs on Linux only", "Rancher Desktop brings one to macOS: "
                         "https://rancherdesktop.io; then: b9agent.py k3s rbac --apply")
    if os.geteuid() != 0 and "dry-run" not in options:
        raise PrivilegeError("k3s is root's to install", "Run this with sudo; --dry-run shows "
                             "every step without")

    def confirm(question: str) -> bool:
        if not sys.stdin.isatty():
            raise UsageError("nothing was changed: there is nobody to ask", "Say -y")
        return ask(f"{question} yes or no", "no") == "yes"
    tailnet = read_tailnet(loaded.settings.tailnet_socket)
    line, names = ProgressLine(), (loaded.settings.hostname or "", tailnet.address, tailnet.name)
    try:
        K3sInstall(Steps(say, options), options, names).run(confirm, lambda text: line.show(
            text.partition(" (")[0], text))
    finally:
        line.end()
    return Exit.OK


# -- the table and main --------------------------------------------------

def command_version(_loaded: Loaded, _options: Dict[str, str]) -> int:
    say(f"b9agent {VERSION}, Python {sys.version.split()[0]}, {sys.platform}")
    return Exit.OK


def service_command(run: Callable[..., int]) -> Callable[[Loaded, Dict[str, str]], int]:
    return lambda loaded, options: run(loaded, options, say)


_JSON = Option("--json", "", "for programs")
COMMANDS = (
    Command("run", command_run, (
        Option("--once", "", "register, send one keepalive, and exit"),
        Option("--dry-run", "", "print what would be sent, send nothing"),
        Option("--no-tui", "", "log lines on a terminal too, and no dashboard")), (),
        "register this machine and keep it alive; the default"),
    Command("init", command_init, INIT_OPTIONS, (), "write the config file"),
    Command("config", command_config, (
        _JSON, *(Option("--" + table[0], "", f"the README's table of {table[0]}")
                 for table in README_TABLES)), (),
        "show every setting and where it comes from"),
    Command("status", command_status, (
        _JSON, Option("--wait", "SECONDS", "until it is ready, at most so long")),
        ("state_dir",), "ask the running agent"),
    Command("top", command_top, (
        Option("--host", "HOST[:PORT]", "an agent elsewhere: in a tailnet or at the end of a "
               "tunnel, for it is asked in plain http; its control.token is wanted"),
        Option("--control-token-file", "PATH", "a copy of it, mode 0600; or B9AGENT_CONTROL_TOKEN"),
        Option("--once", "", "print one frame, and end")), ("state_dir",),
        "the dashboard of an agent that runs"),
    Command("start", command_start, (
        Option("--engine", "ENGINE", ", ".join(ENGINE_NAMES) + "; else it is chosen"),
        Option("--model", "MODEL", "a name, a GGUF file, or a folder of safetensors"),
        Option("--context", "TOKENS", "context of each request"),
        Option("--force", "", "also where it should not fit"), _JSON), ("state_dir",),
        "start an engine in the running agent, until it has given a token"),
    Command("stop", command_stop, (_JSON,), ("state_dir",),
            "end the engine, and see that all of it is gone"),
    Command("pull", command_pull, (
        _JSON, Option("--cancel", "", "end a pull or an import of it; what came is kept")),
        ("state_dir",), "bring a model into Ollama's store", "NAME"),
    Command("models", command_models, (_JSON,), ("state_dir",),
            "every model here: size, digest, loaded or not, where it came from"),
    Command("models load", model_command("load", "is in memory and gave a token"), (_JSON,),
            ("state_dir",), "load a model, to stay in memory", "NAME"),
    Command("models unload", model_command("unload", "is out of memory"), (_JSON,),
            ("state_dir",), "take a model out of memory", "NAME"),
    Command("models delete", model_command("delete", "is deleted"), (
        _JSON, Option("--yes", "", "ask nothing")), ("state_dir",),
        "delete a model from Ollama's store", "NAME"),
    Command("models import", command_models_import, (
        Option("--name", "NAME", "what it will be called; default: the file's name"),
        Option("--quantize", "TYPE", ", ".join(QUANTIZATIONS)), _JSON), ("state_dir",),
        "bring a GGUF file or a folder of safetensors into Ollama's store", "PATH"),
    Command("models convert", command_models_convert, (
        Option("--to", "FOLDER", "the folder that is made"),
        Option("--plain", "", "weights as they are, not in 4 bits"), _JSON), ("state_dir",),
        "make MLX weights of a folder of safetensors", "PATH"),
    Command("models fit", command_models_fit, (
        Option("--context", "TOKENS", "context of each request"), _JSON), ("state_dir",),
        "whether a model fits this machine; exit code 1 where it does not", "MODEL"),
    Command("models verify", command_models_verify, (_JSON,), ("state_dir",),
            "hash the files of one model, or of all, again", "[NAME]"),
    Command("logs", command_logs, (Option("-n", "LINES", "how many; default 100"),
                                   Option("-f", "", "go on as they come")), ("state_dir",),
            "the running agent's newest log lines"),
    Command("smoke", command_smoke, (
        Option("--host", "HOST", "where the engine is reached (BETA9_INFERENCE_HOST)"),
        Option("--model", "MODEL", "what is tried (TEST_MODEL)")), ("state_dir",),
        "start, generate, measure, stop: one check of everything"),
    Command("metrics", command_metrics, (), ("state_dir",),
            "the running agent's metrics, as Prometheus reads them"),
    Command("doctor", command_doctor, (_JSON,), (),
            "what keeps this machine from being ready, and what mends it; changes nothing"),
    Command("demo", command_demo, (
        Option("--once", "", "end by itself after two keepalives"),), ("debug",),
        "a gateway and an agent on this machine, to look at"),
    Command("gateway", command_gateway, GATEWAY_OPTIONS, ("state_dir", "log_format", "debug"),
            "an embedded gateway for a few machines"),
    Command("machine create", command_machine_create, MACHINE_OPTIONS,
            ("state_dir", "gateway_host", "gateway_port"),
            "make a machine and its token on the embedded gateway"),
    Command("machine list", command_machine_list, MACHINE_OPTIONS, ("state_dir",),
            "the embedded gateway's machines and their time to live"),
    Command("service install", service_command(service_install), SERVICE_OPTIONS, (),
            "install or upgrade it as a service, and wait until it is well"),
    Command("service uninstall", service_command(service_uninstall), SERVICE_UNINSTALL_OPTIONS,
            ("debug",), "stop and remove the service; configuration and state stay"),
    Command("service status", service_command(service_status), SERVICE_STATUS_OPTIONS, ("debug",),
            "the service, as its manager and the agent see it"),
    Command("k3s check", command_k3s_check, (_JSON, *K3S_ACCOUNT_OPTIONS), K3S_KEYS,
            "whether k3s has what the gateway needs, and no more; changes nothing"),
    Command("k3s rbac", command_k3s_rbac, (
        Option("--apply", "", "apply it, and make the agent's own kubeconfig; with sudo"),
        *K3S_ACCOUNT_OPTIONS), K3S_KEYS,
        "the accounts and rights that gateway and agent use, for `kubectl apply -f -`"),
    Command("k3s token", command_k3s_token, (
        Option("--hours", "HOURS", "its life, 1 to 168; default k3s.token_hours"),
        Option("--write", "PATH", "into this file, 0600, and not to the output"),
        *K3S_ACCOUNT_OPTIONS), K3S_KEYS, "make a token with which the gateway starts workers"),
    Command("k3s install", command_k3s_install, K3S_INSTALL_OPTIONS, ("hostname", "state_dir"),
            "install k3s by its vendor's installer, with or without a network"),
    Command("version", command_version, (), ("state_dir",), "print the version"),
)
COMMAND_BY_WORDS = {command.words: command for command in COMMANDS}


def wrapped_lines(rows: Sequence[Tuple[str, str]]) -> List[str]:
    """Two columns, the second wrapped: to the terminal, or to 100 where there is none."""
    import shutil
    import textwrap
    columns = max(80, min(100, shutil.get_terminal_size((100, 24)).columns))
    indent = max(len(left) for left, _ in rows) + 4
    return [line for left, right in rows for line in textwrap.wrap(
        right, columns, initial_indent=f"  {left}".ljust(indent), subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False)]


def help_text(words: Sequence[str]) -> str:
    """--help: of one command, of those that begin with a word, or of all."""
    first = "".join(words[:1])
    command = COMMAND_BY_WORDS.get(" ".join(words[:2])) or COMMAND_BY_WORDS.get(first)
    listed = [row for row in COMMANDS if row.words.startswith(first + " ")]
    listed = listed if command is None or command.words == first else []
    if command:
        lines = [f"usage: b9agent.py {command.words} {command.operand}".rstrip() + " [FLAG …]", "",
                 command.help]
    elif listed:
        lines = [f"usage: b9agent.py {first} COMMAND [FLAG …]"]
    else:
        lines, listed = ["usage: b9agent.py [COMMAND] [FLAG …]"], list(COMMANDS)
    if listed:
        lines += ["", "commands:"] + wrapped_lines([(row.words, row.help) for row in listed])
    if command is None and len(listed) < len(COMMANDS):
        return "\n".join(lines)
    shown = command or COMMAND_BY_WORDS["run"]
    table = [(f"{option.flag} {option.metavar}".rstrip(), option.help) for option in shown.options]
    for row in SETTINGS:
        if not shown.settings or row.key in shown.settings:
            default = f" [{row.default}]" if row.default else ""
            table.append((f"{row.flag} {row.kind}".rstrip(),
                          f"{row.help}{default} ({row.variable})"))
    return "\n".join(lines + ["", "flags:"] + wrapped_lines(table))


def find_command(argv: Sequence[str]) -> Tuple[Command, Arguments]:
    """The command that is asked for, and what it is given."""
    every = {option.flag: option for command in COMMANDS for option in command.options}
    words = parse_arguments(argv, tuple(every.values())).words
    for count in (2, 1):
        command = COMMAND_BY_WORDS.get(" ".join(words[:count]))
        if command and len(words) >= count:
            break
    else:
        command = COMMAND_BY_WORDS["run"]
        count = 0
    extra = words[count:]
    if command.operand and len(extra) == 1 or command.operand.startswith("[") and not extra:
        arguments = parse_arguments(argv, command.options)
        return command, arguments._replace(options=dict(arguments.options, operand=(
            extra + ("",))[0]))
    if command.operand and not extra:
        raise UsageError(f"{command.words} needs a {command.operand}", "See `b9agent.py "
                         f"{command.words} --help`")
    if extra:
        typed = " ".join(words)
        longer = [name for name in COMMAND_BY_WORDS if name.startswith(words[0] + " ")]
        expected = ("one of: " + ", ".join(longer) if longer else
                    _nearest(typed, COMMAND_BY_WORDS, "--help"))
        raise UsageError(f"unknown command `{printable(typed)[:60]}`, expected {expected}")
    return command, parse_arguments(argv, command.options)


def run_command_line(argv: Sequence[str]) -> int:
    command, arguments = find_command(argv)
    patient = (command.run is command_run and not set(arguments.options) - {"no-tui"}
               and os.environ.get("B9AGENT_SUPERVISOR") in ("launchd", "openrc"))
    watched = [config_path(arguments.flags, dict(os.environ))] if patient else []
    while True:
        before = file_stamps(watched)
        try:
            if patient:
                token_file = read_config(watched[0]).get("token_file")
                watched = watched[:1] + ([token_file.text] if token_file else [])
                before = before[:1] + file_stamps(watched[1:])
            load = load_what_can_be if command.run is command_doctor else load_settings
            loaded = load(arguments.flags, dict(os.environ),
                          must_exist=command.run is not command_init)
            return command.run(loaded, arguments.options)
        except AgentError as error:
            if not patient or error.exit_code not in PERMANENT_EXITS:
                raise
            if not wait_for_change(watched, before, error):
                return Exit.OK


def exit_code_of(argv: Sequence[str]) -> int:
    """Every end of a run: a result, an error with a message, or a defect with a place."""
    try:
        if "-h" in argv or "--help" in argv or argv[:1] == ["help"]:
            say(help_text([word for word in argv if word[:1] != "-" and word != "help"]))
            return Exit.OK
        return int(run_command_line(["version"] if list(argv) == ["--version"] else argv))
    except AgentError as error:
        return end_with(f"error: {error}", error.exit_code)
    except BrokenPipeError:
        return Exit.OK  # `| head` has seen enough
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # a command that was cut short; `run` has handlers of its own
    except OSError as error:
        return end_with(f"error: {error.filename or 'input or output'}: {error.strerror}. Is the "
                        "disk full, or the folder gone?", Exit.USAGE)
    except Exception as error:
        return end_with(f"defect: {type(error).__name__}: {printable(str(error))} (at "
                        f"{defect_place(error)}, version {VERSION}). Please report this line",
                        Exit.DEFECT)


def settle_streams() -> None:
    """Leave no output unwritten: where nobody reads it any more, Python would end with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The exit code of one command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with it closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a C locale must not end a run
    try:
        return exit_code_of(argv)
    finally:
        end_programs()
        settle_streams()


if __name__ == "__main__":
    sys.exit(main())
