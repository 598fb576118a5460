"""Section 6b: NVIDIA GPUs."""
import csv
import os
import pathlib
import subprocess

import pytest

import b9agent
from b9agent import Gpu, NvidiaSmi

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIXTURES = pathlib.Path(os.environ.get("B9AGENT_FIXTURES", str(ROOT.parent / "shared/fixtures")))
MIB = 1 << 20
GIB = 1 << 30


def recording(name):
    path = FIXTURES / "nvidia" / name
    if not path.exists():
        pytest.skip("no recordings at {}: set B9AGENT_FIXTURES".format(FIXTURES))
    return path.read_text(encoding="utf-8", errors="replace")


def gpu(index=0, total_mib=81559, used_mib=0, busy_pct=0.0, name="NVIDIA H100"):
    return Gpu(index, "nvidia", "GPU-{}".format(index), name,
               memory_total_bytes=None if total_mib is None else total_mib * MIB,
               memory_used_bytes=None if used_mib is None else used_mib * MIB,
               utilization_pct=busy_pct)


# ---------------------------------------------------------------- rows

ROWS = ("0, GPU-0, NVIDIA H100, 81559, 19818, 100\n"
        "1, GPU-1, NVIDIA H100, 81559, 0, 0\n")


def test_each_row_is_a_gpu_with_memory_in_bytes():
    assert b9agent.parse_nvidia_smi(ROWS) == [gpu(0, used_mib=19818, busy_pct=100.0), gpu(1)]


@pytest.mark.parametrize("word", [
    "[N/A]", "[Not Supported]", "[Unknown Error]", "ERR!", "N/A", "", "nan", "[GPU is lost]",
    "[Requested functionality has been deprecated]"])
def test_a_value_that_the_driver_does_not_give_is_unknown(word):
    found = b9agent.parse_nvidia_smi("0, GPU-0, NVIDIA H100, {0}, {0}, {0}\n".format(word))
    assert found == [gpu(0, None, None, None)]


def test_a_name_that_the_driver_does_not_give_is_empty():
    found = b9agent.parse_nvidia_smi("0, [N/A], [Unknown Error], 10, 1, 5\n")
    assert (found[0].uuid, found[0].name) == ("", "")


def test_a_name_may_hold_a_comma_and_parentheses():
    found = b9agent.parse_nvidia_smi("0, GPU-0, Orin, 64 GB (nvgpu), 10, 1, 5\n")
    assert found[0].name == "Orin,64 GB (nvgpu)"


def test_units_are_passed_over():
    assert b9agent.parse_nvidia_smi("0, GPU-0, NVIDIA H100, 81559 MiB, 7 MiB, 3 %\n") == [
        gpu(0, used_mib=7, busy_pct=3.0)]


@pytest.mark.parametrize("text", [
    "", "\n\n", "index, uuid, name, memory.total [MiB], memory.used [MiB], utilization.gpu [%]\n",
    "0, GPU-0, NVIDIA H100, 81559, 0\n", "-1, GPU-0, NVIDIA H100, 1, 1, 1\n",
    "[Unknown Error], [Unknown Error], [Unknown Error], [Unknown Error], [Unknown Error], 0\n"])
def test_what_is_no_gpu_row_is_passed_over(text):
    assert b9agent.parse_nvidia_smi(text) == []


def test_the_gpus_beside_a_lost_one_are_still_seen():
    lost = "Unable to determine the device handle for GPU0000:02:00.0: Unknown Error\n"
    first, second = ROWS.splitlines(True)
    assert [one.index for one in b9agent.parse_nvidia_smi_answer(first + lost + second)] == [0, 1]


def test_no_devices_is_an_empty_list_and_a_failing_driver_is_unknown():
    assert b9agent.parse_nvidia_smi_answer("No devices were found\n") == []
    assert b9agent.parse_nvidia_smi_answer("NVIDIA-SMI has failed because ...\n") is None
    assert b9agent.parse_nvidia_smi_answer("") is None


# ---------------------------------------------------------------- recordings

# file, name, MiB in all, MiB in use, percent: read off the recording
QUERY_RECORDINGS = [
    ("h100_load", "NVIDIA H100 80GB HBM3", 81559, 19818, 100.0),
    ("h100mig_idle", "NVIDIA H100 80GB HBM3", 81559, 59, None),
    ("h100mig_load", "NVIDIA H100 80GB HBM3", 81559, 11125, None),
    ("h200_load", "NVIDIA H200", 143771, 32362, 100.0),
    ("h200mig_idle", "NVIDIA H200", 143771, 55, None),
    ("h200mig_load", "NVIDIA H200", 143771, 16959, None),
    ("l40s_idle", "NVIDIA L40S", 46068, 0, 100.0), ("l40s_load", "NVIDIA L40S", 46068, 1235, 9.0),
    ("rtx2080s-595_load", "NVIDIA GeForce RTX 2080 SUPER", 8192, 819, 8.0),
    ("rtx2080s-610_load", "NVIDIA GeForce RTX 2080 SUPER", 8192, 815, 8.0),
    ("rtx4080s_idle", "NVIDIA GeForce RTX 4080 SUPER", 16376, 596, 0.0),
    ("rtx4080s_load", "NVIDIA GeForce RTX 4080 SUPER", 16376, 1474, 7.0),
]


