"""Longer clips: what a request that continues a clip takes over from it, and the requests of a storyboard."""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbodiff.archive.clips import read_sidecar
from turbodiff.media.joining import clip_format
from turbodiff.spec.errors import FileError, RequestError
from turbodiff.spec.models import Inventory, ModelSpec, all_models, find_model
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request, Segment
from turbodiff.spec.shapes import nearest_frame_counts

MAX_SEGMENTS = 20  # of a storyboard, as many as one browser may queue
LAST_FIELDS = ("smooth_fps", "interpolator", "upscale", "upscaler", "end_image")  # the last segment's of a storyboard
MAX_SECONDS = 1000  # no model makes as many
SIZE_FIELDS = ("size", "resolution", "aspect", "width", "height", "fps")
# what means the same to a text-to-video model and the picture-to-video model that continues its clip
SHARED_FIELDS = (
    "prompt", "seed", "num_frames", "nonce", "after", "continues", "attention", "quant_linear", "text_dtype", "pinned",
    "gpu", "exchange", "encoder",
)  # fmt: skip


def continuing_model(spec: ModelSpec, here: Inventory) -> ModelSpec:
    """The model that goes on where a clip of `spec` ends: itself where it starts from a picture, else the first that
    does and is on this disk, distilled ones first; the bundled one for the bundled."""
    if spec.kind == "i2v":
        return spec
    able = [other for other in all_models() if other.kind == "i2v" and other.bundled == spec.bundled]
    return min(able, key=lambda other: (not (other.bundled or here.has_networks(other)), not other.turbo))


def continuing_fields(fields: Mapping[str, Any], here: Inventory) -> dict[str, Any]:
    """The fields of a request that names a clip to continue, in that clip's size and rate, with a model that can (where
    none is named, one for the clip's own); other fields as they are, but for those that were meant for a named model
    which cannot.

    Raises:
        RequestError, FileError: no such model, no clip that can be read.
    """
    if not (fields.get("continues") or fields.get("after")):
        return dict(fields)
    path = fields.get("continues")
    named = fields.get("model")
    asked = find_model(str(named or (read_sidecar(Path(str(path))).request.model if path else "demo")))
    spec = continuing_model(asked, here)
    shared = fields if spec is asked or not named else {name: fields[name] for name in SHARED_FIELDS if name in fields}
    given = {**shared, "model": spec.name, "kind": spec.kind}
    given.pop("image", None)
    if path:
        refuse_finished(Path(str(path)))
        found = clip_format(Path(str(path)))
        given = {name: value for name, value in given.items() if name not in SIZE_FIELDS}
        given |= {"size": f"{found.width}x{found.height}", "fps": found.fps}
    else:
        given = {**{name: fields[name] for name in SIZE_FIELDS if name in fields}, **given}
    return given


def storyboard_requests(fields: Mapping[str, Any], rows: Sequence[Segment], first: Plan) -> list[dict[str, Any]]:
    """The fields of one request for each segment: `fields`, then one for each row, which goes on where the one before
    it ends, in the size and rate of the plan of the first.

    Raises:
        RequestError: too many rows, or one without a length.
    """
    if len(rows) >= MAX_SEGMENTS:
        raise RequestError(
            "a storyboard has at most 20 segments", code="storyboard_rows", field="storyboard", got=len(rows) + 1,
            expected=f"1..{MAX_SEGMENTS}",
        )  # fmt: skip
    ran, many = first.request, [{**fields, "nonce": secrets.token_hex(16)}]
    ending = {name: many[0].pop(name) for name in LAST_FIELDS if name in many[0]}
    own = {
        name: value for name, value in fields.items() if name not in (*SIZE_FIELDS, *LAST_FIELDS, "continues", "image")
    }
    pinned = sorted({*fields.get("pinned", ()), "size"})
    for row in rows:
        if not 0 < row.seconds < MAX_SECONDS:
            raise RequestError(
                f"segment {len(many) + 1} needs a length", code="storyboard_seconds", field="storyboard",
                got=len(many) + 1, expected="seconds above 0", try_instead="5",
            )  # fmt: skip
        given = {**own, "prompt": row.prompt, "seed": row.seed, "pinned": pinned, "nonce": secrets.token_hex(16)}
        given |= {"size": f"{ran.width}x{ran.height}", "fps": ran.fps, "after": many[-1]["nonce"]}
        many.append({**given, "num_frames": frames_of(row.seconds, ran.fps)})
    many[-1] |= ending
    return many


def refuse_finished(clip: Path) -> None:
    """Refuse to continue a clip with frames in between or enlarged ones: the model goes on from its own.

    Raises:
        RequestError: field `continues`.
    """
    try:
        made = read_sidecar(clip)
    except FileError:  # somebody else's: it has no record, and is what it is
        return
    if made.request.finishing or made.width not in (0, made.request.width):  # or a contact sheet
        raise RequestError(
            "a finished clip cannot be continued", code="continues_finished", field="continues", got=clip.name,
            expected="a clip as the model made it", try_instead="make it again without smoother motion and enlarging",
        )  # fmt: skip


def frames_of(seconds: float, fps: int) -> int:
    """The 4n+1 frames of a continuation that add about so many seconds: one of them is in the clip before it, too."""
    wanted = seconds * fps + 1
    below, above = nearest_frame_counts(int(wanted))
    return below if wanted - below <= above - wanted and below > 1 else above


def after_unknown(request: Request) -> RequestError:
    """The error for a request that would wait for ever: no job has the nonce of the one that it continues."""
    return RequestError(
        "no earlier job has that nonce, so this one would wait for ever", code="after_unknown",
        field="after", got=request.after, expected="the nonce of a job that was submitted before",
        try_instead="--continues with a clip",
    )  # fmt: skip
