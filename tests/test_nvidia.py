"""Section 6b: NVIDIA GPUs, by a stand-in for NVML (fake_nvml.c) and by nvidia-smi's answers."""
import csv
import ctypes
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys

import pytest

import b9agent
from b9agent import (Gpu, GpuProcess, GpuReading, GpuSampler, GpuSource, MigInstance, Nvidia,
                     NVIDIA_SMI_BASIC, NVIDIA_SMI_COLUMNS, NvidiaSmi)
from helpers import PATIENCE_S, wait_until

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIXTURES = pathlib.Path(os.environ.get("B9AGENT_FIXTURES", str(ROOT.parent / "shared/fixtures")))
MIB = 1 << 20
GIB = 1 << 30


def recording(name):
    path = FIXTURES / "nvidia" / name
    if not path.exists():
        pytest.skip("no recordings at {}: set B9AGENT_FIXTURES".format(FIXTURES))
    return path.read_text(encoding="utf-8", errors="replace")


def basic(text):
    return b9agent.parse_nvidia_smi(text, NVIDIA_SMI_BASIC) or []


def long(text):
    return b9agent.parse_nvidia_smi(text, NVIDIA_SMI_COLUMNS)


def gpu(index=0, total_mib=81559, used_mib=0, busy_pct=0.0, name="NVIDIA H100", **more):
    return Gpu(index, "nvidia", "GPU-{}".format(index), name,
               memory_total_bytes=None if total_mib is None else total_mib * MIB,
               memory_used_bytes=None if used_mib is None else used_mib * MIB,
               utilization_pct=busy_pct, **more)


# ---------------------------------------------------------------- rows

BASIC_ROWS = ("0, GPU-0, NVIDIA H100, 81559, 19818, 100, 59\n"
              "1, GPU-1, NVIDIA H100, 81559, 0, 0, 31\n")
ROWS = ("0, GPU-0, NVIDIA H100, 81559, 19818, 100, 59, 00000000:0A:00.0, 631.95, 700.00, [N/A], 1980,"
        " 2619, 0, Disabled, 590.48.01\n"
        "1, GPU-1, NVIDIA H100, 81559, 0, 0, 31, 00000009:01:00.0, 71.15, 700.00, 30, 345,"
        " 2619, 3, Enabled, 590.48.01\n")


def test_each_row_is_a_gpu_with_memory_in_bytes():
    assert basic(BASIC_ROWS) == [gpu(0, used_mib=19818, busy_pct=100.0, temperature_c=59.0),
                                 gpu(1, temperature_c=31.0)]


def test_the_long_list_of_columns_fills_the_other_figures():
    first, second = long(ROWS)
    assert first == gpu(0, used_mib=19818, busy_pct=100.0, temperature_c=59.0, power_w=631.95,
                        bus_id="0000:0a:00.0", power_limit_w=700.0, graphics_clock_mhz=1980.0,
                        memory_clock_mhz=2619.0, ecc_errors=0, mig_enabled=False)
    assert (second.bus_id, second.fan_pct, second.ecc_errors, second.mig_enabled) == (
        "0009:01:00.0", 30.0, 3, True)


@pytest.mark.parametrize("word", ["[N/A]", "[Not Supported]", "N/A", "", "nan", "inf", "-5", "9" * 400,
                                  "[Requested functionality has been deprecated]"])
def test_a_value_that_the_driver_does_not_give_is_unknown(word):
    found = long("0, GPU-0, NVIDIA H100" + ", " + ", ".join([word] * 13) + "\n")
    # Without memory of its own it shares the machine's; how much is looked for elsewhere.
    absent = word in ("[N/A]", "N/A", "[Not Supported]")
    assert found == [gpu(0, None, None, None, integrated=absent)]


@pytest.mark.parametrize("word, sick", [
    ("[Unknown Error]", "driver fails"), ("ERR!", "driver fails"), ("[GPU is lost]", "fell off the bus"),
    ("[GPU requires reset]", "needs a reset")])
def test_a_gpu_whose_figures_fail_is_sick(word, sick):
    found, = basic("0, GPU-0, NVIDIA H100, 24576, 23025, {0}, {0}\n".format(word))
    assert sick in found.problem and not b9agent.is_free(found)
    assert found.memory_used_bytes == 23025 * MIB and found.utilization_pct is None


def test_a_power_or_fan_sensor_alone_does_not_make_a_gpu_sick():
    found, = long(
        "0, GPU-0, NVIDIA GeForce RTX 3060 Laptop GPU, 6144, 5, 0, 41, 00000000:01:00.0, [N/A], ERR!,"
        " [Unknown Error], 210, 405, [N/A], [N/A], 530.41.03\n")
    assert found.problem == "" and found.power_limit_w is None and found.fan_pct is None


def test_a_name_that_the_driver_does_not_give_is_empty():
    found = basic("0, [N/A], [Unknown Error], 10, 1, 5, 30\n")
    assert (found[0].uuid, found[0].name) == ("", "")


def test_a_name_may_hold_a_comma_and_parentheses():
    assert basic("0, GPU-0, Orin, 64 GB (nvgpu), 10, 1, 5, 30\n")[0].name == "Orin, 64 GB (nvgpu)"


def test_units_are_passed_over():
    assert basic("0, GPU-0, NVIDIA H100, 81559 MiB, 7 MiB, 3 %, 31\n") == [
        gpu(0, used_mib=7, busy_pct=3.0, temperature_c=31.0)]


@pytest.mark.parametrize("text", [
    "", "\n\n", "index, uuid, name, memory.total [MiB], memory.used [MiB], utilization.gpu [%], temp\n",
    "0, GPU-0, NVIDIA H100, 81559, 0\n", "-1, GPU-0, NVIDIA H100, 1, 1, 1, 1\n",
    ", ".join(["[Unknown Error]"] * 6) + ", 0\n", "0, NVIDIA H100, GPU-0, 1, 1, 1, 1\n"])
def test_what_is_no_gpu_row_is_passed_over(text):
    assert basic(text) == []


def test_more_memory_in_use_than_there_is_is_unknown():
    assert basic("0, GPU-0, NVIDIA H100, 10, 11, 0, 30\n")[0].memory_used_bytes is None


def test_the_gpus_beside_a_lost_one_are_still_seen_and_it_is_named():
    lost = "Unable to determine the device handle for GPU0000:02:00.0: Unknown Error\n"
    first, second = ROWS.splitlines(True)
    assert [one.index for one in long(first + lost + second)] == [0, 1]
    assert b9agent.parse_lost_gpus(first + lost + second) == ["GPU 0000:02:00.0: Unknown Error"]


def test_no_devices_is_an_empty_list_and_a_failing_driver_is_unknown():
    assert long("No devices were found\n") == []
    assert long("NVIDIA-SMI has failed because ...\n") is None
    assert long("") is None


