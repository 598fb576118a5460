"""Every target of fuzz_targets.py with inputs that hypothesis makes, always the same ones; what tests/fuzz
found once; and that time and memory grow with the input, not with its square."""
import math
import time
import tracemalloc

import pytest

pytest.importorskip("h11")
hypothesis = pytest.importorskip("hypothesis")

import b9agent  # noqa: E402
from fuzz_targets import (FOLDER, TARGETS, cuttings, gguf_seed, h11_answer, h11_requests,  # noqa: E402
                          read_by_client, read_by_door, served_by_core, served_by_door)

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
    ("answers", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nA:\x0c\n\r\n"),
    ("answers", b"HTTP/1.1 101 Switching\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
    # What is written of many cores, or of more than 953 GiB that are no whole MiB, was not read again.
    ("settings", b"max_cpu: 3500\n"), ("settings", b"max_memory: 1.1Ti\n"),
    # An integer of 309 digits went to the engine.
    ("asks", b'\x07{"model": "m", "input": "x", "dimensions": 1e308}'),
    # More memory in use than there is: of all there is the driver told nonsense, and the figure before counted.
    ("nvml", bytes({0: 1, 2: 2, 120: 1, 374: 1, 624: 1, 825: 255, 886: 255, 949: 1, 1015: 219, 1032: 1, 1057: 1,
                    1064: 1, 1073: 1}.get(at, 0) for at in range(1074))),
    # Two lengths behind a body, each on a line of its own.
    ("answers", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 9\r\n"
                b"Content-Length: 4\r\n\r\n"),
    # A comment between a key and its value, lost when a tenant got a new token.
    ("tenants", b"tenants:\n- name: b\n  token_sha256:\n#\n  - " + b"23" * 32 + b"\n  admin: true"),
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


def test_cores_with_three_decimals_are_whole_millicores():
    assert [b9agent.parse_cpu(text) for text in ("1.001", "1.009", "0.001", "999999", "1m")] == [
        1001, 1009, 1, 999999000, 1]


def pumped(seed, piece, size):
    """Nothing but a seed with one piece in it, again and again."""
    middle = len(seed) // 2
    return seed[:middle] + piece * (size // len(piece)) + seed[middle:]


def cost(check, data):
    """Seconds of this thread, the least of two."""
    spent = []
    for _ in range(2):
        begin = time.thread_time()
        check(data)
        spent.append(time.thread_time() - begin)
    return min(spent)


@pytest.mark.parametrize("name", NAMES)
def test_time_grows_with_the_input_and_not_with_its_square(name):
    """Of four times as much it takes four times as long; what is quadratic takes sixteen times."""
    target, small, large = TARGETS[name], 1 << 11, 1 << 13
    pieces = [piece for piece in target.pieces if piece and len(piece) < 64]
    for number, piece in enumerate([b"\n", b" ", b"\t"] + pieces[::max(1, len(pieces) // 12)]):
        seed = target.seeds[number % len(target.seeds)]
        if cost(target.check, pumped(seed, piece, large)) < 0.004:
            continue
        ratios = [cost(target.check, pumped(seed, piece, large)) / max(
            cost(target.check, pumped(seed, piece, small)), 1e-4) for _ in range(3)]
        assert min(ratios) < 10, (piece, ratios)


@pytest.mark.parametrize("name", NAMES)
def test_memory_grows_with_the_input(name):
    target, size = TARGETS[name], 1 << 14 if name != "streams" else 1 << 18
    most = 0
    target.check(target.seeds[0])  # what it imports is no cost of an input
    pieces = [piece for piece in target.pieces if piece and len(piece) < 64]
    for piece in pieces[::max(1, len(pieces) // 4)]:
        data = pumped(target.seeds[0], piece, size)
        tracemalloc.start()
        try:
            target.check(data)
            most = max(most, tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    # Empty lines and elements of XML take hundreds of bytes; what systems say is bounded before.
    assert most < (500 if name in ("gpus", "host") else 100) * size, most / size


def test_blank_lines_of_a_users_kubeconfig_cost_no_square(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".kube").mkdir()

    def look(size):
        (tmp_path / ".kube" / "config").write_bytes(b"\n" * size)
        return cost(lambda _: b9agent._users_kubeconfig(), b"")
    assert look(1 << 13) < 10 * max(look(1 << 11), 1e-3)


# ---------------------------------------------------------------------- there and back

ALWAYS = hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=60,
                             suppress_health_check=list(hypothesis.HealthCheck))
st = hypothesis.strategies
VISIBLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
ANY = st.text(st.characters(codec="utf-8"), max_size=12)
HEADERS = st.dictionaries(st.sampled_from(["X-A", "Authorization", "Content-Type", "X-B"]), VISIBLE | ANY, max_size=3)


def as_latin(value):
    return value.encode().decode("latin-1").strip(" \t")


@ALWAYS
@hypothesis.given(st.sampled_from(["GET", "POST", "DELETE"]), VISIBLE.map("/".__add__), HEADERS, st.none() | st.binary(max_size=9))
def test_requests_that_we_send_are_heard_as_they_were_meant(method, path, headers, body):
    endpoint = b9agent.Endpoint("http", "::1", 1994)
    try:
        head = b9agent._request_head(method, endpoint, path, headers, None if body is None else len(body))
    except b9agent.HttpFailure:
        return
    heard = h11_requests(head + (body or b""))
    if all(char.isprintable() for value in headers.values() for char in value):
        (found_method, target, found, found_body), = heard
        assert (found_method, target, found_body, found["host"]) == (method, path, body or b"", "[::1]:1994")
        assert all(found[name.lower()] == as_latin(value) for name, value in headers.items())
    assert len(heard) <= 1
    for serve in (served_by_core, served_by_door):
        told = [one for one in serve([head + (body or b"")])[0] if one]
        assert told == heard[:len(told)]


@ALWAYS
@hypothesis.given(st.sampled_from([200, 204, 404, 503]), st.binary(max_size=30), st.sampled_from(["GET", "HEAD"]))
def test_answers_that_we_send_are_read_as_they_were_meant(status, body, method):
    body = b"" if status == 204 else body
    head = b9agent.render_response(b9agent.Response(status, body), len(body))
    raw = head + (b"" if method == "HEAD" else body)
    expected = status, b"" if method == "HEAD" else body
    assert h11_answer(raw, method)[:2] == expected
    for read in (read_by_client, read_by_door):
        for pieces in cuttings(raw):
            assert read(pieces, method)[:2] == expected


SHAPES = st.lists(st.integers(1, 20), min_size=1, max_size=3)


@ALWAYS
@hypothesis.given(st.dictionaries(st.sampled_from(["llama.block_count", "llama.context_length", "llama.embedding_length", "x"]),
                                  st.integers(0, (1 << 32) - 1)), st.lists(SHAPES, min_size=1, max_size=4), ANY,
                  st.sampled_from("<>"))
def test_a_gguf_file_says_the_same_to_the_gguf_package(fields, shapes, name, order):
    gguf = pytest.importorskip("gguf")
    begins = [sum(math.prod(shape) * 4 + -math.prod(shape) * 4 % 32 for shape in shapes[:number])
              for number in range(len(shapes))]
    raw = gguf_seed(dict({"general.architecture": "llama", "general.name": name}, **fields), [
        ("t%d" % number, shape, 0, begin) for number, (shape, begin) in enumerate(zip(shapes, begins))], order)
    path = FOLDER.write("valid.gguf", raw + bytes(begins[-1] + math.prod(shapes[-1]) * 4))
    facts, known = b9agent.read_model(path), gguf.GGUFReader(path)
    assert facts.parameters == sum(int(tensor.n_elements) for tensor in known.tensors)
    assert facts.weights_bytes == sum(int(tensor.n_bytes) for tensor in known.tensors)
    for field, value in (("llama.block_count", facts.layers), ("llama.context_length", facts.context_tokens)):
        said = fields.get(field, 0)
        assert not said or known.get_field(field).contents() == said
        assert value == said or value is None and not 0 < said <= 4096, field
    assert not name.isalnum() or facts.name == known.get_field("general.name").contents()


@ALWAYS
@hypothesis.given(st.dictionaries(st.text("ab.", min_size=1, max_size=9), st.tuples(st.sampled_from(["float32", "uint8", "int64"]),
                                                                                   SHAPES), min_size=1, max_size=4))
def test_a_safetensors_file_of_the_package_is_read(tensors):
    numpy, pack = pytest.importorskip("numpy"), pytest.importorskip("safetensors.numpy")
    made = {name: numpy.zeros(shape, kind) for name, (kind, shape) in tensors.items()}
    facts = b9agent.read_model(FOLDER.write("valid.safetensors", pack.save(made, {"format": "pt"})))
    assert facts.parameters == sum(array.size for array in made.values())
    assert facts.weights_bytes == sum(array.nbytes for array in made.values())
