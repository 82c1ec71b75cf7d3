"""First aid: the card of a job that failed, and on every tab the guide's three steps behind a button of the status bar:
restart, who holds the memory, retry smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from turbodiff.spec.jobs import STOPPED, QueuedJob
from turbodiff.spec.models import find_model
from webui.app import RUN_LOG
from webui.markup import Html, action, el, join, local
from webui.panels.jobs import title
from webui.panels.status_bar import RESTART
from webui.panels.system import draw_holders, draw_host_line, host_line, largest_holders
from webui.wording import Words

if TYPE_CHECKING:
    from webui.snapshot import Snapshot

FIRST_AID_STEPS = 2  # offered for speed; steps never change memory
NEWEST_JOBS = 20  # among which a failed one is looked for
MEMORY_CODES = ("oom", "does_not_fit", "host_ram")
SYSTEM_TAB, LOG_TAB = 3, 4  # their places among the tabs of page.py


@dataclass(frozen=True)
class Failure:
    """A failed job: what happened, what to do, and the settings that retry it smaller."""

    job: int
    title: str
    what: str
    advice: str
    memory: bool
    smaller: Mapping[str, object] = field(default_factory=dict)


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
        smaller=smaller(job.request.model, job.request.num_frames),
    )


def smaller(model: str, num_frames: int) -> dict[str, object]:
    """The guide's emergency setting: 1.3B, 480p, 49 frames (and 2 steps for speed); I2V has no smaller model."""
    spec = find_model(model)
    if spec.bundled:
        return {"num_frames": 9, "steps": FIRST_AID_STEPS}
    change = {"resolution": "480p", "num_frames": min(49, num_frames), "steps": FIRST_AID_STEPS, "quant_linear": "on"}
    return change if spec.kind == "i2v" else {"model": "wan2.1-1.3b", **change}


def draw(snapshot: Snapshot, restarted: str, words: Words) -> Html:
    """The three steps, the third for the newest job that memory stopped; `restarted`: what the last restart did."""
    stopped = (failure(job, words) for job in snapshot.jobs[:NEWEST_JOBS] if job.state in STOPPED)
    failed = next((found for found in stopped if found.memory), None)
    came_back = el("span", restarted, cls="td-pill good", role="status") if restarted else None
    close = local("aid", "", words("bar.close"), cls="plain")
    head = el("div", el("h3", words("bar.firstaid")), close, cls="td-line")
    steps = _steps(snapshot, failed, words, came_back, host=True)
    return el("div", head, steps, cls="td-card td-html", role="region", aria_label=words("bar.firstaid"))


def draw_failure(shown: Failure, snapshot: Snapshot, words: Words) -> Html:
    """A failed job: what happened and the three ways out, folded away where memory was not the cause."""
    steps = _steps(snapshot, shown, words, to_system=local("tab", SYSTEM_TAB, words("run.show")))
    retry = action("retry", shown.job, words("run.retry"), cls="" if shown.memory else "main")
    told = action("log", RUN_LOG, words("run.read_log", name=RUN_LOG), cls="plain", data_tab=LOG_TAB)
    return el(
        "div",
        el("h3", shown.title),
        el("div", shown.what, cls="td-note bad", role="alert"),
        el("p", shown.advice, cls="td-quiet", style="margin:0"),
        steps if shown.memory else el("details", el("summary", words("bar.firstaid")), steps),
        el("div", retry, told, cls="td-acts"),
        cls="td-card failed td-html",
        data_job=shown.job,
    )


def _steps(
    snapshot: Snapshot,
    failed: Failure | None,
    words: Words,
    came_back: Html | None = None,
    to_system: Html | None = None,
    host: bool = False,
) -> Html:
    """Restart, who holds the memory (with `host` the command where that is unknown), retry `failed` smaller."""
    restart = action("restart", "", RESTART, title=words("bar.restart_tip"))
    less, smaller = "text", action("smaller", "", words("run.aid_3_fill"), form=True)
    if failed:
        less = "text" if "model" in failed.smaller else "i2v" if "resolution" in failed.smaller else "demo"
        smaller = action("retry_smaller", failed.job, words("run.aid_3_button"), cls="main")
    steps = []
    for key, text, button in (("1", "text", join(came_back, restart)), ("2", "text", to_system), ("3", less, smaller)):
        told = el("div", el("b", words(f"run.aid_{key}")), el("div", words(f"run.aid_{key}_{text}"), cls="td-quiet"))
        steps.append(el("div", told, button, cls="td-line td-step"))
    holders = largest_holders(snapshot, words)
    host_command = draw_host_line(host_line(snapshot), bool(holders), words) if host else None
    return join(steps[:2], draw_holders(holders, words), host_command, steps[2])
