"""One attempt at one clip: what its phases share."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol, cast

import torch

from turbodiff.models.attention import ResolvedAttention, resolve_attention
from turbodiff.plan.hardware import Machine
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.replan import replan
from turbodiff.spec.attention import AttentionKind
from turbodiff.spec.clips import Measured
from turbodiff.spec.errors import CancelledByUser, OutOfMemoryError
from turbodiff.spec.events import Event, NoticeEvent, PhaseEvent, PlanEvent
from turbodiff.spec.numbers import gib
from turbodiff.spec.plan import Calibration, PhaseName, Plan
from turbodiff.spec.request import Request

# what torch, the driver and the libraries of NVIDIA say when they run out of device memory
OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class Commands(Protocol):
    """What a person asked of jobs while they run, by job number."""

    cancelled: set[int]
    decode_now: set[int]  # stop sampling and decode what there is


@dataclass
class Attempt:
    """One attempt at one clip, from its plan to its file.

    Args:
        id: of the job.
        number: of the attempt, from 1.
        plan: what it keeps to; its levers may change between two phases.
        output: a file name of the person's own; otherwise the library names it.
        machine: as it was at launch; the plan is checked against what is free now before each phase. None: it stands.
        calibration: what measured runs taught, for plans made on the way.
        send: of an event; its job and attempt are set by the sender.
    """

    id: int
    number: int
    plan: Plan
    outputs: Path
    state: Path
    models: ModelCache
    send: Callable[[Event], None]
    commands: Commands
    output: Path | None = None
    machine: Machine | None = None
    calibration: Calibration | None = None
    created: datetime = field(default_factory=lambda: datetime.now().astimezone())
    started_s: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def request(self) -> Request:
        """The request as it runs, which may differ from what was asked: see plan.changes."""
        return self.plan.request

    def attention(self) -> ResolvedAttention:
        """The attention that really runs; a plan's is never "auto"."""
        return resolve_attention(cast("AttentionKind", self.request.attention), self.models.device.torch_device)

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        """Check the plan, announce a phase, time it, record its peak, and turn torch's out-of-memory into ours.

        Raises:
            WaitForMemory: another program took what even the smallest way to go on needs.
            OutOfMemoryError: the device ran out; OOM is what people grep for.
        """
        self.check_cancelled()
        if self.machine is not None:
            plan = replan(self.plan, self.machine, self.models.device, self.calibration, at=name)
            if plan.levers != self.plan.levers:
                self.plan = plan
                self.send(PlanEvent(plan=plan))
                self.send(levers_notice(plan, phase=name))
        self.send(PhaseEvent(name=name, state="start"))
        self.models.reset_peak()
        start_s = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            ours = isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
            if not ours:
                raise
            raise OutOfMemoryError(
                f"OOM: the device ran out of memory in {name}",
                code="oom",
                field=name,
                got=(str(error).splitlines() or ["out of memory"])[0][:300],
                expected=f"{gib(self.plan.peak_bytes)} planned of {gib(self.plan.budget_bytes)}",
                try_instead="a smaller size, fewer frames, or quant_linear",
            ) from None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start_s
        self.peaks_bytes[name] = max(self.peaks_bytes.get(name, 0), self.models.device.peak_bytes())
        done = PhaseEvent(
            name=name,
            state="done",
            seconds=self.seconds[name],
            peak_bytes=self.peaks_bytes[name],
            weights_bytes=self.models.weights_bytes,
            reserved_bytes=self.models.device.reserved_bytes(),
        )
        self.send(done)

    def check_cancelled(self) -> None:
        """Stop here if a person said so.

        Raises:
            CancelledByUser: the job was cancelled.
        """
        if self.id in self.commands.cancelled:
            raise CancelledByUser("stopped", code="cancelled")

    def measured(self) -> Measured:
        """Seconds and peak bytes so far, in all and per phase."""
        return Measured(
            seconds=round(time.monotonic() - self.started_s, 3),
            peak_bytes=max(self.peaks_bytes.values(), default=0),
            phase_seconds={name: round(value, 3) for name, value in self.seconds.items()},
            phase_peak_bytes=dict(self.peaks_bytes),
        )


def levers_notice(plan: Plan, *, phase: PhaseName | None = None, cap_bytes: int | None = None) -> NoticeEvent:
    """The notice that memory changed levers and not one pixel: before a phase, or after an out-of-memory.

    Args:
        phase: another program grew before it.
        cap_bytes: what an attempt after an out-of-memory stays below.
    """
    levers = " ".join(f"{name}={value}" for name, value in plan.levers.model_dump().items())
    if cap_bytes is not None:
        text = f"an earlier attempt needed more than there was: this one stays below {gib(cap_bytes)} with {levers}"
        numbers = {"cap_bytes": cap_bytes, "peak_bytes": plan.peak_bytes}
        return NoticeEvent(key="one_rung_lower", text=text, numbers=numbers)
    text = f"less memory is free before {phase} than at the start; the same clip goes on with {levers}"
    facts = {"phase": phase, "peak_bytes": plan.peak_bytes, "budget_bytes": plan.budget_bytes}
    return NoticeEvent(key="levers_pulled", text=text, numbers=facts)