def test_processes_belong_to_their_gpu_and_are_added_up():
    text = "GPU-0, 7, 100\nGPU-0, 8, [N/A]\nGPU-1, 7, 5\nGPU-0, 7, 20 MiB\nGPU-2, [N/A], 5\nnoise, 1\n"
    assert b9agent.parse_compute_apps(text) == {
        "GPU-0": (GpuProcess(7, 120 * MIB), GpuProcess(8, None)), "GPU-1": (GpuProcess(7, 5 * MIB),),
        "GPU-2": None}


# ---------------------------------------------------------------- recordings

HEADERS = ("index", "uuid", "name", "memory.total [MiB]", "memory.used [MiB]", "utilization.gpu [%]",
           "temperature.gpu", "pci.bus_id", "power.draw [W]", "enforced.power.limit [W]",
           "fan.speed [%]", "clocks.current.graphics [MHz]", "clocks.current.memory [MHz]",
           "ecc.errors.uncorrected.volatile.total", "mig.mode.current", "driver_version")
H100, H200, RTX2080, RTX4080 = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GeForce RTX 2080 SUPER",
                                "NVIDIA GeForce RTX 4080 SUPER")

# name, MiB in all, MiB in use, percent, °C, bus, W, limit, fan, MHz, MHz, ECC, MIG: read off by eye
QUERY_RECORDINGS = [
    ("h100_load", H100, 81559, 19818, 100, 59, "0000:00:09.0", 631.95, 700, None, 1980, 2619, 0, False),
    ("h100mig_idle", H100, 81559, 59, None, 42, "0000:00:09.0", 71.15, 700, None, 345, 2619, 0, True),
    ("h100mig_load", H100, 81559, 11125, None, 53, "0000:00:09.0", 433.78, 700, None, 1980, 2619, 0, True),
    ("h200_load", H200, 143771, 32362, 100, 52, "0000:83:00.0", 627.40, 700, None, 1980, 3201, 0, False),
    ("h200mig_idle", H200, 143771, 55, None, 28, "0000:83:00.0", 78.28, 700, None, 345, 3201, 0, True),
    ("h200mig_load", H200, 143771, 16959, None, 36, "0000:83:00.0", 295.01, 700, None, 1980, 3201, 0, True),
    ("l40s_idle", "NVIDIA L40S", 46068, 0, 100, 63, "0000:01:00.0", 144.97, 350, None, 2520, 9001, 0, None),
    ("l40s_load", "NVIDIA L40S", 46068, 1235, 9, 54, "0000:01:00.0", 110.23, 350, None, 2520, 9001, 0, None),
    ("rtx2080s-595_load", RTX2080, 8192, 819, 8, 45, "0000:0c:00.0", 111.5, 250, 38, 2055, 7500, None, None),
    ("rtx2080s-610_load", RTX2080, 8192, 815, 8, 38, "0000:0c:00.0", 98.14, 250, 38, 2070, 7500, None, None),
    ("rtx4080s_idle", RTX4080, 16376, 596, 0, 43, "0000:01:00.0", 26.2, 320, 0, 210, 405, None, None),
    ("rtx4080s_load", RTX4080, 16376, 1474, 7, 46, "0000:01:00.0", 84.24, 320, 0, 2805, 11251, None, None),
]


@pytest.mark.parametrize("row", QUERY_RECORDINGS, ids=lambda row: row[0])
def test_recorded_queries_read_as_the_eye_reads_them(row):
    header, words = list(csv.reader(recording("query-gpu-all_{}.csv".format(row[0])).splitlines(),
                                    skipinitialspace=True))
    found, = long(", ".join(words[header.index(name)] for name in HEADERS))
    assert found == Gpu(
        0, "nvidia", "GPU-00000000-0000-0000-0000-000000000000", row[1], row[6], row[2] * MIB,
        row[3] * MIB, row[4], row[5], power_w=row[7], power_limit_w=row[8], fan_pct=row[9],
        graphics_clock_mhz=row[10], memory_clock_mhz=row[11], ecc_errors=row[12], mig_enabled=row[13])


def test_the_recorded_help_knows_every_column():
    known = set(re.findall(r'"([\w.]+)"', recording("help-query-gpu_590.txt")))
    assert set(NVIDIA_SMI_COLUMNS) <= known
    assert {"gpu_uuid", "pid", "used_memory"} <= set(
        re.findall(r'"([\w.]+)"', recording("help-query-compute-apps_590.txt")))


@pytest.mark.parametrize("name, expected", [
    ("h100_load", [(11327, 2566), (11328, 1542), (11345, 15690)]),
    ("h100mig_load", [(21180, 2296), (21181, 1272), (21198, 7484)]),
    ("h200_load", [(10291, 2566), (10293, 1542), (10309, 28234)]),
    ("h200mig_load", [(12249, 2194), (12250, 1170), (12267, 13526)]),
    ("l40s_load", [(20037, 538), (20038, 681)]),
    ("rtx2080s-595_load", [(5267, 230), (5268, 370)]),
    ("rtx2080s-610_load", [(28511, 230), (28512, 370)]),
    ("rtx4080s_load", [(2165, 25), (5021, 360), (5022, 503)])])
def test_recorded_processes(name, expected):
    rows = list(csv.reader(recording("compute-apps_{}.csv".format(name)).splitlines()[1:]))
    found = b9agent.parse_compute_apps("\n".join(",".join((row[4], row[5], row[7])) for row in rows))
    assert found == {"GPU-00000000-0000-0000-0000-000000000000": tuple(
        GpuProcess(pid, mib * MIB) for pid, mib in expected)}


def test_recorded_processes_of_windows_and_of_a_shared_memory():
    rows = list(csv.reader(recording("compute-apps_windows-wddm_load.csv").splitlines()[1:]))
    found, = b9agent.parse_compute_apps(
        "\n".join(",".join((row[4], row[5], row[-1])) for row in rows)).values()
    assert GpuProcess(2140, None) in found and {one.memory_bytes for one in found} == {None}
    rows = [line.split(", ") for line in recording("compute-apps_gb10_dgx-spark.csv").splitlines()]
    assert b9agent.parse_compute_apps("".join("GPU-1, %s, %s\n" % (row[0], row[2]) for row in rows)) == {
        "GPU-1": (GpuProcess(3150, 218 * MIB), GpuProcess(6330, 96073 * MIB))}


@pytest.mark.parametrize("name, expected, problems", [
    ("err_no-devices.txt", [], []), ("err_container-lost-device.txt", None, []),
    ("err_driver-library-mismatch.txt", None, []), ("err_driver-not-loaded.txt", None, []),
    ("err_handle_nospace.txt", None, ["GPU 0000:07:00.0: Unknown Error"]),
    ("err_handle_old.txt", None,
     ["GPU 0000:02:00.0: GPU is lost.  Reboot the system to recover this GPU"]),
    ("err_handle_then_no-devices.txt", None, ["GPU 0000:01:00.0: Unknown Error"]),
    ("csv_loop-mode-breaks.txt", None, [])])
def test_recorded_failures_are_unknown_and_only_no_devices_means_none(name, expected, problems):
    assert long(recording(name)) == expected
    assert b9agent.parse_lost_gpus(recording(name)) == problems


