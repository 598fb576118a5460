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
def audit_reader(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
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
    code = b9agent.main(["report", "--state-dir", str(state), *arguments])
    return (code, *capsys.readouterr())


@pytest.fixture
def state_of_week(tmp_path, week):
    write_log(tmp_path / "state", week)
    (tmp_path / "state" / "models.json").write_text(json.dumps(BOOK))
    return tmp_path / "state"


@pytest.fixture
def week_ago(monkeypatch):
    """Today is the 22nd of November 2025."""
    monkeypatch.setattr(b9agent.time, "time", lambda: NOW_S)


PERIOD = ("--from", WEEK[0], "--to", WEEK[-1])


# -- the same figures, by plain sums over the lines -------------------------------------------

def sums_of(lines):
    """Every figure of a row, from the lines of its requests, by nothing of ours."""
    done = [line for line in lines if line["outcome"] != "refused"]
    cold = [line for line in done if line["cold"]]
    told = {"requests": len(lines), "cold_starts": len(cold), "cold_start_seconds_unknown": sum(
        line["load_ms"] is None for line in cold)}
    told.update((name, sum(line["outcome"] == name for line in lines)) for name in ("ok", "refused", "failed", "left"))
    for name in ("prompt_tokens", "completion_tokens", "gpu_seconds", "usd", "energy_wh", "co2e_g"):
        known = [line[name] for line in lines if line[name] is not None]
        told[name] = math.fsum(known) if known else None
        told[name + "_unknown"] = sum(line[name] is None for line in done)
    told["cold_start_seconds"] = math.fsum(line["load_ms"] / 1000 for line in cold)
    for basis in ("measured", "estimated"):
        told["energy_%s_wh" % basis] = None if told["energy_wh"] is None else math.fsum(
            line["energy_wh"] for line in lines if line["energy_basis"] == basis)
    first = sorted(line["first_token_ms"] for line in lines if line["first_token_ms"] is not None)
    for name, share in (("median", 50), ("p95", 95)):
        told["first_token_ms_" + name] = float("%.2g" % first[math.ceil(share * len(first) / 100) - 1]) if first else None
    return told


def of_requests(week):
    return [line for line in map(json.loads, week) if line["kind"] == "request"]


def grouped(lines, *names):
    found = collections.defaultdict(list)
    for line in lines:
        found[tuple(line["time"][:10] if name == "day" else line[name] for name in names)].append(line)
    return found


def same(row, told):
    assert set(told) <= set(row)
    for name, value in told.items():
        assert row[name] == (value if value is None else pytest.approx(value, abs=2e-6)), name


def as_json(capsys, state, *arguments):
    code, out, err = run(capsys, state, "--json", *arguments)
    assert (code, err) == (0, "")
    return json.loads(out)


def test_every_figure_of_the_json_is_what_the_lines_come_to(capsys, state_of_week, week, week_ago):
    report, lines = as_json(capsys, state_of_week, *PERIOD), of_requests(week)
    assert len(lines) > 4500
    same(report["totals"], sums_of(lines))
    for part, names in (("by_tenant", ("tenant",)), ("by_tenant_model", ("tenant", "model")), ("by_day", ("day",))):
        groups = grouped(lines, *names)
        assert [tuple(row[name] for name in names) for row in report[part]] == sorted(groups)
        for row in report[part]:
            same(row, sums_of(groups[tuple(row[name] for name in names)]))
            assert set(row) == set(sums_of(lines)) | set(names), "a figure that nobody recomputes"
    every = list(map(json.loads, week))
    reasons = collections.Counter((line["outcome"], line["reason"]) for line in lines if line["outcome"] != "ok")
    in_sums = collections.Counter()
    for line in every:
        if line["kind"] == "refusals":
            in_sums["refused", line["reason"]] += line["count"]
    assert report["reasons"] == [{"outcome": key[0], "reason": key[1], "requests": reasons[key], "in_sums": in_sums[key]}
                                 for key in sorted({*reasons, *in_sums})]
    guards = collections.Counter(code for line in lines for code in line["guards"])
    assert {row["code"]: row["requests"] for row in report["guards"]} == guards
    assert report["lines"] == dict.fromkeys(report["lines"], 0) | {
        "read": len(week), "lost": 37, "torn": 1, "summed": 212, "strangers": 1893, "runs": 2, "incidents": 5,
        "changes": 6}
    assert report["period"] == {"from": WEEK[0], "to": WEEK[-1], "first_line": every[0]["time"],
                                "last_line": every[-1]["time"]}


def test_every_figure_of_the_evidence_is_what_the_lines_come_to(capsys, state_of_week, week, week_ago):
    report, lines = as_json(capsys, state_of_week, "--evidence", *PERIOD), of_requests(week)
    used = [line for line in lines if line["outcome"] != "refused"]

    def spans(rows, *names, count="requests"):
        return [dict(zip(names, key), **{count: len(of), "first": min(line["time"] for line in of),
                                         "last": max(line["time"] for line in of)})
                for key, of in sorted(grouped(rows, *names).items())]
    assert report["uses"] == spans(used, "day", "model")
    assert report["who"] == spans(lines, "tenant", "identity")
    events = [dict(line, event=line.get("event", line["kind"]), level=line.get("level", ""))
              for line in map(json.loads, week) if line["kind"] not in ("request", "refusals")]
    assert report["events"] == spans(events, "event", "level", count="times")
    loads = [line for line in events if line["event"] == "model_loaded"]
    for row in report["models"]:
        mine = [line["seconds"] for line in loads if line["model"] == row["model"]]
        assert (row["loads"], row["load_seconds"]) == (len(mine), pytest.approx(sum(mine)))
        assert row["requests"] == sum(line["model"] == row["model"] for line in used)
        assert row["digests"] == [{"digest": MODELS[row["model"]], "requests": row["requests"]}]
    assert [row["model"] for row in report["models"]] == sorted(MODELS)


def numbers_of(markdown, title):
    """A table of the Markdown: [{head: cell}], the texts of cells without their code spans."""
    rows = markdown.split("\n## %s\n" % title)[1].split("\n## ")[0].split("\n")
    rows = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    return [dict(zip(rows[0], row)) for row in rows[2:]]


TABLES = {"Usage by tenant": (("tenant",), "requests ok refused failed left gpu_seconds usd energy_wh co2e_g"),
          "Requests by tenant and model": (("tenant", "model"), "requests ok refused failed left "
                                           "first_token_ms_median first_token_ms_p95"),
          "Work by tenant and model": (("tenant", "model"), "prompt_tokens completion_tokens gpu_seconds usd"),
          "Energy by tenant and model": (("tenant", "model"), "energy_wh energy_measured_wh energy_estimated_wh co2e_g "
                                         "cold_starts cold_start_seconds"),
          "Usage by day": (("day",), "requests ok refused failed left prompt_tokens completion_tokens gpu_seconds usd "
                           "energy_wh")}


def is_figure(cell, told, name):
    """Whether a cell says a sum of ours, to its last digit, and how many requests it lacks."""
    number, _, lacking = cell.partition(" ")
    if told[name] is None:
        return cell == ("not set" if name == "usd" else "not known")
    digits = len(number.partition(".")[2])
    assert (lacking.strip("()").replace(",", "") or "0") == str(told.get(name + "_unknown", 0)), (cell, name)
    return abs(float(number.replace(",", "")) - told[name]) <= 0.5000001 * 10 ** -digits


@pytest.mark.parametrize("title", TABLES)
def test_every_number_of_the_markdown_is_what_the_lines_come_to(capsys, state_of_week, week, week_ago, title):
    names, columns = TABLES[title]
    _, markdown, _ = run(capsys, state_of_week, *PERIOD)
    groups = grouped(of_requests(week), *names)
    rows = numbers_of(markdown, title)
    assert len(rows) == len(groups) + 1
    for row in rows:
        cells = list(row.values())
        lines = of_requests(week) if cells[0] == "total" else groups[tuple(cells[:len(names)])]
        told = sums_of(lines)
        assert len(cells) == len(names) + len(columns.split())
        assert all(is_figure(cell, told, name) for cell, name in zip(cells[len(names):], columns.split())), row


def test_the_totals_in_words_and_the_small_tables(capsys, state_of_week, week, week_ago):
    _, markdown, _ = run(capsys, state_of_week, "--evidence", *PERIOD)
    told, names = sums_of(of_requests(week)), list(sums_of([]))
    found = [line.rpartition(": ")[2] for line in markdown.split("\n## Totals\n")[1].split("\n## ")[0].split("\n")
             if line.startswith("- ")]
    order = ("requests ok refused failed left prompt_tokens completion_tokens gpu_seconds usd energy_wh energy_measured_wh "
             "energy_estimated_wh co2e_g cold_starts cold_start_seconds first_token_ms_median first_token_ms_p95").split()
    assert set(order) | {name for name in names if name.endswith("_unknown")} == set(names)
    assert len(found) == len(order) and all(is_figure(cell, told, name) for cell, name in zip(found, order))
    report = as_json(capsys, state_of_week, "--evidence", *PERIOD)
    for title, part, fields in (("Refused and failed", "reasons", ("requests", "in_sums")),
                                ("Guard trips", "guards", ("requests",)), ("Periods of use", "uses", ("requests",)),
                                ("Who", "who", ("requests",)), ("Events in sums", "events", ("times",))):
        rows = numbers_of(markdown, title)
        assert len(rows) == len(report[part])
        for row, told in zip(rows, report[part]):
            cells = [cell.replace(",", "") for cell in row.values()]
            assert all(str(told[field]) in cells for field in fields)
            if "first" in told:
                assert (row["first"], row["last"]) == tuple(told[end][:19].replace("T", " ") for end in ("first", "last"))


# -- evidence ---------------------------------------------------------------------------------

def test_when_the_agent_ran_and_what_happened(capsys, state_of_week, week, week_ago):
    report = as_json(capsys, state_of_week, "--evidence", *PERIOD)
    lines = list(map(json.loads, week))
    started = [line["time"] for line in lines if line.get("event") == "agent_started"]
    killed = max(line["time"] for line in lines if line["time"] < started[1] and line["kind"] != "torn")
    assert report["runs"] == [{"from": started[0], "to": killed, "end": "no stop was recorded"},
                              {"from": started[1], "to": lines[-1]["time"], "end": "stopped"}]
    assert [row["event"] for row in report["incidents"]] == ["torn", "inference_failed", "engine_wedged",
                                                             "audit_failing", "gap"]
    assert [row["event"] for row in report["changes"]] == [
        "agent_started", "inference_ready", "tenants_changed", "agent_started", "inference_ready", "agent_stopped"]
    assert "settings=changed" not in report["changes"][0]["told"]
    assert report["changes"][3]["told"].startswith("settings=changed ")
    assert "claims-desk" in report["changes"][2]["told"] and report["machine_id"] == "0badcafe"


def test_models_with_their_origin_and_those_without(capsys, state_of_week, week_ago):
    report = as_json(capsys, state_of_week, "--evidence", *PERIOD)
    rows = {row["model"]: row for row in report["models"]}
    assert rows["llama3.1:8b"]["as_pulled"] is True and rows["llama3.1:8b"]["verified_ok"] is True
    assert rows["qwen2.5:14b"]["as_pulled"] is False, "its digest is not the one that was pulled"
    assert rows["claims-tuned:latest"]["known"] is False and rows["claims-tuned:latest"]["as_pulled"] is None
    assert rows["llama3.1:8b"]["license"].startswith("LLAMA 3.1") and rows["qwen2.5:14b"]["pulled_by"] == "ops"
    notes = "\n".join(report["notes"])
    assert "knows nothing (1): `claims-tuned:latest`" in notes and "by their digest (1): `qwen2.5:14b`" in notes
    (state_of_week / "models.json").write_text("{")
    notes = as_json(capsys, state_of_week, "--evidence", *PERIOD)["notes"]
    assert any("knows nothing (3)" in note for note in notes)
    assert (state_of_week / "models.json").read_text() == "{", "a report moves nothing aside"


def test_integrity_says_the_verdict_and_its_head(capsys, state_of_week, week, week_ago):
    head = "%d:%s" % (len(week), json.loads(week[-1])["hash"])
    report = as_json(capsys, state_of_week, "--evidence", *PERIOD)
    assert report["integrity"]["ok"] is True and report["integrity"]["head"] == head
    _, markdown, _ = run(capsys, state_of_week, "--evidence", *PERIOD)
    assert "`%s`" % head in markdown and "The chain of hashes holds" in markdown
    path = state_of_week / "audit" / (WEEK[3] + ".jsonl")
    path.write_text(path.read_text().replace('"tenant": "research"', '"tenant": "reserach"', 1))
    _, markdown, _ = run(capsys, state_of_week, "--evidence", *PERIOD)
    notes = markdown.split("## Read this first\n")[1].split("\n## ")[0]
    assert "THE LOG WAS CHANGED, OR IS DAMAGED" in notes
    assert "DOES NOT HOLD" in markdown and "Fault in `%s.jsonl`, line " % WEEK[3] in markdown


@pytest.mark.parametrize("keep_days, oldest, says", [
    (184, "2025-11-10T00:00:00.000Z", (True, False, 12)), (30, "2025-11-10T00:00:00.000Z", (False, False, 12)),
    (400, "2025-05-22T23:59:59.000Z", (True, True, 184)), (183, "2025-05-23T00:00:00.000Z", (False, False, 183))])
def test_retention_and_whether_six_months_are_covered(keep_days, oldest, says):
    told = b9agent.retention_evidence(oldest, keep_days, NOW_S)
    assert (told["six_months_set"], told["six_months_held"], told["days_held"]) == says
    text = " ".join(told["says"])
    assert ("NOT COVERED" in text) is not says[0] and ("does not reach back" in text) is not says[1]
    assert "%d days (audit.keep_days)" % keep_days in text and "%d days ago" % says[2] in text


def test_what_it_does_not_cover_is_said_and_what_the_law_asks_is_named(capsys, state_of_week, week_ago):
    _, markdown, _ = run(capsys, state_of_week, "--evidence", *PERIOD)
    last = markdown.split("## What this report does not cover\n")[1]
    for word in ("no legal advice", "high-risk", "Biometric", "front door", "Inputs and outputs are not recorded",
                 "tenths of a second", "tokens and log-ins", "kept elsewhere"):
        assert word in last, word
    for word in ("2024/1689", "Art. 12(1)", "Art. 12(2)(a)", "Art. 12(3)", "Art. 19(1)", "Art. 26(5)", "Art. 26(6)",
                 "six months"):
        assert word in markdown, word
    titles = [line[3:] for line in markdown.split("\n") if line.startswith("## ")]
    named = markdown.split("## What the Regulation asks of logs\n")[1].split("\n## ")[0]
    for title in (title.strip(". ") for line in named.split("\n") if ": see " in line
                  for title in line.partition(": see ")[2].split(",")):
        assert title in titles, "a section that is not there: " + title
    _, usage, _ = run(capsys, state_of_week, *PERIOD)
    assert "## Who" not in usage and "identity" not in usage, "names of people only where they are asked for"
