"""Section 11c and `report`: every figure against sums made from the lines by other means."""
import collections
import hashlib
import io
import json
import math
import os
import random
import stat
import time

import pytest

import b9agent
from helpers import run_agent

DAY_S = 86400.0
MONDAY_S = 1762732800.0  # 2025-11-10
WEEK = ["2025-11-%02d" % day for day in range(10, 17)]
NOW_S = MONDAY_S + 12 * DAY_S + 3600


# -- the log, as it is on disk --------------------------------------------------------

def chained(records):
    """Lines as 11b writes them, by its own description."""
    previous, lines = "0" * 64, []
    for number, record in enumerate(records, 1):
        record = dict({"v": 1, "seq": number, "time": record["time"], "kind": record["kind"]}, **record)
        body = json.dumps(dict(record, prev=previous), separators=(",", ":"))[:-1]
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
    last = json.loads(lines[-1])
    (folder / "head.json").write_text(json.dumps({"seq": last["seq"], "hash": last["hash"], "file": day + ".jsonl",
                                                  "closed": True}))


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))


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
              {"time": stamp(at(2.5) - 1), "kind": "torn", "file": "2025-11-12.jsonl", "bytes": 211,
               "head": "ok", "closed": False},
              event(at(3.1), "inference_failed", "error", what="ollama ended by signal 9", engine="ollama"),
              event(at(3.1) + 20, "inference_ready", engine="ollama"),
              event(at(4.4), "engine_wedged", "warning", engine="ollama", model="qwen2.5:14b"),
              event(at(4.9), "audit_failing", "error", what="No space left on device"),
              {"time": stamp(at(4.95)), "kind": "gap", "lost": 37, "from": stamp(at(4.9)), "to": stamp(at(4.94))},
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
    path.write_text(path.read_text().replace('"tenant":"research"', '"tenant":"reserach"', 1))
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


# -- sums over any lines ------------------------------------------------------------------------

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
amounts = st.one_of(st.none(), st.integers(0, 10 ** 6), st.floats(0, 1e6), st.just("7"), st.just(-1), st.just(True))
some_lines = st.lists(st.builds(dict, outcome=st.sampled_from(("ok", "refused", "failed", "left")), time=st.builds(
    "2025-11-{:02}T12:00:00.000Z".format, st.integers(10, 16)), tenant=st.sampled_from("abc"), identity=st.sampled_from("xy"),
    model=st.sampled_from("mn"), prompt_tokens=amounts, gpu_seconds=amounts, usd=amounts, energy_wh=amounts, co2e_g=amounts,
    energy_basis=st.sampled_from(("measured", "estimated", "", None)), cold=st.sampled_from((True, False, None, 1)),
    load_ms=amounts, first_token_ms=amounts, guards=st.sampled_from(([], ["g"], None, "g"))), max_size=30)


@hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=80)
@hypothesis.given(some_lines, st.integers(2, 8))
def test_rows_come_to_their_totals_whatever_the_lines_are(lines, bound):
    kept, b9agent.REPORT_KEYS_MAX = b9agent.REPORT_KEYS_MAX, bound
    try:
        report = b9agent.AuditReport(WEEK[0], WEEK[-1])
        for number, line in enumerate(lines):
            report.add(dict(line, kind="request", seq=number))
        record = report.record("now")
    finally:
        b9agent.REPORT_KEYS_MAX = kept
    json.dumps(record, allow_nan=False)
    totals = record["totals"]
    assert totals["requests"] == len(lines) == sum(totals[name] for name in ("ok", "refused", "failed", "left"))
    for part in ("by_tenant", "by_tenant_model", "by_day"):
        assert len(record[part]) <= bound + 1
        for name in totals:
            values = [row[name] for row in record[part]]
            if not name.startswith("first_token"):
                # A row that knows nothing of a sum adds nothing to it.
                assert (totals[name] or 0) == pytest.approx(sum(value or 0 for value in values), abs=1e-4), (part, name)
                if lines and name != "cold_start_seconds":
                    assert (totals[name] is None) == all(value is None for value in values), (part, name)
    for row in (totals, *record["by_tenant"]):
        known = row["energy_wh"]
        if known is not None:
            assert row["energy_measured_wh"] + row["energy_estimated_wh"] <= known + 1e-4
    for title in TABLES:
        for row in numbers_of(b9agent.render_report(record), title)[-1:] if lines else ():
            assert list(row.values())[0] == "total"


