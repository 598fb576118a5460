"""`b9agent.py service`: definitions, steps, health, what is taken back; for real in tests/systemd-box,
and with stand-ins for launchctl and rc-service that start real agents."""
import json
import os
import plistlib
import pwd
import re
import signal
import socket
import stat
import subprocess
import sys
import types

import pytest

import b9agent
from helpers import AGENT, PATIENCE_S, ROOT, files_with, run_agent, tree, wait_until

ME = pwd.getpwuid(os.geteuid())
AS_ME = ("--run-as", "root") if ME.pw_uid == 0 else ()
OURS = b9agent.Account("b9agent", 4242, 4242, "/Users/b9agent")


def place_of(manager, scope="system", account=OURS, python="/usr/bin/python3", **changes):
    return b9agent.make_place(manager, scope, account, python)._replace(**changes)


def fields(unit):
    """[(section, name, value)] of a unit file."""
    section, found = "", []
    for line in unit.splitlines():
        if line.startswith("["):
            section = line
        elif line and not line.startswith("#"):
            found.append((section, *line.split("=", 1)))
    return found


# -- definitions ----------------------------------------------------------

@pytest.mark.parametrize("manager, name", [("systemd", "b9agent.service"),
                                           ("launchd", "com.b9agent.plist")])
def test_the_files_of_the_repository_are_what_the_templates_render(home, manager, name):
    done = run_agent(home, "service", "install", "--print", manager)
    with open(os.path.join(ROOT, name), encoding="utf-8") as handle:
        assert done.out == handle.read(), "run: b9agent.py service install --print %s > %s" % (
            manager, name)
    assert done.code == 0 and os.listdir(str(home)) == []


def test_the_unit_starts_the_module_and_knows_which_exits_are_permanent():
    unit = fields(b9agent.render_unit(place_of("systemd")))
    service = {name: value for section, name, value in unit if section == "[Service]"}
    assert service["ExecStart"] == "/usr/bin/python3 -I -u /usr/local/lib/b9agent run"
    assert service["RestartPreventExitStatus"] == "2 3 4 6"
    assert (service["Type"], service["User"], service["Restart"]) == ("notify", "b9agent", "on-failure")
    assert service["CapabilityBoundingSet"] == "" and service["NoNewPrivileges"] == "yes"
    assert service["Environment"] == '"B9AGENT_HOME=/var/lib/b9agent"'
    assert len(service) == len([row for row in unit if row[0] == "[Service]"]), "a name given twice"
    assert "@" not in b9agent.render_unit(place_of("systemd"))


def test_a_user_s_unit_has_nothing_that_only_root_s_manager_can_do():
    place = place_of("systemd", "user", b9agent.Account("me", 7, 7, "/home/me two"))
    unit = b9agent.render_unit(place)
    assert not re.search(r"^(User|Protect\w+|StateDirectory|Capability\w+)=", unit, re.M)
    assert "WantedBy=default.target" in unit and "network-online" not in unit
    assert 'ExecStart=/usr/bin/python3 -I -u "/home/me two/.local/share/b9agent" run\n' in unit


def test_root_keeps_its_capabilities_and_modprobe_runs_before_with_full_rights():
    root = b9agent.Account("root", 0, 0, "/root")
    unit = b9agent.render_unit(place_of("systemd", account=root), "/usr/bin/nvidia-modprobe")
    assert "CapabilityBoundingSet" not in unit and "User=root\n" in unit
    assert "ExecStartPre=-+/usr/bin/nvidia-modprobe -c 0 -u\n" in unit
    assert "ExecStartPre" not in b9agent.render_unit(place_of("systemd"))


def test_the_daemon_s_plist_says_what_launchd_must_know():
    plist = plistlib.loads(b9agent.render_plist(place_of("launchd")).encode())
    assert plist["ProgramArguments"] == ["/usr/bin/python3", "-I", "-u", "/usr/local/lib/b9agent", "run"]
    assert plist["Label"] == "com.b9agent" and plist["UserName"] == "b9agent"
    assert plist["KeepAlive"] == {"SuccessfulExit": False} and plist["RunAtLoad"] is True
    assert plist["ProcessType"] == "Interactive" and plist["ThrottleInterval"] == 15
    assert plist["EnvironmentVariables"]["B9AGENT_SUPERVISOR"] == "launchd"
    assert plist["EnvironmentVariables"]["B9AGENT_HOME"] == "/Users/b9agent/.b9agent"
    assert plist["StandardErrorPath"] == "/Users/b9agent/Library/Logs/b9agent/launchd.log"
    assert "LimitLoadToSessionType" not in plist and "AbandonProcessGroup" not in plist


def test_the_user_s_plist_is_for_sessions_with_and_without_a_screen():
    plist = plistlib.loads(b9agent.render_plist(place_of("launchd", "user")).encode())
    assert plist["LimitLoadToSessionType"] == ["Aqua", "Background"] and "UserName" not in plist
    assert plist["ProgramArguments"][3] == "/Users/b9agent/.local/share/b9agent"


def test_the_openrc_script_is_a_shell_script_that_supervises(tmp_path):
    script = b9agent.render_definition(place_of("openrc"))
    path = tmp_path / "b9agent"
    path.write_text(script)
    assert subprocess.run(["sh", "-n", str(path)]).returncode == 0
    assert "supervisor=supervise-daemon\n" in script and "B9AGENT_SUPERVISOR=openrc" in script
    assert 'command_args="-I -u /usr/local/lib/b9agent run"\n' in script and "@" not in script


@pytest.mark.parametrize("path", ['/home/a"b', "/home/a\nb", "/home/100%", "/home/$x", "/home/a\\b",
                                  "home", "/home/<x>"])
