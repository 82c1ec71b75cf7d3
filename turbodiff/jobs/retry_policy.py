"""What an ended attempt means for its job: pure rules, the fault table as code (numbers: tests/README.md).

Every way to end has a strike of its own, so that somebody's `kill -9` never uses up the patience that a crashing job
deserves. What a person did (restart, stop of the app) and a power cut charge nothing.
"""

import signal
from dataclasses import dataclass, field
from typing import Literal

from turbodiff.jobs.rows import JobColumns
from turbodiff.spec.attention import PLAINER_ATTENTION
from turbodiff.spec.events import JobError
from turbodiff.spec.jobs import QueuedJob, State
from turbodiff.spec.numbers import gib
from turbodiff.spec.plan import Plan

Strike = Literal["crash", "killed", "oom", "neighbour", "host_ram", "stuck", "nan", "verify", "device", "node", "rank"]

# how often each ending may repeat before the job stops; the ending after that is final
LIMITS: dict[str, int] = {
    "crash": 1,  # two crashes of the worker by one job: it is poison
    "killed": 19,  # SIGKILL or SIGTERM from outside says little about the job
    "oom": 2,  # each retry one rung lower
    "neighbour": 5,  # somebody else took the memory
    "host_ram": 1,
    "stuck": 1,
    "nan": 1,
    "verify": 1,
    "device": 1,
    "node": 5,  # the machine that it ran on was lost
    "rank": 7,  # a card that shared it was lost, each time another one
}
OOM_SHRINK = 0.9  # the next budget, as a share of the one that was too much
NEIGHBOUR_BYTES = 256 << 20  # growth of others that explains an out-of-memory

OUTPUT_CODES = {"disk_full", "output_unwritable", "output_exists", "ffmpeg_missing"}


NO_ERROR = JobError()


@dataclass(frozen=True)
class Ending:
    """How an attempt ended without a clip.

    Args:
        kind: error (the worker said so), died, stuck, unverified (the clip is not sound), wait, stopped (by a person),
            lost (the machine that ran it is gone), fault (the supervisor itself cannot get on with the job).
        error: the worker's error event, or what the supervisor has to say.
        need_bytes: of a `wait`.
        exit_status: of the worker that died, negative for a signal.
        host_oom: the kernel ended it for want of RAM.
        others_grew_bytes: device memory that other programs took during the attempt.
        begun: whether the worker said anything about the attempt; if not, its end is not the job's doing.
        allocation: the line by which a worker that aborted said that an allocation failed, "" where it said none.
    """

    kind: Literal["error", "died", "stuck", "unverified", "wait", "stopped", "lost", "fault"]
    error: JobError = NO_ERROR
    need_bytes: int = 0
    exit_status: int | None = None
    host_oom: bool = False
    others_grew_bytes: int = 0
    reason: str = ""
    begun: bool = True
    allocation: str = ""


@dataclass(frozen=True)
class Decision:
    """Where the job goes now. `columns` are set with the move; `say` is the line for both logs."""

    to: State
    say: str
    columns: JobColumns = field(default_factory=lambda: JobColumns())
    end_worker: bool = False


def decide(job: QueuedJob, ending: Ending) -> Decision:
    """The rules, one per way to end."""
    error = ending.error
    match ending.kind:
        case "stopped":
            return Decision("queued", f"back to the queue: {ending.reason}")
        case "wait":
            need = f"waits for {gib(ending.need_bytes)} of device memory"
            return Decision("queued", need, {"hold_bytes": ending.need_bytes})
        case "fault":
            return Decision("parked", _describe(error), {"error": error}, end_worker=True)
        case "lost":
            what = "the machine that ran it was lost, again and again"
            advice = "turbodiff cluster status; then retry the job"
            return _again(
                job, "node", "parked", JobError(got=error.got, code="node_lost", what=what, try_instead=advice)
            )
        case "stuck":
            return _again(job, "stuck", "failed", error, end_worker=True)
        case "unverified":
            return _again(job, "verify", "failed", error)
        case "error":
            return _after_error(job, error, ending.others_grew_bytes)
        case "died" if job.ask == "cancel":
            return Decision("cancelled", "cancelled; the worker ended")
        case "died" if ending.host_oom:
            what = "OOM: the computer ran out of RAM and the kernel ended the worker"
            advice = "close other programs, or a smaller model"
            ended = JobError(got=error.got, code="host_ram", what=what, try_instead=advice)
            return _again(job, "host_ram", "parked", ended)
        case "died" if ending.exit_status == -signal.SIGABRT and ending.allocation:
            what = "OOM: the worker aborted because an allocation failed"
            advice = "a smaller size, fewer frames, or quant_linear"
            aborted = JobError(got=ending.allocation, code="oom", what=what, try_instead=advice)
            return _after_error(job, aborted, ending.others_grew_bytes)
        case "died" if ending.exit_status in (-signal.SIGKILL, -signal.SIGTERM) or not ending.begun:
            what = "the worker was ended from outside, again and again"
            return _again(job, "killed", "failed", JobError(got=error.got, code="worker_killed", what=what))
        case "died":
            advice = "another attention or model; turbodiff support-bundle collects what is needed for a report"
            what = "this job crashes the worker"
            crashed = JobError(got=error.got, code="worker_crashed", what=what, try_instead=advice)
            return _again(job, "crash", "failed", crashed)


