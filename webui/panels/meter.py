"""The fit meter beside the controls that move it: what the plan needs against what there is, which phase decides, what
changed and the ways out; with it what else the plan says around the form: the button, the experts, where weights lie.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from turbodiff.spec.experts import Expert
from turbodiff.spec.models import display_name_of
from turbodiff.spec.plan import Alternative, Change, Plan
from turbodiff.spec.schedules import SCHEDULE_REASONS, WARNINGS, Schedule
from turbodiff.spec.shapes import SPACE_STRIDE
from webui.form import PINS
from webui.markup import Html, action, el, join, local
from webui.wording import Words

if TYPE_CHECKING:
    from turbodiff.studio import Begin, Fleet

OF_SCHEDULE = frozenset(Schedule._fields)  # said by the schedule's own reason
MEASURED = frozenset(("calibrated", "timed"))  # by runs of such clips
PIXELS = ("width", "height")  # said by the resolution
# boundaries between which 3 and 4 steps are shared out alike (spec/experts.py, rCM schedule)
SAME_FROM, SAME_TO = 0.853, 0.933


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
    fields: Mapping[str, object]


@dataclass(frozen=True)
class Meter:
    """What the meter shows; `problem` alone when the form is not a legal request yet."""

    plan: Plan | None = None
    diffs: tuple[Diff, ...] = ()
    choices: tuple[Candidate, ...] = ()
    why: tuple[str, ...] = ()
    problem: str = ""
    schedule: str = ""  # which sampler and why
    warnings: tuple[str, ...] = ()  # what cannot work with these weights

    @property
    def urgent(self) -> bool:
        """Whether alternatives belong in the open: something was given up, or it does not fit."""
        return self.plan is None or self.plan.band != "fits" or any(row.lossy for row in self.diffs)


@dataclass(frozen=True)
class Button:
    """The Generate button: what it says, and whether a changed plan offers "Run anyway"."""

    label: str
    anyway: str = ""


def meter(plan: Plan, words: Words) -> Meter:
    """The meter of a plan."""
    why, schedule, warnings = [], "", []
    for reason in plan.reasons:  # as sentences, fields and values named as the form names them
        numbers = dict(reason.numbers)
        about = str(numbers.get("field", ""))
        if about:
            numbers |= {name: value_text(about, numbers[name], words) for name in ("from", "to") if name in numbers}
            numbers["field"] = words.or_else(f"field.{about}", about)
        if numbers.get("model"):
            numbers["model"] = display_name_of(str(numbers["model"]))
        for name, key in (("expert", "value.expert"), ("state", "bar.gpu")):
            if numbers.get(name):
                numbers[name] = words.or_else(f"{key}_{numbers[name]}", str(numbers[name]))
        said = words.reason(reason.key, numbers)
        if reason.key in WARNINGS:
            warnings.append(said)
        schedule = said if reason.key in SCHEDULE_REASONS else schedule
        why.append(said)
    choices = tuple(_candidate(other, words) for other in plan.alternatives[:3])
    return Meter(plan, diffs(plan.changes, words), choices, tuple(why), schedule=schedule, warnings=tuple(warnings))


def problem(fields: Mapping[str, object], words: Words, plan: Plan | None = None, instead: Plan | None = None) -> Meter:
    """The meter of a form that is not a legal request, or of one that does not fit.

    Args:
        fields: of the error. plan: what was asked, where it does not fit. instead: what would.
    """
    if plan is None:
        return Meter(problem=words.error(fields))
    shown = meter(plan, words)
    if instead is not None:
        seconds, peak = instead.seconds, instead.peak_bytes
        lower = Alternative(changes=instead.changes, peak_bytes=peak, seconds=seconds, fits=True)
        shown = replace(shown, choices=tuple(_candidate(way, words) for way in (lower, *instead.alternatives[:2])))
    return replace(shown, problem=words.error(fields))


def _is_news(change: Change) -> bool:
    """Whether a change is news to a person: what "auto" settled is not, unless the picture changes."""
    if change.field in OF_SCHEDULE and not change.lossy:
        return False
    return change.field not in PIXELS and (change.lossy or change.from_value != "auto")


def diffs(changes: Iterable[Change], words: Words, lossy_only: bool = False) -> tuple[Diff, ...]:
    """Changes that a person wants to know, as before and after; `lossy_only`: those that change the picture."""
    told = [change for change in changes if _is_news(change) and (change.lossy or not lossy_only)]
    return tuple(diff(change, words) for change in told)


def diff(change: Change, words: Words) -> Diff:
    """A change as before and after."""
    before, after = (value_text(change.field, value, words) for value in (change.from_value, change.to_value))
    return Diff(words.or_else(f"field.{change.field}", change.field), before, after, change.lossy, change.field)


def _candidate(other: Alternative, words: Words) -> Candidate:
    told = [change for change in other.changes if _is_news(change)]
    label = " · ".join(value_text(change.field, change.to_value, words) for change in told) or words("meter.same")
    note = f"{words.gib(other.peak_bytes)} · {words.predicted(other.seconds)}"
    if other.download_bytes:
        note += " · " + words("meter.download", size=words.gib(other.download_bytes))
    return Candidate(label, note, {change.field: change.to_value for change in told})


def button(plan: Plan | None, words: Words, begin: Begin | None = None) -> Button:
    """What the Generate button says: the plan as it will run, not as it was asked, and on which of several cards."""
    if plan is None:
        return Button(words("create.go"))
    request = plan.request
    size = request.resolution if request.resolution != "custom" else f"{request.width}x{request.height}"
    label = words("create.go_what", model=short_model(request.model), size=size, frames=request.num_frames)
    label = " · ".join(filter(None, (label, begin.card if begin else "")))
    lowered = diffs(plan.changes, words, lossy_only=True)
    return Button(label, words("create.anyway") if lowered or plan.band == "no" else "")


def experts(plan: Plan | None) -> str:
    """Which expert runs which step, as "HHLL"; "" without a plan or without two experts."""
    for reason in plan.reasons if plan else ():
        if reason.key == "experts_by_step":
            return str(reason.numbers["experts"])
        if reason.key == "one_expert_runs":
            return Expert(str(reason.numbers["expert"])).letter * int(str(reason.numbers["steps"]))
    return ""


def residency(plan: Plan, words: Words) -> str:
    """Where weights lie while the clip is made: the levers of the plan that change no pixel, and those that do."""
    levers, blocks = plan.levers, plan.request.spec.dit.num_layers
    network = words(f"residency.experts_{levers.experts}", resident=levers.blocks_resident, blocks=blocks)
    if levers.text_keys == "recomputed":
        network = words("residency.text_keys_recomputed", network=network)
    text = words(f"residency.text_{levers.text}")
    vae = words(f"residency.vae_{levers.vae}", pixels=levers.vae_tile * SPACE_STRIDE)
    line = words("residency.line", text=text, network=network, vae=vae)
    if levers.text_dtype != "bf16":
        line += f" {words('residency.text_dtype', dtype=words(f'value.text_dtype_{levers.text_dtype}'))}"
    return line if levers.exchange == "full" else f"{line} {words('residency.exchange_int8')}"


def short_model(name: str) -> str:
    """A model's display name as a button has room for it: Wan2.1-14B is 14B, Wan2.2-T2V-A14B is T2V-A14B."""
    return re.sub(r"^Wan[\d.]+-", "", display_name_of(name))


