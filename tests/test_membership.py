"""Membership: the step function with a clock and a client of the test's own, and its loop."""
import io
import itertools
import time

import pytest

import b9agent
from b9agent import State

INTERVAL_S = 60.0
OK = None
UNREACHABLE = b9agent.GatewayUnreachable("no answer", "look")
UNWELL = b9agent.GatewayUnwell("503", "look")
NOT_FOUND = b9agent.MachineNotFound("forgotten", "")
TOKEN_REFUSED = b9agent.TokenRefused("401", "a new one")
POOL_REFUSED = b9agent.RequestRefused("no pool", "another")
NO_ROUTE = b9agent.NoKeepaliveRoute("404", "")
REFUSALS = [TOKEN_REFUSED, POOL_REFUSED, NO_ROUTE]


class Life:
    """A Membership whose every answer is scripted.  sent: (name, state while it was sent, time);
    draws: (low, high) of every random number; took_s: what each request takes."""

    def __init__(self, register=(), keepalive=(), interval_s=INTERVAL_S, dice=None, took_s=0.0):
        self.answers = {"register": itertools.chain(register, itertools.repeat(OK)),
                        "keepalive": itertools.chain(keepalive, itertools.repeat(OK))}
        self.now_s, self.took_s = 1000.0, took_s
        self.sent, self.draws = [], []
        self.dice = dice or (lambda low, high: (low + high) / 2)
        self.stream = io.StringIO()
        self.membership = b9agent.Membership(
            lambda: self._answer("register"), lambda: self._answer("keepalive"), interval_s,
            b9agent.Log(stream=self.stream), lambda: self.now_s, self._uniform)

    def _uniform(self, low, high):
        assert low <= high
        self.draws.append((low, high))
        return self.dice(low, high)

    def _answer(self, name):
        self.sent.append((name, self.membership.snapshot.state, self.now_s))
        self.now_s += self.took_s
        answer = next(self.answers[name])
        if callable(answer):
            answer()
        elif answer is not OK:
            raise answer

    def step(self):
        """The wait that it asks for, which then has passed."""
        wait_s = self.membership.step()
        self.now_s += wait_s
        return wait_s

    def steps(self, count):
        return [self.step() for _ in range(count)]

    @property
    def state(self):
        return self.membership.snapshot.state

    def names(self):
        return [name for name, _, _ in self.sent]


# -- the way to ready ----------------------------------------------------

def test_from_starting_to_ready_in_one_step():
    life = Life()
    assert life.state is State.STARTING
    life.step()
    assert [(name, state) for name, state, _ in life.sent] == [
        ("register", State.REGISTERING), ("keepalive", State.REGISTERED)]
    assert life.state is State.READY


def test_a_ready_machine_sends_keepalives_alone():
    life = Life()
    life.steps(5)
    assert life.names() == ["register"] + ["keepalive"] * 5
    assert life.membership.snapshot.keepalives == 5
    assert life.membership.snapshot.registrations == 1


def test_the_snapshot_says_what_is_known():
    life = Life(keepalive=[OK, UNREACHABLE])
    began = life.now_s
    life.membership.step()
    snapshot = life.membership.snapshot
    assert (snapshot.state, snapshot.since_s, snapshot.last_ready_s, snapshot.message,
            snapshot.failures) == (State.READY, began, began, "", 0)
    life.now_s += 60
    life.membership.step()
    snapshot = life.membership.snapshot
    assert (snapshot.state, snapshot.since_s, snapshot.last_ready_s, snapshot.failures) == (
        State.UNREACHABLE, began + 60, began, 1)
    assert "no answer" in snapshot.message
    life.now_s += 1
    life.membership.step()
    assert (life.state, life.membership.snapshot.message) == (State.READY, "")


# -- intervals -----------------------------------------------------------

def test_the_interval_has_ten_percent_of_jitter_and_no_more():
    for dice, expected in ((lambda low, high: low, 54.0), (lambda low, high: high, 66.0)):
        life = Life(dice=dice)
        life.step()
        life.draws.clear()
        assert life.steps(3) == [pytest.approx(expected)] * 3
        assert life.draws == [(0.9, 1.1)] * 3


