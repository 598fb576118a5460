"""The dashboard's content as rich would have it drawn, for tests/bench/frame.py: of a view, or of a
running agent, asked once a second.      rich_top.py STATE_DIR"""
import json
import os
import sys
import time
import urllib.request

from rich.console import Console, Group
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

GIB = 1 << 30
BLOCKS = "▁▂▃▄▅▆▇█"


def bar(percent, width=10):
    full = round((percent or 0) / 100 * width)
    return "█" * full + "░" * (width - full)


def sparkline(values, width=16):
    return "".join(BLOCKS[min(7, int(value / 100 * 8))] for value in values[-width:])


def host_text(status, history):
    host = status["host"]
    memory = [(host.get(key) or 0) / GIB for key in ("memory_used_bytes", "memory_total_bytes")]
    return Text("Status: %s │ Heartbeat %.0fs ago │ Gateway: %s │ Pool: %s │ Up %.0fs\n"
                "CPU %s %3.0f%% %s of %s threads │ Memory %s %3.0f%% %s %.1f/%.1f GiB" % (
                    status["status"].upper(), status["last_keepalive_seconds_ago"] or 0, status["gateway"],
                    status["pool"], status["uptime_seconds"], bar(status["cpu_percent"]),
                    status["cpu_percent"] or 0, sparkline(history.get("cpu", ())), host["cpu_threads"],
                    bar(status["memory_percent"]), status["memory_percent"] or 0,
                    sparkline(history.get("memory", ())), *memory))


def gpu_table(gpus, history):
    table = Table.grid(padding=(0, 2))
    for at, gpu in enumerate(gpus):
        used, total = ((gpu.get(key) or 0) / GIB for key in ("memory_used_bytes", "memory_total_bytes"))
        table.add_row(str(gpu["index"]), gpu["name"].replace("NVIDIA ", ""), bar(gpu["utilization_pct"]),
                      "%.0f%%" % (gpu["utilization_pct"] or 0), sparkline(history.get("gpu%d" % at, ())),
                      "%.1f/%.1f GiB" % (used, total), "%.0f°C" % (gpu["temperature_c"] or 0),
                      "%.0f W" % (gpu["power_w"] or 0),
                      Text("free", "green") if gpu["free"] else Text("in use", "yellow"))
    return table


def pod_table(pods):
    table = Table.grid(padding=(0, 2))
    for pod in pods:
        table.add_row(pod["name"], Text(pod["status"], "red" if pod["status"] == "FAILED" else "green"),
                      pod["function"], "%.0fs" % pod["duration_seconds"],
                      "" if pod["exit_code"] is None else "exit %d" % pod["exit_code"], pod["reason"] or "")
    return table


def log_text(records, rows):
    text = Text(no_wrap=True, overflow="ellipsis")
    for record in records[-rows:]:
        fields = ["%s=%s" % item for item in record.items() if item[0] not in ("time", "level", "event")]
        text.append("%s %s %s %s\n" % (record["time"][11:19], record["level"], record["event"],
                                       " ".join(fields)),
                    {"warning": "yellow", "error": "red"}.get(record["level"], ""))
    return text


def render(status, records, history, rows):
    """A renderable of so many rows."""
    gpus, pods, inference, energy = (status[name] for name in ("gpus", "pods", "inference", "energy"))
    parts = [("Beta9 Agent: %s" % status["machine_id"], host_text(status, history), 4)]
    if gpus:
        parts.append(("GPUS", gpu_table(gpus, history), len(gpus) + 2))
    if pods["pods"]:
        parts.append(("WORKER PODS", pod_table(pods["pods"]), len(pods["pods"]) + 2))
    parts.append(("INFERENCE", Text("Status: %s │ Models: %s │ Endpoint: %s │ Engine: %s" % (
        inference["status"], ", ".join(inference["models"]), inference["endpoint"], inference["engine"])), 3))
    if "gpu_w" in energy:
        parts.append(("ENERGY", Text("Now: GPUs %s W, CPUs %s W" % (energy["gpu_w"], energy["cpu_w"])), 3))
    left = max(3, rows - 1 - sum(size for _, _, size in parts))
    parts.append(("LOGS", log_text(records, left - 2), left))
    layout = Layout()
    layout.split_column(*[Layout(Panel(what, title=title, title_align="left"), size=size)
                          for title, what, size in parts],
                        Layout(Group(Text("q quit  s start/stop  p pull  l logs  d doctor  ? help")), size=1))
    return layout


def draw(console, view):
    """One frame, as the text that a terminal gets."""
    with console.capture() as taken:
        console.print(render(view.status, view.lines, view.history, console.height))
    return taken.get()


def main(state):
    address, token = (open(os.path.join(state, name)).read().strip()
                      for name in ("control.addr", "control.token"))
    headers = {"Authorization": "Bearer " + token, "Accept": "application/x-ndjson"}

    def ask(path):
        with urllib.request.urlopen(urllib.request.Request("http://" + address + path, headers=headers)) as got:
            return got.read()

    console, history = Console(), {"cpu": [], "memory": []}
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            status = json.loads(ask("/status"))
            records = [json.loads(line) for line in ask("/logs?lines=60").splitlines()]
            for name in history:
                history[name].append(status[name + "_percent"] or 0)
            live.update(render(status, records, history, console.height), refresh=True)
            time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1])
