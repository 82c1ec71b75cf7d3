"""Small jobs beside the queue, one process each: downloads, the self-test. What they say is in <folder>/<name>.log.

An errand outlives the page; a second start while it runs does nothing.
"""

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from turbodiff.gpu.processes import process_state, start_ticks

TAIL_BYTES = 8192


class Errand(NamedTuple):
    """One that was started: whether it still runs, and the end of what it said."""

    running: bool
    lines: tuple[str, ...]


class Check(BaseModel):
    """One check of the self-test, which says each as one line of JSON."""

    model_config = ConfigDict(frozen=True)
    name: str
    ok: bool
    detail: str


class SelfTest(NamedTuple):
    """A self-test that was started: whether it still runs, and the checks that it has made."""

    running: bool
    checks: tuple[Check, ...] = ()


def start(folder: Path, name: str, argv: Sequence[str]) -> None:
    """Start an errand, unless one of that name runs already."""
    if errand(folder, name).running:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    (folder / f"{name}.pid").write_text(f"{child.pid} {start_ticks(child.pid)}")


def errand(folder: Path, name: str) -> Errand:
    """How an errand is doing; one that was never started has said nothing."""
    try:
        pid, ticks = (folder / f"{name}.pid").read_text().split()
        text = (folder / f"{name}.log").read_bytes()[-TAIL_BYTES:].decode("utf-8", "replace")
    except (OSError, ValueError):
        return Errand(False, ())
    running = ticks.isdecimal() and start_ticks(int(pid)) == int(ticks) and process_state(int(pid)) not in ("Z", "")
    return Errand(running, tuple(text.replace("\r", "\n").strip().splitlines()))


def selftest(folder: Path, name: str) -> SelfTest:
    """How the self-test that was started under this name is doing; lines that are no checks are passed over."""
    found, checks = errand(folder, name), []
    for line in found.lines:
        with contextlib.suppress(ValidationError):
            checks.append(Check.model_validate_json(line))
    return SelfTest(found.running, tuple(checks))
