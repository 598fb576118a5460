"""The audit log: what it writes, what it survives (SIGKILL, power cuts, full disks, clocks), and that
whatever is done to its files is found, and where."""
import ctypes
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import threading
import time

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

import b9agent
from b9agent import (AUDIT_START, AuditLog, REDACTOR, UsageError, parse_audit_line, read_audit,
                     read_audit_head, verify_audit)
from helpers import run_agent, wait_until

DAY0 = 20000 * 86400.0  # 2024-10-04
REQUEST = dict(
    id="req_0123456789abcdef", request_id="abc-123", tenant="ada", identity="tailnet", peer="100.64.0.7",
    path="/v1/chat/completions", task="chat", stream=True, model="llama3.2:3b", digest="sha256:" + "a" * 64,
    engine="ollama", prompt_sha256="b" * 64, prompt_tokens=123, completion_tokens=456,
    tokens_basis="engine", queued_ms=1.25, first_token_ms=123.456, total_ms=4567.891, cold=False,
    load_ms=None, gpu_seconds=4.444, usd=0.00123, energy_wh=0.321, energy_basis="measured", co2e_g=0.12,
    outcome="ok", status=200, reason="", guards=[], task_tree="t1", task_depth=1)


class Clock:
    """Both clocks; the wall's can be set."""

    def __init__(self, wall=DAY0 + 3600.0):
        self.steady, self.wall = 1000.0, wall

    def pass_s(self, seconds):
        self.steady += seconds
        self.wall += seconds


class Lines(list):
    def __call__(self, level, event, **fields):
        self.append((level, event, fields))

    def defect(self, error, **fields):
        raise error

    def events(self):
        return [event for _, event, _ in self]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(b9agent, "AUDIT_BATCH_S", 0.001)
    monkeypatch.setattr(b9agent, "AUDIT_RETRY_S", 0.01)


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "audit")


def opened(folder, clock=None, log=None, keep_days=184):
    clock = clock or Clock()
    audit = AuditLog(folder, keep_days, log if log is not None else Lines(), lambda: clock.wall,
                     lambda: clock.steady)
    audit.open()
    return audit


def settled(audit):
    wait_until(lambda: not audit.figures()["waiting"], "all is written")
    wait_until(lambda: audit.figures()["lines"] == audit.figures()["seq"], "head.json tells of it")


def crash(audit):
    """What a SIGKILL leaves, once all is written: no close()."""
    settled(audit)
    seq = audit.figures()["seq"]
    wait_until(lambda: read_audit_head(audit._folder).seq == seq, "head.json is there")
    audit._ending = True
    audit._wake.set()
    audit._thread.join()
    audit._let_go()


def written(folder, days=4, lines=25, clock=None, close=True):
    clock = clock or Clock()
    audit = opened(folder, clock)
    for day in range(days):
        for number in range(lines):
            audit.record("request", dict(REQUEST, id=f"req_{day}_{number}"))
            clock.pass_s(60.0)
        settled(audit)
        clock.pass_s(86400.0 - lines * 60.0)
    (audit.close if close else lambda: crash(audit))()
    return clock


def names(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".jsonl"))


def path_of(folder, number=-1):
    return os.path.join(folder, names(folder)[number])


def read(path):
    with open(path, "rb") as handle:
        return handle.read()


def write(path, data):
    with open(path, "wb") as handle:
        handle.write(data)


def records(folder, kind=None):
    return [row for row in read_audit(folder) if kind in (None, row["kind"])]


def places(verdict):
    return [(fault.file, fault.line) for fault in verdict.faults]


def forged(raw, **changes):
    """A line made anew, with a hash that is right."""
    row = json.loads(raw)
    row.update(changes)
    row.pop("hash")
    body = json.dumps(row, separators=(",", ":"))[:-1].encode()
    return body + b',"hash":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


# -- lines -----------------------------------------------------------------

def test_a_line_is_json_in_a_known_order_and_its_hash_is_of_what_stands_before_it(folder):
    audit = opened(folder, Clock(DAY0 + 9095.1234))
    audit.record("request", REQUEST)
    audit.record("event", {"event": "agent_stopped"})
    audit.close()
    first, second = read(path_of(folder)).splitlines()
    row = json.loads(first)
    assert list(row) == ["v", "seq", "time", "kind", *REQUEST, "prev", "hash"]
    assert row == dict(REQUEST, v=1, seq=1, time="2024-10-04T02:31:35.123Z", kind="request",
                       prev=AUDIT_START, hash=row["hash"])
    assert row["hash"] == hashlib.sha256(first.split(b',"hash"')[0]).hexdigest()
    assert json.loads(second)["prev"] == row["hash"] and json.loads(second)["seq"] == 2
    verdict = verify_audit(folder)
    assert verdict == (True, 2, 1, 1, 2, "2:" + json.loads(second)["hash"], (), False)
    assert records(folder) == [row, json.loads(second)]


def test_folder_and_files_are_private_and_wide_ones_are_made_so(folder):
    written(folder)
    for name in os.listdir(folder):
        assert stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) == 0o600
        os.chmod(os.path.join(folder, name), 0o644)
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    os.chmod(folder, 0o755)
    opened(folder).close()
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert {stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode)
            for name in os.listdir(folder)} == {0o600}
    os.chmod(folder, 0o777)
    with pytest.raises(UsageError, match="chmod 700"):
        opened(folder)


@pytest.mark.parametrize("name", ["2024-10-04.jsonl", "head.json"])
def test_links_are_not_followed(folder, tmp_path, name):
    written(folder, days=1)
    target = tmp_path / "target"
    shutil.copy(os.path.join(folder, name), str(target))
    before = target.read_bytes()
    os.unlink(os.path.join(folder, name))
    os.symlink(str(target), os.path.join(folder, name))
    assert not verify_audit(folder).ok
    if name == "head.json":
        opened(folder).close()
        assert not os.path.islink(os.path.join(folder, name))
    else:
        with pytest.raises(UsageError, match="2024-10-04"):
            opened(folder)
    assert target.read_bytes() == before


