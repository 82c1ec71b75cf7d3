"""The page's process, kept alive: a page that crashes or hangs costs no GPU work, and it comes back by itself."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence

from turbodiff.gpu import processes
from turbodiff.spec.errors import PortInUseError
from turbodiff.supervisor.attempt_monitor import SupervisorContext
from turbodiff.supervisor.health_check import Pulse
from turbodiff.supervisor.slots import BACKOFF_S
from turbodiff.supervisor.worker_process import RUN_ID, Lines, exit_words, spawn_child

SETTLED_S = 10.0  # a page that lived this long had started
STOPPED_S = 10.0  # a page that is stopped (SIGSTOP) this long answers nobody
KILLED_WAIT_S = 0.2
MAX_FAILED_STARTS = 5
FINAL_CODES = (2, PortInUseError.exit_code)  # a bad flag or a taken port: starting again changes nothing


class WebProcess:
    """Starts the page and starts it again; `failed_code` is set when that is of no use.

    Args:
        address: host and port where the page should answer; None: nobody knocks.
    """

    def __init__(self, argv: Sequence[str], shop: SupervisorContext, address: tuple[str, int] | None = None) -> None:
        self.argv, self.shop, self.address = list(argv), shop, address
        self.child: subprocess.Popen[bytes] | None = None
        self.failed_code: int | None = None
        self._failed = 0
        self._start_after_s = self._started_s = 0.0
        self._stopped_since_s: float | None = None
        self._output: Lines | None = None
        self._pulse: Pulse | None = None
        self._start()

    def filenos(self) -> list[int]:
        """Descriptors to wait on."""
        return [self._output.fd] if self._output and not self._output.closed else []

    def tick(self) -> None:
        """Write its log lines, notice its end, start it again when it is time."""
        if self.child is None:
            if self.failed_code is None and self.shop.now() >= self._start_after_s:
                self._start()
            return
        self._drain()
        status = self.child.poll()
        if status is not None:
            self._drain()
            self._ended(status)
        else:
            self._check_stopped()
            self._check_pulse()

    def _start(self) -> None:
        self.child = spawn_child(self.argv, {**os.environ, RUN_ID: self.shop.run_id, "PYTHONUNBUFFERED": "1"})
        assert self.child.stdout is not None
        self._output = Lines(self.child.stdout.fileno())
        self._started_s = self.shop.now()
        self._pulse = Pulse(self.address, self._started_s) if self.address else None
        self.shop.log.say(f"page started, pid {self.child.pid}", "web")

    def _drain(self) -> None:
        for line in self._output.read() if self._output else ():
            self.shop.log.say(line, "web")

    def _ended(self, status: int) -> None:
        outside = status in (-signal.SIGKILL, -signal.SIGTERM)  # says nothing about the page itself
        settled = outside or self.shop.now() - self._started_s > SETTLED_S
        self._failed = 0 if settled else self._failed + 1
        wait_s = BACKOFF_S[min(max(0, self._failed - 1), len(BACKOFF_S) - 1)]
        self._forget()
        if status in FINAL_CODES or self._failed > MAX_FAILED_STARTS:
            self.failed_code = status if status > 0 else 1
            self.shop.log.say(f"the page cannot start: {exit_words(status)}", "web", level="ERROR")
            return
        self._start_after_s = self.shop.now() + (KILLED_WAIT_S if settled else wait_s)
        self.shop.log.say(f"page ended: {exit_words(status)}; it starts again, jobs go on", "web", level="WARNING")

    def _check_stopped(self) -> None:
        assert self.child is not None
        if processes.process_state(self.child.pid) != "T":
            self._stopped_since_s = None
        elif self._stopped_since_s is None:
            self._stopped_since_s = self.shop.now()
        elif self.shop.now() - self._stopped_since_s > STOPPED_S:
            self.shop.log.say("the page is stopped; it is replaced", "web", level="WARNING")
            self.child.kill()

    def _check_pulse(self) -> None:
        assert self.child is not None
        if self._pulse is not None and self._pulse.tick(self.shop.now()):
            self.shop.log.say("the page no longer answers; it is replaced, jobs go on", "web", level="WARNING")
            self._hang_up()
            self.child.kill()

    def _hang_up(self) -> None:
        if self._pulse is not None:
            self._pulse.close()
            self._pulse = None

    def _forget(self) -> None:
        self._hang_up()
        if self.child is not None and self.child.stdout is not None:
            self.child.stdout.close()
        self.child, self._output, self._stopped_since_s = None, None, None

    def stop(self, patience_s: float = 3.0) -> None:
        """End the page: SIGTERM, then SIGKILL to its group."""
        if self.child is None:
            return
        self.child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(patience_s)
        if self.child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
        self._drain()
        self._forget()
