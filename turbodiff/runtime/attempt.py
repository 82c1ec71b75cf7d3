"""One attempt at one clip: what its phases share."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

import torch

from turbodiff.plan.calibration import Calibration
from turbodiff.plan.hardware import Machine
from turbodiff.plan.planner import Shortage
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.replan import Waits, at_phase
from turbodiff.spec.errors import CancelledByUser, OutOfMemoryError
from turbodiff.spec.events import Event, NoticeEvent, PhaseEvent, PlanEvent
from turbodiff.spec.numbers import gib
from turbodiff.spec.plan import PhaseName, Plan
from turbodiff.spec.request import Request

Say = Callable[[Event], None]


class Orders(Protocol):
    """What a person may want of a running job."""

    def cancelled(self, job: int) -> bool:
        """Whether to give up."""

    def decode_now(self, job: int) -> bool:
        """Whether to stop sampling and decode what there is."""


@dataclass(frozen=True)
class Job:
    """One attempt at one clip.

    Args:
        output: a file name of the person's own; otherwise the library names it.
        machine: as it was at launch; the plan is checked against what is free now before each phase. None: it stands.
        calibration: what measured runs taught, for plans made on the way.
    """

    id: int
    attempt: int
    plan: Plan
    outputs: Path
    state: Path
    output: Path | None = None
    machine: Machine | None = None
    calibration: Calibration | None = None


@dataclass
class Run:
    """An attempt under way: the job, the warm models, the voice, and what was measured so far."""

    job: Job
    shelf: ModelCache
    say: Say
    orders: Orders
    created: datetime = field(default_factory=lambda: datetime.now().astimezone())
    started_s: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks_bytes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan: Plan = self.job.plan  # what this attempt keeps to; its levers may change between two phases

    @property
    def request(self) -> Request:
        """The request as it runs, which may differ from what was asked: see plan.changes."""
        return self.plan.request

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        """Check the plan, announce a phase, time it, record its peak, and turn torch's out-of-memory into ours.

        Raises:
            Waits: a neighbour took what even the smallest way to go on needs.
        """
        self.check_cancelled()
        self.check_plan(name)
        self.say(PhaseEvent(name=name, state="start"))
        self.shelf.reset_peak()
        start_s = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(name, self.plan, error) from None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start_s
        self.peaks_bytes[name] = max(self.peaks_bytes.get(name, 0), self.shelf.device.peak_bytes())
        self.say(
            PhaseEvent(
                name=name,
                state="done",
                seconds=self.seconds[name],
                peak_bytes=self.peaks_bytes[name],
                weights_bytes=self.shelf.weights_bytes,
                reserved_bytes=self.shelf.device.reserved_bytes(),
            )
        )

    def check_plan(self, name: PhaseName) -> None:
        """Pull lossless levers where what is left does not fit any more beside somebody who grew.

        Raises:
            Waits: none of them is enough.
        """
        if self.job.machine is None:
            return
        fresh = at_phase(self.plan, name, self.job.machine, self.shelf.device, self.job.calibration)
        if isinstance(fresh, Shortage):
            raise Waits(fresh)
        if fresh.levers != self.plan.levers:
            self.plan = fresh
            self.say(PlanEvent(plan=fresh))
            self.say(levers_pulled(name, fresh))

    def check_cancelled(self) -> None:
        """Stop here if a person said so.

        Raises:
            CancelledByUser: the job was cancelled.
        """
        if self.orders.cancelled(self.job.id):
            raise CancelledByUser("stopped", code="cancelled")


def levers_pulled(phase: str, plan: Plan) -> NoticeEvent:
    """The notice that another program grew and the plan gave way without losing a pixel."""
    levers = " ".join(f"{name}={value}" for name, value in plan.levers.model_dump().items())
    text = f"less memory is free before {phase} than at the start; the same clip goes on with {levers}"
    numbers = {"phase": phase, "peak_bytes": plan.peak_bytes, "budget_bytes": plan.budget_bytes}
    return NoticeEvent(key="levers_pulled", text=text, numbers=numbers)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch, the driver or a library of NVIDIA ran out of device memory; each says it in words of its own."""
    words = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


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
