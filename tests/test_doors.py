"""Errors and redaction, the doors to files and programs, and the log."""
import io
import json
import os
import signal
import stat
import threading
import time

import pytest

import b9agent
from helpers import StallMeter, wait_until


# -- errors, masks, redaction ------------------------------------------------

def below(kind):
    return {kind}.union(*map(below, kind.__subclasses__()))


def test_every_error_has_an_exit_code_that_is_explained():
    explained = {code for code, text in b9agent.EXIT_MEANINGS if text}
    assert explained == set(b9agent.Exit)
    for kind in below(b9agent.AgentError):
        assert kind.exit_code in explained
        assert str(kind("what happened", "do this")) == "what happened. do this"
        assert str(kind("what happened")) == "what happened"


def test_what_cannot_get_better_by_itself_is_permanent():
    assert set(b9agent.PERMANENT_EXITS) == {2, 3, 4, 6}


@pytest.mark.parametrize("secret", ["a", "abc", "abcdefghijk", "abcdefghijkl", "x" * 100])
def test_a_mask_shows_four_characters_at_most_and_a_third_at_most(secret):
    shown = b9agent.mask(secret).replace("\u2026", "")
    assert secret.endswith(shown) and len(shown) <= min(4, len(secret) // 3)


def test_of_no_secret_nothing_is_shown():
    assert b9agent.mask(None) == b9agent.mask("") == ""


@pytest.mark.parametrize("text", [
    "a\nb", "a\r\nb", "\x1b[31m", "\x00", "\x7f", "\x85", "\u2028", "\u2029", "\u202e", "\u2066", "\ud800",
    "\x9b2J", "\u200f", "\u061c"])
def test_what_a_peer_sends_cannot_move_the_cursor_or_turn_the_line_around(text):
    shown = b9agent.printable("<" + text + ">")
    shown.encode("utf-8")
    assert len(shown.splitlines()) == 1 and text not in shown
    assert b9agent.printable(shown) == shown


def test_ordinary_text_is_left_alone():
    for text in ("caf\u00e9 \U0001f600", "a\\b", "", "\u4e2d\u6587"):
        assert b9agent.printable(text) == text


def test_the_redactor_takes_the_longer_secret_first():
    redactor = b9agent.Redactor()
    for secret in ("abcdefgh", "abcdefgh-and-more-of-it", None, "", "abc"):
        redactor.add(secret)
    assert redactor.scrub("x abcdefgh-and-more-of-it y") == "x \u2026f-it y"
    assert redactor.scrub("x abcdefgh y abc") == "x \u2026 y abc"


# -- the log -----------------------------------------------------------------

def logged(form="text", minimum="info", **fields):
    stream = io.StringIO()
    b9agent.Log(form, minimum, stream=stream)("info", "event", **fields)
    return stream.getvalue()


# parse_secret takes any printable ASCII: a quote or a backslash must not get a secret past the redactor.
@pytest.mark.parametrize("secret", ["plain-secret-abcdef", 'quoted"secret"abcdef', "back\\slash\\secret",
                                    "equals=secret=abcdef", "{brace}<secret>&abcdef", "per%secret%sabc"])
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_secret_of_any_characters_stays_out_of_the_log(secret, form):
    assert b9agent.parse_secret(secret) == secret
    b9agent.REDACTOR.add(secret)
    line = logged(form, what="the gateway said %s and left" % secret)
    middle = secret[5:-4]
    for shape in (secret, json.dumps(secret)[1:-1], secret.replace('"', "'"),
                  json.dumps(middle)[1:-1], middle.replace('"', "'")):
        assert shape not in line


@pytest.mark.parametrize("value", ["a b", "", 'x"y', "a=b", "\n", "caf\u00e9", None, 0, 1.25, 2.0, True])
def test_a_line_can_be_taken_apart_again(value):
    line = logged(value=value, last="end")
    assert line.count("\n") == 1 and line.endswith(" last=end\n")
    assert ("value=" in line) == (value is not None)
    record = json.loads(logged("json", value=value, last="end"))
    assert record["last"] == "end" and record["event"] == "event" and record["level"] == "info"


def test_a_field_cannot_take_the_place_of_the_event():
    record = json.loads(logged("json", **{"time": "never", "what": "x"}))
    assert record["time"] != "never"


def test_levels_below_the_asked_one_are_left_out():
    for minimum, expected in (("debug", 5), ("info", 4), ("warning", 2), ("error", 1)):
        stream = io.StringIO()
        log = b9agent.Log("text", minimum, stream=stream)
        for level in ("debug", "info", "notice", "warning", "error"):
            log(level, "x")
        assert stream.getvalue().count("\n") == expected


def test_the_file_is_rotated_and_private(tmp_path, monkeypatch):
    monkeypatch.setattr(b9agent, "LOG_FILE_MAX_BYTES", 2000)
    log = b9agent.Log(folder=str(tmp_path), stream=io.StringIO())
    for number in range(100):
        log("info", "line", number=number)
    log.close()
    assert sorted(os.listdir(str(tmp_path))) == ["agent.log", "agent.log.1"]
    for name in ("agent.log", "agent.log.1"):
        path = tmp_path / name
        assert path.stat().st_size <= 2100 and stat.S_IMODE(path.stat().st_mode) == 0o600
    kept = (tmp_path / "agent.log.1").read_text() + (tmp_path / "agent.log").read_text()
    numbers = [int(line.rpartition("=")[2]) for line in kept.splitlines()]
    assert numbers == list(range(numbers[0], 100))


def test_a_log_that_cannot_be_written_costs_lines_and_nothing_else(tmp_path):
    stream = io.StringIO()
    for folder in (tmp_path / "not-there", tmp_path / "link"):
        if folder.name == "link":
            folder.mkdir()
            (folder / "agent.log").symlink_to(tmp_path / "elsewhere")
        log = b9agent.Log(folder=str(folder), stream=stream)
        log("info", "first")
        log("info", "second")
        log.close()
    assert stream.getvalue().count("\n") == 4
    assert not (tmp_path / "elsewhere").exists(), "a link was followed"


def test_lines_of_many_threads_do_not_mix(tmp_path):
    log = b9agent.Log(folder=str(tmp_path), stream=io.StringIO())
    threads = [threading.Thread(target=lambda: [log("info", "line", text="x" * 500)
                                                for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    lines = (tmp_path / "agent.log").read_text().splitlines()
    assert len(lines) == 400 and {line.split(" ", 1)[1] for line in lines} == {
        "info line text=" + "x" * 500}


# -- files ---------------------------------------------------------------------

def test_a_file_is_written_whole_with_its_mode(tmp_path):
    path = tmp_path / "f"
    old = os.umask(0o000)
    try:
        b9agent.write_atomic(str(path), "caf\u00e9\n")
        assert (path.read_text(encoding="utf-8"), stat.S_IMODE(path.stat().st_mode)) == ("caf\u00e9\n", 0o600)
        b9agent.write_atomic(str(path), "two", 0o644)
    finally:
        os.umask(old)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("two", 0o644)
    assert os.listdir(str(tmp_path)) == ["f"]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        b9agent.write_atomic(str(path), "new \ud800")
    assert path.read_text() == "old" and os.listdir(str(tmp_path)) == ["f"]
    with pytest.raises(OSError):
        b9agent.write_atomic(str(tmp_path / "no" / "f"), "x")


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "f"
    texts = ["a" * 100000, "b" * 100000]
    b9agent.write_atomic(str(path), texts[0])
    done, seen = threading.Event(), set()

    def read():
        while not done.is_set():
            seen.add(path.read_text())
    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        b9agent.write_atomic(str(path), texts[number % 2])
    done.set()
    reader.join()
    assert seen <= set(texts)


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path):
    target = tmp_path / "target"
    target.write_text("untouched")
    (tmp_path / "f").symlink_to(target)
    b9agent.write_atomic(str(tmp_path / "f"), "x")
    assert target.read_text() == "untouched" and not (tmp_path / "f").is_symlink()


def test_small_texts(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"caf\xc3\xa9 \xff")
    assert b9agent.read_text(str(path)) == "caf\u00e9 \ufffd"
    path.write_bytes(b"x" * 100000)
    assert len(b9agent.read_text(str(path), 50000)) == 50000
    assert b9agent.read_text(str(path)) == "x" * 100000
    assert b9agent.read_text(str(tmp_path / "no")) is None
    assert b9agent.read_text(str(tmp_path)) is None
    assert b9agent.read_text("/dev/null") == ""


def test_a_private_folder_is_made_with_its_parents(tmp_path):
    path = tmp_path / "a" / "b"
    for _ in range(2):
        b9agent.make_private_folder(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode, fits", [(0o700, True), (0o755, True), (0o770, False), (0o777, False),
                                        (0o1777, False), (0o722, False)])
def test_a_folder_where_others_may_write_is_refused_and_never_changed(mode, fits, tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    path.chmod(mode)
    try:
        b9agent.make_private_folder(str(path))
        assert fits
    except b9agent.UsageError as error:
        assert not fits and "chmod 700 %s" % path in str(error)
    assert stat.S_IMODE(path.stat().st_mode) == mode


# -- programs --------------------------------------------------------------------

def test_a_program_and_what_it_says():
    result = b9agent.run_command(["sh", "-c", "echo out; echo err >&2; exit 3"], 30)
    assert (result.exit_code, result.output, result.problem) == (3, "out\nerr\n", "")


def test_a_program_that_is_not_there():
    result = b9agent.run_command(["no-such-program-b9"], 30)
    assert (result.exit_code, result.output) == (None, "") and "no-such-program-b9" in result.problem


def test_a_program_has_no_input_and_a_plain_locale(monkeypatch):
    monkeypatch.setenv("BETA9_TOKEN", "a-token-of-mine")
    result = b9agent.run_command(["sh", "-c", "cat; env"], 30)
    assert "LC_ALL=C\n" in result.output and "a-token-of-mine" not in result.output


def alive(pid):
    try:
        with open("/proc/%d/stat" % pid) as handle:
            return handle.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid):
    """Waits until a process that run_command() started is no more; it ends with the test either way."""
    try:
        wait_until(lambda: not alive(pid), "the program to be ended", 10)
    finally:
        if alive(pid):
            os.killpg(os.getpgid(pid), signal.SIGKILL)


linux = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks for processes in /proc")


@linux
@pytest.mark.parametrize("script", ["echo $$; sleep 600", "echo $$; trap '' TERM; sleep 600; sleep 600",
                                    "echo $$; sleep 600 & wait", "echo $$; exec >&- 2>&-; sleep 600"])
def test_a_program_past_its_limit_is_ended_with_all_it_started(script):
    with StallMeter() as stall:
        began = time.monotonic()
        result = b9agent.run_command(["sh", "-c", script], 0.3)
        took = time.monotonic() - began
    assert result.exit_code is None and result.problem
    assert took < 0.3 + 1.0 + 0.5 + 3 * stall.worst_s
    gone(int(result.output.split()[0]))


@linux
def test_a_child_that_stays_behind_does_not_hold_the_caller():
    result = b9agent.run_command(["sh", "-c", "sleep 600 & echo $!"], 0.3)
    gone(int(result.output.split()[0]))


def test_a_program_that_prints_for_ever_is_cut():
    result = b9agent.run_command(["yes"], 30, 10000)
    assert result.exit_code is None and len(result.output) == 10000 and "10000 bytes" in result.problem


def test_a_program_that_was_killed_has_no_exit_code():
    result = b9agent.run_command(["sh", "-c", "kill -9 $$"], 30)
    assert result.exit_code is None


def test_output_that_is_no_text():
    assert b9agent.run_command(["printf", r"a\377b"], 30).output == "a\ufffdb"


def test_the_environment_of_children(monkeypatch):
    for name in ("BETA9_TOKEN", "BETA9_K3S_TOKEN", "B9AGENT_TOKEN", "NOTIFY_SOCKET", "WATCHDOG_PID",
                 "WATCHDOG_USEC"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("BETA9_POOL_NAME", "gpu")
    left = b9agent.clean_environment()
    assert left["BETA9_POOL_NAME"] == "gpu" and left["PATH"] == os.environ["PATH"]
    assert not [name for name in left if "TOKEN" in name or name.startswith(("NOTIFY", "WATCHDOG"))]


def test_a_proxy_password_is_not_handed_to_children(monkeypatch):
    monkeypatch.setenv("B9AGENT_GATEWAY_PROXY", "http://me:proxy-password@p:1")
    assert "proxy-password" not in "".join(b9agent.clean_environment().values())


def test_every_secret_of_the_table_is_kept_from_children(monkeypatch):
    for row in b9agent.SETTINGS:
        if row.secret:
            monkeypatch.setenv(row.variable, "secret-value-of-" + row.key)
    assert "secret-value-of-" not in "".join(b9agent.clean_environment().values())


def test_signals_reach_a_wait():
    """Wake.set() in a handler ends a wait in the main thread at once."""
    wake = b9agent.Wake()
    old = signal.signal(signal.SIGUSR1, lambda *_: wake.set())
    try:
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        assert wake.wait(60.0) is True
    finally:
        signal.signal(signal.SIGUSR1, old)
        wake.close()
