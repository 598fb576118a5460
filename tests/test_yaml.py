"""The YAML subset as properties, with PyYAML as the oracle: what the agent writes it reads, and
whatever it accepts means the same to another YAML reader.  (The exact messages of single files are in
test_settings.py, which the interpreter matrix runs without hypothesis and PyYAML.)"""
import itertools
import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import b9agent

bounded = settings(max_examples=600, deadline=None, derandomize=True, database=None,
                   suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def plain(node):
    """A Node as bare values."""
    value = node.value
    if isinstance(value, dict):
        return {name: plain(child) for name, child in value.items()}
    if isinstance(value, list):
        return [plain(child) for child in value]
    return value


def oracle(text):
    """What PyYAML reads, every scalar as text; an empty document is an empty mapping."""
    value = yaml.load(text, yaml.BaseLoader)
    return {} if value in (None, "") else value


def check(text):
    """Accepted: PyYAML reads the same.  Refused: as a YamlError with a line of the text."""
    try:
        tree = plain(b9agent.parse_yaml(text))
    except b9agent.YamlError as error:
        assert 1 <= error.line <= text.count("\n") + 1, text
        assert re.search(r".+, expected .+", str(error)), str(error)
        return None
    try:
        expected = oracle(text)
    except yaml.YAMLError as error:
        pytest.fail("accepted what PyYAML refuses: %r as %r (%s)" % (text, tree, error))
    assert tree == expected, text
    return tree


# Any text that a file can hold: no lone surrogates, which are no text.
any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=24)
nasty_text = st.sampled_from([
    "", " ", "~", "null", "true", "no", "y", "-", "--", "- a", "a: b", "a #b", "#", "'", '"', "''",
    "\\", "\\n", "\n", "a\n", "\ta", "a\t", "0x10", "012", "1e5", "-1", "1_000", "1:30", "=", "<<", "{",
    "}", "[a]", "*a", "&a", "!t", "|", ">", "%", "@", "`", "? a", "2026-11-21", ".inf", "\u2028",
    "\x85", "\x00", "\x7f", "\ufeff", "\u00e9", "\U0001f600", "\ufffe", "a" * 300])
scalars = st.one_of(nasty_text, any_text)
trees = st.recursive(
    st.one_of(scalars, st.lists(scalars, max_size=4)),
    lambda inner: st.dictionaries(scalars, inner, max_size=4), max_leaves=12).filter(
        lambda tree: isinstance(tree, dict))


@bounded
@given(trees)
def test_what_is_written_is_read_back(tree):
    assert plain(b9agent.parse_yaml(b9agent.render_yaml(tree))) == tree


@bounded
@given(trees)
def test_what_is_written_means_the_same_to_pyyaml(tree):
    assert oracle(b9agent.render_yaml(tree)) == tree


# Lines of the pieces that YAML's grammar gives a meaning to.
_PIECES = ["a", "b1", "gpu", ":", ": ", " : ", "- ", "-", "#", " #", " ", "  ", "'", '"', "''", '\\"', "\\",
           "[", "]", "{", "}", ",", ", ", "|", ">", "&a", "*a", "!t", "%", "@", "`", "?", "? ", "~", "=",
           "<<", "---", "...", "\t", "\u00e9", "\\x41", "\\u00e9", "\\n", "0", "-1", "1.5", ".", "/", "\r",
           "\x85", "\u00a0", "\ufeff"]
pieces = st.lists(st.sampled_from(_PIECES), max_size=8).map("".join)
piece_lines = st.lists(
    st.tuples(st.sampled_from(["", "", " ", "  ", "\t"]), st.sampled_from(["", "a: ", "b: ", "c:", "- "]),
              pieces).map("".join), max_size=4).map("\n".join)

# Documents of the subset, and such as are one edit away from it.
_words = st.sampled_from(["a", "b", "pool", "gpu 1", "x-y", "http://h:1/p", "a#b", "a:b", "'q'", '"q"',
                          "'it''s'", '"\\n"', "[]", "[a, b]", "{}", "{a: b}", "[a, [b]]", "{a: {b: c}}",
                          "['a', \"b\"]", "~", "", "# c", "a # c", "{\"a\": b}", "{'a' : b}", "[a b, c]",
                          "{a: }", "{a}", "[a: b]", "[?a]", "[:a]", "[#a]", "[a, #b]", "{a:b}", "-a",
                          "- a", "?a", ":a", "a?b", "[a?b]", "{a?: b}"])
_names = st.sampled_from(["a", "b", "c", "pool", "a b", "'a'", '"b"', "x.y", "-a", "?a", "a#", "1", ".",
                          "~", "=", "<<", "\u00e9", "a ", "0x1", "{a", "[a"])
