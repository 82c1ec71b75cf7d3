"""What is recorded about a finished clip: the sidecar beside it, and the result that a worker reports.

Both are JSON. `read_record` opens what another version wrote, or a person damaged: a part that is missing, unknown or
mistyped takes its default.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, JsonValue, SerializerFunctionWrapHandler, ValidationError, model_serializer

from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request

SIDECAR_VERSION = 1
MAX_CLIP_NAME_BYTES = 255 - len(".mp4.json")  # a clip's name without its ending; its sidecar's is the longest
CLIP_ID = re.compile(r"(?:\w|%[0-9A-F]{2})(?:[\w.-]|%[0-9A-F]{2}){0,1024}")  # letters of any script

# stands for what a Request requires and a recorded one lacks; "?", "" and 0: not known
UNKNOWN_REQUEST: Mapping[str, JsonValue] = {
    "kind": "t2v",
    "prompt": "?",
    "model": "",
    "resolution": "custom",
    "aspect": "custom",
    "width": 0,
    "height": 0,
    "num_frames": 1,
    "steps": 4,
    "sampler": "sde",
    "sigma_max": 80.0,
    "boundary": 0.9,
    "topk": 0.1,
    "fps": 16,
}


def clip_id(stem: str) -> str:
    """How the page, the index and the API call a clip: its file's name without the ending, letters and digits of any
    script, "_", "." and "-" as they are, every other character as its UTF-8 bytes, %20. "" for a hidden file, and for a
    name that is no UTF-8."""
    try:
        told = re.sub(r"[^\w.-]|^-", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), stem)
    except UnicodeEncodeError:
        return ""
    return told if CLIP_ID.fullmatch(told) else ""


def clip_stem(told: str) -> str:
    """The name that a `clip_id` stands for; "" for what is none, or would be no name of a file."""
    stem = unquote(told, errors="surrogateescape") if CLIP_ID.fullmatch(told) else ""
    too_long = len(stem.encode("utf-8", "surrogateescape")) > MAX_CLIP_NAME_BYTES
    return "" if too_long or clip_id(stem) != told or "/" in stem or "\0" in stem else stem


class Record(BaseModel):
    """Frozen. What was not set is not written; what a newer version added is kept and written again."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @model_serializer(mode="wrap")
    def _write_what_was_set(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {name: value for name, value in write(self).items() if name in self.model_fields_set}


class Ran(Record):
    """What really ran; a wish or a fall-back may have made it different from what was asked."""

    attention: str = ""
    backend: str = ""
    quant_linear: str = ""
    int8: str = ""  # how INT8 layers scale, where there are any
    exchange: str = ""  # "int8" where cards that shared the clip sent each other fewer bits
    device: str = ""
    device_name: str = ""
    arch: str = ""
    torch: str = ""
    cuda: str = ""
    cudnn: int = 0
    encoder: str = ""  # of the mp4: ffmpeg's name of it
    weights: dict[str, str] = {}  # component -> file name


class Predicted(Record):
    """What the plan said."""

    peak_bytes: int = 0
    seconds: float = 0.0


class MeasuredOn(Record):
    """What measurements depend on: the card, its driver, torch's allocator, the kernels that ran fused."""

    gpu: str = ""
    driver: str = ""
    torch: str = ""
    cudnn: str = ""
    allocator: str = ""
    kernels: str = ""


class Measured(Record):
    """What the attempt took, in all and per phase; 0 or left out: not measured.

    Args:
        peak_bytes: most that tensors took. Per phase beside it: most that torch's allocator held, which is what a job's
            cap counts, and what the driver showed for the process then, its CUDA context included.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    phase_seconds: dict[str, float] = {}
    phase_peak_bytes: dict[str, int] = {}
    phase_reserved_bytes: dict[str, int] = {}
    phase_nvml_bytes: dict[str, int] = {}
    on: MeasuredOn = MeasuredOn()

    @property
    def device_bytes(self) -> int:
        """Most of the device that the attempt took, by the fullest count there is."""
        return max(*self.phase_nvml_bytes.values(), *self.phase_reserved_bytes.values(), self.peak_bytes, 0)


class ClipResult(Measured):
    """A `result`: the clip that an attempt made. `warnings` are the findings of media/verify.py."""

    path: str = ""
    sidecar: str = ""
    sha256: str = ""
    frames: int = 0
    width: int = 0
    height: int = 0
    fps: int = 0
    warnings: tuple[str, ...] = ()
    ran: Ran = Ran()


class Sidecar(Record):
    """What made a clip and what came of it; rating, note, star and tags are added when a person gives them."""

    v: int = SIDECAR_VERSION
    created: datetime | None = None
    job: int = 0
    attempt: int = 0
    request: Request
    plan: Plan | None = None
    ran: Ran = Ran()
    versions: dict[str, str] = {}
    sha256: str = ""
    frames: int = 0
    width: int = 0
    height: int = 0
    fps: int = 0
    warnings: tuple[str, ...] = ()
    predicted: Predicted = Predicted()
    measured: Measured = Measured()
    rating: str = ""
    note: str = ""
    starred: bool = False
    tags: tuple[str, ...] = ()

    @property
    def whole_frames(self) -> int:
        """Frames of the file, with those of the clip that it continues; an old record has only what was asked."""
        return self.frames or self.request.num_frames

    def result(self, clip: Path) -> ClipResult:
        """The result that this sidecar of `clip` stands for."""
        facts = self.model_dump(include={"sha256", "frames", "width", "height", "fps", "warnings", "ran"})
        place = {"path": str(clip), "sidecar": f"{clip}.json"}
        return ClipResult.model_validate({**place, **facts, **self.measured.model_dump()})


def rating_parts(rating: str) -> tuple[str, str]:
    """The stars in front of a rating and the words behind them: "★★★★☆ smooth" is ("★★★★☆", "smooth")."""
    words = rating.lstrip("★☆ ")
    return rating[: len(rating) - len(words)].replace(" ", ""), words.strip()


R = TypeVar("R", bound=Record)
# Far beyond what any version wrote: a sidecar with a plan is 8 levels deep and has 600 values
MAX_DEPTH, MAX_VALUES, MAX_TEXT = 24, 20_000, 100_000
MAX_ROUNDS = 8  # of leaving out what is mistyped; then whole parts go
LARGEST = 2**63 - 1


def read_record(kind: type[R], document: Mapping[str, Any]) -> R | None:
    """The record that parsed JSON stands for, whatever version wrote it, a person changed or a disk damaged.

    What is too deep, too long or no number of this world is left out first, so that no reader meets it.

    Returns:
        None where a part is missing that nothing can stand for: a sidecar without a request.
    """
    left = iter(range(MAX_VALUES))
    bounded: Any = _bounded(dict(islice(document.items(), 1000)), MAX_DEPTH, left)
    for turn in range(2 * MAX_ROUNDS):
        try:
            return kind.model_validate(bounded)
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_input=False, include_context=False)
        if any(not one["loc"] or (one["type"] == "missing" and len(one["loc"]) == 1) for one in wrong):
            return None
        done = turn < MAX_ROUNDS and _leave_out(bounded, [(one["loc"], one["type"] == "missing") for one in wrong])
        for part in {one["loc"][0] for one in wrong} if not done else ():
            bounded.pop(part, None)
    return None


def _leave_out(document: Any, wrong: Iterable[tuple[tuple[int | str, ...], bool]]) -> bool:
    """Take the wrong parts out of a document, or put what stands for them; False where none could be found."""
    places: dict[tuple[int | str, ...], JsonValue | None] = {}
    for place, missing in wrong:
        if not missing:
            place = _inside(document, place)
        replaced = place[-2:-1] == ("request",) and place[-1] in UNKNOWN_REQUEST
        if missing and not replaced:  # its container cannot be read without it
            place = place[:-1]
        places[place] = UNKNOWN_REQUEST[str(place[-1])] if replaced else None
    found = False
    # the inner before the outer and the last of a list first, so that the other places stay where they are
    for place in sorted(places, key=lambda place: [str(step).zfill(12) for step in place], reverse=True):
        with suppress(KeyError, IndexError, TypeError):
            parent = document
            for step in place[:-1]:
                parent = parent[step]
            if (stand_in := places[place]) is not None:
                parent[place[-1]] = stand_in
            else:
                del parent[place[-1]]
            found = True
    return found


def _inside(document: Any, place: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The beginning of a place that the document has: behind it pydantic names the member of a union."""
    for depth, step in enumerate(place):
        here = isinstance(document, dict) and step in document
        here = here or (isinstance(document, list) and isinstance(step, int) and step < len(document))
        if not here:
            return place[:depth]
        document = document[step]
    return place


def _bounded(value: Any, depth: int, left: Iterator[int]) -> Any:
    """The value within the limits; None for what is beyond them. Lone surrogates, which UTF-8 lacks, become "?"."""
    if next(left, None) is None or depth == 0:
        return None
    if isinstance(value, str):
        value = value[:MAX_TEXT]
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, int | float):
        return value if abs(value) <= LARGEST else None
    if isinstance(value, Mapping):
        return {_bounded(str(name), 1, left) or "": _bounded(one, depth - 1, left) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_bounded(one, depth - 1, left) for one in value[:MAX_VALUES]]
    return value
