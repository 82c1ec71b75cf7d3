"""The planner: a request and a machine in, a plan out. Pure: no torch, no disk, no clock, a few milliseconds.

Order: lossless levers, then a text encoder of fewer bits, then INT8, frames, resolution, model (plan/candidates.py). A
wish may be lowered, a pin never, and nothing is ever raised. A candidate whose levers make it more than three times
slower than the same clip in unlimited memory is "slow": it yields to the next one that is not, and is shown beside it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, get_args

from turbodiff.plan import explain
from turbodiff.plan.calibration import History, provenance
from turbodiff.plan.candidates import SIZE_PINS, Candidate, as_wished, network_files
from turbodiff.plan.card_offers import card_offers
from turbodiff.plan.context import PlanContext, plan_context
from turbodiff.plan.hardware import GpuFacts, Machine, sharing_cards
from turbodiff.plan.memory_limits import FITS_SHARE
from turbodiff.plan.offload_search import CandidateCost, attention_for, evaluate, settled
from turbodiff.plan.phase_costs import PhaseCost
from turbodiff.plan.roofline import DISK_BYTES_S
from turbodiff.plan.schedule import scheduled
from turbodiff.plan.shared_clip import asked_ranks, card_shares, follower_bytes
from turbodiff.plan.together import CardGroup, groups_among
from turbodiff.spec.errors import DoesNotFitError
from turbodiff.spec.models import Inventory
from turbodiff.spec.numbers import gib
from turbodiff.spec.plan import Band, Calibration, Levers, Phase, PhaseName, Plan
from turbodiff.spec.request import Request, TextDtype

Policy = Literal["auto", "ask", "never", "anyway"]

SLOW = 3.0
LEAST_WARM = 0.1  # of the seconds: what reading is said to take is a guess
LOSSY_FIELDS = ("text_dtype", "quant_linear", "num_frames", "resolution", "model")  # in the order of sacrifice
SCHEDULE_FIELDS = ("sampler", "steps", "shift", "guidance", "guidance_low", "negative_prompt", "boundary")
SIZE_FIELDS = ("resolution", "aspect", "width", "height", "num_frames")
CHANGED_FIELDS = ("model", *SIZE_FIELDS, "quant_linear", "text_dtype", "attention", *SCHEDULE_FIELDS)
# what nothing of a plan depends on: a batch of prompts and seeds is planned once
OWN = {"prompt": "-", "seed": None, "nonce": "", "image": "", "continues": "", "after": ""}
# what no figure of a plan depends on; a prompt that is being typed needs no new plan
WORDS = {**OWN, "negative_prompt": "", "gpu": ""}

# what each candidate has of its own, or what only chooses among candidates (plan/candidates.py)
NOT_COSTED = {
    "model": "", "resolution": "", "aspect": "", "width": 0, "height": 0, "num_frames": 1, "quant_linear": "auto",
}  # fmt: skip


class Refusal(DoesNotFitError):
    """No plan. `plan` is the request as asked with band "no": what "Run anyway" would run, and what the meter shows."""

    def __init__(
        self, what: str, *, code: str, field: str, try_instead: str, plan: Plan, need_bytes: int, have_bytes: int
    ) -> None:
        got, expected = gib(need_bytes), f"at most {gib(have_bytes)}"
        super().__init__(what, code=code, field=field, got=got, expected=expected, try_instead=try_instead)
        self.plan, self.need_bytes, self.have_bytes = plan, need_bytes, have_bytes


class Shortage(NamedTuple):
    """Somebody else holds the memory that even the smallest way to run a plan needs.

    `need_bytes` must be free on the card, the reserve for others included; `free_bytes` are.
    """

    need_bytes: int
    free_bytes: int


class Decision(NamedTuple):
    """The candidate that was taken, with what it costs where it was looked for."""

    choice: Candidate
    cost: CandidateCost
    context: PlanContext
    pinned: frozenset[str]


class Outlook(NamedTuple):
    """What a plan would say, in short: seconds and steps are those of what would run, lowered wishes included."""

    band: Band
    seconds: float
    steps: int


def plan_request(
    request: Request,
    machine: Machine,
    inventory: Inventory,
    *,
    policy: Policy = "auto",
    history: History | None = None,
    calibration: Calibration | None = None,
    loaded: Collection[str] = (),
    text_cached: bool = False,
    limit_bytes: int | None = None,
    ranks: int | None = None,
) -> Plan:
    """How `request` will run on `machine`: the one way to a plan.

    Args:
        policy: "auto" and "ask" lower wishes (asking is the page's business), "never" treats every wish as a pin,
            "anyway" lowers nothing that shows and answers with band "no" instead of an error.
        history: measured runs; what they teach about this clip on this card is used.
        calibration: what they taught, where it is known already.
        loaded: components whose weights are in memory already and need no reading ("dit", "vae", "text_encoder").
        text_cached: the embedding of this prompt is on disk.
        limit_bytes: a budget below what is free.
        ranks: cards that share the clip, over what the request asks for; the machine may be that of one of them.

    Raises:
        Refusal: nothing that the pins allow fits; says by how much, and which pin to release. A DoesNotFitError.
    """
    ranks = ranks or asked_ranks(request, machine)
    terms = (policy, history, calibration, frozenset(loaded), text_cached, limit_bytes, ranks)
    decision = _decision(request.model_copy(update=WORDS), machine, inventory, *terms)
    if not decision.cost.fits and policy != "anyway":
        raise _refusal(request, decision)
    alike = _plan_alike(request.model_copy(update={**OWN, "gpu": ""}), machine, inventory, *terms)
    own = {name: getattr(request, name) for name in OWN}
    return alike.model_copy(update={"request": alike.request.model_copy(update=own)})


def outlook(
    request: Request, machine: Machine, inventory: Inventory, policy: Policy = "auto", history: History | None = None,
    ranks: int | None = None,
) -> Outlook:  # fmt: skip
    """Band, seconds and steps of `plan_request`, without the reasons and alternatives that most of its time goes to."""
    words = request.model_copy(update=WORDS)
    decision = _decision(words, machine, inventory, policy, history, ranks=ranks or asked_ranks(request, machine))
    seconds = sum(explain.seconds_shown(decision.choice, decision.cost))
    return Outlook(_band(decision), seconds, scheduled(request, decision.choice, decision.context.inventory).steps)


def seconds_on(plan: Plan, gpu: GpuFacts, machine: Machine, inventory: Inventory) -> tuple[float, float] | None:
    """Seconds of a clip on a card by the plan for that card, with its weights still to read and with them in memory;
    None where the card cannot hold it as it was shown."""
    told = outlook(plan.request, machine.model_copy(update={"gpus": (gpu,)}), inventory, policy="never")
    if told.band == "no":
        return None
    read_s = sum([file.bytes for file in network_files(plan.request, inventory)]) / DISK_BYTES_S
    return told.seconds, max(LEAST_WARM * told.seconds, told.seconds - read_s)


def card_groups(plan: Plan, machine: Machine, inventory: Inventory) -> tuple[CardGroup, ...]:
    """The cards of a machine that may make a clip of the queue together; see `groups_among`."""

    def seconds(gpus: Sequence[GpuFacts]) -> float | None:
        here = machine.model_copy(update={"gpus": tuple(gpus)})
        told = outlook(plan.request, here, inventory, policy="never", ranks=len(gpus))
        return None if told.band == "no" else told.seconds

    return groups_among(plan, sharing_cards(machine), seconds)


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
    if not machine.usable_gpus or plan.band == "no":
        return plan
    others = [share.budget_bytes for share in plan.shares[1:]]
    budget_bytes = min([machine.largest_budget_bytes, *others])
    limit_bytes = min(others, default=None)
    again = partial(plan_request, calibration=calibration, ranks=plan.levers.cards, limit_bytes=limit_bytes)
    reserved = max([machine.reserved_bytes(gpu) for gpu in machine.usable_gpus])
    if at == "launch":
        files = inventory()
        try:
            return told_as(plan, again(plan.request, machine, files, policy="never"))
        except Refusal as refusal:
            any_ram = machine.model_copy(update={"ram_available_bytes": None})
            try:
                again(plan.request, any_ram, files, policy="never")
            except Refusal:
                return Shortage(refusal.plan.peak_bytes + reserved, budget_bytes + reserved)
            raise
    if max([phase.peak_bytes for phase in from_phase(plan, at)]) <= budget_bytes:
        return plan
    cached = plan.levers.text == "cached"
    smaller = again(plan.request, machine, inventory(), policy="anyway", text_cached=cached)
    need_bytes = max([phase.peak_bytes for phase in from_phase(smaller, at)])
    if need_bytes > budget_bytes:
        return Shortage(need_bytes + reserved, budget_bytes + reserved)
    return told_as(plan, smaller).model_copy(update={"band": band_of(need_bytes, budget_bytes)})


def with_levers(plan: Plan, levers: Levers, machine: Machine, inventory: Inventory) -> Plan:
    """The same clip, with the phases that it has left, with other levers; told as before."""
    context = plan_context(machine, inventory, text_cached=levers.text == "cached", ranks=levers.cards)
    costs = evaluate(plan.request, as_wished(plan.request, False), context, like=levers).phases
    names = {phase.name for phase in plan.phases}
    phases = tuple([_phase(cost, round(cost.seconds, 3)) for cost in costs if cost.name in names])
    peak_bytes = max([phase.peak_bytes for phase in phases])
    band = plan.band if plan.band == "no" else band_of(peak_bytes, plan.budget_bytes)
    return plan.model_copy(update={"levers": levers, "phases": phases, "peak_bytes": peak_bytes, "band": band})


def from_phase(plan: Plan, name: PhaseName) -> tuple[Phase, ...]:
    """The phases from one on; all of them where the plan does not have it."""
    names = [phase.name for phase in plan.phases]
    return plan.phases[names.index(name) if name in names else 0 :]


def told_as(plan: Plan, fresh: Plan) -> Plan:
    """The fresh plan with what was said about the picture when it was chosen, and the ways out that still fit."""
    said = [reason for reason in plan.reasons if reason.key in explain.OF_THE_PICTURE]
    more = [reason for reason in fresh.reasons if reason.key not in explain.OF_THE_PICTURE]
    others = tuple([other for other in plan.alternatives if other.peak_bytes <= fresh.budget_bytes])
    told: dict[str, object] = {"changes": plan.changes, "alternatives": others, "reasons": (*said, *more)}
    if plan.shares and fresh.levers.cards > 1:  # a process of several sees its own card alone
        own = plan.shares[0].model_copy(update={"peak_bytes": fresh.peak_bytes, "budget_bytes": fresh.budget_bytes})
        rest = [share.model_copy(update={"peak_bytes": follower_bytes(fresh.phases)}) for share in plan.shares[1:]]
        told["shares"] = (own, *rest)
    return fresh.model_copy(update=told)


def band_of(peak_bytes: int, budget_bytes: int) -> Band:
    """fits: at most 90 % of the budget; tight: at most all of it; no: more."""
    if peak_bytes > budget_bytes:
        return "no"
    return "fits" if peak_bytes <= FITS_SHARE * budget_bytes else "tight"


@lru_cache(128)  # a keystroke asks for about 14
def _decision(
    request: Request,
    machine: Machine,
    inventory: Inventory,
    policy: Policy,
    history: History | None,
    calibration: Calibration | None = None,
    loaded: frozenset[str] = frozenset(),
    text_cached: bool = False,
    limit_bytes: int | None = None,
    ranks: int = 1,
) -> Decision:
    """What is taken, remembered with all that was worked out on the way: a keystroke in a prompt changes none of it.

    A run that failed makes plans careful; it never makes one refuse.
    """
    pinned = request.pinned | (frozenset(LOSSY_FIELDS) if policy in ("never", "anyway") else frozenset())
    costed = request.model_copy(update={**NOT_COSTED, "pinned": pinned & {"steps", "text_dtype"}})
    here = (loaded, text_cached, limit_bytes, ranks)
    context = _context(costed, machine, inventory, calibration, *here)
    if history is not None and calibration is None:
        found = history.calibration(provenance(context.gpu, machine))
        if found.lessons:
            calibration, context = found, _context(costed, machine, inventory, found, *here)
    decision = _decide(request, context, pinned)
    failed = calibration is not None and True in [one.measured < one.factor for one in calibration.lessons]
    if not decision.cost.fits and calibration is not None and failed:
        calm = calibration._replace(careful=False)
        decision = _decide(request, _context(costed, machine, inventory, calm, *here), pinned)
    return decision


@lru_cache(32)
def _plan_alike(request: Request, machine: Machine, inventory: Inventory, *terms: Any) -> Plan:
    """The plan of all requests that differ in what is their `OWN`; `terms` are those of `_decision`."""
    return _plan(request, _decision(request.model_copy(update=WORDS), machine, inventory, *terms))


@lru_cache(32)
def _context(
    costed: Request,
    machine: Machine,
    inventory: Inventory,
    calibration: Calibration | None,
    loaded: frozenset[str],
    text_cached: bool,
    limit_bytes: int | None,
    ranks: int,
) -> PlanContext:
    """A `plan_context` for all requests that are `costed` alike: they differ in what a candidate replaces, and what one
    mark of a form has costed the others need not cost again."""
    return plan_context(machine, inventory, calibration, loaded, text_cached, limit_bytes, costed, ranks)


def _decide(request: Request, context: PlanContext, pinned: frozenset[str]) -> Decision:
    """The first choice that fits and is not slow, or a slow one before it that is sooner done all the same; else the
    first that fits; else the one that is short by the least."""
    slow: list[Decision] = []
    closest: Decision | None = None
    for choice in settled(request, context, pinned):
        decision = Decision(choice, evaluate(request, choice, context), context, pinned)
        if not decision.cost.fits:
            closest = decision if closest is None or decision.cost.short < closest.cost.short else closest
        elif decision.cost.seconds <= SLOW * evaluate(request, choice, context, unlimited=True).seconds:
            return next((better for better in slow if better.cost.seconds <= decision.cost.seconds), decision)
        else:
            slow.append(decision)
    taken = slow[0] if slow else closest
    assert taken is not None
    return taken


def _as_run(request: Request, decision: Decision) -> Request:
    """The request as it will run."""
    request = scheduled(request, decision.choice, decision.context.inventory)
    attention = attention_for(request, decision.choice, decision.context)
    dtype: str = decision.cost.levers.text_dtype
    if (dtype, request.text_dtype) == ("bf16", "auto"):
        dtype = "auto"  # nothing that a person would want to know
    return request.model_copy(
        update={**decision.choice.fields(), "attention": attention, "text_dtype": dtype, "gpu": ""}
    )


def _band(decision: Decision) -> Band:
    return band_of(decision.cost.peak_bytes, decision.context.limits.device) if decision.cost.fits else "no"


def _plan(request: Request, decision: Decision) -> Plan:
    choice, cost, context, pinned = decision
    as_run = _as_run(request, decision)
    after = {name: getattr(as_run, name) for name in CHANGED_FIELDS}
    changes = explain.changes_between(request, after, CHANGED_FIELDS)
    offers = tuple(card_offers(request, context, choice, cost))
    return Plan(
        request=as_run,
        device="cpu" if context.gpu is None else f"cuda:{context.gpu.index}",
        device_name="CPU" if context.gpu is None else context.gpu.name,
        levers=cost.levers,
        phases=tuple(map(_phase, cost.phases, explain.seconds_shown(choice, cost))),
        peak_bytes=cost.peak_bytes,
        budget_bytes=max(0, context.limits.device),  # negative where others hold what is left alone for them, too
        band=_band(decision),
        changes=changes,
        alternatives=explain.alternatives(request, context, choice, pinned),
        reasons=explain.reasons(request, as_run, context, choice, cost, changes, offers),
        shares=card_shares(cost.phases, cost.levers.cards, context.cards, context.machine, context.limits.device),
        offers=offers,
    )


def _phase(cost: PhaseCost, seconds: float) -> Phase:
    """A phase as a plan says it, with the seconds that are shown."""
    return Phase(**{**cost._asdict(), "seconds": seconds, "learned_s": round(seconds - cost.seconds, 3)})


def _refusal(request: Request, decision: Decision) -> Refusal:
    """The exact shortfall of the smallest allowed choice, and the cheapest pin whose release makes something fit."""
    cost, context, pinned = decision.cost, decision.context, decision.pinned
    limits = context.limits
    worst = max(cost.phases, key=limits.short)
    on_host = limits.host is not None and limits.in_host(worst) - limits.host >= cost.short
    need, have = (limits.in_host(worst), limits.host or 0) if on_host else (worst.peak_bytes, max(0, limits.device))
    field, instead = "", "free memory, or run on a larger card: nothing on this disk fits"
    pins = [frozenset({"quant_linear"}), frozenset({"num_frames"}), SIZE_PINS, frozenset({"model"})]
    fewer_bits = context
    if context.gpu is not None and context.machine.bitsandbytes:
        pins.insert(0, frozenset({"text_dtype"}))
        fewer_bits = replace(context, text_dtypes=get_args(TextDtype), evaluated={}, text_options={})
    for released in (*pins, frozenset[str]().union(*pins)):
        if not released & pinned:
            continue
        here = fewer_bits if "text_dtype" in released else context
        choice, smaller, _, _ = _decide(request, here, pinned - released)
        if smaller.fits:
            field = " and ".join([name for name in LOSSY_FIELDS if name in released & (pinned | {"resolution"})])
            size = choice.resolution if choice.resolution != "custom" else f"{choice.width}x{choice.height}"
            clip = f"{choice.spec.display_name} {size} {choice.num_frames} frames{' int8' if choice.int8 else ''}"
            way = "release" if released & request.pinned else "lower"  # a policy keeps wishes, too
            instead = f"{way} {field}: {clip} needs {gib(smaller.peak_bytes)}"
            break
    memory = "host memory" if on_host else "memory of the device"
    return Refusal(
        f"{worst.name} needs {gib(need)} of {memory}, {gib(cost.short)} more than there is",
        code="does_not_fit_host" if on_host else "does_not_fit", field=field, try_instead=instead,
        plan=_plan(request, _decide(request, context, frozenset(LOSSY_FIELDS))), need_bytes=need, have_bytes=have,
    )  # fmt: skip
