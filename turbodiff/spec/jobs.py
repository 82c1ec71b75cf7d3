"""A job as the store hands it out: what was asked, how far it is, what came of it."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from turbodiff.spec.clips import ClipResult
from turbodiff.spec.events import JobError
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request

State = Literal["queued", "running", "verifying", "done", "failed", "cancelled", "parked"]
Ask = Literal["", "cancel", "stop_and_decode"]
Where = Literal["first", "up", "down", "last"]

ACTIVE: frozenset[State] = frozenset({"running", "verifying"})
STOPPED: frozenset[State] = frozenset({"failed", "parked"})
OVER: frozenset[State] = frozenset({"done", "failed", "cancelled"})


class Progress(BaseModel):
    """How far a running job is: its phase, `step` of `of` (0 of 0 in a phase without steps), seconds left or None."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    phase: str = ""
    step: int = 0
    of: int = 0
    eta_s: float | None = None


class Outcome(BaseModel):
    """What came of a control (restart, stop).

    Of a restart also the memory that came back (None: no card to ask) and the seconds it took. `jobs`: where each job
    that ran is now.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    ok: bool = True
    text: str = ""
    freed_bytes: int | None = None
    seconds: float | None = None
    jobs: dict[int, State] = {}


class Recovered(BaseModel):
    """What the last start had to bring back, in jobs and clips: see supervisor/recovery.py."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    damaged: bool = False
    restored: int = 0
    mended: int = 0
    clips: int = 0
    parked: int = 0
    folder_lost: bool = False  # somebody removed the state folder while the app ran


@dataclass(frozen=True)
class QueuedJob:
    """One row of the queue. Times are Unix seconds and for people only; `strikes` counts how attempts ended."""

    id: int
    nonce: str
    client: str
    state: State
    place: float
    attempt: int
    slot: int
    request: Request
    plan: Plan | None  # also None for a row that another version wrote
    overrides: dict[str, str]  # request fields that a retry changed, say {"attention": "sla"}
    strikes: dict[str, int]  # {"crash": 1, "oom": 1, ...}
    cap_bytes: int | None  # the next plan must stay below this: the last one ran out of memory
    hold_bytes: int | None  # waits until this much device memory is free
    ask: Ask
    progress: Progress | None
    error: JobError | None
    result: ClipResult | None
    parent: int | None
    created_s: float
    started_s: float | None
    ended_s: float | None
    overtaken: int = 0  # how many later jobs started on a card that it could have used
    user: str = ""  # whose it is, "" for whoever has no name
    expires_s: float | None = None  # what still waits then ends

    @property
    def over(self) -> bool:
        """Done, failed or cancelled: this row never changes again."""
        return self.state in OVER

    @property
    def planned_request(self) -> Request:
        """The request as it was planned, else as it was asked."""
        return self.plan.request if self.plan else self.request
