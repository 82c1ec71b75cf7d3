"""A job as the page shows it: the progress of the running one, the queue, the failed card with its first aid."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from turbodiff.spec import jobs as spec_jobs
from turbodiff.spec.events import Event, Notice, PhaseEvent
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.models import find_model
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request
from webui.view import ACTIVE, Snapshot, short_model
from webui.wording import Words

USUAL = ("text_encode", "denoise", "vae_decode", "write")
NOTICES = 2  # the newest of a running job
FIRST_AID_STEPS = 2  # offered for speed; steps never change memory


@dataclass(frozen=True)
class Chip:
    """One phase: waiting, now or done, with its seconds once done."""

    name: str
    state: str
    note: str = ""


@dataclass(frozen=True)
class Progress:
    """The running job."""

    job: int
    title: str
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


@dataclass(frozen=True)
class Failure:
    """A failed job: what happened, what to do, and the settings that retry it smaller."""

    job: int
    title: str
    what: str
    advice: str
    memory: bool
    smaller: Mapping[str, Any] = field(default_factory=dict)


def title(request: Request, words: Words) -> str:
    """A job in one line: model, size, frames."""
    fields = request.model_dump(include={"model", "resolution", "width", "height"})
    return f"{model_name(fields)} · {size_name(fields)} · {words('unit.frames', n=request.num_frames)}"


def model_name(request: Mapping[str, Any]) -> str:
    """The display name of a request's model, short."""
    return short_model(find_model(str(request["model"])).display_name) if request.get("model") else "?"


def size_name(request: Mapping[str, Any]) -> str:
    """ "480p", or the pixels of a size of one's own."""
    name = str(request.get("resolution") or "custom")
    return name if name != "custom" else f"{request.get('width')}x{request.get('height')}"


def phase_names(plan: Plan | None, seen: Iterable[str]) -> list[str]:
    """The phases of a job in order: as planned, else the usual ones, and what was seen besides."""
    planned: list[str] = [phase.name for phase in plan.phases] if plan and plan.phases else list(USUAL)
    return planned + [name for name in seen if name not in planned]


def progress(job: QueuedJob, events: Iterable[Event], words: Words) -> Progress:
    """The running job from its row and its events (spec/events.py) so far."""
    events = [event for event in events if event.attempt == job.attempt]
    seen = {event.name: event for event in events if event.type == "phase"}
    now = job.progress or spec_jobs.Progress()
    names = phase_names(job.plan, seen)
    chips = tuple(_chip(name, seen.get(name), now.phase, words) for name in names)
    return Progress(
        job=job.id,
        title=title(job.request, words),
        chips=chips,
        line=_line(job, now, words),
        eta=words("run.eta", time=words.seconds(now.eta_s)) if now.eta_s is not None else "",
        share=_share(chips, now.step, now.of),
        can_decode=now.phase.startswith("denoise") and now.step > 0,
        notices=tuple(notice(event, words) for event in events if event.type == "notice")[-NOTICES:],
    )


def notice(told: Notice, words: Words) -> str:
    """What changed beside a running job, in words; in English the worker's own where there are none."""
    spoken = {name: _spoken(name, value, words) for name, value in told.numbers.items()}
    own = told.text if words.lang == "en" else ""
    return words.or_else(f"notice.{told.key}", own or words("notice.other"), **spoken)


def _spoken(name: str, value: Any, words: Words) -> Any:
    if isinstance(value, str):
        return words.or_else(f"notice.cause_{value}", words.or_else(f"phase.{value}", value))
    if value is None:
        return "?"
    return words.gib(value) if name.endswith("_bytes") else words.seconds(value) if name.endswith("_s") else value


def _chip(name: str, seen: PhaseEvent | None, current: str, words: Words) -> Chip:
    label = words.or_else(f"phase.{name}", name)
    if seen and seen.state == "done":
        return Chip(label, "done", words.seconds(seen.seconds) if seen.seconds is not None else "")
    return Chip(label, "now" if name == current or seen else "waiting")


def _line(job: QueuedJob, now: spec_jobs.Progress, words: Words) -> str:
    if job.state == "verifying":
        return words("run.verifying")
    if not now.phase:
        return words("run.starting")
    phase = words.or_else(f"phase.{now.phase}", now.phase)
    return words("run.step", phase=phase, i=now.step, n=now.of) if now.step and now.of else phase


def waits_for_memory(job: QueuedJob, words: Words) -> str:
    """That a job is held until other programs let go of device memory, "" for any other."""
    if job.state != "queued" or not job.hold_bytes:
        return ""
    return words("run.wait_memory", memory=words.gib(job.hold_bytes))


def _share(chips: tuple[Chip, ...], step: int, of: int) -> float:
    done = sum(chip.state == "done" for chip in chips)
    inside = step / of if of and any(chip.state == "now" for chip in chips) else 0.3
    return min(0.99, (done + inside) / len(chips)) if chips else 0.0


def queue(snapshot: Snapshot, words: Words) -> list[Row]:
    """Every job that is not done: running, then waiting in order, then what failed lately; [] if one just runs."""
    rows = [
        Row(j.id, title(j.request, words), j.state, j.request.prompt, ("cancel",))
        for j in snapshot.jobs
        if j.state in ACTIVE
    ]
    for place, job in enumerate(snapshot.waiting):
        acts = (("top", "up") if place else ()) + ("down", "duplicate", "cancel")
        rows.append(
            Row(job.id, title(job.request, words), "queued", waits_for_memory(job, words) or job.request.prompt, acts)
        )
    for job in [j for j in snapshot.jobs if j.state in ("failed", "parked")][:3]:
        rows.append(Row(job.id, title(job.request, words), job.state, job.request.prompt, ("show", "retry")))
    return [] if len(rows) == 1 and rows[0].state in ACTIVE else rows


def failure(job: QueuedJob, words: Words) -> Failure:
    """Why a job failed and the three ways out."""
    error = job.error
    code = (error and error.code) or "unexpected"
    memory = code in ("oom", "does_not_fit", "host_ram") or job.state == "parked"
    return Failure(
        job=job.id,
        title=words("run.parked" if job.state == "parked" else "run.failed", job=title(job.request, words)),
        what=words.error(error.model_dump()) if error else words("run.no_reason"),
        advice=words.or_else(f"advice.{code}", words("advice.memory") if memory else words("advice.log")),
        memory=memory,
        smaller=smaller(job.request.model, job.request.num_frames) if memory else {},
    )


def smaller(model: str, num_frames: int) -> dict[str, Any]:
    """The guide's emergency setting: 1.3B, 480p, 49 frames (and 2 steps for speed); I2V has no smaller model."""
    spec = find_model(model)
    if spec.bundled:
        return {"num_frames": 9, "steps": FIRST_AID_STEPS}
    frames = min(49, num_frames)
    change: dict[str, Any] = {
        "resolution": "480p",
        "num_frames": frames,
        "steps": FIRST_AID_STEPS,
        "quant_linear": "on",
    }
    return change if spec.kind == "i2v" else {"model": "wan2.1-1.3b", **change}
