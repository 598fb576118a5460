"""Section 6c: GPUs of AMD, Intel and Apple."""
import json
import os
import pathlib
import plistlib
import re
import shutil
import sys
import time

import pytest

import b9agent
from b9agent import Amd, Apple, CommandResult, Gpu, GpuProcess, GpuSampler, Intel, NvidiaSmi, Tool
from helpers import nvidia_smi_script

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIXTURES = pathlib.Path(os.environ.get("B9AGENT_FIXTURES", str(ROOT.parent / "shared/fixtures")))
MIB, GIB = 1 << 20, 1 << 30


def place(name):
    path = FIXTURES / name
    if not path.exists():
        pytest.skip("no recordings at {}: set B9AGENT_FIXTURES".format(FIXTURES))
    return path


def recording(name):
    """Text of a recording from a real machine."""
    return place(name).read_text(encoding="utf-8", errors="replace")


def plant(root, files):
    """Write {path: text} below a folder."""
    for path, text in files.items():
        target = pathlib.Path(str(root)) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def plant_card(root, number=0, driver="amdgpu", bus_id="0000:03:00.0", code="1002:744C", **files):
    """A card with its device node; files: relative to its device folder, "__" for "/"."""
    uevent = "DRIVER={}\nPCI_ID={}\nPCI_SLOT_NAME={}\n".format(driver, code, bus_id)
    card = "sys/class/drm/card{}/".format(number)
    plant(root, {card + "device/uevent": uevent, "dev/dri/card{}".format(number): ""})
    plant(root, {card + "device/" + name.replace("__", "/"): text for name, text in files.items()})


def plant_tree(root, recorded):
    """A recorded tree as the /sys of a root."""
    shutil.copytree(str(place(recorded)), str(root / "sys"))
    for card in (root / "sys/class/drm").glob("card?"):
        plant(root, {"dev/dri/" + card.name: ""})


