"""The planner: a request and a machine in, a plan out. Pure: no torch, no disk, no clock, a few milliseconds.

Order: lossless levers, then INT8, frames, resolution, model (plan/candidates.py). A wish may be lowered, a pin never,
and nothing is ever raised. A candidate whose levers make it more than three times slower than the same clip with all
memory in the world is "slow": it yields to the next one that is not, and is shown beside it.
"""

from collections.abc import Collection
from typing import Literal, NamedTuple

from turbodiff.plan import explain, offload_search
from turbodiff.plan.alternatives import alternatives
from turbodiff.plan.calibration import Calibration
from turbodiff.plan.candidates import SIZE_PINS, Candidate, candidates
from turbodiff.plan.hardware import Machine
from turbodiff.plan.offload_search import FITS_SHARE, CandidateCost
from turbodiff.plan.plan_context import PlanContext, placement_of, setting_of, settled_attention, unlimited
from turbodiff.spec.errors import DoesNotFitError
from turbodiff.spec.inventory import Inventory
from turbodiff.spec.numbers import gib
from turbodiff.spec.plan import Band, Change, Plan
from turbodiff.spec.request import Request

Policy = Literal["auto", "ask", "never", "anyway"]

SLOW = 3.0
LOSSY_FIELDS = ("quant_linear", "num_frames", "resolution", "model")  # in the order of sacrifice
CHANGED_FIELDS = ("model", "resolution", "aspect", "width", "height", "num_frames", "quant_linear", "attention")
RETRY_SHARE = 0.9  # of the budget, after an out-of-memory


class Refusal(DoesNotFitError):
    """No plan. `plan` is the request as asked with band "no": what "Run anyway" would run, and what the meter shows."""

    def __init__(self, what: str, *, plan: Plan, need_bytes: int, have_bytes: int, **fields: str) -> None:
        super().__init__(what, got=gib(need_bytes), expected=f"at most {gib(have_bytes)}", **fields)  # type: ignore[arg-type]
        self.plan, self.need_bytes, self.have_bytes = plan, need_bytes, have_bytes


class Decision(NamedTuple):
    """The choice that was taken, with its levers."""

    choice: Candidate
    placement: CandidateCost


def make_plan(
    request: Request,
    machine: Machine,
    inventory: Inventory,
    *,
    policy: Policy = "auto",
    calibration: Calibration | None = None,
    loaded: Collection[str] = (),
    text_cached: bool = False,
    limit_bytes: int | None = None,
) -> Plan:
    """How `request` will run on `machine`.

    Args:
        policy: "auto" and "ask" lower wishes (asking is the page's business), "never" treats every wish as a pin,
            "anyway" lowers nothing that shows and answers with band "no" instead of an error.
        calibration: what measured runs taught (plan/calibration.py).
        loaded: components whose weights are in memory already and need no reading ("dit", "vae", "text_encoder").
        text_cached: the embedding of this prompt is on disk.
        limit_bytes: a budget below what is free.

    Raises:
        Refusal: nothing that the pins allow fits; says by how much, and which pin to release. A DoesNotFitError.
    """
    setting = setting_of(machine, inventory, calibration, frozenset(loaded), text_cached, limit_bytes)
    pinned = request.pinned | (frozenset(LOSSY_FIELDS) if policy in ("never", "anyway") else frozenset())
    decision = _decide(request, setting, pinned)
    if not decision.placement.fits and calibration is not None and calibration.measured < calibration.factor:
        # a run that failed makes plans careful; it never makes one refuse
        calibration = calibration._replace(factor=calibration.measured)
        setting = setting_of(machine, inventory, calibration, frozenset(loaded), text_cached, limit_bytes)
        decision = _decide(request, setting, pinned)
    if not decision.placement.fits and policy != "anyway":
        raise _refusal(request, setting, decision, pinned)
    return _plan(request, setting, decision, pinned)


def one_rung_lower(plan: Plan, machine: Machine, inventory: Inventory) -> Plan:
    """The next attempt after an out-of-memory: less than the plan that failed, and at most 90 % of its budget.

    Raises:
        DoesNotFitError: the plan that failed was the smallest.
    """
    limit = min(int(RETRY_SHARE * plan.budget_bytes), plan.peak_bytes - 1)
    return make_plan(plan.request, machine, inventory, limit_bytes=limit)


def at_launch(
    plan: Plan,
    machine: Machine,
    inventory: Inventory,
    loaded: Collection[str] = (),
    calibration: Calibration | None = None,
) -> Plan | int:
    """The same clip with levers for what is free now; or the bytes that must become free before it can start."""
    try:
        return make_plan(plan.request, machine, inventory, policy="never", loaded=loaded, calibration=calibration)
    except DoesNotFitError:
        small = make_plan(plan.request, machine, inventory, policy="anyway", loaded=loaded, calibration=calibration)
        return small.peak_bytes


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
