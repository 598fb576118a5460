"""Section 5: what the machine has, and how busy it is.  In real cgroups: test_host_root.py."""
import fnmatch
import itertools
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time

import pytest

import b9agent
from b9agent import Capacity, CommandResult, CpuReading, LinuxHost, MacHost

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIXTURES = pathlib.Path(os.environ.get("B9AGENT_FIXTURES", str(ROOT.parent / "shared/fixtures")))
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def recording(name):
    """Text of a recording from a real machine."""
    path = FIXTURES / name
    if not path.exists():
        pytest.skip("no recordings at {}: set B9AGENT_FIXTURES".format(FIXTURES))
    return path.read_text(encoding="utf-8", errors="replace")


def plant(root, files):
    """Write {path: text} below a folder."""
    for path, text in files.items():
        place = pathlib.Path(str(root)) / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("part, whole, expected", [
    (1, 4, 25.0), (0, 4, 0.0), (9, 4, 100.0), (-1, 4, 0.0), (1, 0, None), (None, 4, None),
    (1, None, None), (1, -4, None)])
def test_a_share_is_clamped_and_unknown_stays_unknown(part, whole, expected):
    assert b9agent.share_pct(part, whole) == expected


@pytest.mark.parametrize("word, expected", [
    ("42", 42), (" 42\n", 42), ("-1", -1), ("", None), ("max", None), ("1.5", None),
    ("18446744073709551615", 18446744073709551615), ("9" * 30, None), ("²", None)])
def test_a_number_that_is_none_is_unknown(word, expected):
    assert b9agent.parse_int(word) == expected


def test_cpu_percent_is_busy_time_over_all_time_between_two_readings():
    old = CpuReading("cpu", (100, 10), (1000, 50))
    new = CpuReading("cpu", (120, 15), (1060, 65))
    assert b9agent.busy_pct(old, new) == 25.0


def test_cpu_percent_is_unknown_without_time_or_between_different_sources():
    reading = CpuReading("cpu", (100,), (1000,))
    assert b9agent.busy_pct(reading, reading) is None
    assert b9agent.busy_pct(None, reading) is None
    assert b9agent.busy_pct(reading, None) is None
    assert b9agent.busy_pct(reading, CpuReading("cpu0", (110,), (1010,))) is None


def test_an_idle_counter_that_steps_back_counts_as_no_time():
    old, new = CpuReading("cpu", (100,), (1000, 50)), CpuReading("cpu", (110,), (1030, 20))
    assert b9agent.busy_pct(old, new) == 25.0


def test_counters_of_32_bits_may_start_again_from_zero():
    old, new = CpuReading("mach", (5,), ((1 << 32) - 10,)), CpuReading("mach", (15,), (20,))
    assert b9agent.busy_pct(old, new, 1 << 32) == 25.0


# ---------------------------------------------------------------- /proc/stat

STAT = ("cpu  100 1 20 800 30 4 5 6 50 1\n"
        "cpu0 60 1 10 400 10 1 2 3 50 1\n"
        "cpu1 40 0 10 400 20 3 3 3 0 0\n"
        "intr 5 0 0\nctxt 7\n")


def test_steal_is_busy_iowait_is_idle_and_guest_is_not_counted_twice():
    reading = b9agent.parse_cpu_ticks(STAT)
    assert reading.busy == (100, 1, 20, 4, 5, 6)
    assert reading.idle == (800, 30)


def test_only_the_cpus_of_our_cpuset_are_summed():
    assert b9agent.parse_cpu_ticks(STAT, (1,)).busy == (40, 0, 10, 3, 3, 3)
    assert b9agent.parse_cpu_ticks(STAT, (1,)).idle == (400, 20)
    assert b9agent.parse_cpu_ticks(STAT, (0, 1)) == b9agent.parse_cpu_ticks(STAT)


@pytest.mark.parametrize("text", [
    "", "cpu\n", "cpu  1 2 3\n", "cpu  1 2 x 4 5 6 7 8\n", "intr 1\n"])
def test_a_stat_file_without_its_cpu_line_is_unknown(text):
    assert b9agent.parse_cpu_ticks(text) is None


# name, user nice system irq softirq steal, idle iowait: read off the first line of each file
STAT_RECORDINGS = [
    ("stat_2cpu.txt", (6002, 152, 8398, 0, 1174, 0), (3444436, 448)),
    ("stat_72cpu_kvm-host.txt", (254764110, 11797, 179539978, 0, 8670797, 0),
     (8153136239, 4130255)),
    ("stat_8cpu_guest.txt", (301854, 612, 111922, 2, 3944, 0), (8979004, 3552)),
    ("stat_gb10_20cpu.txt", (672820, 297, 376534, 0, 2601, 0), (940231212, 159168)),
    ("stat_old_7-columns.txt", (259246, 7001, 60190, 772, 0, 0), (34250993, 137517)),
    ("stat_power9_smt4.txt", (241101, 0, 46438, 0, 109, 0), (138766751, 406604)),
    ("stat_steal.txt", (23644, 6695, 4764, 0, 473, 5892), (134931750, 22115)),
]


@pytest.mark.parametrize("name, busy, idle", STAT_RECORDINGS)
def test_recorded_stat_files_read_as_the_eye_reads_them(name, busy, idle):
    assert b9agent.parse_cpu_ticks(recording("linux/" + name)) == CpuReading("cpu", busy, idle)


def test_one_cpu_of_a_recorded_kvm_host():
    reading = b9agent.parse_cpu_ticks(recording("linux/stat_72cpu_kvm-host.txt"), (15,))
    assert reading.busy == (9112690, 506, 8181050, 0, 267989, 0)
    assert reading.idle == (340034706, 90154)


# ---------------------------------------------------------------- /proc/meminfo

MEMINFO = ("MemTotal:        1000 kB\nMemFree:          200 kB\nMemAvailable:     600 kB\n"
           "Cached:           300 kB\nActive(file):     150 kB\nInactive(file):   100 kB\n"
           "SReclaimable:      40 kB\nHugePages_Total:       7\n"
           "SwapTotal:         500 kB\nSwapFree:          100 kB\n")


def test_used_memory_is_what_is_not_available():
    assert b9agent.memory_use(b9agent.parse_meminfo(MEMINFO)) == (1000 * KIB, 400 * KIB)


def test_counts_of_pages_are_not_taken_for_sizes():
    assert "HugePages_Total" not in b9agent.parse_meminfo(MEMINFO)


def test_a_size_may_touch_the_colon():
    assert b9agent.parse_meminfo("MemTotal:1000 kB\n") == {"MemTotal": 1000 * KIB}


@pytest.mark.parametrize("line", ["", "MemAvailable:       0 kB"])
def test_without_available_memory_file_cache_and_slab_count_as_available(line):
    text = MEMINFO.replace("MemAvailable:     600 kB", line)
    assert b9agent.memory_use(b9agent.parse_meminfo(text)) == (1000 * KIB, 510 * KIB)


def test_without_available_memory_and_file_cache_the_page_cache_counts():
    text = "MemTotal: 1000 kB\nMemFree: 200 kB\nCached: 300 kB\n"
    assert b9agent.memory_use(b9agent.parse_meminfo(text)) == (1000 * KIB, 500 * KIB)


def test_more_available_than_there_is_means_free_memory():
    text = MEMINFO.replace("     600 kB", "    6000 kB")
    assert b9agent.memory_use(b9agent.parse_meminfo(text)) == (1000 * KIB, 800 * KIB)


def test_no_meminfo_is_unknown_memory():
    assert b9agent.memory_use(b9agent.parse_meminfo("")) == (None, None)
    assert b9agent.memory_use({"MemTotal": 5}) == (5, None)


# name, MemTotal, MemAvailable in KiB.  The two without the field: free + file cache + slab.
MEMINFO_RECORDINGS = [
    ("core-i5", 16115528, 11225936), ("facter_short", 4036680, 3659324),
    ("gb10", 125508468, 121737812), ("gb10_trimmed", 127600744, 52933648),
    ("jc", 3997272, 3386876), ("modern", 4036680, 3659324), ("pcp2", 131831052, 118425544),
    ("pcp7", 8141728, 7202848), ("power9_gpu-numa", 358162944, 346254144),
    ("with-old-table", 254472, 210156),
    ("missing_available", 4036680, 3547792 + 46912 + 255252 + 29072),
    ("node_exporter", 3742148, 225472 + 213412 + 145676 + 44772),
]


@pytest.mark.parametrize("name, total, available", MEMINFO_RECORDINGS)
def test_recorded_meminfo_files_read_as_the_eye_reads_them(name, total, available):
    fields = b9agent.parse_meminfo(recording("linux/meminfo_{}.txt".format(name)))
    assert b9agent.memory_use(fields) == (total * KIB, (total - available) * KIB)


def test_swap_is_known_where_there_is_none():
    assert b9agent.swap_use(b9agent.parse_meminfo(MEMINFO)) == (500 * KIB, 400 * KIB)
    assert b9agent.swap_use({"SwapTotal": 0, "SwapFree": 0}) == (0, 0)
    assert b9agent.swap_use({"SwapTotal": 5}) == (5, None)
    assert b9agent.swap_use({}) == (None, None)
    assert b9agent.swap_use({"SwapTotal": 1, "SwapFree": 9}) == (1, 0)


@pytest.mark.parametrize("name, total, free", [  # SwapTotal, SwapFree in KiB
    ("core-i5", 8065020, 8065020), ("facter_short", 2097148, 2097148),
    ("gb10", 16777212, 16541600), ("jc", 3996668, 3996668), ("node_exporter", 4194300, 3155360),
    ("pcp2", 4194300, 4194300), ("pcp7", 8140796, 8140796), ("power9_gpu-numa", 0, 0),
    ("with-old-table", 0, 0)])
