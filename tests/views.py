"""What a dashboard may have to show: values for test_frame.py and for the bench of it."""
import b9agent
from b9agent import View

GB = 1 << 30


def gpu(**known):
    """As GET /status has it."""
    return b9agent.gpu_record(b9agent.Gpu(**known), True)


A100 = dict(vendor="nvidia", name="NVIDIA A100-SXM4-80GB", memory_total_bytes=80 * GB)
GPUS = [gpu(index=0, memory_used_bytes=41 * GB, utilization_pct=62.0, temperature_c=61.0, power_w=301.2,
            processes=(b9agent.GpuProcess(4711, GB),), **A100),
        gpu(index=1, memory_used_bytes=0, utilization_pct=0.0, temperature_c=33.0, power_w=61.2,
            processes=(), **A100),
        gpu(index=0, vendor="amd", name="AMD Radeon RX 7900 XTX", memory_total_bytes=24 * GB, asleep=True)]
HOST = {"os_name": "Ubuntu 24.04.1 LTS", "cpu_model": "AMD EPYC 9354", "cpu_cores": 32, "cpu_threads": 64,
        "memory_total_bytes": 256 * GB, "memory_used_bytes": 200 * GB, "load_1m": 1.5}
PODS = [
    {"name": "worker-7f9c4-abcde", "worker_id": "7f9c4", "status": "RUNNING", "function": "train:fit",
     "reason": None, "created": "2026-11-21T10:02:00Z", "started": "2026-11-21T10:02:49Z",
     "duration_seconds": 754.0, "exit_code": None, "restarts": 0, "containers": 1},
    {"name": "worker-1a2b3-zzzzz", "worker_id": "1a2b3", "status": "COMPLETED", "function": "app:handler",
     "reason": None, "duration_seconds": 12.2, "exit_code": 0, "restarts": 0, "containers": 1},
    {"name": "worker-99999-yyyyy", "worker_id": "99999", "status": "FAILED", "function": "app:handler",
     "reason": "OOMKilled", "duration_seconds": 3.9, "exit_code": 137, "restarts": 2, "containers": 1}]
READY = {
    "status": "ready", "state": "ready", "machine_id": "1c1b50c8", "hostname": "gpu-box", "pool": "external",
    "provider": "generic", "gateway": "http://100.72.101.23:1994", "message": "", "version": "0.1.0",
    "uptime_seconds": 7384.0, "state_seconds": 7380.0, "last_keepalive_seconds_ago": 25.3, "keepalives": 123,
    "cpu_percent": 28.1, "memory_percent": 78.1, "gpu_count": 0, "gpus": [], "gpu_problems": [],
    "host": HOST, "metrics": {"free_gpu_count": 0}, "tunnel": None, "running_jobs": 0, "total_jobs": 0,
    "tailnet": {"state": "none", "address": None, "name": None, "source": None, "message": ""},
    "pods": {"state": "off", "server": None, "message": "", "pods": []},
    "energy": {"grid_intensity_g_per_kwh": None, "pue": 1.0},
    "inference": {"status": "stopped", "running": False, "endpoint": None, "models": [], "message": "",
                  "engine": None, "requests_per_second": None, "tokens_per_second": None, "queue": None}}
BUSY = dict(
    READY, gpu_count=3, gpus=GPUS, running_jobs=1, total_jobs=3,
    tailnet={"state": "up", "address": "100.72.101.9", "name": "gpu-box.tail1234.ts.net", "source": "socket",
             "message": ""},
    tunnel={"state": "running", "server": "me@relay.example:22", "local_port": 40123, "message": "",
            "pid": 77, "starts": 1},
    pods={"state": "watching", "server": "https://127.0.0.1:6443", "message": "", "pods": PODS},
    inference={"status": "running", "running": True, "endpoint": "http://127.0.0.1:11434",
               "models": ["gemma3:1b", "llama3.2:3b"], "message": "", "engine": "ollama", "version": "0.13.0",
               "requests_per_second": 1.5, "tokens_per_second": 87.3, "queue": 2},
    energy={"gpu_w": 362.4, "gpu_basis": "measured", "cpu_w": 96.0, "cpu_basis": "estimated",
            "since": "2026-10-01T00:00:00Z",
            "total": {"gpu_measured_wh": 1250.0, "gpu_estimated_wh": 0.0, "cpu_measured_wh": 0.0,
                      "cpu_estimated_wh": 400.5, "co2e_g": 598.76, "co2e_basis": "estimated"}})
LOG = tuple({"time": "2026-11-21T10:15:%02dZ" % second, "level": level, "event": event, **fields}
            for second, level, event, fields in (
    (20, "info", "started", {"version": "0.1.0", "machine": "1c1b50c8", "pool": "external"}),
    (23, "info", "listening", {"api": "control", "url": "http://127.0.0.1:9999"}),
    (24, "warning", "gateway_unreachable", {"what": "connection refused", "again_in_s": 1.5,
                                            "do": "see `b9agent.py doctor` for what keeps it from there"}),
    (26, "info", "registered", {"machine": "1c1b50c8"}),
    (31, "error", "inference_failed", {"what": "Ollama ended with exit code 1"})))
HISTORY = {"cpu": tuple(range(0, 100, 4)), "memory": (78.0,) * 30, "gpu0": (0, 50, 100) * 8,
           "gpu1": (0.0,) * 24, "power": tuple(range(300, 360, 3)), "tokens": (0, 0, 10, 40, 87.3)}
