"""Limits of tenants: what is reserved before a request and settled after it, beside a model of the
limits that is too simple to be wrong; and the queue in which tenants wait in turn."""
import itertools
import json
import math
import os
import stat
import threading

import pytest
from hypothesis import HealthCheck, settings as hypothesis_settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import b9agent
from b9agent import (FairQueue, GPU_LEAST_S, GPU_SLICE_S, Ledger, LimitReached, Limits, Tenant)

DAY0 = 20000 * 86400.0
SETTINGS = hypothesis_settings(derandomize=True, database=None, deadline=None, max_examples=300,
                               stateful_step_count=60,
                               suppress_health_check=list(HealthCheck))


class Clock:
    """Both clocks of a ledger; the wall's can be set."""

    def __init__(self, wall=DAY0 + 3600.0):
        self.now, self.wall = 1000.0, wall

    def pass_s(self, seconds):
        self.now += seconds
        self.wall += seconds


class Lines(list):
    def __call__(self, level, event, **fields):
        self.append((level, event, fields))


def ledger(clock, path=None, price=None, log=None):
    return Ledger(path and str(path), log if log is not None else Lines(), price, lambda: clock.now,
                  lambda: clock.wall)


def tenant(name="ada", **limits):
    return Tenant(name, limits=Limits(**limits))


def refusal(call, *arguments):
    with pytest.raises(LimitReached) as caught:
        call(*arguments)
    return caught.value


# -- each limit ----------------------------------------------------------

def test_what_is_settled_is_what_is_told():
    clock = Clock()
    book = ledger(clock, price=0.5)
    grant = book.reserve(tenant(), 100, None, 500)
    assert grant.output_tokens == 500
    book.begin(grant, 2)
    clock.pass_s(3.0)
    bill = book.settle(grant, 40, 7)
    assert bill == (6.0, 3.0, 3.0)
    assert book.settle(grant, 1000, 1000) == bill  # once
    assert book.usage() == {"ada": {"requests": 1, "prompt_tokens": 40, "completion_tokens": 7,
                                    "gpu_seconds": 6.0, "usd": 3.0, "running": 0}}


def test_a_tenant_without_limits_is_never_refused_and_never_to_be_extended():
    clock = Clock()
    book = ledger(clock, price=1.0)
    grants = [book.reserve(tenant(), 10**9, 10**9, 1) for _ in range(100)]
    for grant in grants:
        book.begin(grant, 8)
        assert grant.extend_at_s == math.inf
        book.extend(grant)


def test_requests_at_once_count_until_they_are_settled():
    book = ledger(Clock())
    one = tenant(concurrent_requests=2)
    first, second = (book.reserve(one, 1, 1, 1) for _ in range(2))
    refused = refusal(book.reserve, one, 1, 1, 1)
    assert (refused.code, refused.status, refused.retry_after_s) == ("concurrent_requests", 429, 1)
    assert "ada" in refused.what and "concurrent_requests" in refused.what
    assert refused.numbers == {"limit": 2, "used": 2, "held": 0, "asked": 1}
    book.settle(first, 1, 1)
    book.reserve(one, 1, 1, 1)
    assert second is not None


def test_requests_per_minute_are_those_of_any_sixty_seconds():
    """A counter that is emptied each minute would let twice as many through around its turn."""
    clock = Clock()
    book, one, let_in = ledger(clock), tenant(requests_per_minute=3), []
    for step in range(4000):
        clock.pass_s(0.37)
        try:
            book.settle(book.reserve(one, 1, 1, 1), 1, 1)
            let_in.append(clock.now)
        except LimitReached as refused:
            assert 0 < refused.retry_after_s <= 61
            waited = Clock()
            waited.now = clock.now + refused.retry_after_s
            assert sum(at >= waited.now - 60.0 for at in let_in) < 3, "Retry-After is long enough"
    worst = max(sum(start <= at <= start + 60.0 for at in let_in) for start in let_in)
    assert worst == 3
    assert len(let_in) > 4000 * 0.37 / 60 * 3 * 0.95


