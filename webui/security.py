"""Host, Origin, size, rate and login checks, before Gradio sees a request.

Rules and what each stops (measured on plain Gradio 6.31, which lets the first two through):
  Host not ours            403   DNS rebinding
  Origin not our Host      403   another site posting to this page
  body too large           413   256 KiB of JSON, 25 MiB of upload
  too many per minute      429   5 wrong passwords of an address, 100 of all together, by login or Bearer: then the
                                 right one waits, too; beyond this machine also 60 uploads, 600 other writes
  no login with --listen   401   /login takes the password; the cookie is HttpOnly and SameSite=Lax; /logout ends it
  a named user's token     403   beyond the calls of the API, and the clips and exports that these name

An IP address as Host cannot be rebound, so any is served where other machines may come in; of names only this
machine's and those of --host-name.

Starlette's TrustedHostMiddleware is not used: it cuts a Host at its first colon, which refuses "[::1]:7860".
"""

import hmac
import ipaddress
import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from urllib.parse import parse_qs, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from webui.listening import is_loopback, own_names
from webui.proxies import ASKING, FROM_PROXY, PORTS, USER, address_of, host_name
from webui.request_guard import READ
from webui.sessions import LASTS_S, Sessions
from webui.wording import Words, language_of

JSON_BYTES = 256 * 1024
UPLOAD_BYTES = 25 * 1024 * 1024
LOGIN_BYTES = 4096
WINDOW_S = 60.0
LIMITS = {"login": 5, "upload": 60, "write": 600}
GUESSES = 100  # wrong passwords of all addresses beyond this machine: many addresses guess no faster
EVERYBODY = "everybody"
MAX_COUNTED = 10_000
COOKIE = "turbodiff_session"
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
METHODS = SAFE_METHODS | {"POST", "DELETE"}  # the page's own, and of agents (MCP): a 200 for CONNECT has no body
OPEN_PATHS = ("/login", "/logout", "/healthz", "/favicon.ico")
# what the token of a named user opens; everything else shows the jobs of all
OF_USERS = re.compile(
    r"/gradio_api/run/(estimate|submit|status|cancel|list|result|export)|/media/[^/]+(/poster)?|/exports/[^/]+|/healthz"
)
LOOPBACK = ("127.0.0.1", "::1")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"frame-ancestors 'self'"),
)


class RateLimiter:
    """Counts how often each address did each thing of `LIMITS` in the last minute, and how often all guessed."""

    def __init__(self) -> None:
        self._times: dict[str, dict[str, deque[float]]] = {kind: {} for kind in LIMITS}

    def is_spent(self, client: str, kind: str) -> bool:
        """Whether one more would be too many."""
        guesses = {EVERYBODY: GUESSES} if kind == "login" and client not in LOOPBACK else {}
        for who, limit in {client: LIMITS[kind], **guesses}.items():
            times = self._times[kind].get(who, ())
            if sum(time.monotonic() - then < WINDOW_S for then in times) >= limit:
                return True
        return False

    def allow(self, client: str, kind: str) -> bool:
        """Count one more; False if that is too many."""
        if self.is_spent(client, kind):
            return False
        counted = self._times[kind]
        for who in {client, EVERYBODY} if kind == "login" and client not in LOOPBACK else {client}:
            # the latest last; no more than the limit is ever looked at
            times = counted.pop(who, None) or deque[float](maxlen=max(GUESSES, LIMITS[kind]))
            times.append(time.monotonic())
            counted[who] = times
        if len(counted) > MAX_COUNTED:  # a scan of addresses must not fill memory: forget who was quiet the longest
            del counted[next(iter(counted))]
        return True