def test_swap_of_recorded_meminfo_files(name, total, free):
    fields = b9agent.parse_meminfo(recording("linux/meminfo_{}.txt".format(name)))
    assert b9agent.swap_use(fields) == (total * KIB, (total - free) * KIB)


def test_a_recorded_meminfo_without_swap_lines_is_unknown_swap():
    fields = b9agent.parse_meminfo(recording("linux/meminfo_gb10_trimmed.txt"))
    assert b9agent.swap_use(fields) == (None, None)


# ---------------------------------------------------------------- /proc/diskstats, /proc/uptime

DISKSTATS = ("   8 0 sda 10 0 4 1 10 0 6 1 0 1 1\n   8 1 sda1 10 0 4 1 10 0 6 1 0 1 1\n"
             " 253 0 dm-0 10 0 4 1 10 0 6 1 0 1 1\n   7 0 loop0 9 0 9 1 9 0 9 1 0 1 1\n"
             " 259 0 nvme0n1 1 0 100 1 1 0 50 1 0 1 1 0 0 0 0 1 1\n 230 0 zd0 9 0 9 1 9 0 9 1 0 1 1\n")
DISKS = ("sda", "dm-0", "loop0", "nvme0n1", "zram0", "zd0")


def test_whole_disks_are_summed_and_what_lies_upon_them_is_not():
    assert b9agent.parse_diskstats(DISKSTATS, DISKS) == (104 * 512, 56 * 512)
    assert b9agent.parse_diskstats(DISKSTATS, ("nvme0n1",)) == (100 * 512, 50 * 512)


def test_a_counter_below_zero_is_no_counter():
    assert b9agent.parse_diskstats("8 0 sda 1 0 -4 1 1 0 6 1 0 1 1\n", DISKS) == (None, None)
    assert b9agent.parse_net_dev(NET_HEAD + net_row("eth0", -1, 10)) == (None, None)


def test_without_a_real_disk_its_traffic_is_unknown():
    assert b9agent.parse_diskstats(DISKSTATS, ("dm-0", "loop0")) == (None, None)
    assert b9agent.parse_diskstats(DISKSTATS, ()) == (None, None)
    assert b9agent.parse_diskstats("", DISKS) == (None, None)


def test_a_recorded_diskstats_file_reads_as_the_eye_reads_it():
    """Lines of 14, 18 and 20 columns; sectors read and written, disk by disk."""
    text = recording("linux/diskstats_procfs.txt")
    disks = {"sda": (1003346126, 505697032), "mmcblk0": (1560, 0), "fd0": (16, 0),
             "vda": (32670882, 213637440), "nvme0n1": (4643973, 39451633),
             "sdb": (9657779, 1972905), "sdc": (579164, 180500)}
    for name, (read, written) in disks.items():
        assert b9agent.parse_diskstats(text, [name]) == (read * 512, written * 512)
    listed = list(disks) + ["sr0", "ram0", "loop7", "dm-0", "dm-5"]
    assert b9agent.parse_diskstats(text, listed) == (
        sum(read for read, _ in disks.values()) * 512,
        sum(written for _, written in disks.values()) * 512)


@pytest.mark.parametrize("text, uptime_s", [
    ("46901.13 46856.66\n", 46901.13), ("5 6", 5.0), ("", None), ("x", None), ("-1.0 2", None),
    ("nan 1", None), ("9" * 400, None), ("inf", None)])
def test_uptime_is_the_first_number(text, uptime_s):
    assert b9agent.parse_uptime(text) == uptime_s


def test_a_recorded_uptime_file_reads_as_the_eye_reads_it():
    assert b9agent.parse_uptime(recording("linux/uptime.txt")) == 46901.13


# ---------------------------------------------------------------- /etc/os-release, /proc/cpuinfo


@pytest.mark.parametrize("text, name", [
    ('NAME="A"\nPRETTY_NAME="A 1 (b)"\n', "A 1 (b)"), ("PRETTY_NAME='A 1'", "A 1"),
    ("PRETTY_NAME=A\n", "A"), ('# PRETTY_NAME="no"\nNAME=B\n', "B"), ("", ""), ("ID=x\n", ""),
    ('PRETTY_NAME="old"\nPRETTY_NAME="new"\n', "new"), ('PRETTY_NAME="', '"'),
    ('PRETTY_NAME="a \\"b\\" \\$c"', 'a "b" $c'), ('DGX_PRETTY_NAME="no"', "")])
def test_the_name_of_a_system_is_unquoted(text, name):
    assert b9agent.parse_os_release(text) == name


@pytest.mark.parametrize("name, expected", [
    ("arch", "Arch Linux"), ("centos-7.9", "CentOS Linux 7 (Core)"),
    ("debian-11.2", "Debian GNU/Linux 11 (bullseye)"), ("debian", "Debian GNU/Linux 10 (buster)"),
    ("fedora-35", "Fedora Linux 35 (Thirty Five)"), ("opensuse", "openSUSE Leap 15.1"),
    ("oracle", "Oracle Linux Server 7.2"),
    ("rhel_comment", "Red Hat Enterprise Linux 8.6 (Ootpa)"),
    ("sles", "SUSE Linux Enterprise Server 15"), ("ubuntu1604", "Ubuntu 18.04.1 LTS"),
    ("ubuntu2204", "Ubuntu 22.04.5 LTS")])
def test_recorded_os_release_files_read_as_the_eye_reads_them(name, expected):
    assert b9agent.parse_os_release(recording("linux/os-release_{}.txt".format(name))) == expected


def test_the_release_file_of_a_dgx_names_no_operating_system():
    assert b9agent.parse_os_release(recording("linux/dgx-release_spark.txt")) == ""


X86 = "processor : {}\nmodel name : Some  CPU @ 2\nphysical id : {}\ncore id : {}\n\n"
ARM = "processor : {}\nCPU implementer : {}\nCPU part : {}\n\n"


