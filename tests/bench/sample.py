#!/usr/bin/env python3
"""What one look at the machine costs, beside psutil, and what an idle agent takes of a core.

    tests/bench/sample.py [--rounds 300] [--idle-seconds 300]

Start it with a Python that has psutil: tests/.venv/bin/python tests/bench/sample.py.  The calls are
interleaved and medians are printed.  For the idle share a real agent with the default interval of 60 s
keeps a machine alive on an embedded gateway; its CPU time is the kernel's own count, in nanoseconds,
between two keepalives or more.  Linux.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.dont_write_bytecode = True
sys.path.insert(0, ROOT)

import b9agent  # noqa: E402
import psutil  # noqa: E402


def psutil_sample():
    """The same figures by psutil's calls."""
    psutil.cpu_percent()
    psutil.virtual_memory()
    psutil.swap_memory()
    psutil.disk_usage("/")
    psutil.net_io_counters()
    psutil.disk_io_counters()
    psutil.getloadavg()


def make_agent(folder):
    settings = b9agent.load_settings({"config": os.devnull, "state_dir": folder}, {}).settings
    loaded = b9agent.Loaded(settings._replace(token="bench"), {}, ())
    return b9agent.Agent(loaded, b9agent.Log(minimum="error"), keep=False)


def time_calls(calls, rounds):
    """{name: median in microseconds}, one call of each in every round."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - before) * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def cpu_ns(pid):
    """CPU time of all threads of a process."""
    total = 0
    for task in os.listdir("/proc/%d/task" % pid):
        with open("/proc/%d/task/%s/schedstat" % (pid, task)) as handle:
            total += int(handle.read().split()[0])
    return total


def idle_share(seconds):
    """Percent of one core that an agent takes with its defaults, over whole intervals."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PATH": os.environ["PATH"], "HOME": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, os.path.join(ROOT, "b9agent.py")]
        gateway = subprocess.Popen(command + ["gateway", "--port", "0"], env=environment,
                                   stderr=subprocess.PIPE, text=True)
        agent = None
        try:
            port = re.search(r"url=http://127.0.0.1:(\d+)", gateway.stderr.readline()).group(1)
            made = json.loads(subprocess.run(command + ["machine", "create", "--json"], env=environment,
                                             stdout=subprocess.PIPE, check=True).stdout)
            agent = subprocess.Popen(
                command + ["--gateway-port", port, "--machine-id", made["machine_id"],
                           "--control-port", "0"],
                env=dict(environment, BETA9_TOKEN=made["token"]), stderr=subprocess.PIPE, text=True)
            for line in agent.stderr:
                if " ready" in line:
                    break
            time.sleep(5)  # what belongs to its start
            before, began = cpu_ns(agent.pid), time.monotonic()
            time.sleep(seconds)
            return (cpu_ns(agent.pid) - before) / (time.monotonic() - began) / 1e7
        finally:
            for process in (agent, gateway):
                if process:
                    process.terminate()
                    process.communicate(timeout=30)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--idle-seconds", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        agent = make_agent(folder)
        medians = time_calls({
            "host figures": lambda: agent._host.sample("/"),
            "GPUs": lambda: agent._look_at_gpus(5.0),
            "everything (Agent.look)": agent.look,
            "a keepalive's payload": agent.keepalive_payload,
            "psutil, the host figures": psutil_sample}, options.rounds)
        gpus = agent.look().gpus
    print("%s, psutil %s, %d GPUs" % (sys.version.split()[0], psutil.__version__, len(gpus.gpus)))
    for name, microseconds in medians.items():
        print("  %-28s %8.0f us" % (name, microseconds))
    if options.idle_seconds:
        print("  %-28s %8.4f %% of a core" % ("an idle agent, %d s" % options.idle_seconds,
                                              idle_share(options.idle_seconds)))


if __name__ == "__main__":
    main()
