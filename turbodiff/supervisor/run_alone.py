"""One job beside the queue, in a worker of its own: what `turbodiff generate` does."""

import sys
from collections.abc import Callable, Sequence

from turbodiff.jobs import retry_policy
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.errors import DoesNotFitError, OutOfMemoryError, error_from
from turbodiff.spec.events import Event, RunCommand
from turbodiff.spec.numbers import gib
from turbodiff.spec.text import printable
from turbodiff.spec.wording import Words, shell_language
from turbodiff.supervisor.worker_process import run_once


def run_alone(command: RunCommand, argv: Sequence[str], on_event: Callable[[Event], None]) -> ClipResult:
    """The clip of a job beside the queue; after an out-of-memory once more and again, each time one rung lower.

    Raises: see `run_attempt`.
    """
    while True:
        try:
            return run_attempt(command, argv, on_event)
        except OutOfMemoryError as error:
            if command.attempt > retry_policy.LIMITS["oom"]:
                raise
            lower = {"cap_bytes": retry_policy.next_cap(command.plan, command.cap_bytes), "plan": None}
            command = command.model_copy(update={**lower, "attempt": command.attempt + 1})
            sys.stderr.write(Words(shell_language()).error_line(error, "error.again_lower"))


def run_attempt(command: RunCommand, argv: Sequence[str], on_event: Callable[[Event], None]) -> ClipResult:
    """The clip of one attempt beside the queue: `run_once` with its log, notes apart, on stderr.

    Raises:
        TurbodiffError: what its `error` says; a DoesNotFitError where it would have to wait, for there is no queue.
    """

    def to_stderr(line: str) -> None:
        if not line.startswith("[INFO]"):
            sys.stderr.write(printable(line) + "\n")

    for event in run_once(command, argv, on_output=to_stderr):
        if event.type == "error":
            raise error_from(event.model_dump())
        on_event(event)
        if event.type == "result":
            return event
        if event.type == "wait":
            free, needed = gib(event.free_bytes), gib(event.need_bytes)
            what = "another program took the memory of the device meanwhile"
            raise DoesNotFitError(what, code="does_not_fit", got=f"{free} free", expected=needed, try_instead="end it")
    raise AssertionError("a run ends with a result or an error")
