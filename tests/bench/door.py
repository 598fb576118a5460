"""What the front door adds to a stream of tokens, beside no proxy at all, nginx and LiteLLM.

    tests/bench/run --only door [--streams 1,16,64,256,512] [--rounds 3] [--quick] [--alone]
                                [--peers direct,nginx,litellm,door,translated] [--realtime] [--json]

An engine in C sends tokens when they are due and a client in C says how late each came (streams.c; gcc
compiles it here).  Engine and client have the first core, proxies the last.  Streams have 50 tokens a
second and begin over one second; rounds are interleaved, so that a busy minute of the machine falls on
all alike, and medians of the rounds are printed.  CPU time is that of the proxy's processes, all
threads, for each token that the client got.  "mixed" is the same with 5 % of the streams read at a
tenth of their rate and 5 % that leave half way, half of them with a reset, and come again; figures are
of the others.  Held: every stream whole, and 99 % of the tokens less than 20 ms late.

The door runs as it is used: `b9agent.py run` with a gateway, one tenant with a token and with every
limit set (high), metering and metrics on.  "translated" is its Ollama API in front of an engine that
has OpenAI's alone.  nginx has buffering off and keeps connections; it knows no tokens.  LiteLLM has one
worker, a master key and no database, and is asked with fewer streams; it has a venv of its own, of 740
MiB, and without that it is left out.  Linux.
"""
import contextlib
import hashlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time

from common import (HERE, PYTHON, Table, children_of, cpu_s, finish, free_port, installed,
                    memory_mib, options, print_table, program_path, scratch)
from fake_ollama import llama_metadata, make_gguf
from helpers import Program, environment, wait_until
from hostile_gateway import TOKEN, HostileGateway

LITELLM = os.path.join(HERE, ".venv-litellm")
LITELLM_STREAMS = (1, 8, 16, 24, 32, 48, 64)
HELD_MS = 20.0
PEERS = ("direct", "nginx", "litellm", "door", "translated")
NAMES = {"door": "b9agent", "translated": "b9agent, from Ollama's API to OpenAI's",
         "nginx": "nginx (no tokens, tenants, limits)", "litellm": "LiteLLM", "direct": "no proxy at all"}


def pin_all(pid, core):
    for thread in os.listdir("/proc/%d/task" % pid):
        os.sched_setaffinity(int(thread), {core})


# -- the contestants ----------------------------------------------------