def value_text(name: str, value: object, words: Words) -> str:
    """A request field's value as a person says it."""
    if name == "model":
        return short_model(str(value))
    if name in ("num_frames", "steps"):
        return words("unit.frames" if name == "num_frames" else "meter.steps", n=value)
    if isinstance(value, str):
        return words.or_else(f"value.{name}_{value}", value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def draw_verdict(shown: Meter, words: Words, begin: Begin | None = None) -> Html:
    """The meter in one line, for the place beside the button that never leaves the screen, with the time that the clip
    takes on the card where it would start, and when; "" without a plan."""
    if shown.plan is None:
        return Html("")
    plan, kind = shown.plan, words("meter.ram" if shown.plan.device == "cpu" else "meter.vram")
    numbers = words("meter.numbers", need=words.gib(plan.peak_bytes), budget=words.gib(plan.budget_bytes), kind=kind)
    time = words("meter.about", time=words.seconds(max(1.0, begin.seconds if begin else plan.seconds)))
    starts = f" · {when(begin.start_s, begin.card, words)}" if begin and (begin.start_s >= 1 or begin.card) else ""
    said = f" · {numbers} · {time}{starts}"
    band = el("b", words(f"meter.{plan.band}"), cls=plan.band)
    return el("div", band, said, cls="td-verdict", data_told=told(plan))


def told(plan: Plan) -> str:
    """What a verdict says of a plan itself, whatever else moves on this machine."""
    return f"{plan.band} {plan.peak_bytes} {plan.seconds:.1f}"


def when(start_s: float, card: str, words: Words) -> str:
    """That a job starts now or in so many seconds, on a card where that is to be said."""
    if start_s < 1:
        return words("run.starts_now_on", card=card) if card else words("run.starts_now")
    time = words.seconds(start_s)
    return words("run.starts_on", time=time, card=card) if card else words("run.starts_in", time=time)


def draw_cards(fleet: Fleet | None, chosen: str, words: Words) -> Html:
    """Which card the clip is for: any, or one of several; also where the chosen one is gone."""
    cards = fleet.cards if fleet else ()
    if len(cards) < 2 and not chosen:
        return Html("")
    offered = {"": words("meter.any_card"), **{card.uuid: card.name for card in cards if card.uuid}}
    if chosen not in offered:
        offered[chosen] = fleet.called(chosen) if fleet else chosen[:12]
    buttons = []
    for uuid, name in offered.items():
        why = fleet.blocked(uuid) if fleet else ""
        label = f"{name} · {words(f'system.card_{why}')}" if why else name
        cls, pressed = ("main", "true") if uuid == chosen else ("plain", "false")
        buttons.append(action("fill", json.dumps({"gpu": uuid}), label, form=True, cls=cls, aria_pressed=pressed))
    head = el("span", words("meter.for_card"), cls="td-quiet")
    return el("div", head, buttons, cls="td-acts td-html", id="for-card", role="group")


def draw_together(plan: Plan | None, chosen: str, words: Words) -> Html:
    """How many cards make the clip: offered where more than one helps, and where somebody chose otherwise."""
    offers = plan.offers if plan else ()
    if not offers and chosen in ("auto", "1"):
        return Html("")
    offered = {"auto": words("meter.together_auto"), "1": words("meter.together_one")}
    for offer in reversed(offers):
        note = words("meter.together_fits" if not offer.clips else "meter.about", time=words.seconds(offer.seconds))
        offered[str(offer.cards)] = words("meter.together", n=offer.cards, note=note)
    if chosen not in offered:
        offered[chosen] = words("meter.together_idle", n=chosen[:4])
    buttons = []
    for value, name in offered.items():
        cls, pressed = ("main", "true") if value == chosen else ("plain", "false")
        fields = json.dumps({"cards": value, **({} if value in ("auto", "1") else {"gpu": ""})})
        buttons.append(action("fill", fields, name, form=True, cls=cls, aria_pressed=pressed))
    head = el("span", words("meter.for_clip"), cls="td-quiet")
    clips = next((offer.clips for offer in offers if offer.clips and chosen in ("auto", str(offer.cards))), 0.0)
    beside = words("meter.side_by_side", clips=f"{clips:g}") if clips > 1 else ""
    side_by_side = el("p", beside, cls="td-quiet td-small") if beside else None
    row = el("div", head, buttons, cls="td-acts", role="group", aria_label=words("meter.for_clip"))
    return el("div", row, side_by_side, cls="td-html", id="for-clip")


def draw(shown: Meter, words: Words, card: str = "") -> Html:
    """The meter as markup; `card`: GiB of the pretended card that it is for, "" for this machine."""
    pretended = None
    if card:
        back = action("card", "", words("meter.card_off"), form=True, cls="plain")
        pretended = el("div", words("meter.card", size=f"{card} GiB"), " ", back, cls="td-note", id="pretended")
    problem = el("div", shown.problem, cls="td-note warn", role="status") if shown.problem else None
    plan = shown.plan
    if plan is None:
        return el("div", pretended, problem, cls="td-html")
    budget, binding = max(plan.budget_bytes, 1), plan.binding_phase
    kind = words("meter.ram" if plan.device == "cpu" else "meter.vram")
    need, have = words.gib(plan.peak_bytes), words.gib(plan.budget_bytes)
    numbers = words("meter.numbers", need=need, budget=have, kind=kind)
    share = el("span", style=f"width:{min(1.0, plan.peak_bytes / budget):.1%}")
    verdict = el("b", words(f"meter.{plan.band}"))
    side = el("span", words("meter.about", time=words.predicted(plan.seconds)), cls="side")
    decides = el("span", words("meter.binding", phase=words(f"phase.{binding.name}")), cls="td-quiet")
    told = {reason.key for reason in plan.reasons}
    basis = "card_measured" if "card_measured" in told else "measured" if told & MEASURED else "predicted"
    changes = []
    for row in shown.diffs:  # each with a lock where it may be kept as it was asked
        lossy = el("span", " · " + words("meter.lossy"), cls="td-quiet") if row.lossy else None
        tip = words("create.pins_info")
        lock = action("pin", row.field, words("meter.lock"), form=True, cls="plain", title=tip)
        changes.append(_before_after(row, lossy, lock if row.lossy and row.field in PINS else None))
    choices = []
    for choice in shown.choices:
        packed, note = json.dumps(choice.fields, ensure_ascii=False), el("span", choice.note, cls="td-num")
        choices.append(action("fill", packed, el("b", choice.label), note, form=True))
    instead = el("span", words("meter.instead"), cls="td-quiet")
    ways_out = el("div", instead, choices, cls="td-alts", id="alternatives") if choices else None
    reasons = el("ul", [el("li", sentence) for sentence in shown.why]) if shown.why else None
    rows = []
    for phase in plan.phases:
        cls, peak = ("binding", "peak") if phase is binding else ("", "")
        bar = el("span", style=f"width:{min(1.0, phase.peak_bytes / budget):.1%}", cls=peak)
        rows += [el("span", words(f"phase.{phase.name}"), cls=cls), el("div", bar, cls="bar")]
        rows.append(el("span", words.gib(phase.peak_bytes), cls=f"td-num {cls}"))
        rows.append(el("span", words.seconds(phase.seconds), cls="td-num td-quiet"))
    phases = el("div", rows, cls="td-phases", aria_label=words("meter.phases"))
    cards = el("div", _cards(plan, words), cls="td-phases", id="each-card") if plan.shares else None
    warned = [el("div", warning, cls="td-note warn", role="status") for warning in shown.warnings]
    return el(
        "div",
        pretended,
        problem,
        warned or None,
        el("div", verdict, el("span", numbers, cls="td-num"), side, cls="head"),
        el("div", share, cls="td-big", role="img", aria_label=numbers),
        cards,
        el("div", decides, el("span", words(f"meter.{basis}"), cls="td-quiet", id="basis"), cls="td-line"),
        el("div", shown.schedule, cls="td-quiet td-small", id="schedule") if shown.schedule else None,
        el("div", el("b", words("meter.changed")), changes, cls="td-diff", id="changes") if changes else None,
        ways_out if shown.urgent else None,
        el("details", el("summary", words("meter.why")), phases, reasons, None if shown.urgent else ways_out),
        cls=f"td-meter td-html {plan.band}",
        data_band=plan.band,
    )


def _cards(plan: Plan, words: Words) -> Iterator[Html]:
    """Each card that makes the clip together with others: what it needs of what it may use."""
    for number, share in enumerate(plan.shares, 1):
        width = min(1.0, share.peak_bytes / max(share.budget_bytes, 1))
        name = words("meter.process", n=number) if share.device == "cpu" else f"{share.device_name} · {share.device}"
        yield el("span", name)
        yield el("div", el("span", style=f"width:{width:.1%}", cls="peak" if number == 1 else ""), cls="bar")
        yield el("span", words.gib(share.peak_bytes), cls="td-num")
        yield el("span", words("meter.of", budget=words.gib(share.budget_bytes)), cls="td-num td-quiet")


def _before_after(row: Diff, *more: object) -> Html:
    return el("div", el("span", f"{row.label}: "), el("del", row.before), " → ", el("ins", row.after), *more)


def draw_question(rows: Iterable[Diff], words: Words) -> Html:
    """The question before a run that was lowered: what changes, and both ways on."""
    yes = local("press", "go", words("settings.ask_yes"), cls="main")
    buttons = el("div", yes, local("press", "anyway", words("create.anyway")), cls="td-acts")
    body = (el("b", words("settings.ask_question")), [_before_after(row) for row in rows], buttons)
    return el("div", body, cls="td-note td-diff td-html", role="alertdialog", id="ask")


def draw_experts(letters: str, boundary: float, words: Words) -> Html:
    """Which expert runs which step ("HHLL", as the plan says), and a word where the low-noise one never does."""
    if not letters:
        return Html("")
    names = {"H": words("create.experts_high"), "L": words("create.experts_low")}
    boxes = [
        el("b", f"{i}{letter}", cls="low" if letter == "L" else "", title=names[letter])
        for i, letter in enumerate(letters, 1)
    ]
    legend = el("span", f"H {names['H']} · L {names['L']}")
    warning, note = None, None
    if "L" not in letters:
        warning = el("div", words("create.experts_one"), cls="td-note warn", style="margin-top:8px")
    if len(letters) in (3, 4) and SAME_FROM < boundary < SAME_TO:
        note = el("p", words("create.experts_same"), cls="td-quiet td-small")
    return join(el("div", boxes, legend, cls="td-experts", data_letters=letters), warning, note)
