"""Jobs on the stage: the progress of the running one, and the queue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turbodiff.spec.events import Event, NoticeEvent, PhaseEvent
from turbodiff.spec.jobs import ACTIVE, STOPPED, QueuedJob
from turbodiff.spec.request import Request
from webui.markup import Html, action, el, note, void
from webui.panels.meter import when
from webui.panels.stage import model_name, size_name
from webui.wording import Words

if TYPE_CHECKING:
    from webui.snapshot import Snapshot

USUAL_PHASES = ("text_encode", "denoise", "vae_decode", "write")
NOTICES = 2  # the newest of a running job
STOPPED_ROWS = 3  # of the queue
STATE_PILLS = {"running": "accent", "verifying": "accent", "failed": "bad", "parked": "warn"}
CHIP_PILLS = {"done": "td-pill good", "now": "td-pill now", "waiting": "td-pill"}


@dataclass(frozen=True)
class Chip:
    """One phase: waiting, now or done, with its seconds once done."""

    name: str
    state: str
    note: str = ""


@dataclass(frozen=True)
class JobProgress:
    """The running job."""

    job: int
    title: str
    prompt: str
    chips: tuple[Chip, ...]
    line: str
    eta: str
    share: float
    can_decode: bool
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of the queue; `acts` are the names of its buttons."""

    job: int
    title: str
    state: str
    note: str
    acts: tuple[str, ...]
    starts: str = ""  # when and where it will, of a job that waits; where, of one that runs
    before: int = 0  # the job that it goes on from and that will make no clip, see `lost_segment`


def title(request: Request, words: Words) -> str:
    """A job in one line: model, size, frames."""
    return " · ".join((model_name(request), size_name(request), words("unit.frames", n=request.num_frames)))


def progress(job: QueuedJob, events: Iterable[Event], words: Words, card: str = "") -> JobProgress:
    """The running job from its row and its events (spec/events.py) so far; events of earlier attempts are left out.

    `card`: its name where there are several.
    """
    events = [event for event in events if event.attempt == job.attempt]
    seen = {event.name: event for event in events if isinstance(event, PhaseEvent)}
    now = job.progress
    phase, step, of = (now.phase, now.step, now.of) if now else ("", 0, 0)
    planned = [phase.name for phase in job.plan.phases] if job.plan else list(USUAL_PHASES)
    chips = []
    for name in (*planned, *(name for name in seen if name not in planned)):
        label, event = words.or_else(f"phase.{name}", name), seen.get(name)
        if event and event.state == "done":
            chips.append(Chip(label, "done", words.seconds(event.seconds) if event.seconds is not None else ""))
        else:
            chips.append(Chip(label, "now" if name == phase or event else "waiting"))
    done = sum(chip.state == "done" for chip in chips)
    inside = step / of if of and any(chip.state == "now" for chip in chips) else 0.3
    if job.state == "verifying":
        line = words("run.verifying")
    elif not phase:
        line = words("run.starting")
    else:
        line = words.or_else(f"phase.{phase}", phase)
        line = words("run.step", phase=line, i=step, n=of) if step and of else line
    again = []
    if job.attempt > 1:
        causes = [words.or_else(f"run.strike_{strike}", strike) for strike, count in job.strikes.items() if count]
        again = [words("run.again", n=job.attempt, why=", ".join(causes) or words("run.strike_unknown"))]
    return JobProgress(
        job=job.id,
        title=" · ".join(filter(None, (title(job.request, words), card))),
        prompt=job.request.prompt,
        chips=tuple(chips),
        line=line,
        eta=words("run.eta", time=words.predicted(now.eta_s)) if now and now.eta_s is not None else "",
        share=min(0.99, (done + inside) / len(chips)) if chips else 0.0,
        can_decode=phase.startswith("denoise") and step > 0,
        notices=(*again, *[words.notice(event) for event in events if isinstance(event, NoticeEvent)][-NOTICES:]),
    )


def queue(snapshot: Snapshot, words: Words) -> list[Row]:
    """Every job that is not done: running, then waiting in order, then what failed lately; [] if one just runs."""
    found: list[tuple[QueuedJob, tuple[str, ...], int]]
    found = [(job, ("cancel",), 0) for job in snapshot.jobs if job.state in ACTIVE]
    last = len(snapshot.waiting) - 1
    for place, job in enumerate(snapshot.waiting):
        lost, release = lost_segment(job, snapshot), ("any_card",) if blocked(job, snapshot, words) else ()
        moves = (*(("top", "up") if place else ()), *(("down",) if place < last else ()), "edit_job", "duplicate")
        found.append((job, ("retry_before", "drop") if lost else (*release, *moves, "cancel"), lost))
    stopped = [job for job in snapshot.jobs if job.state in STOPPED]
    found += [(job, ("show", "retry"), 0) for job in stopped[:STOPPED_ROWS]]
    if len(found) == 1 and found[0][0].state in ACTIVE:
        return []
    return [
        Row(
            job.id,
            title(job.request, words),
            job.state,
            words("storyboard.lost", job=lost) if lost else why_it_waits(job, snapshot, words) or job.request.prompt,
            acts,
            starts_in(job, snapshot, words) if job.state == "queued" else runs_on(job, snapshot, words),
            lost,
        )
        for job, acts, lost in found
    ]


