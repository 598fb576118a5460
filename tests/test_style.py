"""How the file reads, as far as a test can hold it: layers, imports, calls, columns, doctests."""
import ast
import builtins
import collections
import doctest
import io
import os
import re
import symtable
import sys
import sysconfig
import tokenize
import warnings

import pytest

import b9agent
from helpers import AGENT, ROOT

with tokenize.open(AGENT) as handle:
    SOURCE = handle.read()
LINES = SOURCE.split("\n")
TREE = ast.parse(SOURCE)
MAX_COLUMNS, MAX_LINES = 100, 25000


def defined_names():
    """{top-level name: line where it is first bound}, conditional and looped bindings included."""
    found = {}

    def bind(name, line):
        found.setdefault(name, line)

    def visit(node):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bind(node.name, min([node.lineno] + [item.lineno for item in node.decorator_list]))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                bind((alias.asname or alias.name).split(".")[0], node.lineno)
        else:
            for child in ast.walk(node) if isinstance(node, ast.stmt) else ():
                if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                    bind(child.id, node.lineno)
                elif isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)):
                    visit(child)
    for node in TREE.body:
        visit(node)
    return found


DEFINED = defined_names()


def global_uses(table):
    """Names that a scope and those inside it look up in the module or the builtins."""
    found = {symbol.get_name() for symbol in table.get_symbols()
             if symbol.is_referenced() and symbol.is_global()}
    for child in table.get_children():
        found |= global_uses(child)
    return found


def top_definitions():
    """(name, last line, names it uses) of every top-level function and class."""
    ends = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            ends[node.name] = node.end_lineno
    for child in symtable.symtable(SOURCE, AGENT, "exec").get_children():
        if child.get_name() in ends:
            yield child.get_name(), ends[child.get_name()], global_uses(child)


def test_a_reader_never_has_to_look_down():
    upward = ["%s uses %s, which is defined below it, in line %d" % (user, name, DEFINED[name])
              for user, end, names in top_definitions() for name in sorted(names)
              if DEFINED.get(name, 0) > end]
    assert upward == []


def test_no_name_is_defined_twice():
    names = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names += [target.id for node in TREE.body if isinstance(node, ast.Assign)
              for target in node.targets if isinstance(target, ast.Name)]
    assert [name for name, count in collections.Counter(names).items() if count > 1] == []


def test_every_name_that_is_used_is_defined_or_a_builtin():
    known = set(DEFINED) | set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    unknown = ["%s uses %s" % (user, name) for user, _, names in top_definitions()
               for name in sorted(names - known)]
    assert unknown == []


def test_every_top_level_name_is_used():
    """What nothing uses is dead; constants that only tests and installers read are named here."""
    used = {node.id for node in ast.walk(TREE)
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store)}
    used |= {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    imported = {(alias.asname or alias.name).split(".")[0] for node in TREE.body
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert sorted(imported - used) == []
    private = {name for name in DEFINED if name.startswith("_") and not name.startswith("__")}
    assert sorted(private - used) == []


def standard_modules():
    if hasattr(sys, "stdlib_module_names"):
        return set(sys.stdlib_module_names)
    folder = sysconfig.get_paths()["stdlib"]  # 3.9
    files = os.listdir(folder) + os.listdir(os.path.join(folder, "lib-dynload"))
    return {name.split(".")[0] for name in files} | set(sys.builtin_module_names)


def imports():
    """(module, line) of every import, wherever it stands."""
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import in line %d" % node.lineno
            yield node.module, node.lineno


def test_imports_are_of_the_standard_library_alone():
    standard = standard_modules()
    assert [(name, line) for name, line in imports() if name.split(".")[0] not in standard] == []


# Gone, or going, from some Python between 3.8 and 3.14.
GONE = {"asynchat", "asyncore", "imp", "distutils", "cgi", "cgitb", "crypt", "imghdr", "mailcap", "msilib",
        "nis", "nntplib", "ossaudiodev", "pipes", "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib",
        "audioop", "aifc", "chunk", "lib2to3", "tomllib", "zoneinfo", "graphlib"}


def test_imports_are_there_in_every_python_from_3_8_on():
    assert [name for name, _ in imports() if name.split(".")[0] in GONE] == []


FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dbm", "telnetlib", "ftplib", "asyncio"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint", "print"}
FORBIDDEN_METHODS = {"os.system", "os.popen", "time.sleep", "tempfile.mktemp", "os._exit",
                     "yaml.load", "os.umask", "ssl._create_unverified_context"}


def test_forbidden_calls():
    found = []
    for node in ast.walk(TREE):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Assert):
            found.append("assert in line %d" % line)
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append("bare except in line %d" % line)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func) if hasattr(ast, "unparse") else ""
            if called in FORBIDDEN_CALLS | FORBIDDEN_METHODS:
                found.append("%s in line %d" % (called, line))
            for keyword in node.keywords:
                if keyword.arg == "shell" and not (isinstance(keyword.value, ast.Constant)
                                                   and keyword.value.value is False):
                    found.append("shell= in line %d" % line)
    found += ["import %s in line %d" % (name, line) for name, line in imports()
              if name.split(".")[0] in FORBIDDEN_MODULES]
    assert found == []