def reordered(name, *places):
    """A recording's rows with its words at `places` where our basic columns are; None is [N/A]."""
    rows = [line.split(", ") for line in recording(name).replace("],[", "], [").splitlines()]
    return "\n".join(", ".join("[N/A]" if place is None else row[min(place, len(row) - 1)]
                               for place in places) for row in rows)


def test_a_recorded_lost_gpu_leaves_the_others():
    found = basic(reordered("csv_one-gpu-unknown-error.csv", 0, None, 1, None, None, 5, None))
    assert [(one.index, one.name, one.utilization_pct) for one in found] == [
        (0, "NVIDIA GeForce RTX 3090", 0), (2, "NVIDIA GeForce RTX 3090", 0)]
    assert b9agent.parse_lost_gpus(recording("csv_one-gpu-unknown-error.csv")) == [
        "GPU 0000:02:00.0: Unknown Error"]


def test_recorded_sensors_that_fail_beside_memory_that_does_not():
    found = basic(reordered("csv_rtxa6000x5_partial-unknown-error.csv", 0, 2, 1, 8, 7, None, 3))
    assert [(one.index, one.temperature_c, one.memory_total_bytes, bool(one.problem))
            for one in found] == [
        (0, None, 49140 * MIB, True), (1, 32, 49140 * MIB, False), (2, None, 49140 * MIB, True),
        (3, 34, 49140 * MIB, False), (4, None, 49140 * MIB, True)]


@pytest.mark.parametrize("name, places, expected", [
    ("csv_gb10_dgx-spark.csv", (4, None, 0, 1, 3, 4, 5), ("NVIDIA GB10", None, None, 0, 52)),
    ("csv_tesla-t10_uuid.csv", None, None), ("csv_jetson-orin.csv", None, None)])
def test_recorded_gpus_that_share_memory_and_rows_without_an_index(name, places, expected):
    if places is None:
        assert basic(recording(name)) == [] and long(recording(name)) is None
        return
    one, = basic(reordered(name, *places))
    assert (one.name, one.memory_total_bytes, one.memory_used_bytes, one.utilization_pct,
            one.temperature_c) == expected and not one.problem


def test_recorded_bus_ids_and_numbers_that_people_logged():
    t10 = [line.split(", ") for line in recording("csv_tesla-t10_uuid.csv").splitlines()]
    assert [b9agent.parse_smi_bus_id(row[3]) for row in t10] == ["0000:0a:00.0", "0000:0b:00.0"]
    rows = [line.split(",") for line in recording("csv_h100x8_misaligned.csv").splitlines()[1:9]]
    assert [(b9agent.parse_figure(row[5]), b9agent.parse_figure(row[6])) for row in rows[:2]] == [
        (74.01, 33.0), (73.23, 34.0)]
    row = recording("csv_timestamp_units_l5.csv").splitlines()[0].split(", ")
    assert (b9agent.parse_figure(row[4]), b9agent.parse_figure(row[6])) == (20146, 11.64)


# Every other recording is no answer to our questions: nothing may be read into it.
HOSTILE = sorted(path.name for path in (FIXTURES / "nvidia").glob("*") if path.name.startswith(
    ("q_", "qx_", "table_", "dmon_", "pmon_", "list-", "L_", "mig-", "nvml-", "proc-", "version",
     "help-", "compute-apps", "csv_", "query-gpu")) and path.name not in (
         "csv_one-gpu-unknown-error.csv", "csv_rtxa6000x5_partial-unknown-error.csv"))


@pytest.mark.parametrize("name", HOSTILE or ["q_8gpu.txt"])
def test_no_gpu_is_read_into_a_recording_of_something_else(name):
    text = recording(name)
    for columns in (NVIDIA_SMI_BASIC, NVIDIA_SMI_COLUMNS):
        assert b9agent.parse_nvidia_smi(text, columns) is None
    b9agent.parse_compute_apps(text)
    assert b9agent.parse_lost_gpus(text) == (
        ["GPU 0000:34:00.0: Unknown Error"] if name == "table_one-gpu-unknown-error_610.txt" else [])
    b9agent.parse_gpu_information(text)


@pytest.mark.parametrize("name, pattern, expected", [
    ("qx_a100-sxm4-v12.xml", "<product_name>([^<]*)", ["A100-80"]),
    ("qx_a100-sxm4-mig.xml", "<product_name>([^<]*)", ["A100-40"]),
    ("qx_a10g.xml", "<product_name>([^<]*)", ["A10G"]), ("qx_tesla-t4.xml", "<product_name>([^<]*)", ["T4"]),
    ("qx_rtx-4090_noclocks.xml", "<product_name>([^<]*)", ["RTX4090"]),
    ("qx_rtx-a5000-laptop.xml", "<product_name>([^<]*)", [""]),
    ("qx_rtx-pro-6000-driver-580.xml", "<product_name>([^<]*)", ["RTXPro6000"]),
    ("qx_tesla-p100.xml", "<product_name>([^<]*)", [""]), ("qx_gtx-1660-ti.xml", "<product_name>([^<]*)", [""]),
    ("q_8gpu.txt", "Product Name +: (.*)", ["A100-40"] * 8), ("q_l4.txt", "Product Name +: (.*)", ["L4"]),
    ("q_a100sxm_x4.txt", "Product Name +: (.*)", ["A100-80"] * 4),
    ("q_h100mig_load.txt", "Product Name +: (.*)", ["H100"]),
    ("L_8x_a100-sxm4-80gb.txt", "GPU .: (.*) [(]UUID", ["A100-80"] * 8),
    ("list-L_h200mig.txt", "GPU .: (.*) [(]UUID", ["H200"]), ("list-L_l40s.txt", "GPU .: (.*) [(]UUID", ["L40S"]),
    ("query-gpu_8x_a100-sxm4-80gb_name-memory-driver.csv", "(NVIDIA [^,]*)", ["A100-80"] * 8),
    ("query-gpu_rtx4070-laptop_mig-mode-na.csv", "(NVIDIA [^,]*)", [""]),
    ("csv_tesla-t10_uuid.csv", "(Tesla [^,]*)", ["", ""]), ("csv_gb10_header.csv", "(NVIDIA [^,]*)", [""]),
    ("table_gh200x4.txt", "(NVIDIA GH[^ ]* [^ ]*)", ["GH200"] * 4)])
def test_recorded_names_have_the_schedulers_types(name, pattern, expected):
    assert [b9agent.gpu_type(found) for found in re.findall(pattern, recording(name))] == expected


@pytest.mark.parametrize("name, expected", [
    ("rtx3090", {"Model": "NVIDIA GeForce RTX 3090", "Bus Location": "0000:01:00.0", "Device Minor": "0",
                 "GPU UUID": "GPU-eaf23aa1-4d3d-596c-da66-b86b0e5db584", "GPU Excluded": "No",
                 "GPU Firmware": "590.48.01", "Video BIOS": "94.02.26.40.81"}),
    ("t10", {"Model": "Unknown", "Bus Location": "0000:0a:00.0", "Device Minor": "3", "Blacklisted": "No",
             "Video BIOS": "90.04.4b.00.01", "GPU Excluded": "No"})])
