"""What a person asks of an export: another format of a clip, trimmed, at another quality or frame rate."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from turbodiff.spec.errors import RequestError
from turbodiff.spec.models import Frozen

Format = Literal["mp4", "h265", "webm", "webp", "gif", "prores", "png", "first", "last"]
SCALES = (1, 2, 4)
RATES = (0, 24, 30, 60)  # frames per second; 0: as the clip is


class Kind(NamedTuple):
    """A format: the ending of its file, its media type, and whether a quality can be chosen and motion remains."""

    suffix: str
    media_type: str
    has_quality: bool = True
    moves: bool = True


FORMATS: Mapping[str, Kind] = {
    "mp4": Kind(".mp4", "video/mp4"),
    "h265": Kind(".h265.mp4", "video/mp4"),
    "webm": Kind(".webm", "video/webm"),
    "webp": Kind(".webp", "image/webp"),
    "gif": Kind(".gif", "image/gif", has_quality=False),
    "prores": Kind(".mov", "video/quicktime", has_quality=False),
    "png": Kind(".zip", "application/zip", has_quality=False),
    "first": Kind(".first.png", "image/png", has_quality=False, moves=False),
    "last": Kind(".last.png", "image/png", has_quality=False, moves=False),
}


class Export(Frozen):
    """An export; `start_s` and `end_s` are seconds of the clip, `end_s` 0 is its end."""

    format: Format = "mp4"
    quality: int = Field(default=80, ge=1, le=100)
    fps: Literal[0, 24, 30, 60] = 0
    upscale: Literal[1, 2, 4] = 1  # sides over those of the clip
    start_s: float = Field(default=0.0, ge=0, le=3600)
    end_s: float = Field(default=0.0, ge=0, le=3600)


def make_export(fields: Mapping[str, object]) -> Export:
    """An export from what a form, flags or JSON say.

    Raises:
        RequestError: field at fault: no such format, quality or rate, or an end before the start.
    """
    try:
        made = Export.model_validate({name: fields[name] for name in Export.model_fields if name in fields})
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        name = str(wrong["loc"][0])
        expected = {
            "format": " | ".join(FORMATS), "fps": " | ".join(map(str, RATES)), "quality": "1..100",
            "upscale": " | ".join(map(str, SCALES)),
        }.get(name, "0..3600")  # fmt: skip
        raise RequestError(
            "an export cannot be made so", code="export_field", field=name, got=str(fields.get(name))[:40],
            expected=expected,
        ) from None  # fmt: skip
    if made.end_s and made.end_s <= made.start_s:
        raise RequestError(
            "the end is not after the start", code="export_field", field="end_s", got=made.end_s,
            expected=f"> {made.start_s:g}",
        )  # fmt: skip
    return made
