"""Keeps the supervisor running. This is the process that a person, systemd or a container starts.

It does little, so that little can go wrong in it: a supervisor that dies or no longer turns is started again, signals
are handed on to it, and whoever is left without a parent becomes a child of ours and is reaped, which nobody else does
where we are the first process of a container. Standard library only, and no import of ours but the names of variables.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import FrameType

from turbodiff.spec.environment import BEAT_FD, LAST_END, START_AGAIN

CRASHED = 70  # EX_SOFTWARE of sysexits.h: an exception that nobody caught; any other code is meant
SILENT_S = 180.0  # longer than a restart of eight cards whose workers do not go, or a store locked for every part
STOP_S = 20.0  # a supervisor that was told to stop and does not
JUMP_S = 10.0  # between two looks: we were stopped, and heard nothing
ORPHANS_S = 2.0  # for the page and the workers of a dead supervisor, which die with it: the port must be free again
MAX_ENDS, WITHIN_S = 5, 600.0  # more often than that it is no accident
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)


def keep(argv: Sequence[str]) -> int:
    """Run the supervisor's command line until it ends by itself or is told to; returns the exit code."""
    return Keeper(argv).run()


class Keeper:
    """The supervisor's process and what was asked of it."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = list(argv)
        self.child: subprocess.Popen[bytes] | None = None
        self.asked_s: float | None = None  # when the first signal came
        self.asked = 0  # the last signal

    def run(self) -> int:
        """Start it, and again while it ends in a way that nobody meant."""
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and so does the supervisor then
                signal.signal(number, self._hand_on)
        ends: deque[float] = deque(maxlen=MAX_ENDS)
        while True:
            status = self._run_once()
            if self.asked or -status in SIGNALS or (status >= 0 and status not in (CRASHED, START_AGAIN)):
                return status if status >= 0 else 128 - status
            how = f"signal {signal.Signals(-status).name}" if status < 0 else "an error of its own"
            if status == START_AGAIN:  # however often: that was somebody else's doing
                how = "the loss of its state folder or job store"
            else:
                ends.append(time.monotonic())
                if len(ends) == MAX_ENDS and ends[-1] - ends[0] < WITHIN_S:
                    sys.stderr.write(f"[ERROR] the supervisor ended by {how}, {MAX_ENDS} times in a row: given up\n")
                    return CRASHED
            sys.stderr.write(f"[ERROR] the supervisor ended by {how}; it starts again, the queue goes on\n")
            os.environ[LAST_END] = how

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self.asked_s = time.monotonic() if self.asked_s is None else self.asked_s
        if self.child is not None and self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child.pid, number)

    def _run_once(self) -> int:
        """The supervisor's exit status, negative for a signal; once it is gone, so are its orphans, or two seconds."""
        us, libc = os.getpid(), ctypes.CDLL(None)

        def end_with_us() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != us:
                os._exit(1)

        beats, ours = os.pipe()
        os.set_blocking(ours, False)
        self.child = subprocess.Popen(
            self.argv, env={**os.environ, BEAT_FD: str(ours)}, pass_fds=(ours,), preexec_fn=end_with_us,
            start_new_session=True,  # Ctrl-C reaches it once, through us
        )  # fmt: skip
        os.close(ours)
        if self.asked:  # while there was none
            self._hand_on(self.asked, None)
        try:
            status = self.child.returncode = self._watch(self.child.pid, beats)
        finally:
            os.close(beats)
        end_s = time.monotonic() + ORPHANS_S
        while not self.asked and time.monotonic() < end_s and has_children():
            time.sleep(0.05)
        return status

    def _watch(self, pid: int, beats: int) -> int:
        heard_s, looked_s, is_open = None, time.monotonic(), True
        while True:
            if select.select([beats] if is_open else [], [], [], 1.0 if is_open else 0.05)[0]:
                is_open = bool(os.read(beats, 1 << 16))  # its end is closed: it dies, or is dead
                heard_s = time.monotonic()
            for gone, status in reap():
                if gone == pid:
                    return os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            if heard_s is not None and now - looked_s > JUMP_S:
                heard_s = now
            looked_s = now
            silent = heard_s is not None and now - heard_s > SILENT_S
            if silent or (self.asked_s is not None and now - self.asked_s > STOP_S):
                sys.stderr.write("[ERROR] the supervisor no longer turns; it is ended, its stacks follow\n")
                os.kill(pid, signal.SIGUSR1)  # faulthandler's, see app.py
                time.sleep(0.5)
                os.kill(pid, signal.SIGKILL)
                heard_s = None


def reap() -> Iterator[tuple[int, int]]:
    """Children that ended, whose parent we became or were: (pid, wait status)."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found


def has_children() -> bool:
    """Whether anybody is left, the dead reaped."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    return False
