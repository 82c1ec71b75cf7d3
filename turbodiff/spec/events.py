"""The two pipes of a worker: events, what it says while it works, and commands, what it is told; JSON lines.

    {"v": 1, "job": 3, "attempt": 1, "type": "step", "t_s": 12.5, "fields": {"i": 1, "n": 4, ...}}

An event is a line of at most 16 KiB. The worker sends it on its own pipe, `--json` prints it, the store keeps it, the
page draws it. In Python each type is a model of its own; its own attributes are the `fields` of the line, and only
those that were given are sent. A field that a newer worker added is kept and passed on.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
)
from pydantic_core import to_json

from turbodiff.spec.clips import ClipResult, Record
from turbodiff.spec.plan import Calibration, Plan
from turbodiff.spec.request import Request

PROTOCOL_VERSION = 1
MAX_LINE_BYTES = 16 * 1024
ENVELOPE = frozenset(("v", "job", "attempt", "type", "t_s"))


class Notice(Record):
    """Something changed beside a job: key of the page's wording, an English sentence, and its numbers by name."""

    key: str
    text: str = ""
    numbers: dict[str, int | float | str | None] = Field(default_factory=dict)


class JobError(Record):
    """Why an attempt or a job ended without a clip; see TurbodiffError in spec/errors.py."""

    code: str = ""
    field: str = ""
    what: str = ""
    got: str = ""
    expected: str = ""
    try_instead: str = ""
    exit_code: int = 1


