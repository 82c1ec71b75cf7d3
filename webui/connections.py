"""Connections that cost us nothing: who opens one and says nothing, or says it a byte at a time, is not waited for.

uvicorn (0.54) closes a connection that is idle after an answer, but waits for ever for the head of a request and for
its body, and takes any number of connections: 700 sockets that say nothing would stay, and those that take nothing of
what is sent. Of its two parsers httptools takes a seventh less of a submission than h11, and knows no limits of size.
"""

import asyncio
import ipaddress
import resource
from collections.abc import Sequence
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from webui.proxies import address_of

HEAD_S = 15.0  # for the whole head of a request, from the connection or the end of the answer before
BODY_IDLE_S = 30.0  # between two pieces of a body
BODY_S = 600.0  # for a whole body: 25 MiB at 44 KiB/s
PER_ADDRESS = 100  # of one machine beyond this one; a tab of a browser has at most six
TOTAL = 1000
UNREAD_BYTES = 64 << 10  # of a head, of what follows a body, between two of its pieces: what h11 allows
HEADERS = 100  # of a request: browsers send some twenty
LOOK_S = 5.0  # between two looks whether what is sent is taken
IDLE_LOOKS, MOST_LOOKS = 6, 60  # in a row without: it may go where there are too many; it goes. A paused film waits
OPEN_FILES = 4096  # connections, and the files that are sent over them
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class LimitedConnection(HttpToolsProtocol):
    """A connection with limits of time and of what is neither body nor new request, and one of so many."""

    proxies: ClassVar[tuple[Network, ...]] = ()  # many people come from their addresses
    _waits_for = ""  # "head", "body", or "" while the app works or answers
    _deadline_is_for = ""
    _deadline_s = _since_s = 0.0
    _timer: asyncio.TimerHandle | None = None
    _unread_bytes = 0
    _unsent_bytes = _unsent_looks = 0
    _is_last = False  # no request is taken behind this one
    _is_gone = False  # ended by us; the loop hears of it a turn later

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, and let the longest silent one go where there are too many."""
        super().connection_made(transport)
        self._since_s = self.loop.time()
        others = [other for other in self.connections if isinstance(other, LimitedConnection) and not other._is_gone]
        mine = [other for other in others if other.client and self.client and other.client[0] == self.client[0]]
        crowd = others if len(others) > TOTAL else mine if self._counts() and len(mine) > PER_ADDRESS else []
        if crowd:
            silent = [other for other in crowd if other._waits_for == "head" or other._unsent_looks >= IDLE_LOOKS]
            min(silent, key=lambda other: other._since_s, default=self)._end()
        if not transport.is_closing():
            self._waits_for = "head"
            self._look()
        self.loop.call_later(LOOK_S, self._look_at_unsent)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        super().connection_lost(exc)
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Hear what has come, then wait for what is still to come."""
        if self._is_last and self._waits_for != "body":
            return
        self._unread_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unread_bytes > UNREAD_BYTES:
            self.send_400_response("too much before the end of a head")
        elif self.pipeline:  # its body would be heard, and kept, before anybody asks for it
            self._end()
        else:
            self._look()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; what follows a body is none of a request's, and the app has those of its head."""
        if self._waits_for != "body":
            super().on_header(name, value)
            if len(self.headers) > HEADERS:
                raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        """A head is whole. httptools takes no body of a request that asks for another protocol, and would read it as
        the next request."""
        names = [name for name, _ in self.headers]
        if names.count(b"host") > 1:
            raise ValueError("more than one host")
        if self.parser.should_upgrade():
            if b"content-length" in names or b"transfer-encoding" in names:
                raise ValueError("another protocol is asked for with a body")
            self._is_last = True
        self._waits_for, self._unread_bytes = "body", 0
        super().on_headers_complete()
        if self._is_last:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A piece of the body is here."""
        self._unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole; it may have been answered before it was."""
        super().on_message_complete()
        self._waits_for, self._unread_bytes = "head" if self.cycle.response_complete else "", 0

    def on_response_complete(self) -> None:
        """An answer is sent."""
        super().on_response_complete()
        if not self.transport.is_closing():
            self._waits_for = self._waits_for or "head"
            self._look()

    def _end(self) -> None:
        self._is_gone = True
        self.transport.abort()

    def _counts(self) -> bool:
        """Whether the address stands for one machine beyond this one."""
        address = address_of(self.client[0]) if self.client else None
        named = address is not None and any(address in network for network in self.proxies)
        return address is not None and not address.is_loopback and not named

    def _look(self) -> None:
        waits_for, now_s = self._waits_for, self.loop.time()
        if waits_for != self._deadline_is_for:
            self._deadline_is_for, self._since_s = waits_for, now_s
        whole_s = self._since_s + (HEAD_S if waits_for == "head" else BODY_S)
        self._deadline_s = whole_s if waits_for == "head" else min(now_s + BODY_IDLE_S, whole_s)
        if waits_for and self._timer is None:
            self._timer = self.loop.call_at(self._deadline_s, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        if not self._waits_for or self.transport.is_closing():
            return
        if self.flow.read_paused:  # we do not listen ourselves
            self._deadline_s = self.loop.time() + BODY_IDLE_S
        if self.loop.time() < self._deadline_s:
            self._timer = self.loop.call_at(self._deadline_s, self._on_time)
        else:
            self._end()

    def _look_at_unsent(self) -> None:
        """Let go who takes nothing of what is sent: a connection that closes with bytes unsent waits for ever."""
        if self not in self.connections:
            return
        unsent_bytes = self.transport.get_write_buffer_size()
        is_stuck = unsent_bytes > 0 and unsent_bytes == self._unsent_bytes
        self._unsent_looks = self._unsent_looks + 1 if is_stuck else 0
        self._unsent_bytes = unsent_bytes
        if self._unsent_looks >= (IDLE_LOOKS if self.transport.is_closing() else MOST_LOOKS):
            self._end()
        else:
            self.loop.call_later(LOOK_S, self._look_at_unsent)


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
