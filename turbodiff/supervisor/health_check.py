"""Does the page still answer? A knock at its /healthz every few seconds that never blocks the supervisor's loop."""

import contextlib
import socket

EVERY_S = 5.0
PATIENCE_S = 15.0  # for one answer: a busy machine may take seconds
SILENT_S = 45.0  # a page that has answered before and is silent for this long hangs: no handler takes a second
START_S = 180.0  # imports from a cold disk on a busy machine
JUMP_S = 10.0  # between two turns of the loop: the computer slept, or we were busy; nobody was listening


class Pulse:
    """Knocks at http://host:port/healthz; `silent_s` says for how long there has been no answer.

    Any HTTP answer counts: a page that refuses is alive. The first answer may take as long as a start does.
    """

    def __init__(self, address: tuple[str, int], now: float) -> None:
        self.address = address
        self._sock: socket.socket | None = None
        self._sent = False
        self._knocked_s = self._turned_s = self._alive_s = now
        self._answered = False

    def tick(self, now: float) -> bool:
        """One turn of the loop; True when the page is to be called hung."""
        if now - self._turned_s > JUMP_S:
            self._alive_s = now
        self._turned_s = now
        if self._sock is not None:
            self._listen(now)
        elif now - self._knocked_s >= EVERY_S:
            self._knocked_s = now
            self._knock()
        return now - self._alive_s > (SILENT_S if self._answered else START_S)

    def close(self) -> None:
        """Hang up."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _knock(self) -> None:
        family = socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET
        self._sock, self._sent = socket.socket(family, socket.SOCK_STREAM), False
        self._sock.setblocking(False)
        with contextlib.suppress(BlockingIOError, OSError):  # refused: the next turn hears of it
            self._sock.connect(self.address)

    def _listen(self, now: float) -> None:
        assert self._sock is not None
        try:
            if not self._sent:
                host = f"[{self.address[0]}]" if ":" in self.address[0] else self.address[0]
                self._sock.send(f"GET /healthz HTTP/1.0\r\nHost: {host}:{self.address[1]}\r\n\r\n".encode())
                self._sent = True
            if self._sock.recv(64).startswith(b"HTTP/"):
                self._alive_s, self._answered = now, True
            self.close()
        except BlockingIOError:
            if now - self._knocked_s > PATIENCE_S:  # no answer: knock anew
                self.close()
        except OSError:
            self.close()
