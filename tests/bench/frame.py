"""What the dashboard costs: to draw a frame, and to stay open; beside rich with the same content.

    tests/bench/run --only frame [--rounds 200] [--seconds 60] [--quick] [--alone]

A frame is drawn of the busy view of tests/views.py (three GPUs, three pods, an engine, a log), to the
text that a terminal would get.  Then `b9agent.py top` and a dashboard of rich (rich_top.py) look at the
same idle agent once a second, each on a pseudo-terminal of its own, which counts bytes.  Linux.
"""
import contextlib
import fcntl
import os
import pty
import signal
import struct
import sys
import termios
import threading
import time

from common import (HERE, PYTHON, Table, cpu_s, finish, in_turn, installed, memory_mib, options, scratch,
                    version_of)
from helpers import Program, environment, wait_until
from hostile_gateway import TOKEN, HostileGateway
from views import VIEWS

import b9agent

SIZES = ((80, 24), (200, 60))
COLUMNS = dict([("%dx%d" % size, "a frame of %d×%d, ms of CPU" % size) for size in SIZES],
               bytes="open on 80×24, idle: bytes a second", cpu="CPU a second, ms", mib="memory, MiB")
LOOK = b9agent.Look(utf8=True, color=True)


def frames(alone):
    """(name, column, draw) of each."""
    for columns, rows in SIZES:
        size, view = "%dx%d" % (columns, rows), VIEWS["busy"]
        yield "b9agent", size, lambda c=columns, r=rows: "\n".join(b9agent.render_frame(view, c, r, LOOK))
        if not alone:
            from rich.console import Console
            from rich_top import draw
            console = Console(width=columns, height=rows, force_terminal=True, color_system="standard")
            yield "rich", size, lambda console=console: draw(console, view)


class Screen:
    """A program on a terminal of 80×24, and how many bytes it has written there."""

    def __init__(self, command, env):
        self.pid, self._terminal = pty.fork()
        if not self.pid:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
            os.execve(command[0], command, env)
        self.written, self.last = 0, b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # it has ended
            while True:
                self.last = os.read(self._terminal, 65536)
                self.written += len(self.last)

    def end(self):
        os.kill(self.pid, signal.SIGTERM)
        os.waitpid(self.pid, 0)
        self._reader.join()
        os.close(self._terminal)


def watch(table, seconds, alone, folder, end):
    home = os.path.join(folder, "home")
    gateway, place = end.enter_context(HostileGateway()), installed(folder)
    agent = end.enter_context(Program(
        [PYTHON, "-I", place, "run", "--gateway-host", "127.0.0.1", "--gateway-port", str(gateway.port),
         "--control-port", "0"], environment(home, BETA9_TOKEN=TOKEN)))
    agent.wait_line(r"notice ready\b")
    commands = {"b9agent": [PYTHON, "-I", place, "top"],
                "rich": [sys.executable, os.path.join(HERE, "rich_top.py"), os.path.join(home, ".b9agent")]}
    screens = {}
    for name in list(commands)[:1] if alone else commands:
        screens[name] = Screen(commands[name], environment(home, TERM="xterm-256color"))
        end.callback(screens[name].end)
    wait_until(lambda: all(screen.written > 1000 for screen in screens.values()), "all are drawn")
    time.sleep(3)  # what belongs to the start
    before = {name: (screen.written, cpu_s(screen.pid)) for name, screen in screens.items()}
    time.sleep(seconds)
    for name, screen in screens.items():
        written, cpu = before[name]
        table.add(name, bytes=(screen.written - written) / seconds,
                  cpu=(cpu_s(screen.pid) - cpu) / seconds * 1e3, mib=memory_mib(screen.pid))


def main():
    asked = options(__doc__, rounds=(200, 30, "frames of each"), seconds=(60, 5, "open"))
    table = Table(COLUMNS, ["b9agent"] + ["rich"] * (not asked.alone))
    for (name, size, draw), counts in in_turn(asked.rounds, frames(asked.alone), warm=5):
        before = time.thread_time()
        draw()
        if counts:
            table.add(name, **{size: (time.thread_time() - before) * 1e3})
    with scratch() as folder, contextlib.ExitStack() as end:
        watch(table, asked.seconds, asked.alone, folder, end)
    claims = [] if asked.alone else [(
        all(table.median("b9agent", key) < table.median("rich", key) for key in COLUMNS),
        "less than rich in each column")]
    return finish(asked, "The dashboard", "a frame with three GPUs, three pods, an engine and a log; "
                  "then `top` on an idle agent, drawn once a second, beside a dashboard of rich that "
                  "shows the same.",
                  table, claims, () if asked.alone else version_of("rich"))


if __name__ == "__main__":
    sys.exit(main())
