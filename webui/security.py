"""Host, Origin, size, rate and login checks, before Gradio sees a request.

Rules and what each stops (measured on plain Gradio 6.31, which lets the first two through):
  Host not ours            403   DNS rebinding
  Origin not our Host      403   another site posting to this page
  body too large           413   256 KiB of JSON, 25 MiB of upload
  too many per minute      429   login 5, wrong Bearer included; beyond this machine: upload 60, other writes 600
  no login with --listen   401   /login takes the password; the cookie is HttpOnly and SameSite=Lax

Starlette's TrustedHostMiddleware is not used: it cuts a Host at its first colon, which refuses "[::1]:7860".
"""

import hmac
import re
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from urllib.parse import parse_qs

from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from webui.wording import Words, language_of

JSON_BYTES = 256 * 1024
UPLOAD_BYTES = 25 * 1024 * 1024
LOGIN_BYTES = 4096
WINDOW_S = 60.0
LIMITS = {"login": 5, "upload": 60, "write": 600}
MAX_COUNTED = 10_000
COOKIE = "turbodiff_session"
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
OPEN_PATHS = ("/login", "/healthz", "/favicon.ico")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/?#\s]*)(?::\d*)?")  # RFC 9110: a name or address, then maybe a port
LOOPBACK = ("127.0.0.1", "::1")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"frame-ancestors 'self'"),
)


class RateLimiter:
    """Counts how often each address did each thing of `LIMITS` in the last minute."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, str], deque[float]] = defaultdict(deque)

    def is_spent(self, client: str, kind: str) -> bool:
        """Whether one more would be too many."""
        now_s, times = time.monotonic(), self._times[client, kind]
        while times and now_s - times[0] > WINDOW_S:
            times.popleft()
        return len(times) >= LIMITS[kind]

    def allow(self, client: str, kind: str) -> bool:
        """Count one more; False if that is too many."""
        if self.is_spent(client, kind):
            return False
        self._times[client, kind].append(time.monotonic())
        if len(self._times) > MAX_COUNTED:  # a scan of addresses must not fill memory
            self._times.clear()
        return True


class SecurityMiddleware:
    """ASGI middleware that applies the rules of this module.

    Args:
        listen: the address that is listened on; it and loopback are always served.
        host_names: further names that this page answers to.
        password: "" for none, which suits a page that only this machine reaches.
    """

    def __init__(self, app: ASGIApp, listen: str, host_names: Iterable[str] = (), password: str = "") -> None:
        self.app, self.password = app, password
        self.hosts = {name.lower() for name in ("localhost", *LOOPBACK, listen, *host_names)}
        self.rates = RateLimiter()
        self.sessions: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on; websockets are not served."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        limit = UPLOAD_BYTES if scope["path"].endswith("/upload") else JSON_BYTES
        received = 0

        async def limited_receive() -> Message:
            """The body, cut off beyond the limit: one that tells no length must not fill memory."""
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return {"type": "http.disconnect"} if received > limit else message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        request = Request(scope, limited_receive)
        answer: ASGIApp = self._refusal(request, limit) or self.app
        if answer is self.app and self.password:
            if scope["path"] == "/login":
                answer = await self._login(request)
            elif not self._is_logged_in(request) and scope["path"] not in OPEN_PATHS:
                wants_page = scope["method"] == "GET" and "text/html" in request.headers.get("accept", "")
                what = "log in first: POST /login with the password, or Authorization: Bearer"
                answer = RedirectResponse("/login", 303) if wants_page else PlainTextResponse(what, 401)
        await answer(scope, limited_receive, send_with_headers)

    def _refusal(self, request: Request, limit: int) -> Response | None:
        """The answer to a request that breaks a rule, None for one that keeps them."""
        headers, path = request.headers, request.scope["path"]
        host = headers.get("host", "")
        if host_name(host) not in self.hosts:
            return PlainTextResponse("this host name is not served here", 403)
        if request.method in SAFE_METHODS:
            return None
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return PlainTextResponse("requests from other sites are refused", 403)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > limit:
            return PlainTextResponse(f"at most {limit} bytes", 413)
        kind = next((name for name in ("login", "upload") if path.endswith(f"/{name}")), "write")
        client = _client(request)
        if (kind == "login" or client not in LOOPBACK) and not self.rates.allow(client, kind):
            return PlainTextResponse("too many requests, wait a minute", 429)
        return None

    def _is_logged_in(self, request: Request) -> bool:
        """Whether the request brings a session's cookie or the password; a wrong one counts as a login."""
        if request.cookies.get(COOKIE) in self.sessions:
            return True
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        client = _client(request)
        if scheme.lower() != "bearer" or self.rates.is_spent(client, "login"):
            return False
        right = hmac.compare_digest(token.encode(), self.password.encode())
        if not right:
            self.rates.allow(client, "login")
        return right

    async def _login(self, request: Request) -> Response:
        """The login page, or what a password gets: a session, or the page once more."""
        languages = request.headers.get("accept-language", "")
        if request.method != "POST":
            return HTMLResponse(login_page(languages))
        try:
            body = await request.body()
        except ClientDisconnect:
            body = b""
        fields = parse_qs(body[:LOGIN_BYTES].decode("utf-8", "replace"))
        given = fields.get("password", [""])[0]
        if not hmac.compare_digest(given.encode(), self.password.encode()):
            return HTMLResponse(login_page(languages, wrong=True), 401)
        token = secrets.token_urlsafe(32)
        self.sessions.add(token)
        wants_page = "text/html" in request.headers.get("accept", "")
        answer = RedirectResponse("/", 303) if wants_page else JSONResponse({"success": True})
        answer.headers["set-cookie"] = f"{COOKIE}={token}; HttpOnly; SameSite=Lax; Path=/"
        return answer


def _client(request: Request) -> str:
    return request.client.host if request.client else "?"


def host_name(host: str) -> str:
    """The name in a Host header, without its port; "" for what is no host."""
    found = HOST.fullmatch(host)
    return found[1].strip("[]").lower() if found else ""


def login_page(languages: str, wrong: bool = False) -> str:
    """The login page in a language of an Accept-Language header: one field, no script, nothing from elsewhere."""
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
