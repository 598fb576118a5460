"""What the benches share: processes and what they cost, turns, one form of table, figures that are
kept, and the README's block made of them.  Standard library only."""
import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
AGENT = os.path.join(ROOT, "b9agent.py")
RESULTS = os.path.join(HERE, "results")
NAMES = ("start", "sample", "control", "door", "frame")  # the order in the README
# The interpreter that tests/bench/.venv was made of: what is measured runs on it.
PYTHON = getattr(sys, "_base_executable", sys.executable)
VENV_BIN = os.path.dirname(sys.executable)
sys.path[:0] = [os.path.dirname(HERE), ROOT]

from helpers import about_the_machine, print_table  # noqa: E402


# -- what is asked for --------------------------------------------------

def options(doc, **flags):
    """flags: {name: (value in a full run, value with --quick, what it is)}."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds; no claim is held against them")
    parser.add_argument("--alone", action="store_true", help="without peers; nothing is kept")
    for name, (full, quick, about) in flags.items():
        flag = "--" + name.replace("_", "-")
        if full is False:
            parser.add_argument(flag, action="store_true", help=about)
        else:
            parser.add_argument(flag, type=type(full), help="%s [%s; --quick: %s]" % (about, full, quick))
    found = parser.parse_args()
    for name, (full, quick, _) in flags.items():
        if getattr(found, name) is None:
            setattr(found, name, quick if found.quick else full)
    return found


def in_turn(rounds, contestants, warm=1):
    """(contestant, whether it counts) for each round after those that fill the caches: a busy minute
    of the machine falls on all alike, and who comes after whom is chance, the same in each run."""
    chance, order = random.Random(7), list(contestants)
    for turn in range(rounds + warm):
        chance.shuffle(order)
        for one in order:
            yield one, turn >= warm


# -- processes ----------------------------------------------------------

def cpu_s(*pids):
    """CPU time of processes with all their threads, those that ended too, to the nanosecond: the
    clock that the kernel keeps.  Source: clock_getcpuclockid(3)."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def memory_mib(pid, name="VmRSS"):
    with open("/proc/%d/status" % pid) as handle:
        return int(re.search(name + r":\s*(\d+) kB", handle.read()).group(1)) / 1024


def children_of(pid):
    with open("/proc/%d/task/%d/children" % (pid, pid)) as handle:
        return [int(word) for word in handle.read().split()]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def program_path(name):
    """Of PATH, of where root's programs are, or of what `run` has unpacked; None where it is not."""
    places = (os.environ.get("PATH", os.defpath), "/usr/sbin", VENV_BIN)
    return shutil.which(name, path=os.pathsep.join(places))


def installed(folder):
    """The agent as `service install` leaves it: a folder with a __main__.py, compiled."""
    place = os.path.join(folder, "installed")
    os.mkdir(place)
    subprocess.run([PYTHON, "-m", "py_compile", shutil.copy(AGENT, place)], check=True)
    with open(os.path.join(place, "__main__.py"), "w") as handle:
        handle.write("import sys, b9agent\nsys.exit(b9agent.main())\n")
    return place


@contextlib.contextmanager
def scratch():
    """A folder with a home in it, gone at the end; and the process has its cores again."""
    cores, folder = os.sched_getaffinity(0), tempfile.mkdtemp(prefix="b9bench-")
    os.mkdir(os.path.join(folder, "home"), 0o700)
    try:
        yield folder
    finally:
        os.sched_setaffinity(0, cores)
        shutil.rmtree(folder, ignore_errors=True)


# -- figures ------------------------------------------------------------

def number(value):
    """Three digits that count; a count is whole.

    >>> number(56312.0), number(281.4), number(2.034), number(0.1964), number(64), number(None)
    ('56,300', '281', '2.03', '0.196', '64', '–')
    """
    if value is None:
        return "–"
    places = 2 - math.floor(math.log10(abs(value))) if value and isinstance(value, float) else 0
    return "{:,.{}f}".format(round(value, places), max(0, places))


def with_multiple(value, base):
    """A peer's figure, and how many times b9agent's that is.

    >>> with_multiple(262.0, 54.0), with_multiple(9.0, 54.0), with_multiple(None, 54.0), with_multiple(5, 0)
    ('262 (4.9×)', '9.00 (0.17×)', '–', '5')
    """
    if not value or not base or base < 0:
        return number(value)
    ratio = value / base
    return "%s (%s×)" % (number(value), "%.2f" % ratio if ratio < 1 else "%.1f" % ratio if ratio < 10
                         else "%.0f" % ratio)