def test_a_refused_request_costs_nothing():
    clock = Clock()
    book = ledger(clock, price=1.0)
    one = tenant(requests_per_minute=2, tokens_per_day=100, concurrent_requests=5)
    for _ in range(50):
        assert refusal(book.reserve, one, 99, 2, 1).code == "tokens_per_day"
    book.settle(book.reserve(one, 60, 40, 1), 0, 0)
    book.settle(book.reserve(one, 60, 40, 1), 0, 0)
    assert book.usage()["ada"]["requests"] == 2


def test_tokens_of_a_day_are_reserved_whole_so_that_a_burst_cannot_overshoot():
    book, one = ledger(Clock()), tenant(tokens_per_day=1000)
    grants = []
    with pytest.raises(LimitReached) as caught:
        for _ in range(100):
            grants.append(book.reserve(one, 100, 200, 1))
    assert len(grants) == 3
    refused = caught.value
    assert refused.code == "tokens_per_day" and refused.status == 429
    assert refused.numbers == {"limit": 1000, "used": 0, "held": 900, "asked": 300}
    assert refused.retry_after_s == b9agent.HELD_RETRY_S, "its own requests hold it: soon"
    for grant in grants:
        book.settle(grant, 90, 10)
    assert book.reserve(one, 100, 600, 1).output_tokens == 600


def test_who_does_not_say_how_long_an_answer_may_be_gets_what_is_left():
    book = ledger(Clock())
    assert book.reserve(tenant("a", tokens_per_day=1000), 100, None, 512).output_tokens == 512
    assert book.reserve(tenant("b", tokens_per_day=1000), 900, None, 512).output_tokens == 100
    assert book.reserve(tenant("c", tokens_per_day=1000, max_output_tokens=64), 100, None,
                        512).output_tokens == 64
    assert book.reserve(tenant("d", max_output_tokens=64), 1, 4096, 512).output_tokens == 64
    assert refusal(book.reserve, tenant("e", tokens_per_day=1000), 1000, None, 512)
    assert book.reserve(tenant("f", tokens_per_day=1000), 1000, 0, 512).output_tokens == 0, "embed"


def test_after_the_days_tokens_the_next_day_is_the_time_to_come_again():
    clock = Clock(wall=DAY0 + 86400.0 - 600.5)
    book, one = ledger(clock), tenant(tokens_per_day=100)
    book.settle(book.reserve(one, 50, 50, 1), 50, 50)
    refused = refusal(book.reserve, one, 1, 1, 1)
    assert refused.retry_after_s == 601
    clock.pass_s(refused.retry_after_s)
    book.reserve(one, 1, 1, 1)


def test_money_that_is_out_is_402_and_says_so():
    clock = Clock()
    book, one = ledger(clock, price=0.01), tenant(usd_per_day=0.05)
    grant = book.reserve(one, 1, 1, 1)
    book.begin(grant, 1)
    assert grant.extend_at_s == clock.now + 5.0 - b9agent.GPU_SPARE_S, "what is left, if that is less"
    clock.pass_s(4.5)
    refused = refusal(book.extend, grant)
    assert (refused.code, refused.status) == ("usd_per_day", 402)
    assert book.settle(grant, 1, 1).usd == pytest.approx(0.045)
    refused = refusal(book.reserve, one, 1, 1, 1)
    assert (refused.code, refused.status) == ("usd_per_day", 402)
    assert refused.retry_after_s > 80000
    assert refused.numbers["limit"] == 0.05 and refused.numbers["used"] == 0.045


def test_gpu_seconds_are_reserved_by_slices():
    clock = Clock()
    book, one = ledger(clock), tenant(gpu_seconds_per_day=100)
    first, second = book.reserve(one, 1, 1, 1), book.reserve(one, 1, 1, 1)
    book.begin(first, 2)  # 60 of 100
    assert first.extend_at_s == clock.now + GPU_SLICE_S - b9agent.GPU_SPARE_S
    book.begin(second, 2)  # the other 40
    assert second.extend_at_s == clock.now + 20.0 - b9agent.GPU_SPARE_S
    refused = refusal(book.reserve, one, 1, 1, 1)
    assert (refused.code, refused.status) == ("gpu_seconds_per_day", 429)
    assert refused.retry_after_s == b9agent.HELD_RETRY_S
    clock.pass_s(19.0)  # both share: 19 each
    book.extend(second)
    assert book.usage()["ada"]["gpu_seconds"] == pytest.approx(19.0)
    book.settle(first, 1, 1)
    book.settle(second, 1, 1)
    assert book.usage()["ada"]["gpu_seconds"] == pytest.approx(38.0)
    book.begin(book.reserve(one, 1, 1, 1), 2)


