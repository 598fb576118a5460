"""Section 6e: what the machine drew and what that emitted; measured and estimated told apart."""
import collections
import json
import math
import os
import signal
import stat

import pytest

import b9agent
from b9agent import EnergyMeter, EnergyTotals, Gpu, GpuReading, GpuSample, RaplZone
from helpers import Program, agent_command, environment, run_agent, wait_until

FIXTURES = os.environ.get("B9AGENT_FIXTURES") or os.path.join(
    os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "shared", "fixtures")
RANGE_UJ = 262143328850
Policy = collections.namedtuple("Policy", "grid_intensity renewable_pct pue cpu_watts")
PLAIN = Policy(None, 0.0, 1.0, None)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Lines(list):
    """A log that keeps what it is told."""

    defect = b9agent.Log.defect

    def __call__(self, level, event, **fields):
        self.append((level, event, fields))


class Bench:
    """A meter with a clock and a log of its own.  after(seconds, …) is one look later."""

    def __init__(self, path=None, policy=PLAIN):
        self.clock, self.log = Clock(), Lines()
        self.path, self.policy = path and str(path), policy
        self.restart()

    def restart(self):
        self.meter = EnergyMeter(self.path, self.policy, self.log, self.clock, lambda: 1.7e9)

    def after(self, seconds, *gpus, busy=None, threads=8.0, zones=None):
        self.clock.now += seconds
        self.meter.add(busy, threads, gpus, zones or {})
        return self.total

    def between(self, seconds, *gpus, zones=None):
        self.clock.now += seconds
        self.meter.add_between(gpus or None, zones or {})
        return self.total

    @property
    def total(self):
        return self.meter.report().total

    @property
    def started(self):
        return self.meter.report().started


def gpu(index=0, power=None, energy=None, **more):
    return Gpu(index, more.pop("vendor", "nvidia"), uuid="GPU-%d" % index, power_w=power,
               energy_j=energy, **more)


def package(joules, range_uj=RANGE_UJ, zone="intel-rapl:0"):
    return {zone: RaplZone(int(joules * 1e6), range_uj)}


@pytest.fixture
def powercap(tmp_path):
    """powercap(zone, name, energy, range) makes a zone; powercap.root is the folder."""
    def make(zone, name, energy_uj, range_uj=str(RANGE_UJ)):
        folder = tmp_path / "powercap" / zone
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in (("name", name), ("energy_uj", energy_uj),
                           ("max_energy_range_uj", range_uj)):
            if text is not None:
                (folder / file).write_text(text)
    make.root = str(tmp_path / "powercap")
    return make


# -- RAPL ------------------------------------------------------------------

def test_a_recorded_powercap_tree():
    root = os.path.join(FIXTURES, "linux", "tree_rapl_powercap", "class", "powercap")
    if not os.path.isdir(root):
        pytest.skip("the recording is not here")
    # Read off the files: package-0 and package-10; `core` is a part of the first.
    assert b9agent.read_rapl(root) == {"intel-rapl:0": RaplZone(240422366267, 262143328850),
                                       "intel-rapl:a": RaplZone(240422366267, 262143328850)}


def test_packages_and_their_memory_count_and_what_lies_in_or_over_them_does_not(powercap):
    powercap("intel-rapl:0", "package-0\n", "1000\n")
    powercap("intel-rapl:0:0", "core\n", "2\n")
    powercap("intel-rapl:0:1", "uncore\n", "3\n")
    powercap("intel-rapl:0:2", "dram\n", "40\n", "65532610987\n")
    powercap("intel-rapl:1", "package-1-die-0\n", "500\n")
    powercap("intel-rapl:2", "psys\n", "9\n")
    powercap("intel-rapl-mmio:0", "package-0\n", "1000\n")
    powercap("dtpm", "package-9\n", "1\n")
    powercap("intel-rapl:3", None, None, None)
    assert b9agent.read_rapl(powercap.root) == {
        "intel-rapl:0": RaplZone(1000, RANGE_UJ), "intel-rapl:0:2": RaplZone(40, 65532610987),
        "intel-rapl:1": RaplZone(500, RANGE_UJ)}


@pytest.mark.parametrize("energy, top", [("", "100"), (None, "100"), ("5", ""), ("5", None),
                                         ("-1", "100"), ("101", "100"), ("9" * 5000, "100"),
                                         ("nan", "100"), ("\0\xff", "100")])