def program(folder, name, body):
    """A program of our own; returns the search path that finds it."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return str(folder)


def no_program(*call):
    pytest.fail("ran {}".format(call))


def figures(gpu, *names):
    return tuple(getattr(gpu, name) for name in names)


# ---------------------------------------------------------------- numbers, names, JSON


@pytest.mark.parametrize("word, expected", [
    ("31.0", 31.0), (" 42\n", 42.0), ("(300Mhz)", 300.0), ("2050 MHz", 2050.0), ("13 %", 13.0), (7, 7.0),
    (0.5, 0.5), ({"value": 94, "unit": "%"}, 94.0), ({"value": "N/A", "unit": "mV"}, None), ({}, None),
    ("N/A", None), ("Not supported", None), ("N/A (Secondary die)", None), ("", None), (None, None),
    (True, None), ([1], None), (-1, None), ("-5", None), (float("nan"), None), (float("inf"), None),
    ("nan", None), ("1e9", None), ("9" * 5000, None), (10 ** 400, None), ("²", None), ("0x1f", None)])
def test_a_figure_is_a_plain_number_with_or_without_its_unit(word, expected):
    assert b9agent.parse_figure(word) == expected


@pytest.mark.parametrize("field, good, bad", [
    ("utilization_pct", "100", "101"), ("temperature_c", "105", "511"), ("power_w", "1400", "65535"),
    ("graphics_clock_mhz", "3000", "4294967"), ("memory_used_bytes", str(1 << 40), str(1 << 60))])
def test_a_figure_outside_its_possible_range_is_unknown(field, good, bad):
    table = [b9agent.Figure(field, ("x",))]
    assert field in b9agent.read_figures(table, {"x": good}.get)
    assert b9agent.read_figures(table, {"x": bad}.get) == {}


@pytest.mark.parametrize("text, expected", [
    ('{"a": 1}', {"a": 1}), ('WARNING: old\n[WARNING] {x}\n{"a": 1}\nbye {"b": 2}', {"a": 1}),
    ('  [{"a": NaN}]', [{"a": None}]), ("[1, 2]", None), ("Invalid platform\n", None), ("", None),
    ('{"a": 1', None), ("[" * 100000, None), ('{"a": ' + "9" * 5000 + "}", {"a": None})])
def test_json_is_found_between_warnings(text, expected):
    assert b9agent.parse_json_within(text) == expected


def test_many_broken_beginnings_cost_little():
    start = time.monotonic()
    assert b9agent.parse_json_within("[\n" * 500000) is None
    assert time.monotonic() - start < 5


# ---------------------------------------------------------------- AMD: files

DISCRETE = {"mem_info_vram_vendor": "samsung\n", "mem_info_vram_total": "25753026560\n",
            "mem_info_vram_used": "1048576\n", "mem_info_gtt_total": "33554432000\n",
            "mem_info_gtt_used": "16777216\n", "gpu_busy_percent": "37\n",
            "product_name": "AMD Radeon PRO W7900\n", "unique_id": "f1e2d3c4b5a69788\n",
            "hwmon__hwmon5__temp1_label": "edge\n", "hwmon__hwmon5__temp1_input": "61000\n",
            "hwmon__hwmon5__temp2_label": "junction\n", "hwmon__hwmon5__temp2_input": "77000\n",
            "hwmon__hwmon5__power1_average": "119095000\n", "hwmon__hwmon5__power1_cap": "303000000\n",
            "hwmon__hwmon5__freq1_input": "2787000000\n", "hwmon__hwmon5__freq2_input": "1249000000\n",
            "hwmon__hwmon5__pwm1": "51\n"}


def test_a_card_is_read_from_files_alone(tmp_path):
    plant_card(tmp_path, **DISCRETE)
    plant(tmp_path, {"sys/module/amdgpu/version": "6.16.13\n"})
    source = Amd(str(tmp_path), run=no_program)
    assert source.present()
    assert source.read() == b9agent.GpuReading("amdgpu", (Gpu(
        0, "amd", "GPU-f1e2d3c4b5a69788", "AMD Radeon PRO W7900", "0000:03:00.0", 25753026560, 1048576,
        37.0, 61.0, 119.095, 303.0, fan_pct=20.0, graphics_clock_mhz=2787.0,
        memory_clock_mhz=1249.0),), "6.16.13")


@pytest.mark.parametrize("changed, field, expected", [
    ({"hwmon__hwmon5__temp1_label": "mem"}, "temperature_c", 77.0),
    ({"hwmon__hwmon5__temp1_label": "x", "hwmon__hwmon5__temp2_label": "y"}, "temperature_c", None),
    ({"hwmon__hwmon5__power1_average": "", "hwmon__hwmon5__power1_input": "5000000"}, "power_w", 5.0),
    ({"hwmon__hwmon5__power1_average": "N/A"}, "power_w", None),
    ({"gpu_busy_percent": "255"}, "utilization_pct", None),
    ({"hwmon__hwmon5__pwm1": "255"}, "fan_pct", 100.0),
    ({"mem_info_vram_used": "25753026561"}, "memory_used_bytes", None),
    ({"mem_info_vram_total": "0"}, "memory_total_bytes", None),
    ({"unique_id": "0000000000000000"}, "uuid", ""), ({"unique_id": "N/A"}, "uuid", ""),
    ({"product_name": ""}, "name", "AMD GPU 0x744c"), ({"product_name": "a\x1b[2Jb"}, "name", "a\\x1b[2Jb"),
    ({"hwmon__hwmon5__freq1_input": "", "pp_dpm_sclk": "S: 19Mhz *\n0: 800Mhz\n"},
     "graphics_clock_mhz", 19.0)])
def test_each_figure_has_its_second_choice_or_is_unknown(tmp_path, changed, field, expected):
    plant_card(tmp_path, **dict(DISCRETE, **changed))
    assert getattr(Amd(str(tmp_path)).read().gpus[0], field) == expected


def test_an_old_kernel_without_labels_has_the_edge_as_its_first_sensor(tmp_path):
    plant_card(tmp_path, hwmon__hwmon0__temp1_input="42000")
    assert Amd(str(tmp_path)).read().gpus[0].temperature_c == 42.0


@pytest.mark.parametrize("sign", [
    {"mem_info_vram_vendor": "hynix"}, {"board_info": "type : oam"}, {"mem_busy_percent": "0"},
    {"hwmon__hwmon1__temp1_crit": "100000"}])
def test_a_card_of_its_own_has_its_vram_and_an_apu_has_both_kinds(tmp_path, sign):
    sizes = {"mem_info_vram_total": "512", "mem_info_vram_used": "400", "mem_info_gtt_total": "33000",
             "mem_info_gtt_used": "30000"}
    plant_card(tmp_path, 0, bus_id="0000:03:00.0", **dict(sizes, **sign))
    plant_card(tmp_path, 1, bus_id="0000:c5:00.0", mem_info_vram_vendor="unknown", **sizes)
    found = [figures(gpu, "integrated", "memory_total_bytes", "memory_used_bytes")
             for gpu in Amd(str(tmp_path)).read().gpus]
    assert found == [(False, 512, 400), (True, 33512, 30400)]


def test_cards_are_counted_in_the_order_of_the_bus_and_connectors_are_none(tmp_path):
    plant_card(tmp_path, 9, bus_id="0000:03:00.0")
    plant_card(tmp_path, 2, bus_id="0000:65:00.0")
    plant_card(tmp_path, 17, bus_id="10000:01:00.0")
    plant_card(tmp_path, 0, driver="ast", bus_id="0000:01:00.0")
    plant(tmp_path, {"sys/class/drm/card9-DP-1/status": "", "sys/class/drm/version": "drm 1.1.0",
                     "sys/class/drm/renderD128/device/uevent": "DRIVER=amdgpu\n"})
    assert [(gpu.index, gpu.bus_id) for gpu in Amd(str(tmp_path)).read().gpus] == [
        (0, "0000:03:00.0"), (1, "0000:65:00.0"), (2, "10000:01:00.0")]


def test_a_container_has_only_the_gpus_whose_device_it_was_given(tmp_path):
    plant_card(tmp_path, 0, bus_id="0000:03:00.0")
    plant_card(tmp_path, 1, bus_id="0000:04:00.0", drm__renderD129__dev="226:129")
    (tmp_path / "dev/dri/card0").unlink()
    (tmp_path / "dev/dri/card1").unlink()
    assert not Amd(str(tmp_path), "").present()
    plant(tmp_path, {"dev/dri/renderD129": ""})
    assert [gpu.bus_id for gpu in Amd(str(tmp_path)).read().gpus] == ["0000:04:00.0"]


def test_a_sleeping_gpu_is_not_woken_up_and_its_memory_is_known(tmp_path):
    plant_card(tmp_path, power__runtime_status="suspended\n", **DISCRETE)
    names = []

    def read(path):
        names.append(os.path.basename(path))
        return b9agent.read_sysfs(path)

    gpu = Amd(str(tmp_path), read=read).read().gpus[0]
    assert figures(gpu, "asleep", "memory_total_bytes", "memory_used_bytes", "utilization_pct", "power_w",
                   "temperature_c", "problem") == (True, 25753026560, 1048576, None, None, None, "")
    assert b9agent.is_free(gpu)
    assert set(names) == {"runtime_status", "uevent", "mem_info_vram_vendor", "mem_info_vram_total",
                          "mem_info_vram_used", "mem_info_gtt_total", "mem_info_gtt_used",
                          "product_name", "unique_id", "version"}


def test_a_driver_that_refuses_to_wake_its_gpu_says_that_it_sleeps(tmp_path):
    plant_card(tmp_path, power__runtime_status="active\n", **DISCRETE)

    def read(path):
        sensor = "hwmon" in path or "busy" in path or "pp_dpm" in path
        return ("", True) if sensor else b9agent.read_sysfs(path)

    gpu = Amd(str(tmp_path), read=read).read().gpus[0]
    assert figures(gpu, "asleep", "memory_used_bytes", "power_w") == (True, 1048576, None)


def test_a_file_that_cannot_be_read_is_no_sign_of_sleep(tmp_path):
    assert b9agent.read_sysfs(str(tmp_path / "none")) == ("", False)
    assert b9agent.read_sysfs(str(tmp_path)) == ("", False)
    plant(tmp_path, {"x": "1\n"})
    assert b9agent.read_sysfs(str(tmp_path / "x")) == ("1", False)


def kfd_node(number, gpu_id, location, domain=0):
    folder = "sys/class/kfd/kfd/topology/nodes/{}/".format(number)
    return {folder + "gpu_id": "{}\n".format(gpu_id),
            folder + "properties": "cpu_cores_count 0\nvendor_id 4098\nlocation_id {}\ndomain {}\n".format(
                location, domain)}


def test_processes_come_from_rocms_driver(tmp_path):
    plant_card(tmp_path, 0, bus_id="0000:03:00.0", **DISCRETE)
    plant_card(tmp_path, 1, bus_id="0001:03:00.0")
    plant_card(tmp_path, 2, bus_id="0000:0c:00.0")
    plant_card(tmp_path, 3, bus_id="0000:0d:00.0")
    plant(tmp_path, kfd_node(0, 0, 0))         # the CPU
    plant(tmp_path, kfd_node(1, 17901, 0x300))
    plant(tmp_path, kfd_node(2, 5, 0x300, 1))
    plant(tmp_path, kfd_node(3, 60, 0xc00))    # two partitions of one GPU
    plant(tmp_path, kfd_node(4, 61, 0xc01))
    proc = "sys/class/kfd/kfd/proc/"
    plant(tmp_path, {proc + "4242/vram_17901": "1073741824\n", proc + "4242/vram_5": "0\n",
                     proc + "77/vram_60": "1000\n", proc + "77/vram_61": "24\n",
                     proc + "77/vram_17901": "0\n", proc + "x/vram_17901": "5\n"})
    gpus = Amd(str(tmp_path)).read().gpus
    assert [gpu.processes for gpu in gpus] == [(GpuProcess(4242, 1073741824),), (GpuProcess(77, 1024),),
                                               None, ()]
    assert not b9agent.is_free(gpus[0])


# ---------------------------------------------------------------- AMD: recorded files


def test_recorded_vega56(tmp_path):
    plant_tree(tmp_path, "amd/sysfs_vega56")
    (gpu,) = Amd(str(tmp_path), run=no_program).read().gpus
    assert gpu == Gpu(0, "amd", "GPU-0123456789abcdef", "AMD GPU 0x687f", "0000:09:00.0", 8573157376,
                      1490378752, 4.0, graphics_clock_mhz=852.0)


def test_recorded_strix_halo(tmp_path):
    plant_tree(tmp_path, "amd/sysfs_strix-halo")
    plant_card(tmp_path, 0, bus_id="0000:c5:00.0", code="1002:1586")
    (gpu,) = Amd(str(tmp_path), run=no_program).read().gpus
    assert figures(gpu, "integrated", "memory_total_bytes", "memory_used_bytes", "graphics_clock_mhz") == (
        True, None, 20902731776 + 1877319680, 2900.0)


def test_recorded_sensors(tmp_path):
    plant_card(tmp_path)
    shutil.copytree(str(place("amd/sysfs_hwmon_amdgpu/class/hwmon")),
                    str(tmp_path / "sys/class/drm/card0/device/hwmon"))
    (gpu,) = Amd(str(tmp_path)).read().gpus
    assert figures(gpu, "graphics_clock_mhz", "memory_clock_mhz", "temperature_c") == (214.0, 300.0, None)


def test_recorded_power_without_rocm(tmp_path):
    path, value = recording("amd/sysfs_listing_rdna4_hwmon.txt").splitlines()[0].split(" = ")
    plant_card(tmp_path, 1)
    plant(tmp_path, {path.lstrip("/"): value})
    assert Amd(str(tmp_path)).read().gpus[0].power_w == 26.0


# ---------------------------------------------------------------- AMD: tools

ROCM_SMI = json.dumps({
    "card0": {"Device Name": "AMD Instinct MI300X", "Device ID": "0x74a1", "Unique ID": "0xabc",
              "PCI Bus": "0000:0C:00.0", "Temperature (Sensor junction) (C)": "35.0",
              "Current Socket Graphics Package Power (W)": "133.0", "GPU use (%)": "99",
              "Max Graphics Package Power (W)": "750.0", "sclk clock speed:": "(137Mhz)",
              "mclk clock speed:": "(900Mhz)", "Fan speed (%)": "N/A",
              "VRAM Total Memory (B)": "206141652992", "VRAM Total Used Memory (B)": "309329920"},
    "card3": {"GPU ID": "0x74a1", "GPU use (%)": "N/A"}, "system": {"Driver version": "6.7.0"}})


def test_rocm_smi_names_what_it_knows():
    gpus, version = b9agent.parse_rocm_smi("WARNING: AMD GPU device(s) is/are in a low-power state\n\n" + ROCM_SMI)
    assert version == "6.7.0"
    assert gpus == [
        Gpu(0, "amd", "GPU-0000000000000abc", "AMD Instinct MI300X", "0000:0c:00.0", 206141652992,
            309329920, 99.0, 35.0, 133.0, 750.0, graphics_clock_mhz=137.0, memory_clock_mhz=900.0),
        Gpu(3, "amd", name="AMD GPU 0x74a1")]


ROCM_FIELDS = ("index", "name", "uuid", "bus_id", "temperature_c", "power_w", "power_limit_w", "utilization_pct",
               "graphics_clock_mhz", "memory_clock_mhz", "fan_pct", "memory_total_bytes", "memory_used_bytes",
               "integrated")
MI100 = "Arcturus GL-XL [Instinct MI100]"
NAVI22 = "Navi 22 [Radeon RX 6700/6700 XT / 6800M]"
# file, how many GPUs, version of the driver, fields of some: read off the recordings
ROCM_RECORDINGS = [
    ("mi100_rocm571", 6, "6.2.4", [
        (0, MI100, "", "0000:1e:00.0", 31.0, 39.0, 290.0, 0.0, 300.0, 1200.0, None, 34342961152, 6782976, False),
        (1, MI100, "", "0000:22:00.0", 30.0, 37.0, 290.0, 0.0, 300.0, 1200.0, None, 34342961152, 6782976, False),
        (5, MI100, "", "0000:49:00.0", 33.0, 40.0, 290.0, 0.0, 300.0, 1200.0, None, 34342961152, 6782976, False)]),
    ("mi100_rocm602", 4, "6.3.6", [
        (0, MI100, "GPU-79ccd55167a2124a", "0000:83:00.0", 53.0, 36.0, 290.0, 0.0, 300.0, 1200.0, None, 34342961152,
         6750208, False),
        (1, MI100, "GPU-04edfb117a17a07d", "0000:a3:00.0", 55.0, 44.0, 290.0, 0.0, 300.0, 1200.0, None, 34342961152,
         6750208, False),
        (3, MI100, "GPU-1b9dd972253c3736", "0000:e3:00.0", 51.0, 39.0, 290.0, 0.0, 300.0, 1200.0, None, 34342961152,
         6750208, False)]),
    ("rembrandt-680m", 1, "", [
        (0, "Rembrandt [Radeon 680M]", "", "", 49.0, 28.159, None, 0.0, None, None, None, None, None, True)]),
    ("rx6700xt_rocm430", 1, "6.3.6", [
        (0, "AMD GPU 0x73df", "", "0000:07:00.0", 45.0, 6.0, 211.0, 0.0, 500.0, 96.0, None, 12868124672, 1622728704,
         False)]),
    ("rx6700xt_rocm571", 1, "6.3.6", [
        (0, NAVI22, "", "0000:07:00.0", 45.0, 6.0, 211.0, 0.0, 500.0, 96.0, None, 12868124672, 1564491776, False)]),
    ("rx6700xt_rocm602", 1, "6.3.6", [
        (0, NAVI22, "", "0000:07:00.0", 45.0, None, 211.0, 0.0, 500.0, 96.0, None, 12868124672, 1572757504, False)]),
    ("rx6700xt_rocm612", 1, "6.3.6", [
        (0, NAVI22, "", "0000:07:00.0", 45.0, 6.0, 211.0, 0.0, 0.0, 96.0, None, 12868124672, 1572745216, False)]),
    ("showallinfo_rx6600xt", 1, "7.0.0-3-pve", [
        (0, "Navi 23 [Radeon RX 6600/6600 XT/6600M]", "", "0000:0b:00.0", None, None, None, 0.0, None, None, None,
         None, None, False)]),
    ("strix-halo-512MB", 1, "", [
        (0, "Radeon 8060S Graphics", "", "", 43.0, 7.006, None, 1.0, 668.0, None, None, 536870912 + 33323495424,
         415236096 + 30562549760, True)]),
    ("strix-halo-96GB_and_broken-7900xtx", 2, "", [
        (0, "Radeon 8060S Graphics", "", "", 36.0, 18.007, None, 0.0, 2900.0, 937.0, None,
         103079215104 + 16368283648, 50349752320 + 2118324224, True),
        (1, "Radeon RX 7900 XTX", "", "", None, None, None, None, None, None, None, 25753026560, None, False)]),
    ("vega-10-XT", 1, "5.9.25", [
        (0, "AMD GPU 0x6861", "GPU-02150e7d042a1124", "0000:04:00.0", 39.0, 15.0, 170.0, 0.0, 1269.0, 167.0, 13.0,
         17163091968, 17776640, False)]),
    ("vega-20-WKS-GL-XE", 1, "5.9.17", [
        (0, "Radeon Instinct MI50 32GB", "GPU-02f048617326b1ea", "0000:63:00.0", 36.0, 26.0, 225.0, 0.0, 1725.0,
         1000.0, 0.0, 34342961152, 10850304, False)]),
]


@pytest.mark.parametrize("name, count, version, expected", ROCM_RECORDINGS)
def test_recorded_rocm_smi_reads_as_the_eye_reads_it(name, count, version, expected):
    gpus, found_version = b9agent.parse_rocm_smi(recording("amd/rocm-smi_{}.json".format(name)))
    assert len(gpus) == count
    assert found_version == version
    wanted = [row[0] for row in expected]
    assert [figures(gpu, *ROCM_FIELDS) for gpu in gpus if gpu.index in wanted] == expected


AMD_SMI_STATIC = json.dumps({"gpu_data": [
    {"gpu": 0, "asic": {"market_name": "AMD Instinct MI300X", "asic_serial": "0x8D1457E2C20F59D2",
                        "target_graphics_version": "gfx942"}, "bus": {"bdf": "0000:0C:00.0"},
     "limit": {"ppt0": {"socket_power_limit": {"value": 750, "unit": "W"}}, "ppt1": "N/A"},
     "driver": {"name": "amdgpu", "version": "6.16.13"}},
    {"gpu": 1, "asic": "N/A", "bus": "N/A", "limit": "N/A"}]})


def test_amd_smi_joins_what_stands_and_what_changes():
    metric = json.dumps({"gpu_data": [{"gpu": 0, "usage": {"gfx_activity": {"value": 94, "unit": "%"}},
                                       "mem_usage": {"total_vram": {"value": 196592, "unit": "MB"},
                                                     "used_vram": "N/A"}},
                                      {"gpu": 1, "usage": "N/A"}, {"gpu": True}, {"gpu": -1}, 5]})
    gpus, version = b9agent.parse_amd_smi(AMD_SMI_STATIC, metric)
    assert version == "6.16.13"
    assert gpus == [Gpu(0, "amd", "GPU-8d1457e2c20f59d2", "AMD Instinct MI300X", "0000:0c:00.0", 196592 * MIB,
                        None, 94.0, power_limit_w=750.0), Gpu(1, "amd", name="AMD GPU 1")]


def test_recorded_amd_smi_of_rocm_6():
    gpus, version = b9agent.parse_amd_smi(recording("amd/amd-smi_static_rx6600xt.json"),
                                          recording("amd/amd-smi_metric_rx6600xt.json"))
    assert version == "7.0.0-3-pve"
    assert [figures(gpu, *ROCM_FIELDS) for gpu in gpus] == [
        (0, "Navi 23 [Radeon RX 6600/6600 XT", "", "0000:0b:00.0", 36.0, 6.0, 100.0, 1.0, 800.0, 541.0, 0.0,
         8176 * MIB, 202 * MIB, False)]


def test_recorded_amd_smi_of_rocm_7():
    gpus, _ = b9agent.parse_amd_smi("", recording("amd/amd-smi_metric_mi300x_rocm721_trimmed.json"))
    assert [figures(gpu, "index", "utilization_pct", "power_w", "memory_total_bytes", "memory_used_bytes")
            for gpu in gpus] == [(0, 94.0, 612.0, 196592 * MIB, 17153 * MIB),
                                 (1, 0.0, None, 196592 * MIB, 284 * MIB)]


@pytest.mark.parametrize("name", [
    "amd-smi_all-NA_strix-halo.txt", "amd-smi_invalid-platform.txt", "rocm-smi_a_mi300x_x4.txt",
    "rocm-smi_and_amd-smi_tables_r9700.txt", "rocm-smi_concise_mi300x_x4.txt", "amdgpu_top_sample.json",
    "fdinfo_amdgpu_llama-server.txt"])
def test_recorded_text_in_another_form_names_no_gpu(name):
    text = recording("amd/" + name)
    assert b9agent.parse_rocm_smi(text)[0] == b9agent.parse_amd_smi(text, text)[0] == []


def amd_tools(folder, amd_smi, rocm_smi):
    program(folder, "amd-smi", amd_smi)
    return program(folder, "rocm-smi", rocm_smi)


def print_text(text):
    return "cat <<'EOT'\n{}\nEOT\n".format(text)


def test_tools_are_asked_only_where_there_is_a_device_and_no_card(tmp_path):
    path = amd_tools(tmp_path / "bin", "exit 1\n", "exit 1\n")
    assert not Amd(str(tmp_path), path, run=no_program).present()
    plant(tmp_path, {"dev/kfd": ""})
    assert Amd(str(tmp_path), path).present()
    assert not Amd(str(tmp_path), str(tmp_path / "nowhere")).present()
    plant_card(tmp_path)
    assert len(Amd(str(tmp_path), path, run=no_program).read().gpus) == 1


def test_a_stale_amd_smi_that_exits_0_leaves_the_word_to_rocm_smi(tmp_path):
    plant(tmp_path, {"dev/kfd": ""})
    path = amd_tools(tmp_path / "bin", "echo Invalid platform\n", print_text(ROCM_SMI))
    reading = Amd(str(tmp_path), path).read()
    assert (reading.source, reading.driver_version, len(reading.gpus)) == ("rocm-smi", "6.7.0", 2)


def test_amd_smi_is_asked_first(tmp_path):
    plant(tmp_path, {"dev/kfd": ""})
    path = amd_tools(tmp_path / "bin", 'echo "$@" >> {}/asked\n'.format(tmp_path) + print_text(AMD_SMI_STATIC),
                     "exit 1\n")
    assert [gpu.index for gpu in Amd(str(tmp_path), path).read().gpus] == [0, 1]
    assert (tmp_path / "asked").read_text() == "static --json\nmetric --json\n"


@pytest.mark.parametrize("device, expected", [("kfd", None), ("dxg", ())])
def test_tools_that_say_nothing_leave_it_unknown_where_the_driver_is(tmp_path, device, expected):
    plant(tmp_path, {"dev/" + device: ""})
    path = amd_tools(tmp_path / "bin", "exit 0\n", "echo ERROR: amdgpu not found in modules\n")
    reading = Amd(str(tmp_path), path).read()
    assert (reading.gpus, reading.problem) == (expected, "amd-smi and rocm-smi name no GPU")


class Undying:
    """A child that hangs in the kernel: not even SIGKILL has ended it."""

    ended = None

    def poll(self):
        return self.ended


def test_while_a_tool_hangs_no_second_one_is_started(tmp_path):
    children = []

    def run(_argv, _limit_s):
        children.append(Undying())
        return CommandResult(None, "", "ran past its time limit", children[-1])

    tool = Tool("xpu-smi", program(tmp_path / "bin", "xpu-smi", ""), run)
    assert [tool.ask("x").problem for _ in range(2)] == ["ran past its time limit",
                                                         "xpu-smi hangs in the driver"]
    children[0].ended = -9
    assert tool.ask("x").problem == "ran past its time limit" and len(children) == 2


# ---------------------------------------------------------------- Intel

ARC = dict(driver="xe", bus_id="0000:03:00.0", code="8086:E20B")


def test_a_cpus_own_gpu_is_integrated_and_its_memory_unknown(tmp_path):
    plant_card(tmp_path, 1, driver="i915", bus_id="0000:00:02.0", code="8086:5917")
    plant(tmp_path, {"sys/class/drm/card1/gt_act_freq_mhz": "350\n"})
    source = Intel(str(tmp_path), "", run=no_program)
    assert source.present()
    reading = source.read()
    assert (reading.source, reading.gpus) == ("i915", (Gpu(
        0, "intel", name="Intel GPU 0x5917", bus_id="0000:00:02.0", graphics_clock_mhz=350.0,
        integrated=True),))


def test_power_and_load_are_differences_between_two_reads(tmp_path):
    clock = [1000.0]
    gts = {"tile0__gt{}__gtidle__idle_residency_ms".format(number): value
           for number, value in ((0, "5000"), (1, "9000"))}
    plant_card(tmp_path, hwmon__hwmon2__energy1_input="7000000000", hwmon__hwmon2__power1_max="190000000",
               hwmon__hwmon2__temp2_label="pkg", hwmon__hwmon2__temp2_input="52000",
               hwmon__hwmon2__temp3_label="vram", hwmon__hwmon2__temp3_input="60000",
               tile0__gt0__freq0__act_freq="2850", **dict(ARC, **gts))
    source = Intel(str(tmp_path), "", clock=lambda: clock[0])
    names = ("energy_j", "power_w", "utilization_pct", "power_limit_w", "temperature_c", "graphics_clock_mhz",
             "integrated", "memory_total_bytes")
    assert figures(source.read().gpus[0], *names) == (7000.0, None, None, 190.0, 52.0, 2850.0, False, None)
    clock[0] += 10.0
    plant_card(tmp_path, hwmon__hwmon2__energy1_input="8500000000", **dict(
        ARC, tile0__gt0__gtidle__idle_residency_ms="7500", tile0__gt1__gtidle__idle_residency_ms="19000"))
    assert figures(source.read().gpus[0], *names)[:3] == (8500.0, 150.0, 75.0)
    # The counters began again, as after the driver was loaded again.
    clock[0] += 10.0
    plant_card(tmp_path, hwmon__hwmon2__energy1_input="1000000", **dict(
        ARC, tile0__gt0__gtidle__idle_residency_ms="1", tile0__gt1__gtidle__idle_residency_ms="2"))
    assert figures(source.read().gpus[0], *names)[:3] == (1.0, None, None)


def test_where_the_card_has_no_sensors_those_of_its_chip_count(tmp_path):
    plant_card(tmp_path, hwmon__hwmon2__energy2_input="3000000", hwmon__hwmon2__power2_max="65000000", **ARC)
    assert figures(Intel(str(tmp_path), "").read().gpus[0], "energy_j", "power_limit_w") == (3.0, 65.0)


def test_deep_sleep_of_i915_counts_alike_and_one_that_is_off_tells_nothing(tmp_path):
    clock = [0.0]
    card = "sys/class/drm/card0/gt/"
    plant_card(tmp_path, driver="i915", bus_id="0000:00:02.0")
    plant(tmp_path, {card + "gt0/rc6_residency_ms": "100", card + "gt1/rc6_residency_ms": "0"})
    source = Intel(str(tmp_path), "", clock=lambda: clock[0])
    source.read()
    clock[0] = 1.0
    plant(tmp_path, {card + "gt0/rc6_residency_ms": "1100"})
    assert source.read().gpus[0].utilization_pct == 0.0
    assert source.read().gpus[0].utilization_pct is None  # no time passed


DISCOVERY = ('Device ID,Device Name,SOC UUID,PCI BDF Address,Memory Physical Size\n'
             '0,"Intel(R) Arc(TM) B580, Graphics","00000000-0000-0003-0000-0000e20b8086","0000:03:00.0",'
             '"12216.00 MiB"\n')
DUMP = ("Timestamp, DeviceId, GPU Utilization (%), GPU Power (W), GPU Frequency (MHz), "
        "GPU Core Temperature (Celsius Degree), GPU Memory Used (MiB)\n"
        "06:14:46.000,    0, 3.50, 66.10, 2400, 25.00, 239.50\n")


def xpu_smi(folder, dump):
    return program(folder, "xpu-smi", 'echo "$@" >> {}/asked\ncase $1 in\ndiscovery) cat <<\'EOT\'\n{}EOT\n;;\n'
                   'dump) cat <<\'EOT\'\n{}EOT\n;;\nesac\n'.format(folder, DISCOVERY, dump))


def test_a_card_with_memory_of_its_own_is_asked_of_xpu_smi_and_what_stands_only_once(tmp_path):
    plant_card(tmp_path, 0, driver="i915", bus_id="0000:00:02.0")
    plant_card(tmp_path, 1, **ARC)
    source = Intel(str(tmp_path), xpu_smi(tmp_path / "bin", DUMP))
    integrated, card = source.read().gpus
    assert (integrated.memory_total_bytes, integrated.name) == (None, "Intel GPU 0x744c")
    assert card == Gpu(1, "intel", "00000000-0000-0003-0000-0000e20b8086", "Intel(R) Arc(TM) B580, Graphics",
                       "0000:03:00.0", 12216 * MIB, 239 * MIB + MIB // 2, 3.5, 25.0, 66.1,
                       graphics_clock_mhz=2400.0)
    assert b9agent.is_free(card)
    source.read()
    asked = (tmp_path / "bin/asked").read_text().splitlines()
    # By the numbers of xpu-smi's help: id, name, UUID, address, memory; then load, power, clock,
    # temperature, memory in use.
    assert asked == ["discovery --dump 1,2,4,11,16"] + ["dump -d -1 -m 0,1,2,3,18 -i 1 -n 1"] * 2
    assert source.read().source == "i915+xe"


def test_without_xpu_smi_or_with_a_broken_one_memory_is_unknown_and_the_card_not_free(tmp_path):
    plant_card(tmp_path, **ARC)
    for path in (str(tmp_path / "none"), program(tmp_path / "bin", "xpu-smi", "echo Error: no Level Zero\nexit 1\n")):
        reading = Intel(str(tmp_path), path).read()
        (card,) = reading.gpus
        assert (card.memory_total_bytes, card.memory_used_bytes) == (None, None)
        assert not b9agent.is_free(card)
        assert "xpu-smi" in reading.problem


def test_a_sleeping_card_is_left_asleep(tmp_path):
    plant_card(tmp_path, power__runtime_status="suspended", hwmon__hwmon0__energy1_input="5", **ARC)
    (card,) = Intel(str(tmp_path), program(tmp_path / "bin", "xpu-smi", ""), run=no_program).read().gpus
    assert figures(card, "asleep", "energy_j", "memory_used_bytes") == (True, None, None)


def test_recorded_arc_a770(tmp_path):
    plant_tree(tmp_path, "intel/sysfs_i915_arc-a770")
    assert Intel(str(tmp_path), "").read().gpus == (Gpu(
        0, "intel", name="Intel GPU 0x56a0", bus_id="0000:03:00.0", graphics_clock_mhz=0.0),)


def test_recorded_laptop(tmp_path):
    plant_tree(tmp_path, "intel/sysfs_i915_laptop")
    plant(tmp_path, {"sys/class/drm/card1-DP-1/status": "connected\n"})
    assert Intel(str(tmp_path), "").read().gpus == (Gpu(
        0, "intel", name="Intel GPU 0x5917", bus_id="0000:00:02.0", integrated=True),)


def xpu_figures(row):
    return b9agent.read_figures(b9agent.TOOL_FIGURES, row.get)


def test_recorded_xpu_smi_csv():
    names = b9agent.parse_xpu_smi(recording("intel/xpu-smi_discovery_dump.csv"))
    assert {number: row["Device Name"] for number, row in names.items()} == {
        0: "Intel(R) Graphics [0x56c0]", 1: "Intel(R) Graphics [0x56c0]"}
    flex = b9agent.parse_xpu_smi(recording("intel/xpu-smi_dump_flex.csv"))
    assert {number: xpu_figures(row) for number, row in flex.items()} == {
        0: {"utilization_pct": 0.0, "power_w": 14.61, "graphics_clock_mhz": 0.0}}
    six = b9agent.parse_xpu_smi(recording("intel/xpu-smi_dump_pvc_x6.csv"))
    assert {number: xpu_figures(row) for number, row in six.items()} == {
        number: {"power_w": power, "graphics_clock_mhz": 1600.0}
        for number, power in enumerate((280.21, 287.58, 277.82, 281.84, 280.40, 285.54))}


def test_recorded_xpu_smi_json():
    (row,) = b9agent.parse_xpu_smi(recording("intel/xpu-smi_discovery_j.json")).values()
    assert [row[name] for name in ("device_name", "pci_bdf_address", "uuid")] == [
        "Intel(R) Graphics [0x020a]", "0000:4d:00.0", "00000000-0000-0000-0000-020a00008086"]


def test_an_old_xpu_smi_names_its_devices_in_json(tmp_path):
    plant_card(tmp_path, driver="i915", bus_id="0000:4d:00.0", code="8086:020A")
    devices = json.dumps({"device_list": [{"device_id": 0, "device_name": "Intel(R) Graphics [0x020a]",
                                           "pci_bdf_address": "0000:4d:00.0", "uuid": "0-0"}]})
    path = program(tmp_path / "bin", "xpu-smi", 'test "$2" = -j && ' + print_text(devices))
    (card,) = Intel(str(tmp_path), path).read().gpus
    assert (card.name, card.uuid, card.memory_total_bytes) == ("Intel(R) Graphics [0x020a]", "0-0", None)


@pytest.mark.parametrize("name", [
    "fdinfo_i915.txt", "fdinfo_xe.txt", "i915_arc-a770_lsgpu_card0.txt", "intel_gpu_top_J_killed-stream.txt",
    "intel_gpu_top_J_one-object.json", "intel_gpu_top_J_plex.json", "intel_gpu_top_l.txt",
    "xpu-smi_discovery_pvc_x6.txt", "xpu-smi_stats_d0.txt", "xpu-smi_v2_default_arc-b580.txt",
    "xpum_statistics_2-tile.json"])
def test_recorded_intel_text_in_another_form_names_no_gpu(name):
    assert b9agent.parse_xpu_smi(recording("intel/" + name)) == {}


# ---------------------------------------------------------------- Apple


def accelerator(io_class="AGXAcceleratorG16X", load=7, used=1 << 30, **more):
    entry = {"IOClass": io_class, "IORegistryEntryID": 4294968255, "model": "Apple M4 Pro", "gpu-core-count": 16,
             "PerformanceStatistics": {"Device Utilization %": load, "In use system memory": used,
                                       "Alloc system memory": 66160230400, "In use system memory (driver)": 0,
                                       "Device Utilization % at cur p-state": 99}}
    entry.update(more)
    return {key: value for key, value in entry.items() if value is not None}


def ioreg(*entries):
    return plistlib.dumps(list(entries)).decode()


def mac(folder, listing, limit_mb="0", memory="17179869184", displays="{}", metal=""):
    """A Mac of our own programs; returns (source, what was run)."""
    program(folder, "ioreg", print_text(listing))
    program(folder, "sysctl", "case $* in\n*iogpu*) echo iogpu.wired_limit_mb: {};;\n*memsize) echo {};;\nesac\n".format(
        limit_mb, memory))
    program(folder, "system_profiler", print_text(displays))
    ran = []

    def run(argv, limit_s):
        ran.append(os.path.basename(argv[0]))
        if argv[0] == sys.executable:
            ran[-1] = "metal"
            return CommandResult(0, metal) if metal else b9agent.run_command(argv, limit_s)
        return b9agent.run_command(argv, limit_s)

    return Apple(str(folder), run), ran


def test_apple_silicon_through_ioreg(tmp_path):
    source, ran = mac(tmp_path, ioreg(accelerator()), limit_mb="12000")
    assert source.present()
    assert source.read() == b9agent.GpuReading("ioreg", (Gpu(
        0, "apple", name="Apple M4 Pro", memory_total_bytes=12000 * MIB, memory_used_bytes=GIB, utilization_pct=7.0,
        cores=16),))
    assert ran == ["ioreg", "sysctl"]


def test_its_memory_is_what_metal_says_where_the_owner_set_nothing(tmp_path):
    source, ran = mac(tmp_path, ioreg(accelerator()), metal="12713115648\n")
    assert [source.read().gpus[0].memory_total_bytes for _ in range(2)] == [12713115648] * 2
    assert ran.count("metal") == 1


@pytest.mark.parametrize("metal", ["0\n", "x\n", "99999999999999\n", ""])
def test_and_two_thirds_of_the_machines_where_metal_says_nothing(tmp_path, metal):
    source, _ = mac(tmp_path, ioreg(accelerator()), metal=metal)  # "": no Metal on Linux, for real
    if metal or sys.platform != "darwin":
        assert source.read().gpus[0].memory_total_bytes == 17179869184 * 2 // 3


def test_the_question_to_metal_is_a_program():
    compile(b9agent.METAL_LIMIT, "metal", "exec")


def test_name_and_cores_that_ioreg_lacks_come_from_system_profiler_once(tmp_path):
    displays = json.dumps({"SPDisplaysDataType": [{"sppci_model": "Studio Display"}, {
        "sppci_model": "Apple M2 Max", "sppci_cores": "30"}]})
    bare = accelerator(model=None, **{"gpu-core-count": None})
    source, ran = mac(tmp_path, ioreg(bare), limit_mb="1", displays=displays)
    assert [figures(source.read().gpus[0], "name", "cores") for _ in range(2)] == [("Apple M2 Max", 30)] * 2
    assert ran.count("system_profiler") == 1


@pytest.mark.parametrize("entry", [
    accelerator("AMDRadeonX4000_AMDBaffinGraphicsAccelerator"), accelerator("IntelAccelerator"),
    accelerator("AppleParavirtGPU", PerformanceStatistics=None), accelerator(PerformanceStatistics=None),
    accelerator("IOAccelerator", PerformanceStatistics={"vramFreeBytes": 15728640}),
    accelerator(PerformanceStatistics="none"), accelerator(None)])
def test_what_is_no_gpu_of_apple_silicon_is_left_out(entry):
    assert b9agent.parse_ioreg(ioreg(entry)) == []


def test_an_accelerator_that_comes_twice_counts_once_with_its_higher_load(tmp_path):
    source, _ = mac(tmp_path, ioreg(accelerator(load=6), accelerator(load=11), accelerator(load=0)), limit_mb="1")
    assert [gpu.utilization_pct for gpu in source.read().gpus] == [11.0]


def test_a_model_may_be_bytes_and_statistics_may_be_missing(tmp_path):
    source, _ = mac(tmp_path, ioreg(accelerator(model=b"Apple M1\0", PerformanceStatistics={})), limit_mb="1")
    assert figures(source.read().gpus[0], "name", "utilization_pct", "memory_used_bytes") == (
        "Apple M1", None, None)


@pytest.mark.parametrize("body, expected", [
    ("", ()), ("echo ioreg: error\n", None), ("kill -9 $$\n", None), ("echo '<?xml version=\"1.0\"?><plist>'\n", None)])
def test_a_mac_without_accelerator_has_no_gpu_and_a_failure_is_unknown(tmp_path, body, expected):
    assert Apple(program(tmp_path / "bin", "ioreg", body)).read().gpus == expected


def from_text(text):
    """ioreg's text form as its plist form, for the keys that are read."""
    entries = []
    for block in re.split(r"\+-o ", text):
        statistics = re.search(r'"PerformanceStatistics" = \{(.*?)\}', block)
        pairs = re.findall(r'"([^"]+)"=([0-9]+)', statistics.group(1)) if statistics else []
        io_class = re.search(r'"IOClass" = "([^"]+)"', block)
        model, cores = (re.search(pattern, block) for pattern in (r'"model" = "([^"]+)"', r'"gpu-core-count" = ([0-9]+)'))
        if io_class or statistics:
            entries.append(accelerator(
                io_class.group(1) if io_class else "AGXAcceleratorG16G", IORegistryEntryID=len(entries),
                PerformanceStatistics={name: int(value) for name, value in pairs} if statistics else None,
                model=model and model.group(1), **{"gpu-core-count": cores and int(cores.group(1))}))
    return ioreg(*entries)


