"""The benches: that each runs with its own agent, and that the README's block is what they wrote."""
import doctest
import os
import subprocess
import sys

import pytest

from helpers import HERE, ROOT, replace_block

BENCH = os.path.join(HERE, "bench")
sys.path.append(BENCH)

import common  # noqa: E402

RESULT = {"title": "A thing", "about": "what it is.", "columns": ["time, ms", "requests/s"],
          "rows": [["b9agent", [2.0, 1000.0]], ["peer", [5.0, None]]], "versions": ["peer 1.0"],
          "machine": "2 cores", "date": "1 May 2026", "commit": "abc", "quick": False, "claims": []}


def test_figures_are_written_as_their_examples_say():
    assert doctest.testmod(common).failed == 0


def test_only_the_block_of_results_is_written_anew():
    block = common.readme_block({"start": RESULT, "door": dict(RESULT, date="2 May 2026", quick=True)})
    assert block.splitlines()[1:9] == [
        "1 May 2026, commit abc, 2 cores (start).", "2 May 2026, commit abc, 2 cores, a quick run (door).", "",
        "**A thing** (peer 1.0): what it is.", "", "|  | time, ms | requests/s |", "| --- | --- | --- |",
        "| b9agent | 2.00 | 1,000 |"]
    assert "| peer | 5.00 (2.5×) | – |" in block
    text = "before\n<!-- results -->\nold\n<!-- /results -->\nafter\n"
    assert replace_block(text, "results", "new") == text.replace("old", "new")
    with pytest.raises(ValueError):
        replace_block("no place", "results", "new")


def test_the_readme_has_a_short_table_of_each_bench():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as handle:
        block = handle.read().partition("<!-- results -->\n")[2].partition("<!-- /results -->")[0]
    assert block.count("\n**") == len(common.NAMES)
    assert len(block.splitlines()) <= 55


@pytest.mark.root
@pytest.mark.parametrize("name, flags", [
    ("start", ["--seconds", "4"]), ("sample", []), ("control", []),
    ("door", ["--streams", "4"]), ("frame", ["--seconds", "2"])])
def test_a_bench_runs_a_round_with_its_own_agent(name, flags, tmp_path):
    done = subprocess.run(
        [sys.executable, "-B", os.path.join(BENCH, name + ".py"), "--quick", "--alone", "--rounds", "1",
         *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
        env=dict(os.environ, TMPDIR=str(tmp_path)))
    assert done.returncode == 0, done.stdout
    assert "\n| b9agent" in done.stdout
    assert os.listdir(str(tmp_path)) == []
