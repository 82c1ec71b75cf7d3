"""The gate in front of the page: Host, Origin, size, rate and login, before Gradio sees a request.

Rules and what each stops (measured on plain Gradio 6.31, which lets the first two through):
  Host not ours            403   DNS rebinding
  Origin not our Host      403   another site posting to this page
  body too large           413   256 KiB of JSON, 25 MiB of upload
  too many per minute      429   login 5, wrong Bearer included; beyond this machine: upload 60, other writes 600
  no login with --listen   401   /login takes the password; the cookie is HttpOnly and SameSite=Lax
"""

import hmac
import re
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

JSON_BYTES = 256 * 1024
UPLOAD_BYTES = 25 * 1024 * 1024
WINDOW_S = 60.0
LIMITS = {"login": 5, "upload": 60, "write": 600}
COOKIE = "turbodiff_session"
SAFE = {"GET", "HEAD", "OPTIONS"}
OPEN_PATHS = ("/login", "/healthz", "/favicon.ico")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/?#\s]*)(?::\d*)?")  # RFC 9110: a name or address, then maybe a port
LOOPBACK = ("127.0.0.1", "::1")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"frame-ancestors 'self'"),
)


@dataclass(frozen=True)
class Rules:
    """What the gate lets in: host names without port, and the password, "" for none (this machine only)."""

    hosts: frozenset[str]
    password: str = ""


@dataclass
class Rates:
    """How often each address did each thing in the last minute."""

    seen: dict[tuple[str, str], deque[float]] = field(default_factory=lambda: defaultdict(deque))

    def spent(self, who: str, what: str, now_s: float) -> bool:
        """Whether one more would be too many."""
        times = self.seen[who, what]
        while times and now_s - times[0] > WINDOW_S:
            times.popleft()
        return len(times) >= LIMITS[what]

    def allow(self, who: str, what: str, now_s: float) -> bool:
        """Count one more; False if that is too many."""
        if self.spent(who, what, now_s):
            return False
        self.seen[who, what].append(now_s)
        if len(self.seen) > 10_000:  # a scan of addresses must not fill memory
            self.seen.clear()
        return True


class Gate:
    """ASGI middleware that applies the rules."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules
        self.rates = Rates()
        self.sessions: dict[str, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refuse(scope, headers)
        if refused:
            await _say(send, *refused)
        elif scope["path"] == "/login" and self.rules.password:
            await self._login(scope, headers, receive, send)
        elif self.rules.password and not self._knows(scope, headers) and scope["path"] not in OPEN_PATHS:
            await self._ask_login(scope, headers, send)
        else:
            limit = UPLOAD_BYTES if scope["path"].endswith("/upload") else JSON_BYTES
            await self.app(scope, _limited(receive, limit), _with_headers(send))

    def _refuse(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if host_name(host) not in self.rules.hosts:
            return 403, "this host name is not served here"
        if scope["method"] not in SAFE:
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2].lower() != host.lower():
                return 403, "requests from other sites are refused"
            limit = UPLOAD_BYTES if scope["path"].endswith("/upload") else JSON_BYTES
            if not headers.get("content-length", "0").isdecimal() or int(headers.get("content-length", "0")) > limit:
                return 413, f"at most {limit} bytes"
        return self._too_often(scope)

    def _too_often(self, scope: Scope) -> tuple[int, str] | None:
        who = _client(scope)
        if scope["method"] in SAFE:
            return None
        what = (
            "login" if scope["path"].endswith("/login") else "upload" if scope["path"].endswith("/upload") else "write"
        )
        if what != "login" and who in LOOPBACK:
            return None
        return None if self.rates.allow(who, what, time.monotonic()) else (429, "too many requests, wait a minute")

    def _knows(self, scope: Scope, headers: dict[str, str]) -> bool:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        if cookie and cookie.value in self.sessions:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or self.rates.spent(_client(scope), "login", time.monotonic()):
            return False
        right = hmac.compare_digest(token.encode(), self.rules.password.encode())
        if not right:  # a guess, as good as one at /login
            self.rates.allow(_client(scope), "login", time.monotonic())
        return right

    async def _login(self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await _say(send, 200, login_page(headers.get("accept-language", "")), "text/html; charset=utf-8")
            return
        form = parse_qs((await _body(receive, 4096)).decode("utf-8", "replace"))
        given = (form.get("password") or [""])[0]
        if not hmac.compare_digest(given.encode(), self.rules.password.encode()):
            await _say(
                send, 401, login_page(headers.get("accept-language", ""), wrong=True), "text/html; charset=utf-8"
            )
            return
        token = secrets.token_urlsafe(32)
        self.sessions[token] = time.monotonic()
        cookie = f"{COOKIE}={token}; HttpOnly; SameSite=Lax; Path=/"
        wants_page = "text/html" in headers.get("accept", "")
        await _say(
            send,
            303 if wants_page else 200,
            '{"success": true}',
            "application/json",
            ((b"set-cookie", cookie.encode()), (b"location", b"/"))
            if wants_page
            else ((b"set-cookie", cookie.encode()),),
        )

    async def _ask_login(self, scope: Scope, headers: dict[str, str], send: Send) -> None:
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            await _say(send, 303, "", "text/plain", ((b"location", b"/login"),))
        else:
            await _say(send, 401, "log in first: POST /login with the password, or Authorization: Bearer")


def _client(scope: Scope) -> str:
    return str((scope.get("client") or ("?",))[0])


def host_name(host: str) -> str:
    """The name in a Host header, without its port; "" for what is no host."""
    found = HOST.fullmatch(host)
    return found[1].strip("[]").lower() if found else ""


def allowed_hosts(listen: str, more: Iterable[str] = ()) -> frozenset[str]:
    """Names that this page answers to: loopback always, the address it listens on, and those given by name."""
    return frozenset({"localhost", "127.0.0.1", "::1", listen.lower(), *(name.lower() for name in more)})


def login_page(languages: str, wrong: bool = False) -> str:
    """The login page: one field, no script, nothing from elsewhere."""
    from webui.wording import Words, language_of

    words = Words(language_of(languages))
    error = f"<p role=alert>{words('server.wrong_password')}</p>" if wrong else ""
    return (
        f"<!doctype html><html lang={words.lang}><meta charset=utf-8>"
        "<meta name=viewport content=width=device-width>"
        "<title>turbodiff</title><style>body{font:16px system-ui,sans-serif;display:grid;place-items:center;"
        "height:90vh;"
        "color-scheme:light dark}form{display:grid;gap:12px;width:280px}input,button{font:inherit;padding:10px;"
        "border-radius:9px;border:1px solid #8888}</style><form method=post action=/login>"
        f"<h1 style='font-size:20px'>turbodiff</h1><label for=p>{words('server.password')}</label>"
        "<input id=p name=password type=password autofocus autocomplete=current-password>"
        f"<button>{words('server.log_in')}</button>{error}</form></html>"
    )


async def _body(receive: Receive, limit: int) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body") or len(body) > limit:
            return body[:limit]


def _limited(receive: Receive, limit: int) -> Receive:
    """The same stream, cut off beyond `limit` bytes: a body without a length must not fill memory."""
    passed = 0

    async def limited() -> Message:
        nonlocal passed
        message = await receive()
        passed += len(message.get("body", b""))
        return {"type": "http.disconnect"} if passed > limit else message

    return limited


def _with_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *HEADERS]}
        await send(message)

    return with_headers


async def _say(
    send: Send,
    status: int,
    text: str,
    kind: str = "text/plain; charset=utf-8",
    more: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    body = text.encode()
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()), *HEADERS, *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