def test_recorded_information_of_the_kernels_driver(name, expected):
    found = b9agent.parse_gpu_information(recording("proc-driver-information_{}.txt".format(name)))
    assert {key: found.get(key) for key in expected} == expected


# Every function whose name stands in the file; the versions of one are put together there.
NVML_CALLS = set(re.findall(r'"(nvml[A-Z]\w+)"', (ROOT / "b9agent.py").read_text(encoding="utf-8"))) | {
    "nvmlDeviceGetComputeRunningProcesses" + version for version in ("_v2", "_v3")}
# Only looked for, never called.
NVML_LOOKED_FOR = {"nvmlDeviceGetConfComputeMemSizeInfo", "nvmlDeviceGetRunningProcessDetailList"}


@pytest.mark.parametrize("name", ["h100", "rtx2080s-610"])
def test_every_function_that_is_called_is_in_the_recorded_libraries(name):
    exported = set(recording("nvml-symbols_{}.txt".format(name)).split())
    assert len(NVML_CALLS) > 25 and NVML_CALLS - NVML_LOOKED_FOR - exported == set()


def test_every_figure_has_a_field_for_each_member_of_its_result():
    for row in b9agent.NVML_FIGURES:
        zeros = struct.unpack(row.layout, bytes(struct.calcsize(row.layout)))
        assert len(zeros) == len(row.fields) and set(row.fields) - {""} <= set(Gpu._fields)
        assert not row.version or row.version & 0xFFFFFF == struct.calcsize(row.layout)


# ---------------------------------------------------------------- the program

ANSWERS = """case "$*" in *compute-apps*) printf 'GPU-0, 7, 100\\n';; *) printf '%b' '{}';; esac
"""


def program(folder, body):
    """A nvidia-smi of our own; returns the search path that finds it."""
    path = folder / "nvidia-smi"
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return str(folder)


def answers(rows=ROWS):
    return ANSWERS.format(rows.replace("\n", "\\n"))


def test_a_machine_without_the_program_has_no_gpus_and_starts_nothing(tmp_path):
    source = NvidiaSmi(str(tmp_path), run=lambda *call: pytest.fail("ran {}".format(call)))
    assert source.read().gpus == () and not source.present()


def test_a_folder_or_a_plain_file_of_that_name_is_not_the_program(tmp_path):
    (tmp_path / "a" / "nvidia-smi").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "nvidia-smi").write_text("not executable")
    assert NvidiaSmi("{0}/a:{0}/b::{0}/c".format(tmp_path)).read().gpus == ()


def test_the_program_is_asked_for_the_columns_that_are_parsed_and_for_processes(tmp_path):
    path = program(tmp_path, 'echo "$@" >> {}/argv\n'.format(tmp_path) + answers())
    reading = NvidiaSmi(path).read()
    assert [one.index for one in reading.gpus] == [0, 1]
    assert [one.processes for one in reading.gpus] == [(GpuProcess(7, 100 * MIB),), ()]
    assert (reading.driver_version, reading.problem) == ("590.48.01", "")
    assert (tmp_path / "argv").read_text() == (
        "--query-gpu=index,uuid,name,memory.total,memory.used,utilization.gpu,temperature.gpu,pci.bus_id,"
        "power.draw,enforced.power.limit,fan.speed,clocks.gr,clocks.mem,"
        "ecc.errors.uncorrected.volatile.total,mig.mode.current,driver_version "
        "--format=csv,noheader,nounits\n"
        "--query-compute-apps=gpu_uuid,pid,used_memory --format=csv,noheader,nounits\n")


def test_a_driver_that_does_not_know_a_column_is_asked_for_the_basic_ones_from_then_on(tmp_path):
    path = program(tmp_path, 'echo "$1" | cut -c1-30 >> {}/argv\n'.format(tmp_path) + (
        'case "$*" in *mig.mode*) echo \'Field "mig.mode.current" is not a valid field to query.\';'
        ' echo; exit 2;; esac\n') + answers(BASIC_ROWS))
    source = NvidiaSmi(path)
    assert [len(source.read().gpus) for _ in range(2)] == [2, 2]
    assert (tmp_path / "argv").read_text().count("--query-gpu") == 3
    assert source.read().gpus[0].temperature_c == 59.0 and source.read().driver_version == ""


def test_processes_that_the_program_does_not_tell_are_unknown(tmp_path):
    path = program(tmp_path, 'case "$*" in *compute-apps*) echo no; exit 3;; esac\n' + answers())
    assert [one.processes for one in NvidiaSmi(path).read().gpus] == [None, None]


def test_a_gpu_without_memory_of_its_own_has_the_machines(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  125419520 kB\n")
    row = "0, GPU-0, NVIDIA GB10, [N/A], [N/A], 0, 52\n"
    one, = NvidiaSmi(program(tmp_path, 'case "$*" in *mig*) echo is not a valid field to query;'
                             " exit 2;; esac\n" + answers(row)), root=str(tmp_path)).read().gpus
    assert (one.memory_total_bytes, one.memory_used_bytes, one.integrated) == (
        125419520 * 1024, 100 * MIB, True)


@pytest.mark.parametrize("word", ["[Insufficient Permissions]", "", "[Unknown Error]", "x",
                                  "[GPU access blocked by the operating system]"])
def test_memory_that_the_program_may_not_tell_is_unknown_and_not_the_machines(tmp_path, word):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  125419520 kB\n")
    rows = ROWS.replace("81559, 0, 0", "{0}, {0}, 0".format(word))
    one = NvidiaSmi(program(tmp_path, answers(rows)), root=str(tmp_path)).read().gpus[1]
    assert (one.processes, one.memory_total_bytes, one.memory_used_bytes, one.integrated) == (
        (), None, None, False)
    assert not b9agent.is_free(one)


def test_the_program_is_found_on_the_path_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", program(tmp_path, "echo No devices were found\nexit 6\n"))
    assert NvidiaSmi().read().gpus == ()


@pytest.mark.parametrize("body, problem", [
    ("echo NVIDIA-SMI has failed because it could not communicate\nexit 9\n", "has failed because"),
    ("exit 0\n", "no answer"), ("kill -9 $$\n", "nvidia-smi: "),
    ("echo Failed to initialize NVML: Unknown Error >&2\nexit 255\n", "Unknown Error")])
def test_a_program_that_fails_is_unknown_and_its_words_are_passed_on(tmp_path, body, problem):
    reading = NvidiaSmi(program(tmp_path, body)).read()
    assert reading.gpus is None and problem in reading.problem


def test_a_lost_gpu_is_named_beside_the_others(tmp_path):
    path = program(tmp_path, answers(
        ROWS + "Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost.\n"))
    reading = NvidiaSmi(path).read()
    assert len(reading.gpus) == 2 and reading.problem == "GPU 0000:02:00.0: GPU is lost."


def test_a_program_that_cannot_be_started_is_unknown(tmp_path):
    path = program(tmp_path, "")
    (tmp_path / "nvidia-smi").write_text("#!/no/such/interpreter\n")
    assert NvidiaSmi(path).read().gpus is None


def test_a_program_that_hangs_is_ended_and_the_next_sample_asks_again(tmp_path):
    path = program(tmp_path, "echo $$ >> {}/started\nsleep 1000\n".format(tmp_path))
    source = NvidiaSmi(path, run=lambda argv, _limit_s: b9agent.run_command(argv, 0.5))
    assert source.read().gpus is None
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "started").read_text()), 0)
    program(tmp_path, answers())
    assert len(source.read().gpus) == 2


