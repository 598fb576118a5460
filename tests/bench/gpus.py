#!/usr/bin/env python3
"""What one sample of eight NVIDIA GPUs costs, beside nvidia-ml-py asking for the same.

    tests/bench/gpus.py [--rounds 400]

Both read the stand-in for NVML of the tests (tests/fake_nvml.c, built with cc), which answers at once:
what is measured is Python's share, not a driver's.  Rounds are interleaved; medians are printed.
nvidia-ml-py is left out where it is not installed.  Linux.
"""
import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import b9agent  # noqa: E402


def build(folder):
    path = os.path.join(folder, "libnvidia-ml.so.1")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        sys.exit("it needs a C compiler")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", path,
                    os.path.join(os.path.dirname(HERE), "fake_nvml.c")], check=True)
    return path


def sample_of(nvml):
    """A function that asks nvidia-ml-py for what our sample has."""
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=400)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        path = build(folder)
        contestants = {"b9agent": b9agent.Nvidia(path, folder, "").read}
        try:
            import pynvml
            import ctypes
            pynvml.nvmlLib = ctypes.CDLL(path)
            pynvml.nvmlInit()
            contestants["nvidia-ml-py"] = sample_of(pynvml)
        except ImportError:
            print("nvidia-ml-py is not installed: without it")
        times = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, sample in contestants.items():
                started = time.perf_counter()
                sample()
                times[name].append(time.perf_counter() - started)
        for name, values in times.items():
            print("%-14s %7.0f us a sample of 8 GPUs (median of %d)"
                  % (name, statistics.median(values) * 1e6, rounds))


if __name__ == "__main__":
    main()
