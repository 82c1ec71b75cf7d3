"""Where the page listens, and a sentence of its own for each reason that it cannot."""

import contextlib
import socket
from pathlib import Path

import pytest

from tests.webui.test_security import ask, echo, guarded
from turbodiff.spec.errors import PortInUseError, RequestError
from turbodiff.spec.page_flags import ASK, page_parser
from turbodiff.spec.wording import language_of
from webui import listening, sessions
from webui.app import check, read_password, without_password
from webui.listening import is_loopback, listening_sockets, own_addresses, own_names, reachable_at, url_of
from webui.proxies import ProxyMiddleware, RootPathMiddleware
from webui.security import SecurityMiddleware, same_site
from webui.sessions import Sessions

ROOT = Path(__file__).resolve().parents[2]


def refused(listen, port):
    with pytest.raises((RequestError, PortInUseError)) as caught:
        for sock in listening_sockets(listen, port):
            sock.close()
    return caught.value


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("port", [0, -1, 65536, 70000])
def test_a_port_that_none_is_says_its_range(port):
    assert refused("127.0.0.1", port).code == "bad_port"


@pytest.mark.parametrize("listen", ["203.0.113.77", "2001:db8::77"])
def test_an_address_of_another_machine_is_called_so_and_ours_are_listed(listen):
    error = refused(listen, free_port())
    assert error.code == "address_absent" and "127.0.0.1" in error.expected


@pytest.mark.parametrize("listen", ["", "no.such.name.invalid", "http://0.0.0.0", "1.2.3.4.5", "a" * 300, "\udc80"])
def test_what_is_no_address_is_called_so(listen):
    assert refused(listen, free_port()).code == "address_unknown"


def test_a_port_that_needs_a_right_says_which_ports_need_none():
    class Denied(OSError):
        pass

    error = listening._refused(Denied(13, "Permission denied"), "0.0.0.0", 80)
    assert error.code == "port_forbidden" and "above" in error.expected and error.exit_code == 2


def test_a_taken_port_is_not_confused_with_them():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        assert refused("127.0.0.1", holder.getsockname()[1]).code == "port_in_use"


@pytest.mark.parametrize(("listen", "reached"), [("localhost", ["127.0.0.1"]), ("0.0.0.0", ["127.0.0.1"])])
def test_every_address_of_a_name_is_listened_on(listen, reached):
    port = free_port()
    with contextlib.ExitStack() as stack:
        for sock in listening_sockets(listen, port):
            stack.enter_context(sock).listen()
        for address in reached:
            socket.create_connection((address, port), 2).close()


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
@pytest.mark.parametrize("listen", ["::", "[::]"])
def test_all_of_ipv6_takes_ipv4_too(listen):
    port = free_port()
    (sock,) = listening_sockets(listen, port)
    with sock:
        sock.listen()
        for address in ("::1", "127.0.0.1"):
            socket.create_connection((address, port), 2).close()


def test_loopback_in_any_spelling_needs_no_password():
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "", "no.such.name.invalid")))


def test_the_address_for_people_can_be_opened():
    assert url_of(reachable_at("0.0.0.0"), 7860) == url_of(reachable_at("::"), 7860) == "http://127.0.0.1:7860"
    assert url_of("::1", 7860) == "http://[::1]:7860"


# --- who may come in ---------------------------------------------------------------------------------------------


def test_another_machine_comes_in_by_any_address_and_by_the_names_of_this_machine():
    page = guarded(listen="0.0.0.0")
    hosts = [*own_addresses(), *own_names(), "192.168.7.7", "[2001:db8::1]", "localhost."]
    hosts = [f"[{host}]" if host.count(":") > 1 and host[0] != "[" else host for host in hosts if "%" not in host]
    assert {ask(page, "GET", "/", headers={"host": f"{host}:7860"}).status_code for host in hosts} == {200}


@pytest.mark.parametrize("host", ["evil.example", "192.168.7.7.evil.example", "rebind.local", "0x7f.1.example"])
def test_a_name_that_can_be_rebound_is_refused_and_the_flag_is_named(host):
    refusal = ask(guarded(listen="0.0.0.0"), "GET", "/", headers={"host": host, "accept-language": "fr, zh;q=0.1"})
    assert refusal.status_code == 403 and f"--host-name {host}" in refusal.text and "名称" in refusal.text


