"""Sections 6a and 6d: what is said of a GPU, which ones are offered, and sampling in time."""
import threading

import pytest

import b9agent
from b9agent import Gpu, GpuProcess, GpuReading, GpuSampler, GpuSource, MigInstance

MIB = 1 << 20


def gpu(index=0, vendor="nvidia", total_mib=81559, used_mib=0, **more):
    return Gpu(index, vendor, uuid="GPU-{}-abcd".format(index),
               memory_total_bytes=None if total_mib is None else total_mib * MIB,
               memory_used_bytes=None if used_mib is None else used_mib * MIB, **more)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name, expected", [
    ("NVIDIA A100-SXM4-80GB", "A100-80"), ("A100-SXM4-40GB", "A100-40"),
    ("NVIDIA A100 80GB PCIe", "A100-80"), ("NVIDIA A100-PCIE-40GB", "A100-40"),
    ("NVIDIA A100-SXM-64GB", "A100"), ("Tesla V100-SXM2-32GB", "V100-32"),
    ("Tesla V100S-PCIE-32GB", "V100-32"), ("Tesla V100-SXM2-16GB", "V100"),
    ("NVIDIA GeForce RTX 4090", "RTX4090"), ("NVIDIA GeForce RTX 4090 D", "RTX4090"),
    ("NVIDIA GeForce RTX 5090", "RTX5090"), ("NVIDIA RTX 6000 Ada Generation", "RTX6000Ada"),
    ("NVIDIA RTX 4000 SFF Ada Generation", "RTX4000Ada"), ("Quadro RTX 6000", "RTX6000"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTXPro6000"),
    ("NVIDIA RTX A6000", "A6000"), ("NVIDIA RTX A4000", "A4000"), ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA H100 NVL", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA GH200 480GB", "GH200"),
    ("NVIDIA B200", "B200"), ("NVIDIA B300 SXM6 AC", "B300"), ("NVIDIA L40S", "L40S"),
    ("NVIDIA L40", "L40"), ("NVIDIA L4", "L4"), ("NVIDIA A10G", "A10G"), ("NVIDIA A10", "A10"),
    ("Tesla T4", "T4"), ("NVIDIA A16", "A16"), ("NVIDIA A30", "A30"), ("NVIDIA A40", "A40"),
    # Not what its name begins with: another chip, a slice of a GPU, no such type.
    ("NVIDIA GeForce RTX 4090 Laptop GPU", ""), ("NVIDIA RTX A5000 Laptop GPU", ""),
    ("NVIDIA A40-48Q", ""), ("GRID A100-10C", ""), ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", ""),
    ("NVIDIA GB200", ""), ("NVIDIA T4G", ""), ("NVIDIA L40G", ""), ("NVIDIA GeForce RTX 3060", ""),
    ("AMD Radeon RX 7900 XTX", ""), ("Apple M4 Max", ""), ("", "")])
def test_the_schedulers_name_for_a_device_name(name, expected):
    assert b9agent.gpu_type(name) == expected


# ---------------------------------------------------------------- offered


def indexes(chosen):
    return [(one.vendor, one.index) if one.vendor != "nvidia" else one.index for one in chosen]


@pytest.mark.parametrize("gpu_ids, max_gpus, expected", [
    (None, None, [0, 1, 2]), ((("", 2), ("", 0)), None, [0, 2]), ((("", 7),), None, []), ((), None, []),
    (None, 2, [0, 1]), (None, 0, []), (None, 9, [0, 1, 2]), ((("", 1), ("", 2)), 1, [1])])
def test_caps_choose_by_index_first_and_then_by_count(gpu_ids, max_gpus, expected):
    chosen = b9agent.offered_gpus([gpu(0), gpu(1), gpu(2)], "nvidia", gpu_ids, max_gpus)
    assert indexes(chosen) == expected


def test_a_machine_with_several_vendors_offers_one_vendors_and_no_part_of_a_cpu():
    mixed = [gpu(0), gpu(0, "amd", integrated=True), gpu(0, "intel", integrated=True)]
    assert indexes(b9agent.offered_gpus(mixed, "nvidia", None, None)) == [0]
    assert indexes(b9agent.offered_gpus(mixed, "nvidia", (("amd", 0), ("", 0)), None)) == [
        0, ("amd", 0)]
    amd = [gpu(0, "amd"), gpu(1, "amd", integrated=True)]
    assert indexes(b9agent.offered_gpus(amd, "amd", None, None)) == [("amd", 0)]
    assert indexes(b9agent.offered_gpus(amd[1:], "amd", None, None)) == [("amd", 1)]