@pytest.mark.parametrize("name, expected", [
    ("ioreg_IOAccelerator_m4pro_busy.txt", [(100.0, 10977263616, "Apple M4 Pro", 16)]),
    ("ioreg_IOAccelerator_m4_idle_line.txt", [(0.0, 763723776, None, None)]),
    ("ioreg_l_m1_agx_excerpt.txt", [(0.0, 6373376, "Apple M1", 8)]),
    ("ioreg_l_m1_fake-accelerator_excerpt.txt", []), ("ioreg_IOAccelerator_intel-amd_dual.txt", [])])
def test_recorded_ioreg_text_reads_as_the_eye_reads_it(name, expected):
    found = b9agent.parse_ioreg(from_text(recording("macos/" + name)))
    assert [(*(b9agent.read_figures(b9agent.TOOL_FIGURES, entry["PerformanceStatistics"].get).get(field)
               for field in ("utilization_pct", "memory_used_bytes")), entry.get("model"),
             entry.get("gpu-core-count")) for entry in found] == expected
    assert not b9agent.parse_ioreg(recording("macos/" + name))  # text is not what we ask for


def test_recorded_ioreg_of_an_m5_pro(tmp_path):
    text = recording("macos/ioreg_a_IOAccelerator_m5pro_trimmed.plist")
    source, ran = mac(tmp_path, "ioreg: a warning\n" + text, memory="51539607552", metal="40200896512\n")
    assert source.read().gpus == (Gpu(
        0, "apple", name="Apple M5 Pro", memory_total_bytes=40200896512, memory_used_bytes=1046872064,
        utilization_pct=12.0, cores=16),)
    assert "system_profiler" not in ran


