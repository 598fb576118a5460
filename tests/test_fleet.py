"""A fleet of agents: what arrives at the gateway when they start, and when it is back (bench/fleet.py)."""
import os
import sys

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench"))

fleet = pytest.importorskip("fleet", reason="it needs psutil")


@pytest.mark.parametrize("start", fleet.STARTS)
@pytest.mark.parametrize("outage", fleet.OUTAGES)
def test_a_thousand_agents_come_back_within_twice_the_mean_of_any_ten_seconds(outage, start):
    claims = list(fleet.claims_of_virtual(fleet.virtual(1000, 300.0, [outage], [start], 600.0)))
    assert len(claims) == 4 and not [what for what, holds in claims if not holds]


def test_what_chance_alone_would_bring_is_as_tables_of_poisson_have_it():
    # Of a mean of 1 a second: 0 to 1 in 73.6 % of all seconds, 0 to 2 in 92.0 %.
    assert [fleet.chance(1.0, seconds) for seconds in (1, 2, 3, 8)] == [1, 1, 2, 2]
    assert 31 <= fleet.chance(1000 / 60, 3600) <= 34


@pytest.mark.root
def test_twenty_processes_outlive_their_gateway_and_its_database_is_whole(tmp_path):
    found = fleet.fleet_processes.run(str(tmp_path), 20, 2, 3, 6)
    assert not [what for what, holds in fleet.claims_of_processes(found) if not holds]
