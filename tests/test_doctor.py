"""`doctor`: every level of every check, the exit codes, and that it changes nothing."""
import json
import os
import re
import socket
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

import b9agent
from b9agent import Exit, Finding
from helpers import HERE, run_agent, tree, wait_until, nvidia_smi_script
from hostile_gateway import PROBES, TOKEN, HostileGateway, server_context

GIB = 1 << 30


@pytest.fixture
def doctor(home, tmp_path):
    """doctor(gateway or port, *arguments, **environment): (exit code, {name: findings}, Finished).
    PATH has nothing but what a test puts into tmp_path / "bin"."""
    (tmp_path / "bin").mkdir()

    def run(gateway, *arguments, **extra):
        port = getattr(gateway, "port", gateway)
        extra.setdefault("PATH", str(tmp_path / "bin"))
        extra.setdefault("BETA9_TOKEN", TOKEN)
        where = ["--gateway-host", "127.0.0.1", "--gateway-port", port] if port else []
        done = run_agent(home, "doctor", "--json", "--control-port", "0", *where, *arguments,
                         **extra)
        answer = json.loads(done.out)
        found = {}
        for row in answer["checks"]:
            assert sorted(row) == ["level", "mend", "name", "seen"]
            assert row["level"] in ("ok", "warn", "fail"), row
            assert "defect" not in row["seen"], row
            found.setdefault(row["name"], []).append(Finding(row["level"], row["seen"], row["mend"]))
        assert list(found) == [check.name for check in b9agent.CHECKS]
        assert answer["exit_code"] == done.code
        assert TOKEN not in done.out + done.err
        return done.code, found, done
    return run


def program(tmp_path, name, text):
    path = tmp_path / "bin" / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def levels(findings):
    return [finding.level for finding in findings]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def settings(**changes):
    return b9agent.load_settings({"config": os.devnull}, {}).settings._replace(**changes)


def loaded(**changes):
    base = b9agent.load_settings({"config": os.devnull}, {})
    return base._replace(settings=base.settings._replace(**changes))


# -- the whole, against gateways ---------------------------------------------

def test_a_good_machine_is_told_so_and_nothing_is_changed(doctor, hostile, home):
    before = tree(home)
    code, found, _ = doctor(hostile)
    assert code == 0
    assert "fail" not in sum(map(levels, found.values()), [])
    assert tree(home) == before == {}
    assert levels(found["gateway"]) == levels(found["token"] + found["pool"][:1]) == ["ok", "ok"]
    assert found["token"][0].seen == "accepted; from environment BETA9_TOKEN"
    assert sys.version.split()[0] in found["python"][0].seen


def test_the_gateway_gets_nothing_that_it_would_act_upon(doctor, hostile):
    doctor(hostile)
    sent = {(request.name, request.raw) for request in hostile.requests}
    assert sent == {("health", b""), ("keepalive", PROBES["keepalive"][0]),
                    ("register", PROBES["register"][0])}
    assert hostile.machines == {}
    assert not any(request.values("authorization") for request in hostile.named("health"))


def test_the_table_says_what_json_says(home, doctor, hostile):
    _, found, _ = doctor(hostile, "--max-cpu", "1000")
    done = run_agent(home, "doctor", "--control-port", "0", "--gateway-host", "127.0.0.1",
                     "--gateway-port", hostile.port, "--max-cpu", "1000", BETA9_TOKEN=TOKEN,
                     PATH="/nowhere")
    rows = re.findall(r"(?m)^(ok|warn|fail) +(\w+) +(.*)(?:\n +mend: (.*))?$", done.out)
    still = ("engines", "host", "token", "pool", "files", "agent", "config", "k3s", "tailnet")
    for name in still:
        wanted = [(finding.level, name, finding.seen, finding.mend) for finding in found[name]]
        assert [row for row in rows if row[1] == name] == wanted
    assert done.code == 0
    assert re.search(r"\nnothing keeps this machine from ready: \d+ findings, \d+ warn, 0 fail\n$",
                     done.out)


def test_a_refused_token_is_a_matter_of_this_machine(doctor, hostile):
    code, found, _ = doctor(hostile, BETA9_TOKEN="another-token-0123456789")
    assert code == Exit.USAGE
    assert levels(found["token"]) == ["fail"] and "refused the machine token" in \
        found["token"][0].seen and "beta9 machine create" in found["token"][0].mend
    assert levels(found["gateway"]) == ["ok", "warn"]
    hostile.violations.clear()


def test_no_token_is_a_fail_with_the_way_to_one(doctor, hostile):
    code, found, _ = doctor(hostile, BETA9_TOKEN=None)
    assert code == Exit.USAGE
    assert found["token"][0][:2] == ("fail", "there is none")
    assert found["token"][0].mend.startswith("b9agent.py init")
    assert levels(found["gateway"]) == ["ok", "warn"]
    assert hostile.named("keepalive") == []


@pytest.mark.parametrize("fault", ["no_route_404", "no_route_405"])
def test_a_gateway_without_the_keepalive_route(doctor, hostile, fault):
    hostile.fault = lambda request: fault if request.name == "keepalive" else None
    code, found, _ = doctor(hostile)
    assert code == Exit.USAGE
    assert levels(found["gateway"]) == ["ok", "fail"]
    assert "has no keepalive route" in found["gateway"][1].seen
    assert levels(found["token"]) == ["ok"]  # the other route has judged it