_indents = st.sampled_from(["", "", "", "  ", "  ", "    ", " "])
mapping_lines = st.lists(st.one_of(
    st.builds("{}{}: {}".format, _indents, _names, _words),
    st.builds("{}{}:".format, _indents, _names),
    st.builds("{}- {}".format, _indents, _words),
    st.builds("{}-{} {}: {}".format, _indents, _indents, _names, _words),
    st.builds("{}- {}:".format, _indents, _names),
    st.sampled_from(["", "# c", "  # c", "---", "...", "-", "  -"]),
), max_size=7).map("\n".join)


@st.composite
def edited(draw):
    text = draw(mapping_lines)
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(st.sampled_from(_PIECES)) + text[at + draw(st.integers(0, 2)):]


@bounded
@given(piece_lines)
def test_pieces_of_grammar_are_read_as_pyyaml_reads_them_or_refused(text):
    check(text)


@bounded
@given(mapping_lines)
def test_documents_near_the_subset_are_read_as_pyyaml_reads_them_or_refused(text):
    check(text)


@bounded
@given(edited())
def test_documents_with_one_edit_are_read_as_pyyaml_reads_them_or_refused(text):
    check(text)


@bounded
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_at_all_is_read_as_pyyaml_reads_it_or_refused(text):
    check(text)


@bounded
@given(trees, st.data())
def test_a_file_cut_anywhere_is_read_as_pyyaml_reads_it_or_refused(tree, data):
    text = b9agent.render_yaml(tree)
    check(text[:data.draw(st.integers(0, len(text)))])


# Every value of up to three of these, alone, in a list, in a mapping, in quotes: no luck needed.
_TOKENS = ["a", " ", ":", ",", "#", "-", "?", "[", "]", "{", "}", "'", '"', "\\", "\t", "&", "|", "1", "."]


@pytest.mark.parametrize("before, after", [
    ("a: ", ""), ("a:", ""), ("", ": a"), ("a:\n- ", ""), ("a:\n- b: ", "\n  c: d"),
    ("a: [", "]"), ("a: {", "}"),
    ("a: [b, ", "]"), ("a: {b: ", "}"), ("a: {b: c, ", "}"), ("a: '", "'"), ('a: "', '"'), ("a: [", ""),
    ("a: {", ""), ("a: {b: [", "]}"), ("a: b", "")], ids=repr)
def test_every_short_value_is_read_as_pyyaml_reads_it_or_refused(before, after):
    accepted = 0
    for count in range(4):
        for tokens in itertools.product(_TOKENS, repeat=count):
            accepted += check(before + "".join(tokens) + after) is not None
    assert accepted


NESTED = """\
# made by hand
gateway:
    host: gw.example   # the name
    port: 1994
machine: {id: "12345678", token: 'it''s-secret'}
pool: gpu

limits:
  gpu_ids:
  - 0
  - "1"
  more: [2, 'x, y', "\\u00e9"]
log:
"""


OF_MAPPINGS = """\
users:
- name: a
  user:
    token: x
-   name: "b"
    args:
    - c
    - 'd e' : f
      g: [h]
    -
      i: j
other:
  - k:
    l: m
"""


def test_lists_of_mappings_are_read():
    assert check(OF_MAPPINGS) == {
        "users": [{"name": "a", "user": {"token": "x"}},
                  {"name": "b", "args": ["c", {"d e": "f", "g": ["h"]}, {"i": "j"}]}],
        "other": [{"k": "", "l": "m"}]}


def test_a_document_of_the_subset_is_accepted_and_not_only_refused():
    assert check(NESTED) == {
        "gateway": {"host": "gw.example", "port": "1994"},
        "machine": {"id": "12345678", "token": "it's-secret"}, "pool": "gpu",
        "limits": {"gpu_ids": ["0", "1"], "more": ["2", "x, y", "\u00e9"]}, "log": ""}


@pytest.mark.parametrize("text", [
    "a: b\r\nc: d\r\n", "\ufeffa: b\n", "---\na: b\n", "a:\n- b\n-\n  - c\n", "'a b' : c", "a: []\nb: {}",
    "a: - b", "a: b:c", "a: http://x:1/y#z", "a: {b: [c, {d: e}]}", "a: 'b # c' # d", "", "# only\n\n"])
def test_forms_of_the_subset_and_near_it(text):
    check(text)


@bounded
@given(st.lists(st.sampled_from(["a: b", "a: [b, c]", "a:\n  - b", "a: {b: c}", "a: 'b'"]), min_size=1,
                max_size=1), st.sampled_from(["", " ", "  # c", " #"]), st.sampled_from(["\n", "\r\n", ""]))
def test_comments_and_line_ends_change_nothing(lines, comment, end):
    tree = check(lines[0])
    assert tree is not None and check(lines[0].replace("\n", end or "\n") + comment + end) == tree