class SecurityMiddleware:
    """ASGI middleware that applies the rules of this module.

    Args:
        listen: the address that is listened on; it and loopback are always served.
        host_names: further names that this page answers to.
        password: "" for none, which suits a page that only this machine reaches.
        port: names the session's cookie, which browsers send to every port of a host.
        root_path: the prefix that a reverse proxy serves the page under.
        sessions: who is logged in; None for sessions that end with this process.
        user_of: whose token a text is, see `Serving.user_of`.
    """

    def __init__(
        self,
        app: ASGIApp,
        listen: str,
        host_names: Iterable[str] = (),
        password: str = "",
        *,
        port: int = 0,
        root_path: str = "",
        sessions: Sessions | None = None,
        user_of: Callable[[str], str | None] = lambda token: None,
    ) -> None:
        self.app, self.password, self.root_path = app, password, root_path.rstrip("/")
        self.hosts = {host_name(name) or name.lower() for name in ("localhost", *LOOPBACK, listen, *host_names)}
        self.any_address = not is_loopback(listen)
        self.hosts |= own_names() if self.any_address else set()
        self.rates = RateLimiter()
        self.cookie = f"{COOKIE}_{port}" if port else COOKIE
        self.sessions = sessions or Sessions(password)
        self.user_of = user_of

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
                headers = [*message["headers"], *HEADERS]
                if self.password and not any(name == b"cache-control" for name, _ in headers):
                    # the page names prompts and clips: neither a proxy nor Back after logging out may show it again
                    is_page = any(name == b"content-type" and b"html" in value for name, value in headers)
                    headers.append((b"cache-control", b"no-store" if is_page else b"private"))
                message = {**message, "headers": headers}
            await send(message)

        request = Request(scope, limited_receive)
        client, token = client_of(request), _bearer(request)
        user = None
        if token and not (self.password and hmac.compare_digest(token.encode("latin-1"), self.password.encode())):
            user = await run_in_threadpool(self.user_of, token)
        ASKING.set("" if client in LOOPBACK else client)
        USER.set(user or "")
        answer: ASGIApp = self._refusal(request, limit, user or "") or self.app
        if answer is self.app and user is not None:
            answer = self._refusal_of_users(request, user) or self.app
        elif answer is self.app and self.password:
            if scope["path"] == "/login":
                answer = await self._login(request)
            elif scope["path"] == "/logout":
                answer = self._logout(request)
            elif scope["path"] not in OPEN_PATHS:
                answer = self._refusal_of_strangers(request) or self.app
        await answer(scope, limited_receive, send_with_headers)

    def _refusal(self, request: Request, limit: int, user: str) -> Response | None:
        """The answer to a request that breaks a rule, None for one that keeps them."""
        headers, path = request.headers, request.scope["path"]
        host = headers.get("host", "")
        if not self._is_served(host_name(host)):
            words = Words(language_of(headers.get("accept-language", "")))
            return PlainTextResponse(words("server.host_refused", host=host_name(host)[:100] or "?"), 403)
        if request.method not in METHODS:
            return wrong_method(*sorted(METHODS))
        if request.method in SAFE_METHODS:
            return None
        origin = headers.get("origin")
        if origin is not None and not same_site(origin, host, proxied=bool(request.scope.get(FROM_PROXY))):
            words = Words(language_of(headers.get("accept-language", "")))
            return PlainTextResponse(words("server.origin_refused"), 403)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > limit:
            return PlainTextResponse(f"at most {limit} bytes", 413)
        client, kind = client_of(request), "upload" if path.endswith("/upload") else "write"
        counted = f"user {user}" if user else client  # many of them may come from one address
        return None if client in LOOPBACK or self.rates.allow(counted, kind) else too_many(request)

    def _refusal_of_users(self, request: Request, user: str) -> Response | None:
        """None for what the token of a named user opens; a token of nobody, "", counts as a wrong password."""
        if not user:
            client = client_of(request)
            if not self.rates.allow(client, "login"):
                return too_many(request)
            return PlainTextResponse("this token is nobody's any more", 401)
        opens = OF_USERS.fullmatch(request.scope["path"])
        return None if opens else PlainTextResponse("not with the token of a named user", 403)

    def _is_served(self, name: str) -> bool:
        """Whether the page answers to the name of a Host header."""
        if name in self.hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.any_address or str(address) in self.hosts

    def _tokens(self, request: Request) -> list[str]:
        """What the request's cookies of our name hold; those of other programs on this host may look like anything."""
        pairs = (pair.partition("=") for line in request.headers.getlist("cookie") for pair in line.split(";"))
        return [value.strip().strip('"') for name, _, value in pairs if name.strip() == self.cookie]

    def _judge(self, request: Request, given: bytes) -> int:
        """200 for the password, 401 for another, 429 after too many others; nothing is awaited between looking at the
        count and counting, so that guesses sent all at once are no more than those one after another."""
        client = client_of(request)
        if self.rates.is_spent(client, "login"):
            return 429
        if hmac.compare_digest(given, self.password.encode()):
            return 200
        self.rates.allow(client, "login")
        return 401

    def _refusal_of_strangers(self, request: Request) -> Response | None:
        """None for a session's cookie or the password, else where to log in."""
        if any(map(self.sessions.holds, self._tokens(request))):
            return None
        token = _bearer(request)
        verdict = 401 if token is None else self._judge(request, token.encode("latin-1"))
        if verdict != 401:
            return None if verdict == 200 else too_many(request)
        if request.method in READ and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(f"{self.root_path}/login", 303)
        return PlainTextResponse("log in first: POST /login with the password, or Authorization: Bearer", 401)

    async def _login(self, request: Request) -> Response:
        """The login page, or what a password gets: a session, or the page once more."""
        languages = request.headers.get("accept-language", "")
        if request.method in READ:
            return HTMLResponse(login_page(languages, self.root_path))
        if request.method != "POST":
            return wrong_method(*READ, "POST")
        try:
            body = await request.body()
        except ClientDisconnect:
            body = b""
        fields = parse_qs(body[:LOGIN_BYTES].decode("utf-8", "replace"))
        verdict = self._judge(request, fields.get("password", [""])[0].encode())
        if verdict != 200:
            again = HTMLResponse(login_page(languages, self.root_path, wrong=True), 401)
            return again if verdict == 401 else too_many(request)
        wants_page = "text/html" in request.headers.get("accept", "")
        answer = RedirectResponse(f"{self.root_path}/", 303) if wants_page else JSONResponse({"success": True})
        return self._with_cookie(request, answer, self.sessions.add(), int(LASTS_S))

    def _logout(self, request: Request) -> Response:
        """End the session that the request brings; the browser forgets it, too."""
        if request.method != "POST":  # else a picture of another site could log out
            return wrong_method("POST")
        for token in self._tokens(request):
            self.sessions.end(token)
        return self._with_cookie(request, RedirectResponse(f"{self.root_path}/login", 303), "", 0)

    def _with_cookie(self, request: Request, answer: Response, token: str, lasts_s: int) -> Response:
        secure = "; Secure" if request.scope.get("scheme") == "https" else ""
        answer.headers["set-cookie"] = (
            f"{self.cookie}={token}; Max-Age={lasts_s}; HttpOnly; SameSite=Lax; Path={self.root_path or '/'}{secure}"
        )
        return answer