def things_in(value):
    """How many values something is made of, all the way down."""
    if isinstance(value, dict):
        return sum(map(things_in, value.values())) + len(value)
    if hasattr(value, "__dict__"):
        return things_in(vars(value))
    return sum(map(things_in, value)) if isinstance(value, (list, tuple, set, collections.deque)) else 1


def test_a_hundred_thousand_identities_cost_no_more_than_two_thousand():
    report, early = b9agent.AuditReport(WEEK[0], WEEK[-1]), 0
    for number in range(100000):
        report.add({"seq": number, "time": WEEK[0] + "T00:00:00.000Z", "kind": "request", "outcome": "failed",
                    "tenant": "t%d" % number, "model": "m%d" % number, "identity": "i%d" % number, "reason":
                    "r%d" % number, "guards": ["g%d" % number], "digest": "d%d" % number, "first_token_ms": number})
        early = things_in(report) if number == 5000 else early
    assert early < things_in(report) < early * 1.01 < 200000
    record = report.record("now")
    assert record["totals"]["requests"] == 100000 and len(record["by_tenant"]) == b9agent.REPORT_KEYS_MAX + 1
    assert record["by_tenant"][-1]["tenant"] is None and record["by_tenant"][-1]["requests"] == 98000
    rows = numbers_of(b9agent.render_report(record), "Usage by tenant")
    assert len(rows) == b9agent.REPORT_LIST_MAX + 2
    assert rows[-2]["tenant"] == "and 1,801 more" and rows[-2]["requests"] == "1,801"
    assert sum(int(row["requests"].replace(",", "")) for row in rows[:-1]) == 100000


# -- what strangers write -----------------------------------------------------------------------

NASTY = ["a|b", "`code`", "two\nlines", "<script>alert(1)</script>", "[click](http://evil.example)", "www.evil.example",
         "\x1b[31mred", "total", "\u202egnp.exe", "x" * 5000, "\ud800", "# Title", "![i](http://evil.example/p.png)", "\\`|",
         "<!--", "–", "a\r\n\n## Read this first\n\n- All is well."]


def test_names_cannot_leave_their_cell_or_become_marks(capsys, tmp_path, week_ago):
    lines = [dict(one_request(random.Random(number), MONDAY_S + number), tenant=name, model=name, identity=name,
                  reason=name, outcome="failed", guards=[name], digest=name) for number, name in enumerate(NASTY)]
    lines += [event(MONDAY_S + 60, name, level, **{name: name}) for name in NASTY for level in ("warning", "notice", name)]
    write_log(tmp_path / "state", chained(lines))
    book = {name: {"name": name, "source": name, "license": name, "pulled_by": name, "pulled_at": name} for name in NASTY}
    (tmp_path / "state" / "models.json").write_text(json.dumps({"models": book}))
    code, markdown, err = run(capsys, tmp_path / "state", "--evidence", *PERIOD)
    assert (code, err) == (0, "")
    plain = "".join(markdown.split("`")[::2])  # what stands outside of code spans
    assert markdown.count("`") % 2 == 0
    for mark in ("<", "[", "](", "evil", "script", "\x1b", "\u202e", "\ud800", "\r"):
        assert mark not in plain, mark
    assert plain.count("## Read this first") == 1 and max(map(len, markdown.split("\n"))) < 1000
    for title in ("Usage by tenant", "Who", "Models", "Incidents", "Changes", "Guard trips", "Refused and failed"):
        numbers_of(markdown, title)  # each row has as many cells as its head
    assert b9agent.printable(markdown.replace("\n", "")) == markdown.replace("\n", "")
    as_json(capsys, tmp_path / "state", "--evidence", *PERIOD)


@pytest.mark.parametrize("line", [
    {}, {"time": 7}, {"time": WEEK[0]}, {"seq": "x"}, {"kind": ["request"]}, {"outcome": "won"}, {"outcome": None},
    {"guards": [[1], {"a": 1}, None]}, {"tenant": {"a": 1}}, {"model": None, "identity": 7}, {"prompt_tokens": 10 ** 30},
    {"kind": "refusals", "count": "many"}, {"kind": "event", "event": 7, "level": 9}, {"kind": "gap", "lost": -1},
    {"kind": "event", "event": "agent_started", "retention_days": "x", "settings_sha256": 5},
    {"kind": "event", "event": "agent_stopped"}, {"first_token_ms": 1e300}, {"first_token_ms": 0}])