@pytest.mark.parametrize("failure", [UNREACHABLE, UNWELL, NOT_FOUND, TOKEN_REFUSED])
def test_what_brings_a_fleet_together_is_followed_by_any_part_of_the_interval(failure):
    """A start, or a gateway that is back: with the interval's own jitter alone a thousand machines
    would march in step for half an hour."""
    life = Life(keepalive=[OK, OK, failure])
    life.steps(2)
    assert life.draws == [(0.1, 1.1), (0.9, 1.1)]
    life.steps(1)
    life.draws.clear()
    life.steps(2)
    assert life.state is State.READY and life.draws == [(0.1, 1.1), (0.9, 1.1)]


def test_the_period_is_the_interval_whatever_the_requests_take():
    life = Life(took_s=3.0)
    life.steps(4)
    keepalives = [at for name, _, at in life.sent if name == "keepalive"]
    periods = [later - earlier for earlier, later in zip(keepalives[1:], keepalives[2:])]
    assert periods == [pytest.approx(INTERVAL_S)] * len(periods)


def test_a_request_longer_than_the_interval_is_followed_at_once():
    assert Life(interval_s=1.0, took_s=2.0).step() == 0.0


# -- failures ------------------------------------------------------------

@pytest.mark.parametrize("failure", [UNREACHABLE, UNWELL])
@pytest.mark.parametrize("interval_s", [1.0, 7.0, 60.0, 150.0])
def test_backoff_is_full_jitter_from_a_second_doubled_and_capped(failure, interval_s):
    cap = min(interval_s, 60.0)
    expected = [min(2.0 ** number, cap) for number in range(12)]
    for dice, waits in ((lambda low, high: high, expected), (lambda low, high: low, [0.0] * 12)):
        life = Life(keepalive=[OK] + [failure] * 12, interval_s=interval_s, dice=dice)
        life.step()
        life.draws.clear()
        assert life.steps(12) == waits
        assert life.draws == [(0.0, ceiling) for ceiling in expected]
        assert life.state is State.UNREACHABLE
    assert life.names().count("register") == 1


def test_a_success_starts_the_backoff_anew():
    life = Life(keepalive=[OK] + [UNREACHABLE] * 5 + [OK] + [UNREACHABLE] * 2,
                dice=lambda low, high: high)
    waits = life.steps(9)
    assert waits[1:6] == [1, 2, 4, 8, 16] and waits[7:] == [1, 2]


def test_after_a_thousand_failures_it_still_tries_within_the_interval():
    life = Life(keepalive=[OK] + [UNREACHABLE] * 1500, dice=lambda low, high: high)
    assert max(life.steps(1500)[1:]) == 60.0
    life.steps(2)
    assert life.state is State.READY


def test_the_first_registration_is_retried_while_the_gateway_is_away():
    life = Life(register=[UNREACHABLE, UNWELL, UNREACHABLE], dice=lambda low, high: high)
    waits = life.steps(4)
    assert waits[:3] == [1, 2, 4]
    assert life.names() == ["register"] * 4 + ["keepalive"]
    assert life.state is State.READY


def test_a_keepalive_that_fails_after_the_first_registration_does_not_register_again():
    life = Life(keepalive=[UNWELL, UNREACHABLE])
    life.steps(3)
    assert life.names() == ["register"] + ["keepalive"] * 3


@pytest.mark.parametrize("interval_s", [7.0, 60.0, 150.0])
@pytest.mark.parametrize("asked_s", [5.0, 60.0])
def test_retry_after_is_waited_for_and_not_by_all_until_the_same_moment(asked_s, interval_s):
    busy = b9agent.GatewayUnwell("429", "", asked_s)
    for dice, more_s in ((lambda low, high: low, 0.0), (lambda low, high: high, min(interval_s, 60.0))):
        life = Life(keepalive=[OK] + [busy] * 3, interval_s=interval_s, dice=dice)
        assert life.steps(4)[1:] == [asked_s + more_s] * 3


def test_retry_after_cannot_let_the_machine_expire():
    waits = []
    for text in ("299", "100000"):
        busy = b9agent.GatewayUnwell("429", "", b9agent._retry_after_s(text))
        life = Life(keepalive=[OK, busy], interval_s=150.0, dice=lambda low, high: high)
        waits.append(sum(life.steps(2)))
    assert max(waits) < b9agent.GATEWAY_TTL_S


# -- the gateway forgot the machine --------------------------------------