def test_a_program_that_never_stops_talking_is_ended(tmp_path):
    path = program(tmp_path, "echo $$ > {}/started\nexec yes\n".format(tmp_path))
    assert NvidiaSmi(path).read().gpus is None
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "started").read_text()), 0)


class Undying:
    """A child that hangs in the kernel: not even SIGKILL has ended it."""

    ended = None

    def poll(self):
        return self.ended


def test_while_a_hung_child_has_not_ended_no_second_one_is_started(tmp_path):
    children = []

    def run(_argv, _limit_s):
        children.append(Undying())
        return b9agent.CommandResult(None, "", "ran past its time limit", children[-1])

    source = NvidiaSmi(program(tmp_path, ""), run=run)
    assert [source.read().gpus for _ in range(3)] == [None] * 3
    assert len(children) == 1
    children[0].ended = -9
    assert source.read().gpus is None
    assert len(children) == 2


# ---------------------------------------------------------------- NVML, on a stand-in

COMPILER = shutil.which("gcc") or shutil.which("cc")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """{variant: path of a stand-in for libnvidia-ml.so.1}."""
    if COMPILER is None:
        pytest.skip("no C compiler: the stand-in for NVML cannot be built")
    found = {}
    for variant in ("new", "OLD", "ODD"):
        folder = tmp_path_factory.mktemp("nvml-" + variant)
        found[variant] = str(folder / "libnvidia-ml.so.1")
        subprocess.run([COMPILER, "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-D", variant,
                        "-o", found[variant], str(ROOT / "tests" / "fake_nvml.c")], check=True)
    return found


class Fake:
    """A stand-in of its own (a copy, so that nothing is shared) and the source that reads it."""

    def __init__(self, folder, library):
        self.path = shutil.copy(library, str(folder / "libnvidia-ml.so.1"))
        self.library = ctypes.CDLL(self.path)
        self.now_s = 1000.0
        self.root = folder / "root"
        self.source = Nvidia(self.path, str(self.root), "", clock=lambda: self.now_s)

    def told(self, text):
        self.library.fake_set(text.encode())
        return self

    def read(self, text=None):
        if text is not None:
            self.told(text)
        return self.source.read()

    def file(self, path, text):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def kernel_knows(self, bus_id, minor, uuid, runtime="active", **more):
        self.file("proc/driver/nvidia/gpus/%s/information" % bus_id, (
            "Model: \t\t NVIDIA H100 80GB HBM3\nGPU UUID: \t %s\nVideo BIOS: \t %s\n"
            "Device Minor: \t %d\nGPU Excluded:\t %s\n") % (
                uuid, more.get("bios", "96.00.30.00.01"), minor, more.get("excluded", "No")))
        self.file("sys/bus/pci/devices/%s/power/runtime_status" % bus_id, runtime + "\n")
        self.file("dev/nvidia%d" % minor, "")


@pytest.fixture
def fake(tmp_path, libraries):
    return Fake(tmp_path, libraries["new"])


@pytest.fixture
def fake_of(tmp_path, libraries):
    return lambda variant: Fake(tmp_path, libraries[variant])


def uuid_of(index):
    return "GPU-%08d-aaaa-bbbb-cccc-dddddddddddd" % index


def processes_of_fake(index):
    return tuple(GpuProcess(1000 * (index + 1) + k, (k + 1) * 100 * MIB) for k in range(index))


def whole(index, **more):
    """What fake_nvml.c says of one of its GPUs."""
    return Gpu(index, "nvidia", uuid_of(index), "NVIDIA H100 80GB HBM3",
               "%04x:%02x:%02x.0" % (9 if index == 7 else 0, 10 + index, 9 if index == 3 else 0),
               81559 * MIB, (1000 * index + 4) * MIB, 10.0 * index, 40.0 + index, 100.25 + index, 700.0,
               pytest.approx(5000000000.5 + index / 1000), 30.0 + index, 1980.0, 2619.0, index,
               processes=processes_of_fake(index))._replace(**more)


def test_eight_gpus_with_every_figure(fake):
    reading = fake.read("")
    assert list(reading.gpus) == [whole(index) for index in range(8)]
    assert reading._replace(gpus=()) == GpuReading("nvml", (), "590.48.01", "13.1", "")


def test_the_session_stays_open(fake):
    for _ in range(5):
        assert len(fake.read("").gpus) == 8
    assert (fake.library.fake_inits(), fake.library.fake_sessions()) == (1, 1)


def test_an_old_driver_has_only_the_first_versions_of_some_functions(fake_of):
    found = fake_of("OLD").read("count=3")
    # Its memory in use has the driver's own 479 MiB in it.
    assert list(found.gpus) == [
        whole(index, memory_used_bytes=(1000 * index + 4 + 479) * MIB) for index in range(3)]


def test_a_driver_of_the_early_530s_writes_longer_processes(fake_of):
    assert [one.processes for one in fake_of("ODD").read("count=4").gpus] == [
        processes_of_fake(index) for index in range(4)]


def test_a_process_that_starts_between_the_two_calls(fake):
    assert fake.read("count=4 grow").gpus[3].processes == processes_of_fake(3)


def test_process_memory_that_the_driver_does_not_know(fake):
    assert fake.read("count=2 unknown").gpus[1].processes == (GpuProcess(2000, None),)


def test_processes_that_we_may_not_see_are_unknown(fake):
    assert fake.read("fail=nvmlDeviceGetComputeRunningProcesses_v3:1:4").gpus[1].processes is None


def test_memory_falls_back_where_the_newer_call_is_of_another_version(fake):
    found = fake.read("count=1 fail=nvmlDeviceGetMemoryInfo_v2:*:25").gpus[0]
    assert found.memory_used_bytes == (4 + 479) * MIB


def test_temperature_falls_back_on_its_successor(fake):
    assert fake.read("count=2 fail=nvmlDeviceGetTemperature:*:3").gpus[1].temperature_c == 41.0


def test_a_figure_that_a_gpu_does_not_have_is_unknown(fake):
    text = "count=1 fail=nvmlDeviceGetFanSpeed:*:3 fail=nvmlDeviceGetTotalEccErrors:*:3"
    assert fake.read(text).gpus[0] == whole(0, fan_pct=None, ecc_errors=None)


