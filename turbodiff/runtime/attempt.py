"""One attempt at one clip: what its phases share."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count, pairwise
from pathlib import Path
from typing import Protocol, TypeVar, cast

from turbodiff_kernels import backend

from turbodiff.models.attention import ResolvedAttention, resolve_attention
from turbodiff.plan.calibration import PROVENANCE, provenance
from turbodiff.plan.hardware import Machine
from turbodiff.plan.links import possible_ranks
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.ranks import Ranks, RanksLostError
from turbodiff.runtime.replan import budget_now, for_cards, machine_at, replan, with_levers
from turbodiff.spec.attention import AttentionKind
from turbodiff.spec.clips import Measured, MeasuredOn
from turbodiff.spec.errors import CancelledByUser, OutOfMemoryError
from turbodiff.spec.events import ErrorEvent, Event, LinkEvent, NoticeEvent, PhaseEvent, PlanEvent
from turbodiff.spec.numbers import gib
from turbodiff.spec.out_of_memory import MemoryFailure, memory_failure
from turbodiff.spec.plan import Calibration, PhaseName, Plan
from turbodiff.spec.request import Exchange, Request
from turbodiff.spec.shapes import VAE_TILES

Result = TypeVar("Result")
# per phase the lever that makes it smaller, and what follows each of its values
SMALLER_TILES: Mapping[str | int, int] = dict(pairwise(VAE_TILES))
NEXT_LEVERS: Mapping[PhaseName, Mapping[str, Mapping[str | int, str | int]]] = {
    "text_encode": {"text": {"resident": "streamed", "streamed": "cpu"}},
    "image_encode": {"vae": {"whole": "tiled"}, "vae_tile": SMALLER_TILES},
    "vae_decode": {"vae": {"whole": "tiled"}, "vae_tile": SMALLER_TILES},
}


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
        names: what is told of the request's files, by their paths here (spec/events.py).
        away: another machine takes the clip home.
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
    reserved_bytes: dict[str, int] = field(default_factory=dict)
    cards: tuple[str, ...] = ()  # CUDA_VISIBLE_DEVICES of each process that may share the clip, see runtime/ranks.py
    ranks: Ranks | None = None  # the group of those that do
    measures_link: bool = False  # what these processes send each other a second, once they are there
    exchange: Exchange = "full"  # between those that made the latents
    outside_bytes: int | None = None  # of the allocator, see replan.outside_bytes
    names: Mapping[str, str] = field(default_factory=dict)
    away: bool = False

    @property
    def request(self) -> Request:
        """The request as it runs, which may differ from what was asked: see plan.changes."""
        return self.plan.request

    @property
    def told(self) -> Plan:
        """The plan as it is told: its files under the names by which they were asked for."""
        return self.plan.with_files(self.names)

    def attention(self) -> ResolvedAttention:
        """The attention that really runs; a plan's is never "auto"."""
        return resolve_attention(cast("AttentionKind", self.request.attention), self.models.device.torch_device)

    def check_kernels(self) -> None:
        """Check the kernels that nobody checked on such a card yet, all before the first phase: seconds, once."""
        device, checked = self.models.device.torch_device, count(1)

        def tell(choice: backend.Implementation) -> None:
            numbers: dict[str, float | str] = {"n": next(checked), "total": len(backend.OPS)}
            text = f"kernel {choice.op}: {choice.runs} ({choice.why})"
            self.send(NoticeEvent(key="kernels_checked", text=text, numbers=numbers))

        if backend.due(device):
            try:
                backend.check_all(device, tell)
            except Exception as error:  # a neighbour fills the card: the phases know what to do then
                if memory_failure(error) is None:
                    raise

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        """Check the plan, announce a phase, time it, record its peak, and turn every out-of-memory into ours.

        Raises:
            WaitForMemory: another program took what even the smallest way to go on needs.
            OutOfMemoryError: the device or the host ran out.
        """
        self.check_cancelled()
        if self.machine is not None:
            plan = replan(self.plan, self.machine, self.models.device, self.calibration, at=name)
            if plan.levers != self.plan.levers:
                self.plan = plan
                self.send(PlanEvent(plan=self.told))
                self.send(levers_notice(plan, phase=name))
            budget_bytes = budget_now(self.plan, self.machine, self.models.device)
            if left_bytes := self.models.make_room(self.plan, budget_bytes):
                self.send(left_notice(left_bytes, name))
        self.send(PhaseEvent(name=name, state="start"))
        self.models.reset_peak()
        start_s = time.monotonic()
        try:
            yield
        except Exception as error:
            known = isinstance(error, (OutOfMemoryError, CancelledByUser))
            failure = None if known else memory_failure(error)
            if failure is None:
                raise
            raise out_of_memory(failure, name, self.plan) from None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start_s
        peak_bytes, reserved_bytes = self.models.graphs.peaks_beside()
        self.peaks_bytes[name] = max(self.peaks_bytes.get(name, 0), peak_bytes)
        if reserved_bytes is not None:
            self.reserved_bytes[name] = max(self.reserved_bytes.get(name, 0), reserved_bytes)
        done = PhaseEvent(
            name=name,
            state="done",
            seconds=self.seconds[name],
            peak_bytes=self.peaks_bytes[name],
            weights_bytes=self.models.weights_bytes,
            reserved_bytes=self.reserved_bytes.get(name),
        )
        self.send(done)

    def run_phase(self, name: PhaseName, work: Callable[[], Result]) -> Result:
        """What `work` returns, inside a phase; where memory runs out and the process is sound, with the phase's next
        lever, as often as there is one.

        Raises:
            OutOfMemoryError: the process is not sound, or no lever is left.
        """
        while True:
            try:
                with self.phase(name):
                    return work()
            except OutOfMemoryError as error:
                ran_out, more = error.got, error.goes_on and self._pull_next_lever(name)
                if not more:
                    raise
            self.models.leave_device()  # only now: the traceback holds tensors
            self.send(repeated_notice(self.plan, name, ran_out))

    def share(self, at: PhaseName, work: Callable[[], Result]) -> Result:
        """What `work` returns, which shares it with `ranks` where there are cards for it; where one of these processes
        is lost, `work` begins again with those that are left. Any other error ends the group, and is raised.

        Args:
            at: where in the plan this is.

        Raises:
            WaitForMemory, DoesNotFitError: the cards that are left cannot hold the rest as it was shown.
        """
        while True:
            try:
                self._open_ranks()
                return work()
            except RanksLostError as lost:
                self.close_ranks()
                left = 1 + len(self._sharing())
                self.send(ranks_notice(lost, left))
                now = self.machine and (machine_at(self.machine, self.models.device) or self.machine)
                self.plan = for_cards(self.plan, left, now, self.calibration, at=at)
                self.send(PlanEvent(plan=self.told))
            except BaseException:
                self.close_ranks()
                raise

    def _sharing(self) -> tuple[str, ...]:
        """The cards that followers take."""
        shape = self.request.shape.latent
        sizes = possible_ranks(self.request.spec.dit.num_heads, shape.tokens, 1 + len(self.cards))
        return self.cards[: sizes[0] - 1] if sizes else ()

    def _open_ranks(self) -> None:
        """Start the processes that may share this clip, unless they are there."""
        if self.ranks is None and (cards := self._sharing()):
            self.ranks = Ranks(self.models.device, cards, self._say_lost)
            self.ranks.open()
            if self.measures_link:  # with as many bytes as a card sends of queries in a block
                shape, dit = self.request.shape.latent, self.request.spec.dit
                n_bytes = shape.tokens * dit.dim * self.models.device.dtype.itemsize // self.ranks.parallel.ranks
                rate = self.ranks.link_rate(n_bytes)
                self.measures_link = False
                self.send(LinkEvent(cards=self.ranks.parallel.ranks, bytes_s=rate))

    def close_ranks(self) -> None:
        """End the processes that share the clip; the card of one that was lost is not used again."""
        if self.ranks is not None:
            self.ranks.close()
            self._give_up_lost()
            self.ranks = None

    def _give_up_lost(self) -> None:
        """Count the card of a follower that was lost as none of the clip's any more."""
        if self.ranks is not None and self.ranks.lost_rank is not None:
            index, shares = self.ranks.lost_rank - 1, self.plan.shares
            self.cards = self.cards[:index] + self.cards[index + 1 :]
            self.plan = self.plan.model_copy(update={"shares": shares[: index + 1] + shares[index + 2 :]})

    def _say_lost(self, lost: RanksLostError) -> None:
        """The last words of a process that nothing wakes any more: whom it lost, and which cards are left."""
        self._give_up_lost()
        self.send(PlanEvent(plan=self.told))
        self.send(ErrorEvent(**lost.fields(), exit_code=lost.exit_code))

    def _pull_next_lever(self, name: PhaseName) -> bool:
        """Change the plan to the next smaller way through a phase that changes no pixel; False where there is none."""
        levers = self.plan.levers
        for lever, smaller in NEXT_LEVERS.get(name, {}).items():
            following = smaller.get(getattr(levers, lever))
            if following == "streamed" and levers.text_dtype != "bf16":
                following = "cpu"
            if following is not None:
                self.plan = with_levers(self.plan, levers.model_copy(update={lever: following}), self.machine)
                self.send(PlanEvent(plan=self.told))
                return True
        return False

    def check_cancelled(self) -> None:
        """Stop here if a person said so.

        Raises:
            CancelledByUser: the job was cancelled.
        """
        if self.id in self.commands.cancelled:
            raise CancelledByUser("stopped", code="cancelled")

    def measured(self) -> Measured:
        """Seconds and peak bytes so far, in all and per phase, and what they depend on."""
        outside_bytes, on = self.outside_bytes, MeasuredOn()
        if self.machine is not None:
            gpu = self.machine.gpus[0] if self.machine.gpus else None
            where = zip(PROVENANCE, provenance(gpu, self.machine), strict=True)
            on = MeasuredOn.model_validate({name: value for name, value in where if name in MeasuredOn.model_fields})
        shown = {} if outside_bytes is None else {name: n + outside_bytes for name, n in self.reserved_bytes.items()}
        return Measured(
            seconds=round(time.monotonic() - self.started_s, 3),
            peak_bytes=max(self.peaks_bytes.values(), default=0),
            phase_seconds={name: round(value, 3) for name, value in self.seconds.items()},
            phase_peak_bytes=dict(self.peaks_bytes),
            phase_reserved_bytes=dict(self.reserved_bytes),
            phase_nvml_bytes=shown,
            on=on,
        )


