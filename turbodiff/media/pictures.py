"""A picture before it runs: what it proposes, what fitting makes of it, a clip's frame as a new one.

Bytes of strangers are decoded by media/decode_picture.py in a process of its own; a clip is ours and is read by ffmpeg.
"""

import io
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.spec.request import Fit

PREVIEW_SIDE = 360  # pixels of the longer side of a preview
LOOK_SIDE = 128  # pixels of the picture that the advisor looks at


class Look(NamedTuple):
    """Size of a picture held upright, and what its content proposes; `key` and `numbers` say why (media/advice.py)."""

    width: int
    height: int
    boundary: float
    sampler: str
    key: str
    numbers: dict[str, float]


def look(picture: Path) -> Look:
    """What a picture proposes for its image-to-video run; remembered until the file changes.

    Raises:
        FileError: field `image`: not a picture that can be used.
    """
    return _look(picture, _state(picture))


def preview(picture: Path, width: int, height: int, fit: Fit) -> bytes:
    """What fitting to `width` x `height` makes of a picture, small, as a JPEG; remembered until the file changes.

    Raises:
        FileError: as `look`.
    """
    return _preview(picture, _state(picture), width, height, fit)


def frame(clip: Path, number: int, into: Path) -> Path:
    """Frame `number` (from 0) of a clip of the library as a PNG in the folder `into`.

    Raises:
        FileError: the clip has no such frame or cannot be read.
    """
    from turbodiff.media.ffmpeg import Ffmpeg

    # the comma is ffmpeg's separator of filters: it is escaped within one
    choice = (
        "-i",
        str(clip),
        "-vf",
        f"select=eq(n\\,{number})",
        "-frames:v",
        "1",
        "-c:v",
        "png",
        "-f",
        "image2pipe",
        "-",
    )
    reader = Ffmpeg(choice, feed=False)
    png = reader.stdout.read()
    status, words = reader.finish()
    if status or not png:
        raise FileError(
            "the clip has no such frame",
            code="frame_missing",
            field="frame",
            got=words[-200:] or number,
            expected="a frame of the clip",
            try_instead="another frame",
        )
    into.mkdir(parents=True, exist_ok=True)
    made = into / f"{clip.stem}-frame{number}.png"
    made.write_bytes(png)
    return made


def _state(picture: Path) -> tuple[int, int]:
    try:
        stat = picture.stat()
    except OSError:
        return (0, 0)  # the decoder says that it is missing
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=32)
def _look(picture: Path, _state: tuple[int, int]) -> Look:
    from turbodiff.media.advice import advise
    from turbodiff.media.images import fit_file

    seen = fit_file(picture, LOOK_SIDE, LOOK_SIDE, "stretch")
    advice = advise(seen.pixels)
    return Look(seen.source_width, seen.source_height, advice.boundary, advice.sampler, advice.key, advice.numbers)


@lru_cache(maxsize=32)
def _preview(picture: Path, _state: tuple[int, int], width: int, height: int, fit: Fit) -> bytes:
    from PIL import Image

    from turbodiff.media.images import fit_file

    share = min(1.0, PREVIEW_SIDE / max(width, height))
    fitted = fit_file(picture, max(1, round(width * share)), max(1, round(height * share)), fit)
    data = io.BytesIO()
    Image.fromarray(fitted.pixels).save(data, "JPEG", quality=82)
    return data.getvalue()