def test_a_request_that_was_refused_at_its_begin_leaves_nothing_behind():
    book, one = ledger(Clock()), tenant(gpu_seconds_per_day=3)
    grant = book.reserve(one, 5, 5, 5)
    assert refusal(book.begin, grant, 4).code == "gpu_seconds_per_day"
    book.extend(grant)  # it never began
    assert book.settle(grant, 0, 0)[:2] == (0.0, 0.0)
    other = book.reserve(one, 5, 5, 5)
    book.begin(other, 1)
    assert other.held_gpu_s == 3.0


def test_a_cpu_alone_costs_no_gpu_seconds():
    clock = Clock()
    book, one = ledger(clock, price=1.0), tenant(gpu_seconds_per_day=5, usd_per_day=5)
    grant = book.reserve(one, 1, 1, 1)
    book.begin(grant, 0)
    clock.pass_s(1000.0)
    book.extend(grant)
    assert book.settle(grant, 1, 1)[:2] == (0.0, 0.0)


def test_requests_that_are_computed_together_share_the_time():
    clock = Clock()
    book = ledger(clock)
    first, second = book.reserve(tenant("a"), 1, 1, 1), book.reserve(tenant("b"), 1, 1, 1)
    book.begin(first, 1)
    clock.pass_s(10.0)
    book.begin(second, 1)
    clock.pass_s(10.0)
    assert book.settle(first, 1, 1).gpu_seconds == pytest.approx(15.0)
    clock.pass_s(5.0)
    assert book.settle(second, 1, 1).gpu_seconds == pytest.approx(10.0)


# -- days, and what is kept ----------------------------------------------

def test_a_request_over_midnight_counts_on_the_day_on_which_it_ends():
    clock = Clock(wall=DAY0 + 86400.0 - 5.0)
    book, one = ledger(clock), tenant(tokens_per_day=100)
    grant = book.reserve(one, 50, 50, 1)
    clock.pass_s(10.0)
    assert refusal(book.reserve, one, 1, 1, 1).retry_after_s == b9agent.HELD_RETRY_S
    book.settle(grant, 50, 40)
    assert book.usage()["ada"]["completion_tokens"] == 40
    book.reserve(one, 5, 5, 1)


def test_a_clock_that_is_set_back_opens_no_new_day():
    clock = Clock(wall=DAY0 + 86400.0 + 60.0)
    book, one = ledger(clock), tenant(tokens_per_day=100)
    book.settle(book.reserve(one, 50, 50, 1), 50, 50)
    for _ in range(3):
        clock.wall -= 120.0  # yesterday
        assert refusal(book.reserve, one, 1, 1, 1)
        clock.wall += 120.0
        assert refusal(book.reserve, one, 1, 1, 1)
    clock.wall -= 10 * 86400.0  # it was wrong before
    book.reserve(one, 1, 1, 1)


@pytest.mark.parametrize("wall, used", [
    (DAY0 + 100.0, 30), (DAY0 - 100.0, 30), (DAY0 + 86400.0, 0), (DAY0 - 86400.0 * 3, 0)])
def test_what_was_used_is_known_after_a_restart(tmp_path, wall, used):
    clock, path = Clock(wall=DAY0 + 50.0), tmp_path / "usage.json"
    book = ledger(clock, path)
    book.settle(book.reserve(tenant(), 50, 50, 1), 20, 10)
    book.save()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.listdir(tmp_path) == ["usage.json"]
    clock.wall = wall
    one = tenant(tokens_per_day=100)
    again = ledger(clock, path)
    assert again.reserve(one, 0, None, 10**6).output_tokens == 100 - used


def test_it_is_written_only_where_something_has_changed(tmp_path):
    clock, path = Clock(), tmp_path / "usage.json"
    book = ledger(clock, path)
    book.save()
    assert not path.exists()
    book.settle(book.reserve(tenant(), 1, 1, 1), 1, 1)
    book.save()
    path.unlink()
    book.save()
    assert not path.exists()
    clock.pass_s(86400.0)
    book.save()
    assert json.loads(path.read_text())["tenants"] == {}, "a day's turn forgets who is idle"