def test_a_part_of_a_cpu_of_which_no_memory_is_known_makes_no_machine_with_a_gpu():
    office_pc = [gpu(0, "intel", total_mib=None, used_mib=None, integrated=True)]
    assert b9agent.offered_gpus(office_pc, "intel", None, None) == []
    assert indexes(b9agent.offered_gpus(office_pc, "intel", (("", 0),), None)) == [("intel", 0)]


@pytest.mark.parametrize("variable, expected", [
    ("0,2", [0, 2]), ("", []), ("-1", []), ("1,-1,0", [1]), ("NoDevFiles", []), (" 1 , 0 ", [0, 1]),
    ("GPU-1", [1]), ("GPU-", []), ("GPU-9", []), ("0,0", [0]), ("3", []), ("MIG-x", [2])])
def test_cuda_visible_devices_hides_gpus(variable, expected):
    three = [gpu(0), gpu(1), gpu(2, mig_instances=(MigInstance("MIG-x", "", None, None),))]
    assert indexes(b9agent.offered_gpus(three, "nvidia", None, None, variable)) == expected


def test_a_sick_gpu_is_not_offered_and_makes_room_for_the_next():
    three = [gpu(0, problem="is lost"), gpu(1, stale=True, problem="silent"), gpu(2)]
    assert indexes(b9agent.offered_gpus(three, "nvidia", None, None)) == [1, 2]
    assert indexes(b9agent.offered_gpus(three, "nvidia", None, 1)) == [1]
    assert b9agent.offered_gpus(three, "nvidia", (("", 0),), None) == []


def test_cuda_visible_devices_says_nothing_of_other_vendors():
    assert len(b9agent.offered_gpus([gpu(0, "amd")], "amd", None, None, "")) == 1


# ---------------------------------------------------------------- free


@pytest.mark.parametrize("total_mib, used_mib, free", [
    (8192, 409, True), (8192, 410, False),        # 5 % of 8 GiB are 409.6 MiB
    (143771, 1023, True), (143771, 1024, False),  # 1 GiB is less than 5 % of 140 GiB
    (81559, 0, True), (81559, None, False), (None, 0, False), (None, None, False), (0, 0, False)])
def test_a_gpu_is_free_under_5_percent_and_1_gib(total_mib, used_mib, free):
    assert b9agent.is_free(gpu(0, total_mib=total_mib, used_mib=used_mib)) is free


def test_a_gpu_on_which_somebody_computes_is_not_free():
    assert not b9agent.is_free(gpu(processes=(GpuProcess(7, 10 * MIB),)))
    assert not b9agent.is_free(gpu(processes=(GpuProcess(7, None),)))
    assert b9agent.is_free(gpu(processes=()))


def test_a_sick_gpu_is_not_free():
    assert not b9agent.is_free(gpu(problem="it fell off the bus"))


# ---------------------------------------------------------------- sampling


class Scripted(GpuSource):
    """Answers what it is told to, once it may."""

    def __init__(self, vendor, *answers):
        self.vendor = vendor
        self.answers = list(answers)
        self.there = True
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.asked = 0

    def present(self):
        return self.there

    def read(self):
        self.asked += 1
        self.may_answer.wait(30)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def reading(*gpus, **more):
    return GpuReading("test", gpus, **more)


def test_a_machine_without_gpus_starts_no_thread():
    source = Scripted("nvidia", reading())
    source.there = False
    before = threading.active_count()
    sample = GpuSampler([source]).sample(10)
    assert (sample.gpus, sample.vendor, sample.known, sample.problems) == ((), "", True, [])
    assert (source.asked, threading.active_count()) == (0, before)


def test_gpus_of_every_vendor_are_listed_in_the_order_of_the_sources():
    one, other = Scripted("nvidia", reading(gpu(0), gpu(1))), Scripted("amd", reading(gpu(0, "amd")))
    sample = GpuSampler([one, other]).sample(10)
    assert indexes(sample.gpus) == [0, 1, ("amd", 0)]
    assert (sample.vendor, sample.known) == ("nvidia", True)


def test_a_vendor_that_says_it_has_none_leaves_the_machine_to_the_next():
    sample = GpuSampler([Scripted("nvidia", reading()), Scripted("amd", reading(gpu(0, "amd")))]
                        ).sample(10)
    assert (sample.vendor, sample.known) == ("amd", True)