def test_figures_that_cannot_be_true_are_unknown(fake):
    assert fake.read("count=1 busy=101").gpus[0].utilization_pct is None
    assert fake.read("count=1 busy=-1").gpus[0].utilization_pct is None  # 2^32-1
    assert fake.read("count=1 busy=100").gpus[0].utilization_pct == 100.0


def test_a_sliced_gpu_has_its_slices(fake):
    found = fake.read("count=3 mig=2").gpus
    assert [one.mig_enabled for one in found] == [False, False, True]
    assert found[2] == whole(2, utilization_pct=None, mig_enabled=True, mig_instances=tuple(
        MigInstance("MIG-00000002-aaaa-bbbb-cccc-%012d" % slot, "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
                    9984 * MIB, (9 + slot) * MIB) for slot in (0, 2, 4, 6)))


def test_the_processes_of_a_sliced_gpu_are_those_of_its_slices_where_it_does_not_tell(fake):
    assert fake.read("count=3 mig=2 denied").gpus[2].processes == processes_of_fake(2)


def test_a_gpu_that_is_sliced_while_the_session_lasts_and_whole_again(fake):
    assert [fake.read(text).gpus[1].utilization_pct
            for text in ("mig=9", "mig=1", "mig=1", "mig=9", "mig=9")] == [10.0, None, None, 10.0, 10.0]


def test_a_machine_without_gpus(fake):
    assert fake.read("count=0") == GpuReading("nvml", (), "590.48.01", "13.1", "")


@pytest.mark.parametrize("code, words", [
    (9, "not loaded: try `modprobe nvidia`"), (18, "different versions"), (17, "container"),
    (999, "started again"), (4, "/dev/nvidia"), (12, "NVML code 12")])
def test_a_library_that_does_not_start_says_what_to_do(fake, code, words):
    reading = fake.read("init=%d" % code)
    assert reading.gpus is None and words in reading.problem
    assert len(fake.read("").gpus) == 8  # and it is tried again


