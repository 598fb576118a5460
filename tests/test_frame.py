"""The dashboard's frame: golden screens, and what holds for any status on any terminal.

The screens are in tests/frames/, UTF-8, a screen a file, to be looked at with `cat`; a colour in them
is written ‹ok›, ‹warn›, ‹bad›, ‹dim› or ‹head›, and ‹› ends it.  Where a change of the frame is meant,

    B9AGENT_FRAMES=write tests/.venv/bin/python -m pytest -c tests/pytest.ini tests/test_frame.py

writes anew those that differ, and fails in each, so that none is written unseen: `git diff
tests/frames` shows what changed.
"""
import json
import os
import re

import pytest

import b9agent
from b9agent import Look, View, cell_width, clean, clip, render_frame, share_rows
from helpers import HERE
from views import A100, APPLE, BUSY, EVIL, GB, GPUS, HISTORY, HOSTILE, LOG, PODS, READY, VIEWS, gpu

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as some  # noqa: E402

FRAMES = os.path.join(HERE, "frames")
WRITE = os.environ.get("B9AGENT_FRAMES") == "write"  # before conftest.py takes it away
UTF8, COLOR, ASCII = Look(True, False), Look(True, True), Look(False, False)
SGR = re.compile("\x1b\\[([0-9]*)m")


# -- the screens --------------------------------------------------------------

MAIN = ("starting", "ready", "busy", "unreachable", "refused", "hostile", "apple")
SCREENS = [(name, size, UTF8) for name in MAIN for size in ((80, 24), (120, 40), (40, 12))]
SCREENS += [("busy", size, look) for size, look in (
    ((80, 24), COLOR), ((80, 24), ASCII), ((120, 40), COLOR), ((200, 60), UTF8), ((20, 5), UTF8), ((19, 3), UTF8),
    ((60, 16), UTF8))]
SCREENS += [("sick", (80, 24), UTF8), ("sick", (40, 12), UTF8), ("unanswered", (19, 3), UTF8)]
SCREENS += [("hostile", (80, 24), ASCII), ("refused", (80, 24), COLOR), ("crowd", (80, 24), UTF8),
            ("crowd", (200, 60), UTF8), ("waiting", (80, 24), UTF8), ("unanswered", (80, 24), UTF8)]
SCREENS += [(name, size, UTF8) for name in ("logs", "logs-back", "filtered", "doctor", "help", "prompt")
            for size in ((80, 24), (40, 12))]
SCREENS += [("logs", (80, 24), COLOR), ("doctor", (80, 24), COLOR)]
SCREENS += [("pulling", (80, 24), UTF8), ("pulling", (40, 12), UTF8)]


def screen_name(name, size, look):
    return "%s-%dx%d%s" % (name, size[0], size[1], "-color" if look.color else "" if look.utf8 else "-ascii")


def readable(line):
    """With names for its colours."""
    names = dict({code: style for style, code in b9agent._SGR.items()}, **{"0": ""})
    return SGR.sub(lambda match: "‹%s›" % names[match.group(1)], line)


@pytest.mark.parametrize("name, size, look", SCREENS, ids=[screen_name(*screen) for screen in SCREENS])
def test_a_screen_is_as_it_was_looked_at(name, size, look):
    path = os.path.join(FRAMES, screen_name(name, size, look) + ".txt")
    drawn = "".join(readable(line) + "\n" for line in render_frame(VIEWS[name], *size, look))
    kept = None
    if os.path.exists(path):
        with open(path, encoding="utf-8") as handle:
            kept = handle.read()
    if WRITE and drawn != kept:
        with open(path, "w", encoding="utf-8") as handle:
            handle.write(drawn)
        pytest.fail("%s is written anew: look at it" % path)
    assert drawn == kept


def test_no_screen_is_kept_that_nothing_is_compared_with():
    assert sorted(os.listdir(FRAMES)) == sorted(screen_name(*screen) + ".txt" for screen in SCREENS)


# -- what holds for any screen ------------------------------------------------

def shown(line):
    return SGR.sub("", line)