def test_a_package_that_cannot_be_read_makes_the_whole_not_measurable(powercap, energy, top):
    powercap("intel-rapl:0", "package-0", "1000")
    powercap("intel-rapl:1", "package-1", energy, top)
    assert b9agent.read_rapl(powercap.root) == {}


def test_memory_whose_counter_fails_is_left_out_alone(powercap):
    powercap("intel-rapl:0", "package-0", "1000")
    powercap("intel-rapl:0:0", "dram", "")
    assert list(b9agent.read_rapl(powercap.root)) == ["intel-rapl:0"]


def test_a_machine_without_powercap_has_no_counters(tmp_path):
    assert b9agent.read_rapl(str(tmp_path)) == b9agent.read_rapl(str(tmp_path / "nowhere")) == {}


def test_counters_are_measured_and_a_wrap_counts_once():
    bench = Bench()
    bench.after(0, zones=package(262000))
    assert bench.after(60, zones=package(262100)).cpu_measured_j == 100
    wrapped = bench.after(60, zones=package(1000)).cpu_measured_j  # 43.32885 to the end, and 1000
    assert wrapped == pytest.approx(100 + 43.32885 + 1000, abs=1e-5)
    assert bench.total.cpu_estimated_j == 0
    energy = bench.meter.report()
    assert (round(energy.cpu_w, 2), energy.cpu_basis) == (17.39, "measured")


def test_over_a_gap_in_which_a_counter_may_wrap_unseen_the_cpu_is_estimated():
    bench = Bench()
    bench.after(0, zones=package(100))
    assert bench.after(262, busy=0.0, zones=package(200)) == EnergyTotals(cpu_measured_j=100)
    total = bench.after(263, busy=0.0, zones=package(300))
    assert total.cpu_measured_j == 100
    assert total.cpu_estimated_j == pytest.approx(263 * 8 * 0.74)
    assert bench.meter.report().cpu_basis == "estimated"


def test_a_counter_that_was_reset_is_not_taken_for_one_that_wrapped():
    bench = Bench()
    bench.after(0, zones=package(100000))
    total = bench.after(60, busy=100.0, zones=package(5))  # as a wrap it were 162,148 J in a minute
    assert total == EnergyTotals(cpu_estimated_j=60 * 8 * 3.5)
    assert bench.after(60, zones=package(65)).cpu_measured_j == 60


def test_a_package_that_comes_or_goes_makes_that_interval_an_estimate():
    bench = Bench()
    both = {**package(1000), **package(1000, zone="intel-rapl:1")}
    bench.after(0, zones=package(0))
    assert bench.after(10, busy=0.0, zones=both).cpu_measured_j == 0
    later = {**package(1010), **package(1020, zone="intel-rapl:1")}
    assert bench.after(10, busy=0.0, zones=later).cpu_measured_j == 30
    assert bench.after(10, busy=0.0, zones={}).cpu_measured_j == 30
    assert bench.total.cpu_estimated_j == pytest.approx(2 * 10 * 8 * 0.74)


def test_between_looks_counters_are_read_and_the_estimate_waits_for_the_look():
    bench = Bench()
    bench.after(0, zones=package(0))
    assert bench.between(10, zones=package(500)).cpu_measured_j == 500
    assert bench.between(10) == EnergyTotals(cpu_measured_j=500)  # the counters cannot be read
    total = bench.after(40, busy=0.0)
    assert total == EnergyTotals(cpu_measured_j=500, cpu_estimated_j=pytest.approx(50 * 8 * 0.74))


# -- the CPU's model -------------------------------------------------------

def test_the_estimate_is_linear_between_idle_and_full_load():
    assert b9agent.cpu_estimate_w(0.0, 1) == 0.74
    assert b9agent.cpu_estimate_w(100.0, 1) == 3.5
    assert b9agent.cpu_estimate_w(50.0, 2) == pytest.approx(4.24)
    assert b9agent.cpu_estimate_w(100.0, None, 125.0) == 125.0
    assert b9agent.cpu_estimate_w(0.0, 64, 350.0) == pytest.approx(74.0)


@pytest.mark.parametrize("busy, threads", [(None, 8.0), (5.0, None), (-1.0, 8.0), (101.0, 8.0),
                                           (math.nan, 8.0)])
