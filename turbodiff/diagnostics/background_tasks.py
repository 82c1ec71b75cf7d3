"""Work beside the queue, one process each: downloads of weights, the self-test. Each prints to <folder>/<name>.log.

A task outlives the page; a second start while it runs does nothing. A download is `turbodiff models pull MODEL`
(diagnostics/downloads.py).
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from turbodiff.gpu.process_identity import is_running, start_ticks
from turbodiff.spec.environment import child_environment, with_network
from turbodiff.spec.errors import not_started
from turbodiff.spec.files import open_file

PULL = (sys.executable, "-P", "-m", "turbodiff.cli", "models", "pull")
MOVE = (sys.executable, "-P", "-m", "turbodiff.cli", "models", "move")
SELFTEST = (sys.executable, "-P", "-m", "turbodiff.cli", "selftest", "--json")
TAIL_BYTES = 8192
MAX_PID = 1 << 31


class BackgroundTask(NamedTuple):
    """A task that was started: whether it still runs, and the end of what it printed."""

    running: bool
    lines: tuple[str, ...]

    @property
    def words(self) -> str:
        """Its last line."""
        return self.lines[-1] if self.lines else ""


class Check(BaseModel):
    """One check of the self-test, which prints each as one line of JSON.

    `facts` are what `detail` says, for the page's own words: of a failure the fields of its error.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    ok: bool
    detail: str
    facts: dict[str, str] = {}


class SelfTest(NamedTuple):
    """A self-test that was started: whether it still runs, and the checks that it has made."""

    running: bool
    checks: tuple[Check, ...] = ()


def start_task(folder: Path, name: str, argv: Sequence[str]) -> None:
    """Start a task, unless one of that name runs already.

    Raises:
        TurbodiffError: code not_started.
    """
    if background_task(folder, name).running:
        return
    folder.mkdir(parents=True, exist_ok=True)
    environment = with_network(child_environment())
    with (folder / f"{name}.log").open("wb") as log:
        try:
            child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        except OSError as error:
            raise not_started(argv[0], error) from None
    (folder / f"{name}.pid").write_text(f"{child.pid} {start_ticks(child.pid)}")


def background_task(folder: Path, name: str) -> BackgroundTask:
    """How a task is doing; one that was never started has printed nothing."""
    try:
        with open_file(folder / f"{name}.pid") as file:
            pid, ticks = file.read(100).decode().split()
        with open_file(folder / f"{name}.log") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = log.read(TAIL_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError):
        return BackgroundTask(False, ())
    running = pid.isdecimal() and ticks.isdecimal() and int(pid) < MAX_PID and is_running(int(pid), int(ticks))
    return BackgroundTask(running, tuple(text.replace("\r", "\n").strip().splitlines()))


def selftest(folder: Path, name: str) -> SelfTest:
    """How the self-test that was started under this name is doing; lines that are no checks are passed over."""
    task, checks = background_task(folder, name), []
    for line in task.lines:
        with contextlib.suppress(ValidationError):
            checks.append(Check.model_validate_json(line))
    return SelfTest(task.running, tuple(checks))
