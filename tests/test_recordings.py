"""No recording of a GPU is forgotten: each has a test of its figures, or a reason why the agent never
meets its form; and whatever becomes of one on its way, a whole source ends in figures or in None.

Everything expected here was read off the recordings by eye.
"""
import ast
import csv
import fnmatch
import itertools
import json
import os
import pathlib
import random
import re

import pytest

import b9agent
import test_nvidia
import test_other_gpus
from b9agent import Amd, Apple, CommandResult, GpuProcess, Intel, NvidiaSmi
from test_other_gpus import plant, plant_card, print_text, program, recording

FIXTURES = test_other_gpus.FIXTURES  # B9AGENT_FIXTURES, else beside the repository
MIB = 1 << 20


# ---------------------------------------------------------------- the table

# The test that checks a recording's figures; or "test: reason", where all that can be shown is that
# nothing is read into it; or a reason alone.  The first pattern that fits counts.
SMI_OTHER = "test_no_gpu_is_read_into_a_recording_of_something_else: "
NOT_ASKED = SMI_OTHER + "never asked for: --query-gpu gives the same figures, and NVML comes first"
LOGGED = SMI_OTHER + "what somebody's own loop logged: we choose our columns, and no header"
AMD_OTHER = "test_recorded_text_in_another_form_names_no_gpu: "
INTEL_OTHER = "test_recorded_intel_text_in_another_form_names_no_gpu: "
MAC_OTHER = "test_recorded_text_of_another_program_names_no_gpu: "
HOST = "of the host, not of a GPU: the table of test_host.py says who takes it"
RECORDINGS = {
    "nvidia/query-gpu-all_*.csv": "test_recorded_queries_read_as_the_eye_reads_them",
    "nvidia/compute-apps_gb10_dgx-spark.csv":
        "test_recorded_processes_of_windows_and_of_a_shared_memory",
    "nvidia/compute-apps_windows-wddm_load.csv":
        "test_recorded_processes_of_windows_and_of_a_shared_memory",
    "nvidia/compute-apps_*.csv": "test_recorded_processes",
    "nvidia/err_*.txt": "test_what_a_failing_nvidia_smi_said_is_handed_on",
    "nvidia/csv_loop-mode-breaks.txt":
        "test_recorded_failures_are_unknown_and_only_no_devices_means_none",
    "nvidia/csv_one-gpu-unknown-error.csv": "test_a_recorded_lost_gpu_leaves_the_others",
    "nvidia/csv_rtxa6000x5_partial-unknown-error.csv":
        "test_recorded_sensors_that_fail_beside_memory_that_does_not",
    "nvidia/csv_gb10_dgx-spark.csv":
        "test_recorded_gpus_that_share_memory_and_rows_without_an_index",
    "nvidia/csv_jetson-orin.csv": "test_recorded_gpus_that_share_memory_and_rows_without_an_index",
    "nvidia/csv_tesla-t10_uuid.csv": "test_recorded_bus_ids_and_numbers_that_people_logged",
    "nvidia/csv_h100x8_misaligned.csv": "test_recorded_bus_ids_and_numbers_that_people_logged",
    "nvidia/csv_timestamp_units_l5.csv": "test_recorded_bus_ids_and_numbers_that_people_logged",
    "nvidia/csv_gb10_header.csv": "test_recorded_names_have_the_schedulers_types",
    "nvidia/csv_repeated_header.csv": LOGGED, "nvidia/csv_unixtime_nounits.csv": LOGGED,
    "nvidia/query-gpu_*.csv": "test_recorded_names_have_the_schedulers_types",
    "nvidia/help-query-*.txt": "test_the_recorded_help_knows_every_column",
    "nvidia/nvml-symbols_*.txt": "test_every_function_that_is_called_is_in_the_recorded_libraries",
    "nvidia/proc-driver-information_*.txt": "test_recorded_information_of_the_kernels_driver",
    "nvidia/q_*.txt": NOT_ASKED, "nvidia/qx_*.xml": NOT_ASKED, "nvidia/table_*.txt": NOT_ASKED,
    "nvidia/dmon_*.txt": NOT_ASKED, "nvidia/pmon_*.txt": NOT_ASKED,
    "nvidia/list-L_*.txt": NOT_ASKED, "nvidia/L_*.txt": NOT_ASKED,
    "nvidia/mig-lgip_none.txt": SMI_OTHER + "never asked for: what is sliced, NVML lists",
    "nvidia/version_590.txt": SMI_OTHER + "never asked for: the driver's version is a column",

    "amd/rocm-smi_*.json": "test_recorded_rocm_smi_reads_as_the_eye_reads_it",
    "amd/amd-smi_*_rx6600xt.json": "test_recorded_amd_smi_of_rocm_6",
    "amd/amd-smi_metric_mi300x_rocm721_trimmed.json": "test_recorded_amd_smi_of_rocm_7",
    "amd/amd-smi_invalid-platform.txt": "test_recorded_amd_tools_are_asked_one_after_the_other",
    "amd/amd-smi_all-NA_strix-halo.txt": AMD_OTHER + "the table of `monitor`; we ask for JSON",
    "amd/rocm-smi_*.txt": AMD_OTHER + "tables for people; we ask for JSON",
    "amd/amdgpu_top_sample.json": AMD_OTHER + "a program that we do not run",
    "amd/fdinfo_amdgpu_llama-server.txt":
        AMD_OTHER + "not read: fdinfo shows our own processes alone, ROCm's driver all",
    "amd/sysfs_vega56": "test_recorded_vega56", "amd/sysfs_strix-halo": "test_recorded_strix_halo",
    "amd/sysfs_hwmon_amdgpu": "test_recorded_sensors",
    "amd/sysfs_listing_rdna4_hwmon.txt": "test_recorded_power_without_rocm",

    "intel/xpu-smi_d*.csv": "test_recorded_xpu_smi_csv",
    "intel/xpu-smi_discovery_j.json": "test_recorded_xpu_smi_json",
    "intel/xpu-smi_*.txt": INTEL_OTHER + "tables for people; we ask for CSV",
    "intel/xpum_statistics_2-tile.json": INTEL_OTHER + "`stats` and the daemon's REST, not asked",
    "intel/intel_gpu_top_*": INTEL_OTHER + "not run: it needs root",
    "intel/fdinfo_*.txt": INTEL_OTHER + "not read: it shows our own processes alone",
    "intel/i915_arc-a770_lsgpu_card0.txt":
        INTEL_OTHER + "lsgpu is not run; its values are those of the tree sysfs_i915_arc-a770",
    "intel/sysfs_i915_arc-a770": "test_recorded_arc_a770",
    "intel/sysfs_i915_laptop": "test_recorded_laptop",

    "macos/ioreg_*.txt": "test_recorded_ioreg_text_reads_as_the_eye_reads_it",
    "macos/ioreg_a_IOAccelerator_m5pro_trimmed.plist": "test_recorded_ioreg_of_an_m5_pro",
    "macos/sysctl_iogpu.txt": "test_recorded_limit_of_the_gpus_memory",
    "macos/system_profiler_*": "test_recorded_displays",
    "macos/powermetrics_*": MAC_OTHER + "not run: it needs root",
    "macos/sysctl_*.txt": HOST, "macos/vm_stat_*.txt": HOST, "macos/netstat_*.txt": HOST,
    "macos/swapusage_*.txt": HOST, "macos/top_*.txt": HOST, "macos/iostat_*.txt": HOST,
    "macos/uptime_*.txt": HOST, "macos/ifconfig_*.txt": HOST, "macos/df_*.txt": HOST,
    "macos/mount_*.txt": HOST}


