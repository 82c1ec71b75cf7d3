"""What an ended attempt means for its job: pure rules, the fault table as code (numbers: tests/README.md).

Every way to end has a strike of its own, so that somebody's `kill -9` never uses up the patience that a crashing job
deserves. What a person did (restart, stop of the app) and a power cut charge nothing.
"""

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from turbodiff.jobs.store import Job, State
from turbodiff.spec.numbers import gib
from turbodiff.spec.request import PLAINER_ATTENTION

Strike = Literal["crash", "killed", "oom", "neighbour", "host_ram", "stuck", "nan", "verify", "device"]

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
}
OOM_SHRINK = 0.9  # the next budget, as a share of the one that was too much
NEIGHBOUR_BYTES = 256 << 20  # growth of others that explains an out-of-memory

OUTPUT_CODES = {"disk_full", "output_unwritable", "output_exists", "ffmpeg_missing"}


@dataclass(frozen=True)
class Ending:
    """How an attempt ended without a clip.

    Args:
        kind: error (the worker said so), died, stuck, unverified (the clip is not sound), wait, stopped (by a person).
        error: fields of the error event, or what the supervisor has to say.
        exit_status: of the worker that died, negative for a signal.
        host_oom: the kernel ended it for want of RAM.
        others_grew_bytes: device memory that other programs took during the attempt.
        begun: whether the worker said anything about the attempt; if not, its end is not the job's doing.
    """

    kind: Literal["error", "died", "stuck", "unverified", "wait", "stopped"]
    error: Mapping[str, Any] = field(default_factory=dict)
    exit_status: int | None = None
    host_oom: bool = False
    others_grew_bytes: int = 0
    reason: str = ""
    begun: bool = True


@dataclass(frozen=True)
class Decision:
    """Where the job goes now. `columns` are set with the move; `say` is the line for both logs."""

    to: State
    say: str
    columns: dict[str, Any] = field(default_factory=dict)
    end_worker: bool = False


def decide(job: Job, ending: Ending) -> Decision:
    """The rules, one per way to end."""
    match ending.kind:
        case "stopped":
            return Decision("queued", f"back to the queue: {ending.reason}")
        case "wait":
            need = int(ending.error["need_bytes"])
            return Decision("queued", f"waits for {gib(need)} of device memory", {"hold_bytes": need})
        case "died":
            return _died(job, ending)
        case "stuck":
            return _again(job, "stuck", "failed", ending.error, end_worker=True)
        case "unverified":
            return _again(job, "verify", "failed", ending.error)
        case "error":
            return _error(job, ending)


def _died(job: Job, ending: Ending) -> Decision:
    error = dict(ending.error)
    if job.ask == "cancel":
        return Decision("cancelled", "cancelled; the worker ended")
    if ending.host_oom:
        error |= {
            "code": "host_ram",
            "what": "OOM: the computer ran out of RAM and the kernel ended the worker",
            "try_instead": "close other programs, or a smaller model",
        }
        return _again(job, "host_ram", "parked", error)
    if ending.exit_status in (-signal.SIGKILL, -signal.SIGTERM) or not ending.begun:
        error |= {"code": "worker_killed", "what": "the worker was ended from outside, again and again"}
        return _again(job, "killed", "failed", error)
    error |= {
        "code": "worker_crashed",
        "what": "this job crashes the worker",
        "try_instead": "another attention or model; turbodiff support-bundle collects what is needed for a report",
    }
    return _again(job, "crash", "failed", error)


def _error(job: Job, ending: Ending) -> Decision:
    error = ending.error
    code, text = str(error.get("code", "")), str(error.get("what", ""))
    exit_code = int(error.get("exit_code", 1))
    if exit_code == 130:
        return Decision("cancelled", "cancelled", {"error": dict(error)})
    if code == "oom":
        return _out_of_memory(job, ending)
    if exit_code == 5:
        return Decision("parked", _words(error), {"error": dict(error)})
    if code == "nan_latents":
        return _not_a_number(job, error)
    if code in OUTPUT_CODES or error.get("field") in ("output", "outputs"):
        return Decision("parked", _words(error), {"error": dict(error)})
    if code.startswith("clip_"):
        return _again(job, "verify", "failed", error)
    if code == "cuda_error" or "CUDA error" in text:
        return _again(job, "device", "failed", error, end_worker=True)
    return Decision("failed", _words(error), {"error": dict(error)})


def _out_of_memory(job: Job, ending: Ending) -> Decision:
    plan = job.plan or {}
    if ending.others_grew_bytes > NEIGHBOUR_BYTES:
        hold = {"hold_bytes": plan.get("peak_bytes")}
        grew = f"another program took {gib(ending.others_grew_bytes)} meanwhile"
        return _again(job, "neighbour", "parked", ending.error, hold, grew, end_worker=True)
    lower = {"cap_bytes": next_cap(job.plan, job.cap_bytes), "plan": None}
    return _again(job, "oom", "parked", ending.error, lower, "one rung lower", end_worker=True)


def next_cap(plan: Mapping[str, Any] | None, cap_bytes: int | None) -> int | None:
    """What the attempt after an out-of-memory stays below: its plan, and 90 % of its budget and of its cap."""
    caps = [int(OOM_SHRINK * plan["budget_bytes"]), plan["peak_bytes"] - 1] if plan else []
    caps += [int(OOM_SHRINK * cap_bytes)] if cap_bytes else []
    return min(caps, default=None)


def _not_a_number(job: Job, error: Mapping[str, Any]) -> Decision:
    asked = str(job.overrides.get("attention") or _ran_attention(job))
    # NaN with INT8 attention: LightX2V 211, ComfyUI 7020
    if asked not in PLAINER_ATTENTION or "attention" in job.request.get("pinned", ()):
        return Decision("failed", _words(error), {"error": dict(error)})
    plainer = {"attention": PLAINER_ATTENTION[asked]}
    columns = {"overrides": job.overrides | plainer, "plan": None}
    return _again(job, "nan", "failed", error, columns, f"attention {asked} -> {PLAINER_ATTENTION[asked]}")


def _ran_attention(job: Job) -> str:
    request = (job.plan or {}).get("request") or job.request
    return str(request.get("attention", ""))


def _again(
    job: Job,
    strike: Strike,
    final: State,
    error: Mapping[str, Any],
    columns: Mapping[str, Any] | None = None,
    how: str = "",
    end_worker: bool = False,
) -> Decision:
    """Back to the queue while the strike may repeat, else `final` with the error."""
    count = job.strikes.get(strike, 0) + 1
    strikes = {"strikes": job.strikes | {strike: count}}
    if count <= LIMITS[strike]:
        say = f"{_words(error)}; attempt {job.attempt + 1} follows" + (f", {how}" if how else "")
        return Decision("queued", say, {**strikes, **(columns or {})}, end_worker)
    return Decision(final, f"{_words(error)} ({strike} {count} times)", {**strikes, "error": dict(error)}, end_worker)


def _words(error: Mapping[str, Any]) -> str:
    parts = [str(error.get("what") or error.get("code") or "it ended")]
    parts += [f"got {error['got']}"] if error.get("got") else []
    parts += [f"try: {error['try_instead']}"] if error.get("try_instead") else []
    return "; ".join(parts)