def test_a_program_that_is_no_gateway(doctor, hostile):
    hostile.fault = lambda request: None if request.name == "health" else "no_route_404"
    code, found, _ = doctor(hostile)
    assert code == Exit.USAGE and levels(found["gateway"]) == ["ok", "fail"]
    assert levels(found["token"]) == ["warn"]


def test_a_gateway_that_is_down(doctor):
    code, found, _ = doctor(free_port())
    assert code == Exit.UNREACHABLE
    assert levels(found["gateway"]) == ["fail"]
    assert "connection refused" in found["gateway"][0].seen
    assert "--tunnel USER@HOST" in found["gateway"][0].mend
    assert found["token"][0][:2] == ("warn", "not tried: the gateway did not judge it")
    assert levels(found["clock"]) == ["ok"] and "not known" in found["clock"][0].seen


def test_a_gateway_whose_name_is_unknown(doctor):
    code, found, _ = doctor(None, "--gateway-host", "no-such-host.invalid")
    assert code == Exit.UNREACHABLE and "cannot look up" in found["gateway"][0].seen


@pytest.mark.parametrize("fault", ["bad_gateway", "panic", "redirect_302", "close", "garbage_json"])
def test_a_gateway_that_is_unwell(doctor, hostile, fault):
    hostile.fault = fault
    code, found, _ = doctor(hostile)
    assert code == Exit.UNREACHABLE and levels(found["gateway"]) == ["fail"]
    assert hostile.elsewhere.received == b""


def test_a_gateway_that_is_well_but_fails_machines(doctor, hostile):
    hostile.fault = lambda request: None if request.name == "health" else "redis"
    code, found, _ = doctor(hostile)
    assert code == Exit.UNREACHABLE and levels(found["gateway"]) == ["ok", "fail"]


@pytest.mark.parametrize("fault", ["hang", "drip_for_ever"])
def test_a_gateway_that_never_ends_its_answer_costs_seconds(doctor, hostile, fault):
    hostile.fault = fault
    begun = time.monotonic()
    code, found, _ = doctor(hostile)
    assert time.monotonic() - begun < 15
    assert code == Exit.UNREACHABLE and "no answer within 4 s" in found["gateway"][0].seen
    assert "curl -m 5" in found["gateway"][0].mend


