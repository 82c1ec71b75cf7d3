"""One worker process: started, spoken to, listened to, ended. Used by the supervisor and by `turbodiff generate`.

The worker speaks event lines (spec/events.py) on a pipe of its own and takes one JSON command a line on another.
It dies with its parent twice over: PR_SET_PDEATHSIG (measured: gone 7-9 ms after the parent's SIGKILL) and the end
of its command pipe. Its own session makes one process group of everything it starts.
"""

import contextlib
import ctypes
import fcntl
import os
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from turbodiff.gpu.allocator import allocator_mode, allocator_settings
from turbodiff.plan.hardware import Allocator
from turbodiff.spec.environment import PASSWORD, RUN_ID, child_environment
from turbodiff.spec.errors import TurbodiffError, not_started
from turbodiff.spec.events import Event, ExitCommand, JobCommand, RunCommand, read_event

WORKER = (sys.executable, "-P", "-m", "turbodiff.runtime.worker")
EXIT_S, TERM_S = 3.0, 5.0  # patience after "exit" and after SIGTERM; SIGKILL of a busy GPU client is the last resort
PIPE_BYTES = 1 << 20  # a supervisor that is busy for a second must not stall the worker's writes
PR_SET_PDEATHSIG = 1  # linux/prctl.h
BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 60.0)  # between failed starts of a worker or of the page
MAX_FAILED_STARTS = 5


def new_run_id() -> str:
    """128 random bits that prove ownership: they stand in the environment of every child of this run."""
    return secrets.token_hex(16)


def worker_environment(run_id: str, device: str = "", allocator: Allocator | None = None) -> dict[str, str]:
    """The environment of a child.

    Args:
        device: a GPU UUID or index to show alone; "" leaves the choice as it is.
        allocator: how torch's allocator shall work, None where no card has been seen yet.
    """
    fixed = {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the order of nvidia-smi, so that "GPU 0" means one card everywhere
        **allocator_settings(allocator or allocator_mode((), None)),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        RUN_ID: run_id,
    }
    if device:
        fixed["CUDA_VISIBLE_DEVICES"] = device
    given = child_environment()
    given.pop(PASSWORD, None)  # the page's
    return {**given, **fixed}


