"""The page's process, kept alive: a page that crashes or hangs costs no GPU work, and it comes back by itself."""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Sequence

import psutil

from turbodiff.spec.environment import RUN_ID, child_environment
from turbodiff.spec.errors import PortInUseError, TurbodiffError
from turbodiff.supervisor.context import SupervisorContext
from turbodiff.supervisor.worker_process import BACKOFF_S, MAX_FAILED_STARTS, Lines, describe_exit, spawn_child

SETTLED_S = 10.0  # a page that lived this long had started
STOPPED_S = 10.0  # a page that is stopped (SIGSTOP) this long answers nobody
KILLED_WAIT_S = 0.2
CANNOT_RUN = 126  # what a shell says of a program that it may not run (POSIX, 2.8.2)
FINAL_CODES = (2, PortInUseError.exit_code)  # a bad flag or a taken port: starting again changes nothing

EVERY_S = 5.0  # between two health checks
PATIENCE_S = 15.0  # for one answer: a busy machine may take seconds
SILENT_S = 45.0  # a page that has answered before and is silent for this long hangs: no handler takes a second
START_S = 180.0  # imports from a cold disk on a busy machine
JUMP_S = 10.0  # between two turns of the loop: the computer slept, or we were busy; nobody was listening


class HealthCheck:
    """Asks http://host:port/healthz every few seconds, without ever blocking the supervisor's loop.

    Any HTTP answer counts: a page that refuses is alive. The first answer may take as long as a start does.
    """

    def __init__(self, address: tuple[str, int], now: float) -> None:
        self.address = address
        self._sock: socket.socket | None = None
        self._sent = False
        self._asked_s = self._checked_s = self._alive_s = now
        self._answered = False

    def tick(self, now: float) -> bool:
        """One turn of the loop; True when the page is to be called hung."""
        if now - self._checked_s > JUMP_S:
            self._alive_s = now
        self._checked_s = now
        if self._sock is not None:
            self._receive(self._sock, now)
        elif now - self._asked_s >= EVERY_S:
            self._asked_s = now
            family = socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET
            self._sock, self._sent = socket.socket(family, socket.SOCK_STREAM), False
            self._sock.setblocking(False)
            with contextlib.suppress(OSError):  # refused: the next turn hears of it
                self._sock.connect(self.address)
        return now - self._alive_s > (SILENT_S if self._answered else START_S)

    def _receive(self, sock: socket.socket, now: float) -> None:
        try:
            if not self._sent:
                host = f"[{self.address[0]}]" if ":" in self.address[0] else self.address[0]
                sock.send(f"GET /healthz HTTP/1.0\r\nHost: {host}:{self.address[1]}\r\n\r\n".encode())
                self._sent = True
            if sock.recv(64).startswith(b"HTTP/"):
                self._alive_s, self._answered = now, True
        except BlockingIOError:
            if now - self._asked_s <= PATIENCE_S:  # later without an answer: ask anew
                return
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        """Hang up."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class WebProcess:
    """Starts the page and starts it again; `failed_code` is set when that is of no use.

    Args:
        address: host and port where the page should answer; None: nobody asks.
    """

    def __init__(self, argv: Sequence[str], context: SupervisorContext, address: tuple[str, int] | None = None) -> None:
        self.argv, self.context, self.address = list(argv), context, address
        self.child: subprocess.Popen[bytes] | None = None
        self.failed_code: int | None = None
        self._failed_starts = 0
        self._start_after_s = self._started_s = 0.0
        self._stopped_since_s: float | None = None
        self._output: Lines | None = None
        self.health: HealthCheck | None = None
        self._start()

    def filenos(self) -> list[int]:
        """Descriptors to wait on."""
        return [self._output.fd] if self._output and not self._output.closed else []

    def tick(self) -> None:
        """Write its log lines, notice its end, start it again when it is time, replace one that hangs."""
        now = self.context.now()
        if self.child is None:
            if self.failed_code is None and now >= self._start_after_s:
                self._start()
            return
        self._drain()
        status = self.child.poll()
        if status is not None:
            self._drain()
            self._on_exit(status)
            return
        stopped = False
        with contextlib.suppress(psutil.Error):
            stopped = psutil.Process(self.child.pid).status() == psutil.STATUS_STOPPED
        if not stopped:
            self._stopped_since_s = None
        elif self._stopped_since_s is None:
            self._stopped_since_s = now
        elif now - self._stopped_since_s > STOPPED_S:
            self._log("the page is stopped; it is replaced", "WARNING")
            self.child.kill()
        if self.health is not None and self.health.tick(now):
            self._log("the page no longer answers; it is replaced, jobs go on", "WARNING")
            self.health.close()
            self.health = None
            self.child.kill()

    def _start(self) -> None:
        environment = {**child_environment(), RUN_ID: self.context.run_id, "PYTHONUNBUFFERED": "1"}
        self._started_s = self.context.now()
        try:
            self.child = spawn_child(self.argv, environment)
        except TurbodiffError as error:
            self._log(str(error), "ERROR")
            self._on_exit(CANNOT_RUN)
            return
        assert self.child.stdout is not None
        self._output = Lines(self.child.stdout.fileno())
        self.health = HealthCheck(self.address, self._started_s) if self.address else None
        self._log(f"page started, pid {self.child.pid}")

    def _log(self, text: str, level: str = "INFO") -> None:
        self.context.log.say(text, "web", level=level)

    def _drain(self) -> None:
        for line in self._output.read() if self._output else ():
            self._log(line)

    def _on_exit(self, status: int) -> None:
        outside = status in (-signal.SIGKILL, -signal.SIGTERM)  # says nothing about the page itself
        settled = outside or self.context.now() - self._started_s > SETTLED_S
        self._failed_starts = 0 if settled else self._failed_starts + 1
        wait_s = BACKOFF_S[min(max(0, self._failed_starts - 1), len(BACKOFF_S) - 1)]
        self._close()
        if status in FINAL_CODES or self._failed_starts > MAX_FAILED_STARTS:
            self.failed_code = status if status > 0 else 1
            self._log(f"the page cannot start: {describe_exit(status)}", "ERROR")
            return
        self._start_after_s = self.context.now() + (KILLED_WAIT_S if settled else wait_s)
        self._log(f"page ended: {describe_exit(status)}; it starts again, jobs go on", "WARNING")

    def _close(self) -> None:
        if self.health is not None:
            self.health.close()
        if self.child is not None and self.child.stdout is not None:
            self.child.stdout.close()
        self.child, self._output, self._stopped_since_s, self.health = None, None, None, None

    def ask_to_end(self) -> None:
        """Tell the page to end, without waiting for it; `stop` comes next."""
        if self.child is not None:
            self.child.terminate()

    def stop(self, patience_s: float = 3.0) -> None:
        """End the page: SIGTERM, then SIGKILL to its group."""
        if self.child is None:
            return
        self.ask_to_end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(patience_s)
        if self.child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
        self._drain()
        self._close()