def test_recorded_limit_of_the_gpus_memory(tmp_path):
    source, _ = mac(tmp_path, ioreg(accelerator()))
    program(tmp_path, "sysctl", print_text(recording("macos/sysctl_iogpu.txt")))
    assert source.read().gpus[0].memory_total_bytes == 36864 * MIB


def test_recorded_displays():
    assert b9agent.parse_displays(recording("macos/system_profiler_SPDisplays_m2max.json")) == ("Apple M2 Max", 30.0)
    for name in ("system_profiler_SPDisplays_m4pro", "system_profiler_gt730", "system_profiler_hardware_intel",
                 "system_profiler_m1_11.0", "system_profiler_mojave-dual-gpu"):
        assert b9agent.parse_displays(recording("macos/{}.txt".format(name))) == ("", None)


@pytest.mark.parametrize("name", [
    "powermetrics_gpu_m4pro.plist", "powermetrics_gpu_m4pro_multi.plist", "powermetrics_m1_gpu-busy.txt",
    "powermetrics_m1_idle.txt", "powermetrics_m4max.txt", "powermetrics_mock_codecarbon.txt"])
def test_recorded_text_of_another_program_names_no_gpu(name):
    assert not b9agent.parse_ioreg(recording("macos/" + name))
    assert b9agent.parse_displays(recording("macos/" + name)) == ("", None)


