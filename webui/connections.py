"""Connections that cost us nothing: who opens one and says nothing, or says it a byte at a time, is not waited for.

uvicorn (0.54) closes a connection that is idle after an answer, but waits for ever for the head of a request and for
its body, and takes any number of connections: 700 sockets that say nothing would stay.
"""

import asyncio
import ipaddress
import resource
from collections.abc import Sequence
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from webui.proxies import address_of

HEAD_S = 15.0  # for the whole head of a request, from the connection or the end of the answer before
BODY_IDLE_S = 30.0  # between two pieces of a body
BODY_S = 600.0  # for a whole body: 25 MiB at 44 KiB/s
PER_ADDRESS = 100  # of one machine beyond this one; a tab of a browser has at most six
TOTAL = 1000
OPEN_FILES = 4096  # connections, and the files that are sent over them
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class LimitedConnection(H11Protocol):
    """A connection with limits of time, and one of so many."""

    proxies: ClassVar[tuple[Network, ...]] = ()  # many people come from their addresses
    _deadline_s: float | None = None
    _waits_for = ""  # "head", "body", or "" while the app works or answers
    _since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take it, and let the longest silent one go where there are too many."""
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        known = [other for other in self.connections if isinstance(other, LimitedConnection)]
        others = [other for other in known if not other.transport.is_closing()]
        mine = [other for other in others if other.client and self.client and other.client[0] == self.client[0]]
        crowd = others if len(others) > TOTAL else mine if self._counts() and len(mine) > PER_ADDRESS else []
        if crowd:
            silent = [other for other in crowd if other._waits_for == "head"]
            min(silent, key=lambda other: other._since_s, default=self).transport.abort()
        if not transport.is_closing():
            self._look()

    def handle_events(self) -> None:
        """Hear what has come, then wait for what is still to come."""
        super().handle_events()
        if not self.transport.is_closing():
            self._look()

    def _counts(self) -> bool:
        """Whether the address stands for one machine beyond this one."""
        address = address_of(self.client[0]) if self.client else None
        named = address is not None and any(address in network for network in self.proxies)
        return address is not None and not address.is_loopback and not named

    def _look(self) -> None:
        state, now_s = self.conn.their_state, self.loop.time()
        waits_for = {h11.IDLE: "head", h11.SEND_BODY: "body"}.get(state, "")
        if waits_for != self._waits_for:
            self._waits_for, self._since_s = waits_for, now_s
        if not waits_for:
            self._deadline_s = None
            return
        was_set = self._deadline_s is not None
        whole_s = self._since_s + (HEAD_S if waits_for == "head" else BODY_S)
        self._deadline_s = whole_s if waits_for == "head" else min(now_s + BODY_IDLE_S, whole_s)
        if not was_set:
            self.loop.call_at(self._deadline_s, self._on_time)

    def _on_time(self) -> None:
        if self._deadline_s is None or self.transport.is_closing():
            return
        if self.flow.read_paused:  # we do not listen ourselves
            self._deadline_s = self.loop.time() + BODY_IDLE_S
        if self.loop.time() < self._deadline_s:
            self.loop.call_at(self._deadline_s, self._on_time)
        else:
            self.transport.abort()


def limited(proxies: Sequence[str]) -> type[LimitedConnection]:
    """The class of connections for a page behind these proxies; this process may then have as many open as it takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    class OfThisPage(LimitedConnection):
        pass

    OfThisPage.proxies = tuple(ipaddress.ip_network(proxy, strict=False) for proxy in proxies)
    return OfThisPage
