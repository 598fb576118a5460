"""What a gateway feels of a fleet: when a power cut ends, in service, and when it comes back.

    tests/bench/run --only fleet             both parts, about 20 minutes
    tests/bench/run --only fleet --quick     the same, smaller: half a minute
    tests/bench/run --only fleet --readme    writes its block of README.md, too

1. The membership loops of 1,000 agents in virtual time: Membership and GatewayClient of b9agent.py as
   they are, with a clock, dice and a gateway of ours (Virtual).  Claim: from the moment that the gateway
   is back, what arrives there in any 10 seconds stays within twice the mean: until all are ready that of
   this time, in the hour that follows that of keepalives alone (agents / interval).  In single seconds
   chance alone goes further; what it would come to is printed beside what came.
2. Real agents, installed, on one embedded gateway (fleet_processes.py).

Exit status: 1 where a claim does not hold.
"""
import argparse
import heapq
import io
import json
import math
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), os.path.dirname(HERE), HERE]

import b9agent  # noqa: E402
import fleet_processes  # noqa: E402
from b9agent import HttpFailure, HttpReply  # noqa: E402
from helpers import about_the_machine, print_table, write_readme  # noqa: E402

INTERVAL_S = 60.0
WINDOW_S = 10
STARTS = {"within a minute": 60.0, "in one second": 1.0}
LOST = HttpReply(500, {}, json.dumps({"message": "machine not found"}).encode())
ANSWERS = {"register": HttpReply(200, {}, b'{"config": null, "machine_state": {}}'),
           "keepalive": HttpReply(200, {}, b'{"status": "ok"}')}


def refusing(_agent, _left_s, _limit_s):
    raise HttpFailure("refused", "connection refused")


def black_hole(agent, _left_s, limit_s):
    agent.now_s += limit_s
    raise HttpFailure("timeout", "no answer")


def unwell(_agent, _left_s, _limit_s):
    return HttpReply(503, {"retry-after": "30"}, b"{}")


def counting_down(_agent, left_s, _limit_s):
    """As rate limiters and maintenance pages do: all are told the same end."""
    return HttpReply(503, {"retry-after": "%d" % math.ceil(left_s)}, b"{}")


# name -> (what a request meets, how long)
OUTAGES = {
    "10 min, refusing": (refusing, 600.0),
    "10 min, black hole": (black_hole, 600.0),
    "10 min, 503, Retry-After: 30": (unwell, 600.0),
    "10 min, 503, Retry-After: what is left": (counting_down, 600.0),
    "5 s, then an empty database": (refusing, 5.0),
}


class Client(b9agent.GatewayClient):
    """The agent's own client; what it sends goes to a gateway of virtual time."""

    def __init__(self, log, answer):
        super().__init__(b9agent.Endpoint("http", "gateway.example", 1994, None, None), "token", "gpu", log)
        self._answer = answer

    def _send(self, method, name, body, limit_s):
        try:
            return self._answer(name, limit_s)
        except HttpFailure as failure:
            raise self._failure(failure) from failure


class Virtual:
    """agents machines, each with its own Membership, from one queue of events.

    arrivals: how many requests came in each second; ready_s: of each machine, how long after the
    return it was ready.  Requests take no time but where the gateway is a black hole.
    """

    def __init__(self, agents, start_s, outage, began_s, after_s, seed=1):
        self.meet, self.outage_s = OUTAGES[outage]
        self.began_s, self.back_s = began_s, began_s + self.outage_s
        self.end_s = self.back_s + after_s
        self.agents = agents
        self.arrivals = [0] * (int(self.end_s) + 1)
        self.ready_s = {}
        self.known_until_s = {}
        dice, log = random.Random(seed), b9agent.Log(minimum="error", stream=io.StringIO())
        queue = [(dice.uniform(0.0, start_s), number, None) for number in range(agents)]
        heapq.heapify(queue)
        while queue[0][0] < self.end_s:
            due_s, number, machine = heapq.heappop(queue)
            machine = machine or Machine(self, log, dice, due_s)
            machine.now_s = due_s
            wait_s = machine.membership.step()
            heapq.heappush(queue, (machine.now_s + wait_s, number, machine))

    def answer(self, machine, name, limit_s):
        now_s = machine.now_s
        if now_s < self.end_s:
            self.arrivals[int(now_s)] += 1
        if self.began_s <= now_s < self.back_s:
            return self.meet(machine, self.back_s - now_s, limit_s)
        until_s = self.known_until_s.get(machine, 0.0)
        forgotten = until_s < now_s or (until_s - b9agent.GATEWAY_TTL_S < self.began_s <= now_s)
        if name == "keepalive" and forgotten:
            return LOST  # its time ran out, or the database with it is gone
        self.known_until_s[machine] = now_s + b9agent.GATEWAY_TTL_S
        if name == "keepalive" and now_s >= self.back_s:
            self.ready_s.setdefault(machine, now_s - self.back_s)
        return ANSWERS[name]

    # -- what came of it ---------------------------------------------------

    @property
    def steady(self):
        """Keepalives a second, were there nothing else."""
        return self.agents / INTERVAL_S

    def between(self, start_s, end_s):
        return self.arrivals[int(start_s):int(math.ceil(end_s))]

    def before(self):
        """From the third minute to the outage."""
        return self.between(120, self.began_s)

    def recovery(self):
        return self.between(self.back_s, self.back_s + self.recovered_s())

    def recovered_s(self):
        return max(WINDOW_S, math.ceil(max(self.ready_s.values())))

    def after(self):
        return self.between(self.back_s + self.recovered_s(), self.end_s)

    def ratios(self):
        """The busiest 10 s / the mean: (before the outage, until all are ready, afterwards)."""
        recovery = self.recovery()
        return (busiest(self.before()) / self.steady,
                busiest(recovery) / (sum(recovery) / len(recovery)),
                busiest(self.after()) / self.steady)