def check(view, columns, rows, look):
    """A screen of exactly that size, without anything that moves a cursor."""
    drawn = render_frame(view, columns, rows, look)
    assert len(drawn) == max(0, rows)
    for line in drawn:
        bare = shown(line)
        assert cell_width(bare) == max(0, columns), (columns, rows, bare)
        assert b9agent.printable(bare) == bare
        if look.color:
            assert line.endswith("\x1b[0m")
        else:
            assert "\x1b" not in line
        if not look.utf8:
            assert bare.isascii()
    return [shown(line) for line in drawn]


LOOKS = some.sampled_from([UTF8, COLOR, ASCII, Look(False, True)])
NUMBERS = some.one_of(some.integers(), some.floats(), some.sampled_from([0, -1, 1e308, 10 ** 400, 99.99, 25.3]))
TEXTS = some.one_of(some.text(max_size=60), some.sampled_from(
    [EVIL, "日本語" * 30, "👩‍👩‍👧🇩🇪❤️", "\ud800", "ready", "RUNNING", "x" * 5000, "2026-11-21T10:15:20Z"]))
JSON = some.recursive(some.one_of(some.none(), some.booleans(), NUMBERS, TEXTS), lambda inner: some.one_of(
    some.lists(inner, max_size=4), some.dictionaries(some.text(max_size=8), inner, max_size=4)), max_leaves=12)
SIZES = some.tuples(some.integers(0, 220), some.integers(0, 70))
often = hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=400,
                            suppress_health_check=list(hypothesis.HealthCheck))


def paths(value, at=()):
    """Of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield at + (key,)
        yield from paths(part, at + (key,))


def changed(value, at, new):
    """A copy with something else at a path; None for new: without it, where it is an object's."""
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is None and len(at) == 1 and isinstance(copy, dict):
        del copy[at[0]]
    else:
        copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


def as_json(value):
    """Tuples as JSON has them."""
    if isinstance(value, dict):
        return {key: as_json(part) for key, part in value.items()}
    return [as_json(part) for part in value] if isinstance(value, (list, tuple)) else value


WHOLE = [as_json(status) for status in (BUSY, HOSTILE, APPLE)]
CHANGES = [(status, at) for status in WHOLE for at in paths(status)]


@often
@hypothesis.given(some.sampled_from(CHANGES), some.one_of(some.none(), JSON), SIZES, LOOKS)
def test_anything_in_any_place_of_a_status_is_drawn(change, new, size, look):
    status, at = change
    check(View(changed(status, at, new), LOG, HISTORY), *size, look)


PANES = some.sampled_from(["", "logs", "doctor", "help", "no such pane", EVIL])


@often
@hypothesis.given(JSON, some.lists(JSON, max_size=8), PANES, some.integers(), TEXTS,
                  some.one_of(some.none(), TEXTS), SIZES, LOOKS)
def test_whatever_a_view_has_in_it_is_drawn(status, lines, pane, scroll, text, prompt, size, look):
    records = tuple(lines) + tuple(dict(LOG[0], **{"x": value}) for value in lines) + LOG
    check(View(status, records, {"cpu": (1.0, float("nan"), float("inf")), "memory": ()}, 3.0, text, pane,
               scroll, text[:2], prompt, text, (text, "fail " + text)), *size, look)


def test_every_size_is_filled_whatever_the_view_is():
    for view in VIEWS.values():
        for columns in (*range(0, 45), 60, 79, 80, 99, 100, 101, 119, 150, 230):
            for rows in (*range(0, 9), 12, 13, 16, 24, 40, 61):
                check(view, columns, rows, COLOR)


def test_a_size_below_nothing_is_nothing():
    assert render_frame(VIEWS["busy"], -1, -1, UTF8) == []
    assert render_frame(VIEWS["busy"], -1, 2, UTF8) == ["", ""]
    assert render_frame(VIEWS["busy"], 0, 2, UTF8) == ["", ""]


def test_forty_by_twelve_still_says_what_matters():
    text = "\n".join(check(VIEWS["busy"], 40, 12, UTF8))
    for what in ("READY", "CPU", "28%", "78%", "A100", "62%", "running", "gemma3:1b"):
        assert what in text