def test_a_link_in_the_folders_place_and_a_pipe_in_a_files_are_refused(folder, tmp_path):
    written(folder, days=1)
    os.symlink(folder, str(tmp_path / "link"))
    with pytest.raises(UsageError, match="is a link"):
        opened(str(tmp_path / "link"))
    os.mkfifo(os.path.join(folder, "2030-01-01.jsonl"))
    with pytest.raises(UsageError, match="2030-01-01"):
        opened(folder)
    assert places(verify_audit(folder)) == [("2030-01-01.jsonl", 0)]


NASTY = {"control": "a\n\x00\x1b[2J\x7f", "half": "\ud800x", "nan": float("nan"), "inf": -float("inf"),
         "big": 10 ** 5000, "long": "x" * 10**6, "bytes": b"\xff", "object": Exception("e"),
         "deep": [[[[[[1]]]]]], "many": list(range(1000)), "nested": {"a": {"b": float("nan")}},
         "emoji": "\U0001f600", "kind": "mine", "seq": 7, "hash": "h", 5: "number"}


def test_whatever_the_values_are_the_line_is_whole_bounded_strict_json(folder):
    audit = opened(folder)
    audit.record("event", NASTY)
    for name, value in NASTY.items():
        audit.record("event", {name: value})
    audit.record("event", {f"name{number}": "\U0001f600" * 10**5 for number in range(100)})
    ring = {}
    ring["ring"] = ring
    audit.record("event", ring)
    audit.close()
    data = read(path_of(folder))
    assert re.fullmatch(rb"[\x20-\x7e\n]*", data)
    lines = data.splitlines()
    assert verify_audit(folder).ok and len(lines) == len(NASTY) + 3 == len(records(folder))
    row = b9agent.decode_json(lines[0])  # strict: no NaN, each name once, whole characters
    assert max(map(len, lines)) < b9agent.AUDIT_LINE_MAX
    assert (row["seq"], row["kind"], row["kind_"], row["seq_"]) == (1, "event", "mine", 7)
    assert row["control"] == "a\n\x00\x1b[2J\x7f" and row["half"] == "\\ud800x"
    assert row["nan"] is row["inf"] is None and len(row["long"]) == 4096 and len(row["many"]) == 64
    assert row["nested"] == {"a": {"b": None}} and row["emoji"] == "\U0001f600"