class Machine:
    """One of them; its time goes on while a request of its own hangs."""

    def __init__(self, fleet, log, dice, now_s):
        self.now_s = now_s
        client = Client(log, lambda name, limit_s: fleet.answer(self, name, limit_s))
        self.membership = b9agent.Membership(
            lambda: client.register({}), lambda: client.keepalive({}), INTERVAL_S, log,
            lambda: self.now_s, dice.uniform)


def busiest(seconds, window_s=WINDOW_S):
    """Requests a second in the busiest window that begins with a second."""
    sums = [sum(seconds[:window_s])]
    for at in range(window_s, len(seconds)):
        sums.append(sums[-1] + seconds[at] - seconds[at - window_s])
    return max(sums) / min(window_s, len(seconds))


def chance(mean, seconds):
    """The busiest of so many seconds where requests come by chance alone (Poisson), in the median."""
    count, term, below = 0, math.exp(-mean), math.exp(-mean)
    while below ** seconds < 0.5:
        count += 1
        term *= mean / count
        below += term
    return count


def quantile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def plot(fleet, width_s=10, lines=24):
    """Arrivals a second, in steps of ten, round the return."""
    start = int(fleet.back_s) - 60
    rates = [sum(fleet.arrivals[at:at + width_s]) / width_s
             for at in range(start, start + lines * width_s, width_s)]
    scale = max(1.0, max(rates) / 60)
    return "\n".join("%6d s %6.1f/s %s" % (start + number * width_s - fleet.back_s, rate,
                                          "#" * round(rate / scale))
                     for number, rate in enumerate(rates))


def virtual(agents, after_s, outages=tuple(OUTAGES), starts=tuple(STARTS), began_s=900.0):
    """[(start, outage, Virtual)] of all that is asked."""
    return [(start, outage, Virtual(agents, STARTS[start], outage, began_s, after_s))
            for outage in outages for start in starts]


# -- the table ----------------------------------------------------------

def row_of(start, outage, fleet):
    before, back, after = fleet.ratios()
    recovery, later = fleet.recovery(), fleet.after()
    mean = sum(recovery) / len(recovery)
    ready = list(fleet.ready_s.values())
    return (outage, start, "%.2f" % before, "%.1f" % mean, "%.2f" % back,
            "%d (%d)" % (max(recovery), chance(mean, len(recovery))), "%.2f" % after,
            "%d (%d)" % (max(later), chance(fleet.steady, len(later))),
            "%.0f, %.0f, %.0f s" % (statistics.median(ready), quantile(ready, 0.99), max(ready)))


HEAD = ("outage", "started", "in service: busiest 10 s ÷ mean", "return: mean, /s",
        "busiest 10 s ÷ mean", "busiest second (by chance)", "afterwards: busiest 10 s ÷ mean",
        "busiest second (by chance)", "ready again: p50, p99, all")


def claims_of_virtual(fleets):
    for start, outage, fleet in fleets:
        for when, ratio in zip(("in service", "on return", "afterwards"), fleet.ratios()):
            yield ("%s, started %s, %s: the busiest 10 s within twice the mean (%.2f)"
                   % (outage, start, when, ratio), ratio <= 2.0)
        yield ("%s, started %s: all ready again" % (outage, start),
               len(fleet.ready_s) == fleet.agents)


def until_ready(found):
    """Requests in each second from the return to the last one that is ready: (all, mean)."""
    during = found["return"][:max(1, math.ceil(found["ready_s"][-1]))]
    return during, sum(during) / len(during)


def claims_of_processes(found):
    during, mean = until_ready(found)
    ratio = busiest(during) / mean
    yield "SIGKILL at work: the gateway's database is whole %s" % found["database"], not found["database"]
    yield "every agent is ready again, and ends with exit code 0", (
        len(found["ready_s"]) == found["agents"] and not found["ended_badly"])
    if found["agents"] >= 100:  # of fewer, chance alone says more than the timing
        yield ("%d processes: the busiest 10 s of the return within twice its mean (%.2f)"
               % (found["agents"], ratio), ratio <= 2.0)


