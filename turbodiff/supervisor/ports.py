"""What the supervisor's rules know of a worker, wherever it runs, and the worker of this machine.

Slots, attempts, retry rules and watchdog speak to a `Port` alone. What is known of the machine and its cards is the
`Memory` of the same context (context.py), which also opens the ports.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from turbodiff.archive.clips import check_clip
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.events import Event, ExitCommand, JobCommand, ResultEvent, RunCommand
from turbodiff.supervisor.ownership import remember_worker, worker_file
from turbodiff.supervisor.worker_process import Worker


@dataclass(frozen=True)
class Evidence:
    """What can be seen of a worker and its machine from outside; None is unknown."""

    bytes_read: int = 0
    cpu_s: float = 0.0
    state: str = psutil.STATUS_SLEEPING
    ram_available_bytes: int | None = None
    vram_free_bytes: int | None = None
    own_bytes: int | None = None  # of the card, held by our worker
    others_bytes: int | None = None  # of the card, held by other programs
    utilisation: float | None = None
    power_w: float | None = None
    output_lines: int = 0


class Port(Protocol):
    """One worker from its start to its end. Only `stop` and `kill` may take as long as they are told."""

    @property
    def pid(self) -> int:
        """Its process id on the machine where it runs."""

    @property
    def where(self) -> str:
        """Where it runs, for the log."""

    @property
    def lost(self) -> str:
        """Why the machine that it ran on is gone, "" while nobody says so."""

    def filenos(self) -> list[int]:
        """Descriptors that are ready when there is something to hear."""

    def send(self, command: RunCommand | JobCommand | ExitCommand) -> bool:
        """Send one command; False if the worker no longer listens."""

    def events(self) -> list[Event]:
        """The events that have arrived."""

    def output(self) -> list[str]:
        """The log lines that have arrived."""

    def look(self) -> Evidence:
        """What its machine says about the process now; of memory and the card nothing."""

    def dump_stacks(self) -> None:
        """Have it write the stacks of its threads to its log."""

    def bring(self, result: ResultEvent) -> ClipResult:
        """The clip of a result, in the gallery of this machine.

        Raises:
            VerifyError: it is missing, or not the one that the worker verified.
        """

    def signal(self, number: int) -> None:
        """Signal the worker, and no other process."""

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; True if it ended."""

    def exit_status(self) -> int | None:
        """None while it lives, else the exit code, negative for a signal."""

    def stop(self, exit_s: float, term_s: float) -> int | None:
        """End it with patience; the exit status, None if it cannot be ended."""

    def kill(self) -> int | None:
        """End it at once; the exit status, None if it cannot be ended."""

    def close(self) -> None:
        """Let go of what was opened for it."""


@dataclass
class LocalPort(Worker):
    """A worker of this machine, written down in the state folder for as long as it is ours."""

    slot: int = field(kw_only=True)
    state: Path = field(kw_only=True)
    outputs: Path = field(kw_only=True)
    lost = ""  # this machine is here

    def __post_init__(self) -> None:
        super().__post_init__()
        remember_worker(self.state, self.slot, self.pid, self.run_id)

    @property
    def where(self) -> str:
        """Its process."""
        return f"pid {self.pid}"

    def look(self) -> Evidence:
        """Bytes read so far, files in the page cache included, CPU seconds, psutil's status, "" once it is gone."""
        try:
            process = psutil.Process(self.pid)
            with process.oneshot():
                times = process.cpu_times()
                read_bytes, state = process.io_counters().read_chars, process.status()
        except psutil.Error:
            return Evidence(state="")
        return Evidence(read_bytes, times.user + times.system, state)

    def bring(self, result: ResultEvent) -> ClipResult:
        """The result as it is: a worker of this machine has published the clip."""
        check_clip(self.outputs, result)
        return result

    def close(self) -> None:
        """Close our ends of the pipes, and forget the worker."""
        super().close()
        with contextlib.suppress(OSError):
            worker_file(self.state, self.slot).unlink(missing_ok=True)
