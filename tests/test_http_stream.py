"""Answers that are read as they come: lines over chunks, silence, a reader that is told to stop."""
import gc
import os
import socket
import subprocess
import sys
import threading
import weakref

import pytest

import b9agent
from b9agent import Endpoint, HttpFailure, Upload, http_stream
from helpers import quiet_port

HEAD = b"HTTP/1.1 200 OK\r\n"
FULL = """
import os, resource, sys, b9agent
resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    while True:
        os.dup(0)
except OSError:
    pass
try:
    b9agent.http_request("GET", b9agent.Endpoint("http", sys.argv[1], 9), "/", {}, None, 3.0)
except b9agent.HttpFailure as failure:
    print(f"{failure.kind}: {failure}")
"""
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def serve():
    """serve(talk): a peer on loopback that takes one connection and says what talk(sock) says."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def start(talk):
        def one():
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(20)
                talk(sock)
        threads.append(threading.Thread(target=one))
        threads[-1].start()
        return Endpoint("http", "127.0.0.1", listener.getsockname()[1])
    yield start
    for thread in threads:
        thread.join(20)
    listener.close()


def head_of(sock):
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65536)
    return data


def test_lines_are_whole_however_they_are_cut(serve):
    def talk(sock):
        head_of(sock)
        sock.sendall(CHUNKED)
        for piece in (b'{"a"', b":1}\n{", b'"b":2}\n{"c":3}'):
            sock.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        sock.sendall(b"0\r\n\r\n")
    with http_stream("GET", serve(talk), "/", {}, None, 5, 5) as stream:
        assert stream.status == 200
        assert list(stream.lines()) == [b'{"a":1}', b'{"b":2}', b'{"c":3}']


def test_a_line_without_end_is_refused(serve):
    def talk(sock):
        head_of(sock)
        try:
            sock.sendall(HEAD + b"\r\n" + b"x" * 3_000_000)
        except OSError:
            pass  # it has heard enough
    with http_stream("GET", serve(talk), "/", {}, None, 5, 5) as stream:
        with pytest.raises(HttpFailure) as failure:
            list(stream.lines())
    assert failure.value.kind == "too_large"


def test_an_answer_that_is_cut_off_is_a_failure(serve):
    def talk(sock):
        head_of(sock)
        sock.sendall(CHUNKED + b"5\r\nabc")
    with http_stream("GET", serve(talk), "/", {}, None, 5, 5) as stream:
        with pytest.raises(HttpFailure) as failure:
            stream.read()
    assert failure.value.kind == "closed"


def test_silence_has_a_limit_but_a_slow_talker_may_go_on(serve):
    go = threading.Event()

    def talk(sock):
        head_of(sock)
        sock.sendall(CHUNKED)
        for _ in range(6):  # longer in all than the limit on silence
            sock.sendall(b"2\r\nx\n\r\n")
            go.wait(0.15)
        go.wait(20)
    heard = []
    with http_stream("GET", serve(talk), "/", {}, None, 5, 0.6) as stream:
        with pytest.raises(HttpFailure) as failure:
            for line in stream.lines():
                heard.append(line)
    go.set()
    assert heard == [b"x"] * 6
    assert failure.value.kind == "timeout" and "stopped for 0.6 s" in str(failure.value)


def test_a_cut_ends_a_reader_in_another_thread(serve):
    def talk(sock):
        head_of(sock)
        sock.sendall(CHUNKED + b"2\r\nx\n\r\n")
        assert sock.recv(1) == b""  # until the other end hangs up
    stream = http_stream("GET", serve(talk), "/", {}, None, 5, 20)
    heard, ends = threading.Event(), []

    def read():
        try:
            for _ in stream.lines():
                heard.set()
        except HttpFailure as failure:
            ends.append(failure.kind)
    reader = threading.Thread(target=read)
    reader.start()
    assert heard.wait(10)
    stream.cut()
    reader.join(10)
    stream.close()
    assert ends == ["closed"]


def test_an_upload_is_sent_as_it_is_read(serve):
    got = []

    def talk(sock):
        head, _, body = head_of(sock).partition(b"\r\n\r\n")
        while len(body) < 300_000:
            body += sock.recv(65536)
        got.extend((b"Content-Length: 300000" in head, body))
        sock.sendall(HEAD + b"Content-Length: 2\r\n\r\nok")
    pieces = (b"%d" % digit * 100_000 for digit in range(3))
    with http_stream("POST", serve(talk), "/", {}, Upload(300_000, pieces), 5, 5) as stream:
        assert stream.read() == b"ok"
    assert got == [True, b"0" * 100_000 + b"1" * 100_000 + b"2" * 100_000]


def test_an_answer_before_the_end_of_an_upload_counts(serve):
    def talk(sock):
        head_of(sock)
        sock.sendall(HEAD.replace(b"200 OK", b"400 Bad") + b"Content-Length: 3\r\n\r\nbad")
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    pieces = (b"x" * 65536 for _ in range(64))
    with http_stream("POST", serve(talk), "/", {}, Upload(64 * 65536, pieces), 5, 5) as stream:
        assert (stream.status, stream.read()) == (400, b"bad")


def test_a_refused_connection_is_told_as_such():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(HttpFailure) as failure:
        http_stream("GET", Endpoint("http", "127.0.0.1", port), "/", {}, None, 5, 5)
    assert failure.value.kind == "refused"


@pytest.mark.parametrize("answer", [
    HEAD + b"Content-Length: 2\r\n\r\nok\r\n", CHUNKED + b"2\r\nok\r\n0\r\n\r\n\r\n",
    CHUNKED + b"2\r\nok\r\n0\r\n\r\n0\r\n\r\n"], ids=["a line more", "an empty chunk more", "two ends"])
def test_what_comes_behind_the_end_of_an_answer_is_not_looked_at(serve, answer):
    """We have asked for one answer and the end of the connection; segments are cut as they are."""
    def talk(sock):
        head_of(sock)
        sock.sendall(answer)
    with http_stream("GET", serve(talk), "/", {}, None, 5, 5) as stream:
        assert stream.read() == b"ok"


@pytest.mark.parametrize("host", ["127.0.0.1", "gw.invalid"])
def test_that_no_more_files_can_be_opened_is_said_of_a_name_too(host):
    """In a process of its own: its limit is the one that it has reached."""
    done = subprocess.run([sys.executable, "-c", FULL, host], cwd=os.path.dirname(b9agent.__file__),
                          stdout=subprocess.PIPE, check=True, timeout=60)
    assert done.stdout == b"files: Too many open files\n"


# -- what a failure leaves -----------------------------------------------------

def refused_connection(port):
    b9agent.http_request("GET", b9agent.Endpoint("http", "127.0.0.1", port), "/", {}, None, 5.0)


def ollama_that_is_not_there(port):
    b9agent.OllamaApi(b9agent.Endpoint("http", "127.0.0.1", port)).tags()


def client_without_a_door(port):
    client = b9agent.InferenceClient()
    client.configure("127.0.0.1", port, "token-of-somebody", raise_errors=True)
    client.list_models()


def retries_that_come_to_nothing(port):
    b9agent.EndpointRetryGuard("http://127.0.0.1:%d" % port, max_retries=1, wait=lambda seconds: None).call({})


def work_beside_that_fails(port):
    raise b9agent._outcome(lambda: refused_connection(port))[1]


def seen_of(act, port):
    """Weak references to what it raises, and to what that came from."""
    try:
        act(port)
    except Exception as error:
        return [weakref.ref(each) for each in (error, error.__cause__)
                if isinstance(each, (b9agent.AgentError, HttpFailure, b9agent.GuardTripped))]
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("act", [
    refused_connection, ollama_that_is_not_there, client_without_a_door, retries_that_come_to_nothing,
    work_beside_that_fails])
def test_a_failure_is_gone_without_the_collector(act):
    """What is in a cycle lies until a full collection, which comes by itself once in hours."""
    gc.disable()
    try:
        seen = seen_of(act, quiet_port())
        assert seen and [each() for each in seen] == [None] * len(seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("pieces", [0, 1])
def test_an_answer_that_nobody_read_to_its_end_is_gone_without_the_collector(pieces):
    ours, theirs = socket.socketpair()
    gc.disable()
    try:
        with ours, theirs:
            theirs.sendall(HEAD + b"Content-Length: 9\r\n\r\nhello")
            stream = b9agent.HttpStream(ours, "GET", 5.0, b9agent.now_s() + 5.0, None)
            for _ in range(pieces):
                assert next(stream.pieces()) == b"hello"
        seen = weakref.ref(stream)
        del stream
        assert seen() is None
    finally:
        gc.enable()