def test_no_line_of_whatever_form_stops_it(line):
    report = b9agent.AuditReport(WEEK[0], WEEK[-1])
    good = dict(one_request(random.Random(1), MONDAY_S), seq=1)
    report.add(good)
    report.add({**good, "seq": 2, **line})
    report.add(dict(good, seq=3))
    record = report.record("now")
    json.dumps(record, allow_nan=False)
    b9agent.render_report(record)
    assert record["lines"]["read"] + record["lines"]["unusable"] >= 3 and record["totals"]["requests"] >= 2


def test_damaged_lines_are_counted_and_said_at_the_top(capsys, tmp_path, week_ago):
    lines = chained([one_request(random.Random(number), MONDAY_S + 3600 * number) for number in range(24 * 7)])
    lines[30] = lines[30][:100]  # the first of the second day but six
    lines[50:52] = []
    lines[-1] = lines[-1].replace('"outcome":"', '"outcome":"x', 1)
    write_log(tmp_path / "state", [line for line in lines if line.endswith("}")])
    report = as_json(capsys, tmp_path / "state", *PERIOD)
    assert report["lines"]["missing"] == 3 and report["lines"]["unusable"] == 0
    _, markdown, _ = run(capsys, tmp_path / "state", *PERIOD)
    note = markdown.split("## Read this first\n")[1].split("\n## ")[0]
    assert "damaged" in note and ": 3." in note
    # The first line of a period is missed by the one before it, the last by the one after it.
    day = as_json(capsys, tmp_path / "state", "--from", WEEK[1], "--to", WEEK[1])
    assert day["lines"]["missing"] == 1 and day["lines"]["read"] == 23
    (tmp_path / "edge").mkdir()
    write_log(tmp_path / "edge", lines[:24] + lines[25:30] + lines[31:47] + lines[48:50])
    day = as_json(capsys, tmp_path / "edge", "--from", WEEK[1], "--to", WEEK[1])
    assert day["lines"]["missing"] == 3 and day["lines"]["read"] == 21


def test_unknown_money_and_energy_are_not_nought(capsys, tmp_path, week_ago):
    lines = [dict(one_request(random.Random(9), MONDAY_S), outcome="ok", usd=None, energy_wh=None, co2e_g=None)] * 3
    write_log(tmp_path / "state", chained(lines))
    _, markdown, _ = run(capsys, tmp_path / "state", *PERIOD)
    row = numbers_of(markdown, "Usage by tenant")[-1]
    assert (row["USD"], row["energy, Wh"], row["CO2e, g"]) == ("not set", "not known", "not known")
    assert "inference.gpu_usd_per_hour" in markdown
    report = as_json(capsys, tmp_path / "state", *PERIOD)
    assert report["totals"]["usd"] is None and report["totals"]["usd_unknown"] == 3


def test_one_tenant_alone_and_nothing_of_the_others(capsys, state_of_week, week, week_ago):
    lines = [line for line in of_requests(week) if line["tenant"] == "research"]
    report = as_json(capsys, state_of_week, "--tenant", "research", "--evidence", *PERIOD)
    same(report["totals"], sums_of(lines))
    _, markdown, _ = run(capsys, state_of_week, "--tenant", "research", "--evidence", *PERIOD)
    for text in (json.dumps(report), markdown):
        assert not any(name in text for name in ("claims-desk", "support", "night batch", "insurer.example"))
        assert "research" in text
    assert report["lines"]["summed"] == report["lines"]["strangers"] == 0
    code, out, err = run(capsys, state_of_week, "--tenant", "reserach", *PERIOD)
    assert (code, out) == (2, "") and "no requests of tenant `reserach`" in err
    assert "There are some of: " in err and "research" in err and "night batch" in err


def test_refusals_of_the_tenants_file_name_nobody_in_a_report_of_one_tenant():
    report = b9agent.AuditReport(WEEK[0], WEEK[-1], "research")
    report.add({**one_request(random.Random(1), MONDAY_S), "tenant": "research", "seq": 1})
    report.add({"time": stamp(MONDAY_S), "seq": 2, "kind": "event", "event": "tenants_refused", "level": "error",
                "what": "tenant `claims-desk`: unknown name"})
    assert "claims-desk" not in json.dumps(report.record("now"))


def test_lost_lines_are_counted_once():
    report = b9agent.AuditReport(WEEK[0], WEEK[-1])
    for number, line in enumerate(({"kind": "gap", "lost": 30}, {"kind": "gap", "lost": 7},
                                   {"kind": "event", "event": "audit_written_again", "lost": 37, "level": "notice"})):
        report.add({"time": stamp(MONDAY_S + number), "seq": number + 1, **line})
    assert report.count["lost"] == 37