def test_a_library_without_a_gpu_on_the_bus_is_a_machine_without_gpus(fake):
    fake.file("sys/bus/pci/devices/0000:00:1f.0/vendor", "0x8086\n")
    fake.file("sys/bus/pci/devices/0000:00:1f.0/class", "0x030000\n")
    assert fake.read("init=9") == GpuReading("nvml", ())
    for node in ("dev/dxg", "dev/nvhost-gpu"):  # WSL2, Jetson
        fake.file(node, "")
        assert fake.read("init=9").gpus is None
        (fake.root / node).unlink()
    fake.file("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    fake.file("sys/bus/pci/devices/0000:01:00.0/class", "0x030200\n")
    assert fake.read("init=9").gpus is None


def test_a_count_that_fails_leaves_no_session_open(fake):
    assert fake.read("fail=nvmlDeviceGetCount_v2:-1:999").gpus is None
    assert fake.library.fake_sessions() == 0


@pytest.mark.parametrize("code, words", [
    (15, "fell off the bus (NVML: GPU is lost)"), (16, "needs a reset"), (999, "unknown error"),
    (4, "no permission"), (29, "NVML code 29")])
def test_a_gpu_without_a_handle_is_listed_and_spoils_no_other(fake, code, words):
    found = fake.read("count=4 fail=nvmlDeviceGetHandleByIndex_v2:2:%d" % code).gpus
    assert [one for one in found if one.index != 2] == [whole(0), whole(1), whole(3)]
    assert words in found[2].problem and not b9agent.is_free(found[2])


def test_a_gpu_that_is_lost_later_keeps_its_name_and_comes_back_in_another_session(fake):
    fake.read("count=3")
    found = fake.read("count=3 fail=*:1:15").gpus
    assert (found[0], found[2]) == (whole(0), whole(2))
    assert (found[1].uuid, found[1].bus_id, found[1].utilization_pct) == (
        uuid_of(1), "0000:0b:00.0", None)
    assert "fell off the bus" in found[1].problem
    fake.now_s += b9agent.NVML_REOPEN_S - 1
    fake.read("count=3 fail=*:1:15")
    assert fake.library.fake_inits() == 1
    fake.now_s += 1
    assert fake.read("count=3 fail=*:1:15").gpus[1].uuid == uuid_of(1)
    assert (fake.library.fake_inits(), fake.library.fake_sessions()) == (2, 1)
    fake.now_s += b9agent.NVML_REOPEN_S
    assert list(fake.read("count=3").gpus) == [whole(0), whole(1), whole(2)]
    fake.now_s += 10 * b9agent.NVML_REOPEN_S
    fake.read("count=3")
    assert fake.library.fake_inits() == 3


@pytest.mark.parametrize("function", ["nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTemperature"])
def test_a_gpu_whose_load_or_temperature_fails_is_sick_though_its_memory_answers(fake, function):
    found = fake.read("count=2 fail=%s:1:999" % function).gpus[1]
    assert "unknown error" in found.problem and found.memory_used_bytes == 1004 * MIB


def test_an_unknown_error_of_a_fan_or_power_sensor_alone_is_an_unknown_figure(fake):
    found = fake.read("count=1 fail=nvmlDeviceGetEnforcedPowerLimit:0:999"
                      " fail=nvmlDeviceGetFanSpeed:0:999").gpus[0]
    assert found == whole(0, power_limit_w=None, fan_pct=None)


def test_a_gpu_that_shares_the_machines_memory(fake):
    fake.file("proc/meminfo", "MemTotal:  125419520 kB\n")
    text = "count=2 fail=nvmlDeviceGetMemoryInfo:*:3 fail=nvmlDeviceGetMemoryInfo_v2:*:3"
    found = fake.read(text).gpus
    assert [(one.memory_total_bytes, one.memory_used_bytes, one.integrated) for one in found] == [
        (125419520 * 1024, 0, True), (125419520 * 1024, 100 * MIB, True)]
    assert fake.read(text + " unknown").gpus[1].memory_used_bytes is None


def test_memory_that_we_may_not_see_is_unknown_and_not_shared(fake):
    found = fake.read("count=1 fail=nvmlDeviceGetMemoryInfo:*:4 fail=nvmlDeviceGetMemoryInfo_v2:*:4")
    assert found.gpus[0] == whole(0, memory_total_bytes=None, memory_used_bytes=None)


def test_a_gpu_that_sleeps_is_not_woken(fake):
    fake.kernel_knows("0000:0a:00.0", 0, uuid_of(0), "suspended")
    fake.kernel_knows("0000:0b:00.0", 1, uuid_of(1))
    found = fake.read("count=2 fail=*:0:15").gpus  # it would fail if it were asked
    assert found[0] == Gpu(0, "nvidia", uuid_of(0), "NVIDIA H100 80GB HBM3", "0000:0a:00.0",
                           memory_used_bytes=0, utilization_pct=0.0, processes=(), asleep=True)
    assert found[1] == whole(1)


def test_a_gpu_that_falls_asleep_keeps_what_does_not_change_and_is_free(fake):
    fake.kernel_knows("0000:0a:00.0", 0, uuid_of(0))
    fake.read("count=1")
    fake.kernel_knows("0000:0a:00.0", 0, uuid_of(0), "suspended")
    found, = fake.read("count=1 fail=*:0:15").gpus
    assert (found.asleep, found.memory_total_bytes, found.name, found.temperature_c) == (
        True, 81559 * MIB, "NVIDIA H100 80GB HBM3", None)
    assert b9agent.is_free(found)


def test_gpus_that_only_the_kernel_knows_are_a_problem(fake):
    fake.kernel_knows("0000:0a:00.0", 0, uuid_of(0))
    fake.kernel_knows("0000:47:00.0", 1, "GPU-????????-????", bios="??.??.??.??.??")
    fake.kernel_knows("0000:48:00.0", 2, uuid_of(2), excluded="Yes")
    fake.kernel_knows("0000:49:00.0", 3, uuid_of(3))
    fake.kernel_knows("0000:4a:00.0", 4, uuid_of(4))
    (fake.root / "dev" / "nvidia4").unlink()  # of another container
    reading = fake.read("count=1")
    assert list(reading.gpus) == [whole(0)]
    assert reading.problem.split("; ") == [
        "GPU 0000:47:00.0: the driver could not start it: see dmesg for NVRM",
        "GPU 0000:48:00.0: it is excluded (NVreg_ExcludedGpus), or the driver took it out as broken",
        "GPU 0000:49:00.0: the driver knows it, but NVML does not list it: see dmesg"]


def test_no_gpu_is_called_hidden_where_nvml_does_not_say_where_its_gpus_are(fake):
    fake.kernel_knows("0000:0a:00.0", 0, uuid_of(0))
    fake.kernel_knows("0000:0b:00.0", 1, uuid_of(1))
    reading = fake.read("count=1 fail=nvmlDeviceGetPciInfo_v3:*:13")
    assert (reading.gpus[0].bus_id, reading.problem) == ("", "")


def test_whatever_fails_the_other_gpus_are_unharmed(fake):
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    failure = strategies.tuples(
        strategies.sampled_from(sorted(name for name in NVML_CALLS - NVML_LOOKED_FOR if "Device" in name
                                       and "Count" not in name) + ["*"]),
        strategies.sampled_from([1, 2, 3, 4, 6, 7, 10, 13, 15, 16, 25, 26, 27, 999, -1, 2147483647]))

    @hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @hypothesis.given(strategies.lists(failure, min_size=1, max_size=5), strategies.booleans())
    def check(failures, later):
        fake.now_s += 10 * b9agent.NVML_REOPEN_S  # what failed before is asked again
        if later:
            fake.read("count=3 mig=1")
        reading = fake.read("count=3 mig=1 " + " ".join(
            "fail=%s:1:%d" % one for one in failures))
        whole_ones = [reading.gpus[0], reading.gpus[2]]
        assert [one._replace(mig_enabled=None) for one in whole_ones] == [whole(0), whole(2)]
        if dict(failures).get("*") in (4, 15, 16, 999):
            assert not b9agent.is_free(reading.gpus[1])

    check()


def test_a_version_that_is_not_told_costs_nothing_else(fake):
    reading = fake.read("count=2 fail=nvmlSystemGetCudaDriverVersion_v2:-1:999")
    assert (reading.cuda_version, list(reading.gpus)) == ("", [whole(0), whole(1)])


# ---------------------------------------------------------------- which way


def test_a_machine_without_nvidia_has_no_trace_of_it(tmp_path):
    source = Nvidia("libnvidia-ml-not-here.so.1", str(tmp_path), str(tmp_path))
    assert not source.present() and source.read() == GpuReading("nvml", ())


@pytest.mark.parametrize("trace", ["dev/nvidiactl", "proc/driver/nvidia/version",
                                   "usr/lib/wsl/lib/libnvidia-ml.so.1"])
def test_a_trace_is_enough_to_look(tmp_path, trace):
    (tmp_path / trace).parent.mkdir(parents=True)
    (tmp_path / trace).write_text("")
    assert Nvidia("none.so", str(tmp_path), "").present()


def test_devices_without_a_library_are_unknown_and_a_hosts_driver_alone_is_none(tmp_path):
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version: ...")
    source = Nvidia("none.so", str(tmp_path), "")
    assert source.read().gpus == () and "--gpus all" in source.read().problem
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").write_text("")
    assert source.read().gpus is None and "cannot be opened" in source.read().problem


def test_without_the_library_the_program_is_asked(tmp_path):
    source = Nvidia("none.so", str(tmp_path / "root"), program(tmp_path, answers()))
    assert source.present() and source.read().source == "nvidia-smi" and len(source.read().gpus) == 2


def test_a_broken_library_is_no_library(tmp_path):
    (tmp_path / "broken.so").write_text("not ELF")
    source = Nvidia(str(tmp_path / "broken.so"), str(tmp_path), program(tmp_path, answers()))
    assert source.read().source == "nvidia-smi"


@pytest.mark.parametrize("folder", ["lib", "drivers/nv_dispi.inf_amd64_1"])
def test_on_wsl_the_library_lies_elsewhere(tmp_path, libraries, folder):
    place = tmp_path / "usr/lib/wsl" / folder
    place.mkdir(parents=True)
    shutil.copy(libraries["new"], str(place))
    assert len(Nvidia("none.so", str(tmp_path), "").read().gpus) == 8


def test_after_an_update_a_new_program_has_the_new_library(tmp_path, fake):
    fake.source = Nvidia(fake.path, str(fake.root), program(tmp_path, answers()))
    assert fake.read("init=18").source == "nvidia-smi"
    program(tmp_path, "echo Failed to initialize NVML: Driver/library version mismatch; exit 18\n")
    assert fake.read("init=18").source == "nvml" and fake.read("init=18").gpus is None
    assert fake.read("").source == "nvml" and len(fake.read("").gpus) == 8


def test_this_machine_is_looked_at_without_an_exception():
    source = Nvidia()
    assert isinstance(source, GpuSource) and source.vendor == "nvidia"
    assert source.present() in (True, False)
    reading = source.read()
    assert isinstance(reading, GpuReading)
    assert reading.gpus is None or all(isinstance(one, Gpu) for one in reading.gpus)
    assert [one.vendor for one in b9agent.make_gpu_sources()][0] == "nvidia"


# ---------------------------------------------------------------- a driver that hangs


def test_a_call_that_hangs_costs_the_limit_then_its_figures_grow_stale_and_unknown(fake, tmp_path):
    gate, clock = tmp_path / "gate", [1000.0]
    fake.told("count=2 hang=%s" % gate)
    fake.file("dev/nvidiactl", "")
    sampler = GpuSampler([fake.source], clock=lambda: clock[0])
    assert [one.stale for one in sampler.sample(PATIENCE_S).gpus] == [False, False]
    gate.write_text("")
    try:
        for age_s, stale in ((60, [True, True]), (301, [])):
            clock[0] = 1000.0 + age_s
            sample = sampler.sample(0.05)
            assert [one.stale for one in sample.gpus] == stale
            assert sample.known is bool(stale) and sample.vendor == "nvidia"
            assert sample.problems == ["nvidia: the driver does not answer"]
            assert not any(map(b9agent.is_free, sample.gpus))
    finally:
        gate.unlink()
    wait_until(lambda: [one.stale for one in sampler.sample(1).gpus] == [False, False], "it to wake up")


def test_the_agent_keeps_its_keepalives_going_while_the_driver_hangs(agent, hostile, tmp_path, libraries):
    gate = tmp_path / "gate"
    program(tmp_path, "exit 9\n")  # a trace of NVIDIA; the library is asked first
    running = agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", str(hostile.port),
                    "--pool-name", "gpu", "--control-port", "0", "--keepalive-interval", "1",
                    BETA9_TOKEN=hostile.token, FAKE_NVML="count=2 hang=%s" % gate,
                    PATH="%s:%s" % (tmp_path, os.environ["PATH"]),
                    LD_LIBRARY_PATH=os.path.dirname(libraries["new"]))

    def keepalives():
        return [request.body["metrics"]["free_gpu_count"] for request in list(hostile.requests)
                if request.name == "keepalive" and request.answered == "ok"]

    wait_until(lambda: keepalives()[:1] == [1], "a keepalive with the one GPU on which nothing runs")
    assert [request.body["gpu_count"] if "gpu_count" in request.body else request.body
            for request in list(hostile.requests) if request.name == "register"][0] in (2, "2")
    gate.write_text("")
    hung = len(keepalives()) + 1  # one may be on its way
    wait_until(lambda: keepalives()[hung:hung + 2] == [0, 0], "keepalives while the driver hangs")
    gate.unlink()
    wait_until(lambda: keepalives()[-1] == 1, "the GPU to be offered again")
    assert running.stop() == 0