def test_a_page_for_this_machine_alone_answers_to_no_other_address():
    assert ask(guarded(), "GET", "/", headers={"host": "192.168.7.7:7860"}).status_code == 403


@pytest.mark.parametrize(
    ("origin", "host", "proxied", "same"),
    [
        ("https://video.example", "video.example:443", False, True),
        ("http://video.example:80", "video.example", False, True),
        ("https://video.example", "video.example", False, True),
        ("http://[::1]:7860", "[::1]:7860", False, True),
        ("https://video.example:8443", "video.example", False, False),
        ("https://video.example:8443", "video.example", True, True),
        ("https://video.example:8443", "video.example:8444", True, False),
        ("https://evil.example", "video.example", True, False),
        ("null", "video.example", True, False),
        ("https://video.example:x", "video.example", True, False),
        ("http://[::1", "[::1]", True, False),
        ("", "", True, False),
        ("file://", "", True, False),
    ],
)
def test_an_origin_is_ours_by_name_and_port(origin, host, proxied, same):
    assert same_site(origin, host, proxied) is same


# --- the password, the language ----------------------------------------------------------------------------------


def test_a_password_leaves_the_command_line():
    argv = ["--listen", "--password", "a b", "--port", "1", "--password=x", "--password-file", "f", "--mcp"]
    assert without_password(argv) == ["--listen", "--port", "1", "--mcp"]
    assert without_password(["--password", "--port", "1"]) == ["--port", "1"]
    assert page_parser().parse_args(["--password"]).password == ASK


FORMS = {
    "UTF-8": b"\xe5\xaf\x86 ok\n", "no end of line": b"\xe5\xaf\x86 ok", "Windows": b"\xe5\xaf\x86 ok\r\nmore\r\n",
    "byte order mark": b"\xef\xbb\xbf\xe5\xaf\x86 ok\n", "the next line is GBK": b"\xe5\xaf\x86 ok\n\xc3\xdc",
}  # fmt: skip
UNUSABLE = {
    "empty": b"", "an empty line": b"\n", "only a mark": b"\xef\xbb\xbf\n", "GBK": "密码".encode("gbk"),
    "UTF-16": "open".encode("utf-16"), "UTF-16 without mark": "open".encode("utf-16-be"), "NUL": b"a\0b",
    "UTF-16 of Chinese": "密码".encode("utf-16"), "ESC": b"\x1b[A",
    "4 KiB": "密".encode() * 2000, "1 KiB and a byte": b"a" * 1025,
}  # fmt: skip


def password_of(*flags):
    return read_password(page_parser().parse_args(flags))


@pytest.mark.parametrize("form", FORMS)
def test_a_password_file_is_its_first_line_as_utf8(tmp_path, form):
    (tmp_path / "file").write_bytes(FORMS[form])
    assert password_of("--password-file", str(tmp_path / "file")) == "密 ok"
    with pytest.raises(RequestError, match="cannot be read"):
        password_of("--password-file", str(tmp_path / "none"))


@pytest.mark.parametrize("form", UNUSABLE)
def test_a_password_that_nobody_could_type_is_refused_at_the_start(tmp_path, form):
    (tmp_path / "file").write_bytes(UNUSABLE[form])
    with pytest.raises(RequestError, match="cannot be used") as caught:
        password_of("--password-file", str(tmp_path / "file"))
    assert caught.value.code == "password_unusable" and "UTF-8" in caught.value.expected
    assert (" bytes" in caught.value.got) is ("KiB" in form) and str(caught.value).isprintable()


@pytest.mark.parametrize("value", ["\udc80\udcff", "line\n", "\r", "a" * 1025])
def test_the_variable_and_the_flag_are_held_to_the_same(monkeypatch, value):
    monkeypatch.setenv("TURBODIFF_PASSWORD", value)
    for flags, field in (((), "$TURBODIFF_PASSWORD"), (("--password", value), "--password")):
        with pytest.raises(RequestError) as caught:
            password_of(*flags)
        assert (caught.value.code, caught.value.field) == ("password_unusable", field)