def test_expiry_is_followed_by_register_and_keepalive_at_once():
    life = Life(keepalive=[OK, OK, NOT_FOUND])
    life.steps(2)
    at = life.now_s
    assert life.step() == 0.0
    assert life.state is State.EXPIRED
    life.step()
    assert life.sent[-3:] == [("keepalive", State.READY, at), ("register", State.REGISTERING, at),
                              ("keepalive", State.REGISTERED, at)]
    assert life.state is State.READY
    assert life.membership.snapshot.registrations == 2


@pytest.mark.parametrize("before", [1, 3, 8])
@pytest.mark.parametrize("failure", [UNREACHABLE, UNWELL, TOKEN_REFUSED])
def test_expiry_after_an_outage_is_followed_by_register_at_once_too(failure, before):
    """The usual order of things: an outage longer than the time to live, then "who are you?"."""
    life = Life(keepalive=[OK] + [failure] * before + [NOT_FOUND], dice=lambda low, high: high)
    life.steps(1 + before)
    assert life.step() == 0.0
    life.step()
    assert life.names()[-2:] == ["register", "keepalive"] and life.state is State.READY


def test_a_gateway_that_forgets_at_once_every_time_is_not_hammered():
    life = Life(keepalive=[OK] + [NOT_FOUND] * 10, dice=lambda low, high: high)
    waits = life.steps(11)[1:]
    assert waits[0] == 0.0
    assert sum(wait >= 1.0 for wait in waits) >= 8
    life.steps(2)
    assert life.state is State.READY


def test_a_registration_that_fails_after_expiry_is_tried_again():
    life = Life(register=[OK, UNWELL, UNREACHABLE], keepalive=[OK, NOT_FOUND])
    life.steps(2)
    life.steps(3)
    assert life.names()[3:] == ["register", "register", "register", "keepalive"]
    assert life.state is State.READY


def test_registering_happens_only_when_the_gateway_has_forgotten():
    """Registering again sets a ready machine back to registered."""
    life = Life(keepalive=[OK, UNREACHABLE, OK, UNWELL, UNWELL, TOKEN_REFUSED, OK, POOL_REFUSED, OK])
    life.steps(9)
    assert life.names().count("register") == 1


# -- refusals ------------------------------------------------------------

@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("where", ["register", "keepalive"])
def test_a_refusal_before_the_machine_was_ever_ready_ends_the_life(refusal, where):
    life = Life(**{where: [refusal]})
    with pytest.raises(type(refusal)):
        life.step()
    assert life.state is State.REFUSED and life.membership.snapshot.message == str(refusal)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_after_an_outage_at_the_start_ends_the_life_too(refusal):
    life = Life(register=[UNREACHABLE, refusal])
    life.step()
    with pytest.raises(type(refusal)):
        life.step()


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("interval_s", [1.0, 60.0, 150.0])
def test_a_refusal_in_service_is_retried_at_the_interval_for_ten_minutes_then_every_five(
        refusal, interval_s):
    life = Life(keepalive=[OK] + [refusal] * 2000, interval_s=interval_s)
    life.step()
    since_s = life.now_s
    for _ in range(900):
        waited_s = life.now_s - since_s
        wait_s = life.step()
        assert life.state is State.REFUSED
        assert wait_s == (interval_s if waited_s < 600 else 300.0), waited_s
        if waited_s > 3600:
            break
    assert waited_s > 600
    assert set(life.draws[1:]) == {(0.9, 1.1)}


def test_a_refusal_in_service_is_an_error_in_the_log_each_time():
    life = Life(keepalive=[OK] + [TOKEN_REFUSED] * 3)
    life.steps(4)
    lines = [line for line in life.stream.getvalue().splitlines() if " error refused" in line]
    assert len(lines) == 3 and all("401" in line and "a new one" in line for line in lines)


def test_a_refusal_that_ends_is_forgotten():
    life = Life(keepalive=[OK] + [TOKEN_REFUSED] * 30 + [OK] + [TOKEN_REFUSED] * 2)
    life.steps(31)
    life.step()
    assert life.state is State.READY
    assert life.steps(2) == [INTERVAL_S] * 2  # ten minutes begin anew


# -- the log -------------------------------------------------------------

def test_an_outage_is_loud_at_once_and_never_a_flood():
    life = Life(keepalive=[OK] + [UNREACHABLE] * 1000 + [OK])
    life.steps(1002)
    lines = life.stream.getvalue().splitlines()
    warnings = [line for line in lines if " warning " in line]
    assert 1 <= len(warnings) <= 20 and "failures=1 " in warnings[0] + " "
    assert [line for line in lines if " ready" in line and "after_failures=1000" in line]


