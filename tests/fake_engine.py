#!/usr/bin/env python3
"""Plays `vllm serve` and `sglang serve`: flags, start, workers, routes, and how they end.

    vllm serve MODEL [flags]       sglang serve --model-path MODEL [flags]       --version
    python -m sglang.launch_server --model-path MODEL [flags]    (engines.py makes the package)

Which one: by the name of the program, or B9TESTS_PLAYS.  Unknown flags end it with exit 2, as
argparse does.  MODEL must be a folder with config.json and *.safetensors: nothing is downloaded.
What a test may set:

    FAKE_ENGINE_LOAD_S      how long the model loads, with a line of progress every tenth (0)
    FAKE_ENGINE_TOKENS      how many tokens an answer has (as many words as it says)
    FAKE_ENGINE_TOKEN_S     time for each token (0)
    FAKE_ENGINE_POLL_S      SGLang looks that often whether it is drained (0.1; the real one 5),
                            vLLM whether its engine lives (0.1; the real one 5)
    FAKE_ENGINE_VERSION     0.33.0 for vLLM, 0.5.23 for SGLang
    FAKE_ENGINE_FAULTS      "name" or "name=value", separated by commas:
        slow_start=S            nothing is said for S seconds, before it loads
        stall_load              loading never ends, and says nothing more
        crash_at_start[=N]      exit 1 (at the first N starts: counted in HOME)
        crash_while_loading     exit 1 half way
        out_of_memory           exit 1: not enough free GPU memory
        crash_while_serving=S   SIGKILL to itself S seconds after it is ready; workers stay
        worker_crash            the worker dies at the first generation
        hang_generate           an answer never has a token
        hang_http=S             no request is answered from S seconds after it is ready
        ignore_sigterm          SIGTERM and SIGINT do nothing
        orphan_worker           workers are in sessions of their own, ignore SIGTERM, and stay
"""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

ENV = os.environ


def faults():
    """{name: value} of FAKE_ENGINE_FAULTS; the value of a bare name is None."""
    found = {}
    for word in filter(None, ENV.get("FAKE_ENGINE_FAULTS", "").replace(" ", "").split(",")):
        name, _, value = word.partition("=")
        found[name] = float(value) if value else None
    return found


FAULTS = faults()
LOAD_S = float(ENV.get("FAKE_ENGINE_LOAD_S", 0))
TOKENS = int(ENV.get("FAKE_ENGINE_TOKENS", 0))
TOKEN_S = float(ENV.get("FAKE_ENGINE_TOKEN_S", 0))
POLL_S = float(ENV.get("FAKE_ENGINE_POLL_S", 0.1))
PLAYS = ENV.get("B9TESTS_PLAYS") or (
    "sglang" if os.path.basename(sys.argv[0]) in ("sglang", "launch_server.py") else "vllm")
VERSION = ENV.get("FAKE_ENGINE_VERSION") or {"vllm": "0.33.0", "sglang": "0.5.23"}[PLAYS]

OUTPUT = threading.Lock()


def write_line(text, stream=None):
    with OUTPUT:
        try:
            (stream or sys.stderr).write(text + "\n")
            (stream or sys.stderr).flush()
        except (OSError, ValueError):
            pass  # whoever read it is gone


def log(text, who="APIServer"):
    now = time.localtime()
    if PLAYS == "vllm":
        write_line("(%s pid=%d) INFO %s [serve.py:1] %s" % (
            who, os.getpid(), time.strftime("%m-%d %H:%M:%S", now), text))
    else:
        write_line("[%s] %s" % (time.strftime("%Y-%m-%d %H:%M:%S", now), text))


def die(text, code=1):
    write_line(text)
    sys.exit(code)


# ---------------------------------------------------------------------- flags

