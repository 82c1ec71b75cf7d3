"""Workers that an earlier run left behind: recognised by everything at once, never by a name or a number alone.

A leftover is ours when pid, start time, boot id and uid are those that were written down when it started, and its
environment still carries that run's id. Any difference, and it is somebody else's process: it is never signalled.
"""

import contextlib
import json
import os
import select
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from turbodiff.gpu.processes import start_ticks
from turbodiff.supervisor.worker_process import RUN_ID

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Identity:
    """What names one process for ever: its number is reused, its start after this boot is not."""

    pid: int
    start_ticks: int
    boot_id: str
    uid: int
    run_id: str


def boot_id() -> str:
    """Random id of this boot, "" where the kernel does not say."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def worker_file(state: Path, slot: int) -> Path:
    """Where the worker of a slot is written down."""
    return state / f"worker{slot}.json"


def remember_worker(state: Path, slot: int, pid: int, run_id: str) -> None:
    """Write down a worker that was just started; a disk that takes no more costs only this layer of care."""
    ticks = start_ticks(pid)
    if ticks is None:
        return
    identity = Identity(pid, ticks, boot_id(), os.getuid(), run_id)
    with contextlib.suppress(OSError):
        worker_file(state, slot).write_text(json.dumps(asdict(identity)))


def forget_worker(state: Path, slot: int) -> None:
    """The worker of a slot is gone."""
    with contextlib.suppress(OSError):
        worker_file(state, slot).unlink(missing_ok=True)


def leftovers(state: Path) -> list[Identity]:
    """The written-down workers that run, this run's own included; only looks."""
    found = []
    for path in sorted(state.glob("worker*.json")):
        try:
            identity = Identity(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if is_ours(identity):
            found.append(identity)
    return found


def is_ours(identity: Identity) -> bool:
    """Whether that very process still runs: every field matches, and its environment carries the run id."""
    if identity.pid in (0, 1, os.getpid(), os.getppid()) or identity.boot_id != boot_id():
        return False
    if start_ticks(identity.pid) != identity.start_ticks:
        return False
    try:
        if Path(f"/proc/{identity.pid}").stat().st_uid != identity.uid or identity.uid != os.getuid():
            return False
        environment = Path(f"/proc/{identity.pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{RUN_ID}={identity.run_id}".encode() in environment.split(b"\0")


def end(identity: Identity, wait_s: float = 2.0) -> bool:
    """SIGKILL a leftover through a pidfd, its identity checked once more in between; True when it is gone."""
    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        if not is_ours(identity):  # the pidfd is bound now: what is checked here is what will be signalled
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return bool(select.select([pidfd], [], [], wait_s)[0])
    except OSError:
        return False
    finally:
        os.close(pidfd)


def reap(state: Path) -> tuple[list[int], list[int]]:
    """End every leftover worker; returns the pids that are gone and those that would not go."""
    gone: list[int] = []
    stayed: list[int] = []
    for identity in leftovers(state):
        (gone if end(identity) else stayed).append(identity.pid)
    for path in state.glob("worker*.json"):
        with contextlib.suppress(OSError):
            path.unlink()
    return gone, stayed