def test_parts_go_in_the_order_of_their_ranks():
    """What comes with a row more stands lower in rank than all that was there, but for the small ones
    that had fitted in where it did not."""
    marks = {"status": "Status: READY", "host": "CPU", "GPUS": "GPUS", "INFERENCE": "INFERENCE", "LOGS": "LOGS",
             "WORKER PODS": "WORKER PODS", "links": "Tunnel", "ENERGY": "ENERGY"}
    parts = {part.name: part for part in b9agent.PARTS}
    there = []
    for rows in range(4, 60):
        text = "\n".join(check(VIEWS["busy"], 80, rows, UTF8))
        there.append({name for name, mark in marks.items() if mark in text})
    assert there[0] == {"status"} and there[1] == {"status", "host"} and there[-1] == set(marks)
    for fewer, more in zip(there, there[1:]):
        for come in more - fewer:
            assert all(parts[come].rank > parts[name].rank or parts[come].least > parts[name].least
                       for name in fewer), (come, fewer)


def test_rows_are_shared_to_the_last_and_never_more():
    parts = [(part, want) for part, want in zip(b9agent.PARTS, (2, 3, 1, 1, 65, 40, 4, 3, 900))]
    for rows in range(0, 200):
        given = share_rows(parts, rows)
        assert sum(given.values()) <= rows
        assert sum(given.values()) == rows or rows < 18
        for part, want in parts:
            assert part.least <= given.get(part.name, part.least) <= max(want, part.least)


def test_no_colour_says_what_no_word_says():
    for name, view in VIEWS.items():
        for size in ((80, 24), (120, 40)):
            assert [shown(line) for line in render_frame(view, *size, COLOR)] == render_frame(view, *size, UTF8)


def test_what_is_unknown_is_never_a_nought():
    status = dict(READY, cpu_percent=None, memory_percent=None, gpu_count=None, uptime_seconds=None, host={},
                  gpus=[gpu(index=0, vendor="nvidia")], metrics={})
    text = "\n".join(check(View(status), 120, 40, UTF8))
    assert "0%" not in text and "0.0" not in text and "0 W" not in text and "0°C" not in text
    assert text.count("–") >= 6


class OneGpu(b9agent.GpuSource):
    vendor = "nvidia"

    def present(self):
        return True

    def read(self):
        return b9agent.GpuReading("nvml", (b9agent.Gpu(
            7, uuid="GPU-1", utilization_pct=62.0, memory_used_bytes=41 * GB, temperature_c=61.0, power_w=301.2,
            processes=(), **A100),))


def test_what_an_agent_says_of_itself_is_shown(tmp_path):
    """The names of the fields are those of a real one."""
    tmp_path.chmod(0o700)
    loaded = b9agent.load_settings({"config": os.devnull, "state_dir": str(tmp_path), "token": "-" * 9,
                                    "gateway_host": "gw.example", "pool_name": "my-pool"}, {})
    with open(os.devnull, "w") as nowhere:
        log = b9agent.Log(stream=nowhere)
        agent = b9agent.Agent(loaded, log, keep=False)
        agent._gpus = b9agent.GpuSampler([OneGpu()])
        agent.keepalive_payload()
        log("warning", "gateway_unreachable", what="no way there", tries=3)
    status = json.loads(json.dumps(agent.status()))
    records = tuple(json.loads(line) for _, line in log.kept.after(0))
    text = "\n".join(check(View(status, records), 120, 40, UTF8))
    host = status["host"]
    for what in ("Beta9 Agent: %s " % agent.identity.machine_id, "Status: STARTING", "Heartbeat never",
                 "Gateway: http://gw.example:1994", "Pool: my-pool", "of %d threads" % host["cpu_threads"],
                 "%.0f%%" % status["memory_percent"], "/%.1f GiB" % (host["memory_total_bytes"] / GB),
                 "7  A100-SXM4-80GB  ██████▏░░░  62%  41.0/80.0 GiB  61°C  301 W  in use", "GPUS: 0 free of 1",
                 "Now: GPUs 301 W measured", "Status: stopped",
                 'warning gateway_unreachable what="no way there" tries=3'):
        assert what in text, text


