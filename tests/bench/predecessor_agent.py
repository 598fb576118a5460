"""What the predecessor of b9agent publishes that it does, written anew for the bench: a click command
line, metrics by psutil with its 100 ms of cpu_percent, an httpx client for each POST, nvidia-smi asked
for.      predecessor_agent.py --gateway-port PORT [--once | --keepalive-interval SECONDS]"""
import asyncio
import subprocess
import time

import click
import httpx
import psutil


def gpu_count():
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5)
    except OSError:
        return 0
    return len(done.stdout.splitlines())


def metrics():
    disk, memory = psutil.disk_usage("/"), psutil.virtual_memory()
    return {"total_cpu_available": psutil.cpu_count() * 1000,
            "total_memory_available": memory.total >> 20, "total_disk_space_bytes": disk.total,
            "total_disk_free_bytes": disk.free, "cpu_utilization_pct": psutil.cpu_percent(interval=0.1),
            "memory_utilization_pct": memory.percent, "worker_count": 0, "container_count": 0,
            "free_gpu_count": gpu_count(), "cache_usage_pct": 0.0, "cache_capacity": 0,
            "cache_memory_usage": 0, "cache_cpu_usage": 0.0}


async def post(base, token, name, body):
    async with httpx.AsyncClient(timeout=10) as client:
        answer = await client.post(base + name, json=body, headers={"Authorization": "Bearer " + token})
        answer.raise_for_status()
        return answer.json()


async def live(base, token, once, interval):
    who = {"machine_id": "9ede0e55", "pool_name": "gpu", "provider_name": "generic"}
    await post(base, token, "register", dict(
        who, token="", hostname="machine-9ede0e55", cpu="%d000m" % psutil.cpu_count(),
        memory="%dMi" % (psutil.virtual_memory().total >> 20), gpu_count=str(gpu_count()),
        private_ip="127.0.0.1"))
    while True:
        await post(base, token, "keepalive", dict(who, agent_version="predecessor", metrics=metrics()))
        if once:
            return
        await asyncio.sleep(interval)


@click.command()
@click.option("--token", envvar="BETA9_TOKEN", required=True)
@click.option("--gateway-host", envvar="BETA9_GATEWAY_HOST", default="127.0.0.1")
@click.option("--gateway-port", envvar="BETA9_GATEWAY_PORT", type=int, default=1994)
@click.option("--keepalive-interval", type=float, default=60)
@click.option("--once", is_flag=True)
def main(token, gateway_host, gateway_port, keepalive_interval, once):
    began = time.time()
    base = "http://%s:%d/api/v1/machine/" % (gateway_host, gateway_port)
    asyncio.run(live(base, token, once, keepalive_interval))
    click.echo("ran %.1f s" % (time.time() - began), err=True)


if __name__ == "__main__":
    main()