class Table:
    """A row for each contestant, b9agent's first; a column for each {key: label}."""

    def __init__(self, columns, names):
        self.columns = columns
        self.values = {name: {key: [] for key in columns} for name in names}

    def add(self, name, **values):
        for key, value in values.items():
            self.values[name][key].append(value)

    def median(self, name, key):
        taken = self.values[name][key]
        return statistics.median(taken) if taken else None

    def medians(self):
        return [[name, [self.median(name, key) for key in self.columns]] for name in self.values]


def table_text(labels, rows):
    """Rows of text, the head first."""
    base = rows[0][1]
    return [("", *labels)] + [
        (name, *(with_multiple(value, ours) if at else number(value) for value, ours in zip(values, base)))
        for at, (name, values) in enumerate(rows)]


# -- what is said, and what is kept ---------------------------------------

def version_of(*packages):
    """Of packages of this venv: "psutil 7.2.2"."""
    from importlib import metadata
    return ["%s %s" % (name, metadata.version(name)) for name in packages]


def git(*words):
    done = subprocess.run(["git", "-C", ROOT, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout.decode().strip() if not done.returncode else ""


def finish(asked, title, about, table, claims=(), versions=()):
    """Print what was measured, keep it, and return the exit status: 1 where a claim does not hold.

    about: what a stranger has to know to read the table.  claims: [(holds, sentence)].
    """
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    changed = " and changes" if git("status", "--porcelain", "b9agent.py") else ""
    kept = {"title": title, "about": about, "columns": list(table.columns.values()),
            "rows": table.medians(), "versions": list(versions), "date": time.strftime("%-d %B %Y"),
            "machine": about_the_machine(PYTHON), "commit": commit + changed,
            "quick": asked.quick, "claims": [list(claim) for claim in claims]}
    print("%s (in brackets: times b9agent's)\n%s\n%s, commit %s, load %.1f\n" % (
        title, ", ".join([kept["machine"], *versions]), kept["date"], kept["commit"],
        os.getloadavg()[0]))
    print_table(table_text(kept["columns"], kept["rows"]))
    for holds, text in claims:
        print("claim: %s: %s" % (text, "holds" if holds else "DOES NOT HOLD"))
    print(flush=True)
    if not asked.alone:
        keep(os.path.splitext(os.path.basename(sys.argv[0]))[0], kept)
    return 0 if asked.quick or all(holds for holds, _ in claims) else 1


def keep(name, result):
    """A quick run does not take the place of a full one."""
    before = kept_results().get(name)
    if not (before and result["quick"] and not before["quick"]):
        os.makedirs(RESULTS, exist_ok=True)
        with open(os.path.join(RESULTS, name + ".json"), "w", encoding="utf-8") as handle:
            json.dump(result, handle, indent=1, ensure_ascii=False)


def kept_results():
    found = {}
    for name in NAMES:
        with contextlib.suppress(FileNotFoundError):
            with open(os.path.join(RESULTS, name + ".json"), encoding="utf-8") as handle:
                found[name] = json.load(handle)
    return found


# -- the README ---------------------------------------------------------

def readme_block(results):
    """Markdown of results as they are kept, {name: result}; those of one machine, day and commit
    share a line."""
    runs = {}
    for name, one in results.items():
        where = "%s, commit %s, %s%s" % (one["date"], one["commit"], one["machine"],
                                         ", a quick run" if one["quick"] else "")
        runs.setdefault(where, []).append(name)
    lines = ["Measured and written here by `tests/bench/run`: medians of runs that take turns with those of "
             "the peers. In brackets: how many times b9agent's figure that is. Less is better, but for "
             "requests a second and for streams held."]
    lines += [where + (" (%s)" % ", ".join(names) if len(runs) > 1 else "") + "."
              for where, names in runs.items()]
    for one in results.values():
        rows = table_text(one["columns"], one["rows"])
        lines += ["", "**%s** (%s): %s" % (one["title"], ", ".join(one["versions"]), one["about"]), ""]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(len(lines) - len(rows) + 1, "| " + " | ".join(["---"] * len(rows[0])) + " |")
    return "\n".join(lines)