# ---------------------------------------------------------------- together


def test_a_machine_with_gpus_of_three_vendors(tmp_path):
    plant_card(tmp_path, 0, driver="i915", bus_id="0000:00:02.0", code="8086:5917")
    plant_card(tmp_path, 1, bus_id="0000:03:00.0", **DISCRETE)
    plant_card(tmp_path, 2, driver="nvidia", bus_id="0000:01:00.0")
    path = program(tmp_path / "bin", "nvidia-smi",
                   nvidia_smi_script("0, GPU-0, NVIDIA H100, 81559, 0, 0, 30\n").partition("\n")[2])
    sample = GpuSampler([NvidiaSmi(path), Amd(str(tmp_path), path), Intel(str(tmp_path), path)]).sample(30)
    assert [(gpu.vendor, gpu.index, gpu.bus_id) for gpu in sample.gpus] == [
        ("nvidia", 0, ""), ("amd", 0, "0000:03:00.0"), ("intel", 0, "0000:00:02.0")]
    assert (sample.vendor, sample.known, sample.problems) == ("nvidia", True, [])
    without = GpuSampler([Amd(str(tmp_path), path), Intel(str(tmp_path), path)]).sample(30)
    assert without.vendor == "amd"
    assert [gpu.vendor for gpu in b9agent.offered_gpus(without.gpus, "amd", None, None)] == ["amd"]


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.path.exists("/sys/class/drm/card0")
                    or os.path.exists("/sys/class/drm/card1") or os.path.exists("/dev/kfd"),
                    reason="this machine has a GPU")
