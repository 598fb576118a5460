"""Section 11c and `report`: every figure against sums made from the lines by other means."""
import collections
import hashlib
import json
import math
import os
import random
import stat
import time

import pytest

import b9agent

DAY_S = 86400.0
MONDAY_S = 1762732800.0  # 2025-11-10
WEEK = ["2025-11-%02d" % day for day in range(10, 17)]
NOW_S = MONDAY_S + 12 * DAY_S + 3600


# -- the log: 11b's own, or what stands in for it until it is there ---------------------

def chained(records):
    """Lines as 11b writes them."""
    previous, lines = "0" * 64, []
    for number, record in enumerate(records, 1):
        body = json.dumps(dict({"v": 1, "seq": number}, **record, prev=previous))[:-1]
        previous = hashlib.sha256(body.encode()).hexdigest()
        lines.append('%s,"hash":"%s"}' % (body, previous))
    return lines


def write_log(state, lines):
    """Into a file for each day, as it is on disk."""
    folder = state / "audit"
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    state.chmod(0o700)
    for line in lines:
        day = json.loads(line)["time"][:10] if line.startswith("{") else WEEK[0]
        with open(folder / (day + ".jsonl"), "a") as handle:
            handle.write(line + "\n")
    return folder


def stand_in_read(folder, from_s, to_s):
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as handle:
            for raw in handle:
                try:
                    line = json.loads(raw)
                    at = time.mktime(time.strptime(line["time"][:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone
                except (ValueError, TypeError, KeyError):
                    continue
                if (from_s is None or at >= from_s) and (to_s is None or at < to_s):
                    yield line


Verdict = collections.namedtuple("Verdict", "ok lines files first_seq last_seq head faults torn")
Fault = collections.namedtuple("Fault", "file line what")


def stand_in_verify(folder, known_head=""):
    previous, first, last, lines, faults, files = None, 0, 0, 0, [], 0
    for name in sorted(os.listdir(folder)):
        files += 1
        with open(os.path.join(folder, name), "rb") as handle:
            for number, raw in enumerate(handle, 1):
                lines += 1
                body, _, end = raw.decode().rstrip("\n").rpartition(',"hash":"')
                try:
                    line = json.loads(raw)
                except ValueError:
                    line = {"seq": last, "prev": ""}
                first, last = first or line["seq"], line["seq"]
                if hashlib.sha256(body.encode()).hexdigest() != end[:-2] or (
                        previous not in (None, line["prev"])):
                    faults.append(Fault(name, number, "the hash differs"))
                previous = end[:-2]
    return Verdict(not faults, lines, files, first, last, "%d:%s" % (last, previous), tuple(faults), False)


@pytest.fixture(autouse=True)
def audit_reader(monkeypatch):
    for name, stand_in in (("read_audit", stand_in_read), ("verify_audit", stand_in_verify)):
        if not hasattr(b9agent, name):
            monkeypatch.setattr(b9agent, name, stand_in, raising=False)


# -- a recorded week -----------------------------------------------------------------------

def stamp(at_s):
    whole = int(at_s)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + ".%03dZ" % ((at_s - whole) * 1000)


TENANTS = {"claims-desk": ["ada@insurer.example", "grace@insurer.example"], "research": ["token-2f"],
           "night batch": ["token-77"], "support": ["sam@insurer.example", "kim@insurer.example", ""]}
MODELS = {"llama3.1:8b": "sha256:" + "a1" * 32, "qwen2.5:14b": "sha256:" + "b2" * 32,
          "claims-tuned:latest": "sha256:" + "c3" * 32}


def one_request(chance, at_s):
    tenant = chance.choice(list(TENANTS))
    model = chance.choices(list(MODELS), (6, 3, 1))[0]
    outcome = chance.choices(("ok", "refused", "failed", "left"), (90, 5, 2, 3))[0]
    took_s, cold = chance.expovariate(1 / 4) + 0.2, chance.random() < 0.01
    line = {"time": stamp(at_s), "kind": "request", "id": "req-%x" % chance.getrandbits(64),
            "tenant": tenant, "identity": chance.choice(TENANTS[tenant]), "peer": "100.64.0.%d" % chance.randrange(9),
            "path": "/v1/chat/completions", "task": "chat", "stream": True, "model": model,
            "digest": MODELS[model], "engine": "ollama", "prompt_sha256": "%064x" % chance.getrandbits(256),
            "prompt_tokens": chance.randrange(20, 3000), "completion_tokens": chance.randrange(1, 800),
            "tokens_basis": "engine", "queued_ms": chance.randrange(50), "total_ms": round(took_s * 1000),
            "first_token_ms": round(chance.expovariate(1 / 300) + 40 + cold * 9000), "cold": cold,
            "load_ms": chance.randrange(4000, 30000) if cold else None, "gpu_seconds": round(took_s * 0.8, 3),
            "outcome": outcome, "status": 200, "reason": "", "guards": []}
    priced = at_s > MONDAY_S + 1.5 * DAY_S  # the price was set on Tuesday
    line["usd"] = round(line["gpu_seconds"] * 0.0006, 6) if priced else None
    basis = chance.choices(("measured", "estimated", ""), (8, 1, 1))[0]
    line.update(energy_basis=basis, energy_wh=round(took_s * 0.07, 4) if basis else None,
                co2e_g=round(took_s * 0.07 * 0.38, 4) if basis else None)
    if outcome == "refused":
        reason = chance.choice(("quota_tokens", "cold_starts", "duplicate", "unknown_model"))
        line.update(status=429, reason=reason, prompt_tokens=0, completion_tokens=0, gpu_seconds=0.0, cold=False,
                    load_ms=None, first_token_ms=None, guards=[reason] if reason in ("cold_starts", "duplicate") else [],
                    usd=None, energy_wh=None, energy_basis="", co2e_g=None)
    elif outcome == "failed":
        line.update(status=502, reason=chance.choice(("engine_failed", "engine_silent")), first_token_ms=None)
    elif outcome == "left":
        line.update(status=499, reason="client_left")
    return line


def event(at_s, name, level="notice", **fields):
    return dict({"time": stamp(at_s), "kind": "event", "event": name, "level": level}, **fields)


def a_week(seed=7, requests=5000):
    """Records of 7 days: starts, an engine's crash, a kill, a full disk, strangers at the door."""
    chance = random.Random(seed)
    started = dict(version="0.1.0", settings_sha256="5e" * 32, machine_id="0badcafe", retention_days=184)
    found = [event(MONDAY_S + 60, "agent_started", **started),
             event(MONDAY_S + 75, "inference_ready", engine="ollama")]
    times = sorted(MONDAY_S + 100 + 6.9 * DAY_S * chance.random() for _ in range(requests))
    found += [one_request(chance, at_s) for at_s in times if not 2.2 < (at_s - MONDAY_S) / DAY_S < 2.5]
    for line in list(found):
        if line.get("cold") and line["outcome"] != "refused":
            at_s = MONDAY_S + 50
            found.append(dict(event(at_s, "model_loaded", "info", model=line["model"], seconds=line["load_ms"] / 1000,
                                    why="request"), time=line["time"]))
    at = lambda days: MONDAY_S + days * DAY_S
    found += [event(at(1.5), "tenants_changed", names=sorted(TENANTS), sha256="ab" * 32),
              event(at(2.5), "agent_started", **dict(started, settings_sha256="77" * 32)),
              {"time": stamp(at(2.5) - 1), "kind": "torn", "bytes": 211, "file": "2025-11-12.jsonl"},
              event(at(3.1), "inference_failed", "error", what="ollama ended by signal 9", engine="ollama"),
              event(at(3.1) + 20, "inference_ready", engine="ollama"),
              event(at(4.4), "engine_wedged", "warning", engine="ollama", model="qwen2.5:14b"),
              event(at(4.9), "audit_failing", "error", what="No space left on device"),
              {"time": stamp(at(4.95)), "kind": "gap", "lost": 37, "why": "the disk was full"},
              {"time": stamp(at(5.5)), "kind": "refusals", "reason": "not_known", "count": 1893, "tenant": ""},
              {"time": stamp(at(5.6)), "kind": "refusals", "reason": "requests_per_minute", "count": 212,
               "tenant": "night batch"},
              event(at(6.2), "guard_tripped", "warning", code="thrash", model="claims-tuned:latest"),
              event(at(6.95), "agent_stopped", reason="SIGTERM")]
    return sorted(found, key=lambda line: line["time"])


BOOK = {"models": {
    "llama3.1:8b": {"name": "llama3.1:8b", "engine": "ollama", "manifest_digest": "a1" * 32, "layers": [],
                    "source": "registry.ollama.ai/library/llama3.1", "license": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT",
                    "parameters": "8.0B", "quantization": "Q4_K_M", "pulled_by": "ada", "pulled_at": "2025-10-02T09:11:00Z",
                    "verified_at": "2025-11-01T03:00:00Z", "verified_ok": True},
    "qwen2.5:14b": {"name": "qwen2.5:14b", "engine": "ollama", "manifest_digest": "dd" * 32, "layers": [],
                    "source": "registry.ollama.ai/library/qwen2.5", "license": "Apache License", "parameters": "14.8B",
                    "quantization": "Q4_K_M", "pulled_by": "ops", "pulled_at": "2025-10-20T10:00:00Z"}}}


@pytest.fixture(scope="module")
def week():
    return chained(a_week())


def run(capsys, state, *arguments):
    """`b9agent.py report …` in this process: (exit code, stdout, stderr)."""
    code = b9agent.main(["report", "--state-dir", str(state), "--config", str(state / "none.yaml"), *arguments])
    return (code, *capsys.readouterr())