VLLM_FLAGS = {
    "text": "--host --uds --dtype --quantization -q --load-format --tokenizer --tokenizer-mode "
            "--chat-template --revision --download-dir --kv-cache-dtype --generation-config "
            "--root-path --uvicorn-log-level --config-format --ssl-keyfile --ssl-certfile "
            "--reasoning-parser --tool-call-parser --distributed-executor-backend --model "
            "--hf-token --attention-backend --runner --convert --override-generation-config",
    "int": "--port --tensor-parallel-size -tp --pipeline-parallel-size -pp --data-parallel-size "
           "-dp --max-model-len --max-num-seqs --max-num-batched-tokens --seed --shutdown-timeout "
           "--block-size --kv-cache-memory-bytes --max-num-queued-reqs --max-logprobs",
    "float": "--gpu-memory-utilization --device-memory-utilization --cpu-offload-gb",
    "many": "--served-model-name --api-key --allowed-origins --allowed-methods --allowed-headers "
            "--middleware --device-ids",
    "bool": "--enable-sleep-mode --enforce-eager --trust-remote-code --enable-log-requests "
            "--no-enable-log-requests --disable-log-stats --enable-prefix-caching "
            "--no-enable-prefix-caching --enable-lora --enable-auto-tool-choice "
            "--disable-uvicorn-access-log --disable-fastapi-docs --enable-server-load-tracking "
            "--allow-credentials --async-scheduling --no-async-scheduling --enable-chunked-prefill "
            "--enable-force-include-usage --enable-request-id-headers --skip-tokenizer-init",
}
SGLANG_FLAGS = {
    "text": "--model-path --model --host --served-model-name --tokenizer-path --dtype --device "
            "--quantization --load-format --api-key --admin-api-key --chat-template --log-level "
            "--log-level-http --kv-cache-dtype --revision --download-dir --attention-backend "
            "--reasoning-parser --tool-call-parser --weight-version --sampling-backend",
    "int": "--port --tp-size --tensor-parallel-size --tp --dp-size --dp --pp-size "
           "--context-length --max-queued-requests --max-running-requests --max-total-tokens "
           "--base-gpu-id --random-seed --chunked-prefill-size --nccl-port --dist-timeout "
           "--watchdog-timeout --gpu-id-step --max-prefill-tokens --cuda-graph-max-bs",
    "float": "--mem-fraction-static --schedule-conservativeness",
    "many": "--lora-paths",
    "bool": "--trust-remote-code --enable-metrics --skip-server-warmup --disable-cuda-graph "
            "--disable-radix-cache --enable-memory-saver --log-requests --is-embedding "
            "--skip-tokenizer-init --enable-torch-compile --enable-cache-report",
}


def parse(words):
    """The arguments.  Exit 2 where one is unknown, as the real ones do."""
    import argparse
    parser = argparse.ArgumentParser(prog=PLAYS + (" serve" if PLAYS == "vllm" else ""),
                                     allow_abbrev=False)
    if PLAYS == "vllm":
        parser.add_argument("model_tag", nargs="?")
    types = {"text": {}, "int": {"type": int}, "float": {"type": float}, "many": {"nargs": "+"},
             "bool": {"action": "store_true"}}
    flags = VLLM_FLAGS if PLAYS == "vllm" else SGLANG_FLAGS
    for kind, names in flags.items():
        for name in names.split():
            parser.add_argument(name, **types[kind])
    found = parser.parse_args(words)
    found.model = getattr(found, "model_tag", None) or getattr(found, "model_path", None) \
        or found.model
    if not found.model:
        parser.error("the following arguments are required: --model-path/--model")
    sizes = (found.tensor_parallel_size, getattr(found, "tp", None), getattr(found, "tp_size", None))
    found.workers = next((size for size in sizes if size), 1)
    return found


def check_model(arguments):
    """Exit 1 where the model is none that this engine could load."""
    folder = arguments.model
    if folder.endswith(".gguf") and PLAYS == "vllm":
        die("ValueError: GGUF needs the plugin: pip install vllm-gguf-plugin")
    if not os.path.exists(os.path.join(folder, "config.json")):
        die("OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't "
            "find them in the cached files.\n  %s is not the path to a directory containing a file "
            "named config.json" % folder)
    if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
        die("RuntimeError: Cannot find any model weights with `%s`" % folder)
    with open(os.path.join(folder, "config.json")) as handle:
        config = json.load(handle)
    longest = config.get("max_position_embeddings") or 2048
    wanted = getattr(arguments, "max_model_len", None) or getattr(arguments, "context_length", None)
    if wanted and wanted > longest and PLAYS == "vllm":
        die("ValueError: User-specified max_model_len (%d) is greater than the derived max_model_len "
            "(max_position_embeddings=%d.0 or model_max_length=None in model's config.json)."
            % (wanted, longest))
    arguments.context = wanted or longest
    if "out_of_memory" in FAULTS:
        if PLAYS == "vllm":
            die("ValueError: Free memory on device cuda:0 (1.02/79.1 GiB) on startup is less than "
                "desired GPU memory utilization (0.92, 72.77 GiB). Decrease GPU memory utilization "
                "or reduce GPU memory used by other processes.")
        die("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.")