def test_what_is_unknown_is_not_estimated(busy, threads):
    bench = Bench()
    bench.after(0)
    assert bench.after(60, busy=busy, threads=threads) == EnergyTotals()
    assert bench.meter.report().cpu_w is None and bench.meter.report().cpu_basis == ""


def test_a_lone_look_counts_nothing():
    assert Bench().after(5, gpu(0, 300.0, 1000.0), busy=50.0) == EnergyTotals()


# -- GPUs --------------------------------------------------------------------

def test_a_gpus_own_counter_is_measured_energy():
    bench = Bench()
    bench.after(0, gpu(0, 100.0, 1000.0), gpu(1, None, 50.0))
    bench.after(10, gpu(0, 900.0, 3000.0), gpu(1, None, 650.0))
    assert bench.total == EnergyTotals(gpu_measured_j=2600)
    energy = bench.meter.report()
    assert (energy.gpu_w, energy.gpu_basis) == (960.0, "measured")  # 900, and 600 J in 10 s


@pytest.mark.parametrize("after", [5.0, 1e9, math.nan, math.inf, -1.0, None])
def test_a_counter_that_cannot_be_true_leaves_the_interval_to_the_power(after):
    bench = Bench()
    bench.after(0, gpu(0, 100.0, 1000.0))
    assert bench.after(10, gpu(0, 200.0, after)) == EnergyTotals(gpu_measured_j=1500)


def test_after_a_driver_was_loaded_again_the_counter_goes_on():
    bench = Bench()
    bench.after(0, gpu(0, 100.0, 1000.0))
    bench.after(10, gpu(0, 100.0, 3.0))
    assert bench.after(10, gpu(0, 900.0, 2003.0)).gpu_measured_j == 3000


def test_power_samples_are_added_up_as_trapezoids():
    bench = Bench()
    for seconds, power in ((0, 100.0), (10, 300.0), (10, 300.0), (5, 0.0)):
        bench.between(seconds, gpu(0, power))
    assert bench.total == EnergyTotals(gpu_measured_j=2000 + 3000 + 750)


def test_power_samples_too_far_apart_are_unknown_time():
    bench = Bench()
    bench.after(0, gpu(0, 100.0))
    assert bench.after(300, gpu(0, 100.0)).gpu_measured_j == 30000
    assert bench.after(301, gpu(0, 100.0)) == EnergyTotals(gpu_measured_j=30000, gpu_unknown_s=301)


@pytest.mark.parametrize("busy, watts", [(0.0, 35.0), (5.0, 35.0), (50.0, 175.0), (100.0, 350.0)])
def test_without_power_the_limit_times_the_load_is_an_estimate(busy, watts):
    bench = Bench()
    known = gpu(0, power_limit_w=350.0, utilization_pct=busy)
    bench.after(0, known)
    assert bench.after(60, known) == EnergyTotals(gpu_estimated_j=pytest.approx(60 * watts))
    assert bench.meter.report()[3:5] == (pytest.approx(watts), "estimated")


@pytest.mark.parametrize("known", [
    {}, {"power_limit_w": 350.0}, {"utilization_pct": 50.0}, {"power": math.nan},
    {"power": -5.0}, {"power": 3001.0}, {"power_limit_w": math.inf, "utilization_pct": 5.0},
    {"power_limit_w": 300.0, "utilization_pct": math.nan}])
def test_a_gpu_of_which_nothing_is_known_counts_as_unknown(known):
    bench = Bench()
    bench.after(0, gpu(0, **known), gpu(1, 100.0))
    assert bench.after(60, gpu(0, **known), gpu(1, 100.0)) == EnergyTotals(gpu_measured_j=6000,
                                                                     gpu_unknown_s=60)
    assert bench.meter.report().gpu_w is None  # not the half that is known


def test_an_estimated_end_makes_the_interval_an_estimate():
    bench = Bench()
    bench.after(0, gpu(0, 100.0))
    bench.after(10, gpu(0, power_limit_w=300.0, utilization_pct=100.0))
    assert bench.total == EnergyTotals(gpu_estimated_j=2000)


def test_a_silent_gpu_adds_nothing_until_it_speaks_again():
    bench = Bench()
    bench.after(0, gpu(0, 100.0, 1000.0))
    silent = gpu(0, 100.0, 1000.0, stale=True)
    assert bench.after(60, silent) == bench.after(60, silent) == EnergyTotals()
    assert bench.meter.report().gpu_w is None
    assert bench.after(60, gpu(0, 100.0, 7000.0)).gpu_measured_j == 6000