def spawn_child(
    argv: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """A child in its own session; stdout and stderr share one pipe, `stdout`, non-blocking.

    It dies when the calling thread does: use from the main thread only.

    Raises:
        TurbodiffError: code not_started: its program cannot be run, or there may be no more processes.
    """
    parent, libc = os.getpid(), ctypes.CDLL(None, use_errno=True)

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    try:
        child = subprocess.Popen(
            list(argv),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        raise not_started(argv[0], error) from None
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    return child


@dataclass
class Lines:
    """Whole lines out of a non-blocking pipe; the half line at the end waits for its rest."""

    fd: int
    rest: bytes = b""
    closed: bool = False  # at its end, or a "line" without end

    def read(self) -> list[str]:
        """The lines that have arrived."""
        while not self.closed:
            try:
                chunk = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            self.rest += chunk
            self.closed = not chunk or len(self.rest) > PIPE_BYTES
        *whole, self.rest = self.rest.split(b"\n")
        if self.closed and self.rest:
            whole, self.rest = [*whole, self.rest], b""
        return [line.decode("utf-8", "backslashreplace") for line in whole]


@dataclass
class Worker:
    """A running worker. `events` and `output` never block; `stop` is the only way it should end.

    argv gets `--events-fd N --commands-fd M` appended. After `stop` or `close` every descriptor is closed.
    """

    argv: Sequence[str] = WORKER
    run_id: str = field(default_factory=new_run_id)
    device: str = ""
    allocator: Allocator | None = None
    _strays: list[str] = field(default_factory=list)  # lines that should have been events

    def __post_init__(self) -> None:
        events_read, events_write = os.pipe()
        commands_read, self._commands = os.pipe()
        self._events = Lines(events_read)
        for fd in (events_read, self._commands):
            os.set_blocking(fd, False)
        with contextlib.suppress(OSError):  # over the user's pipe limit: the default of 64 KiB does
            fcntl.fcntl(events_read, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            self.process = spawn_child(
                [*self.argv, "--events-fd", str(events_write), "--commands-fd", str(commands_read)],
                worker_environment(self.run_id, self.device, self.allocator),
                (events_write, commands_read),
            )
        except TurbodiffError:
            os.close(self._commands)
            os.close(events_read)
            raise
        finally:
            os.close(events_write)
            os.close(commands_read)
        assert self.process.stdout is not None
        self._output = Lines(self.process.stdout.fileno())
        self.pidfd = os.pidfd_open(self.process.pid)

    @property
    def pid(self) -> int:
        """Process id, and the id of its process group."""
        return self.process.pid

    def filenos(self) -> list[int]:
        """Descriptors to wait on: event lines, log text, and the end of the process."""
        return [lines.fd for lines in (self._events, self._output) if not lines.closed] + [self.pidfd]

    def send(self, command: RunCommand | JobCommand | ExitCommand) -> bool:
        """Send one command; False if the worker no longer listens."""
        data = command.model_dump_json().encode() + b"\n"
        try:
            while data:
                select.select([], [self._commands], [], 1.0)
                data = data[os.write(self._commands, data) :]
        except (BlockingIOError, BrokenPipeError, OSError):
            return False
        return True

    def events(self) -> list[Event]:
        """The events that have arrived; lines that are none are dropped into the log as they are."""
        found = []
        for line in self._events.read():
            try:
                found.append(read_event(line))
            except ValueError as error:
                self._strays.append(f"[WARNING] not an event line ({error}): {line[:200]}")
        return found

    def output(self) -> list[str]:
        """The log lines that have arrived."""
        strays, self._strays = self._strays, []
        return strays + self._output.read()

    def exit_status(self) -> int | None:
        """None while it lives, else the exit code, negative for a signal."""
        return self._reap() if self.wait(0) else None

    def signal(self, number: int) -> None:
        """Signal the worker through its pidfd, which cannot hit a process that took over the number."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def dump_stacks(self) -> None:
        """Have the worker write the stacks of its threads to its log, if it has a handler for that (faulthandler's).

        Without one the signal would end it (SigCgt of /proc/PID/status, proc(5)).
        """
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
            masks = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")]
            if masks and masks[0] >> (signal.SIGUSR1 - 1) & 1:
                self.signal(signal.SIGUSR1)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end without reaping it; True if it ended."""
        return bool(select.select([self.pidfd], [], [], max(0.0, timeout_s))[0])

    def stop(self, exit_s: float = EXIT_S, term_s: float = TERM_S) -> int | None:
        """End it: "exit", SIGTERM, SIGKILL to the group, each with patience. Returns the exit status.

        None means that even SIGKILL did not end it within a second: it hangs in the driver (state D).
        """
        self.send(ExitCommand())
        if not self.wait(exit_s):
            self.signal(signal.SIGTERM)
            self.wait(term_s)
        return self.kill()

    def kill(self) -> int | None:
        """SIGKILL to it and its group, then reap it; None if it hangs in the driver."""
        self.signal(signal.SIGKILL)
        return self._reap() if self.wait(1.0) else None

    def _reap(self) -> int:
        # before reaping: an unreaped leader keeps its number, so the group id is still ours
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        return self.process.wait()

    def close(self) -> None:
        """Close our ends of the pipes."""
        if self._commands >= 0:
            os.close(self._commands)
            os.close(self._events.fd)
            os.close(self.pidfd)
            self._commands = -1
        if self.process.stdout is not None:
            self.process.stdout.close()


def run_once(
    command: RunCommand, argv: Sequence[str] = WORKER, on_output: Callable[[str], None] | None = None
) -> Iterator[Event]:
    """Run one job in a worker of its own and yield its events up to `result` or `error`; no store, no supervisor.

    Close the generator (or press Ctrl-C) to cancel: the worker gets "cancel", then it is stopped.

    Raises:
        TurbodiffError: the worker did not start, or ended without a word.
    """
    worker = Worker(argv)
    try:
        worker.send(command)
        while True:
            select.select(worker.filenos(), [], [], 1.0)
            over = worker.wait(0)
            events = worker.events()
            for line in worker.output():
                if on_output is not None:
                    on_output(line)
            for event in events:
                yield event
                if event.type in ("result", "error"):
                    return
            if over:
                raise TurbodiffError(
                    "the worker process ended without a result",
                    code="worker_died",
                    got=describe_exit(worker.exit_status()),
                    try_instead="run it again; the lines above say what it did last",
                )
    finally:
        worker.send(JobCommand(cmd="cancel", job=command.job))
        worker.stop(exit_s=EXIT_S)
        worker.close()


def describe_exit(status: int | None) -> str:
    """An exit status as people say it: "exit code 1", "signal SIGSEGV"."""
    if status is None:
        return "no answer from the driver"
    if status >= 0:
        return f"exit code {status}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-status).name}"
    return f"signal {-status}"
