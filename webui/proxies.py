"""What a reverse proxy tells of a request, believed only from proxies that `--proxy` names; and its path prefix.

Gradio itself believes X-Forwarded-Host and -Proto from anybody (6.31, route_utils.py), and uvicorn believes
X-Forwarded-For from anything on loopback: guesses at a password would have no limit there.
"""

import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

FROM_PROXY = "turbodiff.from_proxy"  # key of a scope: whether a named proxy sent it
PORTS = {"http": "80", "https": "443"}


class ProxyMiddleware:
    """ASGI middleware: the outermost one. The others see the client, scheme, Host and path that a person used.

    Args:
        proxies: addresses and networks of proxies; from anybody else forwarding headers are dropped.
        root_path: the prefix that a proxy serves the page under; one that it leaves in the path is taken off.
    """

    def __init__(self, app: ASGIApp, proxies: Sequence[str] = (), root_path: str = "") -> None:
        self.app, self.root_path = app, root_path.rstrip("/")
        self.networks = [ipaddress.ip_network(proxy, strict=False) for proxy in proxies]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand one request on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = [(name, value) for name, value in scope["headers"] if not _is_forwarding(name)]
        changed: dict[str, object] = {"headers": headers, FROM_PROXY: False}
        peer = scope["client"][0] if scope.get("client") else ""
        if self._is_named(peer):
            changed |= self._told(scope, headers) | {FROM_PROXY: True}
        path = str(scope["path"])
        if self.root_path and (path == self.root_path or path.startswith(f"{self.root_path}/")):
            raw = scope.get("raw_path") or path.encode()
            prefix = len(self.root_path.encode())
            changed |= {"path": path[len(self.root_path) :] or "/", "raw_path": raw[prefix:] or b"/"}
        await self.app({**scope, **changed}, receive, send)

    def _is_named(self, address: str) -> bool:
        try:
            found = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        found = getattr(found, "ipv4_mapped", None) or found  # "::" takes IPv4 as ::ffff:127.0.0.1
        return any(found in network for network in self.networks)

    def _told(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> dict[str, object]:
        """Client, scheme and Host as a named proxy tells them; of each list the last that no named proxy wrote."""
        given, told = Headers(scope=scope), dict[str, object]()
        hops = [hop.strip() for value in given.getlist("x-forwarded-for") for hop in value.split(",")]
        for hop in reversed(hops):
            try:
                ipaddress.ip_address(hop.strip("[]"))
            except ValueError:
                break
            told["client"] = (hop.strip("[]"), 0)
            if not self._is_named(hop.strip("[]")):
                break
        scheme = given.get("x-forwarded-proto", "").rpartition(",")[2].strip().lower()
        if scheme in PORTS:
            told["scheme"] = scheme
        host = given.get("x-forwarded-host", "").rpartition(",")[2].strip() or given.get("host", "")
        port = given.get("x-forwarded-port", "").rpartition(",")[2].strip()
        bare = ":" not in host.rpartition("]")[2]
        if port.isdecimal() and bare and port != PORTS.get(scheme or "http"):
            host = f"{host}:{port}"
        headers[:] = [(name, value) for name, value in headers if name != b"host"]
        headers.append((b"host", host.encode("latin-1", "replace")))
        return told


class RootPathMiddleware:
    """ASGI middleware, the innermost one: puts the prefix before the path again, as ASGI wants it (`root_path`), so
    that Gradio makes addresses with it; the middlewares in between compare paths without it.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self.app, self.root_path = app, root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand one request on."""
        if scope["type"] == "http" and self.root_path:
            raw = self.root_path.encode() + (scope.get("raw_path") or scope["path"].encode())
            path = self.root_path + scope["path"]
            scope = {**scope, "root_path": self.root_path, "path": path, "raw_path": raw}
        await self.app(scope, receive, send)


def _is_forwarding(name: bytes) -> bool:
    return name.startswith(b"x-forwarded-") or name in (b"forwarded", b"x-real-ip", b"x-gradio-server")