def test_an_empty_variable_is_none_and_an_empty_flag_is_a_mistake(monkeypatch):
    monkeypatch.setenv("TURBODIFF_PASSWORD", "")
    assert password_of() == ""
    with pytest.raises(RequestError, match="nothing"):
        password_of("--password", "")


@pytest.mark.parametrize("word", ["密码", "a" * 1024, "密" * 341, "a+b&c=d %41"])
def test_whatever_is_taken_as_a_password_logs_in(word, monkeypatch):
    monkeypatch.setenv("TURBODIFF_PASSWORD", word)
    page = guarded(password_of())
    form = {"username": "somebody", "password": word}
    assert ask(page, "POST", "/login", data=form).status_code == 200
    assert ask(page, "GET", "/", headers={"authorization": b"Bearer " + word.encode()}).status_code == 200


@pytest.mark.parametrize(
    ("asked", "lang"),
    [
        ("en;q=0.5,zh;q=0.9", "zh"),
        ("de,zh;q=0.5,en;q=0.4", "zh"),
        ("zh;q=0,en", "en"),
        ("zh;q=0", "en"),
        ("*", "en"),
        ("fr-CH, fr;q=0.9, en;q=0.8, de;q=0.7, *;q=0.5", "en"),
        ("zh-Hans-CN ; q=0.8 , en ; q=0.7", "zh"),
        ("zh;q=x,en;q=0.1", "en"),
        ("zh;q=nan,en;q=0.1", "en"),
        ("zh;q=" + "9" * 5000, "en"),
        (",;q=,,", "en"),
        ("zh_CN.UTF-8", "zh"),
        ("zh_Hans_CN.UTF-8@pinyin", "zh"),
        ("ZH-hant", "zh"),
        ("zhx", "en"),
        ("zha-CN,zh;q=0.1", "zh"),
        ("zh;q=0.3,enm", "zh"),
        ("zhx_CN.UTF-8", "en"),
        ("chinese,zhang", "en"),
        ("C.UTF-8", "en"),
    ],
)
def test_the_language_is_the_best_of_those_that_are_spoken(asked, lang):
    assert language_of(asked) == lang


# --- cookies of other programs, sessions -------------------------------------------------------------------------

STRANGE = ["a/b=1", "x[y]=1", 'j={"a": "b;c"}', "ü=é", "alone", "=", ";;", "a=" + "x" * 9000, '"', 'a="b', "$Version=1"]


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("strange", STRANGE)
def test_cookies_of_other_programs_keep_the_login(strange, place):
    page = guarded("open sesame")
    ours = ask(page, "POST", "/login", data={"password": "open sesame"}).headers["set-cookie"].partition(";")[0]
    line = f"{strange}; {ours}" if place == "before" else f"{ours}; {strange}"
    assert ask(page, "GET", "/", headers={"cookie": line.encode("utf-8")}).status_code == 200


def test_a_second_page_on_this_host_keeps_its_own_login():
    pages = [SecurityMiddleware(echo, "127.0.0.1", password="open sesame", port=port) for port in (7860, 7861)]
    logins = [ask(page, "POST", "/login", data={"password": "open sesame"}) for page in pages]
    both = "; ".join(login.headers["set-cookie"].partition(";")[0] for login in logins)
    assert [ask(page, "GET", "/", headers={"cookie": both}).status_code for page in pages] == [200, 200]