def recordings():
    """Files, and the folders that are trees."""
    return sorted(folder + "/" + path.name for folder in ("nvidia", "amd", "intel", "macos")
                  for path in (FIXTURES / folder).glob("*"))


def pattern_of(name):
    return next((pattern for pattern in RECORDINGS if fnmatch.fnmatchcase(name, pattern)), None)


def sources():
    """{test: its source, with that of the names of its module that it uses, and those that they use}."""
    found = {}
    for file in ("test_nvidia.py", "test_other_gpus.py", "test_recordings.py"):
        text = pathlib.Path(__file__).with_name(file).read_text(encoding="utf-8")
        parts, uses = {}, {}
        for node in ast.parse(text).body:
            targets = getattr(node, "targets", [node] if hasattr(node, "name") else [])
            lines = [node.lineno] + [one.lineno for one in getattr(node, "decorator_list", [])]
            for name in [getattr(one, "id", getattr(one, "name", "")) for one in targets]:
                parts[name] = "\n".join(text.splitlines()[min(lines) - 1:node.end_lineno])
                uses[name] = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
        for test in [name for name in parts if name.startswith("test_")]:
            known, more = set(), {test}
            while more:
                known |= more
                more = {name for one in more for name in uses[one] & set(parts)} - known
            # This table names all of them: it mentions nothing.
            found[test] = "\n".join(parts[name] for name in sorted(known - {"RECORDINGS"}))
    return found