@pytest.mark.parametrize("text", [
    "", "nonsense", "[]", '{"day": "x", "tenants": {}}', '{"day": 20000, "tenants": []}',
    '{"day": 20000, "tenants": {"ada": {}}}', '{"day": true, "tenants": {}}',
    '{"day": 20000, "tenants": {"ada": {"requests": -1, "prompt_tokens": 0, "completion_tokens": 0, '
    '"gpu_seconds": 0, "usd": 0}}}',
    '{"day": 20000, "tenants": {"ada": {"requests": NaN, "prompt_tokens": 0, "completion_tokens": 0, '
    '"gpu_seconds": 0, "usd": 0}}}'])
def test_a_broken_file_of_usage_costs_the_figures_and_one_line(tmp_path, text):
    path, log = tmp_path / "usage.json", Lines()
    path.write_text(text)
    book = ledger(Clock(), path, log=log)
    assert book.usage() == {}
    assert [event for _, event, _ in log] == ["usage_file"]
    book.settle(book.reserve(tenant(), 1, 1, 1), 1, 1)
    book.save()
    assert ledger(Clock(), path, log=log).usage()["ada"]["requests"] == 1
    assert len(log) == 1


def test_a_disk_that_takes_nothing_is_told_of_once_and_tried_again(tmp_path):
    folder, log = tmp_path / "gone", Lines()
    book = ledger(Clock(), folder / "usage.json", log=log)
    book.settle(book.reserve(tenant(), 1, 1, 1), 1, 1)
    for _ in range(3):
        book.save()
    assert [event for _, event, _ in log] == ["usage_not_kept"]
    folder.mkdir()
    book.save()
    assert json.loads((folder / "usage.json").read_text())["tenants"]["ada"]["requests"] == 1


def test_many_threads_at_once_lose_nothing():
    book, one, passed = ledger(Clock()), tenant(tokens_per_day=40000), []

    def work():
        for _ in range(400):
            try:
                grant = book.reserve(one, 10, 10, 1)
            except LimitReached:
                continue
            book.begin(grant, 1)
            book.settle(grant, 10, 10)
            passed.append(1)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    used = book.usage()["ada"]
    assert used["prompt_tokens"] + used["completion_tokens"] == 20 * len(passed) <= 40000
    assert len(passed) == 2000 and used["running"] == 0


# -- any order of events -------------------------------------------------

