"""Connections whose requests never become whole; before any key is asked for."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import psutil
import pytest
import uvicorn

from fastvlm_convert.serve.connection import MAX_HEAD_BYTES, GuardedProtocol
from fastvlm_convert.serve.server import listen
from tests.serve.servers import until

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"


class Impatient(GuardedProtocol):
    head_s = 0.3


async def app(scope, receive, send):
    """Answers at once to `/`, and reads the body to `/read` and takes its time for it."""
    if scope["path"] == "/read":
        while (await receive()).get("more_body"):
            pass
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    sock = listen("127.0.0.1", 0)
    config = uvicorn.Config(app, http=Impatient, log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield sock.getsockname()[1]
    server.should_exit = True
    thread.join(10)
    sock.close()


def said(client: socket.socket) -> bytes:
    """Everything until the server closes the connection; it must."""
    client.settimeout(5)
    parts = []
    try:
        while part := client.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def cut_off(client: socket.socket, part: bytes, seconds: float, pause_s: float = 0.0) -> int:
    """Send the same again and again; how many bytes were sent until the server closed the connection."""
    end, sent = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        try:
            sent += client.send(part)
        except (ConnectionResetError, BrokenPipeError):
            return sent
        time.sleep(pause_s)
    pytest.fail("the connection is still open")


def connected(port: int) -> closing[socket.socket]:
    return closing(socket.create_connection(("127.0.0.1", port), timeout=5))


@pytest.mark.parametrize("begin", [b"", b"\r\n", b"GET /", HEAD, HEAD + b"X: y"])
def test_a_head_that_does_not_become_whole_ends_the_connection(port, begin):
    with connected(port) as client:
        client.sendall(begin)
        assert said(client).startswith(b"HTTP/1.1 408 ")


def test_neither_do_bytes_now_and_then_keep_it_open(port):
    with connected(port) as client:
        client.sendall(HEAD)
        cut_off(client, b"x: y\r\n", seconds=3, pause_s=0.05)


@pytest.mark.parametrize(
    "begin", [b"GET /", HEAD + b"X: ", POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: "]
)
def test_what_is_not_content_does_not_fill_the_memory(port, begin):
    memory = psutil.Process().memory_info
    with connected(port) as client:
        client.sendall(begin)
        before = memory().rss
        assert cut_off(client, b"x" * 100_000, seconds=5) < 20_000_000  # what the kernel holds
        assert memory().rss - before < 10_000_000


def test_many_headers_are_as_much_as_a_long_one(port):
    with connected(port) as client:
        client.sendall(HEAD)
        assert cut_off(client, b"x: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 1000, seconds=5) < 20_000_000


def test_a_request_whose_body_nobody_reads_any_more_ends_too(port):
    with connected(port) as client:
        client.sendall(POST + b"Content-Length: 1000000\r\n\r\nx")
        began = time.monotonic()
        assert said(client).startswith(b"HTTP/1.1 200 ")
        assert time.monotonic() - began < 3
    with connected(port) as client:
        client.sendall(POST + b"Content-Length: 1000000\r\n\r\n")
        cut_off(client, b"x", seconds=3, pause_s=0.05)


def test_ordinary_requests_pass_one_after_the_other_and_at_once(port):
    body = b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000
    read = POST.replace(b"/ ", b"/read ", 1)
    with connected(port) as client:
        for _ in range(2):
            client.sendall(HEAD + b"X: " + b"y" * (MAX_HEAD_BYTES - 1000) + b"\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        client.sendall((read + body + HEAD + b"\r\n") * 2 + HEAD + b"Connection: close\r\n\r\n")
        assert said(client).count(b"HTTP/1.1 200 ") == 5


def test_a_body_may_take_longer_than_a_head(port):
    with connected(port) as client:
        client.sendall(POST.replace(b"/ ", b"/read ", 1) + b"Content-Length: 8\r\n\r\n")
        for _ in range(8):
            time.sleep(0.1)
            client.sendall(b"x")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