# ---------------------------------------------------------------------- workers

def worker_main(name):
    """A child that lives as long as the other end of its stdin: it holds the GPU's memory."""
    if "orphan_worker" in FAULTS:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(600)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdin.buffer.read()
    return name


class Workers:
    """VLLM::EngineCore and its VLLM::Worker_TPn; sglang::scheduler_TPn and sglang::detokenizer."""

    def __init__(self, count):
        if PLAYS == "vllm":
            names = ["VLLM::EngineCore"] + ["VLLM::Worker_TP%d" % number
                                            for number in range(count) if count > 1]
        else:
            names = ["sglang::scheduler_TP%d" % number for number in range(count)]
            names.append("sglang::detokenizer")
        self.processes = [subprocess.Popen(
            [sys.executable, "-IS", os.path.abspath(__file__), "worker", name],
            stdin=subprocess.PIPE, start_new_session="orphan_worker" in FAULTS) for name in names]

    @property
    def alive(self):
        return all(process.poll() is None for process in self.processes)

    def kill_one(self):
        self.processes[0].kill()
        self.processes[0].wait()

    def stop(self):
        if "orphan_worker" in FAULTS:
            return
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


# ---------------------------------------------------------------------- HTTP

class Engine:
    """State of the process that answers."""

    def __init__(self, arguments):
        self.arguments = arguments
        named = arguments.served_model_name
        self.names = named if isinstance(named, list) else [named or arguments.model]
        keys = arguments.api_key
        self.keys = keys if isinstance(keys, list) else [keys] if keys else []
        if PLAYS == "vllm" and not self.keys and ENV.get("VLLM_API_KEY"):
            self.keys = [ENV["VLLM_API_KEY"]]
        self.workers = None
        self.ready_at = None
        self.draining = False
        self.sleeping = False
        self.running = 0
        self.total = 0
        self.lock = threading.Lock()

    def count(self, step):
        with self.lock:
            self.running += step
            self.total += max(step, 0)


ENGINE = None


def model_text(messages):
    words = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = " ".join(part.get("text", "") for part in content)
        words.append(content or "")
    return "\n".join(words)


def answer_tokens(prompt, most):
    """(tokens, finish reason)."""
    tokens = [" token"] * TOKENS if TOKENS else \
        ["You", " said", ":"] + [" " + word for word in prompt.split()[-20:]]
    if most is not None and most < len(tokens):
        return tokens[:most], "length"
    return tokens, "stop"


class HttpError(Exception):
    """An answer that is an error.  status, message, kind."""

    def __init__(self, status, message, kind, param=None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}
        if PLAYS == "sglang":
            self.body = {"object": "error", "message": message, "type": kind, "param": param,
                         "code": status}


def missing(name):
    return HttpError(400, "1 validation error:\n  {'type': 'missing', 'loc': 'body.%s', 'msg': "
                     "'Field required'}" % name, "Bad Request", "body." + name)


DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def make_handler():
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "uvicorn", ""
        disable_nagle_algorithm = True

        def log_message(self, *_):
            pass

        def log_request(self, code="-", size="-"):
            write_line('INFO:     127.0.0.1:%d - "%s" %s' % (
                self.client_address[1], self.requestline, int(code)), sys.stdout)

        def reply(self, status, value=None, kind="application/json"):
            body = b"" if value is None else value if isinstance(value, bytes) else \
                json.dumps(value, separators=(",", ":")).encode()
            self.send_response(status)
            if body:
                self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send_chunk(self, raw):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))

        def do_GET(self):
            self.serve(GETS)

        def do_POST(self):
            self.serve(POSTS)

        def serve(self, table):
            hang_s = FAULTS.get("hang_http")
            if hang_s is not None and time.monotonic() - ENGINE.ready_at > hang_s:
                threading.Event().wait()
            path = self.path.partition("?")[0]
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            handler = table.get(path)
            other = GETS if table is POSTS else POSTS
            try:
                if not self.authorized(path):
                    self.reply(401, {"error": "Unauthorized"})
                elif handler:
                    handler(self)
                elif path in other:
                    self.reply(405, {"detail": "Method Not Allowed"})
                else:
                    self.reply(404, {"detail": "Not Found"})
            except HttpError as error:
                self.reply(error.status, error.body)
            except OSError:
                self.close_connection = True  # the client left

        def authorized(self, path):
            guarded = path.startswith(("/v1", "/v2", "/inference", "/cohere")) if PLAYS == "vllm" \
                else not path.startswith(("/health", "/ready", "/metrics"))
            sent = self.headers.get("Authorization", "")
            keys = ENGINE.keys + ([ENGINE.arguments.admin_api_key] if PLAYS == "sglang" and
                                  ENGINE.arguments.admin_api_key else [])
            return not guarded or not keys or sent in ["Bearer " + key for key in keys]

        def fields(self):
            kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and PLAYS == "vllm":
                raise HttpError(400, "1 validation error:\n  Unsupported Media Type: Only "
                                "'application/json' is allowed", "Bad Request")
            try:
                value = json.loads(self.body)
            except ValueError as error:
                raise HttpError(400, "1 validation error:\n  {'type': 'json_invalid', 'ctx': "
                                "{'error': '%s'}}" % error, "Bad Request", "body.1")
            if not isinstance(value, dict):
                raise missing("")
            return value

    return Handler