# ---------------------------------------------------------------- an oracle

ORACLE = """
import json, pynvml as n
def value(function, *arguments):
    try:
        return function(*arguments)
    except n.NVMLError as error:
        return None
n.nvmlInit()
def one(index):
    device = n.nvmlDeviceGetHandleByIndex(index)
    memory = n.nvmlDeviceGetMemoryInfo(device, version=n.nvmlMemory_v2)
    busy, mig = value(n.nvmlDeviceGetUtilizationRates, device), value(n.nvmlDeviceGetMigMode, device)
    parts = []
    for slot in range(n.nvmlDeviceGetMaxMigDeviceCount(device) if mig and mig[0] else 0):
        part = value(n.nvmlDeviceGetMigDeviceHandleByIndex, device, slot)
        if part is not None:
            held = n.nvmlDeviceGetMemoryInfo(part, version=n.nvmlMemory_v2)
            parts.append([n.nvmlDeviceGetUUID(part), n.nvmlDeviceGetName(part), held.total, held.used])
    milli = lambda function: value(function, device) and value(function, device) / 1000
    return dict(
        index=index, uuid=n.nvmlDeviceGetUUID(device), name=n.nvmlDeviceGetName(device),
        bus_id=n.nvmlDeviceGetPciInfo(device).busId[4:].lower(), memory_total_bytes=memory.total,
        memory_used_bytes=memory.used, utilization_pct=busy and busy.gpu,
        temperature_c=n.nvmlDeviceGetTemperature(device, n.NVML_TEMPERATURE_GPU),
        power_w=milli(n.nvmlDeviceGetPowerUsage), power_limit_w=milli(n.nvmlDeviceGetEnforcedPowerLimit),
        energy_j=milli(n.nvmlDeviceGetTotalEnergyConsumption), fan_pct=value(n.nvmlDeviceGetFanSpeed, device),
        graphics_clock_mhz=n.nvmlDeviceGetClockInfo(device, n.NVML_CLOCK_GRAPHICS),
        memory_clock_mhz=n.nvmlDeviceGetClockInfo(device, n.NVML_CLOCK_MEM),
        ecc_errors=n.nvmlDeviceGetTotalEccErrors(device, n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                                                 n.NVML_VOLATILE_ECC),
        mig_enabled=mig and bool(mig[0]), mig_instances=parts,
        processes=[[p.pid, p.usedGpuMemory] for p in n.nvmlDeviceGetComputeRunningProcesses(device)])
print(json.dumps(dict(driver=n.nvmlSystemGetDriverVersion(), cuda=n.nvmlSystemGetCudaDriverVersion_v2(),
                      gpus=[one(index) for index in range(n.nvmlDeviceGetCount())])))
"""


@pytest.mark.parametrize("told", ["", "count=5 mig=3", "count=3 unknown fail=nvmlDeviceGetFanSpeed:*:3"])
def test_nvidias_own_bindings_read_the_same(told, libraries, fake):
    pytest.importorskip("pynvml")
    done = subprocess.run([sys.executable, "-c", ORACLE], stdout=subprocess.PIPE, timeout=PATIENCE_S,
                          check=True, env=dict(os.environ, FAKE_NVML=told, LD_LIBRARY_PATH=os.path.dirname(
                              libraries["new"])))
    theirs, ours = json.loads(done.stdout.decode()), fake.read(told)
    assert (ours.driver_version, ours.cuda_version) == (theirs["driver"], "13.1")
    assert theirs["cuda"] == 13010 and len(ours.gpus) == len(theirs["gpus"])
    for mine, oracle in zip(ours.gpus, theirs["gpus"]):
        for field, expected in oracle.items():
            found = getattr(mine, field)
            if field in ("mig_instances", "processes"):
                assert [list(one) for one in found] == expected, field
            else:
                assert found == pytest.approx(expected) if isinstance(expected, float) else (
                    found == expected), field


# ---------------------------------------------------------------- hostile text


def test_mutated_text_ends_in_gpus_or_none_and_never_in_an_exception():
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    splice = strategies.sampled_from(["", ",", "-1", "9" * 400, "\n", "[N/A]", "ERR!", "\x00", "²",
                                      "1e9", "nan", "MiB", "[GPU is lost]",
                                      "Unable to determine the device handle for GPU0000:02:00.0: x"]) | strategies.text(max_size=9)
    cuts = strategies.lists(strategies.tuples(strategies.floats(0, 1), strategies.integers(0, 12),
                                              splice), max_size=6)

    @hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @hypothesis.given(cuts)
    def check(mutations):
        text = ROWS
        for place, length, new in mutations:
            at = int(place * len(text))
            text = text[:at] + new + text[at + length:]
        gpus = long(text) or []
        b9agent.parse_compute_apps(text), b9agent.parse_lost_gpus(text)
        b9agent.parse_gpu_information(text)
        assert 0 <= sum(map(b9agent.is_free, gpus)) <= len(gpus)
        assert all(one.utilization_pct is None or 0 <= one.utilization_pct <= 100 for one in gpus)

    check()