def print_processes(found, costs):
    ready, returned, pss = found["ready_s"], found["return"], found["agent_pss_mib"]
    during, mean = until_ready(found)
    rows = [("%d agents, keepalive every %g s" % (found["agents"], found["interval_s"]), ""),
            ("all started at once: ready after (p50, all)", "%.1f, %.1f s" % (
                statistics.median(found["first_ready_s"]), found["first_ready_s"][-1])),
            ("outage (SIGKILL of the gateway)", "%g s" % found["outage_s"]),
            ("ready again after (p50, p99, all)", "%.1f, %.1f, %.1f s" % (
                statistics.median(ready), quantile(ready, 0.99), ready[-1])),
            ("of these registered again", "%d" % found["registered_again"]),
            ("requests a second until then: mean, busiest 10 s, busiest second", "%.1f, %.1f, %d" % (
                mean, busiest(during), max(during))),
            ("in service before: mean, busiest second", "%.1f, %d" % (
                sum(found["steady"]) / len(found["steady"]), max(found["steady"]))),
            ("memory of an agent among these (PSS, median)", "%.1f MiB" % statistics.median(pss)),
            ("the gateway: memory (PSS), threads, descriptors", "%.1f MiB, %d, %d" % (
                found["pss_mib"], found["threads"], found["descriptors"]))]
    print_table(rows)
    print("\nrequests in each second of the return: %s\n" % " ".join(map(str, returned)))
    if costs:
        print_table([("a keepalive over a connection of its own", "CPU, µs", "÷ embedded", "p50, ms",
                      "p99, ms", "memory (PSS), MiB")]
                    + [(name, "%.0f" % cpu, "%.2f" % (cpu / costs[0][1]), "%.1f" % p50, "%.1f" % p99,
                        "%.1f" % pss_mib) for name, cpu, p50, p99, pss_mib in costs])


def readme_block(fleets, found, costs):
    """Of the fleets that started in one second, the harder start."""
    rows = [("outage", "until all are ready: requests a second", "busiest 10 s ÷ mean", "busiest second "
             "(by chance)", "the hour after: busiest 10 s ÷ mean", "ready again: p50, p99, all"), ("---",) * 6]
    for start, outage, fleet in fleets:
        if start == "in one second":
            _, _, _, mean, back, second, after, _, ready = row_of(start, outage, fleet)
            rows.append((outage, mean, back, second, after, ready))
    during, mean = until_ready(found)
    rows.append(("%d processes, %g min" % (found["agents"], found["outage_s"] / 60), "%.1f" % mean,
                 "%.2f" % (busiest(during) / mean), "%d (%d)" % (max(during), chance(mean, len(during))), "–",
                 "%.0f, %.0f, %.0f s" % (statistics.median(found["ready_s"]),
                                         quantile(found["ready_s"], 0.99), found["ready_s"][-1])))
    text = "%s, %s.\n\n" % (time.strftime("%-d %B %Y"), about_the_machine(fleet_processes.PYTHON))
    text += "".join("| %s |\n" % " | ".join(row) for row in rows)
    if costs:
        (_, ours, *_), (other, theirs, *_) = costs
        text += ("\nA keepalive costs the embedded gateway %.2f ms of CPU (%s with SQLite: %.2f). It takes %.0f MiB "
                 "for %d agents, and each of these %.1f (PSS)." % (
                     ours / 1e3, other, theirs / 1e3, found["pss_mib"], found["agents"],
                     statistics.median(found["agent_pss_mib"])))
    return text.rstrip("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 processes, an outage of 20 s")
    parser.add_argument("--agents", type=int, help="processes (200)")
    parser.add_argument("--outage", type=float, help="seconds, of the processes' gateway (600)")
    parser.add_argument("--alone", action="store_true", help="without Flask")
    parser.add_argument("--readme", action="store_true", help="write the results into README.md")
    options = parser.parse_args()
    quick = options.quick
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it started ends with it
    print("%s, %s\n" % (time.strftime("%-d %B %Y"), about_the_machine(fleet_processes.PYTHON)))
    fleets = virtual(1000, 600.0 if quick else 3600.0)
    print("1,000 membership loops in virtual time, a keepalive every %g s: %.1f a second\n" % (
        INTERVAL_S, fleets[0][2].steady))
    print_table([HEAD] + [row_of(*fleet) for fleet in fleets])
    print("\nThe first of these, seconds from the return of the gateway on:\n" + plot(fleets[0][2]) + "\n")
    folder = tempfile.mkdtemp(prefix="b9fleet-")
    try:
        found = fleet_processes.run(
            folder, options.agents or (20 if quick else 200), 2 if quick else 60, 5 if quick else 200,
            options.outage or (20 if quick else 600))
        costs = None if options.alone else fleet_processes.cost(
            os.path.join(folder, "cost"), 100, 2 if quick else 10, 1 if quick else 5)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_processes(found, costs)
    claims = [*claims_of_virtual(fleets), *claims_of_processes(found)]
    missed = [what for what, holds in claims if not holds]
    print("\n%d of %d claims hold%s" % (len(claims) - len(missed), len(claims),
                                       "".join("\nMISSED: " + what for what in missed)))
    if options.readme:
        write_readme("fleet", readme_block(fleets, found, costs))
    return 1 if missed else 0


if __name__ == "__main__":
    if not sys.platform.startswith("linux"):
        sys.exit("tests/bench/fleet.py reads /proc: Linux only")
    sys.exit(main())