@hypothesis_settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(st.dictionaries(st.text(max_size=8), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)))
def test_no_value_makes_record_raise_or_the_line_less_than_json(fields):
    text = b9agent.render_audit_fields(fields)
    assert text.isprintable() and text.isascii()
    json.loads("{" + text + "}", parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("secret", ["tok-0123456789abcdef", 'q"uo\\te-secret', "gehe\xefm-\n-1234567"])
def test_secrets_are_redacted_wherever_they_stand(folder, secret):
    known = REDACTOR._secrets
    REDACTOR.add(secret)
    try:
        audit = opened(folder)
        for value in (secret, "Bearer " + secret, [secret], {"a": ["x" + secret]}):
            audit.record("event", {"value": value, "other": "x"})
        audit.close()
    finally:
        REDACTOR._secrets = known
    kept = json.dumps(records(folder), ensure_ascii=False)
    assert json.dumps(secret, ensure_ascii=False)[1:-1] not in kept and kept.count("…") == 4


def test_a_prompt_may_be_longer_than_other_texts(folder):
    audit = opened(folder)
    audit.record("request", {"prompt": "p\n" * 50000, "other": "o" * 50000})
    audit.close()
    [row] = records(folder)
    assert len(row["prompt"]) == b9agent.AUDIT_PROMPT_MAX and len(row["other"]) == 4096


def test_lines_of_many_threads_make_one_chain(folder):
    audit = opened(folder)
    threads = [threading.Thread(target=lambda name=name: [
        audit.record("event", {"of": name, "number": number}) for number in range(500)])
        for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    audit.close()
    assert verify_audit(folder)[:5] == (True, 4000, 1, 1, 4000)
    for name in range(8):
        assert [row["number"] for row in records(folder) if row["of"] == name] == list(range(500))


def test_record_waits_for_no_disk(folder, monkeypatch):
    audit, free, held = opened(folder), threading.Event(), threading.Event()
    real = os.write

    def slow(descriptor, data):
        if data.startswith(b'{"v"'):
            held.set()
            free.wait(30)
        return real(descriptor, data)
    monkeypatch.setattr(os, "write", slow)
    audit.record("event", {})
    assert held.wait(30)
    for _ in range(100):
        audit.record("event", {})  # would stand here for ever
    assert audit.figures()["seq"] == 101 and audit.figures()["lines"] == 0
    free.set()
    audit.close()
    assert verify_audit(folder).lines == 101


def test_nothing_is_recorded_before_it_is_open_nor_after_it_is_closed(folder):
    audit = AuditLog(folder, 1, Lines())
    audit.record("event", {})
    audit.close()
    assert audit.lost == 1 and not os.path.exists(folder)
    audit = opened(folder)
    audit.close()
    audit.record("event", {})
    audit.close()
    assert audit.lost == 1 and records(folder) == []


# -- killed, cut off -------------------------------------------------------

def writer(folder, until):
    """Of a forked process: its life ends with a signal, or at that line."""
    audit = AuditLog(folder, 184, Lines())
    audit.open()
    while audit.figures()["seq"] < until:
        if audit.figures()["waiting"] < 1 << 19:
            audit.record("request", REQUEST)
        else:
            time.sleep(0.0005)
    audit.close()


def forked(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def test_a_hundred_thousand_lines_of_a_process_that_is_killed_again_and_again(folder):
    chance, kills, torn, code = random.Random(7), 0, 0, None
    os.makedirs(folder, 0o700)
    while code != 0:
        pid = forked(lambda: writer(folder, 100000))
        if kills < 40:  # and then it is left to end
            time.sleep(chance.uniform(0.0, 0.25))
            os.kill(pid, signal.SIGKILL)
        code = os.waitpid(pid, 0)[1]
        assert code in (0, signal.SIGKILL)
        kills += code != 0
        if kills % 4 == 0 or code == 0:
            verdict = verify_audit(folder) if names(folder) else None
            assert verdict is None or (verdict.faults, verdict.first_seq) == ((), 1)
            torn += bool(verdict and verdict.torn)
    assert verdict.ok and not verdict.torn and verdict.lines == verdict.last_seq >= 100000
    unclean = records(folder, "torn")
    assert kills >= 20 and len(unclean) >= kills // 2 and not any(row["closed"] for row in unclean)
    print(kills, "kills,", torn, "seen torn,", sum(row["bytes"] > 0 for row in unclean), "cut")


@pytest.mark.parametrize("keep", [0.3, 0.999])
def test_a_torn_last_line_is_named_cut_off_and_recorded(folder, keep):
    written(folder, days=2, close=False)
    line = read(path_of(folder)).splitlines(True)[-1]
    more = forged(line, seq=51, prev=json.loads(line)["hash"])
    torn = more[:int(len(more) * keep)]
    with open(path_of(folder), "ab") as handle:
        handle.write(torn)
    verdict = verify_audit(folder)
    assert verdict.ok and verdict.torn and verdict.lines == 50 and not verdict.faults
    log = Lines()
    clock = Clock(DAY0 + 86400 + 7200)
    audit = opened(folder, clock, log)
    audit.record("event", {})
    audit.close()
    [row] = records(folder, "torn")
    assert (row["seq"], row["bytes"], row["file"], row["head"], row["closed"]) == (
        51, len(torn), names(folder)[-1], "ok", False)
    assert "audit_mended" in log.events()
    assert verify_audit(folder)[:5] == (True, 52, 2, 1, 52)


def test_lines_that_head_json_does_not_tell_of_yet_are_kept(folder):
    written(folder, days=1, close=False)
    line = read(path_of(folder)).splitlines(True)[-1]
    with open(path_of(folder), "ab") as handle:
        handle.write(forged(line, seq=26, prev=json.loads(line)["hash"]))
    assert verify_audit(folder)[:2] == (True, 26)
    opened(folder).close()
    assert verify_audit(folder)[:2] == (True, 27)


@pytest.mark.parametrize("tail", [b"\0" * 9000, b"\0" * 4096 + b'{"v":1,"seq":28}\n', b'{"v":1,' + b"\0" * 5000 + b"\n"])
def test_what_a_power_cut_leaves_after_head_json_is_cut_off(folder, tail):
    written(folder, days=1, close=False)
    before = read(path_of(folder))
    with open(path_of(folder), "ab") as handle:
        handle.write(tail)
    opened(folder).close()
    assert read(path_of(folder)).startswith(before + b'{"v":1,"seq":26')
    assert records(folder, "torn")[0]["bytes"] == len(tail)
    assert verify_audit(folder)[:2] == (True, 26)


def test_a_newest_file_with_nothing_whole_in_it_is_removed(folder):
    written(folder, days=2, close=False)
    write(os.path.join(folder, "2024-10-06.jsonl"), b"\0" * 100)
    audit = opened(folder, Clock(DAY0 + 3 * 86400))
    audit.close()
    assert names(folder) == ["2024-10-04.jsonl", "2024-10-05.jsonl", "2024-10-07.jsonl"]
    assert verify_audit(folder)[:2] == (True, 51)


@pytest.mark.parametrize("tail", [b"", b"\0" * 100, b"x"])
def test_without_head_json_the_line_before_an_empty_newest_file_is_gone_on_from(folder, tail):
    written(folder, days=2, close=False)
    os.unlink(os.path.join(folder, "head.json"))
    write(os.path.join(folder, "2024-10-06.jsonl"), tail)
    opened(folder, Clock(DAY0 + 3 * 86400)).close()
    verdict = verify_audit(folder)
    assert verdict.last_seq == 51 and places(verdict) == [("2024-10-07.jsonl", 1)]
    assert "head.json was missing" in verdict.faults[0].what


def test_drafts_of_head_json_that_a_kill_left_are_removed(folder):
    written(folder, days=1)
    write(os.path.join(folder, "head.json.123.tmp"), b"x")
    opened(folder).close()
    assert os.listdir(folder).count("head.json.123.tmp") == 0


def test_a_clean_end_leaves_nothing_to_record(folder):
    written(folder, days=1)
    opened(folder).close()
    assert records(folder, "torn") == [] and read_audit_head(folder).closed


# -- what is done to the files ---------------------------------------------

@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("original") / "audit")
    patch = pytest.MonkeyPatch()
    patch.setattr(b9agent, "AUDIT_BATCH_S", 0.001)
    written(folder)
    patch.undo()
    return folder


def mutated(original, folder, kind, chance):
    """Does it; returns the places where it may be found: (file, lines)."""
    shutil.copytree(original, folder)
    files = names(folder)
    name = chance.choice(files)
    path = os.path.join(folder, name)
    lines = read(path).splitlines(True)
    at = chance.randrange(len(lines))
    near = (name, (at + 1, at + 2, at + 3))
    nxt = (files + ["head.json"])[files.index(name) + 1]
    if kind == "bit":
        data = bytearray(lines[at])
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        lines[at] = bytes(data)
    elif kind == "newline":
        lines[at] = lines[at].replace(chance.choice([b",", b"a"]), b"\n", 1)
    elif kind == "removed":
        del lines[at]
        near = (name, (at, at + 1))
    elif kind == "duplicated":
        lines.insert(at, lines[at])
    elif kind == "added garbage":
        lines.insert(at, b'{"v":1,"seq":5}\n')
    elif kind == "added forged":
        lines.insert(at, forged(lines[at], tenant="eve"))
    elif kind == "made anew":
        lines[at] = forged(lines[at], tenant="eve")
    elif kind == "swapped":
        other = chance.choice([n for n in range(len(lines)) if n != at])
        lines[at], lines[other] = lines[other], lines[at]
        near = (name, (min(at, other) + 1, min(at, other) + 2))
    elif kind == "empty line":
        lines.insert(at, b"\n")
    if kind in ("bit", "made anew", "removed") and at == len(lines) - (kind != "removed"):
        near = near + ((nxt, (0, 1)),)
    write(path, b"".join(lines))
    return near


def found_at(verdict, near):
    first = verdict.faults[0]
    pairs = [near[:2]] + list(near[2:])
    return any(first.file == name and first.line in lines for name, lines in pairs)


@pytest.mark.parametrize("kind", ["bit", "newline", "removed", "duplicated", "added garbage",
                                  "added forged", "made anew", "swapped", "empty line"])
def test_every_change_of_a_line_is_found_and_located(original, tmp_path, kind):
    for seed in range(80):
        chance, folder = random.Random(f"{kind} {seed}"), str(tmp_path / str(seed))
        near = mutated(original, folder, kind, chance)
        verdict = verify_audit(folder)
        assert not verdict.ok and found_at(verdict, near), (seed, near, verdict)
        assert len(verdict.faults) <= 4 or kind == "swapped", verdict.faults
        shutil.rmtree(folder)


def test_every_single_byte_of_a_line_counts(original, tmp_path):
    folder = str(tmp_path / "audit")
    shutil.copytree(original, folder)
    path = path_of(folder, 1)
    data = read(path)
    begin = data.index(b"\n") + 1
    end = data.index(b"\n", begin) + 1
    for at in range(begin, end):
        write(path, data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        verdict = verify_audit(folder)
        assert places(verdict)[0] == (names(folder)[1], 2), at
    write(path, data)
    assert verify_audit(folder).ok


@pytest.mark.parametrize("number, expected", [(0, ("2024-10-05.jsonl", 1)), (1, ("2024-10-06.jsonl", 1)),
                                              (2, ("2024-10-07.jsonl", 1)), (3, ("2024-10-06.jsonl", 25))])
def test_a_whole_file_that_is_gone_is_missed(original, tmp_path, number, expected):
    folder = str(tmp_path / "audit")
    shutil.copytree(original, folder)
    os.unlink(path_of(folder, number))
    verdict = verify_audit(folder)
    assert places(verdict) == [expected] and "missing" in verdict.faults[0].what


def test_all_files_gone_are_missed_and_so_they_are_after_the_next_start(original, tmp_path):
    folder = str(tmp_path / "audit")
    shutil.copytree(original, folder)
    for name in names(folder):
        os.unlink(os.path.join(folder, name))
    assert not verify_audit(folder).ok
    audit = opened(folder, Clock(DAY0 + 5 * 86400))
    audit.record("event", {})
    audit.close()
    verdict = verify_audit(folder)
    assert places(verdict) == [("2024-10-09.jsonl", 1)] and verdict.first_seq == 101


@pytest.mark.parametrize("count", [1, 7, 25])
@pytest.mark.parametrize("close", [True, False])
def test_lines_cut_off_at_the_end_are_missed_and_a_new_start_does_not_hide_it(folder, count, close):
    clock = written(folder, close=close)
    lines = read(path_of(folder)).splitlines(True)
    write(path_of(folder), b"".join(lines[:-count]))
    verdict = verify_audit(folder)
    assert not verdict.ok and "up to number 100" in verdict.faults[0].what
    audit = opened(folder, clock)
    audit.record("event", {})
    audit.close()
    verdict = verify_audit(folder)
    assert not verdict.ok and str(100 - count + 1) in verdict.faults[0].what, verdict


def test_half_of_the_last_line_cut_off_is_missed_where_head_json_tells_of_it(folder):
    written(folder)
    data = read(path_of(folder))
    write(path_of(folder), data[:-20])
    verdict = verify_audit(folder)
    assert not verdict.ok and places(verdict) == [("2024-10-07.jsonl", 24)]


@pytest.mark.parametrize("text", [None, b"", b"[]", b'{"seq": 1}', b"\xff",
                                  b'{"seq":"1","hash":"a","file":"x","closed":true}',
                                  b'{"seq":1,"hash":[],"file":"x","closed":true}', b"[" * 4000])
def test_a_head_json_that_is_gone_or_broken_is_a_fault_and_stays_one(original, tmp_path, text):
    folder = str(tmp_path / "audit")
    shutil.copytree(original, folder)
    path = os.path.join(folder, "head.json")
    os.unlink(path)
    if text is not None:
        write(path, text)
    assert places(verify_audit(folder)) == [("head.json", 0)]
    opened(folder, Clock(DAY0 + 4 * 86400)).close()
    assert records(folder, "torn")[0]["head"] == "missing"
    assert places(verify_audit(folder)) == [("2024-10-08.jsonl", 1)]
    assert verify_audit(folder).last_seq == 101


def set_head(folder, **changes):
    path = os.path.join(folder, "head.json")
    write(path, json.dumps(dict(json.loads(read(path)), **changes)).encode())


def test_an_older_head_json_is_found(folder):
    written(folder, days=1, lines=900, clock=Clock(DAY0), close=False)
    row = records(folder)[9]
    set_head(folder, seq=10, hash=row["hash"])
    assert places(verify_audit(folder)) == [("head.json", 0)]
    opened(folder, Clock(DAY0 + 86400)).close()
    assert len(records(folder)) == 901  # nothing is removed for it
    set_head(folder, hash="0" * 64)
    assert "is not the one that head.json tells of" in verify_audit(folder).faults[-1].what


def test_an_older_head_json_of_a_clean_end_is_found_even_for_one_line(folder):
    written(folder)
    row = records(folder)[-2]
    set_head(folder, seq=99, hash=row["hash"])
    assert "added" in verify_audit(folder).faults[0].what


def test_a_head_json_of_another_chain_costs_no_line(folder):
    clock = written(folder, close=False)
    set_head(folder, seq=80, hash="5" * 64)
    before = [read(os.path.join(folder, name)) for name in names(folder)]
    opened(folder, clock).close()
    assert [read(os.path.join(folder, name)) for name in names(folder)][:4] == before
    assert not verify_audit(folder).ok


@pytest.mark.parametrize("old, new", [(3, "2024-10-09.jsonl"), (0, "2024-10-03.jsonl"),
                                      (1, "2024-10-31.jsonl"), (2, "notes.txt"), (0, "x.jsonl")])
def test_a_file_with_another_name_is_found(original, tmp_path, old, new):
    folder = str(tmp_path / "audit")
    shutil.copytree(original, folder)
    os.rename(path_of(folder, old), os.path.join(folder, new))
    assert not verify_audit(folder).ok


def test_two_files_that_changed_names_are_found(original, tmp_path):
    folder = str(tmp_path / "audit")
    shutil.copytree(original, folder)
    one, two = path_of(folder, 1), path_of(folder, 2)
    data = read(one)
    write(one, read(two))
    write(two, data)
    verdict = verify_audit(folder)
    assert places(verdict)[0] == (names(folder)[1], 1) and len(verdict.faults) <= 101


@pytest.mark.parametrize("right", [True, False])
def test_a_forged_line_at_the_end_is_found_at_once_or_when_the_agent_goes_on(folder, right):
    clock = written(folder)
    last = read(path_of(folder)).splitlines(True)[-1]
    more = forged(last, seq=101, prev=json.loads(last)["hash"] if right else "f" * 64)
    with open(path_of(folder), "ab") as handle:
        handle.write(more)
    assert ("2024-10-07.jsonl", 26) in places(verify_audit(folder))
    audit = opened(folder, clock)
    audit.record("event", {})
    audit.close()
    assert not verify_audit(folder).ok


def test_a_log_made_anew_is_found_by_a_head_that_was_kept_elsewhere_and_by_nothing_else(folder, tmp_path):
    written(folder)
    known = verify_audit(folder).head
    shutil.rmtree(folder)
    written(folder, lines=26)
    assert verify_audit(folder).ok
    verdict = verify_audit(folder, known)
    assert places(verdict) == [("--head", 0)] and "made anew" in verdict.faults[0].what
    later = "999:" + "a" * 64
    assert "missing at the end" in verify_audit(folder, later).faults[0].what
    row = records(folder)[40]
    assert verify_audit(folder, f"{row['seq']}:{row['hash']}").ok
    with pytest.raises(ValueError, match="SEQ:HASH"):
        verify_audit(folder, "12:xyz")


@hypothesis_settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(st.binary(max_size=400) | st.builds(lambda n, m: n + m, st.binary(max_size=60),
                                           st.just(b',"hash":"' + b"0" * 64 + b'"}\n')))
def test_no_bytes_make_the_parser_raise(raw):
    assert parse_audit_line(raw) is None


def test_lines_without_an_end_cost_no_memory(folder, monkeypatch):
    written(folder, days=2)
    monkeypatch.setattr(b9agent, "AUDIT_LINE_MAX", 4096)
    data = read(path_of(folder, 0)).splitlines(True)
    write(path_of(folder, 0), data[0] + b"x" * 20000 + b"\n" + b"".join(data[1:]))
    assert places(verify_audit(folder)) == [(names(folder)[0], 2)]


def test_the_list_of_faults_is_bounded(folder):
    written(folder, lines=100)
    for name in names(folder):
        write(os.path.join(folder, name), b"garbage\n" * 1000)
    assert len(verify_audit(folder).faults) == b9agent.AUDIT_FAULTS_MAX + 1


# -- disks -------------------------------------------------------------------

def told(work):
    """The value of work() in a process of its own."""
    reader, out = os.pipe()
    pid = forked(lambda: os.write(out, json.dumps(work()).encode()))
    os.close(out)
    with os.fdopen(reader, "rb") as handle:
        data = handle.read()
    os.waitpid(pid, 0)
    assert data, "it ended without a word"
    return json.loads(data)


def fill_and_free(folder, free):
    """Lines onto a disk that is full soon, until some are lost; then there is room."""
    b9agent.AUDIT_WAITING_MAX = 1 << 18
    log, clock = Lines(), Clock()
    audit = opened(folder, clock, log)
    until = time.monotonic() + 30
    while audit.lost < 50 and time.monotonic() < until:
        audit.record("request", REQUEST)
        clock.pass_s(0.01)
        time.sleep(0.0002)
    failing, full = audit.failing, audit.figures()
    on_disk = read(path_of(folder))
    free()
    while audit.failing and time.monotonic() < until:
        time.sleep(0.01)
    mended = not audit.failing
    audit.record("event", {"event": "after"})
    settled(audit)
    audit.close()
    gaps = records(folder, "gap")
    return {"failing": failing, "mended": mended, "lost": audit.lost, "events": log.events(),
            "gap": sum(row["lost"] for row in gaps), "gaps": len(gaps), "waiting": full["waiting"],
            "whole": on_disk.endswith(b"\n") or not on_disk, "verdict": verify_audit(folder),
            "requests": len(records(folder, "request")), "last": records(folder)[-1]["kind"],
            "seq": audit.figures()["seq"], "failed": log.events().count("audit_failing")}


def check_full_disk(done):
    assert done["failing"] and done["mended"] and done["whole"], done
    assert done["lost"] == done["gap"] >= 50 and 1 <= done["gaps"] <= 3
    assert done["waiting"] <= 1 << 18
    assert done["verdict"][:2] == [True, done["seq"]] and not done["verdict"][7]
    assert done["requests"] == done["seq"] - 1 - done["gaps"] and done["last"] == "event"
    assert done["failed"] == done["events"].count("audit_written_again") == 1


def test_a_full_disk_is_told_at_once_lines_wait_and_what_is_lost_is_counted(tmp_path):
    """On a disk of its own, a few hundred KiB large."""
    disk = str(tmp_path / "disk")
    os.mkdir(disk)

    def work():
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None) or libc.mount(
                b"tmpfs", disk.encode(), b"tmpfs", 0, b"size=512k"):
            return None
        write(disk + "/ballast", b"x" * 100000)
        return fill_and_free(disk + "/audit", lambda: (
            os.unlink(disk + "/ballast"),
            libc.mount(b"tmpfs", disk.encode(), b"tmpfs", 32, b"size=8m")))
    if os.geteuid() or not hasattr(os, "memfd_create"):
        pytest.skip("only root of Linux may mount a small disk")
    done = told(work)
    if done is None:
        pytest.skip("no mounts here")
    check_full_disk(done)


def test_a_limit_on_a_files_size_is_as_a_full_disk(tmp_path):
    def work():
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (300001, hard))
        return fill_and_free(str(tmp_path / "audit"), lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (hard, hard)))
    check_full_disk(told(work))