class Peer:
    """One way to the engine.  figures: {(streams, mixed): [what the client said, with CPU and RSS]}."""

    def __init__(self, name, port, pids, path="/v1/chat/completions", token="none", model="bench",
                 ndjson=0):
        self.name, self.port, self.pids = name, port, pids
        self.words = ["host=127.0.0.1", "port=%d" % port, "path=" + path, "token=" + token,
                      "model=" + model, "ndjson=%d" % ndjson]
        self.first = {"new": [], "kept": []}
        self.figures, self.idle_us, self.idle_mib, self.beaten = {}, 0.0, 0.0, False

    def cpu_s(self):
        return cpu_s(*self.pids)

    def rss_mib(self):
        return sum(map(memory_mib, self.pids))

    @property
    def slow(self):
        return self.name == "litellm"

    def counts(self, streams):
        return LITELLM_STREAMS if self.slow else streams

    def ask(self, *words):
        done = subprocess.run([STREAMS, *words[:1], *self.words, *words[1:]], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True)
        if done.returncode:
            sys.exit("%s failed: %s" % (self.name, done.stderr.strip()))
        return json.loads(done.stdout)

    def measure_first(self, how, count):
        if self.slow:
            count = max(5, count // 4)
        times = self.ask("first", "count=%d" % count, "kept=%d" % (how == "kept"))["first_ns"]
        self.first[how] += [time_ns / 1000 for time_ns in times[how == "kept":]]

    def measure(self, streams, tokens, mixed):
        extra = ["slow=5", "leave=5"] if mixed else []
        peak, done = [self.rss_mib()], threading.Event()

        def look():
            while not done.wait(0.25):
                peak.append(self.rss_mib())
        looker = threading.Thread(target=look)
        looker.start()
        before, began = self.cpu_s(), time.monotonic()
        try:
            said = self.ask("many", "n=%d" % streams, "tokens=%d" % tokens,
                            "limit_s=%d" % (tokens / 50 + 5), *extra)
        finally:
            done.set()
            looker.join()
        spent = self.cpu_s() - before - self.idle_us / 1e6 * (time.monotonic() - began)
        said.update(cpu_us=spent / max(1, said["tokens"]) * 1e6, rss_mib=max(peak), held=(
            said["whole"] == said["normal"] and said["late_p99_ms"] < HELD_MS))
        self.figures.setdefault((streams, mixed), []).append(said)
        return said["held"]

    def median(self, key, name):
        return statistics.median(said[name] for said in self.figures[key])

    def held(self):
        """The most streams that it held in every round."""
        return max([count for (count, mixed), said in self.figures.items()
                    if not mixed and all(one["held"] for one in said)], default=0)


def compile_streams(folder):
    binary = os.path.join(folder, "streams")
    subprocess.run([program_path("gcc") or sys.exit("it needs a C compiler"), "-O2", "-o", binary, os.path.join(HERE, "streams.c")], check=True)
    os.mkdir(os.path.join(folder, "bin"))
    for name in ("llama-server", "ollama"):
        os.link(binary, os.path.join(folder, "bin", name))
    return binary


def get(port, path, token="none"):
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        link.request("GET", path, headers={"Authorization": "Bearer " + token})
        return link.getresponse().status
    except OSError:
        return 0
    finally:
        link.close()


class Bench:
    """Starts what is measured; everything ends with `end`."""

    def __init__(self, folder, end):
        self.folder, self.end, self.home = folder, end, os.path.join(folder, "home")
        self.cores = sorted(os.sched_getaffinity(0))
        self.versions = []

    def program(self, command, core, **extra):
        os.sched_setaffinity(0, {core})  # the child inherits it
        started = Program(command, environment(self.home, **extra), cwd=self.folder)
        os.sched_setaffinity(0, {self.cores[0]})
        return self.end.enter_context(started)

    def start(self, names):
        port = free_port()
        self.program([os.path.join(self.folder, "bin", "llama-server"), "--alias", "bench",
                      "--host", "127.0.0.1", "--port", str(port)], self.cores[0])
        wait_until(lambda: get(port, "/health") == 200, "the engine answers")
        peers = [Peer("direct", port, [])]
        for name in names:
            if name in ("nginx", "litellm"):
                peer = getattr(self, name)(port)
                peers += [peer] if peer else []
        if "door" in names:
            peers += self.door("translated" in names)
        return peers

    def lacking(self, what, how):
        print("%s is not in the table, for it is not here: %s\n" % (what, how), file=sys.stderr)

    def nginx(self, engine_port):
        program = program_path("nginx")
        if not program:
            return self.lacking("nginx", "apt-get install nginx-light")
        port, path = free_port(), os.path.join(self.folder, "nginx.conf")
        with open(path, "w") as handle:
            handle.write(NGINX.format(port=port, engine=engine_port, folder=self.folder,
                                      user="user root;" if os.geteuid() == 0 else ""))
        master = self.program([program, "-c", path, "-p", self.folder, "-e", "stderr"], self.cores[-1])
        wait_until(lambda: get(port, "/health") == 200, "nginx answers")
        said = subprocess.run([program, "-v"], stderr=subprocess.PIPE, universal_newlines=True).stderr
        self.versions.append(said.strip().rpartition(": ")[2].replace("/", " "))
        return Peer("nginx", port, children_of(master.pid))

    def litellm(self, engine_port):
        program = os.path.join(LITELLM, "bin", "litellm")
        if not os.path.exists(program):
            return self.lacking("LiteLLM", "tests/bench/run --only door installs it (740 MiB)")
        port, path = free_port(), os.path.join(self.folder, "litellm.yaml")
        with open(path, "w") as handle:
            handle.write(LITELLM_CONFIG % engine_port)
        server = self.program([program, "--config", path, "--host", "127.0.0.1", "--port", str(port)],
                              self.cores[-1], LITELLM_LOCAL_MODEL_COST_MAP="True")
        wait_until(lambda: get(port, "/health/liveliness", "sk-bench") == 200, "LiteLLM answers", 120)
        self.versions.append("LiteLLM " + subprocess.run(
            [os.path.join(LITELLM, "bin", "python"), "-c",
             "import importlib.metadata as m; print(m.version('litellm'))"],
            stdout=subprocess.PIPE, universal_newlines=True).stdout.strip())
        return Peer("litellm", port, [server.pid], token="sk-bench")

    def door(self, translated):
        state = os.path.join(self.home, ".b9agent")
        os.mkdir(state, 0o700)
        token = write_tenant(state)
        model = os.path.join(self.folder, "bench.gguf")
        with open(model, "wb") as handle:
            handle.write(make_gguf(llama_metadata("bench", 1), 4096, "bench"))
        gateway = self.end.enter_context(HostileGateway())
        agent = self.program(
            [PYTHON, "-I", installed(self.folder), "run", "--gateway-host", "127.0.0.1",
             "--gateway-port", str(gateway.port), "--control-port", "0", "--inference-port",
             str(free_port())], self.cores[-1], BETA9_TOKEN=TOKEN,
            PATH=os.path.join(self.folder, "bin") + os.pathsep + os.environ["PATH"],
            B9AGENT_INFERENCE_SLOTS=1024, B9AGENT_INFERENCE_QUEUE=4096,
            B9AGENT_INFERENCE_GPU_USD_PER_HOUR=1)
        agent.wait_line(r"notice ready\b")
        self.end.callback(agent.stop)  # and it ends its engine
        status = control(state, "POST", "/inference/start", {"engine": "llama-server", "model": model})
        if status.get("status") != "running":
            sys.exit("the agent's engine did not start: %s" % status)
        pin_all(status["pid"], self.cores[0])
        port = int(status["endpoint"].rpartition(":")[2])
        (name,) = status["models"]
        found = [Peer("door", port, [agent.pid], token=token, model=name)]
        if translated:
            found.append(Peer("translated", port, [agent.pid], "/api/chat", token, name, 1))
        return found


NGINX = """{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr error;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/n1;
    proxy_temp_path {folder}/n2;
    fastcgi_temp_path {folder}/n3;
    uwsgi_temp_path {folder}/n4;
    scgi_temp_path {folder}/n5;
    keepalive_requests 1000000;
    upstream engine {{ server 127.0.0.1:{engine}; keepalive 1024; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        tcp_nodelay on;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""
LITELLM_CONFIG = """
model_list:
  - model_name: bench
    litellm_params: {model: openai/bench, api_base: "http://127.0.0.1:%d/v1", api_key: none}
general_settings: {master_key: sk-bench}
litellm_settings: {telemetry: false, num_retries: 0}
"""


def write_tenant(state):
    """One tenant whose every limit is set, so that each is counted.  Returns its token."""
    token = "b9bench-" + "0123456789abcdef" * 2
    with open(os.open(os.path.join(state, "tenants.yaml"), os.O_WRONLY | os.O_CREAT, 0o600), "w") as out:
        out.write(TENANT % hashlib.sha256(token.encode()).hexdigest())
    return token


TENANT = """tenants:
  - name: bench
    token_sha256: %s
    models: "*"
    requests_per_minute: 60000
    concurrent_requests: 10000
    tokens_per_day: 1000000000000
    gpu_seconds_per_day: 100000000
    usd_per_day: 1000000
    max_context_tokens: 100000
    max_output_tokens: 100000
"""


def control(state, method, path, body=None):
    found = []
    for name in ("control.addr", "control.token"):
        with open(os.path.join(state, name)) as handle:
            found.append(handle.read().strip())
    address, token = found
    link = http.client.HTTPConnection(address, timeout=60)
    link.request(method, path, json.dumps(body or {}) if method == "POST" else None,
                 {"Authorization": "Bearer " + token, "Content-Type": "application/json"})
    answer = json.loads(link.getresponse().read())
    link.close()
    return answer


# -- what is printed ----------------------------------------------------

def quantile(values, part):
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def first_rows(peers):
    rows = [("one request at a time: to the first token, us", "new p50", "added", "p99", "added",
             "kept p50", "added", "p99", "added")]
    for peer in peers:
        cells = []
        for how in ("new", "kept"):
            for part in (0.5, 0.99):
                value, base = (quantile(one.first[how], part) for one in (peer, peers[0]))
                cells += ["%.0f" % value, "" if peer is peers[0] else "%+.0f" % (value - base)]
        rows.append((peer.name, *cells))
    return rows


def stream_rows(peers, streams):
    rows = [("streams of 50 tokens/s", "streams", "first p50 ms", "p99", "late p50 ms", "p99",
             "p99 added", "CPU us/token", "RSS MiB", "KiB/stream", "held")]
    keys = sorted({key for peer in peers for key in peer.figures}, key=lambda key: key[::-1])
    for key in keys:
        for peer in peers:
            if key not in peer.figures:
                continue
            late, base = (one.median(key, "late_p99_ms") if key in one.figures else None
                          for one in (peer, peers[0]))
            said = peer.figures[key]
            proxy = peer is not peers[0]
            held = sum(one["held"] for one in said)
            rows.append((peer.name + (", mixed" if key[1] else ""), str(key[0]),
                         "%.2f" % peer.median(key, "first_p50_ms"),
                         "%.2f" % peer.median(key, "first_p99_ms"),
                         "%.3f" % peer.median(key, "late_p50_ms"), "%.2f" % late,
                         "%+.2f" % (late - base) if proxy and base is not None else "",
                         "%.1f" % peer.median(key, "cpu_us") if proxy else "",
                         "%.1f" % peer.median(key, "rss_mib") if proxy else "",
                         "%.1f" % ((peer.median(key, "rss_mib") - peer.idle_mib) * 1024 / key[0])
                         if proxy and key[0] == max(streams) else "",
                         "yes" if held == len(said) else "no" if not held else
                         "%d of %d" % (held, len(said))))
    return rows


def aims(peers, most):
    """[(holds, sentence)] of what is claimed of the door, as far as it was measured."""
    by_name = {peer.name: peer for peer in peers}
    door, found = by_name.get("door"), []
    if door is None:
        return found
    if "nginx" in by_name:
        added = {name: statistics.median(by_name[name].first["kept"])
                 - statistics.median(by_name["direct"].first["kept"]) for name in ("nginx", "door")}
        ratio = added["door"] / added["nginx"]
        found.append((ratio <= 2, "at most 2 times nginx's added first token on kept connections: %.2f times"
                      % ratio))
    for key in ((most, False), (most, True)):
        late = door.median(key, "late_p99_ms") if key in door.figures else None
        if late is not None:
            held = all(one["held"] for one in door.figures[key])
            found.append((held and late < 5, "%d %sstreams, p99 less than 5 ms late: %.1f ms%s" % (
                most, "mixed " * key[1], late, "" if held else ", not held")))
    if "litellm" in by_name and by_name["litellm"].held():
        ratio = door.held() / by_name["litellm"].held()
        found.append((ratio >= 20, "20 times LiteLLM's streams: %d to %d, %.0f times" % (
            door.held(), by_name["litellm"].held(), ratio)))
    return found


def summary(peers, most):
    """A row for each, as the README has it; CPU time and memory of whoever does not hold the most
    streams are of the most that it does."""
    table = Table({"new_ms": "first token later by, ms: new connection", "kept_ms": "kept connection",
                   "late_ms": "99 %% of tokens at most so late, ms: %d streams" % most,
                   "mixed_ms": "with slow readers and leavers", "cpu_us": "CPU a token, µs",
                   "mib": "memory, MiB", "held": "streams held"}, [NAMES[peer.name] for peer in peers])
    for peer in peers:
        figures = {"held": peer.held()}
        for how in ("new", "kept"):
            if peer.pids:
                added = statistics.median(peer.first[how]) - statistics.median(peers[-1].first[how])
                figures[how + "_ms"] = added / 1000
        for name, key in (("late_ms", (most, False)), ("mixed_ms", (most, True))):
            if key in peer.figures:
                figures[name] = peer.median(key, "late_p99_ms")
        at = (most if (most, False) in peer.figures else peer.held(), False)
        if peer.pids and at in peer.figures:
            figures.update(cpu_us=peer.median(at, "cpu_us"), mib=peer.median(at, "rss_mib"))
        table.add(NAMES[peer.name], **figures)
    return table


def measure(peers, streams, rounds, tokens):
    before = [peer.cpu_s() for peer in peers]
    for peer in peers:
        for how in ("new", "kept"):
            peer.ask("first", "count=10", "kept=%d" % (how == "kept"))  # warm
        peer.idle_mib = peer.rss_mib()
    time.sleep(1)
    before = [peer.cpu_s() for peer in peers]
    time.sleep(4)
    for peer, was in zip(peers, before):
        peer.idle_us = (peer.cpu_s() - was) / 4 * 1e6  # what it spends on other things, a second
    for turn in range(rounds):
        for how in ("new", "kept"):
            for _ in range(3):
                for peer in peers:
                    peer.measure_first(how, 100)
        for count in sorted(set(streams) | set(LITELLM_STREAMS)):
            for peer in peers:
                if count in peer.counts(streams) and not peer.beaten:
                    held = peer.measure(count, tokens, False)
                    peer.beaten = peer.slow and not held
        more = max([20 * peer.held() for peer in peers if peer.slow], default=0)
        for peer in peers:
            if more > max(streams) and not peer.slow and peer.name != "translated":
                peer.measure(more, tokens, False)  # the aim is 20 times what LiteLLM holds
        for peer in peers:
            peer.measure(max(streams) if not peer.slow else peer.held() or 8, tokens, True)
        for peer in peers:  # LiteLLM is pressed no further than to what it failed at, each round anew
            peer.beaten = False
        print("round %d of %d" % (turn + 1, rounds), file=sys.stderr)


def show(asked, peers, streams):
    if asked.json:
        print(json.dumps([{"name": peer.name, "first_us": peer.first, "idle_cpu_us_per_s": peer.idle_us,
                           "idle_mib": peer.idle_mib, "held": peer.held(),
                           "runs": sum(peer.figures.values(), [])} for peer in peers]))
    for rows in (first_rows(peers), stream_rows(peers, streams)):
        print_table(rows)
        print()
    for peer in peers[1:]:
        print("%s: held %d streams; idle %.1f MiB and %.2f ms of CPU a second (taken off above)" % (
            peer.name, peer.held(), peer.idle_mib, peer.idle_us / 1000))
    print()


def main():
    global STREAMS
    asked = options(
        __doc__, rounds=(3, 1, "of everything"), streams=("1,16,64,256,512", "16,512", "how many at once"),
        peers=(",".join(PEERS), "direct,nginx,door", "of these"), json=(False, False, "each figure as well"),
        realtime=(False, False, "as root: what is measured goes before other programs, on a machine "
                  "that has other work"))
    streams = sorted({int(word) for word in asked.streams.split(",")})
    names = ["direct", "door"] if asked.alone else asked.peers.split(",")
    if set(names) - set(PEERS):
        sys.exit("no such peer: %s" % ", ".join(sorted(set(names) - set(PEERS))))
    if asked.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # children inherit it
    with scratch() as folder, contextlib.ExitStack() as end:
        STREAMS = compile_streams(folder)
        bench = Bench(folder, end)
        peers = bench.start(names)
        measure(peers, streams, asked.rounds, 50 if asked.quick else 150)
    show(asked, peers, streams)
    most = max(streams)
    ours_first = sorted(peers, key=lambda peer: list(NAMES).index(peer.name))
    held = {peer.name: peer.held() for peer in peers}
    return finish(
        asked, "The front door: streams of 50 tokens a second",
        "with a tenant's token, every limit, metrics, guards and audit log on; slow readers and leavers are "
        "5 %% each. A stream is held when 99 %% of its tokens are less than 20 ms late.%s" % (
            " LiteLLM's CPU time and memory are of %d." % held["litellm"] if "litellm" in held else ""),
        summary(ours_first, most), aims(peers, most), bench.versions)


if __name__ == "__main__":
    sys.exit(main())