def mentions(source, name, pattern):
    """Whether a test names a recording, by its name, its stem or what the * stands for; or takes
    all that begin as the pattern does."""
    base, (head, _, tail) = name.partition("/")[2], pattern.partition("/")[2].partition("*")
    part = base[len(head):len(base) - len(tail)] if "*" in pattern else base
    words = {base, base.rpartition(".")[0] or base, part}
    return any(re.search(r"""["/]%s["/.]""" % re.escape(word), source) for word in words) or (
        "*" in pattern and '"%s"' % head in source) or (
        base in test_nvidia.HOSTILE and "HOSTILE" in source)


def test_every_recording_of_a_gpu_has_its_test_or_a_reason_why_not():
    if not (FIXTURES / "nvidia").is_dir():
        pytest.skip("no recordings at {}: set B9AGENT_FIXTURES".format(FIXTURES))
    found, known = {name: pattern_of(name) for name in recordings()}, sources()
    assert [name for name, pattern in found.items() if pattern is None] == []
    unmentioned = []
    for name, pattern in found.items():
        test = RECORDINGS[pattern].partition(":")[0]
        if test.startswith("test_") and not mentions(known.get(test, ""), name, pattern):
            unmentioned.append((name, test))
    assert unmentioned == []
    assert [pattern for pattern in RECORDINGS if pattern not in found.values()] == []


def test_every_test_in_the_table_exists_and_every_other_row_is_a_reason():
    known = sources()
    for use in RECORDINGS.values():
        test, _, reason = use.partition(":")
        assert test in known if test.startswith("test_") else len(use) > 20
        assert test.startswith("test_") and not reason or len(reason) > 20


# ---------------------------------------------------------------- whole sources

UUID = "GPU-00000000-0000-0000-0000-000000000000"


def recorded_row(name):
    """What our --query-gpu would have printed: the recording has every column, with units."""
    header, words = csv.reader(recording("nvidia/query-gpu-all_{}.csv".format(name)).splitlines(),
                               skipinitialspace=True)
    return ", ".join(words[header.index(column)] for column in test_nvidia.HEADERS) + "\n"


def recorded_apps(name):
    rows = list(csv.reader(recording("nvidia/compute-apps_{}.csv".format(name)).splitlines()[1:],
                           skipinitialspace=True))
    return "".join(", ".join((row[4], row[5], row[-1])) + "\n" for row in rows)


@pytest.mark.parametrize("name, version, used_mib, processes", [
    ("h100_load", "590.48.01", 19818, [(11327, 2566), (11328, 1542), (11345, 15690)]),
    ("h100mig_load", "590.48.01", 11125, [(21180, 2296), (21181, 1272), (21198, 7484)]),
    ("h200mig_load", "590.48.01", 16959, [(12249, 2194), (12250, 1170), (12267, 13526)]),
    ("l40s_load", "595.80", 1235, [(20037, 538), (20038, 681)]),
    ("rtx2080s-610_load", "610.57.04", 815, [(28511, 230), (28512, 370)]),
    ("rtx4080s_load", "595.71.05", 1474, [(2165, 25), (5021, 360), (5022, 503)])])