class AnyOrder(RuleBasedStateMachine):
    """The model: lists of what was let in and what was billed, from which every limit is checked
    by counting.  GPU time is the time that passes, split among those that run."""

    @initialize(limits=st.lists(st.fixed_dictionaries({}, optional={
        "requests_per_minute": st.integers(1, 4), "concurrent_requests": st.integers(1, 3),
        "tokens_per_day": st.integers(1, 400), "gpu_seconds_per_day": st.integers(1, 150),
        "usd_per_day": st.floats(0.01, 1.5), "max_output_tokens": st.integers(1, 50)}),
        min_size=1, max_size=3), price=st.sampled_from([None, 0.01]), gpus=st.sampled_from([0, 1, 2]),
        start=st.floats(0, 86399))
    def begin_with(self, limits, price, gpus, start):
        self.clock, self.gpus = Clock(wall=DAY0 + start), gpus
        self.price = price or 0.0
        self.book = ledger(self.clock, price=price)
        self.tenants = [tenant("t%d" % number, **fields) for number, fields in enumerate(limits)]
        self.live, self.running = [], {}     # grants; grant -> its GPU seconds since the last bill
        self.bounds = {}                     # id of a grant -> the most its prompt can be
        self.admitted = {one.name: [] for one in self.tenants}
        self.billed = []                     # (name, day, tokens, GPU seconds)
        self.busy_s, self.top_day, self.turns = 0.0, int(self.clock.wall // 86400), 0
        self.total = 0.0

    def day(self):
        day = int(self.clock.wall // 86400)
        if day > self.top_day or day < self.top_day - 1:
            self.top_day, self.turns = day, self.turns + 1
        return self.turns  # a clock may come to the same date twice

    def charge(self, grant):
        if grant in self.running:
            self.billed.append((grant.tenant.name, self.day(), 0, self.running[grant]))
            self.total += self.running[grant]
            self.running[grant] = 0.0

    def elapse(self, seconds):
        """In steps, so that whoever is due is extended when it is due."""
        left = seconds
        while left > 0:
            due = min([grant.extend_at_s for grant in self.running] + [math.inf]) - self.clock.now
            step = min(left, max(due, 0.0))
            self.clock.pass_s(step)
            if self.running:
                self.busy_s += step
                for grant in self.running:
                    self.running[grant] += self.gpus * step / len(self.running)
            left -= step
            for grant in [each for each in self.running if each.extend_at_s <= self.clock.now]:
                self.charge(grant)
                try:
                    self.book.extend(grant)
                    assert grant.extend_at_s > self.clock.now
                except LimitReached as refused:
                    assert refused.code in ("gpu_seconds_per_day", "usd_per_day")
                    self.end(grant, 0, 0)

    def end(self, grant, prompt, completion):
        self.charge(grant)
        self.running.pop(grant, None)
        self.live.remove(grant)
        bill = self.book.settle(grant, prompt, completion)
        self.billed.append((grant.tenant.name, self.day(), prompt + completion, 0.0))
        assert self.book.settle(grant, 10**6, 10**6) == bill

    @rule(which=st.integers(0, 2), prompt=st.integers(0, 120),
          output=st.one_of(st.none(), st.integers(0, 120)))
    def reserve(self, which, prompt, output):
        one = self.tenants[which % len(self.tenants)]
        before = self.book.usage().get(one.name)
        try:
            grant = self.book.reserve(one, prompt, output, 60)
        except LimitReached as refused:
            assert refused.retry_after_s >= 1 and refused.status == (
                402 if refused.code == "usd_per_day" else 429)
            assert (before or {"running": 0}) == (self.book.usage().get(one.name)
                                                  if before else {"running": 0})
            return
        if output is not None and one.limits.max_output_tokens is None:
            assert grant.output_tokens == output
        self.live.append(grant)
        self.bounds[id(grant)] = prompt
        self.admitted[one.name].append(self.clock.now)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 50))
    def begin(self, which):
        grant = self.live[which % len(self.live)]
        if grant in self.running:
            self.book.begin(grant, self.gpus)
            return
        try:
            self.book.begin(grant, self.gpus)
            self.running[grant] = 0.0
        except LimitReached:
            self.end(grant, 0, 0)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 50), share=st.floats(0, 1))
    def settle(self, which, share):
        grant = self.live[which % len(self.live)]
        self.end(grant, int(self.bounds[id(grant)] * share), int(grant.output_tokens * share))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 50))
    def extend_early(self, which):
        grant = self.live[which % len(self.live)]
        self.charge(grant)
        try:
            self.book.extend(grant)
        except LimitReached:
            self.end(grant, 0, 0)

    @rule(seconds=st.one_of(st.floats(0, 5), st.floats(0, 90), st.sampled_from([60.0, 3600.0])))
    def pass_time(self, seconds):
        self.elapse(seconds)

    @rule()
    def next_day(self):
        self.elapse((self.top_day + 1) * 86400.0 - self.clock.wall + 1.0)

    @rule(seconds=st.floats(-80000, 80000))
    def step_the_wall_clock(self, seconds):
        self.clock.wall += seconds

    @invariant()
    def no_limit_is_passed(self):
        today = self.day()
        for one in self.tenants:
            limits = one.limits
            mine = [grant for grant in self.live if grant.tenant is one]
            rows = [row for row in self.billed if row[0] == one.name and row[1] == today]
            tokens, gpu_s = sum(row[2] for row in rows), math.fsum(row[3] for row in rows)
            told = self.book.usage().get(one.name, dict.fromkeys(b9agent.USAGE_FIELDS, 0))
            assert told["prompt_tokens"] + told["completion_tokens"] == tokens
            assert told["gpu_seconds"] == pytest.approx(gpu_s, abs=1e-6)
            assert told["usd"] == pytest.approx(gpu_s * self.price, abs=1e-6)
            gpu_s += sum(self.running.get(grant, 0.0) for grant in mine)
            if limits.tokens_per_day is not None:
                assert tokens <= limits.tokens_per_day
            if limits.gpu_seconds_per_day is not None:
                assert gpu_s <= limits.gpu_seconds_per_day + 1e-6
            if limits.usd_per_day is not None and self.price:
                assert gpu_s * self.price <= limits.usd_per_day + 1e-6
            if limits.concurrent_requests is not None:
                assert len(mine) <= limits.concurrent_requests
            if limits.requests_per_minute is not None:
                times = self.admitted[one.name]
                assert sum(at >= self.clock.now - 60.0 for at in times) <= limits.requests_per_minute

    def teardown(self):
        if not hasattr(self, "book"):
            return
        for grant in list(self.live):
            self.end(grant, 0, 0)
        assert self.total == pytest.approx(self.busy_s * self.gpus, abs=1e-5)
        for account in self.book._accounts.values():
            assert (account.active, account.held_tokens, account.held_gpu_s) == (0, 0, 0.0)
        assert self.book._running == 0