def test_only_numbers_count_as_figures():
    for odd in (True, "28", "", [1], {}, float("nan"), float("inf"), 10 ** 400):
        text = "\n".join(check(View(dict(READY, cpu_percent=odd, memory_percent=odd)), 80, 24, UTF8))
        assert re.search("CPU +– of", text) and re.search("Memory +– 200", text), odd


@pytest.mark.parametrize("pct, drawn", [(0, "░░░░"), (3.2, "▏░░░"), (50, "██░░"), (100, "████"), (250, "████"),
                                        (-7, "░░░░"), (None, "    ")])
def test_a_bar_is_as_long_as_its_share(pct, drawn):
    assert b9agent._bar(pct, 4) == drawn


def test_a_line_that_is_cut_says_so_wherever_it_is_cut():
    line = [("abc", ""), ("", "dim"), ("def", "bad"), ("日本", "")]
    assert ["".join(text for text, _ in b9agent._cut(line, cells)) for cells in range(11)] == [
        "", "…", "a…", "ab…", "abc…", "abcd…", "abcde…", "abcdef…", "abcdef… ", "abcdef日…", "abcdef日本"]


def test_a_text_without_end_is_not_read_to_its_end():
    assert len(b9agent._text("x" * 10 ** 6)) == 1000


def test_a_heartbeat_that_is_late_has_a_colour():
    def late(seconds):
        return readable(render_frame(View(dict(READY, last_keepalive_seconds_ago=seconds)), 80, 24, COLOR)[1])
    assert "Heartbeat 1m40s" in late(100) and "‹bad›Heartbeat 6m40s" in late(400)
    assert "‹warn›Heartbeat 3m20s" in late(200)


def test_a_long_log_is_scrolled_from_its_newest_line_to_its_oldest_and_no_further():
    records = tuple(dict(LOG[0], event="event%03d" % number) for number in range(300))

    def seen(scroll):
        text = "\n".join(check(View(READY, records, pane="logs", scroll=scroll), 80, 24, UTF8))
        return re.findall("event([0-9]{3})", text)
    assert seen(0) == ["%03d" % number for number in range(281, 300)]
    assert seen(1) == ["%03d" % number for number in range(280, 299)]
    assert seen(10 ** 9) == seen(281) == ["%03d" % number for number in range(0, 19)]
    assert seen(-5) == seen(0)


def test_a_filter_looks_at_all_of_a_line_in_either_case():
    for words in ("OLLAMA", "error", "inference_f", "10:15:31", "what="):
        text = "\n".join(check(View(READY, LOG, filter=words), 80, 24, UTF8))
        assert "inference_failed" in text and "listening" not in text
    assert "nothing yet" in "\n".join(check(View(READY, LOG, filter="nowhere"), 80, 24, UTF8))


def test_what_is_typed_is_seen_to_its_end():
    typed = "Pull model: " + "日本語" * 40 + "end_"
    assert check(View(READY, prompt=typed), 30, 10, UTF8)[-1].rstrip().endswith("日本語end_")
    assert check(View(READY, prompt=typed), 10, 2, UTF8)[0].rstrip().endswith("end_")


# -- other people's word on widths ------------------------------------------------

@often
@hypothesis.given(some.one_of(some.text(max_size=80), TEXTS))
def test_clean_text_is_as_wide_as_wcwidth_says(text):
    wcwidth = pytest.importorskip("wcwidth")
    cleaned = clean(text)
    widths = [wcwidth.wcwidth(char) for char in cleaned]
    assert -1 not in widths and sum(widths) == cell_width(cleaned)
    assert b9agent.printable(cleaned) == cleaned == clean(cleaned)


def test_every_character_is_as_wide_as_wcwidth_says():
    wcwidth = pytest.importorskip("wcwidth")
    wrong = [hex(code) for code in range(0x110000) for text in [clean(chr(code))]
             if cell_width(text) != sum(map(wcwidth.wcwidth, text))]
    assert wrong == []