def test_recorded_answers_of_nvidia_smi_through_the_whole_source(tmp_path, name, version, used_mib,
                                                                 processes):
    body = "case $1 in\n*compute-apps*) {};;\n*) {};;\nesac\n".format(
        print_text(recorded_apps(name)), print_text(recorded_row(name)))
    reading = NvidiaSmi(program(tmp_path / "bin", "nvidia-smi", body)).read()
    one, = reading.gpus
    assert (reading.driver_version, reading.problem, one.uuid, one.problem) == (version, "", UUID, "")
    assert one.memory_used_bytes == used_mib * MIB
    assert one.processes == tuple(GpuProcess(pid, mib * MIB) for pid, mib in processes)
    assert not b9agent.is_free(one)


# Exit codes as far as SOURCES.md gives them.
@pytest.mark.parametrize("name, code, gpus, problem", [
    ("no-devices", 6, (), ""),
    ("container-lost-device", 255, None, "nvidia-smi: Failed to initialize NVML: Unknown Error"),
    ("driver-library-mismatch", 18, None, "nvidia-smi: Failed to initialize NVML: Driver/library "
     "version mismatch NVML library version: 550.144"),
    ("driver-not-loaded", 9, None, "nvidia-smi: NVIDIA-SMI has failed because it couldn't communicate "
     "with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and running."),
    ("handle_nospace", 1, None, "nvidia-smi: Unable to determine the device handle for "
     "GPU0000:07:00.0: Unknown Error"),
    ("handle_old", 15, None, "nvidia-smi: Unable to determine the device handle for GPU 0000:02:00.0: "
     "GPU is lost. Reboot the system to recover this GPU"),
    ("handle_then_no-devices", 1, None, "nvidia-smi: Unable to determine the device handle for GPU0: "
     "0000:01:00.0: Unknown Error No devices were found")])
def test_what_a_failing_nvidia_smi_said_is_handed_on(tmp_path, name, code, gpus, problem):
    body = "{}exit {}\n".format(print_text(recording("nvidia/err_{}.txt".format(name))), code)
    reading = NvidiaSmi(program(tmp_path / "bin", "nvidia-smi", body)).read()
    assert (reading.gpus, reading.problem) == (gpus, problem)


def test_recorded_amd_tools_are_asked_one_after_the_other(tmp_path):
    plant(tmp_path, {"dev/kfd": ""})
    static, metric = (print_text(recording("amd/amd-smi_{}_rx6600xt.json".format(name)))
                      for name in ("static", "metric"))
    path = program(tmp_path / "bin", "amd-smi", "case $1 in\nstatic) {};;\nmetric) {};;\nesac\n".format(
        static, metric))
    reading = Amd(str(tmp_path), path).read()
    assert (reading.source, reading.driver_version) == ("amd-smi", "7.0.0-3-pve")
    assert [(one.bus_id, one.temperature_c, one.memory_used_bytes) for one in reading.gpus] == [
        ("0000:0b:00.0", 36.0, 202 * MIB)]
    program(tmp_path / "bin", "amd-smi", print_text(recording("amd/amd-smi_invalid-platform.txt")))
    program(tmp_path / "bin", "rocm-smi", print_text(recording("amd/rocm-smi_mi100_rocm602.json")))
    reading = Amd(str(tmp_path), path).read()
    assert (reading.source, reading.driver_version) == ("rocm-smi", "6.3.6")
    assert [(one.bus_id, one.temperature_c, one.power_w) for one in reading.gpus] == [
        ("0000:83:00.0", 53.0, 36.0), ("0000:a3:00.0", 55.0, 44.0), ("0000:c3:00.0", 54.0, 43.0),
        ("0000:e3:00.0", 51.0, 39.0)]


