"""Section 5 in real cgroups: the limits are the machine.  Needs root; makes and removes a cgroup, in
the hierarchy that is mounted or, where that one is read-only (a container), in a mount of its own in
a private mount namespace."""
import json
import os
import shutil
import subprocess
import sys

import pytest

import b9agent

MIB = 1 << 20
SKIP = 77  # exit status of a set-up that names what this machine lacks

# Runs in a mount namespace of its own.  argv: "v1" or "v2", a folder for mounts, the child's source.
IN_NAMESPACE = r"""
import os, subprocess, sys, time

version, scratch, child = sys.argv[1:]

def lacks(what):
    print(what)
    raise SystemExit(77)

def write(path, text):
    with open(path, "w") as handle:
        handle.write(text)

def hierarchy(controller):
    # A mounted hierarchy that may be written, or a mount of our own.
    with open("/proc/self/mountinfo") as handle:
        rows = [line.split(" ") for line in handle]
    for row in rows:
        kind, options = row[row.index("-") + 1], row[-1].strip().split(",")
        if kind == ("cgroup2" if version == "v2" else "cgroup"):
            if (version == "v2" or controller in options) and "rw" in row[5].split(","):
                return row[4]
    place = os.path.join(scratch, controller or "unified")
    os.mkdir(place)
    how = ["-t", "cgroup2", "none"] if version == "v2" else ["-t", "cgroup", "-o", controller, "none"]
    if subprocess.call(["mount", *how, place], stderr=subprocess.DEVNULL):
        lacks("no writable %s cgroup %s here, and none can be mounted" % (version, controller))
    return place

def make_folders():
    name = "b9agent-test-%d" % os.getpid()
    if version == "v1":
        return [os.path.join(hierarchy(kind), name) for kind in ("cpu", "cpuacct", "memory")]
    top = hierarchy("")
    with open(top + "/cgroup.controllers") as handle:
        missing = {"cpu", "memory"} - set(handle.read().split())
    if missing:
        lacks("the v2 hierarchy here has no controller " + " and ".join(sorted(missing)))
    with open(top + "/cgroup.subtree_control") as handle:
        enabled = set(handle.read().split())
    for kind in {"cpu", "memory"} - enabled:
        try:
            write(top + "/cgroup.subtree_control", "+" + kind)
        except OSError as error:
            lacks("v2 %s cannot be handed down here: %s" % (kind, error.strerror))
        undo.append((top + "/cgroup.subtree_control", "-" + kind))
    return [os.path.join(top, name)]

def remove(folder):
    # The kernel lets go of a group a little after its last process has ended.
    until = time.monotonic() + 10
    while os.path.isdir(folder):
        try:
            os.rmdir(folder)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)

undo, made = [], []
try:
    folders = make_folders()
    for folder in sorted(set(folders)):
        os.mkdir(folder)
        made.append(folder)
    if version == "v1":
        write(folders[0] + "/cpu.cfs_period_us", "100000")
        write(folders[0] + "/cpu.cfs_quota_us", "50000")
        write(folders[2] + "/memory.limit_in_bytes", str(128 << 20))
    else:
        write(folders[0] + "/cpu.max", "50000 100000")
        write(folders[0] + "/memory.max", str(128 << 20))
        if os.path.exists(folders[0] + "/memory.swap.max"):
            write(folders[0] + "/memory.swap.max", str(16 << 20))
    code = subprocess.call([sys.executable, "-c", child] + folders)
except OSError as error:
    lacks("a %s cgroup cannot be made here: %s" % (version, error))
finally:
    for folder in made:
        remove(folder)
    for path, text in undo:
        write(path, text)
raise SystemExit(code)
"""

CHILD = r"""
import json, os, sys, time
for folder in sys.argv[1:]:
    with open(folder + "/cgroup.procs", "w") as procs:
        procs.write(str(os.getpid()))
import b9agent
ballast = bytearray(32 << 20)
host = b9agent.make_host()

def look(seconds, work):
    # A sample over a while of work, and the same figure from the process's own clock.
    host.sample("/")
    began = time.monotonic(), time.process_time()
    until = began[0] + seconds
    while time.monotonic() < until:
        work()
    sample = host.sample("/")
    granted_s = (time.monotonic() - began[0]) * 0.5
    return [sample._asdict(), 100 * (time.process_time() - began[1]) / granted_s]

time.sleep(0.6)  # the first sample of a host ends a window of its own
idle = look(1.0, lambda: time.sleep(0.05))
busy = look(1.5, lambda: None)
again = host.sample("/")
print(json.dumps([host.capacity(), idle, busy, again.cpu_pct]))
"""


@pytest.mark.root
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_in_a_real_cgroup_the_limits_are_the_machine(version, tmp_path):
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root and `unshare`")
    answer = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", IN_NAMESPACE, version,
         str(tmp_path), CHILD], timeout=60, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=os.path.dirname(b9agent.__file__), env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"))
    said = answer.stdout.decode().strip() or answer.stderr.decode().strip()
    if answer.returncode == SKIP or "unshare:" in said:
        pytest.skip(said)
    assert answer.returncode == 0, said
    capacity, (idle, idle_pct), (busy, busy_pct), again_pct = json.loads(said)
    assert capacity == [500, 128 * MIB]
    assert busy["memory_total_bytes"] == 128 * MIB
    assert 32 * MIB <= busy["memory_used_bytes"] <= 128 * MIB
    if version == "v2" and busy["swap_total_bytes"] is not None:
        assert busy["swap_total_bytes"] <= 16 * MIB
    # Half a core is granted, in slices of 100 ms: the process's own clock says how much it got.
    assert busy["cpu_pct"] == pytest.approx(min(100, busy_pct), abs=15)
    assert idle["cpu_pct"] == pytest.approx(idle_pct, abs=15) and idle["cpu_pct"] < busy["cpu_pct"]
    assert again_pct == busy["cpu_pct"]  # asked again at once
