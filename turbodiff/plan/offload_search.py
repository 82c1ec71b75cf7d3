"""Levers: which of the choices that cost time but not one pixel, phase by phase, for one candidate."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from turbodiff.plan import phase_costs
from turbodiff.plan.phase_costs import Job, PhaseCost
from turbodiff.spec.experts import Expert
from turbodiff.spec.plan import Levers, Phase

FFN_CHUNKS = (1, 2, 4, 8)
NEARLY = 1.02  # times the fastest: that much time is worth the ease of a smaller peak
FITS_SHARE = 0.9  # of the budget; a plan between this and all of it is "tight"


class Room(NamedTuple):
    """What a job may use: bytes on the device, and of host memory (None: unknown, not limited)."""

    device: int
    host: int | None

    def holds(self, need: PhaseCost) -> bool:
        """Whether a phase fits."""
        return need.peak <= self.device and (self.host is None or need.host <= self.host)

    def short(self, need: PhaseCost) -> int:
        """Bytes by which a phase does not fit, on the device or in host memory; <= 0 when it does."""
        return max(need.peak - self.device, 0 if self.host is None else need.host - self.host)


class CandidateCost(NamedTuple):
    """A candidate with its levers set: the fastest that fits, or the smallest when none does."""

    levers: Levers
    needs: tuple[PhaseCost, ...]
    fits: bool

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(need.peak for need in self.needs)

    @property
    def seconds(self) -> float:
        """Seconds of all phases."""
        return sum(need.seconds for need in self.needs)

    @property
    def binding(self) -> PhaseCost:
        """The phase that decides."""
        return max(self.needs, key=lambda need: need.peak)

    def short(self, room: Room) -> int:
        """Bytes by which the worst phase does not fit."""
        return max(room.short(need) for need in self.needs)


Option = tuple[dict[str, Any], tuple[PhaseCost, ...]]


def place(job: Job, room: Room, *, text_cached: bool = False) -> CandidateCost:
    """The fastest levers that fit, each phase on its own; the smallest where nothing fits."""
    parts = [_best(_text(job, text_cached), room), _best(_denoise(job, room), room), _best(_vae(job), room)]
    chosen: dict[str, Any] = {}
    for fields, _ in parts:
        chosen |= fields
    needs = (*parts[0][1], *parts[2][1][:-1], *parts[1][1], parts[2][1][-1], phase_costs.write(job))
    return CandidateCost(Levers(**chosen), needs, all(map(room.holds, needs)))


def placed_like(job: Job, like: Levers, room: Room) -> CandidateCost:
    """A candidate with given levers."""
    tiled, text = like.vae == "tiled", like.text
    needs = [phase_costs.text_encode(job, text, like.text_dtype)]
    work = phase_costs.step_work(job, like.ffn_chunks)
    if job.spec.kind == "i2v":
        needs.append(phase_costs.image_encode(job, tiled))
    needs += [
        phase_costs.denoise(job, expert, like.experts, like.blocks_resident, work) for expert in experts_in_order(job)
    ]
    needs += [phase_costs.vae_decode(job, tiled), phase_costs.write(job)]
    return CandidateCost(like, tuple(needs), all(map(room.holds, needs)))


def phases(placement: CandidateCost) -> tuple[Phase, ...]:
    """The needs as the plan shows them."""
    return tuple(
        Phase(
            name=need.name,
            weights_bytes=need.weights,
            activations_bytes=need.activations,
            workspace_bytes=need.workspace,
            peak_bytes=need.peak,
            host_ram_bytes=need.host,
            seconds=round(need.seconds, 3),
        )
        for need in placement.needs
    )


def _best(options: Iterable[Option], room: Room) -> Option:
    """The fastest option that fits; one that is nearly as fast and fits with ease goes before it.

    Where none fits, the one that is short by the least.
    """
    options = list(options)
    fitting = [option for option in options if all(map(room.holds, option[1]))]
    if not fitting:
        return min(options, key=lambda option: max(map(room.short, option[1])))
    limit_s = NEARLY * min(map(_seconds, fitting))
    fast = [option for option in fitting if _seconds(option) <= limit_s]
    return min(fast, key=lambda option: (_peak(option) > FITS_SHARE * room.device, _seconds(option)))


def _peak(option: Option) -> int:
    return max(need.peak for need in option[1])


def _seconds(option: Option) -> float:
    return sum(need.seconds for need in option[1])


def _text(job: Job, cached: bool) -> list[Option]:
    levers: tuple[phase_costs.TextLever, ...] = ("resident",) if job.on_cpu else ("resident", "streamed", "cpu")
    return [({"text": lever}, (phase_costs.text_encode(job, lever),)) for lever in (("cached",) if cached else levers)]


def _denoise(job: Job, room: Room) -> list[Option]:
    """Placements of the blocks x chunks of the feed-forward; streaming keeps as many blocks as fit.

    More chunks are tried only while they save something and nothing faster fits; where not even the smallest placement
    has room on the device, nothing but that.
    """
    smallest = _smallest(job)
    if any(need.peak > room.device for need in smallest[1]):
        return [smallest]
    options: list[Option] = []
    activations = None
    for chunks in FFN_CHUNKS:
        work = phase_costs.step_work(job, chunks)
        if work.activations == activations:
            break
        activations = work.activations
        for lever in _expert_levers(job):
            resident = _blocks_that_fit(job, room, work) if lever == "streamed" else 0
            option = _placed(job, lever, resident, chunks, work)
            options.append(option)
            if lever != "streamed" and all(map(room.holds, option[1])):
                return options
    return options


def _smallest(job: Job) -> Option:
    """As little as possible on the device; of chunks that need the same the fewest."""
    chunks = min(FFN_CHUNKS, key=lambda chunks: phase_costs.denoise_activations(job, chunks))
    return _placed(job, _expert_levers(job)[-1], 0, chunks, phase_costs.step_work(job, chunks))


def _placed(job: Job, lever: phase_costs.ExpertLever, resident: int, chunks: int, work: phase_costs.StepWork) -> Option:
    fields = {"experts": lever, "blocks_resident": resident, "ffn_chunks": chunks}
    return fields, tuple(phase_costs.denoise(job, expert, lever, resident, work) for expert in experts_in_order(job))


def experts_in_order(job: Job) -> tuple[Expert, ...]:
    """The experts that run at all: each has a phase."""
    return tuple(dict.fromkeys(job.experts))


def _expert_levers(job: Job) -> tuple[phase_costs.ExpertLever, ...]:
    both = len(set(job.experts)) > 1
    keep: tuple[phase_costs.ExpertLever, ...] = ("resident", "swapped") if both else ("resident",)
    return keep if job.on_cpu else (*keep, "streamed")


def _blocks_that_fit(job: Job, room: Room, work: phase_costs.StepWork) -> int:
    """The most blocks that can stay on the device beside the two in flight; fewer than all, or it is not streaming.

    A block more is worth little time, so blocks fill the budget only as far as a plan still "fits".
    """
    bare = job.weights.rest + phase_costs.STREAM_BUFFERS * job.weights.block + work.activations + work.workspace
    resident = (int(FITS_SHARE * room.device) - bare) // job.weights.block
    return max(0, min(resident, job.weights.blocks - phase_costs.STREAM_BUFFERS))


def _vae(job: Job) -> list[Option]:
    phases: list[Callable[[Job, bool], PhaseCost]] = [phase_costs.vae_decode]
    if job.spec.kind == "i2v":
        phases.insert(0, phase_costs.image_encode)
    return [
        ({"vae": "tiled" if tiled else "whole"}, tuple(phase(job, tiled) for phase in phases))
        for tiled in (False, True)
    ]