# ---------------------------------------------------------------- mutated

# Written down again, so that a bound that is lost in the agent is missed here.
MOST = {"memory_total_bytes": 1 << 50, "memory_used_bytes": 1 << 50, "utilization_pct": 100,
        "temperature_c": 200, "power_w": 1e4, "power_limit_w": 1e4, "energy_j": 1e15, "fan_pct": 300,
        "graphics_clock_mhz": 1e5, "memory_clock_mhz": 1e5, "ecc_errors": 1 << 60, "cores": 9999}
NUMBERS = ["-1", "-0.5", "0", "101", "65535", "4294967295", "18446744073709551615", "9" * 15,
           "9" * 17, "1" * 25, "1e12", "1e999", "inf", "nan", "9" * 5000]
WORDS = test_other_gpus.SPLICES + NUMBERS + [
    "ERR!", "[N/A]", "[Unknown Error]", "[GPU is lost]", "[GPU requires reset]", "GPU-", "MIG-", "\r",
    "No devices were found\n", "handle for GPU0000:02:00.0: \x1b[31mgone\n"]


def mutated(dice, text):
    """Numbers and spans replaced, lines doubled, ends cut off; often nothing."""
    for _ in range(dice.choice((0, 0, 1, 2, 6))):
        # None of a UUID: most digits of a row are there.
        numbers = [one.span() for one in re.finditer(r"(?<![-.\w])-?[0-9]+(\.[0-9]+)?", text)]
        at, what = dice.randrange(len(text) + 1), dice.random()
        if what < 0.04:
            text = text[:at]
        elif what < 0.1:
            text = text + "\n" + text[at:at + 300]
        elif what < 0.6 and numbers:
            begin, end = dice.choice(numbers)
            text = text[:begin] + dice.choice(NUMBERS) + text[end:]
        else:
            text = text[:at] + dice.choice(WORDS) + text[at + dice.choice((0, 1, 9, 200)):]
    return text.encode("utf-8", "replace").decode("utf-8")  # as a pipe or a file would have it


def runner(dice, answers):
    """Instead of run_command.  answers: {a word of the command line: texts that it may get}."""
    every = [text for texts in answers.values() for text in texts]

    def run(argv, limit_s):
        words = [os.path.basename(argv[0])] + list(argv[1:])
        texts = next((answers[key] for key in answers
                      if any(word.startswith(key) for word in words)), every)
        text = mutated(dice, dice.choice(texts if dice.random() < 0.9 else every))
        if dice.random() < 0.03:
            return CommandResult(None, text[:40], "ran past its time limit")
        return CommandResult(dice.choice((0, 0, 0, 0, 6, 255)), text)
    return run


def recorded(*patterns):
    """Texts of recordings; none where there are none."""
    return [path.read_text(encoding="utf-8", errors="replace")[:12000] for pattern in patterns
            for path in sorted(FIXTURES.glob(pattern)) if path.is_file()]


def check_reading(reading):
    for gpu in reading.gpus or ():
        for field, most in MOST.items():
            value = getattr(gpu, field)
            assert value is None or type(value) in (int, float) and 0 <= value <= most, (field, value)
        assert type(gpu.index) is int and gpu.index >= 0
        sizes = (gpu.memory_used_bytes, gpu.memory_total_bytes)
        # A Mac's GPU may use more than a limit that was set later, or that we had to guess.
        assert None in sizes or gpu.vendor == "apple" or sizes[0] <= sizes[1], sizes
        for process in gpu.processes or ():
            assert process.pid >= 0
            assert process.memory_bytes is None or 0 <= process.memory_bytes <= 1 << 50, process
        assert b9agent.is_free(gpu) in (True, False)
        json.dumps(b9agent.gpu_record(gpu, True), allow_nan=False)
    assert reading.gpus is not None or reading.problem