def test_every_change_of_state_is_in_the_log():
    life = Life(keepalive=[OK, UNREACHABLE, OK, NOT_FOUND, OK, TOKEN_REFUSED, OK])
    life.steps(7)
    events = [line.split()[2] for line in life.stream.getvalue().splitlines()]
    assert events == ["registered", "ready", "unreachable", "ready", "expired", "registered", "ready",
                      "refused", "ready"]


# -- the loop, time and sleep ---------------------------------------------

class Loop:
    """run() with a Wake whose waiting is the passing of the life's own time."""

    def __init__(self, life, until_steps, sleeps=()):
        self.life, self.until, self.waits, self.ticks = life, until_steps, [], []
        self._sleeps = dict(sleeps)  # number of the wait -> seconds that the machine sleeps in it

    def wait(self, timeout_s):
        assert timeout_s > 0
        self.life.now_s += timeout_s + self._sleeps.get(len(self.waits), 0.0)
        self.waits.append(timeout_s)
        return False

    def tick(self, within_s):
        self.ticks.append((self.life.now_s, within_s))

    def run(self):
        self.life.membership.run(self, lambda: len(self.life.sent) >= self.until, self.tick)
        return self


def test_the_loop_keeps_the_interval_and_says_it_lives():
    life = Life()
    loop = Loop(life, 6).run()
    times = [at for name, _, at in life.sent if name == "keepalive"]
    assert [later - earlier for earlier, later in zip(times, times[1:])] == [
        pytest.approx(0.6 * INTERVAL_S)] + [pytest.approx(INTERVAL_S)] * 3
    for (at, within_s), (following, _) in zip(loop.ticks, loop.ticks[1:]):
        assert following - at <= within_s
    assert max(loop.waits) <= 5.0
    assert life.state is State.STOPPED


def test_a_fact_that_changed_does_not_wait_for_the_interval():
    life = Life()

    class Changing(Loop):
        def wait(self, timeout_s):
            if len(self.waits) == 2:
                life.membership.register_again()
            return Loop.wait(self, timeout_s)
    loop = Changing(life, 4).run()
    assert life.names() == ["register", "keepalive"] * 2
    assert life.sent[2][2] == 1000.0 + sum(loop.waits[:3]) and len(loop.waits) == 3


def test_a_machine_that_slept_wakes_with_an_immediate_keepalive():
    life = Life()
    loop = Loop(life, 4, sleeps={3: 8 * 3600.0}).run()
    times = [at for name, _, at in life.sent if name == "keepalive"]
    assert times[1] - times[0] > 8 * 3600
    slept_until = 1000.0 + sum(loop.waits[:4]) + 8 * 3600
    assert times[1] == pytest.approx(slept_until), "it waited on after it woke"
    assert life.names() == ["register", "keepalive"] * 2, "it is known there no more"
    assert "warning expired" in life.stream.getvalue()


def test_a_sleep_shorter_than_the_interval_delays_nothing():
    life = Life()
    Loop(life, 4, sleeps={2: 20.0}).run()
    times = [at for name, _, at in life.sent if name == "keepalive"]
    assert times[1] - times[0] == pytest.approx(0.6 * INTERVAL_S)


def test_a_step_of_the_wall_clock_delays_nothing(monkeypatch):
    walls = itertools.cycle([1e9, 2e9, 0.0, -5.0])
    monkeypatch.setattr(time, "time", lambda: next(walls))
    test_the_loop_keeps_the_interval_and_says_it_lives()


def test_the_clock_counts_sleep_and_does_not_step():
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    before = time.clock_gettime(clock)
    assert before <= b9agent.now_s() <= time.clock_gettime(clock)


def test_a_stop_ends_the_loop_without_another_request():
    life, told = Life(), []
    class Stopper(Loop):
        def wait(self, timeout_s):
            told.append(True)
            return True
    life.membership.run(Stopper(life, 0), lambda: bool(told), lambda within_s: None)
    assert life.names() == ["register", "keepalive"] and life.state is State.STOPPED


def test_a_refusal_at_the_start_leaves_the_loop():
    life = Life(register=[TOKEN_REFUSED])
    with pytest.raises(b9agent.TokenRefused):
        Loop(life, 10).run()


