"""One attempt at one clip: what its phases share."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

import torch

from turbodiff.runtime.shelf import Shelf
from turbodiff.spec.errors import CancelledByUser, OutOfMemoryError
from turbodiff.spec.numbers import gib
from turbodiff.spec.plan import PhaseName, Plan
from turbodiff.spec.request import Request

Say = Callable[..., None]


class Orders(Protocol):
    """What a person may want of a running job."""

    def cancelled(self, job: int) -> bool:
        """Whether to give up."""

    def decode_now(self, job: int) -> bool:
        """Whether to stop sampling and decode what there is."""


@dataclass(frozen=True)
class Job:
    """One attempt at one clip. `output`: a file name of the person's own; otherwise the library names it."""

    id: int
    attempt: int
    plan: Plan
    outputs: Path
    state: Path
    output: Path | None = None


@dataclass
class Run:
    """An attempt under way: the job, the warm models, the voice, and what was measured so far."""

    job: Job
    shelf: Shelf
    say: Say
    orders: Orders
    created: datetime = field(default_factory=lambda: datetime.now().astimezone())
    started_s: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The plan that this attempt keeps to."""
        return self.job.plan

    @property
    def request(self) -> Request:
        """The request as it runs, which may differ from what was asked: see plan.changes."""
        return self.job.plan.request

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        """Announce a phase, time it, record its peak, and turn torch's out-of-memory into ours."""
        self.check_cancelled()
        self.say("phase", name=name, state="start")
        self.shelf.device.reset_peak()
        start_s = time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise out_of_memory(name, self.plan, error) from None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start_s
        self.peaks_bytes[name] = max(self.peaks_bytes.get(name, 0), self.shelf.device.peak_bytes())
        self.say("phase", name=name, state="done", seconds=self.seconds[name], peak_bytes=self.peaks_bytes[name])

    def check_cancelled(self) -> None:
        """Stop here if a person said so.

        Raises:
            CancelledByUser: the job was cancelled.
        """
        if self.orders.cancelled(self.job.id):
            raise CancelledByUser("stopped", code="cancelled")


def out_of_memory(phase: str, plan: Plan, error: BaseException) -> OutOfMemoryError:
    """Torch's out-of-memory in our words; OOM is what people grep for."""
    return OutOfMemoryError(
        f"OOM: the device ran out of memory in {phase}",
        code="oom",
        field=phase,
        got=(str(error).splitlines() or ["out of memory"])[0][:300],
        expected=f"{gib(plan.peak_bytes)} planned of {gib(plan.budget_bytes)}",
        try_instead="a smaller size, fewer frames, or quant_linear",
    )