def test_a_machine_without_gpus_is_found_to_have_none_in_no_time():
    for source in (Amd(), Intel(), Apple()):
        spent = []
        for _ in range(20):
            start = time.perf_counter()
            assert not source.present()
            spent.append(time.perf_counter() - start)
        assert min(spent) < 0.0005


def test_each_platform_has_its_sources():
    vendors = [source.vendor for source in b9agent.make_gpu_sources()]
    assert vendors == (["apple"] if sys.platform == "darwin" else ["nvidia", "amd", "intel"])


# ---------------------------------------------------------------- hostile text


def in_range(gpu):
    assert gpu.utilization_pct is None or 0 <= gpu.utilization_pct <= 100
    assert gpu.power_w is None or 0 <= gpu.power_w <= 1e4
    for size in (gpu.memory_total_bytes, gpu.memory_used_bytes):
        assert size is None or isinstance(size, int) and 0 <= size <= 1 << 50
    assert b9agent.is_free(gpu) in (True, False)
    json.dumps(gpu)


def parse_everything(text):
    for gpus in (b9agent.parse_rocm_smi(text)[0], b9agent.parse_amd_smi(text, ROCM_SMI)[0],
                 b9agent.parse_amd_smi(AMD_SMI_STATIC, text)[0]):
        for gpu in gpus:
            in_range(gpu)
    for row in b9agent.parse_xpu_smi(text).values():
        xpu_figures(row)
        b9agent.first_text(row.get, "Device Name", "device_name")
    source = Apple("", no_program)
    source._displays = b9agent.parse_displays(text)
    for index, entry in enumerate(b9agent.parse_ioreg(text) or ()):
        in_range(source._make(index, entry, None))
    b9agent.parse_dpm_clock(text)
    b9agent.amd_uuid(text)