def test_what_gpus_draw_while_their_driver_hangs_is_counted_later_or_unknown(state):
    counting, sampled = gpu(0, 700.0, 1000.0), gpu(1, 500.0)
    source = CountingSource(counting, sampled)
    made, clock, _ = agent_with(source, state)
    made.look()
    source.gpus = None
    for _ in range(60):
        clock.now += 60
        made._tick(1.0)
        assert made.look().energy.gpu_w is None
    source.gpus = counting._replace(energy_j=1000.0 + 3660 * 700), sampled
    clock.now += 60
    total = made.look().energy.total
    assert (total.gpu_measured_j, total.gpu_unknown_s) == (3660 * 700, 3660)


def test_a_driver_that_says_nothing_costs_another_vendors_gpus_no_figure(state):
    broken, other = CountingSource(), CountingSource(gpu(0, 100.0, vendor="amd"))
    broken.gpus, other.vendor = None, "amd"
    made, clock, _ = agent_with(broken, state)
    made._gpus = b9agent.GpuSampler([broken, other])
    for _ in range(2):
        made.look()
        clock.now += 10
        made._tick(1.0)
    total = made.look().energy.total
    assert (total.gpu_measured_j, total.gpu_unknown_s) == (2000, 0)


def test_a_gpu_that_went_stops_counting_and_begins_anew():
    bench = Bench()
    bench.after(0, gpu(0, 100.0, 1000.0))
    assert bench.after(60) == bench.after(60, gpu(0, 100.0, 9000.0)) == EnergyTotals()
    assert bench.after(60, gpu(0, 100.0, 9600.0)).gpu_measured_j == 600


def test_a_sleeping_gpu_is_not_estimated_by_its_limit():
    bench = Bench()
    asleep = gpu(0, vendor="amd", asleep=True, power_limit_w=300.0, utilization_pct=0.0)
    bench.after(0, asleep)
    assert bench.after(60, asleep) == EnergyTotals()


def test_a_processors_own_gpu_is_in_the_processors_figure_but_for_nvidias():
    bench = Bench()
    chips = [gpu(0, 15.0, vendor="amd", integrated=True), gpu(1, 40.0, integrated=True)]
    bench.after(0, *chips)
    assert bench.after(10, *chips).gpu_measured_j == 400


def test_gpus_are_known_by_their_uuid_or_their_bus_and_not_by_their_place():
    bench = Bench()
    a, b = [Gpu(index, "amd", bus_id="0000:0%d:00.0" % index, energy_j=100.0) for index in (1, 2)]
    bench.after(0, a, b)
    bench.after(10, b._replace(index=1, energy_j=300.0), a._replace(index=2, energy_j=101.0))
    assert bench.total == EnergyTotals(gpu_measured_j=201)


def test_two_looks_within_a_second_are_one():
    bench = Bench()
    bench.after(0, gpu(0, 100.0, 1000.0), zones=package(10))
    bench.after(0.5, gpu(0, 100.0, 1200.0), zones=package(90))
    assert bench.total == EnergyTotals()
    assert bench.after(1, gpu(0, 100.0, 1300.0), zones=package(100)) == EnergyTotals(
        gpu_measured_j=300, cpu_measured_j=90)


@pytest.mark.parametrize("gpus, source, expected", [
    ([gpu(0, 100.0)], "amdgpu", True), ([gpu(0, 100.0, 5.0)], "nvml", False),
    ([gpu(0)], "nvml", False), ([], "nvml", False), ([gpu(0, 100.0)], "nvidia-smi", False),
    ([gpu(0, 100.0)], "amd-smi", False), ([gpu(0, 100.0)], "rocm-smi", False),
    ([gpu(0, 100.0, 5.0), gpu(1, 50.0)], "nvml", True), ([gpu(0, 9.0, stale=True)], "nvml", False),
    ([gpu(0, 9.0, asleep=True)], "amdgpu", False)])
def test_more_power_samples_are_wanted_only_where_they_tell_more(gpus, source, expected):
    sample = GpuSample(tuple(gpus), "nvidia", readings=(GpuReading(source, tuple(gpus)),))
    assert b9agent.wants_power_samples(sample) is expected


# -- carbon ------------------------------------------------------------------

