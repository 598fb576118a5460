"""What one look at the machine costs, beside psutil and nvidia-ml-py asking for the same.

    tests/bench/run --only sample [--rounds 400] [--quick] [--alone]

The GPUs are eight of the tests' stand-in for NVML (tests/fake_nvml.c, built with cc), which answers at
once: what is measured is Python's share, not a driver's.  Linux.
"""
import ctypes
import os
import subprocess
import sys
import time

from common import HERE, Table, finish, in_turn, options, program_path, scratch, version_of

import b9agent

COLUMNS = {"host": "CPU, memory, swap, disk, network, load: µs of CPU", "gpus": "8 GPUs: µs of CPU"}


def build_nvml(folder):
    path = os.path.join(folder, "libnvidia-ml.so.1")
    compiler = program_path("gcc") or program_path("cc") or sys.exit("it needs a C compiler")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", path,
                    os.path.join(os.path.dirname(HERE), "fake_nvml.c")], check=True)
    return path


def psutil_look():
    import psutil

    def look():
        psutil.cpu_percent()
        psutil.virtual_memory()
        psutil.swap_memory()
        psutil.disk_usage("/")
        psutil.net_io_counters()
        psutil.disk_io_counters()
        psutil.getloadavg()
    return look


def pynvml_look(path):
    """Asks for what our sample has."""
    import pynvml as nvml
    nvml.nvmlLib = ctypes.CDLL(path)
    nvml.nvmlInit()
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]

    def one(device):
        try:
            nvml.nvmlDeviceGetMigMode(device)
        except nvml.NVMLError:
            pass
        return (nvml.nvmlDeviceGetMemoryInfo(device, version=nvml.nvmlMemory_v2),
                nvml.nvmlDeviceGetUtilizationRates(device), nvml.nvmlDeviceGetTemperature(device, 0),
                nvml.nvmlDeviceGetPowerUsage(device), nvml.nvmlDeviceGetEnforcedPowerLimit(device),
                nvml.nvmlDeviceGetTotalEnergyConsumption(device), nvml.nvmlDeviceGetFanSpeed(device),
                nvml.nvmlDeviceGetClockInfo(device, 0), nvml.nvmlDeviceGetClockInfo(device, 2),
                nvml.nvmlDeviceGetTotalEccErrors(device, 1, 0),
                nvml.nvmlDeviceGetComputeRunningProcesses(device))
    return lambda: [one(device) for device in handles]


def make_agent(folder):
    settings = b9agent.load_settings({"config": os.devnull, "state_dir": folder}, {}).settings
    loaded = b9agent.Loaded(settings._replace(token="bench"), {}, ())
    return b9agent.Agent(loaded, b9agent.Log(minimum="error"), keep=False)


def main():
    asked = options(__doc__, rounds=(400, 100, "looks of each"))
    table = Table(COLUMNS, ["b9agent"] + ["psutil", "nvidia-ml-py"] * (not asked.alone))
    with scratch() as folder:
        agent, path = make_agent(folder), build_nvml(folder)
        gpus = b9agent.Nvidia(path, folder, "").read
        looks = [("b9agent", "host", lambda: agent._host.sample("/")), ("b9agent", "gpus", gpus)]
        if not asked.alone:
            looks += [("psutil", "host", psutil_look()), ("nvidia-ml-py", "gpus", pynvml_look(path))]
        for (name, key, look), counts in in_turn(asked.rounds, looks, warm=5):
            before = time.thread_time()
            look()
            if counts:
                table.add(name, **{key: (time.thread_time() - before) * 1e6})
    claims = [] if asked.alone else [(
        table.median("b9agent", "host") <= 1.25 * table.median("psutil", "host"),
        "the host's figures cost no more than a quarter more than psutil's")]
    return finish(asked, "One look at the machine",
                  "the GPUs are a stand-in for NVML that answers at once: Python's share. "
                  "nvidia-ml-py makes the bare calls; b9agent also checks what they say.",
                  table, claims, () if asked.alone else version_of("psutil", "nvidia-ml-py"))


if __name__ == "__main__":
    sys.exit(main())