def read_everything(text):
    """Every file of a card says the same."""
    def read(path):
        return ("DRIVER=amdgpu\n" if path.endswith("uevent") else "") + text, False
    card = b9agent.Card("/nowhere", "card0", read)
    in_range(Amd("/nowhere", "", no_program, read)._read_card(0, card))
    in_range(Intel("/nowhere", "", no_program)._read_card(0, card, {}))


SAMPLES = [ROCM_SMI, AMD_SMI_STATIC, DISCOVERY, DUMP, ioreg(accelerator(), accelerator(model=b"Apple M1\0")),
           '{"SPDisplaysDataType": [{"sppci_model": "Apple M2 Max", "sppci_cores": "30"}]}',
           '{"device_list": [{"device_id": 0, "device_name": "x", "pci_bdf_address": "0000:4d:00.0"}]}',
           "0: 800Mhz *\n1: 19Mhz\n", "25753026560\n"]
SPLICES = ["", ",", '"', "{", "[", "}", "]", "null", "NaN", "-1", "1e999", "9" * 5000, "\n", "N/A", "\0", "²",
           "true", "{}", "[]", "[" * 2000, '"value":', "<dict>", "</dict>", "<integer>", "<data>", "&", "\ud800",
           "<date>9</date>", "0x", "\x1b["]