@pytest.mark.parametrize("memory", ["-1", "-17179869184", "18446744073709551615", "0", "", "x"])
def test_a_macs_memory_that_cannot_be_is_unknown(tmp_path, memory):
    source, _ = test_other_gpus.mac(tmp_path, test_other_gpus.ioreg(test_other_gpus.accelerator()),
                                    memory=memory, metal="0\n")
    assert [one.memory_total_bytes for one in source.read().gpus] == [None]


def test_memory_of_an_amd_process_that_cannot_be_is_unknown(tmp_path):
    plant_card(tmp_path, **test_other_gpus.DISCRETE)
    plant(tmp_path, dict(test_other_gpus.kfd_node(1, 17901, 0x300), **{
        "sys/class/kfd/kfd/proc/4242/vram_17901": "18446744073709551615\n"}))
    one, = Amd(str(tmp_path), "").read().gpus
    assert one.processes == (GpuProcess(4242, None),)
    assert not b9agent.is_free(one._replace(memory_used_bytes=0))


def test_more_memory_in_use_than_there_is_is_unknown_for_intel_and_for_shared_memory(tmp_path):
    plant_card(tmp_path, **test_other_gpus.ARC)
    dump = test_other_gpus.DUMP.replace("239.50", "65535")
    one, = Intel(str(tmp_path), test_other_gpus.xpu_smi(tmp_path / "bin", dump)).read().gpus
    assert (one.memory_total_bytes, one.memory_used_bytes) == (12216 * MIB, None)
    plant(tmp_path, {"proc/meminfo": "MemTotal:  65536 kB\n"})
    shared = b9agent.with_host_memory(one._replace(processes=(GpuProcess(7, 65 * MIB),)), str(tmp_path))
    assert (shared.memory_total_bytes, shared.memory_used_bytes) == (64 * MIB, None)


EXAMPLES = 300


def rewrite(dice, files, changed):
    """A few files say something else; those of the time before say again what they said."""
    for path in changed:
        path.write_text(files[path], encoding="utf-8")
    changed[:] = [path for path in files if dice.random() < 0.1]
    for path in changed:
        path.write_text(mutated(dice, files[path]), encoding="utf-8")