def _bearer(request: Request) -> str | None:
    """The token of an Authorization header."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else None


def client_of(request: Request) -> str:
    """Who is counted: an address; of a public one of IPv6 the network, of which a machine may take any (RFC 8981)."""
    node = request.client.host if request.client else "?"
    address = address_of(node)
    if address is not None and address.version == 6 and address.is_global:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address or node)


def wrong_method(*allowed: str) -> Response:
    """The answer to a method that a path does not know."""
    return PlainTextResponse("not with this method", 405, {"allow": ", ".join(allowed)})


def too_many(request: Request) -> Response:
    """The answer to who must wait."""
    words = Words(language_of(request.headers.get("accept-language", "")))
    return PlainTextResponse(words("server.too_many"), 429, {"retry-after": str(int(WINDOW_S))})


def same_site(origin: str, host: str, proxied: bool = False) -> bool:
    """Whether an Origin header names the site of a Host header; both may leave out the port of their scheme.

    Behind a named proxy a Host without port may have lost it (nginx: `proxy_set_header Host $host`): its name decides.
    """
    scheme, mark, place = origin.lower().partition("://")
    host = host.lower()
    if not mark or scheme not in PORTS:
        return False
    if place == host:
        return True
    try:
        asked, here = urlsplit(f"//{place}"), urlsplit(f"//{host}")
        ports = [str(part.port or PORTS[scheme]) for part in (asked, here)]
    except ValueError:
        return False
    bare = proxied and here.port is None
    return bool(asked.hostname) and asked.hostname == here.hostname and (bare or ports[0] == ports[1])


def login_page(languages: str, root_path: str = "", wrong: bool = False) -> str:
    """The login page in a language of an Accept-Language header: one field, no script, nothing from elsewhere."""
    words = Words(language_of(languages))
    error = f"<p role=alert>{words('server.wrong_password')}</p>" if wrong else ""
    return (
        f"<!doctype html><html lang={words.lang}><meta charset=utf-8>"
        "<meta name=viewport content=width=device-width>"
        "<title>turbodiff</title><style>body{font:16px system-ui,sans-serif;display:grid;place-items:center;"
        "height:90vh;"
        "color-scheme:light dark}form{display:grid;gap:12px;width:280px}input,button{font:inherit;padding:10px;"
        f"border-radius:9px;border:1px solid #8888}}</style><form method=post action='{root_path}/login'>"
        f"<h1 style='font-size:20px'>turbodiff</h1><label for=p>{words('server.password')}</label>"
        "<input id=p name=password type=password autofocus autocomplete=current-password>"
        f"<button>{words('server.log_in')}</button>{error}</form></html>"
    )