# -- the command --------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, first, last", [
    ((), "2025-11-01", "2025-11-22"), (("--days", "7"), "2025-11-16", "2025-11-22"), (("--days", "1"), "2025-11-22", "2025-11-22"),
    (("--from", "2025-10-30"), "2025-10-30", "2025-11-22"), (("--to", "2025-10-30"), "2025-10-01", "2025-10-30"),
    (("--to", "2025-03-02", "--days", "3"), "2025-02-28", "2025-03-02"),
    (("--from", "2024-02-28", "--days", "3"), "2024-02-28", "2024-03-01"),
    (("--from", "2025-11-20", "--days", "30"), "2025-11-20", "2025-11-22")])
def test_the_period_that_is_meant(arguments, first, last):
    options = dict(zip([flag[2:] for flag in arguments[::2]], arguments[1::2]))
    found = b9agent.report_period(*(b9agent.parse_day(options[name]) if name in options else None for name in ("from", "to")),
                                  int(options["days"]) if "days" in options else None, NOW_S)
    assert tuple(b9agent.utc_stamp(day_s) for day_s in found) == (first + "T00:00:00Z", last + "T00:00:00Z")


@pytest.mark.parametrize("arguments, says, remedy", [
    (("--from", "2025-11-31"), "--from: `2025-11-31` cannot be used", "YEAR-MONTH-DAY"),
    (("--to", "22.11.2025"), "--to: `22.11.2025` cannot be used", "such as"),
    (("--from", "2025-1-1"), "cannot be used", "such as"), (("--from", "\u0662025-11-01"), "cannot be used", "such as"),
    (("--days", "0"), "--days: `0` cannot be used", "1 to"), (("--days", "x"), "--days: `x`", "1 to"),
    (("--from", "2025-11-16", "--to", "2025-11-10"), "is after --to 2025-11-10", "Turn them round"),
    (("--from", "2025-11-23"), "--from 2025-11-23 is in the future: today is 2025-11-22", "ends today"),
    (("--to", "2026-01-01"), "--to 2026-01-01 is in the future", "ends today"),
    (("--from", "2025-11-10", "--to", "2025-11-16", "--days", "7"), "one too many", "Leave one"),
    (("--from", "2025-11-18"), "no lines from 2025-11-18 to 2025-11-22", "Its files are of 2025-11-10 to 2025-11-16"),
    (("--to", "2025-11-09"), "no lines from 2025-11-01 to 2025-11-09", "Its files are of")])
def test_a_period_that_cannot_be_is_told_with_its_remedy(capsys, state_of_week, week_ago, arguments, says, remedy):
    code, out, err = run(capsys, state_of_week, *arguments)
    assert (code, out) == (2, "") and says in err and remedy in err


def test_no_log_is_told_with_its_remedy(capsys, tmp_path, monkeypatch, week_ago):
    (tmp_path / "state").mkdir(mode=0o700)
    code, out, err = run(capsys, tmp_path / "state")
    assert (code, out) == (2, "") and "no audit log in " in err and "audit.keep_days" in err
    if any(row.key == "audit_keep_days" for row in b9agent.SETTINGS):
        monkeypatch.setenv("B9AGENT_AUDIT_KEEP_DAYS", "0")
        code, out, err = run(capsys, tmp_path / "state")
        assert (code, out) == (2, "") and "audit.keep_days is 0" in err and "184" in err


def test_out_writes_a_file_of_ones_own_and_overwrites_none(capsys, state_of_week, tmp_path, week_ago):
    path = tmp_path / "report.md"
    code, out, err = run(capsys, state_of_week, "--out", str(path), *PERIOD)
    assert (code, err) == (0, "") and out.startswith("written: %s\n" % path)
    assert "could not write" in out, "what is missing is said here, too"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    _, markdown, _ = run(capsys, state_of_week, *PERIOD)
    assert path.read_text() == markdown and markdown.startswith("# Use of AI models, 2025-11-10 to 2025-11-16\n")
    path.write_text("mine")
    path.chmod(0o644)
    code, out, err = run(capsys, state_of_week, "--out", str(path), "--json", *PERIOD)
    assert (code, out) == (2, "") and "is there already" in err and "--force" in err and path.read_text() == "mine"
    code, out, err = run(capsys, state_of_week, "--out", str(path), "--json", "--force", *PERIOD)
    assert code == 0 and json.loads(path.read_text())["report"] == "usage" and stat.S_IMODE(path.stat().st_mode) == 0o600
    code, out, err = run(capsys, state_of_week, "--out", str(tmp_path / "none" / "r.md"), *PERIOD)
    assert (code, out) == (2, "") and "there is no folder" in err
    code, out, err = run(capsys, state_of_week, "--out", str(tmp_path), "--force", *PERIOD)
    assert (code, out) == (2, "") and os.path.isdir(str(tmp_path))
    os.symlink(str(tmp_path / "elsewhere"), str(tmp_path / "link"))
    code, out, err = run(capsys, state_of_week, "--out", str(tmp_path / "link"), *PERIOD)
    assert code == 2 and not (tmp_path / "elsewhere").exists()
    assert sorted(os.listdir(str(tmp_path))) == ["link", "report.md", "state"]