def test_paths_that_would_mean_something_in_a_definition_are_refused(path):
    with pytest.raises(b9agent.UsageError, match="character that no service definition holds"):
        place_of("systemd", "user", b9agent.Account("me", 7, 7, path))


def test_the_launcher_pins_python_and_leaves_a_chosen_home_alone(tmp_path):
    python = tmp_path / "my python"
    python.write_text('#!/bin/sh\necho "$B9AGENT_HOME" "$@"\n')
    python.chmod(0o755)
    launcher = tmp_path / "launcher"
    launcher.write_text(b9agent.render_launcher(place_of("systemd", python=str(python))))
    run = lambda **env: subprocess.run(["sh", str(launcher), "status", "a b"], env=env,
                                       stdout=subprocess.PIPE).stdout.decode()
    assert run() == "/var/lib/b9agent -I /usr/local/lib/b9agent status a b\n"
    assert run(B9AGENT_HOME="/x").startswith("/x -I ")


# -- what is asked for ------------------------------------------------------

@pytest.mark.parametrize("arguments, code, said", [
    (("--user", "--system"), 2, "exclude each other"),
    (("--gateway", "ftp://gw", "--dry-run"), 2, "HOST[:PORT] or a URL of http or https"),
    (("--gateway", "gw:x", "--dry-run"), 2, "--gateway"),
    (("--run-as", "nobody-of-this-name", "--system", "--dry-run"), 2, "there is no user"),
    (("--print", "upstart"), 2, "expected systemd, launchd or openrc"),
    (("--state-dir", "/x"), 2, "own state folder"),
    (("--rollback", "--dry-run"), 2, "no previous version"),
])
def test_what_cannot_be_done_is_refused_with_a_reason(home, arguments, code, said):
    done = run_agent(home, "service", "install", *arguments)
    assert done.code == code and said in done.err and done.err.count("\n") == 1
    assert os.listdir(str(home)) == []


@pytest.mark.skipif(ME.pw_uid == 0, reason="root has the rights")
def test_the_machine_s_service_needs_root(home):
    done = run_agent(home, "service", "install", "--system", "--gateway", "gw", BETA9_TOKEN="t0ken-x")
    assert done.code == 7 and "sudo" in done.err and "--user" in done.err


@pytest.mark.skipif(ME.pw_uid != 0, reason="only root can be refused here")
def test_root_is_told_that_user_is_for_users(home):
    done = run_agent(home, "service", "install", "--user", "--gateway", "gw")
    assert done.code == 2 and "this is root" in done.err


@pytest.mark.parametrize("missing, said", [("gateway", "no gateway is known"),
                                           ("token", "there is no machine token")])
def test_a_gateway_and_a_token_must_be_known_before_anything_is_changed(missing, said):
    wanted = {"gateway_host": "gw", "token": "t0ken"}
    wanted.pop({"gateway": "gateway_host", "token": "token"}[missing])
    with pytest.raises(b9agent.UsageError, match=said):
        b9agent._complete(wanted, {}, {}, may_ask=False, must=True)
    assert b9agent._complete(wanted, {}, {}, may_ask=False, must=False) == wanted


def test_only_what_differs_from_the_config_is_written():
    known = {"gateway_host": "gw", "token": "t0ken", "pool_name": "a"}
    assert b9agent._complete({"gateway_host": "gw", "pool_name": "b"}, known, {}, False, True) == {
        "pool_name": "b"}


def test_the_proxy_of_the_environment_goes_to_the_config_for_https_alone():
    known = {"gateway_host": "gw.example", "token": "t0ken"}
    proxy = {"https_proxy": "proxy.example:3128"}
    https = dict(known, gateway_scheme="https")
    complete = lambda known, environ: b9agent._complete({}, known, environ, False, True)
    assert complete(https, proxy) == {"gateway_proxy": "http://proxy.example:3128"}
    assert complete(known, proxy) == {}
    assert complete(https, dict(proxy, no_proxy="example")) == {}
    assert complete(dict(https, gateway_proxy="none"), proxy) == {}


def loaded_of(*flags, environ=None):
    arguments = b9agent.parse_arguments(flags, b9agent.SERVICE_OPTIONS)
    loaded = b9agent.load_settings(dict(arguments.flags), environ or {"B9AGENT_HOME": "/nonexistent"})
    return loaded, arguments.options


@pytest.mark.parametrize("gateway, expected", [
    ("https://gw.example", {"gateway_scheme": "https", "gateway_host": "gw.example", "gateway_port": "443"}),
    ("http://gw.example:81/", {"gateway_scheme": "http", "gateway_host": "gw.example", "gateway_port": "81"}),
    ("gw.example:1994", {"gateway_host": "gw.example", "gateway_port": "1994"}),
    ("[fd00::1]:1994", {"gateway_host": "fd00::1", "gateway_port": "1994"}),
])
def test_the_gateway_is_an_address_or_a_url(gateway, expected):
    loaded, options = loaded_of("--gateway", gateway)
    assert b9agent.wanted_settings(loaded, options, {"BETA9_TOKEN": ""}) == expected