def test_a_defect_costs_an_interval_and_not_the_machine():
    life = Life(keepalive=[OK, ZeroDivisionError("metrics"), OK])
    Loop(life, 5).run()
    times = [at for name, _, at in life.sent if name == "keepalive"]
    assert len(times) == 4 and times[2] - times[1] == pytest.approx(INTERVAL_S)
    assert "defect" in life.stream.getvalue() and "ZeroDivisionError" in life.stream.getvalue()


def test_a_wake_counts_once_and_waits_no_longer_than_told():
    wake = b9agent.Wake()
    try:
        assert wake.wait(0.0) is False
        wake.set()
        wake.set()
        assert wake.wait(60.0) is True
        assert wake.wait(0.01) is False
        for _ in range(200000):  # more than a pipe holds
            wake.set()
        assert wake.wait(60.0) is True
    finally:
        wake.close()


# -- news for the gateway --------------------------------------------------

def test_news_are_registered_with_the_next_request_and_a_keepalive_follows():
    life = Life()
    life.step()
    life.membership.register_again()
    assert life.state is State.READY  # until it is sent
    life.steps(2)
    assert [(name, state) for name, state, _ in life.sent][2:] == [
        ("register", State.READY), ("keepalive", State.REGISTERED), ("keepalive", State.READY)]
    assert life.membership.snapshot.registrations == 2 and life.state is State.READY


def test_news_before_the_first_registration_are_part_of_it():
    life = Life()
    life.membership.register_again()
    life.steps(2)
    assert life.names() == ["register", "keepalive", "keepalive"]


@pytest.mark.parametrize("refusal", [UNWELL, TOKEN_REFUSED, POOL_REFUSED, NOT_FOUND, UNREACHABLE])
def test_news_that_are_refused_cost_no_keepalive_and_come_again(refusal):
    life = Life(register=[OK, refusal, refusal], dice=lambda low, high: high)
    life.step()
    life.membership.register_again()
    assert life.steps(4) == [pytest.approx(1.1 * INTERVAL_S)] * 4
    assert life.names() == ["register", "keepalive"] + ["register", "keepalive"] * 3 + ["keepalive"]
    snapshot = life.membership.snapshot
    assert (snapshot.state, snapshot.keepalives, snapshot.registrations) == (State.READY, 5, 2)
    assert sum(snapshot.failed_registrations) == 2 and sum(snapshot.failed_keepalives) == 0
    assert life.stream.getvalue().count("warning not_registered_again") == 1  # no flood


def test_a_route_to_register_that_hangs_costs_no_machine_that_is_ready():
    """Which is forgotten after 300 s without a keepalive, whatever its news come to."""
    life = Life(register=[OK] + [UNREACHABLE] * 20)
    life.step()
    life.membership.register_again()
    life.steps(10)
    assert life.names().count("keepalive") == 11 and life.state is State.READY


def test_news_for_a_gateway_that_cannot_be_reached_wait_for_it():
    life = Life(register=[OK, UNREACHABLE, UNREACHABLE], keepalive=[OK, UNREACHABLE, UNREACHABLE])
    life.step()
    life.membership.register_again()
    life.steps(3)
    assert life.names() == ["register", "keepalive"] * 4
    assert life.state is State.READY and life.membership.snapshot.failures == 2


def test_a_defect_of_ours_loses_no_news():
    life = Life(register=[OK, ZeroDivisionError("ours")])
    life.step()
    life.membership.register_again()
    with pytest.raises(ZeroDivisionError):
        life.step()
    life.steps(2)
    assert life.names()[2:] == ["register", "register", "keepalive", "keepalive"]


def test_news_that_come_while_they_are_sent_are_sent_again():
    life, answer = Life(), None

    def register():
        answer("register")
        if life.names().count("register") == 2:
            life.membership.register_again()
    answer, life.membership._send_register = life._answer, register
    life.step()
    life.membership.register_again()
    life.steps(3)
    assert life.names() == ["register", "keepalive"] * 3 + ["keepalive"]


def test_news_do_not_wait_for_the_interval():
    life = Life()
    class Late(Loop):
        def wait(self, timeout_s):
            if len(self.waits) == 2:
                self.life.membership.register_again()
            return super().wait(timeout_s)
    loop = Late(life, 4).run()
    assert life.names() == ["register", "keepalive"] * 2 and len(loop.waits) == 3
