"""Who owns a state folder and which workers are ours: the supervisor's lock, and the workers written down beside it.

A leftover worker of an earlier run is recognised by everything at once, never by a name or a number alone: pid, start
time, boot id and uid are those that were written down when it started, its environment still carries that run's id,
the note was written in this very folder and not in one that it was copied from, and the supervisor that started it is
gone. Any difference, and it is somebody else's process: it is never signalled.
"""

import contextlib
import fcntl
import json
import os
import secrets
import select
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from turbodiff.gpu.process_identity import boot_id, is_running, start_ticks
from turbodiff.spec.environment import RUN_ID
from turbodiff.spec.errors import OutputError, StateInUseError
from turbodiff.spec.files import open_file

LOCK = "supervisor.lock"


class StateLock:
    """Holds the state folder until `close`: an flock, which the kernel releases on any death.

    Raises:
        StateInUseError: another supervisor holds it; the error names the holder, nothing is signalled.
        OutputError: the folder cannot be written.
    """

    def __init__(self, state: Path) -> None:
        self.path = state / LOCK
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds prompts
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OutputError(
                "the state folder cannot be written",
                code="state_unwritable",
                field="state",
                got=f"{state}: {error.strerror}",
                try_instead="another --state-dir",
            ) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            pid = _lock_facts(state).get("pid", "unknown")
            raise StateInUseError(
                "another turbodiff uses this state folder",
                code="state_in_use",
                field="state",
                got=f"{state}, held by pid {pid}",
                try_instead="use its page, `turbodiff jobs list`, or another --state-dir",
            ) from None
        name = _lock_facts(state).get("id") or secrets.token_hex(16)
        facts = {"pid": os.getpid(), "start_ticks": start_ticks(os.getpid()), "since_s": time.time(), "id": name}
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(facts).encode(), 0)

    def close(self) -> None:
        """Let the folder go."""
        os.close(self._fd)


def _lock_facts(state: Path) -> dict[str, object]:
    """What the lock's file says: pid, start_ticks and since_s of its holder, id of the folder; {} for nothing."""
    with contextlib.suppress(OSError, ValueError), open_file(state / LOCK) as file:
        found = json.loads(file.read(4096))
        return found if isinstance(found, dict) else {}
    return {}


def folder_identity(state: Path) -> str:
    """What names one state folder: device, inode and the random id in its lock; a copy has another inode."""
    with contextlib.suppress(OSError):
        stat = state.stat()
        return f"{stat.st_dev}:{stat.st_ino}:{_lock_facts(state).get('id', '')}"
    return ""


def is_held(state: Path) -> bool:
    """Whether a supervisor holds a state folder. Never waits, takes nothing."""
    try:
        fd = os.open(state / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Identity:
    """What names one process for ever: its number is reused, its start after this boot is not."""

    pid: int
    start_ticks: int
    boot_id: str
    uid: int
    run_id: str
    folder: str = ""  # see folder_identity
    supervisor_pid: int = 0
    supervisor_ticks: int = 0


def worker_file(state: Path, slot: int) -> Path:
    """Where the worker of a slot is written down."""
    return state / f"worker{slot}.json"


def remember_worker(state: Path, slot: int, pid: int, run_id: str) -> None:
    """Write down a worker that was just started; a disk that takes no more costs only this layer of care."""
    ticks = start_ticks(pid)
    if ticks is not None:
        us = os.getpid()
        folder = folder_identity(state)
        identity = Identity(pid, ticks, boot_id(), os.getuid(), run_id, folder, us, start_ticks(us) or 0)
        with contextlib.suppress(OSError):
            worker_file(state, slot).write_text(json.dumps(asdict(identity)))


def leftover_workers(state: Path) -> list[Identity]:
    """The written-down workers that run, this run's own included; only looks."""
    found = []
    for path in sorted(state.glob("worker*.json")):
        try:
            with open_file(path) as file:
                identity = Identity(**json.loads(file.read(4096)))
        except (OSError, ValueError, TypeError):
            continue
        if identity.folder == folder_identity(state) and is_ours(identity):
            found.append(identity)
    return found


def is_ours(identity: Identity) -> bool:
    """Whether that very process still runs and its supervisor does not: every field matches, and its environment
    carries the run id."""
    if identity.supervisor_pid != os.getpid() and is_running(identity.supervisor_pid, identity.supervisor_ticks):
        return False
    if identity.pid in (0, 1, os.getpid(), os.getppid()) or identity.boot_id != boot_id():
        return False
    if start_ticks(identity.pid) != identity.start_ticks:
        return False
    try:
        process = psutil.Process(identity.pid)
        same_user = process.uids().real == identity.uid == os.getuid()
        return same_user and process.environ().get(RUN_ID) == identity.run_id
    except psutil.Error:
        return False


def end_worker(identity: Identity, wait_s: float = 2.0) -> bool:
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


def end_leftover_workers(state: Path) -> tuple[list[int], list[int]]:
    """End every leftover worker; returns the pids that are gone and those that would not go."""
    gone: list[int] = []
    stayed: list[int] = []
    for identity in leftover_workers(state):
        (gone if end_worker(identity) else stayed).append(identity.pid)
    for path in state.glob("worker*.json"):
        with contextlib.suppress(OSError):
            path.unlink()
    return gone, stayed