def test_grams_are_kwh_times_pue_times_the_grid_and_less_what_is_certified():
    bench = Bench(policy=Policy(400.0, 75.0, 1.5, None))
    bench.after(0, gpu(0, 1000.0))
    for _ in range(12):
        bench.after(300, gpu(0, 1000.0))
    # 1 kWh, 1.5 kWh at the meter of the building, 600 g; a quarter of it is not certified.
    assert bench.total.co2e_g == pytest.approx(600.0)
    assert bench.total.market_co2e_g == pytest.approx(150.0)


def test_without_an_intensity_no_co2e_is_told_and_with_one_it_begins_at_zero():
    bench = Bench()
    bench.after(0, gpu(0, 100.0))
    assert bench.after(60, gpu(0, 100.0)).co2e_g is None
    assert Bench(policy=PLAIN._replace(grid_intensity=0.0)).total.co2e_g == 0.0


def test_each_interval_has_the_intensity_of_its_time(tmp_path):
    bench = Bench(tmp_path / "energy.json")
    for intensity in (None, 100.0, 1000.0, None):
        bench.policy = PLAIN._replace(grid_intensity=intensity)
        bench.restart()
        bench.after(0, gpu(0, 1200.0))
        bench.after(300, gpu(0, 1200.0))  # 0.1 kWh
        bench.meter.save()
    assert bench.total.gpu_measured_j == 4 * 360000
    assert bench.total.co2e_g == pytest.approx(10 + 100)
    assert bench.started.co2e_g is None and bench.started.gpu_measured_j == 360000


# -- what is kept --------------------------------------------------------------

def test_totals_are_kept_privately_and_at_most_every_five_minutes(tmp_path):
    path = tmp_path / "energy.json"
    bench = Bench(path)
    bench.after(0, gpu(0, 100.0))
    bench.after(299, gpu(0, 100.0))
    assert not path.exists()
    bench.after(1, gpu(0, 100.0))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and os.listdir(str(tmp_path)) == [path.name]
    kept = path.read_text()
    assert json.loads(kept)["total"]["gpu_measured_j"] == 30000
    bench.after(299, gpu(0, 100.0))
    assert path.read_text() == kept
    bench.after(1, gpu(0, 100.0))
    assert json.loads(path.read_text())["total"]["gpu_measured_j"] == 60000


GOOD = {"version": 1, "since_wall_s": 1.6e9, "total": dict(
    EnergyTotals(1.0, 2.0, 3.0, 4.0, None, None, 5.0)._asdict())}


def altered(**total):
    return json.dumps(dict(GOOD, total=dict(GOOD["total"], **total)))


def test_a_file_of_ours_is_taken_over(tmp_path):
    (tmp_path / "energy.json").write_text(json.dumps(GOOD))
    bench = Bench(tmp_path / "energy.json")
    assert bench.total == EnergyTotals(1.0, 2.0, 3.0, 4.0, None, None, 5.0)
    assert bench.meter.report().since_wall_s == 1.6e9 and bench.log == []


@pytest.mark.parametrize("text", [
    "", "{", "null", "[]", "7", '"x"', "\x00\xff", "[" * 100000, "9" * 5000, "{}",
    json.dumps(dict(GOOD, version=2)), json.dumps(dict(GOOD, version="1")),
    json.dumps(dict(GOOD, total=[])), json.dumps(dict(GOOD, total=list(EnergyTotals._fields))),
    json.dumps(dict(GOOD, total={})), json.dumps(dict(GOOD, since_wall_s=None)),
    json.dumps(dict(GOOD, since_wall_s="2026")), json.dumps({"version": 1, "total": GOOD["total"]}),
    altered(gpu_measured_j=-1), altered(cpu_measured_j=math.nan), altered(co2e_g=math.inf),
    altered(gpu_estimated_j=None), altered(gpu_estimated_j="5"), altered(gpu_estimated_j=True),
    altered(co2e_g=-0.5), altered(more=1), altered(gpu_measured_j=[]),
    altered(gpu_measured_j=10 ** 400), json.dumps(GOOD) + "x"], ids=lambda text: text[:12])
def test_a_file_that_is_not_ours_is_moved_aside_and_never_zeroed_in_silence(tmp_path, text):
    path = tmp_path / "energy.json"
    path.write_text(text)
    bench = Bench(path)
    assert bench.total == EnergyTotals() and bench.meter.report().since_wall_s == 1.7e9
    assert [(level, event) for level, event, _ in bench.log] == [("warning", "energy_file")]
    assert (tmp_path / "energy.json.bad").read_text() == text and not path.exists()
    bench.meter.save()
    assert json.loads(path.read_text())["since_wall_s"] == 1.7e9