def lost_segment(job: QueuedJob, snapshot: Snapshot) -> int:
    """The job whose clip a waiting one goes on from, its newest attempt to be run again, where none of these will make
    a clip unless a person asks for it; 0 where one will, or made it."""
    if job.state != "queued" or not job.request.after:
        return 0
    family: dict[int, QueuedJob] = {}
    for other in reversed(snapshot.jobs):  # the oldest first
        if other.nonce == job.request.after or other.parent in family:
            family[other.id] = other
    hopeless = family and all(other.state in ("failed", "cancelled", "parked") for other in family.values())
    return max(family) if hopeless else 0


def starts_in(job: QueuedJob, snapshot: Snapshot, words: Words) -> str:
    """When a waiting job will start, and on which of several cards, as the supervisor dispatches; "" where that is not
    known, or nothing starts."""
    start = snapshot.fleet.starts().get(job.id) if snapshot.fleet and not snapshot.paused else None
    return when(start.start_s, _named(start.slots, snapshot), words) if start else ""


def _named(slots: Sequence[int], snapshot: Snapshot) -> str:
    """The names of the cards of slots, "" where there is one alone."""
    fleet = snapshot.fleet
    return fleet.named(slots) if fleet and len(fleet.cards) > 1 else ""


def cards_of(job: QueuedJob, snapshot: Snapshot) -> str:
    """The names of the cards that a job runs on, "" where there is one alone."""
    uuids = [share.uuid for share in job.plan.shares if share.uuid] if job.plan else []
    together = " + ".join(map(snapshot.fleet.called, uuids)) if snapshot.fleet else ""
    return together or _named((job.slot,), snapshot)


def runs_on(job: QueuedJob, snapshot: Snapshot, words: Words) -> str:
    """On which of several cards a job runs."""
    card = cards_of(job, snapshot) if job.state in ACTIVE else ""
    return words("run.on_card", card=card) if card else ""


def blocked(job: QueuedJob, snapshot: Snapshot, words: Words) -> str:
    """That a job is for a card that is not there or takes none, and what to try; "" for any other."""
    fleet, gpu = snapshot.fleet, job.request.gpu
    why = fleet.blocked(gpu) if fleet and job.state == "queued" else ""
    return words(f"run.card_{why}", card=fleet.called(gpu)) if fleet and why else ""


def why_it_waits(job: QueuedJob, snapshot: Snapshot, words: Words) -> str:
    """What a job waits for beside its turn: its card, memory, its weights; "" for nothing."""
    return blocked(job, snapshot, words) or waits_for_memory(job, words) or waits_for_weights(job, snapshot, words)


def waits_for_weights(job: QueuedJob, snapshot: Snapshot, words: Words) -> str:
    """That no machine which works for the queue and answers has all weights of a job; "" for any other."""
    if job.state != "queued" or snapshot.cluster is None:
        return ""
    here = {spec.name for spec, missing in snapshot.models if not missing}
    known = here.union(*(node.models for node in snapshot.cluster.nodes))
    return "" if job.request.model in known else words("run.waits_for_weights")


def total(snapshot: Snapshot, words: Words) -> str:
    """How long the queue takes: what is left of the running jobs and the plans of those that wait, shared by the cards;
    "" where nothing waits."""
    waiting, running = snapshot.waiting, [job.progress for job in snapshot.jobs if job.state in ACTIVE]
    known = [job.plan.seconds for job in waiting if job.plan]
    if not waiting:
        return ""
    left_s = sum(progress.eta_s or 0.0 for progress in running if progress)
    fleet = snapshot.fleet  # with those of other machines, without those that take no job
    cards = max(1, sum(card.state == "on" for card in fleet.cards)) if fleet else 1
    time, count = words.predicted((left_s + sum(known)) / cards), max(snapshot.queued, len(waiting))
    return words("run.total" if len(known) == count else "run.total_least", n=count, time=time)


def waits_for_memory(job: QueuedJob, words: Words) -> str:
    """That a job is held until other programs let go of device memory, or until there is the clip that it continues; ""
    for any other."""
    if job.state == "queued" and job.request.after:
        return words("storyboard.waits")
    if job.state != "queued" or not job.hold_bytes:
        return ""
    return words("run.wait_memory", memory=words.gib(job.hold_bytes))


