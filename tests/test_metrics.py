"""Section 12b: metrics as Prometheus reads them, from a view, over HTTP and on the command line."""
import http.client
import json
import math
import os
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request

import pytest

import b9agent
from b9agent import (Capacity, Energy, EnergyTotals, Failures, Gpu, GpuProcess, GpuReading, GpuSample,
                     HostFacts, HostSample, Identity, MachineSample, MetricsView, MigInstance,
                     ProcessFigures, Snapshot, State)
from helpers import nvidia_smi_script, Program, environment, run_agent, tree, wait_until
from hostile_gateway import TOKEN
from test_control_api import Control

hypothesis = pytest.importorskip("hypothesis")
parser = pytest.importorskip("prometheus_client.parser")
st = hypothesis.strategies

NO_HOST = HostSample(*[None] * 8)
NO_GPUS = GpuSample()


def parse(text):
    """{(sample name, labels): value} and {family: (type, help)}, as Prometheus' own client reads it."""
    samples, families = {}, {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in samples, "twice: %s" % (key,)
            samples[key] = sample.value
        name = family.name + ("_total" if family.type == "counter" else "")
        assert name not in families, "its samples are not together: %s" % name
        families[name] = family.type, family.documentation
    return samples, families


def samples_of(view):
    text = b9agent.render_metrics(view)
    well_formed(text)
    return parse(text)[0]


def well_formed(text):
    """What the parser is lenient about: HELP, TYPE, then samples, each family once and together."""
    assert text.endswith("\n") and "\n\n" not in text and "\r" not in text
    seen, family = [], None
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            family, samples = line.split(" ")[2], 0
            assert family not in seen
            seen.append(family)
        elif line.startswith("# TYPE "):
            kind = line.split(" ")[3]
            assert line.split(" ")[2] == family and kind in ("gauge", "counter", "histogram")
        else:
            name = re.match(r"[a-z0-9_]+", line).group()
            assert re.sub("_(bucket|sum|count)$", "", name) == family if kind == "histogram" else name == family, line
            value = float(line.rpartition(" ")[2])
            assert math.isfinite(value), line
    return seen


def lint(text):
    """What promtool says of it: (exit code, words)."""
    done = subprocess.run(["promtool", "check", "metrics"], input=text.encode(), timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.decode()


needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (Debian: prometheus)")

GPU_0 = Gpu(0, "nvidia", "GPU-aa", "NVIDIA H100 80GB HBM3", "0000:65:00.0",
            memory_total_bytes=85520809984, memory_used_bytes=1048576, utilization_pct=57.0,
            temperature_c=41.0, power_w=118.5, power_limit_w=700.0, energy_j=123456.789, fan_pct=30.0,
            graphics_clock_mhz=1980.0, memory_clock_mhz=2619.0, ecc_errors=3, mig_enabled=True,
            mig_instances=(MigInstance("MIG-1", "NVIDIA H100 MIG 1g.10gb", 10200547328, 65536),
                           MigInstance("MIG-2", "NVIDIA H100 MIG 2g.20gb", None, None)),
            processes=(GpuProcess(7, None), GpuProcess(8, 5)), cores=132)
GPU_1 = Gpu(0, "amd", name="AMD Instinct MI300X", asleep=True, stale=True,
            problem="its driver does not answer")
FULL = MetricsView(
    Snapshot(State.READY, since_s=5.0, last_ready_s=90.5, last_ready_wall_s=1.0, registrations=2,
             keepalives=7, failures=6, failed_registrations=Failures(1, 0, 0, 0),
             failed_keepalives=Failures(1, 2, 3, 4)),
    MachineSample(
        HostSample(12.5, 50.0, 1000, 500, 2000, 1500, 11, 12, 13, 14, 1.5, 2.5, 3.5, 4.5, 300, 30,
                   0.25, 0.5, 0.75, 86400.5),
        GpuSample((GPU_0, GPU_1), "nvidia", True,
                  (GpuReading("nvml", (GPU_0,), "550.54.15", "12.4"),
                   GpuReading("amdgpu", (GPU_1,), "6.8", problem="amd: the driver does not answer"))),
        (GPU_0,),
        Energy(EnergyTotals(), EnergyTotals(1000.5, 20.0, 0.0, 300.25, 44.5, 11.5), 1700000000.0,
               118.5, "measured", 33.0, "estimated"), 98.5),
    HostFacts("Debian 12", "6.1.0", "x86_64", "AMD EPYC 9354", 32, 64, "docker", True),
    Capacity(63500, 4096), Identity("0badcafe", "gpu", "generic", "box", ""),
    ProcessFigures(1.25, 1700000000.5, 20480, 9, 4), 100.0, 0.125, -0.75, 380.0, 1.25, "9.8.7",
    b9agent.EngineFigures("ollama", "running", 3, 77.5, 2, 1), "running", "up", "watching",
    {"RUNNING": 2, "FAILED": 1}, audit={"lines": 12345, "lost": 6, "failing": True})
NOTHING = MetricsView(Snapshot())
N, A = {"vendor": "nvidia", "index": "0"}, {"vendor": "amd", "index": "0"}
MIG_0, MIG_1 = dict(N, mig="0"), dict(N, mig="1")

# Every family, and every sample that FULL comes to, read off it by hand.
EXPECTED = {
    "b9agent_build_info": [({"version": "9.8.7"}, 1)],
    "b9agent_machine_info": [({"machine_id": "0badcafe", "pool": "gpu"}, 1)],
    "b9agent_membership_state": [
        ({"state": "starting"}, 0), ({"state": "registering"}, 0), ({"state": "registered"}, 0),
        ({"state": "ready"}, 1), ({"state": "unreachable"}, 0), ({"state": "expired"}, 0),
        ({"state": "refused"}, 0), ({"state": "stopped"}, 0)],
    "b9agent_keepalive_age_seconds": [({}, 9.5)],
    "b9agent_keepalive_duration_seconds": [({}, 0.125)],
    "b9agent_keepalives_total": [
        ({"outcome": "ok"}, 7), ({"outcome": "unreachable"}, 1), ({"outcome": "unwell"}, 2),
        ({"outcome": "refused"}, 3), ({"outcome": "expired"}, 4)],
    "b9agent_registrations_total": [
        ({"outcome": "ok"}, 2), ({"outcome": "unreachable"}, 1), ({"outcome": "unwell"}, 0),
        ({"outcome": "refused"}, 0), ({"outcome": "expired"}, 0)],
    "b9agent_gateway_clock_offset_seconds": [({}, -0.75)],
    "b9agent_sample_age_seconds": [({}, 1.5)],
    "b9agent_capacity_cpu_cores": [({}, 63.5)],
    "b9agent_capacity_memory_bytes": [({}, 4096)],
    "b9agent_tunnel_state": [
        ({"state": state}, int(state == "running"))
        for state in ("stopped", "starting", "running", "backoff")],
    "b9agent_tailnet_up": [({}, 1)],
    "b9agent_pods_watch_state": [
        ({"state": "off"}, 0), ({"state": "connecting"}, 0), ({"state": "watching"}, 1),
        ({"state": "failed"}, 0)],
    "b9agent_worker_pods": [
        ({"status": "PENDING"}, 0), ({"status": "RUNNING"}, 2), ({"status": "COMPLETED"}, 0),
        ({"status": "FAILED"}, 1)],
    "b9agent_inference_state": [
        ({"state": "stopped"}, 0), ({"state": "starting"}, 0), ({"state": "running"}, 1),
        ({"state": "asleep"}, 0), ({"state": "error"}, 0)],
    "b9agent_inference_starts_total": [({"engine": "ollama"}, 3)],
    "b9agent_inference_uptime_seconds": [({"engine": "ollama"}, 77.5)],
    "b9agent_inference_models": [({"engine": "ollama"}, 2)],
    "b9agent_inference_loads": [({"engine": "ollama"}, 1)],
    "b9agent_audit_lines_total": [({}, 12345)],
    "b9agent_audit_lost_total": [({}, 6)],
    "b9agent_audit_failing": [({}, 1)],
    "b9agent_host_info": [({"os": "Debian 12", "kernel": "6.1.0", "architecture": "x86_64",
                            "cpu_model": "AMD EPYC 9354", "container": "docker", "wsl": "true"}, 1)],
    "b9agent_host_cpu_cores": [({}, 32)],
    "b9agent_host_cpu_threads": [({}, 64)],
    "b9agent_host_cpu_utilization_ratio": [({}, 0.125)],
    "b9agent_host_memory_size_bytes": [({}, 1000)],
    "b9agent_host_memory_used_bytes": [({}, 500)],
    "b9agent_host_swap_size_bytes": [({}, 300)],
    "b9agent_host_swap_used_bytes": [({}, 30)],
    "b9agent_host_disk_size_bytes": [({}, 2000)],
    "b9agent_host_disk_free_bytes": [({}, 1500)],
    "b9agent_host_disk_read_bytes_total": [({}, 13)],
    "b9agent_host_disk_written_bytes_total": [({}, 14)],
    "b9agent_host_network_received_bytes_total": [({}, 11)],
    "b9agent_host_network_sent_bytes_total": [({}, 12)],
    "b9agent_host_load1": [({}, 0.25)],
    "b9agent_host_load5": [({}, 0.5)],
    "b9agent_host_load15": [({}, 0.75)],
    "b9agent_host_uptime_seconds": [({}, 86400.5)],
    "b9agent_gpus_known": [({}, 1)],
    "b9agent_gpus": [({}, 2)],
    "b9agent_gpus_omitted": [({}, 0)],
    "b9agent_gpu_problems": [({}, 1)],
    "b9agent_gpu_info": [
        (dict(N, uuid="GPU-aa", name="NVIDIA H100 80GB HBM3", type="H100", bus_id="0000:65:00.0",
              driver="550.54.15"), 1),
        (dict(A, uuid="", name="AMD Instinct MI300X", type="", bus_id="", driver="6.8"), 1)],
    "b9agent_gpu_healthy": [(N, 1), (A, 0)],
    "b9agent_gpu_offered": [(N, 1), (A, 0)],
    "b9agent_gpu_free": [(N, 0), (A, 0)],
    "b9agent_gpu_stale": [(N, 0), (A, 1)],
    "b9agent_gpu_asleep": [(N, 0), (A, 1)],
    "b9agent_gpu_memory_size_bytes": [(N, 85520809984)],
    "b9agent_gpu_memory_used_bytes": [(N, 1048576)],
    "b9agent_gpu_utilization_ratio": [(N, 0.57)],
    "b9agent_gpu_temperature_celsius": [(N, 41)],
    "b9agent_gpu_power_watts": [(N, 118.5)],
    "b9agent_gpu_power_limit_watts": [(N, 700)],
    "b9agent_gpu_energy_joules_total": [(N, 123456.789)],
    "b9agent_gpu_fan_ratio": [(N, 0.3)],
    "b9agent_gpu_graphics_clock_hertz": [(N, 1980000000)],
    "b9agent_gpu_memory_clock_hertz": [(N, 2619000000)],
    "b9agent_gpu_ecc_errors_total": [(N, 3)],
    "b9agent_gpu_processes": [(N, 2)],
    "b9agent_gpu_mig_enabled": [(N, 1)],
    "b9agent_gpu_mig_info": [(dict(MIG_0, uuid="MIG-1", name="NVIDIA H100 MIG 1g.10gb"), 1),
                             (dict(MIG_1, uuid="MIG-2", name="NVIDIA H100 MIG 2g.20gb"), 1)],
    "b9agent_gpu_mig_memory_size_bytes": [(MIG_0, 10200547328)],
    "b9agent_gpu_mig_memory_used_bytes": [(MIG_0, 65536)],
    "b9agent_power_watts": [({"component": "gpu", "basis": "measured"}, 118.5),
                            ({"component": "cpu", "basis": "estimated"}, 33)],
    "b9agent_energy_joules_total": [
        ({"component": "gpu", "basis": "measured"}, 1000.5), ({"component": "gpu", "basis": "estimated"}, 20),
        ({"component": "cpu", "basis": "measured"}, 0), ({"component": "cpu", "basis": "estimated"}, 300.25)],
    "b9agent_co2e_grams_total": [({"method": "location"}, 44.5), ({"method": "market"}, 11.5)],
    "b9agent_grid_co2e_grams_per_kwh": [({}, 380)],
    "b9agent_pue_ratio": [({}, 1.25)],
    "process_cpu_seconds_total": [({}, 1.25)],
    "process_resident_memory_bytes": [({}, 20480)],
    "process_open_fds": [({}, 9)],
    "process_threads": [({}, 4)],
    "process_start_time_seconds": [({}, 1700000000.5)],
}

# ---------------------------------------------------------------- the table


def test_every_figure_of_a_view_comes_out_as_it_went_in():
    expected = {(name, tuple(sorted(labels.items()))): value
                for name, rows in EXPECTED.items() for labels, value in rows}
    assert samples_of(FULL) == expected
    assert well_formed(b9agent.render_metrics(FULL)) == list(EXPECTED)


def test_every_family_is_documented_once_and_by_its_type():
    families = parse(b9agent.render_metrics(FULL))[1]
    assert len(families) == len(b9agent.METRIC_FAMILIES) == len(EXPECTED)
    for name, text, _ in b9agent.METRIC_FAMILIES:
        kind, documentation = families[name]
        assert kind == ("counter" if name.endswith("_total") else "gauge")
        assert documentation == text and text.endswith(".") and " " in text and "\\" not in text
        assert text.lower().replace(" ", "_").rstrip(".") not in name
    texts = [text for _, text, _ in b9agent.METRIC_FAMILIES]
    assert len(set(texts)) == len(texts)


def test_no_label_has_a_name_that_prometheus_gives_to_its_target():
    for name, labels in samples_of(FULL):
        assert not {"job", "instance"} & set(dict(labels)), name  # it would say exported_instance


UNITS = {"bytes", "seconds", "ratio", "celsius", "watts", "joules", "hertz", "grams"}
WITHOUT_UNIT = {  # counts of things, and yes or no
    "membership_state", "keepalives", "registrations", "capacity_cpu_cores", "host_cpu_cores",
    "host_cpu_threads", "host_load1", "host_load5", "host_load15", "gpus_known", "gpus", "gpus_omitted",
    "gpu_problems", "gpu_healthy", "gpu_offered", "gpu_free", "gpu_stale", "gpu_asleep",
    "gpu_ecc_errors", "gpu_processes", "gpu_mig_enabled", "tunnel_state", "tailnet_up",
    "inference_state", "inference_starts", "inference_models", "inference_loads", "pods_watch_state", "worker_pods",
    "audit_lines", "audit_lost", "audit_failing"}
OF_PROMETHEUS = {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds",
                 "process_threads", "process_start_time_seconds"}


@pytest.mark.parametrize("name", [name for name, _, _ in b9agent.METRIC_FAMILIES])
def test_names_say_their_unit(name):
    if name in OF_PROMETHEUS:
        return
    assert re.fullmatch("b9agent_[a-z0-9]+(_[a-z0-9]+)*", name)
    bare = re.sub("^b9agent_", "", re.sub("_total$", "", name))
    assert bare.endswith("_info") or bare == "grid_co2e_grams_per_kwh" or bare in WITHOUT_UNIT \
        or bare.rpartition("_")[2] in UNITS
    for foreign in ("mb", "mib", "kb", "pct", "percent", "ms", "minutes", "mhz", "kilowatts", "wh"):
        assert foreign not in bare.split("_")


GOLDEN = """\
# HELP b9agent_build_info Version of b9agent.
# TYPE b9agent_build_info gauge
b9agent_build_info{version="1.2.3"} 1
# HELP b9agent_membership_state 1 for the state of the membership, 0 for the others.
# TYPE b9agent_membership_state gauge
b9agent_membership_state{state="starting"} 0
b9agent_membership_state{state="registering"} 0
b9agent_membership_state{state="registered"} 0
b9agent_membership_state{state="ready"} 0
b9agent_membership_state{state="unreachable"} 1
b9agent_membership_state{state="expired"} 0
b9agent_membership_state{state="refused"} 0
b9agent_membership_state{state="stopped"} 0
# HELP b9agent_host_load1 Load average of 1 minute.
# TYPE b9agent_host_load1 gauge
b9agent_host_load1 0.5
# HELP b9agent_gpus_known 0 where the driver does not answer, 1 elsewhere.
# TYPE b9agent_gpus_known gauge
b9agent_gpus_known 1
# HELP b9agent_gpus GPUs in this machine.
# TYPE b9agent_gpus gauge
b9agent_gpus 1
# HELP b9agent_gpus_omitted GPUs past those that these metrics name.
# TYPE b9agent_gpus_omitted gauge
b9agent_gpus_omitted 0
# HELP b9agent_gpu_problems Problems of GPUs and their drivers.
# TYPE b9agent_gpu_problems gauge
b9agent_gpu_problems 0
# HELP b9agent_gpu_info Identity of a GPU.
# TYPE b9agent_gpu_info gauge
b9agent_gpu_info{vendor="intel",index="2",uuid="",name="Arc \\"A770\\" \\\\ 16G",type="",bus_id="",driver=""} 1
# HELP b9agent_gpu_healthy 0 for a GPU that must not be used.
# TYPE b9agent_gpu_healthy gauge
b9agent_gpu_healthy{vendor="intel",index="2"} 1
# HELP b9agent_gpu_stale 1 where the figures are old: no answer from the driver.
# TYPE b9agent_gpu_stale gauge
b9agent_gpu_stale{vendor="intel",index="2"} 0
# HELP b9agent_gpu_asleep 1 for a GPU that is powered down.
# TYPE b9agent_gpu_asleep gauge
b9agent_gpu_asleep{vendor="intel",index="2"} 0
# HELP b9agent_gpu_temperature_celsius Temperature of a GPU.
# TYPE b9agent_gpu_temperature_celsius gauge
b9agent_gpu_temperature_celsius{vendor="intel",index="2"} 60.5
"""


def test_the_text_of_a_small_view():
    gpu = Gpu(2, "intel", name='Arc "A770" \\ 16G', temperature_c=60.5)
    view = MetricsView(Snapshot(State.UNREACHABLE), MachineSample(
        NO_HOST._replace(load_1m=0.5), GpuSample((gpu,), "intel"), None, None), version="1.2.3")
    assert b9agent.render_metrics(view) == GOLDEN
    assert b9agent.METRICS_CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"


# ---------------------------------------------------------------- the unknown


def test_of_what_is_unknown_nothing_is_said():
    always = {"b9agent_build_info", "b9agent_membership_state"}
    assert {name for name, _ in samples_of(NOTHING)} == always
    looked = NOTHING._replace(machine=MachineSample(NO_HOST, NO_GPUS, (), None))
    counts = {"b9agent_gpus_known", "b9agent_gpus", "b9agent_gpus_omitted", "b9agent_gpu_problems"}
    assert {name for name, _ in samples_of(looked)} == always | counts
    bare = GpuSample((Gpu(0, "amd"),), "amd")
    said = {name for name, _ in samples_of(looked._replace(
        machine=MachineSample(NO_HOST, bare, None, None)))} - always - counts
    assert said == {"b9agent_gpu_" + name for name in ("info", "healthy", "stale", "asleep")}
    running = NOTHING._replace(process=ProcessFigures(1.0, 2.0))
    assert {name for name, _ in samples_of(running)} - always == {
        "b9agent_keepalives_total", "b9agent_registrations_total", "process_cpu_seconds_total",
        "process_start_time_seconds"}


def test_free_gpus_add_up_to_what_the_keepalive_says():
    two = tuple(Gpu(index, "nvidia", memory_total_bytes=1 << 36, memory_used_bytes=0, processes=())
                for index in range(2))
    view = NOTHING._replace(machine=MachineSample(NO_HOST, GpuSample(two, "nvidia"), two[:1], None))
    free = {dict(labels)["index"]: value for (name, labels), value in samples_of(view).items()
            if name == "b9agent_gpu_free"}
    assert free == {"0": 1, "1": 0}  # --max-gpus keeps the second one back


def test_a_driver_that_does_not_answer_leaves_the_number_of_gpus_unknown():
    said = samples_of(NOTHING._replace(machine=MachineSample(
        NO_HOST, GpuSample((), "nvidia", False, (GpuReading("nvml", None, problem="hangs"),)),
        None, None)))
    assert said["b9agent_gpus_known", ()] == 0 and said["b9agent_gpu_problems", ()] == 1
    assert ("b9agent_gpus", ()) not in said


def energy_samples(total, **more):
    said = samples_of(NOTHING._replace(machine=MachineSample(
        NO_HOST, NO_GPUS, (), Energy(EnergyTotals(9.0, 9.0, 9.0, 9.0, 9.0, 9.0), total, 0.0, **more))))
    return {(name[8:], *(value for _, value in labels)): value for (name, labels), value in said.items()
            if re.match("b9agent_(power|energy|co2e)", name)}


def test_energy_that_nobody_can_tell_is_not_zero():
    assert energy_samples(EnergyTotals()) == {}
    assert energy_samples(EnergyTotals(), cpu_basis="estimated", cpu_w=0.0) == {
        ("power_watts", "estimated", "cpu"): 0, ("energy_joules_total", "estimated", "cpu"): 0,
        ("energy_joules_total", "measured", "cpu"): 0}
    assert energy_samples(EnergyTotals(gpu_measured_j=5.5, co2e_g=0.0)) == {  # over restarts
        ("energy_joules_total", "measured", "gpu"): 5.5, ("energy_joules_total", "estimated", "gpu"): 0,
        ("co2e_grams_total", "location"): 0}


def test_figures_that_are_no_numbers_are_left_out():
    for value in (float("nan"), float("inf"), float("-inf")):
        machine = MachineSample(NO_HOST._replace(load_1m=value, cpu_pct=value),
                                GpuSample((Gpu(0, "amd", power_w=value, graphics_clock_mhz=value),)),
                                None, None)
        names = {name for name, _ in samples_of(NOTHING._replace(machine=machine, pue=value))}
        assert not names & {"b9agent_host_load1", "b9agent_host_cpu_utilization_ratio", "b9agent_pue_ratio",
                            "b9agent_gpu_power_watts", "b9agent_gpu_graphics_clock_hertz"}


def test_a_clock_that_was_set_back_makes_no_negative_age():
    said = samples_of(FULL._replace(at_s=1.0))
    assert said["b9agent_keepalive_age_seconds", ()] == said["b9agent_sample_age_seconds", ()] == 0


# ---------------------------------------------------------------- the hostile


HOSTILE = ['a"b', "a\\b", "a\nb", "a\\nb", "\\", '"', '"} 1\nfake 2', "\x1b[2J\u202e\x00", "\ud800", "ü漢😀",
           "x" * 5000, "}{,=", "\u2028\x85\r", "a\\" * 200]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_name_from_a_driver_cannot_leave_its_quotes(text):
    gpu = Gpu(0, text, text, text, text, mig_instances=(MigInstance(text, text, 1, 1),))
    machine = MachineSample(NO_HOST, GpuSample((gpu,), text, readings=(GpuReading(text, (gpu,), text),)),
                            None, None)
    view = NOTHING._replace(machine=machine, facts=HostFacts(text, text, text, text), version=text,
                            identity=Identity(text, text, text, text, text))
    labels = {labels for name, labels in samples_of(view) if name == "b9agent_gpu_info"}
    shown = b9agent.printable(text)[:128]
    assert dict(labels.pop())["name"] == shown and len(shown) <= 128
    page = b9agent.render_metrics(view)
    assert b9agent.printable(page.replace("\n", "")) == page.replace("\n", "")


def test_a_hundred_gpus_are_cut_to_64_and_the_cut_is_counted():
    gpus = tuple(GPU_0._replace(index=index) for index in range(100))
    said = samples_of(NOTHING._replace(machine=MachineSample(NO_HOST, GpuSample(gpus), gpus, None)))
    assert said["b9agent_gpus", ()] == 100 and said["b9agent_gpus_omitted", ()] == 36
    assert [dict(labels)["index"] for name, labels in said if name == "b9agent_gpu_power_watts"] == [
        str(index) for index in range(64)]


def test_gpus_that_say_the_same_index_are_told_once():
    gpus = (GPU_0, GPU_0._replace(power_w=1.0), GPU_0._replace(index=1), GPU_0._replace(vendor="amd"))
    said = samples_of(NOTHING._replace(machine=MachineSample(NO_HOST, GpuSample(gpus), None, None)))
    assert said["b9agent_gpu_power_watts", (("index", "0"), ("vendor", "nvidia"))] == 118.5
    assert said["b9agent_gpus", ()] == 4 and said["b9agent_gpus_omitted", ()] == 1


def test_mig_instances_are_bounded():
    parts = (MigInstance("", "", 1, 1),) * 1000
    said = samples_of(NOTHING._replace(machine=MachineSample(
        NO_HOST, GpuSample((GPU_0._replace(mig_instances=parts),)), None, None)))
    assert len([name for name, _ in said if name == "b9agent_gpu_mig_memory_size_bytes"]) == 16


def test_the_largest_page_fits_in_what_its_reader_takes():
    parts = (MigInstance("\\" * 500, "\\" * 500, 1 << 63, 1 << 63),) * 20
    gpu = Gpu(*["\\" * 500] * 5, *[1 << 63] * 11, True, parts, (), 1)
    gpus = tuple(gpu._replace(index=index, vendor="nvidia") for index in range(100))
    page = b9agent.render_metrics(FULL._replace(machine=FULL.machine._replace(gpus=GpuSample(gpus))))
    assert len(page.encode()) < 1 << 20


# -- what the front door counts


def tally_of(events):
    """A tally of (name, label, value)."""
    tally = b9agent.DoorTally()
    for name, label, value in events:
        names, _, buckets = b9agent.DOOR_METRICS[name]
        labels = (label,) * len(names.split())
        if buckets:
            tally.histogram(name, labels).observe(value)
        elif labels:
            tally.add(name, labels, value)
        else:
            tally.set(name, value)
    return tally


def door_page(tally):
    text = b9agent.render_metrics(NOTHING._replace(door=tally))
    well_formed(text)
    return text


def test_the_page_of_a_door():
    tally, door = b9agent.DoorTally(), "b9agent_door_"
    assert door_page(tally) == b9agent.render_metrics(NOTHING)
    for _ in range(3):
        tally.add(door + "requests_total", ("acme", "llama3.2:1b", "200"))
    tally.add(door + "requests_total", ("acme", 'a "quoted" \\ name', "429"))
    tally.add(door + "prompt_tokens_total", ("acme", "llama3.2:1b"), 41)
    tally.add(door + "prompt_tokens_total", ("acme", "llama3.2:1b"), 1)
    waited = tally.histogram(door + "queue_seconds", ("acme",))
    for seconds in (0.0, 0.01, 0.010001, 59.9, 1e6):
        waited.observe(seconds)
    assert tally.histogram(door + "queue_seconds", ("acme",)) is waited
    tally.set(door + "streams", 7)
    tally.set(door + "streams", 2)
    samples, families = parse(door_page(tally))
    found = {key: value for key, value in samples.items() if key[0].startswith(door)}
    acme = ("tenant", "acme")
    bounds = ["0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "30.0", "60.0", "300.0", "+Inf"]
    assert found == dict({
        (door + "requests_total", (("code", "200"), ("model", "llama3.2:1b"), acme)): 3,
        (door + "requests_total", (("code", "429"), ("model", 'a "quoted" \\ name'), acme)): 1,
        (door + "prompt_tokens_total", (("model", "llama3.2:1b"), acme)): 42,
        (door + "queue_seconds_sum", (acme,)): 1000059.920001, (door + "queue_seconds_count", (acme,)): 5,
        (door + "streams", ()): 2}.items() | {
        (door + "queue_seconds_bucket", (("le", bound), acme)): count
        for bound, count in zip(bounds, [2] + [3] * 10 + [4, 4, 5])}.items())
    assert {families[door + name][0] for name in ("requests_total", "prompt_tokens_total")} == {"counter"}
    assert families[door + "queue_seconds"][0] == "histogram" and families[door + "streams"][0] == "gauge"


def test_every_metric_of_the_door_has_a_good_name_and_help():
    texts = set()
    for name, (labels, text, buckets) in b9agent.DOOR_METRICS.items():
        assert re.fullmatch("b9agent_door_[a-z]+(_[a-z]+)*", name) and text.endswith(".") and " " in text
        assert set(labels.split()) <= {"tenant", "model", "code", "reason"}
        assert list(buckets) == sorted(set(buckets)) and bool(buckets) == name.endswith("_seconds")
        assert bool(labels) == (name.endswith("_total") or bool(buckets)) or name.endswith("overhead_seconds")
        texts.add(text)
    assert len(texts) == len(b9agent.DOOR_METRICS) == 15
    assert not set(b9agent.DOOR_METRICS) & {name for name, _, _ in b9agent.METRIC_FAMILIES}


def test_strangers_cannot_fill_the_page_or_the_memory():
    tally, most = b9agent.DoorTally(), b9agent.DOOR_SERIES_MAX
    for number in range(most + 500):
        tally.add("b9agent_door_refusals_total", ("t%d" % number, "no_token"))
        tally.histogram("b9agent_door_first_token_seconds", ("t", "m%d" % number)).observe(1.0)
    tally.add("b9agent_door_refusals_total", ("t0", "no_token"))  # who was there goes on
    samples = parse(door_page(tally))[0]
    refusals = {key[1]: value for key, value in samples.items() if key[0] == "b9agent_door_refusals_total"}
    assert len(refusals) == most + 1 and sum(refusals.values()) == most + 501
    assert refusals[("reason", "other"), ("tenant", "other")] == 500
    assert refusals[("reason", "no_token"), ("tenant", "t0")] == 2
    assert samples["b9agent_door_first_token_seconds_count", (("model", "other"), ("tenant", "other"))] == 500
    assert all(len(series) <= most + 1 for series in tally._series.values())


@pytest.mark.parametrize("one, other", [("x" * 128, "x" * 129), ("a\nb", "a\\nb"), ("\x00" * 40, "\x00" * 41)])
def test_labels_that_look_alike_are_one_series(one, other):
    tally = b9agent.DoorTally()
    for model in (one, other, one):
        tally.add("b9agent_door_cold_starts_total", (model,))
    assert [value for key, value in parse(door_page(tally))[0].items() if "cold_starts" in key[0]] == [3]


def test_a_page_is_made_while_it_is_counted():
    import threading
    tally, stop = b9agent.DoorTally(), threading.Event()
    shown = tally.histogram("b9agent_door_inter_token_seconds", ("m",))

    def count():
        number = 0
        while not stop.is_set():
            number += 1
            shown.observe(0.02)
            tally.add("b9agent_door_requests_total", ("t", "m%d" % (number % 300), "200"))
    thread = threading.Thread(target=count)
    thread.start()
    try:
        last = 0
        for _ in range(40):
            samples = parse(door_page(tally))[0]
            counted = samples.get(("b9agent_door_inter_token_seconds_count", (("model", "m"),)), 0)
            assert counted >= last
            assert counted == samples["b9agent_door_inter_token_seconds_bucket", (("le", "+Inf"), ("model", "m"))]
            last = counted
    finally:
        stop.set()
        thread.join()


def test_the_largest_page_of_a_door_fits_in_what_its_reader_takes():
    assert len(door_page(tally_of([(name, "%03d" % number + "\\" * 500, 1.5) for number in range(b9agent.DOOR_SERIES_MAX)
                                   for name in b9agent.DOOR_METRICS]))) < 15 << 20


@needs_promtool
def test_promtool_has_nothing_to_object_to_in_what_a_door_counts():
    tally = tally_of([(name, label, 1.5) for name in b9agent.DOOR_METRICS for label in ("a", "b")])
    code, words = lint(door_page(tally))
    assert code == 0 and not words.strip(), words


# Any shape of a view, with anything in its fields that their types allow.
number = st.none() | st.integers(0, 1 << 64) | st.floats()
words = st.text(max_size=20)
truth = st.booleans()


def some(kind, *fields, **more):
    return st.builds(kind, *fields, **more)


mig_instances = st.lists(some(MigInstance, words, words, number, number), max_size=3).map(tuple)
gpus = some(Gpu, st.integers(0, 9), st.sampled_from(["nvidia", "amd"]), words, words, words,
            *[number] * 11, st.none() | truth, mig_instances,
            st.none() | st.just((GpuProcess(1, None),)), number, truth, truth, words, truth)
gpu_lists = st.lists(gpus, max_size=4).map(tuple)
gpu_samples = some(GpuSample, gpu_lists, words, truth, st.lists(
    some(GpuReading, words, st.none() | gpu_lists, words, words, words), max_size=2).map(tuple))
totals = some(EnergyTotals, *[st.floats()] * 4, number, number)
energies = some(Energy, totals, totals, st.floats(), number, words, number, words)
machines = some(MachineSample, some(HostSample, *[number] * 20), gpu_samples, st.none() | gpu_lists,
                st.none() | energies, number)
views = some(MetricsView, some(Snapshot, st.sampled_from(State), st.floats(0), number), st.none() | machines,
             some(HostFacts, words, words, words, words, number, number, words, truth),
             some(Capacity, number, number), st.none() | some(Identity, *[words] * 5),
             st.none() | some(ProcessFigures, st.floats(0), st.floats(0), number, number, number),
             st.floats(0), number, number, number, number, words,
             audit=st.none() | st.fixed_dictionaries(dict(lines=number, lost=number, failing=truth)),
             door=st.none() | st.builds(tally_of, st.lists(
                 st.tuples(st.sampled_from(sorted(b9agent.DOOR_METRICS)), words, st.floats(0, 1e9)), max_size=30)))


@hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=150,
                     suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(views)
def test_any_view_becomes_a_page_that_can_be_read(view):
    text = b9agent.render_metrics(view)
    well_formed(text)
    parse(text)
    assert text == b9agent.render_metrics(view)


# ---------------------------------------------------------------- counters


ANSWERS = {"ok": None, "unreachable": b9agent.GatewayUnreachable("x"), "unwell": b9agent.GatewayUnwell("x"),
           "expired": b9agent.MachineNotFound("x"), "token": b9agent.TokenRefused("x"),
           "pool": b9agent.RequestRefused("x"), "route": b9agent.NoKeepaliveRoute("x")}


def counters(snapshot):
    return {key: value for key, value in samples_of(
        FULL._replace(snapshot=snapshot, machine=None)).items() if key[0].endswith("_total")}


@hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=60)
@hypothesis.given(st.lists(st.sampled_from(sorted(ANSWERS)), max_size=20))
def test_every_request_is_counted_once_and_no_counter_goes_back(script):
    sent, answers = [], iter(script)

    def send(name):
        sent.append((name, next(answers, "ok")))
        error = ANSWERS[sent[-1][1]]
        if error is not None:
            raise error
    life = b9agent.Membership(lambda: send("registrations"), lambda: send("keepalives"), 60.0,
                              lambda *_, **__: None, lambda: 1.0, lambda low, high: low)
    life._log.error = lambda *_, **__: None
    before = counters(life.snapshot)
    while len(sent) < len(script):
        try:
            life.step()
        except b9agent.AgentError:
            pass  # refused before it was ever ready: the agent would end here
        now = counters(life.snapshot)
        assert all(now[key] >= value for key, value in before.items()) and set(now) == set(before)
        before = now
    for name in ("registrations", "keepalives"):
        for outcome in ("ok", "unreachable", "unwell", "refused", "expired"):
            count = sum(one == name and (answer == outcome or (outcome == "refused" and answer in (
                "token", "pool", "route"))) for one, answer in sent)
            assert before["b9agent_%s_total" % name, (("outcome", outcome),)] == count


# ---------------------------------------------------------------- the process


def test_the_process_by_its_file_in_proc():
    text = ("4321 (a b) (c) S 1 4321 4321 0 -1 4194560 3210 0 0 0 12 3 0 0 20 0 5 0 8765 123456789 6543 "
            "18446744073709551615 1 1\n")
    assert b9agent.parse_process_stat(text) == (5, 6543)
    for broken in ("", "1 (x) S", ")", "9" * 9999, "1 (x) " + "N/A " * 50):
        assert b9agent.parse_process_stat(broken) == (None, None)


def is_open(number):
    try:
        os.fstat(number)
        return True
    except OSError:
        return False


def test_the_figures_of_this_process_are_those_of_an_oracle():
    psutil = pytest.importorskip("psutil")
    oracle, figures = psutil.Process(), b9agent.read_process(5.0)
    assert figures.started_wall_s == 5.0
    assert abs(figures.cpu_s - sum(oracle.cpu_times()[:2])) < 1.0
    assert figures.open_fds == sum(is_open(number) for number in range(4096))
    if figures.threads is not None:
        assert figures.threads == oracle.num_threads()
        assert abs(figures.resident_bytes - oracle.memory_info().rss) < 16 << 20
    else:
        assert not os.path.exists("/proc/self/stat")


# ---------------------------------------------------------------- promtool


@needs_promtool
@pytest.mark.parametrize("view", [FULL, NOTHING], ids=["full", "nothing"])
def test_promtool_has_nothing_to_object_to(view):
    assert lint(b9agent.render_metrics(view)) == (0, "")


@needs_promtool
def test_promtool_is_asked_what_it_would_object_to():
    """That the test above can fail."""
    code, said = lint("# TYPE a_ms gauge\na_ms 1\n# TYPE b counter\nb 1\n")
    assert code != 0 and "a_ms" in said and "_total" in said


@needs_promtool
def test_promtool_reads_hostile_names():
    gpu = GPU_0._replace(name="\n".join(HOSTILE[:10]), uuid='"\\')
    code, said = lint(b9agent.render_metrics(FULL._replace(machine=FULL.machine._replace(
        gpus=GpuSample((gpu,))))))
    assert (code, said) == (0, "")


# ---------------------------------------------------------------- over HTTP


def start(agent, hostile, *more, **extra):
    return agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(hostile.port),
                 "--control-port", "0", *(more or ("--pool-name", "gpu", "--keepalive-interval", "1")),
                 BETA9_TOKEN=TOKEN, **extra)


def scrape(control, method="GET", **headers):
    """(status, content type, text)."""
    sent = {"Authorization": "Bearer " + control.token}
    sent.update({name.replace("_", "-"): value for name, value in headers.items()})
    link = http.client.HTTPConnection(control.host, control.port, timeout=30)
    try:
        link.request(method, "/metrics", None, {name: value for name, value in sent.items() if value})
        reply = link.getresponse()
        return reply.status, reply.getheader("Content-Type"), reply.read().decode("utf-8")
    finally:
        link.close()


@pytest.fixture
def control(agent, hostile, state):
    program = start(agent, hostile)
    program.wait_line(r"notice ready\b")
    return Control(program, state)


def label(outcome):
    return (("outcome", outcome),)


def test_a_running_agent_is_scraped(control, hostile):
    status, kind, text = scrape(control)
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    well_formed(text)
    said, _ = parse(text)
    assert said["b9agent_membership_state", (("state", "ready"),)] == 1
    assert sum(value for (name, _), value in said.items() if name == "b9agent_membership_state") == 1
    assert said["b9agent_registrations_total", label("ok")] == 1
    assert said["b9agent_keepalives_total", label("ok")] >= 1
    assert 0 <= said["b9agent_keepalive_age_seconds", ()] < 40
    assert 0 < said["b9agent_keepalive_duration_seconds", ()] < 40
    assert 0 <= said["b9agent_sample_age_seconds", ()] < 40
    assert 0 <= said["b9agent_host_cpu_utilization_ratio", ()] <= 1
    assert 0 < said["b9agent_host_memory_used_bytes", ()] < said["b9agent_host_memory_size_bytes", ()]
    assert said["b9agent_build_info", (("version", b9agent.VERSION),)] == 1
    assert said["process_start_time_seconds", ()] > 1.7e9 and said["process_cpu_seconds_total", ()] > 0
    assert [key for key, value in said.items() if key[0] == "b9agent_machine_info" and value == 1] == [
        ("b9agent_machine_info", (("machine_id", (control.state / "machine_id").read_text().strip()),
                                  ("pool", "gpu")))]
    assert TOKEN not in text and control.token not in text


def test_no_counter_of_a_running_agent_goes_back(control, hostile):
    pages = []
    for _ in range(3):
        pages.append(parse(scrape(control)[2])[0])
        hostile.wait_count(len(hostile.named("keepalive", "ok")) + 1, "keepalive", "ok")
    for before, after in zip(pages, pages[1:]):
        for key, value in before.items():
            if key[0].endswith("_total"):
                assert after[key] >= value, key
        assert before["process_start_time_seconds", ()] == after["process_start_time_seconds", ()]
    key = "b9agent_keepalives_total", label("ok")
    assert pages[0][key] < pages[2][key]


def test_metrics_want_the_token_and_an_address_of_ours(control):
    for value in (None, "Bearer x", "Bearer " + TOKEN, "Basic " + control.token):
        status, kind, text = scrape(control, Authorization=value)
        assert (status, kind) == (401, "application/json") and "b9agent_" not in text
    assert scrape(control, Host="evil.example")[0] == 421
    assert scrape(control, Host="localhost:9")[0] == 200
    assert scrape(control, "POST")[0] == 405
    status, kind, text = scrape(control, "HEAD")
    assert (status, kind, text) == (200, b9agent.METRICS_CONTENT_TYPE, "")


@pytest.mark.parametrize("fault, shown, outcome", [
    ("bad_gateway", "unreachable", "unwell"), ("unauthorized", "refused", "refused")])
def test_an_agent_that_the_gateway_does_not_take_is_scraped_all_the_same(control, hostile, fault, shown,
                                                                         outcome):
    hostile.fault = fault
    control.program.wait_line(r" %s what=" % shown)
    said, _ = parse(scrape(control)[2])
    assert said["b9agent_membership_state", (("state", shown),)] == 1
    assert said["b9agent_membership_state", (("state", "ready"),)] == 0
    assert said["b9agent_keepalives_total", label(outcome)] >= 1
    assert said["b9agent_keepalive_age_seconds", ()] > 0 and said["b9agent_host_memory_size_bytes", ()] > 0


def test_an_agent_that_was_never_ready_says_no_age_of_a_keepalive(agent, hostile, state):
    hostile.fault = "panic"
    program = start(agent, hostile)
    program.wait_line(r" unreachable what=")
    said, _ = parse(scrape(Control(program, state))[2])
    assert said["b9agent_registrations_total", label("unwell")] >= 1
    assert said["b9agent_registrations_total", label("ok")] == 0
    for name in ("b9agent_keepalive_age_seconds", "b9agent_keepalive_duration_seconds"):
        assert (name, ()) not in said
    control = Control(program, state)  # the machine itself is looked at all the same
    wait_until(lambda: ("b9agent_sample_age_seconds", ()) in parse(scrape(control)[2])[0], "a look at the machine")


def test_a_scrape_asks_no_driver(agent, hostile, state, tmp_path):
    """What the keepalive saw is told, and no program is started for it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    calls = tmp_path / "calls"
    script = nvidia_smi_script("0, GPU-5f, NVIDIA L4, 23034, 1, 7, 40\n")
    (tools / "nvidia-smi").write_text(script.replace("\n", "\necho x >> '%s'\n" % calls, 1))
    (tools / "nvidia-smi").chmod(0o755)
    program = start(agent, hostile, "--keepalive-interval", "150",
                    PATH="%s:%s" % (tools, os.environ["PATH"]))
    program.wait_line(r"notice ready\b")
    control, before = Control(program, state), calls.read_text()
    for _ in range(5):
        said, _ = parse(scrape(control)[2])
    gpu = (("index", "0"), ("vendor", "nvidia"))
    assert said["b9agent_gpu_utilization_ratio", gpu] == 0.07
    assert said["b9agent_gpu_memory_size_bytes", gpu] == 23034 << 20
    assert calls.read_text() == before


PROMETHEUS_YML = """\
scrape_configs:
  - job_name: b9agent
    scrape_interval: 1s
    authorization: {{credentials_file: {token}}}
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus (Debian: prometheus)")
def test_a_real_prometheus_takes_all_of_it(control, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "prometheus.yml"
    config.write_text(PROMETHEUS_YML.format(token=control.state / "control.token", port=control.port))
    command = ["prometheus", "--config.file=%s" % config, "--storage.tsdb.path=%s" % (tmp_path / "tsdb"),
               "--web.listen-address=127.0.0.1:%d" % port]

    def ask(expression):
        try:
            with urllib.request.urlopen("http://127.0.0.1:%d/api/v1/query?query=%s" % (
                    port, urllib.parse.quote(expression)), timeout=30) as reply:
                return [(row["metric"], row["value"][1]) for row in json.load(reply)["data"]["result"]]
        except OSError:
            return []  # it is not up yet
    with Program(command, environment(tmp_path)) as server:
        found = wait_until(lambda: ask('b9agent_membership_state == 1'), "Prometheus to have scraped it")
        assert [metric["state"] for metric, _ in found] == ["ready"]
        assert [value for _, value in ask("up")] == ["1"]
        scraped, kept = [ask("scrape_samples_" + name)[0][1] for name in ("scraped", "post_metric_relabeling")]
        assert scraped == kept and int(scraped) == len(parse(scrape(control)[2])[0])
        assert not [line for line in server.lines() if "level=warn" in line and "scrape" in line]
        assert server.stop() == 0


# ---------------------------------------------------------------- the command


def test_the_command_prints_what_the_running_agent_says(control, home):
    done = run_agent(home, "metrics")
    assert done.code == 0 and done.err == ""
    well_formed(done.out)
    said, _ = parse(done.out)
    assert said["b9agent_membership_state", (("state", "ready"),)] == 1
    assert said["process_start_time_seconds", ()] == parse(scrape(control)[2])[0][
        "process_start_time_seconds", ()]


def test_without_an_agent_the_command_looks_once_and_sends_and_writes_nothing(home, hostile):
    done = run_agent(home, "metrics", "--gateway-host", "127.0.0.1", "--gateway-port", hostile.port,
                     BETA9_TOKEN=TOKEN)
    assert done.code == 5 and "no agent is running" in done.err and done.err.count("\n") == 1
    well_formed(done.out)
    said, _ = parse(done.out)
    assert said["b9agent_membership_state", (("state", "stopped"),)] == 1
    assert said["b9agent_host_memory_size_bytes", ()] > 0 and said["b9agent_gpus_known", ()] in (0, 1)
    for name in ("b9agent_keepalives_total", "process_cpu_seconds_total", "b9agent_machine_info",
                 "b9agent_energy_joules_total", "b9agent_co2e_grams_total", "b9agent_power_watts"):
        assert not [key for key in said if key[0] == name]
    assert hostile.requests == [] and tree(home) == {}


def test_the_command_prints_utf_8_in_any_locale(agent, hostile, home):
    start(agent, hostile, "--pool-name", "gpü").wait_line(r"notice ready\b")
    done = run_agent(home, "metrics", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.code == 0 and 'pool="gpü"' in done.out


def test_without_an_agent_no_token_is_needed(home):
    done = run_agent(home, "metrics")
    assert done.code == 5 and "b9agent_host_memory_size_bytes" in done.out


def test_an_agent_without_a_control_api_is_not_taken_for_none(agent, hostile, home, state):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        program = agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(hostile.port),
                        "--control-port", str(holder.getsockname()[1]), BETA9_TOKEN=TOKEN)
        program.wait_line(r"notice ready\b")
        done = run_agent(home, "metrics")
        assert done.code == 5 and done.out == "" and "no control API" in done.err
        assert program.stop() == 0