def test_a_file_that_cannot_be_moved_aside_is_left_alone(tmp_path):
    path = tmp_path / "energy.json"
    path.write_text("precious?")
    (tmp_path / "energy.json.bad").mkdir()
    bench = Bench(path)
    bench.meter.save()
    assert path.read_text() == "precious?" and "nothing will be kept" in bench.log[0][2]["do"]


def test_a_disk_that_takes_nothing_costs_the_file_and_one_line(tmp_path):
    folder = tmp_path / "state"
    bench = Bench(folder / "energy.json")  # the folder is not there: nothing can be written
    bench.after(0, gpu(0, 100.0))
    for _ in range(4):
        bench.after(300, gpu(0, 100.0))
    assert [(level, event) for level, event, _ in bench.log] == [("error", "energy_not_kept")]
    assert bench.total.gpu_measured_j == 120000
    folder.mkdir()
    bench.after(300, gpu(0, 100.0))
    assert json.loads((folder / "energy.json").read_text())["total"]["gpu_measured_j"] == 150000


# -- whatever comes ------------------------------------------------------------

def test_totals_never_fall_and_what_is_kept_is_what_was_told(tmp_path_factory):
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies
    figure = some.one_of(some.none(), some.floats(), some.floats(0, 1000), some.just(250.0))
    gpus = some.lists(some.builds(
        gpu, some.integers(0, 2), figure, figure, power_limit_w=figure, utilization_pct=figure,
        stale=some.booleans(), asleep=some.booleans()), max_size=3)
    zones = some.dictionaries(some.sampled_from(["intel-rapl:0", "intel-rapl:1"]), some.builds(
        RaplZone, some.integers(0, RANGE_UJ), some.sampled_from([RANGE_UJ, 65532610987, 0])))
    looks = some.lists(some.tuples(some.floats(0, 4000), figure, gpus, zones, some.booleans(),
                                   some.booleans()), max_size=12)
    path = tmp_path_factory.mktemp("energy") / "energy.json"

    @hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=200)
    @hypothesis.given(looks)
    def holds(looks):
        b9agent.remove_file(str(path))
        bench = Bench(path, Policy(321.0, 40.0, 1.2, None))
        for seconds, busy, cards, counters, whole, restarts in looks:
            old = bench.total
            if whole:
                bench.after(seconds, *cards, busy=busy, zones=counters)
            else:
                bench.between(seconds, *cards, zones=counters)
            new = bench.total
            assert all(a <= b < math.inf for a, b in zip(old, new)), (old, new)
            # At 3 kW a GPU and 1 kW a counter nothing can have drawn more than this.
            assert sum(new[:4]) - sum(old[:4]) <= 4000 * len(looks) * (3 * 3000 + 2 * 1000)
            grams = sum(new[:4]) / 3.6e6 * 1.2 * 321.0
            assert new.co2e_g == pytest.approx(grams) and new.market_co2e_g <= new.co2e_g
            if restarts:
                bench.meter.save()
                assert b9agent.parse_energy_file(path.read_text())[1] == new
                bench.restart()
                assert bench.total == new and sum(bench.started[:6]) == 0
        assert bench.log == []

    holds()


def test_a_restart_in_the_middle_equals_one_run(tmp_path):
    straight, stopped = Bench(), Bench(tmp_path / "energy.json")
    for number in range(8):
        look = gpu(0, 100.0 + number, 1000.0 + 60 * number), gpu(1, 50.0 * number)
        for bench in (straight, stopped):
            bench.after(60, *look, busy=10.0 * number, zones=package(70 * number))
        if number in (3, 5):
            stopped.meter.save()
            stopped.restart()
            stopped.after(0, *look, busy=10.0 * number, zones=package(70 * number))
    assert stopped.total == pytest.approx(straight.total, rel=1e-12)
    assert stopped.started.gpu_measured_j < stopped.total.gpu_measured_j