def test_an_address_that_swallows_everything(doctor):
    """A full backlog: the handshake of a further connection is never answered."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
            fillers.append(filler)
        begun = time.monotonic()
        code, found, _ = doctor(hole.getsockname()[1])
        assert time.monotonic() - begun < 15
        assert code == Exit.UNREACHABLE and levels(found["gateway"]) == ["fail"]
        for filler in fillers:
            filler.close()


def test_a_certificate_of_an_authority_that_is_not_known(doctor):
    context = server_context(os.path.join(HERE, "tls", "server.pem"),
                             os.path.join(HERE, "tls", "server.key"))
    with HostileGateway(context=context) as gateway:
        code, found, _ = doctor(gateway, "--gateway-scheme", "https")
        assert code == Exit.UNREACHABLE
        assert "certificate not accepted" in found["gateway"][0].seen
        assert "gateway.ca_file" in found["gateway"][0].mend


def test_an_embedded_gateway_and_its_machine(doctor, embedded):
    machine, token = embedded.create()
    code, found, done = doctor(embedded, "--machine-id", machine, BETA9_TOKEN=token)
    assert code == 0 and token not in done.out + done.err
    assert levels(found["gateway"]) == ["ok", "ok"] and levels(found["token"]) == ["ok"]
    assert re.search(r" [01] s (ahead of|behind) the gateway's$", found["clock"][0].seen)


def machine_of(home, embedded):
    done = run_agent(home, "machine", "list", "--db", embedded.db, "--json")
    return json.loads(done.out)[0]["state"]


def test_a_running_agent_is_not_disturbed(doctor, embedded, agent, home):
    machine, token = embedded.create()
    running = agent("--gateway-host", "127.0.0.1", "--gateway-port", embedded.port,
                    "--pool-name", "gpu", "--machine-id", machine, "--control-port", "0",
                    "--keepalive-interval", "1", BETA9_TOKEN=token)
    running.wait_line(r"\bready\b")
    code, found, _ = doctor(embedded, "--pool-name", "gpu", BETA9_TOKEN=token)
    assert code == 0
    assert machine_of(home, embedded)["status"] == "ready"
    assert found["pool"] == [("ok", "`gpu` has machine %s, ready" % machine, "", 2, "")]
    assert levels(found["agent"]) == ["ok"] and "pid %d, ready" % running.pid in \
        found["agent"][0].seen
    assert "the agent listens, pid %d" % running.pid in found["ports"][0].seen
    status = lambda: json.loads(run_agent(home, "status", "--json").out)
    kept = status()["keepalives"]
    after = wait_until(lambda: [now for now in [status()] if now["keepalives"] > kept], "keepalives")
    assert (after[0]["state"], after[0]["registrations"], after[0]["failures"]) == ("ready", 1, 0)
    assert running.stop() == 0


def test_an_agent_whose_pool_is_unknown_or_which_cannot_reach_its_gateway(doctor, agent, hostile):
    running = agent("--gateway-host", "127.0.0.1", "--gateway-port", hostile.port,
                    "--control-port", "0", "--keepalive-interval", "1", BETA9_TOKEN=TOKEN)
    running.wait_line(r"\bready\b")
    hostile.fault = lambda request: None if request.is_probe or request.name == "health" \
        else "invalid_pool"
    running.wait_line(r"\brefused\b")
    code, found, _ = doctor(hostile)
    assert code == Exit.USAGE
    assert found["pool"][0][:2] == ("fail", "`external` does not exist on the gateway")
    assert levels(found["agent"]) == ["warn"] and "refused" in found["agent"][0].seen


# -- a configuration that cannot be used ---------------------------------------

BROKEN = [
    ("pool: [a, b\n", "config.yaml:1"), ("poool: gpu\n", "config.yaml:1: unknown name `poool`"),
    ("gateway:\n  port: many\n", "gateway.port"), ("token: x y\n", "machine.token"),
    ("\tpool: x\n", "a tab")]


@pytest.mark.parametrize("text, said", BROKEN)
def test_a_broken_config_file_is_a_row_and_the_rest_goes_on(doctor, state, text, said):
    state.mkdir(mode=0o700)
    (state / "config.yaml").write_text(text)
    (state / "config.yaml").chmod(0o600)
    code, found, _ = doctor(None, BETA9_TOKEN=None)
    assert code == Exit.USAGE
    assert levels(found["config"]) == ["fail"] and said in found["config"][0].seen
    for name in ("gateway", "token", "pool"):
        assert levels(found[name]) == ["warn"] and "configuration" in found[name][0].seen, name
    assert levels(found["files"]) == ["ok"] and str(state) in found["files"][0].seen


def test_a_gateway_of_flags_is_asked_though_the_file_is_broken(doctor, state, hostile):
    state.mkdir(mode=0o700)
    (state / "config.yaml").write_text("nonsense\n")
    code, found, _ = doctor(hostile)
    assert code == Exit.USAGE and levels(found["config"]) == ["fail"]
    assert levels(found["gateway"]) == ["ok", "ok"] and levels(found["token"]) == ["ok"]


def test_a_variable_that_cannot_be_used(doctor, tmp_path):
    code, found, _ = doctor(None, B9AGENT_HOME=str(tmp_path / "here"), BETA9_GATEWAY_PORT="x")
    assert code == Exit.USAGE and "BETA9_GATEWAY_PORT" in found["config"][0].seen
    assert str(tmp_path / "here") in found["files"][0].seen


def test_a_config_file_that_others_may_read(doctor, state, hostile):
    state.mkdir(mode=0o700)
    (state / "config.yaml").write_text("token: %s\n" % TOKEN)
    (state / "config.yaml").chmod(0o644)
    code, found, _ = doctor(hostile, BETA9_TOKEN=None)
    assert code == Exit.USAGE
    assert found["config"][0].mend == "Mend it with: chmod 600 %s" % (state / "config.yaml")


def test_the_token_is_in_no_output_even_from_a_line_that_is_broken(home, state, hostile):
    state.mkdir(mode=0o700)
    for text in ("token: '%s\n" % TOKEN, "token: %s extra\n" % TOKEN, "- %s\n" % TOKEN,
                 "token:\n  %s: 1\n" % TOKEN):
        (state / "config.yaml").write_text(text)
        (state / "config.yaml").chmod(0o600)
        for more in ([], ["--json"], ["--debug"]):
            done = run_agent(home, "doctor", "--gateway-host", "127.0.0.1", "--gateway-port",
                             hostile.port, *more)
            assert done.code == Exit.USAGE and TOKEN not in done.out + done.err, done
    done = run_agent(home, "doctor", "--debug", "--config", os.devnull, "--gateway-host",
                     "127.0.0.1", "--gateway-port", hostile.port, BETA9_TOKEN=TOKEN)
    assert "request=keepalive" in done.err and TOKEN not in done.out + done.err


def test_a_token_on_the_command_line_is_warned_of(doctor, hostile):
    code, found, _ = doctor(hostile, "--token", TOKEN, BETA9_TOKEN=None)
    assert code == 0 and levels(found["config"]) == ["ok", "warn"]
    assert found["token"][0].seen == "accepted; from flag --token"


def test_a_config_file_that_is_asked_for_and_missing(doctor, tmp_path):
    code, found, _ = doctor(None, "--config", str(tmp_path / "none.yaml"))
    assert code == Exit.USAGE and "there is no config file" in found["config"][0].seen


# -- files ---------------------------------------------------------------------

def test_a_state_folder_that_others_may_write_in(doctor, state, hostile):
    state.mkdir()
    state.chmod(0o777)
    code, found, _ = doctor(hostile)
    assert code == Exit.USAGE and levels(found["files"]) == ["fail"]
    assert "chmod 700 %s" % state in found["files"][0].mend


def test_files_and_a_folder_that_others_may_read(doctor, state, hostile):
    state.mkdir()
    state.chmod(0o755)
    for name in ("control.token", "agent.log", "control.addr"):
        (state / name).write_text("x")
        (state / name).chmod(0o644)
    code, found, _ = doctor(hostile)
    assert code == 0 and levels(found["files"]) == ["warn"] * 3
    assert [finding.mend for finding in found["files"]] == [
        "chmod 700 %s" % state, "chmod 600 %s" % (state / "control.token"),
        "chmod 600 %s" % (state / "agent.log")]


def test_commands_that_mend_take_a_path_with_a_blank(doctor, hostile, tmp_path):
    folder = tmp_path / "my disk"
    folder.mkdir(mode=0o755)
    _, found, _ = doctor(hostile, "--state-dir", str(folder))
    assert found["files"][0].mend == "chmod 700 '%s'" % folder
    full = b9agent.judge_space("state", str(folder), (GIB, 0), GIB, 1)
    assert full.mend.startswith("du -xhd1 '%s' | sort" % folder)


def test_a_machine_id_that_is_none(doctor, state, hostile):
    state.mkdir(mode=0o700)
    (state / "machine_id").write_text("what?")
    code, found, _ = doctor(hostile)
    assert code == Exit.USAGE and "8 hexadecimal digits" in found["files"][-1].seen


def test_a_file_in_the_place_of_the_state_folder(doctor, state, hostile):
    state.write_text("")
    code, found, _ = doctor(hostile)
    assert code == Exit.USAGE and levels(found["files"]) == ["fail"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_state_folder_that_cannot_be_made(doctor, home, hostile):
    home.chmod(0o500)
    code, found, _ = doctor(hostile)
    home.chmod(0o700)
    assert code == Exit.USAGE and levels(found["files"]) == ["fail"]


def test_files_of_another_user(tmp_path, monkeypatch):
    (tmp_path / "agent.lock").write_text("")
    tmp_path.chmod(0o700)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("agent.lock")
                        and real(path, mode))
    found = list(b9agent.check_files(loaded(state_dir=str(tmp_path))))
    assert levels(found) == ["fail"] and found[0].mend.startswith("sudo chown")


# -- this machine ----------------------------------------------------------------

def test_a_python_without_ctypes(doctor, hostile, tmp_path):
    (tmp_path / "ctypes.py").write_text("raise ImportError('not here')\n")
    code, found, _ = doctor(hostile, PYTHONPATH=str(tmp_path))
    assert code == 0 and levels(found["python"]) == ["warn"]
    assert "lacks ctypes" in found["python"][0].seen and "apt install" in found["python"][0].mend


@pytest.mark.parametrize("ahead_s, level, said", [
    (0, "ok", " the gateway's"), (7200, "warn", "s behind the gateway's"),
    (-7200, "warn", "s ahead of the gateway's"), (-30, "ok", "ahead of")])
def test_a_clock_that_differs_from_the_gateways(doctor, hostile, ahead_s, level, said):
    hostile.clock_ahead_s = ahead_s
    code, found, _ = doctor(hostile)
    assert code == 0 and levels(found["clock"]) == [level]
    assert said in found["clock"][0].seen and bool(found["clock"][0].mend) == (level == "warn")


def test_a_clock_that_has_lost_its_battery():
    assert b9agent.judge_clock(3600.0, None, True).level == "fail"
    assert b9agent.judge_clock(3600.0, None, False).level == "warn"
    assert b9agent.judge_clock(1.8e9, None, True).level == "ok"
    for text in ("", "Sun, 99 Nov 1994 08:49:37 GMT", "x" * 10000, "\0"):
        assert b9agent.parse_http_date(text) is None


@pytest.mark.parametrize("free, level, limit", [
    (2 * GIB, "ok", ""), (GIB - 1, "warn", "less than 1 GiB"), (1 << 20, "fail", "less than 0.0156")])
def test_space_that_runs_out(free, level, limit):
    found = b9agent.judge_space("state", "/", (100 * GIB, free), GIB, 16 << 20)
    assert found.level == level and limit in found.seen and bool(found.mend) == (level != "ok")


def test_space_that_nobody_knows():
    assert b9agent.judge_space("state", "/", (None, None), 1, 1).level == "warn"


def test_space_for_models_is_looked_at_where_they_will_lie(doctor, hostile, tmp_path):
    _, found, _ = doctor(hostile, OLLAMA_MODELS=str(tmp_path / "m" / "n"))
    assert found["disk"][1].seen.endswith("free at %s" % (tmp_path / "m" / "n")) \
        or "less than" in found["disk"][1].seen


def test_caps_that_are_larger_than_the_machine(doctor, hostile):
    code, found, _ = doctor(hostile, "--max-cpu", "5000", "--max-memory", "900Ti")
    assert code == 0 and levels(found["host"]) == ["ok", "warn", "warn"]
    assert "limits.cpu 5000000m is more than" in found["host"][1].seen
    _, found, _ = doctor(hostile, "--max-cpu", "0.5", "--max-memory", "64Mi")
    assert levels(found["host"]) == ["ok"] and "offers 0.5 of" in found["host"][0].seen


def test_a_machine_that_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(b9agent, "make_host", b9agent.Host)
    assert levels(b9agent.check_host(loaded())) == ["warn"]


# -- GPUs --------------------------------------------------------------------------

TWO_GPUS = ("0, GPU-aa01, NVIDIA H100 80GB HBM3, 81559, 4, 0, 31\n"
            "1, GPU-bb02, NVIDIA H100 80GB HBM3, 81559, 70000, 90, 64\n")


def test_gpus_that_are_free_busy_and_left_out(doctor, hostile, tmp_path):
    program(tmp_path, "nvidia-smi", nvidia_smi_script(TWO_GPUS).partition("\n")[2])
    code, found, _ = doctor(hostile)
    assert code == 0 and levels(found["gpus"][:2]) == ["ok", "ok"]
    assert found["gpus"][0].seen.startswith("2 of 2 offered, 1 free")
    assert found["gpus"][1].seen.startswith("GPU 1 (NVIDIA H100 80GB HBM3): 68.4 of 79.6 GiB")
    _, found, _ = doctor(hostile, "--max-gpus", "1")
    assert found["gpus"][1].seen.endswith("left out by limits.gpus (--max-gpus)")
    _, found, _ = doctor(hostile, "--gpu-ids", "1,7")
    assert "left out by limits.gpu_ids" in found["gpus"][1].seen
    assert [finding.seen for finding in found["gpus"] if finding.level == "warn"] == [
        "limits.gpu_ids names GPU 7, which is not there"]
    _, found, _ = doctor(hostile, CUDA_VISIBLE_DEVICES="1")
    assert "left out by CUDA_VISIBLE_DEVICES=1" in found["gpus"][1].seen
    code, found, _ = doctor(hostile, CUDA_VISIBLE_DEVICES="-1")
    assert code == 0 and found["gpus"][0].level == "warn"
    assert found["gpus"][0].mend.startswith("unset CUDA_VISIBLE_DEVICES")


def test_a_driver_of_another_version_than_its_library(doctor, hostile, tmp_path):
    program(tmp_path, "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version "
            "mismatch'; exit 18\n")
    code, found, _ = doctor(hostile)
    assert code == 0 and levels(found["gpus"])[0] == "warn"


def test_a_driver_that_hangs_costs_seconds_and_leaves_nothing_behind(doctor, hostile, tmp_path):
    program(tmp_path, "nvidia-smi", "echo $$ > %s\nexec /bin/sleep 600\n" % (tmp_path / "pid"))
    begun = time.monotonic()
    code, found, _ = doctor(hostile)
    assert time.monotonic() - begun < 15
    assert code == 0 and levels(found["gpus"])[:2] == ["warn", "warn"]
    assert "does not answer" in found["gpus"][1].seen and "dmesg" in found["gpus"][1].mend
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: "sleep" not in (b9agent.read_text("/proc/%d/cmdline" % pid) or ""),
               "the hung program is ended")


def gpu(index, vendor="nvidia", **more):
    return b9agent.Gpu(index, vendor, name="X", memory_total_bytes=8 * GIB, **more)


def judged(gpus, visible=None, problem="", **changes):
    sample = b9agent.GpuSample(tuple(gpus), gpus[0].vendor, True, (
        b9agent.GpuReading("nvml", tuple(gpus), "535.1", "12.2", problem),))
    return list(b9agent.judge_gpus(sample, settings(**changes), visible))


def test_who_holds_a_gpu():
    me = b9agent.GpuProcess(os.getpid(), GIB)
    found = judged([gpu(0, memory_used_bytes=0, processes=()),
                    gpu(1, memory_used_bytes=GIB, processes=(me,)), gpu(2),
                    gpu(0, "amd", memory_used_bytes=0)])
    assert found[0].seen == "3 of 4 offered, 1 free (nvml driver 535.1 CUDA 12.2)"
    name = b9agent.read_text("/proc/self/comm").strip()
    assert [finding.seen for finding in found[1:]] == [
        "GPU 1 (X): held by %s, pid %d" % (name, os.getpid()),
        "GPU 2 (X): its memory is not known, so it counts as busy",
        "GPU 0 (X): left out: a pool has GPUs of one type, and nvidia's come first"]
    assert levels(found) == ["ok"] * 4


def test_gpus_that_are_ill():
    found = judged([gpu(0, memory_used_bytes=0, problem="it fell off the bus (Xid 79)")],
                   problem="driver/library version mismatch")
    assert levels(found) == ["ok", "warn", "warn"]
    assert all(finding.mend.startswith("sudo reboot") for finding in found[1:])


@pytest.mark.parametrize("problem, mend", [
    (b9agent.nvml_problem(4), "ls -l /dev/nvidia*"), (b9agent.nvml_problem(9), "sudo modprobe nvidia"),
    (b9agent.nvml_problem(17), "docker restart"), (b9agent.nvml_problem(999), "docker restart"),
    (b9agent.nvml_problem(18), "sudo reboot   # the driver was upgraded"),
    (b9agent.nvml_problem(15), "sudo reboot"), (b9agent.nvml_problem(16), "sudo reboot"),
    ("nvidia-smi: Failed to initialize NVML: Unknown Error", "docker restart"),
    ("nvidia-smi: Failed to initialize NVML: Driver/library version mismatch", "sudo reboot"),
    ("nvidia-smi: NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
     "sudo modprobe nvidia"),
    ("amd-smi and rocm-smi name no GPU", "sudo usermod -aG render,video"),
    ("/opt/rocm/bin/rocm-smi ran past its time limit", "sudo dmesg"),
    ("GPU 0000:0a:00.0: the driver knows it, but NVML does not list it: see dmesg", "sudo dmesg"),
    ("GPU 0000:0a:00.0: it is excluded (NVreg_ExcludedGpus), or broken", "grep -rs NVreg_Excluded")])
def test_what_a_driver_says_has_the_command_that_mends_it(problem, mend):
    assert b9agent.gpu_problem(problem).mend.startswith(mend)


def test_what_sources_without_a_driver_say_has_its_mend(tmp_path):
    def mend():
        return b9agent.gpu_problem(b9agent.Nvidia("none.so", str(tmp_path), "").read().problem).mend
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("")
    assert mend().startswith("docker run --gpus all")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").write_text("")
    assert mend().startswith("sudo apt install nvidia-utils")


def test_nvidia_gpus_on_the_bus(tmp_path):
    def device(address, vendor, kind, driver=None):
        folder = tmp_path / address
        folder.mkdir()
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "class").write_text(kind + "\n")
        if driver:
            (folder / "driver").symlink_to("/sys/bus/pci/drivers/" + driver)
    device("0000:01:00.0", "0x10de", "0x030000")
    device("0000:01:00.1", "0x10de", "0x040300")
    device("0000:02:00.0", "0x10de", "0x030200", "nouveau")
    device("0000:03:00.0", "0x10de", "0x030200", "nvidia")
    device("0000:04:00.0", "0x8086", "0x030000", "i915")
    devices = b9agent.read_nvidia_pci(str(tmp_path))
    assert devices == {"0000:01:00.0": "", "0000:02:00.0": "nouveau", "0000:03:00.0": "nvidia"}
    found = list(b9agent.judge_pci(devices, True))
    assert levels(found) == ["warn", "warn"] and "no driver" in found[0].seen
    assert all("nvidia.com/drivers" in finding.mend for finding in found)
    assert "docker run --gpus all" in list(b9agent.judge_pci(devices, False))[-1].mend
    assert b9agent.read_nvidia_pci(str(tmp_path / "none")) == {}


# -- what runs beside it --------------------------------------------------------------

def test_a_control_port_that_is_taken_is_a_warning_with_the_holders_name(doctor, hostile):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, found, _ = doctor(hostile, "--control-port", port)
        name = b9agent.read_text("/proc/self/comm").strip()
        assert code == 0 and found["ports"][0].level == "warn"
        assert "held by %s, pid %d" % (name, os.getpid()) in found["ports"][0].seen
        assert found["ports"][0].mend.startswith("b9agent.py run --control-port 0")
    code, found, _ = doctor(hostile, "--control-port", port)
    assert found["ports"][0][:2] == ("ok", "control API: 127.0.0.1:%d" % port)


def test_a_control_address_that_this_machine_has_not(doctor, hostile):
    _, found, _ = doctor(hostile, "--control-host", "192.0.2.1", "--control-port", "9999")
    assert found["ports"][0].level == "warn" and "assign" in found["ports"][0].seen


def test_the_table_of_listening_sockets():
    text = ("  sl  local_address rem_address   st tx rx\n"
            "   0: 0100007F:270F 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 4711 1\n"
            "   1: 0100007F:2710 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  0 0 4712 1\n"
            "   2: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A "
            "00000000:00000000 00:00000000 00000000  0 0 4713 1\n   3: x 0A\nrubbish\n"
            "   4: 0200007F:270F 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 4714 1\n")
    assert [b9agent.parse_listeners(text, port) for port in (9999, 10000, 8080)] == [
        ["4711", "4714"], [], ["4713"]]


def test_engines_on_the_path(doctor, hostile, tmp_path):
    _, found, _ = doctor(hostile)
    assert found["engines"][0].seen.startswith("none yet; such as: curl")
    for name in ("ollama", "mlx_lm.server", "vllm"):
        program(tmp_path, name, "exit 1\n")
    _, found, _ = doctor(hostile)
    assert found["engines"][0][:2] == ("ok", ", ".join("%s (%s)" % (
        title, tmp_path / "bin" / name) for title, name in (
            ("Ollama", "ollama"), ("vLLM", "vllm"), ("MLX", "mlx_lm.server"))))


def test_an_engine_that_is_asked_for_and_missing_is_a_warning_with_its_installer(doctor, hostile):
    _, found, _ = doctor(hostile, "--inference-engine", "sglang")
    assert found["engines"][1].level == "warn" and "pip install" in found["engines"][1].mend
    _, found, _ = doctor(hostile, "--inference-program", "/nowhere/ollama")
    assert found["engines"][1].level == "warn" and "/nowhere/ollama" in found["engines"][1].seen


def test_the_engines_port_is_told_with_who_holds_it(doctor, hostile):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = str(holder.getsockname()[1])
        _, found, _ = doctor(hostile, "--inference-port", port)
    assert found["ports"][1].level == "warn" and "pid %d" % os.getpid() in found["ports"][1].seen
    _, found, _ = doctor(hostile, "--inference-port", port)
    assert found["ports"][1].level == "ok"


@pytest.mark.parametrize("installed, answers, token, level", [
    (True, True, True, "ok"), (True, True, False, "warn"), (True, False, False, "warn"),
    (False, False, True, "warn"), (False, False, False, "ok")])
def test_k3s(installed, answers, token, level):
    found = b9agent.judge_k3s(installed, answers, token)
    assert found.level == level and bool(found.mend) == (level == "warn")
    assert installed or "systemctl start" not in found.mend  # there is no such unit


def test_k3s_answers_with_a_certificate_of_its_own():
    context = server_context(os.path.join(HERE, "tls", "server.pem"),
                             os.path.join(HERE, "tls", "server.key"))
    at = lambda port: b9agent.Endpoint("https", "127.0.0.1", port)
    with HostileGateway(context=context) as gateway:
        assert b9agent.k3s_answers(at(gateway.port), 10.0)
        assert gateway.requests == []  # nothing was said to a stranger
    assert not b9agent.k3s_answers(at(free_port()), 10.0)


UP = "echo '%s'" % json.dumps({"BackendState": "Running", "TailscaleIPs": ["100.64.1.2"]})


@pytest.mark.parametrize("says, arguments, level, seen", [
    (UP, [], "ok", "100.64.1.2"), (UP, ["--hostname", "100.64.1.2"], "ok", "100.64.1.2"),
    (UP, ["--hostname", "100.64.9.9"], "warn", "machine.hostname is 100.64.9.9"),
    ("echo stopped; exit 1", [], "warn", "no address: tailscale says: stopped"),
    ("exec /bin/sleep 600", [], "warn", "no address: tailscale says: "), (None, [], "ok", "none"),
    (None, ["--tailnet-socket", "/nowhere/s"], "warn", "tailscaled does not answer at /nowhere/s"),
    (UP, ["--tailnet-socket", "none"], "ok", "none")])
def test_the_tailnet(doctor, hostile, tmp_path, says, arguments, level, seen):
    if says:
        program(tmp_path, "tailscale", says + "\n")
    code, found, _ = doctor(hostile, *arguments)
    assert code == 0 and levels(found["tailnet"]) == [level] and seen in found["tailnet"][0].seen


# -- the agent and the service -----------------------------------------------------------

def status_of(monkeypatch, **fields):
    answer = dict(version=b9agent.VERSION, pid=7, state="ready", state_seconds=1.0, keepalives=3,
                  metrics={}, **{})
    answer.update(fields)
    monkeypatch.setattr(b9agent, "agent_holds", lambda folder: True)
    monkeypatch.setattr(b9agent, "read_agent_status", lambda folder: answer)


@pytest.mark.parametrize("fields, level", [
    ({}, "ok"), ({"version": "0.0.9"}, "warn"), ({"state": "unreachable", "message": "m"}, "warn"),
    ({"state": "registering"}, "ok")])
def test_the_agent_that_runs(monkeypatch, fields, level):
    status_of(monkeypatch, **fields)
    assert levels(b9agent.check_agent(loaded())) == [level]


def test_an_agent_without_a_control_api(doctor, hostile, agent, state):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        running = agent("--gateway-host", "127.0.0.1", "--gateway-port", hostile.port,
                        "--control-port", taken.getsockname()[1], BETA9_TOKEN=TOKEN)
        running.wait_line(r"\bready\b")
        code, found, _ = doctor(hostile)
        assert code == 0 and levels(found["agent"]) == ["warn"]
        assert "has no control API" in found["agent"][0].seen and found["agent"][0].mend


@pytest.mark.parametrize("process, level, said", [
    (b9agent.Process(12), "ok", "running, pid 12"), (b9agent.Process(0), "warn", "not running"),
    (b9agent.Process(0, 3), "warn", "ended with exit code 3"),
    (b9agent.Process(None), "ok", "running, pid unknown")])
def test_the_service(monkeypatch, tmp_path, process, level, said):
    (tmp_path / "unit").write_text("")
    place = SimpleNamespace(manager="fake", scope="system",
                            definition=str(tmp_path / "unit"), state="/s")
    monkeypatch.setattr(b9agent, "find_place", lambda options: place)
    monkeypatch.setitem(b9agent.MANAGERS, "fake", lambda place: SimpleNamespace(
        logs="journalctl -f", process=lambda: process, restart=("-svc gone", "svc restart")))
    found = list(b9agent.check_service(loaded()))
    assert levels(found) == [level] and said in found[0].seen
    assert found[0].mend == ("sudo svc restart   # its log: journalctl -f" if level == "warn"
                             else "")


def test_a_library_that_another_thread_is_importing_does_not_hide_what_happened(monkeypatch):
    monkeypatch.setitem(sys.modules, "ssl", ModuleType("ssl"))
    assert b9agent._http_failure(ConnectionRefusedError()).kind == "refused"


# -- the frame around them -------------------------------------------------------------

def _fine(_loaded):
    yield Finding("ok", "fine")


def _refused(_loaded):
    yield Finding("ok", "so far")
    raise b9agent.TokenRefused("refused", "get another")


def _unwell(_loaded):
    raise b9agent.GatewayUnwell("unwell", "wait")
    yield


def _defect(_loaded):
    raise KeyError("oops\x1b[2J")
    yield


def _not_tried(_loaded):
    raise b9agent.NotTried("no gateway")
    yield


def _hang(_loaded):
    yield Finding("ok", "begun")
    import threading
    threading.Event().wait(30)


def test_what_checks_come_to_in_their_order():
    checks = [b9agent.Check(look.__name__[1:], look) for look in (
        _fine, _refused, _unwell, _defect, _not_tried)]
    checks += [b9agent.Check("slow", _hang), b9agent.Check("slower", _hang, Exit.UNREACHABLE)]
    begun = time.monotonic()
    found = b9agent.run_checks(checks, loaded(), 0.5)
    assert time.monotonic() - begun < 10
    assert [(row.name, row.level, row.seen[:24]) for row in found] == [
        ("fine", "ok", "fine"), ("refused", "ok", "so far"), ("refused", "fail", "refused"),
        ("unwell", "fail", "unwell"), ("defect", "fail", "defect: KeyError: 'oops\\"),
        ("not_tried", "warn", "not tried: no gateway"), ("slow", "ok", "begun"),
        ("slow", "warn", "did not end within 0.5 s"), ("slower", "ok", "begun"),
        ("slower", "fail", "did not end within 0.5 s")]
    assert "\x1b" not in "".join(row.seen for row in found)
    assert b9agent.doctor_exit(found) == Exit.USAGE
    assert b9agent.doctor_exit(found[3:4] + found[-1:]) == Exit.UNREACHABLE
    assert b9agent.doctor_exit(found[:2] + found[5:8]) == Exit.OK


def test_secrets_and_controls_are_out_of_every_finding():
    b9agent.REDACTOR.add("s3cret-in-a-finding")
    checks = [b9agent.Check("x", lambda _: iter([Finding(
        "warn", "a s3cret-in-a-finding\n", "curl s3cret-in-a-finding")]))]
    found = b9agent.run_checks(checks, loaded(), 5.0)[0]
    assert "s3cret" not in found.seen + found.mend and "\n" not in found.seen
    lines = b9agent.doctor_lines([found])
    assert lines[0].startswith("warn  x ") and lines[1].strip().startswith("mend: curl")


def test_every_finding_that_is_not_ok_says_what_mends_it(doctor):
    _, found, _ = doctor(free_port(), BETA9_TOKEN=None)
    for name, rows in found.items():
        for row in rows:
            assert row.level == "ok" or row.mend or row.seen.startswith("not tried"), (name, row)


@pytest.mark.parametrize("given, said", [
    (["--oidc-issuer", "https://id.example.org"], "not all are set"),
    (["--oidc-issuer", "https://id.example.org", "--oidc-audience", "b9", "--oidc-jwks", "/nowhere/keys"],
     "there is no file /nowhere/keys"),
    (["--tls", "tailscale", "--tailnet-socket", "none"], "there is no Tailscale here")])
def test_what_the_front_door_lacks_is_said(tmp_path, given, said):
    loaded = b9agent.load_what_can_be(b9agent.parse_arguments(
        ["--state-dir", str(tmp_path), *given], ()).flags, {}, must_exist=True)
    found = [finding for finding in b9agent.check_door(loaded) if finding.level == "warn"]
    assert len(found) == 1 and said in found[0].seen and found[0].mend


# -- the audit log -----------------------------------------------------------

def audit_findings(state, **given):
    loaded = b9agent.load_settings(dict({"state_dir": str(state), "config": os.devnull}, **given), {})
    return [(finding.level, finding.seen, finding.mend)
            for finding in b9agent.run_checks([b9agent.Check("audit", b9agent.check_audit)], loaded, 9.0)]


def audit_log(state, lines=20):
    log = b9agent.AuditLog(str(state / "audit"), 184, lambda *_, **__: None)
    log.open()
    for number in range(lines):
        log.record("event", {"event": "a_thing", "number": number})
    log.close()
    return next((state / "audit").glob("*.jsonl"))


def test_an_audit_log_that_is_whole_is_well(tmp_path):
    assert "not made yet" in audit_findings(tmp_path)[0][1]
    audit_log(tmp_path)
    assert audit_findings(tmp_path)[0][:2] == (
        "ok", f"{tmp_path}/audit: its newest 20 lines are whole, files: 1")
    assert "there is none" in audit_findings(tmp_path, audit_keep_days="0")[0][1]


@pytest.mark.parametrize("harm", [
    lambda path: path.write_bytes(path.read_bytes().replace(b'"number":17', b'"number":71')),
    lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1])),
    lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:9])
                                  + b"".join(path.read_bytes().splitlines(True)[10:])),
    lambda path: path.unlink(), lambda path: (path.parent / "head.json").unlink()],
    ids=["a digit", "the last line", "a line", "its file", "its head"])
def test_an_end_of_the_audit_log_that_was_changed_is_said(tmp_path, harm):
    harm(audit_log(tmp_path))
    (level, seen, mend), = audit_findings(tmp_path)
    assert (level, seen) == ("warn", f"the end of {tmp_path}/audit is not as it was written")
    assert "audit verify" in mend


def test_an_audit_folder_that_is_none_is_said(tmp_path):
    (tmp_path / "audit").symlink_to(tmp_path)
    assert audit_findings(tmp_path)[0][:2] == (
        "warn", f"{tmp_path}/audit is no folder: nothing is recorded")


@pytest.mark.parametrize("says, found", [
    ({"failing": True, "lost": 3, "waiting": 512},
     ["the disk does not take it: 3 lines are lost, 512 bytes wait"]),
    ({"failing": False, "lost": 3, "waiting": 0},
     [", files: 1", "3 lines are lost since the agent started"])])
def test_what_the_agent_says_of_its_audit_log_is_said(tmp_path, monkeypatch, says, found):
    audit_log(tmp_path)
    monkeypatch.setattr(b9agent, "read_agent_status", lambda _folder: {"audit": says})
    seen = [row[1] for row in audit_findings(tmp_path)]
    assert len(seen) == len(found) and all(map(str.endswith, seen, found)), seen