def _after_error(job: QueuedJob, error: JobError, others_grew_bytes: int) -> Decision:
    if error.exit_code == 130:
        return Decision("cancelled", "cancelled", {"error": error})
    if error.code == "oom" and others_grew_bytes > NEIGHBOUR_BYTES:
        hold: JobColumns = {"hold_bytes": job.plan.peak_bytes if job.plan else None}
        grew = f"another program took {gib(others_grew_bytes)} meanwhile"
        return _again(job, "neighbour", "parked", error, hold, grew, end_worker=True)
    if error.code == "oom":
        lower: JobColumns = {"cap_bytes": next_cap(job.plan, job.cap_bytes), "plan": None}
        return _again(job, "oom", "parked", error, lower, "one rung lower", end_worker=True)
    if error.code == "host_ram":  # planned anew for the RAM that there is then
        return _again(job, "host_ram", "parked", error, {"plan": None}, "planned anew", end_worker=True)
    if error.code == "ranks_lost":  # no doing of the job's; the plan says which cards are left
        return _again(job, "rank", "parked", error, how="on the cards that are left", end_worker=True)
    if error.exit_code == 5:
        return Decision("parked", _describe(error), {"error": error})
    if error.code == "nan_latents":  # with INT8 attention: LightX2V 211, ComfyUI 7020
        asked = job.overrides.get("attention") or job.planned_request.attention
        plainer = PLAINER_ATTENTION.get(asked)
        if plainer is None or "attention" in job.request.pinned:
            return Decision("failed", _describe(error), {"error": error})
        columns: JobColumns = {"overrides": job.overrides | {"attention": plainer}, "plan": None}
        return _again(job, "nan", "failed", error, columns, f"attention {asked} -> {plainer}")
    if error.code in OUTPUT_CODES or error.field in ("output", "outputs"):
        return Decision("parked", _describe(error), {"error": error})
    if error.code.startswith("clip_"):
        return _again(job, "verify", "failed", error)
    if error.code == "cuda_error" or "CUDA error" in error.what:
        return _again(job, "device", "failed", error, end_worker=True)
    return Decision("failed", _describe(error), {"error": error})


def next_cap(plan: Plan | None, cap_bytes: int | None) -> int | None:
    """What the attempt after an out-of-memory stays below: its plan, and 90 % of its budget and of its cap."""
    caps = [int(OOM_SHRINK * plan.budget_bytes), plan.peak_bytes - 1] if plan else []
    caps += [int(OOM_SHRINK * cap_bytes)] if cap_bytes else []
    return min(caps, default=None)


def _again(
    job: QueuedJob,
    strike: Strike,
    final: State,
    error: JobError,
    columns: JobColumns | None = None,
    how: str = "",
    end_worker: bool = False,
) -> Decision:
    """Back to the queue while the strike may repeat, else `final` with the error."""
    count = job.strikes.get(strike, 0) + 1
    strikes: JobColumns = {"strikes": job.strikes | {strike: count}}
    if count <= LIMITS[strike]:
        say = f"{_describe(error)}; attempt {job.attempt + 1} follows" + (f", {how}" if how else "")
        return Decision("queued", say, {**strikes, **(columns or {})}, end_worker)
    return Decision(final, f"{_describe(error)} ({strike} {count} times)", {**strikes, "error": error}, end_worker)


def _describe(error: JobError) -> str:
    parts = [error.what or error.code or "it ended"]
    parts += [f"got {error.got}"] if error.got else []
    parts += [f"try: {error.try_instead}"] if error.try_instead else []
    return "; ".join(parts)