def out_of_memory(failure: MemoryFailure, where: str, plan: Plan | None = None) -> OutOfMemoryError:
    """The error that says what ran out in a phase, or elsewhere in a job; OOM is what people grep for.

    Where a job runs on a CPU the host's memory is the device's.
    """
    host = failure.where == "host" and (plan is None or plan.device != "cpu")
    error = OutOfMemoryError(
        f"OOM: the {'computer' if host else 'device'} ran out of {'RAM' if host else 'memory'} in {where}",
        code="host_ram" if host else "oom",
        field=where,
        got=failure.line,
        expected=f"{gib(plan.peak_bytes)} planned of {gib(plan.budget_bytes)}" if plan and not host else "",
        try_instead="close other programs" if host else "a smaller size, fewer frames, or quant_linear",
    )
    error.goes_on = failure.goes_on
    return error


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


def repeated_notice(plan: Plan, phase: PhaseName, ran_out: str) -> NoticeEvent:
    """The notice that a phase begins again in the same process, in smaller pieces."""
    text = f"{phase} ran out of memory and begins again in smaller pieces: {ran_out}"
    facts = {"phase": phase, "peak_bytes": peak_of(plan, phase), "budget_bytes": plan.budget_bytes}
    return NoticeEvent(key="phase_repeated", text=text, numbers=facts)


def ranks_notice(lost: RanksLostError, left: int) -> NoticeEvent:
    """The notice that a process which shared the clip is gone, and how many begin again."""
    text = f"a process that shared the clip is gone ({lost.got}): the clip goes on with {left}"
    return NoticeEvent(key="ranks_lost", text=text, numbers={"why": lost.got, "left": left})


def left_notice(left_bytes: int, phase: PhaseName) -> NoticeEvent:
    """The notice that networks which had stayed on the device left it because less is free, before a phase or in it."""
    text = f"less memory is free for {phase}: {gib(left_bytes)} of weights that had stayed on the device leave it"
    return NoticeEvent(key="weights_left", text=text, numbers={"phase": phase, "bytes": left_bytes})


def work_of(plan: Plan, name: str) -> int:
    """Planned peak bytes of a phase beside its weights, 0 where the plan does not have it."""
    return next((phase.peak_bytes - phase.weights_bytes for phase in plan.phases if phase.name == name), 0)


def peak_of(plan: Plan, name: str) -> int:
    """Planned peak bytes of a phase, 0 where the plan does not have it."""
    return next((phase.peak_bytes for phase in plan.phases if phase.name == name), 0)
