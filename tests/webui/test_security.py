"""What the security rules let through and what they refuse, without Gradio behind them."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from webui import security
from webui.proxies import ASKING
from webui.security import COOKIE, JSON_BYTES, SecurityMiddleware, host_name
from webui.server import OnceAMinute


async def echo(scope, receive, send):
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


def ask(app, method, path, client="127.0.0.1", **options):
    async def once():
        transport = httpx.ASGITransport(app=app, client=(client, 4711))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as session:
            return await session.request(method, path, **options)

    with ThreadPoolExecutor(1) as beside:  # a browser test before us may have left a loop in this thread
        return beside.submit(asyncio.run, once()).result()


def guarded(password="", listen="127.0.0.1"):
    return SecurityMiddleware(echo, listen, password=password)


def test_a_foreign_host_is_refused():
    assert ask(guarded(), "GET", "/", headers={"host": "evil.example"}).status_code == 403
    assert ask(guarded(), "GET", "/", headers={"host": "127.0.0.1.evil.example:7860"}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "LOCALHOST"])
def test_this_machine_is_served_by_each_of_its_names(host):
    assert ask(guarded(), "GET", "/", headers={"host": host}).status_code == 200


def test_another_site_cannot_post():
    assert ask(guarded(), "POST", "/x", headers={"origin": "http://evil.example"}).status_code == 403
    assert ask(guarded(), "POST", "/x", headers={"origin": "null"}).status_code == 403
    assert ask(guarded(), "POST", "/x", headers={"origin": "http://[::1"}).status_code == 403
    assert ask(guarded(), "POST", "/x", headers={"origin": "http://127.0.0.1:7860"}).status_code == 200
    assert ask(guarded(), "POST", "/x").status_code == 200  # a program, not a browser


def test_a_body_has_a_limit_whether_or_not_it_says_its_length():
    assert ask(guarded(), "POST", "/x", content=b"x" * (JSON_BYTES + 1)).status_code == 413

    async def endless():
        for _ in range(5):
            yield b"x" * JSON_BYTES

    assert int(ask(guarded(), "POST", "/x", content=endless()).text) <= 2 * JSON_BYTES


@pytest.mark.parametrize("length", ["-1", "x", "9" * 5000], ids=["negative", "no number", "5000 digits"])
def test_a_length_that_no_body_has_is_refused(length):
    assert ask(guarded(), "POST", "/x", headers={"content-length": length}).status_code == 413


def test_answers_carry_the_security_headers():
    headers = ask(guarded(), "GET", "/").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'self'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    ("password", "kind", "own", "kept"),
    [
        ("open sesame", "text/html; charset=utf-8", "", "no-store"),
        ("open sesame", "video/mp4", "", "private"),
        ("open sesame", "text/css", "public, max-age=9", "public, max-age=9"),
        ("", "text/html; charset=utf-8", "", ""),
    ],
)
def test_what_a_password_opens_is_kept_by_no_proxy_and_the_page_by_no_browser(password, kind, own, kept):
    async def answer(scope, receive, send):
        headers = {"content-type": kind, **({"cache-control": own} if own else {})}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        await send({"type": "http.response.body", "body": b"x"})

    locked = SecurityMiddleware(answer, "127.0.0.1", password=password)
    told = ask(locked, "GET", "/", headers={"authorization": "Bearer open sesame"} if password else {})
    assert (told.status_code, told.headers.get("cache-control", "")) == (200, kept)


def test_without_a_login_only_the_login_page_answers():
    locked = guarded("open sesame")
    assert ask(locked, "GET", "/media/x").status_code == 401
    assert ask(locked, "GET", "/", headers={"accept": "text/html"}).headers["location"] == "/login"
    assert "<form" in ask(locked, "GET", "/login").text
    assert ask(locked, "GET", "/healthz").status_code == 200


def test_the_right_password_opens_and_the_wrong_one_does_not():
    locked = guarded("open sesame")
    assert ask(locked, "POST", "/login", data={"password": "guess"}).status_code == 401
    opened = ask(locked, "POST", "/login", data={"username": "me", "password": "open sesame"})
    assert opened.status_code == 200
    cookie = opened.cookies[COOKIE]
    assert "HttpOnly" in opened.headers["set-cookie"] and "SameSite=Lax" in opened.headers["set-cookie"]
    assert ask(locked, "GET", "/", headers={"cookie": f"{COOKIE}={cookie}"}).status_code == 200
    assert ask(locked, "GET", "/", headers={"authorization": "Bearer open sesame"}).status_code == 200
    assert ask(locked, "GET", "/", headers={"authorization": "Bearer guess"}).status_code == 401


def test_a_password_beyond_the_limit_of_a_login_is_a_wrong_one():
    locked = guarded("open sesame")
    assert ask(locked, "POST", "/login", content=b"x" * 4096 + b"&password=open+sesame").status_code == 401

    async def endless():
        for _ in range(3):
            yield b"x" * JSON_BYTES

    assert ask(locked, "POST", "/login", content=endless()).status_code == 401


def test_guessing_is_stopped_after_five_tries():
    locked = guarded("open sesame")
    answers = [
        ask(locked, "POST", "/login", client="10.0.0.9", data={"password": str(n)}).status_code for n in range(7)
    ]
    assert answers == [401] * 5 + [429] * 2
    assert ask(locked, "POST", "/login", client="10.0.0.8", data={"password": "open sesame"}).status_code == 200


def by_form(locked, client, word):
    return ask(locked, "POST", "/login", client=client, data={"password": word}).status_code


def by_bearer(locked, client, word):
    return ask(locked, "GET", "/", client=client, headers={"authorization": f"Bearer {word}"}).status_code


WAYS = {"form": by_form, "Bearer": by_bearer}


@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("first", WAYS)
def test_after_five_guesses_even_the_right_password_waits_by_either_way(first, second, monkeypatch):
    locked = guarded("open sesame")
    kept = ask(locked, "POST", "/login", client="10.0.0.9", data={"password": "open sesame"}).cookies[COOKIE]
    assert [WAYS[first](locked, "10.0.0.9", str(n)) for n in range(6)] == [401] * 5 + [429]
    assert WAYS[second](locked, "10.0.0.9", "open sesame") == 429
    assert WAYS[second](locked, "10.0.0.8", "open sesame") == 200
    session = {"cookie": f"{COOKIE}={kept}"}
    assert ask(locked, "GET", "/", client="10.0.0.9", headers=session).status_code == 200
    later_s = security.time.monotonic() + security.WINDOW_S + 1
    monkeypatch.setattr(security.time, "monotonic", lambda: later_s)
    assert WAYS[second](locked, "10.0.0.9", "open sesame") == 200


def test_who_knows_the_password_is_never_counted_and_resets_nobody():
    locked = guarded("open sesame")
    for way in WAYS.values():
        assert [way(locked, "10.0.0.9", str(n)) for n in range(2)] == [401] * 2
        assert {way(locked, "10.0.0.8", "open sesame") for _ in range(12)} == {200}
    assert [by_form(locked, "10.0.0.9", word) for word in ("open sesame", "x", "y")] == [200, 401, 429]


def test_guesses_sent_all_at_once_are_five_too():
    locked = guarded("open sesame")

    async def slow():
        await asyncio.sleep(0.05)
        yield b"password=x"

    async def together():
        transport = httpx.ASGITransport(app=locked, client=("10.0.0.9", 4711))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as session:
            return await asyncio.gather(*(session.post("/login", content=slow()) for _ in range(20)))

    with ThreadPoolExecutor(1) as beside:
        answers = beside.submit(asyncio.run, together()).result()
    assert sorted(answer.status_code for answer in answers) == [401] * 5 + [429] * 15


def test_many_addresses_guess_no_faster_and_this_machine_still_gets_in():
    locked = guarded("open sesame")
    spread = [by_bearer(locked, f"10.0.{n // 250}.{n % 250}", "x") for n in range(security.GUESSES + 20)]
    assert spread == [401] * security.GUESSES + [429] * 20
    assert by_form(locked, "10.9.9.9", "open sesame") == 429
    assert [by_form(locked, near, "open sesame") for near in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == [200] * 3


def test_a_scan_of_addresses_forgets_no_guess_and_fills_no_memory(monkeypatch):
    monkeypatch.setattr(security, "MAX_COUNTED", 150)
    rates = security.RateLimiter()
    assert [rates.allow("10.0.0.9", "login") for _ in range(6)] == [True] * 5 + [False]
    for number in range(2000):
        rates.allow(f"10.1.{number // 250}.{number % 250}", "write")
        rates.allow(f"10.1.{number // 250}.{number % 250}", "login")
        rates.is_spent(f"10.2.{number // 250}.{number % 250}", "login")
    assert rates.is_spent("10.0.0.9", "login")
    assert [rates.allow("10.0.0.9", "write") for _ in range(601)] == [True] * 600 + [False]
    assert all(rates.allow(f"10.3.0.{number}", "write") for number in range(149)) and rates.is_spent(
        "10.0.0.9", "write"
    )
    assert all(len(counted) <= 150 for counted in rates._times.values())


@pytest.mark.parametrize(
    ("clients", "spent"),
    [
        ([f"2a01:4f8:1:1::{n}" for n in range(6)], True),
        ([f"2a01:4f8:1:{n}::1" for n in range(6)], False),
        ([f"fd00::{n}" for n in range(6)], False),
        (["fe80::1%eth0", "fe80::1%eth1"] * 3, True),
        (["10.0.0.9", "::ffff:10.0.0.9"] * 3, True),
    ],
)
def test_one_machine_is_one_address_however_it_is_written(clients, spent):
    locked = guarded("open sesame")
    assert (by_bearer_all := [by_bearer(locked, client, "x") for client in clients])[:5] == [401] * 5
    assert by_bearer_all[5] == (429 if spent else 401)


def test_another_machine_is_slowed_down_and_this_one_is_not():
    open_to_all = guarded(listen="10.0.0.1")
    near = [ask(open_to_all, "POST", "/upload").status_code for _ in range(70)]
    far = [ask(open_to_all, "POST", "/upload", client="10.0.0.9").status_code for _ in range(70)]
    assert set(near) == {200}
    assert far.count(429) == 10


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "PROPFIND", "PUT", "PATCH", "DELETE", "OPTIONS", "FOO"])
def test_a_method_that_a_path_does_not_know_is_refused_with_those_that_it_knows(method):
    for password in ("", "open sesame"):
        login, logout = (ask(guarded(password), method, path) for path in ("/login", "/logout"))
        if password or method in ("CONNECT", "TRACE", "PROPFIND", "PUT", "PATCH", "FOO"):
            assert (login.status_code, logout.status_code) == (405, 405)
            assert "POST" in login.headers["allow"] and "POST" in logout.headers["allow"]
    assert ask(guarded("open sesame"), "GET", "/logout").status_code == 405


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost:7860", "localhost"),
        ("[::1]:80", "::1"),
        ("", ""),
        ("a:b:c", ""),
        ("[::1", ""),
        ("x@y", ""),
        ("a:80@b", ""),
    ],
)
def test_host_names_lose_their_port(host, name):
    assert host_name(host) == name


def test_a_job_belongs_to_the_machine_that_asks_and_this_machine_has_no_share():
    async def tell(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": ASKING.get().encode()})

    far = SecurityMiddleware(tell, "10.0.0.1")
    clients = ("10.0.0.9", "2a01:4f8:1:1::9", "127.0.0.1", "::1")
    assert [ask(far, "POST", "/x", client=client).text for client in clients] == [
        "10.0.0.9",
        "2a01:4f8:1:1::/64",
        "",
        "",
    ]


def test_a_sentence_of_the_server_is_logged_once_a_minute_with_how_often_it_was_meant(caplog):
    logger = logging.getLogger("a server")
    logger.addFilter(OnceAMinute())

    def say(text, at_s):
        record = logger.makeRecord(logger.name, logging.WARNING, "", 0, text, (), None)
        record.created = at_s
        logger.handle(record)

    for number in range(1000):
        say("Invalid HTTP request received.", 100.0 + number / 100)
    say("another sentence", 105.0)
    say("Invalid HTTP request received.", 161.0)
    assert [record.message for record in caplog.records] == [
        "Invalid HTTP request received.",
        "another sentence",
        "Invalid HTTP request received. (999 more of these in the last minute)",
    ]
    for number in range(5000):
        say(f"sentence {number}", 200.0)
    assert len(logger.filters[0]._said) <= 1000