def test_a_session_outlives_a_restart_ends_in_time_and_can_be_logged_out(tmp_path, monkeypatch):
    def page(password="open sesame"):
        kept = sessions.Sessions(password, tmp_path / "sessions.json")
        return SecurityMiddleware(echo, "127.0.0.1", password=password, sessions=kept)

    first = page()
    cookie = ask(first, "POST", "/login", data={"password": "open sesame"}).headers["set-cookie"].partition(";")[0]
    headers = {"cookie": cookie}
    assert cookie.partition("=")[2] not in (tmp_path / "sessions.json").read_text()
    assert (tmp_path / "sessions.json").stat().st_mode & 0o077 == 0
    assert ask(page(), "GET", "/", headers=headers).status_code == 200
    assert ask(page("another"), "GET", "/", headers=headers).status_code == 401
    ends_s = sessions.time.time() + sessions.LASTS_S + 1
    monkeypatch.setattr(sessions.time, "time", lambda: ends_s)
    assert ask(page(), "GET", "/", headers=headers).status_code == 401
    monkeypatch.undo()
    again = page()
    assert ask(again, "POST", "/logout", headers={**headers, "origin": "http://evil.example"}).status_code == 403
    out = ask(again, "POST", "/logout", headers=headers)
    assert out.headers["location"] == "/login" and "Max-Age=0" in out.headers["set-cookie"]
    assert (
        ask(again, "GET", "/", headers=headers).status_code
        == ask(page(), "GET", "/", headers=headers).status_code
        == 401
    )


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": "b"}', '{"a": 1e999}', "\0" * 99])
def test_a_damaged_session_file_costs_a_login_only(tmp_path, text):
    (tmp_path / "sessions.json").write_text(text)
    kept = Sessions("p", tmp_path / "sessions.json")
    assert kept.holds(kept.add())


# --- reverse proxies ---------------------------------------------------------------------------------------------


async def tell(scope, receive, send):
    headers = dict(scope["headers"])
    told = [scope["client"][0], scope["scheme"], headers[b"host"].decode(), scope["path"], scope.get("root_path", "")]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": " ".join(told).encode()})


FORWARDED = {
    "x-forwarded-for": "6.6.6.6, 10.0.0.9", "x-forwarded-proto": "https", "x-forwarded-host": "video.example",
}  # fmt: skip


def test_forwarded_headers_count_only_from_named_proxies():
    page = ProxyMiddleware(tell, ["10.0.0.1", "192.168.0.0/16"])
    for named in ("10.0.0.1", "192.168.3.4", "::ffff:10.0.0.1"):
        assert ask(page, "GET", "/x", client=named, headers=FORWARDED).text == "10.0.0.9 https video.example /x "
    for other in ("127.0.0.1", "10.0.0.2", "::1"):
        assert ask(page, "GET", "/x", client=other, headers=FORWARDED).text == f"{other} http 127.0.0.1:7860 /x "


HERE = "127.0.0.1:7860"
NEAREST = [  # (headers, what is told of the client, scheme and Host), by a proxy at 10.0.0.1 that is named beside 10/8
    ({"x-forwarded-for": "9.9.9.9:5678"}, "9.9.9.9 http " + HERE),
    ({"x-forwarded-for": "[2001:db8::1]:80"}, "2001:db8::1 http " + HERE),
    ({"x-forwarded-for": "[2001:db8::1], 10.0.0.2:99"}, "2001:db8::1 http " + HERE),
    ({"x-forwarded-for": "::ffff:9.9.9.9"}, "9.9.9.9 http " + HERE),
    ({"x-forwarded-for": "6.6.6.6, 9.9.9.9, 10.0.0.2"}, "9.9.9.9 http " + HERE),
    ({"x-forwarded-for": "6.6.6.6, unknown"}, "10.0.0.1 http " + HERE),
    ({"x-forwarded-for": "9.9.9.9, 10.0.0.2", "x-forwarded-proto": "https, http"}, "9.9.9.9 https " + HERE),
    ({"forwarded": "for=9.9.9.9;proto=https;host=video.example"}, "9.9.9.9 https video.example"),
    ({"forwarded": 'For="[2001:db8::1]:4711";PROTO=HTTPS;Host="a.example:8443"'}, "2001:db8::1 https a.example:8443"),
    ({"forwarded": 'for="9.9.9.9:5678" ; by="[::1]:_x"; host="a.example"'}, "9.9.9.9 http a.example"),
    ({"forwarded": 'for=6.6.6.6, for="9.9.9.9:_port";proto=https, for=10.0.0.2;proto=http'}, "9.9.9.9 https " + HERE),
    ({"forwarded": "for=6.6.6.6;host=evil.example, for=9.9.9.9"}, "9.9.9.9 http " + HERE),
    ({"forwarded": 'for="6.6.6.6, for=7.7.7.7, for=9.9.9.9;proto=https'}, "9.9.9.9 https " + HERE),
    ({"forwarded": 'for="a,b;c\\"", for="[2001:db8::1]"'}, "2001:db8::1 http " + HERE),
    ({"forwarded": "for=9.9.9.9, for=_hidden;proto=https"}, "10.0.0.1 https " + HERE),
    ({"forwarded": "for=6.6.6.6;proto=https;host=a.example", "x-forwarded-for": "9.9.9.9"}, "9.9.9.9 http " + HERE),
]  # fmt: skip
GARBAGE = [
    "", ",", ";", "=", '"', "for", "for=", 'for="', "for=[::1", "for=unknown", "for=;host=;proto=", "\xff\x00=;",
    "," * 9000, "proto=gopher;host=a@b/c", "host=" + "[" * 999, 'for="' + "\\" * 3001, "for=1.2.3.4.5", "host=a b",
    ";;for==9.9.9.9",
]  # fmt: skip


