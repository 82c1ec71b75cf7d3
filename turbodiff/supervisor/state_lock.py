"""One supervisor per state folder: an flock that the kernel releases on any death, and who holds it."""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, Self

from turbodiff.gpu.processes import start_ticks
from turbodiff.spec.errors import OutputError, StateInUseError

LOCK = "supervisor.lock"


class StateLock:
    """Holds the state folder until `close`.

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
            raise _in_use(state) from None
        self.write(pid=os.getpid(), start_ticks=start_ticks(os.getpid()), since_s=time.time())

    def write(self, **facts: Any) -> None:
        """Say who holds the folder."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(facts).encode(), 0)

    def close(self) -> None:
        """Let the folder go."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def holder(state: Path) -> dict[str, Any] | None:
    """The supervisor that holds a state folder: {"pid": ...}, or None. Never waits, takes nothing."""
    path = state / LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        return _facts(path)
    finally:
        os.close(fd)


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _in_use(state: Path) -> StateInUseError:
    pid = _facts(state / LOCK).get("pid", "unknown")
    return StateInUseError(
        "another turbodiff uses this state folder",
        code="state_in_use",
        field="state",
        got=f"{state}, held by pid {pid}",
        try_instead="use its page, `turbodiff jobs list`, or another --state-dir",
    )