def test_whatever_the_file_holds_it_is_figures_or_nothing():
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies
    good = json.dumps(GOOD)
    values = some.recursive(some.none() | some.booleans() | some.floats() | some.integers()
                            | some.text(max_size=5),
                            lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner),
                            max_leaves=4)

    @hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=300)
    @hypothesis.given(some.integers(0, len(good)), some.integers(0, 9), some.text(max_size=4),
                      some.sampled_from(sorted(GOOD["total"])), values)
    def holds(at, length, put, name, value):
        for text in (good[:at] + put + good[at + length:], altered(**{name: value}),
                     json.dumps(dict(GOOD, total=value)), json.dumps(value)):
            kept = b9agent.parse_energy_file(text)
            if kept is not None:
                assert all(figure is None or 0 <= figure < math.inf for figure in kept[1])
                assert None not in kept[1][:4] and 0 <= kept[0] < math.inf

    holds()


# -- what status says ------------------------------------------------------------

def test_status_names_units_and_whether_it_was_measured():
    bench = Bench(policy=Policy(500.0, 100.0, 1.0, None))
    bench.after(0, gpu(0, 360.0), zones=package(0))
    bench.after(100, gpu(0, 360.0), zones=package(3600))
    settings = b9agent.load_settings({
        "config": os.devnull, "grid_intensity": "500", "renewable_pct": "100",
        "energy_certificate": "GO 4711"}, {}).settings
    said = b9agent.energy_payload(bench.meter.report(), settings)
    figures = {"gpu_measured_wh": 10.0, "gpu_estimated_wh": 0.0, "cpu_measured_wh": 1.0,
               "cpu_estimated_wh": 0.0, "co2e_g": 5.5, "market_co2e_g": 0.0, "gpu_unknown_s": 0.0,
               "co2e_basis": "measured"}
    assert said == {
        "since": "2023-11-14T22:13:20Z", "gpu_w": 360.0, "gpu_basis": "measured", "cpu_w": 36.0,
        "cpu_basis": "measured", "started": figures, "total": figures,
        "grid_intensity_g_per_kwh": 500.0, "renewable_pct": 100.0, "certificate": "GO 4711",
        "pue": 1.0}
    bench.after(100, gpu(0, 360.0), busy=50.0)
    said = b9agent.energy_payload(bench.meter.report(), settings)
    assert said["total"]["co2e_basis"] == "estimated" and said["cpu_basis"] == "estimated"


def test_before_the_first_look_status_has_the_settings_alone():
    settings = b9agent.load_settings({"config": os.devnull}, {}).settings
    assert b9agent.energy_payload(None, settings) == {
        "grid_intensity_g_per_kwh": None, "renewable_pct": 0.0, "certificate": None, "pue": 1.0}


# -- in an agent ---------------------------------------------------------------------


class CountingSource(b9agent.GpuSource):
    vendor = "nvidia"

    def __init__(self, *gpus):
        self.gpus, self.reads = gpus, 0

    def present(self):
        return True

    def read(self):
        self.reads += 1
        return GpuReading("nvml", self.gpus)


def agent_with(source, state):
    """(agent, clock): an agent that writes nothing, and sees these GPUs."""
    loaded = b9agent.load_settings({"config": os.devnull, "state_dir": str(state), "token": "-" * 9},
                                   {})
    log, clock = Lines(), Clock()
    made = b9agent.Agent(loaded, log, keep=False)
    made._gpus = b9agent.GpuSampler([source])
    made._energy = EnergyMeter(None, loaded.settings, log, clock)
    return made, clock, log


def test_between_keepalives_power_is_sampled_every_ten_seconds(state):
    source = CountingSource(gpu(0, 100.0))
    made, clock, log = agent_with(source, state)
    made._tick(1.0)
    assert source.reads == 0  # the first look is the keepalive's
    made.look()
    for _ in range(6):
        clock.now += 5
        made._tick(1.0)
    assert source.reads == 1 + 3 and log == []
    assert made.look().energy.total.gpu_measured_j == 3000


@pytest.mark.parametrize("gpus", [(), (gpu(0, 100.0, 5.0),), (gpu(0),)])
def test_where_power_samples_tell_nothing_more_no_driver_is_asked(gpus, state):
    source = CountingSource(*gpus)
    made, clock, log = agent_with(source, state)
    made.look()
    clock.now += 60
    made._tick(1.0)
    assert source.reads == 1 and log == []