@pytest.mark.parametrize("text, cleaned, width", [
    ("gpu-box", "gpu-box", 7), ("日本語", "日本語", 6), ("ｗｉｄｅ", "ｗｉｄｅ", 8), ("한글", "한글", 4),
    ("e\u0301", "é", 1), ("x\u0301", "x\u0301", 1), ("👍", "👍", 2), ("👍🏽", "👍", 2), ("❤️", "❤", 1),
    ("👩‍👩‍👧", "👩👩👧", 6), ("🇩🇪", "\ufffd\ufffd", 2), ("±§°", "±§°", 3), ("a\u200bb\u00adc", "abc", 3),
    ("\u0301a", "a", 1), ("a\u3000b", "a b", 3), ("\x9b31m", "\\x9b31m", 7), ("\u2028", "\\u2028", 6),
    ("क\u093e", "क\ufffd", 2), ("\U000e0041\U000e0042", "", 0), ("a\U000e0100", "a", 1), ("\ue000", "\ufffd", 1)])
def test_text_is_cleaned_and_measured(text, cleaned, width):
    assert clean(text) == cleaned and cell_width(cleaned) == width


@often
@hypothesis.given(some.one_of(some.text(max_size=40), TEXTS), some.integers(-2, 60))
def test_a_text_is_clipped_to_its_cells_and_no_character_in_half(text, cells):
    text = clean(text)
    cut = clip(text, cells)
    if cell_width(text) <= max(0, cells):
        assert cut == text
    else:
        assert cell_width(cut) == max(0, cells)
        assert cells <= 0 or "…" in cut and text.startswith(cut[:cut.rindex("…")])


@pytest.mark.parametrize("name", sorted(VIEWS))
@pytest.mark.parametrize("size", [(80, 24), (40, 12), (120, 40)], ids="{0[0]}x{0[1]}".format)
def test_a_terminal_shows_what_is_meant(name, size):
    """pyte, an emulator: every cell where it should be, and nothing but text and colours come of it."""
    pyte = pytest.importorskip("pyte")
    columns, rows = size
    screen = pyte.Screen(columns, rows)
    drawn = render_frame(VIEWS[name], columns, rows, COLOR)
    pyte.Stream(screen).feed("\r\n".join(drawn))
    # pyte composes what it can, as NFC does.
    assert screen.display == [shown(line) for line in drawn]
    assert (screen.cursor.x, screen.cursor.y) == (columns, rows - 1) and screen.title == ""
    assert screen.cursor.attrs == pyte.Screen(1, 1).cursor.attrs
    if rows > 4:
        assert {screen.buffer[row][columns - 1].data for row in range(rows - 1)} <= set("╗║╣╢╝")


def test_colours_stand_where_they_are_meant_on_a_terminal():
    pyte = pytest.importorskip("pyte")
    screen = pyte.Screen(80, 24)
    pyte.Stream(screen).feed("\r\n".join(render_frame(VIEWS["busy"], 80, 24, COLOR)))

    def color_of(word):
        row = next(number for number, line in enumerate(screen.display) if word in line)
        return {screen.buffer[row][column].fg for column in range(
            screen.display[row].index(word), screen.display[row].index(word) + len(word))}
    assert color_of("READY") == {"green"} and color_of("FAILED") == {"red"}
    assert color_of("gateway_unreachable") == {"brown"} and color_of("Gateway:") == {"default"}  # 33


# -- its price ------------------------------------------------------------------

def test_a_screen_costs_little():
    """2 ms are a budget; the test allows a slow machine four times as much."""
    import time
    busy = dict(BUSY, gpus=[dict(GPUS[0], index=number) for number in range(8)],
                pods=dict(BUSY["pods"], pods=[dict(PODS[0], name="worker-%d" % number) for number in range(20)]))
    view = View(busy, LOG * 200, dict(HISTORY, **{"gpu%d" % number: (50.0,) * 60 for number in range(8)}))
    took = []
    for _ in range(20):
        begun = time.process_time()
        render_frame(view, 120, 40, COLOR)
        took.append(time.process_time() - begun)
    assert min(took) < 0.008