@pytest.mark.parametrize(("headers", "told"), NEAREST)
def test_named_proxies_are_read_from_the_nearest_outward(headers, told):
    page = ProxyMiddleware(tell, ["10.0.0.0/8"])
    assert ask(page, "GET", "/x", client="10.0.0.1", headers=headers).text == f"{told} /x "
    assert ask(page, "GET", "/x", client="9.0.0.1", headers=headers).text == "9.0.0.1 http 127.0.0.1:7860 /x "


@pytest.mark.parametrize(
    "name", ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-port"]
)
@pytest.mark.parametrize("value", GARBAGE)
def test_garbage_from_a_proxy_is_as_nothing(name, value):
    page = ProxyMiddleware(SecurityMiddleware(tell, "127.0.0.1"), ["10.0.0.0/8"])
    answer = ask(page, "GET", "/x", client="10.0.0.1", headers={name: value.encode("latin-1")})
    if (name, value) == ("x-forwarded-host", "for"):
        assert answer.status_code == 403  # a name, though not ours
    else:
        assert (answer.status_code, answer.text) == (200, f"10.0.0.1 http {HERE} /x ")


def test_guesses_with_changing_forwarded_addresses_are_counted_as_one_client():
    page = ProxyMiddleware(guarded("open sesame"))
    guesses = [
        ask(page, "POST", "/login", data={"password": "x"}, headers={"x-forwarded-for": f"9.9.9.{n}"}) for n in range(9)
    ]
    assert [guess.status_code for guess in guesses] == [401] * 5 + [429] * 4


@pytest.mark.parametrize("path", ["/zh/config", "/video/zh/config"])
def test_a_prefix_is_known_whether_or_not_the_proxy_takes_it_off(path):
    page = ProxyMiddleware(RootPathMiddleware(tell, "/video"), root_path="/video")
    assert ask(page, "GET", path).text.split()[-2:] == ["/video/zh/config", "/video"]


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--host-name", "http://video.example"], "bad_host_name"),
        (["--host-name", "video.example:443"], "bad_host_name"),
        (["--host-name", "video.example/x"], "bad_host_name"),
        (["--host-name", ""], "bad_host_name"),
        (["--root-path", "/../x"], "bad_root_path"),
        (["--root-path", "/x/."], "bad_root_path"),
        (["--root-path", "/a b"], "bad_root_path"),
        (["--root-path", "video"], "bad_root_path"),
        (["--proxy", "nonsense"], "bad_proxy"),
    ],
)
def test_what_could_never_match_a_request_is_refused_at_the_start(flags, code):
    with pytest.raises(RequestError) as caught:
        check(page_parser().parse_args(flags))
    assert caught.value.code == code


def test_names_and_paths_that_can_match_are_taken():
    flags = ["--host-name", "video.example", "--host-name", "[2001:db8::1]", "--host-name", "10.0.0.7"]
    check(page_parser().parse_args([*flags, "--root-path", "/~me/video.2/", "--port", str(free_port())]))