class EventBase(Record):
    """One thing that happened to one attempt of one job; `t_s` is seconds on the worker's monotonic clock.

    Dumped without the envelope, as the `fields` of its line.
    """

    type: str
    job: int = 0
    attempt: int = 0
    t_s: float = Field(default_factory=time.monotonic)

    @model_serializer(mode="wrap")
    def _write_what_was_set(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        given = self.model_fields_set - ENVELOPE
        return {name: value for name, value in write(self).items() if name in given}

    def line(self) -> str:
        """The event as one JSON line without its newline, at most 16 KiB."""
        head = {"v": PROTOCOL_VERSION, "job": self.job, "attempt": self.attempt, "type": self.type, "t_s": self.t_s}
        data = to_json({**head, "fields": self}, inf_nan_mode="null")
        assert len(data) < MAX_LINE_BYTES, f"{self.type} event of {len(data)} bytes"
        return data.decode()


class HelloEvent(EventBase):
    """A worker is ready: its process and where it computes."""

    type: Literal["hello"] = "hello"
    pid: int
    start_time: int = 0  # clock ticks after boot
    device: str = ""
    device_name: str = ""
    arch: str = ""
    torch: str = ""
    cuda: str = ""
    cudnn: int | str = 0


class BeatEvent(EventBase):
    """The worker is alive; once a second, from a thread."""

    type: Literal["beat"] = "beat"
    rss_bytes: int
    held_bytes: int = 0  # of the device, its context included, as torch counts: NVML may not know this process's id


class PlanEvent(EventBase):
    """The plan that really runs, from now on."""

    type: Literal["plan"] = "plan"
    plan: Plan


class PhaseEvent(EventBase):
    """A phase starts, or is done with what it took."""

    type: Literal["phase"] = "phase"
    name: str
    state: Literal["start", "done"]
    seconds: float | None = None
    peak_bytes: int | None = None
    weights_bytes: int | None = None  # of the peak
    reserved_bytes: int | None = None  # by torch's allocator, at most
    nvml_bytes: int | None = None  # most that the driver showed for the worker, context included


class StepEvent(EventBase):
    """Step `i` of `n` (from 1) is done: `t` of the schedule, the network that ran, seconds it took and seconds left."""

    type: Literal["step"] = "step"
    i: int
    n: int
    t: float
    expert: str
    dt_s: float
    eta_s: float


class ProgressEvent(EventBase):
    """Part `i` of about `n` of a phase without steps of the schedule is done: frames that were made."""

    type: Literal["progress"] = "progress"
    i: int
    n: int


class PreviewEvent(EventBase):
    """What the clip looks like after step `i`: a small JPEG, base64."""

    type: Literal["preview"] = "preview"
    i: int
    jpeg: str


class NoticeEvent(EventBase, Notice):
    """A notice about the running job."""

    type: Literal["notice"] = "notice"


class LinkEvent(EventBase):
    """What each of so many cards that share the clip sends a second in an all-to-all among them, measured."""

    type: Literal["link"] = "link"
    cards: int
    bytes_s: float


class WaitEvent(EventBase):
    """The attempt gave up because other programs hold the memory: it goes back to the queue."""

    type: Literal["wait"] = "wait"
    need_bytes: int
    free_bytes: int


class ResultEvent(EventBase, ClipResult):
    """The clip is in the library and verified."""

    type: Literal["result"] = "result"


class ErrorEvent(EventBase, JobError):
    """The attempt failed."""

    type: Literal["error"] = "error"


Event = Annotated[
    HelloEvent
    | BeatEvent
    | PlanEvent
    | PhaseEvent
    | StepEvent
    | ProgressEvent
    | PreviewEvent
    | NoticeEvent
    | LinkEvent
    | WaitEvent
    | ResultEvent
    | ErrorEvent,
    Field(discriminator="type"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def make_event(kind: str, fields: Mapping[str, Any], **envelope: float) -> Event:
    """The event of a type with the fields of its line; `envelope` may hold job, attempt, t_s.

    Raises:
        ValueError: no such type, or a field is missing or of another kind.
    """
    try:
        return _EVENT.validate_python({**fields, **envelope, "type": kind})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors(include_url=False))
        raise ValueError(f"{kind} event not understood: {wrong}") from None


def read_event(line: str | bytes) -> Event:
    """The event of one line; what a newer worker added to the envelope is left out.

    Raises:
        ValueError: not an event line of this protocol.
    """
    try:
        raw = json.loads(line)
    except RecursionError:
        raise ValueError("brackets without end") from None
    if not isinstance(raw, dict) or raw.get("v") != PROTOCOL_VERSION:
        raise ValueError(f"not a version {PROTOCOL_VERSION} event line")
    envelope = {name: raw[name] for name in ("job", "attempt", "t_s") if name in raw}
    fields = raw.get("fields") or {}
    return make_event(str(raw.get("type")), fields if isinstance(fields, dict) else {}, **envelope)


class RunCommand(BaseModel):
    """Run one attempt of one job.

    Args:
        plan: as it was shown; None: the worker plans. After an out-of-memory (`cap_bytes`) it is not used.
        cap_bytes: what the new plan stays below.
        output: a file name of the person's own; None: the library names the clip.
        promised_ram_bytes: of what is free, what jobs of other workers will still take.
        cards: what else may work at this clip: CUDA_VISIBLE_DEVICES for a process each, "" for the CPU.
        measure_link: say what those cards send to each other a second, which nobody has measured here.
        names: what clips, sidecars and plans call files of the request, by their path on the machine that runs it.
        away: the clip is taken home by another machine, which has the library.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    cmd: Literal["run"] = "run"
    job: int = 1
    attempt: int = 1
    request: Request
    plan: Plan | None = None
    cap_bytes: int | None = None
    outputs: Path
    state: Path
    output: Path | None = None
    calibration: Calibration | None = None
    promised_ram_bytes: int = 0
    cards: tuple[str, ...] = ()
    measure_link: bool = False
    names: Mapping[str, str] = Field(default_factory=dict)
    away: bool = False

    def moved(self, paths: Mapping[str, str], outputs: Path, state: Path) -> Self:
        """The command for a machine that has the files under these paths, and other folders."""
        plan, names = self.plan and self.plan.with_files(paths), {there: path for path, there in paths.items()}
        own = {"outputs": outputs, "state": state, "names": names, "away": True}
        return self.model_copy(update={"request": self.request.with_files(paths), "plan": plan, **own})

    @property
    def given_plan(self) -> Plan | None:
        """The plan to keep to, None where one is to be made."""
        return self.plan if self.cap_bytes is None else None


class JobCommand(BaseModel):
    """Stop a running job: give it up, or decode what there is."""

    model_config = ConfigDict(frozen=True)
    cmd: Literal["cancel", "stop_and_decode"]
    job: int


class ExitCommand(BaseModel):
    """End the worker."""

    model_config = ConfigDict(frozen=True)
    cmd: Literal["exit"] = "exit"


Command = Annotated[RunCommand | JobCommand | ExitCommand, Field(discriminator="cmd")]
_COMMAND: TypeAdapter[Command] = TypeAdapter(Command)


def read_command(fields: Mapping[str, Any]) -> Command:
    """The command of a line. Raises ValueError: it is none."""
    return _COMMAND.validate_python(fields)