@pytest.mark.parametrize("name, model, total_mib, used_mib, busy_pct", QUERY_RECORDINGS)
def test_recorded_queries_read_as_the_eye_reads_them(name, model, total_mib, used_mib, busy_pct):
    header, row = list(csv.reader(recording("query-gpu-all_{}.csv".format(name)).splitlines(),
                                  skipinitialspace=True))
    columns = ("index", "uuid", "name", "memory.total [MiB]", "memory.used [MiB]",
               "utilization.gpu [%]")
    line = ", ".join(row[header.index(column)] for column in columns)
    found = b9agent.parse_nvidia_smi(line)
    assert [(one.index, one.name, one.memory_total_bytes, one.memory_used_bytes,
             one.utilization_pct) for one in found] == [
        (0, model, total_mib * MIB, used_mib * MIB, busy_pct)]
    assert found[0].uuid.startswith("GPU-")


@pytest.mark.parametrize("name, expected", [
    ("err_no-devices.txt", []), ("err_container-lost-device.txt", None),
    ("err_driver-library-mismatch.txt", None), ("err_driver-not-loaded.txt", None),
    ("err_handle_nospace.txt", None), ("err_handle_old.txt", None),
    ("err_handle_then_no-devices.txt", None), ("csv_loop-mode-breaks.txt", None)])
def test_recorded_failures_are_unknown_and_only_no_devices_means_none(name, expected):
    assert b9agent.parse_nvidia_smi_answer(recording(name)) == expected


def test_a_recorded_lost_gpu_leaves_the_others():
    # index, name, fan, clocks ..., power limit: the first six columns are enough to tell rows apart
    found = b9agent.parse_nvidia_smi(recording("csv_one-gpu-unknown-error.csv"))
    assert [one.index for one in found] == [0, 2]


# ---------------------------------------------------------------- the program


def program(folder, body):
    """A nvidia-smi of our own; returns the search path that finds it."""
    path = folder / "nvidia-smi"
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return str(folder)


def test_a_machine_without_the_program_has_no_gpus_and_starts_nothing(tmp_path):
    source = NvidiaSmi(str(tmp_path), run=lambda *call: pytest.fail("ran {}".format(call)))
    assert source.read().gpus == ()


def test_a_folder_or_a_plain_file_of_that_name_is_not_the_program(tmp_path):
    (tmp_path / "a" / "nvidia-smi").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "nvidia-smi").write_text("not executable")
    assert NvidiaSmi("{0}/a:{0}/b::{0}/c".format(tmp_path)).read().gpus == ()


def test_the_program_is_asked_for_the_columns_that_are_parsed(tmp_path):
    path = program(tmp_path, 'echo "$@" > {0}/argv\nprintf "{1}"\n'.format(tmp_path, ROWS))
    assert [one.index for one in NvidiaSmi(path).read().gpus] == [0, 1]
    assert (tmp_path / "argv").read_text() == (
        "--query-gpu=index,uuid,name,memory.total,memory.used,utilization.gpu "
        "--format=csv,noheader,nounits\n")


def test_the_program_is_found_on_the_path_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", program(tmp_path, "echo No devices were found\nexit 6\n"))
    assert NvidiaSmi().read().gpus == ()


@pytest.mark.parametrize("body", [
    "echo NVIDIA-SMI has failed because it could not communicate\nexit 9\n", "exit 0\n",
    "echo Failed to initialize NVML: Unknown Error >&2\nexit 255\n", "kill -9 $$\n"])
def test_a_program_that_fails_is_unknown(tmp_path, body):
    assert NvidiaSmi(program(tmp_path, body)).read().gpus is None


def test_a_program_that_cannot_be_started_is_unknown(tmp_path):
    path = program(tmp_path, "")
    (tmp_path / "nvidia-smi").write_text("#!/no/such/interpreter\n")
    assert NvidiaSmi(path).read().gpus is None


def test_a_program_that_hangs_is_ended_and_the_next_sample_asks_again(tmp_path):
    path = program(tmp_path, "echo $$ >> {}/started\nsleep 1000\n".format(tmp_path))
    source = NvidiaSmi(path)
    assert source.read(0.5).gpus is None
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "started").read_text()), 0)
    program(tmp_path, 'printf "{}"\n'.format(ROWS))
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


# ---------------------------------------------------------------- hostile text


def test_mutated_text_ends_in_gpus_or_none_and_never_in_an_exception():
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    splice = strategies.sampled_from(["", ",", "-1", "9" * 400, "\n", "[N/A]", "ERR!", "\x00", "²",
                                      "1e9", "nan", "MiB"]) | strategies.text(max_size=9)
    cuts = strategies.lists(strategies.tuples(strategies.floats(0, 1), strategies.integers(0, 12),
                                              splice), max_size=6)

    @hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @hypothesis.given(cuts)
    def check(mutations):
        text = ROWS
        for place, length, new in mutations:
            at = int(place * len(text))
            text = text[:at] + new + text[at + length:]
        gpus = b9agent.parse_nvidia_smi(text)
        assert 0 <= sum(map(b9agent.is_free, gpus)) <= len(gpus)
        assert all(one.utilization_pct is None or 0 <= one.utilization_pct <= 100 for one in gpus)
        b9agent.parse_nvidia_smi_answer(text)

    check()