def draw_progress(shown: JobProgress, words: Words) -> Html:
    """The running job: phases, step i of n, time left, stop."""
    chips = [
        el("span", f"{chip.name} {chip.note}".strip(), cls=CHIP_PILLS[chip.state], data_state=chip.state)
        for chip in shown.chips
    ]
    decode = action("stop_and_decode", shown.job, words("run.decode"), title=words("run.decode_tip"))
    ask = words("run.stop_ask")
    stop = action("cancel", shown.job, words("run.stop"), title=words("run.stop_tip"), data_ask=ask)
    buttons = el("div", decode if shown.can_decode else None, stop, cls="td-acts")
    bar = el(
        "div",
        el("span", style=f"width:{shown.share:.1%}"),
        cls="td-prog",
        role="progressbar",
        aria_valuenow=f"{shown.share:.0%}".rstrip("%"),
        aria_valuemin="0",
        aria_valuemax="100",
        aria_label=shown.line,
    )
    return el(
        "div",
        el("div", el("h3", shown.title), buttons, cls="td-line"),
        el("div", shown.prompt, cls="td-quiet td-two-lines", title=shown.prompt),
        el("div", chips, cls="td-steps"),
        bar,
        el("div", el("span", shown.line), el("span", shown.eta, cls="td-num"), cls="td-line", role="status"),
        [note(sentence) for sentence in shown.notices],
        cls="td-card td-html",
        data_job=shown.job,
    )


def _act(row: Row, act: str, words: Words) -> Html:
    """A button of a row; to stop what runs is asked about, for it keeps nothing of the clip."""
    ask = words("run.stop_ask") if act == "cancel" and row.state in ACTIVE else None
    label, number = words(f"run.{act}", job=row.before), row.before if act == "retry_before" else row.job
    name = {"retry_before": "retry", "drop": "drop_chain"}.get(act, act)
    return action(name, number, label, cls="plain", form=act == "edit_job", data_ask=ask)


def draw_queue(rows: list[Row], paused: bool, held: str, total: str, words: Words) -> Html:
    """The queue with its buttons; nothing at all when there is nothing to say.

    Args:
        held: the time before which nothing starts, as a person reads it; "" for none.
        total: see `total`.
    """
    if not rows and not paused and not held:
        return Html("")
    switch = action("resume", "", words("run.resume"))
    if not paused:
        switch = action("pause", "", words("run.pause"), cls="plain")
    waiting = [row for row in rows if row.state == "queued"]
    clear = action("clear", "", words("run.clear"), cls="plain", data_ask=words("run.clear_ask"))
    head = el(
        "div",
        words("run.queue"),
        el("span", total, cls="td-quiet td-num") if total else None,
        el("span", clear if waiting else None, switch, cls="td-acts"),
        cls="td-sec",
    )
    hold = el(
        "div", words("run.held", time=held), action("hold", "", words("run.hold_end"), cls="plain"),
        cls="td-note td-line", id="held", role="status",
    )  # fmt: skip
    listed = []
    for row in rows:
        parts = (
            el("span", words(f"run.state_{row.state}"), cls=f"td-pill {STATE_PILLS.get(row.state, '')}"),
            el("span", row.note, cls="what", title=f"{row.note} · {row.title}"),
            el("span", row.starts, cls="td-num starts") if row.starts else None,
            el("span", row.title, cls="td-quiet wide"),
            el("span", [_act(row, act, words) for act in row.acts], cls="td-acts"),
        )
        drag = {"draggable": "false"} if row.state == "queued" else {}  # static/queue.js does it by the pointer
        listed.append(el("div", parts, data_job=row.job, data_state=row.state, **drag))
    body = el("div", listed, cls="td-list") if rows else el("p", words("run.queue_empty"), cls="td-quiet")
    return el("div", head, hold if held else None, body, cls="td-html", id="queue-list")


def draw_editing(number: str, words: Words) -> Html:
    """That the form holds a waiting job, and a button that lets go of it."""
    leave = action("fill", '{"edits": ""}', words("run.edit_end"), form=True, cls="plain")
    return el("div", words("run.editing", job=number), leave, cls="td-note td-line", id="editing", role="status")


def draw_night(words: Words) -> Html:
    """A time before which no job starts: apart from the queue, whose redrawing would take away what is being typed."""
    hint, field = words("run.night_time"), "night-time"
    clock = void("input", type="time", id=field, value="23:00", aria_label=hint, title=hint, cls="td-input")
    button = action("hold", "", words("run.hold"), data_from=field)
    said = el("p", words("run.night_info"), cls="td-quiet td-small")
    return el(
        "details", el("summary", words("run.night")), said, el("div", clock, button, cls="td-line"), cls="td-html"
    )
