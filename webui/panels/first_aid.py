"""First aid: the card of a job that failed, and on every tab the guide's three steps behind a button of the status bar:
restart, who holds the memory, retry smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from turbodiff.spec.jobs import STOPPED, QueuedJob
from turbodiff.spec.models import find_model
from webui.markup import Html, action, el, join, local
from webui.panels.jobs import title
from webui.panels.status_bar import RESTART
from webui.panels.system import HolderRow, draw_holders, draw_host_line, host_line, largest_holders
from webui.wording import Words

if TYPE_CHECKING:
    from webui.snapshot import Snapshot

FIRST_AID_STEPS = 2  # offered for speed; steps never change memory
NEWEST_JOBS = 20  # among which a failed one is looked for
MEMORY_CODES = ("oom", "does_not_fit", "host_ram")
SYSTEM_TAB = 3  # its place among the tabs of page.py


@dataclass(frozen=True)
class Failure:
    """A failed job: what happened, what to do, and the settings that retry it smaller."""

    job: int
    title: str
    what: str
    advice: str
    memory: bool
    smaller: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class FirstAid:
    """What the three steps show; `failed` is the newest job that memory stopped."""

    holders: tuple[HolderRow, ...]
    host_line: str
    failed: Failure | None


def first_aid(snapshot: Snapshot, words: Words) -> FirstAid:
    """The three steps for this snapshot."""
    stopped = (failure(job, words) for job in snapshot.jobs[:NEWEST_JOBS] if job.state in STOPPED)
    failed = next((found for found in stopped if found.memory), None)
    return FirstAid(largest_holders(snapshot, words), host_line(snapshot), failed)


def failure(job: QueuedJob, words: Words) -> Failure:
    """Why a job failed and the three ways out."""
    error, parked = job.error, job.state == "parked"
    code = (error and error.code) or "unexpected"
    memory = code in MEMORY_CODES or parked
    return Failure(
        job=job.id,
        title=words("run.parked" if parked else "run.failed", job=title(job.request, words)),
        what=words.error(error.model_dump()) if error else words("run.no_reason"),
        advice=words.or_else(f"advice.{code}", words("advice.memory") if memory else words("advice.log")),
        memory=memory,
        smaller=smaller(job.request.model, job.request.num_frames) if memory else {},
    )


def smaller(model: str, num_frames: int) -> dict[str, object]:
    """The guide's emergency setting: 1.3B, 480p, 49 frames (and 2 steps for speed); I2V has no smaller model."""
    spec = find_model(model)
    if spec.bundled:
        return {"num_frames": 9, "steps": FIRST_AID_STEPS}
    change = {"resolution": "480p", "num_frames": min(49, num_frames), "steps": FIRST_AID_STEPS, "quant_linear": "on"}
    return change if spec.kind == "i2v" else {"model": "wan2.1-1.3b", **change}


def draw(shown: FirstAid, restarted: str, words: Words) -> Html:
    """The three steps; `restarted` says what the last restart brought back."""
    came_back = el("span", restarted, cls="td-pill good", role="status") if restarted else None
    fill = action("smaller", "", words("run.aid_3_fill"), form=True)
    smaller = _step(words("run.aid_3"), words("run.aid_3_text"), fill)
    steps = (
        _restart_step(words, came_back),
        _step(words("run.aid_2"), words("run.aid_2_text")),
        draw_holders(shown.holders, words),
        None if shown.holders else draw_host_line(shown.host_line, words),
        _smaller_step(shown.failed, words) if shown.failed else smaller,
    )
    close = local("aid", "", words("bar.close"), cls="plain")
    head = el("div", el("h3", words("bar.firstaid")), close, cls="td-line")
    return el("div", head, steps, cls="td-card td-html", role="region", aria_label=words("bar.firstaid"))


def draw_failure(shown: Failure, holders: tuple[HolderRow, ...], words: Words) -> Html:
    """A failed job: what happened and the three ways out; `holders` are those of most memory."""
    to_system = local("tab", SYSTEM_TAB, words("run.show"))
    steps = (
        _restart_step(words),
        _step(words("run.aid_2"), words("run.aid_2_text"), to_system),
        draw_holders(holders, words),
        _smaller_step(shown, words),
    )
    retry = action("retry", shown.job, words("run.retry"), cls="" if shown.memory else "main")
    return el(
        "div",
        el("h3", shown.title),
        el("div", shown.what, cls="td-note bad", role="alert"),
        el("p", shown.advice, cls="td-quiet", style="margin:0"),
        steps if shown.memory else None,
        el("div", retry, cls="td-acts"),
        cls="td-card failed td-html",
        data_job=shown.job,
    )


def _step(head: str, sentence: str, button: object = None) -> Html:
    told = el("div", el("b", head), el("div", sentence, cls="td-quiet"))
    return el("div", told, button, cls="td-line td-step")


def _restart_step(words: Words, came_back: Html | None = None) -> Html:
    button = action("restart", "", RESTART, title=words("bar.restart_tip"))
    return _step(words("run.aid_1"), words("run.aid_1_text"), join(came_back, button))


def _smaller_step(failure: Failure, words: Words) -> Html:
    """The third step for a job that memory stopped: what it changes, and the button."""
    changes = "text" if "model" in failure.smaller else "i2v" if "resolution" in failure.smaller else "demo"
    button = action("retry_smaller", failure.job, words("run.aid_3_button"), cls="main")
    return _step(words("run.aid_3"), words(f"run.aid_3_{changes}"), button)