def test_threads_of_one_core_are_one_core_and_sockets_do_not_share_them():
    text = "".join(X86.format(number, number // 4, number // 2 % 2) for number in range(8))
    assert b9agent.parse_cpuinfo(text) == ("Some CPU @ 2", 4, 8)


def test_a_cpuinfo_that_says_nothing_of_cores_leaves_them_unknown():
    assert b9agent.parse_cpuinfo("processor: 0\ncore id: 0\n") == ("", None, 1)
    assert b9agent.parse_cpuinfo("") == ("", None, None)


def test_an_arm_processor_is_named_by_its_part_and_an_unknown_one_not_at_all():
    text = ARM.format(0, "0x41", "0xd4f") + ARM.format(1, "0x41", "0xd4f")
    assert b9agent.parse_cpuinfo(text) == ("Neoverse-V2", None, 2)
    assert b9agent.parse_cpuinfo(ARM.format(0, "0x99", "0xd4f")) == ("", None, 1)
    # NVIDIA's kernels for Jetson add a line that says less.
    tegra = "model name : ARMv8 Processor rev 1 (v8l)\n" + ARM.format(0, "0x41", "0xd42")
    assert b9agent.parse_cpuinfo(tegra)[0] == "Cortex-A78AE"


@pytest.mark.parametrize("name, model, cores, threads", [
    ("128-core_arm", "TSV110", None, 128),
    ("8thread_laptop", "Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", 4, 8),
    ("epyc7451_first8", "AMD EPYC 7451 24-Core Processor", 8, 8),
    ("gb10", "Cortex-A725 + Cortex-X925", None, 20),
    ("grace_last-core", "Neoverse-V2", None, 1), ("graviton2", "Neoverse-N1", None, 2),
    ("hybrid_20t", "13th Gen Intel(R) Core(TM) i7-1370P", 14, 20),
    ("i7-1165g7", "11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz", 4, 8),
    ("phone_4-kinds", "", None, 8), ("power9", "POWER9", None, 176),
    ("rpi3", "Raspberry Pi 3 Model B Rev 1.2", None, 4), ("s390x", "IBM/S390 8561", None, 4),
    ("single_vm", "Intel(R) Core(TM) i5-2500S CPU @ 2.70GHz", None, 1),
    ("vm_2cpu", "Intel(R) Core(TM) i5-3317U CPU @ 1.70GHz", 2, 2),
    ("x86_kvm_guest", "QEMU Virtual CPU version 2.5+", 4, 4)])
def test_recorded_cpuinfo_files_read_as_the_eye_reads_them(name, model, cores, threads):
    text = recording("linux/cpuinfo_{}.txt".format(name))
    assert b9agent.parse_cpuinfo(text) == (model, cores, threads)


# ---------------------------------------------------------------- containers


@pytest.mark.parametrize("name, kind", [
    ("hybrid", ""), ("v1_docker_dgx", "docker"), ("v1_docker_facter", "docker"), ("v1_hpc", ""),
    ("v1_subdir_automaxprocs", "docker"), ("v2_docker_dgx", "docker"),
    ("v2_k8s_relative", "kubernetes"), ("v2_session", "")])
def test_recorded_cgroups_name_their_container(name, kind):
    assert b9agent.find_container(recording("linux/cgroup_{}.txt".format(name)), "") == kind


@pytest.mark.parametrize("name, kind", [
    ("lxc", "lxc"), ("node_exporter", ""), ("cgroup_hybrid_automaxprocs", ""),
    ("cgroup_v1_automaxprocs", "")])
def test_recorded_mounts_name_their_container(name, kind):
    text = recording("linux/mountinfo_{}.txt".format(name))
    assert b9agent.find_container("0::/\n", text) == kind


@pytest.mark.parametrize("root, mount, kind", [
    ("/var/lib/docker/containers/0a1b/hosts", "/etc/hosts", "docker"),
    ("/var/lib/kubelet/pods/0a1b/etc-hosts", "/etc/hosts", "kubernetes"),
    ("/var/lib/containers/storage/overlay-containers/0a/userdata/hosts", "/etc/hosts", "podman"),
    ("/var/lib/lxc/box/rootfs", "/", "lxc"),
    # What the host of such containers has mounted for them.
    ("/", "/var/lib/docker/overlay2/0a1b/merged", ""), ("/", "/var/lib/lxcfs", ""),
    ("/", "/var/lib/kubelet/pods/0a1b/volumes/token", ""), ("/", "/var/lib/lxc/box/rootfs", "")])
def test_what_is_mounted_over_our_own_files_names_the_container(root, mount, kind):
    line = "9 1 8:1 {} {} rw,relatime - ext4 /dev/sda1 rw\n".format(root, mount)
    assert b9agent.find_container("0::/init.scope\n", line) == kind


# ---------------------------------------------------------------- /proc/net/dev

NET_HEAD = ("Inter-|   Receive                          |  Transmit\n"
            " face |bytes packets errs drop fifo frame compressed multicast|bytes packets\n")


def net_row(name, received, sent):
    return "{}:{} 1 0 0 0 0 0 0 {} 1 0 0 0 0 0 0\n".format(name, received, sent)


def test_real_interfaces_are_summed():
    text = NET_HEAD + net_row("  eth0", 1000, 10) + net_row("wlp3s0", " 200", 2)
    assert b9agent.parse_net_dev(text) == (1200, 12)


@pytest.mark.parametrize("name", [
    "lo", "veth12ab", "br-0123", "br0", "docker0", "cni0", "flannel.1", "cali42", "virbr0",
    "tailscale0", "wg0", "tun0", "bond0", "eth0.7", "ifb0", "lxdbr0"])
def test_traffic_that_passes_a_real_interface_again_is_not_counted(name):
    text = NET_HEAD + net_row("eth0", 1000, 10) + net_row(name, 500, 5)
    assert b9agent.parse_net_dev(text) == (1000, 10)


def test_without_a_real_interface_the_traffic_is_unknown():
    assert b9agent.parse_net_dev(NET_HEAD + net_row("lo", 5, 5)) == (None, None)
    assert b9agent.parse_net_dev("") == (None, None)


@pytest.mark.parametrize("name, expected", [
    ("net_dev_jc.txt", (60600053, 44256546)), ("net_dev_procfs.txt", (874354587, 563352563))])
def test_recorded_net_dev_files_read_as_the_eye_reads_them(name, expected):
    assert b9agent.parse_net_dev(recording("linux/" + name)) == expected


# ---------------------------------------------------------------- cgroups

MOUNTS_V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNTS_V1 = ("33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
             "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n")


def find(controller, cgroup, mountinfo):
    """(version, mount, path) or None."""
    found = b9agent.find_cgroup(controller, cgroup, mountinfo)
    return found and (1 if found.files is b9agent.CGROUP_V1 else 2, found.mount, found.path)


def test_a_v2_path_is_joined_to_the_mount_point():
    assert find("cpu", "0::/a/b\n", MOUNTS_V2) == (2, "/sys/fs/cgroup", "/a/b")


def test_the_levels_of_a_path_run_from_the_root_to_the_leaf():
    group = b9agent.find_cgroup("cpu", "0::/a/b\n", MOUNTS_V2)
    assert group.levels() == ["", "/a", "/a/b"]
    assert group._replace(path="").levels() == [""]


def test_a_controller_that_v1_lists_is_governed_by_v1():
    text = "4:memory:/m\n2:cpu,cpuacct:/c\n0::/u\n"
    assert find("memory", text, MOUNTS_V1 + MOUNTS_V2) == (1, "/sys/fs/cgroup/memory", "/m")
    assert find("cpu", text, MOUNTS_V1 + MOUNTS_V2) == (1, "/sys/fs/cgroup/cpu,cpuacct", "/c")
    assert find("cpu", "4:memory:/m\n0::/u\n", MOUNTS_V1 + MOUNTS_V2) == (2, "/sys/fs/cgroup", "/u")


def test_the_root_of_a_mount_is_taken_off_the_path():
    mount = "7 5 0:6 /docker /mnt/cpu rw shared:7 - cgroup cgroup rw,cpu,cpuacct\n"
    assert find("cpu", "2:cpu:/docker/large\n", mount) == (1, "/mnt/cpu", "/large")
    assert find("cpu", "2:cpu:/docker\n", mount) == (1, "/mnt/cpu", "")
    assert find("cpu", "2:cpu:/dockerish/x\n", mount) == (1, "/mnt/cpu", "")


def test_a_path_from_another_namespace_leads_to_the_mount_point():
    assert find("cpu", "0::/../../pod/x\n", MOUNTS_V2) == (2, "/sys/fs/cgroup", "")
    assert find("cpu", "0::/\n", MOUNTS_V2) == (2, "/sys/fs/cgroup", "")


def test_a_mount_point_may_hold_a_blank():
    mount = "30 23 0:26 / /mnt/c\\040g rw - cgroup2 none rw\n"
    assert find("cpu", "0::/a\n", mount) == (2, "/mnt/c g", "/a")


def test_a_blank_of_unicode_in_a_name_makes_no_fields():
    mount = "30 23 0:26 / /home/x\u2003-\u2003cgroup2 rw - fuse x rw\n"
    assert find("cpu", "0::/a\n", mount) is None


def test_without_cgroups_there_is_no_cgroup():
    assert find("cpu", "", "") is None
    assert find("cpu", "0::/a\n", "") is None
    assert find("cpu", "", MOUNTS_V2) is None


# cgroup recording, controller, path
PATH_RECORDINGS = [
    ("hybrid", "memory", "/user.slice/user-0.slice/session-1.scope"),
    ("hybrid", "cpu", "/user.slice"), ("hybrid", "", "/user.slice/user-0.slice/session-1.scope"),
    ("hybrid", "cpuset", "/"), ("v1_docker_dgx", "cpu", None), ("v1_docker_dgx", "", "/"),
    ("v1_docker_facter", "hugetlb",
     "/docker/ee6e3c05422f1273c9b41a26f2b4ec64bdb4480d63a1ad9741e05cafc1651b90"),
    ("v1_docker_facter", "", None), ("v1_hpc", "cpuacct", "/"), ("v1_hpc", "cpuset", "/jjh"),
    ("v1_subdir_automaxprocs", "memory", "/docker/large"),
    ("v2_docker_dgx", "", "/system.slice/docker-834e93fa6923e1daed6ff96f9f0bab62f7008ec64c7af1e6727"
                          "e8d5cf9a3b8ea.scope"),
    ("v2_session", "", "/user.slice/user-61469.slice/session-3210.scope"),
]


@pytest.mark.parametrize("name, controller, path", PATH_RECORDINGS)
def test_recorded_cgroup_files_read_as_the_eye_reads_them(name, controller, path):
    paths = b9agent.parse_cgroup_paths(recording("linux/cgroup_{}.txt".format(name)))
    assert paths.get(controller) == path


# cgroup recording, mountinfo recording, controller, (version, mount, path)
FIND_RECORDINGS = [
    ("v1_subdir_automaxprocs", "cgroup_v1_automaxprocs", "cpu",
     (1, "/sys/fs/cgroup/cpu,cpuacct", "")),
    ("v1_subdir_automaxprocs", "cgroup_v1_automaxprocs", "memory",
     (1, "/sys/fs/cgroup/memory", "/large")),
    ("hybrid", "cgroup_hybrid_automaxprocs", "cpu",
     (1, "/sys/fs/cgroup/cpu,cpuacct", "/user.slice")),
    ("v2_session", "cgroup_hybrid_automaxprocs", "cpu",
     (2, "/sys/fs/cgroup/unified", "/user.slice/user-61469.slice/session-3210.scope")),
    ("v1_hpc", "node_exporter", "cpuacct", (1, "/sys/fs/cgroup/cpu,cpuacct", "")),
    ("v1_hpc", "node_exporter", "memory", None),  # no memory hierarchy is mounted there
    ("v2_k8s_relative", "lxc", "memory", (2, "/sys/fs/cgroup", "")),
]


@pytest.mark.parametrize("cgroup, mountinfo, controller, expected", FIND_RECORDINGS)
def test_recorded_cgroups_are_found_where_they_are_mounted(cgroup, mountinfo, controller, expected):
    assert find(controller, recording("linux/cgroup_{}.txt".format(cgroup)),
                recording("linux/mountinfo_{}.txt".format(mountinfo))) == expected


@pytest.mark.parametrize("text, millicores", [
    ("250000 100000\n", 2500), ("50000 100000", 500), ("500000", 5000), ("max 100000", None),
    ("-1\n 100000\n", None), ("", None), ("0 100000", None), ("1 100000", 1), ("100 0", None)])
def test_a_cpu_limit_is_quota_over_period(text, millicores):
    assert b9agent.parse_cpu_limit(text) == millicores


@pytest.mark.parametrize("name, millicores", [("set", 2500), ("unset", None), ("only-max", 5000)])
def test_recorded_cpu_limits_read_as_the_eye_reads_them(name, millicores):
    text = recording("linux/cgroup_v2_cpu.max_{}.txt".format(name))
    assert b9agent.parse_cpu_limit(text) == millicores


@pytest.mark.parametrize("text, limit", [
    ("max\n", None), ("134217728\n", 134217728), ("9223372036854771712\n", None),
    ("18446744073709551615\n", None), ("", None), ("0", 0)])
def test_no_memory_limit_has_several_spellings(text, limit):
    assert b9agent.parse_memory_limit(text) == limit


def test_cpu_usage_is_nanoseconds_in_both_versions():
    assert b9agent.parse_cpu_usage_ns("usage_usec 1500\nuser_usec 1000\n") == 1500000
    assert b9agent.parse_cpu_usage_ns("1500000\n") == 1500000
    assert b9agent.parse_cpu_usage_ns("") is None


@pytest.mark.parametrize("name, total_inactive", [("host", 19150966784), ("limited", 0)])
def test_recorded_memory_stat_files_read_as_the_eye_reads_them(name, total_inactive):
    fields = b9agent.parse_keyed(recording("linux/cgroup_v1_memory.stat_{}.txt".format(name)))
    assert fields["total_inactive_file"] == total_inactive


# ---------------------------------------------------------------- a Linux tree

MACHINE = {"proc/stat": STAT, "proc/meminfo": MEMINFO.replace(" 1000 kB", " 1048576 kB"),
           "proc/net/dev": NET_HEAD + net_row("eth0", 1000, 10), "proc/uptime": "123.4 5.6\n",
           "proc/diskstats": DISKSTATS, "sys/block/sda/size": "9\n", "sys/block/dm-0/size": "9\n"}


def linux(root, cpus=(0, 1), clock_s=None):
    """Without a clock of the test's own, a minute passes between any two looks at it."""
    return LinuxHost(str(root), lambda: cpus, clock_s or itertools.count(0, 60).__next__)


def in_v2(root, limits, cgroup="0::/a/b\n"):
    files = dict(MACHINE, **{"proc/self/cgroup": cgroup, "proc/self/mountinfo": MOUNTS_V2})
    files.update({"sys/fs/cgroup/" + path: text for path, text in limits.items()})
    plant(root, files)


def test_without_limits_the_capacity_is_the_machine(tmp_path):
    plant(tmp_path, MACHINE)
    assert linux(tmp_path).capacity() == Capacity(2000, GIB)


def test_affinity_limits_the_capacity(tmp_path):
    plant(tmp_path, MACHINE)
    assert linux(tmp_path, cpus=(1,)).capacity().cpu_millicores == 1000


def test_unknown_cpus_and_memory_are_unknown_and_not_zero(tmp_path):
    assert linux(tmp_path, cpus=()).capacity() == Capacity(None, None)


def test_the_smallest_limit_on_the_way_to_the_root_counts(tmp_path):
    in_v2(tmp_path, {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "150000 100000\n",
                     "a/memory.max": "max\n", "a/b/memory.max": "4194304\n"})
    assert linux(tmp_path).capacity() == Capacity(500, 4 * MIB)


def test_of_equal_limits_the_outer_one_counts_because_its_siblings_use_it_too(tmp_path):
    in_v2(tmp_path, {"a/memory.max": str(8 * MIB), "a/memory.current": str(6 * MIB),
                     "a/memory.stat": "inactive_file 0\n", "a/b/memory.max": str(8 * MIB),
                     "a/b/memory.current": str(1 * MIB), "a/b/memory.stat": "inactive_file 0\n"})
    assert linux(tmp_path).sample("/").memory_used_bytes == 6 * MIB


def test_limits_above_the_machine_are_none(tmp_path):
    in_v2(tmp_path, {"a/b/cpu.max": "800000 100000\n", "a/b/memory.max": str(2 * GIB)})
    assert linux(tmp_path).capacity() == Capacity(2000, GIB)
    assert linux(tmp_path).sample("/").memory_total_bytes == GIB


def test_limits_are_read_anew_every_time(tmp_path):
    in_v2(tmp_path, {"a/b/cpu.max": "max 100000\n"})
    host = linux(tmp_path)
    plant(tmp_path, {"sys/fs/cgroup/a/b/cpu.max": "100000 100000\n"})
    assert host.capacity().cpu_millicores == 1000


def test_a_limit_of_half_a_v1_pair_is_no_limit(tmp_path):
    plant(tmp_path, dict(MACHINE, **{
        "proc/self/cgroup": "2:cpu,cpuacct:/\n", "proc/self/mountinfo": MOUNTS_V1,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}))
    assert linux(tmp_path).capacity().cpu_millicores == 2000


def test_cpu_percent_of_a_machine_without_limits(tmp_path):
    plant(tmp_path, MACHINE)
    host = linux(tmp_path)
    plant(tmp_path, {"proc/stat": "cpu  115 1 25 860 50 4 5 6 65 1\ncpu0 1 1 1 1\ncpu1 1 1 1 1\n"})
    assert host.sample("/").cpu_pct == 20.0
    assert host.sample("/").cpu_pct is None  # a minute in which the counters stood still


def test_the_first_sample_soon_after_the_start_is_the_mean_since_boot(tmp_path):
    plant(tmp_path, MACHINE)
    host = linux(tmp_path, clock_s=lambda: 5.0)
    plant(tmp_path, {"proc/stat": STAT.replace("cpu  100", "cpu  101")})
    assert host.sample("/").cpu_pct == pytest.approx(100 * 137 / 967)


def test_what_is_asked_twice_at_once_gets_the_same_percent_and_rates(tmp_path):
    plant(tmp_path, MACHINE)
    now = [0.0]
    host = linux(tmp_path, clock_s=lambda: now[0])
    host.sample("/")
    now[0] = 10.0
    after = {"proc/stat": "cpu  115 1 25 860 50 4 5 6 65 1\n",
             "proc/net/dev": NET_HEAD + net_row("eth0", 3000, 40),
             "proc/diskstats": DISKSTATS.replace("sda 10 0 4 1 10 0 6", "sda 10 0 24 1 10 0 46")}
    plant(tmp_path, after)
    first = host.sample("/")
    assert first[8:14] == (24 * 512, 46 * 512, 200.0, 3.0, 1024.0, 2048.0)
    assert first.cpu_pct == 20.0
    now[0] = 10.4  # too soon for figures of its own, whatever the counters say
    plant(tmp_path, {"proc/stat": "cpu  999 1 25 860 50 4 5 6 65 1\n",
                     "proc/net/dev": NET_HEAD + net_row("eth0", 3900, 50)})
    again = host.sample("/")
    assert (again.cpu_pct, again[10:14]) == (20.0, first[10:14])
    assert again.net_received_bytes == 3900
    now[0] = 11.0  # and then from the last window's end, not from that look
    later = host.sample("/")
    assert (later.cpu_pct, later.net_received_bytes_per_s) == (100.0, 900.0)


def test_a_counter_that_went_back_has_no_rate_and_the_first_sample_has_none(tmp_path):
    plant(tmp_path, MACHINE)
    host = linux(tmp_path)
    assert host.sample("/")[10:14] == (None,) * 4
    plant(tmp_path, {"proc/net/dev": NET_HEAD + net_row("eth0", 900, 70)})
    assert host.sample("/")[10:14] == (None, 1.0, 0.0, 0.0)
    (tmp_path / "proc/net/dev").unlink()
    assert host.sample("/")[10:12] == (None, None)


def test_swap_of_a_machine_and_under_a_limit(tmp_path):
    plant(tmp_path, MACHINE)
    assert linux(tmp_path).sample("/")[14:16] == (500 * KIB, 400 * KIB)
    in_v2(tmp_path, {"a/b/memory.max": str(8 * MIB), "a/b/memory.swap.max": "max\n"})
    assert linux(tmp_path).sample("/")[14:16] == (500 * KIB, 400 * KIB)
    plant(tmp_path, {"sys/fs/cgroup/a/b/memory.swap.max": "102400\n",
                     "sys/fs/cgroup/a/b/memory.swap.current": "4096\n"})
    assert linux(tmp_path).sample("/")[14:16] == (102400, 4096)
    plant(tmp_path, {"sys/fs/cgroup/a/b/memory.swap.max": "2048\n"})
    assert linux(tmp_path).sample("/")[14:16] == (2048, 2048)  # lowered while it was in use
    plant(tmp_path, {"sys/fs/cgroup/a/b/memory.swap.max": str(GIB)})
    assert linux(tmp_path).sample("/").swap_total_bytes == 500 * KIB


def test_facts_of_a_machine(tmp_path, monkeypatch):
    for name in ("KUBERNETES_SERVICE_HOST", "container"):
        monkeypatch.delenv(name, raising=False)
    plant(tmp_path, {"etc/os-release": 'PRETTY_NAME="Some Linux 5"\n', "proc/version": "Linux\n",
                     "proc/cpuinfo": ARM.format(0, "0x41", "0xd4f")})
    facts = linux(tmp_path).facts()
    assert facts == ("Some Linux 5", os.uname().release, os.uname().machine, "Neoverse-V2", None,
                     1, "", False)
    # ARM does not say which threads share a core; the kernel says that none do.
    plant(tmp_path, {"sys/devices/system/cpu/smt/active": "0\n"})
    assert linux(tmp_path).facts().cpu_cores == 1
    plant(tmp_path, {"sys/devices/system/cpu/smt/active": "1\n"})
    assert linux(tmp_path).facts().cpu_cores is None


def test_facts_of_a_machine_that_says_nothing_are_empty(tmp_path, monkeypatch):
    for name in ("KUBERNETES_SERVICE_HOST", "container"):
        monkeypatch.delenv(name, raising=False)
    facts = linux(tmp_path).facts()
    assert facts == ("", os.uname().release, os.uname().machine, "", None, None, "", False)


def test_a_cpuinfo_of_many_cores_is_read_to_its_end(tmp_path):
    block = X86.format("{0}", 0, "{0}") + "flags : " + "sse " * 500 + "\n\n"
    plant(tmp_path, {"proc/cpuinfo": "".join(block.format(number) for number in range(1024))})
    assert linux(tmp_path).facts()[4:6] == (1024, 1024)


@pytest.mark.parametrize("path, text, kind", [
    (".dockerenv", "", "docker"), ("run/.containerenv", "", "podman"),
    ("run/systemd/container", "systemd-nspawn\n", "systemd-nspawn"),
    ("proc/1/cgroup", "0::/kubepods.slice/x\n", "kubernetes"), ("proc/1/cgroup", "0::/\n", ""),
    ("proc/self/mountinfo", "9 1 8:1 /lxc/a/rootfs / rw - ext4 d rw\n", "lxc")])
def test_a_container_is_known_by_what_its_manager_leaves(tmp_path, monkeypatch, path, text, kind):
    for name in ("KUBERNETES_SERVICE_HOST", "container"):
        monkeypatch.delenv(name, raising=False)
    plant(tmp_path, {path: text})
    assert linux(tmp_path).facts().container == kind
    monkeypatch.setenv("container", "oci")
    plant(tmp_path, {".dockerenv": ""})
    assert linux(tmp_path).facts().container == (
        "systemd-nspawn" if kind == "systemd-nspawn" else "oci")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert linux(tmp_path).facts().container == "kubernetes"


@pytest.mark.parametrize("name, wsl", [("gb10", False), ("jc", False), ("wsl2", True)])
def test_recorded_kernels_say_whether_windows_is_around_them(tmp_path, name, wsl):
    plant(tmp_path, {"proc/version": recording("linux/version_{}.txt".format(name))})
    assert linux(tmp_path).facts().wsl is wsl


def test_wsl_is_known_by_its_kernel_or_by_the_door_to_windows(tmp_path):
    plant(tmp_path, {"proc/version": "Linux version 4.4.0-19041-Microsoft (a@b) #1\n"})
    assert linux(tmp_path).facts().wsl
    plant(tmp_path, {"proc/version": "Linux version 6.6.1 (builder@microsoft.com) #1\n"})
    assert not linux(tmp_path).facts().wsl
    plant(tmp_path, {"proc/sys/fs/binfmt_misc/WSLInterop": "enabled\n"})
    assert linux(tmp_path).facts().wsl


def test_cpu_percent_under_a_limit_is_usage_over_what_was_granted(tmp_path):
    in_v2(tmp_path, {"a/cpu.max": "50000 100000\n", "a/cpu.stat": "usage_usec 1000000\n",
                     "a/b/cpu.stat": "usage_usec 7\n"})
    now = [100.0]
    host = linux(tmp_path, clock_s=lambda: now[0])
    now[0] += 60.0
    plant(tmp_path, {"sys/fs/cgroup/a/cpu.stat": "usage_usec 10000000\n"})
    assert host.sample("/").cpu_pct == 30.0  # 9 s of 60 s x 0.5 cores
    now[0] += 1.0
    plant(tmp_path, {"sys/fs/cgroup/a/cpu.stat": "usage_usec 19000000\n"})
    assert host.sample("/").cpu_pct == 100.0
    assert host.sample("/").cpu_pct == 100.0  # asked again at once


def test_cpu_percent_is_unknown_once_when_the_limit_changes(tmp_path):
    in_v2(tmp_path, {"a/cpu.max": "50000 100000\n", "a/cpu.stat": "usage_usec 1000000\n"})
    now = [100.0]
    host = linux(tmp_path, clock_s=lambda: now[0])
    now[0] += 10.0
    plant(tmp_path, {"sys/fs/cgroup/a/cpu.max": "100000 100000\n"})
    assert host.sample("/").cpu_pct is None
    now[0] += 10.0
    plant(tmp_path, {"sys/fs/cgroup/a/cpu.stat": "usage_usec 6000000\n"})
    assert host.sample("/").cpu_pct == 50.0


def test_v1_may_count_cpu_time_in_another_hierarchy(tmp_path):
    plant(tmp_path, dict(MACHINE, **{
        "proc/self/cgroup": "2:cpuacct:/x\n1:cpu:/x\n",
        "proc/self/mountinfo": "1 0 0:1 / /cg/cpu rw - cgroup cgroup rw,cpu\n"
                               "2 0 0:2 / /cg/acct rw - cgroup cgroup rw,cpuacct\n",
        "cg/cpu/x/cpu.cfs_quota_us": "100000\n", "cg/cpu/x/cpu.cfs_period_us": "100000\n",
        "cg/acct/x/cpuacct.usage": "0\n"}))
    now = [0.0]
    host = linux(tmp_path, clock_s=lambda: now[0])
    now[0] = 4.0
    plant(tmp_path, {"cg/acct/x/cpuacct.usage": "1000000000\n"})
    assert host.sample("/").cpu_pct == 25.0


def test_memory_under_a_limit_is_the_working_set(tmp_path):
    in_v2(tmp_path, {"a/b/memory.max": str(8 * MIB), "a/b/memory.current": str(6 * MIB),
                     "a/b/memory.stat": "anon 5\ninactive_file {}\n".format(4 * MIB)})
    sample = linux(tmp_path).sample("/")
    assert (sample.memory_total_bytes, sample.memory_used_bytes) == (8 * MIB, 2 * MIB)
    assert sample.memory_pct == 25.0


def test_memory_under_a_v1_limit_counts_the_whole_subtree(tmp_path):
    stat = "inactive_file 0\ntotal_inactive_file {}\n".format(MIB)
    plant(tmp_path, dict(MACHINE, **{
        "proc/self/cgroup": "4:memory:/pod\n", "proc/self/mountinfo": MOUNTS_V1,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": str(8 * MIB),
        "sys/fs/cgroup/memory/pod/memory.usage_in_bytes": str(3 * MIB),
        "sys/fs/cgroup/memory/pod/memory.stat": stat}))
    assert linux(tmp_path).sample("/").memory_pct == 25.0


def test_memory_under_a_limit_without_its_counters_is_unknown(tmp_path):
    in_v2(tmp_path, {"a/b/memory.max": str(8 * MIB), "a/b/memory.current": str(6 * MIB)})
    sample = linux(tmp_path).sample("/")
    assert (sample.memory_total_bytes, sample.memory_used_bytes) == (8 * MIB, None)
    assert sample.memory_pct is None


@pytest.mark.parametrize("broken, unknown", [
    ("proc/stat", {"cpu_pct"}),
    ("proc/meminfo", {"memory_pct", "memory_total_bytes", "memory_used_bytes", "swap_total_bytes",
                      "swap_used_bytes"}),
    ("proc/net/dev", {"net_received_bytes", "net_sent_bytes", "net_received_bytes_per_s",
                      "net_sent_bytes_per_s"}),
    ("proc/diskstats", {"disk_read_bytes", "disk_written_bytes", "disk_read_bytes_per_s",
                        "disk_written_bytes_per_s"}),
    ("proc/uptime", {"uptime_s"}),
    ("no/disk", {"disk_total_bytes", "disk_free_bytes"})])
@pytest.mark.parametrize("content", [None, b"", b"\x00\xff" * 999], ids=["gone", "empty", "bytes"])
def test_a_source_that_fails_costs_its_own_values_only(tmp_path, broken, unknown, content):
    plant(tmp_path, MACHINE)
    host = linux(tmp_path)
    host.sample("/")
    plant(tmp_path, {"proc/stat": STAT.replace("cpu  100", "cpu  150")})
    place = tmp_path / broken
    if place.exists():
        place.unlink()
        if content is not None:
            place.write_bytes(content)
    sample = host.sample(str(tmp_path / "no/disk") if broken == "no/disk" else str(tmp_path))
    assert {name for name, value in sample._asdict().items() if value is None} == unknown


# tree, cgroup, mountinfo: neither machine had limits
@pytest.mark.parametrize("tree, cgroup, mountinfo", [
    ("tree_cgroup_v2_laptop", "0::/user.slice/user-1000.slice\n", MOUNTS_V2),
    ("tree_cgroup_v1_docker", "4:memory:/system.slice\n2:cpu,cpuacct:/system.slice\n", MOUNTS_V1)])
def test_recorded_trees_without_limits_give_the_machine(tmp_path, tree, cgroup, mountinfo):
    recording("linux/meminfo_jc.txt")  # skips where there are no recordings
    shutil.copytree(str(FIXTURES / "linux" / tree / "sys"), str(tmp_path / "sys"))
    for folder, _, _ in os.walk(str(tmp_path)):
        os.chmod(folder, 0o755)
    plant(tmp_path, dict(MACHINE, **{"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo}))
    assert linux(tmp_path).capacity() == Capacity(2000, GIB)
    if "v2" in tree:
        (tmp_path / "sys/fs/cgroup/user.slice/memory.max").unlink()
        plant(tmp_path, {"sys/fs/cgroup/user.slice/memory.max": "9000000000\n",
                         "proc/meminfo": "MemTotal: 16000000 kB\nMemFree: 1 kB\n"})
        assert linux(tmp_path).sample("/").memory_total_bytes == 9000000000


# ---------------------------------------------------------------- macOS

VM_STAT = ("Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
           "Pages free:                 10.\nPages active:              176.\n"
           "Pages wired down:          100.\nPages purgeable:             4.\n"
           "\"Translation faults\":  1165564.\nFile-backed pages:         300.\n"
           "Anonymous pages:            54.\nPages stored in compressor: 999.\n"
           "Pages occupied by compressor: 50.\n")
NETSTAT = ("Name       Mtu   Network       Address            Ipkts Ierrs     Ibytes    Opkts Oerrs"
           "     Obytes  Coll\n"
           "lo0        16384 <Link#1>                        5     0  900   5     0  900     0\n"
           "en0        1500  <Link#12>   12:f3:e1:e8:ca:f2 150487     0 1000 85608     0 10  0\n"
           "en0        1500  192.168.1   192.168.1.7       150487     - 1000 85608     - 10  -\n"
           "en5*       1500  <Link#13>                     1     0 200 2     0 2 0\n"
           "utun0      1380  <Link#16>                     0     0 70  64    0 10701 0\n")


def test_memory_of_a_mac_is_wired_compressed_and_anonymous_without_purgeable():
    assert b9agent.parse_vm_stat(VM_STAT) == (100 + 50 + 54 - 4) * 16384


@pytest.mark.parametrize("gone", ["page size of", "Pages wired down", "Anonymous pages"])
def test_a_vm_stat_without_a_figure_is_unknown(gone):
    assert b9agent.parse_vm_stat(VM_STAT.replace(gone, "?")) is None


@pytest.mark.parametrize("name, used", [  # (wired + compressor + anonymous - purgeable) x page
    ("vm_stat_16k.txt", (251285 + 389264 + 247760 - 2) * 16384),
    ("vm_stat_16k_b.txt", (131951 + 417096 + 296433 - 1703) * 16384),
    ("vm_stat_4k.txt", (986842 + 737949 + 3735118 - 207521) * 4096)])
def test_recorded_vm_stat_outputs_read_as_the_eye_reads_them(name, used):
    assert b9agent.parse_vm_stat(recording("macos/" + name)) == used


def test_only_the_link_rows_of_real_interfaces_are_summed():
    assert b9agent.parse_netstat(NETSTAT) == (1200, 12)


@pytest.mark.parametrize("name, expected", [
    ("netstat_ib_b.txt", (75981699, 30717122)),
    ("netstat_ib_dash-bytes.txt", (5998695733, 991638350)),
    ("netstat_ib_trimmed.txt", (15193744936, 4130130705)),
    ("netstat_i_10.14.txt", (None, None))])  # without -b there are no bytes
def test_recorded_netstat_outputs_read_as_the_eye_reads_them(name, expected):
    assert b9agent.parse_netstat(recording("macos/" + name)) == expected


IOREG = ("+-o IOBlockStorageDriver  <class IOBlockStorageDriver, id 0x100000a28, registered>\n"
         "    {\n      \"Statistics\" = {\"Operations (Write)\"=9,\"Bytes (Read)\"=4096,"
         "\"Errors (Read)\"=0,\"Bytes (Write)\"=512}\n    }\n\n"
         "+-o IOBlockStorageDriver  <class IOBlockStorageDriver, id 0x100000a29, registered>\n"
         "    {\n      \"Statistics\" = {\"Bytes (Write)\"=88,\"Bytes (Read)\"=1000}\n    }\n")


def test_the_traffic_of_every_disk_driver_of_a_mac_is_summed():
    assert b9agent.parse_ioreg_disks(IOREG) == (5096, 600)
    assert b9agent.parse_ioreg_disks("") == (None, None)
    assert b9agent.parse_ioreg_disks(IOREG.replace("Bytes (Read)", "?")) == (None, None)
    assert b9agent.parse_ioreg_disks(IOREG.replace("4096", "9" * 21)) == (None, None)


@pytest.mark.parametrize("text, expected", [
    ("total = 2048.00M  used = 0.50M  free = 2047.50M", (2 * GIB, MIB // 2)),
    ("total = 0.00M  used = 0.00M  free = 0.00M", (0, 0)), ("", (None, None)),
    ("total = 12.00M", (12 * MIB, None)), ("total = xM  used = 1M", (None, None))])
def test_swap_of_a_mac_is_megabytes_with_hundredths(text, expected):
    assert b9agent.parse_swapusage(text) == expected


@pytest.mark.parametrize("name, total, used", [  # in hundredths of a MiB
    ("swapusage_en.txt", 1228800, 1077294), ("swapusage_de.txt", 102400, 8031)])
def test_recorded_swap_of_macs_reads_as_the_eye_reads_it(name, total, used):
    assert b9agent.parse_swapusage(recording("macos/" + name)) == (total * MIB // 100,
                                                                   used * MIB // 100)


def sysctls(*names):
    """{name: value and newline} of `sysctl` recordings."""
    rows = [line.partition(": ") for name in names
            for line in recording("macos/sysctl_{}.txt".format(name)).splitlines()]
    return {key: value + "\n" for key, _, value in rows}


class FakeMac:
    """Answers as the programs of a Mac do; `answers` maps the last word of a command."""

    def __init__(self, **broken):
        self.calls = []
        self.answers = dict({
            "hw.logicalcpu": "14\n", "hw.memsize": "68719476736\n", "hw.physicalcpu": "14\n",
            "vm.swapusage": "total = 2048.00M  used = 80.50M  free = 1967.50M  (encrypted)\n",
            "kern.boottime": "{ sec = 1592836479, usec = 918881 } Mon Jun 22 07:34:39 2020\n",
            "kern.osproductversion": "15.1\n", "machdep.cpu.brand_string": "Apple M4 Pro\n",
            "vm_stat": VM_STAT, "-ibn": NETSTAT, "IOBlockStorageDriver": IOREG}, **broken)

    def run(self, argv, limit_s):
        self.calls.append(argv)
        text = self.answers.get(os.path.basename(argv[-1]))
        return CommandResult(1, "") if text is None else CommandResult(0, text)


def mach(*rows):
    readings = iter([CpuReading("mach", busy, idle) for busy, idle in rows])
    return lambda: next(readings, None)


def test_a_mac_is_measured_with_its_programs():
    mac = FakeMac()
    host = MacHost(mac.run, mach(((0, 0, 0), (0,)), ((10, 10, 5), (75,)), ((11, 10, 5), (76,))),
                   itertools.count(0, 10).__next__)
    sample = host.sample("/")
    assert host.capacity() == Capacity(14000, 64 * GIB)
    assert sample.cpu_pct == 25.0
    assert (sample.memory_total_bytes, sample.memory_used_bytes) == (64 * GIB, 200 * 16384)
    assert (sample.net_received_bytes, sample.net_sent_bytes) == (1200, 12)
    assert (sample.disk_read_bytes, sample.disk_written_bytes) == (5096, 600)
    assert (sample.swap_total_bytes, sample.swap_used_bytes) == (2 * GIB, 80 * MIB + MIB // 2)
    # Without -d 1 a driver that lies below another one would be printed, and counted, twice.
    assert ("/usr/sbin/ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOBlockStorageDriver") in mac.calls
    assert abs(time.time() - sample.uptime_s - 1592836479) < 60
    mac.answers["IOBlockStorageDriver"] = IOREG.replace("=1000", "=2000")
    sample = host.sample("/")
    assert (sample.cpu_pct, sample.disk_read_bytes_per_s) == (50.0, 100.0)


def test_facts_of_a_mac():
    assert MacHost(FakeMac().run, mach()).facts() == (
        "macOS 15.1", os.uname().release, os.uname().machine, "Apple M4 Pro", 14, 14, "", False)
    silent = MacHost(lambda argv, limit_s: CommandResult(None, "", "late"), mach()).facts()
    assert silent[0] == "macOS" and silent[3:] == ("", None, None, "", False)


@pytest.mark.parametrize("names, expected", [
    (("a_intel_10.14",), ("macOS 10.14.6", "Intel(R) Core(TM) i5-8279U CPU @ 2.40GHz", 4, 8)),
    (("hw_m1", "machdep_m1"), ("macOS", "Apple M1", 8, 8)), (("hw_m2",), ("macOS", "", 8, 8)),
    (("hw_m3max",), ("macOS", "", 16, 16)), (("hw_m4pro",), ("macOS", "", 14, 14)),
    (("cpu_m1pro",), ("macOS", "Apple M1 Pro", 10, 10)),
    (("perflevels_m6",), ("macOS", "", 12, 12)),
    (("macmini_10.6",), ("macOS", "Intel(R) Core(TM)2 Duo CPU P7550 @ 2.26GHz", None, None))])
def test_facts_of_recorded_macs(names, expected):
    values = sysctls(*names)
    mac = FakeMac()
    mac.answers = values
    facts = MacHost(mac.run, mach()).facts()
    assert (facts.os_name, facts.cpu_model, facts.cpu_cores, facts.cpu_threads) == expected


def test_swap_and_boot_time_of_a_recorded_mac():
    values = sysctls("a_intel_10.14")
    assert b9agent.parse_boottime(values["kern.boottime"]) == 1592836479
    assert b9agent.parse_swapusage(values["vm.swapusage"]) == (3072 * MIB, 2513 * MIB + MIB // 2)


@pytest.mark.parametrize("text", ["", "{ sec = x }", "usec = 5", "{ sec = " + "9" * 99 + ", }"])
def test_a_boot_time_that_is_none_is_unknown(text):
    assert b9agent.parse_boottime(text) is None


def test_what_never_changes_is_asked_of_a_mac_once():
    mac = FakeMac()
    host = MacHost(mac.run, mach())
    for _ in range(3):
        host.sample("/")
    asked = [argv[-1] for argv in mac.calls]
    assert [asked.count(name) for name in ("hw.logicalcpu", "hw.memsize", "kern.boottime")] == [1] * 3


def test_a_mac_that_does_not_answer_is_asked_again():
    mac = FakeMac(**{"hw.memsize": None})
    host = MacHost(mac.run, mach())
    assert host.capacity() == Capacity(14000, None)
    mac.answers["hw.memsize"] = "68719476736\n"
    assert host.capacity() == Capacity(14000, 64 * GIB)


def test_no_program_of_a_mac_runs_longer_than_two_seconds():
    limits = []
    host = MacHost(lambda argv, limit_s: limits.append(limit_s) or CommandResult(None, "", "late"),
                   mach())
    assert host.sample("/").memory_pct is None
    assert limits and max(limits) <= 2.0


def test_a_sysctl_recording_holds_the_names_that_a_mac_is_asked_for():
    for name, cores, size in (("m1", 8, 16 * GIB), ("m2", 8, 24 * GIB), ("m3max", 16, 128 * GIB),
                              ("m4pro", 14, 64 * GIB)):
        values = sysctls("hw_" + name)
        mac = FakeMac(**{key: values[key] for key in ("hw.logicalcpu", "hw.memsize")})
        assert MacHost(mac.run, mach()).capacity() == Capacity(cores * 1000, size)


class FakeMachLibrary:
    """host_statistics() with the argument order of <mach/mach_host.h>."""

    def __init__(self, ticks, code=0):
        self.ports = 0

        def mach_host_self():
            self.ports += 1
            return 4711

        def host_statistics(host, flavor, info, count):
            if (host.value, flavor, count._obj.value) != (4711, 3, 4):
                return 4
            info[:] = ticks
            return code

        self.mach_host_self, self.host_statistics = mach_host_self, host_statistics


def test_mach_ticks_are_user_system_idle_nice_and_the_host_port_is_asked_for_once():
    library = FakeMachLibrary((1, 2, 3, 4))
    ticks = b9agent.MachTicks(library)
    assert ticks.read() == ticks.read() == CpuReading("mach", (1, 2, 4), (3,))
    assert library.ports == 1


def test_mach_ticks_that_fail_are_unknown():
    assert b9agent.MachTicks(FakeMachLibrary((1, 2, 3, 4), code=5)).read() is None
    assert b9agent.MachTicks(object()).read() is None
    if sys.platform != "darwin":
        assert b9agent.MachTicks().read() is None


# ---------------------------------------------------------------- what every host promises


class HostContract:
    """Inherited by a test of each host."""

    def make(self, tmp_path):
        raise NotImplementedError

    def test_a_sample_holds_percentages_in_range_and_counts_that_are_not_negative(self, tmp_path):
        host = self.make(tmp_path)
        for _ in range(2):
            sample = host.sample(str(tmp_path))
            for name, value in sample._asdict().items():
                if value is not None:
                    assert isinstance(value, int if name.endswith("_bytes") else float), name
                    assert 0 <= value <= (100 if name.endswith("_pct") else 1 << 63)

    def test_facts_are_texts_and_counts(self, tmp_path):
        for name, value in self.make(tmp_path).facts()._asdict().items():
            if name in ("cpu_cores", "cpu_threads"):
                assert value is None or value > 0
            else:
                assert isinstance(value, bool if name == "wsl" else str)

    def test_what_is_used_or_free_fits_into_the_total(self, tmp_path):
        sample = self.make(tmp_path).sample(str(tmp_path))
        if sample.memory_used_bytes is not None:
            assert sample.memory_used_bytes <= sample.memory_total_bytes
        if sample.disk_total_bytes is not None:
            assert sample.disk_free_bytes <= sample.disk_total_bytes
        if sample.swap_used_bytes is not None:
            assert sample.swap_used_bytes <= sample.swap_total_bytes

    def test_the_capacity_is_positive_or_unknown(self, tmp_path):
        assert all(value is None or value > 0 for value in self.make(tmp_path).capacity())

    def test_a_disk_that_is_not_there_is_unknown(self, tmp_path):
        sample = self.make(tmp_path).sample(str(tmp_path / "not there"))
        assert (sample.disk_total_bytes, sample.disk_free_bytes) == (None, None)


class TestLinuxTree(HostContract):
    def make(self, tmp_path):
        plant(tmp_path, MACHINE)
        return linux(tmp_path)


class TestEmptyTree(HostContract):
    def make(self, tmp_path):
        return linux(tmp_path)


class TestFakeMac(HostContract):
    def make(self, tmp_path):
        return MacHost(FakeMac().run, mach(((0,), (0,)), ((1,), (1,)), ((2,), (5,))))


class TestSilentMac(HostContract):
    def make(self, tmp_path):
        return MacHost(lambda argv, limit_s: CommandResult(None, "", "no such program"), mach())


class TestThisMachine(HostContract):
    def make(self, tmp_path):
        return b9agent.make_host()


class TestAnotherPlatform(HostContract):
    def make(self, tmp_path):
        return b9agent.Host()

    def test_every_value_but_the_load_is_unknown(self, tmp_path):
        host = self.make(tmp_path)
        known = {name for name, value in host.sample("/")._asdict().items() if value is not None}
        assert known == {"load_1m", "load_5m", "load_15m"}
        assert set(host.capacity()) == {None} and host.facts() == b9agent.HostFacts()


def test_the_platform_chooses_the_host():
    expected = {"Linux": "linux", "Darwin": "macos"}.get(platform.system(), "unknown")
    assert b9agent.make_host().name == expected


# ---------------------------------------------------------------- oracles

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@on_linux
def test_cpu_capacity_is_the_affinity_unless_a_cgroup_limits_it():
    host = b9agent.make_host()
    affinity = len(os.sched_getaffinity(0)) * 1000
    limited = host._cpu_limit().level is not None
    assert host.capacity().cpu_millicores == affinity or (
        limited and host.capacity().cpu_millicores < affinity)


@on_linux
def test_memory_agrees_with_free():
    if not shutil.which("free"):
        pytest.skip("no `free` here")
    row = subprocess.run(["free", "-b"], stdout=subprocess.PIPE, check=True,
                         env=dict(os.environ, LC_ALL="C")).stdout.decode().splitlines()[1].split()
    total, used = b9agent.memory_use(b9agent.parse_meminfo(b9agent.read_text("/proc/meminfo")))
    assert total == int(row[1])
    assert abs((total - used) - int(row[6])) < max(256 * MIB, total // 20)  # others run meanwhile


@on_linux
def test_memory_agrees_with_psutil():
    psutil = pytest.importorskip("psutil")
    theirs = psutil.virtual_memory()
    total, used = b9agent.memory_use(b9agent.parse_meminfo(b9agent.read_text("/proc/meminfo")))
    assert total == theirs.total
    assert abs((total - used) - theirs.available) < max(256 * MIB, total // 20)


@on_linux
def test_idle_ticks_lie_between_two_readings_of_psutil():
    psutil = pytest.importorskip("psutil")
    before = psutil.cpu_times().idle
    ours = b9agent.parse_cpu_ticks(b9agent.read_text("/proc/stat")).idle[0]
    after = psutil.cpu_times().idle
    assert before - 1 <= ours / os.sysconf("SC_CLK_TCK") <= after + 1


@on_linux
def test_network_counters_lie_between_two_readings_of_psutil():
    psutil = pytest.importorskip("psutil")
    real = [name for name in os.listdir("/sys/class/net")
            if os.path.exists("/sys/class/net/{}/device".format(name))]
    if not real:
        pytest.skip("no network device here")

    def total():
        counters = psutil.net_io_counters(pernic=True)
        return sum(counters[name].bytes_recv for name in real)

    before = total()
    ours = b9agent.make_host().sample("/").net_received_bytes
    assert before <= ours <= total()


def test_the_disk_agrees_with_df(tmp_path):
    if not shutil.which("df"):
        pytest.skip("no `df` here")
    row = subprocess.run(["df", "-k", "-P", str(tmp_path)], stdout=subprocess.PIPE, check=True,
                         env=dict(os.environ, LC_ALL="C")).stdout.decode().splitlines()[1].split()
    total, free = b9agent.read_disk(str(tmp_path))
    assert abs(total - int(row[1]) * KIB) <= KIB
    assert abs(free - int(row[3]) * KIB) <= max(GIB, total // 50)  # other tests write meanwhile


@on_linux
def test_swap_agrees_with_free_and_psutil():
    total, used = b9agent.swap_use(b9agent.parse_meminfo(b9agent.read_text("/proc/meminfo")))
    if shutil.which("free"):
        rows = subprocess.run(["free", "-b"], stdout=subprocess.PIPE, check=True,
                              env=dict(os.environ, LC_ALL="C")).stdout.decode().splitlines()
        row = [line.split() for line in rows if line.startswith("Swap:")][0]
        assert total == int(row[1]) and abs(used - int(row[2])) < 256 * MIB
    psutil = pytest.importorskip("psutil")
    theirs = psutil.swap_memory()
    assert total == theirs.total and abs(used - theirs.used) < 256 * MIB


@on_linux
def test_disk_counters_lie_between_two_readings_of_psutil():
    psutil = pytest.importorskip("psutil")
    real = [name for name in os.listdir("/sys/block")
            if os.path.exists("/sys/block/{}/device".format(name))]
    if not real or not psutil.disk_io_counters(perdisk=True):
        pytest.skip("no disk with a device here")

    def totals():
        counters = psutil.disk_io_counters(perdisk=True, nowrap=False)
        return [sum(getattr(counters[name], field) for name in real if name in counters)
                for field in ("read_bytes", "write_bytes")]

    before = totals()
    sample = b9agent.make_host().sample("/")
    after = totals()
    ours = [sample.disk_read_bytes, sample.disk_written_bytes]
    # A virtio disk has no `device` on some hypervisors: then we count more than this test does.
    assert all(low <= our for low, our in zip(before, ours))
    if set(real) == {name for name in os.listdir("/sys/block")
                     if not name.startswith(b9agent._LINUX_STACKED)}:
        assert all(our <= high for our, high in zip(ours, after))


@on_linux
def test_uptime_and_load_agree_with_the_kernel():
    before = float(open_text("/proc/uptime").split()[0])
    sample = b9agent.make_host().sample("/")
    assert before <= sample.uptime_s <= float(open_text("/proc/uptime").split()[0])
    words = open_text("/proc/loadavg").split()
    for ours, theirs in zip((sample.load_1m, sample.load_5m, sample.load_15m), words):
        assert ours == pytest.approx(float(theirs), abs=2)  # it is counted anew every 5 s


@on_linux
def test_facts_of_this_machine_agree_with_psutil():
    psutil = pytest.importorskip("psutil")
    facts = b9agent.make_host().facts()
    assert facts.cpu_threads == psutil.cpu_count()
    assert facts.cpu_cores in (None, psutil.cpu_count(logical=False))
    assert (facts.kernel, facts.architecture) == (platform.release(), platform.machine())


@on_linux
def test_facts_of_this_machine_agree_with_lscpu():
    if not shutil.which("lscpu"):
        pytest.skip("no `lscpu` here")
    rows = subprocess.run(["lscpu"], stdout=subprocess.PIPE, check=True,
                          env=dict(os.environ, LC_ALL="C")).stdout.decode().splitlines()
    theirs = {name.strip(): " ".join(value.split())
              for name, _, value in (line.partition(":") for line in rows)}
    facts = b9agent.make_host().facts()
    if facts.cpu_model and platform.machine() in ("x86_64", "aarch64"):
        assert facts.cpu_model.split(" + ")[0] in theirs["Model name"]
    if facts.cpu_cores and "Socket(s)" in theirs and theirs["Socket(s)"].isdigit():
        assert facts.cpu_cores == int(theirs["Core(s) per socket"]) * int(theirs["Socket(s)"])


def open_text(path):
    with open(path) as handle:
        return handle.read()


@on_linux
def test_a_sample_costs_less_than_a_millisecond_and_starts_no_program(monkeypatch):
    monkeypatch.setattr(b9agent, "run_command", None)
    host, costs = b9agent.make_host(), []
    for _ in range(50):
        began = time.perf_counter()
        host.sample("/")
        costs.append(time.perf_counter() - began)
    assert sorted(costs)[5] < 0.001  # the quick ones: others run meanwhile


# ---------------------------------------------------------------- no recording is forgotten

# What takes a recording of the host: the test, or why none does.  Where a * stands, the test's own
# table must name what it stands for.
STATVFS = "not read: a folder's own statvfs says how full its disk is; of mounts we read mountinfo"
OTHER = "not of the host: tests of GPUs, energy and membership take it"
NO_MAC = "not run: slow, needs root, or prints nothing that the programs we run do not"
RECORDINGS = {
    "linux/stat_*.txt": "test_recorded_stat_files_read_as_the_eye_reads_them",
    "linux/meminfo_*.txt": "test_recorded_meminfo_files_read_as_the_eye_reads_them",
    "linux/cpuinfo_*.txt": "test_recorded_cpuinfo_files_read_as_the_eye_reads_them",
    "linux/net_dev_*.txt": "test_recorded_net_dev_files_read_as_the_eye_reads_them",
    "linux/os-release_*.txt": "test_recorded_os_release_files_read_as_the_eye_reads_them",
    "linux/version_*.txt": "test_recorded_kernels_say_whether_windows_is_around_them",
    "linux/dgx-release_spark.txt": "test_the_release_file_of_a_dgx_names_no_operating_system",
    "linux/diskstats_procfs.txt": "test_a_recorded_diskstats_file_reads_as_the_eye_reads_it",
    "linux/uptime.txt": "test_a_recorded_uptime_file_reads_as_the_eye_reads_it",
    "linux/cgroup_v2_cpu.max_*.txt": "test_recorded_cpu_limits_read_as_the_eye_reads_them",
    "linux/cgroup_v1_memory.stat_*.txt": "test_recorded_memory_stat_files_read_as_the_eye_reads_them",
    "linux/cgroup_*.txt": "test_recorded_cgroups_name_their_container",
    "linux/mountinfo_*.txt": "test_recorded_mounts_name_their_container",
    "linux/tree_cgroup_*": "test_recorded_trees_without_limits_give_the_machine",
    "linux/tree_rapl_powercap": OTHER,
    "linux/loadavg.txt": "not read: the C library does (os.getloadavg)",
    "linux/pressure_memory.txt": "not read: no figure of ours is a pressure",
    "linux/df_wsl2.txt": STATVFS, "linux/mounts_*.txt": STATVFS,
    "macos/vm_stat_*.txt": "test_recorded_vm_stat_outputs_read_as_the_eye_reads_them",
    "macos/netstat_*.txt": "test_recorded_netstat_outputs_read_as_the_eye_reads_them",
    "macos/swapusage_*.txt": "test_recorded_swap_of_macs_reads_as_the_eye_reads_it",
    "macos/sysctl_iogpu.txt": OTHER,
    "macos/sysctl_perflevels_m5max.txt": "not asked: kinds of cores are no figure of ours",
    "macos/sysctl_*.txt": "test_facts_of_recorded_macs",
    "macos/ioreg_*": OTHER, "macos/system_profiler_*": NO_MAC, "macos/powermetrics_*": NO_MAC,
    "macos/top_*.txt": NO_MAC, "macos/iostat_w1_disk0.txt": NO_MAC, "macos/uptime_10.14.txt": NO_MAC,
    "macos/ifconfig_*.txt": NO_MAC, "macos/df_*.txt": STATVFS, "macos/mount_10.14.txt": STATVFS}


def use_of(name):
    """(test or reason, what the * stands for) of a recording; the first pattern counts."""
    for pattern, use in RECORDINGS.items():
        if fnmatch.fnmatch(name, pattern):
            head, _, tail = pattern.partition("*")
            return use, name[len(head):len(name) - len(tail)]
    return None, ""


def recordings():
    return sorted(path.parent.name + "/" + path.name for folder in ("linux", "macos")
                  for path in FIXTURES.glob(folder + "/*"))


def test_every_recording_of_a_host_has_its_test_or_a_reason_why_not():
    recording("linux/uptime.txt")  # skips where there are none
    source = pathlib.Path(__file__).read_text()
    forgotten = []
    for name in recordings():
        use, part = use_of(name)
        if use is None or (use.startswith("test_") and (
                use not in globals() or not re.search(r'[_"/]%s[".]' % re.escape(part), source))):
            forgotten.append(name)
    assert forgotten == []


# ---------------------------------------------------------------- hostile text

PARSERS = [
    b9agent.parse_int, b9agent.parse_cpu_ticks, lambda text: b9agent.parse_cpu_ticks(text, (0,)),
    lambda text: b9agent.memory_use(b9agent.parse_meminfo(text)), b9agent.parse_net_dev,
    b9agent.parse_cgroup_paths, b9agent.parse_cgroup_mounts, b9agent.parse_cpu_limit,
    b9agent.parse_memory_limit, b9agent.parse_keyed, b9agent.parse_cpu_usage_ns,
    b9agent.parse_vm_stat, b9agent.parse_netstat, b9agent.parse_uptime, b9agent.parse_os_release,
    b9agent.parse_cpuinfo, b9agent.parse_swapusage, b9agent.parse_boottime,
    b9agent.parse_ioreg_disks, lambda text: b9agent.parse_diskstats(text, DISKS),
    lambda text: b9agent.swap_use(b9agent.parse_meminfo(text)),
    lambda text: b9agent.find_container(text, text),
    lambda text: b9agent.find_cgroup("cpu", text, MOUNTS_V2 + MOUNTS_V1),
    lambda text: b9agent.find_cgroup("memory", "0::/a\n4:memory:/b\n", text)]
SEEDS = [STAT, MEMINFO, NET_HEAD + net_row("eth0", 1, 2), MOUNTS_V1 + MOUNTS_V2, VM_STAT, NETSTAT,
         "4:memory:/m\n0::/u\n", "250000 100000", "max", "usage_usec 5\ninactive_file 7\n",
         DISKSTATS, IOREG, "46901.13 46856.66\n", 'PRETTY_NAME="A \\"1\\""\n',
         X86.format(0, 0, 0) + ARM.format(1, "0x41", "0xd4f"),
         "total = 2048.00M  used = 0.50M", "{ sec = 1592836479, usec = 918881 }",
         "9 1 8:1 /var/lib/lxc/a/rootfs / rw - ext4 d rw\n"]


def test_mutated_text_ends_in_values_and_never_in_an_exception():
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    tricks = ["", "-1", "9" * 400, ":", "\n", " ", "\x00", "²", "kB", "/..", "\\777", "1e9", "nan"]
    splice = strategies.sampled_from(tricks) | strategies.text(max_size=9)
    cuts = strategies.lists(strategies.tuples(strategies.floats(0, 1), strategies.integers(0, 12),
                                              splice), max_size=6)
    recorded = [recording(name)[:6000] for name in recordings()
                if (FIXTURES / name).is_file() and (use_of(name)[0] or "").startswith("test_")]

    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @hypothesis.given(strategies.sampled_from(SEEDS + recorded), cuts)
    def check(text, mutations):
        for place, length, new in mutations:
            at = int(place * len(text))
            text = text[:at] + new + text[at + length:]
        for parse in PARSERS:
            parse(text)
        for pair in (b9agent.parse_diskstats(text, DISKS), b9agent.parse_net_dev(text),
                     b9agent.parse_ioreg_disks(text), b9agent.parse_swapusage(text),
                     b9agent.swap_use(b9agent.parse_meminfo(text)), (b9agent.parse_uptime(text),),
                     b9agent.parse_cpuinfo(text)[1:], (b9agent.parse_boottime(text),)):
            assert all(value is None or 0 <= value < 1 << 80 for value in pair)
        mutant = b9agent.parse_cpu_ticks(text)
        percent = b9agent.busy_pct(b9agent.parse_cpu_ticks(STAT), mutant)
        assert percent is None or 0 <= percent <= 100

    check()