AnyOrder.TestCase.settings = SETTINGS
test_no_order_of_events_lets_a_tenant_past_a_limit = AnyOrder.TestCase


# -- waiting in turn -----------------------------------------------------

class Item:
    def __init__(self, tenant_name, model="m", number=0):
        self.tenant_name, self.model, self.number = tenant_name, model, number

    def __repr__(self):
        return "%s%d" % (self.tenant_name, self.number)


def queue_of(text, priority="normal"):
    queue = FairQueue()
    for number, name in enumerate(text):
        queue.push(Item(name, number=number), name, priority, "m")
    return queue


def drained(queue, ready=lambda item: True):
    return "".join(item.tenant_name for item in iter(lambda: queue.pop(ready), None))


def test_tenants_take_turns_whoever_came_first():
    queue = queue_of("aaaaabbc")
    assert len(queue) == 8 and queue.waiting_of("a") == 5 and queue.waiting_of("z") == 0
    assert drained(queue) == "abcabaaa"
    assert len(queue) == 0 and queue.pop(lambda item: True) is None


def test_a_higher_class_goes_first_where_it_can_go():
    queue = FairQueue()
    low, high = Item("l", "small"), Item("h", "big")
    queue.push(low, "l", "low", "small")
    queue.push(high, "h", "high", "big")
    assert queue.pop(lambda item: item.model == "small") is low
    queue.push(low, "l", "low", "small")
    assert queue.pop(lambda item: True) is high


def test_of_one_model_the_first_of_a_tenant_goes_first():
    queue = FairQueue()
    items = [Item("a", model, number) for number, model in enumerate(["x", "x", "y"])]
    for item in items:
        queue.push(item, "a", "normal", item.model)
    asked = []
    assert queue.pop(lambda item: asked.append(item) or item is items[1]) is None
    assert asked == [items[0], items[2]], "a second one of a model that is busy is not asked for"
    assert queue.pop(lambda item: item.model == "y") is items[2]


def test_what_is_taken_out_is_gone():
    queue = queue_of("ab")
    first = queue.pop(lambda item: True)
    queue.push(first, "a", "normal", "m")
    queue.remove(first)
    queue.remove(first)
    assert len(queue) == 1 and drained(queue) == "b" and queue.waiting_of("a") == 0


def test_every_mix_of_arrivals_and_turns_is_fair():
    """All short histories of three tenants: between two turns of one, each that was waiting all
    the while has had one."""
    for history in itertools.product("abc.", repeat=7):
        queue, waiting_since, turns = FairQueue(), {}, []
        for step, event in enumerate(list(history) + ["."] * 7):
            if event != ".":
                queue.push(Item(event, number=step), event, "normal", "m")
                waiting_since.setdefault(event, step)
                continue
            item = queue.pop(lambda each: True)
            if item is None:
                assert not waiting_since
                continue
            name = item.tenant_name
            before = [at for at, other in turns if other == name]
            for other, since in waiting_since.items():
                if other != name and before and since < before[-1]:
                    assert any(at > before[-1] and who == other for at, who in turns), history
            turns.append((step, name))
            if not queue.waiting_of(name):
                del waiting_since[name]
        assert len(queue) == 0
