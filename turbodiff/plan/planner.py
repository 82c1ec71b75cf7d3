"""The planner: a request and a machine in, a plan out. Pure: no torch, no disk, no clock, a few milliseconds.

Order: lossless levers, then INT8, frames, resolution, model (plan/candidates.py). A wish may be lowered, a pin never,
and nothing is ever raised. A candidate whose levers make it more than three times slower than the same clip with all
memory in the world is "slow": it yields to the next one that is not, and is shown beside it.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple

from turbodiff.plan import explain, offload_search
from turbodiff.plan.alternatives import alternatives
from turbodiff.plan.calibration import Calibration, Kind, Sample, calibrate, kind_of
from turbodiff.plan.candidates import SIZE_PINS, Candidate, candidates
from turbodiff.plan.hardware import Machine
from turbodiff.plan.offload_search import FITS_SHARE, CandidateCost
from turbodiff.plan.phase_costs import device_budget, reserve_bytes
from turbodiff.plan.plan_context import PlanContext, placement_of, setting_of, settled_attention, unlimited
from turbodiff.spec.errors import DoesNotFitError
from turbodiff.spec.inventory import Inventory
from turbodiff.spec.numbers import gib
from turbodiff.spec.plan import Band, Change, Phase, PhaseName, Plan
from turbodiff.spec.request import Request

Policy = Literal["auto", "ask", "never", "anyway"]

SLOW = 3.0
LOSSY_FIELDS = ("quant_linear", "num_frames", "resolution", "model")  # in the order of sacrifice
# reasons for what was chosen of the picture, which stay true when levers change
OF_THE_PICTURE = frozenset(
    (
        "wish_does_not_fit",
        "settled",
        "lowered",
        "int8_below_40gb",
        "int8_not_faster_here",
        "only_int8_on_disk",
        "outside_trained_size",
        "lossless_is_slow",
    )
)
CHANGED_FIELDS = ("model", "resolution", "aspect", "width", "height", "num_frames", "quant_linear", "attention")


class Refusal(DoesNotFitError):
    """No plan. `plan` is the request as asked with band "no": what "Run anyway" would run, and what the meter shows."""

    def __init__(self, what: str, *, plan: Plan, need_bytes: int, have_bytes: int, **fields: str) -> None:
        super().__init__(what, got=gib(need_bytes), expected=f"at most {gib(have_bytes)}", **fields)  # type: ignore[arg-type]
        self.plan, self.need_bytes, self.have_bytes = plan, need_bytes, have_bytes


class Shortage(NamedTuple):
    """Somebody else holds the memory that even the smallest way to run a plan needs.

    `need_bytes` must be free on the card, the reserve for others included; `free_bytes` are.
    """

    need_bytes: int
    free_bytes: int


class Decision(NamedTuple):
    """The choice that was taken, with its levers."""

    choice: Candidate
    placement: CandidateCost


def plan_request(
    request: Request,
    machine: Machine,
    inventory: Inventory,
    *,
    policy: Policy = "auto",
    samples: Sequence[Sample] = (),
    calibration: Calibration | None = None,
    loaded: Collection[str] = (),
    text_cached: bool = False,
    limit_bytes: int | None = None,
) -> Plan:
    """How `request` will run on `machine`: the one way to a plan.

    Args:
        policy: "auto" and "ask" lower wishes (asking is the page's business), "never" treats every wish as a pin,
            "anyway" lowers nothing that shows and answers with band "no" instead of an error.
        samples: measured runs, the oldest first: what they teach about this clip on this card is used.
        calibration: what they taught, where it is known already.
        loaded: components whose weights are in memory already and need no reading ("dit", "vae", "text_encoder").
        text_cached: the embedding of this prompt is on disk.
        limit_bytes: a budget below what is free.

    Raises:
        Refusal: nothing that the pins allow fits; says by how much, and which pin to release. A DoesNotFitError.
    """
    setting = setting_of(machine, inventory, calibration, frozenset(loaded), text_cached, limit_bytes)
    pinned = request.pinned | (frozenset(LOSSY_FIELDS) if policy in ("never", "anyway") else frozenset())
    decision = _decide(request, setting, pinned)
    if samples and setting.gpu is not None:
        found = calibrate(samples, _kind(request, setting, decision, policy))
        if found.samples:
            calibration = found
            setting = setting_of(machine, inventory, calibration, frozenset(loaded), text_cached, limit_bytes)
            decision = _decide(request, setting, pinned)
    if not decision.placement.fits and calibration is not None and calibration.measured < calibration.factor:
        # a run that failed makes plans careful; it never makes one refuse
        calibration = calibration._replace(factor=calibration.measured)
        setting = setting_of(machine, inventory, calibration, frozenset(loaded), text_cached, limit_bytes)
        decision = _decide(request, setting, pinned)
    if not decision.placement.fits and policy != "anyway":
        raise _refusal(request, setting, decision, pinned)
    return _plan(request, setting, decision, pinned)


def replan(
    plan: Plan,
    machine: Machine,
    inventory: Callable[[], Inventory],
    *,
    at: Literal["launch"] | PhaseName = "launch",
    calibration: Calibration | None = None,
) -> Plan | Shortage:
    """The same clip on the machine as it is now, from its launch or from one of its phases on.

    Only levers that cost no pixel change; what was lowered, and what else there was, is told as before. A plan with
    band "no" ("Run anyway") and a machine whose cards cannot be seen at the moment change nothing. At a phase, a plan
    whose rest still fits stays as it is, and `inventory` is not asked.

    Raises:
        Refusal: at launch, the computer's own memory is short; waiting for the card would never end.
    """
    if not machine.gpus or plan.band == "no":
        return plan
    budget_bytes = free_for_us(machine)
    reserved = max(reserve_bytes(gpu, machine) for gpu in machine.gpus)
    if at == "launch":
        files = inventory()
        try:
            return told_as(plan, plan_request(plan.request, machine, files, policy="never", calibration=calibration))
        except Refusal as refusal:
            any_ram = machine.model_copy(update={"ram_available_bytes": None})
            try:
                plan_request(plan.request, any_ram, files, policy="never", calibration=calibration)
            except Refusal:
                return Shortage(refusal.plan.peak_bytes + reserved, budget_bytes + reserved)
            raise
    if max(phase.peak_bytes for phase in from_phase(plan, at)) <= budget_bytes:
        return plan
    smaller = plan_request(
        plan.request, machine, inventory(), policy="anyway", calibration=calibration,
        text_cached=plan.levers.text == "cached",
    )  # fmt: skip
    need_bytes = max(phase.peak_bytes for phase in from_phase(smaller, at))
    if need_bytes > budget_bytes:
        return Shortage(need_bytes + reserved, budget_bytes + reserved)
    return told_as(plan, smaller).model_copy(update={"band": band_of(need_bytes, budget_bytes)})


def from_phase(plan: Plan, name: PhaseName) -> tuple[Phase, ...]:
    """The phases from one on; all of them where the plan does not have it."""
    names = [phase.name for phase in plan.phases]
    return plan.phases[names.index(name) if name in names else 0 :]


def free_for_us(machine: Machine) -> int:
    """Bytes that a job may use on the freest card, 0 without one."""
    return max((device_budget(gpu, machine) for gpu in machine.gpus), default=0)


def told_as(plan: Plan, fresh: Plan) -> Plan:
    """The fresh plan with what was said about the picture when it was chosen."""
    said = [reason for reason in plan.reasons if reason.key in OF_THE_PICTURE]
    more = [reason for reason in fresh.reasons if reason.key not in OF_THE_PICTURE]
    told = {"changes": plan.changes, "alternatives": plan.alternatives, "reasons": (*said, *more)}
    return fresh.model_copy(update=told)


def _kind(request: Request, setting: PlanContext, decision: Decision, policy: Policy) -> Kind:
    """What measurements of the plan would be filed under, which is the request as asked where nothing fits."""
    if not decision.placement.fits and policy != "anyway":
        decision = _decide(request, setting, frozenset(LOSSY_FIELDS))
    gpu, choice = setting.gpu, decision.choice
    assert gpu is not None
    return kind_of(
        gpu,
        setting.machine,
        _settled(request, choice, setting),
        decision.placement.levers,
    )


def _decide(request: Request, setting: PlanContext, pinned: frozenset[str]) -> Decision:
    """The first choice that fits and is not slow; else the first that fits; else the one that is short by the least."""
    slow: Decision | None = None
    closest: tuple[int, Decision] | None = None
    for choice in candidates(request, setting.machine, setting.inventory, setting.total_bytes, pinned):
        decision = Decision(choice, placement_of(request, choice, setting))
        if not decision.placement.fits:
            short = decision.placement.short(setting.room)
            closest = (short, decision) if closest is None or short < closest[0] else closest
        elif decision.placement.seconds <= SLOW * unlimited(request, choice, setting).seconds:
            return decision
        else:
            slow = slow or decision
    if slow is not None:
        return slow
    assert closest is not None
    return closest[1]


def _settled(request: Request, choice: Candidate, setting: PlanContext) -> Request:
    attention = settled_attention(request, choice, setting)
    return request.model_copy(update={**choice.fields(), "attention": attention})


def _changes(request: Request, settled: Request) -> tuple[Change, ...]:
    """Fields that differ; a field that "auto" settled is no loss."""
    pairs = ((field, getattr(request, field), getattr(settled, field)) for field in CHANGED_FIELDS)
    return tuple(
        Change(field=field, from_value=before, to_value=after, lossy=before != "auto")
        for field, before, after in pairs
        if before != after
    )


def band_of(peak_bytes: int, budget_bytes: int) -> Band:
    """fits: at most 90 % of the budget; tight: at most all of it; no: more."""
    if peak_bytes > budget_bytes:
        return "no"
    return "fits" if peak_bytes <= FITS_SHARE * budget_bytes else "tight"


def _plan(request: Request, setting: PlanContext, decision: Decision, pinned: frozenset[str]) -> Plan:
    choice, placement = decision
    settled = _settled(request, choice, setting)
    changes = _changes(request, settled)
    return Plan(
        request=settled,
        device="cpu" if setting.gpu is None else f"cuda:{setting.gpu.index}",
        device_name="CPU" if setting.gpu is None else setting.gpu.name,
        levers=placement.levers,
        phases=offload_search.phases(placement),
        peak_bytes=placement.peak,
        budget_bytes=setting.room.device,
        band=band_of(placement.peak, setting.room.device) if placement.fits else "no",
        changes=changes,
        alternatives=alternatives(request, setting, choice, placement, pinned),
        reasons=explain.reasons(request, setting, choice, placement, changes),
    )


def _refusal(request: Request, setting: PlanContext, decision: Decision, pinned: frozenset[str]) -> Refusal:
    """The exact shortfall of the smallest allowed choice, and the cheapest pin whose release makes something fit."""
    worst = max(decision.placement.needs, key=setting.room.short)
    short = decision.placement.short(setting.room)
    on_host = setting.room.host is not None and worst.host - setting.room.host >= short
    need, have = (worst.host, setting.room.host or 0) if on_host else (worst.peak, setting.room.device)
    field, instead = _release(request, setting, pinned)
    memory = "host memory" if on_host else "memory of the device"
    all_pinned = frozenset(LOSSY_FIELDS)
    return Refusal(
        f"{worst.name} needs {gib(need)} of {memory}, {gib(short)} more than there is",
        code="does_not_fit_host" if on_host else "does_not_fit",
        field=field,
        try_instead=instead,
        plan=_plan(request, setting, _decide(request, setting, all_pinned), all_pinned),
        need_bytes=need,
        have_bytes=have,
    )


def _release(request: Request, setting: PlanContext, pinned: frozenset[str]) -> tuple[str, str]:
    """(field, advice): the first pin in the order of sacrifice whose release helps, else all of them, else none."""
    groups = [frozenset({"quant_linear"}), frozenset({"num_frames"}), SIZE_PINS, frozenset({"model"})]
    for released in (*groups, frozenset[str]().union(*groups)):
        if not released & pinned:
            continue
        choice, placement = _decide(request, setting, pinned - released)
        if placement.fits:
            names = " and ".join(field for field in LOSSY_FIELDS if field in released & (pinned | {"resolution"}))
            return names, f"release {names}: {describe(choice)} needs {gib(placement.peak)}"
    return "", "free memory, or run on a larger card: nothing on this disk fits"


def describe(choice: Candidate) -> str:
    """ "Wan2.1-1.3B 480p 49 frames int8"."""
    size = choice.resolution if choice.resolution != "custom" else f"{choice.width}x{choice.height}"
    return f"{choice.spec.display_name} {size} {choice.num_frames} frames{' int8' if choice.int8 else ''}"