UNREACHABLE = "the gateway at http://100.72.101.23:1994 does not answer: connection refused. Is it running, " \
              "and is its port open from here?"
# Another program's texts, as bad as they come.
EVIL = "a\x1b[2J\x1b]0;title\x07\nb\u202ec\u2066d"
HOSTILE = dict(
    BUSY, status="ready\x1b[31m", machine_id="\u202e8c05b1c1", hostname="日本語のとても長い名前のホスト" * 3,
    pool="p\n\rq", message="zalgo" + "\u0301" * 40 + EVIL, gateway="http://" + "x" * 400,
    gpus=[gpu(index=number, name="GPU \u200b\u00ad日本👩‍👩‍👧👍🏽🇩🇪❤️" + "w" * 90, vendor="nv\tidia",
              memory_total_bytes=GB << number, problem="fell\noff" if number == 1 else "",
              stale=number == 2, utilization_pct=50.0 * number) for number in range(3)],
    gpu_problems=["amd: " + EVIL],
    pods=dict(BUSY["pods"], pods=[dict(PODS[2], name=EVIL, function="関数" * 30, reason="\x9b31m" * 9)] * 2),
    inference=dict(BUSY["inference"], models=["gemma\x00", "한국어" * 9, "é" * 40], message=EVIL))
EVIL_LOG = ({"time": "2026-11-21T10:15:20Z", "level": "info", "event": "engine", "what": EVIL, "日\n本": ["a"]},
            {"time": None, "level": ["x"], "event": {}, "deep": {"a": 1}}, "no record")
APPLE = dict(READY, gpu_count=1, host=dict(HOST, cpu_model="Apple M2 Max", cpu_threads=12,
                                           memory_total_bytes=64 * GB, memory_used_bytes=50 * GB),
             gpus=[gpu(index=0, vendor="apple", name="Apple M2 Max", memory_total_bytes=48 * GB,
                       memory_used_bytes=9 * GB, utilization_pct=14.0, cores=38)],
             inference=dict(BUSY["inference"], endpoint="http://100.100.74.117:11434", models=["gemma3:1b"],
                            requests_per_second=None, tokens_per_second=None, queue=None))
DOCTOR = tuple(b9agent.doctor_lines([
    b9agent.Finding("ok", "Python 3.11.7", name="python"),
    b9agent.Finding("warn", "the clock is 75 s ahead of the gateway's", "timedatectl set-ntp true", name="clock"),
    b9agent.Finding("fail", UNREACHABLE, "b9agent.py init --gateway HOST:PORT", name="gateway")]))
SICK = dict(BUSY, gpus=[gpu(index=number, problem="Xid 79: it has fallen off the bus", **A100)
                        for number in range(3)] + [dict(GPUS[1], index=3, stale=True)],
            gpu_problems=["intel: xpu-smi did not answer in 8 s"])
VIEWS = {
    "waiting": View({}),
    "unanswered": View({}, problem="no agent runs with the state folder /home/me/.b9agent"),
    "starting": View(dict(READY, status="starting", cpu_percent=None, memory_percent=None, gpu_count=None,
                          host=dict(HOST, memory_used_bytes=None), uptime_seconds=0.4,
                          last_keepalive_seconds_ago=None), LOG[:2]),
    "ready": View(READY, LOG, HISTORY),
    "busy": View(BUSY, LOG * 3, HISTORY, note="inference started"),
    "pulling": View(dict(READY, inference=dict(BUSY["inference"], models=[], transfers=[
        {"model": "llama3.2:3b", "kind": "pull", "status": "running", "step": "pulling dde5aa3fc5ff",
         "completed": 1200 << 20, "total": 1920 << 20, "rate_bytes_s": 44e6, "remaining_s": 17.2},
        {"model": "tiny:latest", "kind": "import", "status": "running", "step": "hashing", "completed": 0,
         "total": 0, "rate_bytes_s": None, "remaining_s": None}])), LOG),
    "unreachable": View(dict(READY, status="unreachable", message=UNREACHABLE, last_keepalive_seconds_ago=400.0,
                             pods=dict(BUSY["pods"], state="failed", message="401 Unauthorized", pods=[])), LOG),
    "refused": View(dict(READY, status="refused", message="the gateway refuses the token"), LOG, age_s=12.0,
                    problem="the agent has ended"),
    "hostile": View(HOSTILE, EVIL_LOG, HISTORY, note=EVIL),
    "apple": View(APPLE, LOG, HISTORY),
    "crowd": View(dict(BUSY, gpus=[dict(GPUS[0], index=number) for number in range(64)],
                       pods=dict(BUSY["pods"], pods=PODS * 33)), LOG),
    "sick": View(SICK, LOG),
    "logs": View(BUSY, LOG * 9, pane="logs"),
    "logs-back": View(BUSY, LOG * 9, pane="logs", scroll=10),
    "filtered": View(BUSY, LOG * 2, pane="logs", filter="REGIS", prompt="Filter: REGIS_"),
    "doctor": View(BUSY, LOG, pane="doctor", report=DOCTOR),
    "help": View(BUSY, LOG, pane="help"),
    "prompt": View(READY, LOG, prompt="Pull model: hf.co/somebody/a-very-long-name-of-a-model:q4_K_M_"),
}
