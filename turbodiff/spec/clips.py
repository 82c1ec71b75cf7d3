"""What is recorded about a finished clip: the sidecar beside it, and the result that a worker reports.

Both are JSON. `read_record` opens what another version wrote, or a person damaged: a part that is missing, unknown or
mistyped takes its default.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, SerializerFunctionWrapHandler, ValidationError, model_serializer

from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request

SIDECAR_VERSION = 1

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


class Measured(Record):
    """What the attempt took, in all and per phase; 0: not measured."""

    seconds: float = 0.0
    peak_bytes: int = 0
    phase_seconds: dict[str, float] = {}
    phase_peak_bytes: dict[str, int] = {}


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
    """What made a clip and what came of it; a rating and a note are added when a person gives them."""

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
SCALARS = ("str", "int", "float", "bool")  # as pydantic names them at the end of an error's path


def read_record(kind: type[R], document: dict[str, Any]) -> R | None:
    """The record that parsed JSON stands for, whatever version wrote it; `document` is changed on the way.

    Returns:
        None where a part is missing that nothing can stand for: a sidecar without a request.
    """
    while True:
        try:
            return kind.model_validate(document)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        *place, name = first["loc"]
        if name in SCALARS:  # a member of a union of scalars, which is no part of the document
            *place, name = place
        replaced = place[-1:] == ["request"] and name in UNKNOWN_REQUEST
        if first["type"] == "missing" and not replaced:  # its container cannot be read without it
            if not place:
                return None
            *place, name = place
        parent: Any = document
        for step in place:
            parent = parent[step]
        if replaced:
            parent[name] = UNKNOWN_REQUEST[str(name)]
        else:
            del parent[name]