def test_a_token_file_s_token_is_stored_and_its_path_is_not(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("t0ken-in-a-file\n")
    secret.chmod(0o600)
    loaded, options = loaded_of("--token-file", str(secret), "--machine-id", "0123abcd")
    assert b9agent.wanted_settings(loaded, options, {"BETA9_TOKEN": ""}) == {
        "token": "t0ken-in-a-file", "machine_id": "0123abcd"}


def test_a_config_file_that_is_named_is_taken_over(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("pool: one\nlimits: {memory: 16Gi}\n")
    loaded, options = loaded_of("--config", str(config), "--pool", "two")
    assert b9agent.wanted_settings(loaded, options, {"BETA9_TOKEN": ""}) == {
        "pool_name": "two", "max_memory": "16Gi"}


def test_a_port_that_another_program_holds_is_named_with_its_holder(tmp_path):
    place = place_of("none", state=str(tmp_path), account=b9agent.Account(ME.pw_name, ME.pw_uid, 0, "/"))
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        holder.listen()
        with pytest.raises(b9agent.LockedError, match="control port %d is held by" % port) as caught:
            b9agent.check_port(place, b9agent.Manager(place), "127.0.0.1", port)
        assert "pid %d" % os.getpid() in caught.value.what
    b9agent.check_port(place, b9agent.Manager(place), "127.0.0.1", port)
    b9agent.check_port(place, b9agent.Manager(place), "192.0.2.1", port)  # not ours: the agent's to say


SICK = '''

_well = main


def main(argv=None):
    if "run" not in sys.argv:
        return _well(argv)
    sys.stderr.write("%%s is sick\\n" %% VERSION)
    sys.stderr.flush()
    %s


if __name__ == "__main__":
'''
ENDS = SICK % "return 70"
MUTE = SICK % 'sd_notify("READY=1"); signal.pause()'  # runs, and answers nobody


# -- files: a user's installation without a service ---------------------------

def install_files(home, *arguments, code=None, **extra):
    """`service install --user --no-service` into this home; code: another b9agent.py."""
    command = [sys.executable, code or AGENT, "service", "install", "--user", *AS_ME, "--no-service",
               *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          stdin=subprocess.DEVNULL, timeout=PATIENCE_S,
                          env=dict(PATH=os.environ["PATH"], HOME=str(home), **extra))
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def other_version(folder, version, *edits):
    with open(AGENT, encoding="utf-8") as handle:
        text = handle.read()
    for old, new in [('VERSION = "%s"\n' % b9agent.VERSION, 'VERSION = "%s"\n' % version), *edits]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = folder / ("b9agent-%s.py" % version)
    path.write_text(text)
    return str(path)


def test_a_dry_run_says_every_step_and_changes_nothing(home):
    for scope in (("--user", *AS_ME), ("--system",)):
        before = {folder: tree(folder) for folder in (
            "/usr/local/lib/b9agent", "/usr/local/bin", "/usr/local/lib/systemd", "/var/lib/b9agent",
            "/etc/systemd/system", "/etc/init.d", str(home))}
        done = run_agent(home, "service", "install", *scope, "--dry-run", "--gateway", "gw",
                         BETA9_TOKEN="t0ken-in-a-dry-run")
        assert done.code == 0 and "would write" in done.out and done.out.endswith("nothing was changed\n")
        assert "t0ken" not in done.out + done.err
        assert {folder: tree(folder) for folder in before} == before


def test_files_are_whole_for_everybody_and_compiled_whatever_the_umask(home):
    old = os.umask(0o077)
    try:
        code, out, err = install_files(home, "--gateway", "gw", BETA9_TOKEN="t0ken-of-a-test")
    finally:
        os.umask(old)
    assert (code, err) == (0, "") and "files installed, no service" in out
    share = home / ".local/share/b9agent"
    modes = {path: stat.S_IMODE(mode) for path, mode in tree(share).items()}
    compiled = "__pycache__/b9agent.cpython-%d%d.pyc" % sys.version_info[:2]
    assert modes == {"b9agent.py": 0o644, "__main__.py": 0o644, "__pycache__": 0o755, compiled: 0o644,
                     "install.lock": 0o600}
    assert stat.S_IMODE((home / ".b9agent").stat().st_mode) == 0o700
    assert files_with(home, "t0ken-of-a-test") == [str(home / ".b9agent/config.yaml")]
    assert stat.S_IMODE((home / ".b9agent/config.yaml").stat().st_mode) == 0o600
    assert "t0ken-of-a-test" not in out

    shown = subprocess.run([str(home / ".local/bin/b9agent"), "version"], stdout=subprocess.PIPE,
                           env=dict(HOME=str(home), PYTHONVERBOSE="1"))
    assert shown.stdout.decode().startswith("b9agent " + b9agent.VERSION)
    traced = subprocess.run([sys.executable, "-I", "-v", str(share), "version"], env={},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ("%s' matches" % compiled in traced.stderr.decode()
            or "%s matches" % compiled in traced.stderr.decode()), "the compiled form is not used"


def test_an_upgrade_keeps_the_old_version_and_rollback_swaps_them(home, tmp_path):
    share = home / ".local/share/b9agent"
    version = lambda: b9agent.version_of((share / "b9agent.py").read_text())
    assert install_files(home)[0] == 0
    code, out, _ = install_files(home, code=other_version(tmp_path, "9.9.9"))
    assert code == 0 and version() == "9.9.9"
    assert b9agent.version_of((share / "b9agent.py.prev").read_text()) == b9agent.VERSION
    for expected in (b9agent.VERSION, "9.9.9"):
        assert install_files(home, "--rollback")[0] == 0
        assert version() == expected


def test_an_existing_config_stays_and_takes_what_is_given(home):
    assert install_files(home, "--gateway", "one:1111", "--machine-id", "0123abcd",
                         BETA9_TOKEN="t0ken-number-one")[0] == 0
    assert install_files(home, "--gateway", "two")[0] == 0
    kept = b9agent.read_config(str(home / ".b9agent/config.yaml"))
    assert {key: item.text for key, item in kept.items()} == {
        "gateway_host": "two", "gateway_port": "1111", "token": "t0ken-number-one",
        "machine_id": "0123abcd"}


def test_a_code_that_does_not_run_is_never_put_in_place(home, tmp_path):
    assert install_files(home)[0] == 0
    before = (home / ".local/share/b9agent/b9agent.py").read_text()
    broken = other_version(tmp_path, "9.9.9", ("\nSYSTEM_STATE = ", "\nraise OSError\nSYSTEM_STATE = "))
    good = other_version(tmp_path, "8.8.8")
    with open(broken) as handle:
        text = handle.read()
    place = place_of("none", "user", b9agent.Account(ME.pw_name, ME.pw_uid, ME.pw_gid, str(home)),
                     sys.executable)
    loaded, options = loaded_of("--no-service")
    installation = b9agent.Installation(place, options, b9agent.Steps(lambda _text: None, options))
    installation.code, installation.version = text, "9.9.9"
    with pytest.raises(b9agent.UsageError, match="cannot run b9agent 9.9.9"):
        installation.run(loaded)
    assert (home / ".local/share/b9agent/b9agent.py").read_text() == before
    assert not [name for name in tree(home) if name.endswith((".new", ".tmp", ".prev"))]
    assert install_files(home, code=good)[0] == 0


def test_a_launcher_of_somebody_else_is_not_overwritten(home):
    launcher = home / ".local/bin/b9agent"
    launcher.parent.mkdir(parents=True)
    launcher.write_text("#!/bin/sh\necho mine\n")
    code, _, err = install_files(home)
    assert code == 2 and "is not one of ours" in err and "mine" in launcher.read_text()
    assert not (home / ".local/share/b9agent").exists(), "a refused first installation leaves a folder"


def test_only_one_installer_is_at_work(home):
    import fcntl
    share = home / ".local/share/b9agent"
    share.mkdir(parents=True)
    with open(str(share / "install.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = install_files(home)
    assert code == 6 and "another installer" in err


def test_without_a_service_manager_files_are_there_and_the_exit_says_so(home):
    place = place_of("none", "user", b9agent.Account(ME.pw_name, ME.pw_uid, ME.pw_gid, str(home)),
                     sys.executable)
    loaded, options = loaded_of("--gateway", "gw", "--token", "t0ken-x", "--control-port", "0")
    said = []
    b9agent.make_public_folder(place.code)
    code = b9agent.Installation(place, options, b9agent.Steps(said.append, options)).run(loaded)
    assert code == b9agent.Exit.NO_SERVICE_MANAGER
    assert said[-1].endswith("In the foreground: %s/.local/bin/b9agent run" % home)


def uninstall(home, *arguments):
    return run_agent(home, "service", "uninstall", "--user", *AS_ME, *arguments)


def test_uninstall_keeps_the_state_and_purge_keeps_models(home):
    assert install_files(home, "--gateway", "gw", BETA9_TOKEN="t0ken-x")[0] == 0
    (home / ".b9agent/models").mkdir()
    (home / ".b9agent/models/big.gguf").write_text("weights")
    (home / ".b9agent/hub").mkdir()  # MLX's, where there is no ~/.cache/huggingface/hub
    for draft in ("b9agent.py.new", "b9agent.py.4711.tmp"):  # of an installer that was killed
        (home / ".local/share/b9agent" / draft).write_text("half")
    before = tree(home)
    assert uninstall(home, "--dry-run", "--purge").code == 0 and tree(home) == before
    done = uninstall(home)
    assert done.code == 0 and "--purge removes it" in done.out
    assert not (home / ".local/share/b9agent").exists() and not (home / ".local/bin/b9agent").exists()
    assert (home / ".b9agent/config.yaml").exists()
    assert uninstall(home, "--purge").code == 0
    assert sorted(tree(home / ".b9agent")) == ["hub", "models", "models/big.gguf"]


def test_a_user_id_without_a_name_has_no_service_and_no_defect(monkeypatch):
    def nobody(user_id):
        raise KeyError("getpwuid(): uid not found: %d" % user_id)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(b9agent.os, "geteuid", lambda: 54321)
    for name in ("SUDO_USER", "DOAS_USER"):
        monkeypatch.delenv(name, raising=False)
    assert b9agent.find_place({}).scope == "system"
    assert b9agent.find_place({"user": ""}).account[:2] == ("", 54321)


def test_half_a_compiled_form_is_not_left(tmp_path, monkeypatch):
    import py_compile
    whole, code = py_compile.compile, tmp_path / "b9agent.py"
    code.write_text("VERSION = [%s]\n" % ", ".join(map(str, range(1000))))

    def on_a_full_disk(path, **named):
        made = whole(path, **named)
        os.truncate(made, os.path.getsize(made) // 2)  # as CPython 3.11 does it, without a word
        return made
    installation = types.SimpleNamespace(_code_file=str(code))
    b9agent.Installation._compile(installation)
    assert len(list((tmp_path / "__pycache__").iterdir())) == 1
    monkeypatch.setattr(py_compile, "compile", on_a_full_disk)
    b9agent.Installation._compile(installation)
    assert not list((tmp_path / "__pycache__").iterdir()), "Python would end at it at every start"


# -- managers: stand-ins that start real agents --------------------------------

STAND_IN = r'''#!%(python)s
"""Stands in for launchctl, rc-service and rc-update; what it was asked is in calls.log."""
import json, os, plistlib, re, signal, subprocess, sys, time
folder = os.path.dirname(os.path.abspath(__file__))
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
path = lambda *parts: os.path.join(folder, *parts)
with open(path("calls.log"), "a") as log:
    log.write(" ".join([name] + words) + "\n")

def pid():
    try:
        with open(path("pid")) as handle:
            number = int(handle.read())
        with open("/proc/%%d/stat" %% number) as handle:
            return None if handle.read().rsplit(")")[1].split()[0] == "Z" else number
    except (OSError, ValueError):
        return None

def start(command, environment):
    with open(path("agent.log"), "ab") as log:
        child = subprocess.Popen(command, env=dict(os.environ, **environment), stdin=subprocess.DEVNULL,
                                 stdout=log, stderr=log, start_new_session=True)
    for file, mode in (("pid", "w"), ("pids", "a")):
        with open(path(file), mode) as handle:
            handle.write("%%d\n" %% child.pid)

def stop():
    number = pid()
    if number:
        os.kill(number, signal.SIGTERM)
        until = time.monotonic() + 20
        while pid() and time.monotonic() < until:
            time.sleep(0.02)

def scripted(word):
    """The next exit code that the test wants of this word."""
    try:
        with open(path("script.json")) as handle:
            script = json.load(handle)
        code = script[word].pop(0)
    except (OSError, KeyError, IndexError):
        return 0
    with open(path("script.json"), "w") as handle:
        json.dump(script, handle)
    return code

word = words[0] if name == "launchctl" else words[-1]
code = scripted(word)
if code:
    sys.exit(code)
if name == "launchctl" and word == "bootstrap":
    with open(words[2], "rb") as handle:
        plist = plistlib.load(handle)
    start(plist["ProgramArguments"], plist["EnvironmentVariables"])
elif word in ("bootout", "stop"):
    stop()
elif word == "print":
    if words[1].endswith("com.b9agent"):
        print("com.b9agent = {\n\tpid = %%d\n}" %% pid() if pid() else "com.b9agent = {\n}")
elif name == "rc-service" and word == "restart":
    stop()
    with open(path("script.path")) as handle:
        script = open(handle.read()).read()
    value = lambda key: re.search(key + '="([^"]*)"', script).group(1)
    start([value("command")] + value("command_args").split(),
          {"B9AGENT_HOME": value("B9AGENT_HOME"), "B9AGENT_SUPERVISOR": "openrc"})
elif name == "rc-service" and word == "status":
    sys.exit(0 if pid() else 3)
'''


class Box:
    """An installation in a temporary home under a stand-in for its manager."""

    def __init__(self, manager, home, folder):
        self.folder, self.said = folder, []
        account = b9agent.Account(ME.pw_name, ME.pw_uid, ME.pw_gid, str(home))
        self.place = place_of(manager, "user", account, sys.executable,
                              definition=str(folder / "definition-in-force"))
        for name in ("launchctl", "rc-service", "rc-update"):
            path = folder / name
            path.write_text(STAND_IN % {"python": sys.executable})
            path.chmod(0o755)
        (folder / "script.path").write_text(self.place.definition)
        b9agent.make_public_folder(self.place.code)

    def script(self, **codes):
        (self.folder / "script.json").write_text(json.dumps(codes))

    def calls(self):
        return (self.folder / "calls.log").read_text().splitlines()

    def install(self, *flags, code=None):
        loaded, options = loaded_of("--control-port", "0", *flags)
        installation = b9agent.Installation(self.place, options,
                                            b9agent.Steps(self.said.append, options))
        if code:
            with open(code) as handle:
                installation.code = handle.read()
            installation.version = b9agent.version_of(installation.code)
        return installation.run(loaded)

    def status(self):
        return b9agent.read_agent_status(self.place.state)

    def end(self):
        pids = self.folder / "pids"
        for pid in pids.read_text().split() if pids.exists() else ():
            try:
                os.kill(int(pid), signal.SIGKILL)
                os.waitpid(int(pid), 0)
            except OSError:
                pass  # it ended, or it is not a child of this process


@pytest.fixture
def managed(home, tmp_path, monkeypatch):
    """managed(manager) makes a Box; its agents end with the test."""
    boxes = []

    def make(manager):
        folder = tmp_path / "manager"
        folder.mkdir()
        monkeypatch.setenv("PATH", "%s:%s" % (folder, os.environ["PATH"]))
        monkeypatch.setenv("HOME", str(home))
        boxes.append(Box(manager, home, folder))
        return boxes[-1]

    yield make
    for box in boxes:
        box.end()


@pytest.fixture
def impatient(monkeypatch):
    """For what comes out the same, only sooner."""
    monkeypatch.setattr(b9agent, "HEALTH_LIMIT_S", 8.0)
    monkeypatch.setattr(b9agent, "STEADY_S", 1.0)


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="the stand-in reads /proc")


@needs_proc
def test_launchd_over_ssh_is_asked_in_the_user_s_domain_until_the_old_job_is_gone(managed, embedded):
    box = managed("launchd")
    box.script(print=[125], bootstrap=[5, 5])
    machine, token = embedded.create()
    gateway = "127.0.0.1:%d" % embedded.port
    assert box.install("--gateway", gateway, "--pool", "gpu", "--machine-id", machine,
                       "--token", token) == 0
    domain = "user/%d" % ME.pw_uid
    calls = [call for call in box.calls() if call != "launchctl print %s/com.b9agent" % domain]
    assert calls == (["launchctl print gui/%d" % ME.pw_uid,
                      "launchctl bootout %s/com.b9agent" % domain,
                      "launchctl enable %s/com.b9agent" % domain]
                     + ["launchctl bootstrap %s %s" % (domain, box.place.definition)] * 3
                     + ["launchctl kickstart %s/com.b9agent" % domain])
    assert box.said[-1].startswith("b9agent %s installed and running (pid " % b9agent.VERSION)
    assert "\ngateway: ready\n" in box.said[-1]
    assert os.path.isdir(box.place.account.home + "/Library/Logs/b9agent")
    assert token not in "".join(box.said) + "".join(box.calls())
    assert files_with(box.place.code, token) == [] and files_with(box.folder, token) == []


@needs_proc
def test_launchd_that_never_takes_the_job_is_a_failed_first_installation(managed):
    box = managed("launchd")
    box.script(bootstrap=[5] * 9)
    with pytest.raises(b9agent.UnhealthyError, match="launchctl bootstrap .* It is stopped"):
        box.install("--gateway", "127.0.0.1:9", "--token", "t0ken-x")
    assert box.calls()[-1].startswith("launchctl bootout ")


@needs_proc
def test_openrc_installs_leaves_alone_upgrades_and_takes_back(managed, embedded, tmp_path, impatient):
    box = managed("openrc")
    machine, token = embedded.create()
    given = ("--gateway", "127.0.0.1:%d" % embedded.port, "--pool", "gpu", "--machine-id", machine)
    assert box.install(*given, "--token", token) == 0
    assert "rc-update add b9agent default" in box.calls()
    assert os.stat(box.place.definition).st_mode & 0o777 == 0o755
    pid = box.status()["pid"]

    assert box.install(*given) == 0
    assert box.status()["pid"] == pid and "nothing changed: the service keeps running" in box.said

    broken = other_version(tmp_path, "9.9.9", ('\n\nif __name__ == "__main__":\n', ENDS))
    with pytest.raises(b9agent.UnhealthyError, match="Previous version restored"):
        box.install("--hostname", "other", code=broken)
    status = box.status()
    assert status["version"] == b9agent.VERSION
    assert status["hostname"] == "machine-" + machine, "the configuration came back as well"
    assert not os.path.exists(box.place.code + "/b9agent.py.prev")

    assert box.install(code=other_version(tmp_path, "8.8.8")) == 0
    assert box.status()["version"] == "8.8.8" and box.status()["pid"] != pid


@needs_proc
def test_under_openrc_a_refused_token_is_found_out_and_the_agent_waits(managed, embedded, impatient):
    box = managed("openrc")
    with pytest.raises(b9agent.TokenRefused, match="is installed, but the gateway refused its token"):
        box.install("--gateway", "127.0.0.1:%d" % embedded.port, "--token", "t0ken-unknown")
    assert os.path.exists(box.place.definition)
    assert "rc-service b9agent stop" not in box.calls()

    machine, token = embedded.create()
    assert box.install("--pool", "gpu", "--machine-id", machine, "--token", token) == 0
    assert wait_until(lambda: box.status()["state"] == "ready", "the agent is ready")


@needs_proc
def test_a_gateway_that_does_not_answer_is_no_illness_of_the_service(managed):
    box = managed("openrc")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    assert box.install("--gateway", "127.0.0.1:%d" % port, "--token", "t0ken-x") == 0
    assert "\ngateway: unreachable, retrying (" in box.said[-1]


@needs_proc
def test_a_definition_that_was_changed_by_hand_stays(managed, embedded):
    box = managed("openrc")
    machine, token = embedded.create()
    assert box.install("--gateway", "127.0.0.1:%d" % embedded.port, "--pool", "gpu", "--machine-id",
                       machine, "--token", token, "--no-start") == 0
    assert box.said[-1].startswith("b9agent %s: files installed, service NOT started" % b9agent.VERSION)
    assert not (box.folder / "pids").exists()
    with open(box.place.definition, "a") as handle:
        handle.write("# mine\n")
    assert box.install("--no-start") == 0
    with open(box.place.definition) as handle:
        assert handle.read().endswith("# mine\n")
    assert any("was changed by hand and stays" in line for line in box.said)


# -- a real systemd ---------------------------------------------------------------

PRELUDE = r'''
set -u
umask 022
python=/usr/bin/python3; [ -x "$python" ] || python=/usr/local/bin/python3
export PYTHONDONTWRITEBYTECODE=1
mkdir /root/work && cd /root/work && cp "$REPOSITORY/install.sh" "$REPOSITORY/b9agent.py" .
stamp() { "$python" "$REPOSITORY/tests/stamp" install.sh b9agent.py; }
stamp
until_true() { for _ in $(seq 200); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done; echo "NEVER: $*"; }
"$python" b9agent.py gateway --port 1994 --db /root/gateway.db >/root/gateway.log 2>&1 &
until_true grep -q listening /root/gateway.log
made=$("$python" b9agent.py machine create --pool gpu --db /root/gateway.db --json)
field() { printf '%s' "$made" | "$python" -c "import json,sys; print(json.load(sys.stdin)['$1'])"; }
id=$(field machine_id) token=$(field token)
install() { B9AGENT_TOKEN=$token sh install.sh --gateway 127.0.0.1 --pool gpu --machine-id "$id" "$@"; }
show() { systemctl show b9agent -p "$1" --value; }
part() { echo; echo "=== $1"; }
version() { sed 's/^VERSION = .*/VERSION = "'"$1"'"/' good.py >b9agent.py; stamp; }
sick() {
  version "$1"
  SICK=$2 "$python" -c 'import os
text = open("b9agent.py").read()
old = "\n\nif __name__ == \"__main__\":\n"
if text.count(old) != 1: raise SystemExit("NEVER: it cannot be made sick")
open("b9agent.py", "w").write(text.replace(old, os.environ["SICK"]))'
  stamp
}
cp b9agent.py good.py
'''


def in_systemd(script, within_s=150):
    """{part: text} of what a script says inside tests/systemd-box."""
    child = subprocess.Popen([os.path.join(ROOT, "tests", "systemd-box"), "env", "REPOSITORY=" + ROOT,
                              "ENDS=" + ENDS, "MUTE=" + MUTE, "bash", "-c", PRELUDE + script + "\nexit 0"], stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        out = child.communicate(timeout=within_s)[0].decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        os.kill(child.pid, signal.SIGTERM)
        out = child.communicate()[0].decode("utf-8", "replace")
        raise AssertionError("the box took too long:\n" + out)
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except OSError:
            pass  # all of it has ended
    assert child.returncode == 0 and "NEVER" not in out, out
    parts = re.split(r"(?m)^=== (.*)\n", out)
    return dict(zip(parts[1::2], parts[2::2]))


@pytest.mark.root
@pytest.mark.timeout(300)
def test_systemd_install_again_upgrade_rollback_uninstall():
    parts = in_systemd(r'''
    mkdir -p /etc/systemd/system/b9agent.service.d
    printf '[Service]\nEnvironment=MINE=1\n' >/etc/systemd/system/b9agent.service.d/mine.conf
    part install; install; echo "rc=$?"
    part status; systemctl status b9agent --no-pager; show User; show Environment
    stat -c '%a %U %n' /var/lib/b9agent /var/lib/b9agent/config.yaml /usr/local/lib/b9agent/b9agent.py
    part verify; systemd-analyze verify "$REPOSITORY/b9agent.service" 2>&1
    systemd-analyze verify /usr/local/lib/systemd/system/b9agent.service 2>&1
    "$python" -c "import sys; sys.path.insert(0, '.'); import b9agent as b
print(b.render_unit(b.make_place('systemd', 'user', b.Account('root', 0, 0, '/root'), '$python')))" \
      >/root/b9agent.service
    HOME=/root XDG_RUNTIME_DIR=/run systemd-analyze --user verify /root/b9agent.service 2>&1
    part leaks
    ps axwwe | grep -v grep | grep -c "$token"
    systemctl show b9agent | grep -c "$token"
    busctl introspect org.freedesktop.systemd1 /org/freedesktop/systemd1/unit/b9agent_2eservice |
      grep -c "$token"
    journalctl --no-pager | grep -c "$token"
    grep -rl "$token" /usr/local /etc /run/systemd 2>/dev/null
    part again; before=$(show MainPID); install; echo "rc=$?"; [ "$before" = "$(show MainPID)" ] && echo same
    part upgrade; version 9.9.9
    sh install.sh --quiet; echo "rc=$?"; b9agent service status; b9agent status --json | grep '"version"'
    part rollback; sh install.sh --rollback; echo "rc=$?"; b9agent version
    part nobody; runuser -u nobody -- b9agent status; echo "rc=$?"
    part uninstall; sh install.sh --uninstall; echo "rc=$?"
    systemctl is-active b9agent; ls -A /usr/local/lib/b9agent /usr/local/bin/b9agent 2>&1
    ls /usr/local/lib/systemd/system; ls -A /var/lib/b9agent; cat /etc/systemd/system/b9agent.service.d/*
    part purge; sh install.sh --uninstall --purge; echo "rc=$?"; ls -d /var/lib/b9agent 2>&1; true
    ''')
    assert "rc=0" in parts["install"] and "gateway: ready" in parts["install"]
    assert "note: /etc/systemd/system/b9agent.service.d is yours" in parts["install"]
    assert "Active: active (running)" in parts["status"] and "enabled" in parts["status"]
    assert "\nb9agent\n" in parts["status"] and "MINE=1" in parts["status"]
    assert "700 b9agent /var/lib/b9agent\n600 b9agent /var/lib/b9agent/config.yaml\n" \
           "644 root /usr/local/lib/b9agent/b9agent.py" in parts["status"]
    assert parts["verify"].strip() == ""
    assert parts["leaks"].split() == ["0"] * 4
    assert "nothing changed: the service keeps running" in parts["again"] and "same" in parts["again"]
    assert "rc=0" in parts["upgrade"] and '"version": "9.9.9"' in parts["upgrade"]
    assert "write" not in parts["upgrade"], "--quiet says nothing"
    assert "rc=0" in parts["rollback"] and "b9agent %s," % b9agent.VERSION in parts["rollback"]
    assert "rc=2" in parts["nobody"] and "Run as the user who owns it" in parts["nobody"]
    assert "rc=0" in parts["uninstall"] and "inactive" in parts["uninstall"]
    assert parts["uninstall"].count("No such file") == 2 and "config.yaml" in parts["uninstall"]
    assert "b9agent.service\n" not in parts["uninstall"].split("inactive")[1]
    assert "MINE=1" in parts["uninstall"]
    assert "rc=0" in parts["purge"] and "No such file" in parts["purge"]


@pytest.mark.root
@pytest.mark.timeout(300)
def test_systemd_a_sick_upgrade_is_taken_back_and_a_sick_first_installation_is_stopped():
    parts = in_systemd(r'''
    part first; sick 9.9.9 "$ENDS"; install; echo "rc=$?"
    systemctl is-active b9agent; systemctl is-enabled b9agent; ls /usr/local/lib/b9agent
    part good; version good; install; echo "rc=$?"
    part ends; sick 9.9.9 "$ENDS"; install; echo "rc=$?"; b9agent service status
    part mute; sick 9.9.9 "$MUTE"
    "$python" -I b9agent.py service install --system --hostname other </dev/null; echo "rc=$?"
    b9agent service status; cat /var/lib/b9agent/config.yaml; ls /usr/local/lib/b9agent
    part killed; sick 8.8.8 "$MUTE"
    "$python" -I b9agent.py service install --system </dev/null >/root/killed.log 2>&1 & installer=$!
    until_true sh -c 'journalctl -u b9agent | grep -q "8.8.8 is sick"'
    kill -TERM $installer; wait $installer; echo "rc=$?"; tail -n 1 /root/killed.log
    b9agent service status
    ''')
    assert "rc=8" in parts["first"] and "9.9.9 is sick" in parts["first"]
    assert "It is stopped, its files stay" in parts["first"] and "b9agent.py" in parts["first"]
    assert "\nactive" not in parts["first"] and "disabled" in parts["first"]
    assert "rc=0" in parts["good"]
    good = "b9agent good, pid "
    for name in ("ends", "mute", "killed"):
        assert "rc=8" in parts[name] and "Previous version restored" in parts[name], name
        assert "running, pid" in parts[name] and good in parts[name], name
    assert "set hostname in" in parts["mute"] and "hostname:" not in parts["mute"]
    assert "pool: gpu" in parts["mute"]


@pytest.mark.root
@pytest.mark.timeout(300)
def test_systemd_a_refused_token_stays_failed_without_restarts():
    parts = in_systemd(r'''
    part refused; token=t0ken-unknown; install; echo "rc=$?"
    part after; systemctl is-failed b9agent; show NRestarts; show ExecMainStatus; systemctl is-enabled b9agent
    part pool; token=$(field token); install --pool other-pool; echo "rc=$?"
    part mended; install --quiet; echo "rc=$?"; systemctl is-active b9agent
    part port; systemctl stop b9agent
    "$python" -c 'import socket, time
holder = socket.socket(); holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
holder.bind(("127.0.0.1", 9999)); holder.listen(); time.sleep(600)' &
    until_true sh -c 'ss -Hltn sport = :9999 | grep -q 9999'
    install; echo "rc=$?"; systemctl is-active b9agent
    ''')
    assert "rc=3" in parts["refused"] and "refused its token" in parts["refused"]
    assert "t0ken-unknown" not in parts["refused"]
    assert parts["after"].split() == ["failed", "0", "3", "enabled"]
    assert "rc=4" in parts["pool"] and "refused the machine" in parts["pool"]
    assert "rc=0" in parts["mended"] and "\nactive" in parts["mended"]
    assert "rc=6" in parts["port"] and re.search(r"port 9999 is held by python\S*, pid \d+", parts["port"])
    assert "inactive" in parts["port"]


@pytest.mark.root
@pytest.mark.timeout(300)
def test_systemd_an_ordinary_user_gets_a_service_that_outlives_the_login():
    parts = in_systemd(r'''
    useradd -m ada; cp install.sh b9agent.py /home/ada; chown ada /home/ada/*
    ada() { runuser -u ada -- env -i HOME=/home/ada USER=ada PATH=/usr/bin:/bin B9AGENT_TOKEN="$token" \
      sh -c "cd && $1"; }
    loginctl enable-linger ada
    part install
    ada "sh install.sh --user --gateway 127.0.0.1 --pool gpu --machine-id $id"; echo "rc=$?"
    part status; ada '.local/bin/b9agent service status && .local/bin/b9agent status'
    ada 'XDG_RUNTIME_DIR=/run/user/$(id -u) systemctl --user is-enabled b9agent'
    loginctl show-user ada -p Linger; find / -xdev -newer install.sh -name '*b9agent*' -path '/usr/*' 2>/dev/null
    part leaks; ps axwwe | grep -v grep | grep -c "$token"
    ada 'XDG_RUNTIME_DIR=/run/user/$(id -u) systemctl --user show b9agent' | grep -c "$token"
    part uninstall; ada 'sh install.sh --uninstall --user --purge'; echo "rc=$?"
    pgrep -u ada -f 'b9agent run'; find /home/ada -name '*b9agent*' -not -name b9agent.py
    part root; ada 'sh install.sh --system --gateway 127.0.0.1 --yes'; echo "rc=$?"
    ''')
    assert "rc=0" in parts["install"] and "user ada)" in parts["install"]
    assert "gateway: ready" in parts["install"]
    assert "running, pid" in parts["status"] and "enabled" in parts["status"] and "Linger=yes" in parts["status"]
    assert "/usr/" not in parts["status"].split("Linger")[1]
    assert parts["leaks"].split() == ["0", "0"]
    assert "rc=0" in parts["uninstall"] and parts["uninstall"].strip().endswith("rc=0")
    assert "rc=7" in parts["root"]


@pytest.mark.root
@pytest.mark.timeout(300)
def test_systemd_through_sudo_the_service_has_the_rights_of_who_called_it():
    parts = in_systemd(r'''
    useradd -m ada; echo 'ada ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/ada
    mkdir /home/ada/usb; cp install.sh b9agent.py /home/ada/usb; chown -R ada /home/ada/usb
    part install
    runuser -u ada -- env -i HOME=/home/ada USER=ada PATH=/usr/bin:/bin B9AGENT_TOKEN="$token" \
      sh -c "cd; cat usb/install.sh | sh -s -- --from usb --gateway 127.0.0.1 --pool gpu --machine-id $id --yes"
    echo "rc=$?"
    part state; show User; stat -c '%a %U %n' /var/lib/b9agent /var/lib/b9agent/config.yaml
    runuser -u ada -- b9agent status | head -n 1
    part leaks; journalctl --no-pager | grep -c 'COMMAND=.*service install'
    journalctl --no-pager | grep -c "$token"; ps axwwe | grep -v grep | grep -c "$token"
    find /home/ada /tmp -xdev -type f -exec grep -l "$token" {} +
    part later; sh install.sh; echo "rc=$?"; show User
    part other; sh install.sh --run-as nobody; echo "rc=$?"
    part root; sh install.sh --run-as root; echo "rc=$?"
    ''')
    assert "rc=0" in parts["install"] and "user ada)" in parts["install"]
    assert parts["state"].startswith("ada\n700 ada /var/lib/b9agent\n600 ada /var/lib/b9agent/config.yaml\n"
                                     "state       ready")
    assert parts["leaks"].split() == ["1", "0", "0"]
    assert "rc=0" in parts["later"] and parts["later"].strip().endswith("\nada"), "it keeps its user"
    for name in ("other", "root"):
        assert "rc=2" in parts[name] and "Name its owner with --run-as" in parts[name]
