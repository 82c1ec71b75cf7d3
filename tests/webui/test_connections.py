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


async def small_app(scope, receive, send):
    """Answers with the length of the body; /stream says something every 0.2 s, ten times."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
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