def test_tls_is_never_left_unverified():
    for word in ("CERT_NONE", "check_hostname = False", "_create_unverified"):
        assert word not in SOURCE


def test_broad_excepts_name_what_they_caught():
    """A broad except stands at a boundary and logs or raises: it uses the error, or re-raises."""
    silent = []
    for node in ast.walk(TREE):
        if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name) and \
                node.type.id in ("Exception", "BaseException"):
            raises = any(isinstance(child, ast.Raise) for child in ast.walk(node))
            uses = node.name and any(isinstance(child, ast.Name) and child.id == node.name
                                     for statement in node.body for child in ast.walk(statement))
            if not raises and not uses:
                silent.append(node.lineno)
    assert silent == []


def test_columns_and_lines():
    wide = [number for number, line in enumerate(LINES, 1) if len(line) > MAX_COLUMNS]
    assert wide == []
    assert len(LINES) <= MAX_LINES
    assert [number for number, line in enumerate(LINES, 1) if line != line.rstrip()] == []
    indents = [token for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline)
               if token.type == tokenize.INDENT]
    assert [token.start[0] for token in indents if "\t" in token.string] == []
    assert SOURCE.endswith("\n") and not SOURCE.endswith("\n\n")


def sections():
    """[(number, line)] of the banners."""
    return [(int(match.group(1)), number) for number, line in enumerate(LINES)
            for match in [re.match(r"# (\d+)\. \S", line)]
            if match and LINES[number - 1].startswith("# -----") and
            LINES[number + 1].startswith("# -----")]


def test_sections_are_numbered_in_order():
    numbers = [number for number, _ in sections()]
    assert numbers == sorted(set(numbers)) and numbers[0] == 1 and len(numbers) > 10


def test_no_function_is_over_sixty_lines():
    long = [(node.name, node.end_lineno - node.lineno + 1) for node in ast.walk(TREE)
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60]
    assert long == []


def test_doctests():
    result = doctest.testmod(b9agent, report=True)
    assert result.failed == 0 and result.attempted > 10


def test_every_python_down_to_3_6_can_parse_the_file():
    """So that the old ones can say that they are too old, instead of a SyntaxError."""
    ast.parse(SOURCE, feature_version=(3, 6))
    for node in ast.walk(TREE):
        assert type(node).__name__ not in ("NamedExpr", "Match", "TryStar"), node.lineno
        if isinstance(node, ast.arguments):
            assert not node.posonlyargs
    assert "from __future__ import annotations" not in SOURCE, "a SyntaxError on 3.6"
    names = [token.string for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline)
             if token.type == tokenize.NAME]
    assert "match" not in [word for word, following in zip(names, names[1:]) if following == "case"]
    assert not re.search(r"""f["'][^"']*\{[^{}"']*=\}""", SOURCE), "f'{x=}' is of 3.8"


def test_the_check_of_the_version_stands_before_anything_newer_is_imported():
    body = [node for node in TREE.body if not isinstance(node, ast.Expr)]
    assert isinstance(body[0], ast.Import) and [alias.name for alias in body[0].names] == ["sys"]
    assert isinstance(body[1], ast.If) and "version_info" in ast.dump(body[1].test)


def test_no_warnings_when_it_is_compiled():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(SOURCE, AGENT, "exec")


def test_strings_and_comments_are_text_without_control_characters():
    """A tab can stand in a text that is another program's file."""
    bare = SOURCE.replace("\n", "").replace("\t", "")
    assert b9agent.printable(bare) == bare


@pytest.mark.parametrize("name", ["tests/run", "tests/matrix", "tests/bench/run", ".ci/run", "b9agent.py"])
def test_what_is_run_is_executable_and_has_a_first_line(name):
    path = os.path.join(ROOT, name)
    assert os.access(path, os.X_OK)
    with open(path, "rb") as script:
        assert script.readline().startswith(b"#!/")
