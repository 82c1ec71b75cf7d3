"""One job beside the queue, in a worker of its own: what `turbodiff generate` does."""

import sys
from collections.abc import Callable, Sequence

from turbodiff.gpu.card_measurements import keep_link, lacks_link
from turbodiff.jobs import retry_policy
from turbodiff.plan.hardware import Machine
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.errors import DoesNotFitError, OutOfMemoryError, TurbodiffError, error_from
from turbodiff.spec.events import Event, RunCommand
from turbodiff.spec.numbers import gib
from turbodiff.spec.text import printable
from turbodiff.spec.wording import Words, shell_language
from turbodiff.supervisor.worker_process import run_once


def run_alone(
    command: RunCommand, argv: Sequence[str], on_event: Callable[[Event], None], machine: Machine | None = None
) -> ClipResult:
    """The clip of a job beside the queue; after an out-of-memory once more and again, each time one rung lower. A
    worker that ends because one that it shared the clip with is gone says which cards are left, and goes on with them;
    one that dies without a word goes on alone. What cards of the `machine` send each other is measured and kept where
    nobody has.

    Raises: see `run_attempt`.
    """
    last, gpus = command.plan, machine.gpus if machine else ()
    gpu = next((one for one in gpus if last and f"cuda:{one.index}" == last.device), None)
    command = command.model_copy(update={"measure_link": lacks_link(gpu, command.cards)})

    def hear(event: Event) -> None:
        nonlocal last
        last = event.plan if event.type == "plan" else last
        if event.type == "link" and machine and gpu:
            keep_link(gpu, machine, event)
        on_event(event)

    while True:
        try:
            return run_attempt(command, argv, hear)
        except OutOfMemoryError as error:
            if command.attempt > retry_policy.LIMITS["oom"]:
                raise
            lower = {"cap_bytes": retry_policy.next_cap(command.plan, command.cap_bytes), "plan": None}
            command = command.model_copy(update={**lower, "attempt": command.attempt + 1})
            sys.stderr.write(Words(shell_language()).error_line(error, "error.again_lower"))
        except TurbodiffError as error:
            if error.code not in ("worker_died", "ranks_lost") or not command.cards:
                raise
            left = last if error.code == "ranks_lost" else None
            cards = left.followers[: len(command.cards) - 1] if left else ()
            plan = command.plan and command.plan.model_copy(update={"shares": left.shares if left else ()})
            command = command.model_copy(update={"cards": cards, "plan": plan, "attempt": command.attempt + 1})
            how = "error.again_left" if cards else "error.again_alone"
            sys.stderr.write(Words(shell_language()).error_line(error, how))


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
