"""The fit meter: what the plan needs against what there is, which phase decides, what changed, and the ways out."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from turbodiff.spec.models import find_model
from turbodiff.spec.plan import Alternative, Change, Plan, Reason
from webui.view import short_model
from webui.wording import Words

GLYPHS = {"fits": "✓", "tight": "≈", "no": "✕"}
PIXELS = ("width", "height")  # said by the resolution


@dataclass(frozen=True)
class PhaseBar:
    """One phase: its peak against the budget."""

    name: str
    size: str
    time: str
    share: float
    binding: bool


@dataclass(frozen=True)
class Diff:
    """One field before and after; `lossy` when the picture changes."""

    label: str
    before: str
    after: str
    lossy: bool
    field: str = ""


@dataclass(frozen=True)
class Candidate:
    """An alternative as a button: its label, what it takes, and the form fields it sets."""

    label: str
    note: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Meter:
    """What the meter shows; `problem` alone when the form is not a legal request yet."""

    band: str = ""
    verdict: str = ""
    numbers: str = ""
    side: str = ""
    share: float = 0.0
    binding: str = ""
    phases: tuple[PhaseBar, ...] = ()
    diffs: tuple[Diff, ...] = ()
    choices: tuple[Candidate, ...] = ()
    why: tuple[str, ...] = ()
    problem: str = ""

    @property
    def urgent(self) -> bool:
        """Whether alternatives belong in the open: something was given up, or it does not fit."""
        return self.band != "fits" or any(row.lossy for row in self.diffs)


@dataclass(frozen=True)
class Button:
    """The Generate button: what it says, and whether a changed plan offers "Run anyway"."""

    label: str
    anyway: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


def meter(plan: Plan, words: Words) -> Meter:
    """The meter of a plan."""
    budget = max(plan.budget_bytes, 1)
    binding = plan.binding_phase
    where = "meter.ram" if plan.device == "cpu" else "meter.vram"
    return Meter(
        band=plan.band,
        verdict=words(f"meter.{plan.band}"),
        numbers=words(
            "meter.numbers", need=words.gib(plan.peak_bytes), budget=words.gib(plan.budget_bytes), kind=words(where)
        ),
        side=words("meter.about", time=words.seconds(plan.seconds)),
        share=min(1.0, plan.peak_bytes / budget),
        binding=words("meter.binding", phase=words(f"phase.{binding.name}")),
        phases=tuple(
            PhaseBar(
                words(f"phase.{phase.name}"),
                words.gib(phase.peak_bytes),
                words.seconds(phase.seconds),
                min(1.0, phase.peak_bytes / budget),
                phase is binding,
            )
            for phase in plan.phases
        ),
        diffs=tuple(diff(change, words) for change in plan.changes if shown(change)),
        choices=tuple(choice(other, words) for other in plan.alternatives[:3]),
        why=tuple(why(reason, words) for reason in plan.reasons),
    )


def why(reason: Reason, words: Words) -> str:
    """A reason of the plan as a sentence, its fields and values named as the form names them."""
    numbers = dict(reason.numbers)
    about = str(numbers.get("field", ""))
    for name in ("from", "to"):
        if about and name in numbers:
            numbers[name] = value_text(about, numbers[name], words)
    if about:
        numbers["field"] = field_label(about, words)
    if numbers.get("model"):
        numbers["model"] = find_model(str(numbers["model"])).display_name
    if numbers.get("expert"):
        numbers["expert"] = words.or_else(f"value.expert_{numbers['expert']}", str(numbers["expert"]))
    if numbers.get("state"):
        numbers["state"] = words.or_else(f"bar.gpu_{numbers['state']}", str(numbers["state"]))
    return words.reason(reason.key, numbers)


def shown(change: Change) -> bool:
    """Whether a change is news to a person: what "auto" settled is not, unless the picture changes."""
    return change.field not in PIXELS and (change.lossy or change.from_value != "auto")


def diff(change: Change, words: Words) -> Diff:
    """A change as before and after."""
    return Diff(
        field_label(change.field, words),
        value_text(change.field, change.from_value, words),
        value_text(change.field, change.to_value, words),
        change.lossy,
        change.field,
    )


def choice(other: Alternative, words: Words) -> Candidate:
    """An alternative as a button."""
    told = [change for change in other.changes if shown(change)]
    label = " · ".join(value_text(change.field, change.to_value, words) for change in told) or words("meter.same")
    note = f"{words.gib(other.peak_bytes)} · {words.seconds(other.seconds)}"
    if other.download_bytes:
        note += " · " + words("meter.download", size=words.gib(other.download_bytes))
    return Candidate(label, note, {change.field: change.to_value for change in told})


def problem(fields: Mapping[str, Any], words: Words, plan: Plan | None = None, instead: Plan | None = None) -> Meter:
    """The meter of a form that is not a legal request, or of one that does not fit.

    Args:
        plan: what was asked, where it does not fit. instead: what would.
    """
    if plan is None:
        return Meter(problem=words.error(fields))
    shown = meter(plan, words)
    if instead is not None:
        seconds, peak = instead.seconds, instead.peak_bytes
        lower = Alternative(changes=instead.changes, peak_bytes=peak, seconds=seconds, fits=True)
        shown = replace(shown, choices=tuple(choice(other, words) for other in (lower, *instead.alternatives[:2])))
    return replace(shown, problem=words.error(fields))


def lowered(plan: Plan, words: Words) -> tuple[Diff, ...]:
    """What a person would see of the changes, for the question before a run."""
    return tuple(diff(change, words) for change in plan.changes if change.lossy and shown(change))


def experts(plan: Plan | None) -> str:
    """Which expert runs which step, as "HHLL"; "" without a plan or without two experts."""
    for reason in plan.reasons if plan else ():
        if reason.key == "experts_by_step":
            return str(reason.numbers["experts"])
        if reason.key == "one_expert_runs":
            return {"high": "H", "low": "L"}[reason.numbers["expert"]] * int(reason.numbers["steps"])
    return ""


def residency(plan: Plan, words: Words) -> str:
    """Where weights lie while the clip is made: the levers of the plan that change no pixel, in one line."""
    levers, blocks = plan.levers, plan.request.spec.dit.num_layers
    if levers.experts == "streamed":
        network = words("residency.experts_streamed", resident=levers.blocks_resident, blocks=blocks)
    else:
        network = words(f"residency.experts_{levers.experts}")
    text = words(f"residency.text_{levers.text}")
    return words("residency.line", text=text, network=network, vae=words(f"residency.vae_{levers.vae}"))


def button(plan: Plan | None, words: Words) -> Button:
    """What the Generate button says: the plan as it will run, not as it was asked."""
    if plan is None:
        return Button(words("create.go"))
    request = plan.request
    label = words(
        "create.go_what",
        model=short_model(find_model(request.model).display_name),
        size=request.resolution if request.resolution != "custom" else f"{request.width}x{request.height}",
        frames=request.num_frames,
    )
    lowered = {change.field: change.from_value for change in plan.changes if change.lossy and shown(change)}
    if lowered or plan.band == "no":
        return Button(label, words("create.anyway"), lowered)
    return Button(label)


def field_label(name: str, words: Words) -> str:
    """A request field as the form labels it."""
    return words.or_else(f"field.{name}", name)


def value_text(name: str, value: Any, words: Words) -> str:
    """A field's value as a person says it."""
    if name == "model":
        return short_model(find_model(str(value)).display_name)
    if name == "num_frames":
        return words("unit.frames", n=value)
    if name == "steps":
        return words("meter.steps", n=value)
    if isinstance(value, str):
        return words.or_else(f"value.{name}_{value}", value)
    return f"{value:g}" if isinstance(value, float) else str(value)
