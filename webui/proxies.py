"""What a reverse proxy tells of a request, believed only from proxies that `--proxy` names; and its path prefix.

Gradio itself believes X-Forwarded-Host and -Proto from anybody (6.31, route_utils.py), and uvicorn believes
X-Forwarded-For from anything on loopback: guesses at a password would have no limit there.
"""

import contextlib
import ipaddress
import re
from collections.abc import Sequence
from contextvars import ContextVar
from functools import lru_cache
from itertools import zip_longest

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

# the machine that sent the request being answered, "" for this one: handlers run in the context of their request
ASKING: ContextVar[str] = ContextVar("asking", default="")
# the name that its token stands for, "" for the page's login and for whoever needs none
USER: ContextVar[str] = ContextVar("user", default="")
FROM_PROXY = "turbodiff.from_proxy"  # key of a scope: whether a named proxy sent it
PORTS = {"http": "80", "https": "443"}
TOLD = ("for", "proto", "host", "port")  # X-Forwarded-...
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]*)(?::[0-9]*)?")  # RFC 9110: a name or address, then maybe a port
NODE = re.compile(r"\[([^\[\]]+)\](?::\w*)?|([0-9.]+):\w*")
# RFC 7239: elements between commas, pairs between semicolons; in quotes neither separates. Read from the end, where the
# nearest proxy writes: a client's open quote before that must not swallow it
BACKWARD_ELEMENT = re.compile(r'(?:[^,"]|"[^"]*")+')
PAIR = re.compile(r'(?:^|;)\s*(\w+)\s*=\s*("[^"]*"|[^;"\s]*)(?=\s*(?:;|$))')


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

    def _is_named(self, node: str) -> bool:
        address = address_of(node)
        return address is not None and any(address in network for network in self.networks)

    def _told(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> dict[str, object]:
        """Client, scheme and Host as named proxies tell them, from the nearest outward; the first hop that comes from
        none of them is the client, and what stands beyond it was written by the client itself.

        `Forwarded` counts only where there is no X-Forwarded header: a proxy that writes these lets the other pass.
        """
        given, told = Headers(scope=scope), dict[str, object]()
        lists = [",".join(given.getlist(f"x-forwarded-{name}")).split(",")[::-1] for name in TOLD]
        hops = [dict(zip(TOLD, entries, strict=True)) for entries in zip_longest(*lists, fillvalue="")]
        if not any(f"x-forwarded-{name}" in given for name in TOLD):
            found = BACKWARD_ELEMENT.findall(",".join(given.getlist("forwarded"))[::-1])
            pairs = (PAIR.findall(element[::-1]) for element in found)
            hops = [{name.lower(): re.sub(r"\\(.)", r"\1", value.strip('"')) for name, value in each} for each in pairs]
        scheme, host, port = "http", given.get("host", ""), ""
        for hop in ({name: value.strip() for name, value in each.items()} for each in hops):
            address = address_of(hop.get("for", ""))
            if hop.get("proto", "").lower() in PORTS:
                told["scheme"] = scheme = hop["proto"].lower()
            host = hop["host"] if host_name(hop.get("host", "")) else host
            port = hop["port"] if re.fullmatch("[0-9]{1,5}", hop.get("port", "")) else port
            if address is not None:
                told["client"] = (str(address), 0)
            if address is None or not self._is_named(str(address)):
                break
        if port and ":" not in host.rpartition("]")[2] and port != PORTS[scheme]:
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


@lru_cache(1024)  # three times for each request, of few machines
def address_of(node: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address of a node as connections and proxies write it, with or without a port (RFC 7239 6, "[::1]:80",
    "1.2.3.4:80"), IPv4 in its own form ("::" takes it as ::ffff:127.0.0.1); None for a name or anything else."""
    parts = NODE.fullmatch(node)
    inner = parts[1] or parts[2] if parts else node
    try:
        found = ipaddress.ip_address(inner.partition("%")[0])
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, ipaddress.IPv6Address) else found


def host_name(host: str) -> str:
    """The name in a Host header, without its port; "" for what is no host."""
    found = HOST.fullmatch(host)
    name = found[1].strip("[]").rstrip(".").lower() if found else ""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))  # [0:0:0:0:0:0:0:1] is ::1
    return name