def texts_below(root):
    return {path: path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def stand_ins(folder):
    """Programs that are there to be found, and are never run."""
    for name in ("nvidia-smi", "amd-smi", "rocm-smi", "xpu-smi", "ioreg", "sysctl", "system_profiler"):
        program(folder, name, "exit 1\n")
    return str(folder)


def plant_recorded(root, folder, number):
    """A card of a recorded tree, as cardN; nothing where there are no recordings."""
    base = FIXTURES / folder / "class/drm"
    for path in sorted(base.rglob("*")):
        if path.is_file():
            inner = path.relative_to(base).parts[1:]
            plant(root, {"sys/class/drm/card{}/".format(number) + "/".join(inner): path.read_text()})


def nvidia_examples(tmp_path, dice):
    plant(tmp_path, {"proc/meminfo": "MemTotal:  125419520 kB\n"})
    files, changed = texts_below(tmp_path), []
    rows, apps = [test_nvidia.ROWS, test_nvidia.BASIC_ROWS], ["GPU-0, 7, 100\nGPU-1, 8, [N/A]\n"]
    if (FIXTURES / "nvidia").is_dir():
        names = [row[0] for row in test_nvidia.QUERY_RECORDINGS]
        rows += [recorded_row(name) for name in names]
        apps += [recorded_apps(name) for name in names if name.endswith("load")]
        rows += recorded("nvidia/err_*", "nvidia/csv_*", "nvidia/q_*", "nvidia/table_*")
    answers = {"--query-gpu": rows + rows[:14] * 3, "--query-compute-apps": apps}
    path = stand_ins(tmp_path / "bin")
    for _ in range(EXAMPLES * 4):
        rewrite(dice, files, changed)
        yield NvidiaSmi(path, runner(dice, answers), str(tmp_path))


def amd_examples(tmp_path, dice):
    cards, tools = tmp_path / "cards", tmp_path / "tools"
    plant(tools, {"dev/kfd": ""})
    plant_recorded(cards, "amd/sysfs_vega56", 0)
    plant_recorded(cards, "amd/sysfs_strix-halo", 2)
    plant_card(cards, 1, **test_other_gpus.DISCRETE)
    plant_card(cards, 2, bus_id="0000:c5:00.0", code="1002:1586")
    plant(cards, dict(test_other_gpus.kfd_node(1, 17901, 0x300), **{
        "dev/dri/card0": "", "sys/module/amdgpu/version": "6.16.13\n",
        "sys/class/kfd/kfd/proc/4242/vram_17901": "1073741824\n"}))
    files, changed = texts_below(cards), []
    answers = {"static": [test_other_gpus.AMD_SMI_STATIC] + recorded("amd/amd-smi_static*"),
               "metric": recorded("amd/amd-smi_*") + ["Invalid platform\n"],
               "rocm-smi": [test_other_gpus.ROCM_SMI] + recorded("amd/rocm-smi_*", "amd/*_top_*")}
    path = stand_ins(tmp_path / "bin")
    for number in range(EXAMPLES):
        rewrite(dice, files, changed)
        yield Amd(str(tools if number % 2 else cards), path, runner(dice, answers))


def intel_examples(tmp_path, dice):
    plant_recorded(tmp_path, "intel/sysfs_i915_arc-a770", 0)
    plant_recorded(tmp_path, "intel/sysfs_i915_laptop", 1)
    sleep = "sys/class/drm/card2/device/tile0/gt0/gtidle/idle_residency_ms"
    plant(tmp_path, {"dev/dri/card0": "", "dev/dri/card1": "", sleep: "5000\n"})
    plant_card(tmp_path, 2, hwmon__hwmon2__energy1_input="7000000000", **test_other_gpus.ARC)
    plant_card(tmp_path, 3, driver="i915", bus_id="0000:4d:00.0", code="8086:020A")
    files, changed = texts_below(tmp_path), []
    answers = {"discovery": [test_other_gpus.DISCOVERY] * 3 + recorded("intel/xpu-smi_disc*"),
               "dump": [test_other_gpus.DUMP] * 3 + recorded("intel/xpu-smi_dump*", "intel/*top*")}
    path, clock = stand_ins(tmp_path / "bin"), itertools.accumulate(
        iter(lambda: dice.choice((0.0, 1e-9, 5.0)), None))
    for _ in range(EXAMPLES):
        rewrite(dice, files, changed)
        yield Intel(str(tmp_path), path, runner(dice, answers), clock=lambda: next(clock))


def apple_examples(tmp_path, dice):
    texts, lists = recorded("macos/ioreg_*.txt"), [test_other_gpus.ioreg(test_other_gpus.accelerator())]
    lists += map(test_other_gpus.from_text, texts)
    answers = {"ioreg": lists * 2 + recorded("macos/ioreg_*.plist") * 4 + texts,
               "iogpu": ["iogpu.wired_limit_mb: 0\n"] + recorded("macos/sysctl_iogpu.txt"),
               "hw.memsize": ["17179869184\n"], "-I": ["12713115648\n"],
               "SPDisplays": ["{}"] + recorded("macos/system_profiler_*")}
    path = stand_ins(tmp_path / "bin")
    for _ in range(EXAMPLES * 4):
        yield Apple(path, runner(dice, answers))


@pytest.mark.parametrize("examples", [nvidia_examples, amd_examples, intel_examples, apple_examples])
def test_mutated_recordings_through_a_whole_source_end_in_figures_or_none(tmp_path, examples):
    dice = random.Random(examples.__name__)  # a text seeds alike in every process
    read, with_gpus = 0, 0
    for source in examples(tmp_path, dice):
        assert source.present() in (True, False)
        for _ in range(2):  # what a source remembers of the first read may be bad too
            reading = source.read()
            check_reading(reading)
            read, with_gpus = read + 1, with_gpus + bool(reading.gpus)
    assert with_gpus > read / 5  # or it would show nothing
