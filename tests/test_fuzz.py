"""Every target of fuzz_targets.py with inputs that hypothesis makes, always the same ones; what tests/fuzz
found once; and that time and memory grow with the input, not with its square."""
import time
import tracemalloc

import pytest

pytest.importorskip("h11")
hypothesis = pytest.importorskip("hypothesis")

from fuzz_targets import TARGETS  # noqa: E402

NAMES = sorted(TARGETS)
EXAMPLES = 120

# (target, input) of each crash that was found, mended since.
FOUND = (
    # Answers: heads and chunks that another reader takes otherwise, which were taken.
    ("answers", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\r\n\n\r\nok"),
    ("answers", b"HTTP/1.1 200 OK\r\nContent-Length: 2\n\r\n\r\nok"),
    ("answers", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 5\r\n\r\nokxxx"),
    ("answers", b"HTTP/1.1 200 OK\r\nContent-Length: 2\xa0\r\n\r\nok"),
    ("answers", b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nok"),
    ("answers", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    ("answers", b"HTTP/1.1 200 OK\r\nA b: c\r\nContent-Length: 2\r\n\r\nok"),
    ("answers", b"HTTP/1.1 200 O\rK\r\nContent-Length: 2\r\n\r\nok"),
    ("answers", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\nok\n0\n\n"),
    ("answers", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok \n0\r\n\r\n"),
    ("answers", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nno trailer\r\n\r\n"),
    ("answers", b"HTTP/1.1 101 Switching\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
    # What is written of many cores, or of more than 953 GiB that are no whole MiB, was not read again.
    ("settings", b"max_cpu: 3500\n"), ("settings", b"max_memory: 1.1Ti\n"),
    # An integer of 309 digits went to the engine.
    ("asks", b'\x07{"model": "m", "input": "x", "dimensions": 1e308}'),
)


@pytest.mark.parametrize("name", NAMES)
def test_every_seed_is_taken(name):
    for seed in TARGETS[name].seeds:
        TARGETS[name].check(seed)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_made_of_the_seeds_holds(name):
    @hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=EXAMPLES,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(TARGETS[name].inputs)
    def check(data):
        TARGETS[name].check(data)
    check()


@pytest.mark.parametrize("name, data", FOUND, ids=["%s-%d" % (row[0], number) for number, row in enumerate(FOUND)])
def test_what_was_found_once_holds(name, data):
    TARGETS[name].check(data)
