"""A floor under every agent over urllib: register, keepalives with real /proc metrics; no settings,
no errors, no state.  A bound, not a product.      floor_agent.py PORT [INTERVAL]"""
import json
import os
import sys
import time
import urllib.request

BASE = "http://127.0.0.1:%s/api/v1/machine/" % sys.argv[1]
HEADERS = {"Authorization": "Bearer " + os.environ["BETA9_TOKEN"], "Content-Type": "application/json"}


def post(name, body):
    request = urllib.request.Request(BASE + name, json.dumps(body).encode(), HEADERS)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def cpu_times():
    with open("/proc/stat") as handle:
        fields = [int(word) for word in handle.readline().split()[1:9]]
    return sum(fields), fields[3] + fields[4]


def metrics(before):
    total, idle = cpu_times()
    busy = 100.0 * (1 - (idle - before[1]) / max(1, total - before[0]))
    with open("/proc/meminfo") as handle:
        memory = {line.split(":")[0]: int(line.split()[1]) for line in handle}
    disk = os.statvfs("/")
    return (total, idle), {
        "total_cpu_available": os.cpu_count() * 1000, "total_memory_available": memory["MemTotal"] >> 10,
        "total_disk_space_bytes": disk.f_blocks * disk.f_frsize,
        "total_disk_free_bytes": disk.f_bavail * disk.f_frsize, "cpu_utilization_pct": round(busy, 2),
        "memory_utilization_pct": round(100.0 * (1 - memory["MemAvailable"] / memory["MemTotal"]), 2),
        "worker_count": 0, "container_count": 0, "free_gpu_count": 0, "cache_usage_pct": 0.0,
        "cache_capacity": 0, "cache_memory_usage": 0, "cache_cpu_usage": 0.0}


who = {"machine_id": "f1002000", "pool_name": "gpu", "provider_name": "generic"}
times = cpu_times()
post("register", dict(who, token="", hostname="floor", cpu="%d000m" % os.cpu_count(), memory="1024Mi",
                      gpu_count="0", private_ip="127.0.0.1"))
while True:
    times, figures = metrics(times)
    post("keepalive", dict(who, agent_version="floor", metrics=figures))
    if len(sys.argv) < 3:
        break
    time.sleep(float(sys.argv[2]))
