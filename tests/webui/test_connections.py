"""Sockets that say nothing, or say it slowly, are closed; who is served is not."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from webui import connections

seen: list[list[str]] = []  # the names of each request's headers
open_now: set[connections.LimitedConnection] = set()


def wait_until(holds):
    end_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.02)


async def small_app(scope, receive, send):
    """Answers with the length of the body; /stream says something every 0.2 s, ten times."""
    body, more = b"", True
    seen.append([name.decode() for name, _ in scope["headers"]])
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    if scope["path"] == "/large":
        await send({"type": "http.response.body", "body": b"a" * (8 << 20), "more_body": True})
    if scope["path"] == "/stream":
        for _ in range(10):
            await send({"type": "http.response.body", "body": b".", "more_body": True})
            await asyncio.sleep(0.2)
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


@pytest.fixture
def port(monkeypatch):
    for name in ("HEAD_S", "BODY_IDLE_S"):
        monkeypatch.setattr(connections, name, 1.0)
    sock = socket.create_server(("127.0.0.1", 0), backlog=200)
    config = uvicorn.Config(small_app, http=connections.limited(()), ws="none", lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    monkeypatch.setattr(f"{__name__}.open_now", server.server_state.connections)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    yield sock.getsockname()[1]
    server.should_exit = True
    thread.join()
    sock.close()


def open_socket(port, said=b""):
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    sock.sendall(said)
    return sock


def is_closed(sock):
    """Waits until the other side hangs up."""
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(4096):
            pass
    return True


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n",
    ],
)
def test_who_says_nothing_more_is_not_waited_for(port, said):
    with open_socket(port, said) as sock:
        assert is_closed(sock)
    assert httpx.get(f"http://127.0.0.1:{port}/").text == "0"


def test_a_head_that_comes_byte_by_byte_is_not_waited_for(port):
    with open_socket(port) as sock, pytest.raises(OSError):
        for letter in b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 1000:
            sock.sendall(bytes([letter]))
            time.sleep(0.05)


def test_a_second_request_on_a_kept_connection_has_the_same_limit(port):
    with open_socket(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        sock.sendall(b"GET / HTTP/1.1\r\n")
        assert is_closed(sock)


def test_an_answer_that_takes_longer_than_the_limits_is_not_cut(port):
    assert httpx.get(f"http://127.0.0.1:{port}/stream", timeout=60).text == "." * 10 + "0"


def test_a_body_that_keeps_coming_is_taken_however_slow(port):
    def pieces():
        for _ in range(8):
            yield b"x" * 100
            time.sleep(0.3)

    assert httpx.post(f"http://127.0.0.1:{port}/", content=pieces(), timeout=60).text == "800"


def test_of_too_many_the_longest_silent_goes_and_people_are_served(port, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 600.0)
    monkeypatch.setattr(connections, "TOTAL", 20)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(open_socket(port)) for _ in range(50)]
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=60).text == "0"
        assert all(is_closed(sock) for sock in silent[:30])


def test_one_machine_has_a_share_and_this_one_and_named_proxies_have_all(port):
    of_proxy = connections.limited(["10.0.0.0/8"])
    made = of_proxy.__new__(of_proxy)
    counted = {}
    for address in ("127.0.0.1", "::1", "10.1.2.3", "192.168.1.7", "::ffff:192.168.1.7"):
        made.client = (address, 1)
        counted[address] = made._counts()
    assert counted == {
        "127.0.0.1": False,
        "::1": False,
        "10.1.2.3": False,
        "192.168.1.7": True,
        "::ffff:192.168.1.7": True,
    }


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 2**20,
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 2**17,
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 2**17,
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * 2**20,
        b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n" * 2**14,
        b"GET " + b"/a" * 2**19,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=["header", "headers", "trailers", "chunk", "pipeline", "path", "http2", "connect", "letters", "lengths"],
)
def test_a_head_without_end_or_of_another_kind_is_refused_at_once(port, monkeypatch, said):
    for name in ("HEAD_S", "BODY_IDLE_S"):
        monkeypatch.setattr(connections, name, 600.0)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(said)
        assert is_closed(sock)
    assert httpx.get(f"http://127.0.0.1:{port}/").text == "0"


HEAD = b" / HTTP/1.1\r\nHost: x\r\n"


def answers(port, *pieces):
    """All that comes back for what is said piece by piece."""
    with open_socket(port) as sock:
        said = b""
        with contextlib.suppress(OSError):
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(0.2)
            while piece := sock.recv(65536):
                said += piece
        return said


def test_a_body_is_never_another_request(port):
    upgrade, hidden = b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"GET" + HEAD + b"\r\n"
    length = b"Content-Length: %d\r\n" % len(hidden)
    for pieces in [(head + hidden,) for head in (b"POST" + HEAD + upgrade + length + b"\r\n",)] + [
        (b"POST" + HEAD + upgrade + length + b"\r\n", hidden),
        (b"POST" + HEAD + upgrade + b"Transfer-Encoding: chunked\r\n\r\n", hidden),
    ]:
        assert answers(port, *pieces).count(b"HTTP/1.1 ") == 1, pieces
        assert b" 400 " in answers(port, *pieces)
    asked = answers(port, b"GET" + HEAD + upgrade + b"\r\n", hidden)
    assert asked.count(b"HTTP/1.1 200") == 1 and b"connection: close" in asked.lower()


def test_what_follows_a_body_is_no_header_and_one_host_is_asked_for(port):
    chunked = b"POST" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Forwarded-For: 127.0.0.1\r\n\r\n"
    assert b"content-type: text/plain" in answers(port, chunked) and seen[-1] == ["host", "transfer-encoding"]
    assert b" 400 " in answers(port, b"GET" + HEAD + b"Host: y\r\n\r\n")


def test_requests_behind_an_unanswered_one_end_the_connection(port):
    with open_socket(port, b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
        assert sock.recv(4096)
        sock.sendall(b"POST" + HEAD + b"Content-Length: 100\r\n\r\nhalf")
        assert is_closed(sock)


def test_who_takes_nothing_of_an_answer_goes(port, monkeypatch):
    for name, value in (("LOOK_S", 0.1), ("MOST_LOOKS", 10), ("HEAD_S", 600.0)):
        monkeypatch.setattr(connections, name, value)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        sock.sendall(b"GET /large" + HEAD[2:] + b"\r\n")
        wait_until(lambda: len(open_now) == 1)
        wait_until(lambda: not open_now)


def test_a_kept_connection_has_one_timer(port, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 600.0)
    with httpx.Client() as client:
        for _ in range(50):
            assert client.get(f"http://127.0.0.1:{port}/").text == "0"
        (one,) = open_now
        looks = [handle for handle in one.loop._scheduled if not handle.cancelled() and "_on_time" in repr(handle)]
        assert len(looks) <= 1