def test_a_log_that_begins_later_than_the_period_is_said(capsys, state_of_week, week_ago):
    begins = "The log begins on 2025-11-10: of the days before nothing is known."
    assert begins in as_json(capsys, state_of_week)["notes"]
    assert begins not in as_json(capsys, state_of_week, *PERIOD)["notes"]


def test_of_a_log_that_11b_wrote_by_a_program_of_its_own(home, state):
    """Nothing of the test's between the one who writes and the one who reads."""
    log = b9agent.AuditLog(str(state / "audit"), 184, b9agent.Log(stream=io.StringIO()))
    state.mkdir(mode=0o700)
    log.open()
    chance = random.Random(3)
    lines = [one_request(chance, NOW_S) for _ in range(50)]
    log.record("event", {"event": "agent_started", "level": "notice", "machine_id": "0badcafe", "settings_sha256": "5e" * 32})
    for line in lines:
        log.record("request", {name: value for name, value in line.items() if name not in ("time", "kind")})
    log.record("refusals", {"reason": "not_known", "count": 9, "tenant": ""})
    log.close()
    done = run_agent(home, "report", "--evidence", "--json", "--days", "2", "--out", home / "r.json")
    assert done.code == 0 and done.err == "", done
    report = json.loads((home / "r.json").read_text())
    same(report["totals"], sums_of(lines))
    assert report["integrity"]["ok"] and report["lines"]["read"] == 52 and report["lines"]["strangers"] == 9
    done = run_agent(home, "report", "--evidence")
    assert done.code == 0 and "`%s`" % report["integrity"]["head"] in done.out and "`0badcafe`" in done.out


def test_secrets_of_the_settings_are_in_no_report(capsys, tmp_path, week_ago, monkeypatch):
    monkeypatch.setattr(b9agent, "REDACTOR", b9agent.Redactor())
    b9agent.REDACTOR.add("s3cret-token-of-this-machine")
    write_log(tmp_path / "state", chained([dict(one_request(random.Random(1), MONDAY_S),
                                                identity="s3cret-token-of-this-machine")]))
    for arguments in ((), ("--json",), ("--out", str(tmp_path / "r.md")), ("--json", "--out", str(tmp_path / "r.json"))):
        _, out, _ = run(capsys, tmp_path / "state", "--evidence", *arguments, *PERIOD)
        assert "s3cret" not in out
    assert "s3cret" not in (tmp_path / "r.md").read_text() + (tmp_path / "r.json").read_text()


@pytest.mark.parametrize("served, as_pulled", [
    (["sha256:" + "a1" * 32], True), (["sha256:" + "a1" * 32, "sha256:" + "ee" * 32], False), ([""], None),
    (["sha256:" + "f0" * 32], True), (["", "sha256:" + "a1" * 32], True)])
def test_every_digest_that_was_served_has_to_be_one_that_was_kept(served, as_pulled):
    report = b9agent.AuditReport(WEEK[0], WEEK[-1])
    for number, digest in enumerate(served):
        report.add(dict(one_request(random.Random(1), MONDAY_S), seq=number, outcome="ok", model="M", digest=digest))
    book = {"m:latest": {"name": "m", "manifest_digest": "a1" * 32, "layers": [{"digest": "sha256:" + "f0" * 32}]}}
    assert [row["as_pulled"] for row in b9agent.model_evidence(report, book)] == [as_pulled]


def test_of_a_model_of_files_the_digest_is_theirs_as_the_front_door_has_it():
    files = [{"path": "/m/%d" % number, "sha256": str(number) * 64} for number in range(2)]
    for kept in (files[:1], files):
        digest, report = b9agent.files_digest(kept), b9agent.AuditReport(WEEK[0], WEEK[-1])
        report.add(dict(one_request(random.Random(1), MONDAY_S), seq=1, outcome="ok", model="M", digest=digest))
        (row,) = b9agent.model_evidence(report, {"M": {"name": "M", "files": kept}})
        assert (row["as_pulled"], "sha256:" + row["manifest_digest"]) == (True, digest)