def test_a_part_of_a_cpu_gives_way_to_a_card_of_another_vendor():
    ryzen, arc = gpu(0, "amd", integrated=True), gpu(0, "intel")
    sample = GpuSampler([Scripted("amd", reading(ryzen)), Scripted("intel", reading(arc))]).sample(10)
    assert sample.vendor == "intel"
    assert indexes(b9agent.offered_gpus(sample.gpus, sample.vendor, None, None)) == [("intel", 0)]
    both = [Scripted(one.vendor, reading(one)) for one in (ryzen, arc._replace(integrated=True))]
    assert GpuSampler(both).sample(10).vendor == "amd"
    silent = Scripted("amd", GpuReading("rocm-smi", None))
    assert GpuSampler([silent, Scripted("intel", reading(arc))]).sample(10).known is False


def test_a_driver_that_fails_does_not_make_the_machine_another_vendors():
    broken = Scripted("nvidia", GpuReading("nvml", None, problem="driver not loaded"))
    sample = GpuSampler([broken, Scripted("amd", reading(gpu(0, "amd")))]).sample(10)
    assert (sample.vendor, sample.known) == ("nvidia", False)
    assert indexes(sample.gpus) == [("amd", 0)]
    assert sample.problems == ["driver not loaded"]


def test_a_hung_driver_costs_the_limit_and_is_asked_once_while_others_answer():
    clock = [1000.0]
    hung = Scripted("nvidia", reading(gpu(0), driver_version="1"))
    other = Scripted("amd", reading(gpu(0, "amd")))
    sampler = GpuSampler([hung, other], clock=lambda: clock[0])
    assert sampler.sample(10).gpus[0].stale is False
    hung.may_answer.clear()
    try:
        for age_s, stale in ((60, True), (300, True), (301, None), (5000, None)):
            clock[0] = 1000.0 + age_s
            sample = sampler.sample(0.05)
            assert indexes(sample.gpus)[-1] == ("amd", 0)
            assert (sample.vendor, sample.known) == ("nvidia", stale is not None)
            assert [one.stale for one in sample.gpus if one.vendor == "nvidia"] == (
                [True] if stale else [])
            assert not any(b9agent.is_free(one) for one in sample.gpus if one.vendor == "nvidia")
            assert sample.problems == ["nvidia: the driver does not answer"]
        assert hung.asked == 2
    finally:
        hung.may_answer.set()


def test_a_hung_driver_is_waited_for_once_and_not_at_every_sample():
    hung = Scripted("nvidia", reading(gpu(0)))
    hung.may_answer.clear()
    sampler = GpuSampler([hung])
    try:
        sampler.sample(0.5)
        begun_s = b9agent.now_s()
        assert [sampler.sample(0.5).known for _ in range(20)] == [False] * 20
        assert b9agent.now_s() - begun_s < 5  # 20 waits would be 10 s
        sampler.sample(1.0)  # who has more time waits for the rest of it
        assert b9agent.now_s() - sampler._watches[0]._begun_s >= 1.0
    finally:
        hung.may_answer.set()


def test_a_driver_that_wakes_up_is_asked_again():
    hung = Scripted("nvidia", reading(gpu(0)), reading(gpu(0), gpu(1)))
    hung.may_answer.clear()
    sampler = GpuSampler([hung])
    first = sampler.sample(0.02)
    assert (first.gpus, first.vendor, first.known) == ((), "nvidia", False)
    hung.may_answer.set()
    while len(sampler.sample(10).gpus) != 2:  # the late answer, then a new one
        pass
    assert not sampler.sample(10).gpus[0].stale


def test_a_defect_in_a_source_costs_its_figures_and_nothing_else():
    sample = GpuSampler([Scripted("nvidia", ZeroDivisionError("x")),
                         Scripted("amd", reading(gpu(0, "amd")))]).sample(10)
    assert (sample.vendor, sample.known) == ("nvidia", False)
    assert "ZeroDivisionError" in sample.problems[0]


def test_a_machine_out_of_threads_keeps_its_keepalive_and_asks_again(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")
    sampler = GpuSampler([Scripted("nvidia", reading(gpu(0)))])
    assert sampler.sample(10).known
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        sample = sampler.sample(10)
    assert (sample.known, sample.problems) == (False, ["nvidia: can't start new thread"])
    assert [one.problem for one in sampler.sample(10).gpus] == [""]


def test_a_sick_gpu_is_named_among_the_problems():
    sample = GpuSampler([Scripted("nvidia", reading(gpu(0), gpu(3, name="H100", problem="is lost")))]
                        ).sample(10)
    assert sample.problems == ["GPU 3 (H100): is lost"]