def test_status_tells_of_one_look_though_the_next_comes_meanwhile(state):
    source = CountingSource(gpu(0, 100.0))
    made, _, _ = agent_with(source, state)
    made.look()
    facts = made.facts

    def meanwhile():
        source.gpus = (gpu(0, 200.0),)
        made.look()
        return facts()
    made.facts = meanwhile
    assert [one["offered"] for one in made.status()["gpus"]] == [True]


def test_a_defect_in_the_sums_costs_no_keepalive(state):
    made, clock, log = agent_with(CountingSource(gpu(0, "a text")), state)
    assert made.keepalive_payload()["machine_id"] and made.status()["energy"]["total"]
    clock.now += 60
    made._tick(1.0)
    assert [event for _, event, _ in log] == ["defect", "defect"]


# -- a real agent ------------------------------------------------------------------

def energy_of(home):
    done = run_agent(home, "status", "--json")
    return json.loads(done.out).get("energy", {}) if done.code == 0 else {}


@pytest.fixture
def running(agent, embedded):
    """running(**environment) starts an agent that is kept alive every second."""
    machine_id, token = embedded.create()

    def start(*arguments, **extra):
        return agent("run", "--gateway-port", embedded.port, "--gateway-host", "127.0.0.1",
                     "--pool-name", "gpu", "--control-port", "0", "--keepalive-interval", "1",
                     "--machine-id", machine_id, *arguments, BETA9_TOKEN=token, **extra)
    return start


def cpu_wh(energy, which="total"):
    figures = energy.get(which, {})
    return figures.get("cpu_measured_wh", 0) + figures.get("cpu_estimated_wh", 0)


def test_a_real_agent_keeps_its_totals_over_a_stop_and_a_kill(running, home, state):
    first = running(B9AGENT_GRID_INTENSITY="400", B9AGENT_CPU_WATTS="10000")
    wait_until(lambda: cpu_wh(energy_of(home)) > 1, "a watt-hour")
    assert first.stop() == 0
    path = state / "energy.json"
    kept = json.loads(path.read_text())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    joules = kept["total"]["cpu_measured_j"] + kept["total"]["cpu_estimated_j"]
    assert joules > 3600 and kept["total"]["co2e_g"] > 0
    second = running(B9AGENT_GRID_INTENSITY="400", B9AGENT_CPU_WATTS="10000")
    grown = wait_until(lambda: cpu_wh(energy_of(home), "started") > 0 and energy_of(home),
                       "more energy")
    assert cpu_wh(grown) > joules / 3600 > 0
    second.signal(signal.SIGKILL)
    second.wait()
    assert json.loads(path.read_text()) == kept  # killed within five minutes
    running()
    again = wait_until(lambda: energy_of(home).get("total") and energy_of(home), "a look")
    assert cpu_wh(again) >= joules / 3600 - 0.001 and again["since"] == grown["since"]
    assert again["total"]["co2e_g"] > 0 and again["started"]["co2e_g"] is None


def test_a_real_agent_whose_disk_takes_nothing_is_kept_alive_and_says_so_once(
        embedded, home, state):
    machine_id, token = embedded.create()
    state.mkdir(mode=0o700)
    # No file may grow: what a full disk is to a program.
    command = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *agent_command(
        "run", "--gateway-host", "127.0.0.1", "--gateway-port", embedded.port, "--pool-name", "gpu",
        "--control-port", "0", "--machine-id", machine_id)]
    with Program(command, environment(home, BETA9_TOKEN=token)) as program:
        program.wait_line(r"\bready\b")
        assert program.stop() == 0
    said = [line for line in program.lines() if "energy" in line]
    assert len(said) == 1 and "error energy_not_kept" in said[0]
    assert not [name for name in os.listdir(str(state)) if name.startswith("energy")]


def test_a_real_agent_moves_a_broken_file_aside(running, state):
    state.mkdir(mode=0o700)
    (state / "energy.json").write_text("{")
    program = running()
    program.wait_line(r"warning energy_file .*energy\.json\.bad")
    program.wait_line(r"\bready\b")
    assert program.stop() == 0
    assert (state / "energy.json.bad").read_text() == "{"
    assert json.loads((state / "energy.json").read_text())["version"] == 1


def test_a_dry_run_neither_moves_nor_writes(home, state):
    state.mkdir(mode=0o700)
    (state / "energy.json").write_text("{")
    done = run_agent(home, "run", "--dry-run")
    assert done.code == 0 and "energy" not in done.err
    assert os.listdir(str(state)) == ["energy.json"] and (state / "energy.json").read_text() == "{"
