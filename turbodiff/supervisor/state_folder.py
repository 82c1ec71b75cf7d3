"""A state folder that is removed, or a job store that is damaged, while the app runs: the app starts again. What is
known of a removed one is written into a new one first.

The database's file lives on without a name while we have it open, so nothing of the queue is lost with its folder.
"""

import contextlib
import secrets
from pathlib import Path

from turbodiff.diagnostics.logs import LogFile
from turbodiff.jobs import journal
from turbodiff.jobs.database import DAMAGED
from turbodiff.jobs.journal import Accepted
from turbodiff.jobs.store import Store
from turbodiff.spec.environment import START_AGAIN
from turbodiff.spec.errors import FileError, TurbodiffError
from turbodiff.spec.files import atomic_write, sync
from turbodiff.supervisor.ownership import LOCK, is_held
from turbodiff.supervisor.recovery import ALL, FOLDER_LOST, OPEN

IN_USE = 3


class StateFolder:
    """The files by which a running supervisor knows that its folder is still there."""

    def __init__(self, store: Store, log: LogFile) -> None:
        self._store, self._log, self._state = store, log, store.path.parent
        self._known = [_identity(path) for path in (self._state / LOCK, store.path)]

    def is_lost(self) -> bool:
        """Whether the lock or the database is gone or another file: somebody removed or replaced the folder."""
        return [_identity(path) for path in (self._state / LOCK, self._store.path)] != self._known

    def bring_back(self) -> int:
        """Write journal and database anew from what is open; the exit code that makes the app start again.

        Where another app took the folder meanwhile, its next start finds our jobs in the journal.

        Raises:
            OutputError, OSError: it cannot be written now; nothing is half-made.
        """
        store, state = self._store, self._state
        jobs = store.jobs(ALL, OPEN)
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        journal.write_entries(state, [Accepted.of(job) for job in jobs])
        told = f"the state folder {state} was removed while the app ran: {len(jobs)} job(s) are in the new one"
        if is_held(state) and _identity(state / LOCK) != self._known[0]:
            self._log.say(f"{told}; another turbodiff uses it, and has them after its next start", level="ERROR")
            return IN_USE
        store.put(FOLDER_LOST, True)
        store.put("journal", journal.start_journal(state))
        with atomic_write(store.path, durable=True) as part:
            store.rows("VACUUM INTO ?", str(part))
            for old in (store.path.with_name(store.path.name + end) for end in ("", "-wal", "-shm")):
                with contextlib.suppress(FileNotFoundError):
                    old.rename(old.with_name(f"{old.name}-replaced-{secrets.token_hex(4)}"))
        sync(state)
        self._log.say(f"{told}; the app starts again", level="ERROR")
        return START_AGAIN

    def exit_code_of(self, error: Exception) -> int | None:
        """As `exit_code_if_damaged` after an error that speaks of damage, None after any other."""
        return self.exit_code_if_damaged() if isinstance(error, FileError) and error.code == DAMAGED else None

    def exit_code_if_damaged(self) -> int | None:
        """The exit code that makes the app start again where SQLite finds the store damaged: a start restores what it
        can, and a supervisor that goes on would refuse every job. None for a sound store."""
        damage = ""
        with contextlib.suppress(TurbodiffError):  # what SQLite cannot check now it checks with the next error
            damage = self._store.damage()
        if not damage:
            return None
        self._log.say("the job store was damaged while the app ran; the app starts again", level="ERROR")
        return START_AGAIN


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode, zeros where there is no such file.

    Raises:
        OSError: it cannot be told.
    """
    with contextlib.suppress(FileNotFoundError):
        stat = path.stat()
        return stat.st_dev, stat.st_ino
    return 0, 0