def health(request):
    if PLAYS == "sglang":
        cheap = ENV.get("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "").lower() in ("0", "false")
        if not cheap and not ENGINE.draining:
            time.sleep(1)  # it generates a token
        good = ENGINE.workers.alive and not ENGINE.draining and "hang_generate" not in FAULTS
        return request.reply(200 if good or (cheap and not ENGINE.draining) else 503)
    return request.reply(200 if ENGINE.workers.alive else 503)


def ready(request):
    if PLAYS == "vllm":
        return request.reply(404, {"detail": "Not Found"})
    return request.reply(503 if ENGINE.draining else 200)


def version(request):
    request.reply(200, {"version": VERSION})


def models(request):
    owner = PLAYS
    request.reply(200, {"object": "list", "data": [
        {"id": name, "object": "model", "created": int(time.time()), "owned_by": owner,
         "root": ENGINE.arguments.model, "parent": None,
         "max_model_len": ENGINE.arguments.context} for name in ENGINE.names]})


def metrics(request):
    if PLAYS == "sglang" and not ENGINE.arguments.enable_metrics:
        return request.reply(404, {"detail": "Not Found"})
    name, label = ENGINE.names[0], 'model_name="%s"' % ENGINE.names[0]
    figures = {"vllm:num_requests_running{engine=\"0\",%s}" % label: ENGINE.running,
               "vllm:request_success_total{engine=\"0\",%s}" % label: ENGINE.total} \
        if PLAYS == "vllm" else {"sglang:num_running_reqs{%s}" % label: ENGINE.running,
                                 "sglang:num_requests_total{%s}" % label: ENGINE.total}
    text = "".join("%s %.1f\n" % pair for pair in figures.items())
    return request.reply(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8") or name


def model_info(request):
    request.reply(200, {"model_path": ENGINE.arguments.model, "tokenizer_path":
                        ENGINE.arguments.model, "is_generation": True, "served_model_name":
                        ENGINE.names[0], "weight_version": "default"})


def server_info(request):
    request.reply(200, {"model_path": ENGINE.arguments.model, "version": VERSION})


def ollama_tags(request):
    request.reply(200, {"models": [{"name": ENGINE.names[0], "model": ENGINE.names[0]}]})


def sleeping(request):
    request.reply(200, {"is_sleeping": ENGINE.sleeping})


def set_sleeping(value):
    def change(request):
        ENGINE.sleeping = value
        request.reply(200)
    return change


def checked_generation(request):
    """The fields of a generation that may begin.  Raises: HttpError."""
    fields = request.fields()
    name = fields.get("model")
    if PLAYS == "vllm" and name is not None and name not in ENGINE.names:
        raise HttpError(404, "The model `%s` does not exist. Valid aliases: %s." % (
            name, ", ".join(ENGINE.names)), "NotFoundError", "model")
    if ENGINE.draining:
        raise HttpError(503, "Server is shutting down.", "ServiceUnavailable")
    if "worker_crash" in FAULTS:
        ENGINE.workers.kill_one()
    if not ENGINE.workers.alive:
        raise HttpError(500, DEAD, "InternalServerError")
    return fields


def generated(tokens):
    """Yield the tokens in their time.  Raises: HttpError where the worker dies."""
    for token in tokens:
        if "hang_generate" in FAULTS:
            threading.Event().wait()
        time.sleep(TOKEN_S)
        if not ENGINE.workers.alive:
            raise HttpError(500, DEAD, "InternalServerError")
        yield token


def respond(request, prompt, fields, kind, choice):
    """choice(text, reason, first) -> the one choice; first None: of an answer in one piece."""
    most = fields.get("max_completion_tokens", fields.get("max_tokens"))
    if most is not None and (not isinstance(most, int) or most < 1):
        raise HttpError(400, "max_tokens must be at least 1, got %s. (parameter=max_tokens, "
                        "value=%s)" % (most, most), "BadRequestError",
                        "max_tokens")
    tokens, reason = answer_tokens(prompt, most)
    count = len(prompt.split()) + 1
    usage = {"prompt_tokens": count, "completion_tokens": len(tokens),
             "total_tokens": count + len(tokens)}
    head = {"id": "%s-%s" % ("chatcmpl" if kind.startswith("chat") else "cmpl", os.urandom(16).hex()),
            "object": kind, "created": int(time.time()),
            "model": fields.get("model") or ENGINE.names[0]}
    if not fields.get("stream"):
        text = "".join(generated(tokens))
        request.reply(200, dict(head, choices=[choice(text, reason, None)], usage=usage))
        return
    stream(request, tokens, reason, dict(head, object=kind + (
        ".chunk" if kind.startswith("chat") else "")), choice,
        usage if (fields.get("stream_options") or {}).get("include_usage") else None)


def stream(request, tokens, reason, head, choice, usage):
    request.send_response(200)
    request.send_header("Content-Type", "text/event-stream; charset=utf-8")
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()

    def send(value):
        request.send_chunk(b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n")
    try:
        if head["object"] == "chat.completion.chunk":
            send(dict(head, choices=[choice("", None, True)]))
        for number, token in enumerate(generated(tokens), 1):
            send(dict(head, choices=[choice(token, reason if number == len(tokens) else None,
                                            False)]))
        if usage:
            send(dict(head, choices=[], usage=usage))
    except HttpError as error:
        send(error.body)
    request.send_chunk(b"data: [DONE]\n\n")
    request.wfile.write(b"0\r\n\r\n")


def chat(request):
    fields = checked_generation(request)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages or not all(
            isinstance(message, dict) for message in messages):
        raise missing("messages")

    def choice(text, reason, first):
        if first is None:
            return {"index": 0, "message": {"role": "assistant", "content": text},
                    "logprobs": None, "finish_reason": reason}
        delta = dict({"role": "assistant"} if first else {}, content=text)
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    counted(respond, request, model_text(messages), fields, "chat.completion", choice)


def completions(request):
    fields = checked_generation(request)
    prompt = fields.get("prompt")
    if not isinstance(prompt, str):
        raise missing("prompt")
    counted(respond, request, prompt, fields, "text_completion",
            lambda text, reason, _: {"index": 0, "text": text, "logprobs": None,
                                     "finish_reason": reason})


def counted(work, *arguments):
    ENGINE.count(1)
    try:
        work(*arguments)
    finally:
        ENGINE.count(-1)


GETS = {"/health": health, "/v1/models": models, "/metrics": metrics}
POSTS = {"/v1/chat/completions": chat, "/v1/completions": completions}
if PLAYS == "sglang":
    GETS.update({"/health_generate": health, "/ready": ready, "/model_info": model_info,
                 "/get_model_info": model_info, "/server_info": server_info,
                 "/get_server_info": server_info, "/api/tags": ollama_tags})
else:
    GETS["/version"] = version
    if ENV.get("VLLM_SERVER_DEV_MODE") == "1":
        GETS["/is_sleeping"] = sleeping
        POSTS.update({"/sleep": set_sleeping(True), "/wake_up": set_sleeping(False)})


# ---------------------------------------------------------------------- the life of the process

def crashes_now():
    if "crash_at_start" not in FAULTS:
        return False
    if FAULTS["crash_at_start"] is None:
        return True
    path = os.path.join(ENV["HOME"], ".fake-engine-starts")
    with open(path, "ab") as handle:
        handle.write(b".")
    return os.path.getsize(path) <= FAULTS["crash_at_start"]


def bind(arguments):
    """A socket that is bound, and not listening yet.  vLLM binds before it loads and listens after:
    whoever took the port in between is noticed late."""
    if getattr(arguments, "uds", None):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(arguments.uds)
        return sock
    host = arguments.host or ("" if PLAYS == "vllm" else "127.0.0.1")
    port = arguments.port or {"vllm": 8000, "sglang": 30000}[PLAYS]
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        taken(port, error)
    return sock


def taken(port, error):
    if PLAYS == "vllm":
        die("Traceback (most recent call last):\n    sock.bind(addr)\nOSError: %s" % error)
    die("ERROR:    [Errno %d] error while attempting to bind on address ('127.0.0.1', %d): address "
        "already in use" % (error.errno, port))


def load():
    """Take the time that loading takes; progress as both engines show it."""
    if "stall_load" in FAULTS:
        time.sleep(100000)
    for step in range(10 if LOAD_S else 0):
        time.sleep(LOAD_S / 10)
        log("Loading safetensors checkpoint shards: %3d%% Completed | %d/10" % (
            10 * step + 10, step + 1), "EngineCore")
        if step == 4 and "crash_while_loading" in FAULTS:
            die("RuntimeError: Engine core initialization failed. See root cause above.")
    if not LOAD_S and "crash_while_loading" in FAULTS:
        die("RuntimeError: Engine core initialization failed. See root cause above.")


def make_server(sock, unix):
    from http.server import ThreadingHTTPServer
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(), bind_and_activate=False)
    server.socket.close()
    server.socket, server.daemon_threads = sock, True
    server.block_on_close = False
    if unix:
        server.get_request = lambda: (sock.accept()[0], ("unix", 0))
    sock.listen(2048)
    return server


def wait_for_end(stop):
    """Until SIGTERM, or until the engine's process is found dead."""
    crash_s = FAULTS.get("crash_while_serving", -1)
    while not stop.wait(POLL_S):
        if "crash_while_serving" in FAULTS and \
                time.monotonic() - ENGINE.ready_at > (crash_s or 0.2):
            os.kill(os.getpid(), signal.SIGKILL)
        if not ENGINE.workers.alive:
            log("ERROR Engine core proc died unexpectedly, shutting down.")
            return 1
    return 0


def drain():
    """vLLM aborts what runs after --shutdown-timeout, at once without; SGLang waits for ever."""
    ENGINE.draining = True
    if PLAYS == "sglang":
        limit_s = 0 if ENV.get("SGL_FORCE_SHUTDOWN") == "1" else float("inf")
    else:
        limit_s = ENGINE.arguments.shutdown_timeout or 0
    until = time.monotonic() + limit_s
    while ENGINE.running and time.monotonic() < until:
        time.sleep(POLL_S)


def serve(arguments):
    global ENGINE
    ENGINE = Engine(arguments)
    stop = threading.Event()

    def interrupted(*_):
        if "ignore_sigterm" not in FAULTS:
            stop.set()
            if ENGINE.ready_at is None:
                raise SystemExit(0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupted)
    time.sleep(FAULTS.get("slow_start") or 0)
    log("version %s, model %s" % (VERSION, arguments.model))
    check_model(arguments)
    if crashes_now():
        die("RuntimeError: this stand-in was told to crash at start")
    sock = bind(arguments) if PLAYS == "vllm" else None
    try:
        ENGINE.workers = Workers(arguments.workers)
        load()
        sock = sock or bind(arguments)
        try:
            server = make_server(sock, getattr(arguments, "uds", None))
        except OSError as error:
            taken(arguments.port, error)
        ENGINE.ready_at = time.monotonic()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        log("Starting %s server on http://%s:%s" % (PLAYS, *sock.getsockname()[:2])
            if sock.family != socket.AF_UNIX else "Starting on " + arguments.uds)
        write_line("INFO:     Started server process [%d]\nINFO:     Application startup complete."
                   % os.getpid())
        if PLAYS == "sglang":
            log("The server is fired up and ready to roll!")
        code = wait_for_end(stop)
        drain()
    finally:
        if ENGINE.workers:
            ENGINE.workers.stop()
    os._exit(code)


def main(words):
    if words[:1] == ["worker"]:
        worker_main(words[1])
    elif words[:1] in (["--version"], ["-v"], ["version"]):
        write_line(VERSION if PLAYS == "vllm" else "sglang version: " + VERSION, sys.stdout)
    elif words[:1] == ["serve"]:
        serve(parse(words[1:]))
    elif os.path.basename(sys.argv[0]) == "launch_server.py":
        write_line("UserWarning: 'python -m sglang.launch_server' is still supported, but "
                   "'sglang serve' is the recommended entrypoint.")
        serve(parse(words))
    else:
        die("usage: %s [-h] [-v] {chat,complete,serve,...} ...\n%s: error: invalid choice: %r"
            % (PLAYS, PLAYS, " ".join(words[:1])), 2)


if __name__ == "__main__":
    main(sys.argv[1:])