def test_mutated_text_ends_in_figures_or_none_and_never_in_an_exception():
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    splice = strategies.sampled_from(SPLICES) | strategies.text(max_size=9)
    cuts = strategies.lists(strategies.tuples(strategies.floats(0, 1), strategies.integers(0, 12), splice),
                            max_size=6)

    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @hypothesis.given(strategies.sampled_from(SAMPLES), cuts)
    def check(text, mutations):
        for at_share, length, new in mutations:
            at = int(at_share * len(text))
            text = text[:at] + new + text[at + length:]
        parse_everything(text)
        read_everything(text)

    check()


@pytest.mark.parametrize("depth", [100, 900, 940, 960, 980, 990, 1000, 100000])
def test_values_nested_deeper_than_the_stack_are_no_figures(depth):
    deep = "[" * depth + "]" * depth
    parse_everything('{"card0": {"Device ID": %s, "Unique ID": %s, "GFX Version": %s, "GPU use (%%)": %s}}' % (
        (deep,) * 4))
    parse_everything('{"gpu_data": [{"gpu": 0, "asic": {"device_id": %s, "asic_serial": %s}}]}' % (deep, deep))
    parse_everything('{"device_list": [{"device_id": %s}]}' % deep)
    nested = "<array>" * depth + "</array>" * depth
    entry = "<key>PerformanceStatistics</key><dict/><key>IORegistryEntryID</key>{0}<key>model</key>{0}".format(nested)
    for io_class in (nested, "<string>AGXAcceleratorG</string>"):
        parse_everything('<?xml version="1.0"?><plist version="1.0"><array><dict><key>IOClass</key>{}{}'
                         '</dict></array></plist>'.format(io_class, entry))


def test_json_of_any_shape_ends_in_figures_or_none():
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    keys = strategies.sampled_from(
        ["card0", "card1", "system", "gpu_data", "gpu", "asic", "bus", "bdf", "usage", "gfx_activity", "value", "mem_usage",
         "used_vram", "Unique ID", "GPU use (%)", "Device ID", "PCI Bus", "GFX Version", "Driver version",
         "device_list", "device_id", "device_name", "SPDisplaysDataType", "sppci_model", "driver", "version"])
    leaves = (strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()
              | strategies.text(max_size=5) | strategies.sampled_from(["N/A", "0x1", "Apple M1", "12"]))
    shapes = strategies.recursive(leaves, lambda inner: strategies.lists(inner, max_size=3)
                                  | strategies.dictionaries(keys, inner, max_size=5), max_leaves=12)

    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @hypothesis.given(strategies.dictionaries(keys, shapes, max_size=5) | strategies.lists(
        strategies.dictionaries(keys, shapes, max_size=5), max_size=3))
    def check(value):
        parse_everything(json.dumps(value))

    check()


@pytest.mark.parametrize("name", [
    "amd/rocm-smi_rx6700xt_rocm612.json", "amd/amd-smi_static_rx6600xt.json",
    "amd/amd-smi_metric_mi300x_rocm721_trimmed.json", "intel/xpu-smi_dump_pvc_x6.csv",
    "intel/xpu-smi_discovery_j.json", "macos/ioreg_a_IOAccelerator_m5pro_trimmed.plist",
    "macos/system_profiler_SPDisplays_m2max.json"])
def test_recordings_that_are_cut_off_anywhere_end_in_figures_or_none(name):
    text = recording(name)
    for end in range(0, len(text), max(1, len(text) // 60)):
        parse_everything(text[:end])
        parse_everything(text[end:])