def refuse(monkeypatch, name, times, code=5):
    """os.NAME fails so often."""
    real, left = getattr(os, name), [times]

    def failing(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return real(*arguments)
    monkeypatch.setattr(os, name, failing)
    return left


def test_a_write_that_cannot_be_made_durable_is_made_again(folder, monkeypatch):
    log = Lines()
    audit = opened(folder, None, log)
    refuse(monkeypatch, "fdatasync", 3)
    for _ in range(20):
        audit.record("event", {})
    wait_until(lambda: "audit_written_again" in log.events(), "it is written")
    audit.close()
    assert verify_audit(folder)[:2] == (True, 20) and audit.lost == 0


def test_half_a_line_that_could_not_be_cut_off_is_cut_off_later(folder, monkeypatch):
    log = Lines()
    audit = opened(folder, None, log)
    audit.record("event", {})
    settled(audit)
    cut, real, half = refuse(monkeypatch, "ftruncate", 3), os.write, [1]

    def write_half(descriptor, data):
        if data.startswith(b'{"v"') and half:
            half.pop()
            return real(descriptor, data[:50])
        return real(descriptor, data)
    monkeypatch.setattr(os, "write", write_half)
    audit.record("event", {"event": "second"})
    wait_until(lambda: "audit_written_again" in log.events(), "it is written")
    audit.close()
    assert cut == [0] and "audit_changed" not in log.events()
    assert verify_audit(folder)[:2] == (True, 2)


def test_a_head_json_that_cannot_be_written_holds_up_the_lines(folder, monkeypatch):
    """So that never more than a batch is in the files that it does not tell of."""
    audit = opened(folder)
    left = refuse(monkeypatch, "replace", 3)
    for _ in range(10):
        audit.record("event", {})
        wait_until(lambda: audit.failing or not left[0], "it fails")
    settled(audit)
    audit.close()
    assert verify_audit(folder)[:2] == (True, 10)


def test_lines_that_wait_at_the_end_for_a_disk_that_stays_full_are_told(folder, monkeypatch):
    log = Lines()
    audit = opened(folder, None, log)
    refuse(monkeypatch, "fdatasync", -1, 28)
    audit.record("event", {})
    wait_until(lambda: audit.failing, "it fails")
    audit.close()
    assert "audit_lost" in log.events()
    assert not read_audit_head(folder).closed


def test_a_defect_in_the_writer_is_told_and_does_not_end_it(folder, monkeypatch):
    log = Lines()
    log.defect = lambda error, **fields: log("error", "defect", what=str(error))
    audit, real, left = opened(folder, None, log), b9agent.write_atomic, [1]

    def broken(*arguments):
        if left:
            left.pop()
            raise RuntimeError("broken")
        return real(*arguments)
    monkeypatch.setattr(b9agent, "write_atomic", broken)
    audit.record("event", {})
    wait_until(lambda: "defect" in log.events(), "it is told")
    wait_until(lambda: not audit.failing, "it goes on")
    audit.close()
    assert verify_audit(folder)[:2] == (True, 1)


# -- changed under the writer ------------------------------------------------

@pytest.mark.parametrize("change", ["removed", "replaced", "added to", "cut", "renamed"])
def test_files_that_change_under_the_writer_are_told_and_found(folder, change):
    log = Lines()
    audit = opened(folder, None, log)
    for _ in range(10):
        audit.record("event", {})
    settled(audit)
    path = path_of(folder)
    data = read(path)
    if change == "removed":
        os.unlink(path)
    elif change == "renamed":
        os.rename(path, path + ".old")
    elif change == "replaced":
        write(path + "2", data[:data.rindex(b"{")])
        os.rename(path + "2", path)
    elif change == "added to":
        with open(path, "ab") as handle:
            handle.write(b"mine\n")
    else:
        os.truncate(path, data.rindex(b"{"))
    audit.record("event", {})
    settled(audit)
    assert log.events().count("audit_changed") == 1
    audit.close()
    verdict = verify_audit(folder)
    assert not verdict.ok and verdict.last_seq == 11


# -- days ----------------------------------------------------------------------

def test_each_day_of_utc_has_its_file_and_the_log_line_of_a_new_one_has_the_head(folder):
    log, clock = Lines(), Clock(DAY0 + 86400 - 1.0)
    audit = opened(folder, clock, log)
    audit.record("event", {})
    settled(audit)
    clock.pass_s(1.0)
    audit.record("event", {})
    audit.close()
    assert names(folder) == ["2024-10-04.jsonl", "2024-10-05.jsonl"]
    rows = records(folder)
    heads = [fields["head"] for _, event, fields in log if event == "audit_head"]
    assert heads == [f"1:{rows[0]['hash']}", f"2:{rows[1]['hash']}"], "and of no line before the first"


def test_a_clock_that_is_set_back_a_day_writes_on_in_the_newest_file(folder):
    clock = Clock(DAY0 + 5 * 86400)
    audit = opened(folder, clock)
    for step in (0, -86400, 3600, -86400 * 3, 86400 * 3, 86400 * 2):
        clock.wall += step
        audit.record("event", {})
        settled(audit)
    audit.close()
    clock.wall -= 86400 * 3
    audit = opened(folder, clock)  # and after a new start
    audit.record("event", {})
    audit.close()
    assert names(folder) == ["2024-10-09.jsonl", "2024-10-10.jsonl"]
    assert [row["seq"] for row in records(folder)] == [1, 2, 3, 4, 5, 6, 7]
    assert verify_audit(folder)[:3] == (True, 7, 2)


def test_old_files_go_with_a_record_that_excuses_them(folder):
    clock = written(folder, days=4)  # the 4th to the 7th; it is the 8th now
    log = Lines()
    audit = opened(folder, clock, log, keep_days=2)
    audit.record("event", {})
    settled(audit)
    assert names(folder) == ["2024-10-06.jsonl", "2024-10-07.jsonl", "2024-10-08.jsonl"]
    assert audit.retained_from == "2024-10-06" and audit.figures()["files"] == 3
    pruned = records(folder, "pruned")
    assert [(row["file"], row["last_seq"]) for row in pruned] == [("2024-10-04.jsonl", 25),
                                                                  ("2024-10-05.jsonl", 50)]
    for _ in range(3):
        clock.pass_s(86400.0)
        audit.record("event", {})
        settled(audit)
        wait_until(lambda: len(names(folder)) == 3, "the old ones are removed")
        wait_until(lambda: verify_audit(folder).ok, "it is whole")
    assert not audit.failing
    audit.close()
    verdict = verify_audit(folder)
    assert verdict.ok and verdict.first_seq > 100 and audit.failing, "and what is closed takes nothing"
    os.unlink(path_of(folder, 0))
    assert "no record tells" in verify_audit(folder).faults[0].what


def test_a_head_of_a_pruned_line_is_known_where_the_record_has_it(folder):
    clock = written(folder, days=4)
    heads = {row["seq"]: f"{row['seq']}:{row['hash']}" for row in records(folder)}
    opened(folder, clock, keep_days=2).close()
    assert verify_audit(folder, heads[50]).ok
    assert "take a newer head" in verify_audit(folder, heads[49]).faults[0].what


def test_nothing_is_removed_before_its_record_is_on_the_disk(folder, monkeypatch):
    clock = written(folder, days=4)
    refuse(monkeypatch, "fdatasync", -1, 28)
    audit = opened(folder, clock, keep_days=1)
    assert audit.failing and len(names(folder)) == 5
    audit.close()
    monkeypatch.undo()
    assert verify_audit(folder).lines == 100


def test_past_days_that_are_immutable_stop_nothing(folder, monkeypatch):
    clock, real = written(folder, days=4), os.open

    def refuse_past_days(path, flags, *more, **named):
        if str(path).endswith(".jsonl") and "04.jsonl" in str(path) and flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(1, "Operation not permitted", path)
        return real(path, flags, *more, **named)

    def keep(path):
        raise PermissionError(1, "Operation not permitted", path)
    monkeypatch.setattr(b9agent.os, "open", refuse_past_days)
    monkeypatch.setattr(b9agent.os, "unlink", keep)
    audit = opened(folder, clock, keep_days=2)
    for _ in range(3):
        audit.record("event", {})
        settled(audit)
    wait_until(lambda: not audit.failing, "it goes on")
    audit.close()
    monkeypatch.undo()
    assert sum(row["kind"] == "pruned" for row in records(folder)) == 2, "it said it once for each of two days"


def test_a_clock_that_jumps_forward_removes_nothing(folder):
    clock = Clock()
    audit = opened(folder, clock, keep_days=10)
    for step in (0, 1, 1, 365 * 50):
        clock.wall += step * 86400.0
        audit.record("event", {})
        settled(audit)
        wait_until(lambda: not audit._prune_due, "it has looked for old files")
    audit.close()
    assert len(names(folder)) == 4 and verify_audit(folder)[:2] == (True, 4)


# -- reading -----------------------------------------------------------------

def test_lines_of_a_time_are_read(folder):
    written(folder)
    since, until = DAY0 + 86400 + 3600 + 120, DAY0 + 2 * 86400 + 3600 + 60
    ids = [row["id"] for row in read_audit(folder, since, until)]
    assert ids == [f"req_1_{number}" for number in range(2, 25)] + ["req_2_0"]
    assert len(list(read_audit(folder, None, None))) == 100
    assert [row["id"] for row in read_audit(folder, None, DAY0 + 3600.5)] == ["req_0_0"]


def test_lines_of_a_clock_that_was_set_back_are_read_too(folder):
    clock = Clock(DAY0 + 86400)
    audit = opened(folder, clock)
    audit.record("event", {"number": 1})
    clock.wall -= 7200
    audit.record("event", {"number": 2})
    audit.close()
    assert [row["number"] for row in read_audit(folder, DAY0, DAY0 + 86400)] == [2]


def test_what_is_not_as_it_was_written_is_not_read(folder):
    written(folder, days=1)
    data = read(path_of(folder)).splitlines(True)
    data[3] = data[3].replace(b"ada", b"eve")
    write(path_of(folder), b"".join(data) + b'{"half')
    assert [row["seq"] for row in read_audit(folder)] == [1, 2, 3, *range(5, 26)]


def test_verify_while_it_is_written_pruned_and_turned_finds_no_fault(folder):
    clock = Clock()
    audit = opened(folder, clock, keep_days=2)
    stop = threading.Event()

    def write_on():
        while not stop.is_set():
            for _ in range(20):
                audit.record("request", REQUEST)
            clock.pass_s(7200.0)
            while audit.figures()["waiting"] > 1 << 18:
                time.sleep(0.001)
            time.sleep(0.002)
    thread = threading.Thread(target=write_on)
    thread.start()
    try:
        verdict, until = verify_audit(folder), time.monotonic() + 30
        while verdict.first_seq < 5000 and time.monotonic() < until:
            verdict = verify_audit(folder)
            assert not verdict.faults, verdict
    finally:
        stop.set()
        thread.join()
        audit.close()
    assert verify_audit(folder).first_seq >= 5000


def test_reading_needs_no_more_memory_for_more_lines(folder):
    import tracemalloc
    written(folder, days=1, lines=1400, clock=Clock(DAY0))
    verify_audit(folder)
    tracemalloc.start()
    verify_audit(folder)
    lines = sum(1 for _ in read_audit(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines == 1400 and peak < 500000 < os.path.getsize(path_of(folder))


# -- commands ----------------------------------------------------------------

def command(capsys, state, *words):
    code = b9agent.main(["audit", *words, "--state-dir", str(state)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def kept(tmp_path):
    written(str(tmp_path / "audit"))
    os.chmod(str(tmp_path), 0o700)
    return tmp_path


def test_verify_says_whole_and_ends_with_0(kept, capsys):
    head = verify_audit(str(kept / "audit")).head
    code, out, err = command(capsys, kept, "verify")
    assert (code, out, err) == (0, f"whole: 100 lines in 4 files, up to {head}\n", "")
    code, out, _ = command(capsys, kept, "verify", "--json", "--head", head)
    assert code == 0 and json.loads(out) == {
        "ok": True, "lines": 100, "files": 4, "first_seq": 1, "last_seq": 100, "head": head, "faults": [],
        "torn": False}
    assert command(capsys, kept, "verify", "--head", "100:" + "0" * 64)[0] == 1
    assert command(capsys, kept, "verify", "--head", "x")[0] == 2


def test_verify_says_where_what_and_what_to_do_and_ends_with_1(kept, capsys):
    path = path_of(str(kept / "audit"), 1)
    write(path, read(path).replace(b"req_1_3", b"req_1_\x1b"))
    code, out, err = command(capsys, kept, "verify")
    assert code == 1 and out == "2024-10-05.jsonl:4: was changed, or is no line of this log\n"
    assert "Keep a copy" in err
    code, out, _ = command(capsys, kept, "verify", "--json")
    assert code == 1 and json.loads(out)["faults"] == [
        {"file": "2024-10-05.jsonl", "line": 4, "what": "was changed, or is no line of this log"}]


def test_verify_names_a_torn_last_line_and_ends_with_0(kept, capsys):
    with open(path_of(str(kept / "audit")), "ab") as handle:
        handle.write(b'{"v":1')
    code, out, _ = command(capsys, kept, "verify")
    assert code == 0 and "half there" in out and "whole: 100 lines" in out


def test_no_folder_and_no_lines_are_said(tmp_path, capsys):
    os.chmod(str(tmp_path), 0o700)
    for words in (["verify"], ["head"], ["show"]):
        code, out, err = command(capsys, tmp_path, *words)
        assert code == 2 and out == "" and "there is no audit log in" in err
    opened(str(tmp_path / "audit")).close()
    assert "no lines yet" in command(capsys, tmp_path, "verify")[1]
    assert "no lines yet" in command(capsys, tmp_path, "show")[2]


def test_head_prints_what_verify_takes(kept, capsys):
    code, out, err = command(capsys, kept, "head")
    assert code == 0 and out == verify_audit(str(kept / "audit")).head + "\n" and "--head" in err
    os.unlink(str(kept / "audit" / "head.json"))
    code, out, err = command(capsys, kept, "head")
    assert code == 2 and out == "" and "audit verify" in err


def test_show_prints_the_newest_lines_for_people_and_for_programs(kept, capsys):
    code, out, _ = command(capsys, kept, "show", "--last", "30")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 30
    assert lines[-1].startswith("2024-10-07T01:24:00.000Z 100 request id=req_3_24 request_id=abc-123 "
                                "tenant=ada ") and "load_ms" not in lines[-1]
    code, out, _ = command(capsys, kept, "show", "--last", "30", "--json")
    assert json.loads(out)["lines"] == records(str(kept / "audit"))[-30:]
    assert len(command(capsys, kept, "show")[1].splitlines()) == 20
    assert len(command(capsys, kept, "show", "--last", "1000")[1].splitlines()) == 100
    assert command(capsys, kept, "show", "--last", "no")[0] == 2


def test_show_moves_no_cursor(tmp_path, capsys):
    os.chmod(str(tmp_path), 0o700)
    audit = opened(str(tmp_path / "audit"))
    audit.record("event", {"what": "a\x1b[2J\nb"})
    audit.close()
    assert 'what="a\\x1b[2J\\nb"' in command(capsys, tmp_path, "show")[1] or (
        "what=a\\x1b[2J\\nb" in command(capsys, tmp_path, "show", "--last", "1")[1])


def test_a_forged_line_that_is_no_json_ends_neither_show_nor_the_others(kept, capsys):
    folder = str(kept / "audit")
    last = read(path_of(folder)).splitlines(True)[-1]
    body = last.split(b',"hash"')[0].replace(b'"id":', b'[[[NaN,')
    with open(path_of(folder), "ab") as handle:
        handle.write(body + b',"hash":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n')
    code, out, _ = command(capsys, kept, "show")
    assert code == 0 and len(out.splitlines()) == 19
    assert len(records(folder)) == 100 and not verify_audit(folder).ok


def test_files_of_another_user_are_said_to_be_so(kept):
    def work():
        os.chmod(str(kept), 0o755)
        for path in list(kept.parents)[:3]:
            os.chmod(str(path), 0o755)
        os.setgid(65534)
        os.setuid(65534)
        try:
            verify_audit(str(kept / "audit"))
        except UsageError as error:
            return str(error)
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    assert "with sudo" in told(work)


def test_the_commands_are_those_of_the_program(home):
    state = home / "state"
    state.mkdir(mode=0o700)
    written(str(state / "audit"))
    done = run_agent(home, "audit", "verify", "--state-dir", state)
    assert done.code == 0 and done.out.startswith("whole: 100 lines"), done


def test_files_that_are_all_gone_are_missed_by_head_json(tmp_path):
    log = written(tmp_path / "audit", days=1)
    for path in (tmp_path / "audit").glob("*.jsonl"):
        path.unlink()
    head = read_audit_head(str(tmp_path / "audit"))
    assert [tuple(fault) for fault in verify_audit(str(tmp_path / "audit")).faults] == [
        ("head.json", 0, f"tells of line {head.seq}, and there are no lines")], log
